"""JSON records that satisfy a JSON Schema.

`ByteJsonSchema` knows, byte by byte, which JSON texts the schema still admits. The model
decides among them: which name, which age. Every text drawn parses and is valid.
"""

import asyncio
import json

import jsonschema

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import ByteJsonSchema
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "minLength": 2, "maxLength": 10},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "active": {"type": "boolean"},
    },
    "required": ["first_name", "age", "active"],
    "additionalProperties": False,
}
PROMPT = b'{"first_name": "Anna", "age": 31, "active": true}\n'


async def main():
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02), prompt=PROMPT)
    # A closing brace is the end of a record, whatever the model would go on with.
    result = await smc(
        llm * ByteJsonSchema(SCHEMA, whitespace="python"),
        n_particles=8,
        max_bytes=70,
        terminate_when=lambda text: text.endswith(b"}"),
        progress=False,
    )
    records = [(json.loads(text), p) for text, p in result.byte_posterior.items()]
    for record, _ in records:
        jsonschema.validate(record, SCHEMA)
    for record, p in records[:5]:
        print(f"{p:.3f}  {json.dumps(record, ensure_ascii=False)}")
    print(f"all {len(records)} records satisfy the schema")


asyncio.run(main())
