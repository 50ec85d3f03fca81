"""The taps of OpenBSD and FreeBSD with real network stacks on both sides.

A pump (see `pump`) stands in the net device's place: on one side a Linux kernel plays the guest,
with checksums and segments left undone in what it sends and takes; on the other side is the
stand-in for the BSD kernel, whose tap is a Linux tap in a second namespace.

At the end a scripted guest and the net device itself take the pump's place.

VLANs need no help of Linux: the pump tags the guest's frames, and the BSD kernel has a vlan(4),
which here takes the tags off again before Linux sees the frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from net_frames import QINQ, UDP, VLAN, make_frame, make_payload
from pump import (
    HOST,
    VNET,
    Collected,
    Pump,
    ScriptedGuest,
    exchange,
    need_two_hosts,
    retag,
    run,
    two_namespaces,
    without,
)

from vq.abi import Feature, NetFeature
from vq.link import FrameBuffer, Link
from vq.net_driver import NET_DRIVER_FEATURES
from vq.offload import ALL, Offload
from vq.tap_bsd import FreeBsdTap, OpenBsdTap
from vq.testing.bsd_tap import FreeBsdKernel, OpenBsdKernel
from vq.tun_hdr import TUN_HDR


@pytest.fixture(autouse=True)
def two_hosts() -> None:
    need_two_hosts()


O_TAP = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


class Counting:
    """Mixed into a stand-in: notes the first two bytes of every header that goes through.

    With `tags` all that Linux sends and takes is in this VLAN, or in this VLAN in a VLAN.
    """

    def __init__(self, taps: dict[str, str], tags: bytes = b"") -> None:
        super().__init__(taps)  # type: ignore[call-arg]
        self.tags = tags
        self.written: Counter[int] = Counter()
        self.read: Counter[int] = Counter()

    def _read_linux(self, tap: object) -> bytes:
        raw: bytes = super()._read_linux(tap)  # type: ignore[misc]
        fields, data = retag(VNET.unpack_from(raw), raw[10:], b"", self.tags)
        return VNET.pack(*fields) + data

    def _write_linux(self, tap: object, header: bytes, frame: bytes | bytearray) -> None:
        fields, data = retag(VNET.unpack(header), bytes(frame), self.tags, b"")
        super()._write_linux(tap, VNET.pack(*fields), data)  # type: ignore[misc]

    def writev(self, fd: int, buffers: Sequence[FrameBuffer]) -> int:
        self.written[struct.unpack_from("=H", buffers[0])[0]] += 1
        return super().writev(fd, buffers)  # type: ignore[misc, no-any-return]

    def readv(self, fd: int, buffers: Sequence[bytearray | memoryview]) -> int:
        length: int = super().readv(fd, buffers)  # type: ignore[misc]
        self.read[struct.unpack_from("=H", buffers[0])[0]] += 1
        return length


class CountingOpenBsd(Counting, OpenBsdKernel):
    pass


class CountingFreeBsd(Counting, FreeBsdKernel):
    pass


@contextlib.contextmanager
def pumped(
    host: Link, guest_takes: Offload, guest_leaves: Offload, tags: bytes = b""
) -> Iterator[None]:
    """A guest that takes and leaves undone what it is told to."""

    def make_pump(guest: Link) -> Pump:
        guest.request_offloads(guest_leaves)
        return Pump(guest, host, guest_takes, tags)

    with two_namespaces(host, make_pump):
        yield


@pytest.mark.parametrize(
    "guest_leaves, guest_takes, tags",
    [
        pytest.param(ALL, ALL, b"", id="all"),
        pytest.param(ALL, Offload.NONE, b"", id="sent only"),
        pytest.param(Offload.NONE, ALL, b"", id="received only"),
        pytest.param(Offload.NONE, Offload.NONE, b"", id="none"),
        pytest.param(ALL, ALL, VLAN, id="all in a VLAN"),
        pytest.param(ALL, Offload.NONE, VLAN, id="sent only in a VLAN"),
        pytest.param(ALL, ALL, QINQ, id="all in two VLANs"),
        pytest.param(ALL, Offload.NONE, VLAN + VLAN, id="sent only in two VLANs"),
    ],
)
def test_openbsd_tcp_and_udp_with_offloads(
    guest_leaves: Offload, guest_takes: Offload, tags: bytes
) -> None:
    kernel = CountingOpenBsd({"tap0": HOST}, tags)
    link = OpenBsdTap("tap0", calls=kernel)
    link.request_offloads(ALL)  # what the guest takes less is finished by the pump
    with pumped(link, guest_takes, guest_leaves, tags):
        exchange()
    assert kernel.complaints == []
    assert not link.ports[0].dropped
    assert set(kernel.read) == {0, 0x200, 0x220, 0x400}
    if not guest_leaves or len(tags) > 4:
        assert set(kernel.written) == {0}
    else:
        moved = 0x10 if tags else 0
        assert set(kernel.written) == {0, 0x200 | moved, 0x220 | moved, 0x400 | moved}


def test_openbsd_the_guests_offloads_are_honoured_by_the_kernel() -> None:
    """The kernel leaves undone only what was asked for."""
    kernel = CountingOpenBsd({"tap0": HOST})
    link = OpenBsdTap("tap0", calls=kernel)
    with pumped(link, Offload.NONE, Offload.NONE):
        exchange()
        assert set(kernel.read) == {0}
        link.request_offloads(Offload.CSUM)
        exchange()
        assert set(kernel.read) == {0, 0x200, 0x400}
        link.request_offloads(Offload.NONE)
        kernel.read.clear()
        exchange()
        assert set(kernel.read) == {0}


def test_openbsd_tags_in_the_header_reach_the_guest() -> None:
    """The kernel has VLAN_HWTAGGING, which vq never asks for: the tag must survive all the same."""
    kernel = CountingOpenBsd({"tap0": HOST}, VLAN)
    link = OpenBsdTap("tap0", calls=kernel)
    kernel.ioctl(link.ports[0].fileno() or 0, kernel.TUNSCAP, struct.pack("=I", 0x31A6))
    with pumped(link, ALL, ALL, VLAN):
        exchange()
    assert set(kernel.read) == {0x10, 0x210, 0x230, 0x410}
    assert kernel.complaints == []


@pytest.mark.parametrize("kind", ["openbsd", "freebsd"])
def test_a_kernel_from_before_the_offload_ioctls_works_in_software(kind: str) -> None:
    kernel: OpenBsdKernel | FreeBsdKernel
    link: Link
    if kind == "openbsd":
        kernel = OpenBsdKernel({"tap0": HOST})
        kernel.offload_ioctls = False
        link = OpenBsdTap("tap0", calls=kernel)
    else:
        kernel = FreeBsdKernel({"tap0": HOST})
        kernel.offload_ioctls = False
        link = FreeBsdTap("tap0", calls=kernel)
    link.request_offloads(ALL)
    assert link.accepts == link.delivers == Offload.NONE
    with pumped(link, Offload.NONE, ALL):
        exchange()
    assert kernel.complaints == []


@pytest.mark.parametrize(
    "guest_takes, tags",
    [(ALL, b""), (Offload.NONE, b""), (ALL, VLAN), (Offload.NONE, QINQ), (ALL, VLAN + VLAN)],
    ids=["all", "sent only", "all in a VLAN", "sent only in two VLANs", "all in two VLANs"],
)
def test_freebsd_tcp_and_udp_with_offloads(guest_takes: Offload, tags: bytes) -> None:
    kernel = CountingFreeBsd({"tap0": HOST}, tags)
    link = FreeBsdTap("tap0", calls=kernel)
    link.request_offloads(ALL)
    with pumped(link, guest_takes, ALL, tags):
        exchange()
    assert kernel.complaints == []
    assert not link.ports[0].dropped
    summed, tso4, tso6 = (struct.unpack("=H", bytes((1, kind)))[0] for kind in (0, 1, 4))
    assert set(kernel.read) == {0, summed, tso4, tso6}
    assert set(kernel.written) == ({0} if len(tags) > 4 else {0, summed})


# --- with the net device in between --------------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(NET_DRIVER_FEATURES, id="every feature"),
        pytest.param(without(NetFeature.MRG_RXBUF, Feature.EVENT_IDX), id="large buffers"),
        pytest.param(without(NetFeature.GUEST_CSUM), id="takes nothing"),
        pytest.param(without(NetFeature.CSUM), id="leaves nothing"),
        pytest.param(without(NetFeature.CSUM, NetFeature.GUEST_CSUM), id="nothing"),
    ],
)
@pytest.mark.parametrize("kind", ["OpenBSD", "FreeBSD"])
def test_a_scripted_guest_talks_to_the_host(kind: str, features: int) -> None:
    kernel: CountingOpenBsd | CountingFreeBsd
    link: Link
    if kind == "OpenBSD":
        kernel = CountingOpenBsd({"tap0": HOST})
        link = OpenBsdTap("tap0", calls=kernel)
    else:
        kernel = CountingFreeBsd({"tap0": HOST})
        link = FreeBsdTap("tap0", calls=kernel)
    with two_namespaces(link, lambda guest: ScriptedGuest(guest, link, features)) as pump:
        exchange()
        assert not pump.dropped()
    assert kernel.complaints == []
    assert not link.ports[0].dropped
    assert (len(kernel.read) > 1) == bool(features >> NetFeature.GUEST_CSUM & 1)
    assert (len(kernel.written) > 1) == bool(features >> NetFeature.CSUM & 1)


# --- the stand-ins are what the real kernels are -------------------------------------------------


@pytest.fixture
def openbsd() -> Iterator[OpenBsdKernel]:
    kernel = OpenBsdKernel({"tap0": HOST})
    yield kernel
    for fd in [tap.fd for tap in kernel._taps.values() if tap.fd >= 0]:
        kernel.close(fd)


def opened(kernel: OpenBsdKernel | FreeBsdKernel) -> int:
    """A tap whose Linux tap is up, and has no IPv6 that would talk by itself."""
    fd = kernel.open("/dev/tap0", O_TAP)
    quiet = Path(f"/proc/sys/net/ipv6/conf/{HOST}/disable_ipv6")
    if quiet.exists():
        quiet.write_text("1")
    run("ip", "link", "set", HOST, "up")
    return fd


def expect(number: int, call, *arguments) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number


def send_from_linux(frame: bytes) -> None:
    """Has Linux send a frame out of the tap, as it is."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((HOST, 0))
        raw.send(frame)


