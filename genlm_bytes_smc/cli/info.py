"""The command `info`: facts about a model."""

from __future__ import annotations

import time
from typing import Any

from genlm_bytes_smc.beam import display
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.cli.inputs import eos_spellings, open_model
from genlm_bytes_smc.cli.options import ModelOptions
from genlm_bytes_smc.cli.output import table, write_json
from genlm_bytes_smc.lm.engine import RowEngine


async def show_info(options: ModelOptions) -> None:
    """Run the command `info`."""
    start = time.perf_counter()
    llm = open_model(options)
    loaded = time.perf_counter()
    facts = _facts(options, llm) | {"load_seconds": loaded - start}
    facts["trie_seconds"] = time.perf_counter() - loaded
    if options.json:
        write_json(facts)
    else:
        table([(name.replace("_", " "), _told(name, value)) for name, value in facts.items()])


def _facts(options: ModelOptions, llm: RowEngine) -> dict[str, Any]:
    bytes_ = byte_model(llm)
    model: Any = getattr(llm, "base", None)
    weights = list(model.parameters()) if hasattr(model, "parameters") else []
    facts: dict[str, Any] = {
        "model": options.model,
        "class": type(model or getattr(llm, "llm", llm)).__name__,
        "backend": str(options.backend or "hf"),
        "device": str(llm.device),
        "parameters": sum(w.numel() for w in weights) or None,
        "weight_bytes": sum(w.numel() * w.element_size() for w in weights) or None,
        "dtype": str(weights[0].dtype).removeprefix("torch.") if weights else None,
        "window_tokens": llm.window,
        "vocabulary": len(bytes_.vocab),
        "tokens_that_spell": bytes_.trie.n_tokens,
        "row_columns": llm.width,
        "special_tokens": [_spell(bytes_.vocab[i]) for i in bytes_.special_ids],
        "start": [_spell(bytes_.vocab[i]) for i in llm.start],
        "end": sorted(_spell(s) for s in eos_spellings(llm)),
        "trie_nodes": len(bytes_.trie),
        "trie_depth": int(bytes_.trie.depth.max()),
        "trie_bytes": bytes_.trie.nbytes,
        "forward": str(llm.forward),
        "forward_reason": llm.forward.reason,
        "kernels": type(bytes_.kernels).__name__,
        "tree_cache": getattr(llm, "cached", None),
        "cache_limit_bytes": getattr(llm, "limit_bytes", None),
        "row_dtype": "float64" if bytes_.store.exact else "float32",
        "row_bytes": bytes_.store.row_bytes,
        "row_limit_bytes": bytes_.store.limit_bytes,
    }
    return facts


def _spell(token: bytes) -> str:
    return display.escape(token)


def _told(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        shown = "  ".join(value[:8])
        return shown + (f"  and {len(value) - 8} more" if len(value) > 8 else "") or "none"
    if name.endswith("_bytes"):
        return _size(value)
    if name.endswith("_seconds"):
        return f"{value:.2f} s"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
