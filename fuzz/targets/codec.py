"""Bytes and descriptors of the vhost-user protocol, in any pieces."""

from __future__ import annotations

import os
import struct

from fuzz.inputs import Input
from vq.errors import FrontendError
from vq.vhost_message import BackendRequest, Decoder, Message, Request, encode

_NOTHING = os.open(os.devnull, os.O_RDONLY)
_SIZES = (0, 8, 12, 16, 20, 24, 32, 40, 72, 264, 268)


def run(data: bytes) -> None:
    """Decodes a stream of messages; each that comes out means the same when encoded again."""
    source = Input(data)
    kind: type[Request] | type[BackendRequest] = source.pick((Request, Request, BackendRequest))
    replies = source.chance(4)
    decoder = Decoder(kind, replies=replies)
    owned: list[int] = []
    try:
        while source.more:
            stream = _message(source, kind, replies)
            fds = [os.dup(_NOTHING) for _ in range(source.pick((0, 0, 0, 1, 2, 8, 9)))]
            owned += fds
            while stream or fds:
                piece = stream[: source.pick((len(stream), max(1, decoder.wanted), 1, 12))]
                stream = stream[len(piece) :]
                decoder.feed(piece, fds)
                fds = []
                for message in decoder:
                    with message:
                        _again(message, kind, replies)
    except FrontendError:
        assert decoder._fds == []
    decoder.close()
    for fd in owned:
        try:
            os.fstat(fd)
        except OSError:
            continue
        raise AssertionError("a descriptor is left over")


def _message(source: Input, kind: type[Request] | type[BackendRequest], replies: bool) -> bytes:
    if source.chance(16):
        return source.take(source.u8)
    request = source.pick((source.pick(list(kind)), source.pick(list(kind)), source.u16))
    flags = source.pick((1, 1, 1, 9, 5, 0, 2, 0x11)) | (4 if replies else 0)
    size = source.pick((*_SIZES, source.u16))
    payload = b""
    while len(payload) < min(size, 600):
        payload += source.pick((bytes(4), b"\1\0\0\0", b"\0\1\0\0", b"\xff" * 8, source.take(8)))
        if not source.more:
            payload = payload.ljust(size, b"\0")
    claimed = source.pick((size, size, size, 0xFFFFFFFF))
    return struct.pack("=3I", int(request), flags, claimed) + payload[:size]


def _again(message: Message, kind: type[Request] | type[BackendRequest], replies: bool) -> None:
    decoder = Decoder(kind, replies=replies)
    fds = [os.dup(_NOTHING) for _ in message.fds]
    try:
        decoder.feed(encode(message), fds)
    except FrontendError as error:
        raise AssertionError(f"{message} cannot be decoded again") from error
    again = decoder.next_message()
    assert again is not None
    with again:
        assert (again.request, again.payload) == (message.request, message.payload)
        assert (again.need_reply, again.reply) == (message.need_reply, message.reply)
