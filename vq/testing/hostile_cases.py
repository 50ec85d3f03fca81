"""What hostile drivers do to any device, each case named after the rule that it breaks.

The names start with the section of the virtio 1.3 specification that has the rule. Cases that break
no rule but go to the edge of one are here as well: a device has to cope with both. `CASES` has all
of them; `vq.testing.hostile` plays them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from vq.abi import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Feature,
    Status,
    bits,
    ring_layout,
)
from vq.driver_registers import RegisterDriver
from vq.testing.hostile import HOLE, MEMORY, Case, Desc, NotApplicable, Stage

__all__ = ["CASES"]

CASES: list[Case] = []
"""Every case there is for any device."""

W = DESC_F_WRITE
INDIRECT = 1 << Feature.INDIRECT_DESC
IN_ORDER = 1 << Feature.IN_ORDER
EVENT_IDX = 1 << Feature.EVENT_IDX
RING_RESET = 1 << Feature.RING_RESET
VERSION_1 = 1 << Feature.VERSION_1
_UP = Status.ACKNOWLEDGE | Status.DRIVER
_READY = _UP | Status.FEATURES_OK
_LIVE = _READY | Status.DRIVER_OK

_WHOLE_DEVICE = ("2.1", "2.2", "2.5", "4.", "6.")
"""Sections that are about a device and not about its queues."""

_BOTH_WAYS: tuple[tuple[str, int], ...] = (("readable", 0), ("writable", W))


def case(
    name: str,
    variants: Sequence[tuple[Any, ...]] = ((),),
    *,
    needs: int = 0,
    exercised: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a case; with `variants` one for each, their first elements going into the name."""

    def add(play: Callable[..., None]) -> Callable[..., None]:
        for variant in variants:
            label = f" ({variant[0]})" if variant else ""
            arguments = variant[1:]

            def go(stage: Stage, arguments: tuple[Any, ...] = arguments) -> None:
                play(stage, *arguments)

            once = name.startswith(_WHOLE_DEVICE)
            CASES.append(Case(name + label, go, needs, exercised, every_queue=not once))
        return play

    return add


# --- 2.1: the device status field ----------------------------------------------------------------


@case(
    "2.1: the status bits come in an order that nobody wrote down",
    [
        ("DRIVER_OK first", [Status.DRIVER_OK]),
        ("DRIVER_OK without FEATURES_OK", [1, 3, 3 | Status.DRIVER_OK]),
        ("all at once", [0xFF]),
        ("all of a driver's at once", [int(_LIVE)]),
        ("FEATURES_OK first", [Status.FEATURES_OK]),
        ("backwards", [Status.DRIVER_OK, 4 | 8, 4 | 8 | 2, int(_LIVE)]),
        ("FAILED first", [Status.FAILED, 0x80 | 1, 0x80 | 3]),
        ("the same again and again", [1, 1, 1, 3, 3, 11, 11, 15, 15, 15]),
        ("reserved bits", [1, 1 | 16, 1 | 16 | 32]),
        ("wider than a byte", [1, 3, 0x103, 0xFFFF]),
    ],
)
def _status_order(stage: Stage, values: list[int]) -> None:
    for value in values:
        stage.act(stage.transport.write_status, int(value))
    stage.kick()


@case("2.1: every value from 1 to 255, each after a reset")
def _every_status(stage: Stage) -> None:
    for value in range(1, 256):
        stage.act(stage.transport.write_status, value)
        stage.act(stage.transport.write_status, 0)


@case(
    "2.1.1: a driver must not clear a status bit",
    [
        ("ACKNOWLEDGE", Status.ACKNOWLEDGE),
        ("DRIVER", Status.DRIVER),
        ("FEATURES_OK", Status.FEATURES_OK),
        ("DRIVER_OK", Status.DRIVER_OK),
    ],
    exercised=False,
)
def _cleared(stage: Stage, bit: int) -> None:
    stage.up()
    stage.act(stage.transport.write_status, int(_LIVE) & ~int(bit))
    stage.kick()


@case("2.1.2: NEEDS_RESET is the device's to set")
def _needs_reset(stage: Stage) -> None:
    stage.up()
    stage.act(stage.transport.write_status, int(_LIVE | Status.NEEDS_RESET))
    stage.kick()


@case("2.1: a driver that has FAILED goes on all the same")
def _failed(stage: Stage) -> None:
    stage.up()
    stage.act(stage.transport.write_status, int(_LIVE | Status.FAILED))
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.kick()


@case("2.4: resets in the middle of everything")
def _resets(stage: Stage) -> None:
    for number in range(10):
        stage.up()
        if number % 2:
            stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))
            stage.kick()
        stage.act(stage.driver.reset)


