"""The virtio console device (virtio 1.3, 5.3): ports that join a guest's terminals and the host.

Port 0 is always there. Further ones, names for them and word of who has a port open need
MULTIPORT: the device offers it when there is more than one port. Each port's bytes go to a
`HostEnd` and come from it.

Bytes wait on both sides and are never dropped while somebody is there: those of the guest in its
own buffers until the host takes them, those of the host until the guest has room, and has opened
the port where MULTIPORT tells. What the guest writes while nobody is there is let go, so that it
never waits for a peer who may never come; of a console's output the last part (`Port.backlog`) is
kept and is the first that the next peer gets.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vq.abi import (
    DeviceId,
)
from vq.abi_console import (
    ConsoleConfig,
    ConsoleControl,
    ConsoleEvent,
    ConsoleFeature,
)
from vq.device import Alarm, Queue
from vq.devices.host_end import HostEnd
from vq.errors import DriverError, UsageError
from vq.log_limit import limited_logger
from vq.model import DeviceModel, QueueSpec
from vq.request import Request

__all__ = ["ConsoleDevice", "Port"]

log = limited_logger(__name__)

QUEUE_SIZE = 128
CONTROL_RX, CONTROL_TX = 2, 3
MAX_PORTS = 31
"""Linux numbers a device's ports in a word's bits, and a frontend its queues in a byte."""
MAX_NAME = 255
TURN_BYTES = 1 << 20
"""Bytes moved for a port at once each way, so that others get their turn."""
MAX_REST = 1 << 20
"""The rest of a half-written request that is copied when its queue stops."""


@dataclass
class Port:
    """One port: what is on the host's end of it, and what the guest is told that it is.

    A console gets a terminal's driver in the guest (Linux: /dev/hvc0), others are plain streams
    (/dev/virtio-ports/NAME). `backlog` is how many bytes of a console's output are kept for the
    next peer while nobody is there.
    """

    end: HostEnd
    name: str = ""
    console: bool = False
    backlog: int = 1 << 16


class ConsoleDevice(DeviceModel):
    """Ports, the first of them number 0, which is a console whatever its `Port.console` says.

    `swap_resize` sends the window's size of ports beyond plain port 0 as rows and columns instead
    of columns and rows (5.3.6.2): Linux read them that way before 6.15.

    Counted in `stats`: ``to_host_bytes``, ``to_guest_bytes``, ``unheard_bytes`` (written while
    nobody was there, and not kept), ``emergency_bytes``, ``control_ignored`` (messages of no
    meaning).

    Raises `UsageError` for ports that cannot be.
    """

    device_id = DeviceId.CONSOLE
    feature_bits = ConsoleFeature
    config_writable: ClassVar[Collection[str]] = ("emerg_wr",)
    from_outside: ClassVar[Collection[str]] = ("receiveq*", "control receiveq")

    def __init__(self, ports: Sequence[Port], *, swap_resize: bool = False) -> None:
        _check(ports)
        self._ports = [_PortState(number, port) for number, port in enumerate(ports)]
        features = [ConsoleFeature.EMERG_WRITE]
        if any(port.is_console and port.end.sized for port in self._ports):
            # For a further console the size comes by message, but Linux obeys only with SIZE.
            features.append(ConsoleFeature.SIZE)
        queues = self._queues_of(self._ports[0])
        if len(ports) > 1 or ports[0].name:
            features.append(ConsoleFeature.MULTIPORT)
            queues.append(("control receiveq", 64, None))
            queues.append(("control transmitq", 64, self._control_received))
            for port in self._ports[1:]:
                queues += self._queues_of(port)
        super().__init__(
            queues=queues, features=features, config=ConsoleConfig(max_nr_ports=len(ports))
        )
        self._swap_resize = swap_resize
        self._control: dict[tuple[int, ConsoleEvent], bytes] = {}  # waits for buffers, oldest first
        self._size_told = False
        self._by_queue = {index: port for port in self._ports for index in (port.rx, port.tx)}
        for port in self._ports:
            port.again = self.alarm(functools.partial(self._go_on, port), outside=True)
            port.end.start(
                self,
                readable=functools.partial(self._to_guest, port),
                writable=functools.partial(self._to_host, port),
                changed=functools.partial(self._end_changed, port),
            )

    def close(self) -> None:
        """Closes the ports' ends."""
        super().close()
        for port in self._ports:
            port.end.close()

    # --- from the guest ---------------------------------------------------------------------------

    def _queues_of(self, port: _PortState) -> list[QueueSpec]:
        return [
            (f"receiveq({port.number})", QUEUE_SIZE, None),
            (
                f"transmitq({port.number})",
                QUEUE_SIZE,
                functools.partial(self._transmitted, port),
            ),
        ]

    def _transmitted(self, port: _PortState, requests: Sequence[Request]) -> None:
        port.unsent += requests
        for request in requests:
            if request.writer.remaining:
                raise DriverError(
                    "a device-writable buffer in a transmitq",
                    queue=self.queues[port.tx].name,
                    section="5.3.6.1",
                )
        if port.number == 0 and not self._size_told:
            # Linux looks at the size when it changes, and knows the console only by now.
            self._size_told = True
            if self.has_feature(ConsoleFeature.SIZE) and port.end.size is not None:
                self._notify_config_change()
        self._to_host(port)

    def _to_host(self, port: _PortState) -> None:
        """Moves what the guest has written, as far as the host takes it."""
        end = port.end
        budget = TURN_BYTES
        while end.is_listening and (port.kept or port.unsent) and budget > 0:
            if port.kept:
                count = end.send(memoryview(bytes(port.kept[:budget])))
                del port.kept[:count]
                full = not count
            else:
                reader = port.unsent[0].reader
                count = end.drain(reader) if reader.remaining else 0
                full = reader.remaining > 0 and not count
                if not reader.remaining and port.unsent:  # else let go of: nobody is there now
                    port.unsent.popleft().complete(0)
            if full:
                break
            budget -= count
            self.stats["to_host_bytes"] += count
        if not end.is_listening:
            self._unheard(port)
            end.want(writing=False)  # a terminal that was closed would be writable until it is seen
        elif budget <= 0:
            port.again.set(0)
        else:
            end.want(writing=bool(port.kept or port.unsent))

    def _unheard(self, port: _PortState) -> None:
        """Nobody is there: lets go of what the guest has written, but for a console's backlog."""
        self._keep(port, b"")
        while port.unsent:
            request = port.unsent.popleft()
            reader = request.reader
            last = min(port.backlog, reader.remaining)
            self.stats["unheard_bytes"] += reader.remaining - last
            reader.skip(reader.remaining - last)
            self._keep(port, reader.read(last))
            request.complete(0)

    def _keep(self, port: _PortState, data: bytes) -> None:
        """Keeps bytes for the next peer, the newest where there are too many."""
        port.kept += data
        surplus = len(port.kept) - port.backlog
        if surplus > 0:
            self.stats["unheard_bytes"] += surplus
            del port.kept[:surplus]

    def config_written(self, fields: Collection[str]) -> None:
        """A character of an emergency write (5.3.5): from a guest in whatever state."""
        port = self._ports[0]
        assert isinstance(self.config, ConsoleConfig)
        self._keep(port, bytes([self.config.emerg_wr & 0xFF]))
        self.stats["emergency_bytes"] += 1
        self._to_host(port)

    # --- to the guest -----------------------------------------------------------------------------

    def _to_guest(self, port: _PortState) -> None:
        """Moves what has come from the host into the guest's buffers, as far as there are some."""
        budget = TURN_BYTES
        while budget > 0 and port.end.is_connected and self._is_open(port):
            if port.room is None:
                requests = self.take(port.rx, 1)
                if not requests:
                    break
                port.room = self._checked_room(port, requests[0])
            count = port.end.fill(port.room.writer)
            if not count:
                break
            port.room.complete()
            port.room = None
            self.stats["to_guest_bytes"] += count
            budget -= count
        self._watch_input(port)

    def _checked_room(self, port: _PortState, request: Request) -> Request:
        queue = self.queues[port.rx].name
        if request.reader.remaining:
            raise DriverError(
                "a device-readable buffer in a receiveq", queue=queue, section="5.3.6.1"
            )
        if not request.writer.remaining:
            raise DriverError("a buffer without room in a receiveq", queue=queue, section="5.3.6")
        return request

    def _is_open(self, port: _PortState) -> bool:
        """Whether the guest wants bytes from this port (without MULTIPORT it cannot say)."""
        if self.has_feature(ConsoleFeature.MULTIPORT):
            return port.guest_open
        return port.number == 0

    def _watch_input(self, port: _PortState) -> None:
        """Waits for bytes of the host, if the guest has room for them."""
        if port.room is None and self._is_open(port):
            requests = self.take(port.rx, 1)
            if requests:
                port.room = self._checked_room(port, requests[0])
        port.end.want(reading=port.room is not None and self._is_open(port))

    def buffers_available(self, queue: Queue) -> None:
        """There is room in a receive queue again."""
        if self.has_feature(ConsoleFeature.MULTIPORT) and queue.index == CONTROL_RX:
            self._send_control()
        elif queue.index in self._by_queue:
            self._watch_input(self._by_queue[queue.index])

    # --- the host's ends --------------------------------------------------------------------------

    def _end_changed(self, port: _PortState) -> None:
        """A peer came or went, or made the window larger or smaller."""
        end = port.end
        if port.connected != end.is_connected:
            port.connected = end.is_connected
            if port.ready:
                self._tell(port, ConsoleEvent.PORT_OPEN, int(port.connected))
            self._to_host(port)
            self._watch_input(port)
        if end.size is not None and end.size != port.size:
            port.size = end.size
            self._tell_size(port)

    def _tell_size(self, port: _PortState) -> None:
        if port.size is None:
            return
        columns, rows = port.size
        if port.number == 0:
            self.update_config(cols=columns, rows=rows)
        if port.ready and port.is_console:
            first, second = (rows, columns) if self._swap_resize else (columns, rows)
            payload = first.to_bytes(2, "little") + second.to_bytes(2, "little")
            self._tell(port, ConsoleEvent.RESIZE, 0, payload)

    def _go_on(self, port: _PortState) -> None:
        self._to_host(port)

    # --- the control queues (5.3.6.2) -------------------------------------------------------------

    def _control_received(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not self.has_feature(ConsoleFeature.MULTIPORT):
                request.complete(0)  # the queue is none that this driver should use (5.3.2)
                self.stats["control_ignored"] += 1
                continue
            message = request.reader.structure(ConsoleControl)
            request.complete(0)
            if message.event == ConsoleEvent.DEVICE_READY:
                self._device_ready(bool(message.value))
            elif message.id < len(self._ports) and self._ports[message.id].added:
                self._port_message(self._ports[message.id], message.event, bool(message.value))
            else:
                self.stats["control_ignored"] += 1

    def _device_ready(self, success: bool) -> None:
        if not success:
            self.stats["control_ignored"] += 1
            log.debug("the guest's driver could not be initialized")
            return
        for port in self._ports:
            if not port.added:  # "MUST NOT specify a port which exists"
                port.added = True
                self._tell(port, ConsoleEvent.PORT_ADD, 0)

    def _port_message(self, port: _PortState, event: int, value: bool) -> None:
        if event == ConsoleEvent.PORT_READY:
            port.ready = value
            if value:
                self._introduce(port)
        elif event == ConsoleEvent.PORT_OPEN:
            port.guest_open = value
            self._watch_input(port)
        else:
            self.stats["control_ignored"] += 1

    def _introduce(self, port: _PortState) -> None:
        """Tells a driver that knows the port what it is, and how things stand."""
        if port.is_console:
            self._tell(port, ConsoleEvent.CONSOLE_PORT, 1)
            self._tell_size(port)
        if port.name:
            self._tell(port, ConsoleEvent.PORT_NAME, 1, port.name.encode())
        if port.connected:
            self._tell(port, ConsoleEvent.PORT_OPEN, 1)

    def _tell(self, port: _PortState, event: ConsoleEvent, value: int, rest: bytes = b"") -> None:
        """Sends a control message; where it has to wait, the newest of its kind takes its place."""
        message = ConsoleControl(id=port.number, event=event, value=value)
        self._control[port.number, event] = bytes(message) + rest
        self._send_control()

    def _send_control(self) -> None:
        while self._control:
            requests = self.take(CONTROL_RX, 1)
            if not requests:
                return
            key = next(iter(self._control))
            requests[0].writer.write(self._control.pop(key))
            requests[0].complete()

    # --- DeviceModel ------------------------------------------------------------------------------

    def driver_ready(self) -> None:
        """Without MULTIPORT port 0 is open from now on."""
        self._watch_input(self._ports[0])

    def queue_stopping(self, queue: Queue) -> None:
        """Keeps the rest of what was sent in part, so that nothing goes out twice."""
        port = self._by_queue.get(queue.index)
        if port is not None and queue.index == port.tx and port.unsent:
            first = port.unsent[0]
            if first.reader.position and first.reader.remaining <= MAX_REST:
                port.kept += first.reader.read(first.reader.remaining)
                first.complete(0)
        super().queue_stopping(queue)
        self._forget_requests(queue)

    def queue_dropped(self, queue: Queue) -> None:
        """See `DeviceModel`."""
        super().queue_dropped(queue)
        self._forget_requests(queue)

    def _forget_requests(self, queue: Queue) -> None:
        port = self._by_queue.get(queue.index)
        if port is None:
            return
        if queue.index == port.tx:
            port.unsent.clear()
        else:
            port.room = None
            port.end.want(reading=False)

    def device_reset(self) -> None:
        """Forgets what the driver said; what it wrote before is still the host's to have."""
        self._control.clear()
        self._size_told = False
        for port in self._ports:
            port.added = port.ready = port.guest_open = False
            port.end.want(reading=False)
        self._tell_size(self._ports[0])


class _PortState:
    """A port, and how things stand with it."""

    def __init__(self, number: int, port: Port) -> None:
        self.number = number
        self.end = port.end
        self.name = port.name
        self.is_console = port.console or number == 0
        self.backlog = port.backlog if self.is_console else 0
        # The control queues stand between those of port 0 and those of port 1 (5.3.2).
        self.rx = 0 if number == 0 else 2 + 2 * number
        self.tx = self.rx + 1
        self.unsent: deque[Request] = deque()  # of the guest, not yet wholly written
        self.kept = bytearray()  # written by the guest, given back to it, not yet at the host
        self.room: Request | None = None  # of the guest, for what comes next
        self.connected = False  # as far as the guest was told
        self.size: tuple[int, int] | None = None
        # What the driver has said, or was told (5.3.6.2).
        self.added = False
        self.ready = False
        self.guest_open = False
        self.again: Alarm


def _check(ports: Sequence[Port]) -> None:
    if not 1 <= len(ports) <= MAX_PORTS:
        raise UsageError(f"a console has 1 to {MAX_PORTS} ports, not {len(ports)}")
    names = [port.name for port in ports if port.name]
    if len(set(names)) < len(names):
        raise UsageError("two ports have the same name")
    for name in names:
        if len(name.encode()) > MAX_NAME or "\0" in name or "/" in name:
            raise UsageError(f"a port cannot be called {name!r}")
