"""Both sides of a split virtqueue against each other, in any interleaving of their steps.

Nothing may be lost, doubled or changed on the way, and nobody may sleep while there is work: a
device that asked for kicks and a driver that asked for calls do nothing until they get one.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import random
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import vq.driver
import vq.split_ring
from vq.abi import Feature
from vq.driver import DriverRing, GuestAllocator
from vq.errors import DriverError
from vq.memory import GuestMemory
from vq.ring_row import Row
from vq.ring_run import Run, TableRun
from vq.split_ring import Chain, SplitRing

INDIRECT = 1 << Feature.INDIRECT_DESC
EVENT_IDX = 1 << Feature.EVENT_IDX
IN_ORDER = 1 << Feature.IN_ORDER

REGION = 0x200000
STARTS = [0, 0xFFF0, 0xFFFE, 0xFFFF]
UNTOUCHED = 0xEE


class Sent(NamedTuple):
    """What the driver knows of a chain in flight."""

    head: int
    readable: bytes
    writable: list[tuple[int, int]]
    costs: int
    """How many descriptors of the ring it takes."""
    places: list[int]
    """What is allocated for it."""
    bad: bool


class RingMachine(RuleBasedStateMachine):
    """`DriverRing` and `SplitRing` over the same memory, and a model of what must come out."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 64]),
        start=st.sampled_from(STARTS),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        in_order=st.booleans(),
    )
    def begin(self, size: int, start: int, event_idx: bool, indirect: bool, in_order: bool) -> None:
        self.indirect = indirect
        self.in_order = in_order
        features = event_idx * EVENT_IDX | indirect * INDIRECT | in_order * IN_ORDER
        # Two regions side by side, so that buffers and tables may lie over the seam.
        self.memory = GuestMemory.allocate((0, REGION), (REGION, REGION))
        self.allocator = GuestAllocator(self.memory)
        self.driver = DriverRing.allocate(
            self.memory, self.allocator, size, features=features, start_index=start
        )
        self.device = SplitRing(
            self.memory,
            size,
            self.driver.desc,
            self.driver.avail,
            self.driver.used,
            features=features,
            next_avail=start,
            next_used=start,
        )
        self.tokens = 0
        self.sent: dict[int, Sent] = {}
        self.unpublished: list[int] = []  # tokens
        self.waiting: list[int] = []  # published, not popped
        self.held: list[tuple[int, Chain]] = []  # popped, oldest first
        self.last_popped: list[tuple[int, Chain]] = []  # of these, what may be put back
        self.ready: dict[int, int] = {}  # IN_ORDER: given back, behind one that is not
        self.order: list[int] = []  # IN_ORDER: tokens in the order in which they go back
        self.written: list[tuple[int, int]] = []  # (token, written), not published
        self.used: list[tuple[int, int]] = []  # published, not collected
        self.start = start
        # A device that takes over a ring says from where on it wants kicks.
        self.device_sleeps = not self.device.enable_kicks()
        self.driver_sleeps = False
        self.patience = 0  # so many used chains do not wake the driver yet
        self.kick_due = False  # published and not asked whether to kick
        self.call_due = False

    def teardown(self) -> None:
        if hasattr(self, "device"):
            try:
                self.all_goes_through()
            finally:
                self.held = self.last_popped = []
                del self.device, self.driver
                self.memory.close()

    # --- the driver

    @property
    def free(self) -> int:
        return self.driver.size - sum(sent.costs for sent in self.sent.values())

    @rule(
        count=st.integers(1, 16),
        readable=st.integers(0, 5),
        writable=st.integers(0, 5),
        kind=st.sampled_from(["direct", "direct", "indirect", "mixed"]),
        seed=st.integers(0, 1 << 32),
        bad=st.sampled_from([False] * 7 + [True]),
    )
    def driver_adds(
        self, count: int, readable: int, writable: int, kind: str, seed: int, bad: bool
    ) -> None:
        for number in range(count):
            if not self.add(readable, writable, kind, random.Random(seed + number), bad):
                return

    def add(self, readable: int, writable: int, kind: str, draw: random.Random, bad: bool) -> bool:
        total = readable + writable
        direct = 1 if kind == "mixed" and total > 1 else 0
        tabled = kind != "direct" and self.indirect
        costs = direct + 1 if tabled else total
        if not total or total > self.driver.size or costs > self.free:
            return False
        places, outgoing, incoming, content = [], [], [], b""
        for number in range(total):
            length = draw.choice([1, 2, 15, 60, 200])
            place = self.allocator.allocate(length, draw.choice([1, 16]))
            places.append(place)
            if number < readable:
                data = draw.randbytes(length)
                self.memory.write(place, data)
                outgoing.append((place, length))
                content += data
            else:
                self.memory.write(place, bytes([UNTOUCHED]) * length)
                incoming.append((place, length))
        table = None
        if tabled:
            table = self.allocator.allocate(16 * (total - direct), 1)
            places.append(table)
        token = self.tokens
        self.tokens += 1
        head = self.driver.add(outgoing, incoming, token, indirect=table, direct=direct)
        if bad:  # what the descriptor says is no longer what the driver keeps in its books
            _, length, flags, following = self.driver.peek_descriptor(head)
            self.driver.poke_descriptor(head, 1 << 50, length, flags, following)
        self.sent[token] = Sent(head, content, incoming, costs, places, bad)
        self.unpublished.append(token)
        return True

    @rule(ask=st.booleans())
    def driver_publishes(self, ask: bool) -> None:
        assert self.driver.publish() == len(self.unpublished)
        self.kick_due = self.kick_due or bool(self.unpublished)
        self.waiting += self.unpublished
        self.unpublished = []
        if ask:
            self.driver_asks_whether_to_kick()

    @rule()
    def driver_asks_whether_to_kick(self) -> None:
        kick = self.driver.should_kick()
        assert not kick or self.kick_due, "a kick for nothing"
        self.kick_due = False
        if self.device_sleeps and self.waiting:
            assert kick, "the device sleeps, chains wait, and nobody wakes it"
        if kick:
            self.device_sleeps = False

    @rule(limit=st.one_of(st.none(), st.integers(0, 5)))
    def driver_collects(self, limit: int | None) -> None:
        got = self.driver.collect(limit)
        expected = self.used if limit is None else self.used[:limit]
        assert [(used.token, used.written) for used in got] == expected
        if limit is not None:
            self.driver_sleeps = False
        if got:  # else the driver goes on waiting for as many as it asked for
            self.patience = 0
        for used in got:
            sent = self.sent.pop(used.token)
            assert used.head == sent.head
            content = b"".join(self.memory.read(*buffer) for buffer in sent.writable)
            untouched = bytes([UNTOUCHED]) * (len(content) - used.written)
            assert content == random.Random(used.token).randbytes(used.written) + untouched
            for place in sent.places:
                self.allocator.free(place)
        del self.used[: len(got)]

    @rule(delayed=st.booleans())
    def driver_wants_calls(self, delayed: bool) -> None:
        outstanding = len(self.sent) - len(self.unpublished)
        more = self.driver.enable_calls(delayed=delayed)
        delayed = delayed and self.driver._has_event_idx
        self.patience = outstanding * 3 // 4 if delayed else 0
        assert more == (len(self.used) > self.patience)
        self.driver_sleeps = not more

    @rule()
    def driver_refuses_calls(self) -> None:
        self.driver.disable_calls()
        self.driver_sleeps = False

    # --- the device

    @rule(limit=st.sampled_from([0, 1, 1, 2, 3, 64]))
    def device_pops(self, limit: int) -> None:
        self.device_sleeps = False
        undone = len(self.device._undone)
        assert self.device.available() == len(self.waiting)
        try:
            chains = self.device.pop_burst(limit)
        except DriverError as error:
            token = self.waiting.pop(0)
            assert self.sent[token].bad and error.head == self.sent[token].head
            self.last_popped = []
            self.order.append(token)
            self.give_back(token, 0)
            return
        few = min(limit, undone or len(self.waiting))
        good = next((n for n, token in enumerate(self.waiting[:few]) if self.sent[token].bad), few)
        assert len(chains) == good
        for chain in chains:
            token = self.waiting.pop(0)
            sent = self.sent[token]
            assert chain.head == sent.head and not sent.bad
            assert b"".join(map(bytes, chain.readable)) == sent.readable
            assert chain.writable_size == sum(length for _, length in sent.writable)
            assert chain.written == 0
            self.held.append((token, chain))
            self.last_popped.append((token, chain))
            self.order.append(token)

    @rule(
        limit=st.sampled_from([1, 2, 3, 64]),
        writable=st.booleans(),
        use=st.integers(0, 4),
        back=st.booleans(),
        seed=st.integers(0, 1 << 32),
    )
    def device_pops_a_run(
        self, limit: int, writable: bool, use: int, back: bool, seed: int
    ) -> None:
        """Chains of one buffer each, as columns: some are given back as such, others as chains."""
        self.device_sleeps = False
        slot = (self.device._next_avail) & (self.device.size - 1)
        free = not self.device._undone and not self.device._order
        run = Run(self.device, writable=writable)
        count = run.pop(limit)
        expected = self.waiting[: min(limit, self.device.size - slot)]
        if not free or not all(self.is_usual(token, writable) for token in expected):
            assert not count
        assert count in (0, len(expected)) and count == len(run)
        draw = random.Random(seed)
        written = []
        for index in range(count):
            token = self.waiting.pop(0)
            sent = self.sent[token]
            assert run.heads[index] == sent.head
            data, room = b"", sum(length for _, length in sent.writable)
            if writable:
                assert run.lengths[index] == room >= run.shortest
                data = random.Random(token).randbytes(draw.choice([0, room, room // 2]))
                if index < use:
                    ctypes.memmove(run.addresses[index], data, len(data))
            else:
                assert ctypes.string_at(run.addresses[index], run.lengths[index]) == sent.readable
            self.order.append(token)
            if index < use:
                written.append(len(data))
                self.give_back(token, len(data))
            else:
                self.held.append((token, Chain(-1, (), ())))
        run.give_back(written)
        chains = run.to_chains()
        if chains and back:
            assert run.adopt(chains)
            chains = run.to_chains()
        tokens = [token for token, chain in self.held if chain.head == -1]
        self.held = [(token, chain) for token, chain in self.held if chain.head != -1]
        popped = list(zip(tokens, chains, strict=True))
        self.held += popped
        self.last_popped = (self.last_popped if not written else []) + popped
        assert not run

    @rule(limit=st.sampled_from([1, 2, 3, 64]), use=st.integers(0, 4))
    def device_pops_tables(self, limit: int, use: int) -> None:
        """Chains of readable buffers in tables of their own, likewise."""
        self.device_sleeps = False
        slot = self.device._next_avail & (self.device.size - 1)
        free = not self.device._undone and not self.device._order
        run = TableRun(self.device)
        count = run.pop(limit)
        expected = self.waiting[: min(limit, self.device.size - slot)] if free else []
        usual = itertools.takewhile(self.is_in_one_table, expected)
        assert count in (0, len(list(usual))) and count == len(run) == len(run.counts)
        at = 0
        popped = []
        for index in range(count):
            token = self.waiting.pop(0)
            sent = self.sent[token]
            assert run.heads[index] == sent.head
            vectors = run.vectors[at : at + 2 * run.counts[index]]
            places = zip(vectors[::2], vectors[1::2], strict=True)
            assert b"".join(ctypes.string_at(*place) for place in places) == sent.readable
            assert run.sizes[index] == len(sent.readable)
            at += len(vectors)
            self.order.append(token)
            if index < use:
                self.give_back(token, 0)
            else:
                popped.append(token)
        assert at == len(run.vectors)
        run.give_back(min(use, count))
        chains = run.to_chains()
        assert not run and not run.vectors and not run.sizes and not run.counts
        pairs = list(zip(popped, chains, strict=True))
        for token, chain in pairs:
            assert b"".join(map(bytes, chain.readable)) == self.sent[token].readable
        self.held += pairs
        self.last_popped = (self.last_popped if not min(use, count) else []) + pairs

    @rule(limit=st.sampled_from([1, 2, 3, 64]), use=st.integers(0, 4))
    def device_looks_at_a_row(self, limit: int, use: int) -> None:
        """Chains of one length each, of which some are taken and given back at once."""
        self.device_sleeps = False
        slot = self.device._next_avail & (self.device.size - 1)
        free = not self.device._undone and not self.device._order
        row = Row(self.device)
        waiting = self.device.waiting()
        count = row.look(waiting, limit)
        expected = self.waiting[: min(limit, self.device.size - slot)]
        usual = free and all(self.is_usual(token, writable=False) for token in expected)
        alike = len({len(self.sent[token].readable) for token in expected}) == 1
        assert count in ((0, len(expected)) if usual and alike else (0,))
        use = min(use, count)
        pieces = struct.iter_unpack("@PN", row.vectors[: 16 * use])
        for token, place in zip(self.waiting[:use], pieces, strict=True):
            assert ctypes.string_at(*place) == self.sent[token].readable
            self.order.append(token)
            self.give_back(token, 0)
        del self.waiting[:use]
        if use:
            row.give_back(use)
            self.last_popped = []

    def is_in_one_table(self, token: int) -> bool:
        sent = self.sent[token]
        return not sent.bad and not sent.writable and sent.costs == 1

    def is_usual(self, token: int, writable: bool) -> bool:
        sent = self.sent[token]
        kind = len(sent.writable) == 1 and not sent.readable
        return not sent.bad and (kind if writable else not sent.writable)

    @precondition(lambda self: self.last_popped)
    @rule(count=st.integers(1, 64))
    def device_puts_back(self, count: int) -> None:
        self.device_sleeps = False
        chosen = self.last_popped[-count:]
        del self.last_popped[-count:]
        del self.held[-len(chosen) :]
        del self.order[-len(chosen) :]
        self.device.undo_pop([chain for _, chain in chosen])
        self.waiting[:0] = [token for token, _ in chosen]

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, 64), seed=st.integers(0, 1 << 32))
    def device_gives_back(self, count: int, seed: int) -> None:
        draw = random.Random(seed)
        chosen = draw.sample(self.held, min(count, len(self.held)))
        for token, chain in chosen:
            self.fill(token, chain, draw)
            self.held.remove((token, chain))
        self.last_popped = self.last_popped[
            1 + max((n for n, c in enumerate(self.last_popped) if c in chosen), default=-1) :
        ]
        self.device.write_used_burst([chain for _, chain in chosen])
        for token, chain in chosen:
            self.give_back(token, chain.written)

    def fill(self, token: int, chain: Chain, draw: random.Random) -> None:
        room = chain.writable_size
        chain.written = draw.choice([0, room, draw.randint(0, room)])
        data = random.Random(token).randbytes(chain.written)
        for view in chain.writable:
            part, data = data[: len(view)], data[len(view) :]
            view[: len(part)] = part

    def give_back(self, token: int, written: int) -> None:
        if not self.in_order:
            self.order.remove(token)
            self.written.append((token, written))
            return
        self.ready[token] = written
        while self.order and self.order[0] in self.ready:
            token = self.order.pop(0)
            self.written.append((token, self.ready.pop(token)))

    @rule(ask=st.booleans())
    def device_publishes(self, ask: bool) -> None:
        assert self.device.publish() == len(self.written)
        self.call_due = self.call_due or bool(self.written)
        self.used += self.written
        self.written = []
        if ask:
            self.device_asks_whether_to_call()

    @rule()
    def device_asks_whether_to_call(self) -> None:
        call = self.device.should_notify()
        assert not call or self.call_due, "a call for nothing"
        self.call_due = False
        if self.driver_sleeps and len(self.used) > self.patience:
            assert call, "the driver sleeps, used buffers wait, and nobody wakes it"
        if call:
            self.driver_sleeps = False

    @rule()
    def device_wants_kicks(self) -> None:
        more = self.device.enable_kicks()
        assert more == bool(self.waiting)
        self.device_sleeps = not more

    @rule()
    def device_refuses_kicks(self) -> None:
        self.device.disable_kicks()
        self.device_sleeps = False

    # --- both

    @precondition(lambda self: self.tokens > 4)
    @rule()
    def all_goes_through(self) -> None:
        """Each works only while it is awake: in the end nothing is left."""
        self.driver_publishes(True)
        if self.held:  # what the device holds it may finish at any time
            self.device_gives_back(64, self.tokens)
        self.device_publishes(True)
        while not (self.device_sleeps and self.driver_sleeps):
            if not self.device_sleeps:
                self.device_refuses_kicks()
                while self.waiting:
                    self.device_pops(64)
                    if self.held:
                        self.device_gives_back(64, self.tokens)
                    self.device_publishes(True)
                self.device_wants_kicks()
            if not self.driver_sleeps:
                self.driver_refuses_calls()
                self.driver_collects(None)
                self.driver_wants_calls(False)
        assert not self.sent and not self.waiting and not self.used
        assert self.driver.in_flight == self.device.outstanding == 0
        assert self.driver.num_free == self.driver.size

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "device"):
            assert self.device.outstanding == len(self.held) + len(self.ready)
            assert self.device.available() == len(self.waiting)
            popped = self.tokens - len(self.unpublished) - len(self.waiting)
            assert self.device.next_avail == (self.start + popped) & 0xFFFF
            assert self.driver.in_flight == len(self.sent)

    @invariant()
    def nobody_sleeps_over_work(self) -> None:
        if hasattr(self, "device"):
            assert not self.device_sleeps or not self.waiting or self.kick_due
            assert not self.driver_sleeps or len(self.used) <= self.patience or self.call_due


