"""The programs of `vq.sandbox.seccomp`: against a second reading of them, and in the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vq import system_calls
from vq.errors import UsageError
from vq.sandbox.seccomp import (
    INSTRUCTION,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_PROCESS,
    Call,
    Condition,
    HasBits,
    Is,
    LacksBits,
    compile_filter,
)
from vq.system_calls import ARCHITECTURES, number_of
from vq.testing.requirements import need_linux, unmet

MACHINES = sorted(ARCHITECTURES)
X32 = 0x40000000


class Machine:
    """Runs classic BPF as bpf(4) describes it, on a `struct seccomp_data`."""

    def __init__(self, program: bytes) -> None:
        self.code = list(INSTRUCTION.iter_unpack(program))

    def run(self, number: int, arguments: tuple[int, ...], audit: int) -> int:
        padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
        data = struct.pack("<iIQ6Q", number, audit, 0, *padded)
        accumulator, at = 0, 0
        while True:
            code, if_true, if_false, operand = self.code[at]
            at += 1
            kind, how = code & 7, code & 0xF0
            if kind == 0:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, operand)
            elif kind == 5:  # BPF_JMP
                taken = {
                    0x10: accumulator == operand,
                    0x30: accumulator >= operand,
                    0x40: bool(accumulator & operand),
                }[how]
                at += if_true if taken else if_false
            else:  # BPF_RET
                assert kind == 6
                return int(operand)


def run(
    program: bytes, number: int, *arguments: int, machine: str = "x86_64", audit: int | None = None
) -> int:
    audit = ARCHITECTURES[machine] if audit is None else audit
    return Machine(program).run(number, arguments, audit)


# --- what a program decides ----------------------------------------------------------------------

words = st.integers(0, 0xFFFFFFFF)
conditions = st.one_of(
    st.builds(Is, st.integers(0, 5), words),
    st.builds(HasBits, st.integers(0, 5), words),
    st.builds(LacksBits, st.integers(0, 5), words),
)
calls = st.builds(Call, st.integers(0, 20), st.lists(conditions, max_size=4).map(tuple))


def holds(condition: Condition, arguments: tuple[int, ...]) -> bool:
    low = arguments[condition.argument] & 0xFFFFFFFF
    match condition:
        case Is(_, value):
            return low == value
        case HasBits(_, bits):
            return bool(low & bits)
        case LacksBits(_, bits):
            return not low & bits


@given(
    st.lists(calls, max_size=12),
    st.sets(st.integers(0, 20), max_size=4),
    st.integers(0, 20),
    st.tuples(*[st.one_of(words, st.integers(0, (1 << 64) - 1)) for _ in range(6)]),
    st.sampled_from(MACHINES),
)
def test_a_call_is_allowed_when_one_of_its_lines_holds(
    allowed: list[Call], refused: set[int], number: int, arguments: tuple[int, ...], machine: str
) -> None:
    program = compile_filter(machine, allowed, refused=dict.fromkeys(refused, errno.EACCES))
    lines = [call.conditions for call in allowed if call.number == number]
    if any(all(holds(condition, arguments) for condition in line) for line in lines):
        expected = SECCOMP_RET_ALLOW
    elif number in refused:
        expected = SECCOMP_RET_ERRNO | errno.EACCES
    else:
        expected = SECCOMP_RET_KILL_PROCESS
    assert run(program, number, *arguments, machine=machine) == expected


@given(conditions, st.data())
def test_a_value_that_just_holds_is_told_from_one_that_does_not(
    condition: Condition, data: st.DataObject
) -> None:
    """Random arguments seldom meet a condition: these are one bit away from it."""
    wanted = condition.value if isinstance(condition, Is) else condition.bits
    low = wanted ^ (1 << data.draw(st.integers(0, 31))) * data.draw(st.integers(0, 1))
    arguments = [0] * 6
    arguments[condition.argument] = low | data.draw(words) << 32
    program = compile_filter("aarch64", [Call(1, (condition,))])
    allowed = run(program, 1, *arguments, machine="aarch64") == SECCOMP_RET_ALLOW
    assert allowed == holds(condition, tuple(arguments))


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_by_another_processors_table_kill(machine: str) -> None:
    program = compile_filter(machine, [Call(3)])
    for other in {0, 0x40000003, *ARCHITECTURES.values()}:
        answer = run(program, 3, audit=other)
        ours = other == ARCHITECTURES[machine]
        assert answer == (SECCOMP_RET_ALLOW if ours else SECCOMP_RET_KILL_PROCESS)


def test_the_second_table_of_x86_64_kills() -> None:
    program = compile_filter("x86_64", [Call(3), Call(3 | X32)], refused={4 | X32: 1})
    assert run(program, 3 | X32) == run(program, 4 | X32) == SECCOMP_RET_KILL_PROCESS


def test_the_programs_bytes() -> None:
    program = compile_filter(
        "aarch64", [Call(64), Call(29, (Is(1, 0x5421),))], refused={56: errno.EACCES}
    )
    assert list(INSTRUCTION.iter_unpack(program)) == [
        (0x20, 0, 0, 4),  # the table
        (0x15, 1, 0, 0xC00000B7),
        (0x06, 0, 0, 0x80000000),
        (0x20, 0, 0, 0),  # the number
        (0x15, 0, 1, 64),
        (0x06, 0, 0, 0x7FFF0000),
        (0x15, 0, 4, 29),
        (0x20, 0, 0, 24),  # the low half of the second argument
        (0x15, 0, 1, 0x5421),
        (0x06, 0, 0, 0x7FFF0000),
        (0x20, 0, 0, 0),
        (0x15, 0, 1, 56),
        (0x06, 0, 0, 0x0005000D),
        (0x06, 0, 0, 0x80000000),
    ]


def test_what_no_kernel_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="the system calls of sparc64 have no numbers here"):
        compile_filter("sparc64", [])
    with pytest.raises(UsageError, match="the kernel takes 4096"):
        compile_filter("x86_64", [Call(number) for number in range(2100)])


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_libseccomp(machine: str) -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        unmet("needs libseccomp (package libseccomp2)")
    resolve = library.seccomp_syscall_resolve_name_arch
    resolve.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    audit = ARCHITECTURES[machine]
    known = 0
    for name in system_calls.names():
        theirs = resolve(audit, name.encode())
        if theirs == -1:
            continue  # newer than the library
        known += 1
        # Other numbers below 0 stand for calls that the processor does not have.
        assert number_of(name, machine) == (theirs if theirs >= 0 else None), name
    assert known > 350


# --- in the kernel -------------------------------------------------------------------------------


def in_child(work: Callable[[], int], *allowed: Call, refused: tuple[str, ...] = ()) -> int:
    """How a child ends that does `work` under a filter: an exit status, or minus a signal."""
    need_linux()
    machine = platform.machine()
    basics = ("exit_group", "write", "munmap", "rt_sigaction", "brk", "futex")
    program = compile_filter(
        machine,
        [*(Call(number_of(name, machine) or 0) for name in basics), *allowed],
        refused={number_of(name, machine) or 0: errno.EACCES for name in refused},
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=H6xQ", len(program) // INSTRUCTION.size, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        status = 99
        with suppress(BaseException):
            if libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0:
                status = work()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def failed_with(number: int, work: Callable[[], object]) -> int:
    """0 when the work fails with this errno."""
    try:
        work()
    except OSError as error:
        return 0 if error.errno == number else 1
    return 2


def call(name: str, *conditions: Condition) -> Call:
    return Call(number_of(name, platform.machine()) or 0, conditions)


def test_the_kernel_allows_what_is_listed() -> None:
    assert in_child(lambda: 7) == 7
    assert in_child(lambda: os.getpid() * 0, call("getpid")) == 0


def test_the_kernel_kills_for_what_is_not_listed() -> None:
    assert in_child(lambda: bool(socket.socket()) * 0) == -signal.SIGSYS


def test_the_kernel_refuses_what_is_to_be_refused() -> None:
    def work() -> int:
        return failed_with(errno.EACCES, lambda: os.open("/", os.O_RDONLY))

    assert in_child(work, refused=("openat",)) == 0


def test_the_kernel_looks_at_arguments() -> None:
    unix = call("socket", Is(0, socket.AF_UNIX))
    fine = (call("close"), call("fcntl"), call("getsockname"))

    def make(family: int) -> int:
        socket.socket(family, socket.SOCK_DGRAM).close()
        return 0

    assert in_child(lambda: make(socket.AF_UNIX), unix, *fine) == 0
    assert in_child(lambda: make(socket.AF_INET), unix, *fine) == -signal.SIGSYS
    data_only = call("mmap", LacksBits(2, mmap.PROT_EXEC))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)

    def map_page(protection: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return int(libc.mmap(None, 4096, protection, flags, -1, 0) == ctypes.c_void_p(-1).value)

    assert in_child(lambda: map_page(mmap.PROT_READ), data_only) == 0
    assert in_child(lambda: map_page(mmap.PROT_EXEC), data_only) == -signal.SIGSYS
