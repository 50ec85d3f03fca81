"""Linux's tap as a `Link`: one file descriptor per queue, a `virtio_net_hdr` on every frame.

The kernel speaks virtio's own header (`IFF_VNET_HDR`), so that a frame goes between guest memory
and the kernel as it is: nothing is translated here. What the kernel may leave undone in the frames
it gives is told to it with TUNSETOFFLOAD; what it takes undone is always the same.

Opening a tap that is not there creates it, which needs CAP_NET_ADMIN; a persistent tap that belongs
to the user does not. Addresses, routes and bridges are left to the system's own tools, and so is
doing in software what the kernel cannot.

Sources: uapi/linux/if_tun.h, drivers/net/tun.c, netdevice(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import TypeVar, cast

from vq.abi import NET_HDR_SIZE
from vq.errors import UsageError
from vq.gather import IoVectors, Slab
from vq.io_uring import Opcode, RequestRing
from vq.ioctl import Direction
from vq.ioctl import linux as _number
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
    Tap,
    scatter,
)
from vq.memory import address_of
from vq.netlink import interface_in
from vq.offload import Offload, TunF, tun_flags_for, tun_offloads

__all__ = ["LinuxTap", "LinuxTapPort"]

SYSTEM_CALLS = ("readv", "writev")

DEVICE = "/dev/net/tun"

TUNSETIFF = _number(Direction.WRITE, "T", 202, 4)
TUNSETPERSIST = _number(Direction.WRITE, "T", 203, 4)
TUNGETFEATURES = _number(Direction.READ, "T", 207, 4)
TUNSETOFFLOAD = _number(Direction.WRITE, "T", 208, 4)
TUNGETIFF = _number(Direction.READ, "T", 210, 4)
TUNGETVNETHDRSZ = _number(Direction.READ, "T", 215, 4)
TUNSETVNETHDRSZ = _number(Direction.WRITE, "T", 216, 4)
TUNSETQUEUE = _number(Direction.WRITE, "T", 217, 4)
TUNSETVNETLE = _number(Direction.WRITE, "T", 220, 4)
TUNGETVNETLE = _number(Direction.READ, "T", 221, 4)
TUNSETCARRIER = _number(Direction.WRITE, "T", 226, 4)
TUNGETDEVNETNS = _number(Direction.NONE, "T", 227, 0)

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 3
IFF_UP = 1

IFNAMSIZ = 16
IFREQ = struct.Struct("16sH22x" if struct.calcsize("P") == 8 else "16sH14x")
"""`struct ifreq` with a u16 of flags: 40 bytes, 32 where pointers have 4."""
IFREQ_INT = struct.Struct("16si20x" if struct.calcsize("P") == 8 else "16si12x")
IFREQ_POINTER = struct.Struct("16sP16x" if struct.calcsize("P") == 8 else "16sP12x")
DRVINFO = struct.Struct("=I32s32s32s32s32s12s5I")

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

T = TypeVar("T")


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
            raise _in_words(OSError(code, os.strerror(code))) from None

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
                raise _in_words(OSError(-result, os.strerror(-result)))
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
                raise _in_words(OSError(-result, os.strerror(-result)))
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
            raise _in_words(error)

    def _read_private(self, views: Sequence[memoryview]) -> int:
        """Reads a frame for a room in more pieces than one readv takes."""
        frame = bytearray(min(sum(map(len, views)), MAX_FRAME) + 1)
        length = os.readv(self._fd, [self._header, frame]) - NET_HDR_SIZE
        if length < len(frame):
            scatter([memoryview(frame)[:length]], views)
        return length


class LinuxTap(Tap):
    """A Linux tap with one port per queue."""

    port_ioctls = (TUNSETQUEUE,)
    control_ioctls = (
        *(TUNSETOFFLOAD, TUNGETIFF, TUNGETDEVNETNS, TUNSETCARRIER, TUNSETPERSIST),
        *(SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU),
    )

    ports: tuple[LinuxTapPort, ...] = ()
    known_flags: TunF
    """Each TUN_F_* flag that this kernel knows."""

    _fds: tuple[int, ...]
    _control: socket.socket
    _namespace: str | None = None

    def __init__(
        self,
        name: str = "tap%d",
        *,
        queues: int = 1,
        persist: bool = False,
        namespace: str | None = None,
    ) -> None:
        """Attaches to the tap `name`, or creates it; the kernel fills in a ``%d``.

        With `persist` the tap outlives this object. `namespace` is a network namespace, the name of
        one that ``ip netns`` made or a path; without it the tap is looked for in our own.

        Raises `UsageError` for a name that cannot be a tap's and for more queues than the tap has,
        `OSError` with a plain sentence for what the kernel refuses.
        """
        _check_name(name)
        if queues < 1:
            raise UsageError(f"a tap has at least one queue, not {queues}")
        self._namespace = namespace
        self._take(_in_namespace(namespace, lambda: _open_queues(name, queues)))
        if persist:
            self._or_close(lambda: fcntl.ioctl(self._fds[0], TUNSETPERSIST, 1))

    @classmethod
    def from_fds(cls, fds: Sequence[int]) -> LinuxTap:
        """A tap that somebody else has opened, one descriptor per queue; all are taken over.

        Each must have been attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. They are closed
        also when this fails: with `UsageError` when one is no such tap.
        """
        tap = cls.__new__(cls)
        tap._take(fds)
        return tap

    # --- what all ports share ---

    @property
    def is_gone(self) -> bool:
        """Whether the interface was deleted; then the descriptors are of none."""
        return not all(map(_is_attached, self._fds))

    def recover(self) -> None:
        """See `Link.recover`."""
        if self.attach_again() and self.on_change is not None:
            self.on_change()

    def attach_again(self) -> bool:
        """See `Tap.attach_again`.

        An interface is looked for where the old one was opened. tun.c: a descriptor whose
        interface is gone can be attached anew.
        """
        lost = [fd for fd in self._fds if not _is_attached(fd)]
        name, queues = self.name, len(self._fds)
        if not lost or not _in_namespace(
            self._namespace, lambda: _attach_to_present(lost, name, queues)
        ):
            return False
        self._set_up_queues()
        self.was_attached_again()
        self.request_offloads(Offload.NONE)
        return True

    def was_attached_again(self) -> None:
        """See `Tap.was_attached_again`: each queue that is attached is in use."""
        for port in self.ports:
            port.active = True

    def request_offloads(self, wanted: Offload) -> None:
        """Tells the kernel what it may leave undone; frames that wait already stay as they are."""
        flags = tun_flags_for(wanted, self.known_flags)
        fcntl.ioctl(self._fds[0], TUNSETOFFLOAD, int(flags))
        self.expect(tun_offloads(flags), self.mtu)

    def expect(self, delivers: Offload, mtu: int | None) -> None:
        """See `Tap.expect`."""
        self.delivers = delivers
        if delivers & ~Offload.CSUM or mtu is None:
            self.max_frame = MAX_FRAME
        else:
            self.max_frame = min(ETHER_HEADER + TAGS + mtu, MAX_FRAME)
        for port in self.ports:
            port.expect(self.max_frame)

    @property
    def ports_are_apart(self) -> bool:  # type: ignore[override]
        """Each queue has a descriptor of its own, and an io_uring."""
        return len(self.ports) > 1

    def serve_apart(self, ports: Collection[int], on_truncated: Callable[[], None]) -> None:
        """See `Link.serve_apart`."""
        for index, port in enumerate(self.ports):
            if index in ports:
                port.on_truncated = on_truncated
            else:
                port.let_go()

    def look_again(self) -> None:
        """See `Link.look_again`."""
        self._measure()

    def keep_control(self) -> None:
        """See `Tap.keep_control`."""
        for port in self.ports:
            port.close()  # the kernel's side of it is not copied by a fork, but shared

    def leave_control(self, on_truncated: Callable[[], None]) -> None:
        """See `Tap.leave_control`."""
        self._control.close()
        for port in self.ports:
            port.on_truncated = on_truncated
            port.open()

    def activate_ports(self, count: int) -> None:
        """Attaches the first `count` queues and detaches the others, with what waits in them."""
        if not 1 <= count <= len(self.ports):
            raise UsageError(f"{self.name} has {len(self.ports)} queues, {count} cannot be used")
        for index, port in enumerate(self.ports):
            wanted = index < count
            if port.active != wanted:
                flags = IFF_ATTACH_QUEUE if wanted else IFF_DETACH_QUEUE
                try:
                    fcntl.ioctl(port.fileno(), TUNSETQUEUE, IFREQ.pack(b"", flags))
                except OSError as error:
                    # tun.c: the queue is so already, by another process that shares it.
                    if error.errno != errno.EINVAL:
                        raise
                port.active = wanted

    @property
    def is_up(self) -> bool:
        """Whether the host has the interface up; False too when it is gone."""
        try:
            return bool(self._flags() & IFF_UP)
        except OSError:
            return False

    @property
    def mtu(self) -> int:
        """The interface's MTU in bytes."""
        with self._whereabouts() as (name, namespace):
            if namespace is not None:
                return interface_in(namespace, self.name).mtu
            answer = fcntl.ioctl(self._control, SIOCGIFMTU, IFREQ_INT.pack(name, 0))
            return int(IFREQ_INT.unpack(answer)[1])

    def set_mtu(self, mtu: int) -> None:
        """Sets the interface's MTU in bytes."""
        self._set(SIOCSIFMTU, lambda name: IFREQ_INT.pack(name, mtu))
        self._measure()

    def set_up(self, up: bool) -> None:
        """Brings the interface up or down."""
        flags = self._flags() & ~IFF_UP | (IFF_UP if up else 0)
        self._set(SIOCSIFFLAGS, lambda name: IFREQ.pack(name, flags & 0xFFFF))

    def set_carrier(self, carrier: bool) -> None:
        """Tells the host whether somebody is at our end of the cable."""
        fcntl.ioctl(self._fds[0], TUNSETCARRIER, struct.pack("i", carrier))

    def set_persistent(self, persistent: bool) -> None:
        """Whether the interface stays when this object and all others let go of it."""
        fcntl.ioctl(self._fds[0], TUNSETPERSIST, int(persistent))

    def close(self) -> None:
        """Closes all queues; a tap that is not persistent goes with the last of them."""
        self._control.close()
        for port in self.ports:
            port.close()
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)

    # --- how it is done ---

    def _take(self, fds: Sequence[int]) -> None:
        """Owns `fds` and makes them what a port needs."""
        self._fds = tuple(fds)
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._control_namespace = _namespace_id(None)
        self._or_close(self._prepare)

    def _or_close(self, step: Callable[[], object]) -> None:
        try:
            step()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if not self._fds:
            raise UsageError("a tap needs at least one file descriptor")
        names = {_attached_name(fd) for fd in self._fds}
        if len(names) > 1:
            raise UsageError(f"the file descriptors are of different taps: {sorted(names)}")
        (self.name,) = names
        self._set_up_queues()
        self.known_flags = _probe(self._fds[0])
        # What the kernel can be asked to leave undone is also what it can finish.
        self.accepts = tun_offloads(self.known_flags)
        self.min_frame = ETHER_HEADER
        self.ports = tuple(LinuxTapPort(fd, self._measure) for fd in self._fds)
        self.request_offloads(Offload.NONE)

    def _set_up_queues(self) -> None:
        for fd in self._fds:
            os.set_blocking(fd, False)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", NET_HDR_SIZE))
            _set_little_endian(fd)

    def _measure(self) -> None:
        """Looks at the MTU again."""
        self.expect(self.delivers, self.mtu)

    def _flags(self) -> int:
        with self._whereabouts() as (name, namespace):
            if namespace is not None:
                return interface_in(namespace, self.name).flags
            answer = fcntl.ioctl(self._control, SIOCGIFFLAGS, IFREQ.pack(name, 0))
            return int(IFREQ.unpack(answer)[1])

    def _set(self, request: int, argument: Callable[[bytes], bytes]) -> None:
        """Changes the interface itself. In another namespace that takes CAP_SYS_ADMIN."""
        with self._whereabouts() as (name, namespace):
            if namespace is None:
                fcntl.ioctl(self._control, request, argument(name))
            else:
                _in_namespace(namespace, lambda: _set_here(request, argument(name)))

    @contextmanager
    def _whereabouts(self) -> Iterator[tuple[bytes, int | None]]:
        """The interface's name by now, and the namespace that it was moved to, None for ours."""
        self.name = _attached_name(self._fds[0])
        name = os.fsencode(self.name)
        try:
            namespace = fcntl.ioctl(self._fds[0], TUNGETDEVNETNS)
        except OSError:  # Linux before 5.10, or not privileged: it is where it was
            yield name, None
            return
        try:
            is_ours = _namespace_id(namespace) == self._control_namespace
            yield name, None if is_ours else namespace
        finally:
            os.close(namespace)


