"""What a guest or a peer can make vq do: no endless work, no endless memory, no endless log."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from net_frames import make_frame, make_payload
from net_world import OUR_MAC, PLAIN, ScriptedLink, World, features, tcp_header
from vhost_frontend import (
    REPLY_ACK,
    Frontend,
    GuestRing,
    Ram,
    Shouter,
    open_things,
    wait_until,
)

from vq import vhost_backend
from vq.abi import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    CtrlClass,
    CtrlMac,
    Feature,
    Status,
)
from vq.driver import DriverRing, GuestAllocator
from vq.errors import DriverError
from vq.link import link_pair
from vq.log_limit import LINES, LogLimit, limited_logger
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import COMMANDS_PER_TURN, DEFAULT_MAC, FRAMES_PER_TURN, NetDevice
from vq.net_filter import MAX_TABLE
from vq.offload import Offload
from vq.shared_fd import drain
from vq.split_ring import SplitRing
from vq.vhost_backend import MANY_KICKS
from vq.vhost_channel import MAX_CHANNEL_BACKLOG, MOST_IN_VAIN, Channel, Transfer
from vq.vhost_message import BackendRequest, Message
from vq.vhost_user import MESSAGES_PER_TURN, Connection, Server

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        yield memory


@contextmanager
def at_most(peak: int) -> Iterator[None]:
    """What is done inside never takes more than `peak` bytes of Python's memory at once."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most - before < peak, f"{(most - before) / MIB:.1f} MiB"


# --- the log --------------------------------------------------------------------------------------


