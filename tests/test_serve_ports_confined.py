"""``vq serve console`` and ``vsock`` with helper and worker, and as one process: all that they do.

A scripted guest stands in front of the device; terminals, sockets, files and processes are real.
What a confined worker did not list would kill it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from test_serve import SECONDS, Served, eventually

from vq.abi import DeviceId
from vq.abi_console import ConsoleControl, ConsoleEvent
from vq.abi_vsock import VsockOp, VsockShutdown
from vq.devices.host_end import PtyEnd, UnixEnd
from vq.devices.vsock_connection import Header
from vq.driver import Driver
from vq.memory import GuestMemory
from vq.testing.requirements import need_linux, need_root
from vq.testing.vhost_frontend import VhostFrontend
from vq.unix_socket import Listener

CID = 42
RX, TX, CONTROL_RX, CONTROL_TX = range(4)
CONFINEMENTS = [
    pytest.param(["--sandbox=require"], id="require"),
    pytest.param([], id="auto"),
    pytest.param(["--sandbox=off"], id="off"),
    pytest.param(["--sandbox=off", "--restart"], id="off, two processes"),
]


class Guest:
    """A scripted guest on the socket of a device that is served."""

    def __init__(self, path: str, device_id: DeviceId, queues: int) -> None:
        self.memory = GuestMemory.allocate(8 << 20)
        self.frontend = VhostFrontend(path, self.memory, device_id=device_id, queue_count=queues)
        self.driver = Driver(self.frontend, self.memory, -1)
        self.driver.probe()

    def give(self, queue: int, count: int, size: int = 4096) -> None:
        """Makes so many buffers available that the device may write to."""
        for _ in range(count):
            gpa = self.driver.allocator.allocate(size)
            self.driver.queues[queue].add((), [(gpa, size)], token=gpa)
        self.driver.kick(queue)

    def send(self, queue: int, data: bytes) -> None:
        gpa = self.driver.allocator.allocate(len(data))
        self.memory.write(gpa, data)
        self.driver.queues[queue].add([(gpa, len(data))], token=gpa)
        self.driver.kick(queue)

    def received(self, queue: int) -> list[bytes]:
        """What the device has written since the last time, buffer by buffer."""
        found = []
        for used in self.driver.queues[queue].collect():
            found.append(self.memory.read(used.token, used.written))
            self.driver.allocator.free(used.token)
        return found

    def expect(self, queue: int, wanted: bytes) -> None:
        """Waits until `wanted` has come, in as many buffers as it took."""
        seen = b""

        def come() -> bool:
            nonlocal seen
            seen += b"".join(self.received(queue))
            return seen == wanted

        with contextlib.suppress(AssertionError):
            eventually(come, "bytes of the host")
        assert seen == wanted

    def close(self) -> None:
        self.frontend.close()
        self.memory.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(kind: str, *words: str) -> Served:
        need_linux()
        need_root()
        made.append(Served(tmp_path, *words, kind=kind))
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def plug() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def start(served: Served, device_id: DeviceId, queues: int) -> Guest:
        made.append(Guest(served.paths[0], device_id, queues))
        return made[-1]

    yield start
    for guest in made:
        guest.close()


Serve = Callable[..., Served]
Plug = Callable[..., Guest]


def alone(words: Sequence[str]) -> bool:
    """Whether there is one process for everything."""
    return words == ["--sandbox=off"]


def ended_well(served: Served, words: Sequence[str], worker: int) -> None:
    """The worker lived through all of it, and nobody complained."""
    if not alone(words):
        assert served.worker.pid == worker, served.log()
    log = served.stop()
    assert ("user nobody" in log) == ("--sandbox=off" not in words)
    complaints = [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line]
    assert [line for line in complaints if "cannot tell the supervisor" not in line] == []


# --- console -------------------------------------------------------------------------------------


def control(port: int, event: ConsoleEvent, value: int = 1) -> bytes:
    return bytes(ConsoleControl(id=port, event=event, value=value))


def use_console(directory: Path, served: Served, plug: Plug) -> None:
    """A terminal that changes its size, a client that comes, talks and goes, a file."""
    guest = plug(served, DeviceId.CONSOLE, 8)
    for queue in (RX, CONTROL_RX, 4):
        guest.give(queue, 16)
    guest.send(CONTROL_TX, control(0, ConsoleEvent.DEVICE_READY))
    for port in range(3):
        guest.send(CONTROL_TX, control(port, ConsoleEvent.PORT_READY))
        guest.send(CONTROL_TX, control(port, ConsoleEvent.PORT_OPEN))

    told: list[bytes] = []

    def is_told(message: bytes) -> None:
        def come() -> bool:
            told.extend(guest.received(CONTROL_RX))
            return message in told

        eventually(come, f"{message!r} of {told}")
        told.clear()

    terminal = os.open(directory / "tty", os.O_RDWR | os.O_NOCTTY)
    is_told(control(0, ConsoleEvent.PORT_OPEN))
    rows = termios.tcgetwinsize(terminal)[0] + 50  # another size than the last time
    termios.tcsetwinsize(terminal, (rows, 132))
    is_told(control(0, ConsoleEvent.RESIZE, 0) + bytes((132, 0, rows, 0)))
    os.write(terminal, b"typed\r")
    guest.expect(RX, b"typed\r")  # raw: nothing is echoed, nothing is turned into something else
    guest.send(TX, b"shown\n")
    assert os.read(terminal, 100) == b"shown\n"
    os.close(terminal)
    is_told(control(0, ConsoleEvent.PORT_OPEN, 0))

    for word in (b"first", b"second"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(directory / "p"))
            is_told(control(1, ConsoleEvent.PORT_OPEN))
            client.sendall(word)
            client.shutdown(socket.SHUT_WR)
            guest.expect(4, word)
            guest.send(5, word.upper())
            assert client.recv(100) == word.upper()
        is_told(control(1, ConsoleEvent.PORT_OPEN, 0))
        guest.send(CONTROL_TX, control(1, ConsoleEvent.PORT_OPEN))

    log = directory / "log"
    before = log.read_bytes()
    guest.send(7, b"written")
    eventually(lambda: log.read_bytes() == before + b"written", "the file")
    guest.close()


@pytest.mark.parametrize("words", CONFINEMENTS)
def test_a_console_does_all_that_it_does(
    words: list[str], serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    served = serve_console(serve, tmp_path, *words)
    worker = 0 if alone(words) else served.worker.pid
    use_console(tmp_path, served, plug)
    ended_well(served, words, worker)
    assert not any(os.path.lexists(tmp_path / name) for name in ("tty", "p"))


def serve_console(serve: Serve, directory: Path, *words: str) -> Served:
    ends = [f"--port=p=unix:{directory}/p", f"--port=log=file:{directory}/log"]
    return serve("console", "--pty", f"--link={directory}/tty", *ends, *words)


def test_a_terminal_left_cooked_is_raw_for_the_next_who_opens_it(
    serve: Serve, tmp_path: Path
) -> None:
    """A confined worker may set it so (tcsetattr)."""
    served = serve_console(serve, tmp_path, "--sandbox=require")
    for _ in range(2):
        terminal = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)

        def is_raw(terminal: int = terminal) -> bool:
            return not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO)

        eventually(is_raw, "a raw terminal")
        attributes = termios.tcgetattr(terminal)
        attributes[3] |= termios.ICANON | termios.ECHO
        opened = served.log().count(": opened")
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)
        os.close(terminal)
        eventually(lambda n=opened: served.log().count(": closed") == n, "gone")  # type: ignore[misc]
    served.stop()


def test_no_console_output_is_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vq.cli import main

    precious = tmp_path / "precious"
    precious.write_text("of the user's")
    (tmp_path / "log").symlink_to(precious)
    assert main(["serve", "console", f"--socket={tmp_path}/s", f"--file={tmp_path}/log"]) == 2
    assert "log: a symbolic link is not written through\n" in capsys.readouterr().err
    assert precious.read_text() == "of the user's"


# --- vsock ---------------------------------------------------------------------------------------


def use_vsock(directory: Path, served: Served, plug: Plug) -> None:
    """Connections both ways, that carry bytes, are half closed, are refused and are cut."""
    guest = plug(served, DeviceId.VSOCK, 3)
    guest.give(RX, 64)

    def packet(op: int, port: int, data: bytes = b"", guest_port: int = 7, **fields: int) -> None:
        header = Header(CID, 2, guest_port, port, op=op, buf_alloc=1 << 18, len=len(data))
        guest.send(TX, header._replace(**fields).pack() + data)

    seen: list[tuple[Header, bytes]] = []

    def answer(op: int, port: int, guest_port: int = 7) -> tuple[Header, bytes]:
        """The next packet of this kind."""

        def come() -> bool:
            for data in guest.received(RX):
                seen.append((Header.unpack(data[:44]), data[44:]))
                guest.give(RX, 1)
            return bool(found())

        def found() -> list[tuple[Header, bytes]]:
            wanted = (op, port, guest_port)
            return [one for one in seen if (one[0].op, one[0].src_port, one[0].dst_port) == wanted]

        eventually(come, f"{VsockOp(op).name} in {seen}")
        one = found()[0]
        seen.remove(one)
        return one

    with contextlib.closing(Listener(str(directory / "u_5000"))) as listener:
        packet(VsockOp.REQUEST, 5000)
        answer(VsockOp.RESPONSE, 5000)
        sock, _ = accepted(listener)
        with sock:
            packet(VsockOp.RW, 5000, b"from the guest")
            assert sock.recv(100) == b"from the guest"
            sock.sendall(b"from the host")
            assert answer(VsockOp.RW, 5000)[1] == b"from the host"
            packet(VsockOp.SHUTDOWN, 5000, flags=VsockShutdown.SEND)
            assert sock.recv(100) == b""
            sock.sendall(b"and the rest")
            assert answer(VsockOp.RW, 5000)[1] == b"and the rest"
        answer(VsockOp.SHUTDOWN, 5000)
        packet(VsockOp.RST, 5000)

    for port, name in ((5001, "nothing"), (5002, "a file"), (0xFFFFFFFF, "the last")):
        if name == "a file":
            (directory / f"u_{port}").touch()
        packet(VsockOp.REQUEST, port)
        answer(VsockOp.RST, port)

    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(directory / "u"))
        client.sendall(b"CONNECT 99\n")
        eventually(lambda: request_of(guest, seen) is not None, "a connection for the guest")
        host_port = request_of(guest, seen)
        assert host_port is not None
        seen.clear()
        packet(VsockOp.RESPONSE, host_port, guest_port=99)
        assert client.recv(100) == b"OK %d\n" % host_port
        client.sendall(b"question")
        assert answer(VsockOp.RW, host_port, 99)[1] == b"question"
        packet(VsockOp.RST, host_port, guest_port=99)
        assert client.recv(100) == b""
    (directory / "u_5002").unlink()
    guest.close()


def accepted(listener: Listener) -> tuple[socket.socket, object]:
    listener.socket.settimeout(SECONDS)
    sock, where = listener.socket.accept()
    sock.settimeout(SECONDS)
    return sock, where


def request_of(guest: Guest, seen: list[tuple[Header, bytes]]) -> int | None:
    """The host's port of the connection to the guest that is asked for."""
    seen += [(Header.unpack(data[:44]), data[44:]) for data in guest.received(RX)]
    ports = [header.src_port for header, _ in seen if header.op == VsockOp.REQUEST]
    return ports[0] if ports else None


