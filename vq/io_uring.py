"""Many reads or writes of one file in one system call: Linux's io_uring through ctypes.

A `RequestRing` holds a row of entries that are prepared once; what changes from burst to burst,
addresses and lengths, is stored a column at a time. Every request is done by the time that
`submit` returns: none waits in the kernel for a file to become ready, so no memory is in the
kernel's hands afterwards.

Where the kernel does not have it, or somebody forbids it, `RequestRing` raises `OSError`: whoever
wants to be fast here has a plain way too. Not to be called on other systems than Linux.

Sources: uapi/linux/io_uring.h, io_uring_setup(2), io_uring_enter(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
import weakref
from array import array
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache

from vq.memory import map_shared

__all__ = ["Opcode", "RequestRing"]

SYSTEM_CALLS = ("io_uring_enter",)


class Opcode(IntEnum):
    """What a request does (`enum io_uring_op`).

    With READV and WRITEV the memory of a request is an array of `struct iovec`, and its length is
    their number.
    """

    READV = 1
    WRITEV = 2
    READ = 22
    WRITE = 23


_SETUP, _ENTER, _REGISTER = 425, 426, 427
# The same numbers on every architecture that joined or was renumbered in time; not on these.
_OTHER_NUMBERS = ("alpha", "mips", "ia64")

_PARAMS = struct.Struct("=10I" + "10I" * 2)
"""`struct io_uring_params`: ten words, then where things lie in the two rings' memory."""
_ENTRY = struct.Struct("=BBHiQQIIQ24x")
"""`struct io_uring_sqe`: opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data"""
_COMPLETION = 16
"""`struct io_uring_cqe`: u64 user_data, s32 result, u32 flags."""

_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_FEAT_SINGLE_MMAP = 1 << 0
_FEAT_CQE_SKIP = 1 << 11  # Linux 5.17: RWF_NOWAIT is understood, for every file that supports it
_ENTER_GETEVENTS = 1 << 0
_SETUP_R_DISABLED = 1 << 6
_REGISTER_FILES, _UNREGISTER_FILES, _REGISTER_RESTRICTIONS, _ENABLE_RINGS = 2, 3, 11, 12
_RESTRICTION = struct.Struct("=HB13x")
"""`struct io_uring_restriction`: what it is about, and the operation or flags permitted."""
_PERMITTED_REGISTER, _PERMITTED_OPERATION, _PERMITTED_FLAGS, _REQUIRED_FLAGS = 0, 1, 2, 3
_FIXED_FILE = 1 << 0
_RWF_NOWAIT = 8
_LOWER_HALF = int(sys.byteorder == "big")  # of user_data, which is 64 bits wide
_CURRENT_POSITION = (1 << 64) - 1


