"""The commands `experiment` and `study`: rows, a report, and recommended settings."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genlm_bytes_smc.cli.common import (
    constraint_of,
    read_argument,
    say,
    source_text,
    table,
    write_json,
)
from genlm_bytes_smc.cli.options import (
    PROGRAM,
    CliError,
    ExperimentOptions,
    JobOptions,
    StudyOptions,
    UsageError,
)
from genlm_bytes_smc.constraints import ConstraintError
from genlm_bytes_smc.experiments import (
    EXPERIMENTS,
    Advice,
    Done,
    ExperimentError,
    run_experiment,
    run_study,
)
from genlm_bytes_smc.experiments.advice import truth_of


def show_experiment(options: ExperimentOptions) -> None:
    """Run the command `experiment`."""
    name = options.name
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    words = [PROGRAM, "experiment", name, "--out", options.out, *["--quick"] * options.quick]
    command = shlex.join(words + options.words())
    if not options.json:
        say((EXPERIMENTS[name].title, "bold"))
    with _in_one_line(options):
        done = run_experiment(name, command=command, **options.how())
    if options.json:
        write_json({"experiment": name, **_told(done)})
        return
    for finding in EXPERIMENTS[name].report(done.rows).findings:
        say(f"• {finding.replace('`', '')}")
    _say_files(done)


def show_study(options: StudyOptions) -> None:
    """Run the command `study`."""
    option, source, kind, constraint = _constraint(options)
    prompt = read_argument(options.prompt).decode("utf-8", "surrogateescape")
    for name, value in (("--error", options.error), ("--tolerance", options.tolerance)):
        if not value > 0:
            raise UsageError(f"{name} must be above 0 nats, got {value:g}")
    names = ("max_bytes", "error", "tolerance", "seed")
    target = {name: getattr(options, name) for name in names} | options.how()
    words = [PROGRAM, "study", "--prompt", options.prompt, option, source, "--out", options.out]
    target["command"] = shlex.join(words + options.words() + ["--quick"] * options.quick)
    try:
        with _in_one_line(options):
            done, advice = run_study(prompt, (kind, constraint), **target)
    except ConstraintError as problem:
        raise CliError(f"{option} {source}: {problem}") from None
    truth = truth_of(done.rows)
    if options.json:
        facts: dict[str, Any] = {
            "log_ml": truth.log_ml,
            "log_ml_error": truth.error,
            "exact": truth.exact,
            "recommended": advice.options(),
            "expected_error": advice.error,
            "expected_lm_rows": advice.lm_rows,
            "reasons": list(advice.reasons),
        }
        write_json(facts | _told(done))
        return
    known = "exact value" if truth.exact else "pooled estimate"
    shown = f"{truth.log_ml:.3f} ± {truth.error:.2g} nats ({known})"
    say(("Recommended", "bold underline"))
    table([(k, f"{v}") for k, v in advice.options().items()])
    say()
    say(("Why", "bold underline"))
    say(f"• The log marginal likelihood is {shown}, found {truth.how}.")
    for reason in advice.reasons:
        say(f"• {reason}")
    say()
    say(("try it: ", "dim"), suggestion(options, advice, option, source))
    _say_files(done)


def _constraint(options: StudyOptions) -> tuple[str, str, str, str]:
    """Return the option, what it was given, and kind and text of the constraint."""
    given = options.sources()
    if len(given) != 1:
        got = " and ".join(name for name, _ in given) or "none"
        raise UsageError(f"one constraint is due (--regex, --grammar, --json-schema), got {got}")
    [(option, source)] = given
    if option == "--regex":
        constraint_of(option, source)  # refused before any work
    return option, source, option[2:], source_text(option, source)


def suggestion(options: StudyOptions, advice: Advice, option: str, source: str) -> str:
    """Return a command line that generates with recommended settings."""
    words = [PROGRAM, "generate", options.prompt, option, source, *options.words()]
    words += ["-K", str(advice.K), "--threshold", f"{advice.threshold:g}", "--prune", advice.prune]
    words += ["--particles", str(advice.particles), "--ess", f"{advice.ess:g}"]
    words += ["--lookahead", "ngram" if advice.proposal == "lookahead" else "none"]
    return shlex.join([*words, "--max-bytes", str(options.max_bytes)])


@contextmanager
def _in_one_line(options: JobOptions) -> Iterator[None]:
    """Raise `CliError` where a study fails; what was done is kept."""
    gc.enable()
    try:
        yield
    except ExperimentError as error:
        first = str(error).splitlines()[0]
        raise CliError(f"{first} (rows so far are in {options.out})") from None
    except OSError as error:
        raise CliError(f"cannot write to {options.out}: {error.strerror or error}") from None


def _told(done: Done) -> dict[str, Any]:
    """Return how a study went, as JSON values."""
    return {"jobs": len(done.rows), "ran": done.ran, "files": [str(f) for f in done.files]}


def _say_files(done: Done) -> None:
    earlier = len(done.rows) - done.ran
    before = f", {earlier} of them done before" if earlier else ""
    say((f"{len(done.rows)} jobs{before}; see ", "dim"), str(done.files[0]))
