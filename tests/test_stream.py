"""`vq.stream`: the framing byte by byte, both roles, and a real passt."""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq import stream
from vq.errors import UsageError
from vq.link import Frame, FrameBuffer, Port
from vq.offload import Offload
from vq.stream import MAX_RECEIVED, MAX_SENT, StreamLink
from vq.unix_socket import connect as connect_to

PLAIN = bytes(12)


class PieceRoom:
    """Room in pieces of the given sizes for each frame; keeps what comes."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes or (MAX_RECEIVED,)
        self.frames: list[bytes] = []
        self.free = 1000

    def views(self) -> Sequence[memoryview]:
        if not self.free:
            return []
        self.lent = [memoryview(bytearray(size)) for size in self.sizes]
        return self.lent

    def commit(self, header: bytes, length: int) -> None:
        assert header == PLAIN
        self.free -= 1
        self.frames.append(b"".join(self.lent)[:length])


def pair() -> tuple[StreamLink, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    return StreamLink(ours), theirs


@pytest.fixture
def ends() -> Iterator[tuple[StreamLink, socket.socket]]:
    link, peer = pair()
    with closing(link), peer:
        yield link, peer


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path: a socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="tl-") as name:
        os.chmod(name, 0o777)  # passt gives its privileges up before it makes its socket
        yield Path(name)


def wire(*frames: bytes) -> bytes:
    """Frames as QEMU's documentation has them: big-endian length, then the bytes."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def read_all(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        assert piece, f"the end came after {len(data)} of {size} bytes"
        data += piece
    return data


def readable(port: Port, seconds: float) -> bool:
    fd = port.fileno()
    assert fd is not None
    return bool(select.select([fd], [], [], seconds)[0])


