"""Queue pairs that other processes serve: nobody on either side can tell, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import pairwise

import psutil
import pytest
from apart_world import GUEST_MAC, SocketLink, SocketPort, World, frame_of, is_gone
from net_frames import UDP, make_frame, make_payload
from test_dhcp import DISCOVER, Reply, kind, request

from vq import queue_process
from vq.abi import CtrlRx, HdrFlag, NetFeature, Status
from vq.dhcp import LocalDhcp
from vq.errors import DriverError, VqError
from vq.link import Frame
from vq.loop import Loop
from vq.memory import Region
from vq.net_driver import PLAIN_HEADER, NetDriver, NetHeader
from vq.offload import Offload
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_message import (
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    ProtocolFeature,
    Request,
    VhostFeature,
    VringAddr,
    VringFd,
    VringState,
)
from vq.vhost_processes import RETRY_SECONDS

OTHER, THIRD = bytes.fromhex("020000000007"), bytes.fromhex("020000000008")

pytestmark = pytest.mark.usefixtures("quick_collector")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("pairs", "processes"), [(2, 2), (3, 3), (3, 2)])
def test_frames_pass_through_the_other_processes_in_their_order(
    stack: ExitStack, pairs: int, processes: int
) -> None:
    world = World(stack, pairs=pairs, processes=processes)
    pids = world.lend()
    served = [process.queues for process in world.processes._processes]
    assert served == [{2, 3}, {4, 5}][: processes - 1]
    for pair in range(pairs):
        world.send(*range(300), pair=pair)
        world.wait_sent(*range(300), pair=pair)
        world.feed(*range(30), pair=pair)
        world.wait_received(*range(30))
    assert world.pids == pids
    stats = world.device.stats
    here = pairs - processes + 1
    assert (stats["tx_frames"], stats["rx_frames"]) == (300 * here, 30 * here), "the others' too"
    world.settle()
    assert (stats["tx_frames"], stats["rx_frames"]) == (300 * pairs, 30 * pairs)
    assert stats["tx_bytes"] == 64 * 300 * pairs
    assert all(map(is_gone, pids))


@pytest.mark.parametrize("linger", [0.0, 0.5])
def test_the_other_processes_lie_awake_for_as_long_as_this_one(
    stack: ExitStack, linger: float
) -> None:
    world = World(stack, loop=Loop(linger=linger))
    (pid,) = world.lend()
    process = psutil.Process(pid)

    def exchange(count: int) -> None:
        for number in range(count):
            world.send(number, pair=1)
            world.wait_sent(number, pair=1)
            time.sleep(0.01)

    exchange(5)
    before = process.num_ctx_switches().voluntary
    exchange(20)
    slept = process.num_ctx_switches().voluntary - before
    assert slept < 10 if linger else slept >= 20


# --- what brings queues home ---------------------------------------------------------------------


def test_filters_hold_in_the_other_processes_as_soon_as_the_driver_was_answered(
    stack: ExitStack,
) -> None:
    world = World(stack)
    driver = world.driver
    for _ in range(2):
        (pid,) = world.lend()
        assert driver.set_receive_mode(CtrlRx.PROMISC, False)
        assert is_gone(pid)
        assert driver.set_mac_table([], [])
        assert driver.set_mac(OTHER)
        world.lend()
        world.feed(frame_of(1, to=GUEST_MAC), frame_of(2, to=OTHER), frame_of(3), pair=1)
        world.wait_received(2, 3)
        assert driver.set_mac_table([GUEST_MAC], [])
        assert world.pids == []
        world.lend()
        world.feed(frame_of(4, to=GUEST_MAC), frame_of(5, to=THIRD), frame_of(6), pair=1)
        world.wait_received(4, 6)
        assert driver.set_receive_mode(CtrlRx.PROMISC, True)
        world.lend()
        world.feed(frame_of(7, to=THIRD), pair=1)
        world.wait_received(7)
        assert driver.set_mac(GUEST_MAC)


def test_vlans_hold_in_the_other_processes(stack: ExitStack) -> None:
    world = World(stack)
    world.driver.set_receive_mode(CtrlRx.PROMISC, False)

    def tagged(number: int, vlan: int) -> bytes:
        frame = frame_of(number)
        return frame[:12] + b"\x81\0" + vlan.to_bytes(2) + frame[12:]

    def passed(number: int) -> bool:
        world.feed(tagged(number, 5), frame_of(number + 1), pair=1)
        found: list[bytes] = []
        world.wait(lambda: found.extend(f.data for f in world.driver.receive()) or len(found) > 0)
        world.quiet()
        found.extend(f.data for f in world.driver.receive())
        assert found[-1] == frame_of(number + 1)
        return found[0] == tagged(number, 5) and len(found) == 2

    world.lend()
    assert not passed(1)
    assert world.driver.add_vlan(5)
    world.lend()
    assert passed(3)
    assert world.driver.remove_vlan(5)
    world.lend()
    assert not passed(5)


def test_offloads_that_the_driver_gives_back_are_done_in_the_other_processes(
    stack: ExitStack,
) -> None:
    world = World(stack)
    world.link.delivers = Offload.CSUM  # in frames that this link cannot keep from coming
    header = NetHeader(flags=HdrFlag.NEEDS_CSUM, csum_start=34, csum_offset=6)
    frame = make_frame(make_payload(40), protocol=UDP)
    flags = []
    for offloads in (1 << NetFeature.GUEST_CSUM, 0, 1 << NetFeature.GUEST_CSUM):
        assert world.driver.set_guest_offloads(offloads)
        world.lend()
        world.link.ports[1].host.send(header.pack() + frame)
        found: list[int] = []
        world.wait(lambda: found.extend(f.header.flags for f in world.driver.receive()) or found)  # noqa: B023
        flags += found
    assert flags == [HdrFlag.NEEDS_CSUM, 0, HdrFlag.NEEDS_CSUM]


def test_pairs_come_and_go(stack: ExitStack) -> None:
    world = World(stack, pairs=3)
    lent: list[int] = []
    world.link.on_activate = lambda: lent.extend(world.pids)
    for pairs in (1, 3, 2, 1, 2, 3):
        assert world.driver.set_queue_pairs(pairs)
        assert world.link.active == pairs
        assert world.pids == []
        world.lend(pairs - 1)
        world.works()
        if pairs < 3:
            world.feed(9, pair=pairs)
            world.quiet()
            assert world.received() == []
            world.link.ports[pairs].socket.recv(1000)  # it waits in the link
    assert len(world.pids) == 2
    assert not lent, "no port comes or goes under another process"


def another_call(world: World) -> None:
    for index in (2, 3):
        vring = world.frontend._vrings[index]
        call, call_end = os.pipe()
        os.set_blocking(call, False)
        world.frontend._tell(Request.SET_VRING_CALL, VringFd(index, True), [call_end])
        os.close(call_end)
        os.close(vring.call)
        world.frontend._vrings[index] = vring._replace(call=call)
        world.look_at(index)


def another_kick(world: World) -> None:
    for index in (2, 3):
        vring = world.frontend._vrings[index]
        kick_end, kick = os.pipe()
        world.frontend._tell(Request.SET_VRING_KICK, VringFd(index, True), [kick_end])
        os.close(kick_end)
        os.close(vring.kick)
        world.frontend._vrings[index] = vring._replace(kick=kick)


def another_error(world: World) -> None:
    event = os.eventfd(0)
    world.frontend._tell(Request.SET_VRING_ERR, VringFd(3, True), [event])
    os.close(event)


def polled(world: World) -> None:
    """No kicks any more: whoever has the ring looks at it again and again."""
    for index in (2, 3):
        world.frontend._tell(Request.SET_VRING_KICK, VringFd(index, False))


def another_address(world: World) -> None:
    vring = world.frontend._vrings[3]
    used = world.memory.hvaddr(vring.used)
    places = (world.memory.hvaddr(vring.desc), used, world.memory.hvaddr(vring.avail))
    base = world.frontend._ask_for(Request.GET_VRING_BASE, VringState(3, 0)).payload
    assert isinstance(base, VringState)
    assert base.num == world.memory.load16(vring.avail + 2), "all that was available was taken"
    assert base.num == world.memory.load16(vring.used + 2), "and given back"
    world.frontend._tell(Request.SET_VRING_ADDR, VringAddr(3, 0, *places, 0))
    world.frontend._tell(Request.SET_VRING_BASE, base)
    kick_end, kick = os.pipe()
    call, call_end = os.pipe()
    os.set_blocking(call, False)
    for said, fd in ((Request.SET_VRING_CALL, call_end), (Request.SET_VRING_KICK, kick_end)):
        world.frontend._tell(said, VringFd(3, True), [fd])
        os.close(fd)
    os.close(vring.kick)
    os.close(vring.call)
    world.frontend._vrings[3] = vring._replace(kick=kick, call=call)
    world.look_at(3)


def off_and_on(world: World) -> None:
    for enabled in (0, 1):
        world.frontend._tell(Request.SET_VRING_ENABLE, VringState(3, enabled))


def memory_again(world: World) -> None:
    regions = world.memory.regions
    table = MemoryTable(tuple(MemoryRegion(r.gpa, r.size, r.address, r.offset) for r in regions))
    world.frontend._tell(Request.SET_MEM_TABLE, table, [r.fd for r in regions])


def more_memory(world: World) -> None:
    slots = ProtocolFeature.CONFIGURE_MEM_SLOTS
    world.connections[-1].backend.protocol_features |= 1 << slots
    with closing(Region.anonymous(1 << 32, 1 << 20)) as region:
        described = MemoryRegion(region.gpa, region.size, 1 << 40, 0)
        world.frontend._tell(Request.ADD_MEM_REG, described, [region.fd])
        assert world.pids == []
        world.lend()
        world.frontend._tell(Request.REM_MEM_REG, described)


def reconnected(world: World) -> None:
    world.frontend.disconnect()
    world.turn()
    world.frontend.reconnect(world.connect())
    assert world.driver.set_queue_pairs(2)


def restarted(world: World) -> None:
    world.driver.restart()


def announced(world: World) -> None:
    world.device.announce()
    assert world.driver.acknowledge_announce()


CHANGES: dict[str, Callable[[World], object]] = {
    "kicks": another_kick,
    "calls": another_call,
    "polling": polled,
    "a stop and a start": another_address,
    "off and on": off_and_on,
    "the memory table": memory_again,
    "a region more and less": more_memory,
    "features": lambda world: world.frontend.accept_features(world.driver.features),
    "status": lambda world: world.frontend.write_status(world.frontend._status),
    "another connection": reconnected,
    "another driver": restarted,
    "an announcement": announced,
    "the link": lambda world: world.link.on_change(),
}


@pytest.mark.parametrize("notes", [True, False], ids=["inflight notes", "no notes"])
@pytest.mark.parametrize("change", CHANGES)
def test_queues_come_home_for_a_change_and_are_lent_again(
    stack: ExitStack, change: str, notes: bool
) -> None:
    protocol = -1 if notes else ~(1 << ProtocolFeature.INFLIGHT_SHMFD)
    world = World(stack, protocol=protocol)
    (before,) = world.lend()
    world.works()
    world.send(1, 2, pair=1)
    CHANGES[change](world)
    assert is_gone(before)
    world.wait_sent(1, 2, pair=1)
    world.works(1)  # here
    (after,) = world.lend()
    assert after != before
    world.works()
    assert world.pids == [after]
    assert not world.device.stats["driver_errors"]


def test_what_nobody_shares_leaves_them_where_they_are(stack: ExitStack) -> None:
    world = World(stack)
    pids = world.lend()
    another_error(world)
    world.frontend._tell(Request.SET_VRING_NUM, VringState(3, 256))
    world.frontend.read_config(0, 6)
    world.device.send_rarp(GUEST_MAC)
    world.device.set_link_up(False)
    world.device.set_link_up(True)
    world.quiet()
    assert world.pids == pids


def test_a_reset_of_the_device_is_the_end_of_all_loans(stack: ExitStack) -> None:
    world = World(stack)
    backend = world.connections[-1].backend
    backend.protocol_features |= 1 << ProtocolFeature.RESET_DEVICE
    (pid,) = world.lend()
    world.frontend._tell(Request.RESET_DEVICE)
    assert is_gone(pid)
    world.quiet(0.1)
    assert world.pids == []
    assert not any(queue.lent for queue in world.device.queues)


def test_a_connection_that_ends_takes_its_processes_along(stack: ExitStack) -> None:
    world = World(stack, pairs=3)
    pids = world.lend()
    world.frontend.disconnect()
    world.quiet(0.1)
    assert all(map(is_gone, pids)) and world.pids == []


def test_pages_that_another_process_writes_are_in_the_dirty_log(stack: ExitStack) -> None:
    """Switched on while the queues are lent, as it is when a migration begins."""
    world = World(stack)
    backend = world.connections[-1].backend
    backend.protocol_features |= 1 << ProtocolFeature.LOG_SHMFD
    world.lend()
    pages = world.memory.size // 4096
    log = stack.enter_context(closing(Region.anonymous(0, pages // 8)))
    world.frontend._send(
        Message(Request.SET_LOG_BASE, LogArea(pages // 8, 0), [os.dup(log.fd)], need_reply=True)
    )
    world.frontend._reply_to(Request.SET_LOG_BASE)
    logging_on = world.driver.features | 1 << VhostFeature.LOG_ALL
    world.frontend.accept_features(logging_on)
    world.lend()
    before = world.memory.read(0, world.memory.size)
    log.view[:] = bytes(len(log.view))
    world.feed(*range(20), pair=1)
    world.wait(lambda: world.memory.load16(world.frontend._vrings[2].used + 2) >= 20)
    after = world.memory.read(0, world.memory.size)
    changed = {
        page
        for page in range(pages)
        if before[page << 12 : page + 1 << 12] != after[page << 12 : page + 1 << 12]
    }
    assert len(changed) >= 10
    world.wait_received(*range(20))
    marked = {page for page in range(pages) if log.view[page // 8] >> page % 8 & 1}
    assert changed <= marked
    world.frontend.accept_features(world.driver.features)
    world.lend()
    log.view[:] = bytes(len(log.view))
    world.works(1)
    assert not any(log.view), "it was switched off"


def test_a_ring_that_is_disabled_while_it_is_lent_is_emptied_before_the_frontend_hears_of_it(
    stack: ExitStack,
) -> None:
    """Defect: that was so for rings that are not lent only. User-Mode Linux frees their memory when
    the request after this one is answered.
    """
    world = World(stack)
    world.lend()
    world.link.ports[1].fill()
    world.send(*range(200), pair=1)
    world.quiet()
    assert world.driver.unsent(1) == 200
    backend = world.connections[-1].backend
    given_back: list[int] = []
    reply = backend._send

    def look_and_reply(message: Message) -> None:
        given_back.append(world.memory.load16(world.frontend._vrings[3].used + 2))
        reply(message)

    backend._send = look_and_reply
    world.frontend.enable(3, False)
    assert given_back == [200]
    stats = world.device.stats
    assert stats["tx_dropped: disabled"] + stats["tx_dropped: queue stopped"] == 200
    assert stats["tx_dropped: disabled"] >= 100


def test_the_driver_is_called_for_what_comes_back_when_a_queue_comes_home(stack: ExitStack) -> None:
    """Defect: a driver that waited for room in its queue waited for ever: frames that a full link
    had not taken were given back on the way, and no call was made.
    """
    world = World(stack)
    world.lend()
    world.link.ports[1].fill()
    world.send(*range(20), pair=1)
    world.quiet()
    queue = world.driver._transmit[1]
    assert not queue.ring.enable_calls()
    world.driver._called.clear()
    assert world.driver.set_mac(OTHER)
    given_back = 0
    while given_back < 20:  # the other process may have had some of them only
        world.wait(lambda: queue.index in world.driver._called)
        given_back += world.driver.reap(1)
        while queue.ring.enable_calls():
            given_back += world.driver.reap(1)


# --- what comes home by itself -------------------------------------------------------------------


def break_a_rule(world: World, queue: int) -> None:
    """The available index goes where it cannot be."""
    avail = world.frontend._vrings[queue].avail
    world.memory.store16(avail + 2, world.memory.load16(avail + 2) + 0x7000 & 0xFFFF)
    world.frontend.notify(queue)


@pytest.mark.parametrize("asked", [False, True])
def test_a_drivers_fault_in_another_process_is_the_devices(stack: ExitStack, asked: bool) -> None:
    world = World(stack)
    (pid,) = world.lend()
    event = os.eventfd(0, os.EFD_NONBLOCK)
    stack.callback(os.close, event)
    for index in (0, 3):
        world.frontend._tell(Request.SET_VRING_ERR, VringFd(index, True), [os.dup(event)])
    break_a_rule(world, 3)
    if asked:
        wait_for_the_end_of(pid)
        world.frontend.write_status(world.frontend._status)
    world.wait(lambda: world.driver.needs_reset)
    fault = world.device.fault
    assert isinstance(fault, DriverError)
    assert (fault.queue, fault.section) == ("tx1", "2.7.13.3")
    assert "went 28672 entries ahead" in fault.reason
    assert os.eventfd_read(event) == 2, "once for each ring that was told where"
    world.quiet(0.1)
    assert world.pids == [], "a device that needs a reset has nothing to lend"
    world.driver.restart()
    world.lend()
    world.works()
    assert world.device.stats["driver_errors"] == 1


def test_a_guest_that_breaks_rules_has_no_processes_made_in_a_row(stack: ExitStack) -> None:
    """Defect: with each reset of its device another, which logged the guest's fault once more."""
    world = World(stack)
    forks: list[float] = []
    fork = world.processes._fork

    def note(queues: Collection[int]) -> None:
        forks.append(time.monotonic())
        fork(queues)

    world.processes._fork = note
    world.lend()
    for _ in range(2):
        break_a_rule(world, 3)
        world.wait(lambda: world.driver.needs_reset)
        world.driver.restart()
        world.works()
        world.lend()
    assert len(forks) >= 2
    assert all(later - earlier >= RETRY_SECONDS for earlier, later in pairwise(forks[-2:]))


