"""The driver's side of a split virtqueue, against a device written from the specification."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from slow_device import EVENT_IDX, IN_ORDER, INDIRECT, RING_RESET, VERSION_1, SlowDevice

from vq.abi import Feature, Status, feature_mask
from vq.driver import DeviceError, Driver, DriverRing, GuestAllocator, Transport, Used
from vq.errors import UsageError, VqError
from vq.memory import GuestMemory

DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000
BUFFERS = 0x8000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(0x10000) as memory:
        yield memory


def make_ring(memory: GuestMemory, size: int = 4, features: int = 0, start: int = 0) -> DriverRing:
    return DriverRing(memory, size, DESC, AVAIL, USED, features=features, start_index=start)


# --- golden bytes --------------------------------------------------------------------------------


def test_a_direct_chain_in_golden_bytes(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4)
    head = ring.add([(0x1122334455667788, 0x0A0B0C0D), (0x8000, 12)], [(0x9000, 1)])
    assert head == 0
    assert memory.read(DESC, 64) == bytes.fromhex(
        "8877665544332211 0d0c0b0a 0100 0100"
        "0080000000000000 0c000000 0100 0200"
        "0090000000000000 01000000 0200 0000"
        "0000000000000000 00000000 0000 0000"
    )
    assert memory.read(AVAIL, 14) == bytes(14), "nothing is shown before publish"
    assert ring.publish() == 1
    assert memory.read(AVAIL, 14) == bytes.fromhex("0000 0100 0000 0000 0000 0000 0000")


def test_an_indirect_chain_in_golden_bytes(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, INDIRECT)
    ring.add([(0x8000, 12)])
    ring.add([(0x8100, 5), (0x8200, 6)], [(0x9000, 7)], indirect=0xA000)
    assert memory.read(DESC + 16, 16) == bytes.fromhex("00a0000000000000 30000000 0400 0000")
    assert memory.read(0xA000, 48) == bytes.fromhex(
        "0081000000000000 05000000 0100 0100"
        "0082000000000000 06000000 0100 0200"
        "0090000000000000 07000000 0200 0000"
    )
    ring.publish()
    assert memory.read(AVAIL, 14) == bytes.fromhex("0000 0200 0000 0100 0000 0000 0000")


def test_direct_descriptors_may_stand_before_an_indirect_one(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, INDIRECT)
    ring.add([(0x8100, 5), (0x8200, 6)], [(0x9000, 7)], indirect=0xA000, direct=1)
    assert memory.read(DESC, 32) == bytes.fromhex(
        "0081000000000000 05000000 0100 010000a0000000000000 20000000 0400 0000"
    )
    assert memory.read(0xA000, 32) == bytes.fromhex(
        "0082000000000000 06000000 0100 01000090000000000000 07000000 0200 0000"
    )


def test_heads_wrap_in_the_ring_and_the_index_at_65536(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, start=0xFFFE)
    assert memory.read(AVAIL, 4) == bytes.fromhex("0000 feff")
    assert memory.read(USED, 4) == bytes.fromhex("0000 feff")
    for _ in range(4):
        ring.add([(0x8000, 1)])
    ring.publish()
    # Slots 2, 3, 0, 1; the index ends at 2.
    assert memory.read(AVAIL, 12) == bytes.fromhex("0000 0200 0200 0300 0000 0100")
    # The device gives two back across the wrap: slots 2 and 3, then index 0.
    memory.write(USED + 4 + 8 * 2, bytes.fromhex("01000000 00000000 00000000 00000000"))
    memory.write(USED, bytes.fromhex("0000 0000"))
    assert ring.collect() == [Used(1, 1, 0), Used(0, 0, 0)]


def test_calls_off_and_on_in_golden_bytes(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4)
    ring.disable_calls()
    assert memory.read(AVAIL, 2) == b"\1\0"
    assert not ring.enable_calls()
    assert memory.read(AVAIL, 2) == b"\0\0"
    with_event = make_ring(memory, 4, EVENT_IDX, start=0x0100)
    assert memory.read(AVAIL + 4 + 8, 2) == b"\x00\x01"
    with_event.disable_calls()
    assert memory.read(AVAIL, 2) == b"\0\0"
    assert memory.read(AVAIL + 4 + 8, 2) == b"\xff\x00"


# --- kicks and calls -----------------------------------------------------------------------------


def test_no_kick_without_something_new(memory: GuestMemory) -> None:
    ring = make_ring(memory)
    assert not ring.should_kick()
    ring.add([(BUFFERS, 1)])
    assert not ring.should_kick(), "not published yet"
    ring.publish()
    assert ring.should_kick()
    assert not ring.should_kick()


def test_the_devices_flag_stops_kicks(memory: GuestMemory) -> None:
    ring = make_ring(memory)
    memory.store16(USED, 1)
    ring.add([(BUFFERS, 1)])
    ring.publish()
    assert not ring.should_kick()


def test_with_event_idx_the_flag_is_ignored_and_avail_event_counts(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, EVENT_IDX, start=0xFFFF)
    memory.store16(USED, 1)
    memory.store16(USED + 4 + 8 * 4, 0)  # a kick only for the entry with index 0, the second one
    ring.add([(BUFFERS, 1)])
    ring.publish()
    assert not ring.should_kick()
    ring.add([(BUFFERS, 1)])
    ring.publish()
    assert ring.should_kick()


def test_a_kick_is_due_after_65536_chains_without_asking(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, EVENT_IDX)
    device = SlowDevice(memory, ring, EVENT_IDX)
    for _ in range(65536):
        head = ring.add([(BUFFERS, 1)])
        ring.publish()
        device.put_used(head, 0)
        ring.collect()
    device.used.avail_event = 7
    assert ring.should_kick()


def test_with_calls_on_every_round_of_collecting_asks_for_the_next_call(
    memory: GuestMemory,
) -> None:
    for features in (0, EVENT_IDX, EVENT_IDX | IN_ORDER):
        ring = make_ring(memory, 4, features, start=0xFFFE)
        device = SlowDevice(memory, ring, features, start=0xFFFE)
        for _ in range(6):
            head = ring.add([(BUFFERS, 1)])
            ring.publish()
            device.put_used(head, 0)
            assert device.should_call()
            assert len(ring.collect()) == 1


def test_delayed_calls_come_after_three_quarters(memory: GuestMemory) -> None:
    ring = make_ring(memory, 8, EVENT_IDX, start=0xFFFC)
    device = SlowDevice(memory, ring, EVENT_IDX, start=0xFFFC)
    ring.disable_calls()
    for _ in range(8):
        ring.add([(BUFFERS, 1)])
    ring.publish()
    assert not ring.enable_calls(delayed=True)
    called = []
    for head in range(8):
        device.put_used(head, 0)
        called.append(device.should_call())
    assert called == [False] * 6 + [True, False]
    assert len(ring.collect()) == 8


def test_enable_calls_tells_of_what_was_used_meanwhile(memory: GuestMemory) -> None:
    for features in (0, EVENT_IDX):
        ring = make_ring(memory, 4, features)
        device = SlowDevice(memory, ring, features)
        ring.disable_calls()
        head = ring.add([(BUFFERS, 1)])
        ring.publish()
        device.put_used(head, 0)
        assert ring.enable_calls()
        ring.collect()
        assert not ring.enable_calls()


# --- collecting ----------------------------------------------------------------------------------


def test_collect_takes_tokens_out_of_order_and_no_more_than_asked(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4)
    device = SlowDevice(memory, ring, 0)
    tokens = [object() for _ in range(4)]
    heads = [ring.add((), [(BUFFERS, 100)], token) for token in tokens]
    ring.publish()
    for number in (2, 0, 3, 1):
        device.put_used(heads[number], number)
    assert ring.collect(1) == [Used(tokens[2], 2, 2)]
    assert ring.collect(2) == [Used(tokens[0], 0, 0), Used(tokens[3], 3, 3)]
    assert ring.collect() == [Used(tokens[1], 1, 1)]
    assert ring.collect() == []
    assert ring.num_free == 4 and ring.in_flight == 0


def test_what_is_freed_is_what_was_offered_whatever_the_table_says(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4)
    device = SlowDevice(memory, ring, 0)
    head = ring.add([(BUFFERS, 1), (BUFFERS, 2), (BUFFERS, 3)])
    ring.publish()
    memory.write(DESC, b"\xff" * 64)
    device.put_used(head, 0)
    assert ring.collect() == [Used(head, head, 0)]
    assert ring.num_free == 4
    assert [ring.add([(BUFFERS, 1)]) for _ in range(4)] == [3, 0, 1, 2]


def offered(memory: GuestMemory, features: int = 0) -> tuple[DriverRing, SlowDevice]:
    """Two chains: head 0 to read, head 1 with 100 writable bytes."""
    ring = make_ring(memory, 4, features)
    ring.add([(BUFFERS, 50)], token="out")
    ring.add((), [(BUFFERS, 60), (BUFFERS, 40)], token="in")
    ring.publish()
    return ring, SlowDevice(memory, ring, features)


@pytest.mark.parametrize("features", [0, IN_ORDER, EVENT_IDX])
@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (lambda d: d.put_used(4, 0), "id 4 in a queue of 4"),
        (lambda d: d.put_used(0xFFFFFFFF, 0), "id 4294967295"),
        (lambda d: d.put_used(2, 0), "id 2 is not outstanding"),
        (lambda d: d.put_used(3, 0), "id 3 is not outstanding"),
        (lambda d: d.put_used(0, 1), "1 bytes written where there is room for 0"),
        (lambda d: d.put_used(0, 0, skip=3), "jumped by 3 with 2 chains outstanding"),
        (lambda d: d.put_used(0, 0, skip=65535), "jumped by 65535"),
    ],
)
def test_a_device_that_breaks_a_rule_is_found(
    memory: GuestMemory, misdeed: Callable[[SlowDevice], None], reason: str, features: int
) -> None:
    ring, device = offered(memory, features)
    misdeed(device)
    for _ in range(2):
        with pytest.raises(DeviceError, match=reason) as caught:
            ring.collect()
    assert caught.value.queue == "queue" and caught.value.section == "2.7.8"
    assert isinstance(caught.value, VqError)
    assert ring.reset() == ["out", "in"]
    assert ring.num_free == 4 and ring.collect() == []


def test_more_written_than_there_is_room_is_found(memory: GuestMemory) -> None:
    ring, device = offered(memory)
    device.put_used(1, 101)
    with pytest.raises(DeviceError, match="101 bytes written where there is room for 100"):
        ring.collect()


def test_all_the_room_may_be_written(memory: GuestMemory) -> None:
    ring, device = offered(memory)
    device.put_used(1, 100)
    assert ring.collect() == [Used("in", 1, 100)]


def test_a_chain_used_twice_is_found_after_the_good_ones_are_given(memory: GuestMemory) -> None:
    ring, device = offered(memory)
    device.put_used(1, 7)
    device.put_used(1, 7)
    assert ring.collect() == [Used("in", 1, 7)]
    with pytest.raises(DeviceError, match="id 1 is not outstanding: used twice"):
        ring.collect()


def test_a_chain_not_yet_published_cannot_be_used(memory: GuestMemory) -> None:
    ring, device = offered(memory)
    head = ring.add([(BUFFERS, 1)])
    device.put_used(head, 0)
    with pytest.raises(DeviceError, match="id 3 is not outstanding"):
        ring.collect()


def test_chains_not_yet_published_are_not_outstanding(memory: GuestMemory) -> None:
    ring, device = offered(memory)
    ring.add([(BUFFERS, 1)])
    device.put_used(0, 0, skip=3)
    with pytest.raises(DeviceError, match="jumped by 3 with 2 chains outstanding"):
        ring.collect()


# --- IN_ORDER ------------------------------------------------------------------------------------


def test_in_order_one_element_stands_for_a_batch(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, IN_ORDER, start=0xFFFF)
    device = SlowDevice(memory, ring, IN_ORDER, start=0xFFFF)
    ring.add((), [(BUFFERS, 10)], "a")
    ring.add((), [(BUFFERS, 20), (BUFFERS, 5)], "b")
    last = ring.add((), [(BUFFERS, 30)], "c")
    ring.publish()
    device.put_used(last, 9, skip=3)
    # The buffers that were skipped count as used completely (virtio 1.3, 2.7.9).
    assert ring.collect() == [Used("a", 0, 10), Used("b", 1, 25), Used("c", 3, 9)]
    assert ring.num_free == 4
    assert ring.add([(BUFFERS, 1)]) == 0, "descriptors are used in ring order"


def test_in_order_the_next_batch_has_its_element_where_its_first_chain_stands(
    memory: GuestMemory,
) -> None:
    ring = make_ring(memory, 4, IN_ORDER)
    device = SlowDevice(memory, ring, IN_ORDER)
    for token in "abcd":
        ring.add([(BUFFERS, 1)], token=token)
    ring.publish()
    device.put_used(1, 0, skip=2)
    device.put_used(2, 0)
    assert [used.token for used in ring.collect()] == ["a", "b", "c"]
    device.put_used(3, 0)
    assert [used.token for used in ring.collect()] == ["d"]


def test_in_order_a_batch_longer_than_the_index_moved_is_found(memory: GuestMemory) -> None:
    ring, device = offered(memory, IN_ORDER)
    device.put_used(1, 7)
    with pytest.raises(DeviceError, match="head 1 ends a batch of 2"):
        ring.collect()


# --- what a driver must not do -------------------------------------------------------------------


def test_add_refuses_what_a_driver_must_not_do(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, INDIRECT)
    for refused in (
        lambda: ring.add(()),
        lambda: ring.add([(BUFFERS, 1)] * 5),
        lambda: ring.add([(BUFFERS, 1)] * 5, indirect=0xA000),
        lambda: ring.add([(BUFFERS, 1)], indirect=0xA000, direct=1),
        lambda: ring.add([(BUFFERS, 0xFFFFFFFF), (BUFFERS, 2)]),
        lambda: ring.add([(BUFFERS, 1 << 32)]),
        lambda: ring.add([(1 << 64, 1)]),
        lambda: ring.add([(BUFFERS, 1), (-1, 1)]),
        lambda: make_ring(memory, 4).add([(BUFFERS, 1)], indirect=0xA000),
    ):
        with pytest.raises(UsageError):
            refused()
    assert ring.num_free == 4 and ring.publish() == 0
    ring.add([(BUFFERS, 0xFFFFFFFF), (BUFFERS, 1)])  # 4 GiB and not one byte more
    ring.add([(BUFFERS, 1)] * 2)
    for refused in (lambda: ring.add([(BUFFERS, 1)]), lambda: ring.add([(BUFFERS, 1)] * 2)):
        with pytest.raises(UsageError, match="free"):
            refused()


def test_a_chain_may_have_as_many_descriptors_as_the_queue(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4, INDIRECT)
    device = SlowDevice(memory, ring, INDIRECT)
    ring.add([(BUFFERS, 1)] * 3, [(BUFFERS, 1)])
    ring.publish()
    assert len(device.pop()[1]) == 4
    device.complete(0, 0)
    ring.collect()
    ring.add([(BUFFERS, 1)] * 4, indirect=0xA000)
    ring.publish()
    assert len(device.pop()[1]) == 4


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_a_size_that_is_no_power_of_two_up_to_32768_is_refused(
    memory: GuestMemory, size: int
) -> None:
    with pytest.raises(UsageError):
        make_ring(memory, size)


def test_parts_out_of_alignment_are_refused(memory: GuestMemory) -> None:
    for desc, avail, used in ((8, AVAIL, USED), (DESC, 1, USED), (DESC, AVAIL, 2)):
        with pytest.raises(UsageError, match="aligned"):
            DriverRing(memory, 4, desc, avail, used)


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_the_smallest_and_the_largest_queue(size: int) -> None:
    with GuestMemory.allocate(1 << 20) as memory:
        ring = DriverRing.allocate(memory, GuestAllocator(memory), size, start_index=0xFFF0)
        device = SlowDevice(memory, ring, 0, start=0xFFF0)
        for _ in range(3):
            for number in range(size):
                ring.add([(0, number)])
            assert ring.num_free == 0 and ring.publish() == size
            head, chain = device.pop()
            assert chain == [(0, 0, False)]
            device.next_avail = device.avail.idx
            for slot in range(size):
                device.put_used((head + slot) % size, 0)
            assert len(ring.collect()) == size


# --- by hand -------------------------------------------------------------------------------------


def test_pokes_and_peeks_reach_the_bytes(memory: GuestMemory) -> None:
    ring = make_ring(memory, 4)
    ring.poke_descriptor(3, 1, 2, 3, 4)
    assert memory.read(DESC + 48, 16) == bytes.fromhex("0100000000000000 02000000 0300 0400")
    assert ring.peek_descriptor(3) == (1, 2, 3, 4)
    ring.poke_avail_flags(5)
    ring.poke_avail_index(0x10006)
    ring.poke_avail(3, 7)
    ring.poke_used_event(8)
    assert memory.read(AVAIL, 14) == bytes.fromhex("0500 0600 000000000000 0700 0800")
    memory.write(USED, bytes.fromhex("0100 0200" + "00" * 24 + "03000000 04000000 0500"))
    assert ring.peek_used_flags() == 1 and ring.peek_used_index() == 2
    assert ring.peek_used(3) == (3, 4) and ring.peek_avail_event() == 5


# --- any interleaving ----------------------------------------------------------------------------


class RingMachine(RuleBasedStateMachine):
    """Driver and device take steps in any order; nothing is lost, doubled or changed on the way."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8]),
        start=st.sampled_from([0, 0xFFF0, 0xFFFE]),
        event_idx=st.booleans(),
        in_order=st.booleans(),
    )
    def begin(self, size: int, start: int, event_idx: bool, in_order: bool) -> None:
        self.features = INDIRECT | event_idx * EVENT_IDX | in_order * IN_ORDER
        self.memory = GuestMemory.allocate((0x100000, 0x8000))
        self.allocator = GuestAllocator(self.memory)
        self.ring = DriverRing.allocate(
            self.memory, self.allocator, size, features=self.features, start_index=start
        )
        self.in_order = in_order
        self.restart(start)

    def restart(self, start: int) -> None:
        self.device = SlowDevice(self.memory, self.ring, self.features, start)
        self.added: list[tuple[int, list[tuple[int, int, bool]]]] = []  # not yet seen by the device
        self.published = 0
        self.expected: list[tuple[int, int]] = []  # (token, written), not yet collected
        self.costs: dict[int, int] = {}  # descriptors by token
        self.tables: dict[int, int] = {}
        self.token = 0
        self.asleep = False  # the device waits for a kick
        self.calls_on = True
        self.waits = True  # the driver waits for a call
        self.called = False

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            del self.device, self.ring
            self.memory.close()

    @rule(count=st.integers(1, 8))
    def add_single(self, count: int) -> None:
        for number in range(min(count, self.free)):
            self.add(number & 1, 1 - (number & 1), False, 0, random.Random(number))

    @rule(
        readable=st.integers(0, 4),
        writable=st.integers(0, 4),
        indirect=st.booleans(),
        direct=st.integers(0, 2),
        data=st.randoms(use_true_random=False),
    )
    def add(
        self, readable: int, writable: int, indirect: bool, direct: int, data: random.Random
    ) -> None:
        count = readable + writable
        buffers = [(data.randrange(1 << 64), data.randrange(1 << 16)) for _ in range(count)]
        out, into = buffers[:readable], buffers[readable:]
        direct = min(direct, max(count - 1, 0))
        cost = direct + 1 if indirect else count
        table = self.allocator.allocate(16 * max(count, 1)) if indirect else None
        self.token += 1
        try:
            self.ring.add(out, into, self.token, indirect=table, direct=direct if indirect else 0)
        except UsageError:
            assert not count or count > self.ring.size or cost > self.free
            if table is not None:
                self.allocator.free(table)
            return
        assert 0 < count <= self.ring.size and cost <= self.free
        if table is not None:
            self.tables[self.token] = table
        self.costs[self.token] = cost
        chain = [(*b, False) for b in out] + [(*b, True) for b in into]
        self.added.append((self.token, chain))

    @property
    def free(self) -> int:
        return self.ring.size - sum(self.costs.values())

    @rule()
    def publish(self) -> None:
        news = self.ring.publish()
        assert news == len(self.added) - self.published
        self.published += news
        kick = self.ring.should_kick()
        if news and self.asleep:
            assert kick, "the device sleeps and nobody wakes it"
        if kick:
            self.asleep = False

    @precondition(lambda self: self.device.waiting)
    @rule(count=st.integers(1, 8))
    def device_pops(self, count: int) -> None:
        for _ in range(min(count, self.device.waiting)):
            head, chain = self.device.pop()
            token, expected = self.added.pop(0)
            self.published -= 1
            assert chain == expected
            self.device.popped[-1] = (head, [(token, sum(n for _, n, w in chain if w), False)])

    @rule(data=st.data())
    def device_works_through_all(self, data: st.DataObject) -> None:
        self.publish()
        if self.device.waiting:
            self.device_pops(self.device.waiting)
        self.device_completes(len(self.device.popped), data)

    @rule()
    def device_sleeps(self) -> None:
        self.device.want_kicks()
        self.asleep = not self.device.waiting

    @rule()
    def device_is_busy(self) -> None:
        self.device.refuse_kicks()
        self.asleep = False

    @precondition(lambda self: self.device.popped)
    @rule(count=st.integers(1, 8), data=st.data())
    def device_completes(self, count: int, data: st.DataObject) -> None:
        for _ in range(min(count, len(self.device.popped))):
            if self.device.popped:
                self.complete(data)

    def complete(self, data: st.DataObject) -> None:
        device = self.device
        if self.in_order:
            batch = data.draw(st.integers(1, len(device.popped)))
            for _, [(token, room, _)] in device.popped[: batch - 1]:
                self.expected.append((token, room))
            head, [(token, room, _)] = device.popped[batch - 1]
            del device.popped[:batch]
        else:
            batch = 1
            place = data.draw(st.integers(0, len(device.popped) - 1))
            head, [(token, room, _)] = device.popped.pop(place)
        written = data.draw(st.integers(0, room))
        device.put_used(head, written, skip=batch)
        self.expected.append((token, written))

    @rule()
    def device_looks_whether_to_call(self) -> None:
        if self.device.should_call():
            self.called = True

    @rule()
    def calls_off(self) -> None:
        self.ring.disable_calls()
        self.calls_on = self.waits = False

    @rule()
    def calls_on(self) -> None:
        more = self.ring.enable_calls()
        assert more == bool(self.expected)
        self.calls_on = True
        self.waits = not more
        self.called = False

    @rule(limit=st.one_of(st.none(), st.integers(0, 3)))
    def collect(self, limit: int | None) -> None:
        if self.waits and self.expected:
            self.device_looks_whether_to_call()
            assert self.called, "used buffers wait and the driver was not called"
        self.waits = False
        got = [(used.token, used.written) for used in self.ring.collect(limit)]
        assert got == self.expected[: len(got)]
        assert limit is None or self.in_order or len(got) == min(limit, len(self.expected))
        assert limit is not None or len(got) == len(self.expected)
        del self.expected[: len(got)]
        if self.calls_on and not self.expected:
            self.waits, self.called = True, False
        for token, _ in got:
            del self.costs[token]
            if token in self.tables:
                self.allocator.free(self.tables.pop(token))

    @precondition(lambda self: self.token > 20)  # rarely, or nothing gets far
    @rule(start=st.sampled_from([0, 0xFFF0]))
    def reset(self, start: int) -> None:
        lost = self.ring.reset(start)
        assert sorted(lost) == sorted(self.costs)
        for table in self.tables.values():
            self.allocator.free(table)
        self.restart(start)

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.num_free == self.free
            assert self.ring.in_flight == len(self.costs)


