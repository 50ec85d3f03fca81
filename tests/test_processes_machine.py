"""Whatever is done, and whoever serves a pair: its frames pass in order, and none is lost.

A frame passes twice where a process that was killed had sent it already, and is lost on its way to
the guest where one that was killed had taken it from the link.
"""

from __future__ import annotations

from contextlib import ExitStack

from apart_world import World, frame_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from test_processes import (
    another_address,
    another_call,
    another_kick,
    memory_again,
)

from vq.abi import CtrlRx, Feature
from vq.net_driver import NET_DRIVER_FEATURES, PLAIN_HEADER
from vq.vhost_message import ProtocolFeature

PAIRS = 2
pairs = st.integers(0, PAIRS - 1)
counts = st.integers(1, 40)


class Books:
    """What was given to one pair in one direction, and what came out."""

    def __init__(self) -> None:
        self.given = self.next = 0
        self.doubled = 0
        """Up to here frames may come again."""
        self.lost = 0
        """Up to here they may be missing."""

    def came(self, number: int) -> None:
        if number < self.next:
            assert number < self.doubled, f"{number} came again, {self.next} was next"
            self.next = number  # and all behind it come again, too
        assert number == self.next or number <= self.lost, f"{number} came, {self.next} was next"
        assert number < self.given
        self.next = number + 1


class Processes(RuleBasedStateMachine):
    @initialize(
        queue_size=st.sampled_from((16, 64, 256)),
        without=st.sampled_from((0, 1 << Feature.EVENT_IDX, 1 << Feature.IN_ORDER)),
        notes=st.booleans(),
    )
    def begin(self, queue_size: int, without: int, notes: bool) -> None:
        self.stack = ExitStack()
        self.world = World(
            self.stack,
            pairs=PAIRS,
            queue_size=queue_size,
            features=NET_DRIVER_FEATURES & ~without,
            protocol=-1 if notes else ~(1 << ProtocolFeature.INFLIGHT_SHMFD),
        )
        self.out = [Books() for _ in range(PAIRS)]
        self.back = [Books() for _ in range(PAIRS)]

    @rule(pair=pairs, count=counts)
    def send(self, pair: int, count: int) -> None:
        books = self.out[pair]
        burst = [(PLAIN_HEADER, frame_of(books.given + number)) for number in range(count)]
        books.given += self.world.driver.send_burst(burst, pair=pair)
        self.take()

    @rule(pair=pairs, count=counts)
    def feed(self, pair: int, count: int) -> None:
        books = self.back[pair]
        for _ in range(count):
            self.world.feed(
                frame_of(books.given, to=bytes((0xFF,)) * 5 + bytes((pair,))), pair=pair
            )
            books.given += 1
        self.take()

    @rule()
    def lend(self) -> None:
        self.world.lend_now()

    @rule(turns=st.integers(1, 10))
    def turn(self, turns: int) -> None:
        self.world.turn(turns)

    @rule(seconds=st.sampled_from((0.001, 0.01)))
    def wait(self, seconds: float) -> None:
        self.world.quiet(seconds)
        self.take()

    @rule()
    def kill(self) -> None:
        self.take()
        if not self.world.pids:
            return
        self.world.kill(self.world.pids[0])
        self.out[1].doubled = self.out[1].given
        self.back[1].lost = self.back[1].given
        self.world.lend_now()

    @rule(on=st.booleans())
    def command(self, on: bool) -> None:
        assert self.world.driver.set_receive_mode(CtrlRx.ALLMULTI, on)

    @rule(count=st.integers(1, PAIRS))
    def use_pairs(self, count: int) -> None:
        self.drain()  # what waits in a ring of a pair that is not in use is nobody's
        assert self.world.driver.set_queue_pairs(count)
        assert self.world.driver.set_queue_pairs(PAIRS)

    @rule(change=st.sampled_from((another_call, another_kick, another_address, memory_again)))
    def change(self, change: object) -> None:
        assert callable(change)
        if change is another_address:
            self.drain()  # it looks where the ring stands
        change(self.world)

    @rule()
    def drain(self) -> None:
        self.world.wait(self.all_came)

    def all_came(self) -> bool:
        self.take()
        driver = self.world.driver
        assert not driver.needs_reset, self.world.device.fault
        return all(
            driver.reap(pair) >= 0
            and not driver.unsent(pair)
            and self.out[pair].next == self.out[pair].given
            and (self.back[pair].next == self.back[pair].given or self.back[pair].lost)
            for pair in range(PAIRS)
        )

    def take(self) -> None:
        self.world.frontend.poll()
        for pair, books in enumerate(self.out):
            for number in self.world.sent(pair):
                books.came(number)
        for frame in self.world.driver.receive():
            self.back[frame.data[5]].came(int.from_bytes(frame.data[14:18]))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        with self.stack:
            self.drain()
            # Lost are those of before a kill alone.
            for pair in range(PAIRS):
                self.feed(pair, 1)
            self.world.wait(lambda: self.take() or all(b.next == b.given for b in self.back))
            assert not self.world.device.stats["driver_errors"]


TestProcesses = Processes.TestCase
TestProcesses.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
