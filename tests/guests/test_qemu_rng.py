"""Entropy for a real kernel: from `vq serve rng`, and from the model that README.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vq.testing.guest import QemuGuest
from vq.testing.requirements import or_skip
from vq.testing.served import ServeProcess, assert_well

README = Path(__file__).parents[2] / "README.md"
BLOCKS = 100


@pytest.mark.parametrize("kind", ["rng", "entropy:Entropy"])
def test_the_guests_random_numbers_pass_their_test(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippet = re.search(r"```python\n(.*?\n)memory = ", README.read_text(), re.S)
    assert snippet is not None
    (tmp_path / "entropy.py").write_text(snippet[1])
    monkeypatch.chdir(tmp_path)
    with ServeProcess(tmp_path, kind) as served, or_skip():
        guest = QemuGuest(
            load=["virtio_rng"],
            programs={"rngtest": "rng-tools-debian"},
            arguments=[
                *("-chardev", f"socket,id=rng,path={served.sockets[0]}"),
                *("-device", "vhost-user-rng-pci,chardev=rng,vectors=0"),
            ],
        )
        with guest:
            assert guest.output("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
            # 2,500 bytes a block, and four to begin with. The status tells of any failure.
            report = guest.run(f"head -c {BLOCKS * 2500 + 4} /dev/hwrng | rngtest -c {BLOCKS} 2>&1")
            passed = re.search(r"successes: (\d+)", report.output)
            # FIPS 140-2: one good block in about 1,200 fails.
            assert passed is not None and int(passed[1]) >= BLOCKS - 4, report.output
            assert_well(guest, served)
