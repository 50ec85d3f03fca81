"""OpenBSD: pledge(2) and unveil(2).

A pledged process is killed when it makes a system call that it did not promise to make no other
than. "stdio" has reading, writing, waiting, and memory; "recvfd" and "sendfd" are for descriptors
in vhost-user's messages; "unix" is for the sockets that frontends connect to. A module that needs
another one lists it as `PROMISES` beside the code: "tty" for what is asked of terminals. TUNSCAP is
in none of them: a tap's offloads are the helper's.
"""

from __future__ import annotations

from vq.sandbox.libc import Libc
from vq.sandbox.policy import Confinement, Policy, listed
from vq.sandbox.user import become

__all__ = ["PROMISES", "confine", "facilities", "promises"]

PROMISES = ("stdio", "recvfd", "sendfd", "unix")


def confine(policy: Policy, *, libc: Libc | None = None) -> Confinement:
    """See `vq.sandbox.confine`."""
    libc = libc or Libc()
    result = Confinement()
    if policy.user is not None:
        become(policy.user)
        result.held["user"] = f"user {policy.user.name}"
    result.take("unveil", lambda: _unveil(libc))
    result.take("pledge", lambda: _pledge(libc))
    return result


def facilities(*, libc: Libc | None = None) -> dict[str, bool | int]:
    """What this host has for `confine`."""
    libc = libc or Libc()
    return {name: libc.has(name) for name in ("pledge", "unveil")}


def promises() -> list[str]:
    """What a worker promises to make no other use of the system than."""
    return list(dict.fromkeys((*PROMISES, *listed("PROMISES"))))


def _unveil(libc: Libc) -> str:
    libc.call("unveil", b"/", b"")
    libc.call("unveil", None, None)
    return "no files in view"


def _pledge(libc: Libc) -> str:
    words = " ".join(promises())
    libc.call("pledge", words.encode(), None)
    return f"pledged {words}"
