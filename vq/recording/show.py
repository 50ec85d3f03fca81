"""What stands in a recording, in words or as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vq.abi import DeviceId, Feature, Status, bits
from vq.errors import CaptureError
from vq.offload import Offload
from vq.recording.format import Event, Header, Kind, RecordingReader
from vq.recording.ring import Found, FoundChain
from vq.recording.sample import Sample

__all__ = ["as_json", "describe", "describe_header"]

_SHOWN = 24


def describe(reader: RecordingReader, *, data: bool = False) -> Iterator[str]:
    """The recording in lines: each cause with a number and its time, what it led to below it.

    With `data` all bytes are shown, else the first few. Raises `CaptureError` for damage.
    """
    yield from describe_header(reader.header)
    words = _Words(reader.header, data)
    number = 0
    for event in reader:
        try:
            if event.kind.is_cause:
                number += 1
                yield f"{number:6} {event.seconds:12.6f}  {words.line(event)}"
            elif event.kind is not Kind.END:
                yield from (" " * 23 + line for line in words.lines(event))
        except (IndexError, ValueError) as error:
            raise CaptureError(f"{reader.path} is damaged: {error}") from error
    if not reader.complete:
        yield "the recording ends here without an end: the process was killed, or still runs"


def describe_header(header: Header) -> Iterator[str]:
    """What was recorded."""
    yield f"device    {header.device}, type {_name_of(header)}"
    if header.served:
        yield f"served    vq serve {' '.join(header.served)}"
    yield "queues    " + ", ".join(f"{name} ({size})" for name, size in header.queues)
    if header.from_outside:
        names = ", ".join(header.from_outside)
        yield f"outside   {names}: what comes there is not the driver's doing"
    if header.link is not None:
        yield f"link      {header.link['name']}, {header.link['ports']} ports"
    yield f"began     {header.began}"


def as_json(event: Event, header: Header) -> dict[str, Any]:
    """An event as JSON has it: bytes in hexadecimal."""
    fields: dict[str, Any] = {"seconds": round(event.seconds, 6), "event": event.kind.name.lower()}
    numbers, strings = event.numbers, event.strings
    match event.kind:
        case Kind.CHAINS:
            found = Found.from_event(numbers, strings)
            fields |= {
                "queue": _queue_name(header, found.queue),
                "avail_idx": found.index,
                "position": found.position,
                "chains": [_chain_as_json(chain) for chain in found.chains],
            }
        case Kind.USED:
            fields |= {
                "queue": _queue_name(header, numbers[0]),
                "used": [
                    {"head": head, "length": length, "bytes": data.hex()}
                    for head, length, data in zip(
                        numbers[1::2], numbers[2::2], strings, strict=True
                    )
                ],
            }
        case Kind.KICK | Kind.CALL | Kind.QUEUE_RESET | Kind.QUEUE_STOP | Kind.QUEUE_DROP:
            fields["queue"] = _queue_name(header, numbers[0])
        case Kind.ALARM:
            fields["alarm"] = numbers[0]
        case Kind.FEATURES:
            fields["features"] = _features(header, numbers)
        case _:
            fields |= {"numbers": list(numbers), "bytes": [data.hex() for data in strings]}
    return fields


def _chain_as_json(chain: FoundChain) -> dict[str, Any]:
    names = ("place", "addr", "len", "flags", "next")
    return {
        "head": chain.head,
        "descriptors": [dict(zip(names, entry, strict=True)) for entry in chain.descriptors],
        "tables": [{"gpa": gpa, "bytes": data.hex()} for gpa, data in chain.tables],
        "readable": [{"gpa": gpa, "bytes": data.hex()} for gpa, data in chain.buffers],
    }


class _Words:
    """Tells of events; knows the device's names."""

    def __init__(self, header: Header, data: bool) -> None:
        self._header = header
        self._most = 1 << 30 if data else _SHOWN

    def line(self, event: Event) -> str:
        """A cause."""
        numbers = event.numbers
        match event.kind:
            case Kind.MEMORY:
                pairs = zip(numbers[::2], numbers[1::2], strict=True)
                return "memory " + ", ".join(f"{gpa:#x}+{size:#x}" for gpa, size in pairs)
            case Kind.FEATURES:
                return "features " + ", ".join(_features(self._header, numbers))
            case Kind.STATUS:
                return f"status {_status(numbers[0])}"
            case Kind.CONFIG_READ:
                return f"reads config {numbers[0]}+{numbers[1]}: {event.strings[0].hex(' ')}"
            case Kind.CONFIG_WRITE:
                return f"writes config at {numbers[0]}: {event.strings[0].hex(' ')}"
            case Kind.QUEUE_SETUP | Kind.DISABLED_SETUP:
                index, size, _, desc, avail, used, position, *_ = numbers
                disabled = " disabled" if event.kind is Kind.DISABLED_SETUP else ""
                return (
                    f"sets up {self._queue(index)}{disabled}: {size} descriptors at {desc:#x},"
                    f" available {avail:#x}, used {used:#x}, from position {position}"
                )
            case Kind.QUEUE_RESET:
                return f"resets {self._queue(numbers[0])}"
            case Kind.QUEUE_STOP:
                return f"stops {self._queue(numbers[0])}"
            case Kind.KICK:
                return f"kick {self._queue(numbers[0])}"
            case Kind.RESET:
                return "reset"
            case Kind.LINK_READABLE:
                return f"the link's port {numbers[0]} has frames"
            case Kind.LINK_WRITABLE:
                return f"the link's port {numbers[0]} takes frames again"
            case Kind.LINK_CHANGED:
                return f"the link changed: {'up' if numbers[2] else 'down'}"
            case Kind.TURNS:
                return f"the device works {'in turns' if numbers[0] else 'until all is done'}"
            case Kind.HOST:
                name, arguments = (text.decode(errors="replace") for text in event.strings)
                return f"the host: {name}{arguments}"
            case Kind.ALARM:
                return f"alarm {numbers[0]} rings"
            case Kind.OUTSIDE:
                return "the host does something that is not recorded"
            case Kind.QUEUE_DROP:
                return f"takes {self._queue(numbers[0])} away"
        return event.kind.name.lower()

    def lines(self, event: Event) -> Iterator[str]:
        """What is no cause."""
        numbers, strings = event.numbers, event.strings
        match event.kind:
            case Kind.CHAINS:
                yield from self._found(Found.from_event(numbers, strings))
            case Kind.WISH:
                queue = self._queue(numbers[0])
                yield f"{queue}: the driver's flags are {numbers[1]}, used_event {numbers[2]}"
            case Kind.LINK_INPUT:
                for data in strings:
                    yield f"port {numbers[0]} gives {len(data) - 12} bytes: {self._bytes(data)}"
            case Kind.LINK_FULL:
                yield f"port {numbers[0]} is full"
            case Kind.LINK_BROKE:
                doing = "reading" if numbers[2] else "writing"
                yield f"port {numbers[0]} fails in {doing}: {os.strerror(numbers[1] & 0xFFF)}"
            case Kind.LINK_IS:
                yield f"the link delivers {_offloads(numbers[1])}, {'up' if numbers[2] else 'down'}"
            case Kind.USED:
                for head, length, data in zip(numbers[1::2], numbers[2::2], strings, strict=True):
                    wrote = f", {length} bytes written: {self._sample(length, data)}"
                    wrote = wrote if length else ""
                    yield f"{self._queue(numbers[0])}: {head} given back{wrote}"
            case Kind.CALL:
                yield f"{self._queue(numbers[0])}: call"
            case Kind.CONFIG_CHANGED:
                yield f"configuration change, status {_status(numbers[0])}"
            case Kind.LINK_OUTPUT:
                for length, data in zip(numbers[1:], strings, strict=True):
                    yield (
                        f"port {numbers[0]} gets {length} bytes: {self._sample(length, data[12:])}"
                    )
            case Kind.LINK_ASKED:
                asked = _offloads(numbers[1]) if numbers[0] == 0 else f"{numbers[1]} ports"
                yield f"the link is asked for {asked}"
            case Kind.ANSWER:
                yield f"answer {numbers[0]:#x}"
            case Kind.LATER:
                yield "a thread, or the host, has completed"

    def _found(self, found: Found) -> Iterator[str]:
        queue = self._queue(found.queue)
        if not found.chains:
            yield f"{queue}: the available index is {found.index}"
        for alike in _alike(found.chains):
            first, last = alike[0], alike[-1]
            heads = f"{first.head}" if len(alike) == 1 else f"{first.head} to {last.head}"
            yield f"{queue}: {heads} available{self._chain(first)}{' each' * (len(alike) > 1)}"

    def _chain(self, chain: FoundChain) -> str:
        data = b"".join(piece for _, piece in chain.buffers)
        room = _room(chain)
        parts = [f"{len(data)} bytes: {self._bytes(data)}"] if data else []
        parts += [f"room for {room}"] if room else []
        return (" in a table" if chain.tables else "") + ", " + (", ".join(parts) or "empty")

    def _bytes(self, data: bytes) -> str:
        return data[: self._most].hex(" ") + (" ..." if len(data) > self._most else "")

    def _sample(self, length: int, data: bytes) -> str:
        sample = Sample.unpack(length, data)
        shown = sample.start[: self._most]
        return shown.hex(" ") + (" ..." if length > len(shown) else "")

    def _queue(self, index: int) -> str:
        return _queue_name(self._header, index)


