"""Chains of the usual kinds, many at a time: what a split ring gives to those who go by address.

A `vq.split_ring.Chain` is one object for each chain and a view for each buffer. For a device model
that only passes addresses on to the kernel that is more than all the rest of its work. `Run` and
`TableRun` take chains from a ring as columns of numbers, under the same checks, and leave to
`SplitRing.pop_burst` whatever is not of their kind.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import add, itemgetter

from vq.abi import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from vq.errors import AddressError
from vq.lanes import ADDRESSES, Ranges, alike
from vq.memory import address_of, order_loads
from vq.split_ring import Chain, SplitRing

__all__ = ["Run", "TableRun"]

_DESCRIPTOR = struct.Struct("<QIHH")
_BIG_ENDIAN = sys.byteorder == "big"
_FEW = 10  # chains that are not worth columns
_ADDRESS = (1 << 64) - 1  # the first of a column of addresses
_MOST_IN_TABLE = 64  # descriptors; a chain of more is rare, and not worth a case of its own
_MOST_BYTES = 1 << 32  # of a chain, and so of all of them
_NO_VIEWS: tuple[memoryview, ...] = ()
_NO_ENTRIES = memoryview(b"").cast("H")


class Run:
    """Chains of the usual kind, popped and not given back: a queue of them, kept as columns.

    Usual is what drivers offer again and again: one buffer a chain, all readable or all `writable`,
    all in one region. A `Chain` for each of them costs more than what is done with it, so a device
    model that moves such buffers by address may keep them here instead. Item by item, oldest first,
    the lists say what is held: `heads`, `addresses` (host-virtual) and `lengths` in bytes, none of
    them less than `shortest`. They are the ring's own copies, checked as `pop_burst` checks. The
    buffers stay mapped while they are held.

    What is not usual is left to `SplitRing.pop_burst`, bad chains too. While something is held here
    that must not be called: `to_chains` first. With IN_ORDER nothing is taken while the device
    holds a `Chain`, which is older.
    """

    def __init__(self, ring: SplitRing, *, writable: bool) -> None:
        self.heads = array("I")
        self.addresses = array("Q")
        self.lengths = array("I")
        self.shortest = 0
        self._ring = ring
        self._flag = DESC_F_WRITE if writable else 0
        self._region = ring._window
        self.base = ring.memory.hvaddr(self._region[0])  # host-virtual, of its first byte

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        return f"<Run of {len(self)}>"

    def pop(self, limit: int) -> int:
        """Takes up to `limit` more chains; returns how many.

        None when there is none, and when one of the next few is not of the usual kind. Raises
        `DriverError` when the available index is impossible.
        """
        ring = self._ring
        words = _next_entries(ring, limit)
        count = len(words)
        if not count:
            return 0
        heads: Sequence[int] = self._take_few(words.tolist()) if count <= _FEW else ()
        if not heads:
            heads = self._take(words.tobytes())
        if not heads:
            return 0
        self.heads.extend(heads)
        ring._next_avail = (ring._next_avail + count) & 0xFFFF
        if ring._inflight_log is not None:
            ring._inflight_log.popped(heads)
        return count

    def give_back(self, written: Sequence[int]) -> None:
        """Writes the used elements of the first chains: so many bytes were written to each.

        The driver sees them after `SplitRing.publish`.
        """
        ring, count = self._ring, len(written)
        if not count:
            return
        heads = self.heads[:count]
        del self.heads[:count]
        _let_go(ring, heads)
        ring._write_elements(heads, written)
        if ring.memory.dirty_log is not None:
            self._mark_dirty(written)
        del self.addresses[:count], self.lengths[:count]

    def give_back_one(self, written: int) -> None:
        """`give_back` for one chain, without columns."""
        ring, head = self._ring, self.heads.pop(0)
        ring._outstanding[head] = None
        ring._write_element(head, written)
        if ring.memory.dirty_log is not None:
            self._mark_dirty((written,))
        self.addresses.pop(0)
        self.lengths.pop(0)

    @property
    def memory(self) -> memoryview:
        """All bytes of the region that the buffers lie in; the first is at `base`."""
        return self._region[2]

    def view(self, index: int) -> memoryview:
        """The buffer of the chain at this place."""
        offset = self.addresses[index] - self.base
        return self._region[2][offset : offset + self.lengths[index]]

    def adopt(self, chains: Sequence[Chain]) -> bool:
        """The way back from `to_chains`, if all of the chains are of the usual kind.

        They are outstanding, and the run holds nothing. False leaves everything as it is.
        """
        ring = self._ring
        if self.heads or not chains or (ring._in_order and list(ring._order) != chains):
            return False
        buffers = [chain.writable if self._flag else chain.readable for chain in chains]
        if _BIG_ENDIAN or not all(len(views) == 1 for views in buffers):
            return False
        # What `to_chains` would forget: buffers of the other kind, and descriptors of empty ones.
        others = [chain.readable if self._flag else chain.writable for chain in chains]
        if any(others) or any(chain.descriptors != 1 for chain in chains):
            return False
        addresses = [address_of(views[0]) for views in buffers]
        lengths = [len(views[0]) for views in buffers]
        end = self.base + self._region[1]
        if min(addresses) < self.base or max(map(add, addresses, lengths)) > end:
            return False
        self.heads = array("I", [chain.head for chain in chains])
        self.addresses, self.lengths = array("Q", addresses), array("I", lengths)
        self.shortest = min(lengths)
        for head in self.heads:
            ring._outstanding[head] = self
        ring._order.clear()
        return True

    def to_chains(self) -> list[Chain]:
        """Goes over to chains: they are outstanding in place of what the run held."""
        if not self.heads:
            return []
        ring, view = self._ring, self._region[2]
        chains: list[Chain] = []
        for head, address, length in zip(self.heads, self.addresses, self.lengths, strict=True):
            offset = address - self.base
            buffer = (view[offset : offset + length],)
            chain = Chain(head, _NO_VIEWS, buffer) if self._flag else Chain(head, buffer, _NO_VIEWS)
            ring._outstanding[head] = chain
            chains.append(chain)
        if ring._in_order:
            ring._order.extend(chains)
        for column in (self.heads, self.addresses, self.lengths):
            del column[:]
        return chains

    def _take_few(self, heads: list[int]) -> Sequence[int]:
        """`_take` for a handful, which does not pay for columns; the heads if all of them pass."""
        ring = self._ring
        outstanding, table, size = ring._outstanding, ring._table, ring.size
        start, room, _ = self._region
        end, shift = start + room, self.base - start
        before = len(self.addresses)
        for head in heads:
            if head >= size or outstanding[head] is not None:
                break
            address, length, flags, _ = _DESCRIPTOR.unpack_from(table, head << 4)
            if flags != self._flag or address < start or not 0 < length <= end - address:
                break
            self.addresses.append(address + shift)
            self.lengths.append(length)
            outstanding[head] = self
        else:
            shortest = min(self.lengths[before:])
            self.shortest = min(shortest, self.shortest) if before else shortest
            return heads
        for head in heads[: len(self.addresses) - before]:
            outstanding[head] = None
        del self.addresses[before:], self.lengths[before:]
        return ()

    def _take(self, words: bytes) -> Sequence[int]:
        """Reads the descriptors whose heads these entries of the available ring are, each once.

        Returns the heads if all of them pass, else none. Each check is one for all of them, so it
        does not say which is to blame.
        """
        ring, count = self._ring, len(words) // 2
        outstanding = ring._outstanding
        first = int.from_bytes(words[:2], "little")
        end = first + count
        held: Sequence[object]
        in_turn = words == ring._words_in_turn[2 * first : 2 * end]
        if in_turn:  # as drivers mostly hand out a queue's descriptors
            heads = ring._heads[first:end]
            copy = ring._table[first << 4 : end << 4].tobytes()
            held = outstanding[first:end]
        else:
            numbers = memoryview(words).cast("H").tolist()
            if len(set(numbers)) != count:
                return ()
            at_heads = itemgetter(*numbers)  # one step for all of them
            try:
                held = at_heads(outstanding)
            except IndexError:  # there is no such head
                return ()
            copy = b"".join(at_heads(ring._each_descriptor))
            heads = array("I", numbers)
        addresses, lengths = array("Q", copy)[::2], array("I", copy)[2::4]
        flags = array("H", copy)[6::8]
        shortest = longest = lengths[0]
        if not alike(lengths):
            in_order = sorted(lengths)  # takes less than min and max
            shortest, longest = in_order[0], in_order[-1]
        if flags[0] != self._flag or not alike(flags) or held.count(None) != count or not shortest:
            return ()
        column = ADDRESSES.column(addresses)
        if not self._region_holds(column, count, longest):
            return ()
        self.shortest = min(shortest, self.shortest) if self.heads else shortest
        self.addresses.frombytes(ADDRESSES.moved(column, count, self.base - self._region[0]))
        self.lengths += lengths
        if in_turn:
            outstanding[first:end] = [self] * count
        else:
            for head in numbers:
                outstanding[head] = self
        return heads

    def _region_holds(self, addresses: int, count: int, length: int) -> bool:
        """Whether the one region has so many bytes at each of these guest-physical addresses."""
        base, size, _ = self._region
        if ADDRESSES.between(addresses, count, base, base + size - length):
            return True
        if self.heads:
            return False
        try:  # it may be another region from now on
            base, size, _ = self._region = self._ring._window_at(addresses & _ADDRESS)
        except AddressError:
            return False
        self.base = self._ring.memory.hvaddr(base)
        return ADDRESSES.between(addresses, count, base, base + size - length)

    def _mark_dirty(self, written: Sequence[int]) -> None:
        shift = self._region[0] - self.base
        for address, count in zip(self.addresses, written, strict=False):
            if count:
                self._ring.memory.mark_dirty(address + shift, count)


class TableRun:
    """Chains of device-readable buffers that stand in indirect tables, kept as columns.

    So a driver sends what lies in many places. All is in one region, and each table's descriptors
    follow one another; a chain of one buffer without a table is taken too. Chain by chain, oldest
    first, `heads`, `counts` and `sizes` say what is held: how many buffers each chain has, and how
    many bytes. `vectors` has two items for each buffer ("Q"), as `struct iovec` has: its address
    (host-virtual) and its length in bytes. They are the ring's own copies, checked as
    `SplitRing.pop_burst` checks; the buffers stay mapped while they are held.

    What is not of this kind is left to that, bad chains too. While something is held here it must
    not be called: `to_chains` first. With IN_ORDER nothing is taken while the device holds a
    `Chain`, which is older.
    """

    most_pieces = 1024
    """Buffers that are held at most, of all chains together."""
    memory: memoryview
    """All bytes of the region that the buffers lie in."""
    base: int
    """Where the first of them is, host-virtual."""

    def __init__(self, ring: SplitRing) -> None:
        self.heads: list[int] = []
        self.counts: list[int] = []
        self.sizes: list[int] = []
        self.vectors = array("Q")
        self._ring = ring
        self._most_in_table = min(_MOST_IN_TABLE, ring.size) if ring._indirect else 0
        self._look_into(ring._window)

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        return f"<TableRun of {len(self)}>"

    def pop(self, limit: int, enough_bytes: int = _MOST_BYTES) -> int:
        """Takes up to `limit` chains, as far as they are of this kind, and no more once they have
        `enough_bytes` bytes; returns how many.

        None when one of their buffers is not in the one region, and while some are held already.
        Raises `DriverError` when the available index is impossible.
        """
        if self.heads:
            return 0
        ring, counts, sizes = self._ring, self.counts, self.sizes
        if self._region is not ring._window:  # where the last buffer was found
            self._look_into(ring._window)
        taken, tables = self._read(_next_entries(ring, limit).tolist(), enough_bytes)
        if not taken:
            return 0
        vectors = self._ranges.moved(b"".join(tables))
        if vectors is None or sum(sizes) > _MOST_BYTES:
            for head in taken:
                ring._outstanding[head] = None
            counts.clear()
            sizes.clear()
            return 0
        self.heads = taken
        self.vectors = array("Q", vectors)
        ring._next_avail = (ring._next_avail + len(taken)) & 0xFFFF
        if ring._inflight_log is not None:
            ring._inflight_log.popped(taken)
        return len(taken)

    def _read(self, heads: list[int], enough_bytes: int) -> tuple[list[int], list[bytes]]:
        """Reads descriptors and tables, each once, up to a chain of another kind or enough bytes.

        Returns the heads before that, which are outstanding from now on, and copies of their
        descriptors, where addresses and lengths are not checked yet.
        """
        ring, counts, sizes = self._ring, self.counts, self.sizes
        outstanding, table, size = ring._outstanding, ring._table, ring.size
        most = self._most_in_table
        start, room, memory = self._region
        taken: list[int] = []
        tables: list[bytes] = []
        pieces = 0
        for head in heads:
            if head >= size or outstanding[head] is not None:
                break
            address, length, flags, _ = _DESCRIPTOR.unpack_from(table, head << 4)
            if flags == DESC_F_INDIRECT:
                count, offset = length >> 4, address - start
                if length & 15 or not 0 < count <= most:
                    break
                if not 0 <= offset <= room - length:
                    if taken:
                        break
                    self._look_into(ring._move_window(address))
                    start, room, memory = self._region
                    offset = address - start
                    if not 0 <= offset <= room - length:
                        break
                copy, lengths, fixed, in_turn = _in_turn(count)
                (descriptors,) = copy(memory, offset)
                if int.from_bytes(descriptors, "little") & fixed != in_turn:
                    break
                length = sum(lengths(descriptors))
            elif flags:
                break
            else:
                count = 1
                descriptors = _DESCRIPTOR.pack(address, length, 0, 0)
            outstanding[head] = self
            taken.append(head)
            counts.append(count)
            sizes.append(length)
            tables.append(descriptors)
            pieces += count
            enough_bytes -= length
            if enough_bytes <= 0 or pieces > self.most_pieces - _MOST_IN_TABLE:
                break
        return taken, tables

    def _look_into(self, region: tuple[int, int, memoryview]) -> None:
        """Has all be in this region."""
        start, room, self.memory = self._region = region
        self.base = self._ring.memory.hvaddr(start)
        self._ranges = Ranges(start, start + room, self.base - start)

    def give_back(self, count: int) -> None:
        """Writes the used elements of the first `count` chains: nothing was written to them.

        The driver sees them after `SplitRing.publish`.
        """
        if not count:
            return
        ring, heads = self._ring, self.heads[:count]
        del self.vectors[: 2 * sum(self.counts[:count])]
        del self.heads[:count], self.counts[:count], self.sizes[:count]
        outstanding = ring._outstanding
        for head in heads:
            outstanding[head] = None
        ring._write_unwritten(heads)

    def to_chains(self) -> list[Chain]:
        """Goes over to chains: they are outstanding in place of what the run held."""
        if not self.heads:
            return []
        ring, view, base, at = self._ring, self.memory, self.base, 0
        chains: list[Chain] = []
        for head, count in zip(self.heads, self.counts, strict=True):
            buffers = []
            for index in range(at, at + 2 * count, 2):
                offset = self.vectors[index] - base
                buffers.append(view[offset : offset + self.vectors[index + 1]])
            at += 2 * count
            chain = Chain(head, buffers, _NO_VIEWS)
            ring._outstanding[head] = chain
            chains.append(chain)
        if ring._in_order:
            ring._order.extend(chains)
        for column in (self.heads, self.counts, self.sizes, self.vectors):
            del column[:]
        return chains


def _next_entries(ring: SplitRing, limit: int) -> memoryview:
    """Up to `limit` entries of the available ring that come next, as far as they lie side by side.

    None while the ring has chains to give that came before them, or the device has one in order.
    """
    if ring._undone or ring._resubmit or ring._order or _BIG_ENDIAN:
        return _NO_ENTRIES
    slot = ring._next_avail & (ring.size - 1)
    count = min(ring.waiting(), limit, ring.size - slot)
    if count <= 0:
        return _NO_ENTRIES
    order_loads()  # the entries are read after the index that covers them (2.7.13.3)
    return ring._avail_words[2 + slot : 2 + slot + count]


def _let_go(ring: SplitRing, heads: array[int]) -> None:
    """These heads, one at least, are not outstanding any more."""
    outstanding, first, count = ring._outstanding, heads[0], len(heads)
    if heads == ring._heads[first : first + count]:
        outstanding[first : first + count] = [None] * count
    else:
        for head in heads:
            outstanding[head] = None


@lru_cache(maxsize=_MOST_IN_TABLE)
def _in_turn(
    count: int,
) -> tuple[Callable[..., tuple[bytes]], Callable[..., tuple[int, ...]], int, int]:
    """A table of so many descriptors that follow one another.

    What copies it, what gives all lengths out of the copy, which bits of it are always the same,
    and what they are: the flags, and the next fields of all but the last.
    """
    copy, lengths = struct.Struct(f"{16 * count}s"), struct.Struct("<" + "8xI4x" * count)
    fixed = _DESCRIPTOR.pack(0, 0, 0xFFFF, 0xFFFF) * (count - 1) + _DESCRIPTOR.pack(0, 0, 0xFFFF, 0)
    chained = [_DESCRIPTOR.pack(0, 0, DESC_F_NEXT, following) for following in range(1, count)]
    return (
        copy.unpack_from,
        lengths.unpack,
        int.from_bytes(fixed, "little"),
        int.from_bytes(b"".join(chained), "little"),
    )
