"""What the peer of a stream link sends, in any pieces."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence

from fuzz.inputs import Input
from vq.stream import ETHER_HEADER, MAX_RECEIVED, StreamLink

_ROOM = bytearray(MAX_RECEIVED + 100)


class _Room:
    """Lends some views, or none, and keeps what comes."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.cuts: tuple[int, ...] = ()
        self.full = False
        self.size = len(_ROOM)

    def views(self) -> Sequence[memoryview]:
        if self.full:
            return ()
        view = memoryview(_ROOM)[: self.size]
        edges = [0, *(cut for cut in self.cuts if cut < self.size), self.size]
        return [view[start:end] for start, end in itertools.pairwise(edges)]

    def commit(self, header: bytes, length: int) -> None:
        assert header == bytes(12)
        self.frames.append(bytes(_ROOM[:length]))


def run(data: bytes) -> None:
    """Sends a stream, reads it in bursts, and compares with a reading of all at once."""
    source = Input(data)
    peer, ours = socket.socketpair()
    link = StreamLink(ours)
    room = _Room()
    stream = b""
    try:
        for _ in range(40):
            if not source.more:
                break
            step = source.below(4)
            if step < 2:
                size = source.pick((14, 60, 13, 0, 1500, 9000))
                claimed = source.pick((size, size, size, size + 1, 0xFFFF, MAX_RECEIVED + 1))
                sent = claimed.to_bytes(4, "big") + (source.take(3) or b"\1") * size
                sent = sent[: source.pick((len(sent), len(sent), 2, 4, 5, 20))]
                stream += sent[: 4 + size]
                peer.sendall(sent[: 4 + size])
            elif step == 2:
                room.full = source.chance(4)
                room.cuts = source.pick(((), (1,), (7, 100), (14, 20, 1000)))
            _read(link, room, source.pick((1, 64)))
        room.full = False
        peer.close()
        while link.is_up and _read(link, room, 64):
            pass
        assert room.frames == _expected(stream)
    except OSError:
        assert room.frames == _expected(stream)[: len(room.frames)]
    finally:
        peer.close()
        link.close()


def _read(link: StreamLink, room: _Room, limit: int) -> bool:
    return link.ports[0].read_burst(room, limit) > 0


def _expected(stream: bytes) -> list[bytes]:
    frames, at = [], 0
    while at + 4 <= len(stream):
        size = int.from_bytes(stream[at : at + 4], "big")
        frame = stream[at + 4 : at + 4 + size]
        if size > MAX_RECEIVED or len(frame) < size:
            break
        if size >= ETHER_HEADER:
            frames.append(frame)
        at += 4 + size
    return frames
