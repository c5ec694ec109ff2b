"""Success, posterior distance and cost on a table of constraints, at equal LM work.

Six ways to sample from one language model under one constraint run until each has wanted as
many LM rows: locally constrained decoding, SMC over bytes, the same with a look-ahead from a
byte bigram and from pilot runs, genlm-control's SMC over its `ByteLLM`, and genlm-control's
token-level adaptive weighted rejection sampling (AWRS; Lipkin et al. 2025).
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from genlm.bytes import BeamParams as PeerParams
from genlm.control import EOS, SMC, PromptedLLM
from genlm.control import ByteLLM as PeerLLM
from genlm.control.sampler.token import AWRS, DirectTokenSampler

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.constraints import (
    ByteConstraint,
    ByteGrammar,
    ByteJsonSchema,
    ByteRegex,
    approximate_automaton,
)
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.experiments.experiment import (
    FAINT,
    Config,
    Experiment,
    Outcome,
    Report,
    Row,
    Section,
    Table,
    figure,
    label,
    style,
)
from genlm_bytes_smc.experiments.models import fresh_engine, is_bundled, metered
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, exact_sample, smc
from genlm_bytes_smc.smc.many import run_blocking

from .bias import bigram
from .measures import FloatArray, normalised, total_variation

PARTICLES, K, THRESHOLD, ESS = 8, 5, 0.01, 0.5
MOST_RUNS = 40  # of a method, should it want hardly any rows
MOST_TEXTS = 1000  # that are drawn exactly
PILOT_SEED = 10_000  # far from those of the runs

METHODS = {
    "local": "locally constrained decoding",
    "smc": "SMC over bytes",
    "lookahead": "SMC over bytes, bigram look-ahead",
    "pilot": "SMC over bytes, pilot look-ahead",
    "auto": 'SMC over bytes, lookahead="auto"',
    "exact": "exact samples",
    "bytellm": "genlm-control ByteLLM, SMC",
    "awrs": "genlm-control AWRS, SMC over tokens",
}


class Case(NamedTuple):
    """A constraint, what it comes after, and what is compared.

    Attributes:
        kind, source: "regex", "grammar" or "schema", and its text.
        prompt: ends where a token ends, so that byte and token models agree on it.
        max_bytes: of a text.
        head: posteriors are compared on so many first bytes.
    """

    kind: str
    source: str
    prompt: str
    max_bytes: int
    head: int

    def constraint(self) -> ByteConstraint:
        """Return the constraint, compiled."""
        if self.kind == "regex":
            return ByteRegex(self.source)
        if self.kind == "grammar":
            return ByteGrammar(self.source)
        return ByteJsonSchema(self.source, whitespace="python")


_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_STATE = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["user", "order", "zebra"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
CASES = {
    "date": Case(
        "regex", r" (19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", "Date:", 12, 3
    ),
    "e-mail": Case("regex", r" [a-z]{2,8}(\.[a-z]{2,8})?@[a-z]{3,8}\.(com|org)", "E-mail:", 40, 2),
    "sentence": Case(
        "regex", r" (function|quilt) (returns|juggles) (a|the) [a-z]{3,9}\.", "The", 40, 14
    ),
    "sum": Case(
        "grammar",
        'start: expr " = " NUM\nexpr: NUM | expr OP NUM\nOP: " + " | " - "\nNUM: /[1-9][0-9]?/',
        "5 + 5 = 10\n",
        20,
        2,
    ),
    "select": Case(
        "grammar",
        'start: " " cols " FROM " NAME ";"\ncols: "*" | NAME ("," " " NAME)?\nNAME: /[a-z]{2,8}/',
        "SELECT",
        34,
        2,
    ),
    "person": Case("schema", json.dumps(_PERSON), '{"name": "Anna", "age": 31}\n', 40, 11),
    "state": Case("schema", json.dumps(_STATE), '{"ok": true, "kind": "user"}\n', 34, 23),
}


# For other models: prompts after which SmolLM2 is not sure how the text begins, and heads that
# reach as far as it is unsure. Behind "Date:" it writes a year after 2000, and "The function ...".
REAL_CASES = {
    "date": CASES["date"]._replace(prompt="The meeting was held on", head=4),
    "sentence": CASES["sentence"]._replace(prompt="She sews and he writes code. The", head=20),
    "sum": CASES["sum"],
    "state": CASES["state"],
}


def jobs(quick: bool, model: Config) -> list[Config]:
    """List a job for each case, method and seed."""
    bundled = is_bundled(model)  # rows of other models are dear, so there are fewer
    cases = CASES if bundled else REAL_CASES
    names = ("date", "state") if quick else tuple(cases)
    many, budget = (2000, 600) if bundled else (400, 300)
    return [
        {
            "model": model,
            "case": name,
            **({} if bundled else {"prompt": cases[name].prompt, "head": cases[name].head}),
            "method": method,
            "particles": 4 if quick else PARTICLES,
            "lm_rows": 100 if quick else budget,
            "reference": 200 if quick else many,
            "seed": seed,
        }
        for name in names
        for method in METHODS
        for seed in range(2 if bundled and not quick else 1)
    ]


def case_of(config: Config) -> Case:
    """Return the case of a job, with the prompt and the head that the job names for itself."""
    own = {name: config[name] for name in ("prompt", "head") if name in config}
    return CASES[config["case"]]._replace(**own)


class Drawn(NamedTuple):
    """Weighted texts: bytes or None for one that is not complete, float64[N] log weights."""

    texts: list[bytes | None]
    log_weights: FloatArray


def run(config: Config) -> Outcome:
    """Run one method, with seeds of its own, until it has wanted the LM rows."""
    case = case_of(config)
    model = json.dumps(config["model"], sort_keys=True)
    reference, noise = _reference(model, case, config["reference"])
    ahead, fitted = _ahead(model, case, config["method"])
    engine, constraint = fresh_engine(config["model"]), case.constraint()
    drawn, rows, runs = list[Drawn](), fitted, 0
    most = 1 if config["method"] in ("auto", "exact") else MOST_RUNS  # the rows all at once
    while runs == 0 or (rows < config["lm_rows"] and runs < most):
        seed = 1000 * config["seed"] + runs
        one, cost = run_blocking(_METHOD[config["method"]](config, engine, constraint, seed, ahead))
        drawn, rows, runs = [*drawn, one], rows + cost, runs + 1
    weights, good, n = defaultdict[bytes, float](float), 0, 0
    top = max((float(d.log_weights.max()) for d in drawn if d.texts), default=0.0)
    for one in drawn:
        for text, logw in zip(one.texts, one.log_weights.tolist(), strict=True):
            n += 1
            if text is None or logw == -math.inf or not _admits(constraint, text):
                continue
            good += 1
            weights[text[: case.head]] += math.exp(logw - top)
    posterior = normalised(dict(weights))
    return Outcome(
        {
            "success": good / max(n, 1),
            "distance": total_variation(posterior, reference) if posterior else 1.0,
            "noise": noise,
            "heads": len(posterior),
            "lm_rows": rows,
            "fit_rows": fitted,
            "runs": runs,
            "particles": n,
        }
    )


def _admits(constraint: ByteConstraint, text: bytes) -> bool:
    return float(constraint.log_complete(constraint.states([text]))[0]) > -math.inf


@lru_cache(maxsize=2)
def _reference(model: str, case: Case, particles: int) -> tuple[dict[bytes, float], float]:
    """Return the posterior of first bytes from many particles, once a process; and how far two
    halves of as many are from each other, which is what its own noise amounts to."""
    target = _target(model, case, BeamParams(K=8, prune_threshold=0.001))
    ahead, _ = _ahead(model, case, "pilot")
    halves = []
    for seed in (11, 12):
        looks: dict[str, Any] = {"proposal": ahead, "twist": ahead}
        run = smc(target, particles, ESS, case.max_bytes, seed=seed, progress=False, **looks)
        done = run_blocking(run)
        weights = defaultdict[bytes, float](float)
        for text, w in zip(done.texts, done.normalized_weights.tolist(), strict=True):
            weights[text[: case.head]] += w * math.exp(done.log_ml)
        halves.append(dict(weights))
    both = {k: sum(h.get(k, 0.0) for h in halves) for k in {**halves[0], **halves[1]}}
    return normalised(both), total_variation(normalised(halves[0]), normalised(halves[1]))


@lru_cache(maxsize=4)
def _ahead(model: str, case: Case, method: str) -> tuple[Lookahead | None, int]:
    """Return the look-ahead of a method, made once a process, and the LM rows of its pilot."""
    if method == "lookahead":
        constraint = case.constraint()
        near = approximate_automaton(constraint) if isinstance(constraint, ByteMatcher) else None
        return Lookahead(bigram(model), constraint=near), 0
    if method != "pilot":
        return None, 0
    target = _target(model, case, BeamParams(K=K, prune_threshold=THRESHOLD))
    with metered(target.p1.model.store) as meter:
        pilot = Lookahead.from_pilot(target, 32, case.max_bytes, seed=PILOT_SEED)
        return run_blocking(pilot), meter.rows


def _target(model: str, case: Case, params: BeamParams) -> Any:
    """Return language model times constraint of a case."""
    llm = ByteLLM(fresh_engine(json.loads(model)), params, prompt=case.prompt.encode())
    return llm * case.constraint()


# -- the methods -------------------------------------------------------------------------------


async def _ours(
    config: Config,
    engine: RowEngine,
    constraint: ByteConstraint,
    seed: int,
    ahead: Lookahead | None,
) -> tuple[Drawn, int]:
    case, method = case_of(config), config["method"]
    llm = ByteLLM(engine, BeamParams(K=K, prune_threshold=THRESHOLD), prompt=case.prompt.encode())
    options: dict[str, Any] = {"ess_threshold": 0.0 if method == "local" else ESS}
    if ahead is not None:
        options |= {"proposal": ahead, "twist": ahead}
    if method == "auto":
        options |= {"lookahead": "auto", "budget": config["lm_rows"]}
    llm.model.store.clear()
    with metered(llm.model.store) as meter:
        if method == "exact":
            found = await exact_sample(
                llm * constraint, MOST_TEXTS, config["lm_rows"], case.max_bytes, seed=seed
            )
            return Drawn(list(found.texts), np.zeros(len(found.texts))), meter.rows
        try:
            done = await smc(
                llm * constraint,
                config["particles"],
                max_bytes=case.max_bytes,
                seed=seed,
                progress=False,
                **options,
            )
        except AllParticlesDeadError as error:
            done = error.result
    ended = done.state.particles.ended
    texts = [t if e else None for t, e in zip(done.texts, ended.tolist(), strict=True)]
    logw = done.log_weights
    if method == "local":
        logw = np.where(logw > -np.inf, 0.0, -np.inf)
    return Drawn(texts, logw), meter.rows


class PeerEngine(AsyncLM):  # type: ignore[misc]
    """An engine as other packages are given it, which notes the contexts that they ask for.

    Rows are as wide as the vocabulary: genlm-bytes refuses those of a padded head.

    Attributes:
        seen: the distinct contexts, as token ids.
    """

    def __init__(self, engine: RowEngine) -> None:
        self._engine = engine
        self.tokenizer = engine.tokenizer
        self.byte_vocab, self.str_vocab = engine.byte_vocab, engine.str_vocab
        self.seen: set[tuple[int, ...]] = set()

    async def next_token_logprobs(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """Return the row of one context."""
        return (await self.batch_next_token_logprobs([token_ids]))[0]

    async def batch_next_token_logprobs(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> torch.Tensor:
        """Return rows of several contexts, float[B, V]."""
        self.seen.update(tuple(map(int, ids)) for ids in token_ids_list)
        rows = await self._engine.batch_next_token_logprobs(token_ids_list)
        size = len(self.byte_vocab)
        return rows if rows.shape[1] <= size else torch.log_softmax(rows[:, :size], dim=1)

    def next_token_logprobs_sync(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """Return the row of one context."""
        return run_blocking(self.next_token_logprobs(token_ids))


async def _bytellm(
    config: Config,
    engine: RowEngine,
    constraint: ByteConstraint,
    seed: int,
    ahead: Lookahead | None,
) -> tuple[Drawn, int]:
    case = case_of(config)
    eos = [bytes(engine.byte_vocab[engine.tokenizer.eos_token_id].byte_string)]
    params = PeerParams(K=K, prune_threshold=THRESHOLD, eos_byte_strings=eos)
    peer = PeerEngine(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genlm-bytes' sparse tensors are "in beta"
        llm = PeerLLM(peer, params)
        llm.set_prompt_from_str(case.prompt)
        await llm.prefix([])  # one trie: particles that begin together make one each
        sampler = DirectTokenSampler(llm * constraint.spawn())
        drawn = await _peer_smc(sampler, config, case.max_bytes + 1, seed)
        await llm.cleanup()
    return drawn, len(peer.seen)


async def _awrs(
    config: Config,
    engine: RowEngine,
    constraint: ByteConstraint,
    seed: int,
    ahead: Lookahead | None,
) -> tuple[Drawn, int]:
    case = case_of(config)
    eos = [bytes(engine.byte_vocab[engine.tokenizer.eos_token_id].byte_string)]
    start = list(engine.start) + engine.tokenizer.encode(case.prompt, add_special_tokens=False)
    peer = PeerEngine(engine)
    llm = PromptedLLM(peer, prompt_ids=start, eos_byte_strings=eos)
    condition = constraint.spawn().coerce(llm, f=_split, prune=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = AWRS(llm, condition, seed=seed)
        drawn = await _peer_smc(sampler, config, case.max_bytes + 1, seed)
    return drawn, len(peer.seen)


def _split(tokens: Any) -> list[bytes]:
    """Return the one-byte tokens of a sequence of tokens."""
    return [bytes([b]) for b in b"".join(bytes(getattr(t, "byte_string", t)) for t in tokens)]


async def _peer_smc(sampler: Any, config: Config, max_tokens: int, seed: int) -> Drawn:
    np.random.seed(seed)  # what genlm-control draws with
    torch.manual_seed(seed)
    found = await SMC(sampler)(config["particles"], ESS, max_tokens, resampling_method="systematic")
    texts: list[bytes | None] = []
    for context in found.contexts:
        ended = len(context) > 0 and context[-1] is EOS
        texts.append(b"".join(_split(context[:-1])) if ended else None)
    return Drawn(texts, np.asarray(found.log_weights, dtype=np.float64))


_METHOD: dict[str, Any] = {
    "local": _ours,
    "smc": _ours,
    "lookahead": _ours,
    "pilot": _ours,
    "auto": _ours,
    "exact": _ours,
    "bytellm": _bytellm,
    "awrs": _awrs,
}


# -- report ------------------------------------------------------------------------------------


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one entry a case and method, means over seeds."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["config"]["case"], row["config"]["method"]].append(row)
    out = []
    for (case, method), mine in found.items():
        values = {
            name: float(np.mean([r["result"][name] for r in mine]))
            for name in ("success", "distance", "noise", "lm_rows", "fit_rows", "particles")
        }
        seconds = float(np.mean([r["run"]["seconds"] for r in mine]))
        out.append({"case": case, "method": method, "seconds": seconds, **values})
    return out


def report(rows: list[Row]) -> Report:
    """Return figures and words."""
    entries = summarise(rows)
    budget, particles = rows[0]["config"]["lm_rows"], rows[0]["config"]["particles"]
    findings = []
    for method, name in METHODS.items():
        mine = [e for e in entries if e["method"] == method]
        if mine:
            findings.append(
                f"{name}: {np.mean([e['success'] for e in mine]):.0%} of texts are complete and "
                f"admitted, mean distance {np.mean([e['distance'] for e in mine]):.2f} over "
                f"{len(mine)} constraints."
            )
    return Report(
        "Regexes, grammars and schemas",
        "Given equal work of the language model, how many texts satisfy the constraint, and how "
        "near does each method come to the true posterior?",
        findings,
        [_figure(entries), _table(entries)],
        [
            f"Each method repeats runs of {particles} particles with fresh seeds until they have "
            f"wanted {budget} distinct LM rows (the last run is finished), and all texts "
            "are pooled by weight. All use one model object and the same compiled constraint. "
            f"Byte beams have K={K} and threshold {THRESHOLD:g}. genlm-control's AWRS works on "
            "tokens; prompts end where a token ends, so that both see the same prompt. A bigram "
            "look-ahead is fitted once to 64 texts of the model, which is not counted. The rows of "
            "the four pilot runs of 32 particles are counted, even where they are more than the "
            "others have in all. Auto and exact samples are given all rows at once.",
            "The distance is the total variation (0 to 1) of the distribution of the first "
            "bytes of a text from that of a reference, two runs of many more particles with a "
            "wider beam and a pilot look-ahead (unbiased like the others, and steadier). Noise "
            "is the distance of those two from each other: a distance of that size says "
            "nothing. Success counts particles whose text ended and is admitted, and whose "
            "weight is not zero.",
        ],
    )


def _figure(entries: list[dict[str, Any]]) -> Section:
    drawn, axes = figure(2, height=4.0)
    cases = list(dict.fromkeys(e["case"] for e in entries))
    for axis, value in zip(axes, ("distance", "success"), strict=True):
        for i, (method, name) in enumerate(METHODS.items()):
            mine = [e for e in entries if e["method"] == method]
            at = [cases.index(e["case"]) + 0.1 * (i - 3.5) for e in mine]
            look = style(i, linestyle="none")
            axis.plot(at, [e[value] for e in mine], label=name, **look)
        axis.set_xticks(range(len(cases)), cases)
        axis.set_ylim(-0.03, 1.05)
        axis.grid(False, axis="x")
    noise = [max(e["noise"] for e in entries if e["case"] == c) for c in cases]
    for i, floor in enumerate(noise):
        line = {"color": FAINT, "linewidth": 2}
        axes[0].plot([i - 0.4, i + 0.4], [floor, floor], **line, label="" if i else "noise")
    label(axes[0], "Distance from the posterior (lower is better)", "", "total variation")
    label(axes[1], "Success (higher is better)", "", "share of particles")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return Section(
        "At equal LM rows",
        [
            "Left: how far the pooled texts are from the posterior. Locally constrained decoding "
            "is far off where the constraint forces what the model finds unlikely, and more "
            "samples do not mend it. Right: the share of particles that end as an admitted text.",
        ],
        drawn,
        name="constraints",
    )


def _table(entries: list[dict[str, Any]]) -> Section:
    best = {
        c: min(e["distance"] for e in entries if e["case"] == c)
        for c in {e["case"] for e in entries}
    }
    lines = [
        [
            f"{e['case']}, {METHODS[e['method']]}",
            f"{e['success']:.0%}",
            f"{e['distance']:.3f}",
            f"{e['noise']:.3f}",
            f"{e['particles']:.0f}",
            f"{e['lm_rows']:,.0f}",
            f"{e['lm_rows'] / e['particles']:.1f}" if e["particles"] else "",
            f"{e['fit_rows']:,.0f}" if e["fit_rows"] else "",
            f"{e['seconds']:.1f}",
        ]
        for e in entries
    ]
    heads = ["constraint, method", "success", "distance", "noise", "texts", "LM rows"]
    heads += ["LM rows a text", "rows to fit", "seconds"]
    marked = [i for i, e in enumerate(entries) if e["distance"] <= best[e["case"]] + 1e-12]
    words = ["Green: the smallest distance for a constraint. Seconds depend on the machine."]
    return Section("In numbers", words, table=Table(heads, lines, marked))


EXPERIMENT = Experiment(
    "constraints",
    "Regexes, grammars and schemas against genlm-control",
    "success, posterior distance and cost at equal LM rows",
    jobs,
    run,
    report,
)
