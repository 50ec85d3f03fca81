"""Rings that are started, but disabled: processed without side effects (vhost-user, "Ring states").

A network device discards what its guest sends meanwhile, and gives it nothing; devices whose
requests must not get lost leave them where they are.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from vhost_frontend import Frontend, GuestRing, Ram, Shouter, wait_until

from vq.abi import Feature, Status
from vq.device import Queue
from vq.link import LoopbackLink
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import BURST, NetDevice
from vq.net_driver import NetDriver
from vq.recording import Kind, Recorder, RecordingReader
from vq.split_ring import SplitRing
from vq.testing.recordings import assert_replays
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_backend import ENABLE_SECONDS
from vq.vhost_user import Connection

TX = 1


def frame(number: int) -> bytes:
    return b"\xff" * 6 + b"\2\0\0\0\0\1\x88\xb5" + number.to_bytes(4) + bytes(46)


class World:
    """A network device on a loop of cable, a frontend and a driver, in one thread."""

    def __init__(self, stack: ExitStack, features: int = -1, *, record: Path | None = None) -> None:
        self.memory = stack.enter_context(GuestMemory.allocate(16 << 20))
        self.loop = Loop()
        stack.callback(self.loop.close)
        self.device = NetDevice(LoopbackLink(), features=features)
        stack.callback(self.device.close)
        if record is not None:
            stack.enter_context(Recorder(self.device, record))
        ours, theirs = socket.socketpair()
        connection = Connection(theirs, self.device, self.loop)
        stack.callback(connection.close)
        self.frontend = stack.enter_context(
            VhostFrontend(
                ours,
                self.memory,
                queue_count=3,
                idle=lambda: self.loop.run_once(0),
            )
        )
        self.idle: Callable[[], object] = self.frontend.wait
        self.driver = NetDriver(self.frontend, self.memory, idle=lambda: (self.idle(), None)[1])

    def turn(self, count: int = 8) -> None:
        for _ in range(count):
            self.loop.run_once(0)
            self.frontend.poll()

    def send(self, number: int) -> None:
        assert self.driver.send(frame(number)), "the transmit queue is wedged"
        self.turn()

    def received(self) -> list[int]:
        self.turn()
        frames = (received.data for received in self.driver.receive())
        return [int.from_bytes(data[14:18]) for data in frames]

    @property
    def discarded(self) -> int:
        return self.device.stats["tx_dropped: disabled"]


@pytest.fixture(params=["events", "flags"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    without = 0 if request.param == "events" else 1 << Feature.EVENT_IDX
    with ExitStack() as stack:
        yield World(stack, ~without)


def test_what_is_sent_into_a_disabled_ring_is_discarded_and_the_driver_is_not_wedged(
    world: World,
) -> None:
    world.send(1)
    assert world.received() == [1]
    world.frontend.enable(TX, False)
    for number in range(1000):  # several times as many as the queue holds
        world.send(number)
    assert world.driver.wait_sent()
    assert world.discarded == 1000
    assert world.received() == []
    world.frontend.enable(TX, True)
    world.send(7)
    assert world.received() == [7]
    assert world.discarded == 1000 and world.device.stats["tx_frames"] == 2


def test_what_waits_when_a_ring_is_disabled_is_discarded_before_the_frontend_hears_of_it(
    world: World,
) -> None:
    """User-Mode Linux frees the memory of its rings when the request after this one is answered."""
    world.device.link.ports[0].limit = 0  # type: ignore[attr-defined]  # a full link
    for number in range(200):
        assert world.driver.send(frame(number))
    world.frontend.enable(TX, False)
    assert world.driver.reap() == 200
    stats = world.device.stats
    assert stats["tx_dropped: disabled"] + stats["tx_dropped: queue stopped"] == 200


def test_nothing_is_received_through_a_disabled_ring(world: World) -> None:
    world.frontend.enable(0, False)
    world.send(1)
    world.frontend.notify(0)
    assert world.received() == []
    world.frontend.enable(0, True)
    world.send(2)
    assert world.received() == [1, 2]  # the first waited in the link


def test_a_command_waits_until_its_ring_is_enabled(world: World) -> None:
    control = 2
    waited: list[int] = []

    def idle() -> None:
        waited.append(world.device.stats["control_commands"])
        if len(waited) == 20:
            world.frontend.enable(control, True)
        world.frontend.wait()

    world.frontend.enable(control, False)
    world.idle = idle
    assert world.driver.set_mac(b"\2\0\0\0\0\7")
    assert len(waited) >= 20 and not any(waited[:20])
    assert world.device.stats["control_refused"] == 0


def test_a_ring_that_is_enabled_a_moment_after_it_was_started_loses_nothing(world: World) -> None:
    world.frontend.disconnect()
    world.turn()
    world.driver.send(frame(5))
    ours, theirs = socket.socketpair()
    connection = Connection(theirs, world.device, world.loop)
    world.frontend.reconnect(ours)  # a turn of the backend between any two of its messages
    assert world.received() == [5]
    assert not world.discarded
    connection.close()


def test_a_ring_that_stays_disabled_after_its_start_is_emptied_without_a_kick(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver kicked a backend that is dead, and waits for its buffers."""
    world.frontend.disconnect()
    world.turn()
    world.driver.send(frame(5))
    monkeypatch.setattr(world.frontend, "enable", lambda index, enabled: None)
    ours, theirs = socket.socketpair()
    connection = Connection(theirs, world.device, world.loop)
    world.frontend.reconnect(ours)
    wait_until(world.loop, lambda: world.discarded == 1)
    assert world.driver.reap() == 1
    connection.close()


