"""A guest and its disk: requests of any shape, over a small image on a host that is fussy.

What becomes of the image and of each request is foretold by a second reading of the specification.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence

from fuzz.guests import ARENA, RING_CHOICES, RINGS, Guest, some_features
from fuzz.inputs import Input
from vq.abi_block import BlkConfig, BlkFeature
from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.memory import address_of
from vq.packet import cut
from vq.split_ring import Chain, SplitRing

_FEATURES = (
    *(BlkFeature.FLUSH, BlkFeature.CONFIG_WCE, BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES),
    *(BlkFeature.MQ, BlkFeature.RO, *RING_CHOICES),
)
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IOERR, _UNSUPP = 0, 1, 2
_SECTORS = 64
_KINDS = (_IN, _IN, _OUT, _OUT, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES, 14, 2, 0xFFFFFFFF)
_PLACES = (0, 1, 7, 8, 16, 31, 62, 63, 64, 65, 1 << 55, (1 << 64) - 1)
_LENGTHS = (512, 512, 1024, 4096, 8192, 0, 1, 511, 513, 20, 0x4000)
_COUNTS = (1, 8, 2, 0, 63, 64, 65, 131072, 131073, 0x800000, 0xFFFFFFFF)
_SERIAL = b"fuzzed"
_WCE = BlkConfig.wce.offset

_directory = tempfile.TemporaryDirectory(prefix="vq-fuzz-block-")
_PATH = os.path.join(_directory.name, "image")


def run(data: bytes) -> None:
    """Plays one driver's life, and one more that behaves."""
    life = _Life(Input(data))
    try:
        life.live()
    finally:
        life.device.close()


class _FussyImage(Image):
    """On a host that moves `most` bytes at a time, fails once, and may mind where buffers lie."""

    def __init__(
        self, *, most: int, fails_at: int, aligned: bool, flushes: bool, block: int, read_only: bool
    ) -> None:
        super().__init__(_PATH, block_size=block, read_only=read_only)
        self.direct = aligned
        self.reads_cached = self.reads_cached and not aligned and most > 0x4000
        self.flushes = flushes
        self.failed = False
        self._most = max(512, most // 512 * 512) if aligned else most
        self._until_failure = fails_at

    def flush(self) -> None:
        """Works, or never does."""
        if self.flushes:
            return super().flush()
        raise OSError(errno.EIO, "as was wanted")

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        offset: int,
        views: Sequence[memoryview],
        *,
        aligned: bool = False,
    ) -> tuple[int, Sequence[memoryview]]:
        def fussy(fd: int, pieces: Sequence[memoryview], offset: int) -> int:
            self._until_failure -= 1
            if not self._until_failure:
                self.failed = True
                raise OSError(errno.EIO, "as was wanted")
            part = cut(pieces, 0, self._most)
            if self.direct:
                places = [address_of(view) for view in part if not view.readonly]
                numbers = [offset, *map(len, part), *places]
                if any(number % 512 for number in numbers):
                    raise OSError(errno.EINVAL, "not aligned")
            return call(fd, part, offset)

        return super()._transfer(fussy, offset, views, aligned=aligned)


class _Asked:
    """A request as the device took it: private copies of all that it says."""

    def __init__(self, chain: Chain) -> None:
        data = b"".join(chain.readable)
        self.chain = chain
        self.good = len(data) >= 16 and chain.writable_size >= 1
        self.kind, _, self.sector = struct.unpack("<IIQ", data[:16].ljust(16, b"\0"))
        self.data = data[16:]
        self.room = chain.writable_size - 1
        self.read = [(address_of(view), len(view)) for view in chain.readable]
        self.written = [(address_of(view), len(view)) for view in chain.writable]
        self.answer: int | None = None
        """What the ring was told of bytes written, once it was."""


