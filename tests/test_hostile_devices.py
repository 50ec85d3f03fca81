"""The battery of hostile drivers against the devices that ship beside the network device."""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from block_guest import DISCARD, FLUSH, IN, OK, OUT, SECTOR, WRITE_ZEROES

from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.devices.entropy import EntropyDevice
from vq.model import DeviceModel
from vq.request import Request
from vq.testing import wiring
from vq.testing.hostile import Case, Desc, DeviceBroke, Stage, hostile_driver_battery, run_case
from vq.testing.hostile_cases import CASES, W
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


# --- devices that finish later -------------------------------------------------------------------


class Later(DeviceModel):
    """Echoes, well after the handler has returned: in threads and in coroutines."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__(
            queues=[("threads", 16, self.in_threads), ("coroutines", 16, self.one)],
        )
        self.executor = ThreadPoolExecutor(2)

    def in_threads(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.run_in(self.executor, self.work, request)

    def work(self, request: Request) -> None:
        time.sleep(0.01)
        self.answer(request)

    async def one(self, request: Request) -> None:
        await asyncio.sleep(0.01)
        self.answer(request)

    def answer(self, request: Request) -> None:
        request.writer.write(request.reader.read()[: request.writer.remaining])

    def close(self) -> None:
        super().close()
        self.executor.shutdown()


def echo_later(wired: Wired) -> None:
    assert wired.request(0, b"abc", 5) == b"abc"
    assert wired.request(1, b"abc", 5) == b"abc"


# Those that fill a queue, and those that take buffers back.
LATE = (
    "2.4: after a reset the buffers",
    "2.6.1: buffers of a queue",
    "2.7.4.1: nothing is assumed about how a message is cut (16 of",
    "2.7.5.2: a chain takes as many",
)
LATE_CASES = [case for case in CASES if case.name.startswith(LATE)]

test_device_that_finishes_later = hostile_driver_battery(
    Later, echo_later, cases=LATE_CASES, vias=("direct", "vhost-user")
)


def test_what_an_exchange_has_lent_may_be_written_after_it_has_failed() -> None:
    """It was told as a write to what was lent to nobody, when the device was late."""

    def give_up(wired: Wired) -> None:
        start = wired.driver.allocator.allocate(128)
        wired.driver.queues[0].add([(start, 64)], [(start + 64, 64)])
        wired.driver.kick(0)
        raise ValueError("no patience")

    with pytest.raises(DeviceBroke, match=r"queue 0 \(threads\): .*no patience"):
        run_case(Case("2.0: nothing", Stage.up), Later, give_up)


def test_a_device_whose_work_does_not_end_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Later):
        drain_seconds = 0.05

        async def one(self, request: Request) -> None:
            await asyncio.sleep(60)

    def send(stage: Stage) -> None:
        stage.up()
        stage.chain(Desc(stage.buffer(), 64))
        stage.kick()

    monkeypatch.setattr(wiring, "PATIENCE", 0.1)
    with pytest.raises(DeviceBroke, match=r"queue 1 \(coroutines\): .*still works on requests"):
        run_case(Case("2.0: a request", send), Stuck, queue=1)
