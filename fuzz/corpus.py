"""The corpora: `corpus/NAME.hex`, one input a line, shortest first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["TARGETS", "load", "save"]

_HERE = Path(__file__).parent
TARGETS = tuple(sorted(p.stem for p in (_HERE / "targets").glob("*.py") if p.stem != "__init__"))
"""The names of all targets."""


def load(name: str) -> list[bytes]:
    """The inputs kept for a target."""
    path = _HERE / "corpus" / f"{name}.hex"
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(name: str, inputs: Iterable[bytes]) -> None:
    """Replaces the inputs kept for a target."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    lines = "".join(f"{data.hex()}\n" for data in ordered if data)
    (_HERE / "corpus" / f"{name}.hex").write_text(lines)
