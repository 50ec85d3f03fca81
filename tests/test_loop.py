"""The event loop."""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import vq.loop
from vq.loop import LINGER, Loop

POLLERS = [vq.loop._Selector, *([vq.loop._Epoll] if hasattr(select, "epoll") else [])]


@pytest.fixture(params=POLLERS, ids=lambda poller: poller.__name__)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setattr(vq.loop, "_POLLER", request.param)
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_readable_descriptor_is_reported_until_it_is_read(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    seen: list[int] = []
    loop.watch(pipe[0], readable=lambda: seen.append(1))
    loop.run_once(0)
    assert seen == []
    os.write(pipe[1], b"x")
    loop.run_once(0)
    loop.run_once(0)
    assert seen == [1, 1]
    loop.watch(pipe[0])
    loop.run_once(0)
    assert seen == [1, 1]
    loop.watch(pipe[0])  # not watched: nothing to do


def test_reading_and_writing_are_watched_apart(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[str] = []
    loop.watch(pipe[1], writable=lambda: seen.append("w"))
    loop.run_once(0)
    loop.watch(pipe[1], readable=lambda: seen.append("r"))
    loop.run_once(0)
    assert seen == ["w"]


def test_an_event_of_a_descriptor_that_was_given_up_in_the_same_turn_is_dropped(
    loop: Loop,
) -> None:
    pipes = [os.pipe(), os.pipe()]
    seen: list[int] = []

    def first_come(mine: int, other: int) -> None:
        seen.append(mine)
        loop.watch(pipes[other][0])
        # Its number goes to a descriptor that has nothing to do with it.
        loop.watch(pipes[other][0], readable=lambda: None)

    for ends in pipes:
        os.write(ends[1], b"x")
    loop.watch(pipes[0][0], readable=lambda: first_come(0, 1))
    loop.watch(pipes[1][0], readable=lambda: first_come(1, 0))
    loop.run_once(0)
    assert len(seen) == 1
    for ends in pipes:
        loop.watch(ends[0])
        for end in ends:
            os.close(end)


def test_work_for_the_next_turn_is_done_once_and_not_in_the_same_turn(loop: Loop) -> None:
    seen: list[int] = []

    def again() -> None:
        seen.append(1)
        if len(seen) < 3:
            loop.call_soon(again)

    loop.call_soon(again)
    for count in (1, 2, 3, 3):
        loop.run_once(0)
        assert len(seen) == count


def test_timers_come_in_order_and_can_be_cancelled(loop: Loop) -> None:
    seen: list[str] = []
    loop.call_later(0.02, lambda: seen.append("late"))
    loop.call_later(0.01, lambda: seen.append("early"))
    loop.call_later(0.0, lambda: seen.append("never")).cancel()
    started = time.monotonic()
    while len(seen) < 2:
        loop.run_once(50)
        assert time.monotonic() - started < 40
    assert seen == ["early", "late"]


def test_a_cancelled_timer_does_not_wake_the_loop(loop: Loop) -> None:
    loop.call_later(0.0, lambda: None).cancel()
    started = time.monotonic()
    loop.run_once(0.05)
    assert time.monotonic() - started >= 0.04


def test_stop_before_run_is_not_forgotten(loop: Loop) -> None:
    """A signal may come before the loop begins to serve."""
    loop.call_later(5, lambda: pytest.fail("it ran on"))
    loop.stop()
    loop.run()
    loop.call_soon(loop.stop)
    loop.run()  # and it counts once


def test_stop_ends_run_from_another_thread(loop: Loop) -> None:
    timer = threading.Timer(0.02, loop.stop)
    timer.start()
    late = loop.call_later(60, loop.stop)
    started = time.monotonic()
    loop.run()
    assert time.monotonic() - started < 50
    late.cancel()
    timer.join()


def test_a_plain_file_cannot_be_watched(loop: Loop) -> None:
    with open(__file__) as file, pytest.raises(OSError):
        loop.watch(file.fileno(), readable=lambda: None)


def test_a_descriptor_that_hung_up_is_readable(loop: Loop) -> None:
    """So that its watcher reads, and finds out."""
    reading, writing = os.pipe()
    seen: list[bytes] = []
    loop.watch(reading, readable=lambda: seen.append(os.read(reading, 8)))
    os.close(writing)
    loop.run_once(1)
    assert seen == [b""]
    loop.watch(reading)
    os.close(reading)


def test_a_pipe_that_nobody_reads_any_more_is_writable(loop: Loop) -> None:
    reading, writing = os.pipe()
    seen: list[int] = []
    loop.watch(writing, writable=lambda: seen.append(1))
    os.close(reading)
    loop.run_once(1)
    assert seen == [1]
    loop.watch(writing)
    os.close(writing)


# --- looking for what is expected before falling asleep -------------------------------------------


class Clockwork:
    """A clock and a poller in one: events come at the times that they were told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int]] = []  # when, which descriptor
        self.slept = 0.0
        self.looked = 0.0

    def monotonic(self) -> float:
        return self.now

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        if timeout == 0:
            self.now += LINGER / 10
            self.looked += LINGER / 10
        due = self.events[0][0] if self.events else None
        if due is not None and due > self.now and timeout != 0:
            end = due if timeout is None else min(due, self.now + timeout)
            self.slept += end - self.now
            self.now = end
        if due is None or due > self.now:
            return []
        return [(self.events.pop(0)[1], vq.loop._POLLER.read)]


@pytest.fixture
def clockwork(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    made = Clockwork()
    monkeypatch.setattr(vq.loop, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(loop, "_poll", made.poll)
    return made


def run_events(loop: Loop, clockwork: Clockwork, events: list[tuple[float, int]]) -> None:
    clockwork.events = events
    clockwork.slept = clockwork.looked = 0.0
    while events:
        loop.run_once()


NEAR, FAR = LINGER / 2, 200 * LINGER


def test_events_that_come_soon_find_the_loop_awake(loop: Loop, clockwork: Clockwork) -> None:
    run_events(loop, clockwork, [(NEAR * number, 5 + number % 2) for number in range(40)])
    # It had to learn what follows: on each of two descriptors once.
    assert clockwork.slept <= 3 * NEAR


def test_a_loop_that_does_not_linger_sleeps_at_once(loop: Loop, clockwork: Clockwork) -> None:
    loop.linger = 0
    run_events(loop, clockwork, [(NEAR * number, 5 + number % 2) for number in range(40)])
    assert clockwork.looked == 0


def test_what_counts_as_soon_is_as_long_as_the_loop_lingers(
    loop: Loop, clockwork: Clockwork
) -> None:
    loop.linger = 2 * FAR
    run_events(loop, clockwork, [(FAR * number, 5) for number in range(40)])
    assert clockwork.slept <= 3 * FAR


def test_timers_keep_no_loop_from_learning_what_comes_soon(
    loop: Loop, clockwork: Clockwork
) -> None:
    """Statistics are told once a second, and a loop may be told to linger for as long."""
    loop.linger = 200 * FAR

    def tell() -> None:
        loop.call_later(100 * FAR, tell)

    tell()
    run_events(loop, clockwork, [(FAR * number, 5) for number in range(40)])
    assert clockwork.slept <= 3 * FAR


def test_events_far_apart_cost_no_time_of_looking(loop: Loop, clockwork: Clockwork) -> None:
    run_events(loop, clockwork, [(FAR * number, 5) for number in range(40)])
    assert clockwork.looked == 0


def test_what_comes_soon_is_told_from_what_does_not_by_what_was_before_it(
    loop: Loop, clockwork: Clockwork
) -> None:
    """A ping now and then: its answer is near, the next ping far."""
    pings = [
        (FAR * number + delay, descriptor)
        for number in range(40)
        for delay, descriptor in ((0, 5), (NEAR, 6))
    ]
    run_events(loop, clockwork, pings)
    assert clockwork.looked <= 40 * (NEAR + LINGER / 10) + LINGER
    assert clockwork.slept >= 38 * (FAR - NEAR)


def test_looking_in_vain_is_not_repeated(loop: Loop, clockwork: Clockwork) -> None:
    run_events(loop, clockwork, [(NEAR * number, 5) for number in range(4)])
    end = clockwork.now
    run_events(loop, clockwork, [(end + FAR * number, 5) for number in range(1, 40)])
    assert clockwork.looked <= 2 * LINGER


@pytest.mark.parametrize("wait", [0.5 * LINGER, 1.5 * LINGER])
def test_no_timer_is_late_for_the_sake_of_looking(
    wait: float, loop: Loop, clockwork: Clockwork
) -> None:
    run_events(loop, clockwork, [(NEAR * number, 5) for number in range(4)])
    seen: list[float] = []
    due = clockwork.now + wait
    loop.call_later(wait, lambda: seen.append(clockwork.now))
    clockwork.events = [(clockwork.now + FAR, 5)]
    while not seen:
        loop.run_once()
    assert seen[0] <= due + LINGER / 100


def test_what_can_wait_is_done_before_the_loop_sleeps(loop: Loop, clockwork: Clockwork) -> None:
    done: list[float] = []
    clockwork.events = [(FAR, 5)]
    loop.call_in_lull(lambda: done.append(clockwork.now))
    assert not done
    loop.run_once()
    assert len(done) == 1 and clockwork.slept == 0
    loop.run_once()
    assert len(done) == 1 and clockwork.slept > 0


def test_what_can_wait_waits_while_an_event_is_expected(loop: Loop, clockwork: Clockwork) -> None:
    run_events(loop, clockwork, [(NEAR * number, 5) for number in range(4)])
    done: list[float] = []
    loop.call_in_lull(lambda: done.append(clockwork.now))
    begin = clockwork.now
    clockwork.events = [(begin + NEAR, 5), (begin + FAR, 5)]
    loop.run_once()
    assert not done
    loop.run_once()
    assert len(done) == 1 and begin + NEAR + LINGER <= done[0] <= begin + NEAR + 2 * LINGER


def test_what_can_wait_is_done_once_nothing_else_is_ready(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    read_end, write_end = pipe
    done: list[str] = []

    def readable() -> None:
        os.read(read_end, 1)
        done.append("read")

    loop.watch(read_end, readable=readable)
    loop.call_in_lull(lambda: done.append("waited"))
    os.write(write_end, b"12")
    for _ in range(3):
        loop.run_once(0)
    assert done == ["read", "read", "waited"]
    loop.run_once(0)
    assert done == ["read", "read", "waited"]


def test_what_can_wait_does_not_wait_for_ever(loop: Loop, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    turns = itertools.count()
    done: list[int] = []

    def readable() -> None:
        next(turns)

    loop.watch(read_end, readable=readable)
    os.write(write_end, b"1")
    for _ in range(2):
        loop.call_in_lull(lambda: done.append(next(turns)))
        for _ in range(100):
            loop.run_once(0)
            if done:
                break
        assert done.pop() <= 2 * vq.loop._MOST_WITHOUT_LULL


def test_what_can_wait_does_not_wait_for_many_long_turns(loop: Loop, clockwork: Clockwork) -> None:
    """A loop that serves many guests has turns of milliseconds, and a guest whose queue is full
    waited for a tenth of a second."""
    done: list[float] = []
    for _ in range(2):
        clockwork.events = [(clockwork.now, 5)] * 20
        asked = clockwork.now
        loop.call_in_lull(lambda: done.append(clockwork.now))
        while not done:
            loop.run_once()
            clockwork.now += 2e-3
        assert vq.loop._LONGEST_WITHOUT_LULL <= done.pop() - asked < 8e-3
        loop.run_once()


def test_what_can_wait_may_be_put_off_again(loop: Loop) -> None:
    done: list[int] = []

    def again() -> None:
        done.append(len(done))
        if len(done) < 3:
            loop.call_in_lull(again)

    loop.call_in_lull(again)
    for turn in range(1, 4):
        loop.run_once(0)
        assert done == list(range(turn))


def test_what_is_left_to_do_in_a_lull_is_done_before_the_loop_sleeps(loop: Loop) -> None:
    late = loop.call_later(5, loop.stop)
    done: list[int] = []

    def in_lull() -> None:
        loop.call_soon(lambda: done.append(1))
        loop.call_soon(loop.stop)

    loop.call_in_lull(in_lull)
    began = time.monotonic()
    loop.run()
    late.cancel()
    assert done == [1] and time.monotonic() - began < 4


# --- looking out for what no descriptor tells ----------------------------------------------------


class Letterbox:
    """Something comes at the times that it was told to; a bell rings if that is wanted."""

    BELL = 7

    def __init__(self, loop: Loop, clockwork: Clockwork) -> None:
        self.loop = loop
        self.clockwork = clockwork
        self.letters: list[float] = []
        self.opened: list[float] = []
        self.rested = 0
        self.just_now = False  # something comes when the bell is switched on

    def look(self) -> bool:
        return bool(self.letters) and self.letters[0] <= self.clockwork.now

    def rest(self) -> bool:
        self.rested += 1
        self.clockwork.events += [(time, self.BELL) for time in self.letters[:1]]
        came, self.just_now = self.just_now, False
        return came

    def deal(self) -> None:
        self.opened.append(self.clockwork.now)
        del self.letters[:1]
        self.loop.look_out(self)


def test_what_a_lookout_sees_is_dealt_with_without_sleep(loop: Loop, clockwork: Clockwork) -> None:
    box = Letterbox(loop, clockwork)
    run_events(loop, clockwork, [(NEAR * number, 5) for number in range(4)])
    begin = clockwork.now
    box.letters = [begin + NEAR * number for number in range(1, 10)]
    loop.look_out(box)
    while box.letters:
        loop.run_once()
        if box.look():
            box.deal()  # told by the bell
    # It had to learn what follows: on what it sees, and on the bell.
    assert box.rested <= 2 and clockwork.slept <= 3 * NEAR
    assert len(box.opened) == 9 and clockwork.now <= begin + 10 * NEAR


def test_a_loop_that_goes_to_sleep_has_its_lookouts_rest_once(
    loop: Loop, clockwork: Clockwork
) -> None:
    box = Letterbox(loop, clockwork)
    clockwork.events = [(FAR, 5), (2 * FAR, 5)]
    loop.look_out(box)
    loop.look_out(box)
    loop.run_once()
    assert box.rested == 1 and not box.opened and clockwork.now == FAR
    loop.run_once()
    assert box.rested == 1


def test_what_came_just_before_the_rest_is_dealt_with_before_the_loop_sleeps(
    loop: Loop, clockwork: Clockwork
) -> None:
    box = Letterbox(loop, clockwork)
    box.just_now = True
    clockwork.events = [(FAR, 5)]
    loop.look_out(box)
    loop.run_once()
    assert len(box.opened) == 1 and clockwork.slept == 0
    loop.run_once()
    assert box.rested == 2 and clockwork.slept > 0


@pytest.mark.parametrize("what", ["soon", "later", "look"])
def test_what_a_lookout_asks_for_when_it_goes_to_rest_is_not_slept_over(
    loop: Loop, clockwork: Clockwork, what: str
) -> None:
    """A driver's fault that shows then makes a device ask for much. The loop had looked before that
    how long it may sleep."""

    class Asking(Letterbox):
        def rest(self) -> bool:
            if what == "soon":
                loop.call_soon(self.deal)
            elif what == "look":  # where another one does already
                if not self.opened:
                    first.deal()
                    self.deal()
            else:
                loop.call_later(0, self.deal)
            return False

    first, box = Letterbox(loop, clockwork), Asking(loop, clockwork)
    clockwork.events = [(FAR, 5)]
    loop.look_out(first)
    loop.look_out(box)
    loop.run_once()
    assert box.opened and box.opened[0] < FAR and clockwork.slept == 0
    loop.run_once()
    assert first.rested == (2 if what == "look" else 1)


def test_what_goes_wrong_with_one_lookout_is_not_the_end_of_others(
    loop: Loop, clockwork: Clockwork
) -> None:
    boxes = [Letterbox(loop, clockwork) for _ in range(2)]
    for box in boxes:
        box.just_now = True
        loop.look_out(box)

    def interrupted() -> None:
        raise KeyboardInterrupt

    boxes[0].deal = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run_once()
    boxes[1].letters = [0.0]
    loop.run_once(0)
    assert boxes[1].opened


def test_a_loop_with_something_else_to_do_does_not_have_its_lookouts_rest(
    loop: Loop, clockwork: Clockwork
) -> None:
    box = Letterbox(loop, clockwork)
    loop.look_out(box)
    loop.call_soon(lambda: None)
    loop.run_once()
    assert not box.rested
    loop.run_once(0)  # whoever calls so may sleep elsewhere
    assert box.rested == 1


def test_a_lookout_is_asked_in_each_turn_however_busy_the_loop_is(
    loop: Loop, clockwork: Clockwork
) -> None:
    box = Letterbox(loop, clockwork)
    loop.look_out(box)
    box.letters = [0.0] * 5
    clockwork.events = [(0.0, 5) for _ in range(5)]
    for turn in range(1, 6):
        loop.run_once()
        assert len(box.opened) == turn and len(clockwork.events) == 5 - turn


def test_a_lookout_that_has_dealt_with_something_is_asked_again_only_if_it_wants_that(
    loop: Loop, clockwork: Clockwork
) -> None:
    box = Letterbox(loop, clockwork)
    loop.look_out(box)
    box.letters = [0.0, 0.0]
    box.loop = Loop()  # where it asks for more
    for _ in range(3):
        loop.run_once(0)
    box.loop.close()
    assert len(box.opened) == 1 and not box.rested


def test_letters_far_apart_cost_no_time_of_looking(loop: Loop, clockwork: Clockwork) -> None:
    """Each is told by an event, and the next one is looked out for in vain."""
    box = Letterbox(loop, clockwork)
    clockwork.events = [(FAR * number, 5) for number in range(1, 40)]
    while clockwork.events:
        loop.look_out(box)
        loop.run_once()
    assert box.rested == 39 and clockwork.looked <= 40 * LINGER / 10
