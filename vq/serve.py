"""`vq serve`: devices on vhost-user sockets, for guests that run elsewhere.

One process serves one device, or two that are joined (`--link pair`). Logs go to standard error and
say in words what a guest negotiated; statistics go to standard output when asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from vq import options
from vq.errors import UsageError
from vq.link import Link, LoopbackLink, NullLink, link_pair
from vq.loop import Loop
from vq.net import DEFAULT_MAC, NetDevice
from vq.net_transmit import Responder
from vq.vhost_user import Client, Connection, Server, unwatch_device, watch_device

# Modules that only some links need are imported where they are: what is idle stays small.

__all__ = ["LINKS", "add_arguments", "open_link", "run"]

log = logging.getLogger(__name__)

LINKS = "loopback, null, tap:NAME, stream:PATH[,listen], pcap:IN[,OUT]"


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the devices that can be served, each with its options."""
    devices = parser.add_subparsers(dest="device", metavar="DEVICE", required=True)
    net = devices.add_parser(
        "net", help="a network device", description="Serve a network device over vhost-user."
    )
    _add_transport_arguments(net)
    net.add_argument(
        "--link",
        default="loopback",
        help="what the device is plugged into: " + LINKS + ", or pair, which joins the"
        " devices of two --socket options (default: %(default)s)",
    )
    net.add_argument("--queue-pairs", type=options.positive, default=1, metavar="N")
    net.add_argument(
        "--queue-size", type=options.queue_size, default=256, metavar="N", help="at most, per queue"
    )
    net.add_argument(
        "--mac",
        type=options.mac_address,
        default=DEFAULT_MAC,
        metavar="ADDRESS",
        help="the guest's address; with --link pair the second guest has the next one"
        f" (default: {DEFAULT_MAC.hex(':')})",
    )
    net.add_argument("--mtu", type=options.positive, metavar="BYTES", help="told to the guest")
    net.add_argument(
        "--lock-mac",
        action="store_true",
        help="drop frames from the guest with another source address; hide frames for others",
    )
    net.add_argument(
        "--local-dhcp",
        metavar="GUEST/HOST",
        help="answer the guest's DHCP here: its address and the host's, as 100.64.1.3/100.64.1.2",
    )
    net.add_argument(
        "--complete-checksums",
        action="store_true",
        help="give the guest finished checksums only, for programs in it that read raw frames",
    )
    net.add_argument(
        "--features",
        default="",
        metavar="LIST",
        help="a comma list of +NAME and -NAME against the default of everything",
    )
    net.add_argument(
        "--capture",
        metavar="FILE",
        help="record the frames of both directions as pcapng; with --link pair as the first guest"
        " sends and receives them",
    )


def _add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        "--socket-path",
        action="append",
        metavar="PATH",
        help="listen here for the frontend (twice with --link pair)",
    )
    parser.add_argument(
        "--fd", type=int, metavar="N", help="a socket handed over, listening or connected already"
    )
    parser.add_argument(
        "--client", action="store_true", help="connect to --socket, where the frontend listens"
    )
    parser.add_argument("--once", action="store_true", help="end when the first frontend has gone")
    parser.add_argument(
        "--stats",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="print a line a second, for people or for programs",
    )
    parser.add_argument(
        "--print-capabilities",
        action=_PrintCapabilities,
        nargs=0,
        help="print what this program can do, as vhost-user's conventions have it, and end",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="log more")


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; returns the exit status.

    Raises `UsageError` and `OSError` for what keeps it from beginning to serve.
    """
    sockets: list[str] = args.socket or []
    paired = args.link == "pair"
    if args.fd is None and len(sockets) != (2 if paired else 1):
        raise UsageError("--link pair takes two --socket" if paired else "give one --socket")
    if args.fd is not None and (sockets or paired or args.client):
        raise UsageError("--fd goes without --socket, --client and --link pair")
    if args.local_dhcp and paired:
        raise UsageError("--local-dhcp is for one guest, --link pair joins two")
    kind, _, files = args.link.partition(":")
    if args.capture and kind == "pcap":
        for path in files.split(","):
            if os.path.realpath(path) == os.path.realpath(args.capture):
                raise UsageError(f"{path} cannot be the link's file and the record at once")
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        # Before there is anything to leave behind, and until nothing of it is left.
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, lambda *_: loop.stop())
        devices = _net_devices(args, stack)
        gone = loop.stop if args.once else None
        for index, device in enumerate(devices):
            _offer(args, sockets[index : index + 1], device, loop, gone, stack)
        for device in devices:
            _follow_link(device, loop)
        if args.stats:
            _Statistics(devices, loop, as_json=args.stats == "json").start()
        _tell_supervisor("READY=1")
        try:
            loop.run()
        except BrokenPipeError:  # nobody reads the statistics any more
            raise
        except OSError as error:
            log.error("the system refused: %s", error)
            return 1
        finally:
            _tell_supervisor("STOPPING=1")
    return 0


def open_link(text: str, *, ports: int = 1) -> Link:
    """The link that `text` names: one of `LINKS`, with `ports` ports where it can have several.

    Raises `UsageError` for what is no link, and what the link itself raises.
    """
    kind, _, rest = text.partition(":")
    if kind in ("loopback", "null") and not rest:
        return LoopbackLink(ports=ports) if kind == "loopback" else NullLink(ports=ports)
    if not rest:
        raise UsageError(f"{text!r} is not a link; the links are {LINKS}")
    first, comma, second = rest.partition(",")
    if kind == "tap":
        from vq.tap import open_tap

        return open_tap(rest, queues=ports)
    if kind == "stream" and second in ("", "listen"):
        from vq.stream import StreamLink

        return StreamLink.listen(first) if second else StreamLink.connect(first, reconnect=True)
    if kind == "pcap":
        from vq.pcap_link import PcapLink

        return PcapLink(first, second if comma else None)
    raise UsageError(f"{text!r} is not a link; the links are {LINKS}")


# --- its parts -----------------------------------------------------------------------------------


class _PrintCapabilities(argparse.Action):
    """Answers at once: a manager may ask without any other option, or with some of no meaning."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object
    ) -> None:
        # QEMU's docs/interop/vhost-user.json: the type alone, a network device has no "features".
        print(json.dumps({"type": parser.prog.rpartition(" ")[2]}))
        parser.exit()