class RawWorld:
    """A network device whose transmit ring is written by hand."""

    def __init__(self, stack: ExitStack) -> None:
        self.loop = Loop()
        stack.callback(self.loop.close)
        self.ram = Ram()
        stack.callback(self.ram.close)
        self.device = NetDevice(LoopbackLink())
        stack.callback(self.device.close)
        ours, theirs = socket.socketpair()
        stack.callback(Connection(theirs, self.device, self.loop).close)
        self.frontend = Frontend(self.loop, ours)
        stack.callback(self.frontend.close)
        self.ring = GuestRing(self.ram)
        self.frontend.negotiate()
        self.frontend.set_memory(self.ram)
        self.frontend.start_ring(TX, self.ring)

    def enable(self, enabled: bool) -> None:
        self.frontend.send(18, struct.pack("=2I", TX, enabled))
        self.frontend.turn()

    def send(self, number: int) -> None:
        """A frame in one buffer."""
        ring, data = self.ring, bytes(12) + frame(number)
        slot = ring.avail_idx % ring.size
        place = ring.buffers + 256 * slot
        self.ram.bytes[place : place + len(data)] = data
        struct.pack_into("<QIHH", self.ram.bytes, ring.desc + 16 * slot, place, len(data), 0, 0)
        struct.pack_into("<H", self.ram.bytes, ring.avail + 4 + 2 * slot, slot)
        self.set_available(ring.avail_idx + 1)
        self.frontend.kick(TX)

    def set_available(self, index: int) -> None:
        self.ring.avail_idx = index
        struct.pack_into("<H", self.ram.bytes, self.ring.avail + 2, index)


@pytest.fixture
def raw() -> Iterator[RawWorld]:
    with ExitStack() as stack:
        yield RawWorld(stack)


def test_memory_is_replaced_under_a_disabled_ring(raw: RawWorld) -> None:
    raw.enable(False)
    raw.send(1)
    raw.frontend.set_memory(raw.ram)
    raw.send(2)
    assert raw.device.stats["tx_dropped: disabled"] == 2
    raw.enable(True)
    raw.send(3)
    assert raw.device.stats["tx_frames"] == 1 and raw.ring.used_idx == 3


def test_a_disabled_ring_stops_at_its_place(raw: RawWorld) -> None:
    raw.enable(False)
    for number in range(3):
        raw.send(number)
    assert raw.frontend.stop_ring(TX) == 3
    raw.send(3)
    assert raw.ring.used_idx == 3  # a stopped ring is not touched
    raw.frontend.start_ring(TX, raw.ring, base=3)
    raw.send(4)
    assert raw.ring.used_idx == 5 and raw.device.stats["tx_frames"] == 2


def test_what_is_said_about_a_disabled_ring_counts_at_once(raw: RawWorld) -> None:
    """The position, and where the memory is, may change "on the fly" ("Ring states")."""
    raw.enable(False)
    raw.send(0)
    raw.set_available(5)
    struct.pack_into("<H", raw.ram.bytes, raw.ring.used + 2, 5)
    assert raw.frontend.tell(10, struct.pack("=2I", TX, 5)) == 0  # another position
    raw.send(5)
    assert raw.ring.used_idx == 6
    assert raw.device.stats["tx_dropped: disabled"] == 2


