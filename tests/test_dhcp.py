"""`vq.dhcp`: the rules of the RFCs, hostile requests, a device in front of it, a real client."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_frames import slow_sum, split

from vq.abi import NetFeature
from vq.dhcp import SERVER_MAC, LocalDhcp
from vq.errors import UsageError
from vq.link import NullLink, PairedLink, QueuePort, link_pair
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import NET_DRIVER_FEATURES, NetDriver, NetHeader

GUEST_MAC = bytes.fromhex("fee1bb d10001")
OTHER_MAC = bytes.fromhex("fee1bb d10002")
HOST, GUEST = bytes((100, 64, 1, 2)), bytes((100, 64, 1, 3))
NOWHERE, EVERYWHERE = bytes(4), b"\xff" * 4
COOKIE = bytes((99, 130, 83, 99))  # RFC 2131, 3, in decimal as there
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
XID = 0x3903F326


def server(**options: object) -> LocalDhcp:
    return LocalDhcp(GUEST_MAC, "100.64.1.3", "100.64.1.2", **options)  # type: ignore[arg-type]


def option(code: int, value: bytes) -> bytes:
    return bytes((code, len(value))) + value


def kind(number: int) -> bytes:
    return option(53, bytes((number,)))


def request(
    options: bytes | None = b"",
    *,
    op: int = 1,
    htype: int = 1,
    hlen: int = 6,
    hops: int = 0,
    flags: int = 0,
    ciaddr: bytes = NOWHERE,
    giaddr: bytes = NOWHERE,
    chaddr: bytes = GUEST_MAC,
    sname: bytes = b"",
    file: bytes = b"",
    smac: bytes = GUEST_MAC,
    dmac: bytes = b"\xff" * 6,
    source: bytes = NOWHERE,
    target: bytes = EVERYWHERE,
    ports: tuple[int, int] = (68, 67),
    fragment: int = 0,
    ip_options: bytes = b"",
    ip_length: int | None = None,
    udp_length: int | None = None,
    udp_checksum: int = 0,
    protocol: int = 17,
    vendor_size: int = 64,
    end: bytes = b"\xff",
    first: int | None = None,
) -> bytes:
    """A request as a client broadcasts it; without options the vendor field is zeros."""
    message = struct.pack("!BBBBIHH", op, htype, hlen, hops, XID, 3, flags)
    message += ciaddr + NOWHERE + NOWHERE + giaddr + chaddr.ljust(16, b"\0")
    message += sname.ljust(64, b"\0") + file.ljust(128, b"\0")
    vendor = b"" if options is None else COOKIE + options + end
    message += vendor.ljust(vendor_size, b"\0")
    size = 8 + len(message) if udp_length is None else udp_length
    udp = struct.pack("!HHHH", *ports, size, udp_checksum) + message
    header = 20 + len(ip_options)
    total = header + len(udp) if ip_length is None else ip_length
    first = 0x40 + header // 4 if first is None else first
    ip = struct.pack("!BBHHHBBH", first, 0, total, 7, fragment, 64, protocol, 0)
    ip += source + target + ip_options
    ip = ip[:10] + (0xFFFF - slow_sum(ip)).to_bytes(2, "big") + ip[12:]
    return dmac + smac + b"\x08\x00" + ip + udp


class Reply:
    """A reply taken apart, its lengths and checksums held against the slow sum."""

    def __init__(self, frame: bytes | None) -> None:
        assert frame is not None, "no reply"
        self.dmac, self.smac = frame[:6], frame[6:12]
        assert frame[12:14] == b"\x08\x00"
        ip, udp, message = frame[14:34], frame[34:42], frame[42:]
        assert ip[0] == 0x45 and ip[9] == 17 and int.from_bytes(ip[2:4], "big") == len(frame) - 14
        assert slow_sum(ip) == 0xFFFF
        self.source, self.target = ip[12:16], ip[16:20]
        *ports, size, checksum = struct.unpack("!HHHH", udp)
        assert ports == [67, 68] and size == len(frame) - 34 and checksum
        pseudo = ip[12:20] + struct.pack("!HH", 17, size)
        assert slow_sum(pseudo + udp + message) == 0xFFFF
        assert message[:4] == bytes((2, 1, 6, 0))
        assert int.from_bytes(message[4:8], "big") == XID
        assert message[8:10] == b"\0\0"
        self.flags = int.from_bytes(message[10:12], "big")
        self.ciaddr, self.yiaddr = message[12:16], message[16:20]
        self.siaddr, self.giaddr = message[20:24], message[24:28]
        self.chaddr = message[28:44]
        assert message[44:236] == bytes(192)
        self.vendor = message[236:]
        assert len(message) >= 300  # RFC 951, 3
        assert len(message) <= 548  # RFC 2131, 2
        self.order: list[int] = []
        self.options: dict[int, bytes] = {}
        if self.vendor.startswith(COOKIE):
            rest = self.vendor[4:]
            while rest[0] != 255:
                self.order.append(rest[0])
                self.options[rest[0]] = rest[2 : 2 + rest[1]]
                rest = rest[2 + rest[1] :]
            assert not any(rest[1:])

    @property
    def kind(self) -> int:
        return self.options[53][0]


# --- DHCP ----------------------------------------------------------------------------------------


def test_a_discover_is_answered_with_an_offer_byte_for_byte() -> None:
    frame = server(host_name="vm1").answer([request(kind(DISCOVER))])
    assert frame is not None
    expected = "fee1bbd10001 027671646863 08004500 0148 0000 0000 4011 af20 64400102 64400103"
    expected += (
        "0043 0044 0134 bf84 02010600 3903f326 0000 0000 00000000 64400103 64400102 00000000"
    )
    expected += "fee1bbd10001" + "00" * 202
    expected += "63825363 350102 360464400102 330400015180 0104fffffffe 030464400102 060464400102"
    expected += "0c03766d31 ff"
    assert frame.hex() == bytes.fromhex(expected).ljust(342, b"\0").hex()


def test_an_offer_says_what_rfc_2131_wants() -> None:
    reply = Reply(server().answer([request(kind(DISCOVER))]))
    assert (reply.dmac, reply.smac) == (GUEST_MAC, SERVER_MAC)
    assert (reply.source, reply.target) == (HOST, GUEST)
    assert (reply.ciaddr, reply.yiaddr, reply.giaddr) == (NOWHERE, GUEST, NOWHERE)
    assert reply.chaddr == GUEST_MAC + bytes(10)
    assert reply.options == {
        53: bytes((OFFER,)),
        54: HOST,
        51: (86400).to_bytes(4, "big"),
        1: bytes((255, 255, 255, 254)),
        3: HOST,
        6: HOST,
    }
    assert reply.order.index(1) < reply.order.index(3)  # RFC 2132, 3.3


def test_what_the_guest_is_told_can_be_chosen() -> None:
    local = LocalDhcp(
        GUEST_MAC,
        "10.0.2.15",
        "10.0.2.2",
        netmask="255.255.255.0",
        router="10.0.2.1",
        dns=("9.9.9.9", "8.8.4.4"),
        host_name="a.example",
        lease_seconds=60,
        server_mac=OTHER_MAC,
    )
    reply = Reply(local.answer([request(kind(DISCOVER))]))
    assert reply.smac == OTHER_MAC
    assert reply.yiaddr == bytes((10, 0, 2, 15))
    assert reply.options[1] == bytes((255, 255, 255, 0))
    assert reply.options[3] == bytes((10, 0, 2, 1))
    assert reply.options[6] == bytes((9, 9, 9, 9, 8, 8, 4, 4))
    assert reply.options[12] == b"a.example"
    assert reply.options[51] == (60).to_bytes(4, "big")
    assert reply.options[54] == bytes((10, 0, 2, 2))


def test_a_reply_is_broadcast_to_a_client_that_asks_for_it() -> None:
    reply = Reply(server().answer([request(kind(DISCOVER), flags=0x8000)]))
    assert (reply.dmac, reply.target, reply.flags) == (b"\xff" * 6, EVERYWHERE, 0x8000)


def test_the_client_identifier_comes_back() -> None:
    for size in (1, 7, 255):  # RFC 6842, 3
        identifier = bytes(range(256))[-size:]
        for ask in (kind(DISCOVER), kind(REQUEST) + option(50, bytes((10, 0, 0, 1)))):
            reply = Reply(server().answer([request(ask + option(61, identifier))]))
            assert reply.options[61] == identifier
            assert {53, 54} <= reply.options.keys()
            if reply.kind == OFFER:
                assert {51, 1, 3} <= reply.options.keys()


@pytest.mark.parametrize(
    ("asked", "ciaddr", "answer"),
    [
        pytest.param(option(54, HOST) + option(50, GUEST), NOWHERE, ACK, id="selecting us"),
        pytest.param(option(54, GUEST) + option(50, GUEST), NOWHERE, None, id="selecting another"),
        pytest.param(
            option(54, HOST) + option(50, HOST), NOWHERE, NAK, id="selecting, not offered"
        ),
        pytest.param(option(50, GUEST), NOWHERE, ACK, id="init-reboot"),
        pytest.param(option(50, bytes(4)), NOWHERE, NAK, id="init-reboot, wrong net"),
        pytest.param(b"", GUEST, ACK, id="renewing"),
        pytest.param(b"", bytes((10, 0, 0, 9)), NAK, id="renewing another's"),
        pytest.param(b"", NOWHERE, None, id="nothing asked for"),
        pytest.param(option(50, GUEST), HOST, None, id="contradiction"),
    ],
)
def test_a_request_is_answered_by_the_state_of_its_client(
    asked: bytes, ciaddr: bytes, answer: int | None
) -> None:
    """RFC 2131, 4.3.2."""
    frame = server().answer([request(kind(REQUEST) + asked, ciaddr=ciaddr)])
    if answer is None:
        assert frame is None
        return
    reply = Reply(frame)
    assert reply.kind == answer
    if answer == ACK:
        assert (reply.yiaddr, reply.ciaddr, reply.target) == (GUEST, ciaddr, GUEST)
        assert 51 in reply.options
    else:  # RFC 2131, 4.1 and table 3
        assert (reply.dmac, reply.target) == (b"\xff" * 6, EVERYWHERE)
        assert (reply.yiaddr, reply.ciaddr, reply.siaddr) == (NOWHERE, NOWHERE, NOWHERE)
        assert reply.options.keys() == {53, 54}


def test_a_lease_is_renewed_by_unicast_to_whatever_ethernet_address() -> None:
    ask = request(
        kind(REQUEST), ciaddr=GUEST, source=GUEST, target=HOST, dmac=bytes.fromhex("021122334455")
    )
    reply = Reply(server().answer([ask]))
    assert (reply.kind, reply.dmac, reply.target) == (ACK, GUEST_MAC, GUEST)


def test_inform_gets_parameters_and_no_lease() -> None:
    own = bytes((100, 64, 1, 77))
    reply = Reply(server().answer([request(kind(INFORM), ciaddr=own)]))
    assert (reply.kind, reply.yiaddr, reply.ciaddr, reply.target) == (ACK, NOWHERE, own, own)
    assert 51 not in reply.options and {1, 3, 6} <= reply.options.keys()
    assert server().answer([request(kind(INFORM))]) is None


@pytest.mark.parametrize("number", [0, OFFER, DECLINE, ACK, NAK, RELEASE, 9, 255])
def test_other_messages_are_not_answered(number: int) -> None:
    ask = kind(number) + option(50, GUEST) + option(54, HOST)
    assert server().answer([request(ask, ciaddr=GUEST)]) is None


def test_options_may_stand_in_the_other_fields() -> None:
    """RFC 2132, 9.3."""
    in_file = request(option(52, b"\1"), file=kind(REQUEST) + option(50, GUEST) + b"\xff")
    assert Reply(server().answer([in_file])).kind == ACK
    both = request(
        option(52, b"\3") + kind(REQUEST), file=option(54, HOST), sname=option(50, GUEST) + b"\xff"
    )
    assert Reply(server().answer([both])).kind == ACK
    not_said = request(kind(REQUEST), file=option(50, GUEST))
    assert server().answer([not_said]) is None


def test_a_long_option_comes_in_parts() -> None:
    """RFC 3396, 7."""
    ask = kind(REQUEST) + option(50, GUEST[:1]) + b"\0\0" + option(50, GUEST[1:])
    assert Reply(server().answer([request(ask)])).kind == ACK


# --- BOOTP ---------------------------------------------------------------------------------------


def test_a_bootp_request_is_answered() -> None:
    for options in (b"", option(55, b"\1\3"), None):
        reply = Reply(server(host_name="vm1").answer([request(options)]))
        assert (reply.yiaddr, reply.siaddr, reply.target) == (GUEST, HOST, GUEST)
        assert len(reply.vendor) == 64
        if options is None:  # a vendor field that says nothing is answered likewise
            assert reply.vendor == bytes(64)
        else:  # RFC 1497, and nothing of DHCP (RFC 1534, 2)
            assert reply.options == {1: b"\xff\xff\xff\xfe", 3: HOST, 6: HOST, 12: b"vm1"}


def test_a_bootp_client_that_knows_its_address_hears_it_there() -> None:
    reply = Reply(server().answer([request(None, ciaddr=GUEST, flags=0x8000)]))
    assert (reply.target, reply.ciaddr, reply.yiaddr) == (GUEST, GUEST, GUEST)
    assert server().answer([request(None, ciaddr=HOST)]) is None


def test_a_request_without_a_vendor_field_is_one() -> None:
    assert Reply(server().answer([request(None, vendor_size=0)])).yiaddr == GUEST


def test_what_does_not_fit_into_the_vendor_field_is_left_out() -> None:
    many = tuple(f"10.0.0.{number}" for number in range(1, 9))
    reply = Reply(server(dns=many, host_name="n" * 20).answer([request(b"")]))
    assert len(reply.vendor) == 64
    assert {1, 3, 6} == reply.options.keys()


# --- what is not for us --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"smac": OTHER_MAC},
        {"chaddr": OTHER_MAC},
        {"giaddr": HOST},
        {"op": 2},
        {"htype": 6},
        {"hlen": 16},
        {"hlen": 5},
        {"ports": (67, 67)},
        {"ports": (68, 68)},
        {"ports": (53, 67)},
        {"target": GUEST},
        {"fragment": 0x2000},
        {"fragment": 1},
        {"protocol": 6},
        {"ip_length": 27},
        {"ip_length": 0},
        {"ip_length": 0xFFFF},
        {"udp_length": 0},
        {"udp_length": 7},
        {"udp_length": 243},
        {"udp_length": 0xFFFF},
        {"options": option(53, b"")},
        {"options": option(53, b"\1\1")},
        {"options": kind(DISCOVER) + b"\x0c"},
        {"options": kind(DISCOVER) + b"\x0c", "end": b""},
        {"first": 0x55},
        {"first": 0x65},
        {"first": 0x44},
        {"first": 0x40},
        {"first": 0x4F},
        {"options": kind(DISCOVER) + b"\x0c\xff"},
        {"options": kind(DISCOVER) + option(52, b"")},
        {"options": kind(DISCOVER) + option(52, b"\1"), "file": b"\x0c\xff"},
        {"options": kind(REQUEST) + option(50, b"\1\2\3")},
        {"options": kind(REQUEST) + option(54, HOST + b"\0")},
        {"vendor_size": 1500},
    ],
    ids=str,
)
def test_no_answer(changes: dict[str, object]) -> None:
    usual: dict[str, object] = {"options": kind(DISCOVER), "vendor_size": 0}
    assert server().answer([request(**usual)]) is not None  # type: ignore[arg-type]
    assert server().answer([request(**(usual | changes))]) is None  # type: ignore[arg-type]


def test_a_wrong_ip_checksum_is_no_request_and_ip_options_are_fine() -> None:
    good = request(kind(DISCOVER), ip_options=b"\x94\4\0\0")
    assert server().answer([good]) is not None
    assert server().answer([good[:24] + bytes((good[24] ^ 1,)) + good[25:]]) is None


def test_a_udp_checksum_that_was_left_undone_does_not_matter() -> None:
    assert server().answer([request(kind(DISCOVER), udp_checksum=0x1234)]) is not None


def test_padding_behind_the_packet_is_not_read() -> None:
    whole = request(kind(DISCOVER), vendor_size=0)
    assert server().answer([whole + option(53, b"\3")]) == server().answer([whole])


# --- any bytes, in any pieces --------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 330), max_size=8))
def test_the_answer_does_not_depend_on_how_the_request_is_cut(cuts: list[int]) -> None:
    ask = request(kind(DISCOVER) + option(61, b"\1" + GUEST_MAC))
    assert server().answer(split(ask, cuts)) == server().answer([ask])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 360), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
    st.lists(st.integers(0, 400), max_size=4),
)
def test_damaged_requests_never_raise_and_answers_are_whole(
    changes: list[tuple[int, int]], length: int, cuts: list[int]
) -> None:
    frame = bytearray(request(kind(REQUEST) + option(52, b"\3") + option(50, GUEST) + bytes(40)))
    for place, value in changes:
        if place < len(frame):
            frame[place] = value
    frame[24:26] = bytes(2)  # the checksum is right, so that the changes are looked at
    frame[24:26] = (0xFFFF - slow_sum(bytes(frame[14 : 14 + (frame[14] & 15) * 4]))).to_bytes(
        2, "big"
    )
    answer = server().answer(split(frame[:length] if length < 380 else frame, cuts))
    if answer is not None:
        assert answer[6:12] == SERVER_MAC
        assert slow_sum(answer[14:34]) == 0xFFFF


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_any_options_never_raise(options: bytes) -> None:
    server().answer([request(options, vendor_size=0)])
    server().answer([request(option(52, b"\3"), file=options[:64], sname=options[64:])])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_frames_never_raise(pieces: list[bytes]) -> None:
    assert server().answer(pieces) is None


class Rewritten(bytearray):
    """Memory that a guest rewrites once it was looked at for the first time."""

    then = b""

    def __getitem__(self, key: Any) -> Any:
        seen = bytes(self)[key]
        self[:] = self.then
        return seen


@pytest.mark.parametrize(
    "then",
    [
        request(kind(DISCOVER), smac=OTHER_MAC),
        request(kind(DISCOVER), protocol=6),
        request(kind(DISCOVER), target=GUEST),
        bytes(326),
        request(kind(REQUEST) + option(50, GUEST)),
    ],
)
def test_a_guest_that_rewrites_its_request_is_judged_by_one_copy(then: bytes) -> None:
    memory = Rewritten(request(kind(DISCOVER)))
    memory.then = then
    assert server().answer([memory]) == server().answer([then])


# --- what our caller may not ask -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"guest_mac": b"\1\2\3\4\5\6"}, "unicast"),
        ({"guest_mac": b"\2\2\3"}, "unicast"),
        ({"server_mac": bytes(6)}, "unicast"),
        ({"guest_address": "100.64.1"}, "not an IPv4 address"),
        ({"guest_address": "100.64.1.2"}, "both"),
        ({"guest_address": "100.64.1.4"}, "not in the guest's network"),
        ({"router": "100.64.1.7"}, "not in the guest's network"),
        ({"netmask": "255.0.255.0"}, "not a network mask"),
        ({"netmask": "0.0.0.255"}, "not a network mask"),
        ({"netmask": "255.255.255.252"}, "no host's address"),
        ({"host_name": "a b"}, "host name"),
        ({"host_name": "é"}, "host name"),
        ({"host_name": "x" * 64}, "host name"),
        ({"lease_seconds": 0}, "lease"),
        ({"lease_seconds": 1 << 32}, "lease"),
        ({"dns": ("1.1.1.1",) * 9}, "name servers"),
        ({"dns": ("one",)}, "not an IPv4 address"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], what: str) -> None:
    usual: dict[str, object] = {
        "guest_mac": GUEST_MAC,
        "guest_address": "100.64.1.3",
        "host_address": "100.64.1.2",
    }
    LocalDhcp(**usual)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=what):
        LocalDhcp(**(usual | changes))  # type: ignore[arg-type]


# --- with a device in front of it ----------------------------------------------------------------


class Guest:
    """A scripted guest whose device has the server, and the other end of its cable."""

    def __init__(
        self, *, lock_mac: bool = False, features: int = NET_DRIVER_FEATURES, **how: Any
    ) -> None:
        self.link, self.wire = link_pair()
        self.memory = GuestMemory.allocate(32 << 20)
        self.device = NetDevice(
            self.link,
            mac=GUEST_MAC,
            lock_mac=lock_mac,
            responders=(server().answer,),
            memory=self.memory,
        )
        self.driver = NetDriver(self.device, self.memory, features, **how)

    def sent(self) -> list[bytes]:
        """What reached the other end of the cable."""
        room = _Room()
        self.wire.ports[0].read_burst(room, 1000)
        return room.frames

    def close(self) -> None:
        self.driver.close()
        self.device.close()
        self.memory.close()


class _Room:
    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def views(self) -> list[memoryview]:
        self.lent = memoryview(bytearray(70000))
        return [self.lent]

    def commit(self, header: bytes, length: int) -> None:
        self.frames.append(bytes(self.lent[:length]))


def received(guest: Guest) -> list[bytes]:
    return [frame.data for frame in guest.driver.receive()]


@pytest.mark.parametrize("lock_mac", [False, True])
@pytest.mark.parametrize("features", [NET_DRIVER_FEATURES, 1 << 32], ids=["all", "few"])
def test_a_guest_gets_its_address_from_its_device(lock_mac: bool, features: int) -> None:
    with closing(Guest(lock_mac=lock_mac, features=features)) as guest:
        assert guest.driver.send(request(kind(DISCOVER)))
        (offer,) = received(guest)
        assert Reply(offer).kind == OFFER
        assert guest.driver.send(request(kind(REQUEST) + option(54, HOST) + option(50, GUEST)))
        (ack,) = received(guest)
        assert Reply(ack).kind == ACK
        assert guest.sent() == []
        assert guest.device.stats["tx_answered"] == 2
        assert guest.device.stats["rx_frames"] == 2
        assert guest.driver.reap() == 1  # the request's buffer; the first one's went before
        assert not guest.driver.needs_reset


def test_other_frames_go_to_the_link_in_their_order() -> None:
    with closing(Guest()) as guest:
        frames = [
            request(kind(RELEASE)),
            request(kind(DISCOVER)),
            request(kind(DISCOVER), chaddr=OTHER_MAC),
            bytes(60),
        ]
        assert guest.driver.send_burst([(NetHeader(), frame) for frame in frames]) == 4
        assert guest.sent() == [frames[0], *frames[2:]]
        assert len(received(guest)) == 1


def test_a_locked_mac_is_stronger_than_a_request() -> None:
    with closing(Guest(lock_mac=True)) as guest:
        guest.driver.send(request(kind(DISCOVER), smac=OTHER_MAC))
        assert (received(guest), guest.sent()) == ([], [])
        assert guest.device.stats["tx_dropped: source address"] == 1


def test_a_request_whose_checksum_was_left_undone_is_answered() -> None:
    header = NetHeader(flags=1, csum_start=34, csum_offset=6)
    with closing(Guest()) as guest:
        guest.driver.send(request(kind(DISCOVER), udp_checksum=0x1234), header)
        assert Reply(received(guest)[0]).kind == OFFER
        lie = header._replace(csum_start=0xFFF0)
        guest.driver.send(request(kind(DISCOVER)), lie)
        assert received(guest) == []
        assert guest.device.stats["tx_dropped: csum beyond frame"] == 1


def test_answers_wait_for_buffers_but_not_without_end() -> None:
    with closing(Guest(receive_buffers=2, features=1 << 32)) as guest:
        for _ in range(10):
            burst = [(NetHeader(), request(kind(DISCOVER)))] * 20
            assert guest.driver.send_burst(burst) == 20
        came = 0
        while frames := received(guest):
            came += len(frames)
            assert all(Reply(frame).kind == OFFER for frame in frames)
        assert came == 2 + 64
        assert guest.device.stats["rx_dropped: no room for an answer"] == 200 - came


def test_answers_and_frames_from_the_link_come_together() -> None:
    with closing(Guest()) as guest:
        for number in range(30):
            guest.wire.ports[0].write_burst([[bytes(12), bytes((number,)) * 60]])
            guest.driver.send(request(kind(DISCOVER)))
        frames = received(guest)
        assert [frame[0] for frame in frames if len(frame) == 60] == list(range(30))
        assert sum(len(frame) > 60 for frame in frames) == 30


def test_a_responder_may_be_any_function_and_the_first_answer_counts() -> None:
    seen: list[bytes] = []

    def listener(pieces: object) -> None:
        seen.append(b"".join(pieces))  # type: ignore[arg-type]

    def echo(pieces: object) -> bytes:
        return b"".join(pieces)[::-1]  # type: ignore[arg-type]

    memory = GuestMemory.allocate(32 << 20)
    device = NetDevice(NullLink(), memory=memory, responders=(listener, echo, listener))
    driver = NetDriver(device, memory)
    driver.send(bytes(range(60)))
    assert [frame.data for frame in driver.receive()] == [bytes(range(60))[::-1]]
    assert seen == [bytes(range(60))]
    driver.close()
    memory.close()


def test_the_answer_reaches_a_guest_that_is_called_back_in_the_middle() -> None:
    """A link of this process whose other end sends while it is written to."""
    with closing(Guest()) as guest:
        other: QueuePort = guest.wire.ports[0]  # type: ignore[assignment]

        def echo() -> None:
            other.write_burst([[bytes(12), b"\x55" * 60]])

        other.on_readable = echo
        burst = [(NetHeader(), bytes(60)), (NetHeader(), request(kind(DISCOVER)))]
        assert guest.driver.send_burst(burst) == 2
        assert sorted(map(len, received(guest))) == [60, 342]


# --- a real client -------------------------------------------------------------------------------


def no_client() -> str | None:
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() or not os.path.exists("/dev/net/tun") or not shutil.which("ip"):
        return "needs root, /dev/net/tun and ip(8)"
    if not shutil.which("busybox"):
        return "needs busybox"
    known = subprocess.run(["busybox", "--list"], capture_output=True, text=True, timeout=20)
    return None if "udhcpc" in known.stdout.split() else "this busybox has no udhcpc"


SCRIPT = """#!/bin/sh
echo "$1" "$ip" "$mask" "$router" "$dns" "$hostname" "$lease" "$serverid" >> "$LOG"
case "$1" in
deconfig) ip addr flush dev "$interface"; ip link set "$interface" up ;;
bound) ip addr add "$ip/$mask" dev "$interface"; ip route add default via "$router" ;;
renew) : ;;
esac
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"dh{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=20)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=20)


