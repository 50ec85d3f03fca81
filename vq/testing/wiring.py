"""A device wired to a scripted driver in one process: by calls, registers or over vhost-user.

    with wire(MyDevice()) as wired:
        wired.driver.probe()
        assert wired.request(0, b"hello", 5) == b"HELLO"

The same driver stands on every wire, so that a test of a device runs over all of them unchanged.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from vq.abi import Status
from vq.device import Device, check_made
from vq.driver import DeviceError, Driver, GuestBuffer, Transport
from vq.errors import UsageError, in_words
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.testing.transports import TRANSPORTS, connect
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_user import Connection, unwatch_device, watch_device

__all__ = ["WIRES", "Wired", "wire"]

MEMORY = ((0x1000, 0x100000), (0x40000000, 0x100000))
"""Where a guest's memory is by default, as ``(gpa, size)``: two regions with a hole between them,
and none at 0."""
WIRES = (*TRANSPORTS, "vhost-user")
"""The ways to wire a driver to a device: those of `vq.testing.transports`, and a socket."""
PATIENCE = 5.0
"""Seconds that a device has for an answer."""


@dataclass
class Wired:
    """A device and the driver in front of it."""

    device: Device
    memory: GuestMemory
    transport: Transport
    """How the driver reaches the device; another driver can stand on it instead of `driver`."""
    driver: Driver
    """Not probed yet: `driver.probe()` brings the device up."""
    via: str
    """One of `WIRES`."""
    loop: Loop
    """What serves the device's own descriptors, and vhost-user's."""
    poll: Callable[[], object] = field(default=lambda: None, repr=False)

    def turn(self, count: int = 8) -> None:
        """Lets everything work that has something to do: the wire, a link's descriptors."""
        for _ in range(count):
            self.loop.run_once(0)
            self.poll()

    def settle(self, timeout: float | None = None) -> bool:
        """Waits until the device has no work under way in threads or coroutines any more.

        False when that takes longer than `timeout` seconds, by default five. What it completed has
        gone back to the driver then, on every wire.
        """
        deadline = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while True:
            self.turn()
            if not self.device.settle(max(0.0, deadline - time.monotonic())):
                return False
            self.turn()  # hands on what came back, and may begin with what waited for that
            if self.device.settle(0):
                return True

    def wait_until(
        self,
        condition: Callable[[], object],
        what: str = "it",
        *,
        timeout: float | None = None,
    ) -> None:
        """Takes turns until `condition` holds.

        Raises `DeviceError` after `timeout` seconds, by default five.
        """
        self._wait_until(condition, lambda time: f"{what} did not happen in {time}", timeout)

    def _wait_until(
        self, condition: Callable[[], object], failure: Callable[[str], str], timeout: float | None
    ) -> None:
        patience = PATIENCE if timeout is None else timeout
        deadline = time.monotonic() + patience
        while True:
            self.turn(2)
            if condition():
                return
            if time.monotonic() > deadline:
                raise DeviceError(failure(f"{patience:g} seconds"))
            self.loop.run_once(0.001)

    def request(
        self,
        queue: int,
        data: bytes = b"",
        room: int = 0,
        *,
        pieces: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Sends one request on the queue of that index, and waits for its answer.

        The device may read `data` and write `room` bytes; both are cut into buffers of `pieces`
        bytes, by default one each. Returns what the device wrote: as many bytes as it says. Where
        the queue is full it waits for room. The other requests that come back meanwhile are
        collected, and forgotten.

        Raises `DeviceError` when there is no answer after `timeout` seconds (by default five) or
        the device needs a reset, and `UsageError` when the driver has not set up that queue.
        """
        driver = self.driver
        if not driver.queues:
            raise UsageError("the driver has set up no queues yet: call driver.probe() first")
        if queue not in driver.queues:
            names = ", ".join(f"{q.index} {q.name}" for q in self.device.queues)
            raise UsageError(f"the driver has no queue {queue}; the device's are {names}")
        start = driver.allocator.allocate(max(1, len(data) + room), align=16)
        self.memory.write(start, data)
        readable = _cut(start, len(data), pieces)
        writable = _cut(start + len(data), room, pieces)
        token = object()
        ring = driver.queues[queue]
        needed = min(len(readable) + len(writable), ring.size)  # more never fits, as `add` says

        def has_room() -> bool:
            self._check_health()
            if ring.num_free < needed:
                ring.collect()
            return ring.num_free >= needed

        if not has_room():
            driver.kick(queue)
            self.wait_until(has_room, f"room on queue {queue}", timeout=timeout)
        ring.add(readable, writable, token)
        driver.kick(queue)
        answer: list[int] = []

        def answered() -> bool:
            self._check_health()
            answer.extend(used.written for used in ring.collect() if used.token is token)
            return bool(answer)

        self._wait_until(answered, lambda time: self._no_answer(queue, time), timeout)
        written = self.memory.read(start + len(data), answer[0])
        driver.allocator.free(start)
        return written

    def _no_answer(self, queue: int, time: str) -> str:
        """That none came in time, and where the request is."""
        ring = self.device.queues[queue].ring
        if held := ring.outstanding if ring is not None else 0:
            where = f"has not completed {held} that it has taken"
        else:
            where = "has taken none"
        return f"no answer on queue {queue} in {time}: of the requests there the device {where}"

    def _check_health(self) -> None:
        if self.transport.status & Status.NEEDS_RESET:
            fault = self.device.fault
            raise DeviceError(f"the device needs a reset: {in_words(fault) if fault else 'why?'}")


@contextmanager
def wire(
    device: Device,
    via: str = "direct",
    *,
    memory: GuestMemory | None = None,
    features: int = -1,
    queue_size: int = 256,
) -> Iterator[Wired]:
    """Wires `device` to a scripted driver by one of `WIRES`.

    `memory` is the guest's, by default two small regions that are gone afterwards. `features` are
    those that the driver wants, a set of bits, by default all that there are; `queue_size` is the
    most that it makes its queues. The device is the caller's, and is reset in the end; it must not
    be in use elsewhere. Raises `UsageError` for a wire that is not known and for what is no device.
    """
    check_made(device)
    if via not in WIRES:
        raise UsageError(f"{via!r} is not a wire; the wires are {', '.join(WIRES)}")
    with ExitStack() as stack:
        if memory is None:
            memory = GuestMemory.allocate(*MEMORY)
            stack.callback(memory.close)
        loop = Loop()
        stack.callback(loop.close)
        watch_device(device, loop)
        stack.callback(unwatch_device, device, loop)
        if via == "vhost-user":
            transport, poll = _vhost_user(device, memory, loop, stack)
        else:
            transport, poll = _in_process(via, device, memory, stack)
        driver = Driver(transport, memory, features, queue_size=queue_size)
        yield Wired(device, memory, transport, driver, via, loop, poll)


def _cut(start: int, length: int, piece: int | None) -> list[GuestBuffer]:
    if not length:
        return []
    step = piece or length
    return [(start + at, min(step, length - at)) for at in range(0, length, step)]


# --- the wires -----------------------------------------------------------------------------------

_Poll = Callable[[], object]


def _nothing() -> None:
    """Where calls come by themselves there is nothing to look for."""


def _in_process(
    via: str, device: Device, memory: GuestMemory, stack: ExitStack
) -> tuple[Transport, _Poll]:
    """The driver calls the device's methods, or reads and writes registers in front of them."""
    before = device.memory
    device.memory = memory

    def let_go() -> None:
        device.reset()
        device.on_queue_call = device.on_config_change = None
        device.memory = before

    stack.callback(let_go)
    return connect(device, via), _nothing


def _vhost_user(
    device: Device, memory: GuestMemory, loop: Loop, stack: ExitStack
) -> tuple[Transport, _Poll]:
    """The device behind a socket, and a frontend at its other end, in turns in this thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(theirs, device, loop, name="wired")
    stack.callback(connection.close)
    sizes = [queue.max_size for queue in device.queues]
    frontend = VhostFrontend(
        ours,
        memory,
        device_id=device.device_id,
        queue_count=device.queue_count,
        queue_size=min(sizes, default=256),
        idle=lambda: loop.run_once(0),
    )
    stack.callback(frontend.close)
    return frontend, frontend.poll
