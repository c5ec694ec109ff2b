"""The byte beam: from a token-level model to the probabilities of bytes.

Here belongs what a beam over tokenizations is made of. Users see `ByteLanes`, `ByteBeamState`,
`ByteModel`, `byte_model`, `BeamParams`, `Prompt` and `LazyByteProbs` (by way of the package) and
`params.default_params`; everything else may change.

- `params`, `prompt`, `display`: what users give and see. `single`: one text's beam.
- `model`: what all beams over one model share. `lanes`: N beams side by side, all that waits for
  rows. `known_text`: texts that are known in advance. `token_steps`: exact tokens, healing.
- `state`, `rng`, `rules`: arrays of a state, its random numbers, how lanes prune and heal.
- `kernels`: what a device does between two forwards. `kernels_host` does it in one compiled call
  each (`steps_numba` and `texts_numba`, of `candidates_numba`, `pruning_numba` and
  `masses_numba`); `composed` from parts, which `kernels_torch` has for other devices
  (`torch_parts`), and `kernels_fused` in fewer launches (`kernels_triton`).
- `deferred` and `deferred_*`: beams that judge contexts after the byte, on a CPU.

Kernels are pure functions of states, which nobody writes into, and never wait. Compiled modules are
listed in `compiled.SOURCES`. A change of one kernel set is a change of all: tests hold each
against the others, and beams against sums over all tokenizations.
"""
