"""`vq bench tap`: a scripted guest's frames through a real tap, vq beside a C program.

The tap is in a network namespace of its own. Frames go out of the guest as fast as its driver
sends, and come in from a packet socket that fills the tap; those of 64 KiB are TCP packets whose
checksum and segmentation are left to others all the way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, Protocol

from vq.bench import loopback
from vq.bench.contestants import (
    TAP,
    ServedTap,
    available,
    compare,
    pinned,
    tap_namespace,
    traffic_argv,
    two_processors,
)
from vq.bench.report import Description, Figure, describe_figures
from vq.bench.scripted import BURST, SIZES, ScriptedGuest, frame_of, guest_on, label
from vq.errors import VqError
from vq.testing.namespaces import Namespace
from vq.testing.requirements import check_namespaces, check_tap

__all__ = ["HELP", "add_arguments", "describe", "measure"]

HELP = "a scripted guest's frames through a real tap, both ways, beside a C program"

CASES = tuple((direction, size) for direction in ("out", "in") for size in SIZES)
FIGURES = tuple(
    figure
    for direction, size in CASES
    for figure in (
        Figure(f"{direction}, {label(size)}", "frames/s", digits=0),
        Figure(f"{direction}, {label(size)}, device", "frames/cpu s", digits=0),
    )
)
_ADDRESS = "198.18.64.1/24"
_WARM_UP = 0.1
_PATIENCE = 10.0

add_arguments = loopback.add_arguments


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    check_tap()
    check_namespaces()
    guests, others = two_processors()

    def sample(name: str, command: Sequence[str]) -> dict[str, float]:
        with (
            tap_namespace(_ADDRESS) as namespace,
            pinned(others),
            ServedTap(namespace, name, command) as device,
            pinned(guests),
            guest_on(device.socket) as guest,
        ):
            return _measure_device(namespace, device, guest, args.seconds)

    report = compare(FIGURES, available(), args.rounds, sample)
    return {**report, "seconds": args.seconds}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    title = f"A scripted guest and a tap, medians of {report['rounds']} rounds"
    return describe_figures(title, FIGURES, report)


def _measure_device(
    namespace: Namespace, device: ServedTap, guest: ScriptedGuest, seconds: float
) -> dict[str, float]:
    """All `FIGURES` of one contestant."""
    sample: dict[str, float] = {}
    for direction, size in CASES:
        name = f"{direction}, {label(size)}"
        if direction == "out":
            rates = _rates(device, _Sender(guest, device, size), seconds)
        else:
            flood = namespace.start(
                traffic_argv("flood", TAP, size, seconds + 20), lifetime=seconds + 30
            )
            try:
                rates = _rates(device, _Receiver(guest), seconds)
            finally:
                flood.close()
                guest.driver.receive()
        if not rates[0]:
            raise VqError(f"no frame came through ({name}): {device.log()[-500:]}")
        sample[name], sample[f"{name}, device"] = rates
    return sample


class _Worker(Protocol):
    """What a guest does, burst after burst."""

    @property
    def frames(self) -> int:
        """How many frames came through so far."""

    def work(self) -> None:
        """Does a burst."""


class _Sender:
    """Sends frames of one size; those count that the tap has got."""

    def __init__(self, guest: ScriptedGuest, device: ServedTap, size: int) -> None:
        self._driver, self._device = guest.driver, device
        self._burst = [frame_of(size)] * BURST

    @property
    def frames(self) -> int:
        return self._device.tap_frames()[0]

    def work(self) -> None:
        self._driver.send_burst(self._burst)


class _Receiver:
    """Takes the frames that have come."""

    def __init__(self, guest: ScriptedGuest) -> None:
        self.frames = 0
        self._driver = guest.driver

    def work(self) -> None:
        self.frames += len(self._driver.receive())


def _rates(device: ServedTap, worker: _Worker, seconds: float) -> tuple[float, float]:
    """Frames a second, and frames a second of the device's processor time, while a worker works."""
    _work(worker, _WARM_UP)
    start, busy, count = time.monotonic(), device.cpu_seconds(), worker.frames
    _work(worker, seconds)
    count = worker.frames - count
    busy = device.cpu_seconds() - busy
    return count / (time.monotonic() - start), count / busy if busy else 0.0


def _work(worker: _Worker, seconds: float) -> None:
    """Works for so long, and until a frame has come: whoever sends them may not be up yet."""
    start, before = time.monotonic(), worker.frames
    while True:
        worker.work()
        passed = time.monotonic() - start
        if passed > seconds and (worker.frames > before or passed > seconds + _PATIENCE):
            return
