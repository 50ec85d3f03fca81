"""What `vq serve` asks of a kind of device: its options, how it is made, what it tells."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.device import Device
from vq.link import Link
from vq.loop import Loop
from vq.privsep import Connector, SeparatedTap

__all__ = ["Kind"]


class Kind(ABC):
    """One kind of device on the command line. Every method gets the parsed options."""

    capabilities: ClassVar[Mapping[str, object]]
    """What ``--print-capabilities`` prints (QEMU's docs/interop/vhost-user.json)."""

    needs_nothing_of_the_host: ClassVar[bool] = False
    """Whether the options alone, with the link of a recording, make the device once more."""

    signals: ClassVar[Sequence[int]] = ()
    """Signals that `follow` has handlers for."""

    def __init__(self) -> None:
        self.taps: list[SeparatedTap] = []
        """The taps of the devices, whose settings are made by whoever keeps the privileges."""
        self.connector = Connector()
        """What connects to Unix sockets by path, for devices that do so while they are served."""

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of this kind; those of the transport are there already."""

    @abstractmethod
    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """Makes the devices, one for each socket, with all that they need of the host.

        This is the last time that files can be opened: who serves the devices may not. What they
        hold is given back when `stack` is closed. Raises `UsageError` and `OSError`.
        """

    def open_for_replay(
        self, args: argparse.Namespace, link: Link | None, stack: ExitStack
    ) -> Device:
        """Makes the first of the devices once more, for a replay of what it did.

        `link` is the recording's, for a device that has one.
        """
        return self.open_devices(args, stack)[0]

    def sockets_needed(self, args: argparse.Namespace) -> int:
        """How many sockets there must be: as many as `open_devices` makes devices."""
        return 1

    def queue_num(self, args: argparse.Namespace) -> int | None:
        """The answer to GET_QUEUE_NUM; None for the number of the device's queues."""
        return None

    def processes(self, args: argparse.Namespace) -> int:
        """How many processes may serve a device's queues."""
        return 1

    def follow(self, devices: Sequence[Device], loop: Loop) -> None:
        """The devices are served from now on: starts what has to be looked at from time to time."""

    def statistics(self, new: Mapping[str, int]) -> str:
        """A line for people about what was counted in the last second."""
        told = (f"{name} {count}" for name, count in sorted(new.items()) if count)
        return "   ".join(told) or "idle"
