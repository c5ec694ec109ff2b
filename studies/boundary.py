"""The next byte after a prompt that is cut in the middle of a token, by three methods.

A text is cut at every byte. The byte before the cut and the byte after it may belong to one
token, which the model then has no way to write: the canonical tokens of the prompt end in a
token that the text does not have. Three ways to predict the next byte are compared with a wide
byte beam: a narrow byte beam, the canonical tokens' conditional, and token healing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import FloatArray
from genlm_bytes_smc.experiments.experiment import (
    GRID,
    Config,
    Experiment,
    ExperimentError,
    Outcome,
    Report,
    Row,
    Section,
    Table,
    figure,
    label,
    legend,
    style,
)
from genlm_bytes_smc.experiments.models import (
    ending,
    fresh_engine,
    is_bundled,
    read_texts,
)
from genlm_bytes_smc.smc.many import run_blocking

from .measures import LN2, jensen_shannon
from .texts import one_of_each

REFERENCE, NARROW, THRESHOLD = 128, 5, 0.001
REAL_REFERENCE = 20  # of a real model, whose rows are dear: 20 is within 0.1 nats of wider ones
EXAMPLE = "An apple a day keeps the doctor away."
METHODS = {
    "beam": f"byte beam, K={NARROW}",
    "tokens": "canonical tokens",
    "healing": "token healing",
}


def jobs(quick: bool, model: Config) -> list[Config]:
    """List a job for each text."""
    bundled = is_bundled(model)
    kinds, most = (5, 40) if quick else (20, 120) if bundled else (6, 96)
    texts = [EXAMPLE, *(t.decode() for t in one_of_each(kinds, most, model=model))]
    wide = {} if bundled else {"reference": REAL_REFERENCE}
    return [{"model": model, "text": text, **wide} for text in texts]


def run(config: Config) -> Outcome:
    """Measure every cut of one text."""
    return run_blocking(_run(config))


async def _run(config: Config) -> Outcome:
    text = config["text"].encode()
    model = byte_model(fresh_engine(config["model"]))
    wide, narrow = [
        await read_texts(model, ending(model, params), [text], keep_rows=True)
        for params in (
            BeamParams(K=config.get("reference", REFERENCE)),
            BeamParams(K=NARROW, prune_threshold=THRESHOLD),
        )
    ]
    tokens, healing = await token_rows(model, text)
    truth = np.frombuffer(text, dtype=np.uint8)
    result: dict[str, Any] = {"inside": inside_token(model, text)}
    for name, rows in (("beam", narrow.rows[0]), ("tokens", tokens), ("healing", healing)):
        apart = jensen_shannon(rows, wide.rows[0])
        logp = rows[np.arange(len(text)), truth]
        gap = (wide.rows[0][np.arange(len(text)), truth] - logp) / LN2
        result[name] = {"jsd": apart.tolist(), "excess": gap.tolist()}
    return Outcome(result)


def inside_token(model: ByteModel, text: bytes) -> list[bool]:
    """Tell for each cut before byte i whether it falls inside one of the text's own tokens.

    Raises:
        ExperimentError: the tokenizer cannot cut the text.
    """
    tokens = _canonical(model, text)
    at, ends = 0, {0}
    for token in tokens:
        at += len(model.vocab[token])
        ends.add(at)
    return [i not in ends for i in range(len(text))]


async def token_rows(model: ByteModel, text: bytes) -> tuple[FloatArray, FloatArray]:
    """Return next-byte rows at every cut, by canonical tokens and by token healing.

    By canonical tokens: the prompt's own tokens are the context, and the next byte is the
    first byte of the next token. By token healing: the last token is taken back, the next
    token must begin with its bytes, and if it is just them the next byte comes after it.

    Returns:
        Two float64[n, 257], nats. A cut inside a character, which the tokenizer cannot cut
        into tokens, is taken at the character's beginning and the row is conditioned on the
        bytes since, as far as one token spells them.
    """
    tree, start = model.engine.tree, model.engine.start
    plain = np.full((len(text), N_SYMBOLS), -np.inf)
    healed = np.full((len(text), N_SYMBOLS), -np.inf)
    contexts, partial = [], []
    for cut in range(len(text)):
        whole = _whole_characters(text[:cut])
        contexts.append(_canonical(model, whole))
        partial.append(text[len(whole) : cut])
    nodes = np.array([tree.insert([*start, *c]) for c in contexts], dtype=np.int64)
    back = np.array([tree.insert([*start, *c[:-1]]) for c in contexts], dtype=np.int64)
    with tree.pinned(np.concatenate([nodes, back])):
        rows = _probabilities(model, await model.engine.rows(nodes))
        before = _probabilities(model, await model.engine.rows(back))
    for cut in range(len(text)):
        plain[cut] = _after(model, rows[cut], partial[cut])
        last = model.vocab[contexts[cut][-1]] if contexts[cut] else b""
        healed[cut] = _healed(model, before[cut], rows[cut], last, partial[cut])
    return plain, healed


def _canonical(model: ByteModel, text: bytes) -> list[int]:
    tokens = model.canonical(text)
    if text and not tokens:
        raise ExperimentError(f"the tokenizer has no tokens that spell {text[:40]!r}")
    return tokens


def _whole_characters(text: bytes) -> bytes:
    return text.decode("utf-8", "ignore").encode()


def _probabilities(model: ByteModel, logp: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return rows float64[n, V] over the tokens that spell something, which sum to one."""
    p = logp.double().exp().cpu().numpy()[:, : len(model.vocab)]
    spells = np.asarray(model.trie.position) >= 0
    p = np.where(spells, p, 0.0)
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def _by_byte(model: ByteModel, p: FloatArray, spelled: bytes) -> tuple[FloatArray, float]:
    """Return the mass of the tokens that go on after `spelled`, by their next byte and for the end
    float64[257]; and the mass of those that are just `spelled`."""
    out = np.zeros(N_SYMBOLS)
    just = 0.0
    trie = model.trie
    at = trie.find(spelled)
    if at < 0:
        return out, just
    by_place = p[trie.order]
    end_places = model.cut(ending(model, BeamParams(K=1)).eos)
    lo = int(trie.lo[at])
    just = float(by_place[lo : lo + int(trie.ends[at])].sum())
    for child in range(int(trie.first_child[at]), int(trie.first_child[at + 1])):
        below = slice(int(trie.lo[child]), int(trie.hi[child]))
        mass = float(by_place[below].sum())
        inside = (end_places >= below.start) & (end_places < below.stop)
        cut = float(by_place[end_places[inside]].sum())
        out[trie.byte[child]] += mass - cut
        out[EOS_COLUMN] += cut if not spelled else 0.0
    return out, just


