"""The numbers of the systems' headers that vq uses, for every platform that it knows.

`vq check` states them, a test compares them with the constants in vq's own modules, and the
headers themselves are the oracle for all of them (`vq.abi_probe`). Nothing is copied where a rule
exists: the number of an ioctl is computed from what it carries, a structure's size and offsets from
its fields' sizes and alignments, a virtio number from `vq.abi`.

A name is the headers' own: ``TUNSETIFF``, ``IFCAP_TSOv4``, ``sizeof(tun_hdr)``,
``offsetof(tun_hdr, th_mss)``. Which number a running vq uses is not decided here.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from vq import abi, abi_block, abi_console, abi_vsock, ioctl, system_calls
from vq.ioctl import Direction

__all__ = ["KNOWN", "Platform", "all_numbers", "host", "numbers"]


class Platform(NamedTuple):
    """A system on a processor: all that the rules need to know."""

    system: str
    """``linux``, ``openbsd`` or ``freebsd``, or another system's name in small letters."""
    processor: str
    """The processor by the name that Linux and its toolchains give it."""
    byteorder: str = "little"
    pointer: int = 8
    """Bytes in a pointer, and in a C ``long``."""

    @property
    def name(self) -> str:
        """As in ``linux-x86_64``."""
        return f"{self.system}-{self.processor}"


KNOWN = (
    Platform("linux", "x86_64"),
    Platform("linux", "aarch64"),
    Platform("linux", "riscv64"),
    Platform("linux", "powerpc64le"),
    Platform("linux", "mips", "big", pointer=4),
    Platform("linux", "s390x", "big"),
    Platform("openbsd", "x86_64"),
    Platform("openbsd", "aarch64"),
    Platform("freebsd", "x86_64"),
    Platform("freebsd", "aarch64"),
)

_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "powerpc64le"}
"""The names that `os.uname` gives where they are not the ones used here."""


def host() -> Platform:
    """The platform of this process, known or not."""
    machine = os.uname()
    processor = _PROCESSORS.get(machine.machine, machine.machine)
    return Platform(machine.sysname.lower(), processor, sys.byteorder, struct.calcsize("P"))


def numbers(platform: Platform) -> dict[str, int]:
    """Every number for `platform`, by name. Of a system that vq does not know there are none."""
    rule = _RULES.get(platform.system)
    return rule(platform) if rule else {}


def all_numbers() -> dict[str, dict[str, int]]:
    """The numbers of every platform in `KNOWN`, and of this host, by the platform's name."""
    return {each.name: numbers(each) for each in (*KNOWN, host())}


# --- structures, laid out as every C compiler of these platforms does ----------------------------


class _Type(NamedTuple):
    size: int
    alignment: int
    offsets: Mapping[str, int] = {}


def _scalar(size: int) -> _Type:
    return _Type(size, size)


_CHAR, _SHORT, _INT, _U64 = map(_scalar, (1, 2, 4, 8))


def _array(element: _Type, count: int) -> _Type:
    return _Type(element.size * count, element.alignment)


def _struct(**fields: _Type) -> _Type:
    offsets, end = {}, 0
    for name, kind in fields.items():
        offsets[name] = _round_up(end, kind.alignment)
        end = offsets[name] + kind.size
    alignment = max(kind.alignment for kind in fields.values())
    return _Type(_round_up(end, alignment), alignment, offsets)


def _union(**fields: _Type) -> _Type:
    alignment = max(kind.alignment for kind in fields.values())
    size = _round_up(max(kind.size for kind in fields.values()), alignment)
    return _Type(size, alignment, dict.fromkeys(fields, 0))


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _layout(structures: Mapping[str, _Type]) -> dict[str, int]:
    entries = {}
    for name, kind in structures.items():
        entries[f"sizeof({name})"] = kind.size
        for field, offset in kind.offsets.items():
            entries[f"offsetof({name}, {field})"] = offset
    return entries


_IFNAMSIZ = 16
_SOCKADDR = _Type(16, 2)


def _ifreq(request: _Type, **names: int) -> _Type:
    """`struct ifreq`: a name, then a union. `names` are macros for what lies in that union."""
    outer = _struct(ifr_name=_array(_CHAR, _IFNAMSIZ), ifr_ifru=request)
    start = outer.offsets["ifr_ifru"]
    within = {name: start + offset for name, offset in names.items()}
    return outer._replace(offsets={"ifr_name": outer.offsets["ifr_name"], **within})


# --- virtio, whose numbers stand in Linux' headers too -------------------------------------------


