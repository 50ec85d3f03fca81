"""`vq serve console`: a console device, with its ports on terminals, sockets and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.device import Device
from vq.devices.console import ConsoleDevice, Port
from vq.devices.host_end import PtyEnd, host_end
from vq.errors import UsageError
from vq.serve.kind import Kind

__all__ = ["ConsoleKind"]

ENDS = "END is pty, pty:LINK, unix:PATH or file:PATH"


class ConsoleKind(Kind):
    """Terminals and streams of bytes between guest and host."""

    capabilities: ClassVar[Mapping[str, object]] = {"type": "console"}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """See `Kind`."""
        first = parser.add_mutually_exclusive_group(required=True)
        first.add_argument(
            "--pty",
            dest="end",
            action="store_const",
            const="pty",
            help="the console on a terminal of its own, whose path is printed",
        )
        first.add_argument(
            "--unix",
            dest="end",
            type=lambda path: f"unix:{path}",
            metavar="PATH",
            help="the console on a Unix socket, for one client at a time",
        )
        first.add_argument(
            "--file",
            dest="end",
            type=lambda path: f"file:{path}",
            metavar="PATH",
            help="the console's output added to a file",
        )
        parser.add_argument("--link", metavar="PATH", help="a symbolic link to the terminal")
        parser.add_argument(
            "--port",
            action="append",
            default=[],
            metavar="NAME=END",
            help=f"a further port, /dev/virtio-ports/NAME in the guest; {ENDS}",
        )
        parser.add_argument(
            "--console",
            action="append",
            default=[],
            metavar="END",
            help="a further console, /dev/hvc1 and so on in the guest",
        )
        parser.add_argument(
            "--swap-resize",
            action="store_true",
            help="for guests with Linux before 6.15 and more than one port, or the size of their"
            " windows is turned on its side",
        )

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        if args.link is not None and args.end != "pty":
            raise UsageError("--link goes with --pty")
        first = f"pty:{args.link}" if args.link else args.end
        wanted = [("", first, True), *(("", end, True) for end in args.console)]
        wanted += [(*_name_and_end(text), False) for text in args.port]
        ports = []
        with ExitStack() as opened:
            for name, text, console in wanted:
                end = host_end(text)
                opened.callback(end.close)
                ports.append(Port(end, name, console))
            device = ConsoleDevice(ports, swap_resize=args.swap_resize)
            stack.push(opened.pop_all())
        stack.callback(device.close)
        _tell_places(ports, as_json=args.stats == "json")
        return [device]


def _name_and_end(text: str) -> tuple[str, str]:
    name, equals, end = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--port takes NAME=END, not {text!r}; {ENDS}")
    return name, end


def _tell_places(ports: Sequence[Port], *, as_json: bool) -> None:
    """Says where the terminals are, which the system has chosen."""
    places = {
        port.name or f"console{number}": port.end.path
        for number, port in enumerate(ports)
        if isinstance(port.end, PtyEnd)
    }
    if as_json:
        print(json.dumps({"terminals": places}), flush=True)
        return
    for name, path in places.items():
        print(f"{name}: {path}", flush=True)
