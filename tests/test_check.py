"""What the machine must allow: each row met and unmet, on machines that are made up; and the command, on this one."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import pytest

from comet import __main__ as command
from comet.kernel import check, limits
from comet.kernel.check import Plan, Row
from comet.kernel.machine import PAGE, Machine, within
from comet.settings import Settings
from tests.harness import ROOT, TIMEOUT

PLAN = Plan(10_000)

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max processes             96365                96365                processes
Max open files            {soft:<20} {hard:<20} files
"""
SNMP = """\
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs
Tcp: 1 200 120000 -1 220 230 1 58 {connections} 138 147
"""
FILES = {
    "/proc/self/limits": LIMITS.format(soft=1024, hard=20_000),
    "/proc/sys/fs/nr_open": "1048576\n",
    "/proc/sys/fs/file-max": "2466170\n",
    "/proc/sys/fs/file-nr": "500\t0\t2466170\n",
    "/proc/meminfo": "MemTotal:        8388608 kB\nMemFree:          100000 kB\nMemAvailable:    4194304 kB\n",
    "/proc/self/cgroup": "0::/system.slice/comet.service\n",
    "/proc/sys/net/ipv4/tcp_mem": "95000\t127000\t190000\n",
    "/proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456\n",
    "/proc/sys/net/ipv4/tcp_wmem": "4096\t16384\t4194304\n",
    "/proc/sys/net/core/somaxconn": "4096\n",
    "/proc/sys/net/core/netdev_max_backlog": "1000\n",
    "/proc/net/softnet_stat": "04420bfa 00000000 00000001 00000000\n03fd9637 00000000 00000000 00000000\n",
    "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
    "/proc/sys/net/ipv4/ip_local_reserved_ports": "\n",
    "/proc/sys/net/netfilter/nf_conntrack_max": "262144\n",
    "/proc/sys/net/netfilter/nf_conntrack_count": "40\n",
    "/proc/net/stat/nf_conntrack": "entries\n00000028\n",
    "/proc/net/snmp": SNMP.format(connections=30),
    "/proc/sys/vm/max_map_count": "65530\n",
}
"""A small server on which PLAN goes well."""

NAMES = [
    "open files a process", "fs.nr_open", "fs.file-max", "memory available", "net.ipv4.tcp_mem", "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem", "net.core.somaxconn", "net.core.netdev_max_backlog", "net.netfilter.nf_conntrack_max",
    "net.ipv4.ip_local_port_range",
]  # fmt: skip


def sysctl(name: str, value: object) -> dict[str, str]:
    return {"/proc/sys/" + name.replace(".", "/"): f"{value}\n"}


def made_up(files: Mapping[str, str], rules: Callable[[], str] = str) -> Machine:
    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    return Machine(read, rules)


def machine(changes: Mapping[str, str] | None = None, rules: str = "") -> Machine:
    """The small server, with changes."""
    return made_up({**FILES, **(changes or {})}, lambda: rules)


def without(*paths: str) -> Machine:
    return made_up({path: text for path, text in FILES.items() if path not in paths})


def row(name: str, plan: Plan = PLAN, on: Machine | None = None) -> Row:
    found = [one for one in check.rows(plan, on or machine()) if one.name == name]
    assert len(found) == 1
    return found[0]


def verdict(name: str, value: int, plan: Plan = PLAN) -> str:
    """Of a row whose sysctl has this value."""
    return row(name, plan, machine(sysctl(name, value))).verdict


# -- all rows


def test_the_small_server_has_all_that_is_wanted() -> None:
    found = check.rows(PLAN, machine())
    assert [one.name for one in found] == NAMES
    assert {one.verdict for one in found} == {"ok"}
    assert not any(one.set for one in found)
    assert all(one.why for one in found)
    assert check.warnings(PLAN, machine()) == []


