"""The ring bench's baseline: the device's side of a split virtqueue, written the obvious way.

The ring's parts are ctypes structures laid over guest memory, and a chain is followed descriptor by
descriptor, field by field, as one would transcribe the specification. It follows NEXT and INDIRECT
and checks what it reads. It works chain by chain: a burst is a loop.

It is there to be measured and to be compared with, not to be used: it has no notifications and no
IN_ORDER, stops at a bad chain, and keeps no books on the chains in flight. The bench counts that in
its favour.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from vq.abi import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Feature,
    VringAvailHeader,
    VringDesc,
    VringUsedElem,
    VringUsedHeader,
    ring_layout,
)
from vq.errors import AddressError, DriverError
from vq.memory import GuestMemory, order_loads, order_stores

__all__ = ["CtypesChain", "CtypesRing"]

_MAX_CHAIN_BYTES = 1 << 32  # virtio 1.3, 2.7.5.2


@dataclass(slots=True)
class CtypesChain:
    """A chain of buffers that the driver made available; the views lie in guest memory."""

    head: int
    readable: list[memoryview] = field(default_factory=list)
    writable: list[memoryview] = field(default_factory=list)
    written: int = 0


class CtypesRing:
    """One split virtqueue, seen from the device. Arguments and units as for `SplitRing`.

    Raises `DriverError` for a chain that breaks a rule, and goes no further.
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
    ) -> None:
        layout = ring_layout(size)

        class Avail(ctypes.LittleEndianStructure):
            _fields_ = (("header", VringAvailHeader), ("ring", ctypes.c_uint16.__ctype_le__ * size))

        class Used(ctypes.LittleEndianStructure):
            _fields_ = (("header", VringUsedHeader), ("ring", VringUsedElem * size))

        self.memory = memory
        self.size = size
        self._table = (VringDesc * size).from_buffer(memory.view(desc, layout.desc_bytes))
        self._avail = Avail.from_buffer(memory.view(avail, layout.avail_bytes))
        self._used = Used.from_buffer(memory.view(used, layout.used_bytes))
        self._indirect = bool(features >> Feature.INDIRECT_DESC & 1)
        self._next_avail = next_avail & 0xFFFF
        self._next_used = next_used & 0xFFFF

    def pop_burst(self, limit: int) -> list[CtypesChain]:
        """Up to `limit` chains that the driver made available, in its order."""
        chains: list[CtypesChain] = []
        while len(chains) < limit and (chain := self.pop()) is not None:
            chains.append(chain)
        return chains

    def push_burst(self, chains: Sequence[CtypesChain]) -> None:
        """Gives `chains` back as used, in this order."""
        for chain in chains:
            self.push(chain)

    def pop(self) -> CtypesChain | None:
        """The next chain, or None when there is none."""
        count = (self._avail.header.idx - self._next_avail) & 0xFFFF
        if not count:
            return None
        if count > self.size:
            raise DriverError("the available index is too far ahead", section="2.7.13.3")
        order_loads()
        head = self._avail.ring[self._next_avail % self.size]
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        return self._read_chain(head)

    def push(self, chain: CtypesChain) -> None:
        """Gives one chain back as used."""
        element = self._used.ring[self._next_used % self.size]
        element.id = chain.head
        element.len = chain.written
        self._next_used = (self._next_used + 1) & 0xFFFF
        order_stores()
        self._used.header.idx = self._next_used

    def _read_chain(self, head: int) -> CtypesChain:
        chain = CtypesChain(head)
        table: ctypes.Array[VringDesc] = self._table
        index = head
        walked = total = 0
        while True:
            if index >= len(table):
                raise DriverError(f"descriptor {index} of {len(table)}", head=head, section="2.7.5")
            descriptor = table[index]
            addr = descriptor.addr
            length = descriptor.len
            flags = descriptor.flags
            following = descriptor.next
            if flags & DESC_F_INDIRECT:
                if not self._indirect or table is not self._table or flags & DESC_F_NEXT:
                    raise DriverError(
                        "an indirect table where none may be", head=head, section="2.7.5.3.1"
                    )
                table = self._indirect_table(head, addr, length)
                index = 0
                continue
            walked += 1
            total += length
            if walked > self.size or total > _MAX_CHAIN_BYTES:
                raise DriverError("a chain too long", head=head, section="2.7.5.2")
            if flags & DESC_F_WRITE:
                chain.writable += self._buffer(head, addr, length)
            elif chain.writable:
                raise DriverError(
                    "a readable buffer after a writable one", head=head, section="2.7.4.2"
                )
            else:
                chain.readable += self._buffer(head, addr, length)
            if not flags & DESC_F_NEXT:
                return chain
            index = following

    def _indirect_table(self, head: int, addr: int, length: int) -> ctypes.Array[VringDesc]:
        entries, rest = divmod(length, ctypes.sizeof(VringDesc))
        if not entries or rest:
            raise DriverError(f"a table of {length} bytes", head=head, section="2.7.5.3")
        (view,) = self._buffer(head, addr, length)
        return (VringDesc * entries).from_buffer(view)

    def _buffer(self, head: int, addr: int, length: int) -> list[memoryview]:
        """The buffer's views, one unless it is empty; it lies in one region."""
        if not length:
            return []
        try:
            return [self.memory.view(addr, length)]
        except AddressError as error:
            raise DriverError(
                f"a buffer is not in the guest's memory: {error}", head=head, section="2.7.5"
            ) from None
