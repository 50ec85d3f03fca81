"""A device's side of virtio written straight from the specification: the oracle for the drivers.

ctypes structures laid over guest memory, one element at a time, no regard for speed, and nothing in
common with the device's side that vq ships. `SlowDevice` is a split virtqueue, `SlowNet` a network
device whose link is a list of frames.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from vq.abi import Feature, NetFeature, Status, VringDesc, VringUsedElem
from vq.memory import GuestMemory

INDIRECT = 1 << Feature.INDIRECT_DESC
EVENT_IDX = 1 << Feature.EVENT_IDX
IN_ORDER = 1 << Feature.IN_ORDER
RING_RESET = 1 << Feature.RING_RESET
VERSION_1 = 1 << Feature.VERSION_1


class Addresses(Protocol):
    """Where a ring lies; a `DriverRing` has it."""

    size: int
    desc: int
    avail: int
    used: int


class SlowDevice:
    """The device's side, as the sentences of virtio 1.3, 2.7 say it, and no faster."""

    def __init__(self, memory: GuestMemory, ring: Addresses, features: int, start: int = 0) -> None:
        size = ring.size

        class Avail(ctypes.LittleEndianStructure):
            _fields_ = (
                ("flags", ctypes.c_uint16),
                ("idx", ctypes.c_uint16),
                ("ring", ctypes.c_uint16 * size),
                ("used_event", ctypes.c_uint16),
            )

        class UsedRing(ctypes.LittleEndianStructure):
            _pack_ = 2
            _fields_ = (
                ("flags", ctypes.c_uint16),
                ("idx", ctypes.c_uint16),
                ("ring", VringUsedElem * size),
                ("avail_event", ctypes.c_uint16),
            )

        self.memory = memory
        self.size = size
        self.desc_gpa = ring.desc
        self.avail = self.memory.structure(Avail, ring.avail)
        self.used = self.memory.structure(UsedRing, ring.used)
        self.event_idx = bool(features & EVENT_IDX)
        self.in_order = bool(features & IN_ORDER)
        self.next_avail = start
        self.signalled = start
        self.popped: list[tuple[int, list[tuple[int, int, bool]]]] = []

    def descriptor(self, table: int, index: int) -> VringDesc:
        return self.memory.structure(VringDesc, table + 16 * index)

    def walk(self, head: int) -> list[tuple[int, int, bool]]:
        """``(gpa, length, writable)`` of a chain, every rule of virtio 1.3, 2.7.5 asserted."""
        found: list[tuple[int, int, bool]] = []
        seen: set[tuple[int, int]] = set()
        table, limit, index = self.desc_gpa, self.size, head
        while True:
            assert index < limit and (table, index) not in seen
            seen.add((table, index))
            desc = self.descriptor(table, index)
            assert desc.flags & ~7 == 0
            if desc.flags & 4:
                assert table == self.desc_gpa and not desc.flags & 1
                assert desc.len and desc.len % 16 == 0
                table, limit, index = desc.addr, desc.len // 16, 0
                continue
            writable = bool(desc.flags & 2)
            assert writable or not any(w for _, _, w in found), "readable after writable"
            found.append((desc.addr, desc.len, writable))
            if not desc.flags & 1:
                break
            if self.in_order:
                assert desc.next == (index + 1) % limit  # virtio 1.3, 2.7.5.2 and 2.7.5.3.1
            index = desc.next
        assert len(found) <= self.size
        return found

    @property
    def waiting(self) -> int:
        return (self.avail.idx - self.next_avail) % 65536

    def pop(self) -> tuple[int, list[tuple[int, int, bool]]]:
        assert 0 < self.waiting <= self.size
        head = self.avail.ring[self.next_avail % self.size]
        self.next_avail = (self.next_avail + 1) % 65536
        chain = (head, self.walk(head))
        self.popped.append(chain)
        return chain

    def put_used(self, head: int, written: int, skip: int = 1) -> None:
        element = self.used.ring[self.used.idx % self.size]
        element.id, element.len = head, written
        self.used.idx = (self.used.idx + skip) % 65536

    def complete(self, place: int, written: int) -> None:
        head, _ = self.popped.pop(place)
        self.put_used(head, written)

    def should_call(self) -> bool:
        """Asked after every change of used.idx (virtio 1.3, 2.7.7.2)."""
        old, new = self.signalled, self.used.idx
        self.signalled = new
        if not self.event_idx:
            return not self.avail.flags & 1 and old != new
        assert self.avail.flags == 0, "with EVENT_IDX flags stays 0"
        passed = [(old + n) % 65536 for n in range((new - old) % 65536)]
        return self.avail.used_event in passed

    def refuse_kicks(self) -> None:
        if self.event_idx:
            self.used.avail_event = (self.next_avail - 1) % 65536
        else:
            self.used.flags = 1

    def want_kicks(self) -> None:
        if self.event_idx:
            self.used.avail_event = self.next_avail
        else:
            self.used.flags = 0


class Place(NamedTuple):
    size: int
    desc: int
    avail: int
    used: int


class Command(NamedTuple):
    command_class: int
    command: int
    payload: bytes
    descriptors: int


