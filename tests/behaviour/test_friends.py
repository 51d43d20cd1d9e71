"""Followers, over real sockets: the endpoints, who gets what is sent, and what must not stop the service.

As in test_endpoints, one server serves the module and each test has users of its own.
"""

import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from comet import database
from handlers.users import ROW, TRANSACTION
from tests.behaviour.test_endpoints import error, info
from tests.behaviour.test_limits import dripping
from tests.conftest import Start, only_asleep
from tests.harness import TIMEOUT, Client, Server, wait_until

LIMITED = (
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20)); sys.argv[0] = 'app.py';"
    " runpy.run_path('app.py', run_name='__main__')"
)
"""No file may grow beyond 3 MiB, which to SQLite is much like a full disk, and needs no root."""


class OnFullDisk(Server):
    """A server that can't write much."""

    program = ("-c", LIMITED)


def follow(server: Server, *pairs: str) -> Any:
    """Load "follower followee" lines; the answer, which must be a good one."""
    answer = server.request("POST", "/follows", "\n".join(pairs).encode())
    assert answer.status == 200, answer
    return answer.json


def connect(server: Server, user: str) -> Client:
    """A client of /test, logged in."""
    client = server.client()
    client.ask("GET", f"/test/{user}")
    assert client.read_head().status == 200
    assert client.read_chunk() == f"comet welcomes you! Your id: {user}\n".encode()
    return client


def send(server: Server, user: str, text: str) -> tuple[int, int]:
    """Targets and delivered."""
    answer = server.request("POST", f"/send/{user}", text.encode())
    assert answer.status == 200, answer
    return answer.json["targets"], answer.json["delivered"]


def test_metabrews_part_three(server: Server) -> None:
    for one in ("alice", "bob"):
        answer = server.request("PUT", f"/users/{one}/following/rj")
        assert (answer.status, answer.json) == (200, {"follower": one, "followee": "rj", "following": True, "changed": True})
    with connect(server, "alice") as alice, connect(server, "bob") as bob, connect(server, "rj") as rj, connect(server, "eve") as eve:
        assert send(server, "rj", "hello") == (3, 3)
        assert [one.read_chunk() for one in (alice, bob, rj)] == [b"hello\n"] * 3
        assert send(server, "eve", "only me") == (1, 1)
        assert eve.read_chunk() == b"only me\n"


def test_a_follow_and_an_unfollow_take_effect_at_once_for_connected_clients(server: Server) -> None:
    with server.events("user:fan") as fan:
        for number in range(5):
            assert send(server, "star", "unheard") == (1, 0)
            assert server.request("PUT", "/users/fan/following/star").json["changed"] is True
            assert server.request("PUT", "/users/fan/following/star").json["changed"] is False
            assert send(server, "star", f"m{number}") == (2, 1)
            assert fan.next().data == f"m{number}"
            answer = server.request("DELETE", "/users/fan/following/star")
            assert answer.json == {"follower": "fan", "followee": "star", "following": False, "changed": True}
        assert server.request("DELETE", "/users/fan/following/star").json["changed"] is False


def test_each_feed_has_its_own_order_and_history(server: Server) -> None:
    follow(server, "oa ob", "oc ob")
    with server.events("user:oa") as first, server.events("user:oc") as second:
        server.publish("user:oa", "for oa alone")
        for number in range(20):
            assert send(server, "ob", f"m{number}") == (3, 2)
        expected = [f"m{number}" for number in range(20)]
        assert [first.next().data for _ in range(21)] == ["for oa alone", *expected]
        assert [second.next().data for _ in range(20)] == expected
    with server.events("user:oa", None, "?since=oldest") as again:
        assert [again.next().data for _ in range(21)] == ["for oa alone", *expected]
    assert info(server, "user:oa")["messages"] == 21


def test_a_key_covers_all_targets(server: Server) -> None:
    follow(server, "ka kb")
    with server.events("user:ka") as follower:
        key = {"Idempotency-Key": "k"}
        first = server.request("POST", "/send/kb", b"once", key)
        assert server.request("POST", "/send/kb", b"once", key).json == first.json == {"id": None, "targets": 2, "delivered": 1}
        send(server, "kb", "next")
        assert [follower.next().data, follower.next().data] == ["once", "next"]


