"""The experiments on small jobs of their own, and the commands."""

import json
import math
import shlex

import pytest
import torch

from genlm_bytes_smc import as_engine
from genlm_bytes_smc.cli import main
from genlm_bytes_smc.cli.experiment import suggestion
from genlm_bytes_smc.cli.options import StudyOptions
from genlm_bytes_smc.experiments import EXPERIMENTS, Advice, ExperimentError, recommend
from genlm_bytes_smc.experiments.advice import truth_of
from genlm_bytes_smc.experiments.experiment import Job, attempt
from genlm_bytes_smc.experiments.models import summarise
from studies.constraints import PeerEngine
from studies.texts import real_texts
from tests.experiments.jobs import timeless
from tests.toys import ToyLM

TINY = {"name": "tiny", "device": "cpu"}


def rows_of(name, changes, keep):
    """Rows of the quick jobs that `keep` chooses, made smaller by `changes`."""
    experiment = EXPERIMENTS[name]
    configs = [{**c, **changes} for c in experiment.jobs(True, TINY) if keep(c)]
    rows = [attempt(Job(name, experiment.run, c)) for c in configs]
    assert all(isinstance(row, dict) for row in rows), rows
    return rows


def written(name, rows, tmp_path):
    files = EXPERIMENTS[name].report(rows).write(tmp_path, "a command")
    page = files[0].read_text()
    assert "data:image/png;base64," in page or len(files) == 1
    assert all(f.exists() and f.stat().st_size > 500 for f in files)
    assert {f.suffix for f in files[1:]} == {".png", ".svg"}
    return page


def test_approximation(tmp_path):
    texts = ["The name is A", "x = [1, 2]"]
    rows = rows_of("approximation", {"texts": texts}, lambda c: c["K"] != 2)
    by = {
        (r["config"]["K"], r["config"].get("prune"), r["config"].get("threshold")): r for r in rows
    }
    wide, narrow = by[8, "topk", 0.0]["result"], by[1, "topk", 0.0]["result"]
    assert wide["jsd"] < 0.1 * narrow["jsd"]
    assert wide["apart_bits"] < narrow["apart_bits"]
    exact = by[128, None, None]["result"]
    # "The name is A" has up to 384 candidates, so that 128 are fewer, and lose nearly nothing.
    assert 0 < exact["lm_rows"] < exact["lm_rows_exact"] and exact["jsd"] < 1e-9
    assert "bits a byte" in written("approximation", rows, tmp_path)


def test_bias(tmp_path):
    rows = rows_of("bias", {"runs": 8, "particles": 6}, lambda c: c["prune"] == "unbiased")
    again = attempt(Job("bias", EXPERIMENTS["bias"].run, rows[0]["config"]))
    assert timeless(again) == timeless(rows[0])  # a job does not depend on those before it
    for row in rows:
        r = row["result"]
        assert r["log_unsure"] - r["log_truth"] < -10
        assert len(r["log_ml"]) == 8 and min(r["lm_rows"]) > 0
    plain = next(r for r in rows if r["config"]["method"] == "is")["result"]
    for local, log_ml in zip(plain["local"], plain["log_ml"], strict=True):
        assert float(local) <= float(log_ml) + 1e-9  # Jensen's inequality
    assert "look-ahead" in written("bias", rows, tmp_path)


def test_boundary(tmp_path):
    rows = rows_of("boundary", {}, lambda c: c["text"].startswith("An apple"))
    r = rows[0]["result"]
    inside = [x for x, i in zip(r["tokens"]["excess"], r["inside"], strict=True) if i]
    assert sum(map(float, inside)) / len(inside) > 1  # bits: cut tokens mislead
    assert max(map(float, r["beam"]["jsd"])) < 0.01
    assert "token healing" in written("boundary", rows, tmp_path)


def test_constraints(tmp_path):
    small = {"lm_rows": 10, "reference": 30, "particles": 3}
    rows = rows_of("constraints", small, lambda c: c["case"] == "date")
    assert {r["config"]["method"] for r in rows} == set(EXPERIMENTS_METHODS)
    for row in rows:
        r = row["result"]
        assert r["lm_rows"] >= 10 and 0 <= r["distance"] <= 1
        if row["config"]["method"] not in ("auto", "exact"):  # they have dead particles, or no text
            assert r["success"] == 1.0  # nothing but dates can be drawn
    written("constraints", rows, tmp_path)