@case("2.4: after a reset the buffers are the driver's again", _BOTH_WAYS)
def _buffers_after_reset(stage: Stage, flags: int) -> None:
    stage.up()
    for _ in range(min(4, stage.ring.num_free)):
        stage.chain(Desc(stage.buffer(), 64, flags))
    stage.kick()
    stage.act(stage.transport.write_status, 0)
    stage.take_back()
    for _ in range(20):
        stage.kick()


# --- 2.2: feature bits ---------------------------------------------------------------------------


@case(
    "2.2.1: a driver must not accept what was not offered",
    [
        ("every bit of 64", (1 << 64) - 1),
        ("every bit of 128", (1 << 128) - 1),
        ("bit 63", VERSION_1 | 1 << 63),
        ("bit 64", VERSION_1 | 1 << 64),
        ("RING_PACKED", VERSION_1 | 1 << Feature.RING_PACKED),
        ("SR_IOV", VERSION_1 | 1 << Feature.SR_IOV),
        ("NOTIFICATION_DATA", VERSION_1 | 1 << Feature.NOTIFICATION_DATA),
        ("reserved bits", VERSION_1 | 0xFF << 50),
    ],
)
def _not_offered(stage: Stage, features: int) -> None:
    _go_on_with(stage, features)


@case(
    "6.1: a driver accepts VERSION_1",
    [("nothing at all", 0), ("everything else", ~VERSION_1)],
)
def _legacy(stage: Stage, features: int) -> None:
    _go_on_with(stage, stage.transport.device_features & features)


@case("2.2.1: a feature is not accepted without one that it needs")
def _unmet_needs(stage: Stage) -> None:
    device = stage.device
    for bit, needed in device.feature_needs.items():
        if device.device_features >> bit & 1:
            _go_on_with(stage, device.device_features & ~needed | 1 << bit)
            stage.act(stage.transport.write_status, 0)


@case("2.2.1: single features, each of them alone with VERSION_1")
def _single_features(stage: Stage) -> None:
    for bit in bits(stage.transport.device_features):
        _go_on_with(stage, VERSION_1 | 1 << bit)
        stage.act(stage.transport.write_status, 0)


@case("3.1.1: features do not change after FEATURES_OK", exercised=False)
def _changed_features(stage: Stage) -> None:
    stage.negotiate()
    stage.act(stage.transport.accept_features, VERSION_1)
    for index in range(stage.transport.queue_count):
        stage.set_up(index)
    stage.act(stage.driver.start)
    stage.kick()


@case("3.1.1: features do not change after DRIVER_OK", exercised=False)
def _changed_late(stage: Stage) -> None:
    stage.up()
    stage.act(stage.transport.accept_features, 0)
    stage.kick()


@case("3.1.1: features accepted before the driver has said that it is there")
def _early_features(stage: Stage) -> None:
    stage.act(stage.transport.accept_features, stage.transport.device_features)
    stage.act(stage.transport.write_status, int(_LIVE))
    stage.kick()


def _go_on_with(stage: Stage, features: int) -> None:
    """Accepts a set, and goes on as if that had been all right."""
    transport = stage.transport
    stage.act(transport.write_status, int(_UP))
    stage.act(transport.accept_features, features)
    stage.act(transport.write_status, int(_READY))
    stage.act(transport.write_status, int(_LIVE))
    stage.kick()


# --- 2.5: the configuration space ----------------------------------------------------------------


@case(
    "2.5: the configuration space is read where there is none",
    [
        ("past its end", 4096, 4),
        ("at the end of the world", 0xFFFFFFFC, 4),
        ("nothing", 0, 0),
        ("all of 256 bytes", 0, 256),
        ("at odd places", 1, 3),
        ("one byte far out", 255, 1),
    ],
)
def _config_read(stage: Stage, offset: int, length: int) -> None:
    stage.act(stage.transport.read_config, offset, length)
    stage.up()
    stage.act(stage.transport.read_config, offset, length)


@case(
    "2.5: the configuration space is written where it is not the driver's",
    [
        ("each byte", [(offset, b"\xff") for offset in range(64)]),
        ("far out", [(4096, b"\1\2\3\4"), (0xFFFFFFFC, b"\1\2\3\4")]),
        ("nothing", [(0, b"")]),
        ("more than there is", [(0, b"\xa5" * 200)]),
        ("odd pieces", [(1, b"\1\2\3"), (3, b"\1\2"), (5, b"\xff" * 7)]),
    ],
    exercised=False,  # what a driver may write, it may write nonsense to
)
def _config_write(stage: Stage, writes: list[tuple[int, bytes]]) -> None:
    for offset, data in writes:
        stage.act(stage.transport.write_config, offset, data)
    stage.up()
    for offset, data in writes:
        stage.act(stage.transport.write_config, offset, data)


# --- 2.6, 3.1.1: setting queues up ---------------------------------------------------------------