@pytest.mark.parametrize("files", [{}, dict.fromkeys(FILES, ""), dict.fromkeys(FILES, "what is this\n")], ids=["missing", "empty", "odd"])
def test_what_can_not_be_read_is_unknown_and_no_failure(files: Mapping[str, str]) -> None:
    found = check.rows(Plan(1_000_000, hibernate=False), made_up(files))
    assert {one.verdict for one in found} == {"unknown"}
    assert not any(one.unmet or one.set for one in found)
    assert check.warnings(Plan(1_000_000, hibernate=False), made_up(files)) == []
    assert check.capacity(machine=made_up(files)) is None


@pytest.mark.parametrize("path", FILES)
def test_one_missing_file_leaves_the_other_rows_as_they_were(path: str) -> None:
    plan = Plan(10_000, hibernate=False)
    changed = [
        one.name
        for one, before in zip(check.rows(plan, without(path)), check.rows(plan, machine()), strict=True)
        if one.verdict != before.verdict
    ]
    assert len(changed) <= (2 if path == "/proc/meminfo" else 1)


def test_a_file_that_is_refused_or_not_text_is_unknown_too() -> None:
    def refuse(path: str) -> str:
        raise PermissionError(path)

    def garble(path: str) -> str:
        return b"\xff".decode()

    for read in (refuse, garble):
        assert {one.verdict for one in check.rows(PLAN, Machine(read, str))} == {"unknown"}


def test_a_huge_plan_on_the_small_server_meets_each_row_that_depends_on_clients() -> None:
    plan = Plan(3_000_000, hibernate=False)
    unmet = {one.name for one in check.rows(plan, machine()) if one.unmet}
    assert unmet == {
        "open files a process", "fs.nr_open", "fs.file-max", "memory available", "net.ipv4.tcp_mem",
        "net.netfilter.nf_conntrack_max", "vm.max_map_count",
    }  # fmt: skip
    assert all(one.set for one in check.rows(plan, machine()) if one.unmet)


# -- one by one


def test_open_files_of_one_process() -> None:
    name = "open files a process"
    met, low = row(name, Plan(20_000 - limits.RESERVE)), row(name, Plan(20_001 - limits.RESERVE))
    assert (met.verdict, met.found, met.wanted) == ("ok", "20,000 (soft 1,024)", "20,000")
    assert (low.verdict, low.wanted) == ("low", "20,001")
    assert low.set == ("LimitNOFILE=20001 in the systemd unit", "ulimit -n 20001 as root")
    assert "or 2 workers within 20,000 each" in low.why
    assert row(name, on=machine({"/proc/self/limits": LIMITS.format(soft="unlimited", hard="unlimited")})).verdict == "ok"


def test_open_files_of_workers_leave_room_for_an_uneven_spread() -> None:
    name = "open files a process"
    fits = 60 * (20_000 - limits.RESERVE) * 85 // 100
    assert row(name, Plan(fits, workers=60)).verdict == "ok"
    assert row(name, Plan(fits + 1, workers=60)).verdict == "low"
    assert row(name, Plan(1_000_000, workers=60)).wanted == "19,864"  # 1,000,000 / 60 / 0.85 + 256
    assert "or 60 workers" in row(name, Plan(1_000_000)).why
    assert row(name, Plan(1_000_000, workers=60)).verdict == "ok"
    assert row(name, Plan(1_000_000, workers=59)).verdict == "low"


def test_a_limit_below_the_reserve_proposes_no_number_of_workers() -> None:
    low = row("open files a process", on=machine({"/proc/self/limits": LIMITS.format(soft=256, hard=256)}))
    assert low.verdict == "low"
    assert "workers" not in low.why


@pytest.mark.parametrize(("workers", "clients"), [(1, 19_744), (2, 33_564), (60, 1_006_944)])
def test_capacity_is_just_what_the_limit_on_open_files_allows(workers: int, clients: int) -> None:
    assert check.capacity(workers, machine()) == clients
    assert row("open files a process", Plan(clients, workers=workers)).verdict == "ok"
    assert row("open files a process", Plan(clients + 1, workers=workers)).verdict == "low"


