"""Train the bundled tokenizer and language model on the text written by ``corpus.py``.

The schedule is a function of elapsed time, so that a run of ``--minutes N`` always ends with the
learning rate at zero. Model files are rewritten in ``--out`` at every checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from corpus import Document, read_jsonl
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
VOCABULARY = 8192
CONTEXT = 2048
SHORT = 256
Tokens = npt.NDArray[np.int64]


# ------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(documents: list[Document], out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text; the end-of-text token gets the last id."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    core.train_from_iterator((d.text for d in documents), trainer=trainer)
    core.add_special_tokens([END])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    if len(wrapped) != VOCABULARY:
        raise SystemExit(f"the tokenizer has {len(wrapped)} tokens, not {VOCABULARY}")
    wrapped.save_pretrained(out)
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[Tokens]:
    """Token ids of every document, each after one end-of-text token."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch([d.text for d in documents], add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids(END)
    return [np.array([end, *e.ids], dtype=np.int64) for e in encodings]


# ----------------------------------------------------------------------------------------- data


def windows(docs: list[Tokens], length: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Endless windows of ``length + 1`` tokens over reshuffled documents.

    A window whose start falls shortly after the start of a document is moved back to it.
    """
    while True:
        order = rng.permutation(len(docs))
        stream = np.concatenate([docs[i] for i in order])
        starts = np.cumsum([0, *(len(docs[i]) for i in order)])[:-1]
        cuts = np.arange(int(rng.integers(length)), len(stream) - length - 1, length)
        nearest = starts[np.searchsorted(starts, cuts, side="right") - 1]
        cuts = np.where(cuts - nearest <= length // 2, nearest, cuts)
        for cut in rng.permutation(cuts):
            yield stream[cut : cut + length + 1]


def batch(
    source: Iterator[Tokens], size: int, length: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of windows and their position ids: two fifths from 0, the others from anywhere."""
    rows = torch.from_numpy(np.stack([next(source) for _ in range(size)]))
    offsets = rng.integers(0, CONTEXT - length + 1, size=size)
    offsets[rng.random(size) < 0.4] = 0
    positions = torch.from_numpy(offsets)[:, None] + torch.arange(length)[None, :]
    return rows, positions


# ------------------------------------------------------------------------------------ optimiser


def orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (as Muon does)."""
    x: Tensor = g / (g.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if tall:
        x = x.T
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the matrices of the blocks (fused q, k, v taken apart)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                state["m"].lerp_(p.grad, 1 - momentum)
                g = p.grad.lerp(state["m"], momentum)
                parts = g.chunk(3, dim=1) if g.size(1) == 3 * g.size(0) else (g,)
                update = torch.cat([orthogonalise(part) for part in parts], dim=1)
                scale = math.sqrt(max(1.0, parts[0].size(1) / parts[0].size(0)))
                p.mul_(1 - lr * group["decay"]).add_(update, alpha=-lr * scale)


def learning_rate(progress: float, step: int) -> float:
    """Factor for the learning rates: warm-up by steps, then a cosine in elapsed time to zero."""
    warm = min(1.0, (step + 1) / 100)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---------------------------------------------------------------------------------------- model


def new_model(end: int) -> GPT2LMHeadModel:
    """A fresh GPT-2 of about 5.8 million parameters."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def save(model: GPT2LMHeadModel, out: Path) -> None:
    """Weights as float16 on disk; the configuration asks for float32 when they are loaded."""
    scratch = out.parent / f".{out.name}-{os.getpid()}"
    model.save_pretrained(scratch)
    path = scratch / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)
    for file in sorted(scratch.iterdir()):
        file.replace(out / file.name)
    scratch.rmdir()


