"""What is checked is what is used, while another thread rewrites all that a guest owns.

The thread stands for the guest's other processors: it rewrites headers, descriptors and indices
for as long as the device works. Links keep exactly what they were given. Nothing that reaches them
may be what no check would have passed; nothing outside the buffers that were lent may change.
"""

from __future__ import annotations

import contextlib
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from net_frames import make_frame, make_payload
from net_world import (
    OUR_MAC,
    PLAIN,
    RawGuest,
    ScriptedLink,
    ScriptedOutbox,
    World,
    features,
    frames_by_address,
    tcp_header,
)

from vq.abi import Feature, ring_layout
from vq.driver import GuestBuffer
from vq.errors import DriverError
from vq.link import Frame
from vq.memory import GuestMemory
from vq.offload import Offload
from vq.packet import parse
from vq.split_ring import SplitRing

ROUNDS = 400
MOST = 20_000
"""Rounds after which the other thread really should have come in between."""
GUARD = 0xC3


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x1000, 1 << 20)) as memory:
        yield memory


@pytest.fixture(params=["", "copied", "in place"])
def in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Frames go the plain way, or are copied together, or fetched by the link where they lie."""
    with frames_by_address() if request.param else contextlib.nullcontext():
        if request.param == "in place":
            monkeypatch.setattr("vq.net._WORTH_A_BATCH", 1000)
        yield request.param == "in place"


@contextmanager
def meanwhile(rewrite: Callable[[], None]) -> Iterator[None]:
    """Another thread does `rewrite` over and over, switched to as often as Python can."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            rewrite()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def send_until(
    world: World, guest: RawGuest, place: GuestBuffer, enough: Callable[[], bool]
) -> None:
    """Sends the same frame over and over, some rounds and until it has been enough."""
    for number in range(MOST):
        for _ in range(8):
            guest.offer(1, [place], kick=False)
        guest.driver.kick(1)
        guest.used(1)
        if number > ROUNDS and enough():
            break
    assert enough(), "the thread did not get in between"
    assert world.device.fault is None


