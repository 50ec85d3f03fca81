"""Requests as a device model sees them: a reader, a writer, and the answer given at last.

A `Request` stands for one chain of buffers. Its `Reader` goes over the device-readable bytes and
its `Writer` over the device-writable ones, front to back, however the driver cut them into buffers
(virtio 1.3, 2.7.4.1: a device must not rely on the framing). Neither leaves the buffers. Bytes can
be copied, taken as ctypes structures, moved from and to files, or looked at where they are.

What a driver left out is a `RequestTooShort`. More than the device will copy at once is a
`RequestTooLong`: a chain can name 4 GiB, the same memory again and again. After a reset the buffers
are the driver's again, and every use of the request is a `RequestGone`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from vq.errors import DriverError, UsageError, VqError
from vq.packet import Buffer, cut
from vq.split_ring import Chain

__all__ = [
    "MOST_COPIED",
    "Reader",
    "Request",
    "RequestGone",
    "RequestTooLong",
    "RequestTooShort",
    "Writer",
    "blank",
]

S = TypeVar("S", bound=ctypes.Structure)

IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))
"""Buffers that one readv or writev takes (POSIX guarantees 16)."""

MOST_COPIED = 1 << 20
"""Bytes that `Reader.read` copies at most where the device does not say how many it wants."""

_ZEROS = memoryview(bytes(65536))


class RequestTooShort(DriverError):
    """The driver's buffers have less room, or fewer bytes, than the request must have."""


class RequestTooLong(DriverError):
    """The driver's buffers have more bytes than the device is willing to copy."""


class RequestGone(VqError):
    """The queue was reset while the device worked on the request: its buffers are not ours."""


class _Cursor:
    """A position in a request's buffers of one direction."""

    __slots__ = ("_head", "_kind", "_offset", "_queue", "_views", "position", "remaining")

    def __init__(self, views: Sequence[memoryview], queue: str, head: int, kind: str) -> None:
        self._views: Sequence[memoryview] | None = views
        self._queue = queue
        self._head = head
        self._kind = kind
        self._offset = 0  # bytes of the first view that are behind the position
        self.position = 0
        """Bytes gone over so far."""
        self.remaining = len(views[0]) if len(views) == 1 else sum(map(len, views))
        """Bytes still ahead."""

    def skip(self, length: int) -> None:
        """Goes over `length` bytes."""
        self._take(length)

    def _take(self, length: int | None) -> list[memoryview]:
        """Views of the next `length` bytes, or of all that is left; the position goes behind."""
        taken, index, offset = self._look(length)
        count = self.remaining if length is None else length
        self.position += count
        self.remaining -= count
        self._views, self._offset = self._ahead()[index:], offset
        return taken

    def _look(self, length: int | None) -> tuple[list[memoryview], int, int]:
        """Views of the next bytes, and where they end: which view ahead, how far into it."""
        views = self._ahead()
        if length is None:
            length = self.remaining
        elif not 0 <= length <= self.remaining:
            raise self._too_short(length)
        found = []
        index, offset = 0, self._offset
        while length:
            view = views[index]
            end = min(offset + length, len(view))
            found.append(view[offset:end] if offset or end < len(view) else view)
            length -= end - offset
            offset = end
            if end == len(view):
                index, offset = index + 1, 0
        return found, index, offset

    def _ahead(self) -> Sequence[memoryview]:
        if self._views is None:
            raise RequestGone(f"{self._queue}, head {self._head}: the queue was reset")
        return self._views

    def _too_short(self, length: int) -> Exception:
        if length < 0:
            return UsageError(f"a length of {length} bytes")
        return RequestTooShort(
            f"{self.remaining} {self._kind} bytes where {length} are needed",
            queue=self._queue,
            head=self._head,
        )

    def _drop(self) -> None:
        self._views = None

    def __len__(self) -> int:
        return self.remaining


