"""Helper and worker: their messages, a tap whose settings are another process's, their ends."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vq.errors import UsageError
from vq.exit_status import describe_end
from vq.link import NullLink, Port, Tap
from vq.loop import Loop
from vq.offload import ALL, Offload
from vq.privsep import Connector, Helper, SeparatedTap, Worker
from vq.privsep.channel import MOST_UNSENT, Channel, channel_pair
from vq.privsep.connector import answer
from vq.privsep.message import (
    MAX_SIZE,
    Connect,
    Connected,
    Look,
    Message,
    MessageError,
    Ready,
    SetOffloads,
    TapState,
    decode,
    encode,
)
from vq.unix_socket import Listener

SECONDS = 30.0


# --- messages ------------------------------------------------------------------------------------

places = st.integers(0, 0xFFFF)
generations = st.integers(0, 0xFFFFFFFF)
numbers = st.none() | generations
offloads = st.integers(0, int(ALL)).map(Offload)
messages = st.one_of(
    st.builds(SetOffloads, places, generations, offloads),
    st.builds(Look, places),
    st.just(Ready()),
    st.builds(Connect, places, numbers),
    st.builds(
        TapState, places, generations, places, offloads, generations, st.booleans(), st.booleans()
    ),
    st.builds(Connected, places, places, st.text(max_size=100), numbers),
)


@given(messages)
def test_a_message_is_the_same_on_the_other_side(message: Message) -> None:
    data = encode(message)
    assert len(data) <= MAX_SIZE
    assert decode(data) == message


@given(
    st.one_of(st.binary(max_size=64), st.tuples(messages.map(encode), st.binary()).map(b"".join))
)
def test_other_bytes_are_no_message(data: bytes) -> None:
    try:
        message = decode(data)
    except MessageError:
        return
    assert encode(message) == data, "two ways to say the same"


@given(messages, st.data())
def test_a_message_with_a_bit_turned_is_another_or_none(
    message: Message, data: st.DataObject
) -> None:
    changed = bytearray(encode(message))
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with suppress(MessageError):
        assert decode(bytes(changed)) != message


def test_the_messages_bytes() -> None:
    assert encode(SetOffloads(1, 0x01020304, Offload.CSUM | Offload.TSO4)) == struct.pack(
        "=HHIIIHH", 1, 1, 0x01020304, 3, 0, 0, 0
    )
    assert encode(TapState(2, 7, 22, Offload.TSO6, 1500, True)) == struct.pack(
        "=HHIIIHH", 5, 2, 7, 4, 1500, 22, 1
    )
    assert encode(Connect(2)) == struct.pack("=HHIIIHH", 4, 2, 0, 0, 0, 0, 0)
    assert encode(Connect(2, 5000)) == struct.pack("=HHIIIHH", 4, 2, 5000, 0, 0, 0, 2)
    assert encode(Connected(3, 111, "no")) == struct.pack("=HHIIIHH", 6, 3, 0, 0, 0, 111, 0) + b"no"


def test_words_that_are_too_long_are_cut_between_letters() -> None:
    words = decode(encode(Connected(0, 1, "ü" * 1000)))
    assert isinstance(words, Connected) and set(words.words) == {"ü"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a message of 0 bytes"),
        (struct.pack("=HHIIIHH", 9, 0, 0, 0, 0, 0, 0), "of kind 9"),
        (struct.pack("=HHIIIHH", 1, 0, 0, 64, 0, 0, 0), "offloads 0x40"),
        (struct.pack("=HHIIIHH", 3, 0, 0, 0, 0, 0, 8), "flags 0x8"),
        (struct.pack("=HHIIIHH", 3, 0, 0, 0, 0, 0, 2), "a Ready with more in it"),
        (struct.pack("=HHIIIHH", 4, 1, 9, 0, 0, 0, 0), "a Connect with more in it"),
        (struct.pack("=HHIIIHH", 3, 1, 0, 0, 0, 0, 0), "a Ready with more in it"),
        (encode(Ready()) + b"x", "a Ready with more in it"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        decode(data)


# --- a separated tap -----------------------------------------------------------------------------


class FakeTap(Tap):
    """A tap whose kernel knows CSUM, TSO4 and TSO6, and does at once what it is asked."""

    name = "tap7"
    min_frame = 14

    def __init__(self, known: Offload = Offload.CSUM | Offload.TSO4 | Offload.TSO6) -> None:
        self.ports: tuple[Port, ...] = tuple(NullLink(ports=2).ports)
        self.accepts = known
        self.kernel = Offload.NONE
        """What the kernel's frames may come with."""
        self.up = True
        self.present_mtu = 1500
        self.left = False
        self.refuses = 0
        self.expect(Offload.NONE, 1500)

    def request_offloads(self, wanted: Offload) -> None:
        assert not self.left, "an ioctl in the worker"
        if self.refuses:
            raise OSError(self.refuses, "refused")
        self.kernel = wanted & self.accepts
        self.expect(self.kernel, self.present_mtu)

    def expect(self, delivers: Offload, mtu: int | None) -> None:
        self.delivers = delivers
        self.max_frame = 262144 if delivers & ~Offload.CSUM else 22 + (mtu or 0)

    def leave_control(self, on_truncated: Callable[[], None]) -> None:
        self.left = True
        self.on_truncated = on_truncated

    @property
    def is_up(self) -> bool:
        assert not self.left, "an ioctl in the worker"
        return self.up

    @property
    def mtu(self) -> int:
        assert not self.left, "an ioctl in the worker"
        return self.present_mtu

    def close(self) -> None:
        pass


