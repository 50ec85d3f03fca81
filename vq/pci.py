"""virtio over PCI: the structures that a guest finds by their capabilities (virtio 1.3, 4.1).

`PciFunction` is a whole function: configuration space, one BAR with all structures in it, and a
second one for MSI-X. Whoever has a machine leads accesses to it, and is told of interrupts::

    function = PciFunction(Entropy(memory), machine.set_irq, machine.send_msi)
    machine.add_function(function.config.read, function.config.write)
    function.bars[0].read(offset, size)  # for each BAR, while config.bar_address says where it is

`PciRegisters` are the structures alone, for a machine that has its own configuration space: each of
`common`, `notify`, `isr` and `device_config` has `read` and `write`, and lies wherever one likes.
The function's first BAR has them where OpenBSD's vmd has them.

Modern devices only; legacy drivers find no device that is theirs. There are no shared memory
regions and no administration queues.

Where the specification leaves an outcome open:

- A field of the common structure is accessed at its offset in its width, one of 64 bits also as a
  whole; anything else is ignored, as in bhyve and vmd.
- What is reserved or not negotiated reads as 0; writes to that, and to what is read-only, are
  ignored.
- queue_size reads 0 when the driver wrote what cannot be; to enable the queue then fails, with a
  device that needs a reset.
- queue_enable takes only 1. While it is 1, writes to the queue's other registers are ignored; the
  vector may be changed all the same.
- A kick is taken in any width; the queue is the one whose address it is, as in QEMU, unless
  notify_off_multiplier is 0, when its value says which.
- ISR status is read, and cleared, by any access that begins at its first byte.
- The PCI configuration access capability reaches the BAR of the structures only.
- The command register's bus master bit is not looked at, as in vmd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vq.abi import (
    NO_VECTOR,
    PCI_MODERN_DEVICE_ID,
    PCI_VENDOR_ID,
    DeviceId,
    Feature,
    PciCapability,
    PciCommand,
    VirtioPciCap,
    VirtioPciCfgCap,
    VirtioPciCommonCfg,
    VirtioPciNotifyCap,
    VirtioPciStructure,
)
from vq.device import Device
from vq.errors import UsageError
from vq.pci_function import MAX_VECTORS, ConfigSpace, MsixTable
from vq.registers import RegisterBlock, RegisterTransport, ignore_access

__all__ = ["PciFunction", "PciRegisters"]

_BAR_STRUCTURES = 0
_BAR_MSIX = 1
_PAGE = 0x1000
_NOTIFY_AT, _ISR_AT, _DEVICE_AT = 0x100, 0x200, 0x300  # as in vmd

_CLASS_CODES: Mapping[int, int] = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x018000,
    DeviceId.CONSOLE: 0x078000,
}
_OTHER_CLASS = 0x00FF00


class PciRegisters(RegisterTransport):
    """The four structures of a device, without a place in a BAR.

    `interrupt` hears of every change of the INTx line. `notify_off_multiplier` is a power of two
    from 4, or 0 for one address for all queues. With `msix`, vectors can be mapped (4.1.5.1.2).

    Raises `UsageError` for another multiplier, and when the device has no guest memory.
    """

    def __init__(
        self,
        device: Device,
        interrupt: Callable[[bool], None] | None = None,
        *,
        notify_off_multiplier: int = 4,
        msix: MsixTable | None = None,
    ) -> None:
        multiplier = notify_off_multiplier
        if multiplier % 4 or multiplier < 0 or multiplier & (multiplier - 1):
            raise UsageError(f"a multiplier of {multiplier} is neither 0 nor a power of two from 4")
        super().__init__(device, interrupt)
        self.notify_off_multiplier = multiplier
        self.msix = msix
        self.config_vector = NO_VECTOR
        self._generation = 0
        self._read_generation = device.config_generation
        self.common: RegisterBlock = _CommonConfig(self)
        self.notify: RegisterBlock = _Notify(self)
        self.isr: RegisterBlock = _Isr(self)
        self.device_config: RegisterBlock = _DeviceConfig(self)

    @property
    def by_message(self) -> bool:
        """Whether the device interrupts by messages (MSI-X) now."""
        return self.msix is not None and self.msix.enabled

    # --- interrupts -------------------------------------------------------------------------------

    def _queue_used(self, index: int) -> None:
        if self.by_message:
            self._send(self.queues[index].vector)  # the ISR status is unused (4.1.5.3)
        else:
            super()._queue_used(index)

    def _config_changed(self) -> None:
        super()._config_changed()  # the ISR status' bit is set in any case (4.1.4.5.1)
        if self.by_message:
            self._send(self.config_vector)

    def _send(self, vector: int) -> None:
        if self.msix is not None and vector != NO_VECTOR:
            self.msix.send(vector)

    def _line_level(self) -> bool:
        return bool(self.events) and not self.by_message

    def _reset_registers(self) -> None:
        self.config_vector = NO_VECTOR
        if self.msix is not None:
            self.msix.forget_pending()
        super()._reset_registers()

    # --- fields of the common structure that do more than keep a number ---------------------------

    def _possible_vector(self, value: int) -> int:
        """The vector, or NO_VECTOR where there is none such (4.1.5.1.2.1)."""
        return value if self.msix is not None and value < self.msix.vectors else NO_VECTOR

    def _write_config_vector(self, value: int) -> None:
        self.config_vector = self._possible_vector(value)

    def _read_queue_vector(self) -> int:
        queue = self._selected()
        return NO_VECTOR if queue is None else queue.vector

    def _write_queue_vector(self, value: int) -> None:
        queue = self._selected()
        if queue is None:
            ignore_access(self.device.stats, "no such queue", self.queue_select)
        else:
            queue.vector = self._possible_vector(value)

    def _read_queue_size(self) -> int:
        queue = self._selected()
        if queue is None or queue.size & (queue.size - 1) or queue.size > queue.max_size:
            return 0  # 4.1.4.3.1: "either a value of 0 or a power of 2"
        return queue.size

    def _read_address(self, half: int) -> int:
        queue = self._selected()
        return 0 if queue is None else queue.addresses[half]

    def _write_enable(self, value: int) -> None:
        if value == 1:
            self._enable_queue()
        else:  # 4.1.4.3.2: the driver "MUST NOT write a 0"
            ignore_access(self.device.stats, "not to be written", value)

    def _read_selected_index(self) -> int:
        """The queue's number: its place in the notify structure, and what kicks call it."""
        return self.queue_select if self._selected() is not None else 0

    def _read_notify_data(self) -> int:
        negotiated = self.device.has_feature(Feature.NOTIF_CONFIG_DATA)
        return self._read_selected_index() if negotiated else 0

    def _select_device_features(self, value: int) -> None:
        self.device_feature_select = value

    def _select_driver_features(self, value: int) -> None:
        self.driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self.queue_select = value

    # --- the device's configuration ---------------------------------------------------------------

    def _read_config(self, offset: int, size: int) -> bytes:
        # 4.1.4.3.1: counting every change 8 bits would wrap, so changes that are read are counted.
        generation = self.device.config_generation
        if generation != self._read_generation:
            self._read_generation = generation
            self._generation = (self._generation + 1) & 0xFF
        return self.device.read_config(offset, size)

    def _config_generation(self) -> int:
        return self._generation


