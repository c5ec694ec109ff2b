"""The byte-level language model as a genlm-control potential."""

from genlm_bytes_smc import alphabet as alphabet  # first: it imports genlm.control at less cost
from genlm_bytes_smc.potential.byte_llm import ByteLLM

__all__ = ["ByteLLM"]
