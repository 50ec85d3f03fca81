"""Images: what is opened and what is not, direct I/O and its alignment, real block devices."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vq.devices import block_image
from vq.devices.block_image import Image
from vq.errors import UsageError
from vq.packet import cut
from vq.testing.requirements import need_program

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "image"
    file.write_bytes(os.urandom(SIZE))
    return file


# --- opening -------------------------------------------------------------------------------------


def test_one_process_writes_or_many_read(path: Path) -> None:
    writer = Image(path)
    for read_only in (False, True):
        with pytest.raises(UsageError, match="is in use by another process"):
            Image(path, read_only=read_only)
    writer.close()
    writer.close()
    readers = [Image(path, read_only=True) for _ in range(2)]
    with pytest.raises(UsageError, match="is in use"):
        Image(path)
    for reader in readers:
        reader.close()
    Image(path).close()


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="Linux has these locks")
@pytest.mark.parametrize(
    ("place", "writer", "reader"),
    [
        (100, True, False),
        (101, True, True),
        (103, True, True),
        (200, True, True),
        (201, True, False),
        (0, False, False),
        (99, False, False),
        (110, False, False),
    ],
)
def test_bytes_that_others_lock_as_qemu_does_say_what_may_be_done(
    path: Path, place: int, writer: bool, reader: bool
) -> None:
    lock = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, place, 1, 0)
    with path.open("rb") as other:
        fcntl.fcntl(other.fileno(), fcntl.F_OFD_SETLK, lock)
        for read_only, refused in ((False, writer), (True, reader)):
            with pytest.raises(UsageError) if refused else nullcontext():
                Image(path, read_only=read_only).close()
    Image(path).close()


def test_a_symbolic_link_is_not_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(UsageError, match="is a symbolic link"):
        Image(link)


def test_what_is_no_image_is_not_opened(tmp_path: Path) -> None:
    fifo, sock = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)  # opening one waits for somebody at its other end
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        for path in (fifo, sock, tmp_path, Path("/dev/null")):
            with pytest.raises(UsageError, match="is neither a file nor a block device"):
                Image(path)
    with pytest.raises(FileNotFoundError):
        Image(tmp_path / "nothing")


def test_a_file_that_takes_the_place_of_another_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def other_then(name: str) -> os.stat_result:
        found = real(name)
        os.unlink(path)
        os.mkfifo(path)
        return found

    monkeypatch.setattr(os, "lstat", other_then)
    with pytest.raises(UsageError, match="was replaced"):
        Image(path)


def test_a_file_without_a_whole_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4095))
    with pytest.raises(UsageError, match="no room for a block of 4096 bytes"):
        Image(path, block_size=4096)
    image = Image(path)
    assert image.size == 7 * 512
    image.close()


@pytest.mark.parametrize("block_size", [0, 256, 513, 8192])
def test_a_block_size_is_512_to_4096(path: Path, block_size: int) -> None:
    with pytest.raises(UsageError, match="512 to 4096 in powers of two"):
        Image(path, block_size=block_size)


def test_what_cannot_be_opened_leaves_nothing_open(path: Path) -> None:
    gc.collect()  # what earlier tests left to it is not counted
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(UsageError):
            Image(path, block_size=3)
    assert len(os.listdir("/dev/fd")) == before


# --- reading and writing -------------------------------------------------------------------------

pieces = st.lists(st.integers(1, 9000), max_size=40)


@pytest.mark.parametrize("direct", [False, True])
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cuts=pieces, start=st.integers(0, 20), skew=st.integers(0, 600))
def test_bytes_go_between_the_file_and_buffers_of_any_shape(
    path: Path, direct: bool, cuts: list[int], start: int, skew: int
) -> None:
    length = sum(cuts) // 512 * 512
    room = memoryview(bytearray(skew + length))[skew:]
    ends = [sum(cuts[: index + 1]) for index in range(len(cuts))]
    views = [
        view
        for first, last in zip([0, *ends], ends, strict=False)
        for view in cut([room], first, min(last, length))
    ]
    data = os.urandom(length)
    image = Image(path, direct=direct)
    try:
        before = path.read_bytes()
        room[:] = data
        image.write(start * 512, views)
        after = path.read_bytes()
        assert after[start * 512 :][:length] == data
        assert after[: start * 512] == before[: start * 512]
        assert after[start * 512 + length :] == before[start * 512 + length :]
        room[:] = bytes(length)
        image.read(start * 512, views)
        assert room == data
    finally:
        image.close()


def test_what_direct_io_cannot_take_from_where_it_lies_is_copied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that wants aligned buffers; the one of this machine may not mind."""
    copied: list[int] = []

    def strict(call):  # type: ignore[no-untyped-def]
        def checked(fd: int, views, offset: int, *flags: int) -> int:  # type: ignore[no-untyped-def]
            if any(
                len(view) % 512 or not isinstance(view.obj, block_image.mmap.mmap) for view in views
            ):
                raise OSError(errno.EINVAL, "not aligned")
            copied.append(len(views))
            return int(call(fd, views, offset, *flags))

        return checked

    image = Image(path, direct=True)
    monkeypatch.setattr(os, "preadv", strict(os.preadv))
    monkeypatch.setattr(os, "pwritev", strict(os.pwritev))
    data = os.urandom(5 * 512)
    views = cut([data], 0, 100) + cut([data], 100, 1111) + cut([data], 1111)
    image.write(512, views)
    target = bytearray(len(data))
    image.read(512, [memoryview(target)[:7], memoryview(target)[7:]])
    assert (target, copied) == (data, [1, 1])
    image.close()


