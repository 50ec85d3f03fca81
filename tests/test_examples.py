"""The examples work: a guest's own machine code drives devices in an emulator."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from vq import DeviceModel, Request
from vq.abi import DeviceId

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from riscv_assembler import AssemblyError, assemble  # noqa: E402


@pytest.fixture(scope="module")
def machine() -> Iterator[object]:
    pytest.importorskip("unicorn", reason="needs unicorn (the extra examples)")
    import riscv_machine

    yield riscv_machine


class Slow(DeviceModel):
    """An entropy device whose bytes come from a thread, when the guest has long been waiting."""

    device_id = DeviceId.ENTROPY

    def __init__(self, executor: Executor, data: bytes) -> None:
        super().__init__(queues=[("requests", 64, self._fill)])
        self.executor = executor
        self.data = data

    def _fill(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.run_in(self.executor, self._write, request)

    def _write(self, request: Request) -> None:
        time.sleep(0.02)
        request.writer.write(self.data)


# --- the machine ---------------------------------------------------------------------------------


def test_the_example_prints_32_random_bytes(machine) -> None:
    seen = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "riscv_machine.py")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(bytes.fromhex(done.stdout)) == 32 and done.stdout.endswith("\n")
        seen.add(done.stdout)
    assert len(seen) == 2


def test_a_guest_waits_for_a_device_that_takes_its_time(machine) -> None:
    printed: list[bytes] = []
    data = bytes(range(32))
    with ThreadPoolExecutor(1) as executor:
        one = machine.build(printed.append, Slow(executor, data))
        assert one.run() == machine.PASS
    assert b"".join(printed) == data.hex().encode() + b"\n"
    assert one.interrupts >= 1, "the guest sleeps until it is interrupted"
    for device in one.devices:
        assert not any("ignored" in name for name in device.stats), device.stats


def test_the_guest_looks_at_what_it_drives(machine) -> None:
    with ThreadPoolExecutor(1) as executor:
        for trouble in ("type", "short"):
            device = Slow(executor, bytes(32 if trouble == "type" else 31))
            if trouble == "type":
                device.device_id = DeviceId.NET
            assert machine.build(lambda data: None, device).run() == machine.FAIL


# --- its assembler -------------------------------------------------------------------------------

INSTRUCTIONS = """
addi a0, a1, -2048
addi t6, s11, 2047
sltiu t0, t1, 1
xori t0, t1, -1
ori t0, t1, 0x7f
andi t0, t1, 15
slli t0, t1, 63
srli t0, t1, 4
add a0, a1, a2
sll a0, a1, a2
xor a0, a1, a2
or a0, a1, a2
and a0, a1, a2
lb a0, -1(a1)
lh a0, 2(a1)
lw a0, 0x70(a1)
ld a0, 2047(sp)
lbu t0, 0(s0)
lhu t0, 0x102(a2)
lwu t0, -2048(a2)
sb zero, 0(s1)
sh a5, 12(a2)
sw a1, 0x50(a0)
sd a3, -2048(a2)
sd ra, 2047(sp)
back: beq t0, t1, back
bne t0, t1, forth
blt a0, a1, back
bge a0, a1, forth
bltu a0, a1, back
bgeu a0, a1, forth
beqz a0, back
bnez a0, forth
j back
j forth
call back
call forth
forth: mv a0, a1
csrw mtvec, t0
csrs mie, t1
csrwi mstatus, 0
csrsi mstatus, 8
csrci mstatus, 8
fence
wfi
mret
ret
"""


def test_it_agrees_with_a_real_assembler(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="needs ziglang (the extra abi)")
    marker = b"here it begins:\0"
    text = INSTRUCTIONS.replace("call ", "jal ra, ")
    source = tmp_path / "program.S"
    source.write_text(
        f'.option norvc\n.option norelax\n.ascii "{marker[:-1].decode()}\\0"\n{text}', "ascii"
    )
    compiled = tmp_path / "program.o"
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(tmp_path), "ZIG_LOCAL_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "riscv64-linux-musl"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(compiled)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | cache,
    )
    assert done.returncode == 0, done.stderr
    ours = assemble(INSTRUCTIONS, 0x4000_0000)
    theirs = compiled.read_bytes().partition(marker)[2][: len(ours)]
    lines = [line for line in INSTRUCTIONS.splitlines() if line]
    for number, line in enumerate(lines):
        at = slice(4 * number, 4 * number + 4)
        assert ours[at].hex() == theirs[at].hex(), line


@pytest.mark.parametrize("value", [0, 1, 0x7FF, 0x800, 0xFFF, 0x1000, 0x10001000, 0x74726976])
def test_li_loads_any_number_of_31_bits(value: int) -> None:
    upper, lower = (
        int.from_bytes(assemble(f"li a0, {value}", 0)[at : at + 4], "little") for at in (0, 4)
    )
    low = lower >> 20
    assert (upper & 0xFFFFF000) + low - (low >> 11 << 12) == value
    assert upper & 0xFFF == 10 << 7 | 0x37 and lower & 0xFFFFF == 10 << 15 | 10 << 7 | 0x1B


@pytest.mark.parametrize(
    "line",
    ["nop", "addi a0, a1, 2048", "lw a0, 4000(a1)", "j nowhere", "li a0", "csrw mscratch, t0"],
)
def test_what_is_no_instruction_is_told(line: str) -> None:
    with pytest.raises(AssemblyError, match=line[:4]):
        assemble(line, 0)
