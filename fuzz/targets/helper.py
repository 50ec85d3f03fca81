"""What a worker that is in a guest's hands may say to its helper."""

from __future__ import annotations

import struct

from fuzz.inputs import Input
from vq.privsep.message import MAX_SIZE, MessageError, decode, encode

_NUMBERS = (0, 1, 7, 0x80, 0xFFFF, 0x10000, 0xFFFFFFFF)


def run(data: bytes) -> None:
    """A message that is taken is one that encodes to the same bytes; nothing else is raised."""
    source = Input(data)
    while source.more:
        said = source.take(source.u8) if source.chance(4) else _structured(source)
        try:
            message = decode(said)
        except MessageError:
            continue
        assert len(said) <= MAX_SIZE
        assert encode(message) == said, message


def _structured(source: Input) -> bytes:
    def number(bits: int) -> int:
        return source.pick((*_NUMBERS, source.u16)) & ((1 << bits) - 1)

    fixed = struct.pack(
        "=HHIIIHH",
        source.pick((1, 2, 3, 4, 5, 6, source.u8)),
        *(number(16), number(32), number(32), number(32), number(16), number(16)),
    )
    return fixed + source.take(source.pick((0, 0, 0, 1, source.u8)))
