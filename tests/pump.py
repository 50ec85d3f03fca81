"""Real network stacks around a link under test: two Linux kernels and what lies between them.

In a namespace of its own, a Linux tap plays the guest: what its kernel sends and takes, net headers
included, passes through a `Pump` in this process. On the other side is the link under test, behind
which is a second namespace. A plain `Pump` stands in the net device's place; a `ScriptedGuest` has
all of vq in between: a driver, guest memory, and the net device.

No kernel's help is needed for VLANs: tags are put on and taken off here.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import queue
import select
import struct
import subprocess
import sys
import threading
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar, cast

from vq.abi import NET_HDR, NET_HDR_GSO_ECN, HdrFlag, HdrGso, feature_mask
from vq.gather import IoVectors
from vq.link import Frame, Link, Outbox, PlacesRoom, Port, Room, scatter
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NET_DRIVER_FEATURES, NetDriver, NetHeader
from vq.offload import ALL, Offload, host_offloads
from vq.software import finish
from vq.tap_linux import LinuxTap
from vq.tap_linux_port import LinuxTapPort
from vq.testing.requirements import need_namespaces, need_program, need_tap

T = TypeVar("T")
P = TypeVar("P", bound="Pump")

GUEST, HOST = f"ntg{os.getpid()}", f"nth{os.getpid()}"
"""Names of the namespaces, and of the taps in them."""
GUEST_MAC = bytes.fromhex("020000000a01")
HOST_MAC = bytes.fromhex("020000000a02")
ADDRESSES = ("10.88.0.2", "fd88::2")
"""The host's; the guest's end in 1."""


def need_two_hosts() -> None:
    """Skips the test where there can be no such namespaces."""
    need_tap()
    need_namespaces()
    need_program("ping", package="iputils-ping")


def run(*command: str, input: str | None = None) -> str:
    done = subprocess.run(
        command, input=input, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)[:80]}: {done.stderr}{done.stdout}"
    return done.stdout


def inside(name: str, *command: str) -> list[str]:
    """The command line that runs a command in a namespace."""
    return ["ip", "netns", "exec", name, *command]


def in_namespace(name: str, work: Callable[[], T]) -> T:
    """Does `work` on a thread in a namespace; a socket that it makes stays there."""
    future: Future[T] = Future()

    def enter() -> None:
        try:
            with open(f"/run/netns/{name}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return future.result(0)


# --- namespaces ----------------------------------------------------------------------------------


@contextlib.contextmanager
def namespace(name: str, tap: str, host_part: int, mac: bytes, mtu: int) -> Iterator[None]:
    """Moves a tap into a namespace of its own, with addresses."""
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "set", tap, "netns", name)
        commands = (
            f"link set {tap} address {mac.hex(':')} mtu {mtu}",
            f"addr add 10.88.0.{host_part}/24 dev {tap}",
            f"addr add fd88::{host_part}/64 dev {tap} nodad",
            f"link set {tap} up",
            "link set lo up",
        )
        run("ip", "-n", name, "-batch", "-", input="\n".join(commands))
        yield
    finally:
        run("ip", "netns", "del", name)


@contextlib.contextmanager
def two_namespaces(host: Link, make_pump: Callable[[Link], P], *, mtu: int = 1500) -> Iterator[P]:
    """The guest's tap and the host's, each in its namespace, with a pump between them.

    Whatever happens inside, the host's link is closed at the end.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(host.close)
        guest = LinuxTap(GUEST)
        stack.callback(guest.close)
        stack.enter_context(namespace(GUEST, GUEST, 1, GUEST_MAC, mtu))
        stack.enter_context(namespace(HOST, HOST, 2, HOST_MAC, mtu))
        pump = make_pump(guest)
        stack.callback(pump.stop)
        yield pump


