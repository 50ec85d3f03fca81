"""`vq bench profile`: where a frame's time goes in the device, stage by stage.

A scripted guest, the device behind vhost-user and its event loop take turns in one thread. While
it is the device's turn a timer looks every quarter of a millisecond what it is doing: which
module's code, or which system call. The samples, over the time of all turns, make microseconds a
frame. Code is not slowed down, as a tracing profiler would: what is rarely seen takes little.

With a real tap (for root on Linux) frames go out and come in apart, in bursts as under load, and
one at a time with a call for each, as pings do. With the loopback link they do both in one go.
"""

from __future__ import annotations

import argparse
import json
import linecache
import re
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import vq
from vq.bench import traffic
from vq.bench.contestants import LOOPBACK, TAP, tap_namespace
from vq.bench.measure import Progress, host_facts, positive_seconds
from vq.bench.report import Description, Stacked, Table, machine
from vq.bench.scripted import BURST, LONGEST, frame_of, guest_on, label
from vq.errors import VqError
from vq.link import Link, LoopbackLink
from vq.loop import Loop
from vq.net import NetDevice
from vq.net_driver import OutFrame
from vq.tap import open_tap
from vq.testing.requirements import MissingRequirement, check_namespaces, check_tap
from vq.vhost_user import Connection, unwatch_device, watch_device

__all__ = ["HELP", "add_arguments", "describe", "measure"]

HELP = "where a frame's time goes in the device, stage by stage"

STAGES = {
    "loop": "event loop",
    "vhost_backend": "kick and call",
    "shared_fd": "kick and call",
    "device": "device base",
    "net": "net device",
    "pace": "net device",
    "net_transmit": "net header",
    "software": "net header",
    "packet": "net header",
    "net_receive": "receive window",
    "split_ring": "ring",
    "ring_run": "ring",
    "ring_row": "ring",
    "lanes": "ring",
    "memory": "ring",
    "abi": "ring",
    "link": "link",
    "tap_linux_port": "link",
    "io_uring": "link",
    "gather": "link",
}
"""Which module's code is which stage; other modules' is "other"."""

_SYSTEM_CALL = re.compile(
    r"\b_?(readv|pwritev|poll)\(|\b(writev|read|write)\(|\b_(syscall)\(|\bif (call)\("
)
"""In a line of source: what was called there when the device was seen at it."""
_BY_LIBRARY = {"syscall": "io_uring", "call": "pwritev"}
"""What those are that go through the C library."""
_PACKAGE = str(Path(vq.__file__).parent)
_PERIOD = 0.25e-3
_SECONDS = 1.0
_AF_PACKET = 17
_LONG_BURST = 4
_PATIENCE = 5.0


class Case(NamedTuple):
    """One kind of traffic."""

    direction: str
    """"out" of the guest, "in", or "both": the link gives back what it gets."""
    size: int
    burst: int

    def __str__(self) -> str:
        how = "one at a time" if self.burst == 1 else f"bursts of {self.burst}"
        return f"{self.direction}, {label(self.size)}, {how}"


