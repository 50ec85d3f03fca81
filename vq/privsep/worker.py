"""The worker's view of its helper: who it says things to, and who tells it how the taps are."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Sequence

from vq.loop import Loop
from vq.privsep.channel import Channel
from vq.privsep.connector import Connector
from vq.privsep.message import Message, MessageError, Ready, TapState
from vq.privsep.tap import SeparatedTap

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker:
    """In the process that serves guests: the other end of the helper.

    `taps` and `connector` ask the helper from now on. `signals` are those that are to be blocked
    while guests are served; until then the helper has blocked more.
    """

    def __init__(
        self,
        to_helper: socket.socket,
        connections: socket.socket,
        taps: Sequence[SeparatedTap],
        connector: Connector,
        signals: set[int | signal.Signals],
    ) -> None:
        self._signals = signals
        self._socket = to_helper
        self._taps = taps
        self._channel: Channel | None = None
        self._connections = connections
        connector.leave_control(connections)
        for tap in taps:
            tap.leave_control(self._send)

    def attach(self, loop: Loop, stop: Callable[[], None]) -> None:
        """Listens to the helper in this loop; calls `stop` when there is no helper any more.

        From now on signals come, so handlers for them have to be there.
        """
        self._stop = stop
        signal.pthread_sigmask(signal.SIG_SETMASK, self._signals)
        self._channel = Channel(self._socket, loop, self._heard, self._ended)

    def ready(self) -> None:
        """Tells the helper that guests are served from now on."""
        self._send(Ready())

    def close(self) -> None:
        """Hangs up."""
        if self._channel is not None:
            self._channel.close()
        self._connections.close()

    def _send(self, message: Message) -> None:
        assert self._channel is not None, "attached before anything is said"
        self._channel.send(message)

    def _heard(self, message: Message) -> None:
        if isinstance(message, TapState) and message.tap < len(self._taps):
            self._taps[message.tap].told(message)

    def _ended(self, error: MessageError | None) -> None:
        if error is not None:
            log.error("the helper does not make sense: %s", error)
        self._stop()
