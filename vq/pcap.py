"""Capture files: Ethernet frames out of pcap and pcapng, and into them.

Reading goes frame by frame in bounded memory, whatever the file claims: a length is checked before
anything of that length is read. Both byte orders, micro- and nanoseconds and every pcapng section
are read; what is not a frame is skipped. A file that cannot be read is a `CaptureError` of one
sentence; what the host's kernel refuses stays `OSError`.

The formats are described in draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng. What is inside the
frames is left to `vq.packet`.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Self, TypeAlias

from vq.errors import CaptureError, UsageError
from vq.files import create

__all__ = [
    "MAX_FRAME_BYTES",
    "CaptureWriter",
    "CapturedFrame",
    "PcapWriter",
    "PcapngWriter",
    "open_writer",
    "read_frames",
]

MAX_FRAME_BYTES = 262144
"""The largest record that is read or written; libpcap's MAXIMUM_SNAPLEN."""

Pieces: TypeAlias = bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview]
"""A frame as one buffer or as several in a row."""


@dataclass(slots=True)
class CapturedFrame:
    """One frame of a capture."""

    data: bytes
    """The bytes that the capture holds."""
    timestamp_ns: int
    """Nanoseconds since 1970, UTC; 0 where the file does not say."""
    length: int
    """The frame's length on the wire; more than `data` holds when the capture cut the frame."""
    interface: str = ""
    """The name of the interface that it was seen on; empty where the file does not say."""
    inbound: bool | None = None
    """Whether that interface received it (True) or sent it (False); None for unknown."""


def read_frames(path: str | os.PathLike[str]) -> Iterator[CapturedFrame]:
    """The frames of a pcap or pcapng file, in the file's order.

    The file is opened when the first frame is asked for. Frames before the place where a file is
    damaged are given; then comes the error.

    Raises `CaptureError` for a file that is not a capture, is damaged, is cut short or holds frames
    of another link type than Ethernet, and `OSError` where the file cannot be opened or read.
    """
    with open(path, "rb", buffering=1 << 16) as file:
        source = _Source(file, os.fspath(path))
        magic = source.read(4)
        if not magic:
            raise source.error("the file is empty")
        if magic == _SECTION_MAGIC:
            yield from _read_pcapng(source)
        elif magic in _PCAP_VARIANTS:
            yield from _read_pcap(source, _PCAP_VARIANTS[magic])
        else:
            for start, program in _COMPRESSED.items():
                if magic.startswith(start):
                    raise source.error(f"the file is compressed with {program}; unpack it first")
            raise source.error(f"not a pcap or pcapng capture (it starts with 0x{magic.hex()})")


def open_writer(path: str | os.PathLike[str], *, buffer_size: int = 1 << 16) -> CaptureWriter:
    """A new capture file: pcapng when the name ends in ``.pcapng``, else nanosecond pcap.

    Raises `OSError` where the file cannot be made.
    """
    if os.fspath(path).lower().endswith(".pcapng"):
        return PcapngWriter(path, buffer_size=buffer_size)
    return PcapWriter(path, buffer_size=buffer_size)


