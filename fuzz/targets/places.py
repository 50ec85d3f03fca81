"""The data path by address: two like devices, of which one may only go the plain way.

Each is at a socket that stands for a tap, through the port of a real one. The same is done to both,
with the same outcome: the same frames on both sides, the same answers, and no memory touched that
was not lent. Runs, slabs, vectors and io_uring are all on one side.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from array import array
from collections.abc import Sequence
from typing import cast
from unittest import mock

from fuzz.frames import any_frame, any_net_header
from fuzz.guests import GUEST_MAC, RING_CHOICES, NetGuest, guest_memory, some_features
from fuzz.inputs import Input
from fuzz.targets.transmit import _with_needs
from vq import net_transmit, tap_linux_port
from vq.abi import NetFeature
from vq.errors import DriverError
from vq.io_uring import Opcode, RequestRing
from vq.link import MAX_FRAME, Link, Room
from vq.memory import GuestMemory
from vq.offload import ALL
from vq.tap_linux_port import LinuxTapPort

_CHOICES = (
    *(NetFeature.CSUM, NetFeature.HOST_TSO4, NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4),
    *(NetFeature.MRG_RXBUF, NetFeature.MRG_RXBUF, NetFeature.CTRL_VQ, NetFeature.CTRL_RX),
    *(NetFeature.MTU, *RING_CHOICES),
)
_SIZES = (60, 60, 60, 14, 200, 500, 588, 1500, 13, 0, 1514)
_ROOMS = (1526, 1526, 612, 613, 2048, 64, 28, 27, 300, 12, 4096)
_LONGEST = 0x10000 + 14 + 8
"""Bytes of a frame of 64 KiB with two VLAN tags."""
_MEMORIES = guest_memory(), guest_memory()


def run(data: bytes) -> None:
    """Leads both lives, step by step."""
    worlds = [
        _World(Input(data), memory, by_address=memory is _MEMORIES[1]) for memory in _MEMORIES
    ]
    # A life is too short for many bursts that go the plain way after one that had to.
    with mock.patch.object(net_transmit, "_DETOUR", 1):
        _lead(*worlds)


def _lead(plain: _World, quick: _World) -> None:
    worlds = plain, quick
    try:
        for _ in range(40):
            if not plain.source.more:
                break
            for world in worlds:
                world.step()
            _compare(plain, quick)
        for world in worlds:
            world.finish()
        _compare(plain, quick)
    finally:
        for world in worlds:
            world.close()


def _compare(plain: _World, quick: _World) -> None:
    if not (plain.alike and quick.alike) or plain.guest.unruly or plain.guest.overlapping:
        plain.alike = quick.alike = False  # from now on one may see what the other has not seen
        return
    faults = plain.guest.device.fault, quick.guest.device.fault
    if faults != (None, None):
        # Who looks ahead finds a bad receive buffer earlier. Frames of the guest's go in bursts:
        # how many go along behind a bad one depends on the way.
        plain.alike = quick.alike = False
        fewer = min(len(plain.sent), len(quick.sent))
        assert plain.sent[:fewer] == quick.sent[:fewer], "other frames came to the host"
        if "tx0" in (fault.queue for fault in faults if isinstance(fault, DriverError)):
            assert str(faults[0]) == str(faults[1]), "another fault"
        return
    assert plain.sent == quick.sent, "other frames came to the host"
    assert plain.answers == quick.answers, "other answers came to the guest"
    assert plain.source.at == quick.source.at, "the targets' own books differ"


class _Requests:
    """`RequestRing` where the kernel has none for us: one call after another."""

    def __init__(self, fd: int, opcodes: Sequence[Opcode], count: int) -> None:
        self._fd, self._opcodes, self._count = fd, opcodes, count
        entries = count * len(opcodes)
        self.addresses = memoryview(array("Q", [0] * entries))
        self.lengths = memoryview(array("I", [0] * entries))

    def submit(self, first: int, count: int) -> list[int]:
        """See `RequestRing`."""
        results = []
        for number in range(first, first + count):
            opcode = self._opcodes[number // self._count]
            address, length = self.addresses[number], self.lengths[number]
            pieces = [(address, length)]
            if opcode is Opcode.WRITEV:  # pairs of an address and a length
                words = iter((ctypes.c_size_t * (2 * length)).from_address(address))
                pieces = list(zip(words, words, strict=True))
            places = [(ctypes.c_ubyte * size).from_address(place) for place, size in pieces]
            try:
                if opcode is Opcode.READ:
                    results.append(os.readv(self._fd, places))
                else:
                    results.append(os.writev(self._fd, places))
            except OSError as error:
                results.append(-(error.errno or errno.EIO))
        return results

    def close(self) -> None:
        """Nothing is held."""


class _FitfulRequests:
    """A row of requests of which the kernel starts fewer at times, and one day none."""

    def __init__(self, fd: int, opcodes: Sequence[Opcode], count: int) -> None:
        self._inner: RequestRing | _Requests
        try:
            self._inner = RequestRing(fd, opcodes, count)
        except OSError:
            self._inner = _Requests(fd, opcodes, count)
        self.addresses, self.lengths = self._inner.addresses, self._inner.lengths
        self.close = self._inner.close
        self.most: list[int] = []
        """How many of the next calls' requests are started; of later ones all."""

    def submit(self, first: int, count: int) -> list[int]:
        """See `RequestRing`."""
        most = self.most.pop(0) if self.most else count
        if not most:
            raise OSError(errno.EPERM, "forbidden since")
        return self._inner.submit(first, min(count, most))

    def submit_alike(self, first: int, count: int, result: int) -> list[int] | None:
        """See `RequestRing`."""
        results = self.submit(first, count)
        return None if list(results) == [result] * count else results


