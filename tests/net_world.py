"""A net device between a link that tests can play on and guests that need not be well behaved."""

from __future__ import annotations

import ctypes
import itertools
import struct
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import pytest

from vq.abi import (
    DESC_F_NEXT,
    DESC_F_WRITE,
    NET_HDR_SIZE,
    Feature,
    HdrFlag,
    HdrGso,
    NetFeature,
    feature_mask,
)
from vq.driver import Driver, DriverRing, GuestBuffer
from vq.gather import IoVectors
from vq.link import (
    MAX_FRAME,
    MOST_AT_ONCE,
    MOST_PIECES,
    START_ROOM,
    Frame,
    Link,
    PlacesRoom,
    Port,
    Room,
    scatter,
)
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NetDriver, NetHeader
from vq.offload import ALL, Offload
from vq.testing.transports import connect

VERSION_1 = 1 << Feature.VERSION_1
OUR_MAC = bytes.fromhex("020000000003")
OTHER_MAC = bytes.fromhex("0200000000aa")
BROADCAST = b"\xff" * 6
PLAIN = bytes(12)


def features(*names: str) -> int:
    """The set of features with these names, VERSION_1 among them."""
    bits = [NetFeature[n] if n in NetFeature.__members__ else Feature[n] for n in names]
    return feature_mask(bits) | VERSION_1


def ethernet(payload: bytes, *, to: bytes = OUR_MAC, source: bytes = OTHER_MAC) -> bytes:
    return to + source + b"\x88\xb5" + payload


