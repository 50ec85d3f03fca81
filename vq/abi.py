"""virtio's numbers: features, status, structures, registers, and the layout of a split virtqueue.

Everything here stands in the virtio 1.3 specification; the section is cited beside it. Structures
are little-endian whatever the processor (virtio 1.3, 1.4), and their sizes are asserted at import.
Nothing here does anything: positions, checks and I/O belong to the layers above.

A set of features is an `int` with one bit per feature, of any length: features go beyond 64 bits.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = [
    "AVAIL_ALIGN",
    "AVAIL_F_NO_INTERRUPT",
    "CTRL_ERR",
    "CTRL_OK",
    "DESC_ALIGN",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "MAX_QUEUE_SIZE",
    "MMIO_CONFIG",
    "MMIO_MAGIC",
    "MMIO_VERSION",
    "MSIX_ENTRY_SIZE",
    "NET_HDR",
    "NET_HDR_GSO_ECN",
    "NET_HDR_SIZE",
    "NO_VECTOR",
    "PCI_MODERN_DEVICE_ID",
    "PCI_VENDOR_ID",
    "USED_ALIGN",
    "USED_F_NO_NOTIFY",
    "CtrlAnnounce",
    "CtrlClass",
    "CtrlGuestOffloads",
    "CtrlMac",
    "CtrlMq",
    "CtrlRx",
    "CtrlVlan",
    "DeviceId",
    "Feature",
    "HdrFlag",
    "HdrGso",
    "Interrupt",
    "MmioRegister",
    "MsixControl",
    "NetConfig",
    "NetFeature",
    "NetStatus",
    "PciCapability",
    "PciCommand",
    "PciRegister",
    "PciStatus",
    "RingLayout",
    "Status",
    "VirtioNetHdr",
    "VirtioPciCap",
    "VirtioPciCfgCap",
    "VirtioPciCommonCfg",
    "VirtioPciNotifyCap",
    "VirtioPciStructure",
    "VringAvailHeader",
    "VringDesc",
    "VringUsedElem",
    "VringUsedHeader",
    "bits",
    "feature_mask",
    "feature_names",
    "index_distance",
    "needs_event",
    "ring_layout",
]


class DeviceId(enum.IntEnum):
    """Device types (virtio 1.3, 5), those that have a name in Linux' virtio_ids.h too."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    IOMEM = 6
    RPMSG = 7
    SCSI = 8
    NINE_P = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    CLOCK = 17
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    SIGNAL_DIST = 21
    PSTORE = 22
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SEC_MOD = 33
    I2C_ADAPTER = 34
    WATCHDOG = 35
    CAN = 36
    PARAM_SERV = 38
    AUDIO_POLICY = 39
    BT = 40
    GPIO = 41


class Status(enum.IntFlag):
    """The device status field (virtio 1.3, 2.1). Writing 0 resets the device."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Feature(enum.IntEnum):
    """Bit numbers of the features that any device may have (virtio 1.3, 6)."""

    NOTIFY_ON_EMPTY = 24
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41


class NetFeature(enum.IntEnum):
    """Bit numbers of the network device's features (virtio 1.3, 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63


def feature_mask(features: Iterable[int]) -> int:
    """The set with these bit numbers in it, as an int."""
    mask = 0
    for bit in features:
        mask |= 1 << bit
    return mask


