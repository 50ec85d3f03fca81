"""`vq serve net` as a program: a scripted guest before it, its link's other end in our hands."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest
from net_frames import UDP, make_frame, make_payload, slow_sum
from test_dhcp import DISCOVER, Reply, kind, request

from vq.abi import HdrFlag, NetFeature
from vq.cli import main
from vq.loop import Loop
from vq.memory import GuestMemory
from vq.net_driver import PLAIN_HEADER, NetDriver, NetHeader, ReceivedFrame
from vq.pcap import PcapWriter, read_frames
from vq.testing.namespaces import Namespace
from vq.testing.requirements import need_linux, need_namespaces, need_tap
from vq.testing.vhost_frontend import VhostFrontend

BROADCAST = b"\xff" * 6
GUEST_MAC = bytes.fromhex("fee1bad1bad1")
SECONDS = 30.0


def frame_of(number: int, source: bytes = GUEST_MAC) -> bytes:
    """A broadcast frame that carries a number."""
    return BROADCAST + source + b"\x88\xb5" + number.to_bytes(4, "big") + bytes(46)


def number_of(data: bytes) -> int:
    return int.from_bytes(data[14:18], "big")


def eventually(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


class Served:
    """``vq serve`` as a process that is ready to serve; `signals` it gets are its end."""

    def __init__(
        self,
        directory: Path,
        *words: str,
        kind: str = "net",
        sockets: Sequence[str] = ("s",),
        fds: Sequence[int] = (),
        prefix: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.paths = [str(directory / name) for name in sockets]
        self.err = directory / f"err{len(list(directory.glob('err*')))}"
        self.out = self.err.with_name(self.err.name.replace("err", "out"))
        argv = [*prefix, sys.executable, "-m", "vq", "serve", kind]
        argv += [f"--socket={path}" for path in self.paths]
        notify = str(self.err) + ".notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
            supervisor.settimeout(0.02)
            supervisor.bind(notify)
            with self.err.open("wb") as err, self.out.open("wb") as out:
                self.process = subprocess.Popen(
                    [*argv, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    pass_fds=fds,
                    env={**os.environ, "NOTIFY_SOCKET": notify},
                    preexec_fn=prepare,
                )
            try:
                self._wait_ready(supervisor)
            except BaseException:
                self.close()
                raise
        os.unlink(notify)

    def _wait_ready(self, supervisor: socket.socket) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            with suppress(TimeoutError):
                assert supervisor.recv(64) == b"READY=1"
                return
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()

    @property
    def worker(self) -> psutil.Process:
        """The process that parses what guests send."""
        (worker,) = psutil.Process(self.process.pid).children()
        return worker

    def log(self) -> str:
        return self.err.read_text()

    def ended(self, seconds: float = SECONDS) -> int:
        return self.process.wait(seconds)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ends it as a supervisor does, and sees that it went well; gives the log."""
        self.process.send_signal(number)
        assert self.ended() == 0, self.log()
        assert not any(os.path.lexists(path) for path in self.paths), "a socket is left"
        assert "Traceback" not in self.log()
        return self.log()

    def kill(self) -> None:
        """All of it at once, as a machine does that loses its power."""
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(), self.process]:
                process.kill()
        self.ended()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


