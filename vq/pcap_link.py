"""Captures as links: a link that plays a capture file, and a recorder around any other link.

`PcapLink` is plugged in where no network is: the guest receives what a file holds, and what it
sends goes into another. `CaptureLink` leaves a link as it is and keeps a copy of all frames. The
files' formats are `vq.pcap`'s business.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from vq.abi import NET_HDR_SIZE
from vq.errors import CaptureError, UsageError
from vq.link import Frame, FrameBuffer, Link, Port, Room, scatter
from vq.log_limit import limited_logger
from vq.offload import Offload
from vq.packet import copy_range
from vq.pcap import (
    MAX_FRAME_BYTES,
    CapturedFrame,
    CaptureWriter,
    PcapngWriter,
    open_writer,
    read_frames,
)
from vq.software import PLAIN_HEADER

__all__ = ["CaptureLink", "PcapLink"]

log = limited_logger(__name__)

_ETHERNET_HEADER = 14


class PcapLink(Link):
    """One port that gives the frames of a capture, as fast as there is room for them.

    Each frame of the file `source` comes once, whatever its time and direction; after the last one
    there are no more. What is written goes into a new file `target`, as pcapng when its name ends
    in ``.pcapng`` and as pcap else; without `target` it is dropped in silence. The link takes no
    offloads, so that the frames that are kept are finished.

    Raises `CaptureError` when `source` is not a capture, `UsageError` when both are the same file,
    and `OSError` where a file cannot be opened.
    """

    accepts = Offload.NONE
    delivers = Offload.NONE

    def __init__(
        self, source: str | os.PathLike[str], target: str | os.PathLike[str] | None = None
    ) -> None:
        self.name = f"pcap:{os.fspath(source)}"
        self._port = _PcapPort(self.name, source, target)
        self.ports = (self._port,)

    def close(self) -> None:
        """Writes what is left and closes both files."""
        self._port.close()


class _PcapPort(Port):
    """Counted in `dropped`: ``cut short`` and ``runt`` for frames that the capture does not hold
    whole or that are none, ``too long``, and ``not written`` when `target` takes no more."""

    def __init__(
        self,
        name: str,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        self._name = name
        self._frames: Iterator[CapturedFrame] = read_frames(source)
        self._next = next(self._frames, None)
        if target is not None and os.path.exists(target) and os.path.samefile(source, target):
            raise UsageError(f"{os.fspath(source)} cannot be read and written at once")
        self._writer = None if target is None else open_writer(target)
        self._complained = False

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """See `Port.write_burst`. A file that cannot be written loses frames and nothing else."""
        writer = self._writer
        if writer is None:
            return len(frames)
        for frame in frames:
            if sum(map(len, frame)) - NET_HDR_SIZE > MAX_FRAME_BYTES:
                self.dropped["too long"] += 1
                continue
            try:
                writer.write(frame[1:], inbound=False)
            except OSError as error:
                self._not_written(error)
        try:
            writer.flush()
        except OSError as error:
            self._not_written(error)
        return len(frames)

    def read_burst(self, room: Room, limit: int) -> int:
        """See `Port.read_burst`. A capture that turns out to be damaged ends there."""
        moved = 0
        while moved < limit and self._next is not None:
            data = self._next.data
            if self._next.length > len(data):
                self.dropped["cut short"] += 1
            elif len(data) < _ETHERNET_HEADER:
                self.dropped["runt"] += 1
            else:
                views = room.views()
                if not views:
                    break
                if len(data) > len(views[0]) and len(data) > sum(map(len, views)):
                    self.dropped["too long"] += 1
                else:
                    scatter((data,), views)
                    room.commit(PLAIN_HEADER, len(data))
                    moved += 1
            self._advance()
        return moved

    def close(self) -> None:
        self._next = None
        self._frames = iter(())
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._not_written(error)

    def _advance(self) -> None:
        try:
            self._next = next(self._frames, None)
        except (CaptureError, OSError) as error:
            log.error("%s: no more frames from here on: %s", self._name, error)
            self._next = None

    def _not_written(self, error: OSError) -> None:
        self.dropped["not written"] += 1
        if not self._complained:
            self._complained = True
            log.error("%s: frames cannot be written: %s", self._name, error)


class CaptureLink(Link):
    """Another link, with a record of the frames that go over it in both directions.

    `target` is the path of a new pcapng file, or a writer, which is the caller's to close. Frames
    that come from the link count as inbound, those that the guest sends as outbound. They are kept
    as they are on the link: with offloads, checksums may hold only the pseudo-header's sum and
    frames may be longer than the MTU. A frame from the guest is recorded once the link has dealt
    with it, so frames that wait for the link, or were dropped before it, are not there.

    When the record cannot be written (a full disk), that is logged and the recording ends. The
    traffic goes on.

    Raises `OSError` when the file cannot be made; `link` is the caller's then, later it is closed
    with this one.
    """

    def __init__(self, link: Link, target: str | os.PathLike[str] | CaptureWriter) -> None:
        self._link = link
        self._recorder = _Recorder(link.name, target)
        self.ports = tuple(_CapturePort(port, self._recorder) for port in link.ports)
        link.on_change = self._changed

    # These may change while the link is in use.

    @property
    def name(self) -> str:  # type: ignore[override]
        """The link's own name."""
        return self._link.name

    @property
    def accepts(self) -> Offload:  # type: ignore[override]
        """As the link says."""
        return self._link.accepts

    @property
    def delivers(self) -> Offload:  # type: ignore[override]
        """As the link says."""
        return self._link.delivers

    @property
    def min_frame(self) -> int:  # type: ignore[override]
        """As the link says."""
        return self._link.min_frame

    @property
    def max_frame(self) -> int:  # type: ignore[override]
        """As the link says."""
        return self._link.max_frame

    @property
    def is_up(self) -> bool:
        """Whether the link has a carrier."""
        return self._link.is_up

    @property
    def mtu(self) -> int | None:
        """As the link says."""
        return self._link.mtu

    def request_offloads(self, wanted: Offload) -> None:
        """Asks the link."""
        self._link.request_offloads(wanted)

    def activate_ports(self, count: int) -> None:
        """Tells the link."""
        self._link.activate_ports(count)

    def recover(self) -> None:
        """Tells the link."""
        self._link.recover()

    def forget_waiting(self) -> int:
        """Tells the link."""
        return self._link.forget_waiting()

    def close(self) -> None:
        """Closes the link, and the record if this made it."""
        self._link.close()
        self._recorder.close()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


