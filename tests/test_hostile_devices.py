"""The battery of hostile drivers against the devices that ship beside the network device."""

from __future__ import annotations

import os
import struct
import tempfile

from block_guest import DISCARD, FLUSH, IN, OK, OUT, SECTOR, WRITE_ZEROES

from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.devices.entropy import EntropyDevice
from vq.testing.hostile import Case, Desc, Stage, hostile_driver_battery
from vq.testing.hostile_cases import W
from vq.testing.wiring import Wired


def make_disk() -> BlockDevice:
    """With an image of eight sectors that nobody else has."""
    fd, path = tempfile.mkstemp(prefix="vq-hostile-")
    try:
        os.truncate(fd, 8 * SECTOR)
        return BlockDevice(Image(path), queues=2, queue_size=16)
    finally:
        os.close(fd)
        os.unlink(path)


def use_disk(wired: Wired) -> None:
    for queue in range(2):
        data = os.urandom(SECTOR)
        out = struct.pack("<IIQ", OUT, 0, 3) + data
        assert wired.request(queue, out, 1) == bytes([OK])
        back = wired.request(queue, struct.pack("<IIQ", IN, 0, 3), SECTOR + 1)
        assert back == data + bytes([OK])


def draw(wired: Wired) -> None:
    assert len(wired.request(0, b"", 64)) == 64


def with_header(name: str, kind: int, sector: int, *more: int, status: int = 1) -> Case:
    """A request of one kind whose data is `more` buffers: their lengths, negative to write to."""

    def play(stage: Stage) -> None:
        stage.up()
        place = stage.buffer()
        stage.memory.write(place, struct.pack("<IIQ", kind, 0, sector))
        buffers = [Desc(place, 16)]
        buffers += [Desc(stage.buffer(abs(size)), abs(size), W if size < 0 else 0) for size in more]
        buffers += [Desc(stage.buffer(), 1, W)] * status
        stage.chain(*buffers)
        stage.kick()

    return Case(name, play)


OWN = [
    with_header("5.2.6: a request of no known type", 77, 0, 100, -100),
    with_header("5.2.6.1: a read that ends behind the disk", IN, 7, -1024),
    with_header("5.2.6.1: a read from beyond the end of all numbers", IN, (1 << 64) - 1, -512),
    with_header("5.2.6.1: a write that ends behind the disk", OUT, 7, 1024),
    with_header("5.2.6.1: a read of no whole sectors", IN, 0, -511),
    with_header("5.2.6.1: a write of no whole sectors", OUT, 0, 513),
    with_header("5.2.6: a read into bytes that the device must not write", IN, 0, 512),
    with_header("5.2.6: a write from bytes that the device must not read", OUT, 0, -512),
    with_header("5.2.6.1: a discard without a range", DISCARD, 0),
    with_header("5.2.6.1: a discard of a range that is cut off", DISCARD, 0, 15),
    with_header("5.2.6.1: zeroes where the guest's memory says so", WRITE_ZEROES, 0, 16),
    with_header("5.2.6: a flush of much", FLUSH, 0, 1000, -1000),
    with_header("5.2.6: a read without a status", IN, 0, -512, status=0),
    with_header("5.2.6: a write without a status", OUT, 0, 512, status=0),
]

test_block_device = hostile_driver_battery(make_disk, use_disk, more=OWN)
test_entropy_device = hostile_driver_battery(EntropyDevice, draw)
