"""The socket device under the real Linux driver: User-Mode Linux, and QEMU with its PCI device."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from vq.abi import DeviceId
from vq.testing.guest import Guest, QemuGuest, UmlGuest
from vq.testing.requirements import or_skip
from vq.testing.served import ServeProcess, assert_well

CID = 1234
DATA = random.Random(1).randbytes(8 << 20)
SUM = hashlib.md5(DATA).hexdigest()
SOCAT = {"socat": "socat"}


class Setting(NamedTuple):
    served: ServeProcess
    guest: Guest
    path: str

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(30)
        listener.bind(f"{self.path}_{port}")
        listener.listen(128)
        return listener

    def dial(self, port: int) -> socket.socket:
        """Connects to a port of the guest; waits until somebody there accepts."""
        for _ in range(300):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.path)  # without a time limit: with one a full queue is an error
            sock.settimeout(30)
            sock.sendall(b"CONNECT %d\n" % port)
            if sock.recv(64).startswith(b"OK "):
                return sock
            sock.close()
            time.sleep(0.05)
        raise AssertionError("nobody in the guest accepts")

    def in_guest(self, command: str, timeout: float = 60) -> Callable[[], str]:
        """Starts a command in the guest; the result waits for its output."""
        answer: list[str | BaseException] = []

        def run() -> None:
            try:
                answer.append(self.guest.output(command, timeout=timeout))
            except BaseException as error:
                answer.append(error)

        thread = threading.Thread(target=run)
        thread.start()

        def wait() -> str:
            thread.join(timeout + 5)
            if isinstance(answer[0], BaseException):
                raise answer[0]
            return answer[0]

        return wait


def boot_qemu(socket_path: str) -> QemuGuest:
    return QemuGuest(
        load=["vmw_vsock_virtio_transport"],
        programs=SOCAT,
        arguments=[
            *("-chardev", f"socket,id=v0,path={socket_path}"),
            *("-device", "vhost-user-vsock-pci,chardev=v0,vectors=0"),
        ],
    )


@pytest.fixture(scope="module", params=["uml", "qemu"])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("vsock")
    path = str(directory / "vm.vsock")
    with or_skip(), ServeProcess(directory, "vsock", f"--cid={CID}", f"--uds={path}") as served:
        if request.param == "uml":
            guest: Guest = UmlGuest([(served.sockets[0], DeviceId.VSOCK)], programs=SOCAT)
        else:
            guest = boot_qemu(served.sockets[0])
        with guest:
            guest.output("cat >/tmp/data </dev/null")
            yield Setting(served, guest, path)
            assert_well(served, guest)


def received(sock: socket.socket) -> tuple[int, str]:
    """How many bytes come to the end, and their checksum."""
    count, digest = 0, hashlib.md5()
    while data := sock.recv(1 << 20):
        count += len(data)
        digest.update(data)
    return count, digest.hexdigest()


def test_megabytes_go_from_the_host_to_the_guest_and_back(setting: Setting) -> None:
    arrived = setting.in_guest(
        "socat -b 65536 -u VSOCK-LISTEN:77 CREATE:/tmp/data; md5sum </tmp/data"
    )
    with setting.dial(77) as sock:
        sock.sendall(DATA)
    assert arrived().split()[0] == SUM
    with setting.listen(5000) as listener:
        sent = setting.in_guest("socat -b 65536 -u OPEN:/tmp/data VSOCK-CONNECT:2:5000")
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(30)
            assert received(sock) == (len(DATA), SUM)
        sent()


def test_a_question_is_answered_after_the_asker_has_finished_sending(setting: Setting) -> None:
    answer = setting.in_guest("socat VSOCK-LISTEN:78 'SYSTEM:md5sum'")
    with setting.dial(78) as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100).split()[0].decode() == hashlib.md5(b"question").hexdigest()
    answer()
    with setting.listen(5001) as listener:
        asked = setting.in_guest("echo question | socat -t 20 - VSOCK-CONNECT:2:5001")
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(30)
            assert received(sock)[0] == 9
            sock.sendall(b"answer")
        assert asked() == "answer"


def test_what_nobody_serves_is_refused(setting: Setting) -> None:
    refused = setting.guest.run("socat - VSOCK-CONNECT:2:9999 </dev/null")
    assert refused.status == 1 and "reset by peer" in refused.output
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(setting.path)
        sock.sendall(b"CONNECT 9999\n")
        assert sock.recv(100) == b""


def test_a_slow_reader_stops_the_sender_and_loses_nothing(setting: Setting) -> None:
    slow = setting.in_guest("socat -u VSOCK-LISTEN:79 'SYSTEM:sleep 1; tee /tmp/data | md5sum'")
    with setting.dial(79) as sock:
        sock.sendall(DATA)
    assert slow().split()[0] == SUM
    with setting.listen(5003) as listener:
        sent = setting.in_guest("socat -b 65536 -u OPEN:/tmp/data VSOCK-CONNECT:2:5003")
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(30)
            time.sleep(1)  # the guest's buffers, ours and the socket's are full, no more
            assert received(sock) == (len(DATA), SUM)
        sent()


def test_many_connections_at_a_time_keep_their_bytes_apart(setting: Setting) -> None:
    count = 24
    guest = setting.guest
    guest.output("socat VSOCK-LISTEN:80,fork,backlog=64 PIPE >/dev/null 2>&1 & true")

    def echo(number: int) -> bool:
        data = random.Random(number).randbytes(100_000)
        with setting.dial(80) as sock:
            sender = threading.Thread(target=sock.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < len(data):
                piece = sock.recv(1 << 16)
                assert piece
                got += piece
            sender.join()
            return got == data

    with ThreadPoolExecutor(count) as pool:
        assert all(pool.map(echo, range(count)))
    guest.output("kill $(pidof socat)")


def test_a_connection_that_is_cut_is_noticed_on_the_other_side(setting: Setting) -> None:
    ended = setting.in_guest("socat -u VSOCK-LISTEN:81 - | wc -c")
    with setting.dial(81) as sock:
        sock.sendall(b"12345")
    assert ended().strip() == "5"
    with setting.listen(5004) as listener:
        setting.guest.output(
            "(exec sleep 100 | socat -u - VSOCK-CONNECT:2:5004) >/dev/null 2>&1 & true"
        )
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(30)
            setting.guest.output("kill -9 $(pidof socat); kill $(pidof sleep)")
            assert sock.recv(10) == b""


@pytest.mark.parametrize("setting", ["qemu"], indirect=True)
def test_a_pause_of_the_guest_cuts_no_connection(setting: Setting) -> None:
    assert isinstance(setting.guest, QemuGuest)
    arrived = setting.in_guest("socat -b 65536 -u VSOCK-LISTEN:82 - | md5sum")
    with setting.dial(82) as sock:
        for start in range(0, len(DATA), len(DATA) // 4):
            sock.sendall(DATA[start : start + len(DATA) // 4])
            setting.guest.qmp("stop")
            time.sleep(0.2)
            setting.guest.qmp("cont")
    assert arrived().split()[0] == SUM


def test_the_driver_can_be_loaded_again(setting: Setting) -> None:
    held = setting.in_guest("socat -u VSOCK-LISTEN:83 - >/dev/null; true")
    with setting.dial(83) as sock:
        # A reset of the device, as at a reboot: the module itself is held by the socket.
        (device,) = setting.guest.output(
            "ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep virtio"
        ).split()
        driver = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"
        setting.guest.output(f"echo {device} >{driver}/unbind")
        setting.guest.output(f"echo {device} >{driver}/bind")
        assert sock.recv(10) == b""
    held()
    again = setting.in_guest("socat -u VSOCK-LISTEN:84 -")
    with setting.dial(84) as sock:
        sock.sendall(b"again")
    assert again() == "again"


def test_connections_end_with_the_guest_and_the_next_one_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "vm.vsock")
    with or_skip(), ServeProcess(tmp_path, "vsock", f"--cid={CID}", f"--uds={path}") as served:
        with UmlGuest([(served.sockets[0], DeviceId.VSOCK)], programs=SOCAT) as guest:
            setting = Setting(served, guest, path)
            guest.output("socat -u VSOCK-LISTEN:85 - >/dev/null 2>&1 & true")
            sock = setting.dial(85)
        with sock:
            sock.settimeout(30)
            assert sock.recv(10) == b""  # within seconds: it might have been a pause
        with UmlGuest([(served.sockets[0], DeviceId.VSOCK)], programs=SOCAT) as guest:
            setting = Setting(served, guest, path)
            again = setting.in_guest("socat -u VSOCK-LISTEN:86 -")
            with setting.dial(86) as sock:
                sock.sendall(b"the next guest")
            assert again() == "the next guest"
        assert_well(served)
