"""A small assembler for RISC-V (RV64I, and what a handler of interrupts needs).

``assemble(text, base)`` gives machine code for a program that runs at `base`. A line is a label
with a colon, an instruction with its operands, or both; ``#`` begins a comment. Registers have
their ABI names, numbers are Python's, and the names in `symbols` stand for numbers.

Beside the processor's own instructions there are ``li`` (a number of 31 bits), ``mv``, ``j``,
``call``, ``ret``, ``beqz`` and ``bnez``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = (
    *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"),
    *("a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"),
    *("s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6"),
)
REGISTERS = {name: number for number, name in enumerate(_NAMES)}
CSRS = {"mstatus": 0x300, "mie": 0x304, "mtvec": 0x305}

_LOADS = {"lb": 0, "lh": 1, "lw": 2, "ld": 3, "lbu": 4, "lhu": 5, "lwu": 6}
_STORES = {"sb": 0, "sh": 1, "sw": 2, "sd": 3}
_IMMEDIATES = {"addi": 0, "sltiu": 3, "xori": 4, "ori": 6, "andi": 7}
_SHIFTS = {"slli": 1, "srli": 5}
_OPERATIONS = {"add": 0, "sll": 1, "xor": 4, "or": 6, "and": 7}
_BRANCHES = {"beq": 0, "bne": 1, "blt": 4, "bge": 5, "bltu": 6, "bgeu": 7}
_CSR_OPERATIONS = {"csrw": 1, "csrs": 2, "csrwi": 5, "csrsi": 6, "csrci": 7}
_WHOLE = {"fence": 0x0FF0000F, "wfi": 0x10500073, "mret": 0x30200073, "ret": 0x00008067}


class AssemblyError(ValueError):
    """A line that is no instruction; the message has it."""


def assemble(text: str, base: int, symbols: Mapping[str, int] | None = None) -> bytes:
    """The machine code of `text`, to be loaded at `base`. Raises `AssemblyError`."""
    lines: list[tuple[str, list[str], str]] = []
    names = dict(symbols or {})
    for line in text.splitlines():
        rest = line.partition("#")[0].strip()
        while label := re.match(r"(\w+):\s*", rest):
            names[label[1]] = base + 4 * len(lines)
            rest = rest[label.end() :]
        if rest:
            mnemonic, _, operands = rest.partition(" ")
            words = [word for word in re.split(r"[,\s()]+", operands) if word]
            lines.append((mnemonic, words, rest))
            if mnemonic == "li":  # two instructions
                lines.append(("li-low", words, rest))
    code = bytearray()
    for number, (mnemonic, words, rest) in enumerate(lines):
        try:
            instruction = _encode(mnemonic, words, base + 4 * number, names)
        except (ArithmeticError, LookupError, ValueError) as error:
            raise AssemblyError(f"{rest}: {error}") from error
        code += instruction.to_bytes(4, "little")
    return bytes(code)


def _encode(mnemonic: str, words: list[str], here: int, names: Mapping[str, int]) -> int:
    def number(word: str) -> int:
        return names[word] if word in names else int(word, 0)

    r = [REGISTERS.get(word, 0) for word in words]
    match mnemonic, words:
        case ("li", [_, value]):  # lui, rounded so that li-low's signed 12 bits make up for it
            return (number(value) + 0x800 & 0x7FFFF000) | r[0] << 7 | 0x37
        case ("li-low", [_, value]):
            low = (number(value) + 0x800 & 0xFFF) - 0x800
            return _i(0x1B, r[0], 0, r[0], low)  # addiw
        case ("mv", [_, _]):
            return _i(0x13, r[0], 0, r[1], 0)
        case ("j", [target]):
            return _j(0, number(target) - here)
        case ("call", [target]):
            return _j(REGISTERS["ra"], number(target) - here)
        case ("beqz", [_, target]):
            return _b(0, r[0], 0, number(target) - here)
        case ("bnez", [_, target]):
            return _b(1, r[0], 0, number(target) - here)
    if mnemonic in _WHOLE:
        return _WHOLE[mnemonic]
    if mnemonic in _LOADS:  # lw rd, offset(rs)
        return _i(0x03, r[0], _LOADS[mnemonic], r[2], number(words[1]))
    if mnemonic in _STORES:  # sw rs2, offset(rs1)
        return _s(_STORES[mnemonic], r[2], r[0], number(words[1]))
    if mnemonic in _IMMEDIATES:
        return _i(0x13, r[0], _IMMEDIATES[mnemonic], r[1], number(words[2]))
    if mnemonic in _SHIFTS:
        return _i(0x13, r[0], _SHIFTS[mnemonic], r[1], number(words[2]) & 63)
    if mnemonic in _OPERATIONS:
        return r[2] << 20 | r[1] << 15 | _OPERATIONS[mnemonic] << 12 | r[0] << 7 | 0x33
    if mnemonic in _BRANCHES:
        return _b(_BRANCHES[mnemonic], r[0], r[1], number(words[2]) - here)
    if mnemonic in _CSR_OPERATIONS:  # csrw csr, rs; csrsi csr, number
        source = number(words[1]) if mnemonic.endswith("i") else r[1]
        return CSRS[words[0]] << 20 | source << 15 | _CSR_OPERATIONS[mnemonic] << 12 | 0x73
    raise ValueError("no such instruction")


def _signed(value: int, width: int) -> int:
    if not -(1 << width - 1) <= value < 1 << width - 1:
        raise ValueError(f"{value:#x} does not fit into {width} bits")
    return value & (1 << width) - 1


def _i(opcode: int, rd: int, function: int, rs1: int, immediate: int) -> int:
    return _signed(immediate, 12) << 20 | rs1 << 15 | function << 12 | rd << 7 | opcode


def _s(function: int, rs1: int, rs2: int, immediate: int) -> int:
    value = _signed(immediate, 12)
    return value >> 5 << 25 | rs2 << 20 | rs1 << 15 | function << 12 | (value & 31) << 7 | 0x23


def _b(function: int, rs1: int, rs2: int, distance: int) -> int:
    value = _signed(distance, 13)
    high = (value >> 12) << 31 | (value >> 5 & 0x3F) << 25
    low = (value >> 1 & 15) << 8 | (value >> 11 & 1) << 7
    return high | rs2 << 20 | rs1 << 15 | function << 12 | low | 0x63


def _j(rd: int, distance: int) -> int:
    value = _signed(distance, 21)
    high = (value >> 20) << 31 | (value >> 1 & 0x3FF) << 21
    return high | (value >> 11 & 1) << 20 | (value >> 12 & 0xFF) << 12 | rd << 7 | 0x6F