@contextmanager
def frames_by_address(*, alone: bool = False) -> Iterator[None]:
    """Frames go the short way wherever they can, as with a real port that has an outbox; with
    `alone` those towards the guest each in a turn of its own, as when they come one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedPort, "by_address", True)
        if alone:
            patch.setattr(ScriptedPort, "alone", True)
            patch.setattr("vq.pace.Pace.expects_one", True)
        patch.setattr("vq.net._WORTH_A_BATCH", 1)
        patch.setattr("vq.net._WORTH_PLACES", 1)
        patch.setattr("vq.net._WORTH_PLACES_ALONE", 1)
        patch.setattr("vq.net_receive._DETOUR", 0)
        patch.setattr("vq.net_transmit._DETOUR", 0)
        patch.setattr("vq.ring_row._DETOUR", 0)
        yield


class ScriptedPort(Port):
    """Keeps what is written; gives what the test put in; full, broken or polled as it says."""

    by_address = False
    """Whether it uses the short way, as a real port with an outbox does."""
    alone = False
    """Whether frames then are read one at a time."""
    longest = MAX_FRAME
    """The longest frame that it says may come."""

    def __init__(self, fd: int | None = None) -> None:
        super().__init__()
        self.fd = fd
        self.written: list[tuple[bytes, bytes]] = []
        self.takes: int | None = None
        self.error: OSError | None = None
        self.incoming: deque[tuple[bytes, bytes]] = deque()
        if self.by_address:
            self.outbox = ScriptedOutbox(self)
        self.before_write: Callable[[Sequence[Frame]], None] | None = None
        self.reads = 0
        self.read_apart = 0
        """Frames that went straight to their places, and were accepted there."""
        self.read_alone = 0
        """Frames that were read into room that was prepared for one."""

    def fileno(self) -> int | None:
        return self.fd

    def write_burst(self, frames: Sequence[Frame]) -> int:
        if self.error is not None:
            raise self.error
        if self.before_write is not None:
            self.before_write(frames)
        taken = frames if self.takes is None else frames[: self.takes]
        if self.takes is not None:
            self.takes -= len(taken)
        for frame in taken:
            assert len(frame[0]) == 12 and isinstance(frame[0], bytes), "a private header"
            self.written.append((bytes(frame[0]), b"".join(frame[1:])))
        return len(taken)

    def read_burst(self, room: Room, limit: int) -> int:
        self.reads += 1
        if self.error is not None:
            raise self.error
        if self.alone and self.incoming and (views := cast(PlacesRoom, room).lend_alone()):
            header, data = self.incoming.popleft()
            scatter((header[:10] + b"\0\0" + data,), views)
            cast(PlacesRoom, room).commit_alone(NET_HDR_SIZE + len(data))
            self.read_alone += 1
            return 1
        apart = self.by_address and not self.alone
        moved = self._read_apart(cast(PlacesRoom, room), limit) if apart else 0
        while moved < limit and self.incoming:
            if self.by_address and (places := cast(PlacesRoom, room).lend_together(self.longest)):
                self._read_together(cast(PlacesRoom, room), *places)
                moved += 1
                continue
            views = room.views()
            if not views:
                break
            header, data = self.incoming.popleft()
            scatter((data,), views)
            room.commit(header, len(data))
            moved += 1
        return moved

    def _read_together(self, room: PlacesRoom, vectors: IoVectors, first: int, count: int) -> None:
        header, data = self.incoming.popleft()
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(header[:10] + b"\0\0" + data)
            file.seek(0)
            room.commit_together(vectors.read(file.fileno(), first, count))

    def _read_apart(self, room: PlacesRoom, limit: int) -> int:
        """As a kernel puts frames into places; from the first on that is too long for its own they
        are kept."""
        places = room.lend_apart(limit)
        if not self.incoming or places is None:
            return 0
        frames = [self.incoming.popleft() for _ in range(min(len(places[0]), len(self.incoming)))]
        wholes = [header[:10] + b"\0\0" + data for header, data in frames]
        fits = []
        for address, length, whole in zip(*places, wholes, strict=False):
            ctypes.memmove(address, whole, min(length, len(whole)))
            fits.append(len(whole) <= length)
        fit = [*fits, False].index(False)
        addresses, size = places[0][:fit], room.looks_at
        starts = bytearray(b"".join(ctypes.string_at(address, size) for address in addresses))
        if fit and room.commit_apart(array("I", map(len, wholes[:fit])), memoryview(starts)):
            self.read_apart += fit
            for number, address in enumerate(addresses):
                ctypes.memmove(address, bytes(starts[size * number :][:size]), size)
        for whole in wholes[fit:]:
            room.commit_private([whole[:12], whole[12:]])
        return len(frames)

    @property
    def frames(self) -> list[bytes]:
        return [data for _, data in self.written]


class ScriptedOutbox:
    """The short ways out of a device, to a `ScriptedPort`."""

    most_bytes = 1 << 17

    def __init__(self, port: ScriptedPort) -> None:
        self._port = port
        self._taken = b""
        self.in_place = 0
        """Frames that the port took out of the guest's memory."""
        self.alike = 0
        """Frames that came as ones of the same length."""
        starts = (ctypes.c_ubyte * (MOST_AT_ONCE * START_ROOM))()
        self.starts = memoryview(starts).cast("B")
        self.starts_address = ctypes.addressof(starts)

    def take(self, addresses: array[int], lengths: array[int], total: int) -> memoryview:
        assert 1 <= len(addresses) <= MOST_AT_ONCE and sum(lengths) == total <= self.most_bytes
        frames = list(map(ctypes.string_at, addresses, lengths))
        self._taken = b"".join(frames)
        return memoryview(b"".join(frame[:4] for frame in frames)).cast("I")

    def send(self, lengths: array[int]) -> int:
        starts = itertools.accumulate(lengths, initial=0)
        whole = [self._taken[s : s + length] for s, length in zip(starts, lengths, strict=False)]
        frames: list[Frame] = [[PLAIN, frame[12:]] for frame in whole]
        assert all(frame[:2] == b"\0\0" for frame in whole), "nothing is left undone"
        return self._port.write_burst(frames)

    def take_alike(self, vectors: bytes, count: int, length: int) -> memoryview:
        pieces = list(struct.iter_unpack("@PN", vectors))
        assert len(pieces) == count and all(size == length for _, size in pieces)
        addresses = array("Q", [address for address, _ in pieces])
        return self.take(addresses, array("I", [length] * count), count * length)

    def send_alike(self, count: int, length: int) -> int:
        sent = self.send(array("I", [length] * count))
        self.alike += sent
        return sent

    def send_in_place(self, vectors: array[int], counts: Sequence[int]) -> int:
        """Looks into that memory when the port does, as a kernel would."""
        assert vectors.typecode == "Q"
        addresses, lengths = vectors[::2], vectors[1::2]
        assert 1 <= len(counts) <= MOST_AT_ONCE and min(counts) >= 1
        assert len(addresses) == len(lengths) == sum(counts) <= MOST_PIECES and min(lengths) >= 1
        pieces = [
            memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
            for address, length in zip(addresses, lengths, strict=True)
        ]
        frames: list[Frame] = []
        room = self.starts_address
        for number, first in enumerate(itertools.accumulate(counts[:-1], initial=0)):
            assert addresses[first] == room and 12 <= lengths[first] <= START_ROOM
            room += lengths[first]
            header, *frame = pieces[first : first + counts[number]]
            frames.append([bytes(header[:12]), header[12:], *frame])
            assert 14 <= sum(map(len, frames[-1])) - 12 <= MAX_FRAME
        sent = self._port.write_burst(frames)
        self.in_place += sent
        return sent


