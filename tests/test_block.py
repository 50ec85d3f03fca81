"""The block device before a scripted driver: every request, and every way to get one wrong."""

from __future__ import annotations

import errno
import functools
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from block_guest import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    SECURE_ERASE,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    BlockGuest,
    a_range,
)

from vq.abi import Feature, Status, feature_mask
from vq.abi_block import BLK_RANGE, BLK_REQUEST, BlkConfig, BlkFeature
from vq.devices import block
from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.testing.requirements import need_linux, need_program, need_root
from vq.vhost_user import unwatch_device, watch_device

MEGABYTE = 1 << 20
LAST = MEGABYTE // SECTOR
EVERYTHING = -1


@functools.cache
def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes of which no sector is like another."""
    return random.Random(seed).randbytes(length)


class Disk:
    """A device with an image of a megabyte, and a guest that has it."""

    def __init__(self, path: Path, features: int = EVERYTHING, **options: Any) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(pattern(MEGABYTE))
        image = {name: options.pop(name) for name in ("read_only", "direct") if name in options}
        self.image = Image(path, **image)
        self.device = BlockDevice(self.image, **options)
        self.memory = self.device.memory = GuestMemory.allocate(16 << 20)
        self.guest = BlockGuest(self.device, self.memory, wait=self.settle, features=features)

    def settle(self) -> None:
        assert self.device.settle(10)

    def close(self) -> None:
        self.device.close()
        self.memory.close()


MakeDisk = Callable[..., Disk]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[MakeDisk]:
    made: list[Disk] = []

    def make(*args: Any, **options: Any) -> Disk:
        made.append(Disk(tmp_path / "image", *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- layouts -------------------------------------------------------------------------------------


def test_the_layouts_are_the_specifications() -> None:
    """Golden bytes, virtio 1.3, 5.2.4 and 5.2.6."""
    config = BlkConfig(capacity=0x1122334455667788, seg_max=0x7E, blk_size=512, wce=1)
    config.num_queues, config.max_discard_sectors, config.write_zeroes_may_unmap = 0x203, 0xAABB, 1
    assert bytes(config).hex(" ", 4) == (
        "88776655 44332211 00000000 7e000000 00000000 00020000 00000000 00000000"
        " 01000302 bbaa0000 00000000 00000000 00000000 00000000 01000000 00000000"
        " 00000000 00000000"
    )
    assert BLK_REQUEST.pack(1, 2, 3).hex(" ", 4) == "01000000 02000000 03000000 00000000"
    assert BLK_RANGE.pack(1, 2, 3).hex(" ", 4) == "01000000 00000000 02000000 03000000"


def test_the_configuration_says_what_the_disk_is(disk: MakeDisk) -> None:
    guest = disk(queues=3, queue_size=64).guest
    assert guest.capacity == MEGABYTE // SECTOR
    assert guest.config(12, 4) == 62  # seg_max: header and status fit beside them
    assert guest.config(20, 4) == 512
    assert guest.config(34, 2) == 3  # num_queues
    assert guest.config(36, 4) > 0 and guest.config(40, 4) > 0  # what can be discarded
    assert guest.config(48, 4) > 0 and guest.config(52, 4) > 0  # what can be made zero


# --- what a guest asks for -----------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_what_was_written_is_read_and_stands_in_the_image(disk: MakeDisk, direct: bool) -> None:
    made = disk(direct=direct)
    data = pattern(8 * SECTOR, seed=5)
    made.guest.write(100, data)
    assert made.guest.read(99, 10) == (
        pattern(MEGABYTE)[99 * SECTOR : 100 * SECTOR]
        + data
        + pattern(MEGABYTE)[108 * SECTOR : 109 * SECTOR]
    )
    assert made.path.read_bytes()[100 * SECTOR : 108 * SECTOR] == data


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("readable_cuts", "writable_cuts"),
    [
        ((), ()),  # header and data in one buffer, data and status in one
        ((1, 2, 3, 10, 1, 511, 7), (1, 510, 2, 1)),
        ((15,), (1023,)),
        ([16] + [8] * 127, [8] * 128),
    ],
)
def test_the_framing_does_not_matter(
    disk: MakeDisk, direct: bool, readable_cuts: Sequence[int], writable_cuts: Sequence[int]
) -> None:
    """Virtio 1.3, 2.7.4.1."""
    guest = disk(direct=direct).guest
    data = pattern(1024, seed=9)
    guest.write(7, data, readable_cuts=readable_cuts)
    assert guest.read(7, 2, writable_cuts=writable_cuts) == data
    name = guest.ask(GET_ID, room=20, readable_cuts=(3, 5), writable_cuts=(1, 18))
    assert name == (OK, b"vq".ljust(20, b"\0"), 21)


def test_large_requests_go_to_threads_and_arrive(disk: MakeDisk) -> None:
    made = disk(queue_size=64)
    os.truncate(made.path, 4 * MEGABYTE)
    made.device.resize()
    data = pattern(3 * MEGABYTE, seed=3)
    made.guest.write(8, data)
    assert made.guest.read(8, len(data) // SECTOR) == data


def test_every_queue_serves(disk: MakeDisk) -> None:
    guest = disk(queues=3).guest
    for queue in range(3):
        guest.write(queue, pattern(SECTOR, seed=queue), queue=queue)
    for queue in range(3):
        assert guest.read(queue, 1, queue=2 - queue) == pattern(SECTOR, seed=queue)


def test_the_serial_number_is_cut_to_what_there_is_room_for(disk: MakeDisk) -> None:
    guest = disk(serial="a name that is too long for it").guest
    assert guest.ask(GET_ID, room=20).data == b"a name that is too l"
    assert guest.ask(GET_ID, room=4) == (OK, b"a na", 5)
    assert guest.ask(GET_ID, room=24).data == b"a name that is too l" + bytes(4)


def test_a_range_is_discarded_and_its_room_given_back(disk: MakeDisk) -> None:
    made = disk()
    if not made.image.deallocates:
        pytest.skip("this file system wants no holes")
    os.sync()
    before = made.path.stat().st_blocks
    ranges = a_range(0, 1024) + a_range(1024, 512)
    assert made.guest.ask(DISCARD, 0, ranges) == (OK, b"", 1)
    assert made.path.stat().st_blocks <= before - 1536
    assert made.path.stat().st_size == MEGABYTE
    data = made.path.read_bytes()
    assert data == bytes(1536 * SECTOR) + pattern(MEGABYTE)[1536 * SECTOR :]


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize("able", [True, False], ids=["fallocate", "written"])
@pytest.mark.parametrize("direct", [False, True])
def test_zeroes_are_written_whatever_the_file_system_can_do(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch, flags: int, able: bool, direct: bool
) -> None:
    if not able:

        def refuse(*_: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr("vq.devices.block_image._fallocate", refuse)
    made = disk(direct=direct)
    assert made.guest.ask(WRITE_ZEROES, 0, a_range(3, 1501, flags)) == (OK, b"", 1)
    expected = bytearray(pattern(MEGABYTE))
    expected[3 * SECTOR : 1504 * SECTOR] = bytes(1501 * SECTOR)
    assert made.path.read_bytes() == expected
    assert made.device.device_features >> BlkFeature.DISCARD & 1 == able
    assert made.guest.config(56, 1) == able  # write_zeroes_may_unmap


# --- requests that are not done ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sector", "sectors"),
    [
        (IN, LAST, 1),
        (IN, LAST - 1, 2),
        (OUT, LAST, 1),
        (OUT, LAST - 1, 2),
        (IN, 1 << 63, 1),
        (OUT, (1 << 64) - 1, 2),
        (OUT, (1 << 55) - 1, 1),  # sector times 512 is 2 to the 64th, less 512
    ],
)
def test_nothing_outside_of_the_image_is_read_or_written(
    disk: MakeDisk, kind: int, sector: int, sectors: int
) -> None:
    made = disk()
    size = sectors * SECTOR
    if kind == IN:
        assert made.guest.ask(IN, sector, room=size) == (IOERR, bytes(size), size + 1)
    else:
        assert made.guest.ask(OUT, sector, bytes(size)) == (IOERR, b"", 1)
    assert made.path.read_bytes() == pattern(MEGABYTE)
    assert made.guest.read(0, 1) == pattern(MEGABYTE)[:SECTOR]


def test_lengths_that_are_not_sectors_are_errors(disk: MakeDisk) -> None:
    guest = disk().guest
    assert guest.ask(IN, 0, room=511).status == IOERR
    assert guest.ask(OUT, 0, bytes(513)).status == IOERR
    assert guest.ask(IN, 0) == (OK, b"", 1)
    assert guest.ask(OUT, 0) == (OK, b"", 1)


def test_smaller_pieces_than_the_block_size_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(pattern(10 * 4096 + 512))
    device = BlockDevice(Image(path, block_size=4096))
    device.memory = GuestMemory.allocate(1 << 20)
    guest = BlockGuest(device, device.memory, wait=device.settle)
    assert (guest.capacity, guest.config(20, 4)) == (80, 4096)
    assert guest.read(8, 8) == pattern(10 * 4096)[4096:8192]
    assert guest.ask(IN, 8, room=512).status == IOERR
    assert guest.ask(IN, 4, room=4096).status == IOERR
    assert guest.ask(IN, 80, room=4096).status == IOERR
    device.close()


@pytest.mark.parametrize("kind", [2, 10, SECURE_ERASE, 0x80000000, 0xFFFFFFFF])
def test_unknown_requests_are_unsupported(disk: MakeDisk, kind: int) -> None:
    assert disk().guest.ask(kind, 0, bytes(16), room=30) == (UNSUPP, bytes(30), 31)


def test_what_was_not_negotiated_is_unsupported(disk: MakeDisk) -> None:
    guest = disk(1 << Feature.VERSION_1).guest
    assert guest.ask(FLUSH).status == UNSUPP
    for kind in (DISCARD, WRITE_ZEROES):
        assert guest.ask(kind, 0, a_range(0, 8)).status == UNSUPP


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, a_range(0, 8, UNMAP), UNSUPP),  # virtio 1.3, 5.2.6.2
        (DISCARD, a_range(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, a_range(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, a_range(0, 8) + a_range(8, 8, 0x80000000), UNSUPP),
        (DISCARD, b"", IOERR),
        (DISCARD, a_range(0, 8)[:-1], IOERR),
        (WRITE_ZEROES, a_range(0, 8) + b"\0", IOERR),
        (DISCARD, a_range(0, 1) * 17, IOERR),
        (DISCARD, a_range(0, 8) + a_range(LAST, 1), IOERR),
        (WRITE_ZEROES, a_range(0, 8) + a_range(LAST - 1, 2), IOERR),
        (WRITE_ZEROES, a_range(0, 0xFFFFFFFF), IOERR),
        (DISCARD, a_range((1 << 64) - 1, 1), IOERR),
        (DISCARD, a_range(0, 0), OK),
    ],
)
def test_a_request_with_a_bad_range_changes_nothing(
    disk: MakeDisk, kind: int, data: bytes, status: int
) -> None:
    made = disk()
    assert made.guest.ask(kind, 0, data) == (status, b"", 1)
    assert made.path.read_bytes() == pattern(MEGABYTE)


def test_a_read_only_disk_is_not_written_to(disk: MakeDisk) -> None:
    made = disk(read_only=True)
    features = made.device.device_features
    assert features >> BlkFeature.RO & 1
    assert not features & feature_mask((BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES))
    assert made.guest.ask(OUT, 0, bytes(SECTOR)).status == IOERR  # virtio 1.3, 5.2.6.2
    for kind in (DISCARD, WRITE_ZEROES):
        assert made.guest.ask(kind, 0, a_range(0, 8)).status == UNSUPP
    assert made.guest.ask(FLUSH).status == OK
    assert made.guest.read(0, 2048) == pattern(MEGABYTE)


@pytest.mark.parametrize(
    "how",
    [
        {"status": False},  # nowhere to put the status
        {"header": b""},
        {"header": bytes(15)},
    ],
)
def test_a_request_without_header_or_status_is_the_drivers_fault(
    disk: MakeDisk, how: dict[str, Any]
) -> None:
    made = disk()
    made.guest.send(IN, 0, **how)
    made.settle()
    assert made.device.status & Status.NEEDS_RESET
    assert made.device.stats["driver_errors"] == 1
    made.guest.driver.probe()  # which begins with a reset
    assert made.guest.read(0, 1) == pattern(MEGABYTE)[:SECTOR]


def test_a_chain_of_gigabytes_is_refused_without_as_much_memory(disk: MakeDisk) -> None:
    """The same buffer again and again, as often as an indirect table can name it."""
    made = disk()
    guest = made.guest
    allocator = guest.driver.allocator
    header, status = allocator.allocate(16), allocator.allocate(1)
    block_of = allocator.allocate(4 * MEGABYTE)
    guest.memory.write(header, struct.pack("<IIQ", IN, 0, 0))
    into = [(block_of, 4 * MEGABYTE)] * 200 + [(status, 1)]
    guest.driver.queues[0].add([(header, 16)], into)
    guest.driver.kick(0)
    made.settle()
    (used,) = guest.driver.queues[0].collect()
    assert used.written == 800 * MEGABYTE + 1
    assert guest.memory.read(status, 1) == bytes([IOERR])


# --- the host's errors ---------------------------------------------------------------------------


def test_what_the_system_refuses_is_an_error_and_told_once(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = disk()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for _ in range(3):
            assert made.guest.ask(OUT, 0, bytes(SECTOR)) == (IOERR, b"", 1)
    assert caplog.text.count("No space left on device") == 1
    assert made.device.stats["io_errors"] == 3
    made.guest.write(0, bytes(SECTOR))


def test_a_full_disk_of_the_hosts_is_an_error_until_there_is_room_again(tmp_path: Path) -> None:
    """On a tmpfs, where reads cannot be asked not to wait either."""
    need_linux()
    need_root()
    place = tmp_path / "small"
    place.mkdir()
    mount = need_program("mount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "small", place], capture_output=True, timeout=20
    )
    if done.returncode:
        pytest.skip("this kernel has no mounts for us")
    path = place / "image"
    path.touch()
    os.truncate(path, 2 * MEGABYTE)  # more than there is room for
    made = Disk(path)
    try:
        half = pattern(MEGABYTE // 2)
        for sector in (0, LAST // 2):
            made.guest.write(sector, half)
        assert made.guest.ask(OUT, LAST, half).status == IOERR
        assert made.guest.read(LAST // 2, LAST // 2) == half
        assert made.guest.ask(DISCARD, 0, a_range(0, LAST // 2)).status == OK
        made.guest.write(LAST, half)
        assert made.guest.read(LAST, LAST // 2) == half
        assert made.device.stats["io_errors"] == 1
    finally:
        made.close()
        subprocess.run([need_program("umount", package="mount"), place], timeout=20, check=True)


def test_an_image_that_became_shorter_gives_errors_and_zeros(disk: MakeDisk) -> None:
    made = disk()
    os.truncate(made.path, MEGABYTE // 2)
    sector = LAST // 2 - 1
    there = pattern(MEGABYTE)[sector * SECTOR :][:SECTOR]
    assert made.guest.ask(IN, sector, room=1024) == (IOERR, there + bytes(SECTOR), 1025)
    assert made.guest.read(sector, 1) == there
    made.device.resize()
    assert made.guest.capacity == LAST // 2


def test_once_a_flush_has_failed_no_flush_succeeds(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of lost bytes only once: the next fdatasync(2) finds nothing to do."""
    made = disk()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        assert made.guest.ask(FLUSH).status == IOERR
    assert made.guest.ask(FLUSH).status == IOERR


