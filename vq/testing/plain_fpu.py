"""User-Mode Linux on a processor with AMX.

User-Mode Linux saves its processes' floating point registers with ptrace(2), as one block that the
host's kernel wants back whole. With AMX that block is 11 KiB, and Linux 6.1 as User-Mode Linux has
room for 2696 bytes: it gives back a part, gets EFAULT and panics with "ptrace set fp regs failed".
Where the block cannot be had at all it saves the older registers (FXSAVE), and that works as long
as no program in the guest uses the newer ones, which every page fault there destroys.

So this file does two things. As a script, ``python plain_fpu.py PROGRAM ARGUMENT...``, it starts
the program under a seccomp(2) filter that takes the block away: ptrace(PTRACE_GETREGSET, ...,
NT_X86_XSTATE) is EINVAL. And it tells the C library in the guest which registers to keep off.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

__all__ = ["with_plain_fpu"]

# What glibc's choice of string functions looks at (its manual, "Hardware Capability Tunables").
_UNUSABLE = ("AVX", "AVX2", "AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "XSAVE", "XSAVEC")

# uapi/linux/bpf_common.h: load a word of the data; jump if it equals; return.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
# struct seccomp_data (uapi/linux/seccomp.h): number, architecture, instruction pointer, arguments.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_AUDIT_ARCH_X86_64 = 0xC000003E
_PTRACE_OF_X86_64 = 101
_PTRACE_GETREGSET, _NT_X86_XSTATE = 0x4204, 0x202
_ALLOW, _EINVAL = 0x7FFF0000, 0x00050000 | 22
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2


def with_plain_fpu(linux: list[str]) -> list[str]:
    """The command that starts User-Mode Linux (its program and arguments) on this processor.

    More of the kernel's arguments may be added to its end.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return linux
    if "amx_tile" not in flags:
        return linux
    # A kernel hands an argument NAME=VALUE that it does not know to init's environment.
    hwcaps = ",".join(f"-{name}" for name in _UNUSABLE)
    return [
        sys.executable,
        "-I",
        "-S",
        __file__,
        *linux,
        f"GLIBC_TUNABLES=glibc.cpu.hwcaps={hwcaps}",
    ]


def _filter() -> bytes:
    conditions = [
        (_ARCHITECTURE, _AUDIT_ARCH_X86_64),
        (_NUMBER, _PTRACE_OF_X86_64),
        (_ARGUMENTS, _PTRACE_GETREGSET),
        (_ARGUMENTS + 2 * 8, _NT_X86_XSTATE),
    ]
    program = b""
    for number, (offset, value) in enumerate(conditions):
        # A condition that does not hold jumps to the last instruction.
        skip = 2 * (len(conditions) - number) - 1
        program += struct.pack("=HBBI", _LOAD, 0, 0, offset)
        program += struct.pack("=HBBI", _JUMP_EQUAL, 0, skip, value)
    program += struct.pack("=HBBI", _RETURN, 0, 0, _EINVAL)
    return program + struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW)


def _take_away() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    instructions = ctypes.create_string_buffer(program := _filter(), len(program))
    # struct sock_fprog: the number of instructions, and where they are.
    described = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    )
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(described), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp refused")


if __name__ == "__main__":
    _take_away()
    os.execvp(sys.argv[1], sys.argv[1:])
