"""The vhost-user server, driven by a scripted frontend that shares nothing with its codec."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhost_frontend import (
    LOG_ALL,
    PAGE,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    USER_BASE,
    VERSION_1,
    Frontend,
    GuestRing,
    Ram,
    Shouter,
    nothing_left_open,
    open_things,
    wait_until,
)

from vq import shared_fd
from vq.abi import Status
from vq.device import Queue
from vq.errors import UsageError
from vq.loop import Loop
from vq.model import DeviceModel
from vq.request import Request
from vq.vhost_user import Client, Connection, Server

MQ, LOG_SHMFD, RARP, ACK, MTU, BACKEND_REQ = (1 << bit for bit in range(6))
CONFIG, SEND_FD, INFLIGHT, RESET_DEVICE, IN_BAND, MEM_SLOTS, STATUS, DEVICE_STATE = (
    1 << bit for bit in (9, 10, 12, 13, 14, 15, 16, 19)
)

pytestmark = [
    pytest.mark.usefixtures("quick_collector"),
    pytest.mark.skipif(
        not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"),
        reason="the scripted frontend needs memfd and eventfd",
    ),
]


class Talk:
    """A loop, a device, a connection to it and the guest's memory."""

    def __init__(self, device: Shouter | None = None) -> None:
        self.loop = Loop()
        self.device = device or Shouter()
        self.ram = Ram()
        self.ring = GuestRing(self.ram)
        self.frontends: list[Frontend] = []
        self.frontend = self.connect()

    def connect(self, offered: int | None = None) -> Frontend:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection = Connection(theirs, self.device, self.loop, name="test", offered=offered)
        self.frontend = Frontend(self.loop, ours)
        self.frontends.append(self.frontend)
        return self.frontend

    def start(self, **how: int) -> Frontend:
        """Up to one running ring."""
        self.frontend.negotiate(**how)
        self.frontend.set_memory(self.ram)
        self.frontend.start_ring(0, self.ring)
        return self.frontend

    def shout(self, text: bytes, index: int = 0) -> list[bytes]:
        ring = self.ring
        ring.offer(text)
        self.frontend.kick(index)
        return ring.take()

    def close(self) -> None:
        for frontend in self.frontends:
            frontend.close()
        self.connection.close()
        self.ram.close()
        self.loop.close()


@pytest.fixture
def talk() -> Iterator[Talk]:
    with nothing_left_open():
        made = Talk()
        yield made
        made.close()


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=2I", index, num)


# --- negotiation ---------------------------------------------------------------------------------


def test_the_features_offered_are_the_devices_and_the_protocols(talk: Talk) -> None:
    offered = talk.frontend.ask_u64(1)
    assert offered == talk.device.device_features | PROTOCOL_FEATURES | LOG_ALL
    protocol = talk.frontend.ask_u64(15)
    any_device = MQ | LOG_SHMFD | ACK | BACKEND_REQ | CONFIG | SEND_FD | INFLIGHT
    assert protocol == any_device | RESET_DEVICE | MEM_SLOTS | STATUS
    assert talk.frontend.ask_u64(17) == 2


def test_the_protocol_features_can_be_limited(talk: Talk) -> None:
    talk.connection.close()
    ours, theirs = socket.socketpair()
    talk.connection = Connection(theirs, talk.device, talk.loop, offered=MQ | ACK, queue_num=1)
    frontend = Frontend(talk.loop, ours)
    with pytest.raises(UsageError, match="RARP"):
        Connection(theirs, talk.device, talk.loop, offered=MQ | RARP)
    with pytest.raises(UsageError, match="PAGEFAULT, bit 63"):
        Server(talk.device, talk.loop, theirs, offered=1 << 8 | 1 << 63)
    assert frontend.ask_u64(15) == MQ | ACK
    assert frontend.ask_u64(17) == 1
    frontend.close()


def test_a_chain_goes_through(talk: Talk) -> None:
    talk.start()
    assert talk.device.status == 15
    assert talk.shout(b"hello") == [b"HELLO"]
    assert talk.frontend.called() == 1
    assert talk.shout(b"again") == [b"AGAIN"]


def test_a_call_that_can_wait_waits_for_a_lull_of_the_loop(talk: Talk) -> None:
    device = talk.device
    talk.start()
    talk.shout(b"the first call is always made")
    assert talk.frontend.called() == 1
    assert device.event_loop is talk.loop
    device.publish = device.publish_without_haste  # type: ignore[method-assign]
    talk.ring.offer(b"hello")
    device.notify(0)
    assert talk.ring.take() == [b"HELLO"] and talk.frontend.called() == 0
    talk.loop.run_once(0)
    assert talk.frontend.called() == 1
    talk.connection.close()
    assert device.event_loop is None


def test_a_driver_whose_device_is_awake_need_not_kick(talk: Talk) -> None:
    talk.start()
    talk.shout(b"hello")
    for word in (b"and", b"again"):
        talk.device.notify(0)  # something else keeps the loop awake
        talk.ring.offer(word)
        talk.loop.run_once(0)
        assert talk.ring.take() == [word.upper()]
    talk.loop.run_once(0)  # it goes to sleep
    talk.ring.offer(b"without a kick")
    talk.loop.run_once(0)
    assert talk.ring.take() == []


def test_features_that_were_not_offered_end_the_connection(
    talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    talk.frontend.send(2, u64(1 << 40))
    assert talk.frontend.is_dropped
    assert "SET_FEATURES: bits [40] were not offered" in caplog.text


def test_need_reply_is_answered_once_reply_ack_is_negotiated(talk: Talk) -> None:
    talk.frontend.send(3, flags=9)
    assert not talk.frontend.is_dropped  # and no reply came: the next one is for GET_FEATURES
    talk.frontend.ask_u64(1)
    talk.frontend.send(16, u64(REPLY_ACK))
    assert talk.frontend.tell(3) == 0
    assert talk.frontend.tell(2, u64(VERSION_1)) == 0


def test_a_request_with_its_own_reply_is_answered_once(talk: Talk) -> None:
    talk.frontend.negotiate()
    talk.frontend.send(1, flags=9)
    assert talk.frontend.receive()[0] == 1
    talk.frontend.turn()
    with pytest.raises(BlockingIOError):
        talk.frontend.socket.recv(1)


def test_in_band_notifications_need_their_two_companions(talk: Talk) -> None:
    talk.connection.close()
    talk.connect(offered=IN_BAND | REPLY_ACK | BACKEND_REQ)
    talk.frontend.send(16, u64(IN_BAND | REPLY_ACK))
    assert talk.frontend.is_dropped


def test_without_protocol_features_rings_start_enabled(talk: Talk) -> None:
    talk.frontend.send(2, u64(VERSION_1))
    talk.frontend.set_memory(talk.ram)
    talk.frontend.start_ring(0, talk.ring, enable=False)
    assert talk.shout(b"old") == [b"OLD"]


def test_a_feature_whose_need_the_frontend_keeps_to_itself_still_holds(talk: Talk) -> None:
    class Needy(Shouter):
        feature_needs = {28: 1 << 29}  # noqa: RUF012

    talk.connection.close()
    talk.device = Needy()
    talk.connect()
    talk.start(features=VERSION_1 | 1 << 28)
    assert talk.device.has_feature(28)
    assert talk.device.has_feature(29)


def test_the_same_features_again_leave_running_rings_alone(talk: Talk) -> None:
    frontend = talk.start()
    resets = talk.device.stats["resets"]
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES))
    assert talk.shout(b"on") == [b"ON"]
    assert talk.device.stats["resets"] == resets


