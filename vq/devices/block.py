"""The virtio block device (virtio 1.3, 5.2): a disk for the guest in an `Image` of the host's.

What can be done without waiting is done at once: reads from the page cache, and writes to it as
long as those are quick. All else is left to threads, so that a slow disk keeps no request waiting
that could be answered.

Whatever becomes of the process, what the guest was promised is kept: a request is answered when its
bytes are in the host's page cache, a flush when they are on the disk; and without a write-back
cache (virtio 1.3, 5.2.6.2) a write is answered when it is on the disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

from vq.abi import DeviceId, Feature
from vq.abi_block import (
    BLK_ID_BYTES,
    BLK_RANGE,
    BLK_REQUEST,
    BLK_UNMAP,
    SECTOR,
    BlkConfig,
    BlkFeature,
    BlkStatus,
    BlkType,
)
from vq.device import RING_FEATURES
from vq.devices.block_image import Image
from vq.model import DeviceModel
from vq.packet import cut
from vq.request import Request, Writer, blank

__all__ = ["BlockDevice"]

log = logging.getLogger(__name__)

Views: TypeAlias = Sequence[memoryview]
Work: TypeAlias = Callable[[], None]
"""What is left to be done for a request. It raises `OSError`."""

THREADS = 16
"""Requests that wait for the disk at a time."""
AT_ONCE = 1 << 20
"""Bytes of a request that is not left to a thread, at most."""
SLOW = 0.005
"""Seconds after which something that was done at once was slow."""
SLOW_FOR = 1.0
"""Seconds for which the like is left to threads then."""
RANGES = 16
"""Ranges in one request to discard or to write zeroes to, at most."""
MOST_DISCARDED = (4 << 30) // SECTOR
"""Sectors in one range to discard, at most."""
MOST_ZEROES = (64 << 20) // SECTOR
"""Sectors in one range to write zeroes to, at most: they may really have to be written."""


class Refused(Exception):
    """A request that is not done, and the status that says so."""

    def __init__(self, status: BlkStatus) -> None:
        self.status = status


class BlockDevice(DeviceModel):
    """A disk of `image.size` bytes with `queues` queues of `queue_size`.

    `serial` is what GET_ID answers, up to 20 characters of ASCII. The image is the device's to
    close. `stats` counts requests by kind, their bytes, and errors.
    """

    device_id = DeviceId.BLOCK
    feature_bits = BlkFeature
    config: BlkConfig
    config_writable = ("wce",)

    def __init__(
        self, image: Image, *, queues: int = 1, queue_size: int = 256, serial: str = "vq"
    ) -> None:
        features = {BlkFeature.SEG_MAX, BlkFeature.BLK_SIZE, BlkFeature.TOPOLOGY}
        features |= {BlkFeature.FLUSH, BlkFeature.CONFIG_WCE}
        if queues > 1:
            features.add(BlkFeature.MQ)
        if image.read_only:
            features.add(BlkFeature.RO)
        else:
            features.add(BlkFeature.WRITE_ZEROES)
        if image.deallocates:
            features.add(BlkFeature.DISCARD)
        super().__init__(
            queues=[(f"requests{index}", queue_size, self._serve) for index in range(queues)],
            features=features,
            # In order, one request that waits for the disk would keep all others waiting.
            ring_features=RING_FEATURES & ~(1 << Feature.IN_ORDER),
            config=_config(image, queues, queue_size),
        )
        self._image = image
        self._id = serial.encode("ascii", "replace")[:BLK_ID_BYTES].ljust(BLK_ID_BYTES, b"\0")
        self._pool = ThreadPoolExecutor(THREADS, "vq-block")
        self._slow_until = 0.0
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._kinds: dict[int, Callable[[Request, int], Work | None]] = {
            BlkType.IN: self._read,
            BlkType.OUT: self._write,
            BlkType.FLUSH: self._flush,
            BlkType.GET_ID: self._get_id,
            BlkType.DISCARD: self._discard,
            BlkType.WRITE_ZEROES: self._write_zeroes,
        }

    @property
    def write_back(self) -> bool:
        """Whether writes may be answered before they are on the disk (virtio 1.3, 5.2.6.2)."""
        if self.has_feature(BlkFeature.CONFIG_WCE):
            return bool(self.config.wce)
        return self.has_feature(BlkFeature.FLUSH)

    def resize(self) -> None:
        """Tells the driver how long the image is now, if that has changed."""
        if self._image.measure():
            log.info("%s has %d bytes now", self._image.path, self._image.size)
            self.update_config(capacity=self._image.size // SECTOR)

    # --- requests ---------------------------------------------------------------------------------

    def _serve(self, requests: Sequence[Request]) -> None:
        for request in requests:
            # Whatever comes before it, the last byte is the status (virtio 1.3, 5.2.6).
            status = request.writer.split_tail(1)
            kind, _, sector = BLK_REQUEST.unpack(request.reader.read(BLK_REQUEST.size))
            outcome = BlkStatus.OK
            try:
                if kind not in self._kinds:
                    raise Refused(BlkStatus.UNSUPP)
                work = self._kinds[kind](request, sector)
            except Refused as refusal:
                work, outcome = None, refusal.status
                self.stats[f"refused_{outcome.name.lower()}"] += 1
            except OSError as error:
                work, outcome = None, self._failed(error)
            if work is None and request.writer.remaining <= AT_ONCE:
                _finish(request, status, outcome)
            else:
                self.run_in(self._pool, partial(self._do, work, status, outcome), request)

    def _do(self, work: Work | None, status: Writer, outcome: BlkStatus, request: Request) -> None:
        """In a thread."""
        if work is not None:
            try:
                work()
            except OSError as error:
                outcome = self._failed(error)
        _finish(request, status, outcome)

    def _read(self, request: Request, sector: int) -> Work | None:
        length = request.writer.remaining
        offset = self._place(sector, length)
        views = request.writer.views()
        self._count("read", length)
        if length <= AT_ONCE:
            if self._image.reads_cached:
                done = self._image.read_cached(offset, views)
                if done == length:
                    return None
                offset, views = offset + done, cut(views, done)
            elif self._quickly(self._fill, offset, views):
                return None
        return partial(self._fill, offset, views)

    def _fill(self, offset: int, views: Views) -> None:
        """Reads; what could not be read is zeros, since the driver is told of all these bytes."""
        try:
            self._image.read(offset, views)
        except OSError:
            blank(views)
            raise

    def _write(self, request: Request, sector: int) -> Work | None:
        self._need_writable()
        length = request.reader.remaining
        offset = self._place(sector, length)
        views = request.reader.views()
        self._count("write", length)
        if length <= AT_ONCE and self._quickly(self._image.write, offset, views):
            return None if self.write_back else self._image.flush
        return partial(self._store, offset, views)

    def _store(self, offset: int, views: Views) -> None:
        self._image.write(offset, views)
        if not self.write_back:
            self._image.flush()

    def _flush(self, request: Request, sector: int) -> Work:
        self._need(BlkFeature.FLUSH)
        self._count("flush")
        return self._image.flush

    def _get_id(self, request: Request, sector: int) -> None:
        request.writer.write(self._id[: request.writer.remaining])

    def _discard(self, request: Request, sector: int) -> Work:
        self._need(BlkFeature.DISCARD)
        # unmap is for write zeroes alone (virtio 1.3, 5.2.6.2).
        ranges = self._ranges(request, self.config.max_discard_sectors, flags=0)
        self._count("discard", sum(length for _, length, _ in ranges))
        return partial(self._for_each, ranges, lambda at, size, _: self._image.discard(at, size))

    def _write_zeroes(self, request: Request, sector: int) -> Work:
        self._need(BlkFeature.WRITE_ZEROES)
        ranges = self._ranges(request, self.config.max_write_zeroes_sectors, flags=BLK_UNMAP)
        self._count("write_zeroes", sum(length for _, length, _ in ranges))
        return partial(
            self._for_each,
            ranges,
            lambda at, size, flags: self._image.write_zeroes(at, size, deallocate=bool(flags)),
        )

    # --- checks -----------------------------------------------------------------------------------

    def _need(self, feature: BlkFeature) -> None:
        if not self.has_feature(feature):
            raise Refused(BlkStatus.UNSUPP)

    def _need_writable(self) -> None:
        if self._image.read_only:
            raise Refused(BlkStatus.IOERR)  # virtio 1.3, 5.2.6.2

    def _place(self, sector: int, length: int) -> int:
        """The offset of a range that lies in the image; else it is an error of I/O."""
        offset = sector * SECTOR
        if offset + length > self._image.size or (offset | length) % self._image.block_size:
            raise Refused(BlkStatus.IOERR)
        return offset

    def _ranges(self, request: Request, most: int, *, flags: int) -> list[tuple[int, int, int]]:
        """Offset, length and flags of what a request names; all of it is checked first."""
        self._need_writable()
        if not 1 <= request.reader.remaining <= RANGES * BLK_RANGE.size:
            raise Refused(BlkStatus.IOERR)
        if request.reader.remaining % BLK_RANGE.size:
            raise Refused(BlkStatus.IOERR)
        ranges = list(BLK_RANGE.iter_unpack(request.reader.read()))
        if any(given & ~flags for _, _, given in ranges):
            raise Refused(BlkStatus.UNSUPP)  # virtio 1.3, 5.2.6.2
        if any(count > most for _, count, _ in ranges):
            raise Refused(BlkStatus.IOERR)
        return [
            (self._place(sector, count * SECTOR), count * SECTOR, given)
            for sector, count, given in ranges
            if count
        ]

    # --- inside -----------------------------------------------------------------------------------

    def _quickly(self, transfer: Callable[[int, Views], None], offset: int, views: Views) -> bool:
        """Does it at once, unless that would wait for a disk as far as one can know."""
        begun = time.monotonic()
        if self._image.direct or begun < self._slow_until:
            return False
        transfer(offset, views)
        ended = time.monotonic()
        if ended - begun > SLOW:
            self._slow_until = ended + SLOW_FOR
        return True

    def _for_each(
        self, ranges: Sequence[tuple[int, int, int]], change: Callable[[int, int, int], None]
    ) -> None:
        for offset, length, flags in ranges:
            change(offset, length, flags)
        if not self.write_back:
            self._image.flush()

    def _count(self, what: str, length: int | None = None) -> None:
        self.stats[what] += 1
        if length is not None:
            self.stats[f"{what}_bytes"] += length

    def _failed(self, error: OSError) -> BlkStatus:
        """The system refused: said in the log now and then, however often it happens."""
        now = time.monotonic()
        with self._lock:
            self.stats["io_errors"] += 1
            if tell := now >= self._quiet_until:
                self._quiet_until = now + 10
        if tell:
            log.error("%s: %s", self._image.path, error)
        return BlkStatus.IOERR

    # --- DeviceModel ------------------------------------------------------------------------------

    def features_negotiated(self, features: int) -> None:
        """See `Device`. Without flushes there is no cache to begin with (virtio 1.3, 5.2.5.2)."""
        self.config.wce = int(self.has_feature(BlkFeature.FLUSH))

    def config_written(self, fields: Collection[str]) -> None:
        """See `DeviceModel`."""
        if not self.has_feature(BlkFeature.CONFIG_WCE):
            self.features_negotiated(self.driver_features)
        log.debug("the guest's writes go %s", "to a cache" if self.write_back else "to the disk")

    def device_reset(self) -> None:
        """See `Device`. The image's length is not the driver's to reset."""
        self.config.capacity = self._image.size // SECTOR

    def close(self) -> None:
        """Waits for the disk, and gives the image back."""
        super().close()
        self._pool.shutdown()
        self._image.close()


def _finish(request: Request, status: Writer, outcome: BlkStatus) -> None:
    """Answers. All bytes up to the status count as written: so they are (virtio 1.3, 2.7.8.2)."""
    if request.writer.remaining:
        request.writer.zeros()
    status.write(bytes((outcome,)))
    request.complete()


def _config(image: Image, queues: int, queue_size: int) -> BlkConfig:
    """The configuration space (virtio 1.3, 5.2.4).

    Segments may have any size, so there is no SIZE_MAX. There may be as many as fit in a queue of
    128 beside header and status, the size that most frontends choose, for drivers without indirect
    descriptors.
    """
    blocks = image.physical_block_size // image.block_size
    return BlkConfig(
        capacity=image.size // SECTOR,
        seg_max=max(1, min(queue_size, 128) - 2),
        blk_size=image.block_size,
        physical_block_exp=blocks.bit_length() - 1,
        min_io_size=blocks,
        wce=1,
        num_queues=queues,
        max_discard_sectors=MOST_DISCARDED,
        max_discard_seg=RANGES,
        discard_sector_alignment=image.physical_block_size // SECTOR,
        max_write_zeroes_sectors=MOST_ZEROES,
        max_write_zeroes_seg=RANGES,
        write_zeroes_may_unmap=int(image.deallocates),
    )
