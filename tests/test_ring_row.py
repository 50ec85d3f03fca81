"""Chains of a split ring that are all alike, against what `pop_burst` makes of the same rings."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_guest import (
    BUFFERS,
    HOLE,
    IN_ORDER,
    INDIRECT,
    LAYOUT,
    NEXT,
    SEAM,
    TABLE,
    THIRD,
    TOP,
    WRITE,
    Guest,
    Notes,
    fill_singles,
    needs_vectors,
)

from vq import ring_row
from vq.errors import DriverError
from vq.memory import DirtyLog, GuestMemory, address_of
from vq.ring_row import Row
from vq.split_ring import SplitRing

pytestmark = needs_vectors


@pytest.fixture(autouse=True)
def without_detours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_row, "_DETOUR", 0)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


@pytest.fixture
def guest(memory: GuestMemory) -> Guest:
    guest = Guest(memory)
    fill_singles(guest, flags=0)
    return guest


def look(row: Row, ring: SplitRing, limit: int = 100) -> int:
    return row.look(ring.waiting(), limit)


def places(row: Row) -> list[tuple[int, int]]:
    """Where the buffers are, host-virtual, and their lengths, as a system call would read it."""
    return list(struct.iter_unpack("@PN", row.vectors))


@settings(max_examples=500, deadline=None)
@given(
    usual=st.lists(st.integers(0x100, 0x7F00), min_size=8, max_size=8),
    length=st.sampled_from((1, 0x10, 0x100, 0x4000)),
    odd_ones=st.dictionaries(
        st.integers(0, 7),
        st.tuples(
            st.sampled_from(
                (0, 0xFFF, 0x7FFF, 0x8000, 0x9000, HOLE, THIRD, 1 << 63, TOP - 16, TOP - 1)
            )
            | st.integers(0, TOP - 1),
            st.sampled_from((None, None, 0, 1, 0x11, 0xFFFFFFFF)),
            st.sampled_from((0, 0, WRITE, NEXT, TABLE, 0x8000)),
        ),
        max_size=2,
    ),
    following=st.lists(st.sampled_from((0, 1, 0xFFFF)), min_size=8, max_size=8),
    first=st.integers(0, 8),
    heads=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=8),
    start=st.sampled_from((0, 3, 0xFFFE)),
    limit=st.integers(1, 9),
    use=st.integers(0, 8),
    features=st.sampled_from((0, INDIRECT, IN_ORDER)),
)
def test_a_row_is_of_what_would_come_as_chains(
    usual: list[int],
    length: int,
    odd_ones: dict[int, tuple[int, int | None, int]],
    following: list[int],
    first: int,
    heads: list[int] | None,
    start: int,
    limit: int,
    use: int,
    features: int,
) -> None:
    """With the same buffers, given back in the same way; the others come as chains afterwards."""
    with GuestMemory.allocate(*LAYOUT) as memory:
        guest = Guest(memory, start=start)
        for index, address in enumerate(usual):
            gpa, odd_length, flags = odd_ones.get(index, (address, None, 0))
            fields = gpa, length if odd_length is None else odd_length, flags
            guest.desc(index, *fields, following[index])
        guest.offer(*(heads or range(first, 8) or (0,)))
        rings = guest.ring(features), guest.ring(features)
        row = Row(rings[0])
        count = look(row, rings[0], limit)
        assert count == len(row) <= limit
        assert rings[0].outstanding == 0 and rings[0].next_avail == start, "nothing is taken"
        if not count:
            assert not isinstance(heads, type(None)) or odd_ones or max(usual) + length > SEAM
            return
        chains = rings[1].pop_burst(count)
        assert [len(chain.readable) for chain in chains] == [1] * count
        assert not any(chain.writable for chain in chains)
        assert places(row) == [
            (address_of(chain.readable[0]), row.length) for chain in chains
        ] and all(chain.readable_size == row.length for chain in chains)
        use = min(use, count)
        row.give_back(use)
        assert rings[0].publish() == use and guest.used() == [(c.head, 0) for c in chains[:use]]
        assert rings[0].next_avail == (start + use) & 0xFFFF == rings[0].next_used
        rest = rings[0].pop_burst(count - use) if use < count else []
        assert [chain.head for chain in rest] == [chain.head for chain in chains[use:]]


@pytest.mark.parametrize("at", [0, 1, 3, 6, 7])
@pytest.mark.parametrize(
    "odd",
    [
        (0x8000, 16, 0),  # in another region
        (0x7FF1, 16, 0),  # over the region's end
        (0x0FFF, 16, 0),
        (0, 16, 0),
        (TOP - 8, 16, 0),  # wraps around
        ((1 << 63) + 0x1000, 16, 0),
        (0x101000, 16, 0),
        (0x2000, 0, 0),
        (0x2000, 15, 0),
        (0x2000, 17, 0),
        (0x2000, 0x80000010, 0),
        (0x2000, 16, WRITE),
        (0x2000, 16, NEXT),
        (0x2000, 16, TABLE),
        (0x2000, 16, 0x8000),
    ],
)
def test_one_odd_buffer_keeps_a_row_from_being_one(odd: tuple[int, int, int], at: int) -> None:
    """Wherever it stands; here nothing else is wrong, and what stands beside it is at the edges."""
    with GuestMemory.allocate((0x1000, 0x7000), (0x8000, 0x1000), (0x10000, 0x1000)) as memory:
        guest = Guest(memory, places=(0x10000, 0x10100, 0x10200))
        for head in range(8):
            guest.desc(head, 0x7FF0 if head % 2 else 0x1000, 16, 0, 0xFFFF if head % 3 else 0)
        ring = guest.ring()
        row = Row(ring)
        guest.offer(*range(8))
        assert look(row, ring) == 8
        guest.desc(at, *odd)
        assert look(row, ring) == len(row) == 0
        guest.desc(at, 0x1000, 16)
        assert look(row, ring) == 8


def test_rows_are_found_in_any_region_again_and_again(guest: Guest) -> None:
    """At the region's very ends, too, and at the end of all addresses."""
    ring = guest.ring()
    row = Row(ring)
    for gpa in (THIRD, BUFFERS, TOP - 0x10000, SEAM, THIRD):
        for head, place in enumerate((gpa, gpa & ~0xFFFF, gpa | 0xFFF0, gpa)):
            guest.desc(head, place, 16)
        guest.offer(0, 1, 2, 3)
        assert look(row, ring) == 4
        base = guest.memory.hvaddr(gpa & ~0xFFFF)
        offsets = [gpa & 0xFFFF, 0, 0xFFF0, gpa & 0xFFFF]
        assert places(row) == [(base + offset, 16) for offset in offsets]
        row.give_back(4)
        ring.publish()
    guest.desc(4, HOLE, 16)
    guest.offer(4)
    assert look(row, ring) == 0
    with pytest.raises(DriverError, match="not in the guest's memory"):
        ring.pop_burst(8)


