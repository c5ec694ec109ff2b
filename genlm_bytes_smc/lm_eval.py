"""`ByteLM`: a byte-level language model for EleutherAI's lm-evaluation-harness.

The harness cuts context and continuation into tokens and subtracts; where a token spans the two,
it fails or weighs the wrong thing. Here the continuation's bytes are weighed given the context's,
summed over the ways to cut both into tokens.

Needs the package `lm_eval` (the extra `lm-eval`). `python -m genlm_bytes_smc.lm_eval` is the
harness's own command line with this model known to it, as `--model genlm-bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from genlm_bytes_smc.beam.known_text import read_paths
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import draw, lanes_for
from genlm_bytes_smc.beam.state import EOS_COLUMN
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.choosing import as_byte_llm
from genlm_bytes_smc.lm.engine import ContextTooLongError
from genlm_bytes_smc.lm.load import load_model
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.surprisals import surprisal


@register_model("genlm-bytes")
class ByteLM(LM):  # type: ignore[misc]
    """A model of lm-evaluation-harness that weighs bytes.

    Args:
        pretrained: a model's name, as for `load_model`; or what `ByteLLM` is made from; or a
            `ByteLLM`.
        backend, device: as for `load_model`, where `pretrained` is a name.
        batch_size: most texts that are read side by side ("auto": 16).
        max_batch_size: of the harness, unused.
        special_tokens: whether spellings of special tokens in a context stand for those tokens.
            None: once `apply_chat_template` has been called.
        bytes_per_token: bytes that a text may grow by for each token of `max_gen_toks`.
        seed: of what is drawn with `do_sample`.
        **options: further options of `BeamParams`, such as K and prune_threshold.

    Raises:
        ValueError, TypeError: an option out of range.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        backend: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        special_tokens: bool | None = None,
        bytes_per_token: int = 4,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if isinstance(pretrained, str):
            pretrained = load_model(pretrained, backend, device=device)
        params = BeamParams(**{"K": None, **options}) if options else None
        self.llm: ByteLLM = as_byte_llm(pretrained, b"", params)
        self.batch_size = 16 if isinstance(batch_size, str) else int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.special_tokens, self.bytes_per_token, self.seed = special_tokens, bytes_per_token, seed
        self._templated = False

    # -- weights -------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log weight, nats, and whether it is greedy.

        A continuation is greedy if each of its bytes is the likeliest after those before it.
        """
        order = sorted(range(len(requests)), key=lambda i: requests[i].args[0])
        return self._answered("loglikelihood", requests, [order], self._weigh)

    def _answered(
        self,
        kind: str,
        requests: list[Any],
        groups: Iterable[list[int]],
        answer: Callable[[list[Any], int], Coroutine[Any, Any, list[Any]]],
    ) -> list[Any]:
        """Return an answer a request, from batches inside groups of places.

        `answer` is given the arguments of the requests of a batch, and the first one's place.
        """
        out: list[Any] = [None] * len(requests)
        for group in groups:
            for at in range(0, len(group), self.batch_size):
                part = group[at : at + self.batch_size]
                found = run_sync(answer([requests[i].args for i in part], part[0]))
                for i, one in zip(part, found, strict=True):
                    out[i] = one
                    self.cache_hook.add_partial(kind, requests[i].args, one)
        return out

    async def _weigh(self, pairs: list[tuple[str, str]], first: int) -> list[tuple[float, bool]]:
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        texts = [text.encode() for _, text in pairs]
        roots = await self._after(contexts, max(map(len, texts)), self.llm)
        roots = roots.gather([contexts.index(context) for context, _ in pairs])
        lanes, _ = await read_paths(roots, texts)
        with np.errstate(invalid="ignore"):  # a context that the model cannot read
            weights = np.where(lanes.log_z > -np.inf, lanes.log_z - roots.log_z, -np.inf)
        return list(zip(weights.tolist(), await _greedy(roots, texts), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log prefix probability of each text, nats; see `scoring.score`."""
        texts = [request.args[0] for request in requests]
        found = run_sync(surprisal(self.llm, texts, prompt=b""))
        out = [-result.total for result in found]
        for request, weight in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, weight)
        return out

    # -- texts ---------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each (context, settings), before any of the strings in "until".

        Settings: "until", "max_gen_toks" (`bytes_per_token` bytes each), "do_sample",
        "temperature", "top_k", "top_p". Without "do_sample" the likeliest byte is taken each time.
        """
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(i)
        return self._answered("generate_until", requests, by_settings.values(), self._generate)

    async def _generate(self, asked: list[tuple[str, dict[str, Any]]], first: int) -> list[str]:
        given = dict(normalize_gen_kwargs(asked[0][1], 256))
        stops = [stop.encode() for stop in given.get("until") or [] if stop]
        most = int(given["max_gen_toks"]) * self.bytes_per_token
        draw = bool(given.get("do_sample"))
        llm = self.llm
        if draw:
            chosen = {k: given[k] for k in ("temperature", "top_k", "top_p") if given.get(k)}
            llm = as_byte_llm(llm, transform=RowTransform(**chosen))
        roots = await self._after([context for context, _ in asked], most // 2, llm)
        rng = np.random.default_rng([self.seed, first]) if draw else None
        texts = await _continued(roots, most, stops, rng)
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return [text.decode("utf-8", errors="replace") for text in texts]

    # -- contexts ------------------------------------------------------------------------

    async def _after(self, contexts: list[str], room: int, llm: ByteLLM) -> Any:
        """Return a lane after each context, of which the beginning is left out if it is too long.

        What follows may take `room` tokens of the window.
        """
        special = self._templated if self.special_tokens is None else self.special_tokens
        kept = [_end_of(context, room, llm) for context in contexts]
        if not special:
            lanes = await lanes_for(llm.params).start(llm.model, llm.params, len(kept))
            lanes = await lanes.as_prompt(literal=True)
            try:
                lanes, _ = await read_paths(lanes, [text.encode() for text in kept])
                return await lanes.as_text()
            except ContextTooLongError:  # one of them, in some way to cut it into tokens
                pass
        found = [await _lane(text, llm, special=special) for text in kept]
        return type(found[0]).cat(found)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the text of the tokenizer's chat template.

        Raises:
            ValueError: the tokenizer has none.
        """
        tokenizer = self._tokenizer()
        self._templated = True
        text: str = tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        start = tokenizer.bos_token_id in self.llm.model.engine.start
        return text.removeprefix(tokenizer.bos_token or "") if start else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template, or "" where none is asked for."""
        return str(self._tokenizer().chat_template) if chat_template else ""

    def _tokenizer(self) -> Any:
        tokenizer = self.llm.model.engine.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer of {self._name} has no chat template")
        return tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Return the model's name, by which the harness tells request caches apart."""
        return self._name.replace("/", "__")