# --- what is on the disk, and when ---------------------------------------------------------------

FLUSHES = 1 << BlkFeature.FLUSH
WCE = 1 << BlkFeature.CONFIG_WCE
MODERN = 1 << Feature.VERSION_1


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the image, in order."""
    done: list[str] = []
    write, sync = os.pwritev, os.fdatasync

    def pwritev(*args: Any) -> int:
        done.append("write")
        return write(*args)

    def fdatasync(fd: int) -> None:
        sync(fd)
        done.append("sync")

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return done


@pytest.mark.parametrize(
    ("features", "steps"),
    [
        (MODERN, ["write", "sync"]),  # 5.2.6.2, case 1: no cache that the driver knows of
        (MODERN | FLUSHES, ["write"]),  # case 3
        (MODERN | WCE, ["write", "sync"]),  # 5.2.5.2: writeback is 0 to begin with
        (MODERN | WCE | FLUSHES, ["write"]),
    ],
)
def test_a_write_is_on_the_disk_when_the_driver_may_believe_so(
    disk: MakeDisk, order: list[str], features: int, steps: list[str]
) -> None:
    made = disk(features)
    made.guest.write(0, bytes(SECTOR))
    assert order == steps
    if features & FLUSHES:
        assert made.guest.ask(FLUSH).status == OK
        assert order == [*steps, "sync"]


def test_the_driver_turns_the_cache_off_and_on(disk: MakeDisk, order: list[str]) -> None:
    made = disk(MODERN | WCE | FLUSHES)
    wce = BlkConfig.wce.offset
    for value, steps in ((0, ["write", "sync"]), (1, ["write"])):
        made.device.write_config(wce, bytes([value]))
        assert made.guest.config(wce, 1) == value
        order.clear()
        made.guest.write(0, bytes(SECTOR))
        assert order == steps
    made.device.write_config(0, bytes(8))  # the rest is not the driver's
    assert made.guest.capacity == LAST


def test_a_cache_that_was_not_negotiated_is_not_turned_on(disk: MakeDisk) -> None:
    made = disk(MODERN)
    made.device.write_config(BlkConfig.wce.offset, b"\1")
    assert not made.device.write_back


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_without_a_cache_discards_and_zeroes_are_on_the_disk_too(
    disk: MakeDisk, order: list[str], kind: int
) -> None:
    made = disk(feature_mask((Feature.VERSION_1, BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES)))
    if kind == DISCARD and not made.image.deallocates:
        pytest.skip("this file system wants no holes")
    assert made.guest.ask(kind, 0, a_range(0, 8)).status == OK
    assert order[-1] == "sync"


# --- waiting -------------------------------------------------------------------------------------


def test_a_slow_disk_keeps_nobody_waiting_that_can_be_answered(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = disk()
    loop = Loop()
    watch_device(made.device, loop)
    release = threading.Event()
    sync = os.fdatasync

    def slow(fd: int) -> None:
        release.wait(10)
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    try:
        made.guest.send(FLUSH)
        assert made.guest.answers() == []
        made.guest.send(IN, 3, room=SECTOR)
        deadline = time.monotonic() + 10
        while not (answers := made.guest.answers()):
            assert time.monotonic() < deadline
            loop.run_once(0.1)
        assert answers == [(OK, pattern(MEGABYTE)[3 * SECTOR : 4 * SECTOR], 513)]
        release.set()
        while not (answers := made.guest.answers()):
            assert time.monotonic() < deadline
            loop.run_once(0.1)
        assert [answer.status for answer in answers] == [OK]
    finally:
        release.set()
        unwatch_device(made.device, loop)
        loop.close()


def test_a_slow_write_sends_the_next_ones_to_threads(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = disk()
    threads: list[bool] = []
    write = os.pwritev

    def slow(*args: Any) -> int:
        threads.append(threading.current_thread() is not threading.main_thread())
        time.sleep(block.SLOW * 1.5)
        return write(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    monkeypatch.setattr(block, "SLOW_FOR", 100.0)
    for sector in range(3):
        made.guest.write(sector, bytes(SECTOR))
    assert threads == [False, True, True]


def test_a_reset_waits_for_what_touches_the_guests_memory(
    disk: MakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = disk(direct=True)
    read, started = os.preadv, threading.Event()
    ended: list[float] = []

    def slow(*args: Any) -> int:
        started.set()
        time.sleep(0.1)
        count = read(*args)
        ended.append(time.monotonic())
        return count

    monkeypatch.setattr(os, "preadv", slow)
    made.guest.send(IN, 0, room=SECTOR)
    assert started.wait(10)
    made.guest.driver.reset()
    assert ended and ended[0] <= time.monotonic()
    made.guest.driver.probe()
    assert made.guest.read(1, 1) == pattern(MEGABYTE)[SECTOR : 2 * SECTOR]


# --- size ----------------------------------------------------------------------------------------


def test_a_new_size_is_told_and_survives_a_reset(disk: MakeDisk) -> None:
    made = disk()
    changes: list[int] = []
    made.device.on_config_change = lambda: changes.append(1)
    made.device.resize()
    assert changes == []
    os.truncate(made.path, 2 * MEGABYTE)
    assert made.guest.ask(IN, LAST, room=SECTOR).status == IOERR  # not before it was told
    made.device.resize()
    assert (changes, made.guest.capacity) == ([1], 2 * LAST)
    assert made.guest.read(2 * LAST - 1, 1) == bytes(SECTOR)
    made.guest.driver.reset()
    made.guest.driver.probe()
    assert made.guest.capacity == 2 * LAST
