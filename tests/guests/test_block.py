"""The block device under real kernels: file systems, fio with verification, kills in between."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psutil
import pytest

from vq.devices.block import BlockDevice
from vq.devices.block_image import Image
from vq.errors import UsageError
from vq.testing.guest import Guest, QemuGuest, UmlGuest
from vq.testing.requirements import need_program, or_skip
from vq.testing.served import ServedDevices, ServeProcess, assert_well, wait_until

SIZE = 64 << 20
TOOLS = {
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "blkdiscard": "util-linux",
    "fstrim": "util-linux",
}
FIO = {"fio": "fio"}


class ServedDisk(ServeProcess):
    """``vq serve blk`` with an image."""

    def __init__(self, directory: Path, *options: str, size: int = SIZE) -> None:
        self.image = directory / "image"
        if not self.image.exists():
            self.image.touch()
            os.truncate(self.image, size)
        super().__init__(directory, "blk", f"--image={self.image}", *options)

    @property
    def allocated(self) -> int:
        """Bytes that the image takes up on the host."""
        return self.image.stat().st_blocks * 512

    def resize(self, size: int) -> None:
        """Changes the image's size, and tells the program."""
        os.truncate(self.image, size)
        for process in psutil.Process().children(recursive=True):
            if f"--image={self.image}" in process.cmdline() and "python" in process.name():
                process.send_signal(signal.SIGHUP)


Serve = Callable[..., ServedDisk]
Boot = Callable[..., Guest]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack: ExitStack, tmp_path: Path) -> Serve:
    def start(*options: str, size: int = SIZE) -> ServedDisk:
        served = ServedDisk(tmp_path, *options, size=size)
        stack.callback(served.close)
        return served

    return start


def boot_uml(stack: ExitStack, served: ServedDisk) -> Guest:
    with or_skip():
        guest = UmlGuest([(served.sockets[0], 2)], programs=TOOLS)
    return stack.enter_context(guest)


def boot_qemu(
    stack: ExitStack, served: ServeProcess | ServedDevices, *, queues: int = 1, fio: bool = False
) -> QemuGuest:
    with or_skip():
        guest = QemuGuest(
            mem="512M" if fio else "256M",  # fio comes with many libraries
            cpus=queues,
            load=["virtio_blk"],
            programs={**TOOLS, **(FIO if fio else {})},
            arguments=[
                *("-chardev", f"socket,id=disk,path={served.sockets[0]},reconnect=1"),
                *("-device", f"vhost-user-blk-pci,chardev=disk,vectors=0,num-queues={queues}"),
            ],
        )
    return stack.enter_context(guest)


@pytest.fixture(params=["uml", "qemu"])
def boot(request: pytest.FixtureRequest, stack: ExitStack) -> Boot:
    """Boots a guest of one kind or the other in front of a disk."""
    return lambda served: (boot_uml if request.param == "uml" else boot_qemu)(stack, served)


@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
def test_a_file_system_is_made_used_trimmed_and_found_clean(
    serve: Serve, boot: Boot, options: tuple[str, ...]
) -> None:
    served = serve("--serial=disk-of-vq", *options)
    guest = boot(served)
    assert guest.output("cat /sys/block/vda/serial") == "disk-of-vq"
    assert int(guest.output("cat /sys/block/vda/size")) == SIZE // 512
    assert guest.output("cat /sys/block/vda/queue/write_cache") == "write back\n"
    guest.output("mkfs.ext4 -q /dev/vda && mkdir disk && mount /dev/vda disk")
    guest.output("dd if=/dev/urandom of=disk/file bs=1M count=16 2>&1 && md5sum disk/file >sum")
    guest.output("cp -r /lib/modules disk && sync && umount disk")
    assert served.allocated > 16 << 20
    guest.output("echo 3 >/proc/sys/vm/drop_caches && mount /dev/vda disk && md5sum -c sum")
    guest.output("rm disk/file && sync && fstrim disk && umount disk && e2fsck -fn /dev/vda")
    assert served.allocated < 16 << 20
    guest.output("blkdiscard -f /dev/vda")
    assert served.allocated == 0
    guest.output("mkfs.ext4 -q /dev/vda && blkdiscard -z /dev/vda")
    assert not any(served.image.read_bytes())
    stats = served.stats()
    assert stats["flush"] and stats["discard"] and stats["write_zeroes"]
    assert not stats.get("refused_ioerr") and not stats.get("refused_unsupp")
    assert_well(guest, served)


def test_a_write_through_disk_has_every_write_on_the_host_disk(serve: Serve, boot: Boot) -> None:
    served = serve("--verbose")
    guest = boot(served)
    guest.output("echo write through >/sys/block/vda/cache_type")
    assert guest.output("cat /sys/block/vda/cache_type") == "write through\n"
    wait_until(lambda: "the guest's writes go to the disk" in served.log(), "the switch")
    guest.output("dd if=/dev/urandom of=/dev/vda bs=64k count=64 oflag=direct 2>&1")
    assert served.count("write") >= 64
    assert_well(guest, served)


