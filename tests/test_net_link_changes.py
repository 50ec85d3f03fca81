"""`vq.net` over links whose descriptors and ports come and go, polled by an event loop."""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from vq import stream
from vq.abi import Feature, NetFeature, Status, feature_mask
from vq.device import Device, Watch
from vq.link import Frame, Link, LoopbackLink, Port, Room
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import DEFAULT_MAC, NetDevice
from vq.net_driver import NetDriver, NetHeader
from vq.offload import Offload
from vq.pcap import read_frames
from vq.pcap_link import CaptureLink
from vq.stream import StreamLink
from vq.vhost_user import unwatch_device, watch_device

PLAIN = bytes(12)


class Poller:
    """An event loop that keeps to what `Watch` and `Device.watches` promise, and checks it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.selector = selectors.DefaultSelector()
        self.wakeups = 0
        device.on_watches_change = self.attach
        self.attach()

    def attach(self) -> None:
        for watch in self.device.watches:
            watch.on_change = self.apply
            self.apply(watch)

    def apply(self, watch: Watch) -> None:
        os.fstat(watch.fd)  # it is open, whatever changes
        polled = self.selector.get_map().get(watch.fd)
        wanted = selectors.EVENT_READ * watch.reading | selectors.EVENT_WRITE * watch.writing
        assert polled is None or polled.data is watch, "two watches of one descriptor"
        if polled is not None:
            self.selector.unregister(watch.fd)
        if wanted:
            self.selector.register(watch.fd, wanted, watch)

    @property
    def polled(self) -> set[int]:
        return {key.fd for key in self.selector.get_map().values()}

    def turn(self, timeout: float = 0.0) -> int:
        ready = self.selector.select(timeout)
        self.wakeups += len(ready)
        for key, events in ready:
            watch: Watch = key.data
            if events & selectors.EVENT_READ and watch.reading:
                watch.readable()
            if events & selectors.EVENT_WRITE and watch.writing:
                watch.writable()
        return len(ready)

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline, "it did not come"
            self.turn(0.01)

    def quiet(self) -> bool:
        """Whether the loop sleeps: a descriptor that nobody serves would wake it every time."""
        return sum(self.turn(0.01) for _ in range(10)) <= 1

    def close(self) -> None:
        self.device.close()
        assert not self.polled
        self.selector.close()


class Guest:
    """A scripted guest on a link, and the loop that its device is in."""

    def __init__(self, link: Link, *, pairs: int = 1, queue_pairs: int = 1) -> None:
        self.memory = GuestMemory.allocate(32 << 20)
        self.device = NetDevice(link, memory=self.memory, queue_pairs=queue_pairs)
        self.poller = Poller(self.device)
        self.driver = NetDriver(self.device, self.memory, pairs=pairs)
        self.frames: list[bytes] = []

    @property
    def up(self) -> bool:
        return self.driver.settings.link_up

    def hear(self) -> list[bytes]:
        self.frames += [frame.data for frame in self.driver.receive()]
        return self.frames

    def close(self) -> None:
        self.driver.close()
        self.poller.close()
        self.memory.close()


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dh-") as name:
        yield Path(name)


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(5)
    peer.connect(str(path))
    return peer


def wire(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def take(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        assert piece
        data += piece
    return data


# --- a server whose peers come and go ------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
def test_a_peer_that_comes_goes_and_comes_again(place: Path, recorded: bool) -> None:
    link: Link = StreamLink.listen(str(place / "s"))
    if recorded:
        link = CaptureLink(link, place / "c.pcapng")
    with closing(Guest(link)) as guest:
        (listening,) = guest.poller.polled
        assert not guest.up
        assert guest.poller.quiet()
        for number in (1, 2, 3):
            guest.driver.send(bytes(60))  # nobody is there
            with connect(place / "s") as peer:
                guest.poller.until(lambda: guest.up)
                assert listening not in guest.poller.polled
                peer.sendall(wire(bytes([number]) * 60) + wire(bytes([number]) * 1000))
                guest.poller.until(lambda n=number: len(guest.hear()) == 2 * n)  # type: ignore[misc]
                assert {frame[0] for frame in guest.frames[-2:]} == {number}
                assert guest.driver.send(bytes([number]) * 70)
                assert take(peer, 74) == wire(bytes([number]) * 70)
                assert guest.poller.quiet()
            guest.poller.until(lambda: not guest.up)
            assert guest.poller.polled == {listening}
            assert guest.poller.quiet()
        assert link.ports[0].dropped == {"not connected": 3}
        assert not guest.driver.needs_reset
    if recorded:
        assert len(list(read_frames(place / "c.pcapng"))) == 3 * 4


def test_a_peer_may_come_while_the_guest_sends(place: Path) -> None:
    """The connection is then taken up in the middle of a burst."""
    with closing(Guest(StreamLink.listen(str(place / "s")))) as guest, connect(place / "s") as peer:
        assert guest.driver.send(b"\7" * 60)
        assert take(peer, 64) == wire(b"\7" * 60)
        assert guest.up
        peer.sendall(wire(b"\5" * 60))
        guest.poller.until(lambda: guest.hear())


def test_frames_that_waited_for_a_peer_that_went_do_not_wait_for_ever(place: Path) -> None:
    with closing(Guest(StreamLink.listen(str(place / "s")))) as guest:
        peer = connect(place / "s")
        guest.poller.until(lambda: guest.up)
        sent = 0
        while guest.driver.send(b"\1" * 1500):  # until the socket and then the queue are full
            sent += 1
        assert guest.driver.reap() == 0
        watch = guest.device.watches[0]
        assert watch.writing
        peer.close()
        guest.poller.until(lambda: not guest.up)
        assert guest.poller.quiet()
        guest.poller.until(guest.driver.reap)
        with connect(place / "s") as peer:
            guest.poller.until(lambda: guest.up)
            assert guest.driver.send(b"\2" * 60)
            assert take(peer, 64) == wire(b"\2" * 60)  # nothing of what was meant for the other


def test_a_reset_does_not_pull_the_cable(place: Path) -> None:
    """What the configuration said when the device was made holds no more."""
    with closing(Guest(StreamLink.listen(str(place / "s")))) as guest:
        assert not guest.up
        with connect(place / "s") as peer:
            guest.poller.until(lambda: guest.up)
            guest.driver.restart()
            assert guest.up
            peer.sendall(wire(b"\5" * 60))
            guest.poller.until(lambda: guest.hear())
        guest.poller.until(lambda: not guest.up)
        guest.driver.restart()
        assert not guest.up
        guest.device.set_link_up(True)
        guest.driver.restart()
        assert guest.up


def test_peers_that_only_knock_do_no_harm(place: Path) -> None:
    with closing(Guest(StreamLink.listen(str(place / "s")))) as guest:
        for _ in range(30):
            for peer in [connect(place / "s") for _ in range(1)]:
                peer.close()
            guest.poller.turn(0.01)
        guest.poller.until(lambda: not guest.up and guest.poller.quiet())
        assert not guest.driver.needs_reset
        with connect(place / "s") as peer:
            peer.sendall(wire(b"\5" * 60))
            guest.poller.until(lambda: guest.hear())


def test_a_client_that_comes_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two connections there is no descriptor to poll at all."""
    monkeypatch.setattr(stream, "RETRY_SECONDS", 0.01)
    path = str(place / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(2)
        listener.settimeout(5)
        with closing(Guest(StreamLink.connect(path, reconnect=True))) as guest:
            for number in (1, 2):
                peer, _ = listener.accept()
                with peer:
                    assert guest.up
                    peer.sendall(wire(bytes([number]) * 60))
                    guest.poller.until(lambda n=number: len(guest.hear()) == n)  # type: ignore[misc]
                guest.poller.until(lambda: not guest.up)
                assert guest.device.watches == [] and not guest.poller.polled
                time.sleep(0.02)
                guest.driver.send(bytes(60))  # the next try
                assert guest.up
            assert not guest.driver.needs_reset


def test_a_connection_that_ends_for_good_is_a_cable_that_is_out() -> None:
    ours, theirs = socket.socketpair()
    with closing(Guest(StreamLink(ours))) as guest:
        assert guest.up
        theirs.sendall(wire(b"\5" * 60))
        theirs.close()
        guest.poller.until(lambda: guest.hear())
        guest.poller.until(lambda: not guest.up)
        assert not guest.poller.polled
        assert guest.driver.send(bytes(60))
        guest.driver.restart()
        assert not guest.up and not guest.driver.needs_reset


def test_the_loop_of_vq_follows(place: Path) -> None:
    memory = GuestMemory.allocate(32 << 20)
    device = NetDevice(StreamLink.listen(str(place / "s")), memory=memory)
    loop = Loop()
    watch_device(device, loop)
    driver = NetDriver(device, memory)
    for number in (1, 2):
        with connect(place / "s") as peer:
            peer.sendall(wire(bytes([number]) * 60))
            frames: list[bytes] = []
            deadline = time.monotonic() + 10
            while not frames:
                assert time.monotonic() < deadline
                loop.run_once(0.05)
                frames = [frame.data for frame in driver.receive()]
            assert frames == [bytes([number]) * 60]
    unwatch_device(device, loop)
    assert device.on_watches_change is None
    driver.close()
    device.close()
    loop.close()
    memory.close()


# --- ports in use and not in use -----------------------------------------------------------------


class Pipe(Port):
    """A port on a socket pair, of datagrams."""

    def __init__(self) -> None:
        super().__init__()
        self.socket, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)

    def fileno(self) -> int:
        return self.socket.fileno()

    def write_burst(self, frames: Sequence[Frame]) -> int:
        for frame in frames:
            self.socket.sendmsg(frame[1:])
        return len(frames)

    def read_burst(self, room: Room, limit: int) -> int:
        moved = 0
        while moved < limit and (views := room.views()):
            try:
                length = self.socket.recv_into(views[0])
            except BlockingIOError:
                break
            room.commit(PLAIN, length)
            moved += 1
        return moved


