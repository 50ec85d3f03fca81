"""A net device with User-Mode Linux's driver in front of it and a tap of Linux behind it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vq.testing.guest import Guest, UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import find_program, or_skip

from .conftest import GUEST4, GUEST6, HOST4, HOST6, TAP, Served, address_guest, assert_well

OFFLOADS = "rx tx sg tso gso gro"
PEERS = pytest.mark.parametrize("peer", [HOST4, HOST6], ids=["ipv4", "ipv6"])


@pytest.fixture(autouse=True)
def everybody_is_well(uml: UmlGuest, host: Namespace, served_tap: Served) -> Iterator[None]:
    yield
    assert_well(uml, host, served_tap)


@pytest.fixture(scope="module", autouse=True)
def iperf(host: Namespace) -> Iterator[None]:
    with iperf_server(host):
        yield


@pytest.fixture(scope="module")
def web(uml: UmlGuest, host: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Web servers in the guest, port 80, and on the host, port 8080, whose directory this is."""
    directory = tmp_path_factory.mktemp("web")
    uml.output("mkdir -p /tmp/www && httpd -h /tmp/www -p 80")
    busybox = find_program("busybox")
    server = host.start([busybox, "httpd", "-f", "-p", "8080", "-h", str(directory)], lifetime=600)
    yield directory
    server.close()


@pytest.fixture(scope="module", params=["on", "off"], ids=["offloads", "no offloads"])
def offloads(request: pytest.FixtureRequest, uml: UmlGuest, host: Namespace) -> Iterator[str]:
    """Offloads on both sides, and after that on neither."""
    state = request.param
    set_offloads(uml, host, state)
    for run, interface in ((uml.output, "eth0"), (host.run, TAP)):
        features = run(f"ethtool -k {interface}")
        for name in ("tx-checksumming", "tcp-segmentation-offload"):
            assert f"{name}: {state}" in features, features
    yield state
    set_offloads(uml, host, "on")


def set_offloads(guest: Guest, host: Namespace, state: str) -> None:
    # Some are fixed by what was negotiated: those are left as they are.
    wanted = " ".join(f"{name} {state}" for name in OFFLOADS.split())
    guest.run(f"ethtool -K eth0 {wanted}")
    host.run(f"ethtool -K {TAP} {wanted} || true")


def transfer(guest: Guest, peer: str, *options: str) -> dict[str, Any]:
    """One iperf3 test between guest and host; iperf3's summary of it."""
    text = guest.output(f"iperf3 --json --connect-timeout 3000 -c {peer} {' '.join(options)}")
    # Warnings may come first.
    summary: dict[str, Any] = json.loads(text[text.index("{") :])["end"]
    return summary


# --- ping ----------------------------------------------------------------------------------------


@PEERS
def test_the_guest_pings_the_host(uml: UmlGuest, peer: str) -> None:
    assert ", 0% packet loss" in uml.output(f"ping -c 5 -i 0.1 -W 2 {peer}")


@pytest.mark.parametrize("peer", [GUEST4, GUEST6])
def test_the_host_pings_the_guest(uml: UmlGuest, host: Namespace, peer: str) -> None:
    assert ", 0% packet loss" in host.run(f"ping -c 5 -i 0.1 -W 2 {peer}")


@PEERS
@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 9001, 65000])
def test_pings_of_every_size_come_back(uml: UmlGuest, peer: str, size: int) -> None:
    assert ", 0% packet loss" in uml.output(f"ping -c 2 -i 0.05 -W 2 -s {size} {peer}")


# --- bulk ----------------------------------------------------------------------------------------


@PEERS
@pytest.mark.parametrize("direction", ["", "-R"], ids=["to host", "to guest"])
def test_tcp(uml: UmlGuest, peer: str, direction: str, offloads: str) -> None:
    summary = transfer(uml, peer, "-t 1", direction)
    # Far below what any machine does in a second: it tells slow from stuck.
    assert summary["sum_received"]["bytes"] > 100_000