class SeparatedTapMachine(RuleBasedStateMachine):
    """A device that changes its mind at any time, and a helper that answers at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = FakeTap()
        self.link = SeparatedTap(self.tap, 3)
        self.asked: deque[Message] = deque()
        self.kernel = Offload.NONE
        self.kernel_mtu = 1500
        self.said = 0
        self.wanted = Offload.NONE
        self.answers: deque[TapState] = deque()
        self.link.leave_control(self.asked.append)

    @rule(wanted=offloads)
    def the_device_asks(self, wanted: Offload) -> None:
        self.link.request_offloads(wanted)
        self.wanted = wanted

    @precondition(lambda self: self.asked)
    @rule(error=st.sampled_from([0, 0, 0, errno.ENODEV]))
    def the_helper_does_it(self, error: int) -> None:
        request = self.asked.popleft()
        if isinstance(request, SetOffloads):
            assert request.tap == 3
            if not error:
                self.kernel = request.offloads & self.tap.accepts
            self.say(request.generation, error)
        else:
            self.say(0, 0)

    def say(self, generation: int, error: int) -> None:
        self.answers.append(TapState(3, generation, error, self.kernel, self.kernel_mtu, True))

    @rule(mtu=st.sampled_from([576, 1500, 9000]))
    def somebody_sets_the_mtu(self, mtu: int) -> None:
        self.kernel_mtu = mtu
        self.said += 1
        self.say(0, 0)

    @precondition(lambda self: self.answers)
    @rule()
    def the_answer_arrives(self) -> None:
        self.link.told(self.answers.popleft())

    @rule()
    def a_frame_is_too_long(self) -> None:
        self.tap.on_truncated()

    @invariant()
    def frames_with_more_left_undone_never_surprise(self) -> None:
        assert self.kernel & ~self.link.delivers == Offload.NONE
        if self.kernel & ~Offload.CSUM:
            assert self.link.max_frame > 65536

    @invariant()
    def little_is_under_way(self) -> None:
        """However often a guest changes its mind."""
        assert sum(isinstance(message, SetOffloads) for message in self.asked) <= 1
        # What the helper says by itself may be taken for the answer to a look.
        assert sum(isinstance(message, Look) for message in self.asked) <= 1 + self.said

    def teardown(self) -> None:
        while self.asked or self.answers:
            if self.asked:
                self.the_helper_does_it(0)
            self.link.told(self.answers.popleft())
        assert self.link.mtu == self.kernel_mtu
        # Where nothing is under way the last wish holds; one that was refused, what was before.
        assert self.link.delivers == self.kernel


TestSeparatedTap = SeparatedTapMachine.TestCase
TestSeparatedTap.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def separated() -> tuple[SeparatedTap, FakeTap, list[Message]]:
    tap = FakeTap()
    link = SeparatedTap(tap, 0)
    asked: list[Message] = []
    link.leave_control(asked.append)
    return link, tap, asked


def test_before_they_part_a_separated_tap_is_the_tap() -> None:
    tap = FakeTap()
    link = SeparatedTap(tap, 0)
    link.request_offloads(ALL)
    assert link.delivers == tap.kernel == tap.accepts
    assert (link.mtu, link.is_up, link.name) == (1500, True, "tap7")


def test_a_late_answer_changes_nothing_for_a_device_that_was_reset_since() -> None:
    link, _, asked = separated()
    link.request_offloads(Offload.CSUM | Offload.TSO4)
    link.request_offloads(Offload.NONE)  # as a device does when it is reset
    (late,) = asked
    assert isinstance(late, SetOffloads)
    link.told(TapState(0, late.generation, 0, late.offloads, 1500, True))
    newest = asked[-1]
    assert isinstance(newest, SetOffloads)
    assert (newest.offloads, newest.generation > late.generation) == (Offload.NONE, True)
    # Until that is answered frames may come as the last one had it.
    assert link.delivers == Offload.CSUM | Offload.TSO4
    link.told(TapState(0, newest.generation, 0, Offload.NONE, 1500, True))
    assert link.delivers == Offload.NONE
    link.told(TapState(0, late.generation, 0, late.offloads, 1500, True))
    assert link.delivers == Offload.NONE, "once more, from long ago"


def test_generations_begin_anew_without_the_one_that_is_none() -> None:
    link, _, asked = separated()
    link._generation = 0xFFFFFFFF
    link.request_offloads(Offload.CSUM)
    assert isinstance(asked[-1], SetOffloads) and asked[-1].generation == 1


def test_an_interface_that_is_gone_is_down() -> None:
    class Gone(FakeTap):
        @property
        def mtu(self) -> int:
            raise OSError(errno.ENODEV, "gone")

    link = SeparatedTap(Gone(), 0)
    link.leave_control([].append)
    assert (link.is_up, link.mtu) == (False, None)


def test_a_tap_that_was_made_again_is_taken_up(caplog: pytest.LogCaptureFixture) -> None:
    """The worker's descriptors are of the new one: all that was asked for is to be asked again."""

    class Again(FakeTap):
        attached_again = 0

        def was_attached_again(self) -> None:
            self.attached_again += 1

    tap = Again()
    link, asked = SeparatedTap(tap, 0), list[Message]()
    changes: list[bool] = []

    def changed() -> None:
        changes.append(link.is_up)
        link.request_offloads(Offload.TSO4 | Offload.CSUM)

    link.on_change = changed
    link.leave_control(asked.append)
    gone = TapState(0, 0, 0, Offload.NONE, 0, up=False, gone=True)
    link.told(gone)
    link.told(gone)
    link.recover()
    assert not link.is_up and not changes and not asked
    link.told(gone._replace(gone=False, up=True, mtu=9000))
    assert (tap.attached_again, changes, link.mtu) == (1, [True], 9000)
    assert asked == [SetOffloads(0, 1, Offload.TSO4 | Offload.CSUM)]
    link.told(gone._replace(gone=False, up=True, mtu=9000))
    assert len(changes) == 1