def _virtio() -> dict[str, int]:
    return {
        **_prefixed("VIRTIO_ID_", _virtio_ids()),
        **_prefixed("VIRTIO_CONFIG_S_", _members(abi.Status)),
        **{
            ("VIRTIO_RING_F_" if name in ("INDIRECT_DESC", "EVENT_IDX") else "VIRTIO_F_") + name: n
            for name, n in _members(abi.Feature).items()
        },
        **_prefixed("VIRTIO_NET_F_", _members(abi.NetFeature)),
        **_prefixed("VIRTIO_NET_S_", _members(abi.NetStatus)),
        **_prefixed("VIRTIO_NET_HDR_F_", _members(abi.HdrFlag)),
        **_prefixed("VIRTIO_NET_HDR_GSO_", _members(abi.HdrGso)),
        "VIRTIO_NET_HDR_GSO_ECN": abi.NET_HDR_GSO_ECN,
        **_prefixed("VIRTIO_NET_CTRL_", _members(abi.CtrlClass)),
        **_prefixed("VIRTIO_NET_CTRL_RX_", _members(abi.CtrlRx)),
        **_prefixed("VIRTIO_NET_CTRL_MAC_", _members(abi.CtrlMac)),
        **_prefixed("VIRTIO_NET_CTRL_VLAN_", _members(abi.CtrlVlan)),
        **_prefixed("VIRTIO_NET_CTRL_ANNOUNCE_", _members(abi.CtrlAnnounce)),
        **_prefixed("VIRTIO_NET_CTRL_MQ_", _members(abi.CtrlMq)),
        **_prefixed("VIRTIO_NET_CTRL_GUEST_OFFLOADS_", _members(abi.CtrlGuestOffloads)),
        **_prefixed("VIRTIO_CONSOLE_F_", _members(abi_console.ConsoleFeature)),
        **_prefixed("VIRTIO_CONSOLE_", _members(abi_console.ConsoleEvent)),
        "VIRTIO_VSOCK_F_SEQPACKET": abi_vsock.VsockFeature.SEQPACKET,
        "VIRTIO_NET_OK": abi.CTRL_OK,
        "VIRTIO_NET_ERR": abi.CTRL_ERR,
        "VRING_DESC_F_NEXT": abi.DESC_F_NEXT,
        "VRING_DESC_F_WRITE": abi.DESC_F_WRITE,
        "VRING_DESC_F_INDIRECT": abi.DESC_F_INDIRECT,
        "VRING_AVAIL_F_NO_INTERRUPT": abi.AVAIL_F_NO_INTERRUPT,
        "VRING_USED_F_NO_NOTIFY": abi.USED_F_NO_NOTIFY,
        "VRING_DESC_ALIGN_SIZE": abi.DESC_ALIGN,
        "VRING_AVAIL_ALIGN_SIZE": abi.AVAIL_ALIGN,
        "VRING_USED_ALIGN_SIZE": abi.USED_ALIGN,
        **_layout(
            {
                "vring_desc": _described(abi.VringDesc),
                "vring_avail": _described(abi.VringAvailHeader),
                "vring_used": _described(abi.VringUsedHeader),
                "vring_used_elem": _described(abi.VringUsedElem),
                "virtio_net_hdr_v1": _described(abi.VirtioNetHdr),
                "virtio_net_hdr": _legacy_net_hdr(),
                "virtio_net_config": _described(abi.NetConfig),
                "virtio_net_ctrl_hdr": _Type(2, 1, {"class": 0, "cmd": 1}),
                "virtio_net_ctrl_mq": _struct(virtqueue_pairs=_SHORT),
                "virtio_console_config": _described(abi_console.ConsoleConfig),
                "virtio_console_control": _described(abi_console.ConsoleControl),
                "virtio_vsock_config": _described(abi_vsock.VsockConfig),
                "virtio_vsock_hdr": _described(abi_vsock.VsockHdr),
                "virtio_vsock_event": _described(abi_vsock.VsockEvent),
            }
        ),
        **_virtio_registers(),
        **_virtio_blk(),
    }