class CaptureWriter(ABC):
    """What both formats' writers share.

    `target` is a path, or an object open for writing bytes, which stays open at `close`. Whole
    records are gathered and written once there are `buffer_size` bytes of them; 0 writes each frame
    at once. When a write fails (a full disk), the `OSError` goes to the caller, the records
    gathered so far are given up and the file is cut back to the end of the last one written before,
    where it allows that: what is there remains a good capture, and writing may go on.
    """

    def __init__(self, target: str | os.PathLike[str] | BinaryIO, buffer_size: int) -> None:
        self._path: str | None = None
        self._file: BinaryIO
        if isinstance(target, (str, os.PathLike)):
            self._path = os.fspath(target)
            self._file = create(target)
        else:
            self._file = target
        self._buffer_size = buffer_size
        self._pending = bytearray()
        self._whole = 0  # bytes of it that are whole records: an interrupt may come at any place
        self._closed = False
        self._end = self._file.tell() if self._file.seekable() else None

    @abstractmethod
    def write(
        self,
        data: Pieces,
        *,
        timestamp_ns: int | None = None,
        length: int | None = None,
        interface: int = 0,
        inbound: bool | None = None,
    ) -> None:
        """Adds one frame; its buffers are copied once and may change afterwards.

        `timestamp_ns` is now if not given; `length` is the frame's length on the wire where `data`
        is only its start. `interface` and `inbound` say where the frame was seen, for the format
        that keeps it.

        Raises `UsageError` for a frame of more than 262144 bytes, a time that the format cannot
        hold or an interface that is not there; `OSError` when the file cannot be written.
        """

    def flush(self) -> None:
        """Writes everything gathered so far. Raises `OSError`, see the class."""
        view = memoryview(self._pending)[: self._whole]
        self._whole = 0
        self._pending = bytearray()
        written = 0
        try:
            while written < len(view):
                count = self._file.write(view[written:])
                if count is None:  # io.RawIOBase: a descriptor that does not block is full
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                written += count
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = self._path
            if self._end is not None:
                with suppress(OSError):
                    self._file.seek(self._end)
                    self._file.truncate()
            raise
        if self._end is not None:
            self._end += written

    def close(self) -> None:
        """Writes what is left and closes the file if this writer opened it. Twice is allowed."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            if self._path is not None:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_at_once(self, record: bytes) -> None:
        """Headers are never given up with the frames gathered after them: they go out alone."""
        self.flush()
        self._pending += record
        self._whole = len(self._pending)
        self.flush()

    def _gather(self, head_size: int, data: Pieces) -> tuple[int, int]:
        """Appends room for a head and the frame; returns where the head is and the frame's size."""
        if self._closed:
            raise UsageError("the capture is closed")
        pending, at = self._pending, self._whole
        del pending[at:]
        try:
            pending += bytes(head_size)
            if isinstance(data, (bytes, bytearray, memoryview)):
                pending += data
            else:
                for piece in data:
                    pending += piece
            size = len(pending) - at - head_size
            if size > MAX_FRAME_BYTES:
                raise UsageError(f"a frame of {size} bytes: no more than {MAX_FRAME_BYTES} fit")
        except BaseException:
            del pending[at:]
            raise
        return at, size

    def _drop(self, at: int, reason: str) -> UsageError:
        del self._pending[at:]
        return UsageError(reason)

    def _record_done(self) -> None:
        self._whole = len(self._pending)
        if self._whole >= self._buffer_size:
            self.flush()


class PcapWriter(CaptureWriter):
    """Writes a pcap file, little-endian, with times in nanoseconds or else in microseconds.

    The format keeps no interfaces and no directions.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        nanoseconds: bool = True,
        buffer_size: int = 1 << 16,
    ) -> None:
        super().__init__(target, buffer_size)
        self._unit = 1 if nanoseconds else 1000
        magic = _MAGIC_NANO if nanoseconds else _MAGIC_MICRO
        try:
            self._write_at_once(
                struct.pack("<IHHiIII", magic, 2, 4, 0, 0, MAX_FRAME_BYTES, _ETHERNET)
            )
        except BaseException:
            self.close()
            raise

    def write(
        self,
        data: Pieces,
        *,
        timestamp_ns: int | None = None,
        length: int | None = None,
        interface: int = 0,
        inbound: bool | None = None,
    ) -> None:
        """Adds one frame, see `CaptureWriter.write`."""
        if timestamp_ns is None:
            timestamp_ns = time.time_ns()
        at, size = self._gather(16, data)
        seconds, fraction = divmod(timestamp_ns, 1_000_000_000)
        try:
            struct.pack_into(
                "<IIII",
                self._pending,
                at,
                seconds,
                fraction // self._unit,
                size,
                size if length is None else length,
            )
        except struct.error:
            raise self._drop(at, "a time or a length that pcap cannot hold") from None
        self._record_done()


class PcapngWriter(CaptureWriter):
    """Writes a pcapng file: one little-endian section, times in nanoseconds.

    `interfaces` names the interfaces that frames are seen on; `add_interface` adds more later.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        interfaces: Sequence[str] = ("vq",),
        buffer_size: int = 1 << 16,
    ) -> None:
        super().__init__(target, buffer_size)
        self._interfaces = 0
        options = _option(_SHB_OS, f"{platform.system()} {platform.release()}".encode())
        options += _option(_SHB_USERAPPL, b"vq") + _END_OF_OPTIONS
        try:
            self._write_at_once(
                _block(_SECTION_HEADER, struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1) + options)
            )
            for name in interfaces:
                self.add_interface(name)
        except BaseException:
            self.close()
            raise

    def add_interface(self, name: str) -> int:
        """Adds an interface to the section; returns the number that `write` knows it by."""
        options = _option(_IF_NAME, name.encode()) if name else b""
        options += _option(_IF_TSRESOL, b"\x09") + _END_OF_OPTIONS
        head = struct.pack("<HHI", _ETHERNET, 0, MAX_FRAME_BYTES)
        self._write_at_once(_block(_INTERFACE_DESCRIPTION, head + options))
        self._interfaces += 1
        return self._interfaces - 1

    def write(
        self,
        data: Pieces,
        *,
        timestamp_ns: int | None = None,
        length: int | None = None,
        interface: int = 0,
        inbound: bool | None = None,
    ) -> None:
        """Adds one frame, see `CaptureWriter.write`."""
        if not 0 <= interface < self._interfaces:
            raise UsageError(f"the capture has no interface {interface}")
        if timestamp_ns is None:
            timestamp_ns = time.time_ns()
        at, size = self._gather(28, data)
        pending = self._pending
        pending += bytes(-size % 4)
        if inbound is not None:
            pending += _FLAGS_INBOUND if inbound else _FLAGS_OUTBOUND
        total = len(pending) - at + 4
        pending += struct.pack("<I", total)
        try:
            struct.pack_into(
                "<IIIIIII",
                pending,
                at,
                _ENHANCED_PACKET,
                total,
                interface,
                timestamp_ns >> 32,
                timestamp_ns & 0xFFFFFFFF,
                size,
                size if length is None else length,
            )
        except struct.error:
            raise self._drop(at, "a time or a length that pcapng cannot hold") from None
        self._record_done()


