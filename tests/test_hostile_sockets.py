"""The battery of hostile drivers against the console and the socket device, with real sockets."""

from __future__ import annotations

import itertools
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vq.abi_console import ConsoleControl, ConsoleEvent, ConsoleFeature
from vq.abi_vsock import VsockOp
from vq.devices import host_end
from vq.devices.console import ConsoleDevice, Port
from vq.devices.host_end import UnixEnd
from vq.devices.vsock import VsockDevice
from vq.devices.vsock_connection import Header
from vq.testing.hostile import NotApplicable, hostile_driver_battery
from vq.testing.wiring import Wired


class Places:
    """Paths that no other device has had, in a directory that is gone with the tests."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="vq-hostile-")
        self.numbers = itertools.count()

    def new(self) -> str:
        return f"{self.directory.name}/{next(self.numbers)}"


PLACES = Places()


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_end, "LOOK_SECONDS", 0.002)


def make_console() -> ConsoleDevice:
    return ConsoleDevice([Port(UnixEnd(PLACES.new())), Port(UnixEnd(PLACES.new()), "port")])


def exchange_bytes(wired: Wired) -> None:
    """Somebody at the host's end of port 0 reads what the guest says, and answers."""
    device = wired.device
    assert isinstance(device, ConsoleDevice)
    if device.has_feature(ConsoleFeature.MULTIPORT):
        for event in (ConsoleEvent.DEVICE_READY, ConsoleEvent.PORT_OPEN):
            wired.request(3, bytes(ConsoleControl(id=0, event=event, value=1)))
    end = device._ports[0].end
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(end.name.removeprefix("unix "))
        client.setblocking(False)
        wired.wait_until(lambda: end.is_connected)
        assert wired.request(1, b"from the guest", pieces=3) == b""
        heard = b""

        def hear() -> bool:
            nonlocal heard
            with suppress(BlockingIOError):
                heard += client.recv(1 << 20)
            return heard.endswith(b"from the guest")

        wired.wait_until(hear, "the guest's words at the host")
        receive_bytes(wired, 0, lambda: client.send(b"#"), b"#")
    wired.wait_until(lambda: not end.is_connected)


def receive_bytes(wired: Wired, queue: int, send: Callable[[], object], wanted: bytes) -> bytes:
    """Gives buffers until one comes back that ends with what is wanted."""
    driver, ring = wired.driver, wired.driver.queues[queue]
    places = set()
    for _ in range(40):
        if ring.num_free:
            place = driver.allocator.allocate(256)
            places.add(place)
            ring.add([], [(place, 256)], place)
        elif not places:
            raise NotApplicable("the queue is full of buffers that hold nothing")
        driver.kick(queue)
        send()
        wired.turn()
        for used in ring.collect():
            if used.token in places:
                data = wired.memory.read(used.token, used.written)
                if data.endswith(wanted):
                    return data
                places.remove(used.token)
    raise AssertionError("nothing comes to the guest")


test_console_device = hostile_driver_battery(make_console, exchange_bytes)


def make_vsock() -> VsockDevice:
    return VsockDevice(42, PLACES.new())


def exchange_packets(wired: Wired) -> None:
    """A packet of no connection is answered, and a connection is made."""
    device = wired.device
    assert isinstance(device, VsockDevice)

    def header(op: int, port: int, **fields: int) -> Header:
        return Header(42, 2, 7, port, op=op, buf_alloc=1 << 18)._replace(**fields)

    def refuse() -> None:
        wired.request(1, header(VsockOp.RW, 9).pack(), pieces=7)

    receive_bytes(wired, 0, refuse, Header(2, 42, 9, 7, op=VsockOp.RST).pack())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{device.path}_5")
        listener.listen()
        wired.request(1, header(VsockOp.REQUEST, 5).pack())
        sock, _ = listener.accept()
    Path(f"{device.path}_5").unlink()
    with sock:
        wired.request(1, header(VsockOp.RW, 5, len=5).pack() + b"hello", pieces=5)
        assert sock.recv(10) == b"hello"
        wired.request(1, header(VsockOp.RST, 5).pack())
        assert sock.recv(10) == b""


test_vsock_device = hostile_driver_battery(make_vsock, exchange_packets)
