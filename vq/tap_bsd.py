"""The taps of OpenBSD and of FreeBSD as links (`Link`).

Both are devices of their own, /dev/tapN, one frame per read and per write. `OpenBsdTap` turns on
OpenBSD's `tun_hdr` with TUNSCAP and translates it (`vq.tun_hdr`); `FreeBsdTap` turns on FreeBSD's
`virtio_net_hdr` with TAPSVNETHDR. On kernels from before these the frames go bare, and everything
is done in software. What a kernel cannot be told in its header is finished here before it is
written; which offloads a guest may use at all is the net device's business.

Nothing here is particular to the system that imports it: the system calls go through
`SystemCalls`, so that these links run on any Unix over a stand-in (`vq.testing.bsd_tap`).

Sources: tap(4) and net/if_tun.h, net/if.h of OpenBSD 7.7; tap(4) and net/if_tap.h of FreeBSD 14.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from vq import packet as packets
from vq.abi import NET_HDR, NET_HDR_SIZE, HdrFlag, HdrGso
from vq.errors import UsageError
from vq.ioctl import Direction
from vq.ioctl import bsd as _number
from vq.link import SHORT_OF_MEMORY, Frame, FrameBuffer, Port, Room, Tap, scatter
from vq.offload import (
    FreeBsdCap,
    Offload,
    freebsd_offloads,
    ifcap_for_freebsd,
    ifcap_for_openbsd,
    normalise,
)
from vq.software import HeaderLie, finish
from vq.tun_hdr import TUN_HDR_SIZE, TunHdrLie, from_tun, tagged, to_tun

__all__ = ["HOST", "BsdTapPort", "FreeBsdTap", "OpenBsdTap", "SystemCalls"]

# OpenBSD, net/if_tun.h
TUNSIFINFO = _number(Direction.WRITE, "t", 91, 12)
TUNGIFINFO = _number(Direction.READ, "t", 92, 12)
TUNSCAP = _number(Direction.WRITE, "t", 196, 4)
TUNGCAP = _number(Direction.READ, "t", 196, 4)
TUNDCAP = _number(Direction.NONE, "t", 196, 0)
TUN_CAPABILITIES = struct.Struct("=I")
OPENBSD_TUNINFO = struct.Struct("=IHHI")
"""`struct tuninfo`: mtu, type, flags, baudrate."""
TUNMRU = 16384
"""The largest MTU of OpenBSD's tap."""

# FreeBSD, net/if_tap.h, net/if_tun.h, sys/sockio.h
TAPSVNETHDR = _number(Direction.WRITE, "t", 91, 4)
TAPGVNETHDR = _number(Direction.READ, "t", 94, 4)
TAPGIFINFO = _number(Direction.READ, "t", 92, 8)
TAPGIFNAME = _number(Direction.READ, "t", 93, 32)
SIOCSIFCAP = _number(Direction.WRITE, "i", 30, 32)
SIOCGIFCAP = _number(Direction.READ_WRITE, "i", 31, 32)
INT = struct.Struct("=i")
FREEBSD_TUNINFO = struct.Struct("=iHBB")
"""`struct tuninfo`: baudrate, mtu, type, padding."""
IFREQ_CAP = struct.Struct("=16sII8x")
"""`struct ifreq` for capabilities: name, those asked for or possible, those that are on."""
TAPMRU = 65535
"""The longest frame that FreeBSD's tap takes."""

ETHER_HEADER = 14
VLAN_TAG = 4
TAGS = 2 * VLAN_TAG
"""Two VLAN tags, which do not count towards the MTU."""
LARGEST = 65536 + ETHER_HEADER
"""The longest frame in bytes: OpenBSD takes no more (MAXMCLBYTES), TSO of both makes no more."""
IOV_MAX = 1024
"""Buffers in one readv or writev, on all these systems."""


