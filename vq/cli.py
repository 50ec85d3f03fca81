"""The command line: `vq loopback`, `vq check`, `vq serve` and the others. Wiring, nothing else.

Exit status: 0 all is well, 1 a fault was found, 2 wrong use, or a file that cannot be used. When it
is interrupted or nobody reads its output any more, as for a program that a signal ends.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from vq.errors import UsageError, VqError, in_words
from vq.options import Parser

__all__ = ["join_option_values", "main", "parser"]

COMMANDS = {
    "loopback": ("vq.loopback", "send a capture through a scripted guest and back, and compare"),
    "check": ("vq.check", "see what this host can do, and whether vq's numbers are right"),
    "serve": ("vq.serve", "serve a device to a guest over vhost-user"),
    "replay": ("vq.replay", "replay a recorded session of a guest, and compare"),
    "bench": ("vq.bench", "measure vq beside its peers"),
}
"""Each module has `add_arguments(parser)` and `run(arguments) -> exit status`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
    words = join_option_values(sys.argv[1:] if argv is None else list(argv))
    named = words[0] if words and words[0] in COMMANDS else None
    try:
        if named == "serve":
            _check_device_first(words[1:])
        arguments = parser(named).parse_args(words)
        status: int = importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)
        _flush_output()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (VqError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            _give_up_output()
            return 128 + signal.SIGPIPE
        print(f"vq {named}: {in_words(error)}", file=sys.stderr)
        if isinstance(error, OSError):
            _give_up_output()
        return 2 if isinstance(error, UsageError | OSError) else 1
    return status


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes time, and an installed vq."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"vq {metadata.version('vq')}")
        parser.exit()


def parser(named: str | None) -> argparse.ArgumentParser:
    """The parser of the command line; of the commands only one that is named gets its options."""
    top = Parser(prog="vq", description="Write virtio device models in Python and run them.")
    top.add_argument("--version", action=_Version, nargs=0, help="say which vq this is, and end")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=_sentence(summary))
        if name == named:  # the others' modules need not be imported
            importlib.import_module(module).add_arguments(command)
    return top


def join_option_values(words: list[str]) -> list[str]:
    """`--features -CSUM` means `--features=-CSUM`: its value may start with a minus."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--features" and not word.startswith("--"):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def _check_device_first(words: Sequence[str]) -> None:
    """Which options there are depends on the device, so it stands before them."""
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        raise UsageError(f"the device stands before its options: vq serve DEVICE {words[0]} ...")


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."


def _flush_output() -> None:
    if sys.stdout is not None:  # it may have been closed before the start
        sys.stdout.flush()


def _give_up_output() -> None:
    """Keeps the interpreter from writing, at its end, what standard output did not take."""
    try:
        _flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
