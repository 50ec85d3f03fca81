"""A process for some queues of a device, forked from the one that serves the device.

Both have the guest's memory, and the descriptors that were open. Over a socket the forked process
says what it counted, and gives the queues back: when it is asked to, or by itself where there is
something that is not its own to decide. It ends when the other one does.

A message is a JSON object in a datagram. The process that serves the device believes none of them:
the other one has read what a guest wrote.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from vq.errors import DriverError, VqError, in_words
from vq.exit_status import describe_end
from vq.loop import Loop
from vq.sandbox import KillSwitch, end_with_parent, make_no_process
from vq.shared_fd import Watchdog
from vq.vring import Position, Return

__all__ = ["QueueProcess", "Serving"]

log = logging.getLogger(__name__)

SYSTEM_CALLS = (
    # what makes a process, and waits for its end
    *("fork", "getppid", "prctl", "prlimit64", "set_robust_list", "wait4"),
    # its socket, and its loop
    *("epoll_create1", "getsockname", "pipe2", "poll", "ppoll", "recvfrom", "sendto", "socketpair"),
)

PATIENCE = 2.0
"""Seconds in which the queues have to be back. A turn takes milliseconds, and `Watchdog` ends what
lasts."""
TELL_SECONDS = 1.0
"""How often the forked process says what it counted."""
_MAX_MESSAGE = 1 << 18
_MOST_NAMES, _LONGEST_NAME = 256, 80
"""Of counters that it may have, however long it lives."""
_NONSENSE = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
_IGNORED = (signal.SIGTERM, signal.SIGINT)
_GIVE_BACK = b"give back"
_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)


class Serving(NamedTuple):
    """What a forked process does."""

    start: Callable[[Loop, Callable[[], None]], None]
    """Begins to serve the queues on a loop; the function is for giving them back."""
    stop: Callable[[], Return]
    """Ends that."""
    stats: Counter[str]
    """What is counted meanwhile."""


class QueueProcess:
    """The forked process, seen from the one that serves the device.

    `serve` is called in the forked process; it may close what is not for it, and says what to do
    there. Here `on_stats` is called for what was counted, and `on_return` once when the queues came
    back without having been asked for, or the process died. Raises `OSError` when there can be no
    other process.
    """

    def __init__(
        self,
        queues: Collection[int],
        loop: Loop,
        serve: Callable[[], Serving],
        *,
        on_stats: Callable[[Mapping[str, int]], None],
        on_return: Callable[[Return], None],
    ) -> None:
        self.queues = frozenset(queues)
        self._loop = loop
        self._on_stats = on_stats
        self._on_return = on_return
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._switch = KillSwitch()
        self.pid = -1
        self._died = False
        self._names: set[str] = set()  # of what it counted
        parent = os.getpid()
        # A signal between the fork and what the process does about it waits for that.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self.let_go()
                _live(theirs, parent, blocked, serve)
            self._switch.arm(self.pid)
        except BaseException:
            self.let_go()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            loop.watch(self._socket.fileno(), readable=self._readable)
        except BaseException:
            self._end()
            raise

    def let_go(self) -> None:
        """In another process that was forked: this one is none of its business."""
        self._socket.close()
        self._switch.let_go()

    def recall(self) -> Return:
        """Has the queues given back, and the process ended; waits for that."""
        with suppress(OSError):  # it is dead, which reading tells
            self._socket.send(_GIVE_BACK, _NO_SIGNAL)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + PATIENCE  # for all that it says
        returned = None
        while returned is None:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                log.error("process %d does not give its queues back, and is killed", self.pid)
                returned = Return({})
            else:
                returned = self._receive()
        self._end()
        return returned

    def _readable(self) -> None:
        returned = self._receive()
        if returned is not None:
            self._end()
            self._on_return(returned)

    def _receive(self) -> Return | None:
        """Takes one message; what was given back, if that is what it says."""
        data = b""
        for _ in range(2):
            try:
                data = self._socket.recv(_MAX_MESSAGE)
                break
            except ConnectionResetError:
                # It ended without having read what it was asked; once. What it said before is
                # there all the same.
                continue
            except OSError:
                break
        if not data:
            self._died = True
            return Return({})
        try:
            return self._understand(json.loads(data))
        except _NONSENSE as error:
            log.error("process %d does not make sense, and is ended: %.200r", self.pid, error)
            return Return({})

    def _understand(self, message: dict[str, Any]) -> Return | None:
        stats = {str(name): _count(count) for name, count in message["stats"].items()}
        self._names |= stats.keys()
        if len(self._names) > _MOST_NAMES or not all(map(_is_name, stats)):
            raise ValueError("names that nothing is counted under")
        self._on_stats(stats)
        if "rings" not in message:
            return None
        positions = {
            int(index): Position(
                _index(next_avail),
                None if next_used is None else _index(next_used),
                tuple(map(_index, unfinished)),
            )
            for index, next_avail, next_used, unfinished in message["rings"]
        }
        if positions.keys() - self.queues:
            raise ValueError("a queue that it never had")
        fault = message["fault"]
        return Return(positions, None if fault is None else _fault_from(fault))

    def _end(self) -> None:
        """Makes sure that nobody but this process touches the queues any more."""
        self._loop.watch(self._socket.fileno())
        self._socket.close()
        self._switch.end()  # it has nothing left to do, or is not to do it
        _, status = os.waitpid(self.pid, 0)
        if self._died:
            name = f"process {self.pid}, which served {len(self.queues)} queues,"
            log.error("%s", describe_end(status, name)[1] or f"{name} ended")


def _live(
    sock: socket.socket,
    parent: int,
    blocked: set[int | signal.Signals],
    serve: Callable[[], Serving],
) -> None:
    """The forked process' life; `blocked` are the signals that were so before the fork."""
    status = 1
    try:
        # Whoever stops the service tells the process that serves the device, and that tells us.
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        end_with_parent(parent)
        make_no_process()
        _serve(sock, serve())
        status = 0
    except (VqError, OSError) as error:
        log.error("process %d: %s", os.getpid(), in_words(error))
    except BaseException:
        log.exception("process %d failed", os.getpid())
    finally:
        os._exit(status)