class RequestRing:
    """A ring for up to `count` requests of each of the `opcodes`, all on the file `fd`.

    Entry number ``opcodes.index(opcode) * count + n`` is the n-th of an opcode. `addresses` (of
    format "Q") and `lengths` ("I") say for each entry what memory it reads or writes; the caller
    keeps that memory mapped until `submit` returns. The ring holds on to the file until `close`.
    The kernel knows that it is for nothing else: a process confined by seccomp may be left the call
    io_uring_enter, since no other operation and no other file can be had by it.

    Raises `OSError` where there is no io_uring, or an old one.
    """

    addresses: memoryview
    lengths: memoryview

    def __init__(self, fd: int, opcodes: Sequence[Opcode], count: int) -> None:
        if platform.machine().startswith(_OTHER_NUMBERS):
            raise OSError(errno.ENOSYS, "no io_uring")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._syscall = self._libc.syscall
        self._syscall.restype = ctypes.c_long
        entries = count * len(opcodes)
        params = ctypes.create_string_buffer(_PARAMS.size)
        struct.pack_into("=I", params, 8, _SETUP_R_DISABLED)
        self._fd = self._call(_SETUP, ctypes.c_uint(entries), params)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._finalizer.atexit = False
        try:
            self._map(params.raw)
            # To look a file up by its descriptor for each request costs as much as a small copy.
            self._register(_REGISTER_FILES, struct.pack("=i", fd), 1)
            self._restrict(opcodes)
        except BaseException:
            self.close()
            raise
        for number in range(entries):
            entry = self._entries[64 * number : 64 * number + 64]
            opcode = opcodes[number // count]
            entry[:] = _ENTRY.pack(
                opcode, _FIXED_FILE, 0, 0, _CURRENT_POSITION, 0, 0, _RWF_NOWAIT, number
            )

    def _restrict(self, opcodes: Sequence[Opcode]) -> None:
        """Has the kernel refuse all but these operations on the one file; enables the ring."""
        rules = [(_PERMITTED_OPERATION, int(opcode)) for opcode in opcodes]
        rules += [(_PERMITTED_FLAGS, _FIXED_FILE), (_REQUIRED_FLAGS, _FIXED_FILE)]
        rules.append((_PERMITTED_REGISTER, _UNREGISTER_FILES))
        packed = b"".join(_RESTRICTION.pack(*rule) for rule in rules)
        self._register(_REGISTER_RESTRICTIONS, packed, len(rules))
        self._register(_ENABLE_RINGS, None, 0)

    def _map(self, params: bytes) -> None:
        size, completions, _, _, _, features, *rest = _PARAMS.unpack(params)
        (head, tail, _, _, _, _, order), (c_head, c_tail, _, _, _, c_first) = (
            rest[4:11],
            rest[14:20],
        )
        if not features & _FEAT_SINGLE_MMAP or not features & _FEAT_CQE_SKIP:
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old")
        length = max(order + 4 * size, c_first + _COMPLETION * completions)
        rings, _ = map_shared(self._fd, _OFF_SQ_RING, length)
        self._entries, _ = map_shared(self._fd, _OFF_SQES, 64 * size)
        self.addresses = self._entries.cast("Q")[2::8]
        self.lengths = self._entries.cast("I")[6::16]
        self._words = rings[: length & ~3].cast("I")
        self._size, self._completions = size, completions
        self._head, self._tail = head // 4, tail // 4
        self._done, self._ready = c_head // 4, c_tail // 4
        self._order = self._words[order // 4 : order // 4 + size]
        self._answers = rings[c_first : c_first + _COMPLETION * completions]
        column = self._answers.cast("i")
        self._who, self._results = column[_LOWER_HALF::4], column[2::4]
        self._numbers = memoryview(array("I", range(size)))
        self._expected = memoryview(array("i", range(size)))

    def submit(self, first: int, count: int) -> array[int]:
        """Does `count` requests from entry `first` on; returns their results in order ("i").

        A result is a number of bytes, or a negative errno. There are fewer of them when the kernel
        would not start more. Raises `OSError` when it started none.
        """
        return self._collect(first, self._start(first, count))

    def submit_alike(self, first: int, count: int, result: int) -> array[int] | None:
        """`submit` where every request is likely to give this result: None when every one did."""
        started = self._start(first, count)
        words = self._words
        done = words[self._done]
        slot = done & (self._completions - 1)
        answers = self._answers[_COMPLETION * slot : _COMPLETION * (slot + count)]
        if started != count or answers.tobytes() != _answers_alike(first, count, result):
            return self._collect(first, started)
        words[self._done] = (done + count) & 0xFFFFFFFF
        return None

    def forget(self) -> None:
        """Takes back what was not started, and drops what was not collected.

        A process that shares the ring may have been killed at any point of `submit`.
        """
        words = self._words
        words[self._tail] = words[self._head]
        words[self._done] = words[self._ready]

    def close(self) -> None:
        """Gives the ring back, and lets go of the file. Closing twice is allowed."""
        if self._finalizer.alive:
            with suppress(OSError):  # a ring that is closed may live a little longer
                self._register(_UNREGISTER_FILES, None, 0)
        self._finalizer()

    def _start(self, first: int, count: int) -> int:
        """Has requests done; returns how many the kernel started, and has done now."""
        words = self._words
        tail = words[self._tail]
        slot = tail & (self._size - 1)
        if slot + count <= self._size:
            self._order[slot : slot + count] = self._numbers[first : first + count]
        else:
            before = self._size - slot
            self._order[slot:] = self._numbers[first : first + before]
            self._order[: count - before] = self._numbers[first + before : first + count]
        words[self._tail] = (tail + count) & 0xFFFFFFFF
        try:
            started = self._enter(count, 0, 0)
        finally:
            # What was not started is taken back. (The kernel looks at the tail in the call only.)
            words[self._tail] = words[self._head]
        while (ready := (words[self._ready] - words[self._done]) & 0xFFFFFFFF) < started:
            self._enter(0, started - ready, _ENTER_GETEVENTS)
        return started

    def _collect(self, first: int, count: int) -> array[int]:
        words = self._words
        done = words[self._done]
        slot = done & (self._completions - 1)
        end = slot + count
        who, results = self._who[slot:end], array("i", self._results[slot:end].tobytes())
        in_turn = who == self._expected[first : first + len(who)]
        if end > self._completions:
            results.frombytes(self._results[: end - self._completions].tobytes())
            in_turn = False
        if not in_turn:
            numbers = who.tolist() + self._who[: count - len(who)].tolist()
            in_order = sorted(zip(numbers, results, strict=True))
            results = array("i", [result for _, result in in_order])
        words[self._done] = (done + count) & 0xFFFFFFFF
        return results

    def _enter(self, submit: int, wait: int, flags: int) -> int:
        while True:
            result: int = self._syscall(_ENTER, self._fd, submit, wait, flags, None, 0)
            if result >= 0:
                return result
            error = _failure()
            if error.errno != errno.EINTR:
                raise error

    def _register(self, operation: int, argument: bytes | None, count: int) -> None:
        self._call(_REGISTER, self._fd, operation, argument, count)

    def _call(self, number: int, *arguments: object) -> int:
        result: int = self._syscall(number, *arguments)
        if result < 0:
            raise _failure()
        return result


def _failure() -> OSError:
    """What the last call failed with."""
    code = ctypes.get_errno()
    return OSError(code, f"io_uring: {os.strerror(code)}")


@lru_cache(maxsize=64)
def _answers_alike(first: int, count: int, result: int) -> bytes:
    """What stands in the ring of completions after requests that were done in turn."""
    answers = array("Q", bytes(_COMPLETION * count))
    answers[::2] = array("Q", range(first, first + count))
    memoryview(answers).cast("B").cast("i")[2::4] = array("i", [result]) * count
    return answers.tobytes()
