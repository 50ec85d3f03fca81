"""Who serves: the options for it, and the step by which a process becomes a confined worker."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Collection, Iterable

from vq import options, sandbox
from vq.errors import UsageError
from vq.privsep import SeparatedTap

__all__ = [
    "add_arguments",
    "check",
    "close_strays",
    "confine",
    "has_input",
    "open_descriptors",
    "read_nothing",
    "user_of",
]

log = logging.getLogger(__name__)

NOBODY = "nobody"
MEMORY_LIMIT = 1024
"""MiB: many times what any device of vq's takes, and less than what would hurt a host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every kind of device has."""
    parser.add_argument(
        "--sandbox",
        choices=("auto", "require", "off"),
        default="auto",
        help="auto: the process that serves guests is confined as far as this system can do it;"
        " require: not at all rather than less than that; off: one process that may do everything"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--user",
        metavar="NAME",
        help=f"who serves guests when root starts this (default: {NOBODY})",
    )
    parser.add_argument(
        "--memory-limit",
        type=options.positive,
        default=MEMORY_LIMIT,
        metavar="MIB",
        help="what the process that serves guests may have of its own, beside their memory, where"
        " this system can tell the two apart (default: %(default)s)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start the process that serves guests again when it dies; frontends connect anew",
    )


def check(args: argparse.Namespace) -> None:
    """Raises `UsageError` for options that do not go together."""
    if args.user is not None and os.geteuid() != 0:
        raise UsageError("--user is for root: others cannot become another user")
    if args.user is not None and args.sandbox == "off":
        raise UsageError("--user goes with a sandbox: with --sandbox=off nobody becomes another")
    if args.restart and args.record is not None:
        raise UsageError("--record writes down one life of a device: it goes without --restart")


def user_of(args: argparse.Namespace) -> sandbox.User | None:
    """Who serves; None for whoever started this. Raises `UsageError` when there is no such user."""
    return sandbox.find_user(args.user or NOBODY) if os.geteuid() == 0 else None


def confine(
    args: argparse.Namespace, user: sandbox.User | None, taps: Iterable[SeparatedTap]
) -> None:
    """Confines this process for good, and says to what.

    Raises `UsageError` when something is missing that is required, `OSError` when the process
    cannot become the user that it is to be.
    """
    if args.sandbox == "off":
        return
    ports = [(tap.tap.port_ioctls, port.fileno()) for tap in taps for port in tap.ports]
    held = sandbox.confine(
        sandbox.Policy(
            user=user,
            ioctls=tuple({request for requests, _ in ports for request in requests}),
            data_fds=tuple(fd for _, fd in ports if fd is not None),
            memory=args.memory_limit << 20,
        )
    )
    missing = ", ".join(f"{name} ({why})" for name, why in held.missing.items())
    if missing and args.sandbox == "require":
        raise UsageError(f"--sandbox=require, but there is not: {missing}")
    log.info("guests are served with: %s", held)
    if missing:
        log.warning("the sandbox is without: %s", missing)


def open_descriptors() -> set[int]:
    """The descriptors above standard error that are open now: those that others left to us."""
    with contextlib.suppress(OSError):
        return set(filter(_is_open, map(int, os.listdir("/dev/fd")))) - {0, 1, 2}
    return set()


def _is_open(fd: int) -> bool:
    """Whether it is open; the one by which the directory was read is not any more."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def has_input() -> bool:
    """Whether standard input is open; to be asked before anything else could get its number."""
    return _is_open(0)


def read_nothing() -> None:
    """Puts an empty file in the place of standard input: a worker is not to read what is typed at
    the terminal of whoever started it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def close_strays(fds: Collection[int]) -> None:
    """Closes descriptors that a worker has no use for."""
    for fd in fds:
        os.close(fd)
