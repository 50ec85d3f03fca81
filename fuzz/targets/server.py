"""A vhost-user frontend that sends any message in any order, with rings that run meanwhile."""

from __future__ import annotations

import gc
import os
import socket
import struct

from fuzz.inputs import Input
from vq.abi import NetFeature
from vq.errors import FrontendError, UsageError
from vq.link import LoopbackLink
from vq.loop import Loop
from vq.net import NetDevice
from vq.vhost_backend import Backend
from vq.vhost_message import (
    Config,
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
    VringState,
)

_SIZE = 0x10000
_USER = 0x7F0000000000
_RAM = os.memfd_create("fuzz-ram") if hasattr(os, "memfd_create") else -1
_PLACES = (0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, _SIZE - 16, _SIZE)
_PROTOCOL = sum(1 << bit for bit in ProtocolFeature)
_DEVICES = 2  # a device is made anew when it has been served so often


def run(data: bytes) -> None:
    """One connection after the other; each leaves no descriptor and no mapping behind."""
    if os.fstat(_RAM).st_size != _SIZE:
        os.ftruncate(_RAM, _SIZE)
    source = Input(data)
    loop = Loop()
    device = NetDevice(LoopbackLink(), queue_size=16, control_queue_size=16)
    before = _descriptors()
    for _ in range(_DEVICES):
        _Frontend(source, device, loop).connect()
        assert device.memory is None and device.status == 0 and device.fault is None
        if _descriptors() != before:
            gc.collect()
        assert _descriptors() == before, "a descriptor is left over"
    device.close()
    loop.close()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class _Frontend:
    def __init__(self, source: Input, device: NetDevice, loop: Loop) -> None:
        self.source = source
        self.loop = loop
        self.replies = 0
        offered = _PROTOCOL & Backend(device, loop, self._reply)._offered
        self.backend = Backend(device, loop, self._reply, offered=offered)
        self.offered = offered
        self.kept: list[int] = []
        """What the frontend keeps open of its own, as the other ends of pipes."""

    def connect(self) -> None:
        try:
            if self.source.chance(2):
                self._usual_start()
            for _ in range(60):
                if not self.source.more:
                    break
                self._step()
        except (FrontendError, UsageError, OSError):
            pass  # the connection is dropped
        finally:
            self.backend.close()
            for _ in range(3):
                self.loop.run_once(0)
            for fd in self.kept:
                os.close(fd)

    def _reply(self, message: Message) -> None:
        self.replies += 1
        assert self.replies < 200
        message.close()

    def _usual_start(self) -> None:
        """What every frontend does first, so that what follows meets running rings."""
        source = self.source
        region = MemoryRegion(0, _SIZE, _USER, 0)
        device = self.backend.device
        features = device.device_features | 1 << VhostFeature.PROTOCOL_FEATURES
        if source.chance(4):
            features &= ~(1 << NetFeature.CTRL_VQ | 1 << 28 | 1 << 29)
        protocol = self.offered & ~(1 << ProtocolFeature.STATUS if source.chance(2) else 0)
        self._send(Request.SET_PROTOCOL_FEATURES, protocol)
        self._send(Request.SET_FEATURES, features)
        self._send(Request.SET_MEM_TABLE, MemoryTable((region,)), [os.dup(_RAM)])
        if protocol >> ProtocolFeature.STATUS & 1:
            self._send(Request.SET_STATUS, 15)
        for index in range(3):
            base = 0x1000 * index
            where = VringAddr(index, 0, _USER + base, _USER + base + 0x800, _USER + base + 0x400, 0)
            self._send(Request.SET_VRING_NUM, VringState(index, 16))
            self._send(Request.SET_VRING_ADDR, where)
            self._send(Request.SET_VRING_CALL, VringFd(index, True), [os.eventfd(0)])
            self._send(Request.SET_VRING_KICK, VringFd(index, True), [os.eventfd(1)])
            self._send(Request.SET_VRING_ENABLE, VringState(index, 1))
        self.loop.run_once(0)

    def _step(self) -> None:
        source = self.source
        step = source.below(8)
        if step < 4:
            self._message()
        elif step == 4:
            self._offer()
        elif step == 5:
            os.pwrite(_RAM, source.take(source.below(17)), source.pick(_PLACES) + source.u8)
            os.ftruncate(_RAM, _SIZE)  # a write at its end has made it longer
        elif step == 6:
            self.backend.device.notify(source.below(4))
        else:
            self.loop.run_once(0)

    def _offer(self) -> None:
        """A chain that is good but for what it says."""
        source = self.source
        index = source.below(3)
        base = 0x1000 * index
        slot = source.below(16)
        flags = source.pick((0, 2, 1, 3, 4))
        length = source.pick((64, 12, 2048, 1, 0x10000))
        place = source.pick(_PLACES)
        descriptor = struct.pack("<QIHH", place, length, flags, (slot + 1) % 16)
        os.pwrite(_RAM, descriptor, base + 16 * slot)
        idx = int.from_bytes(os.pread(_RAM, 2, base + 0x402), "little")
        os.pwrite(_RAM, struct.pack("<H", slot), base + 0x404 + 2 * (idx % 16))
        os.pwrite(_RAM, struct.pack("<H", (idx + 1) & 0xFFFF), base + 0x402)

    def _message(self) -> None:
        source = self.source
        request = source.pick(list(Request))
        payload, wants = self._payload(request)
        fds = [self._descriptor() for _ in range(wants)]
        message = Message(request, payload, fds, need_reply=source.chance(2))
        self.backend.handle(message)

    def _send(self, request: Request, payload: Payload, fds: list[int] | None = None) -> None:
        self.backend.handle(Message(request, payload, fds or []))

    def _descriptor(self) -> int:
        """Something that a frontend might hand over, apt or not."""
        kind = self.source.below(8)
        if kind == 0:
            reader, writer = os.pipe()
            self.kept.append(writer)
            return reader
        if kind == 1:
            reader, writer = os.pipe()
            self.kept.append(reader)
            return writer
        if kind == 2:
            return os.open(os.devnull, os.O_RDWR)
        if kind == 3:
            ours, theirs = socket.socketpair()
            self.kept.append(ours.detach())
            return theirs.detach()
        if kind == 4:
            reader, writer = os.pipe()
            os.write(writer, self.source.take(self.source.u8))
            os.close(writer)
            return reader
        if kind == 5:
            return os.eventfd(0)
        return os.dup(_RAM)

    def _payload(self, request: Request) -> tuple[Payload, int]:
        """A payload of the right form with any values, and how many descriptors go with it."""
        source = self.source
        ring = source.pick((0, 1, 2, 3, 255))
        name = request.name
        if name in ("SET_FEATURES", "SET_PROTOCOL_FEATURES"):
            every = self.backend.device.device_features if name == "SET_FEATURES" else self.offered
            more = 1 << VhostFeature.PROTOCOL_FEATURES | 1 << VhostFeature.LOG_ALL
            return source.pick((every, every | more, 0, 1 << 32, source.number(8), more)), 0
        if name == "SET_MEM_TABLE":
            regions = tuple(self._region() for _ in range(source.below(4)))
            return MemoryTable(regions), len(regions)
        if name in ("ADD_MEM_REG", "REM_MEM_REG"):
            return self._region(), int(name == "ADD_MEM_REG" or source.chance(4))
        if name == "SET_VRING_ADDR":
            places = [_USER + source.pick(_PLACES) + source.pick((0, 0, 1, 8)) for _ in range(3)]
            return VringAddr(ring, source.pick((0, 0, 1, 2)), *places, source.pick(_PLACES)), 0
        if name in ("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"):
            has_fd = not source.chance(4)
            return VringFd(ring, has_fd), int(has_fd)
        if name in ("GET_INFLIGHT_FD", "SET_INFLIGHT_FD"):
            size = source.pick((0x1000, 0, _SIZE, 320, 1 << 40))
            queues, length = source.pick((1, 3, 0, 4)), source.pick((16, 1, 0, 0x8000, 64))
            return Inflight(size, source.pick((0, 64)), queues, length), int(name[0] == "S")
        if name == "SET_LOG_BASE":
            return LogArea(source.pick((16, _SIZE, 1, 0, 1 << 50)), source.pick((0, 8, 4096))), 1
        if name in ("GET_CONFIG", "SET_CONFIG"):
            size = source.pick((0, 1, 6, 12, 24, 256))
            return Config(source.pick((0, 6, 255)), source.pick((0, 1, 2)), bytes(size)), 0
        if name == "SET_DEVICE_STATE_FD":
            return DeviceStateTransfer(source.below(3), source.pick((0, 0, 1))), 1
        if name in ("SET_BACKEND_REQ_FD", "SET_LOG_FD"):
            return None, 1
        if name.startswith(("SET_VRING", "GET_VRING", "VRING")):
            return VringState(ring, source.pick((0, 1, 16, 15, 0xFFFF, 0x10000, 0x8000))), 0
        if name in ("SET_STATUS", "SEND_RARP", "NET_SET_MTU"):
            return source.pick((0, 1, 3, 11, 15, 0x80, 0x4F, 1500, source.number(8))), 0
        return None, 0

    def _region(self) -> MemoryRegion:
        source = self.source
        size = source.pick((_SIZE, _SIZE, 0x1000, 0x8000, 0, 1 << 40, (1 << 64) - 1))
        gpa = source.pick((0, 0, 0x8000, _SIZE, (1 << 64) - 0x1000))
        user = source.pick((_USER, _USER, _USER + 0x8000, _USER + _SIZE, (1 << 64) - 0x1000))
        return MemoryRegion(gpa, size, user, source.pick((0, 0, 0x1000, 1, _SIZE)))
