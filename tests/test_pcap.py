"""`vq.pcap`: every variant of the two formats, damaged files, and writers that others can read."""

from __future__ import annotations

import errno
import io
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vq.pcap
from vq.errors import CaptureError, UsageError
from vq.pcap import (
    MAX_FRAME_BYTES,
    CapturedFrame,
    CaptureWriter,
    PcapngWriter,
    PcapWriter,
    open_writer,
    read_frames,
)

FRAME = bytes(range(14)) + b"hello"
SECOND = 1_000_000_000


def read_bytes(tmp_path: Path, data: bytes) -> list[CapturedFrame]:
    path = tmp_path / "x.cap"
    path.write_bytes(data)
    return list(read_frames(path))


def read_until_error(path: Path) -> tuple[list[CapturedFrame], str | None]:
    """The frames that come, and the sentence of the error behind them if there is one."""
    frames = []
    try:
        for frame in read_frames(path):
            frames.append(frame)
    except CaptureError as error:
        return frames, str(error)
    return frames, None


# Files made by hand, from the formats' descriptions.


def pcap_file(
    *records: bytes, order: str = "<", magic: int = 0xA1B2C3D4, link_type: int = 1, major: int = 2
) -> bytes:
    header = struct.pack(order + "IHHiIII", magic, major, 4, 0, 0, 65535, link_type)
    return header + b"".join(records)


def pcap_record(
    data: bytes, *, order: str = "<", time: tuple[int, int] = (7, 9), length: int | None = None
) -> bytes:
    shown = len(data) if length is None else length
    return struct.pack(order + "IIII", *time, len(data), shown) + data


def block(kind: int, body: bytes, order: str = "<", *, total: int = 0, again: int = 0) -> bytes:
    body += bytes(-len(body) % 4)
    total = total or len(body) + 12
    return struct.pack(order + "II", kind, total) + body + struct.pack(order + "I", again or total)


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<", *, major: int = 1) -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, major, 0, -1), order)


def interface(
    options: bytes = b"", order: str = "<", *, link_type: int = 1, snap_length: int = 0
) -> bytes:
    return block(1, struct.pack(order + "HHI", link_type, 0, snap_length) + options, order)


def enhanced(
    data: bytes,
    order: str = "<",
    *,
    number: int = 0,
    time: int = 5_000_000,
    size: int | None = None,
    length: int | None = None,
    options: bytes = b"",
) -> bytes:
    size = len(data) if size is None else size
    head = (number, time >> 32, time & 0xFFFFFFFF, size, size if length is None else length)
    padded = data + bytes(-len(data) % 4)
    return block(6, struct.pack(order + "IIIII", *head) + padded + options, order)


def simple(data: bytes, length: int, order: str = "<") -> bytes:
    return block(3, struct.pack(order + "I", length) + data, order)


# pcap: golden bytes


