"""The systems' real headers as oracle for the numbers in `vq.platforms`.

The package ``ziglang`` (the optional extra ``abi``) is a C compiler that carries the headers of
Linux, OpenBSD and FreeBSD for many processors. A probe is a C file with one array: a marker, then
for each name a byte that says whether the headers have it, then its number in eight bytes, least
significant first. The array is a constant of characters, so the compiled object holds it as it
stands whatever the processor's byte order and word size, and finding the marker is all the reading
of object files there is.

Nothing is linked or run, and nothing but temporary files is written.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vq.errors import VqError
from vq.platforms import KNOWN, Platform, numbers

__all__ = ["INSTALL", "Comparison", "ProbeError", "available", "compare", "read_headers"]

INSTALL = "pip install 'vq[abi]'"
"""The command that brings the headers."""

_WORKERS = 2
_TIMEOUT = 120.0
"""Seconds for one compilation. It takes a fraction of one, and more on a busy or cold machine."""


class ProbeError(VqError):
    """The headers of a platform could not be compiled; the message has the compiler's words."""


class Comparison(NamedTuple):
    """One platform's numbers, computed by vq and read from the headers."""

    platform: str
    headers: dict[str, int]
    """What the headers say, by name; a name that they do not have is not there."""
    mismatches: dict[str, tuple[int, int]]
    """The name, then vq's number and the headers' number where they differ."""
    missing: tuple[str, ...]
    """Names that these headers do not have: misspelt, or newer than they are."""
    error: str = ""
    """Why there is no comparison, where the headers could not be compiled."""


def available() -> bool:
    """Whether the compiler and its headers are installed."""
    return importlib.util.find_spec("ziglang") is not None


def compare(
    platforms: Iterable[Platform] = KNOWN,
    *,
    ours: Callable[[Platform], Mapping[str, int]] = numbers,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Comparison]:
    """Compare `ours` with the headers, platform by platform, two compilations at a time.

    `progress` is called with each platform's name once it is done.
    """

    def one(platform: Platform) -> Comparison:
        result = _compare(platform, ours(platform))
        progress(platform.name)
        return result

    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(one, platforms))


def _compare(platform: Platform, ours: Mapping[str, int]) -> Comparison:
    try:
        headers = read_headers(platform, ours)
    except ProbeError as error:
        return Comparison(platform.name, {}, {}, (), str(error))
    differing = {
        name: (ours[name], number) for name, number in headers.items() if ours[name] != number
    }
    newest = max((number for name, number in headers.items() if _is_call(name)), default=0)
    missing = tuple(
        name
        for name, number in ours.items()
        if name not in headers and not (_is_call(name) and number > newest)
    )
    return Comparison(platform.name, headers, differing, missing)


def _is_call(name: str) -> bool:
    """Whether it is a system call: there are always some that are newer than the headers."""
    return name.startswith("__NR_")


def read_headers(platform: Platform, names: Iterable[str]) -> dict[str, int]:
    """The numbers of `names` in the headers of `platform`, without those that they do not have.

    A name is a macro, ``sizeof(structure)`` or ``offsetof(structure, field)``. Raises `ProbeError`
    when the compiler refuses.
    """
    wanted = list(names)
    with tempfile.TemporaryDirectory(prefix="vq-abi-") as directory:
        source, compiled = Path(directory, "probe.c"), Path(directory, "probe.o")
        source.write_text(_source(platform, wanted), encoding="ascii")
        _compile(platform, source, compiled)
        found = _table(compiled.read_bytes(), len(wanted))
    return {name: number for name, number in zip(wanted, found, strict=True) if number is not None}


def _compile(platform: Platform, source: Path, compiled: Path) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", _target(platform), "-w"]
    command += ["-c", str(source), "-o", str(compiled)]
    cache = str(source.parent / "cache")
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache},
            cwd=source.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeError(f"{platform.name}: the compiler did not run: {error}") from error
    if done.returncode != 0 or not compiled.exists():
        lines = done.stderr.decode(errors="replace").splitlines()
        complaint = next((line for line in lines if "error:" in line), "no reason given")
        raise ProbeError(
            f"{platform.name}: the headers did not compile: "
            + complaint.removeprefix(str(source.parent) + "/")
        )