class Reader(_Cursor):
    """The device-readable bytes of a request, from front to back.

    The bytes are guest memory, and the guest may change them at any time: what is checked has to be
    a copy (`read`, `structure`) and not a view.
    """

    __slots__ = ()

    def read(self, length: int | None = None, *, limit: int = MOST_COPIED) -> bytes:
        """Copies the next `length` bytes, or all that are left, if those are not more than `limit`.

        How many are left is the driver's choice, up to 4 GiB: a device that can do with more than
        1 MiB says so, or takes `views`. Raises `RequestTooShort` when there are fewer than
        `length`, `RequestTooLong` when more than `limit` are left, and takes none then.
        """
        if length is None and self.remaining > limit:
            raise RequestTooLong(
                f"{self.remaining} {self._kind} bytes where {limit} are the most",
                queue=self._queue,
                head=self._head,
            )
        views = self._take(length)
        return bytes(views[0]) if len(views) == 1 else b"".join(views)

    def structure(self, kind: type[S]) -> S:
        """A copy of the next bytes as a ctypes structure. Raises `RequestTooShort`."""
        return kind.from_buffer_copy(self.read(ctypes.sizeof(kind)))

    def views(self, length: int | None = None) -> list[memoryview]:
        """Read-only views of the next `length` bytes, or of all that are left; nothing is copied.

        They are what writev(2) and pwritev(2) take. Raises `RequestTooShort`.
        """
        return [view.toreadonly() for view in self._take(length)]

    def to_file(self, fd: int, length: int | None = None, *, offset: int | None = None) -> None:
        """Writes the next `length` bytes, or all that are left, to a file; nothing is copied.

        At `offset` in bytes where it is given, else at the file's position. Returns when all is
        written. Raises `RequestTooShort`, and `OSError` when the file does not take it all.
        """
        views: Sequence[memoryview] = self._take(length)
        while views:
            part = views[:IOV_MAX]
            done = os.writev(fd, part) if offset is None else os.pwritev(fd, part, offset)
            views = _behind(views, done)
            if offset is not None:
                offset += done

    def to_stream(self, fd: int, length: int | None = None) -> int:
        """Writes as many of the next bytes as a pipe, socket or terminal takes now.

        All that are left, or `length` of them at the most. Returns how many; the position goes
        behind these. Raises `RequestTooShort`, and `OSError` when none could be written,
        `BlockingIOError` among them for a descriptor that takes nothing now.
        """
        done = os.writev(fd, self._look(length)[0][:IOV_MAX])
        self._take(done)
        return done


