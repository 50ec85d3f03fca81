"""What a Linux guest sees of DEVICE_NEEDS_RESET: nothing moves, until its driver is loaded anew."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vq.abi import NetFeature, Status
from vq.device import Queue
from vq.errors import DriverError
from vq.net import NetDevice
from vq.split_ring import SplitRing
from vq.tap_linux import LinuxTap
from vq.testing.guest import UmlGuest
from vq.testing.namespaces import Namespace
from vq.testing.requirements import or_skip
from vq.testing.served import ServedDevices, assert_well, wait_until

from .conftest import HOST4, TAP, address_guest, address_host


class Strict(NetDevice):
    """Finds a rule broken once it is told to: no driver of Linux' breaks one by itself."""

    broken = False

    def process(self, queue: Queue, ring: SplitRing) -> bool:
        if self.broken and queue.index == 1:
            self.broken = False
            raise DriverError("a rule that was broken", queue=queue.name, section="2.7.4")
        return super().process(queue, ring)


def test_a_guest_whose_device_needs_a_reset_gets_it_back_by_loading_the_driver_anew(
    host: Namespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.add_tap(TAP)
    # With a control queue Linux' driver would wait for an answer to its next command, without end
    # and with the processor: a guest with one processor does nothing else then.
    device = Strict(LinuxTap(TAP, namespace=host.name), features=~(1 << NetFeature.CTRL_VQ))
    served = ServedDevices([device], tmp_path)
    try:
        address_host(host)
        served.call(lambda: device.set_link_up(True))
        with or_skip():
            guest = UmlGuest([(served.sockets[0], 1)])
        with guest:
            address_guest(guest)
            ping = f"ping -c 2 -i 0.2 -W 2 {HOST4}"
            assert ", 0% packet loss" in guest.output(ping)
            before = guest.kernel_log()

            served.call(lambda: setattr(device, "broken", True))
            assert ", 100% packet loss" in guest.run(ping).output
            wait_until(lambda: device.status & Status.NEEDS_RESET, "the fault")
            assert "driver error: tx0: a rule that was broken" in caplog.text
            assert "the device rests until its driver resets it" in caplog.text
            # Linux' drivers do not look for the bit: nothing is said, and down and up is no reset.
            said = guest.kernel_log().removeprefix(before)
            assert "virtio" not in said and "reset" not in said, said
            guest.output("ip link set eth0 down && ip link set eth0 up")
            assert ", 100% packet loss" in guest.run(ping).output
            assert device.status & Status.NEEDS_RESET

            caplog.clear()
            with caplog.at_level(logging.INFO):
                guest.output("rmmod virtio_net && modprobe virtio_net", timeout=60)
                address_guest(guest)
                assert ", 0% packet loss" in guest.output(ping)
            assert not device.status & Status.NEEDS_RESET
            assert "negotiated" in caplog.text
            assert_well(guest, host)
    finally:
        served.close()
        device.close()
        host.run(f"ip link del {TAP}")
