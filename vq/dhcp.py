"""A DHCP and BOOTP server for exactly one guest, without sockets: frames in, frames out.

A guest on a link of its own, host on one end and guest on the other, gets its address from the
device that it is plugged into: `LocalDhcp.answer` looks at a frame that the guest sends, and gives
back the whole frame that answers it. There is one lease and it never changes, so there is no state.

Sources: RFC 2131 (DHCP), RFC 2132 (its options), RFC 951 and RFC 1542 (BOOTP), RFC 1534 (one server
for both), RFC 3396 (long options), RFC 6842 (the client identifier comes back).
"""

from __future__ import annotations

import enum
import string
import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import TypeAlias

from vq.errors import UsageError
from vq.packet import Buffer, checksum, copy_range

__all__ = ["SERVER_MAC", "LocalDhcp", "MessageType", "Option"]

SERVER_MAC = bytes.fromhex("02767164 6863")
"""A locally administered unicast address: what answers come from where no other is chosen."""

Address: TypeAlias = IPv4Address | str


class Option(enum.IntEnum):
    """The options that are read or written (RFC 2132)."""

    PAD = 0
    SUBNET_MASK = 1
    ROUTER = 3
    DNS = 6
    HOST_NAME = 12
    REQUESTED_ADDRESS = 50
    LEASE_TIME = 51
    OVERLOAD = 52
    MESSAGE_TYPE = 53
    SERVER_IDENTIFIER = 54
    CLIENT_IDENTIFIER = 61
    END = 255


class MessageType(enum.IntEnum):
    """What a DHCP message says (RFC 2132, 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


BROADCAST_MAC = b"\xff" * 6
BROADCAST = b"\xff" * 4
NOWHERE = bytes(4)
ETHERTYPE_IPV4 = b"\x08\x00"
UDP = 17
SERVER_PORT, CLIENT_PORT = 67, 68
BOOTREQUEST, BOOTREPLY = 1, 2
HTYPE_ETHERNET = 1
BROADCAST_FLAG = 0x8000  # RFC 2131, 2
COOKIE = b"\x63\x82\x53\x63"  # RFC 2131, 3

ETHERNET_SIZE = 14
_HOST_NAME = set(string.ascii_letters + string.digits + "-.")
MAX_REQUEST = 1514
"""No request is longer than an Ethernet frame of the usual size: no more is ever copied."""

_IP = struct.Struct("!BBHHHBBH4s4s")  # RFC 791, 3.1
_UDP = struct.Struct("!HHHH")  # RFC 768
_BOOTP = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")  # RFC 2131, 2
_MIN_IP = _IP.size + _UDP.size + _BOOTP.size
_BOOTP_OPTIONS = 64
"""Bytes of BOOTP's vendor field, the cookie counted (RFC 951, 3); answers are filled up to it."""
_DHCP_OPTIONS = 312
"""What every DHCP client takes (RFC 2131, 2), and so as much as is ever sent."""


