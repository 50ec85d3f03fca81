"""The capture that vq ships holds what it is said to hold, with right checksums throughout.

The frames are taken apart here by a parser of the tests' own, which shares nothing with vq's, and
every checksum is summed word by word as RFC 1071 puts it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import vq
from vq.pcap import CapturedFrame, read_frames

SAMPLE = Path(vq.__file__).parent / "data" / "sample.pcapng"

VLAN_TYPES = (0x8100, 0x88A8)
ICMP, IGMP, TCP, UDP, ICMP6 = 1, 2, 6, 17, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60


@dataclass
class Packet:
    """What one frame turned out to be."""

    part: str
    frame: bytes
    tags: list[tuple[int, int]] = field(default_factory=list)
    """(type, tag control information), the outermost first."""
    ether_type: int = 0
    version: int = 0
    options: bytes = b""
    """The IPv4 header's."""
    headers: list[int] = field(default_factory=list)
    """The IPv6 extension headers' types."""
    fragment: bool = False
    protocol: int | None = None
    segment: bytes = b""
    """From the TCP, UDP or ICMP header on; of a fragment its piece."""
    pseudo: bytes = b""
    """The pseudo header's addresses and protocol, without the length."""
    fragment_key: tuple[object, ...] = ()
    fragment_offset: int = 0
    more_fragments: bool = False


def ones_complement_sum(data: bytes) -> int:
    total = 0
    if len(data) % 2:
        data += b"\0"
    for (word,) in struct.iter_unpack(">H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def take_apart(captured: CapturedFrame) -> Packet:
    data = captured.data
    packet = Packet(captured.interface, data)
    (kind,) = struct.unpack_from(">H", data, 12)
    at = 14
    while kind in VLAN_TYPES:
        tci, inner = struct.unpack_from(">HH", data, at)
        packet.tags.append((kind, tci))
        kind, at = inner, at + 4
    packet.ether_type = kind
    if kind == 0x0800:
        take_ipv4_apart(packet, data[at:])
    elif kind == 0x86DD:
        take_ipv6_apart(packet, data[at:])
    return packet


def take_ipv4_apart(packet: Packet, data: bytes) -> None:
    packet.version = data[0] >> 4
    size = (data[0] & 15) * 4
    length, ident, place = struct.unpack_from(">HHH", data, 2)
    assert len(data) >= length
    assert ones_complement_sum(data[:size]) == 0xFFFF, "an IPv4 header checksum is wrong"
    packet.options = data[20:size]
    packet.protocol = data[9]
    packet.segment = data[size:length]
    packet.pseudo = data[12:20] + bytes([0, data[9]])
    packet.fragment = bool(place & 0x3FFF)
    packet.fragment_key = (packet.part, data[12:20], ident, data[9])
    packet.fragment_offset = (place & 0x1FFF) * 8
    packet.more_fragments = bool(place & 0x2000)


def take_ipv6_apart(packet: Packet, data: bytes) -> None:
    packet.version = data[0] >> 4
    (length,) = struct.unpack_from(">H", data, 4)
    assert len(data) >= 40 + length
    source, target = data[8:24], data[24:40]
    following, rest = data[6], data[40 : 40 + length]
    while following in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION):
        packet.headers.append(following)
        if following == FRAGMENT:
            packet.fragment = True
            place, ident = struct.unpack_from(">HI", rest, 2)
            packet.fragment_key = (packet.part, source, target, ident)
            packet.fragment_offset = place & 0xFFF8
            packet.more_fragments = bool(place & 1)
            following, rest = rest[0], rest[8:]
            break  # what follows is whole only when all the fragments are
        if following == ROUTING and rest[3]:
            target = rest[8:24]  # RFC 8200, 8.1, and RFC 8754: segment 0 is the last on the way
        following, rest = rest[0], rest[8 * (rest[1] + 1) :]
    packet.protocol = following
    packet.segment = rest
    packet.pseudo = source + target + bytes([0, following])


