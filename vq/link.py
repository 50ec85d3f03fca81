"""What a net device is plugged into: the `Link` interface, and links inside one process.

A link has one or more ports (`Port`), one per queue pair that it can serve: the data path. The link
itself holds what its ports share: which offloads it takes and gives, its state, its limits.

Frames cross the boundary in bursts. A frame towards the link is a list of buffers, the first of
them its 12-byte `virtio_net_hdr` (a private copy, already checked), the rest the frame's bytes,
usually views of guest memory that nobody has copied. A frame from the link is read straight into
the views that a `Room` lends, usually guest memory again.

Taps are links too; they live in modules of their own (`tap_linux`, `tap_bsd`).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Protocol, TypeAlias

from vq.gather import IoVectors
from vq.offload import ALL, Offload

__all__ = [
    "MAX_FRAME",
    "MOST_AT_ONCE",
    "MOST_PIECES",
    "SHORT_OF_MEMORY",
    "START_ROOM",
    "Frame",
    "FrameBuffer",
    "Link",
    "LoopbackLink",
    "NullLink",
    "Outbox",
    "PairedLink",
    "Places",
    "PlacesRoom",
    "Port",
    "QueuePort",
    "Room",
    "Tap",
    "link_pair",
    "scatter",
]

FrameBuffer: TypeAlias = bytes | bytearray | memoryview
Frame: TypeAlias = list[FrameBuffer]
"""``[virtio_net_hdr (12 bytes), piece of the frame, ...]``"""

SHORT_OF_MEMORY = frozenset((errno.ENOBUFS, errno.ENOMEM))
"""Errors that pass: the kernel has no memory just now. A link that reports one is not broken."""
MOST_AT_ONCE = 128
"""Frames that are moved together at most, by an outbox or to places lent apart."""
MOST_PIECES = 2048
"""Pieces of memory that frames sent in place lie in at most, all of them together."""
START_ROOM = 128
"""Bytes that an outbox has for each frame's start: all headers, the net header among them."""
MAX_FRAME = 262144
"""The longest frame in bytes that any link carries: no guest makes vq hold more than this."""


class Room(Protocol):
    """Where frames that come from a link are put; lent by the device for one burst."""

    def views(self) -> Sequence[memoryview]:
        """Writable views with room for the largest frame that may come, first byte first.

        Empty when there is no such room now: then the link keeps its frame.
        """

    def commit(self, header: bytes, length: int) -> None:
        """A frame of `length` bytes now stands in the views; `header` is its 12-byte net header.

        The views are not the link's any more: it asks for new ones for the next frame.
        """


class PlacesRoom(Room, Protocol):
    """A room that also lends places by address; a link need not make use of that.

    Places are host-virtual addresses and lengths in bytes. They stay mapped until the room is asked
    for something else. Net headers go into them too, with num_buffers 0.
    """

    looks_at: int
    """How many bytes of a frame's start `commit_apart` is to see, net header included. Every place
    has that many."""

    def lend_apart(self, limit: int) -> Places | None:
        """A place each for up to `limit` frames, but `MOST_AT_ONCE` at most.

        A frame may be longer than its place: the link keeps it for `commit_private`. None when
        frames have to be dealt with one by one.
        """

    def commit_apart(self, lengths: array[int], starts: memoryview) -> bool:
        """Frames stand in the first places that were lent, each of so many bytes, header included.

        `starts` is a private copy of what stands first in each place, `looks_at` bytes, one behind
        another. When the answer is true it was made complete, and the link puts it back into the
        places.
        """

    def commit_private(self, frame: Frame) -> None:
        """A frame that the link has in memory of its own; the places are lent no more."""

    def lend_together(self, longest: int) -> tuple[IoVectors, int, int] | None:
        """Places that the next frame fills one after another, with room for one of `longest` bytes
        and a byte more: vectors, the number of the first of them, and how many they are.

        None when it has to be read into `views`.
        """

    def lend_alone(self) -> Sequence[memoryview]:
        """The same for a frame that probably is short and comes alone, of any length: views, which
        take less to read into than vectors. Empty where none were prepared."""

    def commit_alone(self, length: int) -> None:
        """`commit_together` for what was read into those views."""

    def commit_together(self, length: int) -> None:
        """A frame stands there, of so many bytes, header included."""


