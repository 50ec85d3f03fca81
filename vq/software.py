"""Doing in software what a link or a guest cannot, and judging what a guest asks for.

Both work on frames as links take them (`vq.link`): a list of buffers, the first one the 12-byte
`virtio_net_hdr`, then the frame's bytes in pieces. `check_frame` holds a guest's net header against
the frame and against what the guest negotiated; `finish` computes the checksums and cuts the
segments that the next one will not do. What the headers of a frame say is `vq.packet`'s business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from vq import packet as packets
from vq.abi import NET_HDR, NET_HDR_GSO_ECN, NET_HDR_SIZE, HdrFlag, HdrGso
from vq.errors import VqError
from vq.offload import ALL, Offload
from vq.packet import Buffer, Packet

__all__ = [
    "MIN_TCP_GSO_SIZE",
    "MOST_OF_START",
    "PLAIN_HEADER",
    "HeaderLie",
    "UsualStarts",
    "check_frame",
    "finish",
]

_Frame: TypeAlias = list[Buffer]
"""`vq.link.Frame`, which stands in a layer above."""

PLAIN_HEADER = bytes(NET_HDR_SIZE)
"""The net header of a frame that leaves nothing undone."""

MIN_TCP_GSO_SIZE = 8
"""Linux's smallest send MSS, 48, less 40 bytes of options: no real sender goes below.

Without a limit a guest could have tens of thousands of segments made out of one frame.
"""
MAX_TCP_SEGMENTS = 1024
"""With 64 bytes each they make a frame of 64 KiB; no real path has a smaller MSS (Linux: 88)."""
MAX_UDP_SEGMENTS = 128
"""As Linux has it (`UDP_MAX_SEGMENTS`)."""
MAX_GSO_HEADERS = 512
"""Bytes of headers that are repeated in each segment."""

_PLAIN = bytes(10)  # num_buffers says nothing in a frame that is sent (virtio 1.3, 5.1.6.2)
_NEEDS_CSUM = int(HdrFlag.NEEDS_CSUM)
_GSO_NONE = int(HdrGso.NONE)
_GSO_TCPV4, _GSO_TCPV6 = int(HdrGso.TCPV4), int(HdrGso.TCPV6)
_USUAL_HEADERS = 14 + 40 + 60  # Ethernet, IPv6, TCP with all options
MOST_OF_START = NET_HDR_SIZE + _USUAL_HEADERS
"""Bytes that `UsualStarts` looks at, at most."""
_ETHERNET_HEADER = 14


class HeaderLie(VqError):
    """A net header that is not permitted, or that the frame does not bear out.

    The frame is to be dropped and counted; the device goes on. `reason` is one of these:

    ==========================  ===================================================================
    "csum not negotiated"       NEEDS_CSUM, and the guest may not leave checksums undone
    "csum in Ethernet header"   csum_start is below 14: the checksum could overwrite an address
    "csum beyond frame"         csum_start + csum_offset + 2 is more than the frame's length
    "gso not negotiated"        a gso_type that the guest may not use (UFO: never)
    "gso unknown"               a gso_type that virtio does not have, or not without a tunnel
    "ecn not negotiated"        the ECN bit, and the guest may not use it
    "ecn without tcp"           the ECN bit with a gso_type that is not TCP
    "gso without csum"          a gso_type, and NEEDS_CSUM is not set
    "gso size zero"             a gso_type, and gso_size is 0
    "gso size too small"        it makes more segments of the frame than any real driver asks for
    "gso size too large"        a segment would be longer than an IP packet can be
    "gso headers broken"        the headers in the frame are truncated or contradict each other
    "gso headers too long"      more than 512 bytes of headers
    "gso wrong ip version"      gso_type and the frame's IP version differ
    "gso wrong protocol"        gso_type and the frame's transport protocol differ
    "gso of a fragment"         the frame is an IP fragment, or has a fragment header
    "gso of authenticated"      an authentication header, whose value no segment would match
    "gso ip length"             bytes follow the IP packet in the frame
    "gso csum position"         the checksum asked for is not the TCP or UDP header's
    ==========================  ===================================================================
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_frame(frame: _Frame, length: int, allowed: Offload) -> _Frame:
    """Judges the net header of a frame that a guest sends (virtio 1.3, 5.1.6.2).

    `frame` is ``[net header (a private copy), piece, ...]``, `length` the bytes in the pieces and
    `allowed` what the guest may leave undone: its CSUM and HOST_* features.

    Returns the frame with a header for the link: of the flags only NEEDS_CSUM, num_buffers 0,
    fields that have no meaning 0. hdr_len is cut down to the frame's length (a Linux tap refuses
    more), and exact in a GSO frame. The pieces are the ones given; only in a GSO frame the first
    of them is a private copy of all headers, the one that was checked. An IP length and an IPv4
    header checksum that were left 0, as some drivers do, are filled in there.

    Raises `HeaderLie`.
    """
    header = frame[0]
    if header[:10] == _PLAIN:
        return frame if header == PLAIN_HEADER else [PLAIN_HEADER, *frame[1:]]
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = NET_HDR.unpack(header)
    permitted = int(allowed)
    if flags & _NEEDS_CSUM:
        if not permitted & _CSUM:
            raise HeaderLie("csum not negotiated")
        _check_csum(csum_start, csum_offset, length)
    elif gso_type == _GSO_NONE:
        return [PLAIN_HEADER, *frame[1:]]
    pieces = frame[1:]
    if gso_type == _GSO_NONE:
        hdr_len, gso_size = min(hdr_len, length), 0
    elif (flags & _NEEDS_CSUM and permitted & _GSO_OFFLOADS.get(gso_type, 0)) and (
        usual := _usual_tcp(pieces, gso_type, gso_size, csum_start, csum_offset, length)
    ):
        hdr_len, pieces = len(usual[0]), usual
    else:
        packet = _checked_gso(header, pieces, permitted)
        hdr_len = packet.header_length
        pieces = [_mended_headers(packet), *packets.cut(pieces, hdr_len)]
    cleaned = NET_HDR.pack(_NEEDS_CSUM, gso_type, hdr_len, gso_size, csum_start, csum_offset, 0)
    return [cleaned, *pieces]


