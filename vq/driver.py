"""The guest's side: a split virtqueue as a driver sees it, and probing a device over a transport.

`DriverRing` offers chains of buffers and collects the used ones, `GuestAllocator` hands out guest
memory, and `Driver` brings a device up the way a kernel does. What the buffers mean is left to the
drivers on top (`net_driver`).

Nothing here shares code with the device's side beyond the numbers in `abi` and the bytes in
`memory`, so that one mistake cannot hide on both sides. A driver does not trust its device: what it
offered it keeps in its own books, and a device that breaks a rule is a `DeviceError`.
"""

from __future__ import annotations

import itertools
import struct
import sys
import time
from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from vq.abi import (
    AVAIL_ALIGN,
    AVAIL_F_NO_INTERRUPT,
    DESC_ALIGN,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    USED_ALIGN,
    USED_F_NO_NOTIFY,
    Feature,
    Status,
    feature_mask,
    index_distance,
    needs_event,
    ring_layout,
)
from vq.errors import UsageError, VqError
from vq.memory import GuestMemory, fence, order_loads, order_stores

__all__ = [
    "DRIVER_FEATURES",
    "DeviceError",
    "Driver",
    "DriverRing",
    "GuestAllocator",
    "GuestBuffer",
    "Transport",
    "Used",
]

GuestBuffer: TypeAlias = tuple[int, int]
"""``(guest-physical address, length in bytes)``: one descriptor's worth."""

_DESC = struct.Struct("<QIHH")  # virtio 1.3, 2.7.5
_USED_ELEM = struct.Struct("<II")  # virtio 1.3, 2.7.8
_RING_START = 4  # flags and idx stand before the entries of both rings
_DESC_SIZE = _DESC.size
_USED_ELEM_SIZE = _USED_ELEM.size
_MAX_CHAIN_BYTES = 1 << 32  # virtio 1.3, 2.7.5.2

DRIVER_FEATURES = feature_mask(
    (
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.IN_ORDER,
        Feature.ORDER_PLATFORM,
        Feature.RING_RESET,
    )
)
"""What `Driver` can do of the features that any device may have (virtio 1.3, 6)."""

_ANY_DEVICE_BITS = feature_mask((*range(24, 42), 43))  # virtio 1.3, 2.2: not the device type's own


class DeviceError(VqError):
    """The device broke a rule of the specification, or refused to work with this driver.

    `reason` says what was wrong in one phrase, `queue` is the name of the virtqueue and `section`
    where the rule stands in the virtio 1.3 specification, where there is one.
    """

    def __init__(
        self, reason: str, *, queue: str | None = None, section: str | None = None
    ) -> None:
        self.reason = reason
        self.queue = queue
        self.section = section
        super().__init__(
            (f"{queue}: " if queue else "")
            + reason
            + (f" (virtio 1.3, {section})" if section else "")
        )


class Used(NamedTuple):
    """A chain that the device has given back."""

    token: Any
    """What was passed to `DriverRing.add`; the head where nothing was."""
    head: int
    written: int
    """How many bytes the device wrote, from the first writable byte on."""


class _Chain(NamedTuple):
    """The driver's own record of a chain in flight."""

    token: Any
    capacity: int
    descriptors: Sequence[int] | None  # None: only the head


