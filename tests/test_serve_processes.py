"""`vq serve net` with a process for each queue pair: what each holds, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from apart_world import flow_frame, is_gone, number_of, packet_socket
from test_serve import Guest, Plug, Serve, Served, eventually, frame_of, plug, serve
from test_serve_confined import status_of

from vq.serve import parse
from vq.testing.namespaces import Namespace
from vq.testing.requirements import need_namespaces, need_program, need_root, need_tap

__all__ = ["plug", "serve"]  # fixtures

TAP = "vqpar0"
WORDS = ("--queue-pairs=2", "--processes=2", f"--link=tap:{TAP}")


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A network stack with a tap of two queues."""
    need_root()
    need_tap()
    need_namespaces()
    with Namespace("vqpar") as namespace:
        add_tap(namespace)
        yield namespace


def add_tap(host: Namespace) -> None:
    host.add_tap(TAP, queues=2)
    host.run(f"echo 1 >/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6 && ip link set {TAP} up")


def other_of(served: Served) -> psutil.Process:
    """The process that the worker has forked, once there is one."""
    others: list[psutil.Process] = []
    eventually(lambda: others.extend(served.worker.children()) or bool(others), "another process")
    (other,) = others
    return other


class Host:
    """The tap's other end."""

    def __init__(self, namespace: Namespace) -> None:
        self.socket = packet_socket(namespace.name, TAP)

    def works(self, guest: Guest, *pairs: int) -> None:
        """Frames leave on both pairs, and come in on both."""
        for pair in pairs or (0, 1):
            assert guest.driver.send(frame_of(7), pair=pair)
            found: list[int] = []
            eventually(lambda: found.extend(self.numbers()) or bool(found), f"from pair {pair}")  # noqa: B023
            assert found == [7]
        frames = [flow_frame(number) for number in range(64)]
        for frame in frames:
            self.socket.sendto(frame, (TAP, 0x0800))
        assert sorted(guest.receive(64)) == sorted(frames)

    def numbers(self) -> list[int]:
        numbers = []
        with suppress(BlockingIOError):
            while True:
                numbers.append(number_of(self.socket.recv(2048)))
        return numbers

    def close(self) -> None:
        self.socket.close()


