"""Files that vq makes for its user."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

__all__ = ["create"]


def create(path: str | os.PathLike[str], *, mode: int = 0o666, buffering: int = 0) -> BinaryIO:
    """A new file at `path`, in place of one that is there, open for writing.

    `mode` are its permissions, less the umask; `buffering` is that of `open`. A symbolic link is
    not followed: in a directory where others may write it could lead to any file of the user's.
    Raises `OSError`.
    """

    def opener(path: str, flags: int) -> int:
        try:
            return os.open(path, flags | os.O_NOFOLLOW, mode)
        except OSError as error:
            # FreeBSD says EMLINK (open(2)).
            if error.errno in (errno.ELOOP, errno.EMLINK):
                reason = "a symbolic link is not written through"
                raise OSError(error.errno, reason, path) from None
            raise

    return open(path, "wb", buffering=buffering, opener=opener)
