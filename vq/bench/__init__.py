"""`vq bench`: vq's speed, measured beside something else in the same run.

Each sub-command is a module with `HELP`, `add_arguments(parser)` and `run(args) -> int`; here they
are only mounted. How a measurement is made and shown stands in `vq.bench.measure`.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from vq.bench import guest, ring, testpmd

__all__ = ["add_arguments", "run"]


class _Bench(Protocol):
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


_BENCHES: dict[str, _Bench] = {"ring": ring, "guest": guest, "testpmd": testpmd}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `vq bench`, each with its options."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, bench in _BENCHES.items():
        bench.add_arguments(
            benches.add_parser(name, help=bench.HELP, description=f"Measure {bench.HELP}.")
        )


def run(args: argparse.Namespace) -> int:
    """Run the bench that was asked for; returns the exit status."""
    return _BENCHES[args.bench].run(args)
