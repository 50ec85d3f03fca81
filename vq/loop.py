"""One event loop for everything that a process serves: sockets, kicks, links and timers.

A thin layer over the system's poller: callbacks for descriptors that become readable or writable,
callbacks for the next turn, and timers. One thread; nothing here knows what the descriptors are.

To fall asleep and be woken costs more than a frame does. So where the next event is likely to be
near, the loop looks for it a little while before it sleeps. It expects what was: after the last
event of the same descriptor, did the next event, of any descriptor, come soon? So the answers of an
exchange of one frame at a time find the loop awake, and pings far apart cost no processor time
beyond their own.

Not all that happens need be told by a descriptor. While the loop is awake it can look by itself
(`look_out`), which costs less than to be told, and only has it told before it sleeps. Likewise what
can wait is best done when nothing else is to be done (`call_in_lull`), and often need not be done
at all by then.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["Lookout", "Loop", "Timer"]

SYSTEM_CALLS = ("epoll_ctl", "epoll_pwait", "epoll_wait")

Callback = Callable[[], None]


LINGER = 50e-6
"""Seconds for which a loop looks for an expected event before it sleeps, unless somebody says
otherwise; and what counts as soon."""
_MOST_WITHOUT_LULL = 64
"""Turns after which one need not wait for a lull any longer."""
_LONGEST_WITHOUT_LULL = 5e-3
"""Seconds likewise, where turns take long: a loop may serve many."""
_LOOKED = -2  # in the place of a descriptor
_MOST_EVENTS = 64
"""Events taken in one turn; what is left comes in the next, those that waited longest first."""


class Timer:
    """A callback at a point in time; `cancel` before then makes it never happen."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forgets the callback. Allowed at any time."""
        self.callback = None


class Lookout(Protocol):
    """What a loop looks at while it is awake, and has it told otherwise before it sleeps."""

    def look(self) -> bool:
        """Whether anything came. It is asked in every turn, so this has to be quick."""

    def rest(self) -> bool:
        """The loop is about to sleep: a descriptor is to tell what comes from now on. Whether
        anything came before that."""

    def deal(self) -> None:
        """Deals with what came."""


class _Watch:
    __slots__ = ("readable", "writable")

    def __init__(self, readable: Callback | None, writable: Callback | None) -> None:
        self.readable = readable
        self.writable = writable


class _Poller(Protocol):
    """What the loop needs of the system; events are sets of bits."""

    read: int
    """What to register for to hear when a descriptor is readable."""
    write: int
    readable: int
    """The events of which any means that to read does not block; errors and hang-ups count."""
    writable: int

    def register(self, fd: int, events: int, /) -> object:
        """Begins to watch."""

    def modify(self, fd: int, events: int, /) -> object:
        """Watches for other events."""

    def unregister(self, fd: int, /) -> object:
        """Ends to watch."""

    def poll(self, timeout: float | None, most: int, /) -> list[tuple[int, int]]:
        """Ready descriptors and their events; waits up to `timeout` seconds (None: for ever)."""

    def close(self) -> None:
        """Gives back what the system lent."""


_epoll = getattr(select, "epoll", None)


class _Epoll:
    """epoll(7), whose answers are in the right form already."""

    read, write = getattr(select, "EPOLLIN", 0), getattr(select, "EPOLLOUT", 0)
    readable, writable = ~write, ~read

    def __init__(self) -> None:
        assert _epoll is not None
        epoll = _epoll()
        self.register, self.modify, self.unregister = epoll.register, epoll.modify, epoll.unregister
        self.poll, self.close = epoll.poll, epoll.close


class _Selector:
    """kqueue(2), poll(2): what `selectors` finds best elsewhere."""

    read = readable = selectors.EVENT_READ
    write = writable = selectors.EVENT_WRITE

    def __init__(self) -> None:
        selector = selectors.DefaultSelector()
        self.register, self.modify = selector.register, selector.modify
        self.unregister, self.close = selector.unregister, selector.close
        self._select = selector.select

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        """See `_Poller`. All that are ready, however many."""
        return [(key.fd, events) for key, events in self._select(timeout)]


_POLLER: type[_Poller] = _Epoll if _epoll is not None else _Selector