def _virtio_blk() -> dict[str, int]:
    config = _described(abi_block.BlkConfig)
    # The header's config ends where zones begin or goes beyond, as old or new as it is.
    return {
        **_prefixed("VIRTIO_BLK_F_", _members(abi_block.BlkFeature)),
        **_prefixed("VIRTIO_BLK_T_", _members(abi_block.BlkType)),
        **_prefixed("VIRTIO_BLK_S_", _members(abi_block.BlkStatus)),
        "VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP": abi_block.BLK_UNMAP,
        "VIRTIO_BLK_ID_BYTES": abi_block.BLK_ID_BYTES,
        **{
            f"offsetof(virtio_blk_config, {field})": offset
            for field, offset in config.offsets.items()
        },
        **_layout(
            {
                "virtio_blk_outhdr": _struct(type=_INT, ioprio=_INT, sector=_U64),
                "virtio_blk_discard_write_zeroes": _struct(
                    sector=_U64, num_sectors=_INT, flags=_INT
                ),
            }
        ),
    }


def _virtio_registers() -> dict[str, int]:
    """The numbers of the register transports, and of PCI as far as they need it."""
    # By the names that Linux gave them before the specification chose others.
    mmio = {
        name.replace("QUEUE_SIZE", "QUEUE_NUM")
        .replace("QUEUE_DRIVER", "QUEUE_AVAIL")
        .replace("QUEUE_DEVICE", "QUEUE_USED"): offset
        for name, offset in _members(abi.MmioRegister).items()
        if name != "QUEUE_RESET"  # newer than the headers
    }
    structures = {
        name + ("_CFG" if name != "PCI_CFG" else ""): number
        for name, number in _members(abi.VirtioPciStructure).items()
    }
    common = _described(abi.VirtioPciCommonCfg).offsets
    return {
        **_prefixed("VIRTIO_MMIO_", mmio),
        "VIRTIO_MMIO_CONFIG": abi.MMIO_CONFIG,
        "VIRTIO_MMIO_INT_VRING": abi.Interrupt.QUEUE,
        "VIRTIO_MMIO_INT_CONFIG": abi.Interrupt.CONFIG,
        "VIRTIO_PCI_ISR_CONFIG": abi.Interrupt.CONFIG,
        "VIRTIO_MSI_NO_VECTOR": abi.NO_VECTOR,
        **_prefixed("VIRTIO_PCI_CAP_", structures),
        **{f"VIRTIO_PCI_COMMON_{name}": common[field] for name, field in _LINUX_COMMON_CFG.items()},
        **_layout(
            {
                "virtio_pci_cap": _described(abi.VirtioPciCap),
                "virtio_pci_notify_cap": _described(abi.VirtioPciNotifyCap),
                "virtio_pci_cfg_cap": _described(abi.VirtioPciCfgCap),
            }
        ),
        "sizeof(virtio_pci_modern_common_cfg)": ctypes.sizeof(abi.VirtioPciCommonCfg),
        **_prefixed("PCI_", _members(abi.PciRegister)),
        **_prefixed("PCI_COMMAND_", _members(abi.PciCommand)),
        "PCI_STATUS_INTERRUPT": abi.PciStatus.INTERRUPT,
        "PCI_STATUS_CAP_LIST": abi.PciStatus.CAPABILITIES,
        "PCI_CAP_ID_VNDR": abi.PciCapability.VENDOR,
        "PCI_CAP_ID_MSIX": abi.PciCapability.MSIX,
        "PCI_MSIX_FLAGS_MASKALL": abi.MsixControl.MASK_ALL,
        "PCI_MSIX_FLAGS_ENABLE": abi.MsixControl.ENABLE,
        "PCI_MSIX_ENTRY_SIZE": abi.MSIX_ENTRY_SIZE,
    }


_LINUX_COMMON_CFG = {
    "DFSELECT": "device_feature_select",
    "DF": "device_feature",
    "GFSELECT": "driver_feature_select",
    "GF": "driver_feature",
    "MSIX": "config_msix_vector",
    "NUMQ": "num_queues",
    "STATUS": "device_status",
    "CFGGENERATION": "config_generation",
    "Q_SELECT": "queue_select",
    "Q_SIZE": "queue_size",
    "Q_MSIX": "queue_msix_vector",
    "Q_ENABLE": "queue_enable",
    "Q_NOFF": "queue_notify_off",
    "Q_DESCLO": "queue_desc_lo",
    "Q_DESCHI": "queue_desc_hi",
    "Q_AVAILLO": "queue_driver_lo",
    "Q_AVAILHI": "queue_driver_hi",
    "Q_USEDLO": "queue_device_lo",
    "Q_USEDHI": "queue_device_hi",
    "Q_NDATA": "queue_notif_config_data",
    "Q_RESET": "queue_reset",
    "ADM_Q_IDX": "admin_queue_index",
    "ADM_Q_NUM": "admin_queue_num",
}
"""The fields of the common configuration structure by Linux' short names."""