class LocalDhcp:
    """Leases `guest_address` to the guest whose Ethernet address is `guest_mac` (6 bytes).

    The server and the guest's default router is `host_address`, or `router` for the latter; both
    must be in the guest's network. By default the network is the two of them (`netmask` with 31
    bits, RFC 3021). `dns` are the name servers, `host_address` when none are given;
    `host_name` is the guest's name, `lease_seconds` how long a lease lasts before the guest asks
    again, `server_mac` where answers come from.

    Requests are answered that the guest makes for itself; those of machines behind it are not, nor
    those that came through a relay. A request for any other address than the guest's is refused
    with a NAK, since nobody else hands out addresses on this link; one that names another server
    is left to it.

    Raises `UsageError` for what is no such address or does not go together.
    """

    def __init__(
        self,
        guest_mac: bytes,
        guest_address: Address,
        host_address: Address,
        *,
        netmask: Address = "255.255.255.254",
        router: Address | None = None,
        dns: Sequence[Address] = (),
        host_name: str = "",
        lease_seconds: int = 86400,
        server_mac: bytes = SERVER_MAC,
    ) -> None:
        for mac in (guest_mac, server_mac):
            if len(mac) != 6 or mac[0] & 1 or not any(mac):
                raise UsageError(f"{mac.hex(':')} is not a unicast MAC address")
        if not 1 <= lease_seconds <= 0xFFFFFFFF:
            raise UsageError(f"a lease of {lease_seconds} seconds cannot be told to a guest")
        if len(host_name) > 63 or set(host_name) - _HOST_NAME:
            raise UsageError(f"{host_name!r} cannot be a host name")
        if len(dns) > 8:
            raise UsageError(f"{len(dns)} name servers: an answer has room for 8")
        guest, host = _address(guest_address), _address(host_address)
        gateway = host if router is None else _address(router)
        if guest in (host, gateway):
            raise UsageError(f"{guest} cannot be both the guest's address and the host's")
        network = _network(guest, _address(netmask))
        for other in (host, gateway):
            if other not in network:
                raise UsageError(f"{other} is not in the guest's network {network}")
        self.guest_mac = bytes(guest_mac)
        self.server_mac = bytes(server_mac)
        self.guest_address = guest
        self.host_address = host
        self._ours = host.packed
        self._targets = (BROADCAST, self._ours)
        self._lease = guest.packed
        servers = [_address(server) for server in dns] or [host]
        self._lease_time = lease_seconds.to_bytes(4, "big")
        self._network_options: list[tuple[Option, bytes]] = [
            # RFC 2132, 3.3: the mask comes before the router.
            (Option.SUBNET_MASK, network.netmask.packed),
            (Option.ROUTER, gateway.packed),
            (Option.DNS, b"".join(server.packed for server in servers)),
            (Option.HOST_NAME, host_name.encode()),
        ]

    def answer(self, pieces: Sequence[Buffer]) -> bytes | None:
        """The frame that answers a frame from the guest; None for one that is not for us.

        `pieces` are the frame's bytes from the Ethernet header on, cut in any way. They may change
        at any time: they are copied once, and judged by the copy. Any bytes at all are allowed.
        """
        if _byte(pieces, ETHERNET_SIZE + 9) != UDP:  # almost every frame ends here
            return None
        if copy_range(pieces, ETHERNET_SIZE + 16, ETHERNET_SIZE + 20) not in self._targets:
            return None
        frame = copy_range(pieces, 0, MAX_REQUEST)
        message = self._udp_payload(frame)
        if message is None:
            return None
        request = _read(message)
        if request is None or request.mac != self.guest_mac:
            return None
        return self._reply_to(request)

    # --- what was asked ---------------------------------------------------------------------------

    def _udp_payload(self, frame: bytes) -> bytes | None:
        """What the frame carries from the guest's BOOTP client to our server, if it does.

        The UDP checksum is not looked at: the guest may have left it undone, and between its
        memory and this copy of it no wire was there to damage anything.
        """
        if len(frame) < ETHERNET_SIZE + _MIN_IP or frame[6:12] != self.guest_mac:
            return None
        if frame[12:14] != ETHERTYPE_IPV4:
            return None
        packet = frame[ETHERNET_SIZE:]
        first, _, length, _, fragment, _, protocol, _, _, target = _IP.unpack_from(packet)
        header = (first & 15) * 4
        if first >> 4 != 4 or header < _IP.size or protocol != UDP or fragment & 0x3FFF:
            return None
        if target not in self._targets or not header + _UDP.size <= length <= len(packet):
            return None
        if checksum((packet[:header],)):  # RFC 1122, 3.2.1.2
            return None
        source_port, target_port, size, _ = _UDP.unpack_from(packet, header)
        if (source_port, target_port) != (CLIENT_PORT, SERVER_PORT):
            return None
        if not _UDP.size <= size <= length - header:
            return None
        return packet[header + _UDP.size : header + size]

    def _reply_to(self, request: _Request) -> bytes | None:
        kind = request.kind
        if kind is None:
            return self._bootp(request)
        if kind == MessageType.DISCOVER:
            return self._grant(request, MessageType.OFFER)
        if kind == MessageType.REQUEST:
            return self._requested(request)
        if kind == MessageType.INFORM and request.client != NOWHERE:
            # RFC 2131, 4.3.5: no lease, and to the address that the client has.
            return self._reply(request, MessageType.ACK, address=NOWHERE)
        return None  # DECLINE and RELEASE are not answered (RFC 2131, 4.3.3 and 4.3.4)

    def _bootp(self, request: _Request) -> bytes | None:
        """BOOTP asks once and keeps the address (RFC 951, 7.3)."""
        if request.client not in (NOWHERE, self._lease):
            return None
        return self._reply(request, None, address=self._lease)

    def _requested(self, request: _Request) -> bytes | None:
        """A DHCPREQUEST, by what the client is about (RFC 2131, 4.3.2)."""
        server = request.options.get(Option.SERVER_IDENTIFIER)
        wanted = request.options.get(Option.REQUESTED_ADDRESS)
        if server is not None and server != self._ours:  # SELECTING, and not us
            return None
        if wanted is None:  # RENEWING, REBINDING
            if request.client == NOWHERE:
                return None
            wanted = request.client
        elif request.client != NOWHERE and request.client != wanted:
            return None
        if wanted != self._lease:
            return self._refuse(request)
        return self._grant(request, MessageType.ACK)

    # --- what is answered -------------------------------------------------------------------------

    def _grant(self, request: _Request, kind: MessageType) -> bytes:
        return self._reply(
            request, kind, address=self._lease, more=[(Option.LEASE_TIME, self._lease_time)]
        )

    def _refuse(self, request: _Request) -> bytes:
        """Nobody may believe to have the address of a NAK: all of them hear it (RFC 2131, 4.1)."""
        return self._frame(
            request,
            server=NOWHERE,
            client=NOWHERE,
            address=NOWHERE,
            options=_pack(self._head(request, MessageType.NAK), _DHCP_OPTIONS),
            target=BROADCAST,
        )

    def _head(self, request: _Request, kind: MessageType) -> list[tuple[Option, bytes]]:
        head = [
            (Option.MESSAGE_TYPE, bytes((kind,))),
            (Option.SERVER_IDENTIFIER, self._ours),
        ]
        identifier = request.options.get(Option.CLIENT_IDENTIFIER)
        if identifier:
            head.append((Option.CLIENT_IDENTIFIER, identifier))  # RFC 6842, 3
        return head

    def _reply(
        self,
        request: _Request,
        kind: MessageType | None,
        *,
        address: bytes,
        more: Iterable[tuple[Option, bytes]] = (),
    ) -> bytes:
        """An answer that grants something, to where the client can hear it (RFC 2131, 4.1)."""
        if kind is None:
            options = _pack(self._network_options, _BOOTP_OPTIONS) if request.cookie else b""
        else:
            options = _pack(
                [*self._head(request, kind), *more, *self._network_options], _DHCP_OPTIONS
            )
        if request.client != NOWHERE:
            target = request.client
        elif request.flags & BROADCAST_FLAG:
            target = BROADCAST
        else:
            target = address
        return self._frame(
            request,
            server=self._ours,
            client=NOWHERE if kind is MessageType.OFFER else request.client,
            address=address,
            options=options,
            target=target,
        )

    def _frame(
        self,
        request: _Request,
        *,
        server: bytes,
        client: bytes,
        address: bytes,
        options: bytes,
        target: bytes,
    ) -> bytes:
        """The whole frame around a reply."""
        message = _BOOTP.pack(
            BOOTREPLY,
            HTYPE_ETHERNET,
            6,
            0,
            request.transaction,
            0,
            request.flags,
            client,
            address,
            server,
            NOWHERE,
            self.guest_mac,
            b"",
            b"",
        ) + options.ljust(_BOOTP_OPTIONS, b"\0")
        size = _UDP.size + len(message)
        udp = _UDP.pack(SERVER_PORT, CLIENT_PORT, size, 0)
        pseudo = self._ours + target + struct.pack("!HH", UDP, size)
        value = checksum((pseudo, udp, message)) or 0xFFFF  # RFC 768: 0 means none
        udp = _UDP.pack(SERVER_PORT, CLIENT_PORT, size, value)
        ip_fields = (0x45, 0, _IP.size + size, 0, 0, 64, UDP)
        ip = _IP.pack(*ip_fields, 0, self._ours, target)
        ip = _IP.pack(*ip_fields, checksum((ip,)), self._ours, target)
        target_mac = BROADCAST_MAC if target == BROADCAST else self.guest_mac
        return b"".join((target_mac, self.server_mac, ETHERTYPE_IPV4, ip, udp, message))


