"""Real Linux guests for tests: boot one, get a shell in it, run commands.

    with UmlGuest([("/run/vq.sock", DeviceId.NET)]) as guest:
        guest.output("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up")
        result = guest.run("ping -c 3 192.0.2.1")
        assert result.status == 0, result.output

Both guests are vhost-user frontends: they connect to the sockets of devices that listen there
already. `UmlGuest` is User-Mode Linux, one process that boots in about two seconds; `QemuGuest` is
a whole machine under QEMU's emulation, with several processors, PCI and migration. Neither needs
privileges or KVM, and neither outlives the process that started it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vq.errors import VqError
from vq.testing.contained import ContainedProcess, ContainedService, inheritable_copy
from vq.testing.debian_kernel import find_kernel
from vq.testing.initramfs import shell_initramfs
from vq.testing.plain_fpu import with_plain_fpu
from vq.testing.requirements import MissingRequirement, find_program

__all__ = ["Guest", "GuestError", "QemuGuest", "Result", "UmlGuest", "check_uml_drives"]

PROGRAMS = {
    # busybox's own shell would take its applets instead of the programs below.
    "dash": "dash",
    "ip": "iproute2",
    "ethtool": "ethtool",
    "iperf3": "iperf3",
    "nstat": "iproute2",
}
"""Programs of this machine that every guest has beside busybox, and the packages they are in."""

MODULES = ("8021q",)
"""Kernel modules that ``modprobe`` finds in every guest, beside those loaded at the start."""

_COMPLAINT = re.compile(
    r"BUG:|WARNING:|Call Trace|Kernel panic|is not a head|Oops|NETDEV WATCHDOG|soft lockup"
)
_SLOW_BOOT = re.compile(r"WARNING: [^\n]* crypto_wait_for_test\+.*?end trace", re.DOTALL)
"""What User-Mode Linux warns of when it boots on a busy machine; that is no device's fault."""


class GuestError(VqError):
    """The guest did not boot, does not answer, is gone, or a command in it failed."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest ended with: its exit status, and all that it wrote.

    The status is 128 + N for a command that signal N ended.
    """

    status: int
    output: str


class Guest(ContainedService, ABC):
    """A booted guest. `close` ends it at once, as pulling the plug does."""

    failure = GuestError

    def __init__(self, kind: str, *, boot_timeout: float, lifetime: float) -> None:
        super().__init__(kind, prefix="vq-guest-", log="console.log")
        self._shell: _Shell | None = None
        started = time.monotonic()
        try:
            ours, theirs = socket.socketpair()
            self._shell = _Shell(ours)
            with theirs:
                console = inheritable_copy(theirs.fileno())
            try:
                self._process = self._start(console, lifetime)
            finally:
                os.close(console)
            self.release = self._wait_until_ready(self._shell, boot_timeout)
        except BaseException as error:
            log = self.kernel_log()
            self.close()
            if isinstance(error, GuestError):
                raise GuestError(f"{kind}: {error}; its last words:\n{log[-2000:]}") from error
            raise
        self.boot_seconds = time.monotonic() - started

    @abstractmethod
    def _start(self, console: int, lifetime: float) -> ContainedProcess:
        """Starts the guest, with its shell on the socket `console` and its kernel's messages in
        the file console.log of its directory.
        """

    def _wait_until_ready(self, shell: _Shell, timeout: float) -> str:
        """Waits until the shell can be used; returns the release of the guest's kernel."""
        return shell.wait_until_ready(timeout)

    def run(self, command: str, *, timeout: float = 30) -> Result:
        """Runs a command of sh(1) in the guest, as root in /tmp, and waits for its end.

        Several threads may do this at a time. Raises `TimeoutError` after `timeout` seconds, when
        the command has been killed, and `GuestError` when the guest does not answer any more.
        """
        assert self._shell is not None
        return self._shell.run(command, timeout)

    def output(self, command: str, *, timeout: float = 30) -> str:
        """What a command writes; raises `GuestError` when its exit status is not 0."""
        result = self.run(command, timeout=timeout)
        if result.status:
            raise GuestError(
                f"{command!r} ended with {result.status}: {result.output.strip()}"
                + self.more_of_errors()
            )
        return result.output

    def more_of_errors(self) -> str:
        """What a command's failure says on top: whoever serves the guest's devices may know why."""
        return ""

    def kernel_log(self) -> str:
        """Everything that the guest's kernel has printed so far."""
        return self.log()

    def complaints(self) -> list[str]:
        """The lines of the kernel's log in which it says that something is badly wrong."""
        log = _SLOW_BOOT.sub("", self.kernel_log())
        return [line for line in log.splitlines() if _COMPLAINT.search(line)]

    def close(self) -> None:
        """Kills the guest and removes what it kept on disk. Closing twice is allowed."""
        super().close()
        if self._shell is not None:
            self._shell.close()