def test_the_same_row_of_another_guest_is_in_its_own_memory(guest: Guest) -> None:
    """What is remembered of a row holds for one region: here are the same bytes as descriptors, but
    regions at another place, with less room, and with another start."""
    guest.desc(0, THIRD, 16)
    guest.desc(1, THIRD + 0xFFF0, 16)
    guest.offer(0, 1)
    ring = guest.ring()
    assert look(Row(ring), ring) == 2
    for region, most in (((THIRD, 0x10000), 2), ((THIRD, 0xF000), 0), ((THIRD + 16, 0xFFF0), 0)):
        with GuestMemory.allocate((0, 0x10000), region) as memory:
            other = Guest(memory)
            other.desc(0, THIRD, 16)
            other.desc(1, THIRD + 0xFFF0, 16)
            other.offer(0, 1)
            ring = other.ring()
            row = Row(ring)
            assert look(row, ring) == most
            if most:
                base = memory.hvaddr(THIRD)
                assert base != guest.memory.hvaddr(THIRD)
                assert places(row) == [(base, 16), (base + 0xFFF0, 16)]


def test_a_row_may_fill_its_region_and_no_more(guest: Guest) -> None:
    ring = guest.ring()
    row = Row(ring)
    guest.desc(0, THIRD, 0x10000)
    guest.offer(0)
    assert look(row, ring) == 1 and row.length == 0x10000
    guest.desc(0, THIRD, 0x10001)
    assert look(row, ring) == 0


def test_there_is_no_row_of_empty_buffers(guest: Guest) -> None:
    """They are alike, too, but chains have none of them, and the kernel is shown none."""
    fill_singles(guest, flags=0, length=0)
    guest.offer(0, 1, 2)
    ring = guest.ring()
    assert look(Row(ring), ring) == 0
    assert [chain.readable_size for chain in ring.pop_burst(3)] == [0, 0, 0]


