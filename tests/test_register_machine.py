"""A driver that does anything in any order finds the same device behind every kind of registers.

The same steps are taken with a device by direct calls, with one behind virtio-mmio and with one
behind PCI. What the first does is the reference: a model of the registers stands beside it.
"""

from __future__ import annotations

import ctypes
import struct

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from test_pci import DESC, DEVICE_AREA, DRIVER_AREA, OFFERED, Echo

from vq.abi import Feature, Status
from vq.device import Device
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.pci import PciFunction

VERSION_1 = 1 << Feature.VERSION_1
RING_RESET = 1 << Feature.RING_RESET
EVENT_IDX = 1 << Feature.EVENT_IDX
GOOD = [0x1000, 0x4000, 0x1_0000_0000, 0x1_0000_4000]
BASES = [*GOOD, 0x1001, 0x2_0000_0000, 0xFFFF_FFFF_FFFF_F000]
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


class Direct:
    """The device without registers, and a model of what registers would keep."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.events = 0
        self.forget_queues()
        device.on_queue_call = lambda index: self.note(1)
        device.on_config_change = lambda: self.note(2)

    def forget_queues(self) -> None:
        self.queues = [(queue.max_size, 0, 0, 0) for queue in self.device.queues]

    def note(self, event: int) -> None:
        self.events |= event

    def enabled(self, index: int) -> bool:
        return index < 2 and self.device.queues[index].ring is not None

    def write_status(self, value: int) -> None:
        self.device.write_status(value)
        if not value:
            self.events = 0
            self.forget_queues()

    def write_features(self, word: int, value: int) -> None:
        kept = self.device.driver_features & ~(0xFFFF_FFFF << 32 * word)
        self.device.accept_features(kept | value << 32 * word)

    def configure(self, index: int, size: int, base: int) -> None:
        if index < 2 and not self.enabled(index):
            areas = (base, base + 0x1000, base + 0x2000)
            self.queues[index] = (size, *(area & (1 << 64) - 1 for area in areas))

    def enable(self, index: int) -> None:
        if index < 2 and not self.enabled(index):
            size, desc, avail, used = self.queues[index]
            self.device.setup_queue(index, size=size, desc=desc, avail=avail, used=used)

    def reset_queue(self, index: int) -> None:
        if index < 2 and self.device.has_feature(Feature.RING_RESET):
            self.device.reset_queue(index)
            self.queues[index] = (self.device.queues[index].max_size, 0, 0, 0)

    def kick(self, index: int) -> None:
        self.device.notify(index)

    def take_events(self) -> int:
        events, self.events = self.events, 0
        return events

    def look(self, index: int) -> tuple[object, ...]:
        size = self.device.queue_max_size(index)
        return self.device.status, size, self.enabled(index), bytes(self.device.read_config(0, 6))


class Registers:
    """What both kinds of registers are used for, by the offsets of each."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.line = False

    def set_line(self, level: bool) -> None:
        assert level != self.line, "only changes are told"
        self.line = level


class Mmio(Registers):
    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.block = MmioRegisters(device, self.set_line)

    def write(self, offset: int, value: int) -> None:
        self.block.write(offset, 4, value & 0xFFFF_FFFF)

    def write_status(self, value: int) -> None:
        self.write(0x70, value)

    def write_features(self, word: int, value: int) -> None:
        self.write(0x24, word)
        self.write(0x20, value)

    def configure(self, index: int, size: int, base: int) -> None:
        self.write(0x30, index)
        self.write(0x38, size)
        for offset, area in ((0x80, base), (0x90, base + 0x1000), (0xA0, base + 0x2000)):
            self.write(offset + 4, area >> 32)
            self.write(offset, area)

    def enable(self, index: int) -> None:
        self.write(0x30, index)
        self.write(0x44, 1)

    def reset_queue(self, index: int) -> None:
        self.write(0x30, index)
        self.write(0xC0, 1)

    def kick(self, index: int) -> None:
        self.write(0x50, index)

    def take_events(self) -> int:
        events = self.block.read(0x60, 4)
        self.write(0x64, events)
        return events

    def look(self, index: int) -> tuple[object, ...]:
        self.write(0x30, index)
        status, size, enabled = (self.block.read(at, 4) for at in (0x70, 0x34, 0x44))
        config = bytes(self.block.read(0x100 + at, 1) for at in range(6))
        assert self.line == bool(self.block.read(0x60, 4))
        return status, size, bool(enabled), config


class Pci(Registers):
    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.function = PciFunction(device, self.set_line)
        self.bar = self.function.bars[0]

    def write_status(self, value: int) -> None:
        self.bar.write(20, 1, value)

    def write_features(self, word: int, value: int) -> None:
        self.bar.write(8, 4, word)
        self.bar.write(12, 4, value)

    def configure(self, index: int, size: int, base: int) -> None:
        self.bar.write(22, 2, index)
        self.bar.write(24, 2, size)
        for at, area in ((DESC, base), (DRIVER_AREA, base + 0x1000), (DEVICE_AREA, base + 0x2000)):
            self.bar.write(at, 4, area & 0xFFFF_FFFF)
            self.bar.write(at + 4, 4, area >> 32 & 0xFFFF_FFFF)

    def enable(self, index: int) -> None:
        self.bar.write(22, 2, index)
        self.bar.write(28, 2, 1)

    def reset_queue(self, index: int) -> None:
        self.bar.write(22, 2, index)
        self.bar.write(58, 2, 1)

    def kick(self, index: int) -> None:
        self.bar.write(0x100 + 4 * index, 2, index)

    def take_events(self) -> int:
        return self.bar.read(0x200, 1)

    def look(self, index: int) -> tuple[object, ...]:
        self.bar.write(22, 2, index)
        enabled = self.bar.read(28, 2)
        config = bytes(self.bar.read(0x300 + at, 1) for at in range(6))
        assert self.line == bool(self.function.events)
        assert self.line == bool(self.function.config.read(6, 2) & 8)
        return self.bar.read(20, 1), self.device.queue_max_size(index), bool(enabled), config


