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
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, Self

from vq import options
from vq.abi import (
    NET_HDR_GSO_ECN,
    NET_HDR_SIZE,
    CtrlRx,
    Feature,
    HdrFlag,
    HdrGso,
    NetFeature,
    feature_names,
)
from vq.driver import DeviceError
from vq.errors import UsageError
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
from vq.packet import IPPROTO_AH, IPPROTO_FRAGMENT, Packet, parse
from vq.pcap import CapturedFrame, CaptureWriter, open_writer, read_frames

__all__ = ["Report", "add_arguments", "exchange", "rejoin", "run"]

MTU = 1500
"""IP packets longer than this leave the guest as GSO frames."""
DEVICE_MTU = 65535
_LONGEST_WITH_MTU = DEVICE_MTU + 14
_GUEST_RAM = 256 << 20
_CHUNK = 256
_SENTENCES = 10
_MAX_IP = 0xFFFF
_MAX_HEADERS = 256
"""Longer than the IP and TCP headers of any GSO frame that a stack makes."""
# The guest is promiscuous, as whoever replays a capture: the frames are for others. If it cannot
# say so, it wants none of the features with which a device starts to filter.
_PROMISCUOUS = 1 << NetFeature.CTRL_RX
_FILTERS = 1 << NetFeature.CTRL_VLAN | 1 << NetFeature.CTRL_RX_EXTRA
_TCP, _UDP = 6, 17
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_URG, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80


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
        self._stack = _Stack(driver.features)
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


# --- the guest's stack ---------------------------------------------------------------------------


