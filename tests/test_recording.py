"""Sessions recorded, replayed and shown: the same device does the same, another is found out."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manual_loop import ManualLoop
from net_world import ScriptedLink, ethernet

from vq import cli
from vq.abi import CtrlRx, DeviceId, Feature
from vq.device import Device, Queue
from vq.devices.entropy import EntropyDevice
from vq.driver import Driver
from vq.errors import CaptureError, UsageError
from vq.link import Link, LoopbackLink
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.net import NetDevice
from vq.net_driver import NetDriver
from vq.recording import (
    Event,
    Header,
    Kind,
    Recorder,
    RecordingReader,
    RecordingWriter,
    Replay,
    describe,
    replay,
)
from vq.recording.ring import Found, FoundChain, RecordingRing
from vq.recording.show import as_json
from vq.request import Request
from vq.split_ring import SplitRing
from vq.testing.hostile import Case, run_case
from vq.testing.hostile_cases import CASES
from vq.testing.recordings import assert_replays
from vq.testing.vhost_frontend import VhostFrontend
from vq.testing.wiring import WIRES, Wired, wire
from vq.vhost_user import Connection, unwatch_device, watch_device

HEADER = Header(device="m:D", device_id=4, queues=[("requests", 64)], features=1 << 32)


class Space(ctypes.LittleEndianStructure):
    _fields_ = (("volume", ctypes.c_uint32),)


class Shouter(DeviceModel):
    """Answers in capitals; a number at the front says how much may be written."""

    device_id = DeviceId.ENTROPY

    def __init__(self, *, volume: int = 7) -> None:
        super().__init__(
            queues=[("requests", 16, self.shout), ("quiet", 16, None)], config=Space(volume=volume)
        )

    def shout(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.writer.write(self.answer(request.reader.read()))
            request.complete()

    def answer(self, text: bytes) -> bytes:
        return text.upper()


def use(wired: Wired) -> None:
    wired.driver.probe()
    assert wired.transport.read_config(0, 4) == b"\7\0\0\0"
    for number in range(40):
        text = b"number %d" % number
        assert wired.request(0, text, 20, pieces=5) == text.upper()


def record(path: Path, device: Device, use: Callable[[Wired], None], via: str = "direct") -> None:
    with Recorder(device, path), wire(device, via) as wired:
        use(wired)
    device.close()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "session.vqrec"
    record(path, Shouter(), use)
    return path


# --- the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize("via", WIRES)
def test_the_same_device_does_the_same(tmp_path: Path, via: str) -> None:
    path = tmp_path / "session.vqrec"
    record(path, Shouter(), use, via)
    session = Replay(path)
    assert session.run(Shouter()) == []
    assert session.reader.complete
    assert session.compared["chains"] == 40
    assert session.compared["configuration reads"] >= 1
    assert session.compared["answers"] >= 4


def test_a_recording_can_be_replayed_again_and_again(recording: Path) -> None:
    session = Replay(recording)
    for _ in range(3):
        assert session.run(Shouter()) == []
    assert_replays(recording, Shouter())


def test_threads_get_the_time_that_they_need(tmp_path: Path) -> None:
    pool = ThreadPoolExecutor(2)

    class Slow(Shouter):
        def shout(self, requests: Sequence[Request]) -> None:
            for request in requests:
                self.run_in(pool, self.work, request)

        def work(self, request: Request) -> None:
            time.sleep(0.002)
            request.writer.write(request.reader.read().upper())

    path = tmp_path / "session.vqrec"
    record(path, Slow(), use)
    for device in (Slow(), Shouter()):
        assert_replays(path, device)
    record(path, Shouter(), use)
    assert_replays(path, Slow())
    pool.shutdown()


def test_in_what_bursts_chains_are_taken_is_the_devices_business(tmp_path: Path) -> None:
    class OneByOne(Shouter):
        def _take(self, queue: Queue, ring: SplitRing, limit: int) -> list[Request]:
            return super()._take(queue, ring, 1)

    def many(wired: Wired) -> None:
        driver = wired.driver
        driver.probe()
        for _ in range(5):
            for _ in range(6):
                place = driver.allocator.allocate(16)
                wired.memory.write(place, b"text")
                driver.queues[0].add([(place, 4)], [(place + 8, 4)])
            driver.kick(0)
            assert len(driver.queues[0].collect()) == 6

    path = tmp_path / "session.vqrec"
    record(path, Shouter(), many)
    assert_replays(path, OneByOne())
    record(path, OneByOne(), many)
    assert_replays(path, Shouter())


def test_a_chain_may_come_back_earlier_than_it_did(tmp_path: Path) -> None:
    """A flush of a block device was done by a thread, and the driver kicked before it was done."""

    class Late(Shouter):
        kept: Sequence[Request] = ()

        def shout(self, requests: Sequence[Request]) -> None:
            self.kept = requests

        def notify(self, index: int, /) -> None:
            kept, self.kept = self.kept, ()
            super().notify(index)
            super().shout(kept)
            self.flush()

    def use(wired: Wired) -> None:
        driver = wired.driver
        driver.probe()
        for _ in range(5):
            place = driver.allocator.allocate(16)
            wired.memory.write(place, b"text")
            driver.queues[0].add([(place, 4)], [(place + 8, 4)])
            driver.kick(0)
            wired.transport.notify(0)
            wired.turn()
            assert len(driver.queues[0].collect()) == 1

    path = tmp_path / "session.vqrec"
    record(path, Late(), use)
    assert_replays(path, Late())
    assert_replays(path, Shouter())
    record(path, Shouter(), use)
    with pytest.raises(AssertionError, match="is not given back"):
        assert_replays(path, Late())


def test_work_that_is_left_for_another_turn_is_done_in_that_turn(tmp_path: Path) -> None:
    """A guest asked for offloads just when the device asked for kicks: that was the next turn's."""

    class Slow(NetDevice):
        """Whose guest is quick: a command is there when the device is done with the kick."""

        def _control(self, queue: Queue, ring: SplitRing) -> bool:
            if late:
                assert not ring.pop_burst(64)
                late.pop()()
                return ring.enable_kicks()
            return super()._control(queue, ring)

    late: list[Callable[[], object]] = []
    path = tmp_path / "net.vqrec"
    device = Slow(LoopbackLink())
    left: list[int] = []
    with Recorder(device, path), GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        device.memory = memory
        device.on_work_left = left.append
        driver = Driver(device, memory, -1)
        driver.probe()
        place = driver.allocator.allocate(16)
        memory.write(place, bytes((5, 0)) + bytes(8))  # 5.1.6.5.8: no offloads at all
        ring = driver.queues[2]
        ring.add([(place, 10)], [(place + 12, 1)])
        late.append(ring.publish)
        device.notify(2)
        assert left == [2] and not ring.collect()
        device.notify(2)
        assert len(ring.collect()) == 1 and memory.read(place + 12, 1) == b"\0"
        device.on_work_left = None
        driver.close()
        device.memory = None
    assert_replays(path, NetDevice)


