"""DPDK's testpmd as the driver in front of a vhost-user device, for tests. For root on Linux.

with HugePages(256) as pages, Testpmd(pages, "/run/vq.sock", ["--forward-mode=txonly"]) as pmd:
    pmd.command("start")
    ...
    print(pmd.stats().tx_packets)
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vq.errors import VqError
from vq.testing.contained import Closing, ContainedProcess, ContainedService, inheritable_copy
from vq.testing.requirements import MissingRequirement, check_root, find_program

__all__ = ["HugePages", "PortStats", "Testpmd", "TestpmdError"]

_PROMPT = "testpmd> "
_COUNT = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


class HugePages(Closing):
    """`count` more huge pages of 2 MiB for this machine, and a hugetlbfs to take them from.

    Both are given back by `close`. Raises `MissingRequirement` where they cannot be had.
    """

    def __init__(self, count: int = 256) -> None:
        check_root()
        if not _COUNT.exists():
            raise MissingRequirement("needs huge pages of 2 MiB")
        before = int(_COUNT.read_text())
        _COUNT.write_text(str(before + count))
        self._added = int(_COUNT.read_text()) - before
        self.directory = Path(tempfile.mkdtemp(prefix="vq-huge-"))
        self._mounted = False
        try:
            if self._added < count:
                raise MissingRequirement(f"needs {count} huge pages, can have {self._added}")
            mount = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "vq", str(self.directory)]
            done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
            if done.returncode:
                raise MissingRequirement(f"needs hugetlbfs: {done.stderr.strip()}")
            self._mounted = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the pages back. Closing twice is allowed."""
        if self._mounted:
            subprocess.run(["umount", str(self.directory)], timeout=20, check=False)
            self._mounted = False
        if self._added:
            _COUNT.write_text(str(max(0, int(_COUNT.read_text()) - self._added)))
            self._added = 0
        if self.directory.exists():
            self.directory.rmdir()


class TestpmdError(VqError):
    """testpmd did not start, ended, or does not answer."""

    __test__ = False


@dataclass(frozen=True)
class PortStats:
    """The frames and bytes of one of testpmd's ports since it was started."""

    rx_packets: int
    rx_bytes: int
    tx_packets: int
    tx_bytes: int


class Testpmd(ContainedService):
    """testpmd with one virtio-user port for each socket, waiting for commands.

    `sockets` is one path of a vhost-user socket, or several. `port` adds properties to each port
    ("queues=2,mrg_rxbuf=0"), `arguments` are testpmd's own (after the ``--``). It takes `mem` MiB
    of `pages`, and uses processor 0 for itself and the others in `cores` for forwarding.
    """

    __test__ = False
    failure = TestpmdError

    def __init__(
        self,
        pages: HugePages,
        sockets: str | Path | Sequence[str | Path],
        arguments: Sequence[str] = (),
        *,
        port: str = "",
        cores: str = "0,1",
        mem: int = 256,
        start_timeout: float = 30,
        lifetime: float = 300,
    ) -> None:
        program = find_program("dpdk-testpmd", package="dpdk")
        find_program("stdbuf", package="coreutils")
        paths = [sockets] if isinstance(sockets, str | Path) else sockets
        super().__init__("testpmd", prefix="vq-testpmd-")
        # Both ends are kept: reopened through /proc, a pipe without a writer would be at its end.
        reading, self._commands = os.pipe()
        try:
            source = inheritable_copy(reading)
            try:
                self._process = ContainedProcess(
                    [
                        # Its prompt goes past the buffer that its answers go through.
                        *("stdbuf", "-o0", program, "-l", cores, "-m", str(mem)),
                        f"--huge-dir={pages.directory}",
                        *("--single-file-segments", "--no-pci", f"--file-prefix=vq{os.getpid()}"),
                        *(
                            f"--vdev=net_virtio_user{number},path={path}"
                            + (f",{port}" if port else "")
                            for number, path in enumerate(paths)
                        ),
                        *("--", "-i", "--no-mlockall", "--disable-device-start", *arguments),
                    ],
                    lifetime=lifetime,
                    output=self._log,
                    input=source,
                    env={**os.environ, "RUNTIME_DIRECTORY": str(self.directory)},
                )
            finally:
                os.close(source)
                os.close(reading)
            self._answer(0, start_timeout)
            self.command("port start all", timeout=start_timeout)
        except BaseException:
            self.close()
            raise

    def command(self, text: str, *, timeout: float = 20) -> str:
        """Gives testpmd a command ("start", "stop", "show port info 0"); returns its answer.

        Raises `TestpmdError` when none comes in time.
        """
        position = len(self.log())
        os.write(self._commands, text.encode() + b"\n")
        return self._answer(position, timeout)

    def stats(self, port: int = 0) -> PortStats:
        """What the port has counted."""
        text = self.command(f"show port stats {port}")
        found = dict(re.findall(r"([RT]X-(?:packets|bytes)):\s+(\d+)", text))
        return PortStats(
            *(int(found[name]) for name in ("RX-packets", "RX-bytes", "TX-packets", "TX-bytes"))
        )

    def close(self) -> None:
        """Kills testpmd. Closing twice is allowed."""
        super().close()
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def _answer(self, position: int, timeout: float) -> str:
        """What testpmd writes from `position` of its log on, up to its next prompt."""
        return self.wait_for(lambda: _before_prompt(self.log()[position:]), timeout)


def _before_prompt(text: str) -> str | None:
    return text.removesuffix(_PROMPT) if text.endswith(_PROMPT) else None
