"""The device's side of a split virtqueue, against rings written byte by byte.

The guest here is `Guest`: it places any bytes that a driver could, and most that none should.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import pytest
from hypothesis import example, given, settings
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
    RAM,
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

import vq.split_ring
from vq.errors import DriverError, UsageError
from vq.memory import DirtyLog, GuestMemory
from vq.split_ring import Chain, SplitRing


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


@pytest.fixture
def guest(memory: GuestMemory) -> Guest:
    return Guest(memory)


def gpas(memory: GuestMemory, views: Iterable[memoryview]) -> list[tuple[int, int]]:
    """Where views lie in the guest, by marking a byte and looking for it."""
    found = []
    for view in views:
        before = bytes(view[:1])
        contents = [(region, bytes(region.view)) for region in memory.regions]
        view[0] = before[0] ^ 0xFF
        for region, content in contents:
            changed = bytes(region.view)
            if changed != content:
                offset = next(i for i, (a, b) in enumerate(zip(content, changed)) if a != b)  # noqa: B905
                found.append((region.gpa + offset, len(view)))
        view[:1] = before
    return found


def sizes(chain: Chain) -> tuple[list[int], list[int]]:
    return [len(view) for view in chain.readable], [len(view) for view in chain.writable]


def heads(chains: Iterable[Chain]) -> list[int]:
    return [chain.head for chain in chains]


# --- golden bytes --------------------------------------------------------------------------------


def test_a_chain_of_golden_bytes(memory: GuestMemory) -> None:
    memory.write(
        DESC,
        bytes.fromhex(
            "0080000000000000 05000000 0100 0200"  # 0: 5 bytes at 0x8000, then 2
            "0000000000000000 00000000 0000 0000"
            "0000040000000000 03000000 0300 0300"  # 2: 3 bytes at 0x40000 to be written, then 3
            "0090000000000000 00010000 0200 0000"  # 3: 256 bytes at 0x9000 to be written
        ),
    )
    memory.write(AVAIL, bytes.fromhex("0000 0100 0000 0000 0000 0000 0000"))
    memory.write(0x8000, b"hello")
    ring = SplitRing(memory, 4, DESC, AVAIL, USED)
    chain = ring.pop()
    assert chain is not None and chain.head == 0
    assert [bytes(view) for view in chain.readable] == [b"hello"]
    assert gpas(memory, chain.writable) == [(0x40000, 3), (0x9000, 0x100)]
    assert (chain.readable_size, chain.writable_size) == (5, 259)
    assert repr(chain) == "Chain(head=0, readable=[5], writable=[3, 256])"
    chain.writable[0][:] = b"abc"
    chain.written = 0x0102
    ring.write_used(chain)
    assert memory.read(USED, 14) == bytes.fromhex("0000 0000 00000000 02010000 0000")
    assert ring.publish() == 1
    assert memory.read(USED, 14) == bytes.fromhex("0000 0100 00000000 02010000 0000")
    assert memory.read(0x40000, 3) == b"abc"


def test_an_indirect_chain_of_golden_bytes(memory: GuestMemory) -> None:
    # The write flag of the descriptor that refers to the table means nothing (2.7.5.3.2).
    memory.write(DESC + 16, bytes.fromhex("00a0000000000000 20000000 0600 ffff"))
    memory.write(
        0xA000,
        bytes.fromhex("0080000000000000 0c000000 0100 0100 0090000000000000 04000000 0200 ffff"),
    )
    memory.write(AVAIL, bytes.fromhex("0000 0100 0100 0000 0000 0000 0000"))
    ring = SplitRing(memory, 4, DESC, AVAIL, USED, features=INDIRECT)
    chain = ring.pop()
    assert chain is not None and chain.head == 1
    assert gpas(memory, chain.readable) == [(0x8000, 12)]
    assert gpas(memory, chain.writable) == [(0x9000, 4)]
    ring.push_burst([chain])
    assert memory.read(USED, 12) == bytes.fromhex("0000 0100 01000000 00000000")


def test_suppression_fields_in_golden_bytes(memory: GuestMemory) -> None:
    ring = SplitRing(memory, 4, DESC, AVAIL, USED)
    ring.disable_kicks()
    assert memory.read(USED, 38) == b"\1".ljust(38, b"\0")
    ring.enable_kicks()
    assert memory.read(USED, 38) == bytes(38)
    memory.write(AVAIL + 2, b"\xfe\xff")
    memory.write(USED + 2, b"\xfe\xff")
    ring = SplitRing(
        memory, 4, DESC, AVAIL, USED, features=EVENT_IDX, next_avail=0xFFFE, next_used=0xFFFE
    )
    ring.disable_kicks()
    assert memory.read(USED, 2) == b"\0\0", "with EVENT_IDX flags stays 0 (2.7.10.2)"
    ring.enable_kicks()
    assert memory.read(USED + 4 + 8 * 4, 2) == b"\xfe\xff"


def test_on_a_big_endian_host_every_index_is_swapped(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Told that this host is the other way round, the ring sees and leaves every 16-bit word that
    # it loads or stores as a whole swapped; elements go through struct and stay as they are.
    monkeypatch.setattr(vq.split_ring, "_BIG_ENDIAN", True)
    memory.write(DESC, struct.pack("<QIHH", BUFFERS, 8, WRITE, 0))
    memory.write(AVAIL, bytes.fromhex("0000 0001 0000"))
    ring = SplitRing(memory, 4, DESC, AVAIL, USED)
    chain = ring.pop()
    assert chain is not None and ring.pop() is None
    ring.push_burst([chain])
    assert memory.read(USED, 4) == bytes.fromhex("0000 0001")
    assert ring.should_notify()
    memory.write(AVAIL, bytes.fromhex("0001 0002"))  # flags: no calls
    ring.push_burst(ring.pop_burst(4))
    assert not ring.should_notify()
    ring.disable_kicks()
    assert memory.read(USED, 2) == b"\0\1"
    ring = SplitRing(
        memory, 4, DESC, AVAIL, USED, features=EVENT_IDX, next_avail=1, next_used=0x01FF
    )
    assert ring.enable_kicks() and memory.read(USED + 36, 2) == b"\0\1"
    ring.push_burst(ring.pop_burst(4))
    assert memory.read(USED + 2, 2) == b"\2\0" and ring.should_notify()
    memory.write(AVAIL + 2, b"\0\3")
    memory.write(AVAIL + 12, b"\2\0")  # used_event: 0x200, the next one
    ring.push_burst(ring.pop_burst(4))
    assert memory.read(USED + 2, 2) == b"\2\1" and ring.should_notify()


# --- where a ring may lie ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 3, 6, 1000, 32767, 32769, 65536, 1 << 32])
def test_a_size_that_is_no_power_of_two_up_to_32768_is_refused(
    memory: GuestMemory, size: int
) -> None:
    with pytest.raises(DriverError) as caught:
        SplitRing(memory, size, DESC, AVAIL, USED, name="rx0")
    assert (caught.value.queue, caught.value.head, caught.value.section) == ("rx0", None, "2.7")


@pytest.mark.parametrize(
    ("part", "place"),
    [("descriptor table", DESC + 8), ("available ring", AVAIL + 1), ("used ring", USED + 2)],
)
def test_a_misaligned_part_is_refused(memory: GuestMemory, part: str, place: int) -> None:
    places = [DESC, AVAIL, USED]
    places[("descriptor table", "available ring", "used ring").index(part)] = place
    with pytest.raises(DriverError, match=f"{part}.*aligned") as caught:
        SplitRing(memory, 4, *places, name="tx0")
    assert (caught.value.queue, caught.value.section) == ("tx0", "2.7")


def test_the_least_alignment_is_enough(memory: GuestMemory) -> None:
    SplitRing(memory, 4, DESC + 16, AVAIL + 2, USED + 4)


@pytest.mark.parametrize(
    ("part", "length"),
    [("descriptor table", 16 * 8), ("available ring", 6 + 2 * 8), ("used ring", 6 + 8 * 8)],
)
def test_a_part_that_is_not_wholly_in_memory_is_refused(
    memory: GuestMemory, part: str, length: int
) -> None:
    number = ("descriptor table", "available ring", "used ring").index(part)
    align = (16, 2, 4)[number]
    last_good = (HOLE - length) // align * align
    for place, good in (
        (last_good, True),
        (last_good + align, False),
        (HOLE, False),
        (THIRD - align, False),
        (1 << 40, False),
        (TOP - align, False),
        (TOP, False),
        (-align, False),
    ):
        places = [DESC, AVAIL, USED]
        places[number] = place
        if good:
            SplitRing(memory, 8, *places)
        else:
            with pytest.raises(DriverError, match=f"{part} is not in the guest's memory") as caught:
                SplitRing(memory, 8, *places)
            assert caught.value.section == "2.7"


@pytest.mark.parametrize("size", [1 << n for n in range(16)])
def test_queues_of_every_size_go_around(size: int) -> None:
    with GuestMemory.allocate(0x200000) as memory:
        guest = Guest(memory, size, start=0xFFF0)
        for index in range(size):
            guest.desc(index, 0x100000 + index, 1, WRITE)
        ring = guest.ring(EVENT_IDX)
        for _ in range(2):
            guest.offer(*range(size))
            assert ring.available() == size
            chains = ring.pop_burst(size + 1)
            assert heads(chains) == list(range(size))
            assert ring.pop() is None and ring.outstanding == size
            for chain in chains:
                chain.writable[0][0] = chain.head & 0xFF
                chain.written = 1
            ring.push_burst(chains)
            assert guest.used() == [(head, 1) for head in range(size)]
            assert ring.outstanding == 0
            assert memory.read(0x100000, size) == bytes(head & 0xFF for head in range(size))
            memory.write(0x100000, bytes(size))
        assert ring.next_avail == ring.next_used == (0xFFF0 + 2 * size) % 65536
        guest.offer(size - 1)
        assert ring.enable_kicks() and guest.avail_event == ring.next_avail


def test_a_ring_starts_where_an_earlier_device_stopped(memory: GuestMemory) -> None:
    guest = Guest(memory, 8, start=0xFFF0)
    fill_singles(guest)
    ring = guest.ring()
    for round in range(8):
        guest.offer(*((round + n) % 8 for n in range(5)))
        chains = ring.pop_burst(3) + ring.pop_burst(8)
        assert heads(chains) == [(round + n) % 8 for n in range(5)]
        ring.push_burst(chains)
        assert heads(chains) == [head for head, _ in guest.used()]
    assert ring.next_avail == ring.next_used == (0xFFF0 + 40) % 65536 == 24


# --- chains that are good ------------------------------------------------------------------------


def test_a_chain_may_be_as_long_as_the_queue(guest: Guest, memory: GuestMemory) -> None:
    for index in range(8):
        flags = (WRITE if index >= 3 else 0) | (NEXT if index < 7 else 0)
        guest.desc(index, BUFFERS + 0x100 * index, index + 1, flags, index + 1)
    guest.offer(0)
    chain = guest.ring().pop()
    assert chain is not None and sizes(chain) == ([1, 2, 3], [4, 5, 6, 7, 8])
    assert gpas(memory, chain.writable) == [(BUFFERS + 0x100 * n, n + 1) for n in range(3, 8)]


def test_an_indirect_chain_may_be_as_long_as_the_queue(guest: Guest) -> None:
    length = guest.table(0xA000, *((BUFFERS, n + 1, NEXT if n < 7 else 0, n + 1) for n in range(8)))
    guest.desc(2, 0xA000, length, TABLE)
    guest.offer(2)
    chain = guest.ring(INDIRECT).pop()
    assert chain is not None and sizes(chain) == ([1, 2, 3, 4, 5, 6, 7, 8], [])


def test_direct_descriptors_may_stand_before_an_indirect_table(guest: Guest) -> None:
    # virtio 1.3, 2.7.5.3.2: zero or more direct ones, and a single indirect one.
    guest.desc(5, BUFFERS, 1, NEXT, 3)
    guest.desc(3, BUFFERS, 2, NEXT, 0)
    guest.desc(0, 0xA000, guest.table(0xA000, (BUFFERS, 3, NEXT, 1), (BUFFERS, 4, 2, 0)), TABLE)
    guest.offer(5)
    chain = guest.ring(INDIRECT).pop()
    assert chain is not None and chain.head == 5 and sizes(chain) == ([1, 2, 3], [4])


def test_a_table_may_hold_more_than_the_chain_needs(guest: Guest) -> None:
    guest.table(0xA000, *[(BUFFERS, 3, NEXT, 40)] + [(0, 0, 0, 0)] * 39 + [(BUFFERS, 4, WRITE, 0)])
    guest.desc(0, 0xA000, 41 * 16, TABLE)
    guest.offer(0)
    chain = guest.ring(INDIRECT).pop()
    assert chain is not None and sizes(chain) == ([3], [4])


def test_an_indirect_table_needs_no_alignment_and_may_lie_over_two_regions(guest: Guest) -> None:
    for index, place in enumerate((0xA003, SEAM - 17, SEAM - 16, SEAM - 8)):
        length = guest.table(place, (BUFFERS, 3, NEXT, 1), (BUFFERS, index + 1, WRITE, 0))
        guest.desc(index, place, length, TABLE)
    guest.offer(0)
    guest.offer(1)
    ring = guest.ring(INDIRECT)
    assert [sizes(chain) for chain in ring.pop_burst(1)] == [([3], [1])]
    for index, place in enumerate((SEAM - 17, SEAM - 16, SEAM - 8), 1):
        guest.table(place, (BUFFERS, 3, NEXT, 1), (BUFFERS, index + 1, WRITE, 0))
        if index > 1:
            guest.offer(index)
        assert [sizes(chain) for chain in ring.pop_burst(1)] == [([3], [index + 1])]


def test_a_huge_indirect_table_over_two_regions_is_not_copied_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A guest names a table of 128 MiB, of which next can reach 1 MiB: 65,536 descriptors.
    half = 64 << 20
    with GuestMemory.allocate(0x10000, half, half) as memory:
        guest = Guest(memory)
        start = 0x10000 + half - 0x80000
        guest.memory.write(start, struct.pack("<QIHH", BUFFERS, 3, NEXT, 65535))
        guest.memory.write(start + 16 * 65535, struct.pack("<QIHH", BUFFERS, 4, 0, 0))
        guest.desc(0, start, half, TABLE)
        guest.offer(0)
        copied = []
        read = GuestMemory.read
        monkeypatch.setattr(
            GuestMemory, "read", lambda self, gpa, n: copied.append(n) or read(self, gpa, n)
        )
        chain = guest.ring(INDIRECT).pop()
        assert chain is not None and sizes(chain) == ([3, 4], [])
        assert copied == [1 << 20]


def test_empty_buffers_are_left_out_wherever_they_point(guest: Guest) -> None:
    guest.desc(0, 1 << 60, 0, NEXT, 1)
    guest.desc(1, BUFFERS, 5, NEXT, 2)
    guest.desc(2, HOLE, 0, NEXT | WRITE, 3)
    guest.desc(3, BUFFERS, 6, WRITE)
    guest.desc(4, 1 << 60, 0)
    guest.desc(5, HOLE, 0, WRITE)
    guest.offer(0, 4, 5)
    ring = guest.ring()
    chains = ring.pop_burst(8)
    assert [sizes(chain) for chain in chains] == [([5], [6]), ([], []), ([], [])]
    ring.push_burst(chains)
    assert guest.used() == [(0, 0), (4, 0), (5, 0)]


def test_an_empty_writable_buffer_before_a_readable_one_does_no_harm(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 0, NEXT | WRITE, 1)
    guest.desc(1, BUFFERS, 5)
    guest.offer(0)
    chain = guest.ring().pop()
    assert chain is not None and sizes(chain) == ([5], [])


def test_a_buffer_may_lie_over_adjacent_regions(guest: Guest, memory: GuestMemory) -> None:
    memory.write(SEAM - 3, b"abcdef")
    guest.desc(0, SEAM - 3, 6, NEXT, 1)
    guest.desc(1, SEAM - 0x100, 0x180, WRITE)
    guest.offer(0)
    chain = guest.ring().pop()
    assert chain is not None
    assert [bytes(view) for view in chain.readable] == [b"abc", b"def"]
    assert gpas(memory, chain.writable) == [(SEAM - 0x100, 0x100), (SEAM, 0x80)]


def test_buffers_in_every_region_up_to_their_ends(guest: Guest, memory: GuestMemory) -> None:
    places = [(0xFFFF, 1), (SEAM, 1), (HOLE - 4, 4), (THIRD, 4), (0x4FFFF, 1), (TOP - 2, 2)]
    for index, place in enumerate(places):
        guest.desc(index, *place, WRITE)
    guest.offer(*range(len(places)))
    chains = guest.ring().pop_burst(8)
    assert [gpas(memory, chain.writable) for chain in chains] == [[place] for place in places]


def test_two_to_the_32_bytes_are_the_longest_chain() -> None:
    with GuestMemory.allocate(0x10000, 1 << 30) as memory:  # sparse: no page of it is touched
        guest = Guest(memory)
        for index in range(4):
            guest.desc(index, 0x10000, 1 << 30, NEXT if index < 3 else 0, index + 1)
        guest.desc(4, BUFFERS, 1, NEXT, 0)
        guest.offer(0)
        ring = guest.ring()
        chain = ring.pop()
        assert chain is not None and chain.readable_size == 1 << 32
        ring.push_burst([chain])
        guest.offer(4)
        with pytest.raises(DriverError, match="2\\^32"):
            ring.pop()


# --- chains that break a rule --------------------------------------------------------------------


def assert_refused(
    guest: Guest,
    head: int,
    section: str,
    reason: str,
    *,
    features: int = INDIRECT | EVENT_IDX,
    comes_back: bool = True,
) -> None:
    """The chain at `head` is refused as it should be; descriptors 6 and 7 are for good chains."""
    guest.desc(6, 0xC000, 10)
    guest.desc(7, 0xD000, 20, WRITE)
    before = guest.all_but_the_used_ring()

    # First alone, then between good ones.
    ring = guest.ring(features, name="rx1")
    for good in ([], [6, 7]):
        guest.offer(*good[:1], head, *good[1:])
        before = guest.all_but_the_used_ring()
        chains = ring.pop_burst(64) if good else []
        assert heads(chains) == good[:1], "good ones are given first"
        with pytest.raises(DriverError, match=reason) as caught:
            ring.pop_burst(64)
        error = caught.value
        assert (error.queue, error.head, error.section) == ("rx1", head, section)
        assert str(error).startswith(f"rx1, head {head}: ") and f"1.3, {section})" in str(error)
        assert guest.used() == [], "nothing is published by itself"
        chains += ring.pop_burst(64)
        assert heads(chains) == good, "the queue works on behind it"
        for chain in chains:
            chain.written = chain.writable_size
        ring.push_burst(chains)
        back = [(head, 0)] if comes_back else []
        done = [(6, 0), (7, 20)] if good else []
        assert guest.used() == (
            done[:1] + back + done[1:] if features & IN_ORDER else back + done
        ), "the bad one comes back with nothing written"
        assert ring.outstanding == 0 and ring.available() == 0
        assert ring.next_avail == guest.offered
        assert guest.all_but_the_used_ring() == before
    for _ in range(3):
        guest.offer(7, 6)
        chains = ring.pop_burst(1) + ring.pop_burst(2)
        assert [sizes(chain) for chain in chains] == [([], [20]), ([10], [])]
        ring.push_burst(chains)
        assert guest.used() == [(7, 0), (6, 0)]


def test_a_chain_that_loops_is_refused(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 16, NEXT, 1)
    guest.desc(1, BUFFERS, 16, NEXT, 0)
    assert_refused(guest, 0, "2.7.5.2", "loops")


def test_a_descriptor_that_follows_itself_is_refused(guest: Guest) -> None:
    guest.desc(5, BUFFERS, 0, NEXT, 5)
    assert_refused(guest, 5, "2.7.5.2", "loops")


def test_an_indirect_chain_that_loops_is_refused(guest: Guest) -> None:
    guest.desc(0, 0xA000, guest.table(0xA000, (BUFFERS, 1, 1, 1), (BUFFERS, 1, 1, 0)), TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "loops")


def test_an_indirect_chain_longer_than_the_queue_is_refused(guest: Guest) -> None:
    length = guest.table(0xA000, *((BUFFERS, 1, NEXT if n < 8 else 0, n + 1) for n in range(9)))
    guest.desc(0, 0xA000, length, TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "more than 8 descriptors")


def test_direct_and_indirect_together_longer_than_the_queue_are_refused(guest: Guest) -> None:
    length = guest.table(0xA000, *((BUFFERS, 1, NEXT if n < 7 else 0, n + 1) for n in range(8)))
    guest.desc(0, BUFFERS, 1, NEXT, 1)
    guest.desc(1, 0xA000, length, TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "more than 8 descriptors")


@pytest.mark.parametrize("following", [8, 9, 0x7FFF, 0xFFFF])
def test_next_beyond_the_table_is_refused(guest: Guest, following: int) -> None:
    guest.desc(0, BUFFERS, 16, NEXT, following)
    assert_refused(guest, 0, "2.7.5", f"next is {following}")


@pytest.mark.parametrize("following", [2, 3, 8, 0xFFFF])
def test_next_beyond_an_indirect_table_is_refused(guest: Guest, following: int) -> None:
    length = guest.table(0xA000, (BUFFERS, 1, NEXT, following), (BUFFERS, 1, 0, 0))
    guest.desc(0, 0xA000, length, TABLE)
    assert_refused(guest, 0, "2.7.5", f"next is {following} in a table of 2")


@pytest.mark.parametrize("head", [8, 9, 0x8000, 0xFFFF])
def test_a_head_beyond_the_table_is_refused(guest: Guest, head: int) -> None:
    assert_refused(guest, head, "2.7.6", "beyond the descriptor table", comes_back=False)


def test_a_head_in_use_is_refused_again(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring(name="rx1")
    guest.offer(3)
    chain = ring.pop()
    assert chain is not None
    guest.offer(4, 3, 5)
    assert heads(ring.pop_burst(8)) == [4]
    with pytest.raises(DriverError, match="in use") as caught:
        ring.pop_burst(8)
    assert (caught.value.queue, caught.value.head, caught.value.section) == ("rx1", 3, "2.7.13")
    assert heads(ring.pop_burst(8)) == [5]
    chain.written = 9
    ring.push_burst([chain])
    assert guest.used() == [(3, 9)], "it comes back once, for its first time"
    guest.offer(3)
    assert heads(ring.pop_burst(8)) == [3], "then it may be offered again"


def test_a_head_twice_in_one_burst_is_refused(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring()
    guest.offer(3, 3, 3, 2)
    assert heads(ring.pop_burst(8)) == [3]
    for _ in range(2):
        with pytest.raises(DriverError, match="in use"):
            ring.pop_burst(8)
    assert heads(ring.pop_burst(8)) == [2]
    assert ring.outstanding == 2


def test_a_readable_buffer_after_a_writable_one_is_refused(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 16, NEXT | WRITE, 1)
    guest.desc(1, BUFFERS, 16)
    assert_refused(guest, 0, "2.7.4.2", "readable buffer after a writable one")


def test_a_readable_buffer_in_a_table_after_a_writable_one_is_refused(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 16, NEXT | WRITE, 1)
    guest.desc(1, 0xA000, guest.table(0xA000, (BUFFERS, 1, 0, 0)), TABLE | WRITE)
    assert_refused(guest, 0, "2.7.4.2", "readable buffer after a writable one")


@pytest.mark.parametrize("features", [0, EVENT_IDX | IN_ORDER])
def test_an_indirect_table_that_was_not_negotiated_is_refused(guest: Guest, features: int) -> None:
    guest.desc(0, 0xA000, guest.table(0xA000, (BUFFERS, 1, 0, 0)), TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "not negotiated", features=features)


def test_an_indirect_table_in_an_indirect_table_is_refused(guest: Guest) -> None:
    guest.table(0xB000, (BUFFERS, 1, 0, 0))
    guest.desc(0, 0xA000, guest.table(0xA000, (BUFFERS, 1, 1, 1), (0xB000, 16, TABLE, 0)), TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "inside an indirect table")


def test_an_indirect_table_that_holds_itself_is_refused(guest: Guest) -> None:
    guest.desc(0, 0xA000, guest.table(0xA000, (0xA000, 16, TABLE, 0)), TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "inside an indirect table")


def test_an_indirect_descriptor_that_is_chained_on_is_refused(guest: Guest) -> None:
    guest.desc(0, 0xA000, guest.table(0xA000, (BUFFERS, 1, 0, 0)), TABLE | NEXT, 1)
    guest.desc(1, BUFFERS, 1)
    assert_refused(guest, 0, "2.7.5.3.1", "chained on")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 24, 0xFFFFFFFF])
def test_an_indirect_table_that_is_empty_or_no_multiple_of_16_bytes_is_refused(
    guest: Guest, length: int
) -> None:
    guest.table(0xA000, (BUFFERS, 1, 0, 0), (BUFFERS, 1, 0, 0))
    guest.desc(0, 0xA000, length, TABLE)
    assert_refused(guest, 0, "2.7.5.3", f"table of {length} bytes")


@pytest.mark.parametrize(
    "place", [HOLE, HOLE - 16, THIRD - 16, 1 << 40, 0x4FFF0, TOP - 16, (1 << 63) + 0xA000]
)
def test_an_indirect_table_outside_memory_is_refused(guest: Guest, place: int) -> None:
    guest.desc(0, place, 32, TABLE)
    assert_refused(guest, 0, "2.7.5.3", "table is not in the guest's memory")


@pytest.mark.parametrize("written", [0, WRITE])
@pytest.mark.parametrize(
    ("place", "length"),
    [
        (HOLE, 1),
        (HOLE - 1, 2),  # into the hole
        (HOLE - 0x100, THIRD - HOLE + 0x200),  # over the hole
        (THIRD - 1, 2),
        (0x50000, 1),
        (1 << 40, 1),
        (1 << 63, 1),
        (0, 0xFFFFFFFF),
        (TOP - 1, 2),  # wraps around 2^64
        (TOP - 0x1000, 0x2000),
        (TOP - 1, 0xFFFFFFFF),
        (TOP - 0x20000, 0x10001),
    ],
)
@pytest.mark.parametrize("place_in_chain", ["single", "first", "last", "indirect"])
def test_a_buffer_outside_memory_is_refused(
    guest: Guest, place: int, length: int, written: int, place_in_chain: str
) -> None:
    if place_in_chain == "single":
        guest.desc(0, place, length, written)
    elif place_in_chain == "first":
        guest.desc(0, place, length, NEXT | written, 1)
        guest.desc(1, BUFFERS, 1, WRITE)
    elif place_in_chain == "last":
        guest.desc(0, BUFFERS, 1, NEXT, 1)
        guest.desc(1, place, length - 1 if length > 1 << 31 else length, written)
    else:
        guest.desc(0, 0xA000, guest.table(0xA000, (place, length, written, 0)), TABLE)
    assert_refused(guest, 0, "2.7.5", "buffer is not in the guest's memory")


@pytest.mark.parametrize("first", [1, 0x1000])
def test_a_chain_of_more_than_2_to_the_32_bytes_is_refused(guest: Guest, first: int) -> None:
    guest.desc(0, BUFFERS, first, NEXT, 1)
    guest.desc(1, BUFFERS, first, NEXT, 2)
    guest.desc(2, BUFFERS, 0xFFFFFFFF, 0)
    assert_refused(guest, 0, "2.7.5.2", "2\\^32 bytes")


def test_in_order_next_is_the_next_descriptor(guest: Guest) -> None:
    guest.desc(2, BUFFERS, 1, NEXT, 4)
    guest.desc(4, BUFFERS, 1)
    assert_refused(guest, 2, "2.7.5.2", "IN_ORDER", features=IN_ORDER)


def test_in_order_next_in_a_table_is_the_next_descriptor(guest: Guest) -> None:
    guest.desc(
        0,
        0xA000,
        guest.table(0xA000, (BUFFERS, 1, NEXT, 2), (BUFFERS, 1, 0, 0), (BUFFERS, 1, 0, 0)),
        TABLE,
    )
    assert_refused(guest, 0, "2.7.5.3.1", "IN_ORDER", features=IN_ORDER | INDIRECT)


def test_in_order_next_in_a_table_never_wraps_with_the_queue(guest: Guest) -> None:
    # Descriptor 7 of the ring is followed by 0, descriptor 7 of a table is not.
    guest.table(0xA000, *((BUFFERS, 1, NEXT, n + 1 if n < 7 else 0) for n in range(10)))
    guest.desc(0, 0xA000, 160, TABLE)
    assert_refused(guest, 0, "2.7.5.3.1", "IN_ORDER", features=IN_ORDER | INDIRECT)


def test_in_order_a_bad_chain_waits_for_its_turn(guest: Guest) -> None:
    guest.desc(0, 1 << 40, 1)
    assert_refused(guest, 0, "2.7.5", "memory", features=IN_ORDER)


def test_in_order_a_chain_wraps_at_the_end_of_the_table(guest: Guest) -> None:
    guest.desc(7, BUFFERS, 1, NEXT, 0)
    guest.desc(0, BUFFERS, 2, NEXT, 1)
    guest.desc(1, 0xA000, guest.table(0xA000, (BUFFERS, 3, NEXT, 1), (BUFFERS, 4, 2, 0)), TABLE)
    guest.offer(7)
    chain = guest.ring(IN_ORDER | INDIRECT).pop()
    assert chain is not None and sizes(chain) == ([1, 2, 3], [4])


@pytest.mark.parametrize("start", [0, 6, 0xFFFE])
@pytest.mark.parametrize(
    ("flags", "singles"),
    [
        ((0, 0, 0, 0), True),
        ((WRITE, 0, TABLE, 0), True),
        ((TABLE, 0, 0, 0), False),
        ((NEXT, 0, 0, 0), False),
        ((0, 0, 0, TABLE), False),
        ((0, 0, 0, NEXT | WRITE), False),
    ],
)
def test_a_look_ahead_tells_single_buffers(
    memory: GuestMemory, start: int, flags: tuple[int, ...], singles: bool
) -> None:
    """And takes nothing, nor minds heads that cannot be."""
    guest = Guest(memory, start=start)
    ring = guest.ring()
    for head, flag in enumerate(flags):
        guest.desc(7 - head, BUFFERS, 16, flag)
    guest.offer(7, 6, 5, 4)
    assert ring.singles_ahead(4) == singles and ring.waiting() == 4
    assert ring.singles_ahead(1) == (flags[0] in (0, WRITE))
    guest = Guest(memory)
    guest.offer(0xFFFF, 5, 0x8004)
    assert guest.ring().singles_ahead(3) == singles


@pytest.mark.parametrize("ahead", [9, 10, 100, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("start", [0, 0xFFF0])
@pytest.mark.parametrize("by", ["pop", "available", "enable_kicks"])
def test_an_available_index_too_far_ahead_is_refused(
    memory: GuestMemory, ahead: int, start: int, by: str
) -> None:
    guest = Guest(memory, 8, start)
    fill_singles(guest)
    ring = guest.ring(name="rx1")
    guest.offer(0)
    held = ring.pop_burst(1)
    guest.offered = (start + 1 + ahead) % 65536
    guest.offer()
    with pytest.raises(DriverError, match=f"went {ahead} entries ahead") as caught:
        getattr(ring, by)()
    error = caught.value
    assert (error.queue, error.head, error.section) == ("rx1", None, "2.7.13.3")
    assert ring.pop_burst(8) == [] and ring.available() == 0, "what was meant is not known"
    guest.offer(1, 2)
    chains = ring.pop_burst(8)
    assert heads(chains) == [1, 2], "the queue works on"
    ring.push_burst(chains + held)
    assert guest.used() == [(1, 0), (2, 0), (0, 0)]


def test_an_available_index_that_goes_back_is_refused(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring()
    guest.offer(0, 1)
    ring.push_burst(ring.pop_burst(8))
    guest.offered = 1
    guest.offer()
    with pytest.raises(DriverError, match="went 65535 entries ahead"):
        ring.pop()


def test_several_bad_chains_come_one_by_one(guest: Guest) -> None:
    fill_singles(guest)
    for index in (0, 2, 3):
        guest.desc(index, HOLE, 1)
    guest.offer(0, 1, 2, 3, 4)
    ring = guest.ring()
    outcome: list[object] = []
    while ring.available():
        try:
            outcome.append(heads(ring.pop_burst(8)))
        except DriverError as error:
            outcome.append(error.head)
    assert outcome == [0, [1], 2, 3, [4]]
    ring.publish()
    assert guest.used() == [(0, 0), (2, 0), (3, 0)]


# --- any table at all ----------------------------------------------------------------------------


def in_ram(gpa: int, length: int) -> bool:
    return any(start <= gpa and gpa + length <= end for start, end in RAM)


def walk(
    memory: GuestMemory, size: int, features: int, head: int
) -> list[tuple[int, int, bool]] | None:
    """A chain as virtio 1.3, 2.7.5 describes it: its buffers; None when it breaks a rule."""

    def at(place: int) -> tuple[int, int, int, int]:
        gpa, length, flags, following = struct.unpack("<QIHH", memory.read(place, 16))
        return gpa, length, flags, following

    found: list[tuple[int, int, bool]] = []
    table, entries, index, nested = DESC, size, head, False
    while True:
        if index >= entries:
            return None
        gpa, length, flags, following = at(table + 16 * index)
        if flags & TABLE:
            broken = nested or flags & NEXT or not features & INDIRECT
            if broken or not length or length % 16 or not in_ram(gpa, length):
                return None
            table, entries, index, nested = gpa, length // 16, 0, True
            continue
        found.append((gpa, length, bool(flags & WRITE)))
        if len(found) > size:
            return None
        if not flags & NEXT:
            break
        if features & IN_ORDER:
            right = index + 1 if nested or index + 1 < size else 0
            if following != right:
                return None
        index = following
    kinds = [writable for _, _, writable in found]  # 2.7.4.2 speaks of elements, empty ones too
    kept = [buffer for buffer in found if buffer[1]]
    if kinds != sorted(kinds) or sum(length for _, length, _ in kept) > 1 << 32:
        return None
    return kept if all(in_ram(gpa, length) for gpa, length, _ in kept) else None


def merged(memory: GuestMemory, views: Sequence[memoryview]) -> bytes:
    return b"".join(bytes(view) for view in views)


ADDRESSES = st.one_of(
    st.sampled_from([0x4000, 0x5008, 0xA000, SEAM - 24, HOLE - 64, THIRD, TOP - 32]),
    st.sampled_from([0x4000, 0xA000, SEAM - 24]),
    st.integers(0x4000, HOLE + 64),
    st.integers(0, TOP - 1),
)
LENGTHS = st.one_of(
    st.sampled_from([16, 32, 48, 64]), st.integers(0, 80), st.integers(0, 0xFFFFFFFF)
)
DESCRIPTORS = st.tuples(
    ADDRESSES,
    LENGTHS,
    st.sampled_from([0, WRITE, NEXT, NEXT, NEXT | WRITE, TABLE, TABLE | WRITE, TABLE | NEXT, 0x8]),
    st.one_of(st.integers(0, 4), st.integers(0, 0xFFFF)),
)


@settings(max_examples=400, deadline=None)
@given(
    table=st.lists(DESCRIPTORS, min_size=4, max_size=4),
    indirect=st.lists(DESCRIPTORS, max_size=5),
    heads_offered=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF)), max_size=4),
    features=st.sampled_from([0, INDIRECT, INDIRECT, INDIRECT | IN_ORDER, IN_ORDER]),
    start=st.sampled_from([0, 0xFFFE]),
)
@example([(0xA000, 32, TABLE, 0)] * 4, [(BUFFERS, 1, NEXT, 1)] * 2, [0, 1], INDIRECT, 0xFFFE)
def test_any_table_gives_what_the_specification_says_and_harms_nothing(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads_offered: list[int],
    features: int,
    start: int,
) -> None:
    with GuestMemory.allocate(*LAYOUT) as memory:
        guest = Guest(memory, 4, start)
        for place in (0x4000, 0xA000, SEAM - 24):
            guest.table(place, *indirect)
        for index, descriptor in enumerate(table):
            guest.desc(index, *descriptor)
        guest.offer(*heads_offered)
        before = guest.all_but_the_used_ring()
        ring = guest.ring(features)
        taken: list[Chain] = []
        refused: list[int | None] = []
        order: list[int | None] = []
        for _ in range(len(heads_offered) + 1):
            try:
                chains = ring.pop_burst(8)
            except DriverError as error:
                refused.append(error.head)
                order.append(error.head)
            else:
                taken += chains
                order += heads(chains)
        assert order == heads_offered, "each is given or refused, in order, once"
        # Used elements of refused chains are in place now, and the table is as it was.
        good = {chain.head: chain for chain in taken}
        for head in set(heads_offered):
            buffers = walk(memory, 4, features, head) if head < 4 else None
            if head in good:
                chain = good[head]
                assert buffers is not None, "what breaks a rule is refused"
                for views, writable in ((chain.readable, False), (chain.writable, True)):
                    parts = [(g, n) for g, n, w in buffers if w == writable]
                    assert sum(map(len, views)) == sum(n for _, n in parts)
                    if sum(n for _, n in parts) < 0x1000:
                        expected = b"".join(memory.read(g, n) for g, n in parts)
                        assert merged(memory, views) == expected
            else:
                assert buffers is None, "what breaks no rule is given"
        ring.push_burst(taken)
        valid: list[int] = []
        out: set[int] = set()
        for head in heads_offered:
            if head < 4 and head not in out:
                valid.append(head)
                if head in good or (features & IN_ORDER and out):  # a bad one may have to wait
                    out.add(head)
        back = [head for head, _ in guest.used()]
        assert back == valid if features & IN_ORDER else sorted(back) == sorted(valid)
        assert guest.all_but_the_used_ring() == before
        assert ring.outstanding == 0


# --- a guest that changes its mind ---------------------------------------------------------------


class ChangingMemory(GuestMemory):
    """Does what `changes` has for an address just after the device translated it.

    Buffers over the seam of two regions always take this way.
    """

    changes: ClassVar[dict[int, Callable[[], None]]] = {}

    def views(self, gpa: int, length: int) -> list[memoryview]:
        found = super().views(gpa, length)
        self.changes.pop(gpa, lambda: None)()
        return found


@pytest.fixture
def changing() -> Iterator[ChangingMemory]:
    with ChangingMemory.allocate(*LAYOUT) as memory:
        yield memory
    ChangingMemory.changes.clear()


def test_a_descriptor_is_used_as_it_was_first_read(changing: ChangingMemory) -> None:
    guest = Guest(changing)
    guest.desc(0, SEAM - 1, 2, NEXT, 3)
    guest.desc(3, SEAM - 2, 3, NEXT | WRITE, 1)
    guest.desc(1, SEAM - 3, 5, WRITE, 0)
    guest.offer(0)
    for index, place in ((0, SEAM - 1), (3, SEAM - 2), (1, SEAM - 3)):
        changing.changes[place] = lambda index=index: guest.desc(  # type: ignore[misc]
            index, 1 << 50, 0x7777, TABLE | NEXT, 0x7777
        )
    chain = guest.ring().pop()
    assert not changing.changes, "the guest had its chance"
    assert chain is not None and sizes(chain) == ([1, 1], [2, 1, 3, 2])


def test_a_table_entry_is_used_as_it_was_first_read(changing: ChangingMemory) -> None:
    guest = Guest(changing)
    length = guest.table(0xA000, (SEAM - 1, 2, NEXT, 1), (SEAM - 2, 5, WRITE, 0))
    guest.desc(0, 0xA000, length, TABLE)
    guest.offer(0)
    changing.changes.update(
        {
            0xA000: lambda: guest.desc(0, 1 << 50, 3, NEXT, 5),
            SEAM - 1: lambda: guest.memory.write(
                0xA000, struct.pack("<QIHH", 1 << 50, 1, TABLE, 99)
            ),
            SEAM - 2: lambda: guest.memory.write(
                0xA010, struct.pack("<QIHH", 1 << 50, 1, NEXT, 99)
            ),
        }
    )
    chain = guest.ring(INDIRECT).pop()
    assert not changing.changes.keys() - {0xA000}, "the guest had its chance"
    assert chain is not None and sizes(chain) == ([1, 1], [2, 3])


def test_a_descriptor_that_changes_all_the_time_is_never_half_of_two(guest: Guest) -> None:
    """A thread swaps two descriptors for each other while the device reads them."""
    # Only as wholes are they good: the address of one with the length of the other is not.
    one = struct.pack("<QIHH", HOLE - 16, 16, 0, 0)
    other = struct.pack("<QIHH", THIRD, 0x1000, WRITE, 0)
    view = guest.memory.view(DESC, 16)
    view[:] = one
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            view[:] = other
            view[:] = one

    thread = threading.Thread(target=swap)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    seen = set()
    try:
        thread.start()
        ring = guest.ring()
        for _ in range(3000):
            guest.offer(0)
            (chain,) = ring.pop_burst(1)
            seen.add((chain.readable_size, chain.writable_size))
            ring.push_burst([chain])
    finally:
        done.set()
        thread.join(10)
        sys.setswitchinterval(interval)
    assert seen <= {(16, 0), (0, 0x1000)}


def test_the_devices_positions_never_come_back_from_the_guest(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring(EVENT_IDX)
    for round in range(5):
        guest.offer(0, 1)
        chains = ring.pop_burst(8)
        guest.memory.write(USED, b"\xaa" * (6 + 8 * 8))  # all of the device's part of the ring
        ring.push_burst(chains)
        assert guest.used_idx == ring.next_used == ring.next_avail == 2 * round + 2
        assert guest.used() == [(0, 0), (1, 0)]


# --- giving back ---------------------------------------------------------------------------------


def test_nothing_is_seen_before_publish_and_then_all(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(0, 1, 2, 3)
    ring = guest.ring()
    chains = ring.pop_burst(8)
    assert ring.publish() == 0
    for written, chain in enumerate(chains[:3]):
        chain.written = written
        ring.write_used(chain)
        assert guest.used_idx == 0 and ring.next_used == written + 1
    assert ring.outstanding == 1
    assert ring.publish() == 3 and ring.publish() == 0
    assert guest.used() == [(0, 0), (1, 1), (2, 2)]
    ring.push_burst([])
    assert guest.used() == []
    ring.push_burst([chains[3]])
    assert guest.used() == [(3, 0)]


def test_chains_go_back_in_any_order_over_the_end_of_the_ring(memory: GuestMemory) -> None:
    guest = Guest(memory, 8, start=0xFFFD)
    fill_singles(guest)
    guest.offer(*range(8))
    ring = guest.ring()
    chains = ring.pop_burst(8)
    for chain in chains:
        chain.written = chain.head + 1
    ring.write_used_burst([chains[n] for n in (4, 2, 7, 0)])
    ring.write_used_burst(iter([chains[n] for n in (1, 6, 5, 3)]))
    assert ring.publish() == 8 and guest.used_idx == 5
    assert guest.used() == [(n, n + 1) for n in (4, 2, 7, 0, 1, 6, 5, 3)]


def test_the_largest_written_length_fits(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 16, WRITE)
    guest.offer(0)
    ring = guest.ring()
    (chain,) = ring.pop_burst(1)
    chain.written = 0xFFFFFFFF
    ring.push_burst([chain])
    assert guest.used() == [(0, 0xFFFFFFFF)]


@pytest.mark.parametrize("features", [0, IN_ORDER])
@pytest.mark.parametrize("how", ["write_used", "push_burst"])
def test_giving_back_a_stranger_or_twice_is_a_usage_error_and_changes_nothing(
    guest: Guest, memory: GuestMemory, features: int, how: str
) -> None:
    fill_singles(guest)
    guest.offer(0, 1, 2, 3)
    ring = guest.ring(features)
    chains = ring.pop_burst(8)
    ring.push_burst(chains[:1])
    ring.undo_pop(chains[3:])
    assert guest.used() == [(0, 0)]
    before = memory.read(0, SEAM)
    for stray in (
        chains[0],  # given back already
        Chain(1, (), ()),  # a stranger with a head that is out
        Chain(5, (), ()),  # and with one that is not
        Chain(8, (), ()),  # and with one that this queue does not have
        Chain(-1, (), ()),
        chains[3],  # put back
    ):
        with pytest.raises(UsageError, match=r"queue: Chain.*is not outstanding"):
            if how == "write_used":
                ring.write_used(stray)
            else:
                ring.push_burst([stray])
        with pytest.raises(UsageError, match=r"queue: Chain.*is not outstanding"):
            ring.undo_pop([stray])
        with pytest.raises(UsageError, match=r"queue: Chain.*is not outstanding"):
            ring.undo_pop([chains[2], stray])
        assert memory.read(0, SEAM) == before
        assert (ring.next_used, ring.next_avail, ring.outstanding) == (1, 3, 2)
        assert ring.publish() == 0
    ring.push_burst(chains[1:3])
    assert guest.used() == [(1, 0), (2, 0)]
    assert ring.pop_burst(8) == chains[3:]


@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_what_stands_before_a_stranger_is_given_back(guest: Guest, features: int) -> None:
    fill_singles(guest)
    guest.offer(0, 1, 2)
    ring = guest.ring(features)
    chains = ring.pop_burst(8)
    with pytest.raises(UsageError, match="not outstanding"):
        ring.write_used_burst([chains[0], chains[0], chains[1]])
    assert ring.publish() == 1 and guest.used() == [(0, 0)]
    ring.push_burst(chains[1:])
    assert guest.used() == [(1, 0), (2, 0)]


def test_in_order_a_chain_waits_for_older_ones(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(5, 0, 3, 1)
    ring = guest.ring(IN_ORDER)
    chains = ring.pop_burst(2) + ring.pop_burst(8)
    for chain in chains:
        chain.written = chain.head + 10
    ring.write_used(chains[2])
    assert ring.publish() == 0 and guest.used_idx == 0
    assert not ring.should_notify()
    assert ring.outstanding == 4
    ring.push_burst([chains[0]])
    assert guest.used() == [(5, 15)]
    ring.push_burst([chains[1]])
    assert guest.used() == [(0, 10), (3, 13)], "and what waited comes along"
    with pytest.raises(UsageError, match="not outstanding"):
        ring.write_used(chains[2])
    ring.push_burst([chains[3]])
    assert guest.used() == [(1, 11)]
    assert ring.outstanding == 0


def test_in_order_a_chain_that_waits_cannot_be_given_back_or_put_back(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(0, 1)
    ring = guest.ring(IN_ORDER)
    first, second = ring.pop_burst(8)
    ring.write_used(second)
    with pytest.raises(UsageError, match="not outstanding"):
        ring.write_used(second)
    with pytest.raises(UsageError, match="not outstanding"):
        ring.undo_pop([second])
    ring.push_burst([first])
    assert guest.used() == [(0, 0), (1, 0)]


# --- putting back --------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_chains_put_back_come_again_as_they_were_read(guest: Guest, features: int) -> None:
    fill_singles(guest)
    guest.offer(3, 4, 5, 6)
    ring = guest.ring(features)
    chains = ring.pop_burst(3)
    chains[1].written = 7
    ring.undo_pop(chains[1:])
    assert (ring.next_avail, ring.outstanding, ring.available()) == (1, 1, 3)
    guest.desc(4, 1 << 40, 0x7777, TABLE)  # too late: the chain is as it was
    again = ring.pop_burst(1)
    assert again == chains[1:2] and again[0].written == 0
    ring.undo_pop(again)
    assert ring.pop_burst(0) == [] and ring.pop_burst(8) == chains[1:3]
    assert ring.next_avail == 3
    chains += ring.pop_burst(8)
    assert heads(chains) == [3, 4, 5, 6]
    ring.undo_pop(chains)
    assert (ring.next_avail, ring.outstanding, ring.available()) == (0, 0, 4)
    assert ring.enable_kicks()
    assert ring.pop() is chains[0]
    assert ring.pop_burst(8) == chains[1:]
    ring.push_burst(chains)
    assert heads(chains) == [head for head, _ in guest.used()]


def test_chains_put_back_in_two_steps_keep_their_order(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(0, 1, 2, 3)
    ring = guest.ring()
    chains = ring.pop_burst(8)
    ring.undo_pop(chains[2:])
    ring.undo_pop(chains[:2])
    assert ring.pop_burst(8) == chains


def test_a_chain_cannot_be_put_back_twice(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(0, 1)
    ring = guest.ring()
    chains = ring.pop_burst(8)
    with pytest.raises(UsageError, match="not outstanding"):
        ring.undo_pop([chains[1], chains[1]])
    ring.undo_pop(chains)
    with pytest.raises(UsageError, match="not outstanding"):
        ring.undo_pop(chains[1:])
    assert ring.pop_burst(8) == chains and ring.pop() is None


def test_a_later_device_goes_on_with_what_was_put_back(guest: Guest) -> None:
    fill_singles(guest)
    guest.offer(0, 1, 2, 3)
    ring = guest.ring()
    chains = ring.pop_burst(3)
    ring.push_burst(chains[:1])
    ring.undo_pop(chains[1:])
    later = guest.ring(next_avail=ring.next_avail, next_used=ring.next_used)
    chains = later.pop_burst(8)
    assert heads(chains) == [1, 2, 3]
    later.push_burst(chains)
    assert guest.used() == [(0, 0), (1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize("features", [0, IN_ORDER])
@pytest.mark.parametrize("bad", ["a chain", "a head", "the index"])
def test_what_stands_before_a_bad_chain_is_left_over_when_it_is_put_back(
    guest: Guest, features: int, bad: str
) -> None:
    """Found by audit: `next_avail` went back by as many as were put back, so a later device got the
    bad chain again and never the good one before it."""
    fill_singles(guest)
    ring = guest.ring(features)
    guest.offer(0, 1)
    chains = ring.pop_burst(8)
    if bad == "a chain":
        guest.desc(2, 1 << 40, 64)
        guest.offer(2)
    elif bad == "a head":
        guest.offer(0xFFFF)
    else:
        guest.offered += 100
        guest.offer()
    with pytest.raises(DriverError):
        ring.pop()
    place = ring.next_avail
    guest.offer(3)
    chains += ring.pop_burst(8)
    assert heads(chains) == [0, 1, 3]
    ring.undo_pop(chains[1:])
    assert (ring.next_avail, ring.left_over) == (place, [1])
    assert ring.pop_burst(8) == chains[1:] and ring.left_over == []
    ring.undo_pop(chains)
    assert (ring.next_avail, ring.left_over) == (place, [0, 1])
    ring.publish()
    later = guest.ring(
        features, next_avail=ring.next_avail, next_used=ring.next_used, resubmit=ring.left_over
    )
    assert later.left_over == [0, 1]
    again = [chain for _ in range(3) for chain in later.pop_burst(1)]
    assert heads(again) == [0, 1, 3] and later.pop() is None
    later.push_burst(again)
    assert [head for head, _ in guest.used()][-3:] == [0, 1, 3]


def test_a_chain_offered_again_too_early_is_put_back_like_any_other(guest: Guest) -> None:
    """Fuzzing `ring`: a driver that did not wait for a chain of an earlier device to be published
    had it counted as that device's still, and the chain before it was lost when put back."""
    fill_singles(guest)
    guest.offered = 1
    ring = guest.ring(next_avail=1, resubmit=[5])
    (old,) = ring.pop_burst(1)
    ring.write_used(old)
    guest.offer(7, 5)
    chains = ring.pop_burst(8)
    assert heads(chains) == [7, 5]
    ring.undo_pop(chains)
    assert (ring.next_avail, ring.left_over) == (1, [])


