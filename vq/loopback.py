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
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from vq import options
from vq.abi import (
    NET_HDR_GSO_ECN,
    CtrlRx,
    HdrFlag,
    HdrGso,
    NetFeature,
    feature_names,
)
from vq.driver import DeviceError
from vq.errors import UsageError
from vq.link import MAX_FRAME, LoopbackLink
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NetDriver, NetHeader, ReceivedFrame
from vq.packet import Packet, checksum, parse, pseudo_header_sum
from vq.pcap import CapturedFrame, CaptureWriter, open_writer, read_frames

__all__ = ["Report", "add_arguments", "exchange", "rejoin", "run"]

MTU = 1500
"""IP packets longer than this leave the guest as GSO frames."""
DEVICE_MTU = 65535
_LONGEST_WITH_MTU = DEVICE_MTU + 14
_GUEST_RAM = 256 << 20
_CHUNK = 256
_TCP, _UDP = 6, 17
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_URG, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80


class Report(NamedTuple):
    """What a run over the loopback came to."""

    frames: int
    """Frames of the capture that were sent."""
    bytes: int
    mismatched: int
    """Frames that did not come back, or not as they were."""
    seconds: float
    """Time spent in the guest's queues and the device, without reading and comparing."""
    features: list[str]
    offloaded: int
    """Frames that left the guest with their checksum undone."""
    segmented: int
    """Frames that left the guest as GSO frames."""
    mismatches: list[str]
    """The first few mismatches, a sentence each."""


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
    size = args.queue_size
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
        total = source.frames if args.count is None or not source.frames else args.count
        report = exchange(
            islice(cycle(source) if total > source.frames else source, total),
            largest_frame=source.largest,
            queue_size=size,
            features=features,
            writer=writer,
            progress=_Progress(total),
        )
    if args.json:
        print(json.dumps(_as_json(report)))
    else:
        _print(report, path if args.pcap else None, size)
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
        if self.largest > MAX_FRAME:
            raise UsageError(f"{path} has a frame of {self.largest} bytes; {MAX_FRAME} is the most")

    def __iter__(self) -> Iterator[CapturedFrame]:
        return read_frames(self._path) if self._kept is None else iter(self._kept)


class _Progress:
    """A bar on standard error, if that is a terminal and the run takes longer than a second."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._shown = 0.0
        self._started = time.monotonic()
        self._visible = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Draws the bar, a few times a second."""
        now = time.monotonic()
        if not self._visible or now - self._started < 1 or now - self._shown < 0.2:
            return
        self._shown = now
        share = done / max(self._total, 1)
        bar = "#" * int(30 * share)
        print(f"\r[{bar:30}] {share:4.0%} {done} frames", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Takes the bar away."""
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
    names = ", ".join(report.features)
    lines = [""]
    for word in names.split(" "):
        if len(lines[-1]) + len(word) > 80:
            lines.append("")
        lines[-1] += word + " "
    print("negotiated  " + "\n            ".join(line.rstrip() for line in lines))
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
    else:
        print("result      every frame came back as it is in the capture")


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
    progress: _Progress | None = None,
) -> Report:
    """Sends `frames` through a scripted guest's device and back, and compares.

    `features` limits what is negotiated; `writer` keeps what was received, in order. Raises
    `OSError` when it cannot be written.
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
            device, memory, queue_size=queue_size, largest_frame=largest_frame, polling=True
        )
        if driver.has_feature(NetFeature.CTRL_RX):
            # As whoever replays a capture: the frames are for others.
            driver.set_receive_mode(CtrlRx.PROMISC, True)
        try:
            return _Exchange(driver, writer, progress).run(frames)
        finally:
            driver.close()
            device.close()


