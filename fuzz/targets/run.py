"""The device's side of a split ring by address, over memory that a hostile driver writes.

A `Run` says where buffers are in numbers, which nobody checks again; so each number is compared
with what stands in the descriptor, and with the memory that there is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from fuzz.inputs import Input
from fuzz.targets.ring import AVAIL, BAD, DESC, MEMORY, USED, _Life
from vq.errors import DriverError
from vq.ring_run import Run
from vq.split_ring import Chain


def run(data: bytes) -> None:
    """Plays one driver's life against a `Run` and its ring, and one more that behaves."""
    _ByAddress(Input(data)).live()


class _ByAddress(_Life):
    def __init__(self, source: Input) -> None:
        self.writable = source.chance(2)
        super().__init__(source)
        self.run = Run(self.ring, writable=self.writable)
        self.run_places: dict[int, int] = {}  # in the available ring, by head
        self.markers: dict[int, Chain] = {}  # what stands in `popped` for what the run holds

    def steps(self) -> Sequence[Callable[[], None]]:
        """What can happen next, here with buffers of the usual kind more often."""
        return (
            *super().steps(),
            *(self.offer_usual, self.offer_usual, self.take, self.take, self.give_back_some),
            *(self.to_chains, self.adopt),
        )

    def act(self) -> None:
        """Does what the bytes say; what is held at the end goes back as chains."""
        super().act()
        self.to_chains()

    def offer_usual(self) -> None:
        """Some chains of one buffer each, all in one region, all of the wanted kind."""
        source = self.source
        first, odd = source.below(self.size), source.chance(8)
        for number in range(min(self.size, source.pick((1, 2, 4, 16)))):
            head = (first + number * (3 if odd else 1)) % self.size
            flags = 2 if self.writable != source.chance(64) else 0
            self._describe(head, 0x2000 + 0x80 * number, 0x40 + source.below(3), flags, 0)
            self._make_available(head)

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
        before = list(self.run.heads)
        try:
            count = self.run.pop(self.source.pick((1, 3, 64)))
        except DriverError as error:
            assert error.section, "an error without its section"
            self.popped.append(BAD)
            return
        run = self.run
        assert list(run.heads[: len(before)]) == before and len(run.heads) == len(before) + count
        assert len(run.addresses) == len(run.lengths) == len(run.heads)
        held = {chain.head for chain in self.held} | set(before)
        for index in range(len(before), len(run.heads)):
            head = run.heads[index]
            position = self.ring.next_avail - len(run.heads) + index
            slot = AVAIL + 4 + 2 * (position % self.size)
            assert head == int.from_bytes(MEMORY.read(slot, 2), "little"), "not what was offered"
            assert head not in held and head < self.size, "a chain given out twice"
            held.add(head)
            self.run_places[head] = position
            self.markers[head] = Chain(head, (), ())
            self.popped.append(self.markers[head])
            gpa, length, flags, _ = struct.unpack("<QIHH", MEMORY.read(DESC + 16 * head, 16))
            assert flags == (2 if self.writable else 0) and length == run.lengths[index]
            assert length >= run.shortest > 0
            region = next(r for r in MEMORY.regions if r.gpa <= gpa < r.gpa + r.size)
            assert gpa + length <= region.gpa + region.size, "a buffer beyond its region"
            assert run.addresses[index] == region.address + gpa - region.gpa, "another place"

    def give_back_some(self) -> None:
        """Fills the first buffers of the run and gives them back."""
        run = self.run
        count = self.source.below(len(run.heads) + 1)
        heads = run.heads[:count]
        written = [min(length, self.source.u8) for length in run.lengths[:count]]
        if not self.writable:
            written = [0] * count
        for index, length in enumerate(written):
            view = run.view(index)
            assert len(view) == run.lengths[index]
            base = next(r for r in MEMORY.regions if 0 <= run.addresses[index] - r.address < r.size)
            gpa = base.gpa + run.addresses[index] - base.address
            if gpa >= 0x2000:  # not the ring itself
                view[:length] = b"\xdd" * length
                self.expect(gpa, bytes(view[:length]))
        first = self.ring.next_used
        run.give_back(written)
        self.given += count
        for index in range(count):
            slot = USED + 4 + 8 * ((first + index) % self.size)
            element = struct.unpack("<II", MEMORY.read(slot, 8))
            assert element == (heads[index], written[index]), "another used element"

    def to_chains(self) -> None:
        """Goes over to chains."""
        chains = self.run.to_chains()
        assert not self.run.heads
        for chain in chains:
            self.places[id(chain)] = self.run_places.pop(chain.head)
            self.popped[self.popped.index(self.markers[chain.head])] = chain
        self.held += chains
        self.kept += chains

    def adopt(self) -> None:
        """The way back."""
        chains = self.held
        if not self.run.heads and self.run.adopt(chains):
            for chain in chains:
                self.run_places[chain.head] = self.places.get(id(chain), 0)
                self.markers[chain.head] = Chain(chain.head, (), ())
                self.popped[self.popped.index(chain)] = self.markers[chain.head]
            self.held = []