Places: TypeAlias = tuple["array[int]", "array[int]"]
"""Addresses ("Q"), and lengths in bytes ("I")."""


class Outbox(Protocol):
    """A port's ways to send many frames at a time, by their addresses.

    Short frames are copied, looked at, and sent: in Python to look at each in its place costs more
    than to copy it. Others are sent in place, all but their starts: those are copied into `starts`,
    looked at, and sent from there.
    """

    most_bytes: int
    """What `take` takes at a time, net headers included; frames are at most `MOST_AT_ONCE`."""
    starts: memoryview
    """Private memory for the starts of frames that are sent in place: `MOST_AT_ONCE` times
    `START_ROOM` bytes."""
    starts_address: int
    """Where `starts` lies, host-virtual."""

    def take(self, addresses: array[int], lengths: array[int], total: int) -> memoryview:
        """Makes a private copy of frames with their net headers, `total` bytes in all.

        Addresses are "Q", lengths "I". Returns the first four bytes of each header in the copy: a
        view of format "I", with as many words as there are frames. Raises `OSError` when that
        memory cannot be read.
        """

    def send(self, lengths: array[int]) -> int:
        """Sends what was taken; returns how many frames it dealt with, as `Port.write_burst` does.

        Their headers leave nothing undone, and no frame is too short.
        """

    def take_alike(self, vectors: bytes, count: int, length: int) -> memoryview:
        """`take` for `count` frames of the same `length`; `vectors` are as many `struct iovec`."""

    def send_alike(self, count: int, length: int) -> int:
        """`send` for what `take_alike` took."""

    def send_in_place(self, vectors: array[int], counts: Sequence[int]) -> int:
        """Sends frames out of the memory that they lie in; returns how many it dealt with, as
        `Port.write_burst` does.

        `vectors` has two items for each piece ("Q"), its address (host-virtual) and its length in
        bytes, one frame's behind the other's, and `counts` says how many pieces each frame has: at
        most `MOST_AT_ONCE` frames, of `MOST_PIECES` pieces in all. A frame begins with its net
        header, which was checked and is private, and is neither too short nor longer than
        `MAX_FRAME`. Nothing of that memory is looked at after the call. Raises `OSError` when the
        link is gone.
        """


class Port(ABC):
    """One queue of a link."""

    on_readable: Callable[[], None] | None = None
    """Called by a port without a file descriptor when frames start to wait in it."""
    on_writable: Callable[[], None] | None = None
    """Likewise when it takes frames again after it refused some."""
    burst = 64
    """Frames that are best read at a time, now: where they are long, fewer than that."""
    none_waits_inside: ClassVar[bool] = False
    """Whether the descriptor stays readable for as long as there is a frame: then one may stop to
    read before there is none. A port that keeps frames in this process must be read to the end."""
    outbox: Outbox | None = None

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        """Frames given up by this port, by reason."""

    def fileno(self) -> int | None:
        """The descriptor to poll for reading and writing; None for a port inside this process."""
        return None

    def was_used_elsewhere(self) -> None:
        """Another process used the port: what was remembered of the last use is not so any more."""

    @abstractmethod
    def write_burst(self, frames: Sequence[Frame]) -> int:
        """Takes frames, first to last; returns how many of them it has dealt with.

        A frame that can never be sent (too short, too long, refused for good) is dropped, counted
        in `dropped` and counts as dealt with. Fewer than given means that the port is full: the
        caller keeps the rest and comes back when the port is writable.

        Raises `OSError` when the link is gone or broken.
        """

    @abstractmethod
    def read_burst(self, room: Room, limit: int) -> int:
        """Moves up to `limit` waiting frames into `room`; returns how many it moved.

        Stops early when no frame waits or `room` has no place for the largest frame.

        Raises `OSError` when the link is gone or broken.
        """


