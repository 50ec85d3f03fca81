"""Header parsing, checksums, segmentation and offloads in software, on frames cut anyhow."""

from __future__ import annotations

from fuzz.frames import any_frame, any_net_header, pieces_of
from fuzz.inputs import Input
from vq import packet as packets
from vq.offload import ALL, Offload
from vq.software import HeaderLie, check_frame, finish


def run(data: bytes) -> None:
    """Judges a guest's frame, and does in software what a link does not."""
    source = Input(data)
    allowed = ALL if source.chance(4) else Offload(source.u8 & int(ALL))
    accepts = Offload(source.u8 & int(ALL))
    header = any_net_header(source)
    frame = any_frame(source)
    pieces = pieces_of(source, frame)
    whole = packets.parse([frame])
    assert packets.parse(pieces) == whole, "parsing depends on where a frame is cut"
    _check_places(whole, frame)
    try:
        checked = check_frame([header, *pieces], len(frame), allowed)
        finished = finish(checked, accepts)
    except HeaderLie:
        return
    for part in (checked, *finished):
        _check_promises(part, allowed)
    if not accepts & Offload.CSUM:
        assert all(part[0] == bytes(12) for part in finished)
    if len(finished) == 1:
        assert sum(map(len, finished[0][1:])) == len(frame)
    else:
        gso_size = int.from_bytes(header[4:6], "little")
        payload = b"".join(_payload(part) for part in finished)
        assert payload == frame[len(frame) - len(payload) :], "payload lost in segmentation"
        assert all(len(_payload(part)) <= gso_size for part in finished)


def _payload(frame: list[packets.Buffer]) -> bytes:
    whole = packets.parse(frame[1:])
    assert whole.reason is None, whole.reason
    return b"".join(frame[1:])[whole.header_length :]


def _check_places(packet: packets.Packet, frame: bytes) -> None:
    assert packet.length == len(frame) and packet.header == frame[: packet.header_length]
    for place in (packet.l2_length, packet.header_length, packet.l3_end):
        assert 0 <= place <= len(frame)
    for offset in (packet.l3_offset, packet.l4_offset, packet.final_destination):
        assert offset is None or 0 <= offset <= packet.header_length


def _check_promises(frame: list[packets.Buffer], allowed: Offload) -> None:
    """Whatever is left undone was negotiated, and the header is true of the frame."""
    header = bytes(frame[0])
    length = sum(map(len, frame[1:]))
    flags, gso_type = header[0], header[1]
    hdr_len, gso_size, start, offset = (
        int.from_bytes(header[at : at + 2], "little") for at in (2, 4, 6, 8)
    )
    assert flags in (0, 1) and header[10:] == b"\0\0"
    if flags:
        assert allowed & Offload.CSUM
        assert start >= 14 and start + offset + 2 <= length and hdr_len <= length
    if gso_type:
        assert flags and gso_size and hdr_len <= length
        assert gso_type in (1, 4, 5, 0x81, 0x84)