class UmlGuest(Guest):
    """User-Mode Linux.

    `devices` are (path of a vhost-user socket, virtio device id) pairs; somebody must listen on
    each by now. `mem` is the guest's memory as the kernel takes it ("128M"); `load` names modules
    to load beside those that drive the devices, and `programs` programs of this machine to bring
    along, with the packages that they are in; `arguments` go to the kernel's command line, and
    `prefix` is a command that runs it (as `Namespace.argv` gives). The guest is killed when it has
    not booted after `boot_timeout` seconds, and after `lifetime` seconds in any case.
    """

    def __init__(
        self,
        devices: Sequence[tuple[str | Path, int]] = (),
        *,
        mem: str = "128M",
        load: Sequence[str] = (),
        programs: Mapping[str, str] = MappingProxyType({}),
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        boot_timeout: float = 30,
        lifetime: float = 600,
    ) -> None:
        self._linux = find_program("linux.uml", package="user-mode-linux")
        release, modules = _uml_modules()
        drivers = _uml_drivers()
        driving = [drivers[kind] for _, kind in devices if kind in drivers]
        self._initrd = shell_initramfs(
            release=release,
            modules_from=modules,
            load=tuple(dict.fromkeys([*("virtio_net", "ipv6"), *driving, *load])),
            modules=MODULES,
            programs=_guest_programs(programs),
            console=("tty1", 4, 1),
        )
        self._mem = mem
        self._prefix = prefix
        self._arguments = [
            *(f"virtio_uml.device={path}:{device}" for path, device in devices),
            *arguments,
        ]
        super().__init__("User-Mode Linux", boot_timeout=boot_timeout, lifetime=lifetime)

    def _start(self, console: int, lifetime: float) -> ContainedProcess:
        return ContainedProcess(
            [
                *self._prefix,
                *with_plain_fpu([self._linux, f"mem={self._mem}", f"initrd={self._initrd}"]),
                *(f"uml_dir={self.directory}", "panic=1"),
                *("con=null", "con0=null,fd:1", f"con1=fd:{console}"),
                *self._arguments,
            ],
            lifetime=lifetime,
            output=self._log,
            pass_fds=[console],
        )


