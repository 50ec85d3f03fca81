"""Ethernet, IP and TCP/UDP headers over fragmented buffers, the Internet checksum, segmentation.

A frame is a sequence of pieces, often views of guest memory that the guest may rewrite at any time.
`parse` copies the headers out once, whatever the pieces' boundaries, and decides from that private
copy only; whoever uses the result writes the private copy, never the guest's bytes again. The
payload is neither joined nor copied.

Offsets count from the first byte of the Ethernet header. This module knows nothing of virtio: what
a `virtio_net_hdr` means is in `vq.software`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vq.errors import UsageError

__all__ = [
    "IPPROTO_AH",
    "IPPROTO_FRAGMENT",
    "IPPROTO_ICMP",
    "IPPROTO_ICMPV6",
    "IPPROTO_TCP",
    "IPPROTO_UDP",
    "Buffer",
    "Fragment",
    "Packet",
    "checksum",
    "copy_range",
    "cut",
    "ones_complement_sum",
    "parse",
    "pseudo_header_sum",
    "segment",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes in one piece; a memoryview is one-dimensional and of format "B"."""

ETHERNET_HEADER = 14
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
VLAN_TAGS = frozenset((0x8100, 0x88A8, 0x9100))  # IEEE 802.1Q, 802.1ad, the old QinQ
MAX_VLAN_TAGS = 8

IPPROTO_HOPOPTS = 0
IPPROTO_ICMP = 1
IPPROTO_TCP = 6
IPPROTO_UDP = 17
IPPROTO_ROUTING = 43
IPPROTO_FRAGMENT = 44
IPPROTO_AH = 51
IPPROTO_ICMPV6 = 58
IPPROTO_NONE = 59
IPPROTO_DSTOPTS = 60
IPPROTO_MOBILITY = 135
IPPROTO_HIP = 139
IPPROTO_SHIM6 = 140

# Extension headers whose second byte is their length in 8-byte units without the first
# (RFC 8200, 4.2 to 4.6; RFC 6275, 6.1; RFC 7401, 5.1; RFC 5533, 5.1).
_EXTENSIONS = frozenset(
    (
        IPPROTO_HOPOPTS,
        IPPROTO_ROUTING,
        IPPROTO_DSTOPTS,
        IPPROTO_MOBILITY,
        IPPROTO_HIP,
        IPPROTO_SHIM6,
    )
)
MAX_EXTENSIONS = 16
"""Extension headers followed. RFC 8200, 4.1 knows each once and destination options twice."""

_READ_AHEAD = 128
"""Ethernet, a VLAN tag, IPv6 and a TCP header with all its options fit, so one copy is enough."""

TCP_CHECKSUM = 16
UDP_CHECKSUM = 6
TCP_FIN = 0x01
TCP_PSH = 0x08
TCP_CWR = 0x80  # RFC 3168, 6.1

_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")


class Fragment(enum.IntEnum):
    """Whether a packet is a fragment of a larger one (RFC 791, 3.2; RFC 8200, 4.5)."""

    NONE = 0
    FIRST = 1
    """It starts the packet: the transport header may be there, the rest of the payload is not."""
    LATER = 2
    """It has no transport header."""


@dataclass(slots=True)
class Packet:
    """What the headers of one frame say, as far as they are sound.

    A layer that is truncated, or lies about its length, is absent, with all layers above it, and
    `reason` says why. Every offset lies inside the frame.
    """

    length: int
    """Bytes in the frame."""
    header: bytes = b""
    """A private copy of the first `header_length` bytes."""
    header_length: int = 0
    """Where the deepest header that is sound ends. The payload starts here."""
    reason: str | None = None
    """Why a layer is absent that should be there; None when nothing is wrong with the headers."""
    ethertype: int = 0
    """The type after all VLAN tags; below 0x600 it is a length and LLC follows (IEEE 802.3)."""
    vlan_count: int = 0
    """VLAN tags, the first at offset 12."""
    l2_length: int = 0
    """Where the Ethernet header with its tags ends; 0 when the frame is too short to have one."""
    ip_version: int = 0
    """4 or 6; 0 without a sound IP header."""
    l3_offset: int | None = None
    """Where the IP header starts."""
    l3_length: int = 0
    """Bytes in the IP packet by its own account, its header counted.

    A length field of 0, which offloading senders leave, counts as "up to the frame's end".
    """
    l3_end: int = 0
    """Where the IP packet ends; never beyond the frame. Ethernet padding may follow."""
    extensions: tuple[int, ...] = ()
    """The protocol numbers of the IPv6 extension headers that were followed, in their order."""
    fragment: Fragment = Fragment.NONE
    l4_protocol: int | None = None
    """The protocol number after the IP header and all extension headers."""
    l4_offset: int | None = None
    """Where that protocol's header starts; None when it is not in this frame or not sound."""
    final_destination: int | None = None
    """Where the last address of an IPv6 routing header that is still to be visited stands."""

    @property
    def vlan_offset(self) -> int | None:
        """Where the first VLAN tag starts; None without one."""
        return 12 if self.vlan_count else None

    @property
    def is_fragment(self) -> bool:
        """Whether this is a part of a larger IP packet."""
        return self.fragment is not Fragment.NONE

    @property
    def destination_mac(self) -> bytes:
        """Six bytes; empty when the frame is too short."""
        return self.header[0:6]

    @property
    def source_mac(self) -> bytes:
        """Six bytes; empty when the frame is too short."""
        return self.header[6:12]

    @property
    def l4_checksum_offset(self) -> int | None:
        """The checksum field's offset inside the transport header, as in `csum_offset`.

        None where there is no transport header, or one without an Internet checksum.
        """
        if self.l4_offset is None or self.l4_protocol is None:
            return None
        return _CHECKSUM_OFFSETS.get(self.l4_protocol)


