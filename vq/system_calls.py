"""The numbers of Linux's system calls on the processors that filters are written for.

x86_64 has numbers of its own. aarch64 and riscv64 share the kernel's generic table, which left out
calls that a newer one can stand in for: they have no number there, and a program there does not
make them. ``data/system_calls.txt`` has all calls up to Linux 7.2, and is read when somebody asks.
`vq check --abi` compares all of them with the kernel's headers.

Sources: Linux, arch/x86/entry/syscalls/syscall_64.tbl and scripts/syscall.tbl.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

from vq.errors import UsageError

__all__ = ["ARCHITECTURES", "THREAD_CALLS", "names", "number_of", "numbers_at_hand"]

THREAD_CALLS = ("clone", "clone3", "rseq", "sched_getaffinity", "set_robust_list")
"""What a module lists in its `SYSTEM_CALLS` when its code starts threads (see `vq.sandbox`)."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}
"""By the names of `platform.machine`: `AUDIT_ARCH_*`, by which a filter tells one system call table
from another."""

_FILE = Path(__file__).parent / "data" / "system_calls.txt"


def number_of(name: str, machine: str) -> int | None:
    """The number of the call `name` on `machine`; None where it does not exist.

    Raises `UsageError` for a name that is in no table, and says what it may be meant for; `OSError`
    for a processor that has no table.
    """
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} have no numbers here")
    number = _table(machine).get(name)
    if number is None and name not in (known := names()):
        from difflib import get_close_matches  # takes long to import, and is seldom needed

        near = ", ".join(get_close_matches(name, sorted(known)))
        raise UsageError(
            f"the system call {name} has no number here (vq/data/system_calls.txt)"
            + (f"; there is {near}" if near else "")
        )
    return number


def names() -> set[str]:
    """Every call that has a number here, on whatever processor."""
    return {name for machine in ARCHITECTURES for name in _read(machine)}


@contextmanager
def numbers_at_hand(listed: Iterable[str], machine: str) -> Iterator[None]:
    """Within, `number_of` needs no file for what is `listed`; behind, the numbers are forgotten.

    Raises `UsageError` as `number_of` does.
    """
    if machine in ARCHITECTURES:
        for name in listed:
            number_of(name, machine)
    try:
        yield
    finally:
        _table.cache_clear()


def _read(machine: str) -> dict[str, int]:
    """A processor's numbers, by name."""
    table: dict[str, int] = {}
    machines: list[str] = []
    for line in _FILE.read_text(encoding="ascii").splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if not words[0].isdigit():
            machines = words
        elif machine in machines:
            table.update(zip(words[1:], count(int(words[0])), strict=False))
    return table


_table = cache(_read)
