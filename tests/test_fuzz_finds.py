"""What fuzzing and the audit beside it found, one test for each with its story.

The inputs themselves went into the corpora (`fuzz/corpus`); here each is told again in terms of
what a guest or a peer did.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_frames import make_frame, make_payload
from net_world import OUR_MAC, PLAIN, World, features, tcp_header
from vhost_frontend import REPLY_ACK, Frontend, wait_until

from vq.cli import main
from vq.errors import CaptureError, UsageError
from vq.link import LoopbackLink
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.offload import Offload
from vq.pcap import read_frames
from vq.recording.format import RecordingReader
from vq.software import HeaderLie, finish
from vq.tun_hdr import TUN_HDR, TunFlag, TunHdrLie, from_tun
from vq.vhost_user import Connection

DEVICE_STATE = 1 << 19


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate((0x1000, 2 << 20)) as memory:
        yield memory


def good_state() -> dict[str, object]:
    with GuestMemory.allocate(0x1000) as memory:
        state: dict[str, object] = json.loads(World(memory).device.save_state())
        return state


@pytest.mark.parametrize(
    "state",
    [
        b"[" * 100_000,
        b'{"modes": [',
        b"7",
        json.dumps({**good_state(), "pairs": float("inf")}).encode(),
        json.dumps({**good_state(), "offloads": None}).encode(),
        json.dumps({**good_state(), "modes": []}).encode(),
        json.dumps({**good_state(), "mac": "01" * 6}).encode(),
        json.dumps({**good_state(), "vlans": [4096]}).encode(),
        json.dumps({**good_state(), "vlans": [1e308]}).encode(),
        json.dumps({**good_state(), "unicast": ["0102"]}).encode(),
        json.dumps({**good_state(), "unicast": [f"{n:012x}" for n in range(1025)]}).encode(),
    ],
)
def test_a_state_that_cannot_be_is_refused_whatever_is_wrong_with_it(state: bytes) -> None:
    """Fuzzing `control`: nested JSON raised RecursionError and an infinite number OverflowError;
    both went past everybody who expected `UsageError`. Addresses of any length and number, and
    VLANs beyond 4095, were taken."""
    device = NetDevice(LoopbackLink())
    before = device.save_state()
    with pytest.raises(UsageError):
        device.load_state(state)
    assert device.save_state() == before


def test_a_state_that_cannot_be_does_not_end_the_process(caplog: pytest.LogCaptureFixture) -> None:
    """Fuzzing `control`: the same state over a pipe that was slow was read by the event loop,
    where nobody caught the error: `vq serve` ended, with all its guests."""
    loop = Loop()
    ours, theirs = socket.socketpair()
    connection = Connection(ours, NetDevice(LoopbackLink()), loop)
    frontend = Frontend(loop, theirs)
    frontend.negotiate(protocol=REPLY_ACK | DEVICE_STATE)
    reader, writer = os.pipe()
    assert frontend.ask_u64(42, struct.pack("=2I", 1, 0), [reader]) == 0x100
    os.close(reader)
    os.write(writer, b"[" * 20_000)
    frontend.turn()
    os.write(writer, b"[" * 20_000)
    os.close(writer)
    assert frontend.ask_u64(43) == 1  # failed
    assert not connection.closed and "state did not get across" in caplog.text
    frontend.close()
    wait_until(loop, lambda: connection.closed)
    loop.close()


def test_a_fault_of_the_model_with_a_state_does_not_end_the_process() -> None:
    """As above, for device models whose `load_state` raises what it should not."""

    class Careless(NetDevice):
        def load_state(self, state: bytes) -> None:
            raise ZeroDivisionError

    loop = Loop()
    ours, theirs = socket.socketpair()
    Connection(ours, Careless(LoopbackLink()), loop)
    frontend = Frontend(loop, theirs)
    frontend.negotiate(protocol=REPLY_ACK | DEVICE_STATE)
    reader, writer = os.pipe()
    assert frontend.ask_u64(42, struct.pack("=2I", 1, 0), [reader]) == 0x100
    os.close(reader)
    os.close(writer)
    assert frontend.ask_u64(43) == 1
    frontend.close()
    loop.close()


def test_a_gso_frame_that_leaves_no_checksum_undone_reaches_no_guest(memory: GuestMemory) -> None:
    """Fuzzing `receive`: a link's header with a gso_type but without NEEDS_CSUM was handed on to a
    guest that takes GSO, where virtio 1.3, 5.1.6.4.1 has the device set both."""
    world = World(memory)
    driver = world.drive(features("GUEST_CSUM", "GUEST_TSO4", "MRG_RXBUF"))
    header = tcp_header(1000)._replace(flags=0).pack()
    frame = OUR_MAC + make_frame(make_payload(4000))[6:]
    world.link.deliver(frame, header=header)  # type: ignore[attr-defined]
    world.link.deliver(frame, header=tcp_header(1000).pack())  # type: ignore[attr-defined]
    assert [received.header.gso_type for received in driver.receive()] == [1]
    assert world.dropped("rx") == {"gso without csum": 1}
    with pytest.raises(HeaderLie, match="gso without csum"):
        finish([header, frame], Offload.CSUM | Offload.TSO4)


@pytest.mark.parametrize(
    "extension",
    [(44, b"\0" + bytes(6)), (51, b"\4" + bytes(22)), (60, b"\x7f" + bytes(1022))],
    ids=["fragment", "authentication", "long"],
)
def test_a_tun_hdr_asks_for_no_segmentation_that_cannot_be(extension: tuple[int, bytes]) -> None:
    """Fuzzing `headers`: TSO behind a fragment or an authentication header, or more headers than
    a segment may have, became a GSO frame for the guest that vq would take from no guest."""
    frame = bytearray(make_frame(make_payload(4000), version=6, extensions=[extension]))
    header = TUN_HDR.pack(TunFlag.TCP_CSUM | TunFlag.TCP_MSS, 0, 0, 1000)
    with pytest.raises(TunHdrLie, match="tso headers"):
        from_tun(header, [frame])


def test_a_capture_cannot_have_interfaces_without_end(tmp_path: Path) -> None:
    """The audit: each interface of a pcapng section is kept, ten times as large as in the file."""

    def block(kind: int, body: bytes) -> bytes:
        total = struct.pack("<I", len(body) + 12)
        return struct.pack("<I", kind) + total + body + total

    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    interface = block(1, struct.pack("<HHI", 1, 0, 65535))
    path = tmp_path / "x.pcapng"
    path.write_bytes(section + 65536 * interface + section + 65536 * interface)
    assert list(read_frames(path)) == []
    path.write_bytes(section + 65537 * interface)
    with pytest.raises(CaptureError, match="one interface too many"):
        list(read_frames(path))


def test_plain_frames_are_as_before(memory: GuestMemory) -> None:
    """What the mends above must not touch."""
    world = World(memory)
    driver = world.drive()
    world.link.deliver(OUR_MAC + bytes(60), header=PLAIN)  # type: ignore[attr-defined]
    assert len(driver.receive()) == 1


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"queues": [["a", 1e400]]}',
        b'{"queues": 7}',
        b"[]",
        b'{"device": "a:b", "device_id": 1, "queues": [], "features": 0, "served": [7]}',
        b'{"device": "a:b", "device_id": 1, "queues": [], "features": "0"}',
        b'{"device": 5, "device_id": 1, "queues": [], "features": 0}',
        b'{"device": "a:b", "device_id": 1, "queues": [], "features": 0, "link": 5}',
    ],
)
def test_a_recording_that_cannot_be_is_refused_whatever_is_wrong_with_it(
    tmp_path: Path, header: bytes
) -> None:
    """Fuzzing `recording`: nested JSON, an infinite number and words that were numbers were
    tracebacks of `vq replay`."""
    path = tmp_path / "x.vqrec"
    path.write_bytes(b"VQREC\1\0\0" + struct.pack("<I", len(header)) + header)
    with pytest.raises(CaptureError):
        RecordingReader(path)
    path.write_bytes(b"VQREC\1\0\0" + struct.pack("<I", 0xFFFFFFFF) + header)
    with pytest.raises(CaptureError, match="it has 4294967295 bytes"):
        RecordingReader(path)


def test_a_recording_of_a_few_bytes_takes_no_gigabytes(tmp_path: Path) -> None:
    """The audit: an event of 64 million empty strings is a quarter of a megabyte when packed."""
    header = json.dumps({"device": "a:b", "device_id": 1, "queues": [], "features": 0}).encode()
    piece = struct.pack("<BIII", 9, 0, 0, 1 << 25) + bytes(1 << 20)
    packed = zlib.compress(piece)
    events = struct.pack("<II", len(packed), len(piece)) + packed
    path = tmp_path / "x.vqrec"
    path.write_bytes(b"VQREC\1\0\0" + struct.pack("<I", len(header)) + header + events)
    with pytest.raises(CaptureError, match="parts"):
        list(RecordingReader(path))


def test_a_recording_imports_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The audit: `vq replay` imported whatever module a recording named as its device's, from the
    current directory too, before it refused to replay it."""
    (tmp_path / "innocent.py").write_text("raise SystemExit('it was imported')")
    header = {
        **{"device": "innocent:Device", "device_id": 4, "queues": [], "features": 0},
        "served": ["innocent:Device"],
    }
    described = json.dumps(header).encode()
    path = tmp_path / "x.vqrec"
    head = b"VQREC\1\0\0" + struct.pack("<I", len(described))
    path.write_bytes(head + described)
    monkeypatch.chdir(tmp_path)
    assert main(["replay", str(path)]) == 2
    assert "--device innocent:Device" in capsys.readouterr().err
