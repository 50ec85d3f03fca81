"""``vq serve blk``, ``rng`` and ``MODULE:CLASS`` as programs, before a scripted frontend."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from block_guest import FLUSH, GET_ID, IN, IOERR, OK, OUT, SECTOR, BlockGuest
from test_serve import Served, eventually

from vq.abi import DeviceId
from vq.cli import main
from vq.driver import Driver
from vq.memory import GuestMemory
from vq.serve.blk import BlkKind
from vq.testing.requirements import need_program
from vq.testing.vhost_frontend import VhostFrontend

SECONDS = 30.0
SIZE = 1 << 20

OWN_DEVICE = """\
import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from vq import DeviceModel


class Upper(DeviceModel):
    device_id = 42

    def __init__(self, prefix=""):
        super().__init__(queues=[("texts", 16, self.answer)])
        self.prefix = prefix.encode()

    def answer(self, requests):
        for request in requests:
            request.writer.write(self.prefix + request.reader.read().upper())
            request.complete()


class Later(Upper):
    # In a thread for texts that begin with t, by a coroutine for the others.

    def __init__(self):
        super().__init__()
        self.executor = ThreadPoolExecutor(2)

    def answer(self, requests):
        for request in requests:
            text = request.reader.read()
            if text.startswith(b"t"):
                self.run_in(self.executor, lambda request: request.writer.write(b"thread"), request)
            else:
                self.run_async(self.slowly(request), request)

    async def slowly(self, request):
        await asyncio.sleep(0.01)
        request.writer.write(await asyncio.to_thread(lambda: b"coroutine"))


class Early(Upper):
    def __init__(self):
        super().__init__()
        threading.Thread(target=time.sleep, args=(20,), name="ticker", daemon=True).start()


def broken():
    raise RuntimeError("a mistake of the author's")


def decoded():
    json.loads("")


def mistyped():
    return len(7)