def errors_counted(name: str) -> dict[str, int]:
    """What the kernel in a namespace counted as wrong checksums and broken packets."""
    text = run(*inside(name, "cat", "/proc/net/snmp", "/proc/net/snmp6")).splitlines()
    tables = [line for line in text if ":" in line]
    found = {}
    for names, values in zip(tables[::2], tables[1::2], strict=True):
        protocol, *columns = names.split()
        for column, value in zip(columns, values.split()[1:], strict=True):
            found[protocol + column] = int(value)
    for line in text:
        if ":" not in line:
            column, value = line.split()
            found[column] = int(value)
    assert {"Tcp:InCsumErrors", "Udp:InCsumErrors", "Udp6InCsumErrors"} <= set(found)
    for protocol in ("Udp:", "Udp6"):  # a socket that nobody read in time: no fault of the packets
        found[f"{protocol}InErrors"] -= found[f"{protocol}RcvbufErrors"]
    wanted = ("CsumErrors", "InHdrErrors", "InErrs", "InErrors")
    return {key: value for key, value in found.items() if key.endswith(wanted) and value}


# --- frames --------------------------------------------------------------------------------------


def retag(header: Sequence[int], data: bytes, old: bytes, new: bytes) -> tuple[list[int], bytes]:
    """A frame with other VLAN tags; of its net header hdr_len and csum_start move with them."""
    assert data[12 : 12 + len(old)] == old
    fields, shift = list(header), len(new) - len(old)
    fields[2] += shift if fields[1] else 0
    fields[4] += shift if fields[0] & 1 else 0
    return fields, data[:12] + new + data[12 + len(old) :]


def undone(header: bytes) -> str:
    """What a net header leaves undone: ``NONE``, ``CSUM``, or the name of its gso_type."""
    gso_type = header[1] & ~NET_HDR_GSO_ECN
    if gso_type:
        return HdrGso(gso_type).name
    return "CSUM" if header[0] & HdrFlag.NEEDS_CSUM else "NONE"


class Collected:
    """Room for frames, which are copied out of it."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(70000))
        self.frames: list[Frame] = []

    def views(self) -> Sequence[memoryview]:
        return [self.memory[:77], self.memory[77:]]

    def commit(self, header: bytes, length: int) -> None:
        self.frames.append([header, bytes(self.memory[:length])])


class HostPort(LinuxTapPort):
    """A queue of a `HostTap`."""

    def __init__(self, fd: int, truncated: Callable[[], None], tags: bytes) -> None:
        super().__init__(fd, truncated)
        self.tags = tags
        self.written: Counter[str] = Counter()
        self.given: Counter[str] = Counter()
        self.longest_plain = 0
        """Bytes of the longest frame given that was not to be segmented."""
        self.most_at_once = 1 << 20
        """Frames of a burst that are taken; the rest is refused, as with a full tap."""
        self.refused = 0
        self.in_place = 0
        """Frames that the kernel fetched out of the guest's memory, many in one system call."""
        if self.outbox is not None:
            self.outbox = None if tags else _WatchedOutbox(self.outbox, self)

    def write_burst(self, frames: Sequence[Frame]) -> int:
        self.refused += max(0, len(frames) - self.most_at_once)
        frames = frames[: self.most_at_once]
        if self.tags:
            frames = [self._untagged(frame) for frame in frames]
        taken = super().write_burst(frames)
        self.written.update(undone(bytes(frame[0])) for frame in frames[:taken])
        return taken

    def _untagged(self, frame: Frame) -> Frame:
        fields, data = retag(NET_HDR.unpack(frame[0]), b"".join(frame[1:]), self.tags, b"")
        return [NET_HDR.pack(*fields), data]

    def read_burst(self, room: Room, limit: int) -> int:
        if not self.tags:
            return super().read_burst(_Watched(room, self), limit)
        moved = 0
        while moved < limit and (views := room.views()):
            one = Collected()
            if not super().read_burst(_Watched(one, self), 1):
                break
            header, data = one.frames[0]
            fields, whole = retag(NET_HDR.unpack(header), bytes(data), b"", self.tags)
            scatter([whole], views)
            room.commit(NET_HDR.pack(*fields), len(whole))
            moved += 1
        return moved


