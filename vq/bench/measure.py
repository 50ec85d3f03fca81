"""How a bench measures: contestants in turn, medians, and what it needs for that.

A figure alone says little, since machines differ and are shared. So whatever is measured is
measured beside something else in the same run, A B A B, and the ratio of the medians is what lasts.

What is measured stands in the benches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

__all__ = [
    "Progress",
    "add_repeat_arguments",
    "host_facts",
    "in_turn",
    "positive_number",
    "positive_seconds",
    "print_json",
    "print_table",
    "struct_unpack_ns",
]

_UNPACKS = 10_000


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each contestant returned, called in turn, `rounds` times each.

    What disturbs the machine for a while so disturbs all of them, and an outlier none.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, sample in contestants.items():
            samples[name].append(sample())
    return {name: statistics.median(values) for name, values in samples.items()}


def struct_unpack_ns() -> float:
    """Nanoseconds that one `struct` unpack of a descriptor takes here, loop included.

    A yardstick for the interpreter on this machine: rates of different machines are compared by it.
    """
    unpack = struct.Struct("<QIHH").unpack_from
    descriptor = memoryview(bytearray(16))
    start = time.thread_time_ns()
    for _ in repeat(None, _UNPACKS):
        unpack(descriptor, 0)
    return (time.thread_time_ns() - start) / _UNPACKS


def host_facts() -> dict[str, Any]:
    """Where the figures come from: interpreter, processor, kernel; and when."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.system(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The processor's name, and how many of them there are."""
    name = ""
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)[0]
    return f"{os.cpu_count()} x {name or platform.processor() or 'unknown'}"


def positive_number(text: str) -> int:
    """A count from the command line, for `argparse`."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def positive_seconds(text: str) -> float:
    """A duration from the command line, for `argparse`."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def add_repeat_arguments(parser: argparse.ArgumentParser, *, rounds: int, seconds: float) -> None:
    """The options `--rounds` and `--seconds`, with what they are by default."""
    parser.add_argument(
        "--rounds",
        type=positive_number,
        default=rounds,
        metavar="N",
        help="how often each is measured (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=seconds,
        metavar="S",
        help="how long each measurement takes (default %(default)s)",
    )


def print_json(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Prints one JSON object, on standard output unless told otherwise."""
    file = file or sys.stdout
    json.dump(report, file, indent=2)
    print(file=file)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None
) -> None:
    """Prints rows of text in columns as wide as they need, all flush right."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells), file=file or sys.stdout)


class Progress:
    """Says on standard error how far a bench is, when somebody is there to read it."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._shown = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """The next step begins, and it is `what`."""
        self._done += 1
        if self._shown:
            print(f"\r\x1b[K{self._done}/{self._steps} {what}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