def _virtio_ids() -> dict[str, int]:
    headers = {"ENTROPY": "RNG", "NINE_P": "9P"}
    return {headers.get(name, name): n for name, n in _members(abi.DeviceId).items()}


def _members(kind: Iterable[int]) -> dict[str, int]:
    return {member.name: int(member) for member in kind}  # type: ignore[attr-defined]


def _prefixed(prefix: str, members: Mapping[str, int]) -> dict[str, int]:
    return {prefix + name: number for name, number in members.items()}


def _described(kind: type[ctypes.Structure]) -> _Type:
    """The layout of a little-endian structure of `vq.abi`: the same on every processor."""
    offsets = {field[0]: getattr(kind, field[0]).offset for field in kind._fields_}
    return _Type(ctypes.sizeof(kind), ctypes.alignment(kind), offsets)


def _legacy_net_hdr() -> _Type:
    """`struct virtio_net_hdr` ends before num_buffers (virtio 1.3, 5.1.6.1)."""
    modern = _described(abi.VirtioNetHdr)
    offsets = dict(modern.offsets)
    return _Type(offsets.pop("num_buffers"), modern.alignment, offsets)


# --- Linux (include/uapi/linux/if_tun.h, if.h, sockios.h, asm/ioctls.h) --------------------------


def _linux(platform: Platform) -> dict[str, int]:
    long = _scalar(platform.pointer)
    ifmap = _struct(
        mem_start=long, mem_end=long, base_addr=_SHORT, irq=_CHAR, dma=_CHAR, port=_CHAR
    )
    settings = _struct(type=_INT, size=_INT, ifs_ifsu=long)
    request = _union(
        ifru_addr=_SOCKADDR,
        ifru_flags=_SHORT,
        ifru_ivalue=_INT,
        ifru_map=ifmap,
        ifru_slave=_array(_CHAR, _IFNAMSIZ),
        ifru_data=long,
        ifru_settings=settings,
    )
    members = dict.fromkeys(
        ("ifr_hwaddr", "ifr_flags", "ifr_mtu", "ifr_ifindex", "ifr_qlen", "ifr_data"), 0
    )
    structures = {
        "ifreq": _ifreq(request, **members),
        "sockaddr": _SOCKADDR,
        "ethtool_drvinfo": _struct(
            cmd=_INT,
            driver=_array(_CHAR, 32),
            version=_array(_CHAR, 32),
            fw_version=_array(_CHAR, 32),
            bus_info=_array(_CHAR, 32),
            erom_version=_array(_CHAR, 32),
            reserved2=_array(_CHAR, 12),
            n_priv_flags=_INT,
            n_stats=_INT,
            testinfo_len=_INT,
            eedump_len=_INT,
            regdump_len=_INT,
        ),
    }

    def request_number(direction: Direction, number: int, size: int = 4) -> int:
        return ioctl.linux(direction, "T", number, size, platform.processor)

    write, read = Direction.WRITE, Direction.READ
    return {
        "TUNSETIFF": request_number(write, 202),
        "TUNSETPERSIST": request_number(write, 203),
        "TUNSETOWNER": request_number(write, 204),
        "TUNSETLINK": request_number(write, 205),
        "TUNSETGROUP": request_number(write, 206),
        "TUNGETFEATURES": request_number(read, 207),
        "TUNSETOFFLOAD": request_number(write, 208),
        "TUNGETIFF": request_number(read, 210),
        "TUNGETSNDBUF": request_number(read, 211),
        "TUNSETSNDBUF": request_number(write, 212),
        "TUNGETVNETHDRSZ": request_number(read, 215),
        "TUNSETVNETHDRSZ": request_number(write, 216),
        "TUNSETQUEUE": request_number(write, 217),
        "TUNSETIFINDEX": request_number(write, 218),
        "TUNSETVNETLE": request_number(write, 220),
        "TUNGETVNETLE": request_number(read, 221),
        "TUNSETVNETBE": request_number(write, 222),
        "TUNGETVNETBE": request_number(read, 223),
        "TUNSETCARRIER": request_number(write, 226),
        "TUNGETDEVNETNS": request_number(Direction.NONE, 227, 0),
        "IFF_TUN": 1 << 0,
        "IFF_TAP": 1 << 1,
        "IFF_NAPI": 1 << 4,
        "IFF_NAPI_FRAGS": 1 << 5,
        "IFF_NO_CARRIER": 1 << 6,
        "IFF_MULTI_QUEUE": 1 << 8,
        "IFF_ATTACH_QUEUE": 1 << 9,
        "IFF_DETACH_QUEUE": 1 << 10,
        "IFF_PERSIST": 1 << 11,
        "IFF_NO_PI": 1 << 12,
        "IFF_ONE_QUEUE": 1 << 13,
        "IFF_VNET_HDR": 1 << 14,
        "IFF_TUN_EXCL": 1 << 15,
        "TUN_F_CSUM": 1 << 0,
        "TUN_F_TSO4": 1 << 1,
        "TUN_F_TSO6": 1 << 2,
        "TUN_F_TSO_ECN": 1 << 3,
        "TUN_F_UFO": 1 << 4,
        "TUN_F_USO4": 1 << 5,
        "TUN_F_USO6": 1 << 6,
        "TUN_F_UDP_TUNNEL_GSO": 1 << 7,
        "TUN_F_UDP_TUNNEL_GSO_CSUM": 1 << 8,
        "IFNAMSIZ": _IFNAMSIZ,
        "IFF_UP": 1 << 0,
        "IFF_BROADCAST": 1 << 1,
        "IFF_RUNNING": 1 << 6,
        "IFF_PROMISC": 1 << 8,
        "IFF_ALLMULTI": 1 << 9,
        "IFF_MULTICAST": 1 << 12,
        "IFF_LOWER_UP": 1 << 16,
        **{name: 0x8900 + number for name, number in _LINUX_SOCKET_IOCTLS.items()},
        **_linux_by_processor(platform.processor),
        **_linux_system_calls(platform.processor),
        "EFD_SEMAPHORE": 1 << 0,
        "MFD_CLOEXEC": 1 << 0,
        "MFD_ALLOW_SEALING": 1 << 1,
        "MFD_HUGETLB": 1 << 2,
        "F_ADD_SEALS": 1024 + 9,
        "F_GET_SEALS": 1024 + 10,
        "F_SEAL_SEAL": 1 << 0,
        "F_SEAL_SHRINK": 1 << 1,
        "F_SEAL_GROW": 1 << 2,
        "F_SEAL_WRITE": 1 << 3,
        "CAP_DAC_OVERRIDE": 1,
        "CAP_KILL": 5,
        "CAP_SETGID": 6,
        "CAP_SETUID": 7,
        "CAP_SETPCAP": 8,
        "CAP_NET_ADMIN": 12,
        "CAP_SYS_ADMIN": 21,
        "CLONE_THREAD": 1 << 16,
        "CLONE_NEWNS": 1 << 17,
        "CLONE_CHILD_CLEARTID": 1 << 21,
        "CLONE_CHILD_SETTID": 1 << 24,
        "CLONE_NEWCGROUP": 1 << 25,
        "CLONE_NEWUTS": 1 << 26,
        "CLONE_NEWIPC": 1 << 27,
        "CLONE_NEWUSER": 1 << 28,
        "CLONE_NEWNET": 1 << 30,
        "ETHTOOL_GDRVINFO": 3,
        "F_SETSIG": 10,
        "NETLINK_ROUTE": 0,
        "NLM_F_REQUEST": 1,
        "NLM_F_ACK": 4,
        "NLMSG_ERROR": 2,
        "RTM_NEWLINK": 16,
        "RTM_GETLINK": 18,
        "RTM_NEWNSID": 88,
        "RTM_GETNSID": 90,
        "PR_SET_PDEATHSIG": 1,
        "PR_CAPBSET_DROP": 24,
        "PR_CAP_AMBIENT": 47,
        "PR_CAP_AMBIENT_CLEAR_ALL": 4,
        "PR_SET_NO_NEW_PRIVS": 38,
        "PR_GET_NO_NEW_PRIVS": 39,
        "PR_GET_SECCOMP": 21,
        "PR_SET_SECCOMP": 22,
        "SECCOMP_MODE_FILTER": 2,
        "SECCOMP_GET_ACTION_AVAIL": 2,
        "SECCOMP_RET_KILL_PROCESS": 0x80000000,
        "SECCOMP_RET_ERRNO": 0x00050000,
        "SECCOMP_RET_ALLOW": 0x7FFF0000,
        "AUDIT_ARCH_X86_64": 0xC000003E,
        "AUDIT_ARCH_AARCH64": 0xC00000B7,
        "AUDIT_ARCH_RISCV64": 0xC00000F3,
        "LANDLOCK_CREATE_RULESET_VERSION": 1 << 0,
        "FALLOC_FL_KEEP_SIZE": 1 << 0,
        "FALLOC_FL_PUNCH_HOLE": 1 << 1,
        "FALLOC_FL_ZERO_RANGE": 1 << 4,
        "IOV_MAX": 1024,
        "VHOST_F_LOG_ALL": 26,
        "VHOST_VRING_F_LOG": 0,
        **_layout(structures),
        **_virtio(),
    }


