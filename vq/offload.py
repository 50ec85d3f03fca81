"""One vocabulary for offloads, its translations, and doing in software what a link cannot.

An offload is work that the sender of a frame leaves to whoever comes next: a checksum not computed,
a TCP stream not cut into segments.
"""

from __future__ import annotations

import enum

__all__ = ["Offload"]


class Offload(enum.IntFlag):
    """Work left undone in a frame.

    Towards a link these are what a guest may leave undone (virtio's CSUM and HOST_* features);
    towards a guest, what the guest takes undone (its GUEST_* features).
    """

    NONE = 0
    CSUM = 1
    """The TCP or UDP checksum field holds only the pseudo-header's sum."""
    TSO4 = 2
    """TCP over IPv4 longer than the MTU."""
    TSO6 = 4
    """TCP over IPv6 longer than the MTU."""
    ECN = 8
    """TSO frames with the CWR flag set."""
    USO4 = 16
    """UDP over IPv4: several datagrams in one frame."""
    USO6 = 32
    """UDP over IPv6 likewise."""