def until(done: Callable[[], bool], step: Callable[[], object], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        step()
        time.sleep(0.002)


# --- framing, towards the peer -------------------------------------------------------------------


def test_a_frame_goes_out_with_its_length_before_it(
    ends: tuple[StreamLink, socket.socket],
) -> None:
    link, peer = ends
    frames: list[Frame] = [
        [PLAIN, b"\xaa" * 14],
        [PLAIN, memoryview(b"\xbb" * 10), b"", bytearray(b"\xcc" * 5)],
    ]
    assert link.ports[0].write_burst(frames) == 2
    assert peer.recv(100) == (
        b"\x00\x00\x00\x0e" + b"\xaa" * 14 + b"\x00\x00\x00\x0f" + b"\xbb" * 10 + b"\xcc" * 5
    )


def test_frames_that_cannot_be_are_dropped_and_counted_once(
    ends: tuple[StreamLink, socket.socket],
) -> None:
    link, peer = ends
    frames: list[Frame] = [
        [PLAIN, bytes(13)],
        [PLAIN, bytes(14)],
        [PLAIN],
        [PLAIN, bytes(MAX_SENT + 1)],
        [PLAIN, bytes(15)],
    ]
    assert link.ports[0].write_burst(frames) == 5
    assert link.ports[0].dropped == {"runt": 2, "too long": 1}
    assert peer.recv(100) == wire(bytes(14), bytes(15))


def test_a_frame_in_more_pieces_than_one_call_takes(
    ends: tuple[StreamLink, socket.socket],
) -> None:
    link, peer = ends
    body = os.urandom(3000)
    bits: list[FrameBuffer] = [body[i : i + 1] for i in range(3000)]
    frames: list[Frame] = [[PLAIN, bytes(14)], [PLAIN, *bits]]
    frames += [[PLAIN, *bits[:700]] for _ in range(3)]
    assert link.ports[0].write_burst(frames) == 5
    expected = wire(bytes(14), body, *[body[:700]] * 3)
    assert read_all(peer, len(expected)) == expected


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(14, 60000), min_size=1, max_size=30), st.integers(1, 40000))
def test_a_slow_reader_never_loses_the_framing(sizes: list[int], sip: int) -> None:
    link, peer = pair()
    with closing(link), peer:
        frames: list[Frame] = [
            [PLAIN, bytes([i]) * (size // 2), bytes([i]) * (size - size // 2)]
            for i, size in enumerate(sizes)
        ]
        expected = wire(*(b"".join(frame[1:]) for frame in frames))
        got = b""
        waiting = frames
        end = time.monotonic() + 10
        while waiting or len(got) < len(expected):
            assert time.monotonic() < end
            if waiting:
                waiting = waiting[link.ports[0].write_burst(waiting) :]
            if len(got) < len(expected):
                got += peer.recv(sip)
        assert got == expected
        assert not link.ports[0].dropped


def test_half_a_frame_goes_on_with_the_bytes_that_it_began_with() -> None:
    class Stingy(socket.socket):
        left = 100  # what it takes before it is full

        def sendmsg(self, buffers: Any, *rest: Any) -> int:
            return self.send(b"".join(buffers))

        def send(self, data: Any, *rest: Any) -> int:
            if not self.left:
                raise BlockingIOError(errno.EAGAIN, "full")
            count = super().send(data[: self.left])
            self.left -= count
            return count

    ours, peer = socket.socketpair()
    peer.settimeout(5)
    stingy = Stingy(fileno=ours.detach())
    link = StreamLink(stingy)
    port = link.ports[0]
    with closing(link), peer:
        frames: list[Frame] = [[PLAIN, bytearray([i]) * 40] for i in range(4)]
        frames.append([PLAIN, b"runt"])  # counted when its turn comes, not each time it is seen
        assert port.write_burst(frames) == 2  # 88 bytes, and 12 of the third frame
        frames[2] = [PLAIN, b"\x22" * 40]  # a guest that writes to a frame on its way
        stingy.left = 5
        assert port.write_burst(frames[2:]) == 0
        stingy.left = 27
        assert port.write_burst(frames[2:]) == 1  # what was left of the third, no more
        stingy.left = 1000
        frames[3] = [PLAIN, b"\x33" * 40]
        assert port.write_burst(frames[3:]) == 2
        assert port.dropped == {"runt": 1}
        expected = wire(*(bytes([i]) * 40 for i in (0, 1, 2, 0x33)))
        assert peer.recv(1000) == expected


# --- framing, from the peer ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    st.lists(st.integers(1, 2000), min_size=1, max_size=8),
    st.sampled_from([(MAX_RECEIVED,), (1, 13, 2, 2984), (1500, 1500), (1,) * 3000]),
    st.integers(1, 4),
)
def test_frames_come_whole_however_the_bytes_are_cut(
    sizes: list[int], cuts: list[int], pieces: tuple[int, ...], limit: int
) -> None:
    link, peer = pair()
    with closing(link), peer:
        frames = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
        data = wire(*frames)
        room = PieceRoom(*pieces)
        at = 0
        for turn in range(len(data) + len(frames)):
            step = cuts[turn % len(cuts)]
            peer.sendall(data[at : at + step])
            at += step
            assert link.ports[0].read_burst(room, limit) <= limit
            if at >= len(data):
                break
        while link.ports[0].read_burst(room, limit):
            pass
        assert room.frames == [frame for frame in frames if len(frame) >= 14]
        runts = sum(len(frame) < 14 for frame in frames)
        assert link.ports[0].dropped["runt"] == runts


def test_a_frame_larger_than_the_room_is_dropped_and_the_next_one_comes(
    ends: tuple[StreamLink, socket.socket],
) -> None:
    link, peer = ends
    room = PieceRoom(1000, 514)
    peer.sendall(wire(bytes(1515), b"\x01" * 1514, bytes(9000), b"\x02" * 20))
    assert link.ports[0].read_burst(room, 64) == 2
    assert room.frames == [b"\x01" * 1514, b"\x02" * 20]
    assert link.ports[0].dropped == {"too long": 2}


def test_what_there_is_no_room_for_stays_in_the_socket(
    ends: tuple[StreamLink, socket.socket],
) -> None:
    link, peer = ends
    port = link.ports[0]
    room = PieceRoom()
    peer.sendall(wire(*(bytes([i]) * 20 for i in range(5))))
    room.free = 2
    assert port.read_burst(room, 64) == 2
    assert readable(port, 0)  # so that polling finds it
    room.free = 10
    assert port.read_burst(room, 2) == 2
    assert readable(port, 0)
    assert port.read_burst(room, 2) == 1
    assert port.read_burst(room, 2) == 0
    assert [frame[0] for frame in room.frames] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("announced", [MAX_RECEIVED + 1, 0xFFFFFFFF])
def test_a_frame_of_impossible_length_ends_the_connection(announced: int) -> None:
    link, peer = pair()
    with closing(link), peer:
        room = PieceRoom()
        peer.sendall(wire(bytes(60)) + struct.pack(">I", announced) + bytes(100))
        assert link.ports[0].read_burst(room, 64) == 1
        with pytest.raises(OSError, match=f"announced a frame of {announced} bytes") as caught:
            link.ports[0].read_burst(room, 64)
        assert caught.value.errno == errno.EPROTO
        assert not link.is_up
        assert link.ports[0].fileno() is None


def test_the_largest_frames_pass(ends: tuple[StreamLink, socket.socket]) -> None:
    link, peer = ends
    room = PieceRoom()
    body = os.urandom(MAX_RECEIVED)
    assert link.ports[0].write_burst([[PLAIN, body[:MAX_SENT]]]) == 1
    assert read_all(peer, MAX_SENT + 4) == wire(body[:MAX_SENT])
    peer.sendall(wire(body))
    until(lambda: bool(room.frames), lambda: link.ports[0].read_burst(room, 1))
    assert room.frames == [body]


# --- peers that come and go ----------------------------------------------------------------------


def test_a_peer_that_hangs_up_is_an_error_after_its_last_frame() -> None:
    link, peer = pair()
    changes: list[bool] = []
    link.on_change = lambda: changes.append(link.is_up)
    with closing(link):
        room = PieceRoom()
        assert link.is_up
        peer.sendall(wire(bytes(60)))
        peer.close()
        # Writing finds nobody, and takes nothing away from reading.
        assert link.ports[0].write_burst([[PLAIN, bytes(60)]] * 2) == 2
        assert link.ports[0].dropped == {"not connected": 2}
        assert link.ports[0].read_burst(room, 64) == 1
        with pytest.raises(ConnectionResetError, match="the peer of stream hung up"):
            link.ports[0].read_burst(room, 64)
        assert changes == [False]
        with pytest.raises(OSError, match="stream is closed"):
            link.ports[0].write_burst([[PLAIN, bytes(60)]])


def test_a_peer_that_hangs_up_within_a_frame_is_told_apart() -> None:
    for part in (wire(bytes(60))[:2], wire(bytes(60))[:-1]):
        link, peer = pair()
        with closing(link):
            room = PieceRoom()
            peer.sendall(part)
            assert link.ports[0].read_burst(room, 64) == 0
            peer.close()
            with pytest.raises(ConnectionResetError, match="within a frame"):
                link.ports[0].read_burst(room, 64)
            assert room.frames == []


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(5)
    peer.connect(str(path))
    return peer


def test_a_server_serves_one_peer_after_the_other(place: Path) -> None:
    path = place / "s"
    with closing(StreamLink.listen(str(path))) as link:
        port = link.ports[0]
        changes: list[bool] = []
        link.on_change = lambda: changes.append(link.is_up)
        room = PieceRoom()
        assert not link.is_up
        assert port.read_burst(room, 64) == 0
        assert port.write_burst([[PLAIN, bytes(60)]]) == 1
        assert port.dropped == {"not connected": 1}
        listening = port.fileno()
        for number in (1, 2):
            with connect(path) as peer:
                assert readable(port, 5)
                peer.sendall(wire(bytes([number]) * 20) + b"\0\0")  # and half a length
                until(lambda n=number: len(room.frames) == n, lambda: port.read_burst(room, 64))  # type: ignore[misc]
                assert link.is_up
                assert port.fileno() != listening
                assert port.write_burst([[PLAIN, bytes([number]) * 30]]) == 1
                assert peer.recv(100) == wire(bytes([number]) * 30)
            until(lambda: not link.is_up, lambda: port.read_burst(room, 64))
            assert port.fileno() == listening
        assert [frame[0] for frame in room.frames] == [1, 2]
        assert changes == [True, False, True, False]
    assert not path.exists()


def test_a_client_talks_to_a_server_of_ours(place: Path) -> None:
    path = str(place / "s")
    with (
        closing(StreamLink.listen(path)) as server,
        closing(StreamLink.connect(path)) as client,
    ):
        room = PieceRoom()
        assert client.ports[0].write_burst([[PLAIN, b"\x07" * 64]] * 3) == 3
        until(lambda: len(room.frames) == 3, lambda: server.ports[0].read_burst(room, 64))
        assert server.ports[0].write_burst([[PLAIN, b"\x08" * 64]]) == 1
        until(lambda: len(room.frames) == 4, lambda: client.ports[0].read_burst(room, 64))
        for link in (server, client):
            assert (link.accepts, link.delivers) == (Offload.NONE, Offload.NONE)
            assert (link.min_frame, link.max_frame, link.mtu) == (14, MAX_RECEIVED, None)
            assert link.name == f"stream:{path}"


def test_a_client_that_may_reconnect_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "RETRY_SECONDS", 0.01)
    path = str(place / "s")
    room = PieceRoom()
    server = StreamLink.listen(path)
    with closing(StreamLink.connect(path, reconnect=True)) as client:
        port = client.ports[0]
        until(lambda: server.is_up, lambda: server.ports[0].read_burst(room, 1))
        server.close()
        until(lambda: not client.is_up, lambda: port.read_burst(room, 1))
        time.sleep(0.02)
        assert port.write_burst([[PLAIN, bytes(60)]]) == 1
        assert port.dropped == {"not connected": 1}
        assert not client.is_up
        with closing(StreamLink.listen(path)) as server:
            until(lambda: client.is_up, lambda: port.write_burst([[PLAIN, b"\x05" * 60]]))
            until(lambda: bool(room.frames), lambda: server.ports[0].read_burst(room, 1))
            assert room.frames == [b"\x05" * 60]


