"""A network device's link in a recording: listened to, and played back.

`describe_link` says what a link was, for the header; a `Listener` has everything that goes through
the ports of a link written down. `RecordedLink` is the same link again in a replay: it gives the
frames that came, when they came, and keeps what the device sends.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vq.link import MAX_FRAME, Frame, Link, Port, Room, scatter
from vq.offload import Offload
from vq.packet import copy_range
from vq.recording.format import Kind, RecordingWriter
from vq.recording.sample import Sample

__all__ = ["Listener", "RecordedLink", "RecordedPort", "SentFrame", "describe_link", "state_of"]


class SentFrame(NamedTuple):
    """A frame that the device gave to the link."""

    header: bytes
    """Its net header."""
    data: Sample

    @classmethod
    def of(cls, frame: Frame) -> SentFrame:
        """Looks at a frame, whose first piece is its net header."""
        return cls(bytes(frame[0]), Sample.of(frame[1:]))


def describe_link(link: Link) -> dict[str, Any]:
    """What a replay needs to know of a link."""
    return {
        "name": link.name,
        "ports": len(link.ports),
        "min_frame": link.min_frame,
        "max_frame": link.max_frame,
        **dict(zip(("accepts", "delivers", "up", "mtu"), state_of(link), strict=True)),
    }


def state_of(link: Link) -> tuple[int, int, int, int]:
    """The numbers of a `Kind.LINK_IS` event."""
    return int(link.accepts), int(link.delivers), int(link.is_up), link.mtu or 0


class Listener:
    """Writes down what goes through one port, and what a link is asked."""

    def __init__(self, link: Link, writer: RecordingWriter) -> None:
        self._link = link
        self._writer = writer
        self._state = state_of(link)

    def look(self) -> None:
        """Writes down what the link is, if that has changed."""
        state = state_of(self._link)
        if state != self._state:
            self._state = state
            self._writer.write(Kind.LINK_IS, state)

    def write_burst(
        self, port: int, write: Callable[[Sequence[Frame]], int], frames: Sequence[Frame]
    ) -> int:
        """`Port.write_burst`, listened to. What is sent is looked at before the link has it."""
        sent = [SentFrame.of(frame) for frame in frames]
        try:
            count = write(frames)
        except OSError as error:
            self._broke(port, error, reading=False)
            raise
        sent = sent[:count]
        self._writer.write(
            Kind.LINK_OUTPUT,
            (port, *(frame.data.length for frame in sent)),
            [frame.header + frame.data.pack() for frame in sent],
        )
        if count < len(frames):
            self._writer.write(Kind.LINK_FULL, [port])
        return count

    def read_burst(
        self, port: int, read: Callable[[Room, int], int], room: Room, limit: int
    ) -> int:
        """`Port.read_burst`, listened to."""
        listening = _ListeningRoom(room)
        broke: OSError | None = None
        try:
            return read(listening, limit)
        except OSError as error:
            broke = error
            raise
        finally:
            if listening.frames:
                self.look()
                self._writer.write(Kind.LINK_INPUT, [port], listening.frames)
            if broke is not None:
                self._broke(port, broke, reading=True)

    def _broke(self, port: int, error: OSError, *, reading: bool) -> None:
        self._writer.write(Kind.LINK_BROKE, (port, error.errno or errno.EIO, int(reading)))

    def ask(self, what: int, ask: Callable[[Any], None], value: Any) -> None:
        """`Link.request_offloads` (0) and `Link.activate_ports` (1), listened to."""
        self._writer.write(Kind.LINK_ASKED, (what, int(value)))
        ask(value)
        self.look()


class _ListeningRoom:
    """Lends another room's views, and keeps a copy of what was read into them."""

    def __init__(self, room: Room) -> None:
        self.frames: list[bytes] = []
        self._room = room
        self._views: Sequence[memoryview] = ()

    def views(self) -> Sequence[memoryview]:
        """See `Room.views`."""
        self._views = self._room.views()
        return self._views

    def commit(self, header: bytes, length: int) -> None:
        """See `Room.commit`."""
        self.frames.append(bytes(header) + copy_range(self._views, 0, length))
        self._room.commit(header, length)


# --- the same once more --------------------------------------------------------------------------


class RecordedPort(Port):
    """Gives the frames that `incoming` holds, and keeps those that are sent in `sent`."""

    def __init__(self) -> None:
        super().__init__()
        self.incoming: deque[tuple[bytes, bytes] | int] = deque()
        """Net header and frame; or the number of an error."""
        self.sent: list[SentFrame] = []
        self.budgets: deque[tuple[int, int]] = deque()
        """How many frames the port takes until it is full for once, or fails with the error of that
        number, which is not 0; how many then, and so on. Without one it takes all."""

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """See `Port.write_burst`."""
        taken = frames
        error = 0
        if self.budgets:
            room, error = self.budgets[0]
            taken = frames[:room]
            if len(taken) < len(frames):
                self.budgets.popleft()
            else:
                self.budgets[0] = room - len(taken), error
                error = 0
        self.sent += map(SentFrame.of, taken)
        if error:
            raise OSError(error, os.strerror(error))
        if self.incoming and self.on_readable is not None:
            self.on_readable()  # a link in one process says so at once
        return len(taken)

    def read_burst(self, room: Room, limit: int) -> int:
        """See `Port.read_burst`."""
        moved = 0
        while moved < limit and self.incoming:
            first = self.incoming[0]
            if isinstance(first, int):
                self.incoming.popleft()
                raise OSError(first, os.strerror(first))
            views = room.views()
            if not views:
                break
            self.incoming.popleft()
            header, data = first
            scatter((data,), views)
            room.commit(header, len(data))
            moved += 1
        return moved


class RecordedLink(Link):
    """The link that a recording was made with, by what its header says of it."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.name = f"recorded {described['name']}"
        self.min_frame = int(described["min_frame"])
        self.max_frame = min(int(described["max_frame"]), MAX_FRAME)
        self.recorded = [RecordedPort() for _ in range(min(int(described["ports"]), 0x8000))]
        self.ports = self.recorded
        self.asked: list[tuple[int, int]] = []
        """What the device asked for since this was last cleared."""
        self.set_state(*(int(described[name]) for name in ("accepts", "delivers", "up", "mtu")))

    def set_state(self, accepts: int, delivers: int, up: int, mtu: int) -> None:
        """Takes the numbers of a `Kind.LINK_IS` event."""
        self.accepts = Offload(accepts)
        self.delivers = Offload(delivers)
        self._up = bool(up)
        self._mtu = mtu

    @property
    def is_up(self) -> bool:
        """As it was."""
        return self._up

    @property
    def mtu(self) -> int | None:
        """As it was."""
        return self._mtu or None

    def request_offloads(self, wanted: Offload) -> None:
        """Notes it; what the link delivers then stands in the recording."""
        self.asked.append((0, int(wanted)))

    def activate_ports(self, count: int) -> None:
        """Notes it."""
        self.asked.append((1, count))

    def close(self) -> None:
        """Nothing is held."""
