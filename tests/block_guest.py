"""A scripted driver of block devices, written from the specification: requests in any framing."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vq.driver import Driver, Transport
from vq.memory import GuestMemory

# virtio 1.3, 5.2.6
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTOR = 512
UNTOUCHED = 0xEE
SECONDS = 30.0


def a_range(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, count, flags)


class Answer(NamedTuple):
    """What the device made of a request; no `status` for one without room for it."""

    status: int | None
    data: bytes
    written: int


@dataclass(eq=False)
class Sent:
    """A request in flight."""

    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class BlockGuest:
    """A driver that is up. `wait` lets the device work until it has something for us."""

    def __init__(
        self,
        transport: Transport,
        memory: GuestMemory,
        *,
        wait: Callable[[], object],
        features: int = -1,
    ) -> None:
        self.memory = memory
        self.wait = wait
        self.driver = Driver(transport, memory, wanted_features=features)
        self.driver.probe()

    @property
    def capacity(self) -> int:
        return int.from_bytes(self.driver.read_config(0, 8), "little")

    def config(self, offset: int, length: int) -> int:
        return int.from_bytes(self.driver.read_config(offset, length), "little")

    def buffers(self, total: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
        """Buffers of `total` bytes together, cut after so many bytes each, apart in memory."""
        sizes, left = [], total
        for size in cuts:
            if 0 < size < left:
                sizes.append(size)
                left -= size
        if left:
            sizes.append(left)
        return [(self.driver.allocator.allocate(size + 1), size) for size in sizes]

    def send(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        room: int = 0,
        status: bool = True,
        header: bytes | None = None,
        readable_cuts: Sequence[int] = (16,),
        writable_cuts: Sequence[int] | None = None,
        queue: int = 0,
        kick: bool = True,
    ) -> Sent:
        """Puts a request in a queue; its parts go into buffers of the sizes that are given."""
        readable = (struct.pack("<IIQ", kind, 0, sector) if header is None else header) + data
        total = room + status
        into = self.buffers(total, (room,) if writable_cuts is None else writable_cuts)
        out = self.buffers(len(readable), readable_cuts)
        position = 0
        for gpa, size in out:
            self.memory.write(gpa, readable[position : position + size])
            position += size
        for gpa, size in into:
            self.memory.write(gpa, bytes([UNTOUCHED]) * (size + 1))
        sent = Sent(out, into)
        self.driver.queues[queue].add(out, into, token=sent)
        if kick:
            self.driver.kick(queue)
        return sent

    def answers(self, queue: int = 0) -> list[Answer]:
        return [answer for _, answer in self.answered(queue)]

    def answered(self, queue: int = 0) -> list[tuple[Sent, Answer]]:
        """The requests that came back, in the order in which they did."""
        found = []
        for used in self.driver.queues[queue].collect():
            sent: Sent = used.token
            data = b"".join(self.memory.read(gpa, size) for gpa, size in sent.writable)
            for gpa, size in sent.writable:
                assert self.memory.read(gpa + size, 1)[0] == UNTOUCHED, "behind a buffer"
            for gpa, _ in (*sent.readable, *sent.writable):
                self.driver.allocator.free(gpa)
            status = data[-1] if data else None
            found.append((sent, Answer(status, data[:-1], used.written)))
        return found

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", **how: object) -> Answer:
        """One request, and its answer."""
        self.send(kind, sector, data, **how)  # type: ignore[arg-type]
        deadline = time.monotonic() + SECONDS
        while not (answers := self.answers(int(how.get("queue", 0)))):  # type: ignore[call-overload]
            assert time.monotonic() < deadline, "no answer"
            self.wait()
        (answer,) = answers
        return answer

    def read(self, sector: int, count: int, **how: object) -> bytes:
        answer = self.ask(IN, sector, room=count * SECTOR, **how)
        assert (answer.status, answer.written) == (OK, count * SECTOR + 1)
        return answer.data

    def write(self, sector: int, data: bytes, **how: object) -> None:
        assert self.ask(OUT, sector, data, **how) == (OK, b"", 1)