def _end_of(context: str, room: int, llm: ByteLLM) -> str:
    """Return the end of a context that leaves `room` tokens, or half the window, as it is cut."""
    engine = llm.model.engine
    if engine.window is None:
        return context
    free = engine.window - len(engine.start)
    most = free - min(room, free // 2)
    while len(llm.model.canonical(context.encode())) > most:
        context = context[-(len(context) * 3 // 4) :]
    return context


async def _lane(context: str, llm: ByteLLM, *, special: bool) -> Any:
    """Return one lane after a context, of which less is read until it fits the window."""
    while True:
        prompt = Prompt.text(context, special_tokens=special, model=llm.model)
        try:
            return await llm.with_prompt(prompt).lanes(1)
        except ContextTooLongError:
            if len(context) < 2:
                raise
        context = context[-(len(context) * 3 // 4) :]


async def _greedy(lanes: Any, texts: Sequence[bytes]) -> list[bool]:
    """Return whether following the likeliest symbol from each lane would write its text."""
    out = [True] * len(texts)
    going, at = list(range(len(texts))), 0
    while True:
        going_on = [k for k, i in enumerate(going) if len(texts[i]) > at]
        if not going_on:
            return out
        going, lanes = [going[k] for k in going_on], lanes.gather(going_on).prune()
        best = (await lanes.rows()).argmax(dim=1).tolist()
        same = [k for k, i in enumerate(going) if best[k] == texts[i][at]]
        for k in set(range(len(going))) - set(same):
            out[going[k]] = False
        if not same:
            return out
        going, lanes = [going[k] for k in same], lanes.gather(same)
        lanes = await lanes.step([texts[i][at] for i in going])
        at += 1


async def _continued(
    lanes: Any, most: int, stops: Sequence[bytes], rng: np.random.Generator | None
) -> list[bytes]:
    """Return at most `most` bytes after each lane, up to the end, or with one of `stops`."""
    texts = [bytearray() for _ in range(len(lanes))]
    going = list(range(len(lanes)))
    try:
        for _ in range(most):
            if not going:
                break
            symbols, on = draw(await lanes.prune().rows(), rng), list[int]()
            for k, i in enumerate(going):
                if symbols[k] != EOS_COLUMN:
                    texts[i].append(symbols[k])
                    if not any(texts[i].endswith(stop) for stop in stops):
                        on.append(k)
            going, lanes = [going[k] for k in on], lanes.prune().gather(on)
            if going:
                lanes = await lanes.step([symbols[k] for k in on])
    except ContextTooLongError:  # the window is full: the texts end here
        pass
    return [bytes(text) for text in texts]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
