"""What a vhost-user backend sends and receives beside its replies, without ever waiting.

`Channel` carries the backend's own requests to the frontend; `Transfer` a device's state through a
descriptor, for migration. Both own their descriptor and watch it with the connection's `Loop`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

from vq.errors import FrontendError, VqError
from vq.log_limit import limited_logger
from vq.loop import Loop
from vq.shared_fd import read, write
from vq.vhost_message import BackendRequest, Decoder, Message, encode

__all__ = ["Channel", "Transfer", "close_fd"]

log = limited_logger(__name__)

SYSTEM_CALLS = ("getpeername", "getsockname", "getsockopt", "recvfrom", "sendto")

_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)
"""Said with each call: what was set for the socket is the frontend's to take back."""
MAX_STATE = 1 << 24
"""Bytes of a device's saved state that are taken at most."""
MAX_CHANNEL_BACKLOG = 256
"""Requests waiting for room in the channel; more are dropped."""
MOST_IN_VAIN = 16
"""How often in a row there may be nothing to read or write where the system said that there is. A
frontend can ask for errors that stay until somebody takes them, as a TCP socket's timestamps do."""


class Channel:
    """The channel on which the backend makes requests. Never waits; replies are read and dropped.

    Takes the descriptor over. Raises `FrontendError` when it is not a connected stream socket.
    """

    def __init__(self, fd: int, loop: Loop) -> None:
        self._loop = loop
        self._backlog: deque[bytes] = deque()
        self._in_vain = 0
        self._decoder = Decoder(BackendRequest, replies=True)
        try:
            self._socket = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise FrontendError(f"the descriptor is no socket: {error}") from None
        self._closed = False
        try:
            if self._socket.type != socket.SOCK_STREAM:
                raise FrontendError("the descriptor is no stream socket")
            self._socket.setblocking(False)
            self._watch()
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: Message) -> None:
        """Sends a request, later when there is no room now; drops it when too many wait."""
        if self._closed:
            return
        data = encode(message)
        if len(self._backlog) >= MAX_CHANNEL_BACKLOG:
            return
        # A waiting request of the same kind says the same once more.
        if data not in self._backlog:
            self._backlog.append(data)
        self._flush()

    def close(self) -> None:
        """Closes the channel; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._loop.watch(self._socket.fileno())
            self._socket.close()

    def _flush(self) -> None:
        try:
            while self._backlog:
                sent = self._socket.send(self._backlog[0], _DONTWAIT)
                rest = self._backlog.popleft()[sent:]
                if rest:
                    self._backlog.appendleft(rest)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(str(error))
            return
        self._watch()

    def _watch(self) -> None:
        writable = self._flush if self._backlog else None
        self._loop.watch(self._socket.fileno(), readable=self._read, writable=writable)

    def _read(self) -> None:
        try:
            data = self._socket.recv(max(1, self._decoder.wanted), _DONTWAIT)
            self._in_vain = 0
            self._decoder.feed(data)
            for reply in self._decoder:
                if reply.payload:
                    log.info("the frontend refused %s: %s", reply.request.name, reply.payload)
            if not data:
                log.info("the frontend closed the backend's channel")
                self.close()
        except BlockingIOError:
            self._in_vain += 1
            if self._in_vain > MOST_IN_VAIN:
                self._lost("it is readable, and there is nothing to read")
        except (OSError, FrontendError) as error:
            self._lost(str(error))

    def _lost(self, reason: str) -> None:
        log.warning("the backend's channel is gone: %s", reason)
        self.close()


class Transfer:
    """A device's state on its way through a descriptor, which it takes over.

    Without `load` the bytes in `state` are written; with it all is read up to the end and handed
    over.
    """

    def __init__(
        self, fd: int, loop: Loop, state: bytes, load: Callable[[bytes], None] | None
    ) -> None:
        self._fd = fd
        self._loop = loop
        self._data = bytearray(state)
        self._load = load
        self._left = -1
        self._in_vain = 0
        self._failed: bool | None = None
        self._waiting: Callable[[bool], None] | None = None
        os.set_blocking(fd, False)
        self._step()

    def when_done(self, tell: Callable[[bool], None]) -> None:
        """Calls back with whether the transfer failed, once that is known."""
        if self._failed is None:
            self._waiting = tell
        else:
            tell(self._failed)

    def close(self) -> None:
        """Gives up; closing twice is allowed."""
        self._waiting = None
        self._finish(failed=True)

    def _step(self) -> None:
        try:
            while self._load is None and self._data:
                del self._data[: write(self._fd, self._data)]
            while self._load is not None:
                piece = read(self._fd, 65536)
                if not piece:
                    break
                self._data += piece
                if len(self._data) > MAX_STATE:
                    raise FrontendError(f"a device state of more than {MAX_STATE} bytes")
            if self._load is not None:
                self._load(bytes(self._data))
        except BlockingIOError:
            self._in_vain = self._in_vain + 1 if self._left == len(self._data) else 0
            self._left = len(self._data)
            if self._in_vain > MOST_IN_VAIN:
                log.warning("the device's state did not get across: the descriptor is never ready")
                self._finish(failed=True)
                return
            watch = {"writable" if self._load is None else "readable": self._step}
            self._loop.watch(self._fd, **watch)
        except (OSError, VqError) as error:
            log.warning("the device's state did not get across: %s", error)
            self._finish(failed=True)
        except Exception:
            # A fault of the model's must not become the death of every other guest's device.
            log.exception("the device model failed on a state")
            self._finish(failed=True)
        else:
            self._finish(failed=False)

    def _finish(self, *, failed: bool) -> None:
        if self._failed is not None:
            return
        self._failed = failed
        self._loop.watch(self._fd)
        self._fd = close_fd(self._fd)
        if self._waiting is not None:
            self._waiting(failed)


def close_fd(fd: int) -> int:
    """Closes a descriptor if it is one; gives what to put in its place."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
    return -1
