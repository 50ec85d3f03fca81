"""OpenBSD's per-frame header: its layout, and its translation to and from virtio's."""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import (
    DESTINATION,
    HOP_BY_HOP,
    QINQ,
    SEGMENT_ROUTING,
    TCP,
    UDP,
    VLAN,
    make_frame,
    make_payload,
    slow_sum,
    split,
)

from vq.abi import NET_HDR
from vq.tun_hdr import TUN_HDR, TunFlag, TunHdr, TunHdrLie, from_tun, tagged, to_tun

PLAIN = bytes(12)
NEEDS_CSUM = 1
CSUM_OFFSET = {TCP: 16, UDP: 6}
FLAG = {TCP: 0x200, UDP: 0x400}


def net_header(frame: bytes, protocol: int = TCP, *, gso_type: int = 0, gso_size: int = 0) -> bytes:
    """The header that a driver puts in front of one of `make_frame`'s frames."""
    start = transport_of(frame, protocol)
    length = start + (20 if protocol == TCP else 8) if gso_type else 0
    fields = NEEDS_CSUM, gso_type, length, gso_size, start, CSUM_OFFSET[protocol], 0
    return NET_HDR.pack(*fields)


def transport_of(frame: bytes, protocol: int) -> int:
    """Where the ports that `make_frame` uses stand."""
    return frame.index(struct.pack("!HH", 1000, 2000))


def spoiled(frame: bytes, protocol: int) -> bytearray:
    """The frame with rubbish where its transport checksum goes."""
    field = transport_of(frame, protocol) + CSUM_OFFSET[protocol]
    return bytearray(frame[:field] + b"\xde\xad" + frame[field + 2 :])


def writable(frame: bytes | bytearray, cuts: list[int]) -> list[memoryview]:
    whole = memoryview(bytearray(frame))
    edges = [0, *sorted(min(at, len(frame)) for at in cuts), len(frame)]
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


def joined(pieces: list[memoryview]) -> bytes:
    return b"".join(pieces)


# --- layout --------------------------------------------------------------------------------------


def test_the_header_has_the_layout_of_net_if_tun_h() -> None:
    header = TunHdr(th_flags=0x230, th_pad=0, th_vtag=0x6005, th_mss=1448)
    golden = {
        "little": b"\x30\x02\x00\x00\x05\x60\xa8\x05",
        "big": b"\x02\x30\x00\x00\x60\x05\x05\xa8",
    }[sys.byteorder]
    assert bytes(header) == golden
    assert TUN_HDR.pack(0x230, 0, 0x6005, 1448) == golden
    assert ctypes.sizeof(TunHdr) == 8
    assert TunHdr.th_mss.offset == 6


def test_the_flags_have_the_numbers_of_net_if_tun_h() -> None:
    assert [(flag.name, int(flag)) for flag in TunFlag] == [
        ("VTAG", 0x10),
        ("TCP_MSS", 0x20),
        ("IPV4_CSUM", 0x100),
        ("TCP_CSUM", 0x200),
        ("UDP_CSUM", 0x400),
        ("ICMP_CSUM", 0x800),
    ]


# --- towards the tap -----------------------------------------------------------------------------


def test_a_complete_frame_gets_an_empty_header_and_keeps_its_tag() -> None:
    pieces = split(make_frame(b"data", vlan=VLAN), [5, 14])
    assert to_tun([PLAIN, *pieces]) == [bytes(8), *pieces]


