"""The battery of hostile drivers, against vq's own devices, and against devices that deserve it."""

from __future__ import annotations

import os

import pytest

from vq.abi import DeviceId, Feature, Status
from vq.device import RING_FEATURES, Device, Queue
from vq.devices.entropy import EntropyDevice
from vq.link import LoopbackLink
from vq.net import NetDevice
from vq.split_ring import Chain, SplitRing
from vq.testing import wiring
from vq.testing.hostile import (
    Case,
    Desc,
    DeviceBroke,
    NotApplicable,
    Stage,
    hostile_driver_battery,
    run_case,
)
from vq.testing.hostile_cases import CASES, W
from vq.testing.wiring import WIRES, Wired

FRAME = b"\xff" * 6 + bytes.fromhex("020000000001 88b5") + bytes(range(60))


def exchange_frames(wired: Wired) -> None:
    """A frame goes out and comes back, perhaps behind others that a hostile driver sent."""
    driver, receive = wired.driver, wired.driver.queues[0]
    buffers = set()
    for _ in range(40):
        if receive.num_free:
            place = driver.allocator.allocate(2048)
            buffers.add(place)
            receive.add([], [(place, 2048)], place)
        elif not buffers:
            raise NotApplicable("the receive queue is full of buffers that hold no frame")
        driver.kick(0)
        assert wired.request(1, bytes(12) + FRAME) == b""
        wired.turn()
        for used in receive.collect():
            if used.token in buffers:
                if wired.memory.read(used.token + 12, len(FRAME)) == FRAME:
                    return
                buffers.remove(used.token)
    raise AssertionError("no frame comes back")


test_net_device = hostile_driver_battery(
    lambda: NetDevice(LoopbackLink()), exchange_frames, vias=WIRES
)


def get_random_bytes(wired: Wired) -> None:
    assert len(wired.request(0, room=64, pieces=17)) == 64


test_entropy_device = hostile_driver_battery(EntropyDevice, get_random_bytes)


def test_the_battery_has_over_a_hundred_cases_each_with_a_name_of_its_own() -> None:
    assert len(CASES) > 200
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.name[0] in "23456" and ": " in case.name for case in CASES)


# --- devices that are broken on purpose ----------------------------------------------------------


class Echo(Device):
    """Gives back what it reads."""

    device_id = DeviceId.ENTROPY

    def __init__(self) -> None:
        super().__init__(features=RING_FEATURES, queues=[("requests", 64)])

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        chains = ring.pop_burst(16)
        for chain in chains:
            self.answer(chain)
        ring.write_used_burst(chains)
        self.publish(queue)
        return bool(chains) or ring.enable_kicks()

    def answer(self, chain: Chain) -> None:
        data = b"".join(map(bytes, chain.readable))
        for view in chain.writable:
            count = min(len(view), len(data))
            view[:count] = data[:count]
            chain.written += count
            data = data[count:]
            if not data:
                break


def exchange_text(wired: Wired) -> None:
    assert wired.request(0, b"hello", 10, pieces=3) == b"hello"


test_echo = hostile_driver_battery(Echo, exchange_text)


class Raises(Echo):
    """Thinks that there is always something to read, and is not caught."""

    def notify(self, index: int, /) -> None:
        ring = self.queues[index].ring
        if ring is not None:
            bytes(self.memory.view(0, 1) if self.memory else b"")


class Fails(Echo):
    """Thinks that every request has a byte to read."""

    def answer(self, chain: Chain) -> None:
        assert chain.readable, "nothing to read"
        super().answer(chain)


class WritesBehind(Echo):
    """Writes one byte more than it was lent."""

    def answer(self, chain: Chain) -> None:
        super().answer(chain)
        if chain.writable and self.memory is not None:
            for region in self.memory.regions:
                region.view[-1] ^= 1


class WritesTooMuch(Echo):
    """Says that it has written more than there was room for."""

    def answer(self, chain: Chain) -> None:
        chain.written = 1 << 16


class Wedges(Echo):
    """Stops for good at the first message that is empty, without saying so."""

    stuck = False

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        if self.stuck:
            return False
        return super().process(queue, ring)

    def answer(self, chain: Chain) -> None:
        self.stuck = not chain.readable

    def device_reset(self) -> None:
        self.stuck = False


class NeverRecovers(Echo):
    """Needs a reset, and then another."""

    broken = False

    def _fail(self, error: Exception) -> None:
        self.broken = True
        super()._fail(error)

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        return False if self.broken else super().process(queue, ring)


class KeepsBuffers(Echo):
    """Writes to what it was lent before a reset."""

    kept: list[Chain]

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        self.kept = ring.pop_burst(16)
        return False

    def notify(self, index: int, /) -> None:
        for chain in getattr(self, "kept", []):
            for view in chain.writable:
                view[0] ^= 0xFF
        super().notify(index)


@pytest.mark.parametrize(
    ("device", "name", "complaint"),
    [
        (Raises, "2.9: kicks that mean nothing", "got out of the device"),
        (Fails, "2.7.4.1: nothing is assumed", "model failed"),
        (WritesBehind, "2.7.4.1: any bytes", "in no buffer"),
        (WritesTooMuch, "2.7.4.1: any bytes", "a rule of its own"),
        (Wedges, "2.7.4.1: nothing is assumed", "does not say that it needs a reset"),
        (NeverRecovers, "2.7.5.2: a chain does not loop", "after a reset"),
        (KeepsBuffers, "2.4: after a reset", "in no buffer"),
    ],
)
def test_a_broken_device_is_found_out(
    device: type[Echo], name: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "PATIENCE", 0.2)
    cases = [case for case in CASES if case.name.startswith(name)]
    found = []
    for case in cases:
        try:
            run_case(case, device, exchange_text)
        except DeviceBroke as broken:
            found.append(str(broken))
    assert any(complaint in text for text in found), found


def test_a_case_that_needs_what_the_device_has_not_does_not_apply() -> None:
    case = Case("2.7.5.3: a case", lambda stage: None, needs=1 << Feature.SR_IOV)
    assert not run_case(case, Echo, exchange_text)
    assert not run_case(CASES[0], Echo, exchange_text, queue=1)


def test_cases_of_ones_own_are_played_like_the_others() -> None:
    played = []

    def play(stage: Stage) -> None:
        stage.up()
        stage.chain(Desc(stage.buffer(), 8), Desc(stage.buffer(), 8, W))
        stage.kick()
        played.append(stage.transport.status)

    battery = hostile_driver_battery(Echo, exchange_text, cases=[], more=[Case("5.4: mine", play)])
    battery(case=Case("5.4: mine", play), via="direct")
    assert played == [Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK]


def test_the_battery_leaves_nothing_open() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this kernel has no /proc/self/fd")
    run_case(CASES[0], Echo, exchange_text, via="vhost-user")
    before = count()
    for case in CASES[:20]:
        run_case(case, Echo, exchange_text, via="vhost-user")
    assert count() <= before
