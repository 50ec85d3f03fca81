"""Listens to a device while it is served, and writes the session down.

The recorder puts itself in front of the device's methods that a transport calls, has the device
make rings that tell what they find (`vq.recording.ring`), and listens to the ports of the link that
a network device is plugged into. The device itself knows nothing of it.

What the device does while none of that is going on is the doing of a host in ways that are not
recorded: that there was such a thing is (`Kind.OUTSIDE`), so that a replay can say so.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from vq.abi import Status
from vq.device import Alarm, Device, Watch
from vq.link import Link, Port
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.recording.format import Header, Kind, RecordingWriter
from vq.recording.link import Listener, describe_link, state_of
from vq.recording.ring import RecordingRing
from vq.split_ring import SplitRing

__all__ = ["Recorder"]

log = logging.getLogger(__name__)


class Recorder:
    """Records all that happens to `device` into a new file at `path`, until `close`.

    `limit` is how many bytes are recorded at most, before they are compressed; then recording ends,
    and the device goes on. `served` are the words behind ``vq serve`` that made the device, for
    ``vq replay`` to make it again. The device must not be in use yet. Raises `OSError` when the
    file cannot be made.
    """

    def __init__(
        self,
        device: Device,
        path: str | os.PathLike[str],
        *,
        limit: int = 256 << 20,
        served: Sequence[str] = (),
    ) -> None:
        self.device = device
        link = getattr(device, "link", None)
        self._link = link if isinstance(link, Link) else None
        kind = type(device)
        header = Header(
            device=f"{kind.__module__}:{kind.__qualname__}",
            device_id=int(device.device_id),
            queues=[(queue.name, queue.max_size) for queue in device.queues],
            features=device.device_features,
            from_outside=[
                queue.name
                for queue in device.queues
                if any(fnmatch.fnmatch(queue.name, name) for name in device.from_outside)
            ],
            feature_names={int(feature): feature.name for feature in device.feature_bits},
            served=list(served),
            link=None if self._link is None else describe_link(self._link),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._writer = RecordingWriter(path, header, limit=limit)
        self._memory: GuestMemory | None = None
        self._in_turns = False
        self._depth = 0  # of causes: what the device does to itself is no cause
        self._queue = 0  # the one that is being set up
        self._wrapped: list[Watch] = []
        self._alarms: list[Alarm] = []
        self._undo: list[Callable[[], None]] = []
        self._attach()

    @property
    def ended(self) -> str | None:
        """Why recording ended before `close`, if it did."""
        return self._writer.ended

    def close(self) -> None:
        """Lets go of the device, and finishes the file. Closing twice is allowed."""
        self._let_go()
        self._writer.close()

    # --- in front of the device -----------------------------------------------------------------

    def _attach(self) -> None:
        device = self.device
        for name, before in (
            ("accept_features", self._accept_features),
            ("write_status", self._write_status),
            ("read_config", self._read_config),
            ("write_config", self._write_config),
            ("setup_queue", self._setup_queue),
            ("reset_queue", self._reset_queue),
            ("stop_queue", self._stop_queue),
            ("drop_queue", self._drop_queue),
            ("notify", self._notify),
            ("reset", self._reset),
            ("update_config", self._update_config),
        ):
            self._put_before(device, name, before)
        for name in device.host_methods:
            self._put_before(device, name, functools.partial(self._by_host, name))
        self._put_before(device, "_notify_config_change", self._config_changed)
        # A call that is made later would stand in the recording where nothing caused it.
        self._put_before(device, "publish_without_haste", lambda _, queue: device.publish(queue))
        # Likewise buffers that nobody was kicked for.
        self._put_before(device, "rest", lambda _, queue, ring: ring.enable_kicks())
        device.ring_class = self._make_ring
        self._undo.append(lambda: delattr(device, "ring_class"))
        if self._link is not None:
            self._listen(self._link)
        self._listen_to_own()
        self._writer.owed = Kind.OUTSIDE

    def _put_before(self, target: object, name: str, before: Callable[..., Any]) -> None:
        """Has `before` called with the method of that name, and its arguments, in its place."""
        setattr(target, name, functools.partial(before, getattr(target, name)))
        self._undo.append(lambda: delattr(target, name))

    def _let_go(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._writer.owed = None
        for queue in self.device.queues:
            if isinstance(queue.ring, RecordingRing):
                queue.ring.stop_recording()

    def _cause(self, kind: Kind, numbers: Sequence[int], strings: Sequence[bytes] = ()) -> None:
        if self._depth == 0:
            self._check()
            in_turns = self.device.on_work_left is not None
            if in_turns != self._in_turns:
                self._in_turns = in_turns
                self._writer.write(Kind.TURNS, [in_turns])
            self._writer.write(kind, numbers, strings)

    def _check(self) -> None:
        """Lets go of the device when the writer has given up."""
        if self._writer.ended is not None and self._undo:
            log.warning("the session is not recorded any more: %s", self._writer.ended)
            self._let_go()

    def _inside(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the device; what that calls of the device is no cause of its own."""
        self._depth += 1
        if self._depth == 1:
            self._writer.owed = None
        try:
            return step(*args, **kwargs)
        finally:
            self._depth -= 1
            if self._depth == 0 and self._undo:
                self._writer.owed = Kind.OUTSIDE

    def _look_at_memory(self) -> None:
        memory = self.device.memory
        if memory is not self._memory and memory is not None:
            self._memory = memory
            numbers = [value for region in memory.regions for value in (region.gpa, region.size)]
            self._cause(Kind.MEMORY, numbers)

    def _accept_features(self, accept: Callable[[int], None], features: int) -> None:
        words = [features >> shift & (1 << 64) - 1 for shift in range(0, features.bit_length(), 64)]
        self._cause(Kind.FEATURES, words)
        self._inside(accept, features)

    def _write_status(self, write: Callable[[int], None], status: int) -> None:
        self._cause(Kind.STATUS, [status])
        self._inside(write, status)
        self._answer(self.device.status)

    def _answer(self, number: int) -> None:
        if self._depth == 0:
            self._writer.write(Kind.ANSWER, [number])

    def _read_config(self, read: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
        data: bytes = self._inside(read, offset, length)
        self._cause(Kind.CONFIG_READ, (offset, length), [data])
        return data

    def _write_config(self, write: Callable[..., None], offset: int, data: bytes) -> None:
        self._cause(Kind.CONFIG_WRITE, [offset], [bytes(data)])
        self._inside(write, offset, data)

    def _setup_queue(self, setup: Callable[..., None], index: int, **where: Any) -> None:
        self._look_at_memory()
        heads = where["resubmit"] = list(where.get("resubmit", ()))
        self._cause(
            Kind.QUEUE_SETUP if where.get("enabled", True) else Kind.DISABLED_SETUP,
            [
                index,
                where["size"],
                self.device.queue_max_size(index),
                *(where[name] for name in ("desc", "avail", "used")),
                *(where.get(name, 0) for name in ("next_avail", "next_used")),
                *heads,
            ],
        )
        self._queue = index
        self._inside(setup, index, **where)

    def _make_ring(self, *places: Any, **options: Any) -> SplitRing:
        return RecordingRing(self._writer, self._queue, *places, **options)

    def _reset_queue(self, reset: Callable[[int], None], index: int) -> None:
        self._cause(Kind.QUEUE_RESET, [index])
        self._inside(reset, index)

    def _stop_queue(self, stop: Callable[[int], int], index: int) -> int:
        self._cause(Kind.QUEUE_STOP, [index])
        position: int = self._inside(stop, index)
        self._answer(position)
        return position

    def _drop_queue(self, drop: Callable[[int], None], index: int) -> None:
        self._cause(Kind.QUEUE_DROP, [index])
        self._inside(drop, index)

    def _notify(self, notify: Callable[[int], None], index: int) -> None:
        self._cause(Kind.KICK, [index])
        self._inside(notify, index)

    def _reset(self, reset: Callable[[], None]) -> None:
        self._cause(Kind.RESET, [])
        self._memory = None
        self._inside(reset)

    def _by_host(self, name: str, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        args = inspect.signature(method).bind(*args, **named).args
        plain = [arg.hex() if isinstance(arg, bytes) else arg for arg in args]
        self._cause(Kind.HOST, [], [name.encode(), json.dumps(plain).encode()])
        try:
            return self._inside(method, *args)
        finally:
            if self._depth == 0 and self._undo:  # what it completed goes back a little later
                self._writer.owed = Kind.LATER

    def _update_config(self, update: Callable[..., None], **fields: object) -> None:
        self._cause(Kind.OUTSIDE, ())
        self._inside(update, **fields)

    def _config_changed(self, tell: Callable[[], None]) -> None:
        if self.device.status & Status.DRIVER_OK and self.device.on_config_change is not None:
            self._writer.write(Kind.CONFIG_CHANGED, [self.device.status])
        tell()

    # --- the device's own alarms and descriptors ------------------------------------------------

    def _listen_to_own(self) -> None:
        device = self.device
        for watch in device.watches:
            if watch not in self._wrapped:
                for name in ("readable", "writable"):
                    callback = getattr(watch, name)
                    setattr(watch, name, functools.partial(self._by_descriptor, callback))
                    self._undo.append(functools.partial(setattr, watch, name, callback))
        self._listen_to_alarms()
        if isinstance(device, DeviceModel):
            self._put_before(device, "watch", self._watch)
            self._put_before(device, "alarm", self._alarm)
            self._put_before(device, "flush", self._flush)

    def _watch(
        self,
        watch: Callable[..., Watch],
        fd: int,
        **callbacks: Callable[[], None] | None,
    ) -> Watch:
        return watch(
            fd,
            **{
                name: callback and functools.partial(self._by_descriptor, callback)
                for name, callback in callbacks.items()
            },
        )

    def _by_descriptor(self, callback: Callable[[], None]) -> None:
        """What a descriptor says is not recorded, but that it said something is; nor is what the
        host does then by a method that is named for that."""
        if self._depth or not self._undo:
            callback()
            return
        before = self._writer.causes
        self._writer.owed = Kind.OUTSIDE
        callback()
        if self._writer.causes == before:  # it may have made a difference that shows later
            self._writer.owed = None
            self._cause(Kind.OUTSIDE, ())

    def _alarm(self, alarm: Callable[..., Alarm], *args: Any, **options: Any) -> Alarm:
        made = alarm(*args, **options)
        self._listen_to_alarms()
        return made

    def _listen_to_alarms(self) -> None:
        own = [alarm for alarm in self.device.alarms if not alarm.outside]
        for place in range(len(self._alarms), len(own)):
            self._put_before(own[place], "ring", functools.partial(self._ring, place))
        self._alarms = own

    def _ring(self, place: int, ring: Callable[[], None]) -> None:
        self._cause(Kind.ALARM, [place])
        self._inside(ring)

    def _flush(self, flush: Callable[[], None]) -> None:
        self._inside(self._flush_marked, flush)

    def _flush_marked(self, flush: Callable[[], None]) -> None:
        if self._depth == 1:
            self._writer.owed = Kind.LATER
        flush()

    # --- in front of the link -------------------------------------------------------------------

    def _listen(self, link: Link) -> None:
        listener = Listener(link, self._writer)
        for what, name in enumerate(("request_offloads", "activate_ports")):
            self._put_before(link, name, functools.partial(listener.ask, what))
        for index, port in enumerate(link.ports):
            self._put_before(port, "write_burst", functools.partial(listener.write_burst, index))
            self._put_before(port, "read_burst", functools.partial(listener.read_burst, index))
            self._close_short_cuts(port)
            for name, kind in (
                ("on_readable", Kind.LINK_READABLE),
                ("on_writable", Kind.LINK_WRITABLE),
            ):
                self._wrap(port, name, kind, index)
        if link.on_change is not None:
            change = link.on_change

            def changed() -> None:
                self._cause(Kind.LINK_CHANGED, state_of(link))
                self._inside(change)
                self._wrap_watches(link)

            link.on_change = changed
            self._undo.append(lambda: setattr(link, "on_change", change))
        self._wrap_watches(link)

    def _close_short_cuts(self, port: Port) -> None:
        """Frames go through `write_burst`, where they are seen."""
        outbox = getattr(port, "outbox", None)
        if outbox is not None:
            setattr(port, "outbox", None)  # noqa: B010
            self._undo.append(lambda: setattr(port, "outbox", outbox))

    def _wrap_watches(self, link: Link) -> None:
        """The network device has a watch for each port that has a descriptor."""
        ports = {port.fileno(): index for index, port in enumerate(link.ports)}
        for watch in self.device.watches:
            if watch.fd in ports and watch not in self._wrapped:
                self._wrapped.append(watch)
                self._wrap(watch, "readable", Kind.LINK_READABLE, ports[watch.fd])
                self._wrap(watch, "writable", Kind.LINK_WRITABLE, ports[watch.fd])

    def _wrap(self, target: object, name: str, kind: Kind, port: int) -> None:
        """Makes a callback a cause."""
        callback = getattr(target, name)
        if callback is None:
            return

        def called() -> None:
            self._cause(kind, [port])
            self._inside(callback)

        setattr(target, name, called)
        self._undo.append(lambda: setattr(target, name, callback))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
