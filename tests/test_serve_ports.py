"""``vq serve console`` and ``vq serve vsock`` as programs: their options, words and traces."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vq import cli

SECONDS = 30


class Program:
    """``vq serve`` with these words, started; `line` is the first thing that it prints."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vq", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            assert time.monotonic() < deadline and self.process.poll() is None, path
            time.sleep(0.01)

    def end(self) -> str:
        """Ends it; returns its log."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=SECONDS)
        return log


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        if program.process.poll() is None:
            program.process.kill()
        program.process.communicate(timeout=SECONDS)


def start(programs: list[Program], *words: str) -> Program:
    programs.append(Program(*words))
    return programs[-1]


def test_the_terminals_place_is_printed_and_the_link_leads_to_it(
    tmp_path: Path, programs: list[Program]
) -> None:
    link = tmp_path / "con"
    program = start(
        programs, "console", f"--socket={tmp_path}/s", "--pty", "--link", str(link), "--port=a=pty"
    )
    name, path = program.line().split()
    assert name == "console0:" and path == os.readlink(link)
    with open(path, "rb+", buffering=0) as terminal:
        assert os.isatty(terminal.fileno())
    assert program.line().startswith("a: /dev/")
    program.wait_for(tmp_path / "s")
    assert "Traceback" not in program.end()
    assert program.process.returncode == 0
    assert not link.is_symlink() and not (tmp_path / "s").exists()


def test_programs_get_the_terminals_place_as_json(tmp_path: Path, programs: list[Program]) -> None:
    program = start(programs, "console", f"--socket={tmp_path}/s", "--pty", "--stats=json")
    places = json.loads(program.line())["terminals"]
    assert list(places) == ["console0"] and places["console0"].startswith("/dev/")


def test_sockets_are_there_while_it_serves_and_gone_afterwards(
    tmp_path: Path, programs: list[Program]
) -> None:
    program = start(
        programs,
        *("console", f"--socket={tmp_path}/s", f"--unix={tmp_path}/c"),
        *(f"--console=unix:{tmp_path}/c1", f"--port=p=unix:{tmp_path}/p"),
    )
    for name in ("s", "c", "c1", "p"):
        program.wait_for(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "p"))
    program.end()
    assert list(tmp_path.iterdir()) == []


def test_vsock_listens_for_programs_of_the_host(tmp_path: Path, programs: list[Program]) -> None:
    program = start(programs, "vsock", f"--socket={tmp_path}/s", "--cid=3", f"--uds={tmp_path}/u")
    program.wait_for(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(tmp_path / "u"))
        client.sendall(b"HELLO\n")
        assert client.recv(10) == b""
    program.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("console", "one of the arguments --pty --unix --file is required"),
        ("console --pty --unix c", "not allowed with argument --pty"),
        ("console --unix c --link l", "--link goes with --pty"),
        ("console --pty --port a", "--port takes NAME=END"),
        ("console --pty --port a=tcp:1", "an end is pty"),
        ("console --pty --port a=pty --port a=pty", "two ports have the same name"),
        ("console --unix file", "file is there already, and is not a socket"),
        ("console --pty --link file", "file is there already, and is not a symbolic link"),
        ("console --file .", "Is a directory"),
        ("console --unix no/where", "the directory of the socket no/where does not exist"),
        ("vsock --uds u", "the following arguments are required: --cid"),
        ("vsock --cid 2 --uds u", "a guest cannot have the CID 2"),
        ("vsock --cid 3 --uds file", "file is there already, and is not a socket"),
        ("vsock --cid 3 --uds u --connections 0", "not a whole number above 0"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(
    words: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    gc.collect()  # what earlier tests left to it is not counted
    before = len(os.listdir("/dev/fd"))
    try:
        status = cli.main(["serve", *words.split(), "--socket", "s"])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr().err
    assert status in (1, 2) and complaint in said and "Traceback" not in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("kind", ["console", "vsock"])
def test_managers_are_told_what_kind_of_device_it_is(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", kind, "--print-capabilities"])
    assert not end.value.code and json.loads(capsys.readouterr().out) == {"type": kind}