def _target(platform: Platform) -> str:
    """The compiler's name for the platform. On Linux any C library will do: the kernel's headers
    are the same."""
    libraries = {"linux-mips": "-musleabi", "linux": "-musl"}
    suffix = libraries.get(platform.name, libraries.get(platform.system, ""))
    return platform.processor + "-" + platform.system + suffix


_HEADERS = {
    "linux": (
        "sys/socket.h",
        "linux/if.h",
        "linux/if_tun.h",
        "linux/sockios.h",
        "linux/falloc.h",
        "linux/virtio_blk.h",
        "linux/virtio_config.h",
        "linux/virtio_console.h",
        "linux/virtio_ids.h",
        "linux/virtio_mmio.h",
        "linux/virtio_net.h",
        "linux/virtio_pci.h",
        "linux/virtio_ring.h",
        "linux/virtio_vsock.h",
        "linux/vhost_types.h",
        "linux/audit.h",
        "linux/capability.h",
        "linux/ethtool.h",
        "linux/eventfd.h",
        "linux/fcntl.h",
        "linux/landlock.h",
        "linux/memfd.h",
        "linux/netlink.h",
        "linux/pci_regs.h",
        "linux/prctl.h",
        "linux/rtnetlink.h",
        "linux/sched.h",
        "linux/seccomp.h",
        "asm/ioctls.h",
        "asm/unistd.h",
        "limits.h",
    ),
    "openbsd": (
        "sys/types.h",
        "sys/socket.h",
        "sys/ioctl.h",
        "sys/sockio.h",
        "net/if.h",
        "net/if_tun.h",
        "fcntl.h",
        "limits.h",
    ),
    "freebsd": (
        "sys/types.h",
        "sys/socket.h",
        "sys/ioctl.h",
        "sys/sockio.h",
        "sys/mman.h",
        "sys/capsicum.h",
        "sys/eventfd.h",
        "net/if.h",
        "net/if_tap.h",
        "fcntl.h",
        "limits.h",
    ),
}

_MARKER = b"\x7fvq-abi-probe\x00\xfe\x01"
_ENTRY = 9

_PROLOGUE = r"""
#define VQ_BYTE(n, i) (unsigned char)((unsigned long long)(n) >> (8 * (i)))
#define VQ_NUMBER(n) \
    VQ_BYTE(n, 0), VQ_BYTE(n, 1), VQ_BYTE(n, 2), VQ_BYTE(n, 3), \
    VQ_BYTE(n, 4), VQ_BYTE(n, 5), VQ_BYTE(n, 6), VQ_BYTE(n, 7)
const unsigned char vq_probe[] = {
"""


def _source(platform: Platform, names: Iterable[str]) -> str:
    """The probe in C."""
    includes = ("stddef.h", *_HEADERS[platform.system])
    return (
        "".join(f"#include <{header}>\n" for header in includes)
        + _PROLOGUE
        + ", ".join(str(byte) for byte in _MARKER)
        + ",\n"
        + "".join(_entry(name) for name in names)
        + "};\n"
    )


def _entry(name: str) -> str:
    kind, _, argument = name.partition("(")
    if argument:
        return f"1, VQ_NUMBER({kind}(struct {argument}),\n"
    return f"#ifdef {name}\n1, VQ_NUMBER({name}),\n#else\n0, VQ_NUMBER(0),\n#endif\n"


def _table(compiled: bytes, count: int) -> list[int | None]:
    """The numbers in a compiled probe, in order; None for what the headers did not have."""
    start = compiled.find(_MARKER) + len(_MARKER)
    table = compiled[start : start + _ENTRY * count]
    if start < len(_MARKER) or len(table) != _ENTRY * count:
        raise ProbeError("the compiler's output does not hold the probe's table")
    entries = (table[at : at + _ENTRY] for at in range(0, len(table), _ENTRY))
    return [int.from_bytes(entry[1:], "little") if entry[0] else None for entry in entries]
