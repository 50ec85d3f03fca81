"""Arithmetic on whole columns of numbers, in a few steps of the interpreter.

Descriptors, lengths and results come in columns. To look at the numbers one after another takes
several steps of the interpreter for each. Side by side in one long integer, each number in a lane
of so many bits, they are compared and added to all at once.

It works as long as no lane overflows into the next: here numbers stay below half of what a lane
holds, and the highest bit of each is where the answer to a comparison appears.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache

__all__ = ["ADDRESSES", "Lanes", "alike", "all_between", "total"]


class Lanes:
    """Columns of numbers of `bits` bits each."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._bytes = bits // 8
        self._half = 1 << bits - 1
        self._ones = lru_cache(maxsize=128)(self._one_in_each)
        self.fill = lru_cache(maxsize=128)(self._filled)
        """`fill(number, count)` is a number in each of so many lanes."""

    def column(self, data: bytes | array[int]) -> int:
        """The numbers that lie in `data` one behind another, each in the machine's byte order."""
        return int.from_bytes(data, sys.byteorder)

    def between(self, column: int, count: int, low: int, high: int) -> bool:
        """Whether all `count` numbers are at least `low` and at most `high`.

        False too for numbers of which the highest bit is set, whatever `high` is; no bound is
        negative.
        """
        half, fill = self._half, self.fill
        high = min(high, half - 1)
        if low > high:
            return False
        tops = fill(half, count)
        return (
            not column & tops
            and column + fill(half - low, count) & tops == tops
            and not column + fill(half - 1 - high, count) & tops
        )

    def moved(self, column: int, count: int, distance: int) -> bytes:
        """The numbers with `distance` added to each, which must not leave their lanes."""
        moved = column + self.fill(distance, count)
        return moved.to_bytes(self._bytes * count, sys.byteorder)

    def _filled(self, number: int, count: int) -> int:
        return number * self._ones(count)

    def _one_in_each(self, count: int) -> int:
        return ((1 << self._bits * count) - 1) // ((1 << self._bits) - 1)


ADDRESSES = Lanes(64)
_RESULTS = Lanes(32)


def all_between(numbers: array[int], low: int, high: int) -> bool:
    """Whether all of the 32-bit numbers, signed ones too, are from `low` (0 at least) to `high`."""
    if alike(numbers):
        return low <= numbers[0] <= high
    return _RESULTS.between(_RESULTS.column(numbers), len(numbers), low, high)


def alike(numbers: array[int]) -> bool:
    """Whether all of the numbers, one at least, are the same."""
    data = numbers.tobytes()
    return data == data[: numbers.itemsize] * len(numbers)


def total(numbers: array[int]) -> int:
    """The sum of the numbers, one at least; it takes least where they are alike."""
    return numbers[0] * len(numbers) if alike(numbers) else sum(numbers)
