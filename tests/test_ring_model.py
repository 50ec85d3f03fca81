"""Every interleaving of a driver and a device, access by access: of the model, and of vq's own.

The model's programs are right with fences and store buffers, and each way of breaking them is
found. vq's driver and device are held against the model's, and against each other; broken ones are
found there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ring_model import (
    AVAIL_IDX,
    EVENT_IDX,
    Broken,
    ModelSide,
    RealSide,
    Words,
    device,
    driver,
    explore,
    real_device,
    real_driver,
)

import vq.driver
import vq.split_ring
from vq.abi import Feature
from vq.driver import DriverRing
from vq.memory import GuestMemory
from vq.split_ring import SplitRing

IN_ORDER = 1 << Feature.IN_ORDER
BOTH = pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.allocate(0x1000) as memory:
        yield memory


def models(
    memory: GuestMemory,
    features: int,
    *,
    size: int = 2,
    chains: int = 2,
    start: int = 0xFFFF,
    wrong_driver: str = "",
    wrong_device: str = "",
) -> Callable[[], tuple[ModelSide, ModelSide, Words]]:
    def begin() -> tuple[ModelSide, ModelSide, Words]:
        words = Words(memory.view(0, Words.END), size, start)
        return (
            ModelSide(driver(size, chains, features, start, wrong_driver), words, buffered=True),
            ModelSide(device(size, chains, features, start, wrong_device), words, buffered=True),
            words,
        )

    return begin


@BOTH
@pytest.mark.parametrize(("size", "chains"), [(1, 2), (2, 2)])
def test_the_model_loses_nothing_in_any_interleaving(
    memory: GuestMemory, features: int, size: int, chains: int
) -> None:
    assert explore(models(memory, features, size=size, chains=chains)) > 500


@BOTH
@pytest.mark.parametrize(
    "wrong",
    ["no fence before a kick", "no fence before sleep", "index before entry"],
)
def test_a_driver_that_leaves_out_a_step_is_found(
    memory: GuestMemory, features: int, wrong: str
) -> None:
    with pytest.raises(Broken):
        explore(models(memory, features, wrong_driver=wrong))


@BOTH
@pytest.mark.parametrize(
    "wrong",
    [
        "no fence before a call",
        "no fence before sleep",
        "index before entry",
        "asks before it publishes",
        "looks before it asks",
    ],
)
def test_a_device_that_leaves_out_a_step_is_found(
    memory: GuestMemory, features: int, wrong: str
) -> None:
    with pytest.raises(Broken):
        explore(models(memory, features, wrong_device=wrong))


@pytest.mark.parametrize("wrong", ["plain comparison", "only the last"])
@pytest.mark.parametrize("side", ["wrong_driver", "wrong_device"])
def test_a_wrong_comparison_of_event_indices_is_found(
    memory: GuestMemory, wrong: str, side: str
) -> None:
    if (wrong, side) == ("only the last", "wrong_driver"):
        # This driver publishes chains one at a time: for it the last is the only one.
        explore(models(memory, EVENT_IDX, wrong_driver=wrong))
        return
    with pytest.raises(Broken):
        explore(models(memory, EVENT_IDX, **{side: wrong}))  # type: ignore[arg-type]


# --- vq's own -------------------------------------------------------------------------------------


def sides(
    memory: GuestMemory,
    features: int,
    who: tuple[str, str],
    *,
    size: int = 2,
    chains: int = 2,
    start: int = 0xFFFF,
    driver_ring: type[DriverRing] = DriverRing,
    device_ring: type[SplitRing] = SplitRing,
) -> Callable[[], tuple[ModelSide | RealSide, ModelSide | RealSide, Words]]:
    def begin() -> tuple[ModelSide | RealSide, ModelSide | RealSide, Words]:
        words = Words(memory.view(0, Words.END), size, start - 1)
        parts = size, words.DESC, words.AVAIL, words.USED
        ours = device_ring(
            memory, *parts, features=features, next_avail=start - 1, next_used=start - 1
        )
        # Its first call always comes, and would hide a call that is lost: so it is behind us.
        words.store(("desc", 0), 0)
        words.store(AVAIL_IDX, start)
        ours.push_burst(ours.pop_burst(1))
        assert ours.should_notify()
        words = Words(memory.view(0, Words.END), size, start)
        guest: ModelSide | RealSide
        if who[0] == "real":
            theirs = driver_ring(memory, *parts, features=features, start_index=start)
            guest = RealSide(real_driver(theirs, chains), theirs)
        else:
            guest = ModelSide(driver(size, chains, features, start), words)
        if who[1] == "model":
            return guest, ModelSide(device(size, chains, features, start), words), words
        return guest, RealSide(real_device(ours), ours), words

    return begin


@BOTH
@pytest.mark.parametrize(
    ("who", "size"), [(("model", "real"), 2), (("real", "model"), 2), (("real", "real"), 1)]
)
def test_vq_loses_nothing_in_any_interleaving(
    memory: GuestMemory, features: int, who: tuple[str, str], size: int
) -> None:
    assert explore(sides(memory, features, who, size=size)) > 300


def test_vq_loses_nothing_in_order_either(memory: GuestMemory) -> None:
    assert explore(sides(memory, EVENT_IDX | IN_ORDER, ("real", "real"))) > 300


def test_real_sides_stop_before_every_access(memory: GuestMemory) -> None:
    """Else the exploration above would say nothing of vq."""
    guest, ours, _ = sides(memory, EVENT_IDX, ("real", "real"))()
    guest.other, ours.other = ours, guest
    assert isinstance(guest, RealSide) and isinstance(ours, RealSide)
    places: set[str] = set()
    for _ in range(500):
        for side in (guest, ours):
            while side.choices:
                if side._frame is not None:
                    places.add(side._frame.f_code.co_name)
                side.take("go")
    assert guest.done
    guest.close()
    ours.close()
    assert guest.stops > 20 and ours.stops > 20
    assert {"publish", "should_kick", "should_notify", "enable_kicks", "_waiting"} <= places


class Sleepy(SplitRing):
    """Looks for chains first and asks for kicks then."""

    def enable_kicks(self) -> bool:
        more = bool(self.available())
        super().enable_kicks()
        return more


class Deaf(DriverRing):
    """Does not look again when it has asked for calls."""

    def enable_calls(self, *, delayed: bool = False) -> bool:
        super().enable_calls(delayed=delayed)
        return False


@BOTH
def test_a_device_that_looks_before_it_asks_for_kicks_is_found(
    memory: GuestMemory, features: int
) -> None:
    with pytest.raises(Broken, match="both sleep"):
        explore(sides(memory, features, ("model", "real"), device_ring=Sleepy))


@BOTH
def test_a_driver_that_does_not_look_again_is_found(memory: GuestMemory, features: int) -> None:
    with pytest.raises(Broken, match="both sleep"):
        explore(sides(memory, features, ("real", "model"), driver_ring=Deaf))


@pytest.mark.parametrize("module", [vq.split_ring, vq.driver], ids=["device", "driver"])
def test_a_comparison_that_does_not_wrap_is_found_in_vq_too(
    memory: GuestMemory, module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "needs_event", lambda event, new, old: new > event)
    with pytest.raises(Broken, match="both sleep"):
        explore(sides(memory, EVENT_IDX, ("real", "real")))
