"""Frames that are sent in place, by address, are those of the plain way.

The port here fetches them out of the guest's memory when it is asked to, as a kernel would.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import MACS, UDP, make_frame, make_payload
from net_world import (
    OTHER_MAC,
    OUR_MAC,
    PLAIN,
    RawGuest,
    ScriptedLink,
    ScriptedOutbox,
    World,
    ethernet,
    features,
    frames_by_address,
    snapshot,
    tcp_header,
    udp_header,
)

from vq.driver import GuestBuffer
from vq.errors import DriverError, UsageError
from vq.link import MAX_FRAME, MOST_AT_ONCE, MOST_PIECES, START_ROOM, Frame
from vq.memory import GuestMemory
from vq.net_transmit import FrameMaker
from vq.offload import ALL, Offload
from vq.ring_run import TableRun
from vq.software import MOST_OF_START

ALL_HOST = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO")
WANTED = features(*ALL_HOST, "INDIRECT_DESC")
TCP4 = make_frame(make_payload(3000))
TCP6 = make_frame(make_payload(3000), version=6)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 8 << 20)) as memory:
        yield memory


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All frames go this way that can."""
    with frames_by_address():
        monkeypatch.setattr("vq.net._WORTH_A_BATCH", 1000)
        yield


def outbox(link: ScriptedLink) -> ScriptedOutbox:
    assert isinstance(link.port.outbox, ScriptedOutbox)
    return link.port.outbox


def in_pieces(data: bytes, *cuts: int) -> list[bytes]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def offer(guest: RawGuest, data: bytes, *cuts: int) -> int:
    """A frame behind its net header, in buffers cut there."""
    return offer_buffers(guest, [guest.put(piece) for piece in in_pieces(data, *cuts)])


def offer_buffers(
    guest: RawGuest, buffers: Sequence[GuestBuffer], *, table: bool = True, writable: int = 0
) -> int:
    """A chain of these buffers, in an indirect table or without; returns its head."""
    room = [guest.room(writable)] if writable else []
    count = len(buffers) + len(room)
    place = guest.driver.allocator.allocate(16 * count, 16) if table else None
    return guest.ring(1).add(buffers, room, indirect=place)


# --- whatever a guest sends ----------------------------------------------------------------------


class Sent(NamedTuple):
    """One frame, as a guest offers it."""

    data: bytes
    cuts: tuple[int, ...]
    table: bool
    repeated: int = 0
    """Buffers of 64 KiB more, all of them the same."""
    writable: int = 0


good_frames = st.sampled_from(
    (
        PLAIN + ethernet(make_payload(46)),
        PLAIN + ethernet(make_payload(1500)),
        b"\0\0" + b"\x77" * 10 + ethernet(make_payload(900)),  # nothing of this has a meaning
        tcp_header().pack() + make_frame(make_payload(100)),
        tcp_header(start=14).pack() + ethernet(make_payload(18)),
        tcp_header(1448).pack() + TCP4,
        tcp_header(1000, version=6).pack() + TCP6,
        tcp_header(1000, ecn=True).pack() + TCP4,
        tcp_header(536).pack() + make_frame(make_payload(20000), tcp_options=b"\1" * 12),
        udp_header(500).pack() + make_frame(make_payload(1800), protocol=UDP),
        udp_header().pack() + make_frame(make_payload(1800), protocol=UDP),
    )
)
odd_frames = st.sampled_from(
    (
        PLAIN,
        PLAIN + bytes(13),
        PLAIN + bytes(14),
        b"\2" + PLAIN[1:] + ethernet(bytes(50)),
        tcp_header(start=13).pack() + ethernet(bytes(50)),
        tcp_header(start=48).pack() + ethernet(bytes(50)),
        tcp_header(100)._replace(gso_size=0).pack() + TCP4,
        tcp_header(100)._replace(flags=0).pack() + TCP4,
        tcp_header(100)._replace(gso_type=0x7F).pack() + TCP4,
        tcp_header(1).pack() + TCP4,
        tcp_header(1448).pack() + TCP4[:-1],
        tcp_header(1448).pack() + TCP4 + b"\0",
        tcp_header(1448).pack() + TCP4[:40],
        tcp_header(1448).pack() + make_frame(make_payload(3000), ip_checksum=False),
        tcp_header(1448).pack() + make_frame(make_payload(3000), options=b"\1" * 4),
        tcp_header(1448).pack() + TCP6,
        tcp_header(1448, start=38).pack() + make_frame(make_payload(3000), vlan=b"\x81\0\0\5"),
        PLAIN[:11],
        b"\1",
    )
)
cuts = st.sampled_from(((), (12,), (66,), (66, 80), (78, 1000, 2000), (12, 66), (5,), (12, 26, 40)))
good = st.builds(
    Sent, good_frames, cuts, st.sampled_from((True, True, True, False)), st.just(0), st.just(0)
)
odd = st.builds(
    Sent,
    good_frames | odd_frames,
    cuts | st.lists(st.integers(1, 200), max_size=12).map(tuple),
    st.booleans(),
    st.sampled_from((0, 0, 0, 0, 3, 4, 5)),
    st.sampled_from((0, 0, 0, 0, 0, 8)),
)
bursts = st.tuples(
    st.lists(good, min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), odd), max_size=2),
    st.sampled_from((None, None, None, 0, 1, 3, 7)),
)


