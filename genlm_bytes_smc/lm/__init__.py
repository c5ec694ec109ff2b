"""Token-level models: their contexts, next-token rows, keys and values.

Here belongs what turns a model into a `RowEngine`, and what keeps its rows. All of it is
synchronous but three places: `RowEngine.rows` and `RowStore.ensure`, where callers that ask at the
same time are merged (`calls.py` in the folder above), and `AdapterEngine`, which waits for
somebody else's model. The files in the order of reading; each imports only those above it:

- `contexts.py`, `contexts_numba.py`: contexts as integers, nodes of a prefix tree; the tokens that
  texts begin with;
- `bundled.py` and the data in `tiny/`: the model that comes with the package;
- `rows_numba.py`: rows made linear on a CPU, compiled;
- `devices.py`: devices by name, copies, packed weights of a CPU, rows made linear elsewhere;
- `engine.py`: `RowEngine`, the one interface to a model, which is a genlm-backend `AsyncLM`, too;
- tree attention over transformers' models: `tree_cache.py` plans on the host which keys are kept
  and read; `kv_buffer.py` holds them on the device; `decoder.py` writes known models out,
  `paged.py` and `paged_triton.py` run them on a GPU; `tree_forward.py` is one forward,
  `transformer.py` the engine;
- `adapter.py`: any other `AsyncLM`;
- `files.py`: sizes of models, files that are converted; `vllm_*.py`: models that vLLM runs;
  `load.py`: models by name;
- `host_rows.py`, `rows.py`: rows as probabilities on the host, kept under a limit.

Other parts of the package use `load.py`, `adapter.py`, `engine.py`, `rows.py`, `contexts.py` and
`devices.py`, and the compiled kernels read the arrays of `rows_numba.py` and `contexts.py`.
Nothing outside depends on the rest, which may be changed freely.
"""
