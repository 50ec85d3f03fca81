"""`vq.pcap_link`: a capture played to a guest, and links that are recorded."""

from __future__ import annotations

import errno
import io
import logging
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from net_frames import make_frame, make_payload, slow_sum

from vq.errors import CaptureError, UsageError
from vq.link import (
    MAX_FRAME,
    Frame,
    Link,
    LoopbackLink,
    NullLink,
    Port,
    Room,
    link_pair,
)
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NetDriver, NetHeader
from vq.offload import ALL, Offload
from vq.pcap import CapturedFrame, PcapngWriter, PcapWriter, read_frames
from vq.pcap_link import CaptureLink, PcapLink
from vq.stream import StreamLink

PLAIN = bytes(12)
FULL = "/dev/full"


class PieceRoom:
    """Room in pieces of the given sizes for each frame; keeps what comes."""

    def __init__(self, *sizes: int, free: int = 1000) -> None:
        self.sizes = sizes or (MAX_FRAME,)
        self.frames: list[tuple[bytes, bytes]] = []
        self.free = free

    def views(self) -> Sequence[memoryview]:
        if not self.free:
            return []
        self.lent = [memoryview(bytearray(size)) for size in self.sizes]
        return self.lent

    def commit(self, header: bytes, length: int) -> None:
        self.free -= 1
        self.frames.append((header, b"".join(self.lent)[:length]))


def capture(path: Path, *frames: bytes) -> Path:
    with PcapWriter(path) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def frame(number: int, size: int = 60) -> bytes:
    return bytes((number,)) * size


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(32 << 20) as memory:
        yield memory


# --- a capture as a link -------------------------------------------------------------------------


def test_the_frames_of_a_capture_arrive_in_order_and_then_no_more(tmp_path: Path) -> None:
    frames = [frame(number, 60 + number) for number in range(5)]
    with closing(PcapLink(capture(tmp_path / "in.pcap", *frames))) as link:
        (port,) = link.ports
        room = PieceRoom(7, 3, 2000)
        assert port.read_burst(room, 2) == 2
        assert port.read_burst(room, 64) == 3
        assert port.read_burst(room, 64) == 0
        assert room.frames == [(PLAIN, data) for data in frames]
        assert port.fileno() is None
        assert link.is_up and link.mtu is None
        assert (link.accepts, link.delivers) == (Offload.NONE, Offload.NONE)
        assert link.name == f"pcap:{tmp_path / 'in.pcap'}"


def test_a_frame_waits_for_room(tmp_path: Path) -> None:
    with closing(PcapLink(capture(tmp_path / "in.pcap", frame(1), frame(2)))) as link:
        room = PieceRoom(free=0)
        assert link.ports[0].read_burst(room, 64) == 0
        room.free = 1
        assert link.ports[0].read_burst(room, 64) == 1
        room.free = 1
        assert link.ports[0].read_burst(room, 64) == 1
        assert [data for _, data in room.frames] == [frame(1), frame(2)]


def test_what_is_no_whole_frame_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.pcapng"
    with PcapngWriter(path) as writer:
        writer.write(frame(1, 40), length=60)
        writer.write(frame(2, 13))
        writer.write(b"")
        writer.write(frame(3, 3000))
        writer.write(frame(4))
    with closing(PcapLink(path)) as link:
        room = PieceRoom(2000)
        assert link.ports[0].read_burst(room, 64) == 1
        assert room.frames == [(PLAIN, frame(4))]
        assert link.ports[0].dropped == {"cut short": 1, "runt": 2, "too long": 1}


def test_a_capture_that_is_damaged_ends_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = capture(tmp_path / "in.pcap", frame(1), frame(2), frame(3))
    path.write_bytes(path.read_bytes()[:-1])
    with closing(PcapLink(path)) as link:
        room = PieceRoom()
        assert link.ports[0].read_burst(room, 64) == 2
        assert link.ports[0].read_burst(room, 64) == 0
    (record,) = caplog.records
    assert "no more frames from here on" in record.message and "cut short" in record.message


