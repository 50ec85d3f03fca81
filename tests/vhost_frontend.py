"""A scripted vhost-user frontend and a guest's ring, for the transport's tests.

Nothing of the codec or of the ring under test is used: messages and rings are packed by hand.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import psutil

from vq.device import Device, Queue
from vq.loop import Loop
from vq.split_ring import SplitRing

USER_BASE = 0x7F00_0000_0000
"""Where the frontend claims to have mapped the guest's memory."""
PAGE = 4096
VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
LOG_ALL = 1 << 26
REPLY_ACK = 1 << 3


class Shouter(Device):
    """Answers each chain with its text in capitals. Queue 1 keeps chains until told."""

    device_id = 4

    def __init__(self, *, queues: int = 2, size: int = 64) -> None:
        class Space(ctypes.LittleEndianStructure):
            _fields_ = (("number", ctypes.c_uint32), ("volume", ctypes.c_uint32))

        super().__init__(
            features=VERSION_1 | 1 << 29 | 1 << 28,
            queues=[(f"q{index}", size) for index in range(queues)],
            config=Space(number=0x11223344, volume=5),
        )
        self.held: list[object] = []
        self.hold = False
        self.writes: list[tuple[int, bytes]] = []

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        for chain in ring.pop_burst(16):
            if self.hold:
                self.held.append(chain)
                continue
            text = b"".join(bytes(view) for view in chain.readable).upper()
            chain.writable[0][: len(text)] = text
            chain.written = len(text)
            ring.write_used(chain)
        self.publish(queue)
        return self.rest(queue, ring)

    def queue_stopping(self, queue: Queue) -> None:
        if self.held and queue.ring is not None:
            queue.ring.undo_pop(self.held)  # type: ignore[arg-type]
        self.held = []

    def queue_dropped(self, queue: Queue) -> None:
        self.held = []

    def write_config(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))


class Ram:
    """Guest memory in a memfd, mapped here."""

    def __init__(self, size: int = 1 << 20, gpa: int = 0, user: int = USER_BASE) -> None:
        self.size, self.gpa, self.user = size, gpa, user
        self.fd = os.memfd_create("test-ram")
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)

    def describe(self, **changes: int) -> tuple[int, int, int, int]:
        values = {"gpa": self.gpa, "size": self.size, "user": self.user, "offset": 0, **changes}
        return values["gpa"], values["size"], values["user"], values["offset"]

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


