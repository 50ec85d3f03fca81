"""`vq bench guest`: a real Linux guest's traffic through a tap, vq beside others.

The guest is User-Mode Linux, or Debian's kernel under QEMU's emulation, on one processor; its peer
is a network namespace on the others. Contestants are vq, a C program that does the same with one
system call a frame, and what the guest has of its own: User-Mode Linux's tap transport, QEMU's
virtio-net. A boot's bulk figure varies two-fold, so each contestant gets several boots, in turn
with the others, and what is shown are medians.

For TCP the device's processor time is measured too: it is what other load on the machine moves
least. What a guest has of its own is no process to measure.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vq.abi import DeviceId
from vq.bench.contestants import (
    TAP,
    ServedTap,
    available,
    compare,
    pinned,
    run_traffic,
    tap_namespace,
    two_processors,
)
from vq.bench.measure import positive_number
from vq.bench.report import Description, Figure, describe_figures
from vq.errors import VqError
from vq.testing.guest import Guest, QemuGuest, UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import check_namespaces, check_tap, find_program

__all__ = ["HELP", "KINDS", "add_arguments", "describe", "measure"]

HELP = "a real guest's traffic through a tap, beside a C program and what the guest has of its own"


class _Kind(NamedTuple):
    """A kind of guest."""

    name: str
    own: str
    """What the contestant is called that the guest has of its own."""
    own_interface: str
    """That one's name in the guest."""
    program: tuple[str, str]
    """What runs the guest, and the package that it is in."""
    boot: Callable[[Path], Guest]
    """Boots it with the device on a socket."""
    boot_with_own: Callable[[Namespace], Guest]
    """Boots it with what it has of its own, on the tap in a namespace."""


KINDS = {
    "uml": _Kind(
        "User-Mode Linux",
        "uml",
        "vec0",
        ("linux.uml", "user-mode-linux"),
        lambda path: UmlGuest([(path, DeviceId.NET)]),
        lambda namespace: UmlGuest(
            arguments=[f"vec0:transport=tap,ifname={TAP},depth=128,gro=1"],
            prefix=namespace.argv(),
        ),
    ),
    "qemu": _Kind(
        "QEMU under emulation",
        "qemu",
        "eth0",
        ("qemu-system-x86_64", "qemu-system-x86"),
        lambda path: QemuGuest([path]),
        lambda namespace: QemuGuest(
            arguments=[
                *("-netdev", f"tap,id=own,ifname={TAP},script=no,downscript=no,vhost=off"),
                *("-device", "virtio-net-pci,netdev=own,romfile=,vectors=0"),
            ],
            prefix=namespace.argv(),
        ),
    ),
}
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
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="uml",
        help="which guest: User-Mode Linux, or QEMU under emulation, which is slow"
        " (default %(default)s)",
    )
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    kind = KINDS[args.kind]
    check_tap()
    check_namespaces()
    find_program("iperf3")
    program, package = kind.program
    find_program(program, package=package)
    guest_processor, others = two_processors()

    def sample(name: str, command: Sequence[str]) -> dict[str, float]:
        with pinned(others), _guest(kind, name, command, guest_processor) as parts:
            return _measure_guest(*parts, args.seconds)

    contestants = {**available(), kind.own: ()}
    report = compare(FIGURES, contestants, args.boots, sample, called="boot")
    return {**report, "guest": args.kind, "seconds": args.seconds}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    title = f"{KINDS[report['guest']].name} through a tap, medians of {report['boots']} boots"
    return describe_figures(title, FIGURES, report)


@contextmanager
def _guest(
    kind: _Kind, name: str, command: Sequence[str], processor: set[int]
) -> Iterator[tuple[Namespace, Guest, ServedTap | None]]:
    """A booted guest with an address, the namespace that is its host, and its device."""
    with ExitStack() as stack:
        namespace = stack.enter_context(tap_namespace(f"{_HOST}/{_PREFIX}"))
        device = None
        if name == kind.own:
            interface = kind.own_interface
            with pinned(processor):
                guest = kind.boot_with_own(namespace)
        else:
            interface = "eth0"
            device = stack.enter_context(ServedTap(namespace, name, command))
            with pinned(processor):
                guest = kind.boot(device.socket)
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
