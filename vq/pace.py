"""How frames come: many behind one another, or one at a time with a rest in between."""

from __future__ import annotations

import time

__all__ = ["Pace"]


class Pace:
    """Whether frames come one at a time, as far as one can tell.

    So they do when the last turn had one only, and rested for longer than it worked. Both are of
    this machine and its load, so that nothing is to be set.
    """

    __slots__ = ("_alone", "_began", "_ended")

    def __init__(self) -> None:
        self._alone = False
        self._began = self._ended = 0.0

    def begin(self) -> bool:
        """A turn begins: whether to expect one frame."""
        now = time.monotonic()
        alone = self._alone and now - self._ended > self._ended - self._began
        self._began = now
        return alone

    def end(self, frames: int) -> None:
        """The turn ends; it had so many frames."""
        self._ended = time.monotonic()
        self._alone = frames == 1
