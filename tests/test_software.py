from __future__ import annotations

from typing import Any

import linux_bridge
import net_frames as frames
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import MACS, TCP, UDP, make_frame, make_payload, slow_sum, split

from vq.abi import NET_HDR
from vq.offload import ALL, Offload
from vq.packet import Buffer, parse, segment
from vq.software import PLAIN_HEADER, HeaderLie, check_frame, finish

NONE, TCPV4, UFO, TCPV6, UDP_L4, ECN = 0, 1, 3, 4, 5, 0x80
Frame = list[Buffer]


def net_header(
    flags: int = 1,
    gso_type: int = NONE,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 34,
    csum_offset: int = 16,
    num_buffers: int = 0,
) -> bytes:
    return NET_HDR.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers)


def gso_frame(payload: int = 5000, mss: int = 1448, *, ecn: int = 0, **shape: Any) -> bytes:
    """A GSO frame as a driver sends it, net header included, in one piece."""
    frame = make_frame(make_payload(payload), **shape)
    headers = len(frame) - payload
    udp = shape.get("protocol") == UDP
    transport = 8 if udp else 20 + len(shape.get("tcp_options", b""))
    gso_type = UDP_L4 if udp else TCPV6 if shape.get("version") == 6 else TCPV4
    header = net_header(1, gso_type | ecn, headers, mss, headers - transport, 6 if udp else 16)
    return header + frame


def whole(frame: Frame) -> bytes:
    return b"".join(frame)


def check(header: bytes, frame: bytes, allowed: Offload = ALL) -> Frame:
    return check_frame([header, frame], len(frame), allowed)


def lie(header: bytes, frame: bytes, allowed: Offload = ALL) -> str | None:
    try:
        check(header, frame, allowed)
    except HeaderLie as error:
        assert str(error) == error.reason
        return error.reason
    return None


# --- checking ------------------------------------------------------------------------------------


def test_a_plain_frame_passes_as_it_is() -> None:
    frame: Frame = [bytes(12), memoryview(bytes(60))]
    assert check_frame(frame, 60, Offload.NONE) is frame
    assert finish(frame, Offload.NONE) == [frame]


def test_num_buffers_from_a_driver_means_nothing() -> None:
    assert check(bytes(10) + b"\7\0", bytes(60))[0] == PLAIN_HEADER


@pytest.mark.parametrize("flags", [0, 2, 4, 6, 0xFE])
def test_unknown_flags_are_ignored_and_not_passed_on(flags: int) -> None:
    # virtio 1.3, 5.1.6.2.2: "The device MUST ignore flag bits that it does not recognize."
    assert check(net_header(flags, 0, 60, 9), bytes(60))[0] == PLAIN_HEADER


def test_csum_fields_are_not_used_without_needs_csum() -> None:
    assert check(net_header(0, 0, 0, 0, 0xFFFF, 0xFFFF), bytes(60), Offload.NONE)[0] == PLAIN_HEADER


def test_a_partial_checksum_keeps_its_header() -> None:
    frame = make_frame(b"x")
    cleaned = check(net_header(0xFF, 0, 54, 77, num_buffers=3), frame)
    assert cleaned == [net_header(1, 0, 54, 0), frame]


def test_hdr_len_beyond_the_frame_is_cut_down() -> None:
    frame = make_frame(b"x")
    assert check(net_header(1, 0, 0xFFFF), frame)[0] == net_header(1, 0, 55)


def test_a_partial_checksum_needs_csum_to_be_negotiated() -> None:
    assert lie(net_header(), make_frame(b"x"), ALL & ~Offload.CSUM) == "csum not negotiated"


