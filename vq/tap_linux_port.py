"""One queue of a Linux tap: frames between its file descriptor and memory.

A frame is written and read with one system call, `virtio_net_hdr` and all; where the kernel has
io_uring and the frames are short, or lie in many pieces, with one for many of them. What comes next
is expected to be like what came last: how many frames, and how long.

Opening the tap and telling it what may be left undone is `vq.tap_linux`'s.

Sources: drivers/net/tun.c, readv(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import cast

from vq.abi import NET_HDR_SIZE
from vq.gather import IoVectors, Slab
from vq.io_uring import Opcode, RequestRing
from vq.lanes import alike, all_between
from vq.link import (
    MAX_FRAME,
    MOST_AT_ONCE,
    MOST_PIECES,
    SHORT_OF_MEMORY,
    START_ROOM,
    Frame,
    FrameBuffer,
    Places,
    PlacesRoom,
    Port,
    Room,
    scatter,
)
from vq.memory import address_of

__all__ = ["ETHER_HEADER", "TAGS", "LinuxTapPort", "in_words"]

SYSTEM_CALLS = ("readv", "writev")

ETHER_HEADER = 14
TAGS = 8
"""Two VLAN tags, which do not count towards the MTU."""
IOV_MAX = 1024
_NOT_NOW = (errno.EAGAIN, *SHORT_OF_MEMORY)
_LONGEST_SEGMENTED = 0x10000 + ETHER_HEADER + TAGS
"""Bytes of the longest frame, unless somebody raised the interface's gso_max_size."""
_WORD = 4
_LONGEST_ANSWER = NET_HDR_SIZE + MAX_FRAME
_LONG = 1 << 14
"""Bytes of a frame that the host left to be segmented."""
_FEW_LONG = 4
"""Of those so many are read at a time: the guest is to begin on them while more are read."""
_FEW = 8
"""Frames that are asked for where none are known to wait."""
_SHORT = NET_HDR_SIZE + 1514 + TAGS
"""Bytes of a frame that is not to be segmented, on most networks."""
_MANY_SHORT = 64
"""After so many of those in a row the next are expected to be like them."""
_WORTH_SPILLS, _ALONE = 4, 16
"""Where fewer came at a time it was not worth it, and is tried again after so many."""
_SPILLS = 64
"""Frames that are read together, where each may be longer than its place."""

_TWO_EACH = array("I", [2] * _SPILLS)


