"""Recorded sessions as regression tests.

    def test_the_device_still_does_what_it_did():
        assert_replays("session.vqrec", MyDevice())

A network device is plugged into the recording's own link: hand over what makes it,
``lambda link: NetDevice(link)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from vq.device import Device
from vq.errors import UsageError
from vq.recording.link import RecordedLink
from vq.recording.player import Replay

__all__ = ["assert_replays"]


def assert_replays(
    path: str | os.PathLike[str],
    device: Device | Callable[[RecordedLink], Device],
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Raises `AssertionError`, with what is different, unless the device does what was recorded.

    `device` is new, or makes one from the recording's link; it is closed. Queues named in `ignore`
    are not compared. Raises `CaptureError` for what is no recording.
    """
    session = Replay(path)
    if not isinstance(device, Device):
        if session.link is None:
            raise UsageError(f"{os.fspath(path)} is of a device without a link")
        device = device(session.link)
    try:
        differences = session.run(device, ignore=ignore)
    finally:
        device.close()
    if differences:
        lines = (f"step {d.number}, {d.seconds:.6f} s: {d.what}" for d in differences)
        raise AssertionError(f"not as in {os.fspath(path)}:\n" + "\n".join(lines))
