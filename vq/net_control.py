"""The commands of virtio-net's control queue (virtio 1.3, 5.1.6.5).

A command is ``u8 class, u8 command`` and data. `carry_out` judges one and applies it to the device;
how commands travel in the queue, and what the device does with what they set, is in `vq.net`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vq.abi import (
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlRx,
    CtrlVlan,
    NetFeature,
)
from vq.net_filter import MAX_TABLE, ReceiveFilter
from vq.offload import Offload, features_for_guest, guest_offloads

__all__ = ["MAX_COMMAND", "Controlled", "carry_out"]

MAX_COMMAND = 65536
"""The longest command in bytes; enough for 10,000 addresses."""
GUEST_OFFLOAD_FEATURES = features_for_guest(~Offload.NONE)
ADDRESS = 6


class Controlled(Protocol):
    """The device, as far as commands go."""

    filter: ReceiveFilter
    lock_mac: bool

    @property
    def max_pairs(self) -> int:
        """How many queue pairs the device has."""

    @property
    def driver_features(self) -> int:
        """What was negotiated."""

    def has_feature(self, bit: int) -> bool:
        """Whether a feature was negotiated."""

    def set_address(self, mac: bytes) -> None:
        """Takes another MAC address."""

    def announced(self) -> None:
        """Takes note that the guest announced itself."""

    def activate_pairs(self, pairs: int) -> None:
        """Uses the first `pairs` queue pairs."""

    def set_guest_offloads(self, offloads: Offload) -> None:
        """Gives the guest frames with at most this left undone."""

    def filters_changed(self) -> None:
        """Lets what was set take effect."""


def carry_out(device: Controlled, data: bytes) -> bool:
    """Carries out one command; False refuses it, and nothing has changed."""
    if not 2 <= len(data) <= MAX_COMMAND:
        return False
    command = _COMMANDS.get(data[0])
    if command is None or not command(device, data[1], data[2:]):
        return False
    device.filters_changed()
    return True


def _set_receive_mode(device: Controlled, command: int, data: bytes) -> bool:
    basic = command in (CtrlRx.PROMISC, CtrlRx.ALLMULTI)
    needed = NetFeature.CTRL_RX if basic else NetFeature.CTRL_RX_EXTRA
    if not device.has_feature(needed) or len(data) != 1:
        return False
    return device.filter.set_mode(command, bool(data[0]))


def _set_addresses(device: Controlled, command: int, data: bytes) -> bool:
    if command == CtrlMac.ADDR_SET:
        allowed = device.has_feature(NetFeature.CTRL_MAC_ADDR) and not device.lock_mac
        if not allowed or len(data) != ADDRESS or data[0] & 1:
            return False
        device.set_address(data)
        return True
    if command != CtrlMac.TABLE_SET or not device.has_feature(NetFeature.CTRL_RX):
        return False
    tables: list[list[bytes]] = []
    for _ in range(2):  # unicast, then multicast: each a le32 count and as many addresses
        end = 4 + ADDRESS * int.from_bytes(data[:4], "little")
        if len(data) < end:
            return False
        # One more than are kept tells that there are too many.
        last = min(end, 4 + ADDRESS * (MAX_TABLE + 1))
        tables.append([data[start : start + ADDRESS] for start in range(4, last, ADDRESS)])
        data = data[end:]
    if data:
        return False
    device.filter.set_tables(*tables)
    return True


def _set_vlan(device: Controlled, command: int, data: bytes) -> bool:
    vlans = device.filter.vlans
    vlan = int.from_bytes(data, "little")
    if vlans is None or len(data) != 2 or vlan > 0xFFF:
        return False
    if command == CtrlVlan.ADD:
        vlans.add(vlan)
    elif command == CtrlVlan.DEL:
        vlans.discard(vlan)
    else:
        return False
    return True


def _acknowledge_announce(device: Controlled, command: int, data: bytes) -> bool:
    if command != CtrlAnnounce.ACK or not device.has_feature(NetFeature.GUEST_ANNOUNCE):
        return False
    device.announced()
    return True


def _set_pairs(device: Controlled, command: int, data: bytes) -> bool:
    if command != CtrlMq.VQ_PAIRS_SET or not device.has_feature(NetFeature.MQ):
        return False
    pairs = int.from_bytes(data, "little")
    if len(data) != 2 or not 1 <= pairs <= device.max_pairs:
        return False
    device.activate_pairs(pairs)
    return True


def _set_guest_offloads(device: Controlled, command: int, data: bytes) -> bool:
    negotiated = device.has_feature(NetFeature.CTRL_GUEST_OFFLOADS)
    if command != CtrlGuestOffloads.SET or not negotiated or len(data) != 8:
        return False
    wanted = int.from_bytes(data, "little")
    if wanted & ~(device.driver_features & GUEST_OFFLOAD_FEATURES):
        return False
    device.set_guest_offloads(guest_offloads(wanted))
    return True


_COMMANDS: dict[int, Callable[[Controlled, int, bytes], bool]] = {
    CtrlClass.RX: _set_receive_mode,
    CtrlClass.MAC: _set_addresses,
    CtrlClass.VLAN: _set_vlan,
    CtrlClass.ANNOUNCE: _acknowledge_announce,
    CtrlClass.MQ: _set_pairs,
    CtrlClass.GUEST_OFFLOADS: _set_guest_offloads,
}