class _Stack:
    """What a guest's network stack does before a frame reaches its driver.

    `features` are the ones negotiated: they say what may be left undone.
    """

    def __init__(self, features: int) -> None:
        def has(feature: NetFeature) -> bool:
            return bool(features >> feature & 1)

        self._csum = has(NetFeature.CSUM)
        self._ecn = has(NetFeature.HOST_ECN)
        self._gso = {
            (4, _TCP): HdrGso.TCPV4 if has(NetFeature.HOST_TSO4) else None,
            (6, _TCP): HdrGso.TCPV6 if has(NetFeature.HOST_TSO6) else None,
            (4, _UDP): HdrGso.UDP_L4 if has(NetFeature.HOST_USO) else None,
            (6, _UDP): HdrGso.UDP_L4 if has(NetFeature.HOST_USO) else None,
        }

    def leave_undone(self, data: bytes) -> tuple[NetHeader, bytes, int]:
        """The frame as the guest sends it: net header, bytes, and how many segments it makes.

        Work is left undone only where doing it gives the captured bytes again: not in fragments,
        nor where the captured checksum is wrong, absent, or another way to write the same sum.
        """
        plain = NetHeader(), data, 1
        if not self._csum:
            return plain
        packet = parse((data,))
        start, offset = packet.l4_offset, packet.l4_checksum_offset
        if packet.l4_protocol not in (_TCP, _UDP) or start is None or offset is None:
            return plain
        if packet.is_fragment:
            return plain
        header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=start, csum_offset=offset)
        partial = _with_partial_checksum(packet, data, start, offset)
        if finish_checksum(header, partial) != data:
            return plain
        gso_type = self._gso_type(packet, data, start)
        if not gso_type:
            return header, partial, 1
        length = packet.header_length
        gso_size = MTU - (length - packet.l2_length)
        segments = -(-(len(data) - length) // gso_size)
        return (
            header._replace(gso_type=gso_type, gso_size=gso_size, hdr_len=length),
            partial,
            segments,
        )

    def _gso_type(self, packet: Packet, data: bytes, start: int) -> int:
        """What kind of GSO frame it is to leave as; 0 for none."""
        gso_type = self._gso.get((packet.ip_version, packet.l4_protocol or 0))
        if gso_type is None or packet.length - packet.l2_length <= MTU:
            return 0
        # Neither a stack's GSO frames: segments of these would not be their like.
        if packet.header_length - packet.l2_length > _MAX_HEADERS or any(
            header in packet.extensions for header in (IPPROTO_AH, IPPROTO_FRAGMENT)
        ):
            return 0
        flags = data[start + 13] if packet.l4_protocol == _TCP else 0
        if flags & (_TCP_SYN | _TCP_RST | _TCP_URG) or (flags & _TCP_CWR and not self._ecn):
            return 0
        # Lengths or an IPv4 checksum that a stack would not have written are not written again.
        if rejoin((data,), _MAX_IP) != data:
            return 0
        return gso_type | (NET_HDR_GSO_ECN if flags & _TCP_CWR else 0)


def _with_partial_checksum(packet: Packet, data: bytes, start: int, offset: int) -> bytes:
    """`data` with only the pseudo-header's sum where its checksum is (virtio 1.3, 5.1.6.2)."""
    return _with_u16(data, start + offset, _pseudo_sum(packet, packet.l3_end - start))


def finish_checksum(header: NetHeader, data: bytes) -> bytes:
    """A received frame with its checksum finished, as a guest's stack does it or leaves it out."""
    if not header.flags & HdrFlag.NEEDS_CSUM:
        return data
    field = header.csum_start + header.csum_offset
    value = _checksum(data[header.csum_start :])
    if not value and header.csum_offset == 6:
        value = 0xFFFF  # UDP has no other way to say zero (RFC 768)
    return _with_u16(data, field, value)


def rejoin(segments: Sequence[bytes], mtu: int) -> bytes | None:
    """The frame of which these are the segments; None if they are not one frame's segments.

    What a kernel's receive offload does, and as strict: all but the last are of one size, headers
    agree but for what changes from one segment to the next, lengths and checksums are right, and no
    IP packet is longer than `mtu` bytes. FIN and PSH are for the last segment, CWR for the first.
    """
    packets = [parse((segment,)) for segment in segments]
    if not packets or packets[0].l4_protocol not in (_TCP, _UDP):
        return None
    first, last = packets[0], packets[-1]
    if any(packet.l4_offset is None or packet.is_fragment for packet in packets):
        return None
    size = first.length - first.header_length
    payload = bytearray()
    for index, (packet, segment) in enumerate(zip(packets, segments, strict=True)):
        if _constant_part(packet, index, len(payload)) != _constant_part(first, 0, 0):
            return None
        if packet.l3_length > mtu or not _is_sound(packet, segment):
            return None
        carried = segment[packet.header_length :]
        if len(carried) > size or (packet is not last and len(carried) < size):
            return None
        if not carried and index:
            return None
        if packet.l4_protocol == _TCP:
            never = 0 if packet is first else _TCP_CWR
            never |= 0 if packet is last else _TCP_FIN | _TCP_PSH
            if packet.header[(packet.l4_offset or 0) + 13] & never:
                return None
        payload += carried
    if first.header_length - first.l2_length + len(payload) > _MAX_IP:
        return None
    return _whole(first, last, bytes(payload))


def _constant_part(packet: Packet, index: int, position: int) -> bytes:
    """The headers with what changes from segment to segment set back or blotted out.

    The segment is number `index` and starts `position` bytes into the stream. Lengths, checksums
    and three of TCP's flags are blotted out.
    """
    header = bytearray(packet.header)
    l3, l4 = packet.l3_offset or 0, packet.l4_offset or 0
    if packet.ip_version == 4:
        identification = int.from_bytes(header[l3 + 4 : l3 + 6], "big")
        header[l3 + 4 : l3 + 6] = (identification - index & 0xFFFF).to_bytes(2, "big")
        header[l3 + 2 : l3 + 4] = header[l3 + 10 : l3 + 12] = bytes(2)
    else:
        header[l3 + 4 : l3 + 6] = bytes(2)
    if packet.l4_protocol == _TCP:
        sequence = int.from_bytes(header[l4 + 4 : l4 + 8], "big")
        header[l4 + 4 : l4 + 8] = (sequence - position & 0xFFFFFFFF).to_bytes(4, "big")
        header[l4 + 13] &= ~(_TCP_FIN | _TCP_PSH | _TCP_CWR) & 0xFF
        header[l4 + 16 : l4 + 18] = bytes(2)
    else:
        header[l4 + 4 : l4 + 8] = bytes(4)
    return bytes(header)


def _is_sound(packet: Packet, data: bytes) -> bool:
    """Whether all lengths in the headers are the frame's, and all checksums right."""
    l3, l4 = packet.l3_offset or 0, packet.l4_offset or 0
    if packet.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        sound = _u16(data, l3 + 2) == len(data) - l3 and not _checksum(data[l3:end])
    else:
        sound = _u16(data, l3 + 4) == len(data) - l3 - 40
    if packet.l4_protocol == _UDP:
        sound = sound and _u16(data, l4 + 4) == len(data) - l4 and _u16(data, l4 + 6) != 0
    return sound and not _checksum(data[l4:], _pseudo_sum(packet, len(data) - l4))


def _whole(first: Packet, last: Packet, payload: bytes) -> bytes:
    """One frame of the first segment's headers and all payload, lengths and checksums anew."""
    data = bytearray(first.header + payload)
    l3, l4 = first.l3_offset or 0, first.l4_offset or 0
    if first.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        data[l3 + 2 : l3 + 4] = (len(data) - l3).to_bytes(2, "big")
        data[l3 + 10 : l3 + 12] = bytes(2)
        data[l3 + 10 : l3 + 12] = _checksum(data[l3:end]).to_bytes(2, "big")
    else:
        data[l3 + 4 : l3 + 6] = (len(data) - l3 - 40).to_bytes(2, "big")
    if first.l4_protocol == _TCP:
        data[l4 + 13] |= last.header[l4 + 13]
    else:
        data[l4 + 4 : l4 + 6] = (len(data) - l4).to_bytes(2, "big")
    whole = parse((data,))
    offset = first.l4_checksum_offset or 0
    partial = _with_partial_checksum(whole, bytes(data), l4, offset)
    header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=l4, csum_offset=offset)
    return finish_checksum(header, partial)


# The guest sums in its own way, word by word, so that it judges how the device does it.


def _pseudo_sum(packet: Packet, length: int) -> int:
    """The sum of the pseudo-header for `length` bytes of transport header and payload."""
    l3, header = packet.l3_offset or 0, packet.header
    if packet.ip_version == 4:
        addresses = header[l3 + 12 : l3 + 20]
    else:
        final = packet.final_destination or l3 + 24  # RFC 8200, 8.1
        addresses = header[l3 + 8 : l3 + 24] + header[final : final + 16]
    return _checksum(addresses, length + (packet.l4_protocol or 0)) ^ 0xFFFF


def _checksum(data: bytes | bytearray, initial: int = 0) -> int:
    """The Internet checksum (RFC 1071); `initial` is a sum to go on from."""
    words = array("H", data + b"\0" if len(data) % 2 else data)
    if sys.byteorder == "little":
        words.byteswap()
    total = initial + sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _u16(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 2], "big")


def _with_u16(data: bytes, position: int, value: int) -> bytes:
    return b"".join((data[:position], value.to_bytes(2, "big"), data[position + 2 :]))
