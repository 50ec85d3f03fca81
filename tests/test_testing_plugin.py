"""The fixtures that authors of device models get."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vq.abi import DeviceId, NetFeature
from vq.devices.entropy import EntropyDevice
from vq.driver import DeviceError
from vq.errors import UsageError
from vq.link import LoopbackLink
from vq.memory import GuestMemory
from vq.mmio import MmioRegisters
from vq.model import DeviceModel
from vq.net import NetDevice
from vq.net_driver import NetDriver
from vq.testing import wiring
from vq.testing.guest import GuestError, check_uml_drives
from vq.testing.namespaces import Namespace
from vq.testing.plugin import vq_via
from vq.testing.requirements import MissingRequirement, check_contained, or_skip
from vq.testing.served import ServedDevices, ServeProcess, guest_with
from vq.testing.wiring import WIRES, Wired

Wire = Callable[..., Wired]

pytest_plugins = ["pytester"]


class Entropy(EntropyDevice):
    """Gives ones, and says when it is closed."""

    closed = 0

    def __init__(self) -> None:
        super().__init__(source=lambda count: b"\1" * count)

    def close(self) -> None:
        super().close()
        Entropy.closed += 1


class Forgetful(DeviceModel):
    device_id = 63

    def __init__(self) -> None:
        super().__init__(queues=[("requests", 16, lambda requests: None)])


# --- memory and wires ----------------------------------------------------------------------------


def test_the_memory_has_a_hole(vq_memory: GuestMemory) -> None:
    assert len(vq_memory.regions) == 2
    assert 0 not in vq_memory and 0x1000 in vq_memory and 0x200000 not in vq_memory


def test_a_device_works_over_every_wire(vq_wire: Wire, vq_via: str) -> None:
    wired = vq_wire(Entropy(), vq_via)
    wired.driver.probe()
    assert wired.request(0, room=10) == b"\1" * 10
    assert wired.request(0, room=10, pieces=3) == b"\1" * 10
    assert wired.via == vq_via


def test_all_wires_have_their_turn() -> None:
    marker = vq_via._fixture_function_marker  # type: ignore[attr-defined]
    assert tuple(marker.params) == WIRES


def test_a_driver_of_ones_own_stands_on_the_wire(vq_wire: Wire, vq_via: str) -> None:
    wired = vq_wire(NetDevice(LoopbackLink()), vq_via)
    driver = NetDriver(wired.transport, wired.memory, 1 << NetFeature.MAC, idle=wired.turn)
    frame = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + bytes(50)
    driver.send(frame)
    received: list[bytes] = []

    def arrived() -> bool:
        received.extend(packet.data for packet in driver.receive())
        return bool(received)

    wired.wait_until(arrived, "the frame")
    assert received == [frame]


@pytest.fixture
def closes() -> Iterator[None]:
    """Set up first, so torn down last: the device was closed by then."""
    before = Entropy.closed
    yield
    assert Entropy.closed == before + 1


def test_a_wired_device_is_closed_after_the_test(closes: None, vq_wire: Wire) -> None:
    vq_wire(Entropy())


def test_the_callers_memory_and_features_are_used(vq_wire: Wire, vq_memory: GuestMemory) -> None:
    wired = vq_wire(Entropy(), memory=vq_memory, features=0, queue_size=4)
    wired.driver.probe()
    assert wired.memory is vq_memory
    assert wired.driver.features == 1 << 32
    assert wired.driver.queues[0].size == 4


def test_a_wire_that_is_not_known_is_refused(vq_wire: Wire) -> None:
    with pytest.raises(UsageError, match="'string' is not a wire; the wires are direct"):
        vq_wire(Entropy(), "string")


def test_a_device_that_does_not_answer_is_an_error_in_time(
    vq_wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "PATIENCE", 0.05)
    device = Entropy()
    wired = vq_wire(device)
    wired.driver.probe()
    monkeypatch.setattr(device, "process", lambda queue, ring: False)
    with pytest.raises(DeviceError, match=r"no answer on queue 0 in .* has taken none"):
        wired.request(0, room=10)


@pytest.mark.parametrize("via", WIRES)
def test_a_device_that_forgets_to_complete_is_told_so(vq_wire: Wire, via: str) -> None:
    device = Forgetful()
    wired = vq_wire(device, via)
    wired.driver.probe()
    with pytest.raises(DeviceError, match="has not completed 1 that it has taken"):
        wired.request(0, room=10, timeout=0.05)


class Unmade(DeviceModel):
    device_id = 63

    def __init__(self) -> None:
        """Without that of its base."""


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        (Entropy, r"Entropy is a class: make a device of it, Entropy\(\)"),
        (Unmade(), r"Unmade.__init__ does not call super\(\).__init__"),
        ("rng", r"'rng' is no device"),
    ],
)
def test_what_is_no_device_is_named(
    vq_wire: Wire, vq_guest: Callable[..., Any], device: Any, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        vq_wire(device)
    with pytest.raises(UsageError, match=complaint):
        vq_guest(device)
    with pytest.raises(UsageError, match=complaint):
        MmioRegisters(device)


def test_a_device_is_one_loops(vq_wire: Wire, tmp_path: Path) -> None:
    """Two threads served it, and both moved its rings."""
    device = Entropy()
    with ServedDevices([device], tmp_path):
        with pytest.raises(UsageError, match="this Entropy is served already"):
            vq_wire(device)
        (tmp_path / "second").mkdir()
        with pytest.raises(UsageError, match="this Entropy is served already"):
            ServedDevices([device], tmp_path / "second")
        assert not list((tmp_path / "second").iterdir())


def test_a_device_that_needs_a_reset_is_an_error_with_its_reason(vq_wire: Wire) -> None:
    wired = vq_wire(EntropyDevice(source=lambda count: 1 // 0))
    wired.driver.probe()
    with pytest.raises(DeviceError, match=r"needs a reset: .*by zero"):
        wired.request(0, room=10)


# --- guests, programs, namespaces ----------------------------------------------------------------


def test_a_real_guest_has_the_device(vq_guest: Callable[..., Any]) -> None:
    device = NetDevice(LoopbackLink())
    guest = vq_guest(device, Entropy(), undriven=True)
    ids = guest.output("cat /sys/bus/virtio/devices/*/device").split()
    assert sorted(int(text, 16) for text in ids) == [DeviceId.NET, DeviceId.ENTROPY]
    guest.output("ip link set eth0 up && ip addr add 192.0.2.1/24 dev eth0")
    guest.run("ping -c 1 -W 1 192.0.2.9")  # an ARP request, which comes back
    assert device.stats["tx_frames"] > 0


def test_a_guest_that_has_no_driver_for_a_device_is_not_booted() -> None:
    """It was, quietly; and its /dev/hwrng, which is User-Mode Linux's own, looked like success."""
    with or_skip():
        check_uml_drives([DeviceId.NET, DeviceId.BLOCK, DeviceId.CONSOLE, DeviceId.VSOCK])
    with pytest.raises(MissingRequirement, match="no driver for devices of type 4"):
        check_uml_drives([DeviceId.NET, DeviceId.ENTROPY])
    with pytest.raises(MissingRequirement), guest_with(Entropy()):
        pass


