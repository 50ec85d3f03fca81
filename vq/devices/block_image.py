"""What a block device keeps its bytes in: a raw file or a block device of the host's.

An `Image` moves whole ranges between the file and buffers of any framing. Several threads may use
one at a time. What the host cannot do is found out when it is opened: direct I/O and its alignment,
reads that do not wait, deallocation. All numbers are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vq.abi_block import SECTOR
from vq.devices.image_lock import lock_image
from vq.errors import UsageError
from vq.log_limit import limited_logger
from vq.packet import cut
from vq.request import IOV_MAX

__all__ = ["FALLOC_FL_KEEP_SIZE", "FALLOC_FL_PUNCH_HOLE", "FALLOC_FL_ZERO_RANGE", "Image"]

log = limited_logger(__name__)

SYSTEM_CALLS = (*("fallocate", "fdatasync", "preadv", "preadv2", "pwritev", "pwritev2"),)

# Linux' fallocate(2) (linux/falloc.h).
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16

_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
_CHUNK = 1 << 20
"""Bytes that are copied at a time where they have to be."""

BLOCK_SIZES = (512, 1024, 2048, 4096)

_FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "VMDK", b"vhdxfile": "VHDX", b"QED\0": "QED"}
"""How files begin that hold a disk in another form than its own bytes."""

Views = Sequence[memoryview]


class Image:
    """A raw image, open and locked against anybody else who writes to it.

    `block_size` is the smallest unit that a guest shall use, a power of two from 512 to 4096; by
    default what direct I/O needs, else 512. With `direct` nothing goes through the host's page
    cache. Where the guest's buffers are not aligned for that they are copied.

    Raises `UsageError` for what is no image, is in use, or cannot do what is asked, and `OSError`
    when the system refuses. A symbolic link is not followed. What looks like an image of another
    format, or ends in the middle of a block, is logged as a warning.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        read_only: bool = False,
        direct: bool = False,
        block_size: int | None = None,
    ) -> None:
        self.path = str(path)
        self.read_only = read_only
        self.direct = direct
        self.size = 0
        """How long the image is, in whole blocks. See `measure`."""
        self._flushing = _Flush()
        self._fd = _open(self.path, read_only=read_only, direct=direct)
        try:
            self._lock()
            least = self._direct_alignment() if direct else SECTOR
            self.block_size = least if block_size is None else block_size
            if self.block_size not in BLOCK_SIZES or self.block_size < least:
                raise UsageError(
                    f"a block size of {block_size} for {self.path}, which can have"
                    f" {least} to 4096 in powers of two"
                )
            self.measure()
            self._warn_of_format()
            if not self.size:
                raise UsageError(f"{self.path} has no room for a block of {self.block_size} bytes")
            self.reads_cached = not direct and self._can_read_cached()
            """Whether `read_cached` works here."""
            self.deallocates = not read_only and self._can_deallocate()
            """Whether `discard` works here."""
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Gives the file back, and its lock. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def measure(self) -> bool:
        """Looks how long the image is now; whether that has changed."""
        before = self.size
        end = os.lseek(self._fd, 0, os.SEEK_END)
        self.size = end // self.block_size * self.block_size
        if before != self.size != end and self.size:
            log.warning(
                "%s: its last %d bytes are no whole block, and not part of the disk",
                self.path,
                end - self.size,
            )
        return self.size != before

    @property
    def physical_block_size(self) -> int:
        """What the file system or disk likes to have written at once."""
        preferred = os.fstat(self._fd).st_blksize
        return max(self.block_size, 1 << min(max(preferred, 1).bit_length() - 1, 16))

    # --- what a guest asks for --------------------------------------------------------------------

    def read(self, offset: int, views: Views) -> None:
        """Fills the views from `offset` on. Raises `OSError`, also where the file ends before."""
        offset, views = self._transfer(os.preadv, offset, views)
        for start, copy in _copies(views):  # of what direct I/O cannot reach where it lies
            self._transfer(os.preadv, offset + start, [copy], aligned=True)
            for view in cut(views, start, start + len(copy)):
                view[:], copy = copy[: len(view)], copy[len(view) :]

    def read_cached(self, offset: int, views: Views) -> int:
        """Fills what can be filled without waiting for a disk: so many bytes from the first on."""
        try:
            return os.preadv(self._fd, views[:IOV_MAX], offset, _RWF_NOWAIT)
        except OSError:  # nothing can, or it is for `read` to say what is wrong
            return 0

    def write(self, offset: int, views: Views) -> None:
        """Writes the views from `offset` on. Raises `OSError`."""
        offset, views = self._transfer(os.pwritev, offset, views)
        for start, copy in _copies(views):
            rest = copy
            for view in cut(views, start, start + len(copy)):
                rest[: len(view)], rest = view, rest[len(view) :]
            self._transfer(os.pwritev, offset + start, [copy], aligned=True)

    def flush(self) -> None:
        """Returns when all that was written before is on the disk. Raises `OSError`.

        A system tells of bytes that it could not write once and forgets them; so once this has
        failed it fails for ever.
        """
        self._flushing.run(lambda: os.fdatasync(self._fd))

    def discard(self, offset: int, length: int) -> None:
        """Gives back the room of a range, if that can be done there. Raises `OSError`."""
        with _unless_unsupported():
            self._punch(offset, length)

    def write_zeroes(self, offset: int, length: int, *, deallocate: bool) -> None:
        """Makes a range zeros, and gives back its room if that may be. Raises `OSError`."""
        with _unless_unsupported():
            if deallocate and self.deallocates:
                return self._punch(offset, length)
        with _unless_unsupported():
            return _fallocate(self._fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)
        zeros = memoryview(mmap.mmap(-1, min(length, _CHUNK)))
        for start in range(0, length, _CHUNK):
            self._transfer(os.pwritev, offset + start, [zeros[: length - start]])

    # --- inside -----------------------------------------------------------------------------------

    def _transfer(
        self,
        call: Callable[[int, Views, int], int],
        offset: int,
        views: Views,
        *,
        aligned: bool = False,
    ) -> tuple[int, Views]:
        """Moves all bytes; what is left is what direct I/O refuses to take from where it lies."""
        while views:
            try:
                done = call(self._fd, views[:IOV_MAX], offset)
            except OSError as error:
                if self.direct and error.errno == errno.EINVAL and not aligned:
                    break
                raise
            if not done:
                raise OSError(errno.EIO, f"the image ends at {offset}", self.path)
            offset += done
            views = cut(views, done)
        return offset, views

    def _lock(self) -> None:
        if not lock_image(self._fd, read_only=self.read_only):
            raise UsageError(f"{self.path} is in use by another process")

    def _warn_of_format(self) -> None:
        """A guest may write such bytes to a raw disk itself: it is no error."""
        start = memoryview(mmap.mmap(-1, 4096))
        os.preadv(self._fd, [start], 0)
        for magic, name in _FORMATS.items():
            if bytes(start[: len(magic)]) == magic:
                log.warning(
                    "%s looks like %s; the guest gets its bytes as they are", self.path, name
                )

    def _direct_alignment(self) -> int:
        """The shortest read that direct I/O does here."""
        page = memoryview(mmap.mmap(-1, 4096))
        for size in BLOCK_SIZES:
            try:
                os.preadv(self._fd, [page[:size]], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return size
        raise UsageError(f"{self.path} cannot be read directly in blocks of up to 4096 bytes")

    def _can_read_cached(self) -> bool:
        if not _RWF_NOWAIT:
            return False
        try:
            os.preadv(self._fd, [bytearray(1)], 0, _RWF_NOWAIT)
        except OSError as error:
            return error.errno == errno.EAGAIN
        return True

    def _punch(self, offset: int, length: int) -> None:
        _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _can_deallocate(self) -> bool:
        """Tried behind the end, where a file has nothing to lose. A disk refuses that for another
        reason; what it can do shows when it is asked to."""
        try:
            self._punch(os.lseek(self._fd, 0, os.SEEK_END), self.block_size)
        except OSError as error:
            return error.errno not in _UNSUPPORTED
        return True


class _Flush:
    """One flush for all who wait for one, begun after the last of them came."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._begun = self._ended = 0
        self._error: OSError | None = None

    def run(self, flush: Callable[[], None]) -> None:
        with self._change:
            mine = self._begun + 1
            self._change.wait_for(lambda: self._begun == self._ended or self._ended >= mine)
            if self._ended < mine:
                self._begun = mine = self._begun + 1
            else:
                mine = 0
        if mine:
            error = None
            try:
                flush()
            except OSError as failure:
                error = failure
            with self._change:
                self._ended = mine
                self._error = self._error or error
                self._change.notify_all()
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror)


def _copies(views: Views) -> Iterator[tuple[int, memoryview]]:
    """Room for the bytes of the views elsewhere, a part at a time, with where each part begins."""
    length = sum(map(len, views))
    room = memoryview(mmap.mmap(-1, min(length, _CHUNK))) if length else memoryview(b"")
    for start in range(0, length, _CHUNK):
        yield start, room[: length - start]


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """EINVAL is what a disk says of a range that is no multiple of its own sectors."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EINVAL):
            raise


def _open(path: str, *, read_only: bool, direct: bool) -> int:
    """Opens a file or disk and nothing else; a disk that is in use is not opened for writing."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if direct:
        if not _O_DIRECT:
            raise UsageError("this system has no direct I/O")
        flags |= _O_DIRECT
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise UsageError(f"{path} is a symbolic link: name what it leads to")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{path} is neither a file nor a block device")
    if stat.S_ISBLK(mode) and not read_only:
        flags |= os.O_EXCL  # open(2): refused while the disk is mounted
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UsageError(f"{path} is in use, perhaps mounted") from None
        if error.errno == errno.EINVAL and direct:
            raise UsageError(f"{path} is on a file system without direct I/O") from None
        raise
    if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
        os.close(fd)
        raise UsageError(f"{path} was replaced while it was opened")
    return fd


_libc = ctypes.CDLL(None, use_errno=True)
_libc_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
if _libc_fallocate is not None:
    _libc_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Linux' fallocate(2); ENOSYS where there is none."""
    if _libc_fallocate is None:
        raise OSError(errno.ENOSYS, "no fallocate")
    while _libc_fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
