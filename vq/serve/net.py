"""`vq serve net`: network devices, and what they are plugged into."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar, cast

from vq import options, unix_socket
from vq.device import Device
from vq.errors import UsageError
from vq.link import Link, LoopbackLink, NullLink, Tap, link_pair
from vq.loop import Loop
from vq.net import DEFAULT_MAC, NetDevice
from vq.net_transmit import Responder
from vq.privsep import SeparatedTap
from vq.serve import transport
from vq.serve.kind import Kind

# Modules that only some links need are imported where they are: what is idle stays small.

__all__ = ["LINKS", "NetKind", "open_link"]

log = logging.getLogger(__name__)

LINKS = "loopback, null, tap:NAME, stream:PATH[,listen], pcap:IN[,OUT]"


class NetKind(Kind):
    """A network device, or two that are joined (``--link pair``)."""

    capabilities: ClassVar[Mapping[str, object]] = {"type": "net"}  # no "features" there
    needs_nothing_of_the_host = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """See `Kind`."""
        parser.add_argument(
            "--link",
            default="loopback",
            help="what the device is plugged into: " + LINKS + ", or pair, which joins the"
            " devices of two --socket options (default: %(default)s)",
        )
        parser.add_argument("--queue-pairs", type=options.positive, default=1, metavar="N")
        parser.add_argument(
            "--processes",
            type=options.positive,
            metavar="N",
            help="how many processes share the queue pairs, where the link is a tap with a queue"
            " for each (default: one for each pair, but no more than processors)",
        )
        parser.add_argument(
            "--queue-size",
            type=options.queue_size,
            default=256,
            metavar="N",
            help="at most, per queue",
        )
        parser.add_argument(
            "--mac",
            type=options.mac_address,
            default=DEFAULT_MAC,
            metavar="ADDRESS",
            help="the guest's address; with --link pair the second guest has the next one"
            f" (default: {DEFAULT_MAC.hex(':')})",
        )
        parser.add_argument(
            "--mtu", type=options.positive, metavar="BYTES", help="told to the guest"
        )
        parser.add_argument(
            "--lock-mac",
            action="store_true",
            help="drop frames from the guest with another source address; hide frames for others",
        )
        parser.add_argument(
            "--local-dhcp",
            metavar="GUEST/HOST",
            help="answer the guest's DHCP here: its address and the host's,"
            " as 100.64.1.3/100.64.1.2",
        )
        parser.add_argument(
            "--complete-checksums",
            action="store_true",
            help="give the guest finished checksums only, for programs in it that read raw frames",
        )
        parser.add_argument(
            "--features",
            default="",
            metavar="LIST",
            help="a comma list of +NAME and -NAME against the default of everything",
        )
        parser.add_argument(
            "--capture",
            metavar="FILE",
            help="record the frames of both directions as pcapng; with --link pair as the first"
            " guest sends and receives them",
        )

    def sockets_needed(self, args: argparse.Namespace) -> int:
        """See `Kind`."""
        return 2 if args.link == "pair" else 1

    def queue_num(self, args: argparse.Namespace) -> int:
        """What frontends take for the number of queue pairs."""
        return int(args.queue_pairs)

    def processes(self, args: argparse.Namespace) -> int:
        """See `Kind`. What is recorded all goes through one process."""
        if args.capture is not None or args.record is not None:
            return 1
        most: int = args.processes or _processors()
        return min(int(args.queue_pairs), most)

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        _check(args)
        if args.link == "pair":
            left, right = link_pair(ports=args.queue_pairs)
            return [
                _net_device(args, left, args.mac, stack, capture=args.capture),
                _net_device(args, right, _next_mac(args.mac), stack),
            ]
        link = open_link(args.link, ports=args.queue_pairs, connect=self.connector.connect)
        if isinstance(link, Tap):
            link = SeparatedTap(link, len(self.taps))
            self.taps.append(link)
        return [_net_device(args, link, args.mac, stack, capture=args.capture)]

    def open_for_replay(
        self, args: argparse.Namespace, link: Link | None, stack: ExitStack
    ) -> Device:
        """Plugs the device into the recording's link in place of its own."""
        if link is None:
            raise UsageError("the recording is not of a network device")
        return _net_device(args, link, args.mac, stack)

    def follow(self, devices: Sequence[Device], loop: Loop) -> None:
        """Lets the guests know when the host takes an interface up or down."""
        for device in devices:
            _follow_link(cast(NetDevice, device), loop)

    def statistics(self, new: Mapping[str, int]) -> str:
        """See `Kind`."""
        dropped = sum(count for name, count in new.items() if "_dropped" in name)
        return (
            f"from guest {new.get('tx_frames', 0):>8} frames"
            f" {8e-6 * new.get('tx_bytes', 0):>9.1f} Mbit"
            f"   to guest {new.get('rx_frames', 0):>8} frames"
            f" {8e-6 * new.get('rx_bytes', 0):>9.1f} Mbit   dropped {dropped}"
        )


