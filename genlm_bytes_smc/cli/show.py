"""The command `show`: a saved run as a page; and what is noted for it when the run is saved.

Beside a run's particles, its file holds what it was asked for, and the surprisal of its likeliest
texts and how they may be cut, so that the page can be made without the model.
"""

from __future__ import annotations

import base64
import binascii
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np

from genlm_bytes_smc.cli.output import CliError, UsageError, say, write_file
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.scoring import ScoreError
from genlm_bytes_smc.smc import SMCResult, files
from genlm_bytes_smc.surprisals import Cut, Surprisal, spans_of, surprisal
from genlm_bytes_smc.viz import run_page

TEXTS = 4  # the likeliest are read again
LONGEST = 2000  # bytes: longer texts are left out


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
    write_file(target, page)
    say(f"wrote {target}")
    if browse:
        webbrowser.open(target.resolve().as_uri())


def _load(path: str) -> tuple[SMCResult, dict[str, Any], list[Surprisal]]:
    try:
        data = files.read(path)
        result, field = SMCResult(*files.unpack(data)), files.Field("run", data)
        return result, _about(field), _readings(field)
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


async def read_again(llm: ByteLLM, result: SMCResult) -> list[dict[str, Any]]:
    """Return the surprisal of the likeliest texts under the model, as JSON values.

    The model has computed the rows already, so as long as its cache holds them this takes none.
    """
    likely = [text for text, *_ in result.grouped()[:TEXTS]]
    texts = list(dict.fromkeys(text for text in likely if 0 < len(text) <= LONGEST))
    try:
        found = await surprisal(llm, texts) if texts else []
    except ScoreError:  # a beam too small for a text longer than the window
        return []
    return [
        {
            "text": base64.b64encode(r.text).decode("ascii"),
            "nats": [round(x, 4) if np.isfinite(x) else None for x in r.bytewise.tolist()],
            "cuts": [[float(f"{cut.share:.4g}"), list(cut.ends)] for cut in r.cuts],
        }
        for r in found
    ]


def _readings(run: files.Field) -> list[Surprisal]:
    """Return what `read_again` noted in a file; nothing of a file without it."""
    noted = run.members().get("readings")
    return [] if noted is None else [_reading(item) for item in noted.items()]


def _reading(item: files.Field) -> Surprisal:
    try:
        text = base64.b64decode(item["text"].text(), validate=True)
    except (ValueError, binascii.Error):
        raise item["text"].refuse("base64") from None
    nats = [np.inf if x.value is None else x.number() for x in item["nats"].items(len(text))]
    cuts = list[Cut]()
    for cut in item["cuts"].items():
        share, ends = cut.items(2)
        found = tuple(end.count(len(text)) for end in ends.items())
        cuts.append(Cut(share.number(0, 1), found))
    return Surprisal(
        text, np.array(nats, dtype=np.float64), spans_of(text, "byte"), "", tuple(cuts)
    )
