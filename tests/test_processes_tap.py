"""Queue pairs of a real tap in other processes: its queues, and their io_uring."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from apart_world import World, flow_frame, frame_of, is_gone, number_of, packet_socket

from vq.net_driver import PLAIN_HEADER
from vq.tap_linux import LinuxTap
from vq.testing.requirements import need_namespaces, need_root, need_tap

pytestmark = pytest.mark.usefixtures("quick_collector")

_numbers = itertools.count()
RING = "anon_inode:[io_uring]"


class TapWorld(World):
    """The host is a packet socket on the tap."""

    def __init__(self, stack: ExitStack, namespace: str, *, pairs: int = 2) -> None:
        tap = LinuxTap("apt%d", queues=pairs, namespace=namespace)
        super().__init__(stack, pairs=pairs, link=tap)
        self.tap = tap
        self.host = self.open_host(namespace)
        stack.callback(lambda: self.host.close())

    def open_host(self, namespace: str) -> socket.socket:
        self.tap.set_up(True)
        return packet_socket(namespace, self.tap.name)

    def sent(self, pair: int = 0) -> list[int]:
        """What has come out, of all pairs."""
        numbers = []
        with suppress(BlockingIOError):
            while True:
                data, (_, _, kind, *_) = self.host.recvfrom(2048)
                if kind != socket.PACKET_OUTGOING:
                    numbers.append(number_of(data))
        return numbers

    def feed_flows(self, count: int, *, longer: int = 0, lengthen: int = 0) -> list[bytes]:
        """Frames of flows that the kernel spreads over the queues, one each; so many bytes longer
        than need be, and each so many more than the one before it."""
        frames = [flow_frame(n, longer=longer + n * lengthen) for n in range(count)]
        for frame in frames:
            self.host.sendto(frame, (self.tap.name, 0x0800))
        return frames

    def received_flows(self) -> list[bytes]:
        frames = (frame.data for frame in self.driver.receive())
        return [data for data in frames if data[12:14] == b"\x08\0"]

    def used(self, queue: int) -> int:
        return self.memory.load16(self.frontend._vrings[queue].used + 2)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def namespace() -> Iterator[str]:
    need_root()
    need_tap()
    need_namespaces()
    name = f"apt{os.getpid()}n{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=20)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=20)


def test_frames_pass_both_ways_through_two_processes(stack: ExitStack, namespace: str) -> None:
    world = TapWorld(stack, namespace)
    (pid,) = world.lend()
    for pair in (1, 0, 1):
        found: list[int] = []
        numbers = range(500)
        for first in range(0, 500, 50):
            burst = [(PLAIN_HEADER, frame_of(number)) for number in numbers[first : first + 50]]
            assert world.driver.send_burst(burst, pair=pair) == 50
            assert world.driver.wait_sent(pair)
        world.wait(lambda: found.extend(world.sent()) or len(found) >= 500)  # noqa: B023
        assert found == list(numbers)
    before = world.used(0), world.used(2)
    frames = world.feed_flows(64)
    got: list[bytes] = []
    world.wait(lambda: got.extend(f.data for f in world.driver.receive()) or len(got) >= 64)
    assert sorted(got) == sorted(frames)
    assert world.used(0) > before[0] and world.used(2) > before[1], "both queues had some"
    assert world.pids == [pid]


def test_queues_are_attached_as_pairs_are_in_use(stack: ExitStack, namespace: str) -> None:
    """A detached queue answers a read with an error, and so does attaching one twice."""
    world = TapWorld(stack, namespace, pairs=3)
    for pairs in (1, 3, 2, 3):
        assert world.driver.set_queue_pairs(pairs)
        world.lend(pairs - 1)
        assert [port.active for port in world.tap.ports] == [n < pairs for n in range(3)]
        for pair in range(pairs):
            world.send(pair, pair=pair)
            found: list[int] = []
            world.wait(lambda: found.extend(world.sent()) or found)  # noqa: B023
            assert found == [pair]
    assert not world.device.stats["tx_dropped: link gone"]


def test_another_process_has_no_io_uring_but_that_of_its_own_port(
    stack: ExitStack, namespace: str
) -> None:
    """Defect: it had all of them. Whoever writes into the entries of one has the kernel read frames
    to where they say, in the memory of the process that submits them.
    """
    world = TapWorld(stack, namespace, pairs=3)
    if world.tap.ports[0].outbox is None:
        pytest.skip("this kernel has no io_uring")
    pids = world.lend()
    for pair in range(3):  # so they have begun
        world.send(pair, pair=pair)
    found: list[int] = []
    world.wait(lambda: found.extend(world.sent()) or len(found) == 3)
    for pid in pids:
        assert mappings(pid, RING) * 3 == mappings(os.getpid(), RING)
        assert mappings(pid, "vq-slab") * 3 == mappings(os.getpid(), "vq-slab")
        assert files(pid, RING) * 3 == files(os.getpid(), RING) == 3
    world.settle()
    for pair in range(3):  # nor was any taken from this one
        world.send(pair, 10 + pair, pair=pair)
    world.wait(lambda: found.extend(world.sent()) or len(found) == 9)
    assert all(port.outbox is not None for port in world.tap.ports)


def mappings(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        return sum(name in line for line in maps)


def files(pid: int, name: str) -> int:
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/{pid}/fd/{fd}") == name
    return count


def test_frames_are_themselves_after_a_process_died_in_the_middle_of_them(
    stack: ExitStack, namespace: str
) -> None:
    """Defect: results of requests that a dead process had not collected were taken for those of
    the next, for ever after: frames had the lengths of others.
    """
    world = TapWorld(stack, namespace)
    rng = random.Random(7)
    number = 0
    for kill in range(8):
        (pid,) = world.lend()
        sent: list[int] = []
        first, until = number, time.monotonic() + rng.random() / 20
        while time.monotonic() < until:
            burst = [(PLAIN_HEADER, frame_of(number + index)) for index in range(64)]
            number += world.driver.send_burst(burst, pair=1)
            world.feed_flows(4)
            sent += world.sent()
            world.driver.receive()
        os.kill(pid, signal.SIGKILL)
        world.wait(lambda: is_gone(pid) and pid not in world.pids)  # noqa: B023
        assert world.driver.wait_sent(1), f"kill {kill}"
        world.quiet(0.02)
        sent += world.sent()
        while world.driver.receive():  # else the kernel's queue may be full
            world.quiet(0.02)
        assert sorted(set(sent)) == list(range(first, number))
        frames = world.feed_flows(64, longer=100, lengthen=1)
        got: list[bytes] = []

        def all_came() -> bool:
            came = world.received_flows()
            got.extend(data for data in came if len(data) >= len(frames[0]))  # noqa: B023
            return len(got) >= 64  # noqa: B023

        world.wait(all_came)
        assert sorted(got) == sorted(frames)
        world.lend_now()
    assert not world.device.stats["driver_errors"]


def test_a_tap_that_is_deleted_and_made_again_serves_all_pairs_again(
    stack: ExitStack, namespace: str
) -> None:
    world = TapWorld(stack, namespace)
    world.lend()
    name = world.tap.name
    run = ["ip", "-n", namespace]
    subprocess.run([*run, "link", "del", name], check=True, timeout=20)
    world.send(1, pair=1)
    world.wait(lambda: not world.driver.settings.link_up)
    add = ["tuntap", "add", name, "mode", "tap", "multi_queue", "vnet_hdr"]
    subprocess.run([*run, *add], check=True, timeout=20)
    world.host.close()
    world.wait(lambda: not world.device._broken)
    world.host = world.open_host(namespace)
    world.lend()
    for pair in (1, 0):
        world.send(2, pair=pair)
        found: list[int] = []
        world.wait(lambda: found.extend(world.sent()) or found)  # noqa: B023
        assert found == [2]


def test_frames_longer_than_the_mtu_was_come_through_another_process(
    stack: ExitStack, namespace: str
) -> None:
    world = TapWorld(stack, namespace)
    world.driver.set_guest_offloads(0)
    world.lend()
    subprocess.run(
        ["ip", "-n", namespace, "link", "set", world.tap.name, "mtu", "9000"],
        check=True,
        timeout=20,
    )

    def all_come() -> bool:
        frames = world.feed_flows(64, longer=8000)
        got: list[bytes] = []
        until = time.monotonic() + 0.3
        while set(got) != set(frames) and time.monotonic() < until:
            world.turn()
            got += world.received_flows()
        return set(got) == set(frames)

    def all_come_for_good() -> bool:
        """Again and again: until it has found none once, a port reads frames of any length."""
        return len(world.pids) == 1 and all(all_come() and len(world.pids) == 1 for _ in range(4))

    before = world.used(2)
    world.wait(all_come_for_good)
    assert world.used(2) > before
