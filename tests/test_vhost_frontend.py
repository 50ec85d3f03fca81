"""The scripted frontend in one thread with the device that it drives."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from vhost_frontend import Shouter

from vq.driver import DeviceError, Driver
from vq.link import LoopbackLink
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import PLAIN_HEADER, NetDriver
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_user import Connection, Server

FRAME = b"\xff" * 6 + b"\2\0\0\0\0\1\x88\xb5" + bytes(range(50))


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(4 << 20, (1 << 32, 4 << 20)) as made:
        yield made


def echo(driver: NetDriver, frontend: VhostFrontend) -> None:
    assert driver.send(FRAME)
    frames = []
    for _ in range(1000):
        frontend.wait()
        frames += driver.receive()
        if frames:
            break
    assert [frame.data for frame in frames] == [FRAME]


def test_a_net_driver_works_over_it_as_it_does_without(
    loop: Loop, memory: GuestMemory, tmp_path: Path
) -> None:
    fds = psutil.Process().num_fds()
    device = NetDevice(LoopbackLink(), mtu=4000)
    server = Server(device, loop, tmp_path / "s", queue_num=1)
    frontend = VhostFrontend(tmp_path / "s", memory, idle=lambda: loop.run_once(0))
    driver = NetDriver(frontend, memory, idle=frontend.wait)
    assert driver.settings.mtu == 4000
    echo(driver, frontend)
    driver.restart()
    echo(driver, frontend)
    assert driver.set_mac(b"\2\0\0\0\0\7") and driver.settings.mac == b"\2\0\0\0\0\7"

    device.set_link_up(False)
    while driver.settings.link_up:
        assert frontend.wait()
    driver.close()
    frontend.close()
    server.close()
    device.close()
    assert psutil.Process().num_fds() <= fds


def test_it_goes_on_with_the_rings_over_another_backend(
    loop: Loop, memory: GuestMemory, tmp_path: Path
) -> None:
    def begin() -> tuple[NetDevice, Server]:
        device = NetDevice(LoopbackLink())
        return device, Server(device, loop, tmp_path / "s", queue_num=1)

    device, server = begin()
    frontend = VhostFrontend(tmp_path / "s", memory, idle=lambda: loop.run_once(0))
    driver = NetDriver(frontend, memory, idle=frontend.wait)
    for _ in range(3):
        echo(driver, frontend)
        server.close()
        device.close()
        driver.send_burst([(PLAIN_HEADER, FRAME)])  # nobody hears this kick
        device, server = begin()
        frontend.reconnect()
        assert driver.wait_sent()
        while not driver.receive():
            frontend.wait()
    frontend.close()
    server.close()
    device.close()


def test_any_device_is_driven(loop: Loop, memory: GuestMemory) -> None:
    ours, theirs = socket.socketpair()
    device = Shouter(size=16)
    connection = Connection(theirs, device, loop)
    with VhostFrontend(
        ours,
        memory,
        device_id=4,
        queue_count=2,
        queue_size=16,
        idle=lambda: loop.run_once(0),
    ) as frontend:
        driver = Driver(frontend, memory, 0)
        driver.probe()
        source, target = driver.allocator.allocate(16), driver.allocator.allocate(16)
        memory.write(source, b"hello")
        driver.queues[1].add([(source, 5)], [(target, 16)])
        assert driver.kick(1)
        while not driver.calls:
            frontend.wait()
        (used,) = driver.queues[1].collect()
        assert memory.read(target, used.written) == b"HELLO"
        driver.transport.write_config(4, b"\x0b\0\0\0")
        assert device.writes == [(4, b"\x0b\0\0\0")]
        assert driver.read_config(0, 4) == b"\x44\x33\x22\x11"
    connection.close()


def test_a_backend_that_does_not_answer_or_hangs_up_is_an_error(
    memory: GuestMemory, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(DeviceError, match="no answer to GET_FEATURES in time"):
        VhostFrontend(ours, memory, timeout=0.05)
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(BrokenPipeError):
        VhostFrontend(ours, memory)
    with pytest.raises(FileNotFoundError):
        VhostFrontend(tmp_path / "nothing", memory, timeout=0)
