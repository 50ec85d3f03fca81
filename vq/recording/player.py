"""A recorded session once more, before a device without the guest: does it do the same?

`Replay` puts the guest's memory, the rings and the link before a device as the recording has them,
cause by cause, and compares what the device does: which chains it gives back and what stands in
them, whether it calls, what it sends to the link, its status and its configuration space. Chains
are compared one by one: in what bursts they are taken, and in which of two orders they come back,
is the device's own business. A chain may come back earlier than it did, never later.

No clock runs: the device's own alarms ring where the recording has it. What a recording does not
have (`Kind.OUTSIDE`), the device cannot do; where that shows, the replay ends and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from vq.device import Device
from vq.errors import CaptureError, UsageError, VqError
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.recording.format import Event, Kind, RecordingReader
from vq.recording.link import RecordedLink, RecordedPort, SentFrame
from vq.recording.ring import Found, sample_of
from vq.recording.sample import Sample
from vq.split_ring import SplitRing
from vq.vhost_user import unwatch_device, watch_device

__all__ = ["Difference", "Replay", "replay"]

_MOST_MEMORY = 1 << 46
_PATIENCE = 2.0
"""Seconds that a device's threads, and what comes to it from outside, get for their work."""
_HEADER = 12
_MOST_ERRNO = 4095


class Difference(NamedTuple):
    """Where the device does not do what it did."""

    number: int
    """Of the cause, counted from 1, as `vq.recording.show` prints it."""
    seconds: float
    """When it happened in the recording."""
    what: str


class Given(NamedTuple):
    """A chain that was given back."""

    head: int
    written: int
    data: Sample


class _ReplayRing(SplitRing):
    """A ring in which chains become available when the device looks, as they did."""

    def __init__(self, queue: _Queue, *places: Any, **options: Any) -> None:
        self._replayed = queue
        super().__init__(*places, **options)
        self._told = self.next_used
        self._places = places[2:5]

    def waiting(self) -> int:
        """See `SplitRing`. Every way to take chains begins here."""
        self._replayed.reveal_next()
        return super().waiting()

    def publish(self) -> int:
        """See `SplitRing`."""
        count = self.next_used - self._told & 0xFFFF
        for position in range(self._told, self._told + count):
            place = self._places[2] + 4 + 8 * (position & (self.size - 1))
            head = int.from_bytes(self.memory.read(place, 4), "little")
            written = int.from_bytes(self.memory.read(place + 4, 4), "little")
            self._replayed.take(head, written)
        self._told = self.next_used
        return super().publish()

    def should_notify(self) -> bool:
        """See `SplitRing`."""
        called = super().should_notify()
        if called:
            self._replayed.calls += 1
        return called

    def _driver_wish(self) -> int:
        self._replayed.wish_next()
        return super()._driver_wish()


