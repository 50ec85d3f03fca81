"""The device's side of a split ring, over memory that a hostile driver writes as it likes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

from fuzz.inputs import Input
from vq.abi import Feature, ring_layout
from vq.errors import DriverError
from vq.inflight import InflightRegion
from vq.memory import GuestMemory, Region
from vq.split_ring import Chain, SplitRing

_LOW, _SEAM, _HOLE = 0x1000, 0x5000, 0x8000
_FAR, _END = 0x10000, 0x12000
MEMORY = GuestMemory.allocate((_LOW, _SEAM - _LOW), (_SEAM, _HOLE - _SEAM), (_FAR, _END - _FAR))
_NOTES = Region.anonymous(0, InflightRegion.size_for(1, 16))
DESC, AVAIL, USED, BUFFERS = 0x1000, 0x1200, 0x1300, 0x2000
_INDIRECT = 0x1800
_FEATURES = (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER)
_ADDRESSES = (
    *(BUFFERS, BUFFERS + 7, _SEAM - 4, _SEAM, _HOLE - 8, _HOLE, _FAR, _END - 1, _END),
    *(_INDIRECT, _INDIRECT + 0x80, _SEAM - 24, 0, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFF000),
    *(DESC, AVAIL, USED),
)
_LENGTHS = (1, 64, 16, 32, 0, 0x1000, 0x3000, 0x3001, 0xFFFFFFFF, 15, 0x100)

BAD = Chain(-1, (), ())
"""Stands for a bad one, which the ring itself gives back."""


def run(data: bytes) -> None:
    """Plays one driver's life against a `SplitRing`, and one more that behaves."""
    _Life(Input(data)).live()


