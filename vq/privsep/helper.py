"""The helper: it keeps the privileges, starts the worker, and does the few things that it asks for.

It never sees a byte of a guest's. It opened the taps before the worker was there, sets their
offloads when a request is one that may be made, says how they are, and connects to the sockets that
were named at the start. When the worker ends it says why in words, and ends too or starts another.

Both are one program: the worker is forked from the helper, so that whatever was opened before is
open in both, and a new worker begins as the first one did.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence

from vq.errors import UsageError, in_words
from vq.exit_status import describe_end
from vq.loop import Loop
from vq.offload import Offload
from vq.privsep.channel import Channel, channel_pair
from vq.privsep.connector import Connector, answer
from vq.privsep.message import (
    Connect,
    Look,
    Message,
    MessageError,
    Ready,
    SetOffloads,
    TapState,
)
from vq.privsep.tap import SeparatedTap
from vq.privsep.worker import Worker

__all__ = ["Helper"]

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that a worker has to end, once it has been told to."""
LOOK_SECONDS = 0.5
"""How often a tap's state is looked at, to tell the worker when it is another."""
LAST_WORDS = (0, 2, 128 + signal.SIGPIPE)
"""Exit statuses that another worker would end with, too: all is done, or it was used wrongly."""
SOON = 0.01
SHORT_LIFE = 0.3
LONGEST_PAUSE = 1.0
"""A worker that lived less than `SHORT_LIFE` seconds is not started again at once: the pause grows
from life to life, up to this."""


