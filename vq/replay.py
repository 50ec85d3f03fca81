"""`vq replay`: a recorded session before a device without the guest, or in words.

What ``vq serve ... --record FILE`` has recorded is replayed against the same device, made anew: the
exit status says whether it does what it did. A network or entropy device is made as the recording
says. Any other is named, with what it needs: a recording does not open anybody's disk image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack

from vq import serve
from vq.device import Device
from vq.errors import UsageError
from vq.recording.format import RecordingReader
from vq.recording.player import Difference, Replay
from vq.recording.show import as_json, describe

__all__ = ["add_arguments", "run"]

_OWN_OPTIONS = ("--show", "--data", "--json", "--ignore")
_BEFORE_PROGRESS = 1.0
"""Seconds after which it says how far it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vq replay``."""
    parser.add_argument(
        "file", metavar="FILE", help="what `vq serve ... --record FILE` has written"
    )
    parser.add_argument(
        "--show", action="store_true", help="print what was recorded, and replay nothing"
    )
    parser.add_argument("--data", action="store_true", help="with --show: all bytes, not the first")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: what came out, or with --show one object a line",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="QUEUE",
        help="do not compare what comes back in this queue",
    )
    parser.add_argument(
        "--device",
        nargs=argparse.REMAINDER,
        metavar="WORD",
        help="behind all other options: the device and its options, as they stand behind"
        " `vq serve`; needed for devices that have files or sockets of the host's",
    )


def run(args: argparse.Namespace) -> int:
    """Shows or replays; 0 when the device does what it did, 1 when it does otherwise.

    Raises `CaptureError` for what is no recording, `UsageError`, and `OSError`.
    """
    if args.device == []:
        raise UsageError("--device takes a device and its options, as vq serve does")
    for word in args.device or ():
        if word in _OWN_OPTIONS:
            raise UsageError(f"{word} stands before --device, which takes all that follows it")
    if args.show:
        return _show(args)
    session = Replay(args.file)
    with ExitStack() as stack:
        device = _make_device(session, args, stack)
        differences = session.run(
            device, ignore=args.ignore, progress=_Progress().tell if sys.stderr.isatty() else None
        )
    (_print_json if args.json else _print_words)(session, differences)
    return 1 if differences else 0


def _show(args: argparse.Namespace) -> int:
    reader = RecordingReader(args.file)
    if args.json:
        for event in reader:
            print(json.dumps(as_json(event, reader.header)))
    else:
        for line in describe(reader, data=args.data):
            print(line)
    return 0


def _make_device(session: Replay, args: argparse.Namespace, stack: ExitStack) -> Device:
    """The device that was recorded, or that was named, plugged into the recording's link."""
    words: list[str] = args.device or session.header.served
    if not words:
        raise UsageError(
            f"the recording does not say how its device is made: name it with --device"
            f" ({session.header.device})"
        )
    if not args.device and ":" in words[0]:
        # Recordings come from others: no module is imported because one of them names it.
        raise UsageError(f"the recording is of {words[0]}: name it with --device {words[0]}")
    kind, options = serve.parse(words[0], words[1:])
    if not args.device and not kind.needs_nothing_of_the_host:
        raise UsageError(
            f"a {words[0]} device has files or sockets of the host's: name it with --device"
            f" {words[0]} ..., and give it copies"
        )
    return kind.open_for_replay(options, session.link, stack)


class _Progress:
    """How far a replay is, on a terminal, once it takes its time."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _BEFORE_PROGRESS

    def tell(self, seconds: float) -> None:
        """A step of the recording, so far from its beginning, is about to be replayed."""
        if time.monotonic() >= self._due:
            self._due += _BEFORE_PROGRESS
            print(f"replaying: {seconds:.1f} s of the session", file=sys.stderr)


def _print_words(session: Replay, differences: list[Difference]) -> None:
    for difference in differences:
        print(f"step {difference.number}, {difference.seconds:.6f} s: {difference.what}")
    counted = ", ".join(f"{count} {what}" for what, count in sorted(session.compared.items()))
    verdict = f"{len(differences)} differences" if differences else "as recorded"
    print(f"{session.steps} steps replayed ({counted or 'nothing to compare'}): {verdict}")
    if not session.reader.complete:
        print("the recording has no end: the process that made it was killed, or still runs")


def _print_json(session: Replay, differences: list[Difference]) -> None:
    print(
        json.dumps(
            {
                "steps": session.steps,
                "complete": session.reader.complete,
                "compared": dict(session.compared),
                "differences": [difference._asdict() for difference in differences],
            }
        )
    )
