"""No modules of the package import each other in a circle, wherever the imports stand."""

import ast
from pathlib import Path

import pytest

import genlm_bytes_smc

ROOT = Path(genlm_bytes_smc.__file__).parent
NAME = ROOT.name

# Rooms that still have circles; to be emptied.
CIRCLES: set[str] = set()


def modules():
    """Every module of the package by its dotted name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


PATHS = dict(modules())


def imported(name, path):
    """The modules of the package that a module imports: at its top, under TYPE_CHECKING and in
    functions. The package's own `__init__` names every part, and none of them at run time."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            found = [f"{base}.{alias.name}" for alias in node.names] + [base]
            # a name of a package is no import of that package if it is a module itself
            if all(f"{base}.{alias.name}" in PATHS for alias in node.names):
                found.remove(base)
        else:
            continue
        yield from (f for f in found if f in PATHS and f not in (name, NAME))


def circles(graph):
    """Sets of modules each of which imports every other, directly or not (Tarjan's algorithm)."""
    number, low, stack, out = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            at = stack.index(node)
            found = stack[at:]
            del stack[at:]
            if len(found) > 1:
                out.append(sorted(found))

    for node in graph:
        if node not in number:
            visit(node)
    return out


def room(circle):
    """The folders that a circle goes through."""
    return {name.split(".")[1] for name in circle}


GRAPH = {name: sorted(set(imported(name, path))) for name, path in PATHS.items() if name != NAME}
FOUND = circles(GRAPH)


def test_circles_are_found():
    graph = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"], "e": []}
    assert circles(graph) == [["a", "b", "c"]]
    inside = f"{NAME}.smc.loop"
    assert f"{NAME}.smc.plan" in GRAPH[inside]
    assert any(GRAPH.values())


def test_no_module_imports_itself_by_a_detour():
    bad = [circle for circle in FOUND if not room(circle) <= CIRCLES]
    assert not bad, "\n".join(" <-> ".join(circle) for circle in bad)


@pytest.mark.parametrize("name", sorted(CIRCLES))
def test_rooms_with_circles_are_still_needed_in_the_list(name):
    assert any(name in room(circle) for circle in FOUND), f"{name} has no circle: take it out"