@pytest.mark.parametrize("direction", ["", "-R"], ids=["to host", "to guest"])
@pytest.mark.parametrize(
    ("peer", "size"), [(HOST4, 64), (HOST6, 64), (HOST6, 1400), (HOST4, 8000), (HOST6, 8000)]
)
def test_each_datagram_arrives_or_is_counted_by_the_kernel_that_dropped_it(
    uml: UmlGuest,
    host: Namespace,
    served_tap: Served,
    peer: str,
    direction: str,
    size: int,
    offloads: str,
) -> None:
    # On a busy machine a receiver that does not run in time overflows its own socket, or the tap's
    # queue: up to 40 percent were seen. So it is the losses on the way that are looked for.
    def dropped() -> int:
        return kernel_drops(uml.output, "eth0") + kernel_drops(host.run, TAP)

    before = dropped()
    # Five hundred datagrams in half a second.
    summary = transfer(uml, peer, f"-k 500 -u -b {size * 8000} -l {size}", direction)["sum"]
    assert summary["packets"] > 0
    assert summary["lost_packets"] <= dropped() - before
    assert not [name for name in served_tap.stats() if "dropped" in name], served_tap.stats()


def kernel_drops(run: Callable[[str], str], interface: str) -> int:
    """What a kernel dropped so far, on an interface and because a UDP socket was full."""
    statistics = f"/sys/class/net/{interface}/statistics"
    text = run(
        f"cat {statistics}/rx_dropped {statistics}/tx_dropped;"
        " nstat -asz UdpRcvbufErrors Udp6RcvbufErrors | awk '/Errors/ {print $2}'"
    )
    return sum(map(int, text.split()))


def test_both_directions_at_once(uml: UmlGuest) -> None:
    summary = transfer(uml, HOST4, "-t 1 --bidir -P 2")
    assert summary["sum_received"]["bytes"] > 1e6
    assert summary["sum_received_bidir_reverse"]["bytes"] > 1e6


def test_a_large_file_arrives_byte_for_byte(
    uml: UmlGuest, host: Namespace, web: Path, offloads: str
) -> None:
    uml.output("head -c 8388608 /dev/urandom >/tmp/www/there")
    digest = uml.output("sha256sum </tmp/www/there").split()[0]
    page = host.run(f"busybox wget -q -O {web}/back http://{GUEST4}/there")
    assert hashlib.sha256((web / "back").read_bytes()).hexdigest() == digest, page
    assert digest in uml.output(f"wget -q -O - http://[{HOST6}]:8080/back | sha256sum")
    uml.output("rm /tmp/www/there")


def test_hundreds_of_connections(uml: UmlGuest, host: Namespace, web: Path) -> None:
    uml.output("echo page >/tmp/www/index.html")
    script = (
        "import socket\n"
        f"for number in range(500):\n"
        f"    with socket.create_connection(({GUEST4!r}, 80), timeout=10) as peer:\n"
        "        peer.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n"
        "        page = b''\n"
        "        while part := peer.recv(4096): page += part\n"
        "        assert page.endswith(b'page\\n'), (number, page)\n"
        "print('all', number + 1)\n"
    )
    assert host.run(f'python3 -c "{script}"', timeout=100) == "all 500\n"


# --- interfaces ----------------------------------------------------------------------------------


def test_an_mtu_of_9000(uml: UmlGuest, host: Namespace, offloads: str) -> None:
    uml.output("ip link set eth0 mtu 9000")
    host.run(f"ip link set {TAP} mtu 9000")
    # 9000 bytes of IP packet: 28 of them are headers.
    assert ", 0% packet loss" in uml.output(f"ping -c 3 -i 0.1 -W 2 -s 8972 {HOST4}")
    for direction in ("", "-R"):
        summary = transfer(uml, HOST4, "-t 1", direction)
        assert summary["sum_received"]["bytes"] > 100_000
    uml.output("ip link set eth0 mtu 1500")
    host.run(f"ip link set {TAP} mtu 1500")


def test_the_interface_goes_down_and_up_under_load(uml: UmlGuest) -> None:
    for _ in range(3):
        uml.output(
            f"iperf3 -c {HOST4} -t 1 >/dev/null 2>&1 & iperf=$!; sleep 0.3;"
            " ip link set eth0 down; kill $iperf; ip link set eth0 up; true"
        )
        uml.output(f"ip addr replace {GUEST6}/64 dev eth0")
        assert ", 0% packet loss" in uml.output(f"ping -c 3 -i 0.1 -W 2 {HOST4}")
        assert ", 0% packet loss" in uml.output(f"ping -c 3 -i 0.1 -W 2 {HOST6}")