def _features(header: Header, words: Sequence[int]) -> list[str]:
    """The names of features that stand in 64-bit words, lowest bit first."""
    names = {int(feature): feature.name for feature in Feature} | header.feature_names
    features = sum(word << 64 * place for place, word in enumerate(words))
    return [names.get(bit, f"bit {bit}") for bit in bits(features)]


def _room(chain: FoundChain) -> int:
    return sum(length for _, length in chain.writable())


def _alike(chains: list[FoundChain]) -> Iterator[list[FoundChain]]:
    """Runs of chains with nothing to read, as much room and one head after another.

    Receive buffers come by the hundred.
    """
    run: list[FoundChain] = []
    for chain in chains:
        follows = (
            run
            and not chain.buffers
            and not run[-1].buffers
            and chain.head == run[-1].head + 1
            and _room(chain) == _room(run[-1])
            and bool(chain.tables) == bool(run[-1].tables)
        )
        if run and not follows:
            yield run
            run = []
        run.append(chain)
    if run:
        yield run


def _queue_name(header: Header, index: int) -> str:
    return header.queues[index][0] if index < len(header.queues) else f"queue {index}"


def _status(value: int) -> str:
    names = [bit.name or "" for bit in Status if value & bit]
    return f"{value:#x} ({', '.join(names)})" if names else f"{value:#x}"


def _offloads(value: int) -> str:
    return ", ".join(flag.name or "" for flag in Offload if flag and value & flag) or "no offloads"


def _name_of(header: Header) -> str:
    try:
        return f"{header.device_id} ({DeviceId(header.device_id).name.lower()})"
    except ValueError:
        return str(header.device_id)
