"""The byte beam: from a token-level model to the probabilities of bytes.

Here belongs what a beam over tokenizations is made of. Users see `ByteLanes`, `ByteBeamState`,
`ByteModel`, `byte_model`, `BeamParams`, `Prompt` and `LazyByteProbs` (by way of the package) and
`params.default_params`; everything else may change.

- `params`, `prompt`, `display`: what users give and see. `single`: one text's beam.
- `model`: what all beams over one model share, and how they prune and heal. `lanes`: N beams side
  by side, all that waits for rows. `known_text`: texts that are known in advance. `token_steps`:
  exact tokens, healing. `state`: the arrays of N beams and parts of steps on them.
- `steps_numba`: what is done between two forwards, on the host wherever the model runs, in one
  compiled call each (of `candidates_numba`, `pruning_numba` and `masses_numba`).
- `deferred` and `deferred_*`: beams that judge contexts after the byte.

Compiled steps are pure functions of states, which nobody writes into, and never wait. Their modules
are listed in `compiled.SOURCES`. Tests hold whole steps against their parts, and beams against
sums over all tokenizations.
"""
