"""An asyncio loop in a thread of its own, for device models whose handlers are coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from vq.system_calls import THREAD_CALLS

__all__ = ["AsyncioThread", "submit"]

SYSTEM_CALLS = (
    *THREAD_CALLS,
    # asyncio's own loop
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "getsockname", "getsockopt"),
    *("recvfrom", "sendto", "socketpair"),
)


class AsyncioThread:
    """A thread that runs an asyncio loop until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancels what still runs, waits for that, and ends the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            for task in (tasks := asyncio.all_tasks(self.loop)):
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
        finally:
            self.loop.close()


def submit(
    coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop
) -> tuple[Future[None], Callable[[], None]]:
    """Runs a coroutine on a loop in another thread; a future of its end, and what cancels it.

    Unlike that of `asyncio.run_coroutine_threadsafe` the future is not done before the coroutine
    is, also when it is cancelled: what the coroutine holds is free from then on, and not earlier.
    """
    outcome: Future[None] = Future()

    def begin() -> asyncio.Task[None]:
        task = loop.create_task(coroutine)
        task.add_done_callback(ended)
        return task

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            outcome.cancel()
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    tasks: list[asyncio.Task[None]] = []
    try:
        loop.call_soon_threadsafe(lambda: tasks.append(begin()))
    except RuntimeError:  # the loop is closed
        coroutine.close()
        raise

    def cancel() -> None:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())

    return outcome, cancel
