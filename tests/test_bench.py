"""`vq bench`: every bench runs, and what it finds is shown as it was asked for."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import pytest

from vq.abi import HdrFlag, HdrGso
from vq.bench import loopback, pairs, profile, scaling, tap, traffic
from vq.bench.contestants import C, Served, ServedTap, available, tap_namespace
from vq.bench.profile import Sampler, stage_of
from vq.bench.report import VQ, Bars, Curves, Description, Figure, Table, describe_figures, show
from vq.bench.scripted import LONGEST, SIZES, frame_of, guest_on, label
from vq.cli import main
from vq.driver import DriverRing
from vq.guest_stack import finish_checksum
from vq.memory import GuestMemory
from vq.net_driver import NetHeader
from vq.packet import parse
from vq.split_ring import SplitRing
from vq.testing.requirements import need_namespaces, need_program, need_tap, or_skip, unmet

HOST_FACTS = {"python", "implementation", "machine", "processor", "system", "kernel", "date"}


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with or_skip():
        assert main(["bench", *words, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report.keys() >= HOST_FACTS
    return report


# --- the benches ---------------------------------------------------------------------------------


def test_a_loopback_is_measured_beside_the_c_program(capsys: pytest.CaptureFixture[str]) -> None:
    need_program("cc", package="gcc")
    report = bench(capsys, "loopback", "--rounds", "1", "--seconds", "0.1")
    assert report["contestants"] == [VQ, C]
    assert [row["figure"] for row in report["figures"]] == [f.name for f in loopback.FIGURES]
    for row in report["figures"][::2]:  # in so short a time the device may have done nothing
        assert row["medians"][VQ] > 0 and row["medians"][C] > 0


def test_a_tap_is_measured_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    need_tap()
    need_namespaces()
    need_program("cc", package="gcc")
    report = bench(capsys, "tap", "--rounds", "1", "--seconds", "0.1")
    assert report["contestants"] == [VQ, C]
    assert [row["figure"] for row in report["figures"]] == [f.name for f in tap.FIGURES]
    for row in report["figures"][::2]:  # in so short a time the device may have done nothing
        assert row["medians"][VQ] > 0 and row["medians"][C] > 0


def test_two_pairs_are_measured_with_a_process_each_and_with_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    need_tap()
    need_namespaces()
    report = bench(capsys, "pairs", "--rounds", "1", "--seconds", "0.2")
    assert report["contestants"] == [VQ, pairs.ONE_PROCESS, pairs.ONE_PAIR]
    assert [row["figure"] for row in report["figures"]] == [f.name for f in pairs.FIGURES]
    for contestant in report["contestants"]:
        assert report["figures"][0]["medians"][contestant] > 1000


def test_scaling_has_a_point_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, "scaling", "--rounds", "1", "--seconds", "0.0001")
    assert [curve["curve"] for curve in report["curves"]] == [c.name for c in scaling.CURVES]
    for found, curve in zip(report["curves"], scaling.CURVES, strict=True):
        assert VQ in found["points"]
        for points in found["points"].values():
            assert [size for size, _ in points] == list(curve.sizes)
            assert all(microseconds > 0 for _, microseconds in points)


@pytest.mark.parametrize("link", profile.CASES)
def test_a_profile_divides_a_frames_time_into_stages(
    link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if link == "tap":
        need_tap()
        need_namespaces()
    report = bench(capsys, "profile", "--link", link, "--seconds", "0.4")  # enough samples
    assert [case["case"] for case in report["cases"]] == [str(c) for c in profile.CASES[link]]
    for case in report["cases"]:
        assert sum(case["stages"].values()) == pytest.approx(case["us"], rel=0.05)
        assert case["stages"].get("other", 0.0) < case["us"] / 5, "all modules are of some stage"
    seen = {stage for case in report["cases"] for stage in case["stages"]}
    assert {"ring", "event loop", "link"} <= seen
    if link == "tap":
        for call in ("system call: read", "system call: write"):  # of one frame or of several
            assert seen & {call, f"{call}v"}


def test_without_a_tap_the_profile_is_of_a_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise profile.MissingRequirement("needs root")

    monkeypatch.setattr(profile, "check_tap", missing)
    assert bench(capsys, "profile", "--seconds", "0.01")["link"] == "loopback"


# --- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_has_the_size_that_it_is_called_by(size: int) -> None:
    header, data = frame_of(size)
    assert len(data) == size
    flooded = traffic.flood_frame(size)
    if size == LONGEST:
        assert isinstance(header, NetHeader)
        assert (header.flags, header.gso_type) == (HdrFlag.NEEDS_CSUM, HdrGso.TCPV4)
        # A packet socket's header has no num_buffers.
        assert flooded[:10] == header.pack()[:10] and len(flooded) == 10 + size
        packet = parse((bytes(data),))
        assert packet.l4_offset == header.csum_start
        assert finish_checksum(header, bytes(data)) != bytes(data)
    else:
        assert header == NetHeader() and len(flooded) == size


def test_sizes_have_names_of_their_own() -> None:
    assert list(map(label, SIZES)) == ["64 bytes", "1500 bytes", "64 KiB"]


@pytest.mark.parametrize("name", [VQ, C])
@pytest.mark.parametrize("size", SIZES)
def test_a_loopback_gives_back_what_it_is_sent(name: str, size: int) -> None:
    if name == C:
        need_program("cc", package="gcc")
    with or_skip():
        command = available()[name]
        with Served(name, command, lifetime=60) as device, guest_on(device.socket) as guest:
            header, data = frame_of(size)
            assert guest.driver.send_burst([(header, data)] * 3) == 3
            back: list[Any] = []
            assert guest.driver._wait(lambda: len(back) >= 3 or back.extend(guest.driver.receive()))
            for frame in back:
                assert frame.data == data and frame.header[:6] == tuple(header)[:6]


def test_a_long_frame_from_a_packet_socket_comes_through_a_tap_in_one_piece() -> None:
    need_tap()
    need_namespaces()
    with (
        tap_namespace("198.18.70.1/24") as namespace,
        ServedTap(namespace, VQ, available()[VQ], lifetime=60) as device,
        guest_on(device.socket) as guest,
    ):
        flood = namespace.start(tap.traffic_argv("flood", tap.TAP, LONGEST, 10), lifetime=20)
        try:
            back: list[Any] = []
            assert guest.driver._wait(lambda: back or back.extend(guest.driver.receive()))
        finally:
            flood.close()
        assert back[0].data == traffic.flood_frame(LONGEST)[10:]


@pytest.mark.parametrize(("ring", "stage"), [(SplitRing, "ring"), (DriverRing, "other")])
def test_the_innermost_function_of_the_package_says_what_the_stage_is(
    ring: type[SplitRing] | type[DriverRing], stage: str
) -> None:
    """The scripted guest's side is no stage of the device."""
    frames: list[FrameType] = []

    class Memory(GuestMemory):
        def view(self, gpa: int, length: int) -> memoryview:
            frames.append(sys._getframe())  # not of the package itself
            return super().view(gpa, length)

    with Memory.allocate(1 << 16) as memory:
        ring(memory, 16, 0x1000, 0x2000, 0x3000)
    assert stage_of(frames[0]) == stage
    assert stage_of(None) == "other"


