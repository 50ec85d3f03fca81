"""`vq loopback`'s exchange: every capture comes back, and no fault of the device goes unseen."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import (
    DESTINATION,
    FINAL,
    HOP_BY_HOP,
    QINQ,
    SEGMENT_ROUTING,
    TCP,
    UDP,
    VLAN,
    make_frame,
    make_payload,
    slow_sum,
)

from vq import loopback, options
from vq.abi import Feature, HdrFlag, NetFeature
from vq.guest_stack import MTU, GuestStack, finish_checksum, rejoin
from vq.link import Frame, LoopbackLink, QueuePort
from vq.loopback import Report, exchange
from vq.net_driver import NetHeader
from vq.offload import Offload
from vq.packet import parse, segment
from vq.pcap import CapturedFrame, open_writer, read_frames

SAMPLE = list(read_frames(Path(str(resources.files("vq") / "data" / "sample.pcapng"))))
EVERYTHING = options.net_features("", mtu=loopback.DEVICE_MTU)
OFFERED = [
    member.name
    for kind in (NetFeature, Feature)
    for member in kind
    if EVERYTHING >> member & 1 and member is not Feature.VERSION_1
]
NO_RECEIVE_OFFLOADS = "-GUEST_CSUM,-MRG_RXBUF"


def run(
    frames: Sequence[bytes | CapturedFrame], features: str = "", queue_size: int = 64
) -> Report:
    captured = [f if isinstance(f, CapturedFrame) else CapturedFrame(f, 0, len(f)) for f in frames]
    return exchange(
        captured,
        largest_frame=max((len(frame.data) for frame in captured), default=0),
        queue_size=queue_size,
        features=options.net_features(features, mtu=loopback.DEVICE_MTU),
    )


def assert_all_came_back(report: Report, frames: int) -> None:
    assert (report.mismatched, report.mismatches, report.frames) == (0, [], frames)


def whole(payload: bytes, **kwargs: Any) -> bytes:
    """A frame with its checksum finished, by the slow sum."""
    frame = make_frame(payload, **kwargs)
    packet = parse((frame,))
    start, offset = packet.l4_offset, packet.l4_checksum_offset
    assert start is not None and offset is not None
    value = 0xFFFF - slow_sum(frame[start:])
    if not value and packet.l4_protocol == UDP:
        value = 0xFFFF
    return patched(frame, start + offset, value)


def patched(frame: bytes, position: int, value: int) -> bytes:
    return frame[:position] + value.to_bytes(2, "big") + frame[position + 2 :]


# --- captures come back ---------------------------------------------------------------------------


@pytest.mark.parametrize("queue_size", [1, 2, 16, 256, 1024])
@pytest.mark.parametrize(
    "features",
    [
        "",
        "-CSUM,-GUEST_CSUM",
        NO_RECEIVE_OFFLOADS,
        "-GUEST_TSO4,-GUEST_TSO6,-GUEST_USO4,-GUEST_USO6",
        "-MRG_RXBUF,-INDIRECT_DESC,-EVENT_IDX,-IN_ORDER",
    ],
)
def test_the_shipped_capture_comes_back(features: str, queue_size: int) -> None:
    assert_all_came_back(run(SAMPLE, features, queue_size), len(SAMPLE))


# One frame of every kind, so that many runs are cheap.
KINDS = [
    b"",
    b"\1",
    make_payload(13),
    make_payload(14),
    make_payload(15),
    whole(b"", tcp_flags=2, tcp_options=b"\2\4\5\xb4"),
    whole(make_payload(1)),
    whole(make_payload(1446)),
    whole(make_payload(1447)),
    whole(make_payload(9000), vlan=VLAN),
    whole(make_payload(9000), vlan=QINQ, version=6),
    whole(make_payload(20001), version=6, extensions=(HOP_BY_HOP, DESTINATION)),
    whole(make_payload(4000), version=6, extensions=(SEGMENT_ROUTING,), final=FINAL),
    whole(make_payload(4000), options=b"\1\1\1\0"),
    whole(make_payload(4000), tcp_flags=0x98),
    whole(make_payload(4000), tcp_flags=0x02),
    whole(make_payload(5000), protocol=UDP),
    whole(make_payload(100), protocol=UDP, version=6),
    make_frame(make_payload(100)),
    make_frame(make_payload(4000), protocol=UDP),
    make_frame(make_payload(100), fragment=0x2000),
    make_frame(make_payload(100), fragment=7),
    whole(make_payload(65000)),
]


@pytest.mark.parametrize("name", OFFERED)
def test_every_kind_of_frame_comes_back_without_each_feature(name: str) -> None:
    """CTRL_RX is the one that hurt: without it a device may filter what is for others."""
    assert_all_came_back(run(KINDS, f"-{name}", 16), len(KINDS))


@pytest.mark.parametrize("queue_size", [1 << power for power in range(16)])
def test_every_kind_of_frame_comes_back_through_every_size_of_queue(queue_size: int) -> None:
    """With 1, a command's chain of two did not fit into the control queue."""
    assert_all_came_back(run(KINDS, NO_RECEIVE_OFFLOADS, queue_size), len(KINDS))


