"""Frames towards the guest: which buffers they take, and what the net header says of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manual_loop import ManualLoop
from net_frames import TCP, UDP, make_frame, make_payload, slow_sum
from net_world import (
    BROADCAST,
    OTHER_MAC,
    OUR_MAC,
    PLAIN,
    VERSION_1,
    RawGuest,
    ScriptedLink,
    World,
    ethernet,
    features,
    frames_by_address,
    snapshot,
    tcp_header,
    touched_outside,
    udp_header,
    used_parts,
)

from vq.abi import NET_HDR, CtrlRx, HdrFlag, NetFeature, Status
from vq.device import LOOK_SECONDS
from vq.driver import GuestBuffer
from vq.errors import DriverError
from vq.memory import GuestMemory
from vq.net_driver import Layout, NetDriver, NetHeader
from vq.net_filter import ReceiveFilter
from vq.offload import Offload
from vq.pace import Pace

pytestmark = pytest.mark.usefixtures("over")

FRAME = ethernet(bytes(range(46)))
MRG = features("MRG_RXBUF")
GUEST_OFFLOADS = ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 12 << 20)) as memory:
        yield memory


@pytest.fixture
def link() -> ScriptedLink:
    return ScriptedLink()


# --- buffers of any sizes ------------------------------------------------------------------------


class Buffers:
    """Receive chains of odd shapes in a guest whose RAM is filled with a pattern."""

    def __init__(self, guest: RawGuest) -> None:
        self.guest = guest
        self.chains: dict[int, list[GuestBuffer]] = {}
        self.order: list[int] = []

    def offer(self, sizes: list[int]) -> None:
        """One chain whose descriptors have these sizes, with a gap behind each."""
        pieces = []
        for size in sizes:
            gpa, _ = self.guest.room(size + 3)
            pieces.append((gpa, size))
        head = self.guest.offer(0, (), pieces, kick=False)
        self.chains[head] = pieces
        self.order.append(head)

    def content(self, head: int) -> bytes:
        return b"".join(self.guest.memory.read(gpa, length) for gpa, length in self.chains[head])

    def size(self, head: int) -> int:
        return sum(length for _, length in self.chains[head])


def expected_use(rooms: list[int], lengths: list[int], mergeable: bool) -> tuple[list[int], int]:
    """Bytes written to each buffer that is used, by a device that thinks slowly; and the drops."""
    written: list[int] = []
    dropped = 0
    left = list(rooms)
    for length in lengths:
        rest = 12 + length
        if not mergeable:
            if not left:
                break
            if rest > left[0]:
                dropped += 1
                continue
        elif rest > sum(left):
            break
        while rest > 0:
            here = min(rest, left.pop(0))
            written.append(here)
            rest -= here
    return written, dropped


shapes = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 12)
    | st.integers(12, 300).map(lambda size: [size]),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes,
    lengths=st.lists(st.integers(0, 900) | st.sampled_from((0, 1, 60, 61)), max_size=12),
    mergeable=st.booleans(),
    event_idx=st.booleans(),
    private=st.booleans(),
    apart=st.booleans(),
)
def test_frames_fill_buffers_of_any_shape_and_touch_nothing_else(
    shapes: list[list[int]],
    lengths: list[int],
    mergeable: bool,
    event_idx: bool,
    private: bool,
    apart: bool,
) -> None:
    link = ScriptedLink()
    with GuestMemory.allocate(256 << 10) as memory:
        memory.write(0, bytes(range(1, 256)) * 1028)
        world = World(memory, link, lock_mac=private)
        wanted = (MRG if mergeable else VERSION_1) | (features("EVENT_IDX") if event_idx else 0)
        guest = world.raw(wanted)
        buffers = Buffers(guest)
        for sizes in shapes:
            buffers.offer(sizes)
        guest.driver.kick(0)
        before = snapshot(memory)
        head_bytes = (OUR_MAC + OTHER_MAC) if private else b""
        frames = [(head_bytes + make_payload(length))[: max(length, 6)] for length in lengths]
        if apart:
            for frame in frames:
                link.deliver(frame)
        else:
            link.deliver(*frames)

        lent = [piece for head in buffers.order for piece in buffers.chains[head]]
        assert not touched_outside(memory, before, lent + used_parts(guest.ring(0)))
        used = guest.used(0)
        rooms = [buffers.size(head) for head in buffers.order]
        written, dropped = expected_use(rooms, [len(frame) for frame in frames], mergeable)
        assert [count for _, count in used] == written
        assert [head for head, _ in used] == buffers.order[: len(used)]
        assert world.device.stats["rx_dropped: longer than the receive buffer"] == dropped
        got = []
        rest = list(used)
        while rest:
            first = buffers.content(rest[0][0])
            header = NET_HDR.unpack(first[:12])
            assert header[:6] == (0,) * 6
            count = header[6]
            assert count == 1 or mergeable
            joined = b"".join(buffers.content(head)[:n] for head, n in rest[:count])
            assert all(n == buffers.size(head) for head, n in rest[: count - 1]), "not full"
            got.append(joined[12:])
            del rest[:count]
        if mergeable:
            assert got == frames[: len(got)]
        else:
            kept = iter(frames)
            assert all(frame in kept for frame in got), "in order"
        assert not world.device.status & Status.NEEDS_RESET


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    sizes=st.lists(st.integers(60, 800), min_size=1, max_size=8),
    batch=st.integers(1, 5),
)
def test_frames_wait_for_room_and_come_when_buffers_come(
    lengths: list[int], sizes: list[int], batch: int
) -> None:
    """Nothing is lost or reordered when the guest is slow; only its kicks wake the device."""
    link = ScriptedLink()
    with GuestMemory.allocate(8 << 20) as memory:
        world = World(memory, link)
        guest = world.raw(MRG)
        frames = [make_payload(length) for length in lengths]
        link.deliver(*frames)
        buffers = Buffers(guest)
        received = bytearray()
        offered = 0
        for _ in range(2000):
            for _ in range(batch):
                buffers.offer([sizes[offered % len(sizes)]])
                offered += 1
            guest.driver.kick(0)
            for head, count in guest.used(0):
                received += buffers.content(head)[:count]
            if len(received) == sum(lengths) + 12 * len(lengths):
                break
        got: list[bytes] = []
        while received:
            # The headers tell nothing of lengths: frames are told apart by what was sent.
            length = lengths[len(got)]
            assert received[:10] == bytes(10)
            got.append(bytes(received[12 : 12 + length]))
            del received[: 12 + length]
        assert got == frames
        assert world.device.stats["rx_frames"] == len(frames)
        assert world.dropped("rx") == {}


def test_a_single_frame_that_waits_asks_for_a_kick(memory: GuestMemory, link: ScriptedLink) -> None:
    """Nothing else may ever wake the device up: no other frame needs to come."""
    world = World(memory, link)
    guest = world.raw(MRG)
    guest.offer(0, (), [guest.room(100)])
    link.deliver(bytes(250))
    assert guest.used(0) == []
    guest.offer(0, (), [guest.room(100)])
    assert guest.used(0) == []
    guest.offer(0, (), [guest.room(100)])
    assert guest.used(0) == [(0, 100), (1, 100), (2, 62)]


@pytest.mark.parametrize("wanted", [MRG, MRG | features("EVENT_IDX"), VERSION_1])
def test_without_buffers_frames_stay_in_the_link(
    memory: GuestMemory, link: ScriptedLink, wanted: int
) -> None:
    guest = World(memory, link).raw(wanted)
    link.deliver(*[FRAME] * 5)
    assert len(link.port.incoming) == 5
    for left in (4, 3, 2, 1, 0):
        guest.offer(0, (), [guest.room(2000)])
        assert len(link.port.incoming) == left
    assert [count for _, count in guest.used(0)] == [72] * 5


def test_frames_of_before_the_driver_come_when_it_is_up(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    link.deliver(FRAME)
    driver = World(memory, link).drive()
    assert [frame.data for frame in driver.receive()] == [FRAME]


def test_more_frames_than_a_turn(memory: GuestMemory, link: ScriptedLink) -> None:
    driver = World(memory, link, queue_size=2048).drive(queue_size=2048)
    frames = [ethernet(n.to_bytes(2, "big")) for n in range(1500)]
    link.deliver(*frames)
    assert [frame.data for frame in driver.receive()] == frames


# --- frames that come one at a time --------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1.0

    def monotonic(self) -> float:
        self.now += 1e-6  # so that a turn takes some time
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("vq.pace.time", made)
    return made


@pytest.mark.parametrize(
    ("turns", "worked", "rested", "expected"),
    [
        ([1], 10, 30, 1),
        ([1], 10, 5, 0),
        ([5, 1], 10, 30, 1),
        ([2], 10, 30, 0),
        ([2, 2], 10, 30, 2),
        ([2, 2], 10, 5, 0),
        ([2, 3], 10, 30, 0),
        ([3, 2, 2], 10, 30, 2),
        ([0], 10, 30, 0),
        ([0, 0], 10, 30, 0),
    ],
)
def test_as_many_frames_are_expected_as_came_last_and_then_a_rest(
    clock: Clock, turns: list[int], worked: int, rested: int, expected: int
) -> None:
    pace = Pace()
    assert pace.begin() == 0, "nothing is known at the start"
    for frames in turns:
        pace.begin()
        clock.now += worked * 1e-6
        pace.end(frames)
        clock.now += rested * 1e-6
    assert pace.begin() == expected


@pytest.mark.parametrize(
    ("turns", "alone"),
    [([], False), ([1], False), ([1, 1], True), ([1, 1, 2], False), ([1, 1, 2, 1], False)],
)
def test_room_for_a_frame_alone_is_worth_it_where_the_last_two_came_so(
    turns: list[int], alone: bool
) -> None:
    pace = Pace()
    for frames in turns:
        pace.begin()
        pace.end(frames)
    assert pace.expects_one == alone


class Trickle:
    """A guest on a port that is polled: frames are read when the watch says that there are some."""

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        self.link = ScriptedLink(fds=[fd])
        self.link.port.none_waits_inside = True  # type: ignore[misc]
        self.world = World(memory, self.link)
        self.driver = self.world.drive()
        self.calls: list[int] = []
        self.world.device.on_queue_call = self.calls.append
        self.left: list[int] = []
        self.world.device.on_work_left = self.left.append
        [self.watch] = self.world.device.watches

    def turn(self, *frames: bytes) -> int:
        """How often the port is read in a turn in which these frames wait."""
        before = self.link.port.reads
        self.link.port.incoming.extend((PLAIN, frame) for frame in frames)
        self.watch.readable()
        return self.link.port.reads - before


@pytest.fixture
def trickle(memory: GuestMemory) -> Iterator[Trickle]:
    ends = os.pipe()
    yield Trickle(memory, ends[1])
    for end in ends:
        os.close(end)


REST = 1e-3


def test_a_frame_that_comes_alone_is_the_guests_without_a_look_for_another(
    trickle: Trickle, clock: Clock
) -> None:
    trickle.turn(FRAME)
    for _ in range(3):
        clock.now += REST
        assert trickle.turn(FRAME, FRAME) == 1
        assert len(trickle.link.port.incoming) == 1 and trickle.watch.reading
        assert trickle.turn() == 1  # without a rest
        assert not trickle.link.port.incoming
        trickle.turn(FRAME)


def test_frames_behind_one_another_are_read_in_bursts(trickle: Trickle, clock: Clock) -> None:
    for count in (3, 4, 3, 5, 3):
        trickle.turn(*[FRAME] * count)
        assert not trickle.link.port.incoming
        clock.now += REST


def test_a_few_that_always_come_together_are_the_guests_without_a_look_for_another(
    trickle: Trickle, clock: Clock
) -> None:
    """As acknowledgements do, of frames that the device sends so many at a time."""
    for _ in range(2):
        trickle.turn(FRAME, FRAME)
        clock.now += REST
    assert trickle.turn(FRAME, FRAME, FRAME) == 1
    assert len(trickle.link.port.incoming) == 1 and trickle.watch.reading
    trickle.turn()  # without a rest
    assert not trickle.link.port.incoming


def test_a_turn_ends_when_the_port_gives_few_at_a_time(trickle: Trickle) -> None:
    """They are long: what the guest acknowledges is not to wait until all that comes was read."""
    trickle.link.port.burst = 3
    trickle.link.port.incoming.extend([(PLAIN, FRAME)] * 8)
    counts = []
    trickle.watch.readable()
    while trickle.left:
        counts.append(len(trickle.link.port.incoming))
        trickle.world.device.notify(trickle.left.pop())
    assert counts == [5, 2] and not trickle.link.port.incoming


def test_a_port_that_keeps_frames_inside_is_read_to_the_end(trickle: Trickle, clock: Clock) -> None:
    """Its descriptor does not tell of them."""
    trickle.link.port.none_waits_inside = False  # type: ignore[misc]
    trickle.turn(FRAME)
    clock.now += REST
    trickle.turn(FRAME, FRAME)
    assert not trickle.link.port.incoming


def test_without_an_event_loop_a_port_is_read_to_the_end(trickle: Trickle, clock: Clock) -> None:
    """Nobody would come back: `notify` works until all is done."""
    trickle.world.device.on_work_left = None
    trickle.turn(FRAME)
    clock.now += REST
    trickle.turn(FRAME, FRAME)
    assert not trickle.link.port.incoming


@pytest.mark.parametrize("layout", [Layout(), Layout(12), Layout(1, 5, 12, 13, indirect=True)])
@pytest.mark.parametrize("size", [2048, 100])
def test_long_after_short_and_short_after_long(
    memory: GuestMemory, link: ScriptedLink, layout: Layout, size: int
) -> None:
    """The room that is gathered follows the last frame: the next may be of any other length."""
    world = World(memory, link)
    driver = world.drive(receive_layout=layout, receive_buffer_size=size, queue_size=1024)
    for length in (60, 9000, 60, 60, 65000, 0, 1, 9000, 9001, 8999, 14):
        frame = make_payload(length)
        link.deliver(frame)
        [got] = driver.receive()
        assert got.data == frame
    assert world.dropped("rx") == {}


@pytest.mark.parametrize("gathered_for", [0, 150, 300])
@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
def test_every_byte_around_a_buffers_end_finds_its_place(
    memory: GuestMemory, link: ScriptedLink, gathered_for: int, buffers: int
) -> None:
    """What is beyond the room that was gathered is copied: also a single byte."""
    driver = World(memory, link).drive(MRG, receive_buffer_size=100, largest_frame=1000)
    for length in range(100 * buffers - 12 - 2, 100 * buffers - 12 + 3):
        link.deliver(bytes(gathered_for))
        link.deliver(make_payload(length))
        got = driver.receive()[-1]
        assert got.data == make_payload(length)
        assert got.buffers == buffers + (length > 100 * buffers - 12)


def test_num_buffers_is_the_number_of_buffers_not_of_descriptors(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Past bug: num_buffers was set to the number of descriptors."""
    guest = World(memory, link).raw(MRG)
    buffers = Buffers(guest)
    for _ in range(3):
        buffers.offer([10, 10, 10, 70])
    guest.driver.kick(0)
    link.deliver(bytes(80), bytes(150))
    assert guest.used(0) == [(0, 92), (4, 100), (8, 62)]
    assert buffers.content(0)[10:12] == b"\1\0"
    assert buffers.content(4)[10:12] == b"\2\0"


