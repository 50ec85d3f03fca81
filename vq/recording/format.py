"""The file that a recorded session stands in: a stream of events, written and read one by one.

A recording begins with eight bytes, ``VQREC`` and three that give the version; four bytes of the
header's length, little-endian as everything here; and the header, a JSON object that says what was
recorded (`Header`). The rest are pieces, each of some events: four bytes that tell how long it is
in the file, four how long in truth, and the piece, compressed (RFC 1950) if the two differ. Pieces
are written several times a second: the recording of a process that was killed is good up to then.
An event is

====================  ==========================================================================
``u8 kind``           one of `Kind`
``u32 microseconds``  since the event before
``u32 numbers``       how many numbers follow, and how many strings of bytes
``u32 strings``
``u64 ...``           the numbers
``u32 ...``           the length of each string
bytes                 the strings, one after another
====================  ==========================================================================

Recordings of version 1 have no `Kind.ALARM`, nor what follows it among the causes.

`Kind` says what the numbers and strings of each event are. A sample of bytes that are only compared
is all of up to 256; of more, four bytes of CRC-32 and the first 64. Writing is done by
a thread; the one that records only puts events into its hands.
"""

from __future__ import annotations

import enum
import json
import os
import stat
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from vq.errors import CaptureError, UsageError
from vq.files import create
from vq.system_calls import THREAD_CALLS

__all__ = ["Event", "Header", "Kind", "RecordingReader", "RecordingWriter"]

SYSTEM_CALLS = THREAD_CALLS

MAGIC = b"VQREC"
VERSION = 2
_START = MAGIC + VERSION.to_bytes(3, "little")
_LENGTH = struct.Struct("<I")
_EVENT = struct.Struct("<BIII")
_MOST_IN_EVENT = 1 << 28
"""Bytes of one event at most; no burst of requests comes near."""
_MOST_NUMBERS = 1 << 22
"""Numbers and strings of one event at most; each takes many times its bytes in memory."""
_MOST_IN_HEADER = 1 << 20
_MOST_WAITING = 64 << 20
"""Bytes that wait for the disk at most; then the device waits, too."""
_SECONDS_BETWEEN_FLUSHES = 0.2
_ALL_BITS = (1 << 64) - 1
_PIECE = 1 << 18
"""Bytes of events in a piece, or one event that is longer."""
_MUCH_WAITING = 8 << 20
"""Bytes that wait for the disk when there is no time to compress them."""
_SAMPLE = 8192
_PIECE_HEAD = struct.Struct("<II")


