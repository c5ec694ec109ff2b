"""What `study` does: measure the methods on a target, and recommend settings."""

from __future__ import annotations

import shlex
from typing import Any

from genlm_bytes_smc.cli.constraint import regex_of
from genlm_bytes_smc.cli.experiment import finished, model_of, say_files, told
from genlm_bytes_smc.cli.inputs import read_argument, read_file
from genlm_bytes_smc.cli.options import ModelOptions
from genlm_bytes_smc.cli.output import CliError, UsageError, say, table, write_json
from genlm_bytes_smc.constraints import ConstraintError
from genlm_bytes_smc.experiments import Advice, run_study
from genlm_bytes_smc.experiments.advice import truth_of


def show_study(
    options: ModelOptions,
    prompt: str,
    given: dict[str, str | None],
    out: str,
    *,
    max_bytes: int,
    error: float,
    tolerance: float,
    quick: bool,
    seed: int,
    workers: int | None,
    ray: str | None,
) -> None:
    """The command `study`; `given` has the constraints by the names of their options."""
    option, source, constraint = _constraint(given)
    text = read_argument(prompt).decode("utf-8", "surrogateescape")
    for name, value in (("--error", error), ("--tolerance", tolerance)):
        if not value > 0:
            raise UsageError(f"{name} must be above 0 nats, got {value:g}")

    def run() -> Any:
        return run_study(
            text,
            constraint,
            out,
            model=model_of(options),
            max_bytes=max_bytes,
            error=error,
            tolerance=tolerance,
            quick=quick,
            seed=seed,
            workers=workers,
            ray=ray,
            command=_command(options, prompt, option, source, out, quick),
        )

    try:
        done, advice = finished(run, out)
    except ConstraintError as problem:
        raise CliError(f"{option} {source}: {problem}") from None
    truth = truth_of(done.rows)
    if options.json:
        facts: dict[str, Any] = {
            "log_ml": truth.log_ml,
            "log_ml_error": truth.error,
            "exact": truth.exact,
        }
        facts |= {"recommended": advice.options(), "expected_error": advice.error}
        facts |= {"expected_lm_rows": advice.lm_rows, "reasons": list(advice.reasons)}
        write_json(facts | told(done))
        return
    kind = "exact value" if truth.exact else "pooled estimate"
    shown = f"{truth.log_ml:.3f} ± {truth.error:.2g} nats ({kind})"
    say(("Recommended", "bold underline"))
    table([(k, f"{v}") for k, v in advice.options().items()])
    say()
    say(("Why", "bold underline"))
    say(f"• The log marginal likelihood is {shown}, found {truth.how}.")
    for reason in advice.reasons:
        say(f"• {reason}")
    say()
    say(("try it: ", "dim"), _generate(options, advice, prompt, option, source, max_bytes))
    say_files(done)


def _constraint(given: dict[str, str | None]) -> tuple[str, str, tuple[str, str]]:
    """The option, what it was given, and the constraint as `run_study` takes it."""
    chosen = [(k, v) for k, v in given.items() if v is not None]
    if len(chosen) != 1:
        got = " and ".join(k for k, _ in chosen) or "none"
        raise UsageError(f"one constraint is due ({', '.join(given)}), got {got}")
    [(option, source)] = chosen
    if option == "--regex":
        regex_of(source)  # refused before any work
        return option, source, ("regex", source)
    try:
        text = read_file(source).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"{option} {source}: {error}") from None
    return option, source, (option[2:], text)


def _command(
    options: ModelOptions, prompt: str, option: str, source: str, out: str, quick: bool
) -> str:
    words = ["genlm-bytes-smc", "study", "--prompt", prompt, option, source, "--out", out]
    if options.model != "tiny":
        words += ["--model", options.model]
    return shlex.join(words + ["--quick"] * quick)


def _generate(
    options: ModelOptions, advice: Advice, prompt: str, option: str, source: str, max_bytes: int
) -> str:
    words = ["genlm-bytes-smc", "generate", prompt, option, source]
    words += ["--model", options.model] if options.model != "tiny" else []
    words += ["-K", str(advice.K), "--threshold", f"{advice.threshold:g}", "--prune", advice.prune]
    words += ["--particles", str(advice.particles), "--ess", f"{advice.ess:g}"]
    return shlex.join([*words, "--max-bytes", str(max_bytes)])