@pytest.mark.parametrize(
    ("name", "plan", "wanted"),
    [
        ("fs.nr_open", PLAN, 10_000 + 256),
        ("fs.nr_open", Plan(1_000_000, workers=60), 19_864),
        ("fs.file-max", PLAN, 10_000 + 256 + 500),
        ("fs.file-max", Plan(10_000, workers=3), 10_000 + 3 * 256 + 500),
        ("fs.file-max", Plan(10_000, loopback=True), 20_000 + 256 + 500),
        ("net.core.somaxconn", PLAN, limits.BACKLOG),
        ("net.core.somaxconn", Plan(100), 100),
        ("net.netfilter.nf_conntrack_max", PLAN, 10_040),
    ],
)
def test_a_number_that_may_be_larger(name: str, plan: Plan, wanted: int) -> None:
    met, low = (row(name, plan, machine(sysctl(name, value))) for value in (wanted, wanted - 1))
    assert (met.verdict, met.found, met.wanted, met.set) == ("ok", f"{wanted:,}", f"{wanted:,}", ())
    assert (low.verdict, low.found, low.wanted) == ("low", f"{wanted - 1:,}", f"{wanted:,}")
    assert low.set[-1] == f"sysctl -w {name}={wanted}"


def test_bodies_and_a_hostile_address_are_counted_as_the_service_bounds_them() -> None:
    assert (Settings().max_bodies, Settings().max_per_address) == (check.BODIES, check.PER_ADDRESS)
    why = row("memory available").why
    assert f"{check.BODIES // 1_000_000} MB of bodies" in why
    assert f"a hostile address: {check.PER_ADDRESS:,} x" in why


def meminfo(available: int, total: int = 8 << 30) -> dict[str, str]:
    return {"/proc/meminfo": f"MemTotal: {total // 1024} kB\nMemAvailable:   {available // 1024} kB\n"}


WORKER = check.WORKER + check.BODIES + check.PER_ADDRESS * check.HOSTILE
"""What a worker is counted for, whatever clients it has."""


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (Plan(1_000_000), 1_000_000 * 5_250 + WORKER),
        (Plan(1_000_000, workers=60), 1_000_000 * 5_250 + 60 * WORKER),
        (Plan(1_000_000, loopback=True), 1_000_000 * 9_500 + WORKER),
        (Plan(1_000_000, hibernate=False), 1_000_000 * 12_250 + WORKER),
        (Plan(1_000_000, workers=2, bodies=1_000), 1_000_000 * 5_250 + 2 * (WORKER - check.BODIES + 1_000)),
        (Plan(1_000_000, workers=2, per_address=1), 1_000_000 * 5_250 + 2 * (WORKER - (check.PER_ADDRESS - 1) * check.HOSTILE)),
        (Plan(1_000_000, workers=2, per_address=1_000_000), 1_000_000 * (5_250 + check.HOSTILE) + 2 * (check.WORKER + check.BODIES)),
    ],
)
def test_memory(plan: Plan, wanted: int) -> None:
    assert row("memory available", plan, machine(meminfo(wanted + 1024))).verdict == "ok"
    low = row("memory available", plan, machine(meminfo(wanted - 1024)))
    assert low.verdict == "low"
    assert low.set[0] == f"--max-connections {999_999 // plan.workers}"


@pytest.mark.parametrize(
    ("group", "files", "left"),
    [
        ("0::/a/b\n", {"/a/b/memory.max": "100000000", "/a/b/memory.current": "1000"}, 99_999_000),
        ("0::/a/b\n", {"/a/memory.max": "5000", "/a/memory.current": "1000", "/a/b/memory.max": "max", "/a/b/memory.current": "9"}, 4_000),
        ("0::/\n", {"/memory.max": "5000", "/memory.current": "6000"}, 0),
        ("0::/\n", {"/memory.max": "5000", "/memory.current": "4000", "/memory.stat": "file 9\ninactive_file 500\n"}, 1_500),
        ("1:name=systemd:/\n0::/a\n", {"/a/memory.max": "5000", "/a/memory.current": "1000"}, 4_000),
        ("4:memory:/a\n", {"/a/memory.max": "5000", "/a/memory.current": "1000"}, 4 << 30),
        ("0::/a\n", {"/a/memory.max": "max", "/a/memory.current": "1000"}, 4 << 30),
        ("0::/a\n", {"/a/memory.max": str(1 << 60), "/a/memory.current": "1000"}, 4 << 30),
        ("0::/../outside\n", {}, 4 << 30),
    ],
)
def test_memory_is_what_the_control_groups_leave(group: str, files: Mapping[str, str], left: int) -> None:
    changes = {"/sys/fs/cgroup" + path: text + "\n" for path, text in files.items()}
    assert machine({**changes, "/proc/self/cgroup": group}).memory_available() == left