@pytest.mark.timeout(30)
def test_many_buffers_of_an_odd_size_are_made_and_freed_quickly() -> None:
    """It took minutes: the allocator kept a list of the gaps between them."""
    assert_all_came_back(run([make_payload(139)], "-MRG_RXBUF", 32768), 1)


headers = st.fixed_dictionaries(
    {
        "protocol": st.sampled_from((TCP, UDP)),
        "version": st.sampled_from((4, 6)),
        "vlan": st.sampled_from((b"", VLAN, QINQ)),
        "options": st.sampled_from((b"", b"\1\1\1\0", b"\x94\4\0\0")),
        "extensions": st.sampled_from(((), (HOP_BY_HOP,), (HOP_BY_HOP, DESTINATION))),
        "identification": st.integers(0, 0xFFFF),
        "tcp_flags": st.integers(0, 0xFF),
        "tcp_options": st.sampled_from((b"", b"\1" * 12, b"\1" * 40)),
        "sequence": st.integers(0, 0xFFFFFFFF),
        "ip_checksum": st.booleans(),
    }
)
lengths = st.one_of(st.integers(0, 64), st.integers(1380, 1480), st.integers(2800, 9000))


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    made = draw(st.sampled_from((whole, make_frame)))
    frame = bytearray(made(make_payload(draw(lengths)), **draw(headers)))
    for position in draw(st.lists(st.integers(12, 90), max_size=2)):
        if position < len(frame):
            frame[position] = draw(st.integers(0, 255))
    frame += draw(st.sampled_from((b"", b"", b"", b"\0", bytes(6), b"FCS!")))
    return bytes(frame[: draw(st.one_of(st.just(len(frame)), st.integers(0, len(frame))))])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(frames(), frames(), st.binary(max_size=100)), max_size=30),
    st.lists(st.sampled_from(OFFERED), max_size=8, unique=True),
    st.integers(0, 10),
)
def test_any_frames_come_back_with_any_features(
    capture: list[bytes], without: list[str], power: int
) -> None:
    report = run(capture, ",".join("-" + name for name in without), 1 << power)
    assert_all_came_back(report, len(capture))


def test_frames_of_the_largest_size_come_back() -> None:
    """The link counted the 12 bytes of net header into a frame's length and dropped these."""
    capture = [bytes([length & 0xFF]) * length for length in range(262131, 262145)]
    assert_all_came_back(run(capture, queue_size=4), len(capture))
    assert_all_came_back(run(capture, "-MRG_RXBUF", 1), len(capture))


def test_a_capture_without_frames_is_no_mismatch() -> None:
    assert_all_came_back(run([]), 0)


# --- what the guest leaves undone -----------------------------------------------------------------


def test_checksums_and_segments_are_left_undone() -> None:
    report = run(SAMPLE)
    assert report.offloaded > 400
    assert report.segmented > 20
    assert {"CSUM", "HOST_TSO4", "HOST_USO", "GUEST_TSO6"} <= set(report.features)


