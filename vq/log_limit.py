"""Log lines that a guest or a peer can cause: so many in a while, the others are counted.

A guest can break a rule, reset and break it again thousands of times a second, and a disk is full
sooner than anybody looks. Loggers of modules that such lines come from are made by
`limited_logger`. Lines of one kind (the same text before its arguments are filled in) are let
through `LINES` times in `SECONDS`; the last of them says that more are only counted, and the first
line of that kind after the time says how many they were. Lines for debugging are not limited:
whoever asks for them wants them all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["LIMIT", "LINES", "SECONDS", "LogLimit", "limited_logger"]

LINES = 20
"""Lines of one kind that are logged within `SECONDS`."""
SECONDS = 10.0


class _Kind:
    __slots__ = ("count", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0


class LogLimit(logging.Filter):
    """The filter behind `limited_logger`; kinds are known by logger and text."""

    def __init__(
        self,
        lines: int = LINES,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._kinds: dict[tuple[str, object], _Kind] = {}  # no more than there are log calls

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is to be logged; adds to it what was not."""
        if record.levelno < logging.INFO:
            return True
        now = self._clock()
        key = record.name, record.msg
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(now)
        if now - kind.since >= self._seconds:
            left_out = kind.count - self._lines
            kind.since, kind.count = now, 0
            if left_out > 0:
                record.msg = f"{record.msg} ({left_out} more like this were not logged)"
        kind.count += 1
        if kind.count == self._lines:
            record.msg = f"{record.msg} (more like this are only counted for now)"
        return kind.count <= self._lines

    def forget(self) -> None:
        """Counts from the start again."""
        self._kinds.clear()


LIMIT = LogLimit()
"""The process's own; one for all loggers."""


def limited_logger(name: str) -> logging.Logger:
    """The logger of this name, limited."""
    logger = logging.getLogger(name)
    logger.addFilter(LIMIT)  # adding it twice is adding it once
    return logger
