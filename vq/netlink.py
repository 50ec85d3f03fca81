"""How a network interface is that is in another network namespace of Linux'.

ioctl(2) asks the namespace of its socket, and a socket in another one takes setns(2), which wants
CAP_SYS_ADMIN. A netlink request can name the namespace instead, by the number that ours has for it,
and CAP_NET_ADMIN is enough. The kernel gives a namespace such a number when an interface moves
there from ours; where there is none yet it is asked for one.

Sources: netlink(7), rtnetlink(7), uapi/linux/netlink.h, rtnetlink.h, if_link.h, net_namespace.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Interface", "interface_in"]

AF_NETLINK = 16
NETLINK_ROUTE = 0
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR = 2
RTM_NEWLINK, RTM_GETLINK, RTM_NEWNSID, RTM_GETNSID = 16, 18, 88, 90
IFLA_IFNAME, IFLA_MTU, IFLA_TARGET_NETNSID = 3, 4, 46
NETNSA_NSID, NETNSA_FD = 1, 3

HEADER = struct.Struct("=IHHII")
"""`struct nlmsghdr`: length, type, flags, sequence number, port."""
IFINFOMSG = struct.Struct("=BxHiII")
"""`struct ifinfomsg`: family, type, index, flags, which of them change."""
RTGENMSG = struct.Struct("=B3x")
"""`struct rtgenmsg`, a family, and what aligns the attributes behind it."""
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length with this, type
_NUMBER = struct.Struct("=i")
_NO_NUMBER = -1  # NETNSA_NSID_NOT_ASSIGNED; to give out: any
_MOST = 1 << 16
PATIENCE = 2.0
"""Seconds for the kernel to answer; it does so at once."""


class Interface(NamedTuple):
    """What was asked about."""

    flags: int
    """IFF_UP and others."""
    mtu: int
    """In bytes."""


def interface_in(namespace: int, name: str) -> Interface:
    """The interface `name` of the network namespace that the descriptor `namespace` is of.

    Raises `OSError`: ENODEV where there is none, EPERM without CAP_NET_ADMIN here and there.
    """
    with socket.socket(AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as kernel:
        kernel.settimeout(PATIENCE)
        number = _number_of(kernel, namespace)
        if number == _NO_NUMBER:
            wish = _attribute(NETNSA_FD, _NUMBER.pack(namespace))
            wish += _attribute(NETNSA_NSID, _NUMBER.pack(_NO_NUMBER))
            _ask(kernel, RTM_NEWNSID, NLM_F_ACK, RTGENMSG.pack(0) + wish)
            number = _number_of(kernel, namespace)
        which = _attribute(IFLA_TARGET_NETNSID, _NUMBER.pack(number))
        which += _attribute(IFLA_IFNAME, os.fsencode(name) + b"\0")
        answer = _ask(kernel, RTM_GETLINK, 0, IFINFOMSG.pack(0, 0, 0, 0, 0) + which)
    _, _, _, flags, _ = IFINFOMSG.unpack_from(answer)
    (mtu,) = _NUMBER.unpack(dict(_attributes(answer[IFINFOMSG.size :]))[IFLA_MTU])
    return Interface(flags, mtu)


def _number_of(kernel: socket.socket, namespace: int) -> int:
    """The number that our namespace has for another."""
    which = _attribute(NETNSA_FD, _NUMBER.pack(namespace))
    answer = _ask(kernel, RTM_GETNSID, 0, RTGENMSG.pack(0) + which)
    number: int
    (number,) = _NUMBER.unpack(dict(_attributes(answer[RTGENMSG.size :]))[NETNSA_NSID])
    return number


def _ask(kernel: socket.socket, kind: int, flags: int, body: bytes) -> bytes:
    """Sends a request; returns the answer behind its header. Raises `OSError` for a refusal."""
    length = HEADER.size + len(body)
    kernel.send(HEADER.pack(length, kind, NLM_F_REQUEST | flags, 0, 0) + body)
    answer = kernel.recv(_MOST)
    _, answered, _, _, _ = HEADER.unpack_from(answer)
    body = answer[HEADER.size :]
    if answered == NLMSG_ERROR:
        (error,) = _NUMBER.unpack_from(body)
        if error:
            raise OSError(-error, os.strerror(-error))
    return body


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The kinds and contents of attributes that lie one behind another."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
