"""Receive filters really filter: the device against a naive reading of virtio 1.3, 5.1.6.5.1-3."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from net_world import BROADCAST, OTHER_MAC, OUR_MAC, ScriptedLink, World, ethernet, features

from vq.abi import CtrlClass, CtrlMac, CtrlRx
from vq.memory import GuestMemory
from vq.net_driver import NetDriver
from vq.net_filter import MAX_TABLE, ReceiveFilter

CONTROL = features(
    *("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "MAC", "MRG_RXBUF")
)
MULTICAST = bytes.fromhex("01005e0000fb")
MULTICAST6 = bytes.fromhex("333300000001")
UNICASTS = [OUR_MAC, OTHER_MAC, bytes.fromhex("020000000004"), bytes.fromhex("feffffffffff")]
MULTICASTS = [MULTICAST, MULTICAST6, bytes.fromhex("01005e0000fc")]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(4 << 20) as memory:
        yield memory


class Naive:
    """What the guest said, kept as it said it."""

    def __init__(self) -> None:
        self.modes = {mode: False for mode in CtrlRx}
        self.modes[CtrlRx.PROMISC] = True
        self.mac = OUR_MAC
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.vlans: list[int] | None = []

    def wants(self, to: bytes, tag: int | None) -> bool:
        on = self.modes
        if on[CtrlRx.PROMISC]:
            return True
        if tag is not None and self.vlans is not None and tag & 0xFFF not in [0, *self.vlans]:
            return False
        if to == BROADCAST:
            return not on[CtrlRx.NOBCAST]
        if to[0] % 2 == 1:
            if on[CtrlRx.NOMULTI]:
                return False
            return on[CtrlRx.ALLMULTI] or to in self.multicast
        if on[CtrlRx.NOUNI]:
            return False
        return on[CtrlRx.ALLUNI] or to == self.mac or to in self.unicast


def frame(to: bytes, tag: int | None, number: int = 0) -> bytes:
    vlan = b"" if tag is None else b"\x81\x00" + struct.pack("!H", tag)
    return to + b"\2\0\0\0\0\7" + vlan + b"\x88\xb5" + struct.pack("!I", number) + bytes(42)


destinations = st.sampled_from([*UNICASTS, *MULTICASTS, BROADCAST])
tags = st.none() | st.sampled_from([0, 1, 5, 0xFFE, 0xFFF]) | st.integers(0, 0xFFFF)


class Filters(RuleBasedStateMachine):
    """Any sequence of commands, a few frames after each, against `Naive`."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory.allocate(4 << 20)
        self.link = ScriptedLink()
        self.naive = Naive()

    @initialize(lock=st.booleans())
    def bring_up(self, lock: bool) -> None:
        self.lock = lock
        self.world = World(self.memory, self.link, lock_mac=lock)
        self.driver = self.world.drive(CONTROL, queue_size=32, receive_buffers=32)

    @rule(mode=st.sampled_from(list(CtrlRx)), on=st.booleans())
    def set_mode(self, mode: CtrlRx, on: bool) -> None:
        assert self.driver.set_receive_mode(mode, on)
        self.naive.modes[mode] = on

    @rule()
    def leave_promiscuous(self) -> None:
        self.set_mode(CtrlRx.PROMISC, False)

    @rule(
        unicast=st.lists(st.sampled_from(UNICASTS), max_size=3),
        multicast=st.lists(st.sampled_from(MULTICASTS), max_size=3),
    )
    def set_tables(self, unicast: list[bytes], multicast: list[bytes]) -> None:
        assert self.driver.set_mac_table(unicast, multicast)
        self.naive.unicast, self.naive.multicast = unicast, multicast

    @rule(vlan=st.sampled_from([0, 1, 5, 0xFFE, 0xFFF]), add=st.booleans())
    def change_vlans(self, vlan: int, add: bool) -> None:
        assert self.driver.add_vlan(vlan) if add else self.driver.remove_vlan(vlan)
        assert self.naive.vlans is not None
        self.naive.vlans = (
            [*self.naive.vlans, vlan]
            if add
            else [known for known in self.naive.vlans if known != vlan]
        )

    @rule(mac=st.sampled_from(UNICASTS))
    def set_mac(self, mac: bytes) -> None:
        assert self.driver.set_mac(mac) == (not self.lock)
        if not self.lock:
            self.naive.mac = mac

    @rule()
    def reset(self) -> None:
        self.driver.restart()
        self.naive = Naive()

    @rule(sent=st.lists(st.tuples(destinations, tags), min_size=1, max_size=12))
    def receive(self, sent: list[tuple[bytes, int | None]]) -> None:
        frames = [frame(to, tag, number) for number, (to, tag) in enumerate(sent)]
        self.link.deliver(*frames)
        expected = [
            data
            for data, (to, tag) in zip(frames, sent, strict=True)
            if self.naive.wants(to, tag) and (not self.lock or to == OUR_MAC or to[0] & 1)
        ]
        assert [got.data for got in self.driver.receive()] == expected

    @invariant()
    def works(self) -> None:
        assert self.world.device.fault is None if hasattr(self, "world") else True

    def teardown(self) -> None:
        self.memory.close()


