"""The virtio socket device (virtio 1.3, 5.10): a guest's vsock connections on Unix sockets.

As other vhost-user vsock devices do it:

* A guest's connection to port N of the host (CID 2) goes to whoever listens on the Unix socket
  ``PATH_N``, for instance ``/run/vm.vsock_5000``; it is refused when nobody does.
* A program of the host connects to ``PATH`` itself, sends ``CONNECT N`` and a newline to be joined
  to port N of the guest, and gets ``OK M`` and a newline, where M is the port on the host's side,
  once the guest has accepted; when it does not, the socket is closed.

Bytes go straight between sockets and guest memory. Where a socket takes no more, what came is kept
here, up to the buffer's size that the guest was told; connections are limited too, so a guest has
a bound to what it can make the host keep. What one connection keeps waiting holds up no other.

How a connection works is in `vsock_connection`; here is what it goes through.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from vq import unix_socket
from vq.abi import (
    DeviceId,
)
from vq.abi_vsock import (
    VSOCK_CID_HOST,
    VSOCK_HDR_SIZE,
    VsockConfig,
    VsockEvent,
    VsockEventId,
    VsockFeature,
    VsockOp,
    VsockShutdown,
    VsockType,
)
from vq.device import Queue, Watch
from vq.devices.hangup import hung_up, is_closed
from vq.devices.vsock_connection import Connection, Header, State
from vq.errors import DriverError, UsageError
from vq.log_limit import limited_logger
from vq.model import DeviceModel
from vq.packet import cut
from vq.request import IOV_MAX, Request
from vq.unix_socket import Listener

__all__ = ["VsockDevice", "prefix_of_ports"]

log = limited_logger(__name__)

SYSTEM_CALLS = (
    *("accept4", "getsockname", "shutdown"),
    *("readv", "recvfrom", "sendto", "writev"),
)

RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 256
RESERVED_CIDS = frozenset((0, 1, VSOCK_CID_HOST, 0xFFFFFFFF))
FIRST_PORT = 1 << 30
"""Where the host's own ports begin, beyond those that anybody would choose."""
BURST_BYTES = 1 << 16
"""Bytes read from a socket at once; then others have their turn."""
ROOMS = 64
"""Receive buffers that are taken from the guest ahead of what goes into them."""
MAX_RESETS = 1024
"""Answers to packets of no connection that wait for receive buffers; more are not given."""
GREETING_SECONDS = 10.0
"""How long a program of the host may take to say which port it wants, and the guest to answer."""
GOODBYE_SECONDS = 8.0
"""How long a guest may take to confirm that a connection is over."""
PAUSE_SECONDS = 5.0
"""How long connections outlive a reset of the device, if the same driver may come back."""
LONGEST_GREETING = 32
LAST_PORT = 0xFFFFFFFE
TICK_SECONDS = 0.5