class Kind(enum.IntEnum):
    """What an event is. In brackets its numbers, after a semicolon its strings.

    Below 20 are causes: what the driver or the world did to the device. Up to 39 is what the device
    found when it looked: in the guest's memory, in the link. From 40 on is what the device did.
    """

    MEMORY = 1
    """The guest has this memory [gpa and size of each region]."""
    FEATURES = 2
    """The driver accepts features [the lowest 64 bits, the next 64 bits, and so on]."""
    STATUS = 3
    """The driver writes the status [the value]."""
    CONFIG_READ = 4
    """The driver reads the configuration space [offset, length; what it gets]."""
    CONFIG_WRITE = 5
    """The driver writes it [offset; the bytes]."""
    QUEUE_SETUP = 6
    """A queue is set up [index, size, largest size, desc, avail, used, next_avail, next_used, heads
    to be taken again ...]."""
    QUEUE_RESET = 7
    """The driver resets a queue [index]."""
    QUEUE_STOP = 8
    """The transport stops a queue [index]."""
    KICK = 9
    """The driver kicks [index]."""
    RESET = 10
    """The transport resets the device []."""
    LINK_READABLE = 11
    """Frames wait in a link's port [port]."""
    LINK_WRITABLE = 12
    """A link's port takes frames again [port]."""
    LINK_CHANGED = 13
    """A link came or went [as `LINK_IS`]."""
    HOST = 14
    """The host does something to the device [; the method's name, its arguments as JSON]."""

    TURNS = 15
    """Who runs the device comes back for work that is left after a turn [or does not, 0]."""
    DISABLED_SETUP = 16
    """A queue is set up, but disabled [as `QUEUE_SETUP`]."""
    ALARM = 17
    """An alarm of the device's own rings [its place among those]."""
    OUTSIDE = 18
    """The host does to the device what a recording does not have []. What it led to follows."""
    QUEUE_DROP = 19
    """The transport takes a queue away for good [index]."""

    CHAINS = 20
    """What the device finds available [queue, avail.idx, position of the first, whether they are in
    the ring (else: to be taken again), how often it looked in vain before, how many; for each:
    head, descriptors, tables, buffers (how many of each), for each descriptor its place, addr, len,
    flags, next, for each table its gpa, for each buffer its gpa; the bytes of every table and every
    readable buffer]."""
    WISH = 21
    """What the device finds when it asks whether to call [queue, avail.flags, used_event]."""
    LINK_INPUT = 22
    """Frames come from the link [port; header and bytes of each]."""
    LINK_FULL = 23
    """The link took fewer frames than it was given at last [port]."""
    LINK_IS = 24
    """The link's state [accepts, delivers, whether it is up, its MTU or 0]."""
    LINK_BROKE = 25
    """A link's port fails [port, errno, 0 as frames are written or 1 as they are read]."""

    USED = 40
    """Chains go back to the driver [queue, head and length of each; a sample of the bytes of
    each]."""
    CALL = 41
    """The device calls [queue]."""
    CONFIG_CHANGED = 42
    """The device says that its configuration, or its need of a reset, changed [status]."""
    LINK_OUTPUT = 43
    """Frames go to the link [port, length of each; the net header and a sample of each]."""
    LINK_ASKED = 44
    """The device asks the link [0 for offloads or 1 for ports in use, the value]."""

    ANSWER = 45
    """What the driver reads after it wrote the status; where a queue that was stopped will go on
    [the number]."""
    LATER = 46
    """What follows was completed by a thread, or otherwise outside of the device's callbacks []."""

    END = 63
    """The last event [whether it is for want of room]."""

    @property
    def is_cause(self) -> bool:
        """Whether the device does something because of it."""
        return self < 20

    @property
    def has_cause(self) -> bool:
        """Whether it is found or done while the device is at work."""
        return 20 <= self < Kind.ANSWER


class Event(NamedTuple):
    """One thing that happened."""

    kind: Kind
    seconds: float
    """Since the recording began."""
    numbers: tuple[int, ...]
    strings: tuple[bytes, ...] = ()


@dataclass
class Header:
    """What was recorded."""

    device: str
    """The device's class, as ``module:name``."""
    device_id: int
    queues: list[tuple[str, int]]
    """Name and largest size of each."""
    features: int
    """What the device offers."""
    from_outside: list[str] = field(default_factory=list)
    """Queues whose answers are not the driver's doing alone; see `vq.device.Device`."""
    feature_names: dict[int, str] = field(default_factory=dict)
    """Names of the device type's own features, by bit number."""
    served: list[str] = field(default_factory=list)
    """The words behind ``vq serve`` that made the device, where it was served."""
    link: dict[str, Any] | None = None
    """The link that a network device was plugged into, as `vq.recording.link` has it."""
    began: str = ""
    """When, as ISO 8601 has it."""

    def encode(self) -> bytes:
        """The header as it stands in the file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The opposite; raises `CaptureError`."""
        try:
            fields = json.loads(data)
            fields["queues"] = [(str(name), int(size)) for name, size in fields["queues"]]
            names = fields.get("feature_names", {})
            fields["feature_names"] = {int(bit): name for bit, name in names.items()}
            header = cls(**fields)
            words = [header.device, header.began, *header.from_outside, *header.served]
            words += header.feature_names.values()
            if not all(isinstance(word, str) for word in words):
                raise TypeError("a word that is none")
            if not all(isinstance(number, int) for number in (header.device_id, header.features)):
                raise TypeError("a number that is none")
            if not isinstance(header.link, dict | None):
                raise TypeError("a link that is none")
            return header
        except (
            *(ValueError, TypeError, AttributeError, LookupError),
            *(ArithmeticError, RecursionError),
        ) as error:
            raise CaptureError(f"the recording's header cannot be read: {error!r}") from None