def test_a_wish_that_changes_within_a_turn_is_found_when_it_was(tmp_path: Path) -> None:
    """A guest that runs beside the device turned calls off between two looks at its wish: both
    were given what the second had found.
    """

    class OneByOne(Shouter):
        def process(self, queue: Queue, ring: SplitRing) -> bool:
            for chain in ring.pop_burst(8):
                ring.write_used(chain)
                self.publish(queue)
                if meanwhile:
                    meanwhile.pop()()
            return False

    def use(wired: Wired) -> None:
        wired.driver.wanted_features = 1 << Feature.VERSION_1
        wired.driver.probe()
        ring = wired.driver.queues[0]
        for count in (1, 1, 3):  # the first call comes whatever the driver wishes
            if count > 1:
                meanwhile.append(ring.disable_calls)
            for _ in range(count):
                ring.add([(wired.driver.allocator.allocate(16), 16)])
            ring.publish()
            wired.transport.notify(0)
            assert len(ring.collect()) == count

    meanwhile: list[Callable[[], object]] = []
    path = tmp_path / "session.vqrec"
    record(path, OneByOne(), use)
    meanwhile.clear()
    assert_replays(path, OneByOne())


def test_no_call_waits_and_no_loop_looks_while_a_session_is_recorded(tmp_path: Path) -> None:
    """What they do would stand in the recording where nothing caused it."""

    class Unhurried(Shouter):
        def process(self, queue: Queue, ring: SplitRing) -> bool:
            for chain in ring.pop_burst(8):
                ring.write_used(chain)
            self.publish_without_haste(queue)
            return self.rest(queue, ring)

    def use(wired: Wired) -> None:
        wired.driver.probe()
        device.event_loop = loop
        ring = wired.driver.queues[0]
        for _ in range(3):
            ring.add([(wired.driver.allocator.allocate(16), 16)])
            ring.publish()
            wired.transport.notify(0)
            assert len(ring.collect()) == 1 and not loop.waiting and not loop.lookouts
        device.event_loop = None

    loop = ManualLoop()
    device = Unhurried()
    path = tmp_path / "session.vqrec"
    record(path, device, use)
    assert_replays(path, Unhurried())


