"""`vq bench testpmd`: small frames between DPDK's testpmd and a tap, vq beside a C program.

testpmd polls its rings on a processor of its own and never sleeps, so it is the device that is
measured. Frames go out (txonly), come in from a packet socket that fills the tap (rxonly), and
come in and go out again (io, both counted). Beside frames a second, frames per second of the
device's processor time: that is what other load on the machine moves least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vq.bench import traffic
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
from vq.bench.measure import add_repeat_arguments
from vq.bench.report import Description, Figure, describe_figures
from vq.errors import VqError
from vq.testing.namespaces import Namespace
from vq.testing.requirements import check_namespaces, check_tap, find_program
from vq.testing.testpmd import HugePages, Testpmd

__all__ = ["CASES", "HELP", "Case", "add_arguments", "describe", "measure"]

HELP = "small frames between testpmd and a tap, beside a C program"


class Case(NamedTuple):
    """One way that frames go."""

    name: str
    mode: str
    """testpmd's forwarding mode."""
    length: int
    """Bytes in a frame, without its check sequence."""


CASES = (
    Case("out, 64 bytes", "txonly", 64),
    Case("in, 64 bytes", "rxonly", 64),
    Case("in, 1500 bytes", "rxonly", 1500),
    Case("in and out, 64 bytes", "io", 64),
)
FIGURES = tuple(
    figure
    for case in CASES
    for figure in (
        Figure(case.name, "frames/s", digits=0),
        Figure(f"{case.name}, device", "frames/cpu s", digits=0),
    )
)
_HUGE_PAGES = 192
_MEMORY = 256  # MiB
_WARM_UP = 0.3
_ROUNDS = 5
_SECONDS = 1.0
_ADDRESS = "198.18.67.1/24"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench testpmd`."""
    add_repeat_arguments(parser, rounds=_ROUNDS, seconds=_SECONDS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    check_tap()
    check_namespaces()
    find_program("dpdk-testpmd", package="dpdk")
    forwarding, others = two_processors()
    cores = ",".join(str(core) for core in (min(others), *forwarding))

    with HugePages(_HUGE_PAGES) as pages:

        def sample(name: str, command: Sequence[str]) -> dict[str, float]:
            with (
                tap_namespace(_ADDRESS) as namespace,
                pinned(others),
                ServedTap(namespace, name, command) as device,
                _testpmd(pages, device, cores) as testpmd,
            ):
                return _measure_device(namespace, device, testpmd, args.seconds)

        report = compare(FIGURES, available(), args.rounds, sample)
    return {**report, "seconds": args.seconds}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    title = f"testpmd and a tap, medians of {report['rounds']} rounds"
    return describe_figures(title, FIGURES, report)


def _testpmd(pages: HugePages, device: ServedTap, cores: str) -> Testpmd:
    mac = traffic.GUEST_MAC.hex(":")
    return Testpmd(pages, device.socket, port=f"queue_size=256,mac={mac}", cores=cores, mem=_MEMORY)


def _measure_device(
    namespace: Namespace, device: ServedTap, testpmd: Testpmd, seconds: float
) -> dict[str, float]:
    """All `FIGURES` of one contestant."""
    sample: dict[str, float] = {}
    for case in CASES:
        testpmd.command(f"set fwd {case.mode}")
        testpmd.command(f"set txpkts {case.length}")
        testpmd.command("start")
        if case.mode == "txonly":
            rates = _rates(device, lambda: sum(device.tap_frames()), seconds)
        else:
            flood = namespace.start(
                traffic_argv("flood", TAP, case.length, seconds + 10), lifetime=seconds + 20
            )
            try:
                if case.mode == "rxonly":
                    rates = _rates(device, lambda: testpmd.stats().rx_packets, seconds)
                else:
                    rates = _rates(device, lambda: sum(device.tap_frames()), seconds)
            finally:
                flood.close()
        testpmd.command("stop")
        sample[case.name], sample[f"{case.name}, device"] = rates
        if not rates[0]:
            raise VqError(f"no frame came through ({case.name}): {device.log()[-500:]}")
    return sample


def _rates(device: ServedTap, frames: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Frames a second, and frames a second of the device's processor time."""
    time.sleep(_WARM_UP)
    start, busy, count = time.monotonic(), device.cpu_seconds(), frames()
    time.sleep(seconds)
    count = frames() - count
    busy = device.cpu_seconds() - busy
    return count / (time.monotonic() - start), count / busy if busy else 0.0
