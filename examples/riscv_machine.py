"""A small RISC-V machine with two virtio devices, and a program in it that drives them.

The processor is emulated by Unicorn (``pip install 'vq[examples]'``); the devices are vq's, behind
virtio-mmio registers as on QEMU's ``virt`` machine. The guest has no operating system: a program of
a hundred instructions probes both devices, has 32 bytes filled by the entropy device, and prints
them through the console::

    $ python examples/riscv_machine.py
    9f0c...

What to take from here for a machine of your own is `Machine`: guest memory that the emulator and vq
share, registers mapped by `read` and `write`, and an interrupt line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from riscv_assembler import assemble
from unicorn import UC_ARCH_RISCV, UC_MODE_RISCV64, UC_PROT_ALL, Uc
from unicorn.riscv_const import (
    UC_RISCV_REG_MCAUSE,
    UC_RISCV_REG_MEPC,
    UC_RISCV_REG_MIE,
    UC_RISCV_REG_MSTATUS,
    UC_RISCV_REG_MTVEC,
    UC_RISCV_REG_PC,
)

from vq import DeviceModel, GuestMemory, Request
from vq.abi import DeviceId
from vq.devices.entropy import EntropyDevice
from vq.mmio import MmioRegisters

RAM, RAM_SIZE = 0x4000_0000, 0x10_0000
FINISHER = 0x0010_0000
PASS, FAIL = 0x5555, 0x3333
SLOTS = (0x1000_1000, 0x1000_2000)
"""Where the registers of the devices are: a page for each."""
PAGE = 0x1000

MIE, MPIE, MPP_MACHINE = 1 << 3, 1 << 7, 3 << 11  # in mstatus
MACHINE_EXTERNAL = 11  # a bit of mie, and the cause of the interrupt
SLICE = 100
"""Instructions after which an interrupt is taken at the latest."""
WFI = bytes.fromhex("73005010")


class Console(DeviceModel):
    """The output half of a console (virtio 1.3, 5.3): hands on what the guest prints."""

    device_id = DeviceId.CONSOLE

    def __init__(self, output: Callable[[bytes], object]) -> None:
        super().__init__(queues=[("receive", 64, None), ("transmit", 64, self._print)])
        self._output = output

    def _print(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._output(request.reader.read())
            request.complete()


class Machine:
    """One processor, RAM, virtio devices, and a register that ends the run."""

    def __init__(self, program: bytes, devices: Sequence[DeviceModel]) -> None:
        self.devices = devices
        self.memory = GuestMemory.allocate((RAM, RAM_SIZE))
        self.processor = Uc(UC_ARCH_RISCV, UC_MODE_RISCV64)
        # The emulator works in the same bytes as the devices: nothing is copied.
        self.processor.mem_map_ptr(RAM, RAM_SIZE, UC_PROT_ALL, self.memory.hvaddr(RAM, RAM_SIZE))
        self.lines = [False] * len(devices)
        self.interrupts = 0
        self.finished = 0
        for number, device in enumerate(devices):
            device.memory = self.memory
            registers = MmioRegisters(device, lambda up, n=number: self._set_line(n, up))
            self._map(SLOTS[number], registers.read, registers.write)
        self._map(FINISHER, lambda offset, size: 0, self._finish)
        self.memory.write(RAM, program)

    def _map(
        self,
        address: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        self.processor.mmio_map(
            address,
            PAGE,
            lambda _, offset, size, __: read(offset, size),
            None,
            lambda _, offset, size, value, __: write(offset, size, value),
            None,
        )

    def _set_line(self, number: int, up: bool) -> None:
        self.lines[number] = up

    def _finish(self, offset: int, size: int, value: int) -> None:
        self.finished = value

    def run(self, slices: int = 1000) -> int:
        """Runs the program to its end; returns what it wrote there, 0 when it did not get there."""
        pc = RAM
        for _ in range(slices):
            self.processor.emu_start(pc, 0, count=SLICE)  # ends early when the guest waits (wfi)
            pc = self.processor.reg_read(UC_RISCV_REG_PC)
            if self.finished:
                break
            if not any(self.lines) and self.memory.read(pc - 4, 4) == WFI:
                for device in self.devices:
                    device.settle()  # what threads have begun for it; see `DeviceModel.run_in`
            if any(self.lines):
                pc = self._interrupt(pc)
        return self.finished

    def _interrupt(self, pc: int) -> int:
        """Takes an external interrupt if the guest lets it; returns where it goes on."""
        status = self.processor.reg_read(UC_RISCV_REG_MSTATUS)
        enabled = self.processor.reg_read(UC_RISCV_REG_MIE) >> MACHINE_EXTERNAL & 1
        if not status & MIE or not enabled:
            return pc
        self.interrupts += 1
        self.processor.reg_write(UC_RISCV_REG_MEPC, pc)
        self.processor.reg_write(UC_RISCV_REG_MCAUSE, 1 << 63 | MACHINE_EXTERNAL)
        self.processor.reg_write(UC_RISCV_REG_MSTATUS, status & ~MIE | MPIE | MPP_MACHINE)
        return self.processor.reg_read(UC_RISCV_REG_MTVEC)


PROGRAM = """
start:
    li   t0, trap
    csrw mtvec, t0
    li   t0, 0x800            # external interrupts of the machine
    csrw mie, t0
    csrsi mstatus, 8          # interrupts on

    li   a0, entropy          # registers
    li   a1, 0                # queue
    li   a2, rings            # memory for it: descriptors, +0x100 available, +0x200 used
    li   a3, 4                # device type
    call probe
    li   a3, random           # buffer
    li   a4, 32               # length
    li   a5, 2                # the device may write it
    call transfer
    bne  a4, a6, fail         # all of it was written

    li   s0, random           # as text, in hexadecimal
    li   s1, text
    addi s2, s1, 64
