"""`tun_hdr` and `virtio_net_hdr`, each translated to the other and back."""

from __future__ import annotations

from fuzz.frames import any_frame, any_net_header, pieces_of
from fuzz.inputs import Input
from vq.offload import ALL
from vq.packet import parse
from vq.software import HeaderLie, check_frame
from vq.tun_hdr import TUN_HDR, TunHdrLie, from_tun, tagged, to_tun


def run(data: bytes) -> None:
    """Translates a guest's frame to OpenBSD's tap and back, or any frame of the tap's."""
    source = Input(data)
    if source.chance(2):
        _there_and_back(source)
    else:
        _from_a_tap(source)


def _there_and_back(source: Input) -> None:
    header, frame = any_net_header(source), any_frame(source)
    try:
        checked = check_frame([header, *pieces_of(source, frame)], len(frame), ALL)
    except HeaderLie:
        return
    told = to_tun(checked)
    if told is None:
        return
    private = bytearray().join(told[1:])
    came = tagged(told[0], [private])
    tun_header = bytes(told[0])
    if came is not None:
        tun_header, private = came[0], bytearray().join(came[1])
    assert len(private) == len(frame)
    back = from_tun(tun_header, [private])
    sent = bytes(checked[0])
    if not sent[0]:
        assert back == bytes(12)
        return
    assert back[0] == 1 and back[6:10] == sent[6:10], "another checksum than was asked for"
    packet = parse([private])
    if sent[1] and len(private) - packet.header_length > int.from_bytes(sent[4:6], "little"):
        assert back[1] & 0x7F == sent[1] and back[4:6] == sent[4:6], "another segmentation"


def _from_a_tap(source: Input) -> None:
    flags = source.pick((0x200, 0x400, 0x800, 0x220, 0x100, 0x10, 0x307, source.u16))
    header = TUN_HDR.pack(flags, 0, source.u16, source.pick((1448, 0, 536, 9000)))
    frame = bytearray(any_frame(source))
    came = tagged(header, [frame])
    if came is not None:
        header, frame = came[0], bytearray().join(came[1])
    pieces = [memoryview(frame)[view_start:end] for view_start, end in _cuts(source, len(frame))]
    try:
        net = from_tun(header, pieces)
    except TunHdrLie:
        return
    if net[0]:
        # What vq tells a guest must be something that it would take from one.
        check_frame([net, frame], len(frame), ALL)
    else:
        assert net == bytes(12)


def _cuts(source: Input, length: int) -> list[tuple[int, int]]:
    places = sorted(min(length, source.u8) for _ in range(source.below(4)))
    return list(zip([0, *places], [*places, length], strict=True))
