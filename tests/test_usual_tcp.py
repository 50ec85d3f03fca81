"""The short ways for usual frames say what the long way says: the one through `check_frame` for TCP
frames, and `UsualStarts`, which has only a frame's first bytes."""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import software
from vq.abi import NET_HDR, NET_HDR_SIZE
from vq.offload import ALL, Offload
from vq.software import MOST_OF_START, PLAIN_HEADER, HeaderLie, UsualStarts, check_frame


def ipv4(payload: int, options: int, change: dict[str, int]) -> bytes:
    total = change.get("total", 40 + options + payload)
    version = change.get("version", 0x45) & 0xFF
    return struct.pack(
        "!BBHHHBBHII",
        *(version, 0, total, 1, change.get("fragment", 0), 64, change.get("protocol", 6) & 0xFF),
        *(change.get("checksum", 0x1234), 1, 2),
    )


def ipv6(payload: int, options: int, change: dict[str, int]) -> bytes:
    total = change.get("total", 20 + options + payload)
    version = change.get("version", 0x60) & 0xFF
    return struct.pack("!BxxxHBB16x16x", version, total, change.get("protocol", 6) & 0xFF, 64)


VALUES = (0, 1, 4, 6, 17, 34, 40, 54, 0x45, 0x46, 0x60, 0x2000, 0x4000, 0xFFFF)
NAMES = ("total", "version", "fragment", "protocol", "checksum", "ethertype", "offset")
FIELDS = ("flags", "gso_type", "gso_size", "csum_start", "csum_offset")
LIES = (0, 1, 4, 5, 6, 7, 8, 16, 34, 54, 1448, 0x81, 0x84, 65000)
CHANGES: list[tuple[dict[str, int], dict[str, int]]] = [
    ({}, {}),
    *(({name: value}, {}) for name in NAMES for value in VALUES),
    *(({}, {name: value}) for name in FIELDS for value in LIES),
]


@pytest.mark.parametrize("network", [ipv4, ipv6])
@pytest.mark.parametrize("change, lies", CHANGES)
@settings(max_examples=15)
@given(
    words=st.integers(0, 10),
    payload=st.sampled_from((0, 1, 100, 3000, 65000)),
    cuts=st.lists(st.integers(1, 200), max_size=2),
    allowed=st.sampled_from(
        (ALL, Offload.CSUM | Offload.TSO4, Offload.CSUM | Offload.TSO6, Offload.CSUM)
    ),
)
def test_both_ways_give_the_same(
    network: Callable[[int, int, dict[str, int]], bytes],
    change: dict[str, int],
    lies: dict[str, int],
    words: int,
    payload: int,
    cuts: list[int],
    allowed: Offload,
) -> None:
    options = 4 * words
    four = network is ipv4
    ethertype = change.get("ethertype", 0x0800 if four else 0x86DD)
    offset = change.get("offset", (5 + words) << 4) & 0xFF
    data = (
        bytes(12)
        + struct.pack("!H", ethertype)
        + network(payload, options, change)
        + struct.pack("!HHIIBBHHH", 1, 2, 3, 4, offset, 16, 5, 6, 7)
        + bytes(options)
        + bytes(payload)
    )
    fields = {
        **dict(flags=1, gso_type=1 if four else 4, hdr_len=0, gso_size=1448),
        **dict(csum_start=34 if four else 54, csum_offset=16, num_buffers=0),
        **lies,
    }
    fields["flags"] &= 0xFF
    fields["gso_type"] &= 0xFF
    header = NET_HDR.pack(*fields.values())
    pieces = []
    rest = memoryview(bytearray(data))
    for cut in cuts:
        if cut < len(rest):
            pieces.append(rest[:cut])
            rest = rest[cut:]
    frame = [header, *pieces, rest]

    def outcome() -> tuple[object, ...]:
        try:
            checked = check_frame(list(frame), len(data), allowed)
        except HeaderLie as lie:
            return ("lie", lie.reason)
        return (bytes(checked[0]), bytes(checked[1]), b"".join(map(bytes, checked[1:])))

    short = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(software, "_usual_tcp", lambda *_: None)
        assert outcome() == short
        assert_start_agrees(frame, allowed)