@pytest.mark.parametrize(
    ("features", "segmented"),
    [("", 4), ("-HOST_TSO4", 3), ("-HOST_TSO6", 3), ("-HOST_USO", 2), ("-CSUM", 0)],
)
def test_each_kind_of_segmentation_is_used_when_it_was_negotiated(
    features: str, segmented: int
) -> None:
    capture = [
        whole(make_payload(4000), protocol=protocol, version=version)
        for protocol in (TCP, UDP)
        for version in (4, 6)
    ]
    report = run(capture, features)
    assert_all_came_back(report, 4)
    assert report.segmented == segmented
    assert report.offloaded == (0 if features == "-CSUM" else 4)


def test_the_ecn_bit_goes_with_congestion_window_reduced() -> None:
    capture = [whole(make_payload(4000), tcp_flags=0x98)]
    assert run(capture).segmented == 1
    assert run(capture, "-HOST_ECN").segmented == 0
    assert_all_came_back(run(capture, "-GUEST_ECN"), 1)


def test_the_header_says_when_congestion_window_reduced_is_set() -> None:
    stack = GuestStack(EVERYTHING)
    for flags, gso_type in ((0x98, 0x81), (0x18, 0x01)):
        header, _, segments = stack.leave_undone(whole(make_payload(4000), tcp_flags=flags))
        assert (header.gso_type, segments) == (gso_type, 3)


def test_checksums_towards_a_final_destination_are_left_undone() -> None:
    fields: dict[str, Any] = {"version": 6, "extensions": (SEGMENT_ROUTING,), "final": FINAL}
    report = run([whole(make_payload(size), **fields) for size in (100, 4000)], NO_RECEIVE_OFFLOADS)
    assert_all_came_back(report, 2)
    assert (report.offloaded, report.segmented) == (2, 1)


BIG = whole(make_payload(4000))
BIG_UDP = whole(make_payload(4000), protocol=UDP)
BIG_IPV6 = whole(make_payload(4000), version=6)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(patched(BIG, 24, 0x1234), id="wrong-ipv4-checksum"),
        pytest.param(whole(make_payload(4000), ip_checksum=False), id="no-ipv4-checksum"),
        pytest.param(patched(BIG, 16, 0), id="ipv4-length-0"),
        pytest.param(patched(BIG_IPV6, 18, 0), id="ipv6-length-0"),
        pytest.param(BIG + b"\0", id="trailer"),
        pytest.param(make_frame(make_payload(4000)), id="wrong-checksum"),
        pytest.param(patched(BIG_UDP, 40, 0), id="no-udp-checksum"),
        pytest.param(make_frame(make_payload(4000), fragment=0x2000), id="fragment"),
        pytest.param(whole(make_payload(4000), tcp_flags=0x02), id="syn"),
        pytest.param(
            whole(make_payload(4000), version=6, extensions=((44, bytes(7)),)), id="atomic-fragment"
        ),
        pytest.param(
            whole(make_payload(4000), version=6, extensions=((51, b"\4" + bytes(22)),)),
            id="authentication-header",
        ),
        pytest.param(
            whole(make_payload(4000), version=6, extensions=((60, b"\x3f\1\xff" + bytes(508)),)),
            id="long-headers",
        ),
        pytest.param(make_payload(12) + b"\x86\xdd\x60" + bytes(69999), id="jumbogram"),
    ],
)
def test_what_no_stack_would_have_sent_so_is_not_sent_as_segments(frame: bytes) -> None:
    """These were, and came back with their oddity mended, or not at all."""
    for features in ("", NO_RECEIVE_OFFLOADS):
        report = run([frame], features)
        assert_all_came_back(report, 1)
        assert report.segmented == 0


def test_lengths_of_udp_that_lie_are_left_alone() -> None:
    frame = make_frame(make_payload(4000), protocol=UDP)
    frame = patched(frame, 38, 100)
    start = 34
    pseudo = frame[26:34] + bytes((0, UDP)) + (len(frame) - start).to_bytes(2, "big")
    frame = patched(frame, 40, 0)
    frame = patched(frame, 40, 0xFFFF - slow_sum(pseudo + frame[start:]))
    assert_all_came_back(run([frame], NO_RECEIVE_OFFLOADS), 1)


