"""`vq serve rng`: an entropy device."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.device import Device
from vq.devices.entropy import EntropyDevice
from vq.serve.kind import Kind

__all__ = ["RngKind"]


class RngKind(Kind):
    """Random bytes from the host's kernel."""

    capabilities: ClassVar[Mapping[str, object]] = {"type": "rng"}
    needs_nothing_of_the_host = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """It has no options of its own."""

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        return [EntropyDevice()]
