"""vq: write virtio device models in Python and run them.

The names here are what most programs need; everything else is in the modules, one job each:

* a guest's RAM and its virtqueues: `vq.memory`, `vq.split_ring`, `vq.abi`
* device models: `vq.model` and `vq.request` to write your own, `vq.net`, `vq.devices`
* what a net device is plugged into: `vq.link`, `vq.tap`, `vq.stream`, `vq.pcap_link`
* a device's registers, for a machine of your own: `vq.mmio`, `vq.pci`
* devices on vhost-user sockets: `vq.vhost_user`, `vq.loop`
* the guest's side, for tests: `vq.driver`, `vq.net_driver`; fixtures, hostile drivers and real
  guests: `vq.testing`; sessions as regression tests: `vq.recording`
"""

from vq.device import Device, Queue
from vq.driver import DeviceError, Driver, DriverRing
from vq.errors import (
    AddressError,
    CaptureError,
    DriverError,
    FrontendError,
    UsageError,
    VqError,
)
from vq.link import Link, LoopbackLink, NullLink, Port, link_pair
from vq.memory import GuestMemory, Region
from vq.model import DeviceModel
from vq.net import NetDevice
from vq.net_driver import NetDriver
from vq.offload import Offload
from vq.request import Request
from vq.split_ring import Chain, SplitRing

__all__ = [
    "AddressError",
    "CaptureError",
    "Chain",
    "Device",
    "DeviceError",
    "DeviceModel",
    "Driver",
    "DriverError",
    "DriverRing",
    "FrontendError",
    "GuestMemory",
    "Link",
    "LoopbackLink",
    "NetDevice",
    "NetDriver",
    "NullLink",
    "Offload",
    "Port",
    "Queue",
    "Region",
    "Request",
    "SplitRing",
    "UsageError",
    "VqError",
    "link_pair",
]
