"""Frames of one length from a driver that hands out its descriptors in turn: sent as one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from net_frames import make_frame, make_payload
from net_world import (
    OUR_MAC,
    PLAIN,
    RawGuest,
    ScriptedLink,
    ScriptedOutbox,
    World,
    ethernet,
    features,
    frames_by_address,
    tcp_header,
)
from ring_guest import needs_vectors

from vq.abi import NET_HDR
from vq.driver import GuestBuffer
from vq.link import Frame
from vq.memory import GuestMemory
from vq.net_transmit import FrameMaker
from vq.ring_row import Row

pytestmark = needs_vectors


@pytest.fixture(autouse=True)
def by_address() -> Iterator[None]:
    with frames_by_address():
        yield


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x1000, 1 << 20)) as memory:
        yield memory


def outbox(link: ScriptedLink) -> ScriptedOutbox:
    assert isinstance(link.port.outbox, ScriptedOutbox)
    return link.port.outbox


def frame(number: int) -> bytes:
    return ethernet(b"%04d" % number + bytes(46))


def put_all(guest: RawGuest, frames: Sequence[bytes]) -> list[GuestBuffer]:
    return [guest.put(PLAIN + frame) for frame in frames]


def send(guest: RawGuest, buffers: Sequence[GuestBuffer]) -> list[int]:
    heads = [guest.offer(1, [buffer], kick=False) for buffer in buffers]
    guest.driver.kick(1)
    return heads


@pytest.mark.parametrize("count", [1, 4, 32, 128, 200, 256])
def test_frames_of_one_length_are_sent_as_a_row(memory: GuestMemory, count: int) -> None:
    """The way is not there in vain, round and round the ring."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(features("IN_ORDER"))
    frames = [frame(number) for number in range(count)]
    buffers = put_all(guest, frames)
    for turn in range(1, 4):
        heads = send(guest, buffers)
        assert link.port.frames == frames and outbox(link).alike == count * turn
        assert guest.used(1) == [(head, 0) for head in heads]
        assert world.device.stats["tx_frames"] == count * turn
        assert world.device.stats["tx_bytes"] == 64 * count * turn
        link.port.written.clear()


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize(
    "header",
    [
        NET_HDR.pack(1, 0, 0, 0, 34, 16, 0),
        tcp_header(500).pack(),
        NET_HDR.pack(0, 0, 9, 0, 0, 0, 0),
    ],
)
def test_a_frame_that_leaves_work_undone_is_sent_with_its_work(
    memory: GuestMemory, header: bytes, at: int
) -> None:
    link = ScriptedLink()
    guest = World(memory, link).raw(features("CSUM", "HOST_TSO4"))
    data = make_frame(make_payload(800))
    headers = [PLAIN] * 8
    headers[at] = header
    heads = send(guest, [guest.put(header + data) for header in headers])
    headers[at] = PLAIN if header[:2] == b"\0\0" else header
    assert [header[:2] for header, _ in link.port.written] == [header[:2] for header in headers]
    assert link.port.frames == [data] * 8 and outbox(link).alike == 0
    assert guest.used(1) == [(head, 0) for head in heads]


def test_a_locked_source_is_looked_at_in_each_frame(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link, lock_mac=True)
    guest = world.raw()
    ours = ethernet(bytes(50), source=OUR_MAC)
    send(guest, put_all(guest, [ours, ours, ethernet(bytes(50)), ours]))
    assert link.port.frames == [ours] * 3 and outbox(link).alike == 0
    assert world.dropped("tx") == {"source address": 1}


def test_a_responder_is_asked_about_each_frame(memory: GuestMemory) -> None:
    link = ScriptedLink()
    asked = []

    def answer(pieces: Sequence[object]) -> bytes | None:
        asked.append(pieces)
        return None

    guest = World(memory, link, responders=[answer]).raw()
    send(guest, put_all(guest, [frame(n) for n in range(6)]))
    assert len(asked) == len(link.port.written) == 6 and outbox(link).alike == 0


@pytest.mark.parametrize(
    ("shortest", "length", "alike"),
    [(14, 0, 0), (14, 1, 0), (14, 13, 0), (14, 14, 5), (14, 26000, 5), (0, 0, 0), (0, 1, 5)],
)
def test_the_link_judges_frames_that_are_too_short(
    memory: GuestMemory, shortest: int, length: int, alike: int
) -> None:
    link = ScriptedLink()
    link.min_frame = shortest
    guest = World(memory, link).raw()
    send(guest, [guest.put(PLAIN + bytes(length))] * 5)
    assert link.port.frames == [bytes(length)] * 5 and outbox(link).alike == alike


