"""OpenBSD's `struct tun_hdr`, and its translation to and from `virtio_net_hdr`.

OpenBSD's tap(4) puts these 8 bytes in front of every frame once TUNSCAP has been called
(net/if_tun.h, OpenBSD 7.7). They say which checksums and which segmentation are left to whoever
takes the frame, and carry a VLAN tag that is not in it. All fields are in host byte order.

The two headers do not say the same. virtio names a place to put a checksum, OpenBSD a protocol:
towards the tap the place is recognised, from the tap it is found in the frame. What `tun_hdr`
cannot say, `to_tun` declines, and the caller does it in software (`vq.software`). The system calls
around this belong to `vq.tap_bsd`.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from collections.abc import Sequence

from vq import packet as packets
from vq.abi import NET_HDR, NET_HDR_GSO_ECN, NET_HDR_SIZE, HdrFlag, HdrGso
from vq.errors import VqError
from vq.packet import Buffer, Packet
from vq.software import MAX_GSO_HEADERS

__all__ = [
    "TUN_HDR",
    "TUN_HDR_SIZE",
    "TunFlag",
    "TunHdr",
    "TunHdrLie",
    "from_tun",
    "tagged",
    "to_tun",
]

TUN_HDR_SIZE = 8


class TunFlag(enum.IntFlag):
    """`tun_hdr.th_flags`, each by its name without ``TUN_H_``."""

    VTAG = 0x10
    """th_vtag holds a VLAN tag (IEEE 802.1Q: priority, DEI, VLAN) that is not in the frame."""
    TCP_MSS = 0x20
    """The frame is to be cut into TCP segments of th_mss bytes of payload."""
    IPV4_CSUM = 0x100
    TCP_CSUM = 0x200
    UDP_CSUM = 0x400
    ICMP_CSUM = 0x800
    """ICMP or ICMPv6. Of TCP, UDP and ICMP one at most."""


TUN_H_PRIO_MASK = 0x7
"""The low bits of th_flags: the packet's priority, which virtio has no place for."""


class TunHdr(ctypes.Structure):
    """`struct tun_hdr`, 8 bytes in host byte order."""

    _fields_ = (
        ("th_flags", ctypes.c_uint16),
        ("th_pad", ctypes.c_uint16),
        ("th_vtag", ctypes.c_uint16),
        ("th_mss", ctypes.c_uint16),
    )


TUN_HDR = struct.Struct("=HHHH")
"""The same four fields for the data path."""

if not ctypes.sizeof(TunHdr) == TUN_HDR.size == TUN_HDR_SIZE:
    raise ImportError("tun_hdr is not 8 bytes on this machine")


