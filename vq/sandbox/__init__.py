"""Confining a process that parses what guests send.

`confine` takes from this process whatever its system can take: the user it runs as, its
privileges, the files, the network and the system calls that it does not need. What a system has not
got is told, and whoever calls decides whether to go on without it.

One module for each system (`linux`, `openbsd`, `freebsd`), the same three functions in each; here
one of them is chosen. Linux' parts are apart: `seccomp` and `system_calls`, `landlock`,
`namespaces`, `capabilities`, `limits`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

from vq.errors import UsageError
from vq.sandbox.policy import Confinement, Policy
from vq.sandbox.user import User, find_user

__all__ = [
    "Confinement",
    "KillSwitch",
    "Policy",
    "User",
    "confine",
    "end_with_parent",
    "facilities",
    "find_user",
    "keep_helper_privileges",
    "make_no_process",
    "prepare",
]

_LATE_IMPORTS = (
    *("encodings.ascii", "encodings.idna", "encodings.latin_1", "encodings.utf_8"),
    *("json.decoder", "json.encoder", "linecache", "stringprep", "tokenize", "traceback"),
)
"""What the standard library imports when it is first used."""


def prepare() -> None:
    """Loads what would otherwise be looked for when no files are left. Before `confine`."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    # The C library reads the local time zone's file each time, unless it has a name.
    if "TZ" not in os.environ and os.path.exists("/etc/localtime"):
        os.environ["TZ"] = ":/etc/localtime"
    time.tzset()


def confine(policy: Policy) -> Confinement:
    """Confines this process to what `policy` leaves it; says what holds and what is missing.

    Raises `OSError` when it cannot become the user that the policy names, `UsageError` when a
    module lists a system call that is not known.
    """
    if sys.platform == "linux":
        from vq.sandbox import linux

        return linux.confine(policy)
    if sys.platform.startswith("openbsd"):
        from vq.sandbox import openbsd

        return openbsd.confine(policy)
    if sys.platform.startswith("freebsd"):
        from vq.sandbox import freebsd

        return freebsd.confine(policy)
    raise UsageError(f"no sandbox is known on {sys.platform}")


def keep_helper_privileges(*, taps: bool, again: bool) -> None:
    """In a helper that is root: gives up what it does not need, where the system knows parts of
    root's privileges. `taps` says that it has some, `again` that it may have to start another
    worker."""
    if sys.platform == "linux" and os.geteuid() == 0:
        from vq.sandbox import linux

        linux.keep_helper_privileges(taps=taps, again=again)


def end_with_parent(parent: int) -> None:
    """In a process that was forked by `parent`: has it end when that one ends.

    Where the system does not know how, it is for the process to find out by itself.
    """
    if sys.platform == "linux":
        from vq.sandbox import linux

        linux.end_with_parent()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


class KillSwitch:
    """Ends a process that was forked: on Linux without kill(2), which could end others, too.

    To be made before the fork; then `arm` here and `let_go` in the forked process, which could
    otherwise see to it that nothing comes of it.
    """

    def __init__(self) -> None:
        self._pipe = os.pipe()
        self._pid = 0

    def let_go(self) -> None:
        """Closes it, in a process that is not to have it and in the one that does not need it."""
        for fd in self._pipe:
            os.close(fd)

    def arm(self, pid: int) -> None:
        """From now on it is for the process `pid`."""
        self._pid = pid
        if sys.platform == "linux":
            from vq.sandbox import linux

            linux.signal_by(self._pipe[0], pid)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        if sys.platform == "linux":
            os.write(self._pipe[1], b"\0")
        else:
            os.kill(self._pid, signal.SIGKILL)
        self.let_go()


def make_no_process() -> None:
    """Has this process fork no other from now on, where the system knows how.

    Its child would not end with it.
    """
    if sys.platform == "linux":
        from vq.sandbox import limits

        limits.make_no_process()


def facilities() -> dict[str, bool | int]:
    """What this host has for `confine`, by name: whether it works, or which version of it."""
    if sys.platform == "linux":
        from vq.sandbox import linux

        return linux.facilities()
    if sys.platform.startswith("openbsd"):
        from vq.sandbox import openbsd

        return openbsd.facilities()
    if sys.platform.startswith("freebsd"):
        from vq.sandbox import freebsd

        return freebsd.facilities()
    return {}
