"""One end of the socket between helper and worker, watched by a loop.

A message is one datagram that cannot be split (SOCK_SEQPACKET), and the end of the other process is
the end of the socket. What the socket has no room for waits here; who does not listen to answers is
not listened to, so that no more than a few can wait for it.
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections import deque
from collections.abc import Callable

from vq.loop import Loop
from vq.privsep.message import MAX_SIZE, Message, MessageError, decode, encode

__all__ = ["Channel", "channel_pair"]

SYSTEM_CALLS = ("recvmsg", "sendmsg")

MESSAGES_PER_TURN = 16
MOST_UNSENT = 64
"""With so many messages that the other side does not take, it is not heard any more."""
_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a socket for a `Channel`; they do not block."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
    return pair


class Channel:
    """Says and hears messages over `sock`, which it owns.

    `on_message` is called for each; `on_end` once, with the reason when the other side said what is
    no message, else with None.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Loop,
        on_message: Callable[[Message], None],
        on_end: Callable[[MessageError | None], None],
    ) -> None:
        self._socket = sock
        self._loop = loop
        self._on_message = on_message
        self._on_end = on_end
        self._unsent: deque[tuple[bytes, int]] = deque()
        self._closed = False
        self._watch()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, message: Message, fd: int = -1) -> None:
        """Says something; takes over `fd`, which goes with it unless it is -1."""
        if self._closed:
            _close(fd)
            return
        self._unsent.append((encode(message), fd))
        self._flush()

    def close(self) -> None:
        """Hangs up, without another call of `on_end`. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._loop.watch(self._socket.fileno())
        self._socket.close()
        while self._unsent:
            _close(self._unsent.popleft()[1])

    def _readable(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if len(self._unsent) >= MOST_UNSENT:
                self._watch()
                return
            try:
                data = self._socket.recvmsg(MAX_SIZE + 1)[0]
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._end(None)
                return
            try:
                message = decode(data)
            except MessageError as error:
                self._end(error)
                return
            self._on_message(message)
            if self._closed:
                return

    def _flush(self) -> None:
        while self._unsent:
            data, fd = self._unsent[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            try:
                self._socket.sendmsg([data], rights if fd >= 0 else [], _NO_SIGNAL)
            except BlockingIOError:
                break
            except OSError:  # the other side is gone, and reading will tell
                while self._unsent:
                    _close(self._unsent.popleft()[1])
                break
            self._unsent.popleft()
            _close(fd)
        self._watch()

    def _watch(self) -> None:
        self._loop.watch(
            self._socket.fileno(),
            readable=self._readable if len(self._unsent) < MOST_UNSENT else None,
            writable=self._flush if self._unsent else None,
        )

    def _end(self, error: MessageError | None) -> None:
        self.close()
        self._on_end(error)


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            socket.close(fd)