class Pipes(Link):
    """A link of several ports that writes down which are in use."""

    name = "pipes"
    accepts = delivers = Offload.NONE

    def __init__(self, count: int) -> None:
        self.pipes = [Pipe() for _ in range(count)]
        self.ports = self.pipes
        self.active: list[int] = []

    def activate_ports(self, count: int) -> None:
        if self.active[-1:] != [count]:
            self.active.append(count)

    def fds(self, count: int) -> set[int]:
        return {pipe.fileno() for pipe in self.pipes[:count]}

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.socket.close()
            pipe.far.close()


def test_only_ports_of_active_pairs_are_polled() -> None:
    link = Pipes(3)
    with closing(Guest(link, pairs=3, queue_pairs=3)) as guest:
        assert guest.poller.polled == link.fds(3)
        for count in (1, 2, 1, 3):
            assert guest.driver.set_queue_pairs(count)
            assert guest.poller.polled == link.fds(count)
            assert link.active[-1] == count
            for pipe in link.pipes:
                pipe.far.send(bytes([count]) * 60)
            guest.poller.until(lambda n=count: len(guest.hear()) >= n)  # type: ignore[misc]
            assert guest.poller.quiet()
            guest.frames.clear()
            for pipe in link.pipes[count:]:
                pipe.socket.recv(100)
        guest.driver.driver.reset()
        assert guest.poller.polled == set()
        assert link.active[-1] == 1
        guest.driver.restart()


