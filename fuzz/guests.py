"""A net device between a link that keeps everything and a guest that need not be well behaved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from fuzz.inputs import Input
from vq.abi import CTRL_ERR, CTRL_OK, Feature, NetFeature, Status, feature_mask
from vq.driver import Driver, DriverRing, GuestBuffer
from vq.errors import DriverError, UsageError
from vq.link import MAX_FRAME, Frame, Link, Port, Room, scatter
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.offload import ALL, Offload

__all__ = ["RING_CHOICES", "Cable", "NetGuest", "some_features"]

_RINGS, _SEAM, _END = 0x1000, 0x10000, 0x1C000
_MEMORY = GuestMemory.allocate((_RINGS, _SEAM - _RINGS), (_SEAM, _END - _SEAM))
_ARENA = 0x8000
"""Where a guest's buffers lie; its rings are below."""
RING_CHOICES = (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER, Feature.RING_RESET)
GUEST_MAC = b"\2\0\0\0\0\3"


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


class NetGuest:
    """Brings a device up; offers chains of any kind; checks what the device did to the memory.

    Whatever the guest does, nothing may come out of the device but a fault that is a `DriverError`.
    """

    def __init__(self, link: Link, wanted: int, *, queue_size: int = 16, **options: object) -> None:
        for region in _MEMORY.regions:
            region.view[:] = bytes(region.size)
        self.memory = _MEMORY
        self.device = NetDevice(
            link,
            mac=GUEST_MAC,
            memory=_MEMORY,
            queue_size=queue_size,
            control_queue_size=queue_size,
            **options,  # type: ignore[arg-type]
        )
        self.wanted = wanted
        self.unruly = False
        """Whether the rings were scribbled on: then the books of the driver's side are off."""
        self.overlapping = False
        """Whether one place was used for two buffers: then what is in them has no meaning."""
        self.driver: Driver
        self.bring_up()

    def bring_up(self) -> None:
        """Probes the device, as after a reset."""
        self.driver = Driver(self.device, _MEMORY, self.wanted, queue_size=16)
        self.driver.negotiate()
        needs = self.device.feature_needs
        assert not any(
            self.driver.features >> bit & 1 and not need & self.driver.features
            for bit, need in needs.items()
        )
        for index in (0, 1, 2)[: 3 if self.has(NetFeature.CTRL_VQ) else 2]:
            self.driver.setup_queue(index)
        self.driver.start()
        self.unruly = self.overlapping = False
        self.place = _ARENA

    def has(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return self.driver.has_feature(bit)

    def ring(self, index: int) -> DriverRing:
        """A queue as the driver sees it."""
        return self.driver.queues[index]

    def buffer(self, source: Input, length: int) -> GuestBuffer:
        """A free place for so many bytes, perhaps over the seam of two regions, perhaps odd."""
        place = self.place + source.pick((0, 0, 1, 7, 64))
        if source.chance(16):
            place = max(_ARENA, _SEAM - length // 2)
        if place + length > _END:
            place = _ARENA
        self.overlapping |= place < self.place
        self.place = place + length
        return place, length

    def place_pieces(self, source: Input, data: bytes) -> list[GuestBuffer]:
        """Puts bytes into buffers of the guest's, cut where the source says."""
        cuts = sorted(min(len(data), source.u8) for _ in range(source.pick((0, 0, 1, 1, 2, 4))))
        buffers = []
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            gpa, _ = buffer = self.buffer(source, end - start)
            if end > start:
                _MEMORY.write(gpa, data[start:end])
            buffers.append(buffer)
        return buffers

    def offer(
        self, index: int, readable: Sequence[GuestBuffer], writable: Sequence[GuestBuffer] = ()
    ) -> bool:
        """Adds a chain; False when there is no room for it."""
        try:
            self.ring(index).add(readable, writable, token=tuple(writable))
        except UsageError:
            return False
        self.ring(index).publish()
        return True

    def scribble(self, source: Input) -> None:
        """Writes into the rings what no driver writes."""
        self.unruly = True
        index = source.below(len(self.driver.queues))
        ring = self.ring(index)
        what = source.below(4)
        if what == 0:
            ring.poke_descriptor(
                source.below(ring.size),
                source.pick((_ARENA, _SEAM - 8, _END - 4, _END, 0, ring.desc, 1 << 63)),
                source.pick((64, 0, 2000, 12, 0x40000, 0xFFFFFFFF)),
                source.pick((0, 1, 2, 3, 4, 5, 6)),
                source.pick((0, 1, 15, 16)),
            )
        elif what == 1:
            ring.poke_avail(source.below(ring.size), source.pick((0, 1, 15, 16, 0xFFFF)))
        elif what == 2:
            index = int.from_bytes(_MEMORY.read(ring.avail + 2, 2), "little")
            ring.poke_avail_index(index + source.pick((1, 2, 16, 17, 0x8000)))
        else:
            ring.poke_avail_flags(source.u16)

    def kick(self, index: int) -> None:
        """Lets the device work, and checks what it did."""
        with self.watched(index):
            self.device.notify(index)

    @contextmanager
    def watched(self, index: int = -1) -> Iterator[None]:
        """Checks that nothing changes but what is lent: used rings and writable buffers."""
        lent = [(ring.used, 6 + 8 * ring.size) for ring in self.driver.queues.values()]
        for ring in self.driver.queues.values():
            for chain in ring._in_flight.values():
                lent += chain.token
        before = [bytearray(region.view) for region in _MEMORY.regions]
        yield
        fault = self.device.fault
        assert fault is None or isinstance(fault, DriverError), repr(fault)
        if self.unruly:
            return
        for region, expected in zip(_MEMORY.regions, before, strict=True):
            for gpa, length in lent:
                start, end = max(gpa, region.gpa), min(gpa + length, region.gpa + region.size)
                if start < end:
                    place = slice(start - region.gpa, end - region.gpa)
                    expected[place] = region.view[place]
            assert region.view == expected, "memory that was not lent has changed"

    def collect(self, index: int) -> list[tuple[tuple[GuestBuffer, ...], int]]:
        """The writable buffers of used chains, and how many bytes were written into each chain.

        The driver's side judges the used ring by books of its own.
        """
        if self.unruly:
            return []
        return [(used.token, used.written) for used in self.ring(index).collect()]

    def start_over(self) -> None:
        """A reset and a new probe; the device must work as on the first day."""
        self.device.write_status(0)
        assert self.device.status == 0 and self.device.fault is None
        self.bring_up()
        assert self.device.status & Status.DRIVER_OK and not self.device.status & Status.NEEDS_RESET

    def command(self, data: bytes) -> int:
        """Carries out a control command; the acknowledgement."""
        gpa = _ARENA
        _MEMORY.write(gpa, data)
        _MEMORY.write(gpa + 0x12000, b"\x7f")
        if not self.offer(2, [(gpa, len(data))], [(gpa + 0x12000, 1)]):
            return -1
        self.kick(2)
        used = self.collect(2)
        ack = _MEMORY.read(gpa + 0x12000, 1)[0]
        assert [count for _, count in used] == [1] and ack in (CTRL_OK, CTRL_ERR)
        return ack
