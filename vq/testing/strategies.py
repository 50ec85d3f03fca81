"""hypothesis strategies for tests of device models::

    @given(driver_behaviours())
    def test_no_driver_harms_the_device(behaviour):
        run_case(behaviour.case(), MyDevice, exercise)

Addresses that chains name lie in the memory that `vq.testing.hostile.Stage` has, or outside of it
where a chain is bad; `Stage.put` makes one available.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from hypothesis import strategies as st

from vq.abi import DESC_F_INDIRECT, DESC_F_WRITE, Feature, HdrFlag, HdrGso, Status
from vq.net_driver import NetHeader
from vq.testing.hostile import HOLE, MEMORY, Case, ChainPlan, Desc, NotApplicable, Stage

__all__ = [
    "Act",
    "Behaviour",
    "bad_chains",
    "driver_behaviours",
    "frames",
    "good_chains",
    "memory_layouts",
    "net_headers",
    "tcp_frames",
    "udp_frames",
]

Layout: TypeAlias = tuple[tuple[int, int], ...]
"""``(gpa, size)`` of each region, for `GuestMemory.allocate`."""

_PAGE = 0x1000


# --- memory --------------------------------------------------------------------------------------


@st.composite
def memory_layouts(draw: st.DrawFn, *, most_regions: int = 4, most_pages: int = 16) -> Layout:
    """Regions that do not overlap: side by side or with holes, in any order, at 0 or not."""
    regions = []
    end = draw(st.sampled_from((0, _PAGE, 0x100000, 1 << 32)))
    for _ in range(draw(st.integers(1, most_regions))):
        size = _PAGE * draw(st.integers(1, most_pages))
        regions.append((end, size))
        end += size + draw(st.sampled_from((0, 0, _PAGE, 0x100000, 1 << 40)))
    return tuple(draw(st.permutations(regions)))


# --- chains --------------------------------------------------------------------------------------


@st.composite
def _buffers(draw: st.DrawFn, flags: int, most: int, longest: int) -> list[Desc]:
    """Buffers in the stage's memory, of any cut; some empty, some over two regions."""
    found = []
    for _ in range(draw(st.integers(0, most))):
        length = draw(st.one_of(st.integers(0, longest), st.sampled_from((1, 12, 16))))
        first = draw(
            st.one_of(
                # Behind what the drivers' rings take up, from below.
                st.integers(MEMORY[0][0] + 0x8000, MEMORY[0][0] + MEMORY[0][1] - longest),
                st.integers(MEMORY[1][0] - 64, MEMORY[1][0] + MEMORY[1][1] - longest),
                st.integers(MEMORY[2][0], MEMORY[2][0] + MEMORY[2][1] - longest),
            )
        )
        found.append(Desc(first, length, flags))
    return found


@st.composite
def good_chains(draw: st.DrawFn, *, most: int = 4, longest: int = 2048) -> ChainPlan:
    """A chain that breaks no rule: up to `most` readable and as many writable buffers of up to
    `longest` bytes. They may overlap, as the driver's own business.
    """
    readable = draw(_buffers(0, most, longest))
    writable = draw(_buffers(DESC_F_WRITE, most, longest))
    descs = (*readable, *writable) or (Desc(MEMORY[0][0] + 0x8000, 1),)
    return ChainPlan(descs, in_table=draw(st.booleans()))


@st.composite
def bad_chains(draw: st.DrawFn, *, longest: int = 2048) -> ChainPlan:
    """A good chain with one rule broken, which `fault` names."""
    good = draw(good_chains(longest=longest))
    descs = list(good.descs)
    place = draw(st.integers(0, len(descs) - 1))
    fault = draw(st.sampled_from(("outside", "order", "loop", "next", "table", "too long")))
    match fault:
        case "outside":
            addr, length = draw(
                st.sampled_from(
                    (
                        (0, 1),
                        (HOLE, 1),
                        (HOLE - 1, 2),
                        (MEMORY[0][0] - 1, 2),
                        ((1 << 64) - 1, 1),
                        ((1 << 64) - 1, 0xFFFFFFFF),
                        (MEMORY[0][0], 0xFFFFFFFF),
                    )
                )
            )
            descs[place] = Desc(addr, length, descs[place].flags)
        case "order":
            descs += [Desc(MEMORY[0][0], 1, DESC_F_WRITE), Desc(MEMORY[0][0], 1)]
        case "loop":
            return good._replace(loop_to=place, fault="a loop")
        case "next":
            return good._replace(last_next=draw(st.integers(0x8000, 0xFFFF)), fault="next")
        case "table":
            flags = DESC_F_INDIRECT if good.in_table else DESC_F_INDIRECT | DESC_F_WRITE
            length = draw(st.sampled_from((0, 1, 15, 17))) if not good.in_table else 16
            descs[place] = Desc(MEMORY[0][0], length, flags)
        case "too long":
            descs += [Desc(MEMORY[0][0], 0xFFFFFFFF), Desc(MEMORY[0][0], 0xFFFFFFFF)]
    return good._replace(descs=tuple(descs), fault=fault)


