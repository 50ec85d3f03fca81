"""The numbers of ioctl requests, computed as each kernel's headers do.

An ioctl's number tells which way its argument goes, how large it is, and which request it is. Linux
packs these differently on some processors, so a number copied from one machine may be wrong on
another: here they are computed, for this machine or any other. Which requests exist stands with
their users.
"""

from __future__ import annotations

import enum
import platform

from vq.errors import UsageError

__all__ = ["Direction", "bsd", "linux"]


class Direction(enum.IntFlag):
    """Which way an ioctl's argument goes, as the headers' macros name it."""

    NONE = 0
    """No argument, or one that is not copied (``_IO``)."""
    WRITE = 1
    """From the program to the kernel (``_IOW``)."""
    READ = 2
    """From the kernel to the program (``_IOR``)."""
    READ_WRITE = 3
    """Both (``_IOWR``)."""


def linux(
    direction: Direction,
    group: str | int,
    number: int,
    size: int,
    machine: str = platform.machine(),
) -> int:
    """The number of a Linux ioctl on `machine`, named as `platform.machine` names processors.

    `group` is the header's "type", a letter or a byte; `size` is that of the argument in bytes.
    From the low end: 8 bits number, 8 bits group, then size and direction, whose widths and values
    depend on the processor (Linux, asm-generic/ioctl.h and asm/ioctl.h).
    """
    size_bits, none, write, read = 14, 0, 1, 2
    if machine.startswith(("mips", "ppc", "powerpc", "sparc", "alpha")):
        size_bits, none, write, read = 13, 1, 4, 2
    elif machine.startswith(("parisc", "hppa")):
        write, read = 2, 1
    _check(number, size, (1 << size_bits) - 1)
    way = (write if direction & Direction.WRITE else 0) | (
        read if direction & Direction.READ else 0
    )
    return (way or none) << 16 + size_bits | size << 16 | _byte(group) << 8 | number


def bsd(direction: Direction, group: str | int, number: int, size: int) -> int:
    """The number of an OpenBSD, FreeBSD or NetBSD ioctl, the same on every processor.

    From the low end: 8 bits number, 8 bits group, 13 bits size, 3 bits direction
    (sys/ioccom.h). A size of the argument in bytes goes with a direction, 0 with none.
    """
    _check(number, size, 0x1FFF)
    way = {
        Direction.NONE: 0x20000000,
        Direction.WRITE: 0x80000000,
        Direction.READ: 0x40000000,
        Direction.READ_WRITE: 0xC0000000,
    }[direction]
    return way | size << 16 | _byte(group) << 8 | number


def _byte(group: str | int) -> int:
    value = ord(group) if isinstance(group, str) else group
    if not 0 <= value <= 0xFF:
        raise UsageError(f"an ioctl's group is one byte, not {group!r}")
    return value


def _check(number: int, size: int, largest: int) -> None:
    if not 0 <= number <= 0xFF:
        raise UsageError(f"an ioctl's number is one byte, not {number}")
    if not 0 <= size <= largest:
        raise UsageError(f"an ioctl's argument has at most {largest} bytes, not {size}")
