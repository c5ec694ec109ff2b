"""Look-ahead: a cheap guess of what may follow a text, to propose and to resample better.

    lookahead.py       `Lookahead`, which users see, and the automata of a target that it follows
    ngram.py           the byte model of what follows: an n-gram, and averages of known rows
    future_mass.py     the expected mass of both together, tabulated; a factor of a run
    seen.py search.py  sums over known rows; the best-first search
    auto.py            runs that teach each other, or a search and a run for the rest

Any positive guess leaves the target of a run what it is, so all of this may be made rougher or
finer; only what a table says must stay consistent from one byte to the next.

from genlm_bytes_smc.lookahead import Lookahead

ahead = Lookahead()
result = await smc(llm * ByteRegex(pattern), 32, proposal=ahead, twist=ahead)
"""

from genlm_bytes_smc import alphabet as alphabet  # first: it imports genlm.control at less cost
from genlm_bytes_smc.lookahead.lookahead import Lookahead
from genlm_bytes_smc.lookahead.ngram import ByteNgram

__all__ = ["ByteNgram", "Lookahead"]