def test_little_endian_microseconds(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "d4c3b2a1 0200 0400 00000000 00000000 00000400 01000000"
        "01000000 02000000 03000000 05000000 aabbcc"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", SECOND + 2000, 5)]


def test_big_endian_microseconds(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "a1b2c3d4 0002 0004 00000000 00000000 00040000 00000001"
        "00000001 00000002 00000003 00000005 aabbcc"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", SECOND + 2000, 5)]


def test_little_endian_nanoseconds(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "4d3cb2a1 0200 0400 00000000 00000000 00000400 01000000"
        "01000000 02000000 03000000 03000000 aabbcc"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", SECOND + 2, 3)]


def test_big_endian_nanoseconds(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "a1b23c4d 0002 0004 00000000 00000000 00040000 00000001"
        "00000001 00000002 00000003 00000003 aabbcc"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", SECOND + 2, 3)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_modified_format_has_eight_more_bytes_in_a_record(tmp_path: Path, order: str) -> None:
    header = struct.pack(order + "IIIIIHBB", 1, 2, 3, 3, 4, 0x0800, 0, 0)
    data = pcap_file(header + b"abc", header + b"def", order=order, magic=0xA1B2CD34)
    assert [frame.data for frame in read_bytes(tmp_path, data)] == [b"abc", b"def"]


def test_the_length_of_the_frame_check_sequence_is_not_a_link_type(tmp_path: Path) -> None:
    data = pcap_file(pcap_record(FRAME), link_type=0x54000001)
    assert [frame.data for frame in read_bytes(tmp_path, data)] == [FRAME]


def test_a_capture_without_frames_is_fine(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, pcap_file()) == []
    assert read_bytes(tmp_path, section()) == []
    assert read_bytes(tmp_path, section() + interface(link_type=276)) == []


def test_an_empty_frame_is_a_frame(tmp_path: Path) -> None:
    assert [frame.data for frame in read_bytes(tmp_path, pcap_file(pcap_record(b"")))] == [b""]
    data = section() + interface() + enhanced(b"")
    assert [frame.data for frame in read_bytes(tmp_path, data)] == [b""]


# pcapng: golden bytes and each kind of block


def test_a_little_endian_section(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "0a0d0d0a 1c000000 4d3c2b1a 0100 0000 ffffffffffffffff 1c000000"
        "01000000 14000000 0100 0000 00000000 14000000"
        "06000000 24000000 00000000 00000000 03000000 03000000 05000000 aabbcc00 24000000"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", 3000, 5)]


def test_a_big_endian_section(tmp_path: Path) -> None:
    data = bytes.fromhex(
        "0a0d0d0a 0000001c 1a2b3c4d 0001 0000 ffffffffffffffff 0000001c"
        "00000001 00000014 0001 0000 00000000 00000014"
        "00000006 00000024 00000000 00000000 00000003 00000003 00000005 aabbcc00 00000024"
    )
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"\xaa\xbb\xcc", 3000, 5)]


def test_each_section_has_its_own_byte_order_and_interfaces(tmp_path: Path) -> None:
    data = section("<") + interface(option(2, b"one")) + enhanced(b"1")
    data += section(">") + interface(option(2, b"two", ">"), ">") + enhanced(b"2", ">")
    frames = read_bytes(tmp_path, data)
    assert [(frame.data, frame.interface) for frame in frames] == [(b"1", "one"), (b"2", "two")]
    with pytest.raises(CaptureError, match="interface 0, which is not there"):
        read_bytes(tmp_path, data + section("<") + enhanced(b"3"))


@pytest.mark.parametrize(
    ("resolution", "offset", "time", "expected"),
    [
        (None, None, 5, 5000),
        (6, None, 5, 5000),
        (9, None, 5, 5),
        (0, None, 5, 5 * SECOND),
        (12, None, 5999, 5),
        (0x80 | 10, None, 512, SECOND // 2),
        (0x80, None, 2, 2 * SECOND),
        (127, None, 1, 0),
        (255, None, 1, 0),
        (9, 3, 5, 3 * SECOND + 5),
        (9, -1, 2 * SECOND, SECOND),
        (9, None, (1 << 64) - 1, (1 << 64) - 1),
    ],
)
def test_times_follow_the_interface(
    tmp_path: Path, resolution: int | None, offset: int | None, time: int, expected: int
) -> None:
    for order in "<>":
        options = b""
        if resolution is not None:
            options += option(9, bytes([resolution]), order)
        if offset is not None:
            options += option(14, struct.pack(order + "q", offset), order)
        data = section(order) + interface(options, order) + enhanced(b"x", order, time=time)
        assert read_bytes(tmp_path, data)[0].timestamp_ns == expected


def test_frames_name_their_interface_and_direction(tmp_path: Path) -> None:
    data = section() + interface(option(2, b"left")) + interface(option(2, b"right"))
    data += enhanced(b"a", number=1, options=option(2, b"\x01\0\0\0") + option(0, b""))
    data += enhanced(b"b", number=0, options=option(1, b"note") + option(2, b"\x02\0\0\0"))
    data += enhanced(b"c", number=0, options=option(2, b"\x00\0\0\0"))
    frames = read_bytes(tmp_path, data)
    assert [(frame.data, frame.interface, frame.inbound) for frame in frames] == [
        (b"a", "right", True),
        (b"b", "left", False),
        (b"c", "left", None),
    ]


def test_nothing_behind_the_end_of_options_counts(tmp_path: Path) -> None:
    tail = option(0, b"") + b"\xff\xff\xff\xff"
    data = section() + interface() + enhanced(b"abc", options=tail)
    assert read_bytes(tmp_path, data)[0].inbound is None


def test_a_simple_packet_is_cut_at_the_snap_length(tmp_path: Path) -> None:
    data = section() + interface(snap_length=4) + simple(b"abcd", 9) + simple(b"xyz", 3)
    frames = read_bytes(tmp_path, data)
    assert [(frame.data, frame.length) for frame in frames] == [(b"abcd", 9), (b"xyz", 3)]
    data = section() + interface(snap_length=0) + simple(b"abcdefghi", 9)
    assert read_bytes(tmp_path, data) == [CapturedFrame(b"abcdefghi", 0, 9)]


def test_the_packet_block_of_old_is_read(tmp_path: Path) -> None:
    for order in "<>":
        body = struct.pack(order + "HHIIII", 0, 3, 0, 5, 3, 8) + b"abc\0"
        body += option(2, struct.pack(order + "I", 1), order)
        data = section(order) + interface(b"", order) + block(2, body, order)
        assert read_bytes(tmp_path, data) == [CapturedFrame(b"abc", 5000, 8, "", True)]


def test_blocks_that_hold_no_frame_are_passed_over(tmp_path: Path) -> None:
    others = b"".join(block(kind, bytes(20)) for kind in (4, 5, 9, 10, 0x0BAD, 0x80000001))
    others += block(0x0BAD, bytes(3 << 20))
    data = section() + others + interface() + others + enhanced(b"x") + others
    assert [frame.data for frame in read_bytes(tmp_path, data)] == [b"x"]


# What is refused, and in which words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\xd4", "not a pcap or pcapng capture (it starts with 0xd4)"),
        (b"#!/bin/sh\n", "not a pcap or pcapng capture (it starts with 0x23212f62)"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "compressed with zstd"),
        (pcap_file()[:20], "cut short in its file header"),
        (pcap_file(major=1), "pcap version 1.4"),
        (pcap_file(pcap_record(FRAME), link_type=101), "link type 101 (raw IP); only Ethernet"),
        (pcap_file(pcap_record(FRAME), link_type=147), "link type 147 (not known to vq)"),
        (pcap_file(pcap_record(FRAME), pcap_record(FRAME)[:9]), "cut short in record 2"),
        (pcap_file(pcap_record(FRAME)[:-1]), "cut short in record 1"),
        (
            pcap_file(struct.pack("<IIII", 0, 0, MAX_FRAME_BYTES + 1, 60)),
            "record 1 claims 262145 captured bytes; no more than 262144 can be",
        ),
        (pcap_file(struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 60)), "claims 4294967295 captured"),
        (section(major=2), "pcapng version 2"),
        (b"\x0a\x0d\x0d\x0a\x1c\0\0\0\x4d\x3c\x2b\x1b" + bytes(16), "byte-order magic"),
        (section() + enhanced(b"x"), "block 2 is a frame of interface 0, which is not there"),
        (section() + simple(b"x", 1), "block 2 is a frame of interface 0, which is not there"),
        (section() + interface(link_type=113) + enhanced(b"x"), "113 (Linux cooked capture)"),
        (section() + interface() + enhanced(b"x", number=1), "interface 1, which is not there"),
        (section() + interface() + enhanced(b"abcd", size=9), "9 captured bytes but holds 4"),
        (section() + interface() + simple(b"abcd", 9), "9 captured bytes but holds 4"),
        (
            section() + interface() + enhanced(b"x", size=MAX_FRAME_BYTES + 1),
            "block 3 claims 262145 captured bytes",
        ),
        (section() + block(1, bytes(8), again=24), "two lengths that disagree, 20 and 24"),
        (section() + block(0x0BAD, bytes(8), again=24), "two lengths that disagree, 20 and 24"),
        (section() + block(1, b"", total=8), "block 2 claims a length of 8 bytes"),
        (section() + block(1, bytes(8), total=21), "block 2 claims a length of 21 bytes"),
        (section() + block(6, b"", total=0xFFFFFFFC), "block 2 claims 4294967292 bytes"),
        (section() + block(0x0BAD, b"", total=0xFFFFFFFC), "cut short in block 2"),
        (section() + interface() + block(6, bytes(16)), "block 3 is too short"),
        (section() + block(1, bytes(4)), "block 2 is too short"),
        (block(0x0A0D0D0A, struct.pack("<I", 0x1A2B3C4D)), "block 1 is too short"),
        (section() + interface(b"\x02\0\xff\0abcd"), "an option that runs past its end"),
        (section() + interface(option(9, b"ab")), "an option 9 of 2 bytes"),
        (section() + interface(option(14, b"ab")), "an option 14 of 2 bytes"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.cap"
    path.write_bytes(data)
    _, sentence = read_until_error(path)
    assert sentence is not None
    assert sentence.startswith(f"{path}: ")
    assert words in sentence
    assert "\n" not in sentence


def test_a_missing_file_or_a_directory_is_the_kernels_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_frames(tmp_path / "nothing"))
    with pytest.raises(IsADirectoryError):
        list(read_frames(tmp_path))


FRAMES = [b"a" * 14, b"bc" * 11, b"def" * 5]


def small_pcap() -> tuple[bytes, list[int]]:
    """A capture and the places where it may end: one more frame at each."""
    records = [pcap_record(data) for data in FRAMES]
    return pcap_file(*records), [24 + sum(map(len, records[:count])) for count in range(4)]


def small_pcapng() -> tuple[bytes, list[int]]:
    start = section() + interface(option(2, b"if"))
    records = [enhanced(data, options=option(2, b"\1\0\0\0")) for data in FRAMES]
    ends = [len(start) + sum(map(len, records[:count])) for count in range(4)]
    return start + b"".join(records), [len(section()), *ends]


@pytest.mark.parametrize("make", [small_pcap, small_pcapng])
def test_a_file_cut_anywhere_gives_the_frames_before_the_cut(
    tmp_path: Path, make: Callable[[], tuple[bytes, list[int]]]
) -> None:
    data, borders = make()
    path = tmp_path / "cut"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        frames, sentence = read_until_error(path)
        whole = sum(border <= cut for border in borders[-3:])
        assert [frame.data for frame in frames] == FRAMES[:whole], cut
        assert (sentence is None) == (cut in borders), cut


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([small_pcap, small_pcapng]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=8)), max_size=2),
)
def test_a_damaged_file_gives_frames_or_a_capture_error(
    tmp_path_factory: pytest.TempPathFactory,
    make: Callable[[], tuple[bytes, list[int]]],
    changes: list[tuple[int, int]],
    inserts: list[tuple[int, bytes]],
) -> None:
    damaged = bytearray(make()[0])
    for at, value in changes:
        damaged[at % len(damaged)] = value
    for at, value_bytes in inserts:
        at %= len(damaged)
        damaged[at:at] = value_bytes
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    frames, _ = read_until_error(path)
    assert sum(len(frame.data) for frame in frames) <= len(damaged)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"", pcap_file(), section(), section() + interface(), section(">")]),
    st.binary(max_size=200),
)
def test_noise_gives_frames_or_a_capture_error(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(start + noise)
    read_until_error(path)


@pytest.mark.parametrize(
    "data",
    [
        pcap_file(struct.pack("<IIII", 0, 0, 0x7FFFFFFF, 0x7FFFFFFF)),
        section() + block(6, b"", total=0x7FFFFFFC),
        section() + block(0x0BAD, bytes(8 << 20), total=0x7FFFFFFC),
        section() + interface() + block(3, struct.pack("<I", 0x7FFFFFFF)),
    ],
)
def test_an_absurd_length_costs_no_memory(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "absurd"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        _, sentence = read_until_error(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sentence is not None
    assert peak < 1 << 20


# Writing

FRAME_LISTS = st.lists(
    st.tuples(
        st.lists(st.binary(max_size=40), max_size=4),
        st.integers(0, (1 << 32) * SECOND - 1),
        st.integers(0, 100),
        st.sampled_from([None, True, False]),
        st.integers(0, 1),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(FRAME_LISTS, st.booleans(), st.sampled_from([0, 50, 1 << 16]))
def test_what_is_written_as_pcap_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, frames: list[Any], nanoseconds: bool, buffer_size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.pcap"
    expected = []
    with PcapWriter(path, nanoseconds=nanoseconds, buffer_size=buffer_size) as writer:
        for pieces, time, missing, _, _ in frames:
            data = b"".join(pieces)
            length = len(data) + missing
            writer.write(pieces, timestamp_ns=time, length=length)
            shown = time if nanoseconds else time // 1000 * 1000
            expected.append(CapturedFrame(data, shown, length))
    assert list(read_frames(path)) == expected


@settings(max_examples=60, deadline=None)
@given(FRAME_LISTS, st.sampled_from([0, 50, 1 << 16]))
def test_what_is_written_as_pcapng_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, frames: list[Any], buffer_size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.pcapng"
    expected = []
    with PcapngWriter(path, interfaces=["one"], buffer_size=buffer_size) as writer:
        for place, (pieces, time, missing, inbound, number) in enumerate(frames):
            if place == 2:
                assert writer.add_interface("two") == 1
            number = number if place >= 2 else 0
            data = b"".join(pieces)
            length = len(data) + missing
            writer.write(
                pieces, timestamp_ns=time, length=length, interface=number, inbound=inbound
            )
            expected.append(CapturedFrame(data, time, length, ("one", "two")[number], inbound))
    assert list(read_frames(path)) == expected


def test_pcap_as_it_is_written() -> None:
    file = io.BytesIO()
    with PcapWriter(file) as writer:
        writer.write([b"\xaa", memoryview(b"\xbb\xcc")], timestamp_ns=SECOND + 2, length=5)
    assert file.getvalue() == bytes.fromhex(
        "4d3cb2a1 0200 0400 00000000 00000000 00000400 01000000"
        "01000000 02000000 03000000 05000000 aabbcc"
    )


def test_pcapng_as_it_is_written() -> None:
    file = io.BytesIO()
    with PcapngWriter(file, interfaces=["tap0"]) as writer:
        start = len(file.getvalue())
        writer.write(bytearray(b"\xaa\xbb\xcc"), timestamp_ns=(2 << 32) + 1, inbound=False)
        writer.write(b"", timestamp_ns=0)
    written = file.getvalue()
    assert written[:16] == bytes.fromhex("0a0d0d0a") + written[4:8] + bytes.fromhex(
        "4d3c2b1a 0100 0000"
    )
    assert written[start - 40 : start] == bytes.fromhex(
        "01000000 28000000 0100 0000 00000400"
        "0200 0400 74617030  0900 0100 09000000  00000000  28000000"
    )
    assert written[start:] == bytes.fromhex(
        "06000000 30000000 00000000 02000000 01000000 03000000 03000000 aabbcc00"
        "0200 0400 02000000  00000000  30000000"
        "06000000 20000000 00000000 00000000 00000000 00000000 00000000 20000000"
    )


def test_sections_one_after_the_other_are_one_capture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with open_writer(tmp_path / f"{name}.pcapng") as writer:
            writer.write(name.encode(), timestamp_ns=0)
    joined = (tmp_path / "a.pcapng").read_bytes() + (tmp_path / "b.pcapng").read_bytes()
    assert [frame.data for frame in read_bytes(tmp_path, joined)] == [b"a", b"b"]


def test_the_name_chooses_the_format(tmp_path: Path) -> None:
    for name, magic in (
        ("x.pcapng", "0a0d0d0a"),
        ("x.PCAPNG", "0a0d0d0a"),
        ("x.pcap", "4d3cb2a1"),
        ("x", "4d3cb2a1"),
    ):
        open_writer(tmp_path / name).close()
        assert (tmp_path / name).read_bytes()[:4].hex() == magic


def test_frames_may_change_once_they_are_written() -> None:
    file = io.BytesIO()
    data = bytearray(b"before")
    with PcapWriter(file) as writer:
        writer.write([memoryview(data)], timestamp_ns=0)
        data[:] = b"after!"
    assert file.getvalue().endswith(b"before")


@pytest.mark.parametrize("kind", [PcapWriter, PcapngWriter])
def test_a_frame_that_is_refused_leaves_no_trace(
    tmp_path: Path, kind: Callable[..., CaptureWriter]
) -> None:
    path = tmp_path / "x"
    with kind(path) as writer:
        writer.write(b"first", timestamp_ns=1)
        with pytest.raises(UsageError, match="262145 bytes"):
            writer.write([bytes(MAX_FRAME_BYTES), b"x"], timestamp_ns=1)
        for time in (-1, 1 << 64):
            with pytest.raises(UsageError, match="cannot hold"):
                writer.write(b"never", timestamp_ns=time)
        with pytest.raises(UsageError, match="cannot hold"):
            writer.write(b"never", timestamp_ns=1, length=-1)
        with pytest.raises(TypeError):
            writer.write([b"never", 5], timestamp_ns=1)  # type: ignore[list-item]
        writer.write(bytes(MAX_FRAME_BYTES), timestamp_ns=2)
    assert [len(frame.data) for frame in read_frames(path)] == [5, MAX_FRAME_BYTES]
    with pytest.raises(UsageError, match="closed"):
        writer.write(b"late")


def test_an_interface_that_is_not_there_is_refused() -> None:
    with PcapngWriter(io.BytesIO()) as writer, pytest.raises(UsageError, match="interface 1"):
        writer.write(b"x", interface=1)


def test_nothing_waits_without_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    with open_writer(path, buffer_size=0) as writer:
        for count in range(1, 4):
            writer.write(b"x")
            assert len(list(read_frames(path))) == count


class FullDisk(io.BytesIO):
    """A file on a disk with room for `room` bytes; takes what fits, like write(2)."""

    room = 10**9

    def write(self, data: Any) -> int:
        left = self.room - self.tell()
        if left <= 0 and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(data)[:left])


@pytest.mark.parametrize("kind", [PcapWriter, PcapngWriter])
def test_a_full_disk_leaves_whole_records_and_the_error_to_the_caller(
    tmp_path: Path, kind: Callable[..., CaptureWriter]
) -> None:
    file = FullDisk()
    writer = kind(file, buffer_size=0)
    writer.write(b"first", timestamp_ns=1)
    good = len(file.getvalue())
    for room in range(good, good + 21, 4):
        file.room = room
        with pytest.raises(OSError, match="No space left"):
            writer.write(b"second", timestamp_ns=1)
        assert len(file.getvalue()) == good
    file.room = 10**9
    writer.write(b"third", timestamp_ns=1)
    writer.close()
    assert [frame.data for frame in read_bytes(tmp_path, file.getvalue())] == [b"first", b"third"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
class InterruptAt:
    """Raises KeyboardInterrupt before the line of `vq.pcap` that is the `place`-th to come."""

    def __init__(self, place: int) -> None:
        self.left = place
        self.came = False

    def __call__(self, frame: FrameType, event: str, _: object) -> InterruptAt | None:
        if frame.f_code.co_filename != vq.pcap.__file__:
            return None
        if event == "line":
            if not self.left:
                self.came = True
                sys.settrace(None)
                raise KeyboardInterrupt
            self.left -= 1
        return self


@pytest.mark.parametrize("buffer_size", [0, 250])
@pytest.mark.parametrize("name", ["kept.pcap", "kept.pcapng"])
def test_an_interrupt_at_any_place_leaves_whole_frames(
    tmp_path: Path, name: str, buffer_size: int
) -> None:
    """`vq loopback --write` was interrupted between a frame and the head of its record, which
    stayed empty; so what followed was read as heads of records that were none."""
    frames = [bytes([number]) * 60 for number in range(6)]
    for place in range(1000):
        interrupt = InterruptAt(place)
        path = tmp_path / f"{place} {name}"
        with open_writer(path, buffer_size=buffer_size) as writer:
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                for frame in frames[:-1]:
                    writer.write([frame])
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            writer.write([frames[-1]])  # and who goes on may do so
        kept = [frame.data for frame in read_frames(path)]
        assert kept == [frame for frame in frames if frame in kept] and kept[-1] == frames[-1]
        if not interrupt.came:
            assert kept == frames and place > 50
            return
    pytest.fail("it never came to the end")


def test_a_device_that_is_full_from_the_start_is_the_kernels_error() -> None:
    for kind in (PcapWriter, PcapngWriter):
        with pytest.raises(OSError, match="No space left"):
            kind("/dev/full")


def test_a_pipe_can_be_written(tmp_path: Path) -> None:
    reader, end = os.pipe()
    with open(reader, "rb") as pipe:
        with open(end, "wb", buffering=0) as target, PcapWriter(target) as writer:
            writer.write(b"through", timestamp_ns=5)
        data = pipe.read()
    assert [frame.data for frame in read_bytes(tmp_path, data)] == [b"through"]


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("tcpdump") is None,
    reason="needs the tcpdump.org tcpdump, as Linux systems have it",
)
@pytest.mark.parametrize("name", ["x.pcap", "x.pcapng"])
def test_tcpdump_reads_what_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frames = [bytes([number]) * (14 + number) for number in range(5)] + [bytes(MAX_FRAME_BYTES)]
    with open_writer(path) as writer:
        for number, data in enumerate(frames):
            writer.write(data, timestamp_ns=number * SECOND + 123_456_789, inbound=bool(number % 2))
    copy = tmp_path / "copy.pcap"
    done = subprocess.run(
        ["tcpdump", "-r", path, "-w", copy, "--time-stamp-precision=nano", "-Z", "root"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(frame.data, frame.timestamp_ns) for frame in read_frames(copy)] == [
        (data, number * SECOND + 123_456_789) for number, data in enumerate(frames)
    ]


@pytest.mark.skipif(shutil.which("capinfos") is None, reason="capinfos is not installed")
@pytest.mark.parametrize("name", ["x.pcap", "x.pcapng"])
def test_capinfos_reads_what_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with open_writer(path) as writer:
        for number in range(5):
            writer.write(FRAME, timestamp_ns=number, inbound=True)
    done = subprocess.run(
        ["capinfos", "-TrcE", path], capture_output=True, text=True, timeout=30, check=True
    )
    assert "ether" in done.stdout
    assert "\t5" in done.stdout
