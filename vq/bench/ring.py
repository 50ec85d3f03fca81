"""`vq bench ring`: how many chains a second go through the device's side of a split virtqueue.

`vq.split_ring` pops chains and pushes them back used, in turn with the baseline of
`vq.bench.ctypes_ring`, for chains of 1, 4 and 16 descriptors, direct and indirect, in bursts of 1,
16 and 64. Only the device's side is timed. Nobody touches the buffers, and nobody notifies.

The driver's side takes no time meanwhile: `DriverRing` places as many chains as the queue has room
for, once, and the available ring is filled with their heads over and over. Once all are used,
moving the available index on makes all of them available again.

Seconds are the processor's, not the wall's: nothing here waits, so on an idle machine they are the
same, and on a busy one others do not count.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from itertools import cycle, repeat
from typing import Any, NamedTuple, Protocol, TypeVar

from vq.abi import Feature
from vq.bench.ctypes_ring import CtypesRing
from vq.bench.measure import (
    Progress,
    host_facts,
    in_turn,
    positive_seconds,
    struct_unpack_ns,
)
from vq.bench.report import Bars, Description, Table, machine
from vq.driver import DriverRing, GuestAllocator
from vq.errors import VqError
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

__all__ = [
    "HELP",
    "Case",
    "OfferedChains",
    "add_arguments",
    "cases",
    "chains_per_second",
    "describe",
    "measure",
]

HELP = "chains a second through a split virtqueue, beside ctypes structures"

QUEUE_SIZE = 1024
BUFFER_SIZE = 2048
ROUNDS = 5
_DEFAULT_SECONDS = 15.0

_RINGS, _BUFFERS = 1 << 20, QUEUE_SIZE * BUFFER_SIZE

C = TypeVar("C")
R = TypeVar("R")


class Device(Protocol[C]):
    """What the two implementations have in common."""

    def pop_burst(self, limit: int) -> list[C]:
        """Takes up to `limit` chains."""

    def push_burst(self, chains: Sequence[C]) -> None:
        """Gives chains back used."""


class Case(NamedTuple):
    """One shape of traffic."""

    descriptors: int
    """Buffers in a chain: the first half readable, the rest writable; one alone is readable."""
    indirect: bool
    """Whether they stand in an indirect table."""
    burst: int
    """Chains taken by one call, and given back by one."""


def cases() -> list[Case]:
    """The shapes that are measured."""
    return [Case(*shape) for shape in itertools.product((1, 4, 16), (False, True), (1, 16, 64))]


class OfferedChains:
    """A guest whose driver offers the same chains again and again.

    There are `count` chains, as many as the descriptors of a case fit into the queue directly, so
    that direct and indirect chains are equally many. Their buffers lie in `regions` regions of the
    guest's memory in turn, none next to the one before it where there are several.
    """

    def __init__(self, case: Case, regions: int = 1) -> None:
        self.count = QUEUE_SIZE // case.descriptors
        self.features = 1 << Feature.INDIRECT_DESC
        self.memory = GuestMemory.allocate(
            (0, _RINGS),
            *((_RINGS + 2 * _BUFFERS * (1 + number), _BUFFERS) for number in range(regions)),
        )
        allocator = GuestAllocator(GuestMemory(self.memory.regions[:1]))
        self.driver = DriverRing.allocate(
            self.memory, allocator, QUEUE_SIZE, features=self.features
        )
        places = cycle(region.gpa for region in self.memory.regions[1:])
        offsets = (BUFFER_SIZE * (number // regions) for number in range(QUEUE_SIZE))
        buffers = [(gpa + offset, BUFFER_SIZE) for gpa, offset in zip(places, offsets)]  # noqa: B905
        readable = (case.descriptors + 1) // 2
        heads = []
        for chain in range(self.count):
            pieces = buffers[chain * case.descriptors :][: case.descriptors]
            table = allocator.allocate(16 * case.descriptors) if case.indirect else None
            heads.append(
                self.driver.add(pieces[:readable], pieces[readable:], chain, indirect=table)
            )
        entries = struct.pack(f"<{self.count}H", *heads) * (QUEUE_SIZE // self.count)
        self.memory.write(self.driver.avail + 4, entries)
        self._index = 0

    def offer(self) -> None:
        """Makes all chains available (again). Raises `VqError` unless all came back before."""
        used = self.memory.load16(self.driver.used + 2)
        if used != self._index:
            raise VqError(f"used.idx is {used}, although {self._index} chains were offered")
        self._index = (self._index + self.count) & 0xFFFF
        self.memory.store16(self.driver.avail + 2, self._index)

    def vq_device(self) -> SplitRing:
        """vq's device's side, from where the chains offered so far are back."""
        return self._device(SplitRing)

    def baseline_device(self) -> CtypesRing:
        """The baseline's."""
        return self._device(CtypesRing)

    def _device(self, kind: Callable[..., R]) -> R:
        ring, index = self.driver, self._index
        return kind(
            self.memory,
            ring.size,
            ring.desc,
            ring.avail,
            ring.used,
            features=self.features,
            next_avail=index,
            next_used=index,
        )


