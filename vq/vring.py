"""What a vhost-user frontend has said about one ring, and who works on it.

Section names cited below are those of QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vq.loop import Timer
from vq.vhost_message import VringAddr

__all__ = ["Held", "Kick", "Position", "Return", "Vring"]


class Kick(enum.Enum):
    """How a ring learns of new buffers. A ring without any is stopped ("Ring states")."""

    NONE = enum.auto()
    FD = enum.auto()
    POLLED = enum.auto()
    IN_BAND = enum.auto()


class Held(enum.Enum):
    """What the device has of a ring ("Ring states").

    A ring that is disabled is the device's to process without side effects. Frontends disable a
    ring also to take it away: User-Mode Linux does, and frees its memory when the next request was
    answered. So what waits in it is dealt with at once, and from then on it is touched only for a
    kick; and after a reset not before it is started anew.

    A ring that is enabled may be lent to another process (`vq.vhost_processes`), which works on it
    until it is asked for it back.
    """

    NOTHING = enum.auto()
    DISABLED = enum.auto()
    ENABLED = enum.auto()
    LENT = enum.auto()


@dataclass(slots=True, eq=False)
class Vring:
    """What the frontend has said about one ring."""

    index: int
    size: int = 0
    address: VringAddr | None = None
    base: int = 0
    """Where to go on in the available ring."""
    next_used: int | None = None
    """Where to go on in the used ring; None: where its index in guest memory stands."""
    enabled: bool = False
    kick: Kick = Kick.NONE
    kick_fd: int = -1
    call_fd: int = -1
    call_was_set: bool = False
    """Whether SET_VRING_CALL came; without a descriptor it means that the frontend polls."""
    call_missed: bool = False
    err_fd: int = -1
    err_was_set: bool = False
    waits: int = 0
    """How often the frontend made us wait for its event descriptors."""
    started: bool = False
    """Whether the frontend has started it since the device was reset."""
    held: Held = Held.NOTHING
    look: Timer | None = None
    """For a ring that was started, and may be enabled a moment later."""
    kicks: int = 0
    """How many came since it was looked whether they bring anything."""
    kicked_at: int = -1
    """Where the driver's index was when it was looked."""
    rest: Timer | None = None
    """While kicks are not heard."""

    @property
    def running(self) -> bool:
        """Whether somebody works on the ring now."""
        return self.held in (Held.ENABLED, Held.LENT)


class Position(NamedTuple):
    """Where to go on in a ring."""

    next_avail: int
    next_used: int | None
    """None: where the index in guest memory stands."""
    unfinished: tuple[int, ...] = ()
    """Heads of chains that were taken, and are to be taken again."""


class Return(NamedTuple):
    """What a process gives back that rings were lent to."""

    positions: Mapping[int, Position]
    """By the ring's index. Those that are not there are unknown: the process died."""
    fault: Exception | None = None
    """What the device needs a reset for, if it does."""
