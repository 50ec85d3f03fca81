"""What the tests with real guests share: a host's network stack, a served device, two addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from vq.testing.guest import Guest, UmlGuest
from vq.testing.namespaces import Namespace
from vq.testing.requirements import need_namespaces, need_tap, or_skip
from vq.testing.served import ServeProcess, assert_well, wait_until

__all__ = ["Served", "address_guest", "address_host", "assert_well", "wait_until"]

HOST4, GUEST4 = "198.18.64.1", "198.18.64.2"
HOST6, GUEST6 = "fd00:7671::1", "fd00:7671::2"
TAP = "vqtap0"


class Served(ServeProcess):
    """``vq serve net`` plugged into `link`."""

    def __init__(
        self,
        directory: Path,
        link: str,
        *options: str,
        names: Sequence[str] = ("net",),
        namespace: Namespace | None = None,
    ) -> None:
        super().__init__(
            directory, "net", "--link", link, *options, names=names, namespace=namespace
        )


def worker_of(served: ServeProcess) -> psutil.Process:
    """The process that parses what guests send; there is one, which root has made nobody's.

    Those that it forked itself are its children (`others_of`).
    """
    everything = psutil.Process(served._process._process.pid).children(recursive=True)
    unprivileged = {
        process.pid: process
        for process in everything
        if process.ppid() in {other.pid for other in everything}
        and "serve" in process.cmdline()
        and process.uids().real != 0
    }
    (worker,) = [p for p in unprivileged.values() if p.ppid() not in unprivileged]
    return worker


def others_of(served: ServeProcess) -> list[psutil.Process]:
    """The processes that serve queue pairs for the worker."""
    return worker_of(served).children()


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    """A network stack of its own on this machine."""
    need_tap()
    need_namespaces()
    with Namespace() as namespace:
        yield namespace


def address_host(host: Namespace, interface: str = TAP) -> None:
    host.run(
        f"ip addr add {HOST4}/24 dev {interface} && ip addr add {HOST6}/64 dev {interface}"
        f" && ip link set {interface} up"
    )


def address_guest(guest: Guest, interface: str = "eth0") -> None:
    guest.output(
        f"ip addr add {GUEST4}/24 dev {interface} && ip addr add {GUEST6}/64 dev {interface}"
        f" && ip link set {interface} up"
    )


@pytest.fixture(scope="module")
def served_tap(host: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A net device on a tap of `host`, with the host's addresses on it."""
    host.add_tap(TAP)
    address_host(host)
    served = Served(tmp_path_factory.mktemp("served"), f"tap:{TAP}", namespace=host)
    yield served
    served.close()


@pytest.fixture(scope="module")
def uml(served_tap: Served) -> Iterator[UmlGuest]:
    """User-Mode Linux with its eth0 on the tap of `host`, ready to talk."""
    with or_skip():
        guest = UmlGuest([(served_tap.sockets[0], 1)])
    with guest:
        address_guest(guest)
        yield guest