class _Structure(RegisterBlock):
    """One of the four structures."""

    def __init__(self, registers: PciRegisters, length: int) -> None:
        super().__init__(length, registers.device.stats)
        self.registers = registers


class _CommonConfig(_Structure):
    """The common configuration structure (virtio 1.3, 4.1.4.3)."""

    def __init__(self, registers: PciRegisters) -> None:
        super().__init__(registers, _COMMON_LENGTH)

    def _load(self, offset: int, size: int) -> int:
        name = _FIELDS.get((offset, size))
        if name is None:
            return ignore_access(self.stats, "width", offset, size)
        reader = _READERS.get(name)
        return 0 if reader is None else reader(self.registers)

    def _store(self, offset: int, size: int, value: int) -> None:
        name = _FIELDS.get((offset, size))
        writer = _WRITERS.get(name or "")
        if name is None:
            ignore_access(self.stats, "width", offset, size)
        elif writer is None:
            ignore_access(self.stats, "not to be written", offset)
        else:
            writer(self.registers, value)


_COMMON_LENGTH = 64
_FIELDS: Mapping[tuple[int, int], str] = {
    (getattr(VirtioPciCommonCfg, name).offset, getattr(VirtioPciCommonCfg, name).size): name
    for name, _ in VirtioPciCommonCfg._fields_
}
_P = PciRegisters
_READERS: Mapping[str, Callable[[PciRegisters], int]] = {
    "device_feature_select": lambda self: self.device_feature_select,
    "device_feature": _P._offered_word,
    "driver_feature_select": lambda self: self.driver_feature_select,
    "driver_feature": _P._accepted_word,
    "config_msix_vector": lambda self: self.config_vector,
    "num_queues": lambda self: len(self.queues),
    "device_status": lambda self: self.device.status,
    "config_generation": _P._config_generation,
    "queue_select": lambda self: self.queue_select,
    "queue_size": _P._read_queue_size,
    "queue_msix_vector": _P._read_queue_vector,
    "queue_enable": _P._read_enabled,
    "queue_notify_off": _P._read_selected_index,
    "queue_desc_lo": lambda self: self._read_address(0),
    "queue_desc_hi": lambda self: self._read_address(1),
    "queue_driver_lo": lambda self: self._read_address(2),
    "queue_driver_hi": lambda self: self._read_address(3),
    "queue_device_lo": lambda self: self._read_address(4),
    "queue_device_hi": lambda self: self._read_address(5),
    "queue_notif_config_data": _P._read_notify_data,
}
_WRITERS: Mapping[str, Callable[[PciRegisters, int], None]] = {
    "device_feature_select": _P._select_device_features,
    "driver_feature_select": _P._select_driver_features,
    "driver_feature": _P._accept_word,
    "config_msix_vector": _P._write_config_vector,
    "device_status": _P.write_status,
    "queue_select": _P._select_queue,
    "queue_size": _P._write_queue_size,
    "queue_msix_vector": _P._write_queue_vector,
    "queue_enable": _P._write_enable,
    "queue_desc_lo": lambda self, value: self._write_queue_address(0, value),
    "queue_desc_hi": lambda self, value: self._write_queue_address(1, value),
    "queue_driver_lo": lambda self, value: self._write_queue_address(2, value),
    "queue_driver_hi": lambda self, value: self._write_queue_address(3, value),
    "queue_device_lo": lambda self, value: self._write_queue_address(4, value),
    "queue_device_hi": lambda self, value: self._write_queue_address(5, value),
    "queue_reset": _P._write_queue_reset,
}


