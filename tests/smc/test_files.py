"""Files are written whole or not at all, and read as what they are or refused by name."""

import contextlib
import copy
import functools
import json
import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genlm_bytes_smc.cli.generate import show_run
from genlm_bytes_smc.cli.options import CliError, ShowOptions
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import AllParticlesDeadError, Rollout, SMCResult, files, smc_sync
from genlm_bytes_smc.viz import run_page
from tests.smc.worlds import FREE, RANDOM, TOPK, same, toy

# -- writing ---------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("content", ["é\n", b"\xff\r\n"])
def test_a_file_has_just_what_was_written(tmp_path, content):
    files.write(tmp_path / "x", content)
    files.write(tmp_path / "x", content)
    wanted = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "x").read_bytes() == wanted
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_at_the_name_of_the_unfinished_file_was_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "x.part").symlink_to(victim)
    files.write(tmp_path / "x", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "x").read_text() == "new"


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    link.symlink_to("folder/target")
    for text in ("first", "second"):  # it names nothing, then a file
        files.write(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert os.listdir(tmp_path / "folder") == ["target"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        files.write(loop, "text")


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666])
def test_an_old_file_keeps_its_permissions(tmp_path, kept):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(kept)
    files.write(path, "new")
    assert mode(path) == kept and path.read_text() == "new"


@pytest.mark.parametrize(("mask", "left"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_what_the_umask_leaves(tmp_path, mask, left):
    before = os.umask(mask)
    try:
        files.write(tmp_path / "x", "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x") == left


def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    files.write(null, "text")
    assert null.is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write(pipe, "text")
    assert os.read(end, 9) == b"text"
    os.close(end)
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "text")
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


@pytest.fixture
def full_disk():
    """No file may grow beyond 64 KiB meanwhile: the system refuses the rest of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk, old):
    path = tmp_path / "x"
    if old is not None:
        path.write_text(old)
    with pytest.raises(OSError, match="too large"):
        files.write(path, "new" * (1 << 16))
    assert os.listdir(tmp_path) == ([] if old is None else ["x"])
    assert old is None or path.read_text() == old


def test_files_written_at_once_are_whole(tmp_path):
    """One name for all unfinished files let one writer take away or fill another's."""
    path = tmp_path / "x"

    def fill(letter):
        for _ in range(50):
            files.write(path, letter * 100_000)
            assert path.read_text() in ("a" * 100_000, "b" * 100_000)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, "ab"))
    assert os.listdir(tmp_path) == ["x"]


# -- reading ---------------------------------------------------------------------------


@functools.cache
def saved_runs():
    """Saved runs of every kind, as JSON text."""
    target, short = toy(seed=3, params=TOPK) * ByteRegex(FREE), {"progress": False}
    runs = [
        smc_sync(target, 4, 1.0, 5, seed=5, record=True, **short),
        smc_sync(target, 3, 0.9, 2, seed=5, **short),  # stopped by its length, can go on
        smc_sync(target, 3, 0.9, 4, seed=5, rollout=Rollout(2, 2), **short),
        smc_sync(toy(params=RANDOM), 3, 0.9, 3, seed=1, share_beams=False, record=True, **short),
    ]
    for options in ({"record": True}, {"rollout": Rollout(2, 2)}):
        with pytest.raises(AllParticlesDeadError) as caught:
            smc_sync(toy() * ByteRegex("abx"), 3, max_bytes=9, **options, **short)
        runs.append(caught.value.result)
    about = {"prompt": "x", "model": "toy", "constraint": "regex", "resampling": "systematic"}
    about |= {"ess_threshold": 0.5, "max_bytes": 5}
    return [
        json.dumps(files.pack(run.state, run.resumable) | {"about": about}, indent=1)
        for run in runs
    ]


def test_every_kind_of_run_comes_back(tmp_path):
    for text in saved_runs():
        path = tmp_path / "run.json"
        path.write_text(text)
        result = SMCResult.load(path)
        result.save(path)
        assert json.loads(path.read_text()) == {
            k: v for k, v in json.loads(text).items() if k != "about"
        }
        assert same(SMCResult.load(path), result)