# What reading needs.

_ETHERNET = 1

# The names of link types that captures are often made of: www.tcpdump.org/linktypes.html
_LINK_TYPES = {
    0: "BSD loopback",
    6: "Token Ring",
    9: "PPP",
    10: "FDDI",
    12: "raw IP",
    14: "raw IP",
    50: "PPP in HDLC framing",
    51: "PPPoE",
    101: "raw IP",
    104: "Cisco HDLC",
    105: "IEEE 802.11",
    107: "Frame Relay",
    108: "OpenBSD loopback",
    109: "OpenBSD enc",
    113: "Linux cooked capture",
    117: "OpenBSD pflog",
    119: "IEEE 802.11 with Prism header",
    127: "IEEE 802.11 with radiotap header",
    187: "Bluetooth HCI",
    189: "USB with Linux header",
    192: "PPI",
    195: "IEEE 802.15.4",
    220: "USB with padded Linux header",
    227: "CAN",
    228: "raw IPv4",
    229: "raw IPv6",
    239: "NFLOG",
    249: "USBPcap",
    253: "Linux netlink",
    276: "Linux cooked capture v2",
}

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class _Source:
    """A file that is read strictly forwards, and how to complain about it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.place = "its first bytes"  # what is being read, for a file that ends there
        self.read = file.read

    def error(self, what: str) -> CaptureError:
        return CaptureError(f"{self._name}: {what}")

    def cut_short(self) -> CaptureError:
        return self.error(f"the capture is cut short in {self.place}")

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; the caller has made sure that `size` is sensible."""
        data = self.read(size)
        if len(data) < size:
            raise self.cut_short()
        return data

    def skip(self, size: int) -> None:
        """Passes over any number of bytes in little memory."""
        while size > 0:
            size -= len(self.take(min(size, 1 << 16)))

    def check_link_type(self, number: int) -> None:
        if number != _ETHERNET:
            name = _LINK_TYPES.get(number, "not known to vq")
            raise self.error(
                f"its frames have link type {number} ({name}); only Ethernet ({_ETHERNET}) is read"
            )

    def check_frame_size(self, size: int) -> None:
        if size > MAX_FRAME_BYTES:
            raise self.error(
                f"{self.place} claims {size} captured bytes; no more than {MAX_FRAME_BYTES} can be"
            )


# pcap

_MAGIC_MICRO = 0xA1B2C3D4
_MAGIC_NANO = 0xA1B23C4D
_MAGIC_MODIFIED = 0xA1B2CD34  # Alexey Kuznetsov's patch: eight more bytes in a record's header


@dataclass(frozen=True, slots=True)
class _PcapVariant:
    order: str
    unit_ns: int
    record_header: struct.Struct


