"""The socket device's numbers and layouts (virtio 1.3, 5.10), as `vq.abi` has those of the rest."""

from __future__ import annotations

import ctypes
import enum
import struct

__all__ = [
    "VSOCK_CID_HOST",
    "VSOCK_HDR",
    "VSOCK_HDR_SIZE",
    "VsockConfig",
    "VsockEvent",
    "VsockEventId",
    "VsockFeature",
    "VsockHdr",
    "VsockOp",
    "VsockShutdown",
    "VsockType",
]

VSOCK_CID_HOST = 2
VSOCK_HDR_SIZE = 44


class VsockFeature(enum.IntEnum):
    """Bit numbers of the socket device's features (virtio 1.3, 5.10.3)."""

    STREAM = 0
    SEQPACKET = 1
    NO_IMPLIED_STREAM = 2


class VsockType(enum.IntEnum):
    """`virtio_vsock_hdr.type` (virtio 1.3, 5.10.6.2)."""

    STREAM = 1
    SEQPACKET = 2


class VsockOp(enum.IntEnum):
    """`virtio_vsock_hdr.op` (virtio 1.3, 5.10.6)."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class VsockShutdown(enum.IntFlag):
    """`virtio_vsock_hdr.flags` of a SHUTDOWN (virtio 1.3, 5.10.6.5)."""

    NONE = 0
    RECEIVE = 1
    SEND = 2
    BOTH = 3


class VsockEventId(enum.IntEnum):
    """`virtio_vsock_event.id` (virtio 1.3, 5.10.6.7)."""

    TRANSPORT_RESET = 0


class VsockConfig(ctypes.LittleEndianStructure):
    """`struct virtio_vsock_config`, 8 bytes (virtio 1.3, 5.10.4)."""

    _fields_ = (("guest_cid", ctypes.c_uint64),)
    _pack_ = 1


class VsockHdr(ctypes.LittleEndianStructure):
    """`struct virtio_vsock_hdr`, 44 bytes (virtio 1.3, 5.10.6)."""

    _fields_ = (
        ("src_cid", ctypes.c_uint64),
        ("dst_cid", ctypes.c_uint64),
        ("src_port", ctypes.c_uint32),
        ("dst_port", ctypes.c_uint32),
        ("len", ctypes.c_uint32),
        ("type", ctypes.c_uint16),
        ("op", ctypes.c_uint16),
        ("flags", ctypes.c_uint32),
        ("buf_alloc", ctypes.c_uint32),
        ("fwd_cnt", ctypes.c_uint32),
    )
    _pack_ = 1


VSOCK_HDR = struct.Struct("<QQIIIHHIII")
"""The same ten fields for the data path, where a ctypes structure costs too much."""


class VsockEvent(ctypes.LittleEndianStructure):
    """`struct virtio_vsock_event`, 4 bytes (virtio 1.3, 5.10.6.7)."""

    _fields_ = (("id", ctypes.c_uint32),)
    _pack_ = 1


for _structure, _size in ((VsockConfig, 8), (VsockHdr, VSOCK_HDR_SIZE), (VsockEvent, 4)):
    if ctypes.sizeof(_structure) != _size:
        raise ImportError(f"{_structure.__name__} is not {_size} bytes on this machine")
if VSOCK_HDR.size != VSOCK_HDR_SIZE:
    raise ImportError("the header's format string does not make 44 bytes")