def put_together(fragments: list[Packet]) -> Packet:
    """The whole datagram of a complete set of fragments."""
    fragments = sorted(fragments, key=lambda packet: packet.fragment_offset)
    whole = bytearray()
    for packet in fragments:
        assert packet.fragment_offset == len(whole), "a fragment is missing"
        whole += packet.segment
    assert [packet.more_fragments for packet in fragments] == [True] * (len(fragments) - 1) + [
        False
    ]
    first = fragments[0]
    result = Packet(first.part, b"", first.tags, first.ether_type, first.version)
    result.protocol, result.segment, result.pseudo = first.protocol, bytes(whole), first.pseudo
    while result.protocol == DESTINATION:
        result.headers.append(DESTINATION)
        result.protocol = result.segment[0]
        result.segment = result.segment[8 * (result.segment[1] + 1) :]
        result.pseudo = result.pseudo[:-1] + bytes([result.protocol])
    return result


def checksum_field(packet: Packet) -> int:
    offset = {TCP: 16, UDP: 6}.get(packet.protocol or 0, 2)
    (value,) = struct.unpack_from(">H", packet.segment, offset)
    return int(value)


def has_right_checksum(packet: Packet) -> bool:
    """Whether the checksum of a packet that is no fragment is finished and right, if it has one."""
    segment = packet.segment
    if packet.protocol == UDP:
        assert struct.unpack_from(">H", segment, 4) == (len(segment),)
        if checksum_field(packet) == 0:
            return True
    if packet.protocol in (TCP, UDP, ICMP6):
        covered = packet.pseudo + struct.pack(">I", len(segment)) + segment
    else:
        assert packet.protocol in (ICMP, IGMP), packet
        covered = segment
    return ones_complement_sum(covered) == 0xFFFF


def is_whole(captured: CapturedFrame) -> bool:
    """Not so the runts, some of which have less in them than their headers say."""
    return captured.interface != "odd" or len(captured.data) > 20


@pytest.fixture(scope="module")
def frames() -> list[CapturedFrame]:
    return list(read_frames(SAMPLE))


@pytest.fixture(scope="module")
def packets(frames: list[CapturedFrame]) -> list[Packet]:
    return [take_apart(captured) for captured in frames if is_whole(captured)]


@pytest.fixture(scope="module")
def datagrams(packets: list[Packet]) -> list[Packet]:
    """The datagrams that were sent in fragments."""
    sets: dict[tuple[object, ...], list[Packet]] = {}
    for packet in packets:
        if packet.fragment:
            sets.setdefault(packet.fragment_key, []).append(packet)
    return [put_together(fragments) for fragments in sets.values()]


def transports(packets: list[Packet]) -> Iterator[Packet]:
    return (packet for packet in packets if packet.version and not packet.fragment)


def test_it_is_small_and_whole(frames: list[CapturedFrame]) -> None:
    assert SAMPLE.stat().st_size < 640_000
    assert 500 < len(frames) < 1000
    assert all(frame.length == len(frame.data) for frame in frames)
    assert all(frame.timestamp_ns > 1_700_000_000 * 10**9 for frame in frames)
    assert {frame.inbound for frame in frames} == {True, False}


def test_every_checksum_is_finished_and_right(
    packets: list[Packet], datagrams: list[Packet]
) -> None:
    checked: Counter[tuple[int, int | None]] = Counter()
    for packet in [*transports(packets), *datagrams]:
        assert has_right_checksum(packet), (packet.part, packet.frame[:80].hex())
        checked[packet.version, packet.protocol] += 1
    for kind in ((4, TCP), (6, TCP), (4, UDP), (6, UDP), (4, ICMP), (6, ICMP6)):
        assert checked[kind] >= 20, kind
    assert checked[4, IGMP] >= 1


