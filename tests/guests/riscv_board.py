"""A RISC-V board on Unicorn for firmware that is not ours: U-Boot, with drivers of its own.

As much of QEMU's ``virt`` machine as U-Boot needs: RAM, a serial port, a clock, virtio-mmio, and a
PCI bus by ECAM. Unicorn has no interrupts to give, and U-Boot needs none: it polls.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from vq.device import Device
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.pci import PciFunction
from vq.testing.requirements import unmet
from vq.vhost_user import unwatch_device, watch_device

U_BOOT = Path("/usr/lib/u-boot/qemu-riscv64/u-boot.bin")
RAM, RAM_SIZE = 0x8000_0000, 64 << 20
DEVICE_TREE = RAM + (32 << 20)
CLINT, UART, VIRTIO = 0x0200_0000, 0x1000_0000, 0x1000_1000
ECAM, ECAM_SIZE = 0x3000_0000, 1 << 20  # bus 0 alone
PCI_MEMORY, PCI_MEMORY_SIZE = 0x4000_0000, 16 << 20
MTIME, TICKS = 0xBFF8, 10_000_000
PROMPT = b"\n=> "
PATIENCE = 60
"""Seconds for all that a test has U-Boot do."""

Tree: TypeAlias = dict[str, Any]


class Board:
    """A board with `mmio` devices and `pci` devices on it, and U-Boot in its memory.

    Skips the test without Unicorn and U-Boot.
    """

    def __init__(self, mmio: Sequence[Device] = (), pci: Sequence[Device] = ()) -> None:
        unicorn = pytest.importorskip("unicorn", reason="needs unicorn (the extra examples)")
        from unicorn import riscv_const

        if not U_BOOT.exists():
            unmet("needs U-Boot: install the package u-boot-qemu")
        self.output = bytearray()
        self.functions: list[PciFunction] = []
        self._input = bytearray(b" ")  # any key stops the automatic boot
        self._commands: list[str] = []
        self._line_control = 0
        self._lock = threading.Lock()
        self._devices = [*mmio, *pci]
        self.memory = GuestMemory.allocate((RAM, RAM_SIZE))
        self._processor = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
        self._processor.mem_map_ptr(
            RAM, RAM_SIZE, unicorn.UC_PROT_ALL, self.memory.hvaddr(RAM, RAM_SIZE)
        )
        self._map(CLINT, 0x10000, self._read_clock, lambda offset, size, value: None)
        self._map(UART, 0x1000, self._read_uart, self._write_uart)
        for number, device in enumerate(mmio):
            device.memory = self.memory
            registers = MmioRegisters(device)
            self._map(VIRTIO + 0x1000 * number, 0x1000, registers.read, registers.write)
        for device in pci:
            device.memory = self.memory
            self.functions.append(PciFunction(device))
        self._map(ECAM, ECAM_SIZE, self._read_ecam, self._write_ecam)
        self._map(PCI_MEMORY, PCI_MEMORY_SIZE, self._read_bar, self._write_bar)
        self.memory.write(RAM, U_BOOT.read_bytes())
        self.memory.write(DEVICE_TREE, flatten(device_tree(len(mmio))))
        self._processor.reg_write(riscv_const.UC_RISCV_REG_A0, 0)
        self._processor.reg_write(riscv_const.UC_RISCV_REG_A1, DEVICE_TREE)

    def run(self, *commands: str) -> str:
        """Boots, types the commands at U-Boot's prompt, and returns all that it has printed.

        The devices' own descriptors are served by a second thread meanwhile. To be called once.
        """
        self._commands = list(commands)
        loop, over = Loop(), threading.Event()
        for device in self._devices:
            watch_device(device, loop)

        def serve() -> None:
            while not over.is_set():
                with self._lock:
                    loop.run_once(0)
                time.sleep(0.0005)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            self._processor.emu_start(RAM, 0, timeout=PATIENCE * 1_000_000)
        finally:
            over.set()
            thread.join()
            for device in self._devices:
                unwatch_device(device, loop)
            loop.close()
        text = self.output.decode(errors="replace").replace("\r", "")
        assert not self._commands and text.endswith("=> "), text
        return text

    def _map(
        self,
        address: int,
        length: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        def locked_read(_: object, offset: int, size: int, __: object) -> int:
            with self._lock:
                return read(offset, size)

        def locked_write(_: object, offset: int, size: int, value: int, __: object) -> None:
            with self._lock:
                write(offset, size, value)

        self._processor.mmio_map(address, length, locked_read, None, locked_write, None)

    # --- the board's own devices ------------------------------------------------------------------

    def _read_clock(self, offset: int, size: int) -> int:
        """The time register of the CLINT; nothing else of it is needed."""
        if not MTIME <= offset < MTIME + 8:
            return 0
        ticks = int(time.monotonic() * TICKS) >> 8 * (offset - MTIME)
        return ticks & (1 << 8 * size) - 1

    def _read_uart(self, offset: int, size: int) -> int:
        """A 16550: the receive buffer, and the line status (data ready, transmitter empty)."""
        if offset == 0:
            return self._input.pop(0) if self._input else 0
        return 0x60 | bool(self._input) if offset == 5 else 0

    def _write_uart(self, offset: int, size: int, value: int) -> None:
        if offset == 3:
            self._line_control = value
        if offset != 0 or self._line_control & 0x80:  # the divisor's latch
            return
        self.output.append(value & 0xFF)
        if self.output.endswith(PROMPT):
            if self._commands:
                self._input += self._commands.pop(0).encode() + b"\n"
            else:
                self._processor.emu_stop()

    # --- PCI --------------------------------------------------------------------------------------

    def _function(self, offset: int) -> PciFunction | None:
        slot, function = offset >> 15, offset >> 12 & 7
        return self.functions[slot] if not function and slot < len(self.functions) else None

    def _read_ecam(self, offset: int, size: int) -> int:
        function = self._function(offset)
        if function is None:
            return (1 << 8 * size) - 1
        return function.config.read(offset & 0xFFF, size)

    def _write_ecam(self, offset: int, size: int, value: int) -> None:
        function = self._function(offset)
        if function is not None:
            function.config.write(offset & 0xFFF, size, value)

    def _bar(self, offset: int) -> tuple[Any, int] | None:
        address = PCI_MEMORY + offset
        for function in self.functions:
            for number, bar in function.bars.items():
                base = function.config.bar_address(number)
                if base is not None and base <= address < base + bar.length:
                    return bar, address - base
        return None

    def _read_bar(self, offset: int, size: int) -> int:
        found = self._bar(offset)
        return (1 << 8 * size) - 1 if found is None else found[0].read(found[1], size)

    def _write_bar(self, offset: int, size: int, value: int) -> None:
        found = self._bar(offset)
        if found is not None:
            found[0].write(found[1], size, value)


# --- what the board tells of itself --------------------------------------------------------------


def device_tree(virtio: int) -> Tree:
    """The board's device tree; a tuple is several values, a number is a cell of 32 bits."""
    processor = {
        "device_type": "cpu",
        "reg": 0,
        "status": "okay",
        "compatible": "riscv",
        "riscv,isa": "rv64imafdc",
        "interrupt-controller": {
            "#interrupt-cells": 1,
            "interrupt-controller": (),
            "compatible": "riscv,cpu-intc",
            "phandle": 1,
        },
    }
    soc: Tree = {
        "#address-cells": 2,
        "#size-cells": 2,
        "compatible": "simple-bus",
        "ranges": (),
        f"clint@{CLINT:x}": {
            "compatible": ("sifive,clint0", "riscv,clint0"),
            "reg": (0, CLINT, 0, 0x10000),
            "interrupts-extended": (1, 3, 1, 7),
        },
        f"serial@{UART:x}": {
            "compatible": "ns16550a",
            "reg": (0, UART, 0, 0x100),
            "clock-frequency": 3686400,
        },
        f"pci@{ECAM:x}": {
            "compatible": "pci-host-ecam-generic",
            "device_type": "pci",
            "#address-cells": 3,
            "#size-cells": 2,
            "reg": (0, ECAM, 0, ECAM_SIZE),
            "bus-range": (0, 0),
            "ranges": (0x0200_0000, 0, PCI_MEMORY, 0, PCI_MEMORY, 0, PCI_MEMORY_SIZE),
        },
    }
    for number in range(virtio):
        address = VIRTIO + 0x1000 * number
        soc[f"virtio_mmio@{address:x}"] = {
            "compatible": "virtio,mmio",
            "reg": (0, address, 0, 0x1000),
        }
    return {
        "#address-cells": 2,
        "#size-cells": 2,
        "compatible": "riscv-virtio",
        "chosen": {"stdout-path": f"/soc/serial@{UART:x}"},
        f"memory@{RAM:x}": {"device_type": "memory", "reg": (0, RAM, 0, RAM_SIZE)},
        "cpus": {
            "#address-cells": 1,
            "#size-cells": 0,
            "timebase-frequency": TICKS,
            "cpu@0": processor,
        },
        "soc": soc,
    }


