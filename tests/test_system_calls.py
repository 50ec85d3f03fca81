"""The numbers of Linux' system calls: a table of three processors, read when somebody asks.

Judges of the numbers are libseccomp (tests/test_seccomp.py) and headers (tests/test_abi_probe.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vq
from vq import system_calls
from vq.errors import UsageError
from vq.system_calls import ARCHITECTURES, names, number_of, numbers_at_hand

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_every_number_is_one_call_of_a_processor(machine: str) -> None:
    numbers = {name: number_of(name, machine) for name in names()}
    found = [number for number in numbers.values() if number is not None]
    assert len(found) == len(set(found)) > 320
    assert sorted(found)[-48:] == list(range(424, 472)), (
        "they are the same everywhere from there on"
    )
    assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", name) for name in numbers)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("read", (0, 63, 63)),
        ("timerfd_create", (283, 85, 85)),
        ("uprobe", (336, None, None)),
        ("dup2", (33, None, None)),
        ("renameat", (264, 38, None)),
        ("riscv_flush_icache", (None, None, 259)),
        ("kexec_file_load", (320, 294, 294)),
        ("rseq_slice_yield", (471, 471, 471)),
    ],
)
def test_golden_numbers(name: str, numbers: tuple[int | None, ...]) -> None:
    assert tuple(number_of(name, machine) for machine in ARCHITECTURES) == numbers


def test_all_calls_of_this_machines_headers_are_there() -> None:
    if not HEADER.exists():
        pytest.skip(f"there is no {HEADER} here")
    theirs = dict(re.findall(r"#define __NR_(\w+) (\d+)\n", HEADER.read_text()))
    assert len(theirs) > 300
    assert {name: number_of(name, "x86_64") for name in theirs} == {
        name: int(number) for name, number in theirs.items()
    }


def test_a_name_that_no_table_has_is_told_with_those_that_are_near() -> None:
    near = r"timerfd_crate has no number here \(vq/data/system_calls.txt\); there is timerfd_create"
    with pytest.raises(UsageError, match=near):
        number_of("timerfd_crate", "x86_64")
    with pytest.raises(UsageError, match=r"call 12345 has no number here \([^;]*\)$"):
        number_of("12345", "aarch64")
    with pytest.raises(OSError, match="the system calls of sparc64 have no numbers here"):
        number_of("read", "sparc64")


def test_numbers_are_at_hand_where_there_are_no_files_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system_calls._table.cache_clear()
    with numbers_at_hand(["read", "dup2"], "x86_64"):
        monkeypatch.setattr(system_calls, "_FILE", Path("/nowhere/at/all"))
        assert number_of("read", "x86_64") == 0
    with pytest.raises(FileNotFoundError):
        number_of("read", "x86_64")  # forgotten


def test_what_is_listed_is_looked_at_first() -> None:
    with pytest.raises(UsageError, match="readd has no"), numbers_at_hand(["readd"], "x86_64"):
        raise AssertionError("not reached")
    with numbers_at_hand(["readd"], "sparc64"):
        pass  # whether there is a filter at all is seen later


def test_nobody_reads_them_who_makes_no_filter() -> None:
    code = (
        "import sys; seen = []; sys.addaudithook(lambda event, args: seen.append(str(args[0])) if"
        " event == 'open' else None); import vq, vq.serve.net, vq.sandbox.linux;"
        "print(any('system_calls.txt' in name for name in seen))"
    )
    root = Path(vq.__file__).parent.parent
    done = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root)
    assert done == "False\n"
