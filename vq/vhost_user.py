"""The vhost-user transport: sockets on which frontends drive a `Device`.

`Server` listens on a socket and serves one frontend after the other; `Client` connects to a
frontend that listens, again and again; `Connection` serves one socket that is connected already.
All of them share one `Loop` with the device's own descriptors, so several devices fit in a process.

A frontend that breaks the protocol loses its connection, with the reason in the log, and the next
one is waited for. What the messages mean is in `vhost_backend`, what they look like in
`vhost_message`.
"""

from __future__ import annotations

import array
import functools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

from vq.device import Alarm, Device, Watch, check_made
from vq.errors import FrontendError, UsageError
from vq.log_limit import limited_logger
from vq.loop import Loop, Timer
from vq.unix_socket import Listener, connect
from vq.vhost_backend import Backend, choose_offered
from vq.vhost_message import MAX_FDS, Decoder, Message, encode
from vq.vhost_processes import Apart

__all__ = ["Client", "Connection", "Server", "watch_device"]

log = limited_logger(__name__)

SYSTEM_CALLS = ("accept4", "getsockname", "recvmsg", "sendmsg")

MESSAGES_PER_TURN = 32
"""Messages taken from one socket in a turn, so that a talkative frontend does not stop others."""
_FD = array.array("i")
_ANCILLARY = socket.CMSG_SPACE((MAX_FDS + 1) * _FD.itemsize)
_CLOEXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_MSG_NOSIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)


class Connection:
    """One connected frontend, which drives `device` until either side closes.

    Takes over `sock`. `offered`, `queue_num` and `apart` are `Backend`'s, as is the `UsageError`,
    which leaves the socket to the caller. `on_closed` is called once, when all is given back; the
    device may be used by another connection from then on.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        loop: Loop,
        *,
        name: str = "frontend",
        offered: int | None = None,
        queue_num: int | None = None,
        apart: Apart | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self._socket = sock
        self._loop = loop
        self._decoder = Decoder()
        self._replies: deque[tuple[bytes, list[int]]] = deque()
        self._on_closed = on_closed
        self.closed = False
        self.backend = Backend(
            device,
            loop,
            self._send,
            offered=offered,
            queue_num=queue_num,
            apart=apart,
            on_fork=self._forked,
        )
        sock.setblocking(False)
        self._watch()
        log.info("%s: connected", name)

    def close(self, reason: str = "closed here") -> None:
        """Ends the connection; closing twice is allowed."""
        if self.closed:
            return
        self.closed = True
        log.info("%s: %s", self.name, reason)
        self._loop.watch(self._socket.fileno())
        self._decoder.close()
        self.backend.close()
        for _, fds in self._replies:
            _close_all(fds)
        self._replies.clear()
        self._socket.close()
        if self._on_closed is not None:
            self._on_closed()

    def _forked(self, loop: Loop) -> None:
        """In a process that serves some of the queues: the frontend talks to the other one."""
        self._socket.close()
        device = self.backend.device
        for watch in device.watches:
            watch.on_change = None
        for alarm in device.alarms:
            alarm.on_change = None
        device.on_watches_change = None
        watch_device(device, loop)

    # --- in ---------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = self._receive()
                if message is None:
                    return
                log.debug("%s: %s %s", self.name, message.request.name, message.payload)
                self.backend.handle(message)
                if self.closed or self._replies:
                    return  # replies first: a frontend that does not read them is not heard
        except ConnectionError as error:
            self.close(f"the frontend is gone: {error.strerror}")
        except (FrontendError, UsageError, OSError) as error:
            log.warning("%s: dropped: %s", self.name, str(error))
            self.close("dropped")
        except Exception:
            # A fault of ours must not become the death of every other guest's device.
            log.exception("%s: dropped", self.name)
            self.close("dropped")

    def _receive(self) -> Message | None:
        """The next message; None when it is not there yet, or will never be."""
        while (message := self._decoder.next_message()) is None:
            try:
                # Never beyond the end of a message: see `Decoder`.
                data, ancillary, flags, _ = self._socket.recvmsg(
                    self._decoder.wanted, _ANCILLARY, _CLOEXEC
                )
            except BlockingIOError:
                return None
            fds = _descriptors(ancillary)
            if not data:
                _close_all(fds)
                self._ended()
                return None
            self._decoder.feed(data, fds)
            if flags & socket.MSG_CTRUNC:
                raise FrontendError(f"more than {MAX_FDS} descriptors with one message")
        return message

    def _ended(self) -> None:
        if self._decoder.in_message:
            log.warning("%s: the frontend closed in the middle of a message", self.name)
        self.close("disconnected")

    # --- out --------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        """Sends a reply, the rest of it when there is room; owns the message's descriptors."""
        if self.closed:
            message.close()
            return
        self._replies.append((encode(message), message.fds))
        self._flush()

    def _flush(self) -> None:
        try:
            while self._replies:
                data, fds = self._replies[0]
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sent = self._socket.sendmsg([data], ancillary if fds else [], _MSG_NOSIGNAL)
                _close_all(fds)
                self._replies.popleft()
                if sent < len(data):
                    self._replies.appendleft((data[sent:], []))
        except BlockingIOError:
            pass
        except OSError as error:
            # Not closed at once: whoever sends is in the middle of something.
            log.warning("%s: a reply could not be sent: %s", self.name, error)
            self._loop.call_soon(functools.partial(self.close, "the frontend is gone"))
            return
        self._watch()

    def _watch(self) -> None:
        fd = self._socket.fileno()
        if self._replies:
            self._loop.watch(fd, writable=self._flush)
        else:
            self._loop.watch(fd, readable=self._readable)