_CHECKSUM_OFFSETS = {
    IPPROTO_TCP: TCP_CHECKSUM,  # RFC 9293, 3.1
    IPPROTO_UDP: UDP_CHECKSUM,  # RFC 768
    IPPROTO_ICMP: 2,  # RFC 792
    IPPROTO_ICMPV6: 2,  # RFC 4443, 2.1
}


def parse(pieces: Sequence[Buffer]) -> Packet:
    """Reads a frame's headers, each byte once, from pieces cut in any way.

    Never fails on what the frame holds: see `Packet` for what becomes of broken headers. Followed
    are up to 8 VLAN tags, IPv4 with options, IPv6 with up to 16 extension headers, TCP, UDP, ICMP
    and ICMPv6. Other ethertypes and LLC have no network layer here and are nothing wrong.
    """
    snapshot = _Snapshot(pieces)
    packet = Packet(snapshot.length)
    packet.reason = _parse_ethernet(packet, snapshot)
    packet.header = snapshot.data[: packet.header_length]
    return packet


class _Snapshot:
    """The private copy of a frame's first bytes; it grows as headers turn out to be longer."""

    __slots__ = ("data", "length", "pieces")

    def __init__(self, pieces: Sequence[Buffer]) -> None:
        self.pieces = pieces
        self.length = sum(map(len, pieces))
        self.data = copy_range(pieces, 0, min(_READ_AHEAD, self.length))

    def reaches(self, end: int) -> bool:
        """Whether the frame has `end` bytes; if so they are in `data` now."""
        have = len(self.data)
        if end <= have:
            return True
        if end > self.length:
            return False
        self.data += copy_range(self.pieces, have, min(end + _READ_AHEAD, self.length))
        return True


def _parse_ethernet(packet: Packet, snapshot: _Snapshot) -> str | None:
    if packet.length < ETHERNET_HEADER:
        return "frame shorter than an Ethernet header"
    offset = ETHERNET_HEADER
    ethertype = _u16(snapshot.data, 12)
    while ethertype in VLAN_TAGS:
        if packet.vlan_count == MAX_VLAN_TAGS:
            return "too many VLAN tags"
        if not snapshot.reaches(offset + 4):
            return "VLAN tag truncated"
        packet.vlan_count += 1
        ethertype = _u16(snapshot.data, offset + 2)
        offset += 4
    packet.ethertype = ethertype
    packet.l2_length = packet.header_length = offset
    if ethertype == ETHERTYPE_IPV4:
        return _parse_ipv4(packet, snapshot, offset)
    if ethertype == ETHERTYPE_IPV6:
        return _parse_ipv6(packet, snapshot, offset)
    return None


def _parse_ipv4(packet: Packet, snapshot: _Snapshot, offset: int) -> str | None:
    # RFC 791, 3.1
    if not snapshot.reaches(offset + 20):
        return "IPv4 header truncated"
    first = snapshot.data[offset]
    if first >> 4 != 4:
        return "IPv4 frame with another IP version"
    end = offset + (first & 15) * 4
    if end < offset + 20:
        return "IPv4 header length below 20"
    if not snapshot.reaches(end):
        return "IPv4 header truncated"
    data = snapshot.data
    length = _u16(data, offset + 2) or packet.length - offset
    if length < end - offset:
        return "IPv4 length shorter than its header"
    _found_ip(packet, 4, offset, length, end)
    packet.l4_protocol = data[offset + 9]
    fragment = _u16(data, offset + 6)
    if fragment & 0x1FFF:
        packet.fragment = Fragment.LATER
    elif fragment & 0x2000:
        packet.fragment = Fragment.FIRST
    if offset + length > packet.length:
        return "IPv4 packet beyond the frame"
    return _parse_transport(packet, snapshot, end)


