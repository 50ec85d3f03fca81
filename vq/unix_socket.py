"""Unix stream sockets at a path: connecting to one, and listening on one of our own.

What is wrong with a path is said in a sentence; a socket that a dead program left behind makes way
for a new one. What is spoken over the sockets is left to others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import TypeAlias

from vq.errors import UsageError
from vq.files import directory_of

__all__ = ["Listener", "check_path", "connect"]

_Identity: TypeAlias = tuple[int, int]  # a file system's number, and a file's in it


class Listener:
    """A listening socket at `path`, in place of one that nobody serves any more.

    `owner` and `group` are numbers, `mode` permissions: who may connect. Until they are set nobody
    else may. `patience` is how many seconds to wait for another program to let go of the path.

    Raises `UsageError` when something else is at `path`, somebody serves it or no socket can have
    it, and `OSError` when the kernel refuses.
    """

    def __init__(
        self,
        path: str,
        *,
        backlog: int = 16,
        owner: int | None = None,
        group: int | None = None,
        mode: int | None = None,
        patience: float = 0,
    ) -> None:
        check_path(path)
        self.path = path
        self.socket = _make_socket()
        self._file: tuple[_Identity, _Identity] | None = None
        self._maker = os.getpid()
        try:
            with directory_of(path) as directory:
                _remove_dead(path, directory, patience)
                private = (owner, group, mode) != (None, None, None)
                mask = os.umask(0o177) if private else None
                try:
                    self.socket.bind(path)
                finally:
                    if mask is not None:
                        os.umask(mask)
                made = _made(path, directory)
                self._file = _identity(os.fstat(directory)), _identity(made)
                if private:
                    _hand_over(path, directory, made, owner, group, mode)
            self.socket.listen(backlog)
        except OSError as error:
            self.close()
            raise _explained(error, path) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops listening and removes the socket, unless it is another's by now.

        In a process that was forked since it only stops: the socket is for the one that made it.
        """
        self.socket.close()
        file, self._file = self._file, None
        if file is None or os.getpid() != self._maker:
            return
        name = os.path.basename(self.path)
        with contextlib.suppress(OSError), directory_of(self.path) as directory:
            there = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (_identity(os.fstat(directory)), _identity(there)) == file:
                os.unlink(name, dir_fd=directory)


def connect(path: str) -> socket.socket:
    """A connected socket, which does not block.

    Raises `UsageError` as `check_path` does, `OSError` when nobody listens there.
    """
    check_path(path)
    connection = _make_socket()
    try:
        with _pinned(path) as pinned:
            connection.connect(pinned)
    except OSError as error:
        connection.close()
        raise _explained(error, path) from error
    except BaseException:
        connection.close()
        raise
    return connection


def check_path(path: str) -> None:
    """Raises `UsageError` when no socket can be at `path`, or something else is."""
    if not path:
        raise UsageError("an empty path is none for a socket")
    with contextlib.suppress(OSError):  # nothing there, or not for us to see
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is there already, and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:  # of another type than those that are served: nobody is disturbed
            probe.connect(path)
        except OSError as error:
            if error.errno is None:  # Python's own, before it asked the kernel
                raise UsageError(f"{path!r} is too long for a socket's path") from None


@contextlib.contextmanager
def _pinned(path: str) -> Iterator[str]:
    """A path that leads to the socket which is at `path` now, whatever is put there next.

    Who may write to the directory could have somebody with more rights, who connects for him, reach
    any socket of the host's through a link. Raises `UsageError` for what is no socket, and for one
    with a second name, which may be another's; `OSError` where nothing is. Without Linux' /proc it
    is `path` itself.
    """
    flags = getattr(os, "O_PATH", 0)
    if not flags or not os.path.isdir("/proc/self/fd"):
        yield path
        return
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_nlink > 1:
            raise UsageError(f"{path} is not a socket, or has a second name")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _make_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _made(path: str, directory: int) -> os.stat_result:
    """The status of the socket that was made in the directory by binding to `path`.

    Raises `UsageError` when something else is there.
    """
    try:
        status = os.stat(os.path.basename(path), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISSOCK(status.st_mode):
        raise _replaced(path)
    return status


def _replaced(path: str) -> UsageError:
    return UsageError(f"{path} was replaced by something else while it was made")


def _remove_dead(path: str, directory: int, patience: float) -> None:
    """Makes way for a socket at `path`, if nobody has the one that is there."""
    deadline = time.monotonic() + patience
    name = os.path.basename(path)
    # No path goes from a descriptor but by Linux' /proc: there what is asked is what is removed.
    ours = f"/proc/self/fd/{directory}"
    asked = f"{ours}/{name}" if os.path.isdir(ours) else path
    while os.path.lexists(asked):
        # A socket of another type cannot connect, and so disturbs nobody: the refusal alone tells
        # whether the socket has an owner (connect(2): EPROTOTYPE, ECONNREFUSED).
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(asked)
            except ConnectionRefusedError:
                os.unlink(name, dir_fd=directory)
                return
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise
        if time.monotonic() >= deadline:
            raise UsageError(f"{path} is served already")
        time.sleep(0.02)


def _hand_over(
    path: str,
    directory: int,
    made: os.stat_result,
    owner: int | None,
    group: int | None,
    mode: int | None,
) -> None:
    """Gives the socket at `path`, if it is still the one that we made, to who is to have it.

    Who may write to the directory could put something else in its place in the meantime, a link or
    another's socket: links are not followed, and nothing but our own socket is given away, which
    has but one name.
    """
    if made.st_uid != os.geteuid() or made.st_nlink != 1:
        raise _replaced(path)
    numbers = (-1 if owner is None else owner, -1 if group is None else group)
    if mode is None:
        mode = 0o600 if group is None else 0o660
    name = os.path.basename(path)
    if os.chmod in os.supports_follow_symlinks:
        os.chown(name, *numbers, dir_fd=directory, follow_symlinks=False)
        os.chmod(name, mode, dir_fd=directory, follow_symlinks=False)
        return
    # Linux (before 6.6) changes no mode by path without following links, but by descriptor.
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
    fd = os.open(name, flags, dir_fd=directory)
    try:
        if _identity(os.fstat(fd)) != _identity(made):
            raise _replaced(path)
        os.chown(f"/proc/self/fd/{fd}", *numbers)
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _explained(error: OSError, path: str) -> Exception:
    """The same error with a sentence that says which socket, and what is wrong with it."""
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED) and not os.path.isdir(_parent(path)):
        reason = f"the directory of the socket {path} does not exist"
    elif error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        reason = f"nobody listens at {path}"
    elif error.errno == errno.EAGAIN:
        reason = f"who listens at {path} takes no more clients now"
    elif error.errno in (errno.EACCES, errno.EPERM):
        reason = f"this user may not use the socket {path}"
    else:
        reason = f"the socket {path} cannot be used: {error.strerror}"
    return OSError(error.errno, reason)


def _parent(path: str) -> str:
    return os.path.dirname(path) or os.curdir
