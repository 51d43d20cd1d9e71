"""What stands between clients and the service: nginx with TLS, and the kernel's connection tracking."""

import os
import re
import subprocess
import time

from tests.deployment.deployed import PORT, Deployed
from tests.harness import Client, wait_until

PROMPT = 0.1
"""Seconds from a publication to its arrival through nginx, at most."""


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


def an_event_source_outlives_a_service_that_is_away(on: Deployed) -> str:
    """nginx alone is there: whatever else asks is told the status. tests/behaviour/test_nginx.py has the rest."""
    ask = "curl --silent --include --cacert /etc/comet/tls.crt --header 'Origin: https://a.example' --header 'Accept: "
    on.run("systemctl stop comet.socket comet.service")
    try:
        said = on.run(f"{ask}text/event-stream' https://localhost/events/away").stdout
        others = [
            on.run(f"{ask}{accept}' https://localhost/{path}").stdout
            for accept, path in (("*/*", "events/away"), ("text/event-stream", "poll/away"))
        ]
    finally:
        on.run("systemctl start comet.socket comet.service")
        on.active()
    head, _, block = said.replace("\r", "").partition("\n\n")
    for line in (
        "content-type: text/event-stream; charset=utf-8",
        "cache-control: no-store",
        "access-control-allow-origin: https://a.example",
    ):
        assert head.startswith("HTTP/2 200") and line in head.lower().splitlines(), said
    found = re.fullmatch(r": away: .+\nevent: comet\nretry: ([23]\d{3})\n\n", block)
    assert found and all(other.startswith("HTTP/2 502") for other in others), (said, others)
    return f"nginx tells it to come back in {found[1]} ms, and everyone else 502"


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


# -- connection tracking

TRACK = "nft 'add table inet track { chain %s { type filter hook %s priority 0; ct state new counter; }; }'"
"""Rules that ask for the state of connections: from then on the kernel tracks each, but those that comet.nft exempts."""


def connections_are_not_tracked(on: Deployed) -> str:
    """While others of this machine are; and with comet.nft gone they are too, or this would show nothing."""
    if on.run("test -e /proc/net/nf_conntrack", check=False).returncode:
        return "skipped: this kernel has no /proc/net/nf_conntrack to look at"
    for hook in ("prerouting", "output"):
        on.run(TRACK % (hook, hook))
    exempt = _tracked(on, "exempt")
    assert 80 in exempt and not exempt & {443, PORT}, exempt
    on.run("systemctl stop comet-notrack")
    others = _tracked(on, "tracked")
    assert others >= {80, 443, PORT}, others
    on.run("systemctl start comet-notrack && nft delete table inet track")
    return f"with comet.nft none to ports 443 and {PORT}, though one to port 80 is; without it all three"


def _tracked(on: Deployed, channel: str) -> set[int]:
    """The ports to which connections are tracked, with one open to each: nginx without TLS, nginx with it, the service."""
    with Client(PORT) as straight, Client(80) as plain, curl(on, "1.1", f"/events/{channel}") as through:
        try:
            plain.request("GET", "/")
            straight.ask("GET", f"/events/{channel}")
            wait_until(lambda: listeners(channel) == 2)
            table = on.run("cat /proc/net/nf_conntrack").stdout
        finally:
            through.kill()
    return {int(port) for port in re.findall(r"\bdport=(\d+)", table)}