def test_what_is_used_of_a_row_is_what_was_looked_at(guest: Guest) -> None:
    """A driver may write to its descriptors at any time."""
    ring = guest.ring()
    row = Row(ring)
    guest.offer(2, 3, 4)
    assert look(row, ring) == 3
    before = places(row)
    fill_singles(guest, flags=WRITE, length=0xFFFF)
    guest.memory.write(guest.places[1] + 4, bytes(16))
    assert places(row) == before and row.length == 16
    row.give_back(2)
    assert len(row) == 0, "what was not given back is left to another look"
    ring.publish()
    assert guest.used() == [(2, 0), (3, 0)]


def test_used_elements_go_round_the_end_of_the_ring(guest: Guest) -> None:
    """Their place is another than the entries' own, where chains were given back out of order."""
    ring = guest.ring()
    row = Row(ring)
    guest.offer(0, 1, 2, 3, 4, 5)
    kept, *others = ring.pop_burst(6)
    ring.push_burst(others)
    assert [head for head, _ in guest.used()] == [1, 2, 3, 4, 5]
    guest.offer(3, 4, 5, 6)
    assert look(row, ring) == 2, "as far as the entries lie side by side"
    row.give_back(2)
    assert look(row, ring) == 2
    row.give_back(2)
    ring.publish()
    assert guest.used() == [(3, 0), (4, 0), (5, 0), (6, 0)]
    ring.push_burst([kept])
    assert guest.used() == [(0, 0)]
    guest.offer(1, 2, 3, 4, 5)
    assert look(row, ring) == 5
    row.give_back(5)
    ring.publish()
    assert guest.used() == [(head, 0) for head in (1, 2, 3, 4, 5)]


def test_the_used_ring_is_marked_dirty_and_the_buffers_are_not() -> None:
    with GuestMemory.allocate((0, 0x10000)) as memory:
        guest = Guest(memory)
        fill_singles(guest, flags=0)
        bitmap = bytearray(2)
        memory.dirty_log = DirtyLog(bitmap)
        ring = guest.ring()
        row = Row(ring)
        guest.offer(0, 1)
        bitmap[:] = bytes(2)
        assert look(row, ring) == 2
        row.give_back(2)
        ring.publish()
        assert bitmap == bytes([1 << 3, 0])


def test_there_is_no_row_where_a_log_is_kept(guest: Guest) -> None:
    """It is told what the device has before anything is done with it."""
    ring = guest.ring(inflight_log=Notes(guest))
    guest.offer(0, 1)
    assert look(Row(ring), ring) == 0


@pytest.mark.parametrize("head", [1, 2, 3])
def test_no_head_of_a_row_is_in_use(guest: Guest, head: int) -> None:
    ring = guest.ring()
    row = Row(ring)
    guest.offer(head)
    assert len(ring.pop_burst(1)) == 1
    guest.offer(1, 2, 3)
    assert look(row, ring) == 0
    with pytest.raises(DriverError, match="in use"):
        for _ in range(2):
            ring.pop_burst(8)


def test_a_row_does_not_overtake_chains_from_before(guest: Guest) -> None:
    """Those that were put back, those that an earlier device left, and in order all others."""
    ring = guest.ring()
    row = Row(ring)
    guest.offer(0, 1, 2, 3)
    ring.undo_pop(ring.pop_burst(1))
    assert look(row, ring) == 0
    ring.push_burst(ring.pop_burst(1))
    assert look(row, ring) == 3
    ring = guest.ring(resubmit=[7])
    row = Row(ring)
    assert look(row, ring) == 0
    (left,) = ring.pop_burst(1)
    assert left.head == 7 and look(row, ring) == 4
    ring = guest.ring(IN_ORDER)
    row = Row(ring)
    (oldest,) = ring.pop_burst(1)
    assert look(row, ring) == 0
    ring.write_used(oldest)
    assert look(row, ring) == 3


def test_a_resubmitted_head_may_come_again_in_a_row(guest: Guest) -> None:
    """And then it is one that `next_avail` leads to again."""
    ring = guest.ring(resubmit=[2])
    guest.offer(1, 2, 3)
    (left,) = ring.pop_burst(1)
    ring.push_burst([left])
    row = Row(ring)
    ring._resubmitted.add(2)  # as after an entry that was consumed without a chain
    assert look(row, ring) == 3
    row.give_back(3)
    assert not ring._resubmitted


def test_the_next_bursts_after_one_that_was_not_alike_are_not_looked_at(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look in vain takes time."""
    monkeypatch.setattr(ring_row, "_DETOUR", 3)
    ring = guest.ring()
    row = Row(ring)
    guest.desc(1, BUFFERS, 17)
    guest.offer(0, 1, 2)
    assert look(row, ring) == 0
    ring.push_burst(ring.pop_burst(2))
    assert [look(row, ring) for _ in range(5)] == [0, 0, 0, 1, 1]