number = 7
"""


class Plugged:
    """A scripted frontend with a device that is served, and memory for a driver."""

    def __init__(self, path: str, device_id: int, queues: int) -> None:
        self.memory = GuestMemory.allocate(8 << 20)
        self.frontend = VhostFrontend(path, self.memory, device_id=device_id, queue_count=queues)

    def disk(self) -> BlockGuest:
        return BlockGuest(self.frontend, self.memory, wait=self.frontend.wait)

    def close(self) -> None:
        self.frontend.close()
        self.memory.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(kind: str, *words: str, **how: object) -> Served:
        made.append(Served(tmp_path, *words, kind=kind, **how))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def plug() -> Iterator[Callable[..., Plugged]]:
    made: list[Plugged] = []

    def start(served: Served, device_id: int, queues: int = 1) -> Plugged:
        made.append(Plugged(served.paths[0], device_id, queues))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


Serve = Callable[..., Served]
Plug = Callable[..., Plugged]

# --- blk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--direct",)])
def test_a_disk_is_read_and_written_and_the_image_is_whole_at_the_end(
    serve: Serve, plug: Plug, image: Path, words: Sequence[str]
) -> None:
    served = serve("blk", "--image", str(image), "--serial=a-disk", "--queues=2", *words)
    guest = plug(served, DeviceId.BLOCK, 2).disk()
    before = image.read_bytes()
    assert guest.capacity == SIZE // SECTOR
    assert guest.read(5, 9) == before[5 * SECTOR : 14 * SECTOR]
    guest.write(6, b"\xaa" * SECTOR, queue=1)
    assert guest.ask(FLUSH).status == OK
    assert guest.ask(GET_ID, room=20).data == b"a-disk".ljust(20, b"\0")
    log = served.stop()
    assert "negotiated SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ" in log
    assert image.read_bytes() == before[: 6 * SECTOR] + b"\xaa" * SECTOR + before[7 * SECTOR :]


def test_a_read_only_disk_shares_its_image_with_others(
    serve: Serve, plug: Plug, image: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve("blk", "--blk-file", str(image), "--read-only")
    guest = plug(served, DeviceId.BLOCK).disk()
    assert guest.ask(OUT, 0, bytes(SECTOR)).status == IOERR
    assert main(["serve", "blk", "--socket=x", "--image", str(image)]) == 2
    assert capfd.readouterr().err == f"vq serve: {image} is in use by another process\n"
    second = serve("blk", "--image", str(image), "--read-only", sockets=["t"])
    second.stop()
    served.stop()


def test_a_hangup_has_the_size_looked_at(serve: Serve, plug: Plug, image: Path) -> None:
    served = serve("blk", "--image", str(image))
    plugged = plug(served, DeviceId.BLOCK)
    guest = plugged.disk()
    os.truncate(image, 2 * SIZE)
    served.process.send_signal(signal.SIGHUP)
    eventually(lambda: plugged.frontend.wait() and guest.capacity == 2 * SIZE // SECTOR, "grown")
    assert f"has {2 * SIZE} bytes now" in served.stop()


def test_statistics_say_what_was_done(serve: Serve, plug: Plug, image: Path) -> None:
    served = serve("blk", "--image", str(image), "--stats=json")
    guest = plug(served, DeviceId.BLOCK).disk()
    guest.write(0, bytes(8 * SECTOR))
    guest.read(0, 4)
    guest.ask(FLUSH)
    guest.ask(IN, SIZE, room=SECTOR)

    def total() -> dict[str, int]:
        lines = served.out.read_text().split("\n")[:-1]
        return json.loads(lines[-1])["total"] if lines else {}

    eventually(lambda: total().get("refused_ioerr") == 1, "a line with all of it")
    assert {"write": 1, "write_bytes": 4096, "read": 1, "flush": 1}.items() <= total().items()
    served.stop()


def test_statistics_for_people_leave_out_what_was_not() -> None:
    new = {"read": 3, "read_bytes": 2_000_000, "flush": 1, "write": 0, "refused_ioerr": 2}
    assert BlkKind().statistics(new) == "read 3 (2.0 MB)   flush 1   refused_ioerr 2"
    assert BlkKind().statistics({}) == "idle"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required: --image/--blk-file"),
        (["--image=nothing"], "nothing: No such file or directory"),
        (["--image=."], ". is neither a file nor a block device"),
        (["--image=image", "--queues=0"], "--queues 0: there can be 1 to 256"),
        (["--image=image", "--queues=1000"], "--queues 1000: there can be 1 to 256"),
        (
            ["--image=image", "--queue-size=2"],
            "--queue-size 2: a request takes up to 4 descriptors",
        ),
        (["--image=image", "--serial=" + "x" * 21], "--serial: up to 20 characters of ASCII"),
        (["--image=image", "--serial=ä"], "--serial: up to 20 characters of ASCII"),
        (["--image=image", "--block-size=1000"], "argument --block-size: invalid choice"),
        (["--image=link"], "link is a symbolic link: name what it leads to"),
        (["--image="], "'': No such file or directory"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(image.parent)
    Path("link").symlink_to(image)
    try:
        status = main(["serve", "blk", "--socket=s", *words])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    err = capsys.readouterr().err
    assert status == 2
    assert complaint in err and err.count("\n") == 1


def test_a_device_that_is_not_named_is_missed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It said that DEVICE and "..." were required."""
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "vq serve: the following arguments are required: DEVICE\n"