class _Exchange:
    def __init__(
        self, driver: NetDriver, writer: CaptureWriter | None, progress: _Progress | None
    ) -> None:
        self._driver = driver
        self._writer = writer
        self._progress = progress
        self._stack = _Stack(driver.features)
        self._awaited: deque[_Job] = deque()
        self._segments: list[bytes] = []
        self._frames = self._bytes = self._offloaded = self._segmented = 0
        self._mismatched = 0
        self._mismatches: list[str] = []
        self._seconds = 0.0

    def run(self, frames: Iterable[CapturedFrame]) -> Report:
        source = iter(frames)
        outgoing: deque[_Job] = deque()
        while True:
            while len(outgoing) < _CHUNK and (captured := next(source, None)) is not None:
                outgoing.append(self._prepare(captured))
            if not outgoing and not self._awaited:
                break
            started = time.perf_counter()
            sent = self._send(outgoing)
            received = self._receive()
            self._seconds += time.perf_counter() - started
            for frame in received:
                self._arrived(frame)
            if not sent and not received:
                break  # the device has stopped; what is missing counts as a mismatch
            if self._progress is not None:
                self._progress.show(self._frames)
        for job in (*self._awaited, *outgoing):
            self._mismatch(job, "did not come back")
        if self._progress is not None:
            self._progress.finish()
        return Report(
            frames=self._frames,
            bytes=self._bytes,
            mismatched=self._mismatched,
            seconds=self._seconds,
            features=feature_names(self._driver.features, NetFeature),
            offloaded=self._offloaded,
            segmented=self._segmented,
            mismatches=self._mismatches,
        )

    def _prepare(self, captured: CapturedFrame) -> _Job:
        self._frames += 1
        self._bytes += len(captured.data)
        header, data, segments = self._stack.leave_undone(captured.data)
        self._offloaded += bool(header.flags)
        self._segmented += bool(header.gso_type)
        return _Job(self._frames, captured, header, data, segments)

    def _send(self, outgoing: deque[_Job]) -> int:
        try:
            sent = self._driver.send_burst([(job.header, job.data) for job in outgoing])
        except DeviceError as error:
            raise _stopped(error) from error
        for _ in range(sent):
            self._awaited.append(outgoing.popleft())
        return sent

    def _receive(self) -> list[ReceivedFrame]:
        try:
            return self._driver.receive()
        except DeviceError as error:
            raise _stopped(error) from error

    def _arrived(self, frame: ReceivedFrame) -> None:
        if not self._awaited:
            self._mismatched += 1
            self._note("a frame came that was not sent")
            return
        job = self._awaited[0]
        data = finish_checksum(frame.header, frame.data)
        self._keep(job, data)
        if job.segments > 1 and not frame.header.gso_type:
            self._segments.append(data)
            if len(self._segments) < job.segments:
                return
            segments, self._segments = self._segments, []
            self._awaited.popleft()
            rejoined = rejoin(segments, MTU)
            if rejoined != job.captured.data:
                self._mismatch(job, "came back in segments that are not its stream")
            return
        self._awaited.popleft()
        if data != job.captured.data:
            self._mismatch(job, f"came back as {len(data)} bytes that differ")

    def _keep(self, job: _Job, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data, timestamp_ns=job.captured.timestamp_ns)

    def _mismatch(self, job: _Job, what: str) -> None:
        self._mismatched += 1
        self._note(f"frame {job.number} of {len(job.captured.data)} bytes {what}")

    def _note(self, sentence: str) -> None:
        if len(self._mismatches) < 10:
            self._mismatches.append(sentence)