# --- otherwise -----------------------------------------------------------------------------------


class WrongByte(Shouter):
    def answer(self, text: bytes) -> bytes:
        return text.upper().replace(b"17", b"71")


class TooShort(Shouter):
    def answer(self, text: bytes) -> bytes:
        return text.upper()[:8]


class Mute(Shouter):
    def publish(self, queue: Queue) -> None:
        if queue.ring is not None:
            queue.ring.publish()


class Louder(Shouter):
    def __init__(self) -> None:
        super().__init__(volume=8)


class Fails(Shouter):
    def answer(self, text: bytes) -> bytes:
        return text.upper() if b"17" not in text else bytes(1 // 0)


class OffersLess(Shouter):
    @property
    def device_features(self) -> int:
        return 1 << 32

    def _refusal(self) -> str | None:
        return "features" if self.driver_features != 1 << 32 else None


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        (WrongByte, "requests: the chain at .*: byte 7 of 9: .* 37 31, not .* 31 37"),
        (TooShort, "has 8 bytes written, not 9"),
        (Mute, "the driver is not called, which it was"),
        (Louder, "the configuration at 0: byte 0 of 4"),
        (Fails, "is not given back"),
        (Fails, "told of a change of the configuration, which it was not"),
        (OffersLess, "the answer is 0x3, not 0xb"),
    ],
)
def test_another_device_is_found_out(
    recording: Path, device: type[Shouter], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert_replays(recording, device())


def test_what_is_to_be_ignored_is_not_compared(recording: Path) -> None:
    assert replay(recording, WrongByte())
    assert replay(recording, WrongByte(), ignore=["requests"]) == []
    with pytest.raises(UsageError, match="no queue is 'other': the queues are requests, quiet"):
        replay(recording, Shouter(), ignore=["other"])


def test_a_device_with_other_queues_cannot_be_it(recording: Path) -> None:
    with pytest.raises(UsageError, match=r"not of a EntropyDevice with requests"):
        replay(recording, EntropyDevice())


def test_after_enough_differences_it_gives_up(recording: Path) -> None:
    class Wrong(Shouter):
        def answer(self, text: bytes) -> bytes:
            return text

    assert 5 <= len(Replay(recording).run(Wrong(), most=5)) < 10


def test_what_comes_from_outside_is_not_the_drivers_doing(tmp_path: Path) -> None:
    path = tmp_path / "rng.vqrec"

    def ask(wired: Wired) -> None:
        wired.driver.probe()
        for _ in range(10):
            assert len(wired.request(0, room=20)) == 20

    record(path, EntropyDevice(), ask)
    assert Replay(path).header.from_outside == ["requests"]
    assert_replays(path, EntropyDevice())


# --- network devices -----------------------------------------------------------------------------


def talk(device: NetDevice, link: ScriptedLink) -> list[bytes]:
    """A guest sends and receives, while the link is full and empty, up and down."""
    got: list[bytes] = []
    with GuestMemory.allocate((0x1000, 4 << 20)) as memory:
        device.memory = memory
        driver = NetDriver(device, memory, queue_size=32, receive_buffer_size=600)
        for number in range(30):
            driver.send(ethernet(b"%05d" % number * (1 + 40 * (number % 7))))
            if number % 10 == 3:
                link.port.takes = 2
            if number % 10 == 8:
                link.port.takes = None
                assert link.port.on_writable is not None
                link.port.on_writable()
            link.deliver(*(ethernet(b"%d" % n * 200 * (n % 9 + 1)) for n in range(number % 5)))
            got += [frame.data for frame in driver.receive()]
        device.set_link_up(False)
        device.set_link_up(True)
        driver.set_receive_mode(CtrlRx.PROMISC, False)
        got += [frame.data for frame in driver.receive()]
        driver.close()
        device.memory = None
    return got


def test_a_network_devices_link_is_in_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "net.vqrec"
    link = ScriptedLink()
    device = NetDevice(link)
    with Recorder(device, path):
        got = talk(device, link)
    assert len(got) > 30
    session = Replay(path)
    assert session.link is not None
    assert session.run(NetDevice(session.link)) == []
    assert session.compared["frames sent"] == 30
    assert_replays(path, NetDevice)
    kinds = {event.kind for event in session.reader}
    assert {Kind.LINK_FULL, Kind.LINK_READABLE, Kind.LINK_WRITABLE, Kind.HOST} <= kinds


class Corrupts(NetDevice):
    """A byte of a long frame gets lost on the way out."""

    def _write(self, port: int, frames: Sequence[list[object]], size: int) -> int:  # type: ignore[override]
        for frame in frames:
            if sum(map(len, frame)) > 900:  # type: ignore[arg-type]
                frame[1:] = [b"".join(map(bytes, frame[1:]))[:-1] + b"?"]  # type: ignore[arg-type]
        return super()._write(port, frames, size)  # type: ignore[arg-type]


class NoFilter(NetDevice):
    """Takes every command on the control queue for a bad one."""

    def _control(self, queue: Queue, ring: SplitRing) -> bool:
        chains = ring.pop_burst(64)
        for chain in chains:
            chain.writable[0][0] = 1
            chain.written = 1
        ring.write_used_burst(chains)
        self.publish(queue)
        return bool(chains) or ring.enable_kicks()


class Swaps(NetDevice):
    """Sends a burst backwards."""

    def _write(self, port: int, frames: Sequence[list[object]], size: int) -> int:  # type: ignore[override]
        return super()._write(port, frames[::-1], size)  # type: ignore[arg-type]


class Doubles(NetDevice):
    """Sends the last frame of a burst twice."""

    def _write(self, port: int, frames: Sequence[list[object]], size: int) -> int:  # type: ignore[override]
        super()._write(port, [*frames, frames[-1]], size)  # type: ignore[list-item]
        return len(frames)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Doubles, "frame 0 of this step: 19 bytes, not 219"),
        (Corrupts, "the bytes behind the first 64"),
        (NoFilter, "control: the chain at 0: byte 0 of 1"),
        (Swaps, "frame 1 of this step: .* bytes, not"),
        (lambda link: NetDevice(link, mac=bytes.fromhex("020000000002")), "the configuration at"),
    ],
)
def test_a_network_device_with_a_bug_is_found_out(
    tmp_path: Path, make: Callable[[Link], NetDevice], complaint: str
) -> None:
    path = tmp_path / "net.vqrec"
    link = ScriptedLink()
    device = NetDevice(link)
    with Recorder(device, path):
        talk(device, link)
    with pytest.raises(AssertionError, match=complaint):
        assert_replays(path, make)


