"""The authoring interface: a device model from a few declarations and a handler for each queue.

A model derives from `DeviceModel`, says what it is, and handles bursts of requests (`Request`)::

    class Entropy(DeviceModel):
        device_id = DeviceId.ENTROPY

        def __init__(self) -> None:
            super().__init__(queues=[("requests", 64, self.fill)])

        def fill(self, requests: Sequence[Request]) -> None:
            for request in requests:
                request.writer.write(os.urandom(request.writer.remaining))
                request.complete()

A handler completes a request at once, or keeps it and completes it later, or leaves it to a thread
(`DeviceModel.run_in`) or to a coroutine (`DeviceModel.run_async`, or a handler that is one). All
that has been completed when a handler returns goes back in one burst, with one call at the most.

A model calls `has_feature`, `update_config`, `take`, `flush`, `run_in`, `run_async`, `watch` and
`alarm`, and may override `driver_ready`, `config_written`, `buffers_available`, `device_reset` and
`close` (and calls `super().close()` there). All of that is done in one thread, the one of the event
loop that serves the device; others only complete requests.

What goes wrong in a handler, or in work that was left to a thread, makes the device need a reset
(virtio 1.3, 2.1.2): the traceback is in the log, the reason in `fault`, and the process lives.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from vq.abi import feature_mask
from vq.declarations import check_config, check_features, check_queues, field_places
from vq.device import RING_FEATURES, Alarm, Device, Queue, Watch
from vq.errors import UsageError
from vq.log_limit import limited_logger
from vq.memory import GuestMemory
from vq.request import Request, RequestGone
from vq.split_ring import SplitRing

if TYPE_CHECKING:  # they take long to import, and few devices need them
    import asyncio
    from concurrent.futures import Executor, Future

    from vq.asyncio_thread import AsyncioThread

__all__ = ["DeviceModel", "Handler", "QueueSpec"]

log = limited_logger(__name__)

Handler: TypeAlias = Callable[[Sequence[Request]], None]
Work: TypeAlias = Coroutine[Any, Any, None]
AsyncHandler: TypeAlias = Callable[[Request], Work]
QueueSpec: TypeAlias = tuple[str, int, Handler | AsyncHandler | None]
"""``(name, largest size, handler)`` of a queue. The handler is called with every burst of requests;
a coroutine function is called with each of them. Without one, the model takes the requests itself
when it has something to put there (`DeviceModel.take`)."""

BURST = 64
"""Requests that a handler gets at most in one call."""


class DeviceModel(Device):
    """Base of device models that handle requests.

    `queues` has a `QueueSpec` for each queue; sizes are powers of two up to 32768. `features` are
    the bit numbers of the device type's own features that are offered, beside `ring_features`, by
    default all that rings of vq have; `Device.feature_needs` says what each needs,
    `Device.feature_bits` names them.
    `config` is the configuration space: a ctypes structure of little-endian fields, of which the
    driver may write those named in `config_writable`.

    `memory` is the guest's, where that is known already. Raises `UsageError` for what cannot be.
    """

    config_writable: ClassVar[Collection[str]] = ()
    """Fields of the configuration space that the driver may write."""
    drain_seconds: ClassVar[float] = 10.0
    """How long a reset waits for threads that still work on the guest's buffers."""

    def __init__(
        self,
        *,
        queues: Sequence[QueueSpec],
        features: Iterable[int] = (),
        ring_features: int = RING_FEATURES,
        config: ctypes.Structure | None = None,
        memory: GuestMemory | None = None,
    ) -> None:
        check_queues(queues)
        check_config(config)
        super().__init__(
            features=ring_features | feature_mask(check_features(features)),
            queues=[(name, size) for name, size, _ in queues],
            config=config,
            memory=memory,
        )
        self._handlers = [self._as_burst_handler(handler) for _, _, handler in queues]
        self._writable = field_places(config, self.config_writable, "config_writable")
        self._held: list[dict[int, Request]] = [{} for _ in queues]  # taken, by head, oldest first
        self._taken = [0 for _ in queues]  # how many requests were taken from each queue's ring
        self._working: int | None = None  # the thread that works on the queues now
        self._interrupted: list[int] = []  # queues that were kicked in the meantime
        self._asyncio: AsyncioThread | None = None
        # Shared with threads: what they completed, how they failed, what they still work on.
        self._completed: deque[Request] = deque()
        self._failures: deque[BaseException] = deque()
        self._wake_asked = False
        self._running: dict[Request, Callable[[], object]] = {}  # with what cancels the work
        self._ended = threading.Condition()

    # --- for device models ------------------------------------------------------------------------

    def take(self, index: int, limit: int = BURST) -> list[Request]:
        """Takes up to `limit` requests that wait in a queue; none where there are none.

        For queues without a handler, whose buffers wait until the device has something to say.
        """
        queue = self.queues[index]
        ring = self.ready_ring(queue)
        if ring is None or limit < 1:
            return []
        return self._run(queue.name, self._take_or_ask, queue, ring, limit) or []

    def buffers_available(self, queue: Queue) -> None:
        """The driver has kicked a queue without a handler: `take` may have something again."""

    def flush(self) -> None:
        """Gives back at once what was completed outside of handlers. In the device's own thread."""
        if self._working is None:
            self._in_turn(lambda: None)

    def run_in(self, executor: Executor, work: Callable[[Request], None], request: Request) -> None:
        """Lets an executor do the work on a request; the request is complete when it returns.

        `work` may complete the request earlier itself. What it raises makes the device need a
        reset. A reset waits for work that has begun (`drain_seconds`) and cancels the other.
        Raises `UsageError` when `work` is a coroutine function.
        """
        if _makes_coroutines(work):
            raise UsageError(
                f"run_in takes a function, and {_name(work)} makes coroutines: run_async runs one"
            )
        future = executor.submit(work, request)
        self._follow(future, future.cancel, request)

    def run_async(
        self, coroutine: Work, request: Request, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """The same by a coroutine, on an asyncio loop that runs in another thread than the device.

        By default that is a thread of the device's own, which `close` ends. A reset cancels the
        coroutine: threads that it has begun itself (`asyncio.to_thread`) must not have the
        request's buffers, since nobody waits for them. Raises `UsageError` when it is no coroutine,
        but the function that makes one.
        """
        if not isinstance(coroutine, Coroutine):
            raise UsageError(
                f"run_async takes a coroutine, so {_name(coroutine)}(request), not {coroutine!r}"
            )
        from vq.asyncio_thread import AsyncioThread, submit

        if loop is None:
            if self._asyncio is None:
                self._asyncio = AsyncioThread(f"vq-{type(self).__name__}")
            loop = self._asyncio.loop
        self._follow(*submit(coroutine, loop), request)

    def watch(
        self,
        fd: int,
        *,
        readable: Callable[[], None] | None = None,
        writable: Callable[[], None] | None = None,
    ) -> Watch:
        """Has the event loop watch a descriptor, once `Watch.want` says for what.

        The callbacks are treated as handlers are. `unwatch` it before it is closed.
        """

        watch = Watch(
            fd,
            readable=lambda: self._in_turn(readable) if readable is not None else None,
            writable=lambda: self._in_turn(writable) if writable is not None else None,
        )
        self.watches.append(watch)
        if self.on_watches_change is not None:
            self.on_watches_change()
        return watch

    def unwatch(self, watch: Watch) -> None:
        """The event loop forgets a descriptor."""
        watch.want(reading=False, writing=False)
        self.watches.remove(watch)

    def alarm(self, callback: Callable[[], None], *, outside: bool = False) -> Alarm:
        """Has the event loop call back at a point in time, once `Alarm.set` says when.

        The callback is treated as handlers are. `outside` is for alarms that look what the host
        does, and cannot be replayed; see `Alarm`.
        """
        alarm = Alarm(lambda: self._in_turn(callback), outside=outside)
        self.alarms.append(alarm)
        if self.on_watches_change is not None:
            self.on_watches_change()
        return alarm

    def config_written(self, fields: Collection[str]) -> None:
        """The driver has written to these fields of the configuration space."""

    # --- for hosts without an event loop ----------------------------------------------------------

    def settle(self, timeout: float = 10.0) -> bool:
        """Waits until no thread works on a request any more, and gives back what they completed.

        False when that takes longer than `timeout` seconds. With an event loop nobody needs this.
        """
        with self._ended:
            done = self._ended.wait_for(lambda: not self._running, timeout)
        self.flush()
        return done

    # --- Device -----------------------------------------------------------------------------------

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        """Hands one burst of requests to the queue's handler."""
        if self._working is not None:
            # A handler, or the driver that it called, came back here. One thing at a time.
            if queue.index not in self._interrupted:
                self._interrupted.append(queue.index)
            return False
        more = False

        def step() -> None:
            nonlocal more
            handler = self._handlers[queue.index]
            if handler is None:
                self.buffers_available(queue)
                return
            ring.disable_kicks()
            requests = self._take(queue, ring, BURST)
            if requests and (result := handler(requests)) is not None:
                _refuse_coroutine(f"the handler of {queue.name}", result)
            more = bool(requests) or self.rest(queue, ring)

        self._in_turn(step, queue.name)
        return more

    def write_config(self, offset: int, data: bytes) -> None:
        """Writes what belongs to fields that the driver may write; the rest is counted, no more."""
        written: list[str] = []
        taken = 0
        for name, (start, end) in self._writable.items():
            first, last = max(start, offset), min(end, offset + len(data))
            if first < last:
                view = memoryview(cast(ctypes.Structure, self.config)).cast("B")
                view[first:last] = data[first - offset : last - offset]
                written.append(name)
                taken += last - first
        if taken < len(data):
            self.stats["config_writes_ignored"] += 1
        if written:
            self._in_turn(lambda: self.config_written(written))

    def queue_stopping(self, queue: Queue) -> None:
        """Waits for the work that threads do, and puts back what the model still holds.

        That is handed out again when the queue goes on, perhaps to another device.
        """
        self._drain(queue)
        self.flush()
        held, ring = self._held[queue.index], queue.ring
        if ring is None:
            return
        last: list[Request] = []  # those after which nothing was taken
        for request in reversed(held.values()):
            if request.serial != self._taken[queue.index] - len(last):
                break
            last.insert(0, request)
        ring.undo_pop([request.chain for request in last])
        self._let_go(queue)
        queue.unfinished = list(held)[: len(held) - len(last)]
        held.clear()

    def queue_dropped(self, queue: Queue) -> None:
        """Takes all requests of the queue away from whoever still has them."""
        self._drain(queue)
        self._let_go(queue)
        self._held[queue.index].clear()

    def close(self) -> None:
        """Ends the device's own thread, if there is one."""
        if self._asyncio is not None:
            self._asyncio.close()
            self._asyncio = None

    # --- inside -----------------------------------------------------------------------------------

    def _as_burst_handler(
        self, handler: Handler | AsyncHandler | None
    ) -> Callable[[Sequence[Request]], object] | None:
        if not _makes_coroutines(handler):
            return cast("Handler | None", handler)

        def start(requests: Sequence[Request]) -> None:
            for request in requests:
                self.run_async(cast("AsyncHandler", handler)(request), request)

        return start

    def _in_turn(self, step: Callable[[], None], what: str = "a callback") -> None:
        """Does one thing, then gives back what was completed, then sees to what was kicked then."""
        if self._working is not None:
            step()
            return
        self._working = threading.get_ident()
        try:
            self._run(what, step)
            self._collect()
        finally:
            self._working = None
        while self._interrupted:
            self.notify(self._interrupted.pop(0))

    def _take(self, queue: Queue, ring: SplitRing, limit: int) -> list[Request]:
        requests = []
        held = self._held[queue.index]
        for chain in ring.pop_burst(limit):
            self._taken[queue.index] += 1
            request = Request(
                chain, queue.index, queue.name, self._taken[queue.index], self._request_done
            )
            held[chain.head] = request
            requests.append(request)
        return requests

    def _take_or_ask(self, queue: Queue, ring: SplitRing, limit: int) -> list[Request]:
        """Takes what there is; where there is nothing, the driver kicks when there is."""
        ring.disable_kicks()
        while not (requests := self._take(queue, ring, limit)) and ring.enable_kicks():
            pass
        return requests

    def _request_done(self, request: Request) -> None:
        """`Request.complete`, in whatever thread."""
        self._completed.append(request)
        if threading.get_ident() != self._working:
            self._wake()

    def _wake(self) -> None:
        """Has what threads have completed collected soon, in the device's own thread.

        Without an event loop it waits for the next kick, or for `settle`.
        """
        if self.on_call_soon is not None and not self._wake_asked:
            self._wake_asked = True
            self.on_call_soon(self.flush)

    def _collect(self) -> None:
        """Gives completed requests back to the driver, in bursts; takes up failures."""
        self._wake_asked = False  # first: what comes from now on asks again
        while self._completed or self._failures:
            finished: dict[int, list[Request]] = {}
            while self._completed:
                request = self._completed.popleft()
                held = self._held[request.queue]
                if held.get(request.chain.head) is request:  # else a reset took it away
                    del held[request.chain.head]
                    finished.setdefault(request.queue, []).append(request)
            for index, requests in finished.items():
                queue = self.queues[index]
                if queue.ring is not None:
                    queue.ring.write_used_burst([request.chain for request in requests])
                    self.publish(queue)
            while self._failures:
                self._run("work on a request", _raise, self._failures.popleft())

    def _follow(self, future: Future[None], cancel: Callable[[], object], request: Request) -> None:
        """Sees to the end of work that was left to others."""
        with self._ended:
            self._running[request] = cancel
        future.add_done_callback(lambda done: self._work_ended(done, request))

    def _work_ended(self, future: Future[None], request: Request) -> None:
        """In whatever thread."""
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            try:
                _refuse_coroutine("the work in an executor", future.result())
            except UsageError as misuse:
                error = misuse
        if error is not None and not isinstance(error, RequestGone):
            self._failures.append(error)
            self._wake()
        elif not future.cancelled() and not request.completed:
            request.complete()
        with self._ended:
            self._running.pop(request, None)
            self._ended.notify_all()

    def _drain(self, queue: Queue) -> None:
        """Waits until no thread touches the buffers of a queue's requests."""

        def running() -> list[Request]:
            return [request for request in self._running if request.queue == queue.index]

        with self._ended:
            cancels = [self._running[request] for request in running()]
        for cancel in cancels:
            cancel()
        with self._ended:
            if not self._ended.wait_for(lambda: not running(), self.drain_seconds):
                log.error(
                    "%s: requests are still worked on %g seconds after the queue was stopped",
                    queue.name,
                    self.drain_seconds,
                )

    def _let_go(self, queue: Queue) -> None:
        """The buffers of all requests are the driver's again."""
        for request in self._held[queue.index].values():
            request.drop()


def _makes_coroutines(function: object) -> bool:
    from inspect import iscoroutinefunction

    return iscoroutinefunction(function)


def _name(function: object) -> str:
    return getattr(function, "__name__", repr(function))


def _raise(error: BaseException) -> None:
    raise error


def _refuse_coroutine(what: str, result: object) -> None:
    """A coroutine that nobody awaits does nothing, and its request would be lost."""
    if isinstance(result, Coroutine):
        result.close()
        raise UsageError(f"{what} gives a coroutine, which nobody runs: see DeviceModel.run_async")