def test_a_line_that_calls_the_system_is_a_stage_of_its_own(loop_frame: FrameType) -> None:
    assert stage_of(loop_frame) == "system call: poll"


@pytest.fixture
def loop_frame() -> FrameType:
    """A frame of the event loop while it asks the system."""
    from vq.loop import Loop

    seen: list[FrameType] = []
    loop = Loop()

    def poll(*_: object) -> list[tuple[int, int]]:
        frame = sys._getframe().f_back
        assert frame is not None
        seen.append(Snapshot(frame))  # type: ignore[arg-type]
        return []

    loop._poll = poll  # type: ignore[method-assign]
    loop.run_once(0)
    loop.close()
    return seen[0]


class Snapshot:
    """A frame as it was, since a frame's line moves on."""

    def __init__(self, frame: FrameType) -> None:
        self.f_code, self.f_lineno, self.f_back = frame.f_code, frame.f_lineno, None


def test_the_sampler_looks_only_while_it_is_on() -> None:
    sampler = Sampler()
    before = signal.getsignal(signal.SIGALRM)
    with sampler.running():
        signal.raise_signal(signal.SIGALRM)
        assert not sampler.samples
        sampler.on = True
        signal.raise_signal(signal.SIGALRM)
        sampler.on = False
    assert sampler.samples.total() >= 1
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_every_stage_is_a_module() -> None:
    for name in set(profile.STAGES) - {"io_uring"}:
        assert importlib.util.find_spec(f"vq.{name}") is not None


