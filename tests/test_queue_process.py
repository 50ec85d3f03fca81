"""`QueueProcess` alone: real forks, whose other end says and does what a test wants."""

from __future__ import annotations

import faulthandler
import fcntl
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhost_frontend import nothing_left_open, wait_until

from vq import queue_process
from vq.errors import DriverError, UsageError, VqError
from vq.loop import Loop
from vq.queue_process import QueueProcess, Serving
from vq.testing.requirements import need_linux
from vq.vring import Position, Return

POSITIONS = {2: Position(7, 5, (1, 3)), 3: Position(0xFFFF, None)}

pytestmark = [
    pytest.mark.usefixtures("quick_collector"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="what is left open is not counted"),
]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a descriptor or a process behind, a zombie neither."""
    with nothing_left_open():
        yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


class World:
    """A process that has queues 2 and 3, and what was heard of it here."""

    def __init__(
        self,
        *,
        start: Callable[[Loop, Callable[[], None]], None] = lambda loop, give_back: None,
        stop: Callable[[], Return] = lambda: Return(POSITIONS),
        counted: Mapping[str, int] | None = None,
        serve: Callable[[], Serving] | None = None,
        loop: Loop | None = None,
    ) -> None:
        self.stats = Counter[str]()
        self.returned: list[Return] = []
        self.loop = loop or Loop()
        self.process = QueueProcess(
            (2, 3),
            self.loop,
            serve or (lambda: Serving(start, stop, Counter(counted or {}))),
            on_stats=self.stats.update,
            on_return=self.returned.append,
        )

    def wait(self) -> Return:
        """What came back without having been asked for."""
        wait_until(self.loop, lambda: bool(self.returned))
        (returned,) = self.returned
        return returned

    def close(self) -> None:
        self.loop.close()


def raw(*messages: object, again: bool = False) -> Callable[[], Serving]:
    """A process that says this by itself, once or without end; bytes are sent as they are."""

    def serve() -> Serving:
        caller = sys._getframe(1)  # who has the process' end of the socket
        sock: socket.socket = caller.f_locals["sock"]
        said = [m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages]
        for data in itertools.cycle(said) if again else said:
            sock.send(data)
        signal.pause()
        raise AssertionError

    return serve


# --- in good order -------------------------------------------------------------------------------


def test_queues_and_counts_come_back_when_they_are_asked_for() -> None:
    with closing(World(counted={"tx_frames": 3, "tx_bytes": 200})) as world:
        assert world.process.recall() == Return(POSITIONS)
        assert world.stats == {"tx_frames": 3, "tx_bytes": 200}
        assert not psutil.pid_exists(world.process.pid)
        world.loop.run_once(0)
        assert world.returned == []


def test_queues_come_back_by_themselves() -> None:
    with closing(World(start=lambda loop, give_back: give_back())) as world:
        assert world.wait() == Return(POSITIONS)


def test_what_is_counted_is_told_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_process, "TELL_SECONDS", 0.01)
    with closing(World(counted={"rx_frames": 2})) as world:
        wait_until(world.loop, lambda: world.stats["rx_frames"] == 2)
        for _ in range(10):
            world.loop.run_once(0.01)
        world.process.recall()
        assert world.stats == {"rx_frames": 2}, "each thing is told once"


def test_what_is_said_while_the_queues_are_awaited_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_process, "TELL_SECONDS", 0.01)
    with closing(World(counted={"rx_frames": 2})) as world:
        time.sleep(0.1)  # it has spoken, and nobody has listened yet
        assert world.process.recall() == Return(POSITIONS)
        assert world.stats == {"rx_frames": 2}


@pytest.mark.parametrize(
    "fault",
    [
        DriverError("a chain that loops", queue="rx1", head=7, section="2.7.5.2"),
        DriverError("an index that cannot be"),
    ],
)
def test_a_drivers_fault_travels_with_all_that_it_says(fault: DriverError) -> None:
    with closing(World(stop=lambda: Return(POSITIONS, fault))) as world:
        found = world.process.recall().fault
    assert isinstance(found, DriverError)
    assert vars(found) == vars(fault) and str(found) == str(fault)


def test_a_fault_of_the_models_is_none_of_the_drivers() -> None:
    with closing(World(stop=lambda: Return(POSITIONS, KeyError("x")))) as world:
        found = world.process.recall().fault
    assert type(found) is VqError and str(found) == "KeyError: 'x'"


def test_queues_that_come_by_themselves_while_they_are_asked_for_come_once() -> None:
    """Defect: who asks a process that is about to end gets ECONNRESET first, which was taken for
    its death: positions, counts and a driver's fault were lost.
    """

    def start(loop: Loop, give_back: Callable[[], None]) -> None:
        time.sleep(0.2)  # it is asked meanwhile, and does not read that any more
        give_back()

    fault = DriverError("a chain that loops", queue="rx1")
    stop = lambda: Return(POSITIONS, fault)  # noqa: E731
    with closing(World(start=start, stop=stop, counted={"rx_frames": 1})) as world:
        world.process._socket.send(b"give back")
        os.waitid(os.P_PID, world.process.pid, os.WEXITED | os.WNOWAIT)
        returned = world.wait()
        assert returned.positions == POSITIONS and isinstance(returned.fault, DriverError)
        assert world.stats == {"rx_frames": 1}


def test_the_process_has_nothing_of_the_other_one_but_what_is_its_own(tmp_path: Path) -> None:
    """Its end of the socket, its loop's three descriptors: `serve` closes what else there was."""
    need_linux()
    report = tmp_path / "fds"

    def start(loop: Loop, give_back: Callable[[], None]) -> None:
        links = [link for link in map(_link, range(3, 4096)) if link and link not in before]
        report.write_text("\n".join(sorted(link.partition(":")[0] for link in links)))
        give_back()

    before = {_link(int(name)) for name in os.listdir("/proc/self/fd")} - {"anon_inode:[eventpoll]"}
    with closing(World(start=start)) as world:
        world.wait()
    # The first loop's are still there: whoever calls closes that.
    assert report.read_text().split() == ["anon_inode", "anon_inode", *["pipe"] * 4, "socket"]


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


