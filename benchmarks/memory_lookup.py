"""What finding a guest address costs as the guest's memory gets more regions.

Prints nanoseconds per `view()` and per `hvaddr()` for 1, 8, 64 and 512 regions of 64 KiB with holes
between them, and in brackets the ratio to one region. "near" accesses stay in one region, as those
of a queue and its buffers mostly do; "far" ones each go to a region picked at random, the worst
case. The loop around the calls is included. Each number is the best of several rounds.

Run it as `python benchmarks/memory_lookup.py`; it takes about two seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from vq.memory import GuestMemory

COUNTS = (1, 8, 64, 512)
REGION = 0x10000
STRIDE = 2 * REGION
CALLS = 20_000
ROUNDS = 7
LENGTH = 1500


def nanoseconds(look_up: Callable[[int, int], object], addresses: Sequence[int]) -> float:
    """The time of one call, over all addresses, in the fastest of the rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for address in addresses:
            look_up(address, LENGTH)
        best = min(best, time.perf_counter_ns() - start)
    return best / len(addresses)


def measure(count: int) -> list[float]:
    """View near, view far, hvaddr near, hvaddr far: nanoseconds with that many regions."""
    chance = random.Random(count)
    offsets = [chance.randrange(REGION - LENGTH) for _ in range(CALLS)]
    middle = count // 2 * STRIDE
    near = [middle + offset for offset in offsets]
    far = [chance.randrange(count) * STRIDE + offset for offset in offsets]
    with GuestMemory.allocate(*((n * STRIDE, REGION) for n in range(count))) as memory:
        return [
            nanoseconds(look_up, addresses)
            for look_up in (memory.view, memory.hvaddr)
            for addresses in (near, far)
        ]


def main() -> None:
    """Prints the table."""
    print("regions      view near       view far    hvaddr near     hvaddr far   (ns a call)")
    base: list[float] = []
    for count in COUNTS:
        times = measure(count)
        base = base or times
        columns = (f"{t:6.0f} ({t / b:5.2f})" for t, b in zip(times, base, strict=True))
        print(f"{count:7}", *columns)


if __name__ == "__main__":
    main()
