"""The commands in the documentation's indented text do what the text around them says.

Each page's are typed one after the other, with a directory of the test's in place of /tmp and
/run/vq, and with taps in a network namespace. What serves a socket goes on until another command
serves it. In front of it is what the page puts there: QEMU, whose guest is not let run; User-Mode
Linux, which boots; testpmd, which sends. What guests then do is for the other tests here.

Left out is what is tested elsewhere (make, `vq bench`, `vq check`, the example) or for a guest.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vq.testing.contained import ContainedProcess
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace
from vq.testing.requirements import (
    need_namespaces,
    need_program,
    need_tap,
    or_skip,
)
from vq.testing.served import wait_until
from vq.testing.testpmd import HugePages

ROOT = Path(__file__).parents[2]
PROGRAMS = ("vq serve", "ip", "truncate", "passt", "qemu-system-x86_64", "linux.uml")
PROGRAMS += ("dpdk-testpmd", "python -m vq.testing.uml")
ELSEWHERE = ("make", "vq bench", "vq check", "pip", "python", "rmmod", "host$", "guest$", "CONNECT")
ELSEWHERE += ("OK", "-device vhost-user-test-device-pci")  # which needs QEMU 10.2
COMMAND = rf"(?:{'|'.join(map(re.escape, PROGRAMS))}) (?:.*\\\n)*.*"
SNIPPET = r"from vq.*\n(?:(?: {4}.*)?\n)*"
MACHINE = (
    "-accel tcg -m 256 -machine q35,memory-backend=mem"
    " -object memory-backend-memfd,id=mem,size=256M,share=on"
)
NOT_SHOWN = {"rng.sock": "rng", "disk.sock": "blk --image other.img", "net.sock": "net --link null"}
"""What serves sockets that another page's command serves."""
NO_CONFIG = "backend supports VHOST_USER_PROTOCOL_F_CONFIG but QEMU does not"
"""QEMU 7.2 says so of network devices' configuration, and asks nobody for it."""


def indented_text(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """What a page has one type, line by line, and snippets of Python as a whole."""
    found = re.findall(rf"^    ({SNIPPET}|{COMMAND}$)", indented_text(page), re.M)
    return [re.sub(r"\\\n +", "", command) for command in found]


PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if commands(page)
]


