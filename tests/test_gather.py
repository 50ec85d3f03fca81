"""Pieces of memory gathered into one and put back."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import tempfile
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq.gather import IoVectors, Slab

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create")

NOWHERE = 1 << 12  # no process has memory there


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=16), data=st.data()
)
def test_pieces_lie_behind_one_another_and_go_back_to_where_they_were(
    pieces: list[bytes], data: st.DataObject
) -> None:
    slab = Slab(8192, 16)
    buffers = [ctypes.create_string_buffer(piece, len(piece) + 1) for piece in pieces]
    lengths = [len(piece) for piece in pieces]
    for _ in range(2):  # what an earlier use left behind is not mixed in
        slab.gather([ctypes.addressof(b) for b in buffers], lengths, sum(lengths))
        assert bytes(slab.view[: sum(lengths)]) == b"".join(b.raw[:-1] for b in buffers)
        new = data.draw(st.binary(min_size=sum(lengths), max_size=sum(lengths)))
        slab.view[: len(new)] = new
        slab.put_back()
        assert b"".join(b.raw[:-1] for b in buffers) == new
        assert all(b.raw[-1] == 0 for b in buffers), "nothing behind a piece is touched"
    slab.close()


def test_the_slab_is_where_it_says() -> None:
    slab = Slab(4096, 1)
    slab.view[:5] = b"hello"
    assert ctypes.string_at(slab.address, 5) == b"hello"
    slab.close()
    slab.close()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("as_vectors", [False, True])
def test_memory_that_is_not_there_is_an_error(place: int, as_vectors: bool) -> None:
    slab = Slab(4096, 2)
    there = ctypes.create_string_buffer(16)
    addresses = [ctypes.addressof(there)] * 2
    addresses[place] = NOWHERE
    with pytest.raises(OSError, match="Bad address"):
        if as_vectors:
            slab.gather_vectors(vectors_of(addresses, [16, 16]), 2, 32)
        else:
            slab.gather(addresses, [16, 16], 32)
    slab.close()


def vectors_of(addresses: Sequence[int], lengths: Sequence[int]) -> bytes:
    pairs = zip(addresses, lengths, strict=True)
    return b"".join(struct.pack("@PN", *pair) for pair in pairs)


def test_pieces_may_be_given_as_vectors() -> None:
    """They are not put back: what was gathered before is not either."""
    slab = Slab(4096, 2)
    buffers = [ctypes.create_string_buffer(text) for text in (b"one", b"three")]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    slab.gather(addresses, [4, 6], 10)
    slab.view[:10] = bytes(10)
    slab.gather_vectors(vectors_of(addresses, [3, 2]), 2, 5)
    assert bytes(slab.view[:10]) == b"oneth" + bytes(5)
    slab.view[:10] = bytes(10)
    slab.put_back()
    assert [buffer.value for buffer in buffers] == [b"one", b"three"]
    slab.close()


def test_vectors_are_filled_in_their_order_from_any_of_them() -> None:
    vectors = IoVectors(4)
    memory = [ctypes.create_string_buffer(4) for _ in range(4)]
    vectors.put(1, [ctypes.addressof(m) for m in memory[1:]], [1, 2, 3])
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"abcdefgh")
        file.seek(0)
        assert vectors.read(file.fileno(), 2, 2) == 5
        assert [m.raw for m in memory] == [bytes(4), bytes(4), b"ab\0\0", b"cde\0"]
        assert vectors.read(file.fileno(), 1, 3) == 3
        assert [m.raw for m in memory[1:]] == [b"f\0\0\0", b"gh\0\0", b"cde\0"]
        assert vectors.read(file.fileno(), 1, 3) == 0


def test_rows_of_vectors_lie_behind_one_another() -> None:
    vectors = IoVectors(9)
    each = 2 * ctypes.sizeof(ctypes.c_void_p)
    rows = vectors.places([3, 1, 5])
    assert rows.typecode == "Q"
    assert rows.tolist() == [
        vectors.address,
        vectors.address + 3 * each,
        vectors.address + 4 * each,
    ]
    assert vectors.places([9]).tolist() == [vectors.address]


def test_what_a_read_refuses_is_a_negative_error_number() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    memory = ctypes.create_string_buffer(4)
    vectors = IoVectors(1)
    vectors.put(0, [ctypes.addressof(memory)], [4])
    try:
        assert vectors.read(reading, 0, 1) == -errno.EAGAIN
        os.write(writing, b"four")
        assert vectors.read(reading, 0, 1) == 4 and memory.raw == b"four"
    finally:
        os.close(reading)
        os.close(writing)