class Guest:
    """A scripted guest behind a scripted frontend."""

    def __init__(
        self, place: str | socket.socket, features: int | None = None, *, pairs: int = 1
    ) -> None:
        self.memory = GuestMemory.allocate(8 << 20)
        self.frontend = VhostFrontend(place, self.memory)
        wanted = () if features is None else (features,)
        self.driver = NetDriver(
            self.frontend, self.memory, *wanted, pairs=pairs, idle=self.frontend.wait
        )

    def send(self, *frames: bytes) -> None:
        taken = 0
        deadline = time.monotonic() + SECONDS
        while taken < len(frames):
            assert time.monotonic() < deadline, "the queue stays full"
            taken += self.driver.send_burst([(PLAIN_HEADER, frame) for frame in frames[taken:]])
            self.frontend.poll()

    def frames(self, count: int, seconds: float = SECONDS) -> list[ReceivedFrame]:
        """So many frames, fewer if there are not so many in time."""
        frames: list[ReceivedFrame] = []
        deadline = time.monotonic() + seconds
        while len(frames) < count and time.monotonic() < deadline:
            frames += self.driver.receive()
            if len(frames) < count:
                self.frontend.wait()
        return frames

    def receive(self, count: int, seconds: float = SECONDS) -> list[bytes]:
        """Likewise, without what stands before them."""
        return [frame.data for frame in self.frames(count, seconds)]

    def echo(self, count: int = 5, size: int = 64) -> None:
        """Frames come back over a loopback."""
        sent = [frame_of(number).ljust(size, b"\0") for number in range(count)]
        self.send(*sent)
        assert self.receive(count) == sent

    def close(self) -> None:
        with suppress(ConnectionError):
            self.driver.close()
        self.frontend.close()
        self.memory.close()


Serve: TypeAlias = Callable[..., Served]
Plug: TypeAlias = Callable[..., Guest]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[Served] = []

    def start(*words: str, **how: object) -> Served:
        made.append(Served(tmp_path, *words, **how))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def plug() -> Iterator[Plug]:
    made: list[Guest] = []

    def start(place: str | socket.socket, *args: int, **how: int) -> Guest:
        made.append(Guest(place, *args, **how))
        return made[-1]

    yield start
    for guest in made:
        guest.close()


# --- the device, as its options have it ----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_stops_clean_and_says_what_happened(
    serve: Serve, plug: Plug, number: int
) -> None:
    served = serve()
    plug(served.paths[0]).echo()
    log = served.stop(number)
    for words in ("waiting for a frontend", "connected", "negotiated CSUM, ", ", MRG_RXBUF, "):
        assert words in log
    assert served.out.read_text() == ""


def test_the_guest_sees_what_the_options_say(serve: Serve, plug: Plug) -> None:
    served = serve(
        *("--queue-pairs=2", "--queue-size=64", "--mac", "02:00:00:00:00:77", "--mtu=9000"),
        *("--features", "-CSUM,-GUEST_TSO4"),
    )
    guest = plug(served.paths[0], pairs=2)
    settings = guest.driver.settings
    assert settings.mac == bytes.fromhex("020000000077")
    assert (settings.mtu, settings.max_pairs) == (9000, 2)
    has = guest.driver.has_feature
    assert not has(NetFeature.CSUM) and not has(NetFeature.HOST_TSO4)
    assert not has(NetFeature.GUEST_TSO4) and has(NetFeature.GUEST_TSO6)
    guest.echo()
    guest.driver.send(frame_of(9), pair=1)
    assert guest.receive(1) == [frame_of(9)]
    assert " CSUM" not in served.stop()


@pytest.mark.parametrize(("microseconds", "sleeps"), [(0, True), (500_000, False)])
def test_it_lies_awake_for_as_long_as_it_is_told_to(
    microseconds: int, sleeps: bool, serve: Serve, plug: Plug
) -> None:
    """Who waits gives its processor away by its own will, and the kernel counts that."""
    served = serve(f"--busy-poll={microseconds}")
    guest = plug(served.paths[0])
    for _ in range(5):  # it learns that more comes soon
        guest.echo(1)
        time.sleep(0.01)
    before = served.worker.num_ctx_switches().voluntary
    for _ in range(20):
        guest.echo(1)
        time.sleep(0.01)
    slept = served.worker.num_ctx_switches().voluntary - before
    assert slept >= 20 if sleeps else slept < 10
    served.stop()


def test_a_locked_mac_is_the_only_one_that_may_send(serve: Serve, plug: Plug) -> None:
    guest = plug(serve("--lock-mac").paths[0])
    guest.send(frame_of(1, source=b"\2\0\0\0\0\1"), frame_of(2))
    assert guest.receive(2, seconds=0.2) == [frame_of(2)]