def test_a_client_does_not_try_again_more_than_once_a_second(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(place / "s")
    tries: list[str] = []

    def once(path: str) -> socket.socket:
        tries.append(path)
        if len(tries) > 1:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        return connect_to(path)

    with closing(StreamLink.listen(path)) as server:
        client = StreamLink.connect(path, reconnect=True, connect=once)
        until(lambda: server.is_up, lambda: server.ports[0].read_burst(PieceRoom(), 1))
    with closing(client):
        until(lambda: not client.is_up, lambda: client.ports[0].read_burst(PieceRoom(), 1))
        clock = [time.monotonic() + 1]
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        for _ in range(5):
            client.ports[0].write_burst([[PLAIN, bytes(60)]])
        assert tries == [path] * 2
        clock[0] += 1
        client.ports[0].write_burst([[PLAIN, bytes(60)]])
        assert tries == [path] * 3


# --- paths ---------------------------------------------------------------------------------------


def test_where_nobody_listens_the_error_says_so(place: Path) -> None:
    path = place / "s"
    with pytest.raises(FileNotFoundError, match=f"nobody listens at {path}"):
        StreamLink.connect(str(path))
    dead_socket(path)
    with pytest.raises(ConnectionRefusedError, match=f"nobody listens at {path}"):
        StreamLink.connect(str(path))


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))


