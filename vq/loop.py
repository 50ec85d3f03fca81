"""One event loop for everything that a process serves: sockets, kicks, links and timers.

A thin layer over `selectors`: callbacks for descriptors that become readable or writable, callbacks
for the next turn, and timers. One thread; nothing here knows what the descriptors are.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Loop", "Timer"]

Callback = Callable[[], None]


LINGER = 50e-6
"""Seconds for which a loop that was busy looks for more before it sleeps."""


class Timer:
    """A callback at a point in time; `cancel` before then makes it never happen."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forgets the callback. Allowed at any time."""
        self.callback = None


class _Watch:
    __slots__ = ("readable", "writable")

    def __init__(self, readable: Callback | None, writable: Callback | None) -> None:
        self.readable = readable
        self.writable = writable

    @property
    def events(self) -> int:
        return (selectors.EVENT_READ if self.readable else 0) | (
            selectors.EVENT_WRITE if self.writable else 0
        )


class Loop:
    """Runs callbacks. Whatever a callback raises comes out of `run` or `run_once`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False
        self._busy = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.watch(self._wake_read, readable=self._woken)

    def watch(
        self,
        fd: int,
        *,
        readable: Callback | None = None,
        writable: Callback | None = None,
    ) -> None:
        """Calls back while `fd` is readable or writable, instead of what was watched there before.

        Without any callback the descriptor is not watched any more; that has to happen before it
        is closed. Raises `OSError` for a descriptor that cannot be polled (a plain file).
        """
        watch = _Watch(readable, writable)
        if not watch.events:
            if self._watches.pop(fd, None) is not None:
                self._selector.unregister(fd)
            return
        if fd in self._watches:
            self._selector.modify(fd, watch.events, watch)
        else:
            self._selector.register(fd, watch.events, watch)
        self._watches[fd] = watch

    def call_soon(self, callback: Callback) -> None:
        """Calls back once in the next turn, after descriptors that are ready have had theirs."""
        self._soon.append(callback)

    def call_soon_from_any_thread(self, callback: Callback) -> None:
        """`call_soon` for other threads than the loop's: the loop wakes up for it."""
        self._soon.append(callback)
        self._wake()

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Calls back once, `seconds` from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def run(self) -> None:
        """Serves until `stop`; returns at once when that was called before."""
        while not self._stopping:
            self.run_once()
        self._stopping = False

    def run_once(self, timeout: float | None = None) -> None:
        """One turn: waits up to `timeout` seconds (None: for ever) and runs what is due."""
        for key, events in self._ready(self._patience(timeout)):
            # An earlier callback of this turn may have given the number to another descriptor.
            watch: _Watch = key.data
            if events & selectors.EVENT_READ and watch.readable and self._is_current(key.fd, watch):
                watch.readable()
            if (
                events & selectors.EVENT_WRITE
                and watch.writable
                and self._is_current(key.fd, watch)
            ):
                watch.writable()
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()

    def stop(self) -> None:
        """Makes `run` return soon. Allowed from callbacks, signal handlers and other threads."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Gives back the loop's own descriptors; what is watched is the watchers' to close."""
        self._selector.close()
        self._watches.clear()
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

    def _ready(self, patience: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, waiting for it up to `patience` seconds (None: for ever).

        Where something has just been done the next thing is often not far: to look for it a little
        while costs less than to fall asleep and be woken.
        """
        select = self._selector.select
        if self._busy and (patience is None or patience > LINGER):
            end = time.monotonic() + LINGER
            while time.monotonic() < end:
                ready = select(0)
                if ready:
                    return ready
        ready = select(patience)
        self._busy = bool(ready)
        return ready

    def _is_current(self, fd: int, watch: _Watch) -> bool:
        return self._watches.get(fd) is watch

    def _patience(self, timeout: float | None) -> float | None:
        if self._soon or self._stopping:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return timeout
        until_timer = max(0.0, self._timers[0][0] - time.monotonic())
        return until_timer if timeout is None else min(timeout, until_timer)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes just as well
            os.write(self._wake_write, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
