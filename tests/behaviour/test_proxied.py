"""A proxy in front: whose request it is, by which id it goes, and what is logged of it."""

import re
import subprocess
import sys

from tests.conftest import Start
from tests.harness import ROOT, Client, Server, wait_until

PROXY = ("--trusted-proxies", "127.0.0.2", "--max-per-address", "2")


def via(server: Server) -> Client:
    """A connection from the proxy."""
    return Client(server.port, source="127.0.0.2")


def of(client: str, **more: str) -> dict[str, str]:
    return {"X-Forwarded-For": client, **more}


def test_an_address_counts_its_requests_and_a_proxy_for_nobody(start: Start) -> None:
    server = start(*PROXY)
    waiting = [via(server) for _ in range(4)]
    for number, client in enumerate(waiting):
        client.ask("GET", "/stream/a", headers=of(f"198.51.100.{number // 2}"))
        assert client.read_head().status == 200
        client.read_chunk()
    with via(server) as third:
        refused = third.request("GET", "/stream/a", headers=of("203.0.113.9, 198.51.100.1"))
        assert (refused.status, refused.json["error"]) == (429, "address-full")
        assert "198.51.100.1 has 2" in refused.json["detail"]
        assert third.at_end()
    with via(server) as other:
        assert other.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.9")).status == 200
    waiting.pop().close()
    wait_until(lambda: server.clients() == 3)
    with via(server) as third:
        assert third.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.1")).status == 200
    for client in waiting:
        client.close()


def test_one_connection_carries_the_requests_of_many(start: Start) -> None:
    """And each counts only while its request is under way, asleep or not."""
    server = start(*PROXY)
    with via(server) as proxy:
        for number in range(6):
            for _ in range(2):
                assert proxy.request("GET", "/poll/a?timeout=0", headers=of(f"198.51.100.{number % 2}")).status == 200
            proxy.ask("GET", "/poll/a", headers=of("198.51.100.1"))
            wait_until(lambda: server.clients() == 1)
            server.publish("a", "hello")
            assert proxy.read().json["messages"][0]["data"] == "hello"


def test_a_poll_behind_a_proxy_is_let_go_when_it_is_answered_or_given_up(start: Start) -> None:
    server = start(*PROXY)
    for _ in range(3):
        with via(server) as one, via(server) as two:
            for client in (one, two):
                client.ask("GET", "/poll/a", headers=of("198.51.100.1"))
            wait_until(lambda: server.clients() == 2)
            with via(server) as third:
                assert third.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.1")).status == 429
            server.publish("a", "hello")
            assert [client.read().status for client in (one, two)] == [200, 200]
            one.ask("GET", "/poll/a", headers=of("198.51.100.1"))
            wait_until(lambda: server.clients() == 1)
        wait_until(lambda: server.clients() == 0)


# -- on the short way: from a connection's second request on, plain ones, the same but for what the proxy says


def test_a_kept_connection_knows_whose_each_request_is(start: Start) -> None:
    server = start(*PROXY)
    with via(server) as proxy, via(server) as one, via(server) as two:
        assert proxy.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.1")).status == 200
        for client in (one, two):
            client.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.2"))
            client.ask("GET", "/poll/a?timeout=20", headers=of("198.51.100.2"))
        wait_until(lambda: server.clients() == 2)
        for _ in range(3):  # somebody else's
            assert proxy.request("GET", "/poll/b?timeout=0.1", headers=of("198.51.100.1")).status == 200
            assert proxy.request("POST", "/send/7", b"x", of("198.51.100.1")).status == 200
        for method, target, body in (("GET", "/poll/a?timeout=20", None), ("POST", "/send/7", b"x")):
            with via(server) as third:
                assert third.request("GET", "/poll/a?timeout=0", headers=of("198.51.100.1")).status == 200
                refused = third.request(method, target, body, of("198.51.100.2", **{"X-Request-ID": "r-3"}))
                assert (refused.status, refused.json["error"], refused.headers["x-request-id"]) == (429, "address-full", "r-3")
                assert third.at_end()
        server.publish("a", "hello")
        assert [client.read().status for client in (one, two)] == [200, 200]
        for client in (one, two):  # it has let go of both, and takes both again
            client.ask("GET", "/poll/a?timeout=20", headers=of("198.51.100.2"))
        wait_until(lambda: server.clients() == 2)
        assert proxy.request("GET", "/poll/b?timeout=0", headers=of("198.51.100.2")).status == 429
    wait_until(lambda: server.clients() == 0)
    server.assert_healthy()


