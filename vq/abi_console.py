"""The console device's numbers and layouts (virtio 1.3, 5.3), as `vq.abi` has those of the rest."""

from __future__ import annotations

import ctypes
import enum

__all__ = ["ConsoleConfig", "ConsoleControl", "ConsoleEvent", "ConsoleFeature"]


class ConsoleFeature(enum.IntEnum):
    """Bit numbers of the console device's features (virtio 1.3, 5.3.3)."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2


class ConsoleEvent(enum.IntEnum):
    """`virtio_console_control.event` (virtio 1.3, 5.3.6.2)."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class ConsoleConfig(ctypes.LittleEndianStructure):
    """`struct virtio_console_config`, 12 bytes (virtio 1.3, 5.3.4)."""

    _fields_ = (
        ("cols", ctypes.c_uint16),
        ("rows", ctypes.c_uint16),
        ("max_nr_ports", ctypes.c_uint32),
        ("emerg_wr", ctypes.c_uint32),
    )


class ConsoleControl(ctypes.LittleEndianStructure):
    """`struct virtio_console_control`, 8 bytes (virtio 1.3, 5.3.6.2)."""

    _fields_ = (("id", ctypes.c_uint32), ("event", ctypes.c_uint16), ("value", ctypes.c_uint16))


for _structure, _size in ((ConsoleConfig, 12), (ConsoleControl, 8)):
    if ctypes.sizeof(_structure) != _size:
        raise ImportError(f"{_structure.__name__} is not {_size} bytes on this machine")