def bits(mask: int) -> Iterator[int]:
    """The bit numbers in a set, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def feature_names(features: int, device: type[enum.IntEnum]) -> list[str]:
    """The names of the features in a set, lowest bit first; ``bit N`` for one without a name.

    `device` has the bits of the device type, as `NetFeature` does.
    """
    known = {int(member): member.name for kind in (device, Feature) for member in kind}
    return [known.get(bit, f"bit {bit}") for bit in bits(features)]


# --- the split virtqueue (virtio 1.3, 2.7) -------------------------------------------------------

MAX_QUEUE_SIZE = 32768  # virtio 1.3, 2.7

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


class VringDesc(ctypes.LittleEndianStructure):
    """`struct virtq_desc`, 16 bytes (virtio 1.3, 2.7.5)."""

    _fields_ = (
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
        ("next", ctypes.c_uint16),
    )


class VringAvailHeader(ctypes.LittleEndianStructure):
    """The start of `struct virtq_avail`, 4 bytes; the ring of heads follows (virtio 1.3, 2.7.6)."""

    _fields_ = (("flags", ctypes.c_uint16), ("idx", ctypes.c_uint16))


class VringUsedHeader(ctypes.LittleEndianStructure):
    """The start of `struct virtq_used`, 4 bytes; the elements follow (virtio 1.3, 2.7.8)."""

    _fields_ = (("flags", ctypes.c_uint16), ("idx", ctypes.c_uint16))


class VringUsedElem(ctypes.LittleEndianStructure):
    """`struct virtq_used_elem`, 8 bytes (virtio 1.3, 2.7.8)."""

    _fields_ = (("id", ctypes.c_uint32), ("len", ctypes.c_uint32))


class RingLayout(NamedTuple):
    """Sizes in bytes and inner offsets of a split virtqueue's three parts (virtio 1.3, 2.7).

    The descriptor table is an array of 16-byte `VringDesc`. The available ring is
    ``u16 flags, u16 idx, u16 ring[size], u16 used_event``; the used ring is
    ``u16 flags, u16 idx, VringUsedElem ring[size], u16 avail_event``.
    """

    size: int
    desc_bytes: int
    avail_bytes: int
    used_bytes: int
    used_event: int
    """Offset of `used_event` inside the available ring."""
    avail_event: int
    """Offset of `avail_event` inside the used ring."""


DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4


def ring_layout(size: int) -> RingLayout:
    """The layout of a split virtqueue of `size` descriptors (a power of two, 1 to 32768)."""
    if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
        raise ValueError(f"a split queue's size is a power of two up to 32768, not {size}")
    return RingLayout(
        size=size,
        desc_bytes=16 * size,
        avail_bytes=6 + 2 * size,
        used_bytes=6 + 8 * size,
        used_event=4 + 2 * size,
        avail_event=4 + 8 * size,
    )


def index_distance(newer: int, older: int) -> int:
    """How far a free-running 16-bit ring index has moved from `older` to `newer`."""
    return (newer - older) & 0xFFFF


def needs_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from `old` to `new` passed `event` (virtio 1.3, 2.7.7 and 2.7.10)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


# --- registers of both transports (virtio 1.3, 4.1 and 4.2) --------------------------------------


class Interrupt(enum.IntFlag):
    """Why the device interrupts: PCI's ISR status (virtio 1.3, 4.1.4.5), mmio's (4.2.2)."""

    QUEUE = 1
    CONFIG = 2


# --- virtio over MMIO (virtio 1.3, 4.2) ----------------------------------------------------------


class MmioRegister(enum.IntEnum):
    """Offsets of the control registers, 32 bits wide (virtio 1.3, 4.2.2)."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_SEL = 0x0AC
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC


MMIO_CONFIG = 0x100
"""Where the device's configuration space begins (virtio 1.3, 4.2.2)."""
MMIO_MAGIC = 0x74726976  # "virt"
MMIO_VERSION = 2


# --- virtio over PCI (virtio 1.3, 4.1) -----------------------------------------------------------

PCI_VENDOR_ID = 0x1AF4  # virtio 1.3, 4.1.2
PCI_MODERN_DEVICE_ID = 0x1040
"""A device's PCI device ID is this plus its type (virtio 1.3, 4.1.2)."""
NO_VECTOR = 0xFFFF  # virtio 1.3, 4.1.5.1.2
MSIX_ENTRY_SIZE = 16
"""An entry of the MSI-X table: u32 address low, address high, data, control (bit 0: masked)."""