def _net_devices(args: argparse.Namespace, stack: ExitStack) -> list[NetDevice]:
    """The device, or the two devices of a pair."""
    if args.link != "pair":
        link = open_link(args.link, ports=args.queue_pairs)
        return [_net_device(args, link, args.mac, stack, capture=args.capture)]
    left, right = link_pair(ports=args.queue_pairs)
    return [
        _net_device(args, left, args.mac, stack, capture=args.capture),
        _net_device(args, right, _next_mac(args.mac), stack),
    ]


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


def _offer(
    args: argparse.Namespace,
    path: list[str],
    device: NetDevice,
    loop: Loop,
    gone: Callable[[], None] | None,
    stack: ExitStack,
) -> None:
    """Puts a device on its socket."""
    pairs = args.queue_pairs
    if args.client:
        client = Client(device, loop, path[0], queue_num=pairs, on_disconnect=gone)
        stack.callback(client.close)
        return
    if args.fd is None:
        server = Server(device, loop, path[0], queue_num=pairs, on_disconnect=gone)
    else:
        sock = _handed_over(args.fd)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            watch_device(device, loop)
            stack.callback(unwatch_device, device, loop)
            connection = Connection(
                sock, device, loop, name=f"fd {args.fd}", queue_num=pairs, on_closed=loop.stop
            )
            stack.callback(connection.close)
            return
        server = Server(device, loop, sock, queue_num=pairs, on_disconnect=gone)
    stack.callback(server.close)
    log.info("%s: waiting for a frontend", server.name)


def _handed_over(fd: int) -> socket.socket:
    """The socket that whoever started us left open; raises `UsageError` when it is of no use."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError):
        raise UsageError(f"--fd {fd}: no socket is open under this number") from None
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise UsageError(f"--fd {fd}: not a Unix stream socket")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.getpeername()
    except OSError:
        sock.detach()
        raise UsageError(f"--fd {fd}: the socket neither listens nor is connected") from None
    except UsageError:
        sock.detach()
        raise
    return sock


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


def _tell_supervisor(state: str) -> None:
    """Tells a supervisor that started us how we are (sd_notify(3)); nothing without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log.warning("cannot tell the supervisor: %s", error)


class _Statistics:
    """What went through the devices, every second."""

    def __init__(self, devices: list[NetDevice], loop: Loop, *, as_json: bool) -> None:
        self._devices = devices
        self._loop = loop
        self._as_json = as_json
        self._before = Counter[str]()

    def start(self) -> None:
        """Begins to count."""
        self._before = self._sum()
        self._loop.call_later(1.0, self._tell)

    def _sum(self) -> Counter[str]:
        total = Counter[str]()
        for device in self._devices:
            total.update(device.stats)
        return total

    def _tell(self) -> None:
        now = self._sum()
        new = {name: count - self._before[name] for name, count in now.items()}
        self._before = now
        try:
            print(self._line(new, now), flush=True)
        except BrokenPipeError:  # whoever reads them ends the command, as it ends others
            raise
        except OSError as error:
            log.error("no more statistics, they cannot be written: %s", error)
            return
        self._loop.call_later(1.0, self._tell)

    def _line(self, new: dict[str, int], total: dict[str, int]) -> str:
        if self._as_json:
            return json.dumps({"second": new, "total": total})
        dropped = sum(count for name, count in new.items() if "_dropped" in name)
        return (
            f"from guest {new.get('tx_frames', 0):>8} frames"
            f" {8e-6 * new.get('tx_bytes', 0):>9.1f} Mbit"
            f"   to guest {new.get('rx_frames', 0):>8} frames"
            f" {8e-6 * new.get('rx_bytes', 0):>9.1f} Mbit   dropped {dropped}"
        )