def wait_for_the_end_of(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_faults_of_two_processes_that_come_home_at_once(stack: ExitStack) -> None:
    """Defect: the first fault recalled the second process while all were being recalled, which
    then was asked for its queues once more.
    """
    world = World(stack, pairs=3)
    pids = world.lend()
    for queue in (3, 5):
        break_a_rule(world, queue)
    for pid in pids:
        wait_for_the_end_of(pid)
    world.processes.recall_all()  # as a message of the frontend's does
    assert all(map(is_gone, pids))
    world.wait(lambda: world.driver.needs_reset)
    world.driver.restart()
    world.lend()
    world.works()


def test_a_model_that_fails_in_another_process_needs_a_reset(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(stack)
    pid = os.getpid()
    write = SocketPort.write_burst

    def fail(port: SocketPort, frames: Sequence[Frame]) -> int:
        if os.getpid() != pid:
            raise KeyError("a fault of ours")
        return write(port, frames)

    monkeypatch.setattr(SocketPort, "write_burst", fail)
    world.lend()
    world.send(1, pair=1)
    world.wait(lambda: world.driver.needs_reset)
    assert str(world.device.fault) == "KeyError: 'a fault of ours'"
    monkeypatch.undo()
    world.driver.restart()
    world.lend()
    world.works()


def test_a_frame_longer_than_expected_comes_with_the_next_process(stack: ExitStack) -> None:
    world = World(stack)
    for port in world.link.ports:
        port.longest = 100
    (pid,) = world.lend()
    began = time.monotonic()
    world.feed(frame_of(1) + bytes(1000), 2, pair=1)
    world.wait(lambda: world.link.looks)
    assert is_gone(pid)
    world.wait_received(2)
    world.feed(frame_of(3) + bytes(1000), pair=1)
    world.wait_received(3)
    world.lend()
    assert time.monotonic() - began >= RETRY_SECONDS
    world.feed(frame_of(4) + bytes(1000), pair=1)
    world.wait_received(4)
    assert world.link.looks == 1


def test_a_link_that_cannot_be_looked_at_is_no_end(stack: ExitStack) -> None:
    """Defect: the tap was deleted, another process gave its queues back, and to look at the tap
    raised what ended the service.
    """

    class Gone(SocketLink):
        def look_again(self) -> None:
            raise OSError("the tap is gone")

    world = World(stack, link=Gone(2))
    for port in world.link.ports:
        port.longest = 100
    world.lend()
    world.feed(frame_of(1) + bytes(1000), 2, pair=1)
    world.wait_received(2)
    world.works()


@pytest.mark.parametrize("known_down", [False, True])
def test_a_port_that_breaks_in_another_process_is_found_broken_here(
    stack: ExitStack, known_down: bool
) -> None:
    """Defect: where the guest had been told that its cable is out already, nobody heard of it, and
    the other process looked after the link, which is not its own.
    """
    world = World(stack)
    world.lend()
    if known_down:
        world.device.set_link_up(False)
        world.settle()
        world.lend_now()
    recovered: list[int] = []
    world.link.recover = lambda: recovered.append(os.getpid())
    world.link.ports[1].host.close()
    world.link.ports[1].socket.shutdown(socket.SHUT_RDWR)
    world.send(1, pair=1)
    world.wait(lambda: 1 in world.device._broken)
    assert not world.driver.settings.link_up
    world.wait(lambda: recovered)
    assert recovered == [os.getpid()]
    world.works(0)


# --- ends ----------------------------------------------------------------------------------------


def in_order(numbers: Sequence[int], *, doubled: bool) -> list[int]:
    """The numbers without those that came before already; where one comes again, those behind it
    do, up to where it stopped."""
    if not doubled:
        return list(numbers)
    found: list[int] = []
    for number in numbers:
        if not found or number > found[-1]:
            found.append(number)
    return found


@pytest.mark.parametrize("notes", [True, False], ids=["inflight notes", "no notes"])
def test_a_process_that_is_killed_under_traffic_loses_nothing(
    stack: ExitStack, notes: bool
) -> None:
    protocol = -1 if notes else ~(1 << ProtocolFeature.INFLIGHT_SHMFD)
    world = World(stack, protocol=protocol)
    rng = random.Random(3)
    sent: list[int] = []
    number = 0
    for kill in range(5):
        (pid,) = world.lend()
        until = time.monotonic() + rng.random() / 20
        while time.monotonic() < until:
            burst = [(PLAIN_HEADER, frame_of(number + index)) for index in range(32)]
            number += world.driver.send_burst(burst, pair=1)
            sent += world.sent(1)
            world.frontend.poll()
        began = time.monotonic()
        world.kill(pid)
        assert world.driver.wait_sent(1), f"kill {kill}"
        sent += world.sent(1)
        world.works()
        assert world.pids == [], "not so soon after that"
    world.lend()
    assert time.monotonic() - began >= RETRY_SECONDS
    assert in_order(sent, doubled=True) == list(range(number))
    assert not world.device.stats["driver_errors"]


@pytest.mark.parametrize("what", ["tx", "rx"])
def test_the_call_of_a_process_that_is_killed_before_it_makes_it_is_made(
    stack: ExitStack, what: str
) -> None:
    """Defect: the driver waited for a call that had died with the process."""
    world = World(stack)
    pid, call = os.getpid(), world.device.on_queue_call
    assert call is not None

    def die(index: int) -> None:
        if os.getpid() != pid:
            os.kill(os.getpid(), signal.SIGKILL)
        call(index)

    world.device.on_queue_call = die
    world.lend()
    if what == "rx":
        world.feed(1, pair=1)
        world.wait_received(1)
    else:
        queue = world.driver._transmit[1]
        world.driver.send(frame_of(1), pair=1)
        assert not queue.ring.enable_calls()
        world.wait(lambda: queue.index in world.driver._called)
    world.device.on_queue_call = call


def test_one_that_does_not_answer_is_done_without(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_process, "PATIENCE", 0.2)
    world = World(stack)
    (pid,) = world.lend()
    world.send(1, pair=1)
    world.wait_sent(1, pair=1)
    assert world.driver.wait_sent(1)
    os.kill(pid, signal.SIGSTOP)
    world.send(2, pair=1)
    world.feed(3, pair=1)
    assert world.driver.set_mac(OTHER)
    assert is_gone(pid)
    world.wait_sent(2, pair=1)
    world.wait_received(3)
    world.lend()
    world.works()


def test_where_there_can_be_no_process_all_goes_on_without(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Defect: it was tried again twenty times a second, and said as often."""
    tried: list[float] = []

    def refuse() -> int:
        tried.append(time.monotonic())
        raise BlockingIOError("too many processes")

    world = World(stack)
    world.settle()
    monkeypatch.setattr(os, "fork", refuse)
    world.lend_now()
    world.works()
    world.quiet(0.3)
    assert len(tried) == 1 and "no process for 2 queues: too many processes" in caplog.text
    world.wait(lambda: len(tried) == 2)
    assert tried[1] - tried[0] >= RETRY_SECONDS
    monkeypatch.undo()
    world.lend()
    world.works()


def test_notes_that_a_frontend_spoils_are_the_end_of_its_device_alone(stack: ExitStack) -> None:
    """Defect: when queues came home without a message that could be refused that was an error out
    of the event loop, and the end of the service.
    """
    world = World(stack)
    (pid,) = world.lend()
    world.send(1, pair=1)
    world.wait_sent(1, pair=1)
    inflight = world.connections[-1].backend._inflight
    assert inflight is not None
    inflight.region.view[:] = b"\xff" * inflight.region.size
    world.kill(pid)
    assert isinstance(world.device.fault, VqError)
    assert world.device.status & Status.NEEDS_RESET
    world.quiet(0.1)
    assert world.pids == []
    world.frontend.disconnect()
    world.turn()
    world.frontend._forget_inflight()
    world.frontend.reconnect(world.connect())
    world.driver.restart()
    world.lend()
    world.works()


# --- who has what --------------------------------------------------------------------------------


def test_a_pair_goes_as_a_whole(stack: ExitStack) -> None:
    """Defect: the transmit queue alone was lent where the receive queue was not ready yet; then two
    processes used one port, whose io_uring is one process's at a time.
    """
    world = World(stack)
    world.frontend.enable(2, False)
    world.quiet(0.2)
    assert world.pids == []
    world.frontend.enable(2, True)
    world.lend()
    world.works()


def test_pairs_without_a_port_of_their_own_keep_all_at_home(stack: ExitStack) -> None:
    """What the third of them sends leaves by the first port, the fourth's by the second."""
    world = World(stack, pairs=4, processes=2, link=SocketLink(2))
    world.quiet(0.2)
    assert world.pids == []
    world.works(0, 1)


def test_a_link_whose_ports_share_something_keeps_all_at_home(stack: ExitStack) -> None:
    link = SocketLink(2)
    link.ports_are_apart = False
    world = World(stack, link=link)
    world.quiet(0.2)
    assert world.pids == []


def test_while_there_are_threads_there_is_no_fork(stack: ExitStack) -> None:
    world = World(stack)
    world.settle()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        world.lend_now()
        assert world.pids == []
    finally:
        end.set()
        thread.join()
    world.lend()


POLLER = "anon_inode:[eventpoll]"


def open_files(pid: int) -> list[str]:
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return links


def test_another_process_has_none_of_the_services_sockets(stack: ExitStack) -> None:
    """Nor its event loop: what it says to a frontend, or hears from it, is the first one's."""
    world = World(stack)
    backend = world.connections[-1].backend
    assert backend._channel is not None
    sockets = [world.connections[-1]._socket, backend._channel._socket]
    names = {os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in sockets}
    (pid,) = world.lend()
    world.works()
    assert not names & set(open_files(pid))
    assert open_files(pid).count(POLLER) == open_files(os.getpid()).count(POLLER), "its own alone"


def test_processes_have_nothing_of_each_other(stack: ExitStack) -> None:
    """Defect: a later one had the ends of sockets and pipes by which this one asks and ends an
    earlier one.
    """
    world = World(stack, pairs=3)
    pids = world.lend()
    world.works()
    ours = {
        os.readlink(f"/proc/self/fd/{fd}")
        for process in world.processes._processes
        for fd in (process._socket.fileno(), *process._switch._pipe)
    }
    assert len(ours) == 4
    for pid in pids:
        assert not ours & set(open_files(pid))


class HiddenControl(VhostFrontend):
    """A frontend that serves the control queue itself, as QEMU does."""

    def accept_features(self, mask: int, /) -> None:
        super().accept_features(mask & ~(1 << NetFeature.CTRL_VQ))

    def setup_queue(self, index: int, /, **places: int) -> None:
        if index != self.queue_count - 1:
            super().setup_queue(index, **places)


class DriverBehindIt(NetDriver):
    def set_queue_pairs(self, count: int) -> bool:
        transport = self.driver.transport
        assert isinstance(transport, HiddenControl)
        for index in range(2 * len(self._receive)):
            transport.enable(index, index < 2 * count)
        self.pairs = count
        return True


def test_pairs_of_a_frontend_that_keeps_the_control_queue_to_itself(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apart_world.VhostFrontend", HiddenControl)
    monkeypatch.setattr("apart_world.NetDriver", DriverBehindIt)
    world = World(stack, pairs=3)
    for pairs in (3, 2, 1, 3):
        assert world.driver.set_queue_pairs(pairs)
        world.lend(pairs - 1)
        assert world.link.active == pairs, "what is lent is in use"
        world.works()
    assert len(world.pids) == 2


def test_a_pair_that_is_not_in_use_any_more_comes_home(stack: ExitStack) -> None:
    """Defect: a control queue that was enabled late says which pairs are in use, and the processes
    of others were forgotten.
    """
    world = World(stack)
    control = 4
    assert world.driver.set_queue_pairs(1)
    world.frontend.enable(control, False)  # as if there were none: what is set up is in use
    world.lend_now()
    assert len(world.pids) == 1
    world.frontend.enable(control, True)
    world.wait(lambda: not world.pids)
    assert world.driver.set_queue_pairs(2)
    world.lend()
    world.works()


# --- options of the device -----------------------------------------------------------------------


def test_a_locked_mac_is_locked_in_every_process(stack: ExitStack) -> None:
    world = World(stack, lock_mac=True)
    world.lend()
    world.send(1, pair=1, source=OTHER)
    world.send(2, pair=1)
    world.wait_sent(2, pair=1)
    world.feed(frame_of(3, to=OTHER), frame_of(4, to=GUEST_MAC), pair=1)
    world.wait_received(4)
    world.settle()
    assert world.device.stats["tx_dropped: source address"] == 1, world.device.stats


def test_dhcp_is_answered_on_the_pair_that_asked(stack: ExitStack) -> None:
    dhcp = LocalDhcp(GUEST_MAC, "100.64.1.3", "100.64.1.2")
    world = World(stack, responders=[dhcp.answer])
    world.lend()
    asked = request(kind(DISCOVER), chaddr=GUEST_MAC, smac=GUEST_MAC)
    world.driver.send(asked, pair=1)
    world.wait(lambda: world.memory.load16(world.frontend._vrings[2].used + 2) == 1)
    (answer,) = world.driver.receive()
    assert Reply(answer.data).target in (b"\xff" * 4, bytes((100, 64, 1, 3)))
    assert world.sent(1) == []
    world.settle()
    assert world.device.stats["tx_answered"] == 1
