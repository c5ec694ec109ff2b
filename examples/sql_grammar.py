"""SQL statements of a small context-free grammar, in Lark's notation.

The grammar says which tables and columns there are; the model knows what statements look
like. Neither could do the other's part.
"""

import asyncio

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import ByteGrammar
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

GRAMMAR = r"""
start: "SELECT " columns " FROM books" where? limit? ";"
columns: "*" | "COUNT(*)" | COLUMN (", " COLUMN)*
where: " WHERE " condition (" AND " condition)?
condition: NUMERIC " " COMPARISON " " NUMBER
limit: " LIMIT " NUMBER
COLUMN: "title" | "author" | "pages" | "year"
NUMERIC: "pages" | "year"
COMPARISON: "=" | "<" | ">" | "<=" | ">="
NUMBER: /[1-9][0-9]{0,3}/
"""
PROMPT = b"SELECT * FROM books WHERE year >= 1898;\nSELECT title FROM books;\n"


async def main():
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02), prompt=PROMPT)
    result = await smc(
        llm * ByteGrammar(GRAMMAR),
        n_particles=10,
        max_bytes=80,
        terminate_when=lambda text: text.endswith(b";"),
        seed=1,
        progress=False,
    )
    for text, p in list(result.decoded_posterior.items())[:6]:
        print(f"{p:.3f}  {text}")
    print(f"log probability of the grammar: {result.log_ml:.2f} ± {result.log_ml_error:.2f} nats")


asyncio.run(main())