class SystemCalls(Protocol):
    """The system calls that a tap needs. Each raises `OSError` as the kernel's own do."""

    def open(self, path: str, flags: int) -> int:
        """open(2): a file descriptor."""

    def socket(self) -> int:
        """A socket on which the ioctls of network interfaces can be made."""

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        """ioctl(2): the argument as the kernel leaves it."""

    def readv(self, fd: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """readv(2): the bytes read."""

    def writev(self, fd: int, buffers: Sequence[FrameBuffer]) -> int:
        """writev(2): the bytes written."""

    def close(self, fd: int) -> None:
        """close(2)."""


class _Host:
    """This system's own calls."""

    open = staticmethod(os.open)
    readv = staticmethod(os.readv)
    writev = staticmethod(os.writev)
    close = staticmethod(os.close)

    @staticmethod
    def socket() -> int:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()

    @staticmethod
    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        return fcntl.ioctl(fd, request, argument)


HOST: SystemCalls = _Host()
"""This system's own calls: the default everywhere."""


# --- the data path -------------------------------------------------------------------------------


class BsdTapPort(Port):
    """The one queue of a BSD tap, without a header: every frame is complete.

    Counted in `dropped`, next to the reasons of `vq.software.HeaderLie` for a frame's own header:

    ==================  ===========================================================================
    "runt"              shorter than an Ethernet header
    "too long"          longer than the kernel takes, or than the room that was lent
    "no memory"         the kernel's queue was full, or it had no memory for the frame
    "bad header"        the kernel refused what its header asks for
    "interface down"    the kernel takes nothing at present (FreeBSD)
    ==================  ===========================================================================
    """

    header_size = 0
    """Bytes of the kernel's header in front of each frame."""
    largest = LARGEST
    """The longest frame that can be written."""
    none_waits_inside = True

    def __init__(self, fd: int, calls: SystemCalls, truncated: Callable[[], None]) -> None:
        super().__init__()
        self._fd = fd
        self._calls = calls
        self.on_truncated = truncated
        """Called when a frame was longer than expected."""
        self._header = bytearray(self.header_size)
        self._beyond = bytearray(1)

    def fileno(self) -> int:
        """The tap's descriptor."""
        return self._fd

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """Writes frames to the kernel, each with one writev, or one for each segment.

        The port is never full: a BSD kernel drops what it has no place for.
        """
        for frame in frames:
            length = len(frame[1]) if len(frame) > 1 else 0
            if not ETHER_HEADER <= length <= self.largest or len(frame) > 2:
                length = sum(map(len, frame)) - NET_HDR_SIZE
                if not ETHER_HEADER <= length <= self.largest:
                    self.dropped["runt" if length < ETHER_HEADER else "too long"] += 1
                    continue
            try:
                for outgoing in self._outgoing(frame):
                    self._write(outgoing)
            except HeaderLie as lie:
                self.dropped[lie.reason] += 1
        return len(frames)

    def read_burst(self, room: Room, limit: int) -> int:
        """Reads frames from the kernel, each with one readv straight into the room.

        A frame that needs more than its header changed is rewritten in private memory first. The
        kernel cuts a frame that does not fit and does not tell, so one byte more is asked for: when
        it comes, the frame was longer, and is dropped.
        """
        moved = 0
        for _ in range(limit):
            views = room.views()
            if not views:
                break
            try:
                length = self._read(views)
            except BlockingIOError:
                break
            except OSError as error:
                # EHOSTDOWN, FreeBSD: the interface is not up yet
                if error.errno == errno.EHOSTDOWN or error.errno in SHORT_OF_MEMORY:
                    break
                raise
            if length < ETHER_HEADER:
                if length == -self.header_size:
                    break
                self.dropped["runt"] += 1
            elif length > len(views[0]) and length > sum(map(len, views)):
                self.dropped["too long"] += 1
                self.on_truncated()
            else:
                try:
                    net_header, length = self._incoming(views, length)
                except (HeaderLie, TunHdrLie) as lie:
                    self.dropped[lie.reason] += 1
                    continue
                room.commit(net_header, length)
                moved += 1
        return moved

    def close(self) -> None:
        """Gives the descriptor back. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._calls.close(fd)

    def _outgoing(self, frame: Frame) -> list[list[FrameBuffer]]:
        """What is to be written for a frame: for each write the buffers, the kernel's header first.

        Raises `HeaderLie`.
        """
        return [bare[1:] for bare in finish(frame, Offload.NONE)]

    def _incoming(self, views: Sequence[memoryview], length: int) -> tuple[bytes, int]:
        """The net header and the length of the frame that has been read into the views.

        The kernel's header is in `_header`. Raises `HeaderLie` or `TunHdrLie`.
        """
        return bytes(NET_HDR_SIZE), length

    def _write(self, buffers: Sequence[FrameBuffer]) -> None:
        if len(buffers) > IOV_MAX:
            buffers = [*buffers[: IOV_MAX - 1], b"".join(buffers[IOV_MAX - 1 :])]
        try:
            if not self._calls.writev(self._fd, buffers):
                # FreeBSD, if_tuntap.c: an interface that is down ignores the write.
                self.dropped["interface down"] += 1
        except OSError as error:
            reason = _REFUSALS.get(error.errno or 0)
            if reason is None:
                raise
            self.dropped[reason] += 1

    def _read(self, views: Sequence[memoryview]) -> int:
        """Reads a frame into the views; its length, one more than they hold when it is longer."""
        calls, fd = self._calls, self._fd
        if len(views) <= IOV_MAX - 2:
            return calls.readv(fd, [self._header, *views, self._beyond]) - self.header_size
        private = memoryview(bytearray(min(sum(map(len, views)), LARGEST) + 1))
        length = calls.readv(fd, [self._header, private]) - self.header_size
        if 0 < length < len(private):
            scatter((private[:length],), views)
        return length


_REFUSALS = {
    errno.ENOBUFS: "no memory",
    errno.ENOMEM: "no memory",
    errno.EAGAIN: "no memory",
    errno.EMSGSIZE: "too long",
    errno.EINVAL: "bad header",
}
"""Errors that are about the one frame. All others say that the tap is gone or broken."""


class _OpenBsdPort(BsdTapPort):
    """An OpenBSD tap whose header is on."""

    header_size = TUN_HDR_SIZE

    def _outgoing(self, frame: Frame) -> list[list[FrameBuffer]]:
        outgoing = to_tun(frame)
        if outgoing is not None:
            return [outgoing]
        return [[_NO_TUN_HDR, *finished[1:]] for finished in finish(frame, Offload.NONE)]

    def _incoming(self, views: Sequence[memoryview], length: int) -> tuple[bytes, int]:
        header = self._header
        if bytes(header[:2]) in _NOTHING_UNDONE:
            return bytes(NET_HDR_SIZE), length
        pieces = packets.cut(views, 0, length)
        with_tag = tagged(header, pieces)
        if with_tag is None:
            return from_tun(header, pieces), length
        length += VLAN_TAG
        if length > sum(map(len, views)):
            raise HeaderLie("too long")
        untagged_header, parts = with_tag
        private = bytearray().join(parts)
        net_header = from_tun(untagged_header, [private])
        scatter((private,), views)
        return net_header, length


_NO_TUN_HDR = bytes(TUN_HDR_SIZE)
_NOTHING_UNDONE = frozenset(struct.pack("=H", priority) for priority in range(8))
"""th_flags with nothing but a priority."""


class _FreeBsdPort(BsdTapPort):
    """A FreeBSD tap whose header is on: a `virtio_net_hdr` in host byte order, 12 bytes."""

    header_size = NET_HDR_SIZE
    largest = TAPMRU

    def _outgoing(self, frame: Frame) -> list[list[FrameBuffer]]:
        # if_tuntap.c does not look at gso_type, and takes any frame as it comes: a TCP packet
        # longer than the MTU would be lost at the first bridge. So segments are cut here.
        return [self._with_header(part) for part in finish(frame, Offload.CSUM)]

    def _with_header(self, frame: Frame) -> list[FrameBuffer]:
        """A frame without GSO for the kernel, which finds TCP and UDP only, behind one VLAN tag."""
        header, *pieces = frame
        flags, _, _, _, csum_start, csum_offset, _ = NET_HDR.unpack(header)
        if not flags & HdrFlag.NEEDS_CSUM:
            return [_NO_NET_HDR, *pieces]
        packet = packets.parse(pieces)
        if (
            packet.reason is None
            and not packet.is_fragment
            and packet.l4_protocol in (packets.IPPROTO_TCP, packets.IPPROTO_UDP)
            and (csum_start, csum_offset) == (packet.l4_offset, packet.l4_checksum_offset)
            and (not packet.vlan_count or packet.header[12:14] == b"\x81\0")
            and packet.vlan_count <= 1
        ):
            plain = HdrFlag.NEEDS_CSUM, 0, 0, 0, csum_start, csum_offset, 0
            return [_HOST_NET_HDR.pack(*plain), *pieces]
        ((_, *finished),) = finish(frame, Offload.NONE)
        return [_NO_NET_HDR, *finished]

    def _incoming(self, views: Sequence[memoryview], length: int) -> tuple[bytes, int]:
        if self._header[:2] == b"\0\0":
            return _NO_NET_HDR, length
        flags, gso_type, hdr_len, gso_size, start, offset, _ = _HOST_NET_HDR.unpack(self._header)
        flags &= HdrFlag.NEEDS_CSUM
        if flags and start + offset + 2 > length:
            raise HeaderLie("csum beyond frame")
        if gso_type and not flags:
            raise HeaderLie("gso without csum")
        if gso_type and not gso_size:
            raise HeaderLie("gso size zero")
        if gso_type not in (HdrGso.NONE, HdrGso.TCPV4, HdrGso.TCPV6):
            raise HeaderLie("gso unknown")
        return NET_HDR.pack(flags, gso_type, hdr_len, gso_size, start, offset, 0), length


_HOST_NET_HDR = struct.Struct("=BBHHHHH")
_NO_NET_HDR = bytes(NET_HDR_SIZE)


# --- the links -----------------------------------------------------------------------------------


class _BsdTap(Tap):
    """What both taps share: opening, the one port, and offloads that may change."""

    min_frame = ETHER_HEADER

    def __init__(
        self,
        name: str,
        *,
        fd: int | None = None,
        set_capabilities: Callable[[int], None] | None = None,
        calls: SystemCalls = HOST,
    ) -> None:
        """Opens the tap `name` ("tap0", or a path), or takes over the open `fd`.

        Where this process may not make ioctls (pledge(2), Capsicum), `set_capabilities` asks
        whoever may to set the interface's capabilities, at once or later. It needs `fd`, with the
        kernel's header on already; then no ioctl is made here, and `mtu` is not known.

        Raises `OSError`: EBUSY when somebody else has the tap open, ENOENT or ENXIO when there is
        none, EACCES and EPERM without the right to it. `fd` is closed then as well.
        """
        if set_capabilities is not None and fd is None:
            raise UsageError("set_capabilities needs the descriptor of an open tap")
        self.name = name.removeprefix("/dev/")
        self.accepts = self.delivers = Offload.NONE
        self._calls = calls
        self._helper = set_capabilities
        self._settings_are_ours = set_capabilities is None
        if fd is None:
            path = name if name.startswith("/") else f"/dev/{name}"
            fd = calls.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._fd = fd
        try:
            os.set_blocking(fd, False)
            self._port = self._start()
            self.ports = (self._port,)
            self._measure()
        except BaseException:
            calls.close(fd)
            raise

    @property
    def mtu(self) -> int | None:
        """The interface's MTU in bytes."""
        return self._read_mtu() if self._settings_are_ours else None

    def request_offloads(self, wanted: Offload) -> None:
        """Tells the kernel what the reader takes undone; falls back where it knows less.

        Without the right to change the interface all stays as it is. Frames that wait already stay
        as they are.
        """
        if not self._port.header_size:
            return
        wanted = normalise(wanted)
        for attempt in (wanted, wanted & Offload.CSUM, Offload.NONE):
            try:
                self.delivers = self._set_offloads(attempt)
                break
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EACCES):
                    return
                if error.errno != errno.EINVAL or attempt == Offload.NONE:
                    raise
        self._measure()

    def close(self) -> None:
        """Turns the header off again, for whoever shares the descriptor, and closes the tap."""
        if self._fd >= 0:
            self._fd = -1
            self._stop()
            self._port.close()

    def expect(self, delivers: Offload, mtu: int | None) -> None:
        """See `Tap.expect`."""
        self.delivers = delivers
        if delivers & ~Offload.CSUM:
            self.max_frame = LARGEST
        else:
            self.max_frame = min(ETHER_HEADER + TAGS + (mtu or TUNMRU), LARGEST)

    def leave_control(self, on_truncated: Callable[[], None]) -> None:
        """See `Tap.leave_control`."""
        self._settings_are_ours = False
        self._port.on_truncated = on_truncated

    def _measure(self) -> None:
        """Looks at the MTU again."""
        self.expect(self.delivers, self.mtu)

    @abstractmethod
    def _start(self) -> BsdTapPort:
        """Turns the kernel's header on, without any offload; the port that goes with it."""

    @abstractmethod
    def _stop(self) -> None:
        """Undoes `_start`."""

    @abstractmethod
    def _set_offloads(self, wanted: Offload) -> Offload:
        """Asks the kernel for these offloads; those that frames may come with from now on."""

    @abstractmethod
    def _read_mtu(self) -> int: ...


