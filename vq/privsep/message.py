"""What helper and worker say to each other: messages to bytes and back, without I/O.

They talk over a socket that keeps messages apart (SOCK_SEQPACKET), both ends of one program, so a
message is one structure in native byte order::

    u16 kind, u16 tap, u32 generation, u32 offloads, u32 mtu, u16 error, u16 flags

and a `Connected` carries the words of its error behind it. What does not apply is 0. In `Connect`
and `Connected` the second half word is a place among the sockets named at the start; with a flag it
is one among the families of sockets, and where the generation stands elsewhere is a number in that
family. The worker may be in a guest's hands: whatever comes from it is checked here, and refused
with `MessageError`.

====================  =================  ===========================================================
`SetOffloads`         worker to helper   let this tap leave this undone; answered by `TapState`
`Look`                worker to helper   how is this tap? answered by `TapState`
`Ready`               worker to helper   guests are served from now on
`Connect`             worker to helper   a connection to the socket of this place, please
`TapState`            helper to worker   what holds for a tap now
`Connected`           helper to worker   the connection, as a descriptor beside it, or the error
====================  =================  ===========================================================

A request to set offloads belongs to a `generation`: every reset of the device, and every change of
mind, begins a new one. An answer to an older one says nothing about what the device wants now.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple, TypeAlias

from vq.errors import VqError
from vq.offload import ALL, Offload

__all__ = [
    "MAX_SIZE",
    "Connect",
    "Connected",
    "Look",
    "Message",
    "MessageError",
    "Ready",
    "SetOffloads",
    "TapState",
    "decode",
    "encode",
]

_LAYOUT = struct.Struct("=HHIIIHH")
MAX_WORDS = 512
MAX_SIZE = _LAYOUT.size + MAX_WORDS
"""The longest message in bytes."""

if _LAYOUT.size != 20:
    raise ImportError("a message between helper and worker is not 20 bytes on this machine")

_UP = 1
_NUMBERED = 2
_GONE = 4
_FLAGS = _UP | _NUMBERED | _GONE


class _Kind(enum.IntEnum):
    SET_OFFLOADS = 1
    LOOK = 2
    READY = 3
    CONNECT = 4
    TAP_STATE = 5
    CONNECTED = 6


class MessageError(VqError):
    """The other process said something that is none of these messages."""


class SetOffloads(NamedTuple):
    """Let the tap of this index leave at most this undone in the frames that it gives."""

    tap: int
    generation: int
    offloads: Offload


class Look(NamedTuple):
    """Say how the tap of this index is."""

    tap: int


class Ready(NamedTuple):
    """The worker is confined, and serves."""


class Connect(NamedTuple):
    """A connection to one of the sockets named at the start."""

    place: int
    """Which of them; with a `number` which of the families."""
    number: int | None = None
    """Which of a family's sockets."""


class TapState(NamedTuple):
    """What holds for a tap."""

    tap: int
    generation: int
    """Of the request that this answers; 0 when there was none."""
    error: int
    """Why it was not done, an errno; 0 when it was."""
    delivers: Offload
    """What frames may come with from now on."""
    mtu: int
    """In bytes; 0 when it is not known."""
    up: bool
    gone: bool = False
    """Whether there is no such interface any more."""


class Connected(NamedTuple):
    """The answer to `Connect`: an errno and what is wrong in words, or 0 and a descriptor."""

    place: int
    error: int
    words: str = ""
    number: int | None = None


Message: TypeAlias = SetOffloads | Look | Ready | Connect | TapState | Connected


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    match message:
        case SetOffloads(tap, generation, offloads):
            return _LAYOUT.pack(_Kind.SET_OFFLOADS, tap, generation, int(offloads), 0, 0, 0)
        case Look(tap):
            return _LAYOUT.pack(_Kind.LOOK, tap, 0, 0, 0, 0, 0)
        case Ready():
            return _LAYOUT.pack(_Kind.READY, 0, 0, 0, 0, 0, 0)
        case Connect(place, number):
            flags = 0 if number is None else _NUMBERED
            return _LAYOUT.pack(_Kind.CONNECT, place, number or 0, 0, 0, 0, flags)
        case TapState(tap, generation, error, delivers, mtu, up, gone):
            flags = (_UP if up else 0) | (_GONE if gone else 0)
            return _LAYOUT.pack(_Kind.TAP_STATE, tap, generation, int(delivers), mtu, error, flags)
        case Connected(place, error, words, number):
            flags = 0 if number is None else _NUMBERED
            head = _LAYOUT.pack(_Kind.CONNECTED, place, number or 0, 0, 0, error, flags)
            return head + _short(words)


def decode(data: bytes) -> Message:
    """The message that these bytes are. Raises `MessageError` when they are none.

    Only what a message can be is checked: whether there is such a tap, and whether the sender may
    say this, is the receiver's to know.
    """
    if len(data) < _LAYOUT.size:
        raise MessageError(f"a message of {len(data)} bytes")
    kind, index, generation, offloads, mtu, error, flags = _LAYOUT.unpack_from(data)
    if offloads & ~int(ALL):
        raise MessageError(f"offloads {offloads:#x}, which are none")
    if flags & ~_FLAGS:
        raise MessageError(f"flags {flags:#x}")
    number = generation if flags & _NUMBERED else None
    words = data[_LAYOUT.size :]
    message: Message
    match kind:
        case _Kind.SET_OFFLOADS:
            message = SetOffloads(index, generation, Offload(offloads))
        case _Kind.LOOK:
            message = Look(index)
        case _Kind.READY:
            message = Ready()
        case _Kind.CONNECT:
            message = Connect(index, number)
        case _Kind.TAP_STATE:
            up, gone = bool(flags & _UP), bool(flags & _GONE)
            message = TapState(index, generation, error, Offload(offloads), mtu, up, gone)
        case _Kind.CONNECTED:
            message = Connected(index, error, words.decode(errors="replace"), number)
        case _:
            raise MessageError(f"a message of kind {kind}")
    if len(data) > MAX_SIZE or encode(message) != data:
        raise MessageError(f"a {type(message).__name__} with more in it than belongs there")
    return message


def _short(words: str) -> bytes:
    """The words in UTF-8, cut between characters where they are too long."""
    return words.encode(errors="replace")[:MAX_WORDS].decode(errors="ignore").encode()
