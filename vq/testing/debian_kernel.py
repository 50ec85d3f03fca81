"""A Linux kernel and its modules for `vq.testing.guest.QemuGuest`, from Debian's packages.

``python -m vq.testing.debian_kernel`` downloads the current one (27 MB) with apt-get and unpacks it
into the user's cache directory; nothing is installed and no privileges are needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vq.testing.initramfs import cache_directory
from vq.testing.requirements import MissingRequirement, find_program

__all__ = ["Kernel", "fetch_kernel", "find_kernel"]

_PACKAGE = "linux-image-cloud-amd64"


@dataclass(frozen=True)
class Kernel:
    """A kernel: its release (uname -r), its image, and the directory of its modules."""

    release: str
    image: Path
    modules: Path


def find_kernel() -> Kernel:
    """The newest kernel in the cache; raises `MissingRequirement` when there is none."""
    images = sorted(
        cache_directory().glob("kernels/*/boot/vmlinuz-*"), key=lambda path: path.stat().st_mtime
    )
    if not images:
        raise MissingRequirement("needs a kernel: run python -m vq.testing.debian_kernel")
    image = images[-1]
    release = image.name.removeprefix("vmlinuz-")
    return Kernel(release, image, image.parent.parent / "lib" / "modules" / release)


def fetch_kernel() -> Kernel:
    """Downloads and unpacks Debian's current kernel for virtual machines, unless it is there.

    Raises `MissingRequirement` where there is no apt-get, `subprocess.CalledProcessError` when it
    fails.
    """
    find_program("apt-get")
    find_program("dpkg-deb", package="dpkg")
    depends = subprocess.run(
        ["apt-cache", "depends", _PACKAGE], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise MissingRequirement(f"needs the package {_PACKAGE}: run apt-get update")
    kernels = cache_directory() / "kernels"
    kernels.mkdir(exist_ok=True)
    if not (kernels / found[1]).exists():
        # Unpacked beside its place and then moved there: it is whole or it is not there.
        with tempfile.TemporaryDirectory(dir=kernels) as directory:
            _unpack(found[1], Path(directory))
            os.rename(Path(directory) / "root", kernels / found[1])
    return find_kernel()


def _unpack(package: str, directory: Path) -> None:
    subprocess.run(["apt-get", "download", package], cwd=directory, check=True, timeout=600)
    archive = next(directory.glob("*.deb"))
    root = directory / "root"
    subprocess.run(["dpkg-deb", "-x", archive, root], check=True, timeout=120)
    # Debian 13 has everything below usr.
    for name in ("lib", "boot"):
        if not (root / name).exists() and (root / "usr" / name).exists():
            shutil.move(root / "usr" / name, root / name)


if __name__ == "__main__":
    try:
        kernel = fetch_kernel()
    except (MissingRequirement, subprocess.CalledProcessError) as error:
        sys.exit(f"debian_kernel: {error}")
    print(kernel.image)