# --- what is shown -------------------------------------------------------------------------------

FIGURES = (Figure("speed", "1/s"), Figure("delay", "us", more_is_better=False, digits=1))
REPORT: Mapping[str, Any] = {
    **dict.fromkeys(HOST_FACTS, "x"),
    "contestants": [VQ, C],
    "figures": [
        {
            "figure": "speed",
            "unit": "1/s",
            "better": "more",
            "medians": {VQ: 3.0, C: 6.0},
            "ratios": {C: 0.5},
        },
        {
            "figure": "delay",
            "unit": "us",
            "better": "less",
            "medians": {VQ: 5.0, C: 10.0},
            "ratios": {C: 0.5},
        },
    ],
}


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"json": False, "markdown": False, "plot": None, **given})


def test_a_picture_says_who_is_ahead_whether_more_or_less_is_better() -> None:
    (bars,) = describe_figures("title", FIGURES, REPORT).charts
    assert isinstance(bars, Bars)
    assert bars.labels == ["speed", "delay"] and bars.series == {C: [0.5, 2.0]}


def test_markdown_is_a_table_with_numbers_flush_right(capsys: pytest.CaptureFixture[str]) -> None:
    show(options(markdown=True), REPORT, describe_figures("Speeds", FIGURES, REPORT))
    head, empty, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("Speeds; Python x on x (x), x x, x") and not empty
    assert table == [
        "|  |  | vq | c | vq/c |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| speed | 1/s | 3.00 | 6.00 | 0.50 |",
        "| delay | us | 5.0 | 10.0 | 0.50 |",
    ]


@pytest.mark.parametrize(
    ("distances", "words"),
    [([], "(x)"), ([410.2], "(x, 410 ns apart)"), ([410.2, 87.6], "(x, 88 to 410 ns apart)")],
)
def test_a_title_says_how_far_apart_the_processors_were(distances: list[float], words: str) -> None:
    report = {**REPORT, "distance_ns": distances}
    assert f" {words}," in describe_figures("Speeds", FIGURES, report).title


def test_json_and_markdown_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "ring", "--json", "--markdown"])
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["picture", "picture.gif", "svg"])
def test_a_picture_is_svg_or_png(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "ring", "--plot", name])
    assert ended.value.code == 2
    assert "neither an .svg nor a .png file" in capsys.readouterr().err


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        unmet("needs matplotlib: the extra vq[plot]")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("words", [("ring", "--seconds", "0.01")], ids=["ring"])
def test_a_bench_draws_what_it_found(
    words: tuple[str, ...], suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_matplotlib()
    path = tmp_path / f"picture{suffix}"
    assert main(["bench", *words, "--plot", str(path)]) == 0
    check_picture(path)


def test_every_kind_of_chart_can_be_drawn(tmp_path: Path) -> None:
    need_matplotlib()
    from vq.bench.plot import draw
    from vq.bench.report import Stacked

    path = tmp_path / "picture.svg"
    charts = [
        Bars("bars", ["one", "two"], {"c": [1.0, None], "uml": [2.0, 0.5]}),
        Curves("curves", "size", "us", {"vq": [(1, 1.0), (2, 3.0)]}),
        Stacked("stacked", ["case"], {"ring": [1.0], "link": [2.0]}, "us"),
    ]
    draw(charts, path)
    check_picture(path)


def check_picture(path: Path) -> None:
    if path.suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_without_matplotlib_one_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "picture.svg"
    assert main(["bench", "ring", "--seconds", "0.01", "--plot", str(path)]) == 2
    assert (
        capsys.readouterr().err == "vq bench: a picture needs matplotlib: pip install 'vq[plot]'\n"
    )
    assert not path.exists()


def test_a_table_may_have_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    show(options(), {}, Description("all", [Table(("a", "b"), [("1", "22")], "numbers")]))
    assert capsys.readouterr().out.splitlines() == ["all", "", "numbers", "a   b", "1  22"]
