"""Descriptors whose open file a peer shares, and may make to wait at any moment.

Whether a read or write waits (O_NONBLOCK) belongs to the open file, not to the descriptor: who
hands one over can take that back, empty or fill the file, and so stop whoever reads or writes it. A
kick is therefore read with RWF_NOWAIT, which belongs to the call. Linux has no such thing for
writing to an eventfd (pwritev2: EOPNOTSUPP), and a look before each write would double its price
and not be sure. So writes are watched: `Watchdog` ends one that lasts with `MadeToWait`, by a
signal that comes twice a second.

Sources: eventfd(2), preadv2(2), setitimer(2), PEP 475.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

from vq.errors import FrontendError

__all__ = ["MadeToWait", "Watchdog", "drain", "read", "signal_event", "write"]

SYSTEM_CALLS = ("preadv2", "readv", "setitimer")

TICK_SECONDS = 0.5
"""A read or write that lasts longer is ended at the latest after twice this time."""

_EVENT = (1).to_bytes(8, sys.byteorder)  # the value has no meaning, but an eventfd adds it up
_KICKS = (bytearray(4096),)
"""Where kicks are read to; what they say has no meaning. Bytes of their own cost more each time."""
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
_UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE)


class MadeToWait(FrontendError):
    """The peer made a read or write wait that must not; it was ended."""


class _Lasting:
    """In the place of a descriptor that was used already when the signal came last."""


_LASTING = _Lasting()
_in_use: int | _Lasting | None = None
"""The descriptor that a read or write is under way of, in the thread that gets signals."""


def drain(fd: int) -> int:
    """Takes the events from an eventfd or pipe; 0 when none will come any more.

    Raises `BlockingIOError` where there is none, `OSError`, and `MadeToWait` where that was ended:
    not all that can be read knows RWF_NOWAIT, a terminal for one.
    """
    # An eventfd gives one value of eight bytes, a pipe all that wait in it.
    if _NOWAIT:
        try:
            return os.preadv(fd, _KICKS, -1, _NOWAIT)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
    global _in_use
    _in_use = fd
    try:
        return os.readv(fd, _KICKS)
    finally:
        _in_use = None


def signal_event(fd: int) -> None:
    """Adds an event to an eventfd or a pipe. A full one has an event in it already.

    Raises `OSError`, and `MadeToWait` where that was ended; then there is an event in it, too.
    """
    global _in_use
    _in_use = fd
    try:
        os.write(fd, _EVENT)
    except BlockingIOError:
        pass
    finally:
        _in_use = None


def read(fd: int, size: int) -> bytes:
    """Reads up to `size` bytes. Raises `OSError`, and `MadeToWait` where that was ended."""
    global _in_use
    _in_use = fd
    try:
        return os.read(fd, size)
    finally:
        _in_use = None


def write(fd: int, data: bytes | bytearray) -> int:
    """Writes what there is room for. Raises `OSError`, and `MadeToWait` where that was ended."""
    global _in_use
    _in_use = fd
    try:
        return os.write(fd, data)
    finally:
        _in_use = None


class Watchdog:
    """While it is entered, a signal ends reads and writes of this module that last.

    For the main thread of a program, which gets all signals; SIGALRM is the watchdog's meanwhile.
    """

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGALRM, _look)
        self._timer = signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        signal.setitimer(signal.ITIMER_REAL, *self._timer)


def _look(_: int, __: FrameType | None) -> None:
    """The same read or write as the last time, and nothing else was done since: it is ended."""
    global _in_use
    if _in_use is _LASTING:
        _in_use = None  # first: the error may come when the read or write has just ended
        raise MadeToWait("a descriptor that it shares was made to wait")
    if _in_use is not None:
        _in_use = _LASTING