_PCAP_VARIANTS = {
    struct.pack(order + "I", magic): _PcapVariant(order, unit_ns, struct.Struct(order + layout))
    for order in "<>"
    for magic, unit_ns, layout in (
        (_MAGIC_MICRO, 1000, "IIII"),
        (_MAGIC_NANO, 1, "IIII"),
        (_MAGIC_MODIFIED, 1000, "IIII8x"),
    )
}


def _read_pcap(source: _Source, variant: _PcapVariant) -> Iterator[CapturedFrame]:
    source.place = "its file header"
    major, minor, link_type = struct.unpack(variant.order + "HH12xI", source.take(20))
    if major != 2:
        raise source.error(f"pcap version {major}.{minor} is not known; 2.4 is the usual one")
    # The upper six bits may say how long the frame check sequence is.
    link_type &= 0x03FFFFFF
    header, unit_ns = variant.record_header, variant.unit_ns
    number = 0
    while head := source.read(header.size):
        number += 1
        source.place = f"record {number}"
        if len(head) < header.size:
            raise source.cut_short()
        seconds, fraction, size, length = header.unpack(head)
        source.check_link_type(link_type)
        source.check_frame_size(size)
        timestamp_ns = seconds * 1_000_000_000 + fraction * unit_ns
        yield CapturedFrame(source.take(size), timestamp_ns, length)


# pcapng

_SECTION_MAGIC = b"\x0a\x0d\x0d\x0a"
_BYTE_ORDER = 0x1A2B3C4D

_SECTION_HEADER = 0x0A0D0D0A
_INTERFACE_DESCRIPTION = 1
_OLD_PACKET = 2
_SIMPLE_PACKET = 3
_ENHANCED_PACKET = 6

# The blocks that matter, and what each holds at least between its two lengths.
_BLOCKS_READ = {
    _SECTION_HEADER: 16,
    _INTERFACE_DESCRIPTION: 8,
    _OLD_PACKET: 20,
    _SIMPLE_PACKET: 4,
    _ENHANCED_PACKET: 20,
}

_SHB_OS = 3
_SHB_USERAPPL = 4
_IF_NAME = 2
_IF_TSRESOL = 9
_IF_TSOFFSET = 14
_PACKET_FLAGS = 2
_DIRECTIONS = {1: True, 2: False}

# A block that is read as a whole: a frame of the largest size and room for plenty of options.
_MAX_BLOCK = 1 << 20
_MAX_INTERFACES = 1 << 16
"""All of a section's are kept in memory, for the frames that name them."""


@dataclass(slots=True)
class _Interface:
    link_type: int
    snap_length: int
    name: str = ""
    units_per_second: int = 1_000_000
    offset_ns: int = 0


def _read_pcapng(source: _Source) -> Iterator[CapturedFrame]:
    interfaces: list[_Interface] = []
    for kind, order, body in _blocks(source):
        if kind == _SECTION_HEADER:
            (major,) = struct.unpack_from(order + "H", body, 4)
            if major != 1:
                raise source.error(f"pcapng version {major} is not known; 1 is the usual one")
            interfaces = []
        elif kind == _INTERFACE_DESCRIPTION:
            if len(interfaces) == _MAX_INTERFACES:
                raise source.error(f"{source.place} is one interface too many: {_MAX_INTERFACES}")
            interfaces.append(_read_interface(source, order, body))
        elif kind == _SIMPLE_PACKET:
            yield _read_simple_packet(source, order, body, interfaces)
        else:
            yield _read_packet(source, kind, order, body, interfaces)


def _blocks(source: _Source) -> Iterator[tuple[int, str, bytes]]:
    """(type, byte order, body) of every block that matters; the others are passed over.

    The first four bytes of the file have been read.
    """
    order = "<"
    number = 1
    start = _SECTION_MAGIC + source.read(4)
    while start:
        source.place = f"block {number}"
        if len(start) < 8:
            raise source.cut_short()
        body = b""
        if start.startswith(_SECTION_MAGIC):
            # The byte order stands behind the length that is read with it.
            body = source.take(4)
            order = _section_order(source, body)
        kind, total = struct.unpack(order + "II", start)
        rest = total - 12 - len(body)
        if rest < 0 or total % 4:
            raise source.error(f"{source.place} claims a length of {total} bytes, which cannot be")
        if kind not in _BLOCKS_READ:
            source.skip(rest)
        elif total > _MAX_BLOCK:
            raise source.error(
                f"{source.place} claims {total} bytes; no more than {_MAX_BLOCK} can be"
            )
        else:
            body += source.take(rest)
        (again,) = struct.unpack(order + "I", source.take(4))
        if again != total:
            raise source.error(
                f"{source.place} has two lengths that disagree, {total} and {again} bytes"
            )
        if kind in _BLOCKS_READ:
            if len(body) < _BLOCKS_READ[kind]:
                raise source.error(f"{source.place} is too short for its type")
            yield kind, order, body
        number += 1
        start = source.read(8)


