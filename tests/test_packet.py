from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import net_frames as frames
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import MACS, TCP, UDP, make_frame, make_payload, slow_sum, split

from vq import packet as packets
from vq.errors import UsageError
from vq.packet import (
    Fragment,
    checksum,
    copy_range,
    cut,
    ones_complement_sum,
    parse,
    pseudo_header_sum,
    segment,
)

ALL_SHAPES: dict[str, dict[str, Any]] = {
    "tcp4": {},
    "tcp4 with options": {"options": b"\1" * 8, "tcp_options": b"\1" * 12},
    "tcp4 all options": {"options": b"\1" * 40, "tcp_options": b"\1" * 40, "vlan": frames.QINQ},
    "udp4": {"protocol": UDP, "vlan": frames.VLAN},
    "tcp6": {"version": 6},
    "udp6 extended": {
        "version": 6,
        "protocol": UDP,
        "extensions": (frames.HOP_BY_HOP, frames.DESTINATION),
    },
    "tcp6 routed": {
        "version": 6,
        "extensions": (frames.HOP_BY_HOP, frames.SEGMENT_ROUTING),
        "final": frames.FINAL,
    },
    "tcp6 long": {"version": 6, "extensions": ((60, b"\x1f" + bytes(254)),) * 5},
}
shapes = st.sampled_from(sorted(ALL_SHAPES)).map(ALL_SHAPES.__getitem__)
cuts = st.lists(st.integers(0, 400), max_size=12)


# --- parsing -------------------------------------------------------------------------------------


def test_a_tcp_packet_over_ipv4() -> None:
    frame = make_frame(b"x" * 100, options=b"\1" * 4, tcp_options=b"\1" * 8)
    packet = parse([frame])
    assert (packet.length, packet.ethertype, packet.l2_length) == (len(frame), 0x0800, 14)
    assert (packet.ip_version, packet.l3_offset, packet.l3_length) == (4, 14, 24 + 28 + 100)
    assert (packet.l4_protocol, packet.l4_offset, packet.header_length) == (6, 38, 66)
    assert packet.header == frame[:66]
    assert packet.destination_mac + packet.source_mac == MACS
    assert packet.l4_checksum_offset == 16
    assert packet.reason is None and not packet.is_fragment and packet.vlan_offset is None


def test_a_udp_packet_over_ipv6_behind_two_vlan_tags_and_extension_headers() -> None:
    chain = (frames.HOP_BY_HOP, frames.DESTINATION, (135, b"\1" + bytes(14)))
    frame = make_frame(b"x", version=6, protocol=UDP, vlan=frames.QINQ, extensions=chain)
    packet = parse([frame])
    assert (packet.vlan_count, packet.vlan_offset, packet.l2_length) == (2, 12, 22)
    assert (packet.ip_version, packet.l3_offset) == (6, 22)
    assert packet.extensions == (0, 60, 135)
    assert (packet.l4_protocol, packet.l4_offset) == (17, 22 + 40 + 8 + 16 + 16)
    assert packet.header_length == len(frame) - 1
    assert packet.l4_checksum_offset == 6


def test_an_authentication_header_counts_in_units_of_four_bytes() -> None:
    frame = make_frame(b"", version=6, extensions=((51, b"\4" + bytes(22)),))
    packet = parse([frame])
    assert packet.extensions == (51,)
    assert packet.l4_offset == 14 + 40 + 24


@pytest.mark.parametrize("kind", [1, 58])
def test_icmp_headers(kind: int) -> None:
    version = 4 if kind == 1 else 6
    frame = bytearray(make_frame(b"", protocol=UDP, version=version))
    frame[23 if version == 4 else 20] = kind
    packet = parse([frame])
    assert packet.l4_protocol == kind
    assert packet.l4_offset == 34 if version == 4 else 54
    assert packet.l4_checksum_offset == 2


@pytest.mark.parametrize(
    "tail", [b"\x08\x06" + bytes(28), b"\x00\x26\x42\x42\x03" + bytes(35), b"\x88\xcc" + bytes(46)]
)
def test_other_protocols_have_no_network_layer_and_nothing_is_wrong(tail: bytes) -> None:
    packet = parse([MACS + tail])
    assert packet.reason is None
    assert (packet.ip_version, packet.l3_offset, packet.l4_offset) == (0, None, None)
    assert packet.header_length == packet.l2_length == 14