class VirtioPciStructure(enum.IntEnum):
    """`virtio_pci_cap.cfg_type` (virtio 1.3, 4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5
    SHARED_MEMORY = 8
    VENDOR = 9


class VirtioPciCap(ctypes.LittleEndianStructure):
    """`struct virtio_pci_cap`, 16 bytes (virtio 1.3, 4.1.4)."""

    _fields_ = (
        ("cap_vndr", ctypes.c_uint8),
        ("cap_next", ctypes.c_uint8),
        ("cap_len", ctypes.c_uint8),
        ("cfg_type", ctypes.c_uint8),
        ("bar", ctypes.c_uint8),
        ("id", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 2),
        ("offset", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


class VirtioPciNotifyCap(ctypes.LittleEndianStructure):
    """`struct virtio_pci_notify_cap`, 20 bytes (virtio 1.3, 4.1.4.4)."""

    _fields_ = (("cap", VirtioPciCap), ("notify_off_multiplier", ctypes.c_uint32))


class VirtioPciCfgCap(ctypes.LittleEndianStructure):
    """`struct virtio_pci_cfg_cap`, 20 bytes (virtio 1.3, 4.1.4.9)."""

    _fields_ = (("cap", VirtioPciCap), ("pci_cfg_data", ctypes.c_uint8 * 4))


class VirtioPciCommonCfg(ctypes.LittleEndianStructure):
    """`struct virtio_pci_common_cfg`, 64 bytes (virtio 1.3, 4.1.4.3).

    The fields of 64 bits are two of 32, the lower first, as drivers access them.
    """

    _fields_ = (
        ("device_feature_select", ctypes.c_uint32),
        ("device_feature", ctypes.c_uint32),
        ("driver_feature_select", ctypes.c_uint32),
        ("driver_feature", ctypes.c_uint32),
        ("config_msix_vector", ctypes.c_uint16),
        ("num_queues", ctypes.c_uint16),
        ("device_status", ctypes.c_uint8),
        ("config_generation", ctypes.c_uint8),
        ("queue_select", ctypes.c_uint16),
        ("queue_size", ctypes.c_uint16),
        ("queue_msix_vector", ctypes.c_uint16),
        ("queue_enable", ctypes.c_uint16),
        ("queue_notify_off", ctypes.c_uint16),
        ("queue_desc_lo", ctypes.c_uint32),
        ("queue_desc_hi", ctypes.c_uint32),
        ("queue_driver_lo", ctypes.c_uint32),
        ("queue_driver_hi", ctypes.c_uint32),
        ("queue_device_lo", ctypes.c_uint32),
        ("queue_device_hi", ctypes.c_uint32),
        ("queue_notif_config_data", ctypes.c_uint16),
        ("queue_reset", ctypes.c_uint16),
        ("admin_queue_index", ctypes.c_uint16),
        ("admin_queue_num", ctypes.c_uint16),
    )


class PciRegister(enum.IntEnum):
    """Offsets in a PCI function's configuration header, type 0 (PCI Local Bus 3.0, 6.1)."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION_ID = 0x08
    CLASS_PROG = 0x09
    CLASS_DEVICE = 0x0A
    CACHE_LINE_SIZE = 0x0C
    HEADER_TYPE = 0x0E
    BASE_ADDRESS_0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    CAPABILITY_LIST = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class PciCommand(enum.IntFlag):
    """Bits of the PCI command register (PCI Local Bus 3.0, 6.2.2)."""

    IO = 0x1
    MEMORY = 0x2
    MASTER = 0x4
    INTX_DISABLE = 0x400


class PciStatus(enum.IntFlag):
    """Bits of the PCI status register (PCI Local Bus 3.0, 6.2.3)."""

    INTERRUPT = 0x08
    CAPABILITIES = 0x10


class PciCapability(enum.IntEnum):
    """Numbers of PCI capabilities (PCI Local Bus 3.0, appendix H)."""

    VENDOR = 0x09
    MSIX = 0x11


class MsixControl(enum.IntFlag):
    """Bits of MSI-X message control; below them the table's size less one (PCI 3.0, 6.8.2.3)."""

    MASK_ALL = 0x4000
    ENABLE = 0x8000


