"""The scripted guest of a network device, against a device written from the specification."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_device import EVENT_IDX, IN_ORDER, INDIRECT, RING_RESET, VERSION_1, SlowNet

from vq.abi import CtrlRx, Feature, NetFeature, Status, feature_mask
from vq.driver import DeviceError
from vq.errors import UsageError
from vq.memory import GuestMemory
from vq.net_driver import HEADER_APART, ONE_PIECE, Layout, NetDriver, NetHeader, ReceivedFrame

CSUM = 1 << NetFeature.CSUM
GUEST_CSUM = 1 << NetFeature.GUEST_CSUM
GUEST_TSO4 = 1 << NetFeature.GUEST_TSO4
GUEST_ECN = 1 << NetFeature.GUEST_ECN
GUEST_USO6 = 1 << NetFeature.GUEST_USO6
MRG_RXBUF = 1 << NetFeature.MRG_RXBUF
STATUS = 1 << NetFeature.STATUS
MAC = 1 << NetFeature.MAC
MTU = 1 << NetFeature.MTU
SPEED_DUPLEX = 1 << NetFeature.SPEED_DUPLEX
CTRL_VQ = 1 << NetFeature.CTRL_VQ
MQ = 1 << NetFeature.MQ

FRAME = bytes(range(60))
HEADER = NetHeader(flags=1, gso_type=1, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)

LAYOUTS = [
    ONE_PIECE,
    HEADER_APART,
    Layout(5),
    Layout(1, 2, 3, 12, 13),
    Layout(12, pieces=5),
    Layout(pieces=3, gap=7),
    Layout(12, indirect=True),
    Layout(5, 12, pieces=4, gap=64, indirect=True),
    Layout(6, 12, pieces=3, indirect=True, direct=2),
    Layout(indirect=True, direct=9),
]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 24 << 20)) as memory:
        yield memory


# --- probing -------------------------------------------------------------------------------------


def test_the_device_is_live_with_its_receive_queue_full(memory: GuestMemory) -> None:
    device = SlowNet(memory, MAC)
    driver = NetDriver(device, memory)
    assert device.status == 15
    assert driver.features == VERSION_1 | MAC
    assert sorted(device.queues) == [0, 1]
    assert device.queues[0].waiting == 256
    assert device.kicks == 1


def test_another_type_of_device_is_refused(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    device.device_id = 2
    with pytest.raises(DeviceError, match="device type 2 is no network device"):
        NetDriver(device, memory)


@pytest.mark.parametrize(
    ("offered", "wanted", "negotiated"),
    [
        ({"GUEST_TSO4", "GUEST_ECN"}, None, set()),
        (
            {"GUEST_TSO4", "GUEST_ECN", "GUEST_CSUM"},
            None,
            {"GUEST_TSO4", "GUEST_ECN", "GUEST_CSUM"},
        ),
        ({"HOST_TSO6", "HOST_ECN", "CSUM"}, {"HOST_ECN", "CSUM"}, {"CSUM"}),
        ({"HOST_TSO6", "HOST_ECN", "CSUM"}, {"HOST_ECN", "HOST_TSO6"}, set()),
        ({"MQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "GUEST_ANNOUNCE"}, None, set()),
        ({"RSS", "HASH_REPORT", "RSC_EXT", "STANDBY", "CTRL_VQ", "MAC"}, None, {"CTRL_VQ", "MAC"}),
    ],
)
def test_a_feature_is_accepted_only_with_what_it_needs(
    memory: GuestMemory, offered: set[str], wanted: set[str] | None, negotiated: set[str]
) -> None:
    def mask(names: set[str]) -> int:
        return feature_mask(NetFeature[name] for name in names)

    device = SlowNet(memory, mask(offered))
    wish = mask(set(NetFeature.__members__) if wanted is None else wanted)
    driver = NetDriver(device, memory, wish)
    assert driver.features == VERSION_1 | mask(negotiated)


@pytest.mark.parametrize(
    ("features", "mtu", "room"),
    [
        (0, 9000, 1526),
        (MTU, 1500, 1526),
        (MTU, 68, 1526),
        (MTU, 9000, 9026),
        (GUEST_CSUM | GUEST_TSO4, 1500, 65601),
        (GUEST_CSUM | GUEST_USO6, 1500, 65601),
        (GUEST_CSUM, 1500, 1526),
    ],
)
def test_a_chain_has_room_for_the_largest_frame(
    memory: GuestMemory, features: int, mtu: int, room: int
) -> None:
    device = SlowNet(memory, features, mtu=mtu)
    NetDriver(device, memory, queue_size=8)
    _, chain = device.queues[0].pop()
    assert sum(length for _, length, _ in chain) == room
    assert all(writable for _, _, writable in chain)


def test_a_frame_size_asked_for_is_made_room_for(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    NetDriver(device, memory, largest_frame=4000, receive_layout=Layout(5, 12, pieces=2))
    _, chain = device.queues[0].pop()
    assert [length for _, length, _ in chain] == [5, 7, 2000, 2000]


@pytest.mark.parametrize("queue_size", [1, 2, 16, 256])
@pytest.mark.parametrize("gso", [0, GUEST_CSUM | GUEST_TSO4])
def test_mergeable_buffers_hold_the_largest_frame_together(
    memory: GuestMemory, queue_size: int, gso: int
) -> None:
    device = SlowNet(memory, MRG_RXBUF | gso)
    driver = NetDriver(device, memory, queue_size=queue_size)
    frame = bytes(65589 if gso else 1514)
    assert device.deliver(frame)
    assert [received.data for received in driver.receive()] == [frame]


def test_a_layout_that_does_not_fit_the_queue_is_refused(memory: GuestMemory) -> None:
    device = SlowNet(memory, INDIRECT)
    with pytest.raises(UsageError, match="does not fit"):
        NetDriver(device, memory, queue_size=2, receive_layout=Layout(1, 2, 3))
    assert device.status & Status.FAILED
    with pytest.raises(UsageError, match="does not fit"):
        NetDriver(device, memory, queue_size=2, receive_layout=Layout(1, 2, indirect=True))


# --- transmitting --------------------------------------------------------------------------------


def test_a_frame_in_golden_bytes(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    assert driver.send(FRAME, HEADER, layout=Layout(5, 12))
    [(index, data, chain)] = device.sent
    assert index == 1
    assert data[:12] == bytes.fromhex("01 01 3600 a805 2200 1000 0000")
    assert data[12:] == FRAME
    assert [length for _, length, _ in chain] == [5, 7, 60]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
def test_any_layout_carries_the_frame_whole(
    memory: GuestMemory, layout: Layout, event_idx: int
) -> None:
    device = SlowNet(memory, INDIRECT | event_idx)
    driver = NetDriver(device, memory, queue_size=16, transmit_layout=layout)
    frames = [(HEADER, bytes([n]) * (n * 37 % 3000)) for n in range(100)]
    assert driver.send_burst(frames) == 100
    assert [data for _, data, _ in device.sent] == [HEADER.pack() + data for _, data in frames]
    assert driver.wait_sent() and driver.unsent() == 0


def test_pieces_with_a_gap_do_not_touch(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    driver.send(FRAME, layout=Layout(12, pieces=3, gap=100))
    chain = device.sent[0][2]
    assert [length for _, length, _ in chain] == [12, 20, 20, 20]
    gpas = [gpa for gpa, _, _ in chain]
    assert [b - a for a, b in itertools.pairwise(gpas)] == [112, 120, 120]


def test_a_burst_costs_one_kick(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    before = device.kicks
    assert driver.send_burst([(b"\0" * 12, FRAME)] * 200) == 200
    assert device.kicks == before + 1


def test_a_full_queue_takes_a_part_and_a_call_says_when_there_is_room(memory: GuestMemory) -> None:
    device = SlowNet(memory, EVENT_IDX)
    driver = NetDriver(device, memory, queue_size=8)
    device.silent = True
    frames = [(NetHeader(), bytes([n])) for n in range(12)]
    assert driver.send_burst(frames) == 8
    assert driver.unsent() == 8 and not driver.send(b"x")
    calls = driver.driver.calls
    device.transmit(1, limit=6)
    assert driver.driver.calls == calls, "asked to call only after three quarters"
    device.transmit(1, limit=1)
    assert driver.driver.calls == calls + 1
    assert driver.send_burst(frames[8:]) == 4
    device.silent = False
    device.transmit(1)
    assert [data[12:] for _, data, _ in device.sent] == [bytes([n]) for n in range(12)]


def test_transmit_buffers_are_used_again(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    driver.send_burst([(NetHeader(), FRAME)] * 50)
    before = driver.driver.allocator.available
    for _ in range(20):
        driver.send_burst([(NetHeader(), FRAME)] * 50)
    assert driver.driver.allocator.available == before


def test_guest_memory_full_of_frames_is_like_a_full_queue(memory: GuestMemory) -> None:
    with GuestMemory.allocate(1 << 20) as small:
        device = SlowNet(small)
        driver = NetDriver(device, small, receive_buffers=2)
        device.silent = True
        taken = driver.send_burst([(NetHeader(), bytes(65000))] * 100)
        assert 5 < taken < 16
        device.silent = False
        device.transmit(1)
        assert driver.send_burst([(NetHeader(), bytes(65000))] * 100) == 100
        with pytest.raises(UsageError):
            driver.send(bytes(2 << 20))


# --- receiving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("polling", [False, True])
@pytest.mark.parametrize("features", [0, EVENT_IDX, MRG_RXBUF, MRG_RXBUF | EVENT_IDX | IN_ORDER])
def test_frames_arrive_in_order_and_buffers_go_back(
    memory: GuestMemory, features: int, polling: bool
) -> None:
    device = SlowNet(memory, features)
    driver = NetDriver(device, memory, queue_size=16, polling=polling)
    got: list[ReceivedFrame] = []
    for number in range(100):
        assert device.deliver(bytes([number]) * 60)
        if number % 7 == 0:
            got += driver.receive()
    got += driver.receive()
    assert [frame.data for frame in got] == [bytes([n]) * 60 for n in range(100)]
    assert {frame.header for frame in got} == {NetHeader(num_buffers=1)}
    assert driver.receive() == []
    assert device.queues[0].waiting == 16
    if polling:
        assert driver.driver.calls == 0


def test_without_polling_only_a_call_makes_the_driver_look(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    device.calls_lost = True
    device.deliver(FRAME)
    assert driver.receive() == []
    device.calls_lost = False
    device.call(0)
    assert driver.receive() == [], "the device thinks it has called already"
    device.deliver(FRAME)
    assert len(driver.receive()) == 2
    device.calls_lost = True
    device.deliver(FRAME)
    assert driver.receive() == [], "one call is good for one look"


def test_a_limit_leaves_the_rest_for_the_next_time(memory: GuestMemory) -> None:
    device = SlowNet(memory, MRG_RXBUF)
    driver = NetDriver(device, memory)
    for number in range(10):
        device.deliver(bytes([number]) * 5000)
    sizes = []
    while frames := driver.receive(3):
        assert all(frame.buffers == 3 for frame in frames)
        sizes.append(len(frames))
    assert sizes == [3, 3, 3, 1]


def test_refilling_kicks_once(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    for _ in range(50):
        device.deliver(FRAME)
    before = device.kicks
    assert len(driver.receive()) == 50
    assert device.kicks == before + 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("mergeable", [0, MRG_RXBUF])
def test_buffers_of_any_layout_are_read_back_whole(
    memory: GuestMemory, layout: Layout, mergeable: int
) -> None:
    device = SlowNet(memory, INDIRECT | mergeable | GUEST_CSUM | GUEST_TSO4)
    driver = NetDriver(
        device,
        memory,
        queue_size=64,
        receive_layout=layout,
        receive_buffer_size=1000,
        largest_frame=20000,
    )
    for size in (0, 1, 14, 60, 987, 988, 989, 1514, 1988, 1989, 20000):
        frame = bytes(n * 7 & 0xFF for n in range(size))
        used = device.deliver(frame)
        assert used
        assert [(f.data, f.buffers) for f in driver.receive()] == [(frame, used)]


@pytest.mark.parametrize(
    ("features", "fields", "reason"),
    [
        (0, "00 00 0000 0000 0000 0000", None),
        (0, "01 00 0000 0000 0000 0000", "flags are 0x1 without GUEST_CSUM"),
        (0, "02 00 0000 0000 0000 0000", "flags are 0x2 without GUEST_CSUM"),
        (GUEST_CSUM, "02 00 0000 0000 0000 0000", None),
        (GUEST_CSUM, "04 00 0000 0000 0000 0000", "RSC_INFO"),
        (GUEST_CSUM, "01 00 0000 0000 2200 1000", None),
        (GUEST_CSUM, "01 00 0000 0000 2a00 1000", None),
        (GUEST_CSUM, "01 00 0000 0000 2b00 1000", "checksum ends at 61 of 60 bytes"),
        (GUEST_CSUM, "01 01 3600 a805 2200 1000", "gso_type 1 was not negotiated"),
        (GUEST_CSUM | GUEST_TSO4, "01 01 3600 a805 2200 1000", None),
        (GUEST_CSUM | GUEST_TSO4, "00 01 3600 a805 2200 1000", "without NEEDS_CSUM"),
        (GUEST_CSUM | GUEST_TSO4, "01 01 3600 0000 2200 1000", "gso_size 0"),
        (GUEST_CSUM | GUEST_TSO4, "01 81 3600 a805 2200 1000", "ECN without GUEST_ECN"),
        (GUEST_CSUM | GUEST_TSO4 | GUEST_ECN, "01 81 3600 a805 2200 1000", None),
        (GUEST_CSUM | GUEST_TSO4 | GUEST_ECN, "01 80 3600 a805 2200 1000", "ECN without a segm"),
        (GUEST_CSUM | GUEST_TSO4, "01 04 3600 a805 2200 1000", "gso_type 4 was not negotiated"),
        (GUEST_CSUM | GUEST_TSO4, "01 02 3600 a805 2200 1000", "gso_type 2 was not negotiated"),
        (GUEST_CSUM | GUEST_USO6, "01 05 2a00 a805 2200 0600", None),
    ],
)
def test_a_header_holds_only_what_was_negotiated(
    memory: GuestMemory, features: int, fields: str, reason: str | None
) -> None:
    device = SlowNet(memory, features)
    driver = NetDriver(device, memory, queue_size=8)
    for _ in range(2):
        device.deliver(FRAME, bytes.fromhex(fields))
        if reason is None:
            assert [frame.data for frame in driver.receive()] == [FRAME]
        else:
            with pytest.raises(DeviceError, match=reason) as caught:
                driver.receive()
            assert caught.value.section == "5.1.6.4.1"
            driver.restart()


@pytest.mark.parametrize(
    ("features", "size", "num_buffers", "shorten", "reason"),
    [
        (0, 60, 0, 0, "num_buffers is 0"),
        (MRG_RXBUF, 60, 0, 0, "num_buffers is 0"),
        (0, 60, 2, 0, "num_buffers is 2 without MRG_RXBUF"),
        (MRG_RXBUF, 60, 2, 0, "2 buffers announced, 1 used"),
        (MRG_RXBUF, 5000, 4, 0, "4 buffers announced, 3 used"),
        (MRG_RXBUF, 5000, None, 1, "before the last is not full"),
        (0, 60, None, 61, "a frame of 11 bytes has no whole header"),
    ],
)
def test_buffers_are_used_as_the_header_says(
    memory: GuestMemory,
    features: int,
    size: int,
    num_buffers: int | None,
    shorten: int,
    reason: str,
) -> None:
    device = SlowNet(memory, features)
    driver = NetDriver(device, memory)
    device.deliver(bytes(size), num_buffers=num_buffers, shorten=shorten)
    with pytest.raises(DeviceError, match=reason):
        driver.receive()


def test_a_header_without_a_frame_is_an_empty_frame(memory: GuestMemory) -> None:
    device = SlowNet(memory)
    driver = NetDriver(device, memory)
    device.deliver(b"")
    assert driver.receive() == [ReceivedFrame(NetHeader(num_buffers=1), b"", 1)]


@settings(max_examples=40, deadline=None)
@given(
    queue_size=st.sampled_from([1, 2, 4, 16]),
    features=st.lists(st.sampled_from([MRG_RXBUF, EVENT_IDX, INDIRECT]), unique=True).map(sum),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("in"), st.integers(0, 3000)),
            st.tuples(st.just("out"), st.integers(0, 3000)),
            st.tuples(st.just("receive"), st.one_of(st.none(), st.integers(1, 3))),
            st.tuples(st.just("work"), st.integers(0, 8)),
        ),
        max_size=40,
    ),
)
def test_nothing_is_lost_or_doubled_in_any_order_of_steps(
    queue_size: int, features: int, steps: list[tuple[str, int | None]]
) -> None:
    with GuestMemory.allocate(4 << 20) as memory:
        device = SlowNet(memory, features)
        driver = NetDriver(device, memory, queue_size=queue_size, largest_frame=3000)
        device.silent = True
        into: list[bytes] = []
        received: list[bytes] = []
        out: list[bytes] = []
        for number, (step, value) in enumerate(steps):
            data = struct.pack("<H", number) + bytes(max(0, (value or 0) - 2))
            if step == "in" and device.deliver(data):
                into.append(data)
            elif step == "out" and driver.send(data):
                out.append(bytes(12) + data)
            elif step == "receive":
                received += [frame.data for frame in driver.receive(value)]
            elif step == "work":
                device.transmit(1, limit=value or 0)
        device.transmit(1)
        while frames := driver.receive():
            received += [frame.data for frame in frames]
        assert received == into
        assert [data for _, data, _ in device.sent] == out
        assert driver.wait_sent()
        device.queues.clear()


# --- queue pairs and resets ----------------------------------------------------------------------


def test_pairs_are_set_up_asked_for_and_used(memory: GuestMemory) -> None:
    device = SlowNet(memory, MQ | CTRL_VQ, max_pairs=4)
    driver = NetDriver(device, memory, pairs=3)
    assert sorted(device.queues) == [0, 1, 2, 3, 4, 5, 8]
    assert [command[:3] for command in device.commands] == [(4, 0, b"\3\0")]
    assert driver.pairs == 3
    driver.send(b"two", pair=2)
    assert device.sent[0][0] == 5
    device.deliver(b"one", pair=1)
    device.deliver(b"nil", pair=0)
    assert [frame.data for frame in driver.receive()] == [b"nil", b"one"]
    assert driver.set_queue_pairs(1) and driver.pairs == 1
    for refused in (0, 4):
        with pytest.raises(UsageError):
            driver.set_queue_pairs(refused)


def test_more_pairs_than_the_device_has_are_refused(memory: GuestMemory) -> None:
    with pytest.raises(UsageError, match="2 queue pairs of a device that has 1"):
        NetDriver(SlowNet(memory, CTRL_VQ, max_pairs=4), memory, pairs=2)


def test_without_mq_the_control_queue_is_the_third(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ, max_pairs=4)
    NetDriver(device, memory)
    assert sorted(device.queues) == [0, 1, 2]


def test_a_restart_begins_anew_and_takes_no_more_memory(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ | MRG_RXBUF)
    driver = NetDriver(device, memory)
    driver.send(FRAME)
    before = driver.driver.allocator.available
    for _ in range(5):
        device.deliver(FRAME)
        driver.restart()
        assert driver.receive() == []
        driver.send(FRAME)
    assert driver.driver.allocator.available == before
    assert device.status == 15
    driver.close()
    assert driver.driver.allocator.available == memory.size
    assert device.status == 0 and device.on_queue_call is None


def test_one_queue_is_reset_and_goes_on(memory: GuestMemory) -> None:
    device = SlowNet(memory, RING_RESET | CTRL_VQ | INDIRECT)
    driver = NetDriver(device, memory, receive_layout=Layout(12, indirect=True))
    device.deliver(b"lost")
    device.silent = True
    driver.send(b"lost too")
    device.silent = False
    before = driver.driver.allocator.available
    for _ in range(3):
        for index in (0, 1, 2):
            driver.reset_queue(index)
    assert device.resets == 9 and driver.driver.allocator.available == before
    device.deliver(FRAME)
    assert [frame.data for frame in driver.receive()] == [FRAME]
    assert driver.send(FRAME) and [data[12:] for _, data, _ in device.sent] == [FRAME]
    assert driver.add_vlan(1)
    with pytest.raises(UsageError):
        driver.reset_queue(7)


def test_a_reset_of_one_queue_needs_the_feature(memory: GuestMemory) -> None:
    driver = NetDriver(SlowNet(memory), memory)
    with pytest.raises(UsageError, match="RING_RESET"):
        driver.reset_queue(0)


# --- commands ------------------------------------------------------------------------------------


def test_commands_in_golden_bytes(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ)
    driver = NetDriver(device, memory)
    one, two = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
    many = bytes.fromhex("01005e000001")
    assert driver.set_receive_mode(CtrlRx.PROMISC, True)
    assert driver.set_receive_mode(CtrlRx.NOBCAST, False)
    assert driver.set_mac_table([one, two], [many])
    assert driver.set_mac_table([], [])
    assert driver.set_mac(one)
    assert driver.add_vlan(0x0123)
    assert driver.remove_vlan(4094)
    assert driver.acknowledge_announce()
    assert driver.set_guest_offloads(GUEST_CSUM | GUEST_USO6)
    assert [bytes((c.command_class, c.command)) + c.payload for c in device.commands] == [
        bytes.fromhex(text)
        for text in (
            "00 00 01",
            "00 05 00",
            "01 00 02000000 020000000001 020000000002 01000000 01005e000001",
            "01 00 00000000 00000000",
            "01 01 020000000001",
            "02 00 2301",
            "02 01 fe0f",
            "03 00",
            "05 00 0200000000008000",
        )
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_command_in_any_layout(memory: GuestMemory, layout: Layout) -> None:
    device = SlowNet(memory, CTRL_VQ | INDIRECT | EVENT_IDX)
    driver = NetDriver(device, memory)
    payload = bytes(range(100))
    for _ in range(3):
        assert driver.control(9, 8, payload, layout=layout) == 0
        assert device.commands.pop()[:3] == (9, 8, payload)


def test_a_refused_command_says_so(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ)
    driver = NetDriver(device, memory)
    device.refuse_commands = True
    assert driver.control(200, 0) == 1
    assert not driver.add_vlan(1)


def test_a_command_without_an_answer_is_found_and_the_next_is_not_confused(
    memory: GuestMemory,
) -> None:
    device = SlowNet(memory, CTRL_VQ)
    turns: list[int] = []

    def idle() -> None:
        if turns:
            device.obey(turns.pop())
        time.sleep(0.001)

    driver = NetDriver(device, memory, timeout=0.3, idle=idle)
    device.silent = True
    with pytest.raises(DeviceError, match="no answer"):
        driver.add_vlan(1)
    device.obey(2)
    turns.append(2)
    assert driver.add_vlan(2)
    assert [command.payload for command in device.commands] == [b"\1\0", b"\2\0"]


def test_commands_need_the_control_queue(memory: GuestMemory) -> None:
    driver = NetDriver(SlowNet(memory), memory)
    with pytest.raises(UsageError, match="CTRL_VQ"):
        driver.add_vlan(1)


def test_a_device_in_another_thread_is_waited_for(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ)
    driver = NetDriver(device, memory)
    device.silent = True

    def work() -> None:
        deadline = time.monotonic() + 5
        while not device.queues[2].waiting and time.monotonic() < deadline:
            time.sleep(0.001)
        device.obey(2)

    worker = threading.Thread(target=work)
    worker.start()
    assert driver.add_vlan(1)
    worker.join(5)
    assert not worker.is_alive()


def test_a_device_in_this_thread_is_given_its_turn(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ)
    driver = NetDriver(device, memory, idle=lambda: device.obey(2))
    device.silent = True
    assert driver.add_vlan(1)


def test_a_device_that_needs_a_reset_is_not_waited_for(memory: GuestMemory) -> None:
    device = SlowNet(memory, CTRL_VQ)
    driver = NetDriver(device, memory, timeout=60)
    device.silent = True
    device._status |= Status.NEEDS_RESET
    device.change_config()
    assert driver.needs_reset
    with pytest.raises(DeviceError, match="no answer"):
        driver.add_vlan(1)
    device.silent = False
    driver.restart()
    assert not driver.needs_reset and driver.add_vlan(1)


# --- configuration -------------------------------------------------------------------------------


def test_the_configuration_is_read_as_far_as_negotiated(memory: GuestMemory) -> None:
    device = SlowNet(memory, MAC | STATUS | MQ | CTRL_VQ | MTU | SPEED_DUPLEX, max_pairs=4)
    driver = NetDriver(device, memory)
    assert driver.settings == (device.mac, True, False, 4, 1500, 1000, True)
    bare = SlowNet(memory)
    assert NetDriver(bare, memory, polling=True).settings == (
        None,
        True,
        False,
        1,
        None,
        None,
        None,
    )
    assert bare.config_reads == []
    partly = SlowNet(memory, STATUS)
    NetDriver(partly, memory)
    assert set(partly.config_reads) == {(0, 8)}


def test_unknown_speed_and_duplex_are_none(memory: GuestMemory) -> None:
    device = SlowNet(memory, SPEED_DUPLEX)
    driver = NetDriver(device, memory)
    device.speed, device.duplex = 0xFFFFFFFF, 0xFF
    device.change_config()
    assert driver.settings.speed is None and driver.settings.full_duplex is None
    device.speed, device.duplex = 0x7FFFFFFF, 0
    device.change_config()
    assert driver.settings.speed == 0x7FFFFFFF and driver.settings.full_duplex is False


def test_a_change_of_the_configuration_is_seen(memory: GuestMemory) -> None:
    device = SlowNet(memory, STATUS)
    driver = NetDriver(device, memory)
    assert driver.settings.link_up
    device.link_status = 2
    assert driver.settings.link_up, "not read again before the device says that it changed"
    device.change_config()
    assert not driver.settings.link_up and driver.settings.announce


# --- layouts -------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(1, 40), unique=True).map(sorted),
    pieces=st.integers(1, 9),
    gap=st.integers(0, 9),
    total=st.integers(0, 200),
)
def test_a_layout_divides_without_loss(cuts: list[int], pieces: int, gap: int, total: int) -> None:
    layout = Layout(*cuts, pieces=pieces, gap=gap)
    spans = layout.spans(total)
    assert sum(length for _, length in spans) == total
    assert all(length > 0 for _, length in spans) or not total
    for (start, length), (following, _) in itertools.pairwise(spans):
        assert following == start + length + gap
    ends = {sum(length for _, length in spans[: n + 1]) for n in range(len(spans))}
    assert {cut for cut in cuts if cut < total} <= ends
    assert layout.extent(total) == sum(spans[-1])
    assert layout.descriptors(total) == len(spans)


def test_no_layout_is_made_of_nonsense() -> None:
    for refused in (
        lambda: Layout(0),
        lambda: Layout(5, 3),
        lambda: Layout(5, 5),
        lambda: Layout(pieces=0),
        lambda: Layout(gap=-1),
        lambda: Layout(direct=-1, indirect=True),
    ):
        with pytest.raises(UsageError):
            refused()


def test_indirect_layouts_need_the_feature(memory: GuestMemory) -> None:
    driver = NetDriver(SlowNet(memory), memory)
    with pytest.raises(UsageError, match="INDIRECT_DESC"):
        driver.send(FRAME, layout=Layout(indirect=True))
    assert not driver.has_feature(Feature.INDIRECT_DESC)