def _after(model: ByteModel, p: FloatArray, partial: bytes) -> FloatArray:
    """Return the next byte of tokens that begin with `partial`, log float64[257]."""
    return _log(_by_byte(model, p, partial)[0])


def _healed(
    model: ByteModel, before: FloatArray, after: FloatArray, last: bytes, partial: bytes
) -> FloatArray:
    """Return the next byte where the last token is written anew, log float64[257]."""
    if not last:
        return _after(model, after, partial)
    longer, just = _by_byte(model, before, last + partial)
    if not partial:
        rest = _by_byte(model, after, b"")[0]
        return _log(longer + just * rest / max(rest.sum(), 1e-300))
    here = _by_byte(model, before, last)[1]  # the token as it was, and another after it
    return _log(longer + here * _by_byte(model, after, partial)[0])


def _log(p: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(p, 0.0) / max(float(p.sum()), 1e-300)))


# -- report ------------------------------------------------------------------------------------


def _pooled(rows: Sequence[Row], method: str, field: str, inside: bool | None) -> FloatArray:
    out: list[float] = []
    for row in rows:
        r = row["result"]
        out += [
            float(x)
            for x, i in zip(r[method][field], r["inside"], strict=True)
            if inside is None or i == inside
        ]
    return np.array(out)


def _mean_excess(values: FloatArray) -> tuple[float, float]:
    """Return the mean of what is finite, and the share of what is not (impossible bytes)."""
    fine = values[np.isfinite(values)]
    return float(fine.mean()) if len(fine) else math.nan, 1 - len(fine) / max(len(values), 1)