class _WatchedOutbox:
    """An outbox whose frames are counted for a port."""

    def __init__(self, outbox: Outbox, port: HostPort) -> None:
        self.most_bytes = outbox.most_bytes
        self.take = outbox.take
        self._send = outbox.send
        self.take_alike = outbox.take_alike
        self._send_alike = outbox.send_alike
        self.starts, self.starts_address = outbox.starts, outbox.starts_address
        self._send_in_place = outbox.send_in_place
        self._port = port

    def send(self, lengths: array[int]) -> int:
        self._port.refused += max(0, len(lengths) - self._port.most_at_once)
        if not lengths[: self._port.most_at_once]:
            return 0
        taken = self._send(lengths[: self._port.most_at_once])
        self._port.written["NONE"] += taken
        return taken

    def send_alike(self, count: int, length: int) -> int:
        self._port.refused += max(0, count - self._port.most_at_once)
        count = min(count, self._port.most_at_once)
        if not count:
            return 0
        taken = self._send_alike(count, length)
        self._port.written["NONE"] += taken
        return taken

    def send_in_place(self, vectors: array[int], counts: Sequence[int]) -> int:
        self._port.refused += max(0, len(counts) - self._port.most_at_once)
        counts = counts[: self._port.most_at_once]
        if not counts:
            return 0
        taken = self._send_in_place(vectors[: 2 * sum(counts)], counts)
        firsts = itertools.accumulate(counts, initial=0)
        for first in itertools.islice(firsts, taken):
            start = vectors[2 * first] - self.starts_address
            self._port.written[undone(bytes(self.starts[start : start + 12]))] += 1
        self._port.in_place += taken
        return taken


class _Watched:
    """A room whose frames are counted for a port."""

    def __init__(self, room: Room, port: HostPort) -> None:
        self.views = room.views
        self._room = cast(PlacesRoom, room)
        self._port = port
        if hasattr(room, "lend_apart"):
            self.lend_apart = self._room.lend_apart
            self.looks_at = self._room.looks_at
            self.lend_together = self._lend_together
            self.lend_alone = self._room.lend_alone

    def commit(self, header: bytes, length: int) -> None:
        self._count(header, length)
        self._room.commit(header, length)

    def commit_apart(self, lengths: array[int], starts: memoryview) -> bool:
        for number, length in enumerate(lengths):
            first = self.looks_at * number
            self._count(bytes(starts[first : first + 12]), length - 12)
        return self._room.commit_apart(lengths, starts)

    def commit_private(self, frame: Frame) -> None:
        self._count(bytes(frame[0]), sum(map(len, frame[1:])))
        self._room.commit_private(frame)

    def _lend_together(self, longest: int) -> tuple[IoVectors, int, int] | None:
        self._places = self._room.lend_together(longest)
        return self._places

    def commit_together(self, length: int) -> None:
        assert self._places is not None
        vectors, first, _ = self._places
        address = ctypes.c_void_p.from_address(vectors.address + 16 * first).value
        assert address is not None
        self._count(ctypes.string_at(address, 12), length - 12)
        self._room.commit_together(length)

    def commit_alone(self, length: int) -> None:
        self._count(bytes(self._room.lend_alone()[0][:12]), length - 12)
        self._room.commit_alone(length)

    def _count(self, header: bytes, length: int) -> None:
        kind = undone(header)
        self._port.given[kind] += 1
        if kind in ("NONE", "CSUM"):
            self._port.longest_plain = max(self._port.longest_plain, length)


class HostTap(LinuxTap):
    """The Linux tap under test; its ports count what the device and the kernel leave undone.

    With `tags` all that the kernel sends and takes is in this VLAN, or in this VLAN in a VLAN. With
    `in_software` the link takes nothing undone, and gives frames with everything left undone
    whatever it is asked for: the device has to do it all.
    """

    ports: tuple[HostPort, ...]
    in_software = False

    def __init__(self, *, queues: int = 1, tags: bytes = b"", in_software: bool = False) -> None:
        self.in_software = in_software
        super().__init__(HOST, queues=queues)
        for port in self.ports:
            port.close()
        self.ports = tuple(HostPort(port.fileno(), self._measure, tags) for port in self.ports)
        if in_software:
            self.accepts = Offload.NONE

    def request_offloads(self, wanted: Offload) -> None:
        super().request_offloads(ALL if self.in_software else wanted)

    @property
    def written(self) -> set[str]:
        """What the device left undone in the frames that it wrote."""
        return {kind for port in self.ports for kind in port.written}

    @property
    def given(self) -> set[str]:
        """What the kernel left undone in the frames that it gave."""
        return {kind for port in self.ports for kind in port.given}