class _Life:
    """One ring, its driver and its device."""

    def __init__(self, source: Input) -> None:
        self.source = source
        self.size = source.pick((4, 8, 1, 2, 16))
        self.features = sum(1 << bit for bit in _FEATURES if source.chance(2))
        self.start = source.pick((0, 0xFFFE, 0xFFFF, 0xFFF0))
        for region in MEMORY.regions:
            region.view[:] = bytes(region.size)
        self.avail_idx = self.start
        self._store("<H", AVAIL + 2, self.avail_idx)
        self._store("<H", USED + 2, self.start)
        log, resubmit = None, list[int]()
        if source.chance(4):
            _NOTES.view[:] = source.take(64).ljust(_NOTES.size, b"\0")
            log = InflightRegion(_NOTES, 1, self.size).queue(0)
            assert log is not None
            try:
                resubmit = log.recover(self.start) or []
            except ValueError:
                log = None
        self.ring = SplitRing(
            MEMORY,
            self.size,
            DESC,
            AVAIL,
            USED,
            features=self.features,
            next_avail=self.start,
            next_used=self.start,
            resubmit=resubmit,
            inflight_log=log,
        )
        self.expected = [bytearray(region.view) for region in MEMORY.regions]
        self.held: list[Chain] = []  # in the order in which they were popped
        self.popped: list[Chain] = []  # those given back meanwhile, too
        self.given = 0
        self.places: dict[int, int] = {}  # of chains in the available ring, by their id
        self.kept: list[Chain] = []

    def steps(self) -> Sequence[Callable[[], None]]:
        """What can happen next."""
        return (
            *(self.offer, self.offer, self.pop, self.pop, self.give_back, self.publish),
            *(self.describe, self.make_available, self.jump, self.scribble, self.table),
            *(self.kicks, self.put_back),
        )

    def act(self) -> None:
        """Does what the bytes say."""
        steps = self.steps()
        for _ in range(200):
            if not self.source.more:
                break
            self.source.pick(steps)()

    def live(self) -> None:
        """Does what the bytes say, then gives all back and starts over."""
        self.act()
        for chain in self.held:
            self._fill(chain)
        self.ring.push_burst(self.held)
        self.given += len(self.held)
        assert self.ring.outstanding == 0 or BAD in self.popped  # it may wait for one put back
        self._check_memory()
        self._start_over()

    # What a driver can do.

    def offer(self) -> None:
        """A chain that is good, more often than not."""
        source = self.source
        head = source.below(self.size)
        count = min(source.pick((1, 1, 2, 3)), self.size)
        writable_from = source.below(count + 1)
        for number in range(count):
            index = (head + number) % self.size
            flags = (2 if number >= writable_from else 0) | (number < count - 1)
            address = BUFFERS + 0x100 * source.below(16)
            self._describe(index, address, source.pick(_LENGTHS), flags, (index + 1) % self.size)
        self._make_available(head)

    def describe(self) -> None:
        source = self.source
        self._describe(
            source.below(self.size),
            source.pick(_ADDRESSES),
            source.pick(_LENGTHS),
            source.pick((0, 1, 2, 3, 4, 5, 6, 7, 0xFFFF)),
            source.pick((0, 1, self.size - 1, self.size, 0xFFFF)),
        )

    def table(self) -> None:
        """An entry of an indirect table, and a descriptor for the table."""
        source = self.source
        index = source.below(8)
        entry = (
            source.pick(_ADDRESSES),
            source.pick(_LENGTHS),
            source.pick((0, 1, 2, 3, 4, 5)),
            source.pick((index + 1, 0, 7, 0xFFFF)),
        )
        self._write(_INDIRECT + 16 * index, struct.pack("<QIHH", *entry))
        if source.chance(2):
            head = source.below(self.size)
            length = source.pick((16, 32, 64, 128, 0x10000, 24, 0))
            self._describe(head, _INDIRECT, length, source.pick((4, 4, 4, 5, 6)), 0)
            self._make_available(head)

    def make_available(self) -> None:
        self._make_available(self.source.pick((0, 1, self.size - 1, self.size, 0xFFFF)))

    def jump(self) -> None:
        self.avail_idx += self.source.pick((1, self.size, self.size + 1, 0x8000, 0xFFFF))
        self._store("<H", AVAIL + 2, self.avail_idx & 0xFFFF)

    def scribble(self) -> None:
        place = DESC + self.source.u16 % 0x400
        data = self.source.take(self.source.below(9))
        if place + len(data) <= USED or place >= USED + ring_layout(self.size).used_bytes:
            self._write(place, data)

    # What a device can do.

    def pop(self) -> None:
        place, left_over = self.ring.next_avail, len(self.ring.left_over)
        try:
            chains = self.ring.pop_burst(self.source.pick((1, 2, 64)))
        except DriverError as error:
            assert error.section, "an error without its section"
            self.popped.append(BAD)
            return
        heads = {chain.head for chain in self.held}
        for chain in chains:
            assert chain.head not in heads and chain.head < self.size, "a chain given out twice"
            heads.add(chain.head)
            assert chain.readable_size + chain.writable_size <= 1 << 32
            assert len(chain.readable) + len(chain.writable) <= 3 * self.size + 3
            if len(self.ring.left_over) == left_over:
                self.places.setdefault(id(chain), place)
                place += 1
        self.held += chains
        self.popped += chains
        self.kept += chains  # so that nobody else gets the same id

    def give_back(self) -> None:
        if self.held:
            chain = self.held.pop(self.source.below(len(self.held)))
            self._fill(chain)
            self.ring.write_used(chain)
            self.given += 1

    def publish(self) -> None:
        before = self.used_idx
        count = self.ring.publish()
        assert (self.used_idx - before) & 0xFFFF == count
        self.ring.should_notify()

    def kicks(self) -> None:
        if self.source.chance(2):
            self.ring.disable_kicks()
            return
        try:
            self.ring.enable_kicks()
        except DriverError:
            return

    def put_back(self) -> None:
        count = min(len(self.held), self.source.below(4))
        good = [chain for chain in self.popped if chain is not BAD]
        if count and self.held[-count:] == good[-count:]:  # as `undo_pop` demands
            self.ring.undo_pop(self.held[-count:])
            for chain in self.held[-count:]:
                self.popped.remove(chain)
            del self.held[-count:]
            # A later device finds each of them, by its place or by name.
            later = [c for c in self.ring._undone if c.head not in self.ring.left_over]
            for number, chain in enumerate(later):
                place = self.places[id(chain)] & 0xFFFF
                assert place == (self.ring.next_avail + number) & 0xFFFF, "lost when put back"

    # How it is done.

    @property
    def used_idx(self) -> int:
        return int.from_bytes(MEMORY.read(USED + 2, 2), "little")

    def _make_available(self, head: int) -> None:
        slot = self.avail_idx % self.size
        self._store("<H", AVAIL + 4 + 2 * slot, head)
        self.avail_idx += 1
        self._store("<H", AVAIL + 2, self.avail_idx & 0xFFFF)

    def _describe(self, index: int, *fields: int) -> None:
        self._write(DESC + 16 * index, struct.pack("<QIHH", *fields))

    def _store(self, form: str, gpa: int, value: int) -> None:
        self._write(gpa, struct.pack(form, value & 0xFFFF))

    def _write(self, gpa: int, data: bytes) -> None:
        MEMORY.write(gpa, data)
        if hasattr(self, "expected"):
            self.expect(gpa, data)

    def expect(self, gpa: int, data: bytes) -> None:
        for region, expected in zip(MEMORY.regions, self.expected, strict=True):
            first, last = max(gpa, region.gpa), min(gpa + len(data), region.gpa + region.size)
            if first < last:
                start = first - region.gpa
                expected[start : start + last - first] = data[first - gpa : last - gpa]

    def _fill(self, chain: Chain) -> None:
        """Writes into the buffers what a device would, as far as they are not the ring itself."""
        chain.written = chain.writable_size & 0xFFFF
        for view in chain.writable:
            if len(view) <= 0x100:
                start = place_of(view)
                if start >= BUFFERS:
                    view[:] = b"\xdd" * len(view)
                    self.expect(start, bytes(view))

    def _check_memory(self) -> None:
        """Nothing is written but used elements and the ring's words for notifications."""
        layout = ring_layout(self.size)
        for region, expected in zip(MEMORY.regions, self.expected, strict=True):
            if region.gpa <= USED < region.gpa + region.size:
                start = USED - region.gpa
                now = region.view[start : start + layout.used_bytes]
                expected[start : start + layout.used_bytes] = now
            assert region.view == expected, "memory that was not lent has changed"
        flags = int.from_bytes(MEMORY.read(USED, 2), "little")
        assert flags in (0, 1)

    def _start_over(self) -> None:
        """A driver that behaves gets what it wants from a new ring over the same memory."""
        MEMORY.write(DESC, bytes(0x400))
        MEMORY.write(DESC, struct.pack("<QIHH", BUFFERS, 8, 0, 0))
        MEMORY.write(AVAIL + 2, struct.pack("<HH", 1, 0))
        ring = SplitRing(MEMORY, self.size, DESC, AVAIL, USED, features=self.features)
        chain = ring.pop()
        assert chain is not None and chain.readable_size == 8
        ring.push_burst([chain])
        assert MEMORY.read(USED + 2, 6) == struct.pack("<HI", 1, 0)


def place_of(view: memoryview) -> int:
    """The guest-physical address of a view's first byte."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for region in MEMORY.regions:
        if 0 <= address - region.address < region.size:
            return region.gpa + address - region.address
    raise AssertionError("a view that is not of the guest's memory")