def test_any_interleaving_of_driver_and_device_steps() -> None:
    run_state_machine_as_test(
        RingMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 16, 64]),
    event_idx=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_a_long_run_over_the_wrap_loses_nothing(size: int, event_idx: bool, seed: int) -> None:
    draw = random.Random(seed)
    features = event_idx * EVENT_IDX
    with GuestMemory.allocate(0x8000) as memory:
        ring = DriverRing.allocate(
            memory, GuestAllocator(memory), size, features=features, start_index=0xFFF0
        )
        device = SlowDevice(memory, ring, features, 0xFFF0)
        sent, back = 0, []
        while len(back) < 300:
            while ring.num_free and draw.random() < 0.8:
                ring.add((), [(0, 4096)], sent)
                sent += 1
            ring.publish()
            while device.waiting and draw.random() < 0.8:
                device.pop()
            while device.popped and draw.random() < 0.8:
                device.complete(draw.randrange(len(device.popped)), 1)
            back += [used.token for used in ring.collect(draw.choice([None, 1, 5]))]
        del device
    assert len(set(back)) == len(back) and set(back) <= set(range(sent))


# --- the allocator -------------------------------------------------------------------------------


def test_the_allocator_aligns_reuses_and_joins() -> None:
    with GuestMemory.allocate((0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x2000)) as memory:
        allocator = GuestAllocator(memory)
        first = allocator.allocate(10)
        second = allocator.allocate(1, 0x100)
        assert (first, second) == (0x1000, 0x1100)
        assert allocator.allocate(16) == 0x1010, "the room before an aligned piece is not lost"
        assert allocator.allocate(0x2000) == 0x8000, "never across two regions"
        assert allocator.allocate(0x1000) == 0x2000
        with pytest.raises(UsageError):
            allocator.allocate(0x1000)
        for gpa in (first, second, 0x1010, 0x8000, 0x2000):
            allocator.free(gpa)
        assert allocator.available == memory.size
        assert allocator.allocate(0x1000) == 0x1000, "neighbours are one piece again"
        with pytest.raises(UsageError):
            allocator.free(0x1001)
        for length, align in ((0, 16), (-1, 16), (1, 3), (1, 0)):
            with pytest.raises(UsageError):
                allocator.allocate(length, align)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 600), st.sampled_from([1, 2, 16, 256])),
            st.integers(0, 10),
        ),
        max_size=60,
    )
)
def test_pieces_never_overlap_and_all_comes_back(steps: list[tuple[int, int] | int]) -> None:
    with GuestMemory.allocate((0x1000, 0x1000), (0x3000, 0x1000)) as memory:
        allocator = GuestAllocator(memory)
        taken: list[tuple[int, int]] = []
        for step in steps:
            if isinstance(step, tuple):
                length, align = step
                try:
                    gpa = allocator.allocate(length, align)
                except UsageError:
                    continue
                assert gpa % align == 0
                memory.hvaddr(gpa, length)
                assert all(gpa + length <= g or g + n <= gpa for g, n in taken)
                taken.append((gpa, length))
            elif taken:
                allocator.free(taken.pop(step % len(taken))[0])
        assert allocator.available == memory.size - sum(n for _, n in taken)
        for gpa, _ in taken:
            allocator.free(gpa)
        assert allocator.allocate(0x1000) == 0x1000