def test_who_is_not_connected_costs_nothing_and_is_counted(server: Server) -> None:
    follow(server, *(f"away{number} known" for number in range(6000)), "here known")
    with connect(server, "here") as here:
        before = server.stats()
        assert send(server, "known", "hi") == (6002, 1)
        assert here.read_chunk() == b"hi\n"
        after = server.stats()
    assert (before["channels"], before["messages_kept"] + 1) == (after["channels"], after["messages_kept"])


def test_lists_are_paged_numbers_first(server: Server) -> None:
    follow(server, *(f"{number} pages" for number in range(150)), *(f"t{number:02} pages" for number in range(30)), "5 other")
    expected = [str(number) for number in range(150)] + [f"t{number:02}" for number in range(30)]
    first = server.request("GET", "/users/pages/followers").json
    assert (first["user"], first["followers"], first["next"], first["count"]) == ("pages", expected[:100], "99", 180)
    rest = server.request("GET", f"/users/pages/followers?after={first['next']}&limit=1000").json
    assert rest == {"user": "pages", "followers": expected[100:], "next": None}
    assert server.request("GET", "/users/5/following").json == {"user": "5", "following": ["other", "pages"], "next": None, "count": 2}
    assert server.request("GET", "/users/5/following?limit=1").json["next"] == "other"
    assert server.request("GET", "/users/nobody/followers").json == {"user": "nobody", "followers": [], "next": None, "count": 0}
    for query in ("limit=1001", "limit=0", "limit=-1", "limit=x"):
        assert error(server.request("GET", f"/users/pages/followers?{query}")) == (400, "bad-parameter")


@pytest.mark.parametrize("bad", ["a,b", "a%20b", "x" * 124, "%C3%A9"])
def test_an_id_out_of_the_rule_is_refused_everywhere(server: Server, bad: str) -> None:
    for method, path in (
        ("GET", f"/users/{bad}/followers"),
        ("GET", f"/users/{bad}/following"),
        ("GET", f"/users/a/followers?after={bad}"),
        ("PUT", f"/users/{bad}/following/a"),
        ("PUT", f"/users/a/following/{bad}"),
        ("DELETE", f"/users/a/following/{bad}"),
        ("POST", f"/send/{bad}"),
    ):
        assert error(server.request(method, path, b"x" if method == "POST" else None)) == (400, "bad-channel"), path


def test_the_longest_id_is_one_whose_feed_is_a_channel(server: Server) -> None:
    longest = "x" * 123
    assert server.request("PUT", f"/users/{longest}/following/a").status == 200
    with server.events(f"user:{longest}") as events:
        send(server, "a", "hi")
        assert events.next().data == "hi"


def test_nobody_follows_oneself(server: Server) -> None:
    for method in ("PUT", "DELETE"):
        assert error(server.request(method, "/users/7/following/7")) == (400, "bad-follow")
    assert server.request("PUT", "/users/7/following/07").status == 200  # another id


def test_a_bulk_names_bad_lines_by_number_and_stores_the_rest(server: Server) -> None:
    lines = ["b1 b0", "b2\tb0\r", "", "b3 b0 x", "b4", "b5 b5", "b6 a,b", "b7 é", "b1 b0", "b8 " + "y" * 5000, "b9   b0"]
    answer = follow(server, *lines)
    assert (answer["added"], answer["present"], answer["bad"]) == (3, 1, 7)
    assert [(one["line"], one["error"]) for one in answer["errors"]] == [
        (3, "bad-line"), (4, "bad-line"), (5, "bad-line"), (6, "bad-follow"), (7, "bad-channel"), (8, "bad-line"), (10, "bad-line"),
    ]  # fmt: skip
    assert server.request("GET", "/users/b0/followers").json["followers"] == ["b1", "b2", "b9"]
    assert follow(server) == {"added": 0, "present": 0, "bad": 0, "errors": []}
    many = follow(server, *["bad"] * 1000)
    assert (many["bad"], len(many["errors"])) == (1000, 100)


