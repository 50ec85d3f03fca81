"""`vq serve` as two processes: what each of them holds, and what happens when one dies.

A scripted guest stands in front of the device; the taps and the processes are real.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_serve import (
    BROADCAST,
    GUEST_MAC,
    SECONDS,
    Guest,
    Plug,
    Serve,
    eventually,
    frame_of,
    plug,
    serve,
)

from vq import sandbox
from vq.abi import DeviceId, NetFeature, Status
from vq.cli import main
from vq.device import RING_FEATURES
from vq.driver import Driver
from vq.memory import GuestMemory
from vq.net_driver import NetDriver
from vq.serve.confinement import open_descriptors
from vq.testing.namespaces import Namespace
from vq.testing.requirements import need_linux, need_namespaces, need_root, need_tap
from vq.testing.vhost_frontend import VhostFrontend
from vq.vhost_message import Request, VringFd

__all__ = ["plug", "serve"]  # fixtures

KILLS = int(os.environ.get("VQ_KILLS", "10"))
"""How often worker and helper are killed; a hundred by hand."""
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
TAP = "vqsep0"
US, HOST = bytes((198, 18, 91, 2)), bytes((198, 18, 91, 1))


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A network stack with a tap and an address on it."""
    need_root()
    need_tap()
    need_namespaces()
    with Namespace("vqsep") as namespace:
        namespace.add_tap(TAP)
        namespace.run(f"ip addr add 198.18.91.1/24 dev {TAP} && ip link set {TAP} up")
        yield namespace


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> list[str]:
    """What a process has open above standard error."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            if int(name) > 2:
                links.append(os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0])
    return sorted(links)


def answers(guest: Guest) -> bool:
    """Whether the host's kernel answers an ARP request of the guest's."""
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + US + bytes(6) + HOST
    guest.send((BROADCAST + GUEST_MAC + b"\x08\x06" + arp).ljust(60, b"\0"))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for data in guest.receive(1, seconds=0.2):
            if data[12:14] == b"\x08\x06" and data[20:22] == b"\0\2":
                return data[28:32] == HOST
    return False


def offloads_of(host: Namespace) -> dict[str, bool]:
    """What the host's kernel leaves undone in the frames that it gives to the tap."""
    words = host.run(f"ethtool -k {TAP}").splitlines()
    pairs = (line.strip().partition(": ") for line in words)
    return {name: value.startswith("on") for name, _, value in pairs}


# --- what they hold ------------------------------------------------------------------------------


def test_worker_and_helper_hold_what_they_need(serve: Serve, plug: Plug, host: Namespace) -> None:
    served = serve(f"--link=tap:{TAP}", prefix=host.argv())
    guest = plug(served.paths[0])
    assert answers(guest)
    worker, helper = served.worker.pid, served.process.pid
    status = status_of(worker)
    assert status["Uid"] == status["Gid"] == ["65534"] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name][0], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert os.listdir(f"/proc/{worker}/root") == []
    assert os.stat(f"/proc/{worker}/mem").st_uid == 0, "others of its user may not look into it"
    its = descriptors(worker)
    # The guest's memory, its inflight notes, what short frames are gathered in, starts of headers.
    assert [link for link in its if link.startswith("/")] == ["/dev/net/tun", *["/memfd"] * 4]
    # The helper's two, the listening one, the frontend's two.
    assert its.count("socket") == 5
    assert set(its) == {"/dev/net/tun", "/memfd", "anon_inode", "pipe", "socket"}
    status = status_of(helper)
    assert int(status["CapEff"][0], 16) == 1 << 1 | 1 << 5 | 1 << 12
    assert status["NoNewPrivs"] == ["1"]
    assert not [link for link in descriptors(helper) if "memfd" in link], "a guest's memory"
    limits = Path(f"/proc/{worker}/limits").read_text()
    for name, most in (("core file size", 0), ("data size", 1 << 30), ("open files", 4096)):
        assert re.search(rf"Max {name} +{most} +{most} ", limits), limits
    log = served.stop()
    assert "guests are served with: own namespaces without files; user nobody" in log


def test_a_helper_without_taps_keeps_no_privileges_for_them(serve: Serve, plug: Plug) -> None:
    served = serve("--memory-limit=100")
    plug(served.paths[0]).echo()
    if os.geteuid() == 0:
        assert int(status_of(served.process.pid)["CapEff"][0], 16) == 1 << 1 | 1 << 5
    limits = Path(f"/proc/{served.worker.pid}/limits").read_text()
    assert re.search(rf"Max data size +{100 << 20} +{100 << 20} ", limits), limits
    served.stop()


