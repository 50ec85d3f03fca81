"""`vq bench guest`: a real Linux guest's traffic through a tap, vq beside others.

The guest is User-Mode Linux on one processor; its peer is a network namespace on the others.
Contestants are vq, a C program that does the same with one system call a frame, and User-Mode
Linux's own tap transport. A boot's bulk figure varies two-fold, so each contestant gets several
boots, in turn with the others, and what is shown are medians.

For TCP the device's processor time is measured too: it is what other load on the machine moves
least. User-Mode Linux's own transport has no device to measure.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from vq.abi import DeviceId
from vq.bench.contestants import (
    TAP,
    Figure,
    ServedTap,
    available,
    awake,
    pinned,
    positive_number,
    print_figures,
    run_traffic,
    summary,
    tap_namespace,
    two_processors,
)
from vq.bench.measure import Progress, host_facts, print_json
from vq.errors import VqError
from vq.testing.guest import Guest, UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import check_namespaces, check_tap, find_program

__all__ = ["HELP", "add_arguments", "measure", "run"]

HELP = "a User-Mode Linux guest's traffic through a tap, beside a C program and UML's own transport"

UML = "uml"
FIGURES = (
    Figure("TCP to host", "Gbit/s"),
    Figure("TCP to guest", "Gbit/s"),
    Figure("TCP to host, device", "Gbit/cpu s"),
    Figure("TCP to guest, device", "Gbit/cpu s"),
    Figure("round trip from host", "us", more_is_better=False, digits=1),
    Figure("round trip from guest", "us", more_is_better=False, digits=1),
    Figure("UDP to host", "frames/s", digits=0),
    Figure("UDP to guest", "frames/s", digits=0),
    Figure("connections", "1/s", digits=0),
)
_HOST, _GUEST, _PREFIX = "198.18.66.1", "198.18.66.2", "24"
_DATAGRAM = 1400
_PING_INTERVAL = 0.01  # seconds
_BOOTS = 5
_SECONDS = 2  # iperf3 takes whole ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench guest`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument(
        "--boots",
        type=positive_number,
        default=_BOOTS,
        metavar="N",
        help="how many guests each contestant gets (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=_SECONDS,
        metavar="S",
        help="how long each measurement of a guest takes (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0."""
    report = measure(args.boots, args.seconds)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def measure(boots: int, seconds: int) -> dict[str, Any]:
    """The report that `--json` prints."""
    check_tap()
    check_namespaces()
    find_program("iperf3")
    find_program("linux.uml", package="user-mode-linux")
    guest_processor, others = two_processors()
    commands = {**available(), UML: ()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with awake(), Progress(boots * len(commands)) as progress:
        for boot in range(boots):
            for name, command in commands.items():
                progress.step(f"{name}, boot {boot + 1}")
                with pinned(others), _guest(name, command, guest_processor) as parts:
                    samples[name].append(_measure_guest(*parts, seconds))
    return {
        **host_facts(),
        "boots": boots,
        "seconds": seconds,
        "contestants": list(commands),
        "figures": summary(FIGURES, samples),
    }


@contextmanager
def _guest(
    name: str, command: Sequence[str], processor: set[int]
) -> Iterator[tuple[Namespace, Guest, ServedTap | None]]:
    """A booted guest with an address, the namespace that is its host, and its device."""
    with ExitStack() as stack:
        namespace = stack.enter_context(tap_namespace(f"{_HOST}/{_PREFIX}"))
        device = None
        if name == UML:
            interface = "vec0"
            transport = f"vec0:transport=tap,ifname={TAP},depth=128,gro=1"
            with pinned(processor):
                guest = UmlGuest(arguments=[transport], prefix=namespace.argv())
        else:
            interface = "eth0"
            device = stack.enter_context(ServedTap(namespace, name, command))
            with pinned(processor):
                guest = UmlGuest([(device.socket, DeviceId.NET)])
        stack.enter_context(guest)
        guest.output(
            f"ip addr add {_GUEST}/{_PREFIX} dev {interface} && ip link set {interface} up"
            f" && ping -c 3 -i 0.1 -W 2 {_HOST}"
        )
        yield namespace, guest, device


def _measure_guest(
    namespace: Namespace, guest: Guest, device: ServedTap | None, seconds: int
) -> dict[str, float]:
    """Each of `FIGURES` that this contestant has."""
    sample: dict[str, float] = {}
    patience = seconds + 30
    guest.output("mkdir -p /tmp/www && echo page >/tmp/www/index.html && httpd -h /tmp/www -p 80")
    trip = run_traffic(namespace, "ping", _GUEST, seconds, timeout=patience)
    sample["round trip from host"] = trip
    sample["round trip from guest"] = _ping(guest, seconds, patience)
    with iperf_server(namespace):
        for figure, options in (("TCP to host", ""), ("TCP to guest", "-R")):
            before = device.cpu_seconds() if device else 0.0
            received = _iperf(guest, f"-C reno -t {seconds} {options}", patience)["sum_received"]
            sample[figure] = received["bits_per_second"] / 1e9
            if device:
                busy = device.cpu_seconds() - before
                sample[f"{figure}, device"] = received["bytes"] * 8 / 1e9 / busy
        for figure, options in (("UDP to host", ""), ("UDP to guest", "-R")):
            found = _iperf(guest, f"-u -b 0 -l {_DATAGRAM} -t {seconds} {options}", patience)["sum"]
            sample[figure] = (found["packets"] - found["lost_packets"]) / found["seconds"]
    sample["connections"] = run_traffic(namespace, "connect", _GUEST, 80, seconds, timeout=patience)
    return sample


def _ping(guest: Guest, seconds: int, patience: float) -> float:
    """The median round trip in microseconds of pings from the guest."""
    count = round(seconds / _PING_INTERVAL)
    text = guest.output(f"ping -c {count} -i {_PING_INTERVAL} -W 2 {_HOST}", timeout=patience)
    return statistics.median(float(found) * 1000 for found in re.findall(r"time=([\d.]+)", text))


def _iperf(guest: Guest, options: str, patience: float) -> dict[str, Any]:
    """What iperf3 in the guest says about a transfer in the end."""
    command = f"iperf3 --json --connect-timeout 3000 -c {_HOST} {options}"
    text = guest.output(command, timeout=patience)
    try:
        # Warnings may come first.
        end: dict[str, Any] = json.loads(text[text.index("{") :])["end"]
    except (ValueError, KeyError):
        raise VqError(f"{command!r} gave no result: {text.strip()[-500:]}") from None
    return end


def _print(report: dict[str, Any]) -> None:
    print(
        f"User-Mode Linux through a tap; medians of {report['boots']} boots;"
        f" Python {report['python']} on {report['machine']}, {report['system']} {report['kernel']}"
    )
    print()
    print_figures(FIGURES, report["figures"], report["contestants"])
