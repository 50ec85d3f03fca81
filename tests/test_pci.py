"""virtio over PCI: capabilities, the structures' fields, interrupts, and whatever a guest does."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device import COLOUR, FAR, SHADES, Config
from test_device import Echo as AnyEcho

from vq.abi import Feature, Status
from vq.device import RING_FEATURES
from vq.driver import Driver
from vq.driver_pci import PciTransport
from vq.errors import UsageError
from vq.memory import GuestMemory
from vq.pci import PciFunction, PciRegisters

# By number, as in virtio 1.3, 4.1.4.3, for tests independent of vq.abi.
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0, 4, 8, 12
CONFIG_VECTOR, NUM_QUEUES, STATUS, GENERATION = 16, 18, 20, 21
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, NOTIFY_OFF = 22, 24, 26, 28, 30
DESC, DRIVER_AREA, DEVICE_AREA, NOTIFY_DATA, QUEUE_RESET = 32, 40, 48, 56, 58
ADMIN_INDEX, ADMIN_NUM = 60, 62
WIDTHS = {
    **dict.fromkeys((0, 4, 8, 12, 32, 36, 40, 44, 48, 52), 4),
    **dict.fromkeys((16, 18, 22, 24, 26, 28, 30, 56, 58, 60, 62), 2),
    **dict.fromkeys((20, 21), 1),
}
NOTIFY, ISR, CONFIG = 0x100, 0x200, 0x300  # where vmd has them in its BAR
COMMAND, PCI_STATUS = 4, 6

HIGH = 0x1_0000_0000
LAYOUT = ((0x1000, 0x10000), (HIGH, 0x10000))
OFFERED = (
    RING_FEATURES
    | 1 << COLOUR
    | 1 << SHADES
    | 1 << FAR
    | 1 << Feature.NOTIFICATION_DATA
    | 1 << Feature.NOTIF_CONFIG_DATA
)
VERSION_1 = 1 << Feature.VERSION_1
RING_RESET = 1 << Feature.RING_RESET
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
UP = READY | Status.DRIVER_OK
NO_VECTOR = 0xFFFF


class Echo(AnyEcho):
    device_id = 0x2A  # PCI has room for types below 64


class Machine:
    """The function, and what a driver does by hand; accesses are to the first BAR."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        msix: bool = False,
        io: bool = True,
        multiplier: int = 4,
        vectors: int | None = None,
        **more: object,
    ) -> None:
        self.memory = memory
        self.device = Echo(memory, **{"features": OFFERED, **more})
        self.levels: list[bool] = []
        self.messages: list[tuple[int, int]] = []
        self.function = PciFunction(
            self.device,
            self.levels.append,
            (lambda address, data: self.messages.append((address, data))) if msix else None,
            io=io,
            notify_off_multiplier=multiplier,
            vectors=vectors,
        )
        self.config = self.function.config

    def read(self, offset: int, size: int | None = None) -> int:
        return self.function.bars[0].read(offset, size or WIDTHS[offset])

    def write(self, offset: int, value: int, size: int | None = None) -> None:
        self.function.bars[0].write(offset, size or WIDTHS[offset], value)

    def negotiate(self, features: int = VERSION_1) -> None:
        self.write(STATUS, 0)
        self.write(STATUS, Status.ACKNOWLEDGE)
        self.write(STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        for word in range(3):
            self.write(DRIVER_FEATURE_SELECT, word)
            self.write(DRIVER_FEATURE, features >> 32 * word & 0xFFFF_FFFF)
        self.write(STATUS, READY)

    def place(self, index: int = 0, size: int = 4, base: int = HIGH) -> None:
        base += 0x4000 * index
        self.write(QUEUE_SELECT, index)
        self.write(QUEUE_SIZE, size)
        for field, gpa in ((DESC, base), (DRIVER_AREA, base + 0x1000), (48, base + 0x2000)):
            self.write(field, gpa & 0xFFFF_FFFF)
            self.write(field + 4, gpa >> 32)

    def bring_up(self, features: int = VERSION_1) -> None:
        self.negotiate(features)
        for index in range(2):
            self.place(index)
            self.write(QUEUE_ENABLE, 1)
        self.write(STATUS, UP)
        assert self.read(STATUS) == UP
        self.device.take()

    def enable_msix(self, flags: int = 0x8000) -> None:
        self.config.write(self.capability(0x11) + 2, 2, flags)

    def set_vector(self, vector: int, address: int, data: int, control: int = 0) -> None:
        for n, word in enumerate((address & 0xFFFF_FFFF, address >> 32, data, control)):
            self.function.bars[1].write(16 * vector + 4 * n, 4, word)

    def capability(self, number: int, kind: int | None = None) -> int:
        place = self.config.read(0x34, 1)
        while place:
            if self.config.read(place, 1) == number and (
                kind is None or self.config.read(place + 3, 1) == kind
            ):
                return place
            place = self.config.read(place + 1, 1)
        raise AssertionError("no such capability")

    def kick(self, index: int, slot: int | None = None) -> None:
        if slot is not None:
            self.offer(slot, index)
        self.write(NOTIFY + 4 * index, index, 2)

    def offer(self, slot: int, index: int = 0) -> None:
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
        """All that a driver can read without changing it, and what the device was told."""
        queues = [(q.size, q.vector, list(q.addresses)) for q in self.function.queues]
        rings = [queue.ring is not None for queue in self.device.queues]
        common = {offset: self.read(offset) for offset in WIDTHS}
        config = [self.read(CONFIG + at, 1) for at in range(6)]
        device = (self.device.status, self.device.driver_features, list(self.device.happened))
        return queues, rings, common, config, device, self.function.events


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(*LAYOUT) as memory:
        yield memory


@pytest.fixture
def machine(memory: GuestMemory) -> Machine:
    return Machine(memory)


# --- configuration space -------------------------------------------------------------------------


def test_the_configuration_space_in_golden_bytes(memory: GuestMemory) -> None:
    config = Machine(memory, msix=True, io=False).config
    expected = bytearray(256)
    header = (
        "f41a6a10 00001000 0100ff00 00000000"  # IDs, status: capabilities, revision 1, class
        "00000000 00000000 00000000 00000000"  # two memory BARs, not placed yet
        "00000000 00000000 00000000 f41a6a00"  # subsystem IDs
        "00000000 40000000 00000000 00010000"  # first capability, INTA#
        "114c0200 01000000 01080000"  # MSI-X: three vectors, table and pending bits in BAR 1
        "095c1001 00000000 00000000 40000000"  # common: BAR 0, at 0, 64 bytes
        "09701402 00000000 00010000 08000000 04000000"  # notify: at 0x100, multiplier 4
        "09801003 00000000 00020000 04000000"  # ISR: at 0x200
        "09901004 00000000 00030000 06000000"  # device: at 0x300
        "09001405 00000000 00000000 00000000 00000000"  # PCI configuration access
    )
    golden = bytes.fromhex(header)
    expected[: len(golden)] = golden
    assert bytes(config.bytes) == bytes(expected)
    assert b"".join(config.read(n, 4).to_bytes(4, "little") for n in range(0, 256, 4)) == expected


def test_without_configuration_or_messages_there_are_no_capabilities_for_them(
    memory: GuestMemory,
) -> None:
    function = PciFunction(Echo(memory, config=None))
    kinds, place = [], function.config.read(0x34, 1)
    while place:
        kinds.append((function.config.read(place, 1), function.config.read(place + 3, 1)))
        place = function.config.read(place + 1, 1)
    assert kinds == [(9, 1), (9, 2), (9, 3), (9, 5)]
    assert list(function.bars) == [0] and function.config.read(0x14, 4) == 0


def test_only_what_is_writable_is_written(memory: GuestMemory) -> None:
    config = Machine(memory, msix=True).config
    before = bytes(config.bytes)
    for offset in range(0, 256, 4):
        if offset != 0x98:  # the access capability's own data would reach into the BAR
            config.write(offset, 4, 0xFFFF_FFFF)
    changed = {n: b for n, b in enumerate(config.bytes) if b != before[n]}
    window = config.writable
    assert all(window[n] for n in changed)
    assert config.read(COMMAND, 2) == 0x407
    assert config.read(0x10, 4) == 0xFFFF_F001 and config.read(0x14, 4) == 0xFFFF_F000
    assert config.read(0x18, 4) == 0 and config.read(0x30, 4) == 0
    assert config.read(0x3C, 2) == 0x1FF and config.read(0x0C, 1) == 0xFF
    assert config.read(0x42, 2) == 0xC002


@pytest.mark.parametrize("io", [False, True])
def test_a_bar_responds_where_it_was_put_when_it_is_enabled(memory: GuestMemory, io: bool) -> None:
    machine = Machine(memory, msix=True, io=io)
    machine.config.write(0x10, 4, 0xC123)
    machine.config.write(0x14, 4, 0xFEBC_1234)
    assert machine.config.bar_address(0) is None and machine.config.bar_address(1) is None
    machine.config.write(COMMAND, 2, 1 if io else 2)
    assert machine.config.bar_address(0) == 0xC000
    assert machine.config.bar_address(1) == (None if io else 0xFEBC_1000)
    machine.config.write(COMMAND, 2, 3)
    assert machine.config.bar_address(1) == 0xFEBC_1000
    assert machine.config.bar_address(2) is None


def test_accesses_that_cross_a_word_or_the_end_are_ignored(machine: Machine) -> None:
    for offset, size in ((3, 2), (1, 4), (2, 4), (0x43, 2), (254, 4), (256, 1), (-4, 4), (0, 3)):
        assert machine.config.read(offset, size) == 0
        machine.config.write(offset, size, 0xFFFF_FFFF)
    assert machine.config.command == 0
    assert machine.config.read(0, 8) == 0x0010_0000_106A_1AF4


@pytest.mark.parametrize(
    ("device_id", "code"), [(1, 0x020000), (2, 0x018000), (3, 0x078000), (4, 0x00FF00)]
)
def test_the_class_follows_the_type(memory: GuestMemory, device_id: int, code: int) -> None:
    class Other(Echo):
        pass

    Other.device_id = device_id
    config = PciFunction(Other(memory)).config
    assert config.read(8, 4) == code << 8 | 1
    assert config.read(2, 2) == 0x1040 + device_id


@pytest.mark.parametrize("device_id", [0, 64, 0x7E])
def test_a_type_that_pci_has_no_number_for_is_refused(memory: GuestMemory, device_id: int) -> None:
    class Other(Echo):
        pass

    Other.device_id = device_id
    with pytest.raises(UsageError, match="PCI device ID"):
        PciFunction(Other(memory))


def test_a_reset_of_the_bus_resets_all(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    first = bytes(machine.config.bytes), machine.state()
    machine.config.write(0x10, 4, 0xC000)
    machine.config.write(COMMAND, 2, 3)
    machine.enable_msix(0xC000)
    machine.set_vector(1, 0xFEE0_0000, 5)
    machine.bring_up()
    machine.write(QUEUE_SELECT, 0)
    machine.write(QUEUE_VECTOR, 1)
    machine.kick(0, 0)
    machine.function.reset()
    machine.device.take()
    assert (bytes(machine.config.bytes), machine.state()) == first
    assert machine.function.bars[1].read(16 + 12, 4) == 1, "masked again"
    assert machine.messages == [] and machine.levels == []


# --- the window in the configuration space (4.1.4.9) ----------------------------------------------


class WindowAccess:
    """Accesses to the first BAR through the configuration space, as firmware makes them."""

    def __init__(self, machine: Machine) -> None:
        self.config = machine.config
        self.place = machine.capability(9, 5)

    def aim(self, offset: int, size: int, bar: int = 0) -> None:
        self.config.write(self.place + 4, 1, bar)
        self.config.write(self.place + 8, 4, offset)
        self.config.write(self.place + 12, 4, size)

    def read(self, offset: int, size: int) -> int:
        self.aim(offset, size)
        return self.config.read(self.place + 16, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.aim(offset, size)
        self.config.write(self.place + 16, size, value)


def test_everything_is_within_reach_of_the_configuration_space(machine: Machine) -> None:
    window = WindowAccess(machine)
    transport = PciTransport(machine.config, {0: window})
    machine.function.interrupt = transport.interrupt
    driver = Driver(transport, machine.memory, RING_FEATURES)
    driver.probe()
    driver.queues[1].add((), [(0x1000, 5)])
    driver.kick(1)
    assert [used.written for used in driver.queues[1].collect()] == [5]
    assert driver.calls and machine.levels == []
    assert transport.read_config(0, 2) == b"\7\0"
    driver.close()


@pytest.mark.parametrize(
    ("offset", "size", "bar"),
    [
        (0, 0, 0),
        (0, 3, 0),
        (0, 8, 0),
        (2, 4, 0),
        (0x301, 2, 0),
        (0, 4, 1),
        (0, 4, 7),
        (0x2000, 4, 0),
    ],
)
def test_a_window_on_nothing_shows_nothing(
    memory: GuestMemory, offset: int, size: int, bar: int
) -> None:
    machine = Machine(memory, msix=True)
    window = WindowAccess(machine)
    before = machine.state()
    window.aim(offset, size, bar)
    assert machine.config.read(window.place + 16, 4) == 0
    machine.config.write(window.place + 16, 4, 0xFFFF_FFFF)
    assert machine.state() == before
    assert sum(machine.ignored().values()) == 2


def test_reading_the_isr_through_the_window_clears_it(machine: Machine) -> None:
    machine.bring_up()
    machine.kick(0, 0)
    assert WindowAccess(machine).read(ISR, 1) == 1
    assert machine.levels == [True, False] and machine.function.events == 0


# --- where things are in the BAR -----------------------------------------------------------------


def test_the_bar_is_as_in_vmd(machine: Machine) -> None:
    assert machine.function.bars[0].length == 0x1000
    for kind, offset in ((1, 0), (2, 0x100), (3, 0x200), (4, 0x300)):
        assert machine.config.read(machine.capability(9, kind) + 8, 4) == offset


def test_many_queues_are_kicked_behind_everything_else(memory: GuestMemory) -> None:
    queues = [(str(n), 2) for n in range(100)]
    machine = Machine(memory, queues=queues, msix=True)
    place = machine.capability(9, 2)
    assert machine.config.read(place + 8, 4) == 0x1000
    assert machine.config.read(place + 12, 4) == 400
    assert machine.function.bars[0].length == 0x2000
    transport = PciTransport(machine.config, machine.function.bars)
    machine.function.interrupt = transport.interrupt
    driver = Driver(transport, memory, RING_FEATURES)
    driver.probe()
    driver.queues[99].add((), [(0x1000, 5)])
    driver.kick(99)
    assert len(driver.queues[99].collect()) == 1
    driver.close()
    assert len(machine.function.bars[1].read(0, 4).to_bytes(4, "little")) == 4


def test_between_the_structures_there_is_nothing(machine: Machine) -> None:
    machine.bring_up(VERSION_1 | RING_RESET)
    machine.kick(0, 0)
    before = machine.state()
    places = [*range(64, 0x100, 4), *range(0x108, 0x200, 4), *range(0x204, 0x300, 4), 0x308, 0xFFC]
    for offset in (*places, 0x1000, -4):
        assert machine.read(offset, 4) == 0
        machine.write(offset, 1, 4)
    assert machine.state() == before


@pytest.mark.parametrize("multiplier", [1, 2, 3, 6, 12, -4])
def test_a_multiplier_that_cannot_be_is_refused(memory: GuestMemory, multiplier: int) -> None:
    with pytest.raises(UsageError, match="multiplier"):
        PciRegisters(Echo(memory), notify_off_multiplier=multiplier)


def test_there_are_never_more_vectors_than_msix_has(memory: GuestMemory) -> None:
    machine = Machine(memory, queues=[("many", 4)] * 2100, msix=True)
    assert machine.config.read(machine.capability(0x11) + 2, 2) == 2047
    machine.bring_up()


@pytest.mark.parametrize("vectors", [0, 2049, -1])
def test_a_number_of_vectors_that_cannot_be_is_refused(memory: GuestMemory, vectors: int) -> None:
    with pytest.raises(UsageError, match="vectors"):
        PciFunction(Echo(memory), message=lambda a, d: None, vectors=vectors)


# --- the common structure -------------------------------------------------------------------------


def test_the_common_structure_of_a_new_device_in_golden_bytes(machine: Machine) -> None:
    fields = {offset: machine.read(offset) for offset in WIDTHS}
    assert {offset: value for offset, value in fields.items() if value} == {
        DEVICE_FEATURE: OFFERED & 0xFFFF_FFFF,
        CONFIG_VECTOR: NO_VECTOR,
        NUM_QUEUES: 2,
        QUEUE_SIZE: 8,
        QUEUE_VECTOR: NO_VECTOR,
    }


@pytest.mark.parametrize("up", [False, True])
def test_a_field_is_accessed_at_its_offset_in_its_width(memory: GuestMemory, up: bool) -> None:
    machine = Machine(memory, msix=True)
    if up:
        machine.bring_up(VERSION_1 | RING_RESET)
    before = machine.state()
    for offset in range(64):
        for size in (0, 1, 2, 3, 4, 5, 16):
            if WIDTHS.get(offset) != size:
                assert machine.function.common.read(offset, size) == 0, (offset, size)
                machine.function.common.write(offset, size, 1)
    assert machine.state() == before
    assert set(machine.ignored()) == {"width", "no such register"}


def test_a_field_of_64_bits_is_also_accessed_as_a_whole(machine: Machine) -> None:
    machine.write(DESC, HIGH + 0x10, 8)
    assert machine.read(DESC) == 0x10 and machine.read(DESC + 4) == 1
    assert machine.read(DESC, 8) == HIGH + 0x10
    machine.write(DESC + 4, 7)
    assert machine.read(DESC, 8) == 7 << 32 | 0x10, "each half on its own (4.1.3.1)"


def test_what_is_only_read_is_not_written(machine: Machine) -> None:
    before = machine.state()
    for offset in (DEVICE_FEATURE, NUM_QUEUES, GENERATION, NOTIFY_OFF, NOTIFY_DATA, ADMIN_INDEX):
        machine.write(offset, 0xFF)
    assert machine.state() == before
    assert machine.ignored() == {"not to be written": 6}


def test_features_are_read_and_written_in_words(machine: Machine) -> None:
    words = []
    for word in (2, 0, 1, 3, 0xFFFF_FFFF):
        machine.write(DEVICE_FEATURE_SELECT, word)
        assert machine.read(DEVICE_FEATURE_SELECT) == word
        words.append(machine.read(DEVICE_FEATURE))
    assert words == [OFFERED >> 64, OFFERED & 0xFFFF_FFFF, OFFERED >> 32 & 0xFFFF_FFFF, 0, 0]
    machine.negotiate(VERSION_1 | 1 << FAR | 1 << COLOUR)
    assert machine.read(STATUS) == READY
    accepted = []
    for word in (0, 1, 2, 0xFFFF_FFFF):
        machine.write(DRIVER_FEATURE_SELECT, word)
        accepted.append(machine.read(DRIVER_FEATURE))
    assert accepted == [1 << COLOUR, 1, 1 << FAR - 64, 0]
    machine.write(DRIVER_FEATURE, 0xFFFF_FFFF)
    assert machine.ignored() == {"features beyond the last": 1}


def test_a_size_that_cannot_be_reads_as_unavailable_and_is_refused(machine: Machine) -> None:
    for size, shown in ((3, 0), (0, 0), (16, 0), (0xFFFF, 0), (8, 8), (1, 1)):
        machine.negotiate()
        machine.place(size=size)
        assert machine.read(QUEUE_SIZE) == shown
        machine.write(QUEUE_ENABLE, 1)
        assert machine.read(QUEUE_ENABLE) == bool(shown)
        assert bool(machine.read(STATUS) & Status.NEEDS_RESET) is not bool(shown)


def test_a_queue_that_is_not_there_has_nothing(machine: Machine) -> None:
    for index in (2, 0xFFFF):
        machine.write(QUEUE_SELECT, index)
        before = machine.state()
        fields = (QUEUE_SIZE, QUEUE_ENABLE, NOTIFY_OFF, DESC, DESC + 4, DEVICE_AREA, QUEUE_RESET)
        assert [machine.read(offset) for offset in fields] == [0] * 7
        assert machine.read(QUEUE_VECTOR) == NO_VECTOR
        for offset in (*fields, QUEUE_VECTOR):
            machine.write(offset, 1)
        assert machine.state() == before


def test_a_queue_is_enabled_by_1_and_by_nothing_disabled(machine: Machine) -> None:
    machine.negotiate()
    machine.place(0)
    machine.write(QUEUE_ENABLE, 2)
    assert machine.read(QUEUE_ENABLE) == 0
    machine.write(QUEUE_ENABLE, 1)
    machine.write(STATUS, UP)
    before = machine.state()
    for offset in (QUEUE_ENABLE, QUEUE_SIZE, DESC, DRIVER_AREA + 4):
        machine.write(offset, 0)
    machine.write(QUEUE_ENABLE, 1)
    assert machine.state() == before
    machine.kick(0, 0)
    assert machine.used(0) == 1


def test_a_reset_leads_back_to_the_first_state(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    first = machine.state()
    machine.bring_up(VERSION_1 | RING_RESET)
    machine.kick(0, 0)
    machine.write(CONFIG_VECTOR, 1)
    machine.write(QUEUE_VECTOR, 2)
    machine.write(DEVICE_FEATURE_SELECT, 1)
    machine.write(STATUS, 0)
    machine.device.take()
    assert machine.state() == first and machine.levels == [True, False]


def test_one_queue_is_reset(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.bring_up(VERSION_1 | RING_RESET)
    machine.write(QUEUE_SELECT, 0)
    machine.write(QUEUE_VECTOR, 1)
    machine.write(QUEUE_RESET, 1)
    assert machine.read(QUEUE_RESET) == machine.read(QUEUE_ENABLE) == 0
    assert machine.read(QUEUE_SIZE) == 8 and machine.read(QUEUE_VECTOR) == NO_VECTOR
    assert machine.read(DESC, 8) == 0
    machine.memory.write(HIGH + 0x1000, bytes(16))
    machine.place(0, size=2)
    machine.write(QUEUE_ENABLE, 1)
    assert machine.read(QUEUE_ENABLE) == 1 and machine.read(STATUS) == UP


def test_without_the_feature_there_is_no_queue_reset(machine: Machine) -> None:
    machine.bring_up()
    before = machine.state()
    machine.write(QUEUE_RESET, 1)
    assert machine.state() == before and machine.ignored() == {"not to be written": 1}


# --- kicks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_kick_is_taken_in_any_width_by_its_address(machine: Machine, size: int) -> None:
    machine.bring_up()
    for index in (0, 1):
        machine.offer(0, index)
        machine.write(QUEUE_SELECT, index)
        machine.write(NOTIFY + machine.read(NOTIFY_OFF) * 4, 0x77 * index, size)
        assert machine.used(index) == 1
    machine.offer(1)
    for offset in (1, 2, 3):
        machine.write(NOTIFY + offset, 0, 1)
    assert machine.used(0) == 1
    assert machine.read(NOTIFY, 2) == 0


def test_with_one_address_for_all_queues_the_value_says_which(memory: GuestMemory) -> None:
    machine = Machine(memory, multiplier=0)
    machine.bring_up(VERSION_1 | 1 << Feature.NOTIFICATION_DATA)
    assert machine.config.read(machine.capability(9, 2) + 12, 4) == 4
    machine.offer(0, 1)
    machine.write(NOTIFY, 0x8001_0001, 4)
    assert machine.used(1) == 1 and machine.used(0) == 0
    machine.write(NOTIFY, 9, 2)
    assert machine.device.stats["stray_kicks"] == 1


def test_the_data_for_kicks_is_there_when_it_was_negotiated(machine: Machine) -> None:
    machine.write(QUEUE_SELECT, 1)
    assert machine.read(NOTIFY_DATA) == 0
    machine.negotiate(VERSION_1 | 1 << Feature.NOTIF_CONFIG_DATA)
    machine.write(QUEUE_SELECT, 1)
    assert machine.read(NOTIFY_DATA) == 1


# --- INTx ----------------------------------------------------------------------------------------


def test_reading_the_isr_clears_it_and_lowers_the_line(machine: Machine) -> None:
    machine.bring_up()
    machine.kick(0, 0)
    machine.kick(0, 1)
    machine.device.update_config(shade=9)
    assert machine.levels == [True] and machine.config.read(PCI_STATUS, 2) == 0x18
    assert machine.config.read(COMMAND, 4) >> 16 == 0x18
    assert machine.read(ISR + 1, 1) == 0, "only the first byte clears"
    assert machine.read(ISR, 1) == 3
    assert machine.read(ISR, 1) == 0
    assert machine.levels == [True, False] and machine.config.read(PCI_STATUS, 2) == 0x10
    machine.write(ISR, 1, 1)
    machine.kick(0, 2)
    assert machine.read(ISR, 4) == 1 and machine.levels == [True, False] * 2


def test_the_command_register_holds_the_line_down(machine: Machine) -> None:
    machine.bring_up()
    machine.config.write(COMMAND, 2, 0x400)
    machine.kick(0, 0)
    assert machine.levels == [] and machine.config.read(PCI_STATUS, 1) == 0x18
    machine.config.write(COMMAND, 2, 0)
    assert machine.levels == [True]
    machine.config.write(COMMAND, 2, 0x400)
    assert machine.levels == [True, False]


# --- MSI-X ---------------------------------------------------------------------------------------


def test_messages_go_where_the_table_says(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.enable_msix()
    for vector in range(3):
        machine.set_vector(vector, 0x1_FEE0_0003, 0x40 + vector)
    machine.bring_up()
    machine.write(CONFIG_VECTOR, 0)
    for index in (0, 1):
        machine.write(QUEUE_SELECT, index)
        machine.write(QUEUE_VECTOR, index + 1)
        assert machine.read(QUEUE_VECTOR) == index + 1
    machine.kick(1, 0)
    machine.kick(0, 0)
    machine.device.update_config(shade=9)
    assert machine.messages == [(0x1_FEE0_0000, data) for data in (0x42, 0x41, 0x40)]
    assert machine.levels == [], "no INTx beside"
    assert machine.read(ISR, 1) == 2, "only the configuration's bit (4.1.4.5.1)"


def test_without_a_vector_there_is_no_message(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.enable_msix()
    machine.set_vector(1, 0, 1)
    machine.bring_up()
    machine.kick(0, 0)
    machine.device.update_config(shade=9)
    machine.write(QUEUE_SELECT, 0)
    machine.write(QUEUE_VECTOR, 1)
    machine.write(QUEUE_VECTOR, NO_VECTOR)
    machine.kick(0, 1)
    assert machine.messages == [] and machine.levels == []


@pytest.mark.parametrize("vector", [3, 0x7FF, 0xFFFE])
def test_a_vector_that_is_not_there_is_not_mapped(memory: GuestMemory, vector: int) -> None:
    machine = Machine(memory, msix=True)
    for field in (CONFIG_VECTOR, QUEUE_VECTOR):
        machine.write(field, 2)
        assert machine.read(field) == 2
        machine.write(field, vector)
        assert machine.read(field) == NO_VECTOR


def test_without_msix_no_vector_is_mapped(machine: Machine) -> None:
    for field in (CONFIG_VECTOR, QUEUE_VECTOR):
        machine.write(field, 0)
        assert machine.read(field) == NO_VECTOR


@pytest.mark.parametrize("by", ["entry", "function"])
def test_what_comes_for_a_masked_vector_waits(memory: GuestMemory, by: str) -> None:
    machine = Machine(memory, msix=True)
    machine.enable_msix(0x8000 if by == "entry" else 0xC000)
    machine.set_vector(1, 0xFEE0_0000, 0x41, control=by == "entry")
    machine.bring_up()
    machine.write(QUEUE_SELECT, 0)
    machine.write(QUEUE_VECTOR, 1)
    machine.kick(0, 0)
    machine.kick(0, 1)
    bar = machine.function.bars[1]
    assert machine.messages == [] and bar.read(0x800, 8) == 2
    bar.write(0x800, 8, 0)
    assert bar.read(0x800, 4) == 2, "pending bits are not written"
    if by == "entry":
        machine.set_vector(1, 0xFEE1_0000, 0x51)
    else:
        machine.enable_msix()
    assert len(machine.messages) == 1 and bar.read(0x800, 4) == 0
    machine.kick(0, 2)
    assert len(machine.messages) == 2


def test_what_waits_is_not_sent_while_messages_are_off(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.enable_msix()
    machine.bring_up()
    machine.write(QUEUE_VECTOR, 1)
    machine.kick(1, 0)
    machine.enable_msix(0)
    machine.set_vector(1, 0xFEE0_0000, 0x41)
    assert machine.messages == []
    machine.enable_msix()
    assert machine.messages == [(0xFEE0_0000, 0x41)]


def test_what_waited_is_forgotten_by_a_reset(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.enable_msix()
    machine.bring_up()
    machine.write(QUEUE_VECTOR, 1)
    machine.kick(1, 0)
    assert machine.function.bars[1].read(0x800, 4) == 2
    machine.write(STATUS, 0)
    machine.set_vector(1, 0xFEE0_0000, 0x41)
    assert machine.messages == [] and machine.function.bars[1].read(0x800, 4) == 0


def test_the_table_in_golden_bytes(memory: GuestMemory) -> None:
    bar = Machine(memory, msix=True).function.bars[1]
    assert bar.length == 0x1000
    words = [bar.read(offset, 4) for offset in range(0, 64, 4)]
    assert words == [0, 0, 0, 1] * 3 + [0] * 4
    bar.write(16, 8, 0x1122_3344_5566_7788)
    bar.write(24, 4, 0x99AA_BBCC)
    bar.write(28, 4, 0xFFFF_FFFE)
    bar.write(48, 4, 0xFFFF_FFFF)
    for offset, size in ((16, 1), (16, 2), (18, 4), (17, 1)):
        assert bar.read(offset, size) == 0
        bar.write(offset, size, 0)
    words = [bar.read(offset, 4) for offset in range(0, 64, 4)]
    golden = struct.unpack("<4I", bytes.fromhex("88776655 44332211 ccbbaa99 00000000"))
    assert words == [0, 0, 0, 1, *golden, 0, 0, 0, 1, 0, 0, 0, 0]


def test_switching_messages_off_leads_back_to_the_line(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True)
    machine.bring_up()
    machine.kick(0, 0)
    machine.enable_msix()
    assert machine.levels == [True, False]
    machine.enable_msix(0)
    assert machine.levels == [True, False, True]


def test_the_largest_table_has_its_pending_bits_behind_it(memory: GuestMemory) -> None:
    machine = Machine(memory, msix=True, vectors=2048)
    bar = machine.function.bars[1]
    assert bar.length == 0x10000
    assert machine.config.read(machine.capability(0x11) + 8, 4) == 0x8001
    machine.enable_msix()
    machine.bring_up()
    machine.write(QUEUE_VECTOR, 2047)
    machine.kick(1, 0)
    assert bar.read(0x8000 + 252, 4) == 0x8000_0000 and bar.read(0x8000 + 248, 4) == 0


# --- the device's configuration ------------------------------------------------------------------


def test_the_configuration_is_read_in_any_width_up_to_its_end(machine: Machine) -> None:
    data = bytes(Config(shade=7, depth=0x01020304))
    for size in (1, 2, 4):
        for offset in range(0, 7):
            inside = offset + size <= 6
            expected = int.from_bytes(data[offset : offset + size], "little") if inside else 0
            assert machine.read(CONFIG + offset, size) == expected


def test_the_configuration_is_written_through(memory: GuestMemory) -> None:
    written = []

    class Writable(Echo):
        def write_config(self, offset: int, data: bytes) -> None:
            written.append((offset, data))

    block = PciRegisters(Writable(memory)).device_config
    block.write(0, 1, 0x1AB)
    block.write(2, 4, 0x0102_0304)
    block.write(3, 4, 0)
    assert written == [(0, b"\xab"), (2, b"\4\3\2\1")]


def test_the_generation_counts_changes_that_were_read(machine: Machine) -> None:
    """8 bits that counted every change would be the same again after 256 (4.1.4.3.1)."""
    machine.read(CONFIG, 2)
    for changes in (1, 255, 256, 257, 512):
        before = machine.read(GENERATION)
        assert machine.read(CONFIG + 2, 4) is not None
        assert machine.read(GENERATION) == before, "nothing has changed"
        for _ in range(changes):
            machine.device.update_config(depth=changes)
        assert machine.read(CONFIG + 2, 4) == changes
        assert machine.read(GENERATION) != before


# --- whatever a guest does -----------------------------------------------------------------------

interesting = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 0x1000, 0xFFFF, 0xC000, 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)
places = st.one_of(
    st.sampled_from([*WIDTHS, NOTIFY, NOTIFY + 4, ISR, CONFIG, 0x800]),
    st.integers(0, 0x330),
    st.integers(-(1 << 40), 1 << 40),
)
sizes = st.sampled_from([None, None, None, 1, 2, 4, 8, 0, 3])


@settings(max_examples=200, deadline=None)
@given(
    msix=st.booleans(),
    up=st.booleans(),
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), places, sizes, interesting), max_size=60
    ),
)
def test_nothing_that_a_guest_does_raises_and_a_reset_heals_it(
    msix: bool, up: bool, steps: list[tuple[bool, int, int, int | None, int]]
) -> None:
    with GuestMemory.allocate(*LAYOUT) as memory:
        machine = Machine(memory, msix=msix)
        blocks = [machine.function.bars[0], machine.config, machine.function.bars.get(1)]
        if up:
            machine.bring_up(VERSION_1 | RING_RESET)
        for is_read, which, offset, size, value in steps:
            block = blocks[which] or blocks[0]
            width = size if size is not None else WIDTHS.get(offset, 4)
            if is_read:
                assert 0 <= block.read(offset, width) < 1 << 8 * width
            else:
                block.write(offset, width, value)
            off = machine.config.command & 0x400 or machine.function.by_message
            assert machine.function.line == (bool(machine.function.events) and not off)
            assert machine.levels[-1:] in ([], [machine.function.line])
        transport = PciTransport(machine.config, machine.function.bars, msix=msix)
        machine.function.interrupt = transport.interrupt
        if msix:
            machine.function.msix.message = transport.message
        driver = Driver(transport, memory, OFFERED)
        driver.probe()
        machine.config.write(COMMAND, 2, machine.config.command & ~0x400)
        for queue in (0, 1):
            ring = driver.queues[queue]
            ring.add((), [(0x1000, 5)])
            driver.kick(queue)
            assert [used.written for used in ring.collect()] == [5]
        assert driver.calls and not driver.needs_reset
        driver.close()
        del ring, driver
