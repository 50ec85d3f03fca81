"""An event loop whose every step a test takes itself."""

from __future__ import annotations

from collections.abc import Callable

from vq.device import QueueLookout


class ManualLoop:
    """Keeps what a device asked of it (`vq.device.EventLoop`)."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        """What is to be done in a lull."""
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.lookouts: list[QueueLookout] = []

    def call_in_lull(self, callback: Callable[[], None]) -> None:
        self.waiting.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later.append((seconds, callback))

    def look_out(self, lookout: QueueLookout) -> None:
        if lookout not in self.lookouts:
            self.lookouts.append(lookout)

    def look(self) -> None:
        """A turn of the loop."""
        for lookout in [found for found in self.lookouts if found.look()]:
            self.lookouts.remove(lookout)
            lookout.deal()

    def lull(self) -> None:
        """There is nothing else to do."""
        for callback in [self.waiting.pop() for _ in range(len(self.waiting))]:
            callback()

    def let_time_pass(self) -> None:
        for _, callback in [self.later.pop() for _ in range(len(self.later))]:
            callback()
