"""Real drivers at vq's registers: U-Boot's virtio-mmio and virtio-pci, on an emulated processor."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pump import in_namespace

from vq.device import Device
from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.devices.entropy import EntropyDevice
from vq.dhcp import LocalDhcp
from vq.link import NullLink
from vq.net import DEFAULT_MAC, NetDevice
from vq.tap_linux import LinuxTap
from vq.testing.namespaces import Namespace
from vq.testing.requirements import need_namespaces, need_tap

from .conftest import GUEST4, HOST4
from .riscv_board import Board

SCAN = "virtio scan"
buses = pytest.mark.parametrize("bus", ["mmio", "pci"])


def board(bus: str, *devices: Device) -> Board:
    return Board(mmio=devices) if bus == "mmio" else Board(pci=devices)


def assert_well(*devices: Device) -> None:
    """Nothing that a real driver does is ignored, or breaks a rule."""
    for device in devices:
        wrong = [name for name in device.stats if "ignored" in name or "errors" in name]
        assert not wrong and device.fault is None, (device.stats, device.fault)


@buses
def test_u_boot_finds_the_devices(bus: str) -> None:
    entropy, net = EntropyDevice(), NetDevice(NullLink())
    text = board(bus, entropy, net).run(SCAN, "dm tree", "net list")
    assert "virtio-net#" in text
    assert net.mac.hex(":") in text.lower()
    assert_well(entropy, net)
    net.close()


@buses
def test_u_boot_has_an_address_by_dhcp(bus: str) -> None:
    dhcp = LocalDhcp(DEFAULT_MAC, GUEST4, HOST4, netmask="255.255.255.0")
    net = NetDevice(NullLink(), responders=[dhcp.answer])
    text = board(bus, net).run(SCAN, "setenv autoload no", "dhcp", "printenv ipaddr")
    assert f"DHCP client bound to address {GUEST4}" in text
    assert f"ipaddr={GUEST4}" in text
    assert net.stats["tx_answered"] >= 2 and net.stats["rx_frames"] >= 2
    assert_well(net)
    net.close()


@buses
def test_u_boot_reads_and_writes_a_disk(bus: str, tmp_path: Path) -> None:
    contents = random.Random(7).randbytes(1 << 20)
    image = tmp_path / "image"
    image.write_bytes(contents)
    disk = BlockDevice(Image(image))
    whole, there = zlib.crc32(contents), zlib.crc32(b"\x5a" * 0x2000)
    text = board(bus, disk).run(
        SCAN,
        "virtio info",
        "virtio read 80800000 0 800",
        "crc32 80800000 100000",
        "mw.b 80800000 5a 2000",
        "virtio write 80800000 20 10",
        "virtio read 80900000 20 10",
        "crc32 80900000 2000",
    )
    assert "Type: Hard Disk" in text and "2048 x 512" in text
    assert f"==> {whole:08x}" in text and f"==> {there:08x}" in text
    disk.close()
    assert image.read_bytes() == contents[:0x4000] + b"\x5a" * 0x2000 + contents[0x6000:]
    assert_well(disk)


@pytest.fixture
def host() -> Iterator[Namespace]:
    need_tap()
    need_namespaces()
    with Namespace() as namespace:
        yield namespace


@buses
def test_u_boot_pings_the_host(bus: str, host: Namespace) -> None:
    name = f"vqu{os.getpid() % 100000}"
    with closing(NetDevice(in_namespace(host.name, lambda: LinuxTap(name)))) as net:
        host.run(f"ip addr add {HOST4}/24 dev {name} && ip link set {name} up")
        commands = [f"setenv ipaddr {GUEST4}", "setenv netmask 255.255.255.0"]
        text = board(bus, net).run(SCAN, *commands, *[f"ping {HOST4}"] * 3)
        assert text.count(f"host {HOST4} is alive") == 3
        assert net.stats["rx_frames"] >= 4
        assert_well(net)
