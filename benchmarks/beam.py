"""This package against genlm-bytes 0.2.0: `python -m benchmarks.beam [--quick] [--only a,b]`.

`--model smollm2` (or the path of a model) measures parts c to e on a real model, with less of
everything and one thread, and `--device cuda` on a GPU.

Every measurement runs in a process of its own, once with one thread and once with as many as
torch chooses (its thread pools keep their size), and measures both packages there, one right
after the other. Results are printed, and written to --out as JSON lines and as a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.measure import Record

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "out"
PARTS = "abcde"
# Part: what its process runs. What the model is asked (e) is counted while c and d are timed.
RUNS = {"a": ("a",), "b": ("b",), "c": ("c", "e"), "d": ("d", "e")}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write."""
    args = _arguments(argv)
    if args.child:
        print(json.dumps(_measure(args)), flush=True)
        return
    if args.docs and args.device != "cpu":
        raise SystemExit("--docs is for the CPU")
    bundled = args.model == "tiny"
    parts = PARTS if bundled else "cde"
    wanted = (args.only or ",".join(parts)).split(",")
    unknown = set(wanted) - set(parts)
    if unknown:
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    records = []
    for part, gives in RUNS.items():
        if not set(gives) & set(wanted):
            continue
        # The trie is built by Python code alone, and counts do not depend on threads.
        settings = ["1"] if part == "b" or args.quick or not bundled else ["1", "default"]
        for threads in args.threads.split(",") if args.threads else settings:
            print(f"measuring {part}, threads: {threads} ...", file=sys.stderr, flush=True)
            found = [r for r in _child(part, threads, args) if r.part in wanted]
            records += [r for r in found if r.part != "e" or threads == "1"]
    records.sort(key=lambda r: r.part)
    machine = report.machine(args.model)
    if args.device != "cpu":
        machine["cpu"] = f"{torch.cuda.get_device_name(args.device)}, {machine['cpu']}"
    report.show(records, machine)
    report.write(records, machine, args.out, quick=args.quick)
    if args.docs:
        report.update_docs(records, machine)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute or less")
    parser.add_argument("--only", default="", help="parts, as in a,c (default: all)")
    parser.add_argument("--model", default="tiny", help="of parts c, d and e (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of the model (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="where files go (%(default)s)")
    parser.add_argument("--threads", default="", help="1, default, or both: 1,default")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md too")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _child(part: str, threads: str, args: argparse.Namespace) -> list[Record]:
    """Return the records of one part, each side or both measured in a process of their own."""
    if part == "b":
        records = measure.trie_records(*(_run(x, threads, args)[0] for x in ("ours", "peer")))
    else:
        records = [Record(**r) for r in _run(part, threads, args)]
    for record in records:
        record.threads = threads
    return records


def _run(child: str, threads: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a process that runs `_measure` printed last."""
    command = [sys.executable, "-m", "benchmarks.beam", "--child", child, "--threads", threads]
    command += ["--model", args.model, "--device", args.device]
    env = dict(os.environ)
    if threads == "1":
        env["OMP_NUM_THREADS"] = "1"
    else:
        env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        command + ["--quick"] * args.quick,
        cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"measuring {child} failed; see above")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One part, in this process."""
    child, model = args.child, args.model
    sizes = measure.QUICK if args.quick else measure.FULL if model == "tiny" else measure.REAL
    sizes = replace(sizes, device=args.device)
    if args.threads != "default":
        torch.set_num_threads(int(args.threads))
    if child in ("ours", "peer"):
        return [measure.trie_of(child, sizes.trie_tokens)]
    if child == "a":
        records = asyncio.run(
            measure.engine_alone(measure.NgramLM(n_tokens=sizes.ngram_tokens), sizes)
        )
    elif child == "c":
        records = asyncio.run(measure.one_model(sizes, model))
    else:
        records = asyncio.run(measure.lanes_and_length(sizes, model))
    return [vars(r) for r in records]


if __name__ == "__main__":
    main()
