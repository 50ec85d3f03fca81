"""The guest's RAM as this process sees it: mapped regions, addresses, bounds, dirty pages.

A `Region` is one shared mapping of a file descriptor, placed at a guest-physical address. A
`GuestMemory` is a set of regions: it turns a guest-physical range into a host-virtual address or
into a writable `memoryview`, and nothing that it hands out ever reaches beyond one mapping. The
rest of the module is what rings in shared memory need: single 16-bit loads and stores, a full
barrier, and the log of dirty pages that live migration reads.

What lies in the memory (descriptors, headers) is for the layers above. So is blame: a range that
is not RAM is an `AddressError` here, and becomes the guest's fault where the guest named it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from vq.errors import AddressError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "DirtyLog",
    "GuestMemory",
    "Region",
    "address_of",
    "fence",
    "map_shared",
    "order_loads",
    "order_stores",
]

SYSTEM_CALLS = ("ftruncate", "memfd_create")

_ADDRESS_SPACE = 1 << 64
"""Guest-physical addresses are 64 bits wide in every virtio structure (virtio 1.3, 2.7.5)."""

_Span = tuple[int, int, memoryview, int]
"""First gpa, gpa after the last, all bytes between, host-virtual address of the first."""

_Words = tuple[int, int, memoryview]
"""First gpa, gpa after the last, the 16-bit words between in the host's byte order."""

# What is open to a memory without regions, and of a region that is closed. No address is inside, so
# that an access takes the slow way, which says what is wrong.
_NO_SPAN: _Span = (0, 0, memoryview(b""), 0)
_NO_WORDS: _Words = (0, 0, memoryview(b"").cast("H"))

_HOST_IS_BIG_ENDIAN = sys.byteorder == "big"

S = TypeVar("S", bound=ctypes.Structure)


class _Window:
    """What an access needs to know. Each tuple is replaced as a whole, so that no thread sees half
    of a change."""

    __slots__ = ("_span", "_words")

    def __init__(self) -> None:
        self._span = _NO_SPAN
        self._words = _NO_WORDS


