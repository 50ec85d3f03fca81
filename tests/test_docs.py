"""Every command and snippet in the documentation works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vq import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(kind: str) -> list[tuple[str, str]]:
    return [
        (f"{page.relative_to(ROOT)}:{number}", text)
        for page in PAGES
        for number, text in enumerate(re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.S))
    ]


SNIPPETS = blocks("python")
COMMANDS = [
    (f"{place}: {line}", line.removeprefix("$ "))
    for place, text in blocks("console")
    for line in text.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize("text", [text for _, text in SNIPPETS], ids=[name for name, _ in SNIPPETS])
def test_a_snippet_runs(text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for _, line in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_a_command_works(line: str, tmp_path: Path) -> None:
    program, *words = shlex.split(line)
    assert program == "vq"
    done = subprocess.run(
        [sys.executable, "-m", "vq", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


INDENTED = [
    (f"{page.relative_to(ROOT)}: {line}", line)
    for page in PAGES
    for line in re.findall(r"^    (vq (?!loop).*)$", page.read_text(), re.M)
]


@pytest.mark.parametrize("line", [line for _, line in INDENTED], ids=[name for name, _ in INDENTED])
def test_a_command_that_needs_a_guest_has_options_that_exist(line: str) -> None:
    """What these do is tested with real guests, in tests/guests."""
    words = shlex.split(line, comments=True)[1:]
    cli._parser(words[0]).parse_args(words)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_the_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Where things are") : text.index("## Rules that vq keeps")]
    for name in re.findall(r"`(\w+(?:\.py|/))`", table):
        assert name == "vq/" or (ROOT / "vq" / name).exists(), name
