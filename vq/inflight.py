"""Notes of the chains that a device has, kept where they survive the device.

A vhost-user frontend holds a piece of shared memory in which the backend notes which chains it took
and did not give back yet. A backend that is started again finds them there. The layout of one
queue's part is that of "Inflight I/O tracking" for split virtqueues in QEMU's
docs/interop/vhost-user.rst, in native byte order::

    u64 features, u16 version, u16 desc_num, u16 last_batch_head, u16 used_idx
    desc_num times: u8 inflight, u8 padding[5], u16 next, u64 counter

The peer can write to this memory at any time, so every number from it is checked before it is used.
How the memory gets here is for the transport; who makes the calls is `split_ring`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from vq.abi import index_distance
from vq.errors import UsageError
from vq.memory import Region

__all__ = ["InflightQueue", "InflightRegion"]

_QUEUE = struct.Struct("=Q4H")
_ENTRY = struct.Struct("=B5xHQ")
_ENTRY_NEXT = 6
_ENTRY_COUNTER = 8
_USED_IDX = 14
_LAST_BATCH_HEAD = 12
_HALF = struct.Struct("=H")
_LONG = struct.Struct("=Q")
_VERSION = 1
_ALIGN = 64

if (_QUEUE.size, _ENTRY.size) != (16, 16):
    raise ImportError("an inflight region's structures are not 16 bytes on this machine")


class InflightRegion:
    """The notes of all queues, in one mapped region which it owns.

    Raises `UsageError` when the region is too small for `queues` queues of `queue_size`
    descriptors; the region is the caller's then.
    """

    def __init__(self, region: Region, queues: int, queue_size: int) -> None:
        needed = self.size_for(queues, queue_size)
        if region.size < needed:
            raise UsageError(
                f"an inflight region of {region.size} bytes, {queues} queues of {queue_size}"
                f" descriptors take {needed}"
            )
        self.region = region
        self.queues = queues
        self.queue_size = queue_size

    @classmethod
    def size_for(cls, queues: int, queue_size: int) -> int:
        """Bytes that the notes of so many queues take."""
        return queues * _stride(queue_size)

    def queue(self, index: int) -> InflightQueue | None:
        """One queue's notes; None when there are none for a queue of this index."""
        if index >= self.queues:
            return None
        stride = _stride(self.queue_size)
        return InflightQueue(
            self.region.view[index * stride : (index + 1) * stride], self.queue_size
        )

    def close(self) -> None:
        """Gives back the region."""
        self.region.close()


class InflightQueue:
    """One queue's notes, as `SplitRing` wants them (`vq.split_ring.InflightLog`)."""

    def __init__(self, view: memoryview, queue_size: int) -> None:
        self.size = queue_size
        self._view = view
        self._counter = 0
        self._last_batch_head = 0

    def recover(self, used_idx: int) -> list[int] | None:
        """The heads of chains that an earlier backend had, in the order in which it took them.

        `used_idx` is the used ring's index as the driver sees it. None when there are no notes yet
        or they are of another ring's life: then they begin now. Raises `UsageError` for notes that
        cannot be: another version, another size, an index out of range.
        """
        _, version, count, last_batch_head, noted = _QUEUE.unpack_from(self._view)
        if not version:
            self._begin(used_idx)
            return None
        if version != _VERSION or count != self.size:
            raise UsageError(f"inflight notes of version {version} for {count} descriptors")
        # What was published is more than what was noted when death came between the two.
        unnoted = index_distance(used_idx, noted)
        if unnoted > self.size:
            self._begin(used_idx)
            return None
        self._forget_batch(last_batch_head, unnoted)
        _HALF.pack_into(self._view, _USED_IDX, used_idx)
        entries = [_ENTRY.unpack_from(self._view, self._entry(head)) for head in range(self.size)]
        taken = sorted((counter, head) for head, (on, _, counter) in enumerate(entries) if on)
        self._counter = 1 + max((counter for _, _, counter in entries), default=0) & (1 << 64) - 1
        self._last_batch_head = last_batch_head if last_batch_head < self.size else 0
        return [head for _, head in taken]

    def popped(self, heads: Iterable[int]) -> None:
        """The device has these chains now.

        One that an earlier backend had keeps its place in the order: those behind it have not been
        taken up again yet, and the next backend would put it behind them.
        """
        view = self._view
        for head in heads:
            entry = self._entry(head)
            if view[entry]:
                continue
            _LONG.pack_into(view, entry + _ENTRY_COUNTER, self._counter)
            self._counter = self._counter + 1 & (1 << 64) - 1
            view[entry] = 1

    def unpopped(self, heads: Sequence[int]) -> None:
        """The device never had them, which were the last that it took, in this order.

        The last one goes first: who is killed in between has the first ones still, and goes on in
        the available ring behind these.
        """
        for head in reversed(heads):
            self._view[self._entry(head)] = 0

    def publishing(self, heads: Sequence[int], used_idx: int) -> None:
        """The used elements of these chains are written; `used_idx` will be stored next."""
        for head in heads:
            _HALF.pack_into(self._view, self._entry(head) + _ENTRY_NEXT, self._last_batch_head)
            self._last_batch_head = head
        _HALF.pack_into(self._view, _LAST_BATCH_HEAD, self._last_batch_head)

    def published(self, heads: Sequence[int], used_idx: int) -> None:
        """`used_idx` is stored: the chains are the driver's again."""
        for head in heads:
            self._view[self._entry(head)] = 0
        _HALF.pack_into(self._view, _USED_IDX, used_idx)

    def _begin(self, used_idx: int) -> None:
        self._view[:] = bytes(len(self._view))
        _QUEUE.pack_into(self._view, 0, 0, _VERSION, self.size, 0, used_idx)

    def _forget_batch(self, head: int, count: int) -> None:
        for _ in range(count):
            if head >= self.size:
                raise UsageError(f"inflight notes name descriptor {head} of {self.size}")
            entry = self._entry(head)
            self._view[entry] = 0
            (head,) = _HALF.unpack_from(self._view, entry + _ENTRY_NEXT)

    @staticmethod
    def _entry(head: int) -> int:
        return _QUEUE.size + head * _ENTRY.size


def _stride(queue_size: int) -> int:
    """Bytes from one queue's part to the next; on cache lines of their own."""
    return -(-(_QUEUE.size + queue_size * _ENTRY.size) // _ALIGN) * _ALIGN
