"""Files that vq makes for its user, and directories where others may write."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

__all__ = ["create", "directory_of", "open_to_append"]


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


@contextmanager
def directory_of(path: str) -> Iterator[int]:
    """The directory of what `path` names, as a descriptor to look names up in.

    Whoever may rename it could put another one in its place, or a link to one, between two looks at
    the path: what is removed or handed over is looked up in the one that was opened. Raises
    `OSError`.
    """
    parent = os.path.dirname(path) or os.curdir
    flags = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
    directory = os.open(parent, flags)
    try:
        yield directory
    finally:
        os.close(directory)


def _open(path: str | os.PathLike[str], flags: int, mode: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, mode)
    except OSError as error:
        # FreeBSD says EMLINK (open(2)).
        if error.errno in (errno.ELOOP, errno.EMLINK):
            reason = "a symbolic link is not written through"
            raise OSError(error.errno, reason, path) from None
        raise