class ScriptedLink(Link):
    name = "scripted"

    def __init__(self, accepts: Offload = ALL, *, ports: int = 1, fds: Sequence[int] = ()) -> None:
        self.accepts = accepts
        self.delivers = ALL
        self.ports = self.scripted = [
            ScriptedPort(fd) for fd in (fds or itertools.repeat(None, ports))
        ]
        self.requested: list[Offload] = []
        self.activated: list[int] = []
        self.closed = 0
        self.up = True

    @property
    def port(self) -> ScriptedPort:
        return self.scripted[0]

    @property
    def is_up(self) -> bool:
        return self.up

    def request_offloads(self, wanted: Offload) -> None:
        self.requested.append(wanted)

    def activate_ports(self, count: int) -> None:
        self.activated.append(count)

    def deliver(self, *frames: bytes, header: bytes = PLAIN, pair: int = 0) -> None:
        """Makes frames wait in a port and says so."""
        port = self.scripted[pair]
        port.incoming.extend((header, frame) for frame in frames)
        if port.on_readable is not None:
            port.on_readable()

    def close(self) -> None:
        self.closed += 1


class World:
    """A link, a device plugged into it, and a well-behaved guest; `drive` brings the guest up."""

    def __init__(self, memory: GuestMemory, link: Link | None = None, **options: object) -> None:
        self.memory = memory
        self.link = link or ScriptedLink()
        options.setdefault("mac", OUR_MAC)
        self.device = NetDevice(self.link, memory=memory, **options)  # type: ignore[arg-type]

    over = "direct"
    """The transport, one of `vq.testing.transports.TRANSPORTS`."""

    def drive(self, wanted: int = -1, **options: object) -> NetDriver:
        options.setdefault("timeout", 1.0)
        return NetDriver(
            connect(self.device, self.over),
            self.memory,
            wanted,
            **options,  # type: ignore[arg-type]
        )

    def raw(self, wanted: int = VERSION_1, **options: object) -> RawGuest:
        return RawGuest(self.device, self.memory, wanted, **options)  # type: ignore[arg-type]

    def dropped(self, way: str) -> dict[str, int]:
        """What was dropped on the way, by reason."""
        prefix = f"{way}_dropped: "
        stats = self.device.stats
        return {k.removeprefix(prefix): n for k, n in stats.items() if k.startswith(prefix) and n}