def life(
    memory: GuestMemory, played: Sequence[Any], wanted: int, accepts: Offload, **options: Any
) -> tuple[list[tuple[bytes, bytes]], list[tuple[int, int]], dict[str, int], str]:
    """What comes of some bursts, after each of which the link takes so many frames."""
    for region in memory.regions:
        region.view[:] = bytes(region.size)
    link = ScriptedLink(accepts)
    link.min_frame = 14
    world = World(memory, link, mac=MACS[6:], **options)
    guest = world.raw(wanted)
    block = guest.put(bytes(0x10000))
    used: list[tuple[int, int]] = []
    full = any(takes is not None for _, _, takes in played)
    for frames, others, takes in played:
        frames = list(frames)
        for place, other in others:
            # What waits behind a full link is looked at later, and how much that is depends on the
            # way; so what is a fault of the guest's comes sooner or later.
            if not full or (len(other.data) >= 12 and not other.writable):
                frames.insert(place, other)
        for data, cut, table, repeated, writable in frames:
            tabled = table and bool(wanted & features("INDIRECT_DESC") & ~features())
            buffers = [guest.put(piece) for piece in in_pieces(data, *cut)]
            with suppress(UsageError):  # a device at fault gives no descriptors back
                buffers += [block] * repeated
                offer_buffers(guest, buffers, table=tabled, writable=writable)
        link.port.takes = takes
        guest.driver.kick(1)
        used += guest.used(1)
        link.port.takes = takes
        if link.port.on_writable is not None:
            link.port.on_writable()
    link.port.takes = None
    if link.port.on_writable is not None:
        link.port.on_writable()
    used += guest.used(1)
    stats = {k: n for k, n in world.device.stats.items() if k.startswith("tx") and n}
    fault = world.device.fault
    assert fault is None or isinstance(fault, DriverError)
    return link.port.written, sorted(used), stats, str(fault)


@pytest.fixture(scope="module")
def large_memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 4 << 20)) as memory:
        yield memory


OFFLOADS = st.sampled_from((ALL_HOST, ALL_HOST, ALL_HOST, ("CSUM",), ("CSUM", "HOST_TSO4"), ()))


@settings(max_examples=400, deadline=None)
@given(
    played=st.lists(bursts, min_size=1, max_size=4),
    offloads=OFFLOADS,
    indirect=st.sampled_from((True, True, True, False)),
    in_order=st.booleans(),
    accepts=st.sampled_from((ALL, ALL, ALL, Offload.CSUM, Offload.NONE)),
    option=st.sampled_from(({}, {}, {}, {}, {"lock_mac": True}, {"responders": True})),
    short_way=st.booleans(),
)
def test_what_comes_of_a_guests_frames_is_the_same_either_way(
    large_memory: GuestMemory,
    played: list[Any],
    offloads: tuple[str, ...],
    indirect: bool,
    in_order: bool,
    accepts: Offload,
    option: dict[str, Any],
    short_way: bool,
) -> None:
    """The same frames reach the link, in their order and byte for byte; the same chains come back;
    the same is counted, and the same is the guest's fault."""
    ring = ["INDIRECT_DESC"] * indirect + ["IN_ORDER"] * in_order
    wanted = features(*offloads, *ring)
    if "responders" in option:
        option = {"responders": [lambda frame: b"answer" if len(frame) > 2 else None]}
    outcomes = []
    for way in (nullcontext(), frames_by_address()):
        with way, pytest.MonkeyPatch.context() as patch:
            if not short_way:
                patch.setattr("vq.net._WORTH_A_BATCH", 1000)
            outcomes.append(life(large_memory, played, wanted, accepts, **option))
    plain, quick = outcomes
    if plain[-1] == "None":
        assert quick == plain
        return
    # How many frames behind a bad one come in the same burst depends on the way.
    assert quick[-1] == plain[-1]
    fewer = min(len(plain[0]), len(quick[0]))
    assert quick[0][:fewer] == plain[0][:fewer]


