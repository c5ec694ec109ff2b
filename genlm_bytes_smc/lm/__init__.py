"""Token-level models: their contexts, next-token rows, keys and values.

Here belongs what turns a model into a `RowEngine`, and what keeps its rows. All of it is
synchronous but three places: `RowEngine.rows` and `RowStore.ensure`, where callers that ask at the
same time are merged (`calls.py` in the folder above), and `AdapterEngine`, which waits for
somebody else's model. The files in the order of reading; each imports only those above it:

- `context_index.py`, `contexts.py`: contexts as integers, nodes of a prefix tree;
- `bundled.py` and the data in `tiny/`: the model that comes with the package;
- `async_lm.py`, `engine.py`: `RowEngine`, the one interface to a model, and its face as
  genlm-backend's `AsyncLM`;
- `transfer.py`: devices by name, copies to one, threads;
- tree attention over transformers' models: `tree_cache.py` and `attention.py` plan on the host
  which keys are kept and read; `kv_buffer.py` and `transformers_cache.py` hold them on the device;
  `linear.py` and `decoder.py` write known models out, `architecture.py` tells what others can;
  `tree_forward.py` is one forward, `transformer.py` the engine;
- `adapter.py`: any other `AsyncLM`; `vllm/`: models that vLLM runs;
- `size.py`, `gguf.py`, `load.py`: models by name;
- `intake.py`, `host_rows.py`, `slots.py`, `rows.py`: rows as probabilities, kept under a limit.

Other parts of the package use `load.py`, `adapter.py`, `engine.py`, `rows.py`, `contexts.py` and
`transfer.py`, and the compiled kernels read the arrays of `host_rows.py` and `context_index.py`.
Nothing outside depends on the rest, which may be changed freely.
"""
