"""Where a port's bytes come from and go to on the host: a terminal, a Unix socket or a file.

A `HostEnd` is a stream of bytes each way with one peer at a time, who may come and go. It says who
is there and how large the terminal is; what that means to a guest is the console device's.

Whether somebody has a pseudo-terminal open, how large they made its window, and whether the peer of
a socket that it closed for writing is still there: no event loop tells. These are looked at a few
times a second while there is something to find out.
"""

from __future__ import annotations

import contextlib
import os
import stat
import termios
import tty
from abc import ABC, abstractmethod
from collections.abc import Callable

from vq import files
from vq.device import Watch
from vq.devices.hangup import hung_up, is_closed
from vq.errors import UsageError
from vq.log_limit import limited_logger
from vq.model import DeviceModel
from vq.request import Reader, Writer
from vq.unix_socket import Listener

__all__ = ["FileEnd", "HostEnd", "PtyEnd", "UnixEnd", "host_end"]

log = limited_logger(__name__)

SYSTEM_CALLS = ("accept4", "getsockname", "readv", "writev")
_TERMINAL = ("TIOCGWINSZ", "TCGETS", "TCSETSF")
_TERMINAL2 = (0x802C542A, 0x402C542D)
"""TCGETS2 and TCSETSF2, which glibc 2.42 and newer make of the same calls."""
IOCTLS = (*(getattr(termios, name) for name in _TERMINAL if hasattr(termios, name)), *_TERMINAL2)
"""Linux' for the size of a window, and for tcgetattr(3) and tcsetattr(3)."""
PROMISES = ("tty",)
"""OpenBSD's for the same."""

LOOK_SECONDS = 0.2
"""How often to look at what no event loop tells."""
RETRY_SECONDS = 1.0
"""How long a file that could not be written to is left alone."""
CHUNK = 1 << 18
"""Bytes written to a file at once, so that the rest of the process gets its turn."""


def _nothing() -> None:
    pass


