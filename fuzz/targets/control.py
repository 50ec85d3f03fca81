"""Commands on the net device's control queue, and the state that a migration brings."""

from __future__ import annotations

import contextlib
import json

from fuzz.guests import RING_CHOICES, Cable, NetGuest, some_features
from fuzz.inputs import Input
from fuzz.targets.transmit import _with_needs
from vq.abi import CTRL_OK, NetFeature
from vq.errors import UsageError
from vq.net_filter import MAX_TABLE
from vq.offload import ALL

_CHOICES = (
    *(NetFeature.CTRL_RX, NetFeature.CTRL_RX_EXTRA, NetFeature.CTRL_VLAN, NetFeature.MQ),
    *(NetFeature.CTRL_MAC_ADDR, NetFeature.GUEST_ANNOUNCE, NetFeature.CTRL_GUEST_OFFLOADS),
    *(NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4, *RING_CHOICES),
)
_MODES = (
    *("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast"),
    *("no_broadcast", "unicast_overflow", "multicast_overflow"),
)
_CTRL_VQ = 1 << NetFeature.CTRL_VQ


def run(data: bytes) -> None:
    """Gives commands; what is refused changes nothing, what is carried out stays within bounds."""
    source = Input(data)
    wanted = -1 if source.chance(2) else some_features(source, _CHOICES) | _CTRL_VQ
    guest = NetGuest(Cable(ALL), _with_needs(wanted) & ~(1 << NetFeature.MQ))
    for _ in range(40):
        if not source.more or guest.device.fault is not None:
            break
        step = source.below(8)
        if step < 5:
            before = guest.device.save_state()
            ack = guest.command(_command(source))
            assert ack == CTRL_OK or guest.device.save_state() == before, "refused, but done"
        elif step == 5:
            with contextlib.suppress(UsageError):
                guest.device.load_state(_state(source))
        elif step == 6:
            state = guest.device.save_state()
            guest.device.load_state(state)
            assert guest.device.save_state() == state
        else:
            guest.start_over()
        filters = guest.device.filter
        assert len(filters.unicast) <= MAX_TABLE and len(filters.multicast) <= MAX_TABLE
        assert filters.vlans is None or all(0 <= vlan <= 4095 for vlan in filters.vlans)
        assert len(filters.mac) == 6


def _command(source: Input) -> bytes:
    kind, command = source.pick((0, 1, 2, 3, 4, 5, source.u8)), source.below(6)
    if kind == 1 and command == 0:
        tables = b""
        for _ in range(2):
            count = source.pick((0, 1, 2, 1024, 1025))
            claimed = source.pick((count, count, count + 1, 0xFFFFFFFF))
            tables += claimed.to_bytes(4, "little") + b"\1\0\0\0\0\1" * count
        return bytes((kind, command)) + tables + source.take(source.pick((0, 0, 1)))
    return bytes((kind, command)) + source.take(source.pick((1, 2, 6, 8, 0, source.u8)))


def _state(source: Input) -> bytes:
    """Something like a saved state; JSON at least, more often than not."""
    if source.chance(4):
        return source.take(source.u8)
    if source.chance(8):
        return b"[" * source.pick((10, 20000)) + b"{" * source.below(9)
    values = (
        *(0, 1, -1, 1 << 70, 1e300, float("inf"), float("nan"), None, True, "", "fe" * 6, "zz", []),
        *({}, [1, 4095], [4096], ["010000000001"], ["01"], ["010000000001"] * 3000, [1e9], [[]]),
    )
    names = ("unicast", "multicast", "vlans", "mac", "pairs", "offloads", "modes")
    state: dict[str, object] = {
        "modes": dict.fromkeys(_MODES, False),
        **{"unicast": [], "multicast": [], "vlans": None, "mac": "020000000003"},
        **{"pairs": 1, "offloads": 0},
    }
    for _ in range(source.pick((1, 1, 2, 0))):
        state[source.pick(names)] = source.pick(values)
    return json.dumps(state).encode()
