"""QEMU's register transports as judges: of vq's scripted driver, and of vq's own registers."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import driver_pci
from vq.abi import DeviceId, Feature, Status
from vq.devices.entropy import EntropyDevice
from vq.driver import Driver, GuestAllocator
from vq.driver_mmio import MmioTransport
from vq.driver_pci import PciTransport
from vq.driver_registers import Window
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.pci import PciFunction
from vq.testing.requirements import or_skip

from .qtest import Machine, MemoryWindow, PciConfigWindow

RING_RESET = 1 << Feature.RING_RESET
WANTED = 1 << Feature.VERSION_1 | 1 << Feature.EVENT_IDX | 1 << Feature.INDIRECT_DESC
MMIO_BASE = 0xFEB0_0E00  # the last of eight places, which is filled first
SLOT = 3
MICROVM = "microvm,ioapic2=off,pic=off,pit=off,rtc=off"  # no other interrupts


@pytest.fixture(scope="module")
def microvm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with or_skip():
        machine = Machine(
            tmp_path_factory.mktemp("microvm"), MICROVM, "-device", "virtio-rng-device"
        )
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def pc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    device = f"virtio-rng-pci,disable-legacy=on,addr={SLOT},vectors=2"
    with or_skip():
        machine = Machine(tmp_path_factory.mktemp("pc"), "q35", "-device", device)
    yield machine
    machine.close()


def mmio_window(machine: Machine) -> Window:
    return MemoryWindow(machine, lambda: MMIO_BASE)


def pci_transport(machine: Machine, *, msix: bool = False) -> PciTransport:
    config = PciConfigWindow(machine, SLOT)

    def bar(number: int) -> MemoryWindow:
        return MemoryWindow(machine, lambda: config.read(0x10 + 4 * number, 4) & ~0xF)

    return PciTransport(config, {number: bar(number) for number in range(6)}, msix=msix)


def fill(machine: Machine, driver: Driver) -> bytes:
    """Has QEMU's device fill 64 bytes, in two buffers."""
    buffer = driver.allocator.allocate(64)
    machine.memory.write(buffer, bytes(64))
    driver.queues[0].add((), [(buffer, 48), (buffer + 48, 16)])
    assert driver.kick(0)
    deadline = time.monotonic() + 20
    while not (used := driver.queues[0].collect()):
        machine.poll(0.05)
        assert time.monotonic() < deadline, "QEMU's device does nothing"
    assert used[0].written == 64
    return machine.memory.read(buffer, 64)


# --- the scripted driver -------------------------------------------------------------------------


def test_the_driver_drives_qemus_mmio_device(microvm: Machine) -> None:
    transport = MmioTransport(mmio_window(microvm))
    assert transport.device_id == DeviceId.ENTROPY
    microvm.on_interrupt = lambda number, level: transport.interrupt(level)
    driver = Driver(transport, microvm.memory, WANTED, allocator=microvm.allocator())
    for _ in range(2):
        driver.probe()
        assert driver.features == WANTED and transport.queue_count == 1
        calls = driver.calls
        assert any(fill(microvm, driver)[at] for at in range(64))
        assert transport.status & Status.DRIVER_OK  # QEMU answers after it has interrupted
        assert driver.calls > calls and transport.spurious == 0
    driver.close()
    microvm.on_interrupt = lambda number, level: None


def test_the_driver_drives_qemus_pci_device(pc: Machine) -> None:
    PciConfigWindow(pc, SLOT).write(0x24, 4, 5)  # the upper half of where BAR 4 was
    transport = pci_transport(pc)
    assert transport.device_id == DeviceId.ENTROPY
    driver = Driver(transport, pc.memory, WANTED | RING_RESET, allocator=pc.allocator())
    driver.probe()
    assert any(fill(pc, driver))
    assert transport._take_events() == 1 and transport._take_events() == 0
    if driver.has_feature(Feature.RING_RESET):
        driver.reset_queue(0)
        driver.setup_queue(0)
        assert any(fill(pc, driver))
    driver.close()


