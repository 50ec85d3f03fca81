"""Network namespaces for tests: further hosts on this machine, for root on Linux."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from vq.testing.contained import ContainedProcess
from vq.testing.requirements import check_namespaces, find_program

__all__ = ["Namespace", "bad_checksums", "iperf_server"]

_numbers = itertools.count()


class Namespace:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def iperf_server(
    namespace: Namespace | None = None, *, port: int = 5201, lifetime: float = 300
) -> Iterator[None]:
    """Inside of this an iperf3 server listens, in a namespace or where we are."""
    argv = [find_program("iperf3"), "-s", "--forceflush", "-p", str(port)]
    if namespace is not None:
        argv = namespace.argv(*argv)
    with tempfile.TemporaryDirectory(prefix="vq-iperf-") as directory:
        log = Path(directory) / "log"
        server = ContainedProcess(argv, lifetime=lifetime, output=log)
        try:
            deadline = time.monotonic() + 10
            while "listening" not in log.read_text():
                if not server.running or time.monotonic() > deadline:
                    raise RuntimeError(f"iperf3 does not listen: {log.read_text().strip()}")
                time.sleep(0.02)
            yield
        finally:
            server.close()


def bad_checksums(run: Callable[[str], str]) -> dict[str, int]:
    """A kernel's counters of packets received with a bad checksum, those that are not 0.

    `run` runs a command on that kernel: `Namespace.run`, or a guest's `output`.
    """
    counters = re.findall(r"^(\w*InCsumErrors)\s+(\d+)", run("nstat -asz"), re.MULTILINE)
    return {name: int(count) for name, count in counters if int(count)}
