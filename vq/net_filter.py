"""Which frames a guest wants to receive: virtio-net's receive filters (virtio 1.3, 5.1.6.5.1-3).

The control queue's commands change a `ReceiveFilter`; the receive path asks it. What is not here:
the commands' format (`vq.net`).
"""

from __future__ import annotations

from vq.abi import CtrlRx

__all__ = ["ReceiveFilter"]

BROADCAST = b"\xff" * 6
MAX_TABLE = 1024
"""Addresses kept per table; with more, all of that kind are received, as the tables are a hint."""
_VLAN = b"\x81\x00"  # the table is of 802.1Q ids; drivers do not list 802.1ad's in it
_RX_MODES: dict[int, str] = {
    CtrlRx.PROMISC: "promiscuous",
    CtrlRx.ALLMULTI: "all_multicast",
    CtrlRx.ALLUNI: "all_unicast",
    CtrlRx.NOMULTI: "no_multicast",
    CtrlRx.NOUNI: "no_unicast",
    CtrlRx.NOBCAST: "no_broadcast",
}


class ReceiveFilter:
    """The receive modes, the address tables and the VLAN table of one device.

    It starts promiscuous, as a guest without a control queue expects; a driver that negotiated
    CTRL_RX sets what it wants. `mac` is the device's own address, 6 bytes.
    """

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.promiscuous = True
        self.all_multicast = False
        self.all_unicast = False
        self.no_multicast = False
        self.no_unicast = False
        self.no_broadcast = False
        self.unicast: frozenset[bytes] = frozenset()
        self.multicast: frozenset[bytes] = frozenset()
        self.unicast_overflow = False
        self.multicast_overflow = False
        self.vlans: set[int] | None = None
        """The VLAN ids to receive; None while CTRL_VLAN is not negotiated: all of them."""

    def set_mode(self, command: int, on: bool) -> bool:
        """Carries out a command of `CtrlClass.RX`; False when there is no such command."""
        name = _RX_MODES.get(command)
        if name is None:
            return False
        setattr(self, name, on)
        return True

    def set_tables(self, unicast: list[bytes], multicast: list[bytes]) -> None:
        """Replaces both tables of 6-byte addresses."""
        self.unicast_overflow = len(unicast) > MAX_TABLE
        self.multicast_overflow = len(multicast) > MAX_TABLE
        self.unicast = frozenset(unicast[:MAX_TABLE])
        self.multicast = frozenset(multicast[:MAX_TABLE])

    @property
    def own_address(self) -> bytes | None:
        """The destination whose frames without a VLAN are wanted in any case, if there is one."""
        return None if self.no_unicast else self.mac

    def wants(self, start: bytes) -> bool:
        """Whether the guest wants a frame that starts with these bytes (16 are enough).

        Promiscuous mode prevails over all else (virtio 1.3, 5.1.6.5.1.1). Without it a frame that
        is too short to have a destination is not wanted.
        """
        if self.promiscuous:
            return True
        if self.vlans is not None and start[12:14] == _VLAN:
            # Id 0 only gives a priority; such a frame belongs to no VLAN (IEEE 802.1Q, 9.6).
            vlan = int.from_bytes(start[14:16], "big") & 0xFFF
            if vlan and vlan not in self.vlans:
                return False
        destination = start[:6]
        if len(destination) < 6:
            return False
        if destination == BROADCAST:
            return not self.no_broadcast
        if destination[0] & 1:
            return not self.no_multicast and (
                self.all_multicast or self.multicast_overflow or destination in self.multicast
            )
        return not self.no_unicast and (
            destination == self.mac
            or self.all_unicast
            or self.unicast_overflow
            or destination in self.unicast
        )