def test_the_stand_in_has_one_opener_and_forgets_all_when_closed(openbsd: OpenBsdKernel) -> None:
    fd = openbsd.open("/dev/tap0", O_TAP)
    expect(errno.EBUSY, openbsd.open, "/dev/tap0", O_TAP)
    expect(errno.ENXIO, openbsd.open, "/dev/tap1", O_TAP)
    openbsd.ioctl(fd, openbsd.TUNSCAP, struct.pack("=I", 0x71F7))
    openbsd.close(fd)
    expect(errno.EBADF, openbsd.ioctl, fd, openbsd.TUNGCAP, bytes(4))
    fd = openbsd.open("/dev/tap0", O_TAP)
    expect(errno.ENODEV, openbsd.ioctl, fd, openbsd.TUNGCAP, bytes(4))


def test_the_stand_ins_tunscap_tungcap_and_tundcap(openbsd: OpenBsdKernel) -> None:
    fd = openbsd.open("/dev/tap0", O_TAP)
    openbsd.ioctl(fd, openbsd.TUNSCAP, bytes(4))
    assert openbsd.ioctl(fd, openbsd.TUNGCAP, bytes(4)) == bytes(4)
    openbsd.ioctl(fd, openbsd.TUNSCAP, struct.pack("=I", 0x3186))
    assert openbsd.ioctl(fd, openbsd.TUNGCAP, bytes(4)) == struct.pack("=I", 0x3186)
    for bit in (0x8, 0x200, 0x400, 0x800, 0x8000, 0x80000000):
        expect(errno.EINVAL, openbsd.ioctl, fd, openbsd.TUNSCAP, struct.pack("=I", bit))
    assert openbsd.ioctl(fd, openbsd.TUNGCAP, bytes(4)) == struct.pack("=I", 0x3186)
    openbsd.ioctl(fd, openbsd.TUNDCAP, b"")
    expect(errno.ENODEV, openbsd.ioctl, fd, openbsd.TUNGCAP, bytes(4))
    openbsd.offload_ioctls = False
    expect(errno.ENOTTY, openbsd.ioctl, fd, openbsd.TUNSCAP, bytes(4))