class GuestRing:
    """The driver's side of one small split ring at a fixed place in a `Ram`."""

    def __init__(self, ram: Ram, at: int = 0x10000, size: int = 16) -> None:
        self.ram, self.size = ram, size
        self.desc, self.avail, self.used = at, at + 0x1000, at + 0x2000
        self.buffers = at + 0x4000
        self.avail_idx = 0
        self.seen = 0

    def offer(self, text: bytes, *, gpa: int | None = None) -> None:
        slot = self.avail_idx % (self.size // 2)
        source = self.buffers + slot * 256
        target = source + 128
        self.ram.bytes[source : source + len(text)] = text
        head = 2 * slot
        struct.pack_into(
            "<QIHH", self.ram.bytes, self.desc + 16 * head, source, len(text), 1, head + 1
        )
        struct.pack_into(
            "<QIHH",
            self.ram.bytes,
            self.desc + 16 * head + 16,
            target if gpa is None else gpa,
            128,
            2,
            0,
        )
        struct.pack_into(
            "<H", self.ram.bytes, self.avail + 4 + 2 * (self.avail_idx % self.size), head
        )
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        struct.pack_into("<H", self.ram.bytes, self.avail + 2, self.avail_idx)

    def start_at(self, position: int) -> None:
        """As if so many chains had come and gone before."""
        self.avail_idx = self.seen = position
        struct.pack_into("<H", self.ram.bytes, self.avail + 2, position)
        struct.pack_into("<H", self.ram.bytes, self.used + 2, position)

    @property
    def used_idx(self) -> int:
        return int(struct.unpack_from("<H", self.ram.bytes, self.used + 2)[0])

    def take(self) -> list[bytes]:
        """What came back since the last time."""
        texts = []
        while self.seen != self.used_idx:
            place = self.used + 4 + 8 * (self.seen % self.size)
            head, length = struct.unpack_from("<II", self.ram.bytes, place)
            (target,) = struct.unpack_from("<Q", self.ram.bytes, self.desc + 16 * (head + 1))
            texts.append(bytes(self.ram.bytes[target : target + length]))
            self.seen = (self.seen + 1) & 0xFFFF
        return texts


class Frontend:
    """The frontend's end of a connection; `turn` lets the backend, in the same thread, work."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.socket = sock
        sock.setblocking(False)
        self.eventfds: dict[tuple[str, int], int] = {}

    # --- messages -------------------------------------------------------------------------------

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1
    ) -> None:
        self.send_raw(struct.pack("=3I", request, flags, len(payload)) + payload, fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.socket.sendmsg([data], rights) == len(data)

    def turn(self, count: int = 8) -> None:
        for _ in range(count):
            self.loop.run_once(0)

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        """The next reply: request, flags, payload, descriptors."""
        self.turn()
        data, fds = self._receive(12)
        request, flags, size = struct.unpack("=3I", data)
        payload = b""
        if size:
            payload, more = self._receive(size)
            fds += more
        return request, flags, payload, fds

    def _receive(self, size: int) -> tuple[bytes, list[int]]:
        data, fds = b"", list[int]()
        deadline = time.monotonic() + 5
        while len(data) < size:
            assert time.monotonic() < deadline, "no reply"
            try:
                piece, new, _, _ = socket.recv_fds(self.socket, size - len(data), 8)
            except BlockingIOError:
                self.loop.run_once(0.01)
                continue
            assert piece, "the backend closed the connection"
            data += piece
            fds += new
        return data, fds

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Sends a request that has a reply of its own, and gives the reply's payload."""
        self.send(request, payload, fds)
        got, flags, answer, new = self.receive()
        assert (got, flags) == (request, 5), (got, flags)
        for fd in new:
            os.close(fd)
        return answer

    def ask_u64(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        return int(struct.unpack("=Q", self.ask(request, payload, fds))[0])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Sends a request with need_reply, and gives the acknowledgement."""
        self.send(request, payload, fds, flags=9)
        got, flags, answer, _ = self.receive()
        assert (got, flags) == (request, 5)
        return int(struct.unpack("=Q", answer)[0])

    @property
    def is_dropped(self) -> bool:
        """Whether the backend closed the connection."""
        self.turn()
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    if not self.socket.recv(4096):
                        return True
                except ConnectionError:
                    return True
        return False

    # --- what frontends do -----------------------------------------------------------------------

    def negotiate(self, features: int = VERSION_1, protocol: int = REPLY_ACK) -> None:
        self.send(3)
        self.ask_u64(1)
        self.ask_u64(15)
        self.send(16, struct.pack("=Q", protocol))
        self.send(2, struct.pack("=Q", features | PROTOCOL_FEATURES))

    def set_memory(self, *rams: Ram) -> None:
        payload = struct.pack("=2I", len(rams), 0)
        payload += b"".join(struct.pack("=4Q", *ram.describe()) for ram in rams)
        self.send(5, payload, [ram.fd for ram in rams])

    def set_addresses(self, index: int, ring: GuestRing, flags: int = 0) -> None:
        desc, used, avail = (
            ring.ram.user + part - ring.ram.gpa for part in (ring.desc, ring.used, ring.avail)
        )
        self.send(9, struct.pack("=2I4Q", index, flags, desc, used, avail, ring.used))

    def event(self, kind: str, index: int) -> int:
        """The eventfd of a ring for "kick", "call" or "err", made anew."""
        old = self.eventfds.pop((kind, index), None)
        if old is not None:
            os.close(old)
        fd = self.eventfds[kind, index] = os.eventfd(0, os.EFD_NONBLOCK)
        return fd

    def start_ring(
        self, index: int, ring: GuestRing, base: int = 0, *, enable: bool = True
    ) -> None:
        self.send(8, struct.pack("=2I", index, ring.size))
        self.send(10, struct.pack("=2I", index, base))
        self.set_addresses(index, ring)
        self.send(13, struct.pack("=Q", index), [self.event("call", index)])
        self.send(12, struct.pack("=Q", index), [self.event("kick", index)])
        if enable:
            self.send(18, struct.pack("=2I", index, 1))
        self.turn()

    def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE: the position to go on from."""
        got, base = struct.unpack("=2I", self.ask(11, struct.pack("=2I", index, 0)))
        assert got == index
        return int(base)

    def kick(self, index: int = 0) -> None:
        os.eventfd_write(self.eventfds["kick", index], 1)
        self.turn()

    def called(self, index: int = 0, kind: str = "call") -> int:
        """How many events of that kind came since the last time."""
        try:
            return os.eventfd_read(self.eventfds[kind, index])
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.socket.close()
        for fd in self.eventfds.values():
            os.close(fd)
        self.eventfds.clear()
        self.turn()


def wait_until(loop: Loop, condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        loop.run_once(0.01)


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    """After this the process has no more descriptors and shared mappings than before."""
    before = open_things()
    yield
    if any(now > then for now, then in zip(_count_open(), before, strict=True)):
        assert all(now <= then for now, then in zip(open_things(), before, strict=True)), "leaked"


def open_things() -> tuple[int, int]:
    """How many descriptors and shared mappings this process has."""
    gc.collect()  # neither what earlier tests left in cycles counts, nor what a traceback holds
    return _count_open()


def _count_open() -> tuple[int, int]:
    process = psutil.Process()
    with open("/proc/self/maps") as maps:
        mappings = sum("memfd:" in line for line in maps)
    return process.num_fds(), mappings
