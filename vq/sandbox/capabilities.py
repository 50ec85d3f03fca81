"""A Linux process's capabilities: giving them up, all or all but some.

Sources: capabilities(7), capset(2), Linux' uapi/linux/capability.h, uapi/linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Collection

from vq.sandbox.libc import Libc

__all__ = [
    "CAP_DAC_OVERRIDE",
    "CAP_KILL",
    "CAP_NET_ADMIN",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "bound",
    "keep_only",
    "permitted",
]

CAP_DAC_OVERRIDE = 1
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21

PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
LAST_POSSIBLE = 63

VERSION_3 = 0x20080522
HEADER = struct.Struct("=Ii")
"""`struct __user_cap_header_struct`: version, process (0: this one)."""
DATA = struct.Struct("=6I")
"""Two `struct __user_cap_data_struct`: effective, permitted, inheritable, low and high halves."""


def bound(libc: Libc, kept: Collection[int] = ()) -> None:
    """Takes all capabilities but those `kept` out of the bounding set: no program can have them.

    Needs CAP_SETPCAP; raises `OSError` without it.
    """
    for capability in range(LAST_POSSIBLE + 1):
        if capability in kept:
            continue
        try:
            libc.call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError as error:
            if error.errno == errno.EINVAL:  # beyond the last one that this kernel has
                break
            raise


def keep_only(libc: Libc, kept: Collection[int] = ()) -> None:
    """Gives up all capabilities but those `kept`; none are inherited.

    Raises `OSError` for one that this process does not have.
    """
    libc.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    mask = sum(1 << capability for capability in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = ctypes.create_string_buffer(HEADER.pack(VERSION_3, 0), HEADER.size)
    data = ctypes.create_string_buffer(DATA.pack(low, low, 0, high, high, 0), DATA.size)
    libc.call("capset", header, data)


def permitted(libc: Libc) -> set[int]:
    """The capabilities that this process may use."""
    header = ctypes.create_string_buffer(HEADER.pack(VERSION_3, 0), HEADER.size)
    data = ctypes.create_string_buffer(DATA.size)
    libc.call("capget", header, data)
    _, low, _, _, high, _ = DATA.unpack(data.raw)
    mask = low | high << 32
    return {capability for capability in range(LAST_POSSIBLE + 1) if mask >> capability & 1}
