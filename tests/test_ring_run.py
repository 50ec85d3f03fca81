"""Chains of a split ring as columns, against what `pop_burst` makes of the same rings."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_guest import (
    AVAIL,
    BUFFERS,
    DESC,
    EVENT_IDX,
    HOLE,
    IN_ORDER,
    INDIRECT,
    LAYOUT,
    NEXT,
    SEAM,
    TABLE,
    THIRD,
    TOP,
    USED,
    WRITE,
    Guest,
    Notes,
    fill_singles,
)

from vq.errors import AddressError, DriverError
from vq.memory import DirtyLog, GuestMemory, address_of
from vq.ring_run import Run, TableRun
from vq.split_ring import Chain, SplitRing


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


@pytest.fixture
def guest(memory: GuestMemory) -> Guest:
    return Guest(memory)


# --- chains of one buffer ------------------------------------------------------------------------

EDGES = (0, 1, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0x8FFF, 0x9000, 1 << 63, (1 << 64) - 1)


@settings(max_examples=400, deadline=None)
@given(
    descriptors=st.lists(
        st.tuples(
            st.sampled_from(EDGES) | st.integers(0x100, 0x7F00),
            st.sampled_from((0, 1, 0x1000, 0xFFFFFFFF)) | st.integers(1, 0x200),
            st.sampled_from((0, 0, 0, WRITE, WRITE, WRITE, NEXT, TABLE, 0x8000, NEXT | WRITE)),
            st.integers(0, 0xFFFF),
        ),
        min_size=8,
        max_size=8,
    ),
    heads=st.permutations(range(8)) | st.lists(st.integers(0, 9), min_size=1, max_size=8),
    same=st.sampled_from((None, 0, WRITE)),
    start=st.sampled_from((0, 3, 0xFFFE)),
    limit=st.integers(1, 9),
    writable=st.booleans(),
)
def test_a_run_takes_only_what_would_pass_as_chains(
    descriptors: list[tuple[int, int, int, int]],
    heads: list[int],
    same: int | None,
    start: int,
    limit: int,
    writable: bool,
) -> None:
    """And it takes the same buffers; where it takes nothing it leaves no trace."""
    with GuestMemory.allocate((0, 0x8000), (0x8000, 0x1000), (0x10000, 0x1000)) as memory:
        for index, (address, length, flags, following) in enumerate(descriptors):
            fields = address, length, flags if same is None else same, following
            memory.write(0x10000 + 16 * index, struct.pack("<QIHH", *fields))
        for number, head in enumerate(heads):
            slot = (start + number) % 8
            memory.write(0x10100 + 4 + 2 * slot, struct.pack("<H", head))
        memory.store16(0x10102, (start + len(heads)) & 0xFFFF)
        rings = [
            SplitRing(
                memory,
                8,
                0x10000,
                0x10100,
                0x10200,
                features=INDIRECT,
                next_avail=start,
                next_used=start,
            )
            for _ in range(2)
        ]
        run = Run(rings[0], writable=writable)
        count = run.pop(limit)
        assert len(run) == count == rings[0].outstanding <= limit
        assert rings[0].next_avail == (start + count) & 0xFFFF
        if not count:
            return
        chains = rings[1].pop_burst(count)
        assert [chain.head for chain in chains] == run.heads.tolist()
        buffers = [chain.writable if writable else chain.readable for chain in chains]
        assert not any(chain.readable if writable else chain.writable for chain in chains)
        places = [(address_of(views[0]), len(views[0])) for views in buffers if len(views) == 1]
        assert places == list(zip(run.addresses, run.lengths, strict=True))
        assert min(run.lengths) >= run.shortest


@pytest.mark.parametrize("count", [1, 2, 14])
@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize(
    "odd",
    [
        (0x8000, 16, WRITE),  # in another region
        (0x7FF0, 17, WRITE),  # over the region's end
        (0x1000, 0xFFFFFFFF, WRITE),
        (0x0FFF, 16, WRITE),
        ((1 << 64) - 8, 16, WRITE),  # wraps around
        ((1 << 63) + 0x1000, 16, WRITE),
        (0x2000, 0, WRITE),
        (0x2000, 16, 0),
        (0x2000, 16, WRITE | NEXT),
        (0x2000, 16, WRITE | 0x8000),
    ],
)
def test_one_unusual_buffer_keeps_a_run_from_taking_any(
    odd: tuple[int, int, int], at: str, count: int
) -> None:
    """Alone, beside another, and in a crowd; here nothing else is wrong."""
    with GuestMemory.allocate((0x1000, 0x7000), (0x8000, 0x1000), (0x10000, 0x1000)) as memory:
        guest = Guest(memory, size=16)
        guest.places = [0x10000, 0x10100, 0x10200]
        for head in range(16):
            guest.desc(head, 0x1000 + 0x100 * head, 16, WRITE)
        ring = guest.ring()
        run = Run(ring, writable=True)
        guest.offer(0)
        assert run.pop(16) == 1  # what is held is in this region, and so must others be
        guest.desc(1 if at == "first" else count, *odd)
        guest.offer(*range(1, count + 1))
        assert run.pop(16) == 0 and len(run) == len(run.lengths) == ring.outstanding == 1
        guest.desc(1 if at == "first" else count, 0x1000, 16, WRITE)
        assert run.pop(16) == count


def test_usual_chains_are_taken_as_columns(guest: Guest) -> None:
    """The short way is not there in vain: a driver's usual buffers go it, also out of turn."""
    ring = guest.ring()
    for head in range(8):
        guest.desc(head, SEAM - 0x100 - 0x10 * head, 16, WRITE, 5)
    guest.offer(3, 1, 2, 0)
    run = Run(ring, writable=True)
    assert run.pop(3) == 3 and run.heads.tolist() == [3, 1, 2]
    assert run.pop(3) == 1 and run.heads.tolist() == [3, 1, 2, 0]
    assert run.addresses[0] - run.addresses[3] == -0x30
    run.view(1)[:] = b"second in region"
    assert guest.memory.read(SEAM - 0x110, 16) == b"second in region"
    run.give_back([16, 4])
    assert run.heads.tolist() == [2, 0]
    assert ring.publish() == 2 and guest.used() == [(3, 16), (1, 4)]
    assert [chain.head for chain in run.to_chains()] == [2, 0] and not run
    assert ring.outstanding == 2


