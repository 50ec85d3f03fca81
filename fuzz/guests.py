"""Guests that need not be well behaved, for any device; for a net device, a link that keeps all."""

from __future__ import annotations

import select
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fuzz.inputs import Input
from vq.abi import (
    CTRL_ERR,
    CTRL_OK,
    DESC_F_INDIRECT,
    DESC_F_WRITE,
    Feature,
    NetFeature,
    Status,
    feature_mask,
)
from vq.device import Device
from vq.driver import Driver, DriverRing, GuestBuffer
from vq.errors import AddressError, DriverError, UsageError
from vq.link import MAX_FRAME, Frame, Link, Port, Room, scatter
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.offload import ALL, Offload

__all__ = [
    "ARENA",
    "GUEST_MAC",
    "RINGS",
    "RING_CHOICES",
    "Cable",
    "Guest",
    "NetGuest",
    "guest_memory",
    "some_features",
]

RINGS, _SEAM, _END = 0x1000, 0x10000, 0x1C000
ARENA = 0x8000
"""Where a guest's buffers lie; its rings are below."""
RING_CHOICES = (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER, Feature.RING_RESET)
_DESCRIPTOR = struct.Struct("<QIHH")
GUEST_MAC = b"\2\0\0\0\0\3"


def guest_memory() -> GuestMemory:
    """Memory of two regions side by side, for a guest's rings and buffers."""
    return GuestMemory.allocate((RINGS, _SEAM - RINGS), (_SEAM, _END - _SEAM))


_MEMORY = guest_memory()


def some_features(source: Input, choices: Iterable[int]) -> int:
    """Some of these feature bits; VERSION_1 always."""
    return feature_mask((Feature.VERSION_1, *(bit for bit in choices if source.chance(2))))


class Cable(Link):
    """A link of one port that keeps what is written and gives what was put in."""

    name = "cable"
    delivers = ALL

    def __init__(self, accepts: Offload) -> None:
        self.accepts = accepts
        self.port = _CablePort()
        self.ports = (self.port,)

    def close(self) -> None:
        """Nothing is held."""


class _CablePort(Port):
    def __init__(self) -> None:
        super().__init__()
        self.takes = 1 << 30
        self.written: list[tuple[bytes, bytes]] = []
        self.waiting: deque[tuple[bytes, bytes]] = deque()

    def write_burst(self, frames: Sequence[Frame]) -> int:
        taken = frames[: self.takes]
        self.takes -= len(taken)
        for frame in taken:
            assert isinstance(frame[0], bytes) and len(frame[0]) == 12, "no private header"
            size = sum(map(len, frame[1:]))
            self.written.append((frame[0], b"".join(frame[1:]) if size <= MAX_FRAME else b""))
        return len(taken)

    def read_burst(self, room: Room, limit: int) -> int:
        moved = 0
        while moved < limit and self.waiting:
            views = room.views()
            if not views:
                break
            header, data = self.waiting.popleft()
            if len(data) <= sum(map(len, views)):
                scatter((data,), views)
                room.commit(header, len(data))
                moved += 1
        return moved


