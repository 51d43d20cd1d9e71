"""What deploy/ promises, each a function that answers what it has seen, or raises. They run in the order of `CHECKS`.

The clients run outside of the machine but on its loopback (`Machine.enter_network`): a swarm of the chaos tests,
whose model says what was lost, and single ones that measure.
"""

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.behaviour.swarm import Report
from tests.behaviour.test_chaos import Swarm
from tests.deployment.machine import ROOT, Machine, lines_of
from tests.harness import Client, wait_until

PORT = 8000
SCORE = 2.0
"""What `systemd-analyze security` may say at most."""
PROMPT = 0.1
"""Seconds from a publication to its arrival through nginx, at most."""


class Deployed:
    """A machine, and what the checks share."""

    def __init__(self, machine: Machine, full: bool) -> None:
        self.machine = machine
        self.run = machine.run
        self.full = full
        self._swarms = 0

    @property
    def key(self) -> str:
        """The publish key that was made."""
        return self.run("cat /etc/comet/publish-key").stdout.strip()

    def shown(self, name: str, unit: str = "comet.service") -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --value -p {name} {unit}").stdout.strip()

    def main(self) -> int:
        """The supervisor's number, in the machine."""
        return int(self.shown("MainPID"))

    def workers(self) -> list[dict[str, Any]]:
        """What /stats says of them."""
        return list(self.ask("GET", "/stats")["workers"])

    def ask(self, method: str, target: str, body: bytes | None = None) -> Any:
        """One request, straight to the service."""
        with Client(PORT) as client:
            answer = client.request(method, target, body, {"Authorization": f"Bearer {self.key}"})
        assert answer.status < 300, answer
        return answer.json

    def active(self) -> None:
        """Wait until it is ready."""
        wait_until(lambda: self.shown("ActiveState") == "active", 30)

    @contextmanager
    def settings(self, *lines: str) -> Iterator[None]:
        """The service with other settings for a while."""
        self.run("cp /etc/comet/comet.env /tmp/comet.env && printf '%s\\n' " + " ".join(lines) + " >>/etc/comet/comet.env")
        self.run("systemctl restart comet")
        try:
            yield
        finally:
            self.run("cp /tmp/comet.env /etc/comet/comet.env && systemctl restart comet")

    @contextmanager
    def swarm(self) -> Iterator[Swarm]:
        """Resuming clients and publishers, all subscribed."""
        self._swarms += 1
        os.environ["COMET_PUBLISH_KEY"] = self.key
        swarm = Swarm([f"127.0.0.1:{PORT}"], random.Random(self._swarms).randrange(1 << 30))
        try:
            clients = 3000 if self.full else 600
            begun = swarm.order(
                "begin", clients=clients, channels=10, publishers=20, rate=300 if self.full else 150, size=100, prefix=f"s{self._swarms}-"
            )
            assert begun == {"clients": clients}
            time.sleep(0.5)  # under load from here on
            yield swarm
        finally:
            swarm.close()
            del os.environ["COMET_PUBLISH_KEY"]


def told(report: Report, gaps: int) -> str:
    """What came of it: nothing lost or doubled, and so many gaps told to each."""
    assert report.wrong == [], report
    assert (report.lost, report.doubled) == (0, 0), report
    assert report.sent == report.acknowledged > 0, report
    assert report.gaps == [0] * gaps + [report.clients], report
    return f"{report.clients} clients, {report.acknowledged} messages acknowledged, {report.received} received, lost 0, doubled 0, gaps told {gaps} each; longest outage {report.outage:.2f} s"


# -- installed as the README says


def a_dry_run_changes_nothing(on: Deployed) -> str:
    said = on.run("deploy/install.sh --dry-run").stdout
    assert "would: " in said and "nothing was changed" in said, said
    on.run("! ls -d /opt/comet /etc/comet /etc/systemd/system/comet.service 2>/dev/null")
    return f"it would do {said.count('would: ')} things"


