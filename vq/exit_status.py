"""How a process of ours ended, in words.

Sources: waitpid(2), signal(7).
"""

from __future__ import annotations

import os
import signal

__all__ = ["describe_end"]

_SIGNALS = {
    signal.SIGBUS: "memory that a guest shares was cut short under it, or the host has none left",
    signal.SIGSYS: "it made a system call that is not on its list (for a model of your own see"
    ' docs/security.md, "System calls")',
    signal.SIGKILL: "somebody killed it, or the host ran out of memory",
    signal.SIGSEGV: "it touched memory that is not there",
}


def describe_end(status: int, process: str) -> tuple[int, str]:
    """An exit status to end with, and in words how `process` ended; none when all went well.

    `status` is waitpid(2)'s, `process` what the sentence begins with.
    """
    if not os.WIFSIGNALED(status):
        code = os.waitstatus_to_exitcode(status)
        return code, f"{process} ended with status {code}" if code == 1 else ""
    number = os.WTERMSIG(status)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = _SIGNALS.get(signal.Signals(number)) if number in set(signal.Signals) else None
    return 1, f"{process} was killed by {name}" + (f": {why}" if why else "")
