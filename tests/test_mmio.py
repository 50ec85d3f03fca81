"""The virtio-mmio register block: layout, widths, order, interrupts, and whatever a guest does."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device import COLOUR, FAR, SHADES, Config, Echo

from vq.abi import Feature, Status
from vq.device import RING_FEATURES
from vq.driver import Driver
from vq.driver_mmio import MmioTransport
from vq.errors import UsageError
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters

# By number, as in the specification's table (virtio 1.3, 4.2.2), for tests independent of vq.abi.
MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_SIZE_MAX, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
DESC, DRIVER_AREA, DEVICE_AREA = 0x080, 0x090, 0x0A0
SHM_SEL, SHM_LEN, SHM_BASE, QUEUE_RESET = 0x0AC, 0x0B0, 0x0B8, 0x0C0
GENERATION, CONFIG = 0x0FC, 0x100

WRITABLE = {
    *(DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_SIZE),
    *(QUEUE_READY, QUEUE_NOTIFY, INTERRUPT_ACK, STATUS, DESC, DESC + 4, DRIVER_AREA),
    *(DRIVER_AREA + 4, DEVICE_AREA, DEVICE_AREA + 4, SHM_SEL, QUEUE_RESET),
}
READABLE = {
    *(MAGIC, VERSION, DEVICE_ID, VENDOR_ID, DEVICE_FEATURES, QUEUE_SIZE_MAX, QUEUE_READY),
    *(INTERRUPT_STATUS, STATUS, SHM_LEN, SHM_LEN + 4, SHM_BASE, SHM_BASE + 4, QUEUE_RESET),
    GENERATION,
}

HIGH = 0x1_0000_0000
"""A part of the guest's memory lies beyond 4 GiB, so that both halves of addresses count."""
LAYOUT = ((0x1000, 0x10000), (HIGH, 0x10000))
OFFERED = RING_FEATURES | 1 << COLOUR | 1 << SHADES | 1 << FAR | 1 << Feature.NOTIFICATION_DATA
VERSION_1 = 1 << Feature.VERSION_1
RING_RESET = 1 << Feature.RING_RESET
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
UP = READY | Status.DRIVER_OK


