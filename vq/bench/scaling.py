"""`vq bench scaling`: what work costs as it grows, a curve each.

In one process, without a kernel in between, so that each curve has one cause: descriptors in a
chain, memory regions that buffers lie in, queue pairs of a device, bytes in a frame. The first two
stand beside the ring's baseline (`vq.bench.ctypes_ring`), the frames beside copies of as many
bytes. Seconds are the processor's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vq.bench.measure import Progress, add_repeat_arguments, host_facts, in_turn
from vq.bench.report import Curves, Description, Table, machine
from vq.bench.ring import Case, OfferedChains, chains_per_second
from vq.bench.scripted import BURST, LONGEST, frame_of
from vq.link import Link, LoopbackLink, NullLink
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NetDriver

__all__ = ["HELP", "add_arguments", "describe", "measure"]

HELP = "what work costs as it grows: descriptors, regions, queues, frame sizes"

_ROUNDS = 3
_SECONDS = 0.05
_MEMORY = 64 << 20
_PLAIN = 64
_IN_FLIGHT = 1 << 18
FRAME_SIZES = (64, 256, 1024, 1500, 4096, 16384, LONGEST)


class Curve(NamedTuple):
    """One thing that grows."""

    name: str
    unit: str
    """What the cost is of."""
    sizes: Sequence[int]
    contestants: Callable[[int, float], Mapping[str, Callable[[], float]]]
    """For a size and seconds: what measures microseconds a unit, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench scaling`."""
    add_repeat_arguments(parser, rounds=_ROUNDS, seconds=_SECONDS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    curves = []
    with Progress(sum(len(curve.sizes) for curve in CURVES)) as progress:
        for curve in CURVES:
            points: dict[str, list[tuple[int, float]]] = {}
            for size in curve.sizes:
                progress.step(f"{curve.name}: {size}")
                found = in_turn(curve.contestants(size, args.seconds), args.rounds)
                for name, microseconds in found.items():
                    points.setdefault(name, []).append((size, round(microseconds, 4)))
            curves.append({"curve": curve.name, "unit": curve.unit, "points": points})
    return {**host_facts(), "rounds": args.rounds, "seconds": args.seconds, "curves": curves}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    tables, charts = [], []
    for curve in report["curves"]:
        points = curve["points"]
        sizes = [size for size, _ in next(iter(points.values()))]
        title = f"microseconds a {curve['unit']}, by {curve['curve']}"
        rows = [
            (name, *(f"{microseconds:.2f}" for _, microseconds in found))
            for name, found in points.items()
        ]
        tables.append(Table((curve["curve"], *map(str, sizes)), rows, title))
        charts.append(Curves(title, curve["curve"], f"us a {curve['unit']}", points))
    return Description(f"What work costs as it grows; {machine(report)}", tables, charts)


# --- the ring alone ------------------------------------------------------------------------------


def _chains(descriptors: int, regions: int, seconds: float) -> Mapping[str, Callable[[], float]]:
    """vq's ring and the baseline, in turn on the same chains."""
    guest = OfferedChains(Case(descriptors, False, BURST), regions)
    burst = min(BURST, guest.count)
    return {
        "vq": lambda: 1e6 / chains_per_second(guest.vq_device(), guest, burst, seconds),
        "baseline": lambda: 1e6 / chains_per_second(guest.baseline_device(), guest, burst, seconds),
    }


def _by_descriptors(size: int, seconds: float) -> Mapping[str, Callable[[], float]]:
    return _chains(size, 1, seconds)


def _by_regions(size: int, seconds: float) -> Mapping[str, Callable[[], float]]:
    return _chains(1, size, seconds)


# --- the whole device ----------------------------------------------------------------------------


class _TimedDevice(NetDevice):
    """A device that knows how long it has worked on kicks."""

    busy = 0.0
    _began: float | None = None

    def notify(self, index: int, /) -> None:
        """A kick, perhaps from within another."""
        if self._began is not None:
            super().notify(index)
            return
        self._began = time.thread_time()
        try:
            super().notify(index)
        finally:
            self.busy += time.thread_time() - self._began
            self._began = None


class _Guest:
    """A guest whose device is in this thread."""

    def __init__(self, link: Link, pairs: int = 1) -> None:
        memory = GuestMemory.allocate(_MEMORY)
        self.device = _TimedDevice(link, queue_pairs=pairs, memory=memory)
        self.driver = NetDriver(self.device, memory, pairs=pairs, polling=True)


def _by_queues(size: int, seconds: float) -> Mapping[str, Callable[[], float]]:
    guest = _Guest(NullLink(ports=size), size)
    burst = [frame_of(_PLAIN)] * BURST

    def send() -> int:
        for pair in range(size):
            guest.driver.send_burst(burst, pair=pair)
        return size * len(burst)

    return {"vq": lambda: _microseconds(guest, send, seconds)}


def _by_frame_size(size: int, seconds: float) -> Mapping[str, Callable[[], float]]:
    guest = _Guest(LoopbackLink())
    count = max(1, min(BURST, _IN_FLIGHT // size))
    burst = [frame_of(size)] * count

    def send() -> int:
        guest.driver.send_burst(burst)
        back = 0
        while back < count:
            back += len(guest.driver.receive())
        return count

    source, target = bytearray(size), bytearray(size)

    def copy() -> float:
        """Into private memory and out of it again, as a loopback has to."""
        done, start = 0, time.thread_time()
        while (busy := time.thread_time() - start) < seconds:
            for _ in range(BURST):
                target[:] = bytes(source)
            done += BURST
        return busy / done * 1e6

    return {"vq": lambda: _microseconds(guest, send, seconds), "copies alone": copy}


def _microseconds(guest: _Guest, send: Callable[[], int], seconds: float) -> float:
    send()
    guest.device.busy, frames = 0.0, 0
    while guest.device.busy < seconds:
        frames += send()
    return guest.device.busy / frames * 1e6


CURVES = (
    Curve("descriptors in a chain", "chain", (1, 2, 4, 8, 16, 32, 64), _by_descriptors),
    Curve("memory regions", "chain", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), _by_regions),
    Curve("queue pairs", "frame", (1, 2, 3, 4), _by_queues),
    Curve("bytes in a frame", "frame", FRAME_SIZES, _by_frame_size),
)
