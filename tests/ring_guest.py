"""The driver's side of a split ring by hand: `Guest` places any bytes that a driver could, and most
that none should."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterable, Sequence

import pytest

from vq.abi import Feature
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

needs_vectors = pytest.mark.skipif(
    sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8,
    reason="a descriptor has the form of a struct iovec on 64-bit little-endian machines only",
)

INDIRECT = 1 << Feature.INDIRECT_DESC
EVENT_IDX = 1 << Feature.EVENT_IDX
IN_ORDER = 1 << Feature.IN_ORDER
NEXT, WRITE, TABLE = 1, 2, 4  # virtio 1.3, 2.7.5

TOP = 1 << 64
# Two regions side by side, a hole, a third, and one at the very end of the address space.
LAYOUT = ((0, 0x10000), (0x10000, 0x10000), (0x40000, 0x10000), (TOP - 0x10000, 0x10000))
SEAM, HOLE, THIRD = 0x10000, 0x20000, 0x40000
RAM = ((0, 0x20000), (0x40000, 0x50000), (TOP - 0x10000, TOP))

DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000
BUFFERS = 0x8000


class Guest:
    """The driver's side by hand: descriptors, available entries, and a look at what was used."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 8,
        start: int = 0,
        places: Sequence[int] = (DESC, AVAIL, USED),
    ) -> None:
        self.memory = memory
        self.size = size
        self.places = list(places)
        if size > 256:
            self.places = [0, 0x80000, 0xA0000]
        self.start = start
        self.offered = start
        self.seen = start
        self.memory.write(self.places[1], struct.pack("<HH", 0, start))
        self.memory.write(self.places[2], struct.pack("<HH", 0, start))

    def ring(self, features: int = 0, **more: object) -> SplitRing:
        more.setdefault("next_avail", self.start)
        more.setdefault("next_used", self.start)
        return SplitRing(self.memory, self.size, *self.places, features=features, **more)  # type: ignore[arg-type]

    def desc(self, index: int, gpa: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(
            self.places[0] + 16 * index, struct.pack("<QIHH", gpa, length, flags, following)
        )

    def table(self, gpa: int, *descriptors: tuple[int, int, int, int]) -> int:
        """An indirect table at `gpa`; returns its length in bytes."""
        self.memory.write(gpa, b"".join(struct.pack("<QIHH", *d) for d in descriptors))
        return 16 * len(descriptors)

    def offer(self, *heads: int) -> None:
        for head in heads:
            slot = self.offered % self.size
            self.memory.write(self.places[1] + 4 + 2 * slot, struct.pack("<H", head))
            self.offered = (self.offered + 1) % 65536
        self.memory.write(self.places[1] + 2, struct.pack("<H", self.offered))

    def used(self) -> list[tuple[int, int]]:
        """The elements that used.idx has passed since this was last asked."""
        elements = []
        while self.seen != self.used_idx:
            place = self.places[2] + 4 + 8 * (self.seen % self.size)
            elements.append(struct.unpack("<II", self.memory.read(place, 8)))
            self.seen = (self.seen + 1) % 65536
        return elements

    @property
    def used_idx(self) -> int:
        return int.from_bytes(self.memory.read(self.places[2] + 2, 2), "little")

    @property
    def used_flags(self) -> int:
        return int.from_bytes(self.memory.read(self.places[2], 2), "little")

    @property
    def avail_event(self) -> int:
        place = self.places[2] + 4 + 8 * self.size
        return int.from_bytes(self.memory.read(place, 2), "little")

    def want_calls(self, *, flags: int = 0, used_event: int = 0) -> None:
        self.memory.write(self.places[1], struct.pack("<H", flags))
        self.memory.write(self.places[1] + 4 + 2 * self.size, struct.pack("<H", used_event))

    def all_but_the_used_ring(self) -> list[bytes]:
        contents = [bytearray(region.view) for region in self.memory.regions]
        contents[0][USED : USED + 6 + 8 * self.size] = bytes(6 + 8 * self.size)
        return [bytes(content) for content in contents]


def fill_singles(guest: Guest, *, flags: int = WRITE, length: int = 16) -> None:
    """Every descriptor a chain of its own, with a buffer of its own."""
    for index in range(guest.size):
        guest.desc(index, BUFFERS + 32 * index, length, flags)


class Notes:
    """An `InflightLog` that keeps every call, with used.idx as the driver sees it then."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.calls: list[tuple[object, ...]] = []

    def popped(self, heads: Iterable[int]) -> None:
        self.calls.append(("popped", *heads))

    def unpopped(self, heads: Iterable[int]) -> None:
        self.calls.append(("unpopped", *heads))

    def publishing(self, heads: Sequence[int], used_idx: int) -> None:
        # The elements are in place and not seen yet.
        assert self.guest.used_idx == (used_idx - len(heads)) % 65536
        for number, head in enumerate(heads):
            slot = (used_idx - len(heads) + number) % self.guest.size
            place = self.guest.places[2] + 4 + 8 * slot
            assert int.from_bytes(self.guest.memory.read(place, 4), "little") == head
        self.calls.append(("publishing", *heads, used_idx))

    def published(self, heads: Sequence[int], used_idx: int) -> None:
        assert self.guest.used_idx == used_idx
        self.calls.append(("published", *heads, used_idx))

    def take(self) -> list[tuple[object, ...]]:
        calls, self.calls = self.calls, []
        return calls
