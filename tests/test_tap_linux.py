"""`vq.tap_linux` and `vq.tap` against the running kernel, in network namespaces of their own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest

from vq import tap_linux, tap_linux_port
from vq.abi import NET_HDR, HdrFlag, HdrGso
from vq.errors import UsageError
from vq.gather import IoVectors
from vq.io_uring import RequestRing
from vq.link import MAX_FRAME, MOST_AT_ONCE, MOST_PIECES, START_ROOM, Frame, Outbox, Places, Port
from vq.netlink import interface_in
from vq.offload import ALL, Offload, legal_tun_flags
from vq.sandbox import capabilities
from vq.sandbox.libc import Libc
from vq.tap import open_tap
from vq.tap_linux import LinuxTap
from vq.tap_linux_port import LinuxTapPort
from vq.testing.requirements import unmet

T = TypeVar("T")


def possible() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    if shutil.which("ip") is None:
        return "needs ip(8)"
    return None


needs_tap = pytest.mark.skipif(possible() is not None, reason=possible() or "")

OUR_MAC = bytes.fromhex("020000000001")
KERNEL_MAC = bytes.fromhex("020000000002")
OURS, KERNEL = "198.18.7.1", "198.18.7.2"
PLAIN = bytes(12)
UDP_SEGMENT = 103
"""include/uapi/linux/udp.h: into how many bytes the kernel, or its device, cuts a datagram."""


# --- helpers -------------------------------------------------------------------------------------


def ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Does `work` on a thread in a namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{namespace}") as file:
                if ctypes.CDLL(None).setns(file.fileno(), 0):
                    raise OSError("setns failed")
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    if errors:
        raise errors[0]
    return results[0]


counter = itertools.count()


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"tl{os.getpid()}n{next(counter)}"
    ip("netns", "add", name)
    try:
        yield name
    finally:
        ip("netns", "del", name)


def configure(namespace: str, tap: LinuxTap) -> None:
    """Gives the kernel's end an address, and ours as a neighbour; no IPv6, nothing strays."""
    inside(namespace, lambda: no_ipv6(tap.name))
    ip("-n", namespace, "link", "set", tap.name, "address", KERNEL_MAC.hex(":"), "up")
    ip("-n", namespace, "addr", "add", f"{KERNEL}/24", "dev", tap.name)
    ip(
        *("-n", namespace, "neigh", "add", OURS, "dev", tap.name),
        *("lladdr", OUR_MAC.hex(":"), "nud", "permanent"),
    )


def no_ipv6(name: str) -> None:
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if path.exists():
        path.write_text("1")


@pytest.fixture
def tap(namespace: str) -> Iterator[LinuxTap]:
    with closing(LinuxTap("tl%d", namespace=namespace)) as tap:
        configure(namespace, tap)
        yield tap


class PieceRoom:
    """Room in pieces of the given sizes for each frame; keeps what comes."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes or (MAX_FRAME,)
        self.frames: list[tuple[bytes, bytes]] = []
        self.free = 1000

    def views(self) -> Sequence[memoryview]:
        if not self.free:
            return []
        self.lent = [memoryview(bytearray(size)) for size in self.sizes]
        return self.lent

    def commit(self, header: bytes, length: int) -> None:
        self.free -= 1
        self.frames.append((header, b"".join(self.lent)[:length]))


def wait_readable(port: Port, seconds: float = 5.0) -> bool:
    fd = port.fileno()
    assert fd is not None
    return bool(select.select([fd], [], [], seconds)[0])


def receive(port: Port, room: PieceRoom, enough: Callable[[], bool]) -> None:
    """Reads until there is enough."""
    end = time.monotonic() + 5
    while not enough():
        assert time.monotonic() < end, f"only {[(h, len(f)) for h, f in room.frames]}"
        if wait_readable(port, 0.2):
            port.read_burst(room, 64)


def total(data: bytes) -> int:
    """The Internet checksum's sum, written down as RFC 1071 has it."""
    if len(data) % 2:
        data += b"\0"
    value: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def ip4(protocol: int, body: bytes, length: int | None = None) -> bytes:
    size = 20 + len(body) if length is None else length
    header = struct.pack(
        ">BBHHHBBH4s4s",
        *(0x45, 0, size, 1, 0x4000, 64, protocol, 0),
        *(socket.inet_aton(OURS), socket.inet_aton(KERNEL)),
    )
    header = header[:10] + struct.pack(">H", total(header) ^ 0xFFFF) + header[12:]
    return KERNEL_MAC + OUR_MAC + b"\x08\x00" + header + body


def pseudo(protocol: int, length: int) -> int:
    addresses = socket.inet_aton(OURS) + socket.inet_aton(KERNEL)
    return total(addresses + struct.pack(">HH", protocol, length))


def udp(source: int, target: int, data: bytes, *, partial: bool = False, off: int = 0) -> bytes:
    """A UDP frame; with only the pseudo-header's sum, or with a checksum that is `off`."""
    size = 8 + len(data)
    header = struct.pack(">HHHH", source, target, size, 0)
    value = pseudo(17, size)
    if not partial:
        value = total(struct.pack(">H", value) + header + data) ^ 0xFFFF
    checksum = struct.pack(">H", (value + off) & 0xFFFF)
    return ip4(17, header[:6] + checksum + data)


def tcp(
    ports: tuple[int, int], seq: int, ack: int, flags: int, data: bytes = b"", *, mss: int = 0
) -> tuple[bytes, bytes]:
    """A TCP frame and its net header: checksum left undone, and with `mss` also the cutting."""
    size = 20 + len(data)
    header = struct.pack(">HHIIBBHHH", *ports, seq, ack, 0x50, flags, 65535, pseudo(6, size), 0)
    gso = HdrGso.TCPV4 if mss else HdrGso.NONE
    return (
        NET_HDR.pack(HdrFlag.NEEDS_CSUM, gso, 54 if mss else 0, mss, 34, 16, 0),
        ip4(6, header + data),
    )


def udp_socket(namespace: str) -> socket.socket:
    def make() -> socket.socket:
        endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        endpoint.bind((KERNEL, 0))
        endpoint.settimeout(5)
        return endpoint

    return inside(namespace, make)


def snmp(namespace: str, protocol: str, counter: str) -> int:
    text = inside(namespace, lambda: Path("/proc/thread-self/net/snmp").read_text())
    names, values = (line.split() for line in text.splitlines() if line.startswith(f"{protocol}:"))
    return int(dict(zip(names[1:], values[1:], strict=True))[counter])


def open_fds() -> set[str]:
    return {entry for entry in os.listdir("/proc/self/fd")}


# --- names, opening, sharing ---------------------------------------------------------------------


@needs_tap
def test_the_name_that_the_kernel_gave_is_read_back(namespace: str) -> None:
    with (
        closing(LinuxTap("tl%d", namespace=namespace)) as first,
        closing(LinuxTap("tl%d", namespace=namespace)) as second,
    ):
        assert (first.name, second.name) == ("tl0", "tl1")
        ip("-n", namespace, "link", "set", "tl1", "name", "renamed")
        assert second.mtu == 1500
        assert second.name == "renamed"


@needs_tap
def test_the_header_is_twelve_bytes_and_little_endian(tap: LinuxTap) -> None:
    fd = tap.ports[0].fileno()
    for request, value in ((tap_linux.TUNGETVNETHDRSZ, 12), (tap_linux.TUNGETVNETLE, 1)):
        assert struct.unpack("i", fcntl.ioctl(fd, request, bytes(4))) == (value,)


@needs_tap
def test_a_tap_in_use_is_said_to_be(namespace: str, tap: LinuxTap) -> None:
    before = open_fds()
    with pytest.raises(OSError, match=f"tap {tap.name} is in use by another program") as caught:
        LinuxTap(tap.name, namespace=namespace)
    assert caught.value.errno == errno.EBUSY
    assert open_fds() == before


@needs_tap
def test_what_is_not_a_tap_is_said_not_to_be(namespace: str) -> None:
    ip("-n", namespace, "tuntap", "add", "tl-tun", "mode", "tun")
    before = open_fds()
    for name in ("lo", "tl-tun"):
        with pytest.raises(UsageError, match=f"network interface {name} is not a tap"):
            LinuxTap(name, namespace=namespace)
    assert open_fds() == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b"])
def test_a_name_that_no_interface_can_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        LinuxTap(name)


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(UsageError, match=r"too long: Linux takes at most 15 bytes"):
        LinuxTap("x" * 16)
    with pytest.raises(UsageError, match="too long"):
        LinuxTap("é" * 8)


@needs_tap
def test_a_name_of_fifteen_bytes_is_taken(namespace: str) -> None:
    with closing(LinuxTap("x" * 15, namespace=namespace)) as tap:
        assert tap.name == "x" * 15


def test_no_tap_has_no_queues() -> None:
    with pytest.raises(UsageError, match="at least one queue"):
        LinuxTap("tl0", queues=0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_where_there_is_no_tun_device_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tap_linux, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(FileNotFoundError, match=r"there is no .*tun: load the kernel's tun module"):
        LinuxTap("tl0")


@needs_tap
def test_a_namespace_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no network namespace /run/netns/tl-missing"):
        LinuxTap("tl0", namespace="tl-missing")


@needs_tap
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)")
def test_without_cap_net_admin_the_error_says_so(namespace: str) -> None:
    code = (
        "from vq.tap_linux import LinuxTap\n"
        "try: LinuxTap('tl0')\n"
        "except PermissionError as error: print(error.strerror)\n"
    )
    python = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *python, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("attaching to the tap tl0 needs CAP_NET_ADMIN"), done