class Server:
    """Serves `device` to the frontends that connect to a socket, one at a time.

    `address` is the path of the socket to make, or a listening socket, which the server takes
    over. A frontend that comes while another is served waits in the socket's queue.
    `on_disconnect` is called after each connection. A path is removed again by `close`; one that
    is left over from a process that died is replaced.

    Raises `UsageError` when something else has the path, the device cannot offer what is wanted, or
    another loop serves it; `OSError` when the path cannot be bound.
    """

    def __init__(
        self,
        device: Device,
        loop: Loop,
        address: str | os.PathLike[str] | socket.socket,
        *,
        offered: int | None = None,
        queue_num: int | None = None,
        apart: Apart | None = None,
        on_disconnect: Callable[[], None] | None = None,
    ) -> None:
        _check_free(device)
        self.connection: Connection | None = None
        self.connections = 0
        """How many frontends have come so far."""
        self._device = device
        self._loop = loop
        self._offered = choose_offered(device, offered)
        self._queue_num = queue_num
        self._apart = apart
        self._on_disconnect = on_disconnect
        self._listener: Listener | None = None
        if isinstance(address, socket.socket):
            self._socket = address
            self.name = str(address.getsockname() or f"fd {address.fileno()}")
        else:
            self.name = os.fspath(address)
            self._listener = Listener(self.name)
            self._socket = self._listener.socket
        self._socket.setblocking(False)
        self._closed = False
        watch_device(device, loop)
        self._wait()

    def close(self) -> None:
        """Ends the connection there may be, and stops listening. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._loop.watch(self._socket.fileno())
        if self._listener is None:
            self._socket.close()
        else:
            self._listener.close()
        if self.connection is not None:
            self.connection.close()
        unwatch_device(self._device, self._loop)

    def _wait(self) -> None:
        self._loop.watch(self._socket.fileno(), readable=self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            # Out of descriptors, most likely: they come back when other connections close.
            log.error("%s: cannot accept: %s", self.name, error)
            self._loop.watch(self._socket.fileno())
            self._loop.call_later(1.0, self._resume)
            return
        self.connections += 1
        self._loop.watch(self._socket.fileno())
        self.connection = Connection(
            sock,
            self._device,
            self._loop,
            name=self.name,
            offered=self._offered,
            queue_num=self._queue_num,
            apart=self._apart,
            on_closed=self._disconnected,
        )

    def _resume(self) -> None:
        if not self._closed and self.connection is None:
            self._wait()

    def _disconnected(self) -> None:
        self.connection = None
        self._resume()
        if self._on_disconnect is not None and not self._closed:
            self._on_disconnect()


class Client:
    """Serves `device` to a frontend that listens at `path`, and connects again when it is gone.

    `retry` is how many seconds to wait before the next attempt, `connect` what makes a connection
    (default: `vq.unix_socket.connect`). `on_disconnect` is called after each connection. Raises
    `UsageError` for a path where no socket can be.
    """

    def __init__(
        self,
        device: Device,
        loop: Loop,
        path: str | os.PathLike[str],
        *,
        retry: float = 1.0,
        offered: int | None = None,
        queue_num: int | None = None,
        apart: Apart | None = None,
        on_disconnect: Callable[[], None] | None = None,
        connect: Callable[[str], socket.socket] = connect,
    ) -> None:
        self.name = os.fspath(path)
        self.connection: Connection | None = None
        self.connections = 0
        """How often a connection came about so far."""
        self._device = device
        self._loop = loop
        self._retry = retry
        self._make_connection = connect
        self._offered = choose_offered(device, offered)
        self._queue_num = queue_num
        self._apart = apart
        self._on_disconnect = on_disconnect
        self._timer: Timer | None = None
        self._refused: str | None = None
        self._closed = False
        self._connect()
        watch_device(device, loop)

    def close(self) -> None:
        """Ends the connection there may be, and makes no other. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self.connection is not None:
            self.connection.close()
        unwatch_device(self._device, self._loop)

    def _connect(self) -> None:
        self._timer = None
        try:
            sock = self._make_connection(self.name)
        except (OSError, UsageError) as error:
            if isinstance(error, UsageError) and self._refused is None and not self.connections:
                raise  # the first attempt is made for our caller
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            if reason != self._refused:  # once, not at every attempt
                self._refused = reason
                log.info("no frontend yet: %s", reason)
            self._timer = self._loop.call_later(self._retry, self._connect)
            return
        self._refused = None
        self.connections += 1
        self.connection = Connection(
            sock,
            self._device,
            self._loop,
            name=self.name,
            offered=self._offered,
            queue_num=self._queue_num,
            apart=self._apart,
            on_closed=self._disconnected,
        )

    def _disconnected(self) -> None:
        self.connection = None
        if self._closed:
            return
        self._timer = self._loop.call_later(self._retry, self._connect)
        if self._on_disconnect is not None:
            self._on_disconnect()


