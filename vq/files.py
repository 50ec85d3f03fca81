"""Files that vq makes for its user."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

__all__ = ["create", "open_to_append"]


def create(path: str | os.PathLike[str], *, mode: int = 0o666, buffering: int = 0) -> BinaryIO:
    """A new file at `path`, in place of one that is there, open for writing.

    `mode` are its permissions, less the umask; `buffering` is that of `open`. A symbolic link is
    not followed: in a directory where others may write it could lead to any file of the user's.
    Raises `OSError`.
    """

    def opener(path: str, flags: int) -> int:
        return _open(path, flags, mode)

    return open(path, "wb", buffering=buffering, opener=opener)


def open_to_append(path: str | os.PathLike[str], *, mode: int = 0o666) -> int:
    """A descriptor of the file at `path`, made where there is none, for writing at its end.

    It does not block. `mode` and symbolic links are as with `create`. Raises `OSError`.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    return _open(path, flags, mode)


def _open(path: str | os.PathLike[str], flags: int, mode: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, mode)
    except OSError as error:
        # FreeBSD says EMLINK (open(2)).
        if error.errno in (errno.ELOOP, errno.EMLINK):
            reason = "a symbolic link is not written through"
            raise OSError(error.errno, reason, path) from None
        raise
