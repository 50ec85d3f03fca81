"""A memory balloon (virtio 1.3, 5.5): the guest lends pages to the host, which frees them.

A device of a type that vq does not ship, as an example of what a model may have: fields of the
configuration space that the driver writes, a buffer that is kept until the device wants it, guest
memory beside the queues, a descriptor of the host's, a timer. Linux drives it, by virtio_balloon::

    $ cd examples; vq serve balloon:Balloon --socket /tmp/balloon.sock --with control=/tmp/balloon
    $ linux.uml mem=256M initrd=... virtio_uml.device=/tmp/balloon.sock:5
    $ echo 64 > /tmp/balloon    # the guest shall do without 64 MiB

tests/guests/test_balloon.py boots a guest with it.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import struct
from collections.abc import Sequence

from vq import AddressError, DeviceModel, DriverError, Request
from vq.abi import DeviceId

PAGE = 4096
"""What page numbers count, whatever the guest's pages are (5.5.6)."""
MADV_REMOVE = 9
"""madvise(2), Linux: frees pages of a shared mapping and what backs them; they read as zeros."""
PAGES_AT_ONCE = 1 << 16
"""In one request. Linux sends 256."""
STATISTICS_SECONDS = 1.0


class Feature(enum.IntEnum):
    """5.5.3"""

    MUST_TELL_HOST = 0
    STATS_VQ = 1
    DEFLATE_ON_OOM = 2


class Config(ctypes.LittleEndianStructure):
    """5.5.4"""

    _fields_ = (
        ("num_pages", ctypes.c_uint32),  # the device's: what the guest shall do without
        ("actual", ctypes.c_uint32),  # the driver's: what it does without
    )


class Balloon(DeviceModel):
    """Pages that the guest has put into the balloon are freed on the host.

    `control` is the path of a FIFO to make, from which lines with a number of MiB are read.
    `lent` has the numbers of the pages in the balloon, `memory_statistics` what the guest said of
    its memory last, by tag (5.5.6.3).
    """

    device_id = DeviceId.BALLOON
    feature_bits = Feature
    config_writable = ("actual",)
    host_methods = ("set_target",)  # a recorded session has it, and a replay does it again

    def __init__(self, control: str | None = None) -> None:
        super().__init__(
            queues=[
                ("inflate", 128, self._inflate),
                ("deflate", 128, self._deflate),
                ("statistics", 16, self._statistics),
            ],
            features=Feature,
            config=Config(),
        )
        self.lent: set[int] = set()
        self.memory_statistics: dict[int, int] = {}
        self._kept: Request | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._again = self.alarm(self._ask_for_statistics)
        self._control: int | None = None
        self._path = control
        if control is not None:
            os.mkfifo(control, 0o600)
            # For writing as well, so that it does not end when one writer has gone.
            self._control = os.open(control, os.O_RDWR | os.O_NONBLOCK)
            self._watch = self.watch(self._control, readable=self._read_control)
            self._watch.want(reading=True)

    def set_target(self, mebibytes: int) -> None:
        """Asks the guest to do without that much. In the device's own thread."""
        self.update_config(num_pages=(mebibytes << 20) // PAGE)

    def close(self) -> None:
        """Takes the FIFO away."""
        super().close()
        if self._control is not None:
            self.unwatch(self._watch)
            os.close(self._control)
            self._control = None
            if self._path is not None and os.path.exists(self._path):
                os.unlink(self._path)

    # --- what the driver does ---------------------------------------------------------------------

    def _inflate(self, requests: Sequence[Request]) -> None:
        for request in requests:
            for number in self._page_numbers(request):
                self.lent.add(number)
                self._free(number)
            request.complete()

    def _deflate(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.lent.difference_update(self._page_numbers(request))
            request.complete()

    def _page_numbers(self, request: Request) -> Sequence[int]:
        data = request.reader.read(limit=4 * PAGES_AT_ONCE)
        if len(data) % 4:
            raise DriverError("page numbers have four bytes each", section="5.5.6")
        numbers = struct.unpack(f"<{len(data) // 4}I", data)
        for number in numbers:
            if not self._is_memory(number):
                raise DriverError(f"page {number:#x} is no memory", section="5.5.6")
        return numbers

    def _is_memory(self, number: int) -> bool:
        assert self.memory is not None, "there is a ring"
        try:
            self.memory.hvaddr(number * PAGE, PAGE)
        except AddressError:
            return False
        return True

    def _free(self, number: int) -> None:
        """The page's content may be lost from now on (5.5.6.1), so the host's memory is freed."""
        assert self.memory is not None
        if mmap.PAGESIZE != PAGE:
            return  # the host could only free the guest's neighbouring pages with it
        address = self.memory.hvaddr(number * PAGE, PAGE)
        if self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), MADV_REMOVE):
            self.stats[f"not freed: {os.strerror(ctypes.get_errno())}"] += 1
        else:
            self.stats["freed"] += 1

    def _statistics(self, requests: Sequence[Request]) -> None:
        """The driver places a buffer at once; giving it back asks for the next one (5.5.6.3)."""
        for request in requests:
            data = request.reader.read(limit=PAGE)
            whole = len(data) // 10 * 10
            self.memory_statistics = dict(struct.iter_unpack("<HQ", data[:whole]))
            if self._kept is not None:
                self._kept.complete()  # one is enough
            self._kept = request
        self._again.set(STATISTICS_SECONDS)

    def _ask_for_statistics(self) -> None:
        if self._kept is not None:
            self._kept.complete()
            self._kept = None

    def device_reset(self) -> None:
        """The pages are the next driver's; the target stays, which is the host's."""
        self.lent.clear()
        self.memory_statistics = {}
        self._kept = None
        self._again.set(None)

    # --- what the host does -----------------------------------------------------------------------

    def _read_control(self) -> None:
        assert self._control is not None
        try:
            words = os.read(self._control, 4096).split()
        except BlockingIOError:
            return
        if words and words[-1].isdigit():
            self.set_target(min(int(words[-1]), (1 << 32) * PAGE - 1 >> 20))
