"""What a process may take of the host at most, by setrlimit(2): for good, as nobody can raise it.

Sources: getrlimit(2), core(5).
"""

from __future__ import annotations

import resource

__all__ = ["limit", "make_no_process"]

MOST_DESCRIPTORS = 4096
"""A memory table takes 256 at most, a ring three, a vsock connection one."""


def limit(memory: int | None) -> str:
    """Limits this process to `memory` bytes of its own (None: as it was); says so in a few words.

    Its own is what it allocates: a guest's memory is shared, and does not count (RLIMIT_DATA). It
    leaves no core, in which a guest's memory would be. Raises `OSError`.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, MOST_DESCRIPTORS)
    words = f"at most {MOST_DESCRIPTORS} descriptors"
    if memory is not None:
        _lower(resource.RLIMIT_DATA, memory)
        words += f" and {memory >> 20} MiB"
    return words


def make_no_process() -> None:
    """From now on no process can be forked from this one, unless root's. Raises `OSError`."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _lower(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard == resource.RLIM_INFINITY or hard > most:
        hard = most
    resource.setrlimit(what, (hard, hard))
