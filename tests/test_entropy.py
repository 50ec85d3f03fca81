"""The entropy device, driven by a scripted driver."""

from __future__ import annotations

import re

import pytest

from vq.devices import entropy
from vq.devices.entropy import EntropyDevice
from vq.errors import DriverError
from vq.testing.wiring import Wired, wire


def count_up(count: int) -> bytes:
    return bytes(index & 0xFF for index in range(count))


@pytest.mark.parametrize(
    ("length", "pieces"), [(1, None), (3, None), (3, 1), (64, None), (64, 5), (4096, 1000)]
)
def test_a_buffer_is_filled_however_short_or_cut(length: int, pieces: int | None) -> None:
    with wire(EntropyDevice(count_up)) as wired:
        wired.driver.probe()
        assert wired.request(0, b"", length, pieces=pieces) == count_up(length)
        assert wired.device.stats["random_bytes"] == length


def test_a_buffer_of_many_bytes_gets_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "MOST", 100)
    with wire(EntropyDevice(count_up)) as wired:
        wired.driver.probe()
        assert wired.request(0, b"", 4096) == count_up(100)


def test_the_hosts_bytes_are_never_the_same_again() -> None:
    with wire(EntropyDevice()) as wired:
        wired.driver.probe()
        assert len({wired.request(0, b"", 16) for _ in range(100)}) == 100


def put(wired: Wired, readable: int, writable: int) -> None:
    wired.driver.probe()
    gpa = wired.driver.allocator.allocate(64)
    wired.driver.queues[0].add(
        [(gpa, readable)] * (readable > 0), [(gpa + 32, writable)] * (writable >= 0)
    )
    wired.driver.kick(0)


@pytest.mark.parametrize(
    ("readable", "writable", "sentence"),
    [
        (8, 8, "a device-readable buffer (virtio 1.3, 5.4.6.1)"),
        (8, -1, "a device-readable buffer (virtio 1.3, 5.4.6.1)"),
        (0, 0, "a buffer without room (virtio 1.3, 5.4.6.2)"),
    ],
)
def test_a_buffer_that_cannot_have_random_bytes_breaks_the_device(
    readable: int, writable: int, sentence: str
) -> None:
    """It was given back without a byte, which the device must not do and no driver expects."""
    with wire(EntropyDevice()) as wired:
        put(wired, readable, writable)
        assert isinstance(wired.device.fault, DriverError)
        assert re.fullmatch(".*: " + re.escape(sentence), str(wired.device.fault))
        wired.driver.probe()
        assert len(wired.request(0, b"", 8)) == 8