def the_readme_line_by_line(on: Deployed) -> str:
    lines = lines_of(ROOT / "deploy" / "README.md")
    assert len(lines) > 8, lines
    # as its package would have left it: /var is empty in there
    on.run("mkdir -p /var/log/nginx /var/lib/nginx /etc/nginx")
    said = ""
    for line in lines:
        if line.startswith("apt-get install"):  # no network in there; what it installs is in /usr, which is this machine's
            on.run("for one in python3 nginx nft openssl curl; do command -v $one >/dev/null || exit 1; done")
        else:
            said = on.run(line).stdout
    (message,) = json.loads(said)["messages"]
    assert message["data"] == "hello, world", said
    return f"{len(lines)} lines; the last one prints {message['data']!r}, through nginx and TLS"


def installing_again_does_nothing(on: Deployed) -> str:
    said = on.run("deploy/install.sh").stdout
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
    main = on.main()
    status = Path(f"/proc/{_outside(on, main)}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE) and re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), status
    environ = Path(f"/proc/{_outside(on, main)}/environ").read_text()
    assert on.key not in environ, "the key is in the environment"
    return f"scores {score}, has no capability, and its key is not in its environment"


def _outside(on: Deployed, pid: int) -> int:
    """The number, on this machine, of a process in that one."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                found = re.search(r"^NSpid:\s+\d+\s+(\d+)$", (path / "status").read_text(), re.MULTILINE)
                if found and int(found[1]) == pid and on.machine.holds(int(path.name)):
                    return int(path.name)
            except OSError:
                continue  # it has ended
    raise AssertionError(f"no process {pid}")


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
        wait_until(lambda: not before & {one["pid"] for one in on.workers()}, 30)
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
    wait_until(lambda: not before & {one["pid"] for one in on.workers()}, 30)
    assert "failed" not in on.shown("StatusText")
    return "systemctl status says so, and the next one goes well"


def an_update_is_a_reload(on: Deployed) -> str:
    before, main = {one["pid"] for one in on.workers()}, on.main()
    on.run("cp -R . /root/new && echo '# newer' >>/root/new/handlers/health.py")
    with on.swarm() as swarm:
        said = on.run("/root/new/deploy/install.sh").stdout
        assert "reload comet.service" in said and "virtual environment" not in said, said
        wait_until(lambda: not before & {one["pid"] for one in on.workers()}, 30)
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
        wait_until(lambda: on.main() not in (0, main), 30)
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
    wait_until(lambda: on.main() not in (0, main), 30)
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


def it_stops(on: Deployed) -> str:
    with on.swarm() as swarm:
        swarm.order("leave")
        began = time.monotonic()
        on.run("systemctl stop comet.socket comet.service")
        took = time.monotonic() - began
        report = swarm.report("left")
    assert (on.shown("ActiveState"), on.shown("Result"), on.shown("ExecMainStatus")) == ("inactive", "success", "0")
    assert took < 30
    # a publisher's request may cross the end of its connection; it was not acknowledged, and is its to repeat
    assert all(ending == "clean" or ending.startswith("Publisher: ") for ending in report.endings) and report.lost == 0, report
    assert not on.run("pgrep -f '[/]opt/comet/app.py'; ls /run/comet", check=False).stdout
    on.run("systemctl start comet.socket comet.service")
    return f"after {took:.1f} s, with status 0; all {report.clients} clients were told properly, and no process or socket is left"


# -- behind nginx


def curl(on: Deployed, version: str, target: str) -> "subprocess.Popen[bytes]":
    """A client, through nginx and TLS."""
    command = ["curl", "--silent", "--no-buffer", "--include", f"--http{version}", "--cacert", "/etc/comet/tls.crt", "--max-time", "20"]
    return subprocess.Popen(on.machine.inside([*command, f"https://localhost{target}"]), stdout=subprocess.PIPE)


def messages_pass_through_nginx_at_once(on: Deployed) -> str:
    """A buffer in between would hold them for ever; the quickest of three is judged, since others use this machine too."""
    figures = []
    for version in ("1.1", "2"):
        for kind in ("events", "stream", "poll"):
            quickest = min(first_message(on, version, kind, f"nginx-{version}-{kind}-{number}") for number in range(3))
            assert quickest < PROMPT, f"{kind} over HTTP/{version}: {quickest:.3f} s"
            figures.append(f"{kind} {quickest * 1000:.0f}")
    return f"HTTP/1.1 then HTTP/2, milliseconds from publishing to arrival: {', '.join(figures)}"


def first_message(on: Deployed, version: str, kind: str, channel: str) -> float:
    """Seconds from publishing it, next to the service, to its arrival at a client behind nginx."""
    with curl(on, version, f"/{kind}/{channel}") as client:
        assert client.stdout is not None
        try:
            wait_until(lambda: listeners(channel) == 1)
            with Client(PORT) as publisher:
                began = time.monotonic()
                answer = publisher.request("POST", f"/publish/{channel}", b"hello", {"Authorization": f"Bearer {on.key}"})
                assert answer.status == 201, answer
            head = client.stdout.readline()
            assert head.startswith(f"HTTP/{version} 200".encode()), head
            heard = b""
            while b"hello" not in heard:
                line = client.stdout.readline()
                assert line, f"{channel}: it ended after {heard!r}"
                heard += line
            return time.monotonic() - began
        finally:
            client.kill()


def a_refusal_names_the_request_and_a_limit_the_client(on: Deployed) -> str:
    said = on.run("curl --silent --include --cacert /etc/comet/tls.crt https://localhost/nothing").stdout
    found = re.search(r"^x-request-id: ([0-9a-f]{32})\r?$", said, re.MULTILINE | re.IGNORECASE)
    assert said.startswith("HTTP/2 404") and found, said
    # one worker, since each counts for itself; and so one socket
    on.run("systemctl stop comet.socket comet.service && rm /etc/systemd/system/comet.socket.d/10-workers.conf && systemctl daemon-reload")
    with on.settings("COMET_LOG_CLIENTS=on", "COMET_MAX_PER_ADDRESS=1", "COMET_WORKERS=1"), curl(on, "2", "/events/limit") as client:
        try:
            wait_until(lambda: on.shown("StatusText").startswith("1 worker, 1 of "))
            ask = "curl --silent --output /dev/null --write-out '%{http_code}' --cacert /etc/comet/tls.crt --resolve localhost:443:"
            # curl comes from the loopback address that it goes to: two clients, behind one proxy
            statuses = [on.run(f"{ask}{address} https://localhost/healthz").stdout for address in ("127.0.0.1", "[::1]")]
        finally:
            client.kill()
        log = on.run("journalctl --no-pager -o cat -u comet").stdout
    mended = on.run("deploy/install.sh").stdout
    assert "10-workers.conf" in mended and "start comet.socket" in mended, mended
    assert on.shown("NAccepted", "comet.socket") == "0" and on.shown("Listen", "comet.socket").count(f":{PORT} ") == os.cpu_count()
    assert sorted(statuses) == ["200", "429"], statuses
    refusal = re.search(r"refused: address-full request=[0-9a-f]{32} address=(127.0.0.1|::1) asked=GET /healthz", log)
    assert refusal, log
    return f"nginx's id comes back in the answer; of two clients behind it, {refusal[1]} alone is over its limit, and logged by its own address"


def listeners(channel: str) -> int:
    """How many subscribers it has."""
    with Client(PORT) as client:
        answer = client.request("GET", f"/channels/{channel}")
    return int(answer.json["subscribers"]) if answer.status == 200 else 0


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
    on.run("deploy/install.sh --uninstall --purge")
    on.run(
        "! ls -d /opt/comet /etc/comet /var/lib/comet /var/lib/private/comet /etc/systemd/system/comet* /etc/sysctl.d/90-comet.conf 2>/dev/null"
    )
    on.run("! nft list table inet comet 2>/dev/null")
    assert on.shown("LoadState") == "not-found"
    said = on.run("deploy/install.sh --uninstall --purge").stdout
    assert said.startswith("nothing to do"), said
    return "nothing of it is left"


CHECKS = (
    a_dry_run_changes_nothing,
    the_readme_line_by_line,
    installing_again_does_nothing,
    it_is_ready,
    the_sandbox_holds,
    messages_pass_through_nginx_at_once,
    a_refusal_names_the_request_and_a_limit_the_client,
    a_worker_is_killed,
    it_is_reloaded,
    a_reload_that_fails_leaves_it_as_it_was,
    an_update_is_a_reload,
    an_update_that_fails_says_so_and_stops_nothing,
    the_main_process_is_killed,
    a_stuck_main_process_is_restarted,
    who_connects_while_it_is_away_is_served,
    it_stops,
    the_journal_has_what_happened,
    it_is_uninstalled,
)
