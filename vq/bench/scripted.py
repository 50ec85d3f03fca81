"""The scripted guest of the benches: frames of a size, and a driver that moves them in bursts.

The guest busy-polls, as DPDK does: it asks for no calls and looks at its rings itself, so that it
is the device that is measured. It negotiates what `peer.c` offers, whoever serves it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vq.abi import Feature, HdrFlag, HdrGso, NetFeature, feature_mask
from vq.bench import traffic
from vq.memory import GuestMemory
from vq.net_driver import NetDriver, NetHeader, OutFrame
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_message import ProtocolFeature

__all__ = ["BURST", "LONGEST", "SIZES", "frame_of", "guest_on", "label"]

BURST = 64
"""Frames that the guest sends, or waits for, at a time."""
LONGEST = 65535
"""Linux cuts what is longer, before it gives it to a tap (GSO_LEGACY_MAX_SIZE)."""
SIZES = (64, 1500, LONGEST)
"""Bytes in a frame, without its check sequence. The last is one segment for the receiver to cut."""

_FEATURES = feature_mask(
    (
        NetFeature.CSUM,
        NetFeature.GUEST_CSUM,
        NetFeature.MAC,
        NetFeature.GUEST_TSO4,
        NetFeature.GUEST_TSO6,
        NetFeature.HOST_TSO4,
        NetFeature.HOST_TSO6,
        NetFeature.MRG_RXBUF,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
    )
)
# Without INFLIGHT_SHMFD: neither peer.c nor User-Mode Linux knows it.
_PROTOCOL = feature_mask(
    (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
    )
)
_MEMORY = 64 << 20
_BUFFER = 1536  # as Linux's driver has them
_SEGMENT = 1448
_ETHERNET, _IPV4, _TCP = 14, 20, 20


def label(size: int) -> str:
    """How a size is called in a report."""
    return "64 KiB" if size == LONGEST else f"{size} bytes"


def frame_of(size: int) -> OutFrame:
    """A frame of `size` bytes as a guest sends it.

    Beyond an Ethernet frame's 1514 bytes it is a TCP packet whose checksum and segmentation are
    left undone (virtio 1.3, 5.1.6.2).
    """
    ethernet = bytes.fromhex("020000000099") + traffic.GUEST_MAC
    if size <= 1514:
        return NetHeader(), (ethernet + bytes.fromhex("88b5")).ljust(size, b"\x5a")
    header = NetHeader(
        flags=int(HdrFlag.NEEDS_CSUM),
        gso_type=int(HdrGso.TCPV4),
        hdr_len=_ETHERNET + _IPV4 + _TCP,
        gso_size=_SEGMENT,
        csum_start=_ETHERNET + _IPV4,
        csum_offset=16,
    )
    return header, traffic.tcp_frame(ethernet, size - _ETHERNET)


class ScriptedGuest(NamedTuple):
    """A guest whose network device is ready."""

    driver: NetDriver
    frontend: VhostFrontend


@contextmanager
def guest_on(
    backend: Path | socket.socket, *, idle: Callable[[], None] | None = None, polling: bool = True
) -> Iterator[ScriptedGuest]:
    """A guest whose device is behind a vhost-user socket, at a path or connected already.

    A device in this very thread gets its turns from `idle`. Without `polling` the guest waits for
    calls, as a kernel does.
    """
    with (
        GuestMemory.allocate(_MEMORY) as memory,
        VhostFrontend(backend, memory, protocol=_PROTOCOL, idle=idle) as frontend,
    ):
        driver = NetDriver(
            frontend,
            memory,
            _FEATURES,
            receive_buffer_size=_BUFFER,
            polling=polling,
            idle=idle,
        )
        yield ScriptedGuest(driver, frontend)
