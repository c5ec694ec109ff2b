"""Count the package's lines by folder: `python tools/count_lines.py`.

Docstrings, comments and blank lines are told apart from code, because what a reader has to hold in
the head is the code, and what bounds a further reduction is how the lines are shared out.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "genlm_bytes_smc"
KINDS = ("files", "lines", "code", "docstrings", "comments", "blank")


def count(path: Path) -> Counter[str]:
    """Count the lines of one file."""
    source = path.read_text(encoding="utf-8")
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            told.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    others = [s.strip() for i, s in enumerate(source.splitlines(), 1) if i not in told]
    blank, comments = others.count(""), sum(s.startswith("#") for s in others)
    return Counter(
        files=1,
        lines=len(others) + len(told),
        code=len(others) - blank - comments,
        docstrings=len(told),
        comments=comments,
        blank=blank,
    )


def main() -> None:
    """Print a line for each folder, and the total."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        room = parts[0] if len(parts) > 1 else "(root)"
        found[room] = found.get(room, Counter()) + count(path)
    found["total"] = sum(found.values(), Counter())
    print(f"{'':12}" + "".join(f"{kind:>12}" for kind in KINDS))
    for room, counts in found.items():
        print(f"{room:12}" + "".join(f"{counts[kind]:12,}" for kind in KINDS))


if __name__ == "__main__":
    main()
