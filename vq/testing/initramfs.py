"""A guest's whole userland in one file: the initramfs that the guests of `vq.testing.guest` boot.

In it are busybox, a few real programs with their libraries, kernel modules with what they need, and
an init that loads the modules and then serves a shell on a console of its own.

The shell's protocol is for programs. The guest says ``ready RELEASE``. A line to it is

    ID run COMMAND    starts a shell for COMMAND (base64, UTF-8); many may run at a time
    ID kill OTHER     kills what runs under the identifier OTHER, with all its children

and when a command ends the guest sends ``ID STATUS LENGTH`` and a newline, and LENGTH bytes:
everything that the command wrote. Whatever the kernel prints goes to another console.

No privileges and no cpio(1) are needed to build the archive (newc: the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst). It is kept in the user's cache
directory, under a name made from everything that is in it.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vq.testing.requirements import MissingRequirement, find_program

__all__ = [
    "Entry",
    "build_initramfs",
    "cache_directory",
    "cpio",
    "libraries_of",
    "modules_with_dependencies",
    "shell_initramfs",
]

_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
export PATH=/bin HOME=/tmp TERM=dumb
# Addresses can be used at once: no test for duplicates (RFC 4862, 5.4).
modprobe -a @MODULES@
for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$f; done 2>/dev/null
ip link set lo up
exec /shell </dev/@CONSOLE@ >/dev/@CONSOLE@ 2>/dev/null
"""

_SHELL = """\
#!/bin/sh
# One process reads requests, one for each command waits for it, one alone writes answers.
cd /run
stty raw -echo
mkfifo ended
while read -r id status; do
    size=$(stat -c %s "$id.out")
    echo "$id $status $size"
    # No more than that: a daemon that the command left behind may still write.
    head -c "$size" "$id.out"
    rm "$id".*
done <>ended &
run() {
    echo "$2" | base64 -d >"$1.sh"
    cd /tmp
    # With its path, else busybox takes the sh inside of itself.
    setsid /bin/sh "/run/$1.sh" >"/run/$1.out" 2>&1 </dev/null &
    echo $! >"/run/$1.pid"
    wait $!
    echo "$1 $?" >/run/ended
}
echo "ready $(uname -r)"
while read -r id verb text; do
    case $verb in
    run) run "$id" "$text" & ;;
    kill) kill -KILL "-$(cat "$text.pid")" ;;
    esac
done
"""


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its path (relative to the root), mode with type, and contents.

    `device` is (major, minor) of a device node; a symbolic link's contents are its target.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


# --- the archive ---------------------------------------------------------------------------------