_LINUX_SOCKET_IOCTLS = {
    "SIOCGIFFLAGS": 0x13,
    "SIOCSIFFLAGS": 0x14,
    "SIOCGIFMTU": 0x21,
    "SIOCSIFMTU": 0x22,
    "SIOCSIFHWADDR": 0x24,
    "SIOCGIFHWADDR": 0x27,
    "SIOCGIFINDEX": 0x33,
    "SIOCGIFTXQLEN": 0x42,
    "SIOCSIFTXQLEN": 0x43,
    "SIOCETHTOOL": 0x46,
    "SIOCBRADDBR": 0xA0,
    "SIOCBRDELBR": 0xA1,
    "SIOCBRADDIF": 0xA2,
    "SIOCBRDELIF": 0xA3,
}
"""Numbered without direction and size, as before ioctls had them; the same on all processors."""


def _linux_by_processor(processor: str) -> dict[str, int]:
    """What a few processors inherited from older Unix systems on the same hardware."""
    fionread, fionbio, fioclex, nonblock, landlock = 0x541B, 0x5421, 0x5451, 0o4000, 444
    if processor.startswith("mips"):
        fionread, fionbio, fioclex, nonblock = 0x467F, 0x667E, 0x6601, 0o200
        landlock += 5000 if processor.startswith("mips64") else 4000
    elif processor.startswith(("powerpc", "ppc")):
        fionread = ioctl.linux(Direction.READ, "f", 127, 4, processor)
        fionbio = ioctl.linux(Direction.WRITE, "f", 126, 4, processor)
        fioclex = ioctl.linux(Direction.NONE, "f", 1, 0, processor)
    return {
        "FIONREAD": fionread,
        "FIONBIO": fionbio,
        "FIOCLEX": fioclex,
        "O_NONBLOCK": nonblock,
        "O_CLOEXEC": 0o2000000,
        "EFD_NONBLOCK": nonblock,
        "EFD_CLOEXEC": 0o2000000,
        "__NR_landlock_create_ruleset": landlock,
        "__NR_landlock_add_rule": landlock + 1,
        "__NR_landlock_restrict_self": landlock + 2,
    }