@pytest.mark.parametrize(
    ("start", "offset", "length", "reason"),
    [
        (34, 16, 52, None),
        (34, 16, 51, "csum beyond frame"),
        (34, 17, 53, None),
        (34, 17, 52, "csum beyond frame"),
        (60, 0, 61, "csum beyond frame"),
        (60, 0xFFFF, 60, "csum beyond frame"),
        (0xFFFF, 0xFFFF, 60, "csum beyond frame"),
        (14, 0, 16, None),
        (13, 20, 60, "csum in Ethernet header"),
        (0, 6, 60, "csum in Ethernet header"),
    ],
)
def test_the_checksum_lies_inside_the_frame(
    start: int, offset: int, length: int, reason: str | None
) -> None:
    header = net_header(1, 0, 0, 0, start, offset)
    assert lie(header, bytes(length)) == reason
    if reason is None:
        (done,) = finish([header, bytes(length)], Offload.NONE)
        assert len(whole(done)) == 12 + length
    else:
        with pytest.raises(HeaderLie, match=reason):
            finish([header, bytes(length)], Offload.NONE)


def test_a_gso_frame_gets_its_true_header_length_and_private_headers() -> None:
    frame = bytearray(gso_frame())
    frame[2:4] = (9999).to_bytes(2, "little")
    frame[10:12] = b"\1\0"
    before = bytes(frame)
    view = memoryview(frame)
    checked = check_frame([before[:12], view[12:30], view[30:]], len(frame) - 12, ALL)
    frame[12:66] = bytes(54)  # the guest changes its headers after they were looked at
    assert checked[0] == net_header(1, TCPV4, 54, 1448)
    assert whole(checked[1:]) == before[12:]
    assert len(checked[1]) == 54


@pytest.mark.parametrize("field", [24, 16])
def test_what_a_driver_leaves_zero_in_an_ip_header_is_filled_in(field: int) -> None:
    right = gso_frame()
    left = bytearray(right)
    left[12 + field : 12 + field + 2] = b"\0\0"
    assert whole(check(bytes(left[:12]), bytes(left[12:]))) == right
    right = gso_frame(version=6)
    left = bytearray(right)
    left[12 + 18 : 12 + 20] = b"\0\0"
    assert whole(check(bytes(left[:12]), bytes(left[12:]))) == right


TCP4 = gso_frame()[12:]
TCP6 = gso_frame(version=6)[12:]
UDP4 = gso_frame(protocol=UDP)[12:]
UDP6 = gso_frame(protocol=UDP, version=6)[12:]
AUTHENTICATED = make_frame(bytes(99), version=6, extensions=((51, b"\4" + bytes(22)),))
ATOMIC = make_frame(bytes(99), version=6, extensions=((44, bytes(7)),))
LONG = make_frame(bytes(99), version=6, extensions=((60, b"\x1f" + bytes(254)),) * 2)


