"""The socket device, driven by a scripted driver, with real Unix sockets behind it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_world import DeviceWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vq.abi import (
    Feature,
    Status,
)
from vq.abi_vsock import (
    VsockFeature,
    VsockOp,
    VsockShutdown,
    VsockType,
)
from vq.devices import vsock
from vq.devices.vsock import VsockDevice
from vq.devices.vsock_connection import Header
from vq.errors import DriverError, UsageError

RX, TX, EVENT = range(3)
CID = 42
HEADER = 44


class Guest(DeviceWorld):
    """A driver of the device that keeps the packets that come, and the sockets' places."""

    def __init__(self, path: str, *, rooms: int = 64, features: int = -1, **options: int) -> None:
        self.path = path
        device = VsockDevice(CID, path, **options)
        super().__init__(device, features, size=16 << 20)
        self.packets: deque[tuple[Header, bytes]] = deque()
        self.room_size = 4096
        self.refill(rooms)
        self.give(EVENT, 4, 4)

    def refill(self, rooms: int = 64) -> None:
        """Takes what has come, and sees to it that there are as many receive buffers as before."""
        for message in self.received(RX):
            header = Header.unpack(message[:HEADER])
            assert header.len == len(message) - HEADER
            self.packets.append((header, message[HEADER:]))
        lacking = rooms - self.driver.queues[RX].in_flight
        if lacking > 0:
            self.give(RX, *[self.room_size] * lacking)

    def packet(self, op: int, port: int, data: bytes = b"", **fields: int) -> None:
        """Sends a packet from the guest's port 7 (or `src_port`) to a port of the host."""
        header = Header(CID, 2, 7, port, len(data), op=op, buf_alloc=1 << 18)
        self.send(TX, header._replace(**fields).pack() + data)
        self.received(TX)

    def next(self) -> tuple[Header, bytes]:
        """The next packet that the device sends, other than word of its buffers."""

        def came() -> bool:
            self.refill()
            while self.packets and self.packets[0][0].op == VsockOp.CREDIT_UPDATE:
                self.packets.popleft()
            return bool(self.packets)

        self.until(came, "a packet")
        return self.packets.popleft()

    def quiet(self) -> bool:
        """Whether the device sends nothing now, but word of its buffers."""
        self.turn()
        self.refill()
        return all(header.op == VsockOp.CREDIT_UPDATE for header, _ in self.packets)

    @property
    def vsock(self) -> VsockDevice:
        assert isinstance(self.device, VsockDevice)
        return self.device

    def listen(self, port: int) -> socket.socket:
        """A program of the host that waits for connections to a port."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def connected(self, port: int, **fields: int) -> socket.socket:
        """Connects from the guest to a port of the host; returns the host's side of it."""
        with self.listen(port) as listener:
            self.packet(VsockOp.REQUEST, port, **fields)
            header, _ = self.next()
            assert header.op == VsockOp.RESPONSE
            sock, _ = listener.accept()
        os.unlink(f"{self.path}_{port}")
        sock.setblocking(False)
        return sock

    def read_host(self, sock: socket.socket, length: int) -> bytes:
        data = b""

        def step() -> bool:
            nonlocal data
            with contextlib.suppress(BlockingIOError):
                data += sock.recv(1 << 16)
            return len(data) >= length

        self.until(step, f"{length} bytes at the host")
        return data

    def ended_at_host(self, sock: socket.socket) -> None:
        def step() -> bool:
            try:
                return sock.recv(1 << 16) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        self.until(step, "the end at the host")

    def dial(self, line: bytes) -> socket.socket:
        """A program of the host that wants to connect to the guest."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.setblocking(False)
        sock.send(line)
        return sock


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vm.vsock")


@pytest.fixture
def guest(path: str) -> Iterator[Guest]:
    with Guest(path) as guest:
        yield guest


# --- from the guest to the host ------------------------------------------------------------------


def descriptors() -> int:
    """How many are open, without those of objects that nobody has any more."""
    gc.collect()
    return len(os.listdir("/dev/fd"))


def test_a_connection_of_the_guest_goes_to_the_socket_of_its_port(guest: Guest) -> None:
    with guest.listen(5000) as listener:
        guest.packet(VsockOp.REQUEST, 5000)
        header, data = guest.next()
        assert header == Header(2, CID, 5000, 7, op=VsockOp.RESPONSE, buf_alloc=1 << 18)
        assert data == b""
        sock, _ = listener.accept()
        with sock:
            guest.packet(VsockOp.RW, 5000, b"hello")
            assert sock.recv(100) == b"hello"
            sock.send(b"hi")
            header, data = guest.next()
            assert (header.op, header.fwd_cnt, data) == (VsockOp.RW, 5, b"hi")


def test_a_port_that_nobody_serves_is_refused(guest: Guest) -> None:
    before = descriptors()
    guest.packet(VsockOp.REQUEST, 5000)
    assert guest.next()[0] == Header(2, CID, 5000, 7, op=VsockOp.RST)
    assert guest.vsock.stats["refused"] == 1
    assert descriptors() == before


def test_packets_may_be_cut_into_buffers_anywhere(guest: Guest) -> None:
    with guest.connected(5) as sock:
        header = Header(CID, 2, 7, 5, 100, op=VsockOp.RW, buf_alloc=1 << 18)
        guest.send(TX, header.pack() + bytes(range(100)) + b"not part of it", cut=13)
        assert sock.recv(1000) == bytes(range(100))


def test_receive_buffers_may_be_cut_anywhere(path: str) -> None:
    with Guest(path, rooms=0) as guest:
        for cuts in ((20, 100), (44, 100), (45, 1), (30, 10, 4, 50)):
            gpa = guest.driver.allocator.allocate(200)
            places = [(gpa + sum(cuts[:n]), size) for n, size in enumerate(cuts)]
            guest.driver.queues[RX].add((), places, token=gpa)
        guest.driver.kick(RX)
        with guest.listen(5) as listener:
            guest.packet(VsockOp.REQUEST, 5)
            sock, _ = listener.accept()
        with sock:
            data = bytes(range(90))
            sock.send(data)
            guest.turn()
            messages = guest.received(RX)
            assert [len(message) for message in messages] == [44, 44 + 90]
            assert messages[1][44:] == data


def test_what_the_socket_does_not_take_waits_and_is_not_lost(guest: Guest) -> None:
    data = random.Random(1).randbytes(4 << 20)
    room = 1 << 18
    with guest.connected(5) as sock:
        sent = forwarded = 0
        got = b""
        while len(got) < len(data):
            while sent < len(data) and room - (sent - forwarded) >= 65536:
                guest.packet(VsockOp.RW, 5, data[sent : sent + 65536])
                sent += 65536
            assert len(guest.vsock._flows[7, 5].unsent) <= 1 << 18
            with contextlib.suppress(BlockingIOError):
                got += sock.recv(50000)
            guest.turn()
            guest.refill()
            while guest.packets:
                header, _ = guest.packets.popleft()
                assert header.op == VsockOp.CREDIT_UPDATE
                forwarded = header.fwd_cnt
        assert got == data
        assert guest.vsock.stats["to_host_bytes"] == len(data)


def test_one_slow_socket_holds_up_no_other(guest: Guest) -> None:
    with guest.connected(5), guest.connected(6, src_port=8) as other:
        for _ in range(4):
            guest.packet(VsockOp.RW, 5, bytes(65536))
        guest.packet(VsockOp.RW, 6, b"next", src_port=8)
        assert other.recv(10) == b"next"


def test_a_guest_that_sends_more_than_there_is_room_for_is_reset(guest: Guest) -> None:
    with guest.connected(5) as sock:
        for _ in range(12):
            guest.packet(VsockOp.RW, 5, bytes(65536))
        assert guest.next()[0].op == VsockOp.RST
        assert guest.vsock.stats["reset"] == 1
        guest.ended_at_host(sock)
        assert guest.vsock._flows == {}


# --- from the host to the guest ------------------------------------------------------------------


def test_a_program_of_the_host_connects_to_a_port_of_the_guest(guest: Guest) -> None:
    with guest.dial(b"CONNECT 1234\nand more") as sock:
        header, _ = guest.next()
        port = header.src_port
        assert header == Header(2, CID, port, 1234, op=VsockOp.REQUEST, buf_alloc=1 << 18)
        guest.packet(VsockOp.RESPONSE, port, src_port=1234)
        assert guest.read_host(sock, 3) == b"OK %d\n" % port
        header, data = guest.next()
        assert (header.op, data) == (VsockOp.RW, b"and more")
        guest.packet(VsockOp.RW, port, b"answer", src_port=1234)
        assert guest.read_host(sock, 6) == b"answer"
        assert guest.vsock.stats["connected_to_guest"] == 1


def test_a_connection_that_the_guest_refuses_is_closed(guest: Guest) -> None:
    with guest.dial(b"CONNECT 1234\n") as sock:
        header, _ = guest.next()
        guest.packet(VsockOp.RST, header.src_port, src_port=1234)
        guest.ended_at_host(sock)
        assert guest.quiet() and guest.vsock._flows == {}


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"CONNECT\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967295\n",
        b"CONNECT 99999999999\n",
        b"connect 5\n",
        b"CONNECT 5" + b" " * 100,
        b"\n",
    ],
)
def test_a_line_that_is_no_connect_is_hung_up_on(guest: Guest, line: bytes) -> None:
    with guest.dial(line) as sock:
        guest.ended_at_host(sock)
        assert guest.quiet() and not guest.vsock._greeting


def test_the_line_may_come_in_pieces(guest: Guest) -> None:
    with guest.dial(b"") as sock:
        for piece in (b"CON", b"NECT 12", b"34", b"\r\n"):
            sock.send(piece)
            guest.turn()
        assert guest.next()[0].dst_port == 1234


def test_a_program_that_says_nothing_is_hung_up_on_in_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "GREETING_SECONDS", 0.0)
    with guest.dial(b"CONN") as sock:
        guest.until(lambda: guest.vsock._greeting)
        guest.ring_alarms()
        guest.ended_at_host(sock)


def test_a_guest_that_does_not_answer_is_given_up_on_in_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "GREETING_SECONDS", 0.0)
    with guest.dial(b"CONNECT 5\n") as sock:
        assert guest.next()[0].op == VsockOp.REQUEST
        guest.ring_alarms()
        assert guest.next()[0].op == VsockOp.RST
        guest.ended_at_host(sock)


def test_every_connection_to_the_guest_has_a_port_of_its_own(guest: Guest) -> None:
    with guest.dial(b"CONNECT 5\n"), guest.dial(b"CONNECT 5\n"):
        ports = {guest.next()[0].src_port, guest.next()[0].src_port}
        assert len(ports) == 2 and min(ports) >= vsock.FIRST_PORT


def test_ports_are_used_again_after_the_last_one(guest: Guest) -> None:
    guest.vsock._next_port = vsock.LAST_PORT
    with guest.dial(b"CONNECT 5\n"), guest.dial(b"CONNECT 5\n"):
        ports = {guest.next()[0].src_port, guest.next()[0].src_port}
        assert ports == {vsock.LAST_PORT, vsock.FIRST_PORT}


def test_nothing_is_sent_without_credit_and_all_of_it_with_it(guest: Guest) -> None:
    data = random.Random(2).randbytes(200_000)
    with guest.connected(5, buf_alloc=10_000) as sock:
        sock.setblocking(False)
        left, got, asked = data, b"", 0
        while len(got) < len(data):
            with contextlib.suppress(BlockingIOError):
                left = left[sock.send(left) :] if left else left
            guest.turn()
            guest.refill()
            unread = 0
            while guest.packets:
                header, piece = guest.packets.popleft()
                if header.op == VsockOp.CREDIT_REQUEST:
                    asked += 1
                    continue
                assert header.op == VsockOp.RW
                got += piece
                unread += len(piece)
            assert unread <= 10_000
            guest.packet(VsockOp.CREDIT_UPDATE, 5, buf_alloc=10_000, fwd_cnt=len(got))
        assert got == data
        assert asked >= 19


def test_input_waits_for_receive_buffers(path: str) -> None:
    data = random.Random(3).randbytes(60_000)
    with Guest(path, rooms=1) as guest, guest.listen(5) as listener:
        guest.packet(VsockOp.REQUEST, 5)
        guest.refill(0)
        sock, _ = listener.accept()
        with sock:
            sock.send(data)
            guest.turn()
            assert guest.in_flight(RX) == 0
            assert not guest.vsock._flows[7, 5].watch.reading  # no turning round and round
            got = b""
            while len(got) < len(data):
                guest.refill(2)
                guest.turn()
                guest.refill(0)
                while guest.packets:
                    got += guest.packets.popleft()[1]
            assert got == data


def test_connections_take_turns_where_buffers_are_scarce(path: str) -> None:
    with Guest(path) as guest, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(guest.connected(5, src_port=port)) for port in range(4)]
        guest.refill()
        while guest.driver.queues[RX].in_flight:
            for sock in socks:
                with contextlib.suppress(BlockingIOError):
                    sock.send(bytes(100_000))
            guest.turn()
            guest.refill(0)
        guest.packets.clear()
        for _ in range(40):
            guest.refill(1)
            guest.turn()
            guest.refill(0)
        ports = {header.dst_port for header, _ in guest.packets}
        assert ports == {0, 1, 2, 3}


# --- the end of connections ----------------------------------------------------------------------


def test_a_guest_that_closes_gets_its_confirmation_and_the_host_all_bytes(guest: Guest) -> None:
    with guest.connected(5) as sock:
        for _ in range(4):
            guest.packet(VsockOp.RW, 5, bytes(65536))
        guest.packet(VsockOp.SHUTDOWN, 5, flags=VsockShutdown.BOTH)
        assert guest.quiet()  # bytes are still here
        assert len(guest.read_host(sock, 262144)) == 262144
        guest.ended_at_host(sock)
        assert guest.next()[0].op == VsockOp.RST
        assert guest.vsock._flows == {}


def test_bytes_that_wait_for_the_host_outlive_a_guest_that_does_not_wait(guest: Guest) -> None:
    """Linux resets after eight seconds without a confirmation, and a slow program is none."""
    with guest.connected(5) as sock:
        for _ in range(4):
            guest.packet(VsockOp.RW, 5, b"x" * 65536)
        guest.packet(VsockOp.SHUTDOWN, 5, flags=VsockShutdown.BOTH)
        guest.packet(VsockOp.RST, 5)
        assert guest.vsock._flows == {} and len(guest.vsock._lingering) == 1
        with guest.connected(5) as again:  # the ports are free again
            guest.packet(VsockOp.RW, 5, b"new")
            assert again.recv(10) == b"new"
        assert guest.read_host(sock, 262144) == b"x" * 262144
        guest.ended_at_host(sock)
        assert not guest.vsock._lingering


def test_a_reset_by_the_guest_ends_both_directions_at_once(guest: Guest) -> None:
    with guest.connected(5) as sock:
        guest.packet(VsockOp.RST, 5)
        guest.ended_at_host(sock)
        assert guest.quiet() and guest.vsock._flows == {}


def test_a_guest_that_has_finished_sending_still_receives(guest: Guest) -> None:
    with guest.connected(5) as sock:
        guest.packet(VsockOp.RW, 5, b"question")
        guest.packet(VsockOp.SHUTDOWN, 5, flags=VsockShutdown.SEND)
        assert guest.read_host(sock, 8) == b"question"
        guest.ended_at_host(sock)
        sock.send(b"answer")
        assert guest.next()[1] == b"answer"


def test_a_program_that_has_finished_sending_still_receives(guest: Guest) -> None:
    with guest.connected(5) as sock:
        sock.send(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert guest.next()[1] == b"question"
        header, _ = guest.next()
        assert (header.op, header.flags) == (VsockOp.SHUTDOWN, VsockShutdown.SEND)
        guest.packet(VsockOp.RW, 5, b"answer")
        assert guest.read_host(sock, 6) == b"answer"


def test_a_program_that_is_gone_is_told_after_its_last_bytes(guest: Guest) -> None:
    with guest.connected(5) as sock:
        sock.send(b"last words")
    assert guest.next()[1] == b"last words"
    header, _ = guest.next()
    assert (header.op, header.flags) == (VsockOp.SHUTDOWN, VsockShutdown.BOTH)
    guest.packet(VsockOp.RST, 5)
    assert guest.quiet() and guest.vsock._flows == {}


def test_a_guest_that_does_not_confirm_an_end_is_reset_in_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "GOODBYE_SECONDS", 0.0)
    guest.connected(5).close()
    assert guest.next()[0].op == VsockOp.SHUTDOWN
    guest.ring_alarms()
    assert guest.next()[0].op == VsockOp.RST
    assert guest.vsock._flows == {}


def test_bytes_for_a_program_that_is_gone_reset_the_connection(guest: Guest) -> None:
    with guest.connected(5) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert guest.next()[0].op == VsockOp.SHUTDOWN
    guest.packet(VsockOp.RW, 5, b"to nobody")
    assert guest.next()[0].op == VsockOp.RST
    assert guest.vsock._flows == {}


def test_a_program_that_finishes_sending_and_then_goes_is_told_to_a_silent_guest(
    guest: Guest,
) -> None:
    """A guest that only waits, perhaps for its next connection, was never told."""
    with guest.connected(5) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert guest.next()[0].flags == VsockShutdown.SEND
        guest.ring_alarms()
        assert guest.quiet()  # it may still read
    guest.ring_alarms()
    header, _ = guest.next()
    assert (header.op, header.flags) == (VsockOp.SHUTDOWN, VsockShutdown.BOTH)
    guest.packet(VsockOp.RST, 5)
    assert guest.vsock._flows == {} and not guest.vsock._unread


def test_a_program_cannot_send_to_a_guest_that_receives_no_more(guest: Guest) -> None:
    """It filled the socket, and then waited for ever for somebody to read that."""
    with guest.connected(5) as sock:
        sock.send(b"unread")
        guest.packet(VsockOp.SHUTDOWN, 5, flags=VsockShutdown.RECEIVE)
        with pytest.raises(BrokenPipeError):
            sock.send(b"more")
        guest.packet(VsockOp.RW, 5, b"answer")
        assert guest.read_host(sock, 6) == b"answer"
    guest.ring_alarms()
    while (header := guest.next()[0]).op == VsockOp.RW:
        pass
    assert (header.op, header.flags) == (VsockOp.SHUTDOWN, VsockShutdown.BOTH)
    guest.packet(VsockOp.RST, 5)
    assert guest.vsock._flows == {} and not guest.vsock._unread


# --- packets of no connection --------------------------------------------------------------------


@pytest.mark.parametrize("op", set(VsockOp) - {VsockOp.RST})
def test_a_packet_of_no_connection_is_answered_with_a_reset(guest: Guest, op: VsockOp) -> None:
    guest.packet(op, 5)
    assert guest.next()[0] == Header(2, CID, 5, 7, op=VsockOp.RST)
    assert guest.quiet()


def test_a_reset_of_no_connection_is_not_answered(guest: Guest) -> None:
    guest.packet(VsockOp.RST, 5)
    assert guest.quiet()


@pytest.mark.parametrize("kind", [0, VsockType.SEQPACKET, 3, 0xFFFF])
def test_an_unknown_type_is_answered_with_a_reset(guest: Guest, kind: int) -> None:
    with guest.listen(5):
        guest.packet(VsockOp.REQUEST, 5, type=kind)
        header, _ = guest.next()
        assert (header.op, header.type) == (VsockOp.RST, kind)


def test_a_packet_for_somebody_else_is_not_delivered(guest: Guest) -> None:
    with guest.listen(5):
        guest.packet(VsockOp.REQUEST, 5, src_cid=43)
        assert guest.quiet()
        guest.packet(VsockOp.REQUEST, 5, dst_cid=3)
        header, _ = guest.next()
        assert (header.op, header.src_cid) == (VsockOp.RST, 3)
        assert guest.vsock.stats["ignored"] == 2 and guest.vsock._flows == {}


def test_answers_without_buffers_do_not_pile_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "MAX_RESETS", 20)
    with Guest(path, rooms=0) as guest:
        for port in range(100):
            guest.packet(VsockOp.RW, port)
            guest.packet(VsockOp.RW, port)
        assert len(guest.vsock._resets) == 20
        guest.refill()
        guest.turn()
        guest.refill()
        assert [header.src_port for header, _ in guest.packets] == list(range(20))


# --- limits --------------------------------------------------------------------------------------


def test_there_are_no_more_connections_than_allowed(path: str) -> None:
    with (
        Guest(path, connections=2) as guest,
        guest.connected(5),
        guest.listen(6),
        guest.connected(7, src_port=9) as second,
    ):
        guest.packet(VsockOp.REQUEST, 6)
        assert guest.next()[0].op == VsockOp.RST
        with guest.dial(b"CONNECT 5\n"):
            assert guest.quiet() and not guest.vsock._greeting  # it waits in the queue
            guest.packet(VsockOp.RST, 7, src_port=9)
            guest.ended_at_host(second)
            assert guest.next()[0].op == VsockOp.REQUEST


def test_small_packets_take_no_more_memory_than_their_bytes(guest: Guest) -> None:
    with guest.connected(5):
        for _ in range(4):
            guest.packet(VsockOp.RW, 5, bytes(65536))
        unsent = len(guest.vsock._flows[7, 5].unsent)
        for _ in range(50):
            guest.packet(VsockOp.RW, 5, b"y")
        assert isinstance(guest.vsock._flows[7, 5].unsent, bytearray)
        assert len(guest.vsock._flows[7, 5].unsent) <= unsent + 50


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_a_reserved_cid_is_refused(path: str, cid: int) -> None:
    with pytest.raises(UsageError, match="cannot have the CID"):
        VsockDevice(cid, path)
    assert not Path(path).exists()


def test_a_path_without_room_for_the_ports_is_refused(tmp_path: Path) -> None:
    """Every connection of the guest was refused, and nothing said why."""
    longest = len("_4294967295")
    path = str(tmp_path / ("x" * (107 - longest - len(str(tmp_path)) - 1)))
    with Guest(path) as guest:
        guest.connected(0xFFFFFFFE).close()
    with pytest.raises(UsageError, match="is too long for a socket's path"):
        VsockDevice(CID, path + "x")
    assert not Path(path + "x").exists()


# --- drivers that break rules --------------------------------------------------------------------


def broken(guest: Guest, pattern: str) -> None:
    assert guest.device.status & Status.NEEDS_RESET
    assert re.search(pattern, str(guest.device.fault))
    guest.driver.probe()
    assert guest.device.fault is None
    guest.refill()
    guest.connected(99, src_port=99).close()


def test_a_packet_without_a_whole_header_breaks_the_device(guest: Guest) -> None:
    guest.send(TX, bytes(43))
    broken(guest, "43 readable bytes where 44 are needed")


def test_a_packet_shorter_than_it_says_breaks_the_device(guest: Guest) -> None:
    guest.packet(VsockOp.RW, 5, b"12345", len=6)
    broken(guest, "a packet of 6 bytes with 5")


@pytest.mark.parametrize("size", [1, 43, 44])
def test_a_receive_buffer_without_room_breaks_the_device(path: str, size: int) -> None:
    with Guest(path, rooms=0) as guest:
        guest.give(RX, size)
        guest.packet(VsockOp.RW, 5)
        broken(guest, f"a receive buffer of {size} bytes")


@pytest.mark.parametrize("queue", [RX, TX])
def test_a_buffer_of_the_wrong_direction_breaks_the_device(path: str, queue: int) -> None:
    with Guest(path, rooms=0) as guest:
        gpa = guest.driver.allocator.allocate(256)
        guest.driver.queues[queue].add([(gpa, 64)], [(gpa + 64, 64)])
        guest.driver.kick(queue)
        if queue == RX:
            guest.packet(VsockOp.RW, 5)
        broken(guest, "buffer in the [rt]x queue")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*VsockOp, 99]),
            st.sampled_from([5, 6, 0xFFFFFFFF]),
            st.integers(0, 200),
            st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF]),
            st.sampled_from([0, 1, 1 << 18, 0xFFFFFFFF]),
            st.sampled_from([0, 1, 1 << 31, 0xFFFFFFFF]),
            st.sampled_from([1, 1, 1, 2]),
        ),
        max_size=40,
    )
)
def test_whatever_a_guest_sends_the_device_works_for_the_next(
    tmp_path_factory: pytest.TempPathFactory, packets: list[tuple[int, ...]]
) -> None:
    path = str(tmp_path_factory.mktemp("vsock") / "s")
    with Guest(path) as guest, guest.listen(5) as listener:
        for op, port, length, flags, buf_alloc, fwd_cnt, kind in packets:
            guest.packet(
                op,
                port,
                bytes(length),
                flags=flags,
                buf_alloc=buf_alloc,
                fwd_cnt=fwd_cnt,
                type=kind,
            )
            guest.turn(1)
            guest.refill()
        assert guest.device.fault is None
        assert len(guest.vsock._flows) <= 1
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
        guest.driver.probe()
        guest.packets.clear()
        guest.refill()
        with guest.connected(1000, src_port=1000) as sock:
            guest.packet(VsockOp.RW, 1000, b"fine", src_port=1000)
            assert guest.read_host(sock, 4) == b"fine"


# --- rings that stop and go on, and drivers that come and go -------------------------------------


def stop_and_go_on(guest: Guest, *, reset: bool, forget: bool = False) -> None:
    """What a frontend does that pauses a guest: the rings stop, and go on at the same places."""
    queues = guest.driver.queues
    bases = {index: guest.device.stop_queue(index) for index in (RX, TX)}
    used = {index: guest.memory.load16(queues[index].used + 2) for index in (RX, TX)}
    if reset:
        features = guest.device.driver_features
        guest.device.reset()
        guest.device.accept_features(features)
        for status in (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK):
            guest.device.write_status(guest.device.status | status)
    if forget:
        guest.vsock._stopped_at.clear()
    for index in (RX, TX):
        ring = queues[index]
        guest.device.setup_queue(
            index,
            size=ring.size,
            desc=ring.desc,
            avail=ring.avail,
            used=ring.used,
            next_avail=bases[index],
            next_used=used[index],
        )
        guest.device.notify(index)


PLAIN = 1 << Feature.VERSION_1


@pytest.mark.parametrize("reset", [False, True])
def test_connections_outlive_a_pause_of_the_guest(path: str, reset: bool) -> None:
    with Guest(path, features=PLAIN) as guest, guest.connected(5) as sock:
        for _ in range(3):
            sock.send(b"before")
            stop_and_go_on(guest, reset=reset)
            assert guest.next()[1] == b"before"
            guest.packet(VsockOp.RW, 5, b"after")
            assert guest.read_host(sock, 5) == b"after"
        assert guest.quiet() and guest.device.fault is None


def test_a_new_driver_has_no_connections(guest: Guest) -> None:
    with guest.connected(5) as sock:
        guest.driver.probe()
        guest.ended_at_host(sock)
        guest.refill()
        guest.give(EVENT, 4)
        assert guest.quiet() and guest.received(EVENT) == []


def test_a_new_driver_without_a_reset_in_between_has_no_connections(path: str) -> None:
    """QEMU stops the rings of a driver that goes, and says nothing else to the device."""
    with Guest(path, features=PLAIN) as guest, guest.connected(5) as sock:
        for index in (RX, TX):
            ring = guest.driver.queues[index]
            guest.device.stop_queue(index)
            ring.reset()
            guest.device.setup_queue(
                index, size=ring.size, desc=ring.desc, avail=ring.avail, used=ring.used
            )
        guest.refill()
        guest.ended_at_host(sock)
        assert guest.quiet() and guest.received(EVENT) == []


def test_connections_of_a_guest_that_does_not_come_back_end_in_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "PAUSE_SECONDS", 0.0)
    with guest.connected(5) as sock:
        guest.device.reset()
        guest.ring_alarms()
        guest.ended_at_host(sock)


def test_a_driver_whose_connections_are_lost_is_told(path: str) -> None:
    """A device in a new process takes over rings on which an earlier one has worked."""
    with Guest(path, features=PLAIN) as guest:
        guest.packet(VsockOp.RW, 5)
        assert guest.next()[0].op == VsockOp.RST
        stop_and_go_on(guest, reset=True, forget=True)
        ring = guest.driver.queues[EVENT]
        guest.device.setup_queue(
            EVENT, size=ring.size, desc=ring.desc, avail=ring.avail, used=ring.used
        )
        guest.device.notify(EVENT)
        assert guest.received(EVENT) == [bytes(4)]


def test_a_host_can_reset_the_transport(guest: Guest) -> None:
    with guest.connected(5) as sock:
        guest.vsock.transport_reset()
        assert guest.received(EVENT) == [bytes(4)]
        guest.ended_at_host(sock)
        assert guest.quiet()


def test_a_host_can_reset_the_transport_of_a_guest_with_no_room_for_an_event(path: str) -> None:
    """Fuzzing `vsock`: an event buffer of one byte raised `DriverError` into whoever had asked for
    the reset, the host's own code, instead of breaking the guest's device alone."""
    with Guest(path) as guest:
        guest.received(EVENT)
        guest.driver.reset_queue(EVENT)
        guest.driver.setup_queue(EVENT)
        guest.give(EVENT, 1)
        guest.vsock.transport_reset()
        assert isinstance(guest.device.fault, DriverError)
        guest.driver.probe()
        guest.refill()
        guest.give(EVENT, 4)
        guest.vsock.transport_reset()
        assert guest.received(EVENT) == [bytes(4)]


def test_an_answer_that_waited_does_not_end_the_connection_made_since(path: str) -> None:
    """Fuzzing `vsock`: a packet of no connection was due a reset, which waited for a receive
    buffer; then the guest connected from the same port, and got the reset as its answer."""
    with Guest(path, rooms=0) as guest, guest.listen(5):
        guest.packet(VsockOp.CREDIT_UPDATE, 5)
        guest.packet(VsockOp.CREDIT_UPDATE, 6)
        guest.packet(VsockOp.CREDIT_UPDATE, 5, dst_cid=1)
        guest.packet(VsockOp.REQUEST, 5)
        headers = [guest.next()[0] for _ in range(3)]
        assert [(header.src_cid, header.src_port, header.op) for header in headers] == [
            (2, 6, VsockOp.RST),
            (1, 5, VsockOp.RST),  # another address, if not another port
            (2, 5, VsockOp.RESPONSE),
        ]


def test_features_say_what_is_there(guest: Guest) -> None:
    offered = guest.device.device_features
    assert offered >> VsockFeature.STREAM & 1 and offered >> VsockFeature.NO_IMPLIED_STREAM & 1
    assert guest.device.read_config(0, 8) == bytes((CID, 0, 0, 0, 0, 0, 0, 0))


def test_nothing_is_left_of_a_device(path: str) -> None:
    before = descriptors()
    with Guest(path) as guest, guest.listen(5):
        guest.packet(VsockOp.REQUEST, 5)
        with guest.dial(b"CONN"), guest.dial(b"CONNECT 5\n"):
            guest.turn()
    assert not Path(path).exists()
    assert descriptors() == before


# --- many connections at a time ------------------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Connections both ways through real sockets; both ends check every byte."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.guest = Guest(os.path.join(self.directory.name, "s"), buffer=5000)
        self.guest.room_size = 1000
        self.random = random.Random(5)
        self.ports = 100
        self.flows: dict[int, Flow] = {}

    @rule()
    def connect(self) -> None:
        if len(self.flows) < 4:
            self.ports += 1
            sock = self.guest.connected(5, src_port=self.ports, buf_alloc=3000)
            self.flows[self.ports] = Flow(sock)

    @rule(index=st.integers(0, 3), length=st.integers(1, 4000))
    def guest_sends(self, index: int, length: int) -> None:
        for port, flow in list(self.flows.items())[index : index + 1]:
            length = min(length, 5000 - (flow.sent_by_guest - flow.forwarded))
            data = flow.out.randbytes(length)
            flow.sent_by_guest += length
            flow.for_host += data
            if length:
                self.guest.packet(
                    VsockOp.RW, 5, data, src_port=port, buf_alloc=3000, fwd_cnt=flow.read_by_guest
                )

    @rule(index=st.integers(0, 3), length=st.integers(1, 8000))
    def host_sends(self, index: int, length: int) -> None:
        for flow in list(self.flows.values())[index : index + 1]:
            data = self.random.randbytes(length)
            with contextlib.suppress(BlockingIOError):
                flow.for_guest += data[: flow.sock.send(data)]

    @rule(index=st.integers(0, 3), length=st.integers(1, 8000))
    def host_reads(self, index: int, length: int) -> None:
        for flow in list(self.flows.values())[index : index + 1]:
            with contextlib.suppress(BlockingIOError):
                data = flow.sock.recv(length)
                assert data and flow.for_host.startswith(data)
                del flow.for_host[: len(data)]

    @rule()
    def guest_reads(self) -> None:
        self.guest.turn(1)
        self.guest.refill()
        while self.guest.packets:
            header, data = self.guest.packets.popleft()
            flow = self.flows[header.dst_port]
            flow.forwarded = header.fwd_cnt
            assert header.op in (
                VsockOp.RW,
                VsockOp.CREDIT_UPDATE,
                VsockOp.CREDIT_REQUEST,
            )
            assert flow.for_guest.startswith(data)
            del flow.for_guest[: len(data)]
            flow.unread += len(data)
            assert flow.unread <= 3000

    @rule(index=st.integers(0, 3))
    def guest_makes_room(self, index: int) -> None:
        for port, flow in list(self.flows.items())[index : index + 1]:
            flow.read_by_guest += flow.unread
            flow.unread = 0
            self.guest.packet(
                VsockOp.CREDIT_UPDATE,
                5,
                src_port=port,
                buf_alloc=3000,
                fwd_cnt=flow.read_by_guest,
            )

    @invariant()
    def all_is_well(self) -> None:
        assert self.guest.device.fault is None
        assert len(self.guest.vsock._flows) == len(self.flows)

    def teardown(self) -> None:
        for _ in range(200):
            self.guest_reads()
            for index in range(4):
                self.guest_makes_room(index)
                self.host_reads(index, 8000)
            if not any(flow.for_guest or flow.for_host for flow in self.flows.values()):
                break
        for flow in self.flows.values():
            assert not flow.for_guest and not flow.for_host
            flow.sock.close()
        self.guest.close()
        self.directory.cleanup()


class Flow:
    """What both ends of a connection know, in a test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.out = random.Random(9)
        self.for_host = bytearray()
        self.for_guest = bytearray()
        self.sent_by_guest = self.forwarded = self.read_by_guest = self.unread = 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