# --- between the two -----------------------------------------------------------------------------


class Pump(threading.Thread):
    """Carries frames between a guest's link and the host's, finishing what the other cannot."""

    def __init__(self, guest: Link, host: Link, guest_takes: Offload, tags: bytes) -> None:
        super().__init__(daemon=True)
        self.guest, self.host, self.guest_takes, self.tags = guest, host, guest_takes, tags
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            while not self._stopping:
                self.await_work()
                self.carry_all()
        except Exception:
            self.error = traceback.format_exc()

    def await_work(self) -> None:
        """Until there is something to carry or to do; does the latter."""
        reading, writing = self.waits_for()
        if self._wake_read not in select.select([*reading, self._wake_read], writing, [])[0]:
            return
        os.read(self._wake_read, 1)
        while not self._asked.empty():
            work, future = self._asked.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def waits_for(self) -> tuple[list[int], list[int]]:
        """Descriptors to wait for, for reading and for writing."""
        ports = (self.guest.ports[0], self.host.ports[0])
        return [fd for port in ports if (fd := port.fileno()) is not None], []

    def carry_all(self) -> None:
        guest, host = self.guest.ports[0], self.host.ports[0]
        self.carry(guest, host, self.host.accepts, b"", self.tags)
        self.carry(host, guest, self.guest_takes, self.tags, b"")

    @staticmethod
    def carry(source: Port, target: Port, accepts: Offload, old: bytes, new: bytes) -> None:
        room = Collected()
        if not source.read_burst(room, 64):
            return
        outgoing: list[Frame] = []
        for header, data in room.frames:
            fields, whole = retag(NET_HDR.unpack(header), bytes(data), old, new)
            outgoing += finish([NET_HDR.pack(*fields), whole], accepts)
        assert target.write_burst(outgoing) == len(outgoing)

    def do(self, work: Callable[[], T]) -> T:
        """Does `work` between two bursts, on the pump's thread; its result."""
        future: Future[T] = Future()
        self._asked.put((work, future))
        os.write(self._wake_write, b"x")
        for _ in range(200):
            if wait([future], 0.1).done:
                return future.result()
            assert self.is_alive(), self.error
        raise AssertionError("the pump does not come to it")

    def stop(self) -> None:
        """Ends the thread; what went wrong in it is raised here."""
        self._stopping = True
        os.write(self._wake_write, b"x")
        self.join(20)
        os.close(self._wake_read)
        os.close(self._wake_write)
        assert not self.error, self.error


