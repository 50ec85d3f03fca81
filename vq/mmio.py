"""virtio over MMIO: the block of registers that a machine maps into its guest (virtio 1.3, 4.2).

`MmioRegisters` drives any `vq.device.Device`. Whoever has a machine (an emulator, a VMM, a model of
hardware) gives it `read` and `write` for the block's addresses, and is told of the interrupt line::

    registers = MmioRegisters(Entropy(memory), interrupt=machine.set_irq)
    machine.map(0x10001000, registers.length, registers.read, registers.write)

Version 2 of the layout; legacy drivers find a version that is not theirs. There are no shared
memory regions: their length reads as -1.

Where the specification leaves an outcome open:

- Registers are accessed in 4 aligned bytes, or 8 as two of them; anything else is ignored.
- The configuration space is accessed in any width; beyond its end it reads as zeros.
- Status takes the lowest 8 bits, as in QEMU.
- QueueReady reads 1 while the device has the queue: 0 again when the device refused it.
- QueueSize, when never written, is the largest.
- A queue that is enabled keeps its registers: writes are ignored, as is a second 1 to QueueReady.
- With NOTIFICATION_DATA only the queue's index counts; where to look stands in the ring itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vq.abi import MMIO_CONFIG, MMIO_MAGIC, MMIO_VERSION, Feature, MmioRegister
from vq.device import Device
from vq.registers import RegisterBlock, RegisterTransport, ignore_access

__all__ = ["MmioRegisters"]

_WORD = 0xFFFF_FFFF
_SMALLEST = 0x200
"""The usual size of the block in device trees and on kernels' command lines."""


class MmioRegisters(RegisterBlock, RegisterTransport):
    """The registers of one device, `length` bytes from wherever the machine maps them.

    `interrupt` hears of every change of the interrupt line, which is raised as long as there is
    something in InterruptStatus. `vendor_id` is what VendorID reads. `length` is a power of two
    with room for the device's configuration space, at least 0x200.

    Raises `UsageError` when the device has no guest memory.
    """

    def __init__(
        self,
        device: Device,
        interrupt: Callable[[bool], None] | None = None,
        *,
        vendor_id: int = int.from_bytes(b"vq", "little"),
    ) -> None:
        RegisterTransport.__init__(self, device, interrupt)
        config = b"" if device.config is None else bytes(device.config)
        end = MMIO_CONFIG + len(config)
        RegisterBlock.__init__(self, max(_SMALLEST, 1 << (end - 1).bit_length()), device.stats)
        self.vendor_id = vendor_id

    def _load(self, offset: int, size: int) -> int:
        if offset >= MMIO_CONFIG:
            data = self.device.read_config(offset - MMIO_CONFIG, size)
            return int.from_bytes(data, "little")
        reader = _READERS.get(offset)
        if size != 4:
            return ignore_access(self.stats, "width", offset, size)
        if reader is None:
            return ignore_access(self.stats, "not to be read", offset)
        return reader(self)

    def _store(self, offset: int, size: int, value: int) -> None:
        if offset >= MMIO_CONFIG:
            self.device.write_config(offset - MMIO_CONFIG, value.to_bytes(size, "little"))
            return
        writer = _WRITERS.get(offset)
        if size != 4:
            ignore_access(self.stats, "width", offset, size)
        elif writer is None:
            ignore_access(self.stats, "not to be written", offset)
        else:
            writer(self, value)

    # --- registers that do more than keep a number ------------------------------------------------

    def _read_queue_size_max(self) -> int:
        queue = self._selected()
        return 0 if queue is None else queue.max_size

    def _write_queue_ready(self, value: int) -> None:
        queue = self._selected()
        if value == 1:
            self._enable_queue()
        elif value or queue is None:
            ignore_access(self.stats, "not to be written", MmioRegister.QUEUE_READY, value)
        elif self._is_enabled(queue):
            self.device.drop_queue(queue.index)

    def _notify(self, value: int) -> None:
        if self.device.has_feature(Feature.NOTIFICATION_DATA):
            value &= 0xFFFF  # virtio 1.3, 4.2.2: next_off and next_wrap stand above
        self.device.notify(value)

    def _select_device_features(self, value: int) -> None:
        self.device_feature_select = value

    def _select_driver_features(self, value: int) -> None:
        self.driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self.queue_select = value

    def _acknowledge(self, value: int) -> None:
        self._set_events(self.events & ~value)


_R = MmioRegister

_READERS: Mapping[int, Callable[[MmioRegisters], int]] = {
    _R.MAGIC_VALUE: lambda self: MMIO_MAGIC,
    _R.VERSION: lambda self: MMIO_VERSION,
    _R.DEVICE_ID: lambda self: self.device.device_id,
    _R.VENDOR_ID: lambda self: self.vendor_id,
    _R.DEVICE_FEATURES: MmioRegisters._offered_word,
    _R.QUEUE_SIZE_MAX: MmioRegisters._read_queue_size_max,
    _R.QUEUE_READY: MmioRegisters._read_enabled,
    _R.INTERRUPT_STATUS: lambda self: self.events,
    _R.STATUS: lambda self: self.device.status,
    # virtio 1.3, 4.2.2: a region that is not there has a length and an address of -1.
    _R.SHM_LEN_LOW: lambda self: _WORD,
    _R.SHM_LEN_HIGH: lambda self: _WORD,
    _R.SHM_BASE_LOW: lambda self: _WORD,
    _R.SHM_BASE_HIGH: lambda self: _WORD,
    _R.QUEUE_RESET: lambda self: 0,
    _R.CONFIG_GENERATION: lambda self: self.device.config_generation & _WORD,
}

_WRITERS: Mapping[int, Callable[[MmioRegisters, int], None]] = {
    _R.DEVICE_FEATURES_SEL: MmioRegisters._select_device_features,
    _R.DRIVER_FEATURES: MmioRegisters._accept_word,
    _R.DRIVER_FEATURES_SEL: MmioRegisters._select_driver_features,
    _R.QUEUE_SEL: MmioRegisters._select_queue,
    _R.QUEUE_SIZE: MmioRegisters._write_queue_size,
    _R.QUEUE_READY: MmioRegisters._write_queue_ready,
    _R.QUEUE_NOTIFY: MmioRegisters._notify,
    _R.INTERRUPT_ACK: MmioRegisters._acknowledge,
    _R.STATUS: lambda self, value: self.write_status(value & 0xFF),
    _R.QUEUE_DESC_LOW: lambda self, value: self._write_queue_address(0, value),
    _R.QUEUE_DESC_HIGH: lambda self, value: self._write_queue_address(1, value),
    _R.QUEUE_DRIVER_LOW: lambda self, value: self._write_queue_address(2, value),
    _R.QUEUE_DRIVER_HIGH: lambda self, value: self._write_queue_address(3, value),
    _R.QUEUE_DEVICE_LOW: lambda self, value: self._write_queue_address(4, value),
    _R.QUEUE_DEVICE_HIGH: lambda self, value: self._write_queue_address(5, value),
    _R.SHM_SEL: lambda self, value: None,
    _R.QUEUE_RESET: MmioRegisters._write_queue_reset,
}
