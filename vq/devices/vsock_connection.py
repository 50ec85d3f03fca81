"""One end of a vsock connection as a state machine without I/O (virtio 1.3, 5.10.6).

`Header` is a packet's header. `Connection` is told what came from the peer (`receive`), what became
of the bytes (`forwarded`), and what the user of the connection wants (`sent`, `shutdown`, `reset`);
it says how many bytes may be sent (`credit`) and which packets are due (`next_control`). Payloads
do not come here. Either side of a connection can be one of these: they have no favourites.

Each side counts, modulo 2^32, the bytes that it sent and those that it has passed on, and tells the
other of the latter and of its buffer's size in every header. So nobody sends what the other has no
room for, and what is due never piles up: there is one packet of each kind at most.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Self

from vq.abi_vsock import (
    VSOCK_HDR,
    VSOCK_HDR_SIZE,
    VsockOp,
    VsockShutdown,
    VsockType,
)

__all__ = ["Connection", "Header", "State"]

_COUNTER = 0xFFFFFFFF


class Header(NamedTuple):
    """`struct virtio_vsock_hdr`, 44 bytes (virtio 1.3, 5.10.6)."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int = 0
    type: int = VsockType.STREAM
    op: int = VsockOp.INVALID
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The header that `data`, 44 bytes, stands for."""
        return cls._make(VSOCK_HDR.unpack(data))

    def pack(self) -> bytes:
        """The header's 44 bytes."""
        return VSOCK_HDR.pack(*self)

    def reset(self) -> Header:
        """The header of the RST that answers this one."""
        return Header(
            src_cid=self.dst_cid,
            dst_cid=self.src_cid,
            src_port=self.dst_port,
            dst_port=self.src_port,
            type=self.type,
            op=VsockOp.RST,
        )


assert VSOCK_HDR.size == VSOCK_HDR_SIZE


class State(enum.Enum):
    """How far a connection is."""

    REQUESTED = enum.auto()
    """The peer was asked, and has not answered."""
    ESTABLISHED = enum.auto()
    CLOSED = enum.auto()
    """Over for both sides, once the packets that are due have gone."""