class _Batches:
    """Frames from and to a tap, `COUNT` in a system call, and what that takes.

    Raises `OSError` where the kernel does not have it.
    """

    COUNT = MOST_AT_ONCE
    BYTES = 2048 * COUNT

    def __init__(self, fd: int) -> None:
        opcodes = Opcode.WRITE, Opcode.READ, Opcode.WRITEV, Opcode.READV
        self.ring = RequestRing(fd, opcodes, self.COUNT)
        try:
            self.slab = Slab(self.BYTES, self.COUNT)
            self._words = Slab(_WORD * self.COUNT, self.COUNT)
            self._pieces = IoVectors(MOST_PIECES)
            self._spills = _Spills()
        except BaseException:
            self.ring.close()
            raise
        self._word = array("I", [_WORD] * self.COUNT)
        self._prepared = array("I")  # lengths that the entries for writing are prepared for
        self._starts = array("Q")  # where their frames start
        self._length = 0  # of each of them, where they are known to be of one length
        self._room = array("I")  # and those for reading

    def read(self, places: Places) -> array[int]:
        """Reads a frame into each place; returns their lengths, or negative error numbers."""
        addresses, lengths = places
        count = len(addresses)
        first = self.COUNT
        self.ring.addresses[first : first + count] = addresses
        if lengths != self._room[:count]:
            self.ring.lengths[first : first + count] = lengths
            self._room = lengths
        return self.ring.submit(first, count)

    def read_spilling(self, places: Places) -> array[int]:
        """Likewise, up to `_SPILLS` frames; what a place has no room for stands in its spill."""
        count = len(places[0])
        vectors = self._spills.behind(places)
        first = 3 * self.COUNT
        self.ring.addresses[first : first + count] = vectors
        self.ring.lengths[first : first + count] = _TWO_EACH[:count]
        return self.ring.submit(first, count)

    def whole(self, index: int, place: int, size: int, length: int) -> Frame:
        """A private copy of what was read into a place of `size` bytes and its spill."""
        header = ctypes.string_at(place, NET_HDR_SIZE)
        data = ctypes.string_at(place + NET_HDR_SIZE, min(length, size) - NET_HDR_SIZE)
        return [header, data, self._spills.content(index, length - size)]

    def gather_frames(self, addresses: array[int], lengths: array[int], total: int) -> memoryview:
        """Copies frames into the slab, one behind another; the first word of each ("I")."""
        self.slab.gather(addresses, lengths, total)
        if alike(lengths):
            return self._first_words(len(lengths), lengths[0])
        self._prepare(lengths)
        return self._words_at_starts(len(lengths))

    def gather_alike(self, vectors: bytes, count: int, length: int) -> memoryview:
        """The same for frames of one length, and vectors that name them."""
        self.slab.gather_vectors(vectors, count, count * length)
        return self._first_words(count, length)

    def write(self, lengths: array[int]) -> array[int]:
        """Writes frames that lie in the slab one behind another; returns the kernel's answers."""
        self._prepare(lengths)
        return self.ring.submit(0, len(lengths))

    def write_alike(self, count: int, length: int) -> array[int] | None:
        """The same for frames of one length; None when the kernel took each as a whole."""
        self._prepare_alike(count, length)
        return self.ring.submit_alike(0, count, length)

    def write_pieces(self, vectors: array[int], counts: Sequence[int]) -> array[int]:
        """Writes frames of so many pieces each; returns the kernel's answers."""
        self._pieces.store(vectors)
        addresses, lengths = self.ring.addresses, self.ring.lengths
        entry = first = 2 * self.COUNT
        place = self._pieces.address
        for count in counts:  # they are few, mostly
            addresses[entry], lengths[entry] = place, count
            place += IoVectors.SIZE * count
            entry += 1
        return self.ring.submit(first, len(counts))

    def _prepare(self, lengths: array[int]) -> None:
        """Has the entries for writing name frames of these lengths."""
        if lengths != self._prepared[: len(lengths)]:
            starts = accumulate(lengths, initial=self.slab.address)
            self._store(array("Q", list(starts)[: len(lengths)]), lengths[:])
            self._length = 0

    def _prepare_alike(self, count: int, length: int) -> None:
        """The same for so many frames of one length."""
        if length != self._length or count > len(self._prepared):
            first = self.slab.address
            starts = array("Q", range(first, first + count * length, length))
            self._store(starts, array("I", [length]) * count)
            self._length = length

    def _store(self, starts: array[int], lengths: array[int]) -> None:
        count = len(lengths)
        self.ring.addresses[:count] = self._starts = starts
        self.ring.lengths[:count] = self._prepared = lengths

    def _first_words(self, count: int, length: int) -> memoryview:
        """The first word of each of so many frames of one length, in the slab."""
        if length % _WORD == 0:
            return self.slab.view[: count * length].cast("I")[:: length // _WORD]
        self._prepare_alike(count, length)
        return self._words_at_starts(count)

    def _words_at_starts(self, count: int) -> memoryview:
        """A copy of the first word of each frame that the entries for writing name."""
        self._words.gather(self._starts[:count], self._word[:count], _WORD * count)
        return self._words.view[: _WORD * count].cast("I")

    def forget(self) -> None:
        """What the entries are prepared for is not known any more, nor what was under way."""
        self.ring.forget()
        self._prepared, self._room = array("I"), array("I")

    def gather_starts(self, addresses: array[int], size: int) -> memoryview:
        """A private copy of `size` bytes at each address; `slab.put_back` is the way back."""
        count = len(addresses)
        self.slab.gather(addresses, array("I", [size]) * count, size * count)
        return self.slab.view[: size * count]

    def close(self) -> None:
        self.ring.close()
        self.slab.close()
        self._words.close()


class _Spills:
    """Private memory behind places that may be too short for the frames that are read into them."""

    SIZE = 1 << 17
    """Bytes: more than the longest frame, so that none can be cut without being too long."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, self.SIZE * _SPILLS, flags)  # nothing until it is touched
        self._view = memoryview(self._memory)
        first = address_of(self._view)
        self._vectors = IoVectors(2 * _SPILLS)
        self._starts = self._vectors.places([2] * _SPILLS)
        self._addresses = array("Q", [0, 0]) * _SPILLS
        self._addresses[1::2] = array("Q", range(first, first + self.SIZE * _SPILLS, self.SIZE))
        self._lengths = array("I", [0, self.SIZE]) * _SPILLS

    def behind(self, places: Places) -> array[int]:
        """Vectors of each place and its spill: where they lie ("Q")."""
        addresses, lengths = places
        count = len(addresses)
        self._addresses[: 2 * count : 2] = addresses
        self._lengths[: 2 * count : 2] = lengths
        self._vectors.put(0, self._addresses[: 2 * count], self._lengths[: 2 * count])
        return self._starts[:count]

    def content(self, index: int, length: int) -> memoryview:
        """What stands in a spill."""
        first = self.SIZE * index
        return self._view[first : first + max(0, length)]


class _TapOutbox:
    """See `vq.link.Outbox`."""

    most_bytes = _Batches.BYTES

    def __init__(self, port: LinuxTapPort, batches: _Batches) -> None:
        self._port = port
        self._batches = batches
        starts = (ctypes.c_ubyte * (START_ROOM * _Batches.COUNT))()
        self.starts = memoryview(starts).cast("B")
        self.starts_address = ctypes.addressof(starts)

    def take(self, addresses: array[int], lengths: array[int], total: int) -> memoryview:
        """See `vq.link.Outbox.take`."""
        return self._batches.gather_frames(addresses, lengths, total)

    def send(self, lengths: array[int]) -> int:
        """See `vq.link.Outbox.send`."""
        port = self._port
        if not port.active:
            port.dropped["inactive"] += len(lengths)
            return len(lengths)
        try:
            results = self._batches.write(lengths)
        except OSError:
            return self._forbidden()
        return self._judged(results)

    def take_alike(self, vectors: bytes, count: int, length: int) -> memoryview:
        """See `vq.link.Outbox.take_alike`."""
        return self._batches.gather_alike(vectors, count, length)

    def send_alike(self, count: int, length: int) -> int:
        """See `vq.link.Outbox.send_alike`."""
        port = self._port
        if not port.active:
            port.dropped["inactive"] += count
            return count
        try:
            results = self._batches.write_alike(count, length)
        except OSError:
            return self._forbidden()
        return count if results is None else self._judged(results)

    def send_in_place(self, vectors: array[int], counts: Sequence[int]) -> int:
        """See `vq.link.Outbox.send_in_place`."""
        port = self._port
        if not port.active:
            port.dropped["inactive"] += len(counts)
            return len(counts)
        try:
            results = self._batches.write_pieces(vectors, counts)
        except OSError:
            return self._forbidden()
        return self._judged(results)

    def _forbidden(self) -> int:
        """io_uring is forbidden since (seccomp); the plain way may not be."""
        self._port.close()
        return 0

    def _judged(self, results: array[int]) -> int:
        """How many frames need no more attention, by the kernel's answers."""
        port = self._port
        dealt_with = len(results)
        if not all_between(results, 0, _LONGEST_ANSWER):
            while dealt_with and results[dealt_with - 1] == -errno.EAGAIN:
                dealt_with -= 1  # the port is full: they are sent later, in their order
            for result in results[:dealt_with]:
                if result == -errno.EAGAIN:  # later ones went through meanwhile
                    port.dropped["full"] += 1
                elif result < 0:
                    port.count_refusal(OSError(-result, os.strerror(-result)))
        return dealt_with


class LinuxTapPort(Port):
    """One queue of a Linux tap.

    Frames are written and read with one system call each, or many at a time by io_uring where the
    kernel has that and the frames are short.
    """

    none_waits_inside = True

    def __init__(self, fd: int, truncated: Callable[[], None]) -> None:
        super().__init__()
        self._fd = fd
        self.on_truncated = truncated
        """Called when a frame was longer than expected."""
        self._header = bytearray(NET_HDR_SIZE)
        self._beyond = bytearray(1)
        self._likely = _FEW
        self._longest_usual = _LONGEST_SEGMENTED
        self._short_ones = 0  # frames in a row
        self.longest = MAX_FRAME
        """The longest frame that is expected, in bytes."""
        self._longest_later: int | None = None
        self.active = True
        """Whether the queue is attached. Whoever polls leaves out ports that are not: the kernel
        reports an error on them without end."""
        self._batches: _Batches | None = None
        self.open()

    def fileno(self) -> int:
        """The queue's descriptor."""
        return self._fd

    def open(self) -> None:
        """Gets what it takes to move many frames at a time, if the kernel has that."""
        with suppress(OSError):
            self._batches = _Batches(self._fd)
            self.outbox = _TapOutbox(self, self._batches)

    def close(self) -> None:
        """Gives back what the port holds beside its descriptor: from then on frames go one by one.

        Closing twice is allowed.
        """
        self.outbox = None
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def let_go(self) -> None:
        """In a process that was forked, and that has nothing to do with this port: who could write
        to the entries of its io_uring could have the kernel write into the other process's memory.
        """
        self.outbox = self._batches = None  # and their memory and descriptors are gone; no more

    def was_used_elsewhere(self) -> None:
        """See `Port.was_used_elsewhere`: the entries of io_uring are shared."""
        if self._batches is not None:
            self._batches.forget()

    def expect(self, longest: int) -> None:
        """The kernel makes frames of up to `longest` bytes from now on.

        Those that wait in it already stay as they are, so less is expected only after a read has
        found none.
        """
        if longest >= self.longest:
            self.longest, self._longest_later = longest, None
        else:
            self._longest_later = longest

    def _none_waits(self) -> None:
        if self._longest_later is not None:
            self.longest, self._longest_later = self._longest_later, None

    def write_burst(self, frames: Sequence[Frame]) -> int:
        """Writes frames to the kernel, each with one writev.

        Counted in `dropped`: ``runt``, ``too long``, ``bad header``, ``no memory``,
        ``interface down`` and ``inactive``. A port is full (EAGAIN) only when somebody limited the
        tap's send buffer.
        """
        if not self.active:
            self.dropped["inactive"] += len(frames)
            return len(frames)
        fd = self._fd
        writev = os.writev
        dealt_with = 0
        for frame in frames:
            size = len(frame[1]) if len(frame) == 2 else sum(map(len, frame)) - NET_HDR_SIZE
            if size < ETHER_HEADER:
                self.dropped["runt"] += 1
            elif size > MAX_FRAME:  # the kernel would take megabytes
                self.dropped["too long"] += 1
            else:
                try:
                    writev(fd, frame)
                except BlockingIOError:
                    return dealt_with
                except OSError as error:
                    self._refused(frame, error)
            dealt_with += 1
        return dealt_with

    def read_burst(self, room: Room, limit: int) -> int:
        """Reads frames from the kernel, straight into the room.

        The kernel cuts a frame that does not fit and does not tell, so one byte more is asked for:
        when it comes, the frame is counted in `dropped` as ``too long``.
        """
        if not self.active:
            return 0
        by_address = cast(PlacesRoom, room) if hasattr(room, "lend_together") else None
        if by_address is not None:
            if limit == 1 and (alone := by_address.lend_alone()):
                return self._read_alone(by_address, alone)
            if limit >= _FEW:
                moved_apart = self._read_apart(by_address, limit)
                self.burst = Port.burst if moved_apart is None else _Batches.COUNT
                if moved_apart is not None:
                    return moved_apart
        moved = 0
        longest = min(self.longest, self._longest_usual)
        while moved < limit:
            if by_address is not None and (places := by_address.lend_together(longest)):
                vectors, first, count = places
                length = vectors.read(self._fd, first, count)
                if length < 0:
                    self._found_none(-length)
                    break
                if length > NET_HDR_SIZE + longest:
                    self._longer_than(longest)
                    longest = min(self.longest, self._longest_usual)
                    limit -= 1  # for who floods us with such, this is a burst too
                    continue
                by_address.commit_together(length)
                self._learn_from(length)
                moved += 1
                continue
            views = room.views()
            if not views:
                break
            try:
                length = self._read_frame(views)
            except OSError as error:
                self._found_none(error.errno or 0)
                break
            if length > len(views[0]) and length > sum(map(len, views)):
                self._too_long()
                limit -= 1
                continue
            room.commit(bytes(self._header), length)
            moved += 1
        return moved

    def _read_alone(self, room: PlacesRoom, views: Sequence[memoryview]) -> int:
        """Reads a frame that probably is the only one; returns 1, or 0 if there was none."""
        try:
            length = os.readv(self._fd, views)
        except OSError as error:
            self._found_none(error.errno or 0)
            return 0
        longest = min(self.longest, self._longest_usual)
        if length > NET_HDR_SIZE + longest:
            self._longer_than(longest)
            return 0
        room.commit_alone(length)
        self._learn_from(length)
        return 1

    def _learn_from(self, length: int) -> None:
        """The next frame will be like this one, of so many bytes, header included."""
        if length <= _SHORT:
            self._short_ones += 1
            self.burst = Port.burst
        else:
            self._short_ones = 0
            self.burst = _FEW_LONG if length > _LONG else Port.burst

    def _found_none(self, code: int) -> None:
        """A read failed with this error number. Raises `OSError` unless that passes."""
        if code == errno.EAGAIN:
            self._none_waits()
        elif code not in SHORT_OF_MEMORY:  # else the frame waits in the kernel
            raise in_words(OSError(code, os.strerror(code))) from None

    def _read_frame(self, views: Sequence[memoryview]) -> int:
        """Reads a frame into the views, and its net header; returns its length without that."""
        try:
            pieces: list[FrameBuffer] = [self._header, *views, self._beyond]
            return os.readv(self._fd, pieces) - NET_HDR_SIZE
        except OSError as error:
            if error.errno != errno.EINVAL or len(views) <= IOV_MAX - 2:
                raise
            return self._read_private(views)

    def _read_apart(self, room: PlacesRoom, limit: int) -> int | None:
        """Reads frames that are short enough for one place each; None if they may well not be.

        The net header goes along: the kernel fills in ten bytes of it and sets the rest to 0.
        """
        batches = self._batches
        if batches is None:
            return None
        moved, most = 0, self._likely
        while moved < limit:
            places = room.lend_apart(min(limit - moved, most))
            if places is None:
                return moved or None
            spilling = min(places[1]) <= NET_HDR_SIZE + self.longest
            if spilling and not self._expects_short_ones():
                return moved or None
            if spilling:
                places = places[0][:_SPILLS], places[1][:_SPILLS]
            asked, most = len(places[0]), batches.COUNT
            try:
                results = batches.read_spilling(places) if spilling else batches.read(places)
            except OSError:  # forbidden since (seccomp); the plain way may not be
                self.close()
                return moved or None
            longer: list[Frame] = []
            if spilling:
                lengths = self._received_spilling(results, places, longer)
            else:
                lengths = self._received(results, places)
            count = len(lengths)
            if count:
                addresses = places[0][:count]
                starts = batches.gather_starts(addresses, room.looks_at)
                if room.commit_apart(lengths, starts):
                    batches.slab.put_back()
            for frame in longer:
                room.commit_private(frame)
            moved += count + len(longer)
            if count + len(longer) < asked:
                self._none_waits()
                break
        self._likely = min(max(2 * moved, _FEW), batches.COUNT)  # as many as now, or more
        if 0 < moved < _WORTH_SPILLS:
            self._short_ones = min(self._short_ones, _MANY_SHORT - _ALONE)
        return moved

    def _expects_short_ones(self) -> bool:
        """Whether the next frames are likely to fit their places though longer ones may come."""
        return self._short_ones >= _MANY_SHORT and self._longest_usual <= _LONGEST_SEGMENTED

    def _received_spilling(
        self, results: array[int], places: Places, longer: list[Frame]
    ) -> array[int]:
        """The lengths of the frames that came and stand in the first places then.

        From the first one on that is longer than its place, they are copied into `longer`.
        """
        addresses, sizes = places
        if all_between(results, 1, min(sizes)):
            return array("I", results.tobytes())
        assert self._batches is not None
        lengths = array("I")
        longest = min(self.longest, self._longest_usual)
        for index, result in enumerate(results):
            if 0 < result <= sizes[index] and len(lengths) == index:
                lengths.append(result)
            elif result > NET_HDR_SIZE + longest:
                self._longer_than(longest)
            elif result > 0:
                if result > sizes[index]:
                    self._short_ones = 0
                longer.append(self._batches.whole(index, addresses[index], sizes[index], result))
            elif -result not in _NOT_NOW and not (lengths or longer):
                raise in_words(OSError(-result, os.strerror(-result)))
        return lengths

    def _received(self, results: array[int], places: Places) -> array[int]:
        """The lengths of the frames that came, which stand in the first places then."""
        if all_between(results, 1, self.longest + NET_HDR_SIZE):
            return array("I", results.tobytes())
        addresses, sizes = places
        lengths = array("I")
        for index, result in enumerate(results):
            # Cut; or too long for the place that it would move up to (they need not be alike).
            if result >= min(sizes[index], sizes[len(lengths)]):
                self._too_long()
            elif result > 0:
                if len(lengths) < index:  # one came after there had been none
                    ctypes.memmove(addresses[len(lengths)], addresses[index], result)
                lengths.append(result)
            elif -result not in _NOT_NOW and not lengths:
                raise in_words(OSError(-result, os.strerror(-result)))
        if lengths and max(lengths) > NET_HDR_SIZE + self.longest:
            self.on_truncated()  # the MTU has changed
        return lengths

    def _longer_than(self, longest: int) -> None:
        """Drops a frame that was longer than that. If that was what is usual, no more is taken for
        granted; else the MTU has changed, and segments are what they were."""
        if longest == self._longest_usual:
            self._longest_usual = MAX_FRAME
        self._too_long()

    def _too_long(self) -> None:
        """Drops a frame that may have been cut; the MTU has changed, or is meant to hold more."""
        self.dropped["too long"] += 1
        self.on_truncated()

    def _refused(self, frame: Frame, error: OSError) -> None:
        """Counts a frame that the kernel did not take, or raises when no frame can be taken."""
        if error.errno == errno.EINVAL and len(frame) > IOV_MAX:
            if self.write_burst([[frame[0], b"".join(frame[1:])]]) == 0:
                self.dropped["no memory"] += 1
        else:
            self.count_refusal(error)

    def count_refusal(self, error: OSError) -> None:
        """Counts a frame that the kernel did not take, or raises when no frame can be taken."""
        if error.errno == errno.EINVAL:
            self.dropped["bad header"] += 1
        elif error.errno == errno.EMSGSIZE:
            self.dropped["too long"] += 1
        elif error.errno in SHORT_OF_MEMORY:
            self.dropped["no memory"] += 1
        elif error.errno == errno.EIO:  # tun.c: what a write gives while the interface is down
            self.dropped["interface down"] += 1
        else:
            raise in_words(error)

    def _read_private(self, views: Sequence[memoryview]) -> int:
        """Reads a frame for a room in more pieces than one readv takes."""
        frame = bytearray(min(sum(map(len, views)), MAX_FRAME) + 1)
        length = os.readv(self._fd, [self._header, frame]) - NET_HDR_SIZE
        if length < len(frame):
            scatter([memoryview(frame)[:length]], views)
        return length


def in_words(error: OSError) -> OSError:
    """The same error; what it means for a tap is said where that is something of its own."""
    if error.errno == errno.EBADFD:
        return OSError(error.errno, "the tap is gone, or was never attached")
    return error
