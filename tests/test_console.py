"""The console device, driven by a scripted driver, with real terminals, sockets and files."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import re
import socket
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_world import DeviceWorld

from vq.abi import (
    Feature,
    Status,
)
from vq.abi_console import (
    ConsoleConfig,
    ConsoleControl,
    ConsoleEvent,
    ConsoleFeature,
)
from vq.device import RING_FEATURES
from vq.devices import console, host_end
from vq.devices.console import ConsoleDevice, Port
from vq.devices.host_end import FileEnd, PtyEnd, UnixEnd
from vq.errors import UsageError

RX, TX, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
SIZE, MULTIPORT, EMERG_WRITE = (1 << bit for bit in ConsoleFeature)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_end, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(host_end, "RETRY_SECONDS", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "port.sock")


def unix_world(path: str, features: int = -1, backlog: int = 1 << 16) -> DeviceWorld:
    return DeviceWorld(ConsoleDevice([Port(UnixEnd(path), backlog=backlog)]), features)


def client_of(world: DeviceWorld, path: str, port: int = 0) -> socket.socket:
    """A connected client that the device knows."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.setblocking(False)
    device = world.device
    assert isinstance(device, ConsoleDevice)
    end = device._ports[port].end
    world.until(lambda: end.is_connected, "the connection")
    return client


def read_from(client: socket.socket | int, world: DeviceWorld, length: int) -> bytes:
    """Reads `length` bytes at the host's end while the device works."""
    data = b""

    def step() -> bool:
        nonlocal data
        with contextlib.suppress(BlockingIOError):
            data += os.read(client, 1 << 16) if isinstance(client, int) else client.recv(1 << 16)
        world.received(TX)
        return len(data) >= length

    world.until(step, f"{length} bytes")
    return data


def control(id: int, event: ConsoleEvent, value: int) -> bytes:
    return bytes(ConsoleControl(id=id, event=event, value=value))


def told(world: DeviceWorld) -> list[tuple[int, ConsoleEvent, int, bytes]]:
    """The control messages that have come."""
    found = []
    for message in world.received(CONTROL_RX):
        head = ConsoleControl.from_buffer_copy(message)
        found.append((head.id, ConsoleEvent(head.event), head.value, message[8:]))
    return found


# --- port 0 alone --------------------------------------------------------------------------------


def test_layouts_have_the_documented_bytes() -> None:
    config = ConsoleConfig(cols=0x0102, rows=0x0304, max_nr_ports=0x05060708, emerg_wr=0x090A0B0C)
    assert bytes(config).hex() == "02010403080706050c0b0a09"
    assert control(0x01020304, ConsoleEvent.PORT_NAME, 0x0506).hex() == "0403020107000605"