def _check_free(device: Device) -> None:
    """Raises `UsageError` for what is no device, or one that a loop has already."""
    check_made(device)
    if device.on_watches_change is not None:
        raise UsageError(f"this {type(device).__name__} is served already: make another one")


def watch_device(device: Device, loop: Loop, *, own_alarms: bool = True) -> None:
    """Lets the loop watch a device's own descriptors (a tap, say) as the device asks for it.

    Alarms that the device sets are rung; without `own_alarms` only those that look outside. Raises
    `UsageError` when a loop does so already: a device is one thread's.
    """
    _check_free(device)

    def apply(watch: Watch) -> None:
        loop.watch(
            watch.fd,
            readable=watch.readable if watch.reading else None,
            writable=watch.writable if watch.writing else None,
        )

    def arm(alarm: Alarm) -> None:
        deadline = alarm.deadline

        def ring() -> None:
            if alarm.deadline == deadline and alarm.on_change is not None:
                alarm.ring()

        if deadline is not None:
            loop.call_later(max(0.0, deadline - time.monotonic()), ring)

    def attach() -> None:
        for watch in device.watches:
            watch.on_change = apply
            apply(watch)
        for alarm in device.alarms:
            if alarm.on_change is None and (own_alarms or alarm.outside):
                alarm.on_change = arm
                arm(alarm)

    device.on_watches_change = attach
    device.on_call_soon = loop.call_soon_from_any_thread
    attach()


def unwatch_device(device: Device, loop: Loop) -> None:
    """The opposite of `watch_device`; to be called before the device is closed."""
    device.on_watches_change = device.on_call_soon = None
    for watch in device.watches:
        watch.on_change = None
        loop.watch(watch.fd)
    for alarm in device.alarms:
        alarm.on_change = None


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a read, closed on exec; an odd rest of bytes is none."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not _CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return fds.tolist()


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