# --- probing -------------------------------------------------------------------------------------


class FakeDevice:
    """The registers of a device, and a log of what a driver did to them."""

    def __init__(self, features: int = VERSION_1, queues: tuple[int, ...] = (8, 0, 100)) -> None:
        self.on_queue_call: Callable[[int], None] | None = None
        self.on_config_change: Callable[[], None] | None = None
        self.device_id = 99
        self.device_features = features
        self.config_generation = 0
        self.queues = queues
        self.config = bytes(range(16))
        self.refuses_features = False
        self.log: list[tuple[object, ...]] = []
        self._status = 0

    @property
    def status(self) -> int:
        return self._status

    def write_status(self, value: int, /) -> None:
        self.log.append(("status", value))
        if value & Status.FEATURES_OK and self.refuses_features:
            value &= ~Status.FEATURES_OK
        self._status = value

    def accept_features(self, mask: int, /) -> None:
        self.log.append(("features", mask))

    def read_config(self, offset: int, length: int, /) -> bytes:
        self.log.append(("read_config", offset, length))
        return self.config[offset : offset + length]

    def write_config(self, offset: int, data: bytes, /) -> None:
        self.log.append(("write_config", offset, data))

    @property
    def queue_count(self) -> int:
        return len(self.queues)

    def queue_max_size(self, index: int, /) -> int:
        return self.queues[index] if index < len(self.queues) else 0

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        self.log.append(("setup", index, size))

    def reset_queue(self, index: int, /) -> None:
        self.log.append(("reset_queue", index))

    def notify(self, index: int, /) -> None:
        self.log.append(("notify", index))


