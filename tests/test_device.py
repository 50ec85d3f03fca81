"""The device base: status, features, configuration space, queues and reset, with a small model."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import struct
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manual_loop import ManualLoop

from vq.abi import USED_F_NO_NOTIFY, Feature, Status, needs_event
from vq.device import LOOK_SECONDS, RING_FEATURES, Device, Queue, Watch, with_needs_met
from vq.errors import DriverError, UsageError
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.split_ring import Chain, SplitRing

VERSION_1 = 1 << Feature.VERSION_1
EVENT_IDX = 1 << Feature.EVENT_IDX
INDIRECT = 1 << Feature.INDIRECT_DESC
RING_RESET = 1 << Feature.RING_RESET
ACKNOWLEDGE, DRIVER, FEATURES_OK = Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK
DRIVER_OK, NEEDS_RESET, FAILED = Status.DRIVER_OK, Status.NEEDS_RESET, Status.FAILED
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK
UP = READY | DRIVER_OK

COLOUR, SHADES, FAR = 0, 1, 70  # the model's own features; SHADES needs COLOUR, FAR is far up

DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000
APART = 0x8000  # from one queue's parts to the next one's
BUFFERS = 0x6000


class Config(ctypes.LittleEndianStructure):
    _fields_ = (("shade", ctypes.c_uint16), ("depth", ctypes.c_uint32))
    _pack_ = 1


class Echo(Device):
    """Gives every chain back with its length in bytes as what was written; two chains a turn."""

    device_id = 0x7E
    feature_needs: ClassVar = {SHADES: 1 << COLOUR}

    def __init__(self, memory: GuestMemory | None, **more: object) -> None:
        more.setdefault("features", RING_FEATURES | 1 << COLOUR | 1 << SHADES | 1 << FAR)
        more.setdefault("queues", [("first", 8), ("second", 4)])
        more.setdefault("config", Config(shade=7, depth=0x01020304))
        super().__init__(memory=memory, **more)  # type: ignore[arg-type]
        self.happened: list[object] = []
        self.held: list[Chain] = []
        self.hold = False
        self.haste = True
        self.trouble: Callable[[str], None] = lambda step: None

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        self.note("process")
        for chain in ring.pop_burst(2):
            if self.hold:
                self.held.append(chain)
            else:
                chain.written = chain.writable_size
                ring.write_used(chain)
        self.trouble("written")
        (self.publish if self.haste else self.publish_without_haste)(queue)
        return self.rest(queue, ring)

    def note(self, step: str, *what: object) -> None:
        self.happened.append((step, *what) if what else step)
        self.trouble(step)

    def features_negotiated(self, features: int) -> None:
        self.note("features_negotiated", features)

    def driver_ready(self) -> None:
        self.note("driver_ready")

    def queue_started(self, queue: Queue) -> None:
        self.note("queue_started", queue.name)

    def queue_stopping(self, queue: Queue) -> None:
        self.note("queue_stopping", queue.name)
        assert queue.ring is not None
        queue.ring.undo_pop(self.held)
        self.held = []

    def queue_dropped(self, queue: Queue) -> None:
        self.note("queue_dropped", queue.name)
        assert queue.ring is None

    def device_reset(self) -> None:
        self.note("device_reset")
        self.held = []

    def take(self) -> list[object]:
        happened, self.happened = self.happened, []
        return happened


class Bench:
    """A device and what a driver does to it, by hand."""

    def __init__(self, memory: GuestMemory, **more: object) -> None:
        self.memory = memory
        self.device = Echo(memory, **more)
        self.calls: list[int] = []
        self.changes: list[int] = []
        self.device.on_queue_call = self.calls.append
        self.device.on_config_change = lambda: self.changes.append(self.device.status)
        self.offered = [0, 0]
        self.seen = [0, 0]

    def negotiate(self, features: int = VERSION_1) -> None:
        self.device.write_status(ACKNOWLEDGE)
        self.device.write_status(ACKNOWLEDGE | DRIVER)
        self.device.accept_features(features)
        self.device.write_status(READY)

    def bring_up(self, features: int = VERSION_1) -> Echo:
        self.negotiate(features)
        for index in range(2):
            self.setup(index)
        self.device.write_status(UP)
        assert self.device.status == UP
        self.device.take()
        return self.device

    def setup(self, index: int, **more: int) -> None:
        base = index * APART
        self.memory.write(base + AVAIL, bytes(0x100))
        self.memory.write(base + USED, bytes(0x100))
        self.offered[index] = self.seen[index] = 0
        self.place(index, **more)

    def place(self, index: int, **more: int) -> None:
        base = index * APART
        parts = {"size": 4, "desc": base + DESC, "avail": base + AVAIL, "used": base + USED}
        self.device.setup_queue(index, **{**parts, **more})

    def offer(self, index: int, *heads: int, gpa: int = BUFFERS) -> None:
        base = index * APART
        for head in heads:
            self.memory.write(base + DESC + 16 * head, struct.pack("<QIHH", gpa, head + 1, 2, 0))
            slot = self.offered[index] % 4
            self.memory.write(base + AVAIL + 4 + 2 * slot, struct.pack("<H", head))
            self.offered[index] += 1
        self.memory.write(base + AVAIL + 2, struct.pack("<H", self.offered[index]))

    def used(self, index: int) -> list[tuple[int, int]]:
        base = index * APART
        end = int.from_bytes(self.memory.read(base + USED + 2, 2), "little")
        found = []
        while self.seen[index] != end:
            place = base + USED + 4 + 8 * (self.seen[index] % 4)
            found.append(struct.unpack("<II", self.memory.read(place, 8)))
            self.seen[index] += 1
        return found

    def assert_works(self) -> None:
        for index in range(2):
            self.offer(index, 0, 1, 2)
            self.device.notify(index)
            assert self.used(index) == [(0, 1), (1, 2), (2, 3)]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(0x10000) as memory:
        yield memory


@pytest.fixture
def bench(memory: GuestMemory) -> Bench:
    return Bench(memory)


def assert_broken(bench: Bench, section: str | None, reason: str) -> None:
    """The device needs a reset for this reason, and works again after one."""
    device = bench.device
    assert device.status & NEEDS_RESET
    fault = device.fault
    assert isinstance(fault, DriverError) and fault.section == section and reason in fault.reason
    assert device.stats["driver_errors"] == 1
    assert bench.changes == ([device.status] if device.status & DRIVER_OK else [])
    # It does nothing until then.
    device.take()
    device.notify(0)
    assert device.take() == []
    device.write_status(0)
    assert (device.status, device.fault) == (0, None)
    bench.bring_up()
    bench.assert_works()


# --- making one ----------------------------------------------------------------------------------


def test_a_device_must_offer_version_1(memory: GuestMemory) -> None:
    with pytest.raises(UsageError, match="VERSION_1"):
        Echo(memory, features=RING_FEATURES & ~VERSION_1)


@pytest.mark.parametrize("size", [0, -1, 3, 100, 65536])
def test_a_queues_largest_size_is_a_power_of_two(memory: GuestMemory, size: int) -> None:
    with pytest.raises(UsageError, match=f"not {size}"):
        Echo(memory, queues=[("good", 32768), ("bad", size)])


def test_what_lacks_a_feature_that_it_needs_is_not_offered(memory: GuestMemory) -> None:
    assert Echo(memory, features=VERSION_1 | 1 << SHADES).device_features == VERSION_1
    both = VERSION_1 | 1 << SHADES | 1 << COLOUR
    assert Echo(memory, features=both).device_features == both


def test_needs_are_met_by_any_of_a_set_and_along_chains_of_needs() -> None:
    needs = {1: 1 << 0, 2: 1 << 1, 3: 1 << 1 | 1 << 4}
    assert with_needs_met(0b01110, needs) == 0
    assert with_needs_met(0b01111, needs) == 0b01111
    assert with_needs_met(0b11000, needs) == 0b11000
    assert with_needs_met(0b11110, needs) == 0b11000
    assert with_needs_met(0b1000, {}) == 0b1000


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 255), st.dictionaries(st.integers(0, 7), st.integers(0, 255)))
def test_what_is_left_has_its_needs_and_is_the_most(features: int, needs: dict[int, int]) -> None:
    def good(some: int) -> bool:
        return all(needs[bit] & some for bit in needs if some >> bit & 1)

    left = with_needs_met(features, needs)
    assert good(left) and not left & ~features
    assert all(not good(some) for some in range(256) if not some & ~features and some & ~left)


def test_a_queue_that_is_not_there_has_no_size(bench: Bench) -> None:
    assert [bench.device.queue_max_size(n) for n in (-1, 0, 1, 2, 99)] == [0, 8, 4, 0, 0]
    assert bench.device.queue_count == 2


# --- status and features -------------------------------------------------------------------------


def test_the_order_of_the_specification_leads_to_a_device_that_works(bench: Bench) -> None:
    device = bench.device
    assert device.status == 0
    bench.negotiate(VERSION_1 | EVENT_IDX)
    assert device.status == READY and device.driver_features == VERSION_1 | EVENT_IDX
    bench.setup(0)
    bench.setup(1)
    device.write_status(UP)
    assert device.status == UP and device.fault is None and bench.changes == []
    assert device.take() == [
        ("features_negotiated", VERSION_1 | EVENT_IDX),
        ("queue_started", "first"),
        ("queue_started", "second"),
        "driver_ready",
    ]
    device.write_status(UP)
    assert device.take() == [], "a status that was set is not set again"
    bench.assert_works()


def test_features_hold_from_features_ok_on(bench: Bench) -> None:
    device = bench.device
    device.accept_features(VERSION_1 | EVENT_IDX)
    assert not device.has_feature(Feature.EVENT_IDX)
    device.write_status(READY)
    assert device.has_feature(Feature.EVENT_IDX) and not device.has_feature(Feature.INDIRECT_DESC)
    device.write_status(0)
    assert not device.has_feature(Feature.EVENT_IDX)


@pytest.mark.parametrize(
    "features",
    [
        VERSION_1 | 1 << 5,  # not offered
        VERSION_1 | 1 << 63,
        VERSION_1 | 1 << 64,
        VERSION_1 | 1 << 127,
        VERSION_1 | 1 << SHADES,  # what it needs was not accepted
        0,
        EVENT_IDX,
        1 << COLOUR | 1 << SHADES,
    ],
)
def test_features_that_cannot_be_are_refused_and_may_be_chosen_again(
    bench: Bench, features: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = bench.device
    bench.negotiate(features)
    assert device.status == ACKNOWLEDGE | DRIVER, "FEATURES_OK reads back as not set"
    assert device.take() == [] and device.stats["features_refused"] == 1
    assert "FEATURES_OK refused" in caplog.text and device.fault is None
    assert not device.has_feature(Feature.VERSION_1) and not device.has_feature(5)
    device.accept_features(VERSION_1 | 1 << SHADES | 1 << COLOUR)
    device.write_status(READY)
    assert device.status == READY and device.has_feature(SHADES)


def test_features_beyond_64_bits_are_negotiated_like_others(bench: Bench) -> None:
    assert bench.device.device_features >> FAR & 1
    bench.bring_up(VERSION_1 | 1 << FAR)
    assert bench.device.has_feature(FAR)


def test_features_cannot_be_changed_after_features_ok(bench: Bench) -> None:
    bench.bring_up(VERSION_1)
    bench.device.accept_features(VERSION_1 | EVENT_IDX)
    assert bench.device.driver_features == VERSION_1
    assert_broken(bench, "3.1.1", "features accepted after FEATURES_OK")


@pytest.mark.parametrize("status", [ACKNOWLEDGE | DRIVER | DRIVER_OK, int(DRIVER_OK)])
def test_driver_ok_without_features_ok_is_refused(bench: Bench, status: int) -> None:
    bench.device.write_status(status)
    assert not bench.device.status & DRIVER_OK and bench.device.take() == []
    assert_broken(bench, "3.1.1", "DRIVER_OK without FEATURES_OK")


def test_driver_ok_together_with_refused_features_is_refused(bench: Bench) -> None:
    bench.device.accept_features(VERSION_1 | 1 << 5)
    bench.device.write_status(UP)
    assert not bench.device.status & (DRIVER_OK | FEATURES_OK)
    assert_broken(bench, "3.1.1", "DRIVER_OK without FEATURES_OK")


def test_features_ok_and_driver_ok_may_come_together(bench: Bench) -> None:
    bench.device.accept_features(VERSION_1)
    bench.device.write_status(UP)
    assert bench.device.status == UP
    assert bench.device.take() == [("features_negotiated", VERSION_1), "driver_ready"]


@pytest.mark.parametrize("cleared", [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK])
def test_a_status_bit_cannot_be_cleared(bench: Bench, cleared: int) -> None:
    bench.bring_up()
    bench.device.write_status(UP & ~cleared)
    assert bench.device.status == UP | NEEDS_RESET
    assert_broken(bench, "2.1.1", "a status bit was cleared")


def test_a_driver_that_failed_gets_nothing_done(bench: Bench) -> None:
    device = bench.bring_up()
    device.write_status(UP | FAILED)
    assert device.status == UP | FAILED and device.fault is None
    bench.offer(0, 0)
    device.notify(0)
    assert bench.used(0) == [] and device.take() == []
    device.write_status(UP)
    assert device.status & NEEDS_RESET, "and FAILED goes only with a reset"


def test_needs_reset_is_the_devices_bit(bench: Bench) -> None:
    device = bench.device
    bench.negotiate()
    device.write_status(READY | NEEDS_RESET)
    assert device.status == READY, "a driver cannot set it"
    bench.setup(0)
    device.write_status(UP)
    device.setup_queue(9, size=4, desc=DESC, avail=AVAIL, used=USED)
    assert device.status == UP | NEEDS_RESET
    device.write_status(UP)
    assert device.status == UP | NEEDS_RESET, "nor clear it, and to leave it out is no offence"
    assert device.stats["driver_errors"] == 1
    device.write_status(UP | NEEDS_RESET | FAILED)
    assert device.status == UP | NEEDS_RESET | FAILED


def test_needing_a_reset_is_told_only_after_driver_ok(bench: Bench) -> None:
    device = bench.device
    bench.negotiate()
    device.setup_queue(9, size=4, desc=DESC, avail=AVAIL, used=USED)
    assert device.status == READY | NEEDS_RESET and bench.changes == []
    device.write_status(0)
    bench.bring_up()
    device.setup_queue(9, size=4, desc=DESC, avail=AVAIL, used=USED)
    assert bench.changes == [UP | NEEDS_RESET], "and the bit is there when the driver is told"


# --- reset ---------------------------------------------------------------------------------------


def snapshot(device: Echo) -> dict[str, object]:
    """All of a device's state that is not for the transport or the host to set."""
    state = {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(device).items()
        if name not in ("stats", "happened", "trouble", "_generation", "config", "queues")
    }
    config = b"" if device.config is None else bytes(device.config)
    return {**state, "config": config, "queues": [dict(vars(queue)) for queue in device.queues]}


