"""Sockets in a directory where somebody else may write, or which somebody else may rename.

Who serves as root in a directory of a user's is told where by a path, and the user may put another
directory behind that path, or another socket behind its name, at any moment.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vq import unix_socket
from vq.devices import host_end
from vq.errors import UsageError
from vq.unix_socket import Listener


class World:
    """A user's directory, and another one with a socket of the same name, which is somebody's."""

    def __init__(self, directory: Path) -> None:
        self.theirs, self.other = directory / "theirs", directory / "other"
        self.theirs.mkdir()
        self.other.mkdir()
        self.path = str(self.theirs / "net.sock")
        self.precious = self.other / "net.sock"
        self.served = socket.socket(socket.AF_UNIX)
        self.served.bind(str(self.precious))
        self.served.listen()
        self.precious.chmod(0o600)

    def swap_directories(self) -> None:
        """What the path names is another directory from now on."""
        self.theirs.rename(self.theirs.with_name("moved"))
        self.theirs.symlink_to(self.other)

    def swap_sockets(self) -> None:
        os.unlink(self.path)
        os.link(self.precious, self.path)

    def is_unharmed(self) -> bool:
        status = self.precious.stat()
        return stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink <= 2


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.served.close()


@pytest.fixture
def after_bind(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something happen right after a listener has made its socket."""

    def set_up(happens: Callable[[], None]) -> None:
        class Watched(socket.socket):
            def bind(self, address: object) -> None:
                super().bind(address)  # type: ignore[arg-type]
                happens()

        make = lambda: Watched(socket.AF_UNIX, socket.SOCK_STREAM)  # noqa: E731
        monkeypatch.setattr(unix_socket, "_make_socket", make)

    return set_up


def test_no_socket_is_handed_over_in_a_directory_that_came_in_between(
    world: World, after_bind: Callable[[Callable[[], None]], None]
) -> None:
    """The other user's socket of the same name was opened to whoever asked for ours."""
    after_bind(world.swap_directories)
    listener = Listener(world.path, mode=0o666)
    assert world.is_unharmed()
    ours = world.theirs.with_name("moved") / "net.sock"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o666
    listener.close()
    assert world.precious.exists()


def test_no_socket_is_handed_over_that_came_in_the_place_of_ours(
    world: World, after_bind: Callable[[Callable[[], None]], None]
) -> None:
    """A second name of another's: systems differ in whether everybody may make one."""
    after_bind(world.swap_sockets)
    with pytest.raises(UsageError, match="was replaced by something else while it was made"):
        Listener(world.path, mode=0o666)
    assert world.is_unharmed()


def test_a_socket_that_vanishes_while_it_is_made_is_an_error(
    world: World, after_bind: Callable[[Callable[[], None]], None]
) -> None:
    after_bind(lambda: os.unlink(world.path))
    with pytest.raises(UsageError, match="was replaced by something else while it was made"):
        Listener(world.path)


def test_no_socket_is_removed_in_a_directory_that_came_in_between(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead socket makes way for ours; the other user's socket of the same name did."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(world.path)
    connect, swaps = socket.socket.connect, 0

    def refused(probe: socket.socket, address: str) -> None:
        nonlocal swaps
        try:
            connect(probe, address)
        except ConnectionRefusedError:
            swaps += 1
            if not world.theirs.is_symlink():
                world.swap_directories()
            raise

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(unix_socket, "check_path", lambda path: None)
    with pytest.raises((UsageError, OSError)):
        Listener(world.path)
    assert swaps == 1 and world.precious.exists() and world.is_unharmed()


def test_the_one_that_is_asked_is_the_one_that_is_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead one answered for the other user's, in whose directory ours was to be made."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no path goes from a descriptor here")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(world.path)
    world.swap_directories()  # while the directory is opened
    connect = socket.socket.connect

    def elsewhere(probe: socket.socket, address: str) -> None:
        if world.theirs.is_symlink():
            world.theirs.unlink()
            world.theirs.with_name("moved").rename(world.theirs)
        connect(probe, address)

    monkeypatch.setattr(socket.socket, "connect", elsewhere)
    monkeypatch.setattr(unix_socket, "check_path", lambda path: None)
    with pytest.raises(UsageError, match="is served already"):
        Listener(world.path)
    assert world.precious.exists() and world.is_unharmed()


def test_no_connection_is_made_through_a_link_that_came_in_between(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper of root's connects to sockets in a user's directory for the user's guest: by a link
    at the right moment to any socket of the host's."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no path goes from a descriptor here")
    check_path = unix_socket.check_path

    def check_and_swap(path: str) -> None:
        check_path(path)
        os.unlink(path)
        os.symlink(world.precious, path)

    monkeypatch.setattr(unix_socket, "check_path", check_and_swap)
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(world.path)
        theirs.listen()
        with pytest.raises(UsageError, match="is not a socket, or has a second name"):
            unix_socket.connect(world.path)
    world.served.setblocking(False)
    with pytest.raises(BlockingIOError):
        world.served.accept()


def test_no_connection_is_made_to_anothers_socket_by_a_second_name_for_it(world: World) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no path goes from a descriptor here")
    os.link(world.precious, world.path)
    with pytest.raises(UsageError, match="is not a socket, or has a second name"):
        unix_socket.connect(world.path)


def test_who_listens_is_connected_to_under_its_own_name(world: World) -> None:
    connection = unix_socket.connect(str(world.precious))
    served, _ = world.served.accept()
    with connection, served:
        assert not connection.getblocking()
        connection.send(b"hello")
        assert served.recv(100) == b"hello"
    with pytest.raises(FileNotFoundError, match="nobody listens at"):
        unix_socket.connect(world.path)


def test_no_link_to_a_terminal_is_removed_in_a_directory_that_came_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console's link that was left over makes way for a new one."""
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    for directory in (theirs, other):
        directory.mkdir()
        (directory / "console").symlink_to("/dev/pts/6")

    def swapping(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look_and_swap(path: str | Path, **how: Any) -> os.stat_result:
            status = look(path, **how)
            if str(path).endswith("console") and not theirs.is_symlink():
                theirs.rename(tmp_path / "moved")
                theirs.symlink_to(other)
            return status

        return look_and_swap

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", swapping(os.stat))
        patch.setattr(os, "lstat", swapping(os.lstat))
        host_end._make_link("/dev/pts/7", str(theirs / "console"))
    assert theirs.is_symlink()
    assert os.readlink(other / "console") == "/dev/pts/6"
    assert os.readlink(tmp_path / "moved" / "console") == "/dev/pts/7"
    host_end._remove_link("/dev/pts/7", str(theirs / "console"))
    assert os.readlink(other / "console") == "/dev/pts/6"
