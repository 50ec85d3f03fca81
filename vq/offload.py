"""One vocabulary for offloads, and its translations to every other.

An offload is work that the sender of a frame leaves to whoever comes next: a checksum not computed,
a TCP stream not cut into segments. `Offload` is a set of them. Each other vocabulary has a pair of
functions here: one named ``..._offloads`` reads a foreign set, one named ``..._for...`` writes it.
What a foreign vocabulary cannot say is left out, never rounded up: nobody is promised an offload
that is not there.

This is about sets only. The header on a frame belongs to the links, and doing in software what a
link cannot to `vq.software`.
"""

from __future__ import annotations

import enum

from vq.abi import NetFeature

__all__ = [
    "ALL",
    "FreeBsdCap",
    "Offload",
    "OpenBsdCap",
    "TunF",
    "features_for_guest",
    "features_for_host",
    "freebsd_offloads",
    "guest_offloads",
    "host_offloads",
    "ifcap_for_freebsd",
    "ifcap_for_openbsd",
    "legal_tun_flags",
    "normalise",
    "openbsd_offloads",
    "tun_flags_for",
    "tun_offloads",
]


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


ALL = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN | Offload.USO4 | Offload.USO6


def normalise(offloads: Offload) -> Offload:
    """The part of a set that makes sense by itself.

    A segment's checksum cannot be there before the segment is, so nothing goes without CSUM; and
    ECN is a manner of TSO (virtio 1.3, 5.1.3.1).
    """
    if not offloads & Offload.CSUM:
        return Offload.NONE
    if not offloads & (Offload.TSO4 | Offload.TSO6):
        offloads &= ~Offload.ECN
    return offloads & ALL


# --- virtio-net features (virtio 1.3, 5.1.3) -----------------------------------------------------

_HOST_FEATURES = (
    (Offload.CSUM, 1 << NetFeature.CSUM),
    (Offload.TSO4, 1 << NetFeature.HOST_TSO4),
    (Offload.TSO6, 1 << NetFeature.HOST_TSO6),
    (Offload.ECN, 1 << NetFeature.HOST_ECN),
    (Offload.USO4 | Offload.USO6, 1 << NetFeature.HOST_USO),
)
_GUEST_FEATURES = (
    (Offload.CSUM, 1 << NetFeature.GUEST_CSUM),
    (Offload.TSO4, 1 << NetFeature.GUEST_TSO4),
    (Offload.TSO6, 1 << NetFeature.GUEST_TSO6),
    (Offload.ECN, 1 << NetFeature.GUEST_ECN),
    (Offload.USO4, 1 << NetFeature.GUEST_USO4),
    (Offload.USO6, 1 << NetFeature.GUEST_USO6),
)


def host_offloads(features: int) -> Offload:
    """What a guest with these virtio features may leave undone in the frames that it sends."""
    return normalise(_read(features, _HOST_FEATURES))


def features_for_host(offloads: Offload) -> int:
    """The virtio features that let a guest leave at most this undone."""
    return _write(normalise(offloads), _HOST_FEATURES)


def guest_offloads(features: int) -> Offload:
    """What a guest with these virtio features takes undone in the frames that it receives.

    The 64-bit set of CTRL_GUEST_OFFLOADS_SET has the same bits (virtio 1.3, 5.1.6.5.8).
    """
    return normalise(_read(features, _GUEST_FEATURES))


def features_for_guest(offloads: Offload) -> int:
    """The virtio features with which a guest takes at most this undone."""
    return _write(normalise(offloads), _GUEST_FEATURES)


# --- Linux (uapi/linux/if_tun.h) -----------------------------------------------------------------