def chains_per_second(device: Device[C], guest: OfferedChains, burst: int, seconds: float) -> float:
    """The rate at which `device` takes and gives back the guest's chains, over about `seconds`."""
    clock = time.thread_time
    pop, push = device.pop_burst, device.push_burst
    bursts = guest.count // burst
    busy, passes = 0.0, 0
    while busy < seconds:
        guest.offer()
        start = clock()
        for _ in repeat(None, bursts):
            push(pop(burst))
        busy += clock() - start
        passes += 1
    return passes * bursts * burst / busy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench ring`."""
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=_DEFAULT_SECONDS,
        metavar="S",
        help="how long to measure in all (default %(default)s)",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases, each for its share of the seconds; the report that `--json` prints."""
    seconds: float = args.seconds
    shapes = cases()
    share = seconds / (len(shapes) * 2 * ROUNDS)
    rows = []
    unpack = [struct_unpack_ns()]
    with Progress(len(shapes)) as progress:
        for case in shapes:
            progress.step(_describe(case))
            rows.append(_measure_case(case, share))
            unpack.append(struct_unpack_ns())
    return {
        **host_facts(),
        "struct_unpack_ns": round(statistics.median(unpack), 1),
        "queue_size": QUEUE_SIZE,
        "rounds": ROUNDS,
        "seconds": seconds,
        "cases": rows,
    }


def _measure_case(case: Case, share: float) -> dict[str, Any]:
    ours, others = OfferedChains(case), OfferedChains(case)
    with ours.memory, others.memory:
        vq, baseline = ours.vq_device(), others.baseline_device()
        medians = in_turn(
            {
                "vq": lambda: chains_per_second(vq, ours, case.burst, share),
                "baseline": lambda: chains_per_second(baseline, others, case.burst, share),
            },
            ROUNDS,
        )
    return {
        **case._asdict(),
        "chains_per_second": round(medians["vq"]),
        "baseline_chains_per_second": round(medians["baseline"]),
        "ratio": round(medians["vq"] / medians["baseline"], 3),
    }


def _describe(case: Case) -> str:
    return (
        f"{case.descriptors} descriptors, {'indirect' if case.indirect else 'direct'},"
        f" bursts of {case.burst}"
    )


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    cases = report["cases"]
    table = Table(
        ("descriptors", "kind", "burst", "vq", "baseline", "ratio"),
        [
            (
                str(row["descriptors"]),
                "indirect" if row["indirect"] else "direct",
                str(row["burst"]),
                f"{row['chains_per_second']:,}",
                f"{row['baseline_chains_per_second']:,}",
                f"{row['ratio']:.2f}",
            )
            for row in cases
        ],
    )
    title = f"Chains a second through a queue of {report['queue_size']}, pop and push"
    bars = Bars(
        title,
        [_describe(Case(row["descriptors"], row["indirect"], row["burst"])) for row in cases],
        {"ctypes baseline": [row["ratio"] for row in cases]},
    )
    yardstick = f"one struct unpack takes {report['struct_unpack_ns']:.0f} ns"
    return Description(f"{title}; {machine(report)}; {yardstick}", [table], [bars])
