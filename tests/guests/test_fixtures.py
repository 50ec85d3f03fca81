"""The guests themselves, without a device: they boot, answer, and leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vq.testing import requirements
from vq.testing.contained import ContainedProcess, inheritable_copy
from vq.testing.guest import Guest, GuestError, QemuGuest, UmlGuest
from vq.testing.initramfs import Entry, cpio, libraries_of, modules_with_dependencies
from vq.testing.namespaces import Namespace, bad_checksums, iperf_server
from vq.testing.requirements import (
    MissingRequirement,
    find_program,
    need_namespaces,
    need_program,
    or_skip,
)

from .conftest import wait_until


def processes_with(word: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes()
        except OSError:
            continue
        if word.encode() in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


# --- guests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[UmlGuest, QemuGuest])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with or_skip():
        booted = request.param()
    with booted:
        yield booted


def test_a_guest_boots_in_seconds(guest: Guest) -> None:
    # About 1.3 s for User-Mode Linux and 2.2 s for QEMU; a busy machine takes its time.
    assert guest.boot_seconds < 20


def test_a_command_gives_its_output_and_exit_status(guest: Guest) -> None:
    result = guest.run("echo one; echo two >&2; exit 7")
    assert (result.status, result.output) == (7, "one\ntwo\n")


def test_the_guest_runs_the_kernel_that_was_meant(guest: Guest) -> None:
    assert guest.output("uname -r").strip() == guest.release != os.uname().release


def test_a_failing_command_is_an_error_where_output_is_wanted(guest: Guest) -> None:
    with pytest.raises(GuestError, match="ended with 3: oh"):
        guest.output("echo oh; exit 3")


@pytest.mark.parametrize("text", ["", "no newline", "ready 1\n1 0 5\n", "é\n\n\r\n\t\\n $HOME 'x'"])
def test_output_comes_byte_for_byte(guest: Guest, text: str) -> None:
    quoted = text.replace("'", "'\\''")
    assert guest.output(f"printf %s '{quoted}'") == text


def test_much_output_comes_whole(guest: Guest) -> None:
    assert guest.output("seq 1 20000") == "".join(f"{n}\n" for n in range(1, 20001))


def test_kernel_messages_do_not_mix_with_output(guest: Guest) -> None:
    script = "for i in 1 2 3 4 5; do echo '<1>vq: a message' >/dev/kmsg; echo $i; done"
    assert guest.output(script) == "1\n2\n3\n4\n5\n"
    wait_until(lambda: guest.kernel_log().count("vq: a message") == 5, "messages in the log")


def test_a_command_that_takes_too_long_is_killed_with_its_children(guest: Guest) -> None:
    with pytest.raises(TimeoutError, match="started"):
        guest.run("echo started; sleep 1234 & sleep 1234; sleep 1234", timeout=0.5)
    assert guest.run("ps | grep '[s]leep 1234'").status == 1


def test_commands_run_at_the_same_time(guest: Guest) -> None:
    """Each waits until all four are there."""
    wait = "touch at.{0}; until test -e at.0 -a -e at.1 -a -e at.2 -a -e at.3; do sleep 0.05; done"
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: guest.run(f"{wait.format(n)}; echo {n}"), range(4)))
    assert [result.output for result in results] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_daemon_that_a_command_leaves_behind_does_not_hold_it_up(guest: Guest) -> None:
    guest.output("(while sleep 0.1; do echo noise; done) & echo $! >/tmp/daemon")
    assert guest.output("echo still here") == "still here\n"
    guest.output("kill $(cat /tmp/daemon)")


def test_the_guest_has_the_programs_that_tests_use(guest: Guest) -> None:
    guest.output("ethtool --version && ip -V && iperf3 --version && ip -br link show lo")
    guest.output("modprobe 8021q && grep -q 8021q /proc/modules")
    assert bad_checksums(guest.output) == {}


def test_what_a_kernel_warns_of_in_a_slow_boot_is_no_complaint() -> None:
    """It waited too long for its own tests of ciphers: seen on a machine with ten others on it."""
    warning = (
        "WARNING: CPU: 0 PID: 1 at {0}.c:170 {1}+0xa4/0xb7\nCall Trace:\n---[ end trace 00 ]---\n"
    )
    slow = warning.format("crypto/api", "crypto_wait_for_test")
    other = warning.format("net/core/dev", "netif_rx")

    class Said(UmlGuest):
        def __init__(self, text: str) -> None:
            self.text = text

        def kernel_log(self) -> str:
            return self.text

    assert Said(slow + "all is well\n").complaints() == []
    assert len(Said(slow + other).complaints()) == 2


def test_an_oops_in_the_kernel_log_is_a_complaint(guest: Guest) -> None:
    assert guest.complaints() == []
    guest.output("echo '<1>BUG: not a real one' >/dev/kmsg")
    wait_until(lambda: len(guest.complaints()) == 1, "the complaint")


def test_nothing_is_left_of_a_guest() -> None:
    with or_skip():
        guest = UmlGuest()
    directory = guest.directory
    assert processes_with(str(directory))
    guest.output("sleep 1000 & sleep 1000 &")
    guest.close()
    guest.close()
    assert not guest.running
    assert not processes_with(str(directory))
    assert not directory.exists()
    with pytest.raises(GuestError, match="gone"):
        guest.run("true")


def test_a_guest_that_ends_by_itself_is_noticed() -> None:
    with or_skip():
        guest = UmlGuest()
    with guest:
        with pytest.raises(GuestError, match="gone"):
            guest.run("poweroff -f")
        wait_until(lambda: not guest.running, "the end of the process")


def test_a_guest_that_does_not_boot_is_an_error_with_the_kernels_words() -> None:
    need_program("linux.uml", package="user-mode-linux")
    with or_skip(), pytest.raises(GuestError, match="panic"):
        UmlGuest(arguments=["rdinit=/nothing", "root=/dev/nothing"])


def test_a_guest_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with or_skip():
        UmlGuest().close()
    script = (
        "import os, signal, sys\n"
        "from vq.testing.guest import UmlGuest\n"
        "guest = UmlGuest()\n"
        "print(guest.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    directory = done.stdout.strip()
    assert directory
    wait_until(lambda: not processes_with(directory), "the guest's end")
    shutil.rmtree(directory)


# --- contained processes -------------------------------------------------------------------------


def test_a_process_ends_with_its_time() -> None:
    with or_skip():
        process = ContainedProcess(["sleep", "100.25"], lifetime=0.3)
    assert process.wait(10) == 128 + 9
    process.close()


def test_a_process_tells_its_exit_status(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with or_skip():
        process = ContainedProcess(["sh", "-c", "echo hi; exit 5"], lifetime=10, output=output)
    assert process.wait(10) == 5
    assert output.read_text() == "hi\n"
    process.close()


def test_what_a_process_started_in_another_session_ends_with_it() -> None:
    with or_skip():
        process = ContainedProcess(["sh", "-c", "setsid sleep 98.75 & sleep 98.75"], lifetime=60)
    wait_until(lambda: len(processes_with("98.75")) >= 3, "both sleeps")
    process.close()
    assert not processes_with("98.75")


def test_a_process_reads_its_input_from_a_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    source = inheritable_copy(reading)
    os.close(reading)
    with or_skip():
        process = ContainedProcess(["sh", "-c", "read line; exit $line"], lifetime=10, input=source)
    os.close(source)
    os.write(writing, b"42\n")
    assert process.wait(10) == 42
    os.close(writing)
    process.close()


# --- namespaces ----------------------------------------------------------------------------------


def test_a_namespace_is_gone_afterwards() -> None:
    need_namespaces()
    with Namespace() as namespace:
        assert Path("/run/netns", namespace.name).exists()
        namespace.add_tap("vqt0")
        assert "vqt0" in namespace.run("ip -br link")
        with iperf_server(namespace):
            namespace.run("iperf3 -c 127.0.0.1 -n 1M")
        with pytest.raises(RuntimeError, match="ended with 9: no"):
            namespace.run("echo no; exit 9")
    assert not Path("/run/netns", namespace.name).exists()


def test_bad_checksums_are_read_from_the_counters() -> None:
    text = "#kernel\nTcpInCsumErrors   3   0.0\nUdpInCsumErrors  0  0.0\nUdp6InCsumErrors 1 0.0\n"
    assert bad_checksums(lambda _: text) == {"TcpInCsumErrors": 3, "Udp6InCsumErrors": 1}


# --- the initramfs -------------------------------------------------------------------------------


def test_a_cpio_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    program = need_program("cpio")
    archive = cpio(
        [
            Entry("a/b/file", stat.S_IFREG | 0o640, b"12345"),
            Entry("a/link", stat.S_IFLNK | 0o777, b"b/file"),
            Entry("a/b/file", stat.S_IFREG | 0o600, b"not this one"),
        ]
    )
    subprocess.run([program, "-id"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"12345"
    assert os.readlink(tmp_path / "a" / "link") == "b/file"
    assert (tmp_path / "a" / "b" / "file").stat().st_mode == stat.S_IFREG | 0o640


def test_a_cpio_archive_has_the_documented_bytes() -> None:
    archive = cpio([Entry("x", stat.S_IFCHR | 0o600, device=(5, 1))])
    head = b"070701" + b"000000020000218000000000000000000000000100000000"
    head += b"00000000000000000000000000000005000000010000000200000000"
    assert archive.startswith(head + b"x\0" + b"070701")
    assert len(archive) % 4 == 0
    assert b"TRAILER!!!\0" in archive


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    for name, depends in {"net-a": "b,c", "b": "d", "c": "b", "d": ""}.items():
        (tmp_path / f"{name}.ko").write_bytes(b"\0depends=" + depends.encode() + b"\0")
    (tmp_path / "modules.builtin").write_text("kernel/e.ko\n")
    assert modules_with_dependencies(tmp_path, ["net_a", "e"]) == {
        "d.ko": [],
        "b.ko": ["d.ko"],
        "c.ko": ["b.ko", "d.ko"],
        "net-a.ko": ["c.ko", "b.ko", "d.ko"],
    }
    with pytest.raises(MissingRequirement, match="kernel module f"):
        modules_with_dependencies(tmp_path, ["f"])


def test_the_libraries_of_a_program_are_found() -> None:
    libraries = libraries_of(find_program("sh"))
    assert any(re.search(r"/libc\.so", path) for path in libraries)
    assert all(Path(path).is_file() for path in libraries)


# --- requirements --------------------------------------------------------------------------------


def test_what_is_missing_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VQ_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install the package nothing"):
        need_program("no-such-program", package="nothing")


def test_what_is_missing_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQ_REQUIRE", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        need_program("no-such-program")


def test_an_ordinary_user_is_told_what_root_is_needed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 1000)
    for check in (requirements.check_tap, requirements.check_namespaces):
        with pytest.raises(MissingRequirement, match="needs root"):
            check()