def test_a_path_that_no_socket_can_have_is_refused(place: Path) -> None:
    for make in (StreamLink.connect, StreamLink.listen):
        with pytest.raises(UsageError, match="too long for a socket's path"):
            make(str(place / ("x" * 120)))


def test_a_server_takes_the_place_of_a_dead_one_only(place: Path) -> None:
    path = place / "s"
    dead_socket(path)
    with closing(StreamLink.listen(str(path))):
        with pytest.raises(UsageError, match="is served already"):
            StreamLink.listen(str(path))
        assert path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="is there already, and is not a socket"):
        StreamLink.listen(str(path))
    assert path.read_text() == "precious"


def test_a_socket_that_is_not_ours_any_more_is_left_there(place: Path) -> None:
    path = place / "s"
    link = StreamLink.listen(str(path))
    path.unlink()
    dead_socket(path)
    link.close()
    link.close()
    assert path.exists()


def test_a_datagram_socket_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, pytest.raises(UsageError, match="not a stream socket"):
        StreamLink(ours)


# --- passt ---------------------------------------------------------------------------------------

GUEST_MAC = bytes.fromhex("0200000000aa")
GUEST, GATEWAY = "10.0.2.15", "10.0.2.2"


@pytest.fixture
def passt(place: Path) -> Iterator[StreamLink]:
    """A link to a passt of our own, which maps the gateway's address to this host."""
    program = shutil.which("passt")
    if program is None:
        pytest.skip("needs passt(1)")
    path = place / "passt"
    command = [program, "--foreground", "--stderr", "--quiet", "--socket", str(path), "-4"]
    command += ["-a", GUEST, "-n", "24", "-g", GATEWAY, "-m", "1500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            end = time.monotonic() + 5
            while not path.exists():
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    assert process.stdout is not None
                    pytest.skip(f"passt does not run here: {process.stdout.read()!r}")
                time.sleep(0.01)
            with closing(StreamLink.connect(str(path))) as link:
                yield link
        finally:
            process.kill()
            process.wait(10)


def total(data: bytes) -> int:
    """The Internet checksum's sum, written down as RFC 1071 has it."""
    if len(data) % 2:
        data += b"\0"
    value: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def udp(target_mac: bytes, source: str, target: str, ports: tuple[int, int], data: bytes) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    size = 8 + len(data)
    header = struct.pack(">HHH", *ports, size)
    pseudo = addresses + struct.pack(">HH", 17, size)
    header += struct.pack(">H", total(pseudo + header + b"\0\0" + data) ^ 0xFFFF)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 1, 0, 64, 17, 0) + addresses
    ip = ip[:10] + struct.pack(">H", total(ip) ^ 0xFFFF) + ip[12:]
    return target_mac + GUEST_MAC + b"\x08\x00" + ip + header + data