def test_a_run_may_lie_in_any_region_but_in_one_only(guest: Guest) -> None:
    ring = guest.ring()
    for head, gpa in enumerate((BUFFERS, THIRD, THIRD + 0x100, BUFFERS)):
        guest.desc(head, gpa, 16)
    run = Run(ring, writable=False)
    guest.offer(0)
    assert run.pop(8) == 1
    guest.offer(1, 2)
    assert run.pop(8) == 0  # while the first is held
    run.give_back([0])
    assert run.pop(8) == 2 and bytes(run.memory) == bytes(guest.memory.region_at(THIRD).view)
    guest.offer(3)
    assert run.pop(8) == 0
    assert [chain.head for chain in (*run.to_chains(), *ring.pop_burst(8))] == [1, 2, 3]


def test_what_a_run_wrote_is_marked_dirty() -> None:
    with GuestMemory.allocate((0, 0x10000)) as memory:
        guest = Guest(memory)
        bitmap = bytearray(2)
        memory.dirty_log = DirtyLog(bitmap)
        guest.desc(0, 0x9000, 0x2000, WRITE)
        guest.desc(1, 0xC000, 16, WRITE)
        guest.offer(0, 1)
        run = Run(guest.ring(), writable=True)
        assert run.pop(2) == 2
        bitmap[:] = bytes(2)
        run.give_back([0x1001, 0])
        assert bitmap[1] == 0b0000110


@settings(max_examples=100, deadline=None)
@given(
    heads=st.permutations(range(8)),
    written=st.lists(st.integers(0, 0x300), min_size=1, max_size=7),
    start=st.sampled_from((0, 5, 0xFFFE)),
    resubmitted=st.integers(0, 2),
)
def test_chains_given_back_one_by_one_are_as_those_given_back_together(
    heads: list[int], written: list[int], start: int, resubmitted: int
) -> None:
    def outcome(give_back: Callable[[Run], None]) -> object:
        with GuestMemory.allocate((0, 0x10000)) as memory:
            guest = Guest(memory, start=start)
            memory.dirty_log = DirtyLog(bitmap := bytearray(16), page_size=512)
            notes = Notes(guest)
            for head in range(8):
                guest.desc(head, 0x8000 + 0x400 * head, 0x300, WRITE)
            guest.offer(*heads)
            ring = guest.ring(inflight_log=notes, resubmit=heads[:resubmitted])
            ring._next_avail = (start + resubmitted) & 0xFFFF
            run = Run(ring, writable=True)
            if resubmitted:
                assert run.adopt([ring.pop() for _ in range(resubmitted)])  # type: ignore[misc]
            while run.pop(8):
                pass  # up to where the ring begins anew
            assert len(run) == 8
            bitmap[:] = bytes(16)
            give_back(run)
            count = ring.publish()
            held = run.heads, run.addresses, run.lengths, ring.outstanding, ring.next_avail
            undone = run.to_chains()
            ring.undo_pop(undone)
            position = ring.next_avail, ring.next_used, ring.left_over
            return count, guest.used(), held, bytes(bitmap), notes.calls, position

    def one_by_one(run: Run) -> None:
        for length in written:
            run.give_back_one(length)

    assert outcome(one_by_one) == outcome(lambda run: run.give_back(written))