def flatten(tree: Tree) -> bytes:
    """A device tree as a blob (Devicetree Specification 0.4, 5)."""
    body, strings = bytearray(), bytearray()

    def encode(value: object) -> bytes:
        if isinstance(value, int):
            return struct.pack(">I", value)
        if isinstance(value, str):
            return value.encode() + b"\0"
        assert isinstance(value, tuple)
        return b"".join(map(encode, value))

    def add(data: bytes) -> None:
        body.extend(data + bytes(-len(data) % 4))

    def add_node(name: str, node: Tree) -> None:
        add(struct.pack(">I", 1) + name.encode() + b"\0")
        for key, value in node.items():
            if not isinstance(value, dict):
                data = encode(value)
                add(struct.pack(">III", 3, len(data), len(strings)) + data)
                strings.extend(key.encode() + b"\0")
        for key, value in node.items():
            if isinstance(value, dict):
                add_node(key, value)
        add(struct.pack(">I", 2))

    add_node("", tree)
    add(struct.pack(">I", 9))
    reservations, header = bytes(16), 40
    structure = header + len(reservations)
    end = structure + len(body)
    fields = (end + len(strings), structure, end, header, 17, 16, 0, len(strings), len(body))
    return struct.pack(">10I", 0xD00D_FEED, *fields) + reservations + bytes(body) + bytes(strings)
