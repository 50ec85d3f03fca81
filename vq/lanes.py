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

__all__ = ["ADDRESSES", "Lanes", "Ranges", "alike", "all_between", "total"]


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


_RANGE = 16  # bytes
_MOST_AT_ONCE = 128 * _RANGE
"""Bytes of ranges: what is calculated with is remembered for every number of them up to that, which
comes to less than a megabyte."""


class Ranges:
    """Ranges of memory that are to lie from `low` on up to `high`, which is the first address
    behind; there every address is known by another number too, which is `distance` more.

    Each range is in 16 bytes, little-endian: the address in 8, the length in 4; what stands in the
    others is left out. With the distance added no such address needs more bytes.
    """

    def __init__(self, low: int, high: int, distance: int) -> None:
        self._low, self._high, self._distance = low, high, distance
        self._lanes: dict[int, tuple[int, ...]] = {}

    def moved(self, ranges: bytes) -> bytes | None:
        """The ranges by their other addresses, each length in 8 bytes.

        None unless all of them lie there and none is empty.
        """
        size = len(ranges)
        if size > _MOST_AT_ONCE:
            first, others = self.moved(ranges[:_MOST_AT_ONCE]), self.moved(ranges[_MOST_AT_ONCE:])
            return None if first is None or others is None else first + others
        lanes = self._lanes.get(size) or self._fill(size)
        half, address, length, from_low, not_empty, up_to_high, distance = lanes
        column = int.from_bytes(ranges, "little")
        addresses, lengths = column & address, column >> 64 & length
        # The highest bit of a lane says for each sum and difference whether that is so.
        good = addresses + from_low & lengths + not_empty & up_to_high - addresses - lengths & half
        if good != half:
            return None
        return (addresses + distance + (lengths << 64)).to_bytes(size, "little")

    def _fill(self, size: int) -> tuple[int, ...]:
        """What `moved` calculates with, in each lane."""
        bits = 8 * _RANGE
        half = 1 << bits - 1
        ones = ((1 << 8 * size) - 1) // ((1 << bits) - 1)
        in_one = (
            *(half, (1 << 64) - 1, (1 << 32) - 1),
            *(half - self._low, half - 1, half + self._high, self._distance),
        )
        lanes = self._lanes[size] = tuple(number * ones for number in in_one)
        return lanes


ADDRESSES = Lanes(64)
_RESULTS = Lanes(32)
_FEW = 6  # numbers, which are quicker looked at one by one


def all_between(numbers: array[int], low: int, high: int) -> bool:
    """Whether all of the 32-bit numbers, signed ones too, are from `low` (0 at least) to `high`."""
    if len(numbers) <= _FEW:
        few = numbers.tolist()
        return low <= min(few) and max(few) <= high
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