@case(
    "2.7: a queue's parts are aligned",
    [
        ("descriptor table off by 8", 8, 0, 0),
        ("descriptor table off by 1", 1, 0, 0),
        ("available ring off by 1", 0, 1, 0),
        ("used ring off by 2", 0, 0, 2),
        ("used ring off by 1", 0, 0, 1),
    ],
)
def _misaligned(stage: Stage, desc: int, avail: int, used: int) -> None:
    start = stage.buffer(0x1000, align=4096)
    _set_up_by_hand(
        stage, desc=start + desc, avail=start + 0x400 + avail, used=start + 0x800 + used
    )


@case(
    "2.7: a queue's size is a power of two, and no larger than the device has it",
    [
        ("0", 0),
        ("3", 3),
        ("7", 7),
        ("65536", 65536),
        ("32768", 32768),
        ("negative", -8),
        ("2 to the 31", 1 << 31),
    ],
)
def _bad_size(stage: Stage, size: int) -> None:
    start = stage.buffer(0x1000, align=4096)
    _set_up_by_hand(stage, size=size, desc=start, avail=start + 0x400, used=start + 0x800)


@case(
    "2.7: a queue's parts lie in the guest's memory",
    [
        (f"{part} {where}", part, place)
        for part in ("desc", "avail", "used")
        for where, place in (
            ("at 0", 0),
            ("in the hole", HOLE + 0x1000),
            ("over the end", HOLE - 16),
            ("at the end of the world", (1 << 64) - 16),
        )
    ],
)
def _parts_outside(stage: Stage, part: str, place: int) -> None:
    start = stage.buffer(0x1000, align=4096)
    parts = {"desc": start, "avail": start + 0x400, "used": start + 0x800, part: place}
    _set_up_by_hand(stage, **parts)


@case("2.7: a queue's parts do not overlap", exercised=False)
def _parts_overlap(stage: Stage) -> None:
    stage.negotiate()
    start = stage.buffer(0x1000, align=4096)
    stage.lend(start, 0x1000)
    stage.act(stage.transport.setup_queue, stage.queue, size=8, desc=start, avail=start, used=start)
    stage.act(stage.driver.start)
    for _ in range(20):
        stage.kick()


@case(
    "2.6: only queues that there are",
    [("one too many", 0), ("far out", 1000), ("the last of 16 bits", 0xFFFF)],
)
def _no_such_queue(stage: Stage, beyond: int) -> None:
    stage.up()
    index = stage.transport.queue_count + beyond
    start = stage.buffer(0x1000, align=4096)
    stage.act(
        stage.transport.setup_queue,
        index,
        size=8,
        desc=start,
        avail=start + 0x400,
        used=start + 0x800,
    )
    stage.kick(index)


@case("2.6.1: a queue is not set up again without a reset", exercised=False)
def _set_up_twice(stage: Stage) -> None:
    stage.up()
    ring = stage.ring
    stage.act(
        stage.transport.setup_queue,
        stage.queue,
        size=ring.size,
        desc=ring.desc,
        avail=ring.avail,
        used=ring.used,
    )
    stage.kick()


@case(
    "3.1.1: queues are set up after FEATURES_OK",
    [("before anything", 0), ("before FEATURES_OK", int(_UP))],
)
def _set_up_early(stage: Stage, status: int) -> None:
    if status:
        stage.act(stage.transport.write_status, status)
    start = stage.buffer(0x1000, align=4096)
    stage.act(
        stage.transport.setup_queue,
        stage.queue,
        size=8,
        desc=start,
        avail=start + 0x400,
        used=start + 0x800,
    )
    stage.kick()


def _set_up_by_hand(stage: Stage, *, size: int = 8, desc: int, avail: int, used: int) -> None:
    """Sets the attacked queue up with these, and goes on as if that had been all right."""
    stage.negotiate()
    if 0 < size <= 32768 and not size & (size - 1):
        layout = ring_layout(size)
        stage.lend(used, layout.used_bytes)
    stage.act(
        stage.transport.setup_queue, stage.queue, size=size, desc=desc, avail=avail, used=used
    )
    stage.act(stage.driver.start)
    stage.kick()


# --- 2.6.1: queue reset --------------------------------------------------------------------------


@case("2.6.1: a queue is not reset unless RING_RESET was negotiated", exercised=False)
def _reset_not_negotiated(stage: Stage) -> None:
    stage.up(without=RING_RESET)
    if isinstance(stage.transport, RegisterDriver):
        stage.transport.RESET_SECONDS = 0.02  # the device owes it nothing to wait for
    stage.act(stage.transport.reset_queue, stage.queue)
    stage.kick()


@case("2.6.1: a queue that there is not cannot be reset", needs=RING_RESET)
def _reset_no_queue(stage: Stage) -> None:
    stage.up()
    for index in (stage.transport.queue_count, 0xFFFF):
        stage.act(stage.transport.reset_queue, index)


@case("2.6.1: a queue that was not set up is reset", needs=RING_RESET)
def _reset_unused(stage: Stage) -> None:
    stage.negotiate()
    stage.act(stage.transport.reset_queue, stage.queue)
    stage.act(stage.driver.start)
    stage.kick()


