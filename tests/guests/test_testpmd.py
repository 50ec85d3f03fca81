"""A net device with DPDK's driver in front of it: it polls, and never sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vq.testing.requirements import need_root, or_skip
from vq.testing.testpmd import HugePages, Testpmd

from .conftest import Served, assert_well, wait_until

DRIVERS = pytest.mark.parametrize(
    ("port", "queues"),
    [
        ("", 1),
        ("", 2),
        ("mrg_rxbuf=0", 1),
        ("in_order=0", 2),
        ("mrg_rxbuf=0,in_order=0", 2),
        ("mrg_rxbuf=0,vectorized=1", 1),
        ("in_order=0,packed_vq=0,queue_size=1024", 1),
    ],
)
"""Each of DPDK's ways to send and receive, and each number of queues."""


@pytest.fixture(scope="module")
def pages() -> Iterator[HugePages]:
    need_root()
    with or_skip():
        some = HugePages(256)
    with some:
        yield some


@pytest.fixture
def start(pages: HugePages, tmp_path: Path) -> Iterator[Callable[..., tuple[Served, Testpmd]]]:
    """Starts a device on a link, and testpmd in front of it that waits to be started."""
    with ExitStack() as stack:

        def begin(
            link: str, mode: str, *, port: str = "", queues: int = 1
        ) -> tuple[Served, Testpmd]:
            served = Served(tmp_path, link, f"--queue-pairs={queues}")
            stack.callback(served.close)
            with or_skip():
                pmd = Testpmd(
                    pages,
                    served.sockets[0],
                    [f"--forward-mode={mode}", f"--rxq={queues}", f"--txq={queues}"],
                    port=f"queues={queues}" + (f",{port}" if port else ""),
                    mem=128,
                )
            stack.enter_context(pmd)
            return served, pmd

        yield begin


@DRIVERS
def test_txonly(start: Callable[..., Any], port: str, queues: int) -> None:
    served, pmd = start("null", "txonly", port=port, queues=queues)
    expected_bytes = 0
    for length in ("64", "1500", "60,60,200,400"):
        pmd.command(f"set txpkts {length}")
        before = pmd.stats().tx_packets
        pmd.command("start")
        reached(lambda: served.count("tx_frames"), before + 5000)
        pmd.command("stop")
        sent = pmd.stats().tx_packets
        reached(lambda: served.count("tx_frames"), sent)
        expected_bytes += (sent - before) * sum(map(int, length.split(",")))
        stats = served.stats()
        assert (stats["tx_frames"], stats["tx_bytes"]) == (sent, expected_bytes)
    assert_well(served)


@DRIVERS
def test_what_is_sent_comes_back(start: Callable[..., Any], port: str, queues: int) -> None:
    served, pmd = start("loopback", "io", port=port, queues=queues)
    pmd.command("start tx_first 1")
    reached(lambda: served.count("rx_frames"), 20_000)
    pmd.command("stop")
    seen = pmd.stats()
    reached(lambda: served.count("tx_frames"), seen.tx_packets)
    stats = served.stats()
    assert stats["tx_frames"] == seen.tx_packets
    assert stats["rx_frames"] >= seen.rx_packets > 20_000 - 1024
    assert stats["tx_bytes"] == 64 * stats["tx_frames"]
    assert_well(served)


@pytest.mark.parametrize("port", ["", "mrg_rxbuf=0"])
def test_rxonly(start: Callable[..., Any], port: str, tmp_path: Path, pages: HugePages) -> None:
    served = Served(tmp_path, "pair", names=["left", "right"])
    try:
        with (
            or_skip(),
            Testpmd(pages, served.sockets, ["--forward-mode=rxonly"], port=port, mem=192) as pmd,
        ):
            # One port sends, the other receives.
            pmd.command("set fwd txonly")
            pmd.command("set portlist 0")
            pmd.command("start")
            reached(lambda: served.count("rx_frames"), 200)
            pmd.command("stop")
            pmd.command("set fwd rxonly")
            pmd.command("set portlist 1")
            pmd.command("start")
            time.sleep(0.5)
            pmd.command("stop")
            assert pmd.stats(1).rx_packets > 200
            assert pmd.stats(1).rx_bytes == 64 * pmd.stats(1).rx_packets
        assert_well(served)
    finally:
        served.close()


def test_a_port_is_stopped_and_started(start: Callable[..., Any]) -> None:
    served, pmd = start("loopback", "io")
    for _ in range(5):
        before = served.count("rx_frames")
        pmd.command("start tx_first 1")
        reached(lambda: served.count("rx_frames"), before + 1000)
        pmd.command("stop")
        pmd.command("port stop 0")
        pmd.command("port start 0")
    assert_well(served)


def reached(value: Callable[[], int], amount: int) -> None:
    wait_until(lambda: value() >= amount, f"{amount} frames", timeout=20)
