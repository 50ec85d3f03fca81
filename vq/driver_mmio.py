"""The scripted driver's way to a device over virtio-mmio (virtio 1.3, 4.2).

Registers are accessed in the order of Linux' virtio_mmio driver, in 32 bits each.
"""

from __future__ import annotations

from vq.abi import MMIO_CONFIG, MMIO_MAGIC, MMIO_VERSION
from vq.abi import MmioRegister as R
from vq.driver import DeviceError
from vq.driver_registers import RegisterDriver, Window, read_field, write_field

__all__ = ["MmioTransport"]

_WORD = 0xFFFF_FFFF
_MAX_QUEUES = 1 << 16


class MmioTransport(RegisterDriver):
    """A transport for `vq.driver.Driver` over a block of virtio-mmio registers.

    Its `interrupt` is to be called with the level of the device's interrupt line. Raises
    `DeviceError` when there is no device of version 2 behind `window`.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self._queue_count: int | None = None
        magic, version = self._read(R.MAGIC_VALUE), self._read(R.VERSION)
        if magic != MMIO_MAGIC or version != MMIO_VERSION:
            raise DeviceError(
                f"no virtio-mmio device: magic {magic:#x}, version {version}", section="4.2.2.2"
            )
        self.device_id = self._read(R.DEVICE_ID)
        """The device's type (virtio 1.3, 5)."""
        if not self.device_id:
            raise DeviceError("there is no device behind these registers", section="4.2.2.2")
        self.vendor_id = self._read(R.VENDOR_ID)
        """VendorID, whatever it means."""

    def _read(self, register: int) -> int:
        return self.window.read(int(register), 4)

    def _write(self, register: int, value: int) -> None:
        self.window.write(int(register), 4, value)

    # --- features, status, configuration ----------------------------------------------------------

    @property
    def device_features(self) -> int:
        """The features that the device offers."""
        features = 0
        for word in (1, 0):
            self._write(R.DEVICE_FEATURES_SEL, word)
            features |= self._read(R.DEVICE_FEATURES) << 32 * word
        return features

    def accept_features(self, mask: int, /) -> None:
        """Writes the driver's set."""
        for word in (1, 0):
            self._write(R.DRIVER_FEATURES_SEL, word)
            self._write(R.DRIVER_FEATURES, mask >> 32 * word & _WORD)

    @property
    def status(self) -> int:
        """The device status field."""
        return self._read(R.STATUS) & 0xFF

    def write_status(self, value: int, /) -> None:
        """Writes the device status field; 0 resets the device."""
        self._write(R.STATUS, value)
        if not value:
            self.active.clear()

    @property
    def config_generation(self) -> int:
        """Changes whenever the configuration space may have changed."""
        return self._read(R.CONFIG_GENERATION)

    def read_config(self, offset: int, length: int, /) -> bytes:
        """Reads bytes of the configuration space, as one field."""
        return read_field(self.window, MMIO_CONFIG + offset, length)

    def write_config(self, offset: int, data: bytes, /) -> None:
        """Writes bytes of the configuration space, as one field."""
        write_field(self.window, MMIO_CONFIG + offset, data)

    # --- queues -----------------------------------------------------------------------------------

    @property
    def queue_count(self) -> int:
        """How many queues the device has: no register says, so they are counted from 0 on."""
        if self._queue_count is None:
            count = 0
            while count < _MAX_QUEUES and self._select(count):
                count += 1
            self._queue_count = count
        return self._queue_count

    def queue_max_size(self, index: int, /) -> int:
        """The largest size that a queue may have; 0 where there is none, or it is in use."""
        self._write(R.QUEUE_SEL, index)
        return 0 if self._read(R.QUEUE_READY) else self._read(R.QUEUE_SIZE_MAX)

    def _select(self, index: int) -> int:
        """Selects a queue, which may be in use; returns the largest size that it may have."""
        self._write(R.QUEUE_SEL, index)
        return self._read(R.QUEUE_SIZE_MAX)

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        """Tells the device where a queue's parts are, and enables the queue."""
        self._write(R.QUEUE_SEL, index)
        self._write(R.QUEUE_SIZE, size)
        for low, high, gpa in (
            (R.QUEUE_DESC_LOW, R.QUEUE_DESC_HIGH, desc),
            (R.QUEUE_DRIVER_LOW, R.QUEUE_DRIVER_HIGH, avail),
            (R.QUEUE_DEVICE_LOW, R.QUEUE_DEVICE_HIGH, used),
        ):
            self._write(low, gpa & _WORD)
            self._write(high, gpa >> 32)
        self._write(R.QUEUE_READY, 1)
        if index not in self.active:
            self.active.append(index)

    def stop_queue(self, index: int, /) -> None:
        """Takes a queue away from the device (virtio 1.3, 4.2.2.2).

        Raises `DeviceError` when it does not let go.
        """
        self._write(R.QUEUE_SEL, index)
        self._write(R.QUEUE_READY, 0)
        if self._read(R.QUEUE_READY):
            raise DeviceError("QueueReady does not become 0", section="4.2.2.2")
        self._forget(index)

    def reset_queue(self, index: int, /) -> None:
        """Resets one queue (RING_RESET); returns when the device is done with it.

        Raises `DeviceError` when it takes too long.
        """
        self._write(R.QUEUE_SEL, index)
        self._write(R.QUEUE_RESET, 1)
        self._await_zero(lambda: self._read(R.QUEUE_RESET), "QueueReset", "4.2.2.2")
        self._await_zero(lambda: self._read(R.QUEUE_READY), "QueueReady", "4.2.2.1")
        self._forget(index)

    def _forget(self, index: int) -> None:
        if index in self.active:
            self.active.remove(index)

    def notify(self, index: int, /) -> None:
        """Kicks: an available buffer notification."""
        self._write(R.QUEUE_NOTIFY, index)

    # --- interrupts -------------------------------------------------------------------------------

    def _take_events(self) -> int:
        events = self._read(R.INTERRUPT_STATUS)
        if events:
            self._write(R.INTERRUPT_ACK, events)
        return events
