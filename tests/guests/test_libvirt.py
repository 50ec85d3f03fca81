"""What the guide says of libvirt, with libvirt: its own daemon starts QEMU from the page's XML."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vq.testing.contained import ContainedProcess
from vq.testing.debian_kernel import find_kernel
from vq.testing.initramfs import shell_initramfs
from vq.testing.requirements import need_program, need_root, or_skip
from vq.testing.served import ServeProcess, assert_well, wait_until

GUIDE = Path(__file__).parents[2] / "docs" / "guests.md"
SIZE = 8 << 20
DOMAIN = """<name>vq</name>
  <memory unit="MiB">256</memory>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>{directory}/kernel</kernel>
    <initrd>{directory}/initrd</initrd>
    <cmdline>console=ttyS0 panic=-1</cmdline>
  </os>"""
SERIAL = '<serial type="file"><source path="{home}/serial"/></serial>'
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def test_a_guest_of_libvirts_has_the_network_card_and_the_disk_of_the_guides_xml() -> None:
    """Without its `vectors=0` that guest crashed, with the QEMU that the guide is about."""
    need_root()
    for program, package in (
        ("libvirtd", "libvirt-daemon"),
        ("virsh", "libvirt-clients"),
        ("qemu-system-x86_64", "qemu-system-x86"),
    ):
        need_program(program, package=package)
    with or_skip():
        kernel = find_kernel()
    initrd = shell_initramfs(
        release=kernel.release,
        modules_from=kernel.modules,
        load=("virtio_pci", "virtio_net", "virtio_blk"),
        programs={"dash": need_program("dash")},
        console=("ttyS0", 4, 64),
    )
    with tempfile.TemporaryDirectory(prefix="vq-virt-") as name, ExitStack() as stack:
        directory, home = Path(name), Path(name) / "home"
        directory.chmod(0o755)
        for source, copy in ((kernel.image, "kernel"), (initrd, "initrd")):
            shutil.copyfile(source, directory / copy)
            (directory / copy).chmod(0o644)
        (directory / "image").touch()
        os.truncate(directory / "image", SIZE)
        allowed = ("--socket-group=nogroup", "--socket-mode=660")
        net = ServeProcess(directory, "net", "--link=null", *allowed)
        stack.callback(net.close)
        disk = ServeProcess(
            directory, "blk", f"--image={directory}/image", *allowed, names=("disk",)
        )
        stack.callback(disk.close)

        settings = home / "config" / "libvirt"
        settings.mkdir(parents=True)
        (settings / "qemu.conf").write_text('stdio_handler = "file"\nsecurity_driver = "none"\n')
        (home / "run").mkdir(mode=0o700)
        for place in (home, *home.rglob("*")):
            os.chown(place, 65534, 65534)
        environment = ("env", f"HOME={home}", f"XDG_CONFIG_HOME={home}/config")
        environment += (f"XDG_RUNTIME_DIR={home}/run", f"XDG_CACHE_HOME={home}/cache")
        daemon = ContainedProcess(
            [*NOBODY, *environment, "libvirtd"], lifetime=100, output=directory / "libvirtd"
        )
        stack.callback(daemon.close)
        door = home / "run" / "libvirt" / "libvirt-sock"
        wait_until(lambda: door.exists() or not daemon.running, "libvirt's daemon")

        found = re.search(r"```xml\n(.*?)```", GUIDE.read_text(), re.S)
        assert found is not None
        xml = found[1].replace("/run/vq/", f"{directory}/")
        xml = xml.replace("<memoryBacking>", DOMAIN.format(directory=directory) + "<memoryBacking>")
        xml = xml.replace("<devices>", "<devices>" + SERIAL.format(home=home))
        (directory / "guest.xml").write_text(xml)
        virsh = [*NOBODY, *environment, "virsh", "--connect=qemu:///session"]
        started = subprocess.run(
            [*virsh, "create", "--validate", str(directory / "guest.xml")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert started.returncode == 0, started.stderr
        serial = home / "serial"
        wait_until(lambda: f"{SIZE // 512} 512-byte" in serial.read_text(), "a disk", 60)
        wait_until(lambda: "NetDevice: negotiated" in net.log(), "a network card", 60)
        running = subprocess.run([*virsh, "domstate", "vq"], capture_output=True, timeout=60)
        assert running.stdout.strip() == b"running"
        assert_well(net, disk)