def test_probing_follows_the_order_of_the_specification(memory: GuestMemory) -> None:
    device = FakeDevice(VERSION_1 | EVENT_IDX | 1 << 5 | 1 << 6)
    transport: Transport = device
    driver = Driver(transport, memory, 1 << 5 | EVENT_IDX | INDIRECT, queue_size=64)
    driver.probe()
    assert device.log == [
        ("status", 0),
        ("status", 1),
        ("status", 1 | 2),
        ("features", VERSION_1 | EVENT_IDX | 1 << 5),
        ("status", 1 | 2 | 8),
        ("setup", 0, 8),
        ("setup", 2, 64),
        ("status", 1 | 2 | 8 | 4),
    ]
    assert driver.features == VERSION_1 | EVENT_IDX | 1 << 5
    assert driver.has_feature(5) and not driver.has_feature(6)
    assert sorted(driver.queues) == [0, 2]


def test_a_queue_is_as_large_as_wanted_and_possible(memory: GuestMemory) -> None:
    device = FakeDevice()
    driver = Driver(device, memory, 0)
    driver.negotiate()
    assert driver.setup_queue(2).size == 64, "the largest power of two below 100"
    assert driver.setup_queue(0, 3).size == 2
    with pytest.raises(DeviceError, match="no queue 1"):
        driver.setup_queue(1)


