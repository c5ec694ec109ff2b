"""Token-level models: their contexts, next-token rows, keys and values.

Here belongs what turns a model into a `RowEngine` (`engine.py`): transformers' models by tree
attention, vLLM's in `vllm/`, any other by `adapter.py`, the bundled one in `bundled.py` and
`tiny/`; and `rows.py`, which keeps rows as probabilities. Other parts of the package use
`load.py`, `engine.py`, `engine_of.py`, `rows.py`, `contexts.py`, `transfer.py` and `start.py`, and
the compiled kernels read the arrays of `host_rows.py` and `context_index.py`. Nothing outside
depends on the rest, which may be changed freely.
"""
