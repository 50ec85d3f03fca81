"""Frames that a guest sends: from chains of its transmit queue to frames for a link.

`FrameMaker` copies each frame's net header out of guest memory, checks it against what the guest
negotiated and against the frame, and does in software what the link does not (virtio 1.3,
5.1.6.2). The frame's bytes are not copied: the link writes them straight out of guest memory.

Where the link has an outbox there are two shorter ways, for many frames at a time. Short frames
that leave nothing undone are copied, which costs less than to look at each in its place
(`send_plain`). Frames in several pieces are sent by address (`send_in_place`): their headers are
copied and checked, and all else is the kernel's to fetch.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from vq.abi import NET_HDR_SIZE
from vq.errors import DriverError
from vq.lanes import total
from vq.link import MAX_FRAME, MOST_AT_ONCE, MOST_PIECES, START_ROOM, Frame, Link, Outbox
from vq.offload import Offload
from vq.packet import Buffer, copy_range, cut
from vq.ring_row import Row
from vq.ring_run import Run, TableRun
from vq.software import (
    MOST_OF_START,
    PLAIN_HEADER,
    HeaderLie,
    UsualStarts,
    check_frame,
    finish,
)
from vq.split_ring import Chain

__all__ = ["Burst", "FrameMaker", "Responder"]

Responder: TypeAlias = Callable[[Sequence[Buffer]], bytes | None]
"""Is shown a frame from the guest, and gives the whole frame that answers it, or None.

