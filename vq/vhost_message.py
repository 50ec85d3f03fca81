"""The vhost-user protocol as a codec: bytes and file descriptors to typed messages and back.

A message is a 12-byte header (`Header`), a payload whose form follows from the request, and file
descriptors that travel beside it. `Decoder` takes whatever a socket gave and hands out whole
messages that are checked as far as a message can be checked alone: version, size, counts, reserved
bits, the number of descriptors. `encode` makes the bytes of a message.

No sockets here, and no state of a connection: whether a message is allowed at this point, what it
refers to and what it does belong to `vhost_user`.

All numbers are in the machine's native byte order ("Message Specification" in QEMU's
docs/interop/vhost-user.rst, which is the protocol's specification; section names cited below are
its). Both sides run on one machine, so no side ever swaps.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from vq.errors import FrontendError, UsageError

__all__ = [
    "BACKEND_REQUESTS",
    "FRONTEND_REQUESTS",
    "HEADER_SIZE",
    "MAX_FDS",
    "MAX_MEMORY_REGIONS",
    "BackendRequest",
    "Config",
    "ConfigFlag",
    "Decoder",
    "DeviceStateTransfer",
    "Form",
    "Header",
    "Inflight",
    "Iotlb",
    "IotlbType",
    "LogArea",
    "MemoryRegion",
    "MemoryTable",
    "Message",
    "Payload",
    "ProtocolFeature",
    "Request",
    "SharedObject",
    "ShmemConfig",
    "ShmemMap",
    "VhostFeature",
    "VringAddr",
    "VringArea",
    "VringFd",
    "VringFlag",
    "VringState",
    "decode",
    "encode",
]


# --- numbers -------------------------------------------------------------------------------------


class Request(enum.IntEnum):
    """What the frontend sends ("Front-end message types"), without ``VHOST_USER_``."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """What the backend sends ("Back-end message types"), without ``VHOST_USER_BACKEND_``."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(enum.IntEnum):
    """Bit numbers of the protocol's own features ("Protocol features")."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22


class VhostFeature(enum.IntEnum):
    """Bits that vhost-user puts among the virtio features; a driver never sees them."""

    LOG_ALL = 26
    """VHOST_F_LOG_ALL: note in the dirty log what the device writes ("Migration")."""
    PROTOCOL_FEATURES = 30
    """VHOST_USER_F_PROTOCOL_FEATURES: this protocol's own features are spoken ("Communication")."""


VERSION = 1
_VERSION_MASK = 0x3
_REPLY = 0x4
_NEED_REPLY = 0x8
_KNOWN_FLAGS = _VERSION_MASK | _REPLY | _NEED_REPLY

MAX_MEMORY_REGIONS = 32
"""Regions in one table. The specification draws eight; frontends built on rust-vmm send up to 32.
"""
MAX_FDS = MAX_MEMORY_REGIONS
"""Descriptors that come with one message at most."""
MAX_CONFIG = 4096
"""Bytes of configuration space: what PCI's own largest config space holds."""
_MAX_CRYPTO_SESSION = 4096


class VringFlag(enum.IntFlag):
    """`VringAddr.flags`."""

    LOG = 1
    """VHOST_VRING_F_LOG: note writes to the used ring in the dirty log."""


class ConfigFlag(enum.IntEnum):
    """`Config.flags` ("Virtio device config space")."""

    WRITABLE = 0
    MIGRATION = 1
    """The frontend sets the space after a migration: read-only fields too."""


# --- payloads ------------------------------------------------------------------------------------


class Header(NamedTuple):
    """``u32 request, u32 flags, u32 size`` ("Header")."""

    request: int
    flags: int
    size: int


class VringState(NamedTuple):
    """``u32 index of the ring, u32 num`` ("A vring state description")."""

    ring: int
    num: int


class VringAddr(NamedTuple):
    """``u32 index, u32 flags, u64 desc, u64 used, u64 avail, u64 log``.

    The first three addresses are the frontend's own, `log` is the guest's ("A vring address
    description").
    """

    ring: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class VringFd(NamedTuple):
    """A u64: the ring's index in bits 0 to 7; bit 8 set when no descriptor comes with it."""

    ring: int
    has_fd: bool


