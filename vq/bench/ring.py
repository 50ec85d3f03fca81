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
import sys
import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple, Protocol, TypeVar

from vq.abi import Feature
from vq.bench.ctypes_ring import CtypesRing
from vq.bench.measure import (
    Progress,
    host_facts,
    in_turn,
    positive_seconds,
    print_json,
    print_table,
    struct_unpack_ns,
)
from vq.driver import DriverRing, GuestAllocator
from vq.errors import VqError
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

__all__ = ["HELP", "Case", "OfferedChains", "add_arguments", "cases", "chains_per_second", "run"]

HELP = "chains a second through a split virtqueue, beside ctypes structures"

QUEUE_SIZE = 1024
BUFFER_SIZE = 2048
ROUNDS = 5
_DEFAULT_SECONDS = 15.0

C = TypeVar("C")


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
    that direct and indirect chains are equally many.
    """

    def __init__(self, case: Case) -> None:
        self.count = QUEUE_SIZE // case.descriptors
        self.features = 1 << Feature.INDIRECT_DESC
        buffers = QUEUE_SIZE * BUFFER_SIZE
        self.memory = GuestMemory.allocate(buffers + (1 << 18))
        allocator = GuestAllocator(self.memory)
        self.driver = DriverRing.allocate(
            self.memory, allocator, QUEUE_SIZE, features=self.features
        )
        first = allocator.allocate(buffers, BUFFER_SIZE)
        readable = (case.descriptors + 1) // 2
        heads = []
        for chain in range(self.count):
            addresses = range(first, first + case.descriptors * BUFFER_SIZE, BUFFER_SIZE)
            pieces = [(gpa, BUFFER_SIZE) for gpa in addresses]
            table = allocator.allocate(16 * case.descriptors) if case.indirect else None
            heads.append(
                self.driver.add(pieces[:readable], pieces[readable:], chain, indirect=table)
            )
            first = addresses.stop
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
        """vq's device's side, from the start of the rings."""
        ring = self.driver
        return SplitRing(
            self.memory, ring.size, ring.desc, ring.avail, ring.used, features=self.features
        )

    def baseline_device(self) -> CtypesRing:
        """The baseline's."""
        ring = self.driver
        return CtypesRing(
            self.memory, ring.size, ring.desc, ring.avail, ring.used, features=self.features
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
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=_DEFAULT_SECONDS,
        metavar="S",
        help="how long to measure in all (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0."""
    report = measure(args.seconds)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def measure(seconds: float) -> dict[str, Any]:
    """All cases, each for its share of `seconds`; the report that `--json` prints."""
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


def _print(report: dict[str, Any]) -> None:
    print(
        f"Python {report['python']} on {report['machine']}, {report['system']} {report['kernel']};"
        f" one struct unpack takes {report['struct_unpack_ns']:.0f} ns"
    )
    print(f"chains a second through a queue of {report['queue_size']}: pop and push\n")
    print_table(
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
            for row in report["cases"]
        ],
        sys.stdout,
    )