The pieces are views of guest memory, whose bytes may change between two looks at them.
"""
_DETOUR = 64
"""Bursts that go the plain way before the short one is tried again."""
_ETHERNET = 14
# What is sent in place fits an outbox: a frame has a start, and by that a piece more than a chain.
assert MOST_OF_START <= START_ROOM and TableRun.most_pieces + MOST_AT_ONCE <= MOST_PIECES
_MAX_FRAMES = 1024
"""Frames of one burst, unless one chain alone makes more. Segments cut in software count: a guest
must not have tens of thousands of them made in one go."""
_NO_FIELDS = memoryview(bytes(4 * MOST_AT_ONCE)).cast("I")
_LONGEST = NET_HDR_SIZE + MAX_FRAME
_COPY = [struct.Struct(f"{size}s").unpack_from for size in range(MOST_OF_START + 1)]
"""What copies so many bytes out of a buffer, quicker than to cut it."""
_NOTHING_UNDONE = b"\0\0"  # flags and gso_type: the other fields have no meaning then


class Burst:
    """A burst of chains turned into frames."""

    __slots__ = ("answers", "dropped", "fault", "frames", "left", "owners", "size")

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.owners: list[Chain | None] = []
        """For each frame the chain that is done with it: None for all but the last segment."""
        self.dropped: list[Chain] = []
        """Chains of which nothing goes to the link."""
        self.size = 0
        """Bytes in the frames, net headers not counted."""
        self.answers: list[bytes] = []
        """Frames for the guest, from responders."""
        self.fault: DriverError | None = None
        """A rule that a chain broke, to be raised once the others are dealt with."""
        self.left: Sequence[Chain] = ()
        """The last of the chains, not looked at: the frames of those before were enough."""


class FrameMaker:
    """Makes frames for a link out of one device's chains.

    `allowed` is what the guest may leave undone; `link` says what it takes undone. With
    `locked_mac` only frames from that address pass. `responders` are asked in turn about every
    frame; one that is answered does not go to the link. `stats` counts ``tx_dropped: reason`` and
    ``tx_answered``.
    """

    def __init__(self, link: Link, *, responders: Sequence[Responder], stats: Counter[str]) -> None:
        self.allowed = Offload.NONE
        self.locked_mac: bytes | None = None
        self._link = link
        self._responders = tuple(responders)
        self._stats = stats
        self._judged = (Offload.NONE, Offload.NONE, False)
        self._usual_starts = UsualStarts(int(Offload.NONE))  # for what is judged
        self._detour = self._place_detour = 0  # bursts for which the plain way is kept to

    def takes_short_way(self) -> bool:
        """Whether `send_plain` is worth a try: not soon again where it was not."""
        self._detour -= 1
        return self._detour < 0

    def send_plain(self, run: Run, outbox: Outbox) -> int:
        """Sends the frames of a run, if all are short and leave nothing undone, and nobody has to
        look at them; returns how many the link has dealt with.

        0 leaves them to `make`, whatever the reason. Raises `OSError` when the link is gone.
        """
        lengths = run.lengths
        self._detour = _DETOUR  # until all goes well
        if (
            not run
            or not self._may_copy(run.shortest)
            or (size := total(lengths)) > outbox.most_bytes
        ):
            return 0
        try:
            headers = outbox.take(run.addresses, lengths, size)
        except OSError:  # memory that is not there
            return 0
        # Flags, gso_type and hdr_len: the other fields have no meaning where nothing is undone.
        # hdr_len has none either then, but a tap may refuse it.
        if headers != _NO_FIELDS[: len(lengths)]:
            return 0
        self._detour = 0
        sent = outbox.send(lengths)
        self._stats["tx_frames"] += sent
        done = size if sent == len(lengths) else sum(lengths[:sent])
        self._stats["tx_bytes"] += done - NET_HDR_SIZE * sent
        return sent

    def send_alike(self, row: Row, outbox: Outbox) -> int:
        """`send_plain` for frames that are all of the same length."""
        count, length = row.count, row.length
        size = count * length
        self._detour = _DETOUR  # until all goes well
        if not self._may_copy(length) or size > outbox.most_bytes:
            return 0
        try:
            headers = outbox.take_alike(row.vectors, count, length)
        except OSError:  # memory that is not there
            return 0
        if headers != _NO_FIELDS[:count]:
            return 0
        self._detour = 0
        sent = outbox.send_alike(count, length)
        self._stats["tx_frames"] += sent
        self._stats["tx_bytes"] += (length - NET_HDR_SIZE) * sent
        return sent

    def _may_copy(self, shortest: int) -> bool:
        """Whether frames need not be looked at by anybody, and none is too short."""
        return (
            not self._responders
            and self.locked_mac is None
            and shortest > NET_HDR_SIZE
            and shortest >= NET_HDR_SIZE + self._link.min_frame
        )

    def takes_place_way(self) -> bool:
        """Whether `send_in_place` is worth a try: not soon again where it was not."""
        self._place_detour -= 1
        return self._place_detour < 0 and not self._responders and self.locked_mac is None

    def send_in_place(self, run: TableRun, outbox: Outbox) -> int:
        """Sends the first frames of a run, as far as they are usual ones; returns how many the link
        has dealt with.

        The others are left to `make`. Raises `OSError` when the link is gone.
        """
        self._place_detour = _DETOUR  # unless there is one
        if not run.heads or not self._link_does_all():
            return 0
        memory, base, checked = run.memory, run.base, self._usual_starts.checked
        shortest = max(self._link.min_frame, _ETHERNET) + NET_HDR_SIZE
        vectors, counts = run.vectors[:], run.counts[:MOST_AT_ONCE]
        starts: list[bytes] = []
        place, at = outbox.starts_address, 0
        for index, size in enumerate(run.sizes[:MOST_AT_ONCE]):
            address, first = vectors[at], vectors[at + 1]
            if first < NET_HDR_SIZE or not shortest <= size <= _LONGEST:
                break
            replaced = first if first < MOST_OF_START else MOST_OF_START
            (copy,) = _COPY[replaced](memory, address - base)
            start = checked(copy, size - NET_HDR_SIZE)
            if start is None:
                break
            starts.append(start)
            vectors[at] = place
            if replaced < first:
                rest = array("Q", (replaced, address + replaced, first - replaced))
                vectors[at + 1 : at + 2] = rest
                counts[index] += 1
            at += 2 * counts[index]
            place += replaced
        count = len(starts)
        if not count:
            return 0
        self._place_detour = 0
        private = b"".join(starts)
        outbox.starts[: len(private)] = private
        sent = outbox.send_in_place(vectors[:at], counts[:count])
        self._stats["tx_frames"] += sent
        self._stats["tx_bytes"] += sum(run.sizes[:sent]) - NET_HDR_SIZE * sent
        return sent

    def plain(self, chain: Chain) -> Frame | None:
        """A chain's frame, if it leaves nothing undone and nobody has to look at it.

        Else it is for `make`, whatever the reason.
        """
        pieces = chain.readable
        if chain.writable or not pieces or self._responders or self.locked_mac is not None:
            return None
        first = pieces[0]
        # Nothing of the header is used: the link gets one of ours, which leaves nothing undone.
        if len(first) <= NET_HDR_SIZE or first[0] or first[1]:  # flags, gso_type
            return None
        if len(pieces) == 1:
            return [PLAIN_HEADER, first[NET_HDR_SIZE:]]
        return [PLAIN_HEADER, first[NET_HDR_SIZE:], *pieces[1:]]

    def make(self, queue: str, chains: Sequence[Chain]) -> Burst:
        """The frames in `chains`, which are of the queue of this name, and what became of others.

        A chain that is no frame at all comes back in `dropped`, with a `fault`.
        """
        burst = Burst()
        frames, owners = burst.frames, burst.owners
        locked = self.locked_mac is not None
        responders = self._responders
        as_it_is = not locked and not responders
        for chain in chains:
            pieces = chain.readable
            if chain.writable or not pieces:
                _misfit(burst, queue, chain)
                continue
            first = pieces[0]
            if as_it_is and len(first) > NET_HDR_SIZE and not (first[0] or first[1]):
                # As `plain` has it, which would cost as much again for each of many.
                frames.append(
                    [PLAIN_HEADER, first[NET_HDR_SIZE:]]
                    if len(pieces) == 1
                    else [PLAIN_HEADER, first[NET_HDR_SIZE:], *pieces[1:]]
                )
                owners.append(chain)
                burst.size += (
                    len(first) if len(pieces) == 1 else chain.readable_size
                ) - NET_HDR_SIZE
                continue
            # The header is copied before it is looked at: what is checked is what is used.
            if len(first) > NET_HDR_SIZE:
                header = bytes(first[:NET_HDR_SIZE])
                frame: Frame = [header, first[NET_HDR_SIZE:], *pieces[1:]]
            elif len(first) == NET_HDR_SIZE:
                header = bytes(first)
                frame = [header, *pieces[1:]]
            else:  # the header may lie over descriptors in any way (virtio 1.3, 2.7.4.1)
                header = copy_range(pieces, 0, NET_HDR_SIZE)
                if len(header) < NET_HDR_SIZE:
                    _misfit(burst, queue, chain)
                    continue
                frame = [header, *cut(pieces, NET_HDR_SIZE)]
            if locked and not self._lock_source(frame):
                self._drop(burst, chain, "source address")
            elif header.startswith(_NOTHING_UNDONE):
                if responders and self._answered(burst, chain, frame):
                    continue
                frame[0] = PLAIN_HEADER
                frames.append(frame)
                owners.append(chain)
                burst.size += chain.readable_size - NET_HDR_SIZE
            else:
                self._take_undone(burst, chain, frame)
                if len(frames) > _MAX_FRAMES:
                    burst.left = chains[chains.index(chain) + 1 :]
                    break
        return burst

    def _take_undone(self, burst: Burst, chain: Chain, frame: Frame) -> None:
        """Checks a frame that leaves work undone, and does the part that the link does not do."""
        size = sum(map(len, frame)) - NET_HDR_SIZE
        if size > MAX_FRAME:  # a chain may name 4 GiB, and the work is done before a link refuses
            self._drop(burst, chain, "too long")
            return
        try:
            checked = check_frame(frame, size, self.allowed)
            if self._responders and self._answered(burst, chain, checked):
                return
            if self._link_does_all():
                burst.frames.append(checked)
                burst.owners.append(chain)
                burst.size += size
                return
            finished = finish(checked, self._link.accepts)
        except HeaderLie as lie:
            self._drop(burst, chain, lie.reason)
            return
        burst.frames += finished
        burst.size += sum(sum(map(len, segment)) - NET_HDR_SIZE for segment in finished)
        burst.owners += [None] * (len(finished) - 1)
        burst.owners.append(chain)

    def _link_does_all(self) -> bool:
        """Whether the link takes undone all that the guest may leave undone."""
        judged = self._judged  # to compare flags costs more than all the rest
        if judged[0] is not self.allowed or judged[1] is not self._link.accepts:
            allowed, accepts = self.allowed, self._link.accepts
            self._judged = judged = (allowed, accepts, not allowed & ~accepts)
            self._usual_starts = UsualStarts(int(allowed))
        return judged[2]

    def _answered(self, burst: Burst, chain: Chain, frame: Frame) -> bool:
        """Whether a responder answers a frame; then that is all that becomes of it."""
        for responder in self._responders:
            answer = responder(frame[1:])
            if answer is not None:
                self._stats["tx_answered"] += 1
                burst.answers.append(answer)
                burst.dropped.append(chain)
                return True
        return False

    def _lock_source(self, frame: Frame) -> bool:
        """Whether the frame has the right source; its Ethernet header becomes private for that."""
        start = copy_range(frame[1:], 0, _ETHERNET)
        frame[1:] = [start, *cut(frame[1:], len(start))]
        return start[6:12] == self.locked_mac

    def _drop(self, burst: Burst, chain: Chain, reason: str) -> None:
        self._stats["tx_dropped: " + reason] += 1
        burst.dropped.append(chain)


def _misfit(burst: Burst, queue: str, chain: Chain) -> None:
    """A chain that is no frame: it goes back, and the device will need a reset."""
    burst.dropped.append(chain)
    if burst.fault is not None:
        return  # the first one is told
    burst.fault = DriverError(
        "a writable buffer in a transmit queue"
        if chain.writable
        else f"a frame of {chain.readable_size} bytes, without a whole net header",
        queue=queue,
        head=chain.head,
        section="5.1.6.2",
    )
