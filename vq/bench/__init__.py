"""`vq bench`: vq's speed, measured beside something else in the same run.

Each sub-command is a module that measures and describes its report; here they are only mounted.
How a measurement is made stands in `vq.bench.measure`, how it is shown in `vq.bench.report`.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from vq.bench import guest, loopback, pairs, profile, ring, scaling, tap, testpmd
from vq.bench.report import Description, add_output_arguments, show

__all__ = ["BENCHES", "add_arguments", "run"]


class _Bench(Protocol):
    HELP: str
    """What it measures, as the end of a sentence."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its own options."""

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The report that `--json` prints. Raises `UsageError` for what is missing here."""

    def describe(self, report: dict[str, Any]) -> Description:
        """What people are shown of a report."""


BENCHES: dict[str, _Bench] = {
    "ring": ring,
    "loopback": loopback,
    "tap": tap,
    "guest": guest,
    "testpmd": testpmd,
    "pairs": pairs,
    "scaling": scaling,
    "profile": profile,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `vq bench`, each with its options."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, bench in BENCHES.items():
        sub = benches.add_parser(name, help=bench.HELP, description=f"Measure {bench.HELP}.")
        add_output_arguments(sub)
        bench.add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """Run the bench that was asked for, and show what it found; returns the exit status."""
    bench = BENCHES[args.bench]
    report = bench.measure(args)
    show(args, report, bench.describe(report))
    return 0