@pytest.mark.parametrize(
    ("kind", "capabilities"),
    [
        ("blk", {"type": "block", "features": ["read-only", "blk-file"]}),
        ("rng", {"type": "rng"}),
    ],
)
def test_capabilities_are_those_of_the_conventions(
    kind: str, capabilities: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", kind, "--print-capabilities"])
    assert json.loads(capsys.readouterr().out) == capabilities


KILLS = int(os.environ.get("VQ_KILLS", "12"))
"""How often a server is killed; a hundred by hand."""


@pytest.mark.parametrize(
    "words",
    [(), ("--direct",), ("--direct", "--restart")],
    ids=["cached", "direct", "worker alone"],
)
def test_a_server_that_is_killed_again_and_again_loses_nothing(
    serve: Serve, plug: Plug, image: Path, words: Sequence[str]
) -> None:
    """Requests in flight are done by the next server, in whatever order the last one did some."""
    chance = random.Random(7)
    start = ("blk", "--image", str(image), "--queue-size=64", "--stats=json", *words)
    served = serve(*start)
    plugged = plug(served, DeviceId.BLOCK)
    guest = plugged.disk()
    model = bytearray(image.read_bytes())
    pending: dict[object, tuple[int, bytes]] = {}
    busy: set[int] = set()
    resubmitted = overtaken = 0

    def take() -> None:
        nonlocal overtaken
        for sent, answer in guest.answered():
            overtaken += next(iter(pending)) is not sent  # an older one still waits
            sector, data = pending.pop(sent)
            busy.difference_update(range(sector, sector + 64))
            assert answer.status == OK
            if answer.data:
                assert answer.data == data

    def send() -> None:
        sector = chance.choice([n for n in range(0, SIZE // SECTOR, 64) if n not in busy])
        busy.update(range(sector, sector + 64))
        count = chance.randrange(1, 65)
        place = slice(sector * SECTOR, (sector + count) * SECTOR)
        if chance.random() < 0.5:
            data = chance.randbytes(count * SECTOR)
            sent = guest.send(OUT, sector, data, kick=False)
            model[place] = data
        else:
            data = bytes(model[place])
            sent = guest.send(IN, sector, room=count * SECTOR, kick=False)
        pending[sent] = (sector, data)

    def finish() -> None:
        deadline = time.monotonic() + SECONDS
        while pending:
            assert time.monotonic() < deadline, f"{len(pending)} without an answer"
            plugged.frontend.wait()
            take()

    for number in range(5 * KILLS):
        while len(pending) < 16:
            send()
        dead = served.worker if number % 5 == 4 else None  # to find it takes a while
        guest.driver.kick(0)
        if dead is not None:
            time.sleep(chance.random() * 0.003)
            if "--restart" in words:
                dead.kill()
                eventually(lambda dead=dead: not dead.is_running(), "its end")  # type: ignore[misc]
            else:
                served.kill()
            take()  # what it gave back before it died
            if "--restart" not in words:
                resubmitted += served.log().count("are taken up")
                served = serve(*start)
            plugged.frontend.reconnect()
        elif number % 5 == 3:
            finish()
        else:
            plugged.frontend.wait()
            take()
    finish()
    resubmitted += served.log().count("are taken up")
    print(f"{KILLS} kills: {resubmitted} times requests were taken up, {overtaken} out of order")
    # Without waiting for a disk few requests are under way when a server is killed, or none.
    assert (resubmitted and overtaken) or not words, "nothing was under way, or all in order"
    assert guest.ask(FLUSH).status == OK
    served.stop()
    assert image.read_bytes() == model


# --- rng -----------------------------------------------------------------------------------------


def draw(plugged: Plugged, driver: Driver, count: int) -> bytes:
    """Random bytes from an entropy device."""
    data = b""
    buffer = driver.allocator.allocate(4096)
    deadline = time.monotonic() + SECONDS
    while len(data) < count:
        driver.queues[0].add([], [(buffer, 4096)])
        driver.kick(0)
        while not (used := driver.queues[0].collect()):
            assert time.monotonic() < deadline
            plugged.frontend.wait()
        data += plugged.memory.read(buffer, used[0].written)
    return data[:count]


def test_entropy_passes_the_tests_for_random_numbers(serve: Serve, plug: Plug) -> None:
    rngtest = need_program("rngtest", package="rng-tools-debian")
    served = serve("rng")
    plugged = plug(served, DeviceId.ENTROPY)
    driver = Driver(plugged.frontend, plugged.memory, 0)
    driver.probe()
    data = draw(plugged, driver, 40 * 2500 + 4)
    done = subprocess.run([rngtest, "--blockcount=40"], input=data, capture_output=True, timeout=30)
    successes = [line for line in done.stderr.decode().splitlines() if "successes:" in line]
    # FIPS 140-2: one block in about 1,200 fails although nothing is wrong.
    assert int(successes[0].split()[-1]) >= 37, done.stderr
    served.stop()


def test_what_an_image_is_not_served_whole_or_raw_is_warned_of(
    serve: Serve, tmp_path: Path
) -> None:
    """A disk that ends earlier than its file, or that is full of another format's tables, was
    served without a word."""
    (tmp_path / "image").write_bytes(b"QFI\xfb" + bytes(996))
    served = serve("blk", f"--image={tmp_path}/image")
    log = served.stop()
    assert "image: its last 488 bytes are no whole block, and not part of the disk" in log
    assert "image looks like qcow2; the guest gets its bytes as they are" in log
    assert "image: 512 bytes in blocks of 512, to be read and written" in log


# --- a model of one's own ------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownmodel.py").write_text(OWN_DEVICE)
    (tmp_path / "broken.py").write_text("x = 1\nclass Upper(:\n")
    (tmp_path / "unlucky.py").write_text("{}['colour']\n")
    (tmp_path / "uses.py").write_text("import unlucky\n")
    (tmp_path / "unhappy.py").write_text("import sys\nsys.colour\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own")
def test_anybodys_model_is_served(serve: Serve, plug: Plug) -> None:
    served = serve("ownmodel:Upper", "--with", "prefix=> ")
    plugged = plug(served, 42)
    driver = Driver(plugged.frontend, plugged.memory, 0)
    driver.probe()
    assert answer_to(b"hello", plugged, driver) == b"> HELLO"
    assert "Upper: negotiated" in served.stop()


def answer_to(data: bytes, plugged: Plugged, driver: Driver) -> bytes:
    text, answer = driver.allocator.allocate(16), driver.allocator.allocate(16)
    plugged.memory.write(text, data)
    driver.queues[0].add([(text, len(data))], [(answer, 16)])
    driver.kick(0)
    deadline = time.monotonic() + SECONDS
    while not (used := driver.queues[0].collect()):
        assert time.monotonic() < deadline
        plugged.frontend.wait()
    return plugged.memory.read(answer, used[0].written)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("sandbox", ["auto", "off"])
def test_a_models_threads_and_coroutines_work_in_the_sandbox(
    serve: Serve, plug: Plug, sandbox: str
) -> None:
    """The filter killed the one, and the other could not be imported, as it was only then."""
    served = serve("ownmodel:Later", f"--sandbox={sandbox}")
    plugged = plug(served, 42)
    driver = Driver(plugged.frontend, plugged.memory, 0)
    driver.probe()
    assert answer_to(b"coroutine", plugged, driver) == b"coroutine"
    assert answer_to(b"thread", plugged, driver) == b"thread"
    assert "ERROR" not in served.stop()


@pytest.mark.usefixtures("own")
def test_a_model_that_begins_with_threads_is_told_that_its_worker_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sys.modules.pop("ownmodel", None)
    assert main(["serve", "ownmodel:Early", "--socket=s"]) == 2
    err = capsys.readouterr().err
    assert "started threads (ticker)" in err and err.count("\n") == 1
    assert not os.path.exists("s")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nomodel:Upper"], "nomodel cannot be imported: No module named 'nomodel'"),
        (["ownmodel:Lower"], "ownmodel has no Lower"),
        (["ownmodel.py:Upper"], "name the module and not its file, as in ownmodel:Upper"),
        (["broken:Upper"], "broken.py, line 2: "),
        (["unlucky:Upper"], "unlucky cannot be imported: unlucky.py, line 1: KeyError: 'colour'"),
        (["unhappy:Upper"], "unhappy cannot be imported: unhappy.py, line 2: AttributeError: "),
        (["uses:Upper"], "uses cannot be imported: unlucky.py, line 1: KeyError: 'colour'"),
        ([":Upper"], ":Upper: no module is named before the colon"),
        (["ownmodel:broken"], "ownmodel:broken: ownmodel.py, line 50: RuntimeError: a mistake of"),
        (
            ["ownmodel:decoded"],
            "ownmodel:decoded: ownmodel.py, line 54: JSONDecodeError: Expecting",
        ),
        (["ownmodel:mistyped"], "ownmodel:mistyped: ownmodel.py, line 58: TypeError: "),
        (["ownmodel:"], "ownmodel has no name behind the colon"),
        (["ownmodel:number"], "ownmodel:number is no class or function"),
        (["ownmodel:len"], "ownmodel has no len"),
        (["ownmodel:Upper", "--with=prefix"], "--with takes NAME=TEXT, not 'prefix'"),
        (["ownmodel:Upper", "--with=colour=red"], "unexpected keyword argument 'colour'"),
        (["builtins:dict"], "builtins:dict does not make a vq device"),
    ],
)
def test_what_is_no_model_is_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    for module in [name for name in sys.modules if name in ("ownmodel", "uses")]:
        del sys.modules[module]
    assert main(["serve", words[0], "--socket=s", *words[1:]]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1
