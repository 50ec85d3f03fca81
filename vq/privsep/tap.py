"""A tap whose frames the worker moves, and whose settings the helper makes.

`SeparatedTap` is a link like any other. Until `leave_control` it is the tap itself. From then on it
asks the helper by message and goes on: frames may come with what was asked for as soon as it was
asked for, so that is expected at once, and what is not wanted any more is expected until the helper
has answered. Of each tap one request is under way at a time; of those that come meanwhile only the
last one is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection

from vq.link import Link, Tap
from vq.offload import Offload
from vq.privsep.message import Look, Message, SetOffloads, TapState

__all__ = ["SeparatedTap"]

log = logging.getLogger(__name__)

_GENERATIONS = 1 << 32


class SeparatedTap(Link):
    """`tap`, which is this process's to control until `leave_control`.

    `index` is the tap's place among those of the helper.
    """

    def __init__(self, tap: Tap, index: int) -> None:
        self.tap = tap
        self.index = index
        self.name = tap.name
        self.ports = tap.ports
        self.accepts = tap.accepts
        self.min_frame = tap.min_frame
        self._send: Callable[[Message], None] | None = None
        self._up = False
        self._gone = False
        self._mtu: int | None = None
        self._generation = 0
        self._asked: int | None = None  # the generation of the request that is under way
        self._wanted = Offload.NONE
        self._looking = False

    @property
    def delivers(self) -> Offload:  # type: ignore[override]
        """What frames may come with now, whether it was answered already or not."""
        return self.tap.delivers

    @property
    def max_frame(self) -> int:  # type: ignore[override]
        """As the tap says."""
        return self.tap.max_frame

    @property
    def is_up(self) -> bool:
        """Whether the host has the interface up, as the helper saw it last."""
        return self.tap.is_up if self._send is None else self._up

    @property
    def mtu(self) -> int | None:
        """The interface's MTU in bytes, as the helper saw it last."""
        return self.tap.mtu if self._send is None else self._mtu

    def request_offloads(self, wanted: Offload) -> None:
        """Asks for these offloads; see `Link.request_offloads`.

        Every request begins a new generation, so those that a device makes when it is reset do.
        """
        if self._send is None:
            self.tap.request_offloads(wanted)
            return
        self._generation = self._generation % (_GENERATIONS - 1) + 1  # 0 is no generation
        self._wanted = wanted
        self.tap.expect(self.tap.delivers | wanted, self._mtu)
        if self._asked is None:
            self._ask()

    def activate_ports(self, count: int) -> None:
        """Uses the first `count` queues, which takes no privileges."""
        self.tap.activate_ports(count)

    @property
    def ports_are_apart(self) -> bool:  # type: ignore[override]
        """As the tap says."""
        return self.tap.ports_are_apart

    def serve_apart(self, ports: Collection[int], on_truncated: Callable[[], None]) -> None:
        """See `Link.serve_apart`."""
        self.tap.serve_apart(ports, on_truncated)

    def look_again(self) -> None:
        """See `Link.look_again`."""
        if self._send is None:
            self.tap.look_again()
        else:
            self._truncated()

    def recover(self) -> None:
        """Looks for the tap where it is this process's to control; else the helper does."""
        if self._send is None and self.tap.attach_again():
            self._changed()

    def close(self) -> None:
        """Closes the tap."""
        self.tap.close()

    # --- in the worker ----------------------------------------------------------------------------

    def leave_control(self, send: Callable[[Message], None]) -> None:
        """The settings are the helper's from now on; `send` takes what there is to be said to it.

        To be called in the process that has just been forked from the helper's.
        """
        try:
            self._up, self._mtu = self.tap.is_up, self.tap.mtu
        except OSError:  # it is gone already
            self._up, self._mtu = False, None
        self._gone = self.tap.is_gone
        self._send = send
        self.tap.leave_control(self._truncated)

    def told(self, state: TapState) -> None:
        """Takes note of what the helper says."""
        if self._send is None:
            return
        self._up, self._mtu = state.up, state.mtu or None
        was_gone, self._gone = self._gone, state.gone
        self._answered(state)
        if was_gone and not state.gone:
            self.tap.was_attached_again()
            self._changed()

    def _answered(self, state: TapState) -> None:
        if state.generation == 0:
            self._looking = False
        elif state.generation == self._asked:
            self._asked = None
            if state.error:
                log.warning("%s: the host refused: %s", self.name, os.strerror(state.error))
            if state.generation == self._generation:
                self.tap.expect(state.delivers, self._mtu)
                return
            self._ask()  # the device wants something else by now
        self.tap.expect(self.tap.delivers, self._mtu)

    def _ask(self) -> None:
        assert self._send is not None
        self._asked = self._generation
        self._send(SetOffloads(self.index, self._generation, self._wanted))

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _truncated(self) -> None:
        """A frame was longer than expected: somebody has changed the MTU."""
        if self._send is not None and not self._looking:
            self._looking = True
            self._send(Look(self.index))