def finish(frame: _Frame, accepts: Offload) -> list[_Frame]:
    """Does what `frame` leaves undone and `accepts` does not have; returns the frames to send.

    A frame that leaves nothing undone but what is accepted comes back as it is. A GSO frame whose
    type is not accepted becomes its segments (see `vq.packet.segment`), with checksums left undone
    where CSUM is accepted. Without CSUM nothing is accepted: the checksum is computed from
    csum_start to the frame's end and put at csum_offset, whatever the protocol, and the header
    says nothing any more, not even DATA_VALID. Payload is never copied: up to the end of the
    headers or of the checksum field the bytes are private, views of the pieces follow.

    For frames from a guest (after `check_frame`) and for frames from a link. Raises `HeaderLie`
    when the header is not true of the frame.
    """
    header = frame[0]
    if header[:2] == b"\0\0":
        return [frame]
    flags, gso_type, _, _, csum_start, csum_offset, _ = NET_HDR.unpack(header)
    accepted = int(accepts)
    if not accepted & _CSUM:
        accepted = 0
    if gso_type != _GSO_NONE:
        return _finish_gso(frame, accepted)
    if accepted:
        return [frame]
    if not flags & _NEEDS_CSUM:
        return [[PLAIN_HEADER, *frame[1:]]]
    return [[PLAIN_HEADER, *_finish_checksum(frame[1:], csum_start, csum_offset)]]


def _finish_gso(frame: _Frame, accepted: int) -> list[_Frame]:
    header, pieces = frame[0], frame[1:]
    flags, gso_type, _, gso_size, csum_start, csum_offset, _ = NET_HDR.unpack(header)
    if not flags & _NEEDS_CSUM:  # no guest may be given it so either (virtio 1.3, 5.1.6.4.1)
        raise HeaderLie("gso without csum")
    wanted = _GSO_OFFLOADS.get(gso_type, 0)
    if wanted and accepted & wanted == wanted:
        return [frame]
    packet = _checked_gso(header, pieces, _ALL)
    if gso_type == HdrGso.UDP_L4 and accepted & _udp_offload(packet):
        return [frame]
    header = PLAIN_HEADER
    if accepted:
        header = NET_HDR.pack(
            _NEEDS_CSUM, _GSO_NONE, packet.header_length, 0, csum_start, csum_offset, 0
        )
    segments = packets.segment(packet, pieces, gso_size, partial=bool(accepted))
    return [[header, *segment] for segment in segments]