def test_a_proxy_that_names_nobody_asks_for_itself(start: Start) -> None:
    server = start(*PROXY)
    with via(server) as one, via(server) as two, via(server) as third:
        for _ in range(3):
            assert third.request("GET", "/poll/a?timeout=0.1").status == 200
            assert third.request("POST", "/send/7", b"x").status == 200
        for client in (one, two):
            client.request("GET", "/poll/a?timeout=0")
            client.ask("GET", "/poll/a?timeout=20")
        wait_until(lambda: server.clients() == 2)
        assert third.request("GET", "/poll/a?timeout=0.1", headers=of("198.51.100.1, 127.0.0.2")).json["messages"] == []
        refused = third.request("GET", "/poll/a?timeout=20")
        assert refused.status == 429 and "127.0.0.2 has 2" in refused.json["detail"]
    server.assert_healthy()


def test_the_proxys_id_is_each_requests_own(start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.2", "--publish-key", "secret")
    with via(server) as proxy:
        for number in range(4):
            for given in (f"r-{number}", None):
                headers = of("198.51.100.1") | ({} if given is None else {"X-Request-ID": given})
                said = proxy.request("POST", "/send/7", b"x", headers).headers["x-request-id"]
                assert (said == given) is (given is not None)
    for given in ('bad "id"', "r-1"):  # one that is none, and one of somebody who is no proxy
        with via(server) if '"' in given else server.client() as client:
            assert client.request("POST", "/send/7", b"x", of("198.51.100.1", **{"X-Request-ID": given})).headers["x-request-id"] != given


# -- what is said of it, and logged


def test_who_is_no_proxy_can_not_say_who_it_is(start: Start) -> None:
    server = start(*PROXY)
    waiting = [server.client() for _ in range(2)]
    for number, client in enumerate(waiting):
        client.ask("GET", "/poll/a", headers=of(f"198.51.100.{number}"))
    with server.client() as third:
        assert third.request("GET", "/healthz", headers=of("198.51.100.7")).status == 429
    for client in waiting:
        client.close()
    with via(server) as proxy:
        assert proxy.request("GET", "/nothing", headers={"X-Request-ID": "from-the-proxy"}).headers["x-request-id"] == "from-the-proxy"
    wait_until(lambda: server.request("GET", "/nothing").status == 404)
    assert server.request("GET", "/nothing", headers={"X-Request-ID": "forged"}).headers["x-request-id"] != "forged"


def test_every_refusal_has_an_id_of_its_own(start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.2")
    answers = [
        server.request("GET", "/nothing"),
        server.request("PUT", "/poll/a"),
        server.request("GET", "/events/a b"),
        server.request("GET", "/healthz"),
    ]
    with server.client() as client:
        client.send(b"nonsense\r\n\r\n")
        answers.append(client.read())
    with via(server) as proxy:
        answers.append(proxy.request("GET", "/nothing", headers={"X-Request-ID": 'bad "id"'}))
    ids = [answer.headers.get("x-request-id") for answer in answers if answer.status >= 400]
    assert len(set(ids)) == len(ids) == 5
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", str(one)) for one in ids), ids


def test_a_refusal_on_the_short_way_has_one_too(start: Start) -> None:
    server = start("--publish-key", "secret")
    with server.client() as client:
        answers = [client.request("POST", "/send/1", b"x") for _ in range(3)]  # the first connection's first, then kept alive
        assert [answer.status for answer in answers] == [401] * 3
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3
        right = client.request("POST", "/send/1", b"x", {"Authorization": "Bearer secret"})
        assert right.status == 200 and "x-request-id" not in right.headers


def test_who_comes_and_goes_is_logged_where_that_is_asked_for(start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.2", "--log-clients")
    with via(server) as proxy:
        proxy.ask("GET", "/events/a", headers=of("198.51.100.1", **{"X-Request-ID": "r-1"}))
        assert proxy.read_head().status == 200
    wait_until(lambda: "ended: hang-up" in server.log.read_text())
    (line,) = [one for one in server.log.read_text().splitlines() if "ended: " in one]
    assert "request=r-1 address=198.51.100.1 asked=GET /events/a" in line and "seconds=" in line
    with via(server) as proxy:
        proxy.request("POST", "/publish/a%20b", b"x", of("198.51.100.1", **{"X-Request-ID": "r-2"}))
    assert "refused: bad-channel request=r-2 address=198.51.100.1 asked=POST /publish/a%20b" in server.log.read_text()


def test_no_line_a_request(start: Start) -> None:
    server = start()
    before = server.log.read_text()
    for _ in range(5):
        server.publish("a", "hello")
        assert server.request("GET", "/poll/a?since=oldest").status == 200
        assert server.request("GET", "/nothing").status == 404
    assert server.log.read_text() == before


def test_bad_proxies_are_told_with_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "app.py", "--trusted-proxies", "10.0.0.1/8"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--trusted-proxies" in done.stderr and "host bits" in done.stderr
