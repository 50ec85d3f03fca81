"""What a test needs of the machine that it runs on, and what happens where it is missing.

A test says what it needs with the `need_...` functions. Where that is missing the test is skipped
with the reason, and fails instead when the environment variable ``VQ_REQUIRE`` is 1, so that a test
that is meant to run in CI cannot be skipped there unnoticed.

The `check_...` functions and `find_program` know nothing of pytest: they raise
`MissingRequirement`. `or_skip` turns it into a skip or a failure.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from vq.errors import UsageError

__all__ = [
    "MissingRequirement",
    "check_contained",
    "check_namespaces",
    "check_root",
    "check_tap",
    "find_program",
    "need_linux",
    "need_namespaces",
    "need_program",
    "need_root",
    "need_tap",
    "or_skip",
    "unmet",
]

_ADMIN_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class MissingRequirement(UsageError):
    """This machine lacks something; the message says what, and how to get it where we know."""


# --- for tests -----------------------------------------------------------------------------------


def unmet(reason: str) -> NoReturn:
    """Skips the running test for `reason`, or fails it with ``VQ_REQUIRE=1``."""
    import pytest

    if os.environ.get("VQ_REQUIRE", "0") not in ("", "0"):
        pytest.fail(f"VQ_REQUIRE is set, but: {reason}", pytrace=False)
    pytest.skip(reason)


@contextmanager
def or_skip() -> Iterator[None]:
    """Inside of this, `MissingRequirement` is not an error of the test but `unmet`."""
    try:
        yield
    except MissingRequirement as missing:
        unmet(str(missing))


def need_program(name: str, *, package: str | None = None) -> str:
    """The path of a program; `package` is what one installs to have it, where the names differ."""
    with or_skip():
        return find_program(name, package=package)


def need_linux() -> None:
    """The test runs on Linux only."""
    if sys.platform != "linux":
        unmet("needs Linux")


def need_root() -> None:
    """The test runs as root only."""
    with or_skip():
        check_root()


def need_tap() -> None:
    """The test makes taps, with offloads."""
    with or_skip():
        check_tap()


def need_namespaces() -> None:
    """The test makes network namespaces with ip(8)."""
    with or_skip():
        check_namespaces()


# --- the checks themselves -----------------------------------------------------------------------


def find_program(name: str, *, package: str | None = None) -> str:
    """The path of a program; raises `MissingRequirement`.

    Looks where administrators' programs are too, which the PATH of an ordinary user leaves out.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_ADMIN_DIRECTORIES])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingRequirement(f"needs {name}: install the package {package or name}")
    return found


def check_root() -> None:
    """Raises `MissingRequirement` for an ordinary user."""
    if os.geteuid() != 0:
        raise MissingRequirement("needs root")


def check_tap() -> None:
    """Raises `MissingRequirement` unless this process can make a Linux tap with offloads."""
    check_root()
    reason = _why_no_tap()
    if reason is not None:
        raise MissingRequirement(reason)


def check_namespaces() -> None:
    """Raises `MissingRequirement` unless this process can make network namespaces."""
    check_root()
    find_program("ip", package="iproute2")
    reason = _trial("a network namespace", "unshare", "--net", "true")
    if reason is not None:
        raise MissingRequirement(reason)


def check_contained() -> None:
    """Raises `MissingRequirement` unless a process can have a PID namespace of its own."""
    find_program("unshare", package="util-linux")
    find_program("timeout", package="coreutils")
    user = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    reason = _trial("a PID namespace", "unshare", *user, "--pid", "--fork", "true")
    if reason is not None:
        raise MissingRequirement(reason)


@functools.cache
def _why_no_tap() -> str | None:
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            # TUNGETFEATURES, and IFF_VNET_HDR in what it gives (uapi/linux/if_tun.h).
            request = 0x400454CF if os.uname().machine.startswith(("mips", "ppc")) else 0x800454CF
            features = struct.unpack("=I", fcntl.ioctl(fd, request, bytes(4)))[0]
        finally:
            os.close(fd)
    except OSError as error:
        return f"needs a tap: {error}"
    return None if features & 0x4000 else "needs a tap with offloads (IFF_VNET_HDR)"


@functools.cache
def _trial(what: str, *command: str) -> str | None:
    """Whether `command` succeeds here: None, or why not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"needs {what}: {error}"
    return None if done.returncode == 0 else f"needs {what}: {done.stderr.strip()}"
