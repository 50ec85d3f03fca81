"""The tap of whichever system this is: the one place that looks at `sys.platform`."""

from __future__ import annotations

import sys

from vq.errors import UsageError
from vq.link import Link

__all__ = ["open_tap"]


def open_tap(name: str, *, queues: int = 1) -> Link:
    """Opens the tap `name` of this host with `queues` queues.

    On Linux `name` is the interface's, which is created when it is not there; a ``%d`` in it is
    filled in by the kernel. On OpenBSD and FreeBSD it is the interface's, such as ``tap0``, or the
    path of its device; a tap has one queue there.

    Raises `UsageError` when the name or the number of queues cannot be, or this system's taps are
    not known; `OSError` when the kernel refuses.
    """
    if sys.platform == "linux":
        from vq.tap_linux import LinuxTap

        return LinuxTap(name, queues=queues)
    if queues != 1:
        raise UsageError(f"a tap has one queue on {sys.platform}, not {queues}")
    if sys.platform.startswith("openbsd"):
        from vq.tap_bsd import OpenBsdTap

        return OpenBsdTap(name)
    if sys.platform.startswith("freebsd"):
        from vq.tap_bsd import FreeBsdTap

        return FreeBsdTap(name)
    raise UsageError(
        f"vq knows the taps of Linux, OpenBSD and FreeBSD, not those of {sys.platform}: "
        "use another link, such as stream:PATH"
    )
