"""What an author gets wrong is told at once, in a sentence that names it."""

from __future__ import annotations

import asyncio
import ctypes
import enum
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest

from vq.driver import DeviceError, Driver
from vq.errors import UsageError
from vq.memory import GuestMemory
from vq.model import DeviceModel
from vq.request import Request
from vq.testing.wiring import Wired

Wire = Callable[..., Wired]


class Colour(enum.IntEnum):
    RED = 0
    GREEN = 1


class Config(ctypes.LittleEndianStructure):
    _fields_ = (("count", ctypes.c_uint8), ("mac", ctypes.c_uint8 * 6))


class BigConfig(ctypes.BigEndianStructure):
    _fields_ = (("count", ctypes.c_uint32),)


def ignore(requests: Sequence[Request]) -> None:
    for request in requests:
        request.complete()


QUEUES = [("requests", 16, ignore)]


class Model(DeviceModel):
    device_id = 42
    feature_bits: ClassVar = Colour

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**({"queues": QUEUES} | arguments))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"config": Config}, "config is an instance of a ctypes.LittleEndianStructure"),
        ({"config": BigConfig()}, "config is an instance of a ctypes.LittleEndianStructure"),
        ({"config": b"12"}, "config is an instance of a ctypes.LittleEndianStructure"),
        ({"features": [24]}, "feature bit 24 is not the device type's: .*0 to 23"),
        ({"features": [Colour.RED, 49]}, "feature bit 49 is not the device type's"),
        ({"features": [128]}, "feature bit 128 is not the device type's"),
        ({"features": [-1]}, "feature bit -1 is not the device type's"),
        ({"features": 3}, "features is an iterable of bit numbers, not 3"),
        ({"features": ["RED"]}, "features is an iterable of bit numbers, not .*'RED'"),
        ({"queues": []}, "at least one queue"),
        (
            {"queues": [("requests", 16)]},
            r"\(name, largest size, handler\), not \('requests', 16\)",
        ),
        ({"queues": [(16, "requests", ignore)]}, r"\(name, largest size, handler\)"),
        ({"queues": [("requests", 16, "ignore")]}, r"\(name, largest size, handler\)"),
        ({"queues": [("in", 16, ignore), ("in", 8, None)]}, "two queues have the name 'in'"),
        ({"queues": ["abc"]}, r"\(name, largest size, handler\)"),
        ({"queues": ("requests", 16, ignore)}, r"\(name, largest size, handler\), not 'requests'"),
    ],
)
def test_what_cannot_be_is_refused_when_a_model_is_made(
    arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        Model(**arguments)


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"device_id": None}, "Wrong has no device_id"),
        ({"config_writable": "count"}, "config_writable .*'count'"),
        ({"config_writable": ("cuont",)}, "config_writable: .*no cuont; it has count, mac"),
        ({"feature_needs": {Colour.RED: 1 << Colour.RED}}, "feature_needs: RED needs itself"),
        # A bit's number where a set is due, which is easily written.
        ({"feature_needs": {Colour.RED: Colour.GREEN}}, "feature_needs: RED needs itself"),
    ],
)
def test_what_cannot_be_is_refused_with_the_attributes_name(
    attributes: dict[str, Any], complaint: str
) -> None:
    wrong = type("Wrong", (Model,), attributes)
    with pytest.raises(UsageError, match=complaint):
        wrong(config=Config())


def test_a_model_without_a_device_id_is_refused() -> None:
    class Nameless(DeviceModel):
        def __init__(self) -> None:
            super().__init__(queues=QUEUES)

    with pytest.raises(UsageError, match="Nameless has no device_id"):
        Nameless()


@pytest.mark.parametrize("bit", [0, 23, 50, 127])
def test_a_device_types_own_features_are_those_of_the_specification(bit: int) -> None:
    assert Model(features=[bit]).device_features >> bit & 1


@pytest.mark.parametrize("fields", [{"count": 256}, {"count": -1}, {"count": "x"}, {"mac": b"12"}])
def test_a_value_that_does_not_fit_changes_nothing(fields: dict[str, Any]) -> None:
    model = Model(config=Config(count=7))
    with pytest.raises(UsageError, match=f"{next(iter(fields))}"):
        model.update_config(**fields)
    assert model.read_config(0, 1) == b"\7" and model.config_generation == 0


def test_fields_are_changed_all_or_none() -> None:
    model = Model(config=Config(count=7))
    with pytest.raises(UsageError):
        model.update_config(count=8, mac=5)
    assert model.read_config(0, 1) == b"\7"
    model.update_config(count=8, mac=(ctypes.c_uint8 * 6)(*b"abcdef"))
    assert model.read_config(0, 7) == b"\x08abcdef"


