"""What the machine must allow for so many clients, beside what it allows: one row a limit.

`comet.__main__` prints the rows (`python -m comet check`); whoever starts the service logs `warnings`. What the machine
allows is read by `kernel.machine`. Standard library only: a process without greenlets calls it too.

Each number wanted has its reason beside it, and each row can fail. Hence there is none for net.ipv4.tcp_keepalive_*: the
listener sets values of its own (`kernel.sockets`).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from comet.kernel.limits import BACKLOG, FILL, RESERVE
from comet.kernel.machine import PAGE, Machine, within

HERE = Machine()

UNPLANNED = 10_000
"""Clients that a start is judged against where nobody named a number: many a laptop allows a million open files, and
is not meant for a million clients."""

ASLEEP = 1_000
"""Bytes of the service a client; 894 were measured on /test after a message each (`make bench`)."""
AWAKE = 8_000
"""The same with --hibernate off."""
SOCKET = 4_250
"""Bytes of kernel memory that one end of a connection takes while no data waits: on loopback 8.5 KB for both."""
WORKER = 37_000_000
"""Bytes of a process before its first client, resident."""
BODIES = 64 << 20
"""Bytes of bodies that a worker may hold, by --max-bodies as it is by default."""
PER_ADDRESS = 5_000
"""Connections of an address in a worker, by --max-per-address as it is by default."""
HOSTILE = 60_000
"""Bytes of the service that a connection can cost beside its part of the bodies: 54,000 were measured of a batch of which 16 KiB came, and
45,000, in worker and router, of 64 channels of its own."""
WORKER_MAPS = 1_000
"""Memory maps of a process without clients: 350 were counted, and the allocator takes more as it grows."""

SOCKET_MINIMUM = 4096
"""The first value of tcp_rmem and tcp_wmem as the kernel has it: room for one message."""
QUEUE = 1_000
"""net.core.netdev_max_backlog as the kernel has it: 8 ms of the packets that one core delivers (118,000 a second)."""
LONG_QUEUE = 10_000
"""85 ms of them: longer than the kernel's network thread waits for its turn on a busy core."""

