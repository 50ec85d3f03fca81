"""`vq check`: what it finds, what it prints and what it returns."""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys

import pytest

from vq import abi_probe, check, platforms, tap_bsd
from vq.check import Finding, Level
from vq.errors import UsageError
from vq.offload import ALL, Offload
from vq.testing import bsd_tap

KNOWN = [platform.name for platform in platforms.KNOWN]

needs_headers = pytest.mark.skipif(
    not abi_probe.available(), reason="the headers are not installed (ziglang, the extra abi)"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args(options))


def only(monkeypatch, *findings: Finding) -> None:
    """Makes these the only findings."""

    def probe():
        return findings

    monkeypatch.setattr(check, "_PROBES", (probe,))


def found(name: str) -> Finding:
    (finding,) = (one for one in check.findings() if one.name == name)
    return finding


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


# --- on this host --------------------------------------------------------------------------------


def test_this_host_can_run_vq():
    missing = [one for one in check.findings() if one.level is Level.RED]
    assert missing == []


def test_it_leaves_nothing_behind():
    def things():
        return sorted(name for _, name in socket.if_nameindex() if name.startswith("vqcheck"))

    descriptors = set(os.listdir("/dev/fd"))
    before = things()
    check.findings()
    assert len(os.listdir("/dev/fd")) == len(descriptors)
    assert things() == before


def test_each_finding_has_a_name_of_its_own_and_each_bad_one_says_what_to_do():
    findings = check.findings()
    assert len({one.name for one in findings}) == len(findings)
    for one in findings:
        assert one.found
        assert one.level is Level.GREEN or one.advice


