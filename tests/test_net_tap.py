"""The whole path with a Linux tap and without a guest: driver, net device, tap, and real kernels.

One kernel's stack sends and takes frames through the scripted guest, another's is behind the tap
under test (see `pump`). Both judge every checksum, and find every byte where it should be.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
from net_frames import QINQ, UDP, VLAN, make_frame, slow_sum
from pump import (
    ADDRESSES,
    GUEST,
    GUEST_MAC,
    HOST,
    HOST_MAC,
    HostTap,
    ScriptedGuest,
    exchange,
    flows,
    in_namespace,
    inside,
    iperf3,
    need_two_hosts,
    no_errors,
    ping,
    run,
    two_namespaces,
    undone,
    wait_for,
    without,
)

from vq.abi import CtrlRx, HdrFlag, HdrGso, NetFeature, feature_mask
from vq.link import Frame, FrameBuffer, Link
from vq.net_driver import HEADER_APART, NET_DRIVER_FEATURES, Layout, NetHeader
from vq.offload import (
    ALL,
    Offload,
    TunF,
    guest_offloads,
    host_offloads,
    tun_flags_for,
    tun_offloads,
)
from vq.tap_linux import LinuxTap
from vq.testing.requirements import need_program, unmet


@pytest.fixture(autouse=True)
def two_hosts() -> None:
    need_two_hosts()


GUEST_TSO = (NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6)
HOST_TSO = (NetFeature.HOST_TSO4, NetFeature.HOST_TSO6)
GUEST_USO = (NetFeature.GUEST_USO4, NetFeature.GUEST_USO6)
TAKEN = feature_mask((NetFeature.GUEST_CSUM, NetFeature.GUEST_ECN, *GUEST_TSO, *GUEST_USO))
TAKES_NOTHING = without(NetFeature.GUEST_CSUM)
LEAVES_NOTHING = without(NetFeature.CSUM)
NOTHING = without(NetFeature.CSUM, NetFeature.GUEST_CSUM)


@contextmanager
def world(
    features: int = NET_DRIVER_FEATURES,
    *,
    queues: int = 1,
    mtu: int = 1500,
    tags: bytes = b"",
    in_software: bool = False,
    **options: Any,
) -> Iterator[tuple[ScriptedGuest, HostTap]]:
    """A scripted guest, and the tap that its device is plugged into."""
    host = HostTap(queues=queues, tags=tags, in_software=in_software)
    make = partial(ScriptedGuest, host=host, features=features, tags=tags, **options)
    with two_namespaces(host, make, mtu=mtu) as guest:
        yield guest, host


def two_pairs() -> AbstractContextManager[tuple[ScriptedGuest, HostTap]]:
    return world(queues=2, device={"queue_pairs": 2}, driver={"pairs": 2})


def kinds(offloads: Offload) -> set[str]:
    """What frames of `exchange` leave undone between two who have these offloads."""
    found = {"NONE"}
    for offload, kind in (
        (Offload.CSUM, "CSUM"),
        (Offload.TSO4, "TCPV4"),
        (Offload.TSO6, "TCPV6"),
        (Offload.USO4 | Offload.USO6, "UDP_L4"),
    ):
        if offloads & offload == offload:
            found.add(kind)
    return found


def known_to_kernel(offloads: Offload, tap: LinuxTap) -> Offload:
    return tun_offloads(tun_flags_for(offloads, tap.known_flags))


# --- everything, with every set of offloads ------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(NET_DRIVER_FEATURES, id="all"),
        pytest.param(
            without(*GUEST_TSO, *HOST_TSO, *GUEST_USO, NetFeature.HOST_USO), id="checksums only"
        ),
        pytest.param(without(NetFeature.GUEST_TSO6, NetFeature.HOST_TSO6), id="no TSO6"),
        pytest.param(without(NetFeature.GUEST_TSO4, NetFeature.HOST_TSO4), id="no TSO4"),
        pytest.param(without(*GUEST_USO, NetFeature.HOST_USO), id="no USO"),
        pytest.param(without(*GUEST_TSO, *HOST_TSO), id="USO only"),
        pytest.param(without(NetFeature.GUEST_USO6), id="USO4 without USO6"),
        pytest.param(TAKES_NOTHING, id="takes nothing"),
        pytest.param(LEAVES_NOTHING, id="leaves nothing"),
        pytest.param(NOTHING, id="nothing"),
    ],
)
def test_a_guest_has_just_the_offloads_that_it_negotiated(features: int) -> None:
    """Frames come to be segmented in each direction with the offload, and none without it."""
    with world(features) as (guest, host):
        exchange()
        assert guest.dropped() == {}
        takes = known_to_kernel(guest_offloads(guest.driver.features), host)
        leaves = known_to_kernel(host_offloads(guest.driver.features), host)
        assert host.given == set(guest.received) == kinds(takes)
        assert host.written == set(guest.sent) == kinds(leaves)


def ring_options(indirect: bool) -> dict[str, Any]:
    layouts: dict[str, Any] = {}
    if indirect:
        layouts = {
            "transmit_layout": Layout(12, 26, pieces=3, indirect=True, direct=1),
            "receive_layout": Layout(12, pieces=2, indirect=True),
        }
    return layouts


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "large buffers"])
@pytest.mark.parametrize("takes", [True, False], ids=["all offloads", "no offloads"])
def test_buffers_of_every_kind_carry_everything(
    takes: bool, mergeable: bool, indirect: bool, mtu: int
) -> None:
    left_out = [] if mergeable else [NetFeature.MRG_RXBUF]
    left_out += [] if takes else [NetFeature.CSUM, NetFeature.GUEST_CSUM]
    options = ring_options(indirect)
    with world(without(*left_out), mtu=mtu, device={"mtu": mtu}, driver=options) as (guest, host):
        exchange()
        assert guest.dropped() == {}
        assert host.ports[0].longest_plain == mtu + 14 if not takes else "TCPV4" in host.given
        assert (guest.largest_count > 1) == (mergeable and (takes or mtu > 2048))


@pytest.mark.parametrize("most_at_once", [1 << 20, 5], ids=["", "full now and then"])
@pytest.mark.parametrize("features", [NET_DRIVER_FEATURES, NOTHING], ids=["all", "no offloads"])
def test_frames_in_indirect_tables_are_fetched_by_the_kernel_itself(
    features: int, most_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All headers in the first buffer, as Linux guests have them; the kernel judges what comes."""
    monkeypatch.setattr("vq.net._WORTH_PLACES", 1)
    monkeypatch.setattr("vq.net._WORTH_A_BATCH", 1000)  # short ones are not copied
    monkeypatch.setattr("vq.net_transmit._DETOUR", 0)
    driver = {"transmit_layout": Layout(90, pieces=3, indirect=True)}
    with world(features, driver=driver) as (guest, host):
        port = host.ports[0]
        if port.outbox is None:
            unmet("this kernel has no io_uring for us")
        port.most_at_once = most_at_once
        with flows(*ADDRESSES, *ADDRESSES):
            frames_soon(guest, 500)
        exchange()
        assert guest.dropped() == {} and not port.dropped
        written = sum(port.written.values())
        assert port.in_place > (written // 2 if most_at_once > 5 else written // 20)
        kinds_sent = kinds(known_to_kernel(host_offloads(guest.driver.features), host))
        assert set(port.written) == set(guest.sent) == kinds_sent


@pytest.mark.parametrize(
    "features", [NET_DRIVER_FEATURES, NOTHING], ids=["all offloads", "no offloads"]
)
def test_iperf3_runs_both_ways(features: int) -> None:
    need_program("iperf3")
    with world(features) as (guest, _host):
        for arguments in (("-n", "8M"), ("-n", "8M", "-R"), ("-u", "-b", "50M", "-n", "1M")):
            rate = iperf3(*arguments)
            print(f"iperf3 {' '.join(arguments)}: {rate / 1e6:.0f} Mbit/s")
            assert rate > 1e6
        assert guest.dropped() == {}
        no_errors()


def test_a_driver_that_waits_for_calls_gets_everything() -> None:
    """With notifications on, and suppressed while there is work, as in a kernel."""
    with world(driver={"polling": False}) as (guest, _host):
        exchange()
        assert guest.dropped() == {}


def test_a_guest_that_is_slow_to_offer_buffers_loses_nothing() -> None:
    """What finds no room waits in the tap."""
    with world(driver={"queue_size": 16, "receive_buffers": 4}) as (guest, _host):
        exchange()
        assert guest.dropped() == {}


def test_offloads_of_the_last_driver_do_not_outlive_it() -> None:
    """The kernel is asked for what the guest acknowledged, not for what it was offered."""
    with world() as (guest, host):

        def restart(features: int) -> None:
            guest.driver.close()
            for port in host.ports:
                port.given.clear()
            guest.driver = type(guest.driver)(guest.device, guest.memory, features, polling=True)

        assert host.delivers == known_to_kernel(ALL, host)
        guest.do(partial(restart, TAKES_NOTHING))
        assert host.delivers == Offload.NONE
        exchange()
        assert host.given == {"NONE"}
        guest.do(partial(restart, NET_DRIVER_FEATURES))
        exchange()
        assert host.given == kinds(known_to_kernel(ALL, host))


# --- VLANs and other headers in the way ----------------------------------------------------------


@pytest.mark.parametrize("tags", [VLAN, QINQ, VLAN + VLAN], ids=["VLAN", "802.1ad", "two VLANs"])
@pytest.mark.parametrize(
    "features, in_software",
    [(NET_DRIVER_FEATURES, False), (NET_DRIVER_FEATURES, True), (TAKES_NOTHING, True)],
    ids=["in the kernels", "sent finished here", "all finished here"],
)
def test_tagged_traffic(features: int, in_software: bool, tags: bytes) -> None:
    """Defect: double VLAN tags were not followed to the headers behind them."""
    features &= ~feature_mask((NetFeature.CTRL_VLAN,))
    with world(features, tags=tags, in_software=in_software) as (guest, host):
        exchange()
        assert guest.dropped() == {}
        assert {"TCPV4", "TCPV6", "UDP_L4"} <= host.given
        assert {"TCPV4", "TCPV6", "UDP_L4"} <= set(guest.sent)
        if in_software:
            assert host.written == {"NONE"}


def test_a_guest_gets_only_the_vlans_that_it_asked_for() -> None:
    with world(tags=VLAN) as (guest, _host):
        guest.do(lambda: guest.driver.set_receive_mode(CtrlRx.PROMISC, False))
        guest.do(lambda: guest.driver.set_receive_mode(CtrlRx.ALLMULTI, True))
        lost = run_ping_that_fails(ADDRESSES[0])
        assert "100% packet loss" in lost
        assert guest.device.stats["rx_dropped: filtered"]
        guest.do(lambda: guest.driver.add_vlan(5))
        ping(ADDRESSES[0])
        guest.do(lambda: guest.driver.remove_vlan(5))
        assert "100% packet loss" in run_ping_that_fails(ADDRESSES[0])


def run_ping_that_fails(address: str) -> str:
    command = f"ping -c 3 -i 0.05 -W 0.2 {address} || true"
    return run(*inside(GUEST, "sh", "-c", command))


def has_options(data: FrameBuffer) -> bool:
    return data[12:14] == b"\x86\xdd" and data[20] == 60  # RFC 8200, 4.6


DESTINATION_OPTIONS = bytes((0, 1, 0x1E, 12)) + bytes(12)
"""RFC 8200, 4.6: 16 bytes, in which there is an experimental option that is to be skipped."""


@pytest.mark.parametrize("in_software", [False, True], ids=["in the kernels", "finished here"])
def test_ipv6_extension_headers_are_followed(in_software: bool) -> None:
    """Defect: IPv6 extension headers were not followed to the headers behind them."""
    with world(in_software=in_software) as (guest, host):
        seen: set[str] = set()
        send = guest.send

        def watched_send(frames: Sequence[Frame]) -> None:
            seen.update(undone(bytes(f[0])) for f in frames if has_options(f[1]))
            send(frames)

        guest.send = watched_send  # type: ignore[method-assign]
        exchange(options=DESTINATION_OPTIONS)
        assert guest.dropped() == {}
        assert {"CSUM", "TCPV6"} <= seen  # Linux cuts UDP with such headers by itself
        assert ("TCPV6" in host.written) == (not in_software)


CROSSING = Layout(3, 11, 19, 25, 29, 35, 37, 43, 48, 55, 63, 71, 79, gap=5)
"""Cuts addresses, types, lengths, protocols, ports and checksums, with and without a VLAN tag."""


@pytest.mark.parametrize("tags", [b"", VLAN], ids=["untagged", "VLAN"])
def test_headers_that_cross_descriptors_are_read_from_the_right_ones(tags: bytes) -> None:
    """Defect: once a field lay over two buffers, what followed was read from the wrong one."""
    features = without(NetFeature.CTRL_VLAN, NetFeature.GUEST_CSUM)
    layouts = {"transmit_layout": CROSSING, "receive_layout": CROSSING}
    with world(features, tags=tags, in_software=True, driver=layouts) as (guest, host):
        exchange()
        assert guest.dropped() == {}
        assert {"TCPV4", "TCPV6", "UDP_L4"} <= host.given & set(guest.sent)
        assert host.written == set(guest.received) == {"NONE"}


def test_num_buffers_counts_buffers_not_descriptors() -> None:
    """Defect: num_buffers was the number of descriptors."""
    with world(driver={"receive_layout": Layout(12, pieces=3)}) as (guest, _host):
        ping(ADDRESSES[0], size=100)
        assert guest.largest_count == 1
        exchange()
        assert 1 < guest.largest_count <= -(-65600 // 2048)


def test_gso_frames_with_a_zero_ipv4_checksum_arrive() -> None:
    """Bug: some drivers leave it 0 in what is to be segmented, and the host's kernel drops that."""
    with world() as (guest, host):
        send = guest.send

        def send_zeroed(frames: Sequence[Frame]) -> None:
            zeroed: list[Frame] = []
            for header, data in frames:
                if undone(bytes(header)) == "TCPV4":
                    data = bytes(data[:24]) + b"\0\0" + bytes(data[26:])
                zeroed.append([header, data])
            send(zeroed)

        guest.send = send_zeroed  # type: ignore[method-assign]
        exchange()
        assert "TCPV4" in host.written
        assert guest.dropped() == {}


# --- what leaves no trace ------------------------------------------------------------------------


def packets_at(name: str, count: int, work: Callable[[], None]) -> list[tuple[bytes, bool]]:
    """UDP packets, the first `count` of those for port 68, as a reader of raw frames sees them.

    With each whether the kernel says that its checksum is not there yet.
    """

    def open_socket() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        raw.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
        raw.settimeout(5)
        return raw

    def open_receiver() -> socket.socket:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("", 68))  # otherwise the sender is told that nobody is there
        return udp

    with in_namespace(name, open_socket) as raw, in_namespace(name, open_receiver):
        work()
        packets: list[tuple[bytes, bool]] = []
        while len(packets) < count:
            data, (message, *_), _, sender = raw.recvmsg(2048, 256)
            status = struct.unpack_from("=I", message[2])[0]
            is_udp = data[12:14] == b"\x08\x00" and data[23] == UDP
            if sender[2] != socket.PACKET_OUTGOING and is_udp and data[36:38] == b"\0D":
                packets.append((data, bool(status & 8)))  # TP_STATUS_CSUMNOTREADY
        return packets


def udp_checksum_is_right(frame: bytes) -> bool:
    length = int.from_bytes(frame[38:40], "big")
    pseudo = frame[26:34] + bytes((0, 17)) + frame[38:40]
    return slow_sum(pseudo + frame[34 : 34 + length]) == 0xFFFF


def send_from_host() -> None:
    with in_namespace(HOST, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as udp:
        for size in (0, 1, 300, 301):
            udp.sendto((b"\xa5\x5a\x01" * 200)[:size], ("10.88.0.1", 68))


@pytest.mark.parametrize(
    "features, complete_checksums, complete",
    [
        pytest.param(NET_DRIVER_FEATURES, False, False, id="taken"),
        pytest.param(NET_DRIVER_FEATURES, True, True, id="taken but completed"),
        pytest.param(TAKES_NOTHING, False, True, id="not taken"),
    ],
)
@pytest.mark.parametrize("in_software", [False, True], ids=["by the kernel", "here"])
def test_a_reader_of_raw_frames_gets_checksums_when_they_are_completed(
    in_software: bool, features: int, complete_checksums: bool, complete: bool
) -> None:
    """Bug: DHCP clients, which read raw frames, drop packets with a partial checksum.

    And a defect: NEEDS_CSUM was set without a look at GUEST_CSUM.
    """
    device = {"complete_checksums": complete_checksums}
    with world(features, in_software=in_software, device=device) as (guest, _host):
        packets = packets_at(GUEST, 4, send_from_host)
        assert [udp_checksum_is_right(frame) for frame, _ in packets] == [complete] * 4
        assert [not_ready for _, not_ready in packets] == [not complete] * 4
        exchange()
        assert guest.dropped() == {}
        assert (set(guest.received) == {"NONE"}) == complete


@pytest.mark.parametrize("in_software", [False, True], ids=["in the kernel", "finished here"])
def test_headers_that_do_not_parse_are_not_used(in_software: bool) -> None:
    """Defect: the results of parsing were used although it had failed."""
    tcp = make_frame(bytes(4000), ip_checksum=True)
    whole = NetHeader(HdrFlag.NEEDS_CSUM, HdrGso.TCPV4, 54, 1448, 34, 16)
    broken = {
        "ends in the IP header": tcp[:30],
        "ends in the TCP header": tcp[:53],
        "IP header of 4 bytes": tcp[:14] + b"\x41" + tcp[15:],
        "IP version 7": tcp[:14] + b"\x75" + tcp[15:],
        "TCP header of 8 bytes": tcp[:46] + b"\x20" + tcp[47:],
        "IP length beyond the frame": tcp[:16] + b"\xff\xff" + tcp[18:],
    }
    frames = [(whole, HOST_MAC + GUEST_MAC + data[12:]) for data in broken.values()]
    with world(in_software=in_software) as (guest, host):
        ping(ADDRESSES[0])

        def send_broken() -> int:
            before = host.ports[0].written.total()
            taken = guest.driver.send_burst(frames)
            assert taken == len(frames) and guest.driver.wait_sent()
            return host.ports[0].written.total() - before

        assert guest.do(send_broken) == 0
        dropped = guest.dropped()
        assert sum(dropped.values()) == len(frames), dropped
        assert all(
            reason.startswith(("tx_dropped: gso ", "tx_dropped: csum ")) for reason in dropped
        )
        assert not guest.driver.needs_reset
        exchange()
        assert guest.dropped() == dropped


def test_a_read_that_fails_is_no_frame() -> None:
    """Defect: a readv that had failed was taken for a frame."""
    with world() as (guest, host):
        run("ip", "-n", HOST, "link", "set", HOST, "down")  # from now on nothing comes
        guest.do(guest.carry_all)
        before = guest.device.stats["rx_frames"]
        port, watch = host.ports[0], guest.device.watches[0]

        def read(fd: int) -> int:
            real, port._fd = port.fileno(), fd
            try:
                watch.readable()
            finally:
                port._fd = real
            return len(guest.driver.receive())

        for _ in range(3):
            assert guest.do(partial(read, port.fileno())) == 0  # EAGAIN
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as unconnected:
            assert guest.do(partial(read, unconnected.fileno())) == 0  # ENOTCONN
        assert guest.device.stats["rx_frames"] == before
        assert not guest.do(lambda: guest.driver.settings.link_up)
        assert not guest.driver.needs_reset


# --- a locked MAC --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [Layout(), HEADER_APART, Layout(12, 20, 23, gap=3), Layout(7, indirect=True)],
    ids=["one piece", "header apart", "address cut", "header cut"],
)
def test_a_locked_mac_lets_all_of_a_linux_guests_frames_through(layout: Layout) -> None:
    """Defect: every frame was refused with "bad source address", because the header had moved."""
    with world(device={"lock_mac": True}, driver={"transmit_layout": layout}) as (guest, host):
        exchange()
        assert guest.dropped() == {}
        assert {"TCPV4", "TCPV6", "UDP_L4"} <= host.given & host.written


def test_a_locked_mac_keeps_other_addresses_out_both_ways() -> None:
    marker = b"not for this guest's eyes" * 8
    with world(device={"lock_mac": True}) as (guest, host):
        run(*f"ip -n {HOST} neigh add 10.88.0.9 lladdr 02:00:00:00:0a:09 dev {HOST}".split())
        ping(ADDRESSES[0])
        given = host.ports[0].given.total()
        with in_namespace(HOST, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as udp:
            for _ in range(50):
                udp.sendto(marker, ("10.88.0.9", 9))
        wait_for(lambda: host.ports[0].given.total() >= given + 50, "frame of the others")
        seen = guest.do(lambda: [marker in bytes(r.view) for r in guest.memory.regions])
        assert seen == [False]
        assert guest.dropped()["rx_dropped: filtered"] == 50
        run(*f"ip -n {GUEST} link set {GUEST} address 02:00:00:00:0a:08".split())
        assert "100% packet loss" in run_ping_that_fails(ADDRESSES[0])
        assert guest.dropped()["tx_dropped: source address"] >= 1
        assert not guest.do(lambda: guest.driver.set_mac(bytes.fromhex("020000000a08")))
        run(*f"ip -n {GUEST} link set {GUEST} address {GUEST_MAC.hex(':')}".split())
        ping(ADDRESSES[0])


# --- while traffic runs --------------------------------------------------------------------------


def frames_soon(guest: ScriptedGuest, count: int = 200) -> None:
    """Waits until the guest has got `count` more frames, or has sent them."""
    goal = sum(guest.received.values()) + sum(guest.sent.values()) + count
    wait_for(lambda: sum(guest.received.values()) + sum(guest.sent.values()) >= goal, "traffic")


def test_offloads_change_while_traffic_runs() -> None:
    """CTRL_GUEST_OFFLOADS: the kernel is asked anew, and what comes as before is finished here."""
    with world() as (guest, host):
        takes = guest.driver.features & TAKEN
        sets = [0, 1 << NetFeature.GUEST_CSUM, feature_mask((NetFeature.GUEST_CSUM, *GUEST_TSO))]
        with flows(*ADDRESSES, *ADDRESSES):
            for _ in range(2):
                for wanted in (*sets, takes):
                    expected = kinds(known_to_kernel(guest_offloads(wanted), host))

                    def change(wanted: int = wanted) -> None:
                        assert guest.driver.set_guest_offloads(wanted)
                        guest.driver.receive()  # what came before; TCP sends it again
                        guest.received.clear()

                    guest.do(change)
                    frames_soon(guest)
                    assert set(guest.received) <= expected
                    if wanted == takes:
                        wait_for(lambda: "TCPV4" in guest.received, "TSO4")
                        wait_for(lambda: "TCPV6" in guest.received, "TSO6")
        assert guest.dropped() == {}
        no_errors()


def test_flows_use_all_queue_pairs_and_pairs_come_and_go() -> None:
    with two_pairs() as (guest, host), flows(*ADDRESSES, *reversed(ADDRESSES)):
        for _ in range(3):
            counts = pairs_used(guest, host)
            assert all(counts), f"frames written and given by both queues: {counts}"
            assert guest.do(lambda: guest.driver.set_queue_pairs(1))
            counts = pairs_used(guest, host)
            assert counts[0] and counts[1], counts
            assert counts[2:] == [0, 0], counts
            assert guest.do(lambda: guest.driver.set_queue_pairs(2))
    # Frames in a queue that goes are lost, as on any network card, and are TCP's to send again.


def pairs_used(guest: ScriptedGuest, host: HostTap) -> list[int]:
    """How many frames each queue takes and gives from now on, for some time."""

    def count() -> list[int]:
        return [n for p in host.ports for n in (p.written.total(), p.given.total())]

    def enough() -> bool:
        after = guest.do(count)
        return all(b > a for a, b in zip(before, after, strict=True)) or guest.driver.pairs == 1

    before = guest.do(count)
    frames_soon(guest, 300)
    wait_for(enough, "traffic on every queue")
    return [b - a for a, b in zip(before, guest.do(count), strict=True)]


def test_a_second_pair_is_judged_as_the_first() -> None:
    with two_pairs() as (guest, host):
        with flows(*ADDRESSES, *reversed(ADDRESSES)):
            frames_soon(guest, 500)
        exchange()
        assert guest.dropped() == {}
        assert all({"TCPV4", "TCPV6"} <= port.written.keys() for port in host.ports)
        assert all(port.given.total() for port in host.ports)
        no_errors()


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_tap_that_is_deleted_during_traffic_leaves_the_device_alive(pairs: int) -> None:
    with (two_pairs if pairs == 2 else world)() as (guest, _host):
        with flows(*ADDRESSES, cut_short=True):
            assert guest.do(lambda: guest.driver.settings.link_up)
            run("ip", "-n", HOST, "link", "del", HOST)
            wait_for(lambda: not guest.do(lambda: guest.driver.settings.link_up), "word of it", 5)
            frames = guest.device.stats["rx_frames"]
        assert guest.device.stats["rx_frames"] == frames
        assert not guest.driver.needs_reset
        assert guest.do(lambda: guest.driver.set_receive_mode(CtrlRx.PROMISC, True))

        def send() -> bool:
            before = guest.device.stats["tx_dropped: link gone"]
            sent = guest.driver.send(make_frame(b"to nobody")) and guest.driver.wait_sent()
            return sent and guest.device.stats["tx_dropped: link gone"] == before + 1

        assert guest.do(send)
        if pairs == 2:
            assert guest.do(lambda: guest.driver.set_queue_pairs(1))
        guest.do(guest.driver.restart)
        assert not guest.driver.settings.link_up
        assert guest.do(send)


def test_an_interface_that_is_down_for_a_while_loses_frames_only_then() -> None:
    with world() as (guest, host):
        ping(ADDRESSES[0])
        run("ip", "-n", HOST, "link", "set", HOST, "down")
        guest.do(lambda: guest.driver.send(make_frame(b"to nobody")))
        assert host.ports[0].dropped["interface down"] >= 1
        run("ip", "-n", HOST, "link", "set", HOST, "up")
        ping(ADDRESSES[0])
        assert not guest.driver.needs_reset


def test_a_tap_that_is_full_now_and_then_loses_nothing() -> None:
    with world() as (guest, host):
        host.ports[0].most_at_once = 3
        with flows(*ADDRESSES, *ADDRESSES):
            frames_soon(guest, 500)
        exchange()
        assert host.ports[0].refused
        assert guest.dropped() == {}


# --- the tap's own properties --------------------------------------------------------------------


def test_the_guest_is_told_the_taps_mtu() -> None:
    host = HostTap()

    def make(guest: Link) -> ScriptedGuest:
        return ScriptedGuest(guest, host, NOTHING, device={"mtu": host.mtu})

    with two_namespaces(host, make, mtu=4000) as guest:
        assert guest.driver.settings.mtu == 4000
        exchange()
        assert host.ports[0].longest_plain == 4014
        assert guest.dropped() == {}


def test_frames_longer_than_the_guests_mtu_are_dropped_and_the_others_come() -> None:
    """The host's MTU was raised after the guest was told 1500."""
    with world(NOTHING, device={"mtu": 1500}) as (guest, host):
        exchange()
        host.set_mtu(9000)
        assert host.mtu == 9000
        with in_namespace(HOST, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as udp:
            udp.sendto(bytes(5000), ("10.88.0.1", 9))
        wait_for(
            lambda: guest.device.stats["rx_dropped: longer than the mtu"] == 1, "dropped frame"
        )
        assert host.ports[0].longest_plain == 14 + 20 + 8 + 5000
        assert not host.ports[0].dropped
        run("ip", "-n", HOST, "link", "set", HOST, "mtu", "1500")
        exchange()


def test_udp_is_left_unsegmented_where_the_kernel_has_it() -> None:
    with world() as (guest, host):
        if not host.known_flags & TunF.USO4:
            pytest.skip("this kernel has no TUN_F_USO4 (Linux 6.2)")
        exchange()
        assert guest.sent["UDP_L4"] == guest.received["UDP_L4"] == 2  # one for IPv4, one for IPv6
        assert sum(port.written["UDP_L4"] for port in host.ports) == 2
