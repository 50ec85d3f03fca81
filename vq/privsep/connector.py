"""Connections to Unix sockets by path, for a worker that reaches no files.

The paths are those that were asked for before `leave_control`: from then on the helper connects to
them, and to no others, and hands the connection over. It is waited for, since connecting to a Unix
socket succeeds or fails at once.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

from vq import unix_socket
from vq.errors import UsageError
from vq.privsep.message import MAX_SIZE, Connect, Connected, MessageError, decode, encode

__all__ = ["Connector", "answer"]

SYSTEM_CALLS = ("getsockname", "getsockopt", "poll", "ppoll", "recvmsg", "sendmsg")

PATIENCE = 2.0
"""Seconds for a helper to answer: it has nothing else to do."""


class Connector:
    """Connects to paths, by itself or through the helper."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        """The paths that were named, each once."""
        self._helper: socket.socket | None = None

    def name(self, path: str) -> None:
        """There will be connections to this path. Raises `UsageError` for one that cannot be."""
        unix_socket.check_path(path)
        if path not in self.paths:
            self.paths.append(path)

    def connect(self, path: str) -> socket.socket:
        """A connected socket, which does not block; see `vq.unix_socket.connect`."""
        if self._helper is None:
            self.name(path)
            return unix_socket.connect(path)
        if path not in self.paths:
            raise PermissionError(errno.EACCES, f"{path} was not named at the start")
        place = self.paths.index(path)
        self._helper.sendmsg([encode(Connect(place))])
        answer, fds = self._answer(place)
        if answer.error or not fds:
            raise OSError(answer.error or errno.EIO, answer.words)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fds[0])
        os.set_inheritable(fds[0], False)
        connection.setblocking(False)
        return connection

    def _answer(self, place: int) -> tuple[Connected, list[int]]:
        """The answer to the request for this place; one that came too late is passed over."""
        assert self._helper is not None
        while True:
            data, fds, _, _ = socket.recv_fds(self._helper, MAX_SIZE + 1, 1)
            try:
                message = decode(data)
            except MessageError as error:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"the helper: {error}") from None
            if isinstance(message, Connected) and message.place == place:
                return message, fds
            for fd in fds:
                os.close(fd)

    def leave_control(self, helper: socket.socket) -> None:
        """Asks the helper from now on, over this socket."""
        helper.settimeout(PATIENCE)
        self._helper = helper


def answer(paths: Sequence[str], request: Connect) -> tuple[Connected, int]:
    """In the helper: what to answer to a request, and the descriptor that goes with it, or -1."""
    place = request.place
    if place >= len(paths):
        return Connected(place, errno.EINVAL, "no such socket was named at the start"), -1
    try:
        return Connected(place, 0), unix_socket.connect(paths[place]).detach()
    except OSError as error:
        return Connected(place, error.errno or errno.EIO, error.strerror or str(error)), -1
    except UsageError as error:
        return Connected(place, errno.ENOTSOCK, str(error)), -1
