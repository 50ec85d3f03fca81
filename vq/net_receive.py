"""Where received frames go: a window of a guest's receive buffers (virtio 1.3, 5.1.6.3, 5.1.6.4).

`ReceiveWindow` is the `Room` that a net device lends to its link. Frames are read straight into the
guest's buffers. What must not or cannot go there directly takes the way through private memory: all
frames when a locked MAC decides over them, a frame that leaves undone what the guest does not take,
and the part of a frame that is longer than the buffers gathered for it.

There are two ways to hold the buffers. Usual ones are held in a `Run` and lent by address, at a
small part of the price; anything else is held as chains and lent as views. What the short way does
not know (a filter's private frames, a frame that waits, a buffer of several pieces) is left to the
plain one: the run becomes chains, and while there are any, these are used.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence

from vq.abi import NET_HDR_GSO_ECN, NET_HDR_SIZE, HdrFlag, HdrGso
from vq.errors import DriverError
from vq.gather import IoVectors
from vq.lanes import alike, all_between, total
from vq.link import MAX_FRAME, MOST_AT_ONCE, Frame, Places, scatter
from vq.memory import address_of
from vq.offload import Offload
from vq.packet import copy_range, cut
from vq.ring_run import Run
from vq.software import HeaderLie, finish
from vq.split_ring import Chain, SplitRing

__all__ = ["ReceiveWindow"]

_REFILL = 64  # chains taken at a time
_MANY = MOST_AT_ONCE  # usual ones: to take more of them at a time takes less for each
_MOST_WAITING = 64
"""Frames of the host's own kept for a guest that offers no buffers."""
_DETOUR = 64
"""Frames that go the plain way before the short one is tried again."""
_START = 16
"""Bytes of a frame that filters look at: addresses, type, one VLAN tag."""
_SHORTEST = NET_HDR_SIZE + _START
"""Shorter buffers are held as chains."""
_MOST_LENT = 1000  # the kernel takes 1024 vectors at a time
_VECTORS = 2048
_NUM_BUFFERS = struct.Struct("<H")
_FIRST_LOOK = struct.Struct("2s10x6s6x2s")
"""What a frame is judged by: flags and gso_type of its net header, destination, type."""
_LOOKED_AT = NET_HDR_SIZE + 14
_FLAGS = int(HdrFlag.NEEDS_CSUM | HdrFlag.DATA_VALID)  # others need features that we do not offer
_VLAN_TYPE = b"\x81\x00"
_VLAN = int.from_bytes(_VLAN_TYPE, sys.byteorder)
_ONE_BUFFER = (1).to_bytes(2, "little")
_ONES = memoryview(b"\1" * MOST_AT_ONCE)
_NOT_PREPARED: tuple[memoryview, ...] = ()
_NOTHING_UNDONE = memoryview(bytes(2 * MOST_AT_ONCE)).cast("H")


