"""The authoring interface: models driven by a scripted driver, with threads, coroutines, resets."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vq.abi import Feature, Status
from vq.device import RING_FEATURES, Queue
from vq.driver import Driver
from vq.errors import UsageError
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.request import Request, RequestGone
from vq.vhost_user import unwatch_device, watch_device

SECONDS = 20
UPPER = 0


class Config(ctypes.LittleEndianStructure):
    _fields_ = (
        ("version", ctypes.c_uint16),
        ("mode", ctypes.c_uint16),
        ("name", ctypes.c_uint8 * 4),
        ("limit", ctypes.c_uint64),
    )
    _pack_ = 1


def upper(request: Request) -> None:
    request.writer.write(request.reader.read().upper())


class Upper(DeviceModel):
    """Gives back in capitals what it is sent; `handle` may be replaced."""

    device_id = 0x7E
    config_writable: ClassVar = ("mode", "limit")
    drain_seconds: ClassVar = 0.3

    def __init__(self, handler: Callable[..., Any] | None = None) -> None:
        super().__init__(
            queues=[("requests", 16, handler or self.at_once), ("events", 8, None)],
            features=[UPPER],
            config=Config(version=3, limit=7),
            memory=GuestMemory.allocate(1 << 20),
        )
        self.bursts: list[int] = []
        self.kept: list[Request] = []
        self.config_fields: list[str] = []
        self.kicked: list[str] = []

    def at_once(self, requests: Sequence[Request]) -> None:
        self.bursts.append(len(requests))
        for request in requests:
            upper(request)
            request.complete()

    def keep(self, requests: Sequence[Request]) -> None:
        self.kept += requests

    def config_written(self, fields: Any) -> None:
        self.config_fields += fields

    def buffers_available(self, queue: Queue) -> None:
        self.kicked.append(queue.name)


class Bench:
    """A model, and a driver that is up."""

    def __init__(self, model: DeviceModel, features: int = RING_FEATURES | 1 << UPPER) -> None:
        self.model = model
        assert model.memory is not None
        self.memory = model.memory
        self.guest = Driver(model, self.memory, features)
        self.guest.probe()

    def send(self, *texts: bytes, queue: int = 0, room: int = 32, kick: bool = True) -> None:
        allocator = self.guest.allocator
        for text in texts:
            source = allocator.allocate(32)
            self.memory.write(source, text)
            target = allocator.allocate(32)
            readable = [(source, len(text))] if text else []
            self.guest.queues[queue].add(readable, [(target, room)], token=target)
        if kick:
            self.guest.kick(queue)

    def answers(self, queue: int = 0) -> list[bytes]:
        return [
            self.memory.read(used.token, used.written)
            for used in self.guest.queues[queue].collect()
        ]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


def test_a_handler_gets_a_burst_and_what_it_completes_goes_back_with_one_call() -> None:
    bench = Bench(model := Upper())
    bench.send(b"one", b"two", b"three")
    assert bench.answers() == [b"ONE", b"TWO", b"THREE"]
    assert (model.bursts, bench.guest.calls) == ([3], 1)


def test_a_kept_request_is_completed_later_in_any_order() -> None:
    model = Upper()
    model._handlers[0] = model.keep
    bench = Bench(model, 1 << Feature.VERSION_1)
    bench.send(b"a", b"b", b"c")
    assert bench.answers() == []
    for request in (model.kept[2], model.kept[0]):
        upper(request)
        request.complete()
    model.flush()
    assert bench.answers() == [b"C", b"A"]


def test_a_thread_completes_requests_and_settle_gives_them_back(
    executor: ThreadPoolExecutor,
) -> None:
    model = Upper(lambda requests: [model.run_in(executor, upper, r) for r in requests])
    bench = Bench(model)
    bench.send(b"from", b"a", b"thread")
    assert model.settle(SECONDS)
    assert sorted(bench.answers()) == [b"A", b"FROM", b"THREAD"]


def test_an_event_loop_gives_back_what_threads_complete(executor: ThreadPoolExecutor) -> None:
    model = Upper(lambda requests: [model.run_in(executor, upper, r) for r in requests])
    bench = Bench(model)
    loop = Loop()
    watch_device(model, loop)
    bench.guest.on_call = lambda index: loop.stop()
    try:
        bench.send(b"x")
        loop.call_later(SECONDS, loop.stop)
        loop.run()
        assert bench.answers() == [b"X"]
    finally:
        unwatch_device(model, loop)
        loop.close()


def test_a_coroutine_handles_each_request() -> None:
    class Slow(Upper):
        def __init__(self) -> None:
            super().__init__(self.answer)

        async def answer(self, request: Request) -> None:
            await asyncio.sleep(0.001)
            upper(request)

    bench = Bench(model := Slow())
    bench.send(b"one", b"two")
    assert model.settle(SECONDS)
    assert sorted(bench.answers()) == [b"ONE", b"TWO"]
    model.close()
    model.close()


def test_a_fault_in_a_handler_asks_for_a_reset_and_the_device_works_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(requests: Sequence[Request]) -> None:
        if requests[0].reader.read(1) == b"!":
            raise RuntimeError("a mistake of the author's")
        for request in requests:
            request.complete(0)

    bench = Bench(model := Upper(handler))
    bench.send(b"!")
    assert model.status & Status.NEEDS_RESET and bench.answers() == []
    assert str(model.fault) == "a mistake of the author's"
    assert "in handler" in caplog.text  # the traceback
    bench.guest.probe()
    bench.send(b"fine")
    assert bench.answers() == [b""]


def test_a_request_that_is_too_short_is_the_drivers_fault() -> None:
    bench = Bench(model := Upper(lambda requests: requests[0].reader.read(100)))
    bench.send(b"short")
    assert model.stats["driver_errors"] == 1
    assert "readable bytes where 100 are needed" in str(model.fault)


@pytest.mark.parametrize("how", ["thread", "coroutine"])
def test_a_fault_in_other_threads_asks_for_a_reset(how: str, executor: ThreadPoolExecutor) -> None:
    def work(request: Request) -> None:
        raise RuntimeError("in a thread")

    async def answer(request: Request) -> None:
        work(request)

    model = Upper(
        answer
        if how == "coroutine"
        else lambda requests: [model.run_in(executor, work, r) for r in requests]
    )
    bench = Bench(model)
    bench.send(b"x")
    model.settle(SECONDS)
    assert model.status & Status.NEEDS_RESET and str(model.fault) == "in a thread"
    model.close()


def test_a_reset_waits_for_threads_that_hold_the_guests_buffers() -> None:
    started, go_on = threading.Event(), threading.Event()

    def work(request: Request) -> None:
        started.set()
        go_on.wait(SECONDS)
        request.writer.write(b"late")

    with ThreadPoolExecutor(1) as executor:
        model = Upper(lambda requests: [model.run_in(executor, work, r) for r in requests])
        type(model).drain_seconds, before = SECONDS, model.drain_seconds
        try:
            bench = Bench(model)
            bench.send(b"one", b"two")  # the second is not begun on: it is cancelled
            assert started.wait(SECONDS)
            threading.Timer(0.05, go_on.set).start()
            bench.guest.reset()
            assert go_on.is_set() and not model._running
        finally:
            type(model).drain_seconds = before
            go_on.set()
    assert model.status == 0


def test_a_reset_cancels_coroutines_and_waits_until_they_have_ended() -> None:
    ended = threading.Event()

    async def answer(request: Request) -> None:
        try:
            await asyncio.sleep(SECONDS)
        finally:
            time.sleep(0.05)  # still at it, and still with the guest's buffers
            request.writer.write(b"bye")
            ended.set()

    bench = Bench(model := Upper(answer))
    bench.send(b"x")
    wait_until(lambda: model._asyncio is not None and len(asyncio.all_tasks(model._asyncio.loop)))
    bench.guest.reset()
    assert ended.is_set()
    model.close()


def test_work_that_never_ends_is_named_and_cannot_reach_the_buffers_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on = threading.Event()
    results: list[BaseException] = []

    def work(request: Request) -> None:
        go_on.wait(SECONDS)
        try:
            request.writer.write(b"far too late")
        except RequestGone as error:
            results.append(error)
            raise

    with ThreadPoolExecutor(1) as executor:
        model = Upper(lambda requests: [model.run_in(executor, work, r) for r in requests])
        bench = Bench(model)
        bench.send(b"x")
        wait_until(lambda: any(future for future in model._running))
        bench.guest.reset()
        assert "still worked on 0.3 seconds after the queue was stopped" in caplog.text
        go_on.set()
        wait_until(lambda: results and not model._running)
    model.settle()
    assert model.fault is None


def test_a_request_completed_after_a_reset_is_not_given_to_the_next_driver() -> None:
    model = Upper()
    model._handlers[0] = model.keep
    bench = Bench(model)
    bench.send(b"old")
    old = model.kept.pop()
    bench.guest.probe()
    bench.send(b"new")
    old.complete(0)
    model.flush()
    assert bench.answers() == []
    upper(model.kept[0])
    model.kept[0].complete()
    model.flush()
    assert bench.answers() == [b"NEW"]


def test_what_is_held_through_stops_is_never_lost_however_often_the_queue_stops() -> None:
    """Found by audit: a request that came out of the way of `resubmit` and was held at the next
    stop, or had not been taken by then, was neither in the position nor among the unfinished."""
    model = Upper()
    model._handlers[0] = model.keep
    bench = Bench(model, 1 << Feature.VERSION_1)
    ring = bench.guest.queues[0]
    bench.send(b"a", b"b", b"c")
    model.kept[2].complete(0)  # so that a and b are no longer the last ones
    model.flush()
    for takes in (3, 1, 0, 1, 3):
        model.kept.clear()
        base = model.stop_queue(0)
        places = {"desc": ring.desc, "avail": ring.avail, "used": ring.used}
        model.setup_queue(0, size=ring.size, **places, next_avail=base, next_used=1)
        queue = model.queues[0]
        assert queue.ring is not None
        model._take(queue, queue.ring, takes)
    model._handlers[0] = model.at_once
    base = model.stop_queue(0)
    model.setup_queue(0, size=ring.size, **places, next_avail=base, next_used=1)
    model.notify(0)
    assert sorted(bench.answers()) == [b"", b"A", b"B"]


@pytest.mark.parametrize("completed", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_what_is_held_when_a_queue_stops_is_handed_out_again_when_it_goes_on(
    completed: tuple[int, ...],
) -> None:
    model = Upper()
    model._handlers[0] = model.keep
    bench = Bench(model, 1 << Feature.VERSION_1)
    ring = bench.guest.queues[0]
    bench.send(b"a", b"b", b"c")
    for index in completed:
        upper(model.kept[index])
        model.kept[index].complete()
    model.flush()
    kept, model.kept = model.kept, []
    base = model.stop_queue(0)
    for request in kept:
        if not request.completed:
            with pytest.raises(RequestGone):
                request.reader.read()
    model.setup_queue(
        0,
        size=ring.size,
        desc=ring.desc,
        avail=ring.avail,
        used=ring.used,
        next_avail=base,
        next_used=len(completed),
    )
    model._handlers[0] = model.at_once
    model.notify(0)
    expected = [b"A", b"B", b"C"]
    first = [expected[index] for index in completed]
    assert sorted(bench.answers()) == sorted(first + [e for e in expected if e not in first])
    assert model.fault is None


def test_a_reset_forgets_what_a_stopped_queue_left() -> None:
    model = Upper()
    model._handlers[0] = model.keep
    bench = Bench(model, 1 << Feature.VERSION_1)
    bench.send(b"a", b"b")
    model.kept[1].complete(0)
    model.flush()
    model.stop_queue(0)
    assert model.queues[0].unfinished
    bench.guest.probe()
    assert not model.queues[0].unfinished
    model.kept.clear()
    bench.guest.kick(0)
    assert model.kept == []


def test_a_queue_without_a_handler_is_taken_from_when_there_is_something_to_say() -> None:
    bench = Bench(model := Upper())
    assert model.take(1) == []
    bench.send(b"", b"", b"", queue=1)
    assert model.kicked == ["events"]
    first, second = model.take(1, 2)
    first.writer.write(b"an event")
    first.complete()
    second.complete(0)
    model.flush()
    assert bench.answers(1) == [b"an event", b""]
    assert len(model.take(1)) == 1 and model.take(1) == []
    bench.send(b"", queue=1)
    assert model.kicked == ["events"] * 2  # a kick came, since it was asked for


def test_taking_from_a_bad_queue_asks_for_a_reset_and_does_not_raise() -> None:
    bench = Bench(model := Upper())
    ring = bench.guest.queues[1]
    bench.send(b"", queue=1, kick=False)
    bench.memory.store16(ring.avail + 2, 0x7000)
    assert model.take(1) == []
    assert model.status & Status.NEEDS_RESET


def test_the_driver_writes_only_the_fields_that_it_may() -> None:
    bench = Bench(model := Upper())
    before = bytes(model.config)
    bench.model.write_config(0, b"\xaa" * 16)
    assert bytes(model.config) == before[:2] + b"\xaa" * 2 + before[4:8] + b"\xaa" * 8
    assert model.config_fields == ["mode", "limit"]
    assert model.stats["config_writes_ignored"] == 1
    bench.model.write_config(10, b"\x01")
    assert bytes(model.config)[8:] == b"\xaa\xaa\x01" + b"\xaa" * 5
    bench.model.write_config(500, b"\x01")
    bench.model.write_config(0, b"")
    assert model.stats["config_writes_ignored"] == 2


def test_a_field_that_is_not_there_cannot_be_writable() -> None:
    class Wrong(Upper):
        config_writable = ("colour",)

    with pytest.raises(UsageError, match="no colour"):
        Wrong()


def test_a_driver_that_kicks_from_within_a_call_is_served_without_nesting() -> None:
    depth = most = 0

    def handler(requests: Sequence[Request]) -> None:
        nonlocal depth, most
        depth += 1
        most = max(most, depth)
        for request in requests:
            request.complete(0)
        depth -= 1

    bench = Bench(Upper(handler), 1 << Feature.VERSION_1)
    left = 3000

    def on_call(index: int) -> None:
        nonlocal left
        bench.answers()
        if left:
            left -= 1
            bench.guest.allocator = type(bench.guest.allocator)(bench.memory)
            bench.guest.queues[0].add((), [(0x80000, 8)])
            bench.guest.kick(0)

    bench.guest.on_call = on_call
    bench.send(b"go")
    assert (left, most) == (0, 1)


def test_a_kick_of_another_queue_from_within_a_call_is_not_lost() -> None:
    bench = Bench(model := Upper(), 1 << Feature.VERSION_1)
    bench.guest.on_call = lambda index: bench.send(b"", queue=1) if index == 0 else None
    bench.send(b"x")
    assert model.kicked == ["events"]


def test_a_watched_descriptor_that_fails_is_a_fault_of_the_device() -> None:
    read, write = os.pipe()
    bench = Bench(model := Upper())

    def readable() -> None:
        os.read(read, 1)
        raise RuntimeError("the watch")

    watch = model.watch(read, readable=readable)
    loop = Loop()
    watch_device(model, loop)
    watch.want(reading=True)
    os.write(write, b"x")
    loop.run_once(SECONDS)
    assert str(model.fault) == "the watch"
    model.unwatch(watch)
    os.write(write, b"x")
    loop.run_once(0)
    os.close(read)
    os.close(write)
    bench.guest.reset()
    loop.close()


def test_an_alarm_rings_when_its_time_has_come_and_not_when_it_was_put_off() -> None:
    model = Upper()
    rung: list[str] = []
    loop = Loop()
    early = model.alarm(lambda: rung.append("early"))
    early.set(0)  # before there is a loop
    watch_device(model, loop)
    late = model.alarm(lambda: rung.append("late"))
    never = model.alarm(lambda: rung.append("never"))
    for alarm in (late, never):
        alarm.set(0)
    late.set(0.03)
    never.set(None)
    deadline = time.monotonic() + SECONDS
    while "late" not in rung and time.monotonic() < deadline:
        loop.run_once(0.01)
    assert rung == ["early", "late"] and late.deadline is None
    late.set(0)
    unwatch_device(model, loop)
    loop.run_once(0.01)
    assert rung == ["early", "late"]  # nobody rings it for a device that is not served
    loop.close()


def test_what_fails_when_an_alarm_rings_is_a_fault_of_the_device() -> None:
    def fail() -> None:
        raise RuntimeError("the alarm")

    bench = Bench(model := Upper())
    model.alarm(fail).ring()
    assert str(model.fault) == "the alarm" and model.status & Status.NEEDS_RESET
    bench.guest.reset()


class ModelMachine(RuleBasedStateMachine):
    """A model that completes at once, later, or in a thread, while its queue stops and is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = ThreadPoolExecutor(1)
        self.model = Upper(self.handle)
        self.ways: list[str] = []
        self.held: list[Request] = []
        self.bench = Bench(self.model, 1 << Feature.VERSION_1 | 1 << Feature.EVENT_IDX)
        self.expected: list[bytes] = []
        self.serial = 0
        self.given_back = 0

    def handle(self, requests: Sequence[Request]) -> None:
        for request in requests:
            way = self.ways.pop(0) if self.ways else "now"
            if way == "now":
                upper(request)
                request.complete()
            elif way == "thread":
                self.model.run_in(self.executor, upper, request)
            else:
                self.held.append(request)

    def has_room(self) -> bool:
        return self.bench.guest.queues[0].num_free >= 6

    @rule(ways=st.lists(st.sampled_from(["now", "later", "thread"]), min_size=1, max_size=3))
    def send(self, ways: list[str]) -> None:
        if not self.has_room():
            # What threads still have is no reason not to send: which rules apply would be theirs.
            self.settle()
            self.every_answer_comes_once()
            if not self.has_room():
                return
        self.ways += ways
        texts = []
        for _ in ways:
            self.serial += 1
            texts.append(b"t%d" % self.serial)
        self.expected += [text.upper() for text in texts]
        self.bench.send(*texts)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def complete_one(self, data: st.DataObject) -> None:
        request = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        upper(request)
        request.complete()
        self.model.flush()

    @rule()
    def settle(self) -> None:
        assert self.model.settle(SECONDS)

    @rule()
    def stop_and_go_on(self) -> None:
        ring = self.bench.guest.queues[0]
        base = self.model.stop_queue(0)
        self.held.clear()
        self.model.setup_queue(
            0,
            size=ring.size,
            desc=ring.desc,
            avail=ring.avail,
            used=ring.used,
            next_avail=base,
            next_used=self.bench.memory.load16(ring.used + 2),
        )
        self.model.notify(0)

    @rule()
    def reset(self) -> None:
        self.bench.guest.probe()
        self.held.clear()
        self.expected.clear()
        self.ways.clear()

    @invariant()
    def every_answer_comes_once(self) -> None:
        for answer in self.bench.answers():
            self.expected.remove(answer)
        assert self.model.fault is None

    def teardown(self) -> None:
        self.model.settle(SECONDS)
        for request in self.held:
            upper(request)
            request.complete()
        self.model.flush()
        self.every_answer_comes_once()
        assert self.expected == []
        self.executor.shutdown()


TestModelMachine = ModelMachine.TestCase
TestModelMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
