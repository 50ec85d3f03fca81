"""Guest memory: what is inside, what is not, and that nothing of it leaks.

The oracles are independent of the module: a plain bytearray with a map of who owns each byte,
`ctypes.string_at` for addresses, a mapping by `mmap.mmap` for files, another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import memory as memory_module
from vq.errors import AddressError, UsageError
from vq.memory import DirtyLog, GuestMemory, Region, fence

PAGE = 4096
TOP = 1 << 64


def open_fds() -> int:
    if os.path.isdir("/proc/self/fd"):
        return len(os.listdir("/proc/self/fd"))
    return int(psutil.Process().num_fds())


def is_mapped(address: int) -> bool:
    """Whether this process has a mapping at that address."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        pytest.skip("this system does not list mappings in /proc/self/maps")
    bounds = (tuple(int(x, 16) for x in line.split()[0].split("-")) for line in lines)
    return any(start <= address < end for start, end in bounds)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every test gives back as many fds as it took."""
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    """Two adjacent regions, a hole, and one region at the very top of the address space."""
    with GuestMemory.allocate((0x1000, 0x1000), (0x2000, 0x800), (TOP - 0x1000, 0x1000)) as memory:
        yield memory


def file_fd(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    return os.open(path, os.O_RDWR)


def file_bytes(file: int | Path) -> bytes:
    """A file's content through a mapping: not every system shows read(2) what mappings wrote."""
    fd = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as content:
            return content[:]
    finally:
        os.close(fd)


# Regions


@pytest.mark.parametrize("backing", ["memfd", "unlinked file"])
@pytest.mark.parametrize("size", [1, 7, PAGE, PAGE + 2, 3 * PAGE])
def test_an_anonymous_region_is_zeroed_writable_and_of_its_size(
    backing: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if backing == "memfd" and not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if backing != "memfd":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    region = Region.anonymous(0x1000, size)
    assert region.view == bytes(size)
    assert (region.view.format, region.view.readonly) == ("B", False)
    assert (region.gpa, region.size, region.offset) == (0x1000, size, 0)
    region.view[-1] = 0xA5
    assert file_bytes(region.fd) == bytes(size - 1) + b"\xa5"
    assert not os.get_inheritable(region.fd)
    if backing != "memfd":
        assert os.fstat(region.fd).st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    region.close()


def test_a_region_holds_one_fd() -> None:
    before = open_fds()
    region = Region.anonymous(0, PAGE)
    assert open_fds() == before + 1
    region.close()


def test_a_temporary_file_that_cannot_be_unlinked_leaks_no_fd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EPERM, "no", path)

    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError):
        Region.anonymous(0, PAGE)


