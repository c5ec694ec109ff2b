"""The command line: every command, its JSON, its errors and its exit codes."""

import asyncio
import base64
import importlib.util
import io
import json
import math
import re
import signal
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from rich.console import Console

from genlm_bytes_smc import BeamParams, ByteBeamState, Prompt, __version__, as_engine, load_model
from genlm_bytes_smc.cli import common, main, run
from genlm_bytes_smc.cli.options import Backend, BeamOptions
from genlm_bytes_smc.lm.load import BACKENDS
from genlm_bytes_smc.scoring import Reader, _cut
from tests.toys import Enumeration, ToyLM

APPLE = "An apple a day keeps the "
COMMANDS = ["demo", "next", "beam", "complete", "score", "info"]
EOS = b"<|endoftext|>"


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """The bundled model loaded once for all tests."""
    llm = load_model("tiny")
    given = common.load_model

    def cached(name, backend=None, **options):
        return llm if name == "tiny" and backend is None else given(name, backend, **options)

    common.load_model = cached
    yield llm
    common.load_model = given


@pytest.fixture
def tiny(_tiny):
    return _tiny


@pytest.fixture
def ask(capsysbinary):
    """Run the command line; exit code, stdout and stderr come back, the latter as text."""

    def ask(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return ask


@pytest.fixture
def ask_json(ask):
    def ask_json(*arguments):
        code, out, err = ask(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out, parse_constant=pytest.fail)

    return ask_json


@pytest.fixture
def stdin(monkeypatch):
    def feed(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return feed


async def beam_after(llm, prompt, **params):
    params = BeamParams(**{"K": 5, "prune_threshold": 0.001, "eos_byte_strings": [EOS]} | params)
    return await (await ByteBeamState.initial(llm, params)).prefill(prompt)


# -- help ------------------------------------------------------------------------------


def test_help_names_every_command(ask):
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = ask(*arguments)
        assert code == 0
        assert all(name in out.decode() for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(ask, command):
    code, out, _ = ask(command, "--help")
    text = out.decode()
    assert code == 0
    assert f"genlm-bytes-smc {command}" in text.split("Examples")[1]
    assert "--model" in text
    assert "--json" in text


def test_version(ask):
    assert ask("--version") == (0, f"genlm-bytes-smc {__version__}\n".encode(), "")


def test_options_offer_what_the_library_knows():
    assert set(get_args(Backend)) == set(BACKENDS)


# -- next and beam ---------------------------------------------------------------------


async def test_next_gives_the_row_of_the_beam(ask_json, tiny):
    found = await in_thread(ask_json, "next", APPLE, "--top", 4)
    beam = await beam_after(tiny, Prompt.text(APPLE))
    row = (await beam.lanes.logp_next())[0].numpy()
    assert set(found) == {"prompt", "log_z", "next"}
    assert found["prompt"] == APPLE
    assert found["log_z"] == pytest.approx(beam.logZ, abs=1e-4)
    assert [e["byte"] for e in found["next"]] == np.argsort(-row)[:4].tolist()
    for entry in found["next"]:
        assert set(entry) == {"symbol", "byte", "p", "logp"}
        assert entry["logp"] == pytest.approx(row[entry["byte"]], abs=1e-3)
        assert entry["p"] == pytest.approx(math.exp(entry["logp"]))


def test_next_shows_the_end_unless_told_not_to(ask_json):
    prompt = "4 plus 9 is 13."
    ends = [e for e in ask_json("next", prompt, "-n", 300)["next"] if e["byte"] is None]
    assert [e["symbol"] for e in ends] == ["<end>"]
    entries = ask_json("next", prompt, "-n", 300, "--no-eos")["next"]
    assert all(e["byte"] is not None for e in entries)
    assert sum(e["p"] for e in entries) == pytest.approx(1)


def test_next_is_plain_text_in_a_pipe(ask):
    code, out, err = ask("next", APPLE, "-n", 3)
    lines = out.decode().splitlines()
    assert (code, err, len(lines)) == (0, "", 4)
    assert lines[1].split()[0] == "d"
    assert b"\x1b" not in out


def test_json_stays_json_where_stdout_is_not_utf8(monkeypatch):
    """Escapes of Python's in place of what the stream cannot encode are no JSON."""
    for encoding in ("ascii", "latin-1", "utf-8"):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        assert main(["next", "Caf\xe9 🎉", "--json", "--top", "1"]) == 0
        sys.stdout.flush()
        assert json.loads(out.getvalue().decode(encoding))["prompt"] == "Caf\xe9 🎉"


def test_colours_on_request(ask, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for command in ("next", "beam"):
        assert b"\x1b[" in ask(command, APPLE)[1]


async def test_beam_gives_its_candidates(ask_json, tiny):
    found = await in_thread(ask_json, "beam", APPLE, "--threshold", 0, "-K", 3)
    beam = (await beam_after(tiny, Prompt.text(APPLE), K=3, prune_threshold=0.0)).prune()
    assert set(found) == {"prompt", "log_z", "log_dropped", "heals", "candidates"}
    assert len(found["candidates"]) == 3
    for shown, c in zip(found["candidates"], beam, strict=True):
        assert shown["logw"] == pytest.approx(c.logw, abs=1e-3)
        assert len(shown["tokens"]) == len(c.tokens)
        assert shown["partial"] == c.partial.decode().replace(" ", "␣")


def test_beam_prints_what_python_shows(ask):
    code, out, _ = ask("beam", APPLE)
    first, second, third = out.decode().splitlines()[:3]
    assert code == 0
    assert first.startswith("Z: -")
    assert second == "Candidates:"
    assert third.endswith("<|endoftext|>|An|␣apple|␣a|␣day|␣keeps|␣the|␣")


def test_special_tokens_are_text_unless_asked_for(ask_json):
    spelled = ask_json("beam", "<|endoftext|>The")["candidates"][0]["tokens"]
    meant = ask_json("beam", "<|endoftext|>The", "--special-tokens")["candidates"][0]["tokens"]
    assert spelled.count("<|endoftext|>") == 1  # the start
    assert meant.count("<|endoftext|>") == 2


def test_a_prompt_from_stdin_may_be_any_bytes(ask_json, stdin):
    stdin(b"caf\xc3")
    found = ask_json("next", "-", "-n", 1)
    assert found["prompt"] == "caf�"
    assert found["next"][0]["byte"] == 0xA9


def test_temperature_flattens_the_row(ask_json):
    warm = ask_json("next", APPLE, "--temperature", 3, "-n", 1)["next"][0]
    assert warm["p"] < ask_json("next", APPLE, "-n", 1)["next"][0]["p"]


# -- complete --------------------------------------------------------------------------


async def test_greedy_completion_is_that_of_the_library(ask, ask_json, tiny):
    beam = await beam_after(tiny, b"")
    expected = await beam.greedy(Prompt.text(APPLE), steps=12)
    arguments = ("complete", APPLE, "--greedy", "--steps", 12)
    assert await in_thread(ask, *arguments) == (0, expected, "")
    assert (await in_thread(ask, *arguments, "--no-echo"))[1] == expected[len(APPLE) :]
    found = await in_thread(ask_json, *arguments)
    assert base64.b64decode(found["completion_base64"]) == expected[len(APPLE) :]
    assert found["bytes"] == 12
    assert found["ended"] is False
    assert found["seed"] is None
    assert found["log_p"] < 0
    assert found["bytes_per_second"] == pytest.approx(12 / found["seconds"])


def test_a_seed_gives_the_same_completion_again(ask_json):
    arguments = ("complete", "Le caf\u00e9", "--steps", 30)
    first = ask_json(*arguments)
    again = ask_json(*arguments, "--seed", first["seed"])
    assert again["completion_base64"] == first["completion_base64"]
    assert ask_json(*arguments)["seed"] != first["seed"]


def test_no_steps_no_bytes(ask):
    assert ask("complete", "abc", "--steps", 0) == (0, b"abc", "")


def test_completion_stops_where_the_model_ends_the_text(ask_json, monkeypatch):
    toy = as_engine(ToyLM(sharpness=1.0))
    monkeypatch.setattr(common, "load_model", lambda *a, **k: toy)
    monkeypatch.setattr(common, "eos_spellings", lambda llm: {b"<e>"})
    found = ask_json("complete", "ab", "--steps", 1000, "--seed", 1, "--threshold", 0, "-K", 20)
    assert found["ended"] is True
    assert 0 < found["bytes"] < 1000
    oracle = Enumeration(toy.llm, frozenset({b"<e>"}))
    text = b"ab" + base64.b64decode(found["completion_base64"])
    if len(text) < 12:  # else the enumeration takes long
        expected = math.log(oracle.ended(text) / oracle.prefix(b"ab"))
        assert found["log_p"] == pytest.approx(expected, abs=0.2)


def test_unbiased_pruning_may_be_asked_for(ask_json):
    found = ask_json("complete", APPLE, "--prune", "unbiased", "-K", 2, "--steps", 5, "--greedy")
    assert found["completion"] == "docto"
    assert found["seed"] is not None


def terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        common, "console", lambda: Console(file=screen, force_terminal=True, soft_wrap=True,
                                           highlight=False, color_system=None),
    )  # fmt: skip
    return screen


def test_compilation_is_counted_on_a_line_of_a_terminal_only():
    import numba
    from numba.core import event

    def screen_after(hushed=False, **options):
        screen = io.StringIO()
        notice = common._Notice(Console(file=screen, color_system=None, width=99, **options))
        notice.hushed = hushed
        inner = numba.njit(lambda x: x + 1)
        with event.install_listener("numba:compile", notice):
            assert numba.njit(lambda x: inner(x))(1) == 2
            numba.njit(lambda x: x)(1)
        return screen.getvalue()

    seen = screen_after(force_terminal=True).split("\r\x1b[2K")
    told = [re.sub(", [0-9]+ s$", "", line) for line in seen]
    counts = ["1 functions", "2 functions", "", "3 functions", ""]  # the inner one within the other
    assert told == ["", *(n and f"{common.UNKEPT}: {n}" for n in counts)]
    assert screen_after(force_terminal=False) == ""
    assert screen_after(force_terminal=True, hushed=True) == ""


def test_half_characters_never_reach_a_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    stream = common.ByteStream()
    seen = []
    for byte in "é€🙂".encode():
        stream.write(bytes([byte]))
        seen.append(screen.getvalue())
    assert seen == ["", "é", "é", "é", "é€", "é€", "é€", "é€", "é€🙂"]
    stream.write(b"\xf0\x9f")
    stream.finish()
    assert screen.getvalue() == "é€🙂\N{REPLACEMENT CHARACTER}\n"


def test_a_terminal_is_not_sent_control_characters(monkeypatch):
    screen = terminal(monkeypatch)
    stream = common.ByteStream()
    stream.write(b"a\x1b[2Jb\x07\tc\n\x9b[bold]")
    assert "\x1b" not in screen.getvalue()
    assert "\x07" not in screen.getvalue()
    assert screen.getvalue().startswith("a\\x1b[2Jb\\x07")
    assert "[bold]" in screen.getvalue()


# -- score -----------------------------------------------------------------------------


async def test_score_is_the_prefix_probability(ask_json, ask, tmp_path, tiny):
    text = b"The quick brown fox jumps over the lazy dog.\n"
    path = tmp_path / "fox.txt"
    path.write_bytes(text)
    default = await in_thread(ask_json, "score", path)
    found = await in_thread(ask_json, "score", path, "--prune", "topk")
    beam = await beam_after(tiny, Prompt.text(text.decode()))
    assert default["log_p"] == pytest.approx(beam.logZ, abs=0.05)
    assert default["lm_forwards"] <= 6
    assert found["log_p"] == pytest.approx(beam.logZ, abs=1e-3)
    assert found["bits_per_byte"] == pytest.approx(-beam.logZ / math.log(2) / len(text), abs=1e-4)
    assert found["bytes"] == len(text)
    assert found["log_dropped"] == pytest.approx(beam.dropped, abs=0.1)
    assert found["stretches"] == 1
    assert found["bytes_reread"] == 0
    assert found["bytes_per_second"] > 0
    code, out, err = await in_thread(ask, "score", path)
    assert (code, err) == (0, "")
    assert out.decode().startswith(f"{default['bits_per_byte']:.4f} bits per byte\n")


@pytest.mark.parametrize("text", ["abcab", "bbacababc"])
async def test_score_agrees_with_enumeration(text):
    toy = ToyLM()
    beam = await ByteBeamState.initial(toy, BeamParams(K=None))
    reader = Reader(beam.lanes, lambda n: None)
    await reader.read(text.encode())
    assert reader.score().log_p == pytest.approx(math.log(Enumeration(toy).prefix(text.encode())))


@pytest.mark.parametrize("window", [3, 8, 20])
async def test_a_text_longer_than_the_window_is_read_in_stretches(window):
    toy = ToyLM()
    engine = as_engine(toy)
    engine.window = window
    beam = await ByteBeamState.initial(engine, BeamParams(K=4, prune_threshold=0.01))
    reader, seen = Reader(beam.lanes, lambda n: seen.append(n)), []
    text = b"abcabbacab" * 6
    await reader.read(text)
    score = reader.score()
    assert score.n_bytes == sum(seen) == len(text)
    assert score.stretches > 1
    assert 0 < score.bits_per_byte < 8
    assert max(map(len, toy.calls)) <= window
    if window == 20:
        assert score.reread > 0


async def test_a_stretch_counts_what_its_context_leaves_open():
    """Two stretches: log p of the first, and of the rest given the context that was read again."""
    toy = ToyLM()
    engine = as_engine(toy)
    engine.window = 12
    text = b"abcabbacabcaba"
    beam = await ByteBeamState.initial(engine, BeamParams(K=None))
    reader = Reader(beam.lanes, lambda n: None)
    await reader.read(text)
    score = reader.score()
    assert score.stretches == 2
    oracle = Enumeration(toy)

    def log(s):
        return math.log(oracle.prefix(s))

    totals = [
        log(text[:first])
        + log(text[first - score.reread :])
        - log(text[first - score.reread : first])
        for first in range(score.reread, len(text))
    ]
    assert min(abs(score.log_p - t) for t in totals) < 1e-6


def test_score_reads_bytes_that_are_no_text(ask_json, tmp_path, stdin):
    noise = bytes(range(128, 160)) + b"\x00\xff end"
    path = tmp_path / "noise.bin"
    path.write_bytes(noise)
    found = ask_json("score", path, "--threshold", 0.01)
    assert found["bytes"] == len(noise)
    assert found["bits_per_byte"] > 8
    stdin(noise)
    assert ask_json("score", "-", "--threshold", 0.01)["log_p"] == pytest.approx(found["log_p"])


def test_special_tokens_in_a_file(ask_json, tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("One. <|endoftext|>Two.")
    as_text = ask_json("score", path)
    as_tokens = ask_json("score", path, "--special-tokens")
    assert as_tokens["bytes"] == as_text["bytes"] == len(path.read_bytes())
    assert as_tokens["log_p"] > as_text["log_p"]


def test_where_a_stretch_is_cut():
    text = "naïve " * 20
    for most in range(1, 40):
        raw = text.encode()
        n = _cut(raw[: most + 1], most)
        assert 0 < n <= most
        if most > 3:
            raw[:n].decode()
    assert _cut(b"abc", 8) == 3
    assert _cut(b"x" * 9, 8) == 8


# -- info and demo ---------------------------------------------------------------------


def test_info(ask, ask_json):
    found = ask_json("info")
    assert found["vocabulary"] == 8192
    assert found["window_tokens"] == 2048
    assert found["end"] == ["<|endoftext|>"]
    assert found["tree_cache"] is True
    assert found["forward"] == "written out"
    assert found["forward_reason"].startswith("BundledGPT2 is known; weights p")
    assert (found["kernels"], found["row_dtype"]) == ("NumbaKernels", "float64")
    assert found["row_bytes"] >= 8 * 8192
    assert found["trie_nodes"] > 8192
    code, out, _ = ask("info")
    assert code == 0
    assert f"{found['trie_nodes']:,}" in out.decode()
    assert "written out" in out.decode()


def test_demo_shows_completion_beam_next_bytes_and_speed(ask, ask_json, monkeypatch):
    monkeypatch.setattr(run, "TIMED_BYTES", 8)
    code, out, err = ask("demo")
    text = out.decode()
    assert (code, err) == (0, "")
    assert text.startswith(APPLE + "doctor away")
    for part in ("Z: -", "Candidates:", "The next byte", "bytes/s"):
        assert part in text
    found = ask_json("demo", "The early bird ")
    assert found["completion"].startswith("catches")
    assert found["bytes_per_second_lanes"] > 0


def test_demo_keeps_within_a_short_window(ask_json, tiny, monkeypatch):
    """It draws more bytes than such a model can read, and ended in an error."""
    monkeypatch.setattr(tiny, "window", 40)
    assert ask_json("demo")["completion"].startswith("doctor")
    assert ask_json("demo", "a" * 39)["completion"] != ""


# -- errors ----------------------------------------------------------------------------

FAILED, USAGE = 1, 2


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nope"], USAGE, "No such command"),
        (["next"], USAGE, "Missing argument"),
        (["next", "x", "--frobnicate"], USAGE, "--frobnicate"),
        (["next", "x", "-K", "0"], USAGE, "--beam-width"),
        (["next", "x", "-K", "many"], USAGE, "--beam-width"),
        (["next", "x", "--threshold", "1"], USAGE, "--threshold must be in [0, 1)"),
        (["next", "x", "--threshold", "nan"], USAGE, "--threshold"),
        (["next", "x", "--temperature", "0"], USAGE, "--temperature must be positive"),
        (["next", "x", "--prune", "hard"], USAGE, "hard"),
        (["next", "x", "--backend", "frob"], USAGE, "frob"),
        (["next", "x", "--seed", "-1"], USAGE, "--seed"),
        (["next", "x", "--model", "./none", "--threshold", "1"], USAGE, "--threshold must be"),
        (["score", ".ci/run", "--model", "./none", "--temperature", "0"], USAGE, "--temperature"),
        (["complete", "x", "--steps", "-1"], USAGE, "--steps"),
        (["next", "x", "--backend", "vllm"], FAILED, 'pip install "genlm-bytes-smc[vllm]"'),
        (["next", "x", "--model", "./no-such-model"], FAILED, "no such model directory"),
        (["next", "x", "--model", "no/such-model"], FAILED, "no/such-model"),
        (["next", "x", "--model", "gpt0", "--device", "warp"], FAILED, "unknown device"),
        (["score", "no-such-file"], FAILED, "cannot read no-such-file: No such file"),
        (["score", "."], FAILED, "cannot read ."),
        (["beam", "x" * 2100, "-K", "1", "--threshold", "0.9"], FAILED, "window"),
    ],
)
def test_errors_are_one_line(ask, monkeypatch, arguments, code, told):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "vllm" in arguments and importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    found, out, err = ask(*arguments, "--json")
    assert (found, out) == (code, b""), err
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_empty_file_has_no_score(ask, tmp_path):
    path = tmp_path / "empty"
    path.touch()
    code, out, err = ask("score", path)
    assert (code, out) == (FAILED, b"")
    assert err == f"error: nothing to score: {path} is empty\n"


def test_special_tokens_need_text(ask, stdin):
    stdin(b"\xff")
    assert ask("next", "-", "--special-tokens") == (
        USAGE, b"", "error: --special-tokens needs UTF-8 text; the byte at 0 is not\n",
    )  # fmt: skip


def test_a_bug_is_named_in_one_line(ask, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("gone")

    monkeypatch.setattr(run, "open_model", broken)
    assert ask("next", "x") == (FAILED, b"", "error: KeyError: 'gone'\n")


def test_an_interrupt_leaves_a_clean_line(ask, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_model", interrupted)
    code, out, err = ask("next", "x")
    assert (code, out, err) == (130, b"", "\ninterrupted\n")


def test_an_interrupt_that_came_back_as_an_error_is_one(ask, monkeypatch):
    def interrupted(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise SystemError("compiled code returned with an exception set") from error

    monkeypatch.setattr(run, "open_model", interrupted)
    assert ask("next", "x") == (130, b"", "\ninterrupted\n")


def test_ctrl_c_while_bytes_come():
    command = [sys.executable, "-m", "genlm_bytes_smc", "complete", APPLE, "--no-eos"]
    command += ["--steps", "10000000", "--threshold", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(len(APPLE) + 5).startswith(APPLE.encode())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "interrupted"


def test_a_reader_that_leaves_early_is_no_error(ask, monkeypatch, capsysbinary):
    def broken(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main replaces it: put it back afterwards
    monkeypatch.setattr(run.ByteStream, "write", broken)
    assert main(["complete", "x"]) == FAILED
    sys.stdout.close()
    assert capsysbinary.readouterr() == (b"", b"")


# -- parts -----------------------------------------------------------------------------


def test_eos_spellings_of_tokenizer_and_generation(tiny):
    assert common.eos_spellings(tiny) == {EOS}
    assert common.eos_spellings(as_engine(ToyLM())) == set()


def test_bars():
    assert common.bar(1) == "█" * common.BAR_WIDTH
    assert common.bar(0) == ""
    assert common.bar(0.5) == "█" * (common.BAR_WIDTH // 2)
    assert common.bar(2) == common.bar(1)


def test_every_option_has_a_default():
    assert BeamOptions().model == "tiny"


async def in_thread(call, *arguments):
    """Run the command line beside the test's event loop (it starts one of its own)."""
    return await asyncio.to_thread(call, *arguments)
