"""`vq serve`: devices on vhost-user sockets, for guests that run elsewhere.

One process serves one device, or two that are joined (`vq serve net --link pair`). Logs go to
standard error and say in words what a guest negotiated; statistics go to standard output when asked
for. Here is the command; each kind of device has a module with its options (`vq.serve.kind`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from vq import sandbox
from vq.device import Device
from vq.errors import UsageError, VqError, in_words
from vq.loop import LINGER, Loop
from vq.options import Parser, microseconds, positive
from vq.privsep import Helper, Worker
from vq.serve import confinement, transport
from vq.serve.kind import Kind
from vq.serve.statistics import Statistics
from vq.shared_fd import Watchdog
from vq.vhost_processes import Apart

__all__ = ["KINDS", "add_arguments", "parse", "run"]

log = logging.getLogger(__name__)

KINDS = {
    "net": ("vq.serve.net:NetKind", "a network device"),
    "blk": ("vq.serve.blk:BlkKind", "a block device"),
    "console": ("vq.serve.console:ConsoleKind", "a console device"),
    "rng": ("vq.serve.rng:RngKind", "an entropy device"),
    "vsock": ("vq.serve.vsock:VsockKind", "a vsock device"),
}
"""For each word behind ``vq serve`` the `Kind` that it stands for, and what it serves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the word for the device; the options behind it are the device's own to parse."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    words = "".join(f"  {word:<20}{summary}\n" for word, (_, summary) in KINDS.items())
    words += "  MODULE:CLASS        a device model of your own"
    parser.epilog = f"devices:\n{words}\n\n`vq serve DEVICE --help` has the options of one."
    parser.add_argument("device", metavar="DEVICE", help="what to serve, one of those below")
    options = parser.add_argument(
        "options", metavar="...", nargs=argparse.REMAINDER, help="its options"
    )
    options.required = False  # to be missed; Python 3.11 has it so


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; returns the exit status.

    Raises `UsageError` and `OSError` for what keeps it from beginning to serve.
    """
    words = [args.device, *args.options]
    kind, args = parse(args.device, args.options)
    transport.check(args, needed=kind.sockets_needed(args))
    confinement.check(args)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    with ExitStack() as stack:
        service = _Service(kind, args, words, stack)
        return service.run()


class _Service:
    """Devices that are open, and everything else that serving them takes.

    What is opened here is shared by helper and worker; where there is no sandbox this process is
    both.
    """

    def __init__(
        self, kind: Kind, args: argparse.Namespace, words: Sequence[str], stack: ExitStack
    ) -> None:
        self._kind = kind
        self._args = args
        self._words = words
        self._strays = confinement.open_descriptors() - {args.fd}
        self._has_input = confinement.has_input() and args.fd != 0
        # Before there is anything to leave behind, and until nothing of it is left.
        self._loop = self._new_loop(stack)
        self._user = confinement.user_of(args)
        self._threads = threading.enumerate()
        self._devices = kind.open_devices(args, stack)
        self._places = transport.open_places(args, kind.sockets_needed(args), kind.connector, stack)

    def run(self) -> int:
        """Serves until told to stop; the exit status."""
        try:
            if self._args.sandbox == "off" and not self._args.restart:
                return self._serve(
                    self._loop,
                    lambda: transport.tell_supervisor("READY=1"),
                    on_fork=self._close_places,
                )
            return self._help()
        except OSError as error:
            log.error("the system refused: %s", error)
            return 1
        finally:
            transport.tell_supervisor("STOPPING=1")

    def _help(self) -> int:
        """Serves in a worker, and is its helper."""
        self._refuse_threads()
        helper = Helper(
            self._loop,
            self._work,
            taps=self._kind.taps,
            connector=self._kind.connector,
            restart=self._args.restart,
            signals=self._kind.signals,
            on_ready=self._worker_is_ready,
        )
        sandbox.prepare()
        return helper.run()

    def _refuse_threads(self) -> None:
        """A fork has the thread that calls it and no other: a device would miss its own."""
        threads = [one.name for one in threading.enumerate() if one not in self._threads]
        if threads:
            raise UsageError(
                f"the device has started threads ({', '.join(threads)}), which the process that"
                " serves guests would not have: start them when the driver is ready"
                " (driver_ready), or use --sandbox=off"
            )

    def _worker_is_ready(self) -> None:
        if self._args.sandbox != "off":
            sandbox.keep_helper_privileges(taps=bool(self._kind.taps), again=self._args.restart)
        transport.tell_supervisor("READY=1")

    def _work(self, worker: Worker) -> int:
        """What the worker does from its beginning to its end."""
        confinement.close_strays(self._strays)
        if self._has_input:
            confinement.read_nothing()
        with ExitStack() as stack:
            loop = self._new_loop(stack)
            worker.attach(loop, loop.stop)
            stack.callback(worker.close)
            for device in self._devices:
                stack.callback(device.close)

            def start() -> None:
                confinement.confine(self._args, self._user, self._kind.taps)
                worker.ready()

            def let_go() -> None:
                worker.close()
                self._close_places()

            try:
                return self._serve(loop, start, on_fork=let_go)
            except (VqError, OSError) as error:
                print(f"vq serve: {in_words(error)}", file=sys.stderr)
                return 2 if isinstance(error, UsageError | OSError) else 1

    def _close_places(self) -> None:
        """In a process that serves some queues: sockets are for the one that it was forked from."""
        for place in self._places:
            if place.socket is not None:
                place.socket.close()

    def _serve(self, loop: Loop, ready: Callable[[], None], *, on_fork: Callable[[], None]) -> int:
        """Serves the devices in this process; `ready` is called once frontends may come.

        `on_fork` is called in other processes that serve some of their queues.
        """
        args, kind = self._args, self._kind
        processes = kind.processes(args)
        apart = Apart(processes, on_fork=on_fork) if processes > 1 else None
        with ExitStack() as stack:
            stack.enter_context(Watchdog())
            if args.record is not None:
                _record(self._devices[0], args, self._words, stack)
            for place, device in zip(self._places, self._devices, strict=True):
                transport.offer(
                    args,
                    place,
                    device,
                    loop,
                    kind.connector,
                    stack,
                    queue_num=kind.queue_num(args),
                    apart=apart,
                )
            kind.follow(self._devices, loop)
            if args.stats:
                as_json = args.stats == "json"
                Statistics(self._devices, loop, kind.statistics, as_json=as_json).start()
            ready()
            try:
                loop.run()
            except BrokenPipeError:  # nobody reads the statistics any more
                return 128 + signal.SIGPIPE
            except OSError as error:
                log.error("the system refused: %s", error)
                return 1
        return 0

    def _new_loop(self, stack: ExitStack) -> Loop:
        """This process' loop, until `stack` is closed: signals that ask for the end stop it."""
        loop = Loop(linger=self._args.busy_poll)
        stack.callback(loop.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, lambda *_: loop.stop())
        return loop


