"""The sockets of `vq serve`: their options, and how a device gets onto one."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

from vq.device import Device
from vq.errors import UsageError
from vq.loop import Loop
from vq.vhost_user import Client, Connection, Server, unwatch_device, watch_device

__all__ = ["add_arguments", "check", "offer", "tell_supervisor"]

log = logging.getLogger(__name__)


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


def offer(
    args: argparse.Namespace,
    index: int,
    device: Device,
    loop: Loop,
    stack: ExitStack,
    *,
    queue_num: int | None,
) -> None:
    """Puts a device on the socket of this index; it is taken off again when `stack` is closed."""
    gone = loop.stop if args.once else None
    if args.client:
        client = Client(device, loop, args.socket[index], queue_num=queue_num, on_disconnect=gone)
        stack.callback(client.close)
        return
    server = (
        _server_on_descriptor(args.fd, device, loop, stack, gone, queue_num)
        if args.fd is not None
        else Server(device, loop, args.socket[index], queue_num=queue_num, on_disconnect=gone)
    )
    if server is not None:
        stack.callback(server.close)
        log.info("%s: waiting for a frontend", server.name)


def _server_on_descriptor(
    fd: int,
    device: Device,
    loop: Loop,
    stack: ExitStack,
    gone: Callable[[], None] | None,
    queue_num: int | None,
) -> Server | None:
    """A server on a listening socket; on one that is connected the device is served at once."""
    sock = _handed_over(fd)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Server(device, loop, sock, queue_num=queue_num, on_disconnect=gone)
    watch_device(device, loop)
    stack.callback(unwatch_device, device, loop)
    connection = Connection(
        sock, device, loop, name=f"fd {fd}", queue_num=queue_num, on_closed=loop.stop
    )
    stack.callback(connection.close)
    return None


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
