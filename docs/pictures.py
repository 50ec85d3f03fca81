"""Draws the pictures of the documentation from what vq really does: `python docs/pictures.py`.

Nothing in them is made up. The ring's life is read out of a guest's memory after each step of a
driver and a device; the frame's life is what happened, in order, when a scripted guest sent one.
"""

from __future__ import annotations

import struct
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vq.abi import Feature, HdrFlag, ring_layout
from vq.driver import DriverRing
from vq.link import Frame, LoopbackLink, Port
from vq.memory import GuestMemory
from vq.net import NetDevice
from vq.net_driver import HEADER_APART, NetDriver, NetHeader
from vq.net_receive import ReceiveWindow
from vq.net_transmit import FrameMaker
from vq.packet import ones_complement_sum
from vq.split_ring import Chain, SplitRing

HERE = Path(__file__).parent / "pictures"
INK, FAINT, PAPER, CHANGED, LINE = "#1f2933", "#7b8794", "#ffffff", "#ffe9a8", "#cbd2d9"
FONT = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"


class Drawing:
    """An SVG picture, line by line."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {FONT}>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' fill='{PAPER}'/>",
        ]

    def text(
        self, x: float, y: float, text: str, *, size: int = 11, fill: str = INK, anchor: str = ""
    ) -> None:
        """One line of text, its baseline at `y`."""
        anchor = anchor and f" text-anchor='{anchor}'"
        self._parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}'{anchor}"
            f" xml:space='preserve'>{escape(text)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = PAPER,
        stroke: str = LINE,
    ) -> None:
        """A rectangle."""
        self._parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}'"
            f" stroke='{stroke}'/>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = LINE) -> None:
        """A straight line."""
        self._parts.append(
            f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{stroke}'/>"
        )

    def arrow(self, x1: float, x2: float, y: float) -> None:
        """A horizontal line with a head at `x2`."""
        self.line(x1, y, x2, y, INK)
        back = 6 if x2 < x1 else -6
        self._parts.append(f"<path d='M{x2:g},{y:g} l{back},-4 l0,8 z' fill='{INK}'/>")

    def save(self, name: str) -> None:
        """Writes the picture beside the others."""
        HERE.mkdir(exist_ok=True)
        (HERE / name).write_text("\n".join([*self._parts, "</svg>"]) + "\n")


# --- the ring's life -----------------------------------------------------------------------------

SIZE = 4
DESC, AVAIL, USED = 0x1000, 0x1100, 0x1200


class RingLife:
    """A queue of four descriptors, and a picture of its memory after each step."""

    def __init__(self) -> None:
        self.memory = GuestMemory.allocate(1 << 16)
        self.steps: list[tuple[str, list[str], bytes, str]] = []

    def note(self, title: str, words: list[str], device: str) -> None:
        """Keeps what stands in the queue's memory now."""
        layout = ring_layout(SIZE)
        snapshot = b"".join(
            self.memory.read(gpa, length)
            for gpa, length in (
                (DESC, layout.desc_bytes),
                (AVAIL, layout.avail_bytes),
                (USED, layout.used_bytes),
            )
        )
        self.steps.append((title, words, snapshot, device))

    def live(self) -> None:
        """One request from the driver to the device and back."""
        memory = self.memory
        features = 1 << Feature.VERSION_1
        driver = DriverRing(memory, SIZE, DESC, AVAIL, USED, features=features)
        device = SplitRing(memory, SIZE, DESC, AVAIL, USED, features=features)
        note = self.note
        note("The driver has set up the queue", ["all is zero"], "next_avail 0   next_used 0")
        driver.add([(0x4000, 16)], [(0x5000, 512), (0x6000, 1)])
        driver.add([(0x4100, 64)], [])
        note(
            "It adds two chains",
            ["descriptors in their table;", "the device is not told yet"],
            "next_avail 0   next_used 0",
        )
        driver.publish()
        note("It publishes avail.idx and kicks", ["now they are the device's"], "kicked")
        chains = device.pop_burst(SIZE)
        positions = f"next_avail {device.next_avail}   next_used {device.next_used}"
        note("The device pops a burst", ["nothing in memory changes:", "it has copies"], positions)
        for chain, written in zip(chains, (513, 0), strict=True):
            chain.written = written
        device.write_used_burst(chains)
        positions = f"next_avail {device.next_avail}   next_used {device.next_used}"
        note("It fills buffers, writes used elements", ["the driver cannot see them"], positions)
        device.publish()
        note("It publishes used.idx and calls", ["now they are the driver's"], positions)
        collected = driver.collect()
        words = [f"head {used.head}: {used.written} bytes written" for used in collected]
        note("The driver collects", words, positions)

    def draw(self) -> None:
        """A column for each step; what the step changed is marked."""
        width, height = 214, 400
        columns = 4
        rows = -(-len(self.steps) // columns)
        drawing = Drawing(columns * width + 20, rows * height + 10, "The life of a split ring")
        before = self.steps[0][2]
        for index, (title, words, snapshot, device) in enumerate(self.steps):
            x = 10 + index % columns * width
            y = 10 + index // columns * height
            self._draw_step(drawing, x, y, f"{index + 1}. {title}", words, snapshot, before, device)
            before = snapshot
        drawing.save("ring-life.svg")

    def _draw_step(
        self,
        drawing: Drawing,
        x: int,
        y: int,
        title: str,
        words: list[str],
        now: bytes,
        before: bytes,
        device: str,
    ) -> None:
        for number, line in enumerate(textwrap.wrap(title, 30)):
            drawing.text(x, y + 14 + 13 * number, line, size=10)
        for number, line in enumerate(words):
            drawing.text(x, y + 43 + 13 * number, line, size=9, fill=FAINT)
        y += 76
        drawing.text(x, y, "   addr    len  flags next", size=10, fill=FAINT)
        for slot in range(SIZE):
            addr, length, flags, following = struct.unpack_from("<QIHH", now, 16 * slot)
            changed = now[16 * slot : 16 * slot + 16] != before[16 * slot : 16 * slot + 16]
            names = ("N" if flags & 1 else "-") + ("W" if flags & 2 else "-")
            text = f"{slot}  {addr:#06x} {length:>4}   {names}    {following}"
            self._cell(drawing, x, y + 6 + 20 * slot, text, changed)
        y += 6 + 20 * SIZE + 20
        start = 16 * SIZE
        self._draw_ring(drawing, x, y, "avail", now[start:], before[start:], "<H", "head {}")
        y += 12 + 20 * (SIZE // 2 + 1) + 16
        start += ring_layout(SIZE).avail_bytes
        self._draw_ring(drawing, x, y, "used", now[start:], before[start:], "<II", "head {} len {}")
        y += 12 + 20 * (SIZE // 2 + 1) + 18
        drawing.text(x, y, "device: " + device, size=9, fill=FAINT)

    def _draw_ring(
        self,
        drawing: Drawing,
        x: int,
        y: int,
        name: str,
        now: bytes,
        before: bytes,
        form: str,
        words: str,
    ) -> None:
        _, index = struct.unpack_from("<HH", now)
        drawing.text(x, y, f"{name} ring", size=9, fill=FAINT)
        self._cell(drawing, x, y + 6, f"idx {index}", now[2:4] != before[2:4])
        size = struct.calcsize(form)
        for slot in range(2):
            place = 4 + size * slot
            text = f"[{slot}] " + words.format(*struct.unpack_from(form, now, place))
            changed = now[place : place + size] != before[place : place + size]
            self._cell(drawing, x, y + 26 + 20 * slot, text, changed)

    def _cell(self, drawing: Drawing, x: float, y: float, text: str, changed: bool) -> None:
        drawing.box(x, y, 196, 20, CHANGED if changed else PAPER)
        drawing.text(x + 6, y + 14, text, size=10)


# --- the frame's life ----------------------------------------------------------------------------

PLACES = ("driver", "guest memory", "SplitRing", "NetDevice", "Link")


class FrameLife:
    """What happens, in order, to a frame that goes from a guest to a link and back."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str, str]] = []

    def note(self, source: str, target: str, words: str) -> None:
        """One thing that happened: from whom, to whom, in words."""
        self.steps.append((source, target, words))

    def live(self) -> None:
        """Sends a frame whose checksum is left undone, and watches the boundaries it crosses."""
        memory = GuestMemory.allocate(1 << 24)
        link = LoopbackLink()
        guest = NetDriver(NetDevice(link, memory=memory), memory)
        note = self.note

        def popped(ring: SplitRing, chains: list[Chain]) -> None:
            if ring.name == "tx0" and chains:
                words = f"pop_burst: {len(chains)} chain, every descriptor read once and checked"
                note("guest memory", "SplitRing", words)

        def made(*_: object) -> None:
            note("SplitRing", "NetDevice", "the net header is copied, then checked")

        def written(port: Port, frames: Sequence[Frame]) -> None:
            note("NetDevice", "Link", f"write_burst: {_pieces(frames[0])}")

        def given_back(ring: SplitRing, chains: Iterable[Chain]) -> None:
            if list(chains):
                words = "write_used_burst: " + ("sent" if ring.name == "tx0" else "filled")
                note("NetDevice", "SplitRing", words)

        def published(ring: SplitRing, count: int) -> None:
            if count:
                note("SplitRing", "guest memory", f"publish: used.idx of {ring.name}, then a call")

        def lent(window: ReceiveWindow, views: Sequence[memoryview]) -> None:
            if views:
                note("NetDevice", "Link", f"views: room of {sum(map(len, views))} bytes is lent")

        def committed(window: ReceiveWindow, header: bytes, length: int) -> None:
            note("Link", "guest memory", f"{length} bytes go straight into the room")
            note("NetDevice", "guest memory", "the net header, with num_buffers")

        with Watched() as watched:
            watched.after(SplitRing, "pop_burst", popped)
            watched.before(FrameMaker, "make", made)
            watched.before(type(link.ports[0]), "write_burst", written)
            watched.before(SplitRing, "write_used_burst", given_back)
            watched.after(SplitRing, "publish", published)
            watched.after(ReceiveWindow, "views", lent)
            watched.before(ReceiveWindow, "commit", committed)
            note("driver", "guest memory", "header and frame in two buffers, avail.idx, kick")
            guest.send(_udp_frame(), _LEFT_UNDONE, layout=HEADER_APART)
        (received,) = guest.receive()
        note(
            "guest memory", "driver", f"collects {len(received.data)} bytes, checksum still undone"
        )

    def draw(self) -> None:
        """Who did what to whom, from top to bottom."""
        column, row = 200, 36
        height = 70 + row * len(self.steps)
        width = column * len(PLACES)
        drawing = Drawing(width, height, "The life of a frame")
        middles = {name: column * (index + 0.5) for index, name in enumerate(PLACES)}
        for name, x in middles.items():
            drawing.box(x - 70, 10, 140, 26, CHANGED if name == "guest memory" else PAPER)
            drawing.text(x, 27, name, anchor="middle")
            drawing.line(x, 36, x, height - 10)
        for number, (source, target, words) in enumerate(self.steps):
            y = 76 + row * number
            drawing.arrow(middles[source], middles[target], y)
            half = 2.9 * len(words)
            x = min(max((middles[source] + middles[target]) / 2, half), width - half)
            drawing.box(x - half, y - 15, 2 * half, 11, stroke=PAPER)  # over the lines behind it
            drawing.text(x, y - 6, words, size=9, anchor="middle")
        drawing.save("frame-life.svg")


_LEFT_UNDONE = NetHeader(flags=int(HdrFlag.NEEDS_CSUM), csum_start=34, csum_offset=6)


def _udp_frame() -> bytes:
    """1480 bytes of UDP in IPv4; the checksum field has the pseudo-header's sum, and no more."""
    ethernet = bytes.fromhex("fee1bad1bad1 fee1bad1bad2 0800")
    length = 1480 - 34
    source, target = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, 17, 0, source, target)
    sum_ = ones_complement_sum([source + target + struct.pack(">BBH", 0, 17, length)])
    return ethernet + ip + struct.pack(">HHHH", 1000, 2000, length, sum_) + bytes(length - 8)


def _pieces(frame: Frame) -> str:
    return " + ".join(
        f"{len(piece)} bytes" + (" of ours" if isinstance(piece, bytes) else " of guest memory")
        for piece in frame
    )


class Watched:
    """Methods that tell when they are called, until the end of the block."""

    def __init__(self) -> None:
        self._saved: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for kind, name, method in reversed(self._saved):
            setattr(kind, name, method)

    def before(self, kind: type, name: str, tell: Callable[..., object]) -> None:
        """`tell` gets the arguments of the call."""
        method = getattr(kind, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tell(*args)
            return method(*args, **kwargs)

        self._saved.append((kind, name, method))
        setattr(kind, name, wrapper)

    def after(self, kind: type, name: str, tell: Callable[..., object]) -> None:
        """`tell` gets the object and what the call returned."""
        method = getattr(kind, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            tell(args[0], result)
            return result

        self._saved.append((kind, name, method))
        setattr(kind, name, wrapper)


def main() -> None:
    """Draws them all."""
    for life in (RingLife(), FrameLife()):
        life.live()
        life.draw()


if __name__ == "__main__":
    main()
