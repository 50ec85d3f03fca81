"""`vq serve vsock`: a guest's vsock connections on Unix sockets."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.device import Device
from vq.devices.vsock import VsockDevice, prefix_of_ports
from vq.options import positive
from vq.serve.kind import Kind

__all__ = ["VsockKind"]


class VsockKind(Kind):
    """Connections between a guest and programs of the host, without a network."""

    capabilities: ClassVar[Mapping[str, object]] = {"type": "vsock"}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """See `Kind`."""
        parser.add_argument(
            "--cid", "--guest-cid", type=int, required=True, metavar="N", help="the guest's CID"
        )
        parser.add_argument(
            "--uds",
            "--uds-path",
            required=True,
            metavar="PATH",
            help="programs of the host connect here and send 'CONNECT PORT' and a newline; the"
            " guest's connections to port N go to PATH_N",
        )
        parser.add_argument(
            "--connections",
            type=positive,
            default=512,
            metavar="N",
            help="at most so many at a time",
        )

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        self.connector.name_family(prefix_of_ports(args.uds))
        device = VsockDevice(
            args.cid, args.uds, connections=args.connections, connect=self.connector.connect
        )
        stack.callback(device.close)
        return [device]