def test_refused_features_are_named(caplog: pytest.LogCaptureFixture) -> None:
    memory = GuestMemory.allocate(1 << 16)
    model = Model(features=[Colour.RED], memory=memory)
    model.write_status(3)
    model.accept_features(1 << 32 | 1 << Colour.GREEN)
    model.write_status(11)
    assert "GREEN" in caplog.text and "not offered" in caplog.text


# --- work that is left to others -----------------------------------------------------------------


async def answer_later(request: Request) -> None:
    await asyncio.sleep(0)
    request.writer.write(b"done")


class Later(DeviceModel):
    """Its handler calls `step` for each request."""

    device_id = 42
    drain_seconds: ClassVar = 0.2

    def __init__(self, step: Callable[[Later, Request], object]) -> None:
        self.executor = ThreadPoolExecutor(1)
        self.step = step
        super().__init__(queues=[("requests", 16, self.handle)])

    def handle(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.step(self, request)

    def close(self) -> None:
        super().close()
        self.executor.shutdown()


def shut_down(model: Later, request: Request) -> None:
    model.executor.shutdown()
    model.run_in(model.executor, lambda request: None, request)


def closed_loop(model: Later, request: Request) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    model.run_async(answer_later(request), request, loop=loop)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (lambda model, request: model.run_async(answer_later, request), "run_async .*answer_later"),
        (
            lambda model, request: model.run_in(model.executor, answer_later, request),
            "run_in .*run_async",
        ),
        (
            lambda model, request: model.run_in(
                model.executor, lambda request: answer_later(request), request
            ),
            "coroutine",
        ),
        (shut_down, "shutdown"),
        (closed_loop, "closed"),
    ],
    ids=["function", "coroutine function", "coroutine in a thread", "executor", "loop"],
)
@pytest.mark.filterwarnings("error")
def test_work_that_cannot_begin_is_a_fault_and_no_request_waits_for_ever(
    vq_wire: Wire, step: Callable[[Later, Request], object], complaint: str
) -> None:
    wired = vq_wire(Later(step))
    wired.driver.probe()
    with pytest.raises(DeviceError, match=f"needs a reset: .*{complaint}"):
        wired.request(0, b"hello", 16, timeout=2)
    wired.device.reset()


def test_a_coroutine_where_none_is_due_is_refused_at_the_call() -> None:
    model = Later(lambda model, request: None)
    with pytest.raises(UsageError, match="run_async takes a coroutine"):
        model.run_async(answer_later, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="run_in takes a function"):
        model.run_in(model.executor, answer_later, None)  # type: ignore[arg-type]
    model.close()


@pytest.mark.filterwarnings("error")
def test_a_handler_that_gives_a_coroutine_is_a_fault(vq_wire: Wire) -> None:
    wired = vq_wire(Later(lambda model, request: None))
    wired.device._handlers[0] = lambda requests: answer_later(requests[0])  # type: ignore[attr-defined]
    wired.driver.probe()
    with pytest.raises(DeviceError, match="handler of requests gives a coroutine"):
        wired.request(0, b"hello", 16)


def test_a_fault_without_words_is_named_by_its_type(vq_wire: Wire) -> None:
    def fail(model: Later, request: Request) -> None:
        raise KeyError("colour")

    wired = vq_wire(Later(fail))
    wired.driver.probe()
    with pytest.raises(DeviceError, match="needs a reset: KeyError: 'colour'"):
        wired.request(0, b"hello", 16)


# --- the wire ------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_sent_is_wrong_use(vq_wire: Wire) -> None:
    wired = vq_wire(Later(lambda model, request: request.complete()))
    with pytest.raises(UsageError, match=r"probe\(\)"):
        wired.request(0, b"hello")
    wired.driver.probe()
    with pytest.raises(UsageError, match=r"no queue 7; .*requests"):
        wired.request(7, b"hello")


def test_a_request_waits_as_long_as_it_is_told(vq_wire: Wire) -> None:
    wired = vq_wire(Later(lambda model, request: None))
    wired.driver.probe()
    with pytest.raises(DeviceError, match=r"no answer on queue 0 in 0\.05 seconds"):
        wired.request(0, b"hello", timeout=0.05)


def test_a_request_waits_for_room_in_a_full_queue(vq_wire: Wire) -> None:
    def slowly(model: Later, request: Request) -> None:
        model.run_async(answer_later(request), request)

    wired = vq_wire(Later(slowly), queue_size=2)
    wired.driver.probe()
    buffer = wired.driver.allocator.allocate(8)
    wired.driver.queues[0].add([(buffer, 4)], [(buffer + 4, 4)])
    assert wired.request(0, b"hello", 4) == b"done"


def test_a_driver_writes_the_configuration(vq_wire: Wire, vq_via: str) -> None:
    class Writable(Model):
        config_writable: ClassVar = ("count",)

    wired = vq_wire(Writable(config=Config()), vq_via)
    wired.driver.probe()
    wired.driver.write_config(0, b"\5")
    assert wired.driver.read_config(0, 1) == b"\5"
    assert isinstance(wired.driver, Driver)
