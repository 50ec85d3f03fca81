"""The device's side of a split virtqueue (virtio 1.3, 2.7).

`SplitRing` takes chains of buffers that the driver made available and gives them back used. It
trusts nothing that stands in guest memory: its own positions never come back from there, every
descriptor is read once and used from that copy, and what breaks a rule is named by a `DriverError`.
A bad chain is always consumed, so the next call goes on behind it.

Completion comes in separate steps, so that one frame may take several buffers and one notification
may stand for a burst::

    for chain in ring.pop_burst(64):
        chain.written = fill(chain.writable)
        ring.write_used(chain)
    ring.publish()
    if ring.should_notify():
        call()

Not here: what the buffers mean (the device model), and how kicks and calls travel (the transport).
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import islice, repeat
from operator import add
from typing import Protocol

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
    needs_event,
    ring_layout,
)
from vq.errors import AddressError, DriverError, UsageError
from vq.memory import GuestMemory, fence, order_loads, order_stores

__all__ = ["Chain", "InflightLog", "SplitRing"]

_DESCRIPTOR = struct.Struct("<QIHH")
_ELEMENT = struct.Struct("<II")
_BIG_ENDIAN = sys.byteorder == "big"
_MAX_CHAIN_BYTES = 1 << 32
_FEW = 10  # chains that are not worth columns
_ADDRESS = (1 << 64) - 1  # the first of a column of addresses
_MAX_WALK = 1 << 15
"""Descriptors and buffers of one burst, unless one chain alone has more: with indirect tables 64
chains could have two million."""
_MAX_PIECES = 1 << 16
"""Pieces of memory in one chain. Its descriptors cannot be more than 32,768, but each could lie
over all regions of a guest's memory that a frontend laid out in small ones."""
_MAX_TABLE_BYTES = 16 << 16  # as far as next, 16 bits wide, reaches into an indirect table
_NO_VIEWS: tuple[memoryview, ...] = ()