@case("2.6.1: a queue is reset twice, and kicked in between", needs=RING_RESET)
def _reset_twice(stage: Stage) -> None:
    stage.up()
    for _ in range(2):
        stage.reset_queue()
        stage.kick()
    stage.set_up(stage.queue)


@case(
    "2.6.1: buffers of a queue that was reset are the driver's again", _BOTH_WAYS, needs=RING_RESET
)
def _reset_in_flight(stage: Stage, flags: int) -> None:
    stage.up()
    for _ in range(min(4, stage.ring.num_free)):
        stage.chain(Desc(stage.buffer(), 64, flags))
    stage.kick()
    lent = list(stage.lent)
    stage.reset_queue()
    stage.take_back()
    for _ in range(20):
        stage.kick()
    stage.lent += lent
    stage.set_up(stage.queue)


# --- 2.7.4: how messages are framed --------------------------------------------------------------


@case(
    "2.7.4.2: readable buffers come before writable ones",
    [
        ("writable, readable", "WR"),
        ("readable, writable, readable", "RWR"),
        ("two of each", "WWRR"),
        ("in turns", "RWRWRW"),
    ],
)
def _readable_last(stage: Stage, order: str) -> None:
    stage.up()
    stage.chain(*(Desc(stage.buffer(), 64, W if way == "W" else 0) for way in order))
    stage.kick()


@case(
    "2.7.4.1: nothing is assumed about how a message is cut",
    [
        (f"{count} of {length} bytes, {way}", count, length, flags)
        for count, length in ((1, 1), (2, 1), (8, 1), (16, 1), (4, 3), (2, 13))
        for way, flags in _BOTH_WAYS
    ],
)
def _pieces(stage: Stage, count: int, length: int, flags: int) -> None:
    stage.up()
    stage.chain(*(Desc(stage.buffer(length, align=1), length, flags) for _ in range(count)))
    stage.kick()


@case(
    "2.7.4.1: any bytes may stand in a message",
    [
        (f"{length} bytes of {name}, room for {room}", length, fill, room)
        for length in (1, 8, 12, 17, 64, 1500)
        for name, fill in (("zeros", 0), ("ones", 0xFF), ("noise", None))
        for room in (0, 1, 64)
    ],
)
def _content(stage: Stage, length: int, fill: int | None, room: int) -> None:
    stage.up()
    message = stage.buffer(length)
    if fill is not None:
        stage.memory.write(message, bytes((fill,)) * length)
    answer = [Desc(stage.buffer(room), room, W)] if room else []
    stage.chain(Desc(message, length), *answer)
    stage.kick()


# --- 2.7.5: the descriptor table -----------------------------------------------------------------


@case(
    "2.7.5: a buffer lies in the guest's memory",
    [
        (f"{where}, {way}", addr, length, flags)
        for where, addr, length in (
            ("at 0", 0, 64),
            ("in the hole", HOLE + 0x1000, 64),
            ("just behind the end", HOLE, 1),
            ("over the end", HOLE - 32, 64),
            ("over the hole", HOLE - 32, MEMORY[2][0] - HOLE + 64),
            ("over the beginning", MEMORY[0][0] - 32, 64),
            ("at the end of the world", (1 << 64) - 1, 1),
            ("around the end of the world", (1 << 64) - 32, 64),
            ("of 4 GiB", MEMORY[0][0], 0xFFFFFFFF),
            ("with all bits set", (1 << 64) - 1, 0xFFFFFFFF),
        )
        for way, flags in _BOTH_WAYS
    ],
)
def _buffer_outside(stage: Stage, addr: int, length: int, flags: int) -> None:
    stage.up()
    stage.chain(Desc(addr, length, flags))
    stage.kick()


@case("2.7.5: the last buffer of a chain lies outside of the guest's memory", _BOTH_WAYS)
def _last_outside(stage: Stage, flags: int) -> None:
    stage.up()
    good = [Desc(stage.buffer(), 64, flags) for _ in range(2)]
    stage.chain(*good, Desc(HOLE + 16, 64, flags))
    stage.kick()


@case("2.7.5: a buffer lies over two regions side by side", _BOTH_WAYS)
def _two_regions(stage: Stage, flags: int) -> None:
    stage.up()
    stage.chain(Desc(MEMORY[1][0] - 32, 64, flags))
    stage.kick()


@case(
    "2.7.5: next leads into the descriptor table",
    [("just behind it", None), ("far out", 0x7FFF), ("with all bits set", 0xFFFF)],
)
def _next_outside(stage: Stage, following: int | None) -> None:
    stage.up()
    size = stage.ring.size
    stage.chain(Desc(stage.buffer(), 64), last_next=size if following is None else following)
    stage.kick()


@case("2.7.5: next leads to a descriptor that was never filled", _BOTH_WAYS)
def _next_unfilled(stage: Stage, flags: int) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64, flags), last_next=stage.ring.size - 1)
    stage.kick()