class KeepingLink(ScriptedLink):
    """Looks at each frame after a while, when the other thread has been at work again."""

    def __init__(self, accepts: Offload) -> None:
        super().__init__(accepts)
        self.port.before_write = self._look
        self.headers: set[bytes] = set()
        self.starts: list[tuple[bytes, bytes]] = []

    def _look(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            time.sleep(1e-6)  # lets go of the interpreter
            header = bytes(frame[0])
            self.headers.add(header)
            self.starts.append((header, bytes(frame[1])))


def fetched(link: ScriptedLink) -> bool:
    """Whether the link took frames in place.

    After one that is not usual the device does not try it for a while: it may take many rounds.
    """
    outbox = link.port.outbox
    return isinstance(outbox, ScriptedOutbox) and outbox.in_place > 0


HEADERS = (
    PLAIN,
    tcp_header(1000).pack(),
    tcp_header(1000)._replace(csum_start=0xFFF0).pack(),
    tcp_header(1000)._replace(gso_size=0).pack(),
    tcp_header(1000)._replace(gso_type=3).pack(),
    tcp_header().pack(),
    b"\xff" * 12,
)


@pytest.mark.parametrize(
    "accepts", [Offload.NONE, Offload.CSUM, Offload.CSUM | Offload.TSO4], ids=["", "csum", "tso"]
)
def test_the_net_header_that_was_checked_is_the_one_that_is_used(
    memory: GuestMemory, accepts: Offload, in_place: bool
) -> None:
    link = KeepingLink(accepts)
    world = World(memory, link)
    guest = world.raw(features("CSUM", "HOST_TSO4"))
    frame = make_frame(make_payload(3000))
    place = guest.put(PLAIN + frame)
    view = memory.view(place[0], 12)
    chosen = random.Random(7)

    may_fetch = in_place and bool(accepts & Offload.TSO4)

    def rewrite() -> None:
        view[:] = chosen.choice(HEADERS)

    def enough() -> bool:
        all_ways = fetched(link) or not may_fetch
        return all_ways and len(world.dropped("tx")) >= 2 and bool(link.headers)

    with meanwhile(rewrite):
        send_until(world, guest, place, enough)
    permitted = {PLAIN}
    if accepts:
        permitted.add(tcp_header()._replace(hdr_len=0).pack())
        permitted.add(tcp_header()._replace(hdr_len=54).pack())
    if accepts & Offload.TSO4:
        permitted.add(tcp_header(1000).pack())
    assert link.headers <= permitted
    assert fetched(link) == may_fetch


def test_the_headers_of_a_frame_to_be_segmented_are_those_that_were_checked(
    memory: GuestMemory, in_place: bool
) -> None:
    """IP and TCP headers alternate between sound ones and lies of every kind."""
    link = KeepingLink(Offload.CSUM | Offload.TSO4)
    world = World(memory, link)
    guest = world.raw(features("CSUM", "HOST_TSO4"))
    good = make_frame(make_payload(3000))
    place = guest.put(tcp_header(1000).pack() + good)
    view = memory.view(place[0] + 12, 54)
    lies = [bytearray(good[:54]) for _ in range(5)]
    lies[1][14] = 0x4F  # options that are not there
    lies[2][46] = 0x40  # less than a TCP header
    lies[3][16:18] = b"\xff\xff"
    lies[4][23] = 17
    chosen = random.Random(8)

    def rewrite() -> None:
        view[:] = chosen.choice(lies)

    def enough() -> bool:
        all_ways = fetched(link) or not in_place
        return all_ways and len(link.starts) > 50 and len(world.dropped("tx")) >= 2

    with meanwhile(rewrite):
        send_until(world, guest, place, enough)
    for header, first in link.starts:
        if header[1]:
            assert len(first) == 54 or (in_place and len(first) > 54)  # private, all of it
            packet = parse([first[:54] + bytes(3000)])
            assert (packet.l4_offset, packet.l4_protocol) == (34, 6)
            assert packet.reason is None and packet.l3_end == 3054
    assert fetched(link) == in_place


def test_a_locked_source_address_is_the_one_that_is_sent(memory: GuestMemory) -> None:
    link = KeepingLink(Offload.NONE)
    world = World(memory, link, lock_mac=True)
    guest = world.raw()
    frame = b"\xff" * 6 + OUR_MAC + b"\x88\xb5" + bytes(60)
    place = guest.put(PLAIN + frame)
    view = memory.view(place[0] + 18, 6)
    chosen = random.Random(9)

    def rewrite() -> None:
        view[:] = chosen.choice((OUR_MAC, b"\2\0\0\0\0\x66"))

    with meanwhile(rewrite):
        send_until(world, guest, place, lambda: bool(link.starts) and bool(world.dropped("tx")))
    assert {data[6:12] for data in link.port.frames} == {OUR_MAC}


def test_descriptors_and_indices_rewritten_under_the_ring_leave_guards_untouched() -> None:
    """Descriptors point into buffers and out of them, lengths and flags change, the index jumps:
    each view that a chain has was in the guest's memory, and the bytes around stay."""
    size, low, buffers, high = 16, 0x1000, 0x3000, 0x5000
    with GuestMemory.allocate((0, low), (low, high - low), (high, 0x1000)) as memory:
        for region in (memory.regions[0], memory.regions[2]):
            region.view[:] = bytes((GUARD,)) * region.size
        layout = ring_layout(size)
        desc, avail, used = 0x1000, 0x1400, 0x1800
        table = memory.view(desc, layout.desc_bytes)
        index = memory.view(avail, layout.avail_bytes)
        chosen = random.Random(10)
        good = [struct.pack("<QIHH", buffers + 64 * n, 64, 2, 0) for n in range(16)]
        bad = [
            struct.pack("<QIHH", 0x20000, 64, 2, 0),
            struct.pack("<QIHH", high + 0xFF8, 64, 2, 0),
            struct.pack("<QIHH", buffers, 0xFFFFFFFF, 2, 0),
            struct.pack("<QIHH", buffers, 64, 3, 5),
            struct.pack("<QIHH", 0xFFFFFFFFFFFFFFF0, 64, 2, 0),
        ]

        def rewrite() -> None:
            at = 16 * chosen.randrange(size)
            table[at : at + 16] = chosen.choice(good if chosen.random() < 0.8 else bad)
            slot = 4 + 2 * chosen.randrange(size)
            index[slot : slot + 2] = bytes((chosen.randrange(size), 0))

        def ring() -> SplitRing:
            memory.write(used, bytes(layout.used_bytes))
            memory.store16(avail + 2, 0)
            return SplitRing(memory, size, desc, avail, used, features=1 << Feature.EVENT_IDX)

        taken = refused = offered = 0
        device = ring()
        with meanwhile(rewrite):
            for number in range(MOST):
                if number > 5 * ROUNDS and taken > 100 and refused > 10:
                    break
                offered = (offered + 4) & 0xFFFF
                memory.store16(avail + 2, offered)
                chains = []
                with contextlib.suppress(DriverError):
                    refused += 1
                    chains = device.pop_burst(8)
                    refused -= 1
                for chain in chains:
                    for view in chain.writable:
                        assert len(view) <= 64 * size
                        view[:] = b"\xdd" * len(view)
                    chain.written = chain.writable_size
                taken += len(chains)
                device.push_burst(chains)
        assert taken > 100 and refused > 10
        for region in (memory.regions[0], memory.regions[2]):
            assert region.view == bytes((GUARD,)) * region.size
        assert bytes(memory.view(low + 0x900, 0x1000)) == bytes(0x1000)


def test_receive_buffers_are_the_ones_that_were_offered(memory: GuestMemory) -> None:
    """While frames arrive the guest points its descriptors elsewhere and rewrites net headers."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(features("MRG_RXBUF"), queue_size=16)
    guards = [guest.room(512) for _ in range(2)]
    rooms = [guest.room(512) for _ in range(16)]
    guards.append(guest.room(512))
    ring = guest.ring(0)
    before = {place: memory.read(*place) for place in guards}
    elsewhere = [guards[0][0], guards[1][0], guards[2][0], 0, 0x1000 + (1 << 20) - 4]
    chosen = random.Random(11)

    def rewrite() -> None:
        place = chosen.randrange(16)
        if chosen.random() < 0.5:
            memory.write(rooms[place][0], bytes(chosen.randrange(256) for _ in range(12)))
        else:
            ring.poke_descriptor(place, chosen.choice(elsewhere), 512, 2, 0)

    frames = 0
    for _ in range(ROUNDS // 4):
        for room in rooms:
            ring.add([], [room])
        guest.driver.kick(0)
        link.deliver(OUR_MAC + bytes(400))  # for it the device takes them all
        with meanwhile(rewrite):
            for number in range(8):
                link.deliver(OUR_MAC + bytes((number,)) * 400)
        for head, written in guest.used(0):
            assert written == 12 + 406 and head < 16
            frames += 1
        guest.driver.reset()
        guest.driver.probe()
        ring = guest.ring(0)
    assert frames == 9 * (ROUNDS // 4) and world.device.fault is None
    for place, content in before.items():
        assert memory.read(*place) == content


def test_a_control_command_is_judged_and_carried_out_by_one_copy(memory: GuestMemory) -> None:
    """The filter's tables hold only what one of the commands says, never half of each."""
    world = World(memory)
    guest = world.raw(features("CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR"))
    one = b"\1\0" + struct.pack("<I", 4) + b"\2\1\1\1\1\1" * 4 + struct.pack("<I", 0)
    two = b"\1\0" + struct.pack("<I", 2) + b"\2\2\2\2\2\2" * 2 + struct.pack("<I", 0xFFFFFFFF)
    place = guest.put(one.ljust(64, b"\0"))
    view = memory.view(place[0], 64)
    command, ack = (place[0], len(one)), guest.room(1)
    chosen = random.Random(12)

    def rewrite() -> None:
        view[: len(one)] = chosen.choice((one, two.ljust(len(one), b"\0")))

    acks: list[int] = []
    with meanwhile(rewrite):
        while len(acks) < ROUNDS or (len(set(acks)) < 2 and len(acks) < MOST):
            guest.offer(2, [command], [ack])
            assert guest.used(2)[0][1] == 1
            acks.append(memory.read(ack[0], 1)[0])
            assert world.device.filter.unicast in (frozenset(), {b"\2\1\1\1\1\1"})
    assert {0, 1} == set(acks) and world.device.fault is None