class TunHdrLie(VqError):
    """A `tun_hdr` that the frame behind it does not bear out; the frame is to be dropped.

    `reason` is one of these:

    =========================  ====================================================================
    "unknown tun_hdr flag"     something is left undone, and it is not known what
    "two checksums"            more than one of the TCP, UDP and ICMP checksum flags
    "tso without csum"         TCP_MSS without TCP_CSUM
    "tso size zero"            TCP_MSS, and th_mss is 0
    "tso ip length"            TCP_MSS, and bytes follow the IP packet in the frame
    "tso headers"              TCP_MSS, and headers that no segment can have: a fragment's, or an
                               authentication header, or more than 512 bytes of them
    "headers broken"           the frame's own headers are truncated or contradict each other
    "csum of a fragment"       a transport checksum, and the frame is an IP fragment
    "csum wrong protocol"      the checksum of another protocol than the frame's
    =========================  ====================================================================
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_NEEDS_CSUM = int(HdrFlag.NEEDS_CSUM)
_PLAIN_NET_HDR = bytes(NET_HDR_SIZE)
_PLAIN_TUN_HDR = bytes(TUN_HDR_SIZE)
_TRANSPORT = int(TunFlag.TCP_CSUM | TunFlag.UDP_CSUM | TunFlag.ICMP_CSUM)
_UNKNOWN = 0xFFFF ^ int(sum(TunFlag)) ^ TUN_H_PRIO_MASK
_ETHERTYPE_VLAN = b"\x81\x00"
_TAG_OFFSET, _TAG_SIZE = 12, 4

_VTAG = int(TunFlag.VTAG)
_TCP_MSS = int(TunFlag.TCP_MSS)
_IPV4_CSUM = int(TunFlag.IPV4_CSUM)
_TCP_CSUM = int(TunFlag.TCP_CSUM)
_UDP_CSUM = int(TunFlag.UDP_CSUM)
_ICMP_CSUM = int(TunFlag.ICMP_CSUM)

_CSUM_FLAGS = {packets.IPPROTO_TCP: _TCP_CSUM, packets.IPPROTO_UDP: _UDP_CSUM}
_GSO_VERSIONS = {int(HdrGso.TCPV4): 4, int(HdrGso.TCPV6): 6}
_CWR = 0x80  # RFC 3168, 6.1


# --- towards the tap -----------------------------------------------------------------------------


def to_tun(frame: Sequence[Buffer]) -> list[Buffer] | None:
    """A frame with its 12-byte `virtio_net_hdr` in front, as a tap takes it: `tun_hdr`, pieces.

    The net header is one that `vq.software.check_frame` has passed, or `finish` made. A frame that
    leaves work undone has its outermost 802.1Q tag moved into the header: the kernel then finds the
    IP header right behind the Ethernet header. No byte of the frame is copied or written.

    None when `tun_hdr` cannot say what is left undone, or the frame's headers are such that the
    kernel would not find its way: a checksum that is not TCP's or UDP's; UDP segmentation; TSO with
    the ECN bit, which the kernel would copy to every segment, or behind IPv6 extension headers,
    which it does not step over; fragments; a second VLAN tag.
    """
    header, *pieces = frame
    flags, gso_type, _, gso_size, csum_start, csum_offset, _ = NET_HDR.unpack(header)
    if not flags & _NEEDS_CSUM:
        return None if gso_type else [_PLAIN_TUN_HDR, *pieces]
    packet = packets.parse(pieces)
    tun_flags = _checksum_flag(packet, csum_start, csum_offset)
    if not tun_flags:
        return None
    if gso_type:
        if packet.extensions or _GSO_VERSIONS.get(gso_type) != packet.ip_version:
            return None
        if tun_flags != _TCP_CSUM or not gso_size:
            return None
        tun_flags |= _TCP_MSS
    tag = 0
    if packet.vlan_count:
        if packet.vlan_count > 1 or packet.header[_TAG_OFFSET : _TAG_OFFSET + 2] != _ETHERTYPE_VLAN:
            return None
        tag = int.from_bytes(packet.header[_TAG_OFFSET + 2 : _TAG_OFFSET + 4], "big")
        tun_flags |= _VTAG
        behind = packets.cut(pieces, _TAG_OFFSET + _TAG_SIZE)
        pieces = [*packets.cut(pieces, 0, _TAG_OFFSET), *behind]
    return [TUN_HDR.pack(tun_flags, 0, tag, gso_size if gso_type else 0), *pieces]


def _checksum_flag(packet: Packet, csum_start: int, csum_offset: int) -> int:
    """The flag for the checksum that a net header names; 0 when there is none."""
    if packet.reason is not None or packet.is_fragment or packet.l4_protocol is None:
        return 0
    if csum_start != packet.l4_offset or csum_offset != packet.l4_checksum_offset:
        return 0
    if packet.final_destination is not None or packets.IPPROTO_AH in packet.extensions:
        # The kernel would take another address into the sum, or must not touch what is signed.
        return 0
    return _CSUM_FLAGS.get(packet.l4_protocol, 0)


# --- from the tap --------------------------------------------------------------------------------


def tagged(header: Buffer, pieces: Sequence[Buffer]) -> tuple[bytes, list[Buffer]] | None:
    """The frame with the VLAN tag of its `tun_hdr` put in; None when the header carries none.

    Gives the header without its tag, and the frame's pieces with 4 bytes more, none of them copied.
    """
    flags, _, tag, mss = TUN_HDR.unpack(header)
    if not flags & _VTAG:
        return None
    in_frame = _ETHERTYPE_VLAN + tag.to_bytes(2, "big")
    return TUN_HDR.pack(flags & ~_VTAG, 0, 0, mss), [
        *packets.cut(pieces, 0, _TAG_OFFSET),
        in_frame,
        *packets.cut(pieces, _TAG_OFFSET),
    ]


def from_tun(header: Buffer, pieces: Sequence[memoryview | bytearray]) -> bytes:
    """The 12-byte `virtio_net_hdr` of a frame that came with this `tun_hdr`, its tag put in.

    The pieces are the frame's bytes exactly, writable, cut in any way; what they hold is changed in
    place. Into the field of a TCP or UDP checksum left undone goes the pseudo-header's sum, as
    virtio wants it (virtio 1.3, 5.1.6.2): what OpenBSD leaves there is not promised anywhere, and
    in a frame to be segmented it is a sum without the length. The checksums of the IPv4 header and
    of ICMP, which virtio has no word for, are finished.

    num_buffers is 0, as from every link. Raises `TunHdrLie`.
    """
    flags, _, _, mss = TUN_HDR.unpack(header)
    if not flags & ~TUN_H_PRIO_MASK:
        return _PLAIN_NET_HDR
    if flags & (_UNKNOWN | _VTAG):
        raise TunHdrLie("unknown tun_hdr flag")
    transport = flags & _TRANSPORT
    if transport & (transport - 1):
        raise TunHdrLie("two checksums")
    packet = packets.parse(pieces)
    if packet.reason is not None:
        raise TunHdrLie("headers broken")
    if flags & _IPV4_CSUM:
        _finish_ipv4_header(packet, pieces)
    if flags & _TCP_MSS:
        return _segmented_header(packet, pieces, transport, mss)
    if transport == _ICMP_CSUM:
        _finish_icmp(packet, pieces)
        return _PLAIN_NET_HDR
    if not transport:
        return _PLAIN_NET_HDR
    start, offset = _leave_pseudo_sum(packet, pieces, transport)
    return NET_HDR.pack(_NEEDS_CSUM, 0, 0, 0, start, offset, 0)


def _segmented_header(
    packet: Packet, pieces: Sequence[memoryview | bytearray], transport: int, mss: int
) -> bytes:
    if transport != _TCP_CSUM:
        raise TunHdrLie("tso without csum")
    if not mss:
        raise TunHdrLie("tso size zero")
    if packet.l3_end != packet.length:
        raise TunHdrLie("tso ip length")
    if (
        packets.IPPROTO_FRAGMENT in packet.extensions
        or packets.IPPROTO_AH in packet.extensions
        or packet.header_length > MAX_GSO_HEADERS
    ):
        raise TunHdrLie("tso headers")
    start, offset = _leave_pseudo_sum(packet, pieces, transport)
    if packet.length - packet.header_length <= mss:
        # One segment is no segmentation, and a guest may refuse it as such.
        return NET_HDR.pack(_NEEDS_CSUM, 0, 0, 0, start, offset, 0)
    gso_type = int(HdrGso.TCPV4 if packet.ip_version == 4 else HdrGso.TCPV6)
    if packet.header[start + 13] & _CWR:
        gso_type |= NET_HDR_GSO_ECN
    return NET_HDR.pack(_NEEDS_CSUM, gso_type, packet.header_length, mss, start, offset, 0)


def _leave_pseudo_sum(
    packet: Packet, pieces: Sequence[memoryview | bytearray], transport: int
) -> tuple[int, int]:
    """Writes the pseudo-header's sum into the checksum field; gives csum_start and csum_offset."""
    protocol = packets.IPPROTO_TCP if transport == _TCP_CSUM else packets.IPPROTO_UDP
    start, offset = _transport_header(packet, protocol)
    value = packets.pseudo_header_sum(packet, packet.l3_end - start, protocol)
    _store(pieces, start + offset, value)
    return start, offset