TestFilters = Filters.TestCase
TestFilters.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


# --- the rules one by one ------------------------------------------------------------------------


def heard(world: World, driver: NetDriver, *frames: bytes) -> list[bytes]:
    assert isinstance(world.link, ScriptedLink)
    world.link.deliver(*frames)
    return [got.data for got in driver.receive()]


def test_promiscuous_prevails_over_every_other_mode(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(CONTROL)
    for mode in (CtrlRx.NOMULTI, CtrlRx.NOUNI, CtrlRx.NOBCAST):
        assert driver.set_receive_mode(mode, True)
    frames = [frame(to, None) for to in (*UNICASTS, *MULTICASTS, BROADCAST)]
    assert heard(world, driver, *frames) == frames
    assert driver.set_receive_mode(CtrlRx.PROMISC, False)
    assert heard(world, driver, *frames) == []
    assert world.dropped("rx") == {"filtered": len(frames)}


def test_broadcast_is_no_multicast(memory: GuestMemory) -> None:
    """virtio 1.3, 5.1.6.5.1.1: NOMULTI does not apply to broadcast, nor NOBCAST to multicast."""
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    driver.set_receive_mode(CtrlRx.ALLMULTI, True)
    both = frame(BROADCAST, None), frame(MULTICAST, None)
    assert heard(world, driver, *both) == [*both]
    driver.set_receive_mode(CtrlRx.NOMULTI, True)
    assert heard(world, driver, *both) == [both[0]]
    driver.set_receive_mode(CtrlRx.NOMULTI, False)
    driver.set_receive_mode(CtrlRx.NOBCAST, True)
    assert heard(world, driver, *both) == [both[1]]


def test_a_runt_has_no_destination(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(CONTROL)
    assert heard(world, driver, b"", OUR_MAC[:5]) == [b"", OUR_MAC[:5]]
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    driver.set_receive_mode(CtrlRx.ALLUNI, True)
    assert heard(world, driver, b"", OUR_MAC[:5], OUR_MAC) == [OUR_MAC]


@pytest.mark.parametrize("receive_buffer_size", [12, 14, 17, 60, 2048])
def test_a_filter_sees_the_start_of_a_frame_in_any_layout(
    memory: GuestMemory, receive_buffer_size: int
) -> None:
    world = World(memory)
    driver = world.drive(
        CONTROL, receive_buffer_size=receive_buffer_size, largest_frame=200, queue_size=256
    )
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    driver.add_vlan(5)
    wanted = [frame(OUR_MAC, 5, 1), frame(BROADCAST, 5, 2), frame(OUR_MAC, None, 3)]
    unwanted = [frame(OUR_MAC, 6), frame(OTHER_MAC, 5), frame(MULTICAST, None)]
    mixed = [unwanted[0], wanted[0], unwanted[1], unwanted[2], wanted[1], wanted[2], unwanted[0]]
    for _ in range(5):
        assert heard(world, driver, *mixed) == wanted


def test_the_vlan_table_is_for_tagged_frames_only(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    plain, priority, tagged = (frame(OUR_MAC, tag) for tag in (None, 0xE000, 0xE007))
    assert heard(world, driver, plain, priority, tagged) == [plain, priority]
    driver.add_vlan(7)
    assert heard(world, driver, plain, priority, tagged) == [plain, priority, tagged]
    driver.remove_vlan(7)
    assert heard(world, driver, tagged) == []


@pytest.mark.parametrize("names", [("CTRL_VQ", "CTRL_RX"), ("CTRL_VQ",), ()])
def test_without_ctrl_vlan_all_tagged_frames_are_accepted(
    memory: GuestMemory, names: tuple[str, ...]
) -> None:
    """virtio 1.3, 5.1.6.5.3.1."""
    world = World(memory)
    driver = world.drive(features(*names))
    if "CTRL_RX" in names:
        driver.set_receive_mode(CtrlRx.PROMISC, False)
    tagged = frame(OUR_MAC, 9)
    assert heard(world, driver, tagged) == [tagged]


def test_a_driver_with_ctrl_vlan_alone_gets_a_vlan_filter(memory: GuestMemory) -> None:
    """It never turned promiscuous mode on, and has no command to turn it off."""
    world = World(memory)
    driver = world.drive(features("CTRL_VQ", "CTRL_VLAN"))
    frames = [frame(to, tag) for to in (OTHER_MAC, MULTICAST, BROADCAST) for tag in (None, 9, 10)]
    driver.add_vlan(9)
    assert heard(world, driver, *frames) == [data for n, data in enumerate(frames) if n % 3 != 2]


def test_a_driver_with_ctrl_rx_extra_alone_gets_its_modes(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(features("CTRL_VQ", "CTRL_RX_EXTRA"))
    frames = [frame(to, None) for to in (OTHER_MAC, MULTICAST, BROADCAST)]
    assert heard(world, driver, *frames) == frames
    driver.set_receive_mode(CtrlRx.NOMULTI, True)
    driver.set_receive_mode(CtrlRx.NOBCAST, True)
    assert heard(world, driver, *frames) == frames[:1]


def test_a_driver_that_never_filtered_gets_everything(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(features("MAC"))
    frames = [frame(to, tag) for to in (OTHER_MAC, MULTICAST, BROADCAST) for tag in (None, 9)]
    assert heard(world, driver, *frames) == frames


@pytest.mark.parametrize(("unicast", "multicast"), [(MAX_TABLE + 1, 0), (0, MAX_TABLE + 1)])
def test_a_table_too_long_to_keep_lets_its_kind_through(
    memory: GuestMemory, unicast: int, multicast: int
) -> None:
    """Wanted frames are never lost; unwanted ones may come (virtio 1.3, 5.1.6.5.2)."""
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    tables = [
        [bytes((first, 0)) + number.to_bytes(4, "big") for number in range(count)]
        for first, count in ((2, unicast), (1, multicast))
    ]
    assert driver.set_mac_table(*tables)
    listed = [frame(address, None) for address in (tables[0] or tables[1])[-2:]]
    assert heard(world, driver, *listed) == listed
    other = frame(MULTICAST if unicast else OTHER_MAC, None)
    assert heard(world, driver, other) == []
    driver.set_mac_table([], [])
    assert heard(world, driver, *listed) == []


def test_full_tables_filter_exactly(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    table = [b"\2\0" + number.to_bytes(4, "big") for number in range(MAX_TABLE)]
    assert driver.set_mac_table(table, [])
    last, beyond = (frame(b"\2\0" + n.to_bytes(4, "big"), None) for n in (MAX_TABLE - 1, MAX_TABLE))
    assert heard(world, driver, last, beyond) == [last]


def test_the_mac_that_was_set_is_received_and_the_old_one_is_not(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    assert driver.set_mac(OTHER_MAC)
    assert heard(world, driver, ethernet(b"old"), ethernet(b"new", to=OTHER_MAC)) == [
        ethernet(b"new", to=OTHER_MAC)
    ]


def test_tables_are_not_the_bytes_of_the_last_command(memory: GuestMemory) -> None:
    """A refused table leaves the one before it in force."""
    world = World(memory)
    driver = world.drive(CONTROL)
    driver.set_receive_mode(CtrlRx.PROMISC, False)
    assert driver.set_mac_table([OTHER_MAC], [])
    assert driver.control(CtrlClass.MAC, CtrlMac.TABLE_SET, b"\1\0\0\0" + MULTICAST) == 1
    assert heard(world, driver, frame(OTHER_MAC, None)) == [frame(OTHER_MAC, None)]


# --- the filter by itself ------------------------------------------------------------------------


@given(to=destinations, tag=tags, vlans=st.none() | st.sets(st.integers(0, 0xFFF)))
def test_sixteen_bytes_decide(to: bytes, tag: int | None, vlans: set[int] | None) -> None:
    filters = ReceiveFilter(OUR_MAC)
    filters.promiscuous = False
    filters.vlans = vlans
    whole = frame(to, tag)
    assert filters.wants(whole[:16]) == filters.wants(whole)


@given(command=st.integers(0, 255), on=st.booleans())
def test_only_six_modes_are_commands(command: int, on: bool) -> None:
    assert ReceiveFilter(OUR_MAC).set_mode(command, on) == (command <= 5)