def cpio(entries: Iterable[Entry]) -> bytes:
    """The entries as a cpio archive (newc) owned by root; directories that they need are added.

    An entry whose path came before is left out.
    """
    archive = bytearray()
    seen: set[str] = {"."}
    for entry in entries:
        directories = [str(parent) for parent in PurePosixPath(entry.path).parents]
        for directory in reversed(directories):
            if directory not in seen:
                seen.add(directory)
                archive += _record(len(seen), Entry(directory, stat.S_IFDIR | 0o755))
        if entry.path not in seen:
            seen.add(entry.path)
            archive += _record(len(seen), entry)
    return bytes(archive + _record(0, Entry("TRAILER!!!", 0)))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), device node (2), name's length, check
    fields = [inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device]
    head = b"070701" + b"".join(b"%08X" % field for field in [*fields, len(name), 0])
    return _padded(head + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# --- what goes into it ---------------------------------------------------------------------------


def libraries_of(program: str) -> list[str]:
    """The shared libraries of a program and its loader, as absolute paths; none when static."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20, check=False)
    return re.findall(r"(?:=> |^\s*)(/\S+) \(0x", done.stdout, re.MULTILINE)


def modules_with_dependencies(directory: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The modules called `names`, and all that they need.

    `directory` is one kernel's, as in /lib/modules. The keys of the result are paths relative to
    it; the values are the paths of all modules that must be loaded before, the last one first, as
    in modules.dep(5). A module that the kernel has built in is left out. Raises
    `MissingRequirement` for one that it does not have at all.
    """
    files = {_module_name(path.name): path for path in directory.rglob("*.ko*")}
    try:
        listed = (directory / "modules.builtin").read_text().split()
    except FileNotFoundError:
        listed = []
    builtin = {_module_name(PurePosixPath(line).name) for line in listed}
    result: dict[str, list[str]] = {}

    def add(name: str) -> list[str]:
        """Returns what must be loaded to have `name`, it itself last."""
        if name in builtin:
            return []
        if name not in files:
            raise MissingRequirement(f"needs the kernel module {name} in {directory}")
        path = str(files[name].relative_to(directory))
        if path not in result:
            needed: dict[str, None] = {}
            for other in _depends(_module_bytes(files[name])):
                needed.update(dict.fromkeys(add(other)))
            result[path] = list(reversed(needed))
        return [*reversed(result[path]), path]

    for name in names:
        add(_module_name(name))
    return result


def _module_name(file: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", file).replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _depends(module: bytes) -> list[str]:
    # A module's .modinfo section is strings, each ended by a NUL (kernel: linux/moduleparam.h).
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_module_name(name) for name in found[1].decode().split(",") if name] if found else []


# --- the guest's userland ------------------------------------------------------------------------


def shell_initramfs(
    *,
    release: str,
    modules_from: Path,
    load: Sequence[str],
    modules: Sequence[str] = (),
    programs: Mapping[str, str],
    console: tuple[str, int, int],
) -> Path:
    """The cached archive with a shell in it; built when it is not there yet.

    `release` is the kernel's (uname -r) and `modules_from` the directory of its modules; those in
    `load` are loaded at the start, those in `modules` can be by modprobe. `programs` maps names in
    the guest's PATH to programs of this machine, "dash" among them, which is its sh. The shell
    answers on the device `console`: its name, major and minor number.
    """
    busybox = find_program("busybox", package="busybox-static")
    if libraries_of(busybox):
        raise MissingRequirement("needs a static busybox: install the package busybox-static")
    sources = {"bin/busybox": busybox, "bin/sh": programs["dash"]}
    for name, program in programs.items():
        sources[f"bin/{name}"] = program
        sources.update({path.lstrip("/"): path for path in libraries_of(program)})
    dependencies = modules_with_dependencies(modules_from, [*load, *modules])
    for path in dependencies:
        sources[f"lib/modules/{release}/{path.removesuffix('.xz')}"] = str(modules_from / path)
    name, major, minor = console
    texts = {
        "init": _INIT.replace("@MODULES@", " ".join(load)).replace("@CONSOLE@", name),
        "shell": _SHELL,
        f"lib/modules/{release}/modules.dep": "".join(
            f"{path}: {' '.join(needed)}\n".replace(".xz", "")
            for path, needed in dependencies.items()
        ),
    }
    nodes = {f"dev/{name}": (major, minor), "dev/console": (5, 1), "dev/null": (1, 3)}
    return build_initramfs(sources, texts, nodes, applets_of=busybox)


def build_initramfs(
    sources: Mapping[str, str],
    texts: Mapping[str, str],
    nodes: Mapping[str, tuple[int, int]],
    *,
    applets_of: str,
) -> Path:
    """An archive of files (`sources`: path in the guest to path here), executable `texts` and
    character device `nodes`, from the cache where it has been built before.

    Files are known by path, size and time of change: a program that was updated gives a new
    archive. `applets_of` is a busybox, whose commands all get a link in /bin.
    """
    known = [(path, file, _identity(file)) for path, file in sorted(sources.items())]
    key = hashlib.sha256(
        repr([known, sorted(texts.items()), sorted(nodes.items())]).encode()
    ).hexdigest()[:16]
    archive = cache_directory() / f"initramfs-{key}.cpio"
    if archive.exists():
        return archive
    entries = [
        Entry(path, stat.S_IFREG | 0o755, _module_bytes(Path(file)))
        for path, file in sources.items()
    ]
    entries += [Entry(path, stat.S_IFREG | 0o755, text.encode()) for path, text in texts.items()]
    entries += [Entry(path, stat.S_IFCHR | 0o600, device=device) for path, device in nodes.items()]
    applets = subprocess.run(
        [applets_of, "--list"], capture_output=True, text=True, timeout=20, check=True
    )
    entries += [
        Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in applets.stdout.split()
    ]
    entries += [Entry(name, stat.S_IFDIR | 0o755) for name in ("proc", "sys", "tmp", "run")]
    _write_whole(archive, cpio(entries))
    return archive


def _identity(file: str) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def cache_directory() -> Path:
    """Where vq's tests keep what takes long to make: ``$XDG_CACHE_HOME/vq``, else ~/.cache/vq."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vq"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that nobody ever sees a part of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