def _parse_ipv6(packet: Packet, snapshot: _Snapshot, offset: int) -> str | None:
    # RFC 8200, 3
    end = offset + 40
    if not snapshot.reaches(end):
        return "IPv6 header truncated"
    if snapshot.data[offset] >> 4 != 6:
        return "IPv6 frame with another IP version"
    payload = _u16(snapshot.data, offset + 4)
    _found_ip(packet, 6, offset, 40 + payload if payload else packet.length - offset, end)
    if offset + packet.l3_length > packet.length:
        return "IPv6 packet beyond the frame"
    reason, protocol = _follow_extensions(packet, snapshot, end, snapshot.data[offset + 6])
    if reason is not None:
        return reason
    packet.l4_protocol = protocol
    if protocol == IPPROTO_NONE:
        return None
    return _parse_transport(packet, snapshot, packet.header_length)


def _found_ip(packet: Packet, version: int, offset: int, length: int, end: int) -> None:
    packet.ip_version = version
    packet.l3_offset = offset
    packet.l3_length = length
    packet.l3_end = min(offset + length, packet.length)
    packet.header_length = end


def _follow_extensions(
    packet: Packet, snapshot: _Snapshot, offset: int, protocol: int
) -> tuple[str | None, int]:
    """Goes through the IPv6 extension headers; gives why it had to stop, and the next protocol."""
    seen: list[int] = []
    while True:
        if protocol in _EXTENSIONS:
            if protocol == IPPROTO_HOPOPTS and seen:
                return "hop-by-hop options not first", protocol  # RFC 8200, 4.1
            unit, least = 8, 1
        elif protocol == IPPROTO_FRAGMENT:
            unit, least = 0, 8
        elif protocol == IPPROTO_AH:
            unit, least = 4, 2
        else:
            return None, protocol
        if len(seen) == MAX_EXTENSIONS:
            return "too many IPv6 extension headers", protocol
        if not snapshot.reaches(offset + 8):
            return "IPv6 extension header truncated", protocol
        length = (snapshot.data[offset + 1] + least) * unit if unit else least
        end = offset + length
        if end > packet.l3_end or not snapshot.reaches(end):
            return "IPv6 extension header truncated", protocol
        data = snapshot.data
        if protocol == IPPROTO_ROUTING:
            packet.final_destination = _last_segment(data, offset, length)
        elif protocol == IPPROTO_FRAGMENT:
            fragment = _u16(data, offset + 2)
            if fragment & 0xFFF8:
                packet.fragment = Fragment.LATER
            elif fragment & 1:
                packet.fragment = Fragment.FIRST
        seen.append(protocol)
        packet.extensions = tuple(seen)
        packet.header_length = offset = end
        protocol = data[end - length]
        if packet.fragment is Fragment.LATER:
            # What follows is data from the middle of the packet (RFC 8200, 4.5).
            return None, protocol


def _last_segment(data: bytes, offset: int, length: int) -> int | None:
    """Where a routing header has the final destination, if the packet is not there yet."""
    kind, left = data[offset + 2], data[offset + 3]
    if not left or length < 24:
        return None
    if kind == 0:  # RFC 2460, 4.4 (deprecated): addresses in the order of the visit
        return offset + 8 + (length - 8) // 16 * 16 - 16
    if kind in (2, 4):  # RFC 6275, 6.4.1: one address; RFC 8754, 2: the last segment comes first
        return offset + 8
    return None


def _parse_transport(packet: Packet, snapshot: _Snapshot, offset: int) -> str | None:
    if packet.fragment is Fragment.LATER:
        return None
    protocol = packet.l4_protocol
    if protocol == IPPROTO_TCP:
        name, length = "TCP", 20  # RFC 9293, 3.1
    elif protocol == IPPROTO_UDP:
        name, length = "UDP", 8  # RFC 768
    elif protocol == IPPROTO_ICMP and packet.ip_version == 4:
        name, length = "ICMP", 8  # RFC 792
    elif protocol == IPPROTO_ICMPV6 and packet.ip_version == 6:
        name, length = "ICMPv6", 4  # RFC 4443, 2.1
    else:
        packet.l4_offset = offset
        return None
    end = offset + length
    if end > packet.l3_end or not snapshot.reaches(end):
        return f"{name} header truncated"
    if protocol == IPPROTO_TCP:
        end = offset + (snapshot.data[offset + 12] >> 4) * 4
        if end < offset + 20:
            return "TCP header length below 20"
        if end > packet.l3_end or not snapshot.reaches(end):
            return "TCP header truncated"
    packet.l4_offset = offset
    packet.header_length = end
    return None