@needs_tap
def test_a_persistent_tap_outlives_its_user_and_can_be_attached_again(namespace: str) -> None:
    LinuxTap("tl-keep", persist=True, namespace=namespace).close()
    assert "tl-keep" in ip("-n", namespace, "link")
    with closing(LinuxTap("tl-keep", namespace=namespace)) as tap:
        tap.set_persistent(False)
    assert "tl-keep" not in ip("-n", namespace, "link")


@needs_tap
def test_offloads_that_the_last_user_asked_for_are_forgotten(namespace: str) -> None:
    with closing(LinuxTap("tl-keep", persist=True, namespace=namespace)) as tap:
        tap.request_offloads(ALL)
    with closing(LinuxTap("tl-keep", namespace=namespace)) as tap:
        assert tap.delivers == Offload.NONE
        shown = subprocess.run(
            ["ip", "netns", "exec", namespace, "ethtool", "-k", "tl-keep"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shown.returncode == 0:
            assert "tx-checksumming: off" in shown.stdout


@needs_tap
def test_one_queue_of_a_tap_made_for_several_can_be_used(namespace: str) -> None:
    ip("-n", namespace, "tuntap", "add", "tl-mq", "mode", "tap", "multi_queue")
    with closing(LinuxTap("tl-mq", namespace=namespace)) as tap:
        assert len(tap.ports) == 1


@needs_tap
def test_a_tap_made_with_one_queue_has_no_more(namespace: str) -> None:
    ip("-n", namespace, "tuntap", "add", "tl-one", "mode", "tap")
    before = open_fds()
    with pytest.raises(UsageError, match="tl-one was made with one queue: 2 need one made with"):
        LinuxTap("tl-one", queues=2, namespace=namespace)
    assert open_fds() == before


# --- descriptors handed in -----------------------------------------------------------------------


def attached(flags: int, name: bytes = b"tl%d") -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, tap_linux.TUNSETIFF, struct.pack("16sH22x", name, flags))
    return fd


@needs_tap
def test_an_open_descriptor_can_be_handed_in(namespace: str) -> None:
    fd = inside(namespace, lambda: attached(0x5002))
    with closing(LinuxTap.from_fds([fd])) as tap:
        configure(namespace, tap)
        assert tap.name == "tl0"
        assert tap.mtu == 1500
        assert not os.get_blocking(fd)
        with udp_socket(namespace) as endpoint:
            frame: Frame = [PLAIN, udp(5000, endpoint.getsockname()[1], b"handed in")]
            assert tap.ports[0].write_burst([frame]) == 1
            assert endpoint.recv(100) == b"handed in"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@needs_tap
def test_descriptors_that_are_no_such_tap_are_refused_and_closed(namespace: str) -> None:
    def all_kinds() -> list[tuple[Callable[[], int], str]]:
        return [
            (lambda: os.open("/dev/null", os.O_RDWR), "is not an open tap"),
            (lambda: attached(0x1002), "must be a tap with IFF_NO_PI and IFF_VNET_HDR"),
            (lambda: attached(0x5001), "must be a tap with"),
            (lambda: os.open("/dev/net/tun", os.O_RDWR), "never attached"),
        ]

    before = open_fds()
    for make, reason in all_kinds():
        fd = inside(namespace, make)
        with pytest.raises((UsageError, OSError), match=reason):
            LinuxTap.from_fds([fd])
    with pytest.raises(UsageError, match="at least one"):
        LinuxTap.from_fds([])
    pair = [inside(namespace, lambda: attached(0x5002)) for _ in range(2)]
    with pytest.raises(UsageError, match="different taps"):
        LinuxTap.from_fds(pair)
    assert open_fds() == before


# --- frames towards the kernel -------------------------------------------------------------------


@needs_tap
def test_a_frame_in_any_pieces_arrives(namespace: str, tap: LinuxTap) -> None:
    with udp_socket(namespace) as endpoint:
        data = bytes(range(200)) * 7
        whole = udp(5000, endpoint.getsockname()[1], data)
        cuts: list[Frame] = [
            [PLAIN, whole],
            [PLAIN, memoryview(whole)[:1], b"", bytearray(whole[1:40]), whole[40:]],
            [PLAIN, *(whole[i : i + 1] for i in range(len(whole)))],
        ]
        assert len(cuts[2]) > 1024  # more than one writev takes
        assert tap.ports[0].write_burst(cuts) == 3
        assert [endpoint.recv(9000) for _ in cuts] == [data] * 3
    assert not tap.ports[0].dropped


@needs_tap
def test_the_kernel_finishes_a_partial_checksum_and_judges_a_wrong_one(
    namespace: str, tap: LinuxTap
) -> None:
    needs = NET_HDR.pack(HdrFlag.NEEDS_CSUM, 0, 0, 0, 34, 6, 0)
    with udp_socket(namespace) as endpoint:
        port = endpoint.getsockname()[1]
        frames: list[Frame] = [
            [PLAIN, udp(5000, port, b"wrong", off=1)],
            [PLAIN, udp(5000, port, b"partial, not said to be", partial=True)],
            [needs, udp(5000, port, b"partial", partial=True)],
        ]
        assert tap.ports[0].write_burst(frames) == 3
        assert endpoint.recv(100) == b"partial"
        assert snmp(namespace, "Udp", "InCsumErrors") == 2


@needs_tap
def test_frames_that_cannot_be_are_dropped_and_counted(namespace: str, tap: LinuxTap) -> None:
    port = tap.ports[0]
    with udp_socket(namespace) as endpoint:
        good = udp(5000, endpoint.getsockname()[1], b"good")
        frames: list[Frame] = [
            [PLAIN],
            [PLAIN, b""],
            [PLAIN, good[:13]],
            [PLAIN, good[:7], good[7:13]],
            [PLAIN, bytes(MAX_FRAME + 1)],
            [NET_HDR.pack(0, 0x77, 0, 0, 0, 0, 0), good],
            [NET_HDR.pack(0, HdrGso.NONE, 0, 0, 0, 0, 0), good],
        ]
        assert port.write_burst(frames) == 7
        assert endpoint.recv(100) == b"good"
    assert port.dropped == {"runt": 4, "too long": 1, "bad header": 1}


@needs_tap
def test_frames_to_an_interface_that_is_down_are_dropped_and_counted(tap: LinuxTap) -> None:
    tap.set_up(False)
    assert tap.ports[0].write_burst([[PLAIN, bytes(60)]] * 3) == 3
    assert tap.ports[0].dropped == {"interface down": 3}


@needs_tap
def test_a_full_tap_leaves_the_rest_of_a_burst_with_the_caller(
    tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel says so only when the send buffer was limited (TUNSETSNDBUF) and is full.
    room_for = [26, 26]

    def writev(fd: int, frame: Frame) -> int:
        if not room_for:
            raise BlockingIOError(errno.EAGAIN, "full")
        return room_for.pop()

    monkeypatch.setattr(os, "writev", writev)
    assert tap.ports[0].write_burst([[PLAIN, bytes(14)]] * 5) == 2
    assert not tap.ports[0].dropped


@needs_tap
def test_a_kernel_without_memory_drops_the_frame_and_counts_it(
    tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE]

    def writev(fd: int, frame: Frame) -> int:
        raise OSError(errors.pop(), "refused")

    monkeypatch.setattr(os, "writev", writev)
    assert tap.ports[0].write_burst([[PLAIN, bytes(14)]] * 3) == 3
    assert tap.ports[0].dropped == {"no memory": 2, "too long": 1}


@needs_tap
def test_a_tap_that_was_deleted_raises_and_is_down(namespace: str, tap: LinuxTap) -> None:
    assert not tap.is_gone
    ip("-n", namespace, "link", "del", tap.name)
    with pytest.raises(OSError, match="the tap is gone"):
        tap.ports[0].write_burst([[PLAIN, bytes(60)]])
    with pytest.raises(OSError, match="the tap is gone"):
        tap.ports[0].read_burst(PieceRoom(), 1)
    assert tap.is_gone and not tap.is_up
    with pytest.raises(OSError, match="the tap is gone"):
        assert tap.mtu


@needs_tap
@pytest.mark.parametrize("queues", [1, 2])
def test_a_tap_that_was_deleted_and_made_again_is_taken_up(namespace: str, queues: int) -> None:
    """The descriptors stay what they are, and so does whoever else has them."""
    several = ["multi_queue"] if queues > 1 else []
    changes: list[bool] = []
    with closing(LinuxTap("tl-again", queues=queues, namespace=namespace)) as tap:
        tap.on_change = lambda: changes.append(tap.is_up)
        fds = [port.fileno() for port in tap.ports]
        tap.request_offloads(ALL)
        tap.activate_ports(1)
        ip("-n", namespace, "link", "del", "tl-again")
        tap.recover()
        assert tap.is_gone and not changes
        assert "tl-again" not in ip("-n", namespace, "link"), "nobody else would look for it there"
        ip("-n", namespace, "tuntap", "add", "tl-again", "mode", "tap", *several)
        tap.recover()
        assert changes == [False] and not tap.is_gone
        assert tap.delivers == Offload.NONE and all(port.active for port in tap.ports)
        assert [port.fileno() for port in tap.ports] == fds
        tap.recover()
        assert len(changes) == 1
        tap.activate_ports(1)
        configure(namespace, tap)
        with udp_socket(namespace) as sock:
            tap.ports[0].write_burst([[PLAIN, udp(1000, sock.getsockname()[1], b"again")]])
            assert sock.recv(100) == b"again"
            sock.sendto(b"answer", (OURS, 1000))
        room = PieceRoom()
        receive(tap.ports[0], room, lambda: b"answer" in b"".join(f[1] for f in room.frames))


@needs_tap
def test_what_cannot_take_a_deleted_taps_place_is_told(namespace: str) -> None:
    with closing(LinuxTap("tl-again", queues=2, namespace=namespace)) as tap:
        ip("-n", namespace, "link", "del", "tl-again")
        ip("-n", namespace, "tuntap", "add", "tl-again", "mode", "tun")
        with pytest.raises(UsageError, match="the network interface tl-again is not a tap"):
            tap.recover()
        ip("-n", namespace, "link", "del", "tl-again")
        ip("-n", namespace, "tuntap", "add", "tl-again", "mode", "tap")
        with pytest.raises(UsageError, match="made with one queue"):
            tap.recover()
        assert tap.is_gone
    with closing(LinuxTap("tl-again", namespace=namespace)) as tap:
        ip("-n", namespace, "link", "del", "tl-again")
        with (
            closing(LinuxTap("tl-again", namespace=namespace)),
            pytest.raises(OSError, match="in use by another program"),
        ):
            tap.recover()
        assert tap.is_gone


# --- frames from the kernel ----------------------------------------------------------------------


@needs_tap
@pytest.mark.parametrize("pieces", [(MAX_FRAME,), (1, 13, 20, 5000), (1,) * 1500])
def test_a_frame_fills_the_pieces_of_the_room_in_order(
    namespace: str, tap: LinuxTap, pieces: tuple[int, ...]
) -> None:
    room = PieceRoom(*pieces)
    with udp_socket(namespace) as endpoint:
        data = bytes(range(250)) * 5
        endpoint.sendto(data, (OURS, 7000))
        receive(tap.ports[0], room, lambda: bool(room.frames))
    ((header, frame),) = room.frames
    assert header == PLAIN  # num_buffers too: the device fills it in
    assert frame[:12] == OUR_MAC + KERNEL_MAC
    assert frame[42:] == data


@needs_tap
@pytest.mark.parametrize("shape", [(1514,), (700, 814), (1,) * 1514])
def test_a_frame_that_the_room_would_cut_is_noticed(
    namespace: str, tap: LinuxTap, shape: tuple[int, ...]
) -> None:
    tap.set_mtu(3000)
    tap.max_frame = 1514  # as it was before somebody raised the MTU behind our back
    room = PieceRoom(*shape)
    with udp_socket(namespace) as endpoint:
        for size in (1473, 1472, 2000, 3):
            endpoint.sendto(bytes(size), (OURS, 7000))
        receive(tap.ports[0], room, lambda: len(room.frames) == 2)
    assert [len(frame) for _, frame in room.frames] == [1514, 45]
    assert tap.ports[0].dropped == {"too long": 2}
    assert tap.max_frame == 3022


@needs_tap
@pytest.mark.parametrize("by_address", [False, True])
def test_frames_that_are_all_too_long_end_a_burst_too(
    namespace: str, tap: LinuxTap, by_address: bool
) -> None:
    """As long as they kept coming, from whoever floods the network with them, nobody else was
    served."""
    port = tap.ports[0]
    tap.set_mtu(3000)
    room = VectorRoom() if by_address else PieceRoom(100)
    with udp_socket(namespace) as endpoint:
        for _ in range(100):
            endpoint.sendto(bytes(2000), (OURS, 7000))
    port.on_truncated = lambda: None  # nobody says how long they may be
    port.longest = 100
    port._longest_usual = 100
    for turn in (1, 2, 3):
        port._longest_usual = 100
        assert port.read_burst(room, 4) == 0 and port.dropped == {"too long": 4 * turn}


@needs_tap
def test_no_room_and_no_frame_end_a_burst(namespace: str, tap: LinuxTap) -> None:
    room = PieceRoom()
    port = tap.ports[0]
    assert port.read_burst(room, 64) == 0
    with udp_socket(namespace) as endpoint:
        for i in range(5):
            endpoint.sendto(bytes([i]), (OURS, 7000))
    assert wait_readable(port)
    room.free = 0
    assert port.read_burst(room, 64) == 0
    room.free = 3
    assert port.read_burst(room, 2) == 2
    assert port.read_burst(room, 64) == 1
    room.free = 64
    assert port.read_burst(room, 64) == 2
    assert [frame[42] for _, frame in room.frames] == [0, 1, 2, 3, 4]


# --- offloads ------------------------------------------------------------------------------------


@needs_tap
def test_the_kernel_takes_just_the_sets_that_the_rules_call_legal(tap: LinuxTap) -> None:
    fd = tap.ports[0].fileno()
    ufo = 0x10  # taken and ignored, but only with a checksum
    for flags in range(128):
        if flags & ~(tap.known_flags | ufo):
            continue
        try:
            fcntl.ioctl(fd, tap_linux.TUNSETOFFLOAD, flags)
        except OSError as error:
            assert error.errno == errno.EINVAL
            taken = False
        else:
            taken = True
        assert taken == (legal_tun_flags(flags) == flags), hex(flags)


@needs_tap
def test_every_wish_gives_a_set_that_the_kernel_takes(tap: LinuxTap) -> None:
    assert tap.accepts & Offload.CSUM
    for wish in map(Offload, range(int(ALL) + 1)):
        tap.request_offloads(wish)
        assert tap.delivers & ~wish == Offload.NONE
    tap.request_offloads(ALL)
    assert tap.delivers == tap.accepts
    assert tap.max_frame == MAX_FRAME
    tap.request_offloads(Offload.CSUM)
    assert tap.max_frame == 1522


class Talk:
    """A TCP connection between a hand-written end at the tap and a socket behind it."""

    PORTS = 7001, 7002

    def __init__(self, namespace: str, tap: LinuxTap) -> None:
        self.port = tap.ports[0]
        self.room = PieceRoom()
        self.listener = inside(namespace, self.listen)
        self.sequence, self.acked = 1000, 0
        self.send(2)
        receive(self.port, self.room, lambda: bool(self.room.frames))
        answer = self.room.frames.pop()[1]
        self.acked = struct.unpack_from(">I", answer, 38)[0] + 1
        self.sequence += 1
        self.send(0x10)
        with self.listener:
            self.peer, _ = self.listener.accept()
        self.peer.settimeout(5)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def listen(self) -> socket.socket:
        listener = socket.socket()
        listener.settimeout(5)
        listener.bind((KERNEL, self.PORTS[1]))
        listener.listen()
        return listener

    def close(self) -> None:
        self.peer.close()

    def send(self, flags: int, data: bytes = b"", mss: int = 0) -> None:
        header, frame = tcp(self.PORTS, self.sequence, self.acked, flags, data, mss=mss)
        assert self.port.write_burst([[header, frame[:54], frame[54:]]]) == 1
        assert not self.port.dropped
        self.sequence += len(data)

    def receive(self, size: int) -> list[tuple[bytes, bytes]]:
        """Frames with `size` bytes of data, each acknowledged."""
        taken: list[tuple[bytes, bytes]] = []
        have = 0
        while have < size:
            receive(self.port, self.room, lambda: bool(self.room.frames))
            for header, frame in self.room.frames:
                (length,) = struct.unpack_from(">H", frame, 16)
                data = length - 20 - (frame[46] >> 4) * 4
                if data:
                    taken.append((header, frame))
                    have += data
                    self.acked += data
                    self.send(0x10)
            self.room.frames.clear()
        return taken


@needs_tap
def test_tcp_segments_go_uncut_both_ways_and_offloads_change_while_open(
    namespace: str, tap: LinuxTap
) -> None:
    with closing(Talk(namespace, tap)) as talk:
        data = os.urandom(30000)
        talk.send(0x18, data, mss=1400)
        got = b""
        while len(got) < len(data):
            got += talk.peer.recv(len(data))
        assert got == data

        def answered(offloads: Offload) -> list[tuple[bytes, bytes]]:
            tap.request_offloads(offloads)
            talk.peer.sendall(bytes(8000))
            return talk.receive(8000)

        uncut = answered(Offload.CSUM | Offload.TSO4)
        assert max(len(frame) for _, frame in uncut) > 1514
        for header, frame in uncut:
            flags, gso, hdr_len, gso_size, start, offset, buffers = NET_HDR.unpack(header)
            assert (flags, start, offset, buffers) == (HdrFlag.NEEDS_CSUM, 34, 16, 0)
            if len(frame) > 1514:
                assert (gso, hdr_len >= 54) == (HdrGso.TCPV4, True)
                assert 500 < gso_size <= 1460
        for header, frame in answered(Offload.CSUM):
            assert header[:2] == b"\1\0"
            assert len(frame) <= 1514
        for header, frame in answered(Offload.NONE):
            assert header == PLAIN
            assert len(frame) <= 1514
            tcp_length = len(frame) - 34
            assert total(struct.pack(">H", pseudo(6, tcp_length)) + frame[34:]) == 0xFFFF
        assert max(len(f) for _, f in answered(Offload.CSUM | Offload.TSO4)) > 1514
    assert snmp(namespace, "Tcp", "InCsumErrors") == 0
    assert snmp(namespace, "Tcp", "InErrs") == 0


@needs_tap
def test_udp_datagrams_go_uncut_into_the_kernel(namespace: str, tap: LinuxTap) -> None:
    if not tap.accepts & Offload.USO4:
        pytest.skip("this kernel has no USO")
    header = NET_HDR.pack(HdrFlag.NEEDS_CSUM, HdrGso.UDP_L4, 42, 500, 34, 6, 0)
    with udp_socket(namespace) as endpoint:
        frame = udp(5000, endpoint.getsockname()[1], bytes(1200), partial=True)
        assert tap.ports[0].write_burst([[header, frame]]) == 1
        assert [len(endpoint.recv(2000)) for _ in range(3)] == [500, 500, 200]
    assert not tap.ports[0].dropped


@needs_tap
def test_frames_that_wait_while_offloads_are_given_up_are_read_whole(
    namespace: str, tap: LinuxTap
) -> None:
    """Defect: they were dropped as longer than the MTU lets a frame be."""
    if not tap.accepts & Offload.USO4:
        pytest.skip("this kernel has no USO")
    port, room = tap.ports[0], PlacesOfAnySize()
    tap.request_offloads(ALL)
    with udp_socket(namespace) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1400)
        sender.sendto(bytes(14_000), (OURS, 7000))
        tap.request_offloads(Offload.NONE)
        sender.sendto(bytes(2800), (OURS, 7000))
        assert port.read_burst(room, 64) == 3
        assert [length - 54 for length in room.lengths] == [14_000, 1400, 1400]
        assert port.read_burst(room, 64) == 0
        sender.sendto(bytes(1400), (OURS, 7000))
        assert port.read_burst(room, 64) == 1
    assert room.asked_for[0] > 14_000 > room.asked_for[-1]
    assert not port.dropped


# --- queues --------------------------------------------------------------------------------------


@needs_tap
def test_frames_of_a_flow_come_back_on_the_queue_that_it_uses(namespace: str) -> None:
    with closing(LinuxTap("tl%d", queues=3, namespace=namespace)) as tap:
        configure(namespace, tap)
        assert len(tap.ports) == 3
        rooms = [PieceRoom() for _ in tap.ports]
        with udp_socket(namespace) as endpoint:
            target = endpoint.getsockname()[1]
            for index, port in enumerate(tap.ports):
                port.write_burst([[PLAIN, udp(6000 + index, target, b"hello")]])
                data, source = endpoint.recvfrom(100)
                assert (data, source[1]) == (b"hello", 6000 + index)
                endpoint.sendto(b"answer", source)
                receive(port, rooms[index], lambda room=rooms[index]: bool(room.frames))  # type: ignore[misc]


@needs_tap
def test_detached_queues_neither_take_nor_give(namespace: str) -> None:
    with closing(LinuxTap("tl%d", queues=2, namespace=namespace)) as tap:
        configure(namespace, tap)
        first, second = tap.ports
        room = PieceRoom()
        with udp_socket(namespace) as endpoint:
            target = endpoint.getsockname()[1]
            tap.activate_ports(1)
            tap.activate_ports(1)
            assert [port.active for port in tap.ports] == [True, False]
            assert second.write_burst([[PLAIN, udp(6001, target, b"lost")]]) == 1
            assert second.dropped == {"inactive": 1}
            for number in range(20):
                endpoint.sendto(b"x", (OURS, 7000 + number))
            assert second.read_burst(room, 64) == 0
            receive(first, room, lambda: len(room.frames) == 20)
            tap.activate_ports(2)
            second.write_burst([[PLAIN, udp(6001, target, b"back")]])
            data, source = endpoint.recvfrom(100)
            assert data == b"back"
            endpoint.sendto(b"answer", source)
            receive(second, room, lambda: len(room.frames) == 21)


@needs_tap
def test_queues_that_another_process_attached_or_detached_are_as_wanted(namespace: str) -> None:
    """A worker that was killed leaves the queues that it shares with its helper as they are."""
    with closing(LinuxTap("tl%d", queues=2, namespace=namespace)) as tap:
        second = tap.ports[1]
        for active, done in ((False, 0x400), (True, 0x200)):  # IFF_DETACH_QUEUE, IFF_ATTACH_QUEUE
            fcntl.ioctl(second.fileno(), tap_linux.TUNSETQUEUE, struct.pack("16sH22x", b"", done))
            tap.activate_ports(2 if active else 1)
            assert second.active == active


@needs_tap
def test_only_the_queues_that_there_are_can_be_used(tap: LinuxTap) -> None:
    for count in (0, 2):
        with pytest.raises(UsageError, match="has 1 queues"):
            tap.activate_ports(count)
    tap.activate_ports(1)


# --- the interface's state -----------------------------------------------------------------------


@needs_tap
def test_mtu_link_state_and_carrier(namespace: str, tap: LinuxTap) -> None:
    def shown() -> set[str]:
        (link,) = json.loads(ip("-j", "-n", namespace, "link", "show", tap.name))
        return set(link["flags"])

    assert tap.is_up
    ip("-n", namespace, "link", "set", tap.name, "mtu", "2000")
    assert tap.mtu == 2000
    tap.set_mtu(1400)
    assert (tap.mtu, tap.max_frame) == (1400, 1422)
    tap.set_up(False)
    assert not tap.is_up
    assert "UP" not in shown()
    tap.set_up(True)
    assert tap.is_up
    tap.set_carrier(False)
    assert "NO-CARRIER" in shown()
    tap.set_carrier(True)
    assert "NO-CARRIER" not in shown()


@needs_tap
def test_a_tap_is_found_again_when_it_is_moved_to_another_namespace(
    namespace: str, tap: LinuxTap
) -> None:
    other = f"{namespace}b"
    ip("netns", "add", other)
    try:
        ip("-n", other, "tuntap", "add", "decoy", "mode", "tap")
        ip("-n", namespace, "link", "set", tap.name, "netns", other)
        ip("-n", other, "link", "set", tap.name, "mtu", "1234")
        ip("-n", namespace, "tuntap", "add", tap.name, "mode", "tap")  # of the same name
        assert tap.mtu == 1234
        tap.set_up(True)
        assert tap.is_up
    finally:
        with contextlib.suppress(AssertionError):
            ip("-n", other, "link", "del", tap.name)
        ip("netns", "del", other)


@needs_tap
def test_a_tap_in_another_namespace_is_looked_at_without_cap_sys_admin(
    namespace: str, tap: LinuxTap
) -> None:
    """A helper that keeps CAP_NET_ADMIN for its taps needs no more to follow them."""
    ip("-n", namespace, "link", "set", tap.name, "mtu", "1234", "up")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            capabilities.keep_only(Libc(), {capabilities.CAP_NET_ADMIN})
            status = 0 if (tap.mtu, tap.is_up) == (1234, True) else 2
            with pytest.raises(PermissionError):  # it could not have gone there
                tap.set_mtu(1500)
        except BaseException:
            status = 3
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@needs_tap
def test_an_interface_that_another_namespace_does_not_have_is_an_error(namespace: str) -> None:
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert interface_in(fd, "lo").mtu == 65536
        with pytest.raises(OSError) as refusal:
            interface_in(fd, "vqnone0")
        assert refusal.value.errno == errno.ENODEV
    finally:
        os.close(fd)


@needs_tap
def test_closing_gives_all_back_and_may_be_repeated(namespace: str) -> None:
    before = open_fds()
    tap = LinuxTap("tl%d", queues=4, namespace=namespace)
    assert len(open_fds()) > len(before)
    tap.close()
    tap.close()
    assert open_fds() == before
    assert "tl0" not in ip("-n", namespace, "link")


# --- vq.tap --------------------------------------------------------------------------------------


@needs_tap
def test_open_tap_is_linuxes_here(namespace: str) -> None:
    with closing(inside(namespace, lambda: open_tap("tl%d", queues=2))) as tap:
        assert isinstance(tap, LinuxTap)
        assert len(tap.ports) == 2
        assert tap.mtu == 1500


def test_where_no_tap_is_known_the_error_says_which_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "netbsd10")
    with pytest.raises(UsageError, match=r"Linux, OpenBSD and FreeBSD, not those of netbsd10"):
        open_tap("tap0")
    for system in ("openbsd7", "freebsd14"):
        monkeypatch.setattr(sys, "platform", system)
        with pytest.raises(UsageError, match="a tap has one queue"):
            open_tap("tap0", queues=2)