# --- ends ----------------------------------------------------------------------------------------


def kill_with(number: int) -> Callable[[Loop, Callable[[], None]], None]:
    def kill(loop: Loop, give_back: Callable[[], None]) -> None:
        faulthandler.disable()  # pytest's: it would have much to say
        os.kill(os.getpid(), number)

    return kill


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL: somebody killed it"),
        (signal.SIGSYS, "was killed by SIGSYS: it made a system call that is not on its list"),
        (signal.SIGBUS, "was killed by SIGBUS: memory that a guest shares was cut short"),
    ],
)
def test_a_process_that_is_killed_gives_nothing_back_and_that_is_said(
    number: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(World(start=kill_with(number))) as world:
        assert world.wait() == Return({})
        assert f"process {world.process.pid}, which served 2 queues, {words}" in caplog.text


@pytest.mark.parametrize(
    ("error", "traceback"), [(KeyError("x"), True), (UsageError("no such notes"), False)]
)
def test_a_process_that_fails_gives_nothing_back_and_says_why(
    error: Exception, traceback: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The peer's faults are a sentence, ours a traceback."""

    def start(loop: Loop, give_back: Callable[[], None]) -> None:
        logging.getLogger().handlers = [logging.FileHandler(tmp_path / "log")]
        raise error

    with closing(World(start=start)) as world:
        assert world.wait() == Return({})
        assert f"{world.process.pid}, which served 2 queues, ended with status 1" in caplog.text
    said = (tmp_path / "log").read_text()
    assert str(error) in said and ("Traceback" in said) == traceback


def test_one_that_is_dead_when_it_is_asked_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    with closing(World(start=kill_with(signal.SIGKILL))) as world:
        os.waitid(os.P_PID, world.process.pid, os.WEXITED | os.WNOWAIT)
        assert world.process.recall() == Return({})
        assert "was killed by SIGKILL" in caplog.text


def test_one_that_does_not_answer_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queue_process, "PATIENCE", 0.1)
    with closing(World()) as world:
        os.kill(world.process.pid, signal.SIGSTOP)
        assert world.process.recall() == Return({})
        assert f"process {world.process.pid} does not give its queues back" in caplog.text
        assert not psutil.pid_exists(world.process.pid)


def test_one_that_will_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: the end of a pipe that ends it was its own to close, or to set otherwise; and who
    waited for its end waited for ever.
    """
    monkeypatch.setattr(queue_process, "PATIENCE", 0.3)

    def serve() -> Serving:
        for fd in range(3, 4096):
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, 0)
                if _link(fd).startswith("pipe"):
                    os.close(fd)
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            signal.pause()

    with closing(World(serve=serve)) as world:
        time.sleep(0.1)
        assert world.process.recall() == Return({})
        assert not psutil.pid_exists(world.process.pid)


def test_one_that_talks_without_end_is_not_listened_to_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Defect: the time began anew with everything that it said."""
    monkeypatch.setattr(queue_process, "PATIENCE", 0.3)

    with closing(World(serve=raw({"stats": {"x": 1}}, again=True))) as world:
        wait_until(world.loop, lambda: bool(world.stats))
        before = time.monotonic()
        assert world.process.recall() == Return({})
        assert time.monotonic() - before < 20


def test_it_ends_with_the_process_that_it_was_forked_from(tmp_path: Path) -> None:
    """At once and without a last turn: somebody else may have its queues a moment later."""
    need_linux()
    script = """
import os, sys, time
from collections import Counter
from vq.loop import Loop
from vq.queue_process import QueueProcess, Serving
from vq.vring import Return
loop = Loop()
process = QueueProcess(
    (2,), loop,
    lambda: Serving(lambda *_: None, lambda: open(sys.argv[1], "w"), Counter()),
    on_stats=print, on_return=print,
)
print(process.pid, flush=True)
time.sleep(60)
"""
    trace = tmp_path / "in order"
    argv = [sys.executable, "-c", script, str(trace)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            process = psutil.Process(int(parent.stdout.readline()))
            time.sleep(0.1)
        finally:
            parent.kill()
    with suppress(psutil.NoSuchProcess):
        process.wait(10)
    assert not trace.exists(), "it went on after its parent's death"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_for_the_service_are_not_for_it(number: int) -> None:
    with closing(World()) as world:
        os.kill(world.process.pid, number)
        time.sleep(0.05)
        assert world.process.recall() == Return(POSITIONS)


def test_a_signal_in_the_moment_of_the_fork_ends_nobody_but_whom_it_is_for() -> None:
    """Before the forked process ignores it, it is as the other one: its handler, and what is above
    it on the stack, are not its own.
    """
    script = """
import os, signal, sys
from collections import Counter
from vq.loop import Loop
from vq.queue_process import QueueProcess, Serving
from vq.vring import Return
fork, parent = os.fork, os.getpid()
def interrupted():
    pid = fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return pid
os.fork = interrupted
try:
    process = QueueProcess(
        (2,), Loop(), lambda: Serving(lambda *_: None, lambda: Return({}), Counter()),
        on_stats=len, on_return=print,
    )
    process.recall()
finally:
    print("as the parent" if os.getpid() == parent else "as if it were the parent", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("as the parent\n", "")


def test_where_there_can_be_no_process_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("too many")

    monkeypatch.setattr(os, "fork", refuse)
    loop = Loop()
    with closing(loop), pytest.raises(OSError, match="too many"):
        World(loop=loop)


def test_one_that_cannot_be_listened_to_does_not_live() -> None:
    """Its queues go on here, and one ring has one master."""

    class Deaf(Loop):
        deaf = False

        def watch(self, fd: int, **callbacks: Any) -> None:
            if self.deaf and callbacks:
                raise OSError("no memory for another watch")
            super().watch(fd, **callbacks)

    loop = Deaf()
    loop.deaf = True
    with closing(loop), pytest.raises(OSError, match="another watch"):
        World(loop=loop)


# --- nonsense ------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"stats": {}, "rings": [[2, 1, 1, []]], "fault": None}


@pytest.mark.parametrize(
    "message",
    [
        b"\xff",
        b"{",
        b"[" * 100_000,
        b"5",
        [],
        {},
        {"stats": []},
        {"stats": {"x": -1}},
        {"stats": {"x": "many"}},
        {"stats": {"x": 1.5}},
        b'{"stats": {"x": NaN}}',
        {"stats": {"x": None}},
        {"stats": {"x": 1 << 64}},
        {"stats": {"x" * 100: 1}},
        {"stats": {"a line\nof its own": 1}},
        {"stats": {f"x{number}": 1 for number in range(1000)}},
        {"stats": {}, "rings": 5, "fault": None},
        {"stats": {}, "rings": [[2, 1, 1]], "fault": None},
        {"stats": {}, "rings": [[2, 0x10000, 1, []]], "fault": None},
        {"stats": {}, "rings": [[2, 1, -1, []]], "fault": None},
        {"stats": {}, "rings": [[2, 1, 1.0, []]], "fault": None},
        {"stats": {}, "rings": [[2, None, 1, []]], "fault": None},
        {"stats": {}, "rings": [[2, 1, 1, [0x10000]]], "fault": None},
        {"stats": {}, "rings": [[2, 1, 1, "7"]], "fault": None},
        {"stats": {}, "rings": [[4, 1, 1, []]], "fault": None},
        {"stats": {}, "rings": [["x", 1, 1, []]], "fault": None},
        {"stats": {}, "rings": [[2, 1, 1, []]]},
        GOOD | {"fault": 5},
        GOOD | {"fault": "error"},
        GOOD | {"fault": {"reason": "x", "why": "y"}},
        GOOD | {"fault": {"queue": "x"}},
        GOOD | {"fault": {"reason": 5}},
        GOOD | {"fault": {"reason": "x", "head": "y"}},
        GOOD | {"fault": {"error": ["x"]}},
    ],
    ids=lambda message: repr(message)[:50],
)
@pytest.mark.parametrize("asked", [False, True])
def test_a_message_that_makes_no_sense_ends_the_process_and_is_nobody_elses_error(
    message: object, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(World(serve=raw(message))) as world:
        returned = world.process.recall() if asked else world.wait()
        assert returned == Return({})
        assert f"process {world.process.pid} does not make sense, and is ended" in caplog.text
        assert not psutil.pid_exists(world.process.pid)


def test_names_are_counted_over_its_whole_life() -> None:
    """A process that a guest has taken over could otherwise fill the other one's memory."""
    messages = [{"stats": {f"{batch} {number}": 1 for number in range(50)}} for batch in range(50)]
    with closing(World(serve=raw(*messages))) as world:
        assert world.wait() == Return({})
        assert len(world.stats) <= 300


def test_what_is_left_out_is_not_known() -> None:
    with closing(World(serve=raw(GOOD))) as world:
        assert world.wait() == Return({2: Position(1, 1)})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.fixed_dictionaries(
        {"stats": json_values},
        optional={
            "rings": json_values | st.lists(st.tuples(*[json_values] * 4), max_size=3),
            "fault": json_values,
        },
    )
    | json_values
)
def test_no_message_raises_what_nobody_expects(message: object) -> None:
    """No process here: only what is understood of what it could say."""
    process = QueueProcess.__new__(QueueProcess)
    process.pid, process.queues = 1, frozenset((2, 3))
    process._names, process._on_stats = set(), lambda stats: None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process._socket = ours
        theirs.send(json.dumps(message).encode())
        returned = process._receive()
    if returned is not None:
        assert returned.positions.keys() <= {2, 3}
