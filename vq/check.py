"""`vq check`: what this host has for vq, and whether vq's numbers are this host's and the others'.

Every finding is green (it works), yellow (vq works without it, with less) or red (vq needs it), and
says what to do about it. A person gets lines, a machine one JSON object.

A facility is tried, not concluded from the system's name: memory is mapped twice, a descriptor is
really sent. Only taps differ by system, and what there is to try stands in their own modules.
Numbers are those of `vq.platforms`; comparing them to the real headers is `vq.abi_probe`'s work.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import os
import platform as python_platform
import re
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

from vq import abi_probe, memory, platforms, sandbox
from vq.errors import UsageError
from vq.link import Link
from vq.offload import ALL, Offload
from vq.tap import open_tap

__all__ = ["Finding", "Level", "add_arguments", "capabilities", "findings", "host", "run"]


class Level(enum.StrEnum):
    """How good a finding is."""

    GREEN = "green"
    """It works."""
    YELLOW = "yellow"
    """vq works without it, but slower, or not with everything."""
    RED = "red"
    """vq needs it."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    """What was found, in a few words."""
    advice: str = ""
    """What to do about it, where there is something to do."""
    value: Any = None
    """The same for a machine; None when it says nothing that `level` does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq check`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument(
        "--abi",
        action="store_true",
        help=f"compare vq's numbers with the systems' headers (needs {abi_probe.INSTALL})",
    )


def run(args: argparse.Namespace) -> int:
    """Look at this host and print what was found.

    Returns 0 when vq has what it needs here, 1 when it has not or a number is wrong, and 2 when
    `--abi` was asked for and the headers are not installed.
    """
    if args.abi and not abi_probe.available():
        print(
            "vq check: --abi reads the systems' headers from the package ziglang, which is not "
            f"installed; get it with: {abi_probe.INSTALL}",
            file=sys.stderr,
        )
        return 2
    found = findings()
    report: dict[str, Any] = {"host": host(), "capabilities": capabilities(found)}
    if args.abi:
        comparisons = _compare_with_headers()
        found += [_about(comparison) for comparison in comparisons]
        report |= _abi_report(comparisons)
    else:
        report["abi"] = platforms.all_numbers()
    if args.json:
        report["findings"] = [
            {"name": one.name, "level": one.level, "found": one.found, "advice": one.advice}
            for one in found
        ]
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report, found, sys.stdout)
    return 1 if any(one.level is Level.RED for one in found) else 0


def host() -> dict[str, Any]:
    """This host, for a machine: the system, the processor, Python."""
    machine = os.uname()
    here = platforms.host()
    return {
        "platform": here.name,
        "system": machine.sysname,
        "kernel": machine.release,
        "machine": machine.machine,
        "byteorder": here.byteorder,
        "pointer_size": here.pointer,
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "processors": os.cpu_count(),
        "python": python_platform.python_version(),
        "implementation": python_platform.python_implementation(),
    }


def findings() -> list[Finding]:
    """Everything about this host that was tried. Takes a part of a second and leaves nothing."""
    return [one for probe in _PROBES for one in _tried(probe)]


def capabilities(found: Iterable[Finding]) -> dict[str, Any]:
    """The same for a machine: name to what was found, or to whether it works."""
    return {
        one.name: (one.level is Level.GREEN if one.value is None else one.value) for one in found
    }


# --- the host ------------------------------------------------------------------------------------

_OLDEST_PYTHON = (3, 11)


def _python() -> Iterator[Finding]:
    text = f"{python_platform.python_implementation()} {python_platform.python_version()}"
    if sys.version_info >= _OLDEST_PYTHON:
        yield Finding("python", Level.GREEN, text)
    else:
        wanted = ".".join(map(str, _OLDEST_PYTHON))
        yield Finding("python", Level.RED, text, f"install Python {wanted} or newer")


def _system() -> Iterator[Finding]:
    here, machine = platforms.host(), os.uname()
    text = (
        f"{machine.sysname} {machine.release}, {machine.machine}, {here.byteorder}-endian, "
        f"pages of {os.sysconf('SC_PAGE_SIZE')} bytes"
    )
    if platforms.numbers(here):
        yield Finding("system", Level.GREEN, text)
    else:
        advice = "no tap is known for this system; use stream sockets and the loopback"
        yield Finding("system", Level.YELLOW, text, advice)


def _privileges() -> Iterator[Finding]:
    uid, net_admin = os.geteuid(), _net_admin()
    value = {"uid": uid, "root": uid == 0, "net_admin": net_admin}
    if net_admin:
        yield Finding("privileges", Level.GREEN, f"uid {uid}, may create interfaces", value=value)
    else:
        advice = (
            "taps that belong to this user, the loopback and stream sockets (passt) need no "
            "privileges; for new taps run as root"
        )
        text = f"uid {uid}, may not create interfaces"
        yield Finding("privileges", Level.YELLOW, text, advice, value)


def _net_admin() -> bool:
    """Whether this process may create network interfaces."""
    bit = platforms.numbers(platforms.host()).get("CAP_NET_ADMIN")
    if bit is not None:
        status = _lines("/proc/self/status")
        if "CapEff" in status:
            return bool(int(status["CapEff"], 16) >> bit & 1)
    return os.geteuid() == 0


# --- memory --------------------------------------------------------------------------------------


def _shared_memory() -> Iterator[Finding]:
    """Guest memory as two processes have it: one file, mapped twice."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        one = memory.Region.anonymous(0, 2 * page, name="vq-check")
        try:
            other = memory.Region.from_fd(os.dup(one.fd), 0, page, offset=page)
            one.view[page : page + 4] = b"here"
            memory.fence()
            seen = bytes(other.view[:4])
            other.close()
        finally:
            one.close()
    except OSError as error:
        advice = f"guest memory needs memfd_create(2), or room in {_temporary_directory()}"
        yield Finding("shared_memory", Level.RED, f"cannot be mapped: {error}", advice)
        return
    if seen == b"here":
        yield Finding("shared_memory", Level.GREEN, "a write through one mapping shows in another")
    else:
        advice = "vq cannot serve guests on this system"
        yield Finding("shared_memory", Level.RED, "two mappings of a file differ", advice)


def _memfd() -> Iterator[Finding]:
    try:
        os.close(getattr(os, "memfd_create", _absent)("vq-check"))
    except OSError as error:
        text = f"{error.strerror}; unlinked files in {_temporary_directory()} stand in"
        advice = "put TMPDIR on a file system in memory, so that no disk is written to"
        yield Finding("memfd", Level.YELLOW, text, advice, value=False)
    else:
        yield Finding("memfd", Level.GREEN, "guest memory without a file system", value=True)


def _huge_pages() -> Iterator[Finding]:
    info = _lines("/proc/meminfo")
    if "Hugepagesize" not in info:
        yield Finding("huge_pages", Level.GREEN, "left to the system", value={"size": None})
        return
    size = int(info["Hugepagesize"].split()[0]) * 1024
    total, free = int(info.get("HugePages_Total", "0")), int(info.get("HugePages_Free", "0"))
    value = {"size": size, "total": total, "free": free}
    text = f"{free} of {total} free, {size >> 10} KiB each"
    if free:
        yield Finding("huge_pages", Level.GREEN, text, value=value)
    else:
        advice = "only for speed: reserve some with sysctl vm.nr_hugepages=256"
        yield Finding("huge_pages", Level.YELLOW, text, advice, value)


def _temporary_directory() -> str:
    return os.environ.get("TMPDIR", "/tmp")


# --- vhost-user ----------------------------------------------------------------------------------


def _eventfd() -> Iterator[Finding]:
    try:
        counter = getattr(os, "eventfd", _absent)(0)
    except OSError as error:
        # What a peer sends may be a pipe as well: a kick is a byte or eight that can be read.
        text = f"{error.strerror}; pipes stand in"
        yield Finding("eventfd", Level.GREEN, text, value=False)
        return
    try:
        os.write(counter, (1).to_bytes(8, sys.byteorder))
        count = int.from_bytes(os.read(counter, 8), sys.byteorder)
    finally:
        os.close(counter)
    if count == 1:
        yield Finding("eventfd", Level.GREEN, "kicks and calls", value=True)
    else:
        yield Finding("eventfd", Level.RED, f"counts {count} for 1", value=False)


_VHOST_USER_FDS = 8
"""As many as a vhost-user message may carry: one for each memory region."""


def _fd_passing() -> Iterator[Finding]:
    """Descriptors over a Unix socket, used by the one who got them."""
    try:
        works = _pass_descriptors(_VHOST_USER_FDS)
        text = "not what was sent arrives"
    except OSError as error:
        works, text = False, str(error)
    if works:
        text = f"{_VHOST_USER_FDS} descriptors in one message of a Unix socket"
        yield Finding("fd_passing", Level.GREEN, text)
    else:
        advice = "vhost-user needs it: look for a sandbox or container that forbids Unix sockets"
        yield Finding("fd_passing", Level.RED, text, advice)


def _pass_descriptors(count: int) -> bool:
    """Whether `count` descriptors of a pipe go through a Unix socket, and the last one works."""
    readable, writable = os.pipe()
    passed: list[int] = []
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            theirs.settimeout(1.0)
            socket.send_fds(ours, [b"x"], [writable] * count)
            _, passed, _, _ = socket.recv_fds(theirs, 1, count)
        if len(passed) != count:
            return False
        os.write(passed[-1], b"kick")
        return os.read(readable, 4) == b"kick"
    finally:
        for fd in (readable, writable, *passed):
            os.close(fd)


# --- taps ----------------------------------------------------------------------------------------

_NEW_TAPS = {"linux": ("vqcheck%d",)}
"""What to call a tap of one's own where the kernel takes any name. Elsewhere they are numbered."""


def _tap() -> Iterator[Finding]:
    """A tap that is opened, asked, and closed again."""
    existing = {name for _, name in socket.if_nameindex()}
    names = _NEW_TAPS.get(platforms.host().system) or [
        name for name in (f"tap{number}" for number in range(8)) if name not in existing
    ]
    try:
        name, link = _open_first(names)
    except (OSError, UsageError) as error:
        text = getattr(error, "strerror", None) or str(error)
        advice = (
            "the loopback and stream sockets (passt) work without: for a tap run as root, or have "
            "one made for this user"
        )
        yield Finding("tap", Level.YELLOW, text, advice, value=False)
        return
    with contextlib.closing(link):
        yield Finding("tap", Level.GREEN, f"{link.name} was made and asked", value=True)
        yield _offloads(link)
    yield _queues(name)


def _open_first(names: Iterable[str]) -> tuple[str, Link]:
    """The first tap that can be opened; the first one's error when none can."""
    refused: OSError | None = None
    for name in names:
        try:
            return name, open_tap(name)
        except OSError as error:
            refused = refused or error
    raise refused or UsageError("all numbered taps exist already: none was tried")


def _offloads(link: Link) -> Finding:
    """Which offloads the tap has, each way."""
    link.request_offloads(ALL)
    value = {
        str(offload.name): {
            "to_guest": offload in link.delivers,
            "from_guest": offload in link.accepts,
        }
        for offload in Offload
    }
    lacking = [name for name, ways in value.items() if not all(ways.values())]
    text = " ".join(name for name in value if name not in lacking) or "none both ways"
    if not lacking:
        return Finding("tap_offloads", Level.GREEN, text, value=value)
    advice = f"done in software, which costs time: {', '.join(lacking)}"
    return Finding("tap_offloads", Level.YELLOW, text, advice, value)


def _queues(name: str) -> Finding:
    try:
        open_tap(name, queues=2).close()
    except (OSError, UsageError) as error:
        text = f"one queue: {getattr(error, 'strerror', None) or error}"
        advice = "guests with several processors share one queue"
        return Finding("tap_queues", Level.YELLOW, text, advice, value=False)
    return Finding("tap_queues", Level.GREEN, "several queues", value=True)


# --- confinement and programs --------------------------------------------------------------------


def _sandbox() -> Iterator[Finding]:
    """What `vq serve` can take from the process that serves guests."""
    value = sandbox.facilities()
    have = [f"{name} {has}" if has is not True else name for name, has in value.items() if has]
    missing = [name for name, has in value.items() if not has]
    text = ", ".join(have) or "nothing that confines a process"
    if value and not missing:
        yield Finding("sandbox", Level.GREEN, text, value=value)
        return
    advice = "run vq as a user of its own, in a container or a jail"
    if have:
        advice = f"a guest's faults would meet one wall less: there is no {', '.join(missing)}"
    yield Finding("sandbox", Level.YELLOW, text, advice, value)


def _programs() -> Iterator[Finding]:
    names = ("linux.uml", f"qemu-system-{platforms.host().processor}", "passt")
    value = {name: shutil.which(name) for name in names}
    missing = [name for name, path in value.items() if path is None]
    have = ", ".join(name for name in names if value[name]) or "none"
    if not missing:
        yield Finding("programs", Level.GREEN, have, value=value)
    else:
        advice = f"only for real guests and for networking without privileges: {', '.join(missing)}"
        yield Finding("programs", Level.YELLOW, have, advice, value)


_Probe: TypeAlias = Callable[[], Iterable[Finding]]
_PROBES: tuple[_Probe, ...] = (
    _python,
    _system,
    _privileges,
    _shared_memory,
    _memfd,
    _huge_pages,
    _eventfd,
    _fd_passing,
    _tap,
    _sandbox,
    _programs,
)


def _tried(probe: _Probe) -> list[Finding]:
    """What a probe found. On an odd host any system call may be forbidden: that is told too."""
    try:
        return list(probe())
    except OSError as error:
        name = probe.__name__.removeprefix("_")
        return [Finding(name, Level.YELLOW, f"could not be tried: {error}", value=False)]


def _absent(*_: object) -> int:
    """Stands in for a function that this Python has not."""
    raise OSError(0, "not on this system")


def _lines(path: str) -> dict[str, str]:
    """The ``name: value`` lines of a file in /proc; none where there is no such file."""
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


# --- numbers -------------------------------------------------------------------------------------


def _compare_with_headers() -> list[abi_probe.Comparison]:
    total, started, done = len(platforms.KNOWN), time.monotonic(), 0
    shown = False

    def progress(name: str) -> None:
        nonlocal done, shown
        done += 1
        if sys.stderr.isatty() and time.monotonic() - started > 1:
            shown = True
            print(f"\r\033[Kreading headers: {done} of {total}", end="", file=sys.stderr)

    comparisons = abi_probe.compare(progress=progress)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return comparisons


def _about(comparison: abi_probe.Comparison) -> Finding:
    name = f"abi {comparison.platform}"
    if comparison.error:
        advice = f"get newer headers: {abi_probe.INSTALL} --upgrade"
        return Finding(name, Level.RED, comparison.error, advice)
    if comparison.mismatches:
        text = ", ".join(
            f"{entry} is {headers:#x} in the headers and {ours:#x} in vq"
            for entry, (ours, headers) in comparison.mismatches.items()
        )
        return Finding(name, Level.RED, text, "report it: vq is wrong about this system")
    agree = f"{len(comparison.headers)} numbers agree with the headers"
    if comparison.missing:
        text = f"{agree}, which do not have {', '.join(comparison.missing)}"
        advice = f"get newer headers: {abi_probe.INSTALL} --upgrade"
        return Finding(name, Level.YELLOW, text, advice)
    return Finding(name, Level.GREEN, agree)


def _abi_report(comparisons: Iterable[abi_probe.Comparison]) -> dict[str, Any]:
    """`abi` is what the headers say; what differs from it or is not in it is listed beside it."""
    return {
        "abi": {one.platform: one.headers for one in comparisons},
        "mismatches": [
            {"platform": one.platform, "name": name, "vq": ours, "headers": headers}
            for one in comparisons
            for name, (ours, headers) in one.mismatches.items()
        ],
        "missing": {one.platform: one.missing for one in comparisons if one.missing},
        "errors": {one.platform: one.error for one in comparisons if one.error},
    }


# --- for people ----------------------------------------------------------------------------------

_WORDS = {Level.GREEN: ("ok", 32), Level.YELLOW: ("warn", 33), Level.RED: ("FAIL", 31)}
"""A level's word and its colour (ECMA-48, SGR)."""

_MARGIN = 30
"""Where the text of a line begins, in columns."""

_SHOWN = re.compile(r"(TUN[SGD]|TAP[SG])[A-Z]+$|SIOC|FIO|sizeof")


def _print(report: Mapping[str, Any], found: Iterable[Finding], out: TextIO) -> None:
    colour = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size((100, 24)).columns if out.isatty() else 100
    _print_numbers(report["abi"], width, out)
    counts = dict.fromkeys(Level, 0)
    for one in found:
        counts[one.level] += 1
        word, number = _WORDS[one.level]
        label = f"{word:4}"
        if colour:
            label = f"\033[{number}m{label}\033[0m"
        text = [one.found]
        if one.advice and one.level is not Level.GREEN:
            text.append(f"-> {one.advice}")
        lines = [
            line
            for part in text
            for line in textwrap.wrap(part, max(20, width - _MARGIN), break_on_hyphens=False)
        ]
        out.write(f"{label}  {one.name:{_MARGIN - 6}}{lines[0]}\n")
        out.writelines(f"{'':{_MARGIN}}{line}\n" for line in lines[1:])
    out.write(
        f"\n{report['host']['platform']}: {counts[Level.GREEN]} ok, {counts[Level.YELLOW]} to "
        f"improve, {counts[Level.RED]} missing that vq needs\n"
    )


def _print_numbers(abi: Mapping[str, Mapping[str, int]], width: int, out: TextIO) -> None:
    """Sizes and ioctl numbers. Platforms with the same ones are said together, and of others of the
    same system only what differs from the first."""
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, numbers in abi.items():
        shown = tuple((entry, number) for entry, number in numbers.items() if _SHOWN.match(entry))
        groups.setdefault(shown, []).append(name)
    first: dict[str, tuple[str, set[tuple[str, int]]]] = {}
    for entries, names in groups.items():
        system = names[0].partition("-")[0]
        model, said = first.setdefault(system, (names[0], set()))
        differs = f" (where not as {model})" if said else ""
        text = "  ".join(_number(*entry) for entry in entries if entry not in said)
        said |= set(entries) if not said else set()
        out.write(f"{', '.join(names)}{differs}\n")
        for line in textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  "):
            out.write(line.replace(_GLUE, " ") + "\n")
        out.write("\n")


_GLUE = "\u00a0"
"""A space at which no line is broken."""


def _number(name: str, number: int) -> str:
    return f"{name}{_GLUE}{number if name.startswith('sizeof') else hex(number)}".replace(
        ", ", f",{_GLUE}"
    )