@pytest.mark.parametrize(
    ("header", "frame", "allowed", "reason"),
    [
        (net_header(1, TCPV4, 0, 9), TCP4, ALL & ~Offload.TSO4, "gso not negotiated"),
        (net_header(1, TCPV6, 0, 9), TCP6, ALL & ~Offload.TSO6, "gso not negotiated"),
        (net_header(1, UDP_L4, 0, 99, 34, 6), UDP4, ALL & ~Offload.USO4, "gso not negotiated"),
        (net_header(1, UDP_L4, 0, 99, 54, 6), UDP6, ALL & ~Offload.USO6, "gso not negotiated"),
        (net_header(1, UFO, 0, 99, 34, 6), UDP4, ALL, "gso not negotiated"),
        (net_header(1, UFO | ECN, 0, 99, 34, 6), UDP4, ALL, "gso not negotiated"),
        (net_header(1, 2, 0, 9), TCP4, ALL, "gso unknown"),
        (net_header(1, TCPV4 | 0x20, 0, 9), TCP4, ALL, "gso unknown"),
        (net_header(1, TCPV6 | 0x40, 0, 9), TCP6, ALL, "gso unknown"),
        (net_header(1, TCPV4 | ECN, 0, 9), TCP4, ALL & ~Offload.ECN, "ecn not negotiated"),
        (net_header(1, NONE | ECN), TCP4, ALL, "ecn without tcp"),
        (net_header(1, UDP_L4 | ECN, 0, 99, 34, 6), UDP4, ALL, "ecn without tcp"),
        (net_header(0, TCPV4, 0, 9), TCP4, ALL, "gso without csum"),
        (net_header(2, TCPV4, 0, 9), TCP4, ALL, "gso without csum"),
        (net_header(1, TCPV4, 0, 0), TCP4, ALL, "gso size zero"),
        (net_header(1, TCPV4, 0, 7), TCP4, ALL, "gso size too small"),
        (net_header(1, UDP_L4, 0, 39, 34, 6), UDP4, ALL, "gso size too small"),
        (net_header(1, TCPV4, 0, 9), MACS + TCP4[12:50], ALL, "csum beyond frame"),
        (net_header(1, TCPV4, 0, 9), TCP4[:53], ALL, "gso headers broken"),
        (net_header(1, TCPV4, 0, 9), TCP4[:-1], ALL, "gso headers broken"),
        (net_header(1, TCPV4, 0, 9), TCP4 + b"x", ALL, "gso ip length"),
        (net_header(1, TCPV4, 0, 9), MACS + b"\x08\x06" + bytes(60), ALL, "gso wrong ip version"),
        (net_header(1, TCPV6, 0, 9), TCP4, ALL, "gso wrong ip version"),
        (net_header(1, TCPV4, 0, 9, 54), TCP6, ALL, "gso wrong ip version"),
        (net_header(1, TCPV4, 0, 9, 34, 6), UDP4, ALL, "gso wrong protocol"),
        (net_header(1, UDP_L4, 0, 99), TCP4, ALL, "gso wrong protocol"),
        (net_header(1, TCPV4, 0, 9, 35), TCP4, ALL, "gso csum position"),
        (net_header(1, TCPV4, 0, 9, 34, 6), TCP4, ALL, "gso csum position"),
        (net_header(1, TCPV4, 0, 9, 18, 0), TCP4, ALL, "gso csum position"),
        (net_header(1, TCPV6, 0, 9, 62), ATOMIC, ALL, "gso of a fragment"),
        (net_header(1, TCPV4, 0, 9), make_frame(b"x" * 64, fragment=0x2000), ALL,
         "gso of a fragment"),
        (net_header(1, TCPV4, 0, 9), make_frame(b"x" * 64, fragment=4), ALL, "gso of a fragment"),
        (net_header(1, TCPV6, 0, 9, 78), AUTHENTICATED, ALL, "gso of authenticated"),
        (net_header(1, TCPV6, 0, 9, 54 + 512), LONG, ALL, "gso headers too long"),
    ],
)  # fmt: skip
def test_gso_headers_that_lie(header: bytes, frame: bytes, allowed: Offload, reason: str) -> None:
    assert lie(header, frame, allowed) == reason
    assert reason in (HeaderLie.__doc__ or "")


def test_a_segment_longer_than_an_ip_packet_is_refused() -> None:
    frame = bytearray(make_frame(make_payload(99)) + bytes(70000))
    frame[16:18] = b"\0\0"
    assert lie(net_header(1, TCPV4, 0, 65500), bytes(frame)) == "gso size too large"
    assert lie(net_header(1, TCPV4, 0, 65495), bytes(frame)) is None


@pytest.mark.parametrize(
    ("frame", "enough"),
    [
        (gso_frame(), Offload.CSUM | Offload.TSO4),
        (gso_frame(version=6), Offload.CSUM | Offload.TSO6),
        (gso_frame(ecn=ECN), Offload.CSUM | Offload.TSO4 | Offload.ECN),
        (gso_frame(protocol=UDP), Offload.CSUM | Offload.USO4),
        (gso_frame(protocol=UDP, version=6), Offload.CSUM | Offload.USO6),
        (gso_frame(vlan=frames.QINQ, options=b"\1" * 40), Offload.CSUM | Offload.TSO4),
        (gso_frame(payload=3), Offload.CSUM | Offload.TSO4),
        (gso_frame(payload=0), Offload.CSUM | Offload.TSO4),
    ],
)
def test_honest_gso_frames_pass_with_just_the_features_they_need(
    frame: bytes, enough: Offload
) -> None:
    checked = check(frame[:12], frame[12:], enough)
    assert whole(checked) == frame
    assert finish(checked, enough) == [checked]


