"""Look-ahead: what may follow a text, guessed cheaply, to propose and to resample better.

from genlm_bytes_smc.lookahead import Lookahead

ahead = Lookahead()
result = await smc(llm * ByteRegex(pattern), 32, proposal=ahead, twist=ahead)
"""

from genlm_bytes_smc.lookahead.lookahead import Lookahead
from genlm_bytes_smc.lookahead.ngram import ByteNgram

__all__ = ["ByteNgram", "Lookahead"]