def answer(link: StreamLink, request: bytes, wanted: Callable[[bytes], bool]) -> bytes:
    """Sends a frame and returns the first that comes and is wanted."""
    port = link.ports[0]
    room = PieceRoom()
    assert port.write_burst([[PLAIN, request[:14], request[14:]]]) == 1
    until(lambda: any(map(wanted, room.frames)), lambda: port.read_burst(room, 64))
    return next(filter(wanted, room.frames))


def test_arp_dhcp_and_udp_through_a_real_passt(passt: StreamLink) -> None:
    request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + socket.inet_aton(GUEST)
    request += bytes(6) + socket.inet_aton(GATEWAY)
    frame = answer(
        passt,
        b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + request,
        lambda frame: frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02",
    )
    gateway_mac = frame[22:28]
    assert frame[28:32] == socket.inet_aton(GATEWAY)

    discover = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x12345678, 0, 0) + bytes(16) + GUEST_MAC
    discover += bytes(10 + 64 + 128) + b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
    frame = answer(
        passt,
        udp(b"\xff" * 6, "0.0.0.0", "255.255.255.255", (68, 67), discover + bytes(60)),
        lambda frame: frame[34:38] == b"\x00\x43\x00\x44",
    )
    assert frame[42 + 4 : 42 + 8] == b"\x12\x34\x56\x78"
    assert frame[42 + 16 : 42 + 20] == socket.inet_aton(GUEST)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(5)
        number = host.getsockname()[1]
        port = passt.ports[0]
        room = PieceRoom()
        sizes = (1, 1400, 77)
        frames: list[Frame] = [
            [PLAIN, udp(gateway_mac, GUEST, GATEWAY, (5555, number), bytes([size % 256]) * size)]
            for size in sizes
        ]
        assert port.write_burst(frames) == 3
        for size in sizes:
            data, source = host.recvfrom(9000)
            assert data == bytes([size % 256]) * size
            host.sendto(data[::-1] + b"!", source)
        until(lambda: len(room.frames) == 3, lambda: port.read_burst(room, 64))
        for frame, size in zip(room.frames, sizes, strict=True):
            (length,) = struct.unpack_from(">H", frame, 38)
            assert length == 8 + size + 1
            assert frame[42 : 42 + length - 8] == bytes([size % 256]) * size + b"!"
    assert not port.dropped
