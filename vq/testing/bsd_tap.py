"""Stand-ins for the tap(4) of OpenBSD and of FreeBSD, on Linux, for tests.

`OpenBsdKernel` and `FreeBsdKernel` are the system calls that `vq.tap_bsd` makes, answered as those
kernels answer them. Behind each of their taps is a real Linux tap, so that what vq writes meets a
real network stack and what it reads comes from one::

    kernel = OpenBsdKernel({"tap0": "vqtest0"})
    tap = OpenBsdTap("tap0", calls=kernel)     # the Linux tap vqtest0 exists from now on

Checksums and segments that a BSD kernel would make are left to Linux: a frame's header is turned
into the Linux tap's. This file shares no code with `vq.packet`, `vq.software` and `vq.tun_hdr`, so
that a mistake cannot hide on both sides. Built from tap(4), net/if_tun.h and net/if_tap.h.

What a BSD kernel takes without a word but gets wrong later is noted in `complaints`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["FreeBsdKernel", "OpenBsdKernel"]

Buffer: TypeAlias = bytes | bytearray | memoryview

FIONREAD = 0x4004667F
_FRAME_MAX = 65536

# Linux, uapi/linux/if_tun.h; the ioctls without a direction that depends on the processor are
# spelled out for the others.
_ODD = os.uname().machine.startswith(("mips", "ppc", "sparc", "alpha"))
_TUNSETIFF = 0x800454CA if _ODD else 0x400454CA
_TUNSETOFFLOAD = 0x800454D0 if _ODD else 0x400454D0
_TAP_NO_PI_VNET_HDR = 0x5002
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_VNET = struct.Struct("=BBHHHH")
_NEEDS_CSUM = 1
_GSO_TCPV4, _GSO_TCPV6 = 1, 4

_TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58


@dataclass
class _Tap:
    """One tap interface of the kernel, and the Linux tap that it is made of."""

    name: str
    linux: str
    fd: int = -1
    header: int = 0
    """Bytes of the offload header in front of each frame, 0 while it is off."""
    capabilities: int = 0
    peeked: bytes | None = None
    gone: bool = False
    mtu: int = 1500


@dataclass(frozen=True)
class _Headers:
    """Where things are in an IP packet inside an Ethernet frame."""

    version: int
    protocol: int
    network: int
    transport: int
    tags: int


class _Kernel(ABC):
    """What both kernels have in common: devices with one opener each, frames in and out."""

    offload_ioctls = True
    """Set to False for a kernel from before these: their requests give ENOTTY."""

    def __init__(self, taps: Mapping[str, str]) -> None:
        """`taps` maps this kernel's names ("tap0") to those of the Linux taps to be made."""
        self._taps = {name: _Tap(name, linux) for name, linux in taps.items()}
        self._sockets: set[int] = set()
        self.complaints: list[str] = []
        """Frames that this kernel takes but does not do right, or loses in silence."""
        self.full = False
        """While True every frame written finds the queue full."""

    # --- the system calls of vq.tap_bsd.SystemCalls ---------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """Opens /dev/tapN, and with it makes the Linux tap; EBUSY when it is open already."""
        tap = self._taps.get(path.removeprefix("/dev/"))
        if tap is None or tap.gone:
            raise _error(errno.ENXIO, path)
        if tap.fd >= 0:
            raise _error(errno.EBUSY, path)
        if flags & os.O_ACCMODE != os.O_RDWR:
            raise _error(errno.EACCES, path)
        fd = os.open("/dev/net/tun", flags)
        try:
            fcntl.ioctl(
                fd, _TUNSETIFF, struct.pack("16sH22x", tap.linux.encode(), _TAP_NO_PI_VNET_HDR)
            )
            fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
        except OSError:
            os.close(fd)
            raise
        tap.fd = fd
        return fd

    def socket(self) -> int:
        """A socket for the ioctls of interfaces."""
        fd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
        self._sockets.add(fd)
        return fd

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        """One request on a tap or a socket; the argument as the kernel gives it back."""
        if fd in self._sockets:
            return self._socket_ioctl(request, argument)
        tap = self._tap(fd)
        if tap.gone:
            raise _error(errno.ENXIO)
        if request == FIONREAD:
            return struct.pack("=i", self._waiting(tap))
        return self._tap_ioctl(tap, request, argument)

    def readv(self, fd: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """One frame, its header first; what does not fit into the buffers is cut in silence."""
        tap = self._tap(fd)
        if tap.gone:
            raise _error(errno.EIO)
        raw, tap.peeked = tap.peeked, None
        frame = self._encode(tap, raw if raw is not None else self._read_linux(tap))
        done = 0
        for buffer in buffers:
            piece = frame[done : done + len(buffer)]
            memoryview(buffer)[: len(piece)] = piece
            done += len(piece)
        return done

    def writev(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """One frame, its header first."""
        tap = self._tap(fd)
        if tap.gone:
            raise _error(errno.EIO)
        data = b"".join(bytes(buffer) for buffer in buffers)
        return self._write(tap, data)

    def close(self, fd: int) -> None:
        """Closing a tap resets its header and its capabilities, and drops what waits in it."""
        if fd in self._sockets:
            self._sockets.discard(fd)
        else:
            tap = self._tap(fd)
            tap.fd, tap.header, tap.capabilities, tap.peeked = -1, 0, 0, None
        os.close(fd)

    # --- for the test -----------------------------------------------------------------------------

    def set_mtu(self, name: str, mtu: int) -> None:
        """Sets what this kernel says is the interface's MTU; the Linux tap keeps its own."""
        self._taps[name].mtu = mtu

    def destroy(self, name: str) -> None:
        """Takes the interface away, as ``ifconfig tapN destroy`` does."""
        self._taps[name].gone = True

    # --- the two kernels' differences -----------------------------------------------------------

    @abstractmethod
    def _tap_ioctl(self, tap: _Tap, request: int, argument: bytes) -> bytes: ...

    def _socket_ioctl(self, request: int, argument: bytes) -> bytes:
        raise _error(errno.ENOTTY)

    @abstractmethod
    def _encode(self, tap: _Tap, raw: bytes) -> bytes:
        """A frame with Linux's header in front, as a read of this kernel gives it."""

    @abstractmethod
    def _write(self, tap: _Tap, data: bytes) -> int: ...

    # --- shared pieces --------------------------------------------------------------------------

    def _tap(self, fd: int) -> _Tap:
        for tap in self._taps.values():
            if tap.fd == fd >= 0:
                return tap
        raise _error(errno.EBADF)

    def _read_linux(self, tap: _Tap) -> bytes:
        return os.read(tap.fd, _VNET.size + _FRAME_MAX + 32)

    def _write_linux(self, tap: _Tap, header: bytes, frame: bytes | bytearray) -> None:
        if self.full:
            raise _error(errno.ENOBUFS)
        os.writev(tap.fd, [header, frame])

    def _waiting(self, tap: _Tap) -> int:
        """Bytes of the next frame, without its header; 0 when none waits."""
        if tap.peeked is None:
            try:
                tap.peeked = self._read_linux(tap)
            except BlockingIOError:
                return 0
        return len(tap.peeked) - _VNET.size

    def _ask_linux(self, tap: _Tap, csum: bool, tso4: bool, tso6: bool) -> None:
        """Has Linux leave undone what the reader takes undone; it segments only unsummed frames."""
        flags = 0
        if csum:
            flags = _TUN_F_CSUM | (_TUN_F_TSO4 if tso4 else 0) | (_TUN_F_TSO6 if tso6 else 0)
        fcntl.ioctl(tap.fd, _TUNSETOFFLOAD, flags)


class OpenBsdKernel(_Kernel):
    """OpenBSD's tap(4) with TUNSCAP (net/if_tun.h 1.18)."""

    TUNSCAP = 0x800474C4
    TUNGCAP = 0x400474C4
    TUNDCAP = 0x200074C4
    TUNSIFINFO = 0x800C745B
    TUNGIFINFO = 0x400C745C
    _CAPABILITIES = 0x71F7
    _CSUM_CAPABILITIES = 0x2 | 0x4 | 0x80 | 0x100
    _VLAN_HWTAGGING, _TSOV4, _TSOV6 = 0x20, 0x1000, 0x2000
    _HDR = struct.Struct("=HHHH")
    _VTAG, _TCP_MSS = 0x10, 0x20
    _IPV4_CSUM, _TCP_CSUM, _UDP_CSUM, _ICMP_CSUM = 0x100, 0x200, 0x400, 0x800
    _INFO = struct.Struct("=IHHI")

    def _tap_ioctl(self, tap: _Tap, request: int, argument: bytes) -> bytes:
        if request == self.TUNGIFINFO:
            return self._INFO.pack(tap.mtu, 6, 0, 0)
        if not self.offload_ioctls:
            raise _error(errno.ENOTTY)
        if request == self.TUNSCAP:
            (wanted,) = struct.unpack("=I", argument)
            if wanted & ~self._CAPABILITIES:
                raise _error(errno.EINVAL)
            self._capable(tap, self._HDR.size, wanted)
            return argument
        if request == self.TUNGCAP:
            if not tap.header:
                raise _error(errno.ENODEV)
            return struct.pack("=I", tap.capabilities)
        if request == self.TUNDCAP:
            self._capable(tap, 0, 0)
            return argument
        raise _error(errno.ENOTTY)

    def _capable(self, tap: _Tap, header: int, capabilities: int) -> None:
        tap.header, tap.capabilities = header, capabilities
        self._ask_linux(
            tap,
            capabilities & self._CSUM_CAPABILITIES == self._CSUM_CAPABILITIES,
            bool(capabilities & self._TSOV4),
            bool(capabilities & self._TSOV6),
        )

    def _waiting(self, tap: _Tap) -> int:
        waiting = super()._waiting(tap)
        return waiting + tap.header if waiting else 0

    def _encode(self, tap: _Tap, raw: bytes) -> bytes:
        flags, gso_type, _, gso_size, start, offset = _VNET.unpack_from(raw)
        frame = bytearray(raw[_VNET.size :])
        if not tap.header:
            return bytes(frame)
        tun_flags = tag = mss = 0
        if flags & _NEEDS_CSUM:
            tun_flags |= self._TCP_CSUM if offset == 16 else self._UDP_CSUM
            # What OpenBSD leaves here is nobody's promise: for a frame to be segmented it is a sum
            # without the length. So whoever relies on the field must not get away with it.
            frame[start + offset : start + offset + 2] = b"\xde\xad"
        if gso_type & 0x7F:
            tun_flags |= self._TCP_MSS
            mss = gso_size
        if tap.capabilities & self._VLAN_HWTAGGING and frame[12:14] == b"\x81\x00":
            tun_flags |= self._VTAG
            (tag,) = struct.unpack_from("!H", frame, 14)
            del frame[12:16]
        return self._HDR.pack(tun_flags, 0, tag, mss) + frame

    def _write(self, tap: _Tap, data: bytes) -> int:
        smallest = 14 + tap.header
        if not smallest <= len(data) <= smallest + _FRAME_MAX:
            raise _error(errno.EMSGSIZE)
        frame = bytearray(data[tap.header :])
        if not tap.header:
            self._write_linux(tap, bytes(_VNET.size), frame)
            return len(data)
        flags, pad, tag, mss = self._HDR.unpack_from(data)
        if pad or flags & ~0xF37:
            self.complaints.append(f"tun_hdr with flags {flags:#x} and th_pad {pad:#x}")
        summed = flags & (self._TCP_CSUM | self._UDP_CSUM | self._ICMP_CSUM)
        if summed & (summed - 1):
            raise _error(errno.EINVAL)
        if flags & self._VTAG:
            frame[12:12] = struct.pack("!HH", 0x8100, tag)
        header = self._header_for_linux(flags, mss, frame)
        self._write_linux(tap, header, frame)
        return len(data)

    def _header_for_linux(self, flags: int, mss: int, frame: bytearray) -> bytes:
        """Puts into the frame and into Linux's header what the flags of tun_hdr ask for."""
        if not flags & ~(self._VTAG | 0x7):
            return bytes(_VNET.size)
        found = _headers(frame)
        if found is None:
            self.complaints.append(f"offload flags {flags:#x} on a frame that is no IP packet")
            return bytes(_VNET.size)
        if flags & self._IPV4_CSUM:
            if found.version == 4:
                _sum_ipv4_header(frame, found)
            else:
                self.complaints.append("TUN_H_IPV4_CSUM on an IPv6 packet")
        start = offset = gso_type = size = 0
        for flag, protocols, where in (
            (self._TCP_CSUM, (_TCP,), 16),
            (self._UDP_CSUM, (_UDP,), 6),
            (self._ICMP_CSUM, (_ICMP, _ICMP6), 2),
        ):
            if flags & flag:
                if found.protocol not in protocols:
                    self.complaints.append(f"flags {flags:#x} on protocol {found.protocol}")
                    continue
                start, offset = found.transport, where
                _write_pseudo_sum(frame, found, start + offset)
        if flags & self._TCP_MSS:
            if not flags & self._TCP_CSUM or mss == 0:
                self.complaints.append(f"TUN_H_TCP_MSS with flags {flags:#x} and th_mss {mss}")
            else:
                gso_type, size = (_GSO_TCPV4 if found.version == 4 else _GSO_TCPV6), mss
        length = start + (frame[start + 12] >> 4) * 4 if gso_type else 0
        return _VNET.pack(_NEEDS_CSUM if start else 0, gso_type, length, size, start, offset)


class FreeBsdKernel(_Kernel):
    """FreeBSD's tap(4) with TAPSVNETHDR (net/if_tap.h)."""

    TAPSVNETHDR = 0x8004745B
    TAPGVNETHDR = 0x4004745E
    TAPGIFINFO = 0x4008745C
    TAPGIFNAME = 0x4020745D
    SIOCSIFCAP = 0x8020691E
    SIOCGIFCAP = 0xC020691F
    # RXCSUM TXCSUM VLAN_HWCSUM TSO4 TSO6 LRO VLAN_HWTSO RXCSUM_IPV6 TXCSUM_IPV6
    _HDR_CAPABILITIES = 0x3 | 0x80 | 0x700 | 0x40000 | 0x600000
    _LINKSTATE = 0x80000
    _TXCSUM, _TSO4, _TSO6 = 0x400002, 0x100, 0x200

    def __init__(self, taps: Mapping[str, str]) -> None:
        super().__init__(taps)
        self.up = True
        """While False the interfaces are down: a write takes nothing and returns 0."""
        for tap in self._taps.values():
            tap.capabilities = self._LINKSTATE

    def close(self, fd: int) -> None:
        """Closing a tap takes back the header, and with it the capabilities that came with it."""
        super().close(fd)
        for tap in self._taps.values():
            if tap.fd < 0:
                tap.capabilities = self._LINKSTATE

    def _tap_ioctl(self, tap: _Tap, request: int, argument: bytes) -> bytes:
        if request == self.TAPGIFINFO:
            return struct.pack("=iHBB", 0, tap.mtu, 6, 0)
        if request == self.TAPGIFNAME:
            return struct.pack("16s16x", tap.name.encode())
        if not self.offload_ioctls:
            raise _error(errno.ENOTTY)
        if request == self.TAPSVNETHDR:
            (size,) = struct.unpack("=i", argument)
            if size not in (0, 10, 12):
                raise _error(errno.EINVAL)
            tap.header = size
            if not size:
                tap.capabilities &= ~self._HDR_CAPABILITIES
                self._ask_linux(tap, False, False, False)
            return argument
        if request == self.TAPGVNETHDR:
            return struct.pack("=i", tap.header)
        raise _error(errno.ENOTTY)

    def _socket_ioctl(self, request: int, argument: bytes) -> bytes:
        if request not in (self.SIOCGIFCAP, self.SIOCSIFCAP) or len(argument) != 32:
            raise _error(errno.ENOTTY)
        name = argument[:16].rstrip(b"\0").decode()
        tap = self._taps.get(name)
        if tap is None or tap.gone:
            raise _error(errno.ENXIO)
        possible = self._LINKSTATE | (self._HDR_CAPABILITIES if tap.header else 0)
        if request == self.SIOCGIFCAP:
            return argument[:16] + struct.pack("=II8x", possible, tap.capabilities)
        (wanted,) = struct.unpack_from("=I", argument, 16)
        if wanted & ~possible:
            raise _error(errno.EINVAL)
        tap.capabilities = wanted
        self._ask_linux(
            tap,
            wanted & self._TXCSUM == self._TXCSUM,
            bool(wanted & self._TSO4),
            bool(wanted & self._TSO6),
        )
        return argument

    def _encode(self, tap: _Tap, raw: bytes) -> bytes:
        if not tap.header:
            return raw[_VNET.size :]
        flags, gso_type, length, size, start, offset = _VNET.unpack_from(raw)
        header = _VNET.pack(flags & _NEEDS_CSUM, gso_type, length, size, start, offset)
        return header + bytes(tap.header - _VNET.size) + raw[_VNET.size :]

    def _write(self, tap: _Tap, data: bytes) -> int:
        if not self.up:
            return 0
        if len(data) > 65535 + tap.header:
            raise _error(errno.EIO)
        frame = bytearray(data[tap.header :])
        if len(frame) < 14:
            self.complaints.append(f"a frame of {len(frame)} bytes is lost")
            return len(data)
        header = bytes(_VNET.size)
        if tap.header:
            flags, gso_type, _, _, start, offset = _VNET.unpack_from(data)
            if gso_type:
                self.complaints.append(f"gso_type {gso_type}, which the kernel does not look at")
            if flags & 3:
                # The kernel looks behind one VLAN tag and finds TCP and UDP only.
                found = _headers(frame)
                if found is None or found.tags > 1 or found.protocol not in (_TCP, _UDP):
                    self.complaints.append("a frame with a checksum undone that is lost")
                    return len(data)
            if flags & _NEEDS_CSUM:
                header = _VNET.pack(_NEEDS_CSUM, 0, 0, 0, start, offset)
        self._write_linux(tap, header, frame)
        return len(data)


def _error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def _headers(frame: bytes | bytearray) -> _Headers | None:
    """Where the IP and transport headers are; None for what is no whole, unfragmented IP packet."""
    at, tags = 12, 0
    while frame[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
        at, tags = at + 4, tags + 1
    ethertype, at = frame[at : at + 2], at + 2
    if ethertype == b"\x08\x00" and len(frame) >= at + 20:
        if frame[at + 6] & 0x3F or frame[at + 7]:
            return None
        return _Headers(4, frame[at + 9], at, at + (frame[at] & 0xF) * 4, tags)
    if ethertype == b"\x86\xdd" and len(frame) >= at + 40:
        protocol, transport = frame[at + 6], at + 40
        while protocol in (0, 43, 60) and len(frame) > transport + 8:
            protocol, transport = frame[transport], transport + 8 + frame[transport + 1] * 8
        return _Headers(6, protocol, at, transport, tags)
    return None


def _sum(data: bytes | bytearray) -> int:
    """The sum of 16-bit words in one's complement arithmetic, in network byte order."""
    if len(data) % 2:
        data = data + b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _sum_ipv4_header(frame: bytearray, found: _Headers) -> None:
    field = found.network + 10
    frame[field : field + 2] = bytes(2)
    struct.pack_into("!H", frame, field, 0xFFFF ^ _sum(frame[found.network : found.transport]))


def _write_pseudo_sum(frame: bytearray, found: _Headers, field: int) -> None:
    """Writes what Linux wants to find in the field; OpenBSD does not look at it either."""
    at = found.network
    if found.protocol == _ICMP:
        pseudo = bytearray()
    elif found.version == 4:
        (total,) = struct.unpack_from("!H", frame, at + 2)
        length = total - (found.transport - at)
        pseudo = frame[at + 12 : at + 20] + struct.pack("!HH", found.protocol, length)
    else:
        (payload,) = struct.unpack_from("!H", frame, at + 4)
        length = payload - (found.transport - at - 40)
        pseudo = frame[at + 8 : at + 40] + struct.pack("!HH", found.protocol, length)
    struct.pack_into("!H", frame, field, _sum(pseudo))