# --- finishing -----------------------------------------------------------------------------------


@given(
    st.binary(min_size=16, max_size=120),
    st.integers(0, 100),
    st.integers(0, 100),
    st.lists(st.integers(0, 120), max_size=8),
)
@settings(max_examples=200)
def test_a_checksum_anywhere_is_finished(
    data: bytes, start: int, offset: int, where: list[int]
) -> None:
    start = 14 + start % (len(data) - 15)
    offset = offset % (len(data) - start - 1)
    frame: Frame = [net_header(1, 0, 0, 0, start, offset), *split(data, where)]
    (done,) = finish(frame, Offload.NONE)
    value = 0xFFFF - slow_sum(data[start:])
    if value == 0 and offset == 6:
        value = 0xFFFF
    field = start + offset
    assert done[0] == PLAIN_HEADER
    assert whole(done[1:]) == data[:field] + value.to_bytes(2, "big") + data[field + 2 :]
    assert len(done[1]) == field + 2


def test_finishing_leaves_the_guests_memory_alone_and_copies_no_payload() -> None:
    memory = bytearray(make_frame(make_payload(100)))
    before = bytes(memory)
    (done,) = finish([net_header(), memoryview(memory)], Offload.NONE)
    assert memory == before
    memory[60] ^= 0xFF
    assert whole(done[1:])[60] == memory[60]


@pytest.mark.parametrize(("protocol", "zero"), [(TCP, b"\0\0"), (UDP, b"\xff\xff")])
def test_only_a_udp_checksum_of_zero_becomes_ffff(protocol: int, zero: bytes) -> None:
    frame = bytearray(make_frame(b"\0\0", protocol=protocol))
    frame[-2:] = (0xFFFF - slow_sum(bytes(frame[34:]))).to_bytes(2, "big")
    offset = 16 if protocol == TCP else 6
    (done,) = finish([net_header(csum_offset=offset), frame], Offload.NONE)
    assert whole(done[1:])[34 + offset : 36 + offset] == zero


def test_a_checksum_that_is_accepted_is_left() -> None:
    frame: Frame = [net_header(), make_frame(b"x")]
    assert finish(frame, Offload.CSUM)[0] is frame


def test_data_valid_goes_only_to_those_who_accept_csum() -> None:
    frame: Frame = [net_header(2, csum_start=0, csum_offset=0), bytes(60)]
    assert finish(frame, Offload.CSUM)[0] is frame
    assert finish(frame, Offload.NONE) == [[PLAIN_HEADER, bytes(60)]]
    assert finish(frame, Offload.TSO4) == [[PLAIN_HEADER, bytes(60)]]


def test_the_net_headers_of_segments_say_what_is_left() -> None:
    frame = gso_frame(version=6)
    partial = finish([frame[:12], frame[12:]], Offload.CSUM | Offload.TSO4)
    assert [one[0] for one in partial] == [net_header(1, 0, 74, 0, 54, 16)] * 4
    for accepts in (Offload.NONE, ALL & ~Offload.CSUM):
        done = finish([frame[:12], frame[12:]], accepts)
        assert [one[0] for one in done] == [PLAIN_HEADER] * 4


def test_an_ecn_frame_is_cut_for_a_link_without_ecn() -> None:
    frame = gso_frame(tcp_flags=0x98, ecn=ECN)
    done = finish([frame[:12], frame[12:]], ALL & ~Offload.ECN)
    assert [whole(one[1:])[47] for one in done] == [0x90, 0x10, 0x10, 0x18]
    assert [one[0][1] for one in done] == [NONE] * 4


@pytest.mark.parametrize("version", [4, 6])
def test_uso_is_accepted_for_one_ip_version_at_a_time(version: int) -> None:
    frame = gso_frame(protocol=UDP, version=version)
    for has in (4, 6):
        accepts = Offload.CSUM | (Offload.USO4 if has == 4 else Offload.USO6)
        assert len(finish([frame[:12], frame[12:]], accepts)) == (1 if has == version else 4)


