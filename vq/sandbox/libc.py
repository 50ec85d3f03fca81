"""The C library's functions that Python has no module for.

Each raises `OSError` as Python's own do. Which functions there are depends on the system; a test
may put another library in the place of this one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

__all__ = ["Libc"]


class Libc:
    """The C library of this process, or another that is given."""

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL(None, use_errno=True) if library is None else library

    def has(self, name: str) -> bool:
        """Whether the library has a function of this name."""
        return hasattr(self._library, name)

    def call(self, name: str, *arguments: Any) -> int:
        """Calls a function whose result is -1 for an error; numbers go as C's `long`.

        Raises `OSError`, with ENOSYS where there is no such function.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise OSError(errno.ENOSYS, f"this system has no {name}")
        ctypes.set_errno(0)
        result = int(function(*(_as_long(argument) for argument in arguments)))
        if result == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        return result

    def system_call(self, number: int, *arguments: Any) -> int:
        """Makes the system call of this number. Raises `OSError`."""
        return self.call("syscall", number, *arguments)


def _as_long(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