class MemoryRegion(NamedTuple):
    """``u64 guest address, u64 size, u64 user address, u64 mmap offset``."""

    gpa: int
    size: int
    user_address: int
    mmap_offset: int


class MemoryTable(NamedTuple):
    """``u32 count, u32 padding, MemoryRegion regions[count]`` ("Memory regions description")."""

    regions: tuple[MemoryRegion, ...]


class LogArea(NamedTuple):
    """``u64 size, u64 offset``: where the dirty log lies in its file ("Log description")."""

    size: int
    offset: int


class IotlbType(enum.IntEnum):
    """`Iotlb.type` ("An IOTLB message")."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class Iotlb(NamedTuple):
    """``u64 iova, u64 size, u64 user address, u8 permissions, u8 type``, padded to 32 bytes."""

    iova: int
    size: int
    user_address: int
    permissions: int
    type: int


class Config(NamedTuple):
    """``u32 offset, u32 size, u32 flags, u8 data[size]`` ("Virtio device config space").

    A reply with no data says that the backend could not do it; it has size 0.
    """

    offset: int
    flags: int
    data: bytes


class VringArea(NamedTuple):
    """``u64 ring and flag, u64 size, u64 offset`` ("Vring area description")."""

    vring: VringFd
    size: int
    offset: int


class Inflight(NamedTuple):
    """``u64 mmap size, u64 mmap offset, u16 queues, u16 queue size``, padded to 24 bytes."""

    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int


class SharedObject(NamedTuple):
    """A UUID of 16 bytes ("VhostUserShared")."""

    uuid: bytes


class DeviceStateTransfer(NamedTuple):
    """``u32 direction, u32 phase`` ("Device state transfer parameters"): 0 saves, 1 loads."""

    direction: int
    phase: int


class ShmemMap(NamedTuple):
    """``u8 shmid, padding to 8, u64 fd offset, u64 shm offset, u64 length, u64 flags``."""

    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int


class ShmemConfig(NamedTuple):
    """``u32 count, u32 padding, u64 sizes[256]``: one size per shared memory region, in bytes."""

    sizes: tuple[int, ...]


Payload: TypeAlias = (
    int
    | bytes
    | VringState
    | VringAddr
    | VringFd
    | MemoryRegion
    | MemoryTable
    | LogArea
    | Iotlb
    | Config
    | VringArea
    | Inflight
    | SharedObject
    | DeviceStateTransfer
    | ShmemMap
    | ShmemConfig
    | None
)


@dataclass(slots=True)
class Message:
    """One message, with the descriptors that came with it.

    The message owns its descriptors: whoever wants one takes it with `take_fd`, and `close` ends
    the rest. A ``with`` block closes too.
    """

    request: Request | BackendRequest
    payload: Payload = None
    fds: list[int] = field(default_factory=list)
    need_reply: bool = False
    reply: bool = False

    def take_fd(self) -> int:
        """The first descriptor left; it is the caller's now."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        _close_all(self.fds)

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- layouts: one per form of payload ------------------------------------------------------------

_U64 = struct.Struct("=Q")
_HEADER = struct.Struct("=3I")
_STATE = struct.Struct("=2I")
_ADDR = struct.Struct("=2I4Q")
_REGION = struct.Struct("=4Q")
_TABLE = struct.Struct("=I4x")
_SLOT = struct.Struct("=8x4Q")
_LOG = struct.Struct("=2Q")
_IOTLB = struct.Struct("=3Q2B6x")
_CONFIG = struct.Struct("=3I")
_AREA = struct.Struct("=3Q")
_INFLIGHT = struct.Struct("=2Q2H")
_UUID = struct.Struct("=16s")
_TRANSFER = struct.Struct("=2I")
_SHMEM_MAP = struct.Struct("=B7x4Q")
_SHMEM_SLOTS = 256

HEADER_SIZE = _HEADER.size