def report(rows: list[Row]) -> Report:
    """Return figures and words."""
    inside = {m: _pooled(rows, m, "jsd", True) for m in METHODS}
    outside = {m: _pooled(rows, m, "jsd", False) for m in METHODS}
    cost = {m: _mean_excess(_pooled(rows, m, "excess", True)) for m in METHODS}
    findings = [
        f"A prompt cut inside a token misleads canonical tokens: the next byte costs "
        f"{cost['tokens'][0]:.2f} bits more than it should, on average over {len(inside['beam'])} "
        f"such cuts. With token healing it costs {cost['healing'][0]:+.2f} bits, with a byte beam "
        f"of K={NARROW} {cost['beam'][0]:+.4f}.",
        f"At cuts between tokens ({len(outside['beam'])}) the mean divergence from the wide beam "
        f"is {outside['tokens'].mean():.3f} bits for canonical tokens, "
        f"{outside['healing'].mean():.3f} for token healing and {outside['beam'].mean():.1e} for "
        "the byte beam.",
    ]
    reference = rows[0]["config"].get("reference", REFERENCE)
    return Report(
        "Where a prompt ends",
        "A prompt may end in the middle of what the tokenizer would make one token. What does "
        "that do to the prediction of the next byte?",
        findings,
        [_example(rows[0]), _kinds(rows), _table(rows)],
        [
            f"Each text is cut before each of its bytes. The reference is a byte beam of "
            f"K={reference}; the byte beam compared with it has K={NARROW} and threshold "
            f"{THRESHOLD:g}. A cut is inside a token if the tokens of the whole text have no "
            "boundary there. The divergence (Jensen-Shannon, in bits, 0 to 1) compares whole "
            "next-byte distributions; the excess compares the log-probability of the byte that "
            "really comes.",
            "Token healing here is the usual one: take the prompt's last token back and let the "
            "next token begin with its bytes. It goes back by one token only, so it cannot find "
            "tokens that begin earlier.",
        ],
    )


def _example(row: Row) -> Section:
    text = row["config"]["text"]
    drawn, (axis,) = figure(1, height=3.6)
    places = np.arange(len(text.encode()))
    for i, method in enumerate(METHODS):
        values = [float(x) for x in row["result"][method]["excess"]]
        shown = np.clip(np.nan_to_num(values, posinf=14.0), None, 14.0)
        axis.plot(places, shown, label=METHODS[method], **style(i))
    for i, cut in enumerate(row["result"]["inside"]):
        if cut:
            axis.axvspan(i - 0.5, i + 0.5, color=GRID, alpha=0.7, linewidth=0)
    labels = [c if c != " " else "␣" for c in text] if text.isascii() else []
    if labels:
        axis.set_xticks(places, labels, fontsize=9)
    title = "Bits that the next byte costs beyond the reference; grey: cuts inside a token"
    label(axis, title, "the byte that comes next", "excess bits (14: impossible)")
    legend(axis)
    return Section(
        "One text, cut before each byte",
        [
            "Each place is a prompt: everything to the left of it. Where the curve of canonical "
            "tokens jumps, the model was asked to go on after tokens that it never sees before "
            "what comes. The byte beam sums over every way to cut the prompt that matters, also "
            "those with a token that reaches beyond its end, and stays at zero.",
        ],
        drawn,
        name="example",
    )


def _kinds(rows: list[Row]) -> Section:
    drawn, axes = figure(2)
    for axis, inside in zip(axes, (True, False), strict=True):
        for i, method in enumerate(METHODS):
            values = np.sort(np.maximum(_pooled(rows, method, "jsd", inside), 1e-9))
            share = 1 - np.arange(len(values)) / max(len(values), 1)
            look = style(i, marker="")
            axis.plot(values, share, label=METHODS[method], linewidth=2, **look)
        axis.set_xscale("log")
        where = "inside a token" if inside else "between tokens"
        label(axis, f"Cuts {where}", "Jensen-Shannon divergence, bits", "share of cuts beyond")
    legend(axes[0])
    return Section(
        "How often it goes wrong, and how badly",
        [
            "For each divergence, the share of cuts that are worse. A line further left is "
            "better. Inside tokens nearly every canonical prediction is far off; between tokens "
            "a part still is, where a longer token could have begun before the cut.",
        ],
        drawn,
        name="cuts",
    )


def _table(rows: list[Row]) -> Section:
    lines = []
    for method, name in METHODS.items():
        for inside in (True, False):
            jsd = _pooled(rows, method, "jsd", inside)
            if len(jsd) == 0:
                continue
            mean, impossible = _mean_excess(_pooled(rows, method, "excess", inside))
            lines.append(
                [
                    f"{name}, {'inside a token' if inside else 'between tokens'}",
                    str(len(jsd)),
                    f"{jsd.mean():.2e}",
                    f"{np.median(jsd):.1e}",
                    f"{np.quantile(jsd, 0.95):.2e}",
                    f"{mean:+.4f}",
                    f"{impossible:.1%}",
                ]
            )
    heads = ["prediction, cut", "cuts", "mean divergence", "median", "95% quantile"]
    heads += ["mean excess bits", "byte held impossible"]
    return Section("In numbers", [], table=Table(heads, lines))


EXPERIMENT = Experiment(
    "boundary",
    "Prompts cut at every byte",
    "the next byte by byte beam, canonical tokens and token healing",
    jobs,
    run,
    report,
)