# --- short frames, many at a time ----------------------------------------------------------------


class LendingRoom:
    """Lends a small place for each of several frames, and nothing for frames one by one."""

    def __init__(self, size: int, count: int = 200) -> None:
        self.size = size
        self.memory = [(ctypes.c_ubyte * size)() for _ in range(count)]
        self.lengths: list[int] = []
        self.completes = True

    looks_at = 12

    def lend_apart(self, limit: int) -> Places:
        free = self.memory[len(self.lengths) :][:limit]
        addresses = array("Q", map(ctypes.addressof, free))
        return addresses, array("I", [self.size] * len(free))

    def commit_apart(self, lengths: array[int], starts: memoryview) -> bool:
        assert len(starts) == 12 * len(lengths)
        assert bytes(starts) == bytes(len(starts))
        starts[10::12] = b"\7" * len(lengths)
        self.lengths += lengths
        return self.completes

    def commit_private(self, frame: Frame) -> None:
        raise AssertionError("it fits its place")

    def lend_together(self, longest: int) -> None:
        return None

    def commit_together(self, length: int) -> None:
        raise AssertionError("nothing was lent for it")

    def lend_alone(self) -> Sequence[memoryview]:
        return ()

    def commit_alone(self, length: int) -> None:
        raise AssertionError("nothing was lent for it")

    def views(self) -> list[memoryview]:
        return []

    def commit(self, header: bytes, length: int) -> None:
        raise AssertionError("no room was lent for it")

    @property
    def frames(self) -> list[bytes]:
        pairs = zip(self.memory, self.lengths, strict=False)
        return [bytes(place)[:length] for place, length in pairs]


