"""The net device: what it offers, frames towards the host, and its life from reset to reset."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import MACS, UDP, make_frame, make_payload, slow_sum
from net_world import (
    BROADCAST,
    OTHER_MAC,
    OUR_MAC,
    PLAIN,
    VERSION_1,
    WRITE,
    RawGuest,
    ScriptedLink,
    World,
    ethernet,
    features,
    tcp_header,
    udp_header,
)

from vq.abi import Feature, NetFeature, Status, bits, feature_mask
from vq.errors import DriverError, UsageError
from vq.link import MOST_AT_ONCE, Frame, LoopbackLink, NullLink, link_pair
from vq.memory import GuestMemory
from vq.net import DEFAULT_MAC, NetDevice
from vq.net_driver import Layout, NetDriver, NetHeader
from vq.offload import ALL, Offload, guest_offloads

pytestmark = pytest.mark.usefixtures("over")

FRAME = ethernet(bytes(range(46)), to=OTHER_MAC, source=OUR_MAC)
ALL_HOST = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x100000, 1 << 20), (0x4000000, 8 << 20)) as memory:
        yield memory


def names(mask: int) -> set[str]:
    known = {int(f): f.name for f in (*Feature, *NetFeature)}
    return {known[bit] for bit in bits(mask)}


# --- what is offered -----------------------------------------------------------------------------

USUAL = {
    *("INDIRECT_DESC", "EVENT_IDX", "VERSION_1", "IN_ORDER", "RING_RESET"),
    *("MAC", "STATUS", "SPEED_DUPLEX", "MRG_RXBUF"),
    *("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO"),
    *("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6"),
    *("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR"),
    *("CTRL_GUEST_OFFLOADS", "GUEST_ANNOUNCE"),
}


def test_everything_that_works_is_offered_and_nothing_else() -> None:
    assert names(NetDevice(NullLink()).device_features) == USUAL
    assert names(NetDevice(NullLink(), mtu=1500).device_features) == USUAL | {"MTU"}
    assert names(NetDevice(NullLink(), queue_pairs=2).device_features) == USUAL | {"MQ"}


def test_offloads_do_not_depend_on_the_link() -> None:
    bare = NetDevice(ScriptedLink(Offload.NONE)).device_features
    assert bare == NetDevice(ScriptedLink(ALL)).device_features


@pytest.mark.parametrize(
    ("missing", "also"),
    [
        ("CSUM", {"HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO"}),
        ("GUEST_CSUM", {"GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6"}),
        ("HOST_TSO4", set()),
        (
            "CTRL_VQ",
            {
                *("CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR"),
                *("CTRL_GUEST_OFFLOADS", "GUEST_ANNOUNCE", "MQ"),
            },
        ),
    ],
)
def test_what_needs_a_feature_that_is_left_out_is_left_out_too(
    missing: str, also: set[str]
) -> None:
    limit = ~(1 << NetFeature[missing])
    offered = NetDevice(NullLink(), queue_pairs=2, features=limit).device_features
    assert names(offered) == (USUAL | {"MQ"}) - {missing} - also


NEEDS = [
    ("GUEST_TSO4", ["GUEST_CSUM"]),
    ("GUEST_TSO6", ["GUEST_CSUM"]),
    ("GUEST_USO4", ["GUEST_CSUM"]),
    ("GUEST_USO6", ["GUEST_CSUM"]),
    ("GUEST_ECN", ["GUEST_CSUM", "GUEST_TSO4"]),
    ("GUEST_ECN", ["GUEST_CSUM", "GUEST_TSO6"]),
    ("HOST_TSO4", ["CSUM"]),
    ("HOST_TSO6", ["CSUM"]),
    ("HOST_USO", ["CSUM"]),
    ("HOST_ECN", ["CSUM", "HOST_TSO4"]),
    ("HOST_ECN", ["CSUM", "HOST_TSO6"]),
    ("CTRL_RX", ["CTRL_VQ"]),
    ("CTRL_VLAN", ["CTRL_VQ"]),
    ("GUEST_ANNOUNCE", ["CTRL_VQ"]),
    ("MQ", ["CTRL_VQ"]),
    ("CTRL_MAC_ADDR", ["CTRL_VQ"]),
]


@pytest.mark.parametrize(("feature", "needed"), NEEDS)
def test_features_ok_needs_what_a_feature_needs(feature: str, needed: list[str]) -> None:
    """virtio 1.3, 5.1.3.1, feature by feature."""
    device = NetDevice(NullLink(), queue_pairs=2)

    def agree(mask: int) -> bool:
        device.write_status(0)
        device.write_status(3)
        device.accept_features(mask)
        device.write_status(11)
        return bool(device.status & Status.FEATURES_OK)

    assert agree(features(feature, *needed))
    for missing in needed:
        assert not agree(features(feature, *(n for n in needed if n != missing))), missing
    assert not agree(features(feature, *needed) & ~VERSION_1)


@pytest.mark.parametrize("feature", ["MTU", "MQ", "HASH_REPORT", "RSS", "GUEST_UFO", "HOST_UFO"])
def test_what_was_not_offered_is_refused(feature: str) -> None:
    device = NetDevice(NullLink())
    device.write_status(3)
    device.accept_features(features(feature, "CTRL_VQ", "CSUM", "GUEST_CSUM"))
    device.write_status(11)
    assert not device.status & Status.FEATURES_OK


def test_the_configuration_in_golden_bytes() -> None:
    device = NetDevice(NullLink(), mac=OUR_MAC, mtu=9000, speed=10000, queue_pairs=3)
    assert device.read_config(0, 24) == bytes.fromhex(
        "020000000003 0100 0300 2823 10270000 01 00 0000 00000000"
    )
    unknown = NetDevice(ScriptedLink())
    assert unknown.read_config(0, 6) == DEFAULT_MAC
    assert unknown.read_config(12, 5) == bytes.fromhex("ffffffff ff")
    assert DEFAULT_MAC[0] & 3 == 2, "locally administered, unicast"


@pytest.mark.parametrize(
    "options",
    [
        {"mac": b"\x01" + bytes(5)},
        {"mac": bytes(6)},
        {"mac": bytes(5)},
        {"mtu": 67},
        {"mtu": 65536},
        {"speed": -1},
        {"speed": 1 << 31},
        {"queue_pairs": 0},
        {"queue_pairs": 0x8001},
        {"queue_size": 3},
        {"queue_size": 65536},
        {"features": 0},
    ],
    ids=str,
)
def test_no_device_is_made_of_nonsense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        NetDevice(NullLink(), **options)  # type: ignore[arg-type]


def test_the_driver_sees_the_settings(memory: GuestMemory) -> None:
    world = World(memory, mtu=1400, speed=1000, queue_pairs=2)
    assert world.drive().settings == (OUR_MAC, True, False, 2, 1400, 1000, True)


def test_the_link_starts_down_when_it_has_no_carrier(memory: GuestMemory) -> None:
    link = ScriptedLink()
    link.up = False
    assert not World(memory, link).drive().settings.link_up


# --- towards the host: layouts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_world(over: str) -> Iterator[tuple[World, NetDriver]]:
    with GuestMemory.allocate(16 << 20) as memory:
        world = World(memory)
        yield world, world.drive(queue_size=64)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 80), unique=True, max_size=12).map(sorted),
    pieces=st.integers(1, 5),
    gap=st.integers(0, 9),
    indirect=st.booleans(),
    direct=st.integers(0, 3),
    length=st.integers(0, 200),
    num_buffers=st.sampled_from((0, 1, 0xFFFF)),
)
def test_header_and_frame_lie_over_descriptors_in_any_way(
    plain_world: tuple[World, NetDriver],
    cuts: list[int],
    pieces: int,
    gap: int,
    indirect: bool,
    direct: int,
    length: int,
    num_buffers: int,
) -> None:
    world, driver = plain_world
    assert isinstance(world.link, ScriptedLink)
    world.link.port.written.clear()
    frame = make_payload(length)
    layout = Layout(*cuts, pieces=pieces, gap=gap, indirect=indirect, direct=direct)
    assert driver.send(frame, NetHeader(num_buffers=num_buffers), layout=layout)
    assert world.link.port.written == [(PLAIN, frame)]
    assert driver.wait_sent()


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 120), unique=True, max_size=20).map(sorted),
    gap=st.integers(0, 5),
    link_takes=st.sampled_from((ALL, Offload.CSUM, Offload.NONE)),
    udp=st.booleans(),
)
def test_undone_frames_lie_over_descriptors_in_any_way(
    plain_world: tuple[World, NetDriver],
    cuts: list[int],
    gap: int,
    link_takes: Offload,
    udp: bool,
) -> None:
    """Past bug: a field that crossed two buffers was read from the wrong one."""
    world, driver = plain_world
    link = world.link
    assert isinstance(link, ScriptedLink)
    link.port.written.clear()
    link.accepts = link_takes
    frame = make_frame(make_payload(301), protocol=UDP if udp else 6)
    header = udp_header(100) if udp else tcp_header(100)
    assert driver.send(frame, header, layout=Layout(*cuts, gap=gap))
    if link_takes == ALL:
        assert link.port.written == [(header.pack(), frame)]
    else:
        start = 34 + (8 if udp else 20)
        assert [len(data) - start for data in link.port.frames] == [100, 100, 100, 1]
        assert b"".join(data[start:] for data in link.port.frames) == make_payload(301)
        if not link_takes:
            for written, data in link.port.written:
                assert written == PLAIN
                assert_whole(data, udp=udp)


def assert_whole(frame: bytes, *, udp: bool = False, version: int = 4) -> None:
    """IP length, IP header checksum and transport checksum are what a receiver expects."""
    if version == 4:
        header, transport = frame[14:34], frame[34:]
        assert int.from_bytes(header[2:4], "big") == len(frame) - 14
        assert slow_sum(header) == 0xFFFF
        addresses = header[12:20]
    else:
        assert int.from_bytes(frame[18:20], "big") == len(frame) - 54
        addresses, transport = frame[22:54], frame[54:]
    pseudo = addresses + len(transport).to_bytes(4, "big") + bytes((0, 0, 0, 17 if udp else 6))
    assert slow_sum(pseudo + transport) == 0xFFFF


def test_a_chain_of_exactly_queue_size_descriptors_is_a_frame(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive(queue_size=8)
    assert driver.send(FRAME, layout=Layout(1, 2, 3, 5, 12, 13, 14))
    assert world.link.port.frames == [FRAME]  # type: ignore[attr-defined]


def test_the_header_has_12_bytes_whatever_descriptors_say(memory: GuestMemory) -> None:
    """Past bug (QEMU CVE-2023-6693): 10, 12 and 20 bytes of header were confused."""
    link = ScriptedLink()
    guest = World(memory, link).raw()
    for size in (10, 12, 20):
        data = bytes(12) + FRAME
        guest.offer(1, [guest.put(data[:size]), guest.put(data[size:])])
    assert link.port.written == [(PLAIN, FRAME)] * 3


def test_frames_keep_their_order_and_their_number(memory: GuestMemory) -> None:
    link = ScriptedLink()
    driver = World(memory, link).drive()
    sent = [ethernet(number.to_bytes(2, "big")) for number in range(2000)]
    assert driver.send_burst([(PLAIN, frame) for frame in sent]) == 2000
    assert link.port.frames == sent
    assert driver.wait_sent()


def test_frames_sent_are_counted(memory: GuestMemory) -> None:
    world = World(memory)
    world.drive().send_burst([(PLAIN, bytes(60)), (PLAIN, bytes(1000))])
    assert world.device.stats["tx_frames"] == 2
    assert world.device.stats["tx_bytes"] == 1060
    assert world.dropped("tx") == {}


# --- towards the host: what may be left undone ---------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("length", [0, 1, 100, 1400])
def test_a_partial_checksum_is_finished_for_a_link_that_cannot(
    memory: GuestMemory, version: int, udp: bool, length: int
) -> None:
    link = ScriptedLink(Offload.NONE)
    driver = World(memory, link).drive()
    header = (udp_header if udp else tcp_header)(version=version)
    frame = make_frame(make_payload(length), protocol=UDP if udp else 6, version=version)
    driver.send(frame, header)
    [(written, data)] = link.port.written
    assert written == PLAIN
    assert_whole(data, udp=udp, version=version)


def test_a_partial_checksum_is_left_to_a_link_that_can(memory: GuestMemory) -> None:
    link = ScriptedLink(Offload.CSUM)
    driver = World(memory, link).drive()
    frame = make_frame(b"x" * 99)
    driver.send(frame, tcp_header())
    assert link.port.written == [(tcp_header().pack(), frame)]


@pytest.mark.parametrize(
    ("frame", "header", "needed"),
    [
        (make_frame(make_payload(999)), tcp_header(), "CSUM"),
        (make_frame(make_payload(999)), tcp_header(100), "HOST_TSO4"),
        (make_frame(make_payload(999), version=6), tcp_header(100, version=6), "HOST_TSO6"),
        (make_frame(make_payload(999), protocol=UDP), udp_header(100), "HOST_USO"),
        (
            make_frame(make_payload(999), protocol=UDP, version=6),
            udp_header(100, version=6),
            "HOST_USO",
        ),
        (make_frame(make_payload(999)), tcp_header(100, ecn=True), "HOST_ECN"),
    ],
)
@pytest.mark.parametrize("link_takes", [ALL, Offload.NONE])
def test_what_a_guest_may_leave_undone_it_negotiated_before(
    memory: GuestMemory, frame: bytes, header: NetHeader, needed: str, link_takes: Offload
) -> None:
    link = ScriptedLink(link_takes)
    world = World(memory, link)
    driver = world.drive(features(*ALL_HOST))
    driver.send(frame, header)
    assert world.dropped("tx") == {}
    assert len(link.port.written) == (10 if not link_takes and header.gso_size else 1)
    if link_takes:
        assert link.port.written == [(header.pack(), frame)]
    link.port.written.clear()

    without = features(*ALL_HOST) & ~feature_mask([NetFeature[needed]])
    driver = world.drive(without)
    driver.send(frame, header)
    assert link.port.written == [], "offered, but not accepted"
    [reason] = world.dropped("tx")
    assert reason.endswith("not negotiated")
    assert driver.wait_sent() and not driver.needs_reset


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gso_size": 0}, "gso size zero"),
        ({"flags": 0}, "gso without csum"),
        ({"gso_type": 4}, "gso wrong ip version"),
        ({"gso_type": 5}, "gso wrong protocol"),
        ({"gso_type": 3}, "gso not negotiated"),
        ({"gso_type": 2}, "gso unknown"),
        ({"gso_type": 0x21}, "gso unknown"),
        ({"gso_type": 0x80}, "ecn without tcp"),
        ({"gso_type": 0x85}, "ecn without tcp"),
        ({"csum_start": 35}, "gso csum position"),
        ({"csum_offset": 6}, "gso csum position"),
        ({"csum_start": 0xFFFF, "gso_type": 0, "gso_size": 0}, "csum beyond frame"),
        ({"csum_offset": 0xFFFF, "gso_type": 0, "gso_size": 0}, "csum beyond frame"),
        ({"csum_start": 0, "gso_type": 0, "gso_size": 0}, "csum in Ethernet header"),
        ({"gso_size": 1}, "gso size too small"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_dropped_and_the_device_goes_on(
    memory: GuestMemory, change: dict[str, int], reason: str
) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()
    good = make_frame(make_payload(999)), tcp_header(100)
    driver.send(good[0], good[1]._replace(**change))
    assert world.dropped("tx") == {reason: 1} and link.port.written == []
    driver.send(*good)
    assert link.port.written == [(good[1].pack(), good[0])]
    assert driver.wait_sent() and not driver.needs_reset


@pytest.mark.parametrize("length", [99, 100])
def test_the_checksum_field_lies_inside_the_frame(memory: GuestMemory, length: int) -> None:
    """Past bug (CVE-2024-11614): csum offsets out of bounds; one byte may be too many."""
    link = ScriptedLink(Offload.NONE)
    world = World(memory, link)
    driver = world.drive()
    frame = bytes(length)
    for offset, fits in ((length - 34 - 2, True), (length - 34 - 1, False)):
        driver.send(frame, NetHeader(flags=1, csum_start=34, csum_offset=offset))
        assert len(link.port.written) == fits
        assert world.dropped("tx").get("csum beyond frame", 0) == (not fits)
        link.port.written.clear()


def test_hdr_len_is_not_believed(memory: GuestMemory) -> None:
    """virtio 1.3, 5.1.6.2.2; and a Linux tap refuses one that is beyond the frame."""
    link = ScriptedLink()
    driver = World(memory, link).drive()
    frame = make_frame(make_payload(999))
    for hdr_len in (0, 5, 54, 500, 0xFFFF):
        driver.send(frame, tcp_header(100)._replace(hdr_len=hdr_len))
        driver.send(frame, tcp_header()._replace(hdr_len=hdr_len))
    for written, _ in link.port.written[::2]:
        assert written == tcp_header(100).pack()
    for written, data in link.port.written[1::2]:
        assert int.from_bytes(written[2:4], "little") <= len(data)


@pytest.mark.parametrize("flags", [2, 4, 8, 0xFE])
def test_flags_that_a_driver_may_not_set_do_not_reach_the_link(
    memory: GuestMemory, flags: int
) -> None:
    link = ScriptedLink()
    driver = World(memory, link).drive()
    driver.send(FRAME, NetHeader(flags=flags))
    frame = make_frame(b"abc")
    driver.send(frame, tcp_header()._replace(flags=flags | 1))
    assert [written for written, _ in link.port.written] == [PLAIN, tcp_header().pack()]


@pytest.mark.parametrize("link_takes", [ALL, Offload.NONE])
def test_a_gso_frame_with_a_zero_ip_checksum_arrives_with_one(
    memory: GuestMemory, link_takes: Offload
) -> None:
    """Past bug (openvmm 3128): GSO frames with a zero IPv4 header checksum died in the tap."""
    link = ScriptedLink(link_takes)
    driver = World(memory, link).drive()
    driver.send(make_frame(make_payload(999), ip_checksum=False), tcp_header(100))
    assert link.port.written
    for _, data in link.port.written:
        assert slow_sum(data[14:34]) == 0xFFFF


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
def test_gso_frames_are_cut_for_a_link_that_cannot(
    memory: GuestMemory, version: int, udp: bool
) -> None:
    link = ScriptedLink(Offload.NONE)
    world = World(memory, link)
    driver = world.drive()
    payload = make_payload(60000)
    frame = make_frame(payload, protocol=UDP if udp else 6, version=version)
    driver.send(frame, (udp_header if udp else tcp_header)(1448, version=version))
    start = (34 if version == 4 else 54) + (8 if udp else 20)
    assert b"".join(data[start:] for data in link.port.frames) == payload
    assert {header for header, _ in link.port.written} == {PLAIN}
    for data in link.port.frames:
        assert len(data) <= start + 1448
        assert_whole(data, udp=udp, version=version)
    assert world.device.stats["tx_frames"] == len(link.port.frames) == 42
    assert driver.wait_sent()


# --- towards the host: what is checked is what is written ----------------------------------------


class RewritingLink(ScriptedLink):
    """Plays a guest on another processor: memory changes as soon as the link is asked anything."""

    def __init__(self, accepts: Offload) -> None:
        self.rewrite: list[tuple[memoryview, bytes]] = []
        self.hooked = False
        super().__init__(accepts)
        self._accepts = accepts
        self.hooked = True
        self.port.before_write = lambda frames: self.strike()

    def strike(self) -> None:
        for view, data in self.rewrite:
            view[: len(data)] = data

    @property
    def accepts(self) -> Offload:
        if self.hooked:
            self.strike()
        return self._accepts

    @accepts.setter
    def accepts(self, value: Offload) -> None:
        self._accepts = value


@pytest.mark.parametrize("cut", [12, 12 + 6, 12 + 14, 12 + 20, 80])
def test_the_address_that_was_checked_is_the_one_that_is_sent(
    memory: GuestMemory, cut: int
) -> None:
    """With a locked MAC a guest that rewrites its frame in the meantime gains nothing."""
    link = RewritingLink(ALL)
    guest = World(memory, link, lock_mac=True).raw()
    data = PLAIN + FRAME
    pieces = [guest.put(data[:cut]), guest.put(data[cut:])]
    pieces = [piece for piece in pieces if piece[1]]
    for gpa, length in pieces:
        link.rewrite.append((memory.view(gpa, length), b"\x66" * length))
    guest.offer(1, pieces)
    [(header, sent)] = link.port.written
    assert header == PLAIN
    assert sent[:14] == FRAME[:14]
    assert sent[14:] == b"\x66" * (len(FRAME) - 14), "the payload is the guest's own affair"


@pytest.mark.parametrize("gso_size", [0, 100])
@pytest.mark.parametrize("link_takes", [ALL, Offload.CSUM])
@pytest.mark.parametrize("lock_mac", [False, True])
def test_the_headers_that_were_checked_are_the_ones_that_are_sent(
    memory: GuestMemory, gso_size: int, link_takes: Offload, lock_mac: bool
) -> None:
    link = RewritingLink(link_takes)
    guest = World(memory, link, lock_mac=lock_mac, mac=MACS[6:]).raw(features(*ALL_HOST))
    frame = make_frame(make_payload(999))
    header = tcp_header(gso_size)
    data = header.pack() + frame
    gpa, length = guest.put(data)
    link.rewrite = [(memory.view(gpa, length), b"\xff" * (12 + 54 if gso_size else 12))]
    guest.offer(1, [(gpa, length)])
    assert link.port.written
    for written, sent in link.port.written:
        assert written[6:10] == header.pack()[6:10] and written[0] == 1
        if gso_size:
            assert sent[:14] == frame[:14] and sent[26:38] == frame[26:38]
    if link_takes == ALL:
        assert link.port.written[0][0] == header.pack()


# --- a locked MAC --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(), Layout(12), Layout(12, 18, 20, 24), Layout(25, 26)])
def test_frames_from_another_address_are_dropped_with_a_locked_mac(
    memory: GuestMemory, layout: Layout
) -> None:
    link = ScriptedLink()
    world = World(memory, link, lock_mac=True)
    driver = world.drive(transmit_layout=layout)
    foreign = [
        ethernet(b"foreign", source=OTHER_MAC),
        ethernet(b"", to=OUR_MAC, source=BROADCAST),
        ethernet(b"bit", source=bytes((OUR_MAC[0] ^ 2,)) + OUR_MAC[1:]),
        ethernet(b"bit", source=OUR_MAC[:5] + bytes((OUR_MAC[5] ^ 1,))),
        OUR_MAC + OUR_MAC[:5],
        b"",
    ]
    driver.send_burst([(PLAIN, frame) for frame in (FRAME, *foreign, FRAME)])
    assert link.port.frames == [FRAME, FRAME]
    assert world.dropped("tx") == {"source address": len(foreign)}
    assert driver.wait_sent()


def test_without_a_lock_any_source_address_may_send(memory: GuestMemory) -> None:
    link = ScriptedLink()
    driver = World(memory, link).drive()
    frame = ethernet(b"bridged", source=OTHER_MAC)
    driver.send(frame)
    assert link.port.frames == [frame]


def test_a_locked_mac_holds_for_frames_of_a_linux_guest(memory: GuestMemory) -> None:
    """Past bug: with a header moved by two bytes every frame had a "bad source address"."""
    link = ScriptedLink()
    world = World(memory, link, lock_mac=True)
    for wanted in (VERSION_1, features("MRG_RXBUF"), -1):
        driver = world.drive(wanted, transmit_layout=Layout(12))
        driver.send(FRAME)
    assert link.port.frames == [FRAME] * 3


# --- a link that is full, and one that is gone ---------------------------------------------------


def test_a_full_link_loses_nothing_and_keeps_the_order(memory: GuestMemory) -> None:
    link = ScriptedLink(Offload.NONE)
    world = World(memory, link)
    driver = world.drive()
    frames = [ethernet(bytes([n]) * 50) for n in range(100)]
    link.port.takes = 10
    assert driver.send_burst([(PLAIN, frame) for frame in frames]) == 100
    assert link.port.frames == frames[:10]
    driver.reap()
    assert driver.unsent() == 90, "what was not taken is still the device's"
    for more in (0, 1, 30, 0, 1000):
        link.port.takes = more
        assert link.port.on_writable is not None
        link.port.on_writable()
    assert link.port.frames == frames
    driver.reap()
    assert driver.unsent() == 0
    assert world.device.stats["tx_frames"] == 100 and world.dropped("tx") == {}


def test_segments_that_a_full_link_did_not_take_follow_later(memory: GuestMemory) -> None:
    link = ScriptedLink(Offload.NONE)
    driver = World(memory, link).drive()
    link.port.takes = 3
    payload = make_payload(1000)
    driver.send(make_frame(payload), tcp_header(100))
    assert len(link.port.written) == 3
    driver.reap()
    assert driver.unsent() == 1, "its buffer is in use up to the last segment"
    link.port.takes = None
    assert link.port.on_writable is not None
    link.port.on_writable()
    assert b"".join(data[54:] for data in link.port.frames) == payload
    assert driver.wait_sent()


def test_frames_that_come_while_the_link_is_full_wait_behind_the_others(
    memory: GuestMemory,
) -> None:
    link = ScriptedLink()
    driver = World(memory, link).drive()
    frames = [ethernet(bytes([n]) * 50) for n in range(30)]
    link.port.takes = 4
    driver.send_burst([(PLAIN, frame) for frame in frames[:10]])
    driver.send_burst([(PLAIN, frame) for frame in frames[10:20]])
    link.port.takes = 1
    driver.send_burst([(PLAIN, frame) for frame in frames[20:]])
    assert link.port.frames == frames[: len(link.port.frames)]
    link.port.takes = None
    assert link.port.on_writable is not None
    link.port.on_writable()
    assert link.port.frames == frames


def test_a_full_loopback_wakes_the_sender_up(memory: GuestMemory) -> None:
    world = World(memory, LoopbackLink(limit=3))
    driver = world.drive(receive_buffers=2)
    frames = [ethernet(bytes([n]) * 50) for n in range(200)]
    sent = 0
    got: list[bytes] = []
    for _ in range(500):
        sent += driver.send_burst([(PLAIN, frame) for frame in frames[sent : sent + 20]])
        got += [frame.data for frame in driver.receive()]
        if len(got) == 200:
            break
    assert got == frames


def test_many_small_rounds_do_not_nest(memory: GuestMemory) -> None:
    """A loopback for one frame: each frame blocks the sender and wakes it up again."""
    world = World(memory, LoopbackLink(limit=1), queue_size=2048)
    driver = world.drive(queue_size=2048, receive_buffers=2000)
    frames = [ethernet(n.to_bytes(2, "big") * 20) for n in range(1500)]
    assert driver.send_burst([(PLAIN, frame) for frame in frames]) == 1500
    assert not driver.needs_reset, world.device.fault
    assert [frame.data for frame in driver.receive()] == frames


def test_a_watch_waits_for_writing_only_while_frames_wait(memory: GuestMemory) -> None:
    read_end, write_end = os.pipe()
    try:
        link = ScriptedLink(fds=[write_end])
        world = World(memory, link)
        [watch] = world.device.watches
        changes: list[tuple[bool, bool]] = []
        watch.on_change = lambda w: changes.append((w.reading, w.writing))
        driver = world.drive()
        assert watch.fd == write_end and watch.reading and not watch.writing
        link.port.takes = 1
        driver.send_burst([(PLAIN, FRAME)] * 5)
        assert watch.writing
        link.port.takes = 1
        watch.writable()
        assert watch.writing
        link.port.takes = None
        watch.writable()
        assert not watch.writing and len(link.port.written) == 5
        watch.writable()  # once too often
        world.device.write_status(0)
        assert not watch.reading and not watch.writing
        assert changes == [(True, False), (True, True), (True, False), (False, False)]
    finally:
        os.close(read_end)
        os.close(write_end)


def test_two_queues_on_one_full_port_are_both_woken(memory: GuestMemory) -> None:
    read_end, write_end = os.pipe()
    try:
        link = ScriptedLink(fds=[write_end])
        world = World(memory, link, queue_pairs=2)
        [watch] = world.device.watches
        driver = world.drive(pairs=2)
        link.port.takes = 0
        for pair in range(2):
            driver.send(FRAME, pair=pair)
        link.port.takes = 1
        world.device.notify(1)  # a kick for one queue, as it happens
        assert watch.writing, "the other queue's frame still waits"
        link.port.takes = None
        watch.writable()
        assert len(link.port.written) == 2 and not watch.writing
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_queue_that_is_gone_is_not_waited_for(memory: GuestMemory) -> None:
    """An event loop that is told of a descriptor for nothing runs hot."""
    read_end, write_end = os.pipe()
    try:
        link = ScriptedLink(fds=[write_end])
        world = World(memory, link)
        [watch] = world.device.watches
        driver = world.drive()
        link.port.takes = 0
        driver.send(FRAME)
        assert watch.writing
        driver.driver.reset_queue(1)
        watch.writable()
        assert not watch.writing
        assert world.dropped("tx") == {"queue stopped": 1}
        driver.driver.reset_queue(0)
        watch.readable()
        assert not watch.reading
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_device_that_needs_a_reset_waits_for_nothing(memory: GuestMemory) -> None:
    """A guest that broke a rule must not make the host's event loop run hot."""
    read_end, write_end = os.pipe()
    try:
        link = ScriptedLink(fds=[write_end])
        world = World(memory, link)
        [watch] = world.device.watches
        guest = world.raw()
        guest.offer(0, (), [guest.room(2000)])
        link.port.takes = 0
        guest.offer(1, [guest.put(PLAIN + FRAME)])
        guest.offer(1, [guest.put(b"short")])
        link.port.takes = 1
        watch.writable()
        assert world.device.status & Status.NEEDS_RESET
        watch.readable()
        watch.writable()
        assert not watch.reading and not watch.writing
        guest = world.raw()
        guest.offer(0, (), [guest.room(2000)])
        assert watch.reading
    finally:
        os.close(read_end)
        os.close(write_end)


