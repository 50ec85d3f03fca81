"""What the benches with real guests share: who serves the tap, and the machine that they share.

A contestant serves a tap to a guest over vhost-user: vq itself, or `peer.c`, a program that does
the same with one system call a frame. Both are processes of their own, in a network namespace of
the bench's, and `Served.cpu_seconds` says what they cost.

For root on Linux: what is missing is a `MissingRequirement`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from vq.bench import traffic
from vq.bench.measure import Progress, host_facts
from vq.bench.report import VQ, Figure, summary
from vq.errors import VqError
from vq.testing.contained import ContainedProcess, ContainedService
from vq.testing.initramfs import cache_directory
from vq.testing.namespaces import Namespace
from vq.testing.requirements import MissingRequirement

__all__ = [
    "LOOPBACK",
    "TAP",
    "C",
    "Served",
    "ServedTap",
    "available",
    "awake",
    "compare",
    "compile_program",
    "distance",
    "pinned",
    "run_traffic",
    "tap_namespace",
    "traffic_argv",
    "two_processors",
]

C = "c"
TAP = "vbtap0"
LOOPBACK = "loopback"
_START_TIMEOUT = 20.0
_COMPILERS = ("cc", "gcc", "clang")

_SPINNER = """
import contextlib, os, sys
# A session is scheduled as one, so its own priority counts too (sched(7), autogroup).
with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
    file.write("19")
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True:
    pass