# --- chains of an earlier device -----------------------------------------------------------------


@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_the_inflight_log_hears_of_every_step_in_order(memory: GuestMemory, features: int) -> None:
    guest = Guest(memory, 8, start=0xFFFE)
    fill_singles(guest)
    guest.desc(4, HOLE, 1)
    notes = Notes(guest)
    ring = guest.ring(features, inflight_log=notes)
    assert notes.take() == []
    guest.offer(0, 1, 2, 3)
    chains = ring.pop_burst(4)
    assert notes.take() == [("popped", 0, 1, 2, 3)]
    ring.undo_pop(chains[2:])
    assert notes.take() == [("unpopped", 2, 3)]
    assert ring.pop_burst(1) == chains[2:3]
    assert notes.take() == [("popped", 2)]
    ring.write_used_burst(chains[:3])
    assert notes.take() == []
    ring.publish()
    assert notes.take() == [("publishing", 0, 1, 2, 1), ("published", 0, 1, 2, 1)]
    ring.publish()
    assert notes.take() == []
    guest.offer(4)
    ring.push_burst(ring.pop_burst(1))
    assert notes.take() == [("popped", 3), ("publishing", 3, 2), ("published", 3, 2)]
    with pytest.raises(DriverError):
        ring.pop()
    ring.publish()
    assert notes.take() == [("popped", 4), ("publishing", 4, 3), ("published", 4, 3)]
    assert guest.used() == [(head, 0) for head in range(5)]


