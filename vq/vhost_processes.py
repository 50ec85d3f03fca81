"""Queues of a vhost-user device in processes of their own.

One interpreter works on one queue at a time. Where a device has queues that do not depend on each
other, as a network device's queue pairs on a tap with several, other processes can serve some of
them. They are forked from the one that serves the device, and so begin with all that it knows: the
guest's memory, what was negotiated, the filters that the driver set. Nothing of that is ever
changed in two places: before it changes, the queues come home, and when all has been quiet for a
while they are lent again, to processes that know what holds by then.

Messages of the frontend, the control queue, and all that a link needs beside its ports stay with
the process that serves the device. When another one dies its queues come home, too, and go on where
the used rings stand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from vq.device import Device
from vq.errors import VqError
from vq.log_limit import limited_logger
from vq.loop import Loop, Timer
from vq.vring import Held, Kick, Position, Return, Vring

if TYPE_CHECKING:
    from vq.queue_process import QueueProcess, Serving

__all__ = ["Apart", "Processes", "Rings", "may_be_lent"]

log = limited_logger(__name__)

CALM_SECONDS = 0.05
"""How long nothing must have changed before queues are lent: a driver that starts up changes much,
one thing after another."""
RETRY_SECONDS = 1.0
"""How long they are not lent after a process died or gave its queues back by itself."""


class Rings(Protocol):
    """A backend, as far as its rings go."""

    device: Device
    vrings: list[Vring]

    def may_be_lent(self, vring: Vring) -> bool:
        """Whether another process could serve a ring, for all that the frontend has said."""

    def lend(self, vring: Vring) -> Position:
        """Takes a ring from the device here; returns where to go on."""

    def come_home(self, vring: Vring, position: Position | None) -> None:
        """Goes on with a ring here; None: where the used ring stands."""

    def serve_only(
        self, queues: Collection[int], loop: Loop, give_back: Callable[[], None]
    ) -> None:
        """In a forked process: goes on with these rings, and nothing else."""

    def end_serving(self, queues: Collection[int]) -> Return:
        """In a forked process: takes these rings from the device."""


class Apart:
    """That up to `processes` processes, this one among them, serve a device's queues.

    `on_fork` is called in each that was forked, and closes what is not its own.
    """

    def __init__(self, processes: int, *, on_fork: Callable[[], None] | None = None) -> None:
        # Here, before somebody is confined to what the modules that are loaded need.
        import vq.queue_process  # noqa: F401

        self.processes = processes
        self.on_fork = on_fork


class Processes:
    """The processes that serve some of a backend's rings.

    `on_fork` is called in each, with its loop, before it begins.
    """

    def __init__(
        self, rings: Rings, loop: Loop, apart: Apart, *, on_fork: Callable[[Loop], None]
    ) -> None:
        self._rings = rings
        self._loop = loop
        self._apart = apart
        self._on_fork = on_fork
        self._processes: list[QueueProcess] = []
        self._timer: Timer | None = None
        self._not_before = 0.0

    @property
    def pids(self) -> list[int]:
        """The processes that there are just now."""
        return [process.pid for process in self._processes]

    def lend_when_calm(self, seconds: float = CALM_SECONDS) -> None:
        """Something has changed: lends what can be lent when it was the last thing for a while."""
        if self._timer is not None:
            self._timer.cancel()
        seconds = max(seconds, self._not_before - time.monotonic())
        self._timer = self._loop.call_later(seconds, self._lend)

    def _take_time(self) -> None:
        """It did not go well: not again so soon, whatever happens. A guest could have processes
        made, and lines logged, as fast as it resets its device."""
        self._not_before = time.monotonic() + RETRY_SECONDS

    def recall(self, vring: Vring) -> None:
        """Brings a ring home that was lent, and with it all that the same process has."""
        for process in self._processes:
            if vring.index in process.queues:
                self._come_home(process, process.recall())
                self.lend_when_calm()
                return

    def recall_all(self) -> None:
        """Brings all rings home: what every queue goes by is about to change."""
        while self._processes:  # a fault that one brings home recalls the others from within
            process = self._processes[0]
            self._come_home(process, process.recall())
        self.lend_when_calm()

    def close(self) -> None:
        """Brings all rings home for good."""
        self.recall_all()
        if self._timer is not None:
            self._timer.cancel()

    # --- inside -----------------------------------------------------------------------------------

    def _lend(self) -> None:
        self._timer = None
        if threading.active_count() > 1:
            # A fork has one thread; what the others hold would stay held.
            self.lend_when_calm(RETRY_SECONDS)
            return
        wanted = self._lendable()
        for process in list(self._processes):
            if process.queues not in wanted and process in self._processes:
                self._come_home(process, process.recall())
        served = {index for process in self._processes for index in process.queues}
        for queues in self._lendable():  # what came home may not be to be lent any more
            if queues and not queues & served:
                self._fork(queues)

    def _lendable(self) -> list[set[int]]:
        """The queues that are for each other process: units of which each queue may be lent."""
        rings = self._rings
        return [
            {
                index
                for unit in units
                if all(rings.may_be_lent(rings.vrings[one]) for one in unit)
                for index in unit
            }
            for units in rings.device.queues_apart(self._apart.processes)
        ]

    def _fork(self, queues: Collection[int]) -> None:
        from vq.queue_process import QueueProcess

        rings = self._rings
        vrings = [rings.vrings[index] for index in sorted(queues)]
        positions = {vring.index: rings.lend(vring) for vring in vrings}
        process: QueueProcess | None = None

        def returned(result: Return) -> None:
            assert process is not None
            self._take_time()
            self._come_home(process, result)
            if result.positions and result.fault is None:
                rings.device.look_again()

        try:
            process = QueueProcess(
                queues,
                self._loop,
                partial(self._serving, queues),
                on_stats=self._count,
                on_return=returned,
            )
        except OSError as error:
            log.warning("no process for %d queues: %s", len(vrings), error)
            self._take_time()
            for vring in vrings:
                self._take_back(vring, positions[vring.index])
            return
        self._processes.append(process)
        names = ", ".join(rings.device.queues[vring.index].name for vring in vrings)
        log.info("process %d serves %s", process.pid, names)

    def _come_home(self, process: QueueProcess, result: Return) -> None:
        self._processes.remove(process)
        if result.fault is not None or not result.positions:
            self._take_time()
        for index in sorted(process.queues):
            self._take_back(self._rings.vrings[index], result.positions.get(index))
        if result.fault is not None:
            self._rings.device.fail_for(result.fault)

    def _take_back(self, vring: Vring, position: Position | None) -> None:
        """Goes on with a ring here. There may be no message of the frontend's to refuse meanwhile,
        so what it made impossible is the device's end until its reset."""
        try:
            self._rings.come_home(vring, position)
        except VqError as error:
            log.warning("ring %d cannot go on: %s", vring.index, error)
            self._rings.device.fail_for(error)

    def _count(self, stats: Mapping[str, int]) -> None:
        self._rings.device.stats.update(stats)

    def _serving(self, queues: Collection[int]) -> Serving:
        """In the forked process: what it is to do."""
        from vq.queue_process import Serving

        self._loop.close()  # first: it watches nothing any more, and is not asked to
        if self._apart.on_fork is not None:
            self._apart.on_fork()
        for process in self._processes:
            process.let_go()
        self._processes.clear()
        rings = self._rings

        def start(loop: Loop, give_back: Callable[[], None]) -> None:
            loop.linger = self._loop.linger
            self._on_fork(loop)
            rings.serve_only(queues, loop, give_back)

        return Serving(start, partial(rings.end_serving, queues), rings.device.stats)


def may_be_lent(vring: Vring) -> bool:
    """Whether kicks and calls go through descriptors, which other processes can have."""
    return (
        vring.held in (Held.ENABLED, Held.LENT)
        and vring.kick in (Kick.FD, Kick.POLLED)
        and (vring.call_fd >= 0 or vring.call_was_set)
    )
