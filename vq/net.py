"""The virtio network device over a `Link` (virtio 1.3, 5.1).

`NetDevice` moves bursts of frames between a guest's queues and the ports of a link. Every feature
is negotiated before it is used, in both directions; what the guest leaves undone and the link
cannot do is done in software.

Towards the host chains are popped in a burst, made into frames (`vq.net_transmit`), written by the
link straight out of guest memory, and given back in one burst with at most one call. Towards the
guest the link reads into a window of its buffers (`vq.net_receive`). What the guest asks for on the
control queue is in `vq.net_control`, the filters that it sets in `vq.net_filter`.
"""

from __future__ import annotations

import ctypes
import json
from array import array
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain as joined
from typing import Any, ClassVar, TypeVar

from vq.abi import (
    CTRL_ERR,
    CTRL_OK,
    NET_HDR_SIZE,
    DeviceId,
    NetConfig,
    NetFeature,
    NetStatus,
    Status,
    feature_mask,
)
from vq.device import RING_FEATURES, Alarm, Device, Queue, Watch
from vq.errors import DriverError, UsageError, in_words
from vq.link import MOST_AT_ONCE, Frame, Link, Outbox, Port
from vq.log_limit import limited_logger
from vq.memory import GuestMemory
from vq.net_control import MAX_COMMAND, carry_out
from vq.net_filter import BROADCAST, MAX_TABLE, ReceiveFilter
from vq.net_receive import ReceiveWindow
from vq.net_transmit import Burst, FrameMaker, Responder
from vq.offload import (
    Offload,
    features_for_guest,
    features_for_host,
    guest_offloads,
    host_offloads,
)
from vq.pace import Pace
from vq.packet import copy_range
from vq.ring_row import Row
from vq.ring_run import Run, TableRun
from vq.software import PLAIN_HEADER
from vq.split_ring import Chain, SplitRing

__all__ = ["DEFAULT_MAC", "NetDevice", "Responder"]

T = TypeVar("T")
R = TypeVar("R", Row, Run, TableRun)

log = limited_logger(__name__)

DEFAULT_MAC = bytes.fromhex("fee1bad1bad1")
"""A locally administered unicast address, for devices whose maker did not choose one."""
MAX_QUEUE_PAIRS = 0x8000  # virtio 1.3, 5.1.4.1
BURST = 64
COMMANDS_PER_TURN = 8
"""Each may be 64 KiB long, and make the link change its offloads by a system call."""
_NOTHING_WRITTEN = array("I", bytes(4 * MOST_AT_ONCE))
_NONE_TAKEN: tuple[Sequence[Chain], int] = ((), 0)
_WORTH_A_BATCH = 4  # frames: to prepare for fewer costs more than it saves
_WORTH_PLACES = 2  # likewise, for frames that are sent in place,
_WORTH_PLACES_ALONE = 5  # and for those of one buffer each, which are soon sent anyhow
RECOVERY_SECONDS = 1.0
"""How often a link that broke is looked at."""
FRAMES_PER_TURN = 256
"""When a turn on one queue ends, with the burst that reaches it: so that a busy guest does not keep
the other queues waiting."""
BYTES_PER_TURN = 200 << 10
"""Likewise, for what the guest sends: four frames of the longest. Then what their receiver
acknowledges is brought to the guest, and makes room in its socket while the next are sent."""
_MUCH = 1 << 14
"""Bytes sent in a turn that are worth a kick: more than any frame has that is not segmented later.
"""
_RARP_REQUEST = bytes.fromhex("80350001080006040003")
_SHORTEST = 60  # an Ethernet frame without its check sequence
_ETHERNET_AND_VLANS = 14 + 2 * 4

_CSUM = 1 << NetFeature.CSUM
_GUEST_CSUM = 1 << NetFeature.GUEST_CSUM
_CTRL_VQ = 1 << NetFeature.CTRL_VQ
_FILTERS = 1 << NetFeature.CTRL_VLAN | 1 << NetFeature.CTRL_RX_EXTRA
_FILTER_MODES = (
    "promiscuous",
    "all_multicast",
    "all_unicast",
    "no_multicast",
    "no_unicast",
    "no_broadcast",
    "unicast_overflow",
    "multicast_overflow",
)
ALWAYS_OFFERED = RING_FEATURES | feature_mask(
    (
        NetFeature.MAC,
        NetFeature.STATUS,
        NetFeature.SPEED_DUPLEX,
        NetFeature.MRG_RXBUF,
        NetFeature.CTRL_VQ,
        NetFeature.CTRL_RX,
        NetFeature.CTRL_RX_EXTRA,
        NetFeature.CTRL_VLAN,
        NetFeature.CTRL_MAC_ADDR,
        NetFeature.CTRL_GUEST_OFFLOADS,
        NetFeature.GUEST_ANNOUNCE,
    )
)
OFFLOAD_FEATURES = features_for_host(~Offload.NONE) | features_for_guest(~Offload.NONE)
# They mean nothing without the control queue, though 5.1.3.1 lets a driver accept them alone.
_ONLY_WITH_CTRL_VQ = feature_mask((NetFeature.CTRL_RX_EXTRA, NetFeature.CTRL_GUEST_OFFLOADS))