class _Request:
    """What matters of a request."""

    def __init__(
        self,
        transaction: int,
        flags: int,
        client: bytes,
        mac: bytes,
        options: Mapping[int, bytes] | None,
    ) -> None:
        self.transaction = transaction
        self.flags = flags & BROADCAST_FLAG  # RFC 2131, 2: the others must be zero
        self.client = client
        """`ciaddr`: the address that the client has, if it has one."""
        self.mac = mac
        self.cookie = options is not None
        """Whether it has options, or nothing that is known."""
        self.options = options or {}
        kind = self.options.get(Option.MESSAGE_TYPE)
        self.kind = None if kind is None else kind[0]
        """The DHCP message type; None for BOOTP (RFC 1534, 2)."""


def _read(message: bytes) -> _Request | None:
    """Reads a request; None when it is none, came through a relay, or its options are broken."""
    if len(message) < _BOOTP.size:
        return None
    fields = _BOOTP.unpack_from(message)
    operation, hardware, mac_size, _, transaction, _, flags, client = fields[:8]
    relay, mac, server_name, file = fields[10:]
    if (operation, hardware, mac_size, relay) != (BOOTREQUEST, HTYPE_ETHERNET, 6, NOWHERE):
        return None
    options: dict[int, bytes] | None = None
    if message.startswith(COOKIE, _BOOTP.size):
        options = {}
        sound = _read_options(message[_BOOTP.size + len(COOKIE) :], options)
        # RFC 2132, 9.3: more of them may stand in the file's field, the server name's, or both.
        overload = int.from_bytes(options.get(Option.OVERLOAD, b""), "big")
        if overload & 1:
            sound &= _read_options(file, options)
        if overload & 2:
            sound &= _read_options(server_name, options)
        if not sound or any(len(options.get(kind, bytes(n))) != n for kind, n in _SIZES.items()):
            return None
    return _Request(transaction, flags, client, mac[:6], options)


