"""A program that cannot outlive its test.

A `ContainedProcess` runs in a PID namespace of its own. It and all that it starts, in whatever
session or process group, end by SIGKILL when `close` is called, when its time is over, and when the
process that started it dies in any way. A `ContainedService` is one with files of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeVar

from vq.errors import VqError
from vq.testing.requirements import check_contained

__all__ = ["Closing", "ContainedProcess", "ContainedService", "inheritable_copy"]

T = TypeVar("T")

# The shell is process 1 of the namespace: when it ends the kernel kills all others. It ends when
# the program or its time does, or when nobody holds the other end of its standard input any more.
_FIRST_PROCESS = """
exec 3<&0 </dev/null
limit=$1; input=$2; shift 2
timeout -s KILL "$limit" "$@" <"$input" 3<&- &
program=$!
{ read -r nothing <&3; kill -KILL $program; } &
wait $program
"""

_PATIENCE = 5.0
_LAST_WORDS = 2000


class ContainedProcess:
    """A running program; `argv[0]` is looked for in PATH.

    `output` is a file that its standard output and error are appended to; without one they are
    lost. Its standard input is the reading end of the pipe `input`, else empty. `lifetime` is in
    seconds. `pass_fds` are inherited under their numbers and must be 10 or more (see
    `inheritable_copy`). Raises `MissingRequirement` where namespaces cannot be had.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        lifetime: float,
        output: Path | None = None,
        input: int | None = None,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        check_contained()
        source = os.devnull if input is None else f"/proc/self/fd/{input}"
        inherited = [*pass_fds, *([] if input is None else [input])]
        user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
        with open(output or os.devnull, "ab") as sink:
            self._process = subprocess.Popen(
                [
                    *("unshare", *user, "--pid", "--fork", "--kill-child", "--"),
                    *("sh", "-c", _FIRST_PROCESS, "sh", f"{lifetime:.3f}", source),
                    *argv,
                ],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                pass_fds=inherited,
                env=env,
            )

    @property
    def running(self) -> bool:
        """Whether the program runs."""
        return self._process.poll() is None

    def wait(self, timeout: float) -> int:
        """The exit status, 128 + N after signal N; raises `TimeoutError`."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the program still runs after {timeout} s") from None

    def close(self) -> None:
        """Kills the program and everything it started. Closing twice is allowed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        # The namespace's first process ends now, and the kernel waits for all others before that
        # is told to us. The signal is for the case that it does not.
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Closing(ABC):
    """What is closed at the end of a ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Gives everything back. Closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ContainedService(Closing):
    """A contained program that is asked things while it runs, with files of its own.

    Whoever derives from it launches the program, and closes it again if it does not come up.
    """

    failure: ClassVar[type[Exception]] = VqError
    """What is raised when the program ends, or is not as it should be in time."""

    def __init__(self, name: str, *, prefix: str, log: str = "log") -> None:
        """`name` is what messages call it; its directory's name begins with `prefix`."""
        self.name = name
        self.directory = Path(tempfile.mkdtemp(prefix=prefix))
        """Where the program's own files are; gone after `close`."""
        self._log = self.directory / log
        self._process: ContainedProcess | None = None

    def log(self) -> str:
        """Everything that the program has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def running(self) -> bool:
        """Whether the program runs. One that hangs runs too."""
        return self._process is not None and self._process.running

    def wait_for(self, look: Callable[[], T | None], timeout: float) -> T:
        """What `look` gives, once it is something; it is asked again and again.

        Raises `failure`, with the program's last words, when it ends or takes too long.
        """
        deadline = time.monotonic() + timeout
        while (found := look()) is None:
            if not self.running or time.monotonic() > deadline:
                what = "does not answer" if self.running else "ended"
                raise self.failure(f"{self.name} {what}: {self.log().strip()[-_LAST_WORDS:]}")
            time.sleep(0.01)
        return found

    def close(self) -> None:
        """Kills the program and removes its files. Closing twice is allowed."""
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def inheritable_copy(fd: int) -> int:
    """A duplicate of `fd` with a number that `ContainedProcess` can pass on; the caller's."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