def test_a_tap_that_is_moved_to_another_namespace_is_followed(
    serve: Serve, plug: Plug, host: Namespace
) -> None:
    """By a helper that may not go there itself: it asks by netlink."""
    served = serve(f"--link=tap:{TAP}", prefix=host.argv())
    guest = plug(served.paths[0])
    assert answers(guest)
    with Namespace("vqsepb") as other:
        host.run(f"ip link set {TAP} netns {other.name}")  # which takes it down
        eventually(lambda: f"{TAP} is down" in served.log(), "that it is down")
        other.run(f"ip addr add 198.18.91.1/24 dev {TAP} && ip link set {TAP} mtu 1400 up")
        eventually(lambda: f"{TAP} is up" in served.log(), "that it is up")
        assert answers(guest)


def test_offloads_follow_the_guest_through_the_helper(serve: Serve, host: Namespace) -> None:
    served = serve(f"--link=tap:{TAP}", prefix=host.argv())
    csum, tso = "tx-checksum-ip-generic", "tx-tcp-segmentation"
    assert not offloads_of(host)[csum]
    with GuestMemory.allocate(8 << 20) as memory:
        frontend = VhostFrontend(served.paths[0], memory)
        driver = NetDriver(frontend, memory, idle=frontend.wait)
        eventually(lambda: offloads_of(host)[csum] and offloads_of(host)[tso], "offloads on")
        driver.set_guest_offloads(1 << NetFeature.GUEST_CSUM)
        eventually(lambda: offloads_of(host)[csum] and not offloads_of(host)[tso], "TSO off")
        for _ in range(50):  # faster than the helper answers
            driver.set_guest_offloads(0)
            driver.set_guest_offloads(1 << NetFeature.GUEST_CSUM | 1 << NetFeature.GUEST_TSO4)
        eventually(lambda: offloads_of(host)[tso], "TSO on again")
        driver.set_guest_offloads(0)
        driver.close()
        frontend.close()
        eventually(lambda: not offloads_of(host)[csum], "offloads off once the guest is gone")
    served.stop()


def test_another_user_serves_when_that_is_asked_for(serve: Serve, plug: Plug) -> None:
    need_linux()
    need_root()
    served = serve("--user=daemon")
    plug(served.paths[0]).echo()
    assert served.worker.username() == "daemon"
    assert "user daemon" in served.stop()


def test_an_ordinary_user_is_served_by_two_processes_too(tmp_path: Path, plug: Plug) -> None:
    need_linux()
    need_root()  # to become one
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    path, log = str(directory / "s"), directory / "log"
    importlib.import_module("vq.serve.net")  # an ordinary user may not read where tests run
    sandbox.prepare()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
            os.chdir(directory)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            logging.getLogger().handlers.clear()
            status = main(["serve", "net", "--socket=s"])
        finally:
            os._exit(status)
    try:
        eventually(lambda: os.path.lexists(path), "the socket")
        plug(path).echo()
        helper = psutil.Process(child)
        (worker,) = helper.children()
        for process in (helper, worker):
            assert process.uids().real == 65534
        status_lines = status_of(worker.pid)
        assert int(status_lines["CapEff"][0], 16) == 0
        assert (status_lines["NoNewPrivs"], status_lines["Seccomp"]) == (["1"], ["2"])
    finally:
        os.kill(child, signal.SIGTERM)
        ended = os.waitpid(child, 0)[1]
    assert ended == 0, log.read_text()
    assert not os.path.lexists(path)


