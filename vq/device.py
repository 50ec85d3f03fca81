"""A device model's base: features, status, configuration space, queues and reset. No I/O.

A device model derives from `Device`, says what it is (`device_id`, queues, features, a
configuration structure) and handles its queues in `process`. A transport, or a scripted driver that
calls the same methods directly, stands on the other side: the methods up to `notify` are what a
driver can do to a device, and their names are those of `vq.driver.Transport`.

Nothing that a driver does raises here. A driver that breaks a rule gets a device that needs a reset
(virtio 1.3, 2.1.2) and works again after it; the reason is logged and kept in `fault`.
"""

from __future__ import annotations

import ctypes
import enum
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, ParamSpec, Protocol, TypeVar

from vq.abi import Feature, Status, bits, feature_mask, feature_names
from vq.declarations import check_needs
from vq.errors import DriverError, UsageError, VqError
from vq.log_limit import limited_logger
from vq.memory import GuestMemory
from vq.split_ring import InflightLog, SplitRing

__all__ = [
    "RING_FEATURES",
    "Alarm",
    "Device",
    "Queue",
    "Watch",
    "check_made",
    "with_needs_met",
]

log = limited_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RING_FEATURES = feature_mask(
    (
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.IN_ORDER,
        Feature.RING_RESET,
    )
)
"""What every queue of every vq device can do."""


_DRIVER_OK = int(Status.DRIVER_OK)
LOOK_SECONDS = 0.001
"""How long a call waits for a driver that is likely to look by itself: it is up already."""
_MOST_UNCALLED = 4
"""A queue of which more than the one part in so many was used is not left to that."""
_WORKING_BITS = int(Status.DRIVER_OK | Status.NEEDS_RESET | Status.FAILED)


def with_needs_met(features: int, needs: Mapping[int, int]) -> int:
    """`features` without those that need another one which is not there (virtio 1.3, 2.2.1).

    `needs` gives for a bit number the set of which at least one must be there too.
    """
    while True:
        unmet = feature_mask(bit for bit in bits(features) if not needs.get(bit, ~0) & features)
        if not unmet:
            return features
        features &= ~unmet


def check_made(device: object) -> None:
    """Raises `UsageError` for what cannot be served or driven: no device, or one not made in full.

    Among them are a class in the place of a device, and a model whose `__init__` does not call that
    of its base.
    """
    if isinstance(device, type):
        raise UsageError(f"{device.__name__} is a class: make a device of it, {device.__name__}()")
    if not isinstance(device, Device):
        raise UsageError(f"{device!r} is no device")
    if "queues" not in vars(device):
        raise UsageError(f"{type(device).__name__}.__init__ does not call super().__init__")


class CallWait(enum.Enum):
    """Until when a call waits."""

    NOT = enum.auto()
    LULL = enum.auto()
    """Until there is nothing else to do."""
    LONGER = enum.auto()
    """Until the driver had the time to look by itself."""


class Queue:
    """One virtqueue of a device: what the driver set up, and the ring once it did."""

    def __init__(self, index: int, name: str, max_size: int) -> None:
        self.index = index
        self.name = name
        self.max_size = max_size
        self.ring: SplitRing | None = None
        self.enabled = False
        """Whether the device may work on the ring. With a ring that is not enabled it does what
        `Device.process_disabled` does."""
        self.call = CallWait.NOT
        """Until when a call waits that the driver may still want for what was published."""
        self.waited_longer = 0
        """How often a call waited longer; which of those a timer is for."""
        self.driver_looks_soon = False
        """Whether the driver was called for something else since, and is likely to look here, too.
        """
        self.lent = False
        """Whether another process serves it meanwhile (`Device.lend_queue`)."""
        self.unfinished: Sequence[int] = ()
        """Heads of chains that the device had when the ring was stopped: it gets them again."""


class EventLoop(Protocol):
    """What a device asks of the event loop that calls it. See `vq.loop.Loop`."""

    def call_in_lull(self, callback: Callable[[], None], /) -> None:
        """Calls back once there is nothing more urgent, or that has taken long."""

    def call_later(self, seconds: float, callback: Callable[[], None], /) -> object:
        """Calls back so many seconds from now."""

    def look_out(self, lookout: QueueLookout, /) -> None:
        """Looks at a queue while it is awake, and has it `rest` before it sleeps."""


