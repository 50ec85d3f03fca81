"""From a guest to the network with no privileges at all: User-Mode Linux, vq and passt."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vq.testing.contained import ContainedProcess
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import bad_checksums, iperf_server
from vq.testing.requirements import need_program, or_skip

from .conftest import Served, assert_well, wait_until

LEASE = """\
case $1 in bound|renew)
    ip addr replace $ip/$mask dev $interface
    ip route replace default via $router dev $interface
    echo $router >/tmp/router
esac
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def web_port() -> int:
    """The port of 127.0.0.1 that passt takes to port 80 of the guest."""
    return free_port()


@pytest.fixture(scope="module")
def uml(tmp_path_factory: pytest.TempPathFactory, web_port: int) -> Iterator[UmlGuest]:
    directory = tmp_path_factory.mktemp("passt")
    # As root it becomes somebody else, who has to reach its socket.
    for part in (directory, *directory.parents[:2]):
        part.chmod(0o755)
    directory.chmod(0o777)
    path, log = directory / "passt.sock", directory / "passt.log"
    passt = need_program("passt")
    options = ["--address", "198.51.100.15", "--netmask", "24", "--gateway", "198.51.100.2", "-4"]
    options += ["--tcp-ports", f"127.0.0.1/{web_port}:80", "--socket", str(path)]
    with or_skip():
        process = ContainedProcess(
            [passt, "--foreground", "--stderr", *options], lifetime=300, output=log
        )
    try:
        wait_until(lambda: path.exists() or not process.running, "passt listens")
        assert process.running, log.read_text()
        served = Served(directory, f"stream:{path}")
        try:
            with or_skip():
                guest = UmlGuest([(served.sockets[0], 1)])
            with guest:
                guest.output(f"cat >/tmp/lease <<'end'\n{LEASE}end\nchmod +x /tmp/lease")
                guest.output("ip link set eth0 up && udhcpc -i eth0 -n -q -s /tmp/lease")
                yield guest
                assert_well(served)
                assert guest.complaints() == []
        finally:
            served.close()
    finally:
        process.close()


def test_the_guest_gets_its_address_by_dhcp(uml: UmlGuest) -> None:
    assert "198.51.100.15/24" in uml.output("ip -4 -br addr show eth0")


@pytest.mark.parametrize("direction", ["", "-R"], ids=["to host", "to guest"])
def test_the_guest_transfers(uml: UmlGuest, direction: str) -> None:
    port = free_port()
    with iperf_server(port=port):
        # passt takes connections to the gateway to this machine's loopback interface.
        text = uml.output(f"iperf3 -c $(cat /tmp/router) -p {port} -t 1 --json {direction}")
    assert json.loads(text)["end"]["sum_received"]["bytes"] > 100_000
    assert bad_checksums(uml.output) == {}


def test_the_guest_serves(uml: UmlGuest, web_port: int, tmp_path: Path) -> None:
    uml.output("mkdir -p /tmp/www && seq 100000 >/tmp/www/numbers && httpd -h /tmp/www -p 80")
    page = urllib.request.urlopen(f"http://127.0.0.1:{web_port}/numbers", timeout=20).read()
    assert page.decode() == "".join(f"{number}\n" for number in range(1, 100001))
    assert bad_checksums(uml.output) == {}