def parse(word: str, words: Sequence[str]) -> tuple[Kind, argparse.Namespace]:
    """The kind of device that `word` stands for, and what its options say."""
    if ":" in word:
        from vq.serve.custom import CustomKind

        kind: Kind = CustomKind(word)
        summary = word
    elif word in KINDS:
        place, summary = KINDS[word]
        module, _, name = place.partition(":")
        kind = getattr(importlib.import_module(module), name)()
    else:
        devices = ", ".join(KINDS)
        raise UsageError(f"{word!r} is no device; the devices are {devices} and MODULE:CLASS")
    parser = Parser(prog=f"vq serve {word}", description=f"Serve {summary} over vhost-user.")
    transport.add_arguments(parser)
    confinement.add_arguments(parser)
    parser.add_argument(
        "--stats",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="print a line a second, for people or for programs",
    )
    parser.add_argument(
        "--print-capabilities",
        action=_PrintCapabilities,
        nargs=0,
        const=kind.capabilities,
        help="print what this program can do, as vhost-user's conventions have it, and end",
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="write down all that happens, for `vq replay` (of the first device where there are"
        " two); it has all that the guest sends and receives",
    )
    parser.add_argument(
        "--record-limit",
        type=positive,
        default=256,
        metavar="MIB",
        help="record no more than this, before it is compressed (default: %(default)s)",
    )
    parser.add_argument(
        "--busy-poll",
        type=microseconds,
        default=LINGER,
        metavar="MICROSECONDS",
        help="how long to look for what is likely to come soon before going to sleep"
        f" (default: {LINGER * 1e6:.0f}; 0: not at all)",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="log more")
    kind.add_arguments(parser)
    return kind, parser.parse_args(words)


def _record(
    device: Device, args: argparse.Namespace, words: Sequence[str], stack: ExitStack
) -> None:
    from vq.recording.recorder import Recorder

    recorder = Recorder(device, args.record, limit=args.record_limit << 20, served=words)
    stack.callback(recorder.close)
    log.info("recording to %s", args.record)


class _PrintCapabilities(argparse.Action):
    """Answers at once: a manager may ask without any other option, or with some of no meaning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(json.dumps(self.const))
        parser.exit()