def test_both_ways_to_write_an_ipv4_checksum_of_zero_come_back() -> None:
    frame = patched(BIG, 18, 0)
    frame = patched(patched(frame, 24, 0), 18, 0xFFFF - slow_sum(patched(frame, 24, 0)[14:34]))
    assert slow_sum(frame[14:34]) == 0xFFFF
    capture = [frame, patched(frame, 24, 0xFFFF)]
    report = run(capture, NO_RECEIVE_OFFLOADS)
    assert_all_came_back(report, 2)
    assert report.segmented == 1


@given(st.binary(min_size=20, max_size=200), st.integers(0, 10))
def test_the_guest_finishes_checksums_as_the_rfc_has_it(data: bytes, start: int) -> None:
    header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=start, csum_offset=6)
    value = 0xFFFF - slow_sum(data[start:]) or 0xFFFF
    assert finish_checksum(header, data) == patched(data, start + 6, value)


# --- joining segments again -----------------------------------------------------------------------


def cut_up(frame: bytes, size: int) -> list[bytes]:
    packet = parse((frame,))
    return [b"".join(pieces) for pieces in segment(packet, [frame], size, partial=False)]


@settings(max_examples=100, deadline=None)
@given(headers, st.integers(1, 5000), st.integers(100, 1380))
def test_segments_join_to_the_frame_that_they_were(
    fields: dict[str, Any], length: int, size: int
) -> None:
    fields["ip_checksum"] = True
    frame = whole(make_payload(length), **fields)
    segments = cut_up(frame, size)
    assert rejoin(segments, MTU) == frame
    assert length < size or rejoin(segments, size) is None  # headers count too


def resummed(frame: bytes) -> bytes:
    """The frame with the checksums made right again after a change."""
    version = frame[14] >> 4
    if version == 4:
        frame = patched(frame, 24, 0)
        frame = patched(frame, 24, 0xFFFF - slow_sum(frame[14:34]))
    start, addresses = (34, frame[26:34]) if version == 4 else (54, frame[22:54])
    protocol = frame[23] if version == 4 else frame[20]
    field = start + (16 if protocol == TCP else 6)
    frame = patched(frame, field, 0)
    pseudo = addresses + bytes((0, protocol)) + (len(frame) - start).to_bytes(2, "big")
    return patched(frame, field, 0xFFFF - slow_sum(pseudo + frame[start:]))


def with_byte(frame: bytes, position: int, change: int) -> bytes:
    return frame[:position] + bytes((frame[position] + change & 0xFF,)) + frame[position + 1 :]


@pytest.mark.parametrize(
    ("version", "protocol", "position"),
    [
        pytest.param(4, TCP, 47, id="fin"),
        pytest.param(4, TCP, 19, id="identification"),
        pytest.param(4, TCP, 41, id="sequence"),
        pytest.param(4, TCP, 45, id="acknowledgement"),
        pytest.param(4, TCP, 22, id="hop-limit"),
        pytest.param(4, TCP, 0, id="mac"),
        pytest.param(4, TCP, 17, id="ipv4-length"),
        pytest.param(6, TCP, 19, id="ipv6-length"),
        pytest.param(4, UDP, 39, id="udp-length"),
        pytest.param(6, UDP, 59, id="udp-length-ipv6"),
    ],
)
def test_a_segment_with_another_header_does_not_join(
    version: int, protocol: int, position: int
) -> None:
    """Flags and lengths that were not the segment's own used to pass for right."""
    segments = cut_up(
        whole(make_payload(4000), version=version, protocol=protocol, tcp_flags=0x10), 1000
    )
    assert rejoin([segments[0], resummed(segments[1]), *segments[2:]], MTU) is not None
    segments[1] = resummed(with_byte(segments[1], position, 1))
    assert rejoin(segments, MTU) is None


