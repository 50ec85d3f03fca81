"""The sockets of `vq serve`: their options, and how a device gets onto one."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from contextlib import ExitStack
from typing import NamedTuple

from vq import options
from vq.device import Device
from vq.errors import UsageError
from vq.loop import Loop
from vq.privsep import Connector
from vq.unix_socket import Listener
from vq.vhost_backend import protocol_features
from vq.vhost_message import ProtocolFeature
from vq.vhost_processes import Apart
from vq.vhost_user import Client, Connection, Server, unwatch_device, watch_device

__all__ = ["Place", "add_arguments", "check", "offer", "open_places", "tell_supervisor"]

log = logging.getLogger(__name__)

PREDECESSOR_SECONDS = 1.0
"""How long a socket may still be served by one whose helper was killed: its worker ends by itself,
a moment later."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every kind of device has."""
    parser.add_argument(
        "--socket",
        "--socket-path",
        action="append",
        metavar="PATH",
        help="listen here for the frontend (once for each device)",
    )
    parser.add_argument(
        "--fd", type=int, metavar="N", help="a socket handed over, listening or connected already"
    )
    parser.add_argument(
        "--client", action="store_true", help="connect to --socket, where the frontend listens"
    )
    parser.add_argument(
        "--socket-user",
        type=options.user_number,
        metavar="NAME",
        help="who owns --socket (default: who runs this)",
    )
    parser.add_argument(
        "--socket-group", type=options.group_number, metavar="NAME", help="the group of --socket"
    )
    parser.add_argument(
        "--socket-mode",
        type=options.file_mode,
        metavar="MODE",
        help="who may connect to --socket, as chmod(1) has it in octal: 660 for owner and group"
        " (default: as the umask has it)",
    )
    parser.add_argument("--once", action="store_true", help="end when the first frontend has gone")


def check(args: argparse.Namespace, *, needed: int) -> None:
    """Raises `UsageError` unless the options name the `needed` number of sockets in one way."""
    sockets: list[str] = args.socket or []
    if args.fd is None and len(sockets) != needed:
        raise UsageError(
            "give one --socket" if needed == 1 else f"give {needed} --socket, one a device"
        )
    if args.fd is not None and (sockets or needed > 1 or args.client):
        raise UsageError("--fd is for one device, and goes without --socket and --client")


class Place(NamedTuple):
    """Where a frontend meets a device."""

    name: str
    socket: socket.socket | None
    """Listening or connected; None to connect to the path `name`."""


def open_places(
    args: argparse.Namespace, needed: int, connector: Connector, stack: ExitStack
) -> list[Place]:
    """The sockets that the options name, one a device. They are closed and removed with `stack`."""
    if args.fd is not None:
        return [Place(f"fd {args.fd}", _handed_over(args.fd))]
    paths = args.socket[:needed]
    if args.client:
        for path in paths:
            connector.name(path)
        return [Place(path, None) for path in paths]
    return [Place(path, _listen(args, path, stack)) for path in paths]


def offer(
    args: argparse.Namespace,
    place: Place,
    device: Device,
    loop: Loop,
    connector: Connector,
    stack: ExitStack,
    *,
    queue_num: int | None,
    apart: Apart | None,
) -> None:
    """Puts a device in its place; it is taken off again when `stack` is closed."""
    gone = loop.stop if args.once else None
    offered = _offered(args, device)
    if place.socket is None:
        client = Client(
            device,
            loop,
            place.name,
            offered=offered,
            queue_num=queue_num,
            apart=apart,
            on_disconnect=gone,
            connect=connector.connect,
        )
        stack.callback(client.close)
    elif place.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        server = Server(
            device,
            loop,
            place.socket,
            offered=offered,
            queue_num=queue_num,
            apart=apart,
            on_disconnect=gone,
        )
        stack.callback(server.close)
        log.info("%s: waiting for a frontend", server.name)
    else:
        watch_device(device, loop)
        stack.callback(unwatch_device, device, loop)
        connection = Connection(
            place.socket,
            device,
            loop,
            name=place.name,
            offered=offered,
            queue_num=queue_num,
            apart=apart,
            on_closed=loop.stop,
        )
        stack.callback(connection.close)


def _offered(args: argparse.Namespace, device: Device) -> int | None:
    """The protocol features to offer; None for the device's own.

    Notes of what is in flight are kept in a file without a name. Without memfd_create(2) that is a
    temporary file, and a confined process makes none.
    """
    if args.sandbox == "off" or hasattr(os, "memfd_create"):
        return None
    return protocol_features(device) & ~(1 << ProtocolFeature.INFLIGHT_SHMFD)


def _listen(args: argparse.Namespace, path: str, stack: ExitStack) -> socket.socket:
    listener = Listener(
        path,
        owner=args.socket_user,
        group=args.socket_group,
        mode=args.socket_mode,
        patience=PREDECESSOR_SECONDS,
    )
    stack.callback(listener.close)
    return listener.socket


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


def tell_supervisor(state: str) -> None:
    """Tells a supervisor that started us how we are (sd_notify(3)); nothing without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log.warning("cannot tell the supervisor: %s", error)