def test_the_local_dhcp_service_answers_and_the_link_hears_nothing(
    serve: Serve, plug: Plug
) -> None:
    guest = plug(serve("--local-dhcp=100.64.1.3/100.64.1.2").paths[0])
    guest.send(request(kind(DISCOVER), chaddr=GUEST_MAC, smac=GUEST_MAC))
    answers = guest.receive(2, seconds=0.2)
    assert len(answers) == 1
    assert Reply(answers[0]).target in (b"\xff" * 4, bytes((100, 64, 1, 3)))


@pytest.mark.parametrize("words", [(), ("--complete-checksums",)])
def test_checksums_are_complete_when_that_is_asked_for(
    serve: Serve, plug: Plug, words: Sequence[str]
) -> None:
    guest = plug(serve(*words).paths[0])
    header = NetHeader(flags=HdrFlag.NEEDS_CSUM, csum_start=34, csum_offset=6)
    sent = make_frame(make_payload(40), protocol=UDP)
    guest.driver.send(sent, header)
    (frame,) = guest.frames(1)
    assert bool(frame.header.flags & HdrFlag.NEEDS_CSUM) == (not words)
    whole = sent[26:34] + struct.pack("!II", len(sent) - 34, UDP) + frame.data[34:]
    assert (slow_sum(whole) == 0xFFFF) == bool(words)


# --- links ---------------------------------------------------------------------------------------


def test_a_tap_carries_frames_to_the_hosts_network_and_back(serve: Serve, plug: Plug) -> None:
    need_tap()
    need_namespaces()
    with Namespace("vqserve") as host:
        host.add_tap("vqs0")
        host.run("ip addr add 198.18.90.1/24 dev vqs0 && ip link set vqs0 up")
        served = serve("--link=tap:vqs0", prefix=host.argv())
        guest = plug(served.paths[0])
        us, host_address = bytes((198, 18, 90, 2)), bytes((198, 18, 90, 1))
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + us + bytes(6) + host_address
        guest.send(BROADCAST + GUEST_MAC + b"\x08\x06" + arp)
        answers: list[bytes] = []
        deadline = time.monotonic() + SECONDS
        while not answers and time.monotonic() < deadline:  # the host has more to say than this
            answers = [data for data in guest.receive(1) if data[12:14] == b"\x08\x06"]
        (answer,) = answers
        assert answer[20:22] == b"\0\2" and answer[28:32] == host_address

        assert guest.driver.settings.link_up
        host.run("ip link set vqs0 down")
        eventually(lambda: guest.frontend.wait() and not guest.driver.settings.link_up, "down")
        served.stop()


class StreamPeer:
    """The other end of a stream link."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(SECONDS)
        self._bytes = b""

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def take(self) -> list[bytes]:
        """The whole frames that are there now."""
        self.socket.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            while data := self.socket.recv(1 << 16):
                self._bytes += data
        self.socket.settimeout(SECONDS)
        frames = []
        while len(self._bytes) >= 4:
            end = 4 + struct.unpack_from(">I", self._bytes)[0]
            if len(self._bytes) < end:
                break
            frames.append(self._bytes[4:end])
            self._bytes = self._bytes[end:]
        return frames

    def receive(self, count: int) -> list[bytes]:
        frames: list[bytes] = []

        def enough() -> bool:
            frames.extend(self.take())
            return len(frames) >= count

        eventually(enough, f"{count} frames")
        return frames


@pytest.fixture
def switch(tmp_path: Path) -> Iterator[socket.socket]:
    """Where stream links connect to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "switch"))
        listener.listen()
        listener.settimeout(SECONDS)
        yield listener


def test_a_stream_link_connects(
    serve: Serve, plug: Plug, switch: socket.socket, tmp_path: Path
) -> None:
    served = serve(f"--link=stream:{tmp_path / 'switch'}")
    with switch.accept()[0] as sock:
        peer = StreamPeer(sock)
        guest = plug(served.paths[0])
        guest.send(frame_of(1), frame_of(2))
        assert peer.receive(2) == [frame_of(1), frame_of(2)]
        peer.send(frame_of(3), frame_of(4))
        assert guest.receive(2) == [frame_of(3), frame_of(4)]