class Loop:
    """Runs callbacks. Whatever a callback raises comes out of `run` or `run_once`.

    `linger` is how many seconds it looks for an event that is likely to come soon before it sleeps;
    with 0 it sleeps at once.
    """

    def __init__(self, *, linger: float = LINGER) -> None:
        self.linger = linger
        self._poller = _POLLER()
        self._poll = self._poller.poll
        self._readable, self._writable = self._poller.readable, self._poller.writable
        self._watches: dict[int, _Watch] = {}
        self._changed: set[int] = set()  # what is watched otherwise since the turn began
        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False
        self._last = -1  # the descriptor of the last event, or `_LOOKED`
        self._soon_after: set[int] = set()  # descriptors after whose last event one came soon
        self._lookouts: list[Lookout] = []
        self._lull: list[Callback] = []
        self._without_lull = 0  # turns since the first of them came,
        self._lull_asked = 0.0  # and when that was
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
        poller = self._poller
        events = (poller.read if readable else 0) | (poller.write if writable else 0)
        self._changed.add(fd)
        if not events:
            if self._watches.pop(fd, None) is not None:
                poller.unregister(fd)
                self._soon_after.discard(fd)
            return
        if fd in self._watches:
            poller.modify(fd, events)
        else:
            poller.register(fd, events)
        self._watches[fd] = _Watch(readable, writable)

    def call_soon(self, callback: Callback) -> None:
        """Calls back once in the next turn, after descriptors that are ready have had theirs."""
        self._soon.append(callback)

    def call_in_lull(self, callback: Callback) -> None:
        """Calls back once nothing is ready, before the loop sleeps: for what can wait.

        That is after some turns, or some milliseconds, at the latest.
        """
        if not self._lull:
            self._without_lull, self._lull_asked = 0, time.monotonic()
        self._lull.append(callback)

    def look_out(self, lookout: Lookout) -> None:
        """Looks in every turn whether something came, until it did, or until the loop sleeps."""
        if lookout not in self._lookouts:
            self._lookouts.append(lookout)

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
        watches, changed = self._watches, self._changed
        if changed:
            changed.clear()
        for fd, events in self._ready(self._patience(timeout), sleeps=not self._soon):
            # An earlier callback of this turn may have given the number to another descriptor.
            if fd in changed:
                continue
            watch = watches.get(fd)
            if watch is None:  # a duplicate that its watcher closed without a word
                continue
            if events & self._readable and watch.readable is not None:
                watch.readable()
                if fd in changed:
                    continue
            if events & self._writable and watch.writable is not None:
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
        self._poller.close()
        self._watches.clear()
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

    def _ready(self, patience: float | None, *, sleeps: bool) -> list[tuple[int, int]]:
        """What is ready, waiting for it up to `patience` seconds (None: for ever).

        Unless it `sleeps` there is something else to do, and this is no time to go to rest.
        """
        expects = self._last in self._soon_after
        alert = self._lookouts or self._lull
        # So short a wait tells nothing, however long the loop lingers.
        if not alert and not (expects and sleeps) and patience is not None and patience <= LINGER:
            return self._poll(patience, _MOST_EVENTS)
        began = time.monotonic()
        if alert or expects:
            wait = 0.0
            if expects and sleeps:
                wait = self.linger if patience is None else min(patience, self.linger)
            ready, found = self._look_around(began, wait)
            if ready or found:
                self._soon_after.add(self._last)
                self._last = ready[-1][0] if ready else _LOOKED
                return ready
            if alert and self._go_to_rest(sleeps):
                return ready
            if patience is not None:
                patience -= time.monotonic() - began
                if patience <= 0:
                    return ready
        ready = self._poll(patience, _MOST_EVENTS)
        if ready and time.monotonic() - began <= self.linger:
            self._soon_after.add(self._last)
        else:
            self._soon_after.discard(self._last)
        if ready:
            self._last = ready[-1][0]
        return ready

    def _look_around(self, began: float, wait: float) -> tuple[list[tuple[int, int]], bool]:
        """What is ready, and whether a lookout found something, which was dealt with then.

        Looks at least once, and again for `wait` seconds from when it `began`.
        """
        poll, lookouts = self._poll, self._lookouts
        while True:
            ready = poll(0, _MOST_EVENTS)
            found = bool(lookouts) and self._look()
            if ready or found:
                if self._lull:
                    self._without_lull += 1
                    if (
                        self._without_lull >= _MOST_WITHOUT_LULL
                        or time.monotonic() - self._lull_asked >= _LONGEST_WITHOUT_LULL
                    ):
                        self._end_waiting()
                return ready, found
            if time.monotonic() - began >= wait:
                return ready, False

    def _look(self) -> bool:
        """Whether a lookout found something, which was dealt with then."""
        return self._deal([lookout for lookout in self._lookouts if lookout.look()])

    def _deal(self, finders: list[Lookout]) -> bool:
        """Has lookouts deal with what they found; whether there are any."""
        for lookout in finders:
            self._lookouts.remove(lookout)  # first: it may be to be looked out for again
            lookout.deal()
        return bool(finders)

    def _go_to_rest(self, sleeps: bool) -> bool:
        """Nothing is ready: does what waited for that, and ends to look out.

        Whether there may be something to do now.
        """
        if self._lull:
            self._end_waiting()
            return True
        if not sleeps:
            return False
        timers = len(self._timers)
        lookouts, self._lookouts = self._lookouts, []
        finders = [lookout for lookout in lookouts if lookout.rest()]
        self._lookouts += [finder for finder in finders if finder not in self._lookouts]
        # What a device asks for when its driver is found to have broken a rule is not slept over.
        asked = bool(self._lookouts or self._soon) or len(self._timers) > timers
        return self._deal(finders) or asked

    def _end_waiting(self) -> None:
        """Does what waited for a lull."""
        callbacks, self._lull = self._lull, []
        for callback in callbacks:
            callback()

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
