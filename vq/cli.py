"""The command line: `vq loopback`, `vq check`, `vq serve`, `vq bench`. Wiring, nothing else.

Exit status: 0 all is well, 1 a fault was found, 2 wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from vq.errors import UsageError, VqError

__all__ = ["main"]

COMMANDS = {
    "loopback": ("vq.loopback", "send a capture through a scripted guest and back, and compare"),
    "check": ("vq.check", "see what this host can do, and whether vq's numbers are right"),
    "serve": ("vq.serve", "serve a device to a guest over vhost-user"),
    "bench": ("vq.bench", "measure vq beside its peers"),
}
"""Each module has `add_arguments(parser)` and `run(arguments) -> exit status`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    words = _join_option_values(sys.argv[1:] if argv is None else list(argv))
    parser = argparse.ArgumentParser(
        prog="vq", description="Write virtio device models in Python and run them."
    )
    parser.add_argument("--version", action="version", version=f"vq {metadata.version('vq')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = words[0] if words and words[0] in COMMANDS else None
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=_sentence(summary))
        if name == named:  # the others' modules need not be imported
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(words)
    try:
        status: int = importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)
    except (VqError, OSError) as error:
        print(f"vq {arguments.command}: {_describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | FileNotFoundError | IsADirectoryError) else 1
    except KeyboardInterrupt:
        return 130
    return status


def _join_option_values(words: list[str]) -> list[str]:
    """`--features -CSUM` means `--features=-CSUM`: its value may start with a minus."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--features":
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