def test_other_features_while_a_ring_runs_are_refused(talk: Talk) -> None:
    talk.start().send(2, u64(VERSION_1 | PROTOCOL_FEATURES | 1 << 29))
    assert talk.frontend.is_dropped


def test_a_new_driver_finds_a_device_that_was_reset(talk: Talk) -> None:
    """A module reload in User-Mode Linux: rings disabled, features again, everything anew."""
    frontend = talk.start()
    assert talk.shout(b"one") == [b"ONE"]
    frontend.send(18, state(0, 0))
    resets = talk.device.stats["resets"]
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES))
    frontend.turn()
    assert talk.device.stats["resets"] == resets + 1
    talk.ram.bytes[talk.ring.desc : talk.ring.desc + 0x4000] = bytes(0x4000)
    talk.ring = GuestRing(talk.ram)
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    assert talk.shout(b"two") == [b"TWO"]


# --- status, reset -------------------------------------------------------------------------------


def test_with_status_the_frontend_brings_the_device_up(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | STATUS)
    assert frontend.ask_u64(40) == 0
    assert frontend.tell(39, u64(Status.FEATURES_OK)) == 0
    assert frontend.ask_u64(40) == Status.FEATURES_OK
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    talk.ring.offer(b"early")
    frontend.turn()
    assert talk.ring.take() == []
    frontend.tell(39, u64(15))
    frontend.turn()
    assert talk.ring.take() == [b"EARLY"]
    frontend.stop_ring(0)
    frontend.tell(39, u64(0))
    assert frontend.ask_u64(40) == 0
    frontend.tell(39, u64(11))
    frontend.start_ring(0, talk.ring, base=1)
    frontend.tell(39, u64(15))
    assert talk.shout(b"late") == [b"LATE"]


def test_a_kick_says_that_the_driver_is_up_where_the_frontend_does_not(talk: Talk) -> None:
    """QEMU 7.2 negotiates STATUS for an entropy device, says FEATURES_OK, and never DRIVER_OK: its
    guests waited for ever for their first random byte."""
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | STATUS)
    frontend.tell(39, u64(Status.FEATURES_OK))
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    assert not frontend.ask_u64(40) & Status.DRIVER_OK
    assert talk.shout(b"anybody") == [b"ANYBODY"]
    assert frontend.ask_u64(40) & Status.DRIVER_OK
    frontend.tell(39, u64(0))
    assert talk.shout(b"nobody") == []


def test_reset_device_stops_every_ring(talk: Talk) -> None:
    frontend = talk.start(protocol=REPLY_ACK | RESET_DEVICE)
    assert frontend.tell(34) == 0
    assert talk.device.status == 0
    assert talk.shout(b"nobody") == []
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES))
    frontend.start_ring(0, talk.ring)
    assert talk.ring.take() == [b"NOBODY"]


def test_reset_owner_only_disables_the_rings(talk: Talk) -> None:
    frontend = talk.start()
    frontend.send(4)
    assert talk.shout(b"later") == []
    frontend.send(18, state(0, 1))
    frontend.turn()
    assert talk.ring.take() == [b"LATER"]


# --- rings ---------------------------------------------------------------------------------------


def test_a_stopped_ring_goes_on_where_it_was(talk: Talk) -> None:
    frontend = talk.start()
    for text in (b"a", b"b", b"c"):
        talk.shout(text)
    assert frontend.stop_ring(0) == 3
    assert talk.shout(b"d") == []
    frontend.start_ring(0, talk.ring, base=3)
    assert talk.ring.take() == [b"D"]


def test_a_ring_may_be_larger_than_the_device_says(talk: Talk) -> None:
    """The protocol has no message in which a device could say it."""
    talk.ring.size = 256
    talk.start()
    assert talk.shout(b"large") == [b"LARGE"]


def test_positions_wrap_around(talk: Talk) -> None:
    talk.ring.start_at(0xFFFE)
    talk.frontend.negotiate()
    talk.frontend.set_memory(talk.ram)
    talk.frontend.start_ring(0, talk.ring, base=0xFFFE)
    texts = [talk.shout(b"%d" % number) for number in range(5)]
    assert texts == [[b"%d" % number] for number in range(5)]
    assert talk.frontend.stop_ring(0) == 3


def test_chains_that_the_device_holds_are_not_counted_as_taken(talk: Talk) -> None:
    talk.device.hold = True
    frontend = talk.start()
    talk.shout(b"x")
    talk.shout(b"y")
    assert len(talk.device.held) == 2
    assert frontend.stop_ring(0) == 0
    talk.device.hold = False
    frontend.start_ring(0, talk.ring, base=0)
    assert talk.ring.take() == [b"X", b"Y"]


def test_a_disabled_ring_rests_and_goes_on_when_enabled(talk: Talk) -> None:
    frontend = talk.start()
    frontend.send(18, state(0, 0))
    assert talk.shout(b"rest") == []
    frontend.send(18, state(0, 1))
    frontend.turn()
    assert talk.ring.take() == [b"REST"]


@pytest.mark.parametrize("order", ["kick first", "enable first", "call last"])
def test_a_ring_starts_in_whatever_order_it_is_described(talk: Talk, order: str) -> None:
    frontend, ring = talk.frontend, talk.ring
    frontend.negotiate()
    frontend.set_memory(talk.ram)
    ring.offer(b"order")
    steps = {
        "num": lambda: frontend.send(8, state(0, ring.size)),
        "base": lambda: frontend.send(10, state(0, 0)),
        "addr": lambda: frontend.set_addresses(0, ring),
        "call": lambda: frontend.send(13, u64(0), [frontend.event("call", 0)]),
        "kick": lambda: frontend.send(12, u64(0), [frontend.event("kick", 0)]),
        "enable": lambda: frontend.send(18, state(0, 1)),
    }
    orders = {
        "kick first": "kick call num addr base enable",
        "enable first": "enable base num addr kick call",
        "call last": "num base addr enable kick call",
    }
    for step in orders[order].split():
        steps[step]()
        frontend.turn()
    assert ring.take() == [b"ORDER"]
    assert frontend.called() == 1  # also when the descriptor came after the fact


def test_a_ring_without_a_kick_descriptor_is_polled(talk: Talk) -> None:
    frontend, ring = talk.frontend, talk.ring
    frontend.negotiate()
    frontend.set_memory(talk.ram)
    frontend.send(8, state(0, ring.size))
    frontend.set_addresses(0, ring)
    frontend.send(13, u64(0x100))
    frontend.send(12, u64(0x100))
    frontend.send(18, state(0, 1))
    frontend.turn()
    ring.offer(b"polled")
    wait_until(talk.loop, lambda: ring.used_idx == 1)
    assert ring.take() == [b"POLLED"]


