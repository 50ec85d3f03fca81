"""The short way through `check_frame` for usual TCP frames says what the long way says."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import software
from vq.abi import NET_HDR
from vq.offload import ALL, Offload
from vq.software import HeaderLie, check_frame


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
