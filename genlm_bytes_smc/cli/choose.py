"""The command `choose`: the distribution over given answers."""

from __future__ import annotations

import base64
import dataclasses
import os
import time

from genlm_bytes_smc.choosing import THRESHOLD, WIDTH, Choice, choose
from genlm_bytes_smc.cli.inputs import (
    as_prompt,
    eos_spellings,
    open_model,
    parameters,
    read_argument,
    read_file,
    seed_of,
)
from genlm_bytes_smc.cli.options import ChooseOptions
from genlm_bytes_smc.cli.output import CliError, UsageError, as_text, bar, say, visible, write_json
from genlm_bytes_smc.potential import ByteLLM


async def show_choice(options: ChooseOptions, prompt: str, answers: list[str]) -> None:
    """Run the command `choose`."""
    if options.normalise == "end" and options.no_eos:
        raise UsageError("--normalise end weighs the end of the text, which --no-eos rules out")
    texts = [os.fsencode(answer) for answer in answers]
    if options.options_file is not None:
        texts += read_file(options.options_file).splitlines()
    if not texts:
        raise UsageError("give one answer or more, as arguments or by --options-file")
    if options.prune is None and options.width is None:
        least = THRESHOLD if options.threshold is None else options.threshold
        options = dataclasses.replace(options, width=WIDTH, threshold=least)
    text, seed = read_argument(prompt), seed_of(options)
    engine = open_model(options)
    params, transform = parameters(options, eos_spellings(engine), seed)
    llm = ByteLLM(engine, params, transform=transform, model_eos=bool(params.eos))
    start = time.perf_counter()
    try:
        found = await choose(llm, as_prompt(options, text, llm.model), texts, options.normalise)
    except ValueError as error:
        raise CliError(str(error)) from None
    seconds = time.perf_counter() - start
    if options.json:
        entries = [
            {"option": as_text(texts[i]), "option_base64": base64.b64encode(texts[i]).decode()}
            | {k: v for k, v in record.items() if k != "option"}
            for i, record in enumerate(found.to_records())
        ]
        write_json(
            {
                "prompt": as_text(text),
                "normalise": options.normalise,
                "best": as_text(found.top(1)[0][0]),
                "options": entries,
                "bound": found.bound,
                "seconds": seconds,
                "lm_forwards": engine.counts.forwards,
            }
        )
    else:
        _print(found, llm.params.prune)


def _print(found: Choice, prune: str) -> None:
    say(("probability  log weight  option", "dim"))
    weights = dict(zip(found.options, found.log_weights.tolist(), strict=True))
    for option, p in found.top():
        shown = visible(as_text(bytes(option))).replace("\n", "\\n")
        say(f"{p:11.5f}  {weights[option]:10.4f}  ", (shown, "green"), "  ", (bar(p), "green"))
    if prune == "topk":
        say((f"what the beam dropped can change a probability by {found.bound:.2g}", "dim"))