async def test_peers_are_given_rows_as_wide_as_the_vocabulary():
    """genlm-bytes refuses the rows of a padded head."""
    lm = ToyLM(pad=3)
    peer = PeerEngine(as_engine(lm))
    row = await peer.next_token_logprobs([0, 1])
    assert peer.seen == {(0, 1)}
    want = torch.log_softmax(lm.row((0, 1))[:-3], dim=0)
    torch.testing.assert_close(row.double(), want)


EXPERIMENTS_METHODS = (
    "local", "smc", "lookahead", "pilot", "auto", "exact", "bytellm", "awrs",
)  # fmt: skip


def test_scaling(tmp_path):
    rows = rows_of("scaling", {"steps": 3}, lambda c: c[c["axis"]] in (1, 512))
    for row in rows:
        assert row["run"]["times"]["step_ms"] > 0
        assert row["result"]["texts_a_step"] >= 1
    more = [{**r, "config": {**r["config"], r["config"]["axis"]: 1024}} for r in rows]
    assert "vocabulary" in written("scaling", [*rows, *more], tmp_path)


def study_rows(sd):
    """Rows of a study with an exact truth, whose runs scatter by known amounts."""
    target = {"prompt": "p", "kind": "regex", "source": "a|b", "max_bytes": 9}
    curve = [
        {"K": 1, "threshold": 0.01, "prune": "topk", "excess": 0.1, "bound": 0.2, "rows": 0.5},
        {"K": 3, "threshold": 0.001, "prune": "topk", "excess": 0.001, "bound": 0.002, "rows": 1.0},
    ]
    common = {"target": target, "tolerance": 0.01}
    rows = [
        ({"part": "beam", **common}, {"texts": ["a", "b", "c"], "curve": curve}),
        (
            {"part": "enumerate", **common},
            {"log_truth": -5.0, "log_unsure": -50.0, "texts": 2},
        ),
    ]
    for method, scatter in sd.items():
        for prune in ("topk", "unbiased"):
            how = {"part": "runs", "method": method, "prune": prune, "K": 5, "particles": 16}
            wide = scatter * (1.5 if prune == "unbiased" else 1.0)
            logs = [-5.0 + wide * s for s in (-1, 1, -0.5, 0.5)] * 3
            found = {"log_ml": logs, "local": logs, "ess": [8.0] * 12, "lm_rows": [100] * 12}
            rows.append(({**how, **common}, found))
    return [{"config": c, "result": r} for c, r in rows]


def test_the_recommendation_is_the_cheapest_that_meets_the_error():
    advice = recommend(study_rows({"is": 0.8, "smc": 0.2}), error=0.3)
    assert (advice.K, advice.threshold) == (3, 0.001)
    assert (advice.prune, advice.proposal, advice.ess) == ("topk", "target", 0.5)
    assert advice.particles < 16 and advice.error <= 0.31
    advice = recommend(study_rows({"is": 0.1, "smc": 0.5}), error=0.3)
    assert advice.ess == 0.0
    advice = recommend(study_rows({"smc": 0.5, "lookahead": 0.2}), error=0.1)
    assert advice.proposal == "lookahead" and advice.particles > 16
    assert len(advice.reasons) >= 4


def test_a_pooled_truth_is_that_of_the_method_that_found_most():
    pool = {
        method: {"config": {"part": "pool", "method": method, "particles": 64}, "result": r}
        for method, r in {
            "is": {"log_ml": [-5.0, -5.2, -4.8, "-inf"]},
            "smc": {"log_ml": [-8.0, -8.0, -8.0, -8.0]},
        }.items()
    }
    truth = truth_of(list(pool.values()))
    values = [math.exp(x) for x in (-5.0, -5.2, -4.8)] + [0.0]
    mean = sum(values) / 4
    assert truth.log_ml == pytest.approx(math.log(mean)) and not truth.exact
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert truth.error == pytest.approx(spread / mean)
    dead = [{**pool["is"], "result": {"log_ml": ["-inf"] * 4}}]
    with pytest.raises(ExperimentError, match="every particle of every pooled run died"):
        truth_of(dead)


def test_nothing_missing_of_an_enumerated_truth_is_an_error_of_zero():
    """A row's minus infinity is text in its file: of a model whose beams dropped nothing, and
    of one that excludes every text."""
    rows = study_rows({"is": 0.8, "smc": 0.2})
    rows[1]["result"]["log_unsure"] = "-inf"
    assert truth_of(rows).error == 0
    assert recommend(rows, error=0.3).prune == "topk"
    rows[1]["result"]["log_truth"] = "-inf"
    with pytest.raises(ExperimentError, match=r"each of the 2 texts .* probability zero"):
        truth_of(rows)


