"""Locks on an image's file: who writes to it is alone, and who reads it is not written under.

They are advisory, so they are those that others look for: flock(2), and the single bytes that QEMU
locks (its block/file-posix.c). For each thing n that one may do with an image QEMU locks byte
100 + n when it does that, and 200 + n when nobody else may.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection

__all__ = ["lock_image"]

_SET: int | None = getattr(fcntl, "F_OFD_SETLK", None)
_GET: int | None = getattr(fcntl, "F_OFD_GETLK", None)
"""Linux' for locks that belong to an open file, whichever process has it (fcntl(2))."""
_FLOCK = struct.Struct("@hhqqi0q")
"""`struct flock`: type, whence, start, length, process."""

_DOES, _DENIES = 100, 200
_READ, _WRITE, _WRITE_SAME, _RESIZE = range(4)
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_image(fd: int, *, read_only: bool) -> bool:
    """Locks the open file until all its descriptors are closed; False when somebody else is there.

    Where there are no such locks it goes without. Raises `OSError` when the system refuses.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if read_only:
        return _lock_bytes(fd, does=(_READ,), denies=(_WRITE, _RESIZE))
    everything = (_READ, _WRITE, _WRITE_SAME, _RESIZE)
    return _lock_bytes(fd, does=everything, denies=everything)


def _lock_bytes(fd: int, *, does: Collection[int], denies: Collection[int]) -> bool:
    if _SET is None or _GET is None:
        return True
    try:
        # First what others shall see, then a look at theirs: of two at a time at least one sees.
        for place in (*(_DOES + n for n in does), *(_DENIES + n for n in denies)):
            fcntl.fcntl(fd, _SET, _lock(fcntl.F_RDLCK, place))
        for place in (*(_DENIES + n for n in does), *(_DOES + n for n in denies)):
            found = fcntl.fcntl(fd, _GET, _lock(fcntl.F_WRLCK, place))
            if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
                return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _lock(kind: int, place: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