def test_a_link_makes_a_network_device_or_none(recording: Path) -> None:
    with pytest.raises(UsageError, match="a device without a link"):
        assert_replays(recording, NetDevice)


# --- hostile drivers are recorded too ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::3], ids=[case.name for case in CASES[::3]])
def test_what_a_hostile_driver_does_is_recorded_and_replayed(tmp_path: Path, case: Case) -> None:
    if "changes while" in case.name:
        return  # two threads at once cannot be written down one after the other
    path = tmp_path / "hostile.vqrec"
    recorders: list[Recorder] = []

    def make() -> Device:
        device = NetDevice(LoopbackLink())
        recorders.append(Recorder(device, path))
        return device

    run_case(case, make, queue=1)
    recorders[0].close()
    assert_replays(path, NetDevice)


# --- the recorder --------------------------------------------------------------------------------


def test_a_device_is_as_before_when_the_recorder_has_let_go(tmp_path: Path) -> None:
    device = NetDevice(LoopbackLink())
    before = dict(vars(device)), vars(device.link.ports[0]).copy(), vars(device.link).copy()
    recorder = Recorder(device, tmp_path / "r")
    assert vars(device) != before[0]
    recorder.close()
    recorder.close()
    assert (vars(device), vars(device.link.ports[0]), vars(device.link)) == before
    device.close()