def test_a_reset_leads_back_to_exactly_the_first_state(bench: Bench) -> None:
    device = bench.device
    first = snapshot(device)
    assert first["_status"] == 0 and first["queues"]
    bench.bring_up(device.device_features)
    bench.assert_works()
    device.hold = True
    bench.offer(0, 3)
    device.notify(0)
    device.hold = False
    device.update_config(shade=1)
    device.accept_features(0)
    device.write_status(UP | FAILED)
    later = snapshot(device)
    changed = {name for name in first if later[name] != first[name]}
    assert changed == {"_status", "_driver_features", "fault", "config", "queues", "held"}
    assert later["_status"] == UP | FAILED | NEEDS_RESET
    device.take()
    resets = device.stats["resets"]
    device.write_status(0)
    assert snapshot(device) == first
    assert device.stats["resets"] == resets + 1 and device.stats["driver_errors"] == 1
    assert device.take() == [
        ("queue_dropped", "first"),
        ("queue_dropped", "second"),
        "device_reset",
    ]
    bench.bring_up()
    bench.assert_works()


def test_a_reset_before_anything_else_does_no_harm(bench: Bench) -> None:
    bench.device.write_status(0)
    assert bench.device.take() == ["device_reset"]
    bench.device.reset()
    bench.bring_up()
    bench.assert_works()


