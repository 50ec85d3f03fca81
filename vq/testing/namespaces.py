"""Network namespaces for tests: further hosts on this machine, for root on Linux."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vq.testing.contained import Closing, ContainedProcess, ContainedService
from vq.testing.requirements import check_namespaces, find_program

__all__ = ["Namespace", "bad_checksums", "iperf_server"]

_numbers = itertools.count()


class Namespace(Closing):
    """A network namespace that is gone, with all interfaces in it, after `close`.

    Its name starts with `prefix`. Raises `MissingRequirement` where none can be made.
    """

    def __init__(self, prefix: str = "vq") -> None:
        check_namespaces()
        self.name = f"{prefix}{os.getpid()}-{next(_numbers)}"
        self._ip = find_program("ip", package="iproute2")
        subprocess.run([self._ip, "netns", "add", self.name], check=True, timeout=20)
        try:
            # Addresses can be used at once, and no frames but the test's own.
            for place in ("all", "default"):
                self.run(f"echo 0 >/proc/sys/net/ipv6/conf/{place}/accept_dad")
                self.run(f"echo 0 >/proc/sys/net/ipv6/conf/{place}/router_solicitations")
            self.run("ip link set lo up")
        except BaseException:
            self.close()
            raise

    def argv(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in the namespace."""
        return [self._ip, "netns", "exec", self.name, *argv]

    def run(self, command: str, *, timeout: float = 30) -> str:
        """What a command of sh(1) writes in the namespace.

        Raises `RuntimeError` when it fails, `TimeoutError` when it takes too long.
        """
        try:
            done = subprocess.run(
                self.argv("sh", "-c", command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command!r} ran for more than {timeout} s") from None
        if done.returncode:
            raise RuntimeError(f"{command!r} ended with {done.returncode}: {done.stdout.strip()}")
        return done.stdout

    def start(
        self, argv: Sequence[str], *, lifetime: float = 120, output: Path | None = None
    ) -> ContainedProcess:
        """Starts a program in the namespace."""
        return ContainedProcess(self.argv(*argv), lifetime=lifetime, output=output)

    def add_tap(self, name: str, *, queues: int = 1) -> None:
        """Makes a persistent tap, for a device in the namespace to open by its name."""
        flags = "multi_queue vnet_hdr" if queues > 1 else "vnet_hdr"
        self.run(f"ip tuntap add {name} mode tap {flags}")

    def close(self) -> None:
        """Removes the namespace. Programs that still run in it lose their interfaces."""
        subprocess.run(
            [self._ip, "netns", "del", self.name], check=False, timeout=20, capture_output=True
        )


@contextmanager
def iperf_server(
    namespace: Namespace | None = None, *, port: int = 5201, lifetime: float = 300
) -> Iterator[None]:
    """Inside of this an iperf3 server listens, in a namespace or where we are."""
    argv = [find_program("iperf3"), "-s", "--forceflush", "-p", str(port)]
    with _IperfServer(argv if namespace is None else namespace.argv(*argv), lifetime):
        yield


class _IperfServer(ContainedService):
    def __init__(self, argv: Sequence[str], lifetime: float) -> None:
        super().__init__("iperf3", prefix="vq-iperf-")
        try:
            self._process = ContainedProcess(argv, lifetime=lifetime, output=self._log)
            self.wait_for(lambda: "listening" in self.log() or None, timeout=10)
        except BaseException:
            self.close()
            raise


def bad_checksums(run: Callable[[str], str]) -> dict[str, int]:
    """A kernel's counters of packets received with a bad checksum, those that are not 0.

    `run` runs a command on that kernel: `Namespace.run`, or a guest's `output`.
    """
    counters = re.findall(r"^(\w*InCsumErrors)\s+(\d+)", run("nstat -asz"), re.MULTILINE)
    return {name: int(count) for name, count in counters if int(count)}
