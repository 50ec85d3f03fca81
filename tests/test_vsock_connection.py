"""Connections without I/O: one end alone, and two ends against each other."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from vq.abi_vsock import (
    VsockHdr,
    VsockOp,
    VsockShutdown,
    VsockType,
)
from vq.devices.vsock_connection import Connection, Header, State

OURS, THEIRS = (2, 1000), (42, 2000)


def packet(op: int, **fields: int) -> Header:
    """A packet of the peer's."""
    made = Header(42, 2, 2000, 1000, op=op, buf_alloc=fields.pop("buf_alloc", 1000))
    return made._replace(**fields)


def established(buffer: int = 100, **fields: int) -> Connection:
    """An end that the peer has connected to, with its answer sent."""
    end = Connection(OURS, THEIRS, buffer=buffer, asking=False)
    end.receive(packet(VsockOp.REQUEST, **fields))
    assert due(end) == [VsockOp.RESPONSE]
    return end


def due(end: Connection) -> list[int]:
    found = []
    while (header := end.next_control()) is not None:
        found.append(header.op)
    return found


# --- headers -------------------------------------------------------------------------------------


def test_a_header_has_the_documented_bytes() -> None:
    header = Header(
        src_cid=0x0102030405060708,
        dst_cid=2,
        src_port=0x11121314,
        dst_port=0x21222324,
        len=0x31323334,
        type=VsockType.SEQPACKET,
        op=VsockOp.CREDIT_REQUEST,
        flags=3,
        buf_alloc=0x41424344,
        fwd_cnt=0x51525354,
    )
    assert header.pack().hex() == (
        "0807060504030201" "0200000000000000" "14131211" "24232221" "34333231"
        "0200" "0700" "03000000" "44434241" "54535251"
    )  # fmt: skip


@given(st.binary(min_size=44, max_size=44))
def test_headers_and_the_structure_agree(data: bytes) -> None:
    header = Header.unpack(data)
    structure = VsockHdr.from_buffer_copy(data)
    assert header._asdict() == {name: getattr(structure, name) for name in Header._fields}
    assert header.pack() == data


# --- one end -------------------------------------------------------------------------------------


def test_an_asking_end_waits_for_the_answer() -> None:
    end = Connection(OURS, THEIRS, buffer=100, asking=True)
    header = end.next_control()
    assert header == Header(2, 42, 1000, 2000, op=VsockOp.REQUEST, buf_alloc=100)
    assert (end.state, end.credit) == (State.REQUESTED, 0)
    end.receive(packet(VsockOp.RESPONSE, buf_alloc=7))
    assert (end.state, end.credit) == (State.ESTABLISHED, 7)


def test_a_refusal_closes_without_an_answer() -> None:
    end = Connection(OURS, THEIRS, buffer=100, asking=True)
    due(end)
    end.receive(packet(VsockOp.RST))
    assert end.state is State.CLOSED and due(end) == []


@pytest.mark.parametrize("op", set(VsockOp) - {VsockOp.RESPONSE, VsockOp.RST})
def test_anything_but_an_answer_resets_a_request(op: VsockOp) -> None:
    end = Connection(OURS, THEIRS, buffer=100, asking=True)
    due(end)
    assert end.receive(packet(op, len=10)) == 0
    assert end.state is State.CLOSED and end.fault and due(end) == [VsockOp.RST]


@pytest.mark.parametrize(
    "header",
    [
        packet(VsockOp.REQUEST),
        packet(VsockOp.RESPONSE),
        packet(VsockOp.INVALID),
        packet(8),
        packet(0xFFFF),
        packet(VsockOp.RW, len=101),
        packet(VsockOp.RW, len=0xFFFFFFFF),
        packet(VsockOp.RW, type=VsockType.SEQPACKET),
        packet(VsockOp.CREDIT_UPDATE, type=0),
    ],
    ids=str,
)
def test_a_peer_that_breaks_a_rule_is_reset(header: Header) -> None:
    end = established()
    assert end.receive(header) == 0
    assert (end.state, due(end)) == (State.CLOSED, [VsockOp.RST])
    assert end.fault
    assert end.receive(packet(VsockOp.RW, len=1)) == 0  # and nothing more is heard of it
    assert due(end) == []