def test_the_driver_has_qemu_send_messages(pc: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are aimed at a place in RAM, where one can see them."""
    where = 0x30_0000
    monkeypatch.setattr(driver_pci, "_MESSAGE_ADDRESS", where)
    transport = pci_transport(pc, msix=True)
    driver = Driver(transport, pc.memory, WANTED, allocator=pc.allocator())
    called: list[int] = []
    driver.on_call = called.append
    driver.probe()
    pc.memory.write(where, bytes(4))
    assert any(fill(pc, driver))
    deadline = time.monotonic() + 10
    while not (data := struct.unpack("<I", pc.memory.read(where, 4))[0]):
        assert time.monotonic() < deadline, "no message came"
        pc.poll(0.01)
    transport.message(where, data)
    assert called == [0] and transport.spurious == 0
    driver.close()


# --- vq's registers beside QEMU's ----------------------------------------------------------------

MMIO_READS = (0x000, 0x004, 0x008, 0x014, 0x030, 0x044, 0x050, 0x060, 0x064, 0x070, 0x0B0, 0x0B4)
MMIO_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("R"), st.sampled_from(MMIO_READS), st.sampled_from([4, 4, 4, 1, 2])),
        st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 11, 15]), st.just(4)),
        st.tuples(st.just(0x030), st.sampled_from([0, 1, 5, 0x10000]), st.just(4)),
        st.tuples(st.just("queue"), st.sampled_from([0x1000, 0x8000]), st.just(4)),
        st.tuples(st.just(0x064), st.sampled_from([0, 1, 2, 3]), st.just(4)),
        st.tuples(
            st.sampled_from([0x038, 0x044, 0x050, 0x070]), st.just(1), st.sampled_from([1, 2])
        ),
        st.tuples(st.just("features"), st.sampled_from([0, 1]), st.just(4)),
    ),
    max_size=30,
)


class Protocol:
    """Steps of a driver that keeps to the rules, taken with a device's mmio registers."""

    def __init__(self, window: Window, memory: GuestMemory) -> None:
        self.window = window
        self.memory = memory
        self.status = 0
        self.selected = 0
        self.enabled = False
        self.write(0x070, 0)
        self.write(0x030, 0)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.window.write(offset, size, value)

    def take(self, step: tuple[object, int, int]) -> object:
        what, value, size = step
        if what == "R":
            return self.window.read(value, size)
        if what == "status":
            # One step up, or back to 0; the features before FEATURES_OK.
            following = {0: 1, 1: 3, 3: 11, 11: 15, 15: 15}[self.status]
            if value == 0 or following == value:
                if value == 11:
                    for word, features in ((1, 1), (0, 0)):
                        self.write(0x024, word)
                        self.write(0x020, features)
                self.write(0x070, value)
                self.status = value
                if not value:
                    self.enabled = False
                    self.write(0x030, 0)  # QEMU keeps the selector over a reset
                    self.selected = 0
        elif what == "queue":
            if self.status == 11 and self.selected == 0 and not self.enabled:
                self.memory.write(value, bytes(0x3000))
                self.write(0x038, 4)
                for register, at in ((0x080, 0), (0x090, 0x1000), (0x0A0, 0x2000)):
                    self.write(register, value + at)
                    self.write(register + 4, 0)
                self.write(0x044, 1)
                self.enabled = True
        elif what == "features":
            self.write(0x014, value)  # QEMU takes any word but 0 for the second
            return (
                self.window.read(0x010, 4) >> 28 & 3
                if value == 0
                else self.window.read(0x010, 4) & 1
            )
        elif what == 0x030:
            if value < 0x400:  # QEMU takes no others, and keeps the last
                self.write(0x030, value)
                self.selected = value
                return bool(self.window.read(0x034, 4))
        else:
            assert isinstance(what, int)
            self.write(what, value, size)
        return None


@settings(max_examples=60, deadline=None)
@given(steps=MMIO_STEPS)
def test_mmio_registers_read_as_qemus_do(
    microvm: Machine, steps: list[tuple[object, int, int]]
) -> None:
    with GuestMemory.allocate(1 << 20) as memory:
        device = EntropyDevice()
        device.memory = memory
        ours = Protocol(MmioRegisters(device, vendor_id=0x554D4551), memory)
        theirs = Protocol(mmio_window(microvm), microvm.memory)
        for step in steps:
            assert ours.take(step) == theirs.take(step), step


def test_mmio_interrupts_come_and_go_as_qemus_do(microvm: Machine) -> None:
    """Raised by the first used buffer, lowered when all is acknowledged or the device reset."""
    with GuestMemory.allocate(1 << 20) as memory:
        device = EntropyDevice()
        device.memory = memory
        seen: dict[str, list[object]] = {"ours": [], "theirs": []}
        registers = MmioRegisters(device, seen["ours"].append)
        microvm.on_interrupt = lambda number, level: seen["theirs"].append(level)
        pairs: tuple[tuple[str, Window, GuestAllocator], ...] = (
            ("ours", registers, GuestAllocator(memory)),
            ("theirs", mmio_window(microvm), microvm.allocator()),
        )
        for name, window, allocator in pairs:
            driver = Driver(
                MmioTransport(window),
                allocator.memory,
                WANTED & ~(1 << Feature.EVENT_IDX),
                allocator=allocator,
            )
            driver.probe()
            for ack in (1, 2, 1, None):
                buffer = driver.allocator.allocate(16)
                driver.queues[0].add((), [(buffer, 16)])
                driver.kick(0)
                deadline = time.monotonic() + 20
                while not driver.queues[0].collect():
                    microvm.poll(0.01)
                    assert time.monotonic() < deadline
                seen[name].append(("status", window.read(0x060, 4)))
                if ack is not None:
                    window.write(0x064, 4, ack)
                    seen[name].append(("after", ack, window.read(0x060, 4)))
            driver.close()
            seen[name].append(("reset", window.read(0x060, 4), window.read(0x070, 4)))
        assert seen["ours"] == seen["theirs"]
        microvm.on_interrupt = lambda number, level: None


def reset(transport: PciTransport) -> None:
    """With the selectors and features, which QEMU keeps over a reset."""
    transport._write("device_status", 0)
    transport.accept_features(0)
    for field in ("queue_select", "device_feature_select", "driver_feature_select"):
        transport._write(field, 0)


COMMON = {0: 4, 8: 4, 12: 4, 16: 2, 18: 2, 20: 1, 22: 2, 26: 2, 28: 2, 32: 4, 36: 4, 48: 4}
PCI_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("R"), st.sampled_from(sorted(COMMON)), st.just(0)),
        st.tuples(st.just(22), st.sampled_from([0, 1, 7]), st.just(0)),
        st.tuples(st.sampled_from([0, 8]), st.sampled_from([0, 1, 2, 7]), st.just(0)),
        st.tuples(st.sampled_from([16, 26]), st.sampled_from([0, 1, 2, 9, 0xFFFF]), st.just(0)),
        st.tuples(st.sampled_from([32, 36, 48]), st.integers(0, 0xFFFF_FFFF), st.just(0)),
        st.tuples(st.sampled_from([18, 21, 30]), st.just(1), st.just(0)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps=PCI_STEPS)