def test_what_the_guest_writes_comes_out_at_the_host_in_order(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.send(TX, b"hello ", b"from ", b"the guest", cut=2)
        assert world.sent(TX) == 3
        assert client.recv(100) == b"hello from the guest"
        assert world.device.stats["to_host_bytes"] == 20


def test_what_the_host_writes_fills_the_guests_buffers(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.give(RX, 4, 64)
        client.send(b"typed here")
        world.turn()
        assert world.received(RX) == [b"type", b"d here"]


def test_input_waits_for_the_guests_buffers(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        client.send(b"early")
        world.turn()
        world.give(RX, 64)
        world.until(lambda: world.driver.calls)
        assert world.received(RX) == [b"early"]


def test_output_waits_while_the_host_is_full_and_none_of_it_is_lost(path: str) -> None:
    data = random.Random(1).randbytes(4 << 20)
    with unix_world(path) as world, client_of(world, path) as client:
        world.send(TX, *(data[at : at + 32768] for at in range(0, len(data), 32768)))
        world.turn()
        waiting = world.in_flight(TX)
        assert 100 < waiting <= 128  # the socket took some, the rest is in the guest's buffers
        assert read_from(client, world, len(data)) == data
        world.until(lambda: world.in_flight(TX) == 0)
        assert world.device.stats["unheard_bytes"] == 0


def test_a_full_port_does_not_hold_up_another(tmp_path: Path) -> None:
    ports = [Port(UnixEnd(str(tmp_path / "a"))), Port(UnixEnd(str(tmp_path / "b")), "b")]
    with (
        DeviceWorld(ConsoleDevice(ports)) as world,
        client_of(world, str(tmp_path / "a")),
        client_of(world, str(tmp_path / "b"), 1) as client,
    ):
        world.send(TX, *[bytes(32768)] * 64)
        world.send(TX1, b"still here")
        assert client.recv(100) == b"still here"
        assert world.in_flight(TX) > 0


def test_one_turn_moves_a_bounded_number_of_bytes(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "TURN_BYTES", 1000)
    with unix_world(path) as world, client_of(world, path) as client:
        world.send(TX, *[b"x" * 700] * 4)
        assert world.sent(TX) == 2
        world.until(lambda: world.in_flight(TX) == 0)
        assert client.recv(4000) == b"x" * 2800
        client.send(b"y" * 4000)
        world.give(RX, *[700] * 6)
        world.loop.run_once(0.1)
        assert joined_length(world) <= 1400
        world.until(lambda: world.device.stats["to_guest_bytes"] == 4000)


def joined_length(world: DeviceWorld) -> int:
    return sum(map(len, world.received(RX)))


# --- who is there --------------------------------------------------------------------------------


def test_the_last_part_of_what_nobody_heard_comes_first_for_the_next_peer(path: str) -> None:
    with unix_world(path, backlog=8) as world:
        world.send(TX, b"0123456789", b"abc")
        assert world.sent(TX) == 2  # the guest does not wait for nobody
        assert world.device.stats["unheard_bytes"] == 5
        with client_of(world, path) as client:
            world.send(TX, b"!")
            assert read_from(client, world, 9) == b"56789abc!"


def test_a_port_that_is_no_console_keeps_nothing_for_the_next_peer(tmp_path: Path) -> None:
    ports = [Port(UnixEnd(str(tmp_path / "a"))), Port(UnixEnd(str(tmp_path / "b")), "b")]
    with DeviceWorld(ConsoleDevice(ports)) as world:
        world.send(TX1, b"to nobody")
        assert world.sent(TX1) == 1 and world.device.stats["unheard_bytes"] == 9
        with client_of(world, str(tmp_path / "b"), 1) as client:
            world.send(TX1, b"to somebody")
            assert client.recv(100) == b"to somebody"


def test_clients_come_one_after_the_other(path: str) -> None:
    with (
        unix_world(path) as world,
        client_of(world, path) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        second.connect(path)
        second.setblocking(False)
        second.send(b"second")
        first.send(b"first")
        world.give(RX, 64, 64)
        world.turn()
        assert world.received(RX) == [b"first"]
        first.close()
        world.until(lambda: world.device.stats["to_guest_bytes"] == 11)
        assert world.received(RX) == [b"second"]
        world.send(TX, b"answer")
        assert read_from(second, world, 6) == b"answer"


def test_a_client_that_has_finished_writing_still_reads(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.give(RX, 64, 64)
        client.send(b"question")
        client.shutdown(socket.SHUT_WR)
        world.until(lambda: world.received(RX) == [b"question"])
        world.turn(20)
        world.send(TX, b"answer")
        assert read_from(client, world, 6) == b"answer"
        client.close()
        device = world.device
        assert isinstance(device, ConsoleDevice)
        world.until(lambda: not device._ports[0].end.is_connected, "the end of the connection")


def test_a_client_that_has_finished_writing_costs_no_processor_time(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.give(RX, 64)
        client.shutdown(socket.SHUT_WR)
        device = world.device
        assert isinstance(device, ConsoleDevice)
        end = device._ports[0].end
        assert isinstance(end, UnixEnd) and end._watch is not None
        world.turn()
        for _ in range(3):
            world.give(RX, 64)
            assert not end._watch.reading


def test_the_next_client_of_a_port_gets_nothing_that_was_meant_for_the_last(
    tmp_path: Path,
) -> None:
    ports = [Port(UnixEnd(str(tmp_path / "a"))), Port(UnixEnd(str(tmp_path / "b")), "b")]
    with DeviceWorld(ConsoleDevice(ports)) as world:
        device = world.device
        assert isinstance(device, ConsoleDevice)
        with client_of(world, str(tmp_path / "b"), 1):
            while not (device._ports[1].unsent and device._ports[1].unsent[0].reader.position):
                world.send(TX1, bytes(60_000))
                world.received(TX1)
            world.device.stop_queue(TX1)  # the rest of what went in part is kept
            assert device._ports[1].kept
        world.until(lambda: not device._ports[1].end.is_connected)
        assert not device._ports[1].kept


def test_a_client_that_goes_while_the_guest_does_not_listen_makes_way(path: str) -> None:
    with unix_world(path) as world:
        client_of(world, path).close()  # without buffers nothing is read
        with client_of(world, path) as client:
            world.send(TX, b"for the second")
            assert read_from(client, world, 14)


def test_a_client_that_goes_in_the_middle_of_output_leaves_a_working_device(path: str) -> None:
    with unix_world(path) as world:
        with client_of(world, path):
            world.send(TX, *[bytes(32768)] * 32)
            assert world.in_flight(TX) > 0
        world.until(lambda: world.in_flight(TX) == 0)
        assert world.device.fault is None
        assert world.device.stats["unheard_bytes"] >= 1 << 16


def test_a_socket_that_somebody_serves_cannot_be_taken(path: str) -> None:
    with unix_world(path), pytest.raises(UsageError, match="is served already"):
        UnixEnd(path)


# --- terminals -----------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield terminal
    finally:
        os.close(terminal)


def test_a_terminal_carries_every_byte_unchanged(tmp_path: Path) -> None:
    end = PtyEnd()
    data = bytes(range(256)) * 20
    with DeviceWorld(ConsoleDevice([Port(end)])) as world:
        world.give(RX, *[512] * 20)
        with opened(end.path) as terminal:
            world.until(lambda: end.is_connected)
            world.send(TX, data)
            assert read_from(terminal, world, len(data)) == data
            got = b""
            left = data
            while len(got) < len(data):
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(terminal, left) :] if left else left
                world.loop.run_once(0.01)
                got += b"".join(world.received(RX))
            assert got == data


def test_a_terminal_can_be_closed_and_opened_again(tmp_path: Path) -> None:
    link = tmp_path / "console"
    end = PtyEnd(str(link))
    with DeviceWorld(ConsoleDevice([Port(end)])) as world:
        for round_ in range(3):
            world.send(TX, b"before %d" % round_)
            world.until(lambda: not end.is_connected)
            with opened(str(link)) as terminal:
                world.until(lambda: end.is_connected)
                world.send(TX, b" after")
                assert read_from(terminal, world, 14) == b"before %d after" % round_
                assert not termios.tcgetattr(terminal)[tty.LFLAG] & termios.ECHO
    assert not link.is_symlink()


def test_a_closed_terminal_costs_no_processor_time(tmp_path: Path) -> None:
    end = PtyEnd()
    with DeviceWorld(ConsoleDevice([Port(end)])) as world:
        world.give(RX, 64)
        with opened(end.path):
            world.until(lambda: end.is_connected)
        world.until(lambda: not end.is_connected)
        assert not any(watch.reading or watch.writing for watch in world.device.watches)


def test_output_that_waits_for_a_terminal_that_is_closed_costs_no_processor_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fuzzing `console`: it let the output go, but waited on for the terminal to take more, which
    one that is closed always does: a busy loop until somebody looked, a few times a second."""
    with DeviceWorld(ConsoleDevice([Port(end := PtyEnd())])) as world:
        terminal = os.open(end.path, os.O_RDWR | os.O_NOCTTY)
        world.until(lambda: end.is_connected)
        monkeypatch.setattr(host_end, "LOOK_SECONDS", 60)
        world.ring_alarms()
        world.send(TX, bytes(1 << 20))
        world.turn()
        (watch,) = world.device.watches
        assert watch.writing, "it is full"
        os.close(terminal)
        world.turn()
        assert not watch.writing, "and nobody is there"
        assert world.sent(TX) == 1


def test_what_was_typed_before_a_terminal_was_closed_arrives(tmp_path: Path) -> None:
    end = PtyEnd()
    with DeviceWorld(ConsoleDevice([Port(end)])) as world:
        with opened(end.path) as terminal:
            world.until(lambda: end.is_connected)
            os.write(terminal, b"last words")
        world.turn(20)
        world.give(RX, 64)
        world.until(lambda: world.received(RX) == [b"last words"])


def test_a_link_takes_no_other_files_place(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    gc.collect()  # what earlier tests left to it is not counted
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(UsageError, match="not a symbolic link"):
        PtyEnd(str(file))
    assert file.read_text() == "data"
    assert len(os.listdir("/dev/fd")) == before


def test_a_link_takes_no_links_place_that_leads_elsewhere(tmp_path: Path) -> None:
    """Any symbolic link was replaced, with whatever it had been for."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="link is there already, and does not lead to a terminal"):
        PtyEnd(str(link))
    assert link.readlink() == tmp_path
    link.unlink()
    other = PtyEnd(str(link))
    end = PtyEnd(str(link))  # as if the other one had been killed
    assert str(link.readlink()) == end.path
    other.close()
    assert str(link.readlink()) == end.path
    end.close()
    assert not link.is_symlink()


def test_a_link_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The terminal was named, which has nothing to do with it."""
    with pytest.raises(FileNotFoundError) as raised:
        PtyEnd(f"{tmp_path}/nowhere/link")
    assert raised.value.filename == f"{tmp_path}/nowhere/link"


def test_the_windows_size_follows_in_the_configuration_space() -> None:
    end = PtyEnd()
    with DeviceWorld(ConsoleDevice([Port(end)])) as world, opened(end.path) as terminal:
        assert world.driver.has_feature(ConsoleFeature.SIZE)
        for changes, (rows, columns) in enumerate(((24, 80), (50, 132)), start=1):
            termios.tcsetwinsize(terminal, (rows, columns))
            world.until(functools.partial(changed, world, changes), "word of the size")
            assert world.device.read_config(0, 4) == bytes((columns, 0, rows, 0))
        world.driver.probe()
        assert world.device.read_config(0, 4) == bytes((132, 0, 50, 0))  # a reset changes nothing


def changed(world: DeviceWorld, times: int) -> bool:
    return world.driver.config_changes == times


def test_the_size_is_told_again_with_the_first_output() -> None:
    """Linux looks at the size only when told of a change, and has no console before its probe has
    ended: without this a guest that is booted in front of an open terminal never knew its size."""
    end = PtyEnd()
    with opened(end.path) as terminal:
        termios.tcsetwinsize(terminal, (24, 80))
        with DeviceWorld(ConsoleDevice([Port(end)])) as world:
            before = world.driver.config_changes
            world.send(TX, b"login: ")
            assert world.driver.config_changes == before + 1
            world.send(TX, b"again")
            assert world.driver.config_changes == before + 1


def test_a_size_is_offered_where_a_console_has_one(path: str) -> None:
    with unix_world(path) as world:
        assert not world.driver.has_feature(ConsoleFeature.SIZE)
    for is_console, offered in ((True, 1), (False, 0)):
        device = ConsoleDevice([Port(UnixEnd(path)), Port(PtyEnd(), "b", is_console)])
        assert device.device_features & SIZE == offered
        device.close()


# --- files ---------------------------------------------------------------------------------------


def test_a_file_gets_all_output(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    data = random.Random(2).randbytes(3 << 20)
    with DeviceWorld(ConsoleDevice([Port(FileEnd(str(file)))])) as world:
        world.send(TX, *(data[at : at + 65536] for at in range(0, len(data), 65536)))
        world.until(lambda: world.in_flight(TX) == 0)
    assert file.read_bytes() == b"before\n" + data


def test_a_file_that_cannot_be_written_to_stops_nobody() -> None:
    end = FileEnd(os.devnull)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, end._fd)
    os.close(full)
    with DeviceWorld(ConsoleDevice([Port(end, backlog=0)])) as world:
        world.send(TX, b"lost")
        assert world.sent(TX) == 1
        assert world.device.stats["unheard_bytes"] == 4


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises((UsageError, OSError)):
        FileEnd("/dev/ptmx")
    with pytest.raises(IsADirectoryError):
        FileEnd(str(tmp_path))


@pytest.mark.parametrize("text", ["", "pty:", "unix:", "file", "unix", "tcp:5", "ptyx"])
def test_a_text_that_names_no_end_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="an end is pty"):
        host_end.host_end(text)


# --- emergency writes ----------------------------------------------------------------------------


def test_an_emergency_write_works_on_an_unconfigured_device(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.driver.reset()
        assert world.device.device_features & EMERG_WRITE
        for character in b"Oops":
            world.device.write_config(8, bytes((character, 0xAA, 0xBB, 0xCC)))
        assert client.recv(10) == b"Oops"
        world.device.write_config(8, b"!")
        assert client.recv(10) == b"!"


def test_emergency_writes_that_nobody_reads_are_bounded(path: str) -> None:
    with unix_world(path, backlog=16) as world:
        for number in range(100):
            world.device.write_config(8, bytes((number, 0, 0, 0)))
        with client_of(world, path) as client:
            assert client.recv(100) == bytes(range(84, 100))


def test_only_the_emergency_field_can_be_written(path: str) -> None:
    with unix_world(path) as world:
        world.device.write_config(0, b"\xff" * 8)
        assert world.device.read_config(0, 8) == bytes((0, 0, 0, 0, 1, 0, 0, 0))


# --- several ports -------------------------------------------------------------------------------


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[DeviceWorld]:
    """Port 0 and port 2 (consoles on terminals) and port 1 (a socket), with control buffers."""
    made = [
        Port(PtyEnd(str(tmp_path / "a"))),
        Port(UnixEnd(str(tmp_path / "b")), "org.vq.data"),
        Port(PtyEnd(str(tmp_path / "c")), console=True),
    ]
    with DeviceWorld(ConsoleDevice(made), size=16 << 20) as world:
        world.give(CONTROL_RX, *[256] * 32)
        yield world


def test_one_port_needs_no_multiport(path: str) -> None:
    with unix_world(path) as world:
        assert not world.driver.has_feature(ConsoleFeature.MULTIPORT)
        assert world.device.queue_count == 2


def test_queues_stand_in_the_order_of_the_specification(ports: DeviceWorld) -> None:
    assert [queue.name for queue in ports.device.queues] == [
        "receiveq(0)",
        "transmitq(0)",
        "control receiveq",
        "control transmitq",
        "receiveq(1)",
        "transmitq(1)",
        "receiveq(2)",
        "transmitq(2)",
    ]
    assert ports.device.read_config(4, 4) == bytes((3, 0, 0, 0))


def test_ports_are_added_once_when_the_driver_is_ready(ports: DeviceWorld) -> None:
    ports.send(CONTROL_TX, control(0xFFFFFFFF, ConsoleEvent.DEVICE_READY, 1))
    added = [(number, ConsoleEvent.PORT_ADD, 0, b"") for number in range(3)]
    assert told(ports) == added
    ports.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
    assert told(ports) == []
    ports.driver.probe()
    ports.give(CONTROL_RX, *[256] * 8)
    ports.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
    assert told(ports) == added  # a new driver knows no port


def test_a_driver_that_failed_gets_no_ports(ports: DeviceWorld) -> None:
    ports.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 0))
    assert told(ports) == []


def test_a_ready_port_is_introduced(ports: DeviceWorld, tmp_path: Path) -> None:
    with client_of(ports, str(tmp_path / "b"), 1), opened(str(tmp_path / "c")) as terminal:
        termios.tcsetwinsize(terminal, (24, 80))
        device = ports.device
        assert isinstance(device, ConsoleDevice)
        ports.until(lambda: device._ports[2].size == (80, 24))
        ports.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
        told(ports)
        ports.send(CONTROL_TX, *(control(n, ConsoleEvent.PORT_READY, 1) for n in range(3)))
        assert told(ports) == [
            (0, ConsoleEvent.CONSOLE_PORT, 1, b""),
            (1, ConsoleEvent.PORT_NAME, 1, b"org.vq.data"),
            (1, ConsoleEvent.PORT_OPEN, 1, b""),
            (2, ConsoleEvent.CONSOLE_PORT, 1, b""),
            (2, ConsoleEvent.RESIZE, 0, bytes((80, 0, 24, 0))),
            (2, ConsoleEvent.PORT_OPEN, 1, b""),
        ]


def up(world: DeviceWorld, *open_ports: int) -> None:
    """The driver knows all ports, and has some of them open."""
    world.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
    world.send(CONTROL_TX, *(control(n, ConsoleEvent.PORT_READY, 1) for n in range(3)))
    world.send(CONTROL_TX, *(control(n, ConsoleEvent.PORT_OPEN, 1) for n in open_ports))
    told(world)


def test_the_guest_hears_who_comes_and_goes(ports: DeviceWorld, tmp_path: Path) -> None:
    up(ports)
    client = client_of(ports, str(tmp_path / "b"), 1)
    assert told(ports) == [(1, ConsoleEvent.PORT_OPEN, 1, b"")]
    client.close()
    found: list[tuple[int, ConsoleEvent, int, bytes]] = []
    ports.until(lambda: found.extend(told(ports)) or found)
    assert found == [(1, ConsoleEvent.PORT_OPEN, 0, b"")]


def test_input_waits_until_the_guest_has_opened_the_port(
    ports: DeviceWorld, tmp_path: Path
) -> None:
    up(ports)
    ports.give(RX1, 64, 64)
    with client_of(ports, str(tmp_path / "b"), 1) as client:
        client.send(b"data")
        ports.turn()
        assert ports.received(RX1) == []
        ports.send(CONTROL_TX, control(1, ConsoleEvent.PORT_OPEN, 1))
        ports.until(lambda: ports.received(RX1) == [b"data"])
        ports.send(CONTROL_TX, control(1, ConsoleEvent.PORT_OPEN, 0))
        client.send(b"more")
        ports.turn()
        assert ports.received(RX1) == []


@pytest.mark.parametrize(("swap", "expected"), [(False, (132, 0, 50, 0)), (True, (50, 0, 132, 0))])
def test_a_resize_names_columns_and_rows_or_the_other_way_round(
    tmp_path: Path, swap: bool, expected: tuple[int, ...]
) -> None:
    end = PtyEnd(str(tmp_path / "pty"))
    made = [Port(end), Port(UnixEnd(str(tmp_path / "s")), "s"), Port(PtyEnd())]
    device = ConsoleDevice(made, swap_resize=swap)
    with DeviceWorld(device) as world, opened(end.path) as terminal:
        world.until(lambda: end.is_connected)
        world.give(CONTROL_RX, *[64] * 32)
        up(world)
        termios.tcsetwinsize(terminal, (50, 132))
        found: list[tuple[int, ConsoleEvent, int, bytes]] = []
        world.until(lambda: found.extend(told(world)) or found)
        assert found == [(0, ConsoleEvent.RESIZE, 0, bytes(expected))]


def test_messages_wait_for_buffers_and_do_not_pile_up(tmp_path: Path) -> None:
    made = [Port(UnixEnd(str(tmp_path / str(n))), f"p{n}") for n in range(2)]
    with DeviceWorld(ConsoleDevice(made)) as world:
        device = world.device
        assert isinstance(device, ConsoleDevice)
        world.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
        for _ in range(200):
            world.send(CONTROL_TX, control(1, ConsoleEvent.PORT_READY, 1))
            world.received(CONTROL_TX)
        assert len(device._control) == 3
        world.give(CONTROL_RX, *[64] * 8)
        assert [(number, event) for number, event, *_ in told(world)] == [
            (0, ConsoleEvent.PORT_ADD),
            (1, ConsoleEvent.PORT_ADD),
            (1, ConsoleEvent.PORT_NAME),
        ]


@pytest.mark.parametrize(
    "message",
    [
        control(3, ConsoleEvent.PORT_READY, 1),
        control(0xFFFFFFFF, ConsoleEvent.PORT_OPEN, 1),
        control(1, ConsoleEvent.PORT_ADD, 1),
        control(1, ConsoleEvent.RESIZE, 1),
        bytes(ConsoleControl(id=1, event=0xFFFF, value=0xFFFF)),
    ],
)
def test_a_message_of_no_meaning_is_ignored(ports: DeviceWorld, message: bytes) -> None:
    up(ports)
    ports.send(CONTROL_TX, message)
    assert ports.device.stats["control_ignored"] == 1
    assert ports.device.fault is None and told(ports) == []


def test_without_multiport_only_port_0_works(tmp_path: Path) -> None:
    made = [Port(UnixEnd(str(tmp_path / str(n))), f"p{n}") for n in range(2)]
    with (
        DeviceWorld(ConsoleDevice(made), RING_FEATURES) as world,
        client_of(world, str(tmp_path / "0")) as client,
    ):
        world.give(RX, 64)
        client.send(b"in")
        world.until(lambda: world.received(RX) == [b"in"])
        world.send(TX, b"out")
        assert client.recv(10) == b"out"


# --- drivers that break rules --------------------------------------------------------------------


def broken(world: DeviceWorld, pattern: str) -> None:
    assert world.device.status & Status.NEEDS_RESET
    assert re.search(pattern, str(world.device.fault))
    world.driver.probe()
    assert world.device.fault is None


def test_control_messages_mean_nothing_without_multiport(tmp_path: Path) -> None:
    """Fuzzing `console`: a driver that had not accepted MULTIPORT was answered all the same."""
    ends = [Port(UnixEnd(str(tmp_path / str(number)))) for number in range(2)]
    with DeviceWorld(ConsoleDevice(ends), ~MULTIPORT) as world:
        world.give(CONTROL_RX, 64, 64)
        world.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1), b"short")
        assert world.sent(CONTROL_TX) == 2 and told(world) == []
        assert world.device.stats["control_ignored"] == 2 and world.device.fault is None


def test_a_control_message_that_is_too_short_breaks_the_device(ports: DeviceWorld) -> None:
    ports.send(CONTROL_TX, b"1234567")
    broken(ports, "7 readable bytes where 8 are needed")


def test_a_control_buffer_that_is_too_short_breaks_the_device(tmp_path: Path) -> None:
    made = [Port(UnixEnd(str(tmp_path / str(n))), f"p{n}") for n in range(2)]
    with DeviceWorld(ConsoleDevice(made)) as world:
        world.give(CONTROL_RX, 7)
        world.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY, 1))
        broken(world, "7 writable bytes where 8 are needed")


@pytest.mark.parametrize(
    ("queue", "pattern"), [(TX, "device-writable buffer in a transmitq"), (RX, "receiveq")]
)
def test_a_buffer_of_the_wrong_direction_breaks_the_device(
    path: str, queue: int, pattern: str
) -> None:
    with unix_world(path) as world, client_of(world, path):
        gpa = world.driver.allocator.allocate(16)
        world.driver.queues[queue].add([(gpa, 8)], [(gpa + 8, 8)])
        world.driver.kick(queue)
        broken(world, pattern)


def test_a_receive_buffer_without_room_breaks_the_device(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        gpa = world.driver.allocator.allocate(16)
        world.driver.queues[RX].add((), [(gpa, 0)])
        world.driver.kick(RX)
        world.turn()
        broken(world, "without room")
        world.give(RX, 16)
        client.send(b"x")  # the client is still there, and its bytes arrive
        world.until(lambda: world.received(RX) == [b"x"])


# --- rings that stop and go on -------------------------------------------------------------------


def test_output_goes_out_once_when_the_ring_stops_in_the_middle_of_it(path: str) -> None:
    data = random.Random(3).randbytes(1 << 20)
    features = 1 << Feature.VERSION_1
    with unix_world(path, features) as world, client_of(world, path) as client:
        ring = world.driver.queues[TX]
        world.send(TX, *(data[at : at + 65536] for at in range(0, len(data), 65536)))
        assert world.in_flight(TX) > 0
        got = b""
        while len(got) < len(data):
            base = world.device.stop_queue(TX)
            used = world.memory.load16(ring.used + 2)
            with contextlib.suppress(BlockingIOError):
                got += client.recv(10000)
            world.device.setup_queue(
                TX,
                size=ring.size,
                desc=ring.desc,
                avail=ring.avail,
                used=ring.used,
                next_avail=base,
                next_used=used,
            )
            world.device.notify(TX)
            world.turn()
            world.received(TX)
        assert got == data


def test_a_buffer_that_waits_for_input_goes_back_when_the_ring_stops(path: str) -> None:
    with unix_world(path, 1 << Feature.VERSION_1) as world, client_of(world, path) as client:
        ring = world.driver.queues[RX]
        world.give(RX, 64)
        world.turn()
        base = world.device.stop_queue(RX)
        assert base == 0
        client.send(b"later")
        world.turn()
        world.device.setup_queue(
            RX, size=ring.size, desc=ring.desc, avail=ring.avail, used=ring.used, next_avail=base
        )
        world.device.notify(RX)
        world.until(lambda: world.received(RX) == [b"later"])


def test_a_reset_keeps_the_peer_and_forgets_the_buffers(path: str) -> None:
    with unix_world(path) as world, client_of(world, path) as client:
        world.give(RX, 64)
        world.send(TX, *[b"z" * 32768] * 32)
        world.driver.probe()
        client.send(b"for the new driver")
        world.turn()
        world.give(RX, 64)
        world.until(lambda: world.received(RX) == [b"for the new driver"])
        assert world.device.fault is None


@pytest.mark.parametrize(
    "names", [["a", "a"], ["x" * 256], ["a/b"], ["a\0"], [str(n) for n in range(32)], []]
)
def test_ports_that_cannot_be_are_refused(names: list[str]) -> None:
    with pytest.raises(UsageError):
        ConsoleDevice([Port(FileEnd(os.devnull), name) for name in names])