class Machine:
    """The device behind its registers, and what a driver does by hand."""

    def __init__(self, memory: GuestMemory, **more: object) -> None:
        self.memory = memory
        self.device = Echo(memory, **{"features": OFFERED, **more})
        self.levels: list[bool] = []
        self.registers = MmioRegisters(self.device, self.levels.append)

    def read(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.registers.write(offset, size, value)

    def negotiate(self, features: int = VERSION_1) -> None:
        self.write(STATUS, 0)
        self.write(STATUS, Status.ACKNOWLEDGE)
        self.write(STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        for word in range(3):
            self.write(DRIVER_FEATURES_SEL, word)
            self.write(DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)
        self.write(STATUS, READY)

    def place(self, index: int = 0, size: int = 4, base: int = HIGH) -> None:
        base += 0x4000 * index
        self.write(QUEUE_SEL, index)
        self.write(QUEUE_SIZE, size)
        for register, gpa in ((DESC, base), (DRIVER_AREA, base + 0x1000), (0xA0, base + 0x2000)):
            self.write(register, gpa & 0xFFFF_FFFF)
            self.write(register + 4, gpa >> 32)

    def bring_up(self, features: int = VERSION_1) -> None:
        self.negotiate(features)
        for index in range(2):
            self.place(index)
            self.write(QUEUE_READY, 1)
        self.write(STATUS, UP)
        assert self.read(STATUS) == UP
        self.device.take()

    def offer(self, slot: int, index: int = 0) -> None:
        """Makes available descriptor 0, with room for one byte."""
        base = HIGH + 0x4000 * index
        self.memory.write(base, (0x1000).to_bytes(8, "little") + b"\1\0\0\0\2\0\0\0")
        self.memory.write(base + 0x1000 + 4 + 2 * (slot % 4), b"\0\0")
        self.memory.store16(base + 0x1000 + 2, slot + 1)

    def used(self, index: int = 0) -> int:
        return self.memory.load16(HIGH + 0x4000 * index + 0x2000 + 2)

    def ignored(self) -> dict[str, int]:
        stats = self.device.stats
        return {k.removeprefix("register_ignored: "): n for k, n in stats.items() if ": " in k}

    def state(self) -> object:
        """All that a driver can read, and what the device was told."""
        queues = [(q.size, q.vector, list(q.addresses)) for q in self.registers.queues]
        rings = [queue.ring is not None for queue in self.device.queues]
        control = [self.read(offset) for offset in sorted(READABLE)]
        config = [self.read(CONFIG + at, 1) for at in range(8)]
        device = (self.device.status, self.device.driver_features, list(self.device.happened))
        return queues, rings, control, config, device


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


@pytest.fixture
def machine(memory: GuestMemory) -> Machine:
    return Machine(memory)


# --- layout --------------------------------------------------------------------------------------


def test_the_registers_of_a_new_device_by_number(machine: Machine) -> None:
    expected = {
        0x000: int.from_bytes(b"virt", "little"),
        0x004: 2,
        0x008: 0x7E,
        0x00C: int.from_bytes(b"vq\0\0", "little"),
        0x010: OFFERED & 0xFFFF_FFFF,
        0x034: 8,
        0x0B0: 0xFFFF_FFFF,
        0x0B4: 0xFFFF_FFFF,
        0x0B8: 0xFFFF_FFFF,
        0x0BC: 0xFFFF_FFFF,
    }
    for offset in range(0, 0x100, 4):
        assert machine.read(offset) == expected.get(offset, 0), hex(offset)
    assert machine.ignored() == {"not to be read": 64 - len(READABLE)}


def test_the_vendor_is_the_machines_choice(memory: GuestMemory) -> None:
    registers = MmioRegisters(Echo(memory), vendor_id=0x554D4551)
    assert registers.read(VENDOR_ID, 4) == 0x554D4551


@pytest.mark.parametrize(
    ("size", "length"), [(0, 0x200), (6, 0x200), (256, 0x200), (257, 0x400), (0x1000, 0x2000)]
)
def test_the_block_has_room_for_the_configuration(
    memory: GuestMemory, size: int, length: int
) -> None:
    class Large(ctypes.LittleEndianStructure):
        _fields_ = (("bytes", ctypes.c_uint8 * size),)

    config = Large() if size else None
    assert MmioRegisters(Echo(memory, config=config)).length == length


def test_a_device_without_memory_has_no_registers() -> None:
    with pytest.raises(UsageError, match="memory"):
        MmioRegisters(Echo(None))


# --- widths and places that mean nothing ---------------------------------------------------------


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 16, -1])
def test_control_registers_are_accessed_in_four_bytes(
    machine: Machine, size: int, up: bool
) -> None:
    if up:
        machine.bring_up(VERSION_1 | RING_RESET)
    before = machine.state()
    for offset in range(0x100):
        assert machine.read(offset, size) == 0, hex(offset)
        machine.write(offset, 1, size)
    assert machine.state() == before
    assert machine.ignored()["width"] == 0x200


def test_control_registers_are_accessed_at_their_offset(machine: Machine) -> None:
    machine.bring_up(VERSION_1 | RING_RESET)
    before = machine.state()
    for offset in set(range(0x100)) - set(range(0, 0x100, 4)):
        assert machine.read(offset) == 0
        machine.write(offset, 1)
    assert machine.state() == before


def test_what_is_only_read_is_not_written_and_the_other_way_round(machine: Machine) -> None:
    machine.bring_up(VERSION_1 | RING_RESET)
    before = machine.state()
    for offset in range(0, 0x100, 4):
        if offset not in WRITABLE:
            machine.write(offset, 0xFFFF_FFFF)
        if offset not in READABLE:
            assert machine.read(offset) == 0
    assert machine.state() == before


