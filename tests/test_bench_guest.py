"""The benches with real guests: the C program works, and they report what they should."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from vq.abi import DeviceId
from vq.bench import contestants, guest, testpmd
from vq.bench.contestants import (
    C,
    ServedTap,
    compare,
    compile_program,
    distance,
    pinned,
    run_traffic,
    tap_namespace,
    two_processors,
)
from vq.bench.measure import positive_number
from vq.bench.report import VQ, Figure, summary
from vq.cli import main
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace, bad_checksums, iperf_server
from vq.testing.requirements import (
    MissingRequirement,
    need_namespaces,
    need_program,
    need_tap,
    or_skip,
)

HOST, GUEST = "198.18.68.1", "198.18.68.2"


# --- the C programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize(("name", "standard"), [("peer", "c99"), ("distance", "c11")])
def test_a_c_program_compiles_without_a_warning(
    name: str, standard: str, level: str, tmp_path: Path
) -> None:
    compiler = need_program("cc", package="gcc")
    source = resources.files("vq.bench") / f"{name}.c"
    with resources.as_file(source) as path:
        command = [compiler, f"-std={standard}", level, "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([*command, "-o", tmp_path / name, path], check=True, timeout=60)


def test_the_distance_is_a_cache_lines_way_there_and_back() -> None:
    need_program("cc", package="gcc")
    with or_skip():
        two_processors()
    apart = distance()
    assert apart is not None and 5 < apart < 1e6  # no faster than a core's own cache
    program, usable = compile_program("distance"), os.sched_getaffinity(0)
    assert program is not None
    argv = [program, *(str(cpu) for cpu in (min(usable), max(usable) + 4000))]
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    assert refused.returncode == 1 and "no processor" in refused.stderr


def test_there_is_no_distance_without_a_compiler_or_a_second_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pinned({min(os.sched_getaffinity(0))}):
        assert distance() is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert distance() is None


def test_a_report_has_the_distance_before_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's host may move its processors at any time."""
    found = iter((90.4, None, 410.0))
    monkeypatch.setattr(contestants, "distance", lambda: next(found))
    report = compare((), {VQ: ()}, 3, lambda *_: {}, keep_awake=False)
    assert report["distance_ns"] == [90.4, 410.0]