def test_two_servers_meet_over_a_stream(serve: Serve, plug: Plug, tmp_path: Path) -> None:
    left = serve(f"--link=stream:{tmp_path / 'wire'},listen", sockets=["left"])
    right = serve(f"--link=stream:{tmp_path / 'wire'}", sockets=["right"])
    one, other = plug(left.paths[0]), plug(right.paths[0])
    other.send(frame_of(1))
    assert one.receive(1) == [frame_of(1)]
    one.send(frame_of(2))
    assert other.receive(1) == [frame_of(2)]
    right.stop()
    left.stop()
    assert not (tmp_path / "wire").exists()


def test_a_pcap_link_plays_a_capture_and_keeps_what_the_guest_sends(
    serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    with PcapWriter(tmp_path / "in.pcap") as writer:
        for number in range(20):
            writer.write(frame_of(number))
    served = serve(f"--link=pcap:{tmp_path / 'in.pcap'},{tmp_path / 'out.pcap'}")
    guest = plug(served.paths[0])
    assert guest.receive(20) == [frame_of(number) for number in range(20)]
    guest.send(frame_of(77))
    assert guest.driver.wait_sent()
    served.stop()
    assert [frame.data for frame in read_frames(tmp_path / "out.pcap")] == [frame_of(77)]


def test_a_pair_joins_two_guests_that_have_addresses_of_their_own(
    serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    capture = tmp_path / "both.pcapng"
    served = serve("--link=pair", f"--capture={capture}", sockets=["left", "right"])
    left, right = (plug(path) for path in served.paths)
    assert left.driver.settings.mac == GUEST_MAC
    assert right.driver.settings.mac == GUEST_MAC[:5] + b"\xd2"
    left.send(frame_of(1), frame_of(2))
    assert right.receive(2) == [frame_of(1), frame_of(2)]
    right.send(frame_of(3))
    assert left.receive(1) == [frame_of(3)]
    served.stop()
    recorded = [(frame.data, frame.inbound) for frame in read_frames(capture)]
    assert recorded == [(frame_of(1), False), (frame_of(2), False), (frame_of(3), True)]


# --- captures and statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_capture_has_both_directions_whatever_ends_the_server(
    serve: Serve, plug: Plug, tmp_path: Path, number: int
) -> None:
    served = serve(f"--capture={tmp_path / 'both.pcapng'}")
    plug(served.paths[0]).echo(3)
    served.process.send_signal(number)
    served.ended()
    recorded = [(number_of(f.data), f.inbound) for f in read_frames(tmp_path / "both.pcapng")]
    assert sorted(recorded) == [(n, inbound) for n in range(3) for inbound in (False, True)]


def test_a_full_disk_ends_the_capture_and_not_the_traffic(
    serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    capture = tmp_path / "both.pcapng"
    limit = 1 << 16  # bytes a file, of memory too
    served = serve(
        f"--capture={capture}",
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    guest = plug(served.paths[0])
    for _ in range(4):
        guest.echo(60, size=1000)
    log = served.stop()
    assert log.count("frames are not recorded any more") == 1
    assert 0 < capture.stat().st_size <= limit


def test_statistics_come_a_line_a_second(serve: Serve, plug: Plug) -> None:
    started = time.monotonic()
    served = serve("--link=null", "--stats", "json")
    plug(served.paths[0]).send(*(frame_of(number) for number in range(50)))
    eventually(lambda: '"tx_frames": 50' in served.out.read_text(), "the frames")
    lines = served.out.read_text().count("\n")
    eventually(lambda: served.out.read_text().count("\n") >= lines + 2, "two lines more")
    assert time.monotonic() - started >= lines + 1
    served.stop()
    lines = [json.loads(line) for line in served.out.read_text().splitlines()]
    assert sum(line["second"]["tx_frames"] for line in lines) == 50
    assert lines[-1]["total"]["tx_bytes"] == 50 * 64


def test_statistics_for_people_and_who_reads_them_may_stop(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-m", "vq", "serve", "net", "--socket", path, "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("from guest ") and line.endswith("dropped 0\n")
            process.stdout.close()
            assert process.wait(SECONDS) == 128 + signal.SIGPIPE
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    assert not os.path.lexists(path)


def test_statistics_that_cannot_be_written_do_not_stop_the_traffic(
    serve: Serve, plug: Plug
) -> None:
    need_linux()  # /dev/full
    served = serve("--stats", prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    eventually(lambda: "no more statistics" in served.log(), "the complaint")
    plug(served.paths[0]).echo()


# --- sockets and frontends -----------------------------------------------------------------------


def test_a_client_connects_to_the_frontend_again_and_again(
    serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    path = tmp_path / "frontend"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(SECONDS)
        served = serve("--client", sockets=["frontend"])
        for _ in range(2):
            guest = plug(listener.accept()[0])
            guest.echo()
            guest.frontend.disconnect()
        served.process.terminate()
        assert served.ended() == 0
        assert path.exists(), "it is not the client's to remove"
    path.unlink()


def test_a_client_waits_for_a_frontend_that_is_not_there_yet(serve: Serve, plug: Plug) -> None:
    served = serve("--client", sockets=["frontend"])
    assert "no frontend yet: nobody listens at " in served.log()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(served.paths[0])
        listener.listen()
        listener.settimeout(SECONDS)
        plug(listener.accept()[0]).echo()
    os.unlink(served.paths[0])
    served.stop()


def test_once_is_one_frontend(serve: Serve, plug: Plug) -> None:
    served = serve("--once")
    guest = plug(served.paths[0])
    guest.echo()
    guest.close()
    assert served.ended() == 0
    assert not os.path.lexists(served.paths[0])


def test_a_listening_socket_is_handed_over(serve: Serve, plug: Plug, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        served = serve(f"--fd={listener.fileno()}", fds=[listener.fileno()], sockets=[])
    for _ in range(2):
        guest = plug(str(path))
        guest.echo()
        guest.close()
    served.stop()
    assert path.exists(), "whoever made it removes it"


def test_a_connected_socket_is_handed_over_and_its_end_is_the_end(
    serve: Serve, plug: Plug, switch: socket.socket, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        served = serve(
            *("--fd", str(theirs.fileno()), f"--link=stream:{tmp_path / 'switch'}"),
            fds=[theirs.fileno()],
            sockets=[],
        )
    with switch.accept()[0] as sock:
        peer = StreamPeer(sock)
        guest = plug(ours)
        guest.send(frame_of(0))
        assert peer.receive(1) == [frame_of(0)], "all kicks are served by now"
        peer.send(frame_of(1))
        assert guest.receive(1) == [frame_of(1)], "the link is looked at without a kick"
        guest.frontend.disconnect()
        assert served.ended() == 0


@pytest.mark.parametrize("kind", ["nothing", "file", "datagrams", "idle"])
def test_a_descriptor_that_is_no_use_is_refused(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        open(os.devnull) as file,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle,
    ):
        fds = {"nothing": 999, "file": file.fileno()}
        fds |= {"datagrams": datagrams.fileno(), "idle": idle.fileno()}
        reasons = {
            "nothing": "no socket is open under this number",
            "file": "no socket is open under this number",
            "datagrams": "not a Unix stream socket",
            "idle": "the socket neither listens nor is connected",
        }
        fd = fds[kind]
        assert main(["serve", "net", f"--fd={fd}"]) == 2
    assert capfd.readouterr().err.endswith(f"vq serve: --fd {fd}: {reasons[kind]}\n")


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(
    serve: Serve, plug: Plug
) -> None:
    first = serve()
    first.kill()
    with suppress(OSError), socket.socket(socket.AF_UNIX) as dead:
        dead.bind(first.paths[0])  # in case the last of its processes could still remove its own
    assert os.path.lexists(first.paths[0])
    second = serve("--once")
    done = subprocess.run(
        [sys.executable, "-m", "vq", "serve", "net", "--socket", second.paths[0]],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"vq serve: {second.paths[0]} is served already\n"
    plug(second.paths[0]).echo()  # `--once` was not spent on the question whether it lives


def test_a_frontend_that_dies_makes_room_for_the_one_that_waits(serve: Serve, plug: Plug) -> None:
    served = serve()
    first = plug(served.paths[0])
    first.echo()
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting.connect(served.paths[0])
    first.send(*(frame_of(number) for number in range(100)))
    first.frontend.disconnect()
    second = plug(waiting)
    assert second.receive(1, seconds=0.1) == [], "nothing of the first guest's"
    second.echo()
    log = served.stop()
    assert "disconnected" in log or "the frontend is gone" in log


def test_a_frontend_that_breaks_the_protocol_is_dropped_with_the_reason(
    serve: Serve, plug: Plug
) -> None:
    served = serve()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as frontend:
        frontend.settimeout(SECONDS)
        frontend.connect(served.paths[0])
        frontend.send(struct.pack("=3I", 999, 1, 0))
        assert frontend.recv(1) == b""
    plug(served.paths[0]).echo()
    assert "dropped: request 999 does not exist" in served.stop()


def test_nothing_is_left_of_a_hundred_connections(serve: Serve) -> None:
    need_linux()  # /proc
    served = serve()
    process = served.worker
    idle = process.num_fds()
    with GuestMemory.allocate(1 << 20) as memory:
        for _ in range(100):
            frontend = VhostFrontend(served.paths[0], memory)
            frontend.accept_features(1 << 32)
            frontend.close()
    eventually(lambda: process.num_fds() <= idle, "the descriptors back")
    with open(f"/proc/{process.pid}/maps") as maps:
        assert not [line for line in maps if "memfd:" in line]


# --- ends ----------------------------------------------------------------------------------------


def test_a_signal_in_the_middle_of_traffic(serve: Serve, plug: Plug) -> None:
    served = serve()
    guest = plug(served.paths[0])
    received, ended = 0, False
    deadline = time.monotonic() + SECONDS
    while served.process.poll() is None:
        guest.driver.send_burst([(PLAIN_HEADER, frame_of(number)) for number in range(32)])
        guest.frontend.poll()
        received += len(guest.driver.receive())
        if received > 1000 and not ended:
            served.process.terminate()
            ended = True
        assert time.monotonic() < deadline, received
    assert ended
    assert served.ended() == 0
    assert not os.path.lexists(served.paths[0])
    assert "Traceback" not in served.log()


def test_a_signal_at_any_moment_of_the_start_leaves_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    for delay in range(8):
        process = subprocess.Popen(
            [sys.executable, "-m", "vq", "serve", "net", "--socket", path],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        try:
            with process.stderr:
                deadline = time.monotonic() + (0.03 * delay if delay % 2 else SECONDS)
                while time.monotonic() < deadline and not os.path.lexists(path):
                    pass  # the very moment when the socket is there is among those tried
                process.terminate()
                process.terminate()
                assert process.wait(SECONDS) in (0, -signal.SIGTERM)
                assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
            process.wait()
        assert not os.path.lexists(path)


def test_the_guests_traffic_survives_a_killed_server(
    serve: Serve, plug: Plug, switch: socket.socket, tmp_path: Path
) -> None:
    """What the guest was told is sent was sent, and nothing comes to it twice."""
    words = f"--link=stream:{tmp_path / 'switch'}"
    served = serve(words)
    peer = StreamPeer(switch.accept()[0])
    guest = plug(served.paths[0])
    sent, to_send = itertools.count(), itertools.count()
    arrived: list[int] = []
    received: list[int] = []
    repeatable = 0
    for round_number in range(4):
        ends = time.monotonic() + 0.15
        while time.monotonic() < ends:
            with suppress(ConnectionError):
                peer.send(*(frame_of(next(to_send)) for _ in range(8)))
            guest.driver.send_burst([(PLAIN_HEADER, frame_of(next(sent))) for _ in range(8)])
            guest.frontend.poll()
            received += [number_of(frame.data) for frame in guest.driver.receive()]
            arrived += map(number_of, peer.take())
            eventually(lambda: guest.driver.reap() >= 0 and guest.driver.unsent() < 200, "room")
        if round_number == 3:
            break
        guest.driver.send_burst([(PLAIN_HEADER, frame_of(next(sent))) for _ in range(32)])
        served.kill()
        arrived += map(number_of, peer.take())
        peer.socket.close()
        repeatable += 256
        served = serve(words)
        peer = StreamPeer(switch.accept()[0])
        guest.frontend.reconnect()
    assert guest.driver.wait_sent(), "every buffer came back"
    total = next(sent)
    eventually(
        lambda: bool(arrived.extend(map(number_of, peer.take())) or arrived[-1:] == [total - 1]),
        "the last frame",
    )
    received += [number_of(data) for data in guest.receive(1, seconds=0.3)]
    assert set(arrived) == set(range(total)), "lost"
    assert len(arrived) - total <= repeatable, "more came twice than could be under way"
    assert received == sorted(set(received)), "twice, or out of order"
    assert len(received) > 100
    peer.socket.close()
    assert "Traceback" not in served.stop()


# --- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give one --socket"),
        (["--socket=a", "--socket=b"], "give one --socket"),
        (["--socket=a", "--link=pair"], "give 2 --socket, one a device"),
        (["--socket=a", "--fd=5"], "--fd is for one device, and goes without"),
        (
            ["--socket=a", "--socket=b", "--link=pair", "--local-dhcp=10.0.0.1/10.0.0.0"],
            "one guest",
        ),
        (["--socket=" + "x" * 200], "is too long for a socket's path"),
        (["--client", "--socket=" + "x" * 200], "is too long for a socket's path"),
        (["--socket="], "an empty path"),
        (["--socket=FILE"], "FILE is there already, and is not a socket"),
        (["--client", "--socket=FILE"], "FILE is there already, and is not a socket"),
        (["--socket=FILE/below"], "cannot be used: Not a directory"),
        (["--socket=nowhere/s"], "the directory of the socket nowhere/s does not exist"),
        (["--socket=s", "--link=nonsense"], "'nonsense' is not a link; the links are loopback"),
        (["--socket=s", "--link=tap:"], "'tap:' is not a link"),
        (["--socket=s", "--link=stream:x,what"], "is not a link"),
        (["--socket=s", "--link=stream:nobody"], "nobody listens at nobody"),
        (["--socket=s", "--link=pcap:nothing"], "nothing: No such file or directory"),
        (["--socket=s", "--link=pcap:FILE"], "FILE"),
        (["--socket=s", "--link=tap:a-name-that-is-too-long"], "a-name-that-is-too-long"),
        (["--socket=s", "--mtu=67"], "an MTU is from 68 to 65535 bytes, not 67"),
        (["--socket=s", "--mtu=65536"], "an MTU is from 68 to 65535 bytes, not 65536"),
        (["--socket=s", "--mac=01:00:00:00:00:00"], "is not a unicast MAC address"),
        (["--socket=s", "--mac=what"], "is not a unicast MAC address"),
        (["--socket=s", "--queue-size=100"], "a power of two"),
        (["--socket=s", "--queue-pairs=0"], "not a whole number above 0"),
        (["--socket=s", "--queue-pairs=40000"], "queue pairs are from 1 to 32768"),
        (["--socket=s", "--features=-NOTHING"], "is not a feature"),
        (["--socket=s", "--local-dhcp=10.0.0.1"], "--local-dhcp takes GUEST/HOST"),
        (["--socket=s", "--local-dhcp=10.0.0.1/here"], "'here' is not an IPv4 address"),
        (["--socket=s", "--capture=nowhere/x.pcapng"], "nowhere/x.pcapng: No such file"),
        (["--socket=s", "--link=pcap:FILE", "--capture=./FILE"], "the link's file and the record"),
        (["--socket=s", "--stats=xml"], "invalid choice"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("text")
    try:
        status: object = main(["serve", "net", *words])
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    *_, last = err.splitlines()
    assert last.startswith("vq serve") and sentence in last
    assert os.listdir() == ["FILE"] and Path("FILE").read_text() == "text"


def test_a_socket_that_this_user_may_not_make_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: socket.socket, __: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert main(["serve", "net", f"--socket={tmp_path / 's'}"]) == 2
    assert (
        f"vq serve: this user may not use the socket {tmp_path / 's'}\n" in capfd.readouterr().err
    )


def test_a_tap_that_the_host_refuses_is_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need_tap()
    words = ["serve", "net", f"--socket={tmp_path / 's'}", "--link=tap:lo"]
    assert main(words) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("vq serve: ") and "lo" in last
    assert not (tmp_path / "s").exists()


def test_what_the_host_refuses_later_ends_it_with_status_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Loop) -> None:
        raise OSError(23, "Too many open files in system")

    monkeypatch.setattr(Loop, "run", refuse)
    assert main(["serve", "net", f"--socket={tmp_path / 's'}"]) == 1
    assert "Too many open files in system" in caplog.text
    assert os.listdir(tmp_path) == []


# --- managers and supervisors --------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--socket-path=/nowhere/s", "--fd=-7"], ["--queue-size=3"]])
def test_a_manager_may_ask_what_it_can(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "net", "--print-capabilities", *words])
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert json.loads(out) == {"type": "net"}


def test_a_supervisor_hears_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    need_linux()  # abstract addresses
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.settimeout(SECONDS)
        name = f"vq-serve-test-{os.getpid()}"
        supervisor.bind("\0" + name)
        path = tmp_path / "s"
        with subprocess.Popen(
            [sys.executable, "-m", "vq", "serve", "net", "--socket-path", str(path)],
            env={**os.environ, "NOTIFY_SOCKET": "@" + name},
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert supervisor.recv(64) == b"READY=1"
                assert path.is_socket()
                process.terminate()
                assert supervisor.recv(64) == b"STOPPING=1"
                assert process.wait(SECONDS) == 0
            finally:
                process.kill()


def test_it_is_small_while_it_waits(serve: Serve, plug: Plug) -> None:
    need_linux()  # what of it is the guest's RAM
    served = serve()
    process = served.worker
    waiting = process.memory_info().rss
    guest = plug(served.paths[0])
    guest.echo(200)
    info = process.memory_info()
    guests = sum(entry.rss for entry in process.memory_maps() if "memfd:" in entry.path)
    print(
        f"resident: {waiting >> 10} KiB waiting for a guest,"
        f" {info.rss - guests >> 10} KiB with one beyond its RAM"
    )
    assert waiting < 30 << 20
    assert info.rss - guests < 30 << 20


def test_what_a_link_needs_is_imported_for_that_link_only() -> None:
    code = "import sys, {0}; print(*sys.modules)"

    def modules(name: str) -> set[str]:
        argv = [sys.executable, "-c", code.format(name)]
        return set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())

    # 25 ms on the machine of docs/performance.md; what would cost as much again stays out.
    heavy = {"asyncio", "concurrent", "subprocess", "email", "http", "urllib", "ssl", "unittest"}
    unneeded = {"argparse", "tempfile", "typing_extensions", "psutil", "socket", "selectors"}
    at_start = modules("sys")
    assert not (modules("vq") - at_start) & (heavy | unneeded)
    assert len(modules("vq") - at_start) < 90
    assert not (modules("vq.serve.net") - at_start) & (heavy | {"tempfile", "psutil"})
    links = {"vq.tap", "vq.tap_linux", "vq.stream", "vq.pcap_link", "vq.pcap", "vq.dhcp"}
    assert not modules("vq.serve") & (links | {"psutil"})