class QueueLookout:
    """A queue that an event loop looks at while it is awake, instead of being kicked.

    See `vq.loop.Lookout`.
    """

    def __init__(self, device: Device, queue: Queue) -> None:
        self._device = device
        self._queue = queue

    def look(self) -> bool:
        """Whether the driver made buffers available that the device may work on."""
        ring = self._queue.ring
        return (
            ring is not None
            and ring.anything_new()
            and self._device.ready_ring(self._queue) is not None
        )

    def rest(self) -> bool:
        """From now on the driver is to kick. Whether it made buffers available before that."""
        return self._device.want_kicks(self._queue)

    def deal(self) -> None:
        """Works on them."""
        self._device.notify(self._queue.index)


class Watch:
    """A file descriptor that a device wants an event loop to watch for it.

    The device says with `reading` and `writing` what it waits for now and changes that through
    `want`; whoever runs the loop sets `on_change` to hear of it, and calls `readable` or `writable`
    when the descriptor is. Both are cheap and safe to call once too often.
    """

    def __init__(
        self, fd: int, *, readable: Callable[[], None], writable: Callable[[], None]
    ) -> None:
        self.fd = fd
        self.readable = readable
        self.writable = writable
        self.reading = False
        self.writing = False
        self.on_change: Callable[[Watch], None] | None = None

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Changes what the device waits for; None leaves it as it is."""
        before = self.reading, self.writing
        if reading is not None:
            self.reading = reading
        if writing is not None:
            self.writing = writing
        if (self.reading, self.writing) != before and self.on_change is not None:
            self.on_change(self)


class Alarm:
    """A point in time at which a device wants an event loop to call it; as `Watch` for descriptors.

    The device says when through `set`; whoever runs the loop looks at `deadline` (in seconds of
    time.monotonic(), None for never), sets `on_change` to hear of another one, and calls `ring`
    when the time has come.

    An alarm is the device's own, or one of the `outside`: it looks what the host does meanwhile (a
    peer that comes, a link that is back). A session that is recorded has the ringing of the former,
    and a replay rings them where the recording has it; the latter ring by the clock in a replay,
    too.
    """

    def __init__(self, callback: Callable[[], None], *, outside: bool = False) -> None:
        self.outside = outside
        self.deadline: float | None = None
        self.on_change: Callable[[Alarm], None] | None = None
        self._callback = callback

    def set(self, seconds: float | None) -> None:
        """To be called `seconds` from now, instead of what was set before; None for never."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        if self.on_change is not None:
            self.on_change(self)

    def ring(self) -> None:
        """The time has come."""
        self.deadline = None
        self._callback()