def test_a_run_stands_in_the_inflight_log() -> None:
    with GuestMemory.allocate((0, 0x10000)) as memory:
        guest = Guest(memory)
        notes = Notes(guest)
        for head in range(3):
            guest.desc(head, 0x9000, 16, WRITE)
        guest.offer(0, 1, 2)
        ring = guest.ring(inflight_log=notes)
        run = Run(ring, writable=True)
        run.pop(3)
        run.give_back([1, 2])
        ring.publish()
        ring.undo_pop(run.to_chains())
        assert notes.take() == [
            ("popped", 0, 1, 2),
            ("publishing", 0, 1, 2),
            ("published", 0, 1, 2),
            ("unpopped", 2),
        ]


@pytest.mark.parametrize("heads", [(1, 2), (2, 0), (2,)])
def test_a_run_takes_no_head_that_is_in_use(guest: Guest, heads: tuple[int, ...]) -> None:
    """Whether a chain or the run itself has it."""
    fill_singles(guest)
    ring = guest.ring()
    run = Run(ring, writable=True)
    guest.offer(2)
    assert run.pop(8) == 1
    guest.offer(*heads)
    assert run.pop(8) == 0 and run.heads.tolist() == [2]
    run.to_chains()
    assert run.pop(8) == 0
    if heads[0] != 2:
        assert [chain.head for chain in ring.pop_burst(8)] == [heads[0]]
    with pytest.raises(DriverError, match="in use"):
        ring.pop_burst(8)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1, 3)])
def test_a_run_takes_no_head_twice(guest: Guest, heads: tuple[int, ...]) -> None:
    fill_singles(guest)
    ring = guest.ring()
    guest.offer(*heads)
    assert Run(ring, writable=True).pop(8) == 0 and ring.outstanding == 0
    assert len(ring.pop_burst(8)) == len(heads) - 1
    with pytest.raises(DriverError, match="in use"):
        ring.pop_burst(8)