@only_asleep
@pytest.mark.parametrize("chunked", [True, False])
def test_a_bulk_may_be_larger_than_any_other_body_and_takes_no_memory(start: Start, chunked: bool) -> None:
    server = start("--max-batch", "1000", "--max-body", "1000", "--body-timeout", "2")
    lines = "".join(f"{number} {number % 7 + 10**9}\n" for number in range(500_000)).encode()
    follow(server, "1 2")
    before = server.memory()
    with server.client() as client:
        head = "POST /follows HTTP/1.1\r\nHost: test\r\n"
        if chunked:
            client.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for at in range(0, len(lines), 100_000):
                part = lines[at : at + 100_000]
                client.send(b"%x\r\n%b\r\n" % (len(part), part))
            client.send(b"0\r\n\r\n")
        else:
            client.send(f"{head}Content-Length: {len(lines)}\r\n\r\n".encode())
            for at in range(0, len(lines), 100_000):  # each piece has its time
                client.send(lines[at : at + 100_000])
        client.sock.settimeout(3 * TIMEOUT)
        assert client.read().json == {"added": 500_000, "present": 0, "bad": 0, "errors": []}
    assert server.memory() - before < 60 << 20, "50,000 rows and SQLite's pages"
    assert server.request("GET", f"/users/{10**9}/followers").json["count"] == 71429
    assert send(server, str(10**9), "hi") == (71430, 0)


def test_a_bulk_that_stands_still_is_given_up_and_keeps_what_it_has_stored(start: Start) -> None:
    server = start("--body-timeout", "0.5")
    with server.client() as client:
        client.send(b"POST /follows HTTP/1.1\r\nHost: test\r\nContent-Length: 10000000\r\n\r\n1 2\n")
        assert error(client.read()) == (408, "body-timeout")
    follow(server, "3 2")


