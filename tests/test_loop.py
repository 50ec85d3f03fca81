"""The event loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from vq.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
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
        loop.run_once(5)
        assert time.monotonic() - started < 4
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
    loop.call_later(10, loop.stop)
    started = time.monotonic()
    loop.run()
    assert time.monotonic() - started < 5
    timer.join()


def test_a_plain_file_cannot_be_watched(loop: Loop) -> None:
    with open(__file__) as file, pytest.raises(OSError):
        loop.watch(file.fileno(), readable=lambda: None)
