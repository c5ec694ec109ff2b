"""Rows by whole forwards, without any cache: the slow way that every model allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from genlm_bytes_smc.lm.architecture import Architecture

_MOST_POSITIONS = 1 << 15  # of one padded batch


def plain_logits(
    model: Any, architecture: Architecture, contexts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Logits after each context from one forward, contexts padded on the right.

    Args:
        model: a transformers causal language model.
        architecture: what it takes.
        contexts: token ids, none empty.

    Returns:
        float[B, width], the model's dtype.
    """
    lengths = [len(c) for c in contexts]
    longest = max(lengths)
    device = model.get_input_embeddings().weight.device
    padded = [[*c, *([0] * (longest - len(c)))] for c in contexts]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(padded, device=device), "use_cache": False}
    if architecture.masks_padding:
        inputs["attention_mask"] = torch.tensor(
            [[1] * n + [0] * (longest - n) for n in lengths], device=device
        )
    ends = sorted(set(lengths))
    if architecture.row_index:
        inputs["logits_to_keep"] = torch.tensor([n - 1 for n in ends], device=device)
        at = {n: i for i, n in enumerate(ends)}
    else:
        at = {n: n - 1 for n in ends}
    logits: torch.Tensor = model(**inputs).logits
    return logits[range(len(lengths)), [at[n] for n in lengths]]


def batches(
    lengths: Sequence[int], architecture: Architecture, most_rows: int
) -> Iterator[list[int]]:
    """Cut contexts, longest first, into forwards whose logits and padding stay bounded.

    Args:
        lengths: tokens of each context.
        architecture: of the model.
        most_rows: rows of logits that one forward may make.

    Yields:
        Indices into `lengths`.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            size = len(batch) + 1
            longest = lengths[batch[0]]
            distinct = len({lengths[j] for j in batch} | {lengths[i]})
            rows = size * (distinct if architecture.row_index else longest)
            if rows > most_rows or size * longest > _MOST_POSITIONS:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch
