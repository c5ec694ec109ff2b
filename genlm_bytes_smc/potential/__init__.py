"""`ByteLLM`: a token-level language model as a genlm-control potential over bytes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch

from genlm_bytes_smc.alphabet import BytePotential, Context, as_bytes
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.beam.params import BeamParams, default_params
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.beam.state import BoolArray, FloatArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.engine import Shared
from genlm_bytes_smc.lm.load import load_model
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential.beams import Beams, read_prompt

DEFAULT_CACHE_BYTES = 1 << 28

__all__ = ["ByteLLM"]


class ByteLLM(Shared, BytePotential):
    """The distribution over byte strings that a token-level language model defines.

    A drop-in for `genlm.control.ByteLLM`. Contexts are lists of one-byte tokens (or plain
    `bytes`); weights are natural logarithms of probabilities given the prompt.

    With `prune="topk"` the weights are those of the distribution that the rows `logw_next`
    define: each sums to one, `prefix` is the sum of the rows served along the text, and
    `complete` adds the row's EOS entry. The contract of a potential therefore holds at every
    K and threshold. With `prune="unbiased"` rows are masses that sum to one in expectation,
    and `prefix(x) = log Z(prompt x) - log Z(prompt)` for the beam's estimate of Z. A text's
    random beam is drawn once, by `beam_params.seed`, and the same whenever it is asked for
    (up to the rounding of the model's rows, which depends on what is computed beside them);
    runs whose mean shall be exact need a seed each (`with_seed`).

    With `prune="deferred"`, the default, `prefix` and `complete` are what the beam says once it
    has read the last byte, after it has fetched the rows that turned out to matter. `logw_next`
    is a forecast of them, whose rows sum to one: for a likely byte `prefix(xb) - prefix(x)` is
    its entry up to thousandths of a nat, for a byte that nothing led to expect it may be nats
    above it. `smc` weighs particles by `prefix`. A text that is asked for as a whole is read as
    a whole; what it weighs may differ from the sum of its steps by what the thresholds neglect.

    Calls that arrive together, from however many tasks, advance together: one forward of the
    model a byte step, equal contexts once.

    Args:
        llm: a genlm-backend AsyncLM, an engine from `load_model`, or a name that it loads.
            Everything made from one `llm` shares its trie, rows and keys and values.
        beam_params: how to prune; `default_params()` if None. Where it names no
            `eos_byte_strings`, the model's own end-of-sequence tokens end a text. genlm-bytes'
            own `BeamParams` are taken too.
        cache_size: most contexts whose beams are kept (more, while one batch needs more).
        prompt: what every text comes after; see also `with_prompt`.
        transform: temperature, top-k and top-p of the token-level rows.
        cache_bytes: most memory of the kept beams, in bytes.
        model_eos: whether the model's own end-of-sequence tokens stand in for missing
            `eos_byte_strings`. If False, a text then never ends: EOS weighs -inf.

    Attributes:
        model: the `ByteModel`, shared.
        params: `beam_params` with the end of the sequence filled in.

    Raises:
        TypeError: `beam_params` or `prompt` is no such thing.
        ValueError: a size below one, or an end-of-sequence spelling that no token has.

    Warns:
        UserWarning: no token ends a text, and `model_eos` does not say that it is meant so.
    """

    def __init__(
        self,
        llm: Any,
        beam_params: BeamParams | None = None,
        cache_size: int = 1024,
        *,
        prompt: Prompt | bytes | None = None,
        transform: RowTransform | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        model_eos: bool = True,
    ) -> None:
        _check_positive("cache_size", cache_size)
        _check_positive("cache_bytes", cache_bytes)
        self.llm = llm = load_model(llm) if isinstance(llm, str) else llm
        beam_params = default_params() if beam_params is None else beam_params
        self.beam_params = beam_params
        self.cache_size = cache_size
        self.cache_bytes = cache_bytes
        self.transform = transform
        self.model_eos = model_eos
        self.model = byte_model(llm, transform)
        super().__init__(self.model.device)
        self.params = with_eos(own_params(beam_params), self.model, model_eos)
        self.model.eos_ids(self.params.eos)  # raises if no token is spelled like that
        self._beams = self._new_beams(Prompt.of(b"" if prompt is None else prompt))

    @classmethod
    def from_name(
        cls,
        name: str,
        beam_params: BeamParams | None = None,
        backend: str | None = None,
        cache_size: int = 1024,
        *,
        prompt: Prompt | bytes | None = None,
        transform: RowTransform | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        model_eos: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a model by name; `backend` and `kwargs` are those of `load_model`, the others those
        of the class."""
        return cls(
            load_model(name, backend, **kwargs), beam_params, cache_size, prompt=prompt,
            transform=transform, cache_bytes=cache_bytes, model_eos=model_eos,
        )  # fmt: skip

    # -- the prompt --------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt:
        """Return what every text comes after."""
        return self._beams.prompt

    @property
    def prompt_bytes(self) -> bytes:
        """The prompt's spelling."""
        return self.prompt.spell(self.model.vocab)

    def set_prompt_from_str(self, prompt_str: str) -> None:
        """Change the prompt, as genlm-control does: UTF-8, any tokens, special ones too.

        Calls under way finish with the prompt they began with. `with_prompt` leaves this
        object as it is; `Prompt.text` keeps special tokens out.

        Raises:
            TypeError: not str. ValueError: a lone surrogate.
        """
        if not isinstance(prompt_str, str):
            raise TypeError(f"a prompt is due as str, got {type(prompt_str).__name__}")
        prompt = Prompt.from_bytes(prompt_str.encode("utf-8"))
        if prompt != self.prompt:
            self._beams = self._new_beams(prompt)

    def with_prompt(self, prompt: Prompt | bytes) -> ByteLLM:
        """Return the same model after another prompt; both can be used side by side."""
        return self._like(self.beam_params, prompt)

    def with_seed(self, seed: int) -> ByteLLM:
        """Return the same potential with other random choices of `prune="unbiased"`."""
        return self._like(dataclasses.replace(self.params, seed=seed), self.prompt)

    def spawn(self) -> ByteLLM:
        """Return the same potential with a memory of its own; the model is shared."""
        return self.with_prompt(self.prompt)

    async def prompt_weight(self) -> float:
        """Log of the prompt's own (estimated) prefix probability, nats.

        With `prune="unbiased"` the unbiased estimates are the joint ones: of log
        Z(prompt x), `prompt_weight() + prefix(x)`. Without it, as a ratio of two estimates,
        `prefix` is consistent; a beam wide enough for the prompt makes the difference nil.
        """
        return float((await self._beams.root()).log_z[0])

    # -- the potential -----------------------------------------------------------------

    async def weights_of(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """See `BytePotential`."""
        return await self._beams.weights(texts, complete=complete)

    async def rows_of(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, BoolArray]:
        """See `BytePotential`."""
        rows, possible = await self._beams.rows(texts)
        return send(rows, self.device), possible

    # -- beams -------------------------------------------------------------------------

    async def lanes(self, n: int, *, independent_prompts: bool = False) -> Any:
        """Return N lanes after the prompt, for a vectorised particle loop.

        They are `ByteLanes`, or `DeferredLanes` with `prune="deferred"`.

        Args:
            n: number of lanes.
            independent_prompts: read the prompt with a random beam a lane, so that the mean
                of exp(log_z) over lanes estimates the prompt's probability without bias and
                lanes with equal bytes differ. Weigh lanes by their own `log_z` then: given
                the prompt, estimates are ratios and only consistent. Otherwise the prompt is
                read once and all lanes begin with the same beam, whose `log_z` they share.

        Raises:
            ValueError: n below one, or independent lanes without `prune="unbiased"`.
        """
        _check_positive("the number of lanes", n)
        if not independent_prompts:
            return (await self._beams.root()).gather(np.zeros(n, dtype=np.int64))
        if not self.params.unbiased:
            raise ValueError('only with prune="unbiased" do the beams of equal texts differ')
        return ByteLanes.cat(
            [await read_prompt(self.model, self.params, self.prompt, seed) for seed in range(n)]
        )

    async def beam(self, context: Context) -> ByteBeamState:
        """Return the beam that has read `context`: its candidates, and what pruning dropped.

        Raises:
            ValueError: the context is impossible.
        """
        (entry,) = await self._beams.entries([as_bytes(context)])
        if entry is None:
            raise ValueError(f"Context {context!r} has weight zero under `prefix`.")
        return ByteBeamState(entry.block.lanes.gather([entry.lane]))

    def cache_info(self) -> dict[str, int]:
        """Contexts kept, bytes they take, contexts forgotten so far, batches served."""
        b, batches = self._beams, self._beams.requests.batches
        return {"entries": len(b), "bytes": b.nbytes, "evicted": b.evicted, "batches": batches}

    def clear_cache(self) -> None:
        """Forget every beam; they are made again when asked for, the same but for rounding.

        With `prune="deferred"` a text that was read byte by byte is then read as a whole.

        Raises:
            RuntimeError: the model is answering another thread.
        """
        self._beams.clear()

    async def cleanup(self) -> None:
        """Forget every beam. Nothing else is to clean: there is no task or thread, and the
        model belongs to whoever loaded it (and to the other potentials made from it)."""
        self.clear_cache()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.cleanup()

    # -- parts -------------------------------------------------------------------------

    def _like(self, params: BeamParams, prompt: Prompt | bytes) -> ByteLLM:
        return ByteLLM(
            self.llm, params, self.cache_size, prompt=prompt, transform=self.transform,
            cache_bytes=self.cache_bytes, model_eos=self.model_eos,
        )  # fmt: skip

    def _new_beams(self, prompt: Prompt) -> Beams:
        return Beams(self.model, self.params, prompt, self.cache_size, self.cache_bytes)

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __repr__(self) -> str:
        p, spelled = self.params, self.prompt_bytes
        shown = spelled if len(spelled) <= 40 else b"..." + spelled[-37:]
        return (
            f"ByteLLM({type(self.llm).__name__}, K={p.K}, prune_threshold={p.prune_threshold}, "
            f"prune={p.prune!r}, eos={sorted(p.eos)}, prompt={shown!r})"
        )


def _check_positive(name: str, n: Any) -> None:
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")


def own_params(params: Any) -> BeamParams:
    """Return the parameters, this package's or genlm-bytes', as this package's own class."""
    if isinstance(params, BeamParams):
        return params
    from genlm.bytes import BeamParams as GenlmBeamParams

    if isinstance(params, GenlmBeamParams):
        names = {f.name for f in dataclasses.fields(GenlmBeamParams)} - {"eos_tokens"}
        return BeamParams(**{name: getattr(params, name) for name in names})
    raise TypeError(f"beam_params must be a BeamParams, got {type(params).__name__}")


def with_eos(params: BeamParams, model: ByteModel, model_eos: bool) -> BeamParams:
    """Return the parameters with the model's end-of-sequence tokens where they name none.

    Warns:
        UserWarning: the model has none either.
    """
    if params.eos or not model_eos:
        return params
    spellings = {model.vocab[i] for i in model.engine.eos_ids}
    if not spellings:
        warnings.warn(
            "no text can end: the beam parameters name no eos_byte_strings and the tokenizer "
            "has no end-of-sequence token. Name some, or say model_eos=False",
            stacklevel=3,
        )
    return dataclasses.replace(params, eos_byte_strings=spellings)
