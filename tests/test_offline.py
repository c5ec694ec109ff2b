"""In a test run no other machine can be reached, and nothing is served to one."""

import asyncio
import os
import socket
import subprocess
import sys
import urllib.request

import pytest

from genlm_bytes_smc.lm import load
from tests.offline.sitecustomize import ALLOWED, SocketOpenedError

FAR = "198.51.100.1"  # for documents: nobody has it


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection((FAR, 80), 1),
        lambda: socket.create_connection(("2001:db8::1", 80), 1),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.gethostbyname("huggingface.co"),
        lambda: urllib.request.urlopen(f"http://{FAR}/", timeout=1),
        lambda: asyncio.run(asyncio.open_connection(FAR, 80)),
        load._hub_in_reach,
    ],
)
def test_reaching_out_is_an_error(reach, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(SocketOpenedError, match="in a test run"):
        reach()


def test_offline_mode_looks_nothing_up(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not load._hub_in_reach()


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.bind(("0.0.0.0", 0)),
        lambda s: s.bind(("", 0)),
        lambda s: s.sendto(b"x", (FAR, 9)),
        lambda s: s.sendmsg([b"x"], [], 0, (FAR, 9)),
        lambda s: s.connect_ex((FAR, 9)),
    ],
)
def test_serving_and_sending_are_too(use):
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened,
        pytest.raises(SocketOpenedError, match="in a test run"),
    ):
        use(opened)


def test_this_machine_can_talk_to_itself(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), 5).close()
    one, other = socket.socketpair()
    with one, other:
        one.send(b"x")
        assert other.recv(1) == b"x"
    with socket.socket(socket.AF_UNIX) as named:
        named.bind(str(tmp_path / "socket"))
    socket.getaddrinfo(None, 0)


def test_processes_that_tests_start_are_held_to_it(monkeypatch):
    code = "import socket; socket.socket().bind(('0.0.0.0', 0))"

    def error():
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        return done.stderr

    assert "SocketOpenedError" in error()
    monkeypatch.setenv(ALLOWED, "1")
    assert error() == ""
