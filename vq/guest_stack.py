"""What a guest's network stack does around its driver: leave work undone, and finish or rejoin it.

The scripted guest of `vq loopback` uses it. It sums in its own way, so that it judges how a device
does it; of `vq.packet` it uses only where headers are.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from vq.abi import NET_HDR_GSO_ECN, HdrFlag, HdrGso, NetFeature
from vq.net_driver import NetHeader
from vq.packet import IPPROTO_AH, IPPROTO_FRAGMENT, Packet, parse

__all__ = ["MTU", "GuestStack", "finish_checksum", "rejoin"]

MTU = 1500
"""IP packets longer than this leave the guest as GSO frames."""
_MAX_IP = 0xFFFF
_MAX_HEADERS = 256
"""Longer than the IP and TCP headers of any GSO frame that a stack makes."""
_TCP, _UDP = 6, 17
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_URG, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80


class GuestStack:
    """What a guest's network stack does before a frame reaches its driver.

    `features` are the ones negotiated: they say what may be left undone.
    """

    def __init__(self, features: int) -> None:
        def has(feature: NetFeature) -> bool:
            return bool(features >> feature & 1)

        self._csum = has(NetFeature.CSUM)
        self._ecn = has(NetFeature.HOST_ECN)
        self._gso = {
            (4, _TCP): HdrGso.TCPV4 if has(NetFeature.HOST_TSO4) else None,
            (6, _TCP): HdrGso.TCPV6 if has(NetFeature.HOST_TSO6) else None,
            (4, _UDP): HdrGso.UDP_L4 if has(NetFeature.HOST_USO) else None,
            (6, _UDP): HdrGso.UDP_L4 if has(NetFeature.HOST_USO) else None,
        }

    def leave_undone(self, data: bytes) -> tuple[NetHeader, bytes, int]:
        """The frame as the guest sends it: net header, bytes, and how many segments it makes.

        Work is left undone only where doing it gives the captured bytes again: not in fragments,
        nor where the captured checksum is wrong, absent, or another way to write the same sum.
        """
        plain = NetHeader(), data, 1
        if not self._csum:
            return plain
        packet = parse((data,))
        start, offset = packet.l4_offset, packet.l4_checksum_offset
        if packet.l4_protocol not in (_TCP, _UDP) or start is None or offset is None:
            return plain
        if packet.is_fragment:
            return plain
        header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=start, csum_offset=offset)
        partial = _with_partial_checksum(packet, data, start, offset)
        if finish_checksum(header, partial) != data:
            return plain
        gso_type = self._gso_type(packet, data, start)
        if not gso_type:
            return header, partial, 1
        length = packet.header_length
        gso_size = MTU - (length - packet.l2_length)
        segments = -(-(len(data) - length) // gso_size)
        return (
            header._replace(gso_type=gso_type, gso_size=gso_size, hdr_len=length),
            partial,
            segments,
        )

    def _gso_type(self, packet: Packet, data: bytes, start: int) -> int:
        """What kind of GSO frame it is to leave as; 0 for none."""
        gso_type = self._gso.get((packet.ip_version, packet.l4_protocol or 0))
        if gso_type is None or packet.length - packet.l2_length <= MTU:
            return 0
        # Neither a stack's GSO frames: segments of these would not be their like.
        if packet.header_length - packet.l2_length > _MAX_HEADERS or any(
            header in packet.extensions for header in (IPPROTO_AH, IPPROTO_FRAGMENT)
        ):
            return 0
        flags = data[start + 13] if packet.l4_protocol == _TCP else 0
        if flags & (_TCP_SYN | _TCP_RST | _TCP_URG) or (flags & _TCP_CWR and not self._ecn):
            return 0
        # Lengths or an IPv4 checksum that a stack would not have written are not written again.
        if rejoin((data,), _MAX_IP) != data:
            return 0
        return gso_type | (NET_HDR_GSO_ECN if flags & _TCP_CWR else 0)


def _with_partial_checksum(packet: Packet, data: bytes, start: int, offset: int) -> bytes:
    """`data` with only the pseudo-header's sum where its checksum is (virtio 1.3, 5.1.6.2)."""
    return _with_u16(data, start + offset, _pseudo_sum(packet, packet.l3_end - start))


def finish_checksum(header: NetHeader, data: bytes) -> bytes:
    """A received frame with its checksum finished, as a guest's stack does it or leaves it out."""
    if not header.flags & HdrFlag.NEEDS_CSUM:
        return data
    field = header.csum_start + header.csum_offset
    value = _checksum(data[header.csum_start :])
    if not value and header.csum_offset == 6:
        value = 0xFFFF  # UDP has no other way to say zero (RFC 768)
    return _with_u16(data, field, value)


