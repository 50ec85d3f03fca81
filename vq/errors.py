"""Who is at fault, as a type.

A virtio device talks to four parties, and a failure belongs to exactly one of them:

=================  ===================================================================
`DriverError`      the guest: its driver broke a rule of the virtio specification
`FrontendError`    the vhost-user peer: it broke the vhost-user protocol
`UsageError`       our caller: an argument, an option or a file that cannot be used
`OSError`          the host's kernel refused something; it is passed on as it came
=================  ===================================================================
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "CaptureError",
    "DriverError",
    "FrontendError",
    "UsageError",
    "VqError",
    "in_words",
]


class VqError(Exception):
    """Base of every error that vq raises itself."""


class DriverError(VqError):
    """The guest's driver broke a rule of the specification.

    `reason` says what was wrong in one phrase. `queue` is the name of the virtqueue and `head` the
    first descriptor of the chain concerned, where there is one; `section` is where the rule stands
    in the virtio 1.3 specification. All four are attributes, and parts of the message.
    """

    def __init__(
        self,
        reason: str,
        *,
        queue: str | None = None,
        head: int | None = None,
        section: str | None = None,
    ) -> None:
        self.reason = reason
        self.queue = queue
        self.head = head
        self.section = section
        place = ", ".join(
            part for part in (queue, None if head is None else f"head {head}") if part
        )
        super().__init__(
            (f"{place}: " if place else "")
            + reason
            + (f" (virtio 1.3, {section})" if section else "")
        )


class FrontendError(VqError):
    """The vhost-user peer sent something that its protocol does not allow."""


class UsageError(VqError, ValueError):
    """Our caller asked for something that cannot be: a bad argument, option or layout."""


class AddressError(UsageError, LookupError):
    """A guest-physical range that is not, or not wholly, inside the guest's RAM.

    Whoever took the address from a guest turns this into a `DriverError`.
    """


class CaptureError(UsageError):
    """A capture file that cannot be read: not a capture, cut short, or not Ethernet."""


def in_words(error: Exception) -> str:
    """What is wrong, in one sentence for whoever reads the program's complaints."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return error.strerror
        return f"{error.filename or repr(error.filename)}: {error.strerror}"
    if isinstance(error, VqError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