class _Queue:
    """One queue in the replay: what is still to be found in it, and what came back so far."""

    def __init__(self, index: int, name: str, compared: bool) -> None:
        self.index = index
        self.name = name
        self.compared = compared
        self.given: defaultdict[int, deque[Given]] = defaultdict(deque)
        """By head, what the device gave back and the recording has not told of yet."""
        self.expected: list[Given] = []
        """What it gave back in this step of the recording."""
        self.calls = 0
        self.expected_calls = 0
        self.reveals: deque[Found] = deque()
        self.wishes: deque[tuple[int, int]] = deque()
        self._misses = 0  # looks since the last find in this step
        self._taken = 0  # chains that came back in this step
        self._memory: GuestMemory | None = None
        self._places = (0, 0, 0)
        self._size = 0
        self._writable: dict[int, list[tuple[int, int]]] = {}

    def begin(self, memory: GuestMemory, numbers: tuple[int, ...]) -> None:
        """The queue is set up with the numbers of a `Kind.QUEUE_SETUP` event."""
        _, self._size, _, desc, avail, used, next_avail, next_used = numbers[:8]
        self._places = (desc, avail, used)
        self._memory = memory
        self._writable.clear()
        self.given.clear()
        with contextlib.suppress(VqError):  # a place that is none: the device finds that too
            memory.store16(avail + 2, next_avail)
            memory.store16(used + 2, next_used)

    def reveal_next(self) -> None:
        """Lets the device find what it found at this look."""
        if self.reveals:
            if self.reveals[0].misses > self._misses:
                self._misses += 1
                return
            self.reveal()

    def reveal(self) -> None:
        """Lets the device find the next that it found, whenever it looks."""
        self._misses = 0
        self._put(self.reveals.popleft())

    def _put(self, found: Found) -> None:
        if self._memory is None:
            return
        desc, avail, _ = self._places
        try:
            found.put(self._memory, self._size, desc, avail)
        except (UsageError, struct.error) as error:
            raise CaptureError(f"the recording is damaged: {error}") from None
        for chain in found.chains:
            self._writable.setdefault(chain.head, chain.writable())

    def wish_next(self) -> None:
        """Lets the device find what the driver wished when it asked."""
        if self.wishes and self._memory is not None:
            flags, event = self.wishes.popleft()
            _, avail, _ = self._places
            self._memory.store16(avail, flags)
            self._memory.store16(avail + 4 + 2 * self._size, event)

    def take(self, head: int, written: int) -> None:
        """The device gives a chain back."""
        assert self._memory is not None
        self._taken += 1
        data = sample_of(self._memory, self._writable.pop(head, []), written)
        # By the length that it says, as in the recording.
        self.given[head].append(Given(head, written, Sample.unpack(written, data.pack())))

    def missing(self) -> bool:
        """Whether the device has not given back all that it gave back by now."""
        wanted = Counter(given.head for given in self.expected)
        return any(len(self.given[head]) < count for head, count in wanted.items())

    def differences(self) -> Iterator[str]:
        """What is different in this step, and forgets the step."""
        same = True
        for expected in self.expected:
            if not self.compared:
                continue
            if not self.given[expected.head]:
                same = False
                yield f"{self.name}: the chain at {expected.head} is not given back"
                continue
            given = self.given[expected.head].popleft()
            if given.written != expected.written:
                yield (
                    f"{self.name}: the chain at {expected.head} has {given.written} bytes written,"
                    f" not {expected.written}"
                )
            elif (difference := expected.data.difference(given.data)) is not None:
                yield f"{self.name}: the chain at {expected.head}: {difference}"
        # A chain that came back in another step than it did has its call there.
        same = same and self._taken == len(self.expected)
        if self.compared and same and bool(self.calls) != bool(self.expected_calls):
            yield f"{self.name}: the driver is {'' if self.calls else 'not '}called" + (
                ", which it was not" if self.calls else ", which it was"
            )
        self.expected.clear()
        self.calls = self.expected_calls = self._taken = self._misses = 0

    def surplus(self) -> Iterator[str]:
        """What was given back and never was in the recording."""
        for head, chains in self.given.items():
            if chains and self.compared:
                yield f"{self.name}: the chain at {head} is given back, which it never was"


