"""Faults of the host and of peers: nothing acknowledged is lost, the message is clear, it goes on.

Where the real fault can be had, it is the real one (a full file system, a tap that is deleted, a
peer that stops, a process out of descriptors); where not, a link or a system call is made to fail.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from net_world import OTHER_MAC, OUR_MAC, PLAIN, ScriptedLink, World
from vhost_frontend import REPLY_ACK, Frontend, GuestRing, Ram, Shouter, open_things, wait_until

from vq.abi import NetStatus
from vq.link import Frame, Port, Room
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NetDriver
from vq.pcap import read_frames
from vq.pcap_link import CaptureLink, PcapLink
from vq.stream import StreamLink
from vq.tap_linux_port import LinuxTapPort
from vq.vhost_user import Server, unwatch_device, watch_device

SHORT_CONNECTIONS = int(os.environ.get("VQ_SHORT_CONNECTIONS", "1500"))
"""10,000 and more by hand."""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        yield memory


def numbered(number: int, size: int = 60) -> bytes:
    """A frame that says which one it is."""
    return OUR_MAC + OTHER_MAC + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(size)


def number_of(frame: bytes) -> int:
    return int.from_bytes(frame[14:18], "big")


# --- storms ---------------------------------------------------------------------------------------


class StormyPort(Port):
    """A port that is full, or fails in passing, most of the time."""

    def __init__(self, inner: Port, chosen: random.Random) -> None:
        super().__init__()
        self._inner = inner
        self._chosen = chosen
        self.refusals = 0

    def write_burst(self, frames: Sequence[Frame]) -> int:
        if self._chosen.random() < 0.8:
            self.refusals += 1
            return 0
        return self._inner.write_burst(frames[: self._chosen.randrange(1, 4)])

    def read_burst(self, room: Room, limit: int) -> int:
        if self._chosen.random() < 0.8:
            self.refusals += 1
            return 0
        return self._inner.read_burst(room, min(limit, self._chosen.randrange(1, 4)))


def test_a_storm_of_full_and_empty_loses_nothing_and_keeps_the_order(memory: GuestMemory) -> None:
    """EAGAIN nearly always, in both directions, until all has come through."""
    link = ScriptedLink()
    inner = link.port
    storm = StormyPort(inner, random.Random(3))
    link.ports = [storm]  # type: ignore[assignment]
    world = World(memory, link)
    driver = world.drive(queue_size=64, receive_buffers=32)
    sent = received = 0
    for number in range(300):
        inner.incoming.append((PLAIN, numbered(number)))
    deadline = time.monotonic() + 30
    while len(inner.written) < 300 or received < 300:
        assert time.monotonic() < deadline
        while sent < 300 and driver.send(numbered(sent)):
            sent += 1
        assert storm.on_readable is not None and storm.on_writable is not None
        storm.on_writable()
        storm.on_readable()
        for frame in driver.receive():
            assert number_of(frame.data) == received
            received += 1
        driver.reap()
    assert [number_of(data) for data in inner.frames] == list(range(300))
    assert storm.refusals > 100 and world.device.fault is None and driver.unsent() == 0


class Refusing:
    """Stands for a method of a socket, or for a function of `os`; fails now and then."""

    def __init__(self, real: Callable[..., Any], number: int, chosen: random.Random) -> None:
        self._real = real
        self._number = number
        self._chosen = chosen
        self.refusals = 0

    def __call__(self, *args: Any) -> Any:
        if self._chosen.random() < 0.7:
            self.refusals += 1
            raise OSError(self._number, os.strerror(self._number))
        return self._real(*args)


class ShortOfMemory:
    """A connected socket whose kernel has no memory, most of the time."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        chosen = random.Random(5)
        self._sock = sock
        self.sendmsg = Refusing(sock.sendmsg, number, chosen)
        self.send = Refusing(sock.send, number, chosen)
        self.recv_into = Refusing(sock.recv_into, number, chosen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_a_kernel_short_of_memory_does_not_end_a_stream(memory: GuestMemory, number: int) -> None:
    """It was a link that broke: the guest had no network any more until the process was started
    again, for an error that passes."""
    ours, theirs = socket.socketpair()
    link = StreamLink(ours)
    short = ShortOfMemory(ours, number)
    link._connection = short  # type: ignore[assignment]
    theirs.setblocking(False)
    device = NetDevice(link, mac=OUR_MAC, memory=memory)
    driver = NetDriver(device, memory, timeout=1.0)
    (watch,) = device.watches
    got = b""
    sent = received = 0
    for index in range(100):
        theirs.send(struct.pack(">I", len(numbered(index))) + numbered(index))
    deadline = time.monotonic() + 30
    whole = b"".join(struct.pack(">I", len(numbered(n))) + numbered(n) for n in range(100))
    while len(got) < len(whole) or received < 100:
        assert time.monotonic() < deadline
        while sent < 100 and driver.send(numbered(sent)):
            sent += 1
        watch.writable()
        watch.readable()
        for frame in driver.receive():
            assert number_of(frame.data) == received
            received += 1
        with suppress(BlockingIOError):
            got += theirs.recv(1 << 16)
    assert got == whole
    assert short.sendmsg.refusals + short.recv_into.refusals > 10
    assert device.config_status & NetStatus.LINK_UP and not device.stats["tx_dropped: link gone"]
    device.close()
    theirs.close()


class OneRoom:
    """Room for one frame at a time, again and again."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._buffer = bytearray(2048)

    def views(self) -> Sequence[memoryview]:
        return [memoryview(self._buffer)]

    def commit(self, header: bytes, length: int) -> None:
        self.frames.append(bytes(self._buffer[:length]))


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_a_kernel_short_of_memory_does_not_end_a_tap(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A datagram socket stands for the tap: reading fails in passing, the frames come later."""
    kernel, ours = socket.socketpair(type=socket.SOCK_DGRAM)
    ours.setblocking(False)
    port = LinuxTapPort(ours.fileno(), lambda: None)
    for index in range(5):
        kernel.send(PLAIN + numbered(index))
    refusing = Refusing(os.readv, number, random.Random(4))
    monkeypatch.setattr("vq.tap_linux_port.os.readv", refusing)
    room = OneRoom()
    for _ in range(200):
        port.read_burst(room, 64)
    assert list(map(number_of, room.frames)) == list(range(5)) and refusing.refusals > 5
    kernel.close()
    ours.close()


def test_a_server_out_of_descriptors_takes_its_peer_later(
    memory: GuestMemory, tmp_path: Path
) -> None:
    """accept(2) fails with EMFILE, for real; the link broke for good at that."""
    link = StreamLink.listen(str(tmp_path / "s"))
    device = NetDevice(link, mac=OUR_MAC, memory=memory)
    driver = NetDriver(device, memory, timeout=1.0)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(tmp_path / "s"))
    (watch,) = device.watches
    with no_descriptors():
        for _ in range(3):
            watch.readable()
        assert not link.is_up
    watch.readable()
    assert link.is_up and device.config_status & NetStatus.LINK_UP
    peer.send(struct.pack(">I", 78) + numbered(1))
    (watch,) = device.watches
    watch.readable()
    assert [number_of(frame.data) for frame in driver.receive()] == [1]
    device.close()
    peer.close()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """As if this process had used up all it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_that_cannot_be_mapped_costs_the_connection_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process may not grow by the guest's 256 MiB, for real: mmap(2) gives ENOMEM."""
    loop, device, ram, large = Loop(), Shouter(), Ram(), Ram(256 << 20)
    server = Server(device, loop, tmp_path / "s")
    frontend = joined(loop, tmp_path / "s")
    frontend.negotiate()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    present = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (present + (128 << 20), hard))
    try:
        frontend.set_memory(large)
        assert frontend.is_dropped
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "Cannot allocate memory" in caplog.text
    frontend.close()
    frontend = joined(loop, tmp_path / "s")
    assert_served(frontend, ram)
    frontend.close()
    server.close()
    ram.close()
    large.close()
    loop.close()


