"""Traffic for the benches, made in a network namespace: run as a script, by its path.

    traffic.py flood INTERFACE LENGTH SECONDS   frames of that length, as many as the tap takes
    traffic.py ping ADDRESS SECONDS             pings, one at a time; the median in microseconds
    traffic.py connect ADDRESS PORT SECONDS     HTTP requests, a connection each; how many a second

Frames beyond Ethernet's 1514 bytes are TCP packets that are left to be segmented. It needs nothing
of vq, so that it starts at once, and prints one number when it is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import statistics
import struct
import sys
import time

__all__ = ["GUEST_MAC", "flood_frame", "prepare", "tcp_frame"]

GUEST_MAC = bytes.fromhex("020000000001")
"""Where the frames of a flood go."""
_SOURCE = bytes.fromhex("020000000002")
_EXPERIMENTAL = bytes.fromhex("88b5")  # IEEE 802, for local experiments
_BATCH = 64
_LONG_BATCH = 4
_PACKET_VNET_HDR = 15  # packet(7)
_LONGEST_PLAIN = 1514
_ETHERNET, _IPV4, _TCP, _SEGMENT = 14, 20, 20, 1448
# virtio_net_hdr without num_buffers (virtio 1.3, 5.1.6): NEEDS_CSUM, GSO TCPV4, where the checksum
# is.
_SEGMENTED = struct.pack("<BBHHHH", 1, 1, _ETHERNET + _IPV4 + _TCP, _SEGMENT, _ETHERNET + _IPV4, 16)
_AF_PACKET, _SOL_PACKET, _PACKET_QDISC_BYPASS = 17, 263, 20  # packet(7)
_FULL_PAUSE = 100e-6
_MOST_PINGS = 20_000
_LOST = 1.0  # seconds
_IP_HEADER, _ECHO_REPLY = 20, 0


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):  # recvmsg(2)
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_len", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_len", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_len", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):  # sendmmsg(2)
    _fields_ = (("header", _Msghdr), ("sent", ctypes.c_uint))


def flood(interface: str, length: int, seconds: float) -> float:
    """Sends frames of `length` bytes for as long as told; returns how many a second.

    Many go with one system call, and past the interface's queueing, so that this side is not what
    is measured. A tap whose queue is full drops; then we let its reader work for a while.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    frame = flood_frame(length)
    buffer = ctypes.create_string_buffer(frame, len(frame))
    iovec = _Iovec(ctypes.addressof(buffer), len(frame))
    batch = _BATCH if length <= _LONGEST_PLAIN else _LONG_BATCH
    messages = (_Mmsghdr * batch)()
    for message in messages:
        message.header.iov = ctypes.pointer(iovec)
        message.header.iov_len = 1
    total = 0
    with socket.socket(_AF_PACKET, socket.SOCK_RAW) as sock:
        prepare(sock, interface, length)
        start = time.monotonic()
        while (now := time.monotonic()) < start + seconds:
            sent = libc.sendmmsg(sock.fileno(), messages, batch, 0)
            if sent < batch:
                time.sleep(_FULL_PAUSE)
            total += max(0, sent)
    return total / (now - start)


def flood_frame(length: int) -> bytes:
    """What is sent through a packet socket for a frame of `length` bytes (see `prepare`)."""
    if length <= _LONGEST_PLAIN:
        return (GUEST_MAC + _SOURCE + _EXPERIMENTAL).ljust(length, b"\x5a")
    return _SEGMENTED + tcp_frame(GUEST_MAC + _SOURCE, length - _ETHERNET)


def prepare(sock: socket.socket, interface: str, length: int) -> None:
    """Binds a packet socket for frames of `length` bytes."""
    sock.bind((interface, 0))
    sock.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
    if length > _LONGEST_PLAIN:
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)


def tcp_frame(addresses: bytes, length: int) -> bytes:
    """A frame with a TCP packet of `length` bytes over IPv4, for another to segment.

    Its checksum field holds what RFC 9293 has of the pseudo-header, as virtio and Linux want it.
    """
    source, target = socket.inet_aton("198.18.69.1"), socket.inet_aton("198.18.69.2")
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0x4000, 64, 6, 0, source, target)
    ip = ip[:10] + struct.pack("!H", ~_sum(ip) & 0xFFFF) + ip[12:]
    pseudo = _sum(source + target + struct.pack("!HH", 6, length - _IPV4))
    tcp = struct.pack("!HHIIBBHHH", 5001, 5002, 1, 1, _TCP << 2, 0x10, 0xFFFF, pseudo, 0)
    return (addresses + b"\x08\0" + ip + tcp).ljust(_ETHERNET + length, b"\x5a")


def _sum(data: bytes) -> int:
    """The Internet checksum's sum, not complemented (RFC 1071)."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data):
        total += word
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ping(address: str, seconds: float) -> float:
    """The median round trip of ICMP echoes in microseconds; nan when none comes back (RFC 792)."""
    trips: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(_LOST)
        sock.connect((address, 0))
        end = time.monotonic() + seconds
        for number in range(_MOST_PINGS):
            identity = struct.pack("!HH", os.getpid() & 0xFFFF, number)
            start = time.perf_counter()
            sock.send(_echo(identity))
            with contextlib.suppress(TimeoutError):
                while not _answers(sock.recv(256), identity):
                    pass
                trips.append((time.perf_counter() - start) * 1e6)
            if time.monotonic() > end:
                break
    return statistics.median(trips) if trips else float("nan")


def _echo(identity: bytes) -> bytes:
    message = b"\x08\0\0\0" + identity + bytes(56)
    return message[:2] + struct.pack("!H", ~_sum(message) & 0xFFFF) + message[4:]


def _answers(packet: bytes, identity: bytes) -> bool:
    """Whether an IP packet is the reply to an echo; a request may be our own."""
    return packet[_IP_HEADER] == _ECHO_REPLY and packet[_IP_HEADER + 4 :].startswith(identity)


def connect(address: str, port: int, seconds: float) -> float:
    """HTTP requests a second, each over a connection of its own, one at a time."""
    done = 0
    start = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        with socket.create_connection((address, port), timeout=5) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while sock.recv(65536):
                pass
        done += 1
    return done / (now - start)


def _main(verb: str, *words: str) -> float:
    if verb == "flood":
        return flood(words[0], int(words[1]), float(words[2]))
    if verb == "ping":
        return ping(words[0], float(words[1]))
    return connect(words[0], int(words[1]), float(words[2]))


if __name__ == "__main__":
    print(_main(*sys.argv[1:]))