class RecordingWriter:
    """Writes a recording to a new file. One thread at a time may write to it.

    `limit` is how many bytes of events are kept at most, before they are compressed. When that is
    reached, and when the file cannot be written any more, `ended` says why, and nothing more is
    taken; the recording up to there is good. A recording that is there makes way. Raises
    `UsageError` for any other file, and `OSError` when it cannot be made.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Header, *, limit: int = 256 << 20
    ) -> None:
        self.ended: str | None = None
        self.causes = 0
        """How many there were so far."""
        self.owed: Kind | None = None
        """The event, without numbers, that is to stand in front of the next that `has_cause`."""
        self._limit = limit
        self._written = 0
        self._stored = 0  # by the thread: each of the two counts for itself
        self._events: deque[bytes] = deque()
        self._last = self._now = time.monotonic()
        self._stop = threading.Event()
        self._closed = False
        # All that the guest says is in it: that is for its owner's eyes.
        _check_place(path)
        self._file = create(path, mode=0o600, buffering=-1)
        described = header.encode()
        self._file.write(_START + _LENGTH.pack(len(described)) + described)
        self._file.flush()
        # It is started by the first event: who records may confine itself before there is one.
        self._thread: threading.Thread | None = None

    def write(self, kind: Kind, numbers: Sequence[int], strings: Sequence[bytes] = ()) -> None:
        """Takes an event. Nothing is raised: what goes wrong with the file is in `ended`."""
        if self.owed is not None and kind.has_cause:
            owed, self.owed = self.owed, None
            self.write(owed, ())
        if self.ended is not None:
            return
        now = time.monotonic()
        passed = int(1e6 * (now - self._last))
        self._last += 1e-6 * passed
        head = _EVENT.pack(kind, min(passed, 0xFFFFFFFF), len(numbers), len(strings))
        try:
            parts = [head, _quads(len(numbers)).pack(*numbers)]
        except struct.error:  # a driver called with what no register holds
            parts = [head, _quads(len(numbers)).pack(*(number & _ALL_BITS for number in numbers))]
        if strings:
            parts.append(_longs(len(strings)).pack(*map(len, strings)))
            parts.extend(strings)
        event = b"".join(parts)
        self._written += len(event)
        if self._written > self._limit and kind is not Kind.END:
            self.write(Kind.END, [1])
            self.ended = f"it has reached {self._limit >> 20} MiB"
            return
        self.causes += kind.is_cause
        self._events.append(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vq recording", daemon=True)
            self._thread.start()
        while self._written - self._stored > _MOST_WAITING and self.ended is None:
            time.sleep(0.001)

    def close(self) -> None:
        """Writes what is left. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self.write(Kind.END, [0])
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        """The thread: compresses and writes what comes."""
        try:
            with self._file as file:
                while not self._stop.wait(_SECONDS_BETWEEN_FLUSHES) or self._events:
                    if not self._events:
                        continue
                    while self._events:
                        piece = self._take()
                        hurry = self._written - self._stored > _MUCH_WAITING
                        packed = piece if hurry else _compressed(piece)
                        file.write(_PIECE_HEAD.pack(len(packed), len(piece)))
                        file.write(packed)
                        self._stored += len(piece)
                    file.flush()
        except OSError as error:
            self.ended = error.strerror or str(error)
            self._events.clear()

    def _take(self) -> bytes:
        pieces = []
        length = 0
        while self._events and length < _PIECE:
            pieces.append(self._events.popleft())
            length += len(pieces[-1])
        return b"".join(pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RecordingReader:
    """Reads a recording: its `header` at once, its events one by one when it is iterated over.

    `version` is that of its format. `complete` is whether the end was found: a recording that ends
    early is that of a process that was killed, and good up to there. Raises `CaptureError` for a
    file that is no recording or that is damaged, `OSError` when it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.complete = False
        with open(path, "rb") as file:
            self.version = self._read_version(file)
            self.header, self._start = self._read_header(file)

    def _read_version(self, file: BinaryIO) -> int:
        if file.read(len(MAGIC)) != MAGIC:
            raise CaptureError(f"{self.path} is no recording of a device")
        version = int.from_bytes(file.read(3), "little")
        if not 1 <= version <= VERSION:
            raise CaptureError(f"{self.path} is a recording of another version of vq")
        return version

    def _read_header(self, file: BinaryIO) -> tuple[Header, int]:
        length = file.read(_LENGTH.size)
        size = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else 0
        if size > _MOST_IN_HEADER:
            raise CaptureError(f"the recording's header cannot be read: it has {size} bytes")
        described = file.read(size)
        return Header.decode(described), file.tell()

    def __iter__(self) -> Iterator[Event]:
        self.complete = False
        seconds = 0.0
        with open(self.path, "rb") as file:
            file.seek(self._start)
            stream = _Stream(file, self.path)
            while head := stream.take(_EVENT.size):
                kind, passed, numbers, strings = _EVENT.unpack(head)
                seconds += 1e-6 * passed
                event = self._read_event(stream, kind, seconds, numbers, strings)
                if event is None:
                    return
                if event.kind is Kind.END:
                    self.complete = True
                yield event

    def _read_event(
        self, stream: _Stream, kind: int, seconds: float, numbers: int, strings: int
    ) -> Event | None:
        if numbers + strings > _MOST_NUMBERS:
            raise CaptureError(f"{self.path} is damaged: an event of {numbers + strings} parts")
        packed = stream.take(8 * numbers + 4 * strings)
        if len(packed) < 8 * numbers + 4 * strings:
            return None
        lengths = _longs(strings).unpack_from(packed, 8 * numbers)
        if sum(lengths) > _MOST_IN_EVENT:
            raise CaptureError(f"{self.path} is damaged: an event of {sum(lengths)} bytes")
        data = stream.take(sum(lengths))
        if len(data) < sum(lengths):
            return None
        pieces = []
        start = 0
        for length in lengths:
            pieces.append(data[start : start + length])
            start += length
        try:
            name = Kind(kind)
        except ValueError:
            raise CaptureError(f"{self.path} is damaged: no event is a {kind}") from None
        return Event(name, seconds, _quads(numbers).unpack_from(packed), tuple(pieces))


class _Stream:
    """Bytes of a file's pieces, as many as are asked for or as there are."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._have = b""
        self._at = 0

    def take(self, length: int) -> bytes:
        """So many bytes; none where there are not so many any more."""
        have = len(self._have) - self._at
        if have < length:
            pieces = [self._have[self._at :]]
            while have < length:
                pieces.append(self._next_piece())
                if not pieces[-1]:
                    return b""
                have += len(pieces[-1])
            self._have, self._at = b"".join(pieces), 0
        taken = self._have[self._at : self._at + length]
        self._at += length
        return taken

    def _next_piece(self) -> bytes:
        head = self._file.read(_PIECE_HEAD.size)
        if len(head) < _PIECE_HEAD.size:
            return b""
        packed, length = _PIECE_HEAD.unpack(head)
        if not packed <= length <= _MOST_IN_EVENT + _PIECE:
            raise CaptureError(f"{self._name} is damaged: a piece of {length} bytes in {packed}")
        data = self._file.read(packed)
        if len(data) < packed:
            return b""
        if packed == length:
            return data
        unpacker = zlib.decompressobj()
        try:
            piece = unpacker.decompress(data, length)
        except zlib.error as error:
            raise CaptureError(f"{self._name} is damaged: {error}") from None
        if len(piece) < length:
            raise CaptureError(f"{self._name} is damaged: a piece is too short")
        return piece


def _compressed(piece: bytes) -> bytes:
    """The piece, compressed if that makes it shorter; a sample tells whether it may."""
    sample = piece[:_SAMPLE]
    if 10 * len(zlib.compress(sample, 1)) > 9 * len(sample) and len(piece) > _SAMPLE:
        return piece
    packed = zlib.compress(piece, 1)
    return packed if len(packed) < len(piece) else piece


@lru_cache(maxsize=1024)
def _quads(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


@lru_cache(maxsize=1024)
def _longs(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")


def _check_place(path: str | os.PathLike[str]) -> None:
    """Raises `UsageError` where a file would be lost that is no recording."""
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            with open(path, "rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise UsageError(f"{os.fspath(path)} is there already, and is no recording")