class Link(ABC):
    """What the ports of one link share."""

    name: str
    ports: Sequence[Port]
    accepts: Offload
    """Which offloads frames written to the link may leave to it; without CSUM none at all."""
    delivers: Offload
    """Which offloads frames read from the link may carry now."""
    ports_are_apart: bool = False
    """Whether the ports share nothing, so that several processes can use one each."""
    min_frame: int = 0
    """Frames shorter than this cannot be written, in bytes, net header not counted."""
    max_frame: int = MAX_FRAME
    """The largest frame that a read may give, in bytes, net header not counted."""
    on_change: Callable[[], None] | None = None
    """Called by the link when `is_up` or a port's `fileno` has become another, or when it can be
    used again after it broke: then it does not know any more what was asked of it.

    It may come in the middle of a burst. A descriptor that goes is still open then, so that whoever
    polls it can stop before its number means something else.
    """

    def request_offloads(self, wanted: Offload) -> None:
        """Asks the link to deliver frames with at most these offloads left undone.

        The link may do so later, or only in part: `delivers` says what holds now, and the caller
        finishes in software what comes all the same.
        """

    def activate_ports(self, count: int) -> None:
        """Uses the first `count` ports only; the others neither take nor give frames."""

    def serve_apart(self, ports: Collection[int], on_truncated: Callable[[], None]) -> None:
        """In a process that was forked to use these ports: lets go of what it has of the others.

        `on_truncated` is called when a frame was longer than expected.
        """

    def look_again(self) -> None:
        """A frame was longer than expected, in another process: looks how long they may be now."""

    def recover(self) -> None:
        """A port broke: looks whether the link can be used again, and calls `on_change` if so.

        It is called again and again, and does not wait. Raises `OSError` when there is something to
        be used, but not for us.
        """

    def forget_waiting(self) -> int:
        """The guest is gone, or begins anew: frames that wait for it in this process are dropped.

        They are not the next guest's to see. What waits in the host's network stays. Returns how
        many frames that were.
        """
        return 0

    @property
    def is_up(self) -> bool:
        """Whether the link has a carrier."""
        return True

    @property
    def mtu(self) -> int | None:
        """The largest IP packet in bytes that the link carries, None where it has no such limit."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Gives back everything that the link holds. Closing twice is allowed."""


class Tap(Link):
    """A link into the host's network, whose settings may be another process's to make.

    Frames go through the ports' descriptors, which takes no privileges once they are open. What
    stands here is for whoever holds the ports alone (`vq.privsep`).
    """

    port_ioctls: ClassVar[tuple[int, ...]] = ()
    """The ioctls that are made for ports, without privileges."""
    control_ioctls: ClassVar[tuple[int, ...]] = ()
    """Those that all other settings take."""

    @property
    def is_gone(self) -> bool:
        """Whether the interface was deleted."""
        return False

    def attach_again(self) -> bool:
        """Takes another interface of the same name, where there is one, in place of one that is
        gone; whether it did. Its settings are those of a new one.

        The ports' descriptors stay what they are, here and in other processes. Raises `OSError`
        and `UsageError` when there is such an interface, but not for us. Not every system's taps
        can be used again.
        """
        return False

    def was_attached_again(self) -> None:
        """Another process did that: takes note of how the ports are now."""

    @abstractmethod
    def expect(self, delivers: Offload, mtu: int | None) -> None:
        """Takes note of what holds for the interface by now: sets `delivers` and `max_frame`.

        Nothing is asked of the kernel.
        """

    def keep_control(self) -> None:
        """The ports are another process's from now on: gives back what only they need.

        After this everything works but what moves frames.
        """

    @abstractmethod
    def leave_control(self, on_truncated: Callable[[], None]) -> None:
        """The settings are another process's from now on: gives back what only they need.

        `on_truncated` is called when a frame was longer than expected. After this only the ports,
        `activate_ports`, `expect` and `close` work.
        """


def scatter(pieces: Sequence[FrameBuffer], views: Sequence[memoryview]) -> None:
    """Copies the pieces' bytes, one after another, into the views, which have room for them."""
    targets = iter(views)
    target = memoryview(b"")
    for piece in pieces:
        source = memoryview(piece)
        while len(source):
            if not len(target):
                target = next(targets)
                continue
            count = min(len(source), len(target))
            target[:count] = source[:count]
            source, target = source[count:], target[count:]