_SIZES = {
    Option.OVERLOAD: 1,
    Option.MESSAGE_TYPE: 1,
    Option.REQUESTED_ADDRESS: 4,
    Option.SERVER_IDENTIFIER: 4,
}


def _read_options(data: bytes, options: dict[int, bytes]) -> bool:
    """Adds the options in `data`; False when one of them runs past the end."""
    at = 0
    while at < len(data) and data[at] != Option.END:
        code = data[at]
        at += 1
        if code == Option.PAD:
            continue
        if at == len(data) or at + 1 + data[at] > len(data):
            return False
        value = data[at + 1 : at + 1 + data[at]]
        options[code] = options.get(code, b"") + value  # RFC 3396, 7
        at += 1 + len(value)
    return True


def _pack(options: Iterable[tuple[Option, bytes]], limit: int) -> bytes:
    """The cookie and the options, the important ones first: what does not fit is left out."""
    packed = COOKIE
    for option, value in options:
        if value and len(value) <= 255 and len(packed) + 2 + len(value) < limit:
            packed += bytes((option, len(value))) + value
    return packed + bytes((Option.END,))


def _byte(pieces: Sequence[Buffer], place: int) -> int | None:
    """One byte of the pieces' bytes, None beyond their end."""
    for piece in pieces:
        if place < len(piece):
            return piece[place]
        place -= len(piece)
    return None


def _network(guest: IPv4Address, netmask: IPv4Address) -> IPv4Network:
    try:
        network = IPv4Network(f"{guest}/{netmask}", strict=False)
    except ValueError as error:
        raise UsageError(f"{netmask} is not a network mask") from error
    if network.netmask != netmask:  # it would be taken for the complement of one
        raise UsageError(f"{netmask} is not a network mask")
    ends = (network.network_address, network.broadcast_address)
    if network.prefixlen < 31 and guest in ends:
        raise UsageError(f"{guest} is no host's address in {network}")
    return network


def _address(address: Address) -> IPv4Address:
    try:
        return IPv4Address(address)
    except ValueError as error:
        raise UsageError(f"{address!r} is not an IPv4 address") from error
