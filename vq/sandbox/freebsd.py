"""FreeBSD: Capsicum's capability mode.

A process in capability mode reaches nothing by name: no file, no address, no process. What it has
are its descriptors, and a descriptor that is only for data is limited to that, so that no ioctl can
be made with it.

Sources: capsicum(4), cap_rights_limit(2), sys/capsicum.h of FreeBSD 14.
"""

from __future__ import annotations

import ctypes
import struct

from vq.sandbox.libc import Libc
from vq.sandbox.policy import Confinement, Policy
from vq.sandbox.user import become

__all__ = ["DATA_RIGHTS", "confine", "facilities"]

RIGHTS = struct.Struct("=QQ")
"""`cap_rights_t`, version 0: two words, each with the bit of its own index (CAPRIGHT)."""
CAP_READ = 1 << 57 | 0x1
CAP_WRITE = 1 << 57 | 0x2
CAP_FCNTL = 1 << 57 | 0x8000
CAP_EVENT = 1 << 58 | 0x20
DATA_RIGHTS = CAP_READ | CAP_WRITE | CAP_FCNTL, CAP_EVENT
"""Reading, writing, O_NONBLOCK, and waiting for either."""


def confine(policy: Policy, *, libc: Libc | None = None) -> Confinement:
    """See `vq.sandbox.confine`."""
    libc = libc or Libc()
    result = Confinement()
    if policy.user is not None:
        become(policy.user)
        result.held["user"] = f"user {policy.user.name}"
    result.take("capsicum", lambda: _enter(libc, policy))
    return result


def facilities(*, libc: Libc | None = None) -> dict[str, bool | int]:
    """What this host has for `confine`."""
    return {"capsicum": (libc or Libc()).has("cap_enter")}


def _enter(libc: Libc, policy: Policy) -> str:
    rights = ctypes.create_string_buffer(RIGHTS.pack(*DATA_RIGHTS), RIGHTS.size)
    for fd in policy.data_fds:
        libc.call("cap_rights_limit", fd, rights)
    libc.call("cap_enter")
    return "capability mode"
