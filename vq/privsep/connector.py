"""Connections to Unix sockets by path, for a worker that reaches no files.

The paths are those that were named before `leave_control`, one by one or as a family: a prefix with
any number behind it, as a guest's vsock ports have. From then on the helper connects to them, to no
others, and hands the connection over. It is waited for, since connecting to a Unix socket succeeds
or fails at once.
"""

from __future__ import annotations

import errno
import os
import socket

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
        self.families: list[str] = []
        """The prefixes that were named, each once."""
        self._helper: socket.socket | None = None

    def name(self, path: str) -> None:
        """There will be connections to this path. Raises `UsageError` for one that cannot be."""
        unix_socket.check_path(path)
        if path not in self.paths:
            self.paths.append(path)

    def name_family(self, prefix: str) -> None:
        """There will be connections to paths of `prefix` and a number below 2**32 in decimal.

        Raises `UsageError` for a prefix that is empty.
        """
        if not prefix:
            raise UsageError("an empty path is none for sockets")
        if prefix not in self.families:
            self.families.append(prefix)

    def connect(self, path: str) -> socket.socket:
        """A connected socket, which does not block; see `vq.unix_socket.connect`.

        Raises `PermissionError` for a path that was not named while that could be done.
        """
        request = self._request(path)
        if self._helper is None:
            if request is None:
                self.name(path)
            return unix_socket.connect(path)
        if request is None:
            raise PermissionError(errno.EACCES, f"{path} was not named at the start")
        self._helper.sendmsg([encode(request)])
        answer, fds = self._answer(request)
        if answer.error or not fds:
            raise OSError(answer.error or errno.EIO, answer.words)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fds[0])
        os.set_inheritable(fds[0], False)
        connection.setblocking(False)
        return connection

    def _request(self, path: str) -> Connect | None:
        """What to ask the helper for; None for a path that was not named."""
        if path in self.paths:
            return Connect(self.paths.index(path))
        for place, prefix in enumerate(self.families):
            number = _number(path.removeprefix(prefix)) if path.startswith(prefix) else None
            if number is not None:
                return Connect(place, number)
        return None

    def _answer(self, request: Connect) -> tuple[Connected, list[int]]:
        """The answer to this request; one that came too late is passed over."""
        assert self._helper is not None
        while True:
            data, fds, _, _ = socket.recv_fds(self._helper, MAX_SIZE + 1, 1)
            try:
                message = decode(data)
            except MessageError as error:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"the helper: {error}") from None
            if isinstance(message, Connected) and (message.place, message.number) == request:
                return message, fds
            for fd in fds:
                os.close(fd)

    def leave_control(self, helper: socket.socket) -> None:
        """Asks the helper from now on, over this socket."""
        helper.settimeout(PATIENCE)
        self._helper = helper


def answer(named: Connector, request: Connect) -> tuple[Connected, int]:
    """In the helper: what to answer to a request, and the descriptor that goes with it, or -1."""
    place, number = request
    known = named.paths if number is None else named.families
    if place >= len(known):
        words = "no such socket was named at the start"
        return Connected(place, errno.EINVAL, words, number), -1
    path = known[place] if number is None else f"{known[place]}{number}"
    try:
        return Connected(place, 0, number=number), unix_socket.connect(path).detach()
    except OSError as error:
        words = error.strerror or str(error)
        return Connected(place, error.errno or errno.EIO, words, number), -1
    except UsageError as error:
        return Connected(place, errno.ENOTSOCK, str(error), number), -1


def _number(text: str) -> int | None:
    """The number that this is, written as `answer` writes it; None when it is none."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 10:
        return None
    number = int(text)
    return number if number < 1 << 32 and str(number) == text else None