def test_num_buffers_stands_there_before_the_buffer_is_used(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Past bug (CVE-2021-3748): num_buffers was written after the buffer had been given back."""
    world = World(memory, link)
    guest = world.raw(MRG)
    buffers = Buffers(guest)
    for _ in range(3):
        buffers.offer([100])
    guest.driver.kick(0)
    seen: list[tuple[int, bytes]] = []
    images: list[bytes] = []

    def called(index: int) -> None:
        seen.extend((head, buffers.content(head)[:12]) for head, _ in guest.used(index))
        images.append(b"".join(map(buffers.content, buffers.order)))

    world.device.on_queue_call = called
    link.deliver(bytes(250))
    assert [head for head, _ in seen] == [0, 1, 2]
    assert seen[0][1] == bytes(10) + b"\3\0"
    assert images[-1] == b"".join(map(buffers.content, buffers.order)), "written after the call"


@pytest.mark.parametrize("wanted", [MRG, VERSION_1])
def test_the_headers_12_bytes_count_as_room(
    memory: GuestMemory, link: ScriptedLink, wanted: int
) -> None:
    """Past bug (openvmm 3119): the capacity forgot the header."""
    world = World(memory, link)
    guest = world.raw(wanted)
    frame = make_payload(1514)
    guest.offer(0, (), [guest.room(1526)])
    link.deliver(frame)
    assert guest.used(0) == [(0, 1526)]
    guest.offer(0, (), [guest.room(1525)])
    guest.offer(0, (), [guest.room(1525)])
    link.deliver(frame)
    if wanted == MRG:
        assert [count for _, count in guest.used(0)] == [1525, 1]
    else:
        assert guest.used(0) == []
        assert world.dropped("rx") == {"longer than the receive buffer": 1}
        link.deliver(frame[:1513])
        assert [count for _, count in guest.used(0)] == [1525], "the buffer was not used up"


@pytest.mark.parametrize("capacity", [1526, 65562])
def test_the_room_that_the_specification_asks_for_is_enough(
    memory: GuestMemory, link: ScriptedLink, capacity: int
) -> None:
    world = World(memory, link)
    guest = world.raw(features(*GUEST_OFFLOADS) if capacity > 2000 else VERSION_1)
    guest.offer(0, (), [guest.room(capacity)])
    link.deliver(make_payload(capacity - 12))
    assert guest.used(0) == [(0, capacity)]
    assert world.dropped("rx") == {}


def test_a_frame_longer_than_all_buffers_together_is_dropped_not_waited_for(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """The driver has no descriptor left to offer more with: waiting would stop the queue."""
    world = World(memory, link)
    guest = world.raw(MRG, queue_size=4)
    for _ in range(4):
        guest.offer(0, (), [guest.room(100)])
    link.deliver(bytes(389), FRAME, bytes(316))
    assert world.dropped("rx") == {"longer than all receive buffers": 1}
    assert guest.used(0) == [(0, 72)], "316 bytes wait for the buffer to come back"
    guest.offer(0, (), [guest.room(100)])
    assert [count for _, count in guest.used(0)] == [100, 100, 100, 28]


def test_descriptors_of_empty_buffers_are_not_there_to_make_more_room_with(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """A buffer with an empty one behind it was taken for a usual one once frames came by address,
    and the other descriptor forgotten: the next frame that did not fit was waited for in vain."""
    guest = World(memory, link).raw(MRG, queue_size=8)
    rooms = [guest.room(1600) for _ in range(4)]

    def offer(room: GuestBuffer) -> None:
        guest.offer(0, (), [room, (room[0], 0)])

    for room in rooms:
        offer(room)
    for _ in range(3):
        link.deliver(FRAME)
        assert [count for _, count in guest.used(0)] == [len(FRAME) + 12]
        offer(rooms[0])
        rooms.append(rooms.pop(0))
        link.deliver(bytes(7000))
    assert guest.device.stats["rx_dropped: longer than all receive buffers"] == 3


def test_a_driver_with_descriptors_left_is_waited_for_though_its_buffers_have_many_pieces(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """A chain with an indirect table takes one descriptor of the ring, whatever it holds."""
    world = World(memory, link)
    guest = world.raw(features("MRG_RXBUF", "INDIRECT_DESC"), queue_size=4)
    for _ in range(2):
        table = guest.driver.allocator.allocate(64)
        pieces = [guest.room(25) for _ in range(4)]
        guest.ring(0).add((), pieces, indirect=table)
        guest.driver.kick(0)
        link.deliver(*[bytes(150)] * (not link.port.incoming and not guest.used(0)))
    assert world.dropped("rx") == {}


@pytest.mark.parametrize("wanted", [MRG, VERSION_1])
def test_frames_of_the_largest_size_pass_and_longer_ones_are_dropped(
    memory: GuestMemory, link: ScriptedLink, wanted: int
) -> None:
    world = World(memory, link)
    driver = world.drive(wanted | features("INDIRECT_DESC"), largest_frame=100000)
    for length in (100000, 60, 99999):
        link.deliver(make_payload(length))
        assert [frame.data for frame in driver.receive()] == [make_payload(length)]
    if wanted != MRG:
        link.deliver(make_payload(100001), FRAME)
        assert [frame.data for frame in driver.receive()] == [FRAME]
        assert world.dropped("rx") == {"longer than the receive buffer": 1}


def test_received_frames_are_counted(memory: GuestMemory, link: ScriptedLink) -> None:
    world = World(memory, link)
    driver = world.drive()
    link.deliver(bytes(60), bytes(9000))
    driver.receive()
    assert world.device.stats["rx_frames"] == 2
    assert world.device.stats["rx_bytes"] == 9060


# --- chains that are no receive buffers ----------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_readable_buffer_to_receive_needs_a_reset(
    memory: GuestMemory, link: ScriptedLink, position: int
) -> None:
    world = World(memory, link)
    guest = world.raw(MRG)
    readable = guest.put(b"\x5a" * 100)
    for number in range(3):
        both = [readable] if number == position else []
        guest.offer(0, both, [guest.room(100)], kick=False)
    guest.driver.kick(0)
    link.deliver(FRAME)
    assert memory.read(*readable) == b"\x5a" * 100
    assert_needs_reset(world, "5.1.6.3")
    link.port.incoming.clear()
    driver = world.drive()
    link.deliver(FRAME)
    assert [frame.data for frame in driver.receive()] == [FRAME]


@pytest.mark.parametrize("sizes", [[1], [11], [5, 6], [1] * 11])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("wanted", [MRG, VERSION_1])
def test_a_buffer_without_room_for_the_header_needs_a_reset(
    memory: GuestMemory, link: ScriptedLink, sizes: list[int], private: bool, wanted: int
) -> None:
    world = World(memory, link, lock_mac=private)
    guest = world.raw(wanted)
    Buffers(guest).offer(sizes)
    guest.driver.kick(0)
    link.deliver(FRAME)
    assert_needs_reset(world, "5.1.6.3.1")
    link.port.incoming.clear()
    driver = world.drive()
    link.deliver(FRAME)
    assert [frame.data for frame in driver.receive()] == [FRAME]


def test_an_empty_buffer_to_receive_needs_a_reset(memory: GuestMemory, link: ScriptedLink) -> None:
    world = World(memory, link)
    guest = world.raw(MRG)
    guest.offer_unruly(0, (0x100000, 0, 2))
    link.deliver(FRAME)
    assert_needs_reset(world, "5.1.6.3.1")


def assert_needs_reset(world: World, section: str) -> None:
    device = world.device
    assert device.status & Status.NEEDS_RESET
    assert isinstance(device.fault, DriverError) and device.fault.section == section


def test_what_came_before_a_bad_buffer_is_the_guests(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    world = World(memory, link)
    guest = world.raw(VERSION_1)
    guest.offer(0, (), [guest.room(100)], kick=False)
    guest.offer(0, (), [guest.room(5)], kick=False)
    guest.driver.kick(0)
    link.deliver(FRAME, FRAME)
    assert guest.used(0) == [(0, 72), (1, 0)]
    assert world.device.stats["rx_frames"] == 1
    assert_needs_reset(world, "5.1.6.3.1")


# --- the short way past filters, and for frames longer than a buffer ------------------------------

WANTED_GROUP, OTHER_GROUP = bytes.fromhex("01005e000001"), bytes.fromhex("01005e000002")
KNOWN_VLAN = 7


def filtering(world: World, wanted: int, **options: object) -> NetDriver:
    """A guest that has set filters, as Linux' driver does."""
    driver = world.drive(wanted | features("CTRL_VQ", "CTRL_RX", "CTRL_VLAN"), **options)
    assert driver.set_receive_mode(CtrlRx.PROMISC, False)
    assert driver.set_mac_table([], [WANTED_GROUP])
    assert driver.add_vlan(KNOWN_VLAN)
    return driver


def tagged(frame: bytes, vlan: int) -> bytes:
    return frame[:12] + b"\x81\0" + vlan.to_bytes(2, "big") + frame[12:]


deliveries = st.lists(
    st.tuples(
        st.sampled_from(
            (OUR_MAC, OUR_MAC, OUR_MAC, OTHER_MAC, BROADCAST, WANTED_GROUP, OTHER_GROUP)
        ),
        st.sampled_from((None, None, None, 0, KNOWN_VLAN, 8)),
        st.sampled_from((0, 1, 2, 46, 46, 46, 500, 1500, 4000)),
        st.sampled_from(("plain", "plain", "plain", "partial", "valid", "segments")),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(
    deliveries=deliveries,
    mergeable=st.booleans(),
    offloads=st.sampled_from(((), ("GUEST_CSUM",), ("GUEST_CSUM", "GUEST_TSO4"))),
    mtu=st.sampled_from((None, 400, 1500)),
    promiscuous=st.booleans(),
    size=st.sampled_from((300, 1536, 5000)),
)
def test_the_short_way_gives_a_guest_what_the_plain_one_does(
    deliveries: list[tuple[bytes, int | None, int, str]],
    mergeable: bool,
    offloads: tuple[str, ...],
    mtu: int | None,
    promiscuous: bool,
    size: int,
) -> None:
    frames = []
    for number, (to, vlan, length, kind) in enumerate(deliveries):
        payload = number.to_bytes(2, "big") + make_payload(length)
        frame, header = ethernet(payload, to=to), PLAIN
        if kind in ("partial", "segments"):
            frame = to + make_frame(payload)[6:]
            header = tcp_header(100 if kind == "segments" else 0).pack()
        elif kind == "valid":
            header = NetHeader(flags=HdrFlag.DATA_VALID).pack()
        if vlan is not None and kind in ("plain", "valid"):
            frame = tagged(frame, vlan)
        frames.append((header, frame))

    def outcome(*, alone: bool = False) -> tuple[list[tuple[NetHeader, bytes]], dict[str, int]]:
        with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 12 << 20)) as memory:
            link = ScriptedLink()
            world = World(memory, link, **({} if mtu is None else {"mtu": mtu}))
            names = (*offloads, *(["MRG_RXBUF"] * mergeable), *(["MTU"] * (mtu is not None)))
            driver = filtering(world, features(*names), receive_buffer_size=size)
            assert driver.set_receive_mode(CtrlRx.PROMISC, promiscuous)
            for header, frame in frames:
                link.port.incoming.append((header, frame))
                if alone:
                    link.deliver()
                    window = world.device._windows[0]
                    assert not (window._chains and window._usual.left), "held in one way"
            link.deliver()
            got = []
            while received := driver.receive():
                got += [(frame.header._replace(num_buffers=1), frame.data) for frame in received]
            assert world.device.fault is None
            return got, world.dropped("rx")

    plain = outcome()
    with frames_by_address():
        assert outcome() == plain
    with frames_by_address(alone=True):
        assert outcome(alone=True) == plain


@settings(max_examples=150, deadline=None)
@given(
    rooms=st.lists(st.integers(28, 400), min_size=20, max_size=60)
    | st.lists(st.sampled_from((100, 200)), min_size=20, max_size=60)
    | st.integers(1, 60).map(lambda count: [100] * count),
    lengths=st.lists(
        st.integers(0, 900) | st.sampled_from((88, 188, 288, 388, 488)) | st.integers(900, 5000),
        min_size=3,
        max_size=12,
    ),
    alone=st.booleans(),
    at_a_time=st.sampled_from((1, 3, 128)),
)
def test_frames_fill_usual_buffers_one_behind_another(
    rooms: list[int], lengths: list[int], alone: bool, at_a_time: int
) -> None:
    """However many of them are held when a frame comes: the rest of it stands in the spill."""
    with (
        GuestMemory.allocate(1 << 20) as memory,
        frames_by_address(alone=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("vq.net_receive._MANY", at_a_time)
        patch.setattr(Pace, "expects_one", alone)
        link = ScriptedLink()
        link.port.longest = 5000
        guest = World(memory, link).raw(MRG)
        buffers = Buffers(guest)
        for size in rooms:
            buffers.offer([size])
        guest.driver.kick(0)
        guest.device.notify(0)  # it may have been told not to kick
        frames = [make_payload(length) for length in lengths]
        for frame in frames:
            link.deliver(frame)
        used = guest.used(0)
        assert [head for head, _ in used] == buffers.order[: len(used)]
        written, dropped = expected_use(rooms, lengths, mergeable=True)
        assert [count for _, count in used] == written and not dropped
        got, rest = [], list(used)
        while rest:
            count = NET_HDR.unpack(buffers.content(rest[0][0])[:12])[6]
            got.append(b"".join(buffers.content(head)[:n] for head, n in rest[:count])[12:])
            del rest[:count]
        assert got == frames[: len(got)]
        assert guest.device.fault is None


ALONE = features("MRG_RXBUF", "GUEST_CSUM", "MTU")


def test_frames_that_come_one_at_a_time_are_read_into_room_that_was_prepared(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Also after some that were not for the guest, were longer than a buffer, or longer than all
    that is held; and not once the guest has no buffers left."""
    with frames_by_address(alone=True):
        world = World(memory, link, mtu=9000)
        driver = filtering(world, ALONE, receive_buffer_size=300)
        sent = [ethernet(bytes([n]) * 46) for n in range(12)]
        sent[5] = ethernet(make_payload(4000))
        sent[7] = ethernet(b"", to=BROADCAST)
        for number, frame in enumerate(sent):
            link.deliver(frame)
            link.deliver(ethernet(b"", to=OTHER_MAC))
            link.deliver(ethernet(bytes(9009)))
            assert link.port.read_alone == 3 * number + 2
        assert [frame.data for frame in driver.receive()] == sent
        assert world.dropped("rx") == {"filtered": 12, "longer than the mtu": 12}
        stats = world.device.stats
        assert (stats["rx_frames"], stats["rx_bytes"]) == (12, sum(map(len, sent)))
        link.port.read_alone = 0
        many = [ethernet(n.to_bytes(2, "big") * 23) for n in range(600)]
        for frame in many:
            link.deliver(frame)
        assert 200 < link.port.read_alone < 600 and len(link.port.incoming) > 300
        got = []
        while received := driver.receive():
            got += [frame.data for frame in received]
        assert got == many


def test_no_room_is_prepared_beyond_buffers_that_are_held_as_chains(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """They are older: a frame that comes alone is theirs."""
    with frames_by_address(alone=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr("vq.net_receive._DETOUR", 64)
        guest = World(memory, link).raw(MRG)
        unfinished = NetHeader(flags=HdrFlag.NEEDS_CSUM, csum_start=14, csum_offset=0).pack()
        for headers in ((PLAIN, PLAIN, unfinished), (PLAIN, PLAIN)):
            for _ in range(20):
                guest.offer(0, (), [guest.room(300)], kick=False)
            guest.driver.kick(0)
            for header in headers:
                link.deliver(FRAME, header=header)
        assert link.port.read_alone == 2
        assert [head for head, _ in guest.used(0)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("length", [0, 5, 6, 13, 14])
def test_a_frame_is_not_judged_by_what_stood_in_its_buffer_before(
    memory: GuestMemory, link: ScriptedLink, prepared: bool, length: int
) -> None:
    """One without a whole destination is wanted by no filter, though the guest's own address stands
    behind its end."""
    with frames_by_address(alone=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "expects_one", prepared)
        guest = World(memory, link).raw(MRG | features("CTRL_VQ", "CTRL_VLAN"))
        for _ in range(4):
            guest.offer(0, (), [guest.put((PLAIN + FRAME).ljust(300))])
        for frame in (FRAME, FRAME, FRAME[:length]):
            link.deliver(frame)
        assert link.port.read_alone == (2 if prepared else 0)
        lengths = [written for _, written in guest.used(0)]
        assert lengths == [12 + len(FRAME)] * 2 + [12 + length] * (length >= 6)


@pytest.mark.parametrize("length", [0, 5, 6, 13, 14])
def test_frames_read_together_are_not_judged_by_what_stood_in_their_buffers_before(
    memory: GuestMemory, link: ScriptedLink, length: int
) -> None:
    """Likewise where all seemed to be for the guest's own address, and no filter was asked."""
    with frames_by_address():
        guest = World(memory, link).raw(MRG | features("CTRL_VQ", "CTRL_VLAN"))
        for _ in range(4):
            guest.offer(0, (), [guest.put((PLAIN + FRAME).ljust(300))])
        link.deliver(FRAME, FRAME, FRAME[:length])
        lengths = [written for _, written in guest.used(0)]
        assert lengths == [12 + len(FRAME)] * 2 + [12 + length] * (length >= 6)


@pytest.mark.parametrize("to", ["reset", "stop", "unplug"])
def test_a_driver_may_do_anything_when_it_is_called_for_a_frame_that_came_alone(
    memory: GuestMemory, link: ScriptedLink, to: str
) -> None:
    """After that nothing of its rings is touched."""
    with frames_by_address(alone=True):
        world = World(memory, link)
        guest = world.raw(MRG | features("CTRL_VQ", "CTRL_RX"))
        device = world.device
        for _ in range(100):
            guest.offer(0, (), [guest.room(300)], kick=False)
        guest.driver.kick(0)
        for _ in range(3):
            link.deliver(FRAME)
        assert link.port.read_alone == 2 and len(guest.used(0)) == 3
        ring = device.queues[0].ring
        assert ring is not None
        popped = -1

        def called(index: int) -> None:
            nonlocal popped
            if to == "reset":
                device.reset()
            elif to == "stop":
                device.stop_queue(index)
            else:
                device.set_link_up(False)
            popped = ring.next_avail

        device.on_queue_call = called
        link.deliver(FRAME)
        assert popped == (4 if to == "stop" else ring.next_avail)
        assert device.fault is None and device.stats["rx_frames"] == 4
        assert [written for _, written in guest.used(0)] == [len(FRAME) + 12]
        assert ring.next_avail == popped


def test_frames_for_the_guest_itself_go_the_short_way_past_its_filters(
    memory: GuestMemory, link: ScriptedLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not even shown to them: to look at each takes longer than all the rest."""
    shown: list[bytes] = []
    wants = ReceiveFilter.wants

    def watched(filters: ReceiveFilter, start: bytes) -> bool:
        shown.append(start)
        return wants(filters, start)

    monkeypatch.setattr(ReceiveFilter, "wants", watched)
    with frames_by_address():
        driver = filtering(World(memory, link), MRG)
        frames = [ethernet(bytes([n]) * 46) for n in range(30)]
        link.deliver(*frames)
        assert [frame.data for frame in driver.receive()] == frames
        assert not shown
        several = [*frames[:3], ethernet(bytes(46), to=BROADCAST), *frames[3:6]]
        link.deliver(*several)
        assert [frame.data for frame in driver.receive()] == several
        assert len(shown) == len(several)
    assert link.port.read_apart == len(frames) + len(several)


@pytest.mark.parametrize("unwanted", [{"to": OTHER_MAC}, {"to": OTHER_GROUP}, {"vlan": 8}])
def test_an_unwanted_frame_among_others_reaches_no_guest(
    memory: GuestMemory, link: ScriptedLink, unwanted: dict[str, Any]
) -> None:
    with frames_by_address():
        world = World(memory, link)
        driver = filtering(world, MRG)
        good = [ethernet(bytes([n]) * 46) for n in range(9)]
        bad = ethernet(bytes(46), to=unwanted.get("to", OUR_MAC))
        if "vlan" in unwanted:
            bad = tagged(bad, unwanted["vlan"])
        link.deliver(*good[:4], bad, *good[4:])
        assert [frame.data for frame in driver.receive()] == good
    assert world.dropped("rx") == {"filtered": 1}


def test_after_another_address_was_set_the_old_one_is_filtered_on_the_short_way(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    with frames_by_address():
        world = World(memory, link)
        driver = filtering(world, MRG | features("CTRL_MAC_ADDR", "CTRL_RX_EXTRA"))
        driver.set_mac(OTHER_MAC)
        old, new = (ethernet(bytes(46), to=to) for to in (OUR_MAC, OTHER_MAC))
        link.deliver(old, old, old)
        assert driver.receive() == []
        link.deliver(old, new, new)
        assert [frame.data for frame in driver.receive()] == [new, new]
        assert driver.set_receive_mode(CtrlRx.NOUNI, True)
        link.deliver(new, new)
        assert driver.receive() == []
        link.deliver(new, ethernet(bytes(46), to=BROADCAST))
        assert [frame.data[:6] for frame in driver.receive()] == [BROADCAST]


# --- what the header says ------------------------------------------------------------------------


def assert_whole(frame: bytes, *, udp: bool, version: int) -> None:
    if version == 4:
        assert slow_sum(frame[14:34]) == 0xFFFF
        assert int.from_bytes(frame[16:18], "big") == len(frame) - 14
        addresses, transport = frame[26:34], frame[34:]
    else:
        assert int.from_bytes(frame[18:20], "big") == len(frame) - 54
        addresses, transport = frame[22:54], frame[54:]
    protocol = UDP if udp else TCP
    pseudo = addresses + len(transport).to_bytes(4, "big") + bytes((0, 0, 0, protocol))
    assert slow_sum(pseudo + transport) == 0xFFFF


@pytest.mark.parametrize("num_buffers", [0, 1, 2, 0xFFFF])
@pytest.mark.parametrize("wanted", [MRG, VERSION_1, -1])
def test_num_buffers_of_the_link_is_not_believed(
    memory: GuestMemory, link: ScriptedLink, num_buffers: int, wanted: int
) -> None:
    """A tap leaves num_buffers 0, which is never right (virtio 1.3, 5.1.6.4.1)."""
    driver = World(memory, link).drive(wanted)
    link.deliver(FRAME, header=NetHeader(num_buffers=num_buffers).pack())
    [frame] = driver.receive()
    assert frame.header == NetHeader(num_buffers=1)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("mergeable", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
def test_a_partial_checksum_reaches_only_a_guest_that_takes_it(
    memory: GuestMemory,
    link: ScriptedLink,
    version: int,
    udp: bool,
    mergeable: bool,
    accepted: bool,
) -> None:
    """Past bug: NEEDS_CSUM was set without looking at GUEST_CSUM."""
    wanted = features(*(["MRG_RXBUF"] * mergeable), *(["GUEST_CSUM"] * accepted))
    driver = World(memory, link).drive(wanted, receive_buffer_size=200)
    frame = make_frame(make_payload(999), protocol=UDP if udp else TCP, version=version)
    header = (udp_header if udp else tcp_header)(version=version)
    link.deliver(frame, header=header.pack())
    [got] = driver.receive()
    assert got.buffers == (-(-(12 + len(frame)) // 200) if mergeable else 1)
    if accepted:
        assert got.header == header._replace(num_buffers=got.buffers)
        assert got.data == frame
    else:
        assert got.header == NetHeader(num_buffers=got.buffers)
        assert_whole(got.data, udp=udp, version=version)


@pytest.mark.parametrize("accepted", [False, True])
def test_data_valid_reaches_only_a_guest_that_knows_it(
    memory: GuestMemory, link: ScriptedLink, accepted: bool
) -> None:
    driver = World(memory, link).drive(features("GUEST_CSUM") if accepted else VERSION_1)
    link.deliver(FRAME, header=NetHeader(flags=HdrFlag.DATA_VALID).pack())
    [got] = driver.receive()
    assert got.header.flags == (HdrFlag.DATA_VALID if accepted else 0)
    assert got.data == FRAME


@pytest.mark.parametrize("flags", [4, 5, 6, 8, 0xF0, 0xFF])
@pytest.mark.parametrize("accepted", [False, True])
def test_flags_that_were_never_negotiated_reach_no_guest(
    memory: GuestMemory, link: ScriptedLink, flags: int, accepted: bool
) -> None:
    driver = World(memory, link).drive(features("GUEST_CSUM") if accepted else VERSION_1)
    frame = make_frame(b"abc")
    link.deliver(frame, header=tcp_header()._replace(flags=flags).pack())
    [got] = driver.receive()
    assert got.header.flags & ~3 == 0
    assert accepted or not got.header.flags


GSO = [
    ("GUEST_TSO4", False, 4, False),
    ("GUEST_TSO6", False, 6, False),
    ("GUEST_USO4", True, 4, False),
    ("GUEST_USO6", True, 6, False),
    ("GUEST_ECN", False, 4, True),
    ("GUEST_ECN", False, 6, True),
]


@pytest.mark.parametrize(("feature", "udp", "version", "ecn"), GSO)
@pytest.mark.parametrize("mergeable", [False, True])
def test_a_gso_frame_is_cut_for_a_guest_without_the_feature(
    memory: GuestMemory,
    link: ScriptedLink,
    feature: str,
    udp: bool,
    version: int,
    ecn: bool,
    mergeable: bool,
) -> None:
    payload = make_payload(20000)
    frame = make_frame(
        payload,
        protocol=UDP if udp else TCP,
        version=version,
        tcp_flags=0x98 if ecn else 0x18,
    )
    header = (
        udp_header(1400, version=version) if udp else tcp_header(1400, version=version, ecn=ecn)
    )
    everything = features(*GUEST_OFFLOADS, *(["MRG_RXBUF"] * mergeable))
    world = World(memory, link)
    driver = world.drive(everything)
    link.deliver(frame, header=header.pack())
    [got] = driver.receive()
    assert got.data == frame and got.header == header._replace(num_buffers=got.buffers)

    start = (34 if version == 4 else 54) + (8 if udp else 20)
    driver.close()
    driver = world.drive(everything & ~(1 << NetFeature[feature]))
    link.deliver(frame, header=header.pack())
    segments = driver.receive()
    assert len(segments) == 15
    assert b"".join(segment.data[start:] for segment in segments) == payload
    assert all(segment.header.gso_type == 0 for segment in segments)

    driver.close()
    driver = world.drive(VERSION_1 | (MRG if mergeable else 0))
    link.deliver(frame, header=header.pack())
    segments = driver.receive()
    assert b"".join(segment.data[start:] for segment in segments) == payload
    for segment in segments:
        assert segment.header == NetHeader(num_buffers=1)
        assert_whole(segment.data, udp=udp, version=version)
    assert world.dropped("rx") == {}


def test_segments_wait_for_room_one_by_one(memory: GuestMemory, link: ScriptedLink) -> None:
    world = World(memory, link)
    guest = world.raw(VERSION_1)
    payload = make_payload(1000)
    guest.offer(0, (), [guest.room(2000)])
    link.deliver(make_frame(payload), FRAME, header=tcp_header(100).pack())
    link.port.incoming[0] = (PLAIN, FRAME)
    assert [count for _, count in guest.used(0)] == [12 + 54 + 100]
    for _ in range(9):
        guest.offer(0, (), [guest.room(2000)])
        assert [count for _, count in guest.used(0)] == [12 + 54 + 100]
    guest.offer(0, (), [guest.room(2000)])
    assert [count for _, count in guest.used(0)] == [72]


def test_complete_checksums_are_for_programs_that_read_raw_frames(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Past bug: partial checksums reached DHCP clients, which read frames as they are."""
    world = World(memory, link, complete_checksums=True)
    driver = world.drive()
    assert driver.has_feature(NetFeature.GUEST_CSUM)
    assert link.requested[-1] == Offload.NONE
    link.deliver(make_frame(make_payload(300), protocol=UDP), header=udp_header().pack())
    [got] = driver.receive()
    assert got.header == NetHeader(num_buffers=1)
    assert_whole(got.data, udp=True, version=4)
    link.deliver(FRAME, header=NetHeader(flags=HdrFlag.DATA_VALID).pack())
    assert driver.receive()[0].header == NetHeader(num_buffers=1)


@pytest.mark.parametrize(
    ("names", "offloads"),
    [
        ((), Offload.NONE),
        (("GUEST_CSUM",), Offload.CSUM),
        (("GUEST_CSUM", "GUEST_TSO4"), Offload.CSUM | Offload.TSO4),
        (("CSUM", "HOST_TSO4", "HOST_TSO6"), Offload.NONE),
        (
            ("GUEST_CSUM", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4"),
            Offload.CSUM | Offload.TSO6 | Offload.ECN | Offload.USO4,
        ),
    ],
)
def test_the_link_is_asked_for_what_was_accepted(
    memory: GuestMemory, link: ScriptedLink, names: tuple[str, ...], offloads: Offload
) -> None:
    """Past bug: tap offloads were set from features that were offered, not acknowledged."""
    World(memory, link).drive(features(*names))
    assert set(link.requested[:1]) <= {Offload.NONE}
    assert link.requested[-1] == offloads
    assert all(not asked & ~offloads for asked in link.requested)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (tcp_header(100)._replace(gso_size=0), "gso size zero"),
        (tcp_header(100)._replace(gso_type=4), "gso wrong ip version"),
        (tcp_header(100)._replace(flags=0), "gso without csum"),
        (tcp_header()._replace(csum_start=1000), "csum beyond frame"),
    ],
)
def test_a_header_that_lies_is_dropped_where_the_device_has_to_act_on_it(
    memory: GuestMemory, link: ScriptedLink, header: NetHeader, reason: str
) -> None:
    world = World(memory, link)
    driver = world.drive(MRG)
    link.deliver(make_frame(make_payload(500)), header=header.pack())
    link.deliver(FRAME)
    assert [frame.data for frame in driver.receive()] == [FRAME]
    assert world.dropped("rx") == {reason: 1}


# --- the MTU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [False, True])
def test_plain_frames_beyond_the_mtu_do_not_pass(
    memory: GuestMemory, link: ScriptedLink, accepted: bool
) -> None:
    """virtio 1.3, 5.1.4.1: with MTU negotiated, and then with two VLAN tags at the most."""
    world = World(memory, link, mtu=1000)
    driver = world.drive(features(*GUEST_OFFLOADS, *(["MTU"] * accepted)))
    link.deliver(make_payload(1014), make_payload(1022), make_payload(1023))
    assert [len(frame.data) for frame in driver.receive()] == [1014, 1022, *[1023] * (not accepted)]
    link.deliver(make_frame(make_payload(5000)), header=tcp_header(900).pack())
    assert [len(frame.data) for frame in driver.receive()] == [5054], "but GSO frames do"
    assert world.dropped("rx") == ({"longer than the mtu": 1} if accepted else {})


def test_segments_beyond_the_mtu_do_not_pass_either(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    world = World(memory, link, mtu=1000)
    driver = world.drive(features("MTU", "MRG_RXBUF"))
    link.deliver(make_frame(make_payload(3000)), header=tcp_header(1400).pack())
    assert [len(frame.data) for frame in driver.receive()] == [54 + 200]
    assert world.dropped("rx") == {"longer than the mtu": 2}


# --- a locked MAC --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [-1, MRG, VERSION_1])
def test_frames_for_others_never_touch_the_guests_memory(
    memory: GuestMemory, link: ScriptedLink, wanted: int
) -> None:
    """Not even where a buffer was lent and is not used: a guest can look there at any time."""
    world = World(memory, link, lock_mac=True)
    driver = world.drive(wanted)
    before = snapshot(memory)
    secret = ethernet(b"secret" * 100, to=OTHER_MAC)
    link.deliver(secret, ethernet(b"", to=b"\2\2\2\2\2\2"), b"", OUR_MAC[:5], secret)
    used = [part for queue in driver._receive for part in used_parts(queue.ring)]
    assert not touched_outside(memory, before, used)
    assert driver.receive() == []
    assert world.dropped("rx") == {"filtered": 5}
    mine = [ethernet(b"mine"), ethernet(b"all", to=b"\xff" * 6), ethernet(b"m", to=b"\1" * 6)]
    link.deliver(secret, mine[0], secret, *mine[1:])
    assert [frame.data for frame in driver.receive()] == mine
    for region in memory.regions:
        assert b"secretsecret" not in bytes(region.view)


def test_frames_that_come_alone_into_the_smallest_buffers(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    with frames_by_address(alone=True):
        world = World(memory, link)
        guest = world.raw(MRG)
        for _ in range(15):
            guest.offer(0, (), [guest.room(17)])
        world.device.notify(0)
        for _ in range(3):
            link.deliver(FRAME[:60])
        assert world.device.fault is None
        assert [written for _, written in guest.used(0)] == [17, 17, 17, 17, 4] * 3


def test_frames_for_others_that_come_alone_do_not_either(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    with frames_by_address(alone=True):
        guest = World(memory, link, lock_mac=True).raw(MRG)
        for _ in range(65):  # one more than are taken at a time
            guest.offer(0, (), [guest.room(700)])
        for _ in range(64):
            link.deliver(FRAME)
        link.deliver(ethernet(b"secret" * 100, to=OTHER_MAC))
        assert [written for _, written in guest.used(0)] == [12 + len(FRAME)] * 64
        for region in memory.regions:
            assert b"secretsecret" not in bytes(region.view)


def test_without_a_lock_the_guest_gets_all_frames(memory: GuestMemory, link: ScriptedLink) -> None:
    driver = World(memory, link).drive()
    link.deliver(ethernet(b"", to=OTHER_MAC))
    assert len(driver.receive()) == 1


def test_a_locked_mac_with_offloads_and_many_buffers(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    driver = World(memory, link, lock_mac=True, mac=make_frame(b"")[:6]).drive()
    frame = make_frame(make_payload(50000))
    link.deliver(frame, header=tcp_header(1448).pack())
    [got] = driver.receive()
    assert got.data == frame and got.buffers == 25
    driver.restart()
    driver = World(memory, link, lock_mac=True, mac=make_frame(b"")[:6]).drive(MRG)
    link.deliver(frame, header=tcp_header(1448).pack())
    assert b"".join(f.data[54:] for f in driver.receive()) == make_payload(50000)


def test_calls_for_what_was_sent_wait_for_a_lull(memory: GuestMemory, link: ScriptedLink) -> None:
    """What a guest sent is its own again as soon as it looks; no guest waits until then."""
    world = World(memory, link)
    guest = world.raw(features("CSUM"))
    frame = NET_HDR.pack(HdrFlag.NEEDS_CSUM, 0, 0, 0, 14, 0, 0) + FRAME
    device = world.device
    guest.offer(1, [guest.put(frame)])  # the first call is always made
    calls: list[int] = []
    loop = ManualLoop()
    device.on_queue_call = calls.append
    device.event_loop = loop
    for times, payload in ((1, b""), (2, bytes(4000)), (3, bytes(20000))):
        guest.offer(1, [guest.put(frame + payload)])
        loop.look()
        assert calls == [1] * (times - 1) and len(loop.waiting) == 1
        loop.lull()
        assert calls == [1] * times
    calls.clear()
    for _ in range(16):
        link.port.incoming.append((PLAIN, ethernet(bytes(1486))))
        guest.offer(0, writable=[guest.room(1600)], kick=False)
    guest.driver.kick(0)
    device.notify(0)
    assert calls == [0]


def test_a_driver_that_sends_much_at_a_time_kicks_and_is_looked_at_else(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Who waits for the kick finds more than who looks, and a turn's price is shared."""
    world = World(memory, link)
    guest = world.raw(features("CSUM"))
    loop = ManualLoop()
    world.device.event_loop = loop
    ring = world.device.queues[1].ring
    assert ring is not None
    for payload, looks in ((b"", True), (bytes(20000), False), (b"", True)):
        loop.lookouts.clear()
        ring.disable_kicks()
        guest.offer(1, [guest.put(PLAIN + FRAME + payload)], kick=False)
        guest.ring(1).publish()
        world.device.notify(1)
        assert bool(loop.lookouts) == looks
        assert guest.ring(1).should_kick() == (not looks)


def test_a_driver_that_was_called_for_what_it_received_has_time_to_look_what_it_sent(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """Linux' driver does, and then wants no call for it; such a call costs both sides more than a
    frame does."""
    world = World(memory, link)
    guest = world.raw(features("CSUM"))
    calls: list[int] = []
    loop = ManualLoop()

    def exchange() -> None:
        guest.offer(1, [guest.put(PLAIN + FRAME)])
        loop.look()
        link.port.incoming.append((PLAIN, FRAME))
        guest.offer(0, writable=[guest.room(1600)], kick=False)
        guest.driver.kick(0)
        world.device.notify(0)

    exchange()
    world.device.on_queue_call = calls.append
    world.device.event_loop = loop
    exchange()
    assert calls == [0]
    loop.lull()
    assert calls == [0] and [seconds for seconds, _ in loop.later] == [LOOK_SECONDS]
    loop.let_time_pass()
    assert calls == [0, 1]
    exchange()
    loop.lull()
    guest.offer(1, [guest.put(PLAIN + FRAME)])  # of this it was not told
    loop.look()
    loop.lull()
    assert calls == [0, 1, 0, 1]
    loop.let_time_pass()
    assert calls == [0, 1, 0, 1]


def test_thousands_of_small_buffers_are_not_more_than_are_shown_to_the_kernel(
    memory: GuestMemory, link: ScriptedLink
) -> None:
    """A guest whose whole queue a frame did not fit into left all of its buffers held, more than
    there are vectors for: the next short frame was a fault of ours, with a traceback."""
    world = World(memory, link, queue_size=4096)
    guest = world.raw(VERSION_1 | MRG, queue_size=4096)
    buffer = guest.room(28)
    for _ in range(4096):
        guest.offer(0, (), [buffer], kick=False)
    guest.driver.kick(0)
    world.device.inject(bytes(150_000))
    assert world.dropped("rx") == {"longer than all receive buffers": 1}
    window = world.device._windows[0]
    window._detour = 0  # the short way is tried again
    window.lend_together(1522)  # as a tap's port asks
    link.deliver(FRAME)
    assert world.device.fault is None
    assert [length for _, length in guest.used(0)] == [28, 28, 16]
