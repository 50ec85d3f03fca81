"""A guest that reads and writes a device's registers, in MMIO and on PCI, as no driver does."""

from __future__ import annotations

import struct

from fuzz.guests import GUEST_MAC
from fuzz.inputs import Input
from vq.abi import Status
from vq.driver import Driver
from vq.driver_mmio import MmioTransport
from vq.driver_pci import PciTransport
from vq.errors import DriverError
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.net import NetDevice
from vq.pci import PciFunction
from vq.registers import RegisterBlock

_MEMORY = GuestMemory.allocate((0x1000, 0x20000))
_VALUES = (0, 1, 2, 3, 4, 8, 11, 15, 16, 0x80, 256, 0xFFFF, 0xFFFFFFFF, 0x2000, 0x3000, 0x4000)
_WIDTHS = (4, 4, 4, 1, 2, 8, 3, 0)


def run(data: bytes) -> None:
    """Accesses of every kind; then a driver that behaves brings the device up."""
    source = Input(data)
    for region in _MEMORY.regions:
        region.view[:] = bytes(region.size)
    device = NetDevice(LoopbackLink(), mac=GUEST_MAC, memory=_MEMORY, queue_size=16)
    lines: list[object] = []
    mmio = source.chance(2)
    blocks: list[RegisterBlock]
    if mmio:
        registers = MmioRegisters(device, lines.append)
        blocks = [registers]
    else:
        function = PciFunction(device, lines.append, lambda *message: lines.append(message))
        blocks = [function.config, *function.bars.values()]
    if source.chance(2):
        _usual_start(device, source)
    for _ in range(200):
        if not source.more:
            break
        block = source.pick(blocks)
        offset = source.pick((source.u8, source.u16 % (block.length + 16), 0x30, 0x44, 0x70, 0x14))
        size = source.pick(_WIDTHS)
        if source.chance(3):
            value = block.read(offset, size)
            assert 0 <= value < 1 << 8 * size or not value
        elif source.chance(16):
            place = 0x1000 + source.u16 % 0x8000
            _MEMORY.write(place, struct.pack("<QIHH", source.u16, source.u8, source.u8 % 8, 1))
        else:
            block.write(offset, size, source.pick((*_VALUES, source.number(max(1, size)))))
        fault = device.fault
        assert fault is None or isinstance(fault, DriverError), repr(fault)
    (registers if mmio else function).write_status(0)
    assert device.status == 0 and device.fault is None
    if not mmio:
        function.reset()
    transport = MmioTransport(registers) if mmio else PciTransport(function.config, function.bars)
    driver = Driver(transport, _MEMORY, 0, queue_size=16)
    driver.probe()
    assert device.status & Status.DRIVER_OK and not device.status & Status.NEEDS_RESET


def _usual_start(device: NetDevice, source: Input) -> None:
    """The device is up, so that what follows meets a device at work."""
    device.write_status(3)
    device.accept_features(1 << 32 | (device.device_features if source.chance(2) else 0))
    device.write_status(11)
    for index in range(3):
        base = 0x2000 + 0x1000 * index
        device.setup_queue(index, size=16, desc=base, avail=base + 0x400, used=base + 0x800)
    device.write_status(15)