Verdict = Literal["ok", "low", "high", "clash", "unknown"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the machine is judged against."""

    clients: int
    port: int = 8000
    """0: whichever is free."""
    workers: int = 1
    hibernate: bool = True
    loopback: bool = False
    """The clients run on this machine too (a load test): it holds both ends of each connection."""
    bodies: int = BODIES
    """Bytes of bodies that a worker may hold (--max-bodies)."""
    per_address: int = PER_ADDRESS
    """Connections of an address in a worker (--max-per-address)."""

    @property
    def ends(self) -> int:
        """Ends of each connection on this machine."""
        return 2 if self.loopback else 1

    @property
    def share(self) -> int:
        """Connections that a worker must have room for: they are spread by hash, so the fullest gets more than its part."""
        return self.clients if self.workers == 1 else math.ceil(self.clients * 100 / (self.workers * FILL))


class Row(NamedTuple):
    """One limit."""

    name: str
    found: str
    wanted: str
    verdict: Verdict
    why: str
    set: tuple[str, ...] = ()
    """What would meet it, each line an alternative; none where nothing is to be done."""
    at_start: bool = True
    """Whether a start of the service tells of it too: it turns clients, messages or the service itself away."""

    @property
    def unmet(self) -> bool:
        """Known, and not what is wanted."""
        return self.verdict not in ("ok", "unknown")


def capacity(workers: int = 1, machine: Machine = HERE) -> int | None:
    """Clients that so many workers can be planned for, by the hard limit on open files; None where it is unknown."""
    files = machine.open_files()
    if files is None:
        return None
    each = max(1, files[1] - RESERVE)
    return each if workers == 1 else max(1, workers * each * FILL // 100)


def rows(plan: Plan, machine: Machine = HERE) -> list[Row]:
    """A row for each limit that could stand in the way of `plan`, on this machine unless another is given."""
    found = [
        _open_files(plan, machine),
        _nr_open(plan, machine),
        _file_max(plan, machine),
        _memory(plan, machine),
        _tcp_mem(plan, machine),
        _socket_minimum("net.ipv4.tcp_rmem", plan, machine),
        _socket_minimum("net.ipv4.tcp_wmem", plan, machine),
        _somaxconn(plan, machine),
        _netdev_max_backlog(machine),
        _conntrack(plan, machine),
    ]
    if plan.port:
        found.append(_port(plan, machine))
    if not plan.hibernate:
        found.append(_max_map_count(plan, machine))
    return found


def warnings(plan: Plan, machine: Machine = HERE) -> list[str]:
    """What a start of the service should tell: a sentence a row that is unmet, with the line that sets it."""
    return [
        f"{row.name} is {row.found}, wanted {row.wanted} for {plan.clients:,} clients: {row.why}. To set it: {', or: '.join(row.set)}"
        for row in rows(plan, machine)
        if row.unmet and row.at_start
    ]


def exemption(port: int) -> str:
    """The nft table that keeps connections to `port` of this machine out of conntrack, also those it makes to itself."""
    to, back = f"fib daddr type local tcp dport {port} notrack", f"tcp sport {port} notrack"
    return (
        f"table inet comet {{ chain in {{ type filter hook prerouting priority raw; {to}; }};"
        f" chain out {{ type filter hook output priority raw; {back}; {to}; }}; }}"
    )


# -- the rows


def _at_least(name: str, found: int | None, wanted: int, why: str, *lines: str, shown: str = "", at_start: bool = True) -> Row:
    """A row whose number may be larger. `lines` set it (sysctl unless given); `shown` is the number with more to say."""
    if found is None:
        return Row(name, "unknown", f"{wanted:,}", "unknown", why)
    shown = shown or f"{found:,}"
    if found >= wanted:
        return Row(name, shown, f"{wanted:,}", "ok", why)
    return Row(name, shown, f"{wanted:,}", "low", why, lines or (f"sysctl -w {name}={wanted}",), at_start)


def _first(numbers: list[int]) -> int | None:
    return numbers[0] if numbers else None


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GiB"


def _open_files(plan: Plan, machine: Machine) -> Row:
    """The hard limit: the service lifts the soft one to it by itself."""
    wanted = plan.share + RESERVE
    if plan.workers == 1:
        why = f"{plan.clients:,} connections + {RESERVE} of its own"
    else:
        why = f"{plan.clients:,} / {plan.workers} workers, {FILL} % full as they are spread by hash, + {RESERVE} of its own"
    soft, hard = machine.open_files() or (0, None)
    if hard is not None and RESERVE < hard < wanted:
        why += f"; or {math.ceil(plan.clients * 100 / ((hard - RESERVE) * FILL)):,} workers within {hard:,} each"
    shown = f"{hard or 0:,} (soft {soft:,})"
    lines = f"LimitNOFILE={wanted} in the systemd unit", f"ulimit -n {wanted} as root"
    return _at_least("open files a process", hard, wanted, why, *lines, shown=shown)


def _nr_open(plan: Plan, machine: Machine) -> Row:
    why = "no process's limit on open files can be raised beyond it"
    return _at_least("fs.nr_open", _first(machine.sysctl("fs.nr_open")), plan.share + RESERVE, why)


def _file_max(plan: Plan, machine: Machine) -> Row:
    sockets, others = plan.clients * plan.ends, _first(machine.sysctl("fs.file-nr")) or 0
    why = f"of all processes: {sockets:,} sockets + {plan.workers} x {RESERVE} + {others:,} open now"
    return _at_least("fs.file-max", _first(machine.sysctl("fs.file-max")), sockets + plan.workers * RESERVE + others, why)


def _memory(plan: Plan, machine: Machine) -> Row:
    """All clients asleep, all bodies that are let in, and one address that means ill and has all its connections. History and messages
    under way come on top: they have bounds of their own (--history-bytes, tcp_mem)."""
    ours, kernel = ASLEEP if plan.hibernate else AWAKE, SOCKET * plan.ends
    hostile = min(plan.clients, plan.workers * plan.per_address)
    fixed = plan.workers * (WORKER + plan.bodies) + hostile * HOSTILE
    wanted = plan.clients * (ours + kernel) + fixed
    why = (
        f"{plan.clients:,} x ({ours:,} bytes + {kernel:,} of the kernel)"
        f" + {plan.workers} x ({WORKER // 1_000_000} MB + {plan.bodies // 1_000_000} MB of bodies)"
        f" + a hostile address: {hostile:,} x {HOSTILE:,} bytes"
    )
    found = machine.memory_available()
    if found is None:
        return Row("memory available", "unknown", _gib(wanted), "unknown", why)
    if found >= wanted:
        return Row("memory available", _gib(found), _gib(wanted), "ok", why)
    fitting = max(1, (found - fixed) // (ours + kernel) // plan.workers)
    return Row("memory available", _gib(found), _gib(wanted), "low", why, (f"--max-connections {fitting}", "more memory"))


def _tcp_mem(plan: Plan, machine: Machine) -> Row:
    """Its third value: with so many pages of data on their way nothing more is queued on any socket. A connection
    without data takes none of them, one with data at least one (measured: 9,000 messages of 100 bytes, 8,704 pages)."""
    name, wanted = "net.ipv4.tcp_mem", plan.clients
    why = f"the third value: a message on its way to each client, {wanted:,} x {PAGE:,} bytes = {_gib(wanted * PAGE)}"
    values = machine.sysctl(name)
    if len(values) != 3:
        return Row(name, "unknown", f"{wanted:,} pages", "unknown", why)
    found, memory = values[2], (machine.memory() or 0) // PAGE
    enough = max(wanted, memory * 3 // 32)  # never below what the kernel takes by itself; 3 : 4 : 6 is its proportion
    lines = (f'sysctl -w {name}="{enough // 2} {enough * 2 // 3} {enough}"',)
    if found < wanted:
        return Row(name, f"{found:,} pages", f"{wanted:,} pages", "low", why, lines)
    if memory and found > max(wanted, memory):
        why = f"the third value: beyond the memory there is ({_gib(memory * PAGE)}) it bounds nothing"
        return Row(name, f"{found:,} pages", f"at most {max(wanted, memory):,}", "high", why, lines, at_start=False)
    return Row(name, f"{found:,} pages", f"{wanted:,} pages", "ok", why)


def _socket_minimum(name: str, plan: Plan, machine: Machine) -> Row:
    """The first of three values: a socket gets it even while memory is short, so what all get must fit into tcp_mem.
    The others take nothing until data waits, and the service bounds that by its own send buffer."""
    values, pages = machine.sysctl(name), machine.sysctl("net.ipv4.tcp_mem")[2:]
    most = max(SOCKET_MINIMUM, pages[0] * PAGE // plan.clients if pages else 0)
    wanted = f"at most {most:,}"
    why = f"the first value, kept for each socket even when memory is short: {plan.clients:,} x it within tcp_mem, or {SOCKET_MINIMUM:,}"
    if len(values) != 3:
        return Row(name, "unknown", wanted, "unknown", why)
    if values[0] <= most:
        return Row(name, f"{values[0]:,}", wanted, "ok", why)
    if not pages:
        return Row(name, f"{values[0]:,}", wanted, "unknown", why)
    line = f'sysctl -w {name}="{SOCKET_MINIMUM} {values[1]} {values[2]}"'
    return Row(name, f"{values[0]:,}", wanted, "high", why, (line,), at_start=False)


def _somaxconn(plan: Plan, machine: Machine) -> Row:
    wanted = min(BACKLOG, plan.clients)
    why = f"clients that come back all at once wait there for an accept: {plan.clients:,}, or the listener's {BACKLOG:,}"
    return _at_least("net.core.somaxconn", _first(machine.sysctl("net.core.somaxconn")), wanted, why)


def _netdev_max_backlog(machine: Machine) -> Row:
    """What it must be is not in the number of clients but in how long a busy core lets packets wait; whether that was too
    long, the kernel has counted. A packet that finds it full is sent again by TCP: late, not lost."""
    dropped = machine.packets_dropped()
    counted = "" if dropped is None else f"; {dropped:,} found it full since the machine started"
    why = f"packets that wait for a core (loopback, RPS){counted}"
    found = _first(machine.sysctl("net.core.netdev_max_backlog"))
    return _at_least("net.core.netdev_max_backlog", found, LONG_QUEUE if dropped else QUEUE, why, at_start=False)


def _conntrack(plan: Plan, machine: Machine) -> Row:
    """The whole machine shares its entries: without a free one, connections fail, of others too."""
    name = "net.netfilter.nf_conntrack_max"
    limit, entries, connections = _first(machine.sysctl(name)), machine.sysctl("net.netfilter.nf_conntrack_count"), machine.connections()
    wanted = plan.clients + (entries[0] if entries else 0)
    why = f"an entry a connection, {plan.clients:,} + {wanted - plan.clients:,} there now; none where the port is exempt, as root sees"
    if limit is None and connections is not None and not machine.text("/proc/net/stat/nf_conntrack"):
        return Row(name, "not loaded", f"{wanted:,}", "ok", why)
    if limit == 0:
        return Row(name, "0 (no limit)", f"{wanted:,}", "ok", why)
    if limit is not None and connections and entries == [0]:  # loaded, but no rule in force asks for it
        return Row(name, f"{limit:,} (unused)", f"{wanted:,}", "ok", why)
    if limit is not None and limit < wanted and plan.port and not machine.tracks(plan.port):
        return Row(name, f"{limit:,} (exempt)", f"{wanted:,}", "ok", why)
    if limit is not None and limit < wanted and not connections and entries == [0]:
        return Row(name, f"{limit:,} (unused?)", f"{wanted:,}", "unknown", f"{why}; without a connection its use can't be seen")
    lines = [f"nft '{exemption(plan.port)}'"] if plan.port else []
    return _at_least(name, limit, wanted, why, *lines, f"sysctl -w {name}={wanted}")


def _port(plan: Plan, machine: Machine) -> Row:
    name, wanted = "net.ipv4.ip_local_port_range", f"{plan.port} outside"
    why = f"a connection from this machine (of a proxy, a load test) may hold {plan.port} when the service starts again"
    values, reserved = machine.sysctl(name), machine.reserved_ports()
    if len(values) != 2:
        return Row(name, "unknown", wanted, "unknown", why)
    found = f"{values[0]} to {values[1]}"
    if not values[0] <= plan.port <= values[1]:
        return Row(name, found, wanted, "ok", why)
    if within(plan.port, reserved):
        return Row(name, f"{found}, reserved", wanted, "ok", why)
    line = f"sysctl -w net.ipv4.ip_local_reserved_ports={reserved + ',' if reserved else ''}{plan.port}"
    return Row(name, found, wanted, "clash", why, (line,))


def _max_map_count(plan: Plan, machine: Machine) -> Row:
    """A parked greenlet holds a chunk of memory, and chunks that touch share a map: at worst every other client has left.
    Without a map to spare the process can neither take memory nor give it back."""
    why = f"--hibernate off: every other greenlet may leave a map behind, {plan.share:,} / 2 + {WORKER_MAPS:,}"
    return _at_least("vm.max_map_count", _first(machine.sysctl("vm.max_map_count")), plan.share // 2 + WORKER_MAPS, why)