@case("2.7.5: next leads into another chain", _BOTH_WAYS)
def _next_shared(stage: Stage, flags: int) -> None:
    stage.up()
    other = stage.chain(Desc(stage.buffer(), 64, flags), Desc(stage.buffer(), 64, flags))
    stage.chain(Desc(stage.buffer(), 64, flags), last_next=other[1])
    stage.kick()
    stage.disown()


@case("2.7.5: reserved flags are ignored or refused", _BOTH_WAYS)
def _reserved_flags(stage: Stage, flags: int) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64, flags | 0xFFF8))
    stage.kick()


@case("2.7.5: empty buffers, and nothing else", _BOTH_WAYS)
def _empty(stage: Stage, flags: int) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 0, flags))
    stage.chain(*(Desc(HOLE + 0x100, 0, flags) for _ in range(4)))
    stage.kick()


@case("2.7.5: empty buffers before, between and behind others", _BOTH_WAYS)
def _some_empty(stage: Stage, flags: int) -> None:
    stage.up()
    full = Desc(stage.buffer(), 64, flags)
    stage.chain(Desc(0, 0, flags), full, Desc(0, 0, flags), Desc((1 << 64) - 1, 0, flags))
    stage.kick()


@case(
    "2.7.5: a buffer lies over the queue itself",
    [
        (f"{part}, {way}", part, flags)
        for part in ("desc", "avail", "used")
        for way, flags in _BOTH_WAYS
    ],
    exercised=False,  # what the device writes there is the driver's own undoing
)
def _over_the_queue(stage: Stage, part: str, flags: int) -> None:
    stage.up()
    ring = stage.ring
    layout = ring_layout(ring.size)
    place, length = {
        "desc": (ring.desc, layout.desc_bytes),
        "avail": (ring.avail, layout.avail_bytes),
        "used": (ring.used, layout.used_bytes),
    }[part]
    stage.chain(Desc(place, length, flags))
    for _ in range(4):
        stage.kick()
    stage.disown()


@case("2.7.5: the same memory is readable and writable, and that twice over")
def _same_memory(stage: Stage) -> None:
    stage.up()
    place = stage.buffer(256)
    for _ in range(2):
        stage.chain(Desc(place, 256), Desc(place + 8, 128, W), Desc(place, 256, W))
    stage.kick()


# --- 2.7.5.2: chains -----------------------------------------------------------------------------


@case(
    "2.7.5.2: a chain does not loop",
    [
        (f"{name}, {way}", count, back, flags)
        for name, count, back in (
            ("to itself", 1, 0),
            ("of two", 2, 0),
            ("at the end of three", 3, 2),
            ("back into the middle", 4, 1),
            ("of as many as the queue has", 0, 0),
        )
        for way, flags in _BOTH_WAYS
    ],
)
def _loop(stage: Stage, count: int, back: int, flags: int) -> None:
    stage.up()
    count = count or stage.ring.num_free
    place = stage.buffer()
    stage.chain(*[Desc(place, 64, flags)] * count, loop_to=back)
    stage.kick()


@case("2.7.5.2: a chain loops from its writable part to its readable one")
def _loop_over(stage: Stage) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W), loop_to=0)
    stage.kick()


@case("2.7.5.2: a chain is not longer than 4 GiB", _BOTH_WAYS)
def _too_many_bytes(stage: Stage, flags: int) -> None:
    stage.up()
    whole, length = MEMORY[0]
    stage.chain(
        Desc(whole, length, flags), Desc(whole, 0xFFFFFFFF, flags), Desc(whole, length, flags)
    )
    stage.kick()


@case("2.7.5.2: a chain takes as many descriptors as the queue has", _BOTH_WAYS)
def _whole_queue(stage: Stage, flags: int) -> None:
    stage.up()
    stage.chain(*(Desc(stage.buffer(), 64, flags) for _ in range(stage.ring.num_free)))
    stage.kick()


@case("2.7.5.2: with IN_ORDER a chain's descriptors stand side by side", needs=IN_ORDER)
def _out_of_order(stage: Stage) -> None:
    stage.up()
    if stage.ring.size < 4:
        raise NotApplicable("the queue is too short")
    stage.chain(Desc(stage.buffer(), 64), last_next=stage.ring.size - 1)
    stage.kick()


# --- 2.7.5.3: indirect tables --------------------------------------------------------------------


