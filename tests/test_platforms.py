"""The numbers of the systems' headers: golden ones, rules against ctypes, vq's own constants."""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import pkgutil
import re
import termios
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vq
from vq import offload, platforms, tap_bsd, tap_linux, tun_hdr, vhost_message

TABLES = {platform.name: platforms.numbers(platform) for platform in platforms.KNOWN}
LINUX = [name for name in TABLES if name.startswith("linux")]
GENERIC = ["linux-x86_64", "linux-aarch64", "linux-riscv64", "linux-s390x"]
ODD = ["linux-powerpc64le", "linux-mips"]
OPENBSD = ["openbsd-x86_64", "openbsd-aarch64"]
FREEBSD = ["freebsd-x86_64", "freebsd-aarch64"]


def test_these_are_the_platforms():
    assert list(TABLES) == [
        "linux-x86_64",
        "linux-aarch64",
        "linux-riscv64",
        "linux-powerpc64le",
        "linux-mips",
        "linux-s390x",
        *OPENBSD,
        *FREEBSD,
    ]


@pytest.mark.parametrize(
    ("names", "golden"),
    [
        (
            GENERIC,
            {
                "TUNSETIFF": 0x400454CA,
                "TUNSETPERSIST": 0x400454CB,
                "TUNGETFEATURES": 0x800454CF,
                "TUNSETOFFLOAD": 0x400454D0,
                "TUNGETIFF": 0x800454D2,
                "TUNGETVNETHDRSZ": 0x800454D7,
                "TUNSETVNETHDRSZ": 0x400454D8,
                "TUNSETQUEUE": 0x400454D9,
                "TUNSETVNETLE": 0x400454DC,
                "TUNGETVNETLE": 0x800454DD,
                "TUNSETCARRIER": 0x400454E2,
                "FIONREAD": 0x541B,
                "sizeof(ifreq)": 40,
            },
        ),
        (
            ODD,
            {
                "TUNSETIFF": 0x800454CA,
                "TUNGETFEATURES": 0x400454CF,
                "TUNSETOFFLOAD": 0x800454D0,
                "TUNGETDEVNETNS": 0x200054E3,
            },
        ),
        (["linux-powerpc64le"], {"FIONREAD": 0x4004667F, "EFD_NONBLOCK": 0o4000}),
        (["linux-mips"], {"FIONREAD": 0x467F, "EFD_NONBLOCK": 0o200, "sizeof(ifreq)": 32}),
        (
            LINUX,
            {
                "IFF_TAP": 2,
                "IFF_NO_PI": 0x1000,
                "IFF_VNET_HDR": 0x4000,
                "IFF_MULTI_QUEUE": 0x100,
                "IFF_TUN_EXCL": 0x8000,
                "TUN_F_CSUM": 1,
                "TUN_F_TSO4": 2,
                "TUN_F_TSO6": 4,
                "TUN_F_TSO_ECN": 8,
                "TUN_F_UFO": 0x10,
                "TUN_F_USO4": 0x20,
                "TUN_F_USO6": 0x40,
                "TUN_F_UDP_TUNNEL_GSO": 0x80,
                "TUN_F_UDP_TUNNEL_GSO_CSUM": 0x100,
                "SIOCGIFMTU": 0x8921,
                "IFNAMSIZ": 16,
                "VIRTIO_NET_F_HOST_USO": 56,
                "VIRTIO_RING_F_EVENT_IDX": 29,
                "VIRTIO_F_VERSION_1": 32,
                "VIRTIO_ID_RNG": 4,
                "VIRTIO_ID_9P": 9,
                "VIRTIO_NET_HDR_GSO_ECN": 0x80,
                "VIRTIO_NET_CTRL_MAC_ADDR_SET": 1,
                "VRING_DESC_F_INDIRECT": 4,
                "sizeof(virtio_net_hdr)": 10,
                "sizeof(virtio_net_hdr_v1)": 12,
                "offsetof(virtio_net_hdr, csum_start)": 6,
                "offsetof(virtio_net_hdr_v1, num_buffers)": 10,
                "sizeof(vring_desc)": 16,
                "offsetof(vring_desc, next)": 14,
                "sizeof(virtio_net_config)": 24,
                "offsetof(ifreq, ifr_mtu)": 16,
            },
        ),
        (
            OPENBSD,
            {
                "TUNSCAP": 0x800474C4,
                "TUNGCAP": 0x400474C4,
                "TUNDCAP": 0x200074C4,
                "TUNSIFINFO": 0x800C745B,
                "TUNGIFINFO": 0x400C745C,
                "sizeof(tun_capabilities)": 4,
                "sizeof(tun_hdr)": 8,
                "offsetof(tun_hdr, th_mss)": 6,
                "TUN_H_PRIO_MASK": 0x7,
                "TUN_H_VTAG": 0x10,
                "TUN_H_TCP_MSS": 0x20,
                "TUN_H_IPV4_CSUM": 0x100,
                "TUN_H_TCP_CSUM": 0x200,
                "TUN_H_UDP_CSUM": 0x400,
                "TUN_H_ICMP_CSUM": 0x800,
                "IFCAP_CSUM_IPv4": 0x1,
                "IFCAP_CSUM_TCPv4": 0x2,
                "IFCAP_CSUM_UDPv4": 0x4,
                "IFCAP_VLAN_MTU": 0x10,
                "IFCAP_VLAN_HWTAGGING": 0x20,
                "IFCAP_VLAN_HWOFFLOAD": 0x40,
                "IFCAP_CSUM_TCPv6": 0x80,
                "IFCAP_CSUM_UDPv6": 0x100,
                "IFCAP_TSOv4": 0x1000,
                "IFCAP_TSOv6": 0x2000,
                "IFCAP_LRO": 0x4000,
                "TUNMRU": 16384,
                "IOC_VOID": 0x20000000,
                "IOC_OUT": 0x40000000,
                "IOC_IN": 0x80000000,
                "IOCPARM_MASK": 0x1FFF,
                "FIONREAD": 0x4004667F,
            },
        ),
        (
            FREEBSD,
            {
                "TAPSVNETHDR": 0x8004745B,
                "TAPGVNETHDR": 0x4004745E,
                "SIOCSIFCAP": 0x8020691E,
                "SIOCGIFCAP": 0xC020691F,
                "sizeof(ifreq)": 32,
                "IFCAP_RXCSUM": 0x1,
                "IFCAP_TXCSUM": 0x2,
                "IFCAP_VLAN_HWTAGGING": 0x10,
                "IFCAP_TSO4": 0x100,
                "IFCAP_TSO6": 0x200,
                "IFCAP_LRO": 0x400,
                "IFCAP_RXCSUM_IPV6": 0x200000,
                "IFCAP_TXCSUM_IPV6": 0x400000,
                "offsetof(ifreq, ifr_curcap)": 20,
            },
        ),
    ],
)
def test_golden_numbers(names, golden):
    for name in names:
        assert {entry: TABLES[name].get(entry) for entry in golden} == golden, name


