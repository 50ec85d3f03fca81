"""How frames come: many behind one another, or few at a time with a rest in between."""

from __future__ import annotations

import time

__all__ = ["Pace"]


class Pace:
    """How many frames come at a time, as far as one can tell.

    One, when the last turn had one, and a few, when the last two turns had as many: each time if
    the rest since then was longer than the work. Both are of this machine and its load, so that
    nothing is to be set.
    """

    __slots__ = ("_before", "_began", "_ended", "_last")

    def __init__(self) -> None:
        self._last = self._before = 0  # frames of the last two turns
        self._began = self._ended = 0.0

    @property
    def expects_one(self) -> bool:
        """Whether frames come one at a time, whatever the rest between them."""
        return self._last == self._before == 1

    def begin(self) -> int:
        """A turn begins: how many frames to expect, 0 where it could be any number."""
        now = time.monotonic()
        rested = now - self._ended > self._ended - self._began
        self._began = now
        last = self._last
        return last if rested and (last == 1 or last == self._before) else 0

    def end(self, frames: int) -> None:
        """The turn ends; it had so many frames."""
        self._ended = time.monotonic()
        self._before, self._last = self._last, frames