def test_eight_bytes_are_two_registers_the_lower_first(machine: Machine) -> None:
    assert machine.read(MAGIC, 8) == 2 << 32 | 0x74726976
    machine.negotiate()
    machine.write(QUEUE_SEL, 0)
    machine.write(QUEUE_SIZE, 4)
    machine.write(DESC, HIGH + 0x10, 8)
    machine.write(DRIVER_AREA, HIGH + 0x1000, 8)
    machine.write(DEVICE_AREA, HIGH + 0x2000, 8)
    machine.write(QUEUE_READY, 1)
    assert machine.read(QUEUE_READY) == 1 and machine.device.fault is None


@pytest.mark.parametrize("offset", [-4, -1, 0x200, 0x201, 1 << 40])
def test_outside_of_the_block_is_nothing(machine: Machine, offset: int) -> None:
    before = machine.state()
    assert machine.read(offset) == 0
    machine.write(offset, 1)
    assert machine.state() == before
    assert machine.ignored() == {"no such register": 2}


# --- features ------------------------------------------------------------------------------------


def test_features_are_read_and_written_in_words(machine: Machine) -> None:
    words = []
    for word in (2, 0, 1, 3, 0xFFFF_FFFF):
        machine.write(DEVICE_FEATURES_SEL, word)
        words.append(machine.read(DEVICE_FEATURES))
    assert words == [OFFERED >> 64, OFFERED & 0xFFFF_FFFF, OFFERED >> 32 & 0xFFFF_FFFF, 0, 0]
    machine.negotiate(VERSION_1 | 1 << FAR | 1 << COLOUR)
    assert machine.read(STATUS) == READY
    assert machine.device.driver_features == VERSION_1 | 1 << FAR | 1 << COLOUR


def test_a_word_that_is_written_again_replaces_the_first(machine: Machine) -> None:
    machine.write(DRIVER_FEATURES_SEL, 0)
    machine.write(DRIVER_FEATURES, 0xFFFF_FFFF)
    machine.write(DRIVER_FEATURES, 1 << COLOUR)
    machine.write(DRIVER_FEATURES_SEL, 1)
    machine.write(DRIVER_FEATURES, VERSION_1 >> 32)
    assert machine.device.driver_features == VERSION_1 | 1 << COLOUR


@pytest.mark.parametrize("word", [4, 1000, 0xFFFF_FFFF])
def test_words_beyond_the_last_take_no_memory(machine: Machine, word: int) -> None:
    machine.write(DRIVER_FEATURES_SEL, word)
    machine.write(DRIVER_FEATURES, 0xFFFF_FFFF)
    assert machine.device.driver_features == 0
    assert machine.ignored() == {"features beyond the last": 1}


def test_features_that_were_not_offered_are_refused(machine: Machine) -> None:
    machine.negotiate(VERSION_1 | 1 << 5)
    assert machine.read(STATUS) == READY & ~Status.FEATURES_OK


def test_features_after_features_ok_need_a_reset(machine: Machine) -> None:
    machine.negotiate()
    machine.write(DRIVER_FEATURES, 1)
    assert machine.read(STATUS) == READY | Status.NEEDS_RESET
    assert machine.device.driver_features == VERSION_1


# --- status --------------------------------------------------------------------------------------


def test_a_reset_leads_back_to_the_first_state(machine: Machine) -> None:
    first = machine.state()
    machine.bring_up(VERSION_1 | RING_RESET)
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    machine.write(DEVICE_FEATURES_SEL, 1)
    machine.write(QUEUE_SEL, 1)
    assert machine.read(INTERRUPT_STATUS) == 1
    machine.write(STATUS, 0)
    machine.device.take()
    assert machine.read(STATUS) == 0
    assert machine.state() == first
    assert machine.levels == [True, False]
    machine.write(DRIVER_FEATURES, 1 << COLOUR)
    assert machine.device.driver_features == 1 << COLOUR, "the selector is 0 again"