def test_a_reset_from_within_a_call_ends_the_work(bench: Bench) -> None:
    device = bench.bring_up()
    device.on_queue_call = lambda index: device.write_status(0)
    device.take()
    bench.offer(0, 0, 1, 2)
    device.notify(0)
    assert device.take()[0] == "process" and device.take() == []
    assert device.status == 0 and device.fault is None
    assert bench.used(0) == [(0, 1), (1, 2)], "the third is not looked at"


# --- configuration space -------------------------------------------------------------------------


def test_the_configuration_space_reads_as_zeros_beyond_its_end(bench: Bench) -> None:
    device = bench.device
    assert device.read_config(0, 6) == bytes.fromhex("0700 04030201")
    assert device.read_config(1, 3) == bytes.fromhex("00 0403")
    assert device.read_config(4, 6) == bytes.fromhex("0201 00000000")
    assert device.read_config(6, 2) == device.read_config(1 << 40, 2) == b"\0\0"
    assert device.read_config(0, 0) == b""


def test_a_device_without_configuration_space_reads_as_zeros(memory: GuestMemory) -> None:
    device = Echo(memory, config=None)
    assert device.read_config(0, 4) == bytes(4)
    with pytest.raises(UsageError, match="no configuration space"):
        device.update_config(shade=1)
    device.reset()


def test_the_configuration_space_is_read_only(bench: Bench) -> None:
    bench.device.write_config(0, b"\xff\xff")
    bench.device.write_config(1 << 40, bytes(1 << 16))
    assert bench.device.read_config(0, 2) == b"\7\0"
    assert bench.device.stats["config_writes_ignored"] == 2


