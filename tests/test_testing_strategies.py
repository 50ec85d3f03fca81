"""The strategies give what they promise, by judges of their own."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from test_hostile_driver import Echo, exchange_frames, exchange_text

from vq.abi import DESC_F_WRITE
from vq.errors import AddressError
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.testing.hostile import MEMORY, Case, ChainPlan, DeviceBroke, Stage, run_case
from vq.testing.strategies import (
    Behaviour,
    bad_chains,
    driver_behaviours,
    frames,
    good_chains,
    memory_layouts,
    net_headers,
    tcp_frames,
    udp_frames,
)

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(memory_layouts())
def test_a_layout_is_a_guests_memory(layout: tuple[tuple[int, int], ...]) -> None:
    with GuestMemory.allocate(*layout) as memory:
        assert memory.size == sum(size for _, size in layout)


def is_in_memory(memory: GuestMemory, plan: ChainPlan) -> bool:
    try:
        for desc in plan.descs:
            memory.views(desc.addr, desc.length)
    except AddressError:
        return False
    return True


@quick
@given(good_chains())
def test_a_good_chain_lies_in_memory_readable_part_first(plan: ChainPlan) -> None:
    with GuestMemory.allocate(*MEMORY) as memory:
        assert is_in_memory(memory, plan)
    ways = [bool(desc.flags & DESC_F_WRITE) for desc in plan.descs]
    assert ways == sorted(ways)
    assert plan.fault is None and plan.descs


@quick
@given(good_chains())
def test_a_good_chain_is_taken(plan: ChainPlan) -> None:
    def play(stage: Stage) -> None:
        stage.up()
        stage.put(plan)
        stage.kick()
        assert not stage.needs_reset
        assert len(stage.ring.collect()) == 1

    run_case(Case("2: good", play), Echo, exchange_text)


@quick
@given(bad_chains())
def test_a_bad_chain_is_found(plan: ChainPlan) -> None:
    def play(stage: Stage) -> None:
        stage.up()
        stage.put(plan)
        stage.kick()
        assert stage.needs_reset, plan.fault

    assert plan.fault
    run_case(Case("2: bad", play), Echo, exchange_text)


@quick
@given(driver_behaviours(queues=3))
def test_no_behaviour_harms_a_network_device(behaviour: Behaviour) -> None:
    run_case(behaviour.case(), lambda: NetDevice(LoopbackLink()), exchange_frames)


def test_a_device_that_some_behaviour_harms_is_found() -> None:
    class Fragile(Echo):
        def reset_queue(self, index: int) -> None:
            raise RuntimeError("nobody ever does that")

    def harms(behaviour: Behaviour) -> bool:
        try:
            run_case(behaviour.case(), Fragile)
        except DeviceBroke:
            return True
        return False

    found = find(driver_behaviours(queues=1), harms, settings=settings(max_examples=2000))
    assert [act.name for act in found.acts] == ["reset_queue"]


# --- frames --------------------------------------------------------------------------------------


def one_complement_sum(data: bytes) -> int:
    total = 0
    for high, low in zip(data[::2], (data + b"\0")[1::2], strict=False):
        total += high << 8 | low
    return total % 0xFFFF


def checksums_of(frame: bytes) -> tuple[int, int]:
    """What the sums over the IP header and over pseudo header and segment come to; 0 is right."""
    start = 18 if frame[12:14] == b"\x81\0" else 14
    if frame[start] >> 4 == 4:
        header, segment = frame[start : start + 20], frame[start + 20 :]
        pseudo = header[12:20] + struct.pack(">HH", header[9], len(segment))
        return one_complement_sum(header), one_complement_sum(pseudo + segment)
    header, segment = frame[start : start + 40], frame[start + 40 :]
    pseudo = header[8:40] + struct.pack(">IHH", len(segment), 0, header[6])
    return 0, one_complement_sum(pseudo + segment)


@quick
@given(st.one_of(tcp_frames(), udp_frames()))
def test_checksums_are_right(frame: bytes) -> None:
    assert checksums_of(frame) == (0, 0)


@quick
@given(frames(most=300))
def test_frames_have_a_length_that_was_asked_for(frame: bytes) -> None:
    assert len(frame) <= 12 + 4 + 2 + 40 + 20 + 300


@quick
@given(net_headers())
def test_headers_have_twelve_bytes(header: bytes) -> None:
    assert len(header) == 12


@pytest.mark.parametrize("kind", [b"\x08\0", b"\x86\xdd", b"\x08\x06", b"\x81\0"])
def test_all_kinds_of_frames_come_up(kind: bytes) -> None:
    find(frames(), lambda frame: frame[12:14] == kind, settings=settings(max_examples=2000))
    assert find(net_headers(wild=False), lambda header: True) == bytes(12)