for _layout, _size in (
    (_HEADER, 12),
    (_STATE, 8),
    (_ADDR, 40),
    (_REGION, 32),
    (_TABLE, 8),
    (_SLOT, 40),
    (_LOG, 16),
    (_IOTLB, 32),
    (_CONFIG, 12),
    (_AREA, 24),
    (_INFLIGHT, 20),
    (_UUID, 16),
    (_TRANSFER, 8),
    (_SHMEM_MAP, 40),
):
    if _layout.size != _size:
        raise ImportError(f"{_layout.format!r} is not {_size} bytes on this machine")


class _Layout(NamedTuple):
    """The form of one kind of payload. Sizes are what the header may say, in bytes."""

    name: str
    smallest: int
    largest: int
    unpack: Callable[[bytes], Payload]
    pack: Callable[[Any], bytes]


def _fixed(name: str, form: struct.Struct, kind: Callable[..., Payload]) -> _Layout:
    """A payload of one structure that fills the named tuple `kind`, field by field."""
    return _Layout(
        name, form.size, form.size, lambda data: kind(*form.unpack(data)), lambda p: form.pack(*p)
    )


_VRING_INDEX = 0xFF
_VRING_NO_FD = 0x100


def _unpack_vring_fd(data: bytes) -> VringFd:
    (value,) = _U64.unpack(data)
    if value & ~(_VRING_INDEX | _VRING_NO_FD):
        raise FrontendError(f"reserved bits set in {value:#x}, a ring's index and flag")
    return VringFd(value & _VRING_INDEX, not value & _VRING_NO_FD)


def _pack_vring_fd(vring: VringFd) -> bytes:
    return _U64.pack(vring.ring | (0 if vring.has_fd else _VRING_NO_FD))


def _unpack_table(data: bytes) -> MemoryTable:
    (count,) = _TABLE.unpack_from(data)
    if count > MAX_MEMORY_REGIONS:
        raise FrontendError(f"a memory table of {count} regions, more than {MAX_MEMORY_REGIONS}")
    used = _TABLE.size + count * _REGION.size
    # User-Mode Linux always sends room for two regions, and fills in as many as it has.
    if len(data) < used or (len(data) - used) % _REGION.size:
        raise FrontendError(f"a memory table of {count} regions in {len(data)} bytes")
    regions = _REGION.iter_unpack(data[_TABLE.size : used])
    return MemoryTable(tuple(MemoryRegion(*region) for region in regions))


def _pack_table(table: MemoryTable) -> bytes:
    return _TABLE.pack(len(table.regions)) + b"".join(_REGION.pack(*r) for r in table.regions)


def _unpack_config(data: bytes) -> Config:
    offset, size, flags = _CONFIG.unpack_from(data)
    if size != len(data) - _CONFIG.size:
        raise FrontendError(f"{size} bytes of configuration space in {len(data)} bytes of payload")
    if offset + size > MAX_CONFIG:
        raise FrontendError(f"configuration space ends at {MAX_CONFIG}, not at {offset + size}")
    return Config(offset, flags, data[_CONFIG.size :])


def _pack_config(config: Config) -> bytes:
    return _CONFIG.pack(config.offset, len(config.data), config.flags) + config.data


def _unpack_log(data: bytes) -> LogArea | int:
    # Without LOG_SHMFD the payload is the log's address alone, which a backend cannot use.
    if len(data) == _U64.size:
        return int(_U64.unpack(data)[0])
    if len(data) != _LOG.size:
        raise FrontendError(f"{len(data)} bytes for a log, which takes {_U64.size} or {_LOG.size}")
    return LogArea(*_LOG.unpack(data))


def _unpack_inflight(data: bytes) -> Inflight:
    # 24 bytes where a u64 is aligned to eight, 20 where it is aligned to four (i386).
    if len(data) not in (_INFLIGHT.size, _INFLIGHT.size + 4):
        raise FrontendError(f"an inflight description of {len(data)} bytes")
    return Inflight(*_INFLIGHT.unpack_from(data))


def _unpack_area(data: bytes) -> VringArea:
    _, size, offset = _AREA.unpack(data)
    return VringArea(_unpack_vring_fd(data[: _U64.size]), size, offset)