def test_a_kick_that_was_taken_back_does_not_make_the_backend_wait(talk: Talk) -> None:
    """Between the event loop's word and the read; no clock could tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("a read that never waits is Linux'")
    frontend = talk.start()
    kick = frontend.eventfds["kick", 0]
    os.set_blocking(kick, True)
    kicked = talk.loop._watches  # what the loop does once a descriptor is readable
    for watch in list(kicked.values()):
        if watch.readable is not None and "_kicked" in repr(watch.readable):
            watch.readable()
    assert talk.shout(b"here") == [b"HERE"]


def test_kicks_and_calls_work_over_pipes(talk: Talk) -> None:
    frontend, ring = talk.frontend, talk.ring
    frontend.negotiate()
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, ring)
    kick_out, kick_in = os.pipe()
    call_out, call_in = os.pipe()
    frontend.send(12, u64(0), [kick_out])
    frontend.send(13, u64(0), [call_in])
    frontend.turn()
    os.close(kick_out)
    os.close(call_in)
    for text in (b"p", b"q"):
        ring.offer(text)
        os.write(kick_in, bytes(8))
        frontend.turn()
    assert ring.take() == [b"P", b"Q"]
    assert len(os.read(call_out, 100)) == 16
    os.close(kick_in)  # for ever readable now, but no reason to spin
    frontend.turn()
    kicks: list[int] = []
    talk.device.notify = kicks.append  # type: ignore[method-assign]
    frontend.turn()
    assert kicks == []
    assert not frontend.is_dropped
    os.close(call_out)


def test_a_full_call_descriptor_does_not_stop_the_device(talk: Talk) -> None:
    frontend = talk.start()
    blocking = os.eventfd(0, 0)
    os.eventfd_write(blocking, 2**64 - 2)
    frontend.send(13, u64(0), [blocking])
    frontend.turn()
    assert talk.shout(b"full") == [b"FULL"]
    os.close(blocking)


def test_a_frontend_cannot_make_the_backend_wait_for_its_events(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """O_NONBLOCK belongs to the open file, which is the frontend's, too."""
    monkeypatch.setattr(shared_fd, "TICK_SECONDS", 0.05)
    frontend = talk.start()
    event = os.eventfd(0, 0)
    os.eventfd_write(event, 2**64 - 2)
    frontend.send(13, u64(0), [event])
    frontend.turn()
    with shared_fd.Watchdog():
        for text in (b"once", b"twice", b"thrice"):
            os.set_blocking(event, True)
            assert talk.shout(text) == [text.upper()]
        assert "ring 0: a descriptor that it shares was made to wait" in caplog.text
        assert caplog.text.count("it gets no more events") == 1
        os.eventfd_read(event)
        assert talk.shout(b"late") == [b"LATE"]
        os.set_blocking(event, False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        frontend.send(13, u64(0), [event])  # a descriptor that is set anew is tried anew
        frontend.turn()
        assert talk.shout(b"anew") == [b"ANEW"] and os.eventfd_read(event) == 1
    os.close(event)


def test_a_peer_that_closed_its_end_of_a_pipe_does_no_harm(talk: Talk) -> None:
    frontend = talk.start()
    out, into = os.pipe()
    frontend.send(13, u64(0), [into])
    frontend.turn()
    os.close(out)
    os.close(into)
    assert talk.shout(b"gone") == [b"GONE"]


def test_a_kick_descriptor_that_cannot_be_polled_ends_the_connection(
    talk: Talk, tmp_path: Path
) -> None:
    frontend = talk.start()
    with open(tmp_path / "plain", "w+") as plain:
        frontend.send(12, u64(0), [plain.fileno()])
    assert frontend.is_dropped


def test_new_addresses_move_a_running_ring(talk: Talk) -> None:
    frontend = talk.start()
    talk.shout(b"here")
    other = GuestRing(talk.ram, at=0x40000)
    other.start_at(1)
    frontend.set_addresses(0, other)
    talk.ring = other
    assert talk.shout(b"there") == [b"THERE"]


def test_both_rings_work(talk: Talk) -> None:
    frontend = talk.start()
    first, second = talk.ring, GuestRing(talk.ram, at=0x40000)
    frontend.start_ring(1, second)
    talk.ring = second
    assert talk.shout(b"two", index=1) == [b"TWO"]
    talk.ring = first
    assert talk.shout(b"one") == [b"ONE"]


@pytest.mark.parametrize("protocol", [REPLY_ACK, REPLY_ACK | RESET_DEVICE])
def test_a_device_that_breaks_says_so_on_the_error_descriptor(talk: Talk, protocol: int) -> None:
    frontend = talk.start(protocol=protocol)
    frontend.send(14, u64(0), [frontend.event("err", 0)])
    frontend.turn()
    talk.ring.offer(b"bad", gpa=1 << 40)
    frontend.kick()
    assert talk.device.status & Status.NEEDS_RESET
    assert frontend.called(kind="err") == 1
    assert not frontend.is_dropped
    # Features anew, as after the guest's reset, make it whole.
    frontend.stop_ring(0)
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES))
    frontend.start_ring(0, talk.ring, base=1)
    assert talk.shout(b"good")[-1:] == [b"GOOD"]


# --- memory --------------------------------------------------------------------------------------


def test_a_replaced_memory_table_takes_effect_at_once(talk: Talk) -> None:
    frontend = talk.start()
    assert talk.shout(b"before") == [b"BEFORE"]
    other = Ram(talk.ram.size, user=0x7E00_0000_0000)
    other.bytes[:] = talk.ram.bytes[:]
    ring = GuestRing(other)
    ring.avail_idx = ring.seen = 1
    frontend.set_memory(other)
    frontend.turn()
    # The old addresses mean nothing in the new table, so the ring waits for new ones.
    frontend.set_addresses(0, ring)
    ring.offer(b"after")
    frontend.kick()
    assert ring.take() == [b"AFTER"]
    assert talk.ring.used_idx == 1
    other.close()


def test_a_table_with_the_same_memory_again_changes_nothing_for_the_ring(talk: Talk) -> None:
    before = open_things()[1]
    frontend = talk.start()
    for text in (b"x", b"y", b"z"):
        frontend.set_memory(talk.ram)
        assert talk.shout(text) == [text.upper()]
    assert open_things()[1] == before + 1, "one mapping in the backend"


def test_a_ring_under_new_memory_keeps_the_devices_own_position(talk: Talk) -> None:
    frontend = talk.start()
    talk.shout(b"x")
    struct.pack_into("<H", talk.ram.bytes, talk.ring.used + 2, 77)  # the guest's index is a lie
    frontend.set_memory(talk.ram)
    talk.shout(b"y")
    assert talk.ring.used_idx == 2


def test_regions_come_and_go_by_slots(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | MEM_SLOTS)
    assert frontend.ask_u64(36) >= 32
    high = Ram(gpa=1 << 32, user=0x7D00_0000_0000)
    assert frontend.tell(37, struct.pack("=5Q", 0, *talk.ram.describe()), [talk.ram.fd]) == 0
    assert frontend.tell(37, struct.pack("=5Q", 0, *high.describe()), [high.fd]) == 0
    frontend.start_ring(0, talk.ring)
    assert talk.shout(b"slots") == [b"SLOTS"]
    assert frontend.tell(38, struct.pack("=5Q", 0, *high.describe(offset=77))) == 0
    assert talk.shout(b"less") == [b"LESS"]
    # A descriptor that comes along is closed and nothing else.
    assert frontend.tell(38, struct.pack("=5Q", 0, *talk.ram.describe()), [high.fd]) == 0
    assert talk.shout(b"none") == []
    assert frontend.tell(37, struct.pack("=5Q", 0, *talk.ram.describe()), [talk.ram.fd]) == 0
    frontend.turn()
    assert talk.ring.take() == [b"NONE"]
    frontend.send(38, struct.pack("=5Q", 0, *high.describe()))
    assert frontend.is_dropped
    high.close()


