"""A net device with Linux's PCI driver in QEMU in front of it and a tap of Linux behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vq.testing.guest import Guest, QemuGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.requirements import or_skip

from .conftest import (
    HOST4,
    HOST6,
    Served,
    address_guest,
    address_host,
    assert_well,
    others_of,
    wait_until,
    worker_of,
)

TAP = "vqqemu"


@dataclass
class Setting:
    """A QEMU guest whose eth0 is on a tap of `host`."""

    host: Namespace
    served: Served
    guest: QemuGuest


@pytest.fixture
def start(host: Namespace, tmp_path: Path) -> Iterator[Callable[..., Setting]]:
    """Starts a setting; the arguments are QEMU's and the device's."""
    with ExitStack() as stack:

        def begin(*options: str, queue_pairs: int = 1, card: str = "") -> Setting:
            host.add_tap(TAP, queues=queue_pairs)
            stack.callback(host.run, f"ip link del {TAP}")
            address_host(host, TAP)
            words = (f"--queue-pairs={queue_pairs}", *options)
            served = Served(tmp_path, f"tap:{TAP}", *words, namespace=host)
            stack.callback(served.close)
            with or_skip():
                guest = QemuGuest(
                    served.sockets, queue_pairs=queue_pairs, cpus=queue_pairs, card=card
                )
            stack.enter_context(guest)
            address_guest(guest)
            return Setting(host, served, guest)

        yield begin


def transfer(guest: Guest, host: Namespace, *options: str) -> dict[str, Any]:
    """One iperf3 test between guest and host; iperf3's summary of it."""
    with iperf_server(host):
        text = guest.output(f"iperf3 --json --connect-timeout 5000 -t 1 {' '.join(options)}")
    summary: dict[str, Any] = json.loads(text[text.index("{") :])["end"]
    return summary


def test_the_guest_pings_and_transfers(start: Callable[..., Setting]) -> None:
    setting = start()
    for peer in (HOST4, HOST6):
        assert ", 0% packet loss" in setting.guest.output(f"ping -c 3 -i 0.2 -W 3 -s 3000 {peer}")
        for direction in ("", "-R"):
            summary = transfer(setting.guest, setting.host, f"-c {peer}", direction)
            assert summary["sum_received"]["bytes"] > 100_000
    assert_well(setting.guest, setting.host, setting.served)


@pytest.mark.parametrize(
    "card",
    [
        "mrg_rxbuf=off",
        "mrg_rxbuf=off,guest_tso4=off,guest_tso6=off,guest_ufo=off",
        "csum=off,guest_csum=off",
        "indirect_desc=off,event_idx=off",
        "ctrl_vq=off,ctrl_rx=off,ctrl_vlan=off,ctrl_rx_extra=off,guest_announce=off"
        ",ctrl_mac_addr=off,ctrl_guest_offloads=off",
    ],
)
def test_a_card_without_some_features(start: Callable[..., Setting], card: str) -> None:
    setting = start(card=card)
    assert ", 0% packet loss" in setting.guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST4}")
    for direction in ("", "-R"):
        summary = transfer(setting.guest, setting.host, f"-c {HOST4}", direction)
        assert summary["sum_received"]["bytes"] > 100_000
    assert_well(setting.guest, setting.host, setting.served)


def test_each_processor_of_the_guest_has_a_queue_pair_of_its_own(
    start: Callable[..., Setting],
) -> None:
    # Which queue a frame takes is the two kernels' choice: the driver sends through the pair of the
    # processor that it runs on, and the tap answers a flow through the pair that it came from.
    # iperf3 without its -A ran on whichever processor it liked, and once on one only.
    setting = start("--processes=2", queue_pairs=2)
    setting.guest.output("ethtool -L eth0 combined 2")
    wait_until(lambda: len(others_of(setting.served)) == 1, "another process")
    (other,) = others_of(setting.served)
    for processor in range(2):
        for direction in ("", "-R"):
            summary = transfer(
                setting.guest, setting.host, f"-c {HOST4} -P 4 -A {processor}", direction
            )
            assert summary["sum_received"]["bytes"] > 100_000
        text = setting.guest.output("ethtool -S eth0")
        counters = {name: int(count) for name, count in re.findall(r"(\w+): (\d+)", text)}
        for way in ("rx", "tx"):
            assert counters[f"{way}_queue_{processor}_packets"] > 100, counters
    assert others_of(setting.served) == [other], "it has had the second pair all the time"
    assert sum(other.cpu_times()[:2]) > 0, "and was not idle"
    setting.guest.output("ethtool -L eth0 combined 1")
    wait_until(lambda: not others_of(setting.served), "all at home")
    summary = transfer(setting.guest, setting.host, f"-c {HOST4} -P 4 --bidir")
    assert summary["sum_received"]["bytes"] > 1e6
    assert_well(setting.guest, setting.host, setting.served)