def joined(loop: Loop, path: Path) -> Frontend:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return Frontend(loop, sock)


def assert_served(frontend: Frontend, ram: Ram) -> None:
    ram.bytes[0x10000:0x18000] = bytes(0x8000)
    frontend.negotiate(protocol=REPLY_ACK)
    frontend.set_memory(ram)
    ring = GuestRing(ram)
    frontend.start_ring(0, ring)
    ring.offer(b"still here")
    frontend.kick()
    assert ring.take() == [b"STILL HERE"]


# --- disks ----------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, mounted at `path`."""
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    done = subprocess.run(mounting, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        pytest.skip(f"this kernel has no file system for us to mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=10)


def test_a_capture_on_a_disk_that_gets_full_is_good_up_to_there_and_the_traffic_goes_on(
    memory: GuestMemory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        scripted = ScriptedLink()
        link = CaptureLink(scripted, disk / "all.pcapng")
        device = NetDevice(link, mac=OUR_MAC, memory=memory)
        driver = NetDriver(device, memory, timeout=1.0)
        for number in range(200):
            assert driver.send(numbered(number, 1000))
        assert len(scripted.port.written) == 200, "the traffic stopped with the disk"
        kept = [number_of(frame.data) for frame in read_frames(disk / "all.pcapng")]
        assert 20 < len(kept) < 200 and kept == list(range(len(kept)))
        (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert "not recorded any more" in line and "No space left" in line
        device.close()


def test_a_file_that_takes_frames_again_when_there_is_room_again(
    memory: GuestMemory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vq.pcap import PcapWriter

    with PcapWriter(tmp_path / "in.pcap") as writer:
        writer.write(numbered(0))
    with small_disk(tmp_path / "disk", 128 << 10) as disk:
        (disk / "ballast").write_bytes(bytes(64 << 10))
        link = PcapLink(tmp_path / "in.pcap", disk / "out.pcapng")
        device = NetDevice(link, mac=OUR_MAC, memory=memory)
        driver = NetDriver(device, memory, timeout=1.0)
        for number in range(100):
            assert driver.send(numbered(number, 1000))
        lost = link.ports[0].dropped["not written"]
        assert 20 < lost < 100
        (disk / "ballast").unlink()
        for number in range(100, 120):
            assert driver.send(numbered(number, 1000))
        device.close()
        kept = [number_of(frame.data) for frame in read_frames(disk / "out.pcapng")]
        assert len(kept) == 120 - lost and kept[-20:] == list(range(100, 120))
        assert caplog.text.count("frames cannot be written") == 1


# --- peers ----------------------------------------------------------------------------------------


def test_a_peer_that_stops_reading_holds_up_its_own_guest_only(memory: GuestMemory) -> None:
    """What waits for it is bounded; when it reads on, everything comes, in order."""
    loop = Loop()
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    device = NetDevice(StreamLink(ours), mac=OUR_MAC, memory=memory)
    watch_device(device, loop)
    driver = NetDriver(device, memory, timeout=1.0, queue_size=256)
    tracemalloc.start()
    sent = 0
    for _ in range(1000):
        while driver.send(numbered(sent, 500)) and sent < 5000:
            sent += 1
        loop.run_once(0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent < 600, "the guest is told nothing of a peer that does not read"
    assert len(device._backlogs[1]) <= 64 and most < 8 << 20

    with GuestMemory.allocate((0, 1 << 20)) as others:  # another guest of the process
        neighbour = World(others)
        assert neighbour.drive(receive_buffers=16).send(numbered(0))
        assert len(neighbour.link.port.written) == 1  # type: ignore[attr-defined]

    got = b""
    whole = sum(4 + len(numbered(0, 500)) for _ in range(sent))
    deadline = time.monotonic() + 20
    while len(got) < whole:
        assert time.monotonic() < deadline
        with suppress(BlockingIOError):
            got += theirs.recv(1 << 16)
        loop.run_once(0)
        driver.reap()
    size = 4 + len(numbered(0, 500))
    numbers = [number_of(got[at + 4 : at + size]) for at in range(0, whole, size)]
    assert numbers == list(range(sent)) and driver.unsent() == 0
    unwatch_device(device, loop)
    device.close()
    theirs.close()
    loop.close()


def test_connections_by_the_thousand_leave_nothing_behind(tmp_path: Path) -> None:
    """Some say nothing, some hang up in a message, some get as far as a running ring."""
    loop, device, ram = Loop(), Shouter(), Ram()
    server = Server(device, loop, tmp_path / "s")

    def come_and_go(number: int) -> None:
        frontend = joined(loop, tmp_path / "s")
        if number % 4 == 1:
            frontend.send_raw(b"\x01\0\0", [ram.fd])
        elif number % 4 == 2:
            frontend.send(
                5, struct.pack("=2I", 1, 0) + struct.pack("=4Q", *ram.describe()), [ram.fd]
            )
        elif number % 4 == 3 and number % 16 == 3:
            assert_served(frontend, ram)
        frontend.turn(2)
        frontend.close()
        wait_until(loop, lambda: server.connection is None)

    for number in range(100):
        come_and_go(number)
    things = open_things()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(SHORT_CONNECTIONS):
        come_and_go(number)
    open_things()  # collects cycles
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert open_things() == things
    assert after - before < 200_000, f"{after - before} bytes are kept"
    assert server.connections == 100 + SHORT_CONNECTIONS
    assert len(loop._timers) + len(loop._soon) < 4
    server.close()
    ram.close()
    loop.close()


# --- the clock ------------------------------------------------------------------------------------


def test_timers_do_not_care_what_time_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps by years in both directions while timers run."""
    loop, fired = Loop(), list[str]()
    chosen = random.Random(2)
    monkeypatch.setattr(time, "time", lambda: chosen.choice((0.0, 4e9)))
    monkeypatch.setattr(time, "time_ns", lambda: chosen.choice((0, 4 * 10**18)))
    started = time.monotonic()
    loop.call_later(0.05, partial(fired.append, "late"))
    loop.call_later(0.01, partial(fired.append, "early"))
    while len(fired) < 2:
        loop.run_once(1)
        assert time.monotonic() - started < 5
    assert fired == ["early", "late"] and time.monotonic() - started >= 0.05
    loop.close()


def test_only_captures_and_recordings_know_the_wall_clock() -> None:
    import vq

    package = Path(vq.__file__).parent
    users = {
        path.name
        for path in package.rglob("*.py")
        if "testing" not in path.parts
        and "bench" not in path.parts
        and any(word in path.read_text() for word in ("time.time(", "time_ns(", "datetime"))
    }
    assert users == {"pcap.py", "recorder.py"}


def test_a_capture_whose_clock_jumps_back_is_a_good_capture(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((2 * 10**18, 10**9, 10**18))
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    with closing(CaptureLink(ScriptedLink(), tmp_path / "c.pcapng")) as link:
        for number in range(3):
            assert link.ports[0].write_burst([[PLAIN, numbered(number)]]) == 1
    kept = list(read_frames(tmp_path / "c.pcapng"))
    assert [number_of(frame.data) for frame in kept] == [0, 1, 2]
    assert [frame.timestamp_ns for frame in kept] == [2 * 10**18, 10**9, 10**18]