def test_platforms_of_one_system_have_the_same_names():
    for names in (LINUX, OPENBSD, FREEBSD):
        shared = [
            tuple(entry for entry in TABLES[name] if not entry.startswith("__NR_"))
            for name in names
        ]
        assert set(shared) == {shared[0]}


def test_this_hosts_numbers_are_those_that_python_was_compiled_with():
    here = platforms.numbers(platforms.host())
    if not here:
        pytest.skip(f"no numbers are known for {platforms.host().name}")
    compiled: dict[str, int] = {"FIONREAD": termios.FIONREAD}
    for module in (os, fcntl):
        for name in here:
            if isinstance(getattr(module, name, None), int):
                compiled[name] = getattr(module, name)
    assert len(compiled) > 2
    assert compiled == {name: here[name] for name in compiled}


# --- the rules -----------------------------------------------------------------------------------

SCALARS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}

fields = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.one_of(st.none(), st.integers(1, 9))),
    min_size=1,
    max_size=8,
)


@pytest.mark.skipif(ctypes.alignment(ctypes.c_uint64) != 8, reason="u64 is aligned otherwise here")
@given(fields, st.booleans())
def test_structures_and_unions_are_laid_out_as_the_c_compiler_does(members, union):
    ours, theirs = {}, []
    for number, (size, count) in enumerate(members):
        kind = platforms._scalar(size)
        ours[f"f{number}"] = kind if count is None else platforms._array(kind, count)
        element = SCALARS[size]
        theirs.append((f"f{number}", element if count is None else element * count))
    base = ctypes.Union if union else ctypes.Structure
    reference = type("Reference", (base,), {"_fields_": theirs})
    layout = (platforms._union if union else platforms._struct)(**ours)
    assert layout.size == ctypes.sizeof(reference)
    assert layout.alignment == ctypes.alignment(reference)
    assert layout.offsets == {name: getattr(reference, name).offset for name in ours}


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("OpenBSD", "amd64", "openbsd-x86_64"),
        ("OpenBSD", "arm64", "openbsd-aarch64"),
        ("FreeBSD", "amd64", "freebsd-x86_64"),
        ("Linux", "ppc64le", "linux-powerpc64le"),
        ("Linux", "mips", "linux-mips"),
    ],
)
def test_a_host_is_named_as_its_platform(monkeypatch, system, machine, name):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system, machine=machine))
    assert platforms.host().name == name
    assert name in TABLES


