"""`python -m vq.testing.uml`: a guest for somebody who wants to look at a device by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from vq.testing.guest import check_uml_drives
from vq.testing.requirements import or_skip
from vq.testing.served import ServeProcess
from vq.testing.uml import main


@pytest.fixture
def disk(vq_serve: Callable[..., ServeProcess], tmp_path: Path) -> str:
    with or_skip():
        check_uml_drives([2])
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    return vq_serve("blk", "--image", str(tmp_path / "image")).sockets[0]


def test_a_command_is_run_and_its_status_is_ours(
    disk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{disk}:2", "-c", "cat /sys/block/vda/size; exit 3", "--log"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("2048\n") and "Linux version" in out


def test_lines_of_standard_input_are_commands(
    disk: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("false\nls /dev/vda\n"))
    assert main([f"{disk}:2"]) == 0
    assert capsys.readouterr().out == "/dev/vda\n"


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("/nowhere/disk.sock:2", "there is no socket /nowhere/disk.sock: serve the device first"),
        ("/dev/null:2", "there is no socket /dev/null"),
        ("/nowhere/disk.sock", "is no SOCKET:TYPE"),
        ("disk.sock:blk", "is no SOCKET:TYPE"),
    ],
)
def test_what_is_no_device_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], device: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([device])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and complaint in err and err.count("\n") == 1


def test_a_type_without_a_driver_is_told(disk: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{disk}:4"]) == 2
    assert "no driver for devices of type 4" in capsys.readouterr().err
