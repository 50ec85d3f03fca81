"""The scripted driver's accesses to registers: Linux' order and widths, and faulty devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_device import Config
from test_pci import Echo

from vq.abi import Feature
from vq.device import RING_FEATURES
from vq.driver import DeviceError, Driver
from vq.driver_mmio import MmioTransport
from vq.driver_pci import PciTransport
from vq.driver_registers import RegisterDriver, Window, read_field, write_field
from vq.errors import UsageError
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.pci import PciFunction
from vq.testing.transports import TRANSPORTS, connect

LAYOUT = ((0x1000, 0x10000), (0x1_0000_0000, 0x10000))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


class Log:
    """Hands accesses on and writes them down: ``R``, offset, size; ``W``, offset, size, value."""

    def __init__(self, window: Window, log: list[tuple[object, ...]], name: str = "") -> None:
        self.window = window
        self.log = log
        self.name = name

    def read(self, offset: int, size: int, /) -> int:
        self.log.append((self.name + "R", int(offset), size))
        return self.window.read(offset, size)

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.log.append((self.name + "W", int(offset), size, int(value)))
        self.window.write(offset, size, value)


class Scripted:
    """Registers that read as a test says: numbers, or lists of numbers to be read in turn."""

    def __init__(self, values: dict[int, int | list[int]]) -> None:
        self.values = values
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int, /) -> int:
        value = self.values.get(offset, 0)
        return value if isinstance(value, int) else value.pop(0) if len(value) > 1 else value[0]

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.written.append((int(offset), size, value))


# --- the order of accesses -----------------------------------------------------------------------


def test_mmio_is_probed_as_linux_does(memory: GuestMemory) -> None:
    log: list[tuple[object, ...]] = []
    transport = MmioTransport(Log(MmioRegisters(Echo(memory)), log))
    assert log == [("R", 0x000, 4), ("R", 0x004, 4), ("R", 0x008, 4), ("R", 0x00C, 4)]
    log.clear()
    driver = Driver(transport, memory, RING_FEATURES, queue_size=4)
    driver.negotiate()
    low, high = driver.features & 0xFFFF_FFFF, driver.features >> 32
    status = [("R", 0x070, 4), ("W", 0x070, 4)]
    assert log == [
        ("W", 0x070, 4, 0),
        ("R", 0x070, 4),
        status[0],
        ("W", 0x070, 4, 1),
        status[0],
        ("W", 0x070, 4, 3),
        *(("W", 0x014, 4, 1), ("R", 0x010, 4), ("W", 0x014, 4, 0), ("R", 0x010, 4)),
        *(("W", 0x024, 4, 1), ("W", 0x020, 4, high), ("W", 0x024, 4, 0), ("W", 0x020, 4, low)),
        status[0],
        ("W", 0x070, 4, 11),
        ("R", 0x070, 4),
    ]
    log.clear()
    ring = driver.setup_queue(1)
    parts = [
        n for gpa in (ring.desc, ring.avail, ring.used) for n in (gpa & 0xFFFF_FFFF, gpa >> 32)
    ]
    assert log == [
        *(("W", 0x030, 4, 1), ("R", 0x044, 4), ("R", 0x034, 4)),
        *(("W", 0x030, 4, 1), ("W", 0x038, 4, 4)),
        *(
            ("W", at, 4, n)
            for at, n in zip((0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4), parts, strict=True)
        ),
        ("W", 0x044, 4, 1),
    ]
    log.clear()
    transport.notify(1)
    assert log == [("W", 0x050, 4, 1)]
    log.clear()
    assert driver.read_config(0, 2) == b"\7\0"
    assert log == [("R", 0x0FC, 4), ("R", 0x100, 2), ("R", 0x0FC, 4)]


def test_an_mmio_interrupt_is_taken_as_linux_does(memory: GuestMemory) -> None:
    log: list[tuple[object, ...]] = []
    device = Echo(memory)
    registers = MmioRegisters(device)
    transport = MmioTransport(Log(registers, log))
    driver = Driver(transport, memory, RING_FEATURES)
    driver.probe()
    registers.interrupt = transport.interrupt
    log.clear()
    device.update_config(shade=9)
    assert log == [("R", 0x060, 4), ("W", 0x064, 4, 2), ("R", 0x070, 4)]
    assert driver.config_changes == 1


def test_pci_is_probed_as_linux_does(memory: GuestMemory) -> None:
    log: list[tuple[object, ...]] = []
    function = PciFunction(Echo(memory))
    transport = PciTransport(Log(function.config, log, "C"), {0: Log(function.bars[0], log)})
    bars = [entry for entry in log if entry[0] == "CW"]
    assert bars[:2] == [("CW", 0x10, 4, 0xFFFF_FFFF), ("CW", 0x10, 4, 0xE000_0000)]
    assert bars[-1] == ("CW", 0x04, 2, 0x6)
    assert function.config.bar_address(0) == 0xE000_0000
    log.clear()
    driver = Driver(transport, memory, RING_FEATURES, queue_size=4)
    driver.negotiate()
    low, high = driver.features & 0xFFFF_FFFF, driver.features >> 32
    assert log == [
        ("W", 20, 1, 0),
        ("R", 20, 1),
        *(("R", 20, 1), ("W", 20, 1, 1), ("R", 20, 1), ("W", 20, 1, 3)),
        *(("W", 0, 4, 0), ("R", 4, 4), ("W", 0, 4, 1), ("R", 4, 4)),
        *(("W", 8, 4, 0), ("W", 12, 4, low), ("W", 8, 4, 1), ("W", 12, 4, high)),
        *(("R", 20, 1), ("W", 20, 1, 11), ("R", 20, 1)),
    ]
    log.clear()
    ring = driver.setup_queue(1)
    parts = [
        n for gpa in (ring.desc, ring.avail, ring.used) for n in (gpa & 0xFFFF_FFFF, gpa >> 32)
    ]
    assert log == [
        *(("R", 18, 2), ("W", 22, 2, 1), ("R", 24, 2), ("W", 22, 2, 1), ("R", 28, 2)),
        *(("W", 22, 2, 1), ("W", 24, 2, 4), ("W", 22, 2, 1)),
        *(("W", 32 + 4 * at, 4, n) for at, n in enumerate(parts)),
        *(("W", 22, 2, 1), ("R", 30, 2)),
    ]
    log.clear()
    driver.start()
    assert log == [("R", 20, 1), ("W", 22, 2, 1), ("W", 28, 2, 1), ("W", 20, 1, 15)]
    log.clear()
    transport.notify(1)
    assert log == [("W", 0x104, 2, 1)]
    log.clear()
    assert driver.read_config(0, 2) == b"\7\0"
    assert log == [("R", 21, 1), ("R", 0x300, 2), ("R", 21, 1)]
    function.interrupt = transport.interrupt
    log.clear()
    function.device.update_config(shade=9)
    assert log == [("R", 0x200, 1), ("R", 20, 1)] and driver.config_changes == 1


def test_messages_are_set_up_while_masked_and_each_queue_has_its_own(memory: GuestMemory) -> None:
    log: list[tuple[object, ...]] = []
    device = Echo(memory)
    function = PciFunction(device, message=lambda a, d: transport.message(a, d))
    bars = {n: Log(bar, log, str(n)) for n, bar in function.bars.items()}
    transport = PciTransport(Log(function.config, log, "C"), bars, msix=True)
    driver = Driver(transport, memory, RING_FEATURES)
    driver.negotiate()
    log.clear()
    driver.setup_queue(0)
    flags = [entry for entry in log if entry[0] in ("CW", "1W", "0W")][2:]
    assert flags[:2] == [("CW", 0x42, 2, 0xC002), ("CW", 0x04, 2, 0x406)]
    assert flags[2:6] == [
        ("1W", 0, 4, 0xFEE0_0000),
        ("1W", 4, 4, 0),
        ("1W", 8, 4, 0x30),
        ("1W", 12, 4, 0),
    ]
    assert flags[14:16] == [("CW", 0x42, 2, 0x8002), ("0W", 16, 2, 0)]
    driver.setup_queue(1)
    driver.start()
    assert [queue.vector for queue in function.queues] == [1, 2]
    called: list[int] = []
    driver.on_call = called.append
    for index in (1, 0):
        driver.queues[index].add((), [(0x1000, 5)])
        driver.kick(index)
    assert called == [1, 0] and transport.spurious == 0
    transport.message(0xFEE0_0000, 0x99)
    transport.message(0x1234, 0x30)
    assert transport.spurious == 2
    driver.close()
    assert not function.by_message and not function.config.command & 0x400
    transport.message(0xFEE0_0000, 0x30)
    assert transport.spurious == 3


def test_with_few_vectors_queues_share_one(memory: GuestMemory) -> None:
    device = Echo(memory)
    function = PciFunction(device, message=lambda a, d: transport.message(a, d), vectors=2)
    transport = PciTransport(function.config, function.bars, msix=True)
    driver = Driver(transport, memory, RING_FEATURES)
    driver.probe()
    called: list[int] = []
    driver.on_call = called.append
    driver.queues[0].add((), [(0x1000, 5)])
    driver.kick(0)
    assert [queue.vector for queue in function.queues] == [1, 1] and called == [0, 1]


def test_messages_with_one_vector_only_are_refused(memory: GuestMemory) -> None:
    function = PciFunction(Echo(memory), message=lambda a, d: None, vectors=1)
    driver = Driver(PciTransport(function.config, function.bars, msix=True), memory, 0)
    with pytest.raises(DeviceError, match="fewer than two"):
        driver.probe()


# --- over every transport ------------------------------------------------------------------------


@pytest.mark.parametrize("over", TRANSPORTS)
def test_a_device_works_over_every_transport(memory: GuestMemory, over: str) -> None:
    device = Echo(memory)
    driver = Driver(connect(device, over), memory, RING_FEATURES, queue_size=4)
    assert driver.transport.device_id == device.device_id
    called: list[int] = []
    driver.on_call = called.append
    for _ in range(2):
        driver.probe()
        assert driver.features == RING_FEATURES and driver.transport.queue_count == 2
        for index in (0, 1):
            driver.queues[index].add((), [(0x1000, 5), (0x1_0000_0000, 6)], token="t")
            assert driver.kick(index)
            assert [used.written for used in driver.queues[index].collect()] == [11]
        assert set(called) == {0, 1}
        device.hold = True
        driver.queues[1].add((), [(0x1000, 5)], token="lost")
        driver.kick(1)
        assert driver.reset_queue(1) == ["lost"]
        device.hold = False
        assert driver.setup_queue(1, 2).size == 2
        driver.queues[1].add((), [(0x1000, 7)])
        driver.kick(1)
        assert [used.written for used in driver.queues[1].collect()] == [7]
    assert driver.read_config(0, 6) == bytes(Config(shade=7, depth=0x01020304))
    device.update_config(depth=5)
    assert driver.config_changes == 1 and driver.read_config(2, 4) == b"\5\0\0\0"
    driver.transport.write_config(0, b"\1\2")
    assert device.stats["config_writes_ignored"] >= 1
    memory.store16(driver.queues[0].avail + 2, 100)
    driver.transport.notify(0)
    assert driver.needs_reset
    driver.close()
    assert device.status == 0


def test_there_is_no_transport_of_another_name(memory: GuestMemory) -> None:
    with pytest.raises(UsageError, match="carrier pigeon"):
        connect(Echo(memory), "carrier pigeon")


def test_an_mmio_queue_is_stopped(memory: GuestMemory) -> None:
    transport = MmioTransport(MmioRegisters(Echo(memory)))
    driver = Driver(transport, memory, RING_FEATURES)
    driver.negotiate()
    driver.setup_queue(0)
    assert transport.queue_max_size(0) == 0, "it is in use"
    assert transport.queue_count == 2, "whether they are in use or not"
    driver.setup_queue(1)
    transport.stop_queue(0)
    assert transport.active == [1] and transport.queue_max_size(0) == 8


# --- the configuration space's fields ------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "length", "widths"),
    [
        (0, 1, [1]),
        (2, 2, [2]),
        (4, 4, [4]),
        (8, 8, [4, 4]),
        (0, 6, [1] * 6),
        (1, 2, [1, 1]),
        (2, 4, [1] * 4),
        (0, 0, []),
    ],
)
def test_a_field_is_accessed_in_its_width(start: int, length: int, widths: list[int]) -> None:
    window = Scripted({})
    log: list[tuple[object, ...]] = []
    assert read_field(Log(window, log), start, length) == bytes(length)
    assert [size for _, _, size in log] == widths
    write_field(window, start, bytes(range(1, length + 1)))
    assert [size for _, size, _ in window.written] == widths
    assert b"".join(v.to_bytes(s, "little") for _, s, v in window.written) == bytes(
        range(1, length + 1)
    )


# --- devices that misbehave ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "reason"),
    [
        ({}, "magic 0x0"),
        ({0: 0x74726976, 4: 1, 8: 1}, "version 1"),
        ({0: 0x74726976, 4: 2, 8: 0}, "no device behind"),
    ],
)
def test_what_is_no_mmio_device_is_refused(registers: dict[int, int], reason: str) -> None:
    log: list[tuple[object, ...]] = []
    with pytest.raises(DeviceError, match=reason):
        MmioTransport(Log(Scripted(dict(registers)), log))
    assert ("R", 0x00C, 4) not in log, "nothing else is accessed (4.2.3.1.1)"


def test_registers_that_never_become_0_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegisterDriver, "RESET_SECONDS", 0.01)
    stuck = Scripted({0: 0x74726976, 4: 2, 8: 1, 0xC0: 1, 0x44: 1})
    with pytest.raises(DeviceError, match="QueueReset"):
        MmioTransport(stuck).reset_queue(0)
    with pytest.raises(DeviceError, match="QueueReady"):
        MmioTransport(stuck).stop_queue(0)
    slow = Scripted({0: 0x74726976, 4: 2, 8: 1, 0xC0: [1, 1, 1, 0]})
    MmioTransport(slow).reset_queue(0)
    assert slow.values[0xC0] == [0]


def test_a_line_that_is_stuck_is_looked_at_once() -> None:
    transport = MmioTransport(Scripted({0: 0x74726976, 4: 2, 8: 1}))
    transport.interrupt(True)
    assert transport.spurious == 1
    transport.interrupt(False)
    assert transport.spurious == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({0x00: 0x1AF5}, "no modern virtio device: 1af5"),
        ({0x02: 0x1000}, "no modern virtio device: 1af4:1000"),
        ({0x02: 0x1040}, "no modern virtio device"),
        ({0x06: 0}, "not there"),
        ({0x34: 0}, "not there"),
        ({0x43: 3}, "not there"),
        ({0x44: 6}, "not there"),
        ({0x48: 0x1000}, "does not fit"),
        ({0x4C: 8}, "too short"),
        ({0x41: 0x40}, "not there|no end"),
    ],
)
def test_what_is_no_modern_pci_device_is_refused(
    memory: GuestMemory, changes: dict[int, int], reason: str
) -> None:
    function = PciFunction(Echo(memory))
    for offset, value in changes.items():
        size = 2 if offset in (0, 2, 6) else 4 if offset in (0x48, 0x4C) else 1
        function.config.set(offset, size, value)
    with pytest.raises(DeviceError, match=reason):
        PciTransport(function.config, function.bars)


def test_messages_need_a_device_that_sends_them(memory: GuestMemory) -> None:
    function = PciFunction(Echo(memory))
    with pytest.raises(DeviceError, match="no MSI-X"):
        PciTransport(function.config, function.bars, msix=True)


def test_a_pci_device_without_configuration_has_none(memory: GuestMemory) -> None:
    function = PciFunction(Echo(memory, config=None))
    transport = PciTransport(function.config, function.bars)
    with pytest.raises(DeviceError, match="no configuration space"):
        transport.read_config(0, 1)
    with pytest.raises(DeviceError, match="no configuration space"):
        transport.write_config(0, b"\0")
    with pytest.raises(UsageError, match="not set up"):
        transport.notify(0)
    driver = Driver(transport, memory, 1 << Feature.VERSION_1)
    driver.probe()
    assert transport.queue_max_size(0) == 0 and transport.queue_max_size(2) == 0