def test_a_processor_that_is_not_listed_has_numbers_all_the_same(monkeypatch):
    uname = SimpleNamespace(sysname="Linux", machine="loongarch64")
    monkeypatch.setattr(os, "uname", lambda: uname)
    everything = platforms.all_numbers()
    assert everything["linux-loongarch64"]["TUNSETIFF"] == 0x400454CA
    assert set(everything) == {*TABLES, "linux-loongarch64"}


def test_another_system_has_no_numbers():
    assert platforms.numbers(platforms.Platform("plan9", "x86_64")) == {}


# --- no number stands twice unguarded ------------------------------------------------------------

HEADER_NAME = re.compile(
    r"(TUN[SGD]|TUN_[FH]_(?!ALL)|TUNM|TAP[SG]|TAPMRU|IFF_|IFCAP_|IFNAMSIZ|SIOC|FIO|IOV_MAX"
    r"|ETHTOOL_|CLONE_|LINK_STATE_|PR_|EFD_|MFD_|VHOST_F_|LANDLOCK_|CAP_|SECCOMP_|F_SETSIG|NLM_|NLMSG_"
    r"|NETLINK_|RTM_)"
)
"""What a constant of a system's headers looks like."""


def modules() -> list[str]:
    names = (found.name for found in pkgutil.walk_packages(vq.__path__, "vq."))
    return [name for name in names if not name.endswith("__main__")]


def constants(module_name: str) -> list[tuple[str, int]]:
    """The whole numbers of a module that have the headers' names, those in its classes too."""
    module = importlib.import_module(module_name)
    spaces = [vars(module)] + [
        vars(value)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module_name
    ]
    return [
        (name.lstrip("_"), int(value))
        for space in spaces
        for name, value in space.items()
        if isinstance(value, int) and HEADER_NAME.match(name.lstrip("_"))
    ]


@pytest.mark.parametrize("module_name", modules())
def test_a_constant_with_a_headers_name_has_the_headers_number(module_name):
    here = platforms.host()
    linux = here if here.system == "linux" else platforms.KNOWN[0]
    tables = [TABLES[OPENBSD[0]], TABLES[FREEBSD[0]]]
    if module_name == "vq.tap_linux":
        tables = [platforms.numbers(linux)]
    elif module_name != "vq.tap_bsd":
        tables.append(platforms.numbers(linux))
    for name, number in constants(module_name):
        known = {table[name] for table in tables if name in table}
        assert number in known, f"{module_name}.{name} is {number:#x}"


def test_the_taps_constants_are_among_those_looked_at():
    assert len(constants("vq.tap_linux")) > 15
    assert len(constants("vq.tap_bsd")) > 8


@pytest.mark.parametrize(
    ("kind", "prefix", "names"),
    [
        (offload.TunF, "TUN_F_", LINUX),
        (offload.OpenBsdCap, "IFCAP_", OPENBSD),
        (offload.FreeBsdCap, "IFCAP_", FREEBSD),
        (tun_hdr.TunFlag, "TUN_H_", OPENBSD),
    ],
)
def test_the_vocabularies_are_the_systems_own(kind, prefix, names):
    used = {prefix + member.name: int(member) for member in kind}
    for name in names:
        assert used == {entry: TABLES[name].get(entry) for entry in used}


def test_vhost_users_numbers_are_the_kernels_vhost():
    for name in LINUX:
        assert TABLES[name]["VHOST_F_LOG_ALL"] == vhost_message.VhostFeature.LOG_ALL
        assert 1 << TABLES[name]["VHOST_VRING_F_LOG"] == vhost_message.VringFlag.LOG


def test_the_taps_structures_are_as_long_as_the_headers():
    openbsd, freebsd = TABLES[OPENBSD[0]], TABLES[FREEBSD[0]]
    assert tun_hdr.TUN_HDR.size == tun_hdr.TUN_HDR_SIZE == openbsd["sizeof(tun_hdr)"]
    assert ctypes.sizeof(tun_hdr.TunHdr) == openbsd["sizeof(tun_hdr)"]
    for name, _ in tun_hdr.TunHdr._fields_:
        assert getattr(tun_hdr.TunHdr, name).offset == openbsd[f"offsetof(tun_hdr, {name})"]
    assert tap_bsd.TUN_CAPABILITIES.size == openbsd["sizeof(tun_capabilities)"]
    assert tap_bsd.OPENBSD_TUNINFO.size == openbsd["sizeof(tuninfo)"]
    assert tap_bsd.FREEBSD_TUNINFO.size == freebsd["sizeof(tuninfo)"]
    assert tap_bsd.IFREQ_CAP.size == freebsd["sizeof(ifreq)"]
    here = platforms.host()
    if here.system == "linux":
        linux = platforms.numbers(here)
        for layout in (tap_linux.IFREQ, tap_linux.IFREQ_INT, tap_linux.IFREQ_POINTER):
            assert layout.size == linux["sizeof(ifreq)"]
        assert tap_linux.DRVINFO.size == linux["sizeof(ethtool_drvinfo)"]
