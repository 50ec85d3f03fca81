"""A link over a Unix stream socket, for users without privileges: passt, QEMU's stream netdev.

Each frame goes over the socket as its length, 4 bytes big-endian, and then its bytes from the
Ethernet header on. Nothing tells the other side of work left undone, so this link neither takes nor
gives offloads; the device finishes checksums and segments before it writes.

A socket may take or give half a frame. What is left of it is kept here, and no frame is ever mixed
with the next; a peer that announces a frame of impossible length is hung up on.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence

from vq.abi import NET_HDR_SIZE
from vq.errors import UsageError
from vq.link import SHORT_OF_MEMORY, Frame, FrameBuffer, Link, Port, Room, scatter
from vq.offload import Offload
from vq.unix_socket import Listener, connect

__all__ = ["StreamLink"]

SYSTEM_CALLS = ("accept4", "getsockname", "readv", "recvfrom", "sendmsg", "sendto")

PREFIX = struct.Struct(">I")
ETHER_HEADER = 14
MAX_SENT = 65535
"""passt hangs up on longer frames."""
MAX_RECEIVED = 4096 + 65536
"""What QEMU has room for in either direction."""
IOV_MAX = 1024
BURST_BYTES = 1 << 18
"""How much one system call is asked to send: about what a socket's buffer holds."""
PLAIN_HEADER = bytes(NET_HDR_SIZE)
RETRY_SECONDS = 1.0
SHORT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))