# --- links inside this process -------------------------------------------------------------------


class QueuePort(Port):
    """A port whose frames wait in this process, copied out of the sender's memory.

    What is written to it comes out of its `peer`, which may be the port itself. It takes no more
    frames while `limit` of them wait there.
    """

    def __init__(self, *, limit: int = 1024) -> None:
        super().__init__()
        self.peer: QueuePort = self
        self.limit = limit
        self._waiting: deque[tuple[bytes, bytes]] = deque()
        self._was_full = False

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """See `Port.write_burst`."""
        peer = self.peer
        taken = frames[: peer.limit - len(peer._waiting)]
        for frame in taken:
            if sum(map(len, frame)) > len(frame[0]) + MAX_FRAME:
                self.dropped["too long"] += 1
            else:
                peer._waiting.append((bytes(frame[0]), b"".join(frame[1:])))
        if len(taken) < len(frames):
            peer._was_full = True
        if peer._waiting and peer.on_readable is not None:
            peer.on_readable()
        return len(taken)

    def read_burst(self, room: Room, limit: int) -> int:
        """See `Port.read_burst`."""
        waiting = self._waiting
        moved = 0
        while moved < limit and waiting:
            views = room.views()
            if not views:
                break
            header, data = waiting.popleft()
            if len(data) <= len(views[0]):
                views[0][: len(data)] = data
            else:
                scatter((data,), views)
            room.commit(header, len(data))
            moved += 1
        if moved:
            self._has_room()
        return moved

    def forget_waiting(self) -> int:
        """Drops the frames that wait to be read here; returns how many."""
        count = len(self._waiting)
        if count:
            self._waiting.clear()
            self._has_room()
        return count

    def _has_room(self) -> None:
        if self._was_full:
            self._was_full = False
            if self.peer.on_writable is not None:
                self.peer.on_writable()


class _QueueLink(Link):
    """A link of queue ports. Nothing needs to be done on the way: both ends know offloads."""

    accepts = ALL
    delivers = ALL
    max_frame = MAX_FRAME

    def __init__(self, name: str, ports: Sequence[QueuePort]) -> None:
        self.name = name
        self.ports = ports

    def forget_waiting(self) -> int:
        """See `Link.forget_waiting`. Who could not send before may do so again."""
        return sum(port.forget_waiting() for port in self.ports if isinstance(port, QueuePort))

    def close(self) -> None:
        """Frames that still wait are dropped."""
        for port in self.ports:
            if isinstance(port, QueuePort):
                port._waiting.clear()


class LoopbackLink(_QueueLink):
    """Frames come back through the port that they were written to."""

    def __init__(self, *, ports: int = 1, limit: int = 1024) -> None:
        super().__init__("loopback", [QueuePort(limit=limit) for _ in range(ports)])


class PairedLink(_QueueLink):
    """One end of a cable; see `link_pair`."""


def link_pair(*, ports: int = 1, limit: int = 1024) -> tuple[PairedLink, PairedLink]:
    """Both ends of a cable: what goes into a port of one comes out of the same port of the other.

    With a device plugged into each end, two guests talk to each other.
    """
    left = [QueuePort(limit=limit) for _ in range(ports)]
    right = [QueuePort(limit=limit) for _ in range(ports)]
    for one, other in zip(left, right, strict=True):
        one.peer, other.peer = other, one
    return PairedLink("pair:0", left), PairedLink("pair:1", right)


class NullLink(Link):
    """Takes every frame and gives none."""

    name = "null"
    accepts = ALL
    delivers = Offload.NONE

    def __init__(self, *, ports: int = 1) -> None:
        self.ports = [_NullPort() for _ in range(ports)]

    def close(self) -> None:
        """Nothing is held."""


class _NullPort(Port):
    def write_burst(self, frames: Sequence[Frame]) -> int:
        return len(frames)

    def read_burst(self, room: Room, limit: int) -> int:
        return 0