@pytest.mark.parametrize(
    ("field", "kind", "reaches_transport"),
    [
        (0x4000, Fragment.NONE, True),
        (0x2000, Fragment.FIRST, True),
        (0x2010, Fragment.LATER, False),
        (0x0001, Fragment.LATER, False),
    ],
)
def test_ipv4_fragments(field: int, kind: Fragment, reaches_transport: bool) -> None:
    packet = parse([make_frame(b"x" * 64, fragment=field)])
    assert packet.fragment is kind
    assert packet.is_fragment == (kind is not Fragment.NONE)
    assert (packet.l4_offset is not None) == reaches_transport
    assert packet.l4_protocol == 6 and packet.reason is None


@pytest.mark.parametrize(
    ("field", "kind"), [(0, Fragment.NONE), (1, Fragment.FIRST), (0x51, Fragment.LATER)]
)
def test_ipv6_fragments(field: int, kind: Fragment) -> None:
    header = (44, b"\0" + field.to_bytes(2, "big") + b"\0\0\0\7")
    packet = parse([make_frame(b"x" * 64, version=6, extensions=(header,))])
    assert packet.fragment is kind
    assert packet.extensions == (44,)
    assert packet.l4_offset == (None if kind is Fragment.LATER else 62)
    assert packet.l4_protocol == 6 and packet.reason is None


def test_a_later_ipv6_fragment_is_not_searched_for_more_headers() -> None:
    header = (44, b"\0\0\x50\0\0\0\7")
    lie = (60, b"\xff" + bytes(6))
    packet = parse([make_frame(b"", version=6, extensions=(header, lie))])
    assert packet.reason is None
    assert packet.header_length == 14 + 40 + 8


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (14, 0x55, "IPv4 frame with another IP version"),
        (14, 0x44, "IPv4 header length below 20"),
        (17, 0x13, "IPv4 length shorter than its header"),
        (16, 0x7F, "IPv4 packet beyond the frame"),
        (46, 0x40, "TCP header length below 20"),
        (46, 0xF0, "TCP header truncated"),
    ],
)
def test_ipv4_headers_that_lie(place: int, value: int, reason: str) -> None:
    frame = bytearray(make_frame(b"x" * 8))
    frame[place] = value
    packet = parse([frame])
    assert packet.reason == reason
    assert packet.l4_offset is None


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (14, 0x45, "IPv6 frame with another IP version"),
        (18, 0x01, "IPv6 packet beyond the frame"),
        (55, 0x09, "IPv6 extension header truncated"),
        (54, 0x00, "hop-by-hop options not first"),
        (20, 0x3A, None),
    ],
)
def test_ipv6_headers_that_lie(place: int, value: int, reason: str | None) -> None:
    frame = bytearray(make_frame(b"x" * 8, version=6, extensions=(frames.HOP_BY_HOP,)))
    frame[place] = value
    packet = parse([frame])
    assert packet.reason == reason
    assert (packet.l4_offset is None) == (reason is not None)


def test_tags_and_extension_headers_without_end_are_given_up() -> None:
    assert parse([MACS + frames.VLAN * 8 + b"\x08\x06"]).reason is None
    assert parse([MACS + frames.VLAN * 9 + b"\x08\x06"]).reason == "too many VLAN tags"
    many = make_frame(b"", version=6, extensions=((60, bytes(7)),) * 16)
    assert parse([many]).l4_protocol == TCP
    many = make_frame(b"", version=6, extensions=((60, bytes(7)),) * 17)
    assert parse([many]).reason == "too many IPv6 extension headers"


def test_padding_behind_the_packet_does_not_belong_to_it() -> None:
    frame = make_frame(b"", protocol=UDP) + bytes(18)
    packet = parse([frame])
    assert packet.length == 60
    assert packet.l3_end == 42
    cut_short = bytearray(frame)
    cut_short[16:18] = b"\0\x1b"  # one byte less than IP and UDP need: padding does not help
    assert parse([cut_short]).reason == "UDP header truncated"


def test_a_length_of_zero_means_up_to_the_frames_end() -> None:
    for version, place in ((4, 16), (6, 18)):
        frame = bytearray(make_frame(b"x" * 30, version=version))
        frame[place : place + 2] = b"\0\0"
        packet = parse([frame])
        assert packet.l3_end == len(frame)
        assert packet.l4_offset is not None


def test_no_pieces_at_all() -> None:
    for pieces in ([], [b""], [b"", b"", b"x" * 13]):
        packet = parse(pieces)
        assert packet.reason == "frame shorter than an Ethernet header"
        assert packet.header == b"" and packet.source_mac == b""


