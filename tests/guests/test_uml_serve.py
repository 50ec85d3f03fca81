"""The options of ``vq serve net``, as a guest sees them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vq.testing.guest import UmlGuest
from vq.testing.requirements import need_program, or_skip

from .conftest import Served, assert_well

MRG_RXBUF, VERSION_1 = 15, 32
Start = Callable[..., tuple[Served, UmlGuest]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Boots a guest in front of a device on the null link, served with these options."""
    with ExitStack() as stack:

        def begin(*options: str) -> tuple[Served, UmlGuest]:
            served = Served(tmp_path, "null", *options)
            stack.callback(served.close)
            with or_skip():
                guest = UmlGuest([(served.sockets[0], 1)])
            stack.enter_context(guest)
            guest.output("ip addr add 198.18.64.2/24 dev eth0 && ip link set eth0 up")
            return served, guest

        yield begin


def test_the_guest_has_the_mac_address_and_the_mtu(start: Start) -> None:
    served, guest = start("--mac=02:12:34:56:78:9a", "--mtu=1280")
    assert guest.output("cd /sys/class/net/eth0; cat address mtu") == "02:12:34:56:78:9a\n1280\n"
    assert guest.run("ip link set eth0 mtu 1281").status != 0
    assert_well(served, guest)


def test_a_feature_that_is_taken_away_is_not_negotiated(start: Start) -> None:
    served, guest = start("--features=-MRG_RXBUF")
    bits = guest.output("cat /sys/bus/virtio/devices/virtio0/features")
    assert (bits[MRG_RXBUF], bits[VERSION_1]) == ("0", "1")
    assert_well(served, guest)


def test_frames_from_another_mac_address_are_dropped(start: Start) -> None:
    served, guest = start("--lock-mac", "--mac=02:00:00:00:00:01", "--features=-CTRL_MAC_ADDR")
    guest.run("arping -c 3 -w 1 -I eth0 198.18.64.1")
    assert served.count("tx_dropped: source address") == 0
    sent = served.count("tx_frames")
    assert sent >= 2
    guest.output("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:02")
    guest.output("ip link set eth0 up")
    guest.run("arping -c 3 -w 1 -I eth0 198.18.64.1")
    assert served.count("tx_dropped: source address") >= 2
    assert_well(served, guest)


def test_dhcp_is_answered_without_a_network(start: Start) -> None:
    served, guest = start("--local-dhcp=100.64.1.3/100.64.1.2")
    guest.output("printf '#!/bin/sh\\nenv >/tmp/lease.$1\\n' >/tmp/lease; chmod +x /tmp/lease")
    guest.output("udhcpc -i eth0 -n -q -s /tmp/lease")
    lease = guest.output("cat /tmp/lease.bound").splitlines()
    assert "ip=100.64.1.3" in lease
    assert_well(served, guest)


def test_both_directions_are_captured(start: Start, tmp_path: Path) -> None:
    tcpdump = need_program("tcpdump")
    file = tmp_path / "frames.pcapng"
    served, guest = start(f"--capture={file}")
    guest.run("arping -c 2 -w 1 -I eth0 198.18.64.1")
    sent = served.count("tx_frames")
    served.kill()
    done = subprocess.run(
        [tcpdump, "-enr", str(file)], capture_output=True, text=True, timeout=20, check=True
    )
    assert len(done.stdout.splitlines()) == sent
    assert done.stdout.count("who-has 198.18.64.1") >= 2
