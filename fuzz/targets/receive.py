"""What a link gives: frames with any header into receive buffers of any kind."""

from __future__ import annotations

from fuzz.frames import any_frame, any_net_header
from fuzz.guests import GUEST_MAC, RING_CHOICES, Cable, NetGuest, some_features
from fuzz.inputs import Input
from fuzz.targets.transmit import _with_needs
from vq.abi import NetFeature
from vq.offload import ALL

_CHOICES = (
    *(NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6, NetFeature.GUEST_ECN),
    *(NetFeature.GUEST_USO4, NetFeature.GUEST_USO6, NetFeature.MRG_RXBUF, NetFeature.CTRL_VQ),
    *(NetFeature.CTRL_RX, NetFeature.CTRL_VLAN, NetFeature.CTRL_GUEST_OFFLOADS, NetFeature.MTU),
    *RING_CHOICES,
)
_SIZES = (2048, 1526, 12, 11, 13, 64, 0x10000 + 12, 1, 300, 0)


def run(data: bytes) -> None:
    """Delivers frames, and puts together again what the guest finds in its buffers."""
    source = Input(data)
    wanted = -1 if source.chance(2) else some_features(source, _CHOICES)
    link = Cable(ALL)
    options = {"lock_mac": True} if source.chance(8) else {}
    mtu = source.pick((None, None, 1500, 68))
    guest = NetGuest(link, _with_needs(wanted), mtu=mtu, **options)
    for _ in range(60):
        if not source.more:
            break
        step = source.below(16)
        if step < 6:
            header, frame = any_net_header(source), any_frame(source)
            link.port.waiting.append((header, frame))
            if source.chance(2):
                _arrive(guest, link)
        elif step < 12:
            _offer(guest, source)
            if source.chance(2):
                guest.kick(0)
        elif step == 12:
            guest.scribble(source)
        elif step == 13 and guest.has(NetFeature.CTRL_VQ) and not guest.unruly:
            if guest.device.fault is None:
                guest.command(bytes((source.below(6), source.below(6))) + source.take(2))
        elif step == 14:
            guest.start_over()
        else:
            guest.kick(0)
        _look(guest)
    _arrive(guest, link)
    _look(guest)
    link.port.waiting.clear()
    guest.start_over()
    frame = GUEST_MAC + b"\2\0\0\0\0\xaa\x88\xb5" + bytes(46)
    guest.memory.write(0x8000, b"\xee" * 2048)
    guest.offer(0, [], [(0x8000, 2048)])
    link.port.waiting.append((bytes(12), frame))
    _arrive(guest, link)
    assert _look(guest) == [frame], "dead after the reset"


def _arrive(guest: NetGuest, link: Cable) -> None:
    with guest.watched():
        assert link.port.on_readable is not None
        link.port.on_readable()


def _offer(guest: NetGuest, source: Input) -> None:
    count = source.pick((1, 1, 2, 3))
    buffers = [guest.buffer(source, source.pick(_SIZES)) for _ in range(count)]
    readable = [guest.buffer(source, 4)] if source.chance(32) else []
    guest.offer(0, readable, buffers)


def _look(guest: NetGuest) -> list[bytes]:
    """The frames in the buffers that came back; each is whole, and its header permitted."""
    frames = []
    used = guest.collect(0)
    while used and not guest.overlapping:
        buffers, written = used.pop(0)
        if not written:
            continue  # of a chain that broke a rule
        data = _content(guest, buffers)[:written]
        assert written >= 12
        header = data[:12]
        count = int.from_bytes(header[10:12], "little")
        assert count == 1 or (count > 1 and guest.has(NetFeature.MRG_RXBUF))
        for _ in range(count - 1):
            if not used and guest.device.fault is not None:
                return frames
            buffers, written = used.pop(0)
            data += _content(guest, buffers)[:written]
        features = guest.driver.features
        flags, gso_type = header[0], header[1]
        assert not flags & ~3
        assert not flags or features >> NetFeature.GUEST_CSUM & 1
        if gso_type:
            assert flags & 1
            needed = {1: NetFeature.GUEST_TSO4, 4: NetFeature.GUEST_TSO6}.get(gso_type & 0x7F)
            assert needed is None or features >> needed & 1
            assert not gso_type & 0x80 or features >> NetFeature.GUEST_ECN & 1
        frames.append(data[12:])
    return frames


def _content(guest: NetGuest, buffers: tuple[tuple[int, int], ...]) -> bytes:
    return b"".join(guest.memory.read(gpa, length) for gpa, length in buffers if length)
