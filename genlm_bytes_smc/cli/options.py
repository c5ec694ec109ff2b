"""The options that commands share, written once and given to each of them.

An options class is a dataclass whose fields carry their typer declaration. `expand` turns a
function that takes such an object first into one that takes its fields as parameters, which
is what typer reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, TypeVar, get_type_hints

import typer


class UserInterruptError(Exception):
    """The user pressed Ctrl-C."""


MODEL, BEAM, OUTPUT = "Model", "Beam", "Output"  # panels of the help page


class Backend(StrEnum):
    """What runs the model; `load_model` knows the same names."""

    hf = "hf"
    vllm = "vllm"
    mlx = "mlx"
    sgl = "sgl"


class Prune(StrEnum):
    """How a beam is pruned; `BeamParams` knows the same names."""

    topk = "topk"
    unbiased = "unbiased"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how to print."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="'tiny' (bundled, nothing is downloaded), 'smollm2' (needs the extra smollm2), a "
            "directory in Hugging Face's format, a GGUF file, or a name on the Hugging Face hub.",
            rich_help_panel=MODEL,
        ),
    ] = "tiny"
    backend: Annotated[
        Backend | None,
        typer.Option(
            "--backend",
            help="What runs it; the others than hf need the package's extra of that name. "
            "[default: hf]",
            rich_help_panel=MODEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="For hf: cpu, cuda, cuda:1, mps. [default: cuda where there is some]",
            rich_help_panel=MODEL,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the model. Only for models whose authors you "
            "trust. [default: refuse such models]",
            rich_help_panel=MODEL,
        ),
    ] = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON, and nothing else, to stdout.", rich_help_panel=OUTPUT
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class BeamOptions(ModelOptions):
    """The beam's parameters as well."""

    width: Annotated[
        int,
        typer.Option(
            "--beam-width", "-K", min=1, help="Most candidates kept.", rich_help_panel=BEAM
        ),
    ] = 5
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            help="Drop candidates and new tokens below this share of the beam; 0 drops none, "
            "higher is faster.",
            rich_help_panel=BEAM,
        ),
    ] = 0.001
    prune: Annotated[
        Prune,
        typer.Option(
            "--prune",
            help="topk keeps the likeliest; unbiased draws, so that the expected prefix "
            "probability is exact.",
            rich_help_panel=BEAM,
        ),
    ] = Prune.topk
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Divides the token-level logits.", rich_help_panel=BEAM),
    ] = 1.0
    no_eos: Annotated[
        bool,
        typer.Option(
            "--no-eos",
            help="Let no token end the text. [default: the tokenizer's end token does]",
            rich_help_panel=BEAM,
        ),
    ] = False
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens",
            help="Spellings of special tokens in the input stand for those tokens. "
            "[default: they are plain text]",
            rich_help_panel=BEAM,
        ),
    ] = False
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Of what is drawn at random. [default: a new one each time]",
            rich_help_panel=BEAM,
        ),
    ] = None


Options = TypeVar("Options", bound=ModelOptions)


def expand(
    kind: type[Options], run: Callable[..., Coroutine[Any, Any, None] | None]
) -> Callable[..., None]:
    """A plain function with the fields of `kind` as further parameters.

    Args:
        kind: an options class.
        run: a function, or a coroutine function, whose first parameter is an object of that class.
    """
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
        )
        for f in fields(kind)
    ]

    @functools.wraps(run)
    def command(**given: Any) -> None:
        options = kind(**{p.name: given.pop(p.name) for p in shared})
        try:
            answer = run(options, **given)
            if inspect.iscoroutine(answer):
                import asyncio  # the help page need not wait for it

                asyncio.run(answer)
        except KeyboardInterrupt:  # told apart from typer's own, which says nothing
            raise UserInterruptError from None

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*keyword, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*keyword, *shared)}
    del command.__wrapped__  # typer must read the new signature
    return command
