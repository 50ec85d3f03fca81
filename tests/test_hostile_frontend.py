"""A hostile vhost-user frontend: over a hundred malformed messages, each at every moment.

After each: the process goes on, nothing failed inside, no descriptor or mapping is left over, the
guest's memory is as it was, and the next frontend is served.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from vhost_frontend import (
    LOG_ALL,
    REPLY_ACK,
    USER_BASE,
    VERSION_1,
    Frontend,
    GuestRing,
    Ram,
    Shouter,
    nothing_left_open,
)

from vq.loop import Loop
from vq.vhost_user import Connection

pytestmark = [
    pytest.mark.usefixtures("quick_collector"),
    pytest.mark.skipif(
        not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"),
        reason="the scripted frontend needs memfd and eventfd",
    ),
]

MQ, LOG_SHMFD, RARP, _, MTU, BACKEND_REQ = (1 << bit for bit in range(6))
CONFIG, SEND_FD, INFLIGHT, RESET_DEVICE, IN_BAND, MEM_SLOTS, STATUS, DEVICE_STATE = (
    1 << bit for bit in (9, 10, 12, 13, 14, 15, 16, 19)
)
EVERYTHING = MQ | LOG_SHMFD | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT | RESET_DEVICE
EVERYTHING |= MEM_SLOTS | STATUS

FORMS = {
    1: "",
    2: "Q",
    3: "",
    4: "",
    5: "IIQQQQ",
    6: "QQ",
    7: "",
    8: "II",
    9: "IIQQQQ",
    10: "II",
    11: "II",
    12: "Q",
    13: "Q",
    14: "Q",
    15: "",
    16: "Q",
    17: "",
    18: "II",
    21: "",
    24: "IIII",
    25: "IIII",
    31: "QQHHI",
    32: "QQHHI",
    34: "",
    36: "",
    37: "QQQQQ",
    38: "QQQQQ",
    39: "Q",
    40: "",
}
"""Payloads by request (QEMU's docs/interop/vhost-user.rst)."""
TAKES_FD = {5: 1, 6: 1, 7: 1, 12: 1, 13: 1, 14: 1, 21: 1, 32: 1, 37: 1}
NAMES = {
    1: "GET_FEATURES",
    2: "SET_FEATURES",
    3: "SET_OWNER",
    4: "RESET_OWNER",
    5: "SET_MEM_TABLE",
    6: "SET_LOG_BASE",
    7: "SET_LOG_FD",
    8: "SET_VRING_NUM",
    9: "SET_VRING_ADDR",
    10: "SET_VRING_BASE",
    11: "GET_VRING_BASE",
    12: "SET_VRING_KICK",
    13: "SET_VRING_CALL",
    14: "SET_VRING_ERR",
    15: "GET_PROTOCOL_FEATURES",
    16: "SET_PROTOCOL_FEATURES",
    17: "GET_QUEUE_NUM",
    18: "SET_VRING_ENABLE",
    21: "SET_BACKEND_REQ_FD",
    24: "GET_CONFIG",
    25: "SET_CONFIG",
    31: "GET_INFLIGHT_FD",
    32: "SET_INFLIGHT_FD",
    34: "RESET_DEVICE",
    36: "GET_MAX_MEM_SLOTS",
    37: "ADD_MEM_REG",
    38: "REM_MEM_REG",
    39: "SET_STATUS",
    40: "GET_STATUS",
}
PAGE = 0x1000
TOP = (1 << 64) - 1


class Bad(NamedTuple):
    """A message; `fds` are kinds of descriptors: memory, event, socket, pipe, closed end."""

    data: bytes
    fds: str = ""


def message(request: int, payload: bytes = b"", fds: str = "", flags: int = 1) -> Bad:
    return Bad(struct.pack("=3I", request, flags, len(payload)) + payload, fds)


def numbers(request: int, *values: int, fds: str | None = None) -> Bad:
    """A message of the right form with these numbers, and by default the right descriptors."""
    kinds = {5: "m", 6: "m", 7: "e", 12: "e", 13: "e", 14: "e", 21: "s", 32: "m", 37: "m"}
    payload = struct.pack("=" + FORMS[request], *values)
    return message(request, payload, kinds.get(request, "") if fds is None else fds)


def right_payload(request: int) -> bytes:
    return bytes(struct.calcsize("=" + FORMS[request]))


def all_messages() -> dict[str, Bad]:
    bad: dict[str, Bad] = {}
    for request, name in NAMES.items():
        right = right_payload(request)
        fds = "m" * TAKES_FD.get(request, 0)
        if right:
            bad[f"{name}: no payload"] = message(request, fds=fds)
            bad[f"{name}: a payload that is a byte short"] = message(request, right[:-1], fds)
        bad[f"{name}: a payload that is a byte too long"] = message(request, right + b"\0", fds)
        bad[f"{name}: a payload of a page"] = message(request, bytes(PAGE), fds)
        bad[f"{name}: descriptors that nobody asked for"] = message(request, right, "mmmm")
        if fds and request not in (12, 13, 14, 5):
            bad[f"{name}: no descriptor"] = message(request, right)
        bad[f"{name}: as a reply"] = message(request, right, fds, flags=5)
        bad[f"{name}: of another version"] = message(request, right, fds, flags=2)
        bad[f"{name}: half of it"] = Bad(message(request, right + b"xx").data[:-1], fds)
    for request in (0, 19, 22, 23, 26, 28, 29, 30, 43, 45, 77, 0xFFFF, 0xFFFFFFFF):
        bad[f"request {request}, which is none or not offered"] = message(request, bytes(8))
    bad |= {
        "rubbish": Bad(b"GET / HTTP/1.1\r\n\r\n"),
        "zeros": Bad(bytes(64)),
        "ones": Bad(b"\xff" * 64),
        "a payload of 4 GiB is announced": Bad(struct.pack("=3I", 2, 1, 0xFFFFFFFF)),
        "a header and nothing else": Bad(struct.pack("=3I", 2, 1, 8)),
        "more descriptors than a message can have": message(1, fds="m" * 100),
        "SET_FEATURES: bits that nobody offered": numbers(2, TOP),
        "SET_FEATURES: other bits later on": numbers(2, VERSION_1 | 1 << 28),
        "SET_PROTOCOL_FEATURES: bits that nobody offered": numbers(16, TOP),
        "SET_PROTOCOL_FEATURES: IN_BAND alone": numbers(16, IN_BAND),
        "SET_MEM_TABLE: nine regions, one is there": message(
            5, struct.pack("=II", 9, 0) + bytes(32), "m"
        ),
        "SET_MEM_TABLE: 2^32 - 1 regions": message(5, struct.pack("=II", 0xFFFFFFFF, 0), "m"),
        "SET_MEM_TABLE: an empty region": numbers(5, 1, 0, 0, 0, USER_BASE, 0),
        "SET_MEM_TABLE: larger than its file": numbers(5, 1, 0, 0, 1 << 40, USER_BASE, 0),
        "SET_MEM_TABLE: all of 2^64": numbers(5, 1, 0, 0, TOP, 0, 0),
        "SET_MEM_TABLE: an offset beyond the file": numbers(5, 1, 0, 0, PAGE, USER_BASE, 1 << 40),
        "SET_MEM_TABLE: an offset that wraps": numbers(5, 1, 0, 0, PAGE, USER_BASE, TOP),
        "SET_MEM_TABLE: a guest address that wraps": numbers(5, 1, 0, TOP, PAGE, USER_BASE, 0),
        "SET_MEM_TABLE: a user address that wraps": numbers(5, 1, 0, 0, PAGE, TOP, 0),
        "SET_MEM_TABLE: two regions over each other": message(
            5, struct.pack("=II8Q", 2, 0, 0, 8192, 0, 0, 4096, 8192, 1 << 20, 0), "mm"
        ),
        "SET_MEM_TABLE: a pipe for memory": numbers(5, 1, 0, 0, PAGE, USER_BASE, 0, fds="p"),
        "SET_MEM_TABLE: a socket for memory": numbers(5, 1, 0, 0, PAGE, USER_BASE, 0, fds="s"),
        "SET_MEM_TABLE: a read-only file": numbers(5, 1, 0, 0, PAGE, USER_BASE, 0, fds="r"),
        "ADD_MEM_REG: over one that is there": numbers(37, 0, 0, PAGE, USER_BASE, 0),
        "ADD_MEM_REG: an empty region": numbers(37, 0, 1 << 40, 0, 1 << 40, 0),
        "ADD_MEM_REG: all of 2^64": numbers(37, 0, 0, TOP, 0, 0),
        "REM_MEM_REG: one that is not there": numbers(38, 0, 1 << 40, PAGE, 1 << 40, 0),
        "SET_LOG_BASE: larger than its file": numbers(6, 1 << 40, 0),
        "SET_LOG_BASE: an offset that wraps": numbers(6, PAGE, TOP),
        "SET_LOG_BASE: nothing": numbers(6, 0, 0),
        "SET_LOG_BASE: a pipe": numbers(6, PAGE, 0, fds="p"),
        "SET_VRING_NUM: 0": numbers(8, 1, 0),
        "SET_VRING_NUM: 3": numbers(8, 1, 3),
        "SET_VRING_NUM: 65536": numbers(8, 1, 65536),
        "SET_VRING_NUM: of a ring that is not there": numbers(8, 2, 16),
        "SET_VRING_NUM: of ring 2^32 - 1": numbers(8, 0xFFFFFFFF, 16),
        "SET_VRING_NUM: another for a ring that runs": numbers(8, 0, 64),
        "SET_VRING_ADDR: of a ring that is not there": numbers(9, 2, 0, 0, 0, 0, 0),
        "SET_VRING_ADDR: flags that are none": numbers(9, 1, 0xFE, USER_BASE, USER_BASE, 0, 0),
        "SET_VRING_ADDR: at 0": numbers(9, 1, 0, 0, 0, 0, 0),
        "SET_VRING_ADDR: behind the memory": numbers(9, 1, 0, *[USER_BASE + (1 << 20)] * 3, 0),
        "SET_VRING_ADDR: at the end of the world": numbers(9, 1, 0, TOP, TOP, TOP, 0),
        "SET_VRING_ADDR: a log elsewhere": numbers(9, 1, 1, *[USER_BASE] * 3, 1 << 40),
        "SET_VRING_BASE: beyond 16 bits": numbers(10, 1, 0x10000),
        "SET_VRING_BASE: of a ring that runs": numbers(10, 0, 7),
        "SET_VRING_BASE: of a ring that is not there": numbers(10, 9, 0),
        "GET_VRING_BASE: of a ring that is not there": numbers(11, 9, 0),
        "SET_VRING_KICK: of a ring that is not there": numbers(12, 9),
        "SET_VRING_KICK: with and without a descriptor": numbers(12, 0x100),
        "SET_VRING_KICK: neither": numbers(12, 0, fds=""),
        "SET_VRING_KICK: memory": numbers(12, 1, fds="m"),
        "SET_VRING_KICK: a closed pipe": numbers(12, 1, fds="c"),
        "SET_VRING_KICK: bits that mean nothing": numbers(12, TOP, fds=""),
        "SET_VRING_CALL: of a ring that is not there": numbers(13, 9),
        "SET_VRING_CALL: memory": numbers(13, 0, fds="m"),
        "SET_VRING_ERR: of a ring that is not there": numbers(14, 9),
        "SET_VRING_ENABLE: neither on nor off": numbers(18, 0, 2),
        "SET_VRING_ENABLE: of a ring that is not there": numbers(18, 9, 1),
        "SET_BACKEND_REQ_FD: a pipe": numbers(21, fds="p"),
        "SET_BACKEND_REQ_FD: memory": numbers(21, fds="m"),
        "SET_BACKEND_REQ_FD: two of them": numbers(21, fds="ss"),
        "GET_CONFIG: beyond what there can be": numbers(24, 0xFFFFFFFF, 4, 0, 0),
        "GET_CONFIG: another size than the payload": numbers(24, 0, 200, 0, 0),
        "SET_CONFIG: beyond what there can be": numbers(25, 0xFFFFFFF0, 4, 0, 0),
        "SET_CONFIG: flags that are none": numbers(25, 0, 4, 99, 0),
        "GET_INFLIGHT_FD: no queue": numbers(31, 0, 0, 0, 16, 0),
        "GET_INFLIGHT_FD: more queues than there are": numbers(31, 0, 0, 99, 16, 0),
        "GET_INFLIGHT_FD: queues of 65535": numbers(31, 0, 0, 1, 65535, 0),
        "SET_INFLIGHT_FD: larger than its file": numbers(32, 1 << 40, 0, 1, 16, 0),
        "SET_INFLIGHT_FD: smaller than its notes": numbers(32, 8, 0, 1, 16, 0),
        "SET_INFLIGHT_FD: an offset that wraps": numbers(32, 1024, TOP, 1, 16, 0),
        "SET_INFLIGHT_FD: a socket": numbers(32, 1024, 0, 1, 16, 0, fds="s"),
        "SET_STATUS: wider than a byte": numbers(39, 0x100),
        "SET_STATUS: all bits": numbers(39, 0xFF),
        "SET_STATUS: DRIVER_OK first": numbers(39, 4),
    }
    return bad


MESSAGES = all_messages()
MOMENTS = ("at once", "negotiated", "running")


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    """One descriptor of each kind."""
    memory = os.memfd_create("hostile")
    os.ftruncate(memory, 1 << 20)
    reader, writer = os.pipe()
    dead, other = os.pipe()
    os.close(other)
    one, two = socket.socketpair()
    found = {
        "m": memory,
        "e": os.eventfd(0),
        "s": one.fileno(),
        "p": reader,
        "c": dead,
        "r": os.open(f"/proc/self/fd/{memory}", os.O_RDONLY),
    }
    yield found
    one.detach()
    two.close()
    for fd in {*found.values(), writer}:
        os.close(fd)


class Host:
    """A device, its loop, and frontends that come one after another."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.device = Shouter()
        self.ram = Ram()
        self.ram.bytes[0x40000:] = os.urandom(len(self.ram.bytes) - 0x40000)

    def connect(self) -> tuple[Frontend, Connection]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(theirs, self.device, self.loop, offered=EVERYTHING)
        return Frontend(self.loop, ours), connection

    def bring(self, frontend: Frontend, moment: str) -> GuestRing:
        """To the moment at which the bad message comes."""
        ring = GuestRing(self.ram)
        if moment != "at once":
            frontend.negotiate(VERSION_1 | LOG_ALL, protocol=EVERYTHING)
        if moment == "running":
            frontend.send(39, struct.pack("=Q", 11))
            frontend.set_memory(self.ram)
            frontend.start_ring(0, ring)
            frontend.send(39, struct.pack("=Q", 15))
            ring.offer(b"before")
            frontend.kick()
            assert ring.take() == [b"BEFORE"]
        return ring

    def close(self) -> None:
        self.ram.close()
        self.loop.close()


@pytest.mark.parametrize("what", MESSAGES)
def test_a_malformed_message_harms_nobody(
    what: str, fds: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    bad = MESSAGES[what]
    with nothing_left_open():
        host = Host()
        for moment in MOMENTS:
            frontend, connection = host.connect()
            ring = host.bring(frontend, moment)
            rest = bytes(host.ram.bytes[0x40000:])
            with contextlib.suppress(BrokenPipeError):
                frontend.send_raw(bad.data, [fds[kind] for kind in bad.fds])
            frontend.turn()
            if moment == "running":  # what it did before goes on, or the connection is gone
                with contextlib.suppress(OSError):
                    ring.offer(b"after")
                    frontend.kick()
                assert connection.closed or ring.take() in ([], [b"AFTER"])
            assert bytes(host.ram.bytes[0x40000:]) == rest, "memory outside the lent buffers"
            frontend.close()
            host.loop.run_once(0)
            assert connection.closed
            host.ram.bytes[:0x40000] = bytes(0x40000)
        frontend, connection = host.connect()
        ring = host.bring(frontend, "running")
        frontend.close()
        connection.close()
        host.close()
    assert "ERROR" not in {record.levelname for record in caplog.records}, caplog.text
    assert "Traceback" not in caplog.text


def test_there_are_over_a_hundred_of_them() -> None:
    assert len(MESSAGES) > 250
    assert len({bad for bad in MESSAGES.values()}) > 200
