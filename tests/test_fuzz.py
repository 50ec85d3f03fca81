"""The fuzz targets as plain tests: their corpora, and random bytes; no atheris needed.

What is only found by a fuzzer's patience is found by ``python -m fuzz``; here is shown that every
target works, and that nothing that was once interesting goes wrong today.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.corpus import TARGETS, load
from fuzz.inputs import Input


def target(name: str) -> Callable[[bytes], None]:
    run: Callable[[bytes], None] = importlib.import_module(f"fuzz.targets.{name}").run
    return run


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_in_the_corpus_breaks_a_rule(name: str) -> None:
    inputs = load(name)
    assert len(inputs) > 3, "a target without a corpus"
    run = target(name)
    for data in inputs:
        run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_random_bytes_break_no_rule(name: str) -> None:
    run = target(name)

    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.binary(max_size=600))
    def any_bytes(data: bytes) -> None:
        run(data)

    any_bytes()


def test_a_corpus_is_small_and_has_nothing_twice() -> None:
    for name in TARGETS:
        inputs = load(name)
        assert len(inputs) == len(set(inputs)), name
        assert sum(map(len, inputs)) < 64_000, f"{name}: minimise it (python -m fuzz --keep)"


def test_an_input_that_is_used_up_gives_zeros() -> None:
    source = Input(b"\x01\x02")
    assert (source.u16, source.u16, source.take(3), source.more) == (0x201, 0, b"", False)
    assert not source.chance(2) and source.pick("abc") == "a" and source.below(9) == 0
