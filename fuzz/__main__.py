"""`python -m fuzz`: runs targets with atheris, replays findings, keeps corpora. See `fuzz`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzz.corpus import TARGETS, load, save

LONGEST = 2048
"""Bytes of an input at most."""
SLOW = 10
"""Seconds after which an input counts as a hang."""
_INSIDE = "--inside"  # with it this is the process that atheris takes over
_IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where targets have their files, which they write all the time."""
MEMORY = 1500
"""MiB of memory after which an input counts as a bomb."""


def main() -> int:
    """Parses the command line; exits with 1 when a target found something."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=10, help="for each target (default: 10)")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="runs these inputs")
    parser.add_argument(
        "--keep", type=Path, metavar="DIRECTORY", help="merges its inputs into the target's corpus"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIRECTORY", help="where new inputs and findings are left"
    )
    if sys.argv[1:2] == [_INSIDE]:
        return _inside(sys.argv[2], sys.argv[3:])  # name, program, options
    args = parser.parse_args()
    targets = args.targets or TARGETS
    for name in targets:
        if name not in TARGETS:
            parser.error(f"no target {name!r}; there are {', '.join(TARGETS)}")
    if args.replay or args.keep:
        if len(targets) != 1:
            parser.error("--replay and --keep go with one target")
        return _replay(targets[0], args.replay) if args.replay else _keep(targets[0], args.keep)
    found = [name for name in targets if not _fuzz(name, args.seconds, args.work)]
    if found:
        print(f"found something: {', '.join(found)}")
    return bool(found)


def _target(name: str) -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = importlib.import_module(f"fuzz.targets.{name}").run
    return run


def _replay(name: str, files: Sequence[Path]) -> int:
    run = _target(name)
    for file in files:
        run(file.read_bytes())
        print(f"{file}: nothing wrong")
    return 0


def _fuzz(name: str, seconds: int, work: Path | None) -> bool:
    """Runs one target in a process of its own; False when it found something."""
    with tempfile.TemporaryDirectory(prefix="vq-fuzz-") as temporary:
        root = Path(temporary) if work is None else work
        inputs, kept, findings = (root / name / part for part in ("inputs", "kept", "findings"))
        for directory in (inputs, kept, findings):
            directory.mkdir(parents=True, exist_ok=True)
        _unpack(name, kept)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST}",
            "-len_control=0",  # what goes deep is long
            f"-timeout={SLOW}",
            f"-rss_limit_mb={MEMORY}",
            f"-artifact_prefix={findings}/",
            "-print_final_stats=1",
        ]
        done = _libfuzzer(name, [*options, str(inputs), str(kept)], seconds + 120)
        said = done.stderr.splitlines()
        runs = [line.split()[-1] for line in said if "number_of_executed_units" in line]
        covered = [line.split(" cov: ")[1].split()[0] for line in said if " cov: " in line]
        print(
            f"{name}: {runs[-1] if runs else '?'} runs, {covered[-1] if covered else '?'} places"
            f" covered, {'nothing found' if not done.returncode else 'FOUND SOMETHING'}",
            flush=True,
        )
        if done.returncode:
            print("\n".join(line for line in said if not line.startswith(("#", "INFO"))))
            for finding in findings.iterdir():
                print(f"{finding.name}: {finding.read_bytes().hex()}")
        return not done.returncode


def _keep(name: str, source: Path) -> int:
    """The smallest set of inputs that covers all that the corpus and `source` cover."""
    with tempfile.TemporaryDirectory(prefix="vq-fuzz-") as temporary:
        kept, merged = Path(temporary, "kept"), Path(temporary, "merged")
        kept.mkdir()
        merged.mkdir()
        _unpack(name, kept)
        # Places alone, not how often each is reached: else the corpora are five times as large.
        options = ["-merge=1", "-use_counters=0", str(merged), str(kept), str(source)]
        done = _libfuzzer(name, options, 1800)
        if done.returncode:
            print(done.stderr[-4000:])
            return 1
        save(name, [file.read_bytes() for file in merged.iterdir()])
    print(f"{name}: {len(load(name))} inputs kept")
    return 0


def _unpack(name: str, directory: Path) -> None:
    for number, data in enumerate(load(name)):
        (directory / str(number)).write_bytes(data)


def _libfuzzer(
    name: str, options: Sequence[str], timeout: float
) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryDirectory(prefix="vq-fuzz-") as temporary,
        tempfile.TemporaryDirectory(prefix="vq-fuzz-", dir=_IN_MEMORY) as left_behind,
    ):
        # A program of its own: to merge, libFuzzer starts itself again by its name.
        program = Path(temporary, name)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fuzz {_INSIDE} {name} $0 "$@"\n')
        program.chmod(0o700)
        return subprocess.run(
            [program, *options],
            # libFuzzer ends without a word to Python, which takes nothing away then.
            env={**os.environ, "TMPDIR": left_behind},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )


def _inside(name: str, argv: Sequence[str]) -> int:
    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["vq"], enable_loader_override=False):
        run = _target(name)
    atheris.Setup([*argv], run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