class Writer(_Cursor):
    """The device-writable bytes of a request, from front to back.

    What was written is what the driver is told: `written` bytes from the start.
    """

    __slots__ = ("_tail",)

    def __init__(self, views: Sequence[memoryview], queue: str, head: int, kind: str) -> None:
        super().__init__(views, queue, head, kind)
        self._tail: Writer | None = None

    def write(self, data: Buffer) -> None:
        """Copies `data` to the next bytes. Raises `RequestTooShort`, and writes nothing then."""
        start = 0
        for view in self._take(len(data)):
            end = start + len(view)
            view[:] = data if len(view) == len(data) else data[start:end]
            start = end

    def structure(self, value: ctypes.Structure) -> None:
        """Copies a ctypes structure to the next bytes. Raises `RequestTooShort`."""
        self.write(bytes(value))

    def zeros(self, length: int | None = None) -> None:
        """Writes `length` zero bytes, or as many as there is room for."""
        blank(self._take(length))

    def views(self, length: int | None = None) -> list[memoryview]:
        """Views of the next `length` bytes, or of all that are left, for the caller to fill.

        They are what readv(2) and preadv(2) take, and count as written. Raises `RequestTooShort`.
        """
        return self._take(length)

    def from_file(self, fd: int, length: int | None = None, *, offset: int | None = None) -> int:
        """Reads up to `length` bytes, or as many as there is room for, from a file.

        They come straight into the buffers, from `offset` in bytes where it is given, else from the
        file's position. Returns how many bytes came: fewer at the end of the file, or when a pipe,
        socket or terminal has no more now. The position goes behind these. Raises
        `RequestTooShort`, and `OSError` when nothing could be read.
        """
        wanted: Sequence[memoryview] = self._look(length)[0]
        count = 0
        while wanted:
            part = wanted[:IOV_MAX]
            try:
                done = os.readv(fd, part) if offset is None else os.preadv(fd, part, offset + count)
            except BlockingIOError:
                if not count:
                    raise
                break
            count += done
            wanted = _behind(wanted, done)
            if not done or (wanted and offset is None):
                break  # the end, or all that there is now
        self._take(count)
        return count

    def split_tail(self, length: int) -> Writer:
        """Takes the last `length` bytes off this writer, as one of their own.

        For what stands at the end of a request, as a block device's status byte does, however much
        comes before it. Once something is written there, all bytes count as written. Raises
        `RequestTooShort`.
        """
        views = self._ahead()
        if not 0 <= length <= self.remaining:
            raise self._too_short(length)
        if self._tail is not None:
            raise UsageError("the tail is split off already")
        keep = self.remaining - length
        self._tail = Writer(cut(views, self._offset + keep), self._queue, self._head, self._kind)
        self._views = cut(views, self._offset, self._offset + keep)
        self._offset = 0
        self.remaining = keep
        return self._tail

    @property
    def written(self) -> int:
        """Bytes from the first one on that the driver may look at."""
        tail = self._tail
        if tail is not None and tail.position:
            return self.position + self.remaining + tail.position
        return self.position

    def _drop(self) -> None:
        super()._drop()
        if self._tail is not None:
            self._tail._drop()


class Request:
    """One request of the driver, from when the device takes it until `complete`.

    `reader` and `writer` go over its bytes. `queue` is the index of the queue that it came through.
    """

    __slots__ = ("_done", "chain", "completed", "queue", "reader", "serial", "writer")

    def __init__(
        self,
        chain: Chain,
        queue: int,
        name: str,
        serial: int,
        done: Callable[[Request], None],
    ) -> None:
        self.chain = chain
        """The buffers themselves, as the ring gave them."""
        self.queue = queue
        self.serial = serial
        """Requests taken from the queue up to this one."""
        self.reader = Reader(chain.readable, name, chain.head, "readable")
        self.writer = Writer(chain.writable, name, chain.head, "writable")
        self.completed = False
        self._done = done

    def complete(self, written: int | None = None) -> None:
        """Gives the request back to the driver, from whatever thread, at once or much later.

        The driver is told of `written` bytes, by default those that the writer wrote. After a reset
        this does nothing. Raises `UsageError` when it is completed already, or for more bytes than
        the driver has given.
        """
        if self.completed:
            raise UsageError(f"{self!r} is completed already")
        if written is None:
            written = self.writer.written
        elif not 0 <= written <= self.chain.writable_size:
            raise UsageError(f"{written} bytes written of {self.chain.writable_size}")
        self.completed = True
        self.chain.written = written
        self._done(self)

    def drop(self) -> None:
        """The queue is gone: the buffers are the driver's, and nothing may touch them any more."""
        self.reader._drop()
        self.writer._drop()

    def __repr__(self) -> str:
        return (
            f"<Request queue={self.queue} head={self.chain.head}"
            f" readable={self.chain.readable_size} writable={self.chain.writable_size}>"
        )


def blank(views: Sequence[memoryview]) -> None:
    """Fills views with zeros, however long they are."""
    for view in views:
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]


def _behind(views: Sequence[memoryview], length: int) -> Sequence[memoryview]:
    """The views without their first `length` bytes."""
    index = 0
    while index < len(views) and length >= len(views[index]):
        length -= len(views[index])
        index += 1
    rest = list(views[index:])
    if length:
        rest[0] = rest[0][length:]
    return rest