def test_a_changed_configuration_has_another_generation_and_is_told(bench: Bench) -> None:
    device = bench.device
    generations = [device.config_generation]
    device.update_config(shade=8)
    generations.append(device.config_generation)
    assert bench.changes == [], "not before DRIVER_OK"
    bench.bring_up()
    device.update_config(shade=9, depth=1)
    generations.append(device.config_generation)
    assert bench.changes == [UP]
    assert device.read_config(0, 6) == bytes.fromhex("0900 01000000")
    device.write_status(0)
    generations.append(device.config_generation)
    assert device.read_config(0, 6) == bytes.fromhex("0700 04030201")
    assert len(set(generations)) == 4, "a reset that changes it back counts, too"
    device.write_status(0)
    assert device.config_generation == generations[-1]


def test_a_field_that_is_not_there_cannot_be_changed(bench: Bench) -> None:
    with pytest.raises(UsageError, match="no shadow"):
        bench.device.update_config(shade=8, shadow=1)
    assert bench.device.read_config(0, 2) == b"\7\0" and bench.device.config_generation == 0


# --- queues --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "parts", "section", "reason"),
    [
        (2, {}, None, "no queue 2"),
        (-1, {}, None, "no queue -1"),
        (1, {"size": 8}, "4.1.4.3.2", "a size of 8"),
        (0, {"size": 65536}, "4.1.4.3.2", "a size of 65536"),
        (0, {"size": 3}, "2.7", "power of two"),
        (0, {"size": 0}, "2.7", "power of two"),
        (0, {"desc": DESC + 8}, "2.7", "aligned"),
        (0, {"avail": 0x10000}, "2.7", "memory"),
        (0, {"used": 1 << 63}, "2.7", "memory"),
    ],
)
def test_a_queue_that_breaks_a_rule_is_refused(
    bench: Bench, index: int, parts: dict[str, int], section: str | None, reason: str
) -> None:
    bench.negotiate()
    bench.device.take()
    bench.device.setup_queue(
        index, **{"size": 4, "desc": DESC, "avail": AVAIL, "used": USED, **parts}
    )
    assert bench.device.take() == []
    assert all(queue.ring is None and not queue.enabled for queue in bench.device.queues)
    assert_broken(bench, section, reason)


def test_a_queue_cannot_be_set_up_before_features_ok(bench: Bench) -> None:
    # The ring would go by features that may yet be refused.
    bench.device.write_status(ACKNOWLEDGE | DRIVER)
    bench.device.accept_features(VERSION_1 | 1 << 5)
    bench.setup(0)
    assert bench.device.queues[0].ring is None
    assert_broken(bench, "3.1.1", "before FEATURES_OK")


def test_a_queue_cannot_be_set_up_again_without_a_reset(bench: Bench) -> None:
    device = bench.bring_up()
    ring = device.queues[0].ring
    bench.place(0, used=USED + 0x800)
    assert device.queues[0].ring is ring and device.take() == []
    assert_broken(bench, "2.6.1", "again")


def test_a_device_without_memory_cannot_have_queues() -> None:
    device = Echo(None)
    device.accept_features(VERSION_1)
    device.write_status(READY)
    with pytest.raises(UsageError, match="no guest memory"):
        device.setup_queue(0, size=4, desc=DESC, avail=AVAIL, used=USED)
    assert device.status == READY


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | INDIRECT])
def test_a_ring_goes_by_the_features_that_were_negotiated(bench: Bench, features: int) -> None:
    device = bench.bring_up(features)
    bench.memory.write(0x5000, struct.pack("<QIHH", BUFFERS, 9, 2, 0))
    bench.offer(0, 0)
    bench.memory.write(DESC, struct.pack("<QIHH", 0x5000, 16, 4, 0))
    device.notify(0)
    if features & INDIRECT:
        assert bench.used(0) == [(0, 9)] and device.fault is None
    else:
        assert_broken(bench, "2.7.5.3.1", "not negotiated")


def test_nothing_is_done_before_driver_ok(bench: Bench) -> None:
    bench.negotiate()
    bench.setup(0)
    bench.offer(0, 0)
    bench.device.notify(0)
    assert bench.used(0) == [] and bench.calls == []
    bench.device.write_status(UP)
    bench.device.notify(0)
    assert bench.used(0) == [(0, 1)] and bench.calls == [0]


def test_stray_and_spurious_kicks_do_no_harm(bench: Bench) -> None:
    device = bench.device
    for index in (-1, 2, 1 << 31):
        device.notify(index)
    assert device.stats["stray_kicks"] == 3
    device.notify(0)
    bench.bring_up()
    for _ in range(3):
        device.notify(1)
    assert bench.calls == [] and device.status == UP
    bench.assert_works()


def test_a_kick_for_a_queue_without_a_ring_does_nothing(bench: Bench) -> None:
    bench.negotiate()
    bench.device.write_status(UP)
    bench.device.take()
    bench.device.notify(0)
    assert bench.device.take() == [] and bench.device.fault is None


def test_a_paused_queue_keeps_its_ring_and_rests(bench: Bench) -> None:
    device = bench.bring_up()
    device.queues[0].enabled = False
    bench.offer(0, 0)
    device.notify(0)
    assert bench.used(0) == [] and device.queues[0].ring is not None
    device.queues[0].enabled = True
    device.notify(0)
    assert bench.used(0) == [(0, 1)]


def test_a_ring_is_the_devices_until_it_is_paused_or_reset(bench: Bench) -> None:
    device = bench.bring_up()
    queue = device.queues[0]
    ring = queue.ring
    assert ring is not None and device.holds(queue, ring)
    queue.enabled = False
    assert not device.holds(queue, ring)
    queue.enabled = True
    device._fail(ValueError("a fault"))
    assert not device.holds(queue, ring)
    device.write_status(0)
    bench.bring_up()
    assert queue.ring is not ring and not device.holds(queue, ring)


