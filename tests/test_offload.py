"""The translations of `vq.offload`, held against golden bits, the rules, and this kernel."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vq.offload
from vq.abi import NetFeature, feature_mask
from vq.errors import UsageError
from vq.ioctl import Direction, bsd, linux
from vq.offload import (
    ALL,
    FreeBsdCap,
    Offload,
    OpenBsdCap,
    TunF,
    features_for_guest,
    features_for_host,
    freebsd_offloads,
    guest_offloads,
    host_offloads,
    ifcap_for_freebsd,
    ifcap_for_openbsd,
    legal_tun_flags,
    normalise,
    openbsd_offloads,
    tun_flags_for,
    tun_offloads,
)

SETS = st.integers(0, int(ALL)).map(Offload)
LEGAL = [s for s in map(Offload, range(int(ALL) + 1)) if normalise(s) == s]


@given(SETS)
def test_nothing_goes_without_csum_and_ecn_not_without_tso(offloads: Offload) -> None:
    kept = normalise(offloads)
    assert kept & ~offloads == Offload.NONE
    assert normalise(kept) == kept
    if Offload.CSUM not in offloads:
        assert kept == Offload.NONE
    elif not offloads & (Offload.TSO4 | Offload.TSO6):
        assert kept == offloads & ~Offload.ECN
    else:
        assert kept == offloads


def test_bits_beyond_the_vocabulary_are_left_out() -> None:
    assert normalise(Offload(0x41)) == Offload.CSUM


@pytest.mark.parametrize(
    ("feature", "offload"),
    [
        (NetFeature.HOST_TSO4, Offload.TSO4),
        (NetFeature.HOST_TSO6, Offload.TSO6),
        (NetFeature.HOST_USO, Offload.USO4 | Offload.USO6),
    ],
)
def test_host_features_say_what_the_guest_may_leave_undone(
    feature: NetFeature, offload: Offload
) -> None:
    features = feature_mask([NetFeature.CSUM, feature])
    assert host_offloads(features) == Offload.CSUM | offload
    assert features_for_host(Offload.CSUM | offload) == features
    assert host_offloads(1 << feature) == Offload.NONE  # virtio 1.3, 5.1.3.1: needs CSUM
    assert guest_offloads(features) == Offload.NONE


@pytest.mark.parametrize(
    ("feature", "offload"),
    [
        (NetFeature.GUEST_TSO4, Offload.TSO4),
        (NetFeature.GUEST_TSO6, Offload.TSO6),
        (NetFeature.GUEST_USO4, Offload.USO4),
        (NetFeature.GUEST_USO6, Offload.USO6),
    ],
)
def test_guest_features_say_what_the_guest_takes_undone(
    feature: NetFeature, offload: Offload
) -> None:
    features = feature_mask([NetFeature.GUEST_CSUM, feature])
    assert guest_offloads(features) == Offload.CSUM | offload
    assert features_for_guest(Offload.CSUM | offload) == features
    assert guest_offloads(1 << feature) == Offload.NONE
    assert host_offloads(features) == Offload.NONE


def test_ecn_is_told_apart_for_host_and_guest() -> None:
    tso = Offload.CSUM | Offload.TSO4
    assert features_for_host(tso | Offload.ECN) == 1 << 0 | 1 << 11 | 1 << 13
    assert features_for_guest(tso | Offload.ECN) == 1 << 1 | 1 << 7 | 1 << 9
    assert guest_offloads(1 << 1 | 1 << 9) == Offload.CSUM


def test_the_whole_vocabulary_in_golden_feature_bits() -> None:
    assert features_for_host(ALL) == 0x0100_0000_0000_3801
    assert features_for_guest(ALL) == 0x00C0_0000_0000_0382


def test_half_of_uso_is_not_promised_to_a_guest_that_could_send_both() -> None:
    assert features_for_host(Offload.CSUM | Offload.USO4) == 1 << NetFeature.CSUM


def test_ufo_and_what_is_no_offload_mean_nothing() -> None:
    every_other = ~(features_for_host(ALL) | features_for_guest(ALL)) & (1 << 70) - 1
    assert host_offloads(every_other | 1) == Offload.CSUM
    assert guest_offloads(every_other | 2) == Offload.CSUM


@given(st.integers(0, (1 << 70) - 1))
def test_features_never_round_up(features: int) -> None:
    assert features_for_host(host_offloads(features)) & ~features == 0
    assert features_for_guest(guest_offloads(features)) & ~features == 0


@pytest.mark.parametrize("offloads", LEGAL)
def test_every_legal_set_comes_back_from_the_guests_features(offloads: Offload) -> None:
    assert guest_offloads(features_for_guest(offloads)) == offloads


# --- Linux ---


def judge(flags: int) -> bool:
    """The rules of drivers/net/tun.c as sentences, written a second time."""
    f = TunF(flags)
    if not f:
        return True
    if TunF.CSUM not in f:
        return False
    if TunF.TSO_ECN in f and not f & (TunF.TSO4 | TunF.TSO6):
        return False
    return (TunF.USO4 in f) == (TunF.USO6 in f)


def subsets(flags: int) -> list[int]:
    bits = [1 << i for i in range(flags.bit_length()) if flags >> i & 1]
    return [sum(c) for n in range(len(bits) + 1) for c in itertools.combinations(bits, n)]


@pytest.mark.parametrize("flags", range(128))
def test_the_largest_legal_part_of_a_set_of_tun_flags(flags: int) -> None:
    legal = [s for s in subsets(flags) if judge(s)]
    largest = max(legal, key=int.bit_count)
    assert [s for s in legal if s.bit_count() == largest.bit_count()] == [largest]
    assert legal_tun_flags(flags) == largest


def test_flags_that_the_kernel_does_not_know_are_not_asked_for() -> None:
    assert tun_flags_for(ALL, 0xF) == TunF.CSUM | TunF.TSO4 | TunF.TSO6 | TunF.TSO_ECN
    assert tun_flags_for(ALL, TunF.CSUM | TunF.TSO_ECN | TunF.USO4) == TunF.CSUM
    assert tun_flags_for(ALL, 0) == 0
    assert tun_flags_for(ALL) == 0x6F
    assert legal_tun_flags(0x181) == TunF.CSUM  # tunnels have no name here


@pytest.mark.parametrize("offloads", LEGAL)
def test_tun_flags_come_back_as_the_same_offloads(offloads: Offload) -> None:
    uso = Offload.USO4 | Offload.USO6
    expected = offloads if offloads & uso in (uso, Offload.NONE) else offloads & ~uso
    assert tun_offloads(tun_flags_for(offloads)) == expected


# --- the BSDs ---


def test_openbsd_capabilities_in_golden_bits() -> None:
    assert ifcap_for_openbsd(Offload.NONE) == 0
    assert ifcap_for_openbsd(Offload.CSUM) == 0x186
    assert ifcap_for_openbsd(Offload.CSUM | Offload.TSO4) == 0x1186
    assert ifcap_for_openbsd(ALL) == 0x3186
    assert ifcap_for_openbsd(ALL) & ~0x71F7 == 0  # what TUNSCAP accepts
    assert sum(OpenBsdCap) == 0x71F7


def test_openbsd_must_have_all_four_checksums_for_csum() -> None:
    assert openbsd_offloads(0x3186) == Offload.CSUM | Offload.TSO4 | Offload.TSO6
    for missing in (0x2, 0x4, 0x80, 0x100):
        assert openbsd_offloads(0x3186 & ~missing) == Offload.NONE


def test_freebsd_capabilities_in_golden_bits() -> None:
    assert ifcap_for_freebsd(Offload.CSUM) == 0x400002
    assert ifcap_for_freebsd(ALL) == 0x400302
    assert freebsd_offloads(0x400302) == Offload.CSUM | Offload.TSO4 | Offload.TSO6
    assert freebsd_offloads(0x302) == Offload.NONE  # IPv6 checksums are missing
    assert freebsd_offloads(FreeBsdCap.RXCSUM | FreeBsdCap.RXCSUM_IPV6) == Offload.NONE


@given(SETS)
def test_the_bsds_never_round_up(offloads: Offload) -> None:
    for back in (
        openbsd_offloads(ifcap_for_openbsd(offloads)),
        freebsd_offloads(ifcap_for_freebsd(offloads)),
    ):
        assert back & ~offloads == Offload.NONE
        assert back == normalise(offloads) & (Offload.CSUM | Offload.TSO4 | Offload.TSO6)


# --- ioctl numbers ---


@pytest.mark.parametrize(
    ("machine", "number"),
    [
        ("x86_64", 0x400454D0),
        ("aarch64", 0x400454D0),
        ("armv7l", 0x400454D0),
        ("riscv64", 0x400454D0),
        ("s390x", 0x400454D0),
        ("loongarch64", 0x400454D0),
        ("ppc64le", 0x800454D0),
        ("powerpc64le", 0x800454D0),
        ("mips", 0x800454D0),
        ("mips64", 0x800454D0),
        ("sparc64", 0x800454D0),
        ("alpha", 0x800454D0),
        ("parisc64", 0x800454D0),
    ],
)
def test_tunsetoffload_on_every_processor(machine: str, number: int) -> None:
    assert linux(Direction.WRITE, "T", 208, 4, machine) == number


def test_directions_of_linux_where_they_differ() -> None:
    assert linux(Direction.READ, "T", 207, 4, "x86_64") == 0x800454CF
    assert linux(Direction.READ, "T", 207, 4, "mips") == 0x400454CF
    assert linux(Direction.READ, "T", 207, 4, "parisc") == 0x400454CF
    assert linux(Direction.NONE, "T", 227, 0, "x86_64") == 0x54E3
    assert linux(Direction.NONE, "T", 227, 0, "ppc64") == 0x200054E3
    assert linux(Direction.READ_WRITE, 0xAA, 63, 24, "x86_64") == 0xC018AA3F
    assert linux(Direction.READ_WRITE, 0xAA, 63, 24, "mips") == 0xC018AA3F


def test_ioctls_of_the_bsds_in_golden_numbers() -> None:
    assert bsd(Direction.WRITE, "t", 196, 4) == 0x800474C4  # TUNSCAP
    assert bsd(Direction.READ, "t", 196, 4) == 0x400474C4  # TUNGCAP
    assert bsd(Direction.NONE, "t", 196, 0) == 0x200074C4  # TUNDCAP
    assert bsd(Direction.WRITE, "t", 91, 12) == 0x800C745B  # TUNSIFINFO
    assert bsd(Direction.READ_WRITE, "i", 31, 32) == 0xC020691F  # FreeBSD's SIOCGIFCAP


def test_what_has_no_place_in_an_ioctl_number_is_refused() -> None:
    linux(Direction.WRITE, "T", 1, 0x3FFF, "x86_64")
    for machine, size in (("x86_64", 0x4000), ("mips", 0x2000)):
        with pytest.raises(UsageError, match="at most"):
            linux(Direction.WRITE, "T", 1, size, machine)
    bsd(Direction.WRITE, "t", 1, 0x1FFF)
    with pytest.raises(UsageError, match="at most"):
        bsd(Direction.WRITE, "t", 1, 0x2000)
    with pytest.raises(UsageError, match="one byte"):
        bsd(Direction.WRITE, "t", 256, 4)
    with pytest.raises(UsageError, match="one byte"):
        bsd(Direction.WRITE, 0x100, 1, 4)


def test_everything_public_is_named() -> None:
    tree = ast.parse(Path(vq.offload.__file__).read_text())
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert public | {"ALL"} == set(vq.offload.__all__)
