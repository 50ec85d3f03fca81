"""What virtio's register transports have in common, whichever bus they are on: `mmio` and `pci`.

A `RegisterTransport` keeps what a driver writes before it takes effect (feature words, selectors,
each queue's size and addresses) and turns it into calls of `vq.device.Device`. The two buses lay
the same registers out differently, and tell of interrupts differently.

Whatever a guest reads or writes, nothing raises. A driver that breaks a rule which the device can
judge (features, status, where a queue lies) gets a device that needs a reset, as over any other
transport. An access that means nothing (a width that no register has, a place where none is, a
write to what is read-only or must not be written now) has no effect and reads as 0; the reason is
counted in the device's `stats`, under ``register_ignored: ...``.

One thread at a time: a machine with several processors, or a device with work of its own, takes a
lock around accesses and the device alike. Interrupts are raised from within an access, or from
within whatever the device does; whoever hears of them may access registers at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable

from vq.abi import NO_VECTOR, Feature, Interrupt
from vq.device import Device, check_made
from vq.errors import UsageError
from vq.log_limit import limited_logger

__all__ = ["QueueRegisters", "RegisterBlock", "RegisterTransport", "ignore_access"]

log = limited_logger(__name__)

_WORD = 0xFFFF_FFFF
_QUEUE = int(Interrupt.QUEUE)  # a flag's own arithmetic is slow
_CONFIG = int(Interrupt.CONFIG)
_FEATURE_WORDS = 4
"""Words of features that a driver can write: no version of virtio has bits beyond 127."""


def ignore_access(stats: Counter[str], reason: str, *place: int) -> int:
    """Counts an access that means nothing, by reason; returns 0, which it reads as.

    `place` are numbers for the log.
    """
    stats[f"register_ignored: {reason}"] += 1
    log.debug("access ignored: %s %s", reason, place)
    return 0


class RegisterBlock(ABC):
    """A range of `length` bytes of registers, accessed in 1, 2, 4 or 8 bytes, little-endian.

    8 bytes are two accesses of 4, the lower first: no register is wider (virtio 1.3, 4.1.3.1), and
    where a bus or a processor splits them the guest gets the same. `stats` counts what is ignored.
    """

    def __init__(self, length: int, stats: Counter[str]) -> None:
        self.length = length
        self.stats = stats

    def read(self, offset: int, size: int) -> int:
        """What the guest reads: `size` bytes, `offset` bytes from the block's start."""
        if size == 8:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        if size not in (1, 2, 4):
            return ignore_access(self.stats, "width", offset, size)
        if not 0 <= offset <= self.length - size:
            return ignore_access(self.stats, "no such register", offset, size)
        return self._load(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes the lowest `size` bytes of `value`, `offset` bytes from the start."""
        if size == 8:
            self.write(offset, 4, value)
            self.write(offset + 4, 4, value >> 32)
        elif size not in (1, 2, 4):
            ignore_access(self.stats, "width", offset, size)
        elif not 0 <= offset <= self.length - size:
            ignore_access(self.stats, "no such register", offset, size)
        else:
            self._store(offset, size, value & (1 << 8 * size) - 1)

    @abstractmethod
    def _load(self, offset: int, size: int) -> int:
        """A read inside the block, of 1, 2 or 4 bytes."""

    @abstractmethod
    def _store(self, offset: int, size: int, value: int) -> None:
        """A write inside the block, of 1, 2 or 4 bytes; `value` has no more."""


class QueueRegisters:
    """What a driver has written about one queue; the device learns of it when it is enabled."""

    __slots__ = ("addresses", "index", "max_size", "size", "vector")

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """As after a reset of the device or of the queue (virtio 1.3, 2.6.1)."""
        self.size = self.max_size
        self.addresses = [0] * 6  # of the three areas, in halves of 32 bits, the lower first
        self.vector = NO_VECTOR

    def address(self, area: int) -> int:
        """Where an area lies: 0 for the descriptors, 1 for the driver's, 2 for the device's."""
        return self.addresses[2 * area] | self.addresses[2 * area + 1] << 32


class RegisterTransport:
    """A device's registers, without their layout.

    The device is this transport's from here on: its notifications come here. `interrupt` hears of
    every change of the level-triggered interrupt line: True when it is raised. Raises `UsageError`
    when the device has no guest memory, or is none.
    """

    def __init__(self, device: Device, interrupt: Callable[[bool], None] | None = None) -> None:
        check_made(device)
        if device.memory is None:
            raise UsageError("a device needs its guest's memory before it has registers")
        self.device = device
        self.interrupt = interrupt
        self.line = False
        """Whether the interrupt line is raised."""
        self.events = 0
        """What happened that the driver has not acknowledged: bits of `Interrupt`."""
        self.queues = [
            QueueRegisters(index, device.queue_max_size(index))
            for index in range(device.queue_count)
        ]
        self.queue_select = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        device.on_queue_call = self._queue_used
        device.on_config_change = self._config_changed

    def close(self) -> None:
        """Resets the device and lets go of it. Closing twice is allowed."""
        self.write_status(0)
        self.device.on_queue_call = None
        self.device.on_config_change = None

    # --- interrupts -------------------------------------------------------------------------------

    def _queue_used(self, index: int) -> None:
        """A used buffer notification."""
        self._set_events(self.events | _QUEUE)

    def _config_changed(self) -> None:
        """A configuration change notification."""
        self._set_events(self.events | _CONFIG)

    def _set_events(self, events: int) -> None:
        self.events = events
        self._update_line()

    def _update_line(self) -> None:
        level = self._line_level()
        if level != self.line:
            self.line = level
            if self.interrupt is not None:
                self.interrupt(level)

    def _line_level(self) -> bool:
        """What the line has to be."""
        return bool(self.events)

    # --- features and status ----------------------------------------------------------------------

    def _offered_word(self) -> int:
        return self.device.device_features >> 32 * self.device_feature_select & _WORD

    def _accepted_word(self) -> int:
        return self.device.driver_features >> 32 * self.driver_feature_select & _WORD

    def _accept_word(self, value: int) -> None:
        """The driver accepts 32 features. What was not offered the device judges (2.2.2)."""
        if self.driver_feature_select >= _FEATURE_WORDS:
            ignore_access(self.device.stats, "features beyond the last", value)
            return
        shift = 32 * self.driver_feature_select
        kept = self.device.driver_features & ~(_WORD << shift)
        self.device.accept_features(kept | value << shift)

    def write_status(self, value: int) -> None:
        """The driver writes the status field; 0 resets the device and these registers."""
        self.device.write_status(value)
        if not value:
            self._reset_registers()

    def _reset_registers(self) -> None:
        self.queue_select = self.device_feature_select = self.driver_feature_select = 0
        for queue in self.queues:
            queue.reset()
        self._set_events(0)

    # --- queues -----------------------------------------------------------------------------------

    def _selected(self) -> QueueRegisters | None:
        """The queue that is selected; None where there is none."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def _is_enabled(self, queue: QueueRegisters) -> bool:
        """Whether the device has the queue's ring: not when it refused what it was given."""
        return self.device.queues[queue.index].ring is not None

    def _to_configure(self) -> QueueRegisters | None:
        """The selected queue, if its registers may be written now (virtio 1.3, 4.2.2.2)."""
        queue = self._selected()
        if queue is None:
            ignore_access(self.device.stats, "no such queue", self.queue_select)
        elif self._is_enabled(queue):
            ignore_access(self.device.stats, "the queue is enabled", self.queue_select)
        else:
            return queue
        return None

    def _write_queue_size(self, value: int) -> None:
        """Whether it can be the device judges when the queue is enabled."""
        queue = self._to_configure()
        if queue is not None:
            queue.size = value

    def _write_queue_address(self, half: int, value: int) -> None:
        queue = self._to_configure()
        if queue is not None:
            queue.addresses[half] = value

    def _read_enabled(self) -> int:
        queue = self._selected()
        return int(queue is not None and self._is_enabled(queue))

    def _enable_queue(self) -> None:
        queue = self._to_configure()
        if queue is not None:
            self.device.setup_queue(
                queue.index,
                size=queue.size,
                desc=queue.address(0),
                avail=queue.address(1),
                used=queue.address(2),
            )

    def _write_queue_reset(self, value: int) -> None:
        """Resets the selected queue, at once: there is no time when it reads 1 (2.6.1)."""
        queue = self._selected()
        if queue is None:
            ignore_access(self.device.stats, "no such queue", self.queue_select)
        elif value != 1 or not self.device.has_feature(Feature.RING_RESET):
            ignore_access(self.device.stats, "not to be written", value)
        else:
            self.device.reset_queue(queue.index)
            queue.reset()
