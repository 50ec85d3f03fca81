"""With VQ_REQUIRE=1, as in CI, a test that skips for want of something fails instead.

So nothing that is meant to run there can be left out unnoticed. What a machine's kernel or the
user's rights decide cannot be installed, and still skips.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from net_world import both_ways

__all__ = ["both_ways"]

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
