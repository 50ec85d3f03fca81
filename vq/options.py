"""What commands share: their parser, and values that they take, turned into what these stand for.

The functions for one word raise `argparse.ArgumentTypeError`, so that they can be an option's
`type`; the others raise `UsageError`.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import NoReturn

from vq.abi import MAX_QUEUE_SIZE, Feature, NetFeature
from vq.errors import UsageError
from vq.link import LoopbackLink
from vq.net import NetDevice

__all__ = [
    "Parser",
    "file_mode",
    "group_number",
    "mac_address",
    "microseconds",
    "net_features",
    "positive",
    "queue_size",
    "user_number",
]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A whole number above 0."""
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def microseconds(text: str) -> float:
    """A whole number of microseconds up to a second, as seconds."""
    with suppress(ValueError):
        if 0 <= int(text) <= 1_000_000:
            return int(text) / 1e6
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of microseconds up to a second")


def queue_size(text: str) -> int:
    """Descriptors in a queue: a power of two from 1 to 32768 (virtio 1.3, 2.7)."""
    size = positive(text)
    if size & (size - 1) or size > MAX_QUEUE_SIZE:
        raise argparse.ArgumentTypeError(
            f"a queue's size is a power of two from 1 to {MAX_QUEUE_SIZE}, not {size}"
        )
    return size


def mac_address(text: str) -> bytes:
    """Six bytes of an Ethernet unicast address, written 02:00:00:00:00:01."""
    with suppress(ValueError):
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
        if len(mac) == 6 and not mac[0] & 1 and any(mac):
            return mac
    raise argparse.ArgumentTypeError(f"{text!r} is not a unicast MAC address")


def user_number(text: str) -> int:
    """The number of a user, given by name or number."""
    import pwd

    with suppress(KeyError):
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    raise argparse.ArgumentTypeError(f"there is no user {text!r} here")


def group_number(text: str) -> int:
    """The number of a group, given by name or number."""
    import grp

    with suppress(KeyError):
        return int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
    raise argparse.ArgumentTypeError(f"there is no group {text!r} here")


def file_mode(text: str) -> int:
    """Permissions in octal, for owner, group and others."""
    with suppress(ValueError):
        mode = int(text, 8)
        if 0 <= mode <= 0o777:
            return mode
    raise argparse.ArgumentTypeError(f"{text!r} is no mode such as 660")


def net_features(text: str, *, mtu: int | None = None, queue_pairs: int = 1) -> int:
    """What a network device may offer: everything, changed by a comma list of +NAME and -NAME.

    Names are the specification's without their prefix. Raises `UsageError` for a name that is not
    one of the net device's, one that vq does not have, and for giving up VERSION_1.
    """
    known = {member.name: int(member) for kind in (NetFeature, Feature) for member in kind}
    device = NetDevice(LoopbackLink(), mtu=mtu, queue_pairs=queue_pairs)
    features = everything = device.device_features
    for item in filter(None, (part.strip() for part in text.split(","))):
        sign, name = item[0], item[1:].strip().upper()
        if sign not in "+-":
            raise UsageError(f"write +{item} or -{item}: a feature is added or taken away")
        if name not in known:
            raise UsageError(f"{item[1:]!r} is not a feature of a virtio network device")
        bit = 1 << known[name]
        if sign == "+" and not everything & bit:
            raise UsageError(f"{name} is a feature that vq's network device does not have here")
        if sign == "-" and name == "VERSION_1":
            raise UsageError("VERSION_1 cannot be given up: legacy devices are not served")
        features = features | bit if sign == "+" else features & ~bit
    return features