def test_json_is_one_object_and_nothing_else(capsys):
    assert run("--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["host"]["platform"] == platforms.host().name
    assert report["host"]["byteorder"] == sys.byteorder
    assert report["host"]["page_size"] == os.sysconf("SC_PAGE_SIZE")
    assert report["capabilities"]["shared_memory"] is True
    assert report["capabilities"]["fd_passing"] is True
    assert report["capabilities"]["privileges"]["uid"] == os.geteuid()
    assert set(report["abi"]) >= set(KNOWN)
    assert report["abi"]["linux-mips"]["TUNSETIFF"] == 0x800454CA
    assert report["abi"]["openbsd-x86_64"]["sizeof(tun_hdr)"] == 8
    assert {one["name"] for one in report["findings"]} == set(report["capabilities"])


def test_a_tap_that_can_be_opened_is_asked_for_its_offloads():
    tap = found("tap")
    if tap.level is not Level.GREEN:
        pytest.skip(f"no tap: {tap.found}")
    value = found("tap_offloads").value
    assert list(value) == [offload.name for offload in Offload]
    assert value["CSUM"] == {"to_guest": True, "from_guest": True}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_may_run_it():
    script = """if True:
        import argparse, os, sys
        from vq import check
        check.findings()  # so that nothing has to be imported by a user who may not read it
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        sys.exit(check.run(argparse.Namespace(json=True, abi=False)))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert report["capabilities"]["privileges"] == {"uid": 65534, "root": False, "net_admin": False}


# --- what is missing -----------------------------------------------------------------------------


def test_without_a_tap_vq_still_works(monkeypatch, capsys):
    def refuse(name, *, queues=1):
        raise PermissionError(13, "this user may not")

    monkeypatch.setattr(check, "open_tap", refuse)
    tap = found("tap")
    assert (tap.level, tap.found, tap.value) == (Level.YELLOW, "this user may not", False)
    assert "stream" in tap.advice
    assert run() == 0
    assert "warn  tap " in capsys.readouterr().out


def test_numbered_taps_are_tried_until_one_is_free(monkeypatch):
    tried = []

    class FakeTap:
        accepts, delivers = Offload.CSUM | Offload.TSO4, Offload.NONE

        def __init__(self, name, *, queues=1):
            tried.append(name)
            if queues != 1:
                raise UsageError("a tap has one queue here")
            if name == "tap1":
                raise OSError(16, "in use")
            self.name = name

        def request_offloads(self, wanted):
            self.delivers = wanted & (Offload.CSUM | Offload.TSO4 | Offload.TSO6)

        def close(self):
            tried.append("closed")

    monkeypatch.setattr(check, "_NEW_TAPS", {})
    monkeypatch.setattr(check, "open_tap", FakeTap)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo0"), (2, "tap0")])
    tap, offloads, queues = check._tap()
    assert tried == ["tap1", "tap2", "closed", "tap2"]
    assert tap.level is Level.GREEN
    assert offloads.level is Level.YELLOW
    assert offloads.found == "CSUM TSO4"
    assert offloads.value["TSO6"] == {"to_guest": True, "from_guest": False}
    assert (queues.level, queues.value) == (Level.YELLOW, False)


@pytest.mark.parametrize("system", ["openbsd", "freebsd"])
def test_the_bsd_taps_are_asked_in_the_same_way(monkeypatch, system):
    """Over the stand-ins for their kernels, as on the system itself."""
    kernel_of, tap_of = {
        "openbsd": (bsd_tap.OpenBsdKernel, tap_bsd.OpenBsdTap),
        "freebsd": (bsd_tap.FreeBsdKernel, tap_bsd.FreeBsdTap),
    }[system]
    kernel = kernel_of({"tap3": f"vqck{os.getpid() % 100000}"})

    def open_tap(name, *, queues=1):
        if queues != 1:
            raise UsageError(f"a tap has one queue on {system}, not {queues}")
        return tap_of(name, calls=kernel)

    monkeypatch.setattr(check, "_NEW_TAPS", {})
    monkeypatch.setattr(check, "open_tap", open_tap)
    if found("privileges").level is not Level.GREEN or not os.path.exists("/dev/net/tun"):
        pytest.skip("the stand-in needs a Linux tap, and there is none without privileges")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "tap0"), (2, "tap1"), (3, "tap2")])
    tap, offloads, queues = check._tap()
    assert (tap.level, tap.found) == (Level.GREEN, "tap3 was made and asked")
    assert offloads.value["CSUM"] == {"to_guest": True, "from_guest": True}
    assert offloads.value["TSO4"]["to_guest"]
    assert not offloads.value["USO4"]["to_guest"]
    assert offloads.level is Level.YELLOW
    assert queues.level is Level.YELLOW


def test_a_tap_with_every_offload_is_green():
    class Everything:
        name, accepts, delivers = "tap0", ALL, Offload.NONE

        def request_offloads(self, wanted):
            self.delivers = wanted

    assert check._offloads(Everything()).level is Level.GREEN


def test_without_memfd_a_file_stands_in(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert found("memfd").level is Level.YELLOW
    assert found("shared_memory").level is Level.GREEN


def test_without_eventfd_a_pipe_stands_in(monkeypatch):
    monkeypatch.delattr(os, "eventfd", raising=False)
    finding = found("eventfd")
    assert (finding.level, finding.value) == (Level.GREEN, False)


def test_no_shared_memory_is_red(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check.memory.Region, "anonymous", full)
    finding = found("shared_memory")
    assert finding.level is Level.RED
    assert "No space left" in finding.found


def test_mappings_that_are_not_shared_are_red(monkeypatch):
    from_fd = check.memory.Region.from_fd

    def another(fd, gpa, size, *, offset=0):
        return from_fd(fd, gpa, size, offset=0)

    monkeypatch.setattr(check.memory.Region, "from_fd", another)
    assert found("shared_memory").level is Level.RED


def test_no_unix_sockets_are_red(monkeypatch, capsys):
    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socketpair", forbidden)
    finding = found("fd_passing")
    assert finding.level is Level.RED
    assert run() == 1
    assert "FAIL  fd_passing" in capsys.readouterr().out


def test_descriptors_that_are_lost_on_the_way_are_red(monkeypatch):
    def none(sock, size, count):
        return sock.recv(size), [], 0, None

    monkeypatch.setattr(socket, "recv_fds", none)
    assert found("fd_passing").level is Level.RED


def test_a_system_call_that_is_forbidden_is_told_and_stops_nothing(monkeypatch):
    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "if_nameindex", forbidden)
    names = {one.name for one in check.findings()}
    assert {"tap", "sandbox", "programs"} <= names
    assert "could not be tried" in found("tap").found


def test_an_unknown_system_has_no_tap_but_is_no_failure(monkeypatch):
    monkeypatch.setattr(platforms, "_RULES", {})
    assert found("system").level is Level.YELLOW


@pytest.mark.parametrize(
    ("effective", "expected"), [("0000000000001000", True), ("ffffffffffffefff", False)]
)
def test_the_right_to_make_interfaces_is_bit_12_of_the_effective_capabilities(
    monkeypatch, effective, expected
):
    if platforms.host().system != "linux":
        pytest.skip("capabilities are Linux'")
    monkeypatch.setattr(check, "_lines", lambda path: {"CapEff": effective})
    assert check._net_admin() is expected


@pytest.mark.parametrize(("free", "level"), [("0", Level.YELLOW), ("3", Level.GREEN)])
def test_huge_pages_are_there_when_some_are_free(monkeypatch, free, level):
    info = {"Hugepagesize": "2048 kB", "HugePages_Total": "4", "HugePages_Free": free}
    monkeypatch.setattr(check, "_lines", lambda path: info)
    (finding,) = check._huge_pages()
    assert finding.level is level
    assert finding.value == {"size": 2 << 20, "total": 4, "free": int(free)}


# --- what is printed and returned ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "status"),
    [
        ([Level.GREEN], 0),
        ([Level.GREEN, Level.YELLOW], 0),
        ([Level.RED, Level.GREEN], 1),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_only_red_makes_it_fail(monkeypatch, capsys, levels, status, options):
    only(monkeypatch, *(Finding(f"f{n}", level, "x", "y") for n, level in enumerate(levels)))
    assert run(*options) == status


def test_the_words_stand_there_without_colour_too(monkeypatch, capsys):
    only(
        monkeypatch,
        Finding("one", Level.GREEN, "good"),
        Finding("two", Level.YELLOW, "so so", "do this"),
        Finding("three", Level.RED, "bad", "do that"),
    )
    run()
    out = capsys.readouterr().out
    assert "\033" not in out
    lines = [line.split() for line in out.splitlines()]
    for line in (
        ["ok", "one", "good"],
        ["warn", "two", "so", "so"],
        ["->", "do", "this"],
        ["FAIL", "three", "bad"],
        ["->", "do", "that"],
    ):
        assert line in lines
    assert out.endswith("1 ok, 1 to improve, 1 missing that vq needs\n")


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    only(monkeypatch, Finding("one", Level.RED, "bad", "do"))
    for settings, coloured in (
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ):
        with monkeypatch.context() as changed:
            terminal = Terminal()
            changed.setattr(sys, "stdout", terminal)
            for name, value in settings.items():
                changed.setenv(name, value)
            run()
        assert ("\033[31mFAIL\033[0m" in terminal.getvalue()) is coloured, settings


def test_people_see_the_numbers_of_every_platform(monkeypatch, capsys):
    only(monkeypatch, Finding("one", Level.GREEN, "good"))
    run()
    out = capsys.readouterr().out
    for name in KNOWN:
        assert name in out
    assert "TUNSETIFF 0x400454ca" in out
    assert "TUNSETIFF 0x800454ca" in out
    assert "TUNSCAP 0x800474c4" in out
    assert "sizeof(tun_hdr) 8" in out
    assert "TAPSVNETHDR 0x8004745b" in out
    assert max(map(len, out.splitlines())) <= 100


# --- --abi ---------------------------------------------------------------------------------------


def test_without_the_headers_abi_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(abi_probe, "available", lambda: False)
    assert run("--abi", "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'vq[abi]'" in err
    assert err.count("\n") == 1


@needs_headers
def test_abi_holds_the_headers_numbers(capsys):
    assert run("--abi", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["abi"]) == KNOWN
    assert report["abi"] == {each.name: platforms.numbers(each) for each in platforms.KNOWN}
    assert report["mismatches"] == []


@needs_headers
def test_a_number_that_differs_from_the_headers_fails_and_is_listed(monkeypatch, capsys):
    right = platforms.numbers

    def wrong(platform):
        return {**right(platform), "IFNAMSIZ": 17} if platform.name == KNOWN[4] else right(platform)

    compare = abi_probe.compare
    monkeypatch.setattr(abi_probe, "compare", lambda **kw: compare(ours=wrong, **kw))
    assert run("--abi", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["mismatches"] == [
        {"platform": "linux-mips", "name": "IFNAMSIZ", "vq": 17, "headers": 16}
    ]
    assert report["abi"]["linux-mips"]["IFNAMSIZ"] == 16
    assert run("--abi") == 1
    assert "IFNAMSIZ is 0x10 in the headers and 0x11 in vq" in capsys.readouterr().out


def test_older_headers_are_a_warning_and_headers_that_do_not_compile_a_failure(monkeypatch, capsys):
    only(monkeypatch)
    partial = abi_probe.Comparison("linux-mips", {"IFNAMSIZ": 16}, {}, ("TUNSETCARRIER",))
    broken = abi_probe.Comparison("openbsd-x86_64", {}, {}, (), "openbsd-x86_64: no headers")
    monkeypatch.setattr(abi_probe, "available", lambda: True)
    monkeypatch.setattr(abi_probe, "compare", lambda **_: [partial])
    assert run("--abi", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == {"linux-mips": ["TUNSETCARRIER"]}
    monkeypatch.setattr(abi_probe, "compare", lambda **_: [partial, broken])
    assert run("--abi", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == {"openbsd-x86_64": "openbsd-x86_64: no headers"}


@pytest.mark.parametrize(("seconds", "shown"), [(0.1, False), (0.6, True)])
def test_progress_shows_on_a_terminal_when_it_takes_a_while(monkeypatch, seconds, shown):
    clock = [0.0]

    def slow(*, progress):
        for name in KNOWN[:3]:
            clock[0] += seconds
            progress(name)
        return []

    only(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(abi_probe, "available", lambda: True)
    monkeypatch.setattr(abi_probe, "compare", slow)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", terminal)
    run("--abi", "--json")
    assert ("3 of 10" in terminal.getvalue()) is shown
    if shown:
        assert terminal.getvalue().endswith("\r\033[K")
