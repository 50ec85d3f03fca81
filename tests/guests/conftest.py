"""What the tests with real guests share: a host's network stack, a served device, two addresses."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from vq.testing.contained import ContainedProcess
from vq.testing.guest import Guest, UmlGuest
from vq.testing.namespaces import Namespace, bad_checksums
from vq.testing.requirements import need_namespaces, need_tap, or_skip

HOST4, GUEST4 = "198.18.64.1", "198.18.64.2"
HOST6, GUEST6 = "fd00:7671::1", "fd00:7671::2"
TAP = "vqtap0"


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout} s: {what}"
        time.sleep(0.02)


class Served:
    """``vq serve net``, on one socket for each name in `names`, in `directory`.

    `options` are its others; it runs in `namespace` where one is given.
    """

    def __init__(
        self,
        directory: Path,
        link: str,
        *options: str,
        names: Sequence[str] = ("net",),
        namespace: Namespace | None = None,
    ) -> None:
        self.sockets = [str(directory / f"{name}.sock") for name in names]
        self._argv = [sys.executable, "-m", "vq", "serve", "net", "--stats=json", "--link", link]
        self._argv += [f"--socket={path}" for path in self.sockets]
        self._argv += options
        if namespace is not None:
            self._argv = namespace.argv(*self._argv)
        self._output = directory / f"{names[0]}.served"
        self._before = ""
        self.start()

    def start(self) -> None:
        """Starts the process and waits until it serves."""
        self._output.write_text("")
        notify = f"{self._output}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
            supervisor.settimeout(15)
            supervisor.bind(notify)
            self._process = ContainedProcess(
                self._argv,
                lifetime=600,
                output=self._output,
                env={**os.environ, "NOTIFY_SOCKET": notify},
            )
            try:
                assert supervisor.recv(64) == b"READY=1"
            except TimeoutError:
                self._process.close()
                pytest.fail(f"it does not serve: {self._output.read_text()}")
            finally:
                os.unlink(notify)

    def kill(self) -> None:
        """Kills the process, as a crash does."""
        self._process.close()
        self._before += self._output.read_text()

    def log(self) -> str:
        lines = (self._before + self._output.read_text()).splitlines()
        return "\n".join(line for line in lines if not line.startswith("{"))

    def stats(self) -> dict[str, int]:
        """What went through all devices since the process was started, up to now."""
        # The line that is being made just now may be older than this call, the next one is not.
        known = self._output.read_text().count("\n{")
        wait_until(lambda: self._output.read_text().count("\n{") > known, "statistics")
        last = [line for line in self._output.read_text().splitlines() if line.startswith("{")][-1]
        total: dict[str, int] = json.loads(last)["total"]
        return total

    def count(self, name: str) -> int:
        """One of `stats`."""
        return self.stats().get(name, 0)

    def close(self) -> None:
        self._process.close()


def assert_well(*places: Served | Guest | Namespace) -> None:
    """Nobody complains: neither kernel saw a bad checksum, no log has a warning in it."""
    for place in places:
        match place:
            case Served():
                bad = [word for word in ("WARNING", "ERROR", "Traceback") if word in place.log()]
                assert not bad, place.log()
            case Guest():
                assert place.complaints() == []
                assert bad_checksums(place.output) == {}
            case Namespace():
                assert bad_checksums(place.run) == {}


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