def test_a_bad_chain_in_a_disabled_ring_is_found(raw: RawWorld) -> None:
    raw.enable(False)
    raw.set_available(0x7000)
    raw.frontend.kick(TX)
    assert raw.device.stats["driver_errors"] == 1
    assert raw.device.status & Status.NEEDS_RESET


def test_a_turn_on_a_disabled_ring_ends_however_much_is_sent(world: World) -> None:
    """A driver that fills the ring from within each call would never let the others have theirs."""
    world.frontend.enable(TX, False)
    device, queue = world.device, world.device.queues[TX]
    tell = device.on_queue_call
    turns = 0

    def refill(index: int) -> None:
        nonlocal turns
        turns += 1
        if turns < 10_000:
            world.driver.reap()
            for number in range(BURST):
                world.driver.send(frame(number))
        if tell is not None:
            tell(index)

    device.on_queue_call = refill
    world.driver.send(frame(0))
    device.notify(TX)
    assert queue.ring is not None
    assert turns <= queue.ring.size // BURST + 1
    device.on_queue_call = tell


def test_a_driver_that_is_unloaded_finds_its_memory_untouched(raw: RawWorld) -> None:
    """User-Mode Linux disables rings when its driver goes, and never stops them: their memory is
    somebody else's then, until the next driver has described other rings."""
    raw.enable(False)
    start, end = raw.ring.desc, raw.ring.desc + 0x4000
    rubbish = bytes(range(256)) * 0x40
    raw.ram.bytes[start:end] = rubbish
    raw.frontend.negotiate()
    raw.frontend.set_memory(raw.ram)
    raw.frontend.turn()
    passed: list[bool] = []
    raw.loop.call_later(2 * ENABLE_SECONDS, lambda: passed.append(True))
    wait_until(raw.loop, lambda: bool(passed))
    assert raw.ram.bytes[start:end] == rubbish
    assert not raw.device.stats["driver_errors"]
    assert not raw.device.stats["tx_dropped: disabled"]


def test_a_ring_that_was_enabled_for_a_moment_is_looked_at_no_more(raw: RawWorld) -> None:
    """Defect: the look at a ring that was started and not enabled yet came after it had been
    enabled and disabled again, and its memory given to somebody else.
    """
    raw.enable(False)
    start, end = raw.ring.desc, raw.ring.desc + 0x4000
    rubbish = bytes(range(256)) * 0x40
    raw.ram.bytes[start:end] = rubbish
    passed: list[bool] = []
    raw.loop.call_later(2 * ENABLE_SECONDS, lambda: passed.append(True))
    wait_until(raw.loop, lambda: bool(passed))
    assert raw.ram.bytes[start:end] == rubbish
    assert not raw.device.stats["driver_errors"]


# --- devices whose requests must not get lost ----------------------------------------------------


def test_requests_of_other_devices_wait_in_a_disabled_ring() -> None:
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        ram = Ram()
        stack.callback(ram.close)
        device = Shouter()
        ours, theirs = socket.socketpair()
        stack.callback(Connection(theirs, device, loop).close)
        frontend = Frontend(loop, ours)
        stack.callback(frontend.close)
        ring = GuestRing(ram)
        frontend.negotiate()
        frontend.set_memory(ram)
        frontend.start_ring(0, ring)
        frontend.send(18, bytes(8))
        for text in (b"a", b"b"):
            ring.offer(text)
            frontend.kick()
        assert ring.take() == []
        frontend.send(18, bytes(4) + (1).to_bytes(4, "little"))
        frontend.turn()
        assert ring.take() == [b"A", b"B"]


# --- recordings ----------------------------------------------------------------------------------


def test_a_session_with_a_disabled_ring_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "session.vqrec"
    with ExitStack() as stack:
        world = World(stack, record=path)
        world.send(1)
        world.frontend.enable(TX, False)
        world.send(2)
        world.frontend.enable(TX, True)
        world.send(3)
        assert world.received() == [1, 3]
    kinds = [event.kind for event in RecordingReader(path)]
    assert kinds.count(Kind.DISABLED_SETUP) == 3 + 1  # each starts so, and one is disabled
    assert_replays(path, NetDevice)

    class Sends(NetDevice):
        def process_disabled(self, queue: Queue, ring: SplitRing) -> bool:
            return False

    with pytest.raises(AssertionError, match="is not given back"):
        assert_replays(path, Sends)