class Guest:
    """Brings a device up; offers chains of any kind; checks what the device did to the memory.

    Whatever the guest does, nothing may come out of the device but a fault that is a `DriverError`.
    """

    def __init__(
        self, device: Device, wanted: int, *, memory: GuestMemory = _MEMORY, queue_size: int = 16
    ) -> None:
        for region in memory.regions:
            region.view[:] = bytes(region.size)
        self.memory = memory
        device.memory = memory
        self.device = device
        self.wanted = wanted
        self.queue_size = queue_size
        self.unruly = False
        """Whether the rings were scribbled on: then the books of the driver's side are off."""
        self.overlapping = False
        """Whether one place was used for two buffers: then what is in them has no meaning."""
        self.driver: Driver
        self._described: set[GuestBuffer] = set()  # what a descriptor ever let the device write
        self._tables: set[GuestBuffer] = set()  # indirect ones
        self.bring_up()

    def bring_up(self) -> None:
        """Probes the device, as after a reset."""
        self.driver = Driver(self.device, self.memory, self.wanted, queue_size=self.queue_size)
        self.driver.negotiate()
        needs = self.device.feature_needs
        assert not any(
            self.driver.features >> bit & 1 and not need & self.driver.features
            for bit, need in needs.items()
        )
        for index in self.queues_used():
            self.driver.setup_queue(index)
        self.driver.start()
        self.unruly = self.overlapping = False
        self._described.clear()
        self._tables.clear()
        self.place = ARENA

    def queues_used(self) -> Iterable[int]:
        """The queues that the guest sets up."""
        return range(self.device.queue_count)

    def has(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return self.driver.has_feature(bit)

    def ring(self, index: int) -> DriverRing:
        """A queue as the driver sees it."""
        return self.driver.queues[index]

    def buffer(self, source: Input, length: int, *, align: int = 1) -> GuestBuffer:
        """A free place for so many bytes, perhaps over the seam of two regions, perhaps odd."""
        place = self.place + source.pick((0, 0, 1, 7, 64))
        if source.chance(16):
            place = max(ARENA, _SEAM - length // 2)
        place += -place % align
        if place + length > _END:
            place = ARENA
        self.overlapping |= place < self.place
        self.place = place + length
        return place, length

    def start_at_front(self) -> None:
        """All buffers are the guest's: new ones go where the first ones were."""
        if not any(ring.in_flight for ring in self.driver.queues.values()) and not self.unruly:
            self.place = ARENA
            self.overlapping = False
            self._tables.clear()

    def place_pieces(self, source: Input, data: bytes) -> list[GuestBuffer]:
        """Puts bytes into buffers of the guest's, cut where the source says."""
        buffers = []
        for start, end in self._cut(source, len(data)):
            gpa, _ = buffer = self.buffer(source, end - start)
            if end > start:
                self.memory.write(gpa, data[start:end])
            buffers.append(buffer)
        return buffers

    def room(self, source: Input, length: int) -> list[GuestBuffer]:
        """Buffers of so many bytes in all for the device to write, cut where the source says."""
        return [self.buffer(source, end - start) for start, end in self._cut(source, length)]

    def _cut(self, source: Input, length: int) -> list[tuple[int, int]]:
        cuts = sorted(min(length, source.u8) for _ in range(source.pick((0, 0, 1, 1, 2, 4))))
        return list(zip([0, *cuts], [*cuts, length], strict=True))

    def offer(
        self,
        index: int,
        readable: Sequence[GuestBuffer],
        writable: Sequence[GuestBuffer] = (),
        *,
        table: int | None = None,
        direct: int = 0,
    ) -> bool:
        """Adds a chain, with its descriptors behind the first `direct` ones in an indirect table;
        False when there is no room for it."""
        try:
            self.ring(index).add(
                readable, writable, token=tuple(writable), indirect=table, direct=direct
            )
        except UsageError:
            return False
        self.ring(index).publish()
        return True

    def offer_in_any_way(
        self,
        source: Input,
        index: int,
        readable: Sequence[GuestBuffer],
        writable: Sequence[GuestBuffer] = (),
    ) -> bool:
        """Adds a chain, perhaps with an indirect table."""
        if not source.chance(4) or not self.has(Feature.INDIRECT_DESC):
            return self.offer(index, readable, writable)
        table, _ = self.buffer(source, 16 * (len(readable) + len(writable)))
        if not _SEAM - 16 * 32 < table < _SEAM:
            direct = source.pick((0, 0, 0, 1))
            self._tables.add((table, 16 * (len(readable) + len(writable))))
            return self.offer(index, readable, writable, table=table, direct=direct)
        return self.offer(index, readable, writable)

    def scribble(self, source: Input) -> None:
        """Writes into the rings what no driver writes."""
        self.unruly = True
        index = source.pick(list(self.driver.queues))
        ring = self.ring(index)
        what = source.below(4)
        if what == 0:
            ring.poke_descriptor(
                source.below(ring.size),
                source.pick((ARENA, _SEAM - 8, _END - 4, _END, 0, ring.desc, 1 << 63)),
                source.pick((64, 0, 2000, 12, 0x40000, 0xFFFFFFFF)),
                source.pick((0, 1, 2, 3, 4, 5, 6)),
                source.pick((0, 1, 15, 16)),
            )
        elif what == 1:
            ring.poke_avail(source.below(ring.size), source.pick((0, 1, 15, 16, 0xFFFF)))
        elif what == 2:
            index = int.from_bytes(self.memory.read(ring.avail + 2, 2), "little")
            ring.poke_avail_index(index + source.pick((1, 2, 16, 17, 0x8000)))
        else:
            ring.poke_avail_flags(source.u16)

    def kick(self, index: int) -> None:
        """Lets the device work, and checks what it did."""
        with self.watched(index):
            self.device.notify(index)
            assert self.device.settle(), "work without end"

    @contextmanager
    def watched(self, index: int = -1) -> Iterator[None]:
        """Checks that nothing changes but what is lent: used rings and writable buffers.

        Of a guest that keeps no books that is what any of its descriptors named so far. When it
        lends descriptors themselves, there is no telling.
        """
        rings = self.driver.queues.values()
        lent = [(ring.used, 6 + 8 * ring.size) for ring in rings]
        for ring in rings:
            for chain in ring._in_flight.values():
                lent += chain.token
            if self.unruly or self.overlapping:
                self._described |= set(self._writable(ring.desc, ring.size))
        lent += self._described
        buffers = lent[len(rings) :]
        untold = any(gpa < ARENA or _overlap(gpa, length, self._tables) for gpa, length in buffers)
        before = [bytearray(region.view) for region in self.memory.regions]
        yield
        fault = self.device.fault
        assert fault is None or isinstance(fault, DriverError), repr(fault)
        if untold:
            return
        for region, expected in zip(self.memory.regions, before, strict=True):
            for gpa, length in lent:
                start, end = max(gpa, region.gpa), min(gpa + length, region.gpa + region.size)
                if start < end:
                    place = slice(start - region.gpa, end - region.gpa)
                    expected[place] = region.view[place]
            assert region.view == expected, "memory that was not lent has changed"

    def _writable(self, table: int, count: int, *, nested: bool = False) -> Iterator[GuestBuffer]:
        """The places of a descriptor table, and of those that it leads to, which may be written."""
        for number in range(count):
            try:
                entry = self.memory.read(table + 16 * number, 16)
                gpa, length, flags, _ = _DESCRIPTOR.unpack(entry)
                if not length:
                    continue
                if flags & DESC_F_INDIRECT and not nested:
                    self._tables.add((gpa, length))
                    yield from self._writable(gpa, min(length // 16, 64), nested=True)
                elif flags & DESC_F_WRITE:
                    self.memory.views(gpa, length)  # else the device has to refuse it
                    yield gpa, length
            except AddressError:
                continue

    def collect(self, index: int) -> list[tuple[tuple[GuestBuffer, ...], int]]:
        """The writable buffers of used chains, and how many bytes were written into each chain.

        The driver's side judges the used ring by books of its own.
        """
        self.unruly |= self.overlapping and bool(self._tables)  # perhaps of its own descriptors
        if self.unruly:
            return []
        return [(used.token, used.written) for used in self.ring(index).collect()]

    def content(self, buffers: Iterable[GuestBuffer]) -> bytes:
        """The bytes in buffers, one after another."""
        return b"".join(self.memory.read(gpa, length) for gpa, length in buffers if length)

    def pump(self, after_each: Callable[[], None] = lambda: None) -> None:
        """What an event loop does, until nothing happens any more; that must come soon."""
        for _ in range(400):
            poll = select.poll()
            watches = {}
            for watch in self.device.watches:
                if watch.reading or watch.writing:
                    watches[watch.fd] = watch
                    events = watch.reading * select.POLLIN | watch.writing * select.POLLOUT
                    poll.register(watch.fd, events)
            ready = poll.poll(0)
            if not ready:
                return
            with self.watched():
                for fd, events in ready:
                    watch = watches[fd]
                    if watch.reading and events & ~select.POLLOUT:
                        watch.readable()
                    if watch.writing and events & ~select.POLLIN and watch in self.device.watches:
                        watch.writable()
            after_each()
        raise AssertionError("there is always something to do, and nothing comes of it")

    def ring_alarms(self) -> None:
        """The time of all alarms that are set has come."""
        for alarm in self.device.alarms:
            if alarm.deadline is not None:
                with self.watched():
                    alarm.ring()

    def start_over(self) -> None:
        """A reset and a new probe; the device must work as on the first day."""
        with self.watched():
            self.device.write_status(0)
        assert self.device.status == 0 and self.device.fault is None
        self.bring_up()
        assert self.device.status & Status.DRIVER_OK and not self.device.status & Status.NEEDS_RESET

    def reset_queue(self, index: int) -> None:
        """Resets a queue and sets it up anew, if that was negotiated."""
        if self.has(Feature.RING_RESET) and index in self.driver.queues:
            with self.watched():
                self.device.reset_queue(index)
            self.driver.reset_queue(index)
            self.driver.setup_queue(index)

    def pause_queue(self, index: int) -> None:
        """Has a transport stop a queue and go on with it, as for a migration."""
        ring = self.ring(index)
        with self.watched():
            self.device.publish(self.device.queues[index])
            base = self.device.stop_queue(index)
            self.device.setup_queue(
                index,
                size=ring.size,
                desc=ring.desc,
                avail=ring.avail,
                used=ring.used,
                next_avail=base,
                next_used=self.memory.load16(ring.used + 2),
            )


class NetGuest(Guest):
    """A guest of a network device at a link."""

    device: NetDevice

    def __init__(
        self,
        link: Link,
        wanted: int,
        *,
        queue_size: int = 16,
        memory: GuestMemory = _MEMORY,
        **options: object,
    ) -> None:
        device = NetDevice(
            link,
            mac=GUEST_MAC,
            queue_size=queue_size,
            control_queue_size=queue_size,
            **options,  # type: ignore[arg-type]
        )
        super().__init__(device, wanted, memory=memory, queue_size=queue_size)

    def queues_used(self) -> Iterable[int]:
        """One pair, and the control queue where there is one."""
        return (0, 1, 2) if self.has(NetFeature.CTRL_VQ) else (0, 1)

    def command(self, data: bytes) -> int:
        """Carries out a control command; the acknowledgement."""
        gpa = ARENA
        self.memory.write(gpa, data)
        self.memory.write(gpa + 0x12000, b"\x7f")
        if not self.offer(2, [(gpa, len(data))], [(gpa + 0x12000, 1)]):
            return -1
        self.kick(2)
        used = self.collect(2)
        ack = self.memory.read(gpa + 0x12000, 1)[0]
        assert [count for _, count in used] == [1] and ack in (CTRL_OK, CTRL_ERR)
        return ack


def _overlap(gpa: int, length: int, places: Iterable[GuestBuffer]) -> bool:
    return any(gpa < start + size and start < gpa + length for start, size in places)