def test_what_cannot_be_played_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(CaptureError, match="not a pcap or pcapng capture"):
        PcapLink(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        PcapLink(tmp_path / "missing")
    path = capture(tmp_path / "in.pcap", frame(1))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="read and written at once"):
        PcapLink(path, tmp_path / "." / "in.pcap")
    with pytest.raises(FileNotFoundError):
        PcapLink(path, tmp_path / "no" / "out.pcap")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["out.pcap", "out.pcapng", "out"])
def test_what_is_written_stands_in_the_other_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with closing(PcapLink(capture(tmp_path / "in.pcap"), path)) as link:
        whole = frame(1)
        pieces: Frame = [b"ab", memoryview(b"cd" * 30), bytearray(b"e")]
        too_long = bytes(MAX_FRAME + 1)
        frames: list[Frame] = [[PLAIN, whole], [PLAIN, too_long], [PLAIN, *pieces]]
        assert link.ports[0].write_burst(frames) == 3
        assert link.ports[0].dropped == {"too long": 1}
        # It is there before the link is closed.
        found = list(read_frames(path))
        assert [one.data for one in found] == [whole, b"ab" + b"cd" * 30 + b"e"]
        ng = name.endswith("ng")
        assert [one.inbound for one in found] == [False if ng else None] * 2
        assert path.read_bytes().startswith(b"\x0a\x0d\x0d\x0a" if ng else b"\x4d\x3c\xb2\xa1")
    link.close()


def test_without_a_file_to_write_to_frames_are_taken(tmp_path: Path) -> None:
    with closing(PcapLink(capture(tmp_path / "in.pcap"))) as link:
        assert link.ports[0].write_burst([[PLAIN, frame(1)]] * 3) == 3
        assert not link.ports[0].dropped


class FullDisk(io.BytesIO):
    """A file that takes its headers and then no more, or no more for a while."""

    full = False

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_loses_frames_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk()
    monkeypatch.setattr("vq.pcap_link.open_writer", lambda _: PcapWriter(disk))
    with closing(PcapLink(capture(tmp_path / "in.pcap", frame(7)), tmp_path / "out")) as link:
        (port,) = link.ports
        disk.full = True
        assert port.write_burst([[PLAIN, frame(1)]]) == 1
        assert port.write_burst([[PLAIN, frame(2)]]) == 1
        assert port.dropped == {"not written": 2}
        assert port.read_burst(PieceRoom(), 64) == 1
        disk.full = False
        assert port.write_burst([[PLAIN, frame(3)]]) == 1
    (record,) = caplog.records
    assert "frames cannot be written" in record.message and "No space left" in record.message
    (tmp_path / "kept").write_bytes(disk.getvalue())
    assert [one.data for one in read_frames(tmp_path / "kept")] == [frame(3)]


def test_a_guest_hears_a_capture_and_its_frames_are_kept_finished(
    tmp_path: Path, memory: GuestMemory
) -> None:
    frames = [frame(number, 60 + number) for number in range(200)]
    out = tmp_path / "out.pcapng"
    device = NetDevice(PcapLink(capture(tmp_path / "in", *frames), out), memory=memory)
    with closing(device):
        driver = NetDriver(device, memory, receive_buffers=16)
        came: list[bytes] = []
        while got := driver.receive():
            came += [one.data for one in got]
        assert came == frames
        payload = make_payload(5000)
        sent = make_frame(payload)
        header = NetHeader(
            flags=1, gso_type=1, hdr_len=54, gso_size=1000, csum_start=34, csum_offset=16
        )
        assert driver.send(sent, header)
        segments = [one.data for one in read_frames(out)]
        assert [len(segment) for segment in segments] == [54 + 1000] * 5
        assert b"".join(segment[54:] for segment in segments) == payload
        for segment in segments:
            pseudo = segment[26:34] + struct.pack("!HH", 6, len(segment) - 34)
            assert slow_sum(pseudo + segment[34:]) == 0xFFFF
        driver.close()