def _unpack_shmem_config(data: bytes) -> ShmemConfig:
    (count,) = _TABLE.unpack_from(data)
    if len(data) % _U64.size or _TABLE.size + count * _U64.size > len(data):
        raise FrontendError(f"{count} shared memory regions in {len(data)} bytes")
    return ShmemConfig(struct.unpack_from(f"={count}Q", data, _TABLE.size))


def _pack_shmem_config(config: ShmemConfig) -> bytes:
    unused = _SHMEM_SLOTS - len(config.sizes)
    return _TABLE.pack(len(config.sizes)) + struct.pack(
        f"={_SHMEM_SLOTS}Q", *config.sizes, *(0,) * unused
    )


def _unpack_number(data: bytes) -> int:
    return int(_U64.unpack(data)[0])


_NONE = _Layout("no payload", 0, 0, lambda data: None, lambda nothing: b"")
_NUMBER = _Layout("a u64", 8, 8, _unpack_number, _U64.pack)
_VRING_STATE = _fixed("a vring state", _STATE, VringState)
_VRING_ADDR = _fixed("a vring address", _ADDR, VringAddr)
_VRING_FD = _Layout("a vring index", 8, 8, _unpack_vring_fd, _pack_vring_fd)
_MEMORY_TABLE = _Layout(
    "a memory table",
    _TABLE.size,
    _TABLE.size + MAX_MEMORY_REGIONS * _REGION.size,
    _unpack_table,
    _pack_table,
)
_MEMORY_REGION = _fixed("a memory region", _SLOT, MemoryRegion)
_LOG_AREA = _Layout(
    "a log description",
    _U64.size,
    _LOG.size,
    _unpack_log,
    lambda log: _U64.pack(log) if isinstance(log, int) else _LOG.pack(*log),
)
_IOTLB_MSG = _fixed("an IOTLB message", _IOTLB, Iotlb)
_CONFIG_SPACE = _Layout(
    "configuration space", _CONFIG.size, _CONFIG.size + MAX_CONFIG, _unpack_config, _pack_config
)
_VRING_AREA = _Layout(
    "a vring area",
    _AREA.size,
    _AREA.size,
    _unpack_area,
    lambda area: _pack_vring_fd(area.vring) + _U64.pack(area.size) + _U64.pack(area.offset),
)
_INFLIGHT_AREA = _Layout(
    "an inflight description",
    _INFLIGHT.size,
    _INFLIGHT.size + 4,
    _unpack_inflight,
    lambda inflight: _INFLIGHT.pack(*inflight) + bytes(4),
)
_SHARED = _fixed("a UUID", _UUID, SharedObject)
_STATE_TRANSFER = _fixed("state transfer parameters", _TRANSFER, DeviceStateTransfer)
_SHMEM = _fixed("a shared memory mapping", _SHMEM_MAP, ShmemMap)
_SHMEM_SIZES = _Layout(
    "shared memory sizes",
    _TABLE.size,
    _TABLE.size + _SHMEM_SLOTS * _U64.size,
    _unpack_shmem_config,
    _pack_shmem_config,
)
_CRYPTO = _Layout("a crypto session", 0, _MAX_CRYPTO_SESSION, bytes, bytes)


# --- what each request carries -------------------------------------------------------------------

_FdCount: TypeAlias = Callable[[Any], tuple[int, int]]
"""From a payload to the least and the largest number of descriptors."""


def _no_fds(_: Payload) -> tuple[int, int]:
    return 0, 0


def _one_fd(_: Payload) -> tuple[int, int]:
    return 1, 1


def _perhaps_a_fd(_: Payload) -> tuple[int, int]:
    return 0, 1


def _fd_as_flagged(vring: VringFd) -> tuple[int, int]:
    return int(vring.has_fd), int(vring.has_fd)


class Form(NamedTuple):
    """What one request and its reply carry.

    `reply` is None where the protocol has no reply of its own: then the only answer is the u64 of
    REPLY_ACK, when the sender asked for one.
    """

    payload: _Layout
    fds: _FdCount = _no_fds
    reply: _Layout | None = None
    reply_fds: _FdCount = _no_fds


