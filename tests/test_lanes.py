"""Arithmetic on whole columns: the same as number by number."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq.lanes import ADDRESSES, Ranges, alike, all_between, total

MOST = (1 << 64) - 1
EDGES = (0, 1, 0x7FFF, (1 << 63) - 1, 1 << 63, MOST - 1, MOST)


@st.composite
def near_a_range(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Numbers, most of them in or at the edges of the range that comes with them."""
    anywhere = st.sampled_from(EDGES) | st.integers(0, MOST)
    low, high = draw(anywhere), draw(anywhere)
    edges = st.sampled_from([low, low - 1, high, high + 1]).filter(lambda n: 0 <= n <= MOST)
    inside = st.integers(low, high) if low <= high else edges
    return draw(st.lists(inside | edges | inside | anywhere, min_size=1, max_size=70)), low, high


@given(near_a_range())
def test_a_column_is_in_a_range_when_each_of_its_numbers_is(
    case: tuple[list[int], int, int],
) -> None:
    """Numbers and ranges in the upper half of a lane count as outside."""
    numbers, low, high = case
    column = ADDRESSES.column(array("Q", numbers))
    expected = all(low <= number <= min(high, MOST >> 1) for number in numbers)
    assert ADDRESSES.between(column, len(numbers), low, high) is expected


@pytest.mark.parametrize("place", [0, 1, 62, 63])
@pytest.mark.parametrize("stray", [0x0FFF, 0x2001, 1 << 63, MOST])
def test_one_number_outside_is_found_wherever_it_stands(place: int, stray: int) -> None:
    """It must not be hidden by what its neighbours carry over."""
    numbers = [0x1000, 0x2000] * 32
    assert ADDRESSES.between(ADDRESSES.column(array("Q", numbers)), 64, 0x1000, 0x2000)
    numbers[place] = stray
    assert not ADDRESSES.between(ADDRESSES.column(array("Q", numbers)), 64, 0x1000, 0x2000)


@given(
    st.lists(st.integers(0, MOST), min_size=1, max_size=70),
    st.integers(-MOST, MOST),
)
def test_a_column_is_moved_number_by_number(numbers: list[int], distance: int) -> None:
    distance = max(-min(numbers), min(distance, MOST - max(numbers)))
    moved = ADDRESSES.moved(ADDRESSES.column(array("Q", numbers)), len(numbers), distance)
    assert array("Q", moved).tolist() == [number + distance for number in numbers]


@given(
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 9), min_size=1, max_size=70),
    st.integers(0, 1 << 31),
    st.integers(0, 1 << 31),
)
def test_signed_results_are_in_a_range_when_each_of_them_is(
    results: list[int], low: int, high: int
) -> None:
    expected = all(low <= result <= high for result in results)
    assert all_between(array("i", results), low, high) is expected


@pytest.mark.parametrize("count", [1, 2, 6, 7, 40])
@pytest.mark.parametrize("odd", [-11, 0, 9, 201, 0x7FFFFFFF])
def test_one_result_out_of_a_range_is_enough(count: int, odd: int) -> None:
    """Of few, which are looked at one by one, and of many."""
    for at in (0, count - 1):
        results = array("i", range(10, 10 + count))
        assert all_between(results, 10, 200)
        results[at] = odd
        assert not all_between(results, 10, 200)


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=70) | st.just([7, 7, 7]))
def test_alike_and_total_are_what_they_say(numbers: list[int]) -> None:
    for column in (numbers, numbers[:1] * len(numbers)):
        assert alike(array("I", column)) is (len(set(column)) == 1)
        assert total(array("I", column)) == sum(column)


@st.composite
def ranges_near(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    """Addresses with lengths, and between which two addresses most of them lie, some just so."""
    low = draw(st.sampled_from((0, 1, 0x100000, 1 << 63)) | st.integers(0, MOST - 1))
    high = low + draw(st.sampled_from((1, 2, 0x10000, 1 << 31)) | st.integers(1, MOST - low))
    high = min(high, MOST)
    good = st.integers(low, high - 1).flatmap(
        lambda first: st.tuples(
            st.just(first), st.integers(1, min(high - first, (1 << 32) - 1)) | st.just(1)
        )
    )
    up_to_high = st.integers(max(low, high - 0xFFFFFFFF), high - 1).map(lambda n: (n, high - n))
    ranges = draw(st.lists(good | up_to_high, min_size=1, max_size=40))
    odd = st.tuples(
        st.sampled_from((low, max(low - 1, 0), high, high - 1, 0, MOST)) | st.integers(0, MOST),
        st.sampled_from((0, 1, 2, (1 << 32) - 1)) | st.integers(0, (1 << 32) - 1),
    )
    for place, other in draw(st.lists(st.tuples(st.integers(0, 39), odd), max_size=1)):
        ranges.insert(place, other)
    return ranges, low, high


@settings(max_examples=300)
@given(
    ranges_near(),
    st.sampled_from((0, 0x20005, 0xFFFFFFFF)),
    st.sampled_from((1, 1, 1, 1, 20)),
    st.data(),
)
def test_ranges_are_moved_if_all_of_them_lie_between_two_addresses(
    case: tuple[list[tuple[int, int]], int, int], above: int, often: int, data: st.DataObject
) -> None:
    """And none of them is empty. What stands above a length has no meaning."""
    ranges, low, high = case
    distance = data.draw(st.integers(-low, MOST - high) | st.sampled_from((-low, MOST - high)))
    words = b"".join(struct.pack("<QII", first, length, above) for first, length in ranges)
    mover = Ranges(low, high, distance)
    moved = mover.moved(words * often)
    assert mover.moved(words * often) == moved
    if not all(low <= first and 0 < length <= high - first for first, length in ranges):
        assert moved is None
        return
    assert moved is not None
    got = struct.iter_unpack("<QQ", moved)
    assert list(got) == [(first + distance, length) for first, length in ranges] * often


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("first", "length", "good"),
    [
        (0x1000, 1, True),
        (0xFFF, 1, False),
        (0xFFF, 0x1001, False),
        (0x1FFF, 1, True),
        (0x1FFF, 2, False),
        (0x2000, 1, False),
        (0x1000, 0x1000, True),
        (0x1000, 0x1001, False),
        (0x1800, 0, False),
        (0x1800, 0xFFFFFFFF, False),
        (MOST, 1, False),
    ],
)
def test_one_range_that_does_not_lie_there_is_enough(
    first: int, length: int, good: bool, at: int
) -> None:
    """Also among so many that they are not looked at all at once."""
    usual = struct.pack("<QQ", 0x1100, 0x100)
    few = usual * at + struct.pack("<QQ", first, length) + usual * (2 - at)
    for ranges in (few, usual * 300 + few, few + usual * 300):
        assert Ranges(0x1000, 0x2000, 0).moved(ranges) == (ranges if good else None)


def test_less_than_a_megabyte_is_remembered_of_ranges() -> None:
    """Whoever writes descriptors chooses how many there are."""
    mover = Ranges(1, 1 << 32, 1 << 40)
    for count in range(1, 1025):
        assert mover.moved(struct.pack("<QQ", 5, 6) * count) is not None
    kept = sum(number.bit_length() // 8 for lanes in mover._lanes.values() for number in lanes)
    assert kept < 1 << 20