class TunF(enum.IntFlag):
    """``TUN_F_*``: what whoever reads a Linux tap takes undone."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    UFO = 0x10
    USO4 = 0x20
    USO6 = 0x40


_USO = TunF.USO4 | TunF.USO6
_TUN_F_ALL = sum(TunF)
_TUN_FLAGS = (
    (Offload.CSUM, TunF.CSUM),
    (Offload.TSO4, TunF.TSO4),
    (Offload.TSO6, TunF.TSO6),
    (Offload.ECN, TunF.TSO_ECN),
    (Offload.USO4, TunF.USO4),
    (Offload.USO6, TunF.USO6),
)


def tun_offloads(flags: int) -> Offload:
    """What a reader with these ``TUN_F_*`` flags takes undone."""
    return normalise(_read(flags, _TUN_FLAGS))


def tun_flags_for(offloads: Offload, known: int = -1) -> TunF:
    """The largest set of ``TUN_F_*`` flags that Linux accepts for a reader of `offloads`.

    `known` are the flags that the kernel has; it refuses a whole set for one that it has not.
    """
    return legal_tun_flags(_write(normalise(offloads), _TUN_FLAGS) & known)


def legal_tun_flags(flags: int) -> TunF:
    """The largest part of a set of ``TUN_F_*`` flags that keeps the rules of TUNSETOFFLOAD.

    Every flag needs CSUM, ECN needs one TSO, and USO4 and USO6 go only together
    (Linux, drivers/net/tun.c). Flags that have no name here are left out.
    """
    legal = TunF(flags & _TUN_F_ALL)
    if not legal & TunF.CSUM:
        return TunF(0)
    if not legal & (TunF.TSO4 | TunF.TSO6):
        legal &= ~TunF.TSO_ECN
    if legal & _USO != _USO:
        legal &= ~_USO
    return legal


# --- OpenBSD (net/if.h) --------------------------------------------------------------------------


class OpenBsdCap(enum.IntFlag):
    """OpenBSD's ``IFCAP_*`` as TUNSCAP takes them: what whoever reads the tap takes undone."""

    CSUM_IPv4 = 0x1
    CSUM_TCPv4 = 0x2
    CSUM_UDPv4 = 0x4
    VLAN_MTU = 0x10
    VLAN_HWTAGGING = 0x20
    VLAN_HWOFFLOAD = 0x40
    CSUM_TCPv6 = 0x80
    CSUM_UDPv6 = 0x100
    TSOv4 = 0x1000
    TSOv6 = 0x2000
    LRO = 0x4000


# virtio has one bit for all four checksums, and none for the IPv4 header's: that is never undone.
_OPENBSD_CAPS = (
    (
        Offload.CSUM,
        OpenBsdCap.CSUM_TCPv4
        | OpenBsdCap.CSUM_UDPv4
        | OpenBsdCap.CSUM_TCPv6
        | OpenBsdCap.CSUM_UDPv6,
    ),
    (Offload.TSO4, OpenBsdCap.TSOv4),
    (Offload.TSO6, OpenBsdCap.TSOv6),
)


def openbsd_offloads(ifcap: int) -> Offload:
    """What a reader with these OpenBSD capabilities takes undone, as far as virtio can say it."""
    return normalise(_read(ifcap, _OPENBSD_CAPS))


def ifcap_for_openbsd(offloads: Offload) -> OpenBsdCap:
    """The OpenBSD capabilities of a reader that takes at most these offloads undone."""
    return OpenBsdCap(_write(normalise(offloads), _OPENBSD_CAPS))


# --- FreeBSD (net/if.h) --------------------------------------------------------------------------


class FreeBsdCap(enum.IntFlag):
    """FreeBSD's ``IFCAP_*`` as SIOCSIFCAP takes them. TX is the host's side: what comes to us."""

    RXCSUM = 0x1
    TXCSUM = 0x2
    VLAN_HWTAGGING = 0x10
    TSO4 = 0x100
    TSO6 = 0x200
    LRO = 0x400
    RXCSUM_IPV6 = 0x200000
    TXCSUM_IPV6 = 0x400000


_FREEBSD_CAPS = (
    (Offload.CSUM, FreeBsdCap.TXCSUM | FreeBsdCap.TXCSUM_IPV6),
    (Offload.TSO4, FreeBsdCap.TSO4),
    (Offload.TSO6, FreeBsdCap.TSO6),
)


def freebsd_offloads(ifcap: int) -> Offload:
    """What a reader of a FreeBSD tap with these capabilities takes undone."""
    return normalise(_read(ifcap, _FREEBSD_CAPS))


def ifcap_for_freebsd(offloads: Offload) -> FreeBsdCap:
    """The FreeBSD capabilities of a tap whose reader takes at most these offloads undone."""
    return FreeBsdCap(_write(normalise(offloads), _FREEBSD_CAPS))


# --- tables of (offloads, foreign bits) ----------------------------------------------------------


def _read(foreign: int, table: tuple[tuple[Offload, int], ...]) -> Offload:
    """The offloads whose foreign bits are all in `foreign`."""
    offloads = Offload.NONE
    for ours, theirs in table:
        if foreign & theirs == theirs:
            offloads |= ours
    return offloads


def _write(offloads: Offload, table: tuple[tuple[Offload, int], ...]) -> int:
    """The foreign bits whose offloads are all in `offloads`."""
    foreign = 0
    for ours, theirs in table:
        if offloads & ours == ours:
            foreign |= theirs
    return foreign