FRONTEND_REQUESTS: Mapping[Request, Form] = {
    Request.GET_FEATURES: Form(_NONE, reply=_NUMBER),
    Request.SET_FEATURES: Form(_NUMBER),
    Request.SET_OWNER: Form(_NONE),
    Request.RESET_OWNER: Form(_NONE),
    Request.SET_MEM_TABLE: Form(_MEMORY_TABLE, lambda table: (len(table.regions),) * 2),
    # "Communication": with LOG_SHMFD there is a reply; what it holds is not said, and a u64 is
    # what frontends read either way.
    Request.SET_LOG_BASE: Form(
        _LOG_AREA, lambda log: (0, 0) if isinstance(log, int) else (1, 1), reply=_NUMBER
    ),
    Request.SET_LOG_FD: Form(_NONE, _one_fd),
    Request.SET_VRING_NUM: Form(_VRING_STATE),
    Request.SET_VRING_ADDR: Form(_VRING_ADDR),
    Request.SET_VRING_BASE: Form(_VRING_STATE),
    Request.GET_VRING_BASE: Form(_VRING_STATE, reply=_VRING_STATE),
    Request.SET_VRING_KICK: Form(_VRING_FD, _fd_as_flagged),
    Request.SET_VRING_CALL: Form(_VRING_FD, _fd_as_flagged),
    Request.SET_VRING_ERR: Form(_VRING_FD, _fd_as_flagged),
    Request.GET_PROTOCOL_FEATURES: Form(_NONE, reply=_NUMBER),
    Request.SET_PROTOCOL_FEATURES: Form(_NUMBER),
    Request.GET_QUEUE_NUM: Form(_NONE, reply=_NUMBER),
    Request.SET_VRING_ENABLE: Form(_VRING_STATE),
    Request.SEND_RARP: Form(_NUMBER),
    Request.NET_SET_MTU: Form(_NUMBER),
    Request.SET_BACKEND_REQ_FD: Form(_NONE, _one_fd),
    Request.IOTLB_MSG: Form(_IOTLB_MSG, reply=_NUMBER),
    Request.SET_VRING_ENDIAN: Form(_VRING_STATE),
    Request.GET_CONFIG: Form(_CONFIG_SPACE, reply=_CONFIG_SPACE),
    Request.SET_CONFIG: Form(_CONFIG_SPACE),
    Request.CREATE_CRYPTO_SESSION: Form(_CRYPTO, reply=_CRYPTO),
    Request.CLOSE_CRYPTO_SESSION: Form(_NUMBER),
    Request.POSTCOPY_ADVISE: Form(_NONE, reply=_NONE, reply_fds=_perhaps_a_fd),
    Request.POSTCOPY_LISTEN: Form(_NONE),
    Request.POSTCOPY_END: Form(_NONE, reply=_NUMBER),
    Request.GET_INFLIGHT_FD: Form(_INFLIGHT_AREA, reply=_INFLIGHT_AREA, reply_fds=_perhaps_a_fd),
    Request.SET_INFLIGHT_FD: Form(_INFLIGHT_AREA, _one_fd),
    Request.GPU_SET_SOCKET: Form(_NONE, _one_fd),
    Request.RESET_DEVICE: Form(_NONE),
    Request.VRING_KICK: Form(_VRING_STATE),
    Request.GET_MAX_MEM_SLOTS: Form(_NONE, reply=_NUMBER),
    Request.ADD_MEM_REG: Form(_MEMORY_REGION, _one_fd),
    # One descriptor is let through "for compatibility with existing incorrect implementations".
    Request.REM_MEM_REG: Form(_MEMORY_REGION, _perhaps_a_fd),
    Request.SET_STATUS: Form(_NUMBER),
    Request.GET_STATUS: Form(_NONE, reply=_NUMBER),
    Request.GET_SHARED_OBJECT: Form(_SHARED, reply=_SHARED, reply_fds=_perhaps_a_fd),
    Request.SET_DEVICE_STATE_FD: Form(
        _STATE_TRANSFER, _one_fd, reply=_NUMBER, reply_fds=_perhaps_a_fd
    ),
    Request.CHECK_DEVICE_STATE: Form(_NONE, reply=_NUMBER),
    Request.GET_SHMEM_CONFIG: Form(_NONE, reply=_SHMEM_SIZES),
}

