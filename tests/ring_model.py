"""A reference model of a split ring, and a machine that tries every interleaving of two sides.

The model is written from virtio 1.3, 2.7 alone: two small programs, a driver's and a device's, as
generators that yield each access to shared memory. `explore` lets two sides take turns between any
two accesses, in every order there is. A side is a model's program, or a real one: then it is code
of `vq` in a thread, stopped before every line that touches the shared memory.

`Buffered` puts a store buffer in front of the memory for each model side, as x86 has it (a store
may become visible after later loads of the same side, and a fence waits until it is): what the
fences are for.

Broken, both ways, is: a side sleeps for ever while there is work, a chain is lost, or comes back
twice. Which variants of the programs are broken is for the tests to know.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from types import CodeType
from typing import Any, TypeAlias

import vq.driver
import vq.split_ring
from vq.abi import Feature
from vq.driver import DeviceError, DriverRing
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

EVENT_IDX = 1 << Feature.EVENT_IDX

Place: TypeAlias = tuple[str, int]
"""A word of the ring: its name, and which of several."""
Step: TypeAlias = tuple[Any, ...]
"""``("load", place)``, ``("store", place, value)``, ``("fence",)``, ``("tell",)``, or
``("sleep",)``."""
Program: TypeAlias = Generator[Step, int, None]

AVAIL_IDX, USED_IDX = ("avail_idx", 0), ("used_idx", 0)
AVAIL_FLAGS, USED_FLAGS = ("avail_flags", 0), ("used_flags", 0)
USED_EVENT, AVAIL_EVENT = ("used_event", 0), ("avail_event", 0)


class Broken(AssertionError):
    """An interleaving in which something goes wrong; the schedule is in the message."""


# --- the model: virtio 1.3, 2.7.13, 2.7.14, 2.7.7 and 2.7.10, step by step -----------------------


def passed(event: int, new: int, old: int) -> bool:
    """Whether an index that moved from `old` to `new` went past `event` (2.7.10)."""
    return any((old + n) & 0xFFFF == event for n in range((new - old) & 0xFFFF))


def driver(size: int, chains: int, features: int, start: int, broken: str = "") -> Program:
    """Offers chains while descriptors are free, collects, and sleeps when there is nothing."""
    event_idx = bool(features & EVENT_IDX)
    avail = seen = start
    offered = collected = 0
    free = tuple(range(size))
    flying: tuple[tuple[int, int], ...] = ()
    while collected < chains:
        if offered < chains and free:
            head, free = free[0], free[1:]
            flying += ((head, offered),)
            slot, old, avail = avail % size, avail, (avail + 1) & 0xFFFF
            if broken == "index before entry":
                yield "store", AVAIL_IDX, avail
            yield "store", ("desc", head), offered
            yield "store", ("avail", slot), head
            if broken != "index before entry":
                yield "store", AVAIL_IDX, avail
            if broken != "no fence before a kick":
                yield ("fence",)
            if event_idx:
                event = yield "load", AVAIL_EVENT
                kick = _compare(broken, event, avail, old)
            else:
                flags = yield "load", USED_FLAGS
                kick = not flags & 1
            if kick:
                yield ("tell",)
            offered += 1
            continue
        index = yield "load", USED_IDX
        if index != seen:
            while index != seen:
                head = yield "load", ("used", seen % size)
                if head not in dict(flying):
                    raise Broken(f"head {head} came back, in flight are {dict(flying)}")
                flying = tuple(chain for chain in flying if chain[0] != head)
                free += (head,)
                seen = (seen + 1) & 0xFFFF
                collected += 1
            continue
        if broken == "looks before it asks":
            index = yield "load", USED_IDX
        if event_idx:
            yield "store", USED_EVENT, seen
        else:
            yield "store", AVAIL_FLAGS, 0
        if broken != "no fence before sleep":
            yield ("fence",)
        if broken != "looks before it asks":
            index = yield "load", USED_IDX
        if index == seen:
            yield ("sleep",)
        if not event_idx:
            yield "store", AVAIL_FLAGS, 1


def device(
    size: int, chains: int, features: int, start: int, broken: str = "", burst: int = 2
) -> Program:
    """Takes chains in bursts and gives them back; sleeps when there are none."""
    event_idx = bool(features & EVENT_IDX)
    taken = used = start
    while True:
        index = yield "load", AVAIL_IDX
        if index == taken:
            if broken == "looks before it asks":
                index = yield "load", AVAIL_IDX
            if event_idx:
                yield "store", AVAIL_EVENT, taken
            else:
                yield "store", USED_FLAGS, 0
            if broken != "no fence before sleep":
                yield ("fence",)
            if broken != "looks before it asks":
                index = yield "load", AVAIL_IDX
            if index == taken:
                yield ("sleep",)
            if not event_idx:
                yield "store", USED_FLAGS, 1
            continue
        heads: tuple[int, ...] = ()
        while index != taken and len(heads) < burst:
            head = yield "load", ("avail", taken % size)
            heads += (head,)
            taken = (taken + 1) & 0xFFFF
        old = used
        used = (used + len(heads)) & 0xFFFF
        if broken == "index before entry":
            yield "store", USED_IDX, used
        for number, head in enumerate(heads):
            yield "store", ("used", (old + number) % size), head
        if broken == "asks before it publishes":
            call = yield from _wants_call(event_idx, broken, used, old)
        if broken != "index before entry":
            yield "store", USED_IDX, used
        if broken != "no fence before a call":
            yield ("fence",)
        if broken != "asks before it publishes":
            call = yield from _wants_call(event_idx, broken, used, old)
        if call:
            yield ("tell",)


def _wants_call(event_idx: bool, broken: str, used: int, old: int) -> Generator[Step, int, bool]:
    if event_idx:
        event = yield "load", USED_EVENT
        return _compare(broken, event, used, old)
    flags = yield "load", AVAIL_FLAGS
    return not flags & 1


def _compare(broken: str, event: int, new: int, old: int) -> bool:
    if broken == "plain comparison":
        return new > event
    if broken == "only the last":
        return event == (new - 1) & 0xFFFF
    return passed(event, new, old)


# --- memories -------------------------------------------------------------------------------------


class Words:
    """The ring's words in guest memory, where real rings find them."""

    DESC, AVAIL, USED, END = 0, 0x40, 0x80, 0xC0

    def __init__(self, view: memoryview, size: int, start: int) -> None:
        self.view = view
        self.size = size
        view[:] = bytes(len(view))
        for place in (AVAIL_IDX, USED_IDX):
            self.store(place, start)
        self.store(USED_EVENT, start)

    def _at(self, place: Place) -> tuple[str, int]:
        name, index = place
        size = self.size
        return {
            "desc": ("<Q", self.DESC + 16 * index),
            "avail_flags": ("<H", self.AVAIL),
            "avail_idx": ("<H", self.AVAIL + 2),
            "avail": ("<H", self.AVAIL + 4 + 2 * index),
            "used_event": ("<H", self.AVAIL + 4 + 2 * size),
            "used_flags": ("<H", self.USED),
            "used_idx": ("<H", self.USED + 2),
            "used": ("<I", self.USED + 4 + 8 * index),
            "avail_event": ("<H", self.USED + 4 + 8 * size),
        }[name]

    def load(self, place: Place) -> int:
        """A word's value now."""
        form, at = self._at(place)
        return int(struct.unpack_from(form, self.view, at)[0])

    def store(self, place: Place, value: int) -> None:
        """Gives a word a value."""
        if place[0] == "desc":  # a readable buffer of one byte, which says which chain it is
            fields = 0x300 + value, 1, 0, 0
            struct.pack_into("<QIHH", self.view, self.DESC + 16 * place[1], *fields)
            return
        form, at = self._at(place)
        struct.pack_into(form, self.view, at, value)