class Helper:
    """Runs `work` in a worker process, over and over if `restart` says so.

    `work` gets the worker's end and returns the exit status; it is called in the child, which ends
    when it returns. `loop` is the helper's own; whoever stops it ends the worker in order. Once the
    first worker is ready `on_ready` is called. `signals` that the helper gets are the worker's.
    """

    def __init__(
        self,
        loop: Loop,
        work: Callable[[Worker], int],
        *,
        taps: Sequence[SeparatedTap] = (),
        connector: Connector | None = None,
        restart: bool = False,
        signals: Sequence[int] = (),
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._work = work
        self._taps = taps
        self._connector = connector or Connector()
        self._restart = restart
        self._signals = signals
        self._on_ready = on_ready
        self._channels: list[Channel] = []
        self._pid = 0
        self._status: int | None = None
        self._started = 0.0
        self._pause = 0.0
        self._told: dict[int, TapState] = {}
        self._complaints: dict[int, str] = {}  # what was logged last, by tap

    def run(self) -> int:
        """Serves until the loop is stopped or the worker has ended for good; the exit status."""
        for number in self._signals:
            signal.signal(number, self._pass_on)
        self._start()
        self._loop.call_later(LOOK_SECONDS, self._look_again)
        try:
            self._loop.run()
        finally:
            if self._pid:
                self._end_worker()
        return self._status or 0

    # --- the worker's life ------------------------------------------------------------------------

    def _start(self) -> None:
        self._status = None
        self._told.clear()
        for tap in self._taps:
            self._begin_anew(tap)
        ours, theirs = channel_pair()
        our_connections, their_connections = channel_pair()
        # A signal between the fork and the worker's own handlers waits for these.
        waiting = (signal.SIGTERM, signal.SIGINT, *self._signals)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
        try:
            self._pid = os.fork()
            if self._pid == 0:
                ours.close()
                our_connections.close()
                self._be_worker(theirs, their_connections, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        their_connections.close()
        self._started = time.monotonic()
        self._channels = [
            Channel(sock, self._loop, self._asked, self._hung_up)
            for sock in (ours, our_connections)
        ]

    def _be_worker(
        self,
        to_helper: socket.socket,
        connections: socket.socket,
        blocked: set[int | signal.Signals],
    ) -> None:
        """The child's life, from the fork to its end."""
        status = 1
        try:
            self._loop.close()
            worker = Worker(to_helper, connections, self._taps, self._connector, blocked)
            status = self._work(worker)
        except BaseException:
            log.exception("the worker failed")
        finally:
            os._exit(status)

    def _hung_up(self, error: MessageError | None) -> None:
        """The worker is gone, or about to go, or says what nobody may say."""
        self._close_channels()
        if error is not None:
            log.error("the worker asks for what cannot be, and is ended: %s", error)
            self._kill()
        self._reap(time.monotonic() + PATIENCE)

    def _reap(self, deadline: float) -> None:
        """Waits for the worker's end without waiting here."""
        if not self._wait():
            if time.monotonic() > deadline:
                self._kill()
            self._loop.call_later(SOON, functools.partial(self._reap, deadline))
            return
        if self._status in LAST_WORDS or not self._restart:
            self._loop.stop()
            return
        lived = time.monotonic() - self._started
        if lived > SHORT_LIFE:
            self._pause = 0.0
        log.warning("the worker is started again")
        self._loop.call_later(self._pause, self._start)
        self._pause = min(2 * self._pause or 0.1, LONGEST_PAUSE)

    def _wait(self) -> bool:
        """Whether the worker has ended; then it is gone, and `_status` is set."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return False
        self._pid = 0
        self._status, words = describe_end(status, "the worker")
        if words:
            log.error("%s", words)
        return True

    def _end_worker(self) -> None:
        """Ends the worker in order, or kills it.

        One that waits in the kernel for a file system cannot be killed before that answers, and it
        may be the frontend's own: then the worker is left behind.
        """
        self._close_channels()
        deadline = time.monotonic() + PATIENCE
        killed = False
        while not self._wait():
            time.sleep(SOON)
            if time.monotonic() <= deadline:
                continue
            if killed:
                log.error("the worker cannot be killed: process %d is left behind", self._pid)
                self._status = 1
                return
            log.error("the worker does not end, and is killed")
            self._kill()
            killed = True
            deadline += PATIENCE

    def _pass_on(self, number: int, _: object) -> None:
        """A signal for the worker came here: ours is the process that is known."""
        if self._pid:  # in a worker there is none, until it has a handler of its own
            os.kill(self._pid, number)

    def _kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()

    # --- what it asks for -------------------------------------------------------------------------

    def _asked(self, message: Message) -> None:
        match message:
            case SetOffloads(index, generation, offloads):
                error = errno.ENODEV
                if index < len(self._taps):
                    error = self._set(self._taps[index], offloads)
                self._tell(self._state(index, generation, error))
            case Look(index):
                self._tell(self._state(index, 0, 0))
            case Connect():
                connected, fd = answer(self._connector, message)
                self._channels[1].send(connected, fd)
            case Ready():
                if self._on_ready is not None:
                    on_ready, self._on_ready = self._on_ready, None
                    on_ready()
            case _:
                self._hung_up(MessageError(f"{type(message).__name__} is the helper's to say"))

    def _begin_anew(self, tap: SeparatedTap) -> None:
        """What the last worker wanted is nothing to the next one.

        Which queues it used is not known here: all of them, and then the first one, is known.
        """
        self._set(tap, Offload.NONE)
        tap.tap.keep_control()
        try:
            tap.tap.activate_ports(len(tap.ports))
            tap.tap.activate_ports(1)
        except OSError as error:
            log.warning("%s: the host refused: %s", tap.name, error.strerror)

    def _set(self, tap: SeparatedTap, offloads: Offload) -> int:
        """Sets a tap's offloads; 0 or the kernel's errno."""
        try:
            tap.tap.request_offloads(offloads)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _state(self, index: int, generation: int, error: int) -> TapState:
        if index >= len(self._taps):
            return TapState(index, generation, error or errno.ENODEV, Offload.NONE, 0, False)
        tap = self._taps[index].tap
        if tap.is_gone:
            return TapState(index, generation, error, tap.delivers, 0, up=False, gone=True)
        try:
            up, mtu = tap.is_up, tap.mtu or 0
        except OSError:
            up, mtu = False, 0
        return TapState(index, generation, error, tap.delivers, mtu, up)

    def _tell(self, state: TapState) -> None:
        self._told[state.tap] = state._replace(generation=0, error=0)
        self._channels[0].send(state)

    def _look_again(self) -> None:
        """Tells the worker about taps that are not as they were."""
        for tap in self._taps:
            told = self._told.get(tap.index)
            if told is not None and told.gone:  # the worker has heard that the last one is gone
                self._find_again(tap)
            state = self._state(tap.index, 0, 0)
            if told != state:
                self._tell(state)
        self._loop.call_later(LOOK_SECONDS, self._look_again)

    def _find_again(self, tap: SeparatedTap) -> None:
        """Takes a tap of the same name, once there is one, in the place of one that is gone."""
        complaint = ""
        try:
            tap.tap.attach_again()
        except (OSError, UsageError) as error:
            complaint = in_words(error)
        if complaint and complaint != self._complaints.get(tap.index):
            log.warning("%s: there is one again, but: %s", tap.name, complaint)
        self._complaints[tap.index] = complaint