"""


# --- who takes part ------------------------------------------------------------------------------


def compile_program(name: str) -> Path | None:
    """One of the bench's C programs, from the cache where it was compiled before; None without a C
    compiler.

    Raises `VqError` when the compiler does not take it.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    source = (resources.files("vq.bench") / f"{name}.c").read_bytes()
    key = hashlib.sha256(compiler.encode() + b"\0" + source).hexdigest()[:16]
    program = cache_directory() / f"bench-{name}-{key}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=program.parent) as directory:
            path = Path(directory, f"{name}.c")
            path.write_bytes(source)
            command = [compiler, "-O2", "-pthread", "-o", f"{directory}/{name}", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode:
                raise VqError(f"{name}.c does not compile: {done.stderr.strip()[-500:]}")
            os.replace(f"{directory}/{name}", program)
    return program


def available() -> dict[str, Sequence[str]]:
    """The contestants on this machine, by name: the start of each one's command line."""
    contestants: dict[str, Sequence[str]] = {VQ: [sys.executable, "-m", "vq", "serve", "net"]}
    peer = compile_program("peer")
    if peer is None:
        print("vq bench: no C compiler here, so vq runs without the C program", file=sys.stderr)
    else:
        contestants[C] = [str(peer)]
    return contestants


class Served(ContainedService):
    """A contestant's process, which waits for a guest on `socket`; killed by `close`.

    `link` is what it plugs the device into, in its own words; `start` starts a program.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        link: str = LOOPBACK,
        start: Callable[..., ContainedProcess] = ContainedProcess,
        lifetime: float = 300,
    ) -> None:
        super().__init__(f"the contestant {name}", prefix="vb-")
        self.socket = self.directory / "net.sock"
        socket = str(self.socket)
        if name == VQ:
            argv = [*command, "--socket", socket, "--link", link, "--once"]
        else:
            argv = [*command, socket, link.removeprefix("tap:")]
        try:
            self._process = start(argv, lifetime=lifetime, output=self._log)
            self.wait_for(lambda: self.socket.exists() or None, _START_TIMEOUT)
            self.pid = _find(argv)
        except BaseException:
            self.close()
            raise

    def cpu_seconds(self) -> float:
        """The processor time that the process and its workers, if it has any, have had so far."""
        workers = [worker.pid for worker in psutil.Process(self.pid).children(recursive=True)]
        # The clocks are numbered as clock_getcpuclockid(3) has it.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in (self.pid, *workers))


class ServedTap(Served):
    """A contestant with the tap of a namespace."""

    def __init__(
        self, namespace: Namespace, name: str, command: Sequence[str], *, lifetime: float = 300
    ) -> None:
        super().__init__(name, command, link=f"tap:{TAP}", start=namespace.start, lifetime=lifetime)

    def tap_frames(self) -> tuple[int, int]:
        """Frames that went out of the guest into the tap, and towards the guest, so far."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == TAP:
                numbers = counters.split()
                return int(numbers[1]), int(numbers[9])
        raise VqError(f"the tap {TAP} is gone")


def _find(argv: Sequence[str]) -> int:
    """The child or grandchild of ours that was started with this very command line."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() == list(argv):
                return process.pid
        except psutil.Error:  # it ended just now
            continue
    raise VqError(f"{argv[0]} ended at once")


# --- where it takes place ------------------------------------------------------------------------


@contextmanager
def tap_namespace(address: str, *, queues: int = 1) -> Iterator[Namespace]:
    """A namespace with a tap in it, up, with an IPv4 `address` (with its prefix), and no IPv6."""
    with Namespace("vb") as namespace:
        namespace.add_tap(TAP, queues=queues)
        namespace.run(
            "echo reno >/proc/sys/net/ipv4/tcp_congestion_control;"
            f" echo 1 >/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6;"
            f" ip addr add {address} dev {TAP} && ip link set {TAP} up"
        )
        yield namespace


def run_traffic(namespace: Namespace, *words: object, timeout: float) -> float:
    """Runs `vq.bench.traffic` in a namespace; returns the number that it prints."""
    return float(namespace.run(shlex.join(traffic_argv(*words)), timeout=timeout))


def traffic_argv(*words: object) -> list[str]:
    """The command line that runs `vq.bench.traffic`."""
    return [sys.executable, "-I", traffic.__file__, *map(str, words)]


@contextmanager
def awake() -> Iterator[None]:
    """Keeps all processors busy at the lowest priority.

    A virtual processor that was halted wakes up late, which is noise in what is measured.
    """
    with ExitStack() as stack:
        for processor in sorted(os.sched_getaffinity(0)):
            argv = [sys.executable, "-I", "-S", "-c", _SPINNER, str(processor)]
            spinner = ContainedProcess(["setsid", "--wait", *argv], lifetime=3600)
            stack.callback(spinner.close)
        yield


@contextmanager
def pinned(processors: set[int]) -> Iterator[None]:
    """What is started inside of this stays on these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_processors() -> tuple[set[int], set[int]]:
    """One processor for the guest, and the others for everything else.

    Raises `MissingRequirement` where there is one only.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise MissingRequirement("needs two processors")
    return {usable[-1]}, set(usable[:-1])


def distance() -> float | None:
    """Nanoseconds that a cache line takes from the guest's processor to another one and back.

    None where there is no such pair, or no compiler for what measures it (`distance.c`).
    """
    usable = sorted(os.sched_getaffinity(0))
    program = compile_program("distance")
    if program is None or len(usable) < 2:
        return None
    argv = [str(program), str(usable[-1]), str(usable[0])]
    with suppress(subprocess.SubprocessError):  # the system took a processor away meanwhile
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
        return float(done.stdout)
    return None


# --- how they are compared ------------------------------------------------------------------------


def compare(
    figures: Sequence[Figure],
    contestants: Mapping[str, Sequence[str]],
    rounds: int,
    sample: Callable[[str, Sequence[str]], Mapping[str, float]],
    *,
    called: str = "round",
    keep_awake: bool = True,
) -> dict[str, Any]:
    """Has `sample` measure each contestant, by name and command line, in turn, `rounds` times.

    Returns what a report has of it: where it was, how far apart the processors were before each
    round, `contestants`, and a `summary` as `figures`.
    """
    distances: list[float] = []
    samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in contestants}
    with (
        awake() if keep_awake else nullcontext(),
        Progress(rounds * len(contestants)) as progress,
    ):
        for number in range(rounds):
            apart = distance()
            if apart is not None:
                distances.append(apart)
            for name, command in contestants.items():
                progress.step(f"{name}, {called} {number + 1}")
                samples[name].append(sample(name, command))
    return {
        **host_facts(),
        "distance_ns": distances,
        f"{called}s": rounds,
        "contestants": list(contestants),
        "figures": summary(figures, samples),
    }