@pytest.mark.parametrize("gso_type", [UFO, 2, TCPV6, UDP_L4, TCPV4 | ECN | 0x20])
def test_a_lie_from_a_link_is_named_too(gso_type: int) -> None:
    with pytest.raises(HeaderLie):
        finish([net_header(1, gso_type, 0, 99), TCP4], Offload.NONE)
    with pytest.raises(HeaderLie, match="gso without csum"):
        finish([net_header(0, TCPV4, 0, 99), TCP4], Offload.NONE)


offload_sets = st.integers(0, int(ALL)).map(Offload)
shapes = st.sampled_from(
    [
        {},
        {"protocol": UDP},
        {"version": 6, "tcp_options": b"\1" * 4},
        {"version": 6, "protocol": UDP, "extensions": (frames.HOP_BY_HOP,)},
        {"vlan": frames.VLAN, "options": b"\1" * 8},
    ]
)


@given(
    shapes,
    st.integers(0, 900),
    st.sampled_from([8, 100, 899, 1448]),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=3),
    st.lists(st.integers(0, 120), max_size=8),
    offload_sets,
    offload_sets,
)
@settings(max_examples=300)
def test_whatever_passes_the_check_can_be_finished(
    shape: dict[str, Any],
    payload: int,
    mss: int,
    damage: list[tuple[int, int]],
    where: list[int],
    allowed: Offload,
    accepts: Offload,
) -> None:
    sent = bytearray(gso_frame(payload, mss, **shape))
    for place, value in damage:
        sent[place % len(sent)] = value
    memory = sent[12:]
    try:
        checked = check_frame(
            [bytes(sent[:12]), *split(memory, where)], len(memory), allowed | Offload.CSUM
        )
    except HeaderLie:
        return
    flags, gso_type, hdr_len, _, start, offset, num_buffers = NET_HDR.unpack(checked[0])
    assert flags in (0, 1) and num_buffers == 0 and hdr_len <= len(memory)
    if flags:
        assert start + offset + 2 <= len(memory)
    if gso_type:
        memory[:hdr_len] = bytes(hdr_len)  # a guest that changes its mind changes nothing
    done = finish(checked, accepts)
    for one in done:
        assert not one[0][0] or accepts & Offload.CSUM
        assert len(one[0]) == 12
    if gso_type and len(done) > 1:
        headers = parse(checked[1:]).header_length
        stream = b"".join(whole(one[1:])[headers:] for one in done)
        assert stream == bytes(memory[headers:])


# --- Linux as the oracle -------------------------------------------------------------------------

GOLDEN_TCP4 = [
    "0200000000010200000000030800"
    "45030034fffe400040061fb50a0102030a040506"
    "03e807d0fffffc0000000004601000642629000001010100"
    "00070e151c232a31",
    "0200000000010200000000030800"
    "45030034ffff400040061fb40a0102030a040506"
    "03e807d0fffffc0800000004601000644540000001010100"
    "383f464d545b6269",
    "0200000000010200000000030800"
    "450300300000400040061fb80a0102030a040506"
    "03e807d0fffffc1000000004601900648b87000001010100"
    "70777e85",
]
GOLDEN_UDP6_PARTIAL = [
    "02000000000102000000000381000005"
    "86dd"
    "60012345000f1140fd0102030405060708090a0b0c0d0e0ffd1112131415161718191a1b1c1d1e1f"
    "03e807d0000fdb22"
    "00070e151c232a",
    "02000000000102000000000381000005"
    "86dd"
    "60012345000d1140fd0102030405060708090a0b0c0d0e0ffd1112131415161718191a1b1c1d1e1f"
    "03e807d0000ddb20"
    "31383f464d",
]


