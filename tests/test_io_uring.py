"""Many requests to the kernel at a time."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import socket
import struct
from array import array
from collections.abc import Iterator

import pytest

from vq import io_uring
from vq.gather import IoVectors
from vq.io_uring import Opcode, RequestRing
from vq.testing.requirements import need_linux, unmet
from vq.testing.served import wait_until


def ring(fd: int, *opcodes: Opcode, count: int = 8) -> RequestRing:
    need_linux()
    try:
        return RequestRing(fd, opcodes, count)
    except OSError as error:
        unmet(f"this kernel has no io_uring for us: {error}")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Datagrams, so that each request is one of them, as with a tap."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


def point(
    requests: RequestRing, first: int, texts: list[bytes]
) -> list[ctypes.Array[ctypes.c_char]]:
    buffers = [ctypes.create_string_buffer(text, len(text)) for text in texts]
    end = first + len(texts)
    requests.addresses[first:end] = array("Q", [ctypes.addressof(b) for b in buffers])
    requests.lengths[first:end] = array("I", [len(b) for b in buffers])
    return buffers


def test_requests_are_done_in_their_order_round_and_round(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE, Opcode.READ)
    for turn in range(40):
        count = turn % 8 + 1
        texts = [b"%d %d" % (turn, n) + bytes(n) for n in range(count)]
        buffers = point(requests, 0, texts)
        assert requests.submit(0, count).tolist() == [len(text) for text in texts]
        assert [far.recv(100) for _ in texts] == texts
        for text in texts[1:]:
            far.send(text)
        buffers = point(requests, 8, [bytes(20)] * count)
        lengths = [len(text) for text in texts[1:]]
        assert requests.submit(8, count).tolist() == [*lengths, -errno.EAGAIN]
        assert [b.raw[:n] for b, n in zip(buffers, lengths, strict=False)] == texts[1:]
    requests.close()


def test_requests_with_one_result_are_done_round_and_round(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Whatever was left in the ring of completions by those before, which had the same result."""
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE, Opcode.READ)
    for turn in range(60):
        count = turn % 8 + 1
        texts = [b"%02d %d" % (turn, n) for n in range(count)]
        buffers = point(requests, 0, texts)
        results = requests.submit_alike(0, count, 4)
        # Round the end of the ring there is no comparing.
        assert results is None or (results.tolist() == [4] * count and turn > 2)
        assert [far.recv(100) for _ in texts] == texts
        point(requests, 8, [bytes(8)] * 2)
        assert (
            list(requests.submit_alike(8, 2, -errno.EAGAIN) or [-errno.EAGAIN] * 2)
            == [-errno.EAGAIN] * 2
        )
        assert buffers
    requests.close()


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_where_one_result_is_another_all_are_told(
    pair: tuple[socket.socket, socket.socket], odd: int
) -> None:
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    for text in (b"text", b"longer"):
        texts = [b"text"] * 3
        texts[odd] = text
        buffers = point(requests, 0, texts)
        results = requests.submit_alike(0, 3, 4)
        assert results is None if text == b"text" else list(results or ()) == list(map(len, texts))
        assert [far.recv(100) for _ in texts] == texts and buffers
    point(requests, 0, [b"text"] * 3)
    requests.addresses[odd] = 1 << 12
    results = requests.submit_alike(0, 3, 4)
    assert results is not None and results[odd] == -errno.EFAULT
    assert sum(results) == 4 + 4 - errno.EFAULT
    requests.close()


