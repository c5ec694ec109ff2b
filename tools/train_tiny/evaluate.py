"""Bits per byte of the bundled model on held-out text, by kind, and a few greedy completions.

A document costs -log2 of the probability of its canonical tokens after one beginning-of-sequence
token; documents longer than the context are cut. With ``--card`` the tables also replace what
stands between the markers in the model card.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import torch
from corpus import Document, read_jsonl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

CONTEXT = 2048
START, STOP = "<!-- evaluation:start -->", "<!-- evaluation:end -->"
PROMPTS = [
    "An apple a day keeps the ",
    "An apple a day keeps the",
    "The function returns a list of",
    "Once upon a time",
    '{"id": 1, "name": "',
    "SELECT name FROM users WHERE",
    "The quick brown fox",
    "The meeting is on",
    "Actions speak",
    "Мой брат",
]


@torch.inference_mode()
def bits(model: GPT2LMHeadModel, ids: list[int]) -> Tensor:
    """Bits of every token after the first."""
    rows = torch.tensor([ids])
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[0].float()
    return F.cross_entropy(logits, rows[0, 1:], reduction="none") / math.log(2)


def by_kind(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> dict[str, tuple[int, int, int, float]]:
    """Documents, bytes, tokens and bits for every kind, and for all together."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False)[: CONTEXT - 1]
        size = len(tokenizer.decode(ids).encode())
        cost = bits(model, [tokenizer.bos_token_id, *ids]).sum().item()
        for key in (document.kind, "all"):
            for i, value in enumerate((1, size, len(ids), cost)):
                sums[key][i] += value
    order = sorted(sums, key=lambda k: (k == "all", k))
    return {k: (int(sums[k][0]), int(sums[k][1]), int(sums[k][2]), sums[k][3]) for k in order}


def by_context(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> dict[str, float]:
    """Bits per byte of the same tokens, seen at early and at late positions of a window."""
    stream: list[int] = []
    for document in documents:
        stream += [tokenizer.bos_token_id]
        stream += tokenizer.encode(document.text, add_special_tokens=False)
    totals = {"200-711": 0.0, "1536-2047": 0.0}
    size = 0
    for end in range(CONTEXT, len(stream) + 1, CONTEXT):
        scored = stream[end - 512 : end]
        size += len(tokenizer.decode(scored, skip_special_tokens=True).encode())
        for name, context in (("200-711", 200), ("1536-2047", 1536)):
            window = stream[end - 512 - context : end]
            totals[name] += bits(model, window)[-512:].sum().item()
    return {name: total / size for name, total in totals.items()}


def greedy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The most likely next 16 tokens, one after the other."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    length = len(ids)
    with torch.inference_mode():
        for _ in range(16):
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
    return str(tokenizer.decode(ids[length:]))


def report(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> str:
    """The tables, as Markdown."""
    lines = [
        "| kind | documents | bytes | bytes per token | bits per byte |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, (count, size, tokens, cost) in by_kind(model, tokenizer, documents).items():
        lines.append(f"| {kind} | {count} | {size:,} | {size / tokens:.2f} | {cost / size:.3f} |")
    lines += [
        "",
        "The same tokens at early and at late positions (documents one after another):",
        "",
    ]
    lines += ["| positions | bits per byte |", "| --- | ---: |"]
    for name, value in by_context(model, tokenizer, documents).items():
        lines.append(f"| {name} | {value:.3f} |")
    lines += ["", "Greedy completions (16 tokens, or fewer where the text ends):", ""]
    lines += ["| prompt | completion |", "| --- | --- |"]
    for prompt in PROMPTS:
        shown = greedy(model, tokenizer, prompt).replace("\n", "\\n").replace("|", "\\|")
        lines.append(f"| `{prompt}` | `{shown}` |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables; see the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True, help="a file of held-out documents")
    parser.add_argument("--card", type=Path, help="model card to rewrite between its markers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = report(model, tokenizer, read_jsonl(args.heldout))
    print(text)
    if args.card is not None:
        before, _, rest = args.card.read_text(encoding="utf-8").partition(START)
        after = rest.partition(STOP)[2]
        args.card.write_text(f"{before}{START}\n{text}\n{STOP}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