def test_who_cannot_become_the_user_is_told_of_it(tmp_path: Path) -> None:
    """As root of a user namespace without nobody in it: "Operation not permitted" was all."""
    need_linux()
    words = ["serve", "rng", f"--socket={tmp_path / 's'}"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-m", "vq", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    *_, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.fullmatch(r"vq serve: this process cannot become the user nobody: [\w ]+", last)


def test_without_a_sandbox_there_is_one_process(serve: Serve, plug: Plug) -> None:
    served = serve("--sandbox=off")
    plug(served.paths[0]).echo()
    assert psutil.Process(served.process.pid).children() == []
    served.stop()


def test_what_a_device_holds_is_not_what_somebody_left_open(serve: Serve, tmp_path: Path) -> None:
    need_linux()
    with (tmp_path / "secret").open("w") as file:
        served = serve(fds=[file.fileno()])
    assert not [link for link in descriptors(served.worker.pid) if "secret" in link]
    served.stop()


def test_what_is_typed_at_the_terminal_is_not_the_workers_to_read(serve: Serve, plug: Plug) -> None:
    """The helper's standard input was its own, too: a terminal of root's for instance."""
    need_linux()
    ours, theirs = os.openpty()
    try:
        served = serve(prepare=lambda: os.dup2(theirs, 0) and None)
        inputs = [os.readlink(f"/proc/{p.pid}/fd/0") for p in (served.process, served.worker)]
        assert inputs == [os.ttyname(theirs), os.devnull]
        plug(served.paths[0]).echo()
        served.stop()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("closed", [True, False])
def test_the_number_of_standard_input_may_be_anothers(
    closed: bool, tmp_path: Path, plug: Plug
) -> None:
    """Of a socket that was handed over, or of whatever was opened first where there is none."""
    need_linux()
    path = str(tmp_path / "s")
    argv = [sys.executable, "-m", "vq", "serve", "net"]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        argv += [f"--fd={listening.fileno()}"] if closed else ["--fd=0"]
        process = subprocess.Popen(
            argv,
            stdin=listening,
            stderr=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            preexec_fn=(lambda: os.close(0)) if closed else None,
        )
    try:
        plug(path).echo()
    finally:
        process.terminate()
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said


MODEL = """
import ctypes
import fcntl
import os
from vq import Device
from vq.abi import DeviceId
from vq.device import RING_FEATURES

LIBC = ctypes.CDLL(None)

class Source(Device):
    device_id = DeviceId.ENTROPY
    def __init__(self, does="read"):
        super().__init__(features=RING_FEATURES, queues=[("requests", 64)])
        self.source = os.open("/dev/urandom", os.O_RDONLY)
        self.does = does
    def process(self, queue, ring):
        chains = ring.pop_burst(64)
        for chain in chains:
            if self.does == "ask":
                os.uname()
            elif self.does == "time":
                os.close(LIBC.timerfd_create(1, 0))  # one that vq itself does not make
            elif self.does == "control":
                fcntl.ioctl(self.source, 0x80045200, bytes(4))  # RNDGETENTCNT
            elif self.does == "look":
                try:
                    os.open("/dev/urandom", os.O_RDONLY)
                except PermissionError:
                    pass
            chain.written = os.readv(self.source, chain.writable)
        ring.write_used_burst(chains)
        self.publish(queue)
        return bool(chains)
"""


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("does", ["read", "look", "ask", "time", "control"])
def test_a_model_of_ones_own_does_what_it_lists(does: str, listed: bool, tmp_path: Path) -> None:
    """What is open may be used; files are not found; another call, or request, has to be listed."""
    need_linux()
    model = MODEL
    if listed:
        model += 'SYSTEM_CALLS = ("uname", "timerfd_create")\nIOCTLS = (0x80045200,)\n'
    (tmp_path / "model.py").write_text(model)
    path = tmp_path / "s"
    argv = [sys.executable, "-m", "vq", "serve", "model:Source", f"--socket={path}"]
    with subprocess.Popen(
        [*argv, "--with", f"does={does}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            eventually(path.exists, "the socket")
            with GuestMemory.allocate(1 << 20) as memory:
                frontend = VhostFrontend(
                    path, memory, device_id=DeviceId.ENTROPY, queue_count=1, queue_size=64
                )
                guest = Driver(frontend, memory, RING_FEATURES)
                guest.probe()
                queue = guest.queues[0]
                queue.add((), [(guest.allocator.allocate(32), 32)])
                guest.kick(0)
                killed = does in ("ask", "time", "control") and not listed
                eventually(lambda: bool(process.poll() if killed else queue.collect()), "an answer")
                frontend.close()
        finally:
            process.terminate()
            _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == (1 if killed else 0), said
    assert ("a system call that is not on its list" in said) == killed


# --- what is missing -----------------------------------------------------------------------------


def without_sys_admin() -> list[str]:
    """Root as in a container: no namespaces can be made."""
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    return [setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]


def test_a_sandbox_with_a_wall_less_is_told(serve: Serve, plug: Plug) -> None:
    need_linux()
    need_root()
    served = serve(prefix=without_sys_admin())
    plug(served.paths[0]).echo()
    log = served.stop()
    assert "the sandbox is without: namespaces (unshare: Operation not permitted)" in log


def test_a_sandbox_with_a_wall_less_is_refused_where_all_are_required(tmp_path: Path) -> None:
    need_linux()
    need_root()
    argv = [sys.executable, "-m", "vq", "serve", "net", f"--socket={tmp_path / 's'}"]
    done = subprocess.run(
        [*without_sys_admin(), *argv, "--sandbox=require"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert "vq serve: --sandbox=require, but there is not: namespaces (unshare: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


def test_all_walls_are_there_on_this_host(serve: Serve, plug: Plug) -> None:
    need_linux()
    need_root()
    served = serve("--sandbox=require")
    plug(served.paths[0]).echo()
    served.stop()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--user=root"], "'root' is no unprivileged user"),
        (["--user=nobody-of-this-name"], "there is no user 'nobody-of-this-name' here"),
        (["--user=nobody", "--sandbox=off"], "--user goes with a sandbox"),
        (["--restart", "--record=x"], "it goes without --restart"),
        (["--sandbox=perhaps"], "invalid choice"),
        (["--socket-user=nobody-of-this-name"], "there is no user 'nobody-of-this-name' here"),
        (["--socket-group=nobody-of-this-name"], "there is no group 'nobody-of-this-name' here"),
        (["--socket-mode=888"], "'888' is no mode such as 660"),
        (["--socket-mode=1777"], "'1777' is no mode such as 660"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need_root()
    try:
        status: object = main(["serve", "net", f"--socket={tmp_path / 's'}", *words])
    except SystemExit as end:  # argparse
        status = end.code
    *_, last = capfd.readouterr().err.splitlines()
    assert status == 2 and sentence in last
    assert os.listdir(tmp_path) == []


# --- sockets and files ---------------------------------------------------------------------------


def test_a_socket_belongs_to_whom_it_is_given(serve: Serve, plug: Plug) -> None:
    need_root()
    served = serve("--socket-user=daemon", "--socket-group=65534", "--socket-mode=640")
    status = os.lstat(served.paths[0])
    assert (status.st_uid, status.st_gid) == (psutil.Process().uids().real + 1, 65534)
    assert stat.S_IMODE(status.st_mode) == 0o640
    plug(served.paths[0]).echo()
    served.stop()


@pytest.mark.parametrize(
    ("words", "mode"), [(["--socket-user=0"], 0o600), (["--socket-group=0"], 0o660)]
)
def test_nobody_else_may_connect_to_a_socket_that_is_given_away(
    serve: Serve, words: list[str], mode: int
) -> None:
    need_root()
    served = serve(*words)
    assert stat.S_IMODE(os.lstat(served.paths[0]).st_mode) == mode
    served.stop()


@pytest.mark.parametrize("option", ["--capture={}", "--link=pcap:nothing.pcap,{}", "--record={}"])
def test_no_file_is_written_through_a_link(option: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("of the user's")
    shutil.copy(Path(__file__).parent.parent / "vq/data/sample.pcapng", tmp_path / "nothing.pcap")
    (tmp_path / "trap.pcapng").symlink_to(precious)
    argv = [sys.executable, "-m", "vq", "serve", "net", "--socket=s", option.format("trap.pcapng")]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 2
    assert done.stderr.endswith("trap.pcapng: a symbolic link is not written through\n")
    assert precious.read_text() == "of the user's"


def test_a_link_in_the_place_of_a_socket_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").symlink_to(tmp_path / "elsewhere")
    assert main(["serve", "net", f"--socket={tmp_path / 's'}"]) == 2
    assert "is there already, and is not a socket" in capfd.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


# --- ends ----------------------------------------------------------------------------------------


def test_a_worker_that_dies_ends_its_helper_with_the_reason(serve: Serve) -> None:
    served = serve()
    served.worker.kill()
    assert served.ended() == 1
    assert "the worker was killed by SIGKILL" in served.log()
    assert not os.path.lexists(served.paths[0])


def test_a_helper_that_dies_ends_its_worker(serve: Serve, plug: Plug) -> None:
    served = serve()
    guest = plug(served.paths[0])
    guest.echo()
    worker = served.worker
    served.process.kill()
    served.ended()
    eventually(lambda: not worker.is_running(), "the worker's end")
    with pytest.raises(ConnectionError):
        while True:
            guest.frontend.status  # noqa: B018


def test_memory_that_is_cut_short_kills_the_worker_and_it_is_started_again(
    serve: Serve, plug: Plug
) -> None:
    served = serve("--restart")
    first = served.worker
    with GuestMemory.allocate(8 << 20) as memory:
        frontend = VhostFrontend(served.paths[0], memory)
        NetDriver(frontend, memory, idle=frontend.wait)
        (region,) = memory.regions
        os.ftruncate(region.fd, 0)  # from now on nobody may look at this memory, not we either
        frontend.notify(1)
        eventually(lambda: not first.is_running(), "the worker's end")
        frontend.disconnect()
    eventually(lambda: len(psutil.Process(served.process.pid).children()) == 1, "another worker")
    plug(served.paths[0]).echo()
    log = served.stop()
    assert "the worker was killed by SIGBUS: memory that a guest shares was cut short" in log
    assert "the worker is started again" in log


def test_a_frontend_that_makes_its_worker_wait_holds_up_nobody_for_long(
    serve: Serve, plug: Plug
) -> None:
    """Two guests on a cable are one worker's; the first fills its own call descriptor, and sets it
    back to blocking again and again."""
    served = serve("--link=pair", sockets=["hostile", "other"])
    hostile, other = (plug(path) for path in served.paths)
    event = os.eventfd(0, 0)
    os.eventfd_write(event, 2**64 - 2)
    hostile.frontend._tell(Request.SET_VRING_CALL, VringFd(0, True), [event])
    longest = 0.0
    for number in range(3):
        os.set_blocking(event, True)
        other.send(frame_of(number))
        frames: list[bytes] = []
        began = time.monotonic()
        while not frames and time.monotonic() < began + SECONDS:
            asked = time.monotonic()
            assert other.frontend.status == RUNNING
            longest = max(longest, time.monotonic() - asked)
            hostile.driver._called.add(0)  # no call comes: its descriptor is another
            frames = hostile.receive(1, seconds=0.05)
        assert frames == [frame_of(number)]
    print(f"held up for {longest:.2f} s at most")
    os.close(event)
    log = served.stop()
    assert "a descriptor that it shares was made to wait: it gets no more events" in log


def test_a_new_worker_finds_the_queues_as_the_first_one_did(serve: Serve, plug: Plug) -> None:
    """The dead one had attached two; attaching one again is refused by the kernel."""
    need_tap()
    need_namespaces()
    with Namespace("vqsep") as host:
        host.add_tap(TAP, queues=2)
        host.run(f"ip addr add 198.18.91.1/24 dev {TAP} && ip link set {TAP} up")
        words = ("--restart", "--queue-pairs=2", f"--link=tap:{TAP}")
        served = serve(*words, prefix=host.argv())
        for _ in range(2):
            guest = plug(served.paths[0], pairs=2)
            assert guest.driver.set_queue_pairs(2)
            assert answers(guest)
            first = served.worker
            first.kill()
            eventually(lambda dead=first: not dead.is_running(), "its end")  # type: ignore[misc]
            guest.frontend.disconnect()
        guest = plug(served.paths[0], pairs=2)
        assert all(answers(guest) for _ in range(5)), "frames of one queue alone"
        log = served.stop()
    assert "refused" not in log and "broke" not in log


def test_service_is_back_whoever_is_killed(serve: Serve, plug: Plug, host: Namespace) -> None:
    """Under traffic, at random moments; nothing is left over."""
    rng = random.Random(1)
    words = ("--restart", f"--link=tap:{TAP}")
    served = serve(*words, prefix=host.argv())
    guest = plug(served.paths[0])
    taps = host.run("ip -o link | wc -l")
    helper_descriptors = descriptors(served.process.pid)
    frame = (BROADCAST + GUEST_MAC + b"\x88\xb5").ljust(64, b"\0")
    longest = 0.0
    for number in range(KILLS):
        if number % 5 == 4:  # the helper, and with it the service: somebody starts it again
            victim, restart = served.process.pid, True
        else:
            victim, restart = served.worker.pid, False
        moment = time.monotonic() + rng.random() * 0.1
        while time.monotonic() < moment:
            guest.send(frame)
            guest.driver.receive()
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        if restart:
            served.ended()
            served = serve(*words, prefix=host.argv())
        guest.frontend.reconnect()
        assert answers(guest), f"after {number} kills: {served.log()}"
        longest = max(longest, time.monotonic() - began)
        assert descriptors(served.process.pid) == helper_descriptors
        assert host.run("ip -o link | wc -l") == taps
        assert len(psutil.Process(served.process.pid).children()) == 1
    print(f"{KILLS} kills: back after {longest:.2f} s at the latest")
    worker = served.worker
    served.stop()
    assert not worker.is_running()


def test_only_descriptors_that_are_open_count_as_left_to_us() -> None:
    """The one by which they were listed was closed, its number taken again by a tap's io_uring,
    and that was closed as a stray: a worker's event loop ended with the ring that came next.
    """
    read, write = os.pipe()
    try:
        found = open_descriptors()
        assert {read, write} <= found and not found & {0, 1, 2}
        for fd in found:
            os.fstat(fd)
    finally:
        os.close(read)
        os.close(write)