def assert_start_agrees(frame: list[bytes | memoryview], allowed: Offload) -> bool:
    """What `UsualStarts` says, if anything, is what the long way says; whether it says anything.

    The first buffer that a guest gave is the header with the first piece behind it.
    """
    header, *pieces = frame
    length = sum(map(len, pieces))
    first = bytes(header) + bytes(pieces[0])
    starts = UsualStarts(int(allowed))
    looked_at = first[:MOST_OF_START]
    start = starts.checked(looked_at, length)
    assert starts.checked(looked_at, length) == start, "the second time it is known"
    if start is None:
        return False
    assert len(start) == len(looked_at)
    checked = check_frame(list(frame), length, allowed)  # no lie
    sent = start + first[len(start) :] + b"".join(map(bytes, pieces[1:]))
    assert sent == b"".join(map(bytes, checked))
    assert start[:NET_HDR_SIZE] == checked[0]
    if start[1]:
        assert start[NET_HDR_SIZE:].startswith(checked[1]), "all headers that were checked"
    return True


OFFLOADS = st.lists(st.sampled_from(list(Offload)), max_size=7).map(
    lambda flags: functools.reduce(operator.or_, flags, Offload.NONE)
)
WORDS = st.sampled_from((0, 1, 2, 13, 14, 16, 20, 33, 34, 54, 0xFFFE, 0xFFFF)) | st.integers(0, 200)


@settings(max_examples=800)
@given(
    fields=st.tuples(
        st.sampled_from((0, 0, 1, 1, 1, 2, 3, 4, 0xFE, 0xFF)),
        st.sampled_from((0, 0, 0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0x85, 2, 0xFF)),
        *(WORDS,) * 5,
    ),
    size=st.integers(0, 200) | st.sampled_from((1514, 70000)),
    cut=st.none() | st.integers(0, 200),
    allowed=OFFLOADS,
)
def test_a_start_says_nothing_else_of_any_header(
    fields: tuple[int, ...], size: int, cut: int | None, allowed: Offload
) -> None:
    data = memoryview(bytes(n & 0xFF for n in range(size)))
    pieces = [data] if cut is None else [data[:cut], data[cut:]]
    assert_start_agrees([NET_HDR.pack(*fields), *pieces], allowed)


@pytest.mark.parametrize("start", [13, 14, 15, 60, 97, 98, 99, 0xFFFF])
@pytest.mark.parametrize("offset", [0, 1, 16, 84, 85, 86, 0xFFFF])
def test_a_start_knows_where_a_checksum_may_stand(start: int, offset: int) -> None:
    """Behind the Ethernet header, and up to the end of the frame."""
    frame = [NET_HDR.pack(1, 0, 0, 0, start, offset, 0), memoryview(bytes(100))]
    good = start >= 14 and start + offset + 2 <= 100
    assert assert_start_agrees(frame, ALL) == good


@pytest.mark.parametrize("network, kind", [(ipv4, 1), (ipv6, 4)])
@given(
    words=st.integers(0, 10),
    payload=st.sampled_from((1, 100, 1448, 1449, 3000, 65000)),
    allowed=OFFLOADS,
    data=st.data(),
)
def test_a_start_says_something_of_usual_frames(
    network: Callable[[int, int, dict[str, int]], bytes],
    kind: int,
    words: int,
    payload: int,
    allowed: Offload,
    data: st.DataObject,
) -> None:
    """The way is not there in vain: nothing undone, a checksum, or a TCP frame to be segmented that
    has all headers in its first buffer."""
    at = 34 if network is ipv4 else 54
    ethertype = 0x0800 if network is ipv4 else 0x86DD
    frame = memoryview(
        bytes(12)
        + struct.pack("!H", ethertype)
        + network(payload, 4 * words, {})
        + struct.pack("!HHIIBBHHH", 1, 2, 3, 4, (5 + words) << 4, 16, 5, 6, 7)
        + bytes(4 * words + payload)
    )
    end = at + 20 + 4 * words
    cut = data.draw(st.sampled_from((end, end + 1, len(frame), 0, at, end - 1)))
    pieces = [frame[:cut], frame[cut:]]
    assert assert_start_agrees([PLAIN_HEADER, *pieces], allowed)
    checksum = NET_HDR.pack(1, 0, 0xFFFF, 9, at, 16, 3)
    assert assert_start_agrees([checksum, *pieces], allowed) == (Offload.CSUM in allowed)
    offload = Offload.TSO4 if kind == 1 else Offload.TSO6
    permitted = Offload.CSUM in allowed and offload in allowed and cut >= end
    for flags, hdr_len, buffers in itertools.product((1, 3), (end, 0, end + 1), (0, 1)):
        segments = NET_HDR.pack(flags, kind, hdr_len, 1448, at, 16, buffers)
        assert assert_start_agrees([segments, *pieces], allowed) == permitted