def rejoin(segments: Sequence[bytes], mtu: int) -> bytes | None:
    """The frame of which these are the segments; None if they are not one frame's segments.

    What a kernel's receive offload does, and as strict: all but the last are of one size, headers
    agree but for what changes from one segment to the next, lengths and checksums are right, and no
    IP packet is longer than `mtu` bytes. FIN and PSH are for the last segment, CWR for the first.
    """
    packets = [parse((segment,)) for segment in segments]
    if not packets or packets[0].l4_protocol not in (_TCP, _UDP):
        return None
    first, last = packets[0], packets[-1]
    if any(packet.l4_offset is None or packet.is_fragment for packet in packets):
        return None
    size = first.length - first.header_length
    payload = bytearray()
    for index, (packet, segment) in enumerate(zip(packets, segments, strict=True)):
        if _constant_part(packet, index, len(payload)) != _constant_part(first, 0, 0):
            return None
        if packet.l3_length > mtu or not _is_sound(packet, segment):
            return None
        carried = segment[packet.header_length :]
        if len(carried) > size or (packet is not last and len(carried) < size):
            return None
        if not carried and index:
            return None
        if packet.l4_protocol == _TCP:
            never = 0 if packet is first else _TCP_CWR
            never |= 0 if packet is last else _TCP_FIN | _TCP_PSH
            if packet.header[(packet.l4_offset or 0) + 13] & never:
                return None
        payload += carried
    if first.header_length - first.l2_length + len(payload) > _MAX_IP:
        return None
    return _whole(first, last, bytes(payload))


def _constant_part(packet: Packet, index: int, position: int) -> bytes:
    """The headers with what changes from segment to segment set back or blotted out.

    The segment is number `index` and starts `position` bytes into the stream. Lengths, checksums
    and three of TCP's flags are blotted out.
    """
    header = bytearray(packet.header)
    l3, l4 = packet.l3_offset or 0, packet.l4_offset or 0
    if packet.ip_version == 4:
        identification = int.from_bytes(header[l3 + 4 : l3 + 6], "big")
        header[l3 + 4 : l3 + 6] = (identification - index & 0xFFFF).to_bytes(2, "big")
        header[l3 + 2 : l3 + 4] = header[l3 + 10 : l3 + 12] = bytes(2)
    else:
        header[l3 + 4 : l3 + 6] = bytes(2)
    if packet.l4_protocol == _TCP:
        sequence = int.from_bytes(header[l4 + 4 : l4 + 8], "big")
        header[l4 + 4 : l4 + 8] = (sequence - position & 0xFFFFFFFF).to_bytes(4, "big")
        header[l4 + 13] &= ~(_TCP_FIN | _TCP_PSH | _TCP_CWR) & 0xFF
        header[l4 + 16 : l4 + 18] = bytes(2)
    else:
        header[l4 + 4 : l4 + 8] = bytes(4)
    return bytes(header)


def _is_sound(packet: Packet, data: bytes) -> bool:
    """Whether all lengths in the headers are the frame's, and all checksums right."""
    l3, l4 = packet.l3_offset or 0, packet.l4_offset or 0
    if packet.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        sound = _u16(data, l3 + 2) == len(data) - l3 and not _checksum(data[l3:end])
    else:
        sound = _u16(data, l3 + 4) == len(data) - l3 - 40
    if packet.l4_protocol == _UDP:
        sound = sound and _u16(data, l4 + 4) == len(data) - l4 and _u16(data, l4 + 6) != 0
    return sound and not _checksum(data[l4:], _pseudo_sum(packet, len(data) - l4))


def _whole(first: Packet, last: Packet, payload: bytes) -> bytes:
    """One frame of the first segment's headers and all payload, lengths and checksums anew."""
    data = bytearray(first.header + payload)
    l3, l4 = first.l3_offset or 0, first.l4_offset or 0
    if first.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        data[l3 + 2 : l3 + 4] = (len(data) - l3).to_bytes(2, "big")
        data[l3 + 10 : l3 + 12] = bytes(2)
        data[l3 + 10 : l3 + 12] = _checksum(data[l3:end]).to_bytes(2, "big")
    else:
        data[l3 + 4 : l3 + 6] = (len(data) - l3 - 40).to_bytes(2, "big")
    if first.l4_protocol == _TCP:
        data[l4 + 13] |= last.header[l4 + 13]
    else:
        data[l4 + 4 : l4 + 6] = (len(data) - l4).to_bytes(2, "big")
    whole = parse((data,))
    offset = first.l4_checksum_offset or 0
    partial = _with_partial_checksum(whole, bytes(data), l4, offset)
    header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=l4, csum_offset=offset)
    return finish_checksum(header, partial)


# The guest sums in its own way, word by word, so that it judges how the device does it.


def _pseudo_sum(packet: Packet, length: int) -> int:
    """The sum of the pseudo-header for `length` bytes of transport header and payload."""
    l3, header = packet.l3_offset or 0, packet.header
    if packet.ip_version == 4:
        addresses = header[l3 + 12 : l3 + 20]
    else:
        final = packet.final_destination or l3 + 24  # RFC 8200, 8.1
        addresses = header[l3 + 8 : l3 + 24] + header[final : final + 16]
    return _checksum(addresses, length + (packet.l4_protocol or 0)) ^ 0xFFFF


def _checksum(data: bytes | bytearray, initial: int = 0) -> int:
    """The Internet checksum (RFC 1071); `initial` is a sum to go on from."""
    words = array("H", data + b"\0" if len(data) % 2 else data)
    if sys.byteorder == "little":
        words.byteswap()
    total = initial + sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _u16(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 2], "big")


def _with_u16(data: bytes, position: int, value: int) -> bytes:
    return b"".join((data[:position], value.to_bytes(2, "big"), data[position + 2 :]))