def test_pci_registers_read_as_qemus_do(pc: Machine, steps: list[tuple[object, int, int]]) -> None:
    with GuestMemory.allocate(1 << 20) as memory:
        device = EntropyDevice()
        device.memory = memory
        function = PciFunction(device, message=lambda address, data: None, vectors=2)
        ours = PciTransport(function.config, function.bars)
        transports = (ours, pci_transport(pc))
        for transport in transports:
            reset(transport)
        selected = 0
        for what, value, _ in steps:
            answers = []
            for transport in transports:
                part = transport._common
                if what == "R":
                    answers.append(part.window.read(part.start + value, COMMON[value]))
                elif what == "reset":
                    reset(transport)
                elif selected == 0 or what not in (26, 32, 36, 48):
                    assert isinstance(what, int)
                    part.window.write(part.start + what, COMMON.get(what, 2), value)
            if what == 22:
                selected = value
            elif what == "reset":
                selected = 0
            if answers and not (selected and value in (26, 32, 36, 48)):
                assert answers[0] == answers[1], (what, value)


def test_the_capabilities_lead_to_the_same_structures(pc: Machine) -> None:
    with GuestMemory.allocate(1 << 20) as memory:
        device = EntropyDevice()
        device.memory = memory
        function = PciFunction(device, message=lambda address, data: None, vectors=2)
        both = (function.config, PciConfigWindow(pc, SLOT))
        for offset, size in ((0x00, 2), (0x02, 2), (0x08, 1), (0x0E, 1), (0x2C, 2), (0x3D, 1)):
            ours, theirs = (config.read(offset, size) for config in both)
            assert ours == theirs, hex(offset)
        kinds = []
        for config in both:
            found, place = set(), config.read(0x34, 1)
            while place:
                number = config.read(place, 1)
                found.add((number, config.read(place + 3, 1) if number == 9 else 0))
                place = config.read(place + 1, 1)
            kinds.append({entry for entry in found if entry[0] in (9, 0x11)})
        theirs = kinds[1] - {(9, 4)}  # QEMU has one for the configuration space, if of no bytes
        assert kinds[0] == theirs