def test_only_the_lowest_byte_of_status_counts(machine: Machine) -> None:
    machine.write(STATUS, 0xABCD_0001)
    assert machine.read(STATUS) == 1
    machine.write(STATUS, 0x100)
    assert machine.read(STATUS) == 0


def test_a_reset_by_the_host_shows_in_the_registers(machine: Machine) -> None:
    machine.bring_up()
    machine.device.reset()
    assert machine.read(STATUS) == 0 and machine.read(QUEUE_READY) == 0


# --- queues --------------------------------------------------------------------------------------


def test_a_queue_lies_where_both_halves_say(machine: Machine) -> None:
    machine.bring_up()
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.used(0) == 1 and machine.used(1) == 0


def test_a_queue_that_is_not_there_has_no_size(machine: Machine) -> None:
    for index, size in ((0, 8), (1, 4), (2, 0), (0xFFFF_FFFF, 0)):
        machine.write(QUEUE_SEL, index)
        assert machine.read(QUEUE_SIZE_MAX) == size
    before = machine.state()
    for register in (QUEUE_SIZE, QUEUE_READY, DESC, DESC + 4, QUEUE_RESET):
        machine.write(register, 1)
    assert machine.state() == before
    assert machine.ignored()["no such queue"] == 5


def test_a_queue_that_the_device_refused_is_not_ready(machine: Machine) -> None:
    for trouble in (
        {"size": 3},
        {"size": 0},
        {"size": 16},
        {"base": HIGH + 1},
        {"base": 0x9_0000_0000},
    ):
        machine.negotiate()
        machine.place(**trouble)
        assert machine.device.fault is None, "judged only when the queue is enabled"
        machine.write(QUEUE_READY, 1)
        assert machine.read(QUEUE_READY) == 0, trouble
        assert machine.read(STATUS) & Status.NEEDS_RESET, trouble