def test_the_stand_ins_limits_and_refusals_of_a_write(openbsd: OpenBsdKernel) -> None:
    fd = opened(openbsd)
    expect(errno.EMSGSIZE, openbsd.writev, fd, [bytes(13)])
    assert openbsd.writev(fd, [bytes(14)]) == 14
    openbsd.ioctl(fd, openbsd.TUNSCAP, bytes(4))
    expect(errno.EMSGSIZE, openbsd.writev, fd, [bytes(21)])
    assert openbsd.writev(fd, [bytes(22)]) == 22
    expect(errno.EMSGSIZE, openbsd.writev, fd, [bytes(8 + 14 + 65537)])
    frame = make_frame(b"data")
    for flags in (0x600, 0xA00, 0xC00, 0xE00):
        expect(errno.EINVAL, openbsd.writev, fd, [TUN_HDR.pack(flags, 0, 0, 0), frame])
    openbsd.full = True
    expect(errno.ENOBUFS, openbsd.writev, fd, [bytes(8), frame])
    openbsd.full = False
    openbsd.destroy("tap0")
    expect(errno.EIO, openbsd.writev, fd, [bytes(8), frame])
    expect(errno.EIO, openbsd.readv, fd, [bytearray(8)])


def test_the_stand_in_cuts_a_frame_in_silence_and_fionread_counts_the_header(
    openbsd: OpenBsdKernel,
) -> None:
    fd = opened(openbsd)
    frame = make_frame(make_payload(200))
    fionread = 0x4004667F
    assert openbsd.ioctl(fd, fionread, bytes(4)) == bytes(4)
    send_from_linux(frame)
    assert openbsd.ioctl(fd, fionread, bytes(4)) == struct.pack("=i", len(frame))
    openbsd.ioctl(fd, openbsd.TUNSCAP, bytes(4))
    assert openbsd.ioctl(fd, fionread, bytes(4)) == struct.pack("=i", len(frame) + 8)
    room = bytearray(100)
    assert openbsd.readv(fd, [room[:4], room]) == 104
    expect(errno.EAGAIN, openbsd.readv, fd, [room])
    send_from_linux(frame)
    openbsd.ioctl(fd, openbsd.TUNDCAP, b"")
    assert openbsd.readv(fd, [room]) == 100
    assert room == frame[:100]