# --- opening -------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    encoded = os.fsencode(name)
    if len(encoded) >= IFNAMSIZ:
        raise UsageError(
            f"the tap name {name!r} is too long: Linux takes at most {IFNAMSIZ - 1} bytes"
        )
    if not encoded or name in (".", "..") or any(c in "/:\0" or c.isspace() for c in name):
        raise UsageError(f"{name!r} cannot be the name of a network interface")


def _open_queues(name: str, queues: int) -> list[int]:
    """Attaches `queues` descriptors to the tap `name`, in the namespace of this thread."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(_open_device())
            name = _attach_one(fds[-1], name, several=queues > 1)
    except OSError as error:
        _close_all(fds)
        raise _explained(error, name, queues) from error
    except BaseException:
        _close_all(fds)
        raise
    return fds


def _attach_to_present(fds: Sequence[int], name: str, queues: int) -> bool:
    """Attaches some of a tap's `queues` descriptors to the interface `name`, if there is one.

    It is looked for first, since attaching would make one.
    """
    if _kind_of(name) is None:
        return False
    try:
        for fd in fds:
            _attach_one(fd, name, several=queues > 1)
    except OSError as error:
        raise _explained(error, name, queues) from error
    return True


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            reason = f"there is no {DEVICE}: load the kernel's tun module, or let the container in"
        elif error.errno in (errno.ENODEV, errno.ENXIO):
            reason = f"{DEVICE} has no driver behind it: load the kernel's tun module"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"this user may not open {DEVICE} for reading and writing"
        else:
            reason = f"{DEVICE} cannot be opened: {error.strerror}"
        raise OSError(error.errno, reason) from error


def _attach_one(fd: int, name: str, *, several: bool) -> str:
    """Attaches one of several queues, or the only one, and returns the interface's name."""
    if several:
        return _attach(fd, name, IFF_MULTI_QUEUE)
    try:
        return _attach(fd, name, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # One queue of a tap that was made for several.
        return _attach(fd, name, IFF_MULTI_QUEUE)


def _attach(fd: int, name: str, more: int) -> str:
    """Attaches a queue, and returns the name that the kernel gave."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more
    answer = fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(os.fsencode(name), flags))
    return _name_of(answer)


def _explained(error: OSError, name: str, queues: int) -> Exception:
    """What the kernel meant when it refused to attach a queue."""
    if error.errno == errno.EBUSY:
        reason = f"the tap {name} is in use by another program"
    elif error.errno == errno.EPERM:
        reason = (
            f"attaching to the tap {name} needs CAP_NET_ADMIN, "
            "or a tap that was made for this user (ip tuntap add NAME mode tap user USER)"
        )
    elif error.errno == errno.E2BIG:
        return UsageError(f"the tap {name} cannot have {queues} queues in use")
    elif error.errno == errno.EINVAL:
        kind = _kind_of(name)
        if kind is not None and kind != "tap":
            return UsageError(f"the network interface {name} is not a tap")
        if kind == "tap" and queues > 1:
            return UsageError(
                f"the tap {name} was made with one queue: {queues} need one made with multi_queue"
            )
        return UsageError(f"the kernel takes no tap named {name!r}")
    else:
        return error
    return OSError(error.errno, reason)


def _kind_of(name: str) -> str | None:
    """What the interface `name` is: ``tap``, ``tun``, ``other``, or None when there is none."""
    buffer = ctypes.create_string_buffer(DRVINFO.pack(ETHTOOL_GDRVINFO, *[b""] * 6, *[0] * 5))
    request = IFREQ_POINTER.pack(os.fsencode(name), ctypes.addressof(buffer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, SIOCETHTOOL, request)
        except OSError as error:
            return None if error.errno == errno.ENODEV else "other"
    _, driver, _, _, bus, *_ = DRVINFO.unpack(buffer.raw[: DRVINFO.size])
    # tun.c: the driver is "tun" for both, the bus says which.
    return bus.rstrip(b"\0").decode() if driver.rstrip(b"\0") == b"tun" else "other"


# --- on an attached descriptor -------------------------------------------------------------------


def _attached_name(fd: int) -> str:
    """The present name of the tap that `fd` is a queue of."""
    try:
        answer = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ.size))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EBADF):
            raise UsageError(f"file descriptor {fd} is not an open tap") from error
        raise _in_words(error) from error
    flags = IFREQ.unpack(answer)[1]
    if flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != IFF_TAP | IFF_NO_PI | IFF_VNET_HDR:
        raise UsageError(
            f"file descriptor {fd} must be a tap with IFF_NO_PI and IFF_VNET_HDR "
            f"(its flags are {flags:#x})"
        )
    return _name_of(answer)


def _is_attached(fd: int) -> bool:
    try:
        fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ.size))
    except OSError as error:
        return error.errno != errno.EBADFD
    return True


def _in_words(error: OSError) -> OSError:
    """The same error; what it means for a tap is said where that is something of its own."""
    if error.errno == errno.EBADFD:
        return OSError(error.errno, "the tap is gone, or was never attached")
    return error


def _set_little_endian(fd: int) -> None:
    """Makes the header's fields little-endian, as VERSION_1 has them, whatever the processor."""
    try:
        fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
    except OSError:  # before Linux 4.1 the header has the processor's byte order
        if sys.byteorder != "little":
            raise


def _probe(fd: int) -> TunF:
    """The TUN_F_* flags that the kernel knows, each tried in the smallest set that may hold it."""
    known = TunF(0)
    for tried in (
        TunF.CSUM,
        TunF.CSUM | TunF.TSO4,
        TunF.CSUM | TunF.TSO6,
        TunF.CSUM | TunF.TSO4 | TunF.TSO_ECN,
        TunF.CSUM | TunF.USO4 | TunF.USO6,
    ):
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, int(tried))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            known |= tried
    return known


def _name_of(ifreq: bytes) -> str:
    return os.fsdecode(ifreq[:IFNAMSIZ].split(b"\0")[0])


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _set_here(request: int, argument: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, request, argument)


# --- namespaces ----------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


def _namespace_id(fd: int | None) -> tuple[int, int] | None:
    """What tells one network namespace from another; that of this thread without `fd`."""
    try:
        status = os.stat("/proc/thread-self/ns/net" if fd is None else fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _in_namespace(namespace: str | int | None, work: Callable[[], T]) -> T:
    """Does `work` in a network namespace, on a thread of its own so that ours stays where it is."""
    if namespace is None:
        return work()
    if isinstance(namespace, str):
        path = namespace if "/" in namespace else f"/run/netns/{namespace}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"there is no network namespace {path}: {error.strerror}") from error
        try:
            return _in_namespace(fd, work)
        finally:
            os.close(fd)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace, CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"the namespace cannot be entered: {os.strerror(number)}")
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="vq-setns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