# --- sides ----------------------------------------------------------------------------------------


class ModelSide:
    """A model's program; with `buffered` behind a store buffer."""

    def __init__(self, program: Program, words: Words, *, buffered: bool = False) -> None:
        self.program = program
        self.words = words
        self.buffered = buffered
        self.buffer: tuple[tuple[Place, int], ...] = ()
        self.step: Step | None = next(program)
        self.other: ModelSide | RealSide
        self.told = False

    @property
    def done(self) -> bool:
        return self.step is None

    @property
    def choices(self) -> Sequence[str]:
        """What the side could do next: go on, or let its oldest store become visible."""
        drain = ["drain"] if self.buffer else []
        if self.step is None or (self.step[0] == "fence" and self.buffer):
            return drain
        if self.step[0] == "sleep" and not self.told:
            return drain
        return ["go", *drain]

    def take(self, choice: str) -> None:
        if choice == "drain":
            (place, value), *rest = self.buffer
            self.buffer = tuple(rest)
            self.words.store(place, value)
            return
        assert self.step is not None
        kind, *what = self.step
        value = 0
        if kind == "load":
            value = {**dict(self.buffer)}.get(what[0], self.words.load(what[0]))
        elif kind == "store" and self.buffered:
            self.buffer += ((what[0], what[1]),)
        elif kind == "store":
            self.words.store(what[0], what[1])
        elif kind == "tell":
            self.other.told = True
        elif kind == "sleep":
            self.told = False
        try:
            self.step = self.program.send(value)
        except StopIteration:
            self.step = None

    def key(self) -> object:
        frames = []
        inner: Any = self.program
        while inner is not None:
            frame = inner.gi_frame
            if frame is not None:
                frames.append((frame.f_lasti, tuple(sorted(frame.f_locals.items(), key=_name))))
            inner = inner.gi_yieldfrom
        return tuple(frames), self.buffer, self.told

    def close(self) -> None:
        self.program.close()


