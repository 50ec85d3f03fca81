"""Confinement: what a confined process still can, on Linux for real, elsewhere from the manuals."""

from __future__ import annotations

import ctypes
import errno
import importlib
import mmap
import os
import pkgutil
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import vq
from vq import loop, queue_process, sandbox, shared_fd, system_calls
from vq.errors import UsageError
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.queue_process import QueueProcess, Serving
from vq.sandbox import (
    Confinement,
    Policy,
    User,
    capabilities,
    freebsd,
    landlock,
    limits,
    linux,
    openbsd,
)
from vq.sandbox.libc import Libc
from vq.testing.requirements import need_linux, need_root
from vq.vring import Position, Return

NOBODY = User("nobody", 65534, 65534)


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """How a child that does `work` ends (an exit status, or minus a signal), and what it said."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.write(writable, str(work()).encode())
            status = 0
        except BaseException as error:
            os.write(writable, repr(error).encode())
        os._exit(status)
    os.close(writable)
    said = b""
    while data := os.read(readable, 65536):
        said += data
    os.close(readable)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def confined(work: Callable[[], object], policy: Policy | None = None) -> tuple[int, str]:
    """Likewise, after the child has become nobody and confined itself."""
    need_linux()
    need_root()
    sandbox.prepare()

    def begin() -> object:
        held = sandbox.confine(policy or Policy(user=NOBODY))
        assert not held.missing, held.missing
        return work()

    return in_child(begin)


# --- Linux, for real -----------------------------------------------------------------------------


def test_a_confined_process_has_no_privileges_and_a_filter() -> None:
    """The parent looks: the child cannot read /proc any more."""
    need_linux()
    need_root()
    sandbox.prepare()
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(ready[1], b"x" if not sandbox.confine(Policy(user=NOBODY)).missing else b"!")
            os.read(go_on[0], 1)
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"x"
        lines = Path(f"/proc/{child}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert status["Uid"] == status["Gid"] == ["65534"] * 4
        assert status["Groups"] == ["65534"]
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0, name
        assert status["NoNewPrivs"] == ["1"]
        assert (status["Seccomp"], status["Seccomp_filters"]) == (["2"], ["1"])
        for name in ("mnt", "net", "ipc", "uts", "cgroup"):
            ours, its = (os.readlink(f"/proc/{pid}/ns/{name}") for pid in ("self", child))
            assert ours != its, name
        assert os.listdir(f"/proc/{child}/root") == []
    finally:
        os.write(go_on[1], b"x")
        os.waitpid(child, 0)
        for fd in (*ready, *go_on):
            os.close(fd)


@pytest.mark.parametrize(
    "path", ["/", "/etc/passwd", "/proc/self/mem", "/dev/null", "/dev/net/tun", "."]
)
def test_a_confined_process_finds_no_file(path: str) -> None:
    def look() -> str:
        for attempt in (
            lambda: os.open(path, os.O_RDONLY),
            lambda: os.stat(path),
            lambda: os.lstat(path),
            lambda: os.readlink(path),
            lambda: os.listdir(path),
            lambda: os.unlink(path),
        ):
            try:
                attempt()
            except PermissionError:
                continue
            return "found"
        return "none"

    assert confined(look) == (0, "none")


FORBIDDEN: dict[str, Callable[[], object]] = {
    "make a socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "talk to the network": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "start a program": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "start a thread": lambda: threading.Thread(target=time.sleep, args=(0,)).start(),
    "send a signal": lambda: os.kill(os.getppid(), 0),
    "make a directory": lambda: os.mkdir("/tmp/vq-test-forbidden"),
    "become root": lambda: os.setuid(0),
    "change root": lambda: os.chroot("/"),
    "trace a process": lambda: ctypes.CDLL(None).ptrace(0, 0, 0, 0),
    "map code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "control a tap": lambda: Libc().call("ioctl", 0, 0x400454D0, 1),  # TUNSETOFFLOAD
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_confined_process_is_killed_when_it_tries_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is loaded here depends on the other tests; modules with threads may be among it.
    monkeypatch.setattr(linux, "listed_calls", lambda: list(linux.SYSTEM_CALLS))
    assert confined(FORBIDDEN[name])[0] == -signal.SIGSYS


@pytest.fixture
def with_queue_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are those of a worker whose queue pairs have processes of their own."""
    modules = (linux, loop, shared_fd, queue_process)
    calls = [call for module in modules for call in module.SYSTEM_CALLS]
    monkeypatch.setattr(linux, "listed_calls", lambda: list(dict.fromkeys(calls)))


