"""A real guest served by a confined worker: what the kernel says of it, and every call it makes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import md5
from pathlib import Path

import pytest

from vq import system_calls
from vq.abi import DeviceId
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import need_program, need_root, or_skip
from vq.testing.served import ServeProcess

from .conftest import (
    HOST4,
    TAP,
    Served,
    address_guest,
    address_host,
    assert_well,
    wait_until,
    worker_of,
)


@pytest.fixture
def tap(host: Namespace) -> Iterator[str]:
    need_root()
    host.add_tap(TAP)
    address_host(host)
    yield f"tap:{TAP}"
    host.run(f"ip link del {TAP}")


def offload(host: Namespace, name: str) -> bool:
    line = re.search(rf"^\s*{name}: (\w+)", host.run(f"ethtool -k {TAP}"), re.M)
    assert line is not None
    return line[1] == "on"


def ping(guest: UmlGuest) -> None:
    assert ", 0% packet loss" in guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST4}")


def test_a_guest_talks_through_a_worker_without_privileges(
    host: Namespace, tap: str, tmp_path: Path
) -> None:
    served = Served(tmp_path, tap, "--sandbox=require", namespace=host)
    with ExitStack() as stack:
        stack.callback(served.close)
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        stack.enter_context(guest)
        address_guest(guest)
        ping(guest)

        worker = worker_of(served).pid
        lines = Path(f"/proc/{worker}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert os.listdir(f"/proc/{worker}/root") == []
        host_net = host.run("readlink /proc/self/ns/net").strip()
        assert os.readlink(f"/proc/{worker}/ns/net") != host_net

        # The guest changes its mind, and the helper does what the worker may not.
        wait_until(lambda: offload(host, "tx-tcp-segmentation"), "TSO towards the guest")
        guest.output("ethtool -K eth0 rx-gro-hw off")  # CTRL_GUEST_OFFLOADS_SET
        wait_until(lambda: not offload(host, "tx-tcp-segmentation"), "TSO off")
        ping(guest)
        guest.output("ethtool -K eth0 rx-gro-hw on")
        wait_until(lambda: offload(host, "tx-tcp-segmentation"), "TSO on again")
        with iperf_server(host):
            guest.output(f"iperf3 -c {HOST4} -t 1 -R")
        guest.output("ethtool -K eth0 rx-gro-hw off")
        wait_until(lambda: not offload(host, "tx-tcp-segmentation"), "TSO off once more")
        guest.output("rmmod virtio_net && modprobe virtio_net")
        wait_until(lambda: offload(host, "tx-tcp-segmentation"), "TSO on with the new driver")
        address_guest(guest)
        ping(guest)
        assert worker_of(served).pid == worker, "one life"
        assert_well(served, guest, host)


@pytest.mark.parametrize("sandbox", ["require", "off"])
def test_a_guest_whose_tap_is_deleted_and_made_again_talks_on(
    host: Namespace, tap: str, tmp_path: Path, sandbox: str
) -> None:
    served = Served(tmp_path, tap, f"--sandbox={sandbox}", namespace=host)
    with ExitStack() as stack:
        stack.callback(served.close)
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        stack.enter_context(guest)
        address_guest(guest)
        ping(guest)
        for life in range(2):
            host.run(f"ip link del {TAP}")
            wait_until(lambda: not has_carrier(guest), "word of it in the guest")
            guest.run(f"ping -c 1 -W 1 {HOST4}")  # to nobody
            assert served.log().count("the link broke: the tap is gone") == life + 1
            host.add_tap(TAP)
            address_host(host)
            wait_until(lambda: has_carrier(guest), "a carrier in the guest", 10)
            wait_until(lambda: offload(host, "tx-tcp-segmentation"), "TSO towards the guest")
            # The new tap has another Ethernet address. The guest's kernel forgets the old one if
            # it sees the carrier away, but it looks only once a second, and may look too late.
            guest.output("ip neigh flush dev eth0")
            ping(guest)
        with iperf_server(host):
            guest.output(f"iperf3 -c {HOST4} -t 1 -R")
            guest.output(f"iperf3 -c {HOST4} -t 1")
        assert_well(guest, host)


def has_carrier(guest: UmlGuest) -> bool:
    return guest.output("cat /sys/class/net/eth0/carrier").strip() == "1"


# --- what strace sees, which is what the kernel sees ----------------------------------------------

CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(?:\d+:\d+:\d+ )?(?:<\.\.\. )?(\w+)(?:\(| resumed)")
IOCTL = re.compile(r"\bioctl\(\d+, (0x[0-9a-f]+)")


class Trace:
    """Every system call that a worker makes from now on, until `stop`."""

    def __init__(self, served: ServeProcess, directory: Path) -> None:
        self._path = directory / "trace"
        strace = need_program("strace")
        self._process = subprocess.Popen(
            # Requests as numbers, not in words.
            [strace, "-f", "-X", "raw", "-o", self._path, "-p", str(worker_of(served).pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        assert "attached" in self._process.stderr.readline()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate(timeout=10)

    def check(self, *modules: str) -> tuple[set[str], set[int]]:
        """All that were made are listed by these modules; gives the calls and ioctl's requests."""
        self.stop()
        text = self._path.read_text()
        calls = {match[1] for line in text.splitlines() if (match := CALL.match(line))}
        requests = {int(request, 16) for request in IOCTL.findall(text)}
        calls -= {"killed", "exited"}
        code = f"import {', '.join(modules)}; from vq.sandbox import linux;"
        code += "print(*linux.listed_calls()); print(*linux.listed_ioctls())"
        said = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
        assert calls <= set(said[0].split()), f"not listed: {calls - set(said[0].split())}"
        assert requests <= {int(request) for request in said[1].split()}, requests
        assert calls <= set(system_calls.names())
        return calls, requests