_SHARED = re.compile(
    r"_words\[|load16\(|store16\(|fence\(|order_(loads|stores)\(|unpack|pack_into|_store_used_word"
)
_FILES = {vq.split_ring.__file__, vq.driver.__file__}
_LINES: dict[CodeType, frozenset[int]] = {}
"""For each function, the lines of it that touch shared memory."""


class Abandon(BaseException):
    """Ends a real side in the middle of what it does."""


class RealSide:
    """Code of `vq` in a thread of its own that stands still before each line that touches memory.

    `program` is called with the side, and with it may `tell` the other side and `sleep`. `books`
    are the objects whose attributes are the side's state.
    """

    def __init__(self, program: Callable[[RealSide], None], *books: object) -> None:
        self.told = False
        self.done = False
        self.asleep = False
        self.other: ModelSide | RealSide
        self.error: BaseException | None = None
        self.stops = 0
        self._books = books
        self._program = program
        self._abandoned = False
        # Locks as semaphores: taken from the start, and released by the other thread.
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        self._frame: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    @property
    def choices(self) -> Sequence[str]:
        return [] if self.done or (self.asleep and not self.told) else ["go"]

    def take(self, choice: str) -> None:
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def key(self) -> object:
        places = []
        frame = self._frame
        while frame is not None and frame.f_code is not RealSide._run.__code__:
            kept = (
                (name, repr(value))
                for name, value in sorted(frame.f_locals.items(), key=_name)
                if isinstance(value, int | list | tuple | bool)
            )
            places.append((frame.f_code.co_name, frame.f_lasti, tuple(kept)))
            frame = frame.f_back
        state = [
            (name, repr(value))
            for book in self._books
            for name, value in sorted(vars(book).items(), key=_name)
            if not callable(value) and not isinstance(value, memoryview | GuestMemory)
        ]
        return tuple(places), tuple(state), self.told, self.asleep, self.done

    def close(self) -> None:
        self._abandoned = True
        if not self.done:
            self._go.release()
        self._thread.join()
        self._frame = None

    # For the program.

    def tell(self) -> None:
        self._pause(sys._getframe(1))
        self.other.told = True

    def sleep(self) -> None:
        self.asleep = True
        self._pause(sys._getframe(1))
        self.asleep = self.told = False

    # How it is stopped.

    def _run(self) -> None:
        try:
            self._pause(None)
            sys.settrace(self._trace)
            self._program(self)
        except Abandon:
            pass
        except BaseException as error:
            self.error = error
        finally:
            sys.settrace(None)
            self.done = True
            self._frame = None
            self._stopped.release()

    def _pause(self, frame: Any) -> None:
        self._frame = frame
        self.stops += 1
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandon

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        shared = _shared_lines(frame.f_code)

        def lines(frame: Any, event: str, _: object) -> Any:
            if event == "line" and not self._abandoned and frame.f_lineno in shared:
                self._pause(frame)
            return lines

        return lines if shared else None