def _finish_checksum(pieces: Sequence[Buffer], start: int, offset: int) -> list[Buffer]:
    """The pieces with the checksum from `start` on put at `start + offset`."""
    length = sum(map(len, pieces))
    _check_csum(start, offset, length)
    field = start + offset
    head = bytearray(packets.copy_range(pieces, 0, field + 2))
    rest = packets.cut(pieces, field + 2)
    # The field holds the pseudo-header's sum, and is summed with the rest (virtio 1.3, 5.1.6.2).
    value = packets.checksum([head[start:], *rest])
    if value == 0 and offset == packets.UDP_CHECKSUM:
        value = 0xFFFF  # RFC 768: 0 would mean that there is no checksum
    head[field : field + 2] = value.to_bytes(2, "big")
    return [head, *rest]


# --- what may be asked for -----------------------------------------------------------------------

_CSUM = int(Offload.CSUM)  # plain integers: an operation on flags costs more than all the rest
_ECN = int(Offload.ECN)
_ALL = int(ALL)
_GSO_OFFLOADS = {
    int(HdrGso.TCPV4): int(Offload.TSO4),
    int(HdrGso.TCPV6): int(Offload.TSO6),
    HdrGso.TCPV4 | NET_HDR_GSO_ECN: int(Offload.TSO4 | Offload.ECN),
    HdrGso.TCPV6 | NET_HDR_GSO_ECN: int(Offload.TSO6 | Offload.ECN),
    int(HdrGso.UDP_L4): int(Offload.USO4 | Offload.USO6),
}
"""What each gso_type asks for; UDP_L4 asks for one of the two, as the frame's IP version has it."""


def _check_csum(start: int, offset: int, length: int) -> None:
    if start < _ETHERNET_HEADER:
        raise HeaderLie("csum in Ethernet header")
    if start + offset + 2 > length:
        raise HeaderLie("csum beyond frame")


# Ethertype; version and header length, total length, fragment, protocol, checksum.
_IPV4_START = struct.Struct("!12xHBxH2xHxBH")
# Ethertype; version, payload length, next header.
_IPV6_START = struct.Struct("!12xHB3xHB")


class UsualStarts:
    """Says what `check_frame` says of usual frames, from their first bytes alone.

    `permitted` is the `Offload` of the guest as an int. Frames come in numbers that differ in
    nothing but their addresses, numbers and lengths: what such frames have alike is remembered, and
    is compared all at once.
    """

    def __init__(self, permitted: int) -> None:
        self._permitted = permitted
        self._kinds: dict[bytes, _Kind] = {}

    def checked(self, start: bytes, length: int) -> bytes | None:
        """What the link gets in the place of `start`: as many bytes, with a cleaned net header.

        `start` is a private copy of up to `MOST_OF_START` bytes, the net header first, and `length`
        the bytes in the frame behind that. None for a frame that is not usual, or of which more
        has to be seen. In a GSO frame all headers are among these bytes, and were checked.
        """
        kind = self._kinds.get(start[:NET_HDR_SIZE])
        if kind is not None:
            size, fixed, same, lengths, behind, longest = kind
            if (
                len(start) >= size
                and int.from_bytes(start, "little") & fixed == same
                and length <= longest
            ):
                total, not_zero = lengths(start)
                if total + behind == length and not_zero:
                    return start
        return self._judged(start, length)

    def _judged(self, start: bytes, length: int) -> bytes | None:
        flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers = (
            NET_HDR.unpack_from(start)
        )
        frame, permitted = start[NET_HDR_SIZE:], self._permitted
        if not (flags or gso_type):
            return PLAIN_HEADER + frame
        if not (flags & _NEEDS_CSUM and permitted & _CSUM):
            return None
        if gso_type == _GSO_NONE:
            if csum_start < _ETHERNET_HEADER or csum_start + csum_offset + 2 > length:
                return None
            hdr_len = min(hdr_len, length)
            return NET_HDR.pack(_NEEDS_CSUM, 0, hdr_len, 0, csum_start, csum_offset, 0) + frame
        if not permitted & _GSO_OFFLOADS.get(gso_type, 0):
            return None
        end = _usual_headers(frame, gso_type, gso_size, csum_start, csum_offset, length)
        if not end:
            return None
        if flags == _NEEDS_CSUM and hdr_len == end and not num_buffers:  # as Linux' driver says it
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            self._kinds[start[:NET_HDR_SIZE]] = _kind_of(start, end, gso_type, gso_size)
            return start
        cleaned = NET_HDR.pack(_NEEDS_CSUM, gso_type, end, gso_size, csum_start, csum_offset, 0)
        return cleaned + frame


