"""Structure out of a fuzzer's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Input"]

T = TypeVar("T")


class Input:
    """Takes numbers and choices off the front of some bytes; zeros when they are used up.

    Each choice takes whole bytes of its own, so that a fuzzer's small change of the bytes is a
    small change of what they mean.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def more(self) -> bool:
        """Whether there are bytes left."""
        return self.at < len(self.data)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or as many as there are."""
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken

    def number(self, size: int) -> int:
        """A little-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    @property
    def u8(self) -> int:
        """A byte."""
        return self.number(1)

    @property
    def u16(self) -> int:
        """Two bytes."""
        return self.number(2)

    def below(self, limit: int) -> int:
        """0 to `limit` - 1."""
        return self.number(1 if limit <= 256 else 2) % limit

    def chance(self, of: int = 2) -> bool:
        """True once in `of` times; False at the end of the bytes when `of` is more than 1."""
        return self.u8 % of == of - 1

    def pick(self, choices: Sequence[T]) -> T:
        """One of `choices`."""
        return choices[self.below(len(choices))]