def test_a_run_of_many_particles_and_steps_is_read_in_good_time():
    n, t = 1000, 100
    run = json.loads(saved_runs()[0])
    particles, info = run["particles"], run["history"][0]
    for name in ("ended", "twist"):
        particles[name] = particles[name][:1] * n
    particles |= {"text": ["61" * t] * n, "length": [t] * n, "eve": [0] * n}
    particles["log_weights"] = ["-inf"] + [-1.5] * (n - 1)
    info |= {"active": n, "ended": 0, "dead": 0, "ancestors": list(range(n))}
    info |= {"symbols": [97] * n, "log_weights": [-1.5] * n}
    state, _ = files.unpack(run | {"history": [info] * t, "resumable": None})
    assert state.particles.text.shape == (n, t)
    assert len(state.history) == t and state.history[0].symbols.dtype == np.int16


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (["seed"], -1, "run.seed must be an integer of 0 or more, got -1"),
        (["seed"], True, "run.seed must be an integer"),
        (["start"], 10**400, "run.start must be a finite number"),
        (["history"], None, "run.history must be an array, got None"),
        (["history", 1, "ess"], "1", r"run.history\[1\].ess must be a finite number"),
        (["history", 1, "seconds"], float("nan"), r"run.history\[1\].seconds must be a finite"),
        (["history", 0, "log_ml"], float("inf"), r'log_ml must be a finite number or "-inf"'),
        (["history", 0, "symbols", 2], 257, r"symbols\[2\] must be an integer of -1 to 256"),
        (["history", 0, "symbols"], [1], r"history\[0\].symbols must be an array of 4 values"),
        (
            ["history", 0, "ancestors"],
            [4] * 4,
            r"ancestors\[0\] must be an integer of 0 to 3",
        ),
        (["history", 0, "deaths"], [["x"]], r"deaths\[0\] must be an array of 2 values"),
        (["history", 0, "color"], "red", r"run.history\[0\] has an unknown member 'color'"),
        (["particles", "eve", 3], 4, r"run.particles.eve\[3\] must be an integer of 0 to 3"),
        (["particles", "text"], [], "run.particles.text must be an array of one text a particle"),
        (["particles", "text", 1], "6", r"run.particles.text\[1\] must be bytes as hexadecimal"),
        (["particles", "text", 1], "", "run.particles.text must have rows of one length"),
        (["particles", "ended", 0], 1, r"run.particles.ended\[0\] must be true or false, got 1"),
        (["particles", "length", 0], 99, r"run.particles.length\[0\] must be an integer of 0 to"),
        (["particles", "salt"], [[]], "run.particles.salt must be an array of 4 values"),
        (["resumable"], 5, "run.resumable must be an object, got 5"),
    ],
    ids=lambda given: ".".join(map(str, given)) if isinstance(given, list) else "",
)
def test_an_error_names_the_field(where, value, told):
    run = json.loads(saved_runs()[0])
    at = run
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises(ValueError, match=told):
        files.unpack(run)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000, '"\\ud800"', "\ud800", "[1e999]"]
)
def test_texts_that_are_no_run(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"no saved result|other data"):
        SMCResult.load(path)
    with pytest.raises(CliError, match="is no saved run"):
        show_run(ShowOptions(run=str(path), out="-"))


def spots(value, path=()):
    """Paths to all values inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from spots(inner, (*path, key))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 256, 257, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -1e308])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["-inf", "inf", "nan", "6", "zz", "\ud800", "</script>"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
)


@st.composite
def mutated(draw):
    """The text of a saved run after one to three changes."""
    text = draw(st.sampled_from(saved_runs()))
    if draw(st.integers(0, 9)) == 0:  # of the text itself
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + draw(st.sampled_from(["", "[", "}", ",", "1", '"'])) + text[at + 1 :]
    run = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in spots(run) if p]))
        at = run
        for key in path[:-1]:
            at = at[key]
        kind = draw(st.sampled_from(["replace", "drop", "repeat", "copy", "add"]))
        if kind == "replace":
            at[path[-1]] = draw(VALUES)
        elif kind == "drop":
            del at[path[-1]]
        elif kind == "repeat" and isinstance(at, list):
            at.insert(path[-1], copy.deepcopy(at[path[-1]]))
        elif kind == "copy":  # a value from elsewhere, of a fitting or another type
            other = run
            for key in draw(st.sampled_from(list(spots(run)))):
                other = other[key]
            at[path[-1]] = copy.deepcopy(other)
        elif kind == "add" and isinstance(at, dict):
            at[draw(st.sampled_from(["x", "moved", "salt", "about", "symbols"]))] = draw(VALUES)
    return json.dumps(run)


@settings(max_examples=400, deadline=None)
@given(mutated())
def test_mutated_runs_are_shown_or_refused_in_one_line(tmp_path_factory, text):
    """Of 3,000 such files 223 made `show` raise TypeError, OverflowError, ZeroDivisionError."""
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    run, page = folder / "run.json", folder / "page.html"
    run.write_bytes(text.encode("utf-8", "surrogatepass"))
    page.unlink(missing_ok=True)
    refused = None
    try:
        show_run(ShowOptions(run=str(run), out=str(page)))
    except CliError as error:
        refused = str(error)
    assert page.exists() if refused is None else "\n" not in refused
    try:
        result = SMCResult.load(run)
    except ValueError:
        return
    result.save(run)  # what is read is whole: all that a result can say of itself, it says
    assert same(SMCResult.load(run), result)
    assert str(result) and repr(result) and result._repr_html_()
    assert result.posterior is not None and result.byte_posterior is not None
    with contextlib.suppress(ValueError):  # not recorded
        json.loads(result.to_json(), parse_constant=pytest.fail)
    with contextlib.suppress(ValueError):  # steps of other numbers of particles
        assert run_page(result)