# --- frames in place -----------------------------------------------------------------------------


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (PLAIN + ethernet(make_payload(3000)), (12,)),
        (PLAIN + ethernet(make_payload(3000)), (200, 300)),
        (tcp_header().pack() + make_frame(make_payload(800)), (12, 500)),
        (tcp_header(1448).pack() + TCP4, (66, 1000)),
        (tcp_header(1448).pack() + TCP4, (67,)),
        (tcp_header(1448, version=6).pack() + TCP6, (86,)),
    ],
)
def test_usual_frames_are_fetched_by_the_link(
    memory: GuestMemory, data: bytes, cut: tuple[int, ...]
) -> None:
    """The way is not there in vain."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    heads = [offer(guest, data, *cut) for _ in range(64)]
    guest.driver.kick(1)
    assert outbox(link).in_place == 64
    assert link.port.written == [(data[:12], data[12:])] * 64
    assert guest.used(1) == [(head, 0) for head in heads]
    assert world.device.stats["tx_frames"] == 64
    assert world.device.stats["tx_bytes"] == 64 * (len(data) - 12)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("count", [2, 11, 12, 30])
@pytest.mark.parametrize("kind", ["one buffer", "a table", "a table last"])
def test_a_few_frames_of_one_buffer_are_not_worth_it(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    """What they share takes longer than each by itself; acknowledgements are of this kind."""
    monkeypatch.setattr("vq.net._WORTH_PLACES_ALONE", 12)
    link = ScriptedLink()
    guest = World(memory, link).raw(WANTED)
    data = tcp_header().pack() + make_frame(make_payload(800))
    for number in range(count):
        in_table = kind == "a table" or (kind == "a table last" and number == count - 1)
        if in_table:
            offer(guest, data, 66)
        else:
            guest.offer(1, [guest.put(data)], kick=False)
    guest.driver.kick(1)
    assert link.port.written == [(data[:12], data[12:])] * count
    alone = kind == "one buffer" and count < 12
    assert outbox(link).in_place == (0 if alone else count)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("apart", [12, 66, 70, 126, 127, 200])
@pytest.mark.parametrize("gso_size", [0, 1448])
def test_what_was_checked_is_what_the_link_fetches(
    memory: GuestMemory, gso_size: int, apart: int
) -> None:
    """A guest that rewrites its headers before the kernel gets to them gains nothing."""
    link = ScriptedLink()
    guest = World(memory, link).raw(WANTED)
    header = tcp_header(gso_size)
    data = header.pack() + TCP4
    buffers = [guest.put(data[:apart]), guest.put(data[apart:])]
    for _ in range(3):
        offer_buffers(guest, buffers)

    def rewrite(frames: Sequence[Frame]) -> None:
        for gpa, length in buffers:
            memory.write(gpa, b"\xff" * length)

    link.port.before_write = rewrite
    guest.driver.kick(1)
    if gso_size and apart == 12:  # headers in two buffers are for the plain way
        checked = 54
        assert outbox(link).in_place == 0
    else:
        checked = min(apart, MOST_OF_START) - 12  # and what stands behind it
        assert outbox(link).in_place == 3
    for written, frame in link.port.written:
        assert written == header.pack()
        assert frame == TCP4[:checked] + b"\xff" * (len(TCP4) - checked)
    assert len(link.port.written) == 3


@pytest.mark.usefixtures("in_place")
def test_what_a_full_link_did_not_fetch_follows_in_its_order(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    frames = [ethernet(bytes([n]) * 100) for n in range(20)]
    heads = [offer(guest, PLAIN + frame, 50) for frame in frames]
    link.port.takes = 7
    guest.driver.kick(1)
    assert link.port.frames == frames[:7] and outbox(link).in_place == 7
    assert guest.used(1) == [(head, 0) for head in heads[:7]]
    assert world.device.stats["tx_bytes"] == 7 * 114
    link.port.takes = None
    assert link.port.on_writable is not None
    link.port.on_writable()
    assert link.port.frames == frames
    assert guest.used(1) == [(head, 0) for head in heads[7:]]
    assert world.device.stats["tx_bytes"] == 20 * 114 and world.dropped("tx") == {}


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("good_before", [0, 3])
def test_a_link_that_goes_meanwhile_gives_all_buffers_back(
    memory: GuestMemory, good_before: int
) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    for _ in range(good_before):
        offer(guest, PLAIN + TCP4, 66)
    guest.driver.kick(1)
    link.port.error = OSError(errno.EFAULT, "Bad address")
    heads = [offer(guest, PLAIN + TCP4, 66) for _ in range(5)]
    guest.used(1)
    guest.driver.kick(1)
    assert sorted(guest.used(1)) == sorted((head, 0) for head in heads)
    assert world.dropped("tx") == {"link gone": 5}
    assert world.device.stats["tx_frames"] == good_before and world.device.fault is None
    link.port.error = None
    offer(guest, PLAIN + TCP4, 66)
    guest.driver.kick(1)
    assert world.dropped("tx") == {"link gone": 6}, "nobody asks a link that is gone"


@pytest.mark.usefixtures("in_place")
def test_frames_of_a_burst_that_broke_are_not_sent_again(memory: GuestMemory) -> None:
    """How many of them went is not known then."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    for _ in range(3):
        offer(guest, PLAIN + TCP4, 66)

    def break_once(frames: Sequence[Frame]) -> None:
        link.port.before_write = None
        raise OSError(errno.EFAULT, "Bad address")

    link.port.before_write = break_once
    guest.driver.kick(1)
    assert not link.port.written and len(guest.used(1)) == 3
    assert world.dropped("tx") == {"link gone": 3}


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("when", ["reset", "stop"])
def test_a_device_reset_while_the_link_fetches_touches_nothing_more(
    memory: GuestMemory, when: str
) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    for _ in range(4):
        offer(guest, PLAIN + TCP4, 66)

    left: list[list[bytes]] = []

    def meanwhile(frames: Sequence[Frame]) -> None:
        if when == "reset":
            world.device.reset()
        else:
            world.device.stop_queue(1)
        left.append(snapshot(memory))

    link.port.before_write = meanwhile
    guest.driver.kick(1)
    link.port.before_write = None
    assert len(link.port.written) == 4 and [snapshot(memory)] == left
    assert world.device.fault is None
    guest = world.raw(WANTED)
    offer(guest, PLAIN + TCP4, 66)
    guest.driver.kick(1)
    assert len(link.port.written) == 5 and len(guest.used(1)) == 1


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("option", ["lock_mac", "responders"])
def test_frames_that_somebody_looks_at_are_not_sent_in_place(
    memory: GuestMemory, option: str
) -> None:
    link = ScriptedLink()
    options: dict[str, Any] = {
        "lock_mac": option == "lock_mac",
        "responders": [lambda frame: b"ours"] if option == "responders" else [],
    }
    world = World(memory, link, **options)
    guest = world.raw(WANTED)
    for _ in range(3):
        offer(guest, PLAIN + ethernet(b"foreign" * 20, to=OUR_MAC, source=OTHER_MAC), 50)
    guest.driver.kick(1)
    assert not link.port.written and outbox(link).in_place == 0
    assert world.device.stats["tx_answered"] + world.dropped("tx").get("source address", 0) == 3


