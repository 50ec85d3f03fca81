"""Causes in a recording that are not the driver's: alarms, threads, links that break, the host.

What a recording does not have must be said by a replay: it never comes out different in silence.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_world import ScriptedLink, ethernet

from vq.abi import Feature
from vq.device import Alarm, Device, Queue
from vq.errors import CaptureError, UsageError
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.net import NetDevice
from vq.net_driver import NetDriver
from vq.recording import Kind, Recorder, RecordingReader, RecordingWriter, Replay, describe
from vq.recording.show import as_json
from vq.request import Request
from vq.testing.recordings import assert_replays
from vq.testing.wiring import WIRES, Wired, wire

NEVER = 1000.0
"""Seconds; of a test's own alarms, which it rings itself."""


class Space(ctypes.LittleEndianStructure):
    _fields_ = (("given_up", ctypes.c_uint32),)


class Waiter(DeviceModel):
    """Keeps requests: one alarm answers them one by one, the other gives all of them up.

    ``cancel`` keeps the others from being given up. `seconds` is when the alarms ring.
    """

    device_id = 0x3F

    def __init__(self, seconds: float = NEVER) -> None:
        super().__init__(queues=[("requests", 16, self.keep)], config=Space())
        self.seconds = seconds
        self.kept: list[Request] = []
        self.next = self.alarm(self.answer_next)
        self.patience = self.alarm(self.give_up)

    def keep(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.reader.read(limit=16) == b"cancel":
                self.patience.set(None)
                request.complete()
                continue
            self.kept.append(request)
            self.next.set(self.seconds)
            self.patience.set(2 * self.seconds)

    def answer_next(self) -> None:
        self.answer(b"in time")
        if self.kept:
            self.next.set(self.seconds)  # in its own callback

    def give_up(self) -> None:
        while self.kept:
            self.answer(b"late")
        self.update_config(given_up=self.config.given_up + 1)  # type: ignore[union-attr]

    def answer(self, text: bytes) -> None:
        if self.kept:
            request = self.kept.pop(0)
            request.writer.write(text[: request.writer.remaining])
            request.complete()

    def device_reset(self) -> None:
        self.forget()

    def queue_stopping(self, queue: Queue) -> None:
        super().queue_stopping(queue)
        self.forget()

    def forget(self) -> None:
        self.kept = []
        self.next.set(None)
        self.patience.set(None)


def ask(wired: Wired, text: bytes = b"text") -> None:
    """Places a request, without waiting for its answer."""
    ring = wired.driver.queues[0]
    place = wired.driver.allocator.allocate(16)
    wired.memory.write(place, text)
    ring.add([(place, len(text))], [(place + 8, 8)], place)
    wired.driver.kick(0)
    wired.turn(2)


def answers(wired: Wired) -> list[bytes]:
    wired.turn(2)
    return [
        wired.memory.read(used.token + 8, used.written) for used in wired.driver.queues[0].collect()
    ]


def ring(alarm: Alarm) -> None:
    """The time has come, if the alarm is set."""
    if alarm.deadline is not None:
        alarm.ring()


def record(
    path: Path, device: Device, use: Callable[[Wired], object], via: str = "direct"
) -> list[Kind]:
    """Records what `use` does; returns which kinds of causes there were."""
    features = ~(1 << Feature.IN_ORDER)  # one request may come back before another
    with Recorder(device, path), wire(device, via, features=features) as wired:
        wired.driver.probe()
        use(wired)
    device.close()
    return [event.kind for event in RecordingReader(path) if event.kind.is_cause]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.vqrec"


# --- alarms --------------------------------------------------------------------------------------


def several(wired: Wired) -> None:
    """Both alarms ring, one is set anew as it rings, one is cancelled; a reset comes in between."""
    device = wired.device
    assert isinstance(device, Waiter)
    for _ in range(3):
        ask(wired)
    ring(device.next)
    ring(device.next)
    assert answers(wired) == [b"in time"] * 2
    ring(device.patience)
    assert answers(wired) == [b"late"]
    assert wired.driver.read_config(0, 4) == b"\1\0\0\0"
    ask(wired)
    ask(wired, b"cancel")
    assert device.patience.deadline is None and answers(wired) == [b""]
    ask(wired)
    wired.driver.reset()
    assert device.next.deadline is None
    wired.driver.probe()
    ask(wired)
    ring(device.next)
    assert answers(wired) == [b"in time"]


@pytest.mark.parametrize("via", WIRES)
def test_alarms_ring_in_a_replay_where_they_rang(path: Path, via: str) -> None:
    causes = record(path, Waiter(), several, via)
    assert causes.count(Kind.ALARM) == 4 and Kind.OUTSIDE not in causes
    session = Replay(path)
    assert session.run(Waiter()) == []
    assert session.compared["chains"] == 5


def test_alarms_that_a_clock_rings_are_recorded(path: Path) -> None:
    def use(wired: Wired) -> None:
        for _ in range(5):
            assert wired.request(0, b"text", 8) == b"in time"

    assert record(path, Waiter(0.002), use).count(Kind.ALARM) >= 5
    assert_replays(path, Waiter(0.002))
    assert_replays(path, Waiter(NEVER))  # however long it would take


def test_no_clock_runs_in_a_replay(path: Path) -> None:
    def use(wired: Wired) -> None:
        ask(wired)
        assert answers(wired) == []

    record(path, Waiter(), use)
    assert_replays(path, Waiter(0))


steps = st.lists(
    st.sampled_from(["ask", "cancel", "next", "patience", "collect", "config", "reset"]),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(steps=steps)
def test_whenever_alarms_ring_a_replay_does_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    path = tmp_path_factory.mktemp("alarms") / "session.vqrec"
    device = Waiter()

    def use(wired: Wired) -> None:
        for step in steps:
            match step:
                case "ask" | "cancel":
                    if wired.driver.queues[0].num_free >= 2:
                        ask(wired, step.encode())
                case "next" | "patience":
                    ring(getattr(device, step))
                case "collect":
                    answers(wired)
                case "config":
                    wired.driver.read_config(0, 4)
                case "reset":
                    wired.driver.reset()
                    wired.driver.probe()

    record(path, device, use)
    assert_replays(path, Waiter())


def test_a_device_that_answers_otherwise_when_its_alarm_rings_is_found_out(path: Path) -> None:
    record(path, Waiter(), several)

    class Wrong(Waiter):
        def answer(self, text: bytes) -> None:
            super().answer(text.replace(b"late", b"soon"))

    class Forgets(Waiter):
        def answer_next(self) -> None:
            self.answer(b"in time")

    with pytest.raises(AssertionError, match="byte 0 of 4"):
        assert_replays(path, Wrong())
    with pytest.raises(
        AssertionError, match=r"not given back\n.*alarm 0 rang then, and is not set"
    ):
        assert_replays(path, Forgets())


def test_an_alarm_that_the_device_does_not_have_is_an_error(path: Path) -> None:
    class Fewer(Waiter):
        def __init__(self) -> None:
            super().__init__()
            self.alarms.clear()

    record(path, Waiter(), several)
    with pytest.raises(CaptureError, match="alarm 0 rings, and Fewer has 0"):
        assert_replays(path, Fewer())


def test_an_alarm_that_is_made_later_is_recorded_too(path: Path) -> None:
    class Late(Waiter):
        def driver_ready(self) -> None:
            if len(self.alarms) == 2:
                self.next = self.alarm(self.answer_next)

    def use(wired: Wired) -> None:
        ask(wired)
        ring(wired.device.alarms[2])
        assert answers(wired) == [b"in time"]

    record(path, Late(), use)
    assert_replays(path, Late())


def test_alarms_that_look_outside_are_no_causes_and_ring_by_the_clock(path: Path) -> None:
    class Looks(Waiter):
        def __init__(self) -> None:
            super().__init__()
            self.looks = 0
            self.look = self.alarm(self.look_around, outside=True)
            self.look.set(0)
            self.alarms.insert(0, self.alarms.pop())  # places are counted without it

        def look_around(self) -> None:
            self.looks += 1
            self.look.set(0)

    device, again = Looks(), Looks()
    causes = record(path, device, several)
    assert device.looks > 1 and causes.count(Kind.ALARM) == 4
    assert_replays(path, again)
    assert again.looks > 1


def test_the_device_is_as_before_when_the_recorder_has_let_go(path: Path) -> None:
    device = Waiter()
    descriptors = os.pipe()
    device.watch(descriptors[0], readable=lambda: None)
    things = [device, *device.alarms, *device.watches]
    before = [dict(vars(thing)) for thing in things]
    recorder = Recorder(device, path)
    assert [dict(vars(thing)) for thing in things] != before
    recorder.close()
    assert [dict(vars(thing)) for thing in things] == before
    device.close()
    for descriptor in descriptors:
        os.close(descriptor)


# --- recordings of version 1 ---------------------------------------------------------------------

VERSION_1 = """
VlFSRUMBAAC7AAAAeyJkZXZpY2UiOiAiX19tYWluX186VXBwZXIiLCAiZGV2aWNlX2lkIjogNjMsICJxdWV1ZXMiOiBbWyJy
ZXF1ZXN0cyIsIDRdXSwgImZlYXR1cmVzIjogMTEzODk3MTYzOTgwOCwgImZyb21fb3V0c2lkZSI6IFtdLCAic2VydmVkIjog
W10sICJsaW5rIjogbnVsbCwgImJlZ2FuIjogIjIwMjYtMTEtMjZUMDQ6MzU6MDUrMDA6MDAifQwBAADMAwAAeAGVUcFKw0AU
3HQlditS0fQs9pQcFgV7K2KheE17KPQLvJpLoVfBH/PTnJEdedlG0AfZ997szOzLri9HzhWuH/ETfQ76qQG1Ge8HQH9mQI+a
ES+xSCZwVBoQ5UMAwwcDXqBmxEcskgsslgB52HdcnRQru1GO0fGzIbGySyarlLc/plaFGRfoNQ4vhhGvseRgaAxIFqO6wzLD
JzZBW/+lx8P1Ite/p9l12drP80fGy32tT/f2Wrc4lZ7ysUPoLOZN+9LYpxQvrAfE1Q3A/EY0iU5SlpN68ZR/27d/Qo70dmri
/7mRw7Grb6Ghh/zooVms926/mZ0nLjl5SN9QrEakyVwV8vPTAOMLukEPtA==
"""
"""Two requests of a driver, as the vq before recorded them."""


class Upper(DeviceModel):
    device_id = 0x3F

    def __init__(self) -> None:
        super().__init__(queues=[("requests", 4, self.answer)])

    def answer(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.writer.write(self.change(request.reader.read()))
            request.complete()

    def change(self, text: bytes) -> bytes:
        return text.upper()


def test_a_recording_of_version_1_is_replayed(path: Path) -> None:
    path.write_bytes(base64.b64decode(VERSION_1))
    session = Replay(path)
    assert session.reader.version == 1
    assert session.run(Upper()) == []
    assert session.compared["chains"] == 2

    class Title(Upper):
        def change(self, text: bytes) -> bytes:
            return text.title()

    with pytest.raises(AssertionError, match="byte 1 of 3"):
        assert_replays(path, Title())


def test_in_a_recording_without_alarms_they_ring_by_the_clock(path: Path) -> None:
    def use(wired: Wired) -> None:
        assert wired.request(0, b"text", 8) == b"in time"

    record(path, Waiter(0), use)
    old = path.with_name("old.vqrec")
    reader = RecordingReader(path)
    with RecordingWriter(old, reader.header) as writer:
        for event in reader:
            if event.kind not in (Kind.ALARM, Kind.END):
                writer.write(event.kind, event.numbers, event.strings)
    data = old.read_bytes()
    assert data[5] == 2
    with pytest.raises(AssertionError, match="not given back"):
        assert_replays(old, Waiter(0))
    old.write_bytes(data[:5] + b"\1" + data[6:])
    assert_replays(old, Waiter(0))


# --- what a recording does not have --------------------------------------------------------------


class Piped(Waiter):
    """Answers when something is in a pipe, with what it is; or keeps it for later answers."""

    def __init__(self, *, at_once: bool = True) -> None:
        super().__init__()
        self.ends = os.pipe()
        self.at_once = at_once
        self.word = b"nothing"
        self.watch(self.ends[0], readable=self.read).want(reading=True)

    def read(self) -> None:
        self.say(os.read(self.ends[0], 8))

    def say(self, word: bytes) -> None:
        self.word = word
        if self.at_once:
            self.answer(word)

    def answer_next(self) -> None:
        self.answer(self.word)

    def close(self) -> None:
        super().close()
        for end in self.ends:
            if end >= 0:
                os.close(end)
        self.ends = (-1, -1)


class Named(Piped):
    """Has a name for what it does then."""

    host_methods: ClassVar = ("say",)


def piped(wired: Wired) -> None:
    device = wired.device
    assert isinstance(device, Piped)
    ask(wired)
    os.write(device.ends[1], b"news")
    wired.turn(3)
    if not device.at_once:
        ring(device.next)
    assert answers(wired) == [b"news"]
    ask(wired)
    ring(device.patience)
    assert answers(wired) == [b"late"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what will not come."""
    monkeypatch.setattr("vq.recording.player._PATIENCE", 0.1)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.usefixtures("impatient")
def test_a_descriptor_that_is_not_recorded_ends_the_replay_and_is_named(
    path: Path, at_once: bool
) -> None:
    causes = record(path, Piped(at_once=at_once), piped)
    assert causes.count(Kind.OUTSIDE) == 1
    step = 1 + causes.index(Kind.OUTSIDE)
    differences = Replay(path).run(device := Piped(at_once=at_once))
    device.close()
    assert f"the replay ends here: step {step}, which may be why" in differences[-1].what
    assert "descriptor" in differences[-1].what and "host_methods" in differences[-1].what
    assert len(differences) == 2
    assert_replays(path, Piped(at_once=at_once), ignore=["requests"])


def test_a_descriptor_that_is_there_in_the_replay_too_gets_time(path: Path) -> None:
    class Timer(Piped):
        """What comes in the pipe is a timer's doing, say."""

        def keep(self, requests: Sequence[Request]) -> None:
            super().keep(requests)
            if self.word == b"nothing":
                threading.Timer(0.05, os.write, (self.ends[1], b"news")).start()

    def use(wired: Wired) -> None:
        assert wired.request(0, b"text", 8) == b"news"

    record(path, Timer(), use)
    assert_replays(path, Timer())


@pytest.mark.parametrize("at_once", [True, False])
def test_what_the_host_does_by_a_method_that_is_named_is_replayed(
    path: Path, at_once: bool
) -> None:
    causes = record(path, Named(at_once=at_once), piped)
    assert Kind.HOST in causes and Kind.OUTSIDE not in causes
    assert_replays(path, Named(at_once=at_once))


@pytest.mark.usefixtures("impatient")
def test_what_the_host_does_by_another_method_ends_the_replay(path: Path) -> None:
    def in_a_ring(wired: Wired) -> None:
        ask(wired)
        wired.device.give_up()  # type: ignore[attr-defined]
        wired.device.flush()  # type: ignore[attr-defined]
        assert answers(wired) == [b"late"]

    def early(wired: Wired) -> None:
        wired.driver.reset()
        wired.driver.negotiate()
        wired.device.update_config(given_up=7)  # the driver is not to be told yet
        wired.driver.setup_queue(0)
        wired.driver.start()
        assert wired.driver.read_config(0, 4) == b"\7\0\0\0"

    for use in (in_a_ring, early):
        assert Kind.OUTSIDE in record(path, Waiter(), use)
        with pytest.raises(AssertionError, match=r"the replay ends here: step .* the host's doing"):
            assert_replays(path, Waiter())


# --- threads of the model's own ------------------------------------------------------------------


class Threaded(Waiter):
    """Leaves requests to threads that nobody knows of."""

    threads: ClassVar[list[threading.Thread]] = []

    def keep(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.threads.append(threading.Timer(0.02, self.work, (request,)))
            self.threads[-1].start()

    def work(self, request: Request) -> None:
        request.writer.write(b"done")
        request.complete()


class Lazy(Threaded):
    def work(self, request: Request) -> None:
        pass


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    while Threaded.threads:
        Threaded.threads.pop().join()


def test_threads_of_the_models_own_get_time(path: Path) -> None:
    def use(wired: Wired) -> None:
        for _ in range(3):
            assert wired.request(0, b"text", 8) == b"done"

    record(path, Threaded(), use)
    assert Kind.LATER in {event.kind for event in RecordingReader(path)}
    assert_replays(path, Threaded())


@pytest.mark.usefixtures("impatient")
def test_what_a_thread_does_not_complete_any_more_is_said_to_be_that(path: Path) -> None:
    record(path, Threaded(), lambda wired: wired.request(0, b"text", 8))
    with pytest.raises(AssertionError, match=r"not given back\n.*a thread, or the host, completed"):
        assert_replays(path, Lazy())


# --- queues and links ----------------------------------------------------------------------------


def test_a_queue_that_is_taken_away_by_a_register_is_in_the_recording(path: Path) -> None:
    """virtio-mmio's QueueReady: the replay's queue was set up twice without it."""

    def use(wired: Wired) -> None:
        assert wired.request(0, b"text", 8) == b"TEXT"
        wired.device.drop_queue(0)
        wired.driver.setup_queue(0)
        assert wired.request(0, b"more", 8) == b"MORE"

    assert record(path, Upper(), use).count(Kind.QUEUE_DROP) == 1
    assert_replays(path, Upper())


class Mended(ScriptedLink):
    """Can be used again as soon as somebody looks."""

    def recover(self) -> None:
        self.port.error = None
        assert self.on_change is not None
        self.on_change()


@pytest.mark.parametrize("reading", [False, True])
def test_a_link_that_breaks_and_comes_back_is_in_the_recording(path: Path, reading: bool) -> None:
    link = Mended()
    device = NetDevice(link)
    frame = ethernet(b"a frame")
    with Recorder(device, path), GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        device.memory = memory
        driver = NetDriver(device, memory, queue_size=32)
        driver.send(frame)
        link.port.error = OSError(errno.EIO, "unplugged")
        if reading:
            link.deliver(frame)
        else:
            driver.send(frame)
        assert not driver.settings.link_up
        driver.send(frame)  # in vain
        [alarm] = device.alarms
        ring(alarm)
        assert driver.settings.link_up
        link.deliver(frame)
        driver.send(frame)
        assert len(driver.receive()) == 1 + reading
        driver.close()
        device.memory = None
    kinds = [event.kind for event in RecordingReader(path)]
    assert Kind.LINK_BROKE in kinds and Kind.LINK_CHANGED in kinds
    assert Kind.ALARM not in kinds and Kind.OUTSIDE not in kinds
    session = Replay(path)
    assert session.link is not None
    assert session.run(NetDevice(session.link)) == []
    assert session.compared["frames sent"] == 2
    words = "\n".join(describe(session.reader))
    assert f"port 0 fails in {'reading' if reading else 'writing'}: " in words


def test_a_state_that_comes_from_another_host_is_in_the_recording(path: Path) -> None:
    device = NetDevice(LoopbackLink())
    elsewhere = NetDevice(LoopbackLink(), mac=bytes.fromhex("020000000007")).save_state()
    with Recorder(device, path), GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        device.memory = memory
        driver = NetDriver(device, memory, queue_size=32)
        device.load_state(elsewhere)
        with pytest.raises(UsageError, match="not a network device's state"):
            device.load_state(b"{}")
        assert device.read_config(0, 6) == bytes.fromhex("020000000007")
        driver.close()
        device.memory = None
    assert_replays(path, NetDevice)


# --- in words ------------------------------------------------------------------------------------


def test_causes_that_are_not_the_drivers_are_told_in_words(path: Path) -> None:
    with Recorder(device := Piped(), path), wire(device) as wired:
        wired.driver.probe()
        piped(wired)
        device.drop_queue(0)
    device.close()
    reader = RecordingReader(path)
    text = "\n".join(describe(reader))
    assert "alarm 1 rings" in text
    assert "the host does something that is not recorded" in text
    assert "takes requests away" in text
    told = [as_json(event, reader.header) for event in reader]
    assert {"event": "alarm", "alarm": 1} in [
        {name: fields[name] for name in ("event", "alarm")} for fields in told if "alarm" in fields
    ]
    assert [fields["queue"] for fields in told if fields["event"] == "queue_drop"] == ["requests"]