def test_segments_that_a_linux_kernel_made() -> None:
    """Taken from a tap whose reader accepted nothing, and CSUM only (Linux 6.18)."""
    frame = make_frame(make_payload(20), tcp_options=b"\1\1\1\0")
    segments = segment(parse([frame]), [frame], 8, partial=False)
    assert [b"".join(one) for one in segments] == [bytes.fromhex(one) for one in GOLDEN_TCP4]
    frame = make_frame(make_payload(12), protocol=UDP, version=6, vlan=frames.VLAN)
    segments = segment(parse([frame]), [frame], 7, partial=True)
    expected = [bytes.fromhex(one) for one in GOLDEN_UDP6_PARTIAL]
    assert [b"".join(one) for one in segments] == expected


KERNEL_CASES = {
    "tcp4": gso_frame(),
    "without DF, with options": gso_frame(
        5001, 1001, options=b"\1" * 8, fragment=0, tcp_options=b"\1" * 12
    ),
    "CWR": gso_frame(tcp_flags=0x98),
    "CWR and ECN": gso_frame(tcp_flags=0x98, ecn=ECN),
    "exact multiple": gso_frame(2896, 1448),
    "one segment": gso_frame(1448, 1448),
    "short": gso_frame(7, 1448),
    "no payload": gso_frame(0, 1448),
    "smallest": gso_frame(50, 8),
    "largest": gso_frame(65000, 8900),
    "vlan": gso_frame(vlan=frames.VLAN),
    "qinq": gso_frame(vlan=frames.QINQ),
    "tcp6 vlan": gso_frame(version=6, vlan=frames.VLAN),
    "tcp6": gso_frame(version=6, tcp_options=b"\1" * 12),
    "tcp6 extended": gso_frame(version=6, extensions=(frames.HOP_BY_HOP, frames.DESTINATION)),
    "tcp6 routed": gso_frame(version=6, extensions=(frames.SEGMENT_ROUTING,), final=frames.FINAL),
    "udp4": gso_frame(5000, 1472, protocol=UDP),
    "udp6": gso_frame(5000, 1472, protocol=UDP, version=6),
    "udp4 most": gso_frame(1280, 10, protocol=UDP),
    "udp4 one": gso_frame(100, 1472, protocol=UDP),
    "udp6 extended": gso_frame(
        5000, 1001, protocol=UDP, version=6, extensions=(frames.HOP_BY_HOP,)
    ),
    "tcp4 checksum": net_header() + make_frame(make_payload(999)),
    "udp6 checksum": net_header(1, 0, 0, 0, 54, 6)
    + make_frame(make_payload(998), protocol=UDP, version=6),
    "checksum of something": net_header(1, 0, 0, 0, 21, 31) + make_frame(make_payload(77)),
}


@pytest.fixture(scope="module")
def kernel() -> None:
    reason = linux_bridge.why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("accepts", [Offload.NONE, Offload.CSUM])
def test_the_kernel_makes_the_same_frames(kernel: None, accepts: Offload) -> None:
    # TUN_F_CSUM is 1, as Offload.CSUM is. hdr_len is only a hint, and the tap's is 0.
    made = linux_bridge.kernel_output(list(KERNEL_CASES.values()), int(accepts))
    for (name, sent), theirs in zip(KERNEL_CASES.items(), made, strict=True):
        ours = finish(check(sent[:12], sent[12:]), accepts)
        assert theirs is not None, name
        assert [whole(one)[12:] for one in ours] == [one[12:] for one in theirs], name
        assert [one[0][:2] for one in ours] == [one[:2] for one in theirs], name
        assert [one[0][4:] for one in ours] == [one[4:12] for one in theirs], name


def test_the_kernel_takes_whole_frames_that_were_mended(kernel: None) -> None:
    sent = bytearray(gso_frame())
    sent[12 + 24 : 12 + 26] = b"\0\0"
    checked = check(bytes(sent[:12]), bytes(sent[12:]))
    made = linux_bridge.kernel_output([whole(checked)], int(Offload.CSUM | Offload.TSO4))
    assert made == [[net_header(1, TCPV4, 54, 1448) + gso_frame()[12:]]]
