"""Compiled functions: kept where this user can write, and made anew when their sources change."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import genlm_bytes_smc
from genlm_bytes_smc import compiled
from genlm_bytes_smc.beam import masses_numba

PACKAGE = Path(genlm_bytes_smc.__file__).parent
PROGRAM = """
import json
import numpy as np
from genlm_bytes_smc.beam import steps_numba
state = np.zeros((4, 1, 2), dtype=np.int64)
state[2:].view(np.float64)[:] = np.log([0.25, 0.75])
key = np.zeros(1, dtype=np.uint64)
out, _ = steps_numba.prune(state, key, np.full(1, -np.inf), 1, -np.inf, False)
found = np.exp(out[3].view(np.float64)).tolist()
print(json.dumps({"found": found, "hits": sum(steps_numba.prune.stats.cache_hits.values())}))
"""


def run(site, caches):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    environment["XDG_CACHE_HOME"] = str(caches)
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=site, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="XDG_CACHE_HOME counts on Linux")
def test_code_is_kept_for_the_user_of_a_read_only_package_until_a_source_changes(tmp_path):
    site, caches = tmp_path / "site", tmp_path / "caches"
    unneeded = shutil.ignore_patterns("__pycache__", "tiny", "experiments")
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=unneeded)
    for folder in ("beam", "lm"):  # as good as read-only, for a superuser too
        (site / PACKAGE.name / folder / "__pycache__").write_text("no folder")
    assert run(site, "/dev/null/none") == {"found": [[0.75]], "hits": 0}  # nowhere to keep it
    assert run(site, caches) == {"found": [[0.75]], "hits": 0}
    assert run(site, caches) == {"found": [[0.75]], "hits": 1}
    # A function of another file than the one that Python calls.
    callee = site / PACKAGE.name / "beam" / "pruning_numba.py"
    source = callee.read_text(encoding="utf-8")
    assert source.count("order = _descending(logw[n])") == 2
    callee.write_text(source.replace("_descending(logw[n])", "_descending(-logw[n])"))
    assert run(site, caches) == {"found": [[0.25]], "hits": 0}


def double(x):
    return 2 * x


def test_two_processes_that_keep_code_at_once_do_not_mix_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    function = numba.njit(double)
    assert (function(1), function(1.0)) == (2, 2.0)
    (one, first), (two, second) = function.overloads.items()
    cache, other = compiled._Cache(double), compiled._Cache(double)
    beside = threading.Thread(target=other.save_overload, args=(two, second))
    save = cache._cache_file._save_index

    def save_late(index):
        beside.start()
        beside.join(1.0)
        save(index)

    monkeypatch.setattr(cache._cache_file, "_save_index", save_late)
    cache.save_overload(one, first)
    beside.join()
    found = [compiled._Cache(double).load_overload(s, function.targetctx) for s in (one, two)]
    assert [f.signature.args for f in found] == [one, two]


def test_every_file_of_compiled_functions_counts_as_a_source():
    for path in PACKAGE.rglob("*.py"):
        if "genlm_bytes_smc.compiled import" in path.read_text(encoding="utf-8"):
            assert str(path.relative_to(PACKAGE)) in compiled.SOURCES
    assert all((PACKAGE / name).exists() for name in compiled.SOURCES)
    kept = [f for f in vars(masses_numba).values() if isinstance(f, Dispatcher)]
    assert len(kept) > 10
    assert all(isinstance(f._cache, compiled._Cache) for f in kept)


def test_python_is_refused_what_only_compiled_functions_can_call():
    none = np.empty(0, dtype=np.int64)
    for _ in range(2):  # not compiled yet, and compiled
        with pytest.raises(TypeError, match="touches can only be called by compiled functions"):
            masses_numba.touches(1, 2, none)
        assert not numba.njit(lambda *args: masses_numba.touches(*args))(1, 2, none)


def test_an_index_that_names_a_class_which_is_no_more_counts_as_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    function = numba.njit(double)
    assert function(1) == 2
    ((signature, result),) = function.overloads.items()
    cache = compiled._Cache(double)
    index = Path(cache._cache_file._index_path)
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_bytes(pickle.dumps(numba.__version__) + b"cgenlm_bytes_smc.gone\nArrays\n.")
    assert cache.load_overload(signature, function.targetctx) is None
    cache.save_overload(signature, result)
    assert cache.load_overload(signature, function.targetctx) is not None