def test_another_process_has_the_confinement_and_no_sockets(
    serve: Serve, plug: Plug, host: Namespace
) -> None:
    served = serve(*WORDS, "--sandbox=require", prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    with closing(Host(host)) as outside:
        other = other_of(served)
        outside.works(guest)
        status = status_of(other.pid)
        assert status["Uid"] == status["Gid"] == ["65534"] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0, name
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        assert os.listdir(f"/proc/{other.pid}/root") == []
        for kind in ("net", "mnt", "ipc"):
            inside = os.readlink(f"/proc/{other.pid}/ns/{kind}")
            assert inside == os.readlink(f"/proc/{served.worker.pid}/ns/{kind}")
            assert inside != os.readlink(f"/proc/self/ns/{kind}")
        limits = Path(f"/proc/{other.pid}/limits").read_text()
        assert re.search(rf"Max data size +{1 << 30} ", limits), limits
        files = [
            os.readlink(f"/proc/{other.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{other.pid}/fd")
        ]
        assert sum(name.startswith("socket:") for name in files) == 1, "to the worker"
        assert files.count("anon_inode:[eventpoll]") == 1
        assert files.count("anon_inode:[io_uring]") <= 1
        assert other.children() == []
    log = served.stop()
    assert f"process {other.pid} serves rx1, tx1" in log
    assert is_gone(other.pid)


CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(?:<\.\.\. )?(\w+)(?:\(| resumed)")


def listed_by(*modules: str) -> set[str]:
    """The system calls that a process with these modules may make."""
    code = f"import {', '.join(modules)}\nfrom vq.sandbox import linux"
    code += "; print(*linux.listed_calls())"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_it_makes_only_the_calls_that_are_listed(
    serve: Serve, plug: Plug, host: Namespace, tmp_path: Path
) -> None:
    served = serve(*WORDS, "--sandbox=require", prefix=host.argv())
    trace = tmp_path / "trace"
    argv = [
        need_program("strace"),
        "-f",
        "-X",
        "raw",
        "-o",
        str(trace),
        "-p",
        str(served.worker.pid),
    ]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
        try:
            assert strace.stderr is not None
            assert "attached" in strace.stderr.readline()
            guest = plug(served.paths[0], pairs=2)
            with closing(Host(host)) as outside:
                pids = [other_of(served).pid]
                outside.works(guest)
                time.sleep(1.2)  # in which it says what it counted
                guest.driver.set_queue_pairs(2)
                pids.append(other_of(served).pid)
                outside.works(guest)
                guest.driver.close()
        finally:
            strace.terminate()
            strace.communicate(timeout=20)
    listed = listed_by("vq.serve.net", "vq.tap_linux", "vq.queue_process")
    assert "fork" in listed
    lines = trace.read_text().splitlines()
    for pid in pids:
        its = [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{pid} ")]
        calls = {match[1] for line in its if (match := CALL.match(line))} - {"killed", "exited"}
        assert {"prctl", "sendto"} <= calls and calls <= listed, calls - listed
        assert calls & {"writev", "io_uring_enter"}, "frames were its work"
    worker = {match[1] for line in lines if (match := CALL.match(line))} - {"killed", "exited"}
    # Python 3.12 and newer look into /proc how many threads there are at a fork; that is refused.
    assert worker - {"clone", "openat"} <= listed, worker - listed
    served.stop()


@pytest.mark.parametrize("words", [["--capture=x.pcapng"], ["--record=x.vqrec"], ["--processes=1"]])
def test_who_may_not_fork_loads_nothing_that_a_filter_would_allow_it_for(words: list[str]) -> None:
    """What the modules that are loaded list is what a confined worker may do."""
    kind, args = parse("net", ["--socket=s", "--queue-pairs=2", *words])
    assert kind.processes(args) == 1
    kind, args = parse("net", ["--socket=s", "--queue-pairs=2", "--processes=3"])
    assert kind.processes(args) == 2


def test_a_service_that_may_not_fork_does_not(serve: Serve, plug: Plug, host: Namespace) -> None:
    """The calls that it takes are on nobody else's list."""
    served = serve("--queue-pairs=2", "--processes=1", f"--link=tap:{TAP}", prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    with closing(Host(host)) as outside:
        outside.works(guest)
    time.sleep(0.2)
    assert served.worker.children() == []
    served.stop()
    listed = listed_by("vq.serve.net", "vq.tap_linux")
    assert not listed & {"fork", "kill", "prctl", "wait4"}


@pytest.mark.parametrize(
    "words", [("--capture={}/c.pcapng",), ("--record={}/r.vqrec",), ("--link=loopback",)]
)
def test_what_has_to_pass_one_process_does(
    serve: Serve, plug: Plug, host: Namespace, words: tuple[str, ...], tmp_path: Path
) -> None:
    served = serve(*WORDS, *(word.format(tmp_path) for word in words), prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    assert guest.driver.send(frame_of(1), pair=1)
    assert guest.driver.wait_sent(1)
    time.sleep(0.2)
    assert served.worker.children() == []
    served.stop()


def test_one_that_is_killed_is_replaced(serve: Serve, plug: Plug, host: Namespace) -> None:
    served = serve(*WORDS, prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    with closing(Host(host)) as outside:
        for _ in range(2):
            other = other_of(served)
            outside.works(guest)
            other.kill()
            eventually(lambda dead=other: is_gone(dead.pid), "its end")  # type: ignore[misc]
            outside.works(guest)
    other_of(served)
    assert "which served 2 queues, was killed by SIGKILL" in served.stop()


def test_it_is_gone_when_its_worker_is_killed_and_the_next_one_has_another(
    serve: Serve, plug: Plug, host: Namespace
) -> None:
    served = serve(*WORDS, "--restart", prefix=host.argv())
    for _ in range(2):
        guest = plug(served.paths[0], pairs=2)
        with closing(Host(host)) as outside:
            other, worker = other_of(served), served.worker
            outside.works(guest)
            worker.kill()
            eventually(lambda dead=worker: not dead.is_running(), "the worker's end")  # type: ignore[misc]
            eventually(lambda dead=other: is_gone(dead.pid), "its end", seconds=0.5)  # type: ignore[misc]
            guest.frontend.disconnect()
            eventually(lambda: len(psutil.Process(served.process.pid).children()) == 1, "another")
    guest = plug(served.paths[0], pairs=2)
    with closing(Host(host)) as outside:
        other_of(served)
        outside.works(guest)
    served.stop()


@pytest.mark.parametrize("sandbox", ["auto", "off"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_end_in_order_when_all_are_told(
    serve: Serve, plug: Plug, host: Namespace, number: int, sandbox: str
) -> None:
    """As by Ctrl-C, which a terminal sends to each process."""
    words = (*WORDS, f"--sandbox={sandbox}")
    served = serve(*words, prefix=host.argv(), prepare=os.setsid)
    guest = plug(served.paths[0], pairs=2)
    process = psutil.Process(served.process.pid)
    with closing(Host(host)) as outside:
        everybody: list[psutil.Process] = []
        wanted = 1 if sandbox == "off" else 2

        def all_there() -> bool:
            everybody[:] = process.children(recursive=True)
            return len(everybody) == wanted

        eventually(all_there, "another process")
        outside.works(guest)
    os.killpg(served.process.pid, number)
    assert served.ended() == 0, served.log()
    assert all(is_gone(one.pid) for one in everybody)
    assert not os.path.lexists(served.paths[0])
    log = served.log()
    assert "Traceback" not in log and "killed" not in log and " failed" not in log


def test_statistics_are_of_all_processes(serve: Serve, plug: Plug, host: Namespace) -> None:
    served = serve(*WORDS, "--stats", "json", prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    other_of(served)
    for pair in (0, 1):
        for number in range(100):
            assert guest.driver.send(frame_of(number), pair=pair)
        assert guest.driver.wait_sent(pair)

    def told() -> dict[str, int]:
        *_, last = ["{}", *served.out.read_text().splitlines()]
        total: dict[str, int] = json.loads(last).get("total", {})
        return total

    eventually(lambda: told().get("tx_frames", 0) >= 200, "all are counted")
    assert (told()["tx_frames"], told()["tx_bytes"]) == (200, 200 * 64)
    served.stop()


def test_a_tap_that_is_deleted_and_made_again(serve: Serve, plug: Plug, host: Namespace) -> None:
    served = serve(*WORDS, prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    other_of(served)
    with closing(Host(host)) as outside:
        outside.works(guest)
    host.run(f"ip link del {TAP}")
    guest.driver.send(frame_of(1), pair=1)
    eventually(lambda: guest.frontend.wait() and not guest.driver.settings.link_up, "down")
    add_tap(host)
    eventually(lambda: guest.frontend.wait() and guest.driver.settings.link_up, "up again")
    other_of(served)
    with closing(Host(host)) as outside:
        outside.works(guest)
        other_of(served)
        outside.works(guest)
    served.stop()


def test_frames_longer_than_the_mtu_was_arrive_on_every_pair(
    serve: Serve, plug: Plug, host: Namespace
) -> None:
    served = serve(*WORDS, "--features=-GUEST_TSO4,-GUEST_TSO6,-GUEST_UFO", prefix=host.argv())
    guest = plug(served.paths[0], pairs=2)
    with closing(Host(host)) as outside:
        other_of(served)
        outside.works(guest)
        host.run(f"ip link set {TAP} mtu 9000")
        frames = [flow_frame(number, longer=8000) for number in range(40)]
        got: set[bytes] = set()

        def come() -> bool:
            for frame in set(frames) - got:
                outside.socket.sendto(frame, (TAP, 0x0800))
            got.update(guest.receive(40, seconds=0.1))
            return got == set(frames)

        eventually(come, "long frames")
        other_of(served)
        outside.works(guest)
    served.stop()
