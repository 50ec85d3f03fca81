"""A PCI function as a guest sees it: configuration space, base addresses, capabilities, MSI-X.

Nothing of virtio is here, and no bus either: `ConfigSpace` is the 256 bytes that a host bridge
leads accesses to, `MsixTable` what lies in a memory BAR for MSI-X. Whoever has the machine decodes
addresses: it asks `ConfigSpace.bar_address` where the guest has put a BAR.

Section numbers are those of the PCI Local Bus Specification 3.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from vq.abi import MSIX_ENTRY_SIZE, MsixControl, PciCapability, PciCommand, PciRegister, PciStatus
from vq.errors import UsageError
from vq.registers import RegisterBlock, ignore_access

__all__ = ["BARS", "MAX_VECTORS", "ConfigSpace", "MsixTable"]

BARS = 6
MAX_VECTORS = 2048
_LENGTH = 256
_FIRST_CAPABILITY = 0x40  # behind the header
_BAR_IS_IO = 0x1
_COMMANDS = int(PciCommand.IO | PciCommand.MEMORY | PciCommand.MASTER | PciCommand.INTX_DISABLE)
_MSIX_CONTROLS = int(MsixControl.ENABLE | MsixControl.MASK_ALL)


class ConfigSpace(RegisterBlock):
    """The configuration space of one function, header type 0 (6.1).

    A guest writes only what is writable; the rest keeps its value. An access that crosses 4 bytes,
    which no bus makes, is ignored.
    """

    def __init__(
        self,
        stats: Counter[str],
        *,
        vendor_id: int,
        device_id: int,
        subsystem_vendor_id: int,
        subsystem_id: int,
        revision: int,
        class_code: int,
    ) -> None:
        """`class_code` has 24 bits: base class, subclass, programming interface."""
        super().__init__(_LENGTH, stats)
        self.bytes = bytearray(_LENGTH)
        self.writable = bytearray(_LENGTH)
        """A mask: which bits the guest may write."""
        self.interrupt_status = False
        """The interrupt status bit of the status register (6.2.3)."""
        self.on_write: Callable[[int, int], None] | None = None
        """Hears of every write once it is done: where, and of how many bytes."""
        self.on_read: Callable[[int, int], None] | None = None
        """Hears of every read before it is done."""
        self.bar_sizes = [0] * BARS
        self._last_capability = int(PciRegister.CAPABILITY_LIST)
        self._end = _FIRST_CAPABILITY
        self.set(PciRegister.VENDOR_ID, 2, vendor_id)
        self.set(PciRegister.DEVICE_ID, 2, device_id)
        self.set(PciRegister.COMMAND, 2, 0, writable=_COMMANDS)
        self.set(PciRegister.STATUS, 2, PciStatus.CAPABILITIES)
        self.set(PciRegister.REVISION_ID, 1, revision)
        self.set(PciRegister.CLASS_PROG, 3, class_code)
        self.set(PciRegister.CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        self.set(PciRegister.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        self.set(PciRegister.SUBSYSTEM_ID, 2, subsystem_id)
        self.set(PciRegister.INTERRUPT_LINE, 1, 0, writable=0xFF)
        self.set(PciRegister.INTERRUPT_PIN, 1, 1)  # INTA#

    # --- for whoever makes the function -----------------------------------------------------------

    def set(self, offset: int, size: int, value: int, *, writable: int = 0) -> None:
        """Puts a field there; of its bits the guest may write those in `writable`."""
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")
        self.writable[offset : offset + size] = writable.to_bytes(size, "little")

    def reset(self) -> None:
        """As after a reset of the bus: all that a guest can write is 0."""
        for offset, mask in enumerate(self.writable):
            self.bytes[offset] &= ~mask

    def get(self, offset: int, size: int) -> int:
        """A field as it stands."""
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def add_bar(self, index: int, size: int, *, io: bool) -> None:
        """A base address register for `size` bytes, a power of two (6.2.5.1)."""
        self.bar_sizes[index] = size
        flags = _BAR_IS_IO if io else 0
        self.set(_bar(index), 4, flags, writable=0x1_0000_0000 - size)

    def add_capability(self, body: bytes) -> int:
        """Puts a capability at the end of the list; returns where it begins (6.7).

        `body` begins with the capability's number; the link in its second byte is filled in.
        Raises `UsageError` when there is no room.
        """
        offset = self._end
        if offset + len(body) > _LENGTH:
            raise UsageError("no room in the configuration space for one more capability")
        self.bytes[offset : offset + len(body)] = body
        self.bytes[offset + 1] = 0
        self.bytes[self._last_capability] = offset
        self._last_capability = offset + 1
        self._end = offset + len(body) + -len(body) % 4
        return offset

    # --- for whoever has the bus ------------------------------------------------------------------

    @property
    def command(self) -> int:
        """The command register: bits of `PciCommand`."""
        return self.get(PciRegister.COMMAND, 2)

    def bar_address(self, index: int) -> int | None:
        """Where the guest has put a BAR; None when there is none, or it does not respond (6.2.2).

        Ports for a BAR in I/O space, else a physical address.
        """
        bar = self.get(_bar(index), 4)
        enable = PciCommand.IO if bar & _BAR_IS_IO else PciCommand.MEMORY
        if not self.bar_sizes[index] or not self.command & enable:
            return None
        return bar & -self.bar_sizes[index]

    def _load(self, offset: int, size: int) -> int:
        if offset % 4 + size > 4:
            return ignore_access(self.stats, "width", offset, size)
        if self.on_read is not None:
            self.on_read(offset, size)
        value = self.get(offset, size)
        if self.interrupt_status and offset <= PciRegister.STATUS < offset + size:
            value |= PciStatus.INTERRUPT << 8 * (PciRegister.STATUS - offset)
        return value

    def _store(self, offset: int, size: int, value: int) -> None:
        if offset % 4 + size > 4:
            ignore_access(self.stats, "width", offset, size)
            return
        mask = int.from_bytes(self.writable[offset : offset + size], "little")
        value = self.get(offset, size) & ~mask | value & mask
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")
        if self.on_write is not None:
            self.on_write(offset, size)


def _bar(index: int) -> int:
    return PciRegister.BASE_ADDRESS_0 + 4 * index


class MsixTable(RegisterBlock):
    """The table and the pending bits of MSI-X, for a memory BAR of their own (6.8.2).

    `message` sends one: an address and 32 bits of data. What comes for a vector that is masked
    waits in its pending bit. Registers here are accessed in 4 or 8 bytes; others are ignored.
    """

    def __init__(
        self,
        config: ConfigSpace,
        bar: int,
        vectors: int,
        message: Callable[[int, int], None],
    ) -> None:
        """Gives the function the capability, which says that all this is in `bar`.

        Raises `UsageError` unless there are from 1 to 2048 vectors.
        """
        if not 1 <= vectors <= MAX_VECTORS:
            raise UsageError(f"MSI-X has 1 to {MAX_VECTORS} vectors, not {vectors}")
        self.vectors = vectors
        self.message = message
        self._pending_start = -(-vectors * MSIX_ENTRY_SIZE // 0x800) * 0x800
        end = self._pending_start + -(-vectors // 64) * 8
        super().__init__(max(0x1000, 1 << (end - 1).bit_length()), config.stats)
        # 6.8.2.1 to 6.8.2.5: message control, where the table is, where the pending bits are
        control = (vectors - 1).to_bytes(2, "little")
        places = bar.to_bytes(4, "little") + (self._pending_start | bar).to_bytes(4, "little")
        capability = config.add_capability(bytes((PciCapability.MSIX, 0)) + control + places)
        self._config = config
        self._control = capability + 2
        config.set(self._control, 2, vectors - 1, writable=_MSIX_CONTROLS)
        self.reset()

    def reset(self) -> None:
        """As after a reset of the function: every vector masked, nothing pending."""
        self._entries = [[0, 0, 0, 1] for _ in range(self.vectors)]
        self._pending: set[int] = set()

    @property
    def enabled(self) -> bool:
        """Whether the function interrupts by messages."""
        return bool(self._config.get(self._control, 2) & MsixControl.ENABLE)

    def send(self, vector: int) -> None:
        """Interrupts by a vector, now or once it is unmasked."""
        all_masked = self._config.get(self._control, 2) & MsixControl.MASK_ALL
        if all_masked or self._entries[vector][3] & 1:
            self._pending.add(vector)
            return
        self._pending.discard(vector)
        low, high, data, _ = self._entries[vector]
        self.message(low & ~3 | high << 32, data)

    def forget_pending(self) -> None:
        """Nothing that waits is sent any more."""
        self._pending.clear()

    def flush(self) -> None:
        """Sends what waits for vectors that are not masked any more."""
        if self.enabled:
            for vector in sorted(self._pending):
                self.send(vector)

    def _load(self, offset: int, size: int) -> int:
        if size != 4 or offset % 4:
            return ignore_access(self.stats, "width", offset, size)
        vector, field = divmod(offset, MSIX_ENTRY_SIZE)
        if vector < self.vectors:
            return self._entries[vector][field // 4]
        first = (offset - self._pending_start) * 8
        if first < 0:
            return 0
        return sum(1 << n - first for n in self._pending if first <= n < first + 32)

    def _store(self, offset: int, size: int, value: int) -> None:
        vector, field = divmod(offset, MSIX_ENTRY_SIZE)
        if size != 4 or offset % 4:
            ignore_access(self.stats, "width", offset, size)
        elif vector >= self.vectors:
            ignore_access(self.stats, "not to be written", offset)
        else:
            self._entries[vector][field // 4] = value & 1 if field == 12 else value
            if vector in self._pending:
                self.flush()
