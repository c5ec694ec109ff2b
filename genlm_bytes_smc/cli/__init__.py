"""The command line, `genlm-bytes-smc`: the commands and their help pages.

Nothing in the library imports it. A command checks its options, calls the library and prints; what
users of the library may want too belongs there. This file and `options` are imported for a help
page, so they import neither numpy nor torch; the other modules when their command runs.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from genlm_bytes_smc import __version__
from genlm_bytes_smc.cli import options
from genlm_bytes_smc.cli.options import PROGRAM, CliError, UsageError

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


# Of each command: its class, the function that runs it, and examples. The module is imported when
# the command runs.
_COMMANDS: dict[str, tuple[type[Any], str, tuple[str, ...]]] = {
    "demo": (
        options.DemoOptions,
        "run.demonstrate",
        ("demo", 'demo "To be, or not to be" --model gpt2'),
    ),
    "next": (
        options.NextOptions,
        "run.show_next",
        (
            'next "An apple a day keeps the "',
            "next --top 3 --json 'import numpy as '",
            "next --model gpt2 --special-tokens '<|endoftext|>The'",
        ),
    ),
    "beam": (
        options.ShowBeamOptions,
        "run.show_beam",
        ('beam "An apple a day keeps the "', "beam --threshold 0 -K 8 'Grüße'"),
    ),
    "complete": (
        options.CompleteOptions,
        "run.write_completion",
        (
            'complete "An apple a day keeps the " --greedy',
            "complete 'The module provides ' --steps 200 --seed 7 --temperature 0.8",
            "complete - --no-echo < prompt.txt > completion.txt",
        ),
    ),
    "score": (
        options.ScoreOptions,
        "score.show_score",
        (
            "score README.md",
            "score --json --threshold 0.01 - < notes.txt",
            "score --per word notes.txt --html notes.html",
            "score --per word --jsonl sentence data.jsonl --json",
        ),
    ),
    "choose": (
        options.ChooseOptions,
        "score.show_choice",
        (
            "choose 'The capital of France is' ' Paris' ' Rome' ' Berlin'",
            "choose 'Is the sky blue? ' yes no --normalise end --json",
            "choose 'The word for a dog is ' --options-file words.txt",
        ),
    ),
    "generate": (
        options.GenerateOptions,
        "generate.show_generated",
        (
            "generate 'Write to me at ' --regex '[a-z]+@[a-z]+[.]com' --max-bytes 40",
            "generate 'The answer: ' --json-schema schema.json --particles 64 --json",
            "generate 'A point: ' --json-schema point.json --lookahead pilot",
            "generate 'Once upon a time' --save run.json",
        ),
    ),
    "show": (options.ShowOptions, "generate.show_run", ("show run.json --out page.html --open",)),
    "experiment": (
        options.ExperimentOptions,
        "experiment.show_experiment",
        (
            "experiment bias --out out/bias --quick",
            "experiment approximation --out out/approximation --ray auto",
        ),
    ),
    "study": (
        options.StudyOptions,
        "experiment.show_study",
        (
            "study --prompt 'Date:' --regex ' [0-9]{4}-[0-9]{2}-[0-9]{2}' --out out/dates",
            "study --model gpt2 --prompt 'The answer: ' --json-schema schema.json "
            "--out out/answers",
        ),
    ),
    "info": (options.InfoOptions, "run.show_info", ("info", "info --model gpt2 --json")),
}


class _UserInterruptError(Exception):
    """The user pressed Ctrl-C."""


def _command(kind: type[Any], target: str) -> Callable[..., None]:
    """Return a function with the fields of an options class as parameters, as typer reads them.

    It calls the function `target` of this package with an object of that class.
    """
    hints = get_type_hints(kind)
    shared = options.BeamOptions if issubclass(kind, options.BeamOptions) else options.ModelOptions
    last = {f.name for f in fields(shared)}
    parameters = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=Annotated[hints[f.name], f.metadata["typer"]],
        )
        for f in sorted(fields(kind), key=lambda f: f.name in last)  # a command's own first
    ]

    def command(**given: Any) -> None:
        module, _, name = target.partition(".")
        try:
            answer = getattr(import_module(f"{__name__}.{module}"), name)(kind(**given))
            if inspect.iscoroutine(answer):
                import asyncio  # the help page need not wait for it

                asyncio.run(answer)
        except KeyboardInterrupt:  # told apart from typer's own, which says nothing
            raise _UserInterruptError from None

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


for _name, (_kind, _target, _examples) in _COMMANDS.items():
    _lines = "\n\n".join(f"[cyan]{PROGRAM} {example}[/cyan]" for example in _examples)
    _epilog = f"[bold]Examples[/bold]\n\n{_lines}"
    app.command(_name, help=_unwrapped(_kind.__doc__), epilog=_epilog)(_command(_kind, _target))


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
    except (_UserInterruptError, KeyboardInterrupt, typer.Abort):
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
