"""Linux: no files, no network, no privileges, and only the system calls that are listed.

Each module of vq lists the system calls that it makes while guests are served, as `SYSTEM_CALLS`
beside the code, and the requests that it makes with ioctl(2), as `IOCTLS`; what Python and the C
library need themselves is listed here. The filter allows what the modules that are loaded list, and
kills the process for anything else: a call that nobody listed is a fault or an attack. Calls that
would look for files fail instead, so that a traceback that wants to show a line of source is only
shorter.

Sources: capabilities(7), landlock(7), namespaces(7), seccomp(2), PR_SET_NO_NEW_PRIVS(2const).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import signal
from collections.abc import Collection

from vq.sandbox import capabilities, landlock, limits, namespaces
from vq.sandbox.libc import Libc
from vq.sandbox.policy import Confinement, Policy, listed
from vq.sandbox.seccomp import (
    INSTRUCTION,
    SECCOMP_RET_KILL_PROCESS,
    Call,
    Condition,
    HasBits,
    Is,
    LacksBits,
    compile_filter,
)
from vq.sandbox.user import become
from vq.system_calls import number_of, numbers_at_hand

__all__ = [
    "confine",
    "end_with_parent",
    "facilities",
    "filter_for",
    "keep_helper_privileges",
    "listed_calls",
    "listed_ioctls",
    "signal_by",
]

PR_SET_PDEATHSIG = 1
F_SETSIG = 10
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_GET_ACTION_AVAIL = 2
PROT_EXEC = 4
AT_EMPTY_PATH = 0x1000
AF_UNIX = 1
CLONE_THREAD = 0x00010000
CLONE_CHILD_CLEARTID = 0x00200000
CLONE_CHILD_SETTID = 0x01000000

SYSTEM_CALLS = (
    # objects and their memory
    *("brk", "madvise", "mmap", "mprotect", "mremap", "munmap"),
    # locks, signals, time
    *("clock_gettime", "clock_nanosleep", "futex", "gettimeofday", "restart_syscall"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_yield"),
    # files that are open
    *("close", "fcntl", "fstat", "ioctl", "lseek", "newfstatat", "read", "write"),
    # a log record's process, hash seeds, the end
    *("exit", "exit_group", "getpid", "getrandom", "gettid"),
)
"""What the interpreter and the C library make."""

IOCTLS = (0x5421, 0x5451)
"""FIONBIO and FIOCLEX, which the interpreter makes."""

REFUSED = (
    *("access", "faccessat", "faccessat2", "getcwd", "getdents64", "lstat", "newfstatat", "open"),
    *("openat", "readlink", "readlinkat", "stat", "statx", "unlink", "unlinkat"),
    *("io_uring_register", "io_uring_setup"),
)
"""What looks for files fails: there are none to be found. So does setting up io_uring, whose
requests no filter sees: what is set up before may be used (`io_uring_enter`), for what it has."""

UNKNOWN = ("clone3",)
"""What a filter cannot look into is not there, where it is listed: the C library uses `clone`."""

CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "mmap": (LacksBits(2, PROT_EXEC),),
    "mprotect": (LacksBits(2, PROT_EXEC),),
    # What fstat(3) is since glibc 2.33; with a path it would look for a file.
    "newfstatat": (HasBits(3, AT_EMPTY_PATH),),
    "socket": (Is(0, AF_UNIX),),
    "clone": (HasBits(0, CLONE_THREAD),),
    # A process that serves some of a device's queues ends with the one that serves the device.
    "prctl": (Is(0, PR_SET_PDEATHSIG), Is(1, signal.SIGKILL)),
    "prlimit64": (Is(0, 0),),
}
"""On which conditions a listed call is allowed."""

FORK = (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | signal.SIGCHLD, signal.SIGCHLD)
"""What C libraries pass to clone(2) for fork(3): nothing is shared, and no namespace is new."""


def confine(policy: Policy, *, libc: Libc | None = None) -> Confinement:
    """Confines this process, which must have one thread, to what `policy` leaves it.

    Raises `OSError` when it cannot become the policy's user, and `UsageError` when a module lists a
    system call that has no number here; everything else that cannot be had is in the answer.
    """
    machine = platform.machine()
    with numbers_at_hand([*listed_calls(), *REFUSED, *UNKNOWN], machine):  # files are gone soon
        return _confine(policy, libc or Libc(), machine)


def _confine(policy: Policy, libc: Libc, machine: str) -> Confinement:
    result = Confinement()
    if policy.user is not None:
        result.take("namespaces", lambda: _leave_host(libc, machine))
        capabilities.bound(libc)
        become(policy.user)
        result.held["user"] = f"user {policy.user.name}"
    else:
        result.take("namespaces", lambda: _leave_host_as_user(libc))
    result.take("capabilities", lambda: _drop_capabilities(libc))
    result.take("no_new_privs", lambda: _no_new_privileges(libc))
    result.take("limits", lambda: limits.limit(policy.memory))
    result.take("landlock", lambda: _restrict_files(libc, machine))
    result.take("seccomp", lambda: _filter(libc, machine, policy))
    return result


def keep_helper_privileges(*, taps: bool, again: bool, libc: Libc | None = None) -> None:
    """In a helper that is root: keeps the capabilities that it may need, and no others.

    They are for ending a worker of another user, and for sockets in a user's directory, to connect
    to and to remove. With `taps` also for their settings; with `again` for starting another worker,
    which makes namespaces of its own and becomes another user.
    """
    libc = libc or Libc()
    kept = {capabilities.CAP_KILL, capabilities.CAP_DAC_OVERRIDE}
    if taps:
        kept.add(capabilities.CAP_NET_ADMIN)
    if again:
        kept |= {capabilities.CAP_SETUID, capabilities.CAP_SETGID, capabilities.CAP_SETPCAP}
        kept |= {capabilities.CAP_SYS_ADMIN}
    _no_new_privileges(libc)
    has = capabilities.permitted(libc)
    capabilities.bound(libc, kept)
    capabilities.keep_only(libc, kept & has)


def end_with_parent(*, libc: Libc | None = None) -> None:
    """This process is killed when the one that forked it ends (PR_SET_PDEATHSIG(2const))."""
    (libc or Libc()).call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def signal_by(fd: int, pid: int) -> None:
    """Has a process killed when something comes from the other end of the pipe `fd`.

    The kernel sends a signal then, and may be told which and to whom (fcntl(2), F_SETSIG). It goes
    by the open file: who else has that can take it back, who closes its own descriptor cannot.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, pid)
    fcntl.fcntl(fd, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


def facilities(*, libc: Libc | None = None) -> dict[str, bool | int]:
    """What this host has for `confine`, each tried without lasting effect."""
    libc = libc or Libc()
    machine = platform.machine()
    return {
        "namespaces": namespaces.try_in_child(libc),
        "no_new_privs": _has_prctl(libc),
        "landlock": landlock.version(libc, machine),
        "seccomp": _has_seccomp(libc, machine),
    }


# --- the filter ----------------------------------------------------------------------------------


def listed_calls() -> list[str]:
    """The names of all calls that the modules which are loaded list, in no particular order."""
    return list(dict.fromkeys((*SYSTEM_CALLS, *listed("SYSTEM_CALLS"))))


def listed_ioctls() -> list[int]:
    """The requests of ioctl(2) that they list."""
    return list(dict.fromkeys((*IOCTLS, *listed("IOCTLS"))))


def filter_for(policy: Policy, machine: str) -> bytes:
    """The program for the kernel. Raises as `number_of` does."""
    names = listed_calls()
    allowed: list[Call] = []
    for name in names:
        number = number_of("clone" if name == "fork" else name, machine)
        if number is None or name in UNKNOWN:
            continue
        if name == "fork":
            allowed += [Call(number, (Is(0, flags),)) for flags in FORK]
            plain = number_of(name, machine)  # musl's, where there is one
            allowed += [] if plain is None else [Call(plain)]
        elif name == "ioctl":
            requests = dict.fromkeys((*listed_ioctls(), *policy.ioctls))
            allowed += [Call(number, (Is(1, request),)) for request in requests]
        else:
            allowed.append(Call(number, CONDITIONS.get(name, ())))
    # First those without conditions, which the kernel remembers.
    allowed.sort(key=lambda call: bool(call.conditions))
    return compile_filter(
        machine,
        allowed,
        refused=_refused(names, machine),
    )


def _refused(names: Collection[str], machine: str) -> dict[int, int]:
    """The errno for each call that fails instead of killing."""
    errors = dict.fromkeys(REFUSED, errno.EACCES)
    errors |= dict.fromkeys((name for name in UNKNOWN if name in names), errno.ENOSYS)
    numbers = {number_of(name, machine): error for name, error in errors.items()}
    return {number: error for number, error in numbers.items() if number is not None}


# --- steps ---------------------------------------------------------------------------------------


def _leave_host(libc: Libc, machine: str) -> str:
    namespaces.leave_host(libc, machine)
    return "own namespaces without files"


def _leave_host_as_user(libc: Libc) -> str:
    namespaces.leave_host_as_user(libc)
    return "own namespaces"


def _drop_capabilities(libc: Libc) -> str:
    capabilities.keep_only(libc)
    return "no capabilities"


def _no_new_privileges(libc: Libc) -> str:
    libc.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return "no new privileges"


def _restrict_files(libc: Libc, machine: str) -> str:
    version = landlock.restrict(libc, machine)
    return f"Landlock version {version}"


def _filter(libc: Libc, machine: str, policy: Policy) -> str:
    program = filter_for(policy, machine)
    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // INSTRUCTION.size
    descriptor = _Program(count, ctypes.addressof(code))
    libc.call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(descriptor), 0, 0)
    return f"{len(listed_calls())} system calls"


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _has_prctl(libc: Libc) -> bool:
    try:
        return libc.call("prctl", PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) >= 0
    except OSError:
        return False


def _has_seccomp(libc: Libc, machine: str) -> bool:
    """Whether the kernel takes filters, and this processor's calls have numbers here."""
    try:
        number = number_of("seccomp", machine)
        assert number is not None
        action = ctypes.c_uint32(SECCOMP_RET_KILL_PROCESS)
        libc.system_call(number, SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action))
    except OSError:
        return False
    return True
