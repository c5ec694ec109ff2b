"""`smc_generate`: SMC as a generation recipe of transformers.

model.generate(**inputs, custom_generate=smc_generate, smc_tokenizer=tokenizer,
               constraint=ByteRegex("[a-z]+"), n_particles=16, max_bytes=40)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

_ENGINE = "_genlm_bytes_smc_engine"


def smc_generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    smc_tokenizer: Any,
    constraint: Any = None,
    n_particles: int = 16,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    beam_params: BeamParams | None = None,
    smc_seed: int = 0,
    smc_results: list[Any] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Return for each prompt the prompt's ids and those of one text drawn by SMC.

    For `model.generate(custom_generate=smc_generate, ...)`. Of each prompt's N weighted texts one
    is drawn by its weight. Logits processors and stopping criteria, which see tokens one by one,
    have no place here: an attempt to use some is an error. `max_bytes` takes the place of the
    limits on the length that `generate` makes criteria of.

    Args:
        model, logits_processor, stopping_criteria, generation_config, model_kwargs: of `generate`.
        input_ids: int64[B, length], padded on the left as the attention mask says.
        smc_tokenizer: the model's tokenizer (transformers keeps the name `tokenizer` to itself).
        constraint: a potential over bytes, such as `ByteRegex`; None: the model alone.
        n_particles, ess_threshold, max_bytes: as for `smc`.
        beam_params: how to prune; None: `default_params()`.
        smc_seed: of the draws; prompt b takes `smc_seed + b`.
        smc_results: a list to which the `SMCResult` of each prompt is appended.

    Returns:
        int64[B, longest], padded on the right.

    Raises:
        ValueError: logits processors or stopping criteria that were asked for.
        AllParticlesDeadError: no particle satisfies the constraint.
    """
    if logits_processor is not None and len(logits_processor):
        names = [type(p).__name__ for p in logits_processor]
        raise ValueError(f"smc_generate takes no logits processors, got {names}")
    own = (MaxLengthCriteria, EosTokenCriteria)  # made by `generate` without being asked
    names = [type(c).__name__ for c in stopping_criteria or () if not isinstance(c, own)]
    if names:
        raise ValueError(f"smc_generate takes no stopping criteria, got {names}")
    llm = ByteLLM(_engine(model, smc_tokenizer), beam_params)
    mask = model_kwargs.get("attention_mask")
    rows = []
    for b, ids in enumerate(input_ids):
        kept = ids if mask is None else ids[mask[b].bool()]
        start = llm.model.engine.start
        prompt = kept.tolist()
        prompt = prompt[len(start) :] if tuple(prompt[: len(start)]) == tuple(start) else prompt
        after = llm.with_prompt(Prompt.tokens(prompt))
        target = after if constraint is None else after * constraint
        result = run_sync(smc(target, n_particles, ess_threshold, max_bytes, seed=smc_seed + b))
        if smc_results is not None:
            smc_results.append(result)
        generator = torch.Generator().manual_seed(smc_seed + b)
        weights = torch.from_numpy(result.normalized_weights)
        drawn = result.texts[int(torch.multinomial(weights, 1, generator=generator))]
        tokens = llm.model.canonical(drawn)
        spelled = sum(len(llm.model.vocab[t]) for t in tokens)
        tokens += [t for byte in drawn[spelled:] for t in llm.model.vocab.ids_of(bytes([byte]))[:1]]
        rows.append(torch.cat([ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device)]))
    pad = getattr(smc_tokenizer, "pad_token_id", None)
    pad = next(iter(llm.model.engine.eos_ids), 0) if pad is None else pad
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def _engine(model: Any, tokenizer: Any) -> TreeTransformer:
    """Return the engine of a model, made once."""
    engine: TreeTransformer | None = model.__dict__.get(_ENGINE)
    if engine is None or engine.tokenizer is not tokenizer:
        engine = model.__dict__[_ENGINE] = TreeTransformer(model, tokenizer)
    return engine
