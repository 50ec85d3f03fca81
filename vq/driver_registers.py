"""What a scripted driver does with registers, whichever bus they are on.

`driver_mmio` and `driver_pci` reach a device through its registers, access by access as Linux' own
drivers do, and are transports for `vq.driver.Driver`. They know of the device nothing but two
functions, `read` and `write`, so that any device can stand behind them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from vq.abi import Interrupt
from vq.driver import DeviceError

__all__ = ["RegisterDriver", "Window", "read_field", "write_field"]


class Window(Protocol):
    """Registers that a driver can access; `size` is 1, 2 or 4 bytes, and values little-endian."""

    def read(self, offset: int, size: int, /) -> int:
        """Reads `size` bytes."""

    def write(self, offset: int, size: int, value: int, /) -> None:
        """Writes `size` bytes."""


def read_field(window: Window, start: int, length: int) -> bytes:
    """`length` bytes of a configuration space, as kernels read a field of this length.

    Fields of 1, 2 and 4 bytes take one access, those of 8 take two; others are arrays of bytes
    (virtio 1.3, 4.1.3.1 and 4.2.2.2).
    """
    width = _width(start, length)
    values = (window.read(start + at, width) for at in range(0, length, width))
    return b"".join(value.to_bytes(width, "little") for value in values)


def write_field(window: Window, start: int, data: bytes) -> None:
    """Writes bytes of a configuration space, likewise."""
    width = _width(start, len(data))
    for at in range(0, len(data), width):
        window.write(start + at, width, int.from_bytes(data[at : at + width], "little"))


def _width(start: int, length: int) -> int:
    width = {2: 2, 4: 4, 8: 4}.get(length, 1)
    return 1 if start % width else width


class RegisterDriver(ABC):
    """A transport's part that hears of interrupts.

    `interrupt` is for the machine's interrupt line: it takes the line's level whenever it changes.
    """

    RESET_SECONDS = 1.0
    """How long a queue may take to reset."""

    def __init__(self) -> None:
        self.on_queue_call: Callable[[int], None] | None = None
        """Installed by the driver: a used buffer notification for the queue with this index."""
        self.on_config_change: Callable[[], None] | None = None
        """Installed by the driver: a configuration change notification."""
        self.active: list[int] = []
        """The queues that were set up since the last reset."""
        self.spurious = 0
        """Interrupts that nobody asked for."""
        self._line = False
        self._handling = False

    def interrupt(self, level: bool) -> None:
        """The interrupt line is raised or lowered; while it is raised its cause is looked for."""
        self._line = level
        if self._handling:
            return
        self._handling = True
        try:
            while self._line:
                events = self._take_events()
                if not events:
                    self.spurious += 1  # looked for once: a line that is stuck stops nobody
                    return
                if events & Interrupt.CONFIG:
                    self._config_changed()
                if events & Interrupt.QUEUE:
                    self._queues_used(self.active)
        finally:
            self._handling = False

    @abstractmethod
    def _take_events(self) -> int:
        """Reads and acknowledges what the device has interrupted for: bits of `Interrupt`."""

    def _config_changed(self) -> None:
        if self.on_config_change is not None:
            self.on_config_change()

    def _queues_used(self, indices: list[int]) -> None:
        for index in tuple(indices):
            if self.on_queue_call is not None:
                self.on_queue_call(index)

    def _await_zero(self, read: Callable[[], int], what: str, section: str) -> None:
        """Waits until something reads 0. Raises `DeviceError` when it takes too long."""
        deadline = time.monotonic() + self.RESET_SECONDS
        while read():
            if time.monotonic() > deadline:
                raise DeviceError(f"{what} does not become 0", section=section)
            time.sleep(0.001)
