"""Landlock: which files a Linux process may still reach, whoever it runs as.

A ruleset names kinds of access that are denied, except where a rule allows them. Here there are no
rules: everything that the kernel knows how to deny is denied. Descriptors that are open stay open.

Sources: landlock(7), Linux' uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import struct

from vq.sandbox.libc import Libc
from vq.system_calls import number_of

__all__ = ["restrict", "version"]

LANDLOCK_CREATE_RULESET_VERSION = 1
RULESET = struct.Struct("=QQQ")
"""`struct landlock_ruleset_attr`: handled_access_fs, handled_access_net, scoped."""

_FILES = {1: 13, 2: 14, 3: 15, 5: 16}
"""From which version on how many kinds of access to files are known."""
_NETWORK = {4: 2}
"""Likewise binding and connecting TCP sockets."""
_SCOPES = {6: 2}
"""Likewise abstract Unix sockets, and signals, of processes outside."""


def version(libc: Libc, machine: str) -> int:
    """The version of Landlock that the kernel speaks, 0 for none."""
    try:
        return libc.system_call(
            _call("create_ruleset", machine), None, 0, LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def restrict(libc: Libc, machine: str) -> int:
    """Denies this thread all that Landlock can deny; returns the kernel's version of it.

    It must have given up new privileges. Raises `OSError` where there is no Landlock.
    """
    has = libc.system_call(
        _call("create_ruleset", machine), None, 0, LANDLOCK_CREATE_RULESET_VERSION
    )
    ruleset = _bytes(RULESET.pack(*(_mask(known, has) for known in (_FILES, _NETWORK, _SCOPES))))
    # An older kernel takes a shorter structure, and a longer one if the rest of it is zero.
    fd = libc.system_call(_call("create_ruleset", machine), ruleset, RULESET.size, 0)
    try:
        libc.system_call(_call("restrict_self", machine), fd, 0)
    finally:
        os.close(fd)
    return has


def _mask(known: dict[int, int], has: int) -> int:
    """A bit for everything that version `has` knows."""
    return (1 << max((count for since, count in known.items() if since <= has), default=0)) - 1


def _bytes(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def _call(name: str, machine: str) -> int:
    number = number_of(f"landlock_{name}", machine)
    assert number is not None  # it has the same number everywhere
    return number