def test_tcp_mem_has_a_page_for_each_client() -> None:
    name, plan = "net.ipv4.tcp_mem", Plan(500_000)
    assert row(name, plan, machine(sysctl(name, "1 2 500000"))).verdict == "ok"
    low = row(name, plan, machine(sysctl(name, "400000 450000 499999")))
    assert (low.verdict, low.found, low.wanted, low.at_start) == ("low", "499,999 pages", "500,000 pages", True)
    assert low.set == ('sysctl -w net.ipv4.tcp_mem="250000 333333 500000"',)


def test_tcp_mem_beyond_the_memory_bounds_nothing_and_is_set_to_no_less_than_the_kernels_own() -> None:
    name, total = "net.ipv4.tcp_mem", (8 << 30) // PAGE
    assert row(name, on=machine(sysctl(name, f"1 2 {total}"))).verdict == "ok"
    high = row(name, on=machine(sysctl(name, f"1 2 {total + 1}")))
    assert (high.verdict, high.wanted, high.at_start) == ("high", f"at most {total:,}", False)
    own = total * 3 // 32
    assert high.set == (f'sysctl -w net.ipv4.tcp_mem="{own // 2} {own * 2 // 3} {own}"',)
    beyond = sysctl(name, f"1 2 {total + 1}")
    assert row(name, on=machine({**beyond, "/proc/meminfo": ""})).verdict == "ok"