def test_a_queue_that_cannot_be_served_is_not_polled() -> None:
    """A device that needs a reset, or a ring that a transport has taken away."""
    link = Pipes(1)
    with closing(Guest(link)) as guest:
        link.pipes[0].far.send(b"\1" * 60)
        guest.poller.until(lambda: guest.hear())
        guest.device.stop_queue(0)
        link.pipes[0].far.send(b"\2" * 60)
        assert guest.poller.quiet()
        guest.driver.restart()
        guest.poller.until(lambda: len(guest.hear()) == 2)
        guest.device.notify(0)
        guest.driver.send(b"", header=b"short")  # a frame without a whole header
        assert guest.driver.needs_reset
        link.pipes[0].far.send(b"\3" * 60)
        assert guest.poller.quiet()
        guest.driver.restart()
        guest.poller.until(lambda: len(guest.hear()) == 3)


def test_a_device_that_is_closed_asks_for_nothing_more() -> None:
    link = Pipes(2)
    guest = Guest(link, pairs=2, queue_pairs=2)
    assert guest.poller.polled == link.fds(2)
    guest.poller.close()
    guest.driver.close()
    guest.memory.close()


@pytest.mark.parametrize("up_first", [False, True], ids=["queues first", "DRIVER_OK first"])
def test_a_transport_that_hides_the_control_queue_activates_pairs_by_enabling_them(
    up_first: bool,
) -> None:
    link = Pipes(3)
    features = feature_mask((Feature.VERSION_1, NetFeature.CTRL_VQ, NetFeature.MQ))
    up = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    with GuestMemory.allocate(1 << 20) as memory:
        device = NetDevice(link, memory=memory, queue_pairs=3)
        poller = Poller(device)

        def set_up(index: int) -> None:
            base = index * 0x10000
            device.setup_queue(index, size=16, desc=base, avail=base + 0x1000, used=base + 0x2000)

        device.accept_features(features)
        device.write_status(up)
        if up_first:
            device.write_status(up | Status.DRIVER_OK)
        for index in range(4):
            set_up(index)
        if not up_first:
            device.write_status(up | Status.DRIVER_OK)
        assert link.active == [1, 2]
        set_up(4)
        assert link.active == [1, 2, 3]
        device.stop_queue(4)
        device.stop_queue(2)
        assert link.active == [1, 2, 3, 2, 1]
        device.reset()
        assert link.active[-1] == 1
        assert poller.polled == set()
        poller.close()