class Region(_Window):
    """One piece of the guest's RAM: a shared, writable mapping of a file, and that file's fd.

    `gpa` and `size` place it in the guest, in bytes; `fd` is the backing file, to be shared with
    other processes, and `offset` is where in that file the region begins.

    The region owns `fd` and the mapping. `close` gives back the fd at once, and the mapping as soon
    as no view of it is left. Whoever can truncate the file can kill this process (SIGBUS): share
    the fd with those you trust that far.
    """

    __slots__ = ("fd", "gpa", "offset", "size")

    def __init__(self, fd: int, gpa: int, size: int, offset: int = 0) -> None:
        """See `from_fd`."""
        super().__init__()
        self.fd = fd
        self.gpa = gpa
        self.size = size
        self.offset = offset
        try:
            _check_placement(gpa, size)
            self._map()
        except BaseException:
            self.close()
            raise

    @classmethod
    def anonymous(cls, gpa: int, size: int, *, name: str = "vq-guest") -> Self:
        """New zeroed RAM in a file without a name: a memfd, or an unlinked temporary file.

        `name` shows in /proc only. Raises `UsageError` for an impossible placement, `OSError`
        when the host has not the room.
        """
        _check_placement(gpa, size)
        fd = _open_nameless(name)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, gpa, size)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        gpa: int = 0,
        *,
        size: int | None = None,
        offset: int = 0,
        create: bool = False,
    ) -> Self:
        """RAM whose content stands in the file at `path`, from `offset`, and stays there.

        Without `size` the region reaches to the end of the file. With `create`, which needs a
        `size`, a missing file is made, readable by its owner only, and a short one is extended with
        zeros; nothing is ever cut off.

        Raises `UsageError` when the file is too short, `OSError` when it cannot be opened.
        """
        if create and size is None:
            raise UsageError("to create a memory image, say how large it is to be")
        if size is not None:
            _check_placement(gpa, size)
        if not 0 <= offset <= sys.maxsize - (size or 0):
            raise UsageError(f"a region cannot begin at offset {offset} of a file")
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            present = os.fstat(fd).st_size
            if size is None:
                size = present - offset
                if size <= 0:
                    raise UsageError(f"{os.fspath(path)} has no bytes from offset {offset} on")
            elif create and present < offset + size:
                os.ftruncate(fd, offset + size)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, gpa, size, offset)

    @classmethod
    def from_fd(cls, fd: int, gpa: int, size: int, *, offset: int = 0) -> Self:
        """RAM in a file that somebody else opened, from `offset`, which need not be aligned.

        The region takes `fd` over, also when this call fails. Raises `UsageError` when the
        range is not inside the file or cannot be placed, `OSError` when it cannot be mapped (a fd
        that is closed, or not open for reading and writing).
        """
        return cls(fd, gpa, size, offset)

    @property
    def address(self) -> int:
        """The host-virtual address of the region's first byte. `UsageError` once closed."""
        return self._open_span()[3]

    @property
    def view(self) -> memoryview:
        """All of the region, writable, format "B". `UsageError` once closed."""
        return self._open_span()[2]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._span is _NO_SPAN

    def close(self) -> None:
        """Gives back the fd now and the mapping with its last view. Closing twice is allowed.

        Views handed out before stay valid; nothing new can be had from this region, nor from a
        `GuestMemory` that it is part of.
        """
        self._span = _NO_SPAN
        self._words = _NO_WORDS
        fd, self.fd = self.fd, -1
        if fd >= 0:
            # A number that never was an open file is not worth hiding the first error for.
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self.fd} offset {self.offset:#x}"
        return f"<Region {self.gpa:#x}+{self.size:#x} {state}>"

    def _open_span(self) -> _Span:
        span = self._span
        if span is _NO_SPAN:
            raise UsageError(f"the region at {self.gpa:#x} is closed")
        return span

    def _map(self) -> None:
        status = os.fstat(self.fd)
        if self.offset < 0 or self.offset + self.size > status.st_size:
            raise UsageError(
                f"{self.size:#x} bytes from offset {self.offset:#x} are not inside a file of "
                f"{status.st_size:#x} bytes"
            )
        granule = mmap.ALLOCATIONGRANULARITY
        # On hugetlbfs a mapping begins on a huge page, and munmap(2) refuses a length that is
        # not whole huge pages: the mapping would never go. st_blksize is the huge page there, and
        # the file has whole ones, so rounding out to st_blksize stays inside the file. The same is
        # harmless on any other file that happens to have whole blocks.
        block = status.st_blksize
        if block > granule and block % granule == 0 and status.st_size % block == 0:
            granule = block
        skipped = self.offset % granule
        length = -(-(skipped + self.size) // granule) * granule
        whole, address = map_shared(self.fd, self.offset - skipped, length)
        view = whole[skipped : skipped + self.size]
        address += skipped
        self._span = (self.gpa, self.gpa + self.size, view, address)
        # An access is aligned when the host's address is even; a region whose guest-physical and
        # host addresses are not both even or both odd has no aligned words at all.
        if (self.gpa ^ address) & 1 == 0:
            first = self.gpa & 1
            count = (self.size - first) // 2
            words = view[first : first + 2 * count].cast("H")
            self._words = (self.gpa + first, self.gpa + first + 2 * count, words)


class DirtyLog:
    """Which pages of the guest's memory were written: one bit a page, lowest bit first.

    `bitmap` is writable memory, usually shared with the frontend that migrates the guest: the bit
    of the page at guest-physical `p * page_size` is bit `p % 8` of byte `p // 8` (the log of the
    vhost-user protocol). It covers guest-physical `0` up to `limit`; a memory that reaches further
    refuses the log when it is attached.

    With `other_writers` other processes may mark pages in the same bitmap, as the devices of one
    guest do in QEMU's: then whole bytes are set, eight pages at once.

    Raises `UsageError` for a bitmap that cannot be written and a page size that is no power of two.
    """

    def __init__(
        self,
        bitmap: memoryview | bytearray,
        *,
        page_size: int = 4096,
        other_writers: bool = False,
    ) -> None:
        if page_size <= 0 or page_size & (page_size - 1):
            raise UsageError(f"a page of {page_size} bytes is not a power of two")
        view = memoryview(bitmap)
        if view.readonly or not view.c_contiguous:
            raise UsageError("a dirty log needs a bitmap that can be written, in one piece")
        self._bits = view.cast("B")
        self._shift = page_size.bit_length() - 1
        self._whole_bytes = other_writers
        self._lock = threading.Lock()
        self.page_size = page_size
        self.limit = len(self._bits) * 8 * page_size

    def mark(self, gpa: int, length: int) -> None:
        """Marks every page that has a byte of the range; to be called after the bytes are written.

        Pages beyond `limit` are passed over: no memory that this log is attached to has any there.

        Setting a bit is a load, an OR and a store, not one atomic operation. Towards the reader
        that is enough: it only clears bits (while it fetches them), so the worst is that a bit just
        fetched is stored again, and a clean page sent once more. Threads of this process take
        turns by a lock. Between processes one could undo the other's bit, and a page would be lost;
        but storing 0xff is one step and takes no bit away, at the price of neighbours sent again.
        """
        if gpa < 0 or length < 0:
            raise UsageError(f"no pages are dirty at {gpa:#x}, {length} bytes")
        end = min(gpa + length, self.limit)
        if gpa >= end:
            return
        first_byte, first_bit = divmod(gpa >> self._shift, 8)
        last_byte, last_bit = divmod((end - 1) >> self._shift, 8)
        bits = self._bits
        # The reader that sees the bit must see the bytes, too.
        order_stores()
        if self._whole_bytes:
            bits[first_byte : last_byte + 1] = b"\xff" * (last_byte + 1 - first_byte)
            return
        first_mask = 0xFF << first_bit & 0xFF
        last_mask = 0xFF >> (7 - last_bit)
        with self._lock:
            if first_byte == last_byte:
                bits[first_byte] |= first_mask & last_mask
            else:
                bits[first_byte] |= first_mask
                bits[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)
                bits[last_byte] |= last_mask


class GuestMemory:
    """The guest's RAM: regions, sorted, without overlap. The set never changes; copies differ.

    Every range is given as a guest-physical address and a length in bytes. A range that is not RAM
    from its first to its last byte raises `AddressError`, a negative length `UsageError`; a
    range of no bytes is good wherever its address is inside a region.

    Regions may be part of several memories: `with_region` and `without_region` make a new memory
    that shares them. Closing a memory closes the regions that it has, for every memory that
    shares them; a region taken out by `without_region` is the caller's to close. Any use after
    that raises `UsageError`, but views and ctypes structures handed out before stay valid, and keep
    their mapping, for as long as they live.

    Raises `UsageError`, and leaves the regions to the caller, when two of them overlap or one of
    them is closed.
    """

    __slots__ = ("_addresses", "_dirty_log", "_last", "_regions", "_starts")

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        ordered = sorted(regions, key=lambda region: region.gpa)
        for region in ordered:
            region._open_span()
        for lower, upper in pairwise(ordered):
            if lower.gpa + lower.size > upper.gpa:
                raise UsageError(
                    f"regions {lower.gpa:#x}+{lower.size:#x} and "
                    f"{upper.gpa:#x}+{upper.size:#x} overlap"
                )
        self._regions = tuple(ordered)
        self._starts = [region.gpa for region in ordered]
        # Most accesses go where the last one went. One attribute holds what is needed to try
        # there first, so that threads that move it about cannot see half of it.
        self._last: _Window = ordered[0] if ordered else _Window()
        self._dirty_log: DirtyLog | None = None
        self._addresses: list[tuple[int, Region]] = []

    @classmethod
    def allocate(cls, *layout: tuple[int, int] | int) -> Self:
        """New anonymous RAM: each argument is `(gpa, size)`, or a size.

        A size alone is placed right behind the argument before it, the first one at 0. Raises
        `UsageError` for overlaps and impossible sizes, `OSError` when the host has not the room.
        """
        regions: list[Region] = []
        try:
            end = 0
            for piece in layout:
                gpa, size = (end, piece) if isinstance(piece, int) else piece
                regions.append(Region.anonymous(gpa, size))
                end = gpa + size
            return cls(regions)
        except BaseException:
            for region in regions:
                region.close()
            raise

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, lowest guest-physical address first."""
        return self._regions

    @property
    def size(self) -> int:
        """Bytes of RAM in all regions together."""
        return sum(region.size for region in self._regions)

    @property
    def dirty_log(self) -> DirtyLog | None:
        """Where writes are logged; None, as at the start, logs nothing.

        Assigning a log whose bitmap does not reach to the end of the last region raises
        `UsageError`: on the data path there would be no way left to report that.
        """
        return self._dirty_log

    @dirty_log.setter
    def dirty_log(self, log: DirtyLog | None) -> None:
        if log is not None and self._regions:
            last = self._regions[-1]
            if last.gpa + last.size > log.limit:
                raise UsageError(
                    f"the dirty log covers {log.limit:#x} bytes of a guest whose memory ends at "
                    f"{last.gpa + last.size:#x}"
                )
        self._dirty_log = log
        pairs = [(region.address, region) for region in self._regions] if log else []
        self._addresses = sorted(pairs, key=lambda pair: pair[0])

    def with_region(self, region: Region) -> Self:
        """A memory that has this region, too, and the same dirty log.

        Raises `UsageError` when the region overlaps another or the dirty log does not cover it.
        """
        return self._copy((*self._regions, region))

    def without_region(self, region: Region) -> Self:
        """A memory without this region, with the same dirty log. The caller closes the region.

        Raises `UsageError` when the memory does not have that region.
        """
        rest = tuple(other for other in self._regions if other is not region)
        if len(rest) == len(self._regions):
            raise UsageError(f"{region!r} is not a region of this memory")
        return self._copy(rest)

    def region_at(self, gpa: int) -> Region:
        """The region that has the byte at `gpa`. Raises `AddressError` when none has."""
        region = self._find(gpa)
        if region is None:
            raise AddressError(f"guest-physical {gpa:#x} is not in the guest's memory")
        region._open_span()
        return region

    def __contains__(self, gpa: int) -> bool:
        return self._find(gpa) is not None

    def hvaddr(self, gpa: int, length: int = 1) -> int:
        """The host-virtual address of a range that lies within one region."""
        start, end, _, address = self._last._span
        if not (start <= gpa < end and 0 <= length <= end - gpa):
            start, _, _, address = self._locate(gpa, length)
        return address + gpa - start

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view, format "B", of a range that lies within one region.

        What is written through it is logged by `mark_dirty` or `mark_views_dirty`, not by itself.
        """
        start, end, whole, _ = self._last._span
        if not (start <= gpa < end and 0 <= length <= end - gpa):
            start, _, whole, _ = self._locate(gpa, length)
        offset = gpa - start
        return whole[offset : offset + length]

    def views(self, gpa: int, length: int) -> list[memoryview]:
        """Writable views, none of them empty, of a range that may lie in several adjacent regions.

        They come in the order of their addresses, one for each region.
        """
        start, end, whole, _ = self._last._span
        if start <= gpa < end and 0 < length <= end - gpa:
            offset = gpa - start
            return [whole[offset : offset + length]]
        return self._views_over(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of a range, which may lie in several adjacent regions."""
        return b"".join(self.views(gpa, length))

    def write(self, gpa: int, data: Buffer) -> None:
        """Copies `data` to `gpa`, over adjacent regions where need be, and marks it dirty.

        Nothing is written when the range is not RAM as a whole.
        """
        source = data if isinstance(data, bytes) else memoryview(data).cast("B")
        length = len(source)
        start, end, whole, _ = self._last._span
        if start <= gpa < end and length <= end - gpa:
            offset = gpa - start
            whole[offset : offset + length] = source
        else:
            done = 0
            for view in self._views_over(gpa, length):
                view[:] = source[done : done + len(view)]
                done += len(view)
        if self._dirty_log is not None:
            self._dirty_log.mark(gpa, length)

    def structure(self, kind: type[S], gpa: int) -> S:
        """A ctypes structure laid over the guest's memory: its fields are the guest's bytes.

        Each access to a field reads or writes guest memory anew. Writes are not logged.
        """
        return kind.from_buffer(self.view(gpa, ctypes.sizeof(kind)))

    def load16(self, gpa: int) -> int:
        """Loads a little-endian 16-bit word in one access. `AddressError` when `gpa` is odd."""
        start, end, words = self._last._words
        if gpa & 1 or not start <= gpa < end:
            start, words = self._locate_words(gpa)
        # Indexing a memoryview of format "H" copies two bytes from an even address, which
        # compilers make one 16-bit move: never half of an old and half of a new index.
        value: int = words[(gpa - start) >> 1]
        return _swapped(value) if _HOST_IS_BIG_ENDIAN else value

    def store16(self, gpa: int, value: int) -> None:
        """Stores a little-endian 16-bit word in one access and marks it dirty.

        Raises `AddressError` when `gpa` is odd, `UsageError` when the value is not 16 bits wide.
        """
        start, end, words = self._last._words
        if gpa & 1 or not start <= gpa < end:
            start, words = self._locate_words(gpa)
        if not 0 <= value <= 0xFFFF:
            raise UsageError(f"{value} does not fit into 16 bits")
        words[(gpa - start) >> 1] = _swapped(value) if _HOST_IS_BIG_ENDIAN else value
        if self._dirty_log is not None:
            self._dirty_log.mark(gpa, 2)

    def mark_dirty(self, gpa: int, length: int) -> None:
        """Marks a range dirty in the log, where there is one."""
        if self._dirty_log is not None:
            self._dirty_log.mark(gpa, length)

    def mark_views_dirty(self, views: Iterable[memoryview], length: int) -> None:
        """Marks the first `length` bytes of `views`, taken together, in the log if there is one.

        The views are writable views of this memory, or of its copies. Raises `UsageError` for any
        other among those looked at.
        """
        log = self._dirty_log
        if log is None:
            return
        for view in views:
            if length <= 0:
                break
            written = min(view.nbytes, length)
            if written:
                log.mark(self._gpa_of(view), written)
                length -= written

    def close(self) -> None:
        """Closes all regions of this memory. Closing twice is allowed.

        Views still held elsewhere stay valid: each region's mapping goes with its last view.
        """
        self._dirty_log = None
        self._addresses = []
        for region in self._regions:
            region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GuestMemory {' '.join(map(repr, self._regions)) or 'empty'}>"

    def _copy(self, regions: tuple[Region, ...]) -> Self:
        memory = type(self)(regions)
        memory.dirty_log = self._dirty_log
        return memory

    def _find(self, gpa: int) -> Region | None:
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0:
            region = self._regions[index]
            if gpa - region.gpa < region.size:
                return region
        return None

    def _locate(self, gpa: int, length: int) -> _Span:
        """What the region is that holds the whole range; the next look-up tries it first."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0:
            region = self._regions[index]
            span = region._span
            if gpa < span[1] and 0 <= length <= span[1] - gpa:
                self._last = region
                return span
        _check_range(gpa, length)
        region = self.region_at(gpa)
        end = region.gpa + region.size
        behind = "another region" if end in self else "no memory"
        raise AddressError(
            f"guest-physical {gpa:#x}+{length:#x} runs past the region that ends at {end:#x}; "
            f"behind it is {behind}"
        )

    def _locate_words(self, gpa: int) -> tuple[int, memoryview]:
        """The first gpa and the words of the region with an aligned word at `gpa`."""
        if gpa & 1:
            raise AddressError(f"a 16-bit word at guest-physical {gpa:#x} is not aligned")
        self._locate(gpa, 2)
        region = self.region_at(gpa)
        start, _, words = region._words
        if not words:
            raise AddressError(f"{region!r} lies at an odd address of the host: no word is aligned")
        return start, words

    def _views_over(self, gpa: int, length: int) -> list[memoryview]:
        _check_range(gpa, length)
        region = self.region_at(gpa)
        views = []
        while length:
            offset = gpa - region.gpa
            part = min(length, region.size - offset)
            views.append(region.view[offset : offset + part])
            gpa += part
            length -= part
            if length:
                region = self.region_at(gpa)
        self._last = region
        return views

    def _gpa_of(self, view: memoryview) -> int:
        """The guest-physical address of a view's first byte."""
        try:
            address = address_of(view)
        except TypeError:
            raise UsageError("only writable views in one piece can be marked dirty") from None
        index = bisect_right(self._addresses, address, key=lambda pair: pair[0]) - 1
        if index >= 0:
            start, end, _, base = self._addresses[index][1]._span
            if 0 <= address - base < end - start:
                return start + address - base
        raise UsageError("a view to be marked dirty is not of this memory")


def address_of(view: memoryview) -> int:
    """The host-virtual address of a view's first byte. `TypeError` unless it is writable."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _fence_by_lock() -> None:
    if _fence_lock.acquire(False):
        _fence_lock.release()
    else:
        # Another thread stopped between the two lines above. Failing to take a lock need not be a
        # barrier; waiting for it could be for ever, if this is a signal's handler above them.
        os.sched_yield()


def _fence_by_yield() -> None:
    os.sched_yield()


_fence_lock = threading.Lock()

# Python has no barrier of its own. On x86 and s390x taking a lock is an atomic read-modify-write,
# which is a full barrier there: the cheapest way from Python, 0.1 us. On arm64, riscv and power it
# only acquires, and a later load may still pass an earlier store. There it takes a system call:
# the scheduler's entry has a full barrier (Linux: smp_mb__after_spinlock() in __schedule()), which
# sched_yield(2) reaches always, at 0.2 us and more.
_STRONG = ("x86_64", "amd64", "i386", "i486", "i586", "i686", "s390x")
_strong = platform.machine().lower() in _STRONG
_fence = _fence_by_lock if _strong else _fence_by_yield


def fence() -> None:
    """A full memory barrier: loads and stores after it come after those before it."""
    _fence()


def order_loads() -> None:
    """Loads after it come after loads before it. Costs nothing where the processor sees to that."""
    if not _strong:
        _fence()


def order_stores() -> None:
    """Stores after it come after loads and stores before it, likewise."""
    if not _strong:
        _fence()


def _check_placement(gpa: int, size: int) -> None:
    if size <= 0:
        raise UsageError(f"a region of {size} bytes cannot be mapped")
    if gpa < 0 or gpa + size > _ADDRESS_SPACE:
        raise UsageError(f"a region at {gpa:#x}+{size:#x} is not inside the 64-bit address space")
    if size > sys.maxsize:
        raise UsageError(f"a region of {size:#x} bytes is more than a process can map")


def _check_range(gpa: int, length: int) -> None:
    if length < 0:
        raise UsageError(f"a length of {length} bytes")
    if gpa < 0 or gpa + length > _ADDRESS_SPACE:
        raise AddressError(f"guest-physical {gpa:#x}+{length:#x} wraps around 2^64")


def _swapped(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8


def _open_nameless(name: str) -> int:
    """A fd of an empty file that goes away with its last user."""
    memfd_create = getattr(os, "memfd_create", None)
    if memfd_create is not None:
        fd: int = memfd_create(name)
        return fd
    import tempfile  # seldom needed, and it imports a lot

    fd, path = tempfile.mkstemp(prefix=f"{name}-")
    try:
        os.unlink(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


# mmap(2) by hand: `mmap.mmap` keeps a duplicate of the fd for as long as the mapping lives (up to
# Python 3.13), and a frontend may send hundreds of regions. The offset is 64 bits wide under the
# name mmap64 where libc has it, else under the plain one.
_libc = ctypes.CDLL(None, use_errno=True)
_mmap = getattr(_libc, "mmap64", _libc.mmap)
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_shared(fd: int, offset: int, length: int) -> tuple[memoryview, int]:
    """Maps part of a file; the mapping goes when the last view of it does. View and address."""
    kind = ctypes.c_ubyte * length
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(
            number, f"cannot map {length:#x} bytes of shared memory: {os.strerror(number)}"
        )
    # Views keep the array that they show; the array's end is the mapping's. At exit the kernel
    # unmaps, since a view may then be alive still.
    array = kind.from_address(address)
    weakref.finalize(array, _munmap, address, length).atexit = False
    return memoryview(array).cast("B"), address