def test_a_c_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_program("cc", package="gcc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compile_program("peer")
    assert first is not None and first.is_relative_to(tmp_path)
    made = first.stat().st_mtime_ns
    assert compile_program("peer") == first and first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_without_a_compiler_vq_runs_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert list(contestants.available()) == [VQ]
    assert "no C compiler" in capsys.readouterr().err


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    need_tap()
    need_namespaces()
    with tap_namespace(f"{HOST}/24") as made:
        yield made


@pytest.fixture
def served(namespace: Namespace) -> Iterator[ServedTap]:
    need_program("cc", package="gcc")
    peer = compile_program("peer")
    assert peer is not None
    with ServedTap(namespace, C, [str(peer)], lifetime=90) as device:
        yield device


@pytest.fixture
def uml(served: ServedTap) -> Iterator[UmlGuest]:
    with or_skip():
        booted = UmlGuest([(served.socket, DeviceId.NET)], lifetime=90)
    with booted:
        booted.output(f"ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up")
        yield booted


def test_the_c_program_carries_a_guests_traffic(
    namespace: Namespace, served: ServedTap, uml: UmlGuest
) -> None:
    before = served.cpu_seconds()
    out_before, in_before = served.tap_frames()
    assert "0% packet loss" in uml.output(f"ping -c 4 -i 0.05 -W 2 {HOST}")
    for size in (0, 1472, 65000):
        assert ", 0% packet loss" in namespace.run(f"ping -c 2 -i 0.05 -W 2 -s {size} {GUEST}")
    need_program("iperf3")
    with iperf_server(namespace):
        for options in ("", "-R"):
            text = uml.output(f"iperf3 --json -c {HOST} -n 20M {options}")
            # A receiver does not wait for what is still under way once its sender has finished.
            end = json.loads(text[text.index("{") :])["end"]
            assert end["sum_sent"]["bytes"] > 19e6 and end["sum_received"]["bytes"] > 1e6
    assert bad_checksums(uml.output) == bad_checksums(namespace.run) == {}
    assert uml.complaints() == []
    out_after, in_after = served.tap_frames()
    assert out_after - out_before > 100 and in_after - in_before > 100
    assert served.cpu_seconds() > before
    assert served.log() == ""


def test_the_c_program_ends_with_its_frontend(namespace: Namespace, served: ServedTap) -> None:
    with socket.socket(socket.AF_UNIX) as frontend:
        frontend.connect(str(served.socket))
        frontend.sendall((1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4))
        frontend.settimeout(5)
        assert len(frontend.recv(64)) == 12 + 8
    deadline = time.monotonic() + 5
    while Path(f"/proc/{served.pid}/net/dev").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- traffic -------------------------------------------------------------------------------------


def test_a_flood_sends_frames_of_the_length_that_was_asked_for(namespace: Namespace) -> None:
    def sent() -> tuple[int, int]:
        counters = json.loads(namespace.run("ip -s -j link show lo"))[0]["stats64"]["tx"]
        return counters["packets"], counters["bytes"]

    before = sent()
    rate = run_traffic(namespace, "flood", "lo", 99, 0.2, timeout=20)
    packets, octets = (now - then for now, then in zip(sent(), before, strict=True))
    # The loopback counts what is behind the Ethernet header.
    assert packets > 100 and octets == (99 - 14) * packets
    assert rate > 0


def test_a_ping_tells_the_median_in_microseconds(namespace: Namespace) -> None:
    trip = run_traffic(namespace, "ping", "127.0.0.1", 0.2, timeout=20)
    assert 0 < trip < 1e6


def test_a_ping_that_nobody_answers_tells_that(namespace: Namespace) -> None:
    namespace.run("echo 1 >/proc/sys/net/ipv4/icmp_echo_ignore_all")
    assert math.isnan(run_traffic(namespace, "ping", HOST, 0.1, timeout=20))


# --- reports -------------------------------------------------------------------------------------

FIGURES = (Figure("speed", "1/s"), Figure("delay", "us", more_is_better=False))


def test_a_summary_has_medians_and_vqs_ratio_to_the_others() -> None:
    samples = {
        VQ: [{"speed": 4.0, "delay": 30.0}, {"speed": 1.0, "delay": 20.0}, {"speed": 3.0}],
        C: [{"speed": 2.0, "delay": 10.0}, {"speed": 8.0, "delay": 10.0}, {"speed": 6.0}],
    }
    speed, delay = summary(FIGURES, samples)
    assert speed["medians"] == {VQ: 3.0, C: 6.0}
    assert speed["ratios"] == {C: 0.5}
    assert speed["samples"] == {VQ: [4.0, 1.0, 3.0], C: [2.0, 8.0, 6.0]}
    assert (speed["better"], delay["better"]) == ("more", "less")
    assert delay["medians"] == {VQ: 25.0, C: 10.0} and delay["ratios"] == {C: 2.5}


def test_a_figure_that_a_contestant_does_not_have_is_left_out() -> None:
    speed, delay = summary(FIGURES, {VQ: [{"speed": 1.0}], "uml": [{"delay": 2.0}]})
    assert speed["medians"] == {VQ: 1.0} and speed["ratios"] == {}
    assert delay["medians"] == {"uml": 2.0} and delay["ratios"] == {}


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "two", "²"])
def test_a_count_is_a_number_above_0(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a number above 0"):
        positive_number(text)


class Canned:
    """Takes the place of what needs guests, and remembers who was asked for."""

    def __init__(self, figures: Sequence[Figure], without: Mapping[str, str]) -> None:
        self.turns: list[str] = []
        self.own = "uml"
        self._figures = figures
        self._without = without

    @contextmanager
    def start(self, name: str) -> Iterator[str]:
        self.turns.append(name)
        yield name

    def sample(self, name: str) -> dict[str, float]:
        left_out = self._without.get(name, "-")
        value = {VQ: 1.0, C: 2.0, self.own: 4.0}[name] * len(self.turns)
        return {figure.name: value for figure in self._figures if left_out not in figure.name}


@pytest.fixture
def without_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "awake", nullcontext)
    for bench in (guest, testpmd):
        monkeypatch.setattr(bench, "check_tap", lambda: None)
        monkeypatch.setattr(bench, "check_namespaces", lambda: None)
        monkeypatch.setattr(bench, "find_program", lambda *_, **__: "program")
        monkeypatch.setattr(bench, "two_processors", lambda: ({1}, {0}))
        monkeypatch.setattr(bench, "available", lambda: {VQ: ["vq"], C: ["peer"]})
        monkeypatch.setattr(bench, "pinned", lambda _: nullcontext())


