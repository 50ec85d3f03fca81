"""Devices served to real guests: by a thread of the test, or by ``vq serve`` as a program.

    with guest_with(MyDevice()) as guest:
        assert "virtio" in guest.output("ls /sys/bus/virtio/devices")

`guest_with` serves devices that the test has in its hands, so that it can look into them.
`ServeProcess` is for what only a program has: its command line, its death, its statistics.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from vq.device import Device, check_made
from vq.errors import in_words
from vq.loop import Loop
from vq.testing.contained import ContainedProcess
from vq.testing.guest import Guest, UmlGuest, check_uml_drives
from vq.testing.namespaces import Namespace, bad_checksums
from vq.vhost_user import Server

__all__ = [
    "ServeProcess",
    "ServedDevices",
    "ServedGuest",
    "assert_well",
    "guest_with",
    "wait_until",
]

T = TypeVar("T")


def wait_until(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    """Waits until `condition` holds; raises `AssertionError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not after {timeout} s: {what}")
        time.sleep(0.02)


class ServedDevices:
    """Devices served on vhost-user sockets by a thread, until `close`.

    The sockets are made in `directory`, one for each device, named after its place. The devices are
    the thread's while it runs: `call` does something with them there. They are not closed.
    """

    def __init__(self, devices: Sequence[Device], directory: Path) -> None:
        self.devices = devices
        self.sockets = [directory / f"{number}.sock" for number in range(len(devices))]
        self._loop = Loop()
        self._servers: list[Server] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="served devices", daemon=True)
        try:
            for device, path in zip(devices, self.sockets, strict=True):
                # A network device's frontend takes the number for that of queue pairs.
                count = device.queue_count
                number = max(1, (count - 1) // 2) if device.device_id == 1 else count
                self._servers.append(Server(device, self._loop, path, queue_num=number))
        except BaseException:
            self._give_back()
            raise
        self._thread.start()

    def call(self, step: Callable[[], T], *, timeout: float = 10) -> T:
        """Does something in the devices' thread; returns what it returns, raises what it raises.

        `TimeoutError` after `timeout` seconds.
        """
        done = threading.Event()
        outcome: list[Any] = [None, None]

        def run() -> None:
            try:
                outcome[0] = step()
            except Exception as error:
                outcome[1] = error
            done.set()

        self._loop.call_soon_from_any_thread(run)
        if not done.wait(timeout):
            raise TimeoutError(f"the devices' thread does not answer within {timeout} s")
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def close(self) -> None:
        """Ends the thread and its connections; raises what it died of, if it did."""
        self._loop.stop()
        self._thread.join(10)
        self._give_back()
        if self._error is not None:
            raise self._error

    def _give_back(self) -> None:
        for server in self._servers:
            server.close()
        self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ServedGuest(UmlGuest):
    """A User-Mode Linux guest with the devices that a thread of this process serves."""

    def __init__(self, served: ServedDevices, **options: Any) -> None:
        """`options` are those of `UmlGuest`."""
        self.devices = served.devices
        self._served = served
        sockets = [
            (path, device.device_id)
            for path, device in zip(served.sockets, served.devices, strict=True)
        ]
        super().__init__(sockets, **options)

    def call(self, step: Callable[[], T], *, timeout: float = 10) -> T:
        """Does something with the devices in the thread that serves them; returns what it returns.

        ``guest.call(lambda: disk.update_config(capacity=8))``. To look at a number or a list needs
        no call. Raises what `step` raises, and `TimeoutError`.
        """
        return self._served.call(step, timeout=timeout)

    def more_of_errors(self) -> str:
        """Which of the devices need a reset, and why."""
        return "".join(
            f"; {type(device).__name__} needs a reset: {in_words(device.fault)}"
            for device in self.devices
            if device.fault is not None
        )


@contextmanager
def guest_with(*devices: Device, undriven: bool = False, **options: Any) -> Iterator[ServedGuest]:
    """A User-Mode Linux guest that has `devices`, which a thread of this process serves.

    `options` are those of `UmlGuest`. Raises `MissingRequirement` where it is not installed, or has
    no driver for a device, unless `undriven` says that it may boot without. A `GuestError` names
    the fault of a device that needs a reset.
    """
    for device in devices:
        check_made(device)
    if not undriven:
        check_uml_drives(device.device_id for device in devices)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vq-served-")))
        served = stack.enter_context(ServedDevices(devices, directory))
        yield stack.enter_context(ServedGuest(served, **options))


class ServeProcess:
    """``vq serve KIND`` as a program, on one socket for each name in `names`, in `directory`.

    `options` are its others; it runs in `namespace` where one is given. Raises `RuntimeError` when
    it does not begin to serve within 15 seconds.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        *options: str,
        names: Sequence[str] | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        names = names or (kind.replace(":", "."),)
        self.sockets = [str(directory / f"{name}.sock") for name in names]
        self._argv = [sys.executable, "-m", "vq", "serve", kind, "--stats=json"]
        self._argv += [f"--socket={path}" for path in self.sockets]
        self._argv += options
        if namespace is not None:
            self._argv = namespace.argv(*self._argv)
        self._output = directory / f"{names[0]}.served"
        self._before = ""
        self.start()

    def start(self) -> None:
        """Starts the program and waits until it serves."""
        self._output.write_text("")
        notify = f"{self._output}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
            supervisor.settimeout(0.1)
            supervisor.bind(notify)
            self._process = ContainedProcess(
                self._argv,
                lifetime=600,
                output=self._output,
                env={**os.environ, "NOTIFY_SOCKET": notify},
            )
            try:
                self._wait_until_ready(supervisor)
            except BaseException:
                self._process.close()
                raise
            finally:
                os.unlink(notify)

    def _wait_until_ready(self, supervisor: socket.socket) -> None:
        deadline = time.monotonic() + 15
        while True:
            ended = not self._process.running
            try:
                word = supervisor.recv(64)
                break
            except TimeoutError:
                if ended or time.monotonic() > deadline:
                    said = self._output.read_text()
                    raise RuntimeError(f"it does not serve: {said}") from None
        if word != b"READY=1":
            raise RuntimeError(f"it says {word!r} first")

    def kill(self) -> None:
        """Kills the program, as a crash does."""
        self._process.close()
        self._before += self._output.read_text()

    def log(self) -> str:
        """All that it has logged, also before it was killed and started again."""
        lines = (self._before + self._output.read_text()).splitlines()
        return "\n".join(line for line in lines if not line.startswith("{"))

    def stats(self) -> dict[str, int]:
        """What went through all devices since the program was started, up to now."""
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
        """Ends it. Closing twice is allowed."""
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def assert_well(*places: ServeProcess | Guest | Namespace) -> None:
    """Nobody complains: neither kernel saw a bad checksum, no log has a warning in it."""
    for place in places:
        if isinstance(place, ServeProcess):
            bad = [word for word in ("WARNING", "ERROR", "Traceback") if word in place.log()]
            assert not bad, place.log()
            continue
        if isinstance(place, Guest):
            assert place.complaints() == []
        bad_sums = bad_checksums(place.output if isinstance(place, Guest) else place.run)
        assert bad_sums == {}, f"bad checksums: {bad_sums}"
