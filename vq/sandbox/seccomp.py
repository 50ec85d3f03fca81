"""Programs for Linux's seccomp: which system calls a process may still make.

`compile_filter` turns a list of calls into the classic BPF that the kernel runs before each system
call. It is a chain: one comparison per call, in the order given. The kernel (5.11 and newer) asks
the program once which calls it always allows, and does not run it for those any more, so the order
only matters for calls with conditions.

By hand because there is no library for it that is kept well: the binding to libseccomp on PyPI
(pyseccomp) had its last release in January 2021. libseccomp is asked in the tests instead.

Nothing here makes a system call; `vq.sandbox.linux` installs the program.

Sources: seccomp(2), Linux' uapi/linux/seccomp.h, uapi/linux/bpf_common.h, uapi/linux/filter.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vq.errors import UsageError
from vq.system_calls import ARCHITECTURES

__all__ = [
    "INSTRUCTION",
    "SECCOMP_RET_ALLOW",
    "SECCOMP_RET_KILL_PROCESS",
    "Call",
    "HasBits",
    "Is",
    "LacksBits",
    "compile_filter",
]

SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_ALLOW = 0x7FFF0000

INSTRUCTION = struct.Struct("=HBBI")
"""`struct sock_filter`: code, instructions to skip when true, when false, operand."""
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_RETURN = 0x06  # BPF_RET | BPF_K
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_IF_BITS = 0x45  # BPF_JMP | BPF_JSET | BPF_K

# struct seccomp_data
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000
"""__X32_SYSCALL_BIT: x86_64's second table, which has the same audit architecture."""


class Is(NamedTuple):
    """A condition: the low 32 bits of the argument of this number are `value`."""

    argument: int
    value: int


class HasBits(NamedTuple):
    """A condition: one of these bits is set in the low half of the argument of this number."""

    argument: int
    bits: int


class LacksBits(NamedTuple):
    """A condition: none of these bits is set in the low half of the argument of this number."""

    argument: int
    bits: int


Condition = Is | HasBits | LacksBits


class Call(NamedTuple):
    """A system call that is allowed if all conditions hold. A second one is a second chance.

    Of an argument the low 32 bits are looked at, which is all that the kernel takes of one that is
    an `int`.
    """

    number: int
    conditions: tuple[Condition, ...] = ()


def compile_filter(
    machine: str,
    allowed: Sequence[Call],
    *,
    refused: Mapping[int, int] | None = None,
    otherwise: int = SECCOMP_RET_KILL_PROCESS,
) -> bytes:
    """The program for `machine`, an array of `struct sock_filter`.

    Calls in `refused` fail with the errno given there; all others that are not `allowed` meet
    `otherwise`. Calls by another processor's table kill the process. Raises `UsageError` for a
    machine that no table is known of, and for more than the kernel takes.
    """
    if machine not in ARCHITECTURES:
        raise UsageError(f"the system calls of {machine} have no numbers here")
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_IF_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS)]
    for call in allowed:
        program += _block(call)
    for number, error in (refused or {}).items():
        program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, SECCOMP_RET_ERRNO | error & 0xFFFF)]
    program.append((_RETURN, 0, 0, otherwise))
    if len(program) > MAX_INSTRUCTIONS:
        raise UsageError(f"a filter of {len(program)} instructions, the kernel takes 4096")
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in program)


_Instruction = tuple[int, int, int, int]


def _block(call: Call) -> list[_Instruction]:
    """Allows one call, and is passed through by all others with the number still loaded."""
    if not call.conditions:
        return [(_IF_EQUAL, 0, 1, call.number), (_RETURN, 0, 0, SECCOMP_RET_ALLOW)]
    tests: list[_Instruction] = []
    for place, condition in enumerate(call.conditions):
        # To the last instruction of the block: over the tests that follow, and the return.
        to_end = 2 * (len(call.conditions) - place - 1) + 1
        tests.append((_LOAD, 0, 0, _ARGUMENTS + 8 * condition.argument))
        match condition:
            case Is(_, value):
                tests.append((_IF_EQUAL, 0, to_end, value & 0xFFFFFFFF))
            case HasBits(_, bits):
                tests.append((_IF_BITS, 0, to_end, bits))
            case LacksBits(_, bits):
                tests.append((_IF_BITS, to_end, 0, bits))
    body = [*tests, (_RETURN, 0, 0, SECCOMP_RET_ALLOW), (_LOAD, 0, 0, _NUMBER)]
    return [(_IF_EQUAL, 0, len(body), call.number), *body]
