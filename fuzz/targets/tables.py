"""Chains in indirect tables, by address, over memory that a hostile driver writes.

A `TableRun` says where buffers are in numbers, which nobody checks again; so each number is
compared with what stands in the tables, and with the memory that there is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from fuzz.inputs import Input
from fuzz.targets.ring import AVAIL, BAD, BUFFERS, DESC, MEMORY, USED, _Life
from vq.abi import DESC_F_INDIRECT, DESC_F_NEXT, Feature
from vq.errors import DriverError
from vq.ring_run import TableRun
from vq.split_ring import Chain

_TABLES, _EACH = 0x3000, 0x100
_OTHER_REGION = 0x5800
_PLACES = (_TABLES, _TABLES, _TABLES, _OTHER_REGION, 0x10800)


def run(data: bytes) -> None:
    """Plays one driver's life against a `TableRun` and its ring, and one more that behaves."""
    _InTables(Input(data)).live()


class _InTables(_Life):
    def __init__(self, source: Input) -> None:
        super().__init__(source)
        self.run = TableRun(self.ring)
        self.run_places: list[int] = []  # in the available ring, of what the run holds
        self.markers: list[Chain] = []  # what stands in `popped` for that

    def steps(self) -> Sequence[Callable[[], None]]:
        """What can happen next, here with usual tables more often."""
        return (
            *super().steps(),
            *(self.offer_tables,) * 6,
            *(self.take,) * 4,
            *(self.give_back_some, self.give_back_some, self.to_chains),
        )

    def act(self) -> None:
        """Does what the bytes say; what is held at the end goes back as chains."""
        super().act()
        self.to_chains()

    def offer_tables(self) -> None:
        """Some chains, each in a table of its own or of one buffer, mostly all in one region."""
        source = self.source
        first, base = source.below(self.size), source.pick(_PLACES)
        for number in range(min(self.size, source.pick((1, 2, 4, 16)))):
            head = (first + number) % self.size
            if source.chance(8):
                self._describe(head, BUFFERS + 0x40 * number, 1 + source.u8, 0, 0)
            else:
                self._offer_table(head, base + _EACH // 2 * number % 0x700)
            self._make_available(head)

    def _offer_table(self, head: int, place: int) -> None:
        source = self.source
        count = source.pick((1, 2, 3, 5, self.size, self.size + 1)) % 18 or 1
        length = 16 * count
        entries = []
        for index in range(count):
            flags, following = (DESC_F_NEXT, index + 1) if index < count - 1 else (0, 0)
            address, size = (place & 0xF000) + 0x400 + 16 * index, 1 + source.below(64)
            if source.chance(64):
                flags ^= source.pick((1, 2, 4, 0x8000))
                following ^= source.pick((0, 1, 3))
            if source.chance(64):
                address = source.pick((0x4FFF, 0x5000, 0x8000, 0x10000, 0x11FFF, (1 << 64) - 8))
                size = source.pick((0, 1, 2, 16, 0xFFFFFFFF))
            entries.append(struct.pack("<QIHH", address, size, flags, following))
        self._write(place, b"".join(entries))
        flags = DESC_F_INDIRECT
        if source.chance(64):
            length += source.pick((1, 8, 16, -length, -16, 0x1000))
            flags |= source.pick((0, 0, 1, 2, 0x8000))
        self._describe(head, place, length, flags, source.pick((0, 0, 1)))

    # What a device can do.

    def pop(self) -> None:
        """A run must be given up before chains are popped."""
        self.to_chains()
        super().pop()

    def put_back(self) -> None:
        """Likewise: what was popped last is in the run."""
        self.to_chains()
        super().put_back()

    def take(self) -> None:
        """Takes chains into the run, and reads in the rings what it should have taken."""
        run, held = self.run, bool(self.run)
        position = self.ring.next_avail
        try:
            count = run.pop(self.source.pick((1, 3, 64)))
        except DriverError as error:
            assert error.section, "an error without its section"
            self.popped.append(BAD)
            return
        if held:
            assert not count, "more on top of what is held"
            return
        assert count == len(run) == len(run.heads) == len(run.counts) == len(run.sizes)
        assert len(run.vectors) == 2 * sum(run.counts) <= 2 * run.most_pieces
        in_use = {chain.head for chain in self.held}
        numbers = zip(run.vectors[::2], run.vectors[1::2], strict=True)
        for head, pieces, size in zip(run.heads, run.counts, run.sizes, strict=True):
            slot = AVAIL + 4 + 2 * (position % self.size)
            assert head == int.from_bytes(MEMORY.read(slot, 2), "little"), "not what was offered"
            assert head < self.size and head not in in_use, "a chain given out twice"
            in_use.add(head)
            self.run_places.append(position)
            self.markers.append(Chain(head, (), ()))
            position += 1
            buffers = list(self._buffers(head))
            assert len(buffers) == pieces
            assert sum(length for _, length in buffers) == size <= 1 << 32
            for gpa, length in buffers:
                region = next(r for r in MEMORY.regions if r.gpa <= gpa < r.gpa + r.size)
                assert 0 < length <= region.gpa + region.size - gpa, "a buffer beyond its region"
                assert run.base == region.address, "more than one region"
                assert next(numbers) == (region.address + gpa - region.gpa, length), "elsewhere"
        self.popped += self.markers

    def _buffers(self, head: int) -> Iterator[tuple[int, int]]:
        """The buffers of a chain that a run may take, as they stand in memory."""
        gpa, length, flags, _ = struct.unpack("<QIHH", MEMORY.read(DESC + 16 * head, 16))
        if not flags:
            yield gpa, length
            return
        assert flags == DESC_F_INDIRECT and self.features >> Feature.INDIRECT_DESC & 1
        assert length and length % 16 == 0 and length // 16 <= self.size
        table = struct.iter_unpack("<QIHH", MEMORY.read(gpa, length))
        for index, (buffer, size, kind, following) in enumerate(table):
            last = index == length // 16 - 1
            assert kind == (0 if last else DESC_F_NEXT) and (last or following == index + 1)
            yield buffer, size

    def give_back_some(self) -> None:
        """Gives the first chains of the run back."""
        run, count = self.run, self.source.below(len(self.run) + 1)
        heads, first = run.heads[:count], self.ring.next_used
        run.give_back(count)
        self.given += count
        del self.run_places[:count], self.markers[:count]
        for index, head in enumerate(heads):
            slot = USED + 4 + 8 * ((first + index) % self.size)
            element = struct.unpack("<II", MEMORY.read(slot, 8))
            assert element == (head, 0), "another used element"

    def to_chains(self) -> None:
        """Goes over to chains."""
        run = self.run
        rows, numbers = [], zip(run.vectors[::2], run.vectors[1::2], strict=True)
        for count in run.counts:
            rows.append([next(numbers) for _ in range(count)])
        base, memory = run.base, run.memory
        chains = run.to_chains()
        assert not (run or run.counts or run.sizes or run.vectors)
        assert len(chains) == len(self.markers)
        for chain, marker, place, row in zip(
            chains, self.markers, self.run_places, rows, strict=True
        ):
            assert chain.head == marker.head and not chain.writable
            assert [bytes(view) for view in chain.readable] == [
                bytes(memory[address - base : address - base + length]) for address, length in row
            ]
            self.places[id(chain)] = place
            index = next(n for n, popped in enumerate(self.popped) if popped is marker)
            self.popped[index] = chain
        self.run_places.clear()
        self.markers.clear()
        self.held += chains
        self.kept += chains
