"""A real guest served by a confined worker: what the kernel says of it, and every call it makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vq import system_calls
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import need_program, need_root, or_skip

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


NAME = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(?:\d+:\d+:\d+ )?(?:<\.\.\. )?(\w+)(?:\(| resumed)")


def test_a_worker_makes_only_the_calls_that_are_listed(
    host: Namespace, tap: str, tmp_path: Path
) -> None:
    """strace sees what the kernel sees, from the first frame to the last."""
    strace = need_program("strace")
    served = Served(tmp_path, tap, namespace=host)
    with ExitStack() as stack:
        stack.callback(served.close)
        worker = worker_of(served).pid
        trace = tmp_path / "trace"
        tracer = subprocess.Popen(
            [strace, "-f", "-o", str(trace), "-p", str(worker)], stderr=subprocess.DEVNULL
        )
        stack.callback(tracer.wait, 10)
        stack.callback(tracer.terminate)
        wait_until(trace.exists, "strace")
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        stack.enter_context(guest)
        address_guest(guest)
        ping(guest)
        with iperf_server(host):
            guest.output(f"iperf3 -c {HOST4} -t 1; iperf3 -c {HOST4} -t 1 -R")
        guest.output("ip link set eth0 down; ip link set eth0 up; rmmod virtio_net")
    made = {match[1] for line in trace.read_text().splitlines() if (match := NAME.match(line))}
    made -= {"killed", "exited"}
    modules = "vq.serve.net, vq.tap_linux, vq.sandbox.linux"  # those of such a worker
    code = f"import {modules}; print(*vq.sandbox.linux.listed_calls())"
    listed = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert {"epoll_wait", "writev", "recvmsg"} <= made | {"epoll_pwait"}, made
    assert made <= listed, f"not listed: {made - listed}"
    assert made <= set(system_calls.names())
