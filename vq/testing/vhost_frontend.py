"""A scripted vhost-user frontend: what stands between a guest's driver and a served device.

`VhostFrontend` is a `vq.driver.Transport`, so `Driver` and `NetDriver` drive a device on the other
end of a socket as they drive one in the same process. It does what QEMU does of the protocol, and
goes on with the same rings after a backend has died (`reconnect`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vq.abi import DeviceId, Status, feature_mask
from vq.driver import DeviceError
from vq.errors import UsageError
from vq.memory import GuestMemory, Region
from vq.unix_socket import connect
from vq.vhost_message import (
    BackendRequest,
    Config,
    ConfigFlag,
    Decoder,
    Inflight,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    VhostFeature,
    VringAddr,
    VringFd,
    VringState,
    encode,
)

__all__ = ["VhostFrontend"]

_PROTOCOL = feature_mask(
    (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.STATUS,
    )
)
_EVENT = (1).to_bytes(8, sys.byteorder)  # one event of an eventfd, and as good as any in a pipe
_FDS = 8


class _Vring(NamedTuple):
    """A ring that the driver has set up; `kick` and `call` are our ends of two pipes."""

    size: int
    desc: int
    avail: int
    used: int
    kick: int
    call: int


class VhostFrontend:
    """A frontend of the backend that listens at `path`, or is at the other end of a socket.

    It waits up to `timeout` seconds until somebody listens. `memory` is the guest's. vhost-user
    tells neither a device's type nor the number of its queues and their sizes: `device_id`,
    `queue_count` and `queue_size` do. `queue_count` is by default what a network device has with
    the queue pairs that the backend announces.

    `idle` is called while the frontend waits: where the backend is served by a `Loop` of the same
    thread `idle` has to give it a turn (``lambda: loop.run_once(0)``).

    Calls of the backend are seen in `poll` and `wait`. Raises `OSError` when the backend is not
    there or closes the connection, `DeviceError` when it refuses something or does not answer for
    `timeout` seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        memory: GuestMemory,
        *,
        device_id: int = DeviceId.NET,
        queue_count: int | None = None,
        queue_size: int = 256,
        protocol: int = -1,
        idle: Callable[[], None] | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.on_queue_call: Callable[[int], None] | None = None
        self.on_config_change: Callable[[], None] | None = None
        self.device_id = device_id
        self.device_features = 0
        self.config_generation = 0
        self.protocol_features = 0
        """What was negotiated of vhost-user itself."""
        self.calls = 0
        """How many calls have come."""
        self._memory = memory
        self._protocol = _PROTOCOL & protocol
        self._queue_size = queue_size
        self._idle = idle
        self._timeout = timeout
        self._features: int | None = None
        self._status = 0
        self._vrings: dict[int, _Vring] = {}
        self._inflight: tuple[Inflight, int] | None = None
        self._path = None if isinstance(path, socket.socket) else os.fspath(path)
        self._socket: socket.socket | None = None
        self._channel: socket.socket | None = None
        try:
            self._connect(path if isinstance(path, socket.socket) else None)
            pairs = self._ask(Request.GET_QUEUE_NUM) if self._has(ProtocolFeature.MQ) else 1
            self.queue_count = 2 * pairs + 1 if queue_count is None else queue_count
            if self._has(ProtocolFeature.INFLIGHT_SHMFD):
                self._get_inflight()
        except BaseException:
            self.close()
            raise

    # --- Transport ------------------------------------------------------------------------------

    def accept_features(self, mask: int, /) -> None:
        """See `Transport`."""
        self._features = mask
        self._tell(Request.SET_FEATURES, mask | 1 << VhostFeature.PROTOCOL_FEATURES)

    @property
    def status(self) -> int:
        """What the driver has written, as far as the backend agrees."""
        if not self._has(ProtocolFeature.STATUS):
            return self._status
        theirs = self._ask(Request.GET_STATUS)
        agreed = self._status & ~(~theirs & Status.FEATURES_OK)
        return int(agreed | theirs & Status.NEEDS_RESET)

    def write_status(self, value: int, /) -> None:
        """See `Transport`."""
        if not value:
            for index in list(self._vrings):
                self.reset_queue(index)
            self._forget_inflight()
        self._status = value
        if self._has(ProtocolFeature.STATUS):
            self._tell(Request.SET_STATUS, value)

    def read_config(self, offset: int, length: int, /) -> bytes:
        """See `Transport`."""
        config = self._ask_for(
            Request.GET_CONFIG, Config(offset, ConfigFlag.WRITABLE, bytes(length))
        ).payload
        if not isinstance(config, Config) or len(config.data) != length:
            raise DeviceError(f"{length} bytes of configuration at {offset} cannot be read")
        return config.data

    def write_config(self, offset: int, data: bytes, /) -> None:
        """See `Transport`."""
        self._tell(Request.SET_CONFIG, Config(offset, ConfigFlag.WRITABLE, data))

    def queue_max_size(self, index: int, /) -> int:
        """See `Transport`."""
        return self._queue_size if index < self.queue_count else 0

    def setup_queue(self, index: int, /, *, size: int, desc: int, avail: int, used: int) -> None:
        """See `Transport`."""
        self._start_ring(index, size, desc, avail, used, base=0)

    def reset_queue(self, index: int, /) -> None:
        """Stops a ring: the device is done with it then."""
        self._ask_for(Request.GET_VRING_BASE, VringState(index, 0))
        self._close_events(index)

    def enable(self, index: int, enabled: bool) -> None:
        """Enables or disables a ring that is set up, as frontends do with queue pairs."""
        self._tell(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))

    def notify(self, index: int, /) -> None:
        """Kicks. Nothing happens when the backend is dead."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._vrings[index].kick, _EVENT)

    # --- events ---------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Hands on the calls and configuration changes that have come; whether there were any."""
        return self._wait_for_events(0)

    def wait(self, seconds: float = 0.005) -> bool:
        """Likewise, but waits up to `seconds` for one: what `NetDriver` takes as its `idle`."""
        return self._wait_for_events(seconds)

    # --- connections ----------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Goes away without a word, as a frontend that dies; the guest's memory stays."""
        for sock in (self._socket, self._channel):
            if sock is not None:
                sock.close()
        self._socket = self._channel = None

    def reconnect(self, sock: socket.socket | None = None) -> None:
        """Goes on with another backend, at the same path or at the end of `sock`.

        It gets the same features, memory and inflight notes, and the rings where the used ring in
        the guest's memory says that the last backend stopped. Waits up to `timeout` seconds until
        somebody listens.
        """
        self.disconnect()
        self._connect(sock)
        if self._inflight is not None:
            description, fd = self._inflight
            self._tell(Request.SET_INFLIGHT_FD, description, [fd])
        if self._features is not None:
            self.accept_features(self._features)
        if self._has(ProtocolFeature.STATUS):
            self._tell(Request.SET_STATUS, self._status & ~Status.DRIVER_OK)
        for index, vring in list(self._vrings.items()):
            self._close_events(index)
            base = self._memory.load16(vring.used + 2)  # virtio 1.3, 2.7.8
            self._start_ring(index, vring.size, vring.desc, vring.avail, vring.used, base=base)
        if self._has(ProtocolFeature.STATUS):
            self._tell(Request.SET_STATUS, self._status)
        for index in list(self._vrings):  # a last call may have gone to the pipe that was closed
            if self.on_queue_call is not None:
                self.on_queue_call(index)

    def close(self) -> None:
        """Gives back all that the frontend holds; the memory is the caller's."""
        self.disconnect()
        for index in list(self._vrings):
            self._close_events(index)
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None

    def __enter__(self) -> VhostFrontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, sock: socket.socket | None) -> None:
        self._socket = sock or self._find_backend()
        self._socket.setblocking(False)
        self._decoder = Decoder(replies=True)
        self.protocol_features = 0
        self._tell(Request.SET_OWNER)
        offered = self._ask(Request.GET_FEATURES)
        self.device_features = offered & ~feature_mask(VhostFeature)
        if not offered >> VhostFeature.PROTOCOL_FEATURES & 1:
            raise DeviceError("the backend does not offer PROTOCOL_FEATURES")
        common = self._ask(Request.GET_PROTOCOL_FEATURES) & self._protocol
        self._tell(Request.SET_PROTOCOL_FEATURES, common)
        self.protocol_features = common
        if self._has(ProtocolFeature.BACKEND_REQ):
            self._open_channel()
        regions = self._memory.regions
        table = MemoryTable(
            tuple(
                MemoryRegion(region.gpa, region.size, region.address, region.offset)
                for region in regions
            )
        )
        self._tell(Request.SET_MEM_TABLE, table, [region.fd for region in regions])

    def _find_backend(self) -> socket.socket:
        if self._path is None:
            raise UsageError("a frontend that was given a socket needs another one to reconnect")
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if time.monotonic() > deadline:
                    raise
            self._rest(0.005)

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = ours
        self._channel_decoder = Decoder(BackendRequest)
        ours.setblocking(False)
        with theirs:
            self._tell(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])

    # --- rings ----------------------------------------------------------------------------------

    def _start_ring(
        self, index: int, size: int, desc: int, avail: int, used: int, *, base: int
    ) -> None:
        kick_end, kick = os.pipe()
        call, call_end = os.pipe()
        for fd in (kick, call):
            os.set_blocking(fd, False)
        self._vrings[index] = _Vring(size, desc, avail, used, kick, call)
        try:
            self._tell(Request.SET_VRING_NUM, VringState(index, size))
            self._tell(Request.SET_VRING_BASE, VringState(index, base))
            places = VringAddr(
                index,
                0,
                desc=self._memory.hvaddr(desc),
                used=self._memory.hvaddr(used),
                avail=self._memory.hvaddr(avail),
                log=0,
            )
            self._tell(Request.SET_VRING_ADDR, places)
            self._tell(Request.SET_VRING_CALL, VringFd(index, True), [call_end])
            self._tell(Request.SET_VRING_KICK, VringFd(index, True), [kick_end])
        finally:
            os.close(kick_end)
            os.close(call_end)
        self.enable(index, True)

    def _close_events(self, index: int) -> None:
        vring = self._vrings.pop(index, None)
        if vring is not None:
            os.close(vring.kick)
            os.close(vring.call)

    def _get_inflight(self) -> None:
        asked = Inflight(0, 0, self.queue_count, self._queue_size)
        reply = self._ask_for(Request.GET_INFLIGHT_FD, asked)
        if isinstance(reply.payload, Inflight) and reply.fds:
            self._inflight = reply.payload, reply.take_fd()

    def _forget_inflight(self) -> None:
        """After a reset nothing is in flight."""
        if self._inflight is not None:
            description, fd = self._inflight
            size, offset = description.mmap_size, description.mmap_offset
            notes = Region.from_fd(os.dup(fd), 0, size, offset=offset)
            notes.view[:] = bytes(size)
            notes.close()

    # --- messages -------------------------------------------------------------------------------

    def _has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    def _ask(self, request: Request) -> int:
        """Sends a request that is answered with a number."""
        number = self._ask_for(request).payload
        if not isinstance(number, int):
            raise DeviceError(f"{request.name} was not answered with a number")
        return number

    def _ask_for(self, request: Request, payload: Payload = None) -> Message:
        self._send(Message(request, payload))
        return self._reply_to(request)

    def _tell(self, request: Request, payload: Payload = None, fds: Sequence[int] = ()) -> None:
        """Sends a request without an answer of its own; sees to it that the backend agrees."""
        acknowledged = self._has(ProtocolFeature.REPLY_ACK)
        self._send(Message(request, payload, list(fds), need_reply=acknowledged))
        if acknowledged and self._reply_to(request).payload:
            raise DeviceError(f"the backend refused {request.name}")

    def _send(self, message: Message) -> None:
        if self._socket is None:
            raise ConnectionError("the frontend is not connected")
        data = encode(message)
        while True:
            try:
                sent = socket.send_fds(self._socket, [data], message.fds)
                break
            except BlockingIOError:
                self._rest(0.001)
        if sent != len(data):  # a socket's buffer holds many messages
            raise DeviceError(f"the backend took half of {message.request.name}")

    def _reply_to(self, request: Request) -> Message:
        deadline = time.monotonic() + self._timeout
        while (message := self._decoder.next_message()) is None:
            if self._socket is None:
                raise ConnectionError("the frontend is not connected")
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, self._decoder.wanted, _FDS)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeviceError(f"no answer to {request.name} in time") from None
                self._rest_until_readable(self._socket)
                continue
            if not data:
                raise ConnectionResetError(f"the backend hung up after {request.name}")
            self._decoder.feed(data, fds)
        if message.request is not request:
            raise DeviceError(f"{request.name} was answered with {message.request.name}")
        return message

    def _rest_until_readable(self, sock: socket.socket) -> None:
        """Calls wait meanwhile: a driver that hears of one may want to ask something itself."""
        if self._idle is not None:
            self._idle()
        else:
            select.select([sock], [], [], self._timeout)

    def _rest(self, seconds: float) -> None:
        if self._idle is not None:
            self._idle()
        else:
            time.sleep(seconds)

    def _wait_for_events(self, seconds: float) -> bool:
        """Waits for a call or a request of the backend, and hands them on."""
        if self._idle is not None:
            self._idle()
            seconds = 0
        calls = {vring.call: index for index, vring in self._vrings.items()}
        channel = [] if self._channel is None else [self._channel.fileno()]
        ready = select.select([*calls, *channel], [], [], seconds)[0]
        for fd in ready:
            if fd in calls:
                self._read_call(fd, calls[fd])
            else:
                self._read_channel()
        return bool(ready)

    def _read_call(self, fd: int, index: int) -> None:
        if index not in self._vrings or self._vrings[index].call != fd:
            return  # a callback of this turn stopped the ring
        if not os.read(fd, 4096):  # the backend is gone
            return
        self.calls += 1
        if self.on_queue_call is not None:
            self.on_queue_call(index)

    def _read_channel(self) -> None:
        channel = self._channel
        if channel is None:
            return
        data = channel.recv(max(1, self._channel_decoder.wanted))
        if not data:
            channel.close()
            self._channel = None
            return
        self._channel_decoder.feed(data)
        for message in self._channel_decoder:
            message.close()
            if message.need_reply:
                channel.send(encode(Message(message.request, 0, reply=True)))
            if message.request is BackendRequest.CONFIG_CHANGE_MSG:
                self.config_generation += 1
                if self.on_config_change is not None:
                    self.on_config_change()
