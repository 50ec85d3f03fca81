"""What a worker is confined to, and what came of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from vq.errors import in_words
from vq.sandbox.user import User

__all__ = ["Confinement", "Policy", "Step", "listed"]

Step = Callable[[], str]
"""Takes one facility up; says in a few words what is held. `OSError` where it cannot be had."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a worker still needs. Descriptors that are open are its own in any case."""

    user: User | None = None
    """Who it becomes; None to stay who it is."""
    ioctls: tuple[int, ...] = ()
    """Requests that it makes of its descriptors, beside those that modules list."""
    data_fds: tuple[int, ...] = ()
    """Descriptors of which it only reads and writes data, and waits for it."""
    memory: int | None = None
    """Bytes of memory that it may have of its own, beside the guests'; None for no limit."""


@dataclasses.dataclass
class Confinement:
    """What holds for this process from now on, by facility."""

    held: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name to what is held, in a few words."""
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name to why it could not be had."""

    def take(self, name: str, step: Step) -> None:
        """Takes up one facility, or notes that it is missing."""
        try:
            self.held[name] = step()
        except OSError as error:
            self.missing[name] = in_words(error)

    def __str__(self) -> str:
        return "; ".join(self.held.values()) or "nothing"


def listed(kind: str) -> list[Any]:
    """What the modules that are loaded list under this name, each thing once."""
    found: dict[Any, None] = {}
    for _, module in sorted(sys.modules.items()):
        names = getattr(module, kind, None)
        if isinstance(names, tuple):
            found |= dict.fromkeys(names)
    return list(found)
