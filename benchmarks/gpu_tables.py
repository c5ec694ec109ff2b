"""Records of `benchmarks.gpu` as cells of tables, with the goals for an H200."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu_forward import COMPILED, WAYS
from benchmarks.gpu_parts import DEFAULT, ON_HOST, TOP, Record
from benchmarks.gpu_stages import STAGES

_SMALL, _LARGE = "Llama-3.2-1B", "Llama-3.1-8B"


@dataclass(frozen=True)
class Goal:
    """What a value should reach on an H200: at least `bound`, or at most."""

    part: str
    model: str
    size: int | None
    key: str
    bound: float
    cases: tuple[str, ...] = (TOP, DEFAULT)
    at_most: bool = False

    def met(self, record: Record) -> bool:
        """Return whether a record reaches it."""
        value = record.values[self.key]
        return value <= self.bound if self.at_most else value >= self.bound


GOALS = (
    Goal("text", _LARGE, None, "rate", 400, (TOP,)),
    Goal("text", _LARGE, None, "over_floor", 1.5, (TOP,), at_most=True),
    Goal("particles", _LARGE, 64, "rate", 5000),
    Goal("particles", _LARGE, 1024, "rate", 25_000),
    Goal("particles", _LARGE, 64, "inside", 0.85),
    Goal("particles", _SMALL, 64, "inside", 0.6),
)


def goalof_part(record: Record, key: str) -> Goal | None:
    """Return the goal of one of a record's values, if there is one."""
    for goal in GOALS:
        if (goal.part, goal.model, goal.key) != (record.part, record.model, key):
            continue
        if record.case in goal.cases and goal.size in (None, record.size):
            return goal
    return None


@dataclass(frozen=True)
class Grid:
    """A table: a title, a head and cells a row; columns that are all empty are left out."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def used(self) -> list[int]:
        """Return the columns that say something."""
        return [i for i in range(len(self.heads)) if any(row[i] for row in self.rows)]


def grids(records: Sequence[Record]) -> list[Grid]:
    """Return the tables of what was measured, and of what was not and why."""
    made = [r for r in records if not r.problem]
    found = [
        Grid(title, heads, rows)
        for title, heads, rows in (
            _agreement(of_part(made, "agreement")),
            _forwards(of_part(made, "forward")),
            _text(of_part(made, "text")),
            _particles(of_part(made, "particles")),
            _stages(of_part(made, "particles")),
            _prompts(of_part(made, "prompts")),
            _contexts(of_part(made, "context")),
        )
        if rows
    ]
    missing = [[r.part, r.model, r.case, f"{r.size:,}", r.problem] for r in records if r.problem]
    if missing:
        found.append(Grid("Not measured", ("part", "model", "case", "size", "why"), missing))
    return found


_Cells = tuple[str, tuple[str, ...], list[list[str]]]


def of_models(records: Sequence[Record]) -> list[Record]:
    """Return records by model in the order they came, and size."""
    models = list(dict.fromkeys(r.model for r in records))
    return sorted(records, key=lambda r: (models.index(r.model), r.size))


def of_part(records: Sequence[Record], part: str) -> list[Record]:
    """Return the records of one part, by model in the order they came, case and size."""
    models = list(dict.fromkeys(r.model for r in records))
    order = [TOP, DEFAULT, ON_HOST]
    return sorted(
        (r for r in records if r.part == part),
        key=lambda r: (
            models.index(r.model),
            order.index(r.case) if r.case in order else len(order),
            r.size,
        ),
    )


def _agreement(records: Sequence[Record]) -> _Cells:
    rows = [[r.model, r.case, f"{r.values['apart']:.1e}"] for r in records]
    title = "The device against the CPU: float32, two layers of this vocabulary"
    return title, ("model", "pruning", "largest difference, nats"), rows


def _forwards(records: Sequence[Record]) -> _Cells:
    rows = []
    for model, size in dict.fromkeys((r.model, r.size) for r in of_models(records)):
        found = {r.case: r for r in records if (r.model, r.size) == (model, size)}
        mine = {case: r.values for case, r in found.items()}
        floor = next(iter(mine.values()))["floor_ms"]
        times = [_number(mine[w]["ms"]) if w in mine else "" for w in (*WAYS, COMPILED)]
        ratio = f"{mine['engine']['ms'] / floor:.2f}" if "engine" in mine else ""
        peak = _memory(found["engine"]) if "engine" in found else ""
        rows.append([model, f"{size:,}", _number(floor), *times, ratio, peak])
    heads = ("model", "positions", "floor", "engine", "without a graph", "transformers' modules")
    return (
        "One decoding forward, ms",
        (*heads, "torch.compile", "engine / floor", "peak memory"),
        rows,
    )


def _text(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, *_with_goal(r, "rate", lambda x: f"{x:,.0f}"), _value(r, "ms"),
            _value(r, "forwards"), _value(r, "rows"), *_with_goal(r, "over_floor", _number),
            _share(r), _value(r, "waits"), _value(r, "waits_inside"), _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes/s", "goal", "ms a byte", "forwards", "rows")
    more = ("time / floor", "goal", "in the forward", "waits", "waits in it", "peak memory")
    return "One text; forwards, rows and waits a byte", heads + more, rows


def _particles(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", *_with_goal(r, "rate", lambda x: f"{x:,.0f}"),
            *(_value(r, k) for k in ("ms", "forwards", "rows", "lanes", "waits", "waits_inside")),
            _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "particles", "particle-bytes/s", "goal", "ms a step")
    more = ("forwards", "rows", "distinct texts", "waits", "waits in the forward", "peak memory")
    return "Particles; forwards, rows and waits a step", heads + more, rows


def _stages(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", *(_value(r, f"{stage}_ms") for stage in STAGES),
            *_with_goal(r, "inside", lambda x: f"{x:.0%}"),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "particles", "forward", "rows stored", "beam", "constraint")
    title = "A step by stages, ms, with a wait for the device around each"
    return title, (*heads, "draw", "host", "in the forward", "goal"), rows


def _prompts(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", f"{r.values['rate']:,.0f}",
            f"{r.values['ms'] * r.size:,.0f}", f"{r.values['forwards'] * r.size:.0f}",
            _value(r, "forwards"), _value(r, "rows"), _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes", "bytes/s", "ms in all", "forwards in all")
    title = "Reading a prompt"
    return title, (*heads, "forwards a byte", "rows a byte", "peak memory"), rows


def _contexts(records: Sequence[Record]) -> _Cells:
    rows = [
        [r.model, r.case, f"{r.size:,}", *(_value(r, k) for k in ("ms", "forwards", "rows")),
         _memory(r)]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes of prompt", "ms a step", "forwards", "rows", "peak memory")
    return "A step of 64 particles after a prompt", heads, rows


def _with_goal(record: Record, key: str, shown: Callable[[float], str]) -> tuple[str, str]:
    """Return a value and what is said of its goal."""
    if key not in record.values:
        return "", ""
    goal, text = goalof_part(record, key), shown(record.values[key])
    if goal is None:
        return text, ""
    sign = "at most" if goal.at_most else "at least"
    return text, f"{sign} {shown(goal.bound)}: {'met' if goal.met(record) else 'missed'}"


def _value(record: Record, key: str) -> str:
    return _number(record.values[key]) if key in record.values else ""


def _share(record: Record) -> str:
    return f"{record.values['inside']:.0%}" if "inside" in record.values else ""


def _memory(record: Record) -> str:
    size = record.values.get("peak_bytes")
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def _number(x: float) -> str:
    if x >= 1000:
        return f"{x:,.0f}"
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
