"""What a vhost-user backend does with each message: one connection's state, driving any `Device`.

`Backend` holds what the frontend has set (features, memory table, vrings, logs) and turns it into
calls of `vq.device.Device`: a queue is set up when everything it needs is there, stopped when
something is taken away, and set up again at the same position when the memory under it is replaced.
Messages come from `vq.vhost_message` and replies leave through a function; the socket is
`vhost_user`'s.

Every message is checked before anything changes. What the protocol does not allow raises
`FrontendError`, after which the connection has to be closed.

Section names cited below are those of QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from vq.abi import MAX_QUEUE_SIZE, Status, bits, feature_mask, ring_layout
from vq.device import Device, with_needs_met
from vq.errors import FrontendError, UsageError
from vq.inflight import InflightRegion
from vq.log_limit import limited_logger
from vq.loop import Loop, Timer
from vq.memory import DirtyLog, GuestMemory, Region
from vq.shared_fd import MadeToWait, drain, signal_event
from vq.vhost_channel import Channel, Transfer, close_fd
from vq.vhost_message import (
    BackendRequest,
    Config,
    ConfigFlag,
    DeviceStateTransfer,
    Inflight,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    VhostFeature,
    VringAddr,
    VringFd,
    VringFlag,
    VringState,
)
from vq.vhost_processes import Apart, Processes, may_be_lent
from vq.vring import Held, Kick, Position, Return, Vring

__all__ = ["Announcing", "Backend", "MtuLimited", "Stateful", "choose_offered", "protocol_features"]

log = limited_logger(__name__)

MAX_MEM_SLOTS = 256
"""Regions at most; each takes a descriptor of this process."""
POLL_SECONDS = 0.001
"""How often a ring is looked at that has no kick descriptor."""
ENABLE_SECONDS = 0.1
"""How long what waits in a ring that is started, but disabled, stays there without a kick: many
frontends start a ring first and enable it a moment later."""

MANY_KICKS = 256
"""After so many it is looked whether a buffer came with them."""
REST_SECONDS = 0.05
"""How long kicks of a ring are not heard of which so many brought nothing. A descriptor can kick
without anybody: a timer's, or an eventfd that is a semaphore and was filled once."""

_ANY_DEVICE = (
    ProtocolFeature.MQ,
    ProtocolFeature.LOG_SHMFD,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.BACKEND_SEND_FD,
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.STATUS,
)
_VHOST_FEATURES = feature_mask(VhostFeature)
_FEATURES_OK = int(Status.FEATURES_OK)  # plain integers: flags cost more than the rest of a kick
_READY = int(Status.FEATURES_OK | Status.DRIVER_OK)
_WORKING_BITS = _READY | int(Status.NEEDS_RESET | Status.FAILED)
_DRIVER_UP = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


@runtime_checkable
class Announcing(Protocol):
    """A device that can tell the network where its guest is now (protocol feature RARP)."""

    def send_rarp(self, mac: bytes) -> None:
        """Broadcasts a RARP frame that seems to come from `mac`, 6 bytes."""


@runtime_checkable
class MtuLimited(Protocol):
    """A device that is told an MTU (protocol feature MTU)."""

    def set_mtu(self, mtu: int) -> bool:
        """Takes the host's MTU in bytes; False when it cannot."""


@runtime_checkable
class Stateful(Protocol):
    """A device with a state of its own to migrate (protocol feature DEVICE_STATE)."""

    def save_state(self) -> bytes:
        """All that the device knows beyond its queues' positions; they are stopped."""

    def load_state(self, state: bytes) -> None:
        """Takes over what `save_state` gave elsewhere. Raises `VqError` for what it cannot."""


def protocol_features(device: Device) -> int:
    """The protocol features that are offered for a device by default, as a set of bits.

    INBAND_NOTIFICATIONS is not among them, although it can be offered: frontends that know it use
    it instead of descriptors, at a multiple of the price. It is for simulations.
    """
    offered = feature_mask(_ANY_DEVICE)
    if isinstance(device, Announcing):
        offered |= 1 << ProtocolFeature.RARP
    if isinstance(device, MtuLimited):
        offered |= 1 << ProtocolFeature.MTU
    if isinstance(device, Stateful):
        offered |= 1 << ProtocolFeature.DEVICE_STATE
    return offered


def choose_offered(device: Device, wanted: int | None) -> int:
    """The protocol features to offer: those `wanted`, by default those of `protocol_features`.

    Raises `UsageError` when one of them cannot be offered for this device.
    """
    default = protocol_features(device)
    if wanted is None:
        return default
    surplus = wanted & ~(default | 1 << ProtocolFeature.INBAND_NOTIFICATIONS)
    if surplus:
        known = {feature.value: feature.name for feature in ProtocolFeature}
        names = (known.get(bit, f"bit {bit}") for bit in bits(surplus))
        raise UsageError(f"this device cannot offer {', '.join(names)}")
    return wanted


@dataclass(slots=True)
class _Slot:
    """One region of the memory table, as the frontend describes it and as it is mapped."""

    described: MemoryRegion
    region: Region
    count: int = 1
    """How many times it was added. QEMU before 8.1 adds and removes each region once for every
    queue pair."""