def test_a_queue_before_features_ok_needs_a_reset(machine: Machine) -> None:
    machine.write(STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
    machine.place()
    machine.write(QUEUE_READY, 1)
    assert machine.read(QUEUE_READY) == 0 and machine.read(STATUS) & Status.NEEDS_RESET


def test_without_a_size_a_queue_has_the_largest(machine: Machine) -> None:
    machine.negotiate()
    machine.place(0)
    machine.write(STATUS, 0)
    machine.negotiate()
    for register, gpa in ((DESC, 0x1000), (DRIVER_AREA, 0x3000), (DEVICE_AREA, 0x5000)):
        machine.write(register, gpa)
    machine.write(QUEUE_READY, 1)
    ring = machine.device.queues[0].ring
    assert ring is not None and ring.size == 8


def test_the_registers_of_a_queue_that_is_enabled_are_kept(machine: Machine) -> None:
    machine.bring_up()
    machine.write(QUEUE_SEL, 0)
    before = machine.state()
    for register in (QUEUE_SIZE, DESC, DESC + 4, DRIVER_AREA, DEVICE_AREA + 4, QUEUE_READY):
        machine.write(register, 1)
    machine.write(QUEUE_READY, 2)
    assert machine.state() == before
    assert machine.ignored()["the queue is enabled"] == 6
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.used(0) == 1


def test_a_queue_is_stopped_by_0_and_set_up_again(machine: Machine) -> None:
    machine.bring_up()
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    machine.device.hold = True
    machine.offer(1)
    machine.write(QUEUE_NOTIFY, 0)
    machine.write(QUEUE_SEL, 0)
    machine.write(QUEUE_READY, 0)
    assert machine.read(QUEUE_READY) == 0 and machine.device.queues[0].ring is None
    assert ("queue_dropped", "first") in machine.device.take()
    machine.offer(2)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.used(0) == 1, "nothing is done with a queue that is not ready"
    machine.write(QUEUE_READY, 0)
    assert machine.read(STATUS) == UP, "0 twice does no harm"
    machine.device.hold = False
    machine.memory.write(HIGH + 0x1000, bytes(16))
    machine.memory.write(HIGH + 0x2000, bytes(64))
    machine.place(0)
    machine.write(QUEUE_READY, 1)
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.used(0) == 1 and machine.read(STATUS) == UP


def test_one_queue_is_reset(machine: Machine) -> None:
    machine.bring_up(VERSION_1 | RING_RESET)
    machine.write(QUEUE_SEL, 0)
    machine.write(QUEUE_RESET, 0)
    assert machine.read(QUEUE_READY) == 1
    machine.write(QUEUE_RESET, 1)
    assert machine.read(QUEUE_RESET) == 0 and machine.read(QUEUE_READY) == 0
    assert machine.registers.queues[0].size == 8 and not any(machine.registers.queues[0].addresses)
    machine.memory.write(HIGH + 0x1000, bytes(16))
    machine.place(0, size=2)
    machine.write(QUEUE_READY, 1)
    assert machine.read(QUEUE_READY) == 1 and machine.read(STATUS) == UP
    machine.write(QUEUE_SEL, 1)
    assert machine.read(QUEUE_READY) == 1


def test_without_the_feature_there_is_no_queue_reset(machine: Machine) -> None:
    machine.bring_up()
    before = machine.state()
    machine.write(QUEUE_RESET, 1)
    assert machine.state() == before


@pytest.mark.parametrize("value", [2, 0x10000, 0xFFFF_FFFF])
def test_a_kick_for_a_queue_that_is_not_there_is_counted(machine: Machine, value: int) -> None:
    machine.bring_up()
    machine.write(QUEUE_NOTIFY, value)
    assert machine.device.stats["stray_kicks"] == 1 and machine.read(STATUS) == UP


def test_with_notification_data_the_index_stands_below(machine: Machine) -> None:
    machine.bring_up(VERSION_1 | 1 << Feature.NOTIFICATION_DATA)
    machine.offer(0, index=1)
    machine.write(QUEUE_NOTIFY, 0x8001 << 16 | 1)
    assert machine.used(1) == 1


# --- interrupts ----------------------------------------------------------------------------------


def test_the_line_is_up_until_all_is_acknowledged(machine: Machine) -> None:
    machine.bring_up()
    for slot in range(2):
        machine.offer(slot)
        machine.write(QUEUE_NOTIFY, 0)
    machine.device.update_config(shade=9)
    assert machine.levels == [True], "only changes are told"
    assert machine.read(INTERRUPT_STATUS) == 3
    assert machine.read(INTERRUPT_STATUS) == 3, "reading acknowledges nothing"
    machine.write(INTERRUPT_ACK, 0)
    machine.write(INTERRUPT_ACK, 0xFFFF_FFFC)
    machine.write(INTERRUPT_ACK, 1)
    assert machine.read(INTERRUPT_STATUS) == 2 and machine.levels == [True]
    machine.write(INTERRUPT_ACK, 2)
    assert machine.read(INTERRUPT_STATUS) == 0 and machine.levels == [True, False]
    assert machine.registers.line is False


def test_a_guest_may_acknowledge_and_kick_inside_the_interrupt(machine: Machine) -> None:
    machine.bring_up()
    seen = []

    def handle(level: bool) -> None:
        seen.append(level)
        if level:
            machine.write(INTERRUPT_ACK, machine.read(INTERRUPT_STATUS))
            if machine.used(0) < 3:
                machine.offer(machine.used(0))
                machine.write(QUEUE_NOTIFY, 0)

    machine.registers.interrupt = handle
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.used(0) == 3 and not machine.registers.line
    assert seen.count(True) == seen.count(False)


def test_a_guest_may_reset_inside_the_interrupt(machine: Machine) -> None:
    machine.bring_up()
    machine.registers.interrupt = lambda level: level and machine.write(STATUS, 0)
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.read(STATUS) == 0 and not machine.registers.line
    machine.registers.interrupt = None
    machine.bring_up()
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.registers.line


def test_a_fault_is_told_by_an_interrupt(machine: Machine) -> None:
    machine.bring_up()
    machine.memory.store16(HIGH + 0x1002, 100)
    machine.write(QUEUE_NOTIFY, 0)
    assert machine.read(STATUS) == UP | Status.NEEDS_RESET
    assert machine.read(INTERRUPT_STATUS) & 2 and machine.levels == [True]


def test_close_lets_go_of_the_device(machine: Machine) -> None:
    machine.bring_up()
    machine.offer(0)
    machine.write(QUEUE_NOTIFY, 0)
    for _ in range(2):
        machine.registers.close()
        assert machine.device.status == 0 and machine.levels == [True, False]
        assert machine.device.on_queue_call is None and machine.device.on_config_change is None


# --- configuration -------------------------------------------------------------------------------


def test_the_configuration_is_read_in_any_width(machine: Machine) -> None:
    data = bytes(Config(shade=7, depth=0x01020304)) + bytes(0x100 - 6)
    for size in (1, 2, 4, 8):
        for offset in range(0, 0x100 - size):
            expected = int.from_bytes(data[offset : offset + size], "little")
            assert machine.read(CONFIG + offset, size) == expected


def test_the_configuration_is_written_through(memory: GuestMemory) -> None:
    written = []

    class Writable(Echo):
        def write_config(self, offset: int, data: bytes) -> None:
            written.append((offset, data))

    machine = Machine(memory)
    machine.registers = MmioRegisters(Writable(memory))
    machine.write(CONFIG, 0x1_AB, 1)
    machine.write(CONFIG + 3, 0x0102, 2)
    machine.write(CONFIG + 8, 0x0102_0304, 4)
    machine.write(CONFIG, 0x1122_3344_5566_7788, 8)
    assert written == [
        (0, b"\xab"),
        (3, b"\2\1"),
        (8, b"\4\3\2\1"),
        (0, b"\x88\x77\x66\x55"),
        (4, b"\x44\x33\x22\x11"),
    ]


def test_the_generation_changes_with_the_configuration(machine: Machine) -> None:
    before = machine.read(GENERATION)
    assert machine.read(GENERATION) == before
    machine.device.update_config(depth=1)
    assert machine.read(GENERATION) != before
    assert machine.read(CONFIG + 2) == 1


# --- whatever a guest does -----------------------------------------------------------------------

interesting = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 0x1000, 0xFFFF, 0x10000, 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)
places = st.one_of(
    st.sampled_from(sorted(READABLE | WRITABLE)),
    st.integers(0, 0x210),
    st.integers(-(1 << 40), 1 << 40),
)
sizes = st.sampled_from([4, 4, 4, 4, 1, 2, 8, 0, 3, -1])