def _section_order(source: _Source, byte_order: bytes) -> str:
    for order in "<>":
        if byte_order == struct.pack(order + "I", _BYTE_ORDER):
            return order
    raise source.error(f"{source.place} has 0x{byte_order.hex()} for a byte-order magic")


def _read_interface(source: _Source, order: str, body: bytes) -> _Interface:
    link_type, snap_length = struct.unpack_from(order + "HxxI", body)
    interface = _Interface(link_type, snap_length)
    for code, value in _options(source, order, body, 8):
        if code == _IF_NAME:
            interface.name = value.rstrip(b"\0").decode(errors="replace")
        elif code == _IF_TSRESOL and len(value) == 1:
            # The top bit tells powers of two from powers of ten.
            power = value[0]
            interface.units_per_second = 1 << (power & 0x7F) if power & 0x80 else 10**power
        elif code == _IF_TSOFFSET and len(value) == 8:
            (seconds,) = struct.unpack(order + "q", value)
            interface.offset_ns = seconds * 1_000_000_000
        elif code in (_IF_TSRESOL, _IF_TSOFFSET):
            raise source.error(f"{source.place} has an option {code} of {len(value)} bytes")
    return interface


def _read_packet(
    source: _Source, kind: int, order: str, body: bytes, interfaces: Sequence[_Interface]
) -> CapturedFrame:
    """An enhanced packet block, or the packet block that came before it."""
    layout = "IIIII" if kind == _ENHANCED_PACKET else "HxxIIII"
    number, high, low, size, length = struct.unpack_from(order + layout, body)
    interface = _interface(source, interfaces, number)
    data = _frame_in(source, body, 20, size)
    flags = 0
    for code, value in _options(source, order, body, 20 + size + -size % 4):
        if code == _PACKET_FLAGS and len(value) == 4:
            (flags,) = struct.unpack(order + "I", value)
    timestamp = (high << 32 | low) * 1_000_000_000 // interface.units_per_second
    return CapturedFrame(
        data, timestamp + interface.offset_ns, length, interface.name, _DIRECTIONS.get(flags & 3)
    )


def _read_simple_packet(
    source: _Source, order: str, body: bytes, interfaces: Sequence[_Interface]
) -> CapturedFrame:
    """A frame of the section's first interface, cut at its snap length; no time, no options."""
    (length,) = struct.unpack_from(order + "I", body)
    interface = _interface(source, interfaces, 0)
    size = min(length, interface.snap_length or length)
    return CapturedFrame(_frame_in(source, body, 4, size), 0, length, interface.name)


def _interface(source: _Source, interfaces: Sequence[_Interface], number: int) -> _Interface:
    if number >= len(interfaces):
        raise source.error(f"{source.place} is a frame of interface {number}, which is not there")
    source.check_link_type(interfaces[number].link_type)
    return interfaces[number]


def _frame_in(source: _Source, body: bytes, at: int, size: int) -> bytes:
    source.check_frame_size(size)
    if at + size > len(body):
        raise source.error(
            f"{source.place} claims {size} captured bytes but holds {len(body) - at}"
        )
    return body[at : at + size]


def _options(source: _Source, order: str, body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The options from `at` to the end of a block's body, or to the option that ends them."""
    while at + 4 <= len(body):
        code, size = struct.unpack_from(order + "HH", body, at)
        if code == 0:
            return
        at += 4
        if at + size > len(body):
            raise source.error(f"{source.place} has an option that runs past its end")
        yield code, body[at : at + size]
        at += size + -size % 4


# What writing needs.


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


_END_OF_OPTIONS = _option(0, b"")
_FLAGS_INBOUND = _option(_PACKET_FLAGS, struct.pack("<I", 1)) + _END_OF_OPTIONS
_FLAGS_OUTBOUND = _option(_PACKET_FLAGS, struct.pack("<I", 2)) + _END_OF_OPTIONS


def _block(kind: int, body: bytes) -> bytes:
    """A block around a body whose length is a multiple of four."""
    total = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + total + body + total
