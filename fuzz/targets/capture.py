"""pcap and pcapng files that were not written by anybody's good program."""

from __future__ import annotations

import os
import struct

from fuzz.inputs import Input
from vq.errors import CaptureError
from vq.pcap import MAX_FRAME_BYTES, read_frames

_MAGICS = (b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4", b"\x4d\x3c\xb2\xa1", b"\x34\xcd\xb2\xa1")
_MOST_FRAMES = 4096
_FILE = os.memfd_create("fuzz") if hasattr(os, "memfd_create") else -1


def run(data: bytes) -> None:
    """Reads a file to its end, in bounded memory, or to a `CaptureError`."""
    source = Input(data)
    kind = source.below(3)
    content = data[1:] if kind == 0 else _pcap(source) if kind == 1 else _pcapng(source)
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, content, 0)
    frames = read_frames(f"/proc/self/fd/{_FILE}")
    total = 0
    try:
        for frame in frames:
            assert len(frame.data) <= MAX_FRAME_BYTES
            total += len(frame.data)
    except CaptureError:
        pass
    assert total <= len(content), "more came out than went in"


def _pcap(source: Input) -> bytes:
    magic = source.pick(_MAGICS)
    order = ">" if magic[0] == 0xA1 else "<"
    link = source.pick((1, 1, 1, 113, 0x10000001))
    content = magic + struct.pack(order + "HHiIII", source.pick((2, 2, 1)), 4, 0, 0, 65535, link)
    while source.more:
        size = source.below(64)
        claimed = source.pick((size, size, size + 1, 0x40001, 0xFFFFFFFF))
        fraction = source.pick((0, 0xFFFFFFFF))
        content += struct.pack(order + "IIII", source.u16, fraction, claimed, source.u8)
        if magic[0] == 0x34:
            content += bytes(8)
        content += source.take(size)
    return content


def _pcapng(source: Input) -> bytes:
    order = source.pick("<>")
    content = b""
    kinds = (0x0A0D0D0A, 1, 6, 6, 3, 2, 4, 5, 0x80000001)
    kind = 0x0A0D0D0A
    while source.more and len(content) < 1 << 16:
        body = _body(source, order, kind) + _options(source, order)
        body += bytes(-len(body) % 4)
        total = len(body) + 12
        first = source.pick((total, total, total, total + 4, 0xFFFFFFFC, 8, total + 1))
        last = source.pick((total, total, total, first))
        content += struct.pack(order + "II", kind, first) + body + struct.pack(order + "I", last)
        kind = source.pick(kinds)
    return content


def _body(source: Input, order: str, kind: int) -> bytes:
    if kind == 0x0A0D0D0A:
        return struct.pack(order + "IHHq", 0x1A2B3C4D, source.pick((1, 1, 2)), 0, -1)
    if kind == 1:
        return struct.pack(order + "HHI", source.pick((1, 1, 113)), 0, source.pick((65535, 0, 8)))
    size = source.below(64)
    claimed = source.pick((size, size, size + 8, 0x40001))
    data = source.take(size).ljust(size + -size % 4, b"\0")
    if kind == 6:
        return struct.pack(order + "IIIII", source.pick((0, 0, 1)), 5, 6, claimed, size) + data
    if kind == 2:
        return struct.pack(order + "HHIIII", source.pick((0, 1)), 0, 5, 6, claimed, size) + data
    return struct.pack(order + "I", claimed) + data


def _options(source: Input, order: str) -> bytes:
    options = b""
    for _ in range(source.pick((0, 0, 1, 2))):
        code, size = source.pick((9, 14, 2, 0, 1)), source.pick((1, 8, 4, 0))
        claimed = source.pick((size, size, 0xFFFF))
        value = source.take(size).ljust(size + -size % 4, b"\0")
        options += struct.pack(order + "HH", code, claimed) + value
    return options