class ScriptedGuest(Pump):
    """The same with all of vq in between: the guest's kernel has a driver and the net device.

    `features` are those that the driver wants. `device` and `driver` are further arguments of
    `NetDevice` and `NetDriver`. The guest's kernel has one queue; with several pairs in use the
    pump sends a flow over the pair that its source port names (`pair_of`).
    """

    def __init__(
        self,
        guest: Link,
        host: Link,
        features: int = NET_DRIVER_FEATURES,
        *,
        tags: bytes = b"",
        device: Mapping[str, Any] | None = None,
        driver: Mapping[str, Any] | None = None,
    ) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """Frames that went through the driver, by what they leave undone (`undone`)."""
        self.largest_count = 0
        """The largest num_buffers of a frame received."""
        self.memory = GuestMemory.allocate(32 << 20)
        try:
            self.device = NetDevice(host, mac=GUEST_MAC, memory=self.memory, **device or {})
            self.driver = NetDriver(
                self.device, self.memory, features, **{"polling": True, **(driver or {})}
            )
            guest.request_offloads(host_offloads(self.driver.features))
        except BaseException:
            self.memory.close()
            raise
        super().__init__(guest, host, ALL, tags)

    def waits_for(self) -> tuple[list[int], list[int]]:
        watches = self.device.watches
        reading = [watch.fd for watch in watches if watch.reading]
        reading += [fd for port in self.guest.ports if (fd := port.fileno()) is not None]
        return reading, [watch.fd for watch in watches if watch.writing]

    def carry_all(self) -> None:
        room = Collected()
        while self.guest.ports[0].read_burst(room, 64):
            self.send(room.frames)
            room = Collected()
        for watch in list(self.device.watches):
            if watch.reading:
                watch.readable()
            if watch.writing:
                watch.writable()
        while self.receive():
            pass

    def send(self, frames: Sequence[Frame]) -> None:
        """Has the driver send what the guest's kernel wants sent."""
        pairs: list[list[tuple[bytes, bytes]]] = [[] for _ in range(self.driver.pairs)]
        for frame in frames:
            header, data = bytes(frame[0]), bytes(frame[1])
            self.sent[undone(header)] += 1
            pair = self.pair_of(data)
            if self.tags:
                fields, data = retag(NET_HDR.unpack(header), data, b"", self.tags)
                header = NET_HDR.pack(*fields)
            pairs[pair].append((header, data))
        for pair, outgoing in enumerate(pairs):
            if outgoing:
                self.driver.send_burst(outgoing, pair=pair)

    def pair_of(self, data: bytes) -> int:
        """The source port modulo the pairs in use; 0 for what is not a plain TCP or UDP frame."""
        start = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(data[12:14], len(data))
        return int.from_bytes(data[start : start + 2], "big") % self.driver.pairs

    def receive(self) -> bool:
        """Gives the guest's kernel what the driver received; whether that was anything."""
        received = self.driver.receive()
        frames: list[Frame] = []
        for frame in received:
            header, data = frame.header.pack(), frame.data
            self.received[undone(header)] += 1
            self.largest_count = max(self.largest_count, frame.header.num_buffers)
            if self.tags:
                fields, data = retag(frame.header, data, self.tags, b"")
                header = NetHeader(*fields).pack()
            frames.append([header, data])
        if frames:
            self.guest.ports[0].write_burst(frames)
        return bool(received)

    def dropped(self) -> dict[str, int]:
        """What the device and its ports have dropped, by reason."""
        found = {key: n for key, n in self.device.stats.items() if "dropped" in key and n}
        for port in self.host.ports:
            found.update(port.dropped)
        return found

    def stop(self) -> None:
        try:
            super().stop()
            assert self.device.fault is None, self.device.fault
        finally:
            self.driver.close()
            self.device.close()
            self.memory.close()


def without(*features: int) -> int:
    """All features of the driver but these, and those that need one of them."""
    return NET_DRIVER_FEATURES & ~feature_mask(features)


# --- traffic -------------------------------------------------------------------------------------

SERVER = """
import socket, threading
def echo(connection):
    while piece := connection.recv(1 << 16):
        connection.sendall(piece)
    connection.close()
def datagrams(port, segment):
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.bind(("::", port))
    if segment:
        udp.setsockopt(socket.IPPROTO_UDP, 103, segment)  # UDP_SEGMENT
    while True:
        data, sender = udp.recvfrom(1 << 16)
        udp.sendto(data, sender)
for port, segment in (5002, 0), (5003, 1000):
    threading.Thread(target=datagrams, args=(port, segment), daemon=True).start()
listener = socket.create_server(("::", 5001), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""

CLIENT = """
import os, socket, sys, threading
data = os.urandom(600_000)
options = bytes.fromhex(sys.argv[1])
for address in sys.argv[2:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    def prepare(socket_, timeout):
        socket_.settimeout(timeout)
        if options and family == socket.AF_INET6:
            socket_.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, options)
        return socket_
    with prepare(socket.socket(family, socket.SOCK_STREAM), 20) as tcp:
        tcp.connect((address, 5001))
        threading.Thread(target=lambda: (tcp.sendall(data), tcp.shutdown(1)), daemon=True).start()
        back = bytearray()
        while piece := tcp.recv(1 << 16):
            back += piece
        assert back == data, f"TCP, {address}: {len(back)} bytes came back"
    with prepare(socket.socket(family, socket.SOCK_DGRAM), 10) as udp:
        udp.connect((address, 5002))
        for size in (1, 18, 101, 1400, 5000):
            udp.send(data[:size])
            assert udp.recv(1 << 16) == data[:size], f"UDP, {address}, {size}"
        pieces = sorted(data[i : min(i + 1000, 5500)] for i in range(0, 5500, 1000))
        udp.connect((address, 5003))
        udp.send(data[:5500])
        assert sorted(udp.recv(1 << 16) for _ in range(6)) == pieces, f"segments from {address}"
        udp.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT
        udp.connect((address, 5002))
        udp.send(data[:5500])
        assert sorted(udp.recv(1 << 16) for _ in range(6)) == pieces, f"segments to {address}"