def test_a_worker_that_begins_without_its_tap_takes_up_the_next_one() -> None:
    class Gone(FakeTap):
        is_gone = True

    link = SeparatedTap(Gone(), 0)
    changes: list[bool] = []
    link.on_change = lambda: changes.append(link.is_up)
    link.leave_control([].append)
    link.told(TapState(0, 0, 0, Offload.NONE, 1500, True))
    assert changes == [True]


def test_a_tap_that_is_ones_own_is_looked_for() -> None:
    class Again(FakeTap):
        there = False

        def attach_again(self) -> bool:
            return self.there

    tap = Again()
    link = SeparatedTap(tap, 0)
    changes: list[bool] = []
    link.on_change = lambda: changes.append(link.is_up)
    link.recover()
    tap.there = True
    link.recover()
    assert changes == [True]


def test_what_the_host_refuses_is_told(caplog: pytest.LogCaptureFixture) -> None:
    link, _, asked = separated()
    link.request_offloads(Offload.CSUM)
    (request,) = asked
    assert isinstance(request, SetOffloads)
    link.told(TapState(0, request.generation, errno.EBADFD, Offload.NONE, 0, False))
    assert "tap7: the host refused" in caplog.text
    assert link.delivers == Offload.NONE and not link.is_up


# --- channels and connections --------------------------------------------------------------------


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def turn(loop: Loop, done: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        loop.run_once(0.05)


def test_messages_and_descriptors_go_both_ways_and_the_end_is_noticed(loop: Loop) -> None:
    heard: dict[str, list[Message]] = {"left": [], "right": []}
    ends: list[MessageError | None] = []
    one, other = channel_pair()
    left = Channel(one, loop, heard["left"].append, ends.append)
    right = Channel(other, loop, heard["right"].append, ends.append)
    for number in range(100):
        left.send(Look(number))
    right.send(Ready())
    turn(loop, lambda: len(heard["right"]) == 100 and heard["left"])
    assert heard["right"] == [Look(number) for number in range(100)]
    left.close()
    turn(loop, lambda: ends)
    assert ends == [None]
    right.send(Ready(), os.dup(0))  # to nobody: the descriptor is closed all the same
    right.close()


def test_a_full_socket_keeps_messages_in_order(loop: Loop) -> None:
    one, other = channel_pair()
    heard: list[Message] = []
    sender = Channel(one, loop, heard.append, lambda _: None)
    for number in range(5000):
        sender.send(Look(number))
    receiver = Channel(other, loop, heard.append, lambda _: None)
    turn(loop, lambda: len(heard) == 5000)
    assert heard == [Look(number) for number in range(5000)]
    sender.close()
    receiver.close()


def test_who_does_not_listen_is_not_listened_to(loop: Loop) -> None:
    """A worker in a guest's hands asks and asks: the helper's memory does not grow."""
    one, other = channel_pair()
    heard = 0

    def answer_it(_: Message) -> None:
        nonlocal heard
        heard += 1
        channel.send(Look(0))

    channel = Channel(one, loop, answer_it, lambda _: None)
    sent = after = 0
    ends = time.monotonic() + SECONDS
    while after < 1000:
        assert time.monotonic() < ends
        after += len(channel._unsent) >= MOST_UNSENT
        with suppress(BlockingIOError):
            other.send(encode(Look(1)))
            sent += 1
        loop.run_once(0)
    assert len(channel._unsent) == MOST_UNSENT and heard < sent
    while True:  # it listens after all, and everything is answered
        with suppress(BlockingIOError):
            while other.recv(MAX_SIZE):
                pass
        if heard == sent and not channel._unsent:
            break
        assert time.monotonic() < ends + SECONDS
        loop.run_once(0)
    channel.close()
    other.close()


def test_bytes_that_are_no_message_end_a_channel(loop: Loop) -> None:
    one, other = channel_pair()
    ends: list[MessageError | None] = []
    Channel(one, loop, lambda _: None, ends.append)
    with other:
        other.send(b"nonsense")
        turn(loop, lambda: ends)
        assert isinstance(ends[0], MessageError)
        assert other.recv(1) == b"", "hung up"


@pytest.fixture
def separated_connector() -> Iterator[Callable[[Connector], None]]:
    """Has a connector ask a helper, a process of its own, from now on."""
    ends: list[tuple[socket.socket, int]] = []

    def separate(connector: Connector) -> None:
        ours, theirs = channel_pair()
        child = os.fork()
        if child == 0:  # the helper
            ours.close()
            theirs.setblocking(True)
            while data := theirs.recv(MAX_SIZE):
                message = decode(data)
                assert isinstance(message, Connect)
                reply, fd = answer(connector, message)
                socket.send_fds(theirs, [encode(reply)], [fd] if fd >= 0 else [])
            os._exit(0)
        theirs.close()
        connector.leave_control(ours)
        ends.append((ours, child))

    yield separate
    for ours, child in ends:
        ours.close()
        assert os.waitpid(child, 0)[1] == 0


Separate = Callable[[Connector], None]


def check_connection(connector: Connector, path: str) -> None:
    """There is none, and then there is one."""
    with pytest.raises(OSError, match="nobody listens at"):
        connector.connect(path)
    with closing(Listener(path)) as listener, connector.connect(path) as connection:
        with listener.socket.accept()[0] as accepted:
            connection.send(b"hello")
            assert accepted.recv(5) == b"hello"
        assert not connection.getblocking()
        assert not os.get_inheritable(connection.fileno())


def test_a_connector_connects_through_its_helper(
    tmp_path: Path, separated_connector: Separate
) -> None:
    path = str(tmp_path / "s")
    connector = Connector()
    connector.name(path)
    separated_connector(connector)
    check_connection(connector, path)
    with pytest.raises(PermissionError, match="was not named at the start"):
        connector.connect(str(tmp_path / "other"))


def test_a_connector_connects_to_a_family_through_its_helper(
    tmp_path: Path, separated_connector: Separate
) -> None:
    connector = Connector()
    connector.name_family(str(tmp_path / "other_"))
    connector.name_family(str(tmp_path / "s_"))
    separated_connector(connector)
    for number in (0, 1, 5000, 0xFFFFFFFF):
        check_connection(connector, str(tmp_path / f"s_{number}"))


@pytest.mark.parametrize(
    "rest",
    ["", "x", "-1", "+1", "01", "1 ", "1/2", "../s", "4294967296", "9" * 30, "\u0661", "1_0"],
)
def test_what_is_not_of_a_family_is_not_asked_for(
    rest: str, tmp_path: Path, separated_connector: Separate
) -> None:
    connector = Connector()
    connector.name_family(str(tmp_path / "s_"))
    separated_connector(connector)
    with pytest.raises(PermissionError, match="was not named at the start"):
        connector.connect(str(tmp_path / f"s_{rest}"))


@given(st.integers(0, 0xFFFFFFFF) | st.integers(0, 20), st.integers(0, 3))
def test_a_request_for_a_path_of_a_family_is_for_that_path(number: int, place: int) -> None:
    """Whatever the worker asks for is a path of a family that was named."""
    connector = Connector()
    for index in range(4):
        connector.name_family(f"/no/such/directory/{index}_")
    path = f"/no/such/directory/{place}_{number}"
    assert connector._request(path) == Connect(place, number)
    reply, fd = answer(connector, Connect(place, number))
    assert (reply.place, reply.number, reply.error, fd) == (place, number, errno.ENOENT, -1)
    assert path in reply.words


def test_connecting_to_a_family_without_a_helper_remembers_nothing(tmp_path: Path) -> None:
    """A guest may try four thousand million ports."""
    connector = Connector()
    connector.name_family(str(tmp_path / "s_"))
    for number in range(3):
        check_connection(connector, str(tmp_path / f"s_{number}"))
    assert connector.paths == []


def test_an_answer_that_comes_too_late_is_for_nobody_else() -> None:
    """The helper was slow once: its answer for one port is no connection to another."""
    connector = Connector()
    connector.name_family("/s_")
    ours, theirs = channel_pair()
    connector.leave_control(ours)
    late, wanted = socket.socketpair()
    with ours, theirs, late, wanted:
        socket.send_fds(theirs, [encode(Connected(0, 0, number=1))], [late.fileno()])
        socket.send_fds(theirs, [encode(Connected(0, 0))], [late.fileno()])
        socket.send_fds(theirs, [encode(Connected(0, 0, number=2))], [wanted.fileno()])
        with connector.connect("/s_2") as connection:
            late.send(b"to the wanted one")
            assert connection.recv(100) == b"to the wanted one"


def test_a_connector_refuses_paths_where_no_socket_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file"), "x" * 200, ""):
        with pytest.raises(UsageError):
            Connector().name(path)
    with pytest.raises(UsageError, match="empty"):
        Connector().name_family("")
    (tmp_path / "file_7").touch()
    named = Connector()
    named.name(str(tmp_path / "later"))
    (tmp_path / "later").touch()
    named.name_family(str(tmp_path / "file_"))
    assert answer(named, Connect(0))[0].error == errno.ENOTSOCK
    assert answer(named, Connect(0, 7))[0].error == errno.ENOTSOCK
    assert answer(named, Connect(1))[0].error == errno.EINVAL
    assert answer(named, Connect(1, 7))[0].error == errno.EINVAL


# --- helper and worker ---------------------------------------------------------------------------


class Run:
    """A helper in this process, with this work in its worker; `taps` are its own."""

    def __init__(self, work: Callable[[Worker, Loop], int], *taps: FakeTap, **how: Any) -> None:
        self.loop = Loop()
        self.taps = [SeparatedTap(tap, index) for index, tap in enumerate(taps)]
        self.ready = 0

        def in_worker(worker: Worker) -> int:
            loop = Loop()
            worker.attach(loop, loop.stop)
            return work(worker, loop)

        self.helper = Helper(self.loop, in_worker, taps=self.taps, on_ready=self.count_ready, **how)

    def count_ready(self) -> None:
        self.ready += 1

    def __call__(self) -> int:
        self.loop.call_later(SECONDS, self.loop.stop)
        status = self.helper.run()
        self.loop.close()
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return status


def test_the_workers_exit_status_is_the_helpers() -> None:
    for status in (0, 1, 2, 141):
        assert Run(lambda worker, loop, status=status: status)() == status  # type: ignore[misc]


def test_the_worker_is_ready_once_it_says_so() -> None:
    def work(worker: Worker, loop: Loop) -> int:
        worker.ready()
        loop.call_later(0.05, loop.stop)
        loop.run()
        return 0

    run = Run(work)
    assert (run(), run.ready) == (0, 1)


def test_who_stops_the_helper_ends_the_worker_in_order(tmp_path: Path) -> None:
    note = tmp_path / "note"

    def work(worker: Worker, loop: Loop) -> int:
        worker.ready()
        loop.run()
        note.write_text("in order")
        return 0

    run = Run(work)
    run.helper._on_ready = run.loop.stop
    assert run() == 0
    assert note.read_text() == "in order"


def test_signals_for_the_worker_are_passed_on(tmp_path: Path) -> None:
    note = tmp_path / "note"

    def work(worker: Worker, loop: Loop) -> int:
        signal.signal(signal.SIGHUP, lambda *_: loop.stop())
        worker.ready()
        loop.run()
        note.write_text("heard")
        return 0

    before = signal.getsignal(signal.SIGHUP)
    run = Run(work, signals=(signal.SIGHUP,))
    run.helper._on_ready = lambda: os.kill(os.getpid(), signal.SIGHUP)
    try:
        assert run() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert note.read_text() == "heard"


def test_a_worker_that_cannot_be_killed_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits in the kernel for a file system that its frontend serves (FUSE), and no longer does:
    the helper waited for its end for ever, too."""
    monkeypatch.setattr("vq.privsep.helper.PATIENCE", 0.1)

    def work(worker: Worker, loop: Loop) -> int:
        worker.ready()
        loop.run()
        return 0

    run = Run(work)
    run.helper._on_ready = run.loop.stop
    monkeypatch.setattr(run.helper, "_wait", lambda: False)
    began = time.monotonic()
    assert run.helper.run() == 1
    assert time.monotonic() - began < SECONDS / 2
    pid = run.helper._pid
    assert f"the worker cannot be killed: process {pid} is left behind" in caplog.text
    os.waitpid(pid, 0)
    run.loop.close()


def test_a_worker_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vq.privsep.helper.PATIENCE", 0.1)

    def work(worker: Worker, loop: Loop) -> int:
        worker.ready()
        loop.run_once(0)
        time.sleep(SECONDS)
        return 0

    run = Run(work)
    run.helper._on_ready = run.loop.stop
    assert run() == 1
    assert "the worker does not end, and is killed" in caplog.text


def test_offloads_are_set_by_the_helper_and_the_worker_hears_of_it(tmp_path: Path) -> None:
    note = tmp_path / "note"
    tap = FakeTap()
    run = Run(lambda worker, loop: 0, tap)
    link = run.taps[0]

    def work(worker: Worker) -> int:
        loop = Loop()
        worker.attach(loop, loop.stop)
        link.request_offloads(Offload.CSUM | Offload.TSO4 | Offload.USO4)
        deadline = time.monotonic() + SECONDS
        while link._asked is not None and time.monotonic() < deadline:
            loop.run_once(0.1)
        note.write_text(f"{int(link.delivers)} {link.mtu} {link.is_up}")
        return 0

    run.helper._work = work
    assert run() == 0
    assert note.read_text() == f"{int(Offload.CSUM | Offload.TSO4)} 1500 True"
    assert tap.kernel == Offload.CSUM | Offload.TSO4, "in the helper"


@pytest.mark.parametrize(
    ("message", "error"),
    [(SetOffloads(1, 5, Offload.CSUM), errno.ENODEV), (SetOffloads(9, 5, ALL), errno.ENODEV)],
)
def test_a_tap_that_is_not_there_is_refused(
    message: SetOffloads, error: int, tmp_path: Path
) -> None:
    note = tmp_path / "note"

    def work(worker: Worker, loop: Loop) -> int:
        assert worker._channel is not None
        worker._channel._on_message = lambda state: (
            note.write_text(repr(state)),  # type: ignore[func-returns-value]
            loop.stop(),
        )
        worker._send(message)
        loop.run()
        return 0

    tap = FakeTap()
    assert Run(work, tap)() == 0
    state = TapState(message.tap, 5, error, Offload.NONE, 0, False)
    assert note.read_text() == repr(state)
    assert tap.kernel == Offload.NONE


@pytest.mark.parametrize(
    "data", [b"nonsense", encode(TapState(0, 0, 0, ALL, 1500, True)), encode(Connected(0, 0))]
)
def test_a_worker_that_says_what_it_may_not_is_ended(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in somebody else's hands then."""

    def work(worker: Worker, loop: Loop) -> int:
        worker._socket.send(data)
        time.sleep(SECONDS)
        return 0

    assert Run(work)() == 1
    assert "asks for what cannot be, and is ended" in caplog.text


def test_changes_of_the_interface_reach_the_worker(tmp_path: Path) -> None:
    note = tmp_path / "note"
    tap = FakeTap()
    run = Run(lambda worker, loop: 0, tap)
    link = run.taps[0]

    def work(worker: Worker) -> int:
        loop = Loop()
        worker.attach(loop, loop.stop)
        worker.ready()
        deadline = time.monotonic() + SECONDS
        while link.mtu != 9000 and time.monotonic() < deadline:
            loop.run_once(0.1)
        note.write_text(f"{link.mtu} {link.is_up}")
        return 0

    def change() -> None:
        tap.present_mtu, tap.up = 9000, False

    run.helper._work = work
    run.helper._on_ready = change
    assert run() == 0
    assert note.read_text() == "9000 False"


def test_a_worker_that_dies_is_started_again_with_what_the_first_one_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lives = tmp_path / "lives"
    tap = FakeTap()
    run = Run(lambda worker, loop: 0, tap, restart=True)
    link = run.taps[0]

    def work(worker: Worker) -> int:
        loop = Loop()
        worker.attach(loop, loop.stop)
        with lives.open("a") as file:
            file.write(f"{int(link.delivers)} {int(tap.kernel)}\n")
        if len(lives.read_text().splitlines()) == 3:
            return 0
        link.request_offloads(Offload.CSUM)
        while link._asked is not None:
            loop.run_once(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    run.helper._work = work
    assert run() == 0
    assert lives.read_text() == "0 0\n" * 3, "what the last one wanted is nothing to the next"
    assert caplog.text.count("the worker was killed by SIGKILL") == 2
    assert caplog.text.count("the worker is started again") == 2


def test_one_that_dies_again_and_again_is_not_started_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[float] = []
    run = Run(lambda worker, loop: 1, restart=True)
    start = run.helper._start

    def note_start() -> None:
        starts.append(time.monotonic())
        if len(starts) == 5:
            run.loop.stop()
        else:
            start()

    monkeypatch.setattr(run.helper, "_start", note_start)
    run()
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[1] > 0.1 and pauses[2] > 0.2 and pauses[3] > 0.4


def test_memory_that_is_cut_short_kills_the_worker_alone_and_the_reason_is_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    lives = tmp_path / "lives"

    def work(worker: Worker, loop: Loop) -> int:
        with lives.open("a") as file:
            file.write("x")
        if lives.stat().st_size == 2:
            return 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with (tmp_path / "ram").open("w+b") as ram:
            ram.truncate(8192)
            mapped = mmap.mmap(ram.fileno(), 8192)
            ram.truncate(0)
            return mapped[5000]

    assert Run(work, restart=True)() == 0
    assert "killed by SIGBUS: memory that a guest shares was cut short under it" in caplog.text
    assert lives.read_text() == "xx"


def test_an_exception_in_the_worker_is_logged_and_ends_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work(worker: Worker, loop: Loop) -> int:
        logging.basicConfig(force=True)
        raise RuntimeError("a fault of ours")

    assert Run(work)() == 1
    assert "RuntimeError: a fault of ours" in capfd.readouterr().err


def test_the_worker_ends_when_its_helper_is_gone(tmp_path: Path) -> None:
    note = tmp_path / "note"
    readable, writable = os.pipe()
    helper = os.fork()
    if helper == 0:

        def work(worker: Worker, loop: Loop) -> int:
            os.write(writable, b"x")
            loop.run()
            note.write_text("in order")
            os.write(writable, b"y")
            return 0

        Run(work)()
        os._exit(0)
    os.close(writable)
    assert os.read(readable, 1) == b"x"
    os.kill(helper, signal.SIGKILL)
    os.waitpid(helper, 0)
    assert os.read(readable, 1) == b"y"
    assert os.read(readable, 1) == b"", "and so is the worker"
    os.close(readable)
    assert note.read_text() == "in order"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, (0, "")),
        (2 << 8, (2, "")),
        (1 << 8, (1, "the worker ended with status 1")),
        (
            signal.SIGKILL,
            (1, "killed by SIGKILL: somebody killed it, or the host ran out of memory"),
        ),
        (
            signal.SIGSYS | 0x80,
            (1, "killed by SIGSYS: it made a system call that is not on its list"),
        ),
        (signal.SIGUSR1, (1, "killed by SIGUSR1")),
        (70, (1, "killed by signal 70")),
    ],
)
def test_an_end_in_words(status: int, expected: tuple[int, str]) -> None:
    code, words = describe_end(status, "the worker")
    assert code == expected[0] and expected[1] in words