def test_a_changed_byte_would_be_noticed(packets: list[Packet]) -> None:
    seen = set()
    for packet in transports(packets):
        if packet.protocol == UDP and checksum_field(packet) == 0:
            continue
        packet.segment = packet.segment[:-1] + bytes([packet.segment[-1] ^ 0x40])
        assert not has_right_checksum(packet)
        packet.segment = packet.segment[:-1] + bytes([packet.segment[-1] ^ 0x40])
        seen.add(packet.protocol)
    assert seen == {ICMP, IGMP, TCP, UDP, ICMP6}


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_comes_with_its_options(packets: list[Packet], version: int) -> None:
    kinds: Counter[int] = Counter()
    flags = 0
    plain = syn_with_data = False
    for packet in transports(packets):
        if packet.version != version or packet.protocol != TCP:
            continue
        segment = packet.segment
        header = (segment[12] >> 4) * 4
        flags |= segment[13]
        plain = plain or (header == 20 and len(segment) > 20)
        syn_with_data = syn_with_data or (bool(segment[13] & 2) and len(segment) > header)
        options = segment[20:header]
        while options and options[0]:
            kinds[options[0]] += 1
            options = options[1 if options[0] == 1 else options[1] :]
    # No operation, segment size, window scale, SACK permitted, SACK, time stamps, fast open.
    assert {1, 2, 3, 4, 5, 8, 34} <= set(kinds)
    assert kinds[5] >= 3
    assert flags & 0x3F == 0x3F, "FIN, SYN, RST, PSH, ACK or URG is missing"
    assert flags & 0x40, "ECE is missing"
    assert plain
    assert syn_with_data


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_frames_reach_64_kib(packets: list[Packet], version: int) -> None:
    sizes = {
        len(packet.frame)
        for packet in packets
        if packet.version == version and packet.protocol == TCP
    }
    assert max(sizes) == 65535 + 14
    assert len([size for size in sizes if size > 1514]) >= 5


@pytest.mark.parametrize("version", [4, 6])
def test_udp_comes_in_odd_lengths_and_with_special_checksums(
    packets: list[Packet], version: int
) -> None:
    found = [p for p in transports(packets) if p.version == version and p.protocol == UDP]
    lengths = {len(packet.segment) - 8 for packet in found}
    assert {0, 1, 2, 3, 17, 19, 511} <= lengths
    checksums = Counter(checksum_field(packet) for packet in found)
    assert checksums[0] >= 4
    assert checksums[0xFFFF] >= 1


@pytest.mark.parametrize(
    ("version", "protocol", "kinds"),
    [
        (4, ICMP, {0, 3, 8}),
        # Unreachable, echo, router and neighbour solicitation, neighbour advertisement, MLDv2.
        (6, ICMP6, {1, 128, 129, 133, 135, 136, 143}),
    ],
)
def test_icmp_comes_in_many_kinds(
    packets: list[Packet], version: int, protocol: int, kinds: set[int]
) -> None:
    found = [p for p in transports(packets) if (p.version, p.protocol) == (version, protocol)]
    assert kinds <= {packet.segment[0] for packet in found}
    assert {len(packet.segment) % 2 for packet in found} == {0, 1}


def test_an_address_is_probed_for_duplicates(packets: list[Packet]) -> None:
    solicitations = [p for p in packets if p.protocol == ICMP6 and p.segment[0] == 135]
    assert any(packet.pseudo[:16] == bytes(16) for packet in solicitations)


def test_arp_asks_and_answers(packets: list[Packet]) -> None:
    operations = {p.frame[20:22] for p in packets if p.ether_type == 0x0806 and not p.tags}
    assert operations == {b"\0\1", b"\0\2"}


def test_frames_go_to_one_to_many_and_to_all(packets: list[Packet]) -> None:
    assert {packet.frame[:3] for packet in packets} >= {
        bytes.fromhex("020000"),
        bytes.fromhex("01005e"),
        bytes.fromhex("333300"),
        bytes.fromhex("ffffff"),
    }


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_ipv4_options_come_before_everything(packets: list[Packet], protocol: int) -> None:
    found = [packet for packet in transports(packets) if packet.protocol == protocol]
    first = {packet.options[0] for packet in found if packet.options}
    assert {7, 68, 148} <= first  # record route, time stamps, router alert


