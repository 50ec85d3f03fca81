"""Whether who is at the other end of a terminal or a socket is gone, which no event loop tells."""

from __future__ import annotations

import errno
import fcntl
import select
import sys
import termios

__all__ = ["hung_up", "is_closed"]

SYSTEM_CALLS = ("poll", "ppoll")
IOCTLS = (termios.FIONREAD,)


def hung_up(fd: int) -> bool:
    """Whether the other side is closed, and all that came from it read."""
    events = _events(fd)
    return bool(events & select.POLLHUP) and not (events & select.POLLIN and _bytes_waiting(fd))


def is_closed(fd: int) -> bool:
    """Whether the other side is closed, however much of what came from it is unread."""
    return bool(_events(fd) & select.POLLHUP)


def _events(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return dict(poll.poll(0)).get(fd, 0)


def _bytes_waiting(fd: int) -> int:
    """How many bytes could be read now (FIONREAD)."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return 0
