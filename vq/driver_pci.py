"""The scripted driver's way to a device over PCI (virtio 1.3, 4.1).

What a kernel's PCI core does first (sizes and places BARs, enables the function, sets MSI-X up) and
then the accesses of Linux' virtio_pci_modern driver, in its order and in each field's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vq.abi import (
    MSIX_ENTRY_SIZE,
    NO_VECTOR,
    PCI_MODERN_DEVICE_ID,
    PCI_VENDOR_ID,
    MsixControl,
    PciCapability,
    PciCommand,
    PciRegister,
    PciStatus,
    Status,
    VirtioPciCap,
    VirtioPciCommonCfg,
    VirtioPciNotifyCap,
    VirtioPciStructure,
)
from vq.driver import DeviceError
from vq.driver_registers import RegisterDriver, Window, read_field, write_field
from vq.errors import UsageError

__all__ = ["PciTransport"]

_WORD = 0xFFFF_FFFF
_FIRST_PORT, _FIRST_ADDRESS = 0xC000, 0xE000_0000
"""Where BARs are put, one behind the other: on a PC there is room here."""
_MESSAGE_ADDRESS, _FIRST_MESSAGE = 0xFEE0_0000, 0x30
"""Where MSI-X messages go and the data of the first vector, as on a PC."""
_CONFIG_VECTOR = 0
_SMALLEST_COMMON = VirtioPciCommonCfg.queue_notif_config_data.offset
_MAX_CAPABILITIES = 48
_FIELDS = {
    name: (getattr(VirtioPciCommonCfg, name).offset, getattr(VirtioPciCommonCfg, name).size)
    for name, _ in VirtioPciCommonCfg._fields_
}


class _Part:
    """One of the virtio structures: a part of a BAR."""

    def __init__(self, window: Window, start: int, length: int) -> None:
        self.window = window
        self.start = start
        self.length = length


class PciTransport(RegisterDriver):
    """A transport for `vq.driver.Driver` over a PCI function.

    `config` is its configuration space, `bars` are its base address regions by number. With `msix`
    the device is asked to interrupt by messages, which then have to come to `message`; without it
    `interrupt` is to be called with the level of the INTx line.

    Raises `DeviceError` when this is no modern virtio device.
    """

    def __init__(self, config: Window, bars: Mapping[int, Window], *, msix: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bars = bars
        self.bar_sizes = [0] * 6
        """In bytes; 0 for a BAR that is not there."""
        self.bar_addresses = [0] * 6
        """Where the driver has put each BAR: ports, or physical addresses."""
        vendor = config.read(PciRegister.VENDOR_ID, 2)
        device = config.read(PciRegister.DEVICE_ID, 2)
        if vendor != PCI_VENDOR_ID or not 0 < device - PCI_MODERN_DEVICE_ID < 0x40:
            raise DeviceError(
                f"no modern virtio device: {vendor:04x}:{device:04x}", section="4.1.2"
            )
        self.device_id = device - PCI_MODERN_DEVICE_ID
        """The device's type (virtio 1.3, 5)."""
        self._place_bars()
        found = self._find_structures()
        common = found.get(VirtioPciStructure.COMMON)
        isr = found.get(VirtioPciStructure.ISR)
        notify = found.get(VirtioPciStructure.NOTIFY)
        if common is None or isr is None or notify is None:
            raise DeviceError("a structure that every device has is not there", section="4.1.4")
        if common.length < _SMALLEST_COMMON:
            raise DeviceError("the common structure is too short", section="4.1.4.3")
        self._common, self._isr, self._notify = common, isr, notify
        self._device_config = found.get(VirtioPciStructure.DEVICE)
        self._msix_capability = self._find(PciCapability.MSIX) if msix else 0
        if msix and not self._msix_capability:
            raise DeviceError("the device has no MSI-X")
        self._msix_enabled = False
        self._vectors: dict[int, list[int]] = {}  # the queues of each vector
        self._kicks: dict[int, int] = {}  # where each queue is kicked, in the notify structure
        self._to_enable: list[int] = []
        self._live = False

    # --- what a kernel's PCI core does ------------------------------------------------------------

    def _place_bars(self) -> None:
        """Asks each BAR for its size, gives it an address, and enables the function."""
        config = self.config
        ports, addresses = _FIRST_PORT, _FIRST_ADDRESS
        command = config.read(PciRegister.COMMAND, 2)
        bar = 0
        while bar < 6:
            register = PciRegister.BASE_ADDRESS_0 + 4 * bar
            config.write(register, 4, _WORD)
            mask = config.read(register, 4)
            io, wide = mask & 1, mask & 7 == 4
            size = -(mask & (~0x3 if io else ~0xF)) & _WORD
            if size & (size - 1):
                raise DeviceError(f"BAR {bar} has a size of {size:#x}")
            if size:
                place = ports if io else addresses
                place = -(-place // size) * size
                config.write(register, 4, place)
                if wide:  # the upper half of 64 bits
                    config.write(register + 4, 4, 0)
                ports, addresses = (place + size, addresses) if io else (ports, place + size)
                self.bar_sizes[bar] = size
                self.bar_addresses[bar] = place
                command |= PciCommand.IO if io else PciCommand.MEMORY
            bar += 2 if wide else 1
        config.write(PciRegister.COMMAND, 2, command | PciCommand.MASTER)

    def _capabilities(self) -> Iterator[tuple[int, int]]:
        """Each capability's number and where it begins."""
        if not self.config.read(PciRegister.STATUS, 2) & PciStatus.CAPABILITIES:
            return
        place = self.config.read(PciRegister.CAPABILITY_LIST, 1) & ~3
        for _ in range(_MAX_CAPABILITIES):
            if place < 0x40:
                return
            entry = self.config.read(place, 2)
            yield entry & 0xFF, place
            place = entry >> 8 & ~3
        raise DeviceError("the list of capabilities has no end")

    def _find(self, number: int) -> int:
        """Where the first capability of this number is; 0 when there is none."""
        return next((place for kind, place in self._capabilities() if kind == number), 0)

    def _find_structures(self) -> dict[int, _Part]:
        """The first structure of each type that lies in a BAR (virtio 1.3, 4.1.4)."""
        found: dict[int, _Part] = {}
        for number, place in self._capabilities():
            if number != PciCapability.VENDOR:
                continue
            kind = self.config.read(place + VirtioPciCap.cfg_type.offset, 1)
            bar = self.config.read(place + VirtioPciCap.bar.offset, 1)
            if kind in found or kind == VirtioPciStructure.PCI_CFG or bar > 5:
                continue
            if not self.bar_sizes[bar]:
                continue
            start = self.config.read(place + VirtioPciCap.offset.offset, 4)
            length = self.config.read(place + VirtioPciCap.length.offset, 4)
            if start + length > self.bar_sizes[bar]:
                raise DeviceError(f"structure {kind} does not fit into BAR {bar}", section="4.1.4")
            found[kind] = _Part(self.bars[bar], start, length)
            if kind == VirtioPciStructure.NOTIFY:
                multiplier = VirtioPciNotifyCap.notify_off_multiplier.offset
                self._multiplier = self.config.read(place + multiplier, 4)
        return found

    # --- the common structure ---------------------------------------------------------------------

    def _read(self, name: str) -> int:
        offset, size = _FIELDS[name]
        return self._common.window.read(self._common.start + offset, size)

    def _write(self, name: str, value: int) -> None:
        offset, size = _FIELDS[name]
        self._common.window.write(self._common.start + offset, size, value)

    @property
    def device_features(self) -> int:
        """The features that the device offers."""
        features = 0
        for word in (0, 1):
            self._write("device_feature_select", word)
            features |= self._read("device_feature") << 32 * word
        return features

    def accept_features(self, mask: int, /) -> None:
        """Writes the driver's set."""
        for word in (0, 1):
            self._write("driver_feature_select", word)
            self._write("driver_feature", mask >> 32 * word & _WORD)

    @property
    def status(self) -> int:
        """The device status field."""
        return self._read("device_status")

    def write_status(self, value: int, /) -> None:
        """Writes the device status field; 0 resets the device.

        As in Linux, queues are enabled all together, right before DRIVER_OK.
        """
        if value & Status.DRIVER_OK:
            for index in self._to_enable:
                self._enable(index)
            self._to_enable.clear()
            self._live = True
        self._write("device_status", value)
        if not value:
            self.active.clear()
            self._to_enable.clear()
            self._kicks.clear()
            self._live = False
            self._disable_msix()

    @property
    def config_generation(self) -> int:
        """Changes whenever the configuration space may have changed."""
        return self._read("config_generation")

    def read_config(self, offset: int, length: int, /) -> bytes:
        """Reads bytes of the configuration space, as one field.

        Raises `DeviceError` when the device has none.
        """
        part = self._config_part()
        return read_field(part.window, part.start + offset, length)

    def write_config(self, offset: int, data: bytes, /) -> None:
        """Writes bytes of the configuration space, as one field; raises likewise."""
        part = self._config_part()
        write_field(part.window, part.start + offset, data)

    def _config_part(self) -> _Part:
        if self._device_config is None:
            raise DeviceError("the device has no configuration space", section="4.1.4.6")
        return self._device_config

    # --- queues -----------------------------------------------------------------------------------

    @property
    def queue_count(self) -> int:
        """How many queues the device has at most."""
        return self._read("num_queues")

    def queue_max_size(self, index: int, /) -> int:
        """The largest size that a queue may have; 0 where there is none, or it is in use."""
        if index >= self.queue_count:
            return 0
        self._write("queue_select", index)
        size = self._read("queue_size")
        self._write("queue_select", index)
        return 0 if self._read("queue_enable") else size

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        """Tells the device where a queue's parts are; it is enabled before DRIVER_OK, or now.

        Raises `DeviceError` for a queue that cannot be kicked, or not be given a vector.
        """
        if self._msix_capability and not self._msix_enabled:
            self._enable_msix()
        self._write("queue_select", index)
        self._write("queue_size", size)
        self._write("queue_select", index)
        for part, gpa in (("desc", desc), ("driver", avail), ("device", used)):
            self._write(f"queue_{part}_lo", gpa & _WORD)
            self._write(f"queue_{part}_hi", gpa >> 32)
        if self._msix_enabled:
            self._choose_vector(index)
        self._write("queue_select", index)
        kick = self._read("queue_notify_off") * self._multiplier
        if kick + 2 > self._notify.length:
            raise DeviceError("a queue's notify address is outside", section="4.1.4.4.1")
        self._kicks[index] = self._notify.start + kick
        if index not in self.active:
            self.active.append(index)
        if self._live:
            self._enable(index)
        else:
            self._to_enable.append(index)

    def _enable(self, index: int) -> None:
        self._write("queue_select", index)
        self._write("queue_enable", 1)

    def reset_queue(self, index: int, /) -> None:
        """Resets one queue (RING_RESET); returns when the device is done with it.

        Raises `DeviceError` when it takes too long.
        """
        self._write("queue_select", index)
        self._write("queue_reset", 1)
        for field in ("queue_reset", "queue_enable"):
            self._await_zero(lambda: self._read(field), field, "4.1.4.3.1")  # noqa: B023
        if index in self.active:
            self.active.remove(index)
        for queues in self._vectors.values():
            if index in queues:
                queues.remove(index)

    def notify(self, index: int, /) -> None:
        """Kicks: an available buffer notification of 16 bits (virtio 1.3, 4.1.5.2.1).

        Raises `UsageError` for a queue that was not set up.
        """
        if index not in self._kicks:
            raise UsageError(f"queue {index} was not set up")
        self._notify.window.write(self._kicks[index], 2, index)

    # --- interrupts -------------------------------------------------------------------------------

    def _take_events(self) -> int:
        return self._isr.window.read(self._isr.start, 1)

    def message(self, address: int, data: int) -> None:
        """An MSI-X message from the device."""
        vector = data - _FIRST_MESSAGE
        if address != _MESSAGE_ADDRESS or not self._msix_enabled:
            self.spurious += 1
        elif vector == _CONFIG_VECTOR:
            self._config_changed()
        elif vector in self._vectors:
            self._queues_used(self._vectors[vector])
        else:
            self.spurious += 1

    def _enable_msix(self) -> None:
        """Fills the table while all is masked, then lets messages through, as kernels do."""
        control_at = self._msix_capability + 2
        control = self.config.read(control_at, 2)
        count = (control & 0x7FF) + 1
        place = self.config.read(self._msix_capability + 4, 4)
        table, start = self.bars[place & 7], place & ~7
        self.config.write(control_at, 2, control | MsixControl.ENABLE | MsixControl.MASK_ALL)
        command = self.config.read(PciRegister.COMMAND, 2)
        self.config.write(PciRegister.COMMAND, 2, command | PciCommand.INTX_DISABLE)
        for vector in range(count):
            entry = start + vector * MSIX_ENTRY_SIZE
            words = (_MESSAGE_ADDRESS, 0, _FIRST_MESSAGE + vector, 0)
            for number, word in enumerate(words):
                table.write(entry + 4 * number, 4, word)
        self.config.write(control_at, 2, control & ~MsixControl.MASK_ALL | MsixControl.ENABLE)
        self._vectors = {vector: [] for vector in range(1, count)}
        self._msix_enabled = True
        self._write("config_msix_vector", _CONFIG_VECTOR)
        if self._read("config_msix_vector") == NO_VECTOR:
            raise DeviceError("no vector for the configuration", section="4.1.5.1.2.1")

    def _choose_vector(self, index: int) -> None:
        """One vector for each queue while there are enough, then all share the last."""
        if not self._vectors:
            raise DeviceError("MSI-X with fewer than two vectors", section="4.1.5.1.2.1")
        vector = min(index + 1, max(self._vectors))
        self._write("queue_select", index)
        self._write("queue_msix_vector", vector)
        if self._read("queue_msix_vector") == NO_VECTOR:
            raise DeviceError(f"no vector for queue {index}", section="4.1.5.1.2.1")
        self._vectors[vector].append(index)

    def _disable_msix(self) -> None:
        if self._msix_enabled:
            control_at = self._msix_capability + 2
            control = self.config.read(control_at, 2)
            self.config.write(control_at, 2, control & ~MsixControl.ENABLE)
            command = self.config.read(PciRegister.COMMAND, 2)
            self.config.write(PciRegister.COMMAND, 2, command & ~PciCommand.INTX_DISABLE)
            self._msix_enabled = False
            self._vectors = {}