@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_chains_of_an_earlier_device_come_first_and_do_not_move_next_avail(
    memory: GuestMemory, features: int
) -> None:
    guest = Guest(memory, 8, start=0xFFFE)
    fill_singles(guest)
    guest.offer(5, 6, 7, 0)
    notes = Notes(guest)
    # The earlier device had popped 5, 6 and 7 and given back none.
    ring = guest.ring(features, next_avail=1, resubmit=[5, 6, 7], inflight_log=notes)
    assert ring.available() == 4 and ring.enable_kicks()
    assert ring.pop_burst(0) == [] and ring.available() == 4
    chains = ring.pop_burst(8)
    while len(chains) < 3:
        chains += ring.pop_burst(8)
    assert heads(chains) == [5, 6, 7] and ring.next_avail == 1
    assert notes.take() == [("popped", 5), ("popped", 6), ("popped", 7)]
    ring.undo_pop(chains[1:])
    # Notes of an earlier device's chains stay: next_avail is past them already.
    assert ring.next_avail == 1 and notes.take() == [("unpopped",)]
    assert ring.pop_burst(8) == chains[1:]
    last = ring.pop_burst(8)
    assert heads(last) == [0] and ring.next_avail == 2
    ring.undo_pop(last)
    assert ring.next_avail == 1
    ring.push_burst(chains + ring.pop_burst(8))
    assert guest.used() == [(5, 0), (6, 0), (7, 0), (0, 0)]
    guest.offer(5)
    chains = ring.pop_burst(8)
    assert heads(chains) == [5] and ring.next_avail == 3
    ring.undo_pop(chains)
    assert ring.next_avail == 2, "given back once, 5 is like any other"