BACKEND_REQUESTS: Mapping[BackendRequest, Form] = {
    BackendRequest.IOTLB_MSG: Form(_IOTLB_MSG),
    BackendRequest.CONFIG_CHANGE_MSG: Form(_NONE),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Form(
        _VRING_AREA, lambda area: _fd_as_flagged(area.vring)
    ),
    BackendRequest.VRING_CALL: Form(_VRING_STATE),
    BackendRequest.VRING_ERR: Form(_VRING_STATE),
    BackendRequest.SHARED_OBJECT_ADD: Form(_SHARED),
    BackendRequest.SHARED_OBJECT_REMOVE: Form(_SHARED),
    BackendRequest.SHARED_OBJECT_LOOKUP: Form(_SHARED, reply=_NUMBER, reply_fds=_perhaps_a_fd),
    BackendRequest.SHMEM_MAP: Form(_SHMEM, _one_fd),
    BackendRequest.SHMEM_UNMAP: Form(_SHMEM),
}


# --- bytes to messages ---------------------------------------------------------------------------


class Decoder:
    """Bytes and descriptors in, whole messages out.

    `requests` is the kind of request on this channel: `Request` on the main socket,
    `BackendRequest` on the channel that the backend opens requests on. With `replies` the
    messages are the answers to such requests.

    Descriptors belong to the message of the byte that they came with. A reader that never reads
    more than `wanted` bytes at once gets that right on every system: kernels differ in whether a
    read that brings descriptors may begin before the byte they were sent with, or end after it.

    Whatever raises `FrontendError` has closed every descriptor that the decoder held.
    """

    def __init__(
        self,
        requests: type[Request] | type[BackendRequest] = Request,
        *,
        replies: bool = False,
    ) -> None:
        self._requests = requests
        self._replies = replies
        self._buffer = bytearray()
        self._consumed = 0  # bytes of the stream before the buffer's first
        self._fds: list[tuple[int, int]] = []  # (place in the stream, descriptor)
        self._header: Header | None = None  # of the message in the buffer, once checked

    @property
    def wanted(self) -> int:
        """How many bytes are missing until the next header, or the next payload, is whole."""
        whole = HEADER_SIZE if self._header is None else HEADER_SIZE + self._header.size
        return max(0, whole - len(self._buffer))

    @property
    def in_message(self) -> bool:
        """Whether a message has begun that is not whole: then the stream must not end here."""
        return bool(self._buffer)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Takes what one read gave: any piece of the stream, and the descriptors with it.

        The descriptors are the decoder's own from here on; those with more than one byte count as
        come with the first. Raises `FrontendError` for more descriptors than any message has.
        """
        at = self._consumed + len(self._buffer)
        self._fds += [(at, fd) for fd in fds]
        self._buffer += data
        if len(self._fds) > MAX_FDS:
            raise self._broken(f"{len(self._fds)} descriptors with one message")
        if fds and not data:
            raise self._broken("descriptors without a byte of a message")

    def next_message(self) -> Message | None:
        """The next whole message, None when it is not all there yet.

        Raises `FrontendError` for what the protocol does not allow, as soon as the header tells.
        """
        if len(self._buffer) < HEADER_SIZE:
            return None
        if self._header is None:
            self._header = self._checked(Header(*_HEADER.unpack_from(self._buffer)))
        if self.wanted:
            return None
        header, end = self._header, HEADER_SIZE + self._header.size
        payload = bytes(self._buffer[HEADER_SIZE:end])
        del self._buffer[:end]
        self._consumed += end
        self._header = None
        fds = [fd for at, fd in self._fds if at < self._consumed]
        del self._fds[: len(fds)]
        try:
            return decode(header, payload, fds, self._requests)
        except FrontendError:
            self.close()
            raise

    def __iter__(self) -> Iterator[Message]:
        """The messages that are whole now."""
        while (message := self.next_message()) is not None:
            yield message

    def close(self) -> None:
        """Closes the descriptors of messages that were not taken."""
        _close_all([fd for _, fd in self._fds])
        self._fds.clear()
        self._buffer.clear()
        self._header = None

    def _checked(self, header: Header) -> Header:
        """Everything that the header alone tells, before a byte of payload is asked for."""
        try:
            request, layout, _ = _form_of(header, self._requests)
            if bool(header.flags & _REPLY) != self._replies:
                kind = "a reply" if header.flags & _REPLY else "a request"
                raise FrontendError(f"{request.name}: {kind} that nobody waits for")
            _check_size(request, layout, header.size)
        except FrontendError:
            self.close()
            raise
        return header

    def _broken(self, reason: str) -> FrontendError:
        self.close()
        return FrontendError(reason)


def decode(
    header: Header,
    payload: bytes,
    fds: list[int],
    requests: type[Request] | type[BackendRequest] = Request,
) -> Message:
    """One message from its header, its payload and its descriptors, which it takes over.

    Raises `FrontendError` when the three do not make a message; the descriptors are closed then.
    """
    try:
        request, layout, fd_count = _form_of(header, requests)
        _check_size(request, layout, len(payload))
        try:
            body = layout.unpack(payload)
        except FrontendError as error:
            raise FrontendError(f"{request.name}: {error}") from None
        least, most = fd_count(body)
        if not least <= len(fds) <= most:
            expected = f"{least}" if least == most else f"{least} to {most}"
            raise FrontendError(f"{request.name}: {len(fds)} descriptors came, not {expected}")
    except FrontendError:
        _close_all(fds)
        raise
    flags = header.flags
    return Message(request, body, fds, bool(flags & _NEED_REPLY), bool(flags & _REPLY))


def encode(message: Message) -> bytes:
    """The bytes of a message; its descriptors are the sender's to pass on beside the first byte.

    A reply to a request that has no reply of its own is the u64 of REPLY_ACK. Raises `UsageError`
    when the payload is not what the request carries.
    """
    form = _FORMS[type(message.request)][message.request]
    layout = (form.reply or _NUMBER) if message.reply else form.payload
    try:
        payload = layout.pack(message.payload)
    except (struct.error, TypeError, AttributeError) as error:
        raise UsageError(f"{message.request.name} carries {layout.name}: {error}") from error
    flags = VERSION | _NEED_REPLY * message.need_reply | _REPLY * message.reply
    return _HEADER.pack(message.request, flags, len(payload)) + payload


_FORMS: Mapping[type, Mapping[Any, Form]] = {
    Request: FRONTEND_REQUESTS,
    BackendRequest: BACKEND_REQUESTS,
}


def _form_of(
    header: Header, requests: type[Request] | type[BackendRequest]
) -> tuple[Request | BackendRequest, _Layout, _FdCount]:
    """The request's name and form, with the header's flags checked."""
    if header.flags & _VERSION_MASK != VERSION:
        raise FrontendError(f"protocol version {header.flags & _VERSION_MASK}, not {VERSION}")
    if header.flags & ~_KNOWN_FLAGS:
        raise FrontendError(f"reserved bits set in a header's flags {header.flags:#x}")
    try:
        request = requests(header.request)
    except ValueError:
        raise FrontendError(f"request {header.request} does not exist") from None
    form = _FORMS[requests][request]
    if header.flags & _REPLY:
        return request, form.reply or _NUMBER, form.reply_fds
    return request, form.payload, form.fds


def _check_size(request: Request | BackendRequest, layout: _Layout, size: int) -> None:
    if not layout.smallest <= size <= layout.largest:
        expected = f"{layout.smallest}" + (
            f" to {layout.largest}" if layout.largest > layout.smallest else ""
        )
        raise FrontendError(
            f"{request.name}: {size} bytes came for {layout.name}, which takes {expected}"
        )


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
