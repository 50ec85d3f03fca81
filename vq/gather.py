"""Many pieces of memory copied into one, and back again, in one system call each.

To touch a hundred places in memory from Python, one after another, takes a hundred steps of the
interpreter. The kernel does it in one: `pwritev` copies from any number of places into a file, and
`preadv` the other way. `Slab` is such a file, mapped, in memory and without a name.

What was gathered is private: nobody can change it after it was looked at. Memory that turns out not
to be there (a guest's file that was cut short) is an `OSError` here, not the end of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import weakref
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from vq.memory import map_shared

__all__ = ["IoVectors", "Slab"]

SYSTEM_CALLS = ("preadv", "pwritev", "readv")


class IoVectors:
    """An array of `count` times `struct iovec`; `address` is where it lies, `pointer` the same for
    ctypes.

    Pieces are shorter than 4 GiB. Columns that are arrays, addresses of "Q" and lengths of "I", are
    stored as they are, which is the fastest.
    """

    SIZE = 2 * ctypes.sizeof(ctypes.c_void_p)
    """Bytes of each."""

    def __init__(self, count: int) -> None:
        self._memory = (ctypes.c_ubyte * (2 * _WORD * count))()
        self.address = ctypes.addressof(self._memory)
        self.pointer = ctypes.c_void_p(self.address)
        self.count = count
        view = memoryview(self._memory).cast("B")
        self._words = view.cast("Q") if _WORD == 8 else view.cast("I")
        self._addresses = self._words[::2]
        self._lengths = view.cast("I")[_LENGTH :: _WORD // 2]

    def places(self, counts: Sequence[int]) -> array[int]:
        """Where rows of so many pieces begin, one behind another; addresses ("Q")."""
        starts = accumulate(counts[:-1], initial=0)
        return array("Q", [self.address + 2 * _WORD * first for first in starts])

    def put(self, first: int, addresses: Sequence[int], lengths: Sequence[int]) -> None:
        """Stores pieces from number `first` on. There must be as many lengths as addresses."""
        end = first + len(addresses)
        self._addresses[first:end] = _column(_WORD_CODE, addresses)
        self._lengths[first:end] = _column("I", lengths)

    def store(self, vectors: array[int]) -> None:
        """Stores pieces from the first on: their addresses and lengths in turn ("Q")."""
        self._words[: len(vectors)] = vectors if _WORD == 8 else array("I", vectors)

    def read(self, fd: int, first: int, count: int) -> int:
        """readv(2) into `count` pieces from number `first` on.

        Returns how many bytes it read, or a negative error number: that nothing is there to be read
        is no exception, and to raise one takes as long as to read a frame.
        """
        length: int = _readv(fd, _at(self._memory, 2 * _WORD * first), count)
        return length if length >= 0 else -ctypes.get_errno()


class Slab:
    """Private memory of `size` bytes for up to `pieces` pieces at once.

    `view` shows all of it, and `address` is where it lies. Raises `OSError` where the system has
    no such files.
    """

    def __init__(self, size: int, pieces: int) -> None:
        if _pwritev is None or _preadv is None or not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "no memfd, preadv or pwritev here")
        self._fd = os.memfd_create("vq-slab")
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._finalizer.atexit = False
        try:
            os.ftruncate(self._fd, size)
            self.view, self.address = map_shared(self._fd, 0, size)
        except BaseException:
            self.close()
            raise
        self._vectors = IoVectors(pieces)
        self._pieces = self._total = 0  # of what was gathered last

    def gather(self, addresses: Sequence[int], lengths: Sequence[int], total: int) -> None:
        """Copies pieces of memory into the slab, from its start, one right behind another.

        `total` is the sum of the lengths. Raises `OSError` (EFAULT) when not all pieces are there.
        """
        self._vectors.put(0, addresses, lengths)
        self._pieces, self._total = len(addresses), total
        self._move(_pwritev)

    def gather_vectors(self, vectors: bytes, count: int, total: int) -> None:
        """The same for pieces that are given as `count` times `struct iovec`.

        There is no way back for them.
        """
        self._pieces = self._total = 0
        if _pwritev(self._fd, vectors, count, _AT_START) != total:
            raise _not_copied()

    def put_back(self) -> None:
        """Copies the pieces back to where `gather` found them."""
        self._move(_preadv)

    def close(self) -> None:
        """Gives the slab back, once nobody looks at it. Closing twice is allowed."""
        self._finalizer()

    def _move(self, call: Any) -> None:
        if call(self._fd, self._vectors.pointer, self._pieces, _AT_START) != self._total:
            raise _not_copied()


def _not_copied() -> OSError:
    code = ctypes.get_errno() or errno.EFAULT
    return OSError(code, f"memory cannot be copied: {os.strerror(code)}")


def _column(code: str, numbers: Sequence[int]) -> array[int]:
    """The numbers as an array of this type."""
    if isinstance(numbers, array) and numbers.typecode == code:
        return numbers
    return array(code, numbers)


_WORD = ctypes.sizeof(ctypes.c_void_p)  # as wide as size_t
_WORD_CODE = "Q" if _WORD == 8 else "I"
_LENGTH = _WORD // 4 if sys.byteorder == "little" else _WORD // 2 - 1
"""Which of the 32-bit halves of a vector's words has the lower half of the length."""
_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str) -> Any:
    """A function that returns a number of bytes; None where there is none.

    Without the types of its arguments, which take more time than passing them does: pointers and
    what is wider than an int must be objects of ctypes, or bytes.
    """
    function = getattr(_libc, name, None)
    if function is not None:
        function.restype = ctypes.c_ssize_t
    return function


_at = ctypes.byref
_AT_START = ctypes.c_long(0)
_readv = _function("readv")
_preadv = _function("preadv")
_pwritev = _function("pwritev")