class OpenBsdTap(_BsdTap):
    """A tap of OpenBSD.

    The kernel's header is turned on with no capabilities when the tap is opened, and with those of
    `request_offloads` later. Written frames may use all of it at any time.
    """

    def _start(self) -> BsdTapPort:
        if self._helper is None:
            try:
                self._calls.ioctl(self._fd, TUNSCAP, TUN_CAPABILITIES.pack(0))
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                return BsdTapPort(self._fd, self._calls, self._measure)
        self.accepts = Offload.CSUM | Offload.TSO4 | Offload.TSO6
        return _OpenBsdPort(self._fd, self._calls, self._measure)

    def _stop(self) -> None:
        if self._settings_are_ours and self._port.header_size:
            # An interface that is gone has no header either.
            with contextlib.suppress(OSError):
                self._calls.ioctl(self._port.fileno(), TUNDCAP, b"")

    def _set_offloads(self, wanted: Offload) -> Offload:
        wanted &= Offload.CSUM | Offload.TSO4 | Offload.TSO6
        capabilities = ifcap_for_openbsd(wanted)
        if self._helper is not None:
            self._helper(int(capabilities))
        else:
            self._calls.ioctl(self._fd, TUNSCAP, TUN_CAPABILITIES.pack(capabilities))
        # OpenBSD has no word for ECN: a frame to be segmented may have the CWR flag.
        return wanted | Offload.ECN if wanted & (Offload.TSO4 | Offload.TSO6) else wanted

    def _read_mtu(self) -> int:
        info = self._calls.ioctl(self._fd, TUNGIFINFO, bytes(OPENBSD_TUNINFO.size))
        return int(OPENBSD_TUNINFO.unpack(info)[0])