@case("2.7.5.3: no indirect table unless that was negotiated", _BOTH_WAYS)
def _not_negotiated(stage: Stage, flags: int) -> None:
    stage.up(without=INDIRECT)
    table = stage.table(Desc(stage.buffer(), 64, flags))
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: an indirect table is whole descriptors",
    [(f"{length} bytes", length) for length in (0, 1, 8, 15, 17, 31, 0xFFFFFFFF)],
    needs=INDIRECT,
)
def _odd_table(stage: Stage, length: int) -> None:
    stage.up()
    place, _ = stage.table(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64))
    stage.chain(Desc(place, length, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: an indirect table lies in the guest's memory",
    [
        ("at 0", 0),
        ("in the hole", HOLE + 0x1000),
        ("over the end", HOLE - 16),
        ("at the end of the world", (1 << 64) - 16),
        ("around the end of the world", (1 << 64) - 8),
    ],
    needs=INDIRECT,
)
def _table_outside(stage: Stage, place: int) -> None:
    stage.up()
    stage.chain(Desc(place, 64, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: an indirect table of any size that 32 bits can say",
    [("a whole region", MEMORY[0][1]), ("nearly 4 GiB", 0xFFFFFFF0)],
    needs=INDIRECT,
)
def _huge_table(stage: Stage, length: int) -> None:
    stage.up()
    stage.chain(Desc(MEMORY[0][0], length, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: an indirect table may stand anywhere",
    [("odd", 1), ("over two regions", 0)],
    needs=INDIRECT,
)
def _unaligned_table(stage: Stage, odd: int) -> None:
    stage.up()
    place = stage.buffer(64) + 1 if odd else MEMORY[1][0] - 24
    stage.chain(
        Desc(
            *stage.table(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W), at=place),
            DESC_F_INDIRECT,
        )
    )
    stage.kick()


@case("2.7.5.3.1: no indirect table inside an indirect table", needs=INDIRECT)
def _nested(stage: Stage) -> None:
    stage.up()
    inner = stage.table(Desc(stage.buffer(), 64))
    outer = stage.table(Desc(*inner, DESC_F_INDIRECT))
    stage.chain(Desc(*outer, DESC_F_INDIRECT))
    stage.kick()


@case("2.7.5.3.1: an indirect table does not hold itself", needs=INDIRECT)
def _self_nested(stage: Stage) -> None:
    stage.up()
    place = stage.buffer(16)
    table = stage.table(Desc(place, 16, DESC_F_INDIRECT), at=place)
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case("2.7.5.3.1: a descriptor is not indirect and chained on at once", needs=INDIRECT)
def _indirect_and_next(stage: Stage) -> None:
    stage.up()
    table = stage.table(Desc(stage.buffer(), 64))
    stage.chain(Desc(*table, DESC_F_INDIRECT), Desc(stage.buffer(), 64))
    stage.kick()


@case("2.7.5.3.2: the write flag of an indirect descriptor is ignored", needs=INDIRECT)
def _indirect_writable(stage: Stage) -> None:
    stage.up()
    place, length = stage.table(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))
    taken = list(stage.lent)
    stage.chain(Desc(place, length, DESC_F_INDIRECT | W))
    stage.lent[:] = taken  # the table itself is not the device's to write
    stage.kick()


@case(
    "2.7.5.3.1: a chain in an indirect table does not loop",
    [("to itself", 1, 0), ("of two", 2, 0), ("of three, back to the second", 3, 1)],
    needs=INDIRECT,
)
def _table_loop(stage: Stage, count: int, back: int) -> None:
    stage.up()
    table = stage.table(*[Desc(stage.buffer(), 64)] * count, loop_to=back)
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: next leads into the indirect table",
    [("just behind it", 2), ("as far as the queue", 15), ("with all bits set", 0xFFFF)],
    needs=INDIRECT,
)
def _table_next(stage: Stage, following: int) -> None:
    stage.up()
    table = stage.table(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64), last_next=following)
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3.1: a chain in an indirect table is not longer than the queue",
    _BOTH_WAYS,
    needs=INDIRECT,
)
def _table_too_long(stage: Stage, flags: int) -> None:
    stage.up()
    place = stage.buffer()
    table = stage.table(*[Desc(place, 1, flags)] * (stage.ring.size + 1))
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case("2.7.5.3: descriptors before an indirect one count as well", needs=INDIRECT)
def _direct_and_indirect(stage: Stage) -> None:
    stage.up()
    ring = stage.ring
    place = stage.buffer()
    table = stage.table(*[Desc(place, 1)] * ring.size)
    stage.chain(Desc(place, 64), Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: a buffer in an indirect table lies in the guest's memory", _BOTH_WAYS, needs=INDIRECT
)
def _table_buffer_outside(stage: Stage, flags: int) -> None:
    stage.up()
    table = stage.table(Desc(stage.buffer(), 64, flags), Desc(HOLE - 8, 64, flags))
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case("2.7.4.2: readable buffers come before writable ones in a table too", needs=INDIRECT)
def _table_readable_last(stage: Stage) -> None:
    stage.up()
    table = stage.table(Desc(stage.buffer(), 64, W), Desc(stage.buffer(), 64))
    stage.chain(Desc(*table, DESC_F_INDIRECT))
    stage.kick()


