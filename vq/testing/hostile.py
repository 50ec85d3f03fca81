"""Hostile drivers for anybody's device: hundreds of cases, each a rule that a driver breaks.

One line in a test module runs them all against a device:

    test_hostile_drivers = hostile_driver_battery(MyDevice, exercise)

where ``exercise(wired)`` does one good exchange with the device through `wired.driver`, which is
probed, and asserts that it worked. Each case plays a driver that breaks one rule of the
specification (`vq.testing.hostile_cases` has them, named after what they break), against a new
device, on each of its queues. It fails when

* an exception gets out of the device, or the device model fails inside (a traceback in its log);
* the device writes anything outside the buffers and used rings that it was lent;
* the device gives back what it was not given, or more than fits (the scripted driver's own books);
* the device neither works on nor says that it needs a reset;
* the device does not work after a reset, or for the next driver.

Where a device does its work later, in threads or coroutines, the battery waits for that before it
judges (`Device.settle`). A device that hangs is for pytest's own time limit to find. Cases of a
device's own are written as these are, with `Case`, and handed to the battery as well. `run_case`
plays one without pytest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from vq.abi import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    MMIO_CONFIG,
    Feature,
    Status,
    ring_layout,
)
from vq.device import Device
from vq.driver import DeviceError, DriverRing, GuestBuffer
from vq.driver_mmio import MmioTransport
from vq.driver_pci import PciTransport
from vq.driver_registers import Window
from vq.errors import AddressError, DriverError, UsageError, VqError, in_words
from vq.memory import GuestMemory
from vq.testing.wiring import Wired, wire

__all__ = [
    "HOLE",
    "MEMORY",
    "Case",
    "ChainPlan",
    "Desc",
    "DeviceBroke",
    "Exercise",
    "NotApplicable",
    "Stage",
    "hostile_driver_battery",
    "run_case",
]

MEMORY = ((0x10000, 0x20000), (0x30000, 0x10000), (0x40000000, 0x10000))
"""The hostile guest's memory: two regions side by side, a hole, and a third; nothing at 0."""
HOLE = 0x40000
"""The first address behind the second region."""
_QUEUE_SIZE = 16
_LONGEST = (1 << 32) - 0x1000  # of what a driver's books can say of one chain
_NOISE = random.Random(2026).randbytes(max(size for _, size in MEMORY))

_EXERCISES = 2  # a device that forgets to ask for kicks works once
_AT_ONCE = "although it does not say that it needs a reset"

Exercise = Callable[[Wired], object]
"""One good exchange with a device whose driver is probed; raises when it does not work.

It comes after a hostile driver on the same queues, too, if the device did not mind that one: chains
of that one may get used first, and where they take up a whole queue it raises `NotApplicable`.
"""


class DeviceBroke(AssertionError):
    """A device did not stand up to a hostile driver."""


class NotApplicable(Exception):
    """The device has not what the case is about."""


class Desc(NamedTuple):
    """A descriptor to be; NEXT and `next` come with the place in a chain."""

    addr: int
    length: int
    flags: int = 0


class ChainPlan(NamedTuple):
    """A chain to be, good or bad; `Stage.put` makes it available."""

    descs: tuple[Desc, ...]
    in_table: bool = False
    """Whether they stand in an indirect table, if INDIRECT_DESC was negotiated."""
    loop_to: int | None = None
    last_next: int | None = None
    """As in `Stage.chain`."""
    fault: str | None = None
    """The rule that it breaks, if it breaks one."""


class Case(NamedTuple):
    """A hostile driver."""

    name: str
    """What it breaks, starting with the section: ``2.7.5.2: a chain that loops``."""
    play: Callable[[Stage], None]
    needs: int = 0
    """Features without which there is nothing to break, a set of bits."""
    exercised: bool = True
    """Whether the device has to work on at once, unless it says that it needs a reset."""
    every_queue: bool = True
    """Whether it is played on each queue in turn, or once."""