def test_frames_for_a_link_that_is_gone_are_counted_and_the_guest_told(
    memory: GuestMemory,
) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()
    driver.send(FRAME)
    link.port.error = OSError(errno.EIO, "unplugged")
    driver.send_burst([(PLAIN, FRAME)] * 7)
    assert world.dropped("tx") == {"link gone": 7}
    assert world.device.stats["tx_frames"] == 1
    assert world.device.stats["tx_bytes"] == len(FRAME)
    assert driver.wait_sent(), "the buffers are the guest's again"
    assert not driver.settings.link_up and not driver.needs_reset
    driver.restart()
    assert not driver.settings.link_up, "a reset does not mend a link"
    link.port.error = None
    driver.send(FRAME)
    assert world.dropped("tx") == {"link gone": 8}


def test_a_link_that_breaks_while_it_is_read_is_gone(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()
    link.deliver(FRAME)
    assert len(driver.receive()) == 1
    link.port.error = OSError(errno.EIO, "unplugged")
    link.deliver(FRAME)
    assert driver.receive() == [] and not driver.settings.link_up
    reads = link.port.reads
    link.deliver(FRAME)
    assert link.port.reads == reads, "nobody reads from a link that is gone"
    assert not driver.needs_reset


def test_nobody_waits_for_a_link_that_is_gone(memory: GuestMemory) -> None:
    """A descriptor whose other end is gone is always readable: an event loop would run hot."""
    read_end, write_end = os.pipe()
    try:
        link = ScriptedLink(fds=[write_end])
        world = World(memory, link)
        [watch] = world.device.watches
        guest = world.raw(VERSION_1)
        guest.offer(0, (), [guest.room(2000)])
        assert watch.reading
        link.port.error = OSError(errno.EIO, "unplugged")
        watch.readable()
        assert not watch.reading
        guest.offer(0, (), [guest.room(2000)])
        world.device.notify(0)
        assert not watch.reading
    finally:
        os.close(read_end)
        os.close(write_end)


def test_one_broken_port_leaves_the_others_working(memory: GuestMemory) -> None:
    link = ScriptedLink(ports=2)
    world = World(memory, link, queue_pairs=2)
    driver = world.drive(pairs=2)
    link.scripted[1].error = OSError(errno.EIO, "unplugged")
    driver.send(FRAME, pair=1)
    driver.send(FRAME, pair=0)
    assert len(link.scripted[0].written) == 1
    assert world.dropped("tx") == {"link gone": 1}


class Mended(ScriptedLink):
    """Can be used again once `there` says so; `refuses` says why not."""

    there = False
    refuses: OSError | None = None
    looks = 0

    def recover(self) -> None:
        self.looks += 1
        if self.refuses is not None:
            raise self.refuses
        if self.there:
            for port in self.scripted:
                port.error = None
            assert self.on_change is not None
            self.on_change()


def test_a_link_that_broke_is_looked_at_until_it_can_be_used_again(
    memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    link = Mended(ports=2)
    world = World(memory, link, queue_pairs=2)
    driver = world.drive(pairs=2)
    [alarm] = world.device.alarms
    assert alarm.deadline is None, "nobody looks at a link that works"
    link.port.error = OSError(errno.EBADFD, "the tap is gone")
    driver.send(FRAME)
    assert "scripted: the link broke: the tap is gone" in caplog.text
    assert alarm.deadline is not None and not driver.settings.link_up
    alarm.ring()
    link.refuses = OSError(errno.EBUSY, "in use by another program")
    for _ in range(3):
        alarm.ring()
    assert caplog.text.count("there is one again, but: in use by another program") == 1
    assert link.looks == 4 and alarm.deadline is not None

    link.refuses, link.there = None, True
    asked = len(link.requested), len(link.activated)
    with caplog.at_level("INFO"):
        alarm.ring()
    assert "scripted: the link is back" in caplog.text
    assert alarm.deadline is None and driver.settings.link_up
    assert link.requested[asked[0] :] == [guest_offloads(driver.features)]
    assert link.activated[asked[1] :] == [2]
    driver.send(FRAME)
    link.deliver(FRAME)
    assert len(link.port.written) == 1 and len(driver.receive()) == 1


def test_a_link_that_is_back_may_be_down_still(memory: GuestMemory) -> None:
    link = Mended()
    world = World(memory, link)
    driver = world.drive()
    link.port.error = OSError(errno.EBADFD, "the tap is gone")
    driver.send(FRAME)
    link.there, link.up = True, False
    world.device.alarms[0].ring()
    assert world.device.alarms[0].deadline is None and not driver.settings.link_up
    world.device.set_link_up(True)
    driver.send(FRAME)
    assert len(link.port.written) == 1


def test_the_device_closes_its_link() -> None:
    link = ScriptedLink()
    NetDevice(link).close()
    assert link.closed == 1


# --- chains that are no frames -------------------------------------------------------------------


def hostile(world: World) -> RawGuest:
    return world.raw(features("CTRL_VQ", "CTRL_RX", "MRG_RXBUF", "INDIRECT_DESC"), queue_size=16)


def look_at(world: World, index: int) -> None:
    """Has the device look at a queue: a kick, or a frame for the guest."""
    link = world.link
    assert isinstance(link, ScriptedLink)
    if index == 0:
        link.deliver(FRAME)
    else:
        world.device.notify(index)


def assert_broken_then_mended(world: World, section: str) -> None:
    """The device needs a reset, says why, does nothing more, and works after the reset."""
    device = world.device
    assert device.status & Status.NEEDS_RESET
    assert isinstance(device.fault, DriverError) and device.fault.section == section
    link = world.link
    assert isinstance(link, ScriptedLink)
    link.port.written.clear()
    driver = world.drive()
    driver.send(FRAME)
    link.deliver(FRAME)
    assert link.port.frames == [FRAME]
    assert FRAME in [frame.data for frame in driver.receive()]
    assert driver.set_receive_mode(0, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 10, 11])
def test_a_frame_without_a_whole_header_needs_a_reset(memory: GuestMemory, length: int) -> None:
    world = World(memory)
    guest = hostile(world)
    guest.offer(1, [guest.put(bytes(length))])
    assert guest.driver.needs_reset
    assert guest.used(1) == [(0, 0)], "the chain is the driver's again"
    assert_broken_then_mended(world, "5.1.6.2")


def test_an_empty_buffer_is_no_frame(memory: GuestMemory) -> None:
    world = World(memory)
    guest = hostile(world)
    guest.offer_unruly(1, (0x100000, 0, 0))
    assert_broken_then_mended(world, "5.1.6.2")


@pytest.mark.parametrize("readable", [0, 1])
def test_a_writable_buffer_to_transmit_needs_a_reset(memory: GuestMemory, readable: int) -> None:
    world = World(memory)
    guest = hostile(world)
    gpa, length = guest.room(200)
    before = memory.read(gpa, length)
    guest.offer(1, [guest.put(PLAIN + FRAME)] * readable, [(gpa, length)])
    assert memory.read(gpa, length) == before
    assert world.link.port.written == []  # type: ignore[attr-defined]
    assert_broken_then_mended(world, "5.1.6.2")


def test_good_frames_before_a_bad_one_are_sent(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    guest = hostile(world)
    for data in (PLAIN + FRAME, PLAIN + FRAME, b"bad"):
        guest.offer(1, [guest.put(data)], kick=False)
    guest.driver.kick(1)
    assert link.port.frames == [FRAME, FRAME]
    assert guest.used(1) == [(0, 0), (1, 0), (2, 0)]
    assert_broken_then_mended(world, "5.1.6.2")


def test_of_several_bad_frames_the_first_is_told(memory: GuestMemory) -> None:
    """Past bug: it was the last of those that happened to come in one burst."""
    world = World(memory)
    guest = hostile(world)
    for data in (PLAIN + FRAME, b"bad", b"worse", PLAIN + FRAME):
        guest.offer(1, [guest.put(data)], kick=False)
    guest.driver.kick(1)
    fault = world.device.fault
    assert isinstance(fault, DriverError) and fault.head == 1
    assert_broken_then_mended(world, "5.1.6.2")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_avail_index_that_jumps_needs_a_reset(memory: GuestMemory, index: int) -> None:
    """Past bug (firecracker 3149): avail index jumping ahead by more than the queue."""
    world = World(memory)
    guest = hostile(world)
    guest.ring(index).poke_avail_index(17)
    look_at(world, index)
    assert guest.driver.needs_reset
    assert_broken_then_mended(world, "2.7.13.3")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_malformed_head_is_looked_at_once(memory: GuestMemory, index: int) -> None:
    """Past bug (openvmm 4045): a malformed head was parsed for ever."""
    world = World(memory)
    guest = hostile(world)
    guest.ring(index).poke_avail(0, 99)
    guest.ring(index).poke_avail_index(1)
    look_at(world, index)
    errors = world.device.stats["driver_errors"]
    assert errors == 1
    look_at(world, index)
    assert world.device.stats["driver_errors"] == errors
    assert_broken_then_mended(world, "2.7.6")


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    ("gpa", "length"), [(0x10, 100), (0x100000, 0x80000000), (0xFFFFFFFFFFFFFF00, 0x200)]
)
def test_buffers_outside_the_guests_memory_need_a_reset(
    memory: GuestMemory, index: int, gpa: int, length: int
) -> None:
    world = World(memory)
    guest = hostile(world)
    guest.offer_unruly(index, (gpa, length, WRITE if index == 0 else 0))
    look_at(world, index)
    assert_broken_then_mended(world, "2.7.5")


def test_queues_set_up_before_the_features_do_no_harm(memory: GuestMemory) -> None:
    """A driver that does things in the wrong order, then kicks everywhere."""
    world = World(memory, queue_pairs=2)
    device = world.device
    device.write_status(3)
    for index in range(5):
        place = 0x100000 + 0x4000 * index
        device.setup_queue(index, size=16, desc=place, avail=place + 0x1000, used=place + 0x2000)
    device.accept_features(features("CTRL_VQ", "MRG_RXBUF"))
    device.write_status(11)
    device.write_status(15)
    for index in range(5):
        memory.write(0x100000 + 0x4000 * index + 0x1002, b"\1\0")
        device.notify(index)
    driver = world.drive()
    driver.send(FRAME)
    assert world.link.port.frames == [FRAME]  # type: ignore[attr-defined]


def test_queues_of_pairs_that_were_not_negotiated_do_nothing(memory: GuestMemory) -> None:
    """Without MQ there are two queues and the control queue, whatever a driver sets up."""
    link = ScriptedLink(ports=2)
    world = World(memory, link, queue_pairs=2)
    for wanted in (features("CTRL_VQ"), VERSION_1):
        guest = world.raw(wanted)
        guest.offer(3, [guest.put(PLAIN + FRAME)])
        assert link.scripted[0].written == link.scripted[1].written == []
        guest.offer(4, (), [guest.room(2000)])
        link.deliver(FRAME, pair=1)
        assert guest.used(4) == []


@pytest.mark.parametrize("index", [-1, 3, 4, 1000])
def test_kicks_for_queues_that_are_not_there_are_counted(memory: GuestMemory, index: int) -> None:
    world = World(memory)
    world.drive()
    world.device.notify(index)
    assert world.device.stats["stray_kicks"] == 1
    assert not world.device.status & Status.NEEDS_RESET


# --- reset ---------------------------------------------------------------------------------------


def test_a_reset_leaves_nothing_of_the_last_driver(memory: GuestMemory) -> None:
    """Past bug (cloud-hypervisor 1120): a reset left an index behind."""
    link = ScriptedLink(ports=2)
    world = World(memory, link, queue_pairs=2)
    first = world.drive(pairs=2)
    assert first.set_receive_mode(0, False) and first.set_mac(OTHER_MAC)  # type: ignore[arg-type]
    assert first.set_mac_table([BROADCAST], []) and first.add_vlan(7)
    link.port.takes = 0
    first.send_burst([(PLAIN, FRAME)] * 9)
    link.deliver(ethernet(b"before", to=OTHER_MAC))

    world.device.write_status(0)
    device = world.device
    assert device.status == 0 and device.driver_features == 0
    assert device.read_config(0, 8) == OUR_MAC + b"\1\0"
    assert link.activated[-1] == 1 and link.requested[-1] == Offload.NONE
    link.port.takes = None
    assert link.port.on_writable is not None
    link.port.on_writable()
    link.deliver(FRAME)
    assert link.port.written == [], "the last driver's frames are not sent"
    link.port.incoming.clear()

    second = world.drive(features("CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "MAC"))
    assert second.settings.mac == OUR_MAC
    stranger = ethernet(b"", to=b"\2\2\2\2\2\2")
    link.deliver(stranger, ethernet(b"", to=OUR_MAC), make_vlan(9))
    assert len(second.receive()) == 3, "promiscuous, as at the start"
    assert second.set_receive_mode(0, False)  # type: ignore[arg-type]
    link.deliver(stranger, ethernet(b"", to=OTHER_MAC), ethernet(b"", to=OUR_MAC), make_vlan(7))
    assert [frame.data[:6] for frame in second.receive()] == [OUR_MAC]
    for number in range(300):  # more than a queue: both indices go round from 0
        second.send(ethernet(number.to_bytes(2, "big")))
    assert len(link.port.written) == 300


def make_vlan(vlan: int) -> bytes:
    return OUR_MAC + OTHER_MAC + b"\x81\x00" + vlan.to_bytes(2, "big") + b"\x88\xb5" + bytes(46)


def test_resets_in_the_middle_of_everything(memory: GuestMemory) -> None:
    link = ScriptedLink(Offload.NONE)
    world = World(memory, link)
    for round_number in range(20):
        driver = world.drive(-1 if round_number % 2 else VERSION_1, receive_buffers=4)
        link.port.takes = round_number % 3
        driver.send_burst([(PLAIN, FRAME)] * 5)
        link.deliver(*[bytes(1000)] * 9)
        driver.receive(2)
        world.device.write_status(0)
        link.port.incoming.clear()
    link.port.takes = None
    link.port.written.clear()
    driver = world.drive()
    driver.send(FRAME)
    link.deliver(FRAME)
    assert link.port.frames == [FRAME]
    assert [frame.data for frame in driver.receive()] == [FRAME]
    assert not driver.needs_reset


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_queue_is_reset_and_the_others_go_on(memory: GuestMemory, index: int) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()
    for _ in range(3):
        driver.send(FRAME)
        link.deliver(FRAME)
        assert driver.add_vlan(3)
        driver.receive()
        driver.reset_queue(index)
    driver.send(FRAME)
    link.deliver(FRAME)
    assert len(link.port.written) == 4
    assert [frame.data for frame in driver.receive()] == [FRAME]
    assert driver.add_vlan(4) and not driver.needs_reset


def test_a_stopped_queue_goes_on_where_it_was(memory: GuestMemory) -> None:
    """What vhost-user does: a ring is taken away and set up again at the position it was left."""
    link = ScriptedLink()
    world = World(memory, link)
    guest = world.raw(features("MRG_RXBUF"))
    buffers = [guest.room(200) for _ in range(10)]
    for buffer in buffers:
        guest.offer(0, (), [buffer], kick=False)
    guest.driver.kick(0)
    link.deliver(bytes(100), bytes(300))
    position = world.device.stop_queue(0)
    assert position == 3, "three buffers used, seven put back"
    ring = guest.ring(0)
    link.deliver(bytes(50))
    world.device.setup_queue(
        0,
        size=ring.size,
        desc=ring.desc,
        avail=ring.avail,
        used=ring.used,
        next_avail=position,
        next_used=position,
    )
    world.device.notify(0)
    assert guest.used(0) == [(0, 112), (1, 200), (2, 112), (3, 62)]


def test_frames_that_a_full_link_never_took_are_counted_when_a_queue_stops(
    memory: GuestMemory,
) -> None:
    link = ScriptedLink(Offload.NONE)
    world = World(memory, link)
    driver = world.drive()
    link.port.takes = 1
    driver.send_burst([(PLAIN, FRAME)] * 4)
    driver.send(make_frame(make_payload(500)), tcp_header(100))
    world.device.stop_queue(1)
    assert world.device.stats["tx_frames"] == 1
    assert world.dropped("tx") == {"queue stopped": 3}
    driver.reap()
    assert driver.unsent() == 1, "the device never looked at the last one"


# --- the host's side -----------------------------------------------------------------------------


def test_the_link_goes_down_and_up(memory: GuestMemory) -> None:
    world = World(memory)
    driver = world.drive()
    generation = world.device.config_generation
    changes = driver.driver.config_changes
    world.device.set_link_up(False)
    assert not driver.settings.link_up
    world.device.set_link_up(False)
    assert driver.driver.config_changes == changes + 1
    assert world.device.config_generation != generation
    driver.restart()
    assert not driver.settings.link_up, "the cable is the host's: a reset does not plug it in"
    world.device.set_link_up(True)
    assert driver.settings.link_up
    driver.restart()
    assert driver.settings.link_up


def test_a_frame_of_the_hosts_own_reaches_the_guest(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link, queue_pairs=2)
    assert not world.device.inject(FRAME), "nobody there yet"
    driver = world.drive(pairs=2)
    assert world.device.inject(FRAME) and world.device.inject(FRAME, pair=1)
    assert [frame.data for frame in driver.receive()] == [FRAME, FRAME]
    assert not world.device.inject(FRAME, pair=2)
    world.device.write_status(0)
    assert not world.device.inject(FRAME)


def test_an_injected_frame_waits_for_room(memory: GuestMemory) -> None:
    guest = (world := World(memory)).raw(features("MRG_RXBUF"))
    assert world.device.inject(FRAME)
    assert guest.used(0) == []
    guest.offer(0, (), [guest.room(200)])
    assert guest.used(0) == [(0, 12 + len(FRAME))]


# --- guest to guest ------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [-1, VERSION_1, features("MRG_RXBUF", "EVENT_IDX")])
def test_two_guests_on_a_cable(memory: GuestMemory, wanted: int) -> None:
    left, right = link_pair()
    with GuestMemory.allocate(16 << 20) as other:
        one = World(memory, left).drive(wanted, queue_size=64)
        two = World(other, right).drive(wanted, queue_size=64)
        for number in range(20):
            size = 14 + number * 70
            there = [ethernet(bytes([number, n]) * (size // 2)) for n in range(7)]
            back = [ethernet(bytes([n, number, 1]) * (size // 3)) for n in range(5)]
            one.send_burst([(PLAIN, frame) for frame in there])
            two.send_burst([(PLAIN, frame) for frame in back])
            assert [frame.data for frame in two.receive()] == there
            assert [frame.data for frame in one.receive()] == back
        assert not one.needs_reset and not two.needs_reset


def test_a_gso_frame_between_guests_is_cut_only_for_a_guest_that_needs_it(
    memory: GuestMemory,
) -> None:
    left, right = link_pair()
    payload = make_payload(40000)
    with GuestMemory.allocate(16 << 20) as other:
        sender = World(memory, left).drive()
        receiver = World(other, right)
        two = receiver.drive()
        sender.send(make_frame(payload), tcp_header(1448))
        [got] = two.receive()
        assert got.data == make_frame(payload) and got.header.gso_size == 1448
        two.close()
        two = receiver.drive(features("MRG_RXBUF"))
        sender.send(make_frame(payload), tcp_header(1448))
        frames = two.receive()
        assert b"".join(frame.data[54:] for frame in frames) == payload
        for frame in frames:
            assert_whole(frame.data)


# --- drivers that act inside callbacks -----------------------------------------------------------


def test_a_driver_may_send_from_inside_a_call(memory: GuestMemory) -> None:
    """An echo on both sides of a cable, each answering from inside the device's call."""
    left, right = link_pair()
    with GuestMemory.allocate(16 << 20) as other:
        worlds = [World(memory, left), World(other, right)]
        drivers = [world.drive(queue_size=16) for world in worlds]
        seen = [0, 0]

        def answer(side: int) -> None:
            driver = drivers[side]
            for frame in driver.receive():
                seen[side] += 1
                if seen[side] < 1000:
                    driver.send(frame.data)

        for side, driver in enumerate(drivers):
            noted = driver.driver.on_call

            def called(index: int, side: int = side, noted: object = noted) -> None:
                noted(index)  # type: ignore[operator]
                if index == 0:
                    answer(side)

            driver.driver.on_call = called
        drivers[0].send(FRAME)
        assert seen == [999, 1000], [world.device.fault for world in worlds]


class Interrupter:
    """Does something to the device, once, from inside the n-th call or configuration change."""

    def __init__(self, world: World, action: str) -> None:
        self.world = world
        self.action = action
        self.armed = False
        self.fired = 0

    def __call__(self, *_: object) -> None:
        if not self.armed:
            return
        self.armed = False
        self.fired += 1
        device = self.world.device
        if self.action == "reset":
            device.write_status(0)
        elif self.action == "fail":
            device.write_status(device.status | Status.FAILED)
        elif self.action == "queues":
            for index in range(3):
                device.reset_queue(index)
        else:
            device.stop_queue(0)
            device.stop_queue(1)
            device.stop_queue(2)


@pytest.mark.parametrize("action", ["reset", "fail", "queues", "stop"])
@pytest.mark.parametrize("occasion", ["receive", "transmit", "control", "break", "backlog"])
def test_what_a_driver_does_inside_a_callback_holds_at_once(
    memory: GuestMemory, action: str, occasion: str
) -> None:
    """After a reset the memory is the guest's own again: the device touches nothing of it."""
    link = ScriptedLink()
    world = World(memory, link)
    device = world.device
    guest = world.raw(features("MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "STATUS", "RING_RESET"))
    for _ in range(100):
        guest.offer(0, (), [guest.room(300)], kick=False)
    guest.driver.kick(0)
    interrupter = Interrupter(world, action)
    images: list[list[bytes]] = []

    def react(*_: object) -> None:
        if interrupter.armed:
            interrupter()
            images.append([bytes(region.view) for region in memory.regions])

    device.on_queue_call = device.on_config_change = react
    sent_at_reset = 0
    if occasion == "receive":
        interrupter.armed = True
        link.deliver(*[bytes(250)] * 90)
    elif occasion == "control":
        for _ in range(3):
            guest.offer(2, [guest.put(bytes((0, 0, 1)))], [guest.room(1)], kick=False)
        interrupter.armed = True
        guest.driver.kick(2)
    else:
        for _ in range(200):
            guest.offer(1, [guest.put(PLAIN + FRAME)], kick=False)
        if occasion == "backlog":
            link.port.takes = 0
            guest.driver.kick(1)
            link.port.takes = None
            interrupter.armed = True
            assert link.port.on_writable is not None
            link.port.on_writable()
        else:
            interrupter.armed = True
            if occasion == "break":
                link.port.error = OSError(errno.EIO, "gone")
            guest.driver.kick(1)
        sent_at_reset = len(link.port.written)
    assert interrupter.fired == 1
    assert [bytes(region.view) for region in memory.regions] == images[0]
    if action == "reset":
        assert device.status == 0 and device.fault is None
    else:
        assert not device.status & Status.NEEDS_RESET, device.fault
    if occasion in ("transmit", "backlog"):
        assert sent_at_reset <= MOST_AT_ONCE
    link.port.error = None
    link.port.incoming.clear()
    link.port.written.clear()
    driver = world.drive()
    driver.send(FRAME)
    link.deliver(FRAME)
    if occasion != "break":
        assert link.port.frames == [FRAME]
        assert FRAME in [frame.data for frame in driver.receive()]
    assert not driver.needs_reset, device.fault


def test_a_driver_may_restart_inside_a_callback(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()
    restarts = 0

    def called(index: int) -> None:
        nonlocal restarts
        if restarts < 5:
            restarts += 1
            driver.restart()
            driver.driver.on_call = called

    driver.driver.on_call = called
    for _ in range(20):
        link.deliver(FRAME, FRAME)
        driver.send(FRAME)
    assert restarts == 5 and not driver.needs_reset, world.device.fault
    driver.restart()
    link.deliver(FRAME)
    assert [frame.data for frame in driver.receive()] == [FRAME]


def test_a_reset_inside_the_notification_of_a_fault_holds(memory: GuestMemory) -> None:
    world = World(memory)
    guest = world.raw()
    device = world.device

    def react(*_: object) -> None:
        device.write_status(0)

    for data in (PLAIN + FRAME, b"bad"):
        guest.offer(1, [guest.put(data)], kick=False)
    device.on_queue_call = react
    guest.driver.kick(1)
    assert device.status == 0 and device.fault is None
    device.on_queue_call = None
    device.on_config_change = react
    guest = world.raw()
    device.on_config_change = react
    guest.offer(1, [guest.put(b"bad")])
    assert device.status == 0 and device.fault is None


def test_an_error_of_a_link_does_not_stop_the_host(memory: GuestMemory) -> None:
    """Whatever a link raises beside OSError is a fault of ours: logged, and the device stops."""
    link = ScriptedLink()
    world = World(memory, link)
    driver = world.drive()

    def boom(frames: Sequence[Frame]) -> None:
        raise ZeroDivisionError

    link.port.before_write = boom
    driver.send(FRAME)
    assert driver.needs_reset and isinstance(world.device.fault, ZeroDivisionError)
    link.port.before_write = None
    driver.restart()
    driver.send(FRAME)
    assert link.port.frames == [FRAME]


def test_work_is_given_up_after_a_turn_when_somebody_else_waits(memory: GuestMemory) -> None:
    link = ScriptedLink()
    world = World(memory, link, queue_size=1024)
    left: list[int] = []
    world.device.on_work_left = left.append
    guest = world.raw(queue_size=1024)
    for _ in range(600):
        guest.offer(1, [guest.put(PLAIN + FRAME)], kick=False)
    guest.driver.kick(1)
    counts = [len(link.port.written)]
    while left:
        world.device.notify(left.pop())
        counts.append(len(link.port.written))
    assert counts == [256, 512, 600]