def test_igmp_has_the_router_alert_option(packets: list[Packet]) -> None:
    assert any(p.protocol == IGMP and p.options == bytes([148, 4, 0, 0]) for p in packets)


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP6])
def test_ipv6_extension_headers_come_before_everything(
    packets: list[Packet], protocol: int
) -> None:
    chains = {tuple(p.headers) for p in transports(packets) if p.protocol == protocol}
    assert {(), (HOP_BY_HOP,), (DESTINATION,), (HOP_BY_HOP, DESTINATION)} <= chains


def test_a_routing_header_has_a_segment_left(packets: list[Packet]) -> None:
    routed = [packet for packet in transports(packets) if ROUTING in packet.headers]
    assert len(routed) >= 2
    # Their checksums hold the last destination, not the one in the IPv6 header.
    assert all(packet.pseudo[16:32] != packet.frame[38:54] for packet in routed)


@pytest.mark.parametrize("version", [4, 6])
def test_large_tcp_frames_come_behind_options_too(packets: list[Packet], version: int) -> None:
    assert any(
        len(packet.frame) > 10_000
        for packet in packets
        if packet.version == version
        and packet.protocol == TCP
        and packet.options + bytes(packet.headers)
    )


@pytest.mark.parametrize(("version", "echo"), [(4, ICMP), (6, ICMP6)])
def test_datagrams_come_in_fragments(datagrams: list[Packet], version: int, echo: int) -> None:
    found = [packet for packet in datagrams if packet.version == version]
    assert {packet.protocol for packet in found} == {UDP, echo}
    assert {1473, 4001} <= {len(packet.segment) - 8 for packet in found}


def test_fragments_come_with_other_headers(packets: list[Packet], datagrams: list[Packet]) -> None:
    assert any(packet.fragment and packet.options for packet in packets)
    for header in (HOP_BY_HOP, DESTINATION, ROUTING):
        assert any(packet.headers == [header, FRAGMENT] for packet in packets)
    assert any(packet.headers == [DESTINATION] for packet in datagrams)


@pytest.mark.parametrize(
    "tags",
    [
        [(0x8100, 7)],
        [(0x88A8, 100), (0x8100, 4094)],
        [(0x8100, 200), (0x8100, 7)],
    ],
)
def test_vlan_tags_come_before_everything(
    packets: list[Packet], tags: list[tuple[int, int]]
) -> None:
    found = [p for p in packets if [(kind, tci & 0xFFF) for kind, tci in p.tags] == tags]
    assert {(packet.version, packet.protocol) for packet in found} >= {
        (4, TCP),
        (4, UDP),
        (4, ICMP),
        (6, TCP),
        (6, UDP),
        (6, ICMP6),
    }
    assert any(packet.ether_type == 0x0806 for packet in found)
    assert any(packet.protocol == TCP and len(packet.frame) > 1522 for packet in found)
    assert any(tci >> 13 for packet in found for _, tci in packet.tags), "no tag has a priority"


@pytest.mark.parametrize("protocols", [(4, UDP), (4, ICMP), (6, UDP), (6, ICMP6)])
def test_jumbo_frames(packets: list[Packet], protocols: tuple[int, int]) -> None:
    assert any(
        len(packet.frame) == 9014 and (packet.version, packet.protocol) == protocols
        for packet in transports(packets)
    )


def test_runts_and_frames_that_are_not_ip(
    frames: list[CapturedFrame], packets: list[Packet]
) -> None:
    odd = [frame.data for frame in frames if frame.interface == "odd"]
    assert {14, 15, 16, 41, 59, 60} <= {len(data) for data in odd if data[12:14] == b"\x88\xb5"}
    cut = [frame.data[12:] for frame in frames if not is_whole(frame)]
    assert {b"\x08\x00", b"\x08\x00\x45", b"\x86\xdd\x60"} <= set(cut)
    # A bridge's own, in 802.3 framing with a length where the type would be.
    assert any(packet.frame[:6].hex() == "0180c2000000" for packet in packets)
    assert any(packet.ether_type < 1536 for packet in packets)
