"""The taps of OpenBSD and FreeBSD, over scripted system calls: no privileges, any Unix.

What they do with a real network stack behind them is in `test_tap_bsd_traffic.py`.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import DESTINATION, QINQ, TCP, UDP, VLAN, make_frame, make_payload, slow_sum, split

from vq import tap_bsd
from vq.abi import NET_HDR
from vq.errors import UsageError
from vq.link import Frame, FrameBuffer
from vq.offload import Offload
from vq.tap_bsd import FreeBsdTap, OpenBsdTap
from vq.tun_hdr import TUN_HDR

PLAIN = bytes(12)
ALL = Offload(63)
CSUM_TSO = Offload.CSUM | Offload.TSO4 | Offload.TSO6
TUNSCAP, TUNGIFINFO, TUNDCAP = 0x800474C4, 0x400C745C, 0x200074C4
TAPSVNETHDR, TAPGIFINFO, TAPGIFNAME = 0x8004745B, 0x4008745C, 0x4020745D
SIOCSIFCAP, SIOCGIFCAP = 0x8020691E, 0xC020691F


class Script:
    """System calls that note what is asked and answer what the test has put in."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.open_fds: set[int] = set()
        self.asked: list[tuple[str | int, ...] | tuple[int, bytes]] = []
        self.answers: dict[int, bytes | int] = {
            TUNGIFINFO: struct.pack("=IHHI", 1500, 6, 0, 0),
            TAPGIFINFO: struct.pack("=iHBB", 0, 1500, 6, 0),
            TAPGIFNAME: struct.pack("32s", b"tap9"),
            SIOCGIFCAP: struct.pack("=16sII8x", b"tap9", 0x6C0783, 0x80001),
        }
        """What an ioctl gives back, or the error that it gives."""
        self.to_read: deque[bytes | int] = deque()
        self.written: list[bytes] = []
        self.write_errors: deque[int] = deque()
        self.open_error = 0

    def new_fd(self) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.open_fds.add(fd)
        return fd

    def open(self, path: str, flags: int) -> int:
        self.asked.append(("open", path, flags))
        if self.open_error:
            raise OSError(self.open_error, os.strerror(self.open_error), path)
        return self.new_fd()

    def socket(self) -> int:
        return self.new_fd()

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        assert fd in self.open_fds
        self.asked.append((request, argument))
        answer = self.answers.get(request, argument)
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        return answer

    def readv(self, fd: int, buffers: Sequence[bytearray | memoryview]) -> int:
        assert fd in self.open_fds
        assert len(buffers) <= 1024
        if not self.to_read:
            raise BlockingIOError(errno.EAGAIN, "nothing waits")
        answer = self.to_read.popleft()
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        done = 0
        for buffer in buffers:
            piece = answer[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def writev(self, fd: int, buffers: Sequence[FrameBuffer]) -> int:
        assert fd in self.open_fds
        assert len(buffers) <= 1024
        if self.write_errors:
            error = self.write_errors.popleft()
            if not error:
                return 0
            raise OSError(error, os.strerror(error))
        self.written.append(b"".join(buffers))
        return len(self.written[-1])

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)
        os.close(fd)

    def requests(self) -> list[tuple[int, bytes]]:
        """The ioctls that change something, and clear."""
        harmless = (TUNGIFINFO, TAPGIFINFO, TAPGIFNAME, SIOCGIFCAP)
        changes = [(a[0], a[1]) for a in self.asked if isinstance(a[0], int)]
        self.asked.clear()
        return [c for c in changes if c[0] not in harmless]  # type: ignore[misc]


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    for fd in script.open_fds:
        os.close(fd)


