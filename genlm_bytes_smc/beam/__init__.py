"""The byte beam: from a token-level model to the probabilities of bytes.

Here belongs what a beam over tokenizations is made of. Users see `ByteLanes`, `ByteBeamState`,
`ByteModel`, `byte_model`, `BeamParams`, `Prompt` and `LazyByteProbs` (by way of the package) and
`params.default_params`; everything else may change.

- `params`, `prompt`, `display`: what users give and see. `single`: one text's beam.
- `model`: what all beams over one model share. `lanes`: N beams side by side, all that waits for
  rows. `known_text`: texts that are known in advance. `token_steps`: exact tokens, healing.
- `state`, `rng`, `rules`: arrays of a state, its random numbers, how lanes prune and heal.
- `kernels`, `kernels_host`: what is done between two forwards, on the host wherever the model runs,
  in one compiled call each (`steps_numba` and `texts_numba`, of `candidates_numba`,
  `pruning_numba` and `masses_numba`).
- `deferred` and `deferred_*`: beams that judge contexts after the byte.

Kernels are pure functions of states, which nobody writes into, and never wait. Compiled modules are
listed in `compiled.SOURCES`. Tests hold whole steps against their parts, and beams against
sums over all tokenizations.
"""
