"""Measures anew what stands in docs/performance.md, and puts it there.

    python benchmarks/performance_page.py                  every bench; root, ten minutes
    python benchmarks/performance_page.py ring scaling     only these
    python benchmarks/performance_page.py --list           which commands it runs

Each table of the page stands between two comments, ``<!-- begin: COMMAND -->`` and
``<!-- end -->``; the command is run as `vq bench COMMAND --markdown`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- begin: (?P<command>.*?) -->\n).*?(<!-- end -->)", re.S)
_TIME_LIMIT = 900


def commands(page: Path = PAGE) -> list[str]:
    """The commands behind the tables, first to last."""
    return [found["command"] for found in PLACE.finditer(page.read_text())]


def measured(command: str) -> str:
    """What the bench prints as Markdown."""
    argv = [sys.executable, "-m", "vq", "bench", *shlex.split(command), "--markdown"]
    print(f"vq bench {command}", file=sys.stderr)
    return subprocess.run(
        argv, stdout=subprocess.PIPE, text=True, check=True, timeout=_TIME_LIMIT
    ).stdout


def with_table(text: str, command: str, table: str) -> str:
    """The page's text with a new table for a command."""
    return PLACE.sub(
        lambda found: found[1] + table + found[3] if found["command"] == command else found[0],
        text,
    )


def main() -> None:
    """Runs the benches and writes the page after each, so that little is lost by an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", nargs="*", help="only these benches (default: all on the page)")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    args = parser.parse_args()
    for command in commands():
        if args.bench and command.split()[0] not in args.bench:
            continue
        if args.list:
            print(f"vq bench {command}")
        else:
            PAGE.write_text(with_table(PAGE.read_text(), command, measured(command)))


if __name__ == "__main__":
    main()
