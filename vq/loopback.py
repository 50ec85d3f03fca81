"""`vq loopback`: a capture's frames through a scripted guest, the whole device model, and back.

Every frame is sent by the scripted guest through its transmit queue, comes back over a loopback
link into its receive queue, and is compared byte for byte. TCP and UDP frames whose checksum is
right leave the guest with the checksum undone, and above the MTU as one GSO frame, as a real
guest's stack sends them; what comes back is held against what the capture has. So the capture, with
the checksums that other systems computed, judges all of vq between the two queues.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, Self

from vq import options
from vq.abi import (
    NET_HDR_SIZE,
    CtrlRx,
    Feature,
    NetFeature,
    feature_names,
)
from vq.driver import DeviceError
from vq.errors import UsageError
from vq.guest_stack import MTU, GuestStack, finish_checksum, rejoin
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import (
    NET_DRIVER_FEATURES,
    ONE_PIECE,
    Layout,
    NetDriver,
    NetHeader,
    ReceivedFrame,
)
from vq.pcap import CapturedFrame, CaptureWriter, open_writer, read_frames

__all__ = ["Report", "add_arguments", "exchange", "run"]

DEVICE_MTU = 65535
_LONGEST_WITH_MTU = DEVICE_MTU + 14
_GUEST_RAM = 256 << 20
_CHUNK = 256
_SENTENCES = 10
# The guest is promiscuous, as whoever replays a capture: the frames are for others. If it cannot
# say so, it wants none of the features with which a device starts to filter.
_PROMISCUOUS = 1 << NetFeature.CTRL_RX
_FILTERS = 1 << NetFeature.CTRL_VLAN | 1 << NetFeature.CTRL_RX_EXTRA


class Report(NamedTuple):
    """What a run over the loopback came to."""

    frames: int
    """Frames of the capture that were sent."""
    bytes: int
    mismatched: int
    """Frames that did not come back, or not as they were, and faults that belong to no frame."""
    seconds: float
    """Time spent in the guest's queues and the device, without reading and comparing."""
    features: list[str]
    offloaded: int
    """Frames that left the guest with their checksum undone."""
    segmented: int
    """Frames that left the guest as GSO frames."""
    mismatches: list[str]
    """What was found, a sentence each: the first few mismatches, then what the device dropped."""


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--pcap", metavar="FILE", help="the capture to send (default: the one that comes with vq)"
    )
    parser.add_argument(
        "--count",
        metavar="N",
        type=options.positive,
        help="send N frames, going round the capture as often as that takes (default: all, once)",
    )
    parser.add_argument(
        "--queue-size",
        metavar="N",
        type=options.queue_size,
        default=256,
        help="descriptors per queue, a power of two up to 32768 (default: %(default)s)",
    )
    parser.add_argument(
        "--features",
        metavar="LIST",
        default="",
        help="change what is negotiated: a comma list of +NAME and -NAME, names as in the"
        " specification without their prefix, such as -CSUM,-MRG_RXBUF (default: everything)",
    )
    parser.add_argument("--write", metavar="FILE", help="keep what was received (.pcap or .pcapng)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    features = options.net_features(args.features, mtu=DEVICE_MTU)
    with ExitStack() as stack:
        if args.pcap is None:
            sample = resources.files("vq") / "data" / "sample.pcapng"
            path = stack.enter_context(resources.as_file(sample))
        else:
            path = Path(args.pcap)
        source = _Source(path)
        writer = None
        if args.write is not None:
            if os.path.exists(args.write) and os.path.samefile(args.write, path):
                raise UsageError(f"{args.write} is the capture that is being read")
            writer = stack.enter_context(open_writer(args.write))
        total = args.count if args.count and source.frames else source.frames
        progress = stack.enter_context(_Progress(total))
        report = exchange(
            source.take(total),
            largest_frame=source.largest,
            queue_size=args.queue_size,
            features=features,
            writer=writer,
            progress=progress.show,
        )
    if args.json:
        print(json.dumps(_as_json(report)))
    else:
        _print(report, path if args.pcap else None, args.queue_size)
    return 1 if report.mismatched else 0


class _Source:
    """A capture that can be read again and again, and whose measures are known beforehand.

    Reading it once before anything is sent finds what is wrong with it in time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A pipe can be read only once.
        kept = None if stat.S_ISREG(path.stat().st_mode) else list(read_frames(path))
        self._kept = kept
        self.frames = self.largest = 0
        for frame in self:
            self.frames += 1
            self.largest = max(self.largest, len(frame.data))

    def __iter__(self) -> Iterator[CapturedFrame]:
        return read_frames(self._path) if self._kept is None else iter(self._kept)

    def take(self, count: int) -> Iterator[CapturedFrame]:
        """So many frames, going round as often as that takes; none of a capture without any."""
        while count > 0:
            # Never more than were measured: something may be adding to the file.
            yield from islice(self, min(count, self.frames))
            count -= self.frames


class _Progress:
    """A bar on standard error, if that is a terminal and the run takes longer than a second."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._shown = 0.0
        self._started = time.monotonic()
        self._visible = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Draws the bar, a few times a second."""
        now = time.monotonic()
        if not self._visible or now - self._started < 1 or now - self._shown < 0.2:
            return
        self._shown = now
        share = done / max(self._total, 1)
        bar = "#" * int(30 * share)
        print(f"\r[{bar:30}] {share:4.0%} {done} frames", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away, also from before an error's sentence."""
        if self._shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def _as_json(report: Report) -> dict[str, object]:
    seconds = max(report.seconds, 1e-9)
    return {
        "frames": report.frames,
        "bytes": report.bytes,
        "mismatched": report.mismatched,
        "seconds": report.seconds,
        "frames_per_second": report.frames / seconds,
        "bits_per_second": 8 * report.bytes / seconds,
        "features": report.features,
        "offloaded": report.offloaded,
        "segmented": report.segmented,
        "mismatches": report.mismatches,
    }


def _print(report: Report, path: Path | None, queue_size: int) -> None:
    seconds = max(report.seconds, 1e-9)
    print(f"capture     {path or 'the one that comes with vq'}")
    print(f"queues      split, {queue_size} descriptors")
    names = textwrap.wrap(", ".join(report.features), 80)
    print("negotiated  " + "\n            ".join(names))
    print(
        f"sent        {report.frames} frames, {report.bytes} bytes:"
        f" {report.offloaded} with the checksum undone, {report.segmented} of them as GSO frames"
    )
    print(
        f"rate        {report.frames / seconds:,.0f} frames a second,"
        f" {8 * report.bytes / seconds / 1e9:.2f} Gbit/s there and back"
    )
    for sentence in report.mismatches:
        print(f"mismatch    {sentence}")
    if report.mismatched:
        print(f"result      {report.mismatched} of {report.frames} frames differ")
    elif report.frames:
        print("result      every frame came back as it is in the capture")
    else:
        print("result      the capture has no frames")


# --- the exchange --------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A frame on its way: what the capture has, and how it is sent."""

    number: int
    captured: CapturedFrame
    header: NetHeader
    data: bytes
    segments: int
    """Frames that it may come back as: more than one for a GSO frame."""


def exchange(
    frames: Iterable[CapturedFrame],
    *,
    largest_frame: int,
    queue_size: int = 256,
    features: int = -1,
    writer: CaptureWriter | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Sends `frames` through a scripted guest's device and back, and compares.

    `largest_frame` is the longest of them in bytes. `features` limits what is negotiated; `writer`
    keeps what was received, in order; `progress` is told now and then how many frames were sent.
    What is wrong with the device is in the report. Raises `OSError` when `writer` cannot write.
    """
    with GuestMemory.allocate(_GUEST_RAM) as memory:
        device = NetDevice(
            LoopbackLink(),
            mtu=DEVICE_MTU if largest_frame <= _LONGEST_WITH_MTU else None,
            queue_size=queue_size,
            features=features,
            memory=memory,
        )
        driver = NetDriver(
            device,
            memory,
            NET_DRIVER_FEATURES & (-1 if device.device_features & _PROMISCUOUS else ~_FILTERS),
            queue_size=queue_size,
            largest_frame=largest_frame,
        )
        try:
            if driver.features & _PROMISCUOUS:
                driver.set_receive_mode(CtrlRx.PROMISC, True)
            run = _Exchange(driver, _layouts(driver, queue_size), writer, progress)
            run.send_all(frames)
            return run.report(_drops(device))
        finally:
            driver.close()
            device.close()


def _layouts(driver: NetDriver, queue_size: int) -> list[Layout]:
    """How bursts lie over descriptors, in turn: most frames in one, as drivers send small ones.

    Frames in several pieces take a table where the guest may use one (virtio 1.3, 2.7.5.3).
    """
    if queue_size == 1:
        return [ONE_PIECE]
    indirect = driver.has_feature(Feature.INDIRECT_DESC)
    pieces = Layout(NET_HDR_SIZE, pieces=min(3, queue_size - 1), indirect=indirect)
    return [ONE_PIECE, pieces, ONE_PIECE, ONE_PIECE]


def _drops(device: NetDevice) -> list[str]:
    """What the device and its link gave up, as sentences."""
    counts = {name: count for name, count in device.stats.items() if "dropped" in name}
    for port in device.link.ports:
        counts.update((f"link_dropped: {reason}", count) for reason, count in port.dropped.items())
    return [f"the device counted {count} of {name}" for name, count in counts.items()]


class _Exchange:
    """One run: frames go out in bursts, and each that comes back is held against its original."""

    def __init__(
        self,
        driver: NetDriver,
        layouts: Sequence[Layout],
        writer: CaptureWriter | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._driver = driver
        self._layouts = cycle(layouts)
        self._writer = writer
        self._progress = progress
        self._stack = GuestStack(driver.features)
        self._outgoing: deque[_Job] = deque()
        self._awaited: deque[_Job] = deque()
        self._segments: list[bytes] = []  # of the oldest frame awaited
        self._frames = self._bytes = self._offloaded = self._segmented = 0
        self._mismatched = 0
        self._mismatches: list[str] = []
        self._seconds = 0.0

    def send_all(self, frames: Iterable[CapturedFrame]) -> None:
        """Sends every frame and waits for all of them, or until the device does no more."""
        source = iter(frames)
        try:
            while self._turn(source):
                if self._progress is not None:
                    self._progress(self._frames)
        except DeviceError as error:
            self._found(f"the device broke a rule: {error}")
        for job in (*self._awaited, *self._outgoing):
            self._mismatch(job, "did not come back")

    def report(self, drops: Sequence[str]) -> Report:
        """What came of it; `drops` are sentences for the case of mismatches."""
        return Report(
            frames=self._frames,
            bytes=self._bytes,
            mismatched=self._mismatched,
            seconds=self._seconds,
            features=feature_names(self._driver.features, NetFeature),
            offloaded=self._offloaded,
            segmented=self._segmented,
            mismatches=[*self._mismatches, *drops] if self._mismatched else [],
        )

    def _turn(self, source: Iterator[CapturedFrame]) -> bool:
        """Sends a burst and takes what has come back; False when nothing moves any more."""
        outgoing = self._outgoing
        for captured in islice(source, _CHUNK - len(outgoing)):
            outgoing.append(self._prepare(captured))
        burst = [(job.header, job.data) for job in outgoing]
        started = time.perf_counter()
        sent = self._driver.send_burst(burst, layout=next(self._layouts))
        received = self._driver.receive()
        self._seconds += time.perf_counter() - started
        self._awaited.extend(outgoing.popleft() for _ in range(sent))
        for frame in received:
            self._arrived(frame)
        return bool(sent or received)

    def _prepare(self, captured: CapturedFrame) -> _Job:
        self._frames += 1
        self._bytes += len(captured.data)
        header, data, segments = self._stack.leave_undone(captured.data)
        self._offloaded += bool(header.flags)
        self._segmented += bool(header.gso_type)
        return _Job(self._frames, captured, header, data, segments)

    def _arrived(self, frame: ReceivedFrame) -> None:
        """Holds a received frame against the oldest one that has not come back."""
        data = finish_checksum(frame.header, frame.data)
        self._pass_over_lost(data)
        if not self._awaited:
            self._found(f"a frame of {len(data)} bytes came that was not sent")
            self._keep(data)
            return
        job = self._awaited[0]
        if job.segments > 1 and not frame.header.gso_type:
            self._keep(data, job.captured.timestamp_ns)
            self._segments.append(data)
            if len(self._segments) < job.segments:
                return
            if rejoin(self._segments, MTU) != job.captured.data:
                self._mismatch(job, "came back in segments that are not its stream")
        else:
            self._keep(data, job.captured.timestamp_ns, job.captured.length)
            if data != job.captured.data:
                self._mismatch(job, f"came back as {len(data)} bytes that differ")
            elif _gso(frame.header) != _gso(job.header):
                self._mismatch(job, "came back with other segments to be made of it")
        self._awaited.popleft()
        self._segments.clear()

    def _pass_over_lost(self, data: bytes) -> None:
        """Gives up frames whose successor has come: the link keeps their order."""
        if self._is_segment_due(data):
            return
        places = (p for p, job in enumerate(self._awaited) if job.captured.data == data)
        for _ in range(next(places, 0)):
            self._mismatch(self._awaited.popleft(), "did not come back")
            self._segments.clear()

    def _is_segment_due(self, data: bytes) -> bool:
        """Whether, by its length, this is the next segment of the oldest frame awaited."""
        if not self._awaited or self._awaited[0].segments == 1:
            return False
        job = self._awaited[0]
        _, _, header_length, size, *_ = job.header
        left = len(job.data) - header_length - size * len(self._segments)
        return len(data) == header_length + min(size, left)

    def _keep(self, data: bytes, timestamp_ns: int = 0, length: int | None = None) -> None:
        if self._writer is not None:
            self._writer.write(data, timestamp_ns=timestamp_ns, length=length)

    def _mismatch(self, job: _Job, what: str) -> None:
        self._found(f"frame {job.number} of {len(job.captured.data)} bytes {what}")

    def _found(self, sentence: str) -> None:
        self._mismatched += 1
        if len(self._mismatches) < _SENTENCES:
            self._mismatches.append(sentence)


def _gso(header: NetHeader) -> tuple[int, int]:
    return header.gso_type, header.gso_size