@pytest.mark.parametrize(("version", "position", "header"), [(4, 16, 0), (6, 18, 40)])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_segment_with_an_ip_length_that_is_not_its_own_does_not_join(
    version: int, position: int, header: int, protocol: int
) -> None:
    """0 is read as "to the frame's end" elsewhere."""
    frame = whole(make_payload(4000), version=version, protocol=protocol)
    segments = cut_up(frame, 1000)
    length = len(segments[1]) - 14 - header
    for wrong in (0, length - 1, length + 1):
        changed = resummed(patched(segments[1], position, wrong))
        assert rejoin([segments[0], changed, *segments[2:]], MTU) is None
    assert rejoin(segments, MTU) == frame


def test_flags_that_belong_to_one_segment_are_refused_in_others() -> None:
    segments = cut_up(whole(make_payload(4000), tcp_flags=0x10), 1000)
    for flag, right in ((0x01, 3), (0x08, 3), (0x80, 0)):
        for place in range(4):
            changed = list(segments)
            changed[place] = resummed(with_byte(segments[place], 47, flag))
            assert (rejoin(changed, MTU) is not None) == (place == right)


def test_segments_that_are_lost_swapped_doubled_or_cut_otherwise_do_not_join() -> None:
    frame = whole(make_payload(3500), version=6)
    one, two, three, four = cut_up(frame, 1000)
    assert rejoin([one, two, three, four], MTU) == frame
    for wrong in (
        [one, three, four],
        [one, three, two, four],
        [one, two, two, three, four],
        [four, one, two, three],
        [one, *cut_up(frame, 500)[2:4], three, four],
        [one, two, with_byte(three, 500, 1), four],
        [one, two, three, four + b"\0"],
    ):
        assert rejoin(wrong, MTU) != frame


def test_a_udp_segment_without_a_checksum_does_not_join() -> None:
    """A sum of zero is to be sent as 0xffff (RFC 768)."""
    frame = bytearray(make_frame(make_payload(2000), protocol=UDP))
    second = cut_up(bytes(frame), 1000)[1]
    # The last word of the second segment makes up for its checksum.
    left = int.from_bytes(second[40:42], "big")
    frame[-2:] = (slow_sum(second[-2:] + left.to_bytes(2, "big"))).to_bytes(2, "big")
    frame = bytearray(resummed(bytes(frame)))
    segments = cut_up(bytes(frame), 1000)
    assert segments[1][40:42] == b"\xff\xff"
    assert rejoin(segments, MTU) == bytes(frame)
    assert rejoin([segments[0], patched(segments[1], 40, 0)], MTU) is None


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [b""],
        [make_payload(60)],
        [resummed(make_frame(b"abc", fragment=0x2000))],
        [make_frame(b"abc", fragment=9)],
        [BIG, b""],
        [whole(make_payload(40000), version=6, protocol=UDP)] * 2,  # more than IP can say
        [whole(make_payload(size), version=6, protocol=UDP) for size in (1000, 0)],
    ],
)
def test_what_is_no_segment_does_not_join(segments: list[bytes]) -> None:
    assert rejoin(segments, 0xFFFF) is None


# --- faults are found -----------------------------------------------------------------------------


class FaultyPort(QueuePort):
    """Does something to every tenth frame."""

    fault = ""
    seen = 0

    def write_burst(self, frames: Sequence[Frame]) -> int:
        changed: list[Frame] = []
        for frame in frames:
            self.seen += 1
            header, data = bytes(frame[0]), b"".join(frame[1:])
            if self.seen % 10:
                changed.append([header, data])
            elif self.fault == "corrupt":
                changed.append([header, data[:-1] + bytes((data[-1] ^ 1,))])
            elif self.fault == "cut":
                changed.append([header, data[:-1]])
            elif self.fault == "size":
                changed.append([header[:4] + b"\0\1" + header[6:], data])
            elif self.fault == "double":
                changed += [[header, data], [header, data]]
        taken = super().write_burst(changed)
        assert taken == len(changed)
        return len(frames)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def link() -> LoopbackLink:
        made = LoopbackLink()
        port = FaultyPort(limit=1 << 20)
        port.fault, _, accepts = request.param.partition(" ")
        if accepts:
            made.accepts = Offload.NONE
        made.ports = [port]
        return made

    monkeypatch.setattr(loopback, "LoopbackLink", link)