@case(
    "2.7.5.3: an indirect table lies over the queue itself",
    [("desc", "desc"), ("avail", "avail"), ("used", "used")],
    needs=INDIRECT,
)
def _table_over_the_queue(stage: Stage, part: str) -> None:
    stage.up()
    stage.chain(Desc(getattr(stage.ring, part), 32, DESC_F_INDIRECT))
    stage.kick()


# --- 2.7.6: the available ring -------------------------------------------------------------------


@case(
    "2.7.13.3: the available index goes on by no more than the queue's size",
    [
        ("by one more", None),
        ("by half of 65536", 0x8000),
        ("back by one", 0xFFFF),
        ("back by the queue's size", -1),
    ],
    exercised=False,  # the driver's books are off now
)
def _index_jumps(stage: Stage, by: int | None) -> None:
    stage.up()
    size = stage.ring.size
    by = size + 1 if by is None else -size if by == -1 else by
    stage.ring.poke_avail_index(by & 0xFFFF)
    stage.kick()
    stage.kick()


@case("2.7.13.3: the available index never stands still", exercised=False)
def _index_runs(stage: Stage) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64))
    stage.ring.publish()
    for index in range(0, 0x10000, 251):
        stage.ring.poke_avail_index(index)
        stage.act(stage.transport.notify, stage.queue)


@case(
    "2.7.6: a head is an entry of the descriptor table",
    [("just behind it", None), ("far out", 0x7FFF), ("with all bits set", 0xFFFF)],
    exercised=False,  # the chain that was overwritten stays with the device for good
)
def _head_outside(stage: Stage, head: int | None) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.ring.publish()
    stage.ring.poke_avail(0, stage.ring.size if head is None else head)
    stage.kick()


@case("2.7.6: a whole ring of heads that are none", exercised=False)
def _heads_outside(stage: Stage) -> None:
    stage.up()
    ring = stage.ring
    for slot in range(ring.size):
        ring.poke_avail(slot, ring.size + slot)
    ring.poke_avail_index(ring.size)
    for _ in range(ring.size + 1):
        stage.kick()


@case("2.7.13: a chain is not made available twice", _BOTH_WAYS, exercised=False)
def _twice(stage: Stage, flags: int) -> None:
    stage.up()
    head = stage.chain(Desc(stage.buffer(), 64, flags))[0]
    stage.ring.publish()
    stage.ring.poke_avail(1, head)
    stage.ring.poke_avail_index(2)
    stage.act(stage.transport.notify, stage.queue)
    stage.disown()


@case("2.7.13: the same head in every entry of the ring", exercised=False)
def _everywhere(stage: Stage) -> None:
    stage.up()
    ring = stage.ring
    head = stage.chain(Desc(stage.buffer(), 64, W))[0]
    ring.publish()
    for slot in range(ring.size):
        ring.poke_avail(slot, head)
    ring.poke_avail_index(ring.size)
    for _ in range(3):
        stage.act(stage.transport.notify, stage.queue)
    stage.disown()


@case("2.7.6: reserved flags of the available ring mean nothing")
def _avail_flags(stage: Stage) -> None:
    stage.up()
    stage.ring.poke_avail_flags(0xFFFF & ~AVAIL_F_NO_INTERRUPT)
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.kick()
    stage.ring.poke_avail_flags(0)


@case("2.7.10: with EVENT_IDX the device does not go by the flags", needs=EVENT_IDX)
def _flags_with_event_idx(stage: Stage) -> None:
    stage.up()
    stage.ring.poke_avail_flags(AVAIL_F_NO_INTERRUPT)
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.kick()
    stage.ring.poke_avail_flags(0)


@case(
    "2.7.10: used_event may be any number",
    [("far ahead", 0x8000), ("just behind", 0xFFFF)],
    needs=EVENT_IDX,
)
def _used_event(stage: Stage, event: int) -> None:
    stage.up()
    stage.ring.poke_used_event(event)
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.kick()
    stage.ring.poke_used_event(0)


# --- 2.7.8: the used ring ------------------------------------------------------------------------


@case(
    "2.7.8: a driver must not write to the used ring",
    [("its index", 2, 2), ("its flags", 0, 2), ("all of it", 0, 0)],
    exercised=False,
)
def _writes_used(stage: Stage, offset: int, length: int) -> None:
    stage.up()
    ring = stage.ring
    length = length or ring_layout(ring.size).used_bytes
    for fill in (b"\xff", b"\x80", b"\0"):
        stage.memory.write(ring.used + offset, fill * length)
        stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))
        stage.kick()
    stage.disown()


# --- 2.9, 2.3: notifications ---------------------------------------------------------------------


@case("2.9: kicks that mean nothing, a thousand times")
def _spurious(stage: Stage) -> None:
    stage.up()

    def kicks() -> None:
        for _ in range(1000):
            stage.transport.notify(stage.queue)

    stage.act(kicks)


