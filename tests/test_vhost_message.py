"""The vhost-user codec: golden bytes, descriptors with the right message, and what is refused."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq.errors import FrontendError, UsageError
from vq.vhost_message import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    MAX_FDS,
    BackendRequest,
    Config,
    Decoder,
    DeviceStateTransfer,
    Inflight,
    Iotlb,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    SharedObject,
    ShmemConfig,
    ShmemMap,
    VhostFeature,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
    encode,
)

REGION = "0000000000000000000000100000000000000000007100000010000000000000"
A_REGION = MemoryRegion(gpa=0, size=0x10000000, user_address=0x7100_0000_0000, mmap_offset=0x1000)
A_UUID = bytes(range(16))

# (request, payload, descriptors, the bytes on a little-endian machine)
GOLDEN: list[tuple[Request, Payload, int, str]] = [
    (Request.GET_FEATURES, None, 0, "01000000 01000000 00000000"),
    (Request.SET_FEATURES, 1 << 32 | 1 << 30, 0, "02000000 01000000 08000000 0000004001000000"),
    (Request.SET_OWNER, None, 0, "03000000 01000000 00000000"),
    (Request.RESET_OWNER, None, 0, "04000000 01000000 00000000"),
    (
        Request.SET_MEM_TABLE,
        MemoryTable((A_REGION,)),
        1,
        "05000000 01000000 28000000 01000000 00000000"
        "0000000000000000 0000001000000000 0000000000710000 0010000000000000",
    ),
    (
        Request.SET_LOG_BASE,
        LogArea(0x8000, 0x1000),
        1,
        "06000000 01000000 10000000 0080000000000000 0010000000000000",
    ),
    (Request.SET_LOG_BASE, 0x1234, 0, "06000000 01000000 08000000 3412000000000000"),
    (Request.SET_LOG_FD, None, 1, "07000000 01000000 00000000"),
    (Request.SET_VRING_NUM, VringState(1, 256), 0, "08000000 01000000 08000000 01000000 00010000"),
    (
        Request.SET_VRING_ADDR,
        VringAddr(ring=1, flags=1, desc=0x10, used=0x20, avail=0x30, log=0x40),
        0,
        "09000000 01000000 28000000 01000000 01000000"
        "1000000000000000 2000000000000000 3000000000000000 4000000000000000",
    ),
    (Request.SET_VRING_BASE, VringState(1, 0xFFF0), 0, "0a00000001000000080000000100 0000f0ff0000"),
    (Request.GET_VRING_BASE, VringState(1, 0), 0, "0b000000 01000000 08000000 01000000 00000000"),
    (Request.SET_VRING_KICK, VringFd(2, True), 1, "0c000000 01000000 08000000 0200000000000000"),
    (Request.SET_VRING_CALL, VringFd(2, False), 0, "0d000000 01000000 08000000 0201000000000000"),
    (Request.SET_VRING_ERR, VringFd(2, True), 1, "0e000000 01000000 08000000 0200000000000000"),
    (Request.GET_PROTOCOL_FEATURES, None, 0, "0f000000 01000000 00000000"),
    (Request.SET_PROTOCOL_FEATURES, 9, 0, "10000000 01000000 08000000 0900000000000000"),
    (Request.GET_QUEUE_NUM, None, 0, "11000000 01000000 00000000"),
    (Request.SET_VRING_ENABLE, VringState(3, 1), 0, "12000000010000000800000003000000 01000000"),
    (Request.SEND_RARP, 0x020000000002, 0, "13000000 01000000 08000000 0200000000020000"),
    (Request.NET_SET_MTU, 1500, 0, "14000000 01000000 08000000 dc05000000000000"),
    (Request.SET_BACKEND_REQ_FD, None, 1, "15000000 01000000 00000000"),
    (
        Request.IOTLB_MSG,
        Iotlb(iova=1, size=2, user_address=3, permissions=3, type=2),
        0,
        "16000000 01000000 20000000 0100000000000000 0200000000000000 0300000000000000"
        "03 02 000000000000",
    ),
    (Request.SET_VRING_ENDIAN, VringState(0, 1), 0, "17000000 01000000 08000000 0000000001000000"),
    (
        Request.GET_CONFIG,
        Config(offset=6, flags=0, data=bytes(2)),
        0,
        "18000000 01000000 0e000000 06000000 02000000 00000000 0000",
    ),
    (
        Request.SET_CONFIG,
        Config(offset=0, flags=1, data=b"\xaa"),
        0,
        "19000000 01000000 0d000000 00000000 01000000 01000000 aa",
    ),
    (Request.CREATE_CRYPTO_SESSION, b"key", 0, "1a000000 01000000 03000000 6b6579"),
    (Request.CLOSE_CRYPTO_SESSION, 7, 0, "1b000000 01000000 08000000 0700000000000000"),
    (Request.POSTCOPY_ADVISE, None, 0, "1c000000 01000000 00000000"),
    (Request.POSTCOPY_LISTEN, None, 0, "1d000000 01000000 00000000"),
    (Request.POSTCOPY_END, None, 0, "1e000000 01000000 00000000"),
    (
        Request.GET_INFLIGHT_FD,
        Inflight(0, 0, 2, 256),
        0,
        "1f000000 01000000 18000000 0000000000000000 0000000000000000 0200 0001 00000000",
    ),
    (
        Request.SET_INFLIGHT_FD,
        Inflight(0x2000, 0x1000, 2, 256),
        1,
        "20000000 01000000 18000000 0020000000000000 0010000000000000 0200 0001 00000000",
    ),
    (Request.GPU_SET_SOCKET, None, 1, "21000000 01000000 00000000"),
    (Request.RESET_DEVICE, None, 0, "22000000 01000000 00000000"),
    (Request.VRING_KICK, VringState(1, 0), 0, "23000000 01000000 08000000 01000000 00000000"),
    (Request.GET_MAX_MEM_SLOTS, None, 0, "24000000 01000000 00000000"),
    (
        Request.ADD_MEM_REG,
        A_REGION,
        1,
        "25000000 01000000 28000000 0000000000000000"
        "0000000000000000 0000001000000000 0000000000710000 0010000000000000",
    ),
    (
        Request.REM_MEM_REG,
        A_REGION,
        0,
        "26000000 01000000 28000000 0000000000000000"
        "0000000000000000 0000001000000000 0000000000710000 0010000000000000",
    ),
    (Request.SET_STATUS, 0x0F, 0, "27000000 01000000 08000000 0f00000000000000"),
    (Request.GET_STATUS, None, 0, "28000000 01000000 00000000"),
    (
        Request.GET_SHARED_OBJECT,
        SharedObject(A_UUID),
        0,
        "29000000 01000000 10000000 000102030405060708090a0b0c0d0e0f",
    ),
    (
        Request.SET_DEVICE_STATE_FD,
        DeviceStateTransfer(1, 0),
        1,
        "2a000000 01000000 08000000 01000000 00000000",
    ),
    (Request.CHECK_DEVICE_STATE, None, 0, "2b000000 01000000 00000000"),
    (Request.GET_SHMEM_CONFIG, None, 0, "2c000000 01000000 00000000"),
]

GOLDEN_BACKEND: list[tuple[BackendRequest, Payload, int, str]] = [
    (
        BackendRequest.IOTLB_MSG,
        Iotlb(1, 0, 0, 1, 1),
        0,
        "01000000 01000000 20000000 0100000000000000 0000000000000000 0000000000000000"
        "01 01 000000000000",
    ),
    (BackendRequest.CONFIG_CHANGE_MSG, None, 0, "02000000 01000000 00000000"),
    (
        BackendRequest.VRING_HOST_NOTIFIER_MSG,
        VringArea(VringFd(1, True), 0x1000, 0x2000),
        1,
        "03000000 01000000 18000000 0100000000000000 0010000000000000 0020000000000000",
    ),
    (BackendRequest.VRING_CALL, VringState(1, 0), 0, "04000000010000000800000001000000 00000000"),
    (BackendRequest.VRING_ERR, VringState(1, 0), 0, "05000000 01000000 08000000 0100000000000000"),
    (
        BackendRequest.SHARED_OBJECT_ADD,
        SharedObject(A_UUID),
        0,
        "06000000 01000000 10000000 000102030405060708090a0b0c0d0e0f",
    ),
    (
        BackendRequest.SHARED_OBJECT_REMOVE,
        SharedObject(A_UUID),
        0,
        "07000000 01000000 10000000 000102030405060708090a0b0c0d0e0f",
    ),
    (
        BackendRequest.SHARED_OBJECT_LOOKUP,
        SharedObject(A_UUID),
        0,
        "08000000 01000000 10000000 000102030405060708090a0b0c0d0e0f",
    ),
    (
        BackendRequest.SHMEM_MAP,
        ShmemMap(shmid=3, fd_offset=0, shm_offset=0x1000, length=0x2000, flags=1),
        1,
        "09000000 01000000 28000000 0300000000000000"
        "0000000000000000 0010000000000000 0020000000000000 0100000000000000",
    ),
    (
        BackendRequest.SHMEM_UNMAP,
        ShmemMap(3, 0, 0x1000, 0x2000, 0),
        0,
        "0a000000 01000000 28000000 0300000000000000"
        "0000000000000000 0010000000000000 0020000000000000 0000000000000000",
    ),
]

little_endian = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden bytes are those of a little-endian machine"
)


def header(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("=3I", request, flags, size)


class Fds:
    """Makes descriptors that can be told apart from others, and says whether they are open."""

    def __init__(self) -> None:
        self.made: list[tuple[int, tuple[int, int]]] = []

    def make(self, count: int) -> list[int]:
        fds = []
        for _ in range(count):
            ends = os.pipe()
            os.close(ends[1])
            info = os.fstat(ends[0])
            fds.append(ends[0])
            self.made.append((ends[0], (info.st_dev, info.st_ino)))
        return fds

    def still_open(self) -> int:
        count = 0
        for fd, identity in self.made:
            try:
                info = os.fstat(fd)
            except OSError:
                continue
            count += (info.st_dev, info.st_ino) == identity
        return count


@pytest.fixture
def fds() -> Iterator[Fds]:
    made = Fds()
    yield made
    assert made.still_open() == 0, "descriptors leaked"


def decode_one(data: bytes, fds: list[int] | None = None, **kind: object) -> Message:
    decoder = Decoder(**kind)  # type: ignore[arg-type]
    decoder.feed(data, fds or [])
    (message,) = decoder
    assert not decoder.in_message
    return message


def refused(data: bytes, fds: list[int] | None = None, **kind: object) -> str:
    decoder = Decoder(**kind)  # type: ignore[arg-type]
    with pytest.raises(FrontendError) as caught:
        decoder.feed(data, fds or [])
        list(decoder)
    return str(caught.value)


# --- layouts -------------------------------------------------------------------------------------


def test_every_request_has_a_form_and_golden_bytes() -> None:
    assert set(FRONTEND_REQUESTS) == set(Request) == {row[0] for row in GOLDEN}
    assert set(BACKEND_REQUESTS) == set(BackendRequest) == {row[0] for row in GOLDEN_BACKEND}
    assert sorted(Request) == list(range(1, 45))
    assert sorted(BackendRequest) == list(range(1, 11))


def test_the_protocols_bits_have_the_numbers_of_its_specification() -> None:
    names = [
        "MQ",
        "LOG_SHMFD",
        "RARP",
        "REPLY_ACK",
        "MTU",
        "BACKEND_REQ",
        "CROSS_ENDIAN",
        "CRYPTO_SESSION",
        "PAGEFAULT",
        "CONFIG",
        "BACKEND_SEND_FD",
        "HOST_NOTIFIER",
        "INFLIGHT_SHMFD",
        "RESET_DEVICE",
        "INBAND_NOTIFICATIONS",
        "CONFIGURE_MEM_SLOTS",
        "STATUS",
        "XEN_MMAP",
        "SHARED_OBJECT",
        "DEVICE_STATE",
        "GET_VRING_BASE_INFLIGHT",
        "GPA_ADDRESSES",
        "SHMEM",
    ]
    assert [(f.name, f.value) for f in ProtocolFeature] == [(n, i) for i, n in enumerate(names)]
    assert (VhostFeature.LOG_ALL, VhostFeature.PROTOCOL_FEATURES) == (26, 30)


@little_endian
@pytest.mark.parametrize(("request_", "payload", "count", "golden"), GOLDEN)
def test_a_frontends_message_is_these_bytes(
    fds: Fds, request_: Request, payload: Payload, count: int, golden: str
) -> None:
    data = bytes.fromhex(golden)
    assert encode(Message(request_, payload)) == data
    with decode_one(data, fds.make(count)) as message:
        assert (message.request, message.payload) == (request_, payload)
        assert type(message.payload) is type(payload)
        assert len(message.fds) == count
        assert not message.reply
        assert not message.need_reply


@little_endian
@pytest.mark.parametrize(("request_", "payload", "count", "golden"), GOLDEN_BACKEND)
def test_a_backends_message_is_these_bytes(
    fds: Fds, request_: BackendRequest, payload: Payload, count: int, golden: str
) -> None:
    data = bytes.fromhex(golden)
    assert encode(Message(request_, payload)) == data
    with decode_one(data, fds.make(count), requests=BackendRequest) as message:
        assert (message.request, message.payload, len(message.fds)) == (request_, payload, count)


@little_endian
@pytest.mark.parametrize(
    ("request_", "payload", "golden"),
    [
        (Request.GET_FEATURES, 1 << 63, "01000000 05000000 08000000 0000000000000080"),
        (Request.GET_VRING_BASE, VringState(1, 7), "0b000000 05000000 08000000 0100000007000000"),
        (Request.SET_LOG_BASE, 0, "06000000 05000000 08000000 0000000000000000"),
        (Request.SET_MEM_TABLE, 1, "05000000 05000000 08000000 0100000000000000"),
        (
            Request.GET_CONFIG,
            Config(0, 0, b"\x02\x00"),
            "18000000 05000000 0e000000 000000000200000000000000 0200",
        ),
        (Request.GET_CONFIG, Config(0, 0, b""), "18000000 05000000 0c000000" + 12 * "00"),
    ],
)
def test_a_reply_carries_the_reply_flag(request_: Request, payload: Payload, golden: str) -> None:
    data = bytes.fromhex(golden)
    assert encode(Message(request_, payload, reply=True)) == data
    message = decode_one(data, replies=True)
    assert (message.request, message.payload, message.reply) == (request_, payload, True)


def test_need_reply_is_bit_3() -> None:
    data = encode(Message(Request.SET_OWNER, need_reply=True))
    assert struct.unpack("=3I", data) == (3, 9, 0)
    assert decode_one(data).need_reply


def test_shared_memory_sizes_fill_256_places() -> None:
    data = encode(Message(Request.GET_SHMEM_CONFIG, ShmemConfig((0, 4096)), reply=True))
    assert struct.unpack("=3I", data[:12]) == (44, 5, 8 + 256 * 8)
    assert decode_one(data, replies=True).payload == ShmemConfig((0, 4096))


def test_an_inflight_description_may_lack_its_padding() -> None:
    data = header(31, 20) + struct.pack("=2Q2H", 0, 0, 2, 64)
    assert decode_one(data).payload == Inflight(0, 0, 2, 64)


def test_a_payload_of_the_wrong_kind_is_the_callers_mistake() -> None:
    with pytest.raises(UsageError, match="SET_VRING_NUM carries a vring state"):
        encode(Message(Request.SET_VRING_NUM, 5))
    with pytest.raises(UsageError):
        encode(Message(Request.SET_FEATURES, 1 << 64))


# --- the stream ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=20))
def test_any_fragmentation_gives_the_same_messages(cuts: list[int]) -> None:
    made = Fds()
    sent: list[tuple[Request, Payload, list[int]]] = []
    stream = bytearray()
    starts: dict[int, list[int]] = {}
    for request, payload, count, _ in GOLDEN:
        starts[len(stream)] = made.make(count)
        sent.append((request, payload, list(starts[len(stream)])))
        stream += encode(Message(request, payload))
    decoder = Decoder()
    got: list[tuple[object, Payload, list[int]]] = []
    at = turn = 0
    while at < len(stream):
        end = min(at + (cuts[turn % len(cuts)] if cuts else len(stream)), len(stream))
        # A kernel never gives two messages' descriptors in one read: cut where some begin.
        end = min([end, *(start for start, fds in starts.items() if fds and at < start)])
        decoder.feed(bytes(stream[at:end]), starts.get(at, []))
        got += [(m.request, m.payload, m.fds) for m in decoder]
        at, turn = end, turn + 1
    assert got == sent
    for fd, _ in made.made:
        os.close(fd)


def test_a_reader_of_wanted_bytes_meets_every_boundary() -> None:
    stream = b"".join(
        encode(Message(request, payload)) for request, payload, n, _ in GOLDEN if not n
    )
    decoder, count, at = Decoder(), 0, 0
    while at < len(stream):
        wanted = decoder.wanted
        assert wanted > 0
        decoder.feed(stream[at : at + wanted])
        at += wanted
        count += len(list(decoder))
    assert count == sum(1 for row in GOLDEN if not row[2])
    assert not decoder.in_message


def test_descriptors_stay_with_their_message_though_more_bytes_came_along(fds: Fds) -> None:
    kick = encode(Message(Request.SET_VRING_KICK, VringFd(0, True)))
    owner = encode(Message(Request.SET_OWNER))
    decoder = Decoder()
    decoder.feed(owner + kick[:5])
    decoder.feed(kick[5:] + owner, made := fds.make(1))
    first, second, third = decoder
    assert (first.fds, second.fds, third.fds) == ([], made, [])
    second.close()


def test_a_message_owns_its_descriptors_until_they_are_taken(fds: Fds) -> None:
    data = encode(Message(Request.SET_MEM_TABLE, MemoryTable((A_REGION, A_REGION))))
    with decode_one(data, fds.make(2)) as message:
        taken = message.take_fd()
        assert taken == fds.made[0][0]
    assert fds.still_open() == 1
    os.close(taken)


def test_closing_a_decoder_closes_what_an_unfinished_message_brought(fds: Fds) -> None:
    decoder = Decoder()
    decoder.feed(header(Request.SET_VRING_KICK, 8), fds.make(1))
    assert list(decoder) == []
    assert decoder.in_message
    decoder.close()
    assert fds.still_open() == 0


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(1, 0, flags=0), "protocol version 0, not 1"),
        (header(1, 0, flags=2), "protocol version 2"),
        (header(1, 0, flags=0x11), "reserved bits"),
        (header(1, 0, flags=5), "GET_FEATURES: a reply that nobody waits for"),
        (header(0, 0), "request 0 does not exist"),
        (header(45, 0), "request 45 does not exist"),
        (header(0xFFFFFFFF, 0), "does not exist"),
        (header(1, 8), "GET_FEATURES: 8 bytes came for no payload, which takes 0"),
        (header(2, 0), "SET_FEATURES: 0 bytes"),
        (header(2, 0xFFFFFFFF), "SET_FEATURES: 4294967295 bytes"),
        (header(5, 7), "SET_MEM_TABLE: 7 bytes"),
        (header(5, 8 + 33 * 32), "SET_MEM_TABLE: 1064 bytes"),
        (
            header(5, 8) + struct.pack("=2I", 1, 0),
            "SET_MEM_TABLE: a memory table of 1 regions in 8",
        ),
        (header(5, 40) + struct.pack("=2I", 33, 0) + bytes(32), "33 regions, more than 32"),
        (header(5, 24) + bytes(24), "a memory table of 0 regions in 24 bytes"),
        (header(6, 12) + bytes(12), "SET_LOG_BASE: 12 bytes for a log"),
        (header(12, 8) + struct.pack("=Q", 0x200), "SET_VRING_KICK: reserved bits set in 0x200"),
        (header(13, 8) + struct.pack("=Q", 1 << 63), "SET_VRING_CALL: reserved bits"),
        (header(24, 11), "GET_CONFIG: 11 bytes"),
        (header(24, 12 + 4097), "GET_CONFIG: 4109 bytes"),
        (
            header(24, 13) + struct.pack("=3I", 0, 2, 0) + b"x",
            "2 bytes of configuration space in 13",
        ),
        (header(24, 13) + struct.pack("=3I", 4096, 1, 0) + b"x", "ends at 4096, not at 4097"),
        (header(24, 12) + struct.pack("=3I", 0xFFFFFFFF, 0, 0), "not at 4294967295"),
        (header(31, 22) + bytes(22), "GET_INFLIGHT_FD: an inflight description of 22 bytes"),
    ],
)
def test_a_message_that_breaks_the_protocol_is_refused(data: bytes, reason: str) -> None:
    assert reason in refused(data)


@pytest.mark.parametrize("row", [*GOLDEN, *GOLDEN_BACKEND], ids=lambda row: row[0].name)
def test_missing_and_surplus_descriptors_are_refused_and_closed(
    fds: Fds, row: tuple[Request | BackendRequest, Payload, int, str]
) -> None:
    request, payload, count, _ = row
    data = encode(Message(request, payload))
    kind = {"requests": type(request)}
    surplus = 2 if request is Request.REM_MEM_REG else count + 1
    assert "descriptors came" in refused(data, fds.make(surplus), **kind)
    if count:
        assert "descriptors came" in refused(data, fds.make(count - 1), **kind)
    assert fds.still_open() == 0


def test_one_stray_descriptor_with_rem_mem_reg_is_let_through(fds: Fds) -> None:
    decode_one(encode(Message(Request.REM_MEM_REG, A_REGION)), fds.make(1)).close()


def test_a_bad_header_closes_the_descriptors_that_came_with_it(fds: Fds) -> None:
    refused(header(99, 0), fds.make(3))
    refused(header(1, 0, flags=0), fds.make(3))
    assert fds.still_open() == 0


def test_descriptors_do_not_pile_up_on_an_unfinished_message(fds: Fds) -> None:
    decoder = Decoder()
    data = encode(Message(Request.SET_FEATURES, 0))
    decoder.feed(data[:1], fds.make(MAX_FDS))
    with pytest.raises(FrontendError, match="33 descriptors"):
        decoder.feed(data[1:2], fds.make(1))
    assert fds.still_open() == 0


def test_descriptors_without_bytes_are_refused(fds: Fds) -> None:
    assert "without a byte" in refused(b"", fds.make(1))


def test_a_size_is_refused_before_its_payload_is_asked_for() -> None:
    decoder = Decoder()
    decoder.feed(header(Request.SET_CONFIG, 1 << 30))
    with pytest.raises(FrontendError):
        decoder.next_message()
    assert decoder.wanted <= 12


@settings(max_examples=300, deadline=None)
@given(
    request=st.integers(0, 46),
    flags=st.sampled_from([1, 9, 5, 0, 17]),
    payload=st.binary(max_size=64),
    claimed=st.integers(-3, 3),
)
def test_arbitrary_bytes_are_a_message_or_refused(
    request: int, flags: int, payload: bytes, claimed: int
) -> None:
    decoder = Decoder()
    decoder.feed(header(request, max(0, len(payload) + claimed), flags) + payload)
    try:
        messages = list(decoder)
    except FrontendError:
        assert not decoder.in_message
        return
    for message in messages:
        again = encode(message)
        assert decode_one(again).payload == message.payload
