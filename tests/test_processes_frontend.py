"""Whatever a frontend says while queues are lent: one of the processes has each ring, or none."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from typing import Any

from apart_world import World
from hypothesis import given, settings
from hypothesis import strategies as st
from vhost_frontend import wait_until

from vq.errors import FrontendError
from vq.vhost_backend import Backend
from vq.vhost_message import (
    Inflight,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    ProtocolFeature,
    Request,
    VhostFeature,
    VringAddr,
    VringFd,
    VringFlag,
    VringState,
)
from vq.vring import Held

RINGS = st.integers(0, 5)
STEPS = st.one_of(
    st.tuples(
        st.just("say"), st.sampled_from(("SET_VRING_NUM",)), RINGS, st.sampled_from((0, 64, 256))
    ),
    st.tuples(
        st.just("say"),
        st.sampled_from(("SET_VRING_BASE", "GET_VRING_BASE", "SET_VRING_ENABLE")),
        RINGS,
        st.sampled_from((0, 1, 2, 0xFFFF, 0x10000)),
    ),
    st.tuples(
        st.just("fd"),
        st.sampled_from(("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR")),
        RINGS,
        st.booleans(),
    ),
    st.tuples(st.just("address"), RINGS, st.sampled_from((0, 64, 1 << 40)), st.booleans()),
    st.tuples(st.just("memory"), st.sampled_from(("same", "none"))),
    st.tuples(st.just("status"), st.sampled_from((0, 1, 3, 11, 15, 0x80, 0x8F))),
    st.tuples(st.just("features"), st.sampled_from(("same", "log", "less", "none"))),
    st.tuples(st.just("protocol"), st.sampled_from(list(ProtocolFeature))),
    st.tuples(st.just("inflight"), st.integers(1, 6), st.sampled_from((16, 256))),
    st.tuples(st.just("log"), st.sampled_from((1, 1 << 10))),
    st.tuples(st.just("reset"), st.sampled_from(("RESET_OWNER", "RESET_DEVICE"))),
    st.tuples(st.just("lend")),
    st.tuples(st.just("lend")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("turn")),
    st.tuples(st.just("send"), st.integers(0, 1)),
)


class Talk:
    """A frontend that may say anything, to a device that was well before."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.greet()

    def greet(self) -> None:
        backend = self.backend
        self.reply, backend._send = backend._send, lambda message: message.close()
        backend.protocol_features |= 1 << ProtocolFeature.RESET_DEVICE
        backend.protocol_features |= 1 << ProtocolFeature.LOG_SHMFD
        backend.protocol_features |= 1 << ProtocolFeature.INFLIGHT_SHMFD

    @property
    def backend(self) -> Backend:
        return self.world.connections[-1].backend

    def say(self, request: Request, payload: Any = None, *fds: int) -> None:
        try:
            self.backend.handle(Message(request, payload, list(fds)))
        except (FrontendError, OSError):
            self.hang_up()

    def hang_up(self) -> None:
        """What the connection does after that; then the frontend comes again."""
        world = self.world
        self.backend._send = self.reply
        world.connections[-1].close()
        assert world.pids == []
        world.frontend.reconnect(world.connect())
        world.driver.restart()
        self.greet()

    def step(self, kind: str, *arguments: Any) -> None:
        world = self.world
        match kind, *arguments:
            case "say", name, ring, number:
                self.say(Request[name], VringState(ring, number))
            case "fd", name, ring, has_fd:
                fds = [os.eventfd(0)] if has_fd else []
                self.say(Request[name], VringFd(ring, has_fd), *fds)
            case "address", ring, shift, logged:
                vring = world.frontend._vrings.get(ring)
                if vring is not None:
                    desc, used, avail = (
                        world.memory.hvaddr(gpa) + shift
                        for gpa in (vring.desc, vring.used, vring.avail)
                    )
                    flags, log = (VringFlag.LOG, vring.used) if logged else (0, 0)
                    self.say(Request.SET_VRING_ADDR, VringAddr(ring, flags, desc, used, avail, log))
            case "memory", which:
                regions = world.memory.regions if which == "same" else ()
                table = MemoryTable(
                    tuple(MemoryRegion(r.gpa, r.size, r.address, r.offset) for r in regions)
                )
                self.say(Request.SET_MEM_TABLE, table, *(os.dup(r.fd) for r in regions))
            case "status", number:
                self.say(Request.SET_STATUS, number)
            case "features", which:
                features = world.driver.features | 1 << VhostFeature.PROTOCOL_FEATURES
                features |= (which == "log") << VhostFeature.LOG_ALL
                features &= {"none": 0, "less": ~(1 << VhostFeature.PROTOCOL_FEATURES)}.get(
                    which, -1
                )
                self.say(Request.SET_FEATURES, features)
            case "protocol", feature:
                self.backend.protocol_features ^= 1 << feature
            case "inflight", queues, size:
                self.say(Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, size))
            case "log", size:
                log = os.memfd_create("log")
                os.ftruncate(log, size)
                self.say(Request.SET_LOG_BASE, LogArea(size, 0), log)
            case "reset", name:
                self.say(Request[name])
            case ("lend",):
                world.lend_now()
            case ("kill",):
                for pid in world.pids:
                    os.kill(pid, signal.SIGKILL)
                wait_until(world.loop, lambda: not world.pids)
            case ("turn",):
                world.loop.run_once(0)
                world.loop.run_once(0)
            case "send", pair:
                with suppress(KeyError):  # its ring was stopped
                    world.driver.send(bytes(64), pair=pair)

    def check(self) -> None:
        """Who has which ring is known, and the same to all."""
        processes = self.world.processes._processes
        lent = {vring.index for vring in self.backend.vrings if vring.held is Held.LENT}
        assert lent == {index for process in processes for index in process.queues}
        assert len(lent) == sum(len(process.queues) for process in processes)
        for index in lent:
            assert self.world.device.queues[index].ring is None
        ours = [port for port, _ in enumerate(self.world.link.ports) if port * 2 in lent]
        assert all(port * 2 + 1 in lent for port in ours), "a port is one process's"


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_each_ring_has_one_master_whatever_is_said(steps: list[tuple[Any, ...]]) -> None:
    with ExitStack() as stack:
        world = World(stack)
        world.lend_now()
        talk = Talk(world)
        for step in steps:
            talk.step(*step)
            talk.check()
        talk.hang_up()
        talk.backend._send = talk.reply
        talk.backend.protocol_features = world.frontend.protocol_features
        world.quiet(0.01)
        for pair in range(2):
            world.sent(pair)
        world.lend_now()
        assert len(world.pids) == 1
        world.works()