@pytest.mark.parametrize("features", [0, IN_ORDER])
def test_a_bad_chain_of_an_earlier_device_is_refused_once(guest: Guest, features: int) -> None:
    fill_singles(guest)
    guest.desc(5, HOLE, 1)
    guest.offer(1)
    ring = guest.ring(features, resubmit=[5, 0xFFFF, 2, 2])
    outcome: list[object] = []
    while ring.available():
        try:
            outcome.append(heads(ring.pop_burst(8)))
        except DriverError as error:
            outcome.append(error.head)
    assert outcome == [5, 0xFFFF, [2], 2, [1]]
    assert ring.next_avail == 1
    ring.publish()
    assert guest.used() == [(5, 0)]


# --- the dirty log -------------------------------------------------------------------------------


def test_the_dirty_log_has_what_was_written_and_the_used_ring(memory: GuestMemory) -> None:
    # One region less: a bitmap cannot cover the end of the address space.
    low = GuestMemory(memory.regions[:3])
    bitmap = bytearray(0x50 // 8)
    low.dirty_log = DirtyLog(bitmap)

    def dirty() -> list[int]:
        pages = [n for n in range(0x50) if bitmap[n // 8] >> n % 8 & 1]
        bitmap[:] = bytes(len(bitmap))
        return pages

    guest = Guest(low, 8)
    guest.desc(0, 0x8000, 16, NEXT, 1)
    guest.desc(1, 0x9FF0, 0x1010, NEXT | WRITE, 2)  # pages 9, 0xA
    guest.desc(2, SEAM - 1, 3, NEXT | WRITE, 3)  # pages 0xF, 0x10
    guest.desc(3, 0x41000, 0x2000, WRITE)  # pages 0x41, 0x42
    for written, pages in (
        (0, []),
        (1, [9]),
        (0x10, [9]),
        (0x11, [9, 0xA]),
        (0x1010, [9, 0xA]),
        (0x1011, [9, 0xA, 0xF]),
        (0x1012, [9, 0xA, 0xF, 0x10]),
        (0x1013, [9, 0xA, 0xF, 0x10]),
        (0x1014, [9, 0xA, 0xF, 0x10, 0x41]),
        (0x1013 + 0x1000, [9, 0xA, 0xF, 0x10, 0x41]),
        (0x1013 + 0x1001, [9, 0xA, 0xF, 0x10, 0x41, 0x42]),
        (0x3013, [9, 0xA, 0xF, 0x10, 0x41, 0x42]),
    ):
        guest.offer(0)
        dirty()
        ring = guest.ring(next_avail=guest.seen, next_used=guest.seen)
        chains = ring.pop_burst(1)
        assert dirty() == [], "popping writes nothing"
        chains[0].written = written
        ring.push_burst(chains)
        assert dirty() == [3, *pages], hex(written)
        assert guest.used() == [(0, written)]
    ring.disable_kicks()
    assert dirty() == [3]
    ring.enable_kicks()
    assert dirty() == [3]
    assert not ring.publish() and dirty() == []


def test_the_dirty_log_has_all_pages_of_a_long_used_ring() -> None:
    with GuestMemory.allocate(0x200000) as memory:
        bitmap = bytearray(0x200 // 8)
        memory.dirty_log = DirtyLog(bitmap)
        guest = Guest(memory, 1024)  # 8 KiB and 6 bytes of used ring at 0xA0000
        fill_singles(guest, length=0)
        ring = guest.ring(EVENT_IDX)
        bitmap[:] = bytes(len(bitmap))
        ring.enable_kicks()
        assert bitmap[0xA0 // 8] == 0b100, "avail_event alone"
        guest.offer(*range(1024))
        ring.push_burst(ring.pop_burst(1024))
        assert bitmap[0xA0 // 8] == 0b111
        assert sum(bitmap[n] for n in range(len(bitmap)) if n not in (0xA0 // 8, 0x80 // 8)) == 0


# --- notifications -------------------------------------------------------------------------------


def used_up(guest: Guest, ring: SplitRing, count: int) -> None:
    for _ in range(count):
        guest.offer(0)
        ring.push_burst(ring.pop_burst(1))


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_the_first_call_is_always_made(memory: GuestMemory, features: int) -> None:
    # What an earlier device told the driver is not known.
    guest = Guest(memory, 8, start=100)
    guest.desc(0, BUFFERS, 1)
    guest.want_calls(flags=1, used_event=99)
    ring = guest.ring(features)
    assert not ring.should_notify(), "but not for nothing"
    used_up(guest, ring, 1)
    assert ring.should_notify()
    assert not ring.should_notify(), "and once"
    used_up(guest, ring, 1)
    assert not ring.should_notify()


def test_without_event_idx_the_flag_decides_and_used_event_means_nothing(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 1)
    ring = guest.ring()
    used_up(guest, ring, 1)
    ring.should_notify()
    for flags, wanted in ((1, False), (0, True), (0xFFFF, False), (0xFFFE, True)):
        for used_event in (ring.next_used, 0x7777):
            guest.want_calls(flags=flags, used_event=used_event)
            used_up(guest, ring, 1)
            assert ring.should_notify() == wanted
            assert not ring.should_notify(), "nothing new"


def test_with_event_idx_the_flag_means_nothing(guest: Guest) -> None:
    guest.desc(0, BUFFERS, 1)
    ring = guest.ring(EVENT_IDX)
    used_up(guest, ring, 1)
    ring.should_notify()
    guest.want_calls(flags=1, used_event=1)
    used_up(guest, ring, 1)
    assert ring.should_notify()
    used_up(guest, ring, 1)
    assert not ring.should_notify()


@pytest.mark.parametrize("start", [0, 1, 0x7FFE, 0xFFF8, 0xFFFE])
def test_a_call_is_due_when_the_used_index_passes_used_event(
    memory: GuestMemory, start: int
) -> None:
    # virtio 1.3, 2.7.7.2: due when an element was placed at the index that used_event names.
    guest = Guest(memory, 8, start)
    fill_singles(guest)
    ring = guest.ring(EVENT_IDX)
    used_up(guest, ring, 1)
    ring.should_notify()
    for count in (1, 2, 3, 8):
        for away in (*range(-12, 13), 0x7FFF, 0x8000):
            old = ring.next_used
            event = (old + away) % 65536
            guest.want_calls(used_event=event)
            guest.offer(*range(count))
            ring.push_burst(ring.pop_burst(count))
            placed = {(old + n) % 65536 for n in range(count)}
            assert ring.should_notify() == (event in placed), (count, away)


def test_only_what_was_published_counts_towards_a_call(guest: Guest) -> None:
    fill_singles(guest)
    ring = guest.ring(EVENT_IDX)
    used_up(guest, ring, 1)
    ring.should_notify()
    guest.offer(1, 2)
    first, second = ring.pop_burst(2)
    ring.push_burst([first])
    ring.write_used(second)
    guest.want_calls(used_event=2)
    assert not ring.should_notify(), "the element at 2 is not published"
    ring.publish()
    assert ring.should_notify()


@pytest.mark.parametrize("count", [65535, 65536, 65537, 65600])
def test_a_call_is_due_after_65536_chains_without_asking(memory: GuestMemory, count: int) -> None:
    guest = Guest(memory, 64, start=5)
    for index in range(64):
        guest.desc(index, BUFFERS, 1)
    ring = guest.ring(EVENT_IDX)
    used_up(guest, ring, 1)
    ring.should_notify()
    left = count
    slots = struct.pack("<64H", *range(64))
    memory.write(AVAIL + 4, slots)  # any 64 in a row are all different
    while left:
        burst = min(64, left)
        guest.offered = (guest.offered + burst) % 65536
        guest.offer()
        assert len(ring.pop_burst(64)) == burst
        ring.push_burst([c for c in ring._outstanding if c is not None])
        left -= burst
    guest.want_calls(used_event=(6 + 65535) % 65536)  # the one element that 65,535 do not reach
    assert ring.should_notify() == (count > 65535)


@pytest.mark.parametrize("start", [0, 0xFFF0])
def test_kicks_are_wanted_from_the_position_reached(memory: GuestMemory, start: int) -> None:
    guest = Guest(memory, 8, start)
    fill_singles(guest)
    ring = guest.ring(EVENT_IDX)
    for round in range(20):
        guest.offer(round % 8)
        ring.disable_kicks()
        chains = ring.pop_burst(8)
        assert not ring.enable_kicks()
        assert guest.avail_event == guest.offered, "the next entry placed is to be told"
        assert guest.used_flags == 0
        ring.push_burst(chains)


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_enabling_kicks_tells_of_what_came_meanwhile(guest: Guest, features: int) -> None:
    fill_singles(guest)
    ring = guest.ring(features)
    assert not ring.enable_kicks()
    ring.disable_kicks()
    assert guest.used_flags == (0 if features else 1)
    guest.offer(0)
    assert ring.enable_kicks(), "there may be no kick for it"
    assert guest.used_flags == 0
    chain = ring.pop()
    assert chain is not None and not ring.enable_kicks()
    ring.undo_pop([chain])
    assert ring.enable_kicks(), "what was put back waits, too"


def test_the_wish_for_kicks_is_visible_before_the_index_is_read(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest offers a chain just before the barrier; it must be seen or kicked for."""
    fill_singles(guest)
    for features in (0, EVENT_IDX):
        ring = guest.ring(features, next_avail=guest.offered)
        wish = []

        def offer(wish: list[int] = wish) -> None:
            wish.append(guest.avail_event)
            guest.offer(0)

        with monkeypatch.context() as patch:
            patch.setattr(vq.split_ring, "fence", offer)
            assert ring.enable_kicks()
        if features:
            assert wish == [(guest.offered - 1) % 65536]


def test_the_drivers_wish_for_calls_is_read_after_the_barrier(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver asks for calls at the last moment, having seen nothing: it is called."""
    guest.desc(0, BUFFERS, 1)
    for features in (0, EVENT_IDX):
        ring = guest.ring(features, next_avail=guest.offered, next_used=guest.offered)
        used_up(guest, ring, 1)
        ring.should_notify()
        guest.want_calls(flags=0 if features else 1, used_event=0x7777)
        used_up(guest, ring, 1)

        def ask() -> None:
            guest.want_calls(used_event=(guest.offered - 1) % 65536)

        with monkeypatch.context() as patch:
            patch.setattr(vq.split_ring, "fence", ask)
            assert ring.should_notify()


def test_elements_are_in_place_before_the_index_that_covers_them(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_singles(guest)
    guest.offer(3, 5)
    ring = guest.ring()
    ring.write_used_burst(ring.pop_burst(8))
    seen = []
    monkeypatch.setattr(
        vq.split_ring,
        "order_stores",
        lambda: seen.append((guest.used_idx, guest.memory.read(USED + 4, 16))),
    )
    ring.publish()
    assert seen == [(0, struct.pack("<4I", 3, 0, 5, 0))] and guest.used_idx == 2


def test_entries_are_read_after_the_index_that_covers_them(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_singles(guest)
    guest.offer(3, 5)

    def finish() -> None:  # the last moment at which a processor may make the entries seen
        guest.memory.write(AVAIL + 4, struct.pack("<2H", 6, 7))

    monkeypatch.setattr(vq.split_ring, "order_loads", finish)
    assert heads(guest.ring().pop_burst(8)) == [6, 7]


@pytest.mark.parametrize(
    ("features", "flags_or_event", "wanted"),
    [(0, 1, False), (0, 0, True), (EVENT_IDX, 0, False), (EVENT_IDX, 1, True)],
)
def test_features_decide_which_wish_counts(
    guest: Guest, features: int, flags_or_event: int, wanted: bool
) -> None:
    guest.desc(0, BUFFERS, 1)
    ring = guest.ring(features)
    used_up(guest, ring, 1)
    ring.should_notify()
    if features:
        guest.want_calls(flags=1, used_event=flags_or_event)
    else:
        guest.want_calls(flags=flags_or_event, used_event=1)
    used_up(guest, ring, 1)
    assert ring.should_notify() == wanted