def test_fewer_requests_than_asked_for_are_told(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind them in the ring is from before, and may look the same."""
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    buffers = point(requests, 0, [b"text"] * 8)
    for _ in range(4):  # all of the ring
        assert requests.submit_alike(0, 8, 4) is None
    enter = requests._enter
    monkeypatch.setattr(requests, "_enter", lambda count, *more: enter(min(count, 5), *more))
    results = requests.submit_alike(0, 8, 4)
    assert results is not None and results.tolist() == [4] * 5
    monkeypatch.undo()
    assert list(requests.submit_alike(0, 8, 4) or [4] * 8) == [4] * 8
    for _ in range(4 * 8 + 5 + 8):
        assert far.recv(100) == b"text"
    with pytest.raises(BlockingIOError):
        far.recv(100)
    assert buffers
    requests.close()


def test_a_request_may_be_of_many_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE, Opcode.WRITEV)
    texts = [b"in", b" ", b"pieces", b"alone", b"two", b"more"]
    buffers = [ctypes.create_string_buffer(text, len(text)) for text in texts]
    vectors = IoVectors(6)
    vectors.put(0, [ctypes.addressof(b) for b in buffers], [len(b) for b in buffers])
    requests.addresses[8:11] = vectors.places([3, 1, 2])
    requests.lengths[8:11] = array("I", [3, 1, 2])
    assert requests.submit(8, 3).tolist() == [9, 5, 7]
    assert [far.recv(100) for _ in range(3)] == [b"in pieces", b"alone", b"twomore"]
    requests.close()


def test_a_read_that_finds_nothing_is_not_left_waiting(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """What comes later must not be written to memory that is somebody else's by then."""
    near, far = pair
    requests = ring(near.fileno(), Opcode.READ)
    buffers = point(requests, 0, [b"mine"] * 8)
    assert requests.submit(0, 8).tolist() == [-errno.EAGAIN] * 8
    far.send(b"late")
    assert all(b.raw == b"mine" for b in buffers)
    assert near.recv(100) == b"late"
    requests.close()


def test_even_a_blocking_file_does_not_make_it_wait() -> None:
    reading, writing = os.pipe()
    requests = ring(reading, Opcode.READ)
    point(requests, 0, [b"mine"])
    assert requests.submit(0, 1).tolist() in ([-errno.EAGAIN], [-errno.EOPNOTSUPP])
    requests.close()
    os.close(reading)
    os.close(writing)


def test_memory_that_is_not_there_fails_one_request_only(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    buffers = point(requests, 0, [b"one", b"two", b"three"])
    requests.addresses[1] = 1 << 12
    assert requests.submit(0, 3).tolist() == [3, -errno.EFAULT, 5]
    assert [far.recv(100), far.recv(100)] == [b"one", b"three"]
    requests.close()
    assert buffers


@pytest.mark.parametrize(
    ("opcode", "flags", "name"),
    [(18, 1, "openat"), (23, 1, "write"), (22, 0, "read of any file"), (22, 1 | 4, "linked read")],
)
def test_a_ring_can_be_used_for_nothing_else(
    pair: tuple[socket.socket, socket.socket], opcode: int, flags: int, name: str
) -> None:
    """What io_uring does is not seen by seccomp: a sandbox relies on this."""
    near, far = pair
    requests = ring(near.fileno(), Opcode.READ)
    far.send(b"hello")
    buffers = point(requests, 0, [bytes(8)])
    assert bytes(requests._entries[:2]) == bytes([22, 1])
    requests._entries[:2] = bytes([opcode, flags])
    assert requests.submit(0, 1).tolist() == [-errno.EACCES], name
    requests._entries[:2] = bytes([22, 1])
    assert requests.submit(0, 1).tolist() == [5] and buffers[0].raw == b"hello\0\0\0"
    with pytest.raises(OSError, match="ermission"):
        requests._register(io_uring._REGISTER_FILES, struct.pack("=i", far.fileno()), 1)
    requests.close()


def test_answers_out_of_turn_are_put_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    numbers = [2, 0, 3, 1]
    place = requests._words[requests._done] & (requests._completions - 1)
    for offset, number in enumerate(numbers):
        requests._who[place + offset] = number
        requests._results[place + offset] = 100 + number
    assert requests._collect(0, 4).tolist() == [100, 101, 102, 103]
    requests.close()


def test_a_closed_ring_leaves_nothing_open(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    ring(near.fileno(), Opcode.READ).close()
    gc.collect()  # what other tests have left is not ours
    before = os.listdir("/proc/self/fd")
    requests = ring(near.fileno(), Opcode.READ, Opcode.WRITE)
    requests.close()
    requests.close()
    ring(near.fileno(), Opcode.READ)  # and one that was only forgotten
    gc.collect()
    assert os.listdir("/proc/self/fd") == before
    near.close()

    def nobody_holds_the_other_end() -> bool:
        try:
            far.send(b"x", socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    wait_until(nobody_holds_the_other_end, "the kernel lets go of a closed ring's files")


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_a_kernel_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(answer, "refused")

    monkeypatch.setattr(RequestRing, "_call", refused)
    with pytest.raises(OSError, match="refused"):
        RequestRing(0, (Opcode.READ,), 8)


def test_a_kernel_that_is_too_old_is_an_error(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    ring(near.fileno(), Opcode.READ).close()
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(io_uring, "_FEAT_CQE_SKIP", 1 << 31)
    with pytest.raises(OSError, match="too old"):
        RequestRing(near.fileno(), (Opcode.READ,), 8)
    assert os.listdir("/proc/self/fd") == before


def test_the_structures_have_the_sizes_of_the_headers() -> None:
    """uapi/linux/io_uring.h"""
    assert io_uring._ENTRY.size == 64
    assert io_uring._PARAMS.size == 120
    entry = io_uring._ENTRY.pack(22, 1, 0, 5, (1 << 64) - 1, 0x1000, 64, 8, 9)
    assert struct.unpack_from("<BBHi", entry) == (22, 1, 0, 5)
    assert struct.unpack_from("<QQIIQ", entry, 8) == ((1 << 64) - 1, 0x1000, 64, 8, 9)


@pytest.mark.parametrize("moment", ["before the kernel has it", "before it is collected"])
def test_a_process_that_shares_a_ring_and_dies_in_the_middle_leaves_nothing_behind(
    pair: tuple[socket.socket, socket.socket], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: what it had not collected was taken for the results of the next requests, what it had
    not started was started with them.
    """
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    child = os.fork()
    if child == 0:
        dies = "_enter" if moment == "before the kernel has it" else "_collect"
        monkeypatch.setattr(requests, dies, lambda *_: os._exit(0))
        buffers = point(requests, 0, [b"its first", b"and second"])
        requests.submit(0, len(buffers))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    started = [b"its first", b"and second"] if moment == "before it is collected" else []
    assert [far.recv(100) for _ in started] == started
    requests.forget()
    for turn in range(40):
        texts = [b"%d" % turn, b"%d more" % turn, b"%d and more" % turn]
        buffers = point(requests, 0, texts)
        assert requests.submit(0, 3).tolist() == [len(text) for text in texts]
        assert [far.recv(100) for _ in buffers] == texts
    with pytest.raises(BlockingIOError):
        far.recv(100)
    requests.close()


def test_a_call_that_was_interrupted_is_made_again(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pair
    requests = ring(near.fileno(), Opcode.WRITE)
    buffers = point(requests, 0, [b"one", b"two"])
    syscall, failures = requests._syscall, [errno.EINTR, errno.EINTR]

    def interrupted(*arguments: object) -> int:
        if not failures:
            return int(syscall(*arguments))
        ctypes.set_errno(failures.pop())
        return -1

    monkeypatch.setattr(requests, "_syscall", interrupted)
    assert requests.submit(0, 2).tolist() == [3, 3] and buffers
    assert [far.recv(9), far.recv(9)] == [b"one", b"two"] and not failures
    failures.append(errno.EPERM)
    with pytest.raises(PermissionError):
        requests.submit(0, 2)
    assert requests.submit(0, 1).tolist() == [3]
    monkeypatch.undo()
    requests.close()