class _CapturePort(Port):
    """A port whose frames are recorded as they pass."""

    def __init__(self, port: Port, recorder: _Recorder) -> None:
        super().__init__()
        self.dropped = port.dropped
        self._port = port
        self._recorder = recorder
        self._room = _RecordedRoom(recorder)
        port.on_readable = self._readable
        port.on_writable = self._writable

    def fileno(self) -> int | None:
        return self._port.fileno()

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """See `Port.write_burst`."""
        count = self._port.write_burst(frames)
        if self._recorder.running:
            for frame in frames[:count]:
                self._recorder.record(frame[1:], inbound=False)
            self._recorder.flush()
        return count

    def read_burst(self, room: Room, limit: int) -> int:
        """See `Port.read_burst`."""
        if not self._recorder.running:
            return self._port.read_burst(room, limit)
        self._room.room = room
        try:
            return self._port.read_burst(self._room, limit)
        finally:
            self._recorder.flush()

    def _readable(self) -> None:
        if self.on_readable is not None:
            self.on_readable()

    def _writable(self) -> None:
        if self.on_writable is not None:
            self.on_writable()


class _RecordedRoom:
    """Lends another room's views, and records what was read into them."""

    room: Room

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._views: Sequence[memoryview] = ()

    def views(self) -> Sequence[memoryview]:
        """See `Room.views`."""
        self._views = self.room.views()
        return self._views

    def commit(self, header: bytes, length: int) -> None:
        """See `Room.commit`."""
        self._recorder.record((copy_range(self._views, 0, length),), inbound=True)
        self.room.commit(header, length)


class _Recorder:
    """A writer that has failed once is let go; from then on nothing is recorded."""

    def __init__(self, name: str, target: str | os.PathLike[str] | CaptureWriter) -> None:
        self.running = True
        self._name = name
        self._owned = not isinstance(target, CaptureWriter)
        if isinstance(target, CaptureWriter):
            self._writer = target
        else:
            self._writer = PcapngWriter(target, interfaces=(name,))

    def record(self, pieces: Sequence[FrameBuffer], *, inbound: bool) -> None:
        if not self.running:
            return
        length = sum(map(len, pieces))
        if length > MAX_FRAME_BYTES:  # the start of it: no frame ends the recording
            pieces = (copy_range(pieces, 0, MAX_FRAME_BYTES),)
        try:
            self._writer.write(pieces, length=length, inbound=inbound)
        except (OSError, UsageError) as error:
            self._stop(error)

    def flush(self) -> None:
        """What has happened is in the file before anything else happens."""
        if self.running:
            try:
                self._writer.flush()
            except OSError as error:
                self._stop(error)

    def close(self) -> None:
        if self.running:
            self.running = False
            try:
                if self._owned:
                    self._writer.close()
                else:
                    self._writer.flush()
            except OSError as error:
                log.error("%s: the end of the record is lost: %s", self._name, error)

    def _stop(self, error: Exception) -> None:
        log.error("%s: frames are not recorded any more: %s", self._name, error)
        self.running = False
        if self._owned:
            with contextlib.suppress(OSError):
                self._writer.close()