class StreamLink(Link):
    """One port over a stream socket.

    It is used in one of three ways: over a socket that is already connected, as a client
    (`connect`) or as a server of one peer at a time (`listen`).

    A connection that ends makes `read_burst` raise `OSError` (ECONNRESET, or EPROTO when the peer
    broke the framing), once what came before has been read. A server then waits for its next peer
    instead, and a client with `reconnect` tries again on the next write, once a second: until then
    `is_up` is false and frames are dropped as ``not connected``.
    """

    def __init__(self, connection: socket.socket | None, *, name: str = "stream") -> None:
        """Takes a connected stream socket over; None for a link that has no peer yet."""
        self.name = name
        self.accepts = Offload.NONE
        self.delivers = Offload.NONE
        self.min_frame = ETHER_HEADER
        self.max_frame = MAX_RECEIVED
        self._port = StreamPort(self)
        self.ports = (self._port,)
        self._connection: socket.socket | None = None
        self._listener: Listener | None = None
        self._reconnect_path: str | None = None
        self._make_connection: Callable[[str], socket.socket] = connect
        self._last_try = 0.0
        if connection is not None:
            self._connected(connection)

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        reconnect: bool = False,
        connect: Callable[[str], socket.socket] = connect,
    ) -> StreamLink:
        """A client of the server that listens at `path`; `connect` makes the connection.

        Raises `UsageError` for a path that no socket can have, `OSError` when nobody listens.
        """
        link = cls(connect(path), name=f"stream:{path}")
        if reconnect:
            link._reconnect_path = path
            link._make_connection = connect
        return link

    @classmethod
    def listen(cls, path: str) -> StreamLink:
        """A server at `path`, which serves one client after the other.

        A socket that a dead server left there is replaced. Raises `UsageError` when something else
        is at `path` or somebody serves it.
        """
        link = cls(None, name=f"stream:{path}")
        link._listener = Listener(path, backlog=1)
        return link

    @property
    def is_up(self) -> bool:
        """Whether a peer is connected."""
        return self._connection is not None

    def close(self) -> None:
        """Hangs up; a server also removes its socket."""
        self._reconnect_path = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # --- the life of a connection ---

    def _connected(self, connection: socket.socket) -> None:
        if connection.type != socket.SOCK_STREAM:
            raise UsageError(f"{self.name} is not a stream socket")
        connection.setblocking(False)
        self._connection = connection
        self._port.start()
        if self.on_change is not None:
            self.on_change()

    def _hang_up(self) -> bool:
        """Ends the connection; returns whether there may be another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._last_try = time.monotonic()
            if self.on_change is not None:  # while nobody else can have the descriptor's number
                self.on_change()
            connection.close()
        return self._listener is not None or self._reconnect_path is not None

    def _poll_fd(self) -> int | None:
        if self._connection is not None:
            return self._connection.fileno()
        return None if self._listener is None else self._listener.socket.fileno()

    def _connection_now(self) -> socket.socket | None:
        """The connection; without one, that of the next peer if it is there."""
        if self._connection is not None:
            return self._connection
        try:
            if self._listener is not None:
                self._connected(self._listener.socket.accept()[0])
            elif self._reconnect_path is not None:
                now = time.monotonic()
                if now - self._last_try >= RETRY_SECONDS:
                    self._last_try = now
                    self._connected(self._make_connection(self._reconnect_path))
            else:
                raise OSError(errno.ENOTCONN, f"{self.name} is closed")
        except (BlockingIOError, ConnectionError, FileNotFoundError, UsageError):
            return None
        except OSError as error:
            if error.errno not in SHORT_OF_DESCRIPTORS | SHORT_OF_MEMORY:
                raise
            return None  # the peer waits in the socket's queue
        return self._connection


class StreamPort(Port):
    """Frames with their length before them, over the present connection of a `StreamLink`."""

    def __init__(self, link: StreamLink) -> None:
        super().__init__()
        self._link = link
        self.start()

    def start(self) -> None:
        """Forgets what was left of the last connection."""
        self._unsent = b""
        self._resume = False
        self._prefix = bytearray(PREFIX.size)
        self._prefix_have = 0
        self._partial: bytearray | None = None
        self._partial_have = 0
        self._broken: OSError | None = None

    def fileno(self) -> int | None:
        """The connection, or the listening socket of a server without a peer."""
        return self._link._poll_fd()

    # --- towards the peer ---

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """Sends frames, many with one system call.

        A frame of which the socket took only a part is not yet dealt with: the rest of it is kept
        here, and goes out first when the caller comes back with it.

        Counted in `dropped`: ``runt``, ``too long`` and ``not connected``.
        """
        dealt_with = 0
        connection = self._link._connection_now()
        if connection is None:
            self._resume = False
            self.dropped["not connected"] += len(frames)
            return len(frames)
        try:
            if not self._send_unsent(connection):
                return 0
            if self._resume and frames:
                self._resume = False
                dealt_with = 1
            while dealt_with < len(frames):
                taken, full = self._send_some(connection, frames, dealt_with)
                dealt_with += taken
                if full:
                    break
            return dealt_with
        except ConnectionError:
            # What the peer sent before it went can still be read: reading finds the end.
            self.dropped["not connected"] += len(frames) - dealt_with
            return len(frames)

    def _send_unsent(self, connection: socket.socket) -> bool:
        """Sends what is left of a frame that went halfway; returns whether all of it is gone."""
        if self._unsent:
            try:
                sent = connection.send(self._unsent)
            except ConnectionError:
                sent = len(self._unsent)
            except OSError as error:
                if not _passes(error):
                    raise
                return False
            self._unsent = self._unsent[sent:]
        return not self._unsent

    def _send_some(
        self, connection: socket.socket, frames: Sequence[Frame], first: int
    ) -> tuple[int, bool]:
        """Sends frames from `first` on with one call.

        Returns how many it dealt with, and whether the socket is full.
        """
        pieces: list[FrameBuffer] = []
        ends: list[int] = []  # where each frame ends in what is sent
        total = 0
        for index in range(first, len(frames)):
            frame = frames[index]
            size = sum(map(len, frame)) - NET_HDR_SIZE
            if not ETHER_HEADER <= size <= MAX_SENT:
                if pieces:  # its turn comes with the next call
                    break
                self.dropped["runt" if size < ETHER_HEADER else "too long"] += 1
            else:
                body = frame[1:] if len(frame) < IOV_MAX else [b"".join(frame[1:])]
                if pieces and (len(pieces) + len(body) >= IOV_MAX or total >= BURST_BYTES):
                    break
                pieces.append(PREFIX.pack(size))
                pieces += body
                total += PREFIX.size + size
            ends.append(total)
        if not pieces:
            return len(ends), False
        try:
            sent = connection.sendmsg(pieces)
        except OSError as error:
            if not _passes(error):
                raise
            sent = 0
        if sent == total:
            return len(ends), False
        whole = sum(1 for end in ends if end <= sent)
        begun = ends[whole - 1] if whole else 0
        if sent > begun:
            self._unsent = b"".join(pieces)[sent : ends[whole]]
            self._resume = True
        return whole, True

    # --- from the peer ---

    def read_burst(self, room: Room, limit: int) -> int:
        """Reads frames straight into the room, each together with the length of the next.

        Nothing but a frame that came in part is kept here, so that the descriptor stays readable
        while frames wait. Counted in `dropped`: ``runt`` and ``too long`` for the room.
        """
        if self._broken is not None:
            error, self._broken = self._broken, None
            raise error
        connection = self._link._connection_now()
        moved = 0
        try:
            if connection is not None:
                self._send_unsent(connection)
                while moved < limit:
                    outcome = self._read_one(connection, room)
                    if outcome is None:
                        break
                    moved += outcome
        except OSError as error:
            if _passes(error):
                return moved
            if not self._link._hang_up():
                if not moved:
                    raise
                self._broken = error  # the frames before it first
        return moved

    def _read_one(self, connection: socket.socket, room: Room) -> int | None:
        """Moves one frame: 1, 0 when it was dropped, None when there is no room or not all of it.

        Raises `BlockingIOError` when nothing has come.
        """
        if self._prefix_have < PREFIX.size:
            rest = memoryview(self._prefix)[self._prefix_have :]
            self._prefix_have += self._some(connection.recv_into(rest))
            if self._prefix_have < PREFIX.size:
                return None
        (size,) = PREFIX.unpack(self._prefix)
        if size > MAX_RECEIVED:
            raise OSError(
                errno.EPROTO,
                f"the peer of {self._link.name} announced a frame of {size} bytes: "
                f"at most {MAX_RECEIVED} can be, or it does not speak this protocol",
            )
        if self._partial is None:
            views = room.views()
            if not views:
                return None
            target = _first_bytes(views, size)
            if size < ETHER_HEADER or target is None or len(target) >= IOV_MAX:
                self._partial, self._partial_have = bytearray(size), 0
            else:
                came = self._some(os.readv(connection.fileno(), [*target, self._prefix]))
                if came >= size:
                    self._prefix_have = came - size
                    room.commit(PLAIN_HEADER, size)
                    return 1
                self._partial, self._partial_have = bytearray(size), came
                self._partial[:came] = b"".join(target)[:came]
        return self._read_rest(connection, room, self._partial)

    def _read_rest(self, connection: socket.socket, room: Room, frame: bytearray) -> int | None:
        """Goes on with a frame that came in part, or that is read only to be dropped."""
        if self._partial_have < len(frame):
            # Room first: a whole frame kept here would not make the descriptor readable.
            views = room.views()
            if not views:
                return None
            rest = memoryview(frame)[self._partial_have :]
            self._partial_have += self._some(connection.recv_into(rest))
            if self._partial_have < len(frame):
                return None
        self._partial = None
        self._prefix_have = 0
        if len(frame) < ETHER_HEADER:
            self.dropped["runt"] += 1
            return 0
        target = _first_bytes(room.views(), len(frame))
        if target is None:
            self.dropped["too long"] += 1
            return 0
        scatter([frame], target)
        room.commit(PLAIN_HEADER, len(frame))
        return 1

    def _some(self, count: int) -> int:
        """`count` bytes that came; none at all means that the peer hung up."""
        if count:
            return count
        within = self._prefix_have or self._partial is not None
        raise OSError(
            errno.ECONNRESET,
            f"the peer of {self._link.name} hung up" + (" within a frame" if within else ""),
        )


def _passes(error: OSError) -> bool:
    """Whether the socket is only full or empty, or the kernel short of memory, for now."""
    return isinstance(error, BlockingIOError) or error.errno in SHORT_OF_MEMORY


def _first_bytes(views: Sequence[memoryview], size: int) -> list[memoryview] | None:
    """The first `size` bytes of `views`, None when they have not that many."""
    target = []
    for view in views:
        if size <= len(view):
            target.append(view[:size])
            return target
        target.append(view)
        size -= len(view)
    return None
