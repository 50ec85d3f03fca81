"""The scripted guest of a network device: what a kernel's virtio-net driver does, on request.

`NetDriver` probes a device over any `Transport`, keeps its receive queues filled, sends frames in
whatever layout it is told to, joins mergeable buffers, and gives commands over the control queue.
It checks what the device does with buffers and with `virtio_net_hdr` (virtio 1.3, 5.1.6.4.1), and
raises `DeviceError` where the device breaks a rule. It parses no packets: what a frame contains,
and what its header says, is the caller's.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from vq.abi import (
    CTRL_OK,
    NET_HDR,
    NET_HDR_GSO_ECN,
    NET_HDR_SIZE,
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlRx,
    CtrlVlan,
    DeviceId,
    HdrFlag,
    HdrGso,
    NetFeature,
    NetStatus,
    feature_mask,
)
from vq.driver import (
    DRIVER_FEATURES,
    DeviceError,
    Driver,
    DriverRing,
    GuestAllocator,
    GuestBuffer,
    Transport,
    Used,
)
from vq.errors import UsageError
from vq.memory import GuestMemory

__all__ = [
    "HEADER_APART",
    "NET_DRIVER_FEATURES",
    "ONE_PIECE",
    "PLAIN_HEADER",
    "Layout",
    "NetDriver",
    "NetHeader",
    "NetSettings",
    "OutFrame",
    "ReceivedFrame",
]

NET_DRIVER_FEATURES = DRIVER_FEATURES | feature_mask(
    set(NetFeature)
    - {
        NetFeature.HASH_REPORT,
        NetFeature.RSS,
        NetFeature.RSC_EXT,
        NetFeature.STANDBY,
    }
)
"""What `NetDriver` accepts when it is not told to want less."""

_NEEDS: dict[int, tuple[int, ...]] = {
    # virtio 1.3, 5.1.3.1: without one of these the feature is not accepted.
    NetFeature.GUEST_TSO4: (NetFeature.GUEST_CSUM,),
    NetFeature.GUEST_TSO6: (NetFeature.GUEST_CSUM,),
    NetFeature.GUEST_UFO: (NetFeature.GUEST_CSUM,),
    NetFeature.GUEST_USO4: (NetFeature.GUEST_CSUM,),
    NetFeature.GUEST_USO6: (NetFeature.GUEST_CSUM,),
    NetFeature.GUEST_ECN: (NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6),
    NetFeature.HOST_TSO4: (NetFeature.CSUM,),
    NetFeature.HOST_TSO6: (NetFeature.CSUM,),
    NetFeature.HOST_UFO: (NetFeature.CSUM,),
    NetFeature.HOST_USO: (NetFeature.CSUM,),
    NetFeature.HOST_ECN: (NetFeature.HOST_TSO4, NetFeature.HOST_TSO6),
    NetFeature.CTRL_RX: (NetFeature.CTRL_VQ,),
    NetFeature.CTRL_VLAN: (NetFeature.CTRL_VQ,),
    NetFeature.CTRL_RX_EXTRA: (NetFeature.CTRL_VQ,),
    NetFeature.CTRL_MAC_ADDR: (NetFeature.CTRL_VQ,),
    NetFeature.CTRL_GUEST_OFFLOADS: (NetFeature.CTRL_VQ,),
    NetFeature.GUEST_ANNOUNCE: (NetFeature.CTRL_VQ,),
    NetFeature.MQ: (NetFeature.CTRL_VQ,),
}

_GUEST_GSO: dict[int, int] = {
    HdrGso.TCPV4: feature_mask((NetFeature.GUEST_TSO4,)),
    HdrGso.TCPV6: feature_mask((NetFeature.GUEST_TSO6,)),
    HdrGso.UDP: feature_mask((NetFeature.GUEST_UFO,)),
    HdrGso.UDP_L4: feature_mask((NetFeature.GUEST_USO4, NetFeature.GUEST_USO6)),
}
_ANY_GUEST_GSO = _GUEST_GSO[HdrGso.TCPV4] | _GUEST_GSO[HdrGso.TCPV6]
_ANY_GUEST_GSO |= _GUEST_GSO[HdrGso.UDP] | _GUEST_GSO[HdrGso.UDP_L4]

_NEEDS_CSUM = int(HdrFlag.NEEDS_CSUM)  # a plain int: this is asked for every frame
_ETHERNET_HEADER = 14
_PLAIN_FRAME = 1514  # virtio 1.3, 5.1.6.3
_LARGEST_FRAME = 65589  # virtio 1.3, 5.1.6.3: with any of the GUEST_TSO, UFO or USO features

_CONTROL_QUEUE_SIZE = 64  # a command takes two descriptors or more, whatever the other queues have
_RECEIVE_BYTES = 4 << 20  # what the buffers of one receive queue take at most, if two fit
_BUFFER_SIZES = (2048, 16384, 69632)
_REMEMBERED = 4096
_CACHE_LINE = 64


class NetHeader(NamedTuple):
    """The fields of `virtio_net_hdr` (virtio 1.3, 5.1.6)."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        """The 12 bytes as they stand in front of a frame."""
        return NET_HDR.pack(*self)


PLAIN_HEADER = NetHeader()
"""Nothing left undone: what stands in front of a whole frame that is sent."""

OutFrame: TypeAlias = tuple[NetHeader | bytes, bytes | bytearray | memoryview]
"""``(header, frame)``; a header given as bytes is sent as it is."""


class ReceivedFrame(NamedTuple):
    """A frame as the guest got it."""

    header: NetHeader
    data: bytes
    buffers: int
    """How many receive buffers it took."""


class NetSettings(NamedTuple):
    """The device's configuration; a field whose feature was not negotiated is None.

    Without STATUS the link counts as up; unknown speed and duplex are None (virtio 1.3, 5.1.4.2).
    """

    mac: bytes | None
    link_up: bool
    announce: bool
    max_pairs: int
    mtu: int | None
    speed: int | None
    """In Mbit/s."""
    full_duplex: bool | None


class Layout:
    """How a net header and the frame behind it are divided over descriptors.

    A descriptor ends at each of the offsets `cuts`, counted from the header's first byte, and what
    is behind the last cut is divided into `pieces` of about one size. Between the bytes of two
    descriptors lie `gap` bytes that belong to neither. With `indirect` the descriptors stand in a
    table, all but the first `direct` of them.
    """

    def __init__(
        self,
        *cuts: int,
        pieces: int = 1,
        gap: int = 0,
        indirect: bool = False,
        direct: int = 0,
    ) -> None:
        if list(cuts) != sorted(set(cuts)) or any(cut <= 0 for cut in cuts):
            raise UsageError(f"cuts are positive and ascend: {cuts}")
        if pieces < 1 or gap < 0 or direct < 0:
            raise UsageError(f"no layout has {pieces} pieces, a gap of {gap} and {direct} direct")
        self.cuts = cuts
        self.pieces = pieces
        self.gap = gap
        self.indirect = indirect
        self.direct = direct if indirect else 0
        self._known: dict[int, tuple[tuple[int, int], ...]] = {}

    def __repr__(self) -> str:
        cuts = "".join(f"{cut}, " for cut in self.cuts)
        return (
            f"Layout({cuts}pieces={self.pieces}, gap={self.gap}, "
            f"indirect={self.indirect}, direct={self.direct})"
        )

    def spans(self, total: int) -> tuple[tuple[int, int], ...]:
        """``(offset in memory, length)`` of each descriptor, for `total` bytes."""
        try:
            return self._known[total]
        except KeyError:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            spans = self._known[total] = tuple(self._divide(total))
            return spans

    def extent(self, total: int) -> int:
        """How many bytes of memory `total` bytes take, gaps and all."""
        offset, length = self.spans(total)[-1]
        return offset + length

    def descriptors(self, total: int) -> int:
        """How many descriptors of the ring `total` bytes take."""
        count = len(self.spans(total))
        return min(self.direct, count - 1) + 1 if self.indirect else count

    def _divide(self, total: int) -> Iterable[tuple[int, int]]:
        edges = [0, *(cut for cut in self.cuts if cut < total)]
        rest = total - edges[-1]
        pieces = max(1, min(self.pieces, rest))
        edges += [edges[-1] + rest * number // pieces for number in range(1, pieces + 1)]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            yield start + number * self.gap, end - start


ONE_PIECE = Layout()
"""Header and frame together in one descriptor."""
HEADER_APART = Layout(NET_HDR_SIZE)
"""The header in a descriptor of its own."""


class _Buffer:
    """A piece of guest memory that carries one frame, or part of one, at a time."""

    __slots__ = (
        "capacity",
        "chain",
        "contiguous",
        "gpa",
        "size",
        "spans",
        "table",
        "table_room",
        "view",
    )

    def __init__(self, memory: GuestMemory, gpa: int, size: int) -> None:
        self.gpa = gpa
        self.size = size
        self.view = memory.view(gpa, size)
        self.table = 0
        self.table_room = 0
        self.spans: tuple[tuple[int, int], ...] = ((0, size),)
        self.chain: list[GuestBuffer] = [(gpa, size)]
        self.capacity = size
        self.contiguous = True

    def arrange(self, layout: Layout, total: int) -> None:
        """Divides the buffer for `total` bytes."""
        self.spans = layout.spans(total)
        self.chain = [(self.gpa + offset, length) for offset, length in self.spans]
        self.capacity = total
        self.contiguous = not layout.gap

    def fill(self, data: bytes) -> None:
        """Puts bytes into the descriptors' places, in order."""
        place = 0
        for offset, length in self.spans:
            self.view[offset : offset + length] = data[place : place + length]
            place += length

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, counted without the gaps."""
        if self.contiguous:
            return bytes(self.view[start:end])
        joined = b"".join(self.view[offset : offset + length] for offset, length in self.spans)
        return joined[start:end]


class _Queue:
    """A queue of the device with what the driver keeps for it."""

    __slots__ = ("backlog", "buffers", "index", "ring")

    def __init__(self, index: int, ring: DriverRing) -> None:
        self.index = index
        self.ring = ring
        self.buffers: list[_Buffer] = []
        self.backlog: deque[Used] = deque()


class NetDriver:
    """A guest with a network device, driven call by call.

    After the constructor the device is live: features agreed on, `pairs` queue pairs set up and in
    use, receive buffers offered. With `polling` off, as in a kernel, queues are looked at only
    after the device has called; with it on, calls are turned off and every queue is looked at.
    """

    def __init__(
        self,
        transport: Transport,
        memory: GuestMemory,
        wanted_features: int = NET_DRIVER_FEATURES,
        *,
        queue_size: int = 256,
        pairs: int = 1,
        allocator: GuestAllocator | None = None,
        largest_frame: int | None = None,
        receive_layout: Layout = ONE_PIECE,
        receive_buffer_size: int = 2048,
        receive_buffers: int | None = None,
        transmit_layout: Layout = ONE_PIECE,
        polling: bool = False,
        idle: Callable[[], None] | None = None,
        timeout: float = 5.0,
    ) -> None:
        """Probes the device and brings it up.

        `largest_frame` is the largest frame in bytes, net header not counted, that room is made
        for; by default what the specification and the device's MTU ask for. With MRG_RXBUF the
        buffers have `receive_buffer_size` bytes each, more only if a full queue could not hold the
        largest frame else. `receive_buffers` limits their number, by default to 4 MiB for a queue.
        `idle` is called while the driver waits for the device, up to `timeout` seconds; by default
        it sleeps for half a millisecond.

        Raises `DeviceError` when the device is no network device, refuses the features or has not
        the queues, and `UsageError` for what cannot be: the device is then marked as failed.
        """
        self.driver = Driver(
            transport,
            memory,
            wanted_features & NET_DRIVER_FEATURES,
            queue_size=queue_size,
            allocator=allocator,
        )
        self.pairs = 1
        """How many queue pairs are in use."""
        self.transmit_layout = transmit_layout
        self._memory = memory
        self._allocator = self.driver.allocator
        self._wanted_pairs = pairs
        self._wanted_frame = largest_frame
        self._receive_layout = receive_layout
        self._receive_buffer_size = receive_buffer_size
        self._receive_buffers = receive_buffers
        self._polling = polling
        self._idle = idle or (lambda: time.sleep(0.0005))
        self._timeout = timeout
        self._spare: dict[int, list[_Buffer]] = {}
        self._owned: list[_Buffer] = []
        self._receive: list[_Queue] = []
        self._transmit: list[_Queue] = []
        self._control: _Queue | None = None
        self._called: set[int] = set()
        self._settings: NetSettings | None = None
        self._headers: dict[bytes, NetHeader] = {}
        self._start()

    # --- bringing it up and taking it down ----------------------------------------------------

    def _start(self) -> None:
        driver = self.driver
        if driver.transport.device_id != DeviceId.NET:
            raise DeviceError(f"device type {driver.transport.device_id} is no network device")
        driver.on_call = self._called.add
        driver.on_config_change = self._forget_settings
        driver.negotiate(_with_needs_met)
        try:
            self._set_up_queues()
        except (DeviceError, UsageError):
            driver.fail()
            raise
        driver.start()
        for queue in self._receive:
            driver.kick(queue.index)
        if self._wanted_pairs > 1 and not self.set_queue_pairs(self._wanted_pairs):
            raise DeviceError(f"the device refused {self._wanted_pairs} queue pairs")

    def _set_up_queues(self) -> None:
        settings = self.settings
        pairs = self._wanted_pairs
        if not 1 <= pairs <= settings.max_pairs:
            raise UsageError(f"{pairs} queue pairs of a device that has {settings.max_pairs}")
        self.largest_frame = self._wanted_frame or self._needed_frame(settings)
        for pair in range(pairs):
            receive = _Queue(2 * pair, self.driver.setup_queue(2 * pair))
            transmit = _Queue(2 * pair + 1, self.driver.setup_queue(2 * pair + 1))
            self._receive.append(receive)
            self._transmit.append(transmit)
            self._make_receive_buffers(receive)
            self._take_into_use(receive)
            self._take_into_use(transmit)
        if self.has_feature(NetFeature.CTRL_VQ):  # virtio 1.3, 5.1.2: behind all pairs there are
            index = 2 * settings.max_pairs
            size = max(self.driver.queue_size, _CONTROL_QUEUE_SIZE)
            self._control = _Queue(index, self.driver.setup_queue(index, size))
            self._control.ring.disable_calls()

    def _take_into_use(self, queue: _Queue) -> None:
        """What a queue needs before it is live: calls as wanted, receive buffers offered."""
        if queue.buffers:
            self._offer(queue, queue.buffers)
        if self._polling or not queue.buffers:
            # A transmit queue asks for a call only when it is full.
            queue.ring.disable_calls()

    def _needed_frame(self, settings: NetSettings) -> int:
        """The largest frame that the device may pass (virtio 1.3, 5.1.6.3 and 5.1.4.2)."""
        if self.features & _ANY_GUEST_GSO:
            return _LARGEST_FRAME
        return max(_PLAIN_FRAME, (settings.mtu or 0) + _ETHERNET_HEADER)

    def _make_receive_buffers(self, queue: _Queue) -> None:
        layout = self._receive_layout
        needed = NET_HDR_SIZE + self.largest_frame
        size = needed
        if self.has_feature(NetFeature.MRG_RXBUF):
            size = max(self._receive_buffer_size, NET_HDR_SIZE)
        count = self._receive_buffer_count(queue.ring, size)
        if size * count < needed:
            size = -(-needed // count)
            count = self._receive_buffer_count(queue.ring, size)
        for _ in range(count):
            buffer = self._allocate(layout.extent(size))
            buffer.arrange(layout, size)
            if layout.indirect:
                self._need_table(buffer)
            queue.buffers.append(buffer)

    def _receive_buffer_count(self, ring: DriverRing, size: int) -> int:
        layout = self._receive_layout
        limit = self._receive_buffers or max(2, _RECEIVE_BYTES // size)
        count = min(ring.size // layout.descriptors(size), limit)
        if not count or len(layout.spans(size)) > ring.size:
            raise UsageError(f"{layout} does not fit into a queue of {ring.size}")
        return count

    @property
    def features(self) -> int:
        """What was negotiated."""
        return self.driver.features

    def has_feature(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return self.driver.has_feature(bit)

    @property
    def needs_reset(self) -> bool:
        """Whether the device has said that it works no more before a reset."""
        return self.driver.needs_reset

    def restart(self) -> None:
        """Resets the device and brings it up anew; frames on their way are lost."""
        self._stop()
        self._start()

    def close(self) -> None:
        """Resets the device and gives the guest's memory back to the allocator."""
        self._stop()
        self.driver.close()

    def _stop(self) -> None:
        self.driver.reset()
        for buffer in self._owned:
            self._release_memory(buffer)
        self._owned = []
        self._spare = {}
        self._receive = []
        self._transmit = []
        self._control = None
        self.pairs = 1
        self._called.clear()
        self._settings = None
        self._headers.clear()

    def reset_queue(self, index: int) -> None:
        """Resets one queue and takes it into use again (RING_RESET); its frames are lost.

        Raises `UsageError` when RING_RESET was not negotiated or there is no such queue.
        """
        queues = [*self._receive, *self._transmit, *([self._control] if self._control else [])]
        queue = next((queue for queue in queues if queue.index == index), None)
        if queue is None:
            raise UsageError(f"there is no queue {index}")
        size = queue.ring.size
        lost = self.driver.reset_queue(index)
        queue.backlog.clear()
        if not queue.buffers:
            for buffer in lost:
                self._give_back(buffer)
        queue.ring = self.driver.setup_queue(index, size)
        self._take_into_use(queue)
        if queue.buffers:
            self.driver.kick(index)

    # --- transmitting (virtio 1.3, 5.1.6.2) ---------------------------------------------------

    def send(
        self,
        data: bytes | bytearray | memoryview,
        header: NetHeader | bytes = PLAIN_HEADER,
        *,
        pair: int = 0,
        layout: Layout | None = None,
    ) -> bool:
        """Sends one frame; False when the queue is full."""
        return self.send_burst([(header, data)], pair=pair, layout=layout) == 1

    def send_burst(
        self, frames: Sequence[OutFrame], *, pair: int = 0, layout: Layout | None = None
    ) -> int:
        """Sends frames, first to last, with one kick for as many as the queue has room for.

        Returns how many were taken: fewer than given when the queue stays full. Then the device is
        asked to call when it has made room.

        Raises `UsageError` for a frame that never fits, and `DeviceError`.
        """
        queue = self._transmit[pair]
        layout = layout or self.transmit_layout
        self.reap(pair)
        taken = 0
        while taken < len(frames):
            placed = self._place(queue, frames, taken, layout)
            if placed:
                taken += placed
                self.driver.kick(queue.index)
            if taken == len(frames) or self.reap(pair):
                continue
            if queue.ring.enable_calls(delayed=True):
                continue
            break
        return taken

    def _place(self, queue: _Queue, frames: Sequence[OutFrame], first: int, layout: Layout) -> int:
        """Adds frames from `first` on while there is room; returns how many."""
        ring = queue.ring
        add = ring.add
        contiguous = not layout.gap
        indirect = layout.indirect
        single = contiguous and not indirect and not layout.cuts and layout.pieces == 1
        placed = 0
        for number in range(first, len(frames)):
            header, data = frames[number]
            raw = header if isinstance(header, bytes) else NET_HDR.pack(*header)
            start = len(raw)
            total = start + len(data)
            if single:
                if not ring.num_free:
                    break
                buffer = self._take_buffer(total)
                if buffer is None:
                    break
                view = buffer.view
                view[:start] = raw
                view[start:total] = data
                add(((buffer.gpa, total),), (), buffer)
                placed += 1
                continue
            if len(layout.spans(total)) > ring.size:
                raise UsageError(f"{layout} does not fit into a queue of {ring.size}")
            if layout.descriptors(total) > ring.num_free:
                break
            buffer = self._take_buffer(layout.extent(total))
            if buffer is None:
                break
            buffer.arrange(layout, total)
            if contiguous:
                buffer.view[:start] = raw
                buffer.view[start:total] = data
            else:
                buffer.fill(raw + bytes(data))
            self._add(queue, buffer, readable=True, layout=layout)
            placed += 1
        return placed

    def reap(self, pair: int = 0) -> int:
        """Takes back the buffers of frames that the device has sent; returns how many."""
        queue = self._transmit[pair]
        if queue.index in self._called:
            self._called.discard(queue.index)
            queue.ring.disable_calls()
        used = queue.ring.collect()
        for token, _, _ in used:
            self._spare[token.size].append(token)
        return len(used)

    def unsent(self, pair: int = 0) -> int:
        """How many frames the device has not given back yet."""
        return self._transmit[pair].ring.in_flight

    def wait_sent(self, pair: int = 0) -> bool:
        """Waits until the device has given back every frame; False when it takes too long."""
        return self._wait(lambda: self.reap(pair) >= 0 and not self.unsent(pair))

    # --- receiving (virtio 1.3, 5.1.6.3 and 5.1.6.4) ------------------------------------------

    def receive(self, limit: int | None = None) -> list[ReceivedFrame]:
        """The frames that have come on all pairs, at most `limit` from each.

        By default `limit` is the queue's size. The buffers are offered again at once, with one
        kick for all. Without `polling` only queues that the device has called for are looked at.

        Raises `DeviceError` when the device broke a rule of the header or of its buffers.
        """
        frames: list[ReceivedFrame] = []
        for queue in self._receive:
            if self._polling:
                self._receive_from(queue, frames, limit or queue.ring.size)
            elif queue.index in self._called:
                self._called.discard(queue.index)  # first: a call from here on counts
                self._receive_called(queue, frames, limit or queue.ring.size)
        return frames

    def _receive_called(self, queue: _Queue, frames: list[ReceivedFrame], limit: int) -> None:
        """Calls off while there is work, on again when there is none (virtio 1.3, 2.7.14)."""
        ring = queue.ring
        goal = len(frames) + limit
        while True:
            ring.disable_calls()
            self._receive_from(queue, frames, goal - len(frames))
            if queue.backlog or len(frames) >= goal:
                self._called.add(queue.index)
                return
            if not ring.enable_calls():
                return

    def _receive_from(self, queue: _Queue, frames: list[ReceivedFrame], limit: int) -> None:
        backlog = queue.backlog
        backlog.extend(queue.ring.collect())
        emptied: list[_Buffer] = []
        try:
            while backlog and limit > 0:
                frames.append(self._next_frame(queue, emptied))
                limit -= 1
        finally:
            if emptied:
                self._offer(queue, emptied)
                self.driver.kick(queue.index)

    def _next_frame(self, queue: _Queue, emptied: list[_Buffer]) -> ReceivedFrame:
        """Takes one frame off the backlog; its buffers go to `emptied`."""
        backlog = queue.backlog
        buffer, _, written = backlog.popleft()
        emptied.append(buffer)
        if written < NET_HDR_SIZE:
            raise self._broken(queue, f"a frame of {written} bytes has no whole header")
        raw = buffer.read(0, NET_HDR_SIZE)
        header = self._headers.get(raw) or self._check_header(queue, raw)
        data = buffer.read(NET_HDR_SIZE, written)
        count = header.num_buffers
        if count > 1:
            data = self._join(queue, data, written == buffer.capacity, count, emptied)
        if header.flags & _NEEDS_CSUM:
            end = header.csum_start + header.csum_offset + 2
            if end > len(data):
                raise self._broken(queue, f"the checksum ends at {end} of {len(data)} bytes")
        return ReceivedFrame(header, data, count)

    def _join(
        self, queue: _Queue, first: bytes, is_full: bool, count: int, emptied: list[_Buffer]
    ) -> bytes:
        """The frame from `count` buffers; all but the last of them are full."""
        backlog = queue.backlog
        if len(backlog) < count - 1:
            raise self._broken(queue, f"{count} buffers announced, {len(backlog) + 1} used")
        parts = [first]
        for _ in range(count - 1):
            if not is_full:
                raise self._broken(queue, "a buffer before the last is not full")
            buffer, _, written = backlog.popleft()
            emptied.append(buffer)
            parts.append(buffer.read(0, written))
            is_full = written == buffer.capacity
        return b"".join(parts)

    def _check_header(self, queue: _Queue, raw: bytes) -> NetHeader:
        """Reads a header and holds it against what was negotiated; remembers good ones."""
        header = NetHeader._make(NET_HDR.unpack(raw))
        reason = self._fault(header)
        if reason:
            raise self._broken(queue, reason)
        if len(self._headers) >= _REMEMBERED:
            self._headers.clear()
        self._headers[raw] = header
        return header

    def _fault(self, header: NetHeader) -> str | None:
        """What is wrong with a received header, by the features negotiated."""
        count, flags = header.num_buffers, header.flags
        gso = header.gso_type & ~NET_HDR_GSO_ECN
        if not count:
            return "num_buffers is 0"
        if count > 1 and not self.has_feature(NetFeature.MRG_RXBUF):
            return f"num_buffers is {count} without MRG_RXBUF"
        if flags and not self.has_feature(NetFeature.GUEST_CSUM):
            return f"flags are {flags:#x} without GUEST_CSUM"
        if flags & HdrFlag.RSC_INFO:
            return "RSC_INFO without RSC_EXT"
        if gso == HdrGso.NONE:
            return "ECN without a segmentation offload" if header.gso_type else None
        if not self.features & _GUEST_GSO.get(gso, 0):
            return f"gso_type {gso} was not negotiated"
        if header.gso_type & NET_HDR_GSO_ECN and not self.has_feature(NetFeature.GUEST_ECN):
            return "ECN without GUEST_ECN"
        if not flags & HdrFlag.NEEDS_CSUM:
            return "a frame to segment without NEEDS_CSUM"
        if not header.gso_size:
            return "a frame to segment with gso_size 0"
        return None

    @staticmethod
    def _broken(queue: _Queue, reason: str) -> DeviceError:
        return DeviceError(reason, queue=queue.ring.name, section="5.1.6.4.1")

    def _offer(self, queue: _Queue, buffers: Iterable[_Buffer]) -> None:
        layout = self._receive_layout
        if layout.indirect:
            for buffer in buffers:
                self._add(queue, buffer, readable=False, layout=layout)
        else:
            add = queue.ring.add
            for buffer in buffers:
                add((), buffer.chain, buffer)

    # --- control (virtio 1.3, 5.1.6.5) --------------------------------------------------------

    def control(
        self, command_class: int, command: int, payload: bytes = b"", *, layout: Layout = ONE_PIECE
    ) -> int:
        """Gives a command and waits for its ack byte, which is returned (`CTRL_OK` is 0).

        `layout` divides class, command and payload, which the device only reads.

        Raises `UsageError` without CTRL_VQ, `DeviceError` when no ack comes in time.
        """
        queue = self._control
        if queue is None:
            raise UsageError("CTRL_VQ was not negotiated")
        request = bytes((command_class, command)) + payload
        buffer = self._take_buffer(layout.extent(len(request)) + 1)
        if buffer is None:
            raise UsageError("the guest has no memory left for a command")
        buffer.arrange(layout, len(request))
        buffer.fill(request)
        ack = buffer.size - 1
        buffer.view[ack] = 0xFF
        self._add(queue, buffer, readable=True, layout=layout, writable=((buffer.gpa + ack, 1),))
        self.driver.kick(queue.index)
        written = self._wait_for_ack(queue, buffer)
        answer = buffer.view[ack]
        self._give_back(buffer)
        if written != 1:
            raise DeviceError(
                f"{written} bytes of ack written", queue=queue.ring.name, section="5.1.6.5"
            )
        return answer

    def _wait_for_ack(self, queue: _Queue, buffer: _Buffer) -> int:
        """How many bytes the device wrote when it gave the command's buffer back."""
        answered: list[Used] = []

        def done() -> bool:
            for used in queue.ring.collect():
                if used.token is buffer:
                    answered.append(used)
                else:  # a command that was not waited for to the end
                    self._give_back(used.token)
            return bool(answered)

        if not self._wait(done):
            raise DeviceError("no answer to a command in time", queue=queue.ring.name)
        return answered[0].written

    def _command(self, command_class: int, command: int, payload: bytes = b"") -> bool:
        return self.control(command_class, command, payload) == CTRL_OK

    def set_receive_mode(self, mode: CtrlRx, on: bool) -> bool:
        """Turns a receive mode on or off; whether the device agreed, as for all commands below."""
        return self._command(CtrlClass.RX, mode, bytes((on,)))

    def set_mac_table(self, unicast: Sequence[bytes], multicast: Sequence[bytes]) -> bool:
        """Sets the MAC filtering table."""
        payload = b"".join(
            struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast)
        )
        return self._command(CtrlClass.MAC, CtrlMac.TABLE_SET, payload)

    def set_mac(self, mac: bytes) -> bool:
        """Sets the device's MAC address."""
        self._settings = None
        return self._command(CtrlClass.MAC, CtrlMac.ADDR_SET, mac)

    def add_vlan(self, vlan: int) -> bool:
        """Lets frames with this VLAN id through."""
        return self._command(CtrlClass.VLAN, CtrlVlan.ADD, struct.pack("<H", vlan))

    def remove_vlan(self, vlan: int) -> bool:
        """Stops frames with this VLAN id."""
        return self._command(CtrlClass.VLAN, CtrlVlan.DEL, struct.pack("<H", vlan))

    def acknowledge_announce(self) -> bool:
        """Says that the guest has seen the ANNOUNCE bit."""
        self._settings = None
        return self._command(CtrlClass.ANNOUNCE, CtrlAnnounce.ACK)

    def set_queue_pairs(self, count: int) -> bool:
        """Uses the first `count` queue pairs of those that were set up."""
        if not 1 <= count <= len(self._receive):
            raise UsageError(f"{count} queue pairs of the {len(self._receive)} that were set up")
        agreed = self._command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, struct.pack("<H", count))
        if agreed:
            self.pairs = count
        return agreed

    def set_guest_offloads(self, offloads: int) -> bool:
        """Sets which of the negotiated GUEST_* offloads frames may carry, as feature bits."""
        return self._command(
            CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, struct.pack("<Q", offloads)
        )

    # --- configuration (virtio 1.3, 5.1.4) ----------------------------------------------------

    @property
    def settings(self) -> NetSettings:
        """The device's configuration, read anew after each change notification."""
        if self._settings is None:
            self._settings = self._read_settings()
        return self._settings

    def _forget_settings(self) -> None:
        self._settings = None

    def _read_settings(self) -> NetSettings:
        """Reads no further than the last field whose feature was negotiated."""
        has = self.has_feature
        ends = (
            (NetFeature.MAC, 6),
            (NetFeature.STATUS, 8),
            (NetFeature.MQ, 10),
            (NetFeature.MTU, 12),
            (NetFeature.SPEED_DUPLEX, 17),
        )
        length = max((end for feature, end in ends if has(feature)), default=0)
        data = self.driver.read_config(0, length) if length else b""
        mac, status, max_pairs, mtu, speed, duplex = struct.unpack(
            "<6sHHHIB", data.ljust(17, b"\0")
        )
        known_speed = has(NetFeature.SPEED_DUPLEX) and speed <= 0x7FFFFFFF
        known_duplex = has(NetFeature.SPEED_DUPLEX) and duplex <= 1
        has_status = has(NetFeature.STATUS)
        return NetSettings(
            mac=mac if has(NetFeature.MAC) else None,
            link_up=not has_status or bool(status & NetStatus.LINK_UP),
            announce=has_status and bool(status & NetStatus.ANNOUNCE),
            max_pairs=max_pairs if has(NetFeature.MQ) else 1,
            mtu=mtu if has(NetFeature.MTU) else None,
            speed=speed if known_speed else None,
            full_duplex=bool(duplex) if known_duplex else None,
        )

    # --- buffers ------------------------------------------------------------------------------

    def _take_buffer(self, size: int) -> _Buffer | None:
        """A buffer that is not in use; None when memory is full of frames on their way."""
        room = next((s for s in _BUFFER_SIZES if s >= size), None) or ((size + 0xFFFF) & ~0xFFFF)
        spare = self._spare.setdefault(room, [])
        if spare:
            return spare.pop()
        try:
            return self._allocate(room)
        except UsageError:
            if any(queue.ring.in_flight for queue in self._transmit):
                return None
            raise

    def _give_back(self, buffer: _Buffer) -> None:
        self._spare[buffer.size].append(buffer)

    def _allocate(self, size: int) -> _Buffer:
        # In whole cache lines: gaps between buffers would make the allocator's list long.
        gpa = self._allocator.allocate(size + -size % _CACHE_LINE, _CACHE_LINE)
        buffer = _Buffer(self._memory, gpa, size)
        self._owned.append(buffer)
        return buffer

    def _release_memory(self, buffer: _Buffer) -> None:
        self._allocator.free(buffer.gpa)
        if buffer.table_room:
            self._allocator.free(buffer.table)

    def _need_table(self, buffer: _Buffer, extra: int = 0) -> None:
        """Sees to it that the buffer has an indirect table for its chain and `extra` more."""
        count = len(buffer.chain) + extra
        if buffer.table_room < count:
            table = self._allocator.allocate(16 * count)
            if buffer.table_room:
                self._allocator.free(buffer.table)
            buffer.table, buffer.table_room = table, count

    def _add(
        self,
        queue: _Queue,
        buffer: _Buffer,
        *,
        readable: bool,
        layout: Layout,
        writable: Sequence[GuestBuffer] = (),
    ) -> None:
        """Adds a buffer's chain, with a table of its own where the layout wants one."""
        table = None
        direct = 0
        if layout.indirect:
            self._need_table(buffer, len(writable))
            table = buffer.table
            direct = min(layout.direct, len(buffer.chain) + len(writable) - 1)
        if readable:
            queue.ring.add(buffer.chain, writable, buffer, indirect=table, direct=direct)
        else:
            queue.ring.add((), buffer.chain, buffer, indirect=table, direct=direct)

    def _wait(self, done: Callable[[], bool]) -> bool:
        """Waits, `idle` in between, until `done`; False when the time or the device is up."""
        deadline = time.monotonic() + self._timeout
        while not done():
            if self.needs_reset or time.monotonic() > deadline:
                return False
            self._idle()
        return True


def _with_needs_met(features: int) -> int:
    """Leaves out the features whose requirements are not in the set (virtio 1.3, 5.1.3.1)."""
    while True:
        unmet = feature_mask(
            bit
            for bit, needs in _NEEDS.items()
            if features >> bit & 1 and not features & feature_mask(needs)
        )
        if not unmet:
            return features
        features &= ~unmet