class Typist:
    """Somebody who types what a page says."""

    def __init__(self, directory: Path, host: Namespace, stack: ExitStack) -> None:
        self.directory = directory
        self.host = host
        self.stack = stack
        self.serving: dict[str, tuple[ContainedProcess, Path]] = {}  # and its log, by socket
        self.logs: list[Path] = []
        for place in ("tmp", "run/vq"):
            (directory / place).mkdir(parents=True)

    def type(self, command: str) -> None:
        command = re.sub(r"(?<![\w.])/(tmp|run/vq)/", rf"{self.directory}/\1/", command)
        if command.startswith("from "):
            self.python(["-c", textwrap.dedent("    " + command)])
            return
        words = shlex.split(command.removesuffix(" &"), comments=True)
        match words[0]:
            case "vq":
                self.serve(words[1:])
            case "ip":
                self.host.run(f"USER=root; {command}")
            case "truncate":
                subprocess.run(words, cwd=self.directory, check=True, timeout=10)
            case "passt":
                need_program("passt")
                for part in (self.directory, self.directory / "tmp"):
                    part.chmod(0o777)  # it becomes nobody
                path = words[words.index("--socket") + 1]
                process, log = self.start(words, path, in_namespace=False)
                wait_until(lambda: Path(path).exists() or not process.running, path)
                assert process.running, log.read_text()
            case "qemu-system-x86_64":
                self.qemu(words)
            case "linux.uml":
                self.linux(words)
            case "dpdk-testpmd":
                self.testpmd(words)
            case "python":
                self.python(words[1:])

    def start(
        self, words: list[str], *sockets: str, in_namespace: bool = True
    ) -> tuple[ContainedProcess, Path]:
        """Starts what serves sockets from now on."""
        for path in sockets:
            if path in self.serving:
                self.serving.pop(path)[0].close()
        log = self.directory / f"log{len(self.logs)}"
        self.logs.append(log)
        argv = self.host.argv(*words) if in_namespace else words
        process = ContainedProcess(
            ["env", f"--chdir={self.directory}", f"PYTHONPATH={ROOT}", *argv],
            lifetime=200,
            output=log,
        )
        self.stack.callback(process.close)
        for path in sockets:
            self.serving[path] = process, log
        return process, log

    def serve(self, words: list[str]) -> None:
        sockets = [word for before, word in itertools.pairwise(words) if before == "--socket"]
        if "--image" in words:
            image = self.directory / words[words.index("--image") + 1]
            if not image.exists():
                image.touch()
                os.truncate(image, 8 << 20)
        process, log = self.start([sys.executable, "-m", "vq", *words], *sockets)
        wait_until(
            lambda: (
                log.read_text().count("waiting for a frontend") == len(sockets)
                or not process.running
            ),
            "vq serve",
        )
        assert process.running, log.read_text()

    def need(self, command: str) -> None:
        """Serves what a frontend's command connects to, where this page does not."""
        for path in re.findall(r"[\w/.-]+\.sock", command):
            if path not in self.serving:
                self.serve(shlex.split(f"serve {NOT_SHOWN[Path(path).name]} --socket {path}"))

    def python(self, words: list[str]) -> None:
        need_program("linux.uml", package="user-mode-linux")
        self.need(" ".join(words))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words], env=environment, check=True, timeout=60)

    def qemu(self, words: list[str]) -> None:
        need_program("qemu-system-x86_64", package="qemu-system-x86")
        if words[1] == "...":
            words[1:2] = MACHINE.split()
        words = [word for word in words if word != "..."]
        self.need(" ".join(words))
        asked = [{"execute": command} for command in ("qmp_capabilities", "query-status", "quit")]
        done = subprocess.run(
            [*words, "-S", "-display", "none", "-qmp", "stdio"],
            input="\n".join(map(json.dumps, asked)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        complaints = [line for line in done.stderr.splitlines() if NO_CONFIG not in line]
        assert (done.returncode, complaints) == (0, [])
        assert '"status": "prelaunch"' in done.stdout

    def linux(self, words: list[str]) -> None:
        options = dict(word.split("=", 1) for word in words[1:])
        assert options.keys() <= {"mem", "initrd", "root", "virtio_uml.device", "con"}
        path, _, kind = options["virtio_uml.device"].rpartition(":")
        self.need(path)
        with or_skip():
            guest = UmlGuest([(path, int(kind))], mem=options["mem"])
        with guest:
            device = "/sys/bus/virtio/devices/virtio0"
            assert int(guest.output(f"cat {device}/device"), 0) == int(kind)
            assert guest.output(f"readlink {device}/driver")

    def testpmd(self, words: list[str]) -> None:
        need_program("dpdk-testpmd", package="dpdk")
        self.need(" ".join(words))
        (log,) = (log for path, (_, log) in self.serving.items() if path in " ".join(words))
        with or_skip():
            pages = HugePages()
        with pages:
            end = words.index("--")
            words[end:end] = [f"--huge-dir={pages.directory}", "--file-prefix=vq-docs"]
            read, write = os.pipe()  # at the end of its input it ends
            process = ContainedProcess(
                words, lifetime=60, output=self.directory / "pmd", input=read
            )
            os.close(read)
            try:
                wait_until(
                    lambda: "negotiated" in log.read_text() or not process.running, "testpmd"
                )
                assert process.running, (self.directory / "pmd").read_text()
            finally:
                process.close()
                os.close(write)

    def check(self) -> None:
        """Whether all that was served is served still, and nobody complained."""
        for path, (process, log) in self.serving.items():
            assert process.running, (path, log.read_text())
        for log in self.logs:
            assert not re.search("Traceback|ERROR|WARNING", log.read_text()), log.read_text()


@pytest.fixture
def typist() -> Iterator[Typist]:
    need_tap()
    need_namespaces()
    with (
        tempfile.TemporaryDirectory(prefix="vq-docs-") as directory,
        Namespace() as host,
        ExitStack() as stack,
    ):
        readme, tutorial = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
        model = re.search(r"```python\n(.*?\n)memory = ", readme.read_text(), re.S)
        assert model is not None
        models = [("entropy.py", model[1])]
        models += re.findall(r"```python\n# (\w+\.py)\n(.*?)```", tutorial.read_text(), re.S)
        for name, text in models:
            (Path(directory) / name).write_text(text)
        yield Typist(Path(directory), host, stack)


def test_nothing_that_a_page_has_one_type_is_left_out() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(rf"^    {SNIPPET}", "", indented_text(page), flags=re.M)
        for line in re.findall(r"^    (\S.*)$", text, re.M):
            assert line.startswith((*PROGRAMS, *ELSEWHERE)), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_has_one_type_works(page: Path, typist: Typist) -> None:
    if "tap:tap0" in page.read_text() and "ip tuntap" not in page.read_text():
        typist.type("ip tuntap add dev tap0 mode tap")
        typist.type("ip link set tap0 up")
    for command in commands(page):
        typist.type(command)
    typist.check()


def test_what_the_page_of_sockets_has_one_type_at_both_ends_works(typist: Typist) -> None:
    text = (ROOT / "docs" / "vsock.md").read_text()
    typed = re.findall(r"^    (host|guest)\$ +(.*)$((?:\n    (?!guest|host).*$)*)", text, re.M)
    assert [place for place, *_ in typed] == ["host", "guest", "guest", "host"]
    (_, listen, _), (_, say, _), (_, accept, _), (_, dial, talk) = typed
    (serve,) = (command for command in commands(ROOT / "docs" / "vsock.md") if "vq" in command)
    typist.type(serve)
    (path,) = typist.serving

    def on_host(command: str) -> subprocess.Popen[str]:
        words = shlex.split(command.replace("/tmp/", f"{typist.directory}/tmp/"))
        process = typist.stack.enter_context(
            subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        )
        typist.stack.callback(process.kill)
        return process

    need_program("socat")
    with or_skip():
        guest = UmlGuest([(path, 19)], programs={"socat": "socat"})
    with guest:
        listener = on_host(listen)
        wait_until(lambda: (typist.directory / "tmp" / "vm.vsock_5000").exists(), "a listener")
        guest.output(say)
        assert listener.communicate(timeout=10)[0] == "hello\n"
        heard: list[str] = []
        thread = threading.Thread(
            target=lambda: heard.append(guest.output(f"{accept} </dev/null & echo $!; wait"))
        )
        thread.start()
        request, answer = (line.strip() for line in talk.strip().splitlines())
        got = ""
        for _ in range(100):  # until the guest listens
            caller = on_host(dial)
            assert caller.stdin is not None and caller.stdout is not None
            caller.stdin.write(f"{request}\nword of the host\n")
            if got := caller.stdout.readline():
                break
            caller.wait(10)
        assert re.fullmatch(r"OK \d+\n", got) and re.fullmatch(r"OK \d+", answer)
        caller.communicate(timeout=10)
        thread.join(30)
        assert "word of the host" in heard[0]
    typist.check()
