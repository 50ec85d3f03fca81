"""QEMU's own devices, access by access: a machine whose processor sleeps, driven from here.

QEMU's qtest protocol reads and writes physical addresses and ports, and tells of interrupts. So
vq's scripted driver can drive the devices of QEMU, and these can be held against vq's own.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from pathlib import Path

from vq.driver import GuestAllocator
from vq.memory import GuestMemory, Region
from vq.testing.contained import ContainedProcess
from vq.testing.requirements import find_program

RAM = 64 << 20
_LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}
_HALT = b"\xf4" * 0x10000  # hlt, wherever the processor begins


class Machine:
    """A running QEMU; `memory` is its RAM, shared. `on_interrupt` hears of lines at its IOAPIC.

    Raises `MissingRequirement` without QEMU.
    """

    def __init__(self, directory: Path, machine: str, *devices: str) -> None:
        qemu = find_program("qemu-system-x86_64", package="qemu-system-x86")
        (directory / "halt.bin").write_bytes(_HALT)
        self.on_interrupt: Callable[[int, bool], None] = lambda number, level: None
        self._raised: list[int] = []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "qtest"))
        listener.listen(1)
        listener.settimeout(30)
        options = ["-machine", f"{machine},accel=tcg,memory-backend=ram", "-m", str(RAM >> 20)]
        ram = f"memory-backend-file,id=ram,size={RAM},share=on,mem-path={directory / 'ram'}"
        options += ["-object", ram, "-bios", str(directory / "halt.bin")]
        options += ["-nodefaults", "-display", "none", "-qtest-log", "none"]
        options += ["-qtest", f"unix:{directory / 'qtest'}"]
        options += ["-global", "virtio-mmio.force-legacy=false"]
        log = directory / "qemu.log"
        self.memory = GuestMemory([Region.from_file(directory / "ram", size=RAM, create=True)])
        with listener:
            self._process = ContainedProcess([qemu, *options, *devices], lifetime=100, output=log)
            try:
                self._socket, _ = listener.accept()
            except TimeoutError:
                self._process.close()
                raise AssertionError(f"QEMU does not come up: {log.read_text()}") from None
        self._socket.settimeout(60)
        self._received = b""
        self.command("irq_intercept_in ioapic")

    def command(self, text: str) -> str:
        """Sends a command; returns the answer, without its ``OK``."""
        self._socket.sendall(text.encode() + b"\n")
        while not (answer := self._line()).startswith("OK"):
            self._note(answer)
        self._dispatch()
        return answer.removeprefix("OK").strip()

    def allocator(self) -> GuestAllocator:
        """All of the RAM but its first page: at address 0 QEMU takes a queue for none at all."""
        allocator = GuestAllocator(self.memory)
        allocator.allocate(0x1000)
        return allocator

    def poll(self, seconds: float) -> None:
        """Waits for interrupts."""
        while b"\n" in self._received or select.select([self._socket], [], [], seconds)[0]:
            self._note(self._line())
            self._dispatch()
            seconds = 0

    def _line(self) -> str:
        while b"\n" not in self._received:
            data = self._socket.recv(4096)
            assert data, "QEMU is gone"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def _note(self, line: str) -> None:
        """A line that falls is told at once; one that rises once QEMU has answered."""
        words = line.split()
        assert words[:1] == ["IRQ"], f"QEMU says {line!r}"
        number, level = int(words[2]), words[1] == "raise"
        if level:
            self._raised.append(number)
            return
        self._raised = [other for other in self._raised if other != number]
        self.on_interrupt(number, False)

    def _dispatch(self) -> None:
        while self._raised:
            self.on_interrupt(self._raised.pop(0), True)

    def close(self) -> None:
        self._socket.close()
        self._process.close()
        self.memory.close()


class MemoryWindow:
    """Registers at a physical address, which may be known only later."""

    def __init__(self, machine: Machine, base: Callable[[], int]) -> None:
        self.machine = machine
        self.base = base

    def read(self, offset: int, size: int, /) -> int:
        return int(self.machine.command(f"read{_LETTERS[size]} {self.base() + offset:#x}"), 0)

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.machine.command(f"write{_LETTERS[size]} {self.base() + offset:#x} {value:#x}")


class PciConfigWindow:
    """The configuration space of a function on bus 0, by a PC's ports."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self.machine = machine
        self.slot = slot

    def _port(self, offset: int) -> int:
        self.machine.command(f"outl 0xcf8 {0x8000_0000 | self.slot << 11 | offset & ~3:#x}")
        return 0xCFC + (offset & 3)

    def read(self, offset: int, size: int, /) -> int:
        port = self._port(offset)
        return int(self.machine.command(f"in{_LETTERS[size]} {port:#x}"), 0)

    def write(self, offset: int, size: int, value: int, /) -> None:
        port = self._port(offset)
        self.machine.command(f"out{_LETTERS[size]} {port:#x} {value:#x}")