def test_a_worker_makes_only_the_calls_that_are_listed(
    host: Namespace, tap: str, tmp_path: Path
) -> None:
    served = Served(tmp_path, tap, namespace=host)
    with ExitStack() as stack:
        stack.callback(served.close)
        trace = Trace(served, tmp_path)
        stack.callback(trace.stop)
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        stack.enter_context(guest)
        address_guest(guest)
        ping(guest)
        with iperf_server(host):
            guest.output(f"iperf3 -c {HOST4} -t 1; iperf3 -c {HOST4} -t 1 -R")
        guest.output("ip link set eth0 down; ip link set eth0 up; rmmod virtio_net")
    calls, _ = trace.check("vq.serve.net", "vq.tap_linux")
    assert {"epoll_wait", "writev", "recvmsg"} <= calls | {"epoll_pwait"}, calls


def test_a_consoles_worker_makes_only_the_calls_that_are_listed(tmp_path: Path) -> None:
    """On a terminal whose window changes its size, with a client of a socket, and on a file."""
    need_root()
    ends = [f"--port=p=unix:{tmp_path}/p", f"--port=log=file:{tmp_path}/log"]
    options = ["--sandbox=require", "--pty", f"--link={tmp_path}/tty", *ends]
    with ExitStack() as stack:
        served = stack.enter_context(ServeProcess(tmp_path, "console", *options))
        trace = Trace(served, tmp_path)
        stack.callback(trace.stop)
        with or_skip():
            guest = UmlGuest([(served.sockets[0], DeviceId.CONSOLE)])
        stack.enter_context(guest)
        terminal = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)
        stack.callback(os.close, terminal)
        os.write(terminal, b"typed\n")
        assert guest.output("head -n 1 </dev/hvc0").strip() == "typed"
        termios.tcsetwinsize(terminal, (33, 101))
        guest.output(
            'for i in $(seq 50); do test "$(stty -F /dev/hvc0 size)" = "33 101" && exit 0;'
            " sleep 0.1; done; exit 1"
        )
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "p"))
            guest.output("until echo shown >/dev/vport0p1; do sleep 0.1; done")
            assert client.recv(100) == b"shown\n"
            client.sendall(b"question\n")
            assert guest.output("head -n 1 </dev/vport0p1").strip() == "question"
        wait_until(lambda: "the client has gone" in served.log(), "the client's going")
        guest.output("echo written >/dev/vport0p2")
        wait_until(lambda: (tmp_path / "log").read_text() == "written\n", "the file")
        assert_well(served, guest)
    calls, requests = trace.check("vq.serve.console")
    assert {"accept4", "poll", "readv", "writev"} <= calls | {"ppoll"}, calls
    assert {termios.FIONREAD, termios.TIOCGWINSZ, termios.TCGETS} <= requests | {termios.TCGETS}
    assert "ERROR" not in served.log(), served.log()


def test_a_vsock_devices_worker_makes_only_the_calls_that_are_listed(tmp_path: Path) -> None:
    """Connections from the guest, which the helper makes, and from the host."""
    need_root()
    path = str(tmp_path / "u")
    options = ["--sandbox=require", "--cid=42", f"--uds={path}"]
    with ExitStack() as stack:
        served = stack.enter_context(ServeProcess(tmp_path, "vsock", *options))
        trace = Trace(served, tmp_path)
        stack.callback(trace.stop)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{path}_5000")
        listener.listen()
        listener.settimeout(10)
        with or_skip():
            guest = UmlGuest([(served.sockets[0], DeviceId.VSOCK)], programs={"socat": "socat"})
        stack.enter_context(guest)
        guest.output("echo from the guest | socat -u - VSOCK-CONNECT:2:5000")
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(100) == b"from the guest\n"
        assert guest.run("socat -u VSOCK-CONNECT:2:5001 -").status != 0, "nobody listens there"
        guest.output("socat VSOCK-LISTEN:77 SYSTEM:md5sum >/dev/null 2>&1 </dev/null & true")
        for _ in range(100):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(path)
                client.sendall(b"CONNECT 77\n")
                if client.recv(100).startswith(b"OK "):
                    client.sendall(b"question")
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(100).split()[0].decode() == md5(b"question").hexdigest()
                    break
            time.sleep(0.05)
        else:
            raise AssertionError("nobody in the guest accepts")
        assert_well(served, guest)
    calls, _ = trace.check("vq.serve.vsock")
    assert {"accept4", "recvmsg", "shutdown", "poll"} <= calls | {"ppoll"}, calls
    assert "connect" not in calls and "socket" not in calls, "that is the helper's"
    assert "ERROR" not in served.log(), served.log()