def test_a_file_that_ends_early_is_an_error(path: Path) -> None:
    image = Image(path)
    os.truncate(path, 700)
    with pytest.raises(OSError, match="the image ends at 700"):
        image.read(0, [memoryview(bytearray(1024))])
    assert image.measure() and image.size == 512
    image.close()


def test_a_flush_begins_after_those_who_wait_for_it_came(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who comes while one runs waits for the next: that one may have begun too early."""
    image = Image(path)
    begun, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    def slow(fd: int) -> None:
        runs.append(fd)
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr(os, "fdatasync", slow)
    threads = [threading.Thread(target=image.flush) for _ in range(5)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 10
    while len(image._flushing._change._waiters) < 4:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(runs) == 2
    image.close()


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture(params=[512, 4096])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A block device of four megabytes, with sectors of this size."""
    losetup = need_program("losetup", package="mount")
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("this kernel has no loop devices for us")
    file = tmp_path / "disk"
    file.write_bytes(os.urandom(4 << 20))
    done = subprocess.run(
        [losetup, "--find", "--show", f"--sector-size={request.param}", file],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"this kernel has no loop devices for us: {done.stderr.strip()}")
    name = done.stdout.strip()
    yield name
    subprocess.run([losetup, "--detach", name], timeout=20, check=True)


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_is_an_image(disk: str, direct: bool, request: pytest.FixtureRequest) -> None:
    sector = request.node.callspec.params["disk"]
    image = Image(disk, direct=direct)
    try:
        assert image.size == 4 << 20
        assert image.block_size == (sector if direct else 512)
        data = os.urandom(3 * 4096)
        # Three bytes off what any disk would take, in direct mode.
        odd = memoryview(bytearray(3 + len(data)))[3:]
        odd[:] = data
        image.write(4096, cut([odd], 0, 5000) + cut([odd], 5000))
        image.flush()
        odd[:] = bytes(len(odd))
        image.read(4096, [odd])
        assert odd == data
        image.write_zeroes(8192, 4096, deallocate=False)
        image.discard(12288, 4096)
        image.read(4096, [odd])
        assert odd[:8192] == data[:4096] + bytes(4096)
        # Less than a sector of the disk's, as guests may ask for that do not read past the cache.
        for number, deallocate in enumerate((False, True)):
            place = slice(number * 2048 + image.block_size, number * 2048 + 2 * image.block_size)
            if image.block_size < 4096:
                image.write_zeroes(4096 + place.start, image.block_size, deallocate=deallocate)
                image.discard(4096 + place.start, image.block_size)
                image.read(4096, [odd])
                assert not any(odd[place])
                assert any(odd[place.stop : place.stop + 512])
    finally:
        image.close()


def test_a_disk_that_is_mounted_is_not_written_to(disk: str, tmp_path: Path) -> None:
    mkfs, mount = need_program("mkfs.ext4", package="e2fsprogs"), need_program("mount")
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run([mkfs, "-q", disk], timeout=30, check=True)
    subprocess.run([mount, disk, place], timeout=30, check=True)
    try:
        with pytest.raises(UsageError, match="is in use, perhaps mounted"):
            Image(disk)
        Image(disk, read_only=True).close()
    finally:
        subprocess.run([need_program("umount", package="mount"), place], timeout=30, check=True)