@pytest.mark.parametrize("name", ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"])
def test_what_each_socket_is_kept_must_fit_tcp_mem_together(name: str) -> None:
    most = 190_000 * PAGE // 10_000
    assert row(name, on=machine(sysctl(name, f"{most} 131072 6291456"))).verdict == "ok"
    high = row(name, on=machine(sysctl(name, f"{most + 1} 131072 6291456")))
    assert (high.verdict, high.wanted, high.at_start) == ("high", f"at most {most:,}", False)
    assert high.set == (f'sysctl -w {name}="4096 131072 6291456"',)
    # the kernel's own is never too much: where it does not fit, tcp_mem is what is low
    assert row(name, Plan(1_000_000)).verdict == "ok"
    assert row(name, Plan(1_000_000), machine(sysctl(name, "4097 1 1"))).verdict == "high"
    unknown = sysctl("net.ipv4.tcp_mem", "")
    assert row(name, on=machine(unknown)).verdict == "ok"
    assert row(name, on=machine({**unknown, **sysctl(name, "8192 1 1")})).verdict == "unknown"


def test_the_input_queue_is_long_enough_while_nothing_finds_it_full() -> None:
    name = "net.core.netdev_max_backlog"
    assert verdict(name, 1000) == "ok"
    assert verdict(name, 999) == "low"
    dropped = {"/proc/net/softnet_stat": "04420bfa 00000002 00000001\n03fd9637 0000000a 00000000\n"}
    low = row(name, on=machine(dropped))
    assert (low.verdict, low.wanted, low.at_start) == ("low", "10,000", False)
    assert "; 12 found it full" in low.why
    assert low.set == (f"sysctl -w {name}=10000",)
    assert row(name, on=machine({**dropped, **sysctl(name, 10_000)})).verdict == "ok"
    uncounted = row(name, on=without("/proc/net/softnet_stat"))
    assert uncounted.verdict == "ok"
    assert "found it full" not in uncounted.why


@pytest.mark.parametrize(
    ("port", "reserved", "expected"),
    [
        (8000, "", "ok"),
        (32_767, "", "ok"),
        (32_768, "", "clash"),
        (60_999, "", "clash"),
        (61_000, "", "ok"),
        (40_000, "40000", "ok"),
        (40_000, "80,39990-40000,50000", "ok"),
        (40_000, "80,39990-39999,40001", "clash"),
    ],
)
def test_the_port_among_those_that_connections_take(port: int, reserved: str, expected: str) -> None:
    on = machine(sysctl("net.ipv4.ip_local_reserved_ports", reserved))
    found = row("net.ipv4.ip_local_port_range", Plan(10_000, port), on)
    assert found.verdict == expected
    line = f"sysctl -w net.ipv4.ip_local_reserved_ports={reserved}{',' if reserved else ''}{port}"
    assert found.set == ((line,) if expected == "clash" else ())


def test_a_port_yet_to_be_chosen_can_not_clash() -> None:
    assert [one.name for one in check.rows(Plan(10_000, 0), machine())] == NAMES[:-1]


def test_maps_count_where_clients_keep_their_greenlets() -> None:
    name = "vm.max_map_count"
    wanted = 5_000 + check.WORKER_MAPS
    plan = Plan(10_000, hibernate=False)
    assert verdict(name, wanted, plan) == "ok"
    assert verdict(name, wanted - 1, plan) == "low"
    assert row(name, Plan(17_000, workers=2, hibernate=False)).wanted == f"{wanted:,}"  # each process has its own maps


# -- conntrack

CONNTRACK = "net.netfilter.nf_conntrack_max"
MANY = Plan(300_000)


def conntrack(limit: int = 262_144, entries: int = 40, connections: int = 30) -> dict[str, str]:
    return {
        **sysctl(CONNTRACK, limit),
        **sysctl("net.netfilter.nf_conntrack_count", entries),
        "/proc/net/snmp": SNMP.format(connections=connections),
    }


@pytest.mark.parametrize(
    ("changes", "expected", "found"),
    [
        (conntrack(), "low", "262,144"),
        (conntrack(limit=300_040), "ok", "300,040"),
        (conntrack(limit=0), "ok", "0 (no limit)"),
        (conntrack(entries=0), "ok", "262,144 (unused)"),
        (conntrack(entries=0, connections=0), "unknown", "262,144 (unused?)"),
        (conntrack(entries=1, connections=0), "low", "262,144"),
    ],
)
def test_conntrack(changes: Mapping[str, str], expected: str, found: str) -> None:
    judged = row(CONNTRACK, MANY, machine(changes))
    assert (judged.verdict, judged.found) == (expected, found)


def test_conntrack_that_is_not_loaded_or_hidden() -> None:
    hidden = f"/proc/sys/{CONNTRACK.replace('.', '/')}", "/proc/sys/net/netfilter/nf_conntrack_count"
    assert row(CONNTRACK, MANY, without(*hidden)).verdict == "unknown"  # it runs: its statistics are there
    absent = row(CONNTRACK, MANY, without(*hidden, "/proc/net/stat/nf_conntrack"))
    assert (absent.verdict, absent.found) == ("ok", "not loaded")


def test_conntrack_is_set_by_exempting_the_port_or_by_more_entries() -> None:
    low = row(CONNTRACK, MANY)
    assert low.set == (f"nft '{check.exemption(8000)}'", "sysctl -w net.netfilter.nf_conntrack_max=300040")
    assert row(CONNTRACK, Plan(300_000, 0)).set == low.set[1:]


RULES = """\
table inet comet {
	chain in {
		type filter hook prerouting priority raw; policy accept;
		fib daddr type local tcp dport %s notrack
	}

	chain out {
		type filter hook output priority raw; policy accept;
		tcp sport %s counter packets 0 bytes 0 notrack
		tcp dport 443 accept
	}
}
"""


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (RULES % ("8000", "8000"), "ok"),
        (RULES % ("{ 80, 7990-8010 }", "7990-8000"), "ok"),
        (RULES % ("8000", "8001"), "low"),
        (RULES % ("80", "8000"), "low"),
        (RULES % ("{ 80, 8001 }", "8001-8010"), "low"),
        ((RULES % ("8000", "8000")).replace("notrack", "accept"), "low"),
        ("tcp dport 8000 notrack\n", "low"),
        ("", "low"),
    ],
)
def test_an_exempt_port_takes_no_entries(rules: str, expected: str) -> None:
    assert row(CONNTRACK, MANY, machine(rules=rules)).verdict == expected


