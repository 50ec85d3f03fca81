"""A real guest's session, recorded and replayed without the guest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vq import cli
from vq.link import Frame, Link
from vq.net import NetDevice
from vq.recording import Kind, RecordingReader, Replay
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace, iperf_server
from vq.testing.recordings import assert_replays
from vq.testing.requirements import or_skip

from .conftest import (
    HOST4,
    HOST6,
    Served,
    address_guest,
    address_host,
    assert_well,
    wait_until,
)

TAP = "vqrec0"


@pytest.fixture(scope="module")
def session(host: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a guest does in a few seconds that has the device's whole attention."""
    directory = tmp_path_factory.mktemp("recorded")
    path = directory / "net.vqrec"
    host.add_tap(TAP)
    address_host(host, TAP)
    options = ("--once", "--record", str(path), "--record-limit", "64")
    with (
        Served(directory, f"tap:{TAP}", *options, namespace=host) as served,
        iperf_server(host),
    ):
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        with guest:
            address_guest(guest)
            guest.output(f"ping -c 3 -i 0.2 {HOST4}")
            guest.output(f"ping -c 3 -i 0.2 {HOST6}")
            guest.output(f"iperf3 -c {HOST4} -n 2M")
            guest.output(f"iperf3 -c {HOST4} -n 2M -R")
            guest.output("ethtool -K eth0 tso off")
            guest.output("ip link set eth0 down && ip link set eth0 up")
            guest.output("modprobe -r virtio_net && modprobe virtio_net")
            address_guest(guest)
            guest.output(f"ping -c 3 -i 0.2 {HOST4}")
            assert_well(guest)
        wait_until(lambda: is_complete(path), "the end of it")
        assert "Traceback" not in served.log() and "not recorded" not in served.log()
    yield path


def is_complete(path: Path) -> bool:
    reader = RecordingReader(path)
    for _ in reader:
        pass
    return reader.complete


def test_the_same_device_does_the_same(session: Path) -> None:
    replay = Replay(session)
    assert replay.link is not None
    assert replay.run(NetDevice(replay.link)) == []
    assert replay.compared["frames sent"] > 100
    assert replay.compared["chains"] > 300
    assert replay.steps > 200


def test_the_command_line_agrees(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(session), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_everything_that_the_guest_did_is_in_it(session: Path) -> None:
    reader = RecordingReader(session)
    kinds = Counter(event.kind for event in reader)
    assert kinds[Kind.FEATURES] >= 2, "before and after the module was loaded again"
    assert kinds[Kind.QUEUE_STOP] >= 3
    assert kinds[Kind.LINK_READABLE] > 10 and kinds[Kind.LINK_INPUT] > 10
    assert kinds[Kind.CALL] > 10
    assert reader.header.served[0] == "net"


class DropsEveryTenth(NetDevice):
    """Loses frames."""

    count = 0

    def _write(self, port_index: int, frames: Sequence[Frame]) -> int:
        kept = []
        for frame in frames:
            self.count += 1
            if self.count % 10:
                kept.append(frame)
        super()._write(port_index, kept)
        return len(frames)


class ForgetsToFinish(NetDevice):
    """Takes the guest's word for what the link accepts: checksums stay undone."""

    def features_negotiated(self, features: int) -> None:
        super().features_negotiated(features & ~1)


@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        (DropsEveryTenth, "frames are sent, not"),
        (ForgetsToFinish, "port 0"),
        (lambda link: NetDevice(link, mtu=1400), "the answer is|the configuration"),
    ],
)
def test_a_device_with_a_bug_is_found_out(session: Path, bug: object, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        assert_replays(session, bug)  # type: ignore[arg-type]


def test_a_bug_in_what_the_guest_gets_is_found_out(session: Path) -> None:
    class Flips(NetDevice):
        """Turns a bit in what the link delivers."""

        def __init__(self, link: Link) -> None:
            super().__init__(link)
            port = link.ports[0]
            read = port.read_burst

            class Room:
                def __init__(self, room):  # type: ignore[no-untyped-def]
                    self.room = room

                def views(self):  # type: ignore[no-untyped-def]
                    self.lent = self.room.views()
                    return self.lent

                def commit(self, header: bytes, length: int) -> None:
                    self.lent[0][length // 2] ^= 1
                    self.room.commit(header, length)

            port.read_burst = lambda room, limit: read(Room(room), limit)  # type: ignore[method-assign]

    with pytest.raises(AssertionError, match="rx0: the chain at"):
        assert_replays(session, Flips)
