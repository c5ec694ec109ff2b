"""The training text: documentation shipped with Python and permissive packages + generated text.

Documents are split into train and held-out by a hash of their text before anything is learned
from them. ``python corpus.py --out DIR`` writes ``train.jsonl`` and ``heldout.jsonl``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import random
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import structured

#: Packages whose docstrings may be used, with the licence that their metadata must name.
ALLOWED: dict[str, str] = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD License",
    "pandas": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformers": "Apache 2.0",
    "tokenizers": "Apache",
    "huggingface_hub": "Apache-2.0",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD",
    "joblib": "BSD-3-Clause",
    "nltk": "Apache",
    "rich": "MIT",
    "click": "BSD-3-Clause",
    "pydantic": "MIT",
    "attrs": "MIT",
    "jinja2": "BSD License",
}
#: At most so many bytes of docstrings from one package.
PACKAGE_LIMIT = 350_000
STDLIB_LIMIT = 1_600_000
GENERATED_BYTES = 6_000_000
HELDOUT_PERCENT = 4


@dataclass(frozen=True)
class Document:
    """A text and the kind of text that it is."""

    kind: str
    text: str


def is_heldout(text: str) -> bool:
    """Whether a text is kept out of training: depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


def licence_of(package: str) -> str:
    """What the package metadata says about its licence, on one line."""
    meta = importlib.metadata.metadata(package).json
    named = [str(meta.get(key, "")).split("\n")[0] for key in ("license_expression", "license")]
    named += [
        c.rpartition("::")[2].strip() for c in meta.get("classifier", []) if c.startswith("License")
    ]
    return "; ".join(n for n in named if n)


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings in a source file, without running it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 40:
                yield inspect.cleandoc(text)[:6000]


def _sources(root: Path, skip: tuple[str, ...]) -> list[Path]:
    paths = [p for p in root.rglob("*.py") if not set(skip) & set(p.relative_to(root).parts)]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())


def _take(paths: list[Path], limit: int, seed: int, seen: set[str]) -> list[str]:
    """Docstrings from files in a seeded order until ``limit`` bytes are reached."""
    order = list(paths)
    random.Random(seed).shuffle(order)
    texts: list[str] = []
    total = 0
    for path in order:
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                texts.append(text)
                total += len(text.encode(errors="replace"))
        if total >= limit:
            break
    return texts


def _split_topic(text: str, size: int = 5000) -> Iterator[str]:
    """Cut a long topic at paragraph ends."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            yield piece.strip("\n")
            piece = ""
        piece += paragraph + "\n\n"
    if piece.strip():
        yield piece.strip("\n")


def documentation(seed: int) -> tuple[list[Document], dict[str, str]]:
    """Documents from documentation, and the licence of every source used."""
    sources = {"Python " + sys.version.split()[0]: "PSF-2.0 (standard library documentation)"}
    documents = [
        Document("pydoc", piece) for name in sorted(topics) for piece in _split_topic(topics[name])
    ]
    seen: set[str] = set()
    skip = ("test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "_vendor")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = _take(_sources(stdlib, skip), STDLIB_LIMIT, seed, seen)
    documents += [Document("docstring-stdlib", t) for t in texts]
    for package, needed in ALLOWED.items():
        try:
            licence = licence_of(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if needed.lower() not in licence.lower():
            raise SystemExit(f"{package}: expected licence {needed!r}, metadata says {licence!r}")
        version = importlib.metadata.version(package)
        module = {"attrs": "attr"}.get(package, package)
        root = Path(sysconfig.get_paths()["purelib"]) / module
        if not root.is_dir():
            continue
        texts = _take(_sources(root, (*skip, "testing")), PACKAGE_LIMIT, seed, seen)
        if texts:
            sources[f"{package} {version}"] = licence
            documents += [Document("docstring-packages", t) for t in texts]
    return documents, sources


def build(seed: int) -> tuple[list[Document], list[Document], dict[str, str]]:
    """Train documents, held-out documents and the sources with their licences."""
    documents, sources = documentation(seed)
    for kind, (_, share) in structured.KINDS.items():
        size = int(GENERATED_BYTES * share)
        documents += [Document(kind, t) for t in structured.generate(kind, size, seed)]
    unique = {d.text: d for d in documents if d.text.isprintable() or d.text.strip()}
    clean: list[Document] = []
    for document in unique.values():
        try:
            document.text.encode()
        except UnicodeEncodeError:
            continue
        if "<|endoftext|>" not in document.text:
            clean.append(document)
    random.Random(seed).shuffle(clean)
    train = [d for d in clean if not is_heldout(d.text)]
    heldout = [d for d in clean if is_heldout(d.text)]
    return train, heldout, sources


def sample(heldout: list[Document], per_kind: int = 12_000) -> list[Document]:
    """A small set for tests: per kind one long document where there are any, then others."""
    by_kind: dict[str, list[Document]] = defaultdict(list)
    for document in heldout:
        by_kind[document.kind].append(document)
    chosen: list[Document] = []
    for kind in sorted(by_kind):
        long = [d for d in by_kind[kind] if 2500 < len(d.text.encode()) < 9000][:1]
        rest = [d for d in by_kind[kind] if len(d.text.encode()) <= 2500]
        picked, total = list(long), sum(len(d.text.encode()) for d in long)
        for document in rest:
            size = len(document.text.encode())
            if total + size > per_kind or len(picked) >= 30:
                break
            picked.append(document)
            total += size
        chosen += picked
    return chosen


def write_jsonl(path: Path, documents: list[Document]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for d in documents:
            file.write(json.dumps({"kind": d.kind, "text": d.text}, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Document]:
    """The documents in a file written by ``write_jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def main() -> None:
    """Write the corpus and print its sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=Path, help="also write the small held-out sample here")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train, heldout, sources = build(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "heldout.jsonl", heldout)
    (args.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
    if args.sample is not None:
        write_jsonl(args.sample, sample(heldout))
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for offset, part in ((0, train), (2, heldout)):
        for d in part:
            sizes[d.kind][offset] += 1
            sizes[d.kind][offset + 1] += len(d.text.encode())
    print(f"{'kind':<20}{'train docs':>12}{'bytes':>12}{'held-out':>12}{'bytes':>12}")
    for kind, numbers in sorted(sizes.items()):
        print(f"{kind:<20}" + "".join(f"{n:>12,}" for n in numbers))
    total = [sum(n[i] for n in sizes.values()) for i in range(4)]
    print(f"{'all':<20}" + "".join(f"{n:>12,}" for n in total))


if __name__ == "__main__":
    main()