@pytest.mark.parametrize("faulty", ["lose", "corrupt", "cut"], indirect=True)
@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("queue_size", [1, 16, 256])
def test_a_frame_that_is_lost_or_changed_is_one_mismatch(queue_size: int) -> None:
    """One that was lost used to count all that came after it."""
    capture = [whole(number.to_bytes(2, "big") + bytes(50)) for number in range(95)]
    report = run(capture, queue_size=queue_size)
    assert report.mismatched == 9
    assert len(report.mismatches) == 9
    assert report.mismatches[0].startswith(f"frame 10 of {len(capture[0])} bytes ")


@pytest.mark.parametrize("faulty", ["size"], indirect=True)
@pytest.mark.usefixtures("faulty")
def test_a_frame_that_would_be_cut_into_other_segments_is_a_mismatch() -> None:
    assert run([BIG] * 30).mismatched == 3


@pytest.mark.parametrize("faulty", ["double"], indirect=True)
@pytest.mark.usefixtures("faulty")
def test_a_frame_that_was_not_sent_is_a_mismatch() -> None:
    assert run([BIG] * 10).mismatches == [f"a frame of {len(BIG)} bytes came that was not sent"]


@pytest.mark.parametrize("faulty", ["lose segments", "corrupt segments"], indirect=True)
@pytest.mark.usefixtures("faulty")
def test_a_segment_that_is_lost_or_changed_is_a_mismatch() -> None:
    few = [frame.data for frame in SAMPLE[:10]]
    frames = [BIG, *few[:5], BIG, *few[5:]]  # the tenth on the wire is of the second
    report = run(frames, NO_RECEIVE_OFFLOADS)
    assert 1 <= report.mismatched <= 2
    assert report.mismatches[0].startswith("frame 7 ")


def test_a_device_that_breaks_a_rule_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be taken for wrong use of the command."""
    monkeypatch.setattr("vq.net_receive._ONE_BUFFER", b"\0\0")
    report = run(KINDS[5:9])
    assert report.mismatched > 0
    assert "num_buffers is 0" in report.mismatches[0]


def test_a_device_that_takes_nothing_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueuePort, "write_burst", lambda *_: 0)
    report = run(SAMPLE[:300], queue_size=16)
    assert report.mismatched == report.frames > 0


def test_what_the_device_dropped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vq.software.MAX_GSO_HEADERS", 10)
    report = run([BIG])
    assert report.mismatches == [
        f"frame 1 of {len(BIG)} bytes did not come back",
        "the device counted 1 of tx_dropped: gso headers too long",
    ]


# --- keeping what came ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kept.pcap", "kept.pcapng"])
def test_what_is_kept_is_the_capture_again(tmp_path: Path, name: str) -> None:
    """Times, and the lengths of frames that the capture cut, included."""
    capture = [
        CapturedFrame(frame, 1_700_000_000_000_000_000 + number, len(frame) + number)
        for number, frame in enumerate(KINDS)
    ]
    with open_writer(tmp_path / name) as writer:
        report = exchange(capture, largest_frame=70000, writer=writer)
    assert_all_came_back(report, len(capture))
    kept = list(read_frames(tmp_path / name))
    assert [(f.data, f.timestamp_ns, f.length) for f in kept] == [
        (f.data, f.timestamp_ns, f.length) for f in capture
    ]


def test_segments_are_kept_as_they_came_in_their_frame_s_place(tmp_path: Path) -> None:
    capture = [CapturedFrame(f, 7, len(f)) for f in (KINDS[5], BIG, KINDS[6])]
    features = options.net_features(NO_RECEIVE_OFFLOADS)
    with open_writer(tmp_path / "kept.pcap") as writer:
        exchange(capture, largest_frame=len(BIG), features=features, writer=writer)
    first, *segments, last = (frame.data for frame in read_frames(tmp_path / "kept.pcap"))
    assert (first, last) == (KINDS[5], KINDS[6])
    assert len(segments) == 3
    assert rejoin(segments, MTU) == BIG


def test_progress_is_told_while_frames_go_out() -> None:
    told: list[int] = []
    exchange(SAMPLE, largest_frame=70000, progress=told.append)
    assert told[-1] == len(SAMPLE)
    assert told == sorted(told)
