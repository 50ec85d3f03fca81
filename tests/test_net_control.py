"""The control queue: every command, valid, malformed and not negotiated; queue pairs."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import make_frame, make_payload
from net_world import (
    OTHER_MAC,
    OUR_MAC,
    PLAIN,
    VERSION_1,
    WRITE,
    ScriptedLink,
    World,
    ethernet,
    features,
    snapshot,
    tcp_header,
    touched_outside,
    udp_header,
    used_parts,
)

from vq.abi import CtrlClass, CtrlMq, NetFeature, NetStatus, Status
from vq.errors import DriverError
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.net_driver import HEADER_APART, ONE_PIECE, Layout, NetDriver
from vq.offload import Offload

pytestmark = pytest.mark.usefixtures("over")

OK, ERR = 0, 1
FRAME = ethernet(bytes(46))
CONTROLS = (
    *("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "MAC", "STATUS"),
    *("CTRL_GUEST_OFFLOADS", "GUEST_ANNOUNCE", "MQ", "GUEST_CSUM", "GUEST_TSO4"),
)
TWO_TABLES = b"\1\0\0\0" + OTHER_MAC + b"\2\0\0\0" + b"\1" * 12


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 12 << 20)) as memory:
        yield memory


# --- commands ------------------------------------------------------------------------------------

GOOD = [
    (0, 0, b"\1", "CTRL_RX"),
    (0, 0, b"\0", "CTRL_RX"),
    (0, 1, b"\1", "CTRL_RX"),
    (0, 2, b"\1", "CTRL_RX_EXTRA"),
    (0, 3, b"\1", "CTRL_RX_EXTRA"),
    (0, 4, b"\1", "CTRL_RX_EXTRA"),
    (0, 5, b"\1", "CTRL_RX_EXTRA"),
    (1, 0, bytes(8), "CTRL_RX"),
    (1, 0, TWO_TABLES, "CTRL_RX"),
    (1, 1, OTHER_MAC, "CTRL_MAC_ADDR"),
    (2, 0, b"\x05\x00", "CTRL_VLAN"),
    (2, 1, b"\xff\x0f", "CTRL_VLAN"),
    (3, 0, b"", "GUEST_ANNOUNCE"),
    (4, 0, b"\1\0", "MQ"),
    (4, 0, b"\3\0", "MQ"),
    (5, 0, bytes(8), "CTRL_GUEST_OFFLOADS"),
    (5, 0, b"\x82" + bytes(7), "CTRL_GUEST_OFFLOADS"),
]


@pytest.mark.parametrize(("kind", "command", "payload", "needed"), GOOD)
@pytest.mark.parametrize(
    "layout", [ONE_PIECE, Layout(1, 2), Layout(pieces=5, gap=3), Layout(2, indirect=True)]
)
def test_a_command_needs_its_feature_and_no_layout(
    memory: GuestMemory, kind: int, command: int, payload: bytes, needed: str, layout: Layout
) -> None:
    world = World(memory, queue_pairs=3)
    driver = world.drive(features(*CONTROLS, "INDIRECT_DESC"))
    assert driver.control(kind, command, payload, layout=layout) == OK
    driver.close()
    driver = world.drive(features(*(set(CONTROLS) - {needed}), "INDIRECT_DESC"))
    assert driver.control(kind, command, payload, layout=layout) == ERR, "not negotiated"
    assert not driver.needs_reset
    assert world.device.stats["control_commands"] == 1
    assert world.device.stats["control_refused"] == 1


BAD = [
    (0, 0, b""),
    (0, 0, b"\1\0"),
    (0, 6, b"\1"),
    (0, 255, b"\1"),
    (1, 0, b""),
    (1, 0, bytes(3)),
    (1, 0, bytes(4)),
    (1, 0, bytes(7)),
    (1, 0, bytes(9)),
    (1, 0, b"\1\0\0\0" + bytes(5)),
    (1, 0, TWO_TABLES[:-1]),
    (1, 0, TWO_TABLES + b"\0"),
    (1, 0, b"\xff\xff\xff\xff" + bytes(100)),
    (1, 0, bytes(4) + b"\xff\xff\xff\x7f"),
    (1, 1, OTHER_MAC[:5]),
    (1, 1, OTHER_MAC + b"\0"),
    (1, 1, b"\1" + OTHER_MAC[1:]),
    (1, 2, OTHER_MAC),
    (2, 0, b"\5"),
    (2, 0, b"\5\0\0"),
    (2, 0, b"\x00\x10"),
    (2, 2, b"\5\0"),
    (3, 1, b""),
    (4, 0, b"\0\0"),
    (4, 0, b"\4\0"),
    (4, 0, b"\xff\xff"),
    (4, 0, b"\1"),
    (4, 0, b"\1\0\0\0"),
    (4, 1, bytes(20)),
    (4, 2, bytes(20)),
    (5, 0, bytes(4)),
    (5, 0, bytes(9)),
    (5, 1, bytes(8)),
    (5, 0, b"\x01" + bytes(7)),
    (5, 0, b"\x00\x08" + bytes(6)),
    (5, 0, b"\x00\x01" + bytes(6)),
    (5, 0, b"\xff" * 8),
    (6, 0, bytes(8)),
    (7, 0, bytes(4)),
    (255, 255, b"\xff"),
]


@pytest.mark.parametrize(("kind", "command", "payload"), BAD)
def test_a_malformed_command_is_refused_and_changes_nothing(
    memory: GuestMemory, kind: int, command: int, payload: bytes
) -> None:
    link = ScriptedLink(ports=3)
    world = World(memory, link, queue_pairs=3)
    driver = world.drive(features(*CONTROLS, "CSUM", "HOST_TSO4"))
    before = (vars(world.device.filter).copy(), world.device.read_config(0, 24))
    asked = link.requested[-1], link.activated[-1]
    assert driver.control(kind, command, payload) == ERR
    assert (vars(world.device.filter), world.device.read_config(0, 24)) == before
    assert (link.requested[-1], link.activated[-1]) == asked
    assert not driver.needs_reset
    assert driver.control(0, 0, b"\1") == OK


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=40)
    | st.tuples(st.sampled_from(range(6)), st.sampled_from(range(3)), st.binary(max_size=24)).map(
        lambda parts: bytes(parts[:2]) + parts[2]
    ),
    cuts=st.lists(st.integers(0, 40), max_size=5).map(sorted),
)
def test_any_bytes_get_an_answer(data: bytes, cuts: list[int]) -> None:
    with GuestMemory.allocate(1 << 20) as memory:
        world = World(memory, queue_pairs=2)
        guest = world.raw(-1, queue_size=16)
        edges = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
        pieces = [data[a:b] for a, b in itertools.pairwise(edges) if b > a]
        ack = guest.room(2)
        buffers = [guest.put(piece) for piece in pieces]
        guest.offer(4, buffers, [ack], kick=False)
        before = snapshot(memory)
        guest.driver.kick(4)
        ring = guest.ring(4)
        allowed = [*used_parts(ring), (ring.avail, 4 + 2 * ring.size), (ack[0], 1)]
        assert not touched_outside(memory, before, allowed)
        answers = guest.used(4)
        assert [written for _, written in answers] == [1]
        assert memory.read(ack[0], 1)[0] in (OK, ERR)
        assert not world.device.status & Status.NEEDS_RESET


def test_a_command_without_room_for_its_ack_needs_a_reset(memory: GuestMemory) -> None:
    world = World(memory)
    guest = world.raw(features("CTRL_VQ", "CTRL_RX"))
    good = guest.room(1)
    guest.offer(2, [guest.put(b"\0\0\1")], [good], kick=False)
    guest.offer(2, [guest.put(b"\0\0\0")], kick=False)
    guest.driver.kick(2)
    assert guest.used(2) == [(0, 1), (2, 0)]
    assert memory.read(good[0], 1) == b"\0", "what came before it was done"
    assert isinstance(world.device.fault, DriverError)
    assert world.device.fault.section == "5.1.6.5"
    assert world.device.filter.promiscuous, "not carried out"
    driver = world.drive()
    assert driver.control(0, 0, b"\1") == OK


def test_a_command_without_a_single_byte_is_refused(memory: GuestMemory) -> None:
    guest = World(memory).raw(features("CTRL_VQ"))
    ack = guest.room(1)
    guest.offer(2, (), [ack])
    assert guest.used(2) == [(0, 1)] and memory.read(ack[0], 1) == b"\1"


def test_gigabytes_of_command_are_refused_without_a_copy(memory: GuestMemory) -> None:
    """Only what a command may have is looked at."""
    world = World(memory, control_queue_size=256)
    guest = world.raw(features("CTRL_VQ", "CTRL_RX"))
    ack = guest.room(1)
    huge = [(0x4000000, 12 << 20, 0)] * 255
    tracemalloc.start()
    try:
        guest.offer_unruly(2, *huge, (*ack, WRITE))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert guest.used_raw(2) == [(0, 1)]
    assert memory.read(ack[0], 1) == b"\1"
    assert not world.device.status & Status.NEEDS_RESET


def test_the_longest_command_is_carried_out(memory: GuestMemory) -> None:
    driver = World(memory).drive()
    count = (65536 - 2 - 8) // 6
    table = struct.pack("<I", count) + OTHER_MAC * count + bytes(4)
    assert driver.control(1, 0, table) == OK
    assert driver.control(1, 0, struct.pack("<I", count + 1) + OTHER_MAC * (count + 1) + bytes(4))


def test_only_the_first_byte_behind_the_command_is_written(memory: GuestMemory) -> None:
    guest = World(memory).raw(features("CTRL_VQ", "CTRL_RX"))
    room = guest.room(50)
    guest.offer(2, [guest.put(b"\0\0\1")], [room])
    assert guest.used(2) == [(0, 1)]
    assert memory.read(*room) == b"\0" + b"\xa5" * 49


def test_many_commands_with_one_kick(memory: GuestMemory) -> None:
    world = World(memory, control_queue_size=256)
    guest = world.raw(features("CTRL_VQ", "CTRL_VLAN"))
    acks = []
    for vlan in range(100):
        acks.append(guest.room(1))
        guest.offer(2, [guest.put(b"\2\0" + struct.pack("<H", vlan))], [acks[-1]], kick=False)
    guest.driver.kick(2)
    assert len(guest.used(2)) == 100
    assert {memory.read(gpa, 1) for gpa, _ in acks} == {b"\0"}
    assert world.device.filter.vlans == set(range(100))


def test_without_ctrl_vq_queue_2_is_no_control_queue(memory: GuestMemory) -> None:
    world = World(memory)
    guest = world.raw(VERSION_1)
    ack = guest.room(1)
    guest.offer(2, [guest.put(b"\0\0\0")], [ack])
    assert guest.used(2) == [] and memory.read(ack[0], 1) == b"\xa5"
    assert world.device.filter.promiscuous


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [ONE_PIECE, HEADER_APART, Layout(3, 4, 5)])
def test_the_address_is_in_the_configuration_before_the_ack(
    memory: GuestMemory, layout: Layout
) -> None:
    """virtio 1.3, 5.1.6.5.2.1."""
    world = World(memory)
    driver = world.drive()
    generation = world.device.config_generation
    seen: list[bytes] = []
    noted = world.device.on_queue_call
    world.device.on_queue_call = lambda index: seen.append(world.device.read_config(0, 6))
    assert driver.control(1, 1, OTHER_MAC, layout=layout) == OK
    world.device.on_queue_call = noted
    assert world.device.read_config(0, 6) == OTHER_MAC
    assert set(seen) <= {OTHER_MAC}
    assert world.device.config_generation != generation
    driver.restart()
    assert driver.settings.mac == OUR_MAC, "a reset brings the first one back"


def test_a_locked_mac_stays(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link, lock_mac=True)
    driver = world.drive()
    assert not driver.set_mac(OTHER_MAC)
    assert driver.settings.mac == OUR_MAC
    driver.send(ethernet(b"", source=OTHER_MAC))
    link.deliver(ethernet(b"", to=OTHER_MAC))
    assert link.port.written == [] and driver.receive() == []


def test_the_configuration_cannot_be_written(memory: GuestMemory) -> None:
    world = World(memory)
    world.drive()
    before = world.device.read_config(0, 24)
    world.device.write_config(0, b"\xff" * 24)
    assert world.device.read_config(0, 24) == before
    assert world.device.stats["config_writes_ignored"] == 1


def test_a_reset_inside_the_notification_of_a_new_address_leaves_no_ack(
    memory: GuestMemory,
) -> None:
    """The command's memory is the driver's again when the reset returns."""
    world = World(memory)
    guest = world.raw(features("CTRL_VQ", "CTRL_MAC_ADDR", "MAC"))
    ack = guest.room(1)
    world.device.on_config_change = lambda: world.device.write_status(0)
    guest.offer(2, [guest.put(b"\1\1" + OTHER_MAC)], [ack])
    assert memory.read(*ack) == b"\xa5"
    assert world.device.status == 0 and world.device.fault is None
    assert world.device.read_config(0, 6) == OUR_MAC


# --- announcing ----------------------------------------------------------------------------------


def test_a_guest_is_asked_to_announce_itself_until_it_did(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive()
    world.device.announce()
    assert driver.settings.announce and driver.settings.link_up
    assert driver.acknowledge_announce()
    assert not driver.settings.announce and driver.settings.link_up
    assert world.device.config_status == NetStatus.LINK_UP
    world.device.announce()
    driver.restart()
    assert not driver.settings.announce, "a request of before the reset is over"


def test_who_did_not_negotiate_it_is_not_asked(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(features("CTRL_VQ", "STATUS"))
    world.device.announce()
    assert not driver.settings.announce and driver.driver.config_changes == 0
    assert driver.control(3, 0) == ERR


# --- guest offloads ------------------------------------------------------------------------------

TSO4 = 1 << NetFeature.GUEST_TSO4
CSUM = 1 << NetFeature.GUEST_CSUM


def test_offloads_are_turned_off_and_on(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive(features("GUEST_CSUM", "GUEST_TSO4", "CTRL_VQ", "CTRL_GUEST_OFFLOADS"))
    frame, header = make_frame(make_payload(3000)), tcp_header(1000)

    def shape() -> list[tuple[int, int]]:
        link.deliver(frame, header=header.pack())
        return [(got.header.flags, got.header.gso_size) for got in driver.receive()]

    assert shape() == [(1, 1000)], "on as soon as negotiated (virtio 1.3, 5.1.6.5.8.1)"
    assert driver.set_guest_offloads(CSUM)
    assert link.requested[-1:] == [Offload.CSUM]
    assert shape() == [(1, 0)] * 3
    assert driver.set_guest_offloads(0)
    assert link.requested[-1:] == [Offload.NONE]
    assert shape() == [(0, 0)] * 3
    assert driver.set_guest_offloads(CSUM | TSO4)
    assert shape() == [(1, 1000)]
    assert driver.set_guest_offloads(TSO4), "TSO without a checksum to leave undone means nothing"
    assert shape() == [(0, 0)] * 3


def test_offloads_that_were_not_negotiated_are_refused(memory: GuestMemory) -> None:
    link = ScriptedLink()
    driver = World(memory, link).drive(
        features("GUEST_CSUM", "GUEST_TSO4", "CTRL_VQ", "CTRL_GUEST_OFFLOADS", "CSUM", "HOST_TSO4")
    )
    for name in ("GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "CSUM", "HOST_TSO4", "MRG_RXBUF"):
        assert not driver.set_guest_offloads(CSUM | 1 << NetFeature[name]), name
    link.deliver(make_frame(make_payload(3000)), header=tcp_header(1000).pack())
    assert driver.receive()[0].header.gso_size == 1000


def test_frames_that_wait_for_room_follow_the_offloads_too(memory: GuestMemory) -> None:
    """After the ack a guest that turned offloads off may get no frame with work undone."""
    link = ScriptedLink()
    guest = World(memory, link).raw(
        features("GUEST_CSUM", "CTRL_VQ", "CTRL_GUEST_OFFLOADS", "MRG_RXBUF")
    )
    first = guest.room(100)
    guest.offer(0, (), [first])
    link.deliver(make_frame(make_payload(300), protocol=17), header=udp_header().pack())
    guest.offer(2, [guest.put(b"\5\0" + bytes(8))], [guest.room(1)])
    assert guest.used(2) and guest.used(0) == []
    guest.offer(0, (), [guest.room(1000)])
    assert len(guest.used(0)) == 2
    assert memory.read(first[0], 12) == bytes(10) + b"\2\0"


# --- queue pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "control"), [(("CTRL_VQ", "MQ"), 6), (("CTRL_VQ",), 2), (("CTRL_VQ", "STATUS"), 2)]
)
def test_the_control_queue_is_behind_the_queues_that_were_negotiated(
    memory: GuestMemory, names: Sequence[str], control: int
) -> None:
    """virtio 1.3, 5.1.2."""
    world = World(memory, queue_pairs=3)
    guest = world.raw(features(*names, "CTRL_RX"))
    for index in range(7):
        before = world.device.stats["control_commands"]
        guest.offer(index, [guest.put(b"\0\0\1")], [guest.room(1)])
        if world.device.status & Status.NEEDS_RESET:
            guest = world.raw(features(*names, "CTRL_RX"))
        assert (world.device.stats["control_commands"] > before) == (index == control)


def paired(memory: GuestMemory, ports: int, pairs: int) -> tuple[World, ScriptedLink, NetDriver]:
    link = ScriptedLink(ports=ports)
    world = World(memory, link, queue_pairs=4)
    return world, link, world.drive(pairs=pairs, receive_buffers=8)


def test_each_pair_has_its_port(memory: GuestMemory) -> None:
    _, link, driver = paired(memory, 4, 4)
    assert link.activated[-1] == 4
    for pair in range(4):
        driver.send(ethernet(bytes([pair])), pair=pair)
        link.deliver(ethernet(bytes([pair, pair])), pair=pair)
    for pair, port in enumerate(link.scripted):
        assert port.frames == [ethernet(bytes([pair]))]
    assert [got.data for got in driver.receive()] == [ethernet(bytes([n, n])) for n in range(4)]
    assert [len(queue.ring.collect()) for queue in driver._receive] == [0] * 4


def test_only_the_first_pair_is_in_use_before_the_command(memory: GuestMemory) -> None:
    """virtio 1.3, 5.1.6.5.6.2."""
    link = ScriptedLink(ports=2)
    world = World(memory, link, queue_pairs=2)
    guest = world.raw(features("CTRL_VQ", "MQ", "MRG_RXBUF"))
    for index in (0, 2):
        guest.offer(index, (), [guest.room(1000)])
    assert link.activated[-1] == 1
    link.deliver(FRAME, pair=1)
    link.deliver(FRAME, pair=0)
    assert not world.device.inject(FRAME, pair=1)
    assert len(guest.used(0)) == 1 and guest.used(2) == []
    guest.offer(4, [guest.put(b"\4\0\2\0")], [guest.room(1)])
    assert link.activated[-1] == 2
    assert len(guest.used(2)) == 1, "what waited there comes at once"
    assert world.device.inject(FRAME, pair=1)


def test_pairs_are_taken_out_of_use_again(memory: GuestMemory) -> None:
    world, link, driver = paired(memory, 4, 4)
    assert driver.control(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\2\0") == OK
    assert link.activated[-1] == 2
    for pair in range(4):
        link.deliver(ethernet(bytes([pair])), pair=pair)
    assert [got.data for got in driver.receive()] == [ethernet(b"\0"), ethernet(b"\1")]
    for pair in (2, 3):
        world.device.notify(2 * pair)
    assert driver.receive() == []
    assert driver.set_queue_pairs(3)
    assert [got.data for got in driver.receive()] == [ethernet(b"\2")]
    driver.restart()
    assert link.activated[-1] == 4


def test_frames_that_waited_in_a_pair_do_not_come_once_it_is_out_of_use(
    memory: GuestMemory,
) -> None:
    link = ScriptedLink(ports=2)
    world = World(memory, link, queue_pairs=2)
    guest = world.raw(features("CTRL_VQ", "MQ", "MRG_RXBUF"))
    guest.offer(4, [guest.put(b"\4\0\2\0")], [guest.room(1)])
    guest.offer(2, (), [guest.room(50)])
    link.deliver(FRAME, pair=1)
    guest.offer(4, [guest.put(b"\4\0\1\0")], [guest.room(1)])
    assert len(guest.used(4)) == 2
    guest.offer(2, (), [guest.room(50)])
    assert guest.used(2) == []
    assert sum(world.dropped("rx").values()) == 1


def test_pairs_without_a_port_send_through_the_others(memory: GuestMemory) -> None:
    world, link, driver = paired(memory, 2, 4)
    assert link.activated[-1] == 2
    for pair in range(4):
        driver.send(ethernet(bytes([pair])), pair=pair)
    assert link.scripted[0].frames == [ethernet(b"\0"), ethernet(b"\2")]
    assert link.scripted[1].frames == [ethernet(b"\1"), ethernet(b"\3")]
    assert world.device.stats["tx_frames"] == 4


def test_a_reset_brings_one_pair_back(memory: GuestMemory) -> None:
    world, link, driver = paired(memory, 4, 4)
    driver.driver.reset()
    assert link.activated[-1] == 1
    driver = world.drive(receive_buffers=8)
    link.deliver(FRAME, pair=1)
    assert driver.receive() == []


def test_pairs_over_a_loopback_do_not_mix(memory: GuestMemory) -> None:
    driver = World(memory, LoopbackLink(ports=4), queue_pairs=4).drive(pairs=4, receive_buffers=16)
    for pair in range(4):
        driver.send_burst([(PLAIN, ethernet(bytes([pair, n]))) for n in range(8)], pair=pair)
    assert [got.data for got in driver.receive()] == [
        ethernet(bytes([pair, n])) for pair in range(4) for n in range(8)
    ]