class ReceiveWindow:
    """A receive queue's buffers that were popped and are not used yet, oldest first.

    A frame that needs more room than the guest has made available waits in private memory, and the
    link is lent no room until it found its place: nothing that was read gets lost, and no more
    than one burst's worth of memory is held.

    `stats` counts ``rx_frames``, ``rx_bytes`` and, as ``rx_dropped: reason``, what was dropped.
    """

    def __init__(self, ring: SplitRing, *, mergeable: bool, stats: Counter[str]) -> None:
        self.takes = Offload.NONE
        self.wants: Callable[[bytes], bool] | None = None
        """Asked with the first 16 bytes of each frame, unless it is None."""
        self.private = False
        """Whether no frame may touch the guest's memory before `wants` has agreed to it."""
        self.largest_plain: int | None = None
        """The longest frame in bytes that may come without segmentation left undone."""
        self.starved = False
        """Whether frames wait for room, here or in the link; for the device to set back."""
        self._ring = ring
        self._mergeable = mergeable
        self._stats = stats
        spill = (ctypes.c_ubyte * MAX_FRAME)()
        self._spill = memoryview(spill).cast("B")
        self._usual = _UsualBuffers(ring, self._spill)
        self._chains: list[Chain] = []  # empty while there are usual ones
        self._finished: list[Chain] = []
        self._detour = 0  # frames for which the plain way is kept to
        self._enough = False  # in this turn: the chains were so long that no more are followed
        self._given_back = False  # whether used elements were written since the last flush
        self._pending: deque[Frame] = deque()
        self._views: list[memoryview] = []  # lent for the next frame, the spill last
        self._first_room = 0  # bytes of the frame that the first buffer takes
        self._gathered = 1  # buffers that the views lie in
        self._room = 0  # bytes of the frame that these take
        self._shortest = 0  # bytes in the smallest of the buffers; 0 with a chain of several
        self._expected = 0  # length of the last frame: the next may well be as long
        self._as_is = frozenset((b"\0\0",))
        self.looks_at = NET_HDR_SIZE
        """See `vq.link.PlacesRoom`."""
        self._own_address: bytes | None = None  # whose frames need not be shown to the filter
        self._always_wanted: list[memoryview] = []  # the same for `_all_wanted`
        self._frames = self._bytes = 0  # received, and not in `stats` yet

    def configure(
        self,
        *,
        takes: Offload,
        wants: Callable[[bytes], bool] | None,
        private: bool,
        largest_plain: int | None,
        always_wanted: bytes | None = None,
    ) -> None:
        """Sets what the guest takes undone, the filter, and whether frames stay private first.

        Frames to the address `always_wanted` need not be shown to the filter unless they have a
        VLAN tag.
        """
        self.takes = takes
        self.wants = wants
        self.looks_at = NET_HDR_SIZE if wants is None else NET_HDR_SIZE + _START
        self._own_address = always_wanted
        self._always_wanted = _columns(always_wanted) if always_wanted else []
        self.private = private
        self.largest_plain = largest_plain
        self._as_is = _headers_taken_as_they_are(takes)
        pending, self._pending = self._pending, deque()
        for frame in pending:  # what waits since before keeps to the new terms too
            self._finish(frame)

    # --- Room ---------------------------------------------------------------------------------

    def views(self) -> Sequence[memoryview]:
        """Room for the largest frame; empty while there is none. See `vq.link.Room`."""
        self._leave_usual()
        if (self._pending and not self._place_pending()) or (
            not self._chains and not self._refill()
        ):
            self.starved = True
            return ()
        if self.private:
            self._views = [self._spill]
            return self._views
        chain = self._chains[0]
        buffers = chain.writable
        if buffers and len(buffers[0]) > NET_HDR_SIZE:
            views = [buffers[0][NET_HDR_SIZE:], *buffers[1:]]
        else:
            views = cut(buffers, NET_HDR_SIZE)  # the header may lie over descriptors in any way
            if chain.writable_size < NET_HDR_SIZE:
                raise self._too_small(chain)
        room = len(views[0]) if len(views) == 1 else sum(map(len, views))
        self._first_room = room
        self._gathered = 1
        if self._mergeable and room < self._expected:
            room = self._gather(views, room)
        self._room = room
        views.append(self._spill)
        self._views = views
        return views

    def commit(self, header: bytes, length: int) -> None:
        """A frame stands in the views. See `vq.link.Room`."""
        views = self._views
        if self.wants is not None:
            start = min(length, _START)
            first = views[0]
            if not self.wants(
                bytes(first[:start]) if len(first) >= start else copy_range(views, 0, start)
            ):
                self._drop("filtered")
                return
        if self._over_mtu(header, length):
            return
        if self.private or header[:2] not in self._as_is:
            self.deliver([header, copy_range(views, 0, length)])
            return
        self._expect(length)
        if length <= self._first_room:
            chain = self._chains.pop(0)
            chain.written = NET_HDR_SIZE + length
            _write_header(chain, header, _ONE_BUFFER)
            self._finished.append(chain)
            self._count(length)
        else:
            self._commit_over_buffers(header, length)

    def _over_mtu(self, header: bytes, length: int) -> bool:
        """Whether a frame is longer than it may be, and was dropped for that."""
        if self.largest_plain is None or length <= self.largest_plain or header[1]:
            return False
        self._drop("longer than the mtu")
        return True

    def _expect(self, length: int) -> None:
        """The next frames are like the recent ones: a short one among long ones changes little."""
        self._expected = max(length, self._expected - (self._expected >> 3))

    # --- PlacesRoom: the short way --------------------------------------------------------------

    def lend_apart(self, limit: int) -> Places | None:
        """See `vq.link.PlacesRoom`."""
        if not self._holds_usual():
            return None
        self._usual.give_back()
        run = self._usual.run
        limit = min(limit, MOST_AT_ONCE)
        if len(run) < limit:
            self._usual.refill()
        if run.shortest < _SHORTEST:
            return None
        return run.addresses[:limit], run.lengths[:limit]

    def commit_apart(self, lengths: array[int], starts: memoryview) -> bool:
        """See `vq.link.PlacesRoom`."""
        count = len(lengths)
        if not (
            self._are_as_is(starts, count)
            and self._all_wanted(starts, lengths)
            and (self.largest_plain is None or max(lengths) <= NET_HDR_SIZE + self.largest_plain)
        ):
            self._commit_one_by_one(lengths, starts)
            return False
        starts[10 :: self.looks_at] = _ONES[:count]  # num_buffers (5.1.6.4)
        self._usual.use(lengths)
        self._frames += count
        self._bytes += total(lengths) - NET_HDR_SIZE * count
        return True

    def _are_as_is(self, starts: memoryview, count: int) -> bool:
        """Whether the guest takes what these frames leave undone."""
        flags_and_gso = starts.cast("H")[:: self.looks_at // 2]
        if flags_and_gso == _NOTHING_UNDONE[:count]:
            return True
        return all(pair.to_bytes(2, sys.byteorder) in self._as_is for pair in flags_and_gso)

    def _all_wanted(self, starts: memoryview, lengths: array[int]) -> bool:
        """Whether all frames pass the filter; where all are for one address, in a few steps."""
        if self.wants is None:
            return True
        count, size = len(lengths), self.looks_at
        words = starts.cast("H")
        destination = range(NET_HDR_SIZE // 2, NET_HDR_SIZE // 2 + 3)
        if (
            self._always_wanted
            and all_between(lengths, _LOOKED_AT, NET_HDR_SIZE + MAX_FRAME)
            and all(
                words[word :: size // 2] == column[:count]
                for word, column in zip(destination, self._always_wanted, strict=True)
            )
        ):
            types = words[NET_HDR_SIZE // 2 + 6 :: size // 2]
            if _VLAN not in types.tolist():
                return True
        return all(
            self.wants(bytes(starts[first + NET_HDR_SIZE : first + min(size, length)]))
            for first, length in zip(range(0, size * count, size), lengths, strict=True)
        )

    def _commit_one_by_one(self, lengths: Sequence[int], starts: memoryview) -> None:
        """Some of the frames are not wanted, or leave undone what the guest does not take.

        All of them are copied, and get their places anew.
        """
        frames: list[Frame] = []
        for index, length in enumerate(lengths):
            start = self.looks_at * index
            header = bytes(starts[start : start + NET_HDR_SIZE])
            frames.append([header, bytes(self._usual.run.view(index)[NET_HDR_SIZE:length])])
        for frame in frames:
            self.commit_private(frame)

    def commit_private(self, frame: Frame) -> None:
        """See `vq.link.PlacesRoom`."""
        if self.wants is not None and not self.wants(b"".join(frame[1:])[:_START]):
            self._drop("filtered")
        else:
            self.deliver(frame)

    def lend_together(self, longest: int) -> tuple[IoVectors, int, int] | None:
        """See `vq.link.PlacesRoom`."""
        if not self._usual.left and not self._holds_usual():
            return None
        return self._usual.lend(NET_HDR_SIZE + longest)

    def commit_together(self, length: int) -> None:
        """See `vq.link.PlacesRoom`. What the header says by now concerns the guest alone."""
        usual = self._usual
        run, at = usual.run, usual.used
        memory, start = run.memory, run.addresses[at] - run.base
        header, destination, kind = _FIRST_LOOK.unpack_from(memory, start)
        if header not in self._as_is:
            self._commit_as_chains(length)
            return
        if (
            self.wants is not None
            and (destination != self._own_address or kind == _VLAN_TYPE or length < _LOOKED_AT)
            and not self.wants(bytes(memory[start + NET_HDR_SIZE : start + min(length, _SHORTEST)]))
        ):
            self._drop("filtered")
            return
        payload = length - NET_HDR_SIZE
        if self.largest_plain is not None and self._over_mtu(header, payload):
            return
        if length <= run.lengths[at]:
            _NUM_BUFFERS.pack_into(memory, start + 10, 1)  # 5.1.6.4
            usual.use((length,))
        elif not self._mergeable:
            self._drop("longer than the receive buffer")
            return
        elif written := usual.spread(length):
            _NUM_BUFFERS.pack_into(memory, start + 10, len(written))
            usual.use(written)
        else:
            self._commit_as_chains(length)
            return
        self._frames += 1
        self._bytes += payload

    def lend_alone(self) -> Sequence[memoryview]:
        """See `vq.link.PlacesRoom`."""
        return self._usual.alone

    def commit_alone(self, length: int) -> None:
        """See `vq.link.PlacesRoom`. The same as `commit_together`, for the usual frame: the guest
        waits for nothing but this."""
        usual = self._usual
        buffer = usual.alone[0]
        header, destination, kind = _FIRST_LOOK.unpack_from(buffer)
        if (
            _LOOKED_AT <= length <= len(buffer)
            and header in self._as_is
            and (self.wants is None or (destination == self._own_address and kind != _VLAN_TYPE))
            and (self.largest_plain is None or length <= NET_HDR_SIZE + self.largest_plain)
        ):
            buffer[10:12] = _ONE_BUFFER  # num_buffers (5.1.6.4)
            usual.give_back_alone(length)
            self._frames += 1
            self._bytes += length - NET_HDR_SIZE
        else:
            usual.lent = 1
            self.commit_together(length)

    def _commit_as_chains(self, length: int) -> None:
        """A frame that stands in the first buffers not used yet, and perhaps in the spill."""
        lent = self._usual.lent
        self._leave_usual()
        buffers = [view for chain in self._chains[:lent] for view in chain.writable]
        views = [*buffers, self._spill]
        header = copy_range(views, 0, NET_HDR_SIZE)
        self._views = cut(views, NET_HDR_SIZE)
        self._gathered = lent
        self._room = sum(map(len, buffers)) - NET_HDR_SIZE
        self._first_room = len(buffers[0]) - NET_HDR_SIZE
        self.commit(header, length - NET_HDR_SIZE)

    def _holds_usual(self) -> bool:
        """Whether there are usual buffers to use; takes or finds some if none are held."""
        if self.private or self._pending:
            return False
        if self._usual.left:
            return True
        if self._chains:
            self._detour -= 1
            if self._detour > 0 or not self._shortest:
                return False
            self._detour = _DETOUR
        self._give_back()  # the older ones first
        if not self._chains:
            return self._usual.refill()
        if not self._usual.adopt(self._chains):
            return False
        self._chains = []
        return True

    def _leave_usual(self) -> None:
        """Goes over to chains."""
        self._usual.give_back()
        if self._usual.left:
            self._detour = _DETOUR
            self._keep(self._usual.to_chains())

    def _give_back(self) -> None:
        """Writes the used elements of the buffers that were filled."""
        if self._usual.used:
            self._usual.give_back()
        if self._finished:
            finished, self._finished = self._finished, []
            self._ring.write_used_burst(finished)
            self._given_back = True

    # --- for the device -----------------------------------------------------------------------

    def add(self, frame: Frame) -> bool:
        """Keeps a frame of the host's own making until `retry`; False when too many wait.

        Nothing of the guest's is touched here, so it may come at any time.
        """
        if len(self._pending) >= _MOST_WAITING:
            return False
        self._pending.append(frame)
        return True

    def deliver(self, frame: Frame) -> None:
        """Takes a private frame that has passed the filters, and does what the guest does not
        take undone. It is placed as soon as there is room.
        """
        self._leave_usual()
        self._finish(frame)
        if not self._place_pending():
            self.starved = True

    def flush(self) -> bool:
        """Writes the used elements of the buffers that were filled; whether there were any."""
        self._give_back()
        given_back = self._given_back or self._usual.given_back
        self._given_back = self._usual.given_back = False
        return given_back

    def count_received(self) -> None:
        """Has `stats` tell of the frames that came: for when the guest knows of them."""
        if self._frames:
            self._stats["rx_frames"] += self._frames
            self._stats["rx_bytes"] += self._bytes
            self._frames = self._bytes = 0

    def prepare(self) -> None:
        """A turn is over, and the next frame is expected to come alone: has room ready for it."""
        if not (self._chains or self.private):
            self._usual.prepare()

    def retry(self) -> None:
        """A turn begins, perhaps with new buffers: places what waits for them."""
        self._enough = False
        if self._pending:
            self._leave_usual()
        self.starved = bool(self._pending) and not self._place_pending()

    def put_back(self) -> None:
        """Gives the unused buffers back to the ring, for whoever works on it later."""
        self._leave_usual()
        self._ring.undo_pop(self._chains)
        self._chains.clear()

    def drop_pending(self, reason: str) -> None:
        """Gives up the frames that wait for room."""
        if self._pending:
            self._stats["rx_dropped: " + reason] += len(self._pending)
            self._pending.clear()

    # --- inside ---------------------------------------------------------------------------------

    def _finish(self, frame: Frame) -> None:
        """Queues a private frame, or what becomes of it, to be placed."""
        header = frame[0]
        if header[0] & ~_FLAGS:
            frame = [bytes((header[0] & _FLAGS,)) + header[1:], *frame[1:]]
        try:
            frames = finish(frame, self.takes)
        except HeaderLie as lie:
            self._drop(lie.reason)
            return
        limit = self.largest_plain
        for finished in frames:
            if limit is not None and not finished[0][1] and sum(map(len, finished[1:])) > limit:
                self._drop("longer than the mtu")
            else:
                self._pending.append(finished)

    def _refill(self) -> bool:
        """Takes more buffers; False when there are none, or none for this turn."""
        if self._enough:
            return False
        chains = self._ring.pop_burst(_REFILL)
        self._enough = self._ring.burst_was_long  # and these may have hardly a byte
        self._keep(chains)
        return bool(chains)

    def _keep(self, chains: list[Chain]) -> None:
        shortest = self._shortest if self._chains else MAX_FRAME + NET_HDR_SIZE
        for chain in chains:
            if chain.readable:
                raise self._misfit(chains, chain)
            buffers = chain.writable
            if len(buffers) == 1:
                chain.written = size = len(buffers[0])  # full, until it is found to be less
            else:
                chain.written, size = chain.writable_size, 0
            if size < shortest:
                shortest = size
        self._shortest = shortest
        self._chains.extend(chains)

    def _misfit(self, chains: list[Chain], misfit: Chain) -> DriverError:
        """A chain with readable buffers is given back empty; the others stay."""
        for chain in chains:
            chain.written = 0 if chain is misfit else chain.writable_size
            (self._finished if chain is misfit else self._chains).append(chain)
        self._shortest = 0
        return DriverError(
            "a readable buffer in a receive queue",
            queue=self._ring.name,
            head=misfit.head,
            section="5.1.6.3",
        )

    def _too_small(self, chain: Chain) -> DriverError:
        chain.written = 0
        self._finished.append(self._chains.pop(0))
        return DriverError(
            f"a receive buffer of {chain.writable_size} bytes has no room for the header",
            queue=self._ring.name,
            head=chain.head,
            section="5.1.6.3.1",
        )

    def _gather(self, views: list[memoryview], room: int) -> int:
        """Adds following buffers to `views` until the expected length fits; returns the room."""
        expected = self._expected
        gathered = 1
        while room < expected:
            if gathered == len(self._chains) and not self._refill():
                break
            if self._shortest:  # one view each: as many as it takes if all are that short
                most = gathered + 1 + (expected - room) // self._shortest
                more = [chain.writable[0] for chain in self._chains[gathered:most]]
                views += more
                room += sum(map(len, more))
                gathered += len(more)
                continue
            for chain in self._chains[gathered:]:
                views += chain.writable
                room += chain.written
                gathered += 1
                if room >= expected:
                    break
        self._gathered = gathered
        return room

    def _commit_over_buffers(self, header: bytes, length: int) -> None:
        """A frame that is longer than the first buffer."""
        if not self._mergeable:
            self._drop("longer than the receive buffer")
            return
        if length > self._room:
            # What is beyond the gathered buffers stands in the spill: it is copied into more.
            spilled = length - self._room
            capacity = 0
            count = self._gathered
            while capacity < spilled:
                if count == len(self._chains) and not self._refill():
                    self.deliver([header, copy_range(self._views, 0, length)])
                    return
                capacity += self._chains[count].written
                count += 1
            more = [
                view for chain in self._chains[self._gathered : count] for view in chain.writable
            ]
            scatter((self._spill[:spilled],), more)
        self._use(header, length)

    def _use(self, header: bytes, length: int) -> None:
        """Marks the first buffers as used by one frame that stands in them already."""
        left = NET_HDR_SIZE + length
        count = 0
        while left > 0:
            chain = self._chains[count]
            left -= chain.written
            count += 1
        used = self._chains[:count]
        del self._chains[:count]
        chain.written += left  # all but the last are full (5.1.6.4.1)
        _write_header(used[0], header, len(used).to_bytes(2, "little"))
        self._finished += used
        self._count(length)

    def _place_pending(self) -> bool:
        """Copies waiting frames into the guest's buffers; whether none waits any more."""
        pending = self._pending
        while pending:
            if not self._place(pending[0]):
                return False
            pending.popleft()
        return True

    def _place(self, frame: Frame) -> bool:
        """Copies one private frame into buffers, or drops it if it can never fit."""
        pieces = frame[1:]
        length = sum(map(len, pieces))
        capacity = 0
        count = 0
        while capacity < NET_HDR_SIZE + length:
            if count == len(self._chains) and not self._refill():
                if self._holds_whole_queue():
                    self._drop("longer than all receive buffers")
                    return True
                return False
            chain = self._chains[count]
            capacity += chain.writable_size
            if not count and capacity < NET_HDR_SIZE:
                raise self._too_small(chain)
            count += 1
            if not self._mergeable:
                break
        if capacity < NET_HDR_SIZE + length:
            self._drop("longer than the receive buffer")
            return True
        views = [view for chain in self._chains[:count] for view in chain.writable]
        scatter((bytes(NET_HDR_SIZE), *pieces), views)
        self._use(bytes(frame[0]), length)
        return True

    def _holds_whole_queue(self) -> bool:
        """Whether the driver has no descriptor left to make more room with, so waiting is vain."""
        return sum(chain.descriptors for chain in self._chains) >= self._ring.size

    def _count(self, length: int) -> None:
        self._frames += 1
        self._bytes += length

    def _drop(self, reason: str) -> None:
        self._stats["rx_dropped: " + reason] += 1


class _UsualBuffers:
    """Receive buffers of the usual kind: held in a run, and shown to the kernel as vectors.

    Frames stand in the first `used` of them, which the ring gets back all at once; `left` are for
    frames to come.
    """

    def __init__(self, ring: SplitRing, spill: memoryview) -> None:
        self.run = Run(ring, writable=True)
        self.used = 0
        self.left = 0
        self.lent = 0
        """How many of those left were lent for the next frame."""
        self.alone: Sequence[memoryview] = _NOT_PREPARED
        """The first of those left, and the spill, if that was prepared; none is used then."""
        self.given_back = False
        """Whether used elements were written; for the window to set back."""
        self._written = array("I")
        self._spill = spill
        self._spill_place = array("Q", [address_of(spill)]), array("I", [len(spill)])
        self._vectors = IoVectors(_VECTORS)
        self._first = 0  # the vector of the run's first buffer
        self._shown = 0  # buffers that have a vector; the spill's is behind them

    def refill(self) -> bool:
        """Takes more buffers; whether there were any."""
        taken = self.run.pop(_MANY)
        self.left += taken
        return taken > 0

    def adopt(self, chains: Sequence[Chain]) -> bool:
        """Takes over chains if all of them are of the usual kind, and not more of them than are
        shown to the kernel at a time. Nothing is held."""
        if len(chains) > _MOST_LENT or not self.run.adopt(chains):
            return False
        self.left = len(chains)
        return True

    def to_chains(self) -> list[Chain]:
        """Goes over to chains. All used ones were given back."""
        self._shown = self.left = 0
        self.alone = _NOT_PREPARED
        return self.run.to_chains()

    def lend(self, room: int) -> tuple[IoVectors, int, int] | None:
        """Vectors for more than `room` bytes; the spill is among them where buffers are too few.

        None when the buffers are too short for this way.
        """
        shortest = self.run.shortest
        if shortest < _SHORTEST or (wanted := 2 + room // shortest) > _MOST_LENT:
            return None
        if self.left < wanted:
            self.refill()
        if self.used + self.left > self._shown:
            self._show()
        self.lent = lent = min(wanted, self.left)
        return self._vectors, self._first + self.used, lent + (lent < wanted)

    def spread(self, length: int) -> array[int] | None:
        """The bytes in each buffer of a frame that fills several; None if there are too few.

        What stands in the spill is copied to where it belongs.
        """
        run, at = self.run, self.used
        full, rest = divmod(length - 1, run.lengths[at])
        written = run.lengths[at : at + full + 1]
        if full < self.lent and alike(written):  # all are as long as the first
            written[full] = rest + 1  # all but the last are full (5.1.6.4.1)
            return written
        left = length
        for last, size in enumerate(run.lengths[at : at + self.lent].tolist(), at):  # noqa: B007
            left -= size
            if left <= 0:
                break
        if left > 0:
            spilled, first = left, at + self.lent
            while sum(run.lengths[first:]) < spilled:
                if not self.refill():
                    return None
            while left > 0:
                last += 1
                left -= run.lengths[last]
            places = [run.view(index) for index in range(first, last + 1)]
            scatter((self._spill[:spilled],), places)
        written = run.lengths[at : last + 1]
        written[-1] += left
        return written

    def prepare(self) -> None:
        """Has `alone` ready, if there are buffers. None is used yet."""
        if not self.alone and (self.left or self.refill()) and self.run.shortest >= _SHORTEST:
            self.alone = self.run.view(0), self._spill

    def use(self, written: Sequence[int]) -> None:
        """Frames stand in the next buffers, so many bytes in each."""
        self.used += len(written)
        self.left -= len(written)
        self._written.extend(written)
        self.alone = _NOT_PREPARED

    def give_back(self) -> None:
        """Writes the used elements."""
        used = self.used
        if used:
            self.run.give_back(self._written)
            self._first += used
            self._shown = max(0, self._shown - used)
            del self._written[:]
            self.used, self.given_back = 0, True

    def give_back_alone(self, written: int) -> None:
        """A frame stands in the first of `alone`, so many bytes: writes the used element."""
        self.run.give_back_one(written)
        self.left -= 1
        if self._shown:
            self._first += 1
            self._shown -= 1
        self.given_back = True
        self.alone = _NOT_PREPARED

    def _show(self) -> None:
        """Gives each buffer its vector."""
        run = self.run
        if not self._shown or self._first + len(run) >= _VECTORS:
            self.give_back()
            self._first = self._shown = 0
        place = self._first + self._shown
        self._vectors.put(place, run.addresses[self._shown :], run.lengths[self._shown :])
        self._shown = len(run)
        self._vectors.put(self._first + self._shown, *self._spill_place)


def _columns(address: bytes) -> list[memoryview]:
    """The three words of an address, each as often as frames may come at once."""
    words = memoryview(address).cast("H")
    return [memoryview(array("H", [word]) * MOST_AT_ONCE) for word in words]


def _headers_taken_as_they_are(takes: Offload) -> frozenset[bytes]:
    """The flags and gso_type bytes of net headers that a guest with these offloads may get."""
    needs_csum, data_valid = int(HdrFlag.NEEDS_CSUM), int(HdrFlag.DATA_VALID)
    pairs = {(0, int(HdrGso.NONE))}
    if takes & Offload.CSUM:
        pairs |= {(needs_csum, int(HdrGso.NONE)), (data_valid, int(HdrGso.NONE))}
        for offload, gso in (
            (Offload.TSO4, HdrGso.TCPV4),
            (Offload.TSO6, HdrGso.TCPV6),
            (Offload.USO4 | Offload.USO6, HdrGso.UDP_L4),  # with one alone, look closer
        ):
            if takes & offload == offload:
                pairs.add((needs_csum, int(gso)))
                if takes & Offload.ECN and gso is not HdrGso.UDP_L4:
                    pairs.add((needs_csum, int(gso) | NET_HDR_GSO_ECN))
    return frozenset(map(bytes, pairs))


def _write_header(chain: Chain, header: bytes, num_buffers: bytes) -> None:
    """Puts the net header where a buffer starts; num_buffers is the device's to say (5.1.6.4)."""
    first = chain.writable[0]
    if len(first) >= NET_HDR_SIZE:
        first[:NET_HDR_SIZE] = header[:10] + num_buffers
    else:
        scatter((header[:10] + num_buffers,), chain.writable)