def _linux_system_calls(processor: str) -> dict[str, int]:
    """Those that filters are written with, for the processors that there are filters for."""
    if processor not in system_calls.ARCHITECTURES:
        return {}
    named = ((name, system_calls.number_of(name, processor)) for name in system_calls.names())
    return {f"__NR_{name}": number for name, number in named if number is not None}


# --- OpenBSD (sys/net/if_tun.h, net/if.h, sys/sockio.h, sys/filio.h) -----------------------------


def _openbsd(platform: Platform) -> dict[str, int]:
    pointer = _scalar(platform.pointer)
    request = _union(
        ifru_addr=_SOCKADDR,
        ifru_flags=_SHORT,
        ifru_metric=_INT,
        ifru_vnetid=_U64,
        ifru_media=_U64,
        ifru_data=pointer,
        ifru_index=_INT,
    )
    members = dict.fromkeys(("ifr_flags", "ifr_mtu", "ifr_hardmtu", "ifr_data", "ifr_index"), 0)
    structures = {
        "tun_hdr": _struct(th_flags=_SHORT, th_pad=_SHORT, th_vtag=_SHORT, th_mss=_SHORT),
        "tun_capabilities": _struct(tun_if_capabilities=_INT),
        "tuninfo": _struct(mtu=_INT, type=_SHORT, flags=_SHORT, baudrate=_INT),
        "ifreq": _ifreq(request, **members),
        "sockaddr": _SOCKADDR._replace(alignment=1),
    }
    capabilities = structures["tun_capabilities"].size
    info = structures["tuninfo"].size
    return {
        "TUNSCAP": ioctl.bsd(Direction.WRITE, "t", 196, capabilities),
        "TUNGCAP": ioctl.bsd(Direction.READ, "t", 196, capabilities),
        "TUNDCAP": ioctl.bsd(Direction.NONE, "t", 196, 0),
        "TUNSIFINFO": ioctl.bsd(Direction.WRITE, "t", 91, info),
        "TUNGIFINFO": ioctl.bsd(Direction.READ, "t", 92, info),
        "TUNSIFMODE": ioctl.bsd(Direction.WRITE, "t", 93, 4),
        "TUNSDEBUG": ioctl.bsd(Direction.WRITE, "t", 94, 4),
        "TUNGDEBUG": ioctl.bsd(Direction.READ, "t", 95, 4),
        "TUNMTU": 3000,
        "TUNMRU": 16384,
        "TUN_H_PRIO_MASK": 0x7,
        "TUN_H_VTAG": 1 << 4,
        "TUN_H_TCP_MSS": 1 << 5,
        "TUN_H_IPV4_CSUM": 1 << 8,
        "TUN_H_TCP_CSUM": 1 << 9,
        "TUN_H_UDP_CSUM": 1 << 10,
        "TUN_H_ICMP_CSUM": 1 << 11,
        "IFCAP_CSUM_IPv4": 1 << 0,
        "IFCAP_CSUM_TCPv4": 1 << 1,
        "IFCAP_CSUM_UDPv4": 1 << 2,
        "IFCAP_VLAN_MTU": 1 << 4,
        "IFCAP_VLAN_HWTAGGING": 1 << 5,
        "IFCAP_VLAN_HWOFFLOAD": 1 << 6,
        "IFCAP_CSUM_TCPv6": 1 << 7,
        "IFCAP_CSUM_UDPv6": 1 << 8,
        "IFCAP_TSOv4": 1 << 12,
        "IFCAP_TSOv6": 1 << 13,
        "IFCAP_LRO": 1 << 14,
        "IFCAP_WOL": 1 << 15,
        "LINK_STATE_UNKNOWN": 0,
        "LINK_STATE_DOWN": 2,
        "LINK_STATE_UP": 4,
        "LINK_STATE_FULL_DUPLEX": 6,
        "SIOCGIFMTU": _bsd_ifreq(Direction.READ_WRITE, 126, structures),
        "SIOCSIFMTU": _bsd_ifreq(Direction.WRITE, 127, structures),
        "SIOCSIFLLADDR": _bsd_ifreq(Direction.WRITE, 31, structures),
        "SIOCGIFDATA": _bsd_ifreq(Direction.READ_WRITE, 27, structures),
        "SIOCIFCREATE": _bsd_ifreq(Direction.WRITE, 122, structures),
        **_bsd_common(structures),
        "MSG_CMSG_CLOEXEC": 0x800,
    }


