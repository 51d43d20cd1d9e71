"""What this machine says of itself, under /proc and /sys: the numbers that `kernel.check` judges.

Standard library only, no root, nothing changed. Whatever is missing (in a container, on an older kernel) or reads
otherwise than expected is None: unknown. The two ways to the system, files and the packet filter's rules, can be given,
so that tests make up machines.
"""

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PAGE = resource.getpagesize()


def read_file(path: str) -> str:
    """The text of a file. Raises OSError."""
    return Path(path).read_text()


def nft_rules() -> str:
    """The packet filter's rules; "" where they can't be had: that takes root, and nft."""
    command = ["nft", "list", "ruleset"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=0.2).stdout  # noqa: S603 - no part of it is input
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, or one that is made up of other answers."""

    read: Callable[[str], str] = read_file
    rules: Callable[[], str] = nft_rules

    def text(self, path: str) -> str:
        """A file's; "" where it is missing or refused."""
        try:
            return self.read(path)
        except (OSError, ValueError):
            return ""

    def sysctl(self, name: str) -> list[int]:
        """Its numbers; none where they are unknown."""
        return _numbers(self.text("/proc/sys/" + name.replace(".", "/")))

    def open_files(self) -> tuple[int, int] | None:
        """This process's limits on open files: soft, hard."""
        found = re.search(r"^Max open files +(\d+|unlimited) +(\d+|unlimited)", self.text("/proc/self/limits"), re.MULTILINE)
        if not found:
            return None
        soft, hard = (sys.maxsize if limit == "unlimited" else int(limit) for limit in found.groups())
        return soft, hard

    def memory(self) -> int | None:
        """Bytes there are."""
        return self._memory("MemTotal")

    def memory_available(self) -> int | None:
        """Bytes that may still be taken: what the kernel says, or less where a control group (v2) around this process does."""
        available = self._memory("MemAvailable")
        left = [] if available is None else [available]
        group = re.search(r"^0::/(.*)", self.text("/proc/self/cgroup"), re.MULTILINE)
        folder = PurePosixPath("/sys/fs/cgroup", group[1] if group else "")
        for one in (folder, *folder.parents):
            most, used = _numbers(self.text(f"{one}/memory.max")), _numbers(self.text(f"{one}/memory.current"))
            if most and used:  # no limit is "max", which is no number
                cache = _field(self.text(f"{one}/memory.stat"), r"inactive_file (\d+)") or 0  # given back when asked for
                left.append(max(0, most[0] - used[0] + cache))
        return min(left, default=None)

    def packets_dropped(self) -> int | None:
        """Those that found a core's input queue full, since the machine started."""
        columns = [line.split() for line in self.text("/proc/net/softnet_stat").splitlines()]
        try:
            return sum(int(column[1], 16) for column in columns) if columns else None
        except (IndexError, ValueError):
            return None

    def connections(self) -> int | None:
        """TCP connections that are established now."""
        return _field(self.text("/proc/net/snmp"), r"Tcp: (?:-?\d+ ){8}(\d+)")

    def reserved_ports(self) -> str:
        """Those that no connection is given by itself, as the sysctl takes them: 80,8000-8010."""
        return self.text("/proc/sys/net/ipv4/ip_local_reserved_ports").strip()

    def tracks(self, port: int) -> bool:
        """Whether conntrack may see connections to `port`: no rule exempts both ways (a reply alone makes an entry too)."""
        exempt = [re.search(r"\b([ds]port) (\{[^}]*\}|[\d-]+).*\bnotrack\b", line) for line in self.rules().splitlines()]
        return {found[1] for found in exempt if found and within(port, found[2])} != {"dport", "sport"}

    def _memory(self, name: str) -> int | None:
        kilobytes = _field(self.text("/proc/meminfo"), rf"{name}: +(\d+) kB")
        return None if kilobytes is None else kilobytes * 1024


def within(port: int, ranges: str) -> bool:
    """Whether a list of ports and ranges, as sysctl (80,8000-8010) and nft ({ 80, 8000-8010 }) print it, has `port`."""
    bounds = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges)]
    return any(first <= port <= last for first, last in bounds)


def _numbers(text: str) -> list[int]:
    words = text.split()
    return [int(word) for word in words] if all(re.fullmatch(r"\d+", word) for word in words) else []


def _field(text: str, pattern: str) -> int | None:
    """The number that `pattern` finds at the start of a line."""
    found = re.search(rf"^{pattern}", text, re.MULTILINE)
    return int(found[1]) if found else None