# --- the network device (virtio 1.3, 5.1) --------------------------------------------------------

NET_HDR_SIZE = 12


class HdrFlag(enum.IntFlag):
    """`virtio_net_hdr.flags` (virtio 1.3, 5.1.6)."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4


class HdrGso(enum.IntEnum):
    """`virtio_net_hdr.gso_type` without the ECN bit (virtio 1.3, 5.1.6)."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5


NET_HDR_GSO_ECN = 0x80


class VirtioNetHdr(ctypes.LittleEndianStructure):
    """`struct virtio_net_hdr` as VERSION_1 has it, 12 bytes (virtio 1.3, 5.1.6)."""

    _fields_ = (
        ("flags", ctypes.c_uint8),
        ("gso_type", ctypes.c_uint8),
        ("hdr_len", ctypes.c_uint16),
        ("gso_size", ctypes.c_uint16),
        ("csum_start", ctypes.c_uint16),
        ("csum_offset", ctypes.c_uint16),
        ("num_buffers", ctypes.c_uint16),
    )


NET_HDR = struct.Struct("<BBHHHHH")
"""The same seven fields for the data path, where a ctypes structure costs too much."""


class NetStatus(enum.IntFlag):
    """`virtio_net_config.status` (virtio 1.3, 5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


class NetConfig(ctypes.LittleEndianStructure):
    """`struct virtio_net_config`, 24 bytes without the RSS fields (virtio 1.3, 5.1.4)."""

    _fields_ = (
        ("mac", ctypes.c_uint8 * 6),
        ("status", ctypes.c_uint16),
        ("max_virtqueue_pairs", ctypes.c_uint16),
        ("mtu", ctypes.c_uint16),
        ("speed", ctypes.c_uint32),
        ("duplex", ctypes.c_uint8),
        ("rss_max_key_size", ctypes.c_uint8),
        ("rss_max_indirection_table_length", ctypes.c_uint16),
        ("supported_hash_types", ctypes.c_uint32),
    )


class CtrlClass(enum.IntEnum):
    """`virtio_net_ctrl.class` (virtio 1.3, 5.1.6.5)."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


class CtrlRx(enum.IntEnum):
    """Commands of `CtrlClass.RX` (virtio 1.3, 5.1.6.5.1)."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


class CtrlMac(enum.IntEnum):
    """Commands of `CtrlClass.MAC` (virtio 1.3, 5.1.6.5.2)."""

    TABLE_SET = 0
    ADDR_SET = 1


class CtrlVlan(enum.IntEnum):
    """Commands of `CtrlClass.VLAN` (virtio 1.3, 5.1.6.5.3)."""

    ADD = 0
    DEL = 1


class CtrlAnnounce(enum.IntEnum):
    """Commands of `CtrlClass.ANNOUNCE` (virtio 1.3, 5.1.6.5.4)."""

    ACK = 0


class CtrlMq(enum.IntEnum):
    """Commands of `CtrlClass.MQ` (virtio 1.3, 5.1.6.5.5)."""

    VQ_PAIRS_SET = 0


class CtrlGuestOffloads(enum.IntEnum):
    """Commands of `CtrlClass.GUEST_OFFLOADS` (virtio 1.3, 5.1.6.5.8)."""

    SET = 0


CTRL_OK = 0
CTRL_ERR = 1

for _structure, _size in (
    (VringDesc, 16),
    (VringAvailHeader, 4),
    (VringUsedHeader, 4),
    (VringUsedElem, 8),
    (VirtioPciCap, 16),
    (VirtioPciNotifyCap, 20),
    (VirtioPciCfgCap, 20),
    (VirtioPciCommonCfg, 64),
    (VirtioNetHdr, NET_HDR_SIZE),
    (NetConfig, 24),
):
    if ctypes.sizeof(_structure) != _size:
        raise ImportError(f"{_structure.__name__} is not {_size} bytes on this machine")
if NET_HDR.size != NET_HDR_SIZE:
    raise ImportError("the net header's format string does not make 12 bytes")