class Replay:
    """A recording, to be replayed against a device.

    A device that is made for it: `link` is what a network device was plugged into. Raises
    `CaptureError` when the file is no recording, `OSError` when it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.reader = RecordingReader(path)
        self.header = self.reader.header
        self.link: RecordedLink | None = None
        if self.header.link is not None:
            try:
                self.link = RecordedLink(self.header.link)
            except (KeyError, TypeError, ValueError) as error:
                raise CaptureError(f"the recording's header is damaged: {error!r}") from None
        self.steps = 0
        """How many causes were replayed."""
        self.compared = Counter[str]()
        """How many things of each kind were the same or not."""

    def run(
        self,
        device: Device,
        *,
        ignore: Iterable[str] = (),
        most: int = 20,
        progress: Callable[[float], None] | None = None,
    ) -> list[Difference]:
        """Puts `device`, which is new, through the session; returns where it does otherwise.

        After `most` differences it gives up. Queues named in `ignore` are not compared, nor those
        that the recording says get their answers from outside. `progress` hears of the seconds that
        have passed in the recording. Raises `CaptureError` for a damaged recording, `UsageError`
        for a device that cannot be the one that was recorded.
        """
        known = [name for name, _ in self.header.queues]
        unknown = set(ignore) - set(known)
        if unknown:
            raise UsageError(f"no queue is {unknown.pop()!r}: the queues are {', '.join(known)}")
        if device.device_id != self.header.device_id or [q.name for q in device.queues] != known:
            raise UsageError(
                f"the recording is of {self.header.device} with queues {', '.join(known)},"
                f" not of a {type(device).__name__}"
                f" with {', '.join(queue.name for queue in device.queues)}"
            )
        with contextlib.closing(
            _Player(self, device, {*ignore, *self.header.from_outside})
        ) as play:
            return play.all(most, progress)


def replay(
    path: str | os.PathLike[str], device: Device, *, ignore: Iterable[str] = ()
) -> list[Difference]:
    """Puts a new `device` through a recorded session; returns where it does otherwise.

    For a network device use `Replay`, whose `link` the device has to be plugged into. Raises as
    `Replay` and `Replay.run` do.
    """
    return Replay(path).run(device, ignore=ignore)


class _Player:
    """One run of a replay."""

    def __init__(self, session: Replay, device: Device, ignored: set[str]) -> None:
        self._session = session
        self._device = device
        self._link = session.link
        if self._link is not None:
            self._link.asked = []  # the device has asked as it was made
        self._queues = [
            _Queue(queue.index, queue.name, queue.name not in ignored) for queue in device.queues
        ]
        self._memories: list[GuestMemory] = []
        self._loop = Loop()
        self._told_of_change = 0
        self._setting_up = self._queues[0] if self._queues else _Queue(0, "none", False)
        self._work_left: set[int] = set()
        self._answer: int | None = None
        self._found: list[str] = []
        self._note = ""  # what may be why, where something is different
        self._outside: int | None = None  # the last step that was the host's doing
        self._waited_in_vain = False
        watch_device(device, self._loop, own_alarms=session.reader.version < 2)
        device.ring_class = self._make_ring
        device.on_queue_call = lambda index: None
        device.on_config_change = self._config_changed

    def close(self) -> None:
        device = self._device
        unwatch_device(device, self._loop)
        device.reset()
        device.on_queue_call = device.on_config_change = device.on_work_left = None
        device.memory = None
        del device.ring_class
        for memory in self._memories:
            memory.close()
        self._loop.close()

    def all(self, most: int, progress: Callable[[float], None] | None) -> list[Difference]:
        differences: list[Difference] = []
        seconds = 0.0
        for cause, rest in _steps(self._session.reader):
            self._session.steps += 1
            seconds = cause.seconds
            if progress is not None:
                progress(seconds)
            number = self._session.steps
            if cause.kind is Kind.OUTSIDE:
                self._outside = number
            try:
                found = self._step(cause, rest)
            except CaptureError:
                raise
            except (IndexError, ValueError) as error:
                raise CaptureError(f"the recording is damaged: {error}") from error
            differences += (Difference(number, seconds, what) for what in found)
            if found and self._outside is not None:
                return [*differences, Difference(number, seconds, self._not_recorded())]
            if len(differences) >= most:
                return differences
        surplus = [what for queue in self._queues for what in queue.surplus()]
        if self._link is not None:
            if self._link.asked:
                surplus.append(f"the link is asked for {self._link.asked}, which it never was")
            surplus += (
                f"port {index}: {len(port.sent)} frames are sent, which never were"
                for index, port in enumerate(self._link.recorded)
                if port.sent
            )
        if surplus and self._outside is not None:
            surplus.append(self._not_recorded())
        return differences + [Difference(self._session.steps, seconds, what) for what in surplus]

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, cause: Event, rest: list[Event]) -> list[str]:
        self._found = []
        self._note = ""
        self._told_of_change = 0
        self._answer = None
        expected_changes = 0
        expected_answer: int | None = None
        expected_sent: defaultdict[int, list[Event]] = defaultdict(list)
        expected_asked: list[tuple[int, int]] = []
        later = False
        taken = Counter[int]()  # by each port, since it was last full
        for event in rest:
            numbers = event.numbers
            match event.kind:
                case Kind.CHAINS:
                    found = Found.from_event(numbers, event.strings)
                    self._queue(found.queue).reveals.append(found)
                case Kind.WISH:
                    self._queue(numbers[0]).wishes.append((numbers[1], numbers[2]))
                case Kind.USED:
                    heads, lengths = numbers[1::2], numbers[2::2]
                    self._queue(numbers[0]).expected += [
                        Given(head, length, Sample.unpack(length, data))
                        for head, length, data in zip(heads, lengths, event.strings, strict=True)
                    ]
                case Kind.CALL:
                    self._queue(numbers[0]).expected_calls += 1
                case Kind.CONFIG_CHANGED:
                    expected_changes += 1
                case Kind.LINK_INPUT:
                    self._port(numbers[0]).incoming.extend(
                        (data[:_HEADER], data[_HEADER:]) for data in event.strings
                    )
                case Kind.LINK_OUTPUT:
                    expected_sent[numbers[0]].append(event)
                    taken[numbers[0]] += len(event.strings)
                case Kind.LINK_FULL:
                    self._port(numbers[0]).budgets.append((taken.pop(numbers[0], 0), 0))
                case Kind.LINK_BROKE:
                    index, error, reading = numbers[0], min(numbers[1], _MOST_ERRNO), numbers[2]
                    if reading:
                        self._port(index).incoming.append(error)
                    else:
                        self._port(index).budgets.append((taken.pop(index, 0), error))
                case Kind.LINK_ASKED:
                    expected_asked.append((numbers[0], numbers[1]))
                case Kind.LINK_IS:
                    if self._link is not None:
                        self._link.set_state(*numbers[:4])
                case Kind.ANSWER:
                    expected_answer = numbers[0]
                case Kind.LATER:
                    later = True
                case _:
                    pass
        self._do(cause)
        self._settle()
        if later or cause.kind is Kind.OUTSIDE:
            self._wait(later)
        for queue in self._queues:
            queue.wishes.clear()
            self._session.compared["chains"] += len(queue.expected)
            self._found += queue.differences()
        self._compare_answer(expected_answer)
        if bool(self._told_of_change) != bool(expected_changes):
            self._found.append(
                "the driver is told of a change of the configuration, which it was not"
                if self._told_of_change
                else "the driver is not told of a change of the configuration, which it was"
            )
        self._compare_link(expected_sent, expected_asked)
        if self._found and self._note:
            self._found.append(self._note)
        return self._found

    def _do(self, cause: Event) -> None:
        device, numbers = self._device, cause.numbers
        match cause.kind:
            case Kind.MEMORY:
                self._take_memory(numbers)
            case Kind.FEATURES:
                device.accept_features(sum(w << 64 * place for place, w in enumerate(numbers)))
            case Kind.STATUS:
                device.write_status(numbers[0])
                self._answer = device.status
            case Kind.CONFIG_READ:
                data = device.read_config(numbers[0], min(numbers[1], 1 << 16))
                self._session.compared["configuration reads"] += 1
                difference = Sample.of([cause.strings[0]]).difference(Sample.of([data]))
                if difference is not None:
                    self._found.append(f"the configuration at {numbers[0]}: {difference}")
            case Kind.CONFIG_WRITE:
                device.write_config(numbers[0], cause.strings[0])
            case Kind.QUEUE_SETUP | Kind.DISABLED_SETUP:
                self._set_up(numbers, enabled=cause.kind is Kind.QUEUE_SETUP)
            case Kind.QUEUE_RESET:
                device.reset_queue(numbers[0])
            case Kind.QUEUE_STOP:
                self._answer = device.stop_queue(self._queue(numbers[0]).index)
            case Kind.KICK:
                device.notify(numbers[0])
            case Kind.RESET:
                device.reset()
            case Kind.QUEUE_DROP:
                device.drop_queue(self._queue(numbers[0]).index)
            case Kind.ALARM:
                self._ring(numbers[0])
            case Kind.OUTSIDE:
                pass
            case Kind.LINK_READABLE:
                _call(self._port(numbers[0]).on_readable)
            case Kind.LINK_WRITABLE:
                _call(self._port(numbers[0]).on_writable)
            case Kind.LINK_CHANGED:
                if self._link is not None:
                    self._link.set_state(*numbers[:4])
                    _call(self._link.on_change)
            case Kind.TURNS:
                device.on_work_left = self._work_left.add if numbers[0] else None
            case Kind.HOST:
                name, arguments = cause.strings
                self._by_host(name, arguments)
            case _:
                raise CaptureError(f"the recording is damaged: {cause.kind.name} is no cause")

    def _take_memory(self, numbers: tuple[int, ...]) -> None:
        layout = list(zip(numbers[::2], numbers[1::2], strict=True))
        if sum(size for _, size in layout) > _MOST_MEMORY or len(layout) > 512:
            raise CaptureError("the recording is of a guest with more memory than there is")
        old = self._device.memory
        memory = GuestMemory.allocate(*layout)
        self._memories.append(memory)
        self._device.memory = memory
        if old is not None and old in self._memories:
            self._memories.remove(old)
            old.close()

    def _set_up(self, numbers: tuple[int, ...], *, enabled: bool) -> None:
        index, size, most, desc, avail, used, next_avail, next_used, *heads = numbers
        if 0 <= index < len(self._queues) and self._device.memory is not None:
            self._device.queues[index].max_size = most  # a transport may allow more than is usual
            self._setting_up = self._queues[index]
            self._setting_up.begin(self._device.memory, numbers)
        self._device.setup_queue(
            index,
            size=size,
            desc=desc,
            avail=avail,
            used=used,
            next_avail=next_avail,
            next_used=next_used,
            resubmit=heads,
            enabled=enabled,
        )

    def _make_ring(self, *places: Any, **options: Any) -> SplitRing:
        queue = self._setting_up
        while queue.reveals and not queue.reveals[0].in_ring:
            queue.reveal()  # what an earlier device had is there from the first
        return _ReplayRing(queue, *places, **options)

    def _by_host(self, name: bytes, arguments: bytes) -> None:
        method = name.decode(errors="replace")
        if method not in self._device.host_methods:
            kind = type(self._device).__name__
            raise CaptureError(f"the host did {method}, which is none of {kind}'s host_methods")
        values = json.loads(arguments)
        with contextlib.suppress(UsageError):  # that the host did what it may not do, it was told
            getattr(self._device, method)(
                *(bytes.fromhex(value) if isinstance(value, str) else value for value in values)
            )

    def _ring(self, place: int) -> None:
        device = self._device
        own = [alarm for alarm in device.alarms if not alarm.outside]
        if place >= len(own):
            raise CaptureError(
                f"the recording is damaged, or of another model: alarm {place} rings, and"
                f" {type(device).__name__} has {len(own)}"
            )
        if own[place].deadline is None:
            self._note = f"alarm {place} rang then, and is not set now"
        else:
            own[place].ring()

    def _settle(self) -> None:
        """Lets the device come to rest: what it did not look for is shown to it, and threads and
        coroutines of its own get the time that they need."""
        for queue in self._queues:
            if queue.reveals:
                while queue.reveals:
                    queue.reveal()
                self._device.notify(queue.index)
        # The next turn was a step of its own, unless the device took less at a time then.
        for index in list(self._work_left):
            queue = self._queue(index)
            for _ in range(len(queue.expected)):
                if queue.missing():
                    self._device.notify(index)
        self._work_left.clear()
        self._loop.run_once(0)
        if isinstance(self._device, DeviceModel):
            self._device.settle(_PATIENCE)

    def _wait(self, later: bool) -> None:
        """Waits for chains that no cause in the recording gave back: threads of the model's own
        complete them, and descriptors of its own that are there in a replay, too."""
        deadline = time.monotonic() + _PATIENCE
        while any(queue.compared and queue.missing() for queue in self._queues):
            if self._waited_in_vain or time.monotonic() > deadline:
                self._waited_in_vain = True  # once is enough
                if later:
                    self._note = (
                        "a thread, or the host, completed it then, and does not now: a replay waits"
                        f" {_PATIENCE:g} seconds for that"
                    )
                return
            self._loop.run_once(0.01)

    def _not_recorded(self) -> str:
        return (
            f"the replay ends here: step {self._outside}, which may be why, was the host's doing"
            " (a descriptor that the device watches, a method that is not one of its host_methods),"
            " and what the host did is not recorded"
        )

    # --- what is compared -------------------------------------------------------------------------

    def _config_changed(self) -> None:
        self._told_of_change += 1

    def _compare_answer(self, expected: int | None) -> None:
        if expected is None or self._answer is None:
            return
        self._session.compared["answers"] += 1
        if self._answer != expected:
            self._found.append(f"the answer is {self._answer:#x}, not {expected:#x}")

    def _compare_link(
        self, expected: defaultdict[int, list[Event]], asked: list[tuple[int, int]]
    ) -> None:
        if self._link is None:
            return
        # What the device does earlier than it did waits for its turn, as chains do.
        now = self._link.asked[: len(asked)]
        if now != asked:
            self._found.append(f"the link is asked for {now}, not {asked}")
        del self._link.asked[: len(asked)]
        for index, port in enumerate(self._link.recorded):
            frames = [frame for event in expected[index] for frame in _sent_frames(event)]
            self._session.compared["frames sent"] += len(frames)
            self._found += _frame_differences(index, frames, port.sent)
            del port.sent[: len(frames)]
            port.budgets.clear()

    def _queue(self, index: int) -> _Queue:
        if not 0 <= index < len(self._queues):
            raise CaptureError(f"the recording is damaged: there is no queue {index}")
        return self._queues[index]

    def _port(self, index: int) -> RecordedPort:
        if self._link is None or not 0 <= index < len(self._link.recorded):
            raise CaptureError(f"the recording is damaged: there is no port {index}")
        return self._link.recorded[index]


def _steps(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Each cause, with all that follows it up to the next."""
    cause: Event | None = None
    rest: list[Event] = []
    for event in events:
        if event.kind.is_cause:
            if cause is not None:
                yield cause, rest
            cause, rest = event, []
        else:
            rest.append(event)
    if cause is not None:
        yield cause, rest


def _call(callback: Callable[[], None] | None) -> None:
    if callback is not None:
        callback()


def _sent_frames(event: Event) -> Iterator[SentFrame]:
    for length, data in zip(event.numbers[1:], event.strings, strict=True):
        yield SentFrame(data[:_HEADER], Sample.unpack(length, data[_HEADER:]))


def _frame_differences(
    port: int, expected: list[SentFrame], sent: list[SentFrame]
) -> Iterator[str]:
    for number, (then, now) in enumerate(zip(expected, sent, strict=False)):
        where = f"port {port}, frame {number} of this step"
        header = Sample.of([then.header]).difference(Sample.of([now.header]))
        difference = then.data.difference(now.data)
        if difference is not None:
            yield f"{where}: {difference}"
        elif header is not None:
            yield f"{where}, net header: {header}"
    if len(sent) < len(expected):
        yield f"port {port}: {len(sent)} frames are sent, not {len(expected)}"