def test_in_order_a_run_takes_nothing_before_older_chains_are_back(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring(IN_ORDER)
    run = Run(ring, writable=True)
    guest.offer(0, 1, 2)
    (oldest,) = ring.pop_burst(1)
    assert run.pop(8) == 0
    ring.write_used(oldest)
    assert run.pop(1) == 1
    (chain,) = run.to_chains()
    assert run.pop(8) == 0
    assert run.adopt([chain]) and run.pop(8) == 1
    run.give_back([0, 0])
    ring.publish()
    assert guest.used() == [(0, 0), (1, 0), (2, 0)]


def test_a_run_adopts_no_chain_that_it_would_give_back_as_another(guest: Guest) -> None:
    """What is not in its columns would be forgotten: empty buffers, and those of the other kind."""
    guest.desc(0, BUFFERS, 16, WRITE)
    guest.desc(1, BUFFERS, 16, WRITE | NEXT, 2)
    guest.desc(2, BUFFERS, 0, WRITE)
    table = guest.table(TABLES, (BUFFERS, 16, NEXT, 1), (BUFFERS, 16, WRITE, 0))
    guest.desc(3, TABLES, table, TABLE)
    guest.offer(0, 1, 3)
    ring = guest.ring(INDIRECT)
    usual, with_empty, of_both = ring.pop_burst(3)
    run = Run(ring, writable=True)
    assert not run.adopt([usual, with_empty]) and not run.adopt([usual, of_both])
    assert run.adopt([usual]) and run.heads.tolist() == [0]


# --- chains in indirect tables -------------------------------------------------------------------

TABLES = 0x4000  # where the driver here puts them, 0x100 bytes apart
ONE = 0x5000  # a table of one buffer
Descriptor = tuple[int, int, int, int]
ChainAsked = tuple[str, list[tuple[int, int]], tuple[int, int, int] | None, tuple[str, int] | None]
"""What kind it is, its buffers, ``(which, field, value)`` of a descriptor in its table, and a field
of the descriptor for that."""


class Calls:
    """An `InflightLog` that keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, list[int]]] = []

    def popped(self, heads: Iterable[int]) -> None:
        self.all.append(("popped", list(heads)))

    def unpopped(self, heads: Sequence[int]) -> None:
        self.all.append(("unpopped", list(heads)))

    def publishing(self, heads: Sequence[int], used_idx: int) -> None:
        self.all.append(("publishing", [*heads, used_idx]))

    def published(self, heads: Sequence[int], used_idx: int) -> None:
        self.all.append(("published", [*heads, used_idx]))


def in_turn(*buffers: tuple[int, int]) -> list[Descriptor]:
    """A table as drivers write it."""
    last = len(buffers) - 1
    return [
        (gpa, length, NEXT if n < last else 0, n + 1 if n < last else 0)
        for n, (gpa, length) in enumerate(buffers)
    ]


def put_table(guest: Guest, head: int, table: list[Descriptor], gpa: int | None = None) -> None:
    """A chain whose descriptors are these."""
    place = TABLES + 0x100 * head if gpa is None else gpa
    guest.desc(head, place, guest.table(place, *table), TABLE)


def fill_tables(guest: Guest, buffers: int = 3) -> None:
    """Every descriptor leads to a table of its own, with buffers of their own."""
    for head in range(guest.size):
        places = [(BUFFERS + 0x400 * head + 0x40 * n, 10 * n + head + 1) for n in range(buffers)]
        put_table(guest, head, in_turn(*places))


def places_of(chain: Chain) -> list[tuple[int, int]]:
    return [(address_of(view), len(view)) for view in chain.readable]


def rows(run: TableRun) -> list[list[tuple[int, int]]]:
    """What a run holds, chain by chain."""
    pieces = list(zip(run.vectors[::2], run.vectors[1::2], strict=True))
    ends = list(accumulate(run.counts))
    assert len(run) == len(run.heads) == len(run.counts) and (ends or [0])[-1] == len(pieces)
    chains = [pieces[end - count : end] for end, count in zip(ends, run.counts, strict=True)]
    assert run.sizes == [sum(length for _, length in chain) for chain in chains]
    return chains


usual_buffers = st.tuples(st.integers(BUFFERS, SEAM - 0x200), st.integers(1, 0x200))
any_buffers = st.tuples(
    st.sampled_from((0, SEAM - 1, SEAM, HOLE - 1, HOLE, THIRD, TOP - 1, 1 << 63)),
    st.sampled_from((0, 1, 0x1000, 0xFFFFFFFF)),
)
mistakes = st.tuples(
    st.integers(0, 9),
    st.sampled_from((0, 1, 2, 3)),
    st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 0x8000, 0xFFFF)),
)
changes = st.one_of(
    st.none(),
    st.tuples(st.just("length"), st.sampled_from((0, 1, 8, 15, 17, 24, 16, 32, 160, 0xFFFFFFF0))),
    st.tuples(st.just("place"), st.sampled_from((SEAM - 16, SEAM, HOLE - 16, THIRD, TOP - 16))),
    st.tuples(st.just("flags"), st.sampled_from((5, 6, 7, 0x8004, 0, 1, 2))),
)
usual_chains = st.tuples(
    st.sampled_from(("table", "table", "direct")),
    st.lists(usual_buffers, min_size=1, max_size=4),
    st.none(),
    st.none(),
)
any_chains = st.tuples(
    st.sampled_from(("table", "table", "table", "direct", "written", "chained")),
    st.lists(usual_buffers, min_size=1, max_size=10)
    | st.lists(usual_buffers | any_buffers, min_size=1, max_size=3),
    st.none() | mistakes,
    changes,
)


@settings(max_examples=600, deadline=None)
@given(
    chains=st.lists(usual_chains, min_size=8, max_size=8),
    odd_ones=st.dictionaries(st.integers(0, 7), any_chains, max_size=2),
    heads=st.permutations(range(8)) | st.lists(st.integers(0, 9), min_size=1, max_size=8),
    start=st.sampled_from((0, 3, 0xFFFE)),
    limit=st.integers(1, 9),
    features=st.sampled_from((INDIRECT, INDIRECT, INDIRECT | IN_ORDER, 0)),
    use=st.integers(0, 8),
)
def test_a_run_of_tables_takes_just_what_would_come_as_chains(
    chains: list[ChainAsked],
    odd_ones: dict[int, ChainAsked],
    heads: list[int],
    start: int,
    limit: int,
    features: int,
    use: int,
) -> None:
    """The same chains with the same buffers, given back in the same way, and told to the log; of
    what it does not take there is no trace."""
    with GuestMemory.allocate(*LAYOUT) as memory:
        guest = Guest(memory, start=start)
        for head, usual in enumerate(chains):
            kind, buffers, mistake, change = odd_ones.get(head, usual)
            table = in_turn(*buffers)
            if mistake is not None:
                index, field, value = mistake
                fields = list(table[index % len(table)])
                fields[field] = value
                table[index % len(table)] = (fields[0], fields[1], fields[2], fields[3])
            if kind in ("direct", "written"):
                guest.desc(head, *buffers[0], WRITE if kind == "written" else 0, 7)
                continue
            changed_fields = dict([change] if change else [])
            place = changed_fields.get("place", TABLES + 0x100 * head)
            with suppress(AddressError):
                guest.table(place, *table)
            flags = changed_fields.get("flags", TABLE)
            length = changed_fields.get("length", 16 * len(table))
            if kind == "chained":
                guest.desc(head, *buffers[0], NEXT, (head + 1) % 8)
            else:
                guest.desc(head, place, length, flags, (head + 1) % 8)
        guest.offer(*heads)
        logs = Calls(), Calls()
        quick, plain = (guest.ring(features, inflight_log=log) for log in logs)
        run = TableRun(quick)
        count = run.pop(limit)
        assert len(run) == count == quick.outstanding <= limit
        assert quick.next_avail == (start + count) & 0xFFFF
        if not count:
            assert not (run.counts or run.sizes or run.vectors or run.to_chains())
            assert not logs[0].all
            return
        expected = plain.pop_burst(count)
        assert run.heads == [chain.head for chain in expected]
        assert rows(run) == [places_of(chain) for chain in expected]
        assert not any(chain.writable for chain in expected)
        assert all(chain.descriptors == 1 for chain in expected)
        use = min(use, count)
        run.give_back(use)
        left = run.to_chains()
        if use:
            plain.write_used_burst(expected[:use])
        assert [(c.head, places_of(c)) for c in left] == [
            (c.head, places_of(c)) for c in expected[use:]
        ]
        assert not (run or run.counts or run.sizes or run.vectors)
        assert plain.outstanding == quick.outstanding == count - use
        ends = []
        for ring, chains_left in ((quick, left), (plain, expected[use:])):
            memory.write(USED, bytes(6 + 8 * 8))
            ring.publish()
            ring.push_burst(chains_left)
            ends.append(memory.read(USED, 6 + 8 * 8))
            assert ring.outstanding == 0
        assert ends[0] == ends[1] and logs[0].all == logs[1].all


@pytest.mark.parametrize(
    ("enough", "taken"),
    [(0, 1), (1, 1), (48, 1), (49, 2), (125, 2), (126, 3), (1000, 5)],
)
def test_no_more_chains_are_taken_once_there_are_enough_bytes(
    guest: Guest, enough: int, taken: int
) -> None:
    fill_tables(guest)
    guest.desc(2, BUFFERS + 0x900, 77)
    ring = guest.ring(INDIRECT)
    guest.offer(5, 2, 7, 0, 1)  # 48, 77, 54, 33 bytes, and more
    run = TableRun(ring)
    assert run.pop(8, enough) == taken == len(run)
    chains = run.to_chains()
    assert len(chains) + len(ring.pop_burst(8)) == 5, "the others are left"


def test_usual_tables_are_taken_many_at_a_time(guest: Guest) -> None:
    """The way is not there in vain; and it may lead over to chains at any place."""
    fill_tables(guest)
    guest.desc(2, BUFFERS + 0x900, 77)
    ring = guest.ring(INDIRECT)
    guest.offer(5, 2, 7, 0, 1)
    run = TableRun(ring)
    assert run.pop(4) == 4 and run.heads == [5, 2, 7, 0] and run.counts == [3, 1, 3, 3]
    assert run.vectors[1::2].tolist() == [6, 16, 26, 77, 8, 18, 28, 1, 11, 21]
    assert run.sizes == [48, 77, 54, 33]
    assert run.vectors[6] - run.base == BUFFERS + 0x900
    assert bytes(run.memory) == bytes(guest.memory.region_at(BUFFERS).view)
    assert run.pop(4) == 0 and len(run) == 4  # what is held goes first
    run.give_back(0)
    run.give_back(2)
    assert run.heads == [7, 0] and run.counts == [3, 3]
    assert run.vectors[1::2].tolist() == [8, 18, 28, 1, 11, 21] and run.sizes == [54, 33]
    assert ring.publish() == 2 and guest.used() == [(5, 0), (2, 0)]
    chains = run.to_chains()
    assert [sum(map(len, chain.readable)) for chain in chains] == [54, 33]
    assert run.pop(4) == 1 and run.heads == [1]  # the others do not stand in its way
    ring.push_burst(chains)
    run.give_back(1)
    ring.publish()
    assert guest.used() == [(7, 0), (0, 0), (1, 0)] and ring.outstanding == 0


@pytest.mark.parametrize("start", [0, 5, 0xFFFD])
def test_a_run_of_tables_ends_where_the_ring_does(memory: GuestMemory, start: int) -> None:
    guest = Guest(memory, start=start)
    fill_tables(guest)
    guest.offer(*range(8))
    ring = guest.ring(INDIRECT | EVENT_IDX)
    run = TableRun(ring)
    first = 8 - start % 8
    assert run.pop(64) == first
    run.give_back(first)
    assert run.pop(64) == 8 - first
    if first < 8:
        assert run.heads == list(range(first, 8))
    assert not ring.enable_kicks() and guest.avail_event == (start + 8) % 65536


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    ("what", "bad"),
    [
        ("a table of no bytes", lambda guest, head: guest.desc(head, ONE, 0, TABLE)),
        ("a table of half a descriptor", lambda guest, head: guest.desc(head, ONE, 8, TABLE)),
        ("a table and a half", lambda guest, head: guest.desc(head, ONE, 24, TABLE)),
        ("a table and a byte", lambda guest, head: guest.desc(head, ONE, 17, TABLE)),
        ("a table chained on", lambda guest, head: guest.desc(head, ONE, 16, TABLE | NEXT, 1)),
        ("a table for writing", lambda guest, head: guest.desc(head, ONE, 16, TABLE | WRITE)),
        ("another flag", lambda guest, head: guest.desc(head, ONE, 16, TABLE | 0x8000)),
        ("a table in a hole", lambda guest, head: guest.desc(head, HOLE, 16, TABLE)),
        ("a table over a seam", lambda guest, head: guest.desc(head, SEAM - 16, 32, TABLE)),
        ("a table that wraps", lambda guest, head: guest.desc(head, TOP - 16, 32, TABLE)),
        (
            "a table longer than the queue",
            lambda guest, head: put_table(guest, head, in_turn(*[(BUFFERS, 1)] * 9)),
        ),
        (
            "a table longer than its chain",
            lambda guest, head: put_table(guest, head, [(BUFFERS, 1, 0, 0)] * 2),
        ),
        (
            "a chain that leaves its table",
            lambda guest, head: put_table(guest, head, [(BUFFERS, 1, NEXT, 1)]),
        ),
        (
            "a loop",
            lambda guest, head: put_table(
                guest, head, [(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)]
            ),
        ),
        (
            "a chain that leaves some out",
            lambda guest, head: put_table(
                guest, head, [(BUFFERS, 1, NEXT, 2), (BUFFERS, 2, NEXT, 2), (BUFFERS, 3, 0, 0)]
            ),
        ),
        (
            "a loop before the end",
            lambda guest, head: put_table(
                guest, head, [(BUFFERS, 1, NEXT, 1), (BUFFERS, 2, NEXT, 0), (BUFFERS, 3, 0, 0)]
            ),
        ),
        (
            "a table in a table",
            lambda guest, head: put_table(guest, head, [(TABLES + 0x700, 16, TABLE, 0)]),
        ),
        (
            "a writable buffer",
            lambda guest, head: put_table(
                guest, head, [(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, WRITE, 0)]
            ),
        ),
        ("a writable buffer alone", lambda guest, head: guest.desc(head, BUFFERS, 1, WRITE)),
        ("a chain without a table", lambda guest, head: guest.desc(head, BUFFERS, 1, NEXT, 7)),
        ("a head that is used", lambda guest, head: None),
    ],
)
def test_a_run_of_tables_ends_before_a_chain_of_another_kind(
    guest: Guest, what: str, bad: Callable[[Guest, int], None], at: int
) -> None:
    """And leaves that to `pop_burst`, which takes it or says what is wrong."""
    fill_tables(guest)
    guest.table(ONE, *in_turn((BUFFERS, 1), (BUFFERS, 1))[1:])  # nothing is wrong with it
    ring = guest.ring(INDIRECT)
    heads = [0, 1, 2, 3]
    if what == "a head that is used":
        guest.offer(6)
        TableRun(ring).pop(1)
        heads[at] = 6
    else:
        bad(guest, at)
    guest.offer(*heads)
    run = TableRun(ring)
    assert run.pop(64) == at and len(run) == len(run.counts) == at
    run.give_back(at)
    try:
        chains = ring.pop_burst(64)
    except DriverError as error:
        assert error.head == heads[at]
    else:
        assert chains[0].head == heads[at]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (BUFFERS, 0),
        (SEAM - 8, 9),
        (SEAM, 8),
        (HOLE, 8),
        (THIRD, 8),
        (TOP - 8, 8),
        (TOP - 8, 16),
        (1 << 63, 8),
        (BUFFERS, 0xFFFFFFFF),
    ],
)
def test_one_buffer_elsewhere_keeps_a_run_of_tables_from_taking_any(
    guest: Guest, gpa: int, length: int, at: int
) -> None:
    fill_tables(guest)
    buffers = [(BUFFERS, 8)] * 3
    buffers[at] = gpa, length
    put_table(guest, 1, in_turn(*buffers))
    ring = guest.ring(INDIRECT)
    guest.offer(0, 1, 2)
    run = TableRun(ring)
    assert run.pop(64) == 0 and ring.outstanding == 0
    assert not (run.counts or run.sizes or run.vectors or run.heads)
    assert run.pop(1) == 1  # nothing is wrong with the first


def test_a_run_takes_no_table_where_none_were_negotiated(guest: Guest) -> None:
    fill_tables(guest)
    guest.desc(0, BUFFERS, 9)
    guest.offer(0, 1)
    run = TableRun(guest.ring(0))
    assert run.pop(8) == 1 and run.heads == [0]


def test_a_run_of_tables_may_lie_in_any_region_but_in_one_only(guest: Guest) -> None:
    """The one that the first table lies in."""
    for head in range(4):
        put_table(guest, head, in_turn((THIRD + 64 * head, 8), (THIRD + 0x800, 9)), THIRD + 0x1000)
    put_table(guest, 4, in_turn((BUFFERS, 8)))
    put_table(guest, 5, in_turn((BUFFERS, 8)), THIRD + 0x2000)
    guest.desc(6, BUFFERS, 5)
    ring = guest.ring(INDIRECT)
    run = TableRun(ring)
    guest.offer(0, 1, 4)
    assert run.pop(8) == 2 and run.base == guest.memory.hvaddr(THIRD)
    assert bytes(run.memory) == bytes(guest.memory.region_at(THIRD).view)
    run.give_back(2)
    assert run.pop(8) == 1 and run.base == guest.memory.hvaddr(0)
    run.give_back(1)
    guest.offer(5, 6)
    assert run.pop(8) == 0
    assert [chain.head for chain in ring.pop_burst(8)] == [5, 6]


@pytest.mark.parametrize("place", [0, 0x7FF0, 0x10000 - 16, 0x20000, 0x20000 - 8])
def test_a_table_beside_the_only_region_is_not_read(place: int) -> None:
    with GuestMemory.allocate((0x10000, 0x10000)) as memory:
        guest = Guest(memory, places=(0x11000, 0x12000, 0x13000))
        memory.region_at(0x10000).view[-16:] = struct.pack("<QIHH", 0x18000, 8, 0, 0)
        guest.desc(0, place, 16, TABLE)
        guest.offer(0)
        ring = guest.ring(INDIRECT)
        assert TableRun(ring).pop(8) == 0
        with pytest.raises(DriverError, match="not in the guest's memory"):
            ring.pop_burst(8)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1, 3)])
def test_a_run_of_tables_takes_no_head_twice(guest: Guest, heads: tuple[int, ...]) -> None:
    fill_tables(guest)
    ring = guest.ring(INDIRECT)
    guest.offer(*heads)
    assert TableRun(ring).pop(8) == ring.outstanding == len(heads) - 1
    with pytest.raises(DriverError, match="in use"):
        ring.pop_burst(8)


def test_a_chain_of_more_than_2_to_the_32_bytes_is_not_for_a_run_of_tables() -> None:
    """Its buffers may lie over one another: so little memory is enough."""
    with GuestMemory.allocate((0, 1 << 31)) as memory:
        guest = Guest(memory)
        half = (0, 1 << 31)
        put_table(guest, 0, in_turn(half, half))
        put_table(guest, 1, in_turn(half, half, (0, 1)))
        ring = guest.ring(INDIRECT)
        guest.offer(0)
        run = TableRun(ring)
        assert run.pop(8) == 1 and run.sizes == [1 << 32]
        run.give_back(1)
        guest.offer(1)
        assert run.pop(8) == 0
        with pytest.raises(DriverError, match="2\\^32"):
            ring.pop_burst(8)


def test_a_table_that_changes_meanwhile_is_used_as_it_was_read(guest: Guest) -> None:
    fill_tables(guest)
    guest.offer(0, 1)
    run = TableRun(guest.ring(INDIRECT))
    assert run.pop(8) == 2
    before = rows(run)
    guest.memory.write(TABLES, b"\xff" * 0x800)
    guest.memory.write(DESC, b"\xff" * 128)
    assert rows(run) == before == [places_of(chain) for chain in run.to_chains()]


def test_chains_put_back_or_left_over_come_before_a_run_of_tables(guest: Guest) -> None:
    fill_tables(guest)
    guest.offer(0, 1)
    ring = guest.ring(INDIRECT, resubmit=[5])
    run = TableRun(ring)
    assert run.pop(8) == 0
    assert [chain.head for chain in ring.pop_burst(8)] == [5]
    assert run.pop(1) == 1
    chains = run.to_chains()
    ring.undo_pop(chains)
    assert run.pop(8) == 0
    assert ring.pop_burst(8) == chains
    assert run.pop(8) == 1 and run.heads == [1]


def test_in_order_a_run_of_tables_takes_nothing_before_older_chains_are_back(guest: Guest) -> None:
    fill_tables(guest)
    ring = guest.ring(INDIRECT | IN_ORDER)
    run = TableRun(ring)
    guest.offer(0, 1, 2, 3)
    (oldest,) = ring.pop_burst(1)
    assert run.pop(8) == 0
    ring.write_used(oldest)
    assert run.pop(2) == 2
    run.give_back(1)
    (chain,) = run.to_chains()
    assert run.pop(8) == 0
    (last,) = ring.pop_burst(8)
    ring.write_used(last)  # waits for its turn
    ring.write_used(chain)
    ring.publish()
    assert guest.used() == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_run_of_tables_stands_in_the_inflight_log(guest: Guest) -> None:
    fill_tables(guest)
    notes = Notes(guest)
    guest.offer(4, 0, 2)
    ring = guest.ring(INDIRECT, inflight_log=notes)
    run = TableRun(ring)
    run.pop(8)
    run.give_back(2)
    ring.publish()
    ring.undo_pop(run.to_chains())
    assert notes.take() == [
        ("popped", 4, 0, 2),
        ("publishing", 4, 0, 2),
        ("published", 4, 0, 2),
        ("unpopped", 2),
    ]


def test_buffers_that_were_only_read_are_not_dirty() -> None:
    with GuestMemory.allocate((0, 0x10000)) as memory:
        guest = Guest(memory)
        bitmap = bytearray(2)
        memory.dirty_log = DirtyLog(bitmap)
        fill_tables(guest)
        guest.offer(0, 1, 2)
        ring = guest.ring(INDIRECT)
        run = TableRun(ring)
        run.pop(8)
        bitmap[:] = bytes(2)
        run.give_back(3)
        ring.publish()
        assert bitmap == bytes((1 << USED // 0x1000, 0))


@pytest.mark.parametrize("buffers", [1, 3, 16, 60, 64])
@pytest.mark.parametrize("tables", [True, False])
def test_a_run_of_tables_holds_no_more_buffers_than_it_says(buffers: int, tables: bool) -> None:
    """However many chains wait: who makes room for the most of them is never overrun."""
    with GuestMemory.allocate((0, 0x200000)) as memory:
        guest = Guest(memory, size=2048)
        for head in range(2048):
            if tables:
                gpa = 0x100000 + 0x400 * (head % 16)
                put_table(guest, head, in_turn(*[(0x180000 + head, 1)] * buffers), gpa)
            else:
                guest.desc(head, 0x180000 + head, 1)
        guest.offer(*range(2048))
        run = TableRun(guest.ring(INDIRECT))
        count = run.pop(2048)
        pieces = len(run.vectors) // 2
        assert pieces == count * (buffers if tables else 1)
        assert run.most_pieces - 64 < pieces <= run.most_pieces
        run.give_back(count)
        assert not run.vectors and not run.sizes


def test_a_table_longer_than_the_longest_is_left_alone() -> None:
    with GuestMemory.allocate((0, 0x200000)) as memory:
        guest = Guest(memory, size=2048)
        put_table(guest, 0, in_turn(*[(BUFFERS, 1)] * 64), 0x100000)
        put_table(guest, 1, in_turn(*[(BUFFERS, 1)] * 65), 0x110000)
        guest.offer(0, 1)
        ring = guest.ring(INDIRECT)
        run = TableRun(ring)
        assert run.pop(64) == 1
        assert len(ring.pop_burst(64)[0].readable) == 65


@pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
def test_an_impossible_index_is_an_error_for_a_run_of_tables_too(guest: Guest, index: int) -> None:
    ring = guest.ring(INDIRECT)
    guest.memory.store16(AVAIL + 2, index)
    with pytest.raises(DriverError, match="ahead"):
        TableRun(ring).pop(8)
    assert TableRun(ring).pop(8) == 0


def test_a_run_of_tables_takes_none_beyond_the_limit(guest: Guest) -> None:
    fill_tables(guest)
    guest.offer(0, 1)
    run = TableRun(guest.ring(INDIRECT))
    assert run.pop(0) == run.pop(-1) == 0
    assert run.pop(1) == 1 and repr(run) == "<TableRun of 1>"


def test_a_chain_given_back_by_a_run_of_tables_has_a_position_again(guest: Guest) -> None:
    """After an impossible index none has that the device holds: a later one is told their heads."""
    fill_tables(guest)
    ring = guest.ring(INDIRECT)
    run = TableRun(ring)
    guest.offer(0, 1)
    assert run.pop(8) == 2
    guest.memory.store16(AVAIL + 2, 0x8000)
    with pytest.raises(DriverError, match="ahead"):
        ring.waiting()
    run.give_back(2)
    ring.publish()
    guest.memory.write(AVAIL + 4, bytes(16))  # the head 0 everywhere
    guest.memory.store16(AVAIL + 2, 0x8001)
    chains = ring.pop_burst(8)
    ring.undo_pop(chains)
    assert len(chains) == 1 and ring.left_over == [] and ring.next_avail == 0x8000


def test_a_run_of_tables_follows_the_ring_into_another_region(guest: Guest) -> None:
    """For buffers without a table; one run serves a queue for as long as there is a ring."""
    ring = guest.ring(INDIRECT)
    run = TableRun(ring)
    guest.desc(0, THIRD, 16)
    guest.desc(1, THIRD + 0x100, 16)
    guest.offer(0)
    assert run.pop(8) == 0
    ring.push_burst(ring.pop_burst(8))
    guest.offer(1)
    assert run.pop(8) == 1 and run.base == guest.memory.hvaddr(THIRD)
    assert bytes(run.memory) == bytes(guest.memory.region_at(THIRD).view)