def test_rules_are_asked_for_only_where_they_decide() -> None:
    def refuse() -> str:
        raise AssertionError("asked")

    check.rows(PLAN, Machine(machine().read, refuse))
    with pytest.raises(AssertionError, match="asked"):
        check.rows(MANY, Machine(machine().read, refuse))


def test_the_exemption_is_recognized_as_nft_prints_it() -> None:
    printed = check.exemption(8000).replace("; ", "\n").replace("{ ", "{\n")
    assert not machine(rules=printed).tracks(8000)
    assert machine(rules=printed).tracks(8001)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [("", False), ("8000", True), ("800", False), ("80000", False), ("1-8000", True), ("8000-8001", True), ("1-7999,8001", False)],
)
def test_ranges_of_ports(ranges: str, expected: bool) -> None:
    assert within(8000, ranges) is expected


# -- at the start of the service


def test_a_warning_is_one_sentence_with_the_line_that_sets_it() -> None:
    (warning,) = check.warnings(PLAN, machine(sysctl("net.core.somaxconn", 128)))
    assert "\n" not in warning
    assert warning.startswith("net.core.somaxconn is 128, wanted 4,096 for 10,000 clients: ")
    assert warning.endswith("To set it: sysctl -w net.core.somaxconn=4096")


def test_a_start_is_silent_about_what_only_slows_or_never_comes() -> None:
    slow = {
        "/proc/net/softnet_stat": "1 ff\n",
        **sysctl("net.ipv4.tcp_rmem", "9000000 9000000 9000000"),
        **sysctl("net.ipv4.tcp_wmem", "9000000 9000000 9000000"),
    }
    assert [one.name for one in check.rows(PLAN, machine(slow)) if one.unmet] == [
        "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem", "net.core.netdev_max_backlog",
    ]  # fmt: skip
    assert check.warnings(PLAN, machine(slow)) == []


def test_a_laptop_that_allows_a_million_files_is_not_told_of_a_million_clients() -> None:
    laptop = machine({"/proc/self/limits": LIMITS.format(soft=1024, hard=1_048_576)})
    assert check.capacity(machine=laptop) == 1_048_320
    assert check.warnings(Plan(1_048_320), laptop)
    assert check.warnings(Plan(check.UNPLANNED), laptop) == []


