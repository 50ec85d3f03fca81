"""Frames for tests, and a second, slow way to compute checksums; shares no code with `vq`."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

MACS = b"\2\0\0\0\0\1\2\0\0\0\0\3"
TCP, UDP = 6, 17
VLAN = b"\x81\x00\x00\x05"
QINQ = b"\x88\xa8\x00\x05\x81\x00\x00\x06"
HOP_BY_HOP = (0, b"\0\1\4\0\0\0\0")
DESTINATION = (60, b"\1\1\x0c" + bytes(12))
FINAL = bytes.fromhex("fd00000000000000000000000000beef")
SEGMENT_ROUTING = (43, b"\2\4\1\0\0\0\0" + FINAL)
SOURCE_ROUTING = (43, b"\4\0\2\0\0\0\0" + bytes(range(16)) + FINAL)


def slow_sum(data: bytes) -> int:
    """RFC 1071, word by word, the carry folded in each time."""
    total = 0
    for position in range(0, len(data), 2):
        low = data[position + 1] if position + 1 < len(data) else 0
        total += data[position] * 256 + low
        if total > 0xFFFF:
            total = (total & 0xFFFF) + 1
    return total


def make_payload(length: int) -> bytes:
    return bytes((7 * i + i // 256) & 255 for i in range(length))


def make_frame(
    payload: bytes,
    *,
    protocol: int = TCP,
    version: int = 4,
    vlan: bytes = b"",
    options: bytes = b"",
    extensions: Sequence[tuple[int, bytes]] = (),
    final: bytes | None = None,
    identification: int = 0xFFFE,
    fragment: int = 0x4000,
    tcp_flags: int = 0x19,
    tcp_options: bytes = b"",
    sequence: int = 0xFFFFFC00,
    ip_checksum: bool = True,
) -> bytes:
    """An Ethernet frame as a driver leaves it: the pseudo-header's sum in the checksum field."""
    if version == 4:
        addresses = bytes((10, 1, 2, 3)) + bytes((10, 4, 5, 6))
    else:
        addresses = b"\xfd" + bytes(range(1, 16)) + b"\xfd" + bytes(range(17, 32))
    if protocol == TCP:
        offset_and_flags = ((20 + len(tcp_options)) // 4 << 12) | tcp_flags
        fields = (1000, 2000, sequence, 4, offset_and_flags, 100)
        before, after = struct.pack("!HHIIHH", *fields), b"\0\0" + tcp_options
    else:
        before, after = struct.pack("!HHH", 1000, 2000, 8 + len(payload)), b""
    length = len(before) + 2 + len(after) + len(payload)
    source = addresses[: len(addresses) // 2]
    target = final or addresses[len(addresses) // 2 :]
    pseudo = source + target + struct.pack("!II", length, protocol)
    transport = before + slow_sum(pseudo).to_bytes(2, "big") + after
    if version == 4:
        words = (20 + len(options) + length, identification, fragment, 64, protocol, 0)
        network = bytes((0x45 + len(options) // 4, 3)) + struct.pack("!HHHBBH", *words)
        network += addresses + options
        if ip_checksum:
            value = 0xFFFF - slow_sum(network)
            network = network[:10] + value.to_bytes(2, "big") + network[12:]
        ethertype = b"\x08\x00"
    else:
        chain, following = b"", protocol
        for kind, body in reversed(extensions):
            chain, following = bytes((following,)) + body + chain, kind
        network = struct.pack("!IHBB", 0x60012345, len(chain) + length, following, 64)
        network += addresses + chain
        ethertype = b"\x86\xdd"
    return MACS + vlan + ethertype + network + transport + payload


def split(data: bytes | bytearray, cuts: Sequence[int]) -> list[memoryview]:
    """The bytes in pieces that end at these places; pieces may be empty."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    whole = memoryview(data)
    return [whole[a:b] for a, b in itertools.pairwise(edges)]