digits:
    lbu  t0, 0(s0)
    srli t1, t0, 4
    call digit
    andi t1, t0, 15
    call digit
    addi s0, s0, 1
    bltu s1, s2, digits
    li   t1, 10
    sb   t1, 0(s1)

    li   a0, console
    li   a1, 1
    li   a2, rings
    addi a2, a2, 0x400
    li   a3, 3
    call probe
    li   a3, text
    li   a4, 65
    li   a5, 0
    call transfer

    li   t0, finisher
    li   t1, 0x5555
    sw   t1, 0(t0)
    wfi

fail:
    li   t0, finisher
    li   t1, 0x3333
    sw   t1, 0(t0)
    wfi

digit:                        # appends t1 at s1
    addi t1, t1, 48
    li   t2, 58
    bltu t1, t2, decimal
    addi t1, t1, 39
decimal:
    sb   t1, 0(s1)
    addi s1, s1, 1
    ret

probe:                        # virtio 1.3, 3.1.1 and 4.2.3
    lw   t0, 0x000(a0)        # MagicValue
    li   t1, 0x74726976
    bne  t0, t1, fail
    lw   t0, 0x004(a0)        # Version
    li   t1, 2
    bne  t0, t1, fail
    lw   t0, 0x008(a0)        # DeviceID
    bne  t0, a3, fail
    sw   zero, 0x070(a0)      # Status: reset
    lw   t0, 0x070(a0)
    bnez t0, fail
    li   t0, 1                # ACKNOWLEDGE
    sw   t0, 0x070(a0)
    li   t0, 3                # DRIVER
    sw   t0, 0x070(a0)
    li   t1, 1
    sw   t1, 0x014(a0)        # DeviceFeaturesSel
    lw   t0, 0x010(a0)        # DeviceFeatures: VERSION_1 is there
    andi t0, t0, 1
    beqz t0, fail
    sw   t1, 0x024(a0)        # DriverFeaturesSel
    sw   t1, 0x020(a0)        # DriverFeatures: VERSION_1
    sw   zero, 0x024(a0)
    sw   zero, 0x020(a0)      # and no other
    li   t0, 11               # FEATURES_OK
    sw   t0, 0x070(a0)
    lw   t1, 0x070(a0)
    bne  t0, t1, fail
    sw   a1, 0x030(a0)        # QueueSel
    lw   t0, 0x044(a0)        # QueueReady
    bnez t0, fail
    lw   t0, 0x034(a0)        # QueueSizeMax
    li   t1, 4
    bltu t0, t1, fail
    sw   t1, 0x038(a0)        # QueueSize
    sw   a2, 0x080(a0)        # QueueDesc
    sw   zero, 0x084(a0)
    addi t0, a2, 0x100
    sw   t0, 0x090(a0)        # QueueDriver
    sw   zero, 0x094(a0)
    addi t0, a2, 0x200
    sw   t0, 0x0a0(a0)        # QueueDevice
    sw   zero, 0x0a4(a0)
    li   t0, 1
    sw   t0, 0x044(a0)        # QueueReady
    li   t0, 15               # DRIVER_OK
    sw   t0, 0x070(a0)
    ret

transfer:                     # one buffer, in descriptor 0; bytes written come back in a6
    sd   a3, 0(a2)
    sw   a4, 8(a2)
    sh   a5, 12(a2)
    lhu  t0, 0x102(a2)        # available index
    andi t1, t0, 3
    slli t1, t1, 1
    add  t1, t1, a2
    sh   zero, 0x104(t1)
    fence
    addi t0, t0, 1
    sh   t0, 0x102(a2)
    fence
    sw   a1, 0x050(a0)        # QueueNotify
wait:
    csrci mstatus, 8          # no interrupt between looking and waiting
    lhu  t1, 0x202(a2)        # used index
    beq  t0, t1, done
    wfi
    csrsi mstatus, 8          # what came is taken here
    j    wait
done:
    csrsi mstatus, 8
    lw   a6, 0x208(a2)        # of the first used element
    ret

trap:                         # t3 to t6 are its own
    li   t3, entropy
    lw   t4, 0x060(t3)        # InterruptStatus
    sw   t4, 0x064(t3)        # InterruptACK
    li   t3, console
    lw   t4, 0x060(t3)
    sw   t4, 0x064(t3)
    mret
"""

SYMBOLS = {
    "entropy": SLOTS[0],
    "console": SLOTS[1],
    "finisher": FINISHER,
    "rings": RAM + 0x10000,
    "random": RAM + 0x20000,
    "text": RAM + 0x21000,
}


def build(output: Callable[[bytes], object], entropy: DeviceModel | None = None) -> Machine:
    """The machine with its program and devices; `output` gets what the guest prints."""
    program = assemble(PROGRAM, RAM, SYMBOLS)
    return Machine(program, [entropy or EntropyDevice(), Console(output)])


def main() -> int:
    """Runs the machine; 0 when the program came to its end."""
    machine = build(lambda data: sys.stdout.write(data.decode()))
    return 0 if machine.run() == PASS else 1


if __name__ == "__main__":
    sys.exit(main())
