"""Two processes: a helper that keeps the privileges, and a worker that parses what guests send.

The helper (`helper`) opens what needs privileges, forks the worker and then does what it is asked
by message (`message`, `channel`): it sets a tap's offloads, and connects to sockets that were named
at the start. The worker sees taps and sockets as before, through `SeparatedTap` and `Connector`,
which ask the helper instead of the kernel.
"""

from vq.privsep.connector import Connector
from vq.privsep.helper import Helper
from vq.privsep.tap import SeparatedTap
from vq.privsep.worker import Worker

__all__ = ["Connector", "Helper", "SeparatedTap", "Worker"]
