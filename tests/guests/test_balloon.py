"""`examples/balloon.py`: a device of a type that vq does not ship, under Linux and others."""

from __future__ import annotations

import importlib
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vq.errors import CaptureError
from vq.recording import Kind, Recorder, RecordingReader
from vq.testing.guest import Guest, UmlGuest
from vq.testing.hostile import hostile_driver_battery
from vq.testing.requirements import or_skip
from vq.testing.served import ServedGuest, ServeProcess
from vq.testing.wiring import Wired, wire

from .conftest import wait_until

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
balloon: Any = importlib.import_module("balloon")

INFLATE, DEFLATE, STATISTICS = range(3)
PAGES = 32 << 20 >> 12
"""Of 32 MiB."""
FREE_MEMORY = 4
"""VIRTIO_BALLOON_S_MEMFREE (virtio 1.3, 5.5.6.4)."""


def numbers(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def exercise(wired: Wired) -> None:
    device: Any = wired.device
    start = wired.driver.allocator.allocate(2 * balloon.PAGE, align=balloon.PAGE)
    first, second = start // balloon.PAGE, start // balloon.PAGE + 1
    wired.memory.write(start, b"secret")
    wired.memory.write(start + 2 * balloon.PAGE - 6, b"secret")
    wired.request(INFLATE, numbers(first, second))
    assert {first, second} <= device.lent
    if balloon.mmap.PAGESIZE == balloon.PAGE:
        assert not any(wired.memory.read(start, 2 * balloon.PAGE))  # freed, all of it
    wired.request(DEFLATE, numbers(first))
    assert first not in device.lent
    wired.driver.allocator.free(start)


test_hostile_drivers = hostile_driver_battery(balloon.Balloon, exercise)


def test_pages_are_lent_and_taken_back(vq_wire: Callable[..., Wired], vq_via: str) -> None:
    device = balloon.Balloon()
    wired = vq_wire(device, vq_via)
    wired.driver.probe()
    exercise(wired)
    assert device.stats["freed"] == 2
    device.set_target(3)
    wired.turn()
    assert wired.driver.config_changes == 1
    assert wired.driver.read_config(0, 8) == struct.pack("<II", 768, 0)
    wired.driver.write_config(4, struct.pack("<I", 2))
    wired.turn()
    assert device.config.actual == 2


def test_a_page_that_is_no_memory_is_the_drivers_fault(vq_wire: Callable[..., Wired]) -> None:
    wired = vq_wire(balloon.Balloon())
    wired.driver.probe()
    with pytest.raises(Exception, match=r"page 0xfffff is no memory \(virtio 1\.3, 5\.5\.6\)"):
        wired.request(INFLATE, numbers(0xFFFFF))


def test_a_session_is_replayed_with_what_the_host_did(
    tmp_path: Path, vq_replay: Callable[..., None]
) -> None:
    device = balloon.Balloon()
    with Recorder(device, tmp_path / "balloon.vqrec"), wire(device) as wired:
        wired.driver.probe()
        exercise(wired)
        device.set_target(mebibytes=4)
        assert wired.driver.read_config(0, 4) == struct.pack("<I", 1024)
    vq_replay(tmp_path / "balloon.vqrec", balloon.Balloon())

    class Lazy(balloon.Balloon):  # type: ignore[misc, name-defined]
        def set_target(self, mebibytes: int) -> None:
            """Does nothing."""

    with pytest.raises(AssertionError, match="the driver is not told of a change"):
        vq_replay(tmp_path / "balloon.vqrec", Lazy())

    class Older(balloon.Balloon):  # type: ignore[misc, name-defined]
        host_methods = ()

    with pytest.raises(CaptureError, match="set_target, which is none of Older's host_methods"):
        vq_replay(tmp_path / "balloon.vqrec", Older())


def test_linux_lends_its_memory_and_the_host_frees_it(vq_guest: Callable[..., ServedGuest]) -> None:
    device = balloon.Balloon()
    guest = vq_guest(device)
    free_before = free_memory(guest)
    # The guest's page cache and kernel are on the host; make it have touched what it will lend.
    guest.output("dd if=/dev/zero of=/tmp/big bs=1M count=48 && rm /tmp/big")
    wait_until(lambda: device.memory_statistics.get(FREE_MEMORY, 0) > 0, "statistics")
    blocks_before = guest.call(lambda: host_blocks(device))
    guest.call(lambda: device.set_target(32))
    wait_until(lambda: device.config.actual == PAGES, "the guest has lent 32 MiB")
    assert len(device.lent) == PAGES
    assert free_before - free_memory(guest) > 30 << 10
    if device.stats["freed"]:  # where the file system of the guest's memory can do that
        assert blocks_before - guest.call(lambda: host_blocks(device)) > 24 << 11
    guest.call(lambda: device.set_target(0))
    wait_until(lambda: device.config.actual == 0 and not device.lent, "it has all back")
    assert guest.output("dd if=/dev/zero of=/tmp/big bs=1M count=48 2>&1 && echo fine")


def test_a_session_of_linux_is_replayed_with_its_timer(
    tmp_path: Path, vq_guest: Callable[..., ServedGuest], vq_replay: Callable[..., None]
) -> None:
    path = tmp_path / "balloon.vqrec"
    device = balloon.Balloon()
    with Recorder(device, path) as recorder:
        guest = vq_guest(device)
        wait_until(lambda: device.memory_statistics.get(FREE_MEMORY, 0) > 0, "statistics")
        guest.call(lambda: device.set_target(4))
        wait_until(lambda: device.config.actual == PAGES // 8, "the guest has lent 4 MiB")
        for _ in range(2):
            device.memory_statistics = {}
            wait_until(lambda: device.memory_statistics, "statistics once more")
        guest.call(recorder.close)
    rings = [event for event in RecordingReader(path) if event.kind is Kind.ALARM]
    assert len(rings) >= 2
    vq_replay(path, balloon.Balloon())

    class Incurious(balloon.Balloon):  # type: ignore[misc, name-defined]
        def _ask_for_statistics(self) -> None:
            """Keeps the buffer for good."""

    with pytest.raises(AssertionError, match=r"statistics: the chain at .* is not given back"):
        vq_replay(path, Incurious())


def free_memory(guest: Guest) -> int:
    """In KiB."""
    return int(guest.output("awk '/MemFree/ {print $2}' /proc/meminfo"))


def host_blocks(device: Any) -> int:
    """Blocks of 512 bytes that the guest's memory takes on the host."""
    return sum(os.fstat(region.fd).st_blocks for region in device.memory.regions)


def test_it_is_served_confined_and_told_its_target_by_a_fifo(
    vq_serve: Callable[..., ServeProcess],
    vq_replay: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXAMPLES)
    control = tmp_path / "control"
    recording = tmp_path / "balloon.vqrec"
    options = ("--with", f"control={control}", "--record", str(recording))
    served = vq_serve("balloon:Balloon", *options)
    assert stat.S_ISFIFO(control.stat().st_mode)
    with or_skip(), UmlGuest([(served.sockets[0], 5)]) as guest:
        before = free_memory(guest)
        control.write_text("16\n")
        wait_until(lambda: before - free_memory(guest) > 14 << 10, "16 MiB less")
        control.write_text("nonsense\n")
        control.write_text("0\n")
        wait_until(lambda: before - free_memory(guest) < 2 << 10, "all back")
        assert guest.complaints() == []
    assert "ERROR" not in served.log() and "WARNING" not in served.log()
    done = [(b"set_target", b"[16]"), (b"set_target", b"[0]")]
    wait_until(lambda: host_did(recording) == done, "all of it in the file")
    served.close()
    vq_replay(recording, balloon.Balloon())


def host_did(recording: Path) -> list[tuple[bytes, ...]]:
    return [event.strings for event in RecordingReader(recording) if event.kind is Kind.HOST]


def test_a_fifo_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("somebody's")
    with pytest.raises(FileExistsError):
        balloon.Balloon(str(tmp_path / "control"))
