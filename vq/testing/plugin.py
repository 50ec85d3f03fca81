"""A pytest plugin: fixtures for tests of device models. It is there wherever vq is installed.

====================  ============================================================================
`vq_memory`           a guest's memory
`vq_wire`             wires a device to a scripted driver: ``vq_wire(MyDevice(), "vhost-user")``
`vq_via`              runs the test once for each wire there is
`vq_guest`            boots User-Mode Linux with devices: ``vq_guest(MyDevice()).run("...")``
`vq_serve`            starts ``vq serve`` as a program: ``vq_serve("net", "--link", "null")``
`vq_namespace`        a network stack of its own, where taps can be made
`vq_replay`           replays a recorded session: ``vq_replay("net.vqrec", MyDevice())``
====================  ============================================================================

Where something is missing on this machine (a program, a right) the test is skipped with the reason;
with ``VQ_REQUIRE=1`` it fails. For other scopes than a test's, `vq.testing.wiring.wire`,
`vq.testing.served.guest_with` and `vq.testing.namespaces.Namespace` are context managers.

Nothing is imported here before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vq.device import Device
    from vq.memory import GuestMemory
    from vq.testing.namespaces import Namespace
    from vq.testing.served import ServedGuest, ServeProcess
    from vq.testing.wiring import Wired

__all__: list[str] = []


@pytest.fixture
def vq_memory() -> Iterator[GuestMemory]:
    """A guest's memory: two regions of a megabyte, with a hole between them and none at 0."""
    from vq.memory import GuestMemory
    from vq.testing.wiring import MEMORY

    with GuestMemory.allocate(*MEMORY) as memory:
        yield memory


@pytest.fixture
def vq_wire() -> Iterator[Callable[..., Wired]]:
    """Wires a device to a scripted driver; see `vq.testing.wiring.wire`.

    Called with a device and, if need be, one of `vq.testing.wiring.WIRES`. The device is closed
    after the test.
    """
    from vq.device import check_made
    from vq.testing.wiring import wire

    with ExitStack() as stack:

        def make(device: Device, via: str = "direct", **options: Any) -> Wired:
            check_made(device)
            stack.callback(device.close)
            return stack.enter_context(wire(device, via, **options))

        yield make


@pytest.fixture(params=("direct", "mmio", "pci", "pci-msix", "vhost-user"))
def vq_via(request: pytest.FixtureRequest) -> str:
    """Each of `vq.testing.wiring.WIRES` in turn."""
    via: str = request.param
    return via


@pytest.fixture
def vq_guest() -> Iterator[Callable[..., ServedGuest]]:
    """Boots a User-Mode Linux guest with devices; see `vq.testing.served.guest_with`.

    That takes about two seconds and no privileges. A thread serves the devices: what a test does
    with them it does there, by `ServedGuest.call`. They are closed after the test, and what the
    guest's kernel complained of fails it.
    """
    from vq.device import check_made
    from vq.testing.requirements import or_skip
    from vq.testing.served import guest_with

    guests: list[ServedGuest] = []
    with ExitStack() as stack:

        def boot(*devices: Device, **options: Any) -> ServedGuest:
            for device in devices:
                check_made(device)
                stack.callback(device.close)
            with or_skip():
                guest = stack.enter_context(guest_with(*devices, **options))
            guests.append(guest)
            return guest

        yield boot
        complaints = [line for guest in guests for line in guest.complaints()]
        assert not complaints, "the guest's kernel complains: " + "; ".join(complaints)


@pytest.fixture
def vq_serve(tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts ``vq serve`` as a program; see `vq.testing.served.ServeProcess`."""
    from vq.testing.requirements import or_skip
    from vq.testing.served import ServeProcess

    with ExitStack() as stack:

        def start(kind: str, *options: str, **how: Any) -> ServeProcess:
            with or_skip():
                return stack.enter_context(ServeProcess(tmp_path, kind, *options, **how))

        yield start


@pytest.fixture
def vq_namespace() -> Iterator[Namespace]:
    """A network stack of its own, for root on Linux; `add_tap` makes a tap in it."""
    from vq.testing.namespaces import Namespace
    from vq.testing.requirements import need_namespaces, need_tap

    need_tap()
    need_namespaces()
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def vq_replay() -> Callable[..., None]:
    """Replays a recorded session against a device, and fails where the device does otherwise."""
    from vq.testing.recordings import assert_replays

    return assert_replays
