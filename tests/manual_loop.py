"""An event loop whose every step a test takes itself."""

from __future__ import annotations

from collections.abc import Callable

from vq.device import QueueLookout


class ManualLoop:
    """Keeps what a device asked of it (`vq.device.EventLoop`)."""

    def __init__(self) -> None:
        self.moved = 0
        """How often the device said that much was moved."""
        self.waiting: list[Callable[[], None]] = []
        """What is to be done in a lull."""
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.lookouts: list[QueueLookout] = []
        self.looks_out = True

    def much_was_moved(self) -> None:
        self.moved += 1

    def call_in_lull(self, callback: Callable[[], None]) -> None:
        self.waiting.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later.append((seconds, callback))

    def look_out(self, lookout: QueueLookout) -> bool:
        if self.looks_out and lookout not in self.lookouts:
            self.lookouts.append(lookout)
        return self.looks_out

    def lull(self) -> None:
        """There is nothing else to do."""
        for callback in [self.waiting.pop() for _ in range(len(self.waiting))]:
            callback()

    def let_time_pass(self) -> None:
        for _, callback in [self.later.pop() for _ in range(len(self.later))]:
            callback()
