"""What deploy/ promises, each a function that answers what it has seen, or raises. They run in the order of `CHECKS`.

Here is what systemd does with the service; `tests.deployment.network` has what is in front of it, `tests.deployment.image`
the Dockerfile.
"""

import json
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from comet.server.wsgi import NEXT_REQUEST
from tests.deployment.deployed import PORT, Deployed, told
from tests.deployment.image import the_image_line_by_line
from tests.deployment.machine import ROOT, lines_of
from tests.deployment.network import (
    a_refusal_names_the_request_and_a_limit_the_client,
    an_event_source_outlives_a_service_that_is_away,
    connections_are_not_tracked,
    messages_pass_through_nginx_at_once,
)
from tests.harness import Client, wait_until

CAP_SYS_RESOURCE = 24
README = ROOT / "deploy" / "README.md"
SCORE = 2.0
"""What `systemd-analyze security` may say at most."""


# -- installed as the README says


def a_dry_run_changes_nothing(on: Deployed) -> str:
    said = on.run("deploy/install.sh --dry-run").stdout
    assert "would: " in said and "nothing was changed" in said, said
    on.run("! ls -d /opt/comet /etc/comet /etc/systemd/system/comet.service 2>/dev/null")
    return f"it would do {said.count('would: ')} things"


def the_readme_line_by_line(on: Deployed) -> str:
    lines = lines_of(README)
    assert len(lines) > 8, lines
    # as its package would have left it: /var is empty in there
    on.run("mkdir -p /var/log/nginx /var/lib/nginx")
    before = on.run("cat /etc/nginx/nginx.conf").stdout
    said: dict[str, str] = {}
    for line in lines:
        if line.startswith("apt-get install"):  # no network in there; what it installs is in /usr, which is this machine's
            on.run("for one in python3 nginx nft openssl curl; do command -v $one >/dev/null || exit 1; done")
        elif line.startswith("deploy/install.sh"):
            said[line] = _install(on, line)
        else:
            said[line] = on.run(line).stdout
    (message,) = json.loads(said[next(line for line in lines if "/poll/" in line)])["messages"]
    assert message["data"] == "hello, world", said
    assert on.run("cat /etc/nginx/nginx.conf").stdout == before
    return f"{len(lines)} lines; one prints {message['data']!r}, through nginx and TLS, and nginx.conf is as it was"


def kernel_settings(on: Deployed) -> dict[str, str]:
    """What the kernel has, of all that `--tune` may set."""
    names = re.findall(r"^(\S+) = ", (ROOT / "deploy" / "90-comet.conf").read_text(), re.MULTILINE)
    return {name: " ".join(on.run(f"cat /proc/sys/{name.replace('.', '/')}", check=False).stdout.split()) for name in names}


def _install(on: Deployed, line: str) -> str:
    """Do this line of the README; whether it changed the kernel's settings is as it was asked for."""
    tuned = "--tune" in line and "--dry-run" not in line
    if tuned:  # somebody else's
        on.run("sysctl -w net.ipv4.ip_local_reserved_ports=8000,6000-6002")
    before = kernel_settings(on)
    said = on.run(line, timeout=180).stdout  # packages are installed, on a machine that may have other work
    after = kernel_settings(on)
    if not tuned:
        assert after == before, (line, before, after)
        on.run(
            "! ls /etc/sysctl.d/90-comet.conf /etc/systemd/system/comet-notrack.service 2>/dev/null && ! nft list table inet comet 2>/dev/null"
        )
    for name in ("net.core.somaxconn", "net.ipv4.ip_local_port_range"):
        told = re.search(rf"set {name}: (.*) -> (.*)", said)
        assert (told is not None) == ("--tune" in line), said
        if told:
            assert told[1] == before[name] != told[2] and (after[name] == told[2]) == tuned, (told, before, after)
    if tuned:
        reserved = "80,443,6000-6002,8000"
        assert f"set net.ipv4.ip_local_reserved_ports: 6000-6002,8000 -> {reserved}" in said, said
        assert after["net.ipv4.ip_local_reserved_ports"] == reserved, after
        assert int(after["fs.file-max"]) >= int(before["fs.file-max"])
    return said


