"""What a guest sends: chains and net headers of any kind through the net device to a link."""

from __future__ import annotations

from fuzz.frames import any_frame, any_net_header
from fuzz.guests import GUEST_MAC, RING_CHOICES, Cable, NetGuest, some_features
from fuzz.inputs import Input
from vq.abi import NetFeature
from vq.dhcp import LocalDhcp
from vq.offload import ALL, Offload, host_offloads

_CHOICES = (
    *(NetFeature.CSUM, NetFeature.HOST_TSO4, NetFeature.HOST_TSO6, NetFeature.HOST_ECN),
    *(NetFeature.HOST_USO, NetFeature.MRG_RXBUF, NetFeature.CTRL_VQ, *RING_CHOICES),
)
_DHCP = LocalDhcp(GUEST_MAC, "10.1.2.3", "10.4.5.6", netmask="255.0.0.0")


def run(data: bytes) -> None:
    """Sends frames, good and bad, and checks each that reaches the link."""
    source = Input(data)
    wanted = -1 if source.chance(2) else some_features(source, _CHOICES)
    link = Cable(ALL if source.chance(2) else Offload(source.u8 & int(ALL)))
    locked = source.chance(8)
    responders = (_DHCP.answer,) if source.chance(4) else ()
    wanted &= _with_needs(wanted)
    guest = NetGuest(link, wanted, lock_mac=locked, responders=responders)
    offered = 0
    for _ in range(40):
        if not source.more:
            break
        step = source.below(16)
        if step < 10:
            header = any_net_header(source)
            frame = any_frame(source)
            if source.chance(32):
                header = header[: source.below(12)]
                frame = b""
            buffers = guest.place_pieces(source, header + frame)
            writable = [guest.buffer(source, 8)] if source.chance(32) else []
            offered += guest.offer(1, buffers, writable)
            if source.chance(2):
                guest.kick(1)
        elif step == 10:
            link.port.takes = source.below(4)
        elif step == 11:
            link.port.takes = 1 << 30
            with guest.watched():
                assert link.port.on_writable is not None
                link.port.on_writable()
        elif step == 12:
            guest.scribble(source)
        elif step == 13:
            guest.start_over()
            offered = 0
            link.port.written.clear()
        else:
            guest.kick(source.below(4))
        guest.collect(1)
    link.port.takes = 1 << 30
    guest.kick(1)
    guest.collect(1)
    allowed = host_offloads(guest.driver.features)
    for header, frame in link.port.written:
        _check(header, frame, link.accepts & allowed)
        assert not locked or frame[6:12] == GUEST_MAC or not frame
    if not guest.unruly and guest.device.fault is None:
        assert guest.ring(1).in_flight == 0, "a chain did not come back"
    guest.start_over()
    link.port.written.clear()
    guest.memory.write(0x8000, bytes(12) + b"\xff" * 6 + GUEST_MAC + b"\x88\xb5" + bytes(46))
    guest.offer(1, [(0x8000, 72)])
    guest.kick(1)
    assert len(link.port.written) == 1 and len(guest.collect(1)) == 1, "dead after the reset"


def _with_needs(features: int) -> int:
    from vq.device import with_needs_met
    from vq.net import NetDevice

    return features if features < 0 else with_needs_met(features, NetDevice.feature_needs)


def _check(header: bytes, frame: bytes, permitted: Offload) -> None:
    flags, gso_type = header[0], header[1]
    size, start, offset = (int.from_bytes(header[at : at + 2], "little") for at in (4, 6, 8))
    assert flags in (0, 1) and header[10:] == b"\0\0"
    if flags:
        assert permitted & Offload.CSUM and (not frame or start + offset + 2 <= len(frame))
    if gso_type:
        assert flags and size >= 1 and permitted & ~Offload.CSUM