def _serve(sock: socket.socket, serving: Serving) -> None:
    loop = Loop()

    def tell() -> None:
        if serving.stats:
            _tell(sock, stats=serving.stats)
            serving.stats.clear()
        loop.call_later(TELL_SECONDS, tell)

    def recalled() -> None:
        # What is not read makes an error of what is said (unix(7): ECONNRESET).
        sock.recv(len(_GIVE_BACK))
        loop.stop()

    loop.watch(sock.fileno(), readable=recalled)
    loop.call_later(TELL_SECONDS, tell)
    with Watchdog():
        serving.start(loop, loop.stop)
        loop.run()
        returned = serving.stop()
    rings = [(index, *position) for index, position in returned.positions.items()]
    _tell(sock, stats=serving.stats, rings=rings, fault=_fault_as_data(returned.fault))


def _tell(sock: socket.socket, **message: object) -> None:
    with suppress(OSError):  # the other process is gone, and so is this one in a moment
        sock.send(json.dumps(message).encode(), _NO_SIGNAL)


def _index(number: object) -> int:
    """A position in a ring, or a chain's head; `ValueError` for anything else."""
    if not isinstance(number, int) or not 0 <= number <= 0xFFFF:
        raise ValueError(f"{number!r} is not 16 bits")
    return number


def _count(number: object) -> int:
    """How often something happened, or how many bytes; `ValueError` for anything else."""
    if not isinstance(number, int) or not 0 <= number < 1 << 64:
        raise ValueError(f"{number!r} is not a count")
    return number


def _is_name(name: str) -> bool:
    """Whether that can be something that a device counts."""
    return len(name) <= _LONGEST_NAME and name.isprintable()


def _fault_as_data(fault: Exception | None) -> dict[str, Any] | None:
    if fault is None:
        return None
    if isinstance(fault, DriverError):
        place = {"queue": fault.queue, "head": fault.head, "section": fault.section}
        return {"reason": fault.reason, **place}
    return {"error": f"{type(fault).__name__}: {fault}"}


def _fault_from(data: dict[str, Any]) -> Exception:
    for name, value in data.items():
        if not isinstance(value, int if name == "head" else str) and value is not None:
            raise TypeError(f"{name} is {value!r}")
    if "error" in data:
        return VqError(data["error"])
    return DriverError(**data)