def test_a_guests_failed_command_says_what_its_device_suffers_from(
    vq_guest: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = NetDevice(LoopbackLink())
    guest = vq_guest(device)
    assert guest.call(threading.current_thread) is not threading.current_thread()
    with pytest.raises(GuestError, match=r"ended with 3: no$"):
        guest.output("echo no; exit 3")
    monkeypatch.setattr(device, "fault", KeyError("colour"))
    with pytest.raises(GuestError, match=r"no; NetDevice needs a reset: KeyError: 'colour'$"):
        guest.output("echo no; exit 3")


def test_devices_are_looked_into_from_the_test_in_their_own_thread(tmp_path: Path) -> None:
    with ServedDevices([Entropy()], tmp_path) as served:
        assert served.call(lambda: served.devices[0].device_id) == DeviceId.ENTROPY
        with pytest.raises(ZeroDivisionError):
            served.call(lambda: 1 // 0)
        assert served.sockets[0].is_socket()
    assert not served.sockets[0].exists()


def test_a_program_that_serves_ends_with_the_test(vq_serve: Callable[..., ServeProcess]) -> None:
    served = vq_serve("rng")
    assert Path(served.sockets[0]).is_socket()
    assert "waiting for a frontend" in served.log()


def test_whoever_is_not_root_has_a_program_that_serves(tmp_path: Path) -> None:
    """It took itself for root, and could not become nobody: "Operation not permitted"."""
    script = f"""
        import os
        from pathlib import Path
        from vq.testing.served import ServeProcess

        assert os.geteuid() == 1000
        with ServeProcess(Path({str(tmp_path)!r}), "rng") as served:
            print(served.log())
    """
    ordinary = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    with or_skip():
        check_contained()
    done = subprocess.run(
        [*ordinary, sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "waiting for a frontend" in done.stdout, done.stderr


def test_a_program_that_does_not_serve_says_why(vq_serve: Callable[..., ServeProcess]) -> None:
    with pytest.raises(RuntimeError, match=r"does not serve: .*'nothing' is not a link"):
        vq_serve("net", "--link", "nothing")


def test_a_namespace_has_a_tap(vq_namespace: Namespace) -> None:
    vq_namespace.add_tap("mine")
    assert "mine" in vq_namespace.run("ip -o link")


# --- the plugin itself ---------------------------------------------------------------------------


def test_the_plugin_is_there_and_costs_nothing_until_it_is_used() -> None:
    code = """
        import sys
        import vq
        before = set(sys.modules)
        import vq.testing.plugin
        new = {name for name in set(sys.modules) - before if name.startswith(("vq", "hypoth"))}
        assert new <= {"vq.testing", "vq.testing.plugin"}, new
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=30)


def test_other_projects_have_the_fixtures_without_asking(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from vq.devices.entropy import EntropyDevice
        from vq.testing.hostile import hostile_driver_battery

        def test_device(vq_wire):
            wired = vq_wire(EntropyDevice())
            wired.driver.probe()
            assert len(wired.request(0, room=9)) == 9

        test_hostile_drivers = hostile_driver_battery(EntropyDevice)
        """
    )
    result = pytester.runpytest_subprocess("-q", "-x", "-k", "device or 2.5", timeout=60)
    assert result.ret == 0, result.stdout