class RawGuest:
    """A guest that offers whatever chains it is told to."""

    def __init__(
        self, device: NetDevice, memory: GuestMemory, wanted: int, *, queue_size: int = 256
    ) -> None:
        self.device = device
        self.memory = memory
        self.driver = Driver(connect(device, World.over), memory, wanted, queue_size=queue_size)
        self.driver.probe()

    def ring(self, index: int) -> DriverRing:
        return self.driver.queues[index]

    def put(self, data: bytes) -> GuestBuffer:
        gpa = self.driver.allocator.allocate(max(1, len(data)), 1)
        self.memory.write(gpa, data)
        return gpa, len(data)

    def room(self, length: int) -> GuestBuffer:
        return self.put(b"\xa5" * length)

    def offer(
        self,
        index: int,
        readable: Sequence[GuestBuffer] = (),
        writable: Sequence[GuestBuffer] = (),
        *,
        kick: bool = True,
    ) -> int:
        head = self.ring(index).add(readable, writable)
        if kick:
            self.driver.kick(index)
        return head

    def offer_unruly(self, index: int, *descriptors: tuple[int, int, int]) -> None:
        """A chain of ``(gpa, length, flags)`` from descriptor 0 on, whatever the rules say."""
        ring = self.ring(index)
        for place, (gpa, length, flags) in enumerate(descriptors):
            last = place == len(descriptors) - 1
            flags |= 0 if last else DESC_F_NEXT
            ring.poke_descriptor(place, gpa, length, flags, 0 if last else place + 1)
        ring.poke_avail(0, 0)
        ring.poke_avail_index(1)
        self.device.notify(index)

    def used_raw(self, index: int) -> list[tuple[int, int]]:
        """The same for chains that are in no driver's books; after the first lap it is wrong."""
        ring = self.ring(index)
        return [ring.peek_used(slot) for slot in range(ring.peek_used_index())]

    def used(self, index: int) -> list[tuple[int, int]]:
        """``(head, bytes written)`` of what the device gave back."""
        return [(used.head, used.written) for used in self.ring(index).collect()]


def tcp_header(
    gso_size: int = 0, *, version: int = 4, start: int | None = None, ecn: bool = False
) -> NetHeader:
    """The net header of a TCP frame that leaves its checksum, and perhaps more, undone."""
    csum_start = start if start is not None else 34 if version == 4 else 54
    kind = HdrGso.TCPV4 if version == 4 else HdrGso.TCPV6
    return NetHeader(
        flags=HdrFlag.NEEDS_CSUM,
        gso_type=(int(kind) | (0x80 if ecn else 0)) if gso_size else 0,
        hdr_len=csum_start + 20 if gso_size else 0,
        gso_size=gso_size,
        csum_start=csum_start,
        csum_offset=16,
    )


def udp_header(gso_size: int = 0, *, version: int = 4) -> NetHeader:
    csum_start = 34 if version == 4 else 54
    return NetHeader(
        flags=HdrFlag.NEEDS_CSUM,
        gso_type=HdrGso.UDP_L4 if gso_size else 0,
        hdr_len=csum_start + 8 if gso_size else 0,
        gso_size=gso_size,
        csum_start=csum_start,
        csum_offset=6,
    )


def snapshot(memory: GuestMemory) -> list[bytes]:
    return [bytes(region.view) for region in memory.regions]


def touched_outside(
    memory: GuestMemory, before: list[bytes], allowed: Sequence[GuestBuffer]
) -> list[int]:
    """Addresses (the first few) that changed since `before` and lie in no allowed range."""
    found: list[int] = []
    for region, old in zip(memory.regions, before, strict=True):
        now = bytearray(region.view)
        for gpa, length in allowed:
            start, end = gpa - region.gpa, gpa - region.gpa + length
            if start >= 0 and end <= region.size:
                now[start:end] = old[start:end]
        if now != old:
            found += [region.gpa + n for n in range(len(old)) if now[n] != old[n]][:4]
    return found


def used_parts(ring: DriverRing) -> list[GuestBuffer]:
    """Where the device writes in a ring: all of the used ring."""
    return [(ring.used, 6 + 8 * ring.size)]


WRITE = DESC_F_WRITE