def test_recording_ends_at_its_limit_and_the_device_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Shouter()
    path = tmp_path / "r"
    with Recorder(device, path, limit=3000) as recorder, wire(device) as wired:
        use(wired)
        assert recorder.ended == "it has reached 0 MiB"
        assert not isinstance(device.queues[0].ring, RecordingRing) or (
            not device.queues[0].ring._recording
        )
        assert "notify" not in vars(device)
    assert "not recorded any more" in caplog.text
    events = list(RecordingReader(path))
    assert events[-1].kind is Kind.END and events[-1].numbers == (1,)
    assert sum(len(b"".join(event.strings)) for event in events) < 3000
    assert_replays(path, Shouter())


def test_a_full_disk_ends_the_recording_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this kernel has no /dev/full")
    device = Shouter()
    writer = RecordingWriter(tmp_path / "r", HEADER)
    writer._file.flush()
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    writer.write(Kind.KICK, [0])
    deadline = time.monotonic() + 5
    while writer.ended is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.ended == "No space left on device"
    writer.write(Kind.KICK, [0])
    writer.close()
    device.close()


def test_a_recording_of_a_killed_process_is_good_up_to_then(recording: Path) -> None:
    whole = recording.read_bytes()
    everything = list(RecordingReader(recording))
    for cut in range(len(whole) - 1, len(whole) - 400, -37):
        recording.write_bytes(whole[:cut])
        reader = RecordingReader(recording)
        events = list(reader)
        assert events == everything[: len(events)]
        assert not reader.complete
    assert replay(recording, Shouter()) == []
    assert "killed" in list(describe(RecordingReader(recording)))[-1]