def test_a_bulk_takes_room_for_what_is_not_stored_yet_alone(start: Start) -> None:
    room = (8 << 20) + 1000
    server = start("--max-bodies", str(room), "--max-batch", "1000", "--max-body", "1000")
    answer = server.request("POST", "/follows", b"1 2\n" + (b"x" * 100 + b"\n") * (2 * room // 100))
    assert (answer.json["added"], answer.json["bad"]) == (1, 2 * room // 100)
    assert server.request("POST", "/follows", b"x" * (2 * room)).json["bad"] == 1

    rows = b"".join(b"%d 1\n" % number for number in range(1000, 1000 + TRANSACTION * 9 // 10))
    fit = room // (ROW * TRANSACTION * 9 // 10)
    clients = [server.client() for _ in range(fit + 2)]
    for client in clients:
        client.send(b"POST /follows HTTP/1.1\r\nHost: test\r\nContent-Length: 10000000\r\n\r\n" + rows)
    wait_until(lambda: server.stats()["refused"].get("bodies-full", 0) == 2)
    for client in clients:
        client.close()
    wait_until(lambda: server.stats()["connections"] == 1)
    for _ in range(fit + 2):  # what is stored is held no more
        assert server.request("POST", "/follows", rows * 2).status == 200


def test_a_bulk_that_drips_is_given_up(start: Start) -> None:
    server = start("--body-timeout", "1")
    with server.client() as client:
        client.send(b"POST /follows HTTP/1.1\r\nHost: test\r\nContent-Length: 10000000\r\n\r\n")
        with dripping(client, b"1 2\n" * 10_000, pause=0.02):
            assert error(client.read()) == (408, "body-timeout")


def test_writes_need_the_publish_key_and_a_page_its_origin(start: Start) -> None:
    server = start("--publish-key", "k")
    for method, path in (("PUT", "/users/a/following/b"), ("DELETE", "/users/a/following/b"), ("POST", "/follows")):
        assert error(server.request(method, path, b"" if method == "POST" else None)) == (401, "unauthorized")
        key = {"Authorization": "Bearer k"}
        assert server.request(method, path, b"" if method == "POST" else None, key).status == 200
        foreign = {**key, "Origin": "https://evil.example"}
        assert error(server.request(method, path, b"" if method == "POST" else None, foreign)) == (403, "origin-refused")
    assert server.request("GET", "/users/b/followers").status == 200
    assert server.request("POST", "/users/a/following/b", b"").headers["allow"] == "DELETE, OPTIONS, PUT"


def test_what_is_kept_survives_the_service_and_what_is_not_goes_with_it(start: Start, tmp_path: Path) -> None:
    flags = ("--data", str(tmp_path / "data"))
    server = start(*flags)
    follow(server, "alice rj", "7 rj")
    server.stop()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [database.NAME]
    assert start(*flags).request("GET", "/users/rj/followers").json["followers"] == ["7", "alice"]
    (tmp_path / "run").mkdir()
    passing = start(TMPDIR=str(tmp_path / "run"))
    follow(passing, "alice rj")
    assert len(list((tmp_path / "run").glob(f"*/{database.NAME}"))) == 1
    passing.stop()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_kill_during_a_load_loses_no_acknowledged_row(start: Start, tmp_path: Path) -> None:
    with Server(tmp_path / "killed.log", "--data", str(tmp_path / "data")) as server, server.client() as client:
        for number in range(20):
            lines = "".join(f"{number * 1000 + one} rj\n" for one in range(1000)).encode()
            assert client.request("POST", "/follows", lines).json["added"] == 1000
        client.send(b"POST /follows HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = "".join(f"{one} other\n" for one in range(120_000)).encode()
        client.send(b"%x\r\n%b\r\n" % (len(part), part))
        wait_until(lambda: server.request("GET", "/users/other/followers?limit=1").json["followers"])
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    again = start("--data", str(tmp_path / "data"))
    assert again.request("GET", "/users/rj/followers").json["count"] == 20_000
    assert again.request("GET", "/users/other/followers").json["count"] in range(TRANSACTION, 120_001, TRANSACTION)


def test_a_full_disk_is_507_and_the_service_goes_on_delivering(start: Start) -> None:
    server = start(kind=OnFullDisk)
    follow(server, "alice rj")
    with connect(server, "alice") as alice:
        lines = "".join(f"{number * 1009 % 100_003} star{number}\n" for number in range(100_000)).encode()
        with server.client() as client:
            client.ask("POST", "/follows", lines)
            assert error(client.read()) == (507, "disk-full")
        assert error(server.request("POST", "/follows", lines[: 1 << 20])) == (507, "disk-full")
        for number in range(20):
            assert send(server, "rj", f"m{number}") == (2, 1)
            assert alice.read_chunk() == f"m{number}\n".encode()
        assert server.request("GET", "/users/rj/followers").json["followers"] == ["alice"]
    assert server.stats()["refused"]["disk-full"] == 2
    assert server.stats()["errors"] == 0


@only_asleep
def test_a_file_that_another_program_has_locked_holds_up_neither_messages_nor_the_end(start: Start, tmp_path: Path) -> None:
    """Thirty clients ask to follow; of forty connections ten may wait for the file."""
    server = start("--data", str(tmp_path / "data"), "--max-connections", "40", "--grace", "5")
    with closing(database.open_writer(tmp_path / "data")) as other:
        other.execute("BEGIN IMMEDIATE")
        clients = [server.client() for _ in range(30)]
        for number, client in enumerate(clients):
            client.ask("PUT", f"/users/u{number}/following/star", b"")
        wait_until(lambda: server.stats()["refused"].get("database-busy") == 20)
        server.publish("news", "goes on")
        assert server.request("GET", "/healthz").status == server.request("GET", "/users/star/followers").status == 200
        server.process.send_signal(signal.SIGTERM)
        assert {client.read().json["error"] for client in clients} == {"database-busy"}, "also those that waited"
        assert server.process.wait(TIMEOUT) == 0
    assert "cut off" not in server.log.read_text()
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("flags", "user", "body", "status"),
    [
        ((), "s1", b"hi", 200),
        ((), "s1", b"", 200),
        ((), "s1", b"a\r\n\r\nb", 200),
        ((), "x" * 124, b"hi", 400),
        ((), "s1", b"\xff", 400),
        (("--publish-key", "k"), "s1", b"hi", 401),
        (("--max-body", "3"), "s1", b"long", 413),
        (("--origins", "*"), "s1", b"hi", 200),
    ],
)
def test_a_send_is_answered_alike_by_the_short_way_and_the_long(
    start: Start, flags: tuple[str, ...], user: str, body: bytes, status: int
) -> None:
    server = start(*flags)
    answers = []
    for query in ("", "?"):  # an empty query is read by bottle
        with server.client() as client:
            for _ in range(2):  # fresh, and kept alive
                answer = client.request("POST", f"/send/{user}{query}", body)
                answer.headers.pop("date")
                assert ("x-request-id" in answer.headers) == (status >= 400)
                answer.headers.pop("x-request-id", None)  # its own
                closing = answer.headers.pop("connection", None)  # the long way, where it has not read the body
                answers.append((answer.status, answer.headers, answer.body))
                if closing:
                    break
    assert answers[0][0] == status
    assert all(answer == answers[0] for answer in answers)


def test_the_short_way_needs_the_key_and_takes_it(start: Start) -> None:
    server = start("--publish-key", "k")
    with server.client() as client:
        for key, status in (("k", 200), ("x", 401), ("k", 200)):
            assert client.request("POST", "/send/a", b"hi", {"Authorization": f"Bearer {key}"}).status == status
        assert client.request("POST", "/send/a", b"hi").status == 401
        foreign = {"Authorization": "Bearer k", "Origin": "https://evil.example"}
        assert error(client.request("POST", "/send/a", b"hi", foreign)) == (403, "origin-refused")


def test_a_message_to_thousands_reaches_each_and_passes_nobody(server: Server) -> None:
    """More than go out at once: what comes later for one of them comes later."""
    follow(server, *(f"f{number} crowd" for number in range(300)))
    clients = [server.client() for _ in range(300)]
    try:
        for number, client in enumerate(clients):
            client.ask("GET", f"/test/f{number}")
            client.read_head()
            client.read_chunk()
        for turn in range(5):
            assert send(server, "crowd", f"m{turn}") == (301, 300)
            server.publish("user:f299", f"alone {turn}")
        for number, client in enumerate(clients):
            got = b""
            expected = b"".join(b"m%d\n%b" % (turn, b"alone %d\n" % turn if number == 299 else b"") for turn in range(5))
            while len(got) < len(expected):
                got += client.read_chunk()
            assert got == expected
    finally:
        for client in clients:
            client.close()


@only_asleep
def test_two_workers_have_one_database(start: Start) -> None:
    server = start("--workers", "2")
    connections: dict[int, Client] = {}
    while len(connections) < 2:
        client = server.client()
        number = client.request("GET", "/healthz").json["worker"]
        if number in connections:
            client.close()
        else:
            connections[number] = client
    with (
        connections.popitem()[1] as one,
        connections.popitem()[1] as two,
        connect(server, "alice") as alice,
        connect(server, "bob") as bob,
        connect(server, "carol") as carol,
    ):
        for number in range(20):
            name = f"rj{number}"
            assert one.request("PUT", f"/users/alice/following/{name}").status == 200
            assert two.request("PUT", f"/users/bob/following/{name}").status == 200
            assert one.request("GET", f"/users/{name}/followers").json["followers"] == ["alice", "bob"]
            for worker, text in ((one, "from one"), (two, "from two")):
                sent = worker.request("POST", f"/send/{name}", text.encode()).json
                assert (sent["targets"], sent["delivered"]) == (3, 2)
                assert alice.read_chunk() == bob.read_chunk() == f"{text}\n".encode()
            assert two.request("DELETE", f"/users/bob/following/{name}").json["changed"] is True
            assert one.request("POST", f"/send/{name}", b"to alice").json["delivered"] == 1
            assert alice.read_chunk() == b"to alice\n"
        assert two.request("POST", "/send/carol", b"end").json["delivered"] == 1
        assert carol.read_chunk() == b"end\n"
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: {worker["generation"] for worker in server.stats()["workers"]} == {2})
    assert server.request("GET", "/users/rj7/followers").json["followers"] == ["alice"]
