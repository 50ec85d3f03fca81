"""A device model under an event loop, with a scripted driver in front: what device tests share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from vq.device import Device
from vq.driver import Driver
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.vhost_user import unwatch_device, watch_device

SECONDS = 20


class DeviceWorld:
    """`device` with guest memory, a loop that watches its descriptors, and a driver that is up.

    The driver wants `features`, all that are offered by default.
    """

    def __init__(self, device: Device, features: int = -1, *, size: int = 8 << 20) -> None:
        self.device = device
        self.memory = device.memory = GuestMemory.allocate(size)
        self.loop = Loop()
        watch_device(device, self.loop)
        self.driver = Driver(device, self.memory, features)
        self.driver.probe()

    # --- the guest --------------------------------------------------------------------------------

    def give(self, queue: int, *sizes: int) -> None:
        """Makes buffers available that the device may write to."""
        for size in sizes:
            gpa = self.driver.allocator.allocate(size)
            self.driver.queues[queue].add((), [(gpa, size)], token=gpa)
        self.driver.kick(queue)

    def send(self, queue: int, *messages: bytes, cut: int = 1 << 20) -> None:
        """Makes messages available to the device, each in buffers of at most `cut` bytes."""
        for data in messages:
            gpa = self.driver.allocator.allocate(len(data))
            self.memory.write(gpa, data)
            pieces = [(gpa + at, min(cut, len(data) - at)) for at in range(0, len(data), cut)]
            self.driver.queues[queue].add(pieces, token=gpa)
        self.driver.kick(queue)

    def received(self, queue: int) -> list[bytes]:
        """What the device has written since the last time, buffer by buffer."""
        found = []
        for used in self.driver.queues[queue].collect():
            found.append(self.memory.read(used.token, used.written))
            self.driver.allocator.free(used.token)
        return found

    def sent(self, queue: int) -> int:
        """How many messages the device has given back since the last time."""
        return len(self.received(queue))

    def in_flight(self, queue: int) -> int:
        self.received(queue)
        return self.driver.queues[queue].in_flight

    # --- time -------------------------------------------------------------------------------------

    def turn(self, times: int = 5) -> None:
        """Lets the loop do what there is to do now."""
        for _ in range(times):
            self.loop.run_once(0)

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come about"
            self.loop.run_once(0.02)

    def ring_alarms(self) -> None:
        """Time passes, as far as the device is concerned."""
        for alarm in self.device.alarms:
            if alarm.deadline is not None:
                alarm.ring()

    def close(self) -> None:
        unwatch_device(self.device, self.loop)
        self.device.close()
        self.loop.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def joined(messages: Sequence[bytes] | deque[bytes]) -> bytes:
    return b"".join(messages)
