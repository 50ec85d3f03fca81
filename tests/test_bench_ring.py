"""The ring bench: its two devices' sides do the same work, and it reports what it should."""

from __future__ import annotations

import argparse
import ctypes
import json
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import bench
from vq.abi import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Feature
from vq.bench.ctypes_ring import CtypesRing
from vq.bench.measure import in_turn, positive_seconds, print_table
from vq.bench.ring import QUEUE_SIZE, Case, OfferedChains, cases, chains_per_second
from vq.driver import DriverRing, GuestAllocator
from vq.errors import DriverError, VqError
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

FEATURES = 1 << Feature.INDIRECT_DESC
SIZE = 16
RAM = 1 << 16


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vq bench")
    bench.add_arguments(parser)
    return parser.parse_args(words)


# --- the two devices' sides against each other ----------------------------------------------------

Buffers = list[tuple[int, int]]
buffers = st.lists(st.tuples(st.integers(0x8000, 0xF000), st.integers(0, 0x1000)), max_size=3)
shapes = st.tuples(buffers, buffers, st.booleans()).filter(lambda shape: shape[0] or shape[1])


class Side:
    """A guest of its own and one of the implementations on it."""

    def __init__(self, make: Callable[..., SplitRing | CtypesRing], start: int = 0) -> None:
        self.memory = GuestMemory.allocate(RAM)
        self.allocator = GuestAllocator(self.memory)
        self.driver = DriverRing.allocate(
            self.memory, self.allocator, SIZE, features=FEATURES, start_index=start
        )
        self.device = make(
            self.memory,
            SIZE,
            self.driver.desc,
            self.driver.avail,
            self.driver.used,
            features=FEATURES,
            next_avail=start,
            next_used=start,
        )

    def offer(self, readable: Buffers, writable: Buffers, indirect: bool) -> None:
        table = self.allocator.allocate(16 * len(readable + writable)) if indirect else None
        self.driver.add(readable, writable, indirect=table)

    def places(self, views: Sequence[memoryview]) -> list[tuple[int, int]]:
        base = self.memory.regions[0].address
        first = (ctypes.addressof(ctypes.c_char.from_buffer(view)) - base for view in views)
        return list(zip(first, map(len, views), strict=True))

    def chains(self, limit: int, chance: random.Random) -> list[tuple[object, ...]]:
        """Pops a burst, gives it back shuffled, and tells where its buffers lie."""
        popped = self.device.pop_burst(limit)
        seen = [
            (chain.head, self.places(chain.readable), self.places(chain.writable))
            for chain in popped
        ]
        for chain in popped:
            chain.written = sum(map(len, chain.writable))
        chance.shuffle(popped)
        self.device.push_burst(popped)  # type: ignore[arg-type]
        return seen

    def used_ring(self) -> bytes:
        return self.memory.read(self.driver.used, 4 + 8 * SIZE)


@settings(max_examples=60)
@given(
    st.lists(st.lists(shapes, max_size=4), min_size=1, max_size=8),
    st.sampled_from((0, 1, 0xFFF0, 0xFFFF)),
    st.integers(1, 5),
    st.integers(0, 1 << 16),
)
def test_both_pop_the_same_chains_and_leave_the_same_memory(
    rounds: list[list[tuple[Buffers, Buffers, bool]]], start: int, burst: int, seed: int
) -> None:
    sides = Side(SplitRing, start), Side(CtypesRing, start)
    for offered in rounds:
        results = []
        for side in sides:
            chance = random.Random(seed)
            for readable, writable, indirect in offered:
                wanted = 1 if indirect else len(readable) + len(writable)
                if side.driver.num_free >= wanted:
                    side.offer(readable, writable, indirect)
            side.driver.publish()
            popped = []
            while seen := side.chains(burst, chance):
                popped += seen
            used = side.driver.collect()
            assert len(used) == len(popped)
            results.append((popped, used, side.used_ring()))
        assert results[0] == results[1]
    for side in sides:
        side.memory.close()


def raw(*descriptors: tuple[int, int, int, int]) -> Callable[[Side], None]:
    """Pokes descriptors from number 0 on and makes number 0 available."""

    def poke(side: Side) -> None:
        for number, (addr, length, flags, following) in enumerate(descriptors):
            side.memory.write(
                side.driver.desc + 16 * number,
                addr.to_bytes(8, "little")
                + length.to_bytes(4, "little")
                + flags.to_bytes(2, "little")
                + following.to_bytes(2, "little"),
            )
        side.memory.store16(side.driver.avail + 2, 1)

    return poke


def head_beyond_the_table(side: Side) -> None:
    side.memory.store16(side.driver.avail + 4, SIZE)
    side.memory.store16(side.driver.avail + 2, 1)


def index_too_far_ahead(side: Side) -> None:
    side.memory.store16(side.driver.avail + 2, SIZE + 1)


def nested_table(side: Side) -> None:
    raw((0x8000, 16, DESC_F_INDIRECT, 0))(side)
    side.memory.write(0x8000, b"\0\x90\0\0\0\0\0\0\x10\0\0\0\x04\0\0\0")