CLONE_NEWUSER, CLONE_VM, PR_SET_NAME = 0x10000000, 0x100, 15
NOT_EVEN_THEN: dict[str, Callable[[], object]] = {
    **{name: FORBIDDEN[name] for name in ("start a program", "make a socket", "start a thread")},
    "send a signal": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "make a namespace": lambda: clone(CLONE_NEWUSER | signal.SIGCHLD),
    "share memory with a process": lambda: clone(CLONE_VM | signal.SIGCHLD),
    "outlive its parent": lambda: Libc().call("prctl", linux.PR_SET_PDEATHSIG, 0, 0, 0, 0),
    "limit another process": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0)),
    "have another name": lambda: Libc().call("prctl", PR_SET_NAME, b"another", 0, 0, 0),
}


CLONE = (  # from a file, of which none is left later
    system_calls.number_of("clone", platform.machine())
    if platform.machine() in system_calls.ARCHITECTURES
    else None
)


def clone(flags: int) -> int:
    assert CLONE is not None
    return Libc().system_call(CLONE, flags, 0, 0, 0, 0)


@pytest.mark.parametrize("name", NOT_EVEN_THEN)
@pytest.mark.usefixtures("with_queue_processes")
def test_a_worker_with_processes_for_its_queues_is_killed_when_it_tries_to(name: str) -> None:
    assert confined(NOT_EVEN_THEN[name])[0] == -signal.SIGSYS


@pytest.mark.usefixtures("with_queue_processes")
def test_a_confined_worker_has_processes_for_its_queues() -> None:
    """As confined as itself, in what it may not do either."""

    def work() -> str:
        here, said, counted = Loop(), list[object](), Counter[str]()
        for start in (lambda *_: None, lambda *_: os.uname(), lambda *_: os.fork()):
            serve = partial(Serving, start, lambda: Return({2: Position(5, 4)}), Counter(frames=1))
            process = QueueProcess((2,), here, serve, on_stats=counted.update, on_return=print)
            said.append(process.recall().positions)
        return f"{said} {dict(counted)}"

    positions = {2: Position(5, 4)}
    assert confined(work) == (0, f"{[positions, {}, {}]} {{'frames': 1}}")


@pytest.mark.usefixtures("with_queue_processes")
def test_fork_is_allowed_however_the_c_library_makes_it() -> None:
    """By clone(2), or on x86-64 musl's by fork(2)."""
    number = system_calls.number_of("fork", platform.machine())

    def work() -> str:
        made = []
        for fork in (os.fork, lambda: clone(signal.SIGCHLD), lambda: plain_fork(number)):
            child = fork()
            if child == 0:
                os._exit(7)
            made.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return str(made)

    assert confined(work) == (0, "[7, 7, 7]")


def plain_fork(number: int | None) -> int:
    return os.fork() if number is None else Libc().system_call(number)


def test_no_io_uring_can_be_set_up_any_more() -> None:
    """No filter sees what is asked for through one; programs go on without."""

    def set_up() -> str:
        try:
            Libc().system_call(425, 1, None)
        except PermissionError:
            return "refused"
        return "set up"

    assert confined(set_up) == (0, "refused")


def test_what_serving_takes_still_works() -> None:
    ours, theirs = socket.socketpair()
    memfd = os.memfd_create("test") if hasattr(os, "memfd_create") else os.pipe()[0]

    importlib.import_module("vq.vhost_user")  # it lists what it takes to pass descriptors

    def serve() -> str:
        os.ftruncate(memfd, 4096)
        with mmap.mmap(memfd, 4096) as mapped:
            mapped[:5] = b"guest"
        theirs.setblocking(False)
        socket.send_fds(theirs, [b"take this"], [memfd])
        try:
            raise ValueError("told in full")
        except ValueError:
            import traceback  # loaded before

            return traceback.format_exc().splitlines()[-1]

    with ours, theirs:
        assert confined(serve) == (0, "ValueError: told in full")
        _, fds, _, _ = socket.recv_fds(ours, 100, 1)
        assert os.pread(fds[0], 5, 0) == b"guest"
        os.close(fds[0])
        os.close(memfd)