def test_what_is_recorded_reaches_the_file_while_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RecordingWriter(path, HEADER) as writer:
        writer.write(Kind.KICK, [0])
        deadline = time.monotonic() + 5
        while not list(RecordingReader(path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [event.kind for event in RecordingReader(path)] == [Kind.KICK]


# --- the file ------------------------------------------------------------------------------------

events = st.tuples(
    st.sampled_from([kind for kind in Kind if kind is not Kind.END]),
    st.lists(st.integers(0, (1 << 64) - 1), max_size=20),
    st.lists(st.binary(max_size=300), max_size=5),
)


@settings(max_examples=30, deadline=None)
@given(written=st.lists(events, max_size=20))
def test_events_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[Kind, list[int], list[bytes]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "events"
    with RecordingWriter(path, HEADER) as writer:
        for event in written:
            writer.write(*event)
    reader = RecordingReader(path)
    read = list(reader)
    assert [(e.kind, list(e.numbers), list(e.strings)) for e in read[:-1]] == written
    assert read[-1].kind is Kind.END
    assert reader.complete and reader.header == HEADER
    times = [event.seconds for event in read]
    assert times == sorted(times)


def test_a_recording_is_for_its_owners_eyes(recording: Path) -> None:
    assert recording.stat().st_mode & 0o777 == 0o600


def test_numbers_that_no_register_holds_are_cut_to_64_bits(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "r", HEADER) as writer:
        writer.write(Kind.KICK, [-1, 1 << 64])
    assert next(iter(RecordingReader(tmp_path / "r"))).numbers == ((1 << 64) - 1, 0)


def test_the_file_in_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RecordingWriter(path, HEADER) as writer:
        writer.write(Kind.CONFIG_WRITE, [2], [b"ab"])
    data = path.read_bytes()
    assert data[:8] == b"VQREC\2\0\0"
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length])
    assert header["device"] == "m:D" and header["queues"] == [["requests", 64]]
    pieces = data[12 + length :]
    packed, unpacked = struct.unpack("<II", pieces[:8])
    assert packed == len(pieces) - 8 and packed <= unpacked
    body = zlib.decompress(pieces[8:]) if packed < unpacked else pieces[8:]
    assert len(body) == unpacked
    assert body[0:1] == b"\5" and body[5:13] == bytes([1, 0, 0, 0, 1, 0, 0, 0])
    assert body[13:27] == bytes([2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]) + b"ab"
    assert body[27:28] == b"\x3f"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is no recording"),
        (b"\x7fELF and more", "is no recording"),
        (b"VQREC\0\0\0....", "another version"),
        (b"VQREC\3\0\0....", "another version"),
        (b"VQREC\1\0\0\2\0\0\0{}", "header cannot be read"),
        (b"VQREC\1\0\0\xff\xff\xff\xff{", "header cannot be read"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "r"
    path.write_bytes(data)
    with pytest.raises(CaptureError, match=complaint):
        RecordingReader(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_recording_is_refused_or_replayed_but_never_more(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = tmp_path_factory.getbasetemp()
    path = base / "good"
    if not path.exists():
        record(path, Shouter(), use)
    events = [event for event in RecordingReader(path) if event.kind is not Kind.END]
    place = data.draw(st.integers(0, len(events) - 1))
    event = events[place]
    numbers = list(event.numbers)
    if numbers and data.draw(st.booleans()):
        which = data.draw(st.integers(0, len(numbers) - 1))
        numbers[which] = data.draw(st.sampled_from([0, 1, 255, 1 << 20, 1 << 40, (1 << 64) - 1]))
    else:
        numbers = numbers[: data.draw(st.integers(0, len(numbers)))]
    kind = data.draw(st.sampled_from([event.kind, *Kind]))
    events[place] = Event(kind, event.seconds, tuple(numbers), event.strings)
    bad = base / "bad"
    with RecordingWriter(bad, RecordingReader(path).header) as writer:
        for written in events:
            writer.write(written.kind, written.numbers, written.strings)
    device = Shouter()
    try:
        with contextlib.suppress(CaptureError, OSError):  # no memory for so large a guest, say
            replay(bad, device)
        with contextlib.suppress(CaptureError):
            list(describe(RecordingReader(bad)))
    finally:
        device.close()


def test_chains_survive_the_way_into_an_event_and_back() -> None:
    found = Found(
        1,
        7,
        5,
        True,
        2,
        [
            FoundChain(3, [(3, 0x1000, 16, 4, 0)], [(0x1000, bytes(16))], [(0x2000, b"data")]),
            FoundChain(9, [], [], []),
        ],
    )
    assert Found.from_event(*found.event()) == found


def test_a_recording_takes_no_other_files_place(tmp_path: Path) -> None:
    """A disk's image that was named twice, as the image and as the recording, was gone."""
    path = tmp_path / "image"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="image is there already, and is no recording"):
        Recorder(EntropyDevice(), path)
    assert path.read_bytes() == b"precious"
    for before in (b"", b"VQREC\1\0\0..."):
        path.write_bytes(before)
        Recorder(EntropyDevice(), path).close()
        assert RecordingReader(path).header.device_id == DeviceId.ENTROPY


# --- in words ------------------------------------------------------------------------------------


def test_a_recording_is_told_in_words(recording: Path) -> None:
    text = "\n".join(describe(RecordingReader(recording)))
    assert "device    test_recording:Shouter, type 4 (entropy)" in text
    assert "queues    requests (16), quiet (16)" in text
    assert "status 0xf (ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK)" in text
    assert "sets up requests: 16 descriptors at 0x" in text
    assert "kick requests" in text
    assert "requests: 0 available, 8 bytes: 6e 75 6d 62 65 72 20 30, room for 20" in text
    assert "requests: 0 given back, 8 bytes written: 4e 55 4d 42 45 52 20 30" in text
    assert "reads config 0+4: 07 00 00 00" in text


def test_features_have_the_names_that_the_device_gives_them(tmp_path: Path) -> None:
    """Those of a disk were told as numbers, and those of a model of one's own too."""
    path = tmp_path / "r"

    class Letters(enum.IntEnum):
        A = 0
        B = 9

    class Lettered(DeviceModel):
        device_id = 63
        feature_bits = Letters

        def __init__(self) -> None:
            super().__init__(queues=[("requests", 16, lambda requests: None)], features=Letters)

    with Recorder(device := Lettered(), path), wire(device) as wired:
        wired.driver.probe()
    lines = [line for line in describe(RecordingReader(path)) if "  features" in line]
    assert lines and " A, B, " in lines[0] and "VERSION_1" in lines[0] and "bit" not in lines[0]
    reader = RecordingReader(path)
    (told,) = (as_json(event, reader.header) for event in reader if event.kind is Kind.FEATURES)
    assert told["features"][:2] == ["A", "B"] and "VERSION_1" in told["features"]


def test_buffers_that_are_alike_are_told_in_one_line(tmp_path: Path) -> None:
    chains = [FoundChain(n, [(n, 0x1000, 100, 2, 0)], [], []) for n in (0, 1, 2, 5, 6)]
    chains.append(FoundChain(7, [(7, 0x1000, 200, 2, 0)], [], []))
    chains.append(FoundChain(8, [(8, 0x1000, 2, 0, 0)], [], [(0x1000, b"ab")]))
    path = tmp_path / "r"
    with RecordingWriter(path, HEADER) as writer:
        writer.write(Kind.CHAINS, *Found(0, 7, 0, True, 0, chains).event())
    assert [line.strip() for line in describe(RecordingReader(path))][-4:] == [
        "requests: 0 to 2 available, room for 100 each",
        "requests: 5 to 6 available, room for 100 each",
        "requests: 7 available, room for 200",
        "requests: 8 available, 2 bytes: 61 62",
    ]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_replays_what_serve_has_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.vqrec"
    link = ScriptedLink()
    device = NetDevice(link, mac=bytes.fromhex("020000000009"))
    words = ["net", "--mac", "02:00:00:00:00:09", "--link", "tap:gone"]
    with Recorder(device, path, served=words):
        talk(device, link)
    assert cli.main(["replay", str(path)]) == 0
    assert "as recorded" in capsys.readouterr().out
    assert cli.main(["replay", str(path), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["differences"] == [] and outcome["complete"] and outcome["steps"] > 50
    options = ["--device", "net", "--mac", "02:00:00:00:00:08"]
    assert cli.main(["replay", str(path), *options]) == 1
    assert "the configuration at 0: byte 5" in capsys.readouterr().out
    assert cli.main(["replay", str(path), "--json", *options]) == 1
    assert json.loads(capsys.readouterr().out)["differences"][0]["what"]


def test_the_command_shows(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(recording), "--show"]) == 0
    assert "kick requests" in capsys.readouterr().out
    assert cli.main(["replay", str(recording), "--show", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    chains = [event for event in told if event["event"] == "chains"]
    assert chains[0]["chains"][0]["readable"][0]["bytes"] == b"numbe".hex()
    assert told[-1]["event"] == "end"


def test_the_command_makes_no_device_that_has_something_of_the_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r"
    with Recorder(Shouter(), path, served=["test_recording:Shouter"]):
        pass
    assert cli.main(["replay", str(path)]) == 2
    assert "name it with --device test_recording:Shouter" in capsys.readouterr().err
    assert cli.main(["replay", str(path), "--device", "test_recording:Shouter"]) == 0
    with Recorder(Shouter(), path):
        pass
    assert cli.main(["replay", str(path)]) == 2
    assert "does not say how its device is made" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_with_its_use(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(recording), "--device", "rng", "--json"]) == 2
    assert "--json stands before --device" in capsys.readouterr().err
    assert cli.main(["replay", str(recording), "--device"]) == 2
    assert "--device takes a device" in capsys.readouterr().err
    assert cli.main(["replay", str(recording.parent / "none")]) == 2
    assert "none: No such file" in capsys.readouterr().err


def test_no_thread_is_left() -> None:
    assert not any("vq recording" in thread.name for thread in threading.enumerate())


# --- over vhost-user, with what only that has ----------------------------------------------------


class Keeper(Shouter):
    """Keeps requests until the one that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Request] = []

    def shout(self, requests: Sequence[Request]) -> None:
        self.kept += requests
        if any(bytes(request.reader.views()[0]) == b"all" for request in requests):
            kept, self.kept = self.kept, []
            for request in kept:
                request.writer.write(b"DONE")
                request.complete()

    def queue_dropped(self, queue: Queue) -> None:
        super().queue_dropped(queue)
        self.kept = []

    def queue_stopping(self, queue: Queue) -> None:
        super().queue_stopping(queue)
        self.kept = []


def test_a_connection_that_is_lost_and_taken_up_again_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "session.vqrec"
    device = Keeper()
    loop = Loop()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    with Recorder(device, path), GuestMemory.allocate((0x1000, 1 << 20)) as memory:
        watch_device(device, loop)
        connection = Connection(pairs[0][1], device, loop)
        frontend = VhostFrontend(
            pairs[0][0],
            memory,
            device_id=4,
            queue_count=2,
            queue_size=16,
            idle=lambda: loop.run_once(0),
        )
        driver = Driver(frontend, memory, -1 & ~(1 << 35), queue_size=16)
        driver.probe()

        def send(text: bytes) -> None:
            place = driver.allocator.allocate(32)
            memory.write(place, text)
            driver.queues[0].add([(place, len(text))], [(place + 16, 8)])
            driver.kick(0)
            for _ in range(5):
                frontend.poll()

        send(b"one")
        send(b"two")
        assert len(device.kept) == 2 and not driver.queues[0].collect()
        frontend.disconnect()
        loop.run_once(0)
        assert connection.closed and not device.kept
        connection = Connection(pairs[1][1], device, loop)
        frontend.reconnect(pairs[1][0])
        send(b"all")
        assert [used.written for used in driver.queues[0].collect()] == [4, 4, 4]
        frontend.close()
        connection.close()
        unwatch_device(device, loop)
    device.close()
    loop.close()
    kinds = [event.kind for event in RecordingReader(path)]
    assert kinds.count(Kind.MEMORY) == 2 and kinds.count(Kind.QUEUE_SETUP) == 4
    assert_replays(path, Keeper())

    class Loses(Keeper):
        def shout(self, requests: Sequence[Request]) -> None:
            super().shout([request for request in requests if request.serial == 3 or self.kept])

    with pytest.raises(AssertionError, match="is not given back"):
        assert_replays(path, Loses())
