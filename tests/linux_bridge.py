"""Linux's own segmentation and checksums, as an oracle: two taps on a bridge.

Run as a program inside a network namespace of its own (``unshare --net python linux_bridge.py``),
so that everything it makes goes with it. It writes frames, net header included, into one tap, and
gives back what comes out of the other, whose reader accepts only the offloads in `accepts`
(`TUN_F_*`): the kernel has to do the rest in software.

stdin: JSON ``{"accepts": int, "frames": [hex, ...]}``, stdout: JSON ``[[hex, ...], ...]``, for each
frame what came out for it, net headers included, or null where the kernel refused the frame.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import select
import shutil
import struct
import subprocess
import sys

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
MARKER_TYPE = b"\x88\xb5"  # IEEE 802, local experimental ethertype 1


def why_not() -> str | None:
    """Why this machine cannot be the oracle."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64", "riscv64"):
        return "needs Linux, and the ioctl numbers of x86-64, arm64 or riscv64"
    if os.geteuid() or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs root and /dev/net/tun"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "needs ip and unshare"
    probe = ["unshare", "--net", "ip", "link", "add", "pkbr", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, timeout=20).returncode:
        return "this kernel makes no namespace or no bridge"
    return None


def kernel_output(frames: list[bytes], accepts: int) -> list[list[bytes] | None]:
    """What the kernel makes of each frame for a reader that accepts `accepts`."""
    request = json.dumps({"accepts": accepts, "frames": [frame.hex() for frame in frames]})
    done = subprocess.run(
        ["unshare", "--net", sys.executable, __file__],
        input=request,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer = json.loads(done.stdout)
    return [None if one is None else [bytes.fromhex(frame) for frame in one] for one in answer]


def _open_tap(name: str, accepts: int) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))
    fcntl.ioctl(fd, TUNSETOFFLOAD, accepts)
    return fd


def _bridge_taps(*names: str) -> None:
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as quiet:
        quiet.write("1")
    commands = ["link add pkbr type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
    for name in names:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as quiet:
            quiet.write("1")
        commands += [f"link set {name} mtu 9000 master pkbr up"]
    commands += ["link set pkbr mtu 9000 up"]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, timeout=20)


def _read_until(fd: int, marker: bytes) -> list[bytes]:
    """The frames before the marker, and what is late by up to 20 ms."""
    frames: list[bytes] = []
    marked = False
    while select.select([fd], [], [], 0.02 if marked else 5)[0]:
        frame = os.read(fd, 70000)
        if frame[12:] == marker:
            marked = True
        elif frame[24:26] != MARKER_TYPE:
            frames.append(frame)
    if not marked:
        raise TimeoutError("nothing comes through the bridge")
    return frames


def main() -> None:
    request = json.load(sys.stdin)
    source, sink = _open_tap("pktapa", 0), _open_tap("pktapb", request["accepts"])
    _bridge_taps("pktapa", "pktapb")
    answer: list[list[str] | None] = []
    for number, text in enumerate(["", *request["frames"]]):
        refused = False
        try:
            if text:
                os.write(source, bytes.fromhex(text))
        except OSError:
            refused = True
        marker = b"\2\0\0\0\0\1\2\0\0\0\0\2" + MARKER_TYPE + number.to_bytes(4, "big") * 12
        os.write(source, bytes(12) + marker)
        came = _read_until(sink, marker)
        if text:
            answer.append(None if refused else [frame.hex() for frame in came])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