def test_lines_of_one_kind_are_limited_and_what_was_left_out_is_counted() -> None:
    now = 100.0
    limit = LogLimit(lines=3, seconds=10, clock=lambda: now)

    def say(text: str = "guest %d did it", level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("vq.x", level, "", 0, text, (7,), None)
        return record.getMessage() if limit.filter(record) else None

    assert [say(), say()] == ["guest 7 did it"] * 2
    assert say() == "guest 7 did it (more like this are only counted for now)"
    assert [say() for _ in range(1000)] == [None] * 1000
    assert say("something else by %d") == "something else by 7"
    assert [say(level=logging.DEBUG) for _ in range(5)] == ["guest 7 did it"] * 5
    now += 10
    assert say() == "guest 7 did it (1000 more like this were not logged)"
    now += 10
    assert say() == "guest 7 did it"


def test_a_logger_is_limited_once_however_often_it_is_asked_for() -> None:
    logger = limited_logger("vq.tests")
    assert limited_logger("vq.tests") is logger and len(logger.filters) == 1


def test_a_guest_that_breaks_rules_and_resets_without_end_fills_no_log(
    memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """A kick with an impossible index costs a guest nothing, and was a line of the log each time;
    a line on what was negotiated comes with it."""
    caplog.set_level(logging.INFO)
    world = World(memory)
    for _ in range(300):
        guest = world.raw()
        guest.ring(1).poke_avail_index(1000)
        guest.device.notify(1)
        assert isinstance(world.device.fault, DriverError)
        world.device.accept_features(0)
        guest.driver.reset()
    broken = [r for r in caplog.records if "driver error" in r.getMessage()]
    assert len(broken) == LINES and "only counted" in broken[-1].getMessage()
    assert len(caplog.records) <= 2 * LINES
    assert world.device.stats["driver_errors"] == 600


def test_refused_features_fill_no_log_and_do_not_last(
    memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(memory)
    for _ in range(200):
        world.device.write_status(0)
        world.device.write_status(3)
        world.device.accept_features(1 << 60)
        world.device.write_status(11)
        assert not world.device.status & Status.FEATURES_OK
    assert len(caplog.records) == LINES
    assert world.device.stats["features_refused"] == 200
    world.drive()  # a driver that knows better gets what it wants


def test_frontends_that_break_the_protocol_without_end_fill_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loop = Loop()
    server = Server(Shouter(), loop, tmp_path / "s")
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
            frontend = Frontend(loop, sock)
            frontend.send(99)
            frontend.turn()
    assert server.connections == 200
    kinds = {(record.name, record.msg.split(" (")[0]) for record in caplog.records}
    assert len(caplog.records) <= LINES * len(kinds) <= 5 * LINES
    server.close()
    loop.close()


# --- memory ---------------------------------------------------------------------------------------


def vast_frame(world: World, *, gso_size: int) -> Callable[[], None]:
    """A chain of 64 MiB made of one buffer over and over, its IP length left 0 ("all of it")."""
    guest = world.raw(features("CSUM", "HOST_TSO4", "INDIRECT_DESC"))
    header = tcp_header(gso_size)
    frame = bytearray(make_frame(b"", ip_checksum=False))
    frame[16:18] = b"\0\0"
    start = guest.put(header.pack() + frame)
    chunk = 1 << 19
    filler = guest.driver.allocator.allocate(chunk)
    buffers = [start, *[(filler, chunk)] * 128]
    guest.offer(1, buffers, kick=False)

    def kick() -> None:
        guest.driver.kick(1)

    return kick


@pytest.mark.parametrize("gso_size", [0, 8, 1448])
def test_a_frame_of_many_mebibytes_is_dropped_before_work_is_done_for_it(
    memory: GuestMemory, gso_size: int
) -> None:
    """On a link without offloads vq summed all of it, or cut eight million segments out of it."""
    world = World(memory, ScriptedLink(Offload.NONE))
    kick = vast_frame(world, gso_size=gso_size)
    with at_most(MIB):
        kick()
    assert world.dropped("tx") == {"too long": 1}
    assert world.link.port.written == [] and world.device.fault is None  # type: ignore[attr-defined]


def test_a_frame_has_at_most_a_thousand_segments(memory: GuestMemory) -> None:
    world = World(memory, ScriptedLink(Offload.NONE))
    guest = world.raw(features("CSUM", "HOST_TSO4"))
    data = make_frame(make_payload(64000), ip_checksum=False)
    for gso_size in (8, 62, 63):
        guest.offer(1, [guest.put(tcp_header(gso_size).pack() + data)])
    assert world.dropped("tx") == {"gso size too small": 2}
    assert world.device.stats["tx_frames"] == 1016


def test_segments_cut_in_software_are_made_a_thousand_or_two_at_a_time(memory: GuestMemory) -> None:
    """64 chains in a burst, 1,000 segments each, were 64,000 segments in memory at once."""
    world = World(memory, ScriptedLink(Offload.NONE))
    guest = world.raw(features("CSUM", "HOST_TSO4"))
    data = tcp_header(63).pack() + make_frame(make_payload(64000), ip_checksum=False)
    place = guest.put(data)
    for _ in range(40):
        guest.offer(1, [place], kick=False)
    turns = []
    world.device.on_work_left = turns.append
    port = world.link.port  # type: ignore[attr-defined]
    most = 0
    guest.driver.kick(1)
    while turns:
        written = len(port.written)
        most = max(most, written)
        port.written.clear()
        world.device.notify(turns.pop())
    assert most <= 2 * 1024
    assert world.device.stats["tx_frames"] == 40 * 1016 and len(guest.used(1)) == 40


def test_indirect_tables_are_followed_some_at_a_time() -> None:
    """64 chains with tables of 32,768 descriptors are two million buffers: 10 seconds, 400 MB."""
    size = 32768
    with GuestMemory.allocate((0, 4 << 20)) as memory:
        allocator = GuestAllocator(memory)
        ring = DriverRing.allocate(memory, allocator, size, features=1 << Feature.INDIRECT_DESC)
        table = allocator.allocate(16 * size)
        entries = [
            struct.pack("<QIHH", 0x1000, 1, DESC_F_NEXT, number + 1) for number in range(size)
        ]
        entries[-1] = struct.pack("<QIHH", 0x1000, 1, 0, 0)
        memory.write(table, b"".join(entries))
        for head in range(64):
            ring.poke_descriptor(head, table, 16 * size, DESC_F_INDIRECT, 0)
            ring.poke_avail(head, head)
        ring.poke_avail_index(64)
        device = SplitRing(
            memory, size, ring.desc, ring.avail, ring.used, features=1 << Feature.INDIRECT_DESC
        )
        with at_most(16 * MIB):
            chains = device.pop_burst(64)
        assert [len(chain.readable) for chain in chains] == [size]
        device.push_burst(chains)
        assert [len(device.pop_burst(64)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("header", [PLAIN, b"\1" + PLAIN[1:]], ids=["plain", "refused"])
def test_a_turn_ends_with_a_chain_of_very_many_buffers(header: bytes) -> None:
    """Also with one that comes alone: a driver that handed out the next one each time the device
    looked kept it for 256 of them, which took seconds."""
    size = 32768
    with GuestMemory.allocate((0, 4 << 20)) as memory:
        link = ScriptedLink()
        world = World(memory, link, queue_size=size)
        guest = world.raw(features("INDIRECT_DESC"), queue_size=size)
        gpa, _ = guest.put(header + bytes(100))
        entries = [struct.pack("<QIHH", gpa, 0, DESC_F_NEXT, number + 1) for number in range(size)]
        entries[0] = struct.pack("<QIHH", gpa, 112, DESC_F_NEXT, 1)
        entries[-1] = struct.pack("<QIHH", gpa, 0, 0, 0)
        table, length = guest.put(b"".join(entries))
        ring = guest.ring(1)
        real_waiting, offered = SplitRing.waiting, 0

        def offer(device_ring: SplitRing) -> int:
            """One more each time that the device has none."""
            nonlocal offered
            if ring.peek_used_index() == offered < 8:
                ring.poke_descriptor(offered, table, length, DESC_F_INDIRECT, 0)
                ring.poke_avail(offered, offered)
                offered += 1
                ring.poke_avail_index(offered)
            return real_waiting(device_ring)

        turns: list[int] = []
        world.device.on_work_left = turns.append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SplitRing, "waiting", offer)
            world.device.notify(1)
            done = [ring.peek_used_index()]
            while turns:
                world.device.notify(turns.pop())
                done.append(ring.peek_used_index())
        assert done[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert world.device.stats["tx_frames"] == (8 if header == PLAIN else 0)


def test_a_chain_over_many_small_regions_is_refused() -> None:
    """A frontend may lay memory out in 256 regions, and each buffer of a chain lie over them all:
    4 GiB of chain were a million views."""
    with GuestMemory.allocate(1 << 20, *[4096] * 255) as memory:
        allocator = GuestAllocator(memory)
        ring = DriverRing.allocate(memory, allocator, 1024, features=1 << Feature.INDIRECT_DESC)
        table = allocator.allocate(16 * 1024)
        entry = partial(struct.pack, "<QIHH", (1 << 20) - 4096, 256 * 4096)
        entries = [entry(DESC_F_NEXT, number + 1) for number in range(1023)]
        memory.write(table, b"".join([*entries, entry(0, 0)]))
        ring.poke_descriptor(0, table, 16 * 1024, DESC_F_INDIRECT, 0)
        ring.poke_avail_index(1)
        device = SplitRing(
            memory, 1024, ring.desc, ring.avail, ring.used, features=1 << Feature.INDIRECT_DESC
        )
        with at_most(32 * MIB), pytest.raises(DriverError, match="pieces of memory"):
            device.pop()
        assert device.publish() == 1  # it is the driver's again


def test_a_table_of_more_addresses_than_are_kept_takes_no_more_memory(memory: GuestMemory) -> None:
    world = World(memory)
    guest = world.raw(features("CTRL_VQ", "CTRL_RX"))
    count = 10_000
    table = count.to_bytes(4, "little") + b"\2\0\0\0\0\1" * count + bytes(4)
    command = guest.put(bytes((CtrlClass.MAC, CtrlMac.TABLE_SET)) + table)
    guest.offer(2, [command], [guest.room(1)], kick=False)
    with at_most(MIB // 2):
        guest.driver.kick(2)
    assert world.device.filter.unicast_overflow
    assert len(world.device.filter.unicast) <= MAX_TABLE


def test_a_frontend_that_reads_no_replies_is_not_heard(tmp_path: Path) -> None:
    """Its requests stay in the socket: nothing piles up on our side, and nothing is lost."""
    loop = Loop()
    ours, theirs = socket.socketpair()
    connection = Connection(ours, Shouter(), loop)
    theirs.setblocking(False)
    request = struct.pack("=3I", 1, 1, 0)
    sent = 0
    with at_most(MIB):
        for _ in range(200):
            try:
                for _ in range(1000):
                    sent += theirs.send(request) // len(request)
            except BlockingIOError:
                pass
            loop.run_once(0)
            assert len(connection._replies) <= 1
    assert sent > 200
    answered = 0
    while answered < sent * 20:  # bytes of a reply
        loop.run_once(0)
        try:
            answered += len(theirs.recv(1 << 16))
        except BlockingIOError:
            assert not connection.closed
    theirs.close()
    loop.run_once(0)
    loop.close()


def test_requests_to_a_frontend_that_reads_none_are_dropped(tmp_path: Path) -> None:
    loop = Loop()
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    channel = Channel(ours.detach(), loop)
    from vq.vhost_message import VringState

    with at_most(MIB):
        for number in range(20_000):
            state = VringState(number, 0)
            channel.send(Message(BackendRequest.VRING_CALL, state, need_reply=True))
    assert len(channel._backlog) == MAX_CHANNEL_BACKLOG
    channel.close()
    theirs.close()
    loop.close()


def test_resets_without_end_leave_nothing_behind(tmp_path: Path) -> None:
    loop, ram = Loop(), Ram()
    sock, theirs = socket.socketpair()
    device = NetDevice(ScriptedLink())
    connection = Connection(sock, device, loop)
    frontend = Frontend(loop, theirs)
    status, reset_device = 1 << 16, 1 << 13
    frontend.negotiate(protocol=REPLY_ACK | status | reset_device)
    frontend.set_memory(ram)

    def storm(times: int) -> None:
        for number in range(times):
            frontend.send(39, struct.pack("=Q", 0x0F))
            frontend.send(39 if number % 2 else 34, struct.pack("=Q", 0) if number % 2 else b"")
            if number % 16 == 0:
                frontend.turn(2)
        frontend.turn()

    storm(100)
    before = open_things()
    with at_most(MIB):
        storm(2000)
    assert open_things() == before
    assert not connection.closed and len(loop._soon) + len(loop._timers) < 10
    frontend.close()
    frontend.turn()
    ram.close()
    loop.close()


# --- work -----------------------------------------------------------------------------------------


class Busy:
    """A guest that has more to send whenever its device has taken something."""

    def __init__(self, memory: GuestMemory, loop: Loop, limit: int = 200_000) -> None:
        self.link = ScriptedLink()
        self.world = World(memory, self.link)
        self.guest = self.world.raw()
        self.place = self.guest.put(PLAIN + bytes(60))
        self.left = limit
        device = self.world.device
        device.on_queue_call = self.more
        device.on_work_left = lambda index: loop.call_soon(partial(device.notify, index))

    def more(self, _: int = 1) -> None:
        self.guest.used(1)
        ring = self.guest.ring(1)
        while ring.num_free and self.left:
            ring.add([self.place])
            self.left -= 1
        ring.publish()

    @property
    def sent(self) -> int:
        return self.world.device.stats["tx_frames"]


def test_a_queue_that_never_runs_dry_keeps_no_other_device_waiting() -> None:
    loop = Loop()
    with GuestMemory.allocate(MIB) as one, GuestMemory.allocate(MIB) as two:
        busy, modest = Busy(one, loop), Busy(two, loop, limit=0)
        busy.more()
        loop.call_soon(lambda: busy.world.device.notify(1))
        for _ in range(20):
            before = busy.sent
            loop.run_once(0)
            assert busy.sent - before <= FRAMES_PER_TURN
            modest.guest.offer(1, [modest.place], kick=False)
            modest.guest.ring(1).publish()
            loop.call_soon(lambda: modest.world.device.notify(1))
        loop.run_once(0)
        assert modest.sent == 20 and busy.sent >= 10 * FRAMES_PER_TURN and busy.left
    loop.close()


def test_a_queue_that_never_runs_dry_keeps_no_other_queue_waiting() -> None:
    """Frames for the guest come in while it sends without end."""
    loop = Loop()
    with GuestMemory.allocate(4 * MIB) as memory:
        busy = Busy(memory, loop)
        for _ in range(64):
            busy.guest.offer(0, [], [busy.guest.room(2048)], kick=False)
        busy.guest.ring(0).publish()
        busy.more()
        loop.call_soon(lambda: busy.world.device.notify(1))
        frame = OUR_MAC + bytes(60)
        for _ in range(20):
            loop.run_once(0)
            busy.link.port.incoming.append((PLAIN, frame))
            loop.call_soon(lambda: busy.world.device._port_readable(0))
        loop.run_once(0)
        assert busy.world.device.stats["rx_frames"] == 20 and busy.left
    loop.close()


def test_two_guests_on_one_cable_do_not_keep_each_other_busy_without_end() -> None:
    """Each took frames from the other within the other's turn, and made room for more: as long as
    both went on, no third device, no message and no signal was looked at."""
    loop = Loop()
    left, right = link_pair(limit=16)
    with GuestMemory.allocate(4 * MIB) as one, GuestMemory.allocate(4 * MIB) as two:
        sender = World(one, left)
        driver = sender.raw()
        place = driver.put(PLAIN + DEFAULT_MAC + bytes(60))
        taker = World(two, right)
        receiver = taker.raw()
        rooms = [receiver.room(256) for _ in range(128)]
        budget = 200_000

        def send(_: int = 1) -> None:
            nonlocal budget
            driver.used(1)
            while driver.ring(1).num_free and budget:
                driver.ring(1).add([place])
                budget -= 1
            driver.ring(1).publish()

        def take(_: int = 0) -> None:
            receiver.used(0)
            while receiver.ring(0).num_free:
                receiver.ring(0).add([], [rooms[0]])
            receiver.ring(0).publish()

        for world, called in ((sender, send), (taker, take)):
            device = world.device
            device.on_queue_call = called
            device.on_work_left = lambda index, d=device: loop.call_soon(partial(d.notify, index))
        take()
        send()
        loop.call_soon(lambda: sender.device.notify(1))
        for _ in range(30):
            before = taker.device.stats["rx_frames"]
            loop.run_once(0)
            assert taker.device.stats["rx_frames"] - before <= 4 * FRAMES_PER_TURN
        assert taker.device.stats["rx_frames"] >= 30 * 16 and budget
    loop.close()


class Longwinded:
    """A guest with a ring of the largest kind, all of whose chains are of as many descriptors."""

    SIZE = 32768

    def __init__(
        self, memory: GuestMemory, queue: int, flags: int, first: int, length: int
    ) -> None:
        self.world = World(memory)
        self.world.device.queues[queue].max_size = self.SIZE
        self.world.device.accept_features(features("VERSION_1", "INDIRECT_DESC", "MRG_RXBUF"))
        self.world.device.write_status(Status.FEATURES_OK)
        allocator = GuestAllocator(memory)
        ring = DriverRing.allocate(memory, allocator, self.SIZE, features=features("INDIRECT_DESC"))
        buffer, table = allocator.allocate(64), allocator.allocate(16 * self.SIZE)
        memory.write(buffer, b"\1" * 64)  # as a net header: nothing that was negotiated
        descriptors = [
            struct.pack("<QIHH", buffer, length, flags | DESC_F_NEXT, number + 1)
            for number in range(self.SIZE - 1)
        ]
        descriptors[0] = struct.pack("<QIHH", buffer, first, flags | DESC_F_NEXT, 1)
        descriptors.append(struct.pack("<QIHH", buffer, length, flags, 0))
        memory.write(table, b"".join(descriptors))
        for head in range(self.SIZE):
            ring.poke_descriptor(head, table, 16 * self.SIZE, DESC_F_INDIRECT, 0)
            ring.poke_avail(head, head)
        ring.poke_avail_index(self.SIZE)
        self.turns: list[int] = []
        self.world.device.on_work_left = self.turns.append
        self.queue = queue
        self.place = {"desc": ring.desc, "avail": ring.avail, "used": ring.used}

    def taken_in_a_turn(self) -> int:
        """How many chains one turn takes; each costs a tenth of what a turn may."""
        ring = self.world.device.queues[self.queue].ring
        assert ring is not None
        before = ring._next_avail
        self.world.device.notify(self.queue)
        return ring._next_avail - before


@pytest.mark.parametrize("enabled", [True, False])
def test_a_turn_on_a_queue_of_the_longest_chains_ends_with_the_first(enabled: bool) -> None:
    """256 of them were a turn: 6 seconds in which nobody else was served, and a disabled ring's
    513 more than 100."""
    with GuestMemory.allocate(16 * MIB) as memory:
        guest = Longwinded(memory, 1, 0, 1, 1)
        device = guest.world.device
        device.setup_queue(1, size=guest.SIZE, **guest.place, enabled=enabled)
        device.write_status(device.status | Status.DRIVER_OK)
        guest.turns.clear()
        assert [guest.taken_in_a_turn() for _ in range(3)] == [1, 1, 1]
        assert guest.turns == [1, 1, 1], "the rest is left for a later turn"
        reason = "csum not negotiated" if enabled else "disabled"
        assert sum(guest.world.dropped("tx").values()) == guest.world.dropped("tx")[reason] >= 3


def test_a_frame_is_not_spread_over_buffers_of_hardly_a_byte_in_one_turn() -> None:
    """Each of them took a chain of 32,768 descriptors to name: 5,000 for a long frame, half a
    minute in which nobody else was served."""
    with GuestMemory.allocate(16 * MIB) as memory:
        guest = Longwinded(memory, 0, DESC_F_WRITE, 12, 0)
        device = guest.world.device
        device.setup_queue(0, size=guest.SIZE, **guest.place)
        guest.world.link.deliver(OUR_MAC + bytes(200))
        device.write_status(device.status | Status.DRIVER_OK)
        for _ in range(4):
            guest.turns.clear()
            assert guest.taken_in_a_turn() <= 1
            assert guest.turns == [0], "the rest is left for a later turn"
        while guest.turns:
            device.notify(guest.turns.pop())
        assert device.stats["rx_frames"] == 1 and device.fault is None


@pytest.fixture
def kicked(tmp_path: Path) -> Iterator[tuple[Loop, Frontend, GuestRing]]:
    """A device that is served to a frontend, and its ring, which runs."""
    loop, ram = Loop(), Ram()
    server = Server(Shouter(), loop, tmp_path / "s")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tmp_path / "s"))
    frontend, ring = Frontend(loop, sock), GuestRing(ram)
    frontend.negotiate()
    frontend.set_memory(ram)
    frontend.start_ring(0, ring)
    yield loop, frontend, ring
    frontend.close()
    server.close()
    ram.close()
    loop.close()


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd here")
def test_a_descriptor_that_kicks_for_ever_by_itself_is_heard_now_and_then(
    kicked: tuple[Loop, Frontend, GuestRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eventfd that is a semaphore and filled once can be read 2**64 times, a timer's whenever
    one looks: a worker kept a whole processor busy for a frontend that slept."""
    loop, frontend, ring = kicked
    heard: list[int] = []
    monkeypatch.setattr(vhost_backend, "drain", lambda fd: (heard.append(fd), drain(fd))[1])
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    os.eventfd_write(event, (1 << 64) - 2)
    frontend.send(12, struct.pack("=Q", 0), [event])
    monkeypatch.setattr(vhost_backend, "REST_SECONDS", 0.2)
    frontend.turn(5 * MANY_KICKS)
    assert MANY_KICKS - 1 <= len(heard) <= 2 * MANY_KICKS
    ring.offer(b"not lost")  # its kick is one of those that are not heard
    wait_until(loop, lambda: ring.take() == [b"NOT LOST"])
    heard.clear()
    for number in range(3 * MANY_KICKS):
        ring.offer(bytes([65 + number % 26]))
        frontend.turn(1)
    assert len(heard) >= 2 * MANY_KICKS, "kicks that bring something are heard"
    os.close(event)


@pytest.fixture
def stamped() -> Iterator[socket.socket]:
    """A TCP socket that the kernel keeps a timestamp for, which nobody takes: it has an error."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    software_and_sending = 1 << 4 | 1 << 1  # linux/net_tstamp.h
    with theirs, ours:
        try:
            theirs.setsockopt(socket.SOL_SOCKET, 37, software_and_sending)  # SO_TIMESTAMPING
        except OSError:
            pytest.skip("sockets have no timestamps here")
        theirs.send(b"x")
        poller = select.poll()
        poller.register(theirs, 0)
        if not poller.poll(1000):  # an error, whatever was asked for
            pytest.skip("the loopback interface takes no timestamps here")
        yield theirs


def test_a_channel_with_an_error_that_stays_is_given_up(stamped: socket.socket) -> None:
    """A frontend that has its TCP socket keep timestamps made the loop look for them for ever."""
    loop = Loop()
    channel = Channel(os.dup(stamped.fileno()), loop)
    for _ in range(2 * MOST_IN_VAIN):
        loop.run_once(0)
    assert channel._closed
    loop.close()


def test_a_states_descriptor_with_an_error_that_stays_is_given_up(stamped: socket.socket) -> None:
    loop, failed = Loop(), list[bool]()
    transfer = Transfer(os.dup(stamped.fileno()), loop, b"", lambda _: None)
    transfer.when_done(failed.append)
    for _ in range(2 * MOST_IN_VAIN):
        loop.run_once(0)
    assert failed == [True]
    loop.close()


def test_control_commands_are_carried_out_a_few_at_a_time(memory: GuestMemory) -> None:
    world = World(memory)
    guest = world.raw(features("CTRL_VQ", "CTRL_RX"))
    command, ack = guest.put(bytes((0, 0, 1))), guest.room(1)
    for _ in range(32):
        guest.offer(2, [command], [ack], kick=False)
    turns: list[int] = []
    world.device.on_work_left = turns.append
    guest.driver.kick(2)
    done = []
    while turns:
        done.append(len(guest.used(2)))
        world.device.notify(turns.pop())
    assert done == [COMMANDS_PER_TURN] * 4 + [0] or done == [COMMANDS_PER_TURN] * 4


def test_a_frontend_that_talks_without_end_keeps_no_other_waiting() -> None:
    loop, pairs = Loop(), [socket.socketpair() for _ in range(2)]
    connections = [Connection(ours, Shouter(), loop) for ours, _ in pairs]
    talker, modest = (theirs for _, theirs in pairs)
    talker.setblocking(False)
    modest.setblocking(False)
    request = struct.pack("=3I", 18, 1, 8) + struct.pack("=2I", 0, 1)  # SET_VRING_ENABLE
    answered = 0
    for turn in range(50):
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                talker.send(request)
                sent += 1
        assert not turn or sent <= 2 * MESSAGES_PER_TURN  # as much as was taken
        modest.send(struct.pack("=3I", 1, 1, 0))
        loop.run_once(0)
        with contextlib.suppress(BlockingIOError):
            answered += len(modest.recv(4096)) // 20
    assert answered >= 49 and not any(connection.closed for connection in connections)
    for _, theirs in pairs:
        theirs.close()
    loop.run_once(0)
    wait_until(loop, lambda: all(connection.closed for connection in connections))
    loop.close()


def test_a_polled_ring_leaves_no_timers_behind(tmp_path: Path) -> None:
    loop, device, ram = Loop(), Shouter(), Ram()
    server = Server(device, loop, tmp_path / "s")
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "s"))
        frontend = Frontend(loop, sock)
        frontend.send(12, struct.pack("=Q", 0x100))
        frontend.turn(2)
        frontend.close()
        wait_until(loop, lambda: server.connection is None)
    assert len(loop._timers) <= 8
    server.close()
    ram.close()
    loop.close()