def start(*flags: str) -> str:
    """What `python app.py` logs until it listens and is stopped."""
    program = subprocess.Popen(
        [sys.executable, "app.py", "--port", "0", *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None
    assert "comet listens" in program.stdout.readline()
    program.terminate()
    _, log = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 0
    return log


def test_the_service_warns_of_what_its_plan_lacks() -> None:
    _, hard = check.HERE.open_files() or (0, 0)
    log = start("--max-connections", str(hard))
    assert f"WARNING comet: open files a process is {hard:,} (soft {hard:,}), wanted {hard + limits.RESERVE:,}" in log
    assert f"LimitNOFILE={hard + limits.RESERVE} " in log


def test_a_plain_start_tells_only_what_a_plan_of_its_size_lacks() -> None:
    expected = check.warnings(Plan(min(check.capacity() or 1, check.UNPLANNED), 0))
    assert start().count("WARNING") == len(expected)


# -- the command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "comet", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def test_the_command_on_this_machine() -> None:
    done = run("check")
    assert done.stderr == ""
    clients = check.capacity()
    assert done.stdout.startswith(f"{clients:,} clients on port 8000, 1 worker\n")
    rows = check.rows(Plan(clients or 0))
    for one in rows:
        assert re.search(rf"^{one.verdict} +{re.escape(one.name)}  ", done.stdout, re.MULTILINE), one
    assert done.returncode == any(one.unmet for one in rows)
    assert "ok " in done.stdout


def test_exit_status_is_1_and_lines_are_shown_where_something_is_missing() -> None:
    done = run("check", "--clients", "1000000000", "--hibernate", "off", "--loopback", "--port", "9000", "--workers", "2")
    assert done.returncode == 1
    assert done.stdout.startswith("1,000,000,000 clients on port 9000, 2 workers\n")
    assert "> LimitNOFILE=588235551 in the systemd unit\n" in done.stdout
    assert "2,000,000,000 sockets + 2 x 256" in done.stdout
    assert "> sysctl -w vm.max_map_count=294118647\n" in done.stdout
    assert re.search(r"^\d+ of 12 not met$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("on", [machine(), made_up({})], ids=["met", "unknown"])
def test_exit_status_is_0_where_nothing_is_missing(
    on: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check.rows(PLAN, on)
    monkeypatch.setattr(check, "rows", lambda plan: found)
    assert command.main(["check", "--clients", "10000"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all met, as far as can be known"


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def unread() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(("output", "why"), [(full, "No space left on device"), (unread, "Broken pipe")], ids=["a full disk", "a pipe"])
def test_output_that_can_not_be_written_is_said(output: Callable[[], int], why: str) -> None:
    descriptor = output()
    command = [sys.executable, "-m", "comet", "check", "--clients", "5"]
    done = subprocess.run(command, cwd=ROOT, stdout=descriptor, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    os.close(descriptor)
    assert (done.returncode, done.stderr) == (2, f"python -m comet: the output can't be written: {why}\n")


def test_without_a_limit_to_go_by_the_number_of_clients_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "capacity", lambda workers: None)
    assert command.main(["check"]) == 2
    assert "--clients" in capsys.readouterr().err


def test_columns_are_aligned() -> None:
    rows = check.rows(Plan(3_000_000, 40_000), machine())
    head, *lines = command.table(rows).splitlines()
    assert head.split() == ["limit", "found", "wanted"]
    for one in rows:
        (line,) = (line for line in lines if line.startswith(one.verdict) and f" {one.name} " in line)
        cells = [line[start:end].strip() for start, end in itertools.pairwise([0, *map(head.index, head.split()), None])]
        assert cells == [one.verdict, one.name, one.found, one.wanted]
        below = lines[lines.index(line) + 1 :][: 1 + len(one.set)]
        assert [text.strip() for text in below] == [one.why, *(f"> {text}" for text in one.set)]


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["check", "stray"], ["check", "--port", "0"], ["check", "--port", "65536"], ["check", "--clients", "0"],
     ["check", "--clients", "many"], ["check", "--workers", "-1"], ["check", "--hibernate", "maybe"], ["check", "--client", "1"]],
)  # fmt: skip
def test_bad_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "python -m comet" in capsys.readouterr().err


def test_it_needs_the_standard_library_alone() -> None:
    """A supervisor without greenlets imports it; so would `python -m comet check` before anything is installed."""
    program = (
        "import sys, json; from comet import __main__ as main; from comet.kernel import check; check.warnings(check.Plan(1 << 40));"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules if not name.startswith('_')})))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {program}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) - set(sys.stdlib_module_names) == {"comet"}


def test_it_is_fast() -> None:
    def seconds() -> float:
        began = time.thread_time()  # without the time for which others had the core
        check.rows(Plan(1_000_000, hibernate=False))
        return time.thread_time() - began

    assert min(seconds() for _ in range(5)) < 0.3


def test_it_needs_no_root() -> None:
    program = (
        "import os; from comet.kernel import check; os.geteuid() or os.setuid(65534);"
        "print([row.name for row in check.rows(check.Plan(1000)) if row.verdict == 'unknown'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([one.name for one in check.rows(Plan(1000)) if one.verdict == "unknown"])