class _Kind(NamedTuple):
    """What frames to be segmented that are alike have alike, beside their net headers."""

    size: int
    """Bytes of all headers, the net header among them."""
    fixed: int
    """Which bits have to be the same, of the start as a little-endian number; and what they are."""
    same: int
    lengths: Callable[[bytes], tuple[int, int]]
    """Gives the length out of the IP header, and something that must not be 0."""
    behind: int
    """How many bytes are not in that length."""
    longest: int
    """Bytes of the longest such frame that is usual."""


_MOST_KINDS = 64
# Ethertype; version and header length, fragment, protocol; the TCP header's length.
_IPV4_FIXED = bytes.fromhex("ffff ff 0000000000 3fff 00 ff") + bytes(22) + b"\xf0"
# Ethertype; version, next header; the TCP header's length.
_IPV6_FIXED = bytes.fromhex("ffff f0 0000000000 ff") + bytes(45) + b"\xf0"
_BEFORE_TYPE = bytes(NET_HDR_SIZE + 12)
_IPV4_LENGTHS = struct.Struct("!28xH6xH")  # total length, checksum
_IPV6_LENGTHS = struct.Struct("!30xHB")  # payload length, next header


def _kind_of(start: bytes, end: int, gso_type: int, gso_size: int) -> _Kind:
    """What frames are alike to this one, whose headers end there, and which is a usual one."""
    v4 = gso_type == _GSO_TCPV4
    fixed = int.from_bytes(_BEFORE_TYPE + (_IPV4_FIXED if v4 else _IPV6_FIXED), "little")
    longest = end + gso_size * MAX_TCP_SEGMENTS
    if end - _ETHERNET_HEADER + gso_size > 0xFFFF:
        longest = min(longest, _ETHERNET_HEADER + 0xFFFF)
    return _Kind(
        NET_HDR_SIZE + end,
        fixed,
        int.from_bytes(start, "little") & fixed,
        (_IPV4_LENGTHS if v4 else _IPV6_LENGTHS).unpack_from,
        _ETHERNET_HEADER if v4 else _ETHERNET_HEADER + 40,
        longest,
    )


def _usual_tcp(
    pieces: Sequence[Buffer],
    gso_type: int,
    gso_size: int,
    csum_start: int,
    csum_offset: int,
    length: int,
) -> list[Buffer] | None:
    """The pieces of a frame to be segmented, headers private and first, if nothing is unusual."""
    start = bytes(pieces[0][:_USUAL_HEADERS])
    end = _usual_headers(start, gso_type, gso_size, csum_start, csum_offset, length)
    if not end:
        return None
    first = pieces[0]
    if len(first) == end:
        return [start[:end], *pieces[1:]]
    return [start[:end], memoryview(first)[end:], *pieces[1:]]


def _usual_headers(
    start: bytes, gso_type: int, gso_size: int, csum_start: int, csum_offset: int, length: int
) -> int:
    """How long the headers are of a frame to be segmented, if nothing is unusual; else 0.

    Usual is what nearly all such frames are: TCP right behind an IP header without options or
    extensions, without a VLAN tag, all lengths true, and all headers in its first bytes, `start`.
    They pass `_checked_gso` and need no mending, at a tenth of the price. Anything else, bad frames
    too, is for that function to judge.
    """
    if len(start) < csum_start + 20 or csum_offset != packets.TCP_CHECKSUM:
        return 0
    if gso_type == _GSO_TCPV4 and csum_start == 34:
        ethertype, version, total, fragment, protocol, checksum = _IPV4_START.unpack_from(start)
        if (
            (ethertype, version, protocol) != (packets.ETHERTYPE_IPV4, 0x45, packets.IPPROTO_TCP)
            or fragment & 0x3FFF
            or not checksum
        ):
            return 0
    elif gso_type == _GSO_TCPV6 and csum_start == 54:
        ethertype, version, total, protocol = _IPV6_START.unpack_from(start)
        if (ethertype, version >> 4, protocol) != (
            packets.ETHERTYPE_IPV6,
            6,
            packets.IPPROTO_TCP,
        ) or not total:
            return 0
        total += 40
    else:
        return 0
    tcp_header = (start[csum_start + 12] >> 4) * 4
    end = csum_start + tcp_header
    if (
        tcp_header < 20
        or end > min(len(start), MAX_GSO_HEADERS)
        or total + _ETHERNET_HEADER != length
        or gso_size < MIN_TCP_GSO_SIZE
        or length - end > gso_size * MAX_TCP_SEGMENTS
        or end - _ETHERNET_HEADER + min(gso_size, length - end) > 0xFFFF
    ):
        return 0
    return end