class RegisterMachine(RuleBasedStateMachine):
    @initialize(up=st.booleans(), features=st.sampled_from([0, RING_RESET, RING_RESET | EVENT_IDX]))
    def plug_in(self, up: bool, features: int) -> None:
        self.memories = [
            GuestMemory.allocate((0x1000, 0x8000), (1 << 32, 0x8000)) for _ in range(3)
        ]
        devices = [Echo(memory, features=OFFERED) for memory in self.memories]
        self.all = (Direct(devices[0]), Mmio(devices[1]), Pci(devices[2]))
        self.offered = [0, 0]
        self.where = [0, 0]
        if up:
            for status in (1, 3):
                self.write_status(status)
            self.write_features(1, (VERSION_1 | features) >> 32)
            self.write_features(0, features & 0xFFFF_FFFF)
            self.write_status(READY)
            for index in (0, 1):
                self.configure(index, 4, GOOD[1 + index])
                self.enable(index)
            self.write_status(READY | Status.DRIVER_OK)

    @rule(value=st.one_of(st.sampled_from([0, 1, 3, 11, 15, 0x8F]), st.integers(0, 255)))
    def write_status(self, value: int) -> None:
        for one in self.all:
            one.write_status(value)

    @rule(
        word=st.integers(0, 3),
        value=st.one_of(
            st.sampled_from([0, 1, 3, 0x101, 0x3000_0000]), st.integers(0, 0xFFFF_FFFF)
        ),
    )
    def write_features(self, word: int, value: int) -> None:
        for one in self.all:
            one.write_features(word, value)

    @rule(
        index=st.integers(0, 2),
        size=st.sampled_from([4, 4, 4, 1, 2, 8, 0, 3, 16]),
        base=st.sampled_from([*GOOD, *BASES]),
    )
    def configure(self, index: int, size: int, base: int) -> None:
        if index < 2 and not self.all[0].enabled(index):
            self.where[index] = base
        for one in self.all:
            one.configure(index, size, base)

    @rule(index=st.integers(0, 2))
    def enable(self, index: int) -> None:
        if index < 2 and self.where[index] in GOOD and not self.all[0].enabled(index):
            self.offered[index] = 0
            for memory in self.memories:
                memory.write(self.where[index], bytes(0x3000))
        for one in self.all:
            one.enable(index)

    @rule(index=st.integers(0, 2))
    def reset_queue(self, index: int) -> None:
        for one in self.all:
            one.reset_queue(index)

    @rule(index=st.integers(0, 3), chains=st.integers(0, 3))
    def kick(self, index: int, chains: int) -> None:
        if index < 2 and self.all[0].enabled(index):
            ring = self.all[0].device.queues[index].ring
            assert ring is not None
            base = self.where[index]
            for memory in self.memories:
                for slot in range(ring.size):
                    memory.write(base + 16 * slot, struct.pack("<QIHH", 0x8000, slot, 2, 0))
                    memory.write(base + 0x1004 + 2 * slot, slot.to_bytes(2, "little"))
                memory.store16(base + 0x1002, self.offered[index] + min(chains, ring.size) & 0xFFFF)
            self.offered[index] += min(chains, ring.size)
        for one in self.all:
            one.kick(index)

    @rule(depth=st.integers(0, 0xFFFF_FFFF))
    def update_config(self, depth: int) -> None:
        for one in self.all:
            one.device.update_config(depth=depth)

    @rule()
    def take_events(self) -> None:
        first, *others = (one.take_events() for one in self.all)
        assert [first, first] == others

    @rule(index=st.integers(0, 3))
    def look(self, index: int) -> None:
        first, *others = (one.look(index) for one in self.all)
        assert [first, first] == others

    @invariant()
    def the_devices_are_the_same(self) -> None:
        if not hasattr(self, "all"):
            return
        states = []
        for one, memory in zip(self.all, self.memories, strict=True):
            device = one.device
            assert isinstance(device, Echo)
            # Over PCI a kick for a queue that is not there has no address either.
            apart = ("register_ignored", "stray_kicks")
            stats = {k: n for k, n in device.stats.items() if not k.startswith(apart)}
            rings = [queue.ring is not None for queue in device.queues]
            contents = [bytes(region.view) for region in memory.regions]
            told = (device.status, device.driver_features, str(device.fault), stats, rings)
            states.append((told, device.happened, contents))
            assert ctypes.sizeof(device.config or ctypes.c_byte) == 6
        assert states[0] == states[1]
        assert states[0] == states[2]

    def teardown(self) -> None:
        for memory in getattr(self, "memories", ()):
            memory.close()


def test_every_kind_of_registers_leads_to_the_same_device() -> None:
    run_state_machine_as_test(
        RegisterMachine,
        settings=settings(
            max_examples=50,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