class NetDevice(Device):
    """A network device plugged into a link.

    `mac` is 6 bytes. `mtu` (68 to 65535) is offered to the guest when given; `speed` is in
    Mbit/s, None for unknown. `queue_pairs` beyond 1 offer MQ; pairs that the link has no port for
    send through the ports that there are. `features`, a set of bit numbers as an int, limits what
    is offered. With `lock_mac` frames that the guest sends from another address are dropped, and
    frames for others never touch the guest's memory. With `complete_checksums` the guest gets no
    partial checksums, even if it takes them: for programs in it that read raw frames and know
    nothing of offloads, as DHCP clients do. `responders` are asked in turn about each frame that
    the guest sends (`vq.dhcp.LocalDhcp.answer` is one): one that is answered does not go to the
    link, and its answer goes to the guest.

    The device closes the link when it is closed. Statistics are in `stats`: ``tx_frames``,
    ``tx_bytes``, ``rx_frames``, ``rx_bytes``, ``tx_dropped: reason`` and ``rx_dropped: reason``;
    ``tx_answered`` counts frames for responders.
    """

    device_id = DeviceId.NET
    feature_bits = NetFeature
    host_methods = ("set_link_up", "set_mtu", "send_rarp", "load_state")
    feature_needs: ClassVar[Mapping[int, int]] = {  # virtio 1.3, 5.1.3.1
        NetFeature.GUEST_TSO4: _GUEST_CSUM,
        NetFeature.GUEST_TSO6: _GUEST_CSUM,
        NetFeature.GUEST_ECN: 1 << NetFeature.GUEST_TSO4 | 1 << NetFeature.GUEST_TSO6,
        NetFeature.GUEST_UFO: _GUEST_CSUM,
        NetFeature.GUEST_USO4: _GUEST_CSUM,
        NetFeature.GUEST_USO6: _GUEST_CSUM,
        NetFeature.HOST_TSO4: _CSUM,
        NetFeature.HOST_TSO6: _CSUM,
        NetFeature.HOST_ECN: 1 << NetFeature.HOST_TSO4 | 1 << NetFeature.HOST_TSO6,
        NetFeature.HOST_UFO: _CSUM,
        NetFeature.HOST_USO: _CSUM,
        NetFeature.CTRL_RX: _CTRL_VQ,
        NetFeature.CTRL_VLAN: _CTRL_VQ,
        NetFeature.GUEST_ANNOUNCE: _CTRL_VQ,
        NetFeature.MQ: _CTRL_VQ,
        NetFeature.CTRL_MAC_ADDR: _CTRL_VQ,
    }
    _control_index: int | None

    def __init__(
        self,
        link: Link,
        *,
        mac: bytes = DEFAULT_MAC,
        mtu: int | None = None,
        speed: int | None = None,
        queue_pairs: int = 1,
        queue_size: int = 256,
        control_queue_size: int = 64,
        features: int = -1,
        lock_mac: bool = False,
        complete_checksums: bool = False,
        responders: Sequence[Responder] = (),
        memory: GuestMemory | None = None,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise UsageError(f"{mac.hex(':')} is not a unicast MAC address")
        if mtu is not None and not 68 <= mtu <= 65535:
            raise UsageError(f"an MTU is from 68 to 65535 bytes, not {mtu}")
        if speed is not None and not 0 <= speed <= 0x7FFFFFFF:
            raise UsageError(f"a speed of {speed} Mbit/s cannot be told to a guest")
        if not 1 <= queue_pairs <= MAX_QUEUE_PAIRS:
            raise UsageError(f"queue pairs are from 1 to {MAX_QUEUE_PAIRS}, not {queue_pairs}")
        offered = ALWAYS_OFFERED | OFFLOAD_FEATURES
        if mtu is not None:
            offered |= 1 << NetFeature.MTU
        if queue_pairs > 1:
            offered |= 1 << NetFeature.MQ
        if not features & _CTRL_VQ:
            offered &= ~_ONLY_WITH_CTRL_VQ
        config = NetConfig(
            mac=(ctypes.c_uint8 * 6)(*mac),
            status=NetStatus.LINK_UP if link.is_up else 0,
            max_virtqueue_pairs=queue_pairs,
            mtu=mtu or 0,
            speed=0xFFFFFFFF if speed is None else speed,
            duplex=0xFF if speed is None else 1,
        )
        names = [name for pair in range(queue_pairs) for name in (f"rx{pair}", f"tx{pair}")]
        super().__init__(
            features=offered & features,
            queues=[*((name, queue_size) for name in names), ("control", control_queue_size)],
            config=config,
            memory=memory,
        )
        self._config = config
        self.link = link
        self.mac = mac
        self.lock_mac = lock_mac
        self.complete_checksums = complete_checksums
        self._frame_maker = FrameMaker(link, responders=responders, stats=self.stats)
        self._max_pairs = queue_pairs
        self._link_up = link.is_up
        self._working = False
        self._catching_up = False
        self._interrupted: list[int] = []  # queues that wanted attention in the meantime
        self._is_part = False  # this process was forked to serve some queues only
        self._broken: set[int] = set()  # ports whose end of the link is gone
        self._port_watches: list[Watch | None] = [
            self._watch_port(index, port) for index, port in enumerate(link.ports)
        ]
        self.watches = [watch for watch in self._port_watches if watch is not None]
        self._recovery = Alarm(self._recover, outside=True)
        self._complaint = ""  # why it could not be used again, as it was logged last
        self.alarms.append(self._recovery)
        link.on_change = self._link_changed
        self.device_reset()

    # --- Device -----------------------------------------------------------------------------------

    def features_negotiated(self, features: int) -> None:
        """Takes up what the driver accepted, and asks the link to deliver accordingly."""
        self._frame_maker.allowed = host_offloads(features)
        self._frame_maker.locked_mac = self.mac if self.lock_mac else None
        self._guest_offloads = guest_offloads(features)
        if features >> NetFeature.CTRL_VLAN & 1:
            self.filter.vlans = set()
        if features & _FILTERS and not features >> NetFeature.CTRL_RX & 1:
            # Promiscuous mode prevails over all filters, and this driver could not turn it off.
            self.filter.promiscuous = False
            self.filter.all_unicast = self.filter.all_multicast = True
        self._pairs = self._max_pairs if features >> NetFeature.MQ & 1 else 1
        self._control_index = 2 * self._pairs if features & _CTRL_VQ else None
        self._configure_receiving()

    def driver_ready(self) -> None:
        """The driver is there: frames that wait in the link may come."""
        self._activate_ports()
        for queue in self.queues:
            self.notify(queue.index)

    def device_reset(self) -> None:
        """Forgets all that the driver set (virtio 1.3, 2.4), but not whether the cable is in."""
        self._config.status = int(NetStatus.LINK_UP) if self._link_up else 0
        self.filter = ReceiveFilter(self.mac)
        self._frame_maker.allowed = Offload.NONE
        self._guest_offloads = Offload.NONE
        self._control_index = None
        self._pairs = 1
        self._active_pairs = 1
        self._interrupted.clear()
        self._windows: dict[int, ReceiveWindow] = {}
        self._paces: dict[int, Pace] = {}
        self._backlogs: dict[int, deque[tuple[Frame, Chain | None]]] = {}
        self._rows: dict[int, Row] = {}
        self._tables: dict[int, TableRun] = {}  # they hold nothing between two bursts
        for watch in self.watches:
            watch.want(reading=False, writing=False)
        forgotten = self.link.forget_waiting()
        if forgotten:
            self.stats["rx_dropped: guest gone"] += forgotten
        self._ask_link(self.link.activate_ports, 1)
        self._ask_link(self.link.request_offloads, Offload.NONE)

    def queue_started(self, queue: Queue) -> None:
        """Makes a receive queue's window or a transmit queue's backlog."""
        if queue.index >= 2 * self._pairs or queue.ring is None:
            return  # the control queue, or one of a pair that was not negotiated
        if queue.index % 2:
            self._backlogs[queue.index] = deque()
            self._rows[queue.index] = Row(queue.ring)
            self._tables[queue.index] = TableRun(queue.ring)
        else:
            self._windows[queue.index] = ReceiveWindow(
                queue.ring, mergeable=self.has_feature(NetFeature.MRG_RXBUF), stats=self.stats
            )
            self._paces[queue.index] = Pace()
            self._configure_receiving()
        if self.status & Status.DRIVER_OK:
            self._activate_ports()

    def queue_stopping(self, queue: Queue) -> None:
        """Puts unused receive buffers back; frames that a full link never took are dropped."""
        window = self._windows.get(queue.index)
        if window is not None:
            window.put_back()
        backlog = self._backlogs.get(queue.index)
        if backlog and queue.ring is not None:
            queue.ring.push_burst([chain for _, chain in backlog if chain is not None])
        self.queue_dropped(queue)
        if window is not None:
            self._activate_ports()
            if queue.lent:
                self._want_readable(queue, False)

    def queue_dropped(self, queue: Queue) -> None:
        """The ring is gone, and all that was popped from it; frames on their way are dropped."""
        window = self._windows.pop(queue.index, None)
        if window is not None:
            window.drop_pending("queue stopped")
        self._rows.pop(queue.index, None)
        self._tables.pop(queue.index, None)
        backlog = self._backlogs.pop(queue.index, None)
        if backlog:
            self.stats["tx_dropped: queue stopped"] += len(backlog)

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        """One turn on a queue: a few bursts."""
        if self._working:
            # A link or a scripted driver called back from within our own work. One thing at a time.
            if queue.index not in self._interrupted:
                self._interrupted.append(queue.index)
            return False
        self._working = True
        try:
            if queue.index == self._control_index:
                more = self._control(queue, ring)
            elif queue.index % 2:
                more = self._transmit(queue, ring)
            else:
                more = self._receive(queue, ring)
        finally:
            self._working = False
        if self._interrupted:
            self._catch_up()
        return more

    def process_disabled(self, queue: Queue, ring: SplitRing) -> bool:
        """Discards what the guest sends; receives nothing, and leaves commands for later.

        vhost-user, "Ring states": "in the disabled state the back-end must not supply any new RX
        packets, but must process and discard any TX packets." A command on the control queue waits:
        to refuse it would be something that the driver sees.
        """
        if not queue.index % 2 or queue.index >= 2 * self._pairs:
            return False
        ring.disable_kicks()
        for _ in range(ring.size // BURST + 1):  # all that waits: see `Backend` for why
            chains = ring.pop_burst(BURST)
            if chains:
                ring.write_used_burst(chains)
                self.stats["tx_dropped: disabled"] += len(chains)
                self.publish(queue)
                if queue.ring is not ring:
                    return False
                if ring.burst_was_long:
                    return True  # more than any driver means: enough for a turn
            elif not ring.enable_kicks():
                return False
        return True

    def _catch_up(self) -> None:
        """Sees to the queues that wanted attention; not nested, however they call each other.

        Where others wait for their turn, so do these: two guests on one cable could otherwise keep
        each other, and nobody else, busy without end.
        """
        if self.on_work_left is not None:
            while self._interrupted:
                self.on_work_left(self._interrupted.pop(0))
            return
        if self._catching_up:
            return
        self._catching_up = True
        try:
            while self._interrupted:
                self.notify(self._interrupted.pop(0))
        finally:
            self._catching_up = False

    # --- for several processes (`vq.vhost_processes`) ---------------------------------------------

    def queues_apart(self, processes: int) -> Sequence[Collection[Collection[int]]]:
        """Queue pairs in turn, where each has a port of its own. The first stays here."""
        if not self.link.ports_are_apart or self._max_pairs > len(self.link.ports):
            return ()
        pairs = self._pairs_in_use
        return [
            [(2 * pair, 2 * pair + 1) for pair in range(part, pairs, processes)]
            for part in range(1, processes)
        ]

    def keep_only(self, indices: Collection[int]) -> None:
        """See `Device.keep_only`. The link's settings are the other process's."""
        self._is_part = True
        super().keep_only(indices)
        for watch in self.watches:
            watch.want(reading=False, writing=False)
        self._recovery.set(None)
        self.link.serve_apart({index // 2 for index in indices}, self._notify_config_change)

    def queue_came_home(self, queue: Queue) -> None:
        """Has the port forget what it knew."""
        self.link.ports[self._port_index(queue)].was_used_elsewhere()

    def look_again(self) -> None:
        """Has the link look how long frames may be. If it is gone the next frame finds that out."""
        with suppress(OSError):
            self.link.look_again()

    def _bring_home(self) -> None:
        if self.on_shared_change is not None:
            self.on_shared_change()

    def close(self) -> None:
        """Closes the link."""
        for watch in self.watches:
            watch.want(reading=False, writing=False)
        self.link.close()

    # --- for hosts --------------------------------------------------------------------------------

    def set_link_up(self, up: bool) -> None:
        """Tells the guest whether its cable is in (virtio 1.3, 5.1.4: status).

        It holds until the link itself comes or goes.
        """
        self._link_up = up
        status = self.config_status & ~NetStatus.LINK_UP | (NetStatus.LINK_UP if up else 0)
        if status != self.config_status:
            self.update_config(status=status)

    def announce(self) -> None:
        """Asks the guest to make itself known on its network, as after a migration."""
        if self.has_feature(NetFeature.GUEST_ANNOUNCE):
            self.update_config(status=self.config_status | NetStatus.ANNOUNCE)

    # --- for commands of the driver (`vq.net_control`) --------------------------------------------

    @property
    def max_pairs(self) -> int:
        """How many queue pairs the device has."""
        return self._max_pairs

    def set_address(self, mac: bytes) -> None:
        """The driver's own choice of the address; it stands in the configuration space too."""
        self.filter.mac = mac
        self.update_config(mac=(ctypes.c_uint8 * 6)(*mac))

    def announced(self) -> None:
        """The guest has made itself known on its network."""
        self.update_config(status=self.config_status & ~NetStatus.ANNOUNCE)

    def activate_pairs(self, pairs: int) -> None:
        """Uses the first `pairs` queue pairs."""
        self._bring_home()
        self._active_pairs = pairs
        self._activate_ports()
        for index, window in self._windows.items():
            if index >= 2 * pairs:
                window.drop_pending("queue stopped")
            elif index not in self._interrupted:
                self._interrupted.append(index)  # look for frames once this command is done

    def set_guest_offloads(self, offloads: Offload) -> None:
        """What the guest takes undone from now on."""
        self._guest_offloads = offloads

    def filters_changed(self) -> None:
        """A command was carried out: windows and link follow."""
        self._bring_home()
        self._configure_receiving()

    # --- for migration ----------------------------------------------------------------------------

    def send_rarp(self, mac: bytes) -> None:
        """Broadcasts a RARP request that seems to come from `mac` (RFC 903).

        After a migration it teaches switches where the guest is now, in place of a guest that
        cannot announce itself.
        """
        addresses = mac + bytes(4) + mac + bytes(4)
        request = BROADCAST + mac + _RARP_REQUEST + addresses
        frame = request.ljust(_SHORTEST, b"\0")
        self._write(0, [[PLAIN_HEADER, frame]], len(frame))

    def set_mtu(self, mtu: int) -> bool:
        """Takes the MTU that the host's network has; False when the device told the guest more."""
        return not self.device_features >> NetFeature.MTU & 1 or int(self._config.mtu) <= mtu

    def save_state(self) -> bytes:
        """What the driver set on the control queue, for `load_state` on another host."""
        filters = self.filter
        state = {
            "modes": {name: getattr(filters, name) for name in _FILTER_MODES},
            "unicast": sorted(address.hex() for address in filters.unicast),
            "multicast": sorted(address.hex() for address in filters.multicast),
            "vlans": None if filters.vlans is None else sorted(filters.vlans),
            "mac": filters.mac.hex(),
            "pairs": self._active_pairs,
            "offloads": int(self._guest_offloads),
        }
        return json.dumps(state).encode()

    def load_state(self, state: bytes) -> None:
        """Takes over what `save_state` gave. Raises `UsageError` for anything else."""
        try:
            self._load(json.loads(state))
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise UsageError(f"this is not a network device's state: {error!r}") from None

    def _load(self, state: dict[str, Any]) -> None:
        filters = ReceiveFilter(bytes.fromhex(state["mac"]))
        for name in _FILTER_MODES:
            setattr(filters, name, bool(state["modes"][name]))
        unicast, multicast = (
            frozenset(map(bytes.fromhex, state[name])) for name in ("unicast", "multicast")
        )
        filters.unicast, filters.multicast = unicast, multicast
        filters.vlans = None if state["vlans"] is None else set(map(int, state["vlans"]))
        pairs, offloads = int(state["pairs"]), Offload(int(state["offloads"]))
        # No more than a driver could have set here: a peer's word is no reason to hold more.
        if max(len(unicast), len(multicast)) > MAX_TABLE:
            raise ValueError(f"more than {MAX_TABLE} addresses")
        if any(len(address) != 6 for address in (filters.mac, *unicast, *multicast)):
            raise ValueError("an address that is not 6 bytes long")
        if any(not 0 <= vlan <= 0xFFF for vlan in filters.vlans or ()):
            raise ValueError("a VLAN that cannot be")
        if filters.mac[0] & 1 or not 1 <= pairs <= self._max_pairs:
            raise ValueError("an address or a number of queue pairs that cannot be")
        self.filter = filters
        self._config.mac[:] = filters.mac
        self._guest_offloads &= offloads
        self._active_pairs = pairs
        self._activate_ports()
        self._configure_receiving()

    @property
    def config_status(self) -> int:
        """`virtio_net_config.status`."""
        return int(self._config.status)

    # --- towards the host -------------------------------------------------------------------------

    def _transmit(self, queue: Queue, ring: SplitRing) -> bool:
        backlog = self._backlogs.get(queue.index)
        if backlog is None:
            return False
        if backlog and not (self._send_backlog(queue, ring) and self.holds(queue, ring)):
            return False
        ring.disable_kicks()
        frames = 0
        bytes_before = self.stats["tx_bytes"]
        while frames < FRAMES_PER_TURN and self.stats["tx_bytes"] - bytes_before < BYTES_PER_TURN:
            chains, sent = _NONE_TAKEN
            was_long = False
            waiting = ring.waiting()
            if waiting:
                if waiting < _WORTH_PLACES:
                    chains, sent = self._send_alone(queue, ring)
                    was_long = ring.burst_was_long
                else:
                    chains, sent = self._send_at_once(queue, ring, waiting)
                if not self.holds(queue, ring):
                    return False
                if sent:
                    self.publish_without_haste(queue)
                    if not self.holds(queue, ring):
                        return False
            if not (chains or sent):
                chains = ring.pop_burst(BURST)
                was_long = ring.burst_was_long
            if chains:
                burst = self._frame_maker.make(queue.name, chains)
                if not self._send_burst(queue, ring, burst):
                    return False
                was_long = was_long or bool(burst.left)
            if was_long:
                return True  # that was more than a turn's work
            frames += sent + len(chains)
            if sent > 1 or len(chains) >= BURST:
                continue
            much = self.stats["tx_bytes"] - bytes_before >= _MUCH
            if not (ring.enable_kicks() if much else self.rest(queue, ring)):
                return False
            ring.disable_kicks()
        return True

    def _send_alone(self, queue: Queue, ring: SplitRing) -> tuple[Sequence[Chain], int]:
        """Sends the one frame that waits, if there is nothing more to it than that.

        Returns as `_send_at_once`.
        """
        chains = ring.pop_burst(1)
        frame = self._frame_maker.plain(chains[0]) if len(chains) == 1 else None
        if frame is None or not self._write(
            self._port_index(queue), (frame,), sum(map(len, frame)) - NET_HDR_SIZE
        ):
            return chains, 0
        if self.holds(queue, ring):
            ring.write_used_burst(chains)
        return (), 1

    def _send_at_once(
        self, queue: Queue, ring: SplitRing, waiting: int
    ) -> tuple[Sequence[Chain], int]:
        """Sends a burst of frames by address, if what comes next is fit for that.

        Returns chains that it took and did not send, in their order, and how many frames it sent.
        """
        maker, port_index = self._frame_maker, self._port_index(queue)
        outbox = self.link.ports[port_index].outbox
        if outbox is None or port_index in self._broken:
            return _NONE_TAKEN
        if waiting >= _WORTH_A_BATCH and maker.takes_short_way():
            row = self._rows[queue.index]
            if row.look(waiting, MOST_AT_ONCE):
                sent = self._send_run(port_index, row, maker.send_alike, outbox)
                if sent and self.holds(queue, ring):
                    row.give_back(sent)
                return (), sent
            run = Run(ring, writable=False)
            run.pop(MOST_AT_ONCE)
            sent = self._send_run(port_index, run, maker.send_plain, outbox)
            if not self.holds(queue, ring):
                return (), sent
            run.give_back(_NOTHING_WRITTEN[:sent])
            if sent or run:
                return run.to_chains(), sent
        is_worth_it = waiting >= _WORTH_PLACES_ALONE or not ring.singles_ahead(waiting)
        if is_worth_it and maker.takes_place_way():
            tables = self._tables[queue.index]
            tables.pop(BURST, BYTES_PER_TURN)
            sent = self._send_run(port_index, tables, maker.send_in_place, outbox)
            if not self.holds(queue, ring):
                return (), sent
            tables.give_back(sent)
            return tables.to_chains(), sent
        return _NONE_TAKEN

    def _send_run(
        self, port_index: int, run: R, send: Callable[[R, Outbox], int], outbox: Outbox
    ) -> int:
        try:
            return send(run, outbox)
        except OSError as error:
            self._port_broke(port_index, error)
            return 0

    def _send_burst(self, queue: Queue, ring: SplitRing, burst: Burst) -> bool:
        """Sends what was made of chains and does all else that follows from it; whether the queue
        can go on.

        Raises `DriverError` for a rule that one of them broke.
        """
        if burst.left:
            ring.undo_pop(burst.left)
        all_sent = self._send(queue, ring, burst.frames, burst.owners, burst.size)
        if not self.holds(queue, ring):
            return False
        if burst.dropped:
            ring.write_used_burst(burst.dropped)
        self.publish_without_haste(queue)
        if not self.holds(queue, ring):
            return False
        for answer in burst.answers:
            if not self.inject(answer, pair=queue.index // 2):
                self.stats["rx_dropped: no room for an answer"] += 1
        if burst.fault is not None:
            raise burst.fault
        return all_sent

    def _send(
        self,
        queue: Queue,
        ring: SplitRing,
        frames: Sequence[Frame],
        owners: Sequence[Chain | None],
        size: int,
    ) -> bool:
        """Gives frames to the link, `size` bytes in all, and the chains of those it took back to
        the guest.

        What the link has no room for is kept for later; then the answer is False.
        """
        if not frames:
            return True
        sent = self._write(self._port_index(queue), frames, size)
        if not self.holds(queue, ring):
            return False
        done = owners if sent == len(owners) else owners[:sent]
        ring.write_used_burst([chain for chain in done if chain is not None])
        if sent == len(frames):
            return True
        self._backlogs[queue.index].extend(zip(frames[sent:], owners[sent:], strict=True))
        self._watch_writing(self._port_index(queue))
        return False

    def _send_backlog(self, queue: Queue, ring: SplitRing) -> bool:
        """Tries again what the link had no room for; whether it took all of it."""
        backlog = self._backlogs[queue.index]
        frames = [frame for frame, _ in backlog]
        owners = [chain for _, chain in backlog]
        backlog.clear()
        all_sent = self._send(queue, ring, frames, owners, _payload(frames))
        if all_sent:
            self._watch_writing(self._port_index(queue))
        self.publish(queue)
        return all_sent

    def _write(self, port_index: int, frames: Sequence[Frame], size: int) -> int:
        if port_index not in self._broken:
            try:
                sent = self.link.ports[port_index].write_burst(frames)
            except OSError as error:
                self._port_broke(port_index, error)
            else:
                self.stats["tx_frames"] += sent
                all_sent = sent == len(frames)
                self.stats["tx_bytes"] += size if all_sent else _payload(frames[:sent])
                return sent
        self.stats["tx_dropped: link gone"] += len(frames)
        return len(frames)

    # --- towards the guest ------------------------------------------------------------------------

    def _receive(self, queue: Queue, ring: SplitRing) -> bool:
        window = self._windows.get(queue.index)
        if window is None:
            return False
        pace = self._paces[queue.index]
        more = False
        ring.disable_kicks()
        try:
            window.retry()
            if self._port_feeds(queue):
                more = self._read_bursts(queue, ring, window, pace)
        finally:
            if self.holds(queue, ring) and window.flush():
                self.publish(queue)
            window.count_received()  # all that can wait is done behind the call
        if not self.holds(queue, ring):
            return False
        if window.starved:
            if ring.enable_kicks():
                return True
            self._want_readable(queue, False)
        else:
            self._want_readable(queue, True)
            if pace.expects_one:
                window.prepare()
        return more

    def _read_bursts(
        self, queue: Queue, ring: SplitRing, window: ReceiveWindow, pace: Pace
    ) -> bool:
        """Moves waiting frames into the window; whether there may be more of them."""
        index = self._port_index(queue)
        port = self.link.ports[index]
        # Where few come at a time there is no look for one more: an event loop, if there is one,
        # looks anyhow, and to find nothing takes nearly as long as a frame.
        polled = port.none_waits_inside and self.on_work_left is not None
        expected = pace.begin() if polled else 0
        frames = 0
        try:
            while frames < FRAMES_PER_TURN:
                limit = port.burst
                if 0 < expected < limit:
                    limit = expected
                moved = port.read_burst(window, limit)
                frames += moved
                if not self.holds(queue, ring):
                    return False
                if window.flush():  # here, so that the call is part of the work that sets the pace
                    if self.publish(queue):
                        # Linux' driver looks what was sent when it looks what was received.
                        self.queues[queue.index + 1].driver_looks_soon = True
                    if not self.holds(queue, ring):
                        return False
                if expected or moved < limit:
                    return False
                if limit < Port.burst:  # long ones: what the guest acknowledges is to be sent, too
                    return True
        except OSError as error:
            self._port_broke(index, error)
            return False
        finally:
            pace.end(frames)
        return True

    def _port_feeds(self, queue: Queue) -> bool:
        """Whether frames of a port go to this receive queue.

        Only pairs that the driver has activated count (virtio 1.3, 5.1.6.5.6).
        """
        pair = queue.index // 2
        has_port = pair < len(self.link.ports) and pair not in self._broken
        return has_port and self._pair_is_active(pair)

    def _pair_is_active(self, pair: int) -> bool:
        return pair < self._active_pairs or self._control_hidden

    @property
    def _control_hidden(self) -> bool:
        """Whether the transport keeps the control queue to itself.

        Then it enables the queues of active pairs and no others.
        """
        return self._control_index is not None and not self.queues[self._control_index].enabled

    def _activate_ports(self) -> None:
        """Has the link use the ports of active pairs only, and the event loop leave the others."""
        if self._is_part:
            return
        count = min(self._pairs_in_use, len(self.link.ports))
        self._ask_link(self.link.activate_ports, count)
        for index in range(count, len(self.link.ports)):
            watch = self._port_watches[index]
            if watch is not None:
                watch.want(reading=False, writing=False)
                self._port_writable(index)  # for what waits there

    @property
    def _pairs_in_use(self) -> int:
        """How many pairs have frames, from the first on."""
        if not self._control_hidden:
            return self._active_pairs
        lent = (queue.index for queue in self.queues if queue.lent)
        return max((index // 2 + 1 for index in joined(self._windows, lent)), default=1)

    def inject(self, frame: bytes, *, pair: int = 0) -> bool:
        """Gives the guest a frame of the host's own making, past all filters.

        False when the guest has no receive queue, or leaves too many of them waiting for buffers.
        """
        window = self._windows.get(2 * pair)
        if window is None or not self._pair_is_active(pair):
            return False
        queue = self.queues[2 * pair]
        if self.ready_ring(queue) is None or not window.add([PLAIN_HEADER, frame]):
            return False
        self.notify(queue.index)  # while the device is at work already: once it is done
        return True

    def _configure_receiving(self) -> None:
        """Tells the windows and the link what the guest takes now."""
        takes = Offload.NONE if self.complete_checksums else self._guest_offloads
        wants: Callable[[bytes], bool] | None = self.filter.wants
        if self.lock_mac:
            wants = self._wants_locked
        elif self.filter.promiscuous:
            wants = None
        mtu = self._config.mtu if self.has_feature(NetFeature.MTU) else None
        for window in self._windows.values():
            window.configure(
                takes=takes,
                wants=wants,
                always_wanted=self.filter.own_address,
                private=self.lock_mac,
                largest_plain=None if mtu is None else mtu + _ETHERNET_AND_VLANS,
            )
        self._ask_link(self.link.request_offloads, takes)

    def _ask_link(self, request: Callable[[T], None], argument: T) -> None:
        """Asks something of the link; one that is gone refuses, and the guest's device lives on.

        Nothing is relied on: what is left undone all the same is finished here, and the next
        frame finds out whether the link is there.
        """
        if self._is_part:
            return
        try:
            request(argument)
        except OSError as error:
            log.warning("%s: the link refused: %s", self.link.name, error)

    def _wants_locked(self, start: bytes) -> bool:
        """Frames for this guest, whatever mode it sets: others' are not for its eyes."""
        ours = start[:6] == self.mac or bool(start[:1] and start[0] & 1)
        return ours and self.filter.wants(start)

    # --- ports ------------------------------------------------------------------------------------

    def _port_index(self, queue: Queue) -> int:
        return queue.index // 2 % len(self.link.ports)

    def _watch_port(self, index: int, port: Port) -> Watch | None:
        readable = partial(self._port_readable, index)
        writable = partial(self._port_writable, index)
        fd = port.fileno()
        if fd is not None:
            return Watch(fd, readable=readable, writable=writable)
        port.on_readable = readable
        port.on_writable = writable
        return None

    def _port_readable(self, index: int) -> None:
        if index < self._max_pairs:
            queue = self.queues[2 * index]
            if self.ready_ring(queue) is None:  # it is looked at when it is ready again
                self._want_readable(queue, False)
            else:
                self.notify(queue.index)

    def _port_writable(self, index: int) -> None:
        # All of them: a port in this process calls while we still write to it, and what it did not
        # take is in no backlog yet.
        for queue_index in list(self._backlogs):
            if self._port_index(self.queues[queue_index]) == index:
                self.notify(queue_index)
        self._watch_writing(index)

    def _waiting_for(self, port_index: int) -> list[int]:
        """The queues with frames that a port did not take yet."""
        return [
            index
            for index, backlog in self._backlogs.items()
            if backlog
            and self._port_index(self.queues[index]) == port_index
            and self.ready_ring(self.queues[index]) is not None
        ]

    def _link_changed(self) -> None:
        """The link came or went, can be used again, or a port has another descriptor; perhaps in
        our own work."""
        self._bring_home()
        if self._broken:
            log.info("%s: the link is back", self.link.name)
            self._broken.clear()
        changed = []
        for index, port in enumerate(self.link.ports):
            watch = self._port_watches[index]
            if port.fileno() == (None if watch is None else watch.fd):
                continue
            if watch is not None:
                watch.want(reading=False, writing=False)
            self._port_watches[index] = self._watch_port(index, port)
            changed.append(index)
        if changed:
            self.watches = [watch for watch in self._port_watches if watch is not None]
            if self.on_watches_change is not None:
                self.on_watches_change()
        self._configure_receiving()
        self._activate_ports()
        for index in range(len(self.link.ports)):
            # The loop calls at once if there is something to read already.
            if 2 * index in self._windows:
                self._want_readable(self.queues[2 * index], True)
            self._port_writable(index)
        self.set_link_up(self.link.is_up)

    def _recover(self) -> None:
        """Looks whether a link that broke can be used again, from time to time."""
        complaint = ""
        if self._broken:
            try:
                self.link.recover()
            except (OSError, UsageError) as error:
                complaint = in_words(error)
        if self._broken:
            self._recovery.set(RECOVERY_SECONDS)
        if complaint and complaint != self._complaint:  # once, not once a second
            log.warning("%s: there is one again, but: %s", self.link.name, complaint)
        self._complaint = complaint

    def _want_readable(self, queue: Queue, reading: bool) -> None:
        if queue.index // 2 < len(self._port_watches):
            watch = self._port_watches[queue.index // 2]
            if watch is not None and not (reading and watch.reading):
                watch.want(reading=reading and self._port_feeds(queue))

    def _watch_writing(self, port_index: int) -> None:
        watch = self._port_watches[port_index]
        if watch is not None:
            watch.want(writing=bool(self._waiting_for(port_index)))

    def _port_broke(self, index: int, error: OSError) -> None:
        self._broken.add(index)
        if self._is_part:
            self._notify_config_change()  # the other process finds that, too, and says so
            return
        log.error("%s: the link broke: %s", self.link.name, in_words(error))
        watch = self._port_watches[index]
        if watch is not None:
            watch.want(reading=False, writing=False)
        self._recovery.set(RECOVERY_SECONDS)
        self.set_link_up(False)

    # --- the control queue (virtio 1.3, 5.1.6.5) --------------------------------------------------

    def _control(self, queue: Queue, ring: SplitRing) -> bool:
        chains = ring.pop_burst(COMMANDS_PER_TURN)
        for chain in chains:
            if not chain.writable:
                ring.write_used(chain)
                raise DriverError(
                    "a control command without room for its ack",
                    queue=queue.name,
                    head=chain.head,
                    section="5.1.6.5",
                )
            done = carry_out(self, copy_range(chain.readable, 0, MAX_COMMAND + 1))
            if not self.holds(queue, ring):
                return False
            chain.writable[0][0] = CTRL_OK if done else CTRL_ERR
            chain.written = 1
            ring.write_used(chain)
            self.stats["control_commands" if done else "control_refused"] += 1
        self.publish(queue)
        return self.holds(queue, ring) and (bool(chains) or ring.enable_kicks())


def _payload(frames: Sequence[Frame]) -> int:
    """The bytes of frames without their net headers."""
    return sum(map(len, joined.from_iterable(frames))) - NET_HDR_SIZE * len(frames)