_SHAPES = ((64, BURST), (LONGEST, _LONG_BURST), (64, 1))
CASES = {
    "tap": [Case(direction, *shape) for direction in ("out", "in") for shape in _SHAPES],
    LOOPBACK: [Case("both", *shape) for shape in _SHAPES],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench profile`."""
    parser.add_argument(
        "--link",
        choices=CASES,
        help="what the device is plugged into (default: a tap, where one can be had)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=_SECONDS,
        metavar="S",
        help="how long each kind of traffic is looked at (default %(default)s)",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    link = args.link or _best_link()
    if link == LOOPBACK:
        cases = _profile(link, args.seconds)
    else:
        check_tap()
        check_namespaces()
        program = f"from vq.bench import profile; profile.print_cases({link!r}, {args.seconds})"
        command = shlex.join([sys.executable, "-c", program])
        with tap_namespace("198.18.65.1/24") as namespace:
            patience = 60 + 10 * args.seconds * len(CASES[link])
            cases = json.loads(namespace.run(command, timeout=patience))
    return {**host_facts(), "link": link, "seconds": args.seconds, "cases": cases}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    cases = report["cases"]
    total: Counter[str] = Counter()
    for case in cases:
        total.update({stage: us / case["us"] for stage, us in case["stages"].items()})
    stages = [stage for stage, _ in total.most_common()]
    title = f"A frame's time in the device, in microseconds ({report['link']})"
    rows = [(stage, *(_cell(case["stages"].get(stage, 0.0)) for case in cases)) for stage in stages]
    rows.append(("in all", *(f"{case['us']:.2f}" for case in cases)))
    labels = [case["case"] for case in cases]
    return Description(
        f"{title}; {machine(report)}",
        [Table(("", *labels), rows)],
        [
            Stacked(
                title,
                labels,
                {stage: [case["stages"].get(stage, 0.0) for case in cases] for stage in stages},
                "microseconds a frame",
            )
        ],
    )


def _cell(us: float) -> str:
    return f"{us:.2f}" if us else "-"


def _best_link() -> str:
    try:
        check_tap()
        check_namespaces()
    except MissingRequirement:
        return LOOPBACK
    return "tap"


# --- what the device is doing --------------------------------------------------------------------


class Sampler:
    """Looks again and again at what runs, while it is `on`; for the main thread."""

    def __init__(self) -> None:
        self.on = False
        self.samples: Counter[str] = Counter()

    def look(self, _: int, frame: FrameType | None) -> None:
        """The timer's signal came."""
        if self.on:
            self.samples[stage_of(frame)] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside of this the timer goes."""
        before = signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, _PERIOD, _PERIOD)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def stage_of(frame: FrameType | None) -> str:
    """The stage that the innermost of vq's functions belongs to, or its system call."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "other"
    path = frame.f_code.co_filename
    # A signal is dealt with after the call in which it came: the line is still that of the call.
    found = _SYSTEM_CALL.search(linecache.getline(path, frame.f_lineno or 0))
    if found is not None:
        call = found[found.lastindex or 0]
        return f"system call: {_BY_LIBRARY.get(call, call)}"
    return STAGES.get(Path(path).stem, "other")


# --- the device at work --------------------------------------------------------------------------


class _Workbench:
    """A device, its guest and its loop, which take turns."""

    def __init__(self, link: Link, sampler: Sampler, stack: ExitStack, *, polling: bool) -> None:
        self.spent = 0.0
        """Seconds that the device has worked."""
        self._sampler = sampler
        self._loop = Loop()
        stack.callback(self._loop.close)
        device = NetDevice(link)
        stack.callback(device.close)
        watch_device(device, self._loop)
        stack.callback(unwatch_device, device, self._loop)
        ours, theirs = socket.socketpair()
        stack.callback(Connection(ours, device, self._loop, queue_num=1).close)
        self._guest = stack.enter_context(
            guest_on(theirs, idle=lambda: self._loop.run_once(0), polling=polling)
        )

    def send(self, frames: Sequence[OutFrame]) -> None:
        """The guest sends a burst, and the device takes it."""
        driver = self._guest.driver
        if driver.send_burst(frames) != len(frames):
            raise VqError("the device left no room for a burst")
        deadline = time.monotonic() + _PATIENCE
        self._turn()
        while driver.unsent():
            if time.monotonic() > deadline:
                raise VqError(f"{driver.unsent()} frames of a burst were not taken")
            if not driver.reap():
                self._turn()

    def receive(self, count: int) -> None:
        """The device gives so many frames to the guest."""
        deadline = time.monotonic() + _PATIENCE
        while count > 0:
            if time.monotonic() > deadline:
                raise VqError(f"{count} frames of a burst did not come")
            self._turn()
            self._guest.frontend.poll()
            count -= len(self._guest.driver.receive())

    def _turn(self) -> None:
        self._sampler.on = True
        start = time.perf_counter()
        self._loop.run_once(0)
        self.spent += time.perf_counter() - start
        self._sampler.on = False


def print_cases(kind: str, seconds: float) -> None:
    """What `_profile` finds, as JSON: for a process of its own in the tap's namespace."""
    json.dump(_profile(kind, seconds), sys.stdout)


def _profile(kind: str, seconds: float) -> list[dict[str, Any]]:
    """All cases of a link, in this process: what `measure` reports of them."""
    found = []
    with Progress(len(CASES[kind])) as progress:
        for case in CASES[kind]:
            progress.step(str(case))
            found.append(_profile_case(kind, case, seconds))
    return found


def _profile_case(kind: str, case: Case, seconds: float) -> dict[str, Any]:
    sampler = Sampler()
    with ExitStack() as stack:
        link = LoopbackLink() if kind == LOOPBACK else open_tap(TAP)
        bench = _Workbench(link, sampler, stack, polling=case.burst > 1)
        burst = [frame_of(case.size)] * case.burst
        host = None if kind == LOOPBACK else stack.enter_context(_Host(case.size))

        def move() -> None:
            if case.direction != "in":
                bench.send(burst)
            elif host is not None:
                host.send(case.burst)
            if case.direction != "out":
                bench.receive(case.burst)

        for _ in range(20):
            move()
        sampler.samples.clear()
        bench.spent, bursts = 0.0, 0
        with sampler.running():
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                move()
                bursts += 1
        us = bench.spent / (bursts * case.burst) * 1e6
        total = max(1, sampler.samples.total())
        return {
            "case": str(case),
            "us": round(us, 3),
            "samples": total,
            "stages": {
                stage: round(us * count / total, 3)
                for stage, count in sampler.samples.most_common()
            },
        }


class _Host:
    """The host's end of the tap."""

    def __init__(self, size: int) -> None:
        self._frame = traffic.flood_frame(size)
        self._socket = socket.socket(_AF_PACKET, socket.SOCK_RAW)
        traffic.prepare(self._socket, TAP, size)

    def send(self, count: int) -> None:
        """Puts frames into the tap."""
        for _ in range(count):
            self._socket.send(self._frame)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