def table_longer_than_the_queue(side: Side) -> None:
    raw((0x8000, 16 * (SIZE + 1), DESC_F_INDIRECT, 0))(side)
    for number in range(SIZE):
        flags_and_next = DESC_F_NEXT | (number + 1) << 16
        side.memory.write(0x8000 + 16 * number + 12, flags_and_next.to_bytes(4, "little"))


@pytest.mark.parametrize(
    "malformed",
    [
        pytest.param(raw((RAM - 4, 5, 0, 0)), id="a buffer that runs out of the memory"),
        pytest.param(raw(((1 << 64) - 1, 2, 0, 0)), id="a buffer that wraps around 2^64"),
        pytest.param(raw((0, 4, DESC_F_NEXT, 0)), id="a chain that loops"),
        pytest.param(raw((0, 4, DESC_F_NEXT, SIZE)), id="a next beyond the table"),
        pytest.param(
            raw((0, 4, DESC_F_NEXT | DESC_F_WRITE, 1), (0, 4, 0, 0)),
            id="a readable buffer after a writable one",
        ),
        pytest.param(raw((0x8000, 0, DESC_F_INDIRECT, 0)), id="an empty indirect table"),
        pytest.param(
            raw((0x8000, 24, DESC_F_INDIRECT, 0)), id="a table of one and a half descriptors"
        ),
        pytest.param(
            raw((0x8000, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1)), id="indirect and chained on"
        ),
        pytest.param(raw((RAM, 16, DESC_F_INDIRECT, 0)), id="an indirect table that is not RAM"),
        head_beyond_the_table,
        index_too_far_ahead,
        nested_table,
        table_longer_than_the_queue,
    ],
)
@pytest.mark.parametrize("make", [SplitRing, CtypesRing])
def test_both_refuse_what_is_malformed(
    make: Callable[..., SplitRing | CtypesRing], malformed: Callable[[Side], None]
) -> None:
    side = Side(make)
    malformed(side)
    with pytest.raises(DriverError):
        side.device.pop_burst(4)


@pytest.mark.parametrize("make", [SplitRing, CtypesRing])
def test_an_indirect_table_needs_the_feature(make: Callable[..., SplitRing | CtypesRing]) -> None:
    side = Side(make)
    side.offer([(0x8000, 4)], [], True)
    side.driver.publish()
    ring = side.driver
    device = make(side.memory, SIZE, ring.desc, ring.avail, ring.used)
    with pytest.raises(DriverError):
        device.pop_burst(1)


# --- what is offered ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases())
def test_the_same_chains_are_offered_again_and_again(case: Case) -> None:
    guest = OfferedChains(case)
    with guest.memory:
        device = guest.vq_device()
        for _ in range(3):
            guest.offer()
            popped = device.pop_burst(QUEUE_SIZE)
            assert len({chain.head for chain in popped}) == len(popped) == guest.count
            for chain in popped:
                assert len(chain.readable) + len(chain.writable) == case.descriptors
            device.push_burst(popped)


def test_chains_that_are_not_all_back_are_not_offered_again() -> None:
    guest = OfferedChains(Case(1, False, 16))
    with guest.memory:
        device = guest.vq_device()
        guest.offer()
        popped = device.pop_burst(QUEUE_SIZE)
        device.push_burst(popped[1:])
        with pytest.raises(VqError, match=r"used\.idx"):
            guest.offer()


@pytest.mark.parametrize("burst", [1, 64])
def test_a_rate_is_above_zero_and_everything_came_back(burst: int) -> None:
    guest = OfferedChains(Case(1, False, burst))
    with guest.memory:
        assert chains_per_second(guest.baseline_device(), guest, burst, 0.002) > 0
        guest.offer()


# --- measuring and the command --------------------------------------------------------------------


def test_contestants_take_turns_and_the_median_counts() -> None:
    calls: list[str] = []
    values = {"a": iter((1.0, 100.0, 3.0)), "b": iter((7.0, 5.0, 6.0))}

    def sample(name: str) -> float:
        calls.append(name)
        return next(values[name])

    medians = in_turn({"a": lambda: sample("a"), "b": lambda: sample("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert medians == {"a": 3.0, "b": 6.0}


def test_a_table_has_its_columns_flush_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "long"), [("100", "2")])
    assert capsys.readouterr().out == "  a  long\n100     2\n"


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_duration_is_a_number_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        positive_seconds(text)
    with pytest.raises(SystemExit) as stopped:
        parse("ring", "--seconds", text)
    assert stopped.value.code == 2


def test_json_is_one_object_with_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(parse("ring", "--json", "--seconds", "0.05")) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report["struct_unpack_ns"] > 0
    assert isinstance(report["python"], str) and isinstance(report["machine"], str)
    shape = ("descriptors", "indirect", "burst")
    assert [tuple(case[key] for key in shape) for case in report["cases"]] == [
        (descriptors, indirect, burst)
        for descriptors in (1, 4, 16)
        for indirect in (False, True)
        for burst in (1, 16, 64)
    ]
    for case in report["cases"]:
        assert case["ratio"] == pytest.approx(
            case["chains_per_second"] / case["baseline_chains_per_second"], rel=0.01
        )


def test_the_table_has_a_line_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(parse("ring", "--seconds", "0.05")) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if "descriptors" in line)
    assert len(lines) - head - 1 == len(cases())