class FreeBsdTap(_BsdTap):
    """A tap of FreeBSD.

    The header comes with capabilities of the interface, granted but off. Those for frames that we
    write are turned on when the tap is opened, those for frames that we read by `request_offloads`;
    both need the right to change the interface.
    """

    _INWARD = FreeBsdCap.RXCSUM | FreeBsdCap.RXCSUM_IPV6
    _OURS = (
        _INWARD
        | FreeBsdCap.TXCSUM
        | FreeBsdCap.TXCSUM_IPV6
        | FreeBsdCap.TSO4
        | FreeBsdCap.TSO6
        | FreeBsdCap.LRO
    )

    def _start(self) -> BsdTapPort:
        if self._helper is None:
            self._read_name()
            try:
                self._calls.ioctl(self._fd, TAPSVNETHDR, INT.pack(NET_HDR_SIZE))
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                return BsdTapPort(self._fd, self._calls, self._measure)
        try:
            self._set_offloads(Offload.NONE)
            self.accepts = Offload.CSUM
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
                raise
        return _FreeBsdPort(self._fd, self._calls, self._measure)

    def _stop(self) -> None:
        if self._settings_are_ours and self._port.header_size:
            # An interface that is gone has no header either.
            with contextlib.suppress(OSError):
                self._calls.ioctl(self._port.fileno(), TAPSVNETHDR, INT.pack(0))

    def _read_name(self) -> None:
        """The name that the kernel gave: /dev/tap stands for the next tap that is free."""
        try:
            answer = self._calls.ioctl(self._fd, TAPGIFNAME, bytes(32))
        except OSError:
            return
        self.name = answer[:16].split(b"\0")[0].decode()

    def _set_offloads(self, wanted: Offload) -> Offload:
        capabilities = ifcap_for_freebsd(wanted) | self._INWARD
        if self._helper is not None:
            self._helper(int(capabilities))
            return freebsd_offloads(capabilities)
        control = self._calls.socket()
        try:
            request = IFREQ_CAP.pack(self.name.encode(), 0, 0)
            answer = self._calls.ioctl(control, SIOCGIFCAP, request)
            name, possible, enabled = IFREQ_CAP.unpack(answer)
            capabilities &= possible
            request = IFREQ_CAP.pack(name, enabled & ~int(self._OURS) | capabilities, 0)
            self._calls.ioctl(control, SIOCSIFCAP, request)
        finally:
            self._calls.close(control)
        return freebsd_offloads(capabilities)

    def _read_mtu(self) -> int:
        info = self._calls.ioctl(self._fd, TAPGIFINFO, bytes(FREEBSD_TUNINFO.size))
        return int(FREEBSD_TUNINFO.unpack(info)[1])
