"""What `show` does: a saved run as a page."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Any

from genlm_bytes_smc.cli.output import CliError, UsageError, say
from genlm_bytes_smc.smc import SMCResult, files
from genlm_bytes_smc.viz import run_page


def show_run(run: str, out: str | None, browse: bool) -> None:
    """The command `show`."""
    result, about = _load(run)
    page = run_page(result, about, title=Path(run).name)
    if out == "-":
        if browse:
            raise UsageError("--open needs a file, not --out -")
        sys.stdout.write(page)
        return
    target = Path(run).with_suffix(".html") if out is None else Path(out)
    if target.exists() and target.samefile(run):
        raise UsageError(f"--out {target} is the run itself")
    try:
        files.write(target, page)
    except OSError as error:
        raise CliError(f"cannot write {target}: {error.strerror or error}") from None
    say(f"wrote {target}")
    if browse:
        webbrowser.open(target.resolve().as_uri())


def _load(path: str) -> tuple[SMCResult, dict[str, Any]]:
    try:
        data = files.read(path)
        result = SMCResult(*files.unpack(data))
        _check(result)
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        told = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise CliError(f"{path} is no saved run: {told}") from None
    about = data.get("about")
    return result, about if isinstance(about, dict) else {}


def _check(result: SMCResult) -> None:
    """Raise ValueError unless every array is as long as there are particles."""
    particles, n = result.state.particles, result.size
    arrays: list[Any] = [particles.length, particles.ended, particles.text, particles.eve]
    for info in result.history:
        arrays += [a for a in (info.symbols, info.log_weights, info.ancestors) if a is not None]
        if info.ancestors is not None and not ((info.ancestors >= 0) & (info.ancestors < n)).all():
            raise ValueError(f"step {info.step} has an ancestor that is no particle")
    if n < 1 or any(len(a) != n for a in arrays):
        raise ValueError("its arrays differ in length")
