"""The virtio entropy device (virtio 1.3, 5.4): random bytes from the host for the guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vq.abi import DeviceId
from vq.errors import DriverError
from vq.model import DeviceModel
from vq.request import Request

__all__ = ["EntropyDevice"]

MOST = 65536
"""Bytes given for one request at most, so that a guest cannot make us work without end."""


class EntropyDevice(DeviceModel):
    """Fills every buffer with bytes of `source`, by default the system's own random numbers: up to
    64 KiB for each.

    `source` is called with a number of bytes and gives as many. ``random_bytes`` in `stats` counts
    them.
    """

    device_id = DeviceId.ENTROPY
    from_outside = ("requests",)

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__(queues=[("requests", 64, self._fill)])
        self._source = source

    def _fill(self, requests: Sequence[Request]) -> None:
        for request in requests:
            room = request.writer.remaining
            if request.reader.remaining:
                raise DriverError(
                    "a device-readable buffer", queue=self.queues[0].name, section="5.4.6.1"
                )
            if not room:
                raise DriverError(
                    "a buffer without room", queue=self.queues[0].name, section="5.4.6.2"
                )
            data = self._source(min(room, MOST))
            request.writer.write(data)  # 5.4.6.2: one or more bytes, not all of them
            request.complete()
            self.stats["random_bytes"] += len(data)
