"""A guest and its console's ports: control messages of any kind, bytes both ways, fickle peers."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile

from fuzz.guests import ARENA, RING_CHOICES, Guest, some_features
from fuzz.inputs import Input
from vq.abi_console import ConsoleConfig, ConsoleEvent, ConsoleFeature
from vq.device import Alarm
from vq.devices.console import ConsoleDevice, Port
from vq.devices.host_end import FileEnd, HostEnd, PtyEnd, UnixEnd
from vq.model import DeviceModel
from vq.request import Reader, Writer

_CHOICES = (
    *(ConsoleFeature.SIZE, ConsoleFeature.MULTIPORT, ConsoleFeature.EMERG_WRITE, *RING_CHOICES),
)
_CONTROL_RX, _CONTROL_TX = 2, 3
_EMERGENCY = ConsoleConfig.emerg_wr.offset
_SIZES = (1, 10, 100, 300, 4096, 0, 9000)
_MARK = 255
"""What is written in an emergency; all else is below 251."""
_TOLD = (
    *(ConsoleEvent.PORT_ADD, ConsoleEvent.CONSOLE_PORT, ConsoleEvent.RESIZE),
    *(ConsoleEvent.PORT_OPEN, ConsoleEvent.PORT_NAME),
)

_directory = tempfile.TemporaryDirectory(prefix="vq-fuzz-console-")
_SOCKET = os.path.join(_directory.name, "socket")


def run(data: bytes) -> None:
    """Plays one driver's life and that of the peers, and another that behaves."""
    descriptors = len(os.listdir("/proc/self/fd"))
    life = _Life(Input(data))
    try:
        life.live()
    finally:
        life.device.close()
        life.let_go()
    assert len(os.listdir("/proc/self/fd")) == descriptors, "descriptors were left open"


class _Peer(HostEnd):
    """An end in this process, whose peer comes and goes and takes as much as it likes."""

    sized = True

    def __init__(self) -> None:
        super().__init__("a peer")
        self.takes = 1 << 30
        self.sends = bytearray()
        self.sent = bytearray()
        self.got = bytearray()
        self.always = True
        """Whether somebody was there all the time."""
        self.deaf = False
        """Whether the peer has gone, and nobody has noticed yet."""
        self._there, self._resized = True, False
        self._reading = self._writing = False
        self._alarm: Alarm

    @property
    def is_listening(self) -> bool:
        """See `HostEnd`."""
        return self.is_connected and not self.deaf

    def _begin(self, model: DeviceModel) -> None:
        self._alarm = model.alarm(self._act)
        self._alarm.ring()

    def _act(self) -> None:
        """What an event loop would tell, in the device's turn."""
        if self._there != self.is_connected or self._resized:
            self.is_connected, self._resized = self._there, False
            self._changed()
        if self._reading and self.sends:
            self._readable()
        if self._writing and self.takes:
            self._writable()

    def tell(self) -> None:
        """Lets the device see to what there is."""
        self._alarm.ring()

    def come_or_go(self) -> None:
        """The peer changes from there to gone, or back."""
        self._there = not self._there
        self.always = self.deaf = False
        self._alarm.ring()

    def resize(self, size: tuple[int, int]) -> None:
        """The peer makes its window so many columns wide and so many rows high."""
        self.size = size
        self._resized = True
        self._alarm.ring()

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """See `HostEnd`."""
        self._reading = self._reading if reading is None else reading
        self._writing = self._writing if writing is None else writing

    def fill(self, writer: Writer) -> int:
        """See `HostEnd`."""
        data = bytes(self.sends[: writer.remaining])
        del self.sends[: len(data)]
        writer.write(data)
        return len(data)

    def drain(self, reader: Reader) -> int:
        """See `HostEnd`."""
        return self.send(memoryview(reader.read(min(self.takes, reader.remaining))))

    def send(self, data: memoryview) -> int:
        """See `HostEnd`."""
        count = min(self.takes, len(data))
        self.takes -= count
        self.got += data[:count]
        return count

    def close(self) -> None:
        """See `HostEnd`."""
        self.is_connected = False


