"""Helpers of the constraint tests: walks, texts that are nearly right, and slow answers."""

import json
import resource
import subprocess
import sys
import textwrap

import regex

from genlm_bytes_smc.constraints import ByteConstraint


def accepted(constraint: ByteConstraint, data: bytes) -> bool:
    """Whether the constraint gives the whole text a weight above zero."""
    return bool(constraint.log_complete(constraint.states([data]))[0] > float("-inf"))


def walk(constraint: ByteConstraint, rng, longest: int = 12) -> bytes | None:
    """A random text of weight above zero, or None if the walk did not end in time.

    It prefers to end once it may and, by turns, ASCII."""
    state, out = constraint.initial(1), bytearray()
    for _ in range(4 * longest):
        row = constraint.block(state)[0]
        admitted = (row[:256] > float("-inf")).nonzero().flatten().tolist()
        may_end = row[256] > float("-inf")
        if may_end and (not admitted or rng.random() < 0.3 or len(out) > longest):
            return bytes(out)
        assert admitted, f"{bytes(out)!r} was admitted and cannot be completed"
        ascii_only = [b for b in admitted if b < 0x80]
        byte = rng.choice(ascii_only if ascii_only and rng.random() < 0.5 else admitted)
        out.append(byte)
        state = constraint.step(state, state.new_tensor([byte]))
    return None


def alphabet_of(pattern: str) -> str:
    """Characters that are likely to matter to a pattern."""
    return "".join(sorted({*pattern, *"aAbkK1é\n _.日Σ\u212a\u0301\U0001f600"} - set("()|*?{}")))


def mutated(text: str, letters: str, rng) -> str:
    """`text` with one character changed, dropped, doubled or added."""
    i = rng.randrange(len(text) + 1)
    return text[:i] + rng.choice([rng.choice(letters), "", text[i : i + 1] * 2]) + text[i + 1 :]


def partially(compiled: regex.Pattern, text: str) -> bool:
    """Whether some text that begins with `text` is matched."""
    return compiled.fullmatch(text, partial=True) is not None


def in_a_process(code: str, gib: float = 6, seconds: int = 60):
    """What `code` leaves in `out`, run where it may take its process down and no more.

    It may use so much address space, and so many seconds of processor time.
    """
    limits = ((resource.RLIMIT_AS, int(gib * 2**30)), (resource.RLIMIT_CPU, seconds))
    lines = [f"import resource; resource.setrlimit({k}, ({v}, {v}))" for k, v in limits]
    source = "\n".join([*lines, textwrap.dedent(code), "import json; print(json.dumps(out))"])
    run = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=20 * seconds
    )
    assert run.returncode == 0, f"exit {run.returncode}\n{run.stderr[-2000:]}"
    return json.loads(run.stdout)