@pytest.mark.parametrize("size", [sys.maxsize - PAGE, 1 << 61])
def test_more_anonymous_memory_than_the_host_can_give_is_an_os_error(size: int) -> None:
    with pytest.raises(OSError):
        Region.anonymous(0, size)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, 0),
        (0, -1),
        (-1, 4096),
        (-4096, 4096),
        (TOP - 1, 2),
        (TOP, 1),
        (0, TOP + 1),
        (0, 1 << 63),
    ],
)
def test_a_region_that_cannot_be_placed_is_refused(gpa: int, size: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Region.anonymous(gpa, size)
    with pytest.raises(UsageError):
        Region.from_file(tmp_path / "image", gpa, size=size, create=True)
    assert not (tmp_path / "image").exists()
    fd = file_fd(tmp_path / "file", bytes(PAGE))
    with pytest.raises(UsageError):
        Region.from_fd(fd, gpa, size)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("offset", [0, 1, 2, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 17])
def test_a_region_from_a_fd_may_begin_anywhere_in_the_file(offset: int, tmp_path: Path) -> None:
    content = bytes((i * 7 + i // 251) & 0xFF for i in range(3 * PAGE))
    fd = file_fd(tmp_path / "ram", content)
    with GuestMemory([Region.from_fd(fd, 0x10000, len(content) - offset, offset=offset)]) as memory:
        (region,) = memory.regions
        assert (region.fd, region.offset) == (fd, offset)
        assert region.view == content[offset:]
        assert ctypes.string_at(region.address, region.size) == content[offset:]
        memory.write(0x10000, b"first")
        memory.write(0x10000 + region.size - 4, b"last")
        after = file_bytes(fd)
    assert after == content[:offset] + b"first" + content[offset + 5 : -4] + b"last"


def test_a_region_from_a_fd_reaches_no_further_than_its_size(tmp_path: Path) -> None:
    fd = file_fd(tmp_path / "ram", bytes(2 * PAGE))
    with GuestMemory([Region.from_fd(fd, 0, 100, offset=50)]) as memory:
        assert len(memory.regions[0].view) == 100
        with pytest.raises(AddressError):
            memory.view(99, 2)


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (PAGE + 1, 0),
        (PAGE, 1),
        (1, PAGE),
        (1, -1),
        (PAGE, -PAGE),
        (1, 1 << 63),
        (1, TOP),
        (1 << 62, 0),
    ],
)
def test_a_range_outside_the_file_is_refused_and_its_fd_closed(
    size: int, offset: int, tmp_path: Path
) -> None:
    fd = file_fd(tmp_path / "ram", bytes(PAGE))
    with pytest.raises(UsageError, match="not inside a file"):
        Region.from_fd(fd, 0, size, offset=offset)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_fd_that_cannot_be_mapped_is_an_os_error_and_closed(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "ram", os.O_RDONLY)
    with pytest.raises(PermissionError):
        Region.from_fd(fd, 0, PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_fd_without_content_is_refused_and_closed() -> None:
    fd, other = os.pipe()
    os.close(other)
    with pytest.raises(UsageError):
        Region.from_fd(fd, 0, PAGE)


def test_a_fd_that_is_not_open_is_an_os_error() -> None:
    fd, other = os.pipe()
    os.close(fd)
    os.close(other)
    for number in (fd, -1):
        with pytest.raises(OSError) as caught:
            Region.from_fd(number, 0, PAGE)
        assert caught.value.errno == errno.EBADF


def test_an_argument_of_the_wrong_type_still_closes_the_fd(tmp_path: Path) -> None:
    fd = file_fd(tmp_path / "ram", bytes(PAGE))
    with pytest.raises(TypeError):
        Region.from_fd(fd, "0", PAGE)  # type: ignore[arg-type]


def test_a_region_on_huge_pages_is_mapped_and_unmapped_whole() -> None:
    if not hasattr(os, "MFD_HUGETLB"):
        pytest.skip("this system has no memfd on huge pages")
    try:
        fd = os.memfd_create("vq-huge", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel has no memfd on huge pages: {error}")
    huge = os.fstat(fd).st_blksize
    os.ftruncate(fd, 2 * huge)
    try:
        region = Region.from_fd(fd, 0x1000, 0x3000, offset=huge + 0x1000)
    except OSError as error:
        pytest.skip(f"no huge pages are free: {error}")
    address = region.address
    region.view[:4] = b"huge"
    assert address % huge == 0x1000
    assert is_mapped(address)
    region.close()
    assert not is_mapped(address)


def test_a_file_of_whole_large_blocks_is_mapped_from_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mapping on hugetlbfs looks like to mmap and munmap, on any file system."""
    block = 16 * PAGE
    asked: list[tuple[int, int]] = []
    fstat, map_shared = os.fstat, memory_module.map_shared

    class Blocks:
        def __init__(self, fd: int) -> None:
            self.st_size = fstat(fd).st_size
            self.st_blksize = block

    def watched(fd: int, offset: int, length: int) -> tuple[memoryview, int]:
        asked.append((offset, length))
        return map_shared(fd, offset, length)

    monkeypatch.setattr(os, "fstat", Blocks)
    monkeypatch.setattr(memory_module, "map_shared", watched)
    content = os.urandom(3 * block)
    region = Region.from_fd(file_fd(tmp_path / "ram", content), 0, block, offset=block + PAGE + 3)
    assert region.view == content[block + PAGE + 3 :][:block]
    assert asked == [(block, 2 * block)]
    region.close()


# Images in files


def test_what_is_written_to_a_file_image_is_there_the_next_time(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with GuestMemory([Region.from_file(image, 0x8000, size=3 * PAGE, create=True)]) as memory:
        assert memory.read(0x8000, 3 * PAGE) == bytes(3 * PAGE)
        memory.write(0x8000 + PAGE - 2, b"keep me")
    assert file_bytes(image) == bytes(PAGE - 2) + b"keep me" + bytes(2 * PAGE - 5)
    assert image.stat().st_mode & 0o777 == 0o600
    with GuestMemory([Region.from_file(image)]) as memory:
        assert (memory.regions[0].gpa, memory.size) == (0, 3 * PAGE)
        assert memory.read(PAGE - 2, 7) == b"keep me"


def test_a_file_image_without_a_size_reaches_from_the_offset_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"0123456789")
    region = Region.from_file(tmp_path / "image", offset=3)
    assert bytes(region.view) == b"3456789"
    region.close()


def test_creating_extends_a_short_file_and_never_cuts_a_long_one(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"content")
    Region.from_file(image, size=10, offset=2, create=True).close()
    assert file_bytes(image) == b"content" + bytes(5)
    Region.from_file(image, size=4, create=True).close()
    assert file_bytes(image) == b"content" + bytes(5)


def test_an_image_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with pytest.raises(UsageError, match="say how large"):
        Region.from_file(image, create=True)
    with pytest.raises(FileNotFoundError):
        Region.from_file(image, size=PAGE)
    assert not image.exists()
    image.write_bytes(b"")
    with pytest.raises(UsageError, match="no bytes"):
        Region.from_file(image)
    image.write_bytes(b"four")
    for size, offset in ((None, 4), (None, 9), (None, -1), (4, -1), (1, 1 << 63), (PAGE, 0)):
        with pytest.raises(UsageError):
            Region.from_file(image, size=size, offset=offset)
    assert image.read_bytes() == b"four"
    with pytest.raises(IsADirectoryError):
        Region.from_file(tmp_path)


# Sharing


def test_another_process_shares_an_anonymous_region_through_its_fd() -> None:
    child = """
import mmap, sys
with mmap.mmap(int(sys.argv[1]), 8192) as ram:
    assert ram[4094:4099] == b"hello", ram[4094:4099]
    ram[5000:5005] = b"world"
"""
    with GuestMemory.allocate(8192) as memory:
        memory.write(4094, b"hello")
        fd = memory.regions[0].fd
        command = [sys.executable, "-c", child, str(fd)]
        subprocess.run(command, pass_fds=[fd], check=True, timeout=60)
        assert memory.read(5000, 5) == b"world"


def test_two_regions_of_one_file_show_the_same_bytes() -> None:
    with GuestMemory.allocate((0, 2 * PAGE)) as memory:
        twin = Region.from_fd(os.dup(memory.regions[0].fd), 1 << 40, PAGE, offset=PAGE)
        both = memory.with_region(twin)
        both.write(PAGE + 5, b"one place")
        assert both.read((1 << 40) + 5, 9) == b"one place"
        twin.close()


# Layouts


@pytest.mark.parametrize(
    "layout",
    [[(0, 2), (1, 2)], [(0, 8), (2, 2)], [(5, 1), (5, 1)], [(0x1000, 0x1001), (0, 0x2000)]],
)
def test_overlapping_regions_are_refused(layout: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="overlap"):
        GuestMemory.allocate(*layout)
    regions = [Region.anonymous(gpa, size) for gpa, size in layout]
    with pytest.raises(UsageError, match="overlap"):
        GuestMemory(regions)
    assert not any(region.closed for region in regions)
    for region in regions:
        region.close()


def test_regions_are_sorted_and_sizes_follow_on() -> None:
    with GuestMemory.allocate(0x1000, 0x800, (0x100000, 0x1000), 0x10, (0x1800, 1)) as memory:
        assert [(region.gpa, region.size) for region in memory.regions] == [
            (0, 0x1000),
            (0x1000, 0x800),
            (0x1800, 1),
            (0x100000, 0x1000),
            (0x101000, 0x10),
        ]
        assert memory.size == 0x2811


def test_a_memory_without_regions_has_no_address() -> None:
    with GuestMemory() as memory:
        assert (memory.size, memory.regions, 0 in memory) == (0, (), False)
        for access in (memory.hvaddr, memory.region_at, memory.load16):
            with pytest.raises(AddressError):
                access(0)
        with pytest.raises(AddressError):
            memory.views(0, 0)


def test_region_at_and_in_know_the_first_and_the_last_byte(guest: GuestMemory) -> None:
    low, middle, top = guest.regions
    for gpa, region in (
        (0x1000, low),
        (0x1FFF, low),
        (0x2000, middle),
        (0x27FF, middle),
        (TOP - 0x1000, top),
        (TOP - 1, top),
    ):
        assert guest.region_at(gpa) is region
        assert gpa in guest
    for gpa in (-TOP, -1, 0, 0xFFF, 0x2800, TOP - 0x1001, TOP, TOP + 0x1000):
        assert gpa not in guest
        with pytest.raises(AddressError):
            guest.region_at(gpa)


def test_a_copy_with_or_without_a_region_shares_the_others(guest: GuestMemory) -> None:
    extra = Region.anonymous(0x2800, 0x800)
    more = guest.with_region(extra)
    more.write(0x27FE, b"both")
    assert guest.read(0x27FE, 2) == b"bo"
    assert 0x2800 not in guest
    assert more.regions == (*guest.regions[:2], extra, guest.regions[2])
    less = more.without_region(extra)
    assert less.regions == guest.regions
    assert not extra.closed
    with pytest.raises(UsageError):
        less.without_region(extra)
    with pytest.raises(UsageError, match="overlap"):
        more.with_region(guest.regions[0])
    extra.close()


def test_closing_a_memory_closes_its_regions_for_every_copy() -> None:
    memory = GuestMemory.allocate(PAGE)
    extra = Region.anonymous(PAGE, PAGE)
    more = memory.with_region(extra)
    assert more.read(0, 1) == b"\0"
    memory.close()
    with pytest.raises(UsageError, match="closed"):
        more.read(0, 1)
    assert more.read(PAGE, 1) == b"\0"
    more.close()
    assert extra.closed


# Ranges


BAD_RANGES = [
    pytest.param(0, 1, "not in the guest's memory", id="below"),
    pytest.param(0x0FFF, 2, "not in the guest's memory", id="begins before"),
    pytest.param(0x2800, 1, "not in the guest's memory", id="right behind"),
    pytest.param(0x2800, 0, "not in the guest's memory", id="nothing, outside"),
    pytest.param(0x27FF, 2, "runs past|not in", id="runs into a hole"),
    pytest.param(0x1000, 0x1801, "runs past|not in", id="over adjacent regions into a hole"),
    pytest.param(0x8000, 8, "not in the guest's memory", id="hole"),
    pytest.param(TOP - 1, 2, "wraps", id="wraps 2^64"),
    pytest.param(TOP - 0x1000, 0x2000, "wraps", id="wraps to RAM"),
    pytest.param(0x1000, TOP, "wraps", id="whole space"),
    pytest.param(0x1000, TOP - 0x1000, "runs past|not in", id="rest of the space"),
    pytest.param(TOP, 1, "wraps", id="at 2^64"),
    pytest.param(TOP + 0x1000, 1, "wraps", id="RAM plus 2^64"),
    pytest.param(0x1000 - TOP, 1, "wraps", id="RAM minus 2^64"),
    pytest.param(-1, 1, "wraps", id="negative"),
    pytest.param(-1, 0, "wraps", id="negative, nothing"),
]


@pytest.mark.parametrize(("gpa", "length", "reason"), BAD_RANGES)
@pytest.mark.parametrize("near", [0x1000, 0x2000, TOP - 0x1000])
def test_a_range_that_is_not_ram_is_an_address_error(
    guest: GuestMemory, gpa: int, length: int, reason: str, near: int
) -> None:
    guest.view(near, 1)  # the look-up begins in the region used last
    for access in (guest.hvaddr, guest.view, guest.views, guest.read):
        with pytest.raises(AddressError, match=reason):
            access(gpa, length)


@pytest.mark.parametrize("gpa", [0x1000, 0x1800, 0x2000, 0x2800, 0, -1])
def test_a_negative_length_is_a_usage_error(guest: GuestMemory, gpa: int) -> None:
    for access in (guest.hvaddr, guest.view, guest.views, guest.read):
        for length in (-1, -0x800, -TOP):
            with pytest.raises(UsageError):
                access(gpa, length)


def test_one_view_or_address_never_covers_two_mappings(guest: GuestMemory) -> None:
    for access in (guest.hvaddr, guest.view):
        with pytest.raises(AddressError, match="another region"):
            access(0x1FFF, 2)
        with pytest.raises(AddressError, match="no memory"):
            access(0x27FF, 2)


def test_a_failed_access_leaves_the_memory_usable(guest: GuestMemory) -> None:
    for _ in range(2):
        with pytest.raises(AddressError):
            guest.view(0x1FFF, 2)
        assert len(guest.view(0x1FFF, 1)) == 1
        assert len(guest.view(TOP - 1, 1)) == 1


def test_no_bytes_are_good_wherever_the_address_is_inside(guest: GuestMemory) -> None:
    for gpa in (0x1000, 0x1FFF, 0x2000, 0x27FF, TOP - 1):
        assert guest.hvaddr(gpa, 0) == guest.hvaddr(gpa)
        assert len(guest.view(gpa, 0)) == 0
        assert guest.views(gpa, 0) == []
        assert guest.read(gpa, 0) == b""
        guest.write(gpa, b"")
    with pytest.raises(AddressError):
        guest.write(0x2800, b"")


Layout = list[tuple[int, int]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to six regions, in any order, with holes and without; some end at 2^64."""
    pieces = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 0, 0, 1, 2, 9]), st.integers(1, 20)),
            min_size=1,
            max_size=6,
        )
    )
    end = sum(hole + size for hole, size in pieces)
    gpa = draw(st.sampled_from([0, 1, 0x1000, (1 << 32) - 10, TOP - end]))
    layout = []
    for hole, size in pieces:
        layout.append((gpa + hole, size))
        gpa += hole + size
    return draw(st.permutations(layout))


