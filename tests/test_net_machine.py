"""Guests that do anything in any order: every frame arrives, or the statistics say why not."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from net_frames import UDP, make_frame, make_payload, slow_sum
from net_world import BROADCAST, OTHER_MAC, OUR_MAC, PLAIN, World, features, udp_header

from vq.abi import CtrlRx, Feature, NetFeature
from vq.link import LoopbackLink, QueuePort, link_pair
from vq.memory import GuestMemory
from vq.net_driver import Layout, NetDriver, NetHeader
from vq.testing.transports import TRANSPORTS

OPTIONAL = (
    *("MRG_RXBUF", "EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "RING_RESET", "CSUM", "GUEST_CSUM"),
    *("HOST_TSO4", "GUEST_TSO4", "CTRL_RX"),
)
LAYOUTS = (
    Layout(),
    Layout(12),
    Layout(1, 11, 13, pieces=2),
    Layout(5, 20, gap=3),
)
wanted_sets = st.lists(st.sampled_from(OPTIONAL), unique=True).map(
    lambda names: features("CTRL_VQ", *names)
)
shapes = st.fixed_dictionaries(
    {
        "queue_size": st.sampled_from((8, 16, 64)),
        "receive_buffers": st.sampled_from((2, 3, 8, None)),
        "receive_buffer_size": st.sampled_from((60, 500, 1526, 2048)),
        "receive_layout": st.sampled_from(LAYOUTS),
        "transmit_layout": st.sampled_from(LAYOUTS),
        "polling": st.booleans(),
    }
)


def numbered(number: int, size: int, to: bytes) -> bytes:
    """A UDP frame with a partial checksum that says which one it is."""
    payload = number.to_bytes(4, "big") + make_payload(size)
    return to + make_frame(payload, protocol=UDP)[6:]


def finished(frame: bytes) -> bytes:
    """The frame with its checksum done, slowly."""
    value = 0xFFFF - slow_sum(frame[34:])
    return frame[:40] + (value or 0xFFFF).to_bytes(2, "big") + frame[42:]


class Side:
    """A guest, its device and port, and the books on what it sent and got."""

    def __init__(self, world: World, port: QueuePort) -> None:
        self.world = world
        self.port = port
        self.sent: list[bytes] = []  # with the checksum undone
        self.unseen = 0  # sent, but the device was reset before it looked
        self.got = 0
        self.unread = 0  # put into buffers that a reset took away before the guest looked
        self.last = -1
        self.driver: NetDriver

    def bring_up(self, wanted: int, shape: dict[str, object]) -> None:
        self.driver = self.world.drive(wanted, largest_frame=3100, **shape)

    def total(self, prefix: str) -> int:
        return sum(n for name, n in self.world.device.stats.items() if name.startswith(prefix))

    def about_to_lose(self, transmit: bool, receive: bool) -> int:
        """Books what the guest loses with its queues; returns what it had on its way out."""
        self.driver.reap()
        if receive:
            self.unread = self.total("rx_frames") - self.got
        return self.driver.unsent() if transmit else 0

    def lost(self, outgoing: int, counted_before: int) -> None:
        """Of what was on its way out the device counts what it had seen."""
        counted = self.total("tx_dropped: queue stopped") - counted_before
        assert counted <= outgoing
        self.unseen += outgoing - counted


class Guests(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memories: list[GuestMemory] = []
        self.sides: list[Side] = []

    @initialize(
        pair=st.booleans(),
        over=st.sampled_from(TRANSPORTS),
        limit=st.sampled_from((1, 5, 1024)),
        wanted=st.tuples(wanted_sets, wanted_sets),
        shape=st.tuples(shapes, shapes),
    )
    def plug_in(
        self,
        pair: bool,
        over: str,
        limit: int,
        wanted: tuple[int, int],
        shape: tuple[dict[str, object], dict[str, object]],
    ) -> None:
        links = link_pair(limit=limit) if pair else (LoopbackLink(limit=limit),)
        for link in links:
            self.memories.append(GuestMemory.allocate((0x1000, 2 << 20), (0x10000000, 2 << 20)))
            port = link.ports[0]
            assert isinstance(port, QueuePort)
            world = World(self.memories[-1], link)
            world.over = over
            self.sides.append(Side(world, port))
        for number, side in enumerate(self.sides):
            side.bring_up(wanted[number], shape[number])

    def far(self, side: Side) -> Side:
        return self.sides[-1] if side is self.sides[0] else self.sides[0]

    @rule(
        which=st.integers(0, 1),
        frames=st.lists(
            st.tuples(
                st.integers(0, 100) | st.integers(1400, 3000),
                st.sampled_from((OUR_MAC, OUR_MAC, OTHER_MAC, BROADCAST)),
            ),
            min_size=1,
            max_size=12,
        ),
        undone=st.booleans(),
    )
    def send(self, which: int, frames: list[tuple[int, bytes]], undone: bool) -> None:
        side = self.sides[which % len(self.sides)]
        undone = undone and side.driver.has_feature(NetFeature.CSUM)
        first = len(side.sent)
        data = [numbered(first + n, size, to) for n, (size, to) in enumerate(frames)]
        header = udp_header() if undone else PLAIN
        burst = [(header, frame if undone else finished(frame)) for frame in data]
        side.sent += data[: side.driver.send_burst(burst)]

    @rule(which=st.integers(0, 1), limit=st.none() | st.integers(1, 3))
    def receive(self, which: int, limit: int | None) -> None:
        self.take(self.sides[which % len(self.sides)], limit)

    def take(self, side: Side, limit: int | None = None) -> int:
        sent = self.far(side).sent
        frames = side.driver.receive(limit)
        for frame in frames:
            number = int.from_bytes(frame.data[42:46], "big")
            assert side.last < number < len(sent), "twice, out of order or never sent"
            side.last = number
            side.got += 1
            if frame.header.flags:
                assert side.driver.has_feature(NetFeature.GUEST_CSUM)
                assert frame.header == udp_header()._replace(num_buffers=frame.buffers)
                assert frame.data == sent[number]
            else:
                assert frame.header == NetHeader(num_buffers=frame.buffers)
                assert frame.data == finished(sent[number])
        return len(frames)

    @rule(which=st.integers(0, 1), wanted=wanted_sets, shape=shapes)
    def renegotiate(self, which: int, wanted: int, shape: dict[str, object]) -> None:
        side = self.sides[which % len(self.sides)]
        outgoing = side.about_to_lose(True, True)
        before = side.total("tx_dropped: queue stopped")
        side.driver.close()
        side.lost(outgoing, before)
        side.bring_up(wanted, shape)

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        side = self.sides[which % len(self.sides)]
        outgoing = side.about_to_lose(True, True)
        before = side.total("tx_dropped: queue stopped")
        side.driver.driver.reset()
        side.lost(outgoing, before)
        side.driver.restart()

    @rule(which=st.integers(0, 1), index=st.integers(0, 2))
    def reset_queue(self, which: int, index: int) -> None:
        side = self.sides[which % len(self.sides)]
        if not side.driver.has_feature(Feature.RING_RESET):
            return
        outgoing = side.about_to_lose(index == 1, False)
        before = side.total("tx_dropped: queue stopped")
        if index == 0:
            while self.take(side):  # what the queue holds is gone after it
                pass
            side.unread = side.total("rx_frames") - side.got
        side.driver.reset_queue(index)
        side.lost(outgoing, before)

    @rule(which=st.integers(0, 1), mode=st.sampled_from(list(CtrlRx)), on=st.booleans())
    def change_filter(self, which: int, mode: CtrlRx, on: bool) -> None:
        side = self.sides[which % len(self.sides)]
        agreed = side.driver.set_receive_mode(mode, on)
        assert agreed == (mode in (0, 1) and side.driver.has_feature(NetFeature.CTRL_RX))

    @rule(which=st.integers(0, 1))
    def spurious_kick(self, which: int) -> None:
        side = self.sides[which % len(self.sides)]
        for index in range(3):
            side.world.device.notify(index)

    @precondition(lambda self: self.sides)
    @invariant()
    def every_frame_is_accounted_for(self) -> None:
        for side in self.sides:
            far = self.far(side)
            device = side.world.device
            assert device.fault is None, device.fault
            side.driver.reap()
            dealt_with = side.total("tx_frames") + side.total("tx_dropped")
            assert len(side.sent) == dealt_with + side.driver.unsent() + side.unseen
            window = far.world.device._windows[0]
            waiting = len(far.port._waiting) + len(window._pending)
            assert side.total("tx_frames") == (
                far.total("rx_frames") + far.total("rx_dropped") + waiting
            )

    def teardown(self) -> None:
        for _ in range(1000):
            if not sum(map(self.take, self.sides)):
                break
        for side in self.sides:
            side.driver.reap()
            assert side.driver.unsent() == 0, "a frame hangs"
            assert not side.port._waiting
            assert side.total("rx_frames") == side.got + side.unread
        self.every_frame_is_accounted_for()
        for side in self.sides:
            side.driver.close()
        for memory in self.memories:
            memory.close()


TestGuests = Guests.TestCase
TestGuests.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
