"""A guest's sockets: packets of any kind and order, and programs of the host at Unix sockets.

The guest keeps books of its own about each connection: what it sent and was told, and what it may
expect after that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import types
from unittest import mock

from fuzz.guests import ARENA, RING_CHOICES, Guest, some_features
from fuzz.inputs import Input
from vq.abi_vsock import VSOCK_HDR, VsockFeature, VsockOp
from vq.devices import vsock
from vq.devices.vsock import VsockDevice

_RX, _TX, _EVENT = 0, 1, 2
_CID = 3
_LIMIT = 4
"""Connections at a time."""
_REFUSED = 9
"""The port where nobody listens."""
_OPS = (
    *(VsockOp.RW, VsockOp.RW, VsockOp.RW, VsockOp.REQUEST, VsockOp.REQUEST, VsockOp.RESPONSE),
    *(VsockOp.CREDIT_UPDATE, VsockOp.CREDIT_UPDATE, VsockOp.CREDIT_REQUEST, VsockOp.SHUTDOWN),
    *(VsockOp.RST, VsockOp.INVALID, 8, 0xFFFF),
)
_ALLOCATIONS = (1 << 18, 1 << 18, 1 << 18, 4096, 100, 1, 0, 0xFFFFFFFF)
_SIZES = (10, 100, 1000, 3000, 1, 0, 9000)
_ROOMS = (44 + 4096, 44 + 1000, 44 + 100, 45, 44 + 20000, 44, 43, 1)
_GREETINGS = (
    *(b"CONNECT 5\n", b"CONNECT 5\n", b"CONNECT 6\r\n", b"CONNECT 4294967294\n", b"CONN"),
    *(
        b"CONNECT 4294967295\n",
        b"CONNECT 99999999999\n",
        b"CONNECT -1\n",
        b"GET / HTTP/1.1\n",
        b"\n",
    ),
    *(b"CONNECT " + b"0" * 100, b"CONNECT 7\nand more"),
)
_COUNTER = 0xFFFFFFFF

_directory = tempfile.TemporaryDirectory(prefix="vq-fuzz-vsock-")
_PATH = os.path.join(_directory.name, "vsock")


def run(data: bytes) -> None:
    """Plays one driver's life and that of the host's programs, and another that behaves."""
    descriptors = len(os.listdir("/proc/self/fd"))
    clock = types.SimpleNamespace(now=1000.0)
    with mock.patch.object(vsock, "time", types.SimpleNamespace(monotonic=lambda: clock.now)):
        life = _Life(Input(data), clock)
        try:
            life.live()
        finally:
            life.device.close()
            life.hang_up()
    assert len(os.listdir("/proc/self/fd")) == descriptors, "descriptors were left open"


class _Peer:
    """A program of the host's end of a connection."""

    def __init__(self, sock: socket.socket, greeting: bytes = b"") -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.sock = sock
        self.sent = bytearray()
        self.got = bytearray()
        self.ended = False
        """Whether it said that no more will come, or went away."""
        self.named: tuple[int, int] | None = None
        self.greets = bool(greeting)
        if greeting:
            sock.send(greeting)
            _, newline, rest = greeting.partition(b"\n")
            self.sent += rest if newline else b""

    def send(self, count: int) -> None:
        """Sends as many of so many bytes as there is room for."""
        start = len(self.sent)
        data = bytes((start + index) % 251 for index in range(count))
        with contextlib.suppress(OSError):
            self.sent += data[: self.sock.send(data)]

    def receive(self) -> None:
        """Reads all that came."""
        with contextlib.suppress(OSError):
            while data := self.sock.recv(1 << 16):
                self.got += data


class _Connection:
    """What the guest knows of a connection."""

    def __init__(self, peer: _Peer | None) -> None:
        self.peer = peer
        self.by_guest = peer is not None
        self.sent = bytearray()  # payload for the host
        self.received = bytearray()
        self.allocated = 0  # as the guest has said last
        self.forwarded = 0
        self.host_room = 0  # as the device has said last
        self.host_forwarded = 0
        self.answered = False
        self.lawful = True
        """Whether the guest kept to the rules."""
        self.ending = False
        """Whether there is a reason for its end."""
        self.shut = 0


