"""All log probabilities from vLLM: this package's capture against vLLM's own ways to ask for them.

`python -m benchmarks.vllm_rows [--model smollm2] [--docs]`, in an environment that has vLLM. Every
way gets the same contexts, and the rows must agree, or the run fails.

The first table asks for one row after each context: B contexts that share a prefix and have some
tokens of their own, each one token longer than it was before, as in a step of generation. The
second asks for the rows after all tokens of one new text.

- "capture" is `VLLMEngine`: float32[B, V], nats;
- "no log probabilities" is `vllm.LLM.generate` for one token: what the forward itself takes;
- "logprobs=-1" is the same with all log probabilities, until it returns, and "and as an array"
  until rows are made from the dictionaries that it returns; "flat" has `flat_logprobs=True`, which
  returns lists instead;
- "prompt_logprobs=-1" is the same for the tokens of a prompt;
- "transformers" is `load_model` with the default backend, which runs transformers' weights by tree
  attention.

On a CPU, seconds are those of the processor, which other programs disturb less; all ways run in one
process, on the threads that vLLM has set up (VLLM_CPU_OMP_THREADS_BIND=0 makes it one).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import report
from genlm_bytes_smc import load_model

PAGE = report.DOCS / "scaling.md"
BEGIN, END = "<!-- vllm rows: begin -->", "<!-- vllm rows: end -->"
Contexts = list[list[int]]


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    batches: tuple[int, ...] = (1, 8)  # contexts at a time
    shared: int = 100  # tokens that they share
    own: int = 8  # tokens of each one's own
    steps: int = 3  # timed; the median counts
    text: int = 32  # tokens of the text of the second table


QUICK = Sizes((2,), 20, 3, 2, 6)


class Bench:
    """One model behind vLLM and behind transformers."""

    def __init__(self, model: str, sizes: Sizes) -> None:
        self.sizes = sizes
        opts = {"max_logprobs": -1, "max_model_len": 2048}
        self.vllm: Any = load_model(model, backend="vllm", dtype="float32", engine_opts=opts)
        self.tree: Any = load_model(model, device="cpu", dtype="float32")
        self.width = min(self.vllm.width, self.tree.width)
        self.clock = time.process_time if self.vllm.device.type == "cpu" else time.perf_counter
        self.rng = np.random.default_rng(0)

    # -- ways to ask -----------------------------------------------------------------------

    def capture(self, contexts: Contexts) -> torch.Tensor:
        """Rows by this package."""
        rows: torch.Tensor = self.vllm.batch_next_token_logprobs_sync(contexts)
        return rows

    def transformers(self, contexts: Contexts) -> torch.Tensor:
        """Rows by the default engine."""
        rows: torch.Tensor = self.tree.batch_next_token_logprobs_sync(contexts)
        return rows

    def logprobs(self, contexts: Contexts, **more: Any) -> list[Any]:
        """What vLLM returns for all log probabilities of the next token, one for each context."""
        outputs = self._generate(contexts, logprobs=-1, **more)
        return [output.outputs[0].logprobs[0] for output in outputs]

    def prompt_logprobs(self, text: list[int]) -> list[Any]:
        """What vLLM returns for all log probabilities at each token of a text but the first."""
        (output,) = self._generate([text], prompt_logprobs=-1)
        return list(output.prompt_logprobs[1:])

    def _generate(self, contexts: Contexts, **params: Any) -> list[Any]:
        from vllm import SamplingParams

        given = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **params)
        prompts = [{"prompt_token_ids": context} for context in contexts]
        return list(self.vllm.llm.generate(prompts, given, use_tqdm=False))

    def rows(self, found: Sequence[Any]) -> torch.Tensor:
        """Return dictionaries from token id to `Logprob` as float32[B, V]."""
        out = torch.empty((len(found), self.vllm.width))
        for row, entry in zip(out.numpy(), found, strict=True):
            ids = np.fromiter(entry, np.int64, len(entry))
            row[ids] = np.fromiter((e.logprob for e in entry.values()), np.float32, len(entry))
        return out

    # -- tables ----------------------------------------------------------------------------

    def steps(self) -> Iterator[list[str]]:
        """Rows of the first table: how, ms a step and rows a second for each batch."""
        ways: dict[str, Callable[[Contexts], Any]] = {
            "no log probabilities": self._generate,
            "capture": self.capture,
            "logprobs=-1": self.logprobs,
            "logprobs=-1, and as an array": lambda c: self.rows(self.logprobs(c)),
            "logprobs=-1, flat": lambda c: self.logprobs(c, flat_logprobs=True),
            "transformers": self.transformers,
        }
        batches = self.sizes.batches
        seconds = {name: [self._step(way, n) for n in batches] for name, way in ways.items()}
        for n in batches:
            contexts = self._contexts(n)
            want = self.transformers(contexts)
            self._agree(self.capture(contexts), want)
            self._agree(self.rows(self.logprobs(contexts)), want)
        for name, found in seconds.items():
            yield [name, *(f"{n / s:,.1f}" for n, s in zip(batches, found, strict=True))]

    def _step(self, ask: Callable[[Contexts], Any], n: int) -> float:
        """Return the seconds of one step of n contexts: the median of some, after one untimed."""
        self.vllm.clear_cache()
        self.tree.clear_cache()
        contexts = self._contexts(n)
        ask(contexts)
        found = []
        for _ in range(1 + self.sizes.steps):
            contexts = [[*c, t] for c, t in zip(contexts, self._tokens(n), strict=True)]
            start = self.clock()
            ask(contexts)
            found.append(self.clock() - start)
        return float(np.median(found[1:]))

    def text(self) -> Iterator[list[str]]:
        """Rows of the second table: how, seconds, rows a second; one new text."""
        ways: dict[str, Callable[[list[int]], Any]] = {
            "capture": lambda text: self.capture(_prefixes(text)),
            "prompt_logprobs=-1": self.prompt_logprobs,
            "prompt_logprobs=-1, and as an array": lambda text: self.rows(
                self.prompt_logprobs(text)
            ),
            "transformers": lambda text: self.transformers(_prefixes(text)),
        }
        for name, ask in ways.items():
            found = []
            for _ in range(1 + self.sizes.steps):
                self.vllm.clear_cache()
                self.tree.clear_cache()
                (text,) = self._contexts(1)
                text = [*text, *self._tokens(self.sizes.text)][: self.sizes.text + 1]
                start = self.clock()
                ask(text)
                found.append(self.clock() - start)
            seconds = float(np.median(found[1:]))
            yield [name, f"{1e3 * seconds:,.0f}", f"{self.sizes.text / seconds:,.1f}"]
        want = self.transformers(_prefixes(text))
        self._agree(self.capture(_prefixes(text)), want)
        self._agree(self.rows(self.prompt_logprobs(text)), want)

    def _agree(self, got: torch.Tensor, want: torch.Tensor) -> None:
        apart = (got - want)[:, : self.width].abs()[want[:, : self.width] > -20].max().item()
        if not apart < 1e-2:
            raise AssertionError(f"rows differ by {apart:.2e} nats, allowed 1e-2")

    def _contexts(self, n: int) -> Contexts:
        shared = [*self.vllm.start, *self._tokens(self.sizes.shared)]
        return [[*shared, *self._tokens(self.sizes.own)] for _ in range(n)]

    def _tokens(self, n: int) -> list[int]:
        out: list[int] = self.rng.choice(np.arange(300, 4000), n, replace=False).tolist()
        return out

    def close(self) -> None:
        """End vLLM."""
        self.vllm.close()


def _prefixes(text: list[int]) -> Contexts:
    """Return the contexts of all tokens of a text but the first."""
    return [text[:i] for i in range(1, len(text))]


def markdown(parts: Sequence[tuple[str, Sequence[str], list[list[str]]]], about: str) -> str:
    """Return the tables as Markdown."""
    lines = []
    for title, heads, rows in parts:
        lines += [f"**{title}**", "", "| " + " | ".join(heads) + " |"]
        lines += ["|---" + "|--:" * (len(heads) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, about])


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and with `--docs` put the tables into docs/scaling.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_rows", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one small batch only")
    parser.add_argument("--docs", action="store_true", help="update docs/scaling.md")
    args = parser.parse_args(argv)
    if args.docs and args.quick:
        parser.error("--docs needs a full run, got --quick")
    sizes = QUICK if args.quick else Sizes()
    bench = Bench(args.model, sizes)
    threads = torch.get_num_threads()
    try:
        batches = tuple(f"{n} context{'s' * (n > 1)}" for n in sizes.batches)
        parts = [
            ("Rows a second: one more token in each context", ("", *batches), list(bench.steps())),
            (f"The {sizes.text} rows of a new text", ("", "ms", "rows a second"),
             list(bench.text())),
        ]  # fmt: skip
    finally:
        bench.close()
    console = Console()
    for title, heads, rows in parts:
        table = Table(title=title)
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    import vllm

    about = f"Model: {args.model} in float32, {bench.width:,} tokens. Threads: {threads}. "
    about += f"vLLM {vllm.__version__}. {report.describe(report.machine(args.model))}."
    console.print(about)
    if args.docs:
        before, rest = PAGE.read_text().split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(parts, about)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
