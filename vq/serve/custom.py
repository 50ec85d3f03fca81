"""`vq serve MODULE:CLASS`: anybody's own device model."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

from vq.device import Device
from vq.errors import UsageError, VqError, in_words
from vq.serve.kind import Kind
from vq.system_calls import THREAD_CALLS

__all__ = ["CustomKind"]

log = logging.getLogger(__name__)

_PACKAGE = os.path.dirname(os.path.dirname(__file__))

SYSTEM_CALLS = (
    *THREAD_CALLS,
    *("eventfd2", "pipe2", "poll", "ppoll", "pselect6", "select"),
    *("fallocate", "fdatasync", "fsync", "ftruncate"),
    *("pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "readv", "writev"),
    *("accept4", "getpeername", "getsockname", "getsockopt", "recvfrom", "recvmsg"),
    *("sendmsg", "sendto", "setsockopt", "shutdown", "socketpair"),
)
"""What a model may do: start threads, and use descriptors that it has opened. A model whose module
has a `SYSTEM_CALLS` of its own may make those calls, too."""

_LATE_IMPORTS = ("concurrent.futures.thread", "vq.asyncio_thread")
"""What a model's `run_async` and the coroutines in it import when they first run. There are no
files left to import from by then, and nothing says beforehand whether a model has coroutines."""


class CustomKind(Kind):
    """A device that a callable makes: a class derived from `Device`, or a function.

    The word names it as ``module:name``; the module is found as Python finds modules, and in the
    current directory. ``--with NAME=TEXT`` are the callable's keyword arguments. Raises
    `UsageError` when there is no such thing.
    """

    capabilities: ClassVar[Mapping[str, object]] = {"type": "unknown"}

    def __init__(self, word: str) -> None:
        super().__init__()
        module_name, _, name = word.partition(":")
        if module_name.endswith(".py") or "/" in module_name:
            hint = os.path.splitext(os.path.basename(module_name))[0]
            raise UsageError(f"{word}: name the module and not its file, as in {hint}:{name}")
        if not module_name:
            raise UsageError(f"{word}: no module is named before the colon")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            self._make = getattr(importlib.import_module(module_name), name)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{module_name} cannot be imported: {error}") from error
        except SyntaxError as error:
            raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
        except Exception as error:
            if isinstance(error, AttributeError) and module_name in sys.modules:
                missing = name or "name behind the colon"
                raise UsageError(f"{module_name} has no {missing}") from None
            why = _explained(error)
            raise UsageError(f"{module_name} cannot be imported: {why}") from error
        if not callable(self._make):
            raise UsageError(f"{word} is no class or function")
        self._word = word

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """See `Kind`."""
        parser.add_argument(
            "--with",
            dest="arguments",
            action="append",
            default=[],
            metavar="NAME=TEXT",
            help="a keyword argument for the device's maker, as text",
        )

    def open_devices(self, args: argparse.Namespace, stack: ExitStack) -> Sequence[Device]:
        """See `Kind`."""
        arguments = dict(_name_and_text(item) for item in args.arguments)
        try:
            device = self._make(**arguments)
        except (VqError, OSError):
            raise
        except Exception as error:
            log.debug("%s", self._word, exc_info=error)
            raise UsageError(f"{self._word}: {_explained(error)}") from error
        if not isinstance(device, Device):
            raise UsageError(f"{self._word} does not make a vq device")
        stack.callback(device.close)
        for name in _LATE_IMPORTS:
            importlib.import_module(name)
        return [device]


def _explained(error: Exception) -> str:
    """The error, with the line of the author's own code that it comes from, if it is one's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_ours_or_pythons(frame.filename):
            name = os.path.basename(frame.filename)
            return f"{name}, line {frame.lineno}: {in_words(error)}"
    return str(error) if isinstance(error, TypeError) else in_words(error)  # of the call itself


def _is_ours_or_pythons(path: str) -> bool:
    places = sysconfig.get_paths()
    if path.startswith(("<", _PACKAGE)):
        return True
    return path.startswith(places["stdlib"]) and not path.startswith(places["purelib"])


def _name_and_text(item: str) -> tuple[str, str]:
    name, equals, text = item.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--with takes NAME=TEXT, not {item!r}")
    return name, text
