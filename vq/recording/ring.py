"""What a driver put into a ring, copied out and put back: chains as the device finds them.

`RecordingRing` is a device's ring that tells what it finds and does. `Found` is what it found at
one look, with its place in an event (`Kind.CHAINS`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vq.abi import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from vq.errors import AddressError, CaptureError, DriverError
from vq.memory import GuestMemory, order_loads
from vq.recording.format import Kind, RecordingWriter
from vq.recording.sample import Sample
from vq.split_ring import SplitRing

__all__ = ["Found", "FoundChain", "RecordingRing", "sample_of"]

_DESCRIPTOR = struct.Struct("<QIHH")
_ELEMENT = struct.Struct("<II")
_MOST_IN_CHAIN = 4 << 20
"""Bytes that are copied of one chain at most, so that no driver makes us copy all its memory again
and again."""
_MOST_IN_TABLE = 16 << 16

Descriptor = tuple[int, int, int, int, int]
"""Place in the table, addr, len, flags, next."""


class FoundChain(NamedTuple):
    """A chain with all that the device may read of it."""

    head: int
    descriptors: list[Descriptor]
    """Those in the ring's own table."""
    tables: list[tuple[int, bytes]]
    """Indirect tables: where, and what is in them."""
    buffers: list[tuple[int, bytes]]
    """Device-readable buffers: where, and what is in them."""

    def writable(self) -> list[tuple[int, int]]:
        """Device-writable buffers, ``(gpa, length)``, as far as the chain leads to them."""
        found: list[tuple[int, int]] = []
        for _, addr, length, flags, _ in self.descriptors:
            if flags & DESC_F_INDIRECT:
                found += _writable_of_table(next((t for g, t in self.tables if g == addr), b""))
            elif flags & DESC_F_WRITE:
                found.append((addr, length))
        return found


def _writable_of_table(table: bytes) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    place = 0
    for _ in range(len(table) // 16):
        if 16 * place + 16 > len(table):
            break
        addr, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * place)
        if flags & DESC_F_WRITE:
            found.append((addr, length))
        if not flags & DESC_F_NEXT:
            break
        place = following
    return found


@dataclass
class Found:
    """What the device found in a queue at one look."""

    queue: int
    index: int
    """`avail.idx`."""
    position: int
    """Of the first chain in the available ring."""
    in_ring: bool
    """Whether the chains stand in the available ring; else an earlier device took them from it."""
    misses: int = 0
    """How often the device looked before without finding anything new, since the last cause."""
    chains: list[FoundChain] = field(default_factory=list)

    def event(self) -> tuple[list[int], list[bytes]]:
        """The numbers and the strings of a `Kind.CHAINS` event."""
        numbers = [self.queue, self.index, self.position, int(self.in_ring), self.misses]
        numbers.append(len(self.chains))
        strings: list[bytes] = []
        for chain in self.chains:
            numbers += (
                chain.head,
                len(chain.descriptors),
                len(chain.tables),
                len(chain.buffers),
            )
            for descriptor in chain.descriptors:
                numbers += descriptor
            for gpa, data in (*chain.tables, *chain.buffers):
                numbers.append(gpa)
                strings.append(data)
        return numbers, strings

    @classmethod
    def from_event(cls, numbers: Sequence[int], strings: Sequence[bytes]) -> Found:
        """The opposite; raises `CaptureError`."""
        try:
            left, data = iter(numbers), iter(strings)
            queue, index, position, in_ring, misses, count = (next(left) for _ in range(6))
            found = cls(queue, index, position, bool(in_ring), misses)
            for _ in range(count):
                head, descriptors, tables, buffers = (next(left) for _ in range(4))
                found.chains.append(
                    FoundChain(
                        head,
                        [
                            (next(left), next(left), next(left), next(left), next(left))
                            for _ in range(descriptors)
                        ],
                        [(next(left), next(data)) for _ in range(tables)],
                        [(next(left), next(data)) for _ in range(buffers)],
                    )
                )
        except (StopIteration, RuntimeError):
            raise CaptureError("the recording is damaged: half a chain") from None
        return found

    def put(self, memory: GuestMemory, size: int, desc: int, avail: int) -> None:
        """Puts the chains into a ring of `size` descriptors, as the driver had done it."""
        for number, chain in enumerate(self.chains):
            for place, *fields in chain.descriptors:
                memory.write(desc + 16 * place, _DESCRIPTOR.pack(*fields))
            for gpa, data in (*chain.tables, *chain.buffers):
                memory.write(gpa, data)
            if self.in_ring:
                slot = (self.position + number) & (size - 1)
                memory.store16(avail + 4 + 2 * slot, chain.head)
        memory.store16(avail + 2, self.index)


def sample_of(memory: GuestMemory, buffers: Iterable[tuple[int, int]], written: int) -> Sample:
    """The first `written` bytes of a chain's device-writable buffers."""
    pieces: list[memoryview] = []
    for gpa, length in buffers:
        if written <= 0:
            break
        with suppress(AddressError):
            pieces += memory.views(gpa, min(length, written))
        written -= length
    return Sample.of(pieces)