# --- FreeBSD (sys/net/if_tap.h, if_tun.h, if.h, sys/sockio.h, sys/filio.h, sys/mman.h) -----------


def _freebsd(platform: Platform) -> dict[str, int]:
    pointer = _scalar(platform.pointer)
    request = _union(
        ifru_addr=_SOCKADDR,
        ifru_buffer=_struct(length=pointer, buffer=pointer),
        ifru_flags=_array(_SHORT, 2),
        ifru_mtu=_INT,
        ifru_data=pointer,
        ifru_cap=_array(_INT, 2),
        ifru_nv=_struct(buf_length=_INT, length=_INT, buffer=pointer),
    )
    members = dict.fromkeys(("ifr_flags", "ifr_mtu", "ifr_data", "ifr_reqcap", "ifr_index"), 0)
    within = {**members, "ifr_flagshigh": _SHORT.size, "ifr_curcap": _INT.size}
    structures = {
        "ifreq": _ifreq(request, **within),
        "sockaddr": _SOCKADDR._replace(alignment=1),
        "tuninfo": _struct(baudrate=_INT, mtu=_SHORT, type=_CHAR, dummy=_CHAR),
    }
    info = structures["tuninfo"].size
    return {
        "TAPSVNETHDR": ioctl.bsd(Direction.WRITE, "t", 91, 4),
        "TAPGVNETHDR": ioctl.bsd(Direction.READ, "t", 94, 4),
        "TAPSDEBUG": ioctl.bsd(Direction.WRITE, "t", 90, 4),
        "TAPGDEBUG": ioctl.bsd(Direction.READ, "t", 89, 4),
        "TAPSIFINFO": ioctl.bsd(Direction.WRITE, "t", 91, info),
        "TAPGIFINFO": ioctl.bsd(Direction.READ, "t", 92, info),
        "TAPGIFNAME": ioctl.bsd(Direction.READ, "t", 93, structures["ifreq"].size),
        "TAPSTRANSIENT": ioctl.bsd(Direction.WRITE, "t", 98, 4),
        "TAPGTRANSIENT": ioctl.bsd(Direction.READ, "t", 99, 4),
        "TAPMRU": 65535,
        "CAP_READ": 1 << 57 | 0x1,
        "CAP_WRITE": 1 << 57 | 0x2,
        "CAP_FCNTL": 1 << 57 | 0x8000,
        "CAP_EVENT": 1 << 58 | 0x20,
        "IFCAP_RXCSUM": 1 << 0,
        "IFCAP_TXCSUM": 1 << 1,
        "IFCAP_VLAN_MTU": 1 << 3,
        "IFCAP_VLAN_HWTAGGING": 1 << 4,
        "IFCAP_VLAN_HWCSUM": 1 << 7,
        "IFCAP_TSO4": 1 << 8,
        "IFCAP_TSO6": 1 << 9,
        "IFCAP_LRO": 1 << 10,
        "IFCAP_VLAN_HWTSO": 1 << 18,
        "IFCAP_LINKSTATE": 1 << 19,
        "IFCAP_RXCSUM_IPV6": 1 << 21,
        "IFCAP_TXCSUM_IPV6": 1 << 22,
        "LINK_STATE_UNKNOWN": 0,
        "LINK_STATE_DOWN": 1,
        "LINK_STATE_UP": 2,
        "SIOCSIFCAP": _bsd_ifreq(Direction.WRITE, 30, structures),
        "SIOCGIFCAP": _bsd_ifreq(Direction.READ_WRITE, 31, structures),
        "SIOCGIFMTU": _bsd_ifreq(Direction.READ_WRITE, 51, structures),
        "SIOCSIFMTU": _bsd_ifreq(Direction.WRITE, 52, structures),
        "SIOCSIFNAME": _bsd_ifreq(Direction.WRITE, 40, structures),
        "SIOCGIFDATA": _bsd_ifreq(Direction.WRITE, 44, structures),
        "SIOCSIFLLADDR": _bsd_ifreq(Direction.WRITE, 60, structures),
        "SIOCIFCREATE": _bsd_ifreq(Direction.READ_WRITE, 122, structures),
        **_bsd_common(structures),
        "EFD_SEMAPHORE": 1 << 0,
        "EFD_NONBLOCK": 1 << 2,
        "EFD_CLOEXEC": 1 << 20,
        "MFD_CLOEXEC": 1 << 0,
        "MFD_ALLOW_SEALING": 1 << 1,
        "MFD_HUGETLB": 1 << 2,
        "MSG_CMSG_CLOEXEC": 0x40000,
    }