# --- a recorded link -----------------------------------------------------------------------------


def kept(path: Path) -> list[tuple[bool | None, bytes]]:
    return [(one.inbound, one.data) for one in read_frames(path)]


def test_frames_of_both_directions_are_recorded_with_their_direction(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    near, far = link_pair()
    with closing(CaptureLink(near, path)) as link:
        assert link.ports[0].write_burst([[PLAIN, frame(1)[:20], frame(1)[20:]]]) == 1
        far.ports[0].write_burst([[PLAIN, frame(2)], [PLAIN, frame(3, 90)]])
        room = PieceRoom(30, 5, 200)
        assert link.ports[0].read_burst(room, 64) == 2
        # The record is there while the link is in use.
        assert kept(path) == [(False, frame(1)), (True, frame(2)), (True, frame(3, 90))]
        assert {one.interface for one in read_frames(path)} == {"pair:0"}
        assert [data for _, data in room.frames] == [frame(2), frame(3, 90)]
        there = PieceRoom()
        far.ports[0].read_burst(there, 64)
        assert there.frames == [(PLAIN, frame(1))]
    link.close()
    assert len(kept(path)) == 3


def test_a_recorded_link_says_what_the_link_says() -> None:
    class Odd(NullLink):
        accepts = Offload.CSUM
        delivers = Offload.CSUM | Offload.TSO4
        min_frame = 14
        max_frame = 9000
        up = True
        asked: list[object]

        def request_offloads(self, wanted: Offload) -> None:
            self.asked.append(wanted)
            self.delivers = wanted

        def activate_ports(self, count: int) -> None:
            self.asked.append(count)

        @property
        def is_up(self) -> bool:
            return self.up

        @property
        def mtu(self) -> int | None:
            return 1400

        def close(self) -> None:
            self.asked.append("close")

    odd = Odd(ports=3)
    odd.asked = []
    link = CaptureLink(odd, PcapngWriter(io.BytesIO()))
    assert len(link.ports) == 3
    assert (link.name, link.mtu, link.min_frame, link.max_frame) == ("null", 1400, 14, 9000)
    assert (link.accepts, link.delivers) == (Offload.CSUM, Offload.CSUM | Offload.TSO4)
    link.request_offloads(ALL)
    link.activate_ports(2)
    assert link.delivers == ALL
    odd.up, odd.max_frame = False, 1514
    assert not link.is_up and link.max_frame == 1514
    changes: list[None] = []
    link.on_change = lambda: changes.append(None)
    assert odd.on_change is not None
    odd.on_change()
    assert changes == [None]
    link.close()
    assert odd.asked == [ALL, 2, "close"]


class ShortPort(Port):
    """Takes two frames at a time, and refuses to be read."""

    def fileno(self) -> int:
        return 77

    def write_burst(self, frames: Sequence[Frame]) -> int:
        self.dropped["heard"] += 1
        return min(2, len(frames))

    def read_burst(self, room: Room, limit: int) -> int:
        raise OSError(errno.EIO, "gone")


class ShortLink(Link):
    name = "short"
    accepts = delivers = Offload.NONE

    def __init__(self) -> None:
        self.ports = (ShortPort(),)

    def close(self) -> None:
        pass


def test_a_frame_is_recorded_once_however_often_it_is_offered(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    with closing(CaptureLink(ShortLink(), path)) as link:
        (port,) = link.ports
        assert port.fileno() == 77
        frames: list[Frame] = [[PLAIN, frame(number)] for number in range(5)]
        assert port.write_burst(frames) == 2
        assert port.write_burst(frames[2:]) == 2
        assert kept(path) == [(False, frame(number)) for number in range(4)]
        assert port.dropped == {"heard": 2}
        with pytest.raises(OSError, match="gone"):
            port.read_burst(PieceRoom(), 1)


def test_callbacks_go_through(tmp_path: Path) -> None:
    near, far = link_pair(limit=1)
    with closing(CaptureLink(near, tmp_path / "c.pcapng")) as link:
        (port,) = link.ports
        calls: list[str] = []
        far.ports[0].write_burst([[PLAIN, frame(1)]])
        port.on_readable = lambda: calls.append("readable")
        port.on_writable = lambda: calls.append("writable")
        port.read_burst(PieceRoom(), 1)
        far.ports[0].write_burst([[PLAIN, frame(1)]])
        assert port.write_burst([[PLAIN, frame(1)]] * 2) == 1
        far.ports[0].read_burst(PieceRoom(), 1)
        assert calls == ["readable", "writable"]


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
def test_a_record_that_cannot_be_made_is_our_callers_to_know() -> None:
    near, _ = link_pair()
    with pytest.raises(OSError, match="No space left"):
        CaptureLink(near, FULL)


@pytest.mark.parametrize("buffer_size", [0, 1 << 16])
def test_a_full_disk_ends_the_recording_with_one_line_and_not_the_traffic(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, buffer_size: int
) -> None:
    disk = FullDisk()
    near, far = link_pair()
    link = CaptureLink(near, PcapngWriter(disk, buffer_size=buffer_size))
    (port,) = link.ports
    room = PieceRoom()

    def exchange(number: int) -> None:
        assert port.write_burst([[PLAIN, frame(number)]] * 3) == 3
        assert far.ports[0].write_burst([[PLAIN, frame(number)]] * 3) == 3
        assert port.read_burst(room, 64) == 3

    exchange(1)
    disk.full = True
    exchange(2)
    disk.full = False
    exchange(3)
    link.close()
    assert len(room.frames) == 9
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message.startswith("pair:0: frames are not recorded any more: ")
    (tmp_path / "kept").write_bytes(disk.getvalue())
    assert [data for _, data in kept(tmp_path / "kept")] == [frame(1)] * 6


def test_no_frame_that_a_guest_sends_ends_the_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.pcapng"
    with closing(CaptureLink(NullLink(), path)) as link:
        frames: list[Frame] = [[PLAIN, bytes(MAX_FRAME), b"\1" * 9], [PLAIN], [PLAIN, frame(2)]]
        assert link.ports[0].write_burst(frames) == 3
    found: list[CapturedFrame] = list(read_frames(path))
    assert [(len(one.data), one.length) for one in found] == [
        (MAX_FRAME, MAX_FRAME + 9),
        (0, 0),
        (60, 60),
    ]
    assert not caplog.records


def test_a_guest_on_a_recorded_link_notices_nothing(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    device = NetDevice(CaptureLink(LoopbackLink(), path), memory=memory)
    driver = NetDriver(device, memory)
    data = make_frame(make_payload(20000))
    header = NetHeader(
        flags=1, gso_type=1, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16
    )
    assert driver.send(data, header)
    (came,) = driver.receive()
    assert came.data == data
    assert (came.header.gso_type, came.header.gso_size) == (1, 1448)
    driver.close()
    device.close()
    # As it was on the link: one frame of 20 KiB, its checksum left undone.
    assert kept(path) == [(False, data), (True, data)]


def test_a_recorded_stream_is_polled_where_the_stream_is(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(CaptureLink(StreamLink(ours), tmp_path / "c.pcapng")) as link:
        assert link.ports[0].fileno() == ours.fileno()
        theirs.sendall(struct.pack(">I", 60) + frame(1))
        room = PieceRoom(MAX_FRAME)
        assert link.ports[0].read_burst(room, 64) == 1
        assert kept(tmp_path / "c.pcapng") == [(True, frame(1))]
