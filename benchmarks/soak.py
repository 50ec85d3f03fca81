"""An hour of mixed traffic on a real guest, with resets and changes in between: is all flat?

A User-Mode Linux guest runs on `vq serve net` with a tap behind it, in a network namespace. In a
random order it gets bulk TCP both ways and at once, datagrams, pings of all sizes and many short
connections, while now and then its driver is unloaded and loaded, its interface and the host's go
down and up, its offloads, MTU, filters and address change. A line a minute says what the rates
were and what helper and worker hold; the verdict at the end says whether memory and descriptors
stayed flat, the rates held, and nobody complained: the served process's log, either kernel's log
and checksum counters. A rate holds when it does so per second of the device's own processor time:
other load on the machine slows the traffic, and is nobody's fault.

Run it as root: `python benchmarks/soak.py --minutes 60`. It exits with 0 when all is well, 1 when
something was not, 2 when it was used wrongly or something that it needs is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from vq.errors import VqError
from vq.testing.contained import ContainedProcess
from vq.testing.guest import GuestError, UmlGuest
from vq.testing.namespaces import Namespace, bad_checksums, iperf_server
from vq.testing.requirements import find_program

HOST, GUEST, TAP = "198.18.68.1", "198.18.68.2", "vqsoak0"
MIB = 1 << 20
WARM_UP = 1
"""Minutes before anything is held against what comes later."""
GROWTH = 4 * MIB
"""What the processes may hold more in the second half than in the first, as medians."""
SLOWER = 0.7
"""The least that the last third's median per second of the device's processor time may be of the
first third's."""