# --- what OpenBSD and FreeBSD share --------------------------------------------------------------


def _bsd_common(structures: Mapping[str, _Type]) -> dict[str, int]:
    return {
        "IFNAMSIZ": _IFNAMSIZ,
        "IFF_UP": 1 << 0,
        "IFF_BROADCAST": 1 << 1,
        "IFF_POINTOPOINT": 1 << 4,
        "IFF_RUNNING": 1 << 6,
        "IFF_PROMISC": 1 << 8,
        "IFF_ALLMULTI": 1 << 9,
        "IFF_SIMPLEX": 1 << 11,
        "IFF_LINK0": 1 << 12,
        "IFF_LINK1": 1 << 13,
        "IFF_LINK2": 1 << 14,
        "IFF_MULTICAST": 1 << 15,
        "SIOCSIFFLAGS": _bsd_ifreq(Direction.WRITE, 16, structures),
        "SIOCGIFFLAGS": _bsd_ifreq(Direction.READ_WRITE, 17, structures),
        "SIOCIFDESTROY": _bsd_ifreq(Direction.WRITE, 121, structures),
        "FIONREAD": ioctl.bsd(Direction.READ, "f", 127, 4),
        "FIONBIO": ioctl.bsd(Direction.WRITE, "f", 126, 4),
        "IOV_MAX": 1024,
        "O_NONBLOCK": 1 << 2,
        "IOC_VOID": ioctl.bsd(Direction.NONE, 0, 0, 0),
        "IOC_OUT": ioctl.bsd(Direction.READ, 0, 0, 0),
        "IOC_IN": ioctl.bsd(Direction.WRITE, 0, 0, 0),
        "IOCPARM_MASK": 0x1FFF,
        **_layout(structures),
    }


def _bsd_ifreq(direction: Direction, number: int, structures: Mapping[str, _Type]) -> int:
    return ioctl.bsd(direction, "i", number, structures["ifreq"].size)


_RULES: dict[str, Callable[[Platform], dict[str, int]]] = {
    "linux": _linux,
    "openbsd": _openbsd,
    "freebsd": _freebsd,
}
