"""The command `show`: a saved run as a page."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Any

from genlm_bytes_smc.cli.output import CliError, UsageError, say
from genlm_bytes_smc.cli.readings import readings
from genlm_bytes_smc.smc import SMCResult, files
from genlm_bytes_smc.surprisals import Surprisal
from genlm_bytes_smc.viz import run_page


def show_run(run: str, out: str | None, browse: bool) -> None:
    """Run the command `show`."""
    result, about, surprisals = _load(run)
    try:
        page = run_page(result, about, title=Path(run).name, surprisals=surprisals)
    except ValueError as error:
        raise CliError(f"cannot show {run}: {error}") from None
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


def _load(path: str) -> tuple[SMCResult, dict[str, Any], list[Surprisal]]:
    try:
        data = files.read(path)
        result, field = SMCResult(*files.unpack(data)), files.Field("run", data)
        return result, _about(field), readings(field)
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CliError(f"{path} is no saved run: {error}") from None


def _about(run: files.Field) -> dict[str, Any]:
    """Return what the page shows of what the run was asked for."""
    about = run.members().get("about")
    given = {} if about is None else about.members()
    named = ("prompt", "constraint", "model", "resampling")
    found: dict[str, Any] = {name: given[name].text() for name in named if name in given}
    if "ess_threshold" in given:
        found["ess_threshold"] = given["ess_threshold"].number(0, 1)
    return found