print("done")
"""

FLOWS = """
import os, socket, sys, threading
stop = threading.Event()
started = threading.Barrier(len(sys.argv), timeout=20)
failed = []
def flow(number, address):
    data = os.urandom(100_000)
    place = (address, 5001)
    try:
        with socket.create_connection(place, 20, source_address=("", 6000 + number)) as tcp:
            first = True
            while first or not stop.is_set():
                threading.Thread(target=tcp.sendall, args=(data,), daemon=True).start()
                back = bytearray()
                while len(back) < len(data):
                    piece = tcp.recv(1 << 16)
                    assert piece, "the other end has closed"
                    back += piece
                assert back == data, "other bytes came back"
                if first:
                    first = False
                    started.wait()
    except Exception as error:
        failed.append(f"{address}: {error!r}")
        started.abort()
threads = [threading.Thread(target=flow, args=a) for a in enumerate(sys.argv[1:])]
for thread in threads:
    thread.start()
try:
    started.wait()
    print("running", flush=True)
    sys.stdin.read()
except threading.BrokenBarrierError:
    pass
stop.set()
for thread in threads:
    thread.join()
print(failed or "done")
"""

_PYTHON = (sys.executable, "-I", "-S", "-c")


@contextlib.contextmanager
def started(name: str, ready: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A program in a namespace, from when it has written the line `ready`; killed at the end."""
    with subprocess.Popen(
        inside(name, *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 20)[0], f"no {ready!r} in {name}"
            line = process.stdout.readline()
            assert line == ready + "\n", line + process.stdout.read()
            yield process
        finally:
            process.kill()


def exchange(*, options: bytes = b"") -> None:
    """TCP and UDP both ways, over everything; the kernels judge the checksums.

    `options` is an IPv6 destination options header for the guest's packets.
    """
    with started(HOST, "ready", *_PYTHON, SERVER):
        client = (*_PYTHON, CLIENT, options.hex(), *ADDRESSES)
        assert run(*inside(GUEST, *client)) == "done\n"
        for address in ADDRESSES:
            ping(address)
    no_errors()


def ping(address: str, size: int = 2000) -> None:
    command = f"ping -c 2 -i 0.01 -W 5 -s {size} {address}"
    run(*inside(GUEST, *command.split()))


def no_errors() -> None:
    """No kernel has seen a wrong checksum or a broken packet."""
    errors = {name: errors_counted(name) for name in (HOST, GUEST)}
    assert not any(errors.values()), errors


@contextlib.contextmanager
def flows(*addresses: str, cut_short: bool = False) -> Iterator[None]:
    """One TCP connection to each address, with data going to and fro while the body runs.

    The first comes from port 6000, the next from 6001 and so on. At the end all data must be
    there, unless the flows are `cut_short`.
    """
    with (
        started(HOST, "ready", *_PYTHON, SERVER),
        started(GUEST, "running", *_PYTHON, FLOWS, *addresses) as client,
    ):
        yield
        assert cut_short or client.communicate(timeout=30)[0] == "done\n"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s there is still no {what}"
        time.sleep(0.005)


def iperf3(*arguments: str) -> float:
    """The bits per second that iperf3 sees from the guest to the host, with -R the other way."""
    server = ("iperf3", "-s", "-1", "--forceflush")
    with started(HOST, "-" * 59, *server):
        answer = json.loads(run(*inside(GUEST, "iperf3", "-J", "-c", ADDRESSES[0], *arguments)))
    return float(answer["end"]["sum_received"]["bits_per_second"])


VNET = struct.Struct("=BBHHHH")
"""Linux's own `virtio_net_hdr`, as the stand-ins of the BSD kernels use it."""