def test_one_queue_is_reset_and_set_up_again(bench: Bench) -> None:
    device = bench.bring_up(VERSION_1 | RING_RESET)
    bench.assert_works()
    device.take()
    device.reset_queue(0)
    assert device.take() == [("queue_dropped", "first")]
    assert device.queues[0].ring is None and device.status == UP
    device.reset_queue(0)
    assert device.take() == [] and device.status == UP, "twice does no harm"
    bench.offer(0, 0)
    device.notify(0)
    assert bench.used(0) == []
    bench.setup(0, size=2)
    assert device.queues[0].ring is not None and device.queues[0].ring.size == 2
    device.reset_queue(0)
    bench.setup(0)
    bench.assert_works()


def test_a_queue_is_not_reset_without_the_feature(bench: Bench) -> None:
    bench.bring_up(VERSION_1)
    bench.device.reset_queue(0)
    assert bench.device.queues[0].ring is not None
    assert_broken(bench, "2.6.1", "RING_RESET was not negotiated")


def test_a_queue_is_not_reset_by_a_feature_that_does_not_hold_yet(bench: Bench) -> None:
    bench.device.accept_features(VERSION_1 | RING_RESET)
    bench.device.reset_queue(0)
    assert_broken(bench, "2.6.1", "RING_RESET was not negotiated")


@pytest.mark.parametrize("index", [-1, 2])
def test_a_queue_that_is_not_there_cannot_be_reset(bench: Bench, index: int) -> None:
    bench.bring_up(VERSION_1 | RING_RESET)
    bench.device.reset_queue(index)
    assert_broken(bench, None, f"no queue {index}")


def test_a_stopped_queue_goes_on_where_it_stopped(bench: Bench) -> None:
    device = bench.bring_up()
    bench.offer(0, 0, 1)
    device.notify(0)
    device.hold = True
    bench.offer(0, 2, 3)
    device.notify(0)
    assert bench.used(0) == [(0, 1), (1, 2)] and len(device.held) == 2
    device.take()
    assert device.stop_queue(0) == 2, "what the device had not begun on counts as not taken"
    assert device.take() == [("queue_stopping", "first")]
    assert device.queues[0].ring is None and not device.queues[0].enabled
    device.notify(0)
    assert device.take() == []
    device.hold = False
    bench.place(0, next_avail=2, next_used=2)
    device.notify(0)
    assert bench.used(0) == [(2, 3), (3, 4)]
    assert device.stop_queue(0) == 4
    assert device.stop_queue(0) == 0, "a queue that is not there has no position"


def test_a_stopped_queue_goes_on_with_chains_that_were_never_given_back(bench: Bench) -> None:
    device = bench.bring_up()
    device.hold = True
    bench.offer(0, 0, 1)
    device.notify(0)
    device.held = []  # this device dies; another takes its place
    device.stop_queue(0)
    device.hold = False
    base: dict[str, int] = {"size": 4, "desc": DESC, "avail": AVAIL, "used": USED}
    device.setup_queue(0, **base, next_avail=2, next_used=0, resubmit=[1, 0])
    device.notify(0)
    assert bench.used(0) == [(1, 2), (0, 1)]


# --- turns and faults ----------------------------------------------------------------------------


def test_a_kick_is_worked_off_in_turns(bench: Bench) -> None:
    device = bench.bring_up()
    bench.offer(0, 0, 1, 2, 3)
    device.notify(0)
    assert device.take() == ["process"] * 2 and len(bench.used(0)) == 4
    assert bench.calls == [0, 0]


def test_a_transport_with_other_things_to_do_gets_its_turn(bench: Bench) -> None:
    device = bench.bring_up()
    left: list[int] = []
    device.on_work_left = left.append
    bench.offer(0, 0, 1, 2, 3)
    device.notify(0)
    assert device.take() == ["process"] and left == [0] and len(bench.used(0)) == 2
    device.notify(0)
    assert device.take() == ["process"] and left == [0] and len(bench.used(0)) == 2


def test_a_call_is_made_only_when_the_driver_wants_it(bench: Bench) -> None:
    device = bench.bring_up()
    bench.offer(0, 0)
    device.notify(0)
    assert bench.calls == [0]
    bench.memory.write(AVAIL, b"\1\0")
    bench.offer(0, 1)
    device.notify(0)
    assert bench.calls == [0] and len(bench.used(0)) == 2
    device.on_queue_call = None
    bench.memory.write(AVAIL, b"\0\0")
    bench.offer(0, 2)
    device.notify(0)
    assert bench.used(0) == [(2, 3)]


class Unhurried(ManualLoop):
    """A device that publishes without haste, and its event loop."""

    def __init__(self, bench: Bench, features: int = VERSION_1) -> None:
        super().__init__()
        self.bench = bench
        self.device = bench.bring_up(features)
        self.device.haste = False
        bench.offer(0, 0)
        self.device.notify(0)  # the first call is always made
        self.device.event_loop = self
        bench.calls.clear()
        bench.used(0)

    def use(self, head: int) -> None:
        """Has the device deal with a chain."""
        self.bench.offer(0, head)
        self.device.notify(0)


def test_what_is_published_without_haste_is_seen_at_once_and_called_for_in_a_lull(
    bench: Bench,
) -> None:
    unhurried = Unhurried(bench)
    for head in (1, 2):
        unhurried.use(head)
        assert bench.used(0) == [(head, head + 1)] and not bench.calls
    assert len(unhurried.waiting) == 1
    unhurried.lull()
    assert bench.calls == [0] and not unhurried.waiting
    unhurried.use(3)
    unhurried.lull()
    assert bench.calls == [0, 0]