def test_an_ordinary_user_is_confined_as_well() -> None:
    need_linux()
    need_root()  # to become one
    sandbox.prepare()

    def work() -> str:
        os.setgid(NOBODY.gid)
        os.setuid(NOBODY.uid)
        held = sandbox.confine(Policy())
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except PermissionError:
            return " ".join(sorted(held.held)) + "|" + " ".join(held.missing)
        return "open"

    status, said = in_child(work)
    held, _, missing = said.partition("|")
    assert status == 0, said
    # Hosts may forbid users namespaces; then that is told.
    assert {*held.split(), *missing.split()} == {
        *("namespaces", "capabilities", "no_new_privs", "limits", "landlock", "seccomp")
    }
    assert {"capabilities", "no_new_privs", "limits", "landlock", "seccomp"} <= set(held.split())


def test_a_process_may_take_so_much_of_the_host_and_no_more() -> None:
    need_linux()

    def take() -> str:
        capabilities.keep_only(Libc())  # else root may raise them again
        limits.limit(256 << 20)
        said = [f"core {resource.getrlimit(resource.RLIMIT_CORE)[1]}"]
        try:
            bytearray(512 << 20)
        except MemoryError:
            said.append("no memory")
        with GuestMemory.allocate(1 << 30):
            said.append("guest")
        try:
            for _ in range(limits.MOST_DESCRIPTORS):
                os.dup(0)
        except OSError as error:
            said.append(os.strerror(error.errno or 0))
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
        except (ValueError, OSError):
            said.append("for good")
        return ", ".join(said)

    status, said = in_child(take)
    assert (status, said) == (0, "core 0, no memory, guest, Too many open files, for good")


def test_local_time_is_the_same_inside() -> None:
    """The C library looks for the time zone's file again and again, unless that has a name."""
    moment = 1_700_000_000.0

    def tell() -> str:
        return f"{time.localtime(moment).tm_hour} {time.tzname[0]}"

    sandbox.prepare()
    assert confined(tell) == (0, tell())


def test_ioctls_are_those_of_the_policy_and_those_that_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()

    def ask(request: int) -> Callable[[], object]:
        return lambda: Libc().call("ioctl", ours.fileno(), request, ctypes.byref(ctypes.c_int()))

    monkeypatch.setattr(linux, "listed_ioctls", lambda: [*linux.IOCTLS, 0x8905])  # SIOCATMARK
    policy = Policy(user=NOBODY, ioctls=(0x541B,))  # FIONREAD
    with ours, theirs:
        assert confined(ask(0x541B), policy)[0] == 0
        assert confined(ask(0x541B))[0] == -signal.SIGSYS
        assert confined(ask(0x8905))[0] == 0
        assert confined(ask(0x5411), policy)[0] == -signal.SIGSYS  # TIOCOUTQ


@pytest.mark.parametrize(
    ("taps", "again", "wanted"),
    [
        (False, False, {1, 5}),  # DAC_OVERRIDE, KILL
        (True, False, {1, 5, 12}),  # NET_ADMIN
        (False, True, {1, 5, 6, 7, 8, 21}),  # SETGID, SETUID, SETPCAP
        (True, True, {1, 5, 6, 7, 8, 12, 21}),
    ],
)
def test_a_helper_keeps_what_it_needs_and_no_more(
    taps: bool, again: bool, wanted: set[int]
) -> None:
    need_linux()
    need_root()

    def keep() -> str:
        sandbox.keep_helper_privileges(taps=taps, again=again)
        return " ".join(map(str, sorted(capabilities.permitted(Libc()))))

    before = capabilities.permitted(Libc())
    status, said = in_child(keep)
    assert (status, set(map(int, said.split()))) == (0, wanted & before)


