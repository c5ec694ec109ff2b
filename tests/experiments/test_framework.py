"""Jobs become rows wherever they run, once each, and what is done is never done again."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from genlm_bytes_smc.experiments import EXPERIMENTS, ExperimentError, run_experiment
from genlm_bytes_smc.experiments.experiment import Report, Section, Table, plain
from tests.experiments import jobs
from tests.experiments.jobs import EXPERIMENT, N_JOBS, timeless
from tests.offline.sitecustomize import ALLOWED

TINY = {"name": "tiny", "device": "cpu"}


def lines(folder):
    if not (folder / "rows.jsonl").exists():
        return []
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def without(folder, *seeds):
    """Rows but for those of some seeds, and the file left with just these."""
    kept = [row for row in lines(folder) if row["config"]["seed"] not in seeds]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


def test_a_row_a_job_with_configuration_versions_and_times(tmp_path):
    done = run_experiment(EXPERIMENT, tmp_path, workers=0)
    assert done.ran == N_JOBS and done.rows == lines(tmp_path)
    assert [row["config"]["seed"] for row in done.rows] == list(range(N_JOBS))
    for row in done.rows:
        seed = row["config"]["seed"]
        assert row["result"]["value"] == float(np.random.default_rng(seed).normal())
        assert float(row["result"]["nothing"]) == -np.inf
        assert {"python", "genlm-bytes-smc", "torch"} <= set(row["versions"])
        assert row["run"]["times"]["when"] > 0 and row["run"]["seconds"] >= 0
    assert done.files[0].name == "report.html"


def test_what_is_there_is_not_done_again(tmp_path):
    first = run_experiment(EXPERIMENT, tmp_path, workers=0)
    assert run_experiment(EXPERIMENT, tmp_path, workers=0).ran == 0
    without(tmp_path, 1, 4)
    again = run_experiment(EXPERIMENT, tmp_path, workers=0)
    assert again.ran == 2
    assert list(map(timeless, again.rows)) == list(map(timeless, first.rows))


def test_rows_of_another_version_are_made_anew(tmp_path):
    rows = run_experiment(EXPERIMENT, tmp_path, workers=0).rows
    rows[2]["versions"]["genlm-bytes-smc"] = "0.0.1"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_experiment(EXPERIMENT, tmp_path, workers=0)
    assert done.ran == 1 and len(lines(tmp_path)) == N_JOBS


@pytest.mark.parametrize("torn", [b'{"experiment": "num', b"\xff\xfe", b"{}"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    run_experiment(EXPERIMENT, tmp_path, workers=0)
    without(tmp_path, 5)
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(torn)
    assert run_experiment(EXPERIMENT, tmp_path, workers=0).ran == 1
    assert len(lines(tmp_path)) == N_JOBS


ROW = {"experiment": "x", "config": {}, "result": {}, "versions": {}, "run": {}}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("what is this?", "Expecting value"),
        ("[]", r"row must be an object, got \[\]"),
        ("[" * 100_000, "nested too deeply"),
        *((json.dumps({k: v for k, v in ROW.items() if k != n}), f"row has no '{n}'") for n in ROW),
        *((json.dumps(ROW | {n: 5}), f"row.{n} must be a") for n in ROW),
        (json.dumps(ROW | {"versions": {"torch": None}}), "row.versions.torch must be a string"),
    ],
)
def test_other_lines_than_rows_are_told_of(tmp_path, line, told):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2, is no row .*{told}"):
        run_experiment(EXPERIMENT, tmp_path, workers=0)


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    """It put in order what it had read at its start: 127 of 300 rows were left."""

    def twice(config):
        with pytest.raises(ExperimentError, match=r"another run is writing to .*rows\.jsonl"):
            run_experiment(EXPERIMENT, tmp_path, workers=0)
        return jobs.run(config)

    run_experiment(dataclasses.replace(EXPERIMENT, run=twice), tmp_path, workers=0)
    assert len(lines(tmp_path)) == N_JOBS
    assert run_experiment(EXPERIMENT, tmp_path, workers=0).ran == 0


def test_a_run_that_dies_gives_the_folder_up(tmp_path):
    hold = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, tmp_path / "rows.jsonl.lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ExperimentError, match="another run"):
            run_experiment(EXPERIMENT, tmp_path, workers=0)
        other.kill()
    assert run_experiment(EXPERIMENT, tmp_path, workers=0).ran == N_JOBS


def test_a_failing_job_keeps_the_rows_before_it(tmp_path):
    def with_failure(quick, model):
        configs = jobs.jobs(quick, model)
        configs[3]["fails"] = True
        return configs

    bad = dataclasses.replace(EXPERIMENT, jobs=with_failure)
    with pytest.raises(ExperimentError, match="ValueError: this one cannot be done"):
        run_experiment(bad, tmp_path, workers=0)
    assert len(lines(tmp_path)) == 3


def test_an_interrupt_leaves_whole_rows_and_the_next_call_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(dataclasses.replace(EXPERIMENT, run=jobs.interrupted), tmp_path, workers=0)
    assert [row["config"]["seed"] for row in lines(tmp_path)] == [0, 1, 2]
    assert run_experiment(EXPERIMENT, tmp_path, workers=0).ran == N_JOBS - 3


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="unknown experiment 'bais'; known: approximation, bias"):
        run_experiment("bais", tmp_path)
    with pytest.raises(ValueError, match="workers must be"):
        run_experiment(EXPERIMENT, tmp_path, workers=-1)
    with pytest.raises(ExperimentError, match="one after another"):
        run_experiment(dataclasses.replace(EXPERIMENT, timed=True), tmp_path, workers=2)


def test_studies_that_are_not_installed_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="no package genlm_bytes_smc_studies"):
        run_experiment("bias", tmp_path)


def test_ray_that_is_not_installed_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"genlm-bytes-smc\[ray\]"):
        run_experiment(EXPERIMENT, tmp_path, ray="auto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own: unclosed sockets and files
def test_a_killed_worker_costs_one_job_in_a_pool_and_on_ray(tmp_path, monkeypatch):
    """The same rows from this process, from two processes and from a local Ray cluster, where
    a worker is killed with SIGKILL in the middle of a job in the latter two."""
    monkeypatch.setenv(ALLOWED, "1")  # Ray's processes talk by the machine's own address
    for name in ("pool", "ray"):
        (tmp_path / name).mkdir()
    plainly = run_experiment(jobs.deadly(None, TINY), tmp_path / "here", workers=0)
    in_pool = run_experiment(jobs.deadly(tmp_path / "pool", TINY), tmp_path / "pool", workers=2)
    on_ray = run_experiment(jobs.deadly(tmp_path / "ray", TINY), tmp_path / "ray", ray="local")
    for done, folder in ((in_pool, tmp_path / "pool"), (on_ray, tmp_path / "ray")):
        killed = int((folder / "killed").read_text())
        assert killed not in {row["run"]["pid"] for row in done.rows[2:3]}
        assert len({row["run"]["pid"] for row in done.rows}) >= 2
        found, expected = (
            [{**timeless(row), "config": row["config"]["seed"]} for row in rows]
            for rows in (done.rows, plainly.rows)
        )
        assert found == expected


@pytest.mark.slow
def test_a_job_that_loses_its_worker_again_and_again_is_told_of(tmp_path):
    lost = dataclasses.replace(EXPERIMENT, run=jobs.run_lost)
    with pytest.raises(ExperimentError, match=r"job of numbers lost its worker 3 times \(.*memory"):
        run_experiment(lost, tmp_path, workers=1)


def test_a_failing_job_of_a_pool_is_told_of_in_one_line(tmp_path):
    bad = dataclasses.replace(EXPERIMENT, jobs=lambda quick, model: [{"seed": 1, "fails": True}])
    with pytest.raises(ExperimentError) as caught:
        run_experiment(bad, tmp_path, workers=1)
    first, *trace = str(caught.value).splitlines()
    told = "a job of numbers failed: ValueError: this one cannot be done; its configuration: {"
    assert first.startswith(told)
    assert any("in run" in line for line in trace)


def test_processes_that_are_done_give_back_what_they_hold(tmp_path):
    code = (
        "import sys; from genlm_bytes_smc.experiments import run_experiment\n"
        "from tests.experiments.jobs import LOCKING\n"
        "run_experiment(LOCKING, sys.argv[1], workers=2)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    process = subprocess.run(command, stderr=subprocess.PIPE, timeout=120)
    told = process.stderr.decode()
    assert process.returncode == 0, told
    assert "resource_tracker" not in told


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_of_a_pool_and_keeps_what_was_done(tmp_path):
    """The terminal sends it to all of them."""
    pids = tmp_path / "pids"
    pids.mkdir()
    code = (
        "import sys; from genlm_bytes_smc.experiments import run_experiment\n"
        "from tests.experiments.jobs import SLOW\n"
        "run_experiment(SLOW, sys.argv[1], workers=2)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    environment = os.environ | {"SLOW_JOBS": str(pids)}
    with subprocess.Popen(
        command, start_new_session=True, env=environment, stderr=subprocess.PIPE
    ) as process:
        while len(list(pids.iterdir())) < 2 or len(lines(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1].decode()
    assert "KeyboardInterrupt" in told.splitlines()
    for worker in pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker.name), 0)
    assert sorted(row["config"]["seed"] for row in lines(tmp_path)) == [0, 1]  # as they were done


def test_plain_values_are_json_and_read_back():
    value = {"a": np.float64(1.5), "b": [np.int64(2), -np.inf], "c": np.arange(2), "d": np.nan}
    out = plain(value)
    assert json.loads(json.dumps(out)) == {"a": 1.5, "b": [2, "-inf"], "c": [0, 1], "d": "nan"}
    assert float(out["b"][1]) == -np.inf


def test_reports_escape_and_need_nothing_else(tmp_path):
    section = Section("1 < 2", ["`a<b`"], table=Table(["x"], [["<y>"]]))
    Report("T", "Q?", ["<f>"], [section]).write(tmp_path, "cmd <x>")
    page = (tmp_path / "report.html").read_text()
    assert "<code>a&lt;b</code>" in page and "&lt;y&gt;" in page and "&lt;f&gt;" in page
    assert "http" not in page


def test_every_experiment_has_distinct_json_jobs():
    for experiment in EXPERIMENTS.values():
        for quick in (True, False):
            configs = experiment.jobs(quick, {"name": "tiny"})
            keys = {json.dumps(c, sort_keys=True) for c in configs}
            assert len(keys) == len(configs) > 1
