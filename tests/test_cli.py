"""The command line: what it prints, where, and with which status it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import pytest
from net_frames import make_frame, make_payload

from vq import loopback
from vq.cli import COMMANDS, main
from vq.errors import DriverError, VqError
from vq.pcap import PcapWriter, open_writer, read_frames

SAMPLE = Path(str(resources.files("vq") / "data" / "sample.pcapng"))
KEYS = {
    "frames",
    "bytes",
    "mismatched",
    "seconds",
    "frames_per_second",
    "bits_per_second",
    "features",
}


class Ended:
    """How a command in this process ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


Run: TypeAlias = Callable[..., Ended]


@pytest.fixture
def vq(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*words: str) -> Ended:
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as end:  # argparse
            status = end.code if isinstance(end.code, int) else 1
        return Ended(status, *capsys.readouterr())

    return run


def command(*words: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    return [sys.executable, "-m", "vq", *words]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "in.pcap"
    with PcapWriter(path) as writer:
        for number in range(10):
            writer.write(make_frame(make_payload(50 * number)), timestamp_ns=number)
    return path


def assert_refused(ended: Ended, *words: str) -> None:
    """Status 2, nothing on standard output, one sentence on standard error."""
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("vq")
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n")
    assert "Traceback" not in ended.err and "Error" not in ended.err
    for word in words:
        assert word in ended.err


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(vq: Run, name: str) -> None:
    ended = vq(name, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: vq {name}")


def test_the_help_names_every_command(vq: Run) -> None:
    ended = vq("--help")
    assert (ended.status, ended.err) == (0, "")
    for name, (_, summary) in COMMANDS.items():
        assert name in ended.out
        assert summary.split(",")[0] in " ".join(ended.out.split())


def test_the_module_is_the_command() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vq ")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nosuch",),
        ("loopback", "extra"),
        ("loopback", "--nosuch"),
        ("loopback", "--features"),
        ("loopback", "--features", "--json"),
        ("loopback", "--pcap"),
        ("loopback", "--count", "0"),
        ("loopback", "--count", "-1"),
        ("loopback", "--count", "1.5"),
        ("loopback", "--count", "many"),
        ("loopback", "--queue-size", "0"),
        ("loopback", "--queue-size", "3"),
        ("loopback", "--queue-size", "65536"),
        ("loopback", "--queue-size", "-2"),
        ("loopback", "--queue-size", "big"),
        ("loopback", "--features", "-NOSUCH"),
        ("loopback", "--features", "CSUM"),
        ("loopback", "--features", "+RSS"),
        ("loopback", "--features", "-VERSION_1"),
        ("loopback", "--features", "+CSUM,-"),
        ("loopback", "--features", "+CSUM -TSO4"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(vq: Run, words: Sequence[str]) -> None:
    assert_refused(vq(*words))
    if words[:1] == ("loopback",) and words[-1] not in ("--features", "--pcap"):
        assert_refused(vq(words[0], "--json", *words[1:]))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VqError("it is broken"), 1),
        (DriverError("it is broken"), 1),
        (OSError(28, "No space left on device", "there"), 2),
        (PermissionError(13, "Permission denied", "there"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_a_status_and_no_traceback(
    vq: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr(loopback, "run", run)
    ended = vq("loopback")
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.count("\n") == (status != 130)


# --- vq loopback: what it says --------------------------------------------------------------------


def test_the_report_says_what_happened(vq: Run) -> None:
    ended = vq("loopback")
    assert (ended.status, ended.err) == (0, "")
    frames = len(list(read_frames(SAMPLE)))
    for words in ("CSUM", "EVENT_IDX", f"{frames} frames", "bytes", "a second", "every frame"):
        assert words in ended.out


def test_json_is_one_object_and_nothing_else(capture: Path) -> None:
    words = command("loopback", "--json", "--pcap", capture, "--features", "-CSUM,-MRG_RXBUF")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert report["frames"] == 10
    assert report["bytes"] == sum(len(frame.data) for frame in read_frames(capture))
    assert report["mismatched"] == 0
    assert report["frames_per_second"] * report["seconds"] == pytest.approx(10)
    assert report["bits_per_second"] * report["seconds"] == pytest.approx(8 * report["bytes"])
    assert not {"CSUM", "MRG_RXBUF", "HOST_TSO4"} & set(report["features"])
    assert {"GUEST_CSUM", "EVENT_IDX", "INDIRECT_DESC"} <= set(report["features"])


@pytest.mark.parametrize("count", [1, 9, 10, 11, 35])
def test_count_goes_round_the_capture(vq: Run, capture: Path, tmp_path: Path, count: int) -> None:
    kept = tmp_path / "kept.pcapng"
    ended = vq(
        *("loopback", "--json", "--pcap", str(capture)),
        *("--count", str(count), "--write", str(kept)),
    )
    assert ended.status == 0
    assert json.loads(ended.out)["frames"] == count
    whole = [frame.data for frame in read_frames(capture)]
    assert [frame.data for frame in read_frames(kept)] == [whole[n % 10] for n in range(count)]


def test_a_capture_without_frames_is_no_fault(vq: Run, tmp_path: Path) -> None:
    path = tmp_path / "none.pcap"
    with open_writer(path):
        pass
    ended = vq("loopback", "--json", "--count", "5", "--pcap", str(path))
    assert (ended.status, json.loads(ended.out)["frames"]) == (0, 0)
    assert vq("loopback", "--pcap", str(path)).status == 0


def test_a_pipe_is_read_once(capture: Path) -> None:
    words = command("loopback", "--json", "--pcap", "/dev/stdin", "--count", "25")
    done = subprocess.run(words, input=capture.read_bytes(), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["frames"] == 25


def test_a_mismatch_is_status_1(vq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vq.link.QueuePort.write_burst", lambda _, frames: len(frames))  # lost
    ended = vq("loopback", "--count", "50")
    assert (ended.status, ended.err) == (1, "")
    assert "mismatch " in ended.out
    assert "every frame" not in ended.out
    ended = vq("loopback", "--json", "--count", "50")
    assert (ended.status, ended.err) == (1, "")
    assert json.loads(ended.out)["mismatched"] > 0


def test_options_before_the_device_are_told_where_they_belong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--socket", "s", "rng"]) == 2
    assert capsys.readouterr().err == (
        "vq serve: the device stands before its options: vq serve DEVICE --socket ...\n"
    )


@pytest.mark.parametrize("words", [("--features", "-CSUM"), ("--features=-CSUM",)])
def test_a_list_of_features_may_start_with_a_minus(vq: Run, words: Sequence[str]) -> None:
    ended = vq("loopback", "--json", "--count", "1", *words)
    assert ended.status == 0
    assert "CSUM" not in json.loads(ended.out)["features"]


def test_an_option_is_no_list_of_features(vq: Run) -> None:
    assert_refused(vq("loopback", "--features", "--json"), "--features: expected one argument")


def test_a_file_s_name_may_be_any_bytes(tmp_path: Path, capture: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xff.pcap")
    try:
        path.write_bytes(capture.read_bytes())
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    done = subprocess.run(command("loopback", "--pcap", path), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


# --- vq loopback: what it refuses -----------------------------------------------------------------


def bad_captures(capture: bytes) -> dict[str, tuple[bytes, str]]:
    header, link = capture[:20], struct.pack("<I", 1)
    ethernet = SAMPLE.read_bytes()
    return {
        "cut in a record": (capture[:-1], "cut short"),
        "cut in a record's header": (capture[:30], "cut short"),
        "cut in the file's header": (capture[:10], "cut short"),
        "pcapng cut short": (ethernet[: len(ethernet) // 2 + 1], "cut short"),
        "empty": (b"", "empty"),
        "no capture": (b"From: someone\n", "not a pcap"),
        "compressed": (b"\x1f\x8b\x08\0" + bytes(30), "gzip"),
        "no Ethernet": (header + struct.pack("<I", 113) + capture[24:], "Ethernet"),
        "absurd": (header + link + struct.pack("<IIII", 0, 0, 1 << 31, 1 << 31), "claims"),
        "absurd later": (capture + struct.pack("<IIII", 0, 0, 262145, 9), "claims"),
    }


@pytest.mark.parametrize("kind", bad_captures(bytes(64)))
@pytest.mark.parametrize("options", [(), ("--json",), ("--count", "1")])
def test_bad_captures_are_refused_before_anything_is_sent(
    vq: Run, tmp_path: Path, capture: Path, kind: str, options: Sequence[str]
) -> None:
    content, reason = bad_captures(capture.read_bytes())[kind]
    path, kept = tmp_path / "bad.pcap", tmp_path / "kept.pcap"
    path.write_bytes(content)
    kept.write_bytes(b"precious")
    ended = vq("loopback", "--pcap", str(path), "--write", str(kept), *options)
    assert_refused(ended, str(path), reason)
    assert kept.read_bytes() == b"precious"


@pytest.mark.parametrize("option", ["--pcap", "--write"])
def test_files_that_cannot_be_used_are_refused(vq: Run, tmp_path: Path, option: str) -> None:
    for path in (tmp_path, tmp_path / "missing" / "file.pcap", SAMPLE / "file.pcap"):
        assert_refused(vq("loopback", option, str(path)), str(path))
        assert_refused(vq("loopback", "--json", option, str(path)), str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_refused(vq: Run, capture: Path) -> None:
    capture.chmod(0)
    assert_refused(vq("loopback", "--pcap", str(capture)), "Permission denied")
    assert_refused(vq("loopback", "--write", str(capture)), "Permission denied")


def test_the_capture_is_not_written_over(vq: Run, tmp_path: Path, capture: Path) -> None:
    before = capture.read_bytes()
    symbolic, hard = tmp_path / "symbolic.pcap", tmp_path / "hard.pcap"
    symbolic.symlink_to(capture)
    hard.hardlink_to(capture)
    for other in (capture, symbolic, hard):
        ended = vq("loopback", "--pcap", str(capture), "--write", str(other))
        assert_refused(ended, str(other))
    assert_refused(vq("loopback", "--write", str(SAMPLE)))
    assert capture.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(vq: Run) -> None:
    """The sentence did not say which file it was about."""
    assert_refused(vq("loopback", "--write", "/dev/full"), "/dev/full", "No space left")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("loopback"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert_refused(Ended(done.returncode, "", done.stderr), "No space left")


# --- vq loopback: how it ends ---------------------------------------------------------------------


def test_nobody_reading_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        done = subprocess.run(
            command("loopback"), stdout=closed, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_an_interrupt_ends_it_without_a_traceback(capture: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.pcap"
    words = command("loopback", "--pcap", capture, "--count", "100000000", "--write", kept)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 60
            while not (kept.exists() and kept.stat().st_size > 1000):  # frames are on their way
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (128 + signal.SIGINT, b"", b"")
    assert len(list(read_frames(kept))) > 10


def shown_on_a_terminal(count: str, until: bytes = b"") -> bytes:
    """What the command writes to standard error when that is a terminal.

    It is interrupted once it has written `until`.
    """
    master, slave = pty.openpty()
    words = command("loopback", "--json", "--count", count)
    shown = b""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=slave) as process:
        try:
            os.close(slave)
            while select.select([master], [], [], 60)[0]:
                try:
                    data = os.read(master, 4096)
                except OSError:  # Linux: nobody has the other end any more
                    break
                shown += data
                if not data:
                    break
                if until and until in shown:
                    until = b""
                    process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.kill()
            os.close(master)
    return shown


def test_a_progress_bar_is_drawn_on_a_terminal_when_it_takes_long() -> None:
    assert shown_on_a_terminal("1") == b""
    shown = shown_on_a_terminal("100000000", until=b" frames")
    assert b"\r[" in shown and b" frames" in shown
    assert shown.endswith(b"\r" + b" " * 60 + b"\r")  # taken away, interrupted or not