def test_data_is_taken_up_to_the_buffers_size_and_no_further() -> None:
    end = established(buffer=100)
    assert end.receive(packet(VsockOp.RW, len=60)) == 60
    assert end.receive(packet(VsockOp.RW, len=40)) == 40
    assert end.waiting == 100
    end.forwarded(30)
    assert end.receive(packet(VsockOp.RW, len=31)) == 0
    assert end.state is State.CLOSED


def test_word_of_room_is_sent_after_a_quarter_of_the_buffer_or_with_any_packet() -> None:
    end = established(buffer=100)
    end.receive(packet(VsockOp.RW, len=100))
    end.forwarded(24)
    assert not end.has_control
    end.forwarded(1)
    header = end.next_control()
    assert header is not None and (header.op, header.fwd_cnt) == (VsockOp.CREDIT_UPDATE, 25)
    end.forwarded(50)
    assert end.has_control
    assert end.data(3).fwd_cnt == 75  # says it as well
    assert not end.has_control


def test_a_request_for_credit_is_answered_once() -> None:
    end = established()
    for _ in range(3):
        end.receive(packet(VsockOp.CREDIT_REQUEST))
    assert due(end) == [VsockOp.CREDIT_UPDATE]


def test_credit_is_what_the_peer_has_room_for_modulo_the_counters_size() -> None:
    end = established(buf_alloc=1000)
    end._sent = 0xFFFFFF00
    end.receive(packet(VsockOp.CREDIT_UPDATE, fwd_cnt=0xFFFFFF00))
    assert end.credit == 1000
    end.data(600)
    assert (end.credit, end._sent) == (400, 0x158)
    end.receive(packet(VsockOp.CREDIT_UPDATE, fwd_cnt=0x10))
    assert end.credit == 1000 - (0x158 - 0x10)


@pytest.mark.parametrize(
    ("buf_alloc", "fwd_cnt"), [(0, 0), (9, 0), (1000, 1), (1000, 0x80000000), (0xFF, 0xFFFFFFFF)]
)
def test_a_peer_that_counts_wrongly_gets_no_negative_credit(buf_alloc: int, fwd_cnt: int) -> None:
    end = established(buf_alloc=1000)
    end.data(10)
    end.receive(packet(VsockOp.CREDIT_UPDATE, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt))
    assert 0 <= end.credit <= 1000


def test_nothing_is_sent_to_a_peer_that_receives_no_more() -> None:
    end = established()
    end.receive(packet(VsockOp.SHUTDOWN, flags=VsockShutdown.RECEIVE))
    assert end.credit == 0 and end.state is State.ESTABLISHED
    assert end.receive(packet(VsockOp.RW, len=5)) == 5  # the other direction goes on


def test_a_peer_that_sends_no_more_cannot_take_that_back() -> None:
    end = established()
    end.receive(packet(VsockOp.SHUTDOWN, flags=VsockShutdown.SEND))
    end.receive(packet(VsockOp.SHUTDOWN, flags=0))
    assert end.peer_shutdown == VsockShutdown.SEND
    assert end.credit == 1000
    assert end.receive(packet(VsockOp.RW, len=5)) == 0
    assert end.state is State.CLOSED


def test_the_end_is_confirmed_when_all_that_came_is_passed_on() -> None:
    end = established()
    end.receive(packet(VsockOp.RW, len=10))
    end.receive(packet(VsockOp.SHUTDOWN, flags=VsockShutdown.SEND))
    end.receive(packet(VsockOp.SHUTDOWN, flags=0xFFFFFFFD))  # other bits mean nothing
    assert end.peer_shutdown == VsockShutdown.BOTH
    assert due(end) == []
    end.forwarded(10)
    assert (end.state, due(end), end.fault) == (State.CLOSED, [VsockOp.RST], None)


def test_a_shutdown_is_told_once_and_adds_up() -> None:
    end = established()
    for what in (VsockShutdown.SEND, VsockShutdown.SEND, VsockShutdown.BOTH):
        end.shutdown(what)
    header = end.next_control()
    assert header is not None and (header.op, header.flags) == (VsockOp.SHUTDOWN, 3)
    assert due(end) == []
    end.shutdown(VsockShutdown.RECEIVE)
    assert due(end) == [] and end.credit == 0


