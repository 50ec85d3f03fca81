"""With VQ_REQUIRE=1, as in CI, a test that skips for want of something fails instead.

So nothing that is meant to run there can be left out unnoticed. What a machine's kernel or the
user's rights decide cannot be installed, and still skips.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import nullcontext

import pytest

from vq.log_limit import LIMIT
from vq.testing.transports import TRANSPORTS

REQUIRED = os.environ.get("VQ_REQUIRE", "0") not in ("", "0")
NOT_TO_BE_INSTALLED = (
    "root may read everything",
    "no huge pages are free",
    "this kernel has no",
    "this file system wants",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRED and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(reason.startswith(allowed) for allowed in NOT_TO_BE_INSTALLED):
            report.outcome = "failed"
            report.longrepr = f"VQ_REQUIRE is set, but: {reason}"
    return report


def pytest_configure() -> None:
    """A shell has its background jobs ignore SIGINT, and whoever they start inherits that: programs
    that tests interrupt would not notice.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """The garbage collector looks no more at what was collected: with ten thousand tests there is
    so much of it that every look takes a tenth of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quick_collector() -> None:
    """For modules whose tests collect garbage: what there is before them is looked at no more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_log_limit() -> None:
    """What earlier tests logged counts against nobody's limit."""
    LIMIT.forget()


@pytest.fixture(scope="module", params=(*TRANSPORTS, "direct, frames by address"))
def over(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests once for each way from a guest to its net device, and once for the
    short way that frames may take from there; what comes out must be the same.
    """
    from net_world import World, frames_by_address

    World.over, _, by_address = request.param.partition(", ")
    with frames_by_address() if by_address else nullcontext():
        yield World.over
    World.over = "direct"
