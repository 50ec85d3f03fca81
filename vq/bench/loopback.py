"""`vq bench loopback`: a scripted guest's frames to a device and back, vq beside a C program.

The device gives back what it is sent: vq by its loopback link, the C program by a pair of sockets.
The guest is a process beside it and needs no privileges. Each frame counts once, though it goes
both ways.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from vq.bench.contestants import Served, available, compare, pinned, two_processors
from vq.bench.measure import add_repeat_arguments
from vq.bench.report import Description, Figure, describe_figures
from vq.bench.scripted import BURST, SIZES, ScriptedGuest, frame_of, guest_on, label
from vq.errors import VqError

__all__ = ["HELP", "add_arguments", "describe", "measure"]

HELP = "a scripted guest's frames to a device and back, beside a C program"

FIGURES = tuple(
    figure
    for size in SIZES
    for figure in (
        Figure(label(size), "frames/s", digits=0),
        Figure(f"{label(size)}, device", "frames/cpu s", digits=0),
    )
)
_ROUNDS = 5
_SECONDS = 0.5
_IN_FLIGHT = 1 << 18  # bytes: what a socket's buffer takes
_PATIENCE = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench loopback`."""
    add_repeat_arguments(parser, rounds=_ROUNDS, seconds=_SECONDS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    guests, others = two_processors()

    def sample(name: str, command: Sequence[str]) -> dict[str, float]:
        with (
            pinned(others),
            Served(name, command) as device,
            pinned(guests),
            guest_on(device.socket) as guest,
        ):
            return _measure_device(device, guest, args.seconds)

    report = compare(FIGURES, available(), args.rounds, sample)
    return {**report, "seconds": args.seconds}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    title = f"A scripted guest and a loopback, medians of {report['rounds']} rounds"
    return describe_figures(title, FIGURES, report)


def _measure_device(device: Served, guest: ScriptedGuest, seconds: float) -> dict[str, float]:
    """All `FIGURES` of one contestant."""
    sample: dict[str, float] = {}
    for size in SIZES:
        frames = [frame_of(size)] * max(1, min(BURST, _IN_FLIGHT // (size + 2048)))
        _there_and_back(guest, frames)  # once to warm up
        start, busy, count = time.monotonic(), device.cpu_seconds(), 0
        while time.monotonic() < start + seconds:
            count += _there_and_back(guest, frames)
        busy = device.cpu_seconds() - busy
        sample[label(size)] = count / (time.monotonic() - start)
        sample[f"{label(size)}, device"] = count / busy if busy else 0.0
    return sample


def _there_and_back(guest: ScriptedGuest, frames: list[Any]) -> int:
    """Sends a burst and waits until all of it is back."""
    driver = guest.driver
    if driver.send_burst(frames) != len(frames):
        raise VqError("the device left no room for a burst")
    back = 0
    deadline = time.monotonic() + _PATIENCE
    while back < len(frames):
        back += len(driver.receive())
        if time.monotonic() > deadline:
            raise VqError(f"of {len(frames)} frames only {back} came back")
    return back
