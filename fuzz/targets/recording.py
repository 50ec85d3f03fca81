"""Recorded sessions (`vq serve --record`) that came from somebody else."""

from __future__ import annotations

import json
import os
import struct
import zlib

from fuzz.inputs import Input
from vq.errors import CaptureError
from vq.recording.format import Kind, RecordingReader

_FILE = os.memfd_create("fuzz") if hasattr(os, "memfd_create") else -1
_HEADER: dict[str, object] = {
    **{"device": "vq.net:NetDevice", "device_id": 1, "queues": [["rx0", 256], ["tx0", 256]]},
    **{"features": 0, "from_outside": [], "served": [], "link": None, "began": ""},
}


def run(data: bytes) -> None:
    """Reads a recording to its end or to a `CaptureError`, in bounded memory."""
    source = Input(data)
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, _recording(source), 0)
    try:
        for event in RecordingReader(f"/proc/self/fd/{_FILE}"):
            assert isinstance(event.kind, Kind)
            assert sum(map(len, event.strings)) < 1 << 16, "more came out than went in"
    except CaptureError:
        return


def _recording(source: Input) -> bytes:
    if source.chance(8):
        return source.take(source.u8)
    header = dict(_HEADER)
    if source.chance(2):
        values = (0, -1, 1e400, None, "x", [], {}, [["a", 1e400]], [[]], [["a", "b"]], {"a": 1})
        header[source.pick((*_HEADER, "other"))] = source.pick(values)
    described = json.dumps(header).encode()
    if source.chance(8):
        described = b"[" * source.pick((1, 50_000))
    claimed = source.pick((len(described), len(described), len(described) - 1, 0xFFFFFFFF))
    version = source.pick((b"\1\0\0", b"\2\0\0", b"\3\0\0"))
    content = b"VQREC" + version + struct.pack("<I", claimed) + described
    events = b""
    while source.more:
        numbers, strings = source.below(8), [source.take(source.below(9)) for _ in range(4)]
        count = source.pick((numbers, numbers, 0xFFFFFFFF, 1 << 25))
        kind = source.pick((*Kind, 0, 99))
        events += struct.pack("<BIII", kind, source.u16, count, len(strings)) + bytes(8 * numbers)
        lengths = [source.pick((len(s), len(s), len(s), 1 << 30)) for s in strings]
        events += struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(strings)
    at = 0
    while at < len(events):
        piece = events[at : at + source.pick((len(events), 100, 1))]
        at += len(piece)
        packed = zlib.compress(piece) if source.chance(2) else piece
        packed = packed if len(packed) < len(piece) else piece
        claimed = source.pick((len(piece), len(piece), len(piece), len(piece) + 1, 1 << 27, 0))
        content += struct.pack("<II", len(packed), claimed) + packed
    return content[: source.pick((len(content), len(content), len(content) - 1))]