def main() -> int:
    """Runs, prints, judges."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), metavar="N")
    args = parser.parse_args()
    if args.minutes < WARM_UP + 1:
        parser.error(f"less than {WARM_UP + 1} minutes say nothing")
    try:
        with ExitStack() as stack:
            faults = Soak(stack, args.minutes, args.seed).run()
    except VqError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"fault: {fault}")
    print("verdict: " + (f"{len(faults)} faults" if faults else "all flat, nobody complained"))
    return bool(faults)


class Soak:
    """The guest, its device, the host, and what was measured."""

    def __init__(self, stack: ExitStack, minutes: float, seed: int) -> None:
        self.minutes = minutes
        lifetime = minutes * 60 + 300
        self.random = random.Random(seed)
        print(f"seed {seed}, {minutes:g} minutes", flush=True)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vq-soak-")))
        self.host = stack.enter_context(Namespace("soak"))
        self.host.add_tap(TAP)
        self.host.run(f"ip addr add {HOST}/24 dev {TAP} && ip link set {TAP} up")
        self.output = directory / "served"
        path = directory / "net.sock"
        self.processes = _serve(self.host, path, self.output, lifetime, stack)
        self.guest = stack.enter_context(UmlGuest([(path, 1)], lifetime=lifetime))
        self.boot_complaints = len(self.guest.complaints())  # of a machine that was busy
        self.address_guest()
        self.guest.output("mkdir -p /tmp/www && echo page >/tmp/www/index.html")
        self.guest.output("httpd -h /tmp/www -p 80")
        stack.enter_context(iperf_server(self.host, lifetime=lifetime))
        self.rates: dict[str, list[float]] = {}
        self.costs: dict[str, list[float]] = {}  # the same per second of the device's processor
        self.holds: list[dict[str, int]] = []  # one a minute
        self.done: dict[str, int] = {}
        self.faults: list[str] = []

    def run(self) -> list[str]:
        """Everything; what was wrong."""
        started = time.monotonic()
        traffic = (
            self._tcp_out,
            self._tcp_in,
            self._both,
            self._udp,
            self._pings,
            self._connections,
        )
        changes = (
            *(self._reload, self._guest_down, self._host_down, self._offloads, self._mtu),
            *(self._filters, self._address, self._under_load),
        )
        self.minute = 0.0
        while self.minute < self.minutes:
            for step in (*self.random.sample(traffic, 3), self.random.choice(changes)):
                self.attempt(step)
            self.minute = (time.monotonic() - started) / 60
            if self.minute >= len(self.holds) + 1:
                self.tell()
        self.judge()
        return self.faults

    def attempt(self, step: Callable[[], None]) -> None:
        """Does a step; one that fails is a fault, and the next one is tried all the same."""
        name = step.__name__.lstrip("_")
        self.done[name] = self.done.get(name, 0) + 1
        try:
            step()
        except (GuestError, RuntimeError, TimeoutError, ValueError, KeyError, OSError) as error:
            text = " ".join(str(error).split())
            self.faults.append(f"minute {self.minute:.1f}, {name}: {text[:300]}")
            print(self.faults[-1], flush=True)
            self.address_guest()

    # --- traffic ----------------------------------------------------------------------------------

    def iperf(self, *options: str) -> dict[str, dict[str, float]]:
        """One iperf3 test from the guest; its summary."""
        text = self.guest.output(
            f"iperf3 --json --connect-timeout 3000 -c {HOST} {' '.join(options)}", timeout=60
        )
        summary: dict[str, dict[str, float]] = json.loads(text[text.index("{") :])["end"]
        return summary

    def measure(self, name: str, work: Callable[[], tuple[float, float]]) -> None:
        """Notes a rate: `work` returns how much was done, and in how many seconds."""
        busy = self._processor_time()
        amount, seconds = work()
        busy = self._processor_time() - busy
        self.rates.setdefault(name, []).append(amount / seconds)
        if busy:
            self.costs.setdefault(name, []).append(amount / busy)

    def _processor_time(self) -> float:
        """Seconds of processor time that helper and worker have had."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def _tcp(self, *options: str) -> tuple[float, float]:
        received = self.iperf("-t 2", *options)["sum_received"]
        return received["bytes"] * 8 / 1e9, received["seconds"]

    def _tcp_out(self) -> None:
        self.measure("to host", self._tcp)

    def _tcp_in(self) -> None:
        self.measure("to guest", lambda: self._tcp("-R"))

    def _both(self) -> None:
        self.iperf("-t 2 --bidir -P 2")

    def _udp(self) -> None:
        size = self.random.choice((64, 1400, 8000))
        direction = self.random.choice(("", "-R"))
        if not self.iperf(f"-t 1 -u -b {size * 16000} -l {size}", direction)["sum"]["packets"]:
            raise ValueError("no datagram arrived")

    def _pings(self) -> None:
        size = self.random.choice((0, 56, 1473, 9001, 65000))
        self.guest.output(f"ping -q -c 5 -i 0.05 -W 2 -s {size} {HOST}")
        self.host.run(f"ping -q -c 5 -i 0.05 -W 2 -s {size} {GUEST}")

    def _connections(self) -> None:
        script = (
            "import socket, time\n"
            "start = time.monotonic()\n"
            "for number in range(200):\n"
            f"    with socket.create_connection(({GUEST!r}, 80), timeout=10) as peer:\n"
            "        peer.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n"
            "        page = b''\n"
            "        while part := peer.recv(4096): page += part\n"
            "        assert page.endswith(b'page\\n'), page\n"
            "print(time.monotonic() - start)\n"
        )
        command = f'{sys.executable} -c "{script}"'
        self.measure("connections", lambda: (200, float(self.host.run(command, timeout=60))))

    # --- changes ----------------------------------------------------------------------------------

    def address_guest(self) -> None:
        """Gives the guest its address back, whatever became of its interface."""
        self.guest.run("ip link set eth0 mtu 1500; ip link set eth0 up")
        self.guest.run(f"ip addr replace {GUEST}/24 dev eth0")

    def _reload(self) -> None:
        self.guest.output("rmmod virtio_net && modprobe virtio_net")
        self.address_guest()
        self._pings()

    def _guest_down(self) -> None:
        self.guest.output("ip link set eth0 down && ip link set eth0 up")
        self._pings()

    def _host_down(self) -> None:
        self.host.run(f"ip link set {TAP} down")
        time.sleep(self.random.choice((0.1, 1.5)))
        self.host.run(f"ip link set {TAP} up")
        deadline = time.monotonic() + 5
        while self.guest.run(f"ping -q -c 1 -W 1 {HOST}").status:
            if time.monotonic() > deadline:
                raise TimeoutError("the link does not come back")

    def _offloads(self) -> None:
        for name in ("tx", "gro", "rx-gro-hw", "tso"):
            state = self.random.choice(("on", "off"))
            self.guest.run(f"ethtool -K eth0 {name} {state}")
            self.host.run(f"ethtool -K {TAP} {name} {state} || true")
        self.iperf("-t 1 --bidir")
        for name in ("tx", "gro", "rx-gro-hw", "tso"):
            self.guest.run(f"ethtool -K eth0 {name} on")
            self.host.run(f"ethtool -K {TAP} {name} on || true")

    def _mtu(self) -> None:
        mtu = self.random.choice((9000, 1280, 4000))
        self.guest.output(f"ip link set eth0 mtu {mtu}")
        self.host.run(f"ip link set {TAP} mtu {mtu}")
        self.iperf("-t 1")
        self.guest.output("ip link set eth0 mtu 1500")
        self.host.run(f"ip link set {TAP} mtu 1500")

    def _filters(self) -> None:
        self.guest.output("ip link set eth0 promisc on && ip link set eth0 promisc off")
        self.guest.output("ip maddr add 33:33:0:0:12:34 dev eth0")
        self.guest.output("ip maddr del 33:33:0:0:12:34 dev eth0")
        self._pings()

    def _address(self) -> None:
        last = self.random.randrange(2, 250)
        self.guest.output(f"ip link set eth0 address 02:00:00:00:77:{last:02x}")
        self._pings()

    def _under_load(self) -> None:
        """The interface goes down and up while TCP flows."""
        self.guest.run(
            f"iperf3 -c {HOST} -t 2 --bidir >/dev/null 2>&1 & iperf=$!; sleep 0.5;"
            " ip link set eth0 down; sleep 0.2; ip link set eth0 up; sleep 0.3; kill $iperf; wait"
        )
        self.address_guest()
        self._pings()

    # --- figures ----------------------------------------------------------------------------------

    def tell(self) -> None:
        """The line of a minute."""
        held = dict.fromkeys(("rss", "fds", "threads", "mappings"), 0)
        for process in self.processes:
            maps = process.memory_maps(grouped=False)
            held["rss"] += process.memory_info().rss - _guest_memory(maps)
            held["fds"] += process.num_fds()
            held["threads"] += process.num_threads()
            held["mappings"] += len(maps)
        self.holds.append(held)
        recent = {name: statistics.median(rates[-8:]) for name, rates in self.rates.items()}
        rates = "  ".join(f"{name} {rate:.2f}" for name, rate in sorted(recent.items()))
        print(
            f"minute {len(self.holds):>3}  {rates}  rss {held['rss'] / MIB:.1f} MiB"
            f"  fds {held['fds']}  mappings {held['mappings']}  threads {held['threads']}"
            f"  steps {sum(self.done.values())}  faults {len(self.faults)}",
            flush=True,
        )

    def judge(self) -> None:
        """What the figures, the logs and the kernels say."""
        flat = self.holds[WARM_UP:] or self.holds
        half = max(1, len(flat) // 2)
        for name, room in (("rss", GROWTH), ("fds", 0), ("threads", 0), ("mappings", 2)):
            # What is resident goes up and down by more than that from minute to minute.
            first, last = (
                statistics.median(held[name] for held in part)
                for part in (flat[:half], flat[-half:])
            )
            if last > first + room:
                self.faults.append(f"{name} grew from {first:.0f} to {last:.0f}")
        for name, costs in self.costs.items():
            third = len(costs) // 3
            if third >= 2:
                (was, is_now), (before, after) = map(_thirds, (self.rates[name], costs))
                print(
                    f"{name}, medians of the first third and the last:"
                    f" {was:.2f} and {is_now:.2f} a second,"
                    f" {before:.2f} and {after:.2f} per second of the device's processor time"
                )
                if after < SLOWER * before:
                    self.faults.append(
                        f"{name} per processor second: {before:.2f}, then {after:.2f}"
                    )
        self.faults += [f"served: {line}" for line in _complaints(self.output)][:10]
        complaints = self.guest.complaints()[self.boot_complaints :]
        self.faults += [f"guest: {line}" for line in complaints][:10]
        for who, run in (("guest", self.guest.output), ("host", self.host.run)):
            for counter, count in bad_checksums(run).items():
                self.faults.append(f"{who}: {counter} {count}")
        print("steps: " + ", ".join(f"{name} {n}" for name, n in sorted(self.done.items())))


def _serve(
    host: Namespace, path: Path, output: Path, lifetime: float, stack: ExitStack
) -> list[psutil.Process]:
    """Starts the serving processes and waits until they serve; the helper comes first."""
    find_program("iperf3")
    argv = [sys.executable, "-m", "vq", "serve", "net", f"--socket={path}", f"--link=tap:{TAP}"]
    notify = f"{output}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.settimeout(20)
        supervisor.bind(notify)
        served = ContainedProcess(
            host.argv(*argv),
            lifetime=lifetime,
            output=output,
            env={**os.environ, "NOTIFY_SOCKET": notify},
        )
        stack.callback(served.close)
        supervisor.recv(64)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--socket={path}" in words and words[0] == sys.executable:
            return [process, *process.children()]
    raise RuntimeError("the serving process cannot be found")


def _thirds(samples: Sequence[float]) -> tuple[float, float]:
    """The medians of the first third and of the last."""
    third = len(samples) // 3
    return statistics.median(samples[:third]), statistics.median(samples[-third:])


def _guest_memory(maps: Sequence[Any]) -> int:
    """How much of a process's memory is the guest's, which it fills as it likes."""
    return sum(m.rss for m in maps if "vm_file" in m.path or "deleted" in m.path)


def _complaints(output: Path) -> Sequence[str]:
    return [
        line
        for line in output.read_text().splitlines()
        if re.search("WARNING|ERROR|Traceback|Exception", line)
    ]


if __name__ == "__main__":
    sys.exit(main())