@given(shapes, cuts, st.integers(0, 60))
@settings(max_examples=120)
def test_any_fragmentation_parses_the_same(
    shape: dict[str, Any], where: list[int], size: int
) -> None:
    frame = make_frame(make_payload(size), **shape)
    packet = parse(split(frame, where))
    assert packet == parse([frame])
    assert packet == parse([bytes((byte,)) for byte in frame])
    assert packet.reason is None
    assert packet.header + make_payload(size) == frame


def assert_inside(packet: packets.Packet) -> None:
    assert len(packet.header) == packet.header_length <= packet.length
    for place in (packet.l2_length, packet.l3_offset, packet.l3_end, packet.l4_offset):
        assert place is None or 0 <= place <= packet.length
    if packet.final_destination is not None:
        assert packet.final_destination + 16 <= packet.header_length
    if packet.ip_version:
        assert packet.l3_offset is not None
        assert packet.header_length <= packet.l3_end
        assert 0 <= pseudo_header_sum(packet, 8, UDP) <= 0xFFFF
    if packet.l4_offset is not None and packet.l4_checksum_offset is not None:
        assert packet.l4_offset + packet.l4_checksum_offset + 2 <= packet.header_length


@given(
    shapes,
    st.lists(st.tuples(st.integers(12, 120), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
    cuts,
)
@settings(max_examples=300)
def test_no_damage_leads_outside_the_frame(
    shape: dict[str, Any], damage: list[tuple[int, int]], length: int, where: list[int]
) -> None:
    frame = bytearray(make_frame(make_payload(40), **shape))
    for place, value in damage:
        frame[place % len(frame)] = value
    whole = bytes(frame[:length])
    packet = parse(split(whole, where))
    assert_inside(packet)
    assert packet.header == whole[: packet.header_length]


@given(
    st.sampled_from([b"\x08\x00E", b"\x86\xdd`", b"\x81\0\0\0\x86\xdd`"]), st.binary(max_size=200)
)
@settings(max_examples=200)
def test_no_noise_leads_outside_the_frame(start: bytes, noise: bytes) -> None:
    assert_inside(parse([MACS, start, noise]))


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_a_truncated_frame_has_a_reason_wherever_it_ends(shape: dict[str, Any]) -> None:
    frame = make_frame(b"", **shape)
    for length in range(len(frame)):
        packet = parse([frame[:length]])
        assert packet.reason is not None
        assert packet.l4_offset is None
        assert_inside(packet)


@given(shapes, cuts)
@settings(max_examples=50)
def test_what_was_parsed_is_private(shape: dict[str, Any], where: list[int]) -> None:
    frame = bytearray(make_frame(make_payload(40), **shape))
    before = bytes(frame)
    packet = parse(split(frame, where))
    frame[:] = bytes(len(frame))
    assert packet.header == before[: packet.header_length]


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_no_byte_is_read_twice(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []

    def noted(pieces: Sequence[packets.Buffer], start: int, stop: int) -> bytes:
        ranges.append((start, stop))
        return copy_range(pieces, start, stop)

    frame = make_frame(make_payload(5000), **shape)
    monkeypatch.setattr(packets, "copy_range", noted)
    packet = parse(split(frame, [3, 17, 50, 51, 90]))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert packet.header_length <= ranges[-1][1] <= packet.header_length + 128


@given(st.binary(max_size=60), cuts, st.integers(0, 70), st.integers(0, 70))
@settings(max_examples=100)
def test_cutting_and_copying_ranges(data: bytes, where: list[int], start: int, stop: int) -> None:
    pieces = split(data, where)
    assert b"".join(cut(pieces, start, stop)) == data[start:stop]
    assert b"".join(cut(pieces, start)) == data[start:]
    assert copy_range(pieces, start, stop) == data[start:stop]
    assert all(len(view) for view in cut(pieces, start, stop))


# --- the checksum --------------------------------------------------------------------------------


def test_the_example_of_rfc_1071() -> None:
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert ones_complement_sum([data]) == 0xDDF2
    assert checksum([data]) == 0x220D
    assert checksum([data, b"\x22\x0d"]) == 0


def test_both_forms_of_zero() -> None:
    assert ones_complement_sum([]) == 0
    assert ones_complement_sum([bytes(7), bytes(8)]) == 0
    assert ones_complement_sum([b"\xff\xff"]) == 0xFFFF
    assert ones_complement_sum([b"\x12\x34", b"\xed\xcb"]) == 0xFFFF
    assert ones_complement_sum([bytes(2)], initial=0xFFFF) == 0xFFFF
    assert ones_complement_sum([b"\xff\xff"], initial=0xFFFF) == 0xFFFF
    assert ones_complement_sum([b"\0\xff", b"\xff"]) == 0x00FF + 0xFF00


@given(
    st.one_of(st.binary(max_size=80), st.lists(st.sampled_from([0, 255]), max_size=9).map(bytes)),
    cuts,
    st.integers(0, 20),
    st.integers(0, 0xFFFF),
)
@settings(max_examples=300)
def test_the_sum_is_that_of_the_joined_words(
    data: bytes, where: list[int], start: int, initial: int
) -> None:
    where = [w % (len(data) + 1) for w in where]
    expected = slow_sum(initial.to_bytes(2, "big") + data[start:])
    assert ones_complement_sum(split(data, where), start, initial) == expected
    assert checksum(split(data, where), start, initial) == 0xFFFF - expected


def test_a_large_piece() -> None:
    data = make_payload(65549)
    assert ones_complement_sum([data[:1001], bytearray(data[1001:])]) == slow_sum(data)


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_the_pseudo_header_is_the_one_that_a_driver_sums(shape: dict[str, Any]) -> None:
    frame = make_frame(make_payload(33), **shape)
    packet = parse([frame])
    assert packet.l4_offset is not None and packet.l4_checksum_offset is not None
    assert packet.l4_protocol is not None
    field = packet.l4_offset + packet.l4_checksum_offset
    found = pseudo_header_sum(packet, len(frame) - packet.l4_offset, packet.l4_protocol)
    assert found.to_bytes(2, "big") == frame[field : field + 2]


def test_the_pseudo_header_has_the_final_destination() -> None:
    # RFC 8200, 8.1; type 0 lists the stops in order, type 4 the last one first
    plain = slow_sum(parse([make_frame(b"", version=6)]).header[22:54] + b"\0\x14\0\x06")
    for routing in (frames.SEGMENT_ROUTING, frames.SOURCE_ROUTING):
        frame = bytearray(make_frame(b"", version=6, extensions=(routing,)))
        source = bytes(frame[22:38])
        packet = parse([frame])
        expected = slow_sum(source + frames.FINAL + b"\0\x14\0\x06")
        assert pseudo_header_sum(packet, 20, TCP) == expected != plain
        frame[57] = 0  # no segments left: the packet is where it was to go
        assert pseudo_header_sum(parse([frame]), 20, TCP) == plain


@pytest.mark.parametrize("kind", [0, 2, 3, 4, 99])
def test_a_routing_header_without_addresses_leads_nowhere(kind: int) -> None:
    routing = (43, b"\0" + bytes((kind, 1)) + bytes(4))
    packet = parse([make_frame(b"", version=6, extensions=(routing,))])
    assert packet.final_destination is None
    plain = parse([make_frame(b"", version=6)])
    assert pseudo_header_sum(packet, 20, TCP) == pseudo_header_sum(plain, 20, TCP)


def test_no_pseudo_header_without_a_network_layer() -> None:
    with pytest.raises(UsageError):
        pseudo_header_sum(parse([MACS + b"\x08\x06" + bytes(46)]), 8, UDP)


# --- segmentation --------------------------------------------------------------------------------


def join(segments: list[list[packets.Buffer]]) -> list[bytes]:
    return [b"".join(one) for one in segments]


def transport_sum(packet: packets.Packet, frame: bytes) -> int:
    """The sum over pseudo-header and transport, computed apart from `vq`."""
    header, l3, l4 = packet.header, packet.l3_offset, packet.l4_offset
    assert l3 is not None and l4 is not None and packet.l4_protocol is not None
    size = 8 if packet.ip_version == 4 else 32
    start = l3 + (12 if packet.ip_version == 4 else 8)
    addresses = header[start : start + size]
    if packet.final_destination is not None:
        addresses = addresses[:16] + frames.FINAL
    length = packet.l3_end - l4
    return slow_sum(addresses + struct.pack("!II", length, packet.l4_protocol) + frame[l4:])


@given(shapes, cuts, st.integers(0, 300), st.integers(1, 120), st.integers(0, 0xFF))
@settings(max_examples=150)
def test_segments_carry_the_stream_and_verify(
    shape: dict[str, Any], where: list[int], size: int, mss: int, flags: int
) -> None:
    payload = make_payload(size)
    frame = make_frame(payload, tcp_flags=flags, **shape)
    pieces = split(frame, where)
    original = parse(pieces)
    segments = join(segment(original, pieces, mss, partial=False))
    assert len(segments) == max(1, -(-size // mss))
    stream = b""
    for index, one in enumerate(segments):
        packet = parse([one])
        assert packet.reason is None and packet.l3_end == packet.length
        l3, l4 = packet.l3_offset, packet.l4_offset
        assert (l3, l4) == (original.l3_offset, original.l4_offset)
        assert l3 is not None and l4 is not None
        assert transport_sum(packet, one) == 0xFFFF
        if packet.ip_version == 4:
            assert slow_sum(one[l3 : l3 + (one[l3] & 15) * 4]) == 0xFFFF
            (identification,) = struct.unpack_from("!H", one, l3 + 4)
            assert identification == (0xFFFE + index) & 0xFFFF
        last = index == len(segments) - 1
        if packet.l4_protocol == TCP:
            assert struct.unpack_from("!I", one, l4 + 4)[0] == (0xFFFFFC00 + len(stream)) % 2**32
            kept = (0xFF if last else 0xF6) & (0xFF if index == 0 else 0x7F)
            assert one[l4 + 13] == flags & kept
        else:
            assert struct.unpack_from("!H", one, l4 + 4)[0] == len(one) - l4
        body = one[packet.header_length :]
        assert len(body) == mss or last
        stream += body
    assert stream == payload


@given(shapes, st.integers(0, 200), st.integers(1, 99))
@settings(max_examples=60)
def test_partial_segments_are_what_a_driver_would_send(
    shape: dict[str, Any], size: int, mss: int
) -> None:
    frame = make_frame(make_payload(size), **shape)
    finished = join(segment(parse([frame]), [frame], mss, partial=False))
    partial = join(segment(parse([frame]), [frame], mss, partial=True))
    assert len(finished) == len(partial)
    for done, undone in zip(finished, partial, strict=True):
        packet = parse([undone])
        assert packet.l4_offset is not None and packet.l4_checksum_offset is not None
        field = packet.l4_offset + packet.l4_checksum_offset
        value = 0xFFFF - slow_sum(undone[packet.l4_offset :])
        assert undone[:field] + value.to_bytes(2, "big") + undone[field + 2 :] == done


def test_the_ipv4_checksum_that_a_driver_left_zero_is_computed() -> None:
    frame = make_frame(make_payload(300), ip_checksum=False)
    right = make_frame(make_payload(300))
    assert frame != right
    assert join(segment(parse([frame]), [frame], 100, partial=False)) == join(
        segment(parse([right]), [right], 100, partial=False)
    )


def test_payload_is_not_copied() -> None:
    frame = bytearray(make_frame(make_payload(300)))
    whole = memoryview(frame)
    segments = segment(parse([whole]), [whole[:100], whole[100:]], 120, partial=True)
    frame[54:] = b"\xaa" * 300
    for header, *views in segments:
        assert isinstance(header, bytearray) and len(header) == 54
        assert b"".join(views) == b"\xaa" * sum(map(len, views))


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_only_a_udp_checksum_of_zero_is_sent_as_ffff(protocol: int) -> None:
    # Two payload bytes that bring the sum to 0xffff, so that its complement is 0.
    frame = bytearray(make_frame(b"\0\0", protocol=protocol))
    l4 = 34
    frame[-2:] = (0xFFFF - slow_sum(bytes(frame[l4:]))).to_bytes(2, "big")
    (done,) = join(segment(parse([frame]), [frame], 2, partial=False))
    field = l4 + (16 if protocol == TCP else 6)
    assert done[field : field + 2] == (b"\0\0" if protocol == TCP else b"\xff\xff")


def test_what_cannot_be_segmented_is_the_callers_fault() -> None:
    whole = make_frame(make_payload(9))
    for frame in (
        MACS + b"\x08\x06" + bytes(46),
        make_frame(b"x" * 9, fragment=0x2000),
        whole[:40],
    ):
        with pytest.raises(UsageError):
            segment(parse([frame]), [frame], 4, partial=False)
    with pytest.raises(UsageError):
        segment(parse([whole]), [whole], 0, partial=False)
    long = bytearray(make_frame(make_payload(9)) + bytes(70000))
    long[16:18] = b"\0\0"
    with pytest.raises(UsageError):
        segment(parse([long]), [long], 65500, partial=False)
