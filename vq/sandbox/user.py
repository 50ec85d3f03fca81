"""Becoming another user, for good."""

from __future__ import annotations

import os
from typing import NamedTuple

from vq.errors import UsageError

__all__ = ["User", "become", "find_user"]


class User(NamedTuple):
    """Somebody without privileges."""

    name: str
    uid: int
    gid: int


def find_user(name: str) -> User:
    """The user of this name, or of this number. Raises `UsageError` for nobody and for root."""
    import pwd

    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise UsageError(f"there is no user {name!r} here") from None
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise UsageError(f"{name!r} is no unprivileged user: it has root's user or group number")
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def become(user: User) -> None:
    """Takes this user's place, without a way back: real, effective and saved numbers, all groups.

    Raises `OSError` when the kernel refuses, or when root can be had back all the same.
    """
    try:
        os.setgroups([user.gid])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        reason = f"this process cannot become the user {user.name}: {error.strerror}"
        raise OSError(error.errno, reason) from error
    try:
        os.setuid(0)
    except OSError:
        return
    raise PermissionError(1, "this process could become root again")