class Device(ABC):
    """A device model without its transport.

    `queues` gives each queue's name and its largest size, a power of two up to 32768; `features` is
    the set of bits that the device offers. What `features` names but lacks a feature that it needs
    is not offered. `config` is the configuration space. `memory` is the guest's, where
    that is known already; otherwise the transport sets it.

    `stats` counts what a device of this kind counts, and is kept over resets. `fault` is why the
    device needs a reset, or None.
    """

    device_id: ClassVar[int]
    """Device type (virtio 1.3, 5)."""
    feature_bits: ClassVar[type[enum.IntEnum]] = Feature
    """The names of the features of this device type."""
    feature_needs: ClassVar[Mapping[int, int]] = {}
    """For a feature's bit number, the set of features of which it needs at least one."""

    from_outside: ClassVar[Collection[str]] = ()
    """Names of queues whose answers come from outside, as what arrives at a console does.

    They may have * and ?. Where a recorded session is replayed they are not compared.
    """
    host_methods: ClassVar[Collection[str]] = ()
    """Methods by which the host does something to the device that no driver can do.

    A session that is recorded has their calls, and a replay makes them. Arguments are numbers and
    bytes.
    """
    ring_class: Callable[..., SplitRing] = SplitRing
    """What makes the rings: with a class derived from `SplitRing` one can listen in."""

    on_queue_call: Callable[[int], None] | None = None
    """The transport's: a used-buffer notification for the queue of this index."""
    on_config_change: Callable[[], None] | None = None
    """The transport's: a configuration change notification."""
    on_work_left: Callable[[int], None] | None = None
    """The transport's, if it has other things to do: this queue's turn is over but there is more.

    It calls `notify` again when it has been round. Without it `notify` works until all is done.
    """
    event_loop: EventLoop | None = None
    """The event loop that calls the device, where there is one."""
    on_shared_change: Callable[[], None] | None = None
    """The transport's: what several queues go by is about to change. Queues that were lent have
    come home by the time it returns."""
    on_watches_change: Callable[[], None] | None = None
    """The event loop's: there are new `watches` or `alarms`."""
    on_call_soon: Callable[[Callable[[], None]], None] | None = None
    """The event loop's: does something soon, in the device's thread. Any thread may call it."""

    def __init__(
        self,
        *,
        features: int,
        queues: Sequence[tuple[str, int]],
        config: ctypes.Structure | None = None,
        memory: GuestMemory | None = None,
    ) -> None:
        if not isinstance(getattr(self, "device_id", None), int):
            raise UsageError(
                f"{type(self).__name__} has no device_id: the number of its type (virtio 1.3, 5)"
            )
        check_needs(self.feature_needs, self.feature_bits)
        self._offered = with_needs_met(features, self.feature_needs)
        if not self._offered >> Feature.VERSION_1 & 1:
            raise UsageError("a device offers VERSION_1: legacy drivers are not served")
        self.queues = [Queue(index, name, size) for index, (name, size) in enumerate(queues)]
        self._lookouts = [QueueLookout(self, queue) for queue in self.queues]
        for queue in self.queues:
            if not 1 <= queue.max_size <= 32768 or queue.max_size & (queue.max_size - 1):
                raise UsageError(
                    f"a queue's size is a power of two from 1 to 32768, not {queue.max_size}"
                )
        self.memory = memory
        self.watches: list[Watch] = []
        """The file descriptors that an event loop should watch for the device.

        They may change, see `on_watches_change`. One that leaves the list wants nothing any more,
        and says so through its `on_change` while the descriptor is still open.
        """
        self.alarms: list[Alarm] = []
        """The points in time at which an event loop should call the device; none is taken away."""
        self.config = config
        self.stats: Counter[str] = Counter()
        """What happened since the device was made, by name; a reset does not clear it."""
        self.fault: VqError | Exception | None = None
        """Why the device needs a reset, if it does."""
        self._initial_config = b"" if config is None else bytes(config)
        self._generation = 0
        self._status = 0
        self._driver_features = 0

    # --- what a driver can do -------------------------------------------------------------------

    @property
    def device_features(self) -> int:
        """The features that the device offers."""
        return self._offered

    @property
    def driver_features(self) -> int:
        """The features that the driver accepted; they hold once FEATURES_OK is set."""
        return self._driver_features

    def accept_features(self, features: int) -> None:
        """The driver names the features that it accepts (virtio 1.3, 3.1.1 step 4)."""
        if self._status & Status.FEATURES_OK:
            self._driver_broke(
                DriverError("features accepted after FEATURES_OK", section="3.1.1"),
            )
            return
        self._driver_features = features

    @property
    def status(self) -> int:
        """The device status field (virtio 1.3, 2.1)."""
        return self._status

    def write_status(self, status: int) -> None:
        """The driver writes the status field; 0 resets the device.

        FEATURES_OK stays off when the driver accepted what was not offered, or a feature without
        one that it needs (virtio 1.3, 2.2.2).
        """
        if not status:
            self.reset()
            return
        if self._status & ~Status.NEEDS_RESET & ~status:
            self._driver_broke(DriverError("a status bit was cleared", section="2.1.1"))
            return
        new = status & ~self._status
        if new & Status.FEATURES_OK:
            refusal = self._refusal()
            if refusal:
                log.warning("FEATURES_OK refused: %s", refusal)
                self.stats["features_refused"] += 1
                new &= ~Status.FEATURES_OK
        if new & Status.DRIVER_OK and not (self._status | new) & Status.FEATURES_OK:
            self._driver_broke(DriverError("DRIVER_OK without FEATURES_OK", section="3.1.1"))
            return
        self._status |= int(new) & ~int(Status.NEEDS_RESET)
        if new & Status.FEATURES_OK:
            names = self._names(self._driver_features)
            log.info("%s: negotiated %s", type(self).__name__, ", ".join(names))
            self._run("features_negotiated", self.features_negotiated, self._driver_features)
        if new & Status.DRIVER_OK:
            self._run("driver_ready", self.driver_ready)

    @property
    def config_generation(self) -> int:
        """Changes whenever the configuration space does (virtio 1.3, 2.5)."""
        return self._generation

    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes of the configuration space; zeros beyond its end."""
        data = b"" if self.config is None else bytes(self.config)
        return data[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space. Fields are read-only unless a model
        overrides this; writes to them are counted and have no effect."""
        self.stats["config_writes_ignored"] += 1

    @property
    def queue_count(self) -> int:
        """How many queues the device has."""
        return len(self.queues)

    def queue_max_size(self, index: int) -> int:
        """The largest size of a queue in descriptors; 0 when there is no such queue."""
        return self.queues[index].max_size if 0 <= index < len(self.queues) else 0

    def setup_queue(
        self,
        index: int,
        *,
        size: int,
        desc: int,
        avail: int,
        used: int,
        next_avail: int = 0,
        next_used: int = 0,
        resubmit: Iterable[int] = (),
        inflight_log: InflightLog | None = None,
        enabled: bool = True,
    ) -> None:
        """The driver places a queue's three parts in its memory and enables it.

        `next_avail` and what follows it are for a transport that takes over a queue which an
        earlier device had begun to work on; see `SplitRing`. With `enabled` False the device has
        the ring, but for `process_disabled` only: for transports that know such a state
        (vhost-user's disabled rings). To enable it, it is stopped and set up again.
        """
        try:
            queue = self._queue(index)
            if not self._status & Status.FEATURES_OK:
                raise DriverError(
                    "a queue set up before FEATURES_OK", queue=queue.name, section="3.1.1"
                )
            if queue.ring is not None:
                raise DriverError(
                    "a queue set up again without a reset", queue=queue.name, section="2.6.1"
                )
            if self.memory is None:
                raise UsageError("the device has no guest memory yet")
            if size > queue.max_size:
                raise DriverError(
                    f"a size of {size} where {queue.max_size} is the most",
                    queue=queue.name,
                    section="4.1.4.3.2",
                )
            queue.ring = self.ring_class(
                self.memory,
                size,
                desc,
                avail,
                used,
                features=self._driver_features,
                next_avail=next_avail,
                next_used=next_used,
                resubmit=dict.fromkeys((*resubmit, *queue.unfinished)),
                inflight_log=inflight_log,
                name=queue.name,
            )
        except DriverError as error:
            self._driver_broke(error)
            return
        queue.unfinished = ()
        queue.lent = False
        queue.enabled = enabled
        if enabled:
            self._run("queue_started", self.queue_started, queue)

    def reset_queue(self, index: int) -> None:
        """The driver resets one queue; it may set it up again (virtio 1.3, 2.6.1)."""
        try:
            queue = self._queue(index)
            if not self.has_feature(Feature.RING_RESET):
                raise DriverError(
                    "a queue reset although RING_RESET was not negotiated",
                    queue=queue.name,
                    section="2.6.1",
                )
        except DriverError as error:
            self._driver_broke(error)
            return
        self._drop_ring(queue)

    def notify(self, index: int, /) -> None:
        """A kick: the driver made buffers available in a queue. Spurious kicks do no harm."""
        if not 0 <= index < len(self.queues):
            self.stats["stray_kicks"] += 1
            return
        queue = self.queues[index]
        # Kicks are what a device hears most of, so `ready_ring` and `_run` stand here in line.
        while self._status & _WORKING_BITS == _DRIVER_OK:
            ring = queue.ring
            if ring is None:
                return
            try:
                if not (
                    self.process(queue, ring)
                    if queue.enabled
                    else self.process_disabled(queue, ring)
                ):
                    return
            except Exception as error:
                self._step_failed(queue.name, error)
                return
            if self.on_work_left is not None:
                self.on_work_left(index)
                return

    # --- for transports and hosts ---------------------------------------------------------------

    def reset(self) -> None:
        """Back to the state in which the device was made; statistics are kept."""
        for queue in self.queues:
            self._drop_ring(queue)
        self._status = 0
        self._driver_features = 0
        self.fault = None
        if self.config is not None and bytes(self.config) != self._initial_config:
            ctypes.memmove(
                ctypes.addressof(self.config), self._initial_config, len(self._initial_config)
            )
            self._generation = (self._generation + 1) & 0xFFFFFFFF
        self.stats["resets"] += 1
        self._run("device_reset", self.device_reset)

    def stop_queue(self, index: int) -> int:
        """Takes a queue's ring away; returns the position from which to go on later.

        Chains that the device holds without having begun on them are put back first. For
        transports that stop and restart rings (vhost-user's GET_VRING_BASE). Returns 0 for a queue
        that was not set up.
        """
        queue = self.queues[index]
        if queue.ring is None:
            return 0
        ring = queue.ring
        if queue.enabled:
            self._run("queue_stopping", self.queue_stopping, queue)
        self._make_call(queue)  # if there is one to be made: the next ring knows nothing of it
        next_avail = ring.next_avail
        queue.unfinished = [*queue.unfinished, *ring.left_over]
        queue.ring = None
        queue.enabled = False
        return next_avail

    def drop_queue(self, index: int) -> None:
        """Takes a queue's ring away for good: every chain of it is forgotten.

        For transports where a driver can stop one queue (virtio-mmio's QueueReady); it may set it
        up again, from the start.
        """
        self._drop_ring(self.queues[index])

    def queues_apart(self, processes: int) -> Sequence[Collection[Collection[int]]]:
        """The queues, by index, that up to `processes` - 1 other processes may serve: for each the
        sets of those that have something in common, and so go together or not at all. Queues that
        are in none stay with the process that has all of the device."""
        return ()

    def lend_queue(self, index: int) -> int:
        """`stop_queue` for a queue that another process goes on with. Until it is set up here
        again it counts as in use."""
        self.queues[index].lent = True
        return self.stop_queue(index)

    def take_queue_back(self, index: int, unfinished: Sequence[int]) -> None:
        """A queue that was lent is no other process's any more; `setup_queue` comes next.

        `unfinished` are heads of chains that are to be taken again.
        """
        self.queues[index].unfinished = tuple(unfinished)
        self._run("queue_came_home", self.queue_came_home, self.queues[index])

    def keep_only(self, indices: Collection[int]) -> None:
        """In a process that was forked to serve these queues: forgets all others.

        What the guest has of them is not touched. Statistics begin at nothing.
        """
        for queue in self.queues:
            if queue.index not in indices:
                self._drop_ring(queue)
        self.stats.clear()

    def fail_for(self, error: Exception) -> None:
        """The device needs a reset, for a reason that was found, and logged, elsewhere."""
        self._fail(error)

    def look_again(self) -> None:
        """Another process found something not to be as it should: the model looks what it is."""

    def ready_ring(self, queue: Queue) -> SplitRing | None:
        """The queue's ring if the device may work on it now, else None (virtio 1.3, 2.1.2)."""
        if queue.enabled and self._status & _WORKING_BITS == _DRIVER_OK:
            return queue.ring
        return None

    def holds(self, queue: Queue, ring: SplitRing) -> bool:
        """Whether `ring` is still the device's to work on.

        A driver may act from within any notification: after a reset the memory is its own again.
        """
        return queue.ring is ring and queue.enabled and self._status & _WORKING_BITS == _DRIVER_OK

    def close(self) -> None:
        """Gives back what the device holds of the host's. Closing twice is allowed."""

    def settle(self, timeout: float = 10.0) -> bool:
        """Waits until nobody but the device's own thread works on requests; for tests.

        False when that takes longer than `timeout` seconds. Here all is done in one thread.
        """
        return True

    def has_feature(self, bit: int) -> bool:
        """Whether a feature was negotiated. False before FEATURES_OK."""
        return bool(self._status & Status.FEATURES_OK and self._driver_features >> bit & 1)

    # --- for device models ----------------------------------------------------------------------

    @abstractmethod
    def process(self, queue: Queue, ring: SplitRing) -> bool:
        """Works on a queue whose `ring` may have new chains; returns whether there is more to do.

        A turn is bounded: a burst or a few, so that one queue cannot keep others waiting. A
        `DriverError` that gets out means that the device needs a reset; so does any other error,
        which is logged with its traceback.
        """

    def process_disabled(self, queue: Queue, ring: SplitRing) -> bool:
        """Works on a ring that the device has, but that is disabled; as `process` otherwise.

        vhost-user, "Ring states": "The back-end must process the ring without causing any side
        effects." That can be done with what may get lost, as a network device's frames: they are
        discarded. It cannot with requests, whose answer is all that they are for: a write to a disk
        that is answered and not done is a lie, one that is refused damages a file system, a byte on
        a console or a stream is missed. So here nothing is done: they wait until the ring is
        enabled, and none is lost.
        """
        return False

    def features_negotiated(self, features: int) -> None:
        """FEATURES_OK is set: `features` holds until the next reset."""

    def driver_ready(self) -> None:
        """DRIVER_OK is set."""

    def queue_started(self, queue: Queue) -> None:
        """The queue has a ring now, which is enabled."""

    def queue_stopping(self, queue: Queue) -> None:
        """The queue's ring is about to go, in good order: put back what was not begun on."""

    def queue_dropped(self, queue: Queue) -> None:
        """The queue's ring went away in a reset: forget every chain of it."""

    def queue_came_home(self, queue: Queue) -> None:
        """Another process served the queue: what is known of its part of the host is old."""

    def device_reset(self) -> None:
        """The device was reset: forget what the driver set."""

    def update_config(self, **fields: object) -> None:
        """Changes fields of the configuration space and tells the driver (virtio 1.3, 2.5).

        Raises `UsageError`, and changes nothing, when there is no such field or a value does not
        fit into it.
        """
        if self.config is None:
            raise UsageError("this device has no configuration space")
        for name in fields:
            if not hasattr(self.config, name):
                raise UsageError(f"the configuration space has no {name}")
        changed = type(self.config).from_buffer_copy(self.config)
        for name, value in fields.items():
            _set_field(changed, name, value)
        memoryview(self.config).cast("B")[:] = bytes(changed)
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self._notify_config_change()

    def publish(self, queue: Queue) -> bool:
        """Lets the driver see what was used in a queue, and calls it if it wants to be called.

        Returns whether it was called.
        """
        ring = queue.ring
        return ring is not None and ring.publish() > 0 and self._make_call(queue)

    def publish_without_haste(self, queue: Queue) -> None:
        """`publish` for what no driver waits for: the call, if there is to be one, comes later.

        By then the driver may have looked by itself, as drivers do that were called for something
        else, and wants no call any more.
        """
        if self.event_loop is None:
            self.publish(queue)
        elif queue.ring is not None and queue.ring.publish():
            queue.driver_looks_soon = False
            if queue.call is not CallWait.LULL:
                queue.call = CallWait.LULL
                self.event_loop.call_in_lull(partial(self._call_in_lull, queue))

    def rest(self, queue: Queue, ring: SplitRing) -> bool:
        """Nothing more seems to wait in a queue: somebody is to tell when it does.

        That is the event loop as long as it is awake, then the driver by a kick. True when more
        came meanwhile: then there may be no kick for it. Raises `DriverError` as
        `SplitRing.enable_kicks`.
        """
        if self.event_loop is None or ring.has_left_over:  # a look would not see those
            return ring.enable_kicks()
        self.event_loop.look_out(self._lookouts[queue.index])
        return False

    def want_kicks(self, queue: Queue) -> bool:
        """Has the driver kick a queue that was looked at instead; whether more came meanwhile."""
        ring = self.ready_ring(queue)
        return ring is not None and bool(self._run(queue.name, ring.enable_kicks))

    # --- inside -----------------------------------------------------------------------------------

    def _call_in_lull(self, queue: Queue) -> None:
        """There is nothing else to do: makes a call that waited for that, or lets it wait on."""
        ring = queue.ring
        if queue.call is not CallWait.LULL or ring is None:
            return
        if (
            queue.driver_looks_soon
            and self.event_loop is not None
            and ring.uncalled <= ring.size // _MOST_UNCALLED
        ):
            queue.call = CallWait.LONGER
            queue.waited_longer += 1
            call = partial(self._call_at_last, queue, queue.waited_longer)
            self.event_loop.call_later(LOOK_SECONDS, call)
        else:
            self._make_call(queue)

    def _call_at_last(self, queue: Queue, which: int) -> None:
        """The driver had the time to look by itself, unless another call waits by now."""
        if queue.call is CallWait.LONGER and queue.waited_longer == which:
            self._make_call(queue)

    def _make_call(self, queue: Queue) -> bool:
        """Calls the driver for what was published, if it wants that; whether it was called."""
        queue.call = CallWait.NOT
        ring = queue.ring
        if ring is None or not ring.should_notify() or self.on_queue_call is None:
            return False
        self.on_queue_call(queue.index)
        return True

    def _queue(self, index: int) -> Queue:
        if not 0 <= index < len(self.queues):
            raise DriverError(f"no queue {index}: the device has {len(self.queues)}")
        return self.queues[index]

    def _drop_ring(self, queue: Queue) -> None:
        was_enabled, queue.enabled = queue.enabled, False
        queue.unfinished = ()
        queue.lent = False
        queue.call = CallWait.NOT  # whoever was to make that call may be gone, too
        if queue.ring is not None:
            queue.ring = None
            if was_enabled:
                self._run("queue_dropped", self.queue_dropped, queue)

    def _run(self, what: str, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Lets the device model take a step; None when that failed: the device needs a reset."""
        try:
            return step(*args, **kwargs)
        except Exception as error:
            self._step_failed(what, error)
        return None

    def _step_failed(self, what: str, error: Exception) -> None:
        """The driver's fault or the model's; the device needs a reset. Called where it is caught.

        A fault of ours must not become the death of every other guest's device.
        """
        if isinstance(error, DriverError):
            self._driver_broke(error)
        else:
            log.exception("%s: the device model failed", what)
            self._fail(error)

    def _refusal(self) -> str | None:
        """Why the accepted features cannot be, or None."""
        features = self._driver_features
        surplus = features & ~self._offered
        if surplus:
            return f"{', '.join(self._names(surplus))} were accepted, but not offered"
        if not features >> Feature.VERSION_1 & 1:
            return "VERSION_1 was not accepted"
        unmet = features & ~with_needs_met(features, self.feature_needs)
        if unmet:
            return f"{', '.join(self._names(unmet))} need others that were not accepted"
        return None

    def _names(self, features: int) -> list[str]:
        return feature_names(features, self.feature_bits)

    def _driver_broke(self, error: DriverError) -> None:
        # As text: no error is kept alive by a log record.
        log.warning("driver error: %s; the device rests until its driver resets it", str(error))
        self.stats["driver_errors"] += 1
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        """DEVICE_NEEDS_RESET, with its notification once the driver is up (virtio 1.3, 2.1.2)."""
        self.fault = error
        self._status |= int(Status.NEEDS_RESET)  # first: a driver may reset from within a call
        for queue in self.queues:
            self.publish(queue)  # what was done before the fault is the driver's
        self._notify_config_change()

    def _notify_config_change(self) -> None:
        if self._status & Status.DRIVER_OK and self.on_config_change is not None:
            self.on_config_change()


def _set_field(structure: ctypes.Structure, name: str, value: object) -> None:
    """Sets a field; ctypes itself would cut a number that is too large (`UsageError` here)."""
    try:
        setattr(structure, name, value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{value!r} is no value for {name}: {error}") from None
    if isinstance(value, int) and getattr(structure, name) != value:
        raise UsageError(f"{name} has no room for {value}")