def outbox_of(tap: LinuxTap) -> Outbox:
    outbox = tap.ports[0].outbox
    if outbox is None:
        unmet("this kernel has no io_uring for us")
    return outbox


def take(outbox: Outbox, frames: Sequence[bytes]) -> array[int]:
    """Has the outbox take frames that lie apart in memory; returns their lengths."""
    buffers = [ctypes.create_string_buffer(frame, len(frame)) for frame in frames]
    lengths = array("I", map(len, frames))
    taken = outbox.take(array("Q", map(ctypes.addressof, buffers)), lengths, sum(lengths))
    assert taken.tolist() == [int.from_bytes(frame[:4], sys.byteorder) for frame in frames]
    return lengths


def take_alike(outbox: Outbox, frames: Sequence[bytes]) -> tuple[int, int]:
    """The same for frames of one length; returns what `send_alike` is to be told."""
    buffers = [ctypes.create_string_buffer(frame, len(frame)) for frame in frames]
    count, length = len(frames), len(frames[0])
    vectors = b"".join(struct.pack("@PN", ctypes.addressof(b), length) for b in buffers)
    taken = outbox.take_alike(vectors, count, length)
    assert taken.tolist() == [int.from_bytes(frame[:4], sys.byteorder) for frame in frames]
    return count, length