def test_runs_that_all_find_the_same_can_be_compared():
    """As they do where the texts of a constraint differ early."""
    rows = study_rows({"is": 0.0, "smc": 0.0})
    advice = recommend(rows, error=0.3)
    assert advice.particles == 1 and advice.error == 0
    assert {e["worth"] for e in summarise(rows[2:], -5.0) if e["method"] == "smc"} == {math.inf}


def test_methods_whose_runs_all_died_are_not_recommended():
    rows = study_rows({"is": 0.8, "smc": 4.0})
    for row in rows:
        if row["config"].get("method") == "is":
            row["result"] |= {"log_ml": ["-inf"] * 12, "local": ["-inf"] * 12}
    assert recommend(rows, error=0.3).ess == 0.5
    for row in rows:
        if row["config"]["part"] == "runs":
            row["result"] |= {"log_ml": ["-inf"] * 12, "local": ["-inf"] * 12}
    with pytest.raises(ExperimentError, match="every run of every setting died"):
        recommend(rows, error=0.3)


def test_commands_say_what_is_wrong(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    cases = [
        (["experiment", "bais", *out], "known: approximation, bias, boundary"),
        (["study", *out], "one constraint is due"),
        (["study", "--regex", "a", "--grammar", "b", *out], "got --regex and --grammar"),
        (["study", "--regex", "(", *out], "error: --regex '(': the pattern"),
        (["study", "--regex", "a", "--error", "0", *out], "--error must be above 0"),
        (["study", "--regex", "a", "--tolerance", "-1", *out], "--tolerance must be above 0"),
        (["study", "--grammar", str(tmp_path / "none"), *out], "cannot read"),
        (["experiment", "scaling", "--device", "abacus", *out], "unknown device 'abacus'"),
        (["study", "--regex", "a", "--device", "abacus", *out], "unknown device 'abacus'"),
    ]
    for arguments, message in cases:
        assert main(arguments) in (1, 2)
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_commands_that_are_suggested_name_the_model_as_it_was_named():
    """`--trust-remote-code` was left out, and the command then refused the model."""
    assert StudyOptions(out="o").words() == []
    given = {"model": "a/b", "device": "cpu", "trust_remote_code": True}
    options = StudyOptions(out="o", prompt="P ", regex="a|b", **given)
    named = ["--model", "a/b", "--device", "cpu", "--trust-remote-code"]
    assert options.words() == named
    advice = Advice(5, 0.01, "topk", 8, 0.5, "target", 0.1, 10.0, ())
    told = shlex.split(suggestion(options, advice, "--regex", "a|b"))
    assert told[:5] == ["genlm-bytes-smc", "generate", "P ", "--regex", "a|b"]
    assert told[5:10] == named


@pytest.mark.slow
def test_a_study_of_a_finite_constraint(tmp_path, capsys):
    arguments = ["study", "--prompt", "The cat", "--regex", " (sat|ran)\\.", "--max-bytes", "8"]
    arguments += ["--out", str(tmp_path), "--quick", "--workers", "0", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] and found["log_ml"] < 0
    assert set(found["recommended"]) == {"K", "threshold", "prune", "particles", "ess", "proposal"}
    assert (tmp_path / "report.html").exists() and len(found["reasons"]) >= 4
    assert main(arguments) == 0  # nothing is done again
    assert json.loads(capsys.readouterr().out)["ran"] == 0


def test_studies_of_a_real_model_are_smaller_and_read_texts_of_their_own():
    """A row of a real model is dear: fewer jobs, narrower references that the jobs name."""
    real = {"name": "smollm2"}
    kinds = real_texts()
    assert list(kinds) == ["prose", "code", "french", "german", "chinese", "json"]
    assert all(len(texts) >= 4 for texts in kinds.values())
    for name in ("approximation", "bias", "boundary", "constraints"):
        few, many = (EXPERIMENTS[name].jobs(False, m) for m in (real, TINY))
        assert 0 < len(few) < len(many)
    for name in ("approximation", "boundary"):
        for config in EXPERIMENTS[name].jobs(False, real):
            assert config["reference"] == 20
    [german] = [t for t in kinds["german"] if b"beschlossen" in t]
    read = [c["text"] for c in EXPERIMENTS["boundary"].jobs(False, real)]
    assert german[:96].decode("utf-8", "ignore") in read


def test_a_study_reads_with_the_reference_that_its_job_names(tmp_path):
    rows = rows_of("boundary", {"reference": 9}, lambda c: c["text"].startswith("An apple"))
    assert "K=9;" in written("boundary", rows, tmp_path)
