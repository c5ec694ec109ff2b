"""The command line, `genlm-bytes-smc`: the commands and their help pages.

Nothing in the library imports it. A command checks its options, calls the library and prints; what
users of the library may want too belongs there. This file, `options` and `output` are imported for
a help page, so they import neither numpy nor torch; the other modules when their command runs.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import typer

from genlm_bytes_smc import __version__
from genlm_bytes_smc.cli.options import (
    PROGRAM,
    BeamOptions,
    ChooseOptions,
    GenerateOptions,
    JobOptions,
    ModelOptions,
    Options,
    ScoreOptions,
    StudyOptions,
    UserInterruptError,
    expand,
)
from genlm_bytes_smc.cli.output import CliError, UsageError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes

_ABOUT = """
Byte-level language modelling with token-level models.

Every command works at once on the small model that comes with the package; --model takes any
causal language model of the Hugging Face hub.

Exit codes: 0 done; 1 it failed, for a reason said in one line on stderr; 2 a wrong option;
130 interrupted.
"""


def _unwrapped(text: str | None) -> str:
    """Return a docstring with each paragraph on one line, broken where the terminal ends."""
    return "\n\n".join(" ".join(p.split()) for p in (text or "").split("\n\n"))


app = typer.Typer(
    name=PROGRAM,
    help=_unwrapped(_ABOUT),
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Prompt = Annotated[
    str,
    typer.Argument(help="What the text begins with; - reads it from stdin.", show_default=False),
]


def _command(kind: type[Options], *examples: str) -> Callable[[Any], Any]:
    """Register a function or coroutine function as a command with the options of `kind`."""

    def register(run: Callable[..., Coroutine[Any, Any, None] | None]) -> Callable[..., Any]:
        lines = "\n\n".join(f"[cyan]{PROGRAM} {example}[/cyan]" for example in examples)
        epilog = f"[bold]Examples[/bold]\n\n{lines}"
        name, text = run.__name__.rstrip("_"), _unwrapped(run.__doc__)
        return app.command(name, help=text, epilog=epilog)(expand(kind, run))

    return register


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@_command(BeamOptions, "demo", 'demo "To be, or not to be" --model gpt2')
async def demo(
    options: BeamOptions,
    prompt: Annotated[
        str, typer.Argument(help="What the text begins with; - reads it from stdin.")
    ] = "An apple a day keeps the ",
) -> None:
    """Complete a text; show its beam, its next bytes and the speed."""
    from genlm_bytes_smc.cli.run import demonstrate

    await demonstrate(options, prompt)


@_command(
    BeamOptions,
    'next "An apple a day keeps the "',
    "next --top 3 --json 'import numpy as '",
    "next --model gpt2 --special-tokens '<|endoftext|>The'",
)
async def next_(
    options: BeamOptions,
    prompt: Prompt,
    top: Annotated[int, typer.Option("--top", "-n", min=1, help="How many bytes to show.")] = 10,
) -> None:
    """Show the likeliest next bytes after PROMPT."""
    from genlm_bytes_smc.cli.run import show_next

    await show_next(options, prompt, top)


@_command(
    BeamOptions,
    'beam "An apple a day keeps the "',
    "beam --threshold 0 -K 8 'Grüße'",
)
async def beam(options: BeamOptions, prompt: Prompt) -> None:
    """Show the beam after PROMPT: how it may be cut into tokens, and what each way weighs.

    In a line: share of the beam, log weight in nats, the tokens, and what has been read of the
    token in flight.
    """
    from genlm_bytes_smc.cli.run import show_beam

    await show_beam(options, prompt)


@_command(
    BeamOptions,
    'complete "An apple a day keeps the " --greedy',
    "complete 'The module provides ' --steps 200 --seed 7 --temperature 0.8",
    "complete - --no-echo < prompt.txt > completion.txt",
)
async def complete(
    options: BeamOptions,
    prompt: Prompt,
    steps: Annotated[int, typer.Option("--steps", "-n", min=0, help="Most bytes to add.")] = 100,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest byte. [default: draw]")
    ] = False,
    no_echo: Annotated[
        bool, typer.Option("--no-echo", help="Print the completion without the prompt.")
    ] = False,
) -> None:
    """Add bytes to PROMPT, printed as they come, up to the end of the text.

    To a pipe or a file the bytes are written as they are. On a terminal a character appears
    when its last byte has come, bytes that are no UTF-8 as �, and control characters by their
    escapes.
    """
    from genlm_bytes_smc.cli.run import write_completion

    await write_completion(options, prompt, steps, greedy=greedy, echo=not no_echo)


@_command(
    ScoreOptions,
    "score README.md",
    "score --json --threshold 0.01 - < notes.txt",
    "score --per word notes.txt --html notes.html",
    "score --per word --jsonl sentence data.jsonl --json",
)
async def score(
    options: ScoreOptions,
    file: Annotated[str, typer.Argument(help="Any file; - is stdin.", show_default=False)],
) -> None:
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
    from genlm_bytes_smc.cli.score import show_score, show_surprisal

    if options.per is not None or options.lines or options.jsonl is not None:
        await show_surprisal(options, file)
    else:
        await show_score(options, file)


@_command(
    ChooseOptions,
    "choose 'The capital of France is' ' Paris' ' Rome' ' Berlin'",
    "choose 'Is the sky blue? ' yes no --normalise end --json",
    "choose 'The word for a dog is ' --options-file words.txt",
)
async def choose(
    options: ChooseOptions,
    prompt: Prompt,
    answers: Annotated[
        list[str] | None,
        typer.Argument(help="The answers, with the space before them where there is one."),
    ] = None,
) -> None:
    """Print the probabilities of given ANSWERS after PROMPT, among these answers.

    Each is summed over the ways to cut it into tokens. All are read as one prefix tree.
    """
    from genlm_bytes_smc.cli.score import show_choice

    await show_choice(options, prompt, answers or [])


@_command(
    GenerateOptions,
    "generate 'Write to me at ' --regex '[a-z]+@[a-z]+[.]com' --max-bytes 40",
    "generate 'The answer: ' --json-schema schema.json --particles 64 --json",
    "generate 'A point: ' --json-schema point.json --lookahead pilot",
    "generate 'Once upon a time' --save run.json",
)
async def generate(options: GenerateOptions, prompt: Prompt) -> None:
    """Draw weighted texts after PROMPT that satisfy a constraint, by sequential Monte Carlo.

    Without a constraint the texts are valid UTF-8.
    """
    from genlm_bytes_smc.cli.generate import show_generated

    await show_generated(options, prompt)


@app.command(
    epilog=f"[bold]Examples[/bold]\n\n[cyan]{PROGRAM} show run.json --out page.html --open[/cyan]"
)
def show(
    run: Annotated[str, typer.Argument(help="What generate --save wrote.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="The page; - is stdout. [default: RUN with .html]"),
    ] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a page that shows a saved RUN: posterior, particles by step, ancestry."""
    from genlm_bytes_smc.cli.generate import show_run

    show_run(run, out, browse)