def installing_again_does_nothing(on: Deployed) -> str:
    for line in ("deploy/install.sh", "deploy/install.sh --tune"):
        said = on.run(line).stdout
        assert said.startswith("nothing to do"), said
    packages = on.run("/opt/comet/venv/bin/python -m pip list --format=freeze").stdout
    assert "gevent" in packages and "locust" not in packages and "pytest" not in packages, packages
    return "and there are no test tools in its environment"


def it_is_ready(on: Deployed) -> str:
    on.active()
    status = on.shown("StatusText")
    assert re.fullmatch(r"\d+ workers, [\d,]+ of [\d,]+ clients", status), status
    assert on.shown("Type") == "notify" and on.shown("NRestarts") == "0"
    for unit in ("comet.socket", "comet-notrack.service"):
        assert on.shown("ActiveState", unit) == "active", unit
    user = on.run(f"stat -c %U /proc/{on.main()}").stdout.strip()
    assert user == "comet", user
    return f"{status!r}, as the user {user}"


def the_sandbox_holds(on: Deployed) -> str:
    said = on.run("systemd-analyze security --no-pager comet.service").stdout
    score = float(re.search(r"exposure level for comet.service: ([\d.]+)", said)[1])  # type: ignore[index]
    assert score <= SCORE, said
    proc = on.machine.outside(on.main())
    status = (proc / "status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE) and re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), status
    environ = (proc / "environ").read_text()
    assert on.key not in environ, "the key is in the environment"
    return f"scores {score}, has no capability, and its key is not in its environment"


def what_the_unit_grants_is_in_force(on: Deployed) -> str:
    proc = on.machine.outside(on.main())
    first = on.machine.outside(1)

    def most(process: Any, what: str) -> int:
        return int(re.findall(rf"^Max {what} +\d+ +(\d+)", (process / "limits").read_text(), re.MULTILINE)[0])

    score = int((proc / "oom_score_adj").read_text())
    capabilities = re.findall(r"^CapEff:\s+(\w+)", (first / "status").read_text(), re.MULTILINE)
    assert (on.shown("LimitNOFILE"), on.shown("LimitNICE"), on.shown("OOMScoreAdjust")) == ("1048576", "30", "0")
    if int(capabilities[0], 16) >> CAP_SYS_RESOURCE & 1:
        assert (most(proc, "open files"), most(proc, "nice priority"), score) == (1048576, 30, 0)
    else:  # systemd itself may give no more there than it has
        for what in ("open files", "nice priority"):
            assert most(proc, what) == most(first, what)
        assert score == int((first / "oom_score_adj").read_text())
    memory = Path("/proc/meminfo").read_text()  # the container's too
    total = int(re.findall(r"^MemTotal: +(\d+) kB$", memory, re.MULTILINE)[0]) << 10
    high, most_memory = int(on.shown("MemoryHigh")), int(on.shown("MemoryMax"))
    assert total // 2 < high < most_memory < total, (high, most_memory, total)
    assert on.shown("TasksMax") == "4096" and on.shown("Restart") == "on-failure"
    assert on.run("stat -c '%a %U' /etc/comet/publish-key").stdout.split() == ["600", "root"]
    assert on.run("stat -c '%a %U' /run/comet/ /var/lib/comet/").stdout.split() == ["700", "comet"] * 2
    for unit in ("comet.service", "comet.socket", "comet-notrack.service"):
        assert on.shown("UnitFileState", unit) == "enabled", unit
    ours = dict(re.findall(r"^(net\.\S+) = (.+)$", (ROOT / "deploy" / "90-comet.conf").read_text(), re.MULTILINE))
    set_to = {name: " ".join(on.run(f"sysctl -n {name}", check=False).stdout.split()) for name in ours}
    set_here = [name for name, value in ours.items() if set_to[name] == value]
    assert {"net.core.somaxconn", "net.ipv4.ip_local_port_range"} <= set(set_here), set_to
    return (
        f"{most(proc, 'open files'):,} open files, {most_memory >> 20:,} MiB of memory, {score} for the out-of-memory killer, owners and modes; "
        f"{len(set_here)} of {len(ours)} kernel settings of the network, the rest are the host's"
    )


# -- broken, under load


def a_worker_is_killed(on: Deployed) -> str:
    before = {one["pid"] for one in on.workers()}
    with on.swarm() as swarm:
        on.run(f"kill -9 {min(before)}")
        wait_until(lambda: len({one["pid"] for one in on.workers()} - before) == 1)
        time.sleep(2)
        report = swarm.report("settle")
    assert report.came_back > report.clients / len(before) / 4, report
    return told(report, gaps=0)


def it_is_reloaded(on: Deployed) -> str:
    before = {one["pid"] for one in on.workers()}
    main = on.main()
    with on.swarm() as swarm:
        on.run("systemctl reload comet")
        wait_until(lambda: not before & {one["pid"] for one in on.workers()})
        assert on.shown("ActiveState") == "active" and on.main() == main
        report = swarm.report("settle")
    return told(report, gaps=0)


def a_reload_that_fails_leaves_it_as_it_was(on: Deployed) -> str:
    before = {one["pid"] for one in on.workers()}
    on.run("cp /opt/comet/comet/hub.py /tmp/hub.py && echo 'raise RuntimeError(\"broken\")' >>/opt/comet/comet/hub.py")
    on.run("systemctl reload comet")
    wait_until(lambda: "the last reload failed" in on.shown("StatusText"))
    assert {one["pid"] for one in on.workers()} == before and on.shown("ActiveState") == "active"
    on.run("cp /tmp/hub.py /opt/comet/comet/hub.py && systemctl reload comet")
    wait_until(lambda: not before & {one["pid"] for one in on.workers()})
    assert "failed" not in on.shown("StatusText")
    return "systemctl status says so, and the next one goes well"


def an_update_is_a_reload(on: Deployed) -> str:
    before, main = {one["pid"] for one in on.workers()}, on.main()
    on.run("cp -R . /root/new && echo '# newer' >>/root/new/handlers/health.py")
    with on.swarm() as swarm:
        said = on.run("/root/new/deploy/install.sh").stdout
        assert "reload comet.service" in said and "virtual environment" not in said, said
        wait_until(lambda: not before & {one["pid"] for one in on.workers()})
        assert on.main() == main
        report = swarm.report("settle")
    return told(report, gaps=0)


def an_update_that_fails_says_so_and_stops_nothing(on: Deployed) -> str:
    main = on.main()
    on.run("echo no-such-package-as-this >>/root/new/deploy/requirements.txt")
    done = on.run("/root/new/deploy/install.sh", check=False)
    assert done.returncode == 1 and "install.sh: could not make a virtual environment" in done.stderr, done
    assert on.main() == main
    on.run("/opt/comet/venv/bin/python -c 'import gevent'")
    on.run("deploy/install.sh && rm -r /root/new")
    assert on.main() == main and on.run("deploy/install.sh").stdout.startswith("nothing to do")
    return "the service goes on in its old environment, and the next installation mends the rest"


def the_main_process_is_killed(on: Deployed) -> str:
    main, restarts = on.main(), int(on.shown("NRestarts"))
    with on.swarm() as swarm:
        on.run(f"kill -9 {main}")
        wait_until(lambda: on.main() not in (0, main))
        on.active()
        time.sleep(2)
        report = swarm.report("settle")
    assert int(on.shown("NRestarts")) == restarts + 1
    return told(report, gaps=1)


def a_stuck_main_process_is_restarted(on: Deployed) -> str:
    # 15 s as installed, which is long for a check
    on.run(
        "mkdir -p /run/systemd/system/comet.service.d && printf '[Service]\\nWatchdogSec=3\\n' >/run/systemd/system/comet.service.d/soon.conf"
    )
    on.run("systemctl daemon-reload && systemctl restart comet")
    time.sleep(4)
    main, restarts = on.main(), int(on.shown("NRestarts"))
    assert restarts == 0, "it was restarted although it lives"
    began = time.monotonic()
    on.run(f"kill -STOP {main}")
    wait_until(lambda: on.main() not in (0, main))
    on.active()
    took = time.monotonic() - began
    assert "Watchdog timeout" in on.run("journalctl --no-pager -u comet").stdout
    on.run("rm -r /run/systemd/system/comet.service.d && systemctl daemon-reload && systemctl restart comet")
    assert on.shown("WatchdogUSec") == "15s"
    return f"serves again {took:.1f} s after it was stopped, with WatchdogSec=3"


def who_connects_while_it_is_away_is_served(on: Deployed) -> str:
    on.run("systemctl stop comet.service")
    assert on.shown("ActiveState") == "inactive"
    with Client(PORT) as client:
        answer = client.request("GET", "/poll/away?timeout=0")
    assert answer.status == 200, answer
    on.active()
    began = time.monotonic()
    restart = subprocess.Popen(on.machine.inside(["systemctl", "restart", "comet"]))
    served, slowest = 0, 0.0
    while restart.poll() is None or time.monotonic() - began < 2:
        at = time.monotonic()
        with Client(PORT) as client:
            assert client.request("GET", "/healthz").status == 200
        served, slowest = served + 1, max(slowest, time.monotonic() - at)
    return f"a connection started it; during a restart {served} of {served} were answered, the slowest after {slowest:.2f} s"


def subscriptions_outlive_a_restart(on: Deployed) -> str:
    on.ask("PUT", "/users/1/following/2")
    on.run("systemctl restart comet")
    assert on.ask("GET", "/users/1/following")["following"] == ["2"]
    return "/var/lib/comet keeps who follows whom"


def machines_share_a_redis_whose_url_is_a_credential(on: Deployed) -> str:
    """As the README has it for two, of which this one is the one with Redis."""
    if on.run("command -v redis-server redis-cli", check=False).returncode:
        return "skipped: there is no redis-server in /usr"
    on.run(
        "mkdir -p /var/lib/redis && echo 'dir /var/lib/redis' >/root/redis.conf && systemd-run --unit=shared-redis redis-server /root/redis.conf"
    )
    wait_until(lambda: on.run("redis-cli ping", check=False).stdout == "PONG\n")
    lines = lines_of(README, "shell")
    elsewhere = [line for line in lines if line.startswith(("apt-get install", "scp "))]
    assert len(elsewhere) == 3 and lines[-1].endswith("/readyz"), lines
    here = [line.replace("10.0.0.1", "127.0.0.1") for line in lines if line not in elsewhere]
    on.run(f"sh -euc {shlex.quote(chr(10).join(here[:-1]))}")
    wait_until(lambda: json.loads(on.run(here[-1]).stdout) == {"status": "ready"})
    password = on.run("cat /root/redis-password").stdout
    assert len(password) == 64 and on.run("stat -c '%a %U' /etc/comet/backplane").stdout.split() == ["600", "root"]
    for pid in (on.main(), *(int(one["pid"]) for one in on.workers())):
        for name in ("environ", "cmdline"):
            assert password not in (on.machine.outside(pid) / name).read_text(), "the password is in the environment"
    assert password not in on.run("systemctl show comet; systemctl cat comet; journalctl --no-pager -u comet").stdout
    on.ask("POST", "/publish/shared", b"through Redis")
    kept = on.run("REDISCLI_AUTH=$(cat /root/redis-password) redis-cli --scan --pattern 'c:*shared*'").stdout.split()
    assert kept, "it is not in Redis"
    on.run("rm /etc/comet/backplane")
    said = on.run("deploy/install.sh").stdout
    assert "remove /etc/systemd/system/comet.service.d/backplane.conf" in said and "restart comet.service" in said, said
    on.run("systemctl stop shared-redis")
    wait_until(lambda: json.loads(on.run(here[-1]).stdout) == {"status": "ready"})
    assert on.run("deploy/install.sh").stdout.startswith("nothing to do")
    return f"{len(here)} lines; the URL is in no environment, and without its file the machine is one alone again"


def wrong_settings_are_told_and_not_tried_again(on: Deployed) -> str:
    restarts = on.shown("NRestarts")
    on.run("cp /etc/comet/comet.env /tmp/right.env && echo COMET_TRUSTED_PROXIES=10.0.0.1/8 >>/etc/comet/comet.env")
    assert on.run("systemctl restart comet", check=False).returncode != 0
    assert (on.shown("ActiveState"), on.shown("ExecMainStatus"), on.shown("NRestarts")) == ("failed", "2", restarts)
    said = on.run("journalctl --no-pager -o cat -n 20 -u comet").stdout
    assert "--trusted-proxies" in said and "host bits" in said, said
    on.run("cp /tmp/right.env /etc/comet/comet.env && systemctl restart comet")
    on.active()
    return "status 2, a sentence in the journal, and no restart"


def it_stops(on: Deployed) -> str:
    with on.swarm() as swarm:
        swarm.order("leave")
        began = time.monotonic()
        on.run("systemctl stop comet.socket comet.service")
        took = time.monotonic() - began
        report = swarm.report("left")
    assert (on.shown("ActiveState"), on.shown("Result"), on.shown("ExecMainStatus")) == ("inactive", "success", "0")
    assert took < 60
    # a publisher's request may cross the end of its connection; it was not acknowledged, and is its to repeat. So may a poller's, where
    # the clients had no core for about as long as a drain waits for the next request of who was just answered
    crossed = ("Publisher: ", "Poller: closed, with a request under way") if report.late > NEXT_REQUEST / 4 else ("Publisher: ",)
    assert all(ending == "clean" or ending.startswith(crossed) for ending in report.endings) and report.lost == 0, report
    assert not on.run("pgrep -f '[/]opt/comet/app.py'; ls /run/comet", check=False).stdout
    on.run("systemctl start comet.socket comet.service")
    return f"after {took:.1f} s, with status 0; all {report.clients} clients were told properly, and no process or socket is left"


# -- the log, and the end


def the_journal_has_what_happened(on: Deployed) -> str:
    lines = on.run("journalctl --no-pager -o json -u comet.service").stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    text = "\n".join(str(one["MESSAGE"]) for one in entries)
    for said in (
        "generation 1 is ready after",
        "starting another in",
        "reloading: starting a new generation",
        "the reload failed",
        "stopping: ",
    ):
        assert said in text, said
    errors = [one for one in entries if one["PRIORITY"] == "3" and one["SYSLOG_IDENTIFIER"] == "python"]
    assert any("starting another in" in one["MESSAGE"] for one in errors), "a dead worker is not an error in the journal"
    assert len(entries) < 1000, "a line a request?"
    with on.settings("COMET_LOG=json"):
        since = on.shown("InvocationID")
        lines = on.run(f"journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID={since} _COMM=python").stdout.splitlines()
    objects = [json.loads(line) for line in lines]
    assert any(one["message"].startswith("generation 1 is ready") for one in objects), lines
    return f"{len(entries)} lines of all these restarts, failures as errors; with COMET_LOG=json each is an object"


def it_is_uninstalled(on: Deployed) -> str:
    said = on.run("deploy/install.sh --uninstall --purge").stdout
    assert "  net.ipv4.ip_local_reserved_ports = 6000-6002,8000\n" in said, said
    on.run(
        "! ls -d /opt/comet /etc/comet /var/lib/comet /var/lib/private/comet /etc/systemd/system/comet* /etc/sysctl.d/90-comet.conf 2>/dev/null"
    )
    on.run("! nft list table inet comet 2>/dev/null")
    assert on.shown("LoadState") == "not-found"
    said = on.run("deploy/install.sh --uninstall --purge").stdout
    assert said.startswith("nothing to do"), said
    return "nothing of it is left, and what the kernel had before is told"


CHECKS = (
    a_dry_run_changes_nothing,
    the_readme_line_by_line,
    installing_again_does_nothing,
    it_is_ready,
    the_sandbox_holds,
    what_the_unit_grants_is_in_force,
    connections_are_not_tracked,
    messages_pass_through_nginx_at_once,
    an_event_source_outlives_a_service_that_is_away,
    a_refusal_names_the_request_and_a_limit_the_client,
    a_worker_is_killed,
    it_is_reloaded,
    a_reload_that_fails_leaves_it_as_it_was,
    an_update_is_a_reload,
    an_update_that_fails_says_so_and_stops_nothing,
    the_main_process_is_killed,
    a_stuck_main_process_is_restarted,
    who_connects_while_it_is_away_is_served,
    subscriptions_outlive_a_restart,
    machines_share_a_redis_whose_url_is_a_credential,
    wrong_settings_are_told_and_not_tried_again,
    it_stops,
    the_journal_has_what_happened,
    it_is_uninstalled,
    the_image_line_by_line,
)
