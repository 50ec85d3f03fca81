#!/usr/bin/env python3
"""Makes the capture that vq ships, out of traffic between network stacks of the running kernel.

    make_capture.py OUTPUT.pcapng [PART ...]

Two network namespaces, capA and capB, are two hosts joined by a veth pair. Each part sets them up
afresh, lets them talk over ordinary sockets while tcpdump listens on capB's end, and becomes one
interface of the output, named after the part; without PART all parts are made. Transmit checksum
offload is off on both ends, so that the capture holds finished checksums, as a wire would.

Needs root, iproute2, ethtool and tcpdump, and veth, bridge and (for two parts) 8021q in the kernel.
Everything it makes in the system is gone when it ends. The result is the same in kind each time,
not in bytes. Outputs of several runs, on several kernels too, may be put together with cat(1):
pcapng files in a row are one pcapng file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vq.pcap import PcapngWriter, read_frames

A, B = "capA", "capB"
MAC = {A: "02:00:00:00:00:0a", B: "02:00:00:00:00:0b"}
IP4 = {A: "192.0.2.1", B: "192.0.2.2"}
IP6 = {A: "2001:db8::1", B: "2001:db8::2"}
FAR_IP6 = "2001:db8:ff::2"  # a second address of capB, for the routing header
GROUP4, GROUP6 = "239.192.0.7", "ff15::7"

# What Python's socket module does not name: asm-generic/socket.h, linux/udp.h, linux/sockios.h
SO_NO_CHECK = 11
SO_ATTACH_FILTER = 26
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX = 101, 102
IP_OPTIONS = 4
MSG_FASTOPEN = 0x20000000
CLONE_NEWNET = 0x40000000

RECORD_ROUTE = bytes([7, 11, 4]) + bytes(8) + b"\x00"  # RFC 791: room for two addresses
ROUTER_ALERT = bytes([148, 4, 0, 0])  # RFC 2113
TIMESTAMPS = bytes([68, 12, 5, 0]) + bytes(8)  # RFC 791: room for two times
# RFC 8200, 4.2: padding, and an option 0x1e for experiments (RFC 4727) to skip if not known
OPTIONS6 = bytes([0, 0, 0x1E, 2, 0xBE, 0xEF, 1, 0])
OPTIONS6_LONG = bytes([0, 2, 0x1E, 18]) + bytes(range(18)) + bytes([0, 0])
ROUTER_ALERT6 = bytes([0, 0, 5, 2, 0, 0, 1, 0])  # RFC 2711

noise = random.Random(1).randbytes
libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str) -> None:
    """Runs a command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def inside(host: str) -> Iterator[None]:
    """Sockets made meanwhile belong to that host."""
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{host}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)


def sysctl(host: str, name: str, value: object) -> None:
    """Sets a setting of one host's network stack."""
    with inside(host):
        Path("/proc/sys/net", name).write_text(str(value))


