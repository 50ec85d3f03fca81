"""Bytes that are only compared later: short ones as they are, long ones by start and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from vq.packet import Buffer, copy_range

__all__ = ["Sample"]

WHOLE = 256
"""Bytes up to which all are kept."""
START = 64
"""Bytes that are kept of more."""
_DIGEST = 8


class Sample(NamedTuple):
    """What is kept of some bytes."""

    length: int
    """Of all of them."""
    start: bytes
    digest: bytes = b""
    """Of all of them, where `start` is not all."""

    @classmethod
    def of(cls, pieces: Sequence[Buffer]) -> Sample:
        """Of the pieces' bytes, one after another."""
        length = sum(map(len, pieces))
        if length <= WHOLE:
            return cls(length, b"".join(pieces))
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for piece in pieces:
            digest.update(piece)
        return cls(length, copy_range(pieces, 0, START), digest.digest())

    def pack(self) -> bytes:
        """As it stands in an event, whose numbers have the length."""
        return self.digest + self.start

    @classmethod
    def unpack(cls, length: int, data: bytes) -> Sample:
        """The opposite of `pack`."""
        if length <= WHOLE:
            return cls(length, data)
        return cls(length, data[_DIGEST:], data[:_DIGEST])

    def difference(self, now: Sample) -> str | None:
        """How `now` differs from this, in a line; None when it does not."""
        if self == now:
            return None
        then = self
        if then.length != now.length:
            return f"{now.length} bytes, not {then.length}"
        place = next(
            (at for at, (a, b) in enumerate(zip(then.start, now.start, strict=False)) if a != b),
            None,
        )
        if place is None:
            return f"the bytes behind the first {START} of {then.length}"
        first = max(0, place - 4)
        window = slice(first, first + 16)
        return (
            f"byte {place} of {then.length}: from byte {first} on it is"
            f" {now.start[window].hex(' ')}, not {then.start[window].hex(' ')}"
        )