class Chain:
    """A chain of buffers that the driver made available, from `pop` until it is given back.

    `readable` are views of the device-readable buffers and `writable` of the device-writable ones,
    in the driver's order; empty buffers are left out. They lie in guest memory, which the guest
    may change at any time. `written` is what the device sets before it gives the chain back: how
    many bytes it wrote, counted from the start of the first writable buffer.
    """

    __slots__ = ("head", "readable", "writable", "written")

    descriptors = 1
    """Descriptors of the queue that the chain takes up; an indirect table's are not the queue's."""
    head: int
    readable: Sequence[memoryview]
    writable: Sequence[memoryview]
    written: int

    def __init__(
        self, head: int, readable: Sequence[memoryview], writable: Sequence[memoryview]
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.written = 0

    @property
    def readable_size(self) -> int:
        """The sum of the readable buffers' lengths in bytes."""
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        """The sum of the writable buffers' lengths in bytes."""
        return sum(map(len, self.writable))

    def __repr__(self) -> str:
        return (
            f"Chain(head={self.head}, readable={[len(v) for v in self.readable]},"
            f" writable={[len(v) for v in self.writable]})"
        )


class _Taken(Chain):
    """A chain whose attributes `pop` sets in line: calling `__init__` costs as much again."""

    __slots__ = ()
    __init__ = object.__init__


class _Walked(Chain):
    """A chain that was followed from one descriptor to the next."""

    __slots__ = ("descriptors",)


_PUT_BACK = Chain(-1, _NO_VIEWS, _NO_VIEWS)  # stands for any chain that undo_pop was given


class InflightLog(Protocol):
    """Who keeps note of the chains between `pop` and `publish`, to survive the device's death.

    The vhost-user transport keeps such a log in memory that the frontend holds. Calls come in the
    order of the steps that they describe.
    """

    def popped(self, heads: Iterable[int]) -> None:
        """The device has these chains now."""

    def unpopped(self, heads: Sequence[int]) -> None:
        """The device never had them."""

    def publishing(self, heads: Sequence[int], used_idx: int) -> None:
        """The used elements of these chains are written; `used_idx` will be stored next."""

    def published(self, heads: Sequence[int], used_idx: int) -> None:
        """`used_idx` is stored: the chains are the driver's again."""


class SplitRing:
    """One split virtqueue, seen from the device.

    `size` is a power of two up to 32768; `desc`, `avail` and `used` are the guest-physical
    addresses of the three parts, `features` the negotiated set (INDIRECT_DESC, EVENT_IDX and
    IN_ORDER matter here). `next_avail` and `next_used` are the 16-bit positions to go on from, and
    `resubmit` the heads of chains that an earlier device took and never gave back.

    Raises `DriverError` when the parts are misaligned or not in the guest's RAM: the driver chose
    them (virtio 1.3, 2.7).
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
        next_avail: int = 0,
        next_used: int = 0,
        resubmit: Iterable[int] = (),
        inflight_log: InflightLog | None = None,
        name: str = "queue",
    ) -> None:
        try:
            layout = ring_layout(size)
        except ValueError as error:
            raise DriverError(str(error), queue=name, section="2.7") from None
        self.name = name
        self.size = size
        self.memory = memory
        self._table = self._part("descriptor table", desc, layout.desc_bytes, DESC_ALIGN)
        self._avail = self._part("available ring", avail, layout.avail_bytes, AVAIL_ALIGN)
        self._used = self._part("used ring", used, layout.used_bytes, USED_ALIGN)
        self._window = self._window_at(desc)  # where the last buffer was found
        # An index is loaded and stored by one aligned 16-bit access: these views do that.
        self._avail_words = self._avail.cast("H")
        self._used_words = self._used.cast("H")
        # Columns of the descriptor table and of the used ring, one item for each entry.
        self._flags = self._table.cast("H")[6::8]
        elements = self._used[4 : 4 + 8 * size].cast("I")
        self._used_ids, self._used_lengths = elements[::2], elements[1::2]
        self._elements = self._used[4 : 4 + 8 * size].cast("Q")
        # All heads in turn, to compare with and to copy from: in ours and in the ring's widths.
        self._heads = array("I", range(size))
        self._words_in_turn = array("H", range(size)).tobytes()
        self._used_gpa = used
        self._used_event = layout.used_event // 2
        self._avail_event = layout.avail_event // 2

        self._indirect = bool(features >> Feature.INDIRECT_DESC & 1)
        self._event_idx = bool(features >> Feature.EVENT_IDX & 1)
        self._in_order = bool(features >> Feature.IN_ORDER & 1)

        self._next_avail = next_avail & 0xFFFF
        self._next_used = next_used & 0xFFFF  # where the next used element goes
        self._published = self._next_used  # used.idx, as the driver may see it by now
        self._unpublished = array("I")  # heads of what is not published, where there is a log
        self._unsignalled = 0  # chains published since should_notify() was last asked
        self._first_call = True
        self._outstanding: list[object] = [None] * size  # by head: a chain, or the run it is in
        self._undone: deque[Chain] = deque()
        self._resubmit = deque(resubmit)
        # Heads of chains not given back yet that next_avail, moved back, would not lead to: those
        # resubmitted, and those from before the last entry that was consumed without a chain.
        self._resubmitted: set[int] = set()
        self._order: deque[Chain] = deque()  # IN_ORDER: popped chains, oldest first
        self._completed: set[int] = set()  # IN_ORDER: heads that wait for an older chain
        self._inflight_log = inflight_log
        self._walked = 0  # descriptors and buffers of the chains followed in the present burst

    @cached_property
    def _each_descriptor(self) -> list[memoryview]:
        """A view of each descriptor: to copy many of them, in any order, is one call with these."""
        return [self._table[16 * index : 16 * index + 16] for index in range(self.size)]

    @cached_property
    def _elements_in_turn(self) -> array[int]:
        """A used element for each head in turn, with nothing written."""
        return _unwritten(self._heads)

    def _part(self, what: str, gpa: int, length: int, align: int) -> memoryview:
        if gpa % align:
            raise DriverError(
                f"the {what} at {gpa:#x} is not aligned to {align} bytes",
                queue=self.name,
                section="2.7",
            )
        try:
            return self.memory.view(gpa, length)
        except AddressError as error:
            raise DriverError(
                f"the {what} is not in the guest's memory: {error}", queue=self.name, section="2.7"
            ) from None

    # --- taking chains -----------------------------------------------------------------------

    @property
    def next_avail(self) -> int:
        """The 16-bit position in the available ring from which a later device would go on.

        It takes the `left_over` ones first.
        """
        undone = sum(1 for chain in self._undone if chain.head not in self._resubmitted)
        return (self._next_avail - undone) & 0xFFFF

    @property
    def left_over(self) -> list[int]:
        """Heads of chains that the device does not have and that stand before `next_avail`.

        They are a later device's to take, by `resubmit`: chains that an earlier device left over,
        and those put back when no position says any more where they stood.
        """
        undone = [chain.head for chain in self._undone if chain.head in self._resubmitted]
        return [*undone, *self._resubmit]

    @property
    def next_used(self) -> int:
        """The 16-bit position of the next used element."""
        return self._next_used

    @property
    def outstanding(self) -> int:
        """How many chains are popped and not given back yet."""
        return sum(1 for chain in self._outstanding if chain is not None) - len(self._undone)

    def available(self) -> int:
        """How many chains wait to be popped. Raises `DriverError` when the index is impossible."""
        return len(self._undone) + len(self._resubmit) + self.waiting()

    def waiting(self) -> int:
        """How many chains wait that were never popped. Raises `DriverError` likewise."""
        index = self._avail_words[1]
        if _BIG_ENDIAN:
            index = _swap16(index)
        count = (index - self._next_avail) & 0xFFFF
        if count > self.size:
            # No telling which entries are meant: none is taken, and what comes next is.
            self._next_avail = index
            self._pin_outstanding()
            raise DriverError(
                f"the available index went {count} entries ahead of the device in a queue"
                f" of {self.size}",
                queue=self.name,
                section="2.7.13.3",
            )
        return count

    def singles_ahead(self, waiting: int) -> bool:
        """Whether the first and the last of so many waiting chains seem to be one buffer each.

        That is for a guess at what they are: the driver may change it before they are popped.
        """
        words, mask, position = self._avail_words, self.size - 1, self._next_avail
        first, last = words[2 + (position & mask)], words[2 + (position + waiting - 1 & mask)]
        if _BIG_ENDIAN:
            first, last = _swap16(first), _swap16(last)
        flags = self._flags[first & mask] | self._flags[last & mask]
        return not (_swap16(flags) if _BIG_ENDIAN else flags) & (DESC_F_INDIRECT | DESC_F_NEXT)

    @property
    def avail_index(self) -> int:
        """What the driver's available index says now, possible or not."""
        index = self._avail_words[1]
        return _swap16(index) if _BIG_ENDIAN else index

    @property
    def has_left_over(self) -> bool:
        """Whether chains wait that the driver made available before: put back here, or taken and
        left over by an earlier device."""
        return bool(self._undone or self._resubmit)

    def anything_new(self) -> bool:
        """Whether that is another one than where the device stands: a look that costs little."""
        return self.avail_index != self._next_avail

    @property
    def burst_was_long(self) -> bool:
        """Whether the chains that were popped last were so long that a turn had better end."""
        return self._walked >= _MAX_WALK

    def pop(self) -> Chain | None:
        """The next chain, or None when there is none. Raises `DriverError` for a bad one."""
        chains = self.pop_burst(1)
        return chains[0] if chains else None

    def pop_burst(self, limit: int) -> list[Chain]:
        """Up to `limit` chains that the driver made available, in its order.

        Raises `DriverError` when the next chain breaks a rule. That chain is consumed: its
        descriptors go back to the driver as used, with nothing written, at the next `publish`.
        When good chains stand before it, those are returned first and the next call raises.
        """
        self._walked = 0
        if self._undone or self._resubmit:
            return self._pop_again(limit)
        count = self.waiting()
        if count > limit:
            count = limit
        if count <= 0:
            return []
        order_loads()  # the entries are read after the index that covers them (2.7.13.3)
        chains = self._read_one() if count == 1 else None
        if chains is None:
            chains = self._read_chains(self._read_heads(count))
        self._next_avail = (self._next_avail + len(chains)) & 0xFFFF
        if self._in_order or self._inflight_log is not None:
            self._note_popped(chains)
        return chains

    def undo_pop(self, chains: Sequence[Chain]) -> None:
        """Puts chains back: the next pop gives them again, in this order and as they were read.

        They must be the chains popped last; that is what makes `next_avail` a place to go on from.
        (One that stands before a bad chain, which is consumed, is `left_over` instead.) Raises
        `UsageError` when one of them is not outstanding.
        """
        heads: set[int] = set()
        for chain in chains:
            if not self._holds(chain) or chain.head in heads:
                raise UsageError(f"{self.name}: {chain!r} is not outstanding")
            heads.add(chain.head)
        for head in heads:
            self._outstanding[head] = _PUT_BACK
        self._undone.extendleft(reversed(chains))
        if self._inflight_log is not None:
            self._inflight_log.unpopped(
                [chain.head for chain in chains if chain.head not in self._resubmitted]
            )

    def _pop_again(self, limit: int) -> list[Chain]:
        """Gives chains popped before: put back here, or left over by an earlier device."""
        if limit < 1:
            return []
        if self._undone:
            chains = [self._undone.popleft() for _ in range(min(limit, len(self._undone)))]
            for chain in chains:
                chain.written = 0
                self._outstanding[chain.head] = chain
            if self._inflight_log is not None:
                self._inflight_log.popped([chain.head for chain in chains])
            return chains
        head = self._resubmit.popleft()
        self._resubmitted.add(head)
        chains = self._read_chains((head,), resubmitted=True)
        self._note_popped(chains)
        return chains

    def _note_popped(self, chains: list[Chain]) -> None:
        if self._in_order:
            self._order.extend(chains)
        if self._inflight_log is not None:
            self._inflight_log.popped([chain.head for chain in chains])

    def _read_heads(self, count: int) -> tuple[int, ...]:
        slot = self._next_avail & (self.size - 1)
        first = self.size - slot
        if count <= first:
            return _words(count).unpack_from(self._avail, 4 + 2 * slot)
        heads = _words(first).unpack_from(self._avail, 4 + 2 * slot)
        return heads + _words(count - first).unpack_from(self._avail, 4)

    def _read_one(self) -> list[Chain] | None:
        """The next chain; None for a head that cannot be.

        Where chains come one at a time, calls cost more than work: for the usual kind (see
        `_read_usual`) there are none here.
        """
        head = self._avail_words[2 + (self._next_avail & (self.size - 1))]
        if _BIG_ENDIAN or head >= self.size or self._outstanding[head] is not None:
            return None
        descriptor = _DESCRIPTOR.unpack_from(self._table, head << 4)
        address, length, flags, _ = descriptor
        base, limit, view = self._window
        offset = address - base
        end = offset + length
        chain: Chain
        if flags & ~DESC_F_WRITE or offset < 0 or end > limit or not length:
            try:
                chain = self._outstanding[head] = self._walk(head, descriptor)
            except DriverError:
                self._consume(head, resubmitted=False)
                raise
            return [chain]
        chain = _Taken()
        chain.head = head
        if flags:
            chain.readable, chain.writable = _NO_VIEWS, (view[offset:end],)
        else:
            chain.readable, chain.writable = (view[offset:end],), _NO_VIEWS
        chain.written = 0
        self._outstanding[head] = chain
        return [chain]

    def _read_chains(self, heads: tuple[int, ...], *, resubmitted: bool = False) -> list[Chain]:
        """The chains at `heads`, up to the first bad one.

        A chain of one descriptor in the region of the chain before it is the usual case of a
        busy queue; it is dealt with here, in line, and everything else by `_walk`.
        """
        if len(heads) > 1 and (usual := self._read_usual(heads)):
            return usual
        chains: list[Chain] = []
        append = chains.append
        outstanding = self._outstanding
        size = self.size
        base, limit, view = self._window
        chain: Chain
        try:
            for head, descriptor in zip(heads, self._descriptors(heads), strict=True):
                if head >= size:
                    raise self._bad("a head beyond the descriptor table", head, "2.7.6")
                if outstanding[head] is not None:
                    raise self._bad("made available again while in use", head, "2.7.13")
                addr, length, flags, _ = descriptor
                offset = addr - base
                end = offset + length
                if (offset < 0 or end > limit) and length and not flags & DESC_F_INDIRECT:
                    base, limit, view = self._move_window(addr)
                    offset = addr - base
                    end = offset + length
                if offset < 0 or end > limit or not length:
                    chain = self._walk(head, descriptor)
                    base, limit, view = self._window
                elif not flags:
                    chain = _Taken()
                    chain.head = head
                    chain.readable = (view[offset:end],)
                    chain.writable = _NO_VIEWS
                    chain.written = 0
                elif flags == DESC_F_WRITE:
                    chain = _Taken()
                    chain.head = head
                    chain.readable = _NO_VIEWS
                    chain.writable = (view[offset:end],)
                    chain.written = 0
                else:
                    chain = self._walk(head, descriptor)
                    base, limit, view = self._window
                outstanding[head] = chain
                append(chain)
                if self._walked >= _MAX_WALK:
                    break  # enough for one burst
        except DriverError as error:
            if not chains:
                self._consume(error.head, resubmitted)
                raise
        return chains

    def _read_usual(self, heads: tuple[int, ...]) -> list[Chain]:
        """The chains at `heads` if all of them are of the usual kind; else none is read.

        That is what drivers offer again and again: one buffer a chain, all in one region, all
        readable or all writable. Each check then is one for all of them.
        """
        first, count = heads[0], len(heads)
        if self._flags[first & self.size - 1] & ~DESC_F_WRITE:  # the others would be read in vain
            return []
        end = first + count
        outstanding = self._outstanding
        addresses: Sequence[int]
        lengths: Sequence[int]
        flags: Sequence[int]
        if end <= self.size and heads == tuple(range(first, end)):
            fields = _descriptors(count).unpack_from(self._table, first << 4)
            addresses, lengths, flags = fields[::4], fields[1::4], fields[2::4]
            held = outstanding[first:end]
        elif max(heads) < self.size and len(set(heads)) == count:
            table, unpack = self._table, _DESCRIPTOR.unpack_from
            addresses, lengths, flags, _ = zip(
                *[unpack(table, head << 4) for head in heads], strict=True
            )
            held = [outstanding[head] for head in heads]
        else:
            return []
        flag = flags[0]
        base, limit, view = self._window
        if (
            flag & ~DESC_F_WRITE
            or flags.count(flag) != count
            or held.count(None) != count
            or min(addresses) < base
            or max(map(add, addresses, lengths)) > base + limit
            or not min(lengths)
        ):
            return []
        chains: list[Chain] = []
        append = chains.append
        for head, address, length in zip(heads, addresses, lengths, strict=True):
            offset = address - base
            buffer = (view[offset : offset + length],)
            chain = _Taken()
            chain.head = head
            if flag:
                chain.readable = _NO_VIEWS
                chain.writable = buffer
            else:
                chain.readable = buffer
                chain.writable = _NO_VIEWS
            chain.written = 0
            outstanding[head] = chain
            append(chain)
        return chains

    def _descriptors(self, heads: Sequence[int]) -> Iterable[tuple[int, int, int, int]]:
        """The descriptors at `heads`, each read once.

        Drivers mostly hand out a queue's descriptors in turn: such a run is unpacked as one. For a
        head beyond the table, which the caller refuses, there is some descriptor from inside it.
        """
        table, size = self._table, self.size
        unpack = _DESCRIPTOR.unpack_from
        first, end = heads[0], heads[-1] + 1
        if len(heads) == 1:
            return (unpack(table, (first & size - 1) << 4),)
        if end - first == len(heads) and end <= size and heads == tuple(range(first, end)):
            return _DESCRIPTOR.iter_unpack(table[first << 4 : end << 4])
        return [unpack(table, (head & size - 1) << 4) for head in heads]

    def _consume(self, head: int | None, resubmitted: bool) -> None:
        """Takes a bad chain out of the way; its head goes back where that is possible."""
        if not resubmitted:
            self._next_avail = (self._next_avail + 1) & 0xFFFF
            self._pin_outstanding()
        if head is None or head >= self.size or self._outstanding[head] is not None:
            return
        chain = Chain(head, _NO_VIEWS, _NO_VIEWS)
        self._outstanding[head] = chain
        self._note_popped([chain])
        self.write_used(chain)

    def _pin_outstanding(self) -> None:
        """The device has gone over an entry for good: what it holds stood before that."""
        held = enumerate(self._outstanding)
        self._resubmitted.update(head for head, chain in held if chain is not None)

    def _walk(self, head: int, descriptor: tuple[int, int, int, int]) -> Chain:
        """Follows the chain that starts with `descriptor`, the one at `head`, to its end.

        `table` is where the next descriptor is: the ring's own table, then perhaps an indirect one.
        """
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        table: memoryview | bytes = self._table
        size = entries = self.size
        index, walked, direct, total = head, 0, 0, 0
        in_order, indirect = self._in_order, False
        unpack = _DESCRIPTOR.unpack_from
        base, limit, view = self._window
        while True:
            addr, length, flags, following = descriptor
            if flags & DESC_F_INDIRECT:
                table = self._indirect_table(head, addr, length, flags, nested=indirect)
                entries, index, indirect = length // 16, 0, True
                direct = walked + 1
                descriptor = unpack(table, 0)
                continue
            walked += 1
            if walked > size:
                raise self._bad(
                    f"a chain of more than {size} descriptors, or one that loops",
                    head,
                    "2.7.5.3.1" if indirect else "2.7.5.2",
                )
            total += length
            if total > _MAX_CHAIN_BYTES:
                raise self._bad("a chain of more than 2^32 bytes", head, "2.7.5.2")
            if flags & DESC_F_WRITE:
                pieces = writable
            elif writable:
                raise self._bad("a readable buffer after a writable one", head, "2.7.4.2")
            else:
                pieces = readable
            offset = addr - base
            end = offset + length
            if offset < 0 or end > limit:
                if length:
                    self._translate(head, addr, length, pieces)
                    base, limit, view = self._window
            elif length:
                pieces.append(view[offset:end])
            if not flags & DESC_F_NEXT:
                self._walked += walked + len(readable) + len(writable)
                chain = _Walked(head, readable, writable)
                chain.descriptors = direct if indirect else walked
                return chain
            if following >= entries:
                raise self._bad(
                    f"next is {following} in a table of {entries} descriptors", head, "2.7.5"
                )
            if in_order and following != ((index + 1) & (size - 1) if not indirect else index + 1):
                raise self._bad(
                    f"descriptor {index} is followed by {following} although IN_ORDER was"
                    " negotiated",
                    head,
                    "2.7.5.3.1" if indirect else "2.7.5.2",
                )
            index = following
            descriptor = unpack(table, index << 4)

    def _indirect_table(
        self, head: int, addr: int, length: int, flags: int, *, nested: bool
    ) -> memoryview | bytes:
        section = "2.7.5.3.1"
        if not self._indirect:
            raise self._bad("an indirect table although that was not negotiated", head, section)
        if nested:
            raise self._bad("an indirect table inside an indirect table", head, section)
        if flags & DESC_F_NEXT:
            raise self._bad("a descriptor that is both indirect and chained on", head, section)
        if not length or length % 16:
            raise self._bad(f"an indirect table of {length} bytes", head, "2.7.5.3")
        try:
            pieces = self.memory.views(addr, length)
        except AddressError as error:
            raise self._bad(
                f"the indirect table is not in the guest's memory: {error}", head, "2.7.5.3"
            ) from None
        if len(pieces) == 1:
            return pieces[0]
        # A table over two mappings is rare: it is copied, as far as a chain could reach into it.
        return self.memory.read(addr, min(length, _MAX_TABLE_BYTES))

    def _translate(self, head: int, addr: int, length: int, pieces: list[memoryview]) -> None:
        try:
            pieces.extend(self.memory.views(addr, length))
        except AddressError as error:
            raise self._bad(
                f"a buffer is not in the guest's memory: {error}", head, "2.7.5"
            ) from None
        if len(pieces) > _MAX_PIECES:
            raise self._bad(f"a chain of more than {_MAX_PIECES} pieces of memory", head, "2.7.5")
        self._window = self._window_at(addr)  # the next one is probably there, too

    def _move_window(self, gpa: int) -> tuple[int, int, memoryview]:
        """Has the window show the region around `gpa`, if there is one; returns the window."""
        try:
            window = self._window = self._window_at(gpa)
        except AddressError:
            return self._window
        return window

    def _window_at(self, gpa: int) -> tuple[int, int, memoryview]:
        """The region around `gpa`: its first address, its size, all of its bytes."""
        region = self.memory.region_at(gpa)
        return region.gpa, region.size, region.view

    def _bad(self, reason: str, head: int, section: str) -> DriverError:
        return DriverError(reason, queue=self.name, head=head, section=section)

    # --- giving chains back --------------------------------------------------------------------

    def write_used(self, chain: Chain) -> None:
        """Writes the used element of one chain. The driver sees it after `publish`.

        With IN_ORDER a chain whose predecessors are not back yet waits for them (2.7.9).

        Raises `UsageError` when the chain is not outstanding.
        """
        self.write_used_burst((chain,))

    def write_used_burst(self, chains: Iterable[Chain]) -> None:
        """Writes the used elements of several chains, in this order; see `write_used`."""
        chains = list(chains)
        if self._in_order:
            done = len(chains) > 1 and self._write_oldest(chains)
        else:
            done = self._write_one(chains[0]) if len(chains) == 1 else self._write_held(chains)
        if done:
            return
        outstanding = self._outstanding
        size = self.size
        finished: list[Chain] = []
        stray: Chain | None = None
        for chain in self._in_ring_order(chains) if self._in_order else chains:
            head = chain.head
            if head >= size or outstanding[head] is not chain:
                stray = chain
                break
            outstanding[head] = None
            finished.append(chain)
        if finished:
            self._write_chains([chain.head for chain in finished], finished)
        if stray is not None:
            raise UsageError(f"{self.name}: {stray!r} is not outstanding")

    def publish(self) -> int:
        """Lets the driver see the used elements written since the last call; returns how many."""
        index = self._next_used
        count = (index - self._published) & 0xFFFF
        if not count:
            return 0
        self._published = index
        self._unsignalled += count
        log = self._inflight_log
        if log is not None:
            finished, self._unpublished = self._unpublished, array("I")
            log.publishing(finished, index)
        order_stores()  # the elements are there before the index that covers them (2.7.14)
        self._used_words[1] = _swap16(index) if _BIG_ENDIAN else index
        if self.memory.dirty_log is not None:
            self.memory.mark_dirty(self._used_gpa, len(self._used))
        if log is not None:
            log.published(finished, index)
        return count

    def push_burst(self, chains: Sequence[Chain]) -> None:
        """Writes the used elements of `chains` and publishes them."""
        self.write_used_burst(chains)
        self.publish()

    def _in_ring_order(self, chains: Iterable[Chain]) -> Iterable[Chain]:
        """Of the chains completed so far those that may go back now: none before an older one."""
        completed = self._completed
        stray: Chain | None = None
        for chain in chains:
            if not self._holds(chain):
                stray = Chain(chain.head, chain.readable, chain.writable)  # refused by its looks
                break
            completed.add(chain.head)
        order = self._order
        while order and order[0].head in completed:
            completed.discard(order[0].head)
            yield order.popleft()
        if stray is not None:
            yield stray

    def _holds(self, chain: Chain) -> bool:
        """Whether the device has this chain and has not completed it."""
        head = chain.head
        return head < self.size and self._outstanding[head] is chain and head not in self._completed

    def _write_one(self, chain: Chain) -> bool:
        """Writes the used element of a chain, if it is outstanding."""
        head = chain.head
        if head >= self.size or self._outstanding[head] is not chain:
            return False
        self._outstanding[head] = None
        self._write_element(head, chain.written)
        if chain.written and self.memory.dirty_log is not None:
            self.memory.mark_views_dirty(chain.writable, chain.written)
        return True

    def _write_held(self, chains: list[Chain]) -> bool:
        """Writes the used elements of chains that are outstanding, every one and each once.

        If that is not what they are, nothing happens. The comparisons go by identity.
        """
        if not chains:
            return False
        first, count = chains[0].head, len(chains)
        outstanding = self._outstanding
        heads: Sequence[int]
        if outstanding[first : first + count] == chains:  # given back as they were popped
            heads = range(first, first + count)
            outstanding[first : first + count] = [None] * count
        else:
            heads = [chain.head for chain in chains]
            if (
                max(heads) >= self.size
                or [outstanding[head] for head in heads] != chains
                or len(set(heads)) != count
            ):
                return False
            for head in heads:
                outstanding[head] = None
        self._write_chains(heads, chains)
        return True

    def _write_oldest(self, chains: list[Chain]) -> bool:
        """IN_ORDER: the same for the chains that were popped first, if nothing waits for them."""
        order, count = self._order, len(chains)
        if self._completed or list(islice(order, count)) != chains or not self._write_held(chains):
            return False
        for _ in repeat(None, count):
            order.popleft()
        return True

    def _write_chains(self, heads: Sequence[int], chains: Sequence[Chain]) -> None:
        self._write_elements(heads, [chain.written for chain in chains])
        if self.memory.dirty_log is not None:
            for chain in chains:
                if chain.written:
                    self.memory.mark_views_dirty(chain.writable, chain.written)

    def _write_element(self, head: int, written: int) -> None:
        """Writes one used element."""
        position = self._next_used
        _ELEMENT.pack_into(self._used, 4 + 8 * (position & (self.size - 1)), head, written)
        self._next_used = (position + 1) & 0xFFFF
        if self._inflight_log is not None:
            self._unpublished.append(head)
        if self._resubmitted:
            self._resubmitted.discard(head)

    def _write_elements(self, heads: Sequence[int], written: Sequence[int]) -> None:
        """Writes used elements, one for each head."""
        count = len(heads)
        if count == 1:
            self._write_element(heads[0], written[0])
            return
        size = self.size
        slot = self._next_used & (size - 1)
        end = slot + count
        self._next_used = (self._next_used + count) & 0xFFFF
        if self._resubmitted:
            self._resubmitted.difference_update(heads)
        if self._inflight_log is not None:
            self._unpublished.extend(heads)
        ids, lengths = _doublewords(heads), _doublewords(written)
        if end <= size:
            self._used_ids[slot:end] = ids
            self._used_lengths[slot:end] = lengths
        else:
            first = size - slot
            self._used_ids[slot:], self._used_ids[: end - size] = ids[:first], ids[first:]
            self._used_lengths[slot:] = lengths[:first]
            self._used_lengths[: end - size] = lengths[first:]

    def _write_unwritten(self, heads: Sequence[int], elements: array[int] | None = None) -> None:
        """Writes used elements of chains to which nothing was written, one for each head.

        Those may be given: the heads again, as 64-bit words in the byte order of the ring.
        """
        size = self.size
        slot = self._next_used & (size - 1)
        end = slot + len(heads)
        self._next_used = (self._next_used + len(heads)) & 0xFFFF
        if self._resubmitted:
            self._resubmitted.difference_update(heads)
        if self._inflight_log is not None:
            self._unpublished.extend(heads)
        if elements is None:
            elements = _unwritten(heads)
        if end <= size:
            self._elements[slot:end] = elements
        else:
            first = size - slot
            self._elements[slot:], self._elements[: end - size] = elements[:first], elements[first:]

    # --- notifications ---------------------------------------------------------------------------

    @property
    def uncalled(self) -> int:
        """How many chains were published since `should_notify` was asked."""
        return self._unsignalled

    def should_notify(self) -> bool:
        """Whether the driver wants a call for what was published since this was last asked.

        Virtio 1.3, 2.7.7.2. The first time there is something to tell, the answer is always yes:
        what an earlier device told the driver is not known, and a spurious call does no harm.
        """
        count = self._unsignalled
        if not count:
            return False
        self._unsignalled = 0
        if self._first_call:
            self._first_call = False
            return True
        # used.idx must be visible before the driver's wish is read, or both sides may go to sleep.
        fence()
        wish = self._driver_wish()
        if self._event_idx:
            new = self._published
            # After 65,536 chains without asking, every value of used_event has been passed.
            return count > 0xFFFF or needs_event(wish, new, (new - count) & 0xFFFF)
        return not wish & AVAIL_F_NO_INTERRUPT

    def _driver_wish(self) -> int:
        """What the driver says about calls: with EVENT_IDX used_event, else the ring's flags."""
        wish = self._avail_words[self._used_event if self._event_idx else 0]
        return _swap16(wish) if _BIG_ENDIAN else wish

    def disable_kicks(self) -> None:
        """Tells the driver that the device will look by itself (virtio 1.3, 2.7.10.2).

        With EVENT_IDX nothing needs to be written: a driver kicks once when it passes the position
        that `enable_kicks` named, and not again for 65,536 chains.
        """
        if not self._event_idx:
            self._store_used_word(0, USED_F_NO_NOTIFY)

    def enable_kicks(self) -> bool:
        """Asks for a kick at the next chain; True when chains came in the meantime already.

        Then there may be no kick for them: pop once more. Raises `DriverError` like `pop_burst`
        when the available index is impossible.
        """
        if self._event_idx:
            self._store_used_word(self._avail_event, self._next_avail)
        else:
            self._store_used_word(0, 0)
        # The wish must be visible before the index is read, or both sides may go to sleep.
        fence()
        return self.has_left_over or self.waiting() > 0

    def _store_used_word(self, index: int, value: int) -> None:
        self._used_words[index] = _swap16(value) if _BIG_ENDIAN else value
        if self.memory.dirty_log is not None:
            self.memory.mark_dirty(self._used_gpa + 2 * index, 2)


@lru_cache(maxsize=256)
def _descriptors(count: int) -> struct.Struct:
    """So many descriptors: their fields one after another."""
    return struct.Struct("<" + "QIHH" * count)


@lru_cache(maxsize=256)
def _words(count: int) -> struct.Struct:
    """So many 16-bit words."""
    return struct.Struct(f"<{count}H")


def _doublewords(values: Sequence[int]) -> array[int]:
    """The values as words of the ring; for reading only, since they may be the very same array."""
    if _BIG_ENDIAN:
        words = array("I", values)
        words.byteswap()
        return words
    return values if isinstance(values, array) and values.typecode == "I" else array("I", values)


def _unwritten(heads: Sequence[int]) -> array[int]:
    """Used elements of the ring that say that nothing was written."""
    elements = array("Q", heads)
    if _BIG_ENDIAN:
        elements.byteswap()
    return elements


def _swap16(value: int) -> int:
    return value >> 8 | (value & 0xFF) << 8