class Backend:
    """The backend's end of one connection.

    `send` takes the replies. `offered` are the protocol features to offer, a set of bits, by
    default those of `protocol_features`; `queue_num` is the answer to GET_QUEUE_NUM, by default the
    device's number of queues (for a network device frontends take it for the number of queue
    pairs). With `apart` other processes serve some of the queues; `on_fork` is called in each, with
    the loop that it has. Raises `UsageError` for protocol features that cannot be offered.

    The device is this backend's until `close`.
    """

    def __init__(
        self,
        device: Device,
        loop: Loop,
        send: Callable[[Message], None],
        *,
        offered: int | None = None,
        queue_num: int | None = None,
        apart: Apart | None = None,
        on_fork: Callable[[Loop], None] = lambda loop: None,
    ) -> None:
        self.device = device
        self.vrings = [Vring(index) for index in range(device.queue_count)]
        self.features = 0
        """What SET_FEATURES said, virtio's and vhost-user's bits."""
        self.protocol_features = 0
        self._loop = loop
        self._send = send
        self._offered = choose_offered(device, offered)
        self._queue_num = device.queue_count if queue_num is None else queue_num
        self._negotiated = False  # SET_FEATURES came since the last reset
        self._slots: list[_Slot] = []
        self._log_region: Region | None = None
        self._dirty_log: DirtyLog | None = None
        self._inflight: InflightRegion | None = None
        self._channel: Channel | None = None
        self._transfer: Transfer | None = None
        self._work: set[int] = set()  # queues to be notified in the next turn
        self._poll_timer: Timer | None = None
        self._fault_told = False
        self._processes = None if apart is None else Processes(self, loop, apart, on_fork=on_fork)
        device.on_queue_call = self._call
        device.on_config_change = self._config_changed
        device.on_work_left = self._notify_soon
        device.event_loop = loop
        device.on_shared_change = self._all_home

    # --- for the connection -----------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """Does what one message says, and sends the reply if there is to be one.

        Takes over the message and its descriptors. Raises `FrontendError` for what the protocol
        does not allow here, and `OSError` when the kernel refuses what the frontend handed over.
        """
        with message:
            request = message.request
            handler = _HANDLERS.get(request)
            needed = _NEEDED.get(request)
            if handler is None:
                raise FrontendError(f"{request.name}: never offered")
            if needed is not None and not self._has(needed):
                raise FrontendError(f"{request.name} without {needed.name} negotiated")
            try:
                reply = handler(self, message.payload, message)
            except FrontendError as error:
                raise FrontendError(f"{request.name}: {error}") from error
            except UsageError as error:
                raise FrontendError(f"{request.name}: {error}") from error
            if isinstance(reply, _Reply):
                if reply is not _LATER:
                    self._reply(request, reply.payload, reply.fds)
            elif message.need_reply and self._has(ProtocolFeature.REPLY_ACK):
                # "VHOST_USER_PROTOCOL_F_REPLY_ACK": zero says that it went well.
                self._reply(request, int(reply))

    def close(self) -> None:
        """Stops the device and gives back all that the frontend handed over."""
        if self._processes is not None:
            self._processes.close()
        for vring in self.vrings:
            self._pause(vring)
            self._forget_fds(vring)
        device = self.device
        device.on_queue_call = device.on_config_change = device.on_work_left = None
        device.on_shared_change = device.event_loop = None
        device.reset()
        device.memory = None
        for slot in self._slots:
            slot.region.close()
        self._slots.clear()
        self._work.clear()
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        for held in (self._channel, self._transfer, self._inflight, self._log_region):
            if held is not None:
                held.close()
        self._channel = self._transfer = self._inflight = self._log_region = None
        self._dirty_log = None

    # --- features ---------------------------------------------------------------------------------

    def _get_features(self, _: None, __: Message) -> _Reply:
        features = self.device.device_features | 1 << VhostFeature.PROTOCOL_FEATURES
        if self._offered >> ProtocolFeature.LOG_SHMFD & 1:
            features |= 1 << VhostFeature.LOG_ALL
        return _Reply(features)

    def _set_features(self, features: int, _: Message) -> bool:
        surplus = features & ~(self.device.device_features | _VHOST_FEATURES)
        if surplus:
            raise FrontendError(f"bits {list(bits(surplus))} were not offered")
        changed = (features ^ self.features) & ~_VHOST_FEATURES
        if changed and any(vring.running for vring in self.vrings):
            raise FrontendError(f"bits {list(bits(changed))} changed while rings run")
        self.features = features
        self._attach_log()
        if not any(vring.running for vring in self.vrings) and (
            changed or not self._negotiated or self._starts_anew()
        ):
            self._negotiate()
        if not features >> VhostFeature.PROTOCOL_FEATURES & 1:
            for vring in self.vrings:
                vring.enabled = True  # "Ring states"
        self._update_all()
        return False

    def _starts_anew(self) -> bool:
        """Whether features set once more mean a new driver, as no message says so otherwise."""
        says_so = self._has(ProtocolFeature.STATUS) or self._has(ProtocolFeature.RESET_DEVICE)
        return not says_so or bool(self.device.status & Status.NEEDS_RESET)

    def _negotiate(self) -> None:
        """Takes the device through virtio's negotiation, as far as the frontend leaves it to us."""
        device = self.device
        self._end_lives()
        if device.status:
            device.reset()
        self._negotiated = True
        self._fault_told = False
        device.accept_features(self._with_hidden(self.features & ~_VHOST_FEATURES))
        if not self._has(ProtocolFeature.STATUS):
            device.write_status(_DRIVER_UP & ~Status.DRIVER_OK)

    def _with_hidden(self, features: int) -> int:
        """The driver's features as far as the device can have them.

        A frontend that serves a queue itself (QEMU the network device's control queue) keeps that
        feature to itself, but not those that need it: then the needed one is added. Where several
        would do, the ones in need are left out.
        """
        needs = self.device.feature_needs
        for bit in bits(features):
            need = needs.get(bit, 0)
            if not need & features and need & self.device.device_features:
                hidden = need & self.device.device_features
                if not hidden & (hidden - 1):
                    features |= hidden
        return with_needs_met(features, needs)

    def _get_protocol_features(self, _: None, __: Message) -> _Reply:
        return _Reply(self._offered)

    def _set_protocol_features(self, features: int, _: Message) -> bool:
        if features & ~self._offered:
            surplus = list(bits(features & ~self._offered))
            raise FrontendError(f"bits {surplus} were not offered")
        in_band = 1 << ProtocolFeature.INBAND_NOTIFICATIONS
        needed = 1 << ProtocolFeature.BACKEND_REQ | 1 << ProtocolFeature.REPLY_ACK
        if features & in_band and features & needed != needed:
            raise FrontendError("INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK")
        self.protocol_features = features
        return False

    def _get_queue_num(self, _: None, __: Message) -> _Reply:
        return _Reply(self._queue_num)

    def _has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    # --- owner, reset, status ---------------------------------------------------------------------

    def _set_owner(self, _: None, __: Message) -> bool:
        return False

    def _reset_owner(self, _: None, __: Message) -> bool:
        # Deprecated: "either ignore this message, or use it to disable all rings".
        for vring in self.vrings:
            vring.enabled = False
        self._update_all()
        return False

    def _reset_device(self, _: None, __: Message) -> bool:
        for vring in self.vrings:
            self._pause(vring)
            vring.enabled = False
            vring.base, vring.next_used = 0, None
        self._reset()
        return False

    def _end_lives(self) -> None:
        """The device is about to be reset: no ring is its own any more."""
        for vring in self.vrings:
            self._pause(vring)
            vring.started = False

    def _reset(self) -> None:
        self._end_lives()
        self.device.reset()
        self._negotiated = False
        self._fault_told = False

    def _set_status(self, status: int, _: Message) -> bool:
        if status > 0xFF:
            raise FrontendError(f"a status of {status:#x}")
        if not status:
            self._reset()
            return False
        self._all_home()
        if not self._negotiated and self.features:
            self._negotiate()  # the features stand; a reset took them from the device alone
        self.device.write_status(status)
        self._update_all()
        if status & Status.DRIVER_OK:
            for vring in self.vrings:
                if vring.running:
                    self._notify_soon(vring.index)
        return False

    def _get_status(self, _: None, __: Message) -> _Reply:
        return _Reply(self.device.status)

    # --- memory -----------------------------------------------------------------------------------

    def _set_mem_table(self, table: MemoryTable, message: Message) -> bool:
        _check_table(table.regions)
        slots: list[_Slot] = []
        try:
            for described in table.regions:
                slots.append(_map_slot(described, message))
            memory = GuestMemory(slot.region for slot in slots)
            memory.dirty_log = self._log_in_use()
        except BaseException:
            for slot in slots:
                slot.region.close()
            raise
        old = self._slots
        self._replace_memory(memory, slots)
        for slot in old:
            slot.region.close()
        return False

    def _get_max_mem_slots(self, _: None, __: Message) -> _Reply:
        return _Reply(MAX_MEM_SLOTS)

    def _add_mem_reg(self, described: MemoryRegion, message: Message) -> bool:
        for slot in self._slots:
            if slot.described == described and os.path.sameopenfile(slot.region.fd, message.fds[0]):
                slot.count += 1
                return False
        if len(self._slots) >= MAX_MEM_SLOTS:
            raise FrontendError(f"more than {MAX_MEM_SLOTS} regions")
        _check_table([*(slot.described for slot in self._slots), described])
        slot = _map_slot(described, message)
        try:
            memory = self._memory().with_region(slot.region)
        except BaseException:
            slot.region.close()
            raise
        self._replace_memory(memory, [*self._slots, slot])
        return False

    def _rem_mem_reg(self, described: MemoryRegion, _: Message) -> bool:
        # The region is named by addresses and size; "the mmap offset is ignored".
        for slot in self._slots:
            if slot.described[:3] == described[:3]:
                break
        else:
            raise FrontendError(f"no region of {described.size:#x} bytes at {described.gpa:#x}")
        slot.count -= 1
        if slot.count:
            return False
        memory = self._memory().without_region(slot.region)
        self._replace_memory(memory, [other for other in self._slots if other is not slot])
        slot.region.close()
        return False

    def _memory(self) -> GuestMemory:
        return self.device.memory if self.device.memory is not None else GuestMemory()

    def _replace_memory(self, memory: GuestMemory, slots: list[_Slot]) -> None:
        """Puts other memory under the device: no ring keeps a view of the old one."""
        for vring in self.vrings:
            self._pause(vring)
        self._slots = slots
        self.device.memory = memory
        self._update_all()

    def _to_gpa(self, user_address: int, length: int) -> int | None:
        """The guest-physical address of a range that the frontend names by its own addresses."""
        for slot in self._slots:
            offset = user_address - slot.described.user_address
            if 0 <= offset <= slot.described.size - length:
                return slot.described.gpa + offset
        return None

    # --- dirty log --------------------------------------------------------------------------------

    def _set_log_base(self, area: LogArea | int, message: Message) -> _Reply:
        if not isinstance(area, LogArea) or not self._has(ProtocolFeature.LOG_SHMFD):
            raise FrontendError("a log that is not in shared memory")
        region = Region.from_fd(message.take_fd(), 0, area.size, offset=area.offset)
        old, self._log_region = self._log_region, region
        before, self._dirty_log = self._dirty_log, DirtyLog(region.view, other_writers=True)
        try:
            self._attach_log()
        except BaseException:
            self._log_region, self._dirty_log = old, before
            region.close()
            raise
        if old is not None:
            old.close()
        # "Communication" demands a reply without saying what is in it.
        return _Reply(0)

    def _set_log_fd(self, _: None, __: Message) -> bool:
        return False  # "optional": a reader that wants to know looks into the log

    def _log_in_use(self) -> DirtyLog | None:
        return self._dirty_log if self.features >> VhostFeature.LOG_ALL & 1 else None

    def _attach_log(self) -> None:
        self._all_home()
        if self.device.memory is not None:
            self.device.memory.dirty_log = self._log_in_use()

    # --- vrings -----------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise FrontendError(f"ring {index} of a device with {len(self.vrings)}")
        return self.vrings[index]

    def _stopped_vring(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise FrontendError(f"ring {index} runs")
        self._pause(vring)
        return vring

    def _set_vring_num(self, state: VringState, _: Message) -> bool:
        vring = self._vring(state.ring)
        if not 1 <= state.num <= MAX_QUEUE_SIZE or state.num & (state.num - 1):
            raise FrontendError(f"a size of {state.num} for ring {state.ring}")
        if state.num == vring.size:
            return False
        self._stopped_vring(state.ring)
        # The protocol does not tell a frontend how large a queue may be: what it chose must do.
        queue = self.device.queues[state.ring]
        queue.max_size = max(queue.max_size, state.num)
        vring.size = state.num
        self._update(vring)
        return False

    def _set_vring_addr(self, address: VringAddr, _: Message) -> bool:
        vring = self._vring(address.ring)
        if address.flags & ~VringFlag.LOG:
            raise FrontendError(f"flags {address.flags:#x}")
        parts = _parts(address, vring.size or 1)
        gpas = [self._to_gpa(start, length) for start, length in parts]
        if None in gpas:
            raise FrontendError(f"ring {address.ring} is not inside the guest's memory")
        if address.flags & VringFlag.LOG and gpas[2] != address.log:
            # The two differ only behind an IOMMU, and ACCESS_PLATFORM is not offered.
            raise FrontendError(
                f"the used ring at {gpas[2]:#x} is to be logged at {address.log:#x}"
            )
        if vring.address is not None and vring.address[2:5] == address[2:5]:
            vring.address = address  # logging goes on or off
            return False
        self._pause(vring)
        vring.address = address
        vring.next_used = None
        self._update(vring)
        return False

    def _set_vring_base(self, state: VringState, _: Message) -> bool:
        vring = self._stopped_vring(state.ring)
        if state.num > 0xFFFF:
            raise FrontendError(f"a position of {state.num:#x} in a split ring")
        vring.base = state.num
        vring.next_used = None
        self._update(vring)
        return False

    def _get_vring_base(self, state: VringState, _: Message) -> _Reply:
        """Stops the ring: it starts again with a new kick descriptor ("Ring states")."""
        vring = self._vring(state.ring)
        self._pause(vring)
        self._forget_fds(vring)
        vring.started = False
        vring.next_used = None
        return _Reply(VringState(state.ring, vring.base))

    def _set_vring_enable(self, state: VringState, _: Message) -> bool:
        vring = self._vring(state.ring)
        if state.num > 1:
            raise FrontendError(f"{state.num} is neither on nor off")
        vring.enabled = bool(state.num)
        self._update(vring)
        return False

    def _set_vring_kick(self, which: VringFd, message: Message) -> bool:
        vring = self._vring(which.ring)
        self._home(vring)
        if which.has_fd:
            os.set_blocking(message.fds[0], False)
        self._unwatch_kick(vring)
        if which.has_fd:
            vring.kick, vring.kick_fd = Kick.FD, message.take_fd()
        else:
            vring.kick = Kick.POLLED
        vring.started = True
        if vring.held is Held.NOTHING:
            self._update(vring)
        else:
            self._watch_kick(vring)
            self._notify_soon(vring.index)
        return False

    def _set_vring_call(self, which: VringFd, message: Message) -> bool:
        vring = self._vring(which.ring)
        self._home(vring)
        if which.has_fd:
            os.set_blocking(message.fds[0], False)
        vring.call_fd = close_fd(vring.call_fd)
        vring.call_was_set = True
        if which.has_fd:
            vring.call_fd = message.take_fd()
            if vring.call_missed:
                self._call(vring.index)
        return False

    def _set_vring_err(self, which: VringFd, message: Message) -> bool:
        vring = self._vring(which.ring)
        if which.has_fd:
            os.set_blocking(message.fds[0], False)
        vring.err_fd = close_fd(vring.err_fd)
        vring.err_was_set = True
        if which.has_fd:
            vring.err_fd = message.take_fd()
        return False

    def _vring_kick(self, state: VringState, _: Message) -> bool:
        vring = self._vring(state.ring)
        if state.num:
            raise FrontendError(f"{state.num} in a field that must be zero")
        if vring.kick is Kick.NONE:
            vring.kick = Kick.IN_BAND
            vring.started = True
            self._update(vring)
        # In time for the acknowledgement, which tells a simulation that the kick was served.
        self.device.notify(vring.index)
        return False

    # --- rings: from what was said to what the device has -----------------------------------------

    def _update_all(self) -> None:
        for vring in self.vrings:
            self._update(vring)

    def _update(self, vring: Vring) -> None:
        """Starts or stops a ring as what was said about it asks for."""
        wanted, before = self._wanted(vring), vring.held
        if wanted is before or (wanted is Held.ENABLED and before is Held.LENT):
            return
        self._pause(vring)
        if wanted is Held.NOTHING:
            return
        self._start(vring, wanted)
        if vring.held is not Held.DISABLED:
            return
        if before in (Held.ENABLED, Held.LENT):
            self.device.notify(vring.index)
        else:
            look = partial(self._look_at_disabled, vring)
            vring.look = self._loop.call_later(ENABLE_SECONDS, look)

    def _wanted(self, vring: Vring) -> Held:
        """What the device should have of the ring."""
        ready = (
            vring.kick is not Kick.NONE
            and vring.size > 0
            and vring.address is not None
            and bool(self.device.status & Status.FEATURES_OK)
        )
        if ready and vring.enabled:
            return Held.ENABLED
        return Held.DISABLED if ready and vring.started else Held.NOTHING

    def _look_at_disabled(self, vring: Vring) -> None:
        vring.look = None
        self.device.notify(vring.index)

    def _start(self, vring: Vring, wanted: Held) -> None:
        """Gives the ring to the device, if the memory that it lies in is there."""
        if vring.address is None:
            return
        gpas = [self._to_gpa(*part) for part in _parts(vring.address, vring.size)]
        desc, avail, used = gpas
        if desc is None or avail is None or used is None:
            log.info("ring %d waits for the memory that it lies in", vring.index)
            return
        device = self.device
        if not self._has(ProtocolFeature.STATUS):
            device.write_status(_DRIVER_UP)
        next_used = vring.next_used
        if next_used is None:
            # virtio 1.3, 2.7.8: idx stands two bytes into the used ring.
            next_used = int.from_bytes(self._memory().read(used + 2, 2), "little")
        next_avail, resubmit = vring.base, list[int]()
        notes = None if self._inflight is None else self._inflight.queue(vring.index)
        if notes is not None:
            if vring.size > notes.size:
                raise FrontendError(
                    f"ring {vring.index} has {vring.size} descriptors, its inflight notes"
                    f" {notes.size}"
                )
            recovered = notes.recover(next_used)
            if recovered is not None:
                # Whoever had the ring before took as many chains as it gave back and still had.
                resubmit = [head for head in recovered if head < vring.size]
                next_avail = next_used + len(resubmit) & 0xFFFF
                if resubmit:
                    log.info(
                        "ring %d: %d requests that an earlier backend left undone are taken up",
                        vring.index,
                        len(resubmit),
                    )
                    device.stats["resubmitted"] += len(resubmit)
        device.setup_queue(
            vring.index,
            size=vring.size,
            desc=desc,
            avail=avail,
            used=used,
            next_avail=next_avail,
            next_used=next_used,
            resubmit=resubmit,
            inflight_log=notes,
            enabled=wanted is Held.ENABLED,
        )
        vring.held = wanted
        vring.started = True
        self._watch_kick(vring)
        if wanted is Held.ENABLED:
            # The kick for what is there already may have gone to an earlier backend.
            self._notify_soon(vring.index)
            if self._processes is not None:
                self._processes.lend_when_calm()
        self._tell_fault()

    def _pause(self, vring: Vring, *, lent: bool = False) -> None:
        """Takes the ring from the device; it can go on at the same place, or be `lent`."""
        self._home(vring)
        if vring.held is Held.NOTHING:
            return
        vring.held = Held.NOTHING
        if vring.look is not None:
            vring.look.cancel()
            vring.look = None
        self._end_rest(vring)
        if vring.kick_fd >= 0:
            self._loop.watch(vring.kick_fd)
        queue = self.device.queues[vring.index]
        ring = queue.ring
        if ring is not None:  # a ring that broke the rules was never set up
            try:
                self.device.publish(queue)
                stop = self.device.lend_queue if lent else self.device.stop_queue
                vring.base = stop(vring.index)
            except Exception:
                # A fault of the model must not keep the rest from being given back.
                log.exception("ring %d: the device model failed to stop it", vring.index)
            vring.next_used = ring.next_used

    def _watch_kick(self, vring: Vring) -> None:
        self._end_rest(vring)
        if vring.kick is Kick.FD:
            self._loop.watch(vring.kick_fd, readable=partial(self._kicked, vring))
        elif vring.kick is Kick.POLLED and self._poll_timer is None:
            self._poll_timer = self._loop.call_later(POLL_SECONDS, self._poll)

    def _unwatch_kick(self, vring: Vring) -> None:
        if vring.kick_fd >= 0:
            self._loop.watch(vring.kick_fd)
            vring.kick_fd = close_fd(vring.kick_fd)
        vring.kick = Kick.NONE

    def _kicked(self, vring: Vring) -> None:
        vring.kicks += 1
        if vring.kicks >= MANY_KICKS and self._kicks_in_vain(vring):
            return
        try:
            alive = drain(vring.kick_fd)
        except BlockingIOError:
            return
        except (OSError, MadeToWait) as error:
            log.warning("ring %d: its kick descriptor cannot be read: %s", vring.index, str(error))
            alive = False
        if not alive:  # a pipe whose writer is gone would stay readable for ever
            self._loop.watch(vring.kick_fd)
            return
        self._hear_of_driver()
        self.device.notify(vring.index)

    def _kicks_in_vain(self, vring: Vring) -> bool:
        """Whether no buffer came with so many kicks; then no more are heard for a while."""
        ring = self.device.queues[vring.index].ring
        index = -1 if ring is None else ring.avail_index
        before, vring.kicked_at = vring.kicked_at, index
        vring.kicks = 0
        if index != before:
            return False
        log.info("ring %d: kicks that bring nothing, more than are heard", vring.index)
        self._loop.watch(vring.kick_fd)
        vring.rest = self._loop.call_later(REST_SECONDS, partial(self._hear_again, vring))
        return True

    def _hear_again(self, vring: Vring) -> None:
        self._watch_kick(vring)
        self._hear_of_driver()
        self.device.notify(vring.index)

    def _end_rest(self, vring: Vring) -> None:
        if vring.rest is not None:
            vring.rest.cancel()
            vring.rest = None

    def _hear_of_driver(self) -> None:
        """Who kicks a ring that runs is up (virtio 1.3, 3.1.1: no kick before DRIVER_OK).

        QEMU 7.2 never says so for some kinds of devices, entropy among them: it leaves the last
        status to the last of several connections, which a device with one connection is not.
        """
        if self.device.status & _READY == _FEATURES_OK:
            self.device.write_status(self.device.status | Status.DRIVER_OK)
            if self._processes is not None:
                self._processes.lend_when_calm()

    def _poll(self) -> None:
        self._poll_timer = None
        polled = [
            vring
            for vring in self.vrings
            if vring.held in (Held.DISABLED, Held.ENABLED) and vring.kick is Kick.POLLED
        ]
        for vring in polled:
            self.device.notify(vring.index)
        if polled:
            self._poll_timer = self._loop.call_later(POLL_SECONDS, self._poll)

    def _notify_soon(self, index: int) -> None:
        if index in self._work:
            return
        self._work.add(index)
        self._loop.call_soon(lambda: self._do_work(index))

    def _do_work(self, index: int) -> None:
        if index in self._work:
            self._work.discard(index)
            self.device.notify(index)

    def _forget_fds(self, vring: Vring) -> None:
        self._unwatch_kick(vring)
        vring.call_fd = close_fd(vring.call_fd)
        vring.err_fd = close_fd(vring.err_fd)
        vring.call_was_set = vring.err_was_set = vring.call_missed = False

    # --- rings in other processes (`vq.vhost_processes`) ------------------------------------------

    def _home(self, vring: Vring) -> None:
        """Something about the ring is about to change: nobody else is to work on it."""
        if vring.held is Held.LENT and self._processes is not None:
            self._processes.recall(vring)

    def _all_home(self) -> None:
        """Likewise for what all rings go by."""
        if self._processes is not None:
            self._processes.recall_all()

    def may_be_lent(self, vring: Vring) -> bool:
        """See `vq.vhost_processes.Rings`."""
        return (
            may_be_lent(vring)
            and self.device.status & _WORKING_BITS == _READY
            and not self._has(ProtocolFeature.INBAND_NOTIFICATIONS)
        )

    def lend(self, vring: Vring) -> Position:
        """See `vq.vhost_processes.Rings`."""
        self._pause(vring, lent=True)
        vring.held = Held.LENT
        unfinished = tuple(self.device.queues[vring.index].unfinished)
        return Position(vring.base, vring.next_used, unfinished)

    def come_home(self, vring: Vring, position: Position | None) -> None:
        """See `vq.vhost_processes.Rings`."""
        vring.base, vring.next_used, unfinished = position or self._used_position(vring)
        vring.held = Held.NOTHING
        self.device.take_queue_back(vring.index, unfinished)
        self._start(vring, Held.ENABLED)
        if position is None:
            self._call(vring.index)  # the last call may have died with the process

    def _used_position(self, vring: Vring) -> Position:
        """Where to go on with a ring of which only guest memory knows: where the used ring stands.

        Right for a device that uses chains in their order, and for others that have inflight notes.
        """
        assert vring.address is not None, "it was lent"
        used = self._to_gpa(*_parts(vring.address, vring.size)[2])
        assert used is not None, "it was lent"
        index = int.from_bytes(self._memory().read(used + 2, 2), "little")
        return Position(index, index)

    def serve_only(
        self, queues: Collection[int], loop: Loop, give_back: Callable[[], None]
    ) -> None:
        """See `vq.vhost_processes.Rings`."""
        for other in (self._channel, self._transfer):  # the frontend talks to the other process
            if other is not None:
                other.close()
        self._loop = loop
        self._processes = self._channel = self._transfer = self._poll_timer = None
        self._work.clear()
        device = self.device
        device.event_loop = loop
        device.on_config_change, device.on_shared_change = give_back, None
        device.keep_only(queues)
        for vring in self.vrings:
            vring.held, vring.look, vring.rest = Held.NOTHING, None, None
            if vring.index in queues:
                self._start(vring, Held.ENABLED)

    def end_serving(self, queues: Collection[int]) -> Return:
        """See `vq.vhost_processes.Rings`."""
        positions = {}
        for index in queues:
            vring = self.vrings[index]
            self._pause(vring)
            unfinished = tuple(self.device.queues[index].unfinished)
            positions[index] = Position(vring.base, vring.next_used, unfinished)
        return Return(positions, self.device.fault)

    # --- towards the frontend ---------------------------------------------------------------------

    def _reply(
        self, request: Request | BackendRequest, payload: Payload, fds: Iterable[int] = ()
    ) -> None:
        self._send(Message(request, payload, list(fds), reply=True))

    def _call(self, index: int) -> None:
        vring = self.vrings[index]
        if vring.call_fd >= 0:
            vring.call_missed = False
            try:
                signal_event(vring.call_fd)
            except (OSError, MadeToWait) as error:
                if _is_to_be_closed(vring, vring.call_fd, error):
                    vring.call_fd = close_fd(vring.call_fd)
        elif vring.call_was_set:
            pass  # the frontend polls
        elif self._channel is not None and self._has(ProtocolFeature.INBAND_NOTIFICATIONS):
            self._channel.send(
                Message(BackendRequest.VRING_CALL, VringState(index, 0), need_reply=True)
            )
        else:
            vring.call_missed = True

    def _config_changed(self) -> None:
        self._tell_fault()
        # "Suspended device state": with all rings stopped no message is sent.
        if (
            self._channel is not None
            and self._has(ProtocolFeature.CONFIG)
            and any(vring.running for vring in self.vrings)
        ):
            self._channel.send(Message(BackendRequest.CONFIG_CHANGE_MSG))

    def _tell_fault(self) -> None:
        """Signals every ring's error descriptor, once per fault, when the device needs a reset."""
        if self._fault_told or not self.device.status & Status.NEEDS_RESET:
            return
        self._all_home()
        self._fault_told = True
        for vring in self.vrings:
            if not vring.running:
                continue
            if vring.err_fd >= 0:
                try:
                    signal_event(vring.err_fd)
                except (OSError, MadeToWait) as error:
                    if _is_to_be_closed(vring, vring.err_fd, error):
                        vring.err_fd = close_fd(vring.err_fd)
            elif (
                self._channel is not None
                and not vring.err_was_set
                and self._has(ProtocolFeature.INBAND_NOTIFICATIONS)
            ):
                state = VringState(vring.index, 0)
                self._channel.send(Message(BackendRequest.VRING_ERR, state, need_reply=True))

    def _set_backend_req_fd(self, _: None, message: Message) -> bool:
        channel = Channel(message.take_fd(), self._loop)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        return False

    # --- configuration space, network -------------------------------------------------------------

    def _get_config(self, config: Config, _: Message) -> _Reply:
        data = self.device.read_config(config.offset, len(config.data))
        return _Reply(Config(config.offset, config.flags, data))

    def _set_config(self, config: Config, _: Message) -> bool:
        if config.flags == ConfigFlag.WRITABLE:
            self.device.write_config(config.offset, config.data)
            return False
        if config.flags != ConfigFlag.MIGRATION:
            raise FrontendError(f"flags {config.flags:#x}")
        space = self.device.config
        if space is None or config.offset + len(config.data) > ctypes.sizeof(space):
            return True
        # Read-only fields too: this is what the guest saw on the host that it comes from.
        view = memoryview(space).cast("B")
        view[config.offset : config.offset + len(config.data)] = config.data
        return False

    def _send_rarp(self, mac: int, _: Message) -> bool:
        if not isinstance(self.device, Announcing):
            return True
        # "The first 6 bytes of the payload contain the mac address".
        self.device.send_rarp(mac.to_bytes(8, sys.byteorder)[:6])
        return False

    def _net_set_mtu(self, mtu: int, _: Message) -> bool:
        return not (isinstance(self.device, MtuLimited) and self.device.set_mtu(mtu))

    # --- inflight notes, device state -------------------------------------------------------------

    def _get_inflight_fd(self, asked: Inflight, _: Message) -> _Reply:
        self._check_inflight(asked)
        size = InflightRegion.size_for(asked.queues, asked.queue_size)
        region = Region.anonymous(0, size, name="vq-inflight")
        self._take_inflight(InflightRegion(region, asked.queues, asked.queue_size))
        described = Inflight(size, 0, asked.queues, asked.queue_size)
        return _Reply(described, [os.dup(region.fd)])

    def _set_inflight_fd(self, described: Inflight, message: Message) -> bool:
        self._check_inflight(described)
        region = Region.from_fd(
            message.take_fd(), 0, described.mmap_size, offset=described.mmap_offset
        )
        try:
            inflight = InflightRegion(region, described.queues, described.queue_size)
        except BaseException:
            region.close()
            raise
        self._take_inflight(inflight)
        return False

    def _check_inflight(self, asked: Inflight) -> None:
        if not 1 <= asked.queues <= len(self.vrings):
            raise FrontendError(f"{asked.queues} queues of a device with {len(self.vrings)}")
        if not 1 <= asked.queue_size <= MAX_QUEUE_SIZE:
            raise FrontendError(f"a queue of {asked.queue_size} descriptors")
        if any(vring.running for vring in self.vrings):
            raise FrontendError("rings run")

    def _take_inflight(self, inflight: InflightRegion) -> None:
        for vring in self.vrings:
            self._pause(vring)  # those that are disabled
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = inflight
        self._update_all()

    def _set_device_state_fd(self, transfer: DeviceStateTransfer, message: Message) -> _Reply:
        if transfer.direction > 1 or transfer.phase:
            raise FrontendError(f"direction {transfer.direction}, phase {transfer.phase}")
        if not isinstance(self.device, Stateful) or any(v.running for v in self.vrings):
            return _Reply(_STATE_REFUSED)  # "Migrating back-end state": the device is suspended
        if self._transfer is not None:
            self._transfer.close()
        load = self.device.load_state if transfer.direction else None
        state = b"" if transfer.direction else self.device.save_state()
        self._transfer = Transfer(message.take_fd(), self._loop, state, load)
        return _Reply(_STATE_OVER_YOUR_FD)

    def _check_device_state(self, _: None, __: Message) -> _Reply:
        if self._transfer is None:
            return _Reply(1)
        request = Request.CHECK_DEVICE_STATE
        self._transfer.when_done(lambda failed: self._reply(request, int(failed)))
        return _LATER


class _Reply:
    """An answer with a form of its own, and the descriptors that go with it."""

    def __init__(self, payload: Payload, fds: Iterable[int] = ()) -> None:
        self.payload = payload
        self.fds = fds


_LATER = _Reply(None)
_STATE_OVER_YOUR_FD = 0x100  # bits 0 to 7: success; bit 8: no descriptor comes back
_STATE_REFUSED = 0x101

# A handler gives a `_Reply` where the protocol has a reply of its own, else whether it failed.
_Handler = Callable[[Backend, Any, Message], _Reply | bool]

_HANDLERS: dict[Request | BackendRequest, _Handler] = {
    Request.GET_FEATURES: Backend._get_features,
    Request.SET_FEATURES: Backend._set_features,
    Request.SET_OWNER: Backend._set_owner,
    Request.RESET_OWNER: Backend._reset_owner,
    Request.SET_MEM_TABLE: Backend._set_mem_table,
    Request.SET_LOG_BASE: Backend._set_log_base,
    Request.SET_LOG_FD: Backend._set_log_fd,
    Request.SET_VRING_NUM: Backend._set_vring_num,
    Request.SET_VRING_ADDR: Backend._set_vring_addr,
    Request.SET_VRING_BASE: Backend._set_vring_base,
    Request.GET_VRING_BASE: Backend._get_vring_base,
    Request.SET_VRING_KICK: Backend._set_vring_kick,
    Request.SET_VRING_CALL: Backend._set_vring_call,
    Request.SET_VRING_ERR: Backend._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    Request.GET_QUEUE_NUM: Backend._get_queue_num,
    Request.SET_VRING_ENABLE: Backend._set_vring_enable,
    Request.SEND_RARP: Backend._send_rarp,
    Request.NET_SET_MTU: Backend._net_set_mtu,
    Request.SET_BACKEND_REQ_FD: Backend._set_backend_req_fd,
    Request.GET_CONFIG: Backend._get_config,
    Request.SET_CONFIG: Backend._set_config,
    Request.GET_INFLIGHT_FD: Backend._get_inflight_fd,
    Request.SET_INFLIGHT_FD: Backend._set_inflight_fd,
    Request.RESET_DEVICE: Backend._reset_device,
    Request.VRING_KICK: Backend._vring_kick,
    Request.GET_MAX_MEM_SLOTS: Backend._get_max_mem_slots,
    Request.ADD_MEM_REG: Backend._add_mem_reg,
    Request.REM_MEM_REG: Backend._rem_mem_reg,
    Request.SET_STATUS: Backend._set_status,
    Request.GET_STATUS: Backend._get_status,
    Request.SET_DEVICE_STATE_FD: Backend._set_device_state_fd,
    Request.CHECK_DEVICE_STATE: Backend._check_device_state,
}

_NEEDED: dict[Request | BackendRequest, ProtocolFeature] = {
    Request.SEND_RARP: ProtocolFeature.RARP,
    Request.NET_SET_MTU: ProtocolFeature.MTU,
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.VRING_KICK: ProtocolFeature.INBAND_NOTIFICATIONS,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_DEVICE_STATE_FD: ProtocolFeature.DEVICE_STATE,
    Request.CHECK_DEVICE_STATE: ProtocolFeature.DEVICE_STATE,
}


def _parts(address: VringAddr, size: int) -> tuple[tuple[int, int], ...]:
    """Start and length in bytes of a ring's descriptor table, available ring and used ring."""
    layout = ring_layout(size)
    return (
        (address.desc, layout.desc_bytes),
        (address.avail, layout.avail_bytes),
        (address.used, layout.used_bytes),
    )


def _check_table(regions: Iterable[MemoryRegion]) -> None:
    """Refuses regions that wrap around or overlap in the frontend's address space."""
    end = 0
    for region in sorted(regions, key=lambda region: region.user_address):
        if region.user_address < end:
            raise FrontendError(f"regions overlap at user address {region.user_address:#x}")
        end = region.user_address + region.size
        if max(end, region.gpa + region.size, region.mmap_offset + region.size) > 1 << 64:
            raise FrontendError(f"the region at {region.gpa:#x} wraps around 2^64")


def _map_slot(described: MemoryRegion, message: Message) -> _Slot:
    """Maps a region from the message's next descriptor.

    Overlaps in the guest's address space, and sizes of nothing or beyond the file, are for the
    memory to refuse.
    """
    fd = message.take_fd()
    region = Region.from_fd(fd, described.gpa, described.size, offset=described.mmap_offset)
    return _Slot(described, region)


def _is_to_be_closed(vring: Vring, fd: int, error: OSError | MadeToWait) -> bool:
    """Whether a descriptor that an event could not be written to is not to be used again.

    Once may be because all of this machine stood still.
    """
    if not isinstance(error, MadeToWait):
        log.debug("an event descriptor cannot be written: %s", error)
        return False
    vring.waits += 1
    if vring.waits > 1:
        log.warning("ring %d: %s: it gets no more events", vring.index, str(error))
        return True
    log.warning("ring %d: %s", vring.index, str(error))
    os.set_blocking(fd, False)
    return False