class _Life:
    def __init__(self, source: Input) -> None:
        self.source = source
        self.peers: dict[int, _Peer] = {}
        self.socks: list[socket.socket] = []
        self.terminals: list[int] = []
        self.pty: PtyEnd | None = None
        ports = []
        for number in range(source.pick((1, 2, 3, 4))):
            name = source.pick(("", "org.example.0", "x")) + (str(number) if number else "")
            backlog = source.pick((1 << 16, 100, 0))
            ports.append(Port(self.end(number), name, source.chance(2), backlog))
        self.device = ConsoleDevice(ports, swap_resize=source.chance(2))
        self.count = len(ports)
        self.has_control = self.device.queue_count > 2
        self.written = {number: bytearray() for number in range(self.count)}
        self.received = {number: bytearray() for number in range(self.count)}
        self.sure = self.whole = True
        """Whether the books can be right; and whether nothing was lost in a reset."""
        self.paused = False
        self.added: set[int] = set()
        self.ready: set[int] = set()
        wanted = -1 if source.chance(2) else some_features(source, _CHOICES)
        self.guest = Guest(self.device, wanted)

    def end(self, number: int) -> HostEnd:
        kind = self.source.pick(("peer", "peer", "peer", "unix", "pty", "file"))
        if kind == "unix" and number == 1:
            return UnixEnd(_SOCKET)
        if kind == "pty" and number != 1:
            self.pty = PtyEnd()
            return self.pty
        if kind == "file" and number == 2:
            return FileEnd(os.devnull)
        peer = self.peers[number] = _Peer()
        return peer

    def live(self) -> None:
        source = self.source
        steps = (
            *(self.transmit, self.transmit, self.offer_room, self.offer_room, self.say, self.say),
            *(self.get_ready, self.send, self.take, self.come_or_go, self.resize, self.emergency),
            *(self.clients, self.time, self.scribble, self.queues),
        )
        for _ in range(60):
            if not source.more:
                break
            source.pick(steps)()
            self.look()
        for peer in self.peers.values():
            peer.takes = 1 << 30
            with self.guest.watched():
                peer.tell()
        self.guest.pump()
        self.look()
        self.check_streams()
        self.answers_still()

    # What the guest does.

    def port(self) -> int:
        return self.source.below(self.count)

    def transmit(self) -> None:
        source, guest, port = self.source, self.guest, self.port()
        for _ in range(source.pick((1, 1, 3))):
            start, size = len(self.written[port]), source.pick(_SIZES)
            data = bytes((start + index) % 251 for index in range(size))
            writable = [guest.buffer(source, 4)] if source.chance(64) else []
            readable = guest.place_pieces(source, data)
            if guest.offer_in_any_way(source, _tx(port), readable, writable):
                self.written[port] += data
        guest.kick(_tx(port))

    def offer_room(self) -> None:
        source, guest, port = self.source, self.guest, self.port()
        index = _CONTROL_RX if self.has_control and source.chance(2) else _rx(port)
        size = source.pick((300, 16, 64, 8, 4096)) if not source.chance(32) else source.below(8)
        for _ in range(source.pick((1, 2, 8))):
            readable = [guest.buffer(source, 4)] if source.chance(128) else []
            guest.offer_in_any_way(source, index, readable, guest.room(source, size))
        guest.kick(index)

    def say(self) -> None:
        """A control message."""
        source = self.source
        number = source.pick((0, 1, self.count - 1, self.count, 0xFFFFFFFF))
        event = source.pick((*ConsoleEvent, ConsoleEvent.PORT_READY, ConsoleEvent.PORT_OPEN, 99))
        self.message(
            number, event, source.pick((1, 1, 1, 0, 2)), source.take(source.pick((0, 0, 5)))
        )

    def get_ready(self) -> None:
        """What a driver says to begin with."""
        self.message(0, ConsoleEvent.DEVICE_READY, 1)
        for number in range(self.count):
            for event in (ConsoleEvent.PORT_READY, ConsoleEvent.PORT_OPEN):
                self.message(number, event, 1)

    def message(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        if not self.has_control:
            return
        source, guest = self.source, self.guest
        data = number.to_bytes(4, "little") + event.to_bytes(2, "little")
        data += value.to_bytes(2, "little") + more
        if source.chance(64):
            data = data[: source.below(9)]
        if guest.offer_in_any_way(source, _CONTROL_TX, guest.place_pieces(source, data)):
            if event == ConsoleEvent.PORT_READY and value:
                self.ready.add(number)
            guest.kick(_CONTROL_TX)

    def emergency(self) -> None:
        with self.guest.watched():
            mark = bytes((_MARK,)) * self.source.pick((4, 1, 3))
            self.guest.driver.write_config(self.source.pick((_EMERGENCY, 0, _EMERGENCY - 2)), mark)

    def scribble(self) -> None:
        if self.source.chance(2):
            self.start_over()
        else:
            self.sure = False
            self.guest.scribble(self.source)

    def start_over(self) -> None:
        self.look()
        self.guest.start_over()
        self.added.clear()
        self.ready.clear()
        self.whole = False

    def queues(self) -> None:
        """A queue is stopped and goes on, or is reset."""
        index = self.source.pick(list(self.guest.driver.queues))
        if self.guest.unruly or self.device.fault is not None:
            return
        if self.source.chance(3):
            self.guest.reset_queue(index)
            self.whole = False
        else:
            self.paused = True
            self.guest.pause_queue(index)
        self.guest.kick(index)

    # What the host does.

    def send(self) -> None:
        port, size = self.port(), self.source.pick(_SIZES)
        if port in self.peers:
            peer = self.peers[port]
            data = bytes((len(peer.sent) + index) % 251 for index in range(size))
            peer.sends += data
            peer.sent += data
            with self.guest.watched():
                peer.tell()
        else:
            for sock in self.socks:
                with contextlib.suppress(OSError):
                    sock.send(bytes(size))
            for terminal in self.terminals:
                with contextlib.suppress(OSError):
                    os.write(terminal, bytes(size))
            self.guest.pump()

    def take(self) -> None:
        port = self.port()
        if port in self.peers:
            self.peers[port].takes = self.source.pick((0, 1, 50, 5000, 1 << 30))
            with self.guest.watched():
                self.peers[port].tell()
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.recv(1 << 16)
        for terminal in self.terminals:
            with contextlib.suppress(OSError):
                os.read(terminal, 1 << 16)
        self.guest.pump()

    def come_or_go(self) -> None:
        port = self.port()
        if port in self.peers:
            if self.source.chance(4):
                self.peers[port].deaf, self.peers[port].always = True, False
                return
            with self.guest.watched():
                self.peers[port].come_or_go()

    def clients(self) -> None:
        """Programs come to the real ends, and go."""
        if self.source.chance(2):
            self.let_go()
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(_SOCKET)
                self.socks.append(sock)
            except OSError:
                sock.close()
            if self.pty is not None and len(self.terminals) < 3:
                flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
                self.terminals.append(os.open(self.pty.path, flags))
        self.guest.pump()

    def let_go(self) -> None:
        for sock in self.socks:
            sock.close()
        for terminal in self.terminals:
            os.close(terminal)
        self.socks.clear()
        self.terminals.clear()

    def resize(self) -> None:
        port, size = self.port(), self.source.pick(((80, 24), (132, 50), (65535, 1)))
        if port in self.peers:
            with self.guest.watched():
                self.peers[port].resize(size)

    def time(self) -> None:
        self.guest.ring_alarms()
        self.guest.pump()

    # What must have come of it.

    def look(self) -> None:
        """Reads what the guest was sent, and compares it with its books."""
        guest = self.guest
        if guest.unruly or guest.overlapping or self.device.fault is not None:
            self.sure = False
        for index in guest.driver.queues:
            for buffers, written in guest.collect(index):
                data = guest.content(buffers)[:written] if written else b""
                if not self.sure or not data:
                    continue
                if index == _CONTROL_RX and self.has_control:
                    self.told(data)
                else:
                    assert index == 0 or (index > 3 and index % 2 == 0), "written where one reads"
                    self.received[0 if index == 0 else (index - 2) // 2] += data
        guest.start_at_front()
        for port in self.device._ports:
            most = port.backlog + (1 << 17 if self.paused else 0)  # the rest of one request
            assert len(port.kept) <= most, "more is kept than may be"

    def told(self, data: bytes) -> None:
        """A control message from the device."""
        assert len(data) >= 8 and self.guest.has(ConsoleFeature.MULTIPORT)
        number, event = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
        assert number < self.count and event in _TOLD, (number, event)
        if event == ConsoleEvent.PORT_ADD:
            assert number not in self.added, "a port that is there already is added"
            self.added.add(number)
        else:
            assert number in self.ready, "told of a port that the driver does not know"
        extra = {ConsoleEvent.RESIZE: 4}.get(ConsoleEvent(event), 0)
        assert len(data) == 8 + extra or event == ConsoleEvent.PORT_NAME

    def check_streams(self) -> None:
        """What came is what was sent, byte for byte, in both directions."""
        if not self.sure:
            return
        for number, peer in self.peers.items():
            got = bytes(byte for byte in peer.got if byte != _MARK)
            assert peer.sent.startswith(self.received[number]), "not what the peer sent"
            if peer.always and self.whole:
                assert got == self.written[number], "not what the guest wrote"
            assert len(got) <= len(self.written[number]), "more than the guest wrote"

    def answers_still(self) -> None:
        """After a reset bytes go both ways, if the first port has a peer that can be asked."""
        guest = self.guest
        self.start_over()
        self.sure = True
        if 0 not in self.peers:
            return
        peer = self.peers[0]
        peer.takes = 1 << 30
        peer.sends.clear()
        if not peer.is_listening:
            peer.come_or_go()
            if not peer.is_connected:
                peer.come_or_go()
        self.source.at = len(self.source.data)  # nothing but zeros: all goes as it should
        self.get_ready()
        for index in guest.driver.queues:
            guest.collect(index)
        peer.got.clear()
        guest.memory.write(ARENA, b"hello")
        guest.offer(1, [(ARENA, 5)])
        guest.kick(1)
        guest.offer(0, [], [(ARENA + 64, 64)])
        guest.kick(0)
        peer.sends += b"world"
        with guest.watched():
            peer.tell()
        assert peer.got.endswith(b"hello"), "dead after a reset"
        assert [guest.content(buffers)[:size] for buffers, size in guest.collect(0)] == [b"world"]
        assert self.device.fault is None


def _rx(port: int) -> int:
    return 0 if port == 0 else 2 + 2 * port


def _tx(port: int) -> int:
    return _rx(port) + 1