@pytest.mark.skipif(no_client() is not None, reason=no_client() or "")
@pytest.mark.parametrize("flags", [[], ["-B"]], ids=["unicast", "broadcast"])
def test_a_real_client_configures_its_address(
    namespace: str, tmp_path: Path, flags: list[str]
) -> None:
    """udhcpc in a namespace; its frames come out of a tap and go to the server and back."""
    from vq.tap_linux import LinuxTap

    script, log = tmp_path / "script", tmp_path / "log"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    in_namespace = ["ip", "netns", "exec", namespace]

    def ip(*arguments: str) -> str:
        command = [*in_namespace, "ip", *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20
        ).stdout

    local = server(host_name="vm1", lease_seconds=3600)
    with closing(LinuxTap("dh%d", namespace=namespace)) as tap:
        ip("link", "set", tap.name, "address", GUEST_MAC.hex(":"), "up")
        client = subprocess.Popen(
            [
                *in_namespace,
                *("busybox", "udhcpc", "-i", tap.name, "-f", "-s", str(script)),
                *("-n", "-t", "8", "-T", "1", "-x", "hostname:guest", *flags),
            ],
            env={**os.environ, "LOG": str(log)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 30
            renewed = False
            while "renew" not in (log.read_text() if log.exists() else ""):
                assert time.monotonic() < deadline, "the client has no address yet"
                assert client.poll() is None, "the client gave up"
                if not renewed and log.exists() and "bound" in log.read_text():
                    renewed = True
                    # The host's end, where a renewal by unicast goes.
                    ip(
                        *("neigh", "replace", "100.64.1.2", "dev", tap.name),
                        *("lladdr", "02:00:00:00:00:99", "nud", "permanent"),
                    )
                    client.send_signal(10)  # SIGUSR1: renew now
                serve(tap, local)
            addresses = json.loads(ip("-j", "addr", "show", "dev", tap.name))
        finally:
            client.kill()
            client.wait(10)
        (address,) = [one for one in addresses[0]["addr_info"] if one["family"] == "inet"]
        assert (address["local"], address["prefixlen"]) == ("100.64.1.3", 31)
        assert "default via 100.64.1.2" in ip("route")
    said = "100.64.1.3 31 100.64.1.2 100.64.1.2 vm1 3600 100.64.1.2"
    lines = log.read_text().splitlines()
    assert lines[0].split()[0] == "deconfig"
    assert [line for line in lines if line.startswith("bound")] == [f"bound {said}"]
    assert [line for line in lines if line.startswith("renew")] == [f"renew {said}"]


def serve(tap: object, local: LocalDhcp) -> None:
    """Waits a moment for frames from the client's kernel, and answers them."""
    from vq.tap_linux import LinuxTap

    assert isinstance(tap, LinuxTap)
    port = tap.ports[0]
    select.select([port.fileno()], [], [], 0.05)
    room = _Room()
    with contextlib.suppress(OSError):
        port.read_burst(room, 64)
    for frame in room.frames:
        answer = local.answer([frame])
        if answer is not None:
            assert port.write_burst([[bytes(12), answer]]) == 1


def test_the_links_of_these_tests_are_what_they_seem() -> None:
    """Without a responder the same request goes out: the rules above are the responder's."""
    link, wire = link_pair()
    assert isinstance(wire, PairedLink)
    memory = GuestMemory.allocate(32 << 20)
    device = NetDevice(link, mac=GUEST_MAC, memory=memory)
    driver = NetDriver(device, memory)
    assert driver.has_feature(NetFeature.MRG_RXBUF)
    driver.send(request(kind(DISCOVER)))
    room = _Room()
    assert wire.ports[0].read_burst(room, 10) == 1
    assert room.frames == [request(kind(DISCOVER))]
    assert driver.receive() == []
    driver.close()
    memory.close()