def test_without_an_event_loop_there_is_no_lull_to_wait_for(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.device.event_loop = None
    unhurried.use(1)
    assert bench.calls == [0]


def test_a_driver_that_looked_by_itself_meanwhile_is_not_called(bench: Bench) -> None:
    unhurried = Unhurried(bench, VERSION_1 | EVENT_IDX)
    bench.memory.write(AVAIL + 4 + 2 * 4, b"\1\0")  # used_event: at the next one
    unhurried.use(1)
    bench.memory.write(AVAIL + 4 + 2 * 4, b"\2\0")  # it has seen that one
    unhurried.lull()
    assert not bench.calls
    unhurried.use(2)
    unhurried.lull()
    assert bench.calls == [0]


def test_a_call_in_haste_is_for_what_was_published_without_it_too(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.haste = True
    unhurried.use(2)
    assert bench.calls == [0]
    unhurried.lull()
    assert bench.calls == [0]


def test_a_call_that_would_be_in_vain_waits_a_moment_longer(bench: Bench) -> None:
    unhurried = Unhurried(bench, VERSION_1 | EVENT_IDX)
    queue = unhurried.device.queues[0]
    bench.memory.write(AVAIL + 4 + 2 * 4, b"\1\0")  # used_event: at the next one
    unhurried.use(1)
    queue.driver_looks_soon = True
    unhurried.lull()
    assert not bench.calls and [seconds for seconds, _ in unhurried.later] == [LOOK_SECONDS]
    bench.memory.write(AVAIL + 4 + 2 * 4, b"\2\0")  # it has seen that one
    unhurried.let_time_pass()
    assert not bench.calls
    unhurried.use(2)
    queue.driver_looks_soon = True
    unhurried.lull()
    unhurried.let_time_pass()
    assert bench.calls == [0]  # it has not seen this one


def test_what_came_after_a_driver_was_called_is_none_that_it_looks_for_soon(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.queues[0].driver_looks_soon = True
    unhurried.lull()
    unhurried.use(2)
    assert not bench.calls
    unhurried.lull()
    assert bench.calls == [0]
    unhurried.let_time_pass()
    assert bench.calls == [0]


def test_a_call_waits_as_long_as_it_is_to_whatever_waited_before(bench: Bench) -> None:
    """The timer of an earlier call, which had been made in haste since, cut it short."""
    unhurried = Unhurried(bench)
    device = unhurried.device
    for head, in_between in ((1, 2), (3, None)):
        unhurried.use(head)
        device.queues[0].driver_looks_soon = True
        unhurried.lull()
        if in_between is not None:
            device.haste = True
            unhurried.use(in_between)
            device.haste = False
    assert bench.calls == [0]
    (_, earlier), (_, later) = unhurried.later
    earlier()
    assert bench.calls == [0]
    later()
    assert bench.calls == [0, 0]


def test_a_driver_that_may_wait_for_room_is_called_in_the_next_lull(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    size = unhurried.device.queues[0].ring.size  # type: ignore[union-attr]
    for head in range(1, size // 4 + 2):
        unhurried.use(head % size)
        bench.used(0)
    unhurried.device.queues[0].driver_looks_soon = True
    unhurried.lull()
    assert bench.calls == [0] and not unhurried.later


def test_a_call_that_waits_is_made_before_its_queue_stops(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.stop_queue(0)
    assert bench.calls == [0]
    unhurried.lull()
    assert bench.calls == [0]


def test_a_call_that_waits_is_made_though_the_device_needs_a_reset(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.accept_features(0)
    assert unhurried.device.status & NEEDS_RESET
    unhurried.lull()
    assert bench.calls == [0]


def test_a_call_that_waits_is_forgotten_with_its_ring(bench: Bench) -> None:
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.write_status(0)
    bench.bring_up()
    unhurried.lull()
    assert not bench.calls
    unhurried.device.haste = True
    unhurried.use(0)
    assert bench.calls == [0]


def test_after_a_reset_no_call_relies_on_a_lull_that_may_never_come(bench: Bench) -> None:
    """The event loop that was asked for one may not run any more: another one drives the device."""
    unhurried = Unhurried(bench)
    unhurried.use(1)
    unhurried.device.write_status(0)
    unhurried.waiting.clear()  # with the loop that they were of
    bench.bring_up()
    unhurried.use(0)
    assert len(unhurried.waiting) == 1
    unhurried.lull()
    assert bench.calls == [0]


def test_a_bad_chain_makes_the_device_need_a_reset_after_the_good_ones(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    device = bench.bring_up()
    bench.offer(0, 0)
    bench.offer(0, 1, gpa=1 << 40)
    bench.offer(0, 2)
    device.notify(0)
    assert bench.used(0) == [(0, 1), (1, 0)], "what was done before is the driver's"
    assert "driver error: first, head 1: a buffer is not in the guest's memory" in caplog.text
    assert_broken(bench, "2.7.5", "a buffer is not in the guest's memory")


def test_an_impossible_index_makes_the_device_need_a_reset(bench: Bench) -> None:
    bench.bring_up()
    bench.memory.write(APART + AVAIL + 2, b"\x00\x80")
    bench.device.notify(1)
    assert_broken(bench, "2.7.13.3", "entries ahead")


class Oops(Exception):
    pass


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        ("process", lambda bench: bench.device.notify(0)),
        ("written", lambda bench: bench.device.notify(0)),
        ("queue_dropped", lambda bench: bench.device.reset_queue(0)),
        ("queue_started", lambda bench: bench.setup(0)),
        ("queue_stopping", lambda bench: bench.device.stop_queue(0)),
    ],
)
@pytest.mark.parametrize("kind", [Oops, OSError, UsageError, AssertionError, DriverError])
def test_a_fault_of_the_model_is_logged_and_the_device_needs_a_reset(
    bench: Bench,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
    step: str,
    cause: Callable[[Bench], None],
) -> None:
    device = bench.bring_up(VERSION_1 | RING_RESET)
    if step == "queue_started":
        device.reset_queue(0)
    bench.offer(0, 0)

    def trouble(where: str) -> None:
        if where == step:
            raise kind("of my own making")

    device.trouble = trouble
    cause(bench)
    assert device.status == UP | NEEDS_RESET and bench.changes == [UP | NEEDS_RESET]
    assert type(device.fault) is kind
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    if kind is DriverError:
        assert not errors and device.stats["driver_errors"] == 1
    else:
        assert len(errors) == 1 and errors[0].exc_info and errors[0].exc_info[0] is kind
        assert "of my own making" in caplog.text and "Traceback" in caplog.text
    if step == "written":
        assert bench.used(0) == [(0, 1)] and bench.calls == [0]
    device.trouble = lambda where: None
    device.write_status(0)
    bench.bring_up()
    bench.assert_works()


@pytest.mark.parametrize("step", ["features_negotiated", "driver_ready", "device_reset"])
def test_a_fault_of_the_model_in_a_change_of_status_does_not_get_out(
    bench: Bench, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = bench.device

    def trouble(where: str) -> None:
        if where == step:
            raise OSError("the link is gone")

    device.trouble = trouble
    bench.negotiate()
    device.write_status(UP)
    if step == "device_reset":
        assert device.status == UP
        device.write_status(0)
        assert device.status == NEEDS_RESET
    else:
        assert device.status == UP | NEEDS_RESET
    assert isinstance(device.fault, OSError) and "the link is gone" in caplog.text
    device.trouble = lambda where: None
    device.write_status(0)
    bench.bring_up()
    bench.assert_works()


def test_an_interrupt_from_the_keyboard_gets_out(bench: Bench) -> None:
    device = bench.bring_up()

    def trouble(where: str) -> None:
        raise KeyboardInterrupt

    device.trouble = trouble
    with pytest.raises(KeyboardInterrupt):
        device.notify(0)
    assert device.status == UP


# --- what a driver can do, in any order ----------------------------------------------------------

ACTS = st.one_of(
    st.tuples(st.just("status"), st.sampled_from([0, 1, 3, READY, UP, UP, 64, 128, 255, 0x40F])),
    st.tuples(
        st.just("features"),
        st.sampled_from(
            [0, VERSION_1, VERSION_1 | RING_RESET, RING_FEATURES, VERSION_1 | 2, (1 << 128) - 1]
        ),
    ),
    st.tuples(st.just("setup"), st.sampled_from([-1, 0, 0, 1, 1, 2])),
    st.tuples(st.just("bad setup"), st.sampled_from([0, 1])),
    st.tuples(st.just("reset_queue"), st.sampled_from([0, 1, 2])),
    st.tuples(st.just("notify"), st.sampled_from([-1, 0, 0, 1, 2])),
    st.tuples(st.just("index"), st.integers(0, 0xFFFF)),
    st.tuples(st.just("config"), st.integers(0, 100)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTS, max_size=30))
def test_nothing_that_a_driver_does_raises_and_a_reset_heals_it(
    acts: list[tuple[str, int]],
) -> None:
    with GuestMemory.allocate(0x10000) as memory:
        bench = Bench(memory)
        device = bench.device
        first = snapshot(device)
        for act, value in acts:
            before = device.status
            if act == "status":
                device.write_status(value)
            elif act == "features":
                device.accept_features(value)
            elif act == "setup":
                device.setup_queue(value, size=4, desc=DESC, avail=AVAIL, used=USED)
            elif act == "bad setup":
                device.setup_queue(value, size=5, desc=1, avail=1, used=1)
            elif act == "reset_queue":
                device.reset_queue(value)
            elif act == "notify":
                device.notify(value)
            elif act == "index":
                memory.write(AVAIL + 2, struct.pack("<H", value))
            else:
                device.write_config(value, b"\1")
                device.read_config(value, value)
            if not (act == "status" and value == 0):
                assert device.status & before == before, "only a reset clears a bit"
            assert bool(device.status & NEEDS_RESET) == (device.fault is not None)
            if device.status & DRIVER_OK:
                assert device.status & FEATURES_OK
            if device.status & FEATURES_OK:
                assert device.driver_features & ~device.device_features == 0
        device.write_status(0)
        assert snapshot(device) == first
        bench.bring_up()
        bench.assert_works()


# --- watches -------------------------------------------------------------------------------------


def test_a_watch_tells_of_changes_only() -> None:
    watch = Watch(5, readable=lambda: None, writable=lambda: None)
    assert (watch.reading, watch.writing) == (False, False)
    watch.want(reading=True)  # nobody listens yet
    heard: list[tuple[bool, bool]] = []
    watch.on_change = lambda changed: heard.append((changed.reading, changed.writing))
    watch.want(reading=True)
    watch.want()
    watch.want(writing=True)
    watch.want(reading=False, writing=True)
    watch.want(reading=False)
    watch.want(writing=False)
    assert heard == [(True, True), (False, True), (False, False)]


# --- looking instead of being kicked --------------------------------------------------------------


class Looking(ManualLoop):
    """A device that rests when there is nothing to do, and its event loop."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.device = bench.bring_up(VERSION_1 | EVENT_IDX)
        self.device.event_loop = self
        self.device.notify(0)

    @property
    def asks_for_a_kick_at(self) -> int:
        """avail_event (virtio 1.3, 2.7.10)."""
        return int.from_bytes(self.bench.memory.read(USED + 4 + 8 * 4, 2), "little")


def test_an_event_loop_looks_for_buffers_until_it_sleeps(bench: Bench) -> None:
    looking = Looking(bench)
    [lookout] = looking.lookouts
    assert not lookout.look()
    for head in (0, 1):
        bench.offer(0, head)
        assert lookout.look() and looking.asks_for_a_kick_at == 0
        lookout.deal()
        assert bench.used(0) == [(head, head + 1)] and not lookout.look()
    assert not lookout.rest()
    assert looking.asks_for_a_kick_at == 2


def test_buffers_that_came_when_the_loop_went_to_sleep_are_told(bench: Bench) -> None:
    looking = Looking(bench)
    bench.offer(0, 0)
    assert looking.lookouts[0].rest()


def test_without_an_event_loop_the_driver_is_to_kick(bench: Bench) -> None:
    looking = Looking(bench)
    looking.device.event_loop = None
    bench.offer(0, 0)
    looking.device.notify(0)
    assert looking.asks_for_a_kick_at == 1


def test_what_an_earlier_device_left_over_is_not_left_to_a_look(bench: Bench) -> None:
    looking = Looking(bench)
    looking.device.stop_queue(0)
    bench.offer(0, 0, 1)
    bench.place(0, next_avail=2, resubmit=(1, 0))  # type: ignore[arg-type]
    looking.device.notify(0)
    assert bench.used(0) == [(1, 2), (0, 1)]


@pytest.mark.parametrize("what", ["reset", "stopped", "broken"])
def test_a_lookout_sees_nothing_in_a_ring_that_is_not_the_devices(bench: Bench, what: str) -> None:
    looking = Looking(bench)
    bench.offer(0, 0)
    if what == "reset":
        looking.device.write_status(0)
    elif what == "stopped":
        looking.device.stop_queue(0)
    else:
        looking.device.accept_features(0)
        assert looking.device.status & NEEDS_RESET
    assert not looking.lookouts[0].look() and not looking.lookouts[0].rest()
    assert looking.asks_for_a_kick_at == 0


def test_an_impossible_index_is_the_drivers_fault_also_when_the_loop_goes_to_sleep(
    bench: Bench,
) -> None:
    looking = Looking(bench)
    bench.memory.write(AVAIL + 2, (100).to_bytes(2, "little"))
    assert not looking.lookouts[0].rest()
    assert isinstance(looking.device.fault, DriverError)
    assert not looking.lookouts[0].look()


class Steps:
    """Counts what device and loop do, and lets a driver act in between, as one on another processor
    does."""

    def __init__(self) -> None:
        self.count = itertools.count()
        self.acts: dict[int, Callable[[], None]] = {}
        self.between_turns: dict[int, Callable[[], None]] = {}
        """What only happens while the loop asks the system, from that step on."""

    def step(self, *, in_turn: bool = True) -> None:
        now = next(self.count)
        act = self.acts.pop(now, None)
        if act is not None:
            act()
        if not in_turn:
            for when in [when for when in self.between_turns if when <= now]:
                self.between_turns.pop(when)()


def watched(steps: Steps) -> type[SplitRing]:
    """Rings in which every look at guest memory, and every wish, is a step."""

    class Watched(SplitRing):
        @property
        def avail_index(self) -> int:
            steps.step()
            index = super().avail_index
            steps.step()
            return index

        def waiting(self) -> int:
            steps.step()
            count = super().waiting()
            steps.step()
            return count

        def _store_used_word(self, index: int, value: int) -> None:
            steps.step()
            super()._store_used_word(index, value)
            steps.step()

        def publish(self) -> int:
            steps.step()
            return super().publish()

    return Watched


class Asleep(Exception):
    """The loop would sleep, and nothing would wake it."""


class OnTheirOwn:
    """A device, its loop, and a driver that kicks through a pipe when it is asked to."""

    def __init__(self, memory: GuestMemory, features: int) -> None:
        self.steps = Steps()
        self.bench = Bench(memory)
        self.device = self.bench.device
        self.device.ring_class = watched(self.steps)
        self.device.haste = False
        self.device.trouble = self.looks_by_itself
        self.features = features
        self.loop = Loop()
        self.kick_read, self.kick_write = os.pipe()
        self.loop.watch(self.kick_read, readable=self.kicked)
        self.device.event_loop = self.loop
        self.device.on_work_left = lambda index: self.loop.call_soon(
            lambda: self.device.notify(index)
        )
        poll = self.loop._poll

        def watch_sleep(timeout: float | None, most: int) -> list[tuple[int, int]]:
            self.steps.step(in_turn=False)
            if timeout == 0:
                return poll(0, most)
            ready = poll(0, most)
            if not ready and timeout is None:
                raise Asleep
            return ready

        self.loop._poll = watch_sleep

    def close(self) -> None:
        self.loop.watch(self.kick_read)
        self.loop.close()
        os.close(self.kick_read)
        os.close(self.kick_write)

    def looks_by_itself(self, step: str) -> None:
        ring = self.device.queues[0].ring
        if step == "process" and ring is not None:
            ring.disable_kicks()

    def kicked(self) -> None:
        os.read(self.kick_read, 100)
        self.device.notify(0)

    def add(self) -> None:
        """The driver makes a buffer available, and kicks if that is wanted."""
        old = self.bench.offered[0]
        self.bench.offer(0, old % 4)
        word = USED + 4 + 8 * 4 if self.features & EVENT_IDX else USED
        wish = int.from_bytes(self.bench.memory.read(word, 2), "little")
        if self.features & EVENT_IDX:
            wanted = needs_event(wish, old + 1, old)
        else:
            wanted = not wish & USED_F_NO_NOTIFY
        if wanted:
            os.write(self.kick_write, b"x")

    def restart(self) -> None:
        """The transport stops the ring, and starts it again where it stopped."""
        ring = self.device.queues[0].ring
        assert ring is not None
        position = self.device.stop_queue(0)
        self.bench.place(0, next_avail=position, next_used=ring.next_used)
        self.loop.call_soon(lambda: self.device.notify(0))

    def run_until_asleep(self) -> None:
        for _ in range(100):
            try:
                self.loop.run_once()
            except Asleep:
                return
        raise AssertionError("it never sleeps")


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event idx"])
@pytest.mark.parametrize("apart", [None, 0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_buffer_that_comes_at_any_moment_is_used_before_the_loop_sleeps(
    memory: GuestMemory, features: int, apart: int | None, restarts: bool
) -> None:
    when = 0
    while True:
        scene = OnTheirOwn(memory, features)
        try:
            scene.bench.bring_up(features)
            scene.steps.count = itertools.count()
            scene.steps.acts[when] = scene.add
            if apart is not None:
                scene.steps.acts[when + 1 + apart] = scene.add
            if restarts:
                scene.steps.between_turns[when] = scene.restart
            scene.add()
            scene.run_until_asleep()
            assert len(scene.bench.used(0)) == scene.bench.offered[0], f"step {when}"
            ring = scene.device.queues[0].ring
            assert ring is not None and not ring.uncalled, f"step {when}"
            if when in scene.steps.acts:
                break
        finally:
            scene.close()
        when += 1
        assert when < 200
    assert when > 10