def open_link(
    text: str, *, ports: int = 1, connect: Callable[[str], socket.socket] = unix_socket.connect
) -> Link:
    """The link that `text` names: one of `LINKS`, with `ports` ports where it can have several.

    `connect` makes the connections of a stream. Raises `UsageError` for what is no link, and what
    the link itself raises.
    """
    kind, _, rest = text.partition(":")
    if kind in ("loopback", "null") and not rest:
        return LoopbackLink(ports=ports) if kind == "loopback" else NullLink(ports=ports)
    if not rest:
        raise UsageError(f"{text!r} is not a link; the links are {LINKS}")
    first, comma, second = rest.partition(",")
    if kind == "tap":
        return _open_tap(rest, ports)
    if kind == "stream" and second in ("", "listen"):
        from vq.stream import StreamLink

        if second:
            return StreamLink.listen(first)
        return StreamLink.connect(first, reconnect=True, connect=connect)
    if kind == "pcap":
        from vq.pcap_link import PcapLink

        return PcapLink(first, second if comma else None)
    raise UsageError(f"{text!r} is not a link; the links are {LINKS}")


def _open_tap(name: str, queues: int) -> Link:
    """The tap; one whose last user is about to let go of it is waited for."""
    from vq.tap import open_tap

    deadline = time.monotonic() + transport.PREDECESSOR_SECONDS
    while True:
        try:
            return open_tap(name, queues=queues)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


# --- its parts -----------------------------------------------------------------------------------


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(args: argparse.Namespace) -> None:
    if args.local_dhcp and args.link == "pair":
        raise UsageError("--local-dhcp is for one guest, --link pair joins two")
    kind, _, files = args.link.partition(":")
    if args.capture and kind == "pcap":
        for path in files.split(","):
            if os.path.realpath(path) == os.path.realpath(args.capture):
                raise UsageError(f"{path} cannot be the link's file and the record at once")


def _net_device(
    args: argparse.Namespace, link: Link, mac: bytes, stack: ExitStack, capture: str | None = None
) -> NetDevice:
    stack.callback(link.close)
    if capture is not None:
        link = _recorded(link, capture)
        stack.callback(link.close)
    device = NetDevice(
        link,
        mac=mac,
        mtu=args.mtu,
        queue_pairs=args.queue_pairs,
        queue_size=args.queue_size,
        features=options.net_features(args.features, mtu=args.mtu, queue_pairs=args.queue_pairs),
        lock_mac=args.lock_mac,
        complete_checksums=args.complete_checksums,
        responders=_responders(args),
    )
    stack.callback(device.close)
    return device


def _recorded(link: Link, capture: str) -> Link:
    from vq.pcap_link import CaptureLink

    return CaptureLink(link, capture)


def _responders(args: argparse.Namespace) -> Sequence[Responder]:
    if not args.local_dhcp:
        return []
    from vq.dhcp import LocalDhcp

    guest, slash, host = args.local_dhcp.partition("/")
    if not slash:
        raise UsageError("--local-dhcp takes GUEST/HOST, two IPv4 addresses")
    return [LocalDhcp(args.mac, guest, host).answer]


def _next_mac(mac: bytes) -> bytes:
    """The address after `mac`, of the same maker."""
    return mac[:3] + ((int.from_bytes(mac[3:], "big") + 1) % (1 << 24)).to_bytes(3, "big")


def _follow_link(device: NetDevice, loop: Loop) -> None:
    """Tells the guest, within a second, when the host takes its interface up or down."""
    was_up = device.link.is_up

    def look() -> None:
        nonlocal was_up
        is_up = device.link.is_up
        if is_up != was_up:
            was_up = is_up
            log.info("%s is %s", device.link.name, "up" if is_up else "down")
            device.set_link_up(is_up)
        loop.call_later(1.0, look)

    loop.call_later(1.0, look)