def test_the_driver_is_unloaded_and_loaded_again(uml: UmlGuest) -> None:
    for _ in range(5):
        uml.output("rmmod virtio_net && modprobe virtio_net")
        address_guest(uml)
        assert ", 0% packet loss" in uml.output(f"ping -c 3 -i 0.1 -W 2 {HOST4}")
    assert transfer(uml, HOST6, "-t 1")["sum_received"]["bytes"] > 1e6


def test_offloads_change_while_traffic_flows(uml: UmlGuest) -> None:
    uml.output(f"iperf3 -c {HOST4} -t 3 --bidir >/tmp/iperf 2>&1 &")
    started = time.monotonic()
    while time.monotonic() - started < 2.5:
        for state in ("off", "on"):
            # rx-gro-hw is what the driver calls receiving segments of TCP as one frame: it sends
            # CTRL_GUEST_OFFLOADS_SET.
            for name in ("tx", "gro", "rx-gro-hw", "tso"):
                uml.output(f"ethtool -K eth0 {name} {state}")
    uml.output("for i in $(seq 50); do pidof iperf3 || break; sleep 0.1; done", timeout=90)
    assert "iperf Done" in uml.output("cat /tmp/iperf")


def test_multicast_and_promiscuous_mode_change(uml: UmlGuest) -> None:
    uml.output("ip link set eth0 promisc on && ip link set eth0 promisc off")
    uml.output("ip maddr add 33:33:00:00:12:34 dev eth0 && ip maddr del 33:33:00:00:12:34 dev eth0")
    assert ", 0% packet loss" in uml.output(f"ping -c 2 -i 0.1 -W 2 {HOST6}")


def test_the_guest_takes_another_mac_address(uml: UmlGuest) -> None:
    uml.output("ip link set eth0 address 02:00:00:00:77:77")
    assert ", 0% packet loss" in uml.output(f"ping -c 2 -i 0.1 -W 2 {HOST4}")
    uml.output("ip link set eth0 address 02:00:00:00:00:01")
    assert ", 0% packet loss" in uml.output(f"ping -c 2 -i 0.1 -W 2 {HOST4}")


# --- two guests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["pair", "bridge"])
def test_two_guests(link: str, tmp_path: Path, uml: UmlGuest, host: Namespace) -> None:
    """They talk over a cable inside vq, then over two taps and a bridge of the host; with VLANs."""
    with ExitStack() as stack:
        if link == "pair":
            served = [Served(tmp_path, "pair", names=["left", "right"])]
        else:
            host.run("ip link add vqbridge type bridge && ip link set vqbridge up")
            stack.callback(host.run, "ip link del vqbridge")
            served = []
            for number, name in ((1, "left"), (2, "right")):
                host.add_tap(f"vq{name}")
                stack.callback(host.run, f"ip link del vq{name}")
                host.run(f"ip link set vq{name} master vqbridge up")
                mac = f"--mac=02:00:00:00:66:0{number}"
                one = Served(tmp_path, f"tap:vq{name}", mac, names=[name], namespace=host)
                served.append(one)
        for one in served:
            stack.callback(one.close)
        sockets = [path for one in served for path in one.sockets]
        with or_skip():
            left = UmlGuest([(sockets[0], 1)])
        with left, UmlGuest([(sockets[1], 1)]) as right:
            for number, guest in ((1, left), (2, right)):
                guest.output(
                    "modprobe 8021q && ip link add link eth0 name eth0.7 type vlan id 7;"
                    f"ip addr add 198.18.66.{number}/24 dev eth0;"
                    f"ip addr add fd00:7672::{number}/64 dev eth0;"
                    f"ip addr add 198.18.67.{number}/24 dev eth0.7;"
                    "ip link set eth0 up && ip link set eth0.7 up"
                )
            right.output("iperf3 -s -D")
            for peer in ("198.18.66.2", "fd00:7672::2", "198.18.67.2"):
                assert ", 0% packet loss" in left.output(f"ping -c 3 -i 0.1 -W 2 -s 4000 {peer}")
                for direction in ("", "-R"):
                    summary = transfer(left, peer, "-t 1", direction)
                    assert summary["sum_received"]["bytes"] > 100_000
                    before = sum(kernel_drops(guest.output, "eth0") for guest in (left, right))
                    summary = transfer(left, peer, "-t 1 -u -b 5M", direction)
                    after = sum(kernel_drops(guest.output, "eth0") for guest in (left, right))
                    assert summary["sum"]["lost_packets"] <= after - before
            assert_well(left, right, *served)