class Connection:
    """One end. `local` and `peer` are (CID, port) addresses.

    `buffer` is how many bytes of payload this end keeps at most until they are passed on. `asking`
    makes the one who sends the REQUEST; the other side is made when that has come, and is given its
    header with `receive`.
    """

    def __init__(
        self,
        local: tuple[int, int],
        peer: tuple[int, int],
        *,
        buffer: int,
        asking: bool,
        type: int = VsockType.STREAM,
    ) -> None:
        self.local = local
        self.peer = peer
        self.buffer = buffer
        self.type = type
        self.state = State.REQUESTED if asking else State.ESTABLISHED
        self.fault: str | None = None
        """What the peer did against the rules, if it did."""
        self.local_shutdown = VsockShutdown.NONE
        """What this end has said that it will not do any more."""
        self.peer_shutdown = VsockShutdown.NONE
        """What the other end has said."""
        self._due: dict[VsockOp, None] = {VsockOp.REQUEST if asking else VsockOp.RESPONSE: None}
        self._asked = asking  # nothing can come before the answer; else the REQUEST is to come
        self._received = 0  # bytes that came, and of these, that were passed on
        self._forwarded = 0
        self._told = 0  # what the peer knows of the latter
        self._sent = 0
        self._peer_buffer = 0
        self._peer_forwarded = 0

    # --- what came --------------------------------------------------------------------------------

    def receive(self, header: Header) -> int:
        """A packet of this connection has come; returns how many bytes of its payload to take.

        A peer that breaks a rule is reset, with the reason in `fault`.
        """
        if self.state is State.CLOSED:
            return 0
        if header.op == VsockOp.RST:
            self._close()
            return 0
        if header.type != self.type:
            self._broken(f"a packet of type {header.type} in a connection of type {self.type}")
            return 0
        self._peer_buffer = header.buf_alloc
        self._peer_forwarded = header.fwd_cnt
        if self.state is State.REQUESTED:
            if header.op == VsockOp.RESPONSE:
                self.state = State.ESTABLISHED
            else:
                self._broken(f"operation {header.op} instead of an answer")
            return 0
        if header.op == VsockOp.REQUEST and not self._asked:
            self._asked = True
        elif header.op == VsockOp.RW:
            return self._receive_data(header.len)
        elif header.op == VsockOp.SHUTDOWN:
            self.peer_shutdown |= VsockShutdown(header.flags & VsockShutdown.BOTH)
            self._finish()
        elif header.op == VsockOp.CREDIT_REQUEST:
            self._due[VsockOp.CREDIT_UPDATE] = None
        elif header.op != VsockOp.CREDIT_UPDATE:
            self._broken(f"operation {header.op} in an established connection")
        return 0

    def _receive_data(self, length: int) -> int:
        if self.peer_shutdown & VsockShutdown.SEND:
            self._broken("data after a shutdown")
        elif length > self.buffer - self.waiting:
            self._broken(f"{length} bytes where there is room for {self.buffer - self.waiting}")
        else:
            self._received = (self._received + length) & _COUNTER
            return length
        return 0

    def _broken(self, fault: str) -> None:
        self.fault = fault
        self.reset()

    # --- what became of it ------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Bytes that came and were not passed on yet."""
        return (self._received - self._forwarded) & _COUNTER

    def forwarded(self, count: int) -> None:
        """`count` bytes were passed on: there is room for as many again."""
        self._forwarded = (self._forwarded + count) & _COUNTER
        # Seldom enough to be cheap, early enough that a peer that keeps sending need not stop.
        if (self._forwarded - self._told) & _COUNTER >= self.buffer // 4 and self._may_receive:
            self._due[VsockOp.CREDIT_UPDATE] = None
        self._finish()

    @property
    def _may_receive(self) -> bool:
        return self.state is State.ESTABLISHED and not self.peer_shutdown & VsockShutdown.SEND

    def _finish(self) -> None:
        """The answer to a peer that is done with both directions, once all it sent is passed on."""
        if self.peer_shutdown == VsockShutdown.BOTH and not self.waiting:
            self.reset()

    # --- what is wanted here ----------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """How many bytes may be sent now."""
        if (
            self.state is not State.ESTABLISHED
            or self.local_shutdown & VsockShutdown.SEND
            or self.peer_shutdown & VsockShutdown.RECEIVE
        ):
            return 0
        return max(0, self._peer_buffer - ((self._sent - self._peer_forwarded) & _COUNTER))

    def data(self, length: int, *, flags: int = 0) -> Header:
        """The header of a packet with the next `length` bytes, at most `credit`."""
        header = self._header(VsockOp.RW, length, flags)
        self._sent = (self._sent + length) & _COUNTER
        return header

    def ask_for_credit(self) -> None:
        """There is something to send but no room: the peer is asked how things stand."""
        if self.state is State.ESTABLISHED:
            self._due[VsockOp.CREDIT_REQUEST] = None

    def shutdown(self, what: VsockShutdown) -> None:
        """This end will not send, or receive, any more."""
        new = what & ~self.local_shutdown
        if self.state is State.ESTABLISHED and new:
            self.local_shutdown |= what
            self._due[VsockOp.SHUTDOWN] = None

    def reset(self) -> None:
        """Ends the connection for both sides, whatever was under way."""
        if self.state is not State.CLOSED:
            self._close()
            self._due[VsockOp.RST] = None

    def _close(self) -> None:
        self.state = State.CLOSED
        self._due.clear()

    # --- what is due ------------------------------------------------------------------------------

    @property
    def has_control(self) -> bool:
        """Whether there is a packet for `next_control`."""
        return bool(self._due)

    def next_control(self) -> Header | None:
        """The next packet without payload that is to be sent, oldest first; None without any."""
        if not self._due:
            return None
        op = next(iter(self._due))
        del self._due[op]
        return self._header(op, 0, self.local_shutdown if op == VsockOp.SHUTDOWN else 0)

    def _header(self, op: VsockOp, length: int, flags: int) -> Header:
        self._told = self._forwarded
        self._due.pop(VsockOp.CREDIT_UPDATE, None)  # every header has what it would say
        return Header(
            src_cid=self.local[0],
            dst_cid=self.peer[0],
            src_port=self.local[1],
            dst_port=self.peer[1],
            len=length,
            type=self.type,
            op=op,
            flags=flags,
            buf_alloc=self.buffer,
            fwd_cnt=self._forwarded,
        )