def open_socket(host: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of that host, which gives up after some seconds."""
    with inside(host):
        made = socket.socket(family, kind, protocol)
    made.settimeout(10)
    return made


# The wire, and what listens to it


def connect_hosts(mtu: int) -> None:
    """Makes both hosts and the veth pair, down on capA's side."""
    for host in (A, B):
        run("ip", "netns", "add", host)
        sysctl(host, "ipv6/conf/default/accept_dad", 0)
        sysctl(host, "ipv6/conf/default/seg6_enabled", 1)
        sysctl(host, "ipv6/conf/all/seg6_enabled", 1)
        sysctl(host, "ipv4/ping_group_range", "0 2147483647")
        sysctl(host, "ipv4/tcp_ecn", 1)
        sysctl(host, "ipv4/tcp_fastopen", 3)
        run("ip", "-n", host, "link", "set", "lo", "up")
    run(
        *("ip", "link", "add", "cap0", "netns", A, "mtu", str(mtu), "address", MAC[A]),
        *("type", "veth", "peer", "name", "cap0", "netns", B, "mtu", str(mtu), "address", MAC[B]),
    )
    for host in (A, B):
        run("ip", "netns", "exec", host, "ethtool", "-K", "cap0", "tx", "off", "gro", "off")
        add_addresses(host, "cap0", 0)
    run("ip", "-n", B, "address", "add", f"{FAR_IP6}/128", "dev", "lo")
    run("ip", "-n", B, "link", "set", "cap0", "up")


def add_addresses(host: str, device: str, subnet: int) -> None:
    """Gives a device the host's addresses in one of the subnets 192.0.2.0/26, .64/26, .128/26."""
    address = f"{ip4(host, subnet)}/26"
    run("ip", "-n", host, "address", "add", address, "broadcast", "+", "dev", device)
    run("ip", "-n", host, "address", "add", f"{ip6(host, subnet)}/64", "dev", device)


def ip4(host: str, subnet: int = 0) -> str:
    """The host's IPv4 address in a subnet."""
    head, _, last = IP4[host].rpartition(".")
    return f"{head}.{int(last) + 64 * subnet}"


def ip6(host: str, subnet: int = 0) -> str:
    """The host's IPv6 address in a subnet."""
    return IP6[host].replace("::", f":{subnet}::") if subnet else IP6[host]


def disconnect_hosts() -> None:
    """Takes both hosts away, and with them their devices."""
    for host in (A, B):
        if Path(f"/run/netns/{host}").exists():
            run("ip", "netns", "delete", host)


@contextlib.contextmanager
def captured(mtu: int, path: Path) -> Iterator[None]:
    """Two connected hosts, and a capture of all that passes between them meanwhile."""
    if any(Path(f"/run/netns/{host}").exists() for host in (A, B)):
        raise SystemExit(f"a network namespace {A} or {B} is there already")
    try:
        connect_hosts(mtu)
        listener = subprocess.Popen(
            [
                *("ip", "netns", "exec", B, "tcpdump", "-i", "cap0", "-w", str(path)),
                *("-U", "--immediate-mode", "-B", "16384", "--time-stamp-precision=nano"),
                *("-Z", "root"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert listener.stderr is not None
        try:
            while "listening on" not in (line := listener.stderr.readline()):
                if not line:
                    raise SystemExit("tcpdump does not start")
            run("ip", "-n", A, "link", "set", "cap0", "up")
            time.sleep(0.3)
            yield
            time.sleep(0.3)
        finally:
            listener.send_signal(signal.SIGINT)
            try:
                _, report = listener.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                listener.kill()
                raise
        if "\n0 packets dropped by kernel" not in "\n" + report:
            raise SystemExit(f"tcpdump lost frames: {report}")
    finally:
        disconnect_hosts()


# What the hosts say to each other


def allow_large_windows(sock: socket.socket) -> None:
    """Buffers that let one segment of 64 KiB be sent."""
    sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send_all(sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
    """Moves data through a TCP connection and sees that it arrives."""
    thread = threading.Thread(target=sender.sendall, args=(data,))
    thread.start()
    got = bytearray()
    while len(got) < len(data):
        piece = receiver.recv(len(data) - len(got))
        if not piece:
            raise SystemExit("a TCP connection ended early")
        got += piece
    thread.join()
    if got != data:
        raise SystemExit("TCP data arrived changed")


@contextlib.contextmanager
def tcp_connection(
    family: int,
    *,
    subnet: int = 0,
    prepare: Callable[[socket.socket], None] = allow_large_windows,
    fast_open: bytes = b"",
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from capA to capB; both ends."""
    address = ip4(B, subnet) if family == socket.AF_INET else ip6(B, subnet)
    with (
        open_socket(B, family, socket.SOCK_STREAM) as listener,
        open_socket(A, family, socket.SOCK_STREAM) as client,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare(listener)
        prepare(client)
        listener.bind((address, 7))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 4)
        listener.listen()
        if fast_open:
            client.setblocking(True)
            client.sendto(fast_open, MSG_FASTOPEN, (address, 7))
        else:
            client.connect((address, 7))
        server, _ = listener.accept()
        server.settimeout(10)
        with server:
            yield client, server


def lose_segments(sock: socket.socket) -> None:
    """Lets a TCP socket lose every fourth segment with data, by chance (a classic BPF filter)."""
    program = struct.pack(
        "=" + 6 * "HBBI",
        *(0x80, 0, 0, 0),  # A = the segment's length
        *(0x35, 0, 2, 200),  # below 200 bytes: take it
        *(0x20, 0, 0, 0xFFFFF000 + 56),  # A = a random number (SKF_AD_RANDOM)
        *(0x25, 0, 1, 0xC0000000),  # above three quarters: lose it
        *(0x06, 0, 0, 0),
        *(0x06, 0, 0, 0xFFFFFFFF),
    )
    # struct sock_fprog: the number of instructions and where they are
    buffer = ctypes.create_string_buffer(program)
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 6, ctypes.addressof(buffer))
    )


def udp_pair(family: int, *, subnet: int = 0) -> tuple[socket.socket, socket.socket]:
    """A UDP socket of capA, connected, and the one of capB that it reaches."""
    name = ip4 if family == socket.AF_INET else ip6
    receiver = open_socket(B, family, socket.SOCK_DGRAM)
    receiver.bind((name(B, subnet), 9000))
    sender = open_socket(A, family, socket.SOCK_DGRAM)
    sender.bind((name(A, subnet), 9001))
    sender.connect((name(B, subnet), 9000))
    return sender, receiver


def exchange_udp(
    family: int,
    payloads: Sequence[bytes],
    *,
    subnet: int = 0,
    prepare: Callable[[socket.socket], None] = lambda sock: None,
) -> None:
    """Sends datagrams from capA to capB, each of them back again too."""
    sender, receiver = udp_pair(family, subnet=subnet)
    with sender, receiver:
        prepare(sender)
        prepare(receiver)
        for payload in payloads:
            sender.send(payload)
            got, source = receiver.recvfrom(1 << 16)
            receiver.sendto(got, source)
            if sender.recv(1 << 16) != payload:
                raise SystemExit("a datagram arrived changed")


def ping(
    family: int,
    size: int,
    *,
    subnet: int = 0,
    prepare: Callable[[socket.socket], None] = lambda sock: None,
) -> None:
    """One echo request from capA and the reply; the kernel fills in both checksums."""
    if family == socket.AF_INET:  # icmp(7)
        sock = open_socket(A, family, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
        request, reply, address = 8, 0, ip4(B, subnet)
    else:  # RFC 3542, 3.1; an icmp(7) socket leaves extension headers out
        sock = open_socket(A, family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        request, reply, address = 128, 129, ip6(B, subnet)
    with sock:
        prepare(sock)
        sock.sendto(struct.pack(">BBHHH", request, 0, 0, 7, 1) + noise(size), (address, 0))
        while sock.recv(1 << 16)[0] != reply:
            pass


def payload_with_checksum(family: int, wanted: int) -> bytes:
    """Ten bytes that give a datagram of `exchange_udp` the one's complement sum `wanted`."""
    payload = noise(8)
    source = socket.inet_pton(family, ip4(A) if family == socket.AF_INET else ip6(A))
    target = socket.inet_pton(family, ip4(B) if family == socket.AF_INET else ip6(B))
    length = 8 + 10
    others = source + target + struct.pack(">HHHHH", 17, length, 9001, 9000, length) + payload
    total = sum(struct.unpack(f">{len(others) // 2}H", others))
    return payload + struct.pack(">H", (wanted - total) % 0xFFFF)


def set_ipv6_option(option: int, value: bytes) -> Callable[[socket.socket], None]:
    """Gives a socket's packets an IPv6 extension header."""
    return lambda sock: sock.setsockopt(socket.IPPROTO_IPV6, option, value)


def set_ip_options(value: bytes) -> Callable[[socket.socket], None]:
    """Gives a socket's packets IPv4 options."""
    return lambda sock: sock.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, value)


def both(*prepare: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Several preparations of a socket as one."""

    def all_of_them(sock: socket.socket) -> None:
        for step in prepare:
            step(sock)

    return all_of_them


# The parts. Each is called with the hosts connected.

FAMILIES = (socket.AF_INET, socket.AF_INET6)


def neighbours() -> None:
    """ARP, neighbour discovery with duplicate address detection, MLD and IGMP, broadcast."""
    # An address without "nodad", on a device that asks: RFC 4862, 5.4.
    sysctl(A, "ipv6/conf/cap0/accept_dad", 1)
    sysctl(A, "ipv6/conf/cap0/dad_transmits", 1)
    run("ip", "-n", A, "address", "add", "2001:db8::a/64", "dev", "cap0")
    with (
        open_socket(B, socket.AF_INET, socket.SOCK_DGRAM) as group4,
        open_socket(B, socket.AF_INET6, socket.SOCK_DGRAM) as group6,
        open_socket(A, socket.AF_INET, socket.SOCK_DGRAM) as sender4,
        open_socket(A, socket.AF_INET6, socket.SOCK_DGRAM) as sender6,
    ):
        with inside(B):
            index = socket.if_nametoindex("cap0")
        member4 = socket.inet_aton(GROUP4) + socket.inet_aton(ip4(B))
        group4.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member4)
        member6 = socket.inet_pton(socket.AF_INET6, GROUP6) + struct.pack("@I", index)
        group6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member6)
        group6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        group4.bind(("", 9000))
        group6.bind(("::", 9000))
        sender4.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip4(A)))
        with inside(A):
            index = socket.if_nametoindex("cap0")
        sender6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        sender4.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for address in (GROUP4, "192.0.2.63"):
            sender4.sendto(b"to everybody", (address, 9000))
            group4.recv(100)
        sender6.sendto(b"to every member", (GROUP6, 9000))
        group6.recv(100)
        time.sleep(2)
    for family in FAMILIES:
        ping(family, 56)
    time.sleep(0.5)


def icmp() -> None:
    """Echo of many sizes, odd ones too, and errors that quote a packet."""
    for family in FAMILIES:
        for size in (0, 1, 2, 55, 56, 999, 1400):
            ping(family, size)
        sender, receiver = udp_pair(family)
        with sender:
            receiver.close()
            for size in (1, 700):
                sender.send(noise(size))
                with contextlib.suppress(ConnectionRefusedError):
                    sender.recv(1)


def tcp() -> None:
    """Connections with every usual option, odd lengths, urgent data, ECN, fast open and reset."""
    for family in FAMILIES:
        with tcp_connection(family) as (client, server):
            for size in (1, 2, 3, 100, 777, 1447, 1448, 1449, 6001):
                send_all(client, server, noise(size))
                send_all(server, client, noise(size // 2 + 1))
            client.send(b"!", socket.MSG_OOB)
            select.select([], [], [server], 5)
            client.shutdown(socket.SHUT_WR)
            if server.recv(1):
                raise SystemExit("urgent data came in line")
        for _ in range(2):  # the first asks for a cookie, the second sends data with its SYN
            with tcp_connection(family, fast_open=b"early data") as (client, server):
                server.recv(100)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        with tcp_connection(family) as (client, server):
            # Without time stamps or anything else.
            pass
    sysctl(A, "ipv4/tcp_timestamps", 0)
    sysctl(A, "ipv4/tcp_sack", 0)
    sysctl(A, "ipv4/tcp_window_scaling", 0)
    for family in FAMILIES:
        with tcp_connection(family) as (client, server):
            send_all(client, server, noise(1461))


def loss() -> None:
    """Connections that lose segments: selective acknowledgements and data sent again."""
    for family in FAMILIES:
        with tcp_connection(family) as (client, server):
            lose_segments(server)
            send_all(client, server, noise(14_001))


def large() -> None:
    """TCP frames of up to 64 KiB, as a sender with segmentation offload hands them over."""
    for family in FAMILIES:
        with tcp_connection(family) as (client, server):
            for size in (2000, 4344, 9001, 65483 if family == socket.AF_INET else 65463):
                send_all(client, server, noise(size))
            send_all(server, client, noise(3001))


def jumbo() -> None:
    """Frames of a link with an MTU of 9000."""
    for family, header in zip(FAMILIES, (20, 40), strict=True):
        ping(family, 9000 - header - 8)
        exchange_udp(family, [noise(9000 - header - 8)])


def udp() -> None:
    """Datagrams of many sizes; without a checksum, and with one that sums up to zero."""
    for family, largest in zip(FAMILIES, (1472, 1452), strict=True):
        exchange_udp(family, [noise(size) for size in (0, 1, 2, 3, 17, 18, 19, 511, largest)])
        # RFC 768: a sum of zero is sent as all ones.
        exchange_udp(family, [payload_with_checksum(family, 0xFFFF), b"\0" * 7])
    exchange_udp(
        socket.AF_INET,
        [b"", b"x", noise(333)],
        prepare=lambda sock: sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1),
    )
    # RFC 6935: allowed for tunnels.
    exchange_udp(
        socket.AF_INET6,
        [b"x", noise(333)],
        prepare=both(
            lambda sock: sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1),
            lambda sock: sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1),
        ),
    )


def fragments() -> None:
    """Datagrams and echo requests larger than the MTU, IPv6 ones also with other headers."""
    for family in FAMILIES:
        exchange_udp(family, [noise(1473), noise(4001)])
        ping(family, 3001)
    for option in (socket.IPV6_HOPOPTS, socket.IPV6_DSTOPTS):
        exchange_udp(socket.AF_INET6, [noise(3003)], prepare=set_ipv6_option(option, OPTIONS6))
    exchange_udp(socket.AF_INET, [noise(3003)], prepare=set_ip_options(TIMESTAMPS))
    # Only behind a routing header are destination options in the fragmented part.
    send_routed([noise(2003)], set_ipv6_option(socket.IPV6_DSTOPTS, OPTIONS6))


def options() -> None:
    """IPv4 options and IPv6 extension headers in front of UDP, TCP and ICMP."""
    for value in (RECORD_ROUTE, ROUTER_ALERT, TIMESTAMPS):
        prepare = set_ip_options(value)
        exchange_udp(socket.AF_INET, [noise(5)], prepare=prepare)
        ping(socket.AF_INET, 5, prepare=prepare)
        with tcp_connection(socket.AF_INET, prepare=both(allow_large_windows, prepare)) as ends:
            send_all(*ends, noise(1001))
    hop_by_hop = set_ipv6_option(socket.IPV6_HOPOPTS, ROUTER_ALERT6)
    destination = set_ipv6_option(socket.IPV6_DSTOPTS, OPTIONS6)
    long = set_ipv6_option(socket.IPV6_DSTOPTS, OPTIONS6_LONG)
    for prepare in (hop_by_hop, destination, both(hop_by_hop, long)):
        exchange_udp(socket.AF_INET6, [noise(5)], prepare=prepare)
        ping(socket.AF_INET6, 5, prepare=prepare)
        with tcp_connection(socket.AF_INET6, prepare=both(allow_large_windows, prepare)) as ends:
            send_all(*ends, noise(1001))
    send_routed([b"by way of", noise(501)])


def send_routed(
    payloads: Sequence[bytes], prepare: Callable[[socket.socket], None] = lambda sock: None
) -> None:
    """Sends datagrams with a segment routing header (RFC 8754).

    capB's first address is on the way to its second, and while that segment is left the checksum
    is that of the last destination: RFC 8200, 8.1.
    """
    run("ip", "-n", A, "route", "add", f"{FAR_IP6}/128", "via", ip6(B))
    segments = bytes(16) + socket.inet_pton(socket.AF_INET6, ip6(B))
    header = bytes([0, 4, 4, 1, 1, 0, 0, 0]) + segments
    with (
        open_socket(A, socket.AF_INET6, socket.SOCK_DGRAM) as sender,
        open_socket(B, socket.AF_INET6, socket.SOCK_DGRAM) as receiver,
    ):
        receiver.bind((FAR_IP6, 9000))
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, header)
        prepare(sender)
        for payload in payloads:
            sender.sendto(payload, (FAR_IP6, 9000))
            if receiver.recv(1 << 16) != payload:
                raise SystemExit("a routed datagram arrived changed")


def large_options() -> None:
    """TCP frames of tens of KiB behind IPv4 options and behind IPv6 extension headers."""
    for family, prepare in (
        (socket.AF_INET, set_ip_options(TIMESTAMPS)),
        (socket.AF_INET6, set_ipv6_option(socket.IPV6_DSTOPTS, OPTIONS6_LONG)),
    ):
        with tcp_connection(family, prepare=both(allow_large_windows, prepare)) as ends:
            send_all(*ends, noise(12_001))


def talk(subnet: int, size: int) -> None:
    """A little of everything through one VLAN device; `size` is that of the largest TCP frame."""
    for family in FAMILIES:
        ping(family, 57, subnet=subnet)
        exchange_udp(family, [b"", noise(33), noise(1400)], subnet=subnet)
        with tcp_connection(family, subnet=subnet) as (client, server):
            send_all(client, server, noise(101))
            send_all(client, server, noise(size))
            send_all(server, client, noise(1449))


def vlan() -> None:
    """One tag (802.1Q), with a priority."""
    for host in (A, B):
        add_vlan(host, "cap0", "cap0.7", "802.1Q", 7, "0:5")
        add_addresses(host, "cap0.7", 1)
        run("ip", "-n", host, "link", "set", "cap0.7", "up")
    talk(1, 15_001)


def double_vlan() -> None:
    """Two tags: 802.1Q inside 802.1ad, and 802.1Q inside 802.1Q."""
    for host in (A, B):
        add_vlan(host, "cap0", "cap0.s", "802.1ad", 100, "0:3")
        add_vlan(host, "cap0.s", "cap0.sc", "802.1Q", 4094, "0:1")
        add_vlan(host, "cap0", "cap0.q", "802.1Q", 200, "0:0")
        add_vlan(host, "cap0.q", "cap0.qq", "802.1Q", 7, "0:7")
        for subnet, outer, inner in ((1, "cap0.s", "cap0.sc"), (2, "cap0.q", "cap0.qq")):
            add_addresses(host, inner, subnet)
            for device in (outer, inner):
                run("ip", "-n", host, "link", "set", device, "up")
    talk(1, 10_001)
    talk(2, 2001)


def add_vlan(host: str, parent: str, name: str, protocol: str, tag: int, priority: str) -> None:
    """Adds a VLAN device; `priority` maps the stack's priority to the tag's."""
    run(
        *("ip", "-n", host, "link", "add", "link", parent, "name", name, "type", "vlan"),
        *("protocol", protocol, "id", str(tag), "egress-qos-map", priority),
    )


def odd() -> None:
    """Frames that are not IP, runts among them: sent as they are through packet(7) sockets.

    The last are a bridge's own, in 802.3 framing with a length instead of a type.
    """
    head = bytes.fromhex(MAC[B].replace(":", "") + MAC[A].replace(":", ""))
    with open_socket(A, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("cap0", 0))
        experiment = head + b"\x88\xb5"  # IEEE 802, local experimental EtherType 1
        frames = [experiment + noise(size) for size in (0, 1, 2, 27, 45, 46, 1500)]
        # A header that says more than there is: cut IPv4, IPv6 and VLAN headers.
        frames += [head + bytes.fromhex(rest) for rest in ("0800", "080045", "86dd60", "8100")]
        frames += [head + bytes.fromhex("8100000708004500"), head + bytes.fromhex("00030001aa")]
        for frame in frames + [head[:length] for length in (12, 6, 1)]:
            try:
                sock.send(frame)
            except OSError as error:
                print(f"  a frame of {len(frame)} bytes is refused: {error.strerror}")
    run("ip", "-n", A, "link", "add", "capbr", "type", "bridge", "stp_state", "1")
    run("ip", "-n", A, "link", "set", "capbr", "up")
    run("ip", "-n", A, "link", "set", "cap0", "master", "capbr")
    time.sleep(2.5)


PARTS: dict[str, tuple[int, Callable[[], None]]] = {
    "neighbours": (1500, neighbours),
    "icmp": (1500, icmp),
    "udp": (1500, udp),
    "tcp": (1500, tcp),
    "loss": (1500, loss),
    "fragments": (1500, fragments),
    "options": (1500, options),
    "jumbo": (9000, jumbo),
    "large": (65535, large),
    "large-options": (65535, large_options),
    "odd": (1500, odd),
    "vlan": (60000, vlan),
    "double-vlan": (60000, double_vlan),
}
"""Each part's MTU and what happens in it."""


def make(output: Path, names: Sequence[str]) -> None:
    """Makes the parts named and writes them to one file."""
    sent_by_b = bytes.fromhex(MAC[B].replace(":", ""))
    with (
        tempfile.TemporaryDirectory(prefix="vq-capture-") as directory,
        PcapngWriter(output, interfaces=names) as writer,
    ):
        for number, name in enumerate(names):
            mtu, talk_of_part = PARTS[name]
            path = Path(directory, name)
            with captured(mtu, path):
                talk_of_part()
            count = size = 0
            for frame in read_frames(path):
                writer.write(
                    frame.data,
                    timestamp_ns=frame.timestamp_ns,
                    length=frame.length,
                    interface=number,
                    inbound=frame.data[6:12] != sent_by_b,
                )
                count += 1
                size += len(frame.data)
            print(f"{name}: {count} frames, {size} bytes", flush=True)


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(PARTS):
        raise SystemExit(f"usage: make_capture.py OUTPUT.pcapng [{' | '.join(PARTS)}] ...")
    if os.geteuid() != 0:
        raise SystemExit("make_capture.py has to make network namespaces, so it needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    make(Path(sys.argv[1]), sys.argv[2:] or list(PARTS))


if __name__ == "__main__":
    main()
