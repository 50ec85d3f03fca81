"""The systems' real headers against vq's numbers, and that the comparison can fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vq import abi_probe, platforms
from vq.abi_probe import ProbeError

BY_NAME = {platform.name: platform for platform in platforms.KNOWN}

needs_headers = pytest.mark.skipif(
    not abi_probe.available(), reason="the headers are not installed (ziglang, the extra abi)"
)


@needs_headers
def test_every_number_is_the_headers_number_on_every_platform():
    done: list[str] = []
    comparisons = abi_probe.compare(progress=done.append)
    assert [one.platform for one in comparisons] == list(BY_NAME)
    assert sorted(done) == sorted(BY_NAME)
    for one in comparisons:
        assert (one.platform, one.mismatches, one.missing, one.error) == (one.platform, {}, (), "")
        absent = platforms.numbers(BY_NAME[one.platform]).keys() - one.headers.keys()
        assert all(name.startswith("__NR_") for name in absent)  # newer than these headers


@needs_headers
@pytest.mark.parametrize("name", ["linux-mips", "linux-x86_64", "openbsd-aarch64"])
def test_a_wrong_number_is_a_mismatch(name):
    platform = BY_NAME[name]
    right = platforms.numbers(platform)["FIONREAD"]
    (one,) = abi_probe.compare([platform], ours=lambda _: {"FIONREAD": 7, "IFNAMSIZ": 16})
    assert one.mismatches == {"FIONREAD": (7, right)}
    assert one.headers == {"FIONREAD": right, "IFNAMSIZ": 16}


@needs_headers
def test_a_name_that_the_headers_do_not_have_is_missing():
    (one,) = abi_probe.compare([BY_NAME["linux-s390x"]], ours=lambda _: {"TUNSETNOTHING": 1})
    assert (one.headers, one.mismatches, one.missing) == ({}, {}, ("TUNSETNOTHING",))


@needs_headers
def test_a_system_call_that_is_newer_than_the_headers_is_not_missing():
    calls = {"__NR_rseq": 334, "__NR_misspelt": 5, "__NR_newer": 9999}
    (one,) = abi_probe.compare([BY_NAME["linux-x86_64"]], ours=lambda _: calls)
    assert one.headers == {"__NR_rseq": 334}
    assert (one.mismatches, one.missing) == ({}, ("__NR_misspelt",))


@needs_headers
def test_what_does_not_compile_is_told_in_one_line_and_does_not_stop_the_others():
    linux, openbsd = BY_NAME["linux-x86_64"], BY_NAME["openbsd-x86_64"]
    failed, fine = abi_probe.compare([linux, openbsd], ours=lambda _: {"sizeof(tun_hdr)": 8})
    assert failed.error.startswith("linux-x86_64: the headers did not compile: probe.c:")
    assert "tun_hdr" in failed.error
    assert "\n" not in failed.error
    assert (fine.error, fine.headers) == ("", {"sizeof(tun_hdr)": 8})


@needs_headers
@pytest.mark.parametrize("name", ["linux-mips", "linux-s390x", "openbsd-x86_64", "freebsd-aarch64"])
def test_the_compiler_itself_agrees_by_static_assertions(name, tmp_path):
    """No reading of object files is in this: the numbers are given to the compiler to judge."""
    platform = BY_NAME[name]

    def judge(numbers: dict[str, int]) -> str:
        lines = [f"#include <{header}>" for header in abi_probe._HEADERS[platform.system]]
        lines.append("#include <stddef.h>")
        for entry, number in numbers.items():
            expression = entry.replace("(", "(struct ", 1)
            lines.append(f'_Static_assert({expression} == {number}, "differs: {entry}");')
        source = tmp_path / "judge.c"
        source.write_text("\n".join(lines) + "\n", encoding="ascii")
        command = [sys.executable, "-m", "ziglang", "cc", "-target", abi_probe._target(platform)]
        command += ["-w", "-ferror-limit=0", "-c", str(source), "-o", str(tmp_path / "judge.o")]
        cache = {"ZIG_GLOBAL_CACHE_DIR": str(tmp_path), "ZIG_LOCAL_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, **cache}
        )
        assert (done.returncode == 0) is (done.stderr == "")
        return done.stderr

    numbers = platforms.numbers(platform)
    assert judge(numbers) == ""
    wrong = judge({**numbers, "IFF_PROMISC": 1, "sizeof(ifreq)": 41})
    assert "differs: IFF_PROMISC" in wrong
    assert "differs: sizeof(ifreq)" in wrong


def test_a_table_is_read_least_significant_byte_first_wherever_it_lies():
    table = b"\x01" + (0x800454CA).to_bytes(8, "little") + bytes(9)
    assert abi_probe._table(b"\x7fELF..." + abi_probe._MARKER + table + b"rest", 2) == [
        0x800454CA,
        None,
    ]


@pytest.mark.parametrize("compiled", [b"", b"\x7fELF", abi_probe._MARKER + bytes(17)])
def test_an_object_without_the_whole_table_is_refused(compiled):
    with pytest.raises(ProbeError):
        abi_probe._table(compiled, 2)


def test_a_compiler_that_cannot_be_started_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ProbeError, match="linux-mips: the compiler did not run"):
        abi_probe.read_headers(BY_NAME["linux-mips"], ["IFNAMSIZ"])