class SlowNet:
    """A network device: what is sent is kept in `sent`, `deliver` makes frames arrive."""

    def __init__(
        self,
        memory: GuestMemory,
        features: int = VERSION_1,
        *,
        max_pairs: int = 1,
        queue_size: int = 256,
        mtu: int = 1500,
    ) -> None:
        self.memory = memory
        self.device_id = 1
        self.device_features = features | VERSION_1
        self.on_queue_call: Callable[[int], None] | None = None
        self.on_config_change: Callable[[], None] | None = None
        self.config_generation = 0
        self.max_pairs = max_pairs
        self.queue_size = queue_size
        self.mac = bytes.fromhex("52540012 3456")
        self.link_status = 1
        self.mtu = mtu
        self.speed = 1000
        self.duplex = 1
        self.config_reads: list[tuple[int, int]] = []
        self.refuse_commands = False
        self.silent = False
        self.calls_lost = False
        self.kicks = 0
        self.resets = 0
        self.sent: list[tuple[int, bytes, list[tuple[int, int, bool]]]] = []
        self.commands: list[Command] = []
        self._status = 0
        self.driver_features = 0
        self.queues: dict[int, SlowDevice] = {}

    # --- registers

    @property
    def status(self) -> int:
        return self._status

    def write_status(self, value: int, /) -> None:
        if not value:
            self.queues = {}
            self.driver_features = 0
        self._status = value

    def accept_features(self, mask: int, /) -> None:
        assert not mask & ~self.device_features
        assert self._status == 3, "ACKNOWLEDGE and DRIVER come first, FEATURES_OK later"
        self.driver_features = mask

    def has(self, bit: int) -> bool:
        return bool(self.driver_features >> bit & 1)

    def read_config(self, offset: int, length: int, /) -> bytes:
        self.config_reads.append((offset, length))
        config = self.mac + struct.pack(
            "<HHHIB", self.link_status, self.max_pairs, self.mtu, self.speed, self.duplex
        )
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes, /) -> None:
        raise AssertionError("virtio 1.3, 5.1.4.2: a driver does not write here")

    @property
    def queue_count(self) -> int:
        return 2 * self.max_pairs + 1

    def queue_max_size(self, index: int, /) -> int:
        return self.queue_size if index < self.queue_count else 0

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        assert self._status & Status.FEATURES_OK
        place = Place(size, desc, avail, used)
        self.queues[index] = SlowDevice(self.memory, place, self.driver_features)
        self.queues[index].want_kicks()

    def reset_queue(self, index: int, /) -> None:
        self.resets += 1
        del self.queues[index]

    # --- the data path

    def notify(self, index: int, /) -> None:
        assert self._status & Status.DRIVER_OK, "virtio 1.3, 3.1.1: no kick before DRIVER_OK"
        self.kicks += 1
        if self.silent:
            return
        if index == 2 * (self.max_pairs if self.has(NetFeature.MQ) else 1):
            self.obey(index)
        elif index & 1:
            self.transmit(index)
        else:
            self.queues[index].want_kicks()

    def call(self, index: int) -> None:
        wanted = self.queues[index].should_call()
        if wanted and not self.calls_lost:
            assert self.on_queue_call is not None
            self.on_queue_call(index)

    def change_config(self) -> None:
        self.config_generation += 1
        assert self.on_config_change is not None
        self.on_config_change()

    def transmit(self, index: int, limit: int = 1 << 16) -> None:
        queue = self.queues[index]
        while queue.waiting and limit:
            limit -= 1
            _head, chain = queue.pop()
            assert not any(writable for _, _, writable in chain)
            data = b"".join(self.memory.read(gpa, length) for gpa, length, _ in chain)
            self.sent.append((index, data, chain))
            queue.complete(0, 0)
        queue.want_kicks()
        self.call(index)

    def obey(self, index: int) -> None:
        queue = self.queues[index]
        while queue.waiting:
            _head, chain = queue.pop()
            data = b"".join(self.memory.read(gpa, n) for gpa, n, writable in chain if not writable)
            assert chain[-1][1:] == (1, True)
            self.commands.append(Command(data[0], data[1], data[2:], len(chain)))
            self.memory.write(chain[-1][0], bytes((self.refuse_commands,)))
            queue.complete(0, 1)
        queue.want_kicks()
        self.call(index)

    def deliver(
        self,
        data: bytes,
        header: bytes = bytes(10),
        *,
        pair: int = 0,
        num_buffers: int | None = None,
        shorten: int = 0,
        call: bool = True,
    ) -> int:
        """Puts a frame into as many buffers as it takes; returns how many, 0 without room.

        The last three arguments are for a device that lies.
        """
        queue = self.queues[2 * pair]
        total = 12 + len(data)
        room = 0
        ahead = 0
        while room < total:
            if ahead == queue.waiting or (ahead and not self.has(NetFeature.MRG_RXBUF)):
                return 0
            head = queue.avail.ring[(queue.next_avail + ahead) % queue.size]
            room += sum(length for _, length, _ in queue.walk(head))
            ahead += 1
        count = ahead if num_buffers is None else num_buffers
        rest = header + struct.pack("<H", count) + data
        for number in range(ahead):
            head, chain = queue.pop()
            written = 0
            for gpa, length, writable in chain:
                assert writable
                self.memory.write(gpa, rest[:length])
                written += len(rest[:length])
                rest = rest[length:]
            queue.complete(0, written - (shorten if number == 0 else 0))
        if call:
            self.call(2 * pair)
        return ahead