class Start(NamedTuple):
    """What is looked at of a frame, and how long it is behind its net header."""

    data: bytes
    length: int


def tcp_start(four: bool, words: int, gso_size: int, payload: int, fill: int = 1) -> Start:
    """A frame to be segmented: its headers, and up to 30 bytes of its payload."""
    at = 34 if four else 54
    end = at + 20 + 4 * words
    total = end - (14 if four else 54) + payload
    frame = (
        bytes([fill]) * 12
        + struct.pack("!H", 0x0800 if four else 0x86DD)
        + (ipv4 if four else ipv6)(0, 0, {"total": total & 0xFFFF, "checksum": fill})
        + struct.pack("!HHIIBBHHH", *[fill] * 4, (5 + words) << 4, *[fill] * 4)
        + bytes(4 * words + min(payload, 30))
    )
    header = NET_HDR.pack(1, 1 if four else 4, end, gso_size, at, 16, 0)
    return Start((header + frame)[:MOST_OF_START], end + payload)


FIELDS_OF_START = (0, 1, 2, 4, 6, 8, 10, 24, 25, 26, 28, 29, 30, 31, 32, 33, 35, 36, 37, 58, 78)
PAYLOADS = st.sampled_from((1, 100, 8191, 8192, 8193, 65000)) | st.integers(65440, 65535)


@st.composite
def variations(draw: st.DrawFn, start: Start) -> Start:
    """A frame that is nearly the same."""
    data, length = bytearray(start.data), start.length
    what = draw(st.sampled_from(("bits", "bits", "byte", "length", "cut", "checksum", "payload")))
    if what == "bits":
        index = draw(st.sampled_from(FIELDS_OF_START) | st.integers(0, len(data) - 1))
        data[index % len(data)] ^= draw(st.sampled_from([1 << n for n in range(8)]))
    elif what == "byte":
        index = draw(st.sampled_from(FIELDS_OF_START) | st.integers(0, len(data) - 1))
        data[index % len(data)] = draw(st.sampled_from((0, 0xFF)) | st.integers(0, 0xFF))
    elif what == "length":
        length = max(length + draw(st.sampled_from((1, -1, 0x10000, -0x10000))), len(data) - 12)
    elif what == "cut":
        del data[draw(st.integers(NET_HDR_SIZE, len(data))) :]
    elif what == "checksum":
        data[36:38] = bytes(2)
    else:
        four = data[1] == 1
        payload, end = draw(PAYLOADS), int.from_bytes(data[2:4], "little")
        place = 28 if four else 30
        data[place : place + 2] = (end - (14 if four else 54) + payload & 0xFFFF).to_bytes(2, "big")
        length = end + payload
        del data[NET_HDR_SIZE + length :]
    return Start(bytes(data), length)


@settings(max_examples=3000)
@given(
    st.builds(
        tcp_start,
        st.booleans(),
        st.sampled_from((0, 3, 10)),
        st.sampled_from((8, 63, 1448, 1448, 40000, 65481, 65535)),
        st.sampled_from((1, 100, 1448, 8192)),
    ),
    st.data(),
    st.sampled_from((ALL, ALL, Offload.CSUM | Offload.TSO4, Offload.CSUM | Offload.TSO6)),
)
def test_what_earlier_frames_were_like_changes_no_answer(
    first: Start, data: st.DataObject, allowed: Offload
) -> None:
    """Here the next frame is nearly the same."""
    starts = UsualStarts(int(allowed))
    starts.checked(*first)
    then = data.draw(variations(first))
    assert starts.checked(*then) == UsualStarts(int(allowed)).checked(*then)


@pytest.mark.parametrize("four", [True, False])
def test_frames_that_are_alike_are_compared_all_at_once(
    four: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their addresses, numbers and lengths are; and the kinds are not kept without end."""
    starts = UsualStarts(int(ALL))
    first = tcp_start(four, 3, 1448, 1448)
    assert starts.checked(*first) == first.data
    with monkeypatch.context() as patch:
        patch.setattr(UsualStarts, "_judged", None)
        for payload, fill in ((1448, 2), (3, 255), (65000, 9)):
            then = tcp_start(four, 3, 1448, payload, fill)
            assert starts.checked(*then) == then.data
    for gso_size in range(100, 100 + 10 * software._MOST_KINDS):
        assert starts.checked(*tcp_start(four, 3, gso_size, 1448)) is not None
        assert len(starts._kinds) <= software._MOST_KINDS
