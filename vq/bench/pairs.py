"""`vq bench pairs`: what a process for each queue pair gives.

A scripted guest sends 64-byte frames through a real tap, on one queue pair and on two, and two
pairs are served by one process and by a process each. The guest takes next to no time: its frames
stand in a large queue from the start, and to have them sent once more it moves the available index
on. It sleeps until the device calls it, when half of them were sent.

So on two processors there is one for each process of the device. Frames towards the guest are not
measured: whoever makes them would need processors, too.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any

from vq.abi import NET_HDR_SIZE, Feature, NetFeature, Status, feature_mask
from vq.bench.contestants import ServedTap, compare, tap_namespace, two_processors
from vq.bench.measure import add_repeat_arguments
from vq.bench.report import VQ, Description, Figure, describe_figures
from vq.bench.scripted import frame_of
from vq.driver import DriverRing, GuestAllocator
from vq.errors import VqError
from vq.memory import GuestMemory
from vq.testing.requirements import check_namespaces, check_tap
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_message import ProtocolFeature

__all__ = ["HELP", "add_arguments", "describe", "measure"]

HELP = "two queue pairs with a process each, beside one process and one pair"

FIGURES = (
    Figure("out, 64 bytes", "frames/s", digits=0),
    Figure("out, 64 bytes, device", "frames/cpu s", digits=0),
)
ONE_PROCESS, ONE_PAIR = "one process", "one pair"
_CONTESTANTS = {VQ: (2, 2), ONE_PROCESS: (2, 1), ONE_PAIR: (1, 1)}
"""Queue pairs and processes of each."""

_ROUNDS = 5
_SECONDS = 1.0
_WARM_UP = 0.3  # until queues are with the process that serves them
_QUEUE_SIZE = 1024
_MEMORY = 8 << 20
_ADDRESS = "198.18.64.1/24"
_PATIENCE = 5.0
_FEATURES = feature_mask(
    (NetFeature.MAC, NetFeature.CTRL_VQ, NetFeature.MQ, Feature.EVENT_IDX, Feature.VERSION_1)
)
_PROTOCOL = feature_mask((ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vq bench pairs`."""
    add_repeat_arguments(parser, rounds=_ROUNDS, seconds=_SECONDS)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report that `--json` prints."""
    check_tap()
    check_namespaces()
    two_processors()

    def sample(name: str, command: Sequence[str]) -> dict[str, float]:
        pairs = _CONTESTANTS[name][0]
        with (
            tap_namespace(_ADDRESS, queues=pairs) as namespace,
            ServedTap(namespace, VQ, command) as device,
            GuestMemory.allocate(_MEMORY) as memory,
            VhostFrontend(
                device.socket, memory, queue_size=_QUEUE_SIZE, protocol=_PROTOCOL
            ) as frontend,
        ):
            return _measure_device(device, _Sender(frontend, memory, pairs), args.seconds)

    # Not kept awake: processes that are never idle would share a processor with one that keeps it.
    report = compare(FIGURES, _commands(), args.rounds, sample, keep_awake=False)
    return {**report, "seconds": args.seconds}


def describe(report: dict[str, Any]) -> Description:
    """What people are shown of a report."""
    title = f"Two queue pairs with a process each, medians of {report['rounds']} rounds"
    return describe_figures(title, FIGURES, report)


def _commands() -> dict[str, Sequence[str]]:
    command = [sys.executable, "-m", "vq", "serve", "net", "--queue-size", str(_QUEUE_SIZE)]
    return {
        name: [*command, "--queue-pairs", str(pairs), "--processes", str(processes)]
        for name, (pairs, processes) in _CONTESTANTS.items()
    }


def _measure_device(device: ServedTap, sender: _Sender, seconds: float) -> dict[str, float]:
    """All `FIGURES` of one contestant."""
    sender.send(_WARM_UP)
    start, busy, count = time.monotonic(), device.cpu_seconds(), device.tap_frames()[0]
    sender.send(seconds)
    count = device.tap_frames()[0] - count
    passed, busy = time.monotonic() - start, device.cpu_seconds() - busy
    if not count:
        raise VqError(f"no frame came through: {device.log()[-500:]}")
    rates = count / passed, count / busy if busy else 0.0
    return {figure.name: rate for figure, rate in zip(FIGURES, rates, strict=True)}


class _Sender:
    """A guest that always has the same frames to send, on all of its queue pairs.

    As with QEMU the control queue is not the device's: pairs that are set up are in use.
    """

    def __init__(self, frontend: VhostFrontend, memory: GuestMemory, pairs: int) -> None:
        self._frontend = frontend
        wanted = _FEATURES & frontend.device_features
        frontend.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        frontend.accept_features(wanted)
        frontend.write_status(frontend.status | Status.FEATURES_OK)
        allocator = GuestAllocator(memory)
        _, data = frame_of(64)
        frame = bytes(NET_HDR_SIZE) + bytes(data)
        place = allocator.allocate(len(frame))
        memory.write(place, frame)
        self._queues: dict[int, _Queue] = {}
        for index in range(2 * pairs):
            ring = DriverRing.allocate(memory, allocator, _QUEUE_SIZE, features=wanted)
            frontend.setup_queue(
                index, size=ring.size, desc=ring.desc, avail=ring.avail, used=ring.used
            )
            if index % 2:
                self._queues[index] = _Queue(ring, place, len(frame))
        frontend.write_status(frontend.status | Status.DRIVER_OK)

    def send(self, seconds: float) -> None:
        """Sends for so long. Raises `VqError` when the device stops to."""
        end = time.monotonic() + seconds
        last = {index: time.monotonic() for index in self._queues}
        while (now := time.monotonic()) < end:
            for index, queue in self._queues.items():
                if queue.offer():
                    last[index] = now
                    self._frontend.notify(index)
                elif now - last[index] > _PATIENCE:
                    raise VqError(f"queue {index} does not move any more")
            self._frontend.wait(0.05)


class _Queue:
    """A transmit queue that is full of the same frame."""

    def __init__(self, ring: DriverRing, place: int, length: int) -> None:
        memory, size = ring.memory, ring.size
        memory.write(ring.desc, struct.pack("<QIHH", place, length, 0, 0) * size)
        memory.write(ring.avail + 4, struct.pack(f"<{size}H", *range(size)))
        self._memory, self._ring = memory, ring
        self._index = 0

    def offer(self) -> bool:
        """Makes the frames available (again) that came back, if any did.

        Asks to be called when half of the queue was sent: the device never waits for more.
        """
        memory, ring = self._memory, self._ring
        used = memory.load16(ring.used + 2)
        index = used + ring.size & 0xFFFF
        if index == self._index:
            return False
        self._index = index
        used_event = ring.avail + 4 + 2 * ring.size  # virtio 1.3, 2.7.6
        memory.store16(used_event, used + ring.size // 2 - 1 & 0xFFFF)
        memory.store16(ring.avail + 2, index)
        return True