@settings(max_examples=200, deadline=None)
@given(
    up=st.booleans(),
    steps=st.lists(st.tuples(st.booleans(), places, sizes, interesting), max_size=60),
)
def test_nothing_that_a_guest_does_raises_and_a_reset_heals_it(
    up: bool, steps: list[tuple[bool, int, int, int]]
) -> None:
    with GuestMemory.allocate(*LAYOUT) as memory:
        machine = Machine(memory)
        if up:
            machine.bring_up(VERSION_1 | RING_RESET)
        for is_read, offset, size, value in steps:
            if is_read:
                assert 0 <= machine.read(offset, size) < 1 << 8 * max(0, size)
            else:
                machine.write(offset, value, size)
            assert machine.registers.line == bool(machine.read(INTERRUPT_STATUS))
            assert machine.levels[-1:] in ([], [machine.registers.line])
        transport = MmioTransport(machine.registers)
        machine.registers.interrupt = transport.interrupt
        driver = Driver(transport, memory, OFFERED)
        driver.probe()
        for queue in (0, 1):
            ring = driver.queues[queue]
            ring.add((), [(0x1000, 5)])
            driver.kick(queue)
            assert [used.written for used in ring.collect()] == [5]
        assert driver.calls and not driver.needs_reset
        driver.close()
        del ring, driver