class _HeardRing(SplitRing):
    """Tells of the requests that a device takes, and of its answers."""

    def __init__(self, bursts: list[list[_Asked]], *places: object, **options: object) -> None:
        super().__init__(*places, **options)  # type: ignore[arg-type]
        self._bursts = bursts
        self._asked: dict[int, _Asked] = {}

    def pop_burst(self, limit: int) -> list[Chain]:
        """See `SplitRing`."""
        chains = super().pop_burst(limit)
        burst = [_Asked(chain) for chain in chains]
        self._asked.update((id(asked.chain), asked) for asked in burst)
        self._bursts.append(burst)
        return chains

    def write_used_burst(self, chains: Iterable[Chain]) -> None:
        """See `SplitRing`."""
        chains = list(chains)
        super().write_used_burst(chains)
        for chain in chains:
            if (asked := self._asked.pop(id(chain), None)) is not None:
                asked.answer = chain.written


class _Life:
    def __init__(self, source: Input) -> None:
        self.source = source
        self.model = bytearray(bytes(range(256)) * (2 * _SECTORS))
        with open(_PATH, "wb") as file:
            file.write(self.model)
        self.image = _FussyImage(
            most=source.pick((1 << 30, 1 << 30, 512, 4096, 700)),
            fails_at=source.pick((0, 0, 1, 2, 5)),
            aligned=source.chance(4),
            flushes=not source.chance(8),
            block=source.pick((512, 512, 4096)),
            read_only=source.chance(8),
        )
        self.device = BlockDevice(self.image, queues=2, queue_size=16, serial=_SERIAL.decode())
        self.bursts: list[list[_Asked]] = []
        self.device.ring_class = functools.partial(_HeardRing, self.bursts)
        self.guest = Guest(
            self.device, -1 if source.chance(2) else some_features(source, _FEATURES)
        )
        self.serial = 0

    def live(self) -> None:
        source, guest = self.source, self.guest
        for _ in range(40):
            if not source.more:
                break
            step = source.below(20)
            if step < 11:
                self.ask()
                if source.chance(2):
                    self.kick(source.below(2))
            elif step < 14:
                self.kick(source.below(2))
            elif step == 14:
                guest.scribble(source)
            elif step == 15:
                guest.driver.write_config(source.pick((_WCE, 0, 70, 400)), source.take(2))
            elif step == 16:
                self.resize(source.pick((_SECTORS, 8, 65, 80, 63)))
            elif step == 17:
                with guest.watched():  # with work under way
                    self.device.notify(source.below(2))
                guest.start_over()
                self.look(exactly=False)
            elif step == 18 and not guest.unruly and self.device.fault is None:
                index = source.below(2)
                if source.chance(2):
                    guest.reset_queue(index)
                else:
                    guest.pause_queue(index)
                self.look(exactly=False)
            else:
                guest.start_over()
                self.look(exactly=False)
        for index in range(2):
            self.kick(index)
        guest.start_over()
        self.answers_still()

    # What the guest and the host do.

    def ask(self) -> None:
        """A request that is right, more often than not."""
        source, guest = self.source, self.guest
        kind = source.pick(_KINDS)
        sector = source.pick((*_PLACES, source.u8))
        length = source.pick(_LENGTHS)
        data, room = b"", 0
        if kind in (_IN, _GET_ID):
            room = length
        elif kind == _OUT:
            self.serial += 1
            data = self.serial.to_bytes(4, "big") * (length // 4) + bytes(length % 4)
        elif kind in (_DISCARD, _WRITE_ZEROES):
            for _ in range(source.pick((1, 1, 2, 16, 17, 0))):
                place = source.pick((*_PLACES, source.u8))
                flags = source.pick((0, 0, 0, 1, 1, 2, 0xFFFFFFFF))
                data += struct.pack("<QII", place, source.pick(_COUNTS), flags)
        if source.chance(16):
            data += source.take(source.below(20))
            room += source.pick((512, 0, 1, 511))
        header = struct.pack("<IIQ", kind, source.below(2), sector)
        if source.chance(8):  # nothing aligned, the header over descriptors
            pieces = (header + data)[: source.u8] if source.chance(4) else header + data
            readable = guest.place_pieces(source, pieces)
            writable = guest.room(source, room + (not source.chance(4)))
        else:
            parts = [header, data[: len(data) // 1024 * 512], data[len(data) // 1024 * 512 :]]
            readable = [self.place(part) for part in parts if part]
            cuts = [room // 1024 * 512, room - room // 1024 * 512, 1]
            writable = [guest.buffer(source, size, align=512) for size in cuts if size]
        guest.offer_in_any_way(source, source.below(2), readable, writable)

    def place(self, data: bytes) -> tuple[int, int]:
        buffer = self.guest.buffer(self.source, len(data), align=512)
        self.guest.memory.write(buffer[0], data)
        return buffer

    def kick(self, index: int) -> None:
        self.guest.kick(index)
        self.look(exactly=True)
        for queue in range(2):
            self.guest.collect(queue)
        self.guest.start_at_front()

    def resize(self, sectors: int) -> None:
        os.truncate(_PATH, sectors * 512)
        self.model = self.model[: sectors * 512].ljust(sectors * 512, b"\0")
        with self.guest.watched():
            self.device.resize()

    # What must have come of it.

    def look(self, *, exactly: bool) -> None:
        """Compares the image and the answers; not `exactly` where work was cut short."""
        executed = []
        for burst in self.bursts:
            for asked in burst:
                if not asked.good:
                    assert self.device.fault is not None or not exactly
                    break
                executed.append(asked)
        everything = [asked for burst in self.bursts for asked in burst]
        self.bursts.clear()
        changes = [(asked, self.changes(asked)) for asked in executed]
        now = self.read_image()
        shared = _share_memory(everything, self.guest)
        if not exactly or shared:
            # No telling who was first; but nothing else may have changed.
            if not shared:
                for _, ranges in changes:
                    for start, data in ranges:
                        self.model[start : start + len(data)] = now[start : start + len(data)]
                assert now == self.model, "the image has changed where nobody wrote"
            self.model = now
            return
        before = bytes(self.model)
        raced = _raced([(asked, self.expected(asked)[1]) for asked in executed])
        for asked, ranges in changes:
            answer = self.check(asked, None if asked in raced else before)
            for start, data in ranges:
                end = start + len(data)
                if asked in raced or self.image.failed or answer != _OK:
                    self.model[start:end] = now[start:end]
                elif asked.kind == _DISCARD:  # zeros or what was there, for each sector
                    for at in range(start, end, 512):
                        if now[at : at + 512] == bytes(512):
                            self.model[at : at + 512] = bytes(512)
                else:
                    self.model[start:end] = data
        assert now == self.model, "the image has changed where nobody wrote"

    def read_image(self) -> bytearray:
        with open(_PATH, "rb") as file:
            return bytearray(file.read())

    def expected(self, asked: _Asked) -> tuple[int, list[tuple[int, int]]]:
        """The status, and the ranges of the image that are read or written: their ends."""
        read_only, has = self.image.read_only, self.device.has_feature
        if asked.kind in (_IN, _OUT):
            length = asked.room if asked.kind == _IN else len(asked.data)
            fits = self.fits(asked.sector * 512, length)
            if not fits or (asked.kind == _OUT and read_only):
                return _IOERR, []
            return _OK, [(asked.sector * 512, asked.sector * 512 + length)]
        if asked.kind == _FLUSH:
            return (_OK if has(BlkFeature.FLUSH) else _UNSUPP), []
        if asked.kind == _GET_ID:
            return _OK, []
        needed = {_DISCARD: BlkFeature.DISCARD, _WRITE_ZEROES: BlkFeature.WRITE_ZEROES}
        if asked.kind not in needed or not has(needed[asked.kind]):
            return _UNSUPP, []
        if read_only or not 16 <= len(asked.data) <= 256 or len(asked.data) % 16:
            return _IOERR, []
        ranges = list(struct.iter_unpack("<QII", asked.data))
        if any(flags > (asked.kind == _WRITE_ZEROES) for _, _, flags in ranges):
            return _UNSUPP, []
        most = 131072 if asked.kind == _WRITE_ZEROES else 0x800000
        if any(
            count > most or (count and not self.fits(place * 512, count * 512))
            for place, count, _ in ranges
        ):
            return _IOERR, []
        return _OK, [(place * 512, (place + count) * 512) for place, count, _ in ranges if count]

    def fits(self, offset: int, length: int) -> bool:
        block = self.image.block_size
        whole = len(self.model) // block * block
        return offset + length <= whole and not offset % block and not length % block

    def changes(self, asked: _Asked) -> list[tuple[int, bytes]]:
        """Where the image changes, and to what."""
        if asked.kind not in (_OUT, _DISCARD, _WRITE_ZEROES):
            return []
        return [
            (start, asked.data if asked.kind == _OUT else bytes(end - start))
            for start, end in self.expected(asked)[1]
        ]

    def check(self, asked: _Asked, image: bytes | None) -> int | None:
        """The answer to a request; `image` is what it was read from, if that is certain."""
        status, ranges = self.expected(asked)
        answered = b"".join(asked.chain.writable)
        assert asked.answer == asked.room + 1, f"{asked.answer} bytes of {asked.room + 1}"
        content, got = answered[:-1], answered[-1]
        may_fail = (self.image.failed and ranges) or (
            not self.image.flushes
            and asked.kind in (_FLUSH, _OUT, _DISCARD, _WRITE_ZEROES)
            and (asked.kind == _FLUSH or not self.device.write_back)
        )
        assert got == status or (may_fail and status == _OK and got == _IOERR), (got, status)
        if asked.kind == _GET_ID:
            assert content == _SERIAL.ljust(20, b"\0")[: len(content)].ljust(len(content), b"\0")
        elif asked.kind == _IN and got == _OK:
            start, end = ranges[0]
            assert image is None or content == image[start:end], "not what the disk has"
        elif got != _IOERR or not ranges:
            assert not any(content), "something, where there is nothing to read"
        return got

    def answers_still(self) -> None:
        """After all that, sector 3 can be written, if any can, and read again."""
        guest = self.guest
        self.image.failed = False
        self.image._until_failure = 0
        for kind in (_OUT, _IN):
            block = self.image.block_size
            guest.memory.write(ARENA, struct.pack("<IIQ", kind, 0, block // 512))
            guest.memory.write(0xA000, bytes(range(16)) * (block // 16))
            guest.memory.write(0xC000, b"\xee" * (block + 1))
            extra = [(0xA000, block)] if kind == _OUT else []
            room = block + 1 if kind == _IN else 1
            assert guest.offer(1, [(ARENA, 16), *extra], [(0xC000, room)])
            self.kick(1)
            assert self.device.fault is None and guest.ring(1).in_flight == 0, "dead after a reset"


def _share_memory(requests: Iterable[_Asked], guest: Guest) -> bool:
    """Whether something is written to one place of the guest's memory that has another use."""
    rings = guest.memory.hvaddr(RINGS)
    places = [(rings, rings + ARENA - RINGS, False)]
    for asked in requests:
        for writes, buffers in enumerate((asked.read, asked.written)):
            places += [(start, start + length, bool(writes)) for start, length in buffers]
    end_read = end_written = 0
    for start, end, writes in sorted(places):
        if start < end_written or (writes and start < end_read):
            return True
        if writes:
            end_written = max(end_written, end)
        else:
            end_read = max(end_read, end)
    return False


def _raced(requests: Sequence[tuple[_Asked, Sequence[tuple[int, int]]]]) -> set[_Asked]:
    """Requests for one place of the image, in one go, of which not all only read."""
    raced = set()
    for number, (one, ranges) in enumerate(requests):
        for other, others in requests[number + 1 :]:
            if one.kind == other.kind == _IN:
                continue
            if any(a < d and c < b for a, b in ranges for c, d in others):
                raced |= {one, other}
    return raced