@_command(
    JobOptions,
    "experiment bias --out out/bias --quick",
    "experiment approximation --out out/approximation --ray auto",
)
def experiment(
    options: JobOptions,
    name: Annotated[
        str,
        typer.Argument(
            help="approximation, bias, boundary, constraints or scaling.", show_default=False
        ),
    ],
) -> None:
    """Run one of the package's experiments; leave its rows, figures and a report in a folder.

    What has been done is kept: the same command goes on where it was interrupted.
    """
    from genlm_bytes_smc.cli.experiment import show_experiment

    show_experiment(options, name)


@_command(
    StudyOptions,
    "study --prompt 'Date:' --regex ' [0-9]{4}-[0-9]{2}-[0-9]{2}' --out out/dates",
    "study --model gpt2 --prompt 'The answer: ' --json-schema schema.json --out out/answers",
)
def study(options: StudyOptions) -> None:
    """Try the methods on your model, prompt and constraint, and recommend settings.

    The truth is summed up exactly where the constraint admits few texts, and else estimated
    by pooling many particles; which of the two is said.
    """
    from genlm_bytes_smc.cli.experiment import show_study

    show_study(options)


@_command(ModelOptions, "info", "info --model gpt2 --json")
async def info(options: ModelOptions) -> None:
    """Show the model, its vocabulary and trie, its window, and what memory they take."""
    from genlm_bytes_smc.cli.run import show_info

    await show_info(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 still shows the rest
            stream.reconfigure(errors="backslashreplace")
    gc.disable()  # until a command has imported what it needs: a tenth of the time it takes
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        code = app(given, prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else OK
    except (UserInterruptError, KeyboardInterrupt, typer.Abort):
        return _say_interrupted()
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the exit would flush and fail
        return FAILED
    except Exception as error:
        if _from_interrupt(error):
            return _say_interrupted()
        sys.stderr.write(f"error: {_one_line(error)}\n")
        # Typer's own errors know their exit code; its classes have moved between versions.
        return USAGE if isinstance(error, UsageError) else getattr(error, "exit_code", FAILED)
    finally:
        gc.enable()


def _say_interrupted() -> int:
    sys.stderr.write("\ninterrupted\n")
    return INTERRUPTED


def _from_interrupt(error: BaseException | None) -> bool:
    """Tell whether Ctrl-C is behind an error: compiled code may turn it into one of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: Exception) -> str:
    told = error.format_message() if hasattr(error, "format_message") else str(error)
    text = " ".join(told.split()).replace("lower threshold", "lower --threshold")
    if isinstance(error, MemoryError):
        return text or "out of memory"
    known = (CliError, ValueError, OSError, ImportError)
    if text and (isinstance(error, known) or hasattr(error, "format_message")):
        return text
    return f"{type(error).__name__}: {text}"