def test_openbsd_a_frame_longer_than_the_room_is_dropped_not_cut(openbsd: OpenBsdKernel) -> None:
    tap = OpenBsdTap("tap0", calls=openbsd)
    run("ip", "link", "set", HOST, "up")
    while tap.ports[0].read_burst(Collected(), 64):
        pass

    class Small(Collected):
        def views(self) -> Sequence[memoryview]:
            return [self.memory[:100]]

    send_from_linux(make_frame(make_payload(200)))
    room = Small()
    tap.ports[0].read_burst(room, 64)
    assert tap.ports[0].dropped["too long"] == 1
    assert all(len(frame[1]) <= 100 for frame in room.frames)
    tap.close()


def test_openbsd_a_full_queue_and_a_tap_that_is_gone(openbsd: OpenBsdKernel) -> None:
    tap = OpenBsdTap("tap0", calls=openbsd)
    port = tap.ports[0]
    with pytest.raises(OSError) as busy:
        OpenBsdTap("tap0", calls=openbsd)
    assert busy.value.errno == errno.EBUSY
    run("ip", "link", "set", HOST, "up")
    openbsd.full = True
    assert port.write_burst([[bytes(12), make_frame(b"")]] * 3) == 3
    assert port.dropped == {"no memory": 3}
    openbsd.destroy("tap0")
    with pytest.raises(OSError) as gone:
        port.read_burst(Collected(), 1)
    assert gone.value.errno == errno.EIO
    tap.close()
    tap.close()


