"""Texts of a run, read again for its page: their surprisal and how they may be cut, in its file."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.scoring import ScoreError
from genlm_bytes_smc.smc import SMCResult, files
from genlm_bytes_smc.surprisals import Surprisal, surprisal
from genlm_bytes_smc.text_parts import Cut, spans_of

TEXTS = 4  # the likeliest are read again
LONGEST = 2000  # bytes: longer texts are left out


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


def readings(run: files.Field) -> list[Surprisal]:
    """Return what `read_again` noted in a file; nothing of a file without it.

    Raises:
        ValueError: other data; it names the field that is not as it should be.
    """
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