class Lent:
    """Room for one frame after the other, cut into views of the given sizes."""

    def __init__(self, *sizes: int, frames: int = 100) -> None:
        self.sizes = sizes
        self.frames = frames
        self.got: list[tuple[bytes, bytes]] = []
        self.memory = bytearray()

    def views(self) -> Sequence[memoryview]:
        if len(self.got) == self.frames:
            return []
        self.memory = bytearray(b"\xee" * sum(self.sizes))
        return split(self.memory, self.edges())  # type: ignore[arg-type]

    def edges(self) -> list[int]:
        return [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]

    def commit(self, header: bytes, length: int) -> None:
        self.got.append((header, bytes(self.memory[:length])))


def driver_header(frame: bytes, gso_type: int = 0, gso_size: int = 0) -> bytes:
    start = frame.index(struct.pack("!HH", 1000, 2000))
    protocol = UDP if len(frame) - start == int.from_bytes(frame[start + 4 : start + 6]) else TCP
    offset = 16 if protocol == TCP else 6
    return NET_HDR.pack(1, gso_type, 0, gso_size, start, offset, 0)


def frame_of(header: bytes, data: bytes, *cuts: int) -> Frame:
    return [header, *split(data, cuts)]


# --- OpenBSD: opening, offloads, closing ---------------------------------------------------------


