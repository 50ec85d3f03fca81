"""`vq serve blk`: a block device with an image of the host's in it."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.abi_block import BLK_ID_BYTES
from vq.device import Device
from vq.devices.block import BlockDevice
from vq.devices.block_image import BLOCK_SIZES, Image
from vq.errors import UsageError
from vq.loop import Loop
from vq.serve.kind import Kind

__all__ = ["BlkKind"]

log = logging.getLogger(__name__)


class BlkKind(Kind):
    """A disk. SIGHUP has the image's length looked at again."""

    capabilities: ClassVar[Mapping[str, object]] = {
        "type": "block",
        "features": ["read-only", "blk-file"],
    }
    signals: ClassVar[Sequence[int]] = (signal.SIGHUP,)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """See `Kind`."""
        parser.add_argument(
            "--image",
            "--blk-file",
            required=True,
            metavar="FILE",
            help="the disk's bytes: a raw image or a block device (SIGHUP: its size has changed)",
        )
        parser.add_argument("--read-only", action="store_true", help="the guest may not write")
        parser.add_argument(
            "--direct", action="store_true", help="keep what is read and written out of memory"
        )
        parser.add_argument(
            "--serial", default="vq", metavar="TEXT", help="the disk's name, up to 20 characters"
        )
        parser.add_argument(
            "--queues", type=int, default=1, metavar="N", help="request queues (default: 1)"
        )
        parser.add_argument(
            "--queue-size",
            type=int,
            default=256,
            metavar="N",
            help="most descriptors of a queue, a power of two from 4 to 32768 (default: 256)",
        )
        parser.add_argument(
            "--block-size",
            type=int,
            choices=BLOCK_SIZES,
            help="the guest's smallest unit in bytes (default: 512, more if --direct needs it)",
        )

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        if not 1 <= args.queues <= 256:
            raise UsageError(f"--queues {args.queues}: there can be 1 to 256")
        if args.queue_size < 4:
            raise UsageError(f"--queue-size {args.queue_size}: a request takes up to 4 descriptors")
        if not args.serial.isascii() or len(args.serial) > BLK_ID_BYTES:
            raise UsageError(f"--serial: up to {BLK_ID_BYTES} characters of ASCII")
        image = Image(
            args.image,
            read_only=args.read_only,
            direct=args.direct,
            block_size=args.block_size,
        )
        stack.callback(image.close)
        log.info(
            "%s: %d bytes in blocks of %d, %s",
            image.path,
            image.size,
            image.block_size,
            "not to be written to" if image.read_only else "to be read and written",
        )
        device = BlockDevice(
            image, queues=args.queues, queue_size=args.queue_size, serial=args.serial
        )
        stack.callback(device.close)
        return [device]

    def follow(self, devices: Sequence[Device], loop: Loop) -> None:
        """See `Kind`."""
        (device,) = devices
        assert isinstance(device, BlockDevice)
        resize = device.resize
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_from_any_thread(resize))

    def statistics(self, new: Mapping[str, int]) -> str:
        """See `Kind`."""
        told = [
            f"{what} {new[what]} ({new.get(f'{what}_bytes', 0) / 1e6:.1f} MB)"
            for what in ("read", "write", "discard", "write_zeroes")
            if new.get(what)
        ]
        told += [
            f"{what} {new[what]}"
            for what in ("flush", "io_errors", "refused_ioerr", "refused_unsupp")
            if new.get(what)
        ]
        return "   ".join(told) or "idle"
