"""Readers and writers of requests, however the driver cut the bytes into buffers."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import request as request_module
from vq.errors import UsageError
from vq.request import MOST_COPIED, Request, RequestGone, RequestTooLong, RequestTooShort
from vq.split_ring import Chain


class Header(ctypes.LittleEndianStructure):
    _fields_ = (("kind", ctypes.c_uint32), ("sector", ctypes.c_uint64))
    _pack_ = 1


class Made(NamedTuple):
    request: Request
    readable: list[bytearray]
    writable: list[bytearray]
    done: list[Request]


def made(readable: list[bytes], writable: list[int] = []) -> Made:  # noqa: B006
    sources = [bytearray(piece) for piece in readable]
    targets = [bytearray(b"\xee" * size) for size in writable]
    chain = Chain(5, [memoryview(s) for s in sources], [memoryview(t) for t in targets])
    done: list[Request] = []
    return Made(Request(chain, 0, "requests", 1, done.append), sources, targets, done)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.binary(max_size=64),
    st.lists(st.integers(0, 64)),
    st.lists(st.tuples(st.sampled_from(["read", "views", "skip"]), st.integers(0, 40))),
)
def test_a_reader_gives_the_bytes_in_order_however_they_are_cut(
    data: bytes, cuts: list[int], steps: list[tuple[str, int]]
) -> None:
    reader = made(pieces_of(data, cuts)).request.reader
    taken = b""
    for how, most in [*steps, ("read", len(data))]:
        length = min(most, reader.remaining)
        if how == "read":
            taken += reader.read(length)
        elif how == "views":
            taken += b"".join(reader.views(length))
        else:
            reader.skip(length)
            taken += data[len(taken) : len(taken) + length]
        assert (reader.position, len(reader)) == (len(taken), len(data) - len(taken))
    assert taken == data
    assert reader.read() == b"" and reader.views() == []


@given(
    st.lists(st.integers(1, 20), max_size=6),
    st.lists(st.tuples(st.booleans(), st.binary(max_size=30))),
)
def test_a_writer_fills_the_buffers_in_order_and_nothing_else(
    sizes: list[int], pieces: list[tuple[bool, bytes]]
) -> None:
    case = made([], sizes)
    writer = case.request.writer
    written = b""
    for in_views, whole in pieces:
        piece = whole[: writer.remaining]
        if in_views:
            start = 0
            for view in writer.views(len(piece)):
                view[:] = piece[start : start + len(view)]
                start += len(view)
        else:
            writer.write(piece)
        written += piece
        assert writer.written == len(written)
    total = sum(sizes)
    assert b"".join(case.writable) == written.ljust(total, b"\xee")


def test_structures_are_copied_both_ways_over_buffers() -> None:
    wire = (8).to_bytes(4, "little") + (0x123456789).to_bytes(8, "little")
    case = made([wire[:3], wire[3:11], wire[11:]], [1, 11])
    header = case.request.reader.structure(Header)
    assert (header.kind, header.sector) == (8, 0x123456789)
    case.readable[0][0] = 0xFF  # the guest changes it
    assert header.kind == 8
    case.request.writer.structure(Header(kind=8, sector=0x123456789))
    assert b"".join(case.writable) == wire


def test_what_is_too_short_says_so_and_takes_nothing() -> None:
    case = made([b"abc"], [2])
    with pytest.raises(RequestTooShort, match="3 readable bytes where 4 are needed") as caught:
        case.request.reader.read(4)
    assert (caught.value.queue, caught.value.head) == ("requests", 5)
    with pytest.raises(RequestTooShort):
        case.request.reader.structure(Header)
    with pytest.raises(RequestTooShort, match="2 writable bytes where 3 are needed"):
        case.request.writer.write(b"xyz")
    with pytest.raises(UsageError, match="a length of -1"):
        case.request.reader.read(-1)
    assert case.request.reader.read() == b"abc"
    assert case.writable == [b"\xee\xee"] and case.request.writer.written == 0


def test_views_of_readable_bytes_cannot_be_written() -> None:
    (view,) = made([b"abc"]).request.reader.views(2)
    with pytest.raises(TypeError):
        view[0] = 0


@settings(max_examples=50)
@given(
    st.binary(min_size=1, max_size=200),
    st.lists(st.integers(1, 40), max_size=40),
    st.integers(0, 9),
)
def test_files_take_and_give_the_bytes_at_their_place(
    data: bytes, sizes: list[int], offset: int
) -> None:
    path = f"/proc/self/fd/{(fd := os.memfd_create('t'))}" if hasattr(os, "memfd_create") else ""
    if not path:
        pytest.skip("this system has no memfd")
    try:
        case = made(pieces_of(data, [3, 7, 50, 51]), sizes)
        case.request.reader.to_file(fd, offset=offset)
        assert Path(path).read_bytes() == bytes(offset) + data
        room = sum(sizes)
        count = case.request.writer.from_file(fd, offset=offset)
        assert count == min(room, len(data))
        assert b"".join(case.writable) == data[:room].ljust(room, b"\xee")
        assert (case.request.writer.position, case.request.writer.written) == (count, count)
        assert case.request.writer.remaining == room - count
        case.request.writer.zeros()
        assert b"".join(case.writable) == data[:room].ljust(room, b"\0")
    finally:
        os.close(fd)


def test_more_buffers_than_one_system_call_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(request_module, "IOV_MAX", 3)
    data = bytes(range(40))
    case = made([data[i : i + 4] for i in range(0, 40, 4)], [5] * 8)
    with (tmp_path / "f").open("w+b") as file:
        case.request.reader.to_file(file.fileno())
        assert (tmp_path / "f").read_bytes() == data
        assert case.request.writer.from_file(file.fileno(), offset=0) == 40
    assert b"".join(case.writable) == data


def test_what_a_pipe_has_now_is_what_comes() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    case = made([], [4, 4, 4])
    with pytest.raises(BlockingIOError):
        case.request.writer.from_file(read)
    assert case.request.writer.position == 0
    os.write(write, b"hello")
    assert case.request.writer.from_file(read) == 5
    os.write(write, b"!")
    os.close(write)
    assert case.request.writer.from_file(read, 3) == 1
    assert case.request.writer.from_file(read) == 0
    os.close(read)
    assert b"".join(case.writable) == b"hello!" + b"\xee" * 6


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_a_tail_stands_at_the_end_of_the_bytes(sizes: list[int], draw: st.DataObject) -> None:
    total = sum(sizes)
    case = made([], sizes)
    writer = case.request.writer
    start = draw.draw(st.integers(0, total - 1))
    writer.write(b"d" * start)
    tail = writer.split_tail(1)
    assert (writer.remaining, tail.remaining) == (total - start - 1, 1)
    assert writer.written == start
    tail.write(b"s")
    assert writer.written == total
    assert b"".join(case.writable) == b"d" * start + b"\xee" * (total - start - 1) + b"s"
    with pytest.raises(RequestTooShort):
        writer.write(bytes(total - start))
    with pytest.raises(UsageError, match="already"):
        writer.split_tail(0)


def test_a_request_without_room_for_its_tail_is_too_short() -> None:
    with pytest.raises(RequestTooShort):
        made([b"read only"]).request.writer.split_tail(1)


def test_a_request_is_completed_once_with_what_was_written() -> None:
    case = made([], [4])
    case.request.writer.write(b"abc")
    with pytest.raises(UsageError, match="5 bytes written of 4"):
        case.request.complete(5)
    case.request.complete()
    assert (case.done, case.request.chain.written) == ([case.request], 3)
    with pytest.raises(UsageError, match="completed already"):
        case.request.complete()
    other = made([], [4])
    other.request.complete(4)
    assert other.request.chain.written == 4


def test_after_a_reset_the_buffers_are_out_of_reach() -> None:
    case = made([b"abc"], [4, 1])
    tail = case.request.writer.split_tail(1)
    case.request.drop()
    for use in (
        case.request.reader.read,
        case.request.reader.views,
        lambda: case.request.writer.write(b"x"),
        lambda: case.request.writer.zeros(),
        lambda: tail.write(b"x"),
    ):
        with pytest.raises(RequestGone, match="requests, head 5: the queue was reset"):
            use()
    assert b"".join(case.writable) == b"\xee" * 5


@given(st.binary(min_size=1, max_size=64), st.lists(st.integers(0, 64)), st.data())
def test_a_stream_gets_as_much_as_it_takes(
    data: bytes, cuts: list[int], draw: st.DataObject
) -> None:
    reader = made(pieces_of(data, cuts)).request.reader
    read, write = os.pipe()
    try:
        while reader.remaining:
            length = draw.draw(st.none() | st.integers(0, reader.remaining))
            before = reader.position
            count = reader.to_stream(write, length)
            assert count == (len(data) - before if length is None else length)
            assert reader.position == before + count
        assert os.read(read, 100) == data
        with pytest.raises(RequestTooShort):
            reader.to_stream(write, 1)
    finally:
        os.close(read)
        os.close(write)


def test_a_full_stream_leaves_the_rest_to_be_written_later() -> None:
    data = bytes(range(256)) * 1024
    reader = made([data[:1000], data[1000:]]).request.reader
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        got = b""
        with pytest.raises(BlockingIOError):
            while reader.remaining:
                reader.to_stream(write)
        while reader.remaining:
            got += os.read(read, 10_000)
            with contextlib.suppress(BlockingIOError):
                reader.to_stream(write)
        os.close(write)
        while piece := os.read(read, 1 << 16):
            got += piece
        assert got == data
    finally:
        os.close(read)


def test_all_that_is_left_is_copied_up_to_a_limit_and_a_named_length_always() -> None:
    """Found by audit: `read()` copied whatever the driver had named, up to 4 GiB for a request."""
    mebibyte = bytearray(MOST_COPIED)
    chain = Chain(5, [memoryview(mebibyte)] * 4096, [])
    reader = Request(chain, 0, "requests", 1, lambda request: None).reader
    with pytest.raises(RequestTooLong, match="4294967296 readable bytes where 1048576") as caught:
        reader.read()
    assert (caught.value.queue, caught.value.head) == ("requests", 5)
    assert reader.remaining == 4 << 30, "nothing is taken then"
    with pytest.raises(RequestTooLong, match="where 2097152 are the most"):
        reader.read(limit=2 << 20)
    assert len(reader.read(3 << 20)) == 3 << 20, "the device asked for so many"
    reader.skip(reader.remaining - MOST_COPIED)
    assert len(reader.read()) == MOST_COPIED
    assert reader.read() == b""
    assert made([b"abcd"]).request.reader.read(limit=4) == b"abcd"
    with pytest.raises(RequestTooLong):
        made([b"abcd"]).request.reader.read(limit=3)