# --- what is missing -----------------------------------------------------------------------------


class Stub:
    """A C library with these functions, which note how they were called."""

    def __init__(self, fails: tuple[str, ...] = (), **results: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails = fails
        self._results = results

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in self._results:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            plain = [
                argument.raw
                if isinstance(argument, ctypes.Array)  # its value ends at a zero
                else getattr(argument, "value", argument)
                for argument in arguments
            ]
            self.calls.append((name, *plain))
            if name in self._fails:
                ctypes.set_errno(errno.EPERM)
                return -1
            return self._results[name]

        return function


def test_what_a_kernel_lacks_is_told_and_the_rest_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel from before Landlock, in a container that forbids namespaces."""
    need_linux()
    monkeypatch.setattr(limits, "limit", lambda memory: "limits")  # not this process's
    library = Stub(("unshare", "syscall"), unshare=0, syscall=0, prctl=0, capset=0)
    held = linux.confine(Policy(), libc=Libc(library))
    assert set(held.missing) == {"namespaces", "landlock"}
    assert "Operation not permitted" in held.missing["landlock"]
    assert set(held.held) == {"capabilities", "no_new_privs", "limits", "seccomp"}
    assert ("prctl", 38, 1, 0, 0, 0) in library.calls


def test_a_processor_without_a_table_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    need_linux()
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    library = Stub(unshare=0, syscall=0, prctl=0, capset=0)
    held = linux.confine(Policy(), libc=Libc(library))
    assert "sparc64" in held.missing["seccomp"] and "landlock" in held.missing


def test_a_list_with_an_unknown_call_is_wrong_use_and_no_reason_for_no_filter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_linux()
    monkeypatch.setattr(vq, "SYSTEM_CALLS", ("opennat",), raising=False)
    library = Stub(("syscall",), unshare=0, syscall=0, prctl=0, capset=0)
    with pytest.raises(UsageError, match=r"opennat has no number here .*; there is openat"):
        linux.confine(Policy(), libc=Libc(library))


def test_a_confinement_says_what_it_is() -> None:
    held = Confinement()
    assert str(held) == "nothing"
    held.take("one", lambda: "no files")
    held.take("two", lambda: os.strerror(os.open("/nowhere/at/all", os.O_RDONLY)))
    held.take("three", lambda: "no network")
    assert str(held) == "no files; no network"
    assert list(held.missing) == ["two"]


def test_facilities_are_tried_and_nothing_stays() -> None:
    need_linux()
    before = os.readlink("/proc/self/ns/net"), capabilities.permitted(Libc())
    found = sandbox.facilities()
    assert list(found) == ["namespaces", "no_new_privs", "landlock", "seccomp"]
    assert before == (os.readlink("/proc/self/ns/net"), capabilities.permitted(Libc()))


@pytest.mark.parametrize(
    ("version", "masks"),
    [
        (1, (13, 0, 0)),
        (2, (14, 0, 0)),
        (3, (15, 0, 0)),
        (4, (15, 2, 0)),
        (5, (16, 2, 0)),
        (6, (16, 2, 2)),
        (9, (16, 2, 2)),
    ],
)
def test_each_landlock_is_asked_for_what_it_knows(
    version: int, masks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    class Kernel(Libc):
        def system_call(self, number: int, *arguments: Any) -> int:
            if number == 444 and arguments[0] is None:
                return version
            if number == 444:
                asked.append(arguments[0].raw)
                return os.open(os.devnull, os.O_RDONLY)
            return 0

    assert landlock.restrict(Kernel(Stub()), "x86_64") == version
    assert asked == [struct.pack("=3Q", *((1 << count) - 1 for count in masks))]


# --- users ---------------------------------------------------------------------------------------


def test_a_user_is_found_by_name_and_number() -> None:
    assert sandbox.find_user("nobody").uid == sandbox.find_user("65534").uid == 65534


@pytest.mark.parametrize("name", ["root", "0", "no-such-user", "99999999999", ""])
def test_nobody_without_privileges_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"no user|root's"):
        sandbox.find_user(name)


# --- the lists of system calls -------------------------------------------------------------------


def modules() -> list[str]:
    names = (found.name for found in pkgutil.walk_packages(vq.__path__, "vq."))
    return [name for name in names if not name.endswith("__main__")]


def test_every_call_that_a_module_lists_has_a_number() -> None:
    known = set(system_calls.names())
    lists = {
        name: getattr(importlib.import_module(name), "SYSTEM_CALLS", None) for name in modules()
    }
    with_list = {name for name, calls in lists.items() if calls}
    assert {"vq.loop", "vq.memory", "vq.tap_linux_port", "vq.vhost_user"} <= with_list
    for name, calls in lists.items():
        assert set(calls or ()) <= known, name
    assert {*linux.REFUSED, *linux.CONDITIONS, *linux.UNKNOWN} <= known


def test_a_link_that_is_not_loaded_lists_nothing() -> None:
    code = (
        "import vq.serve.net, vq.sandbox.linux as linux; before = set(linux.listed_calls());"
        "import vq.tap_linux; print(*sorted(set(linux.listed_calls()) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["io_uring_enter", "writev"]


def test_only_devices_with_terminals_list_what_is_for_terminals() -> None:
    """Linux' FIONREAD, TIOCGWINSZ, TCGETS, TCSETSF, TCGETS2 and TCSETSF2; OpenBSD's promise."""
    need_linux()
    found = {}
    for kind in ("net", "blk", "rng", "vsock", "console"):
        code = (
            f"import vq.serve.{kind}; from vq.sandbox import linux, openbsd;"
            "ioctls = set(linux.listed_ioctls()) - set(linux.IOCTLS);"
            "print(*sorted(ioctls), *openbsd.promises()[4:])"
        )
        found[kind] = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    terminals = sorted((0x541B, 0x5413, 0x5401, 0x5404, 0x802C542A, 0x402C542D))
    assert found == {
        "net": [],
        "blk": [],
        "rng": [],
        "vsock": [str(0x541B)],
        "console": [*map(str, terminals), "tty"],
    }


@pytest.mark.parametrize("machine", sorted(system_calls.ARCHITECTURES))
def test_a_filter_can_be_made_for_every_processor(machine: str) -> None:
    assert len(linux.filter_for(Policy(ioctls=(1, 2)), machine)) % 8 == 0


# --- OpenBSD and FreeBSD, from their manuals -----------------------------------------------------


def test_openbsd_hides_files_before_it_pledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openbsd, "promises", lambda: list(openbsd.PROMISES))
    library = Stub(pledge=0, unveil=0)
    held = openbsd.confine(Policy(), libc=Libc(library))
    assert library.calls == [
        ("unveil", b"/", b""),
        ("unveil", None, None),
        ("pledge", b"stdio recvfd sendfd unix", None),
    ]
    assert list(held.held) == ["unveil", "pledge"] and not held.missing
    assert openbsd.facilities(libc=Libc(library)) == {"pledge": True, "unveil": True}


def test_freebsd_limits_a_taps_descriptor_before_it_enters_capability_mode() -> None:
    library = Stub(cap_enter=0, cap_rights_limit=0)
    held = freebsd.confine(Policy(data_fds=(5, 7)), libc=Libc(library))
    # CAPRIGHT of sys/capsicum.h: word 0 with CAP_READ, CAP_WRITE and CAP_FCNTL, word 1 CAP_EVENT.
    rights = struct.pack("=QQ", 0x0200000000008003, 0x0400000000000020)
    limited = [call for call in library.calls if call[0] == "cap_rights_limit"]
    assert [(fd, data) for _, fd, data in limited] == [(5, rights), (7, rights)]
    assert library.calls[-1] == ("cap_enter",)
    assert not held.missing


@pytest.mark.parametrize("system", [openbsd, freebsd])
def test_elsewhere_what_is_refused_is_told(system: Any) -> None:
    names = {"pledge": 0, "unveil": 0, "cap_enter": 0, "cap_rights_limit": 0}
    held = system.confine(Policy(), libc=Libc(Stub(tuple(names), **names)))
    assert held.missing and not held.held
    held = system.confine(Policy(), libc=Libc(Stub()))
    assert all("this system has no" in why for why in held.missing.values()) and held.missing
