"""Inflight notes: their layout, and what a backend finds after the one before it died."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq.errors import UsageError
from vq.inflight import InflightQueue, InflightRegion
from vq.memory import Region

SIZE = 8


def fresh() -> tuple[bytearray, InflightQueue]:
    memory = bytearray(16 + 16 * SIZE)
    return memory, InflightQueue(memoryview(memory), SIZE)


def test_the_layout_is_the_protocols() -> None:
    memory, notes = fresh()
    assert notes.recover(0xFFFF) is None
    assert memory[:16] == struct.pack("=Q4H", 0, 1, SIZE, 0, 0xFFFF)
    notes.popped([3, 5])
    assert memory[16 + 48 : 16 + 64] == struct.pack("=B5xHQ", 1, 0, 0)
    assert memory[16 + 80 : 16 + 96] == struct.pack("=B5xHQ", 1, 0, 1)
    notes.publishing([5, 3], 1)
    assert memory[:16] == struct.pack("=Q4H", 0, 1, SIZE, 3, 0xFFFF)
    assert memory[16 + 48 : 16 + 64] == struct.pack("=B5xHQ", 1, 5, 0)
    notes.published([5, 3], 1)
    assert memory[:16] == struct.pack("=Q4H", 0, 1, SIZE, 3, 1)
    assert memory[16 + 48] == memory[16 + 80] == 0


def test_queues_lie_on_cache_lines_of_their_own() -> None:
    assert InflightRegion.size_for(3, 8) == 3 * 192
    region = Region.anonymous(0, 3 * 192)
    inflight = InflightRegion(region, 3, 8)
    assert inflight.queue(3) is None
    for index in range(3):
        queue = inflight.queue(index)
        assert queue is not None
        queue.recover(index)
    assert [region.view[192 * index + 14] for index in range(3)] == [0, 1, 2]
    with pytest.raises(UsageError):
        InflightRegion(region, 4, 8)
    inflight.close()


def test_notes_of_an_earlier_ring_begin_anew() -> None:
    memory, notes = fresh()
    notes.recover(100)
    notes.popped([1])
    assert InflightQueue(memoryview(memory), SIZE).recover(0) is None
    assert InflightQueue(memoryview(memory), SIZE).recover(0) == []


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_the_moment_of_death_nothing_is_lost_or_taken_twice(data: st.DataObject) -> None:
    memory, notes = fresh()
    start = data.draw(st.sampled_from([0, 0xFFFC]))
    notes.recover(start)
    used_idx, taken = start, list[int]()
    free = list(range(SIZE))
    for _ in range(data.draw(st.integers(0, 12))):
        taking: bool = data.draw(st.booleans())
        if free and taking:
            heads = [free.pop(0) for _ in range(data.draw(st.integers(1, len(free))))]
            notes.popped(heads)
            taken += heads
        elif taken:
            batch = data.draw(st.lists(st.sampled_from(taken), min_size=1, unique=True))
            notes.publishing(batch, (used_idx + len(batch)) & 0xFFFF)
            if data.draw(st.sampled_from(["die", "live", "live"])) == "die":
                if data.draw(st.booleans()):  # used.idx was stored, the notes were not cleared
                    used_idx = (used_idx + len(batch)) & 0xFFFF
                    taken = [head for head in taken if head not in batch]
                break
            used_idx = (used_idx + len(batch)) & 0xFFFF
            notes.published(batch, used_idx)
            taken = [head for head in taken if head not in batch]
            free += batch
    again = InflightQueue(memoryview(memory), SIZE)
    assert again.recover(used_idx) == taken
    again.popped([head for head in range(SIZE) if head not in taken][:1])
    if len(taken) < SIZE:  # what is taken now comes after what was taken before
        third = InflightQueue(memoryview(memory), SIZE).recover(used_idx)
        assert third is not None
        assert third[:-1] == taken


@given(noise=st.binary(min_size=16 + 16 * SIZE, max_size=16 + 16 * SIZE), used=st.integers(0, 9))
def test_rubbish_is_refused_or_gives_heads_of_the_ring(noise: bytes, used: int) -> None:
    memory = bytearray(noise)
    memory[:12] = struct.pack("=Q2H", 0, 1, SIZE)
    try:
        heads = InflightQueue(memoryview(memory), SIZE).recover(used)
    except UsageError:
        return
    assert heads is None or (len(set(heads)) == len(heads) and set(heads) <= set(range(SIZE)))


def test_what_was_never_taken_is_not_noted() -> None:
    memory, notes = fresh()
    notes.recover(0)
    notes.popped([1, 2, 3])
    notes.unpopped([2])
    assert InflightQueue(memoryview(memory), SIZE).recover(0) == [1, 3]


def test_what_is_taken_up_again_keeps_its_place() -> None:
    """Seen with a backend that was killed twice: it had taken up one of five chains again, and the
    next backend put that behind the four that were still to be taken up. With IN_ORDER the driver
    refused the used element (virtio 1.3, 2.7.9)."""
    memory, notes = fresh()
    notes.recover(0)
    notes.popped([3, 4, 5, 6, 7])
    second = InflightQueue(memoryview(memory), SIZE)
    assert second.recover(0) == [3, 4, 5, 6, 7]
    second.popped([3])
    assert InflightQueue(memoryview(memory), SIZE).recover(0) == [3, 4, 5, 6, 7]
    second.popped([4])
    second.publishing([3], 1)
    second.published([3], 1)
    second.popped([0])
    assert InflightQueue(memoryview(memory), SIZE).recover(1) == [4, 5, 6, 7, 0]


class DyingView:
    """Notes of which no more than `steps` are written: then death comes."""

    def __init__(self, memory: bytearray, steps: int) -> None:
        self.memory = memory
        self.steps = steps

    def __getitem__(self, index: int) -> int:
        return self.memory[index]

    def __setitem__(self, index: int, value: int) -> None:
        if not self.steps:
            raise InterruptedError
        self.steps -= 1
        self.memory[index] = value


@pytest.mark.parametrize("steps", range(4))
def test_death_while_chains_are_put_back_leaves_the_first_ones(steps: int) -> None:
    """The next backend goes on in the available ring behind as many as are noted."""
    memory, notes = fresh()
    notes.recover(0)
    notes.popped([5, 6, 7])
    dying = InflightQueue(DyingView(memory, steps), SIZE)  # type: ignore[arg-type]
    try:
        dying.unpopped([5, 6, 7])
    except InterruptedError:
        assert steps < 3
    assert InflightQueue(memoryview(memory), SIZE).recover(0) == [5, 6, 7][: 3 - steps]
