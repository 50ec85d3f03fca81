"""Traffic for the benches, made in a network namespace: run as a script, by its path.

    traffic.py flood INTERFACE LENGTH SECONDS   frames of that length, as many as the tap takes
    traffic.py ping ADDRESS SECONDS             pings, one at a time; the median in microseconds
    traffic.py connect ADDRESS PORT SECONDS     HTTP requests, a connection each; how many a second

It needs nothing of vq, so that it starts at once, and prints one number when it is done.
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

__all__ = ["GUEST_MAC"]

GUEST_MAC = bytes.fromhex("020000000001")
"""Where the frames of a flood go."""
_SOURCE = bytes.fromhex("020000000002")
_EXPERIMENTAL = bytes.fromhex("88b5")  # IEEE 802, for local experiments
_BATCH = 64
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
    frame = (GUEST_MAC + _SOURCE + _EXPERIMENTAL).ljust(length, b"\x5a")
    buffer = ctypes.create_string_buffer(frame, length)
    iovec = _Iovec(ctypes.addressof(buffer), length)
    messages = (_Mmsghdr * _BATCH)()
    for message in messages:
        message.header.iov = ctypes.pointer(iovec)
        message.header.iov_len = 1
    total = 0
    with socket.socket(_AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        sock.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        start = time.monotonic()
        while (now := time.monotonic()) < start + seconds:
            sent = libc.sendmmsg(sock.fileno(), messages, _BATCH, 0)
            if sent < _BATCH:
                time.sleep(_FULL_PAUSE)
            total += max(0, sent)
    return total / (now - start)


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
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return message[:2] + struct.pack("!H", checksum) + message[4:]


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
