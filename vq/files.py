"""Files that vq makes for its user."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO

__all__ = ["create"]


def create(path: str | os.PathLike[str]) -> BinaryIO:
    """A new file at `path`, in place of one that is there, open for writing without a buffer.

    A symbolic link is not followed: in a directory where others may write it could lead to any
    file of the user's. Raises `OSError`.
    """
    return open(path, "wb", buffering=0, opener=_open)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        # FreeBSD says EMLINK (open(2)).
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(error.errno, "a symbolic link is not written through", path) from None
        raise