class _Notify(_Structure):
    """The notification structure (virtio 1.3, 4.1.4.4)."""

    def __init__(self, registers: PciRegisters) -> None:
        queues = max(1, len(registers.queues))
        super().__init__(registers, max(4, queues * registers.notify_off_multiplier))

    def _load(self, offset: int, size: int) -> int:
        return 0

    def _store(self, offset: int, size: int, value: int) -> None:
        multiplier = self.registers.notify_off_multiplier
        index, rest = divmod(offset, multiplier) if multiplier else (value & 0xFFFF, offset)
        if rest:
            ignore_access(self.stats, "no such register", offset, size)
        else:
            self.registers.device.notify(index)


class _Isr(_Structure):
    """The ISR status (virtio 1.3, 4.1.4.5)."""

    def __init__(self, registers: PciRegisters) -> None:
        super().__init__(registers, 4)

    def _load(self, offset: int, size: int) -> int:
        events = self.registers.events
        if offset:
            return 0
        self.registers._set_events(0)
        return events

    def _store(self, offset: int, size: int, value: int) -> None:
        ignore_access(self.stats, "not to be written", offset)


class _DeviceConfig(_Structure):
    """The device's configuration space (virtio 1.3, 4.1.4.6)."""

    def __init__(self, registers: PciRegisters) -> None:
        config = registers.device.config
        super().__init__(registers, 0 if config is None else len(bytes(config)))

    def _load(self, offset: int, size: int) -> int:
        return int.from_bytes(self.registers._read_config(offset, size), "little")

    def _store(self, offset: int, size: int, value: int) -> None:
        self.registers.device.write_config(offset, value.to_bytes(size, "little"))