class _Life:
    def __init__(self, source: Input, clock: types.SimpleNamespace) -> None:
        self.source = source
        self.clock = clock
        self.buffer = source.pick((1 << 18, 4096, 1000, 64, 1))
        self.peers: list[_Peer] = []
        self.connected: list[_Peer] = []  # by the device, since this was last looked at
        self.known: dict[tuple[int, int], _Connection] = {}  # by the guest's port and the host's
        self.muddled: set[tuple[int, int]] = set()
        """Ports of a connection that was made before the end of the former one had come."""
        self.sure = True
        """Whether the books can be right: not after the guest has scribbled on its rings."""
        self.device = VsockDevice(
            _CID, _PATH, connections=_LIMIT, buffer=self.buffer, connect=self.connect
        )
        choices = (VsockFeature.STREAM, VsockFeature.NO_IMPLIED_STREAM, *RING_CHOICES)
        self.guest = Guest(self.device, -1 if source.chance(2) else some_features(source, choices))

    def connect(self, path: str) -> socket.socket:
        """A program listens on every port but one."""
        assert path.startswith(_PATH + "_")
        if int(path[len(_PATH) + 1 :]) == _REFUSED:
            raise ConnectionRefusedError
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        peer = _Peer(ours)
        self.peers.append(peer)
        self.connected.append(peer)
        return theirs

    def live(self) -> None:
        source, guest = self.source, self.guest
        steps = (
            *(self.transmit, self.transmit, self.transmit, self.transmit, self.offer_room),
            *(self.offer_room, self.send, self.receive, self.end_peer, self.greet, self.pump),
            *(self.pass_time, self.scribble, self.start_over, self.queues, self.offer_event),
        )
        for _ in range(60):
            if not source.more:
                break
            source.pick(steps)()
            self.look()
            assert guest.device.fault is None or not self.sure or guest.device.status & 0x40
        for peer in self.peers:
            peer.receive()
        self.pump()
        self.look()
        self.check_streams()
        self.answers_still()

    # What the guest does.

    def transmit(self) -> None:
        """A packet or a few; one that asks for a connection goes alone."""
        for _ in range(self.source.pick((1, 1, 2, 4))):
            if self.packet() == VsockOp.REQUEST:
                break
        self.guest.kick(_TX)

    def packet(self) -> int:
        source, guest = self.source, self.guest
        key = (source.pick((1000, 1001, 5)), source.pick((7, 8, 1 << 30, _REFUSED, 0xFFFFFFFF)))
        if self.known and not source.chance(4):
            key = source.pick(sorted(self.known))
        known = self.known.get(key)
        op = source.pick(_OPS)
        odd = source.chance(8)
        kind = source.pick((1, 2, 0)) if odd else 1
        cids = (
            source.pick(((_CID, 2), (_CID, 2), (4, 2), (_CID, 1), (1 << 40, 2))) if odd else (3, 2)
        )
        flags = source.pick((0, 1, 2, 3, 0xFFFFFFFC))
        size = source.pick(_SIZES) if op == VsockOp.RW or source.chance(16) else 0
        if known is not None and not source.chance(8):  # within what the device allows
            used = len(known.sent) - known.host_forwarded & _COUNTER
            size = min(size, max(0, known.host_room - used))
        start = 0 if known is None else len(known.sent)
        payload = bytes((start + index) % 251 for index in range(size))
        claimed = size + (source.pick((1, 0xFFFFFFFF, -size)) if source.chance(32) else 0)
        allocated = source.pick(_ALLOCATIONS)
        forwarded = len(known.received) if known is not None else 0
        if source.chance(16):
            forwarded = source.number(4)
        header = VSOCK_HDR.pack(
            *(*cids, *key, claimed & _COUNTER, kind, op, flags, allocated, forwarded & _COUNTER)
        )
        if source.chance(64):
            header = header[: source.below(45)]
        buffers = guest.place_pieces(source, header + payload)
        writable = [guest.buffer(source, 8)] if source.chance(64) else []
        if not guest.offer_in_any_way(source, _TX, buffers, writable):
            return op
        if len(header) < 44 or writable or claimed & _COUNTER > size:
            self.sure = False  # a fault is due, and nothing is known of what comes behind it
        if cids == (_CID, 2) and self.sure:
            self.note_sent(key, kind, op, flags, payload[:claimed], allocated, forwarded)
        return op

    def note_sent(
        self,
        key: tuple[int, int],
        kind: int,
        op: int,
        flags: int,
        payload: bytes,
        allocated: int,
        forwarded: int,
    ) -> None:
        """What a packet means for the guest's own books."""
        known = self.known.get(key)
        if op == VsockOp.REQUEST and kind == 1:
            # Whether it makes a connection shows when the device has seen it.
            self.asked = key, allocated, forwarded
        if known is None:
            return
        if op == VsockOp.RST:
            del self.known[key]
            return
        known.allocated, known.forwarded = allocated, forwarded & _COUNTER
        right = (VsockOp.RW, VsockOp.CREDIT_UPDATE, VsockOp.CREDIT_REQUEST, VsockOp.SHUTDOWN)
        if op == VsockOp.RESPONSE and not known.answered and not known.by_guest:
            known.answered = True
        elif not known.answered or op not in right or kind != 1:
            known.lawful = False
        used = len(known.sent) - known.host_forwarded & _COUNTER
        if op == VsockOp.RW:
            if known.shut & 2 or used + len(payload) > known.host_room:
                known.lawful = False
            if known.lawful:
                known.sent += payload
        elif op == VsockOp.SHUTDOWN:
            known.shut |= flags & 3
            known.ending = known.ending or known.shut == 3

    def offer_room(self) -> None:
        """Receive buffers."""
        source, guest = self.source, self.guest
        size = source.pick(_ROOMS) if source.chance(8) else source.pick(_ROOMS[:4])
        for _ in range(source.pick((1, 2, 5))):
            readable = [guest.buffer(source, 4)] if source.chance(128) else []
            guest.offer_in_any_way(source, _RX, readable, guest.room(source, size))
        guest.kick(_RX)

    def offer_event(self) -> None:
        size = self.source.pick((4, 8, 3, 1))
        self.guest.offer(_EVENT, [], [self.guest.buffer(self.source, size)])
        self.guest.kick(_EVENT)

    def scribble(self) -> None:
        if self.source.chance(4):
            self.guest.scribble(self.source)
            self.sure = False
            self.guest.kick(self.source.below(3))

    def start_over(self) -> None:
        self.look()
        self.guest.start_over()
        self.known.clear()
        self.muddled.clear()
        self.sure = True
        self.asked = None

    def queues(self) -> None:
        """A queue is stopped and goes on, or is reset; or the host wants all connections to end."""
        what, index = self.source.below(4), self.source.below(3)
        if what == 0:
            with self.guest.watched():
                self.device.transport_reset()
            for known in self.known.values():
                known.ending = True
        elif not self.guest.unruly and self.device.fault is None:
            if what == 1:
                self.look()
                self.guest.reset_queue(index)
                for known in self.known.values():
                    known.ending = True
                    known.lawful = False  # what waited in the queue is gone
            else:
                self.guest.pause_queue(index)
                self.guest.kick(index)

    # What the host does.

    def send(self) -> None:
        if self.peers:
            self.source.pick(self.peers).send(self.source.pick(_SIZES))
            self.pump()

    def receive(self) -> None:
        if self.peers:
            self.source.pick(self.peers).receive()
            self.pump()

    def end_peer(self) -> None:
        if not self.peers:
            return
        peer = self.source.pick(self.peers)
        if self.source.chance(2):
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_WR)
            peer.ended = True
        else:
            self.let_go(peer)
        self.pump()

    def let_go(self, peer: _Peer) -> None:
        peer.receive()
        peer.sock.close()
        self.peers.remove(peer)
        for known in self.known.values():
            known.ending = known.ending or known.peer is peer or known.peer is None

    def greet(self) -> None:
        """A program of the host comes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(_PATH)
        except BlockingIOError:
            sock.close()
            return
        self.peers.append(_Peer(sock, self.source.pick(_GREETINGS)))
        self.pump()

    def pass_time(self) -> None:
        self.clock.now += self.source.pick((0.6, 3.0, 6.0, 9.0, 11.0))
        for known in self.known.values():
            known.ending = True
        self.guest.ring_alarms()
        self.pump()

    def pump(self) -> None:
        self.guest.pump(self.look)

    # What must have come of it.

    def look(self) -> None:
        """Reads what the guest was sent, and compares it with its books."""
        self.note_connected()
        if self.guest.overlapping or self.device.fault is not None:
            self.sure = False
        for buffers, written in self.guest.collect(_RX):
            if written and self.sure:
                self.packet_came(self.guest.content(buffers)[:written])
        self.guest.collect(_TX)
        self.guest.collect(_EVENT)
        self.guest.start_at_front()
        device = self.device
        held = len(device._flows) + len(device._lingering) + len(device._greeting)
        assert held <= _LIMIT, f"{held} connections"
        for flow in (*device._flows.values(), *device._lingering):
            assert len(flow.unsent) <= self.buffer, "more is kept than was promised to fit"

    asked: tuple[tuple[int, int], int, int] | None = None

    def note_connected(self) -> None:
        for peer in self.connected:
            if self.asked is None or not self.sure:
                continue
            key, allocated, forwarded = self.asked
            former = self.known.get(key)
            known = self.known[key] = _Connection(peer)
            known.allocated, known.forwarded = allocated, forwarded & _COUNTER
            if former is not None:
                self.muddled.add(key)  # what comes now may be the former one's
        self.connected.clear()
        self.asked = None

    def packet_came(self, data: bytes) -> None:
        assert len(data) >= 44, "less than a header"
        header = VSOCK_HDR.unpack(data[:44])
        source_cid, cid, port, guest_port, length, kind, op, flags, room, forwarded = header
        assert len(data) == 44 + length and source_cid != _CID and cid == _CID
        assert kind == 1 or op == VsockOp.RST
        key = guest_port, port
        if source_cid != 2 or key in self.muddled:
            return
        known = self.known.get(key)
        if op == VsockOp.REQUEST:
            assert known is None or known.ending or not known.lawful, "asked for one that is there"
            known = self.known[key] = _Connection(None)
            known.host_room, known.host_forwarded = room, forwarded
            return
        if op == VsockOp.RST:
            assert known is None or known.ending or not known.lawful, "reset, and nobody knows why"
            self.known.pop(key, None)
            return
        assert known is not None, f"operation {op} for a connection that is not there"
        known.host_room, known.host_forwarded = room, forwarded
        if op == VsockOp.RESPONSE:
            assert not known.answered or not known.lawful
            known.answered = True
        elif op == VsockOp.RW:
            known.received += data[44:]
            ahead = len(known.received) - known.forwarded & _COUNTER
            assert ahead <= known.allocated or not known.lawful, "more than there is room for"
            assert length and (known.answered or not known.lawful)
        elif op == VsockOp.SHUTDOWN:
            assert 1 <= flags <= 3
            if flags == 3:
                known.ending = True
        else:
            assert op in (VsockOp.CREDIT_UPDATE, VsockOp.CREDIT_REQUEST), f"operation {op}"

    def check_streams(self) -> None:
        """What came is what was sent, byte for byte, on both sides of each connection."""
        if not self.sure:
            return
        for peer in self.peers:
            line, newline, _ = bytes(peer.got).partition(b"\n")
            if peer.greets and newline and line.startswith(b"OK "):
                del peer.got[: len(line) + 1]
                for (_, port), known in self.known.items():
                    if port == int(line[3:]) and known.peer is None:
                        known.peer = peer
        for key, known in self.known.items():
            if known.peer is None or not known.lawful or key in self.muddled:
                continue
            assert known.peer.sent.startswith(known.received), "not what the host's program sent"
            if known.peer in self.peers and not known.ending:
                assert known.peer.got == known.sent, "not what the guest sent"

    def hang_up(self) -> None:
        for peer in list(self.peers):
            self.let_go(peer)

    def answers_still(self) -> None:
        """When all others are gone a guest gets a connection, and bytes go both ways."""
        self.hang_up()
        self.pump()
        self.start_over()
        self.pass_time()
        while self.device._flows:  # programs that had come and gone before they were let in
            self.clock.now += 11.0
            self.guest.ring_alarms()
            self.pump()
        self.start_over()
        self.connected.clear()
        guest = self.guest
        for number, (op, payload) in enumerate(((VsockOp.REQUEST, b""), (VsockOp.RW, b"a"))):
            place = ARENA + 0x1000 * number
            header = VSOCK_HDR.pack(_CID, 2, 1000, 7, len(payload), 1, op, 0, 4096, 0)
            guest.memory.write(place, header + payload)
            guest.offer(_TX, [(place, 44 + len(payload))])
            guest.offer(_RX, [], [(place + 0x8000, 0x1000)])
            guest.kick(_TX)
        assert len(self.peers) == 1, "no connection after a reset"
        self.peers[0].receive()
        self.peers[0].send(3)
        guest.offer(_RX, [], [(ARENA, 0x1000)])
        guest.kick(_RX)
        packets: list[bytes] = []

        def collect() -> None:
            packets.extend(guest.content(buffers)[:size] for buffers, size in guest.collect(_RX))

        guest.pump(collect)
        assert self.peers[0].got == b"a" and self.device.fault is None
        assert any(packet[44:] == bytes(range(3)) for packet in packets), "dead after a reset"