class _PlainRoom:
    """A room that is not lent by address."""

    def __init__(self, room: Room) -> None:
        self.views, self.commit = room.views, room.commit


class _Port(LinuxTapPort):
    """A tap's port that may be kept to the plain way."""

    def __init__(self, fd: int, *, by_address: bool) -> None:
        self._by_address = by_address
        super().__init__(fd, lambda: None)

    def open(self) -> None:
        """See `LinuxTapPort`."""
        if self._by_address:
            super().open()

    def read_burst(self, room: Room, limit: int) -> int:
        """See `Port`."""
        return super().read_burst(room if self._by_address else _PlainRoom(room), limit)


class _SocketLink(Link):
    """A link to a socket whose datagrams are frames behind their net headers, as a tap's are."""

    name = "socket"
    accepts = delivers = ALL
    min_frame = 14

    def __init__(self, near: socket.socket, *, by_address: bool) -> None:
        self._near = near
        with mock.patch.object(tap_linux_port, "RequestRing", _FitfulRequests):
            self.port = _Port(near.fileno(), by_address=by_address)
        self.ports = (self.port,)

    def forget(self) -> None:
        """Frames that wait for the guest are gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._near.recv(1)

    def close(self) -> None:
        """See `Link`."""
        self.port.close()
        self._near.close()


class _World:
    """A guest, its device, and the far end of the socket."""

    def __init__(self, source: Input, memory: GuestMemory, *, by_address: bool) -> None:
        self.source = source
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.setblocking(False)
        self.far.setblocking(False)
        self.link = _SocketLink(near, by_address=by_address)
        self.port = self.link.port
        self.port.longest = source.pick((1514, 1514, 600, MAX_FRAME))
        wanted = -1 if source.chance(4) else some_features(source, _CHOICES)
        mtu = source.pick((None, None, None, 1500, 400))
        self.guest = NetGuest(self.link, _with_needs(wanted), memory=memory, queue_size=32, mtu=mtu)
        self.sent: list[tuple[bytes, bytes]] = []  # by the guest, as it came to the host
        self.answers: list[list[object]] = [[], [], []]  # what came back to it, for each queue
        self.alike = True
        """Whether the outcome must be the other's."""
        self.choked = False
        """Whether the host does not read what comes."""
        schedule = source.pick(((), (), (), (5, 1, 3), (64, 64, 0)))
        if (batches := self.port._batches) is not None:
            cast("_FitfulRequests", batches.ring).most = list(schedule)

    def step(self) -> None:
        """The next thing that happens."""
        source, guest = self.source, self.guest
        step = source.below(20)
        if step < 6:
            self.transmit()
        elif step < 10:
            self.offer_room()
        elif step < 15:
            self.arrive()
        elif step == 15:
            self.choked = not self.choked
        elif step == 16 and guest.has(NetFeature.CTRL_VQ) and not guest.unruly:
            if guest.device.fault is None and not self.choked:
                self.settle()
                self.answers[2].append(guest.command(self.command()))
        elif step == 17 and not guest.unruly and guest.device.fault is None:
            index = source.below(2)
            if source.chance(2):
                guest.reset_queue(index)
            else:
                guest.pause_queue(index)
            guest.kick(index)
        elif step == 18:
            guest.scribble(source)
            self.alike = False
            guest.kick(source.below(2))
        elif step == 19:
            guest.start_over()
        self.settle()

    def finish(self) -> None:
        """A driver that behaves gets its frames through, and its buffers back."""
        self.choked = False
        self.settle()
        self.settle()
        if self.alike and self.guest.device.fault is None:
            assert self.guest.ring(1).in_flight == 0, "a chain did not come back"
        guest = self.guest
        guest.start_over()
        self.settle()
        self.link.forget()
        self.sent.clear()
        frame = GUEST_MAC + b"\2\0\0\0\0\xaa\x88\xb5" + bytes(46)
        for number in range(8):
            guest.memory.write(0x8000 + 0x1000 * number, bytes(12) + frame)
            guest.offer(1, [(0x8000 + 0x1000 * number, 12 + len(frame))])
            guest.offer(0, [], [(0x8800 + 0x1000 * number, 0x800)])
            self.far.send(bytes(12) + frame)
        guest.kick(0)
        guest.kick(1)
        for answers in self.answers:
            answers.clear()
        self.settle()
        assert [data for _, data in self.sent] == [frame] * 8, "dead after a reset"
        assert [len(answers) for answers in self.answers] == [8, 8, 0], "dead after a reset"

    def close(self) -> None:
        """Gives back what the host lent."""
        self.guest.device.close()
        self.far.close()

    # What the guest and the host do.

    def transmit(self) -> None:
        """Frames of the guest's, mostly short ones that leave nothing undone."""
        source, guest = self.source, self.guest
        usual = not source.chance(4)
        for _ in range(source.pick((1, 4, 7, 16, 20))):
            if usual:
                size = source.pick(_SIZES) if source.chance(4) else 60
                frame = b"\xff" * 6 + GUEST_MAC + bytes((len(self.sent) & 0xFF,)) * size
                data = bytes(12) + frame[:size]
                if source.chance(16):
                    data = data[:4] + source.take(8).ljust(8, b"\7") + data[12:]
            else:
                data = any_net_header(source) + any_frame(source)[:3000]
            if source.chance(32):
                data = data[: source.below(30)]
            one = usual and not source.chance(16)
            buffers = [self.place(data)] if one else guest.place_pieces(source, data)
            writable = [guest.buffer(source, 8)] if source.chance(128) else []
            if one:
                guest.offer(1, buffers, writable)
            else:
                guest.offer_in_any_way(source, 1, buffers, writable)
        if source.chance(64):
            self.spoil(1)
        guest.kick(1)

    def place(self, data: bytes) -> tuple[int, int]:
        buffer = self.guest.buffer(self.source, len(data))
        if data:
            self.guest.memory.write(buffer[0], data)
        return buffer

    def offer_room(self) -> None:
        """Receive buffers, mostly all of one size."""
        source, guest = self.source, self.guest
        size = source.pick(_ROOMS) if source.chance(4) else source.pick(_ROOMS[:4])
        for _ in range(source.pick((1, 4, 12, 16))):
            length = source.pick(_ROOMS) if source.chance(32) else size
            readable = [guest.buffer(source, 4)] if source.chance(128) else []
            one = not source.chance(32)
            room = [guest.buffer(source, length)] if one else guest.room(source, length)
            guest.offer(0, readable, room)
        if source.chance(64):
            self.spoil(0)
        guest.kick(0)

    def spoil(self, index: int) -> None:
        """A chain that leads nowhere, among those that wait."""
        ring = self.guest.ring(index)
        if ring._in_flight:
            head = list(ring._in_flight)[-1]
            _, length, flags, following = ring.peek_descriptor(head)
            place = self.source.pick((0x1C000, 0, 1 << 63, 0x1BFFC))
            ring.poke_descriptor(head, place, length or 64, flags, following)
            self.alike = False  # what the books say of this chain has come to nothing

    def arrive(self) -> None:
        """Frames of the host's."""
        source = self.source
        usual = not source.chance(4)
        for _ in range(source.pick((1, 3, 9, 12, 16))):
            header = bytes(12) if usual else any_net_header(source)[:10] + bytes(2)
            if usual:
                size = max(14, source.pick(_SIZES)) if source.chance(4) else 60
                frame = GUEST_MAC + b"\2\0\0\0\0\xaa" + bytes((source.u8,)) * size
                frame = frame[:size]
            else:
                frame = any_frame(source)
            # Of longer ones the quick way loses the first: nobody sends them unannounced.
            frame = frame[: min(self.port.longest, _LONGEST)]
            with contextlib.suppress(OSError):
                self.far.send(header + frame)

    def command(self) -> bytes:
        """Something on the control queue that changes which frames come and how."""
        source = self.source
        kind = source.pick((0, 0, 1, 5))
        if kind == 1:
            return bytes((1, 1)) + source.pick((GUEST_MAC, b"\2\0\0\0\0\4"))
        if kind == 5:
            return bytes((5, 0)) + source.pick((0, 2, 0x82)).to_bytes(8, "little")
        return bytes((0, source.below(6), source.below(2)))

    # What comes of it.

    def settle(self) -> None:
        """All that can happen now happens; notes what came to either side."""
        guest = self.guest
        for _ in range(2):
            if not self.choked:
                with contextlib.suppress(OSError):
                    while data := self.far.recv(1 << 17):
                        header = data[:12] if data[0] or data[1] else data[:4]
                        self.sent.append((header, data[12:]))
            guest.pump(self.collect)
            self.collect()
        if self.port.dropped["full"]:
            self.alike = False  # one was sent to where there was no room for that before it

    def collect(self) -> None:
        """What came back to the guest."""
        guest = self.guest
        for index in (0, 1):
            for buffers, written in guest.collect(index):
                content = guest.content(buffers)[:written] if not guest.overlapping else b""
                self.answers[index].append((buffers, written, content))
        guest.start_at_front()