def _u16(data: bytes, offset: int) -> int:
    return data[offset] << 8 | data[offset + 1]


# --- pieces --------------------------------------------------------------------------------------


def copy_range(pieces: Sequence[Buffer], start: int, stop: int) -> bytes:
    """A private copy of bytes `start` to `stop` of the pieces' bytes; shorter if they end first."""
    if pieces and stop <= len(pieces[0]):
        return bytes(pieces[0][start:stop])
    return b"".join(cut(pieces, start, stop))


def cut(pieces: Sequence[Buffer], start: int, stop: int | None = None) -> list[memoryview]:
    """Views of bytes `start` to `stop` (or the end) of the pieces' bytes; nothing is copied."""
    views: list[memoryview] = []
    position = 0
    for piece in pieces:
        if stop is not None and position >= stop:
            break
        size = len(piece)
        if position + size > start:
            first = max(start - position, 0)
            last = size if stop is None else min(stop - position, size)
            if last > first:
                views.append(memoryview(piece)[first:last])
        position += size
    return views


# --- the Internet checksum -----------------------------------------------------------------------


def ones_complement_sum(pieces: Sequence[Buffer], start: int = 0, initial: int = 0) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), 0 to 0xffff.

    The pieces are summed as if joined, from byte `start` on, whatever their lengths; an odd last
    byte counts as the high half of a word. `initial` is an earlier sum to add to. Of the two forms
    of zero, 0 comes out only when there was nothing but zeros to add, else 0xffff.
    """
    if start:
        pieces = cut(pieces, start)
    total = 0
    nothing = not initial
    odd = False
    for piece in pieces:
        # Words are digits to the base 0x10000, and 0x10000 leaves 1 when divided by 0xffff: the
        # sum of the digits and the number itself have the same remainder (RFC 1071, 1).
        number = int.from_bytes(piece, "big")
        if number:
            nothing = False
        if len(piece) & 1:
            total = total * 256 + number % 0xFFFF
            odd = not odd
        else:
            total += number % 0xFFFF
    if odd:
        total *= 256
    return 0 if nothing else (total + initial) % 0xFFFF or 0xFFFF


def checksum(pieces: Sequence[Buffer], start: int = 0, initial: int = 0) -> int:
    """The Internet checksum (RFC 1071): what goes into the checksum field, 0 to 0xffff.

    It is the complement of `ones_complement_sum` with the same arguments. Over bytes whose
    checksum field is right already, with the pseudo-header's sum as `initial`, it is 0.
    """
    return ones_complement_sum(pieces, start, initial) ^ 0xFFFF


def pseudo_header_sum(packet: Packet, length: int, protocol: int) -> int:
    """The sum of the pseudo-header (RFC 9293, 3.1 for IPv4; RFC 8200, 8.1 for IPv6).

    `length` is that of the transport header and payload in bytes. It is what NEEDS_CSUM wants to
    find in the checksum field.

    The destination is the final one: where an IPv6 routing header (types 0, 2 and 4) still has
    segments left, it is that header's last address, not the one in the IPv6 header (RFC 8200,
    8.1). Other routing types and IPv4 source routes are not looked into. Linux does not look at
    all here: in a packet that it segments it adjusts the sum that the sender left in the field.

    Raises `UsageError` for a packet without a network layer.
    """
    offset = packet.l3_offset
    header = packet.header
    if offset is None:
        raise UsageError("a packet without a network layer has no pseudo-header")
    if packet.ip_version == 4:
        addresses = header[offset + 12 : offset + 20]
    elif packet.final_destination is None:
        addresses = header[offset + 8 : offset + 40]
    else:
        final = packet.final_destination
        addresses = header[offset + 8 : offset + 24] + header[final : final + 16]
    return ones_complement_sum((addresses,), initial=length + protocol)


# --- segmentation --------------------------------------------------------------------------------


def segment(
    packet: Packet, pieces: Sequence[Buffer], size: int, *, partial: bool
) -> list[list[Buffer]]:
    """Cuts a TCP or UDP packet into segments of at most `size` bytes of payload.

    `packet` is what `parse` made of `pieces`. Each segment is a list: one private header, then
    views of the payload, which is not copied. All headers are repeated: VLAN tags, IP options and
    extension headers, TCP options. In each segment are set

    - the IP length, and for IPv4 the identification, one more in each segment whether DF is set or
      not, and the header checksum, whatever it was before;
    - for TCP the sequence number; FIN and PSH stay in the last segment only, CWR in the first
      only (RFC 3168, 6.1.2); for UDP the length;
    - the TCP or UDP checksum: finished, or with `partial` the pseudo-header's sum alone. A UDP
      checksum of 0 is sent as 0xffff (RFC 768), since 0 means none.

    The IP packet is taken to end where the frame ends. A packet without payload gives one segment.

    Raises `UsageError` when `packet` is not whole TCP or UDP over IP, `size` is below 1, or a
    segment would be longer than an IP length field can say.
    """
    l3, l4, protocol = packet.l3_offset, packet.l4_offset, packet.l4_protocol
    if l3 is None or l4 is None or packet.is_fragment or protocol not in (IPPROTO_TCP, IPPROTO_UDP):
        raise UsageError("only whole TCP and UDP packets can be segmented")
    if size < 1:
        raise UsageError("a segment has at least one byte of payload")
    payload = packet.length - packet.header_length
    if packet.header_length - l3 + min(size, payload) > 0xFFFF:
        raise UsageError("a segment does not fit in an IP packet")

    identification = _u16(packet.header, l3 + 4)
    is_ipv4 = packet.ip_version == 4
    if is_ipv4:
        ip_sum = _ipv4_constant_sum(packet.header, l3)
    if protocol == IPPROTO_TCP:
        sequence, flags = _U32.unpack_from(packet.header, l4 + 4)[0], packet.header[l4 + 13]
    pseudo_sum = pseudo_header_sum(packet, 0, protocol)
    checksum_at = l4 + _CHECKSUM_OFFSETS[protocol]

    segments: list[list[Buffer]] = []
    for index, body in enumerate(_chunks(pieces, packet.header_length, size) or [[]]):
        position = index * size
        length = min(size, payload - position)
        header = bytearray(packet.header)
        if is_ipv4:
            total = len(header) - l3 + length
            _set_ipv4(header, l3, total, (identification + index) & 0xFFFF, ip_sum)
        else:
            _U16.pack_into(header, l3 + 4, len(header) - l3 - 40 + length)
        if protocol == IPPROTO_TCP:
            _U32.pack_into(header, l4 + 4, (sequence + position) & 0xFFFFFFFF)
            first, last = index == 0, position + length == payload
            kept = (0xFF if first else ~TCP_CWR) & (0xFF if last else ~(TCP_FIN | TCP_PSH))
            header[l4 + 13] = flags & kept
        else:
            _U16.pack_into(header, l4 + 4, 8 + length)
        partial_sum = (pseudo_sum + len(header) - l4 + length) % 0xFFFF or 0xFFFF
        if partial:
            value = partial_sum
        else:
            _U16.pack_into(header, checksum_at, 0)
            value = checksum([header[l4:], *body], initial=partial_sum)
            if value == 0 and protocol == IPPROTO_UDP:
                value = 0xFFFF
        _U16.pack_into(header, checksum_at, value)
        segments.append([header, *body])
    return segments


def _chunks(pieces: Sequence[Buffer], start: int, size: int) -> list[list[Buffer]]:
    """The bytes from `start` on as groups of views, `size` bytes each, the last one the rest."""
    chunks: list[list[Buffer]] = []
    room = 0
    for view in cut(pieces, start):
        position = 0
        while position < len(view):
            if not room:
                chunks.append([])
                room = size
            part = view[position : position + room]
            chunks[-1].append(part)
            position += len(part)
            room -= len(part)
    return chunks


def _ipv4_constant_sum(header: bytes, l3: int) -> int:
    """The sum of an IPv4 header without its length, identification and checksum."""
    end = l3 + (header[l3] & 15) * 4
    parts = header[l3 : l3 + 2] + header[l3 + 6 : l3 + 10] + header[l3 + 12 : end]
    return ones_complement_sum((parts,))


def _set_ipv4(header: bytearray, l3: int, length: int, identification: int, rest: int) -> None:
    _U16.pack_into(header, l3 + 2, length)
    _U16.pack_into(header, l3 + 4, identification)
    # `rest` holds the version, so the whole is never 0.
    total = (rest + length + identification) % 0xFFFF or 0xFFFF
    _U16.pack_into(header, l3 + 10, total ^ 0xFFFF)