class QemuGuest(Guest):
    """A PC under QEMU's software emulation, with a virtio PCI network card for each socket.

    `sockets` are paths of vhost-user sockets on which a device listens. `queue_pairs` is the number
    that each card is created with, `cpus` that of the guest's processors. `card` adds properties to
    the cards ("mrg_rxbuf=off"); `arguments` go to QEMU: other devices, for instance; `prefix` is a
    command that runs it. The rest is as with `UmlGuest`, but for `moved_from`, which `move` uses.
    """

    def __init__(
        self,
        sockets: Sequence[str | Path] = (),
        *,
        mem: str = "256M",
        cpus: int = 1,
        queue_pairs: int = 1,
        card: str = "",
        load: Sequence[str] = (),
        programs: Mapping[str, str] = MappingProxyType({}),
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        boot_timeout: float = 90,
        lifetime: float = 900,
        moved_from: QemuGuest | None = None,
    ) -> None:
        self._moved_from = moved_from
        self._settings: dict[str, Any] = {
            "mem": mem,
            "cpus": cpus,
            "queue_pairs": queue_pairs,
            "card": card,
            "load": load,
            "programs": programs,
        }
        self._qemu = find_program("qemu-system-x86_64", package="qemu-system-x86")
        self._kernel = find_kernel()
        self._initrd = shell_initramfs(
            release=self._kernel.release,
            modules_from=self._kernel.modules,
            load=("virtio_pci", "virtio_net", "ipv6", *load),
            modules=MODULES,
            programs=_guest_programs(programs),
            console=("ttyS1", 4, 65),
        )
        self._mem, self._cpus = mem, cpus
        self._cards = [
            argument
            for number, path in enumerate(sockets)
            for argument in (
                *("-chardev", f"socket,id=c{number},path={path},reconnect=1"),
                "-netdev",
                f"vhost-user,id=n{number},chardev=c{number},queues={queue_pairs}",
                "-device",
                # Without vectors: QEMU 7.2 crashes under emulation when a driver starts a
                # vhost-user device with MSI-X.
                f"virtio-net-pci,netdev=n{number},romfile=,vectors=0"
                + (",mq=on" if queue_pairs > 1 else "")
                + (f",{card}" if card else ""),
            )
        ]
        self._arguments = list(arguments)
        self._prefix = list(prefix)
        super().__init__("QEMU", boot_timeout=boot_timeout, lifetime=lifetime)

    def _start(self, console: int, lifetime: float) -> ContainedProcess:
        log = self._log
        return ContainedProcess(
            [
                *(
                    *self._prefix,
                    self._qemu,
                    "-accel",
                    "tcg",
                    "-M",
                    "q35,memory-backend=mem",
                    "-m",
                    self._mem,
                ),
                *("-object", f"memory-backend-memfd,id=mem,size={self._mem},share=on"),
                *("-smp", str(self._cpus), "-nodefaults", "-display", "none", "-no-reboot"),
                *("-kernel", str(self._kernel.image), "-initrd", str(self._initrd)),
                *("-append", "console=ttyS0 panic=-1"),
                *("-chardev", f"file,id=log,path={log},append=on", "-serial", "chardev:log"),
                *("-chardev", f"socket,id=shell,fd={console}", "-serial", "chardev:shell"),
                *("-qmp", f"unix:{self.directory}/qmp,server=on,wait=off"),
                *(() if self._moved_from is None else ("-incoming", f"unix:{self._door}")),
                *self._cards,
                *self._arguments,
            ],
            lifetime=lifetime,
            output=log,
            pass_fds=[console],
        )

    @property
    def _door(self) -> Path:
        """The socket through which a guest comes from another QEMU."""
        return self.directory / "incoming"

    def _wait_until_ready(self, shell: _Shell, timeout: float) -> str:
        source = self._moved_from
        if source is None:
            return super()._wait_until_ready(shell, timeout)
        deadline = time.monotonic() + timeout
        while not self._door.exists():
            if not self.running or time.monotonic() > deadline:
                raise GuestError("no QEMU for the guest to move to")
            time.sleep(0.02)
        source.qmp("migrate", {"uri": f"unix:{self._door}"})
        while (state := source.qmp("query-migrate"))["status"] != "completed":
            if state["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise GuestError(f"the guest did not move: {state}")
            time.sleep(0.05)
        return source.release

    def move(self, sockets: Sequence[str | Path], *, timeout: float = 60) -> QemuGuest:
        """Migrates the running guest to a second QEMU whose cards have other `sockets`.

        This one holds an empty shell then, still to be closed. Raises `GuestError` when it fails;
        the guest runs on here in that case.
        """
        return QemuGuest(
            sockets,
            **self._settings,
            arguments=self._arguments,
            prefix=self._prefix,
            boot_timeout=timeout,
            moved_from=self,
        )

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """One command to QEMU itself (its QMP reference); returns what it returns.

        Raises `GuestError` when QEMU refuses it.
        """
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(20)
            channel.connect(str(self.directory / "qmp"))
            with channel.makefile("rw") as file:
                for name, given in (("qmp_capabilities", None), (command, arguments)):
                    request = {"execute": name, **({"arguments": given} if given else {})}
                    file.write(json.dumps(request) + "\n")
                    file.flush()
                    answer = next(
                        answer
                        for line in file
                        if (answer := json.loads(line)).keys() & {"return", "error"}
                    )
                    if "error" in answer:
                        raise GuestError(f"QEMU refused {name}: {answer['error']['desc']}")
        return answer["return"]


def _guest_programs(more: Mapping[str, str]) -> dict[str, str]:
    wanted = {**PROGRAMS, **more}
    return {name: find_program(name, package=package) for name, package in wanted.items()}


def _uml_modules() -> tuple[str, Path]:
    """The release and the directory of the modules that came with User-Mode Linux."""
    found = sorted(Path("/usr/lib/uml/modules").glob("*/kernel"))
    if not found:
        raise MissingRequirement("needs the modules of User-Mode Linux in /usr/lib/uml/modules")
    return found[-1].parent.name, found[-1].parent


def check_uml_drives(kinds: Iterable[int]) -> None:
    """Raises `MissingRequirement` unless User-Mode Linux has a driver for each type of device."""
    drivers = _uml_drivers()
    for kind in kinds:
        if kind not in drivers:
            raise MissingRequirement(
                f"User-Mode Linux has no driver for devices of type {int(kind)}: nothing would use"
                " the device there (undriven=True boots all the same; QemuGuest has other drivers)"
            )


def _uml_drivers() -> dict[int, str]:
    """For each type of device the module of User-Mode Linux that drives it; none is built in."""
    aliases = (_uml_modules()[1] / "modules.alias").read_text()
    found = re.findall(r"^alias virtio:d(\w{8})v\S* (\S+)", aliases, re.M)
    return {int(kind, 16): module for kind, module in found}


class _Shell:
    """This machine's end of the shell's protocol (see `vq.testing.initramfs`)."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[str, Future[Result]] = {}
        self._ready: Future[str] = Future()
        self._gone = False
        self._reader = threading.Thread(target=self._read, name="guest shell", daemon=True)
        self._reader.start()

    def wait_until_ready(self, timeout: float) -> str:
        """Waits for the shell's greeting; returns the release of the guest's kernel."""
        try:
            return self._ready.result(timeout)
        except FutureTimeoutError:
            raise GuestError(f"not booted after {timeout} s") from None

    def run(self, command: str, timeout: float) -> Result:
        identifier, answer = self._request(command)
        try:
            return answer.result(timeout)
        except FutureTimeoutError:
            pass
        self._send(f"0 kill {identifier}")
        try:
            partial = answer.result(10)
        except FutureTimeoutError:
            raise GuestError(f"the guest does not answer ({command!r})") from None
        raise TimeoutError(f"{command!r} ran for more than {timeout} s: {partial.output}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._channel.close()

    def _request(self, command: str) -> tuple[str, Future[Result]]:
        identifier = str(next(self._ids))
        answer: Future[Result] = Future()
        with self._lock:
            if self._gone:
                raise GuestError("the guest is gone")
            self._waiting[identifier] = answer
        self._send(f"{identifier} run {base64.b64encode(command.encode()).decode()}")
        return identifier, answer

    def _send(self, line: str) -> None:
        try:
            with self._lock:
                self._channel.sendall(line.encode() + b"\n")
        except OSError as error:
            raise GuestError(f"the guest is gone: {error}") from error

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._channel.makefile("rb") as file:
            for line in file:
                match line.split():
                    case [b"ready", release]:
                        self._ready.set_result(release.decode())
                    case [identifier, status, length]:
                        output = file.read(int(length)).decode(errors="replace")
                        with self._lock:
                            answer = self._waiting.pop(identifier.decode(), None)
                        # A guest that moved here also answers what another process has asked.
                        if answer is not None:
                            answer.set_result(Result(int(status), output))
        with self._lock:
            self._gone = True
            left = list(self._waiting.values())
        for answer in left:
            answer.set_exception(GuestError("the guest is gone"))
        if not self._ready.done():
            self._ready.set_exception(GuestError("it ended before its shell was ready"))