def test_a_region_added_twice_is_there_until_it_is_removed_twice(talk: Talk) -> None:
    """QEMU before 8.1 adds and removes each region once for every queue pair."""
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | MEM_SLOTS)
    region = struct.pack("=5Q", 0, *talk.ram.describe())
    assert frontend.tell(37, region, [talk.ram.fd]) == 0
    assert frontend.tell(37, region, [talk.ram.fd]) == 0
    frontend.start_ring(0, talk.ring)
    assert frontend.tell(38, region) == 0
    assert talk.shout(b"once") == [b"ONCE"]
    assert frontend.tell(38, region) == 0
    assert talk.shout(b"gone") == []
    assert frontend.tell(37, region, [talk.ram.fd]) == 0
    other = Ram()
    frontend.send(37, region, [other.fd])  # the same place, but other memory
    assert frontend.is_dropped
    other.close()


def test_a_region_may_begin_anywhere_in_its_file(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate()
    # Guest-physical 0x8000 is at 0x9000 of the file: a region of its own.
    ram = talk.ram
    table = struct.pack("=2I4Q", 1, 0, 0x8000, 0x40000, ram.user + 0x8000, 0x9000)
    frontend.send(5, table, [ram.fd])
    frontend.turn()
    memory = talk.device.memory
    assert memory is not None
    ram.bytes[0x9010:0x9014] = b"here"
    assert memory.read(0x8010, 4) == b"here"


BAD_TABLES = {
    "overlap in the guest": [(0, 0x2000, 0x10000, 0), (0x1000, 0x2000, 0x20000, 0)],
    "overlap in the frontend": [(0, 0x2000, 0x10000, 0), (0x4000, 0x2000, 0x11000, 0)],
    "nothing": [(0, 0, 0x10000, 0)],
    "larger than the file": [(0, 2 << 20, 0x10000, 0)],
    "offset beyond the file": [(0, 0x1000, 0x10000, 1 << 20)],
    "offset that wraps": [(0, 0x1000, 0x10000, (1 << 64) - 0x800)],
    "guest address that wraps": [((1 << 64) - 0x800, 0x1000, 0x10000, 0)],
    "user address that wraps": [(0, 0x1000, (1 << 64) - 0x800, 0)],
    "enormous": [(0, (1 << 64) - 1, 0, 0)],
}


@pytest.mark.parametrize("regions", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_a_bad_memory_table_changes_nothing_and_ends_the_connection(
    talk: Talk, regions: list[tuple[int, int, int, int]]
) -> None:
    frontend = talk.start()
    payload = struct.pack("=2I", len(regions), 0)
    payload += b"".join(struct.pack("=4Q", *region) for region in regions)
    frontend.send(5, payload, [talk.ram.fd] * len(regions))
    assert frontend.is_dropped
    assert talk.device.memory is None


def test_memory_that_cannot_be_mapped_ends_the_connection(talk: Talk, tmp_path: Path) -> None:
    talk.frontend.negotiate()
    reader, writer = os.pipe()
    talk.frontend.send(5, struct.pack("=2I4Q", 1, 0, 0, 4096, 0, 0), [reader])
    assert talk.frontend.is_dropped
    os.close(reader)
    os.close(writer)


# --- what is refused -----------------------------------------------------------------------------

BAD_MESSAGES: dict[str, tuple[int, bytes]] = {
    "no such request": (77, b""),
    "IOMMU, never offered": (22, bytes(32)),
    "endianness, never offered": (23, state(0, 1)),
    "postcopy, never offered": (28, b""),
    "status, not negotiated": (40, b""),
    "slots, not negotiated": (36, b""),
    "config, not negotiated": (24, struct.pack("=3I4x", 0, 4, 0)),
    "MTU, not negotiated": (20, u64(1500)),
    "inflight, not negotiated": (31, struct.pack("=2Q2H4x", 0, 0, 1, 16)),
    "log without LOG_SHMFD": (6, u64(0)),
    "ring 2 of 2": (8, state(2, 16)),
    "ring size 0": (8, state(1, 0)),
    "ring size 3": (8, state(1, 3)),
    "ring size over the maximum": (8, state(1, 65536)),
    "other size for a running ring": (8, state(0, 32)),
    "base for a running ring": (10, state(0, 5)),
    "base beyond 16 bits": (10, state(1, 0x10000)),
    "neither on nor off": (18, state(0, 2)),
    "enable ring 9": (18, state(9, 1)),
    "stop ring 9": (11, state(9, 0)),
    "kick for ring 9": (12, u64(0x109)),
    "ring flags": (9, struct.pack("=2I4Q", 0, 2, 0, 0, 0, 0)),
    "ring outside the memory": (9, struct.pack("=2I4Q", 0, 0, 1 << 50, 0, 0, 0)),
    "ring address that wraps": (9, struct.pack("=2I4Q", 0, 0, (1 << 64) - 1, 0, 0, 0)),
    "status too wide": (39, u64(0x100)),
    "bad version": (-1, struct.pack("=3I", 3, 2, 0)),
    "a reply": (-1, struct.pack("=3I", 3, 5, 0)),
    "rubbish": (-1, b"GET / HTTP/1.1\r\n\r\n"),
}


@pytest.mark.parametrize("what", BAD_MESSAGES)
def test_a_peer_that_breaks_the_protocol_is_dropped_with_a_reason(
    talk: Talk, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = talk.start(protocol=REPLY_ACK | (STATUS if what == "status too wide" else 0))
    request, payload = BAD_MESSAGES[what]
    if request < 0:
        frontend.send_raw(payload)
    else:
        frontend.send(request, payload)
    assert frontend.is_dropped
    assert "dropped: " in caplog.text
    assert "Traceback" not in caplog.text
    # The device is ready for the next frontend.
    talk.connect()
    talk.ram.bytes[:] = bytes(talk.ram.size)
    talk.ring = GuestRing(talk.ram)
    talk.start()
    assert talk.shout(b"next") == [b"NEXT"]


def test_a_ring_that_reaches_past_its_region_is_refused(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate()
    frontend.set_memory(talk.ram)
    frontend.send(8, state(0, 64))
    end = talk.ram.user + talk.ram.size
    frontend.send(9, struct.pack("=2I4Q", 0, 0, end - 16 * 63, end - 0x4000, end - 0x8000, 0))
    assert frontend.is_dropped


def test_a_misaligned_ring_is_the_drivers_fault(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate()
    frontend.set_memory(talk.ram)
    talk.ring.desc += 1
    frontend.start_ring(0, talk.ring)
    assert talk.device.status & Status.NEEDS_RESET
    assert not frontend.is_dropped


@pytest.mark.parametrize("request_", [1, 2, 5, 8, 12, 18])
def test_surplus_descriptors_end_the_connection(talk: Talk, request_: int) -> None:
    payload = {1: b"", 5: struct.pack("=2I", 0, 0)}.get(request_, bytes(8))
    talk.frontend.send(request_, payload, [talk.ram.fd] * 4)
    assert talk.frontend.is_dropped


def test_more_descriptors_than_any_message_has_end_the_connection(talk: Talk) -> None:
    talk.frontend.send(1, b"", [talk.ram.fd] * 100)
    assert talk.frontend.is_dropped


def test_missing_descriptors_end_the_connection(talk: Talk) -> None:
    talk.frontend.send(12, u64(0))
    assert talk.frontend.is_dropped


def test_messages_may_come_in_any_pieces(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate()
    table = struct.pack("=3I", 5, 1, 40)
    table += struct.pack("=2I", 1, 0) + struct.pack("=4Q", *talk.ram.describe())
    frontend.send_raw(table[:1], [talk.ram.fd])
    for at in range(1, len(table)):
        frontend.send_raw(table[at : at + 1])
        frontend.turn(1)
    together = b"".join(
        struct.pack("=3I", request, 1, len(payload)) + payload
        for request, payload in ((8, state(0, 16)), (10, state(0, 0)), (18, state(0, 1)))
    )
    frontend.send_raw(together)
    frontend.start_ring(0, talk.ring)
    assert talk.shout(b"pieces") == [b"PIECES"]


def test_a_frontend_that_closes_in_the_middle_of_a_message_is_noted(
    talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    talk.frontend.send_raw(b"\x01\x00")
    talk.frontend.close()
    assert "in the middle of a message" in caplog.text
    assert talk.connection.closed


def test_a_frontend_that_does_not_read_replies_is_not_heard_but_does_not_block(
    talk: Talk,
) -> None:
    frontend = talk.frontend
    message = struct.pack("=3I", 1, 1, 0)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1 << 22:
            sent += frontend.socket.send(message * 64)
            frontend.turn(2)
    assert sent < 1 << 22
    got = b""
    while len(got) < sent // 12 * 20:
        try:
            got += frontend.socket.recv(1 << 16)
        except BlockingIOError:
            talk.loop.run_once(0.01)
    assert got[:12] == struct.pack("=3I", 1, 5, 8)


FORMS = {
    **dict.fromkeys((2, 12, 13, 14, 16, 19, 20, 27, 39), "Q"),
    **dict.fromkeys((8, 10, 11, 18, 23, 35, 42), "II"),
    **dict.fromkeys((5, 9), "IIQQQQ"),
    6: "QQ",
    22: "QQQQ",
    **dict.fromkeys((24, 25), "IIII"),
    **dict.fromkeys((31, 32), "QQHHI"),
    **dict.fromkeys((37, 38), "QQQQQ"),
}
NEEDS_FD = {5: "m", 6: "m", 7: "e", 12: "e", 13: "e", 14: "e", 21: "s", 32: "m", 37: "m", 42: "p"}
numbers = st.one_of(
    st.integers(0, 1),
    st.sampled_from(
        [2, 16, 64, 256, 0x100, 0x1000, 0xFFFF, 0x100000, USER_BASE, 1 << 32, (1 << 64) - 1]
    ),
)


@st.composite
def any_message(draw: st.DrawFn) -> tuple[int, bytes, str]:
    """A request, a payload of the right size with wild numbers, and kinds of descriptors."""
    request = draw(st.one_of(st.sampled_from(sorted(FORMS)), st.integers(1, 44)))
    codes = FORMS.get(request, "")
    values = [draw(numbers) & (1 << 8 * struct.calcsize(code)) - 1 for code in codes]
    needed = NEEDS_FD.get(request, "")
    if request in (12, 13, 14) and values[0] & 0x100:
        needed = ""
    fds = draw(st.one_of(st.just(needed), st.just(needed), st.text("mpes", max_size=1)))
    return request, struct.pack("=" + codes, *values), fds


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(any_message(), max_size=20), started=st.booleans())
def test_no_series_of_messages_harms_the_backend(
    messages: list[tuple[int, bytes, str]], started: bool
) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.levelname)  # type: ignore[method-assign]
    logging.getLogger("vq").addHandler(handler)
    talk = Talk()
    everything = MQ | LOG_SHMFD | ACK | BACKEND_REQ | CONFIG | INFLIGHT | RESET_DEVICE
    everything |= IN_BAND | MEM_SLOTS
    talk.connection.close()
    frontend = talk.connect(offered=everything)
    pipe, pair, event = os.pipe(), socket.socketpair(), os.eventfd(0)
    kinds = {"m": talk.ram.fd, "p": pipe[0], "e": event, "s": pair[0].fileno()}
    try:
        frontend.negotiate(protocol=everything)
        if started:
            frontend.set_memory(talk.ram)
            frontend.start_ring(0, talk.ring)
        for request, payload, fds in messages:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                frontend.send(request, payload, [kinds[kind] for kind in fds], flags=9)
            talk.ring.offer(b"noise")
            with contextlib.suppress(KeyError):
                frontend.kick()
        frontend.close()
        talk.loop.run_once(0)
        assert talk.connection.closed
        assert "ERROR" not in records  # that is how a fault of ours would be logged
        talk.connect()
        talk.ram.bytes[:] = bytes(talk.ram.size)
        talk.ring = GuestRing(talk.ram)
        talk.start()
        assert talk.shout(b"well") == [b"WELL"]
    finally:
        logging.getLogger("vq").removeHandler(handler)
        for fd in (*pipe, event):
            os.close(fd)
        for end in pair:
            end.close()
        talk.close()


# --- configuration space, backend channel --------------------------------------------------------


def test_the_configuration_space_is_read_and_written(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | CONFIG)
    answer = frontend.ask(24, struct.pack("=3I", 2, 6, 0) + bytes(6))
    assert answer == struct.pack("=3I", 2, 6, 0) + bytes.fromhex("2211 05000000")
    whole = frontend.ask(24, struct.pack("=3I", 0, 256, 0) + bytes(256))
    assert len(whole) == 12 + 256
    assert frontend.tell(25, struct.pack("=3I", 4, 4, 0) + b"abcd") == 0
    assert talk.device.writes == [(4, b"abcd")]
    assert frontend.tell(25, struct.pack("=3I", 4, 4, 1) + b"\x09\0\0\0") == 0
    assert talk.device.read_config(4, 4) == b"\x09\0\0\0"
    assert frontend.tell(25, struct.pack("=3I", 6, 4, 1) + b"long") != 0
    frontend.send(25, struct.pack("=3I", 0, 4, 2) + b"flag")
    assert frontend.is_dropped


def test_a_change_of_the_configuration_space_is_told_on_the_channel(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | CONFIG | BACKEND_REQ)
    ours, theirs = socket.socketpair()
    assert frontend.tell(21, fds=[theirs.fileno()]) == 0
    theirs.close()
    ours.setblocking(False)
    talk.device.update_config(volume=11)  # no driver yet: nobody is told
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    with pytest.raises(BlockingIOError):
        ours.recv(100)
    talk.device.update_config(volume=12)
    assert ours.recv(100) == struct.pack("=3I", 2, 1, 0)
    frontend.stop_ring(0)
    talk.device.update_config(volume=13)  # suspended: not a word
    with pytest.raises(BlockingIOError):
        ours.recv(100)
    frontend.close()
    assert ours.recv(100) == b""
    ours.close()


def test_a_channel_that_is_not_read_or_is_closed_does_no_harm(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | CONFIG | BACKEND_REQ)
    ours, theirs = socket.socketpair()
    frontend.tell(21, fds=[theirs.fileno()])
    theirs.close()
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    for volume in range(20000):
        talk.device.update_config(volume=volume)
    assert talk.shout(b"still") == [b"STILL"]
    ours.close()
    frontend.turn()
    talk.device.update_config(volume=1)
    assert talk.shout(b"here") == [b"HERE"]


def test_a_channel_that_is_no_socket_ends_the_connection(talk: Talk) -> None:
    talk.frontend.negotiate(protocol=REPLY_ACK | BACKEND_REQ)
    talk.frontend.send(21, fds=[talk.ram.fd])
    assert talk.frontend.is_dropped


def test_notifications_go_in_band_when_there_are_no_descriptors(talk: Talk) -> None:
    talk.connection.close()
    frontend, ring = talk.connect(offered=IN_BAND | REPLY_ACK | BACKEND_REQ), talk.ring
    frontend.negotiate(protocol=REPLY_ACK | BACKEND_REQ | IN_BAND)
    ours, theirs = socket.socketpair()
    frontend.tell(21, fds=[theirs.fileno()])
    theirs.close()
    frontend.set_memory(talk.ram)
    frontend.send(8, state(0, ring.size))
    frontend.set_addresses(0, ring)
    frontend.send(18, state(0, 1))
    ring.offer(b"band")
    frontend.turn()
    assert ring.used_idx == 0
    assert frontend.tell(35, state(0, 0)) == 0
    assert ring.take() == [b"BAND"]  # served before it was acknowledged
    ours.setblocking(False)
    assert ours.recv(100) == struct.pack("=3I2I", 4, 9, 8, 0, 0)
    ours.send(struct.pack("=3IQ", 4, 5, 8, 0))
    frontend.turn()
    assert not frontend.is_dropped
    ours.close()


# --- dirty log -----------------------------------------------------------------------------------


def test_what_the_device_writes_is_in_the_dirty_log(talk: Talk) -> None:
    frontend = talk.start(protocol=REPLY_ACK | LOG_SHMFD)
    talk.shout(b"clean")
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, 2 * PAGE)
    pages = talk.ram.size // PAGE
    assert frontend.ask_u64(6, struct.pack("=2Q", pages // 8, 8), [log_fd]) == 0

    def dirty() -> set[int]:
        bits = os.pread(log_fd, pages // 8, 8)
        os.pwrite(log_fd, bytes(pages // 8), 8)
        return {page for page in range(pages) if bits[page // 8] >> page % 8 & 1}

    talk.shout(b"not yet")
    assert dirty() == set()
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES | LOG_ALL))
    frontend.set_addresses(0, talk.ring, flags=1)
    frontend.turn()
    dirty()
    talk.shout(b"dirty")
    # Other processes may mark pages in the same log: whole bytes of it are set.
    first, last = talk.ring.used // PAGE // 8, talk.ring.buffers // PAGE // 8
    assert (
        {talk.ring.used // PAGE, talk.ring.buffers // PAGE}
        <= dirty()
        <= set(range(8 * first, 8 * last + 8))
    )
    frontend.set_memory(talk.ram)  # a replaced table goes on being logged
    talk.shout(b"still")
    assert talk.ring.buffers // PAGE in dirty()
    frontend.stop_ring(0)
    dirty()
    talk.shout(b"stopped")
    assert dirty() == set()
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES))
    frontend.start_ring(0, talk.ring, base=4)
    talk.shout(b"off")
    assert dirty() == set()
    os.close(log_fd)


def test_a_log_too_small_for_the_memory_ends_the_connection(talk: Talk) -> None:
    frontend = talk.start(protocol=REPLY_ACK | LOG_SHMFD)
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, PAGE)
    frontend.ask_u64(6, struct.pack("=2Q", 8, 0), [log_fd])
    frontend.send(2, u64(VERSION_1 | PROTOCOL_FEATURES | LOG_ALL))
    assert frontend.is_dropped
    os.close(log_fd)


def test_a_used_ring_is_logged_where_it_lies(talk: Talk) -> None:
    frontend = talk.start()
    frontend.set_addresses(0, talk.ring, flags=1)
    assert not frontend.is_dropped
    ring, user = talk.ring, talk.ram.user
    parts = (user + ring.desc, user + ring.used, user + ring.avail)
    frontend.send(9, struct.pack("=2I4Q", 0, 1, *parts, ring.used + PAGE))
    assert frontend.is_dropped


def test_a_log_beyond_its_file_ends_the_connection(talk: Talk) -> None:
    frontend = talk.start(protocol=REPLY_ACK | LOG_SHMFD)
    frontend.send(6, struct.pack("=2Q", 2 << 20, 0), [talk.ram.fd])
    assert frontend.is_dropped


# --- inflight notes, reconnecting ----------------------------------------------------------------


def test_chains_that_a_killed_backend_had_are_taken_again_in_order(talk: Talk) -> None:
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
    frontend.send(31, struct.pack("=2Q2H4x", 0, 0, 2, 16))
    _, _, answer, (notes_fd,) = frontend.receive()
    size, offset, queues, queue_size = struct.unpack("=2Q2H4x", answer)
    assert (offset, queues, queue_size) == (0, 2, 16)
    frontend.tell(32, answer, [notes_fd])
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring)
    assert talk.shout(b"done") == [b"DONE"]
    talk.device.hold = True
    talk.shout(b"one")
    talk.shout(b"two")
    talk.device.hold = False
    three = talk.shout(b"three")
    assert three == [b"THREE"]  # out of order, before the two that are held
    # The backend dies now: what it had noted stands in the shared memory, and nothing more.
    notes = os.pread(notes_fd, size, 0)
    memory = bytes(talk.ram.bytes)
    frontend.close()
    os.pwrite(notes_fd, notes, 0)
    talk.ram.bytes[:] = memory

    assert struct.unpack_from("=Q4H", notes) == (0, 1, 16, 6, 2)
    talk.ring.offer(b"four")
    frontend = talk.connect()
    frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
    frontend.tell(32, answer, [notes_fd])
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, talk.ring, base=talk.ring.used_idx)
    assert talk.ring.take() == [b"ONE", b"TWO", b"FOUR"]
    assert frontend.stop_ring(0) == 5
    os.close(notes_fd)


def test_chains_to_be_taken_again_survive_a_new_memory_table(talk: Talk) -> None:
    ring, frontend = talk.ring, talk.frontend
    for text in (b"a", b"b", b"c"):
        ring.offer(text)
    notes = bytearray(4096)
    struct.pack_into("=Q4H", notes, 0, 0, 1, 16, 0, 0)
    struct.pack_into("=B5xHQ", notes, 16, 1, 0, 5)  # the first two, the later one first
    struct.pack_into("=B5xHQ", notes, 16 + 32, 1, 0, 4)
    fd = os.memfd_create("notes")
    os.write(fd, notes)
    talk.device.hold = True
    frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
    frontend.tell(32, struct.pack("=2Q2H4x", 4096, 0, 1, 16), [fd])
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, ring)
    assert len(talk.device.held) == 3
    talk.device.hold = False
    frontend.set_memory(talk.ram)
    frontend.turn()
    assert ring.take() == [b"B", b"A", b"C"]
    assert frontend.stop_ring(0) == 3
    os.close(fd)


def test_inflight_notes_do_not_change_under_a_running_ring(talk: Talk) -> None:
    frontend = talk.start(protocol=REPLY_ACK | INFLIGHT)
    frontend.send(31, struct.pack("=2Q2H4x", 0, 0, 2, 16))
    assert frontend.is_dropped


def test_a_batch_published_but_not_yet_noted_is_not_taken_twice(talk: Talk) -> None:
    """The backend died between storing used.idx and clearing its notes."""
    ring, frontend = talk.ring, talk.frontend
    for text in (b"a", b"b", b"c"):
        ring.offer(text)
    struct.pack_into("<H", ring.ram.bytes, ring.used + 2, 2)  # a and b went back
    ring.seen = 2
    notes = bytearray(4096)
    struct.pack_into("=Q4H", notes, 0, 0, 1, 16, 2, 0)  # the last batch begins at head 2 ...
    for head, following, counter in ((0, 0, 5), (2, 0, 6), (4, 0, 7)):  # ... and goes on at 0
        struct.pack_into("=B5xHQ", notes, 16 + 16 * head, 1, following, counter)
    fd = os.memfd_create("notes")
    os.write(fd, notes)
    frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
    frontend.tell(32, struct.pack("=2Q2H4x", 4096, 0, 1, 16), [fd])
    frontend.set_memory(talk.ram)
    frontend.start_ring(0, ring, base=2)
    assert ring.take() == [b"C"]
    os.close(fd)


@pytest.mark.parametrize(
    ("notes", "described"),
    [
        ((0, 2, 16, 0, 0), (4096, 0, 1, 16)),  # version 2
        ((0, 1, 8, 0, 0), (4096, 0, 1, 16)),  # another size
        ((0, 1, 16, 99, 0xFFFF), (4096, 0, 1, 16)),  # a batch that begins outside
        ((0, 1, 16, 0, 0), (8192, 0, 1, 16)),  # beyond the file
        ((0, 1, 16, 0, 0), (4096, 4096, 1, 16)),
        ((0, 1, 16, 0, 0), (64, 0, 1, 16)),  # too small
        ((0, 1, 16, 0, 0), (4096, 0, 3, 16)),  # more queues than there are
        ((0, 1, 16, 0, 0), (4096, 0, 0, 16)),
        ((0, 1, 16, 0, 0), (4096, 0, 1, 0)),
        ((0, 1, 8, 0, 0), (4096, 0, 1, 8)),  # the ring has more descriptors
    ],
)
def test_inflight_notes_that_cannot_be_end_the_connection(
    talk: Talk, notes: tuple[int, ...], described: tuple[int, ...]
) -> None:
    fd = os.memfd_create("notes")
    os.write(fd, struct.pack("=Q4H", *notes).ljust(4096, b"\0"))
    frontend = talk.frontend
    frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
    frontend.send(32, struct.pack("=2Q2H4x", *described), [fd])
    frontend.turn()
    with contextlib.suppress(OSError):
        frontend.set_memory(talk.ram)
        frontend.start_ring(0, talk.ring)
    assert frontend.is_dropped
    os.close(fd)


BACKEND_PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from vhost_frontend import Shouter
from vq.loop import Loop
from vq.vhost_user import Server

class Slow(Shouter):
    def process(self, queue, ring):
        for chain in reversed(ring.pop_burst(16)):
            time.sleep(0.001)
            text = bytes(chain.readable[0]).upper()
            chain.writable[0][: len(text)] = text
            chain.written = len(text)
            ring.write_used(chain)
            self.publish(queue)
        return ring.enable_kicks()

loop = Loop()
server = Server(Slow(), loop, sys.argv[2])
print("ready", flush=True)
loop.run()
"""


def test_a_backend_killed_at_any_moment_loses_nothing_and_does_nothing_twice(
    tmp_path: Path,
) -> None:
    ram, idle, path = Ram(), Loop(), tmp_path / "s"
    ring = GuestRing(ram)
    inflight: tuple[bytes, int] | None = None
    offered, answers, in_the_middle = 0, list[bytes](), 0
    for life in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", BACKEND_PROCESS, str(Path(__file__).parent), str(path)],
            stdout=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                frontend = connected(idle, path)
                frontend.negotiate(protocol=REPLY_ACK | INFLIGHT)
                if inflight is None:
                    frontend.send(31, struct.pack("=2Q2H4x", 0, 0, 2, 16))
                    _, _, described, (fd,) = frontend.receive()
                    inflight = described, fd
                frontend.tell(32, inflight[0], [inflight[1]])
                frontend.set_memory(ram)
                frontend.start_ring(0, ring, base=ring.used_idx)
                began = time.monotonic()
                until = began + 0.1 + 0.0113 * life
                while time.monotonic() < until or len(answers) < 10 * life + 10:
                    assert time.monotonic() < began + 30, "it answers no more"
                    answers += ring.take()
                    if ring.seen == ring.avail_idx:
                        for _ in range(8):
                            ring.offer(b"n%d" % offered)
                            offered += 1
                        os.eventfd_write(frontend.eventfds["kick", 0], 1)
                    time.sleep(0.0005)
            finally:
                process.kill()
        in_the_middle += ring.used_idx != ring.avail_idx
        frontend.close()
    answers += ring.take()
    assert len(answers) > 50
    assert in_the_middle
    assert len(set(answers)) == len(answers)
    # Only what the last one was killed over has no answer.
    whole = len(answers) // 8 * 8
    assert set(answers) >= {b"N%d" % number for number in range(whole)}
    assert inflight is not None
    os.close(inflight[1])
    ram.close()
    idle.close()


# --- state ---------------------------------------------------------------------------------------


class Saved(Shouter):
    """A device with a state, RARP and an MTU."""

    state = b"s" * 300_000
    mtu = 0
    mac = b""

    def save_state(self) -> bytes:
        return self.state

    def load_state(self, state: bytes) -> None:
        if state.startswith(b"!"):
            raise UsageError("not a state")
        self.state = state

    def set_mtu(self, mtu: int) -> bool:
        self.mtu = mtu
        return mtu >= 68

    def send_rarp(self, mac: bytes) -> None:
        self.mac = mac


@pytest.fixture
def saved(talk: Talk) -> Talk:
    talk.connection.close()
    talk.device = Saved()
    talk.connect().negotiate(protocol=REPLY_ACK | DEVICE_STATE | MTU | RARP)
    return talk


def test_a_device_is_asked_for_what_it_can_do_beyond_any_device(saved: Talk) -> None:
    frontend, device = saved.frontend, saved.device
    assert isinstance(device, Saved)
    assert frontend.tell(20, u64(1500)) == 0
    assert frontend.tell(20, u64(9)) != 0
    assert frontend.tell(19, bytes.fromhex("020000000102 0000")) == 0
    assert device.mac == bytes.fromhex("020000000102")


def test_a_devices_state_is_saved_and_loaded(saved: Talk) -> None:
    frontend, device = saved.frontend, saved.device
    assert isinstance(device, Saved)
    reader, writer = os.pipe()
    assert frontend.ask_u64(42, struct.pack("=2I", 0, 0), [writer]) == 0x100
    os.close(writer)
    os.set_blocking(reader, False)
    got = b""
    while True:
        frontend.turn(2)
        try:
            piece = os.read(reader, 65536)
        except BlockingIOError:
            continue
        if not piece:
            break
        got += piece
    assert got == b"s" * 300_000
    assert frontend.ask_u64(43) == 0
    os.close(reader)

    for content, failed in ((b"new state", False), (b"! bad", True)):
        reader, writer = os.pipe()
        assert frontend.ask_u64(42, struct.pack("=2I", 1, 0), [reader]) == 0x100
        os.close(reader)
        os.write(writer, content)
        frontend.send(43)  # asked before all has come: answered when it has
        frontend.turn()
        os.close(writer)
        _, _, answer, _ = frontend.receive()
        assert bool(struct.unpack("=Q", answer)[0]) is failed
    assert device.state == b"new state"


def test_state_is_not_saved_while_rings_run(saved: Talk) -> None:
    frontend = saved.frontend
    frontend.set_memory(saved.ram)
    frontend.start_ring(0, saved.ring)
    reader, writer = os.pipe()
    assert frontend.ask_u64(42, struct.pack("=2I", 0, 0), [writer]) & 0xFF != 0
    assert frontend.ask_u64(43) != 0
    os.close(reader)
    os.close(writer)


# --- servers and clients -------------------------------------------------------------------------


def connected(loop: Loop, path: Path) -> Frontend:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return Frontend(loop, sock)


def test_a_thousand_connections_leave_nothing_behind(tmp_path: Path) -> None:
    loop, device, ram = Loop(), Shouter(), Ram()
    path = tmp_path / "s"
    server = Server(device, loop, path)
    counts = set()
    resident: list[int] = []
    for number in range(1000):
        frontend = connected(loop, path)
        frontend.negotiate(protocol=REPLY_ACK | BACKEND_REQ)
        frontend.set_memory(ram)
        ours, theirs = socket.socketpair()
        frontend.send(21, fds=[theirs.fileno()])
        theirs.close()
        ram.bytes[0x10000:0x18000] = bytes(0x8000)
        ring = GuestRing(ram)
        frontend.start_ring(0, ring)
        ring.offer(b"n%d" % number)
        frontend.kick()
        assert ring.take() == [b"N%d" % number]
        if number % 3 == 0:
            frontend.send(99)  # some are dropped, some leave in the middle of a message
        elif number % 3 == 1:
            frontend.send_raw(b"\x05", [ram.fd])
        frontend.close()
        ours.close()
        wait_until(loop, lambda: server.connection is None)
        if number % 100 == 50:
            counts.add(open_things())
            resident.append(psutil.Process().memory_info().rss)
    assert len(counts) == 1
    # As at the start, once the first connections have warmed everything up: 900 of them cost less
    # than a tenth of what one maps.
    assert resident[-1] - resident[0] < ram.size // 10, resident
    assert server.connections == 1000
    server.close()
    assert not path.exists()
    ram.close()
    loop.close()


def test_a_second_frontend_waits_for_the_first_to_leave(tmp_path: Path) -> None:
    loop = Loop()
    server = Server(Shouter(), loop, tmp_path / "s")
    first, second = connected(loop, tmp_path / "s"), connected(loop, tmp_path / "s")
    first.ask_u64(1)
    second.send(1)
    second.turn()
    with pytest.raises(BlockingIOError):
        second.socket.recv(1)
    first.close()
    assert second.receive()[0] == 1
    second.close()
    server.close()
    loop.close()


def test_several_devices_share_a_loop(tmp_path: Path) -> None:
    loop, rams = Loop(), [Ram(), Ram()]
    servers = [Server(Shouter(), loop, tmp_path / name) for name in "ab"]
    frontends = [connected(loop, tmp_path / name) for name in "ab"]
    rings = [GuestRing(ram) for ram in rams]
    for frontend, ram, ring in zip(frontends, rams, rings, strict=True):
        frontend.negotiate()
        frontend.set_memory(ram)
        frontend.start_ring(0, ring)
    frontends[0].send(99)  # breaks the protocol: the other goes on
    rings[1].offer(b"mine")
    frontends[1].kick()
    assert rings[1].take() == [b"MINE"]
    assert frontends[0].is_dropped
    for frontend in frontends:
        frontend.close()
    for server in servers:
        server.close()
    for ram in rams:
        ram.close()
    loop.close()


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    loop = Loop()
    server = Server(Shouter(), loop, path)
    with pytest.raises(UsageError, match="is served already"):
        Server(Shouter(), loop, path)
    server.close()
    path.write_text("a file")
    with pytest.raises(UsageError, match="not a socket"):
        Server(Shouter(), loop, path)
    loop.close()


def test_a_listening_socket_can_be_handed_over(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    loop = Loop()
    server = Server(Shouter(), loop, listener)
    frontend = connected(loop, tmp_path / "s")
    assert frontend.ask_u64(17) == 2
    frontend.close()
    server.close()
    assert (tmp_path / "s").exists()  # not ours to remove
    loop.close()


def test_a_client_connects_as_soon_as_there_is_a_frontend_and_again(tmp_path: Path) -> None:
    loop, gone = Loop(), list[int]()
    client = Client(
        Shouter(), loop, tmp_path / "s", retry=0.01, on_disconnect=lambda: gone.append(1)
    )
    loop.run_once(0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        for number in (1, 2):
            wait_until(loop, lambda number=number: client.connections == number)  # type: ignore[misc]
            frontend = Frontend(loop, listener.accept()[0])
            assert frontend.ask_u64(17) == 2
            frontend.close()
            wait_until(loop, lambda number=number: len(gone) == number)  # type: ignore[misc]
        client.close()
    loop.close()


def test_a_model_that_fails_costs_only_its_own_connection(
    talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(offset: int, length: int) -> bytes:
        raise ZeroDivisionError

    talk.frontend.negotiate(protocol=REPLY_ACK | CONFIG)
    talk.device.read_config = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        talk.frontend.send(24, struct.pack("=3I", 0, 4, 0) + bytes(4))
        assert talk.frontend.is_dropped
    assert "ZeroDivisionError" in caplog.text


class OutOfOrder(DeviceModel):
    """Keeps its first request until another one says so."""

    device_id = 4

    def __init__(self) -> None:
        super().__init__(queues=[("requests", 16, self.serve)])
        self.kept: list[Request] = []

    def serve(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if bytes(request.reader.views()[0]) == b"keep" and "all" not in self.stats:
                self.kept.append(request)
            else:
                request.writer.write(b"done")
                request.complete()

    def queue_stopping(self, queue: Queue) -> None:
        super().queue_stopping(queue)
        self.kept.clear()


@pytest.mark.parametrize("between", ["nothing", "disabled"])
def test_a_request_that_waits_to_be_taken_again_outlives_a_second_stop(
    talk: Talk, between: str
) -> None:
    """QEMU adds memory region by region: each stops every ring, and one that the device had taken
    before the first was forgotten with the second, unless the ring's turn came in between."""
    talk.connection.close()
    talk.device = OutOfOrder()  # type: ignore[assignment]
    talk.connect()
    talk.start()
    assert talk.shout(b"keep") == [] and talk.shout(b"next") == [b"done"]
    talk.device.stats["all"] = 1
    if between == "disabled":
        talk.frontend.send(18, state(0, 0))
    talk.frontend.set_memory(talk.ram)
    talk.frontend.set_memory(talk.ram)
    talk.frontend.send(18, state(0, 1))
    talk.frontend.turn()
    assert talk.ring.used_idx == 2