class Model:
    """The same memory as one bytearray, and for each byte the number of its region, or None."""

    def __init__(self, layout: Layout) -> None:
        self.base = min(gpa for gpa, _ in layout) - 4
        span = max(gpa + size for gpa, size in layout) + 4 - self.base
        self.bytes = bytearray(span)
        self.owner: list[int | None] = [None] * span
        for number, (gpa, size) in enumerate(layout):
            for at in range(gpa - self.base, gpa - self.base + size):
                self.owner[at] = number

    def owners(self, gpa: int, length: int) -> list[int | None]:
        at = gpa - self.base
        return self.owner[at : at + max(length, 1)]

    def is_ram(self, gpa: int, length: int) -> bool:
        return None not in self.owners(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        return bytes(self.bytes[gpa - self.base : gpa - self.base + length])

    def write(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa - self.base : gpa - self.base + len(data)] = data


def accesses(layout: Layout) -> st.SearchStrategy[list[tuple[int, int]]]:
    first = min(gpa for gpa, _ in layout) - 4
    last = max(gpa + size for gpa, size in layout) + 3

    def ending(gpa: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.just(gpa), st.integers(0, min(last + 1 - gpa, 40)))

    return st.lists(st.integers(first, last).flatmap(ending), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_memory_behaves_as_a_bytearray_with_holes(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    model = Model(layout)
    with GuestMemory.allocate(*layout) as memory:
        for step, (gpa, length) in enumerate(data.draw(accesses(layout))):
            content = bytes((step * 37 + i + 1) & 0xFF for i in range(length))
            owners = model.owners(gpa, length)
            if not model.is_ram(gpa, length):
                with pytest.raises(AddressError):
                    memory.write(gpa, content)
                with pytest.raises(AddressError):
                    memory.read(gpa, length)
                with pytest.raises(AddressError):
                    memory.views(gpa, length)
            else:
                memory.write(gpa, content)
                model.write(gpa, content)
                views = memory.views(gpa, length)
                assert b"".join(views) == content
                assert all(len(view) for view in views)
                assert len(views) == (len(set(owners)) if length else 0)
                for view in views:
                    view[0] ^= 0xFF
                    model.bytes[gpa - model.base] ^= 0xFF
                    gpa += len(view)
                gpa -= length
            if model.is_ram(gpa, length) and len(set(owners)) == 1:
                assert memory.view(gpa, length) == model.read(gpa, length)
                assert ctypes.string_at(memory.hvaddr(gpa, length), length) == model.read(
                    gpa, length
                )
            else:
                with pytest.raises(AddressError):
                    memory.view(gpa, length)
                with pytest.raises(AddressError):
                    memory.hvaddr(gpa, length)
            assert (gpa in memory) == model.is_ram(gpa, 1)
        for gpa, size in layout:
            assert memory.read(gpa, size) == model.read(gpa, size)


@pytest.mark.parametrize(
    "data",
    [
        b"\1\0\2\0\3\0\4\0",
        bytearray(b"\1\0\2\0\3\0\4\0"),
        memoryview(b"\1\0\2\0\3\0\4\0").cast("H"),
        memoryview(b"\1\0\2\0\3\0\4\0").cast("B", (2, 2, 2)),
        (ctypes.c_uint8 * 8)(1, 0, 2, 0, 3, 0, 4, 0),
    ],
    ids=["bytes", "bytearray", "words", "three dimensions", "ctypes"],
)
def test_write_takes_any_buffer_byte_for_byte(guest: GuestMemory, data: bytes) -> None:
    for gpa in (0x1000, 0x1FFC):
        guest.write(gpa, data)
        assert guest.read(gpa, 8) == b"\1\0\2\0\3\0\4\0"


class Pair(ctypes.LittleEndianStructure):
    _fields_ = (("first", ctypes.c_uint32), ("second", ctypes.c_uint16))


def test_a_structure_is_the_guests_bytes(guest: GuestMemory) -> None:
    guest.write(0x1100, bytes(range(1, 9)))
    pair = guest.structure(Pair, 0x1100)
    assert (pair.first, pair.second) == (0x04030201, 0x0605)
    pair.second = 0xBEEF
    assert guest.read(0x1104, 2) == b"\xef\xbe"
    guest.write(0x1100, b"\xff")
    assert pair.first == 0x040302FF
    with pytest.raises(AddressError):
        guest.structure(Pair, 0x1FFC)


# 16-bit words


def test_a_word_is_little_endian(guest: GuestMemory) -> None:
    guest.store16(0x1002, 0x1234)
    assert guest.read(0x1000, 6) == b"\0\0\x34\x12\0\0"
    guest.write(0x27FE, b"\xfe\xca")
    assert guest.load16(0x27FE) == 0xCAFE
    guest.store16(TOP - 2, 0xFFFF)
    assert guest.load16(TOP - 2) == 0xFFFF
    assert guest.load16(TOP - 4) == 0


def test_a_big_endian_host_swaps_words(guest: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    native = guest.view(0x1000, 2).cast("H")
    native[0] = 0x1234
    monkeypatch.setattr(memory_module, "_HOST_IS_BIG_ENDIAN", True)
    assert guest.load16(0x1000) == 0x3412
    guest.store16(0x1000, 0xA1B2)
    assert native[0] == 0xB2A1


@pytest.mark.parametrize("gpa", [0x1001, 0x1FFF, 0x27FF, TOP - 1, -1, 0x0FFE, 0x2800, TOP, -2])
def test_a_word_that_is_odd_or_outside_is_an_address_error(guest: GuestMemory, gpa: int) -> None:
    with pytest.raises(AddressError):
        guest.load16(gpa)
    with pytest.raises(AddressError):
        guest.store16(gpa, 1)


@pytest.mark.parametrize("value", [-1, 0x10000, TOP])
def test_a_value_that_is_no_word_is_a_usage_error(guest: GuestMemory, value: int) -> None:
    with pytest.raises(UsageError):
        guest.store16(0x1000, value)
    assert guest.read(0x1000, 2) == b"\0\0"


def test_the_words_of_an_odd_sized_region_end_before_its_last_byte() -> None:
    with GuestMemory.allocate((0, 5), (5, 5)) as memory:
        memory.store16(2, 0x0102)
        for gpa in (4, 10):
            with pytest.raises(AddressError):
                memory.load16(gpa)


@pytest.mark.parametrize(("gpa", "offset", "aligned"), [(1, 1, True), (0, 1, False), (1, 2, False)])
def test_a_word_is_aligned_for_the_host_too(
    gpa: int, offset: int, aligned: bool, tmp_path: Path
) -> None:
    fd = file_fd(tmp_path / "ram", bytes(range(64)))
    with GuestMemory([Region.from_fd(fd, gpa, 32, offset=offset)]) as memory:
        if aligned:
            assert memory.load16(2) == 0x0302
            assert memory.load16(30) == 0x1F1E
            with pytest.raises(AddressError):
                memory.load16(0)
            with pytest.raises(AddressError):
                memory.load16(32)
        else:
            with pytest.raises(AddressError, match="no word is aligned"):
                memory.load16(2)


# The fence


def test_the_fence_of_every_processor_runs_here() -> None:
    fence()
    memory_module._fence_by_lock()
    memory_module._fence_by_yield()


def test_the_fence_by_lock_yields_while_another_thread_is_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    yields: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(None))
    memory_module._fence_by_lock()
    assert len(yields) == 0
    with memory_module._fence_lock:
        memory_module._fence_by_lock()
    assert len(yields) == 1
    assert not memory_module._fence_lock.locked()


@pytest.mark.parametrize("strong", [True, False])
def test_loads_and_stores_are_ordered_by_a_fence_only_where_the_processor_does_not(
    strong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fences: list[None] = []
    monkeypatch.setattr(memory_module, "_strong", strong)
    monkeypatch.setattr(memory_module, "_fence", lambda: fences.append(None))
    memory_module.order_loads()
    memory_module.order_stores()
    assert len(fences) == (0 if strong else 2)
    DirtyLog(bytearray(1)).mark(0, 1)
    assert len(fences) == (0 if strong else 3)


@pytest.mark.parametrize(
    ("machine", "chosen"),
    [
        ("x86_64", "_fence_by_lock"),
        ("amd64", "_fence_by_lock"),
        ("i386", "_fence_by_lock"),
        ("s390x", "_fence_by_lock"),
        ("aarch64", "_fence_by_yield"),
        ("arm64", "_fence_by_yield"),
        ("riscv64", "_fence_by_yield"),
        ("ppc64le", "_fence_by_yield"),
        ("", "_fence_by_yield"),
    ],
)
def test_only_processors_known_to_be_strong_use_the_lock(
    machine: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert runpy.run_path(memory_module.__file__)["_fence"].__name__ == chosen


# The dirty log


def dirty_pages(bitmap: bytearray) -> set[int]:
    number = int.from_bytes(bitmap, "little")
    return {page for page in range(len(bitmap) * 8) if number >> page & 1}


def test_the_bitmap_has_one_bit_a_page_lowest_first() -> None:
    bitmap = bytearray(4)
    log = DirtyLog(bitmap)
    assert log.limit == 32 * 4096
    log.mark(0, 1)
    log.mark(9 * 4096 + 4095, 2)
    log.mark(31 * 4096, 4096)
    assert bitmap == b"\x01\x06\x00\x80"


@pytest.mark.parametrize("step", [1, 2])
@given(gpa=st.integers(0, 700), length=st.integers(0, 900))
@settings(max_examples=150, deadline=None)
def test_a_mark_sets_exactly_the_pages_of_its_range(step: int, gpa: int, length: int) -> None:
    bitmap = bytearray(8)
    bitmap[1] = 0x42
    log = DirtyLog(bitmap, page_size=8 * step)
    log.mark(gpa, length)
    expected = {byte // (8 * step) for byte in range(gpa, gpa + length)} | {9, 14}
    assert dirty_pages(bitmap) == {page for page in expected if page < 64}


@given(gpa=st.integers(0, 700), length=st.integers(0, 900))
def test_with_other_writers_whole_bytes_are_set_so_that_no_bit_of_theirs_is_lost(
    gpa: int, length: int
) -> None:
    """Two devices of one guest mark in one bitmap: a load, an OR and a store could undo a bit."""
    bitmap = bytearray(8)
    DirtyLog(bitmap, page_size=8, other_writers=True).mark(gpa, length)
    touched = {byte // 64 for byte in range(gpa, gpa + length)}
    assert bitmap == bytes(0xFF if index in touched else 0 for index in range(8))


def test_pages_beyond_the_bitmap_are_passed_over() -> None:
    bitmap = bytearray(1)
    log = DirtyLog(bitmap)
    log.mark(8 * 4096, 1)
    log.mark(TOP - 1, 100)
    assert bitmap == b"\0"
    log.mark(7 * 4096, TOP)
    assert bitmap == b"\x80"


def test_a_log_that_cannot_work_is_refused() -> None:
    for page_size in (0, -4096, 3, 4095):
        with pytest.raises(UsageError):
            DirtyLog(bytearray(8), page_size=page_size)
    with pytest.raises(UsageError):
        DirtyLog(memoryview(bytes(8)))
    with pytest.raises(UsageError):
        DirtyLog(memoryview(bytearray(8))[::2])
    log = DirtyLog(bytearray(8))
    for gpa, length in ((-1, 1), (0, -1)):
        with pytest.raises(UsageError):
            log.mark(gpa, length)


def test_a_log_that_does_not_cover_the_memory_is_refused_when_attached() -> None:
    with GuestMemory.allocate((0, PAGE), (7 * PAGE, PAGE)) as memory:
        memory.dirty_log = DirtyLog(bytearray(1))
        kept = memory.dirty_log
        with pytest.raises(UsageError, match="covers"):
            memory.dirty_log = DirtyLog(bytearray(0))
        assert memory.dirty_log is kept
        beyond = Region.anonymous(8 * PAGE, 1)
        with pytest.raises(UsageError, match="covers"):
            memory.with_region(beyond)
        beyond.close()


def test_copies_keep_the_log() -> None:
    bitmap = bytearray(1)
    with GuestMemory.allocate(PAGE) as memory:
        memory.dirty_log = DirtyLog(bitmap)
        more = memory.with_region(Region.anonymous(2 * PAGE, PAGE))
        more.write(2 * PAGE, b"x")
        assert bitmap == b"\x04"
        more.mark_views_dirty([more.view(0, 1)], 1)
        assert bitmap == b"\x05"
        more.close()


def test_writes_are_logged_and_reads_are_not() -> None:
    bitmap = bytearray(2)
    with GuestMemory.allocate(16 * PAGE) as memory:
        memory.write(0, b"not logged yet")
        memory.dirty_log = DirtyLog(bitmap)
        memory.read(0, PAGE)
        memory.load16(0)
        memory.views(0, PAGE)
        memory.hvaddr(0)
        assert dirty_pages(bitmap) == set()
        memory.write(PAGE - 1, b"ab")
        memory.store16(3 * PAGE, 1)
        memory.mark_dirty(5 * PAGE, 2 * PAGE)
        assert dirty_pages(bitmap) == {0, 1, 3, 5, 6}
        with pytest.raises(AddressError):
            memory.write(16 * PAGE - 1, b"ab")
        with pytest.raises(AddressError):
            memory.store16(16 * PAGE, 1)
        with pytest.raises(UsageError):
            memory.store16(8 * PAGE, -1)
        assert dirty_pages(bitmap) == {0, 1, 3, 5, 6}
        memory.dirty_log = None
        memory.write(9 * PAGE, b"x")
        memory.mark_dirty(9 * PAGE, 1)
        assert dirty_pages(bitmap) == {0, 1, 3, 5, 6}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_dirty_pages_are_exactly_the_ones_written(data: st.DataObject) -> None:
    layout = [(16, 100), (116, 60), (300, 33), (333, 80), (500, 12)]
    bitmap = bytearray(8)
    written: set[int] = set()
    with GuestMemory.allocate(*layout) as memory:
        memory.dirty_log = DirtyLog(bitmap, page_size=16)
        for gpa, length in data.draw(accesses(layout)):
            with contextlib.suppress(AddressError):
                memory.write(gpa, bytes(length))
                written |= {byte // 16 for byte in range(gpa, gpa + length)}
        chain: list[memoryview] = []
        where: list[int] = []
        for gpa, length in data.draw(accesses(layout)):
            with contextlib.suppress(AddressError):
                chain += memory.views(gpa, length)
                where += range(gpa, gpa + length)
        used = data.draw(st.integers(0, len(where) + 5))
        memory.mark_views_dirty(chain, used)
        written |= {byte // 16 for byte in where[:used]}
        assert dirty_pages(bitmap) == written
        chain.clear()


def test_views_are_looked_at_only_while_logging_and_as_far_as_written() -> None:
    foreign = memoryview(bytearray(4))
    with GuestMemory.allocate(PAGE) as memory:
        memory.mark_views_dirty([foreign], 4)
        bitmap = bytearray(1)
        memory.dirty_log = DirtyLog(bitmap)
        empty, four = memory.view(0, 0), memory.view(8, 4)
        memory.mark_views_dirty([empty, four, foreign], 4)
        assert bitmap == b"\x01"
        with pytest.raises(UsageError, match="not of this memory"):
            memory.mark_views_dirty([four, foreign], 5)
        with pytest.raises(UsageError, match="writable"):
            memory.mark_views_dirty([four.toreadonly()], 1)


# Closing


def test_closing_gives_back_fds_and_mappings_and_may_be_repeated() -> None:
    before = open_fds()
    memory = GuestMemory.allocate((0, PAGE), (PAGE, PAGE), (1 << 40, PAGE))
    addresses = [region.address for region in memory.regions]
    assert all(is_mapped(address) for address in addresses)
    memory.read(PAGE - 1, 2)
    memory.store16(1 << 40, 1)
    memory.structure(Pair, 0)
    memory.close()
    assert not any(is_mapped(address) for address in addresses)
    assert open_fds() == before
    memory.close()
    assert open_fds() == before


HOLDERS: dict[str, Callable[[GuestMemory], object]] = {
    "view": lambda memory: memory.view(100, 8),
    "views": lambda memory: memory.views(100, 8),
    "cast": lambda memory: memory.view(100, 8).cast("Q"),
    "structure": lambda memory: memory.structure(Pair, 100),
    "whole": lambda memory: memory.regions[0].view,
    "buffer": lambda memory: (ctypes.c_char * 8).from_buffer(memory.view(100, 8)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_mapping_goes_with_its_last_view(holder: str) -> None:
    before = open_fds()
    memory = GuestMemory.allocate(PAGE, PAGE)
    held, free = (region.address for region in memory.regions)
    kept = HOLDERS[holder](memory)
    second = memory.view(104, 1)
    memory.close()
    assert open_fds() == before
    assert is_mapped(held)
    assert not is_mapped(free)
    second[0] = 0x5A
    assert ctypes.string_at(held + 104, 1) == b"\x5a"
    del second
    assert is_mapped(held)
    del kept
    assert not is_mapped(held)


def test_any_use_of_a_closed_memory_is_a_usage_error() -> None:
    memory = GuestMemory.allocate(PAGE, PAGE)
    (region, _) = memory.regions
    view = memory.view(0, 4)
    memory.dirty_log = DirtyLog(bytearray(1))
    memory.close()
    uses: list[Callable[[], object]] = [
        lambda: memory.hvaddr(0),
        lambda: memory.view(0, 1),
        lambda: memory.view(0, 0),
        lambda: memory.views(0, 1),
        lambda: memory.views(0, 0),
        lambda: memory.views(PAGE - 1, 2),
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.load16(0),
        lambda: memory.store16(0, 1),
        lambda: memory.structure(Pair, 0),
        lambda: memory.region_at(0),
        lambda: memory.with_region(region),
        lambda: region.view,
        lambda: region.address,
        lambda: GuestMemory([region]),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="closed") as caught:
            use()
        assert not isinstance(caught.value, AddressError)
    assert memory.dirty_log is None
    memory.mark_views_dirty([view], 4)
    assert (region.closed, region.fd) == (True, -1)
    assert "closed" in repr(memory)


def test_a_region_closed_by_itself_is_closed_in_its_memory() -> None:
    with GuestMemory.allocate(PAGE, PAGE) as memory:
        assert memory.read(PAGE - 1, 2) == b"\0\0"
        memory.load16(0)
        memory.regions[0].close()
        for access in (memory.view, memory.read):
            with pytest.raises(UsageError, match="closed"):
                access(0, 1)
        with pytest.raises(UsageError, match="closed"):
            memory.load16(0)
        assert memory.read(PAGE, 1) == b"\0"


def test_a_memory_that_is_forgotten_gives_everything_back() -> None:
    before = open_fds()
    memory = GuestMemory.allocate(PAGE, PAGE)
    address = memory.regions[0].address
    del memory
    gc.collect()
    assert open_fds() == before
    assert not is_mapped(address)
