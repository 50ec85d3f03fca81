"""The block device's numbers and layouts (virtio 1.3, 5.2), as `vq.abi` has those of the rest.

The names of the configuration space's fields are Linux' (linux/virtio_blk.h), whose headers are the
oracle for all of this (`vq.platforms`).
"""

from __future__ import annotations

import ctypes
import enum
import struct

__all__ = [
    "BLK_ID_BYTES",
    "BLK_RANGE",
    "BLK_REQUEST",
    "BLK_UNMAP",
    "SECTOR",
    "BlkConfig",
    "BlkFeature",
    "BlkStatus",
    "BlkType",
]

SECTOR = 512
"""Bytes of a sector, in which the device counts whatever its block size (virtio 1.3, 5.2.4)."""


class BlkFeature(enum.IntEnum):
    """Bit numbers of the block device's features (virtio 1.3, 5.2.3)."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    SECURE_ERASE = 16


class BlkType(enum.IntEnum):
    """`virtio_blk_req.type` (virtio 1.3, 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlkStatus(enum.IntEnum):
    """`virtio_blk_req.status`, the last byte of every request (virtio 1.3, 5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


BLK_REQUEST = struct.Struct("<IIQ")
"""How a request begins: type, 32 reserved bits, sector (virtio 1.3, 5.2.6)."""
BLK_RANGE = struct.Struct("<QII")
"""A range to discard or to write zeroes to: sector, number of sectors, flags."""
BLK_UNMAP = 1
"""Flag of a range: what is to be zero may be deallocated."""
BLK_ID_BYTES = 20
"""Length of the answer to GET_ID; a shorter name is padded with NUL."""


class BlkConfig(ctypes.LittleEndianStructure):
    """`struct virtio_blk_config`, 72 bytes without zones (virtio 1.3, 5.2.4)."""

    _fields_ = (
        ("capacity", ctypes.c_uint64),
        ("size_max", ctypes.c_uint32),
        ("seg_max", ctypes.c_uint32),
        ("geometry", ctypes.c_uint8 * 4),
        ("blk_size", ctypes.c_uint32),
        ("physical_block_exp", ctypes.c_uint8),
        ("alignment_offset", ctypes.c_uint8),
        ("min_io_size", ctypes.c_uint16),
        ("opt_io_size", ctypes.c_uint32),
        ("wce", ctypes.c_uint8),
        ("unused", ctypes.c_uint8),
        ("num_queues", ctypes.c_uint16),
        ("max_discard_sectors", ctypes.c_uint32),
        ("max_discard_seg", ctypes.c_uint32),
        ("discard_sector_alignment", ctypes.c_uint32),
        ("max_write_zeroes_sectors", ctypes.c_uint32),
        ("max_write_zeroes_seg", ctypes.c_uint32),
        ("write_zeroes_may_unmap", ctypes.c_uint8),
        ("unused1", ctypes.c_uint8 * 3),
        ("max_secure_erase_sectors", ctypes.c_uint32),
        ("max_secure_erase_seg", ctypes.c_uint32),
        ("secure_erase_sector_alignment", ctypes.c_uint32),
    )


if (ctypes.sizeof(BlkConfig), BLK_REQUEST.size, BLK_RANGE.size) != (72, 16, 16):
    raise ImportError("the block device's structures have other sizes on this machine")