def _checked_gso(header: Buffer, pieces: Sequence[Buffer], permitted: int) -> Packet:
    """The headers of a GSO frame; raises `HeaderLie` unless they and the net header agree."""
    flags, gso_type, _, gso_size, csum_start, csum_offset, _ = NET_HDR.unpack(header)
    _check_gso_type(gso_type, permitted)
    if not flags & _NEEDS_CSUM:
        raise HeaderLie("gso without csum")
    if not gso_size:
        raise HeaderLie("gso size zero")
    packet = packets.parse(pieces)
    _check_gso_packet(packet, gso_type & ~NET_HDR_GSO_ECN)
    if gso_type == HdrGso.UDP_L4 and not permitted & _udp_offload(packet):
        raise HeaderLie("gso not negotiated")
    if csum_start != packet.l4_offset or csum_offset != packet.l4_checksum_offset:
        raise HeaderLie("gso csum position")
    _check_gso_size(packet, gso_size)
    return packet


def _check_gso_type(gso_type: int, permitted: int) -> None:
    kind = gso_type & ~NET_HDR_GSO_ECN
    if kind == HdrGso.UDP:
        raise HeaderLie("gso not negotiated")
    if kind != gso_type and kind in (HdrGso.NONE, HdrGso.UDP_L4):
        raise HeaderLie("ecn without tcp")
    if kind not in _GSO_OFFLOADS:
        raise HeaderLie("gso unknown")
    if not permitted & _GSO_OFFLOADS[kind]:
        raise HeaderLie("gso not negotiated")
    if kind != gso_type and not permitted & _ECN:
        raise HeaderLie("ecn not negotiated")


def _check_gso_packet(packet: Packet, kind: int) -> None:
    if packet.reason is not None:
        raise HeaderLie("gso headers broken")
    if packet.ip_version == 0 or (kind, packet.ip_version) in _WRONG_VERSION:
        raise HeaderLie("gso wrong ip version")
    if packet.is_fragment or packets.IPPROTO_FRAGMENT in packet.extensions:
        raise HeaderLie("gso of a fragment")
    if packets.IPPROTO_AH in packet.extensions:
        raise HeaderLie("gso of authenticated")
    udp = kind == HdrGso.UDP_L4
    if packet.l4_protocol != (packets.IPPROTO_UDP if udp else packets.IPPROTO_TCP):
        raise HeaderLie("gso wrong protocol")
    if packet.header_length > MAX_GSO_HEADERS:
        raise HeaderLie("gso headers too long")
    if packet.l3_end != packet.length:
        raise HeaderLie("gso ip length")


_WRONG_VERSION = frozenset(((int(HdrGso.TCPV4), 6), (int(HdrGso.TCPV6), 4)))


def _check_gso_size(packet: Packet, gso_size: int) -> None:
    payload = packet.length - packet.header_length
    if packet.l4_protocol == packets.IPPROTO_UDP:
        too_small = payload > gso_size * MAX_UDP_SEGMENTS
    else:
        too_small = gso_size < MIN_TCP_GSO_SIZE or payload > gso_size * MAX_TCP_SEGMENTS
    if too_small:
        raise HeaderLie("gso size too small")
    if packet.header_length - packet.l2_length + min(gso_size, payload) > 0xFFFF:
        raise HeaderLie("gso size too large")


def _udp_offload(packet: Packet) -> int:
    return int(Offload.USO4 if packet.ip_version == 4 else Offload.USO6)


def _mended_headers(packet: Packet) -> bytes:
    """The private headers, with an IP length or IPv4 header checksum that is 0 filled in.

    Segments get both anew, but a Linux host that is given the frame whole drops it without.
    """
    l3 = packet.l3_offset
    if l3 is None or packet.l3_length > 0xFFFF:
        return packet.header
    header = bytearray(packet.header)
    if packet.ip_version == 6:
        header[l3 + 4 : l3 + 6] = (packet.l3_length - 40).to_bytes(2, "big")
        return bytes(header)
    if header[l3 + 2 : l3 + 4] == b"\0\0" or header[l3 + 10 : l3 + 12] == b"\0\0":
        header[l3 + 2 : l3 + 4] = packet.l3_length.to_bytes(2, "big")
        header[l3 + 10 : l3 + 12] = b"\0\0"
        end = l3 + (header[l3] & 15) * 4
        header[l3 + 10 : l3 + 12] = packets.checksum([header[l3:end]]).to_bytes(2, "big")
    return bytes(header)