@pytest.fixture
def canned_guests(without_requirements: None, monkeypatch: pytest.MonkeyPatch) -> Canned:
    canned = Canned(guest.FIGURES, {"uml": ", device"})

    @contextmanager
    def start(_: object, name: str, *__: object) -> Iterator[tuple[str]]:
        with canned.start(name):
            yield (name,)

    monkeypatch.setattr(guest, "_guest", start)
    monkeypatch.setattr(guest, "_measure_guest", lambda name, _: canned.sample(name))
    return canned


@pytest.fixture
def canned_testpmd(without_requirements: None, monkeypatch: pytest.MonkeyPatch) -> Canned:
    canned = Canned(testpmd.FIGURES, {})
    monkeypatch.setattr(testpmd, "HugePages", nullcontext)
    monkeypatch.setattr(testpmd, "tap_namespace", nullcontext)
    monkeypatch.setattr(testpmd, "ServedTap", lambda _, name, __: canned.start(name))
    monkeypatch.setattr(testpmd, "_testpmd", lambda *_: nullcontext())
    monkeypatch.setattr(testpmd, "_measure_device", lambda _, name, *__: canned.sample(name))
    return canned


def check_report(report: dict[str, Any], names: list[str], figures: Sequence[Figure]) -> None:
    assert {"python", "machine", "processor", "system", "kernel", "date"} <= report.keys()
    assert report["seconds"] > 0
    assert report["contestants"] == names
    assert [row["figure"] for row in report["figures"]] == [figure.name for figure in figures]
    for row in report["figures"]:
        assert row.keys() == {"figure", "unit", "better", "medians", "ratios", "samples"}
        for name in row["medians"]:
            assert len(row["samples"][name]) == 2
        assert row["ratios"][C] == pytest.approx(row["medians"][VQ] / row["medians"][C], abs=1e-3)


def test_the_guest_bench_reports_each_figure(
    canned_guests: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "guest", "--json", "--boots", "2", "--seconds", "3"]) == 0
    assert canned_guests.turns == [VQ, C, "uml"] * 2
    report = json.loads(capsys.readouterr().out)
    assert (report["boots"], report["seconds"]) == (2, 3)
    check_report(report, [VQ, C, "uml"], guest.FIGURES)
    by_name = {row["figure"]: row for row in report["figures"]}
    assert by_name["TCP to host"]["ratios"].keys() == {C, "uml"}
    assert by_name["TCP to host, device"]["ratios"].keys() == {C}


def test_the_testpmd_bench_reports_each_figure(
    canned_testpmd: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "testpmd", "--json", "--rounds", "2"]) == 0
    assert canned_testpmd.turns == [VQ, C] * 2
    report = json.loads(capsys.readouterr().out)
    assert report["rounds"] == 2
    check_report(report, [VQ, C], testpmd.FIGURES)


def test_a_qemu_guest_has_its_own_contestant(
    canned_guests: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    canned_guests.own = "qemu"
    assert main(["bench", "guest", "--kind", "qemu", "--json", "--boots", "2"]) == 0
    assert canned_guests.turns == [VQ, C, "qemu"] * 2
    report = json.loads(capsys.readouterr().out)
    assert report["guest"] == "qemu"
    assert report["figures"][0]["ratios"].keys() == {C, "qemu"}


@pytest.mark.parametrize("name", ["guest", "testpmd"])
def test_the_table_has_a_row_for_each_figure(
    name: str, canned_guests: Canned, canned_testpmd: Canned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures: Sequence[Figure] = guest.FIGURES if name == "guest" else testpmd.FIGURES
    assert "vq/c" in lines[2]
    assert len(lines) == 3 + len(figures)
    for line, figure in zip(lines[3:], figures, strict=True):
        assert line.strip().startswith(figure.name)


@pytest.mark.parametrize("name", ["guest", "testpmd"])
def test_what_is_missing_is_told_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise MissingRequirement("needs root")

    bench = {"guest": guest, "testpmd": testpmd}[name]
    monkeypatch.setattr(bench, "check_tap", missing)
    assert main(["bench", name, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vq bench: needs root\n"
