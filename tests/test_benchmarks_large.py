"""A short endurance run of the package."""

import gc
from collections import Counter
from dataclasses import replace

from benchmarks import endurance


async def test_rounds_leave_nothing_behind(monkeypatch):
    sizes = endurance.Sizes(n_bytes=400, targets=3, particles=6, max_bytes=12, prompt_bytes=60)
    monkeypatch.setattr(endurance, "KV_BYTES", 1 << 21)
    monkeypatch.setattr(endurance, "ROW_BYTES", 40 * 8 * (8192 + 256))
    alive, before = [], ours_alive()

    def note(look):
        now = ours_alive()
        now.subtract(before)
        alive.append(now)

    looks = await endurance.endure(sizes, note)
    assert len(looks) >= 3
    assert looks[-1].bytes >= 400
    assert looks[-1].forwards > 15
    for look, names in zip(looks, alive, strict=True):
        assert (look.tasks, look.threads) == (0, 0)
        assert look.kv_bytes <= 1 << 21
        assert look.rows <= 40 + 64  # what one call needs is held beyond the limit
        assert names["ByteLLM"] == names["StatesFactor"] == names["ByteLanes"] == 0
        assert names["TreeTransformer"] == 1
    assert sum(alive[-1].values()) - sum(alive[0].values()) < 50


def ours_alive():
    """How many objects of each of this package's classes are alive."""
    gc.collect()
    kinds = (type(o) for o in gc.get_objects())
    return Counter(k.__name__ for k in kinds if str(k.__module__).startswith("genlm_bytes_smc"))


def test_a_leak_is_complained_of():
    look = endurance.Look(0, 0.0, 10**9, 0, 0, 10**6, 1000, 9, 9, 9, 9, 9, 0)
    steady = [_at(look, i) for i in range(10)]
    assert endurance.complaints(steady) == []
    leaking = [_at(look, i, rss=10**9 + 20_000 * i) for i in range(10)]
    assert "resident memory rises by 20.0 bytes a byte" in endurance.complaints(leaking)[0]
    tasks = [_at(look, i, tasks=int(i == 5)) for i in range(10)]
    assert "1 tasks and 0 threads left at 5,000" in endurance.complaints(tasks)[0]
    objects = [_at(look, i, objects=10**6 + 100 * i) for i in range(10)]
    assert "objects rise" in endurance.complaints(objects)[0]
    full = [_at(look, i, kv_bytes=10**9) for i in range(10)]
    assert "keys and values" in endurance.complaints(full)[0]


def _at(look, i, **changed):
    return replace(look, bytes=1000 * i, **changed)