def test_a_read_only_disk_cannot_be_written_to(serve: Serve, boot: Boot, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"text" + bytes(SIZE - 4))
    served = serve("--read-only")
    guest = boot(served)
    assert guest.output("cat /sys/block/vda/ro") == "1\n"
    assert guest.output("head -c 4 /dev/vda") == "text"
    assert guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1").status
    assert served.image.read_bytes()[:4] == b"text"
    assert_well(guest, served)


def test_the_guest_sees_a_disk_grow(serve: Serve, boot: Boot) -> None:
    served = serve()
    guest = boot(served)
    served.resize(2 * SIZE)
    wait_until(
        lambda: int(guest.output("cat /sys/block/vda/size")) == 2 * SIZE // 512, "a larger disk"
    )
    guest.output(f"dd if=/dev/vda of=/dev/null bs=512 count=1 skip={2 * SIZE // 512 - 1} 2>&1")
    assert_well(guest, served)


def test_every_queue_is_used(stack: ExitStack, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    device = BlockDevice(Image(image), queues=2)
    stack.callback(device.close)
    served = stack.enter_context(ServedDevices([device], tmp_path))
    guest = boot_qemu(stack, served, queues=2)
    assert guest.output("ls /sys/block/vda/mq") == "0\n1\n"
    for index, processor in enumerate((1, 2)):
        before = device.queues[index].ring.next_used
        guest.output(f"taskset {processor} dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct")
        assert device.queues[index].ring.next_used != before
    assert guest.complaints() == []


def test_an_image_is_not_served_while_qemu_writes_to_it_nor_the_other_way_round(
    tmp_path: Path,
) -> None:
    """Both looked for their own kind of lock alone, and would have ruined each other's disk."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 1 << 20)
    qemu = need_program("qemu-system-x86_64", package="qemu-system-x86")

    @contextmanager
    def started(read_only: str) -> Iterator[bool]:
        """Whether QEMU gets the image."""
        drive = f"file={image},format=raw,if=virtio,readonly={read_only}"
        process = subprocess.Popen(
            [*(qemu, "-M", "q35", "-S", "-display", "none", "-qmp", "stdio", "-drive", drive)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write('{"execute": "qmp_capabilities"} {"execute": "query-status"}\n')
            process.stdin.flush()
            said = ""
            while "prelaunch" not in said and "lock" not in said:
                said = process.stdout.readline()
                assert said, "QEMU ended"
            yield "lock" not in said
        finally:
            process.kill()
            process.communicate()

    for mine, theirs, together in (
        (False, "off", False),
        (False, "on", False),
        (True, "off", False),
        (True, "on", True),
    ):
        with closing(Image(image, read_only=mine)), started(theirs) as alone:
            assert alone is together, (mine, theirs)
        with started(theirs) as alone:
            assert alone
            if together:
                Image(image, read_only=mine).close()
            else:
                with pytest.raises(UsageError, match="is in use by another process"):
                    Image(image, read_only=mine)


@pytest.mark.parametrize("options", [(), ("--direct",)], ids=["cached", "direct"])
def test_fio_finds_every_byte_although_the_backend_is_killed_again_and_again(
    serve: Serve, stack: ExitStack, options: tuple[str, ...]
) -> None:
    """The guest sees no error: what was under way is done by the next backend, which finds it in
    the inflight notes, in whatever order the last one answered."""
    chance, kills = random.Random(os.urandom(4)), 4
    served = serve("--queues=2", *options)
    guest = boot_qemu(stack, served, queues=2, fio=True)
    words = (
        "--name=load --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --numjobs=2"
        " --offset_increment=32M --size=30M --rw=randrw --rwmixread=30 --bsrange=512-64k --fsync=32"
        " --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based --runtime=600"
        " --trigger-file=/tmp/stop"
    )
    guest.output(f"(fio {words} >report 2>&1; echo $? >status) &")
    for _ in range(kills):
        wait_until(lambda: served.count("write") > 100, "load", 60)
        time.sleep(chance.random() * 0.5)
        served.kill()
        served.start()
    wait_until(lambda: served.count("write") > 100, "load", 60)
    guest.output("kill -INT $(pidof fio | tr ' ' '\\n' | sort -n | head -1)")
    wait_until(lambda: guest.run("test -s status").status == 0, "the end of fio", 60)
    report = guest.output("cat report")
    assert guest.output("cat status").strip() in ("0", "128"), report
    errors = re.findall(r"err= *(\d+)", report)
    assert errors and set(errors) == {"0"}, report
    assert "verify" not in report.replace("--verify", ""), report
    assert "I/O error" not in guest.kernel_log()
    if options:
        assert "are taken up" in served.log(), "no kill hit a request"
    assert_well(guest, served)