def _stopped(error: DeviceError) -> UsageError:
    return UsageError(f"the exchange stopped: {error}")


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
        gso_size = self._gso_size(packet, data)
        if not gso_size:
            return header, partial, 1
        gso_type = int(self._gso[packet.ip_version, packet.l4_protocol or 0] or 0)
        if packet.l4_protocol == _TCP and data[start + 13] & _TCP_CWR:
            gso_type |= NET_HDR_GSO_ECN
        payload = len(data) - packet.header_length
        return (
            header._replace(gso_type=gso_type, gso_size=gso_size, hdr_len=packet.header_length),
            partial,
            -(-payload // gso_size),
        )

    def _gso_size(self, packet: Packet, data: bytes) -> int:
        """Bytes of payload per segment for a frame that is to leave as a GSO frame, else 0."""
        start = packet.l4_offset
        if start is None or packet.l3_offset is None or packet.reason is not None:
            return 0
        if len(data) - packet.l3_offset <= MTU or packet.l3_end != len(data):
            return 0
        if self._gso.get((packet.ip_version, packet.l4_protocol or 0)) is None:
            return 0
        if packet.l4_protocol == _TCP:
            flags = data[start + 13]
            # A stack makes no GSO frame of these: their meaning does not spread over segments.
            if flags & (_TCP_SYN | _TCP_RST | _TCP_URG) or (flags & _TCP_CWR and not self._ecn):
                return 0
        return max(MTU - (packet.header_length - packet.l3_offset), 0)


def _with_partial_checksum(packet: Packet, data: bytes, start: int, offset: int) -> bytes:
    """`data` with only the pseudo-header's sum where its checksum is (virtio 1.3, 5.1.6.2)."""
    partial = pseudo_header_sum(packet, packet.l3_end - start, packet.l4_protocol or 0)
    return _with_u16(data, start + offset, partial)


def finish_checksum(header: NetHeader, data: bytes) -> bytes:
    """A received frame with its checksum finished, as a guest's stack does it or leaves it out."""
    if not header.flags & HdrFlag.NEEDS_CSUM:
        return data
    field = header.csum_start + header.csum_offset
    value = checksum((data,), header.csum_start)
    if not value and header.csum_offset == 6:
        value = 0xFFFF  # UDP has no other way to say zero (RFC 768)
    return _with_u16(data, field, value)


def rejoin(segments: Sequence[bytes], mtu: int) -> bytes | None:
    """The frame of which these are the segments; None if they are not one frame's segments.

    What a kernel's receive offload does, and as strict: headers must agree but for what changes
    from one segment to the next, checksums must be right, no IP packet longer than `mtu` bytes.
    """
    first = parse(segments[0:1])
    if first.l3_offset is None or first.l4_offset is None:
        return None
    is_tcp = first.l4_protocol == _TCP
    payload = bytearray()
    flags = 0
    for index, segment in enumerate(segments):
        packet = parse((segment,))
        if not _continues(first, packet, segment, index, len(payload)):
            return None
        if packet.l3_length > mtu or not _checksums_hold(packet, segment):
            return None
        if is_tcp:
            flags |= segment[first.l4_offset + 13]
        payload += segment[packet.header_length :]
    return _whole(first, bytes(payload), flags)


def _continues(first: Packet, packet: Packet, segment: bytes, index: int, position: int) -> bool:
    """Whether the headers of segment `index`, `position` bytes into the stream, go on from `first`.

    Lengths and checksums are looked at elsewhere; of TCP's flags, PSH, FIN and CWR may differ.
    """
    if packet.header_length != first.header_length or len(segment) != packet.l3_end:
        return False
    return _constant_part(packet, index, position) == _constant_part(first, 0, 0)


def _constant_part(packet: Packet, index: int, position: int) -> bytes:
    """The headers with what changes from segment to segment set back or blotted out."""
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


def _checksums_hold(packet: Packet, data: bytes) -> bool:
    l3, l4 = packet.l3_offset or 0, packet.l4_offset or 0
    if packet.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        if checksum((data[l3:end],)):
            return False
    pseudo = pseudo_header_sum(packet, packet.l3_end - l4, packet.l4_protocol or 0)
    return not checksum((data[l4 : packet.l3_end],), initial=pseudo)


def _whole(first: Packet, payload: bytes, flags: int) -> bytes:
    """One frame of the first segment's headers and all payload, lengths and checksums anew."""
    data = bytearray(first.header + payload)
    l3, l4 = first.l3_offset or 0, first.l4_offset or 0
    if first.ip_version == 4:
        end = l3 + 4 * (data[l3] & 0xF)
        data[l3 + 2 : l3 + 4] = (len(data) - l3).to_bytes(2, "big")
        data[l3 + 10 : l3 + 12] = bytes(2)
        data[l3 + 10 : l3 + 12] = checksum((data[l3:end],)).to_bytes(2, "big")
    else:
        data[l3 + 4 : l3 + 6] = (len(data) - l3 - 40).to_bytes(2, "big")
    if first.l4_protocol == _TCP:
        data[l4 + 13] = flags
    else:
        data[l4 + 4 : l4 + 6] = (len(data) - l4).to_bytes(2, "big")
    whole = parse((data,))
    offset = first.l4_checksum_offset or 0
    partial = _with_partial_checksum(whole, bytes(data), l4, offset)
    header = NetHeader(HdrFlag.NEEDS_CSUM, csum_start=l4, csum_offset=offset)
    return finish_checksum(header, partial)


def _with_u16(data: bytes, position: int, value: int) -> bytes:
    return b"".join((data[:position], value.to_bytes(2, "big"), data[position + 2 :]))