def test_traffic_goes_on_when_the_process_of_a_pair_is_killed_and_pairs_come_and_go(
    start: Callable[..., Setting],
) -> None:
    setting = start("--processes=2", queue_pairs=2)
    setting.guest.output("ethtool -L eth0 combined 2")
    with iperf_server(setting.host):
        # On the processor whose pair is the other process's.
        setting.guest.output(f"iperf3 -A 1 -c {HOST4} -t 8 --bidir --json >/tmp/iperf 2>&1 &")
        for _ in range(2):
            wait_until(lambda: len(others_of(setting.served)) == 1, "another process")
            (other,) = others_of(setting.served)
            busy = sum(other.cpu_times()[:2])
            wait_until(lambda: sum(other.cpu_times()[:2]) > busy + 0.1, "traffic")  # noqa: B023
            other.kill()
            wait_until(lambda: not other.is_running(), "its end")  # noqa: B023
        for pairs in (1, 2, 1, 2):
            setting.guest.output(f"ethtool -L eth0 combined {pairs}")
            wait_until(lambda: len(others_of(setting.served)) == pairs - 1, "as many")  # noqa: B023
        setting.guest.output(
            "for i in $(seq 150); do pidof iperf3 || break; sleep 0.1; done", timeout=90
        )
        report = json.loads(setting.guest.output("cat /tmp/iperf"))["end"]
    assert report["sum_received"]["bytes"] > 1e6, report
    assert report["sum_received_bidir_reverse"]["bytes"] > 1e6, report
    assert ", 0% packet loss" in setting.guest.output(f"ping -c 5 -i 0.2 -W 5 {HOST4}")
    log = setting.served.log()
    assert log.count("which served 2 queues, was killed by SIGKILL") == 2
    assert "driver error" not in log
    assert_well(setting.guest, setting.host)


def test_traffic_goes_on_when_the_backend_is_killed_and_started_again(
    start: Callable[..., Setting],
) -> None:
    setting = start()
    with iperf_server(setting.host):
        setting.guest.output(f"iperf3 -c {HOST4} -t 8 --bidir --json >/tmp/iperf 2>&1 &")
        for _ in range(2):
            wait_until(lambda: setting.served.count("tx_frames") > 200, "traffic")
            setting.served.kill()
            setting.served.start()
        # QEMU tries again once a second, and the guest has no carrier until then.
        wait_until(
            lambda: setting.guest.run(f"ping -c 1 -W 1 {HOST4}").status == 0, "a ping comes back"
        )
        assert ", 0% packet loss" in setting.guest.output(f"ping -c 5 -i 0.2 -W 5 {HOST4}")
        setting.guest.output(
            "for i in $(seq 150); do pidof iperf3 || break; sleep 0.1; done", timeout=90
        )
        report = json.loads(setting.guest.output("cat /tmp/iperf"))
    assert report["end"]["sum_received"]["bytes"] > 1e6, report
    assert_well(setting.guest, setting.host, setting.served)


def test_traffic_goes_on_when_the_worker_is_killed(start: Callable[..., Setting]) -> None:
    setting = start("--restart")
    with iperf_server(setting.host):
        setting.guest.output(f"iperf3 -c {HOST4} -t 8 --bidir --json >/tmp/iperf 2>&1 &")
        for _ in range(2):
            wait_until(lambda: setting.served.count("tx_frames") > 200, "traffic")
            dead = worker_of(setting.served)
            dead.kill()
            wait_until(lambda: not dead.is_running(), "its end")  # noqa: B023
        wait_until(
            lambda: setting.guest.run(f"ping -c 1 -W 1 {HOST4}").status == 0, "a ping comes back"
        )
        setting.guest.output(
            "for i in $(seq 150); do pidof iperf3 || break; sleep 0.1; done", timeout=90
        )
        report = json.loads(setting.guest.output("cat /tmp/iperf"))
    assert report["end"]["sum_received"]["bytes"] > 1e6, report
    assert setting.served.log().count("the worker was killed by SIGKILL") == 2
    assert_well(setting.guest, setting.host)


def test_the_driver_is_unloaded_and_loaded_again(start: Callable[..., Setting]) -> None:
    setting = start()
    for _ in range(3):
        setting.guest.output("rmmod virtio_net && modprobe virtio_net")
        address_guest(setting.guest)
        assert ", 0% packet loss" in setting.guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST4}")
    setting.guest.output("rmmod virtio_net virtio_pci && modprobe -a virtio_pci virtio_net")
    address_guest(setting.guest)
    assert ", 0% packet loss" in setting.guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST6}")
    assert_well(setting.guest, setting.host, setting.served)


def test_the_guest_reboots(start: Callable[..., Setting]) -> None:
    setting = start()
    assert ", 0% packet loss" in setting.guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST4}")
    setting.guest.close()
    with QemuGuest(setting.served.sockets) as guest:
        address_guest(guest)
        assert ", 0% packet loss" in guest.output(f"ping -c 3 -i 0.2 -W 3 {HOST4}")
        assert_well(guest, setting.host)


def test_a_guest_moves_to_another_qemu_and_backend_with_its_connections(
    host: Namespace, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        host.run("ip link add vqbridge type bridge")
        stack.callback(host.run, "ip link del vqbridge")
        address_host(host, "vqbridge")
        served = []
        for name in ("before", "after"):
            host.add_tap(f"vq{name}")
            stack.callback(host.run, f"ip link del vq{name}")
            host.run(f"ip link set vq{name} master vqbridge up")
            served.append(Served(tmp_path, f"tap:vq{name}", names=[name], namespace=host))
            stack.callback(served[-1].close)
        with or_skip():
            source = QemuGuest(served[0].sockets)
        stack.enter_context(source)
        address_guest(source)
        stack.enter_context(iperf_server(host))
        source.output(f"iperf3 -c {HOST4} -t 12 --bidir --json >/tmp/iperf 2>&1 &")
        wait_until(lambda: served[0].count("tx_frames") > 500, "traffic")
        guest = stack.enter_context(source.move(served[1].sockets))
        wait_until(lambda: served[1].count("tx_frames") > 500, "traffic on the other side")
        assert ", 0% packet loss" in guest.output(f"ping -c 5 -i 0.2 -W 5 {HOST4}")
        guest.output("for i in $(seq 200); do pidof iperf3 || break; sleep 0.1; done", timeout=90)
        end = json.loads(guest.output("cat /tmp/iperf"))["end"]
        assert end["sum_received"]["bytes"] > 1e6
        assert end["sum_received_bidir_reverse"]["bytes"] > 1e6
        assert_well(guest, host, *served)