class Stage:
    """What a case acts on: the device, a driver's ring in memory full of noise, and the watch over
    both. Whatever the device does in one of `act`, `kick` and `settle` is checked.
    """

    def __init__(self, wired: Wired, queue: int) -> None:
        self.wired = wired
        self.device = wired.device
        self.driver = wired.driver
        self.transport = wired.transport
        self.memory: GuestMemory = wired.memory
        self.queue = queue
        """The queue that is attacked."""
        self.refused = False
        """Whether the transport itself refused something that the driver did."""
        self.lent: list[tuple[int, int]] = []
        """Where the device may write, as ``(first, end)``."""
        self._has_books = True
        self._tables: dict[int, int] = {}  # for an indirect table, the room that it lends
        for region in self.memory.regions:
            region.view[:] = _NOISE[: region.size]

    # --- a driver in good order ---------------------------------------------------------------

    def up(self, *, without: int = 0) -> None:
        """Brings the device up, all its queues too, with all features but those in `without`."""
        self.negotiate(without=without)
        for index in range(self.transport.queue_count):
            self.set_up(index)
        self.act(self.driver.start)

    def negotiate(self, *, without: int = 0) -> None:
        """Up to FEATURES_OK, with all features but those in `without`."""
        self.act(self.driver.negotiate, lambda possible: possible & ~without)

    def set_up(self, index: int) -> None:
        """Sets up a queue as a driver in good order does."""
        self.act(self.driver.setup_queue, index)
        if index in self.driver.queues:
            ring = self.driver.queues[index]
            self.lend(ring.used, ring_layout(ring.size).used_bytes)

    @property
    def ring(self) -> DriverRing:
        """The driver's ring of the queue that is attacked."""
        try:
            return self.driver.queues[self.queue]
        except KeyError:
            raise NotApplicable("the queue could not be set up") from None

    def buffer(self, length: int = 64, *, align: int = 16) -> int:
        """A buffer of the guest's, full of noise."""
        return self.driver.allocator.allocate(length, align)

    def registers(self) -> list[tuple[Window, int]]:
        """The registers that stand between driver and device, each block with its length in bytes.

        Raises `NotApplicable` where there are none.
        """
        if isinstance(self.transport, MmioTransport):
            return [(self.transport.window, MMIO_CONFIG + 0x100)]
        if isinstance(self.transport, PciTransport):
            sizes = self.transport.bar_sizes
            bars = [(bar, min(sizes[n], 0x4000)) for n, bar in self.transport.bars.items()]
            return [(self.transport.config, 256), *((bar, size) for bar, size in bars if size)]
        raise NotApplicable("there are no registers")

    def lose_transport(self) -> None:
        """The driver has changed what its own transport goes by: only the next one can go on."""
        self.refused = True

    # --- chains -------------------------------------------------------------------------------

    def chain(
        self,
        *descs: Desc,
        loop_to: int | None = None,
        last_next: int | None = None,
        link: bool = True,
    ) -> list[int]:
        """Makes a chain available; returns the places of its descriptors in the table.

        Each but the last leads to the next, unless `link` is false. With `loop_to` the last leads
        to the one at that place in the chain, with `last_next` to that entry of the table.
        """
        ring = self.ring
        if len(descs) > ring.num_free:
            raise NotApplicable(f"the queue has no {len(descs)} descriptors")
        # The driver's books go by what it adds: so many descriptors, so much to be written.
        spare = self.memory.regions[0].gpa
        room = min(_LONGEST, sum(map(self._room_in, descs)))
        count = len(descs) - bool(room)
        places = _places_of(ring, ring.add([(spare, 1)] * count, [(spare, room)] if room else []))
        for number, (place, desc) in enumerate(zip(places, descs, strict=True)):
            flags, following = desc.flags, 0
            if number + 1 < len(descs):
                if link:
                    flags, following = flags | DESC_F_NEXT, places[number + 1]
            elif loop_to is not None:
                flags, following = flags | DESC_F_NEXT, places[loop_to]
            elif last_next is not None:
                flags, following = flags | DESC_F_NEXT, last_next
            self._poke(ring, place, desc, flags, following)
        return places

    def _room_in(self, desc: Desc) -> int:
        if desc.flags & DESC_F_INDIRECT:
            return self._tables.get(desc.addr, 0)
        return desc.length & 0xFFFFFFFF if desc.flags & DESC_F_WRITE else 0

    def _poke(self, ring: DriverRing, place: int, desc: Desc, flags: int, following: int) -> None:
        ring.poke_descriptor(
            place, desc.addr & (1 << 64) - 1, desc.length & 0xFFFFFFFF, flags & 0xFFFF, following
        )
        if flags & DESC_F_WRITE:
            self.lend(desc.addr, desc.length)

    def table(
        self,
        *descs: Desc,
        at: int | None = None,
        loop_to: int | None = None,
        last_next: int | None = None,
    ) -> GuestBuffer:
        """Writes an indirect table, linked as `chain` does; returns its address and length."""
        length = 16 * len(descs)
        start = self.buffer(length) if at is None else at
        for number, desc in enumerate(descs):
            flags, following = desc.flags, 0
            if number + 1 < len(descs):
                flags, following = flags | DESC_F_NEXT, number + 1
            elif loop_to is not None:
                flags, following = flags | DESC_F_NEXT, loop_to
            elif last_next is not None:
                flags, following = flags | DESC_F_NEXT, last_next
            entry = (
                (desc.addr & (1 << 64) - 1).to_bytes(8, "little")
                + (desc.length & 0xFFFFFFFF).to_bytes(4, "little")
                + (flags & 0xFFFF).to_bytes(2, "little")
                + following.to_bytes(2, "little")
            )
            self.memory.write(start + 16 * number, entry)
            if flags & DESC_F_WRITE:
                self.lend(desc.addr, desc.length)
        self._tables[start] = sum(map(self._room_in, descs))
        return start, length

    def put(self, plan: ChainPlan) -> list[int]:
        """Makes a planned chain available; returns the places of its descriptors in the ring."""
        descs, loop_to, last_next = plan.descs, plan.loop_to, plan.last_next
        if not (plan.in_table and self.driver.has_feature(Feature.INDIRECT_DESC)):
            return self.chain(*descs, loop_to=loop_to, last_next=last_next)
        table = self.table(*descs, loop_to=loop_to, last_next=last_next)
        return self.chain(Desc(*table, DESC_F_INDIRECT))

    def lend(self, gpa: int, length: int) -> None:
        """From now on the device may write there, if all of it is memory."""
        with suppress(AddressError):
            self.memory.views(gpa, length)
            self.lent.append((gpa, gpa + length))

    def take_back(self) -> None:
        """The device may write nowhere any more."""
        self.lent.clear()

    def reset_queue(self) -> None:
        """Resets the attacked queue; the driver's ring of it is gone until `set_up`."""
        self.act(self.transport.reset_queue, self.queue)
        self.driver.queues.pop(self.queue, None)

    def disown(self) -> None:
        """The driver has lost track of its chains itself: its books prove nothing any more."""
        self._has_books = False

    def kick(self, index: int | None = None) -> None:
        """Publishes what was offered on a queue, and notifies the device in any case."""
        index = self.queue if index is None else index
        if index in self.driver.queues:
            self.driver.queues[index].publish()
        self.act(self.transport.notify, index)

    # --- what is watched ----------------------------------------------------------------------

    def act(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lets the driver do something; what it makes the device do is checked.

        Raises `DeviceBroke`. What a transport other than direct calls refuses sets `refused`.
        """
        # A driver writes to memory itself as it sets up a queue; only its own rings, and to begin
        # with they are noise as well.
        ours = step in (self.driver.setup_queue, self.driver.reset)
        before = None if ours else self._snapshot()
        result = None
        try:
            result = step(*args, **kwargs)
        except NotApplicable:
            raise
        except Exception as error:
            self._refusal(error)
        self.wired.turn(2)
        if before is not None:
            self._compare(before)
        return result

    def _refusal(self, error: Exception) -> None:
        refusals: tuple[type[Exception], ...] = (DeviceError,)
        if self.wired.via != "direct":
            refusals = (DeviceError, OSError, UsageError, KeyError)
        if not isinstance(error, refusals):
            raise DeviceBroke(f"an exception got out of the device: {error!r}") from error
        self.refused = True

    def settle(self) -> None:
        """What is under way comes to rest; the driver collects what was used."""
        before = self._snapshot()
        if not self.wired.settle():
            raise DeviceBroke("the device still works on requests when its time is over")
        self._compare(before)
        self._check_model()
        if not self._has_books:
            return
        for ring in self.driver.queues.values():
            try:
                ring.collect()
            except DeviceError as error:
                raise DeviceBroke(f"the device broke a rule of its own: {error}") from error

    @property
    def needs_reset(self) -> bool:
        """Whether the device has said that it works no more before a reset."""
        return bool(self.transport.status & Status.NEEDS_RESET)

    def _check_model(self) -> None:
        fault = self.device.fault
        if fault is not None and not isinstance(fault, DriverError):
            raise DeviceBroke(
                f"the device model failed, and it is not the driver that it blames: {fault!r}"
            ) from fault

    def _snapshot(self) -> list[bytes]:
        return [bytes(region.view) for region in self.memory.regions]

    def _compare(self, before: list[bytes]) -> None:
        for region, then in zip(self.memory.regions, before, strict=True):
            now = bytes(region.view)  # the bytes of a view are compared one by one
            if now == then:
                continue
            for start, end in _gaps(self.lent, region.gpa, region.gpa + region.size):
                here = slice(start - region.gpa, end - region.gpa)
                if now[here] != then[here]:
                    at = next(
                        gpa
                        for gpa in range(start, end)
                        if now[gpa - region.gpa] != then[gpa - region.gpa]
                    )
                    raise DeviceBroke(
                        f"the device wrote to {at:#x}, which is in no buffer that it was lent"
                    )


def run_case(
    case: Case,
    make_device: Callable[[], Device],
    exercise: Exercise | None = None,
    *,
    via: str = "direct",
    queue: int = 0,
) -> bool:
    """Plays one case on one queue of a new device; whether the device has what it is about.

    Raises `DeviceBroke` when the device does not stand up to it.
    """
    device = make_device()
    try:
        if case.needs & ~device.device_features or queue >= max(1, device.queue_count):
            return False
        try:
            with _staged(device, via) as wired:
                stage = Stage(wired, queue)
                case.play(stage)
                stage.settle()
                _check_after(case, stage, exercise)
        except NotApplicable:
            return False
        # And the next driver knows nothing of it.
        with _staged(device, via) as wired:
            _bring_up_and_exercise(wired, exercise, "for the next driver")
    except DeviceBroke as error:
        if not device.queues:
            raise
        attacked = device.queues[queue]
        raise DeviceBroke(f"attacked on queue {queue} ({attacked.name}): {error}") from error
    finally:
        device.close()
    return True


@contextmanager
def _staged(device: Device, via: str) -> Iterator[Wired]:
    with (
        GuestMemory.allocate(*MEMORY) as memory,
        wire(device, via, memory=memory, queue_size=_QUEUE_SIZE) as wired,
    ):
        yield wired


def _check_after(case: Case, stage: Stage, exercise: Exercise | None) -> None:
    """The device goes on, or says that it needs a reset; and after that it works."""
    wired = stage.wired
    if stage.refused and wired.via != "direct":
        return  # the connection may be gone: the next driver comes over a new one
    going = Status.DRIVER_OK | Status.FEATURES_OK
    if (
        case.exercised
        and exercise is not None
        and stage.transport.status & (going | Status.NEEDS_RESET | Status.FAILED) == going
        and len(wired.driver.queues) == stage.transport.queue_count
    ):
        try:
            _exercise(wired, exercise, _AT_ONCE)
        except DeviceBroke:
            # What the exchange has lent is not known here: nothing of it may be under way when the
            # watch goes on.
            wired.settle()
            stage.settle()
            if not stage.needs_reset:  # a bad chain may be found only when its turn comes
                raise
    _bring_up_and_exercise(wired, exercise, "after a reset")


def _bring_up_and_exercise(wired: Wired, exercise: Exercise | None, when: str) -> None:
    try:
        wired.driver.probe()
    except VqError as error:
        raise DeviceBroke(f"the device does not come up {when}: {error}") from error
    if wired.transport.status & Status.NEEDS_RESET:
        fault = wired.device.fault
        raise DeviceBroke(
            f"the device needs a reset {when}: {in_words(fault) if fault else 'why?'}"
        )
    if exercise is not None:
        _exercise(wired, exercise, when)


def _exercise(wired: Wired, exercise: Exercise, when: str) -> None:
    try:
        for _ in range(_EXERCISES):
            exercise(wired)
    except NotApplicable:
        if when != _AT_ONCE:
            raise
    except Exception as error:
        raise DeviceBroke(f"the device does not work {when}: {error!r}") from error


def hostile_driver_battery(
    make_device: Callable[[], Device],
    exercise: Exercise | None = None,
    *,
    cases: Iterable[Case] | None = None,
    more: Iterable[Case] = (),
    vias: Sequence[str] = ("direct",),
) -> Callable[..., None]:
    """A test for pytest, one for every case and wire; its name has to start with ``test_``.

    `make_device` makes a new device; `exercise` is described above, and without it only the
    negotiation shows that the device lives on. `cases` are by default all of
    `vq.testing.hostile_cases`, and `more` come on top. What is about queues is played on each.
    """
    import pytest

    if cases is None:
        from vq.testing.hostile_cases import CASES

        cases = CASES
    everything = [*cases, *more]

    @pytest.mark.parametrize("via", vias)
    @pytest.mark.parametrize("case", everything, ids=[case.name for case in everything])
    def hostile_driver(case: Case, via: str) -> None:
        device = make_device()
        count = max(1, device.queue_count)
        device.close()
        for queue in range(count if case.every_queue else 1):
            run_case(case, make_device, exercise, via=via, queue=queue)

    return hostile_driver


def _places_of(ring: DriverRing, head: int) -> list[int]:
    """The places of a chain's descriptors in the table, from the first on."""
    places = [head]
    while True:
        _, _, flags, following = ring.peek_descriptor(places[-1])
        if not flags & DESC_F_NEXT:
            return places
        places.append(following)


def _gaps(taken: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of a range is in none of the ranges that are taken."""
    gaps = []
    for first, last in sorted(taken):
        if first > start:
            gaps.append((start, min(first, end)))
        start = max(start, last)
        if start >= end:
            break
    if start < end:
        gaps.append((start, end))
    return [gap for gap in gaps if gap[0] < gap[1]]