@given(
    protocol=st.sampled_from((TCP, UDP)),
    version=st.sampled_from((4, 6)),
    vlan=st.sampled_from((b"", VLAN)),
    more=st.booleans(),
    cuts=st.lists(st.integers(0, 120), max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_a_checksum_left_undone_becomes_the_flag_of_its_protocol(
    protocol: int, version: int, vlan: bytes, more: bool, cuts: list[int]
) -> None:
    frame = make_frame(
        make_payload(61),
        protocol=protocol,
        version=version,
        vlan=vlan,
        options=bytes(8) if more else b"",
        extensions=(HOP_BY_HOP, DESTINATION) if more else (),
    )
    outgoing = to_tun([net_header(frame, protocol), *split(frame, cuts)])
    assert outgoing is not None
    flags, pad, tag, mss = TUN_HDR.unpack(outgoing[0])
    assert flags == FLAG[protocol] | (TunFlag.VTAG if vlan else 0)
    assert (pad, tag, mss) == (0, 5 if vlan else 0, 0)
    assert b"".join(outgoing[1:]) == frame[:12] + frame[12 + len(vlan) :]


@pytest.mark.parametrize("version, gso_type", [(4, 1), (6, 4)])
@pytest.mark.parametrize("vlan", [b"", VLAN])
def test_tso_becomes_tcp_mss(version: int, gso_type: int, vlan: bytes) -> None:
    frame = make_frame(make_payload(4000), version=version, vlan=vlan)
    outgoing = to_tun([net_header(frame, gso_type=gso_type, gso_size=1400), *split(frame, [70])])
    assert outgoing is not None
    flags, _, _, mss = TUN_HDR.unpack(outgoing[0])
    assert flags == 0x220 | (0x10 if vlan else 0)
    assert mss == 1400


@pytest.mark.parametrize(
    "case, frame, gso",
    [
        ("two tags", make_frame(b"data", vlan=QINQ), {}),
        ("two tags of one kind", make_frame(b"data", vlan=VLAN + VLAN), {}),
        ("a tag that is not 802.1Q's", make_frame(b"data", vlan=b"\x88\xa8\x00\x05"), {}),
        ("a fragment", make_frame(b"data", fragment=0x2000), {}),
        (
            "another final destination",
            make_frame(b"d", version=6, extensions=[SEGMENT_ROUTING]),
            {},
        ),
        ("ECN", make_frame(make_payload(3000)), {"gso_type": 0x81, "gso_size": 1400}),
        ("USO", make_frame(make_payload(3000), protocol=UDP), {"gso_type": 5, "gso_size": 1400}),
        ("the other version", make_frame(make_payload(3000)), {"gso_type": 4, "gso_size": 1400}),
        (
            "TSO behind an extension header",
            make_frame(make_payload(3000), version=6, extensions=[HOP_BY_HOP]),
            {"gso_type": 4, "gso_size": 1400},
        ),
        ("no segment size", make_frame(make_payload(3000)), {"gso_type": 1}),
        ("TSO of UDP", make_frame(make_payload(99), protocol=UDP), {"gso_type": 1, "gso_size": 9}),
    ],
)
def test_what_the_kernel_cannot_be_told_is_declined(
    case: str, frame: bytes, gso: dict[str, int]
) -> None:
    protocol = UDP if frame.find(bytes((64, UDP))) > 0 else TCP
    assert to_tun([net_header(frame, protocol, **gso), frame]) is None


@pytest.mark.parametrize("start, offset", [(34, 14), (33, 16), (14, 10), (35, 15), (20, 2)])
def test_a_checksum_that_is_neither_tcps_nor_udps_is_declined(start: int, offset: int) -> None:
    frame = make_frame(make_payload(50))
    assert to_tun([NET_HDR.pack(NEEDS_CSUM, 0, 0, 0, start, offset, 0), frame]) is None


def test_a_checksum_in_a_frame_with_broken_headers_is_declined() -> None:
    whole = make_frame(b"", version=6)
    assert to_tun([net_header(whole), whole[:-1]]) is None


def test_icmp_and_other_protocols_are_declined() -> None:
    frame = bytearray(make_frame(make_payload(40), protocol=UDP))
    frame[23] = 1
    assert to_tun([NET_HDR.pack(NEEDS_CSUM, 0, 0, 0, 34, 2, 0), frame]) is None


# --- from the tap --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", range(8))
def test_a_header_with_a_priority_alone_leaves_nothing_undone(flags: int) -> None:
    frame = make_frame(b"data")
    pieces = writable(frame, [])
    assert from_tun(TUN_HDR.pack(flags, 0, 0, 0), pieces) == PLAIN
    assert joined(pieces) == frame


@given(
    protocol=st.sampled_from((TCP, UDP)),
    version=st.sampled_from((4, 6)),
    vlan=st.sampled_from((b"", VLAN, QINQ)),
    more=st.booleans(),
    padding=st.sampled_from((0, 0, 5)),
    cuts=st.lists(st.integers(0, 140), max_size=6),
)
@settings(max_examples=120, deadline=None)
def test_the_pseudo_headers_sum_is_written_whatever_stood_in_the_field(
    protocol: int, version: int, vlan: bytes, more: bool, padding: int, cuts: list[int]
) -> None:
    """A defect of vmd's: fields that lie across two buffers, extension headers, double tags."""
    frame = make_frame(
        make_payload(33),
        protocol=protocol,
        version=version,
        vlan=vlan,
        options=bytes(8) if more else b"",
        extensions=(HOP_BY_HOP, DESTINATION, SEGMENT_ROUTING) if more else (),
        final=SEGMENT_ROUTING[1][-16:] if more and version == 6 else None,
    )
    pieces = writable(spoiled(frame, protocol) + bytes(padding), cuts)
    header = from_tun(TUN_HDR.pack(FLAG[protocol], 0, 0, 0), pieces)
    start = transport_of(frame, protocol)
    assert NET_HDR.unpack(header) == (NEEDS_CSUM, 0, 0, 0, start, CSUM_OFFSET[protocol], 0)
    assert joined(pieces) == frame + bytes(padding)


@pytest.mark.parametrize("version, gso_type", [(4, 1), (6, 4)])
def test_every_cut_of_a_frame_to_be_segmented_gives_the_same(version: int, gso_type: int) -> None:
    frame = make_frame(
        make_payload(3000), version=version, vlan=QINQ, tcp_options=bytes(12), tcp_flags=0x18
    )
    tun = TUN_HDR.pack(TunFlag.TCP_CSUM | TunFlag.TCP_MSS, 0, 0, 1400)
    start = transport_of(frame, TCP)
    for at in range(1, start + 40):
        pieces = writable(spoiled(frame, TCP), [at, at + 1])
        fields = NET_HDR.unpack(from_tun(tun, pieces))
        assert fields == (NEEDS_CSUM, gso_type, start + 32, 1400, start, 16, 0)
        assert joined(pieces) == frame


def test_a_frame_to_be_segmented_with_cwr_says_so() -> None:
    frame = make_frame(make_payload(3000), tcp_flags=0x98)
    tun = TUN_HDR.pack(TunFlag.TCP_CSUM | TunFlag.TCP_MSS, 0, 0, 1400)
    assert NET_HDR.unpack(from_tun(tun, writable(frame, [])))[1] == 0x81


def test_one_segment_is_no_segmentation() -> None:
    frame = make_frame(make_payload(1400))
    tun = TUN_HDR.pack(TunFlag.TCP_CSUM | TunFlag.TCP_MSS, 0, 0, 1400)
    assert NET_HDR.unpack(from_tun(tun, writable(frame, []))) == (NEEDS_CSUM, 0, 0, 0, 34, 16, 0)


@pytest.mark.parametrize("cut_at", [0, 24, 25, 30])
def test_an_ipv4_header_checksum_is_finished(cut_at: int) -> None:
    frame = make_frame(b"data", options=bytes(4))
    pieces = writable(frame[:24] + b"\xde\xad" + frame[26:], [cut_at])
    assert from_tun(TUN_HDR.pack(TunFlag.IPV4_CSUM, 0, 0, 0), pieces) == PLAIN
    assert joined(pieces) == frame


@pytest.mark.parametrize("padding", [0, 7])
def test_an_icmp_checksum_is_finished(padding: int) -> None:
    frame = bytearray(make_frame(make_payload(31), protocol=UDP))
    frame[23] = 1
    pieces = writable(frame + b"\xff" * padding, [36, 37])
    assert from_tun(TUN_HDR.pack(TunFlag.ICMP_CSUM, 0, 0, 0), pieces) == PLAIN
    assert slow_sum(joined(pieces)[34 : len(frame)]) == 0xFFFF


def test_an_icmpv6_checksum_is_finished_with_its_pseudo_header() -> None:
    frame = bytearray(make_frame(make_payload(30), protocol=UDP, version=6))
    frame[20] = 58
    pieces = writable(frame, [56])
    assert from_tun(TUN_HDR.pack(TunFlag.ICMP_CSUM, 0, 0, 0), pieces) == PLAIN
    done = joined(pieces)
    assert slow_sum(done[22:54] + struct.pack("!HH", 38, 58) + done[54:]) == 0xFFFF


TCP4 = make_frame(make_payload(3000))
UDP4 = make_frame(make_payload(30), protocol=UDP)


@pytest.mark.parametrize(
    "reason, flags, mss, frame",
    [
        ("unknown tun_hdr flag", 0x8, 0, TCP4),
        ("unknown tun_hdr flag", 0x1200, 0, TCP4),
        ("unknown tun_hdr flag", 0x210, 0, TCP4),
        ("two checksums", 0x600, 0, TCP4),
        ("two checksums", 0xA00, 0, TCP4),
        ("two checksums", 0xC00, 0, TCP4),
        ("tso without csum", 0x20, 1400, TCP4),
        ("tso without csum", 0x420, 1400, UDP4),
        ("tso size zero", 0x220, 0, TCP4),
        ("tso ip length", 0x220, 1400, TCP4 + b"more"),
        ("csum wrong protocol", 0x400, 0, TCP4),
        ("csum wrong protocol", 0x200, 0, UDP4),
        ("csum wrong protocol", 0x800, 0, UDP4),
        ("csum wrong protocol", 0x200, 0, bytes(12) + b"\x08\x06" + bytes(28)),
        ("csum wrong protocol", 0x100, 0, make_frame(b"", version=6)),
        ("csum of a fragment", 0x400, 0, make_frame(b"data", protocol=UDP, fragment=0x2000)),
        ("csum of a fragment", 0x400, 0, make_frame(b"data", protocol=UDP, fragment=0x0010)),
        ("headers broken", 0x200, 0, make_frame(b"")[:-1]),
        ("headers broken", 0x200, 0, make_frame(b"")[:20]),
        ("headers broken", 0x200, 0, b"\x02" * 12 + b"\x81"),
    ],
)
def test_a_header_that_lies_is_refused_and_the_frame_left_alone(
    reason: str, flags: int, mss: int, frame: bytes
) -> None:
    """A defect of vmd's: what a parser had found was used although it had failed."""
    pieces = writable(frame, [15])
    with pytest.raises(TunHdrLie) as caught:
        from_tun(TUN_HDR.pack(flags, 0, 0, mss), pieces)
    assert caught.value.reason == reason
    assert joined(pieces) == frame


# --- VLAN tags, and both ways --------------------------------------------------------------------


def test_a_tag_in_the_header_goes_into_the_frame() -> None:
    frame = make_frame(b"data", vlan=b"\x81\x00\xe0\x05")
    untagged = frame[:12] + frame[16:]
    found = tagged(TUN_HDR.pack(0x213, 0, 0xE005, 7), split(untagged, [3, 13]))
    assert found is not None
    assert found[0] == TUN_HDR.pack(0x203, 0, 0, 7)
    assert b"".join(found[1]) == frame


def test_a_header_without_a_tag_leaves_the_frame_alone() -> None:
    assert tagged(TUN_HDR.pack(0x203, 0, 0xE005, 0), [b"frame"]) is None


@given(
    version=st.sampled_from((4, 6)),
    vlan=st.sampled_from((b"", VLAN, b"\x81\x00\xff\xff")),
    gso_size=st.sampled_from((0, 536, 1400)),
    cuts=st.lists(st.integers(0, 120), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_frame_comes_back_from_openbsd_as_it_went(
    version: int, vlan: bytes, gso_size: int, cuts: list[int]
) -> None:
    """ "The tun_hdr can be read from one interface and written directly to another" (if_tun.h)."""
    frame = make_frame(make_payload(2000), version=version, vlan=vlan)
    gso_type = (1 if version == 4 else 4) if gso_size else 0
    header = net_header(frame, gso_type=gso_type, gso_size=gso_size)
    outgoing = to_tun([header, *split(frame, cuts)])
    assert outgoing is not None
    back = tagged(outgoing[0], outgoing[1:]) or (outgoing[0], outgoing[1:])
    private = bytearray().join(back[1])
    assert from_tun(back[0], [private]) == header
    assert private == frame


# --- whatever comes ------------------------------------------------------------------------------


def damaged(frame: bytes, damage: list[tuple[int, int]], length: int) -> bytearray:
    spoilt = bytearray(frame)
    for at, value in damage:
        spoilt[at % len(spoilt)] = value
    return spoilt[: max(length, 14)]


FRAMES = st.builds(
    damaged,
    st.sampled_from(
        [
            make_frame(make_payload(99), vlan=VLAN, options=bytes(8)),
            make_frame(make_payload(99), version=6, extensions=(HOP_BY_HOP, SEGMENT_ROUTING)),
            make_frame(make_payload(99), protocol=UDP, vlan=QINQ),
        ]
    ),
    st.lists(st.tuples(st.integers(12, 90), st.integers(0, 255)), max_size=4),
    st.integers(0, 300),
)


@given(frame=FRAMES, header=st.binary(min_size=8, max_size=8), at=st.integers(0, 90))
@settings(max_examples=300, deadline=None)
def test_nothing_from_a_tap_does_more_than_get_refused(
    frame: bytearray, header: bytes, at: int
) -> None:
    pieces = writable(frame, [at])
    try:
        answer = from_tun(header, pieces)
    except TunHdrLie:
        return
    flags, _, _, _, start, offset, _ = NET_HDR.unpack(answer)
    assert flags in (0, NEEDS_CSUM)
    assert start + offset + 2 <= len(frame)
    assert sum(map(len, pieces)) == len(frame)


@given(frame=FRAMES, header=st.binary(min_size=12, max_size=12), at=st.integers(0, 90))
@settings(max_examples=300, deadline=None)
def test_nothing_from_a_guest_does_more_than_get_declined(
    frame: bytearray, header: bytes, at: int
) -> None:
    outgoing = to_tun([header, *writable(frame, [at])])
    if outgoing is not None:
        flags, pad, _, _ = TUN_HDR.unpack(outgoing[0])
        assert pad == 0
        assert flags & 0xF00 in (0, 0x200, 0x400)
        removed = 4 if flags & TunFlag.VTAG else 0
        assert sum(map(len, outgoing[1:])) == len(frame) - removed