class HostEnd(ABC):
    """The host's end of a port.

    `start` tells it the device that it belongs to and what to call: `readable` and `writable` when
    it has, or takes, bytes and `want` asked for that; `changed` when a peer came, went, or changed
    the size of its terminal. All calls come in the device's thread.
    """

    sized = False
    """Whether this kind of end is a terminal with a size."""

    def __init__(self, name: str) -> None:
        self.name = name
        """What it is and where: ``pty /dev/pts/7``, ``unix /run/console.sock``."""
        self.is_connected = False
        """Whether there is a peer."""
        self.size: tuple[int, int] | None = None
        """The terminal's (columns, rows), if it is known."""
        self._readable = self._writable = self._changed = _nothing

    def start(
        self,
        model: DeviceModel,
        *,
        readable: Callable[[], None],
        writable: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """The device is there; may call `changed`."""
        self._readable, self._writable, self._changed = readable, writable, changed
        self._begin(model)

    @property
    def is_listening(self) -> bool:
        """Whether what is written now gets to a peer: it may be gone with input of it unread."""
        return self.is_connected

    @abstractmethod
    def _begin(self, model: DeviceModel) -> None:
        """Starts to wait for a peer."""

    @abstractmethod
    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Says for what to wait; None leaves it as it is. Nothing is waited for without a peer."""

    @abstractmethod
    def fill(self, writer: Writer) -> int:
        """Reads what has come into a request; returns how many bytes, 0 when there are none."""

    @abstractmethod
    def drain(self, reader: Reader) -> int:
        """Writes the bytes of a request; returns how many were taken, 0 when it is full."""

    @abstractmethod
    def send(self, data: memoryview) -> int:
        """The same for bytes that are ours."""

    @abstractmethod
    def close(self) -> None:
        """Lets the peer go, and removes what was made on the host. Closing twice is allowed."""


class _StreamEnd(HostEnd):
    """An end with a descriptor that does not block, while there is a peer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._fd = -1
        self._watch: Watch | None = None

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        if self._watch is not None and self.is_connected:
            self._watch.want(reading=reading, writing=writing)

    def fill(self, writer: Writer) -> int:
        if not self.is_connected:
            return 0
        try:
            count = writer.from_file(self._fd)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._peer_gone(error)
            return 0
        if not count:
            self._input_ended()
        return count

    def drain(self, reader: Reader) -> int:
        return self._written(lambda: reader.to_stream(self._fd))

    def send(self, data: memoryview) -> int:
        return self._written(lambda: os.write(self._fd, data))

    def _written(self, write: Callable[[], int]) -> int:
        if not self.is_connected:
            return 0
        try:
            return write()
        except BlockingIOError:
            return 0
        except OSError as error:
            self._peer_gone(error)
            return 0

    def _input_ended(self) -> None:
        """Nothing more will come from the peer."""
        self._peer_gone(None)

    @abstractmethod
    def _peer_gone(self, error: OSError | None) -> None:
        """There is no peer any more."""


class UnixEnd(_StreamEnd):
    """A Unix stream socket at `path` that serves one client at a time; others wait in its queue.

    A client that has closed its writing side is served until it has closed the other one too.
    Raises `UsageError` and `OSError` as `Listener` does.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"unix {path}")
        self._listener = Listener(path)
        self._model: DeviceModel | None = None
        self._input_over = False

    def _begin(self, model: DeviceModel) -> None:
        self._model = model
        self._accepting = model.watch(self._listener.socket.fileno(), readable=self._accept)
        self._accepting.want(reading=True)
        self._look = model.alarm(self._look_for_peer, outside=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors, most likely
            log.warning("%s: cannot accept: %s", self.name, error)
            self._accepting.want(reading=False)
            self._look.set(RETRY_SECONDS)
            return
        sock.setblocking(False)
        self._fd = sock.detach()
        self._accepting.want(reading=False)
        self._input_over = False
        assert self._model is not None
        self._watch = self._model.watch(self._fd, readable=self._readable, writable=self._writable)
        self.is_connected = True
        self.want(reading=False)
        log.info("%s: a client has come", self.name)
        self._changed()

    def _input_ended(self) -> None:
        if hung_up(self._fd):
            self._peer_gone(None)
        else:
            self._input_over = True
            self.want(reading=False)

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """See `HostEnd`."""
        if self._input_over:
            reading = False  # its end was read: it would be readable for ever
        super().want(reading=reading, writing=writing)
        watch = self._watch
        if watch is not None and not watch.reading and self._look.deadline is None:
            self._look.set(LOOK_SECONDS)  # without reading nobody tells that the client is gone

    def _look_for_peer(self) -> None:
        if not self.is_connected:
            self._accepting.want(reading=True)
        elif hung_up(self._fd):
            self._peer_gone(None)
        elif self._watch is not None and not self._watch.reading:
            self._look.set(LOOK_SECONDS)

    def _peer_gone(self, error: OSError | None) -> None:
        if not self.is_connected:
            return
        log.info("%s: the client has gone%s", self.name, f": {error.strerror}" if error else "")
        self.is_connected = False
        self._look.set(None)
        self._let_go()
        self._accepting.want(reading=True)
        self._changed()

    def _let_go(self) -> None:
        if self._watch is not None and self._model is not None:
            self._model.unwatch(self._watch)
            self._watch = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """See `HostEnd`."""
        self.is_connected = False
        self._let_go()
        self._listener.close()


class PtyEnd(_StreamEnd):
    """A pseudo-terminal, and a symbolic link to it at `link` if one is wanted.

    `path` is what a terminal program opens (``screen``, ``tio``, ``socat``); whoever has it open is
    the peer. It is raw from the start: what is echoed or edited is the guest's to decide. The size
    is that which the peer set.

    Raises `UsageError` when something other than a link to a terminal is at `link`, `OSError` when
    the system has no terminal to give.
    """

    sized = True

    def __init__(self, link: str | None = None) -> None:
        self._fd, other = -1, -1
        fd, other = os.openpty()
        try:
            self.path = os.ttyname(other)
            tty.setraw(other)
            os.set_blocking(fd, False)
            if link is not None:
                _make_link(self.path, link)
        except BaseException:
            os.close(fd)
            raise
        finally:
            os.close(other)
        super().__init__(f"pty {self.path}")
        self._fd = fd
        self._link = link
        self._maker = os.getpid()

    @property
    def is_listening(self) -> bool:
        """See `HostEnd`. What is written to a terminal that nobody has open is lost."""
        return self.is_connected and not is_closed(self._fd)

    def _begin(self, model: DeviceModel) -> None:
        self._watch = model.watch(self._fd, readable=self._readable, writable=self._writable)
        self._look = model.alarm(self._look_around, outside=True)
        self._look_around()

    def _look_around(self) -> None:
        """Sees who is there, and how large their window is."""
        self._look.set(LOOK_SECONDS)
        there = not hung_up(self._fd)
        if there and not self.is_connected:
            with contextlib.suppress(OSError, termios.error):
                tty.setraw(self._fd)  # a BSD's terminal is as new each time that it is opened
            self.size = self._window()
            self.is_connected = True
            log.info("%s: opened", self.name)
            self._changed()
        elif not there and self.is_connected:
            self._peer_gone(None)
        elif there and (size := self._window()) != self.size:
            self.size = size
            self._changed()

    def _window(self) -> tuple[int, int] | None:
        try:
            rows, columns = termios.tcgetwinsize(self._fd)
        except (OSError, termios.error):
            return None
        return (columns, rows) if columns and rows else None

    def _peer_gone(self, error: OSError | None) -> None:
        if not self.is_connected:
            return
        log.info("%s: closed", self.name)
        # A terminal that nobody has open is readable for ever.
        self.want(reading=False, writing=False)
        self.is_connected = False
        self._changed()

    def close(self) -> None:
        """See `HostEnd`."""
        self.is_connected = False
        if self._fd >= 0:
            # A process that was forked since leaves the link to the one that made it.
            if self._link is not None and os.getpid() == self._maker:
                _remove_link(self.path, self._link)
            os.close(self._fd)
            self._fd = -1


class FileEnd(HostEnd):
    """A file that what the guest writes is added to, made where it is not there.

    Nothing is read. While it cannot be written to (a full disk), it has no peer, and is tried again
    every second. A symbolic link is not followed. Raises `OSError` when it cannot be opened,
    `UsageError` for what is no file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"file {path}")
        self._fd = files.open_to_append(path, mode=0o600)
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or path == os.devnull):
            os.close(self._fd)
            raise UsageError(f"{path} is not a file that can be written to")

    def _begin(self, model: DeviceModel) -> None:
        self._retry = model.alarm(self._try_again, outside=True)
        self._try_again()

    def _try_again(self) -> None:
        self.is_connected = True
        self._changed()

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """A file always takes what it is given, and gives nothing."""

    def fill(self, writer: Writer) -> int:
        """See `HostEnd`."""
        return 0

    def drain(self, reader: Reader) -> int:
        """See `HostEnd`."""
        return self._written(lambda: reader.to_stream(self._fd, min(CHUNK, reader.remaining)))

    def send(self, data: memoryview) -> int:
        """See `HostEnd`."""
        return self._written(lambda: os.write(self._fd, data[:CHUNK]))

    def _written(self, write: Callable[[], int]) -> int:
        if not self.is_connected:
            return 0
        try:
            return write()
        except OSError as error:
            log.warning("%s: what the guest writes is lost: %s", self.name, error)
            self.is_connected = False
            self._retry.set(RETRY_SECONDS)
            self._changed()
            return 0

    def close(self) -> None:
        """See `HostEnd`."""
        self.is_connected = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def host_end(text: str) -> HostEnd:
    """The end that a text stands for: ``pty``, ``pty:LINK``, ``unix:PATH`` or ``file:PATH``.

    Raises `UsageError` for other texts, and what the ends themselves raise.
    """
    kind, colon, place = text.partition(":")
    if kind == "pty" and bool(place) == bool(colon):
        return PtyEnd(place or None)
    if kind == "unix" and place:
        return UnixEnd(place)
    if kind == "file" and place:
        return FileEnd(place)
    raise UsageError(f"{text!r}: an end is pty, pty:LINK, unix:PATH or file:PATH")


def _make_link(target: str, link: str) -> None:
    """A symbolic link, in place of one to a terminal that was left there."""
    name = os.path.basename(link)
    try:
        with files.directory_of(link) as directory:
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if not stat.S_ISLNK(there.st_mode):
                    raise UsageError(f"{link} is there already, and is not a symbolic link")
                if os.path.dirname(os.readlink(name, dir_fd=directory)) != os.path.dirname(target):
                    raise UsageError(f"{link} is there already, and does not lead to a terminal")
                os.unlink(name, dir_fd=directory)
            os.symlink(target, name, dir_fd=directory)
    except OSError as error:  # which names the target first, that has nothing to do with it
        raise OSError(error.errno, error.strerror, link) from None


def _remove_link(target: str, link: str) -> None:
    """Removes a link of ours, unless it is another's by now."""
    name = os.path.basename(link)
    with contextlib.suppress(OSError), files.directory_of(link) as directory:
        if os.readlink(name, dir_fd=directory) == target:
            os.unlink(name, dir_fd=directory)