def test_openbsd_the_header_is_on_from_the_start_and_off_at_the_end(script: Script) -> None:
    tap = OpenBsdTap("tap3", calls=script)
    assert script.asked[0] == ("open", "/dev/tap3", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    assert script.requests() == [(TUNSCAP, bytes(4))]
    assert (tap.name, tap.accepts, tap.delivers) == ("tap3", CSUM_TSO, Offload.NONE)
    assert (tap.mtu, tap.min_frame, tap.max_frame) == (1500, 14, 1522)
    assert len(tap.ports) == 1
    assert tap.ports[0].fileno() in script.open_fds
    tap.close()
    assert script.requests() == [(TUNDCAP, b"")]
    assert not script.open_fds
    tap.close()
    assert script.requests() == []


@pytest.mark.parametrize(
    "wanted, bits, delivers",
    [
        (Offload.CSUM, 0x186, Offload.CSUM),
        (Offload.CSUM | Offload.TSO4, 0x1186, Offload.CSUM | Offload.TSO4 | Offload.ECN),
        (ALL, 0x3186, CSUM_TSO | Offload.ECN),
        (Offload.TSO4, 0, Offload.NONE),
        (Offload.NONE, 0, Offload.NONE),
    ],
)
def test_openbsd_capabilities_follow_what_the_guest_takes(
    script: Script, wanted: Offload, bits: int, delivers: Offload
) -> None:
    tap = OpenBsdTap("tap3", calls=script)
    script.requests()
    tap.request_offloads(wanted)
    assert script.requests() == [(TUNSCAP, struct.pack("=I", bits))]
    assert tap.delivers == delivers
    assert tap.max_frame == (65550 if delivers & CSUM_TSO & ~Offload.CSUM else 1522)


def test_openbsd_a_kernel_that_refuses_bits_is_asked_for_fewer(script: Script) -> None:
    tap = OpenBsdTap("tap3", calls=script)
    script.requests()
    script.answers[TUNSCAP] = errno.EINVAL
    with pytest.raises(OSError, match="Invalid"):
        tap.request_offloads(ALL)
    bits = [struct.unpack("=I", argument)[0] for _, argument in script.requests()]
    assert bits == [0x3186, 0x186, 0]
    assert tap.delivers == Offload.NONE


def test_openbsd_without_tunscap_frames_go_bare_and_complete(script: Script) -> None:
    script.answers[TUNSCAP] = errno.ENOTTY
    tap = OpenBsdTap("tap3", calls=script)
    tap.request_offloads(ALL)
    assert tap.accepts == tap.delivers == Offload.NONE
    frame = make_frame(make_payload(3000), protocol=TCP)
    assert tap.ports[0].write_burst([frame_of(driver_header(frame, 1, 1400), frame, 40)]) == 1
    assert [len(data) for data in script.written] == [1454, 1454, 254]
    for data in script.written:
        pseudo = data[26:34] + struct.pack("!HH", TCP, len(data) - 34)
        assert slow_sum(pseudo + data[34:]) == 0xFFFF
    script.to_read.append(frame)
    room = Lent(20, 5000)
    assert tap.ports[0].read_burst(room, 8) == 1
    assert room.got == [(PLAIN, frame)]
    script.requests()
    tap.close()
    assert script.requests() == []


def test_openbsd_a_helper_makes_every_ioctl(script: Script) -> None:
    """pledge(2): the worker must not call TUNSCAP itself; whoever opened the tap did."""
    asked: list[int] = []
    tap = OpenBsdTap("tap3", fd=script.new_fd(), set_capabilities=asked.append, calls=script)
    assert (tap.mtu, tap.accepts, tap.max_frame) == (None, CSUM_TSO, 16384 + 22)
    tap.request_offloads(Offload.CSUM)
    assert asked == [0x186]
    assert tap.delivers == Offload.CSUM
    tap.close()
    assert script.asked == []
    assert not script.open_fds


@pytest.mark.parametrize("kind", [OpenBsdTap, FreeBsdTap])
def test_whoever_leaves_control_makes_no_ioctl_any_more(
    script: Script, kind: type[OpenBsdTap | FreeBsdTap]
) -> None:
    """In the worker of `vq.privsep`: the tap is open, and its settings are the helper's."""
    tap = kind("tap3", calls=script)
    looked: list[str] = []
    script.requests()
    tap.leave_control(lambda: looked.append("again"))
    tap.expect(Offload.CSUM | Offload.TSO4, 9000)
    assert (tap.delivers, tap.max_frame) == (Offload.CSUM | Offload.TSO4, 65536 + 14)
    tap.expect(Offload.NONE, 9000)
    assert tap.max_frame == 9000 + 22
    script.to_read.append(bytes(tap.ports[0].header_size + 9000))
    assert tap.ports[0].read_burst(Lent(1, 100), 1) == 0
    assert looked == ["again"], "the frame was too long"
    assert tap.mtu is None
    tap.close()
    assert script.requests() == [] and not script.open_fds


def test_a_helper_without_an_open_tap_is_refused(script: Script) -> None:
    with pytest.raises(UsageError):
        OpenBsdTap("tap3", set_capabilities=lambda bits: None, calls=script)


@pytest.mark.parametrize("kind", [OpenBsdTap, FreeBsdTap])
@pytest.mark.parametrize("error", [errno.EBUSY, errno.ENXIO, errno.ENOENT, errno.EACCES])
def test_an_error_of_open_is_passed_on(
    script: Script, kind: type[OpenBsdTap | FreeBsdTap], error: int
) -> None:
    script.open_error = error
    with pytest.raises(OSError, match="/dev/tap7") as caught:
        kind("tap7", calls=script)
    assert caught.value.errno == error


@pytest.mark.parametrize("kind, request_", [(OpenBsdTap, TUNSCAP), (FreeBsdTap, TAPSVNETHDR)])
def test_a_descriptor_taken_over_is_closed_when_opening_fails(
    script: Script, kind: type[OpenBsdTap | FreeBsdTap], request_: int
) -> None:
    script.answers[request_] = errno.ENXIO
    with pytest.raises(OSError, match=r"[Nn]o such device"):
        kind("tap7", fd=script.new_fd(), calls=script)
    assert not script.open_fds


# --- OpenBSD: writing ----------------------------------------------------------------------------


def test_openbsd_a_burst_goes_out_with_its_headers(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    plain = make_frame(b"plain", vlan=VLAN)
    summed = make_frame(b"left undone", protocol=UDP)
    long = make_frame(make_payload(3000), version=6)
    burst = [
        frame_of(PLAIN, plain, 1, 2),
        frame_of(driver_header(summed), summed, 30),
        frame_of(driver_header(long, 4, 1200), long),
    ]
    assert port.write_burst(burst) == 3
    assert script.written == [
        bytes(8) + plain,
        TUN_HDR.pack(0x400, 0, 0, 0) + summed,
        TUN_HDR.pack(0x220, 0, 0, 1200) + long,
    ]
    assert not port.dropped


@pytest.mark.parametrize(
    "name, frame",
    [
        ("double tag", make_frame(make_payload(33), vlan=QINQ)),
        ("double tag of one kind", make_frame(make_payload(33), vlan=VLAN + VLAN)),
        ("fragment", make_frame(make_payload(33), protocol=UDP, fragment=0x2000)),
    ],
)
def test_openbsd_what_the_header_cannot_say_is_finished_first(
    script: Script, name: str, frame: bytes
) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    port.write_burst([frame_of(driver_header(frame), frame, 50)])
    ((tun, data),) = [(w[:8], w[8:]) for w in script.written]
    assert tun == bytes(8)
    network = frame.index(b"\x45\x03")
    transport = data[network + 20 :]
    pseudo = data[network + 12 : network + 20] + struct.pack(
        "!HH", data[network + 9], len(transport)
    )
    assert slow_sum(pseudo + transport) == 0xFFFF


def test_openbsd_a_checksum_of_another_protocol_is_finished_first(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = bytearray(make_frame(make_payload(33), protocol=UDP))
    frame[23] = 1
    frame[36:38] = bytes(2)
    port.write_burst([[NET_HDR.pack(1, 0, 0, 0, 34, 2, 0), frame]])
    assert script.written[0][:8] == bytes(8)
    assert slow_sum(script.written[0][8 + 34 :]) == 0xFFFF


@pytest.mark.parametrize("gso_type, protocol", [(5, UDP), (0x81, TCP)])
def test_openbsd_uso_and_ecn_are_segmented_first(
    script: Script, gso_type: int, protocol: int
) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(make_payload(3000), protocol=protocol)
    header = driver_header(frame, gso_type, 1000)
    assert port.write_burst([frame_of(header, frame)]) == 1
    assert len(script.written) == 3
    for data in script.written:
        assert data[:8] == bytes(8)
        transport = data[8 + 34 :]
        pseudo = data[8 + 26 : 8 + 34] + struct.pack("!HH", protocol, len(transport))
        assert slow_sum(pseudo + transport) == 0xFFFF


def test_a_header_that_the_frame_does_not_bear_out_is_dropped_and_counted(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    good, udp = make_frame(b"good"), make_frame(make_payload(3000), protocol=UDP)
    burst = [
        frame_of(NET_HDR.pack(1, 0, 0, 0, 34, 60000, 0), good),
        frame_of(NET_HDR.pack(1, 1, 0, 1000, 34, 6, 0), udp),
        frame_of(NET_HDR.pack(1, 4, 0, 1000, 34, 16, 0), good),
        frame_of(PLAIN, good),
    ]
    assert port.write_burst(burst) == 4
    assert script.written == [bytes(8) + good]
    assert port.dropped == {
        "csum beyond frame": 1,
        "gso wrong protocol": 1,
        "gso wrong ip version": 1,
    }


def test_frames_that_no_tap_takes_are_not_written(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    burst: list[Frame] = [
        [PLAIN],
        [PLAIN, bytes(13)],
        [PLAIN, bytes(6), bytes(7)],
        [PLAIN, bytes(6), bytes(8)],
        [PLAIN, bytes(65550)],
        [PLAIN, bytes(65551)],
        [PLAIN, bytes(65000), bytes(600)],
    ]
    assert port.write_burst(burst) == 7
    assert [len(data) for data in script.written] == [8 + 14, 8 + 65550]
    assert port.dropped == {"runt": 3, "too long": 2}


def test_errors_about_one_frame_drop_it_and_the_burst_goes_on(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    script.write_errors.extend([errno.ENOBUFS, errno.EMSGSIZE, errno.ENOMEM, errno.EINVAL])
    burst = [frame_of(PLAIN, make_frame(bytes([i]))) for i in range(5)]
    assert port.write_burst(burst) == 5
    assert len(script.written) == 1
    assert port.dropped == {"no memory": 2, "too long": 1, "bad header": 1}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENXIO, errno.EBADF])
def test_a_tap_that_is_gone_is_an_error_both_ways(script: Script, error: int) -> None:
    """A defect of vmd's: a readv that had failed was taken for a frame."""
    port = OpenBsdTap("tap3", calls=script).ports[0]
    script.write_errors.append(error)
    with pytest.raises(OSError) as caught:
        port.write_burst([frame_of(PLAIN, make_frame(b""))])
    assert caught.value.errno == error
    script.to_read.append(error)
    room = Lent(2000)
    with pytest.raises(OSError) as caught:
        port.read_burst(room, 1)
    assert caught.value.errno == error
    assert room.got == []


def test_a_frame_in_more_pieces_than_writev_takes_goes_out_whole(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(make_payload(3000))
    port.write_burst([frame_of(PLAIN, frame, *range(1, 3000))])
    assert script.written == [bytes(8) + frame]


# --- OpenBSD: reading ----------------------------------------------------------------------------


def test_openbsd_frames_are_read_until_none_waits_or_the_limit_is_met(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frames = [make_frame(bytes([i])) for i in range(5)]
    script.to_read.extend(bytes(8) + frame for frame in frames)
    room = Lent(14, 2000)
    assert port.read_burst(room, 2) == 2
    assert port.read_burst(room, 64) == 3
    assert port.read_burst(room, 64) == 0
    assert room.got == [(PLAIN, frame) for frame in frames]


def test_without_room_the_frame_stays_in_the_kernel(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    script.to_read.extend([bytes(8) + make_frame(b"1"), bytes(8) + make_frame(b"2")])
    assert port.read_burst(Lent(2000, frames=1), 8) == 1
    assert len(script.to_read) == 1


@pytest.mark.parametrize("sizes", [(2000,), (1, 1, 11, 1, 30, 1956), (53, 1947)])
@pytest.mark.parametrize("protocol, flag, offset", [(TCP, 0x200, 16), (UDP, 0x400, 6)])
def test_openbsd_a_checksum_flag_becomes_needs_csum(
    script: Script, sizes: tuple[int, ...], protocol: int, flag: int, offset: int
) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(make_payload(77), protocol=protocol, version=6, extensions=[DESTINATION])
    field = frame.index(struct.pack("!HH", 1000, 2000)) + offset
    spoiled = frame[:field] + b"\xde\xad" + frame[field + 2 :]
    script.to_read.append(TUN_HDR.pack(flag, 0, 0, 0) + spoiled)
    room = Lent(*sizes)
    assert port.read_burst(room, 8) == 1
    assert room.got == [(NET_HDR.pack(1, 0, 0, 0, field - offset, offset, 0), frame)]


@pytest.mark.parametrize("sizes", [(2000,), (1, 1, 11, 1, 30, 1956)])
def test_openbsd_a_tag_in_the_header_is_put_into_the_frame(
    script: Script, sizes: tuple[int, ...]
) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(make_payload(77), vlan=b"\x81\x00\xe0\x05")
    script.to_read.append(TUN_HDR.pack(0x210, 0, 0xE005, 0) + frame[:12] + frame[16:])
    script.to_read.append(TUN_HDR.pack(0x10, 0, 0xE005, 0) + frame[:12] + frame[16:])
    room = Lent(*sizes)
    assert port.read_burst(room, 8) == 2
    assert room.got == [(NET_HDR.pack(1, 0, 0, 0, 38, 16, 0), frame), (PLAIN, frame)]


def test_openbsd_a_tag_for_which_there_is_no_room_drops_the_frame(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    script.to_read.append(TUN_HDR.pack(0x10, 0, 5, 0) + bytes(200))
    room = Lent(203)
    assert port.read_burst(room, 8) == 0
    assert port.dropped == {"too long": 1}


def test_a_frame_that_the_kernel_cut_is_dropped_and_the_room_lent_again(script: Script) -> None:
    tap = OpenBsdTap("tap3", calls=script)
    port = tap.ports[0]
    script.answers[TUNGIFINFO] = struct.pack("=IHHI", 9000, 6, 0, 0)
    script.to_read.extend([bytes(8) + bytes(101), bytes(8) + bytes(100)])
    room = Lent(40, 60)
    assert port.read_burst(room, 8) == 1
    assert room.got == [(PLAIN, bytes(100))]
    assert port.dropped == {"too long": 1}
    assert tap.max_frame == 9022


def test_what_is_no_frame_is_dropped(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(b"")
    script.to_read.extend([bytes(8) + bytes(13), bytes(7), bytes(8), bytes(8) + frame, b"", b"x"])
    room = Lent(2000)
    assert port.read_burst(room, 8) == 1
    assert room.got == [(PLAIN, frame)]
    assert port.dropped == {"runt": 3}
    assert len(script.to_read) == 1, "a read of nothing ends the burst"


def test_openbsd_a_header_that_lies_is_dropped_and_counted(script: Script) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    frame = make_frame(make_payload(3000))
    for flags, mss in ((0x600, 0), (0x20, 1400), (0x220, 0), (0x1000, 0), (0x400, 0)):
        script.to_read.append(TUN_HDR.pack(flags, 0, 0, mss) + frame)
    script.to_read.append(TUN_HDR.pack(0x200, 0, 0, 0) + frame[:60])
    room = Lent(4000)
    assert port.read_burst(room, 8) == 0
    assert room.got == []
    assert port.dropped == {
        "two checksums": 1,
        "tso without csum": 1,
        "tso size zero": 1,
        "unknown tun_hdr flag": 1,
        "csum wrong protocol": 1,
        "headers broken": 1,
    }


@pytest.mark.parametrize("length, moved", [(3000, 1), (3001, 0)])
def test_a_room_in_more_views_than_readv_takes_is_filled(
    script: Script, length: int, moved: int
) -> None:
    port = OpenBsdTap("tap3", calls=script).ports[0]
    data = make_payload(length)
    script.to_read.append(bytes(8) + data)
    room = Lent(*([2] * 1500))
    assert port.read_burst(room, 8) == moved
    assert room.got == [(PLAIN, data)] * moved
    assert port.dropped == ({} if moved else {"too long": 1})


# --- FreeBSD -------------------------------------------------------------------------------------


def native(*fields: int) -> bytes:
    return struct.pack("=BBHHHHH", *fields)


def freebsd_caps(argument: bytes) -> tuple[bytes, int]:
    name, wanted, _ = struct.unpack("=16sII8x", argument)
    return name.rstrip(b"\0"), wanted


def test_freebsd_the_header_and_what_comes_in_are_turned_on_when_opened(script: Script) -> None:
    tap = FreeBsdTap("tap", calls=script)
    (header, caps) = script.requests()
    assert header == (TAPSVNETHDR, struct.pack("=i", 12))
    assert caps[0] == SIOCSIFCAP
    assert freebsd_caps(caps[1]) == (b"tap9", 0x80000 | 0x200001)
    assert (tap.name, tap.accepts, tap.delivers) == ("tap9", Offload.CSUM, Offload.NONE)
    assert (tap.mtu, tap.max_frame) == (1500, 1522)
    assert len(script.open_fds) == 1
    tap.close()
    assert script.requests() == [(TAPSVNETHDR, bytes(4))]
    assert not script.open_fds


def test_freebsd_capabilities_follow_what_the_guest_takes(script: Script) -> None:
    tap = FreeBsdTap("tap9", calls=script)
    script.requests()
    tap.request_offloads(ALL)
    ((number, argument),) = script.requests()
    assert (number, freebsd_caps(argument)) == (SIOCSIFCAP, (b"tap9", 0x80000 | 0x600303))
    assert tap.delivers == CSUM_TSO
    assert tap.max_frame == 65550
    script.answers[SIOCGIFCAP] = struct.pack("=16sII8x", b"tap9", 0x400002, 0)
    tap.request_offloads(ALL)
    ((_, argument),) = script.requests()
    assert freebsd_caps(argument) == (b"tap9", 0x400002)
    assert tap.delivers == Offload.CSUM


def test_freebsd_without_the_right_to_change_the_interface_all_is_software(script: Script) -> None:
    script.answers[SIOCSIFCAP] = errno.EPERM
    tap = FreeBsdTap("tap9", calls=script)
    tap.request_offloads(ALL)
    assert tap.accepts == tap.delivers == Offload.NONE
    assert len(script.open_fds) == 1


def test_freebsd_without_tapsvnethdr_frames_go_bare(script: Script) -> None:
    script.answers[TAPSVNETHDR] = errno.ENOTTY
    tap = FreeBsdTap("tap9", calls=script)
    tap.request_offloads(ALL)
    assert tap.accepts == tap.delivers == Offload.NONE
    frame = make_frame(b"data")
    tap.ports[0].write_burst([frame_of(PLAIN, frame)])
    assert script.written == [frame]


def test_freebsd_a_checksum_left_undone_goes_to_the_kernel(script: Script) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    plain, tagged = make_frame(b"plain"), make_frame(b"tagged", vlan=VLAN, protocol=UDP, version=6)
    burst = [frame_of(PLAIN, plain, 3), frame_of(driver_header(tagged), tagged, 33)]
    assert port.write_burst(burst) == 2
    assert script.written == [bytes(12) + plain, native(1, 0, 0, 0, 58, 6, 0) + tagged]


@pytest.mark.parametrize(
    "frame",
    [
        make_frame(make_payload(33), vlan=QINQ),
        make_frame(make_payload(33), vlan=VLAN + VLAN),
        make_frame(make_payload(33), vlan=b"\x88\xa8\x00\x05"),
        make_frame(make_payload(33), protocol=UDP, fragment=0x2000),
    ],
)
def test_freebsd_what_the_kernel_would_lose_is_finished_first(script: Script, frame: bytes) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    port.write_burst([frame_of(driver_header(frame), frame)])
    ((head, data),) = [(w[:12], w[12:]) for w in script.written]
    assert head == bytes(12)
    network = frame.index(b"\x45\x03")
    transport = data[network + 20 :]
    pseudo = data[network + 12 : network + 20] + struct.pack(
        "!HH", data[network + 9], len(transport)
    )
    assert slow_sum(pseudo + transport) == 0xFFFF


def test_freebsd_segments_are_cut_first_and_their_checksums_left(script: Script) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    frame = make_frame(make_payload(3000))
    port.write_burst([frame_of(driver_header(frame, 1, 1400), frame)])
    assert [len(w) for w in script.written] == [12 + 1454, 12 + 1454, 12 + 254]
    assert {w[:12] for w in script.written} == {native(1, 0, 0, 0, 34, 16, 0)}


def test_freebsd_limits_and_an_interface_that_is_down(script: Script) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    script.write_errors.append(0)
    burst: list[Frame] = [[PLAIN, bytes(20)], [PLAIN, bytes(65536)], [PLAIN, bytes(65535)]]
    assert port.write_burst(burst) == 3
    assert [len(data) for data in script.written] == [12 + 65535]
    assert port.dropped == {"interface down": 1, "too long": 1}
    script.to_read.append(errno.EHOSTDOWN)
    assert port.read_burst(Lent(2000), 8) == 0


def test_freebsd_the_kernels_header_is_handed_on_in_virtios_order(script: Script) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    frame = make_frame(make_payload(3000))
    script.to_read.append(native(1, 1, 54, 1400, 34, 16, 0) + frame)
    script.to_read.append(native(2, 0, 0, 0, 0, 0, 0) + frame)
    script.to_read.append(native(0, 0, 0, 0, 0, 0, 0) + frame)
    room = Lent(100, 4000)
    assert port.read_burst(room, 8) == 3
    golden = b"\x01\x01\x36\x00\x78\x05\x22\x00\x10\x00\x00\x00"
    assert room.got == [(golden, frame), (PLAIN, frame), (PLAIN, frame)]


def test_freebsd_a_header_that_lies_is_dropped_and_counted(script: Script) -> None:
    port = FreeBsdTap("tap9", calls=script).ports[0]
    frame = make_frame(b"")
    for fields in (
        (1, 0, 0, 0, 34, 19, 0),
        (0, 1, 0, 9, 0, 0, 0),
        (1, 1, 0, 0, 34, 16, 0),
        (1, 2, 0, 9, 34, 16, 0),
    ):
        script.to_read.append(native(*fields) + frame)
    assert port.read_burst(Lent(2000), 8) == 0
    assert port.dropped == {
        "csum beyond frame": 1,
        "gso without csum": 1,
        "gso size zero": 1,
        "gso unknown": 1,
    }


def test_freebsd_a_helper_makes_every_ioctl(script: Script) -> None:
    asked: list[int] = []
    tap = FreeBsdTap("tap9", fd=script.new_fd(), set_capabilities=asked.append, calls=script)
    tap.request_offloads(Offload.CSUM)
    assert asked == [0x200001, 0x600003]
    assert (tap.accepts, tap.delivers) == (Offload.CSUM, Offload.CSUM)
    tap.close()
    assert script.asked == []


# --- whatever comes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OpenBsdTap, FreeBsdTap])
@given(
    header=st.binary(min_size=12, max_size=12),
    frame=st.sampled_from((TCP, UDP)).map(lambda p: make_frame(make_payload(900), protocol=p)),
    damage=st.lists(st.tuples(st.integers(12, 60), st.integers(0, 255)), max_size=3),
    cut_at=st.integers(0, 80),
)
@settings(max_examples=150, deadline=None)
def test_every_frame_from_a_guest_is_written_or_counted(
    kind: type[OpenBsdTap | FreeBsdTap],
    header: bytes,
    frame: bytes,
    damage: list[tuple[int, int]],
    cut_at: int,
) -> None:
    script = Script()
    tap = kind("tap9", calls=script)
    spoilt = bytearray(frame)
    for at, value in damage:
        spoilt[at] = value
    assert tap.ports[0].write_burst([frame_of(header, bytes(spoilt), cut_at)]) == 1
    assert script.written or tap.ports[0].dropped.total() == 1
    tap.close()
    assert not script.open_fds


# --- the module ----------------------------------------------------------------------------------


def test_the_requests_have_the_numbers_of_the_headers() -> None:
    assert tap_bsd.TUNSCAP == TUNSCAP
    assert tap_bsd.TUNGCAP == 0x400474C4
    assert tap_bsd.TUNDCAP == TUNDCAP
    assert tap_bsd.TUNSIFINFO == 0x800C745B
    assert tap_bsd.TUNGIFINFO == TUNGIFINFO
    assert tap_bsd.TAPSVNETHDR == TAPSVNETHDR
    assert tap_bsd.TAPGVNETHDR == 0x4004745E
    assert tap_bsd.TAPGIFINFO == TAPGIFINFO
    assert tap_bsd.TAPGIFNAME == TAPGIFNAME
    assert tap_bsd.SIOCSIFCAP == SIOCSIFCAP
    assert tap_bsd.SIOCGIFCAP == SIOCGIFCAP


@pytest.mark.parametrize("system", ["linux", "openbsd7", "freebsd14", "darwin"])
def test_the_module_can_be_imported_on_every_system(system: str) -> None:
    code = f"import sys; sys.platform = {system!r}; import vq.tap_bsd"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