def test_a_refused_set_of_features_fails_clearly(memory: GuestMemory) -> None:
    device = FakeDevice()
    device.refuses_features = True
    driver = Driver(device, memory, 0)
    with pytest.raises(DeviceError, match=r"refused the features 0x100000000 .*3\.1\.1"):
        driver.probe()
    assert device.status & Status.FAILED
    assert driver.features == 0 and not driver.queues
    device.refuses_features = False
    driver.probe()
    assert device.status == 15


def test_a_legacy_device_is_refused(memory: GuestMemory) -> None:
    device = FakeDevice(features=1)
    with pytest.raises(DeviceError, match="VERSION_1"):
        Driver(device, memory, 1).negotiate()
    assert device.status & Status.FAILED


def test_features_of_any_device_that_the_driver_cannot_do_are_not_accepted(
    memory: GuestMemory,
) -> None:
    offered = feature_mask(Feature) | 0xFFFFFF | 0xFF << 50
    driver = Driver(FakeDevice(offered), memory, (1 << 128) - 1)
    assert driver.negotiate() == 0xFFFFFF | 0xFF << 50 | feature_mask(
        (
            Feature.INDIRECT_DESC,
            Feature.EVENT_IDX,
            Feature.VERSION_1,
            Feature.ACCESS_PLATFORM,
            Feature.IN_ORDER,
            Feature.ORDER_PLATFORM,
            Feature.RING_RESET,
        )
    )


