"""What the author of a device model declares, looked at once, when a device is made.

Each mistake is a `UsageError` that names what is wrong and says what is due. What a driver does is
none of it.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vq.errors import UsageError

__all__ = ["check_config", "check_features", "check_needs", "check_queues", "field_places"]

_QUEUES = "queues are a list of (name, largest size, handler)"


def check_queues(queues: object) -> None:
    """The queues of a model: a sequence of `vq.model.QueueSpec`, at least one."""
    specs = list(queues) if isinstance(queues, Iterable) else [queues]
    if not specs:
        raise UsageError("a device model has at least one queue")
    names = set()
    for spec in specs:
        match spec:
            case [str(name), int(), handler] if handler is None or callable(handler):
                if name in names:  # logs, recordings and `from_outside` go by it
                    raise UsageError(f"two queues have the name {name!r}")
                names.add(name)
            case _:
                raise UsageError(f"{_QUEUES}, not {spec!r}")


def check_features(features: object) -> list[int]:
    """The bits of a device type's own features (virtio 1.3, 2.2); returns them."""
    due = "features is an iterable of bit numbers"
    if not isinstance(features, Iterable):
        raise UsageError(f"{due}, not {features!r}")
    bits = list(features)
    for bit in bits:
        if not isinstance(bit, int):
            raise UsageError(f"{due}, not of {bit!r}")
        if not (0 <= bit <= 23 or 50 <= bit <= 127):
            raise UsageError(
                f"feature bit {bit:d} is not the device type's: these are 0 to 23 and 50 to 127"
                " (virtio 1.3, 2.2)"
            )
    return bits


def check_needs(needs: Mapping[int, int], names: type[enum.IntEnum]) -> None:
    """`Device.feature_needs`: sets of other features than the one that needs them."""
    known = {int(member): member.name for member in names}
    for bit, others in needs.items():
        if others >> bit & 1:
            name = known.get(bit, f"bit {bit:d}")
            raise UsageError(
                f"feature_needs: {name} needs itself; a feature is given the set of those that it"
                " needs, 1 << BIT"
            )


def check_config(config: object) -> None:
    """A configuration space (virtio 1.3, 2.5: little-endian), or None."""
    # ctypes' structures of the machine's own order are one of the two classes.
    swapped = hasattr(config, "_swappedbytes_")
    if config is not None and not (
        isinstance(config, ctypes.Structure) and swapped == (sys.byteorder == "big")
    ):
        raise UsageError(f"config is an instance of a ctypes.LittleEndianStructure, not {config!r}")


def field_places(
    config: ctypes.Structure | None, names: Collection[str], attribute: str
) -> dict[str, tuple[int, int]]:
    """Where fields stand in the configuration space: the first byte, and the one behind the last.

    Raises `UsageError` for a field that is not there, in the name of `attribute`.
    """
    if isinstance(names, str):
        raise UsageError(f"{attribute} is a collection of names, ({names!r},), not {names!r}")
    places = {}
    fields = [field[0] for field in getattr(config, "_fields_", ())]
    for name in names:
        if name not in fields:
            has = f"it has {', '.join(fields)}" if fields else "there is none"
            raise UsageError(f"{attribute}: the configuration space has no {name}; {has}")
        field: Any = getattr(type(config), name)
        places[name] = field.offset, field.offset + field.size
    return places
