"""Look-ahead: a cheap guess of what may follow a text, to propose and to resample better.

    lookahead.py       `Lookahead`, which users see, and what it fits at the start of a run
    automata.py        the automata of a target that are followed
    ngram.py pilot.py  the byte model of what follows: an n-gram, and rows learned in pilot runs
    future_mass.py     the expected mass of both together, tabulated
    edges.py           the byte model of `auto`: averaged entries of known rows
    seen.py search.py  sums over known rows; the best-first search; auto.py puts runs together
    factor.py          the table read for many texts at once, as a factor of a run

Any positive guess leaves the target of a run what it is, so all of this may be made rougher or
finer; only what `factor.py` returns must stay consistent from one byte to the next.

from genlm_bytes_smc.lookahead import Lookahead

ahead = Lookahead()
result = await smc(llm * ByteRegex(pattern), 32, proposal=ahead, twist=ahead)
"""

from genlm_bytes_smc.lookahead.lookahead import Lookahead
from genlm_bytes_smc.lookahead.ngram import ByteNgram

__all__ = ["ByteNgram", "Lookahead"]