# --- frames --------------------------------------------------------------------------------------

macs = st.binary(min_size=6, max_size=6)


def _vlans() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.just(b""), st.integers(0, 0xFFFF).map(lambda tag: b"\x81\0" + tag.to_bytes(2, "big"))
    )


def _internet_checksum(data: bytes) -> int:
    """RFC 1071, slowly."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


@st.composite
def _ip_frames(draw: st.DrawFn, protocol: int, most: int) -> bytes:
    payload = draw(st.binary(max_size=most))
    ports = struct.pack(">2H", draw(st.integers(0, 0xFFFF)), draw(st.integers(0, 0xFFFF)))
    if protocol == 6:
        sequence = draw(st.integers(0, 0xFFFFFFFF))
        flags = draw(st.sampled_from((0x02, 0x10, 0x18, 0x11, 0x04)))
        segment = ports + struct.pack(">IIBBHHH", sequence, 0, 0x50, flags, 512, 0, 0) + payload
        field = 16
    else:
        segment = ports + struct.pack(">2H", 8 + len(payload), 0) + payload
        field = 6
    if draw(st.booleans()):
        source, target = draw(st.binary(min_size=4, max_size=4)), bytes((192, 0, 2, 1))
        pseudo = source + target + struct.pack(">BBH", 0, protocol, len(segment))
        header = (
            struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0x4000, 64, protocol, 0)
            + source
            + target
        )
        header = header[:10] + _internet_checksum(header).to_bytes(2, "big") + header[12:]
        kind = b"\x08\0"
    else:
        source, target = (draw(st.binary(min_size=16, max_size=16)) for _ in range(2))
        pseudo = source + target + struct.pack(">I3xB", len(segment), protocol)
        header = struct.pack(">IHBB", 6 << 28, len(segment), protocol, 64) + source + target
        kind = b"\x86\xdd"
    value = _internet_checksum(pseudo + segment)
    if protocol == 17 and not value:
        value = 0xFFFF  # RFC 768: a zero says that there is none
    segment = segment[:field] + value.to_bytes(2, "big") + segment[field + 2 :]
    return draw(macs) + draw(macs) + draw(_vlans()) + kind + header + segment


def tcp_frames(*, most: int = 1400) -> st.SearchStrategy[bytes]:
    """Ethernet frames with a TCP segment over IPv4 or IPv6, all checksums right; up to `most`
    bytes of payload, with or without a VLAN tag."""
    return _ip_frames(6, most)


def udp_frames(*, most: int = 1400) -> st.SearchStrategy[bytes]:
    """Ethernet frames with a UDP datagram, likewise."""
    return _ip_frames(17, most)


def frames(*, most: int = 1400) -> st.SearchStrategy[bytes]:
    """Ethernet frames: TCP, UDP, ARP and unknown protocols, and bytes that are hardly a frame."""
    unknown = st.tuples(macs, macs, _vlans(), st.binary(min_size=2, max_size=2 + most))
    arp = st.tuples(macs, st.binary(min_size=28, max_size=28)).map(
        lambda parts: b"\xff" * 6 + parts[0] + b"\x08\x06" + parts[1]
    )
    return st.one_of(
        tcp_frames(most=most),
        udp_frames(most=most),
        unknown.map(b"".join),
        arp,
        st.binary(max_size=most),
    )


def net_headers(*, wild: bool = True) -> st.SearchStrategy[bytes]:
    """12-byte net headers (virtio 1.3, 5.1.6) that say anything about their frame.

    Without `wild` they leave nothing undone.
    """
    if not wild:
        return st.just(NetHeader().pack())
    words = st.one_of(st.sampled_from((0, 14, 34, 54, 1460, 0xFFFF)), st.integers(0, 0xFFFF))
    flags = st.one_of(st.sampled_from([int(flag) for flag in HdrFlag]), st.integers(0, 0xFF))
    kinds = st.one_of(st.sampled_from([int(kind) for kind in HdrGso]), st.integers(0, 0xFF))
    return st.tuples(flags, kinds, words, words, words, words, words).map(
        lambda fields: struct.pack("<BB5H", *fields)
    )


# --- whole drivers -------------------------------------------------------------------------------


class Act(NamedTuple):
    """One thing that a driver does: a method of `Behaviour`, and what it is given."""

    name: str
    values: tuple[object, ...]


class Behaviour(NamedTuple):
    """A driver that does one thing after another, good or bad."""

    acts: tuple[Act, ...]

    def case(self) -> Case:
        """To be played by `vq.testing.hostile.run_case`."""
        return Case("2: any behaviour", self.play, exercised=False)

    def play(self, stage: Stage) -> None:
        """Does it all; what is impossible in between is left out."""
        stage.disown()  # what it does to its rings is in no books
        for act in self.acts:
            try:
                getattr(self, "_" + act.name)(stage, *act.values)
            except (NotApplicable, KeyError, IndexError):
                continue

    @staticmethod
    def _up(stage: Stage) -> None:
        stage.up()

    @staticmethod
    def _reset(stage: Stage) -> None:
        stage.act(stage.driver.reset)

    @staticmethod
    def _status(stage: Stage, value: int) -> None:
        stage.act(stage.transport.write_status, value)

    @staticmethod
    def _features(stage: Stage, features: int) -> None:
        stage.act(stage.transport.accept_features, features)

    @staticmethod
    def _set_up(stage: Stage, queue: int, places: Sequence[int], size: int) -> None:
        desc, avail, used = places
        stage.lend(used, 6 + 8 * 32768)
        stage.act(stage.transport.setup_queue, queue, size=size, desc=desc, avail=avail, used=used)

    @staticmethod
    def _reset_queue(stage: Stage, queue: int) -> None:
        stage.act(stage.transport.reset_queue, queue)

    @staticmethod
    def _chain(stage: Stage, queue: int, plan: ChainPlan) -> None:
        stage.queue = queue
        stage.put(plan)

    @staticmethod
    def _kick(stage: Stage, queue: int) -> None:
        stage.kick(queue)

    @staticmethod
    def _index(stage: Stage, queue: int, value: int) -> None:
        stage.driver.queues[queue].poke_avail_index(value)

    @staticmethod
    def _head(stage: Stage, queue: int, slot: int, value: int) -> None:
        ring = stage.driver.queues[queue]
        ring.poke_avail(slot % ring.size, value)

    @staticmethod
    def _read_config(stage: Stage, offset: int, length: int) -> None:
        stage.act(stage.transport.read_config, offset, length)

    @staticmethod
    def _write_config(stage: Stage, offset: int, data: bytes) -> None:
        stage.act(stage.transport.write_config, offset, data)


def _act(name: str, *values: st.SearchStrategy[object]) -> st.SearchStrategy[Act]:
    return st.tuples(*values).map(lambda given: Act(name, given))


@st.composite
def driver_behaviours(draw: st.DrawFn, *, queues: int = 3, most: int = 25) -> Behaviour:
    """What a driver may do in up to `most` steps to a device with `queues` queues."""
    which = st.integers(0, queues)
    version_1 = 1 << Feature.VERSION_1
    features = st.one_of(
        st.sampled_from((0, version_1, (1 << 64) - 1, version_1 | 1 << Feature.RING_RESET)),
        st.integers(0, (1 << 64) - 1),
    )
    values = [0, 1, 3, 11, 15, 15 | int(Status.FAILED), 15 | int(Status.NEEDS_RESET), 0xFF]
    place = st.one_of(
        st.integers(0, MEMORY[1][1] // 16).map(lambda number: MEMORY[1][0] + 16 * number),
        st.sampled_from((0, HOLE, HOLE - 16, (1 << 64) - 16, MEMORY[2][0] + 1)),
    )
    acts = st.one_of(
        _act("up"),
        _act("reset"),
        _act("status", st.sampled_from(values)),
        _act("features", features),
        _act("set_up", which, st.tuples(place, place, place), st.sampled_from((0, 1, 3, 8, 16))),
        _act("reset_queue", which),
        _act("chain", which, st.one_of(good_chains(), bad_chains())),
        _act("kick", which),
        _act("index", which, st.integers(0, 0xFFFF)),
        _act("head", which, st.integers(0, 15), st.integers(0, 0xFFFF)),
        _act("read_config", st.integers(0, 300), st.integers(0, 300)),
        _act("write_config", st.integers(0, 300), st.binary(max_size=20)),
    )
    begins_well = draw(st.booleans())
    rest = draw(st.lists(acts, max_size=most))
    return Behaviour((*([Act("up", ())] if begins_well else []), *rest))