class GuestAllocator:
    """Hands out pieces of guest memory and takes them back; the lowest place that fits, first.

    A piece never crosses from one region into another. The memory is not cleared.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._free = [[(r.gpa, r.gpa + r.size)] for r in memory.regions]  # per region, sorted
        self._taken: dict[int, tuple[int, int]] = {}

    @property
    def available(self) -> int:
        """How many bytes are free, in pieces of whatever size."""
        return sum(end - start for extents in self._free for start, end in extents)

    def allocate(self, length: int, align: int = DESC_ALIGN) -> int:
        """The guest-physical address of `length` bytes, a multiple of `align` (a power of two).

        Raises `UsageError` when no region has that much in one piece.
        """
        if length <= 0 or align <= 0 or align & (align - 1):
            raise UsageError(f"cannot allocate {length} bytes aligned to {align}")
        for region, extents in enumerate(self._free):
            for place, (start, end) in enumerate(extents):
                gpa = (start + align - 1) & -align
                if gpa + length <= end:
                    around = ((start, gpa), (gpa + length, end))
                    extents[place : place + 1] = [e for e in around if e[0] < e[1]]
                    self._taken[gpa] = (region, length)
                    return gpa
        raise UsageError(f"the guest has no {length} bytes left in one piece")

    def free(self, gpa: int) -> None:
        """Takes back what `allocate` gave. Raises `UsageError` for any other address."""
        try:
            region, length = self._taken.pop(gpa)
        except KeyError:
            raise UsageError(f"nothing is allocated at {gpa:#x}") from None
        extents = self._free[region]
        insort(extents, (gpa, gpa + length))
        joined = extents[:1]
        for start, end in extents[1:]:
            if start == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._free[region] = joined


class DriverRing:
    """The driver's side of a split virtqueue (virtio 1.3, 2.7).

    `add` places chains, `publish` shows them to the device, `should_kick` tells whether it wants to
    hear of them, `collect` takes back what it has used. Descriptors are taken in ring order, as
    IN_ORDER demands (virtio 1.3, 2.7.5) and as suits devices that read runs of them.

    Of `features`, INDIRECT_DESC, EVENT_IDX and IN_ORDER matter here. Both rings start at
    `start_index`, which is 0 for a real driver.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        features: int = 0,
        start_index: int = 0,
        name: str = "queue",
    ) -> None:
        """Lays the ring out over guest memory at these three addresses and clears it.

        Raises `UsageError` for a size or an address that the specification does not allow.
        """
        try:
            layout = ring_layout(size)
        except ValueError as error:
            raise UsageError(str(error)) from None
        for part, gpa, align in (
            ("descriptor table", desc, DESC_ALIGN),
            ("available ring", avail, AVAIL_ALIGN),
            ("used ring", used, USED_ALIGN),
        ):
            if gpa % align:
                raise UsageError(f"the {part} at {gpa:#x} is not aligned to {align} bytes")
        self.memory = memory
        self.name = name
        self.size = size
        self.desc = desc
        self.avail = avail
        self.used = used
        self._mask = size - 1
        self._has_indirect = bool(features >> Feature.INDIRECT_DESC & 1)
        self._has_event_idx = bool(features >> Feature.EVENT_IDX & 1)
        self._in_order = bool(features >> Feature.IN_ORDER & 1)
        self._table = memory.view(desc, layout.desc_bytes)
        self._avail_bytes = memory.view(avail, layout.avail_bytes)
        self._avail_ring = self._avail_bytes[_RING_START : layout.used_event].cast("H")
        self._used_bytes = memory.view(used, layout.used_bytes)
        self._avail_index_gpa = avail + 2
        self._used_event_gpa = avail + layout.used_event
        self._used_index_gpa = used + 2
        self._avail_event_gpa = used + layout.avail_event
        self._free: deque[int] = deque()
        self._in_flight: dict[int, _Chain] = {}
        self._unpublished: list[int] = []
        self._order: deque[int] = deque()
        self.reset(start_index)

    @classmethod
    def allocate(
        cls,
        memory: GuestMemory,
        allocator: GuestAllocator,
        size: int,
        *,
        features: int = 0,
        start_index: int = 0,
        name: str = "queue",
    ) -> DriverRing:
        """A ring in memory of its own; `free` gives the memory back."""
        try:
            layout = ring_layout(size)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return cls(
            memory,
            size,
            allocator.allocate(layout.desc_bytes, DESC_ALIGN),
            allocator.allocate(layout.avail_bytes, AVAIL_ALIGN),
            allocator.allocate(layout.used_bytes, USED_ALIGN),
            features=features,
            start_index=start_index,
            name=name,
        )

    def free(self, allocator: GuestAllocator) -> None:
        """Gives back the memory of a ring made by `allocate`; the device must be done with it."""
        for gpa in (self.desc, self.avail, self.used):
            allocator.free(gpa)

    def reset(self, start_index: int = 0) -> list[Any]:
        """Starts anew, as after a reset of the device or of this queue (virtio 1.3, 2.6.1).

        Returns the tokens of the chains that were in flight, oldest first. The device must have
        been reset before.
        """
        lost = [chain.token for chain in self._in_flight.values()]
        for part in (self._table, self._avail_bytes, self._used_bytes):
            part[:] = bytes(len(part))
        self._free = deque(range(self.size))
        self._in_flight = {}
        self._unpublished = []
        self._order = deque()
        self._next_avail = start_index & 0xFFFF
        self._next_used = start_index & 0xFFFF
        self._unannounced = 0
        self._calls_wanted = True
        self.memory.store16(self._avail_index_gpa, self._next_avail)
        self.memory.store16(self._used_index_gpa, self._next_used)
        if self._has_event_idx:
            self.memory.store16(self._used_event_gpa, self._next_used)
        return lost

    # --- offering -----------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """How many descriptors are free."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """How many chains were added and not yet collected."""
        return len(self._in_flight)

    def add(
        self,
        readable: Sequence[GuestBuffer],
        writable: Sequence[GuestBuffer] = (),
        token: Any = None,
        *,
        indirect: int | None = None,
        direct: int = 0,
    ) -> int:
        """Places a chain: what the device may read, then what it may write. Returns the head.

        The device does not see the chain before `publish`. With `indirect` the descriptors go into
        a table at that guest-physical address, whose memory is the caller's until the chain has
        been used; the first `direct` of them stand in the ring before it all the same.

        Raises `UsageError` when the chain is empty, longer than the queue or than 4 GiB, or has no
        room now, and when `indirect` is given though INDIRECT_DESC was not negotiated.
        """
        count = len(readable) + len(writable)
        if count == 1 and indirect is None:
            return self._add_single(readable, writable, token)
        buffers = [*readable, *writable]
        capacity = sum(length for _, length in writable)
        if not buffers or count > self.size:  # virtio 1.3, 2.7.5.3.1: for a table it holds too
            raise UsageError(f"a chain of {count} descriptors in a queue of {self.size}")
        if capacity + sum(length for _, length in readable) > _MAX_CHAIN_BYTES:
            raise UsageError("a chain is at most 4 GiB long")
        flags = [0] * len(readable) + [DESC_F_WRITE] * len(writable)
        if indirect is not None:
            buffers, flags = self._fill_table(indirect, buffers, flags, direct)
        free = self._free
        if len(buffers) > len(free):
            raise UsageError(f"{len(buffers)} descriptors wanted, {len(free)} are free")
        descriptors = list(itertools.islice(free, len(buffers)))
        self._write_chain(self._table, descriptors, buffers, flags)
        for _ in descriptors:
            free.popleft()
        head = descriptors[0]
        self._in_flight[head] = _Chain(head if token is None else token, capacity, descriptors)
        self._unpublished.append(head)
        return head

    def _add_single(
        self, readable: Sequence[GuestBuffer], writable: Sequence[GuestBuffer], token: Any
    ) -> int:
        """The commonest chain, one descriptor, without the general path's lists."""
        free = self._free
        if not free:
            raise UsageError("1 descriptor wanted, none is free")
        head = free[0]
        try:
            if readable:
                gpa, length = readable[0]
                _DESC.pack_into(self._table, head * _DESC_SIZE, gpa, length, 0, 0)
                capacity = 0
            else:
                gpa, capacity = writable[0]
                _DESC.pack_into(self._table, head * _DESC_SIZE, gpa, capacity, DESC_F_WRITE, 0)
        except struct.error as error:
            raise UsageError(f"no such buffer: {error}") from None
        free.popleft()
        self._in_flight[head] = _Chain(head if token is None else token, capacity, None)
        self._unpublished.append(head)
        return head

    def _fill_table(
        self, table: int, buffers: list[GuestBuffer], flags: list[int], direct: int
    ) -> tuple[list[GuestBuffer], list[int]]:
        """Writes all but the first `direct` buffers into an indirect table (virtio 1.3, 2.7.5.3).

        Returns the buffers and flags of what then stands in the ring.
        """
        if not self._has_indirect:
            raise UsageError("INDIRECT_DESC was not negotiated")
        inside = buffers[direct:]
        if direct < 0 or not inside:
            raise UsageError("an indirect table has at least one descriptor")
        view = self.memory.view(table, len(inside) * _DESC_SIZE)
        self._write_chain(view, range(len(inside)), inside, flags[direct:])
        return (
            [*buffers[:direct], (table, len(view))],
            [*flags[:direct], DESC_F_INDIRECT],
        )

    @staticmethod
    def _write_chain(
        table: memoryview,
        places: Sequence[int],
        buffers: Sequence[GuestBuffer],
        flags: Sequence[int],
    ) -> None:
        last = len(places) - 1
        try:
            for number, (gpa, length) in enumerate(buffers):
                flag = flags[number]
                following = 0
                if number < last:
                    flag |= DESC_F_NEXT
                    following = places[number + 1]
                _DESC.pack_into(table, places[number] * _DESC_SIZE, gpa, length, flag, following)
        except struct.error as error:
            raise UsageError(f"no such buffer: {error}") from None

    def publish(self) -> int:
        """Shows the device the chains added since the last time; returns how many they were."""
        heads = self._unpublished
        count = len(heads)
        if not count:
            return 0
        slot = self._next_avail & self._mask
        room = self.size - slot
        self._write_heads(slot, heads[:room])
        if count > room:
            self._write_heads(0, heads[room:])
        self._next_avail = (self._next_avail + count) & 0xFFFF
        order_stores()  # virtio 1.3, 2.7.13.3.1: descriptors and heads are visible before idx
        self.memory.store16(self._avail_index_gpa, self._next_avail)
        if self._in_order:
            self._order.extend(heads)
        self._unannounced += count
        self._unpublished = []
        return count

    def _write_heads(self, slot: int, heads: list[int]) -> None:
        entries = array("H", heads)
        if sys.byteorder == "big":
            entries.byteswap()
        self._avail_ring[slot : slot + len(heads)] = memoryview(entries)

    def should_kick(self) -> bool:
        """Whether the device wants to hear of what was published since this was last asked."""
        count = self._unannounced
        if not count:
            return False
        self._unannounced = 0
        fence()  # virtio 1.3, 2.7.13.4.1: idx is visible before flags or avail_event are read
        if self._has_event_idx:  # virtio 1.3, 2.7.10
            event = self.memory.load16(self._avail_event_gpa)
            old = (self._next_avail - count) & 0xFFFF
            # After 65536 chains without asking, every value of avail_event has been passed.
            return count > 0xFFFF or needs_event(event, self._next_avail, old)
        return not self.memory.load16(self.used) & USED_F_NO_NOTIFY

    # --- collecting ---------------------------------------------------------------------------

    def collect(self, limit: int | None = None) -> list[Used]:
        """Takes back chains that the device has used, in its order; at most `limit` of them.

        A batch that an IN_ORDER device gave back with one element is not divided, so the list may
        then be longer. With `limit` reached and calls enabled there may be more without another
        call: ask again until the list is shorter.

        Raises `DeviceError` when the device breaks a rule; chains it gave back in order before that
        are returned first. The error stays until the queue or the device is reset.
        """
        done: list[Used] = []
        take = self._take_in_order if self._in_order else self._take
        goal = self.size if limit is None else min(limit, self.size)
        try:
            while len(done) < goal and (waiting := self._waiting()):
                order_loads()  # the elements are read after the index that announced them
                take(done, waiting, goal - len(done))
                if self._calls_wanted and self._has_event_idx:
                    self._ask_for_call(0)
        except DeviceError:
            if not done:
                raise
        return done

    def _waiting(self) -> int:
        """How many elements of the used ring have not been looked at."""
        waiting = index_distance(self.memory.load16(self._used_index_gpa), self._next_used)
        outstanding = len(self._in_flight) - len(self._unpublished)
        if waiting > outstanding:
            raise DeviceError(
                f"the used index jumped by {waiting} with {outstanding} chains outstanding",
                queue=self.name,
                section="2.7.8",
            )
        return waiting

    def _take(self, done: list[Used], waiting: int, limit: int) -> None:
        """Moves up to `limit` used elements, read once, to `done`; up to the ring's end only."""
        slot = self._next_used & self._mask
        run = min(waiting, limit, self.size - slot)
        elements = struct.unpack_from(
            f"<{2 * run}I", self._used_bytes, _RING_START + slot * _USED_ELEM_SIZE
        )
        in_flight = self._in_flight
        free = self._free
        before = len(done)
        pairs = iter(elements)
        try:
            for head, written in zip(pairs, pairs, strict=True):
                token, capacity, descriptors = self._chain(head)
                if written > capacity:
                    raise self._too_long(head, written, capacity)
                del in_flight[head]
                if descriptors is None:
                    free.append(head)
                else:
                    free.extend(descriptors)
                done.append(Used(token, head, written))
        finally:
            self._next_used = (self._next_used + len(done) - before) & 0xFFFF

    def _take_in_order(self, done: list[Used], waiting: int, limit: int) -> None:
        """Moves batches to `done` until `limit` chains are there or no element waits."""
        goal = len(done) + limit
        while waiting and len(done) < goal:
            waiting -= self._take_batch(done, waiting)

    def _take_batch(self, done: list[Used], waiting: int) -> int:
        """Moves one batch to `done`: an element stands for every chain up to its own.

        The chains that have no element of their own were used completely (virtio 1.3, 2.7.9).
        Returns how many chains the batch had.
        """
        slot = self._next_used & self._mask
        last, written = _USED_ELEM.unpack_from(
            self._used_bytes, _RING_START + slot * _USED_ELEM_SIZE
        )
        capacity = self._chain(last).capacity
        if written > capacity:
            raise self._too_long(last, written, capacity)
        batch = self._order.index(last) + 1
        if batch > waiting:
            raise DeviceError(
                f"head {last} ends a batch of {batch}, but the used index moved by {waiting}",
                queue=self.name,
                section="2.7.9",
            )
        for _ in range(batch):
            head = self._order.popleft()
            chain = self._in_flight.pop(head)
            self._free.extend((head,) if chain.descriptors is None else chain.descriptors)
            done.append(Used(chain.token, head, written if head == last else chain.capacity))
        self._next_used = (self._next_used + batch) & 0xFFFF
        return batch

    def _chain(self, head: int) -> _Chain:
        """The record of a chain that the device may give back, by the driver's own books."""
        chain = self._in_flight.get(head)
        if chain is None or (self._unpublished and head in self._unpublished):
            if head >= self.size:
                reason = f"used id {head} in a queue of {self.size}"
            else:
                reason = f"used id {head} is not outstanding: used twice, or never offered"
            raise DeviceError(reason, queue=self.name, section="2.7.8")
        return chain

    def _too_long(self, head: int, written: int, capacity: int) -> DeviceError:
        return DeviceError(
            f"head {head}: {written} bytes written where there is room for {capacity}",
            queue=self.name,
            section="2.7.8",
        )

    # --- calls (used buffer notifications, virtio 1.3, 2.7.7) ---------------------------------

    def disable_calls(self) -> None:
        """Asks the device not to call; it may do so all the same."""
        self._calls_wanted = False
        if self._has_event_idx:
            # flags stays 0; an event just passed comes up again only 65536 chains from here.
            self.memory.store16(self._used_event_gpa, (self._next_used - 1) & 0xFFFF)
        else:
            self.memory.store16(self.avail, AVAIL_F_NO_INTERRUPT)

    def enable_calls(self, *, delayed: bool = False) -> bool:
        """Asks the device to call for the next used chain.

        With `delayed` and EVENT_IDX it is asked to call only when three quarters of what is
        outstanding have been used. Returns True when so much has been used meanwhile that the call
        may never come: then the caller collects again.
        """
        self._calls_wanted = True
        if self._has_event_idx:
            outstanding = len(self._in_flight) - len(self._unpublished)
            return self._ask_for_call(outstanding * 3 // 4 if delayed else 0)
        self.memory.store16(self.avail, 0)
        fence()  # virtio 1.3, 2.7.14: the device sees the wish before used.idx is looked at again
        return self._waiting() > 0

    def _ask_for_call(self, skip: int) -> bool:
        self.memory.store16(self._used_event_gpa, (self._next_used + skip) & 0xFFFF)
        fence()  # as in enable_calls
        return self._waiting() > skip

    # --- by hand, for tests that need rings no driver would make ------------------------------

    def poke_descriptor(self, index: int, addr: int, length: int, flags: int, next: int) -> None:
        """Overwrites an entry of the descriptor table."""
        _DESC.pack_into(self._table, index * _DESC_SIZE, addr, length, flags, next)

    def poke_avail(self, slot: int, head: int) -> None:
        """Overwrites an entry of the available ring."""
        self.memory.store16(self.avail + _RING_START + 2 * slot, head)

    def poke_avail_index(self, index: int) -> None:
        """Overwrites `avail.idx`; the driver's own position stays."""
        self.memory.store16(self._avail_index_gpa, index & 0xFFFF)

    def poke_avail_flags(self, flags: int) -> None:
        """Overwrites `avail.flags`."""
        self.memory.store16(self.avail, flags)

    def poke_used_event(self, index: int) -> None:
        """Overwrites `used_event`."""
        self.memory.store16(self._used_event_gpa, index & 0xFFFF)

    def peek_descriptor(self, index: int) -> tuple[int, int, int, int]:
        """An entry of the descriptor table: ``(addr, len, flags, next)``."""
        addr, length, flags, following = _DESC.unpack_from(self._table, index * _DESC_SIZE)
        return addr, length, flags, following

    def peek_used_index(self) -> int:
        """`used.idx` as the device left it."""
        return self.memory.load16(self._used_index_gpa)

    def peek_used_flags(self) -> int:
        """`used.flags` as the device left it."""
        return self.memory.load16(self.used)

    def peek_used(self, slot: int) -> tuple[int, int]:
        """An element of the used ring: ``(id, len)``."""
        head, written = _USED_ELEM.unpack_from(
            self._used_bytes, _RING_START + slot * _USED_ELEM_SIZE
        )
        return head, written

    def peek_avail_event(self) -> int:
        """`avail_event` as the device left it."""
        return self.memory.load16(self._avail_event_gpa)


class Transport(Protocol):
    """What a driver needs of a device, whichever way it is reached: the registers of virtio.

    A `Device` in the same process satisfies it as it is.
    """

    on_queue_call: Callable[[int], None] | None
    """Installed by the driver: a used buffer notification for the queue with this index."""
    on_config_change: Callable[[], None] | None
    """Installed by the driver: a configuration change notification."""

    @property
    def device_id(self) -> int:
        """The device's type (virtio 1.3, 5)."""

    @property
    def device_features(self) -> int:
        """The features that the device offers."""

    def accept_features(self, mask: int, /) -> None:
        """Writes the driver's set."""

    @property
    def status(self) -> int:
        """The device status field."""

    def write_status(self, value: int, /) -> None:
        """Writes the device status field; 0 resets the device."""

    @property
    def config_generation(self) -> int:
        """Changes whenever the configuration space may have changed."""

    def read_config(self, offset: int, length: int, /) -> bytes:
        """Reads bytes of the configuration space."""

    def write_config(self, offset: int, data: bytes, /) -> None:
        """Writes bytes of the configuration space."""

    @property
    def queue_count(self) -> int:
        """How many queues the device has at most."""

    def queue_max_size(self, index: int, /) -> int:
        """The largest size that a queue may have; 0 where there is no such queue."""

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        """Tells the device where a queue's parts are, and enables the queue."""

    def reset_queue(self, index: int, /) -> None:
        """Resets one queue (RING_RESET); returns when the device is done with it."""

    def notify(self, index: int, /) -> None:
        """Kicks: an available buffer notification."""


class Driver:
    """Probes a device over a transport and keeps its queues, as a kernel's virtio core does.

    `negotiate`, then `setup_queue` for each queue, then `start`; or `probe` for all three. A driver
    for one type of device stands on top of it.

    `queues` has the `DriverRing` of each queue by its index, once it is set up: its `add` places
    buffers, `kick` shows them to the device, its `collect` takes them back. `allocator` hands out
    guest memory for them. `features` is what was negotiated; `needs_reset` says that the device
    works no more before a reset. `calls` and `config_changes` count notifications.
    """

    RESET_SECONDS = 1.0
    """How long a device may take to reset."""
    CONFIG_READS = 1000
    """How often the configuration may change under one read before the driver gives up."""

    def __init__(
        self,
        transport: Transport,
        memory: GuestMemory,
        wanted_features: int = -1,
        *,
        queue_size: int = 256,
        allocator: GuestAllocator | None = None,
    ) -> None:
        """`wanted_features` is a set of bits, by default all that there are.

        `queue_size` is the most that queues get; a device may have room for less.

        VERSION_1 is always wanted; of the features that any device may have, only those in
        `DRIVER_FEATURES` are accepted, whatever is wanted.
        """
        self.transport = transport
        self.memory = memory
        self.allocator = allocator or GuestAllocator(memory)
        self.wanted_features = (
            wanted_features & (~_ANY_DEVICE_BITS | DRIVER_FEATURES) | 1 << Feature.VERSION_1
        )
        self.queue_size = queue_size
        self.features = 0
        """What was negotiated."""
        self.queues: dict[int, DriverRing] = {}
        self.on_call: Callable[[int], None] | None = None
        """Hears of used buffer notifications; may run in the middle of a kick, so it only notes."""
        self.on_config_change: Callable[[], None] | None = None
        """Hears of configuration change notifications, likewise."""
        self.calls = 0
        """How many used buffer notifications have come."""
        self.config_changes = 0
        """How many configuration change notifications have come."""
        self.needs_reset = False
        """The device has said that it works no more before a reset."""

    def has_feature(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return bool(self.features >> bit & 1)

    def probe(self) -> None:
        """Brings the device up with all the queues it has.

        Raises `DeviceError` as `negotiate` does.
        """
        self.negotiate()
        for index in range(self.transport.queue_count):
            if self.transport.queue_max_size(index):
                self.setup_queue(index)
        self.start()

    def negotiate(self, choose: Callable[[int], int] | None = None) -> int:
        """Resets the device and agrees on features (virtio 1.3, 3.1.1, steps 1 to 6).

        `choose` is given what both sides could do and returns the part to accept: for features that
        depend on others. Returns what was negotiated.

        Raises `DeviceError` when the device does not reset, is a legacy one, or refuses the set.
        """
        self.reset()
        transport = self.transport
        transport.on_queue_call = self._queue_called
        transport.on_config_change = self._config_changed
        self._add_status(Status.ACKNOWLEDGE)
        self._add_status(Status.DRIVER)
        possible = self.wanted_features & transport.device_features
        features = possible if choose is None else choose(possible)
        if not features >> Feature.VERSION_1 & 1:
            self.fail()
            raise DeviceError("the device does not offer VERSION_1", section="6.2")
        transport.accept_features(features)
        self._add_status(Status.FEATURES_OK)
        if not transport.status & Status.FEATURES_OK:
            self.fail()
            raise DeviceError(f"the device refused the features {features:#x}", section="3.1.1")
        self.features = features
        return features

    def setup_queue(self, index: int, size: int | None = None) -> DriverRing:
        """Makes a ring, as large as wanted and possible, and tells the device where it is.

        Raises `DeviceError` when the device has no such queue.
        """
        largest = self.transport.queue_max_size(index)
        if not largest:
            raise DeviceError(f"the device has no queue {index}")
        size = min(largest, size or self.queue_size)
        ring = DriverRing.allocate(
            self.memory,
            self.allocator,
            1 << (size.bit_length() - 1),  # virtio 1.3, 2.7: a power of two
            features=self.features,
            name=f"queue {index}",
        )
        self.transport.setup_queue(
            index, size=ring.size, desc=ring.desc, avail=ring.avail, used=ring.used
        )
        self.queues[index] = ring
        return ring

    def start(self) -> None:
        """Sets DRIVER_OK: the device is live. Kicks are allowed only from here on."""
        self._add_status(Status.DRIVER_OK)

    def kick(self, index: int) -> bool:
        """Publishes what was added to a queue and notifies the device if it wants to hear of it.

        Returns whether it did.
        """
        ring = self.queues[index]
        ring.publish()
        if not ring.should_kick():
            return False
        self.transport.notify(index)
        return True

    def read_config(self, offset: int, length: int) -> bytes:
        """Reads the configuration space in one consistent piece (virtio 1.3, 2.5.1).

        Raises `DeviceError` when it does not hold still.
        """
        for _ in range(self.CONFIG_READS):
            before = self.transport.config_generation
            data = self.transport.read_config(offset, length)
            if self.transport.config_generation == before:
                return data
        raise DeviceError("the configuration space does not hold still", section="2.5.1")

    def write_config(self, offset: int, data: bytes) -> None:
        """Writes to the configuration space; a device may ignore it (virtio 1.3, 2.5.2)."""
        self.transport.write_config(offset, data)

    def reset_queue(self, index: int) -> list[Any]:
        """Resets one queue and frees its ring; returns the tokens of what was in flight.

        `setup_queue` takes it into use again, if need be with another size (virtio 1.3, 2.6.1).
        Raises `UsageError` when RING_RESET was not negotiated.
        """
        if not self.has_feature(Feature.RING_RESET):
            raise UsageError("RING_RESET was not negotiated")
        self.transport.reset_queue(index)
        ring = self.queues.pop(index)
        tokens = ring.reset()
        ring.free(self.allocator)
        return tokens

    def reset(self) -> None:
        """Resets the device, waits until it has done so, and frees the queues.

        Raises `DeviceError` when the device does not do it.
        """
        self.transport.write_status(0)
        deadline = time.monotonic() + self.RESET_SECONDS
        while self.transport.status:  # virtio 1.3, 2.4.2: done when the status reads 0
            if time.monotonic() > deadline:
                raise DeviceError("the device does not reset", section="2.4.1")
            time.sleep(0.001)
        for ring in self.queues.values():
            ring.free(self.allocator)
        self.queues = {}
        self.features = 0
        self.needs_reset = False

    def fail(self) -> None:
        """Sets FAILED: the driver has given up on the device."""
        self._add_status(Status.FAILED)

    def close(self) -> None:
        """Resets the device and takes the callbacks back."""
        self.reset()
        self.transport.on_queue_call = None
        self.transport.on_config_change = None

    def _add_status(self, bit: Status) -> None:
        # virtio 1.3, 2.1.1: the driver never clears a bit but by a reset.
        self.transport.write_status(self.transport.status | bit)

    def _queue_called(self, index: int) -> None:
        self.calls += 1
        if self.on_call is not None:
            self.on_call(index)

    def _config_changed(self) -> None:
        self.config_changes += 1
        if self.transport.status & Status.NEEDS_RESET:
            self.needs_reset = True
        if self.on_config_change is not None:
            self.on_config_change()