@pytest.mark.parametrize("words", CONFINEMENTS)
def test_vsock_does_all_that_it_does(
    words: list[str], serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    served = serve("vsock", f"--cid={CID}", f"--uds={tmp_path}/u", *words)
    worker = 0 if alone(words) else served.worker.pid
    use_vsock(tmp_path, served, plug)
    ended_well(served, words, worker)
    assert not os.path.lexists(tmp_path / "u")


# --- what outlives a worker ----------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--sandbox=off"]])
@pytest.mark.parametrize("kind", ["console", "vsock"])
def test_the_next_worker_has_the_same_terminals_and_sockets(
    kind: str, words: list[str], serve: Serve, plug: Plug, tmp_path: Path
) -> None:
    if kind == "console":
        served = serve_console(serve, tmp_path, "--restart", *words)
        use: Callable[[Path, Served, Plug], None] = use_console
    else:
        served = serve("vsock", f"--cid={CID}", f"--uds={tmp_path}/u", "--restart", *words)
        use = use_vsock
    use(tmp_path, served, plug)
    first = served.worker
    time.sleep(0.3)  # a worker that lived for less is taken for one that cannot live
    first.kill()
    first.wait(SECONDS)
    use(tmp_path, served, plug)
    assert served.worker.pid != first.pid
    served.stop()
    assert not any(os.path.lexists(tmp_path / name) for name in ("tty", "p", "u"))


def test_a_process_that_was_forked_leaves_sockets_and_links_to_the_one_that_made_them(
    tmp_path: Path,
) -> None:
    """A worker without a sandbox that ended by itself took them from the next one."""
    link, path = tmp_path / "tty", tmp_path / "c"
    ends = [PtyEnd(str(link)), UnixEnd(str(path))]
    child = os.fork()
    if child == 0:
        for end in ends:
            end.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert link.is_symlink() and path.is_socket()
    for end in ends:
        end.close()
    assert not link.is_symlink() and not path.exists()