def test_the_driver_may_leave_features_out_once_it_knows_the_offer(memory: GuestMemory) -> None:
    device = FakeDevice(VERSION_1 | 6)
    driver = Driver(device, memory, 7)
    assert driver.negotiate(lambda possible: possible & ~2) == VERSION_1 | 4
    assert ("features", VERSION_1 | 4) in device.log


def test_a_device_that_does_not_reset_is_found(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    monkeypatch.setattr(Driver, "RESET_SECONDS", 0.02)
    device._status = 4
    monkeypatch.setattr(device, "write_status", lambda value: None)
    with pytest.raises(DeviceError, match="does not reset"):
        Driver(device, memory, 0).reset()


def test_the_configuration_is_read_again_when_it_changed_meanwhile(memory: GuestMemory) -> None:
    device = FakeDevice()
    reads = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        if len(reads) < 3:
            device.config_generation += 1
        return struct.pack("<I", len(reads))

    device.read_config = read  # type: ignore[method-assign]
    assert Driver(device, memory, 0).read_config(4, 4) == b"\3\0\0\0"


def test_a_configuration_that_never_holds_still_is_found(memory: GuestMemory) -> None:
    class Restless(FakeDevice):
        def read_config(self, offset: int, length: int, /) -> bytes:
            self.config_generation += 1
            return bytes(length)

    with pytest.raises(DeviceError, match="hold still"):
        Driver(Restless(), memory, 0).read_config(0, 4)


def test_a_kick_notifies_only_a_device_that_wants_it(memory: GuestMemory) -> None:
    device = FakeDevice()
    driver = Driver(device, memory, 0)
    driver.probe()
    assert not driver.kick(0)
    driver.queues[0].add([(BUFFERS, 1)])
    assert driver.kick(0)
    memory.store16(driver.queues[0].used, 1)
    driver.queues[0].add([(BUFFERS, 1)])
    assert not driver.kick(0)
    assert device.log.count(("notify", 0)) == 1


def test_reset_and_close_give_everything_back(memory: GuestMemory) -> None:
    device = FakeDevice()
    driver = Driver(device, memory, 0)
    before = driver.allocator.available
    for _ in range(3):
        driver.probe()
    assert driver.allocator.available < before
    driver.close()
    assert driver.allocator.available == before
    assert device.status == 0 and not driver.queues
    assert device.on_queue_call is None and device.on_config_change is None


def test_one_queue_is_reset_and_taken_into_use_again(memory: GuestMemory) -> None:
    device = FakeDevice(VERSION_1 | RING_RESET)
    driver = Driver(device, memory, RING_RESET)
    driver.probe()
    before = driver.allocator.available
    driver.queues[0].add([(BUFFERS, 1)], token="lost")
    assert driver.reset_queue(0) == ["lost"]
    assert 0 not in driver.queues and driver.allocator.available > before
    assert driver.setup_queue(0, 4).num_free == 4
    assert device.log[-2:] == [("reset_queue", 0), ("setup", 0, 4)]


def test_one_queue_is_not_reset_without_the_feature(memory: GuestMemory) -> None:
    driver = Driver(FakeDevice(), memory, RING_RESET)
    driver.probe()
    with pytest.raises(UsageError, match="RING_RESET"):
        driver.reset_queue(0)


def test_notifications_are_counted_and_handed_on(memory: GuestMemory) -> None:
    device = FakeDevice()
    driver = Driver(device, memory, 0)
    driver.probe()
    assert device.on_queue_call is not None and device.on_config_change is not None
    heard: list[object] = []
    device.on_queue_call(2)
    driver.on_call = heard.append
    driver.on_config_change = lambda: heard.append("config")
    device.on_queue_call(0)
    device.on_config_change()
    assert heard == [0, "config"] and (driver.calls, driver.config_changes) == (2, 1)
    assert not driver.needs_reset
    device._status |= Status.NEEDS_RESET
    device.on_config_change()
    assert driver.needs_reset
    driver.probe()
    assert not driver.needs_reset