def no_tap() -> str | None:
    if sys.platform != "linux" or os.geteuid() or not os.path.exists("/dev/net/tun"):
        return "needs Linux, root and /dev/net/tun"
    return None if shutil.which("ip") else "needs ip(8)"


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"dhq{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=20)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=20)


@pytest.mark.skipif(no_tap() is not None, reason=no_tap() or "")
def test_queues_of_a_real_tap_that_are_detached_do_not_wake_the_loop(namespace: str) -> None:
    from vq.tap_linux import LinuxTap

    tap = LinuxTap("dhq%d", queues=3, namespace=namespace)
    with closing(Guest(tap, pairs=3, queue_pairs=3)) as guest:
        tap.set_up(True)
        fds = [port.fileno() for port in tap.ports]
        assert guest.poller.polled == set(fds)
        for count in (1, 3, 2):
            assert guest.driver.set_queue_pairs(count)
            assert guest.poller.polled == set(fds[:count])
            assert [port.active for port in tap.ports] == [index < count for index in range(3)]
            deadline = time.monotonic() + 10
            while not guest.poller.quiet():  # the kernel's own frames may come
                guest.hear()
                assert time.monotonic() < deadline
        burst = [(NetHeader(), bytes(60))] * 3
        assert guest.driver.send_burst(burst) == 3
        guest.driver.restart()
        assert guest.poller.quiet() or guest.hear()


def test_frames_that_wait_in_this_process_are_not_the_next_guests() -> None:
    """A frontend died while its guest's frames waited in the loopback link: the one that was
    waiting for its turn got them.
    """
    link = LoopbackLink()
    device = NetDevice(link, memory=(memory := GuestMemory.allocate(1 << 24)))
    guest = NetDriver(device, memory)
    link.ports[0].on_readable = None  # so that they wait
    guest.send(b"\xff" * 6 + DEFAULT_MAC + bytes(60))
    device.reset()
    assert device.stats["rx_dropped: guest gone"] == 1
    later = NetDriver(device, memory)
    assert later.receive() == []
