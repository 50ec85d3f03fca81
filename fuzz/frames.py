"""Frames and net headers out of a fuzzer's bytes: mostly right, wrong in the places it chooses."""

from __future__ import annotations

import struct

from fuzz.inputs import Input
from vq.packet import Buffer

__all__ = ["any_frame", "any_net_header", "pieces_of"]

_GUEST, _OTHERS = b"\2\0\0\0\0\3", b"\2\0\0\0\0\xaa"
_LONGEST = 0x12000  # what a guest of the net targets has room for
_TARGETS = (_OTHERS, _GUEST, b"\xff" * 6, b"\1\0\x5e\0\0\1")


def any_net_header(source: Input) -> bytes:
    """A `virtio_net_hdr`: fields that go together, or anything."""
    kind = source.below(8)
    if kind == 0:
        return bytes(12)
    if kind == 1:
        return source.take(12).ljust(12, b"\0")
    flags = source.pick((1, 1, 1, 0, 2, 3))
    gso_type = source.pick((0, 1, 4, 5, 0x81, 0x84, 3, 0x80))
    start = source.pick((34, 54, 38, 58, 14, source.u8))
    offset = source.pick((16, 6, source.u8))
    hdr_len = source.pick((start + 20, 0, start + 8, 0xFFFF))
    gso_size = source.pick((1448, 8, 1, 0, 64, 7, 536, 0xFFFF, source.u8))
    buffers = source.pick((0, 1, 0xFFFF))
    return struct.pack("<BBHHHHH", flags, gso_type, hdr_len, gso_size, start, offset, buffers)


def any_frame(source: Input) -> bytes:
    """An Ethernet frame: tags, IP, extension headers and TCP or UDP, and what goes wrong in it."""
    if source.chance(16):
        return source.take(source.u8)
    frame = bytearray(source.pick(_TARGETS) + source.pick((_GUEST, _OTHERS)))
    for _ in range(source.pick((0, 0, 0, 1, 2, 9))):
        frame += source.pick((b"\x81\0", b"\x88\xa8", b"\x91\0")) + source.take(2).ljust(2, b"\5")
    payload = source.pick((0, 1, 40, 100, 1460, 3000, 9000, 0xF000, 0x10000))
    protocol = source.pick((6, 6, 17, 1, 58, 44, 51, 59, 255))
    transport = _transport(source, protocol, payload)
    if source.chance(2):
        frame += b"\x86\xdd" + _ipv6(source, protocol, len(transport) + payload)
    else:
        frame += b"\x08\0" + _ipv4(source, protocol, len(transport) + payload)
    frame += transport + bytes(payload)
    for _ in range(source.pick((0, 0, 0, 1, 2, 4))):
        place = source.pick((source.u8, source.u16)) % len(frame)
        frame[place] = source.u8
    if source.chance(8):
        del frame[source.u16 % (len(frame) + 1) :]
    return bytes(frame[:_LONGEST])


def _ipv4(source: Input, protocol: int, length: int) -> bytes:
    options = source.pick((b"", b"", bytes(4), b"\x83\x07\x04" + bytes(37)))
    total = source.pick((20 + len(options) + length, 20 + len(options) + length, 0, 0xFFFF, 19))
    fragment = source.pick((0x4000, 0, 0x2000, 0x0001))
    summed = source.pick((0, 0xFFFF))
    return (
        struct.pack(
            "!BBHHHBBH",
            0x45 + len(options) // 4,
            0,
            total & 0xFFFF,
            0xFFFE,
            fragment,
            64,
            protocol,
            summed,
        )
        + bytes((10, 1, 2, 3, 10, 4, 5, 6))
        + options
    )


def _ipv6(source: Input, protocol: int, length: int) -> bytes:
    chain: list[tuple[int, bytearray]] = []
    for _ in range(source.pick((0, 0, 0, 1, 2, 17))):
        kind = source.pick((60, 0, 43, 44, 51, 135))
        units = source.pick((0, 0, 2, 255))
        body = bytearray(6 + 8 * units)
        if kind == 43:
            body[:2] = bytes((source.pick((4, 2, 0, 3)), source.pick((1, 0, 2))))
        if kind == 44:
            units, body = 0, bytearray(struct.pack("!HI", source.pick((0, 1, 8, 9)), 7))
        chain.append((kind, bytearray((0, units)) + body))
    kinds = [kind for kind, _ in chain] + [protocol]
    for number, (_, body) in enumerate(chain):
        body[0] = kinds[number + 1]
    extensions = b"".join(body for _, body in chain)
    total = source.pick((length + len(extensions), length + len(extensions), 0, 0xFFFF))
    return (
        struct.pack("!IHBB", 0x60000000, total & 0xFFFF, kinds[0], 64)
        + b"\xfd" * 16
        + b"\xfc" * 16
        + extensions
    )


def _transport(source: Input, protocol: int, payload: int) -> bytes:
    if protocol == 6:
        words = source.pick((5, 5, 8, 15, 4))
        options = bytes(max(0, words - 5) * 4)
        flags = source.pick((0x10, 0x19, 0x90))
        return struct.pack("!HHIIBBHHH", 1, 2, 0xFFFFFC00, 4, words << 4, flags, 9, 0, 0) + options
    if protocol == 17:
        return struct.pack("!HHHH", 67, 68, source.pick((8 + payload, 0, 7)) & 0xFFFF, 0)
    if protocol in (1, 58):
        return struct.pack("!BBHHH", 8, 0, 0, 1, 2)
    return source.take(source.below(40))


def pieces_of(source: Input, frame: bytes) -> list[Buffer]:
    """The same bytes in pieces, cut where the source says, some of them empty."""
    cuts = sorted(
        min(len(frame), source.pick((source.u8, source.u16))) for _ in range(source.below(6))
    )
    starts, ends = [0, *cuts], [*cuts, len(frame)]
    return [memoryview(frame)[start:end] for start, end in zip(starts, ends, strict=True)]