@needs_tap
@pytest.mark.parametrize("count", [1, 3, 64, 128])
def test_a_burst_of_frames_of_one_length_arrives_in_its_order(
    namespace: str, tap: LinuxTap, count: int
) -> None:
    """Again and again, at each offset in a word, and with others in between."""
    outbox = outbox_of(tap)
    with udp_socket(namespace) as endpoint:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        port = endpoint.getsockname()[1]
        for turn in range(9):
            few = count - (turn % 4 == 1)  # then more of the same length
            padding = b"x" * ((turn + 1) // 2 * 5)
            texts = [b"%03d of %03d %s" % (n, turn, padding) for n in range(few)]
            frames = [PLAIN + udp(5000, port, text) for text in texts]
            if frames:
                assert outbox.send_alike(*take_alike(outbox, frames)) == few
            assert [endpoint.recv(2000) for _ in texts] == texts
            if turn in (5, 7):
                others = [b"in between", b"of another", b"length"]
                lengths = take(outbox, [PLAIN + udp(5000, port, text) for text in others])
                assert outbox.send(lengths) == len(others)
                assert [endpoint.recv(2000) for _ in others] == others
            if turn == 3:  # it knows nothing of its entries any more
                tap.ports[0].was_used_elsewhere()
                assert tap.ports[0]._batches is not None
                tap.ports[0]._batches.ring.addresses[:128] = array("Q", [0]) * 128
    assert not tap.ports[0].dropped


@needs_tap
@pytest.mark.parametrize("count", [1, 3, 64, 128])
def test_a_burst_of_short_frames_arrives_in_its_order(
    namespace: str, tap: LinuxTap, count: int
) -> None:
    """Again and again, so that the rings that the kernel shares go round."""
    outbox = outbox_of(tap)
    with udp_socket(namespace) as endpoint:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        port = endpoint.getsockname()[1]
        for turn in range(7):
            texts = [b"%d of %d %s" % (n, turn, b"x" * (n * turn)) for n in range(count)]
            lengths = take(outbox, [PLAIN + udp(5000, port, text) for text in texts])
            assert outbox.send(lengths) == count
            assert [endpoint.recv(2000) for _ in texts] == texts
    assert not tap.ports[0].dropped


@needs_tap
def test_frames_of_a_burst_that_the_kernel_refuses_are_counted(
    namespace: str, tap: LinuxTap
) -> None:
    outbox = outbox_of(tap)
    bad = NET_HDR.pack(0, 0x77, 0, 0, 0, 0, 0)
    with udp_socket(namespace) as endpoint:
        good = udp(5000, endpoint.getsockname()[1], b"good")
        lengths = take(outbox, [bad + good, PLAIN + good, bad + good])
        assert outbox.send(lengths) == 3
        assert endpoint.recv(100) == b"good"
        assert outbox.send_alike(*take_alike(outbox, [PLAIN + good, bad + good])) == 2
        assert endpoint.recv(100) == b"good"
    assert tap.ports[0].dropped == {"bad header": 3}
    tap.set_up(False)
    assert outbox.send(take(outbox, [PLAIN + bytes(60)] * 3)) == 3
    assert outbox.send_alike(*take_alike(outbox, [PLAIN + bytes(60)] * 3)) == 3
    assert tap.ports[0].dropped == {"bad header": 3, "interface down": 6}


@needs_tap
@pytest.mark.parametrize("way", ["copied", "alike", "in place"])
@pytest.mark.parametrize(
    ("answers", "dealt_with", "dropped"),
    [
        ([26, 26, -errno.EAGAIN, -errno.EAGAIN], 2, {}),
        ([-errno.EAGAIN] * 4, 0, {}),
        ([26, -errno.EAGAIN, 26, -errno.EAGAIN], 3, {"full": 1}),
        ([-errno.ENOMEM, 26, -errno.ENOBUFS, 26], 4, {"no memory": 2}),
        ([12 + MAX_FRAME, 26, 12 + MAX_FRAME, 26], 4, {}),
        ([26, 26], 2, {}),  # the kernel would not start more
    ],
)
def test_what_a_full_tap_did_not_take_of_a_burst_is_left_with_the_caller(
    tap: LinuxTap,
    answers: list[int],
    dealt_with: int,
    dropped: dict[str, int],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But nothing is sent behind a frame that came after it."""
    outbox = outbox_of(tap)
    for name in ("submit", "submit_alike"):
        monkeypatch.setattr(RequestRing, name, lambda *_: array("i", answers))
    if way == "in place":
        assert send_in_place(outbox, [[PLAIN, bytes(14)]] * 4) == dealt_with
    elif way == "alike":
        assert outbox.send_alike(*take_alike(outbox, [PLAIN + bytes(14)] * 4)) == dealt_with
    else:
        assert outbox.send(take(outbox, [PLAIN + bytes(14)] * 4)) == dealt_with
    assert tap.ports[0].dropped == dropped


@needs_tap
def test_a_deleted_tap_is_an_error_for_bursts_too(namespace: str, tap: LinuxTap) -> None:
    outbox = outbox_of(tap)
    ip("-n", namespace, "link", "del", tap.name)
    with pytest.raises(OSError, match="the tap is gone"):
        outbox.send(take(outbox, [PLAIN + bytes(60)]))
    with pytest.raises(OSError, match="the tap is gone"):
        outbox.send_alike(*take_alike(outbox, [PLAIN + bytes(60)]))
    tap.ports[0].longest = 1522
    with pytest.raises(OSError, match="the tap is gone"):
        tap.ports[0].read_burst(LendingRoom(2000), 64)


@needs_tap
def test_memory_that_is_not_there_is_an_error_and_nothing_is_sent(tap: LinuxTap) -> None:
    """As when a guest's file was cut short: a signal would end the process."""
    outbox = outbox_of(tap)
    with pytest.raises(OSError, match="Bad address"):
        outbox.take(array("Q", [1 << 20]), array("I", [64]), 64)
    present = ctypes.create_string_buffer(64)
    with pytest.raises(OSError, match="Bad address"):
        addresses = array("Q", [ctypes.addressof(present), 1 << 20])
        outbox.take(addresses, array("I", [64, 64]), 128)


# --- frames in several pieces, many at a time ----------------------------------------------------

NOWHERE = 1 << 12  # no process has memory there


def send_in_place(
    outbox: Outbox, frames: Sequence[Frame], *, missing: tuple[int, int] | None = None
) -> int:
    """Has the outbox send frames whose first pieces are private and the others anywhere.

    The piece ``missing[1]`` of the frame ``missing[0]`` is not in this process' memory.
    """
    kept, addresses, lengths = [], [], []
    for number, (start, *pieces) in enumerate(frames):
        room = START_ROOM * number
        outbox.starts[room : room + len(start)] = bytes(start)
        addresses.append(outbox.starts_address + room)
        kept += [ctypes.create_string_buffer(bytes(piece), len(piece)) for piece in pieces]
        addresses += map(ctypes.addressof, kept[len(kept) - len(pieces) :])
        lengths += map(len, (start, *pieces))
        if missing is not None and missing[0] == number:
            addresses[missing[1] - 1 - len(pieces)] = NOWHERE
    vectors = array("Q", itertools.chain.from_iterable(zip(addresses, lengths, strict=True)))
    return outbox.send_in_place(vectors, [len(frame) for frame in frames])


def cut_up(data: bytes, *places: int) -> list[bytes]:
    return [data[a:b] for a, b in itertools.pairwise((0, *places, len(data)))]


@needs_tap
@pytest.mark.parametrize("count", [1, 3, 64, 128])
def test_a_burst_of_frames_in_pieces_arrives_in_its_order(
    namespace: str, tap: LinuxTap, count: int
) -> None:
    """Again and again, with other numbers of pieces and of frames, and with others in between."""
    outbox = outbox_of(tap)
    with udp_socket(namespace) as endpoint:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        port = endpoint.getsockname()[1]
        for turn in range(8):
            texts = [b"%d of %d %s" % (n, turn, b"x" * (n * turn)) for n in range(count - turn % 2)]
            frames = []
            for n, text in enumerate(texts):
                frame = udp(5000, port, text)
                places = sorted({1 + (n * turn + 7 * k) % (len(frame) - 1) for k in range(turn)})
                frames.append([PLAIN, *cut_up(frame, *places)])
            if frames:
                assert send_in_place(outbox, frames) == len(frames)
            assert [endpoint.recv(2000) for _ in texts] == texts
            assert outbox.send(take(outbox, [PLAIN + udp(5000, port, b"between")] * 2)) == 2
            assert [endpoint.recv(2000) for _ in range(2)] == [b"between"] * 2
    assert not tap.ports[0].dropped


@needs_tap
def test_the_most_pieces_that_an_outbox_is_given_arrive(namespace: str, tap: LinuxTap) -> None:
    outbox = outbox_of(tap)
    each = MOST_PIECES // MOST_AT_ONCE
    with udp_socket(namespace) as endpoint:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        port = endpoint.getsockname()[1]
        texts = [b"%d " % n * 40 for n in range(MOST_AT_ONCE)]
        for text in texts:
            assert len(text) > each
        frames = [
            [PLAIN, *cut_up(udp(5000, port, text), *range(10, 10 + each - 2))] for text in texts
        ]
        assert sum(map(len, frames)) == MOST_PIECES
        assert send_in_place(outbox, frames) == MOST_AT_ONCE
        assert [endpoint.recv(2000) for _ in texts] == texts


@needs_tap
def test_frames_in_pieces_that_the_kernel_refuses_are_counted(
    namespace: str, tap: LinuxTap
) -> None:
    outbox = outbox_of(tap)
    bad = NET_HDR.pack(0, 0x77, 0, 0, 0, 0, 0)
    beyond = NET_HDR.pack(HdrFlag.NEEDS_CSUM, 0, 0, 0, 60000, 6, 0)
    with udp_socket(namespace) as endpoint:
        good = cut_up(udp(5000, endpoint.getsockname()[1], b"good"), 20, 30)
        frames: list[Frame] = [[bad, *good], [PLAIN, *good], [beyond, *good], [PLAIN, *good]]
        assert send_in_place(outbox, frames) == 4
        assert [endpoint.recv(100), endpoint.recv(100)] == [b"good"] * 2
    assert tap.ports[0].dropped == {"bad header": 2}
    tap.set_up(False)
    assert send_in_place(outbox, [[PLAIN, bytes(14), bytes(60)]] * 3) == 3
    assert tap.ports[0].dropped == {"bad header": 2, "interface down": 3}


@needs_tap
def test_a_queue_that_is_really_full_takes_the_first_frames() -> None:
    """A socket with a limited send buffer is in the tap's place: whether a tap's is full depends on
    the host's network."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        near.setblocking(False)
        far.setblocking(False)
        port = LinuxTapPort(near.fileno(), lambda: None)
        if port.outbox is None:
            unmet("this kernel has no io_uring for us")
        frames: list[Frame] = [[PLAIN, b"%14d" % n, bytes(n)] for n in range(1, 129)]
        sent = send_in_place(port.outbox, frames)
        assert 0 < sent < 128
        for start, *pieces in frames[:sent]:
            assert far.recv(1000) == bytes(start) + b"".join(pieces)
        with pytest.raises(BlockingIOError):
            far.recv(1000)
        assert send_in_place(port.outbox, frames[sent : sent + 1]) == 1
        assert not port.dropped
        port.close()


@needs_tap
@pytest.mark.parametrize("missing", [(0, 1), (1, 2), (2, 1)])
def test_pieces_that_are_not_there_are_an_error(
    namespace: str, tap: LinuxTap, missing: tuple[int, int]
) -> None:
    """As when a guest's file was cut short; a signal would end the process."""
    outbox = outbox_of(tap)
    with udp_socket(namespace) as endpoint:
        port = endpoint.getsockname()[1]
        frames = [[PLAIN, *cut_up(udp(5000, port, b"%d" % n), 20)] for n in range(3)]
        with pytest.raises(OSError, match="Bad address"):
            send_in_place(outbox, frames, missing=missing)
        whole = [b"%d" % n for n in range(3) if n != missing[0]]
        assert [endpoint.recv(100) for _ in whole] == whole
        assert send_in_place(outbox, frames) == 3, "the outbox is still good"
        assert [endpoint.recv(100) for _ in frames] == [b"0", b"1", b"2"]


@needs_tap
def test_a_deleted_tap_is_an_error_for_frames_in_pieces_too(namespace: str, tap: LinuxTap) -> None:
    outbox = outbox_of(tap)
    ip("-n", namespace, "link", "del", tap.name)
    with pytest.raises(OSError, match="the tap is gone"):
        send_in_place(outbox, [[PLAIN, bytes(14), bytes(60)]])


@needs_tap
def test_a_detached_queue_drops_bursts(namespace: str) -> None:
    with closing(LinuxTap("tl%d", namespace=namespace, queues=2)) as tap:
        outbox = tap.ports[1].outbox
        if outbox is None:
            unmet("this kernel has no io_uring for us")
        tap.activate_ports(1)
        assert send_in_place(outbox, [[PLAIN, bytes(14), bytes(60)]] * 3) == 3
        assert outbox.send(take(outbox, [PLAIN + bytes(60)] * 2)) == 2
        assert outbox.send_alike(*take_alike(outbox, [PLAIN + bytes(60)] * 2)) == 2
        assert tap.ports[1].dropped == {"inactive": 7}


@needs_tap
def test_where_io_uring_is_forbidden_later_on_frames_in_pieces_are_left_with_the_caller(
    tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> list[int]:
        raise PermissionError(errno.EPERM, "io_uring: not permitted")

    outbox, port = outbox_of(tap), tap.ports[0]
    monkeypatch.setattr(RequestRing, "submit", forbidden)
    assert send_in_place(outbox, [[PLAIN, bytes(14), bytes(60)]] * 3) == 0
    assert port.outbox is None and not port.dropped


class TalkInPlace(Talk):
    """Sends in place: all headers private, the data in many pieces."""

    def send(self, flags: int, data: bytes = b"", mss: int = 0) -> None:
        header, frame = tcp(self.PORTS, self.sequence, self.acked, flags, data, mss=mss)
        assert self.port.outbox is not None
        pieces = cut_up(frame[54:], *range(4096, len(frame) - 54, 4096))
        whole = [header + frame[:54], *(piece for piece in pieces if piece)]
        assert send_in_place(self.port.outbox, [whole]) == 1
        assert not self.port.dropped
        self.sequence += len(data)


@needs_tap
def test_the_kernel_segments_what_it_fetched_in_place(namespace: str, tap: LinuxTap) -> None:
    outbox_of(tap)
    with closing(TalkInPlace(namespace, tap)) as talk:
        data = os.urandom(60000)
        talk.send(0x18, data, mss=1400)
        got = b""
        while len(got) < len(data):
            got += talk.peer.recv(len(data))
        assert got == data
    assert snmp(namespace, "Tcp", "InCsumErrors") == 0
    assert snmp(namespace, "Tcp", "InErrs") == 0


# --- short frames to a guest, many at a time -----------------------------------------------------


@needs_tap
def test_short_frames_are_read_in_their_order_many_at_a_time(namespace: str, tap: LinuxTap) -> None:
    outbox_of(tap)
    room = LendingRoom(1600)
    port = tap.ports[0]
    port.longest = 1522
    assert port.read_burst(room, 64) == 0
    texts = [bytes([n]) * (n + 1) for n in range(150)]
    with udp_socket(namespace) as endpoint:
        for text in texts:
            endpoint.sendto(text, (OURS, 7000))
    assert port.read_burst(room, 64) == 64
    room.completes = False
    assert port.read_burst(room, 9) == 9
    room.completes = True
    assert port.read_burst(room, 128) == 77
    assert port.read_burst(room, 64) == 0
    assert [frame[54:] for frame in room.frames] == texts
    completed = [frame[:12] == bytes(10) + b"\7\0" for frame in room.frames]
    assert completed == [True] * 64 + [False] * 9 + [True] * 77


@needs_tap
def test_a_frame_longer_than_its_place_is_dropped_and_not_handed_over_cut(
    namespace: str, tap: LinuxTap
) -> None:
    """When the host raised the MTU in the meantime: a tap cuts silently."""
    outbox_of(tap)
    port = tap.ports[0]
    tap.set_mtu(3000)
    port.longest = 187  # 12 and a byte more make 200
    room = LendingRoom(200)
    with udp_socket(namespace) as endpoint:
        for size in (20, 145, 146, 500, 30):  # 42 bytes of headers
            endpoint.sendto(bytes([size & 0xFF]) * size, (OURS, 7000))
    assert port.read_burst(room, 8) == 3
    assert [frame[54:] for frame in room.frames] == [b"\24" * 20, b"\x91" * 145, b"\36" * 30]
    assert port.dropped == {"too long": 2}
    assert port.longest == 3022


@needs_tap
def test_a_frame_moves_up_into_no_place_that_is_too_small_for_it(
    namespace: str, tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's buffers need not be alike, and a raised MTU makes frames longer than expected.

    One that was cut made room in front of one that fitted where it lay; that one was moved up,
    over the end of the smaller buffer and whatever stood behind.
    """
    outbox_of(tap)
    port = tap.ports[0]
    tap.set_mtu(3000)
    port.longest = 100
    room = LendingRoom(0)
    sizes = (200, 2000, 200, 2000)
    whole = (ctypes.c_ubyte * sum(sizes))()
    starts = list(itertools.accumulate(sizes[:-1], initial=ctypes.addressof(whole)))
    room.memory = [
        (ctypes.c_ubyte * size).from_address(start)
        for size, start in zip(sizes, starts, strict=True)
    ]

    def lend_apart(*_: int) -> Places:
        lent = len(room.lengths)
        return array("Q", starts[lent:]), array("I", sizes[lent:])

    monkeypatch.setattr(room, "lend_apart", lend_apart)
    with udp_socket(namespace) as endpoint:
        for size in (900, 1000, 20, 30):  # cut; whole, where it lies; two that fit anywhere
            endpoint.sendto(bytes([size & 0xFF]) * size, (OURS, 7000))
    assert port.read_burst(room, 8) == 2
    assert [frame[54:] for frame in room.frames] == [b"\24" * 20, b"\36" * 30]
    assert port.dropped == {"too long": 2}
    assert bytes(whole)[200 + 12 + 72 : 200 + 1054] == b"\xe8" * 970  # nothing over its end


@needs_tap
def test_a_frame_that_comes_after_there_had_been_none_moves_up(
    tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of a burst finds out by itself whether a frame waits."""
    outbox_of(tap)
    room = LendingRoom(100)

    def submit(*_: object) -> array[int]:
        for number, place in enumerate(room.memory[:4]):
            place[12:] = bytes([number]) * 88
        return array("i", [72, -errno.EAGAIN, 73, 74, *[-errno.EAGAIN] * 4])

    monkeypatch.setattr(RequestRing, "submit", submit)
    tap.ports[0].longest = 80
    assert tap.ports[0].read_burst(room, 8) == 3
    assert [frame[12:] for frame in room.frames] == [b"\0" * 60, b"\2" * 61, b"\3" * 62]


@needs_tap
@pytest.mark.parametrize("alike", [False, True])
def test_where_io_uring_is_forbidden_later_on_frames_go_one_by_one_from_then_on(
    namespace: str, tap: LinuxTap, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sandbox may do to a process that has opened its tap."""

    def forbidden(*_: object) -> list[int]:
        raise PermissionError(errno.EPERM, "io_uring: not permitted")

    outbox, port = outbox_of(tap), tap.ports[0]
    monkeypatch.setattr(RequestRing, "submit", forbidden)
    monkeypatch.setattr(RequestRing, "submit_alike", forbidden)
    frames = [PLAIN + bytes(60)] * 3
    if alike:
        assert outbox.send_alike(*take_alike(outbox, frames)) == 0
    else:
        assert outbox.send(take(outbox, frames)) == 0
    assert port.outbox is None and not port.dropped
    room = PieceRoom()
    with udp_socket(namespace) as endpoint:
        assert port.write_burst([[PLAIN, udp(5000, endpoint.getsockname()[1], b"hello")]]) == 1
        assert endpoint.recv(100) == b"hello"
        endpoint.sendto(b"and back", (OURS, 7000))
        receive(port, room, lambda: len(room.frames) == 1)


class SpillingRoom(LendingRoom):
    """Places for short frames; others are kept as they are brought."""

    def __init__(self, size: int = 200) -> None:
        super().__init__(size, 400)
        self.order: list[bytes] = []

    looks_at = 28

    def commit_apart(self, lengths: array[int], starts: memoryview) -> bool:
        assert len(starts) == 28 * len(lengths)
        for number, length in enumerate(lengths):
            place = bytes(self.memory[len(self.lengths)])
            assert starts[28 * number : 28 * (number + 1)] == place[:28]
            self.order.append(place[:length])
            self.lengths.append(length)
        return False

    def commit_private(self, frame: Frame) -> None:
        assert isinstance(frame[0], bytes) and len(frame[0]) == 12
        self.order.append(b"".join(frame))

    def lend_together(self, longest: int) -> tuple[IoVectors, int, int]:  # type: ignore[override]
        self.vectors = IoVectors(1)
        self.place = (ctypes.c_ubyte * (longest + 13))()
        self.vectors.put(0, [ctypes.addressof(self.place)], [longest + 13])
        return self.vectors, 0, 1

    def commit_together(self, length: int) -> None:
        self.order.append(bytes(self.place)[:length])


def after_short_ones(namespace: str, tap: LinuxTap) -> tuple[LinuxTapPort, SpillingRoom]:
    """A port that has had many short frames, though long ones may come."""
    outbox_of(tap)
    tap.request_offloads(ALL)
    port, room = tap.ports[0], SpillingRoom()
    assert port.longest > 65536
    with udp_socket(namespace) as sender:
        for _ in range(tap_linux_port._MANY_SHORT):
            sender.sendto(b"short", (OURS, 7000))
    receive(port, room, lambda: len(room.order) == tap_linux_port._MANY_SHORT)
    assert not room.lengths, "one at a time so far"
    room.order.clear()
    return port, room


@needs_tap
@pytest.mark.parametrize(
    "sizes",
    [
        [10] * 100,
        [145, 146, 147] * 5,  # 12 + 42 bytes of headers: one fits, one is as long, one is longer
        [10] * 5 + [1400] + [10] * 5,
        [1400] * 10,
        [20, 1400, 20] * 20,
    ],
)
def test_after_many_short_frames_some_are_read_at_a_time_and_longer_ones_arrive_whole(
    namespace: str, tap: LinuxTap, sizes: list[int]
) -> None:
    port, room = after_short_ones(namespace, tap)
    texts = [b"%4d" % n + bytes([n]) * (size - 4) for n, size in enumerate(sizes)]
    with udp_socket(namespace) as sender:
        for text in texts:
            sender.sendto(text, (OURS, 7000))
    receive(port, room, lambda: len(room.order) == len(texts))
    assert [frame[54:] for frame in room.order] == texts
    assert room.lengths or sizes[0] > 145, "the short ones at the start stand in their places"
    assert not port.dropped


@needs_tap
def test_segments_of_64_kib_among_short_frames_arrive_whole(namespace: str, tap: LinuxTap) -> None:
    """With the longest that a kernel makes: nothing of them is cut by the place or the spill."""
    port, room = after_short_ones(namespace, tap)
    short = bytes.fromhex("0200000000ff0200000000ee88b5") + bytes(46)
    header, segments = tcp((7001, 7002), 1, 1, 0x10, os.urandom(65535 - 54), mss=1400)
    with inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as sender:
        sender.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR: packet(7)
        sender.bind((tap.name, 0))
        for head, frame in [(PLAIN, short)] * 9 + [(header, segments), (PLAIN, short)]:
            sender.send(head[:10] + frame)
    receive(port, room, lambda: len(room.order) == 11)
    assert [frame[12:] for frame in room.order] == [*[short] * 9, segments, short]
    assert len(room.lengths) == 9
    with udp_socket(namespace) as endpoint:
        endpoint.sendto(b"short again", (OURS, 7000))
    receive(port, room, lambda: len(room.order) == 12)
    assert len(room.lengths) == 9, "there may be more long ones: one at a time for a while"
    assert NET_HDR.unpack(room.order[9][:12])[:3] == NET_HDR.unpack(header)[:3]
    assert not port.dropped


@needs_tap
def test_frames_that_come_after_there_had_been_none_keep_their_order_when_spilling(
    namespace: str, tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of a burst finds out by itself whether a frame waits."""
    port, room = after_short_ones(namespace, tap)

    def submit(*_: object) -> array[int]:
        for number, place in enumerate(room.memory[:5]):
            place[12:] = bytes([number]) * 188
        return array("i", [72, -errno.EAGAIN, 73, 74, *[-errno.EAGAIN] * 4])

    monkeypatch.setattr(RequestRing, "submit", submit)
    assert port.read_burst(room, 8) == 3
    assert [frame[12:] for frame in room.order] == [b"\0" * 60, b"\2" * 61, b"\3" * 62]
    assert room.lengths == [72]


@needs_tap
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN])
def test_errors_that_pass_end_a_burst_that_spills(
    namespace: str, tap: LinuxTap, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, room = after_short_ones(namespace, tap)
    monkeypatch.setattr(RequestRing, "submit", lambda *_: array("i", [72] + [-error] * 7))
    assert port.read_burst(room, 8) == 1
    monkeypatch.setattr(RequestRing, "submit", lambda *_: array("i", [-errno.EBADFD] * 8))
    port._short_ones = tap_linux_port._MANY_SHORT
    with pytest.raises(OSError, match="the tap is gone"):
        port.read_burst(room, 8)


@needs_tap
def test_a_frame_that_may_have_been_cut_by_its_spill_is_dropped(
    namespace: str, tap: LinuxTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody raised gso_max_size: from then on frames are read one by one, with enough room."""
    port, room = after_short_ones(namespace, tap)
    longest = tap_linux_port._LONGEST_SEGMENTED
    answers = array("i", [72, 12 + longest, 72, 72, *[-errno.EAGAIN] * 4])
    monkeypatch.setattr(RequestRing, "submit", lambda *_: answers)
    assert port.read_burst(room, 8) == 4
    assert list(map(len, room.order)) == [72, 12 + longest, 72, 72]
    port._short_ones = tap_linux_port._MANY_SHORT
    answers[1] += 1
    answers[4] = 72
    assert port.read_burst(room, 8) == 4
    assert port.dropped == {"too long": 1}
    assert port._short_ones == tap_linux_port._MANY_SHORT
    monkeypatch.undo()
    with udp_socket(namespace) as sender:
        sender.sendto(b"short", (OURS, 7000))
    room.order.clear()
    receive(port, room, lambda: len(room.order) == 1)
    assert room.lengths == [72, 72], "one by one"


@needs_tap
def test_as_many_as_there_are_spills_are_read_at_a_time(namespace: str, tap: LinuxTap) -> None:
    port, room = after_short_ones(namespace, tap)
    texts = [b"%4d" % n for n in range(150)]
    with udp_socket(namespace) as sender:
        for text in texts:
            sender.sendto(text, (OURS, 7000))
    assert port.read_burst(room, 128) == 128
    assert port.read_burst(room, 128) == 22
    assert [frame[54:] for frame in room.order] == texts
    assert len(room.lengths) == 150


@needs_tap
def test_where_few_come_at_a_time_they_are_read_one_by_one(namespace: str, tap: LinuxTap) -> None:
    """To ask for eight and get one takes half as long again as to read one."""
    port, room = after_short_ones(namespace, tap)
    assert port.read_burst(room, 64) == 0
    assert port._short_ones == tap_linux_port._MANY_SHORT, "that none came says nothing"
    with udp_socket(namespace) as sender:
        for number in range(40):
            sender.sendto(b"short", (OURS, 7000))
            receive(port, room, lambda: len(room.order) == number + 1)  # noqa: B023
    assert len(room.lengths) == 3, "tried again after sixteen"
    port._short_ones = tap_linux_port._MANY_SHORT
    with udp_socket(namespace) as sender:
        sender.sendto(bytes(1400), (OURS, 7000))
        receive(port, room, lambda: len(room.order) == 41)
    assert not port._short_ones, "after a long one it takes more of them"


@needs_tap
def test_a_long_frame_that_comes_alone_has_the_next_ones_read_alone(
    namespace: str, tap: LinuxTap
) -> None:
    port, room = after_short_ones(namespace, tap)
    port._short_ones = 0
    with udp_socket(namespace) as sender:
        for number in range(2 * tap_linux_port._MANY_SHORT):
            if number == tap_linux_port._MANY_SHORT - 1:
                tap.set_mtu(3000)
            size = 2000 if number == tap_linux_port._MANY_SHORT - 1 else 20
            sender.sendto(bytes(size), (OURS, 7000))
            receive(port, room, lambda: len(room.order) == number + 1)  # noqa: B023
    assert not room.lengths


class VectorRoom(LendingRoom):
    """Lends one place of a hundred bytes and a longer one behind it, for one frame at a time."""

    def __init__(self) -> None:
        super().__init__(100)
        self.behind = (ctypes.c_ubyte * 3000)()
        self.vectors = IoVectors(2)
        self.got: list[bytes] = []

    def lend_apart(self, limit: int) -> None:  # type: ignore[override]
        return None

    def lend_together(self, longest: int) -> tuple[IoVectors, int, int]:  # type: ignore[override]
        places = [ctypes.addressof(self.memory[0]), ctypes.addressof(self.behind)]
        self.vectors.put(0, places, [100, longest])
        return self.vectors, 0, 2

    def commit_together(self, length: int) -> None:
        self.got.append((bytes(self.memory[0]) + bytes(self.behind))[:length])


class PlacesOfAnySize(LendingRoom):
    """Lends what it is asked for."""

    def __init__(self) -> None:
        super().__init__(100)
        self.asked_for: list[int] = []
        self.vectors = IoVectors(1)

    def lend_apart(self, limit: int) -> None:  # type: ignore[override]
        return None

    def lend_together(self, longest: int) -> tuple[IoVectors, int, int]:  # type: ignore[override]
        self.asked_for.append(longest)
        self.place = (ctypes.c_ubyte * (longest + 13))()
        self.vectors.put(0, [ctypes.addressof(self.place)], [longest + 13])
        return self.vectors, 0, 1

    def commit_together(self, length: int) -> None:
        self.lengths.append(length)


@needs_tap
def test_a_frame_is_read_into_places_one_behind_another(namespace: str, tap: LinuxTap) -> None:
    """And what is longer than was asked for is not handed over, since it may have been cut."""
    port, room = tap.ports[0], VectorRoom()
    tap.set_mtu(3000)
    port.longest = 1000
    with udp_socket(namespace) as sender:
        for size in (10, 700, 958, 959, 20):  # 42 bytes of headers
            sender.sendto(bytes([size & 0xFF]) * size, (OURS, 7000))
    assert port.read_burst(room, 64) == 4
    assert [len(frame) - 54 for frame in room.got] == [10, 700, 958, 20]
    assert room.got[1][54:] == b"\xbc" * 700
    assert port.dropped == {"too long": 1} and port.longest == 3022
    assert port._longest_usual == tap_linux_port._LONGEST_SEGMENTED, "that is about segments"


class RoomForOne(VectorRoom):
    """The same, as views."""

    def lend_alone(self) -> Sequence[memoryview]:
        return [memoryview(self.memory[0]).cast("B"), memoryview(self.behind).cast("B")]

    def commit_alone(self, length: int) -> None:
        VectorRoom.commit_together(self, length)

    def commit_together(self, length: int) -> None:
        raise AssertionError("there was room for one")


@needs_tap
def test_a_frame_alone_is_read_into_the_views_that_were_prepared(
    namespace: str, tap: LinuxTap
) -> None:
    port, room = tap.ports[0], RoomForOne()
    tap.set_mtu(3000)
    assert port.read_burst(room, 1) == 0, "none waits"
    port.longest = 1000
    port._short_ones = 5
    with udp_socket(namespace) as sender:
        for size in (10, 958, 959, 2000, 20):  # 42 bytes of headers
            sender.sendto(bytes([size & 0xFF]) * size, (OURS, 7000))
    port.on_truncated = lambda: None
    assert [port.read_burst(room, 1) for _ in range(6)] == [1, 1, 0, 0, 1, 0]
    assert [len(frame) - 54 for frame in room.got] == [10, 958, 20]
    assert room.got[1][54:] == b"\xbe" * 958
    assert port.dropped == {"too long": 2} and port._short_ones == 8
    tap.set_mtu(40000)
    room.behind = (ctypes.c_ubyte * 40000)()
    port.longest = 40000
    with udp_socket(namespace) as sender:
        sender.sendto(bytes(20000), (OURS, 7000))
        assert port.read_burst(room, 1) == 1 and port.burst == 4 and port._short_ones == 0


@needs_tap
def test_a_deleted_tap_is_an_error_for_a_frame_alone_too(namespace: str, tap: LinuxTap) -> None:
    ip("-n", namespace, "link", "del", tap.name)
    with pytest.raises(OSError, match="the tap is gone"):
        tap.ports[0].read_burst(RoomForOne(), 1)
    with pytest.raises(OSError, match="the tap is gone"):
        tap.ports[0].read_burst(VectorRoom(), 1)


@needs_tap
def test_long_frames_are_best_read_few_at_a_time(namespace: str, tap: LinuxTap) -> None:
    port, room = tap.ports[0], PlacesOfAnySize()
    assert port.burst == 64
    tap.set_mtu(40000)
    with udp_socket(namespace) as sender:
        for size, burst in ((20, 64), (20000, 4), (16000, 64), (30000, 4), (30, 64)):
            sender.sendto(bytes(size), (OURS, 7000))
            assert port.read_burst(room, 1) == 1 and port.burst == burst


@needs_tap
def test_where_io_uring_is_forbidden_frames_go_one_by_one(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, "io_uring: not permitted")

    monkeypatch.setattr(tap_linux_port, "RequestRing", forbidden)
    with closing(LinuxTap("tl%d", namespace=namespace)) as tap:
        configure(namespace, tap)
        assert tap.ports[0].outbox is None
        with udp_socket(namespace) as endpoint:
            frame: Frame = [PLAIN, udp(5000, endpoint.getsockname()[1], b"hello")]
            assert tap.ports[0].write_burst([frame]) == 1
            assert endpoint.recv(100) == b"hello"


@needs_tap
def test_a_closed_tap_leaves_nothing_open_and_can_be_had_again(namespace: str) -> None:
    before = open_fds()
    for _ in range(3):
        with closing(LinuxTap("tlagain", namespace=namespace)):
            pass
    assert open_fds() == before
