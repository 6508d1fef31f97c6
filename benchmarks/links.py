"""A slow link on one machine: network namespaces in a row, each joined to the next by a veth pair, and both ends of
every pair throttled by tc's token bucket.

Needs root and the commands ip and tc (iproute2). Nothing outside the namespaces is touched, and all are removed at the
end. Bandwidth is emulated, latency is not: a veth pair has almost none. What two ends that are no neighbours send each
other is forwarded by those between them and takes bandwidth there, as it would on real machines in a row.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NEXT, BACK = "ebnext", "ebback"  # the interfaces towards the next namespace and the one before
MTU = 6000  # headers are then 1.1 % of full packets
ETHERNET, HEADERS = 14, 20 + 32  # bytes: Ethernet; IPv4, and TCP with timestamps
# Each namespace has its own. On a busy machine acknowledgements come late, and tail loss probes would send packets
# twice;
# a deep queue before the bucket would hold back the acknowledgements that travel the other way.
SETTINGS = (
    "net.ipv4.tcp_early_retrans=0",
    "net.ipv4.tcp_limit_output_bytes=16384",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.ip_forward=1",
)


def address(end: int) -> str:
    """Of a range reserved for documentation."""
    return f"192.0.2.{end + 1}"


def interfaces(end: int, ends: int) -> list[str]:
    """Those of one namespace; its address is on the first."""
    return [NEXT] * (end < ends - 1) + [BACK] * (end > 0)


def burst(rate: float, mtu: int = MTU) -> int:
    """What an idle link has saved up goes out at once: half a millisecond's worth, at least one packet. Bytes."""
    return max(mtu + 100, int(rate / 8 * 0.0005))


def payload_rate(rate: float, mtu: int = MTU) -> float:
    """Of a link of `rate` bit/s: what is left for the contents of full packets."""
    return rate * (mtu - HEADERS) / (mtu + ETHERNET)


@dataclass(frozen=True)
class Link:
    """prefix: what to put before a command so that it runs at that end; rate: bit per second, 0 for no limit."""

    names: tuple[str, ...]
    rate: float

    def prefix(self, end: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[end]]


def available() -> str:
    """Why namespaces cannot be used here; empty if they can."""
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the command {command} is not installed (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"eb-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return done.stderr.strip()


@contextmanager
def link(rate: float, ends: int = 2, mtu: int = MTU) -> Iterator[Link]:
    """`ends` namespaces in a row, with a link of `rate` bit/s each way between neighbours."""
    made = Link(tuple(f"eb{os.getpid()}-{end}" for end in range(ends)), rate)
    try:
        for name in made.names:
            _do("ip", "netns", "add", name)
        for left, right in zip(made.names, made.names[1:], strict=False):
            _do("ip", "link", "add", NEXT, "netns", left, "type", "veth", "peer", "name", BACK, "netns", right)
        for end in range(ends):
            _furnish(made, end, mtu)
        for end in range(ends):
            _lead(made, end)
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _furnish(made: Link, end: int, mtu: int) -> None:
    inside, mine = made.prefix(end), interfaces(end, len(made.names))
    _do(*inside, "ip", "link", "set", "lo", "up")
    for setting in SETTINGS:
        _do(*inside, "sysctl", "-w", setting)
    _do(*inside, "ip", "address", "add", f"{address(end)}/32", "dev", mine[0])
    for interface in mine:
        _do(*inside, "ip", "link", "set", interface, "mtu", str(mtu), "up")
        if made.rate:
            bucket = ["rate", f"{int(made.rate)}bit", "burst", str(burst(made.rate, mtu)), "latency", "400ms"]
            _do(*inside, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *bucket)


def _lead(made: Link, end: int) -> None:
    """Routes to all other ends, through the neighbour on their side."""
    inside = made.prefix(end)
    for step, interface in ((1, NEXT), (-1, BACK)):
        if not 0 <= end + step < len(made.names):
            continue
        source, near = ["src", address(end)], address(end + step)
        _do(*inside, "ip", "route", "add", f"{near}/32", "dev", interface, "scope", "link", *source)
        for far in range(end + 2 * step, len(made.names) if step > 0 else -1, step):
            _do(*inside, "ip", "route", "add", f"{address(far)}/32", "via", near, "dev", interface, "onlink", *source)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