def _shared_lines(code: CodeType) -> frozenset[int]:
    if code not in _LINES:
        found: set[int] = set()
        if code.co_filename in _FILES:
            numbers = {number for _, _, number in code.co_lines() if number}
            found = {n for n in numbers if _SHARED.search(linecache.getline(code.co_filename, n))}
        _LINES[code] = frozenset(found)
    return _LINES[code]


def _name(item: tuple[str, object]) -> str:
    return item[0]


# --- real programs --------------------------------------------------------------------------------


def real_driver(ring: DriverRing, chains: int) -> Callable[[RealSide], None]:
    """`driver` with `DriverRing`."""

    def run(side: RealSide) -> None:
        offered = collected = 0
        while collected < chains:
            if offered < chains and ring.num_free:
                ring.add([(0x300 + offered, 1)], token=offered)
                ring.publish()
                offered += 1
                if ring.should_kick():
                    side.tell()
                continue
            try:
                got = len(ring.collect())
            except DeviceError as error:
                raise Broken(str(error)) from None
            collected += got
            if not got:
                if not ring.enable_calls():
                    side.sleep()
                ring.disable_calls()

    return run


def real_device(ring: SplitRing, burst: int = 2) -> Callable[[RealSide], None]:
    """`device` with `SplitRing`."""

    def run(side: RealSide) -> None:
        while True:
            taken = ring.pop_burst(burst)
            if taken:
                ring.write_used_burst(taken)
                ring.publish()
                if ring.should_notify():
                    side.tell()
            elif not ring.enable_kicks():
                side.sleep()
                ring.disable_kicks()

    return run


# --- every interleaving ---------------------------------------------------------------------------


@contextlib.contextmanager
def one_processor() -> Iterator[None]:
    """Threads that take turns wake no other processor, which would cost more than they do."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[os.getpid() % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@one_processor()
def explore(
    begin: Callable[[], tuple[ModelSide | RealSide, ModelSide | RealSide, Words]],
    *,
    most: int = 200_000,
) -> int:
    """Tries all interleavings; returns how many states there are. Raises `Broken`.

    `begin` makes the driver's side, the device's side and their memory anew. Each state is reached
    by going through a schedule from the start, and gone on from only once.
    """
    seen: set[object] = set()
    ends = 0
    schedules: list[tuple[int, ...]] = [()]
    while schedules:
        schedule = schedules.pop()
        sides, words = _begun(begin)
        taken: list[tuple[bool, object]] = []
        try:
            for number in schedule:
                side, choice = _choices(sides)[number]
                taken.append((side is sides[0], _where(side)))
                side.take(choice)
            while True:
                key = bytes(words.view), sides[0].key(), sides[1].key()
                if key in seen:
                    break
                seen.add(key)
                assert len(seen) < most, "too many states"
                choices = _choices(sides)
                if not choices:
                    if not sides[0].done:
                        raise Broken("both sleep, and chains are under way")
                    ends += 1
                    break
                schedules += [(*schedule, number) for number in range(1, len(choices))]
                side, choice = choices[0]
                taken.append((side is sides[0], _where(side)))
                side.take(choice)
                schedule = (*schedule, 0)
        except Broken as error:
            steps = [f"{'driver' if driver else 'device'} {where}" for driver, where in taken]
            raise Broken("\n".join([f"{error}", "after:", *steps])) from None
        finally:
            for side in sides:
                side.close()
    assert ends, "no interleaving comes to an end"
    return len(seen)


def _begun(
    begin: Callable[[], tuple[ModelSide | RealSide, ModelSide | RealSide, Words]],
) -> tuple[tuple[ModelSide | RealSide, ModelSide | RealSide], Words]:
    one, two, words = begin()
    one.other, two.other = two, one
    return (one, two), words


def _choices(
    sides: tuple[ModelSide | RealSide, ModelSide | RealSide],
) -> list[tuple[ModelSide | RealSide, str]]:
    return [(side, choice) for side in sides for choice in side.choices]


def _where(side: ModelSide | RealSide) -> object:
    if isinstance(side, ModelSide):
        return side.step
    frame = side._frame
    return "start" if frame is None else (frame.f_code.co_name, frame.f_lineno)