def test_a_driver_that_looks_and_finds_nothing_waits_for_as_many_as_before() -> None:
    """This model had it wrong: it expected a call for the first of two, once in many runs."""
    state = RingMachine()
    state.begin(size=8, start=0, event_idx=True, indirect=False, in_order=False)
    state.driver_adds(bad=True, count=2, kind="direct", readable=0, seed=0, writable=1)
    state.driver_publishes(ask=False)
    state.driver_wants_calls(delayed=True)
    state.driver_collects(limit=None)
    for _ in range(2):
        state.device_pops(1)
        state.device_publishes(ask=True)
        state.nobody_sleeps_over_work()
    assert not state.driver_sleeps
    state.teardown()


def test_any_interleaving_of_both_sides() -> None:
    run_state_machine_as_test(
        RingMachine,
        settings=settings(
            max_examples=120,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- all interleavings of a small ring -----------------------------------------------------------


class Model(NamedTuple):
    """What must be true of a world, whatever the rings do: chains by number, in order."""

    offered: int = 0  # published so far
    popped: int = 0
    held: tuple[int, ...] = ()
    given: tuple[int, ...] = ()  # in the used ring, not published
    used: tuple[int, ...] = ()  # published, not collected
    collected: int = 0
    kick_due: bool = False
    call_due: bool = False
    device_sleeps: bool = False
    driver_sleeps: bool = False


class World:
    """A ring's two sides, their memory, and the model; to be copied and gone on with."""

    def __init__(
        self, memory: GuestMemory, size: int, features: int, start: int, chains: int
    ) -> None:
        self.chains = chains
        self.view = memory.view(0, 0x400)
        self.driver = DriverRing(
            memory, size, 0, 0x100, 0x200, features=features, start_index=start
        )
        self.device = SplitRing(
            memory, size, 0, 0x100, 0x200, features=features, next_avail=start, next_used=start
        )
        self.model = Model(device_sleeps=not self.device.enable_kicks())

    def clone(self) -> World:
        """A world that goes on from here; its bytes are kept until `resume` brings them back."""
        new = copy.copy(self)
        new.driver, new.device = shallow(self.driver), shallow(self.device)
        new.content = bytes(self.view)
        return new

    content = b""

    def resume(self) -> World:
        self.view[:] = self.content
        return self.clone()

    def key(self) -> tuple[object, ...]:
        books = {**vars(self.driver), **{f"device{k}": v for k, v in vars(self.device).items()}}
        kept = (int, bool, list, dict, set, deque, array)
        state = sorted((k, repr(v)) for k, v in books.items() if isinstance(v, kept))
        return (self.model, bytes(self.view), *state)

    def update(self, **fields: Any) -> None:
        self.model = self.model._replace(**fields)

    # What the driver can do.

    def offer(self) -> None:
        number = self.model.offered
        self.driver.add([(0x300 + number, 1)], token=number)
        assert self.driver.publish() == 1
        self.update(offered=number + 1, kick_due=True)

    def ask_to_kick(self) -> None:
        kick = self.driver.should_kick()
        if self.model.device_sleeps and self.model.offered > self.model.popped:
            assert kick, "a kick is lost"
        self.update(kick_due=False, device_sleeps=self.model.device_sleeps and not kick)

    def offer_and_kick(self) -> None:
        self.offer()
        self.ask_to_kick()

    def collect(self) -> None:
        got = tuple(used.token for used in self.driver.collect())
        assert got == self.model.used
        self.update(used=(), collected=self.model.collected + len(got))

    def refuse_calls(self) -> None:
        self.driver.disable_calls()
        self.update(driver_sleeps=False)

    def want_calls(self) -> None:
        # What is published while the driver asks, it may or may not see.
        before = self.model.used
        more = self.driver.enable_calls()
        assert more == bool(self.model.used), (before, self.model.used)
        self.update(driver_sleeps=not more)

    # What the device can do.

    def pop(self) -> None:
        chain = self.device.pop()
        if self.model.offered == self.model.popped:
            assert chain is None
            return
        number = self.model.popped
        assert chain is not None and len(chain.readable) == 1
        self.update(popped=number + 1, held=(*self.model.held, number), device_sleeps=False)

    def put_back(self) -> None:
        number = self.model.held[-1]
        self.device.undo_pop([self.chain(number)])
        self.update(popped=number, held=self.model.held[:-1], device_sleeps=False)

    def give_oldest(self) -> None:
        self.give(self.model.held[0])

    def give_newest(self) -> None:
        self.give(self.model.held[-1])

    def give(self, number: int) -> None:
        self.device.write_used(self.chain(number))
        held = tuple(n for n in self.model.held if n != number)
        self.update(held=held, given=(*self.model.given, number))

    def chain(self, number: int) -> Chain:
        token = {chain.token: head for head, chain in self.driver._in_flight.items()}
        chain = self.device._outstanding[token[number]]
        assert chain is not None
        return chain

    def show(self) -> None:
        assert self.device.publish() == len(self.model.given)
        due = self.model.call_due or bool(self.model.given)
        self.update(given=(), used=self.model.used + self.model.given, call_due=due)

    def ask_to_call(self) -> None:
        sleeps = self.model.driver_sleeps
        call = self.device.should_notify()
        if sleeps and self.model.used:
            assert call, "a call is lost"
        # Who fell asleep while the device looked is woken by the same call.
        self.update(call_due=False, driver_sleeps=self.model.driver_sleeps and not call)

    def show_and_call(self) -> None:
        self.show()
        self.ask_to_call()

    def refuse_kicks(self) -> None:
        self.device.disable_kicks()
        self.update(device_sleeps=False)

    def want_kicks(self) -> None:
        more = self.device.enable_kicks()
        assert more == (self.model.offered > self.model.popped)
        self.update(device_sleeps=not more)

    def steps(self) -> Iterator[tuple[Callable[[World], None], Callable[[World], None] | None]]:
        """Every step that may come next, and what the other side does in the middle of it."""
        model = self.model
        can_offer = model.offered < self.chains and bool(self.driver.num_free)
        can_show = bool(model.given)
        yield World.collect, None
        yield World.refuse_calls, None
        yield World.want_calls, None
        yield World.want_kicks, None
        yield World.refuse_kicks, None
        if can_offer:
            yield World.offer, None
            yield World.want_kicks, World.offer_and_kick
        if model.kick_due:
            yield World.ask_to_kick, None
            yield World.ask_to_kick, World.want_kicks
        if not model.device_sleeps:
            yield World.pop, None
        if model.held:
            yield World.give_oldest, None
            yield World.give_newest, None
            if model.held[-1] == model.popped - 1:
                yield World.put_back, None
        if can_show:
            yield World.show, None
            yield World.want_calls, World.show_and_call
        if model.call_due:
            yield World.ask_to_call, None
            yield World.ask_to_call, World.want_calls
            yield World.ask_to_call, World.collect

    def check(self) -> None:
        model = self.model
        waiting = model.offered - model.popped
        assert self.device.available() == waiting
        assert self.device.outstanding == len(model.held)
        assert not model.device_sleeps or not waiting or model.kick_due, "both would sleep"
        assert not model.driver_sleeps or not model.used or model.call_due, "both would sleep"


def shallow(ring: Any) -> Any:
    """A copy of a ring with books of its own, over the same memory."""
    new = copy.copy(ring)
    for name, value in vars(new).items():
        if isinstance(value, list | dict | set | deque | array):
            setattr(new, name, copy.copy(value))
    return new


@pytest.mark.parametrize("features", [0, EVENT_IDX])
@pytest.mark.parametrize(("size", "start", "chains"), [(1, 0xFFFF, 2), (2, 0xFFFF, 2)])
def test_every_interleaving_of_a_small_ring(
    size: int, start: int, chains: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breadth first through all the steps that a few chains can take.

    The other side may also act at a fence: these stand where a store must be seen before a load
    is made, and what happens just there could happen at any time between the two.
    """
    meanwhile: list[Callable[[], None]] = []

    def fence() -> None:
        if meanwhile:
            meanwhile.pop()()

    monkeypatch.setattr(vq.split_ring, "fence", fence)
    monkeypatch.setattr(vq.driver, "fence", fence)
    with GuestMemory.allocate(0x1000) as memory:
        first = World(memory, size, features, start, chains).clone()
        seen = {first.key()}
        border = deque([first])
        ends = 0
        while border:
            world = border.popleft()
            for step, other in world.steps():
                new = world.resume()
                meanwhile[:] = [] if other is None else [lambda n=new, o=other: o(n)]  # type: ignore[misc]
                step(new)
                new.check()
                key = new.key()
                if key not in seen:
                    seen.add(key)
                    border.append(new.clone())
                    ends += new.model.collected == chains
            assert len(seen) < 50_000
    assert ends and len(seen) > 300
