"""Namespaces of a process's own: no network, no files, nobody to talk to.

Descriptors that are open stay what they were, so that a tap goes on in the network that it is of.

Sources: unshare(2), user_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import contextlib
import os

from vq.sandbox.libc import Libc
from vq.system_calls import number_of

__all__ = ["leave_host", "leave_host_as_user", "try_in_child"]

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
_ALL = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2


def leave_host(libc: Libc, machine: str) -> None:
    """For root: own mount, network, IPC, UTS and cgroup namespaces, and a root without any file.

    Raises `OSError` when the kernel refuses; then this process may be half out already.
    """
    libc.call("unshare", _ALL)
    _empty_root(libc, machine)


def leave_host_as_user(libc: Libc) -> None:
    """For anybody else: the same in a user namespace of its own; the files stay in view.

    Raises `OSError` where users may not have such namespaces.
    """
    uid, gid = os.getuid(), os.getgid()
    libc.call("unshare", CLONE_NEWUSER | _ALL)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def try_in_child(libc: Libc) -> bool:
    """Whether this process could have namespaces of its own. A child finds out."""
    flags = _ALL if os.geteuid() == 0 else CLONE_NEWUSER | _ALL
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(OSError):
            libc.call("unshare", flags)
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _empty_root(libc: Libc, machine: str) -> None:
    """Puts an empty read-only file system in the place of everything."""
    place = next((path for path in (b"/run", b"/tmp", b"/var") if os.path.isdir(path)), b"/")
    libc.call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    hardened = MS_NOSUID | MS_NODEV | MS_NOEXEC
    libc.call("mount", b"none", place, b"tmpfs", hardened, b"size=4k,mode=755")
    os.chdir(place)
    number = number_of("pivot_root", machine)
    assert number is not None
    # "pivot_root(".", ".")": the old root comes to lie on top of the new one, and goes.
    libc.system_call(number, b".", b".")
    libc.call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    libc.call("mount", b"none", b"/", None, MS_REMOUNT | MS_RDONLY | hardened, None)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
