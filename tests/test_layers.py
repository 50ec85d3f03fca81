"""A module imports only from layers below its own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import vq

ROOT = Path(vq.__file__).parent

LAYERS = (
    (
        "errors",
        "abi",
        "abi_block",
        "abi_console",
        "abi_vsock",
        "files",
        "log_limit",
        "pace",
        "exit_status",
    ),
    (
        "memory",
        "packet",
        "pcap",
        "ioctl",
        "netlink",
        "system_calls",
        "unix_socket",
        "declarations",
        "lanes",
    ),
    ("split_ring", "driver", "offload", "platforms", "gather", "io_uring", "shared_fd"),
    ("software", "ring_run", "ring_row", "inflight", "abi_probe", "request", "asyncio_thread"),
    ("device", "link", "tun_hdr", "net_driver", "net_filter", "dhcp", "driver_registers"),
    ("registers", "driver_mmio", "driver_pci"),
    ("mmio", "pci_function"),
    ("pci",),
    ("net_receive", "net_transmit", "net_control", "guest_stack", "loop", "vhost_message", "model"),
    ("sandbox", "vring", "tap_linux_port"),
    ("stream", "pcap_link", "tap_linux", "tap_bsd", "vhost_channel", "queue_process"),
    ("net", "tap", "vhost_processes", "devices", "privsep"),
    ("vhost_backend",),
    ("vhost_user",),
    ("recording", "options"),
    ("testing",),
    ("loopback", "check", "bench", "serve"),
    ("replay",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports_of(path: Path) -> set[str]:
    """The first name below `vq` of everything that a file of the package imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vq":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vq."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("vq.")}
    return found


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below_its_own(path: Path) -> None:
    place = place_of(path)
    for imported in imports_of(path) - {place}:
        assert LEVEL[imported] < LEVEL[place], f"{place} imports {imported}"


def test_every_module_has_its_place_in_the_table() -> None:
    assert {place_of(path) for path in MODULES} == set(LEVEL)


def test_the_guests_side_shares_nothing_with_the_devices_side() -> None:
    """So that one mistake cannot hide in both."""
    shared = {"abi", "errors", "memory"}
    assert imports_of(ROOT / "driver.py") <= shared
    assert imports_of(ROOT / "net_driver.py") <= shared | {"driver"}
    for name in ("driver_registers", "driver_mmio", "driver_pci"):
        assert imports_of(ROOT / f"{name}.py") <= shared | {"driver", "driver_registers"}
    for name in ("split_ring", "ring_run", "ring_row", "registers", "mmio", "pci_function", "pci"):
        assert not any("driver" in imported for imported in imports_of(ROOT / f"{name}.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_places_for_it_know_an_operating_system(path: Path) -> None:
    if place_of(path) in {"tap", "tap_linux", "tap_bsd", "platforms", "sandbox", "testing"}:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("sys", "platform"), ("os", "name")}


def test_the_package_needs_no_more_than_it_says() -> None:
    allowed = sys.stdlib_module_names | {
        "vq",
        "psutil",
        "typing_extensions",
        "pytest",
        "hypothesis",
    }
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path