class VsockDevice(DeviceModel):
    """A guest's sockets, for the guest with `cid`, on Unix sockets at `path`.

    `connections` is how many there may be at a time, and `buffer` the bytes that are kept for each
    until its socket takes them. `connect` makes the connections to the host's programs: it gets a
    path, and returns a connected socket that does not block or raises `OSError` or `UsageError`.

    Counted in `stats`: ``connected_from_guest``, ``connected_to_guest``, ``refused``, ``reset``
    (connections that a guest used against the rules), ``to_guest_bytes``, ``to_host_bytes``,
    ``ignored`` (packets for somebody else).

    Raises `UsageError` for a CID that no guest can have (5.10.4), and as `Listener` does.
    """

    device_id = DeviceId.VSOCK
    feature_bits = VsockFeature
    from_outside: ClassVar[Collection[str]] = ("rx", "event")
    host_methods: ClassVar[Collection[str]] = ("transport_reset",)

    def __init__(
        self,
        cid: int,
        path: str,
        *,
        connections: int = 512,
        buffer: int = 1 << 18,
        connect: Callable[[str], socket.socket] = unix_socket.connect,
    ) -> None:
        if not 0 <= cid <= 0xFFFFFFFF or cid in RESERVED_CIDS:
            raise UsageError(f"a guest cannot have the CID {cid}")
        unix_socket.check_path(f"{prefix_of_ports(path)}{LAST_PORT}")  # has to have room, too
        super().__init__(
            queues=[
                ("rx", QUEUE_SIZE, None),
                ("tx", QUEUE_SIZE, self._transmitted),
                ("event", 16, None),
            ],
            features=(VsockFeature.STREAM, VsockFeature.NO_IMPLIED_STREAM),
            config=VsockConfig(guest_cid=cid),
        )
        self.cid = cid
        self.path = path
        self._connect = connect
        self._limit = connections
        self._buffer = buffer
        self._flows: dict[tuple[int, int], _Flow] = {}  # by the guest's port and the host's
        self._lingering: set[_Flow] = set()  # over for the guest, with bytes for the host
        self._unread: set[_Flow] = set()  # whose socket is not read any more
        self._greeting: set[_Greeting] = set()
        self._rooms: deque[_Room] = deque()
        self._resets: dict[tuple[int, int, int], Header] = {}  # by the guest's port, whom it meant
        self._waiting: deque[_Flow] = deque()  # have something for the guest, need receive buffers
        self._next_port = FIRST_PORT
        self._stopped_at: dict[int, int] = {}  # where rings were that may go on
        self._event_due = False
        self._deadlines: dict[_Flow | _Greeting | None, float] = {}
        self._clock = self.alarm(self._tick, outside=True)
        self._listener = Listener(path, backlog=128)
        self._accepting = self.watch(self._listener.socket.fileno(), readable=self._accept)
        self._accepting.want(reading=True)

    def close(self) -> None:
        """Ends all connections and removes the socket."""
        super().close()
        for greeting in list(self._greeting):
            self._dismiss(greeting)
        for flow in [*self._flows.values(), *self._lingering]:
            self._hang_up(flow)
        self._flows.clear()
        self._lingering.clear()
        self._listener.close()

    # --- from the guest ---------------------------------------------------------------------------

    def _transmitted(self, requests: Sequence[Request]) -> None:
        for request in requests:
            reader = request.reader
            if request.writer.remaining:
                raise DriverError(
                    "a device-writable buffer in the tx queue", queue="tx", section="5.10.6.4"
                )
            header = Header.unpack(reader.read(VSOCK_HDR_SIZE))
            if header.len > reader.remaining:
                raise DriverError(
                    f"a packet of {header.len} bytes with {reader.remaining}",
                    queue="tx",
                    section="5.10.6",
                )
            self._packet(header, request)
            request.complete(0)
        self._serve()

    def _packet(self, header: Header, request: Request) -> None:
        if header.src_cid != self.cid or header.dst_cid != VSOCK_CID_HOST:
            self.stats["ignored"] += 1
            if header.src_cid == self.cid:
                self._answer_with_reset(header)
            return
        flow = self._flows.get((header.src_port, header.dst_port))
        if flow is None:
            if header.op == VsockOp.REQUEST and header.type == VsockType.STREAM:
                self._requested(header)
            else:
                self._answer_with_reset(header)
            return
        was = flow.connection.state
        taken = flow.connection.receive(header)
        if taken:
            self._to_host(flow, request.reader.views(taken))
        if was is State.REQUESTED:
            if flow.connection.state is State.ESTABLISHED:
                self._accepted(flow)
            else:
                self.stats["refused"] += 1
        self._look_after(flow)

    def _answer_with_reset(self, header: Header) -> None:
        """A packet of no connection is answered with RST, unless it is one itself."""
        if header.op == VsockOp.RST:
            return
        if len(self._resets) < MAX_RESETS:
            self._resets[header.src_port, header.dst_cid, header.dst_port] = header.reset()

    def _requested(self, header: Header) -> None:
        """The guest connects to a port of the host."""
        sock = self._connected(header.dst_port)
        if sock is None:
            self.stats["refused"] += 1
            self._answer_with_reset(header)
            return
        # An answer to what came before is late: now it would end this connection.
        self._resets.pop((header.src_port, header.dst_cid, header.dst_port), None)
        flow = self._open(sock, header.src_port, header.dst_port, asking=False)
        flow.connection.receive(header)
        self.stats["connected_from_guest"] += 1
        self._look_after(flow)

    def _connected(self, port: int) -> socket.socket | None:
        if self._count() >= self._limit:
            return None
        try:
            return self._connect(f"{prefix_of_ports(self.path)}{port}")
        except (OSError, UsageError) as error:
            log.debug("port %d: %s", port, error)
            return None

    def _to_host(self, flow: _Flow, views: Sequence[memoryview]) -> None:
        """Gives bytes to the socket; what it does not take now is copied, and waits."""
        count = 0
        if flow.sock is not None and not flow.unsent:
            count = self._write(flow, views)
        if flow.sock is None:
            flow.connection.forwarded(flow.connection.waiting)
            return
        for view in cut(views, count):
            flow.unsent += view

    def _write(self, flow: _Flow, pieces: Sequence[memoryview | bytes]) -> int:
        """Writes what the socket takes now; returns how many bytes."""
        assert flow.sock is not None
        try:
            count = os.writev(flow.sock.fileno(), pieces[:IOV_MAX])
        except BlockingIOError:
            return 0
        except OSError:  # nobody is there any more to have it
            flow.connection.reset()
            self._hang_up(flow)
            return 0
        self.stats["to_host_bytes"] += count
        flow.connection.forwarded(count)
        return count

    def _output_ready(self, flow: _Flow) -> None:
        if flow.sock is not None and flow.unsent:
            count = self._write(flow, [bytes(flow.unsent[:BURST_BYTES])])
            del flow.unsent[:count]
        self._look_after(flow)
        self._serve()

    # --- to the guest -----------------------------------------------------------------------------

    def _input_ready(self, flow: _Flow) -> None:
        flow.has_input = True
        self._look_after(flow)
        self._serve()

    def _serve(self) -> None:
        """Gives the guest what waits for it, as far as it has receive buffers."""
        while (self._resets or self._waiting) and self._find_rooms():
            if self._resets:
                header = self._resets.pop(next(iter(self._resets)))
                self._rooms.popleft().send(header)
                continue
            flow = self._waiting.popleft()
            flow.is_waiting = False
            control = flow.connection.next_control()
            if control is not None:
                self._rooms.popleft().send(control)
            elif flow.has_input and flow.sock is not None:
                self._from_host(flow)
            self._look_after(flow)
        self._tell_event()

    def _from_host(self, flow: _Flow) -> None:
        """Reads from the socket straight into the guest's buffers, one packet for each."""
        connection = flow.connection
        limit = min(connection.credit, BURST_BYTES)
        flow.has_input = False  # until the loop says so again
        if not limit:
            return
        assert flow.sock is not None
        views: list[memoryview] = []
        size = 0
        for room in self._rooms:
            views += room.payload
            size += room.size
            if size >= limit or len(views) >= IOV_MAX:
                break
        try:
            count = os.readv(flow.sock.fileno(), cut(views, 0, limit)[:IOV_MAX])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._input_ended(flow)
            return
        self.stats["to_guest_bytes"] += count
        while count:
            room = self._rooms.popleft()
            length = min(count, room.size)
            room.send(connection.data(length), length)
            count -= length
        if not connection.credit:
            connection.ask_for_credit()

    def _input_ended(self, flow: _Flow) -> None:
        assert flow.sock is not None
        if hung_up(flow.sock.fileno()):
            self._program_gone(flow)
        else:
            flow.connection.shutdown(VsockShutdown.SEND)
            self._stop_reading(flow)

    def _stop_reading(self, flow: _Flow) -> None:
        """One of both ends is done with this direction: no event tells any more who is gone."""
        if flow.sock is not None:
            self._unread.add(flow)
            self._wind_clock()

    def _look_for_program(self, flow: _Flow) -> None:
        """Tells the guest when the program is gone whose socket is not read any more."""
        assert flow.sock is not None
        unwanted = flow.connection.peer_shutdown & VsockShutdown.RECEIVE
        if (is_closed if unwanted else hung_up)(flow.sock.fileno()):
            self._program_gone(flow)
            self._look_after(flow)

    def _program_gone(self, flow: _Flow) -> None:
        flow.connection.shutdown(VsockShutdown.BOTH)
        self._hang_up(flow)
        self._by(flow, GOODBYE_SECONDS)

    def _find_rooms(self) -> bool:
        """Takes receive buffers from the guest; returns whether there are any."""
        if not self._rooms:
            for request in self.take(RX, ROOMS):
                self._rooms.append(_Room(request))
        return bool(self._rooms)

    def buffers_available(self, queue: Queue) -> None:
        """There are receive buffers again, or some for events."""
        if queue.index == RX:
            self._serve()
        elif queue.index == EVENT:
            self._tell_event()

    # --- connections ------------------------------------------------------------------------------

    def _open(self, sock: socket.socket, guest_port: int, port: int, *, asking: bool) -> _Flow:
        connection = Connection(
            (VSOCK_CID_HOST, port), (self.cid, guest_port), buffer=self._buffer, asking=asking
        )
        flow = _Flow(connection, sock)
        flow.watch = self.watch(
            sock.fileno(),
            readable=functools.partial(self._input_ready, flow),
            writable=functools.partial(self._output_ready, flow),
        )
        self._flows[guest_port, port] = flow
        return flow

    def _look_after(self, flow: _Flow) -> None:
        """Does what has become due for a connection since it was last looked at."""
        connection = flow.connection
        if connection.state is State.CLOSED:
            self._over(flow)
        else:
            self._pass_on_shutdown(flow)
        if flow.sock is not None:
            flow.watch.want(
                reading=connection.credit > 0 and not flow.has_input, writing=bool(flow.unsent)
            )
        if (connection.has_control or flow.has_input) and not flow.is_waiting:
            flow.is_waiting = True
            self._waiting.append(flow)

    def _pass_on_shutdown(self, flow: _Flow) -> None:
        """Tells the program what the guest will not do any more."""
        said = flow.connection.peer_shutdown
        if said & VsockShutdown.SEND and not flow.unsent and not flow.output_ended:
            flow.output_ended = True
            self._shut(flow, socket.SHUT_WR)
        if said & VsockShutdown.RECEIVE and not flow.input_ended:
            flow.input_ended = True
            self._shut(flow, socket.SHUT_RD)
            self._stop_reading(flow)

    def _shut(self, flow: _Flow, what: int) -> None:
        try:
            if flow.sock is not None:
                flow.sock.shutdown(what)
        except OSError:
            self._hang_up(flow)

    def _over(self, flow: _Flow) -> None:
        """The connection is closed for the guest."""
        connection = flow.connection
        key = connection.peer[1], connection.local[1]
        if self._flows.get(key) is flow:
            del self._flows[key]
            self._deadlines.pop(flow, None)
            if connection.fault is not None:
                self.stats["reset"] += 1
                log.debug("port %d: %s", connection.local[1], connection.fault)
        flow.has_input = False
        self._unread.discard(flow)
        if flow.unsent and connection.peer_shutdown & VsockShutdown.SEND:
            self._lingering.add(flow)  # what the guest sent before it went is the host's to have
        else:
            self._lingering.discard(flow)
            self._hang_up(flow)
        self._admit()

    def _hang_up(self, flow: _Flow) -> None:
        """Closes the socket; the connection may go on until the guest has confirmed its end."""
        if flow.sock is not None:
            self.unwatch(flow.watch)
            flow.sock.close()
            flow.sock = None
        self._unread.discard(flow)
        flow.has_input = False
        flow.unsent.clear()
        flow.connection.forwarded(flow.connection.waiting)

    def _count(self) -> int:
        return len(self._flows) + len(self._lingering) + len(self._greeting)

    def _drop_all(self) -> None:
        """The driver knows nothing of its connections any more."""
        for flow in list(self._flows.values()):
            flow.connection.reset()
            self._over(flow)

    # --- programs of the host that want to connect ------------------------------------------------

    def _accept(self) -> None:
        if self._count() >= self._limit:
            self._accepting.want(reading=False)
            return
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors, most likely
            log.warning("%s: cannot accept: %s", self.path, error)
            self._accepting.want(reading=False)
            self._by(None, GREETING_SECONDS)
            return
        sock.setblocking(False)
        greeting = _Greeting(sock)
        greeting.watch = self.watch(
            sock.fileno(), readable=functools.partial(self._greeted, greeting)
        )
        greeting.watch.want(reading=True)
        self._greeting.add(greeting)
        self._by(greeting, GREETING_SECONDS)

    def _admit(self) -> None:
        """There may be room for another connection."""
        self._accepting.want(reading=True)

    def _greeted(self, greeting: _Greeting) -> None:
        """The line that says which port of the guest is wanted; what follows it stays unread."""
        sock = greeting.sock
        try:
            seen = sock.recv(LONGEST_GREETING, socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            greeting.line += sock.recv(end or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        if not seen or len(greeting.line) > LONGEST_GREETING:
            self._dismiss(greeting)
            return
        if not greeting.line.endswith(b"\n"):
            return
        found = re.fullmatch(rb"CONNECT (\d{1,10})\r?\n", greeting.line)
        if found is None or int(found[1]) > LAST_PORT:
            log.debug("%s: %r is no CONNECT", self.path, bytes(greeting.line))
            self._dismiss(greeting)
            return
        self._forget(greeting)
        flow = self._open(sock, int(found[1]), self._free_port(int(found[1])), asking=True)
        self._by(flow, GREETING_SECONDS)
        self._look_after(flow)
        self._serve()

    def _dismiss(self, greeting: _Greeting) -> None:
        self._forget(greeting)
        greeting.sock.close()
        self._admit()

    def _forget(self, greeting: _Greeting) -> None:
        self.unwatch(greeting.watch)
        self._greeting.discard(greeting)
        self._deadlines.pop(greeting, None)

    def _free_port(self, guest_port: int) -> int:
        """A port on the host's side that no connection to this port of the guest has."""
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < LAST_PORT else FIRST_PORT
            if (guest_port, port) not in self._flows:
                return port

    def _accepted(self, flow: _Flow) -> None:
        """The guest has taken a connection that the host wanted."""
        self._deadlines.pop(flow, None)
        self.stats["connected_to_guest"] += 1
        assert flow.sock is not None
        try:
            flow.sock.send(b"OK %d\n" % flow.connection.local[1])
        except OSError:
            flow.connection.reset()
            self._hang_up(flow)

    # --- time -------------------------------------------------------------------------------------

    def _by(self, what: _Flow | _Greeting | None, seconds: float) -> None:
        """Something has to have come about in so many seconds."""
        self._deadlines[what] = time.monotonic() + seconds
        self._wind_clock()

    def _wind_clock(self) -> None:
        if self._clock.deadline is None:
            self._clock.set(TICK_SECONDS)

    def _tick(self) -> None:
        now = time.monotonic()
        for what in [what for what, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[what]
            if isinstance(what, _Greeting):
                self._dismiss(what)
            elif isinstance(what, _Flow):
                what.connection.reset()
                self._look_after(what)
            elif self.queues[RX].ring is None:
                self._drop_all()
            else:
                self._admit()
        for flow in list(self._unread):
            self._look_for_program(flow)
        if self._deadlines or self._unread:
            self._clock.set(TICK_SECONDS)
        self._serve()

    # --- what happens to the device ---------------------------------------------------------------

    def transport_reset(self) -> None:
        """Ends all connections and has the driver told (5.10.6.7), as after a migration."""
        self._in_turn(self._reset_transport)

    def _reset_transport(self) -> None:
        self._drop_all()
        self._event_due = True
        self._serve()

    def _tell_event(self) -> None:
        if self._event_due:
            for request in self.take(EVENT, 1):
                request.writer.structure(VsockEvent(id=VsockEventId.TRANSPORT_RESET))
                request.complete()
                self._event_due = False

    def queue_started(self, queue: Queue) -> None:
        """A driver that goes on where it was stopped knows its connections; another one does not.

        One that goes on elsewhere has connections that an earlier device knew, in another process.
        """
        if queue.index == EVENT or queue.ring is None:
            return
        self._deadlines.pop(None, None)
        place = queue.ring.next_avail
        if self._stopped_at.pop(queue.index, None) != place:
            self._drop_all()
            self._waiting.clear()
            self._event_due = self._event_due or place != 0
        for flow in list(self._flows.values()):
            self._look_after(flow)

    def queue_stopping(self, queue: Queue) -> None:
        """See `DeviceModel`."""
        super().queue_stopping(queue)
        if queue.ring is not None:
            self._stopped_at[queue.index] = queue.ring.next_avail
        if queue.index == RX:
            self._rooms.clear()

    def queue_dropped(self, queue: Queue) -> None:
        """See `DeviceModel`."""
        super().queue_dropped(queue)
        self._stopped_at.pop(queue.index, None)
        if queue.index == RX:
            self._rooms.clear()

    def device_reset(self) -> None:
        """Connections stand still: a frontend that pauses its guest resets the device in between.

        Whether it is the same driver that comes back shows when its rings are started.
        """
        self._event_due = False
        self._resets.clear()
        self._waiting.clear()
        for flow in self._flows.values():
            flow.is_waiting = flow.has_input = False
            if flow.sock is not None:
                flow.watch.want(reading=False)
        if self._flows:
            self._by(None, PAUSE_SECONDS)


def prefix_of_ports(path: str) -> str:
    """What the paths of all ports of the host begin with, for a device on `path`."""
    return f"{path}_"


class _Flow:
    """A connection with the socket that it goes to."""

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        self.connection = connection
        self.sock: socket.socket | None = sock
        self.watch: Watch
        self.unsent = bytearray()  # of the guest, for the socket
        self.output_ended = False  # the socket was told that no more will come
        self.input_ended = False  # ... that no more is wanted
        self.has_input = False  # the socket has something, which waits for receive buffers
        self.is_waiting = False  # in the device's queue of those who have something for the guest


class _Greeting:
    """A program of the host that has not said yet what it wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.watch: Watch
        self.line = bytearray()


class _Room:
    """A receive buffer of the guest: a place for a header and one for a payload."""

    __slots__ = ("_head", "_request", "payload", "size")

    def __init__(self, request: Request) -> None:
        self.size = request.writer.remaining - VSOCK_HDR_SIZE
        if request.reader.remaining:
            raise DriverError(
                "a device-readable buffer in the rx queue", queue="rx", section="5.10.6.4"
            )
        if self.size <= 0:
            raise DriverError(
                f"a receive buffer of {request.writer.remaining} bytes",
                queue="rx",
                section="5.10.6",
            )
        self._request = request
        self._head = request.writer.views(VSOCK_HDR_SIZE)
        self.payload = request.writer.views()

    def send(self, header: Header, length: int = 0) -> None:
        """Gives the buffer back with a header, and `length` bytes that are in it already."""
        data = header.pack()
        start = 0
        for view in self._head:
            view[:] = data[start : start + len(view)]
            start += len(view)
        self._request.complete(VSOCK_HDR_SIZE + length)
