"""The DHCP server that answers a guest: any frame at all."""

from __future__ import annotations

import struct

from fuzz.frames import any_frame, pieces_of
from fuzz.inputs import Input
from vq.dhcp import LocalDhcp
from vq.packet import checksum, ones_complement_sum, parse

_GUEST = b"\2\0\0\0\0\3"
_SERVER = LocalDhcp(_GUEST, "100.64.1.3", "100.64.1.2", host_name="guest", dns=["100.64.1.2"])
_OURS, _THEIRS = bytes((100, 64, 1, 2)), bytes((100, 64, 1, 3))


def run(data: bytes) -> None:
    """Shows the server a frame; an answer is a sound frame for the guest."""
    source = Input(data)
    frame = any_frame(source) if source.chance(8) else _request(source)
    answer = _SERVER.answer(pieces_of(source, frame))
    assert answer == _SERVER.answer([frame]), "the answer depends on where the frame is cut"
    if answer is None:
        return
    assert 14 + 28 + 300 <= len(answer) <= 1514 and answer[6:12] == _SERVER.server_mac
    packet = parse([answer])
    assert packet.reason is None and packet.l3_end == len(answer) and packet.l4_protocol == 17
    assert checksum([answer[14:34]]) == 0
    pseudo = ones_complement_sum([answer[26:34]], initial=17 + len(answer) - 34)
    assert checksum([answer[34:]], initial=pseudo) == 0


def _request(source: Input) -> bytes:
    options = b""
    while source.chance(2) or (source.more and len(options) < 200):
        code = source.pick((53, 54, 50, 61, 52, 55, 12, 0, 255))
        value = source.pick(
            (bytes((source.below(9),)), _OURS, _THEIRS, b"", source.take(source.below(32)))
        )
        size = source.pick((len(value), len(value), len(value), 255))
        options += bytes((code,)) if code in (0, 255) else bytes((code, size)) + value
    message = struct.pack(
        "!BBBBIHH4s4s4s4s16s64s128s",
        *(source.pick((1, 1, 1, 2)), 1, source.pick((6, 6, 16)), 0, 7, 0),
        source.pick((0, 0x8000, 0xFFFF)),
        source.pick((bytes(4), bytes(4), _THEIRS, _OURS)),
        *(bytes(4), bytes(4), source.pick((bytes(4), bytes(4), _OURS))),
        source.pick((_GUEST, _GUEST, _GUEST, bytes(6))),
        options[-64:] if source.chance(4) else b"",
        options[-128:] if source.chance(4) else b"",
    )
    message += source.pick((b"\x63\x82\x53\x63", b"\x63\x82\x53\x63", b"")) + options
    size = source.pick((8 + len(message), 8 + len(message), 8, 0xFFFF))
    udp = struct.pack("!HHHH", 68, source.pick((67, 67, 67, 68)), size, 0) + message
    total = source.pick((20 + len(udp), 20 + len(udp), 28))
    target = source.pick((b"\xff" * 4, _OURS, _THEIRS))
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, total, 1, 0, 64, 17, 0, bytes(4), target)
    ip = ip[:10] + checksum([ip]).to_bytes(2, "big") + ip[12:]
    return b"\xff" * 6 + _GUEST + b"\x08\0" + ip + udp