def test_openbsd_the_tap_may_come_open_with_its_header_on(openbsd: OpenBsdKernel) -> None:
    fd = opened(openbsd)
    openbsd.ioctl(fd, openbsd.TUNSCAP, bytes(4))

    def helper(bits: int) -> None:
        openbsd.ioctl(fd, openbsd.TUNSCAP, struct.pack("=I", bits))

    tap = OpenBsdTap("tap0", fd=fd, set_capabilities=helper, calls=openbsd)
    tap.request_offloads(Offload.CSUM)
    assert openbsd.ioctl(fd, openbsd.TUNGCAP, bytes(4)) == struct.pack("=I", 0x186)
    tap.close()
    with pytest.raises(OSError, match="Bad file"):
        fcntl.fcntl(fd, fcntl.F_GETFD)


def test_the_stand_in_complains_of_flags_that_the_frame_does_not_bear_out(
    openbsd: OpenBsdKernel,
) -> None:
    fd = opened(openbsd)
    openbsd.ioctl(fd, openbsd.TUNSCAP, bytes(4))
    udp = make_frame(b"data", protocol=UDP, vlan=VLAN)
    openbsd.writev(fd, [TUN_HDR.pack(0x200, 0, 0, 0), udp])
    openbsd.writev(fd, [TUN_HDR.pack(0x420, 0, 0, 9), udp])
    openbsd.writev(fd, [TUN_HDR.pack(0x400, 0, 0, 0), bytes(12) + b"\x08\x06" + bytes(40)])
    assert len(openbsd.complaints) == 3


def test_the_freebsd_stand_in_keeps_its_kernels_rules() -> None:
    kernel = FreeBsdKernel({"tap0": HOST})
    fd = opened(kernel)
    control = kernel.socket()
    try:
        request = struct.pack("=16sII8x", b"tap0", 0x2, 0)
        expect(errno.EINVAL, kernel.ioctl, control, kernel.SIOCSIFCAP, request)
        for size in (-1, 8, 11, 20):
            expect(errno.EINVAL, kernel.ioctl, fd, kernel.TAPSVNETHDR, struct.pack("=i", size))
        kernel.ioctl(fd, kernel.TAPSVNETHDR, struct.pack("=i", 10))
        assert kernel.ioctl(fd, kernel.TAPGVNETHDR, bytes(4)) == struct.pack("=i", 10)
        answer = kernel.ioctl(control, kernel.SIOCGIFCAP, request)
        _, possible, enabled = struct.unpack("=16sII8x", answer)
        assert possible & 0x600703 == 0x600703
        assert enabled & 0x600703 == 0, "granted but off"
        kernel.ioctl(control, kernel.SIOCSIFCAP, request)
        expect(errno.EIO, kernel.writev, fd, [bytes(10 + 65536)])
        kernel.up = False
        assert kernel.writev(fd, [bytes(100)]) == 0
    finally:
        kernel.close(control)
        kernel.close(fd)
    fd = kernel.open("/dev/tap0", O_TAP)
    assert kernel.ioctl(fd, kernel.TAPGVNETHDR, bytes(4)) == bytes(4)
    kernel.close(fd)