def test_no_row_is_too_much_for_an_outbox(memory: GuestMemory) -> None:
    link = ScriptedLink()
    guest = World(memory, link).raw()
    buffer = guest.put(PLAIN + bytes(26203))
    assert 5 * buffer[1] > outbox(link).most_bytes > 4 * buffer[1]
    send(guest, [buffer] * 5)
    assert link.port.frames == [bytes(26203)] * 5 and outbox(link).alike == 0


@pytest.mark.parametrize("takes", [0, 1, 5])
def test_what_a_full_link_did_not_take_of_a_row_is_sent_later(
    memory: GuestMemory, takes: int
) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw()
    frames = [frame(number) for number in range(8)]
    link.port.takes = takes
    heads = send(guest, put_all(guest, frames))
    assert link.port.frames == frames[:takes] and outbox(link).alike == takes
    assert guest.used(1) == [(head, 0) for head in heads[:takes]]
    assert world.device.stats["tx_frames"] == takes
    assert world.device.stats["tx_bytes"] == 64 * takes
    link.port.takes = None
    assert link.port.on_writable is not None
    link.port.on_writable()
    assert link.port.frames == frames
    assert guest.used(1) == [(head, 0) for head in heads[takes:]]
    assert world.device.stats["tx_frames"] == 8


def test_when_the_link_goes_the_buffers_come_back(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw()
    link.port.error = OSError("gone")
    heads = send(guest, put_all(guest, [frame(n) for n in range(8)]))
    assert sorted(guest.used(1)) == [(head, 0) for head in heads]
    assert world.dropped("tx") == {"link gone": 8}


def test_memory_that_is_not_there_is_left_to_the_plain_way(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = ScriptedLink()
    guest = World(memory, link).raw()
    frames = [frame(number) for number in range(8)]

    def take_alike(*_: object) -> memoryview:
        raise OSError("Bad address")

    monkeypatch.setattr(ScriptedOutbox, "take_alike", take_alike)
    heads = send(guest, put_all(guest, frames))
    assert link.port.frames == frames and guest.used(1) == [(head, 0) for head in heads]


def test_a_driver_may_reset_the_device_while_a_row_is_sent(memory: GuestMemory) -> None:
    """Then the ring's memory is its own again."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw()
    buffers = put_all(guest, [frame(n) for n in range(8)])
    ring = guest.ring(1)
    link.port.before_write = lambda _: guest.driver.transport.reset()
    send(guest, buffers)
    assert outbox(link).alike == 8 and ring.peek_used_index() == 0
    assert ring.peek_used(0) == (0, 0) == ring.peek_used(1)
    assert not world.device._rows, "nor does the device look at it any more"


def test_a_queue_that_stops_leaves_nothing_behind(memory: GuestMemory) -> None:
    """Nobody is to look at a ring's memory when the ring is gone; it may be unmapped."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw()
    send(guest, put_all(guest, [frame(n) for n in range(8)]))
    assert outbox(link).alike == 8 and list(world.device._rows) == [1]
    world.device.stop_queue(1)
    assert not world.device._rows


def test_what_was_looked_at_is_what_is_sent(memory: GuestMemory) -> None:
    """A guest that rewrites all that it owns before the kernel gets to it gains nothing."""
    link = ScriptedLink()
    guest = World(memory, link).raw()
    frames = [frame(number) for number in range(8)]
    buffers = put_all(guest, frames)

    def rewrite(_: Sequence[Frame]) -> None:
        for gpa, length in buffers:
            memory.write(gpa, b"\xff" * length)

    link.port.before_write = rewrite
    send(guest, buffers)
    assert link.port.written == [(PLAIN, frame) for frame in frames] and outbox(link).alike == 8


def test_after_a_row_that_was_not_fit_the_next_bursts_go_the_plain_way(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vq.net_transmit._DETOUR", 3)
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(features("CSUM"))
    ring = world.device.queues[1].ring
    assert ring is not None
    maker = FrameMaker(link, responders=(), stats=world.device.stats)
    row = Row(ring)

    def sent(header: bytes) -> int:
        guest.offer(1, [guest.put(header + frame(0))], kick=False)
        guest.ring(1).publish()
        assert row.look(ring.waiting(), 128) == 1
        done = maker.send_alike(row, outbox(link))
        ring.push_burst(ring.pop_burst(1))
        guest.used(1)
        return done

    assert maker.takes_short_way() and sent(PLAIN) == 1
    assert maker.takes_short_way() and sent(NET_HDR.pack(1, 0, 0, 0, 34, 16, 0)) == 0
    assert [maker.takes_short_way() for _ in range(4)] == [False] * 3 + [True]
    assert sent(PLAIN) == 1 and maker.takes_short_way()