class _StructuresBar(RegisterBlock):
    """The BAR with all four structures in it."""

    def __init__(self, registers: PciRegisters) -> None:
        notify_at = _NOTIFY_AT
        end = _DEVICE_AT + registers.device_config.length
        if registers.notify.length > _ISR_AT - _NOTIFY_AT:  # more queues than vmd has room for
            notify_at = -(-end // _PAGE) * _PAGE
            end = notify_at + registers.notify.length
        super().__init__(max(_PAGE, 1 << (end - 1).bit_length()), registers.device.stats)
        self.places = {
            VirtioPciStructure.COMMON: (0, registers.common),
            VirtioPciStructure.NOTIFY: (notify_at, registers.notify),
            VirtioPciStructure.ISR: (_ISR_AT, registers.isr),
            VirtioPciStructure.DEVICE: (_DEVICE_AT, registers.device_config),
        }

    def _load(self, offset: int, size: int) -> int:
        for start, block in self.places.values():
            if start <= offset < start + block.length:
                return block.read(offset - start, size)
        return ignore_access(self.stats, "no such register", offset, size)

    def _store(self, offset: int, size: int, value: int) -> None:
        for start, block in self.places.values():
            if start <= offset < start + block.length:
                block.write(offset - start, size, value)
                return
        ignore_access(self.stats, "no such register", offset, size)


class PciFunction(PciRegisters):
    """A virtio device as a function on a PCI bus.

    `interrupt` hears of every change of the INTx line. With `message`, which sends an MSI-X message
    (an address and 32 bits of data), there are `vectors` of them, by default one for each queue and
    one for the configuration. With `io` the structures are in I/O space, as in vmd, else in memory.

    `config` is the configuration space; `bars` are what lies behind the base addresses, by number:
    0 the structures, 1 what MSI-X needs.

    Raises `UsageError` for a device type of 64 or more, and as `PciRegisters` and `MsixTable` do.
    """

    def __init__(
        self,
        device: Device,
        interrupt: Callable[[bool], None] | None = None,
        message: Callable[[int, int], None] | None = None,
        *,
        vectors: int | None = None,
        io: bool = False,
        notify_off_multiplier: int = 4,
    ) -> None:
        device_id = device.device_id
        if not 0 < device_id < 0x40:  # virtio 1.3, 4.1.2: from 0x1041 to 0x107f
            raise UsageError(f"there is no PCI device ID for a device of type {device_id}")
        self.config = ConfigSpace(
            device.stats,
            vendor_id=PCI_VENDOR_ID,
            device_id=PCI_MODERN_DEVICE_ID + device_id,
            subsystem_vendor_id=PCI_VENDOR_ID,
            subsystem_id=0x40 + device_id,  # 4.1.2.1: 0x40 or higher, and a revision of 1
            revision=1,
            class_code=_CLASS_CODES.get(device_id, _OTHER_CLASS),
        )
        msix = None
        if message is not None:
            count = min(device.queue_count + 1, MAX_VECTORS) if vectors is None else vectors
            msix = MsixTable(self.config, _BAR_MSIX, count, message)
        super().__init__(device, interrupt, notify_off_multiplier=notify_off_multiplier, msix=msix)
        structures = _StructuresBar(self)
        self.bars: dict[int, RegisterBlock] = {_BAR_STRUCTURES: structures}
        self.config.add_bar(_BAR_STRUCTURES, structures.length, io=io)
        if msix is not None:
            self.bars[_BAR_MSIX] = msix
            self.config.add_bar(_BAR_MSIX, msix.length, io=False)
        for kind, (start, block) in structures.places.items():
            if block.length:
                self._add_structure(kind, start, block.length)
        self._window = self._add_window()
        self.config.on_read = self._config_read
        self.config.on_write = self._config_written

    def reset(self) -> None:
        """A reset of the bus: of the device, of the configuration space, and of MSI-X."""
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        self.write_status(0)

    # --- capabilities -----------------------------------------------------------------------------

    def _add_structure(self, kind: VirtioPciStructure, start: int, length: int) -> None:
        cap = VirtioPciCap(
            cap_vndr=PciCapability.VENDOR,
            cap_len=16,
            cfg_type=kind,
            bar=_BAR_STRUCTURES,
            offset=start,
            length=length,
        )
        if kind == VirtioPciStructure.NOTIFY:
            cap.cap_len = 20
            multiplier = self.notify_off_multiplier
            body = bytes(VirtioPciNotifyCap(cap=cap, notify_off_multiplier=multiplier))
        else:
            body = bytes(cap)
        self.config.add_capability(body)

    def _add_window(self) -> int:
        """The PCI configuration access capability (virtio 1.3, 4.1.4.9); returns where it is."""
        cap = VirtioPciCap(
            cap_vndr=PciCapability.VENDOR, cap_len=20, cfg_type=VirtioPciStructure.PCI_CFG
        )
        start = self.config.add_capability(bytes(VirtioPciCfgCap(cap=cap)))
        self.config.set(start + VirtioPciCap.bar.offset, 1, 0, writable=0xFF)
        for offset in (VirtioPciCap.offset.offset, VirtioPciCap.length.offset, _WINDOW_DATA):
            self.config.set(start + offset, 4, 0, writable=0xFFFF_FFFF)
        return start

    def _window_access(self, offset: int, size: int) -> tuple[int, int] | None:
        """Offset and length of the access to the BAR that one to pci_cfg_data stands for."""
        data = self._window + _WINDOW_DATA
        if offset + size <= data or offset >= data + 4:
            return None
        bar = self.config.get(self._window + VirtioPciCap.bar.offset, 1)
        start = self.config.get(self._window + VirtioPciCap.offset.offset, 4)
        length = self.config.get(self._window + VirtioPciCap.length.offset, 4)
        if bar != _BAR_STRUCTURES or length not in (1, 2, 4) or start % length:
            ignore_access(self.device.stats, "nothing behind pci_cfg_data", bar, start, length)
            return None
        return start, length

    def _config_read(self, offset: int, size: int) -> None:
        access = self._window_access(offset, size)
        if access is not None:
            value = self.bars[_BAR_STRUCTURES].read(*access)
            data = self._window + _WINDOW_DATA
            self.config.bytes[data : data + access[1]] = value.to_bytes(access[1], "little")

    def _config_written(self, offset: int, size: int) -> None:
        access = self._window_access(offset, size)
        if access is not None:
            value = self.config.get(self._window + _WINDOW_DATA, access[1])
            self.bars[_BAR_STRUCTURES].write(*access, value)
        if self.msix is not None:
            self.msix.flush()  # it may be that vectors are not masked any more
        self._update_line()  # ... or that the command register lets INTx through

    # --- interrupts -------------------------------------------------------------------------------

    def _update_line(self) -> None:
        # 4.1.4.5.1: the status register has it whether INTx is let through or not.
        self.config.interrupt_status = super()._line_level()
        super()._update_line()

    def _line_level(self) -> bool:
        return super()._line_level() and not self.config.command & PciCommand.INTX_DISABLE


_WINDOW_DATA = VirtioPciCfgCap.pci_cfg_data.offset