@pytest.mark.usefixtures("in_place")
def test_a_frame_longer_than_any_is_not_sent_in_place(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    start, block = guest.put(PLAIN + ethernet(bytes(100))), guest.put(bytes(0x8000))
    left = MAX_FRAME - 114 - 7 * 0x8000
    longest = [start, *[block] * 7, (block[0], left)]
    for _ in range(2):
        offer_buffers(guest, longest)
        guest.driver.kick(1)
    assert [len(frame) for frame in link.port.frames] == [MAX_FRAME] * 2
    assert outbox(link).in_place == 2
    offer_buffers(guest, [*longest, (block[0], 1)])
    guest.driver.kick(1)
    assert outbox(link).in_place == 2, "the port judges it"
    assert len(link.port.frames[2]) == MAX_FRAME + 1 and world.device.fault is None


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("size", [0, 1, 13])
def test_a_frame_without_a_whole_ethernet_header_is_not_sent_in_place(
    memory: GuestMemory, size: int
) -> None:
    """Nor are those behind it, in the same burst: they stay in their order."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    frames = [TCP4[:14], TCP4[:60], TCP4[:size], TCP4[:70]]
    for frame in frames:
        offer(guest, PLAIN + frame, 12)
    guest.driver.kick(1)
    assert link.port.frames == frames and outbox(link).in_place == 2
    assert world.device.fault is None and len(guest.used(1)) == 4


@pytest.mark.usefixtures("in_place")
def test_a_bad_chain_behind_frames_in_place_is_the_guests_fault(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(WANTED)
    for _ in range(3):
        offer(guest, PLAIN + TCP4, 66)
    bad = offer(guest, PLAIN + TCP4, 66)
    ring = guest.ring(1)
    gpa, length, flags, following = ring.peek_descriptor(bad)
    ring.poke_descriptor(bad, gpa, length - 1, flags, following)
    guest.driver.kick(1)
    assert outbox(link).in_place == len(link.port.written) == 3
    fault = world.device.fault
    assert isinstance(fault, DriverError) and fault.head == bad and fault.section == "2.7.5.3"


def test_where_it_was_in_vain_the_plain_way_is_kept_to_for_a_while(memory: GuestMemory) -> None:
    with frames_by_address():
        link = ScriptedLink()
        world = World(memory, link)
        guest = world.raw(WANTED)
    ring = world.device.queues[1].ring
    assert ring is not None
    maker = FrameMaker(link, responders=(), stats=world.device.stats)
    maker.allowed = Offload.CSUM | Offload.TSO4

    def sent(data: bytes) -> int:
        offer(guest, data, 66)
        guest.ring(1).publish()
        run = TableRun(ring)
        run.pop(64)
        done = maker.send_in_place(run, outbox(link))
        ring.push_burst(run.to_chains())
        return done

    usual, odd = tcp_header(1448).pack() + TCP4, udp_header(500).pack() + TCP4
    for _ in range(3):
        assert maker.takes_place_way() and sent(usual) == 1
    assert maker.takes_place_way() and sent(odd) == 0
    assert [maker.takes_place_way() for _ in range(65)] == [False] * 64 + [True]
    assert sent(usual) == 1 and maker.takes_place_way()


# --- an outbox is never overrun ------------------------------------------------------------------


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("pieces", [1, 2, 16, 17, 33, 63, 64])
def test_no_run_is_too_much_for_an_outbox(memory: GuestMemory, pieces: int) -> None:
    """However many frames wait, and however many buffers they lie in: `ScriptedOutbox` looks that
    its vectors hold what it is given."""
    link = ScriptedLink()
    world = World(memory, link, queue_size=1024)
    guest = RawGuest(world.device, memory, WANTED, queue_size=1024)
    buffer = guest.put(PLAIN + ethernet(bytes(100)))
    for _ in range(400):
        offer_buffers(guest, [buffer, *[(buffer[0], 1)] * (pieces - 1)])
    guest.ring(1).publish()
    ring = world.device.queues[1].ring
    assert ring is not None
    run = TableRun(ring)
    taken = run.pop(400)
    assert taken and len(run.vectors) <= 2 * run.most_pieces
    maker = FrameMaker(link, responders=(), stats=world.device.stats)
    sent = maker.send_in_place(run, outbox(link))
    assert sent == min(taken, MOST_AT_ONCE) == len(link.port.written)
    assert taken * pieces > run.most_pieces - 64 or taken == 400


def test_an_outboxs_room_holds_what_is_sent_in_place() -> None:
    assert MOST_OF_START <= START_ROOM
    assert TableRun.most_pieces + MOST_AT_ONCE <= MOST_PIECES


@pytest.mark.usefixtures("in_place")
def test_work_is_given_up_after_a_turn_when_much_was_sent(memory: GuestMemory) -> None:
    """Some boots of a guest fell into step with the device: its socket holds fifteen such frames,
    which were sent in one go, and what their receiver acknowledged came to the guest only then. So
    the one always waited for the other."""
    link = ScriptedLink()
    world = World(memory, link)
    left: list[int] = []
    world.device.on_work_left = left.append
    guest = world.raw(WANTED)
    block = guest.put(bytes(0x8000))
    for _ in range(10):
        offer_buffers(guest, [guest.put(PLAIN + ethernet(bytes(100))), block, (block[0], 25000)])
    guest.driver.kick(1)
    counts = [len(link.port.written)]
    while left:
        world.device.notify(left.pop())
        counts.append(len(link.port.written))
    assert counts == [4, 8, 10] and outbox(link).in_place == 10
