"""A Linux guest by hand: User-Mode Linux with devices that somebody serves, and a shell in it.

    vq serve ramdisk:RamDisk --socket /tmp/disk.sock &
    python -m vq.testing.uml /tmp/disk.sock:2 -c "cat /proc/partitions"

2 is the device's type. The guest is that of `vq.testing.guest.UmlGuest`: it needs no privileges and
no root file system, boots in about two seconds, and loads its devices' drivers. Without ``-c`` the
lines of standard input are run, each for itself. It ends with this program.
"""

from __future__ import annotations

import argparse
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vq.errors import in_words
from vq.options import Parser
from vq.testing.guest import GuestError, UmlGuest, check_uml_drives
from vq.testing.requirements import MissingRequirement

__all__ = ["main"]

LIFETIME = 24 * 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    That is the last command's, 2 for wrong use and what this machine lacks, and 1 when the guest
    breaks.
    """
    parser = Parser(
        prog="python -m vq.testing.uml",
        description="Boot User-Mode Linux with devices, and run commands in it as root.",
    )
    parser.add_argument(
        "devices",
        nargs="+",
        type=_device,
        metavar="SOCKET:TYPE",
        help="where a device is served, and the number of its type (2 is a disk)",
    )
    parser.add_argument(
        "-c",
        dest="command",
        metavar="COMMAND",
        help="run this and end (default: the lines of standard input)",
    )
    parser.add_argument("--mem", default="128M", metavar="SIZE", help="default: %(default)s")
    parser.add_argument(
        "--load", action="append", default=[], metavar="MODULE", help="load this module too"
    )
    parser.add_argument("--log", action="store_true", help="print the kernel's log in the end")
    args = parser.parse_args(argv)
    try:
        check_uml_drives(kind for _, kind in args.devices)
        with UmlGuest(args.devices, mem=args.mem, load=args.load, lifetime=LIFETIME) as guest:
            status = 0
            for command in [args.command] if args.command is not None else _lines(guest.release):
                result = guest.run(command, timeout=LIFETIME)
                print(result.output, end="", flush=True)
                status = result.status
            if args.log:
                print(guest.kernel_log(), end="")
            return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (MissingRequirement, GuestError, OSError) as error:
        print(f"{parser.prog}: {in_words(error)}", file=sys.stderr)
        return 1 if isinstance(error, GuestError) else 2


def _device(text: str) -> tuple[str, int]:
    """A socket and a device's type. UML would wait without end for a socket that nobody has."""
    path, _, kind = text.rpartition(":")
    if not path or not kind.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no SOCKET:TYPE, as /tmp/disk.sock:2 is")
    if not Path(path).exists() or not stat.S_ISSOCK(Path(path).stat().st_mode):
        raise argparse.ArgumentTypeError(f"there is no socket {path}: serve the device first")
    return path, int(kind)


def _lines(release: str) -> Iterator[str]:
    """The lines of standard input; a prompt for each where somebody types them."""
    while True:
        if sys.stdin.isatty():
            print(f"linux {release}# ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


if __name__ == "__main__":
    sys.exit(main())