@torch.no_grad()
def heldout_loss(loss_of: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> float:
    """Mean loss over windows of held-out text, in nats per token."""
    positions = torch.arange(SHORT).expand(16, SHORT)
    parts = [rows[i : i + 16] for i in range(0, len(rows) - 15, 16)]
    losses = [loss_of(part, positions).item() for part in parts]
    return sum(losses) / len(losses)


def main() -> None:
    """Train; see the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--save-every", type=float, default=8.0, help="minutes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--long-from", type=float, default=0.6, help="part of the time")
    parser.add_argument("--long-every", type=int, default=4, help="steps")
    parser.add_argument("--init", type=Path, help="go on from the model in this folder")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train, heldout = (read_jsonl(args.data / f"{name}.jsonl") for name in ("train", "heldout"))
    if args.init is not None:  # go on from an earlier run, with its tokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        model.train()
        tokenizer.save_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(train, args.out)
        model = new_model(tokenizer.convert_tokens_to_ids(END))
    save(model, args.out)
    docs, held = encode(tokenizer, train), encode(tokenizer, heldout)
    tokens, text_bytes = sum(map(len, docs)), sum(len(d.text.encode()) for d in train)
    print(f"{tokens:,} training tokens, {text_bytes / tokens:.2f} bytes per token", flush=True)
    held_windows = windows(held, SHORT, np.random.default_rng(0))
    held_rows = torch.from_numpy(np.stack([next(held_windows) for _ in range(128)]))

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    muon = Muon(matrices, lr=args.lr, momentum=0.95, decay=0.05)
    adam = torch.optim.AdamW(
        others, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    base = [(group, group["lr"]) for o in (muon, adam) for group in o.param_groups]

    def plain_loss(rows: Tensor, positions: Tensor) -> Tensor:
        hidden = model.transformer(
            input_ids=rows[:, :-1], position_ids=positions, use_cache=False
        ).last_hidden_state
        logits = hidden.reshape(-1, hidden.size(-1)) @ model.lm_head.weight.T
        return F.cross_entropy(logits, rows[:, 1:].reshape(-1))

    loss_of: Any = torch.compile(plain_loss, dynamic=False) if args.compile else plain_loss
    sources = {n: windows(docs, n, rng) for n in (SHORT, 1024, CONTEXT - 1)}
    lengths = {SHORT: args.batch, CONTEXT - 1: max(1, args.batch * SHORT // CONTEXT)}
    for length, size in lengths.items():  # compile before the clock starts
        rows, positions = batch(sources[length], size, length, rng)
        loss_of(rows, positions).backward()
        model.zero_grad(set_to_none=True)

    start = last_save = time.monotonic()
    step = seen = 0
    running = 0.0
    log: list[dict[str, float]] = []
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        factor = learning_rate(progress, step)
        for group, peak in base:
            group["lr"] = peak * factor
        long = progress >= args.long_from and (step + 1) % args.long_every == 0
        length = CONTEXT - 1 if long else SHORT
        rows, positions = batch(sources[length], lengths[length], length, rng)
        loss = loss_of(rows, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        seen += rows.size(0) * length
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            rate = seen / (time.monotonic() - start)
            print(
                f"step {step} {progress:.1%} loss {running:.3f} {seen:,} tokens {rate:.0f}/s",
                flush=True,
            )
        if time.monotonic() - last_save > 60 * args.save_every:
            last_save = time.monotonic()
            save(model, args.out)
            held_loss = heldout_loss(loss_of, held_rows)
            log.append({"step": step, "tokens": seen, "train": running, "heldout": held_loss})
            print(f"saved; held-out loss {held_loss:.3f} nats per token", flush=True)
    save(model, args.out)
    held_loss = heldout_loss(loss_of, held_rows)
    log.append({"step": step, "tokens": seen, "train": running, "heldout": held_loss})
    print(f"done: {step} steps, {seen:,} tokens, held-out loss {held_loss:.3f}", flush=True)
    (args.data / "log.json").write_text(json.dumps(log, indent=2) + "\n")


if __name__ == "__main__":
    main()
