"""A program that cannot outlive its test.

A `ContainedProcess` runs in a PID namespace of its own. It and all that it starts, in whatever
session or process group, end by SIGKILL when `close` is called, when its time is over, and when the
process that started it dies in any way.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vq.testing.requirements import check_contained

__all__ = ["ContainedProcess", "inheritable_copy"]

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
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
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


def inheritable_copy(fd: int) -> int:
    """A duplicate of `fd` with a number that `ContainedProcess` can pass on; the caller's."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
