"""A network device some of whose queue pairs other processes serve, a driver, and a host."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from vhost_frontend import wait_until

from vq.abi import NET_HDR_SIZE
from vq.link import Frame, Link, Port, Room, scatter
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NET_DRIVER_FEATURES, NetDriver
from vq.offload import Offload
from vq.tap_linux import _in_namespace
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_processes import Apart
from vq.vhost_user import Connection, unwatch_device, watch_device

BROADCAST = b"\xff" * 6
GUEST_MAC = bytes.fromhex("fee1bad1bad1")
HEADER = bytes(NET_HDR_SIZE)
ETHERTYPE = 0x88B5


def frame_of(number: int, *, to: bytes = BROADCAST, source: bytes = GUEST_MAC) -> bytes:
    return to + source + b"\x88\xb5" + number.to_bytes(4) + bytes(46)


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18])


def flow_frame(number: int, *, longer: int = 0) -> bytes:
    """A frame of a flow of its own, so that a kernel has a reason to give it to another queue."""
    udp = struct.pack("!4H", 1000 + number, 9, 8 + 32, 0) + number.to_bytes(32)
    ip = struct.pack("!BBHHHBBH8x", 69, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    return GUEST_MAC + b"\2\0\0\0\0\1\x08\0" + ip + udp + bytes(longer)


def packet_socket(namespace: str, tap: str) -> socket.socket:
    """The host's end of a tap, for frames of ours."""

    def prepare() -> socket.socket:
        Path(f"/proc/sys/net/ipv6/conf/{tap}/disable_ipv6").write_text("1")
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))

    host = _in_namespace(namespace, prepare)
    host.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
    host.bind((tap, 0))
    host.setblocking(False)
    return host


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class SocketPort(Port):
    """A port whose frames are datagrams: two processes may have one each."""

    none_waits_inside = True
    used_elsewhere = 0

    def __init__(self) -> None:
        super().__init__()
        self.socket, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (self.socket, self.host):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.truncated: Callable[[], None] = lambda: None
        self.longest = 1 << 16

    def fileno(self) -> int:
        return self.socket.fileno()

    def was_used_elsewhere(self) -> None:
        self.used_elsewhere += 1

    def fill(self) -> None:
        """So that it takes no frame more."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        while True:
            try:
                self.socket.send(bytes(64))
            except BlockingIOError:
                return

    def write_burst(self, frames: Sequence[Frame]) -> int:
        for number, frame in enumerate(frames):
            try:
                self.socket.sendmsg(frame)
            except BlockingIOError:
                return number
        return len(frames)

    def read_burst(self, room: Room, limit: int) -> int:
        moved = 0
        while moved < limit and (views := room.views()):
            try:
                data = self.socket.recv(1 << 17)
            except BlockingIOError:
                break
            if not data:
                raise OSError("the port is gone")
            if len(data) > self.longest:
                self.truncated()
                continue
            scatter([data[NET_HDR_SIZE:]], views)
            room.commit(data[:NET_HDR_SIZE], len(data) - NET_HDR_SIZE)
            moved += 1
        return moved


class SocketLink(Link):
    """Notes what is asked of it, and in which process."""

    name = "sockets"
    accepts = Offload.NONE
    delivers = Offload.NONE
    ports_are_apart = True
    looks: ClassVar[int] = 0

    def __init__(self, ports: int) -> None:
        self.ports: Sequence[SocketPort] = [SocketPort() for _ in range(ports)]
        self.pid = os.getpid()
        self.active = ports
        self.on_activate: Callable[[], None] = lambda: None

    def request_offloads(self, wanted: Offload) -> None:
        assert os.getpid() == self.pid

    def activate_ports(self, count: int) -> None:
        assert os.getpid() == self.pid
        if count != self.active:
            self.on_activate()
        self.active = count

    def serve_apart(self, ports: Collection[int], on_truncated: Callable[[], None]) -> None:
        for index, port in enumerate(self.ports):
            if index in ports:
                port.truncated = on_truncated

    def look_again(self) -> None:
        self.looks += 1  # type: ignore[misc]
        for port in self.ports:
            port.longest = 1 << 16

    def close(self) -> None:
        for port in self.ports:
            port.socket.close()
            port.host.close()


class World:
    """All of it in this process, but for the queues that are lent."""

    def __init__(
        self,
        stack: ExitStack,
        *,
        pairs: int = 2,
        processes: int | None = None,
        features: int = NET_DRIVER_FEATURES,
        protocol: int = -1,
        link: Link | None = None,
        up: bool = True,
        loop: Loop | None = None,
        queue_size: int = 256,
        **device: Any,
    ) -> None:
        self.memory = stack.enter_context(GuestMemory.allocate(32 << 20))
        self.loop = loop or Loop()
        stack.callback(self.loop.close)
        self.link: Any = SocketLink(pairs) if link is None else link
        self.device = NetDevice(self.link, queue_pairs=pairs, queue_size=queue_size, **device)
        stack.callback(self.device.close)
        watch_device(self.device, self.loop)
        stack.callback(unwatch_device, self.device, self.loop)
        # The frontend is in this process, too; elsewhere it is in no process of ours.
        self.apart = Apart(
            pairs if processes is None else processes, on_fork=lambda: self.frontend.disconnect()
        )
        self.connections: list[Connection] = []
        stack.callback(lambda: [connection.close() for connection in self.connections])
        self.frontend = stack.enter_context(
            VhostFrontend(
                self.connect(),
                self.memory,
                queue_count=2 * pairs + 1,
                queue_size=queue_size,
                protocol=protocol,
                idle=lambda: self.loop.run_once(0),
            )
        )
        if up:
            self.start(features, pairs)

    def start(self, features: int = NET_DRIVER_FEATURES, pairs: int = 2) -> None:
        def idle() -> None:
            self.frontend.wait()

        self.driver = NetDriver(
            self.frontend,
            self.memory,
            features,
            pairs=pairs,
            idle=idle,
            receive_buffers=64,
            queue_size=min(256, self.device.queues[0].max_size),
        )

    def connect(self) -> socket.socket:
        """The frontend's end of a new connection."""
        ours, theirs = socket.socketpair()
        pairs = self.device.max_pairs
        connection = Connection(theirs, self.device, self.loop, queue_num=pairs, apart=self.apart)
        self.connections.append(connection)
        return ours

    # --- processes ------------------------------------------------------------------------------

    @property
    def processes(self) -> Any:
        return self.connections[-1].backend._processes

    @property
    def pids(self) -> list[int]:
        pids: list[int] = self.processes.pids
        return pids

    def lend(self, count: int | None = None) -> list[int]:
        """Waits until so many other processes serve; their ids. By default all that there are."""
        wanted = self.apart.processes - 1 if count is None else count
        self.wait(lambda: len(self.pids) == wanted)
        return self.pids

    def lend_now(self) -> None:
        self.processes._lend()

    def kill(self, pid: int) -> None:
        """As the kernel does that is out of memory; it is noticed before this returns."""
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: pid not in self.pids)

    def settle(self) -> None:
        """Nobody is lent anything for now: changes are not followed by a fork."""
        self.processes.recall_all()
        self.processes._timer.cancel()

    def look_at(self, queue: int) -> None:
        """The driver looks: its last call may have gone where nobody listens any more."""
        assert self.frontend.on_queue_call is not None
        self.frontend.on_queue_call(queue)

    # --- frames ---------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], seconds: float = 10) -> None:
        def done() -> bool:
            self.frontend.poll()
            return bool(condition())

        wait_until(self.loop, done, seconds)

    def turn(self, count: int = 8) -> None:
        for _ in range(count):
            self.loop.run_once(0)
            self.frontend.poll()

    def send(self, *numbers: int, pair: int = 0, **how: bytes) -> None:
        """The guest sends."""
        for number in numbers:
            self.wait(lambda: self.driver.send(frame_of(number, **how), pair=pair))  # noqa: B023

    def sent(self, pair: int = 0) -> list[int]:
        """The numbers that have come out at the host's end."""
        numbers: list[int] = []
        with suppress(BlockingIOError):
            while True:
                numbers.append(number_of(self.link.ports[pair].host.recv(1 << 17)[NET_HDR_SIZE:]))
        return numbers

    def wait_sent(self, *numbers: int, pair: int = 0) -> None:
        """These come out, and nothing else."""
        found: list[int] = []
        self.wait(lambda: found.extend(self.sent(pair)) or len(found) >= len(numbers))
        assert found == list(numbers)

    def feed(self, *frames: bytes | int, pair: int = 0) -> None:
        """The host sends."""
        for frame in frames:
            data = frame_of(frame) if isinstance(frame, int) else frame
            self.link.ports[pair].host.send(HEADER + data)

    def received(self) -> list[int]:
        return [number_of(frame.data) for frame in self.driver.receive()]

    def wait_received(self, *numbers: int) -> None:
        """The guest gets these, and nothing else."""
        found: list[int] = []
        self.wait(lambda: found.extend(self.received()) or len(found) >= len(numbers))
        assert found == list(numbers)

    def works(self, *pairs: int) -> None:
        """Frames pass both ways on these pairs, by default on all that are in use."""
        for pair in pairs or range(self.driver.pairs):
            self._number = getattr(self, "_number", 1_000_000) + 10
            number = self._number
            self.send(number, number + 1, pair=pair)
            self.wait_sent(number, number + 1, pair=pair)
            assert self.driver.wait_sent(pair)
            self.feed(number + 2, number + 3, pair=pair)
            self.wait_received(number + 2, number + 3)

    def quiet(self, seconds: float = 0.05) -> None:
        """So much time passes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.loop.run_once(0.005)
            self.frontend.poll()
