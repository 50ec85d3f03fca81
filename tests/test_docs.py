"""Every command and snippet in the documentation works.

The blocks of a page are run one after the other in a directory of the page's own. A Python block
whose first line is a comment with the name of a file is saved there first, as the reader is told
to do; one that is named like a test is run by pytest. In a console block the lines with a ``$`` are
commands. Commands in indented text need a guest or a tap: their options are checked here, and
tests/guests/test_doc_commands.py types them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vq import cli, serve
from vq.bench import BENCHES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECONDS = 100

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.M | re.S)
INDENTED = [
    (f"{page.relative_to(ROOT)}: {line}", line)
    for page in PAGES
    for line in re.findall(r"^    (vq (?!loop).*)$", page.read_text(), re.M)
]


def run(argv: list[str], directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}
    done = subprocess.run(
        argv, cwd=directory, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"


def run_python(text: str, directory: Path) -> None:
    named = re.match(r"# ([\w.]+\.py)\n", text)
    if named is None:
        run([sys.executable, "-c", text], directory)
        return
    name = named[1]
    (directory / name).write_text(text)
    pytest_options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    how = ["-m", "pytest", *pytest_options] if name.startswith("test_") else []
    run([sys.executable, *how, str(directory / name)], directory)


def run_console(text: str, directory: Path) -> None:
    for line in re.findall(r"^\$ (.*)$", text, re.M):
        program, *words = shlex.split(line)
        assert program in ("vq", "python"), line
        run([sys.executable, *(["-m", "vq"] if program == "vq" else []), *words], directory)


@pytest.mark.timeout(5 * SECONDS)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, tmp_path: Path) -> None:
    for kind, text in BLOCK.findall(page.read_text()):
        (run_python if kind == "python" else run_console)(text, tmp_path)


@pytest.mark.parametrize("line", [line for _, line in INDENTED], ids=[name for name, _ in INDENTED])
def test_a_command_that_needs_a_guest_has_options_that_exist(line: str) -> None:
    words = cli.join_option_values(shlex.split(line, comments=True)[1:])
    arguments = cli.parser(words[0]).parse_args(words)
    if words[0] == "serve" and ":" not in arguments.device:
        serve.parse(arguments.device, arguments.options)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_the_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Where things are") : text.index("## Rules that vq keeps")]
    for name in re.findall(r"`(\w+(?:\.py|/))`", table):
        assert name == "vq/" or (ROOT / "vq" / name).exists(), name


def test_the_pictures_show_what_the_code_does(tmp_path: Path) -> None:
    script = (ROOT / "docs" / "pictures.py").read_text()
    (tmp_path / "pictures.py").write_text(script)
    run([sys.executable, "pictures.py"], tmp_path)
    for drawn in (tmp_path / "pictures").iterdir():
        kept = ROOT / "docs" / "pictures" / drawn.name
        assert drawn.read_text() == kept.read_text(), "run `python docs/pictures.py`"


def performance_page() -> ModuleType:
    path = ROOT / "benchmarks" / "performance_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_performance_page_is_of_a_bench_that_can_be_run_again() -> None:
    commands = performance_page().commands()
    assert {command.split()[0] for command in commands} == set(BENCHES)
    for command in commands:
        cli.parser("bench").parse_args(["bench", *shlex.split(command), "--markdown"])


def test_a_table_that_is_measured_anew_replaces_its_own() -> None:
    page = performance_page()
    text = "a\n<!-- begin: ring -->\nold\n<!-- end -->\nb\n<!-- begin: tap -->\n<!-- end -->\n"
    once = page.with_table(text, "ring", "new \\1\n")
    assert once == text.replace("old", "new \\1")
    assert page.with_table(once, "ring", "old\n") == text
