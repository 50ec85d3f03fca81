"""Chains that are all alike, many at a time: what a busy driver of small frames offers.

Such a driver hands out a queue's descriptors in turn, and all its buffers have one length. Then the
copy that is made of the descriptors is compared with what it should be, as a whole, and turned into
what a system call takes, without a column of its own for each field as a `vq.ring_run.Run` has.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

from vq.errors import AddressError
from vq.lanes import Lanes
from vq.memory import address_of, order_loads
from vq.split_ring import SplitRing

__all__ = ["Row"]

_DESCRIPTORS = Lanes(128)
_SIZE = 16  # bytes of a descriptor; of a vector, too
_NEXT = 0xFFFF << 112  # means nothing in a chain of one descriptor
_ALL = (1 << 128) - 1
_DETOUR = 8
"""Bursts that are not looked at after one that was not alike."""
# A `struct iovec` of two 64-bit words has address and length where a descriptor has them.
_VECTORS_FIT = sys.byteorder == "little" and ctypes.sizeof(ctypes.c_void_p) == 8


class Row:
    """The chains that come next in a ring, if they are all alike.

    That is: heads in turn, and each chain one device-readable buffer, all of the same length and in
    one region. `look` finds out how many there are. It takes none of them: they stay in the ring
    until `give_back`, or for whoever takes them otherwise. What it read is checked as
    `SplitRing.pop_burst` checks, and is a copy: `count` chains of `length` bytes each, and in
    `vectors` a `struct iovec` for each buffer, in the host's addresses. What is not of this kind is
    left alone, bad chains too.

    The buffers stay mapped for as long as the ring is there.
    """

    def __init__(self, ring: SplitRing) -> None:
        self.count = 0
        self.length = 0
        self.vectors = b""
        self._ring = ring
        self._first = 0  # the head of the first chain
        self._detour = 0  # bursts that are not looked at
        self._set_region(ring._window)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"<Row of {self.count}>"

    def look(self, waiting: int, limit: int) -> int:
        """Reads up to `limit` of the chains that wait; returns how many.

        `waiting` is how many there are, as `SplitRing.waiting` said. None when they are not all
        alike, and for a few bursts after that; while the ring has or the device holds some that
        come before them; and where somebody keeps a log of what the device holds.
        """
        self.count = 0
        self._detour -= 1
        if self._detour >= 0:
            return 0
        self._detour = _DETOUR  # until all goes well
        ring = self._ring
        if ring._undone or ring._resubmit or ring._order or ring._inflight_log is not None:
            return 0
        slot = ring._next_avail & (ring.size - 1)
        count = min(waiting, limit, ring.size - slot)
        if count <= 0 or not _VECTORS_FIT:
            return 0
        order_loads()  # the entries are read after the index that covers them (2.7.13.3)
        heads = ring._avail[4 + 2 * slot : 4 + 2 * (slot + count)].tobytes()
        first = int.from_bytes(heads[:2], "little")
        end = first + count
        if heads != ring._words_in_turn[2 * first : 2 * end]:
            return 0
        copy = ring._table[_SIZE * first : _SIZE * end].tobytes()
        if copy[-8:-4] != copy[8:12]:  # where lengths differ these two mostly do, too
            return 0
        if ring._outstanding[first:end].count(None) != count:
            return 0
        self.length = int.from_bytes(copy[8:12], "little")
        vectors = self._vectors(copy)
        if not vectors:
            return 0
        self.vectors, self._first, self.count = vectors, first, count
        self._detour = 0
        return count

    def give_back(self, count: int) -> None:
        """Takes the first `count` of those that `look` read, and writes their used elements.

        Nothing was written to them. The driver sees them after `SplitRing.publish`. Another `look`
        comes before the next `give_back`.
        """
        ring, self.count = self._ring, 0
        ring._next_avail = (ring._next_avail + count) & 0xFFFF
        taken = slice(self._first, self._first + count)
        ring._write_unwritten(ring._heads[taken], ring._elements_in_turn[taken])

    def _vectors(self, copy: bytes) -> bytes:
        """The vectors for descriptors of which the first is of the right kind; none unless all are,
        and all their buffers in one region."""
        if vectors := _vectors_in_region(copy, *self._region):
            return vectors
        first = int.from_bytes(copy[:8], "little")
        start, room, _ = self._region
        if start <= first < start + room:
            return b""
        try:  # it may be another region from now on
            self._set_region(self._ring._window_at(first))
        except AddressError:
            return b""
        return _vectors_in_region(copy, *self._region)

    def _set_region(self, region: tuple[int, int, memoryview]) -> None:
        start, room, view = region
        self._region = start, room, address_of(view)


@lru_cache(maxsize=1024)
def _vectors_in_region(copy: bytes, start: int, room: int, base: int) -> bytes:
    """The vectors for a copy of descriptors, if all are like the first and their buffers lie in the
    region of `room` bytes at `start`, whose first byte is at `base`; else none.

    Remembered, since drivers that poll have few buffers and offer the same rows of them again.
    """
    count, length = len(copy) // _SIZE, int.from_bytes(copy[8:12], "little")
    expected = _expected(count, length, start, room, base)
    if expected is None:
        return b""
    lowest, outside, slack, beyond, vectors, all_but_next = expected
    # The first lane that is less than it should be takes from its own upper bits, which shows.
    column = _DESCRIPTORS.column(copy) - lowest
    if column & outside or column + slack & beyond:
        return b""
    return (column + vectors & all_but_next).to_bytes(_SIZE * count, "little")


@lru_cache(maxsize=64)
def _expected(
    count: int, length: int, start: int, room: int, base: int
) -> tuple[int, int, int, int, int, int] | None:
    """What to compare so many descriptors with, of buffers of `length` bytes in the region of
    `room` bytes at `start`, and how to make vectors of them.

    Each is a number for all of them, a descriptor in a lane of 128 bits: the lowest descriptor that
    there can be; the bits that no other differs in from that; what to add to the difference so that
    a bit comes up where the buffer would reach beyond the region, and that bit; what to add so that
    it becomes a vector, whose first byte is at `base`; and the bits of that which count. None where
    no such buffer can be.
    """
    if not 0 < length <= room:
        return None
    most = room - length
    bits = most.bit_length()
    fill = _DESCRIPTORS.fill
    return (
        fill(start | length << 64, count),
        fill(_ALL & ~_NEXT & ~((1 << bits) - 1), count),
        fill((1 << bits) - 1 - most, count),
        fill(1 << bits, count),
        fill(base | length << 64, count),
        fill(_ALL & ~_NEXT, count),
    )
