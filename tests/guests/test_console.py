"""The console device under the real Linux driver: a login, the window's size, ports, megabytes.

QEMU has no vhost-user console, so User-Mode Linux is the guest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import socket
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vq.abi import DeviceId
from vq.testing.guest import UmlGuest
from vq.testing.requirements import or_skip
from vq.testing.served import ServeProcess, assert_well, wait_until

DATA = random.Random(1).randbytes(6 << 20)


class Terminal:
    """Somebody at the host's end of a console: opens the terminal and types."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (rows, columns))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        """Reads until the pattern comes; what was read up to it is not seen again."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            with contextlib.suppress(BlockingIOError):
                self.seen += os.read(self.fd, 4096).decode()
                continue
            time.sleep(0.01)
        self.seen = self.seen[found.end() :]
        return found

    def close(self) -> None:
        os.close(self.fd)


class Setting(NamedTuple):
    served: ServeProcess
    guest: UmlGuest
    directory: Path

    def port(self, name: str) -> str:
        """The guest's device of the port called `name`; udev makes links of these names."""
        found = self.guest.output(f"grep -lx {name} /sys/class/virtio-ports/*/name")
        return "/dev/" + found.split("/")[4]

    def client(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(str(self.directory / name))
        return client


def boot(directory: Path, *options: str) -> Iterator[Setting]:
    with (
        or_skip(),
        ServeProcess(directory, "console", *options) as served,
        UmlGuest([(served.sockets[0], DeviceId.CONSOLE)]) as guest,
    ):
        yield Setting(served, guest, directory)
        assert_well(served, guest)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """One console, on a terminal."""
    directory = tmp_path_factory.mktemp("console")
    yield from boot(directory, "--pty", f"--link={directory}/hvc0")


@pytest.fixture(scope="module")
def multiport(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Two consoles, and ports with names."""
    directory = tmp_path_factory.mktemp("ports")
    yield from boot(
        directory,
        f"--unix={directory}/hvc0",
        f"--console=pty:{directory}/hvc1",
        f"--port=org.vq.data=unix:{directory}/data",
        f"--port=log=file:{directory}/log",
    )


def test_somebody_logs_in_and_works_in_a_window_that_changes_its_size(plain: Setting) -> None:
    guest = plain.guest
    guest.output('mkdir /etc; echo "root:$(mkpasswd secret):0:0::/tmp:/bin/sh" >/etc/passwd')
    guest.output("setsid getty -L 0 hvc0 vt100 >/dev/null 2>&1 </dev/null & true")
    terminal = Terminal(plain.directory / "hvc0")
    terminal.resize(33, 101)
    terminal.type("\r")
    terminal.expect("login: ")
    terminal.type("root\r")
    terminal.expect("Password: ")
    terminal.type("wrong\r")
    terminal.expect("Login incorrect")
    terminal.expect("login: ")
    terminal.type("root\r")
    terminal.expect("Password: ")
    terminal.type("secret\r")
    terminal.expect("# ")
    terminal.type("tty; stty size; echo $((6 * 7)) done\r")
    terminal.expect(r"/dev/hvc0\r\n33 101\r\n42 done\r\n")
    terminal.type("trap 'echo size $(stty size)' WINCH\r")
    terminal.resize(50, 132)
    time.sleep(0.5)
    terminal.type("\r")  # a shell sees to its signals when it is done with its line
    terminal.expect("size 50 132")
    terminal.type("exit\r")
    terminal.close()


def test_megabytes_go_out_and_in_unchanged_over_a_console(plain: Setting) -> None:
    guest, data = plain.guest, DATA[: 1 << 20]
    guest.run("kill $(pidof getty)")
    terminal = Terminal(plain.directory / "hvc0")
    # The line discipline has to leave the bytes alone; a console that is closed forgets that.
    command = (
        "exec 3<>/dev/hvc0; stty -F /dev/hvc0 raw -echo; echo ready >&3;"
        f" head -c {len(data)} <&3 >/tmp/data; cat /tmp/data >&3; md5sum </tmp/data"
    )
    answer: list[str] = []
    work = threading.Thread(target=lambda: answer.append(guest.output(command)))
    work.start()
    terminal.expect("ready\n")
    os.set_blocking(terminal.fd, True)
    write_all(terminal.fd, data)
    got: list[bytes] = []
    read_all(terminal.fd, len(data), got)
    work.join(40)
    assert answer and answer[0].split()[0] == hashlib.md5(data).hexdigest()
    assert got == [data]
    terminal.close()


def write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left[:65536]) :]


def read_all(fd: int, length: int, into: list[bytes]) -> None:
    data = b""
    while len(data) < length and select.select([fd], [], [], 30)[0]:
        data += os.read(fd, 65536)
    into.append(data)


def test_the_driver_can_be_loaded_again(plain: Setting) -> None:
    guest = plain.guest
    guest.run("kill $(pidof getty)")
    guest.output("rmmod virtio_console")
    terminal = Terminal(plain.directory / "hvc0")
    guest.output("modprobe virtio_console && echo back again >/dev/hvc0")
    terminal.expect("back again")
    terminal.close()


def test_what_the_guest_says_before_anybody_listens_is_heard(plain: Setting) -> None:
    wait_until(lambda: plain.served.log().count(": closed") >= 1, "the last listener's going")
    plain.guest.output("echo said early >/dev/hvc0")
    terminal = Terminal(plain.directory / "hvc0")
    terminal.expect("said early")
    terminal.close()


def test_ports_have_their_names_in_the_guest(multiport: Setting) -> None:
    names = multiport.guest.output("cat /sys/class/virtio-ports/*/name").split()
    assert sorted(names) == ["log", "org.vq.data"]
    assert multiport.guest.output("ls /dev/hvc0 /dev/hvc1 /dev/vport0p3")


def test_megabytes_go_through_a_port_both_ways(multiport: Setting) -> None:
    guest, port = multiport.guest, multiport.port("org.vq.data")
    expected = hashlib.md5(DATA).hexdigest()
    with multiport.client("data") as client:
        sender = threading.Thread(target=client.sendall, args=(DATA,))
        sender.start()
        command = f"head -c {len(DATA)} <{port} >/tmp/data; md5sum </tmp/data"
        assert guest.output(command, timeout=60).split()[0] == expected
        sender.join(20)
        got: list[bytes] = []
        reader = threading.Thread(target=read_all, args=(client.fileno(), len(DATA), got))
        reader.start()
        guest.output(f"cat /tmp/data >{port}", timeout=60)
        reader.join(20)
        assert got == [DATA]


def test_a_slow_program_at_the_host_stops_the_guest_and_loses_nothing(multiport: Setting) -> None:
    guest, port = multiport.guest, multiport.port("org.vq.data")
    # More than there can be under way in the guest's ring.
    guest.output("head -c 12582912 /dev/urandom >/tmp/much")
    expected = guest.output("md5sum </tmp/much").split()[0]
    with multiport.client("data") as client:
        # (cat would splice, and not wait.)
        command = f"dd if=/tmp/much bs=32k of={port}"
        command += "; touch /tmp/written"
        guest.output(f"({command}) >/dev/null 2>&1 & true")
        time.sleep(1)
        assert guest.run("test -e /tmp/written").status == 1  # it waits
        got: list[bytes] = []
        read_all(client.fileno(), 12 << 20, got)
        assert hashlib.md5(got[0]).hexdigest() == expected
    guest.output("while ! test -e /tmp/written; do sleep 0.1; done")


def test_the_guest_sees_that_a_program_came_and_went(multiport: Setting) -> None:
    guest, port = multiport.guest, multiport.port("org.vq.data")
    with multiport.client("data") as client:
        client.sendall(b"all of it")
        # Without anybody at the host's end a read in the guest comes to the end.
        answer: list[str] = []
        reader = threading.Thread(target=lambda: answer.append(guest.output(f"cat {port}")))
        reader.start()
        time.sleep(0.3)
        assert not answer
    reader.join(20)
    assert answer == ["all of it"]


def test_a_file_has_what_the_guest_wrote(multiport: Setting) -> None:
    multiport.guest.output(f"seq 1 10000 >{multiport.port('log')}")
    written = "".join(f"{number}\n" for number in range(1, 10001))
    wait_until(lambda: (multiport.directory / "log").read_text() == written, "the log")


def test_a_further_console_has_a_size_of_its_own(multiport: Setting) -> None:
    terminal = Terminal(multiport.directory / "hvc1")
    terminal.resize(27, 91)
    guest = multiport.guest
    # The guest is told by a message on the control queue, columns first (5.3.6.2).
    guest.output(
        "for i in $(seq 50); do"
        ' test "$(stty -F /dev/hvc1 size)" = "27 91" && exit 0; sleep 0.1; done; exit 1'
    )
    terminal.close()