class RecordingRing(SplitRing):
    """A ring that writes down what it finds before it is used, and what goes back."""

    def __init__(
        self,
        writer: RecordingWriter,
        queue: int,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        resubmit: Iterable[int] = (),
        **options: Any,
    ) -> None:
        heads = list(resubmit)
        super().__init__(memory, size, desc, avail, used, resubmit=heads, **options)
        self._writer = writer
        self._queue = queue
        self._descriptors_gpa = desc
        self._avail_gpa = avail
        self._used_gpa_of_ring = used + 4
        self._recording = True
        self._seen = self.next_avail
        self._cause = writer.causes
        self._misses = 0
        self._told = self.next_used
        self._writable: dict[int, list[tuple[int, int]]] = {}  # by head, what may be written
        if heads:
            self._write_found(self._seen, self._seen, heads, in_ring=False)

    def stop_recording(self) -> None:
        """From now on this is a ring like any other."""
        self._recording = False

    def waiting(self) -> int:
        """Every way to take chains begins here: what is there is written down first."""
        if not self._recording:
            return super().waiting()
        try:
            count = super().waiting()
        except DriverError:
            self._look(self._next_avail)  # there it goes on after an impossible index
            raise
        self._look(self._next_avail + count & 0xFFFF)
        return count

    def publish(self) -> int:
        """See `SplitRing`. What goes back is written down while it is the device's still."""
        count = self.next_used - self._told & 0xFFFF
        if count and self._recording:
            numbers = [self._queue]
            strings = []
            for position in range(self._told, self._told + count):
                place = self._used_gpa_of_ring + 8 * (position & (self.size - 1))
                head, written = _ELEMENT.unpack(self.memory.read(place, 8))
                numbers += (head, written)
                strings.append(sample_of(self.memory, self._writable.pop(head, []), written).pack())
            self._told = self.next_used
            self._writer.write(Kind.USED, numbers, strings)
        return super().publish()

    def should_notify(self) -> bool:
        """See `SplitRing`."""
        called = super().should_notify()
        if called and self._recording:
            self._writer.write(Kind.CALL, [self._queue])
        return called

    def _driver_wish(self) -> int:
        """The wish that is written down is the one that the device goes by: a guest that runs
        beside it may have changed it by the time of another look."""
        wish = super()._driver_wish()
        if self._recording:
            flags, used_event = (0, wish) if self._event_idx else (wish, 0)
            self._writer.write(Kind.WISH, (self._queue, flags, used_event))
        return wish

    def _look(self, index: int) -> None:
        """Writes down what became available up to `index`, if that was not done yet."""
        if self._writer.causes != self._cause:
            self._cause = self._writer.causes
            self._misses = 0
        count = index - self._seen & 0xFFFF
        if not count:
            self._misses += 1
            return
        order_loads()  # the entries are read after the index that covers them (2.7.13.3)
        heads = []
        if count <= self.size:
            for position in range(self._seen, self._seen + count):
                slot = position & (self.size - 1)
                heads.append(self.memory.load16(self._avail_gpa + 4 + 2 * slot))
        self._write_found(index, self._seen, heads, in_ring=True)
        self._seen = index

    def _write_found(
        self, index: int, position: int, heads: Iterable[int], *, in_ring: bool
    ) -> None:
        found = Found(self._queue, index, position, in_ring, self._misses)
        self._misses = 0
        found.chains = [self._read_chain(head) for head in heads]
        self._writer.write(Kind.CHAINS, *found.event())

    def _read_chain(self, head: int) -> FoundChain:
        """Copies a chain as far as it makes sense: judging it is not our business."""
        chain = FoundChain(head, [], [], [])
        place = head
        room = _MOST_IN_CHAIN
        for _ in range(self.size):
            if place >= self.size:
                break
            entry = _DESCRIPTOR.unpack(self.memory.read(self._descriptors_gpa + 16 * place, 16))
            chain.descriptors.append((place, *entry))
            addr, length, flags, following = entry
            if flags & DESC_F_INDIRECT:
                room = self._read_table(chain, addr, length, room)
            elif not flags & DESC_F_WRITE:
                room = self._read_buffer(chain.buffers, addr, length, room)
            if not flags & DESC_F_NEXT:
                break
            place = following
        self._writable.setdefault(head, chain.writable())  # one in use already keeps its own
        return chain

    def _read_table(self, chain: FoundChain, addr: int, length: int, room: int) -> int:
        """An indirect table, up to where its chain ends; returns the room that is left."""
        tables: list[tuple[int, bytes]] = []
        room = self._read_buffer(tables, addr, min(length, _MOST_IN_TABLE), room)
        for gpa, table in tables:
            place = last = 0
            for _ in range(self.size + 1):
                if 16 * place + 16 > len(table):
                    break
                last = max(last, place)
                data, size, flags, following = _DESCRIPTOR.unpack_from(table, 16 * place)
                if not flags & (DESC_F_WRITE | DESC_F_INDIRECT):
                    room = self._read_buffer(chain.buffers, data, size, room)
                if not flags & DESC_F_NEXT:
                    break
                place = following
            chain.tables.append((gpa, table[: 16 * (last + 1)]))
        return room

    def _read_buffer(
        self, buffers: list[tuple[int, bytes]], addr: int, length: int, room: int
    ) -> int:
        if not 0 < length <= room:
            return room
        try:
            buffers.append((addr, self.memory.read(addr, length)))
        except AddressError:
            return room
        return room - length
