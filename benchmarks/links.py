"""A slow link on one machine: two network namespaces joined by a veth pair, each end throttled by tc's token bucket.

Needs root and the commands ip and tc (iproute2). Nothing outside the two namespaces is touched, and both are removed at
the end. Bandwidth is emulated, latency is not: a veth pair has almost none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # a range reserved for documentation
INTERFACES = ("ebleft", "ebright")
MTU = 6000  # headers are then 1.1 % of full packets
# Each namespace has its own. On a busy machine acknowledgements come late, and tail loss probes would send packets
# twice;
# a deep queue before the bucket would hold back the acknowledgements that travel the other way.
SETTINGS = (
    "net.ipv4.tcp_early_retrans=0",
    "net.ipv4.tcp_limit_output_bytes=16384",
    "net.ipv4.tcp_slow_start_after_idle=0",
)


@dataclass(frozen=True)
class Link:
    """prefix: what to put before a command so that it runs at end 0 or 1; rate: bit per second, 0 for no limit."""

    names: tuple[str, str]
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
def link(rate: float) -> Iterator[Link]:
    """Two namespaces with a link of `rate` bit/s each way between them."""
    names = (f"eb{os.getpid()}-0", f"eb{os.getpid()}-1")
    made = Link(names, rate)
    try:
        for name in names:
            _do("ip", "netns", "add", name)
        left, right = INTERFACES
        _do("ip", "link", "add", left, "netns", names[0], "type", "veth", "peer", "name", right, "netns", names[1])
        for end, (interface, address) in enumerate(zip(INTERFACES, ADDRESSES, strict=True)):
            inside = made.prefix(end)
            _do(*inside, "ip", "address", "add", f"{address}/30", "dev", interface)
            _do(*inside, "ip", "link", "set", interface, "mtu", str(MTU), "up")
            _do(*inside, "ip", "link", "set", "lo", "up")
            for setting in SETTINGS:
                _do(*inside, "sysctl", "-w", setting)
            if rate:
                # What an idle link has saved up goes out at once: half a millisecond's worth, at least one packet.
                burst = max(MTU + 100, int(rate / 8 * 0.0005))
                bucket = ["rate", f"{int(rate)}bit", "burst", str(burst), "latency", "400ms"]
                _do(*inside, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *bucket)
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