def test_a_reset_takes_the_place_of_all_that_was_due() -> None:
    end = Connection(OURS, THEIRS, buffer=100, asking=False)
    end.receive(packet(VsockOp.REQUEST))
    end.receive(packet(VsockOp.CREDIT_REQUEST))
    end.reset()
    end.reset()
    assert due(end) == [VsockOp.RST]


# --- two ends ------------------------------------------------------------------------------------


class TwoEnds(RuleBasedStateMachine):
    """Both ends send, read, and shut down as they like; packets come in order."""

    @initialize(buffers=st.tuples(st.integers(1, 50), st.integers(1, 50)))
    def connect(self, buffers: tuple[int, int]) -> None:
        self.random = random.Random(buffers[0])
        self.ends = (
            Connection((2, 1), (3, 1), buffer=buffers[0], asking=True),
            Connection((3, 1), (2, 1), buffer=buffers[1], asking=False),
        )
        # What is under way to each end, what it has and has not read; what was sent to it in all.
        self.wires: tuple[deque[tuple[Header, bytes]], ...] = (deque(), deque())
        self.unread = (bytearray(), bytearray())
        self.read_ = (bytearray(), bytearray())
        self.sent_ = (bytearray(), bytearray())
        self.ended = False

    @rule(end=st.integers(0, 1))
    def send_control(self, end: int) -> None:
        if end == 1 and self.ends[1]._asked is False:
            return  # nobody has asked for it yet
        header = self.ends[end].next_control()
        if header is not None:
            self.wires[1 - end].append((header, b""))

    @rule(end=st.integers(0, 1), length=st.integers(0, 60))
    def send_data(self, end: int, length: int) -> None:
        if self.ends[end].has_control or self.ends[end].state is not State.ESTABLISHED:
            return  # what is due goes first
        length = min(length, self.ends[end].credit)
        if not length:
            self.ends[end].ask_for_credit()
            return
        data = self.random.randbytes(length)
        self.wires[1 - end].append((self.ends[end].data(length), data))
        self.sent_[1 - end].extend(data)

    @rule(end=st.integers(0, 1))
    def deliver(self, end: int) -> None:
        if not self.wires[end]:
            return
        header, data = self.wires[end].popleft()
        taken = self.ends[end].receive(header)
        assert taken in (0, len(data))
        self.unread[end].extend(data[:taken])
        assert len(self.unread[end]) <= self.ends[end].buffer

    @rule(end=st.integers(0, 1), length=st.integers(1, 60))
    def read(self, end: int, length: int) -> None:
        data = self.unread[end][:length]
        del self.unread[end][:length]
        self.read_[end].extend(data)
        self.ends[end].forwarded(len(data))

    @precondition(lambda self: self.random.random() < 0.2)
    @rule(end=st.integers(0, 1), what=st.sampled_from([1, 2, 3]))
    def shut_down(self, end: int, what: int) -> None:
        self.ends[end].shutdown(VsockShutdown(what))
        self.ended = True

    @invariant()
    def nobody_breaks_a_rule(self) -> None:
        if hasattr(self, "ends"):
            for end in (0, 1):
                assert self.ends[end].fault is None
                assert self.ends[end].waiting == len(self.unread[end])
                assert 0 <= self.ends[end].credit <= self.ends[1 - end].buffer
                assert self.sent_[end].startswith(self.read_[end] + self.unread[end])

    def teardown(self) -> None:
        """Left alone, both ends get all that was sent, unless it was given up."""
        if not hasattr(self, "ends"):
            return
        for _ in range(400):
            for end in (0, 1):
                self.send_control(end)
                self.deliver(end)
                self.read(end, 60)
        self.nobody_breaks_a_rule()
        if not self.ended:
            assert [end.state for end in self.ends] == [State.ESTABLISHED] * 2
            assert self.read_ == self.sent_
            for end in (0, 1):
                assert self.ends[end].credit == self.ends[1 - end].buffer or (
                    self.ends[end].credit > self.ends[1 - end].buffer * 3 // 4 - 1
                )


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
