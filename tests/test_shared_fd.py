"""Descriptors that a peer shares, and makes to wait: whoever reads or writes them does not."""

from __future__ import annotations

import os
import signal
import time
import tty
from collections.abc import Callable, Iterator

import pytest

from vq import shared_fd
from vq.shared_fd import MadeToWait, Watchdog, drain, read, signal_event, write

FULL = 0xFFFF_FFFF_FFFF_FFFE
"""The most that an eventfd counts to (eventfd(2))."""
TICK = 0.05

needs_eventfd = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd here")


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_fd, "TICK_SECONDS", TICK)
    handler = signal.getsignal(signal.SIGALRM)
    left, period = signal.getitimer(signal.ITIMER_REAL)
    with Watchdog():
        yield
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (pytest.approx(left, abs=60), period)


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    while True:
        try:
            os.write(fd, bytes(4096))
        except BlockingIOError:
            return


@needs_eventfd
def test_events_are_taken_all_at_once(event: int, pipe: tuple[int, int]) -> None:
    for source, sink in ((event, event), pipe):
        for _ in range(3):
            signal_event(sink)
        assert drain(source)
        with pytest.raises(BlockingIOError):
            drain(source)


@needs_eventfd
@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="a read that never waits is Linux'")
def test_to_look_for_events_never_waits_whatever_was_made_of_the_file(
    event: int, pipe: tuple[int, int]
) -> None:
    """Without a watchdog, too. (It would take for ever: the kick was taken back meanwhile.)"""
    for fd in (event, pipe[0]):
        os.set_blocking(fd, True)
        with pytest.raises(BlockingIOError):
            drain(fd)


def test_a_terminal_that_is_made_to_wait_does_not_hold_up_for_ever(watchdog: None) -> None:
    """It does not know RWF_NOWAIT: that read is watched, as writes are."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(theirs, True)
    made_to_wait(lambda: drain(theirs))
    os.close(ours)
    os.close(theirs)


def test_a_pipe_that_nobody_writes_to_any_more_is_told() -> None:
    source, sink = os.pipe()
    os.close(sink)
    assert not drain(source)
    os.close(source)


@needs_eventfd
def test_events_where_there_are_too_many_already_change_nothing(event: int) -> None:
    os.eventfd_write(event, FULL)
    signal_event(event)
    assert os.eventfd_read(event) == FULL


def made_to_wait(step: Callable[[], object]) -> float:
    began = time.monotonic()
    with pytest.raises(MadeToWait):
        step()
    return time.monotonic() - began


@needs_eventfd
def test_who_is_made_to_wait_is_freed(event: int, pipe: tuple[int, int], watchdog: None) -> None:
    os.eventfd_write(event, FULL)
    os.set_blocking(event, True)
    assert made_to_wait(lambda: signal_event(event)) > TICK / 2
    source, sink = pipe
    os.set_blocking(source, True)
    made_to_wait(lambda: read(source, 1))
    fill(sink)
    os.set_blocking(sink, True)
    made_to_wait(lambda: write(sink, b"state"))
    made_to_wait(lambda: signal_event(sink))
    time.sleep(3 * TICK)  # nothing is under way: nothing is ended
    drain(source)


@needs_eventfd
def test_who_does_not_wait_is_left_alone(event: int, watchdog: None) -> None:
    """The signal comes in the middle of a write, too, but not twice in the same one."""
    ends = time.monotonic() + 20 * TICK
    while time.monotonic() < ends:
        for _ in range(100):
            signal_event(event)
    assert drain(event)
