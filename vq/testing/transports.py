"""A device wired to a scripted driver over any transport that needs no second process.

The transport that `connect` returns is for `vq.driver.Driver` and the drivers on top of it.
"""

from __future__ import annotations

from vq.device import Device
from vq.driver import Transport
from vq.driver_mmio import MmioTransport
from vq.driver_pci import PciTransport
from vq.errors import UsageError
from vq.mmio import MmioRegisters
from vq.pci import PciFunction

__all__ = ["TRANSPORTS", "connect"]

TRANSPORTS = ("direct", "mmio", "pci", "pci-msix")
"""The names that `connect` knows."""


def connect(device: Device, over: str) -> Transport:
    """What a driver needs to reach `device`: by direct calls, or through registers.

    Raises `UsageError` for a name that is not in `TRANSPORTS`.
    """
    match over:
        case "direct":
            return device
        case "mmio":
            registers = MmioRegisters(device)
            mmio = MmioTransport(registers)
            registers.interrupt = mmio.interrupt
            return mmio
        case "pci":
            function = PciFunction(device, io=True)
            pci = PciTransport(function.config, function.bars)
            function.interrupt = pci.interrupt
            return pci
        case "pci-msix":
            function = PciFunction(device, message=lambda address, data: pci.message(address, data))
            pci = PciTransport(function.config, function.bars, msix=True)
            function.interrupt = pci.interrupt
            return pci
    raise UsageError(f"no transport {over!r}: there are {', '.join(TRANSPORTS)}")
