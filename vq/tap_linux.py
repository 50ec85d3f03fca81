"""Linux's tap as a `Link`: one file descriptor per queue, a `virtio_net_hdr` on every frame.

The kernel speaks virtio's own header (`IFF_VNET_HDR`), so that a frame goes between guest memory
and the kernel as it is: nothing is translated here. What the kernel may leave undone in the frames
it gives is told to it with TUNSETOFFLOAD; what it takes undone is always the same.

Opening a tap that is not there creates it, which needs CAP_NET_ADMIN; a persistent tap that belongs
to the user does not. Addresses, routes and bridges are left to the system's own tools, and so is
doing in software what the kernel cannot.

Sources: uapi/linux/if_tun.h, drivers/net/tun.c, netdevice(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from vq.abi import NET_HDR_SIZE
from vq.errors import UsageError
from vq.ioctl import Direction
from vq.ioctl import linux as _number
from vq.link import MAX_FRAME, Tap
from vq.netlink import interface_in
from vq.offload import Offload, TunF, tun_flags_for, tun_offloads
from vq.tap_linux_port import ETHER_HEADER, TAGS, LinuxTapPort, in_words

__all__ = ["LinuxTap"]

DEVICE = "/dev/net/tun"

TUNSETIFF = _number(Direction.WRITE, "T", 202, 4)
TUNSETPERSIST = _number(Direction.WRITE, "T", 203, 4)
TUNGETFEATURES = _number(Direction.READ, "T", 207, 4)
TUNSETOFFLOAD = _number(Direction.WRITE, "T", 208, 4)
TUNGETIFF = _number(Direction.READ, "T", 210, 4)
TUNGETVNETHDRSZ = _number(Direction.READ, "T", 215, 4)
TUNSETVNETHDRSZ = _number(Direction.WRITE, "T", 216, 4)
TUNSETQUEUE = _number(Direction.WRITE, "T", 217, 4)
TUNSETVNETLE = _number(Direction.WRITE, "T", 220, 4)
TUNGETVNETLE = _number(Direction.READ, "T", 221, 4)
TUNSETCARRIER = _number(Direction.WRITE, "T", 226, 4)
TUNGETDEVNETNS = _number(Direction.NONE, "T", 227, 0)

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 3
IFF_UP = 1

IFNAMSIZ = 16
IFREQ = struct.Struct("16sH22x" if struct.calcsize("P") == 8 else "16sH14x")
"""`struct ifreq` with a u16 of flags: 40 bytes, 32 where pointers have 4."""
IFREQ_INT = struct.Struct("16si20x" if struct.calcsize("P") == 8 else "16si12x")
IFREQ_POINTER = struct.Struct("16sP16x" if struct.calcsize("P") == 8 else "16sP12x")
DRVINFO = struct.Struct("=I32s32s32s32s32s12s5I")

T = TypeVar("T")


class LinuxTap(Tap):
    """A Linux tap with one port per queue."""

    port_ioctls = (TUNSETQUEUE,)
    control_ioctls = (
        *(TUNSETOFFLOAD, TUNGETIFF, TUNGETDEVNETNS, TUNSETCARRIER, TUNSETPERSIST),
        *(SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU),
    )

    ports: tuple[LinuxTapPort, ...] = ()
    known_flags: TunF
    """Each TUN_F_* flag that this kernel knows."""

    _fds: tuple[int, ...]
    _control: socket.socket
    _namespace: str | None = None

    def __init__(
        self,
        name: str = "tap%d",
        *,
        queues: int = 1,
        persist: bool = False,
        namespace: str | None = None,
    ) -> None:
        """Attaches to the tap `name`, or creates it; the kernel fills in a ``%d``.

        With `persist` the tap outlives this object. `namespace` is a network namespace, the name of
        one that ``ip netns`` made or a path; without it the tap is looked for in our own.

        Raises `UsageError` for a name that cannot be a tap's and for more queues than the tap has,
        `OSError` with a plain sentence for what the kernel refuses.
        """
        _check_name(name)
        if queues < 1:
            raise UsageError(f"a tap has at least one queue, not {queues}")
        self._namespace = namespace
        self._take(_in_namespace(namespace, lambda: _open_queues(name, queues)))
        if persist:
            self._or_close(lambda: fcntl.ioctl(self._fds[0], TUNSETPERSIST, 1))

    @classmethod
    def from_fds(cls, fds: Sequence[int]) -> LinuxTap:
        """A tap that somebody else has opened, one descriptor per queue; all are taken over.

        Each must have been attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. They are closed
        also when this fails: with `UsageError` when one is no such tap.
        """
        tap = cls.__new__(cls)
        tap._take(fds)
        return tap

    # --- what all ports share ---

    @property
    def is_gone(self) -> bool:
        """Whether the interface was deleted; then the descriptors are of none."""
        return not all(map(_is_attached, self._fds))

    def recover(self) -> None:
        """See `Link.recover`."""
        if self.attach_again() and self.on_change is not None:
            self.on_change()

    def attach_again(self) -> bool:
        """See `Tap.attach_again`.

        An interface is looked for where the old one was opened. tun.c: a descriptor whose
        interface is gone can be attached anew.
        """
        lost = [fd for fd in self._fds if not _is_attached(fd)]
        name, queues = self.name, len(self._fds)
        if not lost or not _in_namespace(
            self._namespace, lambda: _attach_to_present(lost, name, queues)
        ):
            return False
        self._set_up_queues()
        self.was_attached_again()
        self.request_offloads(Offload.NONE)
        return True

    def was_attached_again(self) -> None:
        """See `Tap.was_attached_again`: each queue that is attached is in use."""
        for port in self.ports:
            port.active = True

    def request_offloads(self, wanted: Offload) -> None:
        """Tells the kernel what it may leave undone; frames that wait already stay as they are."""
        flags = tun_flags_for(wanted, self.known_flags)
        fcntl.ioctl(self._fds[0], TUNSETOFFLOAD, int(flags))
        self.expect(tun_offloads(flags), self.mtu)

    def expect(self, delivers: Offload, mtu: int | None) -> None:
        """See `Tap.expect`."""
        self.delivers = delivers
        if delivers & ~Offload.CSUM or mtu is None:
            self.max_frame = MAX_FRAME
        else:
            self.max_frame = min(ETHER_HEADER + TAGS + mtu, MAX_FRAME)
        for port in self.ports:
            port.expect(self.max_frame)

    @property
    def ports_are_apart(self) -> bool:  # type: ignore[override]
        """Each queue has a descriptor of its own, and an io_uring."""
        return len(self.ports) > 1

    def serve_apart(self, ports: Collection[int], on_truncated: Callable[[], None]) -> None:
        """See `Link.serve_apart`."""
        for index, port in enumerate(self.ports):
            if index in ports:
                port.on_truncated = on_truncated
            else:
                port.let_go()

    def look_again(self) -> None:
        """See `Link.look_again`."""
        self._measure()

    def keep_control(self) -> None:
        """See `Tap.keep_control`."""
        for port in self.ports:
            port.close()  # the kernel's side of it is not copied by a fork, but shared

    def leave_control(self, on_truncated: Callable[[], None]) -> None:
        """See `Tap.leave_control`."""
        self._control.close()
        for port in self.ports:
            port.on_truncated = on_truncated
            port.open()

    def activate_ports(self, count: int) -> None:
        """Attaches the first `count` queues and detaches the others, with what waits in them."""
        if not 1 <= count <= len(self.ports):
            raise UsageError(f"{self.name} has {len(self.ports)} queues, {count} cannot be used")
        for index, port in enumerate(self.ports):
            wanted = index < count
            if port.active != wanted:
                flags = IFF_ATTACH_QUEUE if wanted else IFF_DETACH_QUEUE
                try:
                    fcntl.ioctl(port.fileno(), TUNSETQUEUE, IFREQ.pack(b"", flags))
                except OSError as error:
                    # tun.c: the queue is so already, by another process that shares it.
                    if error.errno != errno.EINVAL:
                        raise
                port.active = wanted

    @property
    def is_up(self) -> bool:
        """Whether the host has the interface up; False too when it is gone."""
        try:
            return bool(self._flags() & IFF_UP)
        except OSError:
            return False

    @property
    def mtu(self) -> int:
        """The interface's MTU in bytes."""
        with self._whereabouts() as (name, namespace):
            if namespace is not None:
                return interface_in(namespace, self.name).mtu
            answer = fcntl.ioctl(self._control, SIOCGIFMTU, IFREQ_INT.pack(name, 0))
            return int(IFREQ_INT.unpack(answer)[1])

    def set_mtu(self, mtu: int) -> None:
        """Sets the interface's MTU in bytes."""
        self._set(SIOCSIFMTU, lambda name: IFREQ_INT.pack(name, mtu))
        self._measure()

    def set_up(self, up: bool) -> None:
        """Brings the interface up or down."""
        flags = self._flags() & ~IFF_UP | (IFF_UP if up else 0)
        self._set(SIOCSIFFLAGS, lambda name: IFREQ.pack(name, flags & 0xFFFF))

    def set_carrier(self, carrier: bool) -> None:
        """Tells the host whether somebody is at our end of the cable."""
        fcntl.ioctl(self._fds[0], TUNSETCARRIER, struct.pack("i", carrier))

    def set_persistent(self, persistent: bool) -> None:
        """Whether the interface stays when this object and all others let go of it."""
        fcntl.ioctl(self._fds[0], TUNSETPERSIST, int(persistent))

    def close(self) -> None:
        """Closes all queues; a tap that is not persistent goes with the last of them."""
        self._control.close()
        for port in self.ports:
            port.close()
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)

    # --- how it is done ---

    def _take(self, fds: Sequence[int]) -> None:
        """Owns `fds` and makes them what a port needs."""
        self._fds = tuple(fds)
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._control_namespace = _namespace_id(None)
        self._or_close(self._prepare)

    def _or_close(self, step: Callable[[], object]) -> None:
        try:
            step()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if not self._fds:
            raise UsageError("a tap needs at least one file descriptor")
        names = {_attached_name(fd) for fd in self._fds}
        if len(names) > 1:
            raise UsageError(f"the file descriptors are of different taps: {sorted(names)}")
        (self.name,) = names
        self._set_up_queues()
        self.known_flags = _probe(self._fds[0])
        # What the kernel can be asked to leave undone is also what it can finish.
        self.accepts = tun_offloads(self.known_flags)
        self.min_frame = ETHER_HEADER
        self.ports = tuple(LinuxTapPort(fd, self._measure) for fd in self._fds)
        self.request_offloads(Offload.NONE)

    def _set_up_queues(self) -> None:
        for fd in self._fds:
            os.set_blocking(fd, False)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", NET_HDR_SIZE))
            _set_little_endian(fd)

    def _measure(self) -> None:
        """Looks at the MTU again."""
        self.expect(self.delivers, self.mtu)

    def _flags(self) -> int:
        with self._whereabouts() as (name, namespace):
            if namespace is not None:
                return interface_in(namespace, self.name).flags
            answer = fcntl.ioctl(self._control, SIOCGIFFLAGS, IFREQ.pack(name, 0))
            return int(IFREQ.unpack(answer)[1])

    def _set(self, request: int, argument: Callable[[bytes], bytes]) -> None:
        """Changes the interface itself. In another namespace that takes CAP_SYS_ADMIN."""
        with self._whereabouts() as (name, namespace):
            if namespace is None:
                fcntl.ioctl(self._control, request, argument(name))
            else:
                _in_namespace(namespace, lambda: _set_here(request, argument(name)))

    @contextmanager
    def _whereabouts(self) -> Iterator[tuple[bytes, int | None]]:
        """The interface's name by now, and the namespace that it was moved to, None for ours."""
        self.name = _attached_name(self._fds[0])
        name = os.fsencode(self.name)
        try:
            namespace = fcntl.ioctl(self._fds[0], TUNGETDEVNETNS)
        except OSError:  # Linux before 5.10, or not privileged: it is where it was
            yield name, None
            return
        try:
            is_ours = _namespace_id(namespace) == self._control_namespace
            yield name, None if is_ours else namespace
        finally:
            os.close(namespace)


