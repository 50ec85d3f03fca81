"""The statistics of `vq serve`: a line a second on standard output."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from vq.device import Device
from vq.loop import Loop

__all__ = ["Statistics"]

log = logging.getLogger(__name__)


class Statistics:
    """What the devices counted, every second: as JSON, or in the words that `describe` finds."""

    def __init__(
        self,
        devices: Sequence[Device],
        loop: Loop,
        describe: Callable[[Mapping[str, int]], str],
        *,
        as_json: bool,
    ) -> None:
        self._devices = devices
        self._loop = loop
        self._describe = describe
        self._as_json = as_json
        self._before = Counter[str]()

    def start(self) -> None:
        """Begins to count."""
        self._before = self._sum()
        self._loop.call_later(1.0, self._tell)

    def _sum(self) -> Counter[str]:
        total = Counter[str]()
        for device in self._devices:
            total.update(device.stats)
        return total

    def _tell(self) -> None:
        now = self._sum()
        new = {name: count - self._before[name] for name, count in now.items()}
        self._before = now
        line = json.dumps({"second": new, "total": now}) if self._as_json else self._describe(new)
        try:
            print(line, flush=True)
        except BrokenPipeError:  # whoever reads them ends the command, as it ends others
            raise
        except OSError as error:
            log.error("no more statistics, they cannot be written: %s", error)
            return
        self._loop.call_later(1.0, self._tell)
