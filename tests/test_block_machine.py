"""A guest that does anything with its disk, in any order and framing: the bytes are the model's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from block_guest import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    UNMAP,
    WRITE_ZEROES,
    BlockGuest,
    Sent,
    a_range,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vq.abi import Feature, feature_mask
from vq.abi_block import BlkFeature
from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.memory import GuestMemory

SECTORS = 64
BIG = 80
"""Sectors to which the image grows and from which it shrinks again."""

OPTIONAL = (
    *(BlkFeature.FLUSH, BlkFeature.CONFIG_WCE, BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES),
    *(Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET),
)
places = st.integers(0, BIG + 2)
counts = st.integers(0, 12)
cut_lists = st.lists(st.integers(1, 1500), max_size=5)
queues = st.integers(0, 1)


class Pending(NamedTuple):
    """What must come back."""

    status: int
    data: bytes


class DiskMachine(RuleBasedStateMachine):
    """Requests go out, kicked or not; those that touch the same sectors wait for one another."""

    @initialize(
        features=st.lists(st.sampled_from(OPTIONAL), unique=True),
        direct=st.booleans(),
        queue_size=st.sampled_from((8, 16, 64)),
    )
    def begin(self, features: list[int], direct: bool, queue_size: int) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="vq-block-")
        self.path = Path(self.directory.name) / "image"
        self.model = bytearray(os.urandom(SECTORS * SECTOR))
        self.path.write_bytes(self.model)
        self.image = Image(self.path, direct=direct)
        self.device = BlockDevice(self.image, queues=2, queue_size=queue_size)
        self.memory = self.device.memory = GuestMemory.allocate(0x100000, (0x200000, 0x100000))
        self.features = feature_mask((Feature.VERSION_1, *features))
        self.guest = BlockGuest(
            self.device, self.memory, wait=self.device.settle, features=self.features
        )
        self.pending: dict[Sent, Pending] = {}
        self.busy: set[int] = set()
        self.written: set[int] = set()

    # --- helpers --------------------------------------------------------------------------------

    @property
    def sectors(self) -> int:
        return len(self.model) // SECTOR

    def fits(self, sector: int, count: int) -> bool:
        return sector + count <= self.sectors

    def clear(self, sectors: set[int], *, writes: bool) -> None:
        """What is under way on these sectors comes first: else nobody knows what there will be."""
        if sectors & (self.busy if writes else self.written):
            self.finish()

    def send(
        self, kind: int, sector: int, expected: Pending, data: bytes = b"", **how: Any
    ) -> None:
        ring = self.guest.driver.queues[how["queue"]]
        # Without indirect descriptors a chain takes up to 12, and has to fit into the queue.
        limit = 1 if ring.size == 8 else 5
        for name in ("readable_cuts", "writable_cuts"):
            if name in how:
                how[name] = how[name][:limit]
        if ring.num_free < min(12, ring.size):
            self.finish()
        self.pending[self.guest.send(kind, sector, data, **how)] = expected

    def finish(self) -> None:
        """Everything that was sent comes back, each with what it must have."""
        for index in range(2):
            self.guest.driver.kick(index)
        assert self.device.settle(10)
        for index in range(2):
            for sent, answer in self.guest.answered(index):
                expected = self.pending.pop(sent)
                assert answer == (expected.status, expected.data, len(expected.data) + 1)
        assert not self.pending
        self.busy.clear()
        self.written.clear()

    # --- what a guest does ----------------------------------------------------------------------

    @rule(
        sector=places, count=counts, out=cut_lists, into=cut_lists, queue=queues, kick=st.booleans()
    )
    def read(
        self, sector: int, count: int, out: list[int], into: list[int], queue: int, kick: bool
    ) -> None:
        touched = set(range(sector, sector + count))
        self.clear(touched, writes=False)
        size = count * SECTOR
        good = self.fits(sector, count)
        data = bytes(self.model[sector * SECTOR :][:size]) if good else bytes(size)
        self.send(
            IN,
            sector,
            Pending(OK if good else IOERR, data),
            room=size,
            readable_cuts=out,
            writable_cuts=into,
            queue=queue,
            kick=kick,
        )
        self.busy |= touched

    @rule(
        sector=places,
        count=counts,
        seed=st.binary(min_size=1, max_size=5),
        out=cut_lists,
        queue=queues,
        kick=st.booleans(),
    )
    def write(
        self, sector: int, count: int, seed: bytes, out: list[int], queue: int, kick: bool
    ) -> None:
        touched = set(range(sector, sector + count))
        self.clear(touched, writes=True)
        data = (seed * (count * SECTOR))[: count * SECTOR]
        good = self.fits(sector, count)
        if good:
            self.model[sector * SECTOR : (sector + count) * SECTOR] = data
        self.send(
            OUT,
            sector,
            Pending(OK if good else IOERR, b""),
            data,
            readable_cuts=out,
            queue=queue,
            kick=kick,
        )
        self.busy |= touched
        self.written |= touched

    @rule(
        ranges=st.lists(st.tuples(places, counts), min_size=1, max_size=3),
        kind=st.sampled_from((DISCARD, WRITE_ZEROES)),
        unmap=st.booleans(),
        queue=queues,
    )
    def clean(self, ranges: list[tuple[int, int]], kind: int, unmap: bool, queue: int) -> None:
        feature = BlkFeature.DISCARD if kind == DISCARD else BlkFeature.WRITE_ZEROES
        if not self.guest.driver.has_feature(feature):
            return
        self.finish()
        flags = UNMAP if unmap and kind == WRITE_ZEROES else 0
        good = all(self.fits(*one) or not one[1] for one in ranges)
        if good:
            for sector, count in ranges:
                self.model[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        data = b"".join(a_range(*one, flags) for one in ranges)
        self.send(kind, 0, Pending(OK if good else IOERR, b""), data, queue=queue)
        self.finish()

    @rule(queue=queues, kick=st.booleans())
    def flush(self, queue: int, kick: bool) -> None:
        if self.guest.driver.has_feature(BlkFeature.FLUSH):
            self.send(FLUSH, 0, Pending(OK, b""), queue=queue, kick=kick)

    @rule(on=st.booleans())
    def cache(self, on: bool) -> None:
        self.device.write_config(32, bytes([on]))

    @rule()
    def collect(self) -> None:
        self.finish()

    @rule(size=st.sampled_from((SECTORS // 2, SECTORS, BIG)))
    def resize(self, size: int) -> None:
        self.finish()
        os.truncate(self.path, size * SECTOR)
        del self.model[size * SECTOR :]
        self.model.extend(bytes(size * SECTOR - len(self.model)))
        self.device.resize()
        assert self.guest.capacity == size

    @rule()
    def reset(self) -> None:
        """What had been sent may have been done or not: it is done first here."""
        self.finish()
        self.guest.driver.probe()

    @precondition(lambda self: self.guest.driver.has_feature(Feature.RING_RESET))
    @rule(queue=queues)
    def reset_queue(self, queue: int) -> None:
        self.finish()
        self.guest.driver.reset_queue(queue)
        self.guest.driver.setup_queue(queue)

    @invariant()
    def it_is_well(self) -> None:
        if hasattr(self, "device"):
            assert self.device.fault is None

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        try:
            self.finish()
            assert self.path.read_bytes() == self.model
        finally:
            self.device.close()
            self.memory.close()
            self.directory.cleanup()


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