@case("2.9: kicks for queues that there are not", [("next", 0), ("far out", 0xFFFF)])
def _stray(stage: Stage, beyond: int) -> None:
    stage.up()
    stage.kick(stage.transport.queue_count + beyond)


@case(
    "3.1.1: no kick before DRIVER_OK",
    [
        ("before anything", 0),
        ("before FEATURES_OK", 1),
        ("before the queues", 2),
        ("with chains", 3),
    ],
)
def _early_kick(stage: Stage, step: int) -> None:
    if step == 1:
        stage.act(stage.transport.write_status, int(_UP))
    elif step:
        stage.negotiate()
    if step == 3:
        for index in range(stage.transport.queue_count):
            stage.set_up(index)
        stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))
    stage.kick()
    if step == 3:
        stage.act(stage.driver.start)
        stage.kick()


@case("2.9: only some queues are set up, and all are kicked", exercised=False)
def _half_set_up(stage: Stage) -> None:
    stage.negotiate()
    stage.set_up(stage.queue)
    stage.act(stage.driver.start)
    stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))
    for index in range(stage.transport.queue_count):
        stage.kick(index)


@case("2.9: a kick after a reset")
def _kick_after_reset(stage: Stage) -> None:
    stage.up()
    stage.chain(Desc(stage.buffer(), 64, W))
    stage.ring.publish()
    stage.act(stage.transport.write_status, 0)
    stage.take_back()
    stage.kick()


# --- 4.1, 4.2: registers -------------------------------------------------------------------------

_WIDTHS = (1, 2, 4, 8)


@case(
    "4.1, 4.2: registers are read at every place in every width",
    [("before anything", False), ("while the device works", True)],
)
def _read_registers(stage: Stage, up: bool) -> None:
    blocks = stage.registers()
    if up:
        stage.up()

    def read() -> None:
        for window, length in blocks:
            for width in _WIDTHS:
                for offset in (*range(length), length - 1, length, length + 0x1000):
                    value = window.read(offset, width)
                    if not 0 <= value < 1 << 8 * width:
                        raise ValueError(f"{value:#x} is read in {width} bytes")

    stage.act(read)
    if up:
        stage.lose_transport()  # an interrupt that was read away is one that the driver misses


@case(
    "4.1, 4.2: registers are written at every place in every width",
    [
        (f"{name}, {way}, {when}", value, step, up)
        for name, value in (("zeros", 0), ("ones", (1 << 64) - 1), ("an address", MEMORY[1][0]))
        for way, step in (("upwards", 1), ("downwards", -1))
        for when, up in (("before anything", False), ("while the device works", True))
    ],
)
def _write_registers(stage: Stage, value: int, step: int, up: bool) -> None:
    blocks = stage.registers()
    if up:
        stage.up()
        stage.chain(Desc(stage.buffer(), 64), Desc(stage.buffer(), 64, W))

    def write() -> None:
        for window, length in reversed(blocks):
            for width in _WIDTHS:
                for offset in range(length + width)[::step]:
                    window.write(offset, width, value & (1 << 8 * width) - 1)

    stage.lend(MEMORY[1][0], MEMORY[1][1])  # the device may have been told of a queue there
    stage.act(write)
    stage.lose_transport()


@case(
    "4.1, 4.2: registers are accessed where there are none, and in no width",
    [("far out", 1 << 40, 4), ("before the first", -4, 4), ("three bytes", 0, 3), ("none", 0, 0)],
)
def _no_registers(stage: Stage, offset: int, width: int) -> None:
    blocks = stage.registers()
    stage.up()

    def access() -> None:
        for window, _ in blocks:
            window.read(offset, width)
            window.write(offset, width, 0)

    stage.act(access)


# --- what changes while the device works ---------------------------------------------------------


@case(
    "2.7.13.3: what was made available changes while the device looks at it",
    [("lengths", "length"), ("addresses", "addr"), ("flags", "flags"), ("next", "next")],
    exercised=False,
)
def _changing(stage: Stage, what: str) -> None:
    stage.up()
    ring = stage.ring
    good = stage.buffer(64)
    stage.lend(good, 64)
    values = {"addr": [HOLE - 8, good], "length": [1 << 30, 64], "flags": [W, DESC_F_NEXT | W, 0]}
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for value in values.get(what, [0, 1, 0xFFFF]):
                entry = {"addr": good, "length": 64, "flags": W, "next": 0, what: value}
                for place in range(ring.size):
                    ring.poke_descriptor(place, **entry)

    stage.lend(ring.desc, ring_layout(ring.size).desc_bytes)  # by the thread, not the device
    changer = threading.Thread(target=change, daemon=True)
    changer.start()
    try:
        for index in range(1, 60):
            ring.poke_avail((index - 1) % ring.size, index % ring.size)
            ring.poke_avail_index(index)
            stage.act(stage.transport.notify, stage.queue)
            if stage.needs_reset:
                break
    finally:
        stop.set()
        changer.join()
    stage.disown()