# --- opening -------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    encoded = os.fsencode(name)
    if len(encoded) >= IFNAMSIZ:
        raise UsageError(
            f"the tap name {name!r} is too long: Linux takes at most {IFNAMSIZ - 1} bytes"
        )
    if not encoded or name in (".", "..") or any(c in "/:\0" or c.isspace() for c in name):
        raise UsageError(f"{name!r} cannot be the name of a network interface")


def _open_queues(name: str, queues: int) -> list[int]:
    """Attaches `queues` descriptors to the tap `name`, in the namespace of this thread."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(_open_device())
            name = _attach_one(fds[-1], name, several=queues > 1)
    except OSError as error:
        _close_all(fds)
        raise _explained(error, name, queues) from error
    except BaseException:
        _close_all(fds)
        raise
    return fds


def _attach_to_present(fds: Sequence[int], name: str, queues: int) -> bool:
    """Attaches some of a tap's `queues` descriptors to the interface `name`, if there is one.

    It is looked for first, since attaching would make one.
    """
    if _kind_of(name) is None:
        return False
    try:
        for fd in fds:
            _attach_one(fd, name, several=queues > 1)
    except OSError as error:
        raise _explained(error, name, queues) from error
    return True


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            reason = f"there is no {DEVICE}: load the kernel's tun module, or let the container in"
        elif error.errno in (errno.ENODEV, errno.ENXIO):
            reason = f"{DEVICE} has no driver behind it: load the kernel's tun module"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"this user may not open {DEVICE} for reading and writing"
        else:
            reason = f"{DEVICE} cannot be opened: {error.strerror}"
        raise OSError(error.errno, reason) from error


def _attach_one(fd: int, name: str, *, several: bool) -> str:
    """Attaches one of several queues, or the only one, and returns the interface's name."""
    if several:
        return _attach(fd, name, IFF_MULTI_QUEUE)
    try:
        return _attach(fd, name, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # One queue of a tap that was made for several.
        return _attach(fd, name, IFF_MULTI_QUEUE)


def _attach(fd: int, name: str, more: int) -> str:
    """Attaches a queue, and returns the name that the kernel gave."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more
    answer = fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(os.fsencode(name), flags))
    return _name_of(answer)


def _explained(error: OSError, name: str, queues: int) -> Exception:
    """What the kernel meant when it refused to attach a queue."""
    if error.errno == errno.EBUSY:
        reason = f"the tap {name} is in use by another program"
    elif error.errno == errno.EPERM:
        reason = (
            f"attaching to the tap {name} needs CAP_NET_ADMIN, "
            "or a tap that was made for this user (ip tuntap add NAME mode tap user USER)"
        )
    elif error.errno == errno.E2BIG:
        return UsageError(f"the tap {name} cannot have {queues} queues in use")
    elif error.errno == errno.EINVAL:
        kind = _kind_of(name)
        if kind is not None and kind != "tap":
            return UsageError(f"the network interface {name} is not a tap")
        if kind == "tap" and queues > 1:
            return UsageError(
                f"the tap {name} was made with one queue: {queues} need one made with multi_queue"
            )
        return UsageError(f"the kernel takes no tap named {name!r}")
    else:
        return error
    return OSError(error.errno, reason)


def _kind_of(name: str) -> str | None:
    """What the interface `name` is: ``tap``, ``tun``, ``other``, or None when there is none."""
    buffer = ctypes.create_string_buffer(DRVINFO.pack(ETHTOOL_GDRVINFO, *[b""] * 6, *[0] * 5))
    request = IFREQ_POINTER.pack(os.fsencode(name), ctypes.addressof(buffer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, SIOCETHTOOL, request)
        except OSError as error:
            return None if error.errno == errno.ENODEV else "other"
    _, driver, _, _, bus, *_ = DRVINFO.unpack(buffer.raw[: DRVINFO.size])
    # tun.c: the driver is "tun" for both, the bus says which.
    return bus.rstrip(b"\0").decode() if driver.rstrip(b"\0") == b"tun" else "other"


# --- on an attached descriptor -------------------------------------------------------------------


def _attached_name(fd: int) -> str:
    """The present name of the tap that `fd` is a queue of."""
    try:
        answer = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ.size))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EBADF):
            raise UsageError(f"file descriptor {fd} is not an open tap") from error
        raise in_words(error) from error
    flags = IFREQ.unpack(answer)[1]
    if flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != IFF_TAP | IFF_NO_PI | IFF_VNET_HDR:
        raise UsageError(
            f"file descriptor {fd} must be a tap with IFF_NO_PI and IFF_VNET_HDR "
            f"(its flags are {flags:#x})"
        )
    return _name_of(answer)


def _is_attached(fd: int) -> bool:
    try:
        fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ.size))
    except OSError as error:
        return error.errno != errno.EBADFD
    return True


def _set_little_endian(fd: int) -> None:
    """Makes the header's fields little-endian, as VERSION_1 has them, whatever the processor."""
    try:
        fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
    except OSError:  # before Linux 4.1 the header has the processor's byte order
        if sys.byteorder != "little":
            raise


def _probe(fd: int) -> TunF:
    """The TUN_F_* flags that the kernel knows, each tried in the smallest set that may hold it."""
    known = TunF(0)
    for tried in (
        TunF.CSUM,
        TunF.CSUM | TunF.TSO4,
        TunF.CSUM | TunF.TSO6,
        TunF.CSUM | TunF.TSO4 | TunF.TSO_ECN,
        TunF.CSUM | TunF.USO4 | TunF.USO6,
    ):
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, int(tried))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            known |= tried
    return known


def _name_of(ifreq: bytes) -> str:
    return os.fsdecode(ifreq[:IFNAMSIZ].split(b"\0")[0])


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _set_here(request: int, argument: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, request, argument)


# --- namespaces ----------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


def _namespace_id(fd: int | None) -> tuple[int, int] | None:
    """What tells one network namespace from another; that of this thread without `fd`."""
    try:
        status = os.stat("/proc/thread-self/ns/net" if fd is None else fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _in_namespace(namespace: str | int | None, work: Callable[[], T]) -> T:
    """Does `work` in a network namespace, on a thread of its own so that ours stays where it is."""
    if namespace is None:
        return work()
    if isinstance(namespace, str):
        path = namespace if "/" in namespace else f"/run/netns/{namespace}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"there is no network namespace {path}: {error.strerror}") from error
        try:
            return _in_namespace(fd, work)
        finally:
            os.close(fd)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace, CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"the namespace cannot be entered: {os.strerror(number)}")
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="vq-setns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