def _finish_icmp(packet: Packet, pieces: Sequence[memoryview | bytearray]) -> None:
    protocol = packets.IPPROTO_ICMP if packet.ip_version == 4 else packets.IPPROTO_ICMPV6
    start, offset = _transport_header(packet, protocol)
    initial = 0
    if packet.ip_version == 6:  # RFC 4443, 2.3; ICMP over IPv4 has no pseudo-header (RFC 792)
        initial = packets.pseudo_header_sum(packet, packet.l3_end - start, protocol)
    _store(pieces, start + offset, 0)
    value = packets.checksum(packets.cut(pieces, start, packet.l3_end), initial=initial)
    _store(pieces, start + offset, value)


def _transport_header(packet: Packet, protocol: int) -> tuple[int, int]:
    """Where the transport header of this protocol starts, and the checksum field in it."""
    if packet.is_fragment:
        raise TunHdrLie("csum of a fragment")
    start, offset = packet.l4_offset, packet.l4_checksum_offset
    if start is None or offset is None or packet.l4_protocol != protocol:
        raise TunHdrLie("csum wrong protocol")
    return start, offset


def _finish_ipv4_header(packet: Packet, pieces: Sequence[memoryview | bytearray]) -> None:
    start = packet.l3_offset
    if start is None or packet.ip_version != 4:
        raise TunHdrLie("csum wrong protocol")
    end = start + (packet.header[start] & 15) * 4
    parts = packet.header[start : start + 10] + packet.header[start + 12 : end]
    _store(pieces, start + 10, packets.checksum((parts,)))


def _store(pieces: Sequence[memoryview | bytearray], offset: int, value: int) -> None:
    """Writes 16 bits in network order, also where a boundary lies between the two bytes."""
    data = value.to_bytes(2, "big")
    for view in packets.cut(pieces, offset, offset + 2):
        view[:] = data[: len(view)]
        data = data[len(view) :]
