"""The wire contract, endpoint by endpoint, over real sockets.

One server serves the module; each test has channels of its own, so that none sees another's
messages. Tests that need other settings, or true counters, start a server of their own.
"""

import gzip
import json
import re
import statistics
import time
import zlib
from typing import Any

import gevent
import pytest
from gevent import socket

from handlers.params import LAST_EVENT_IDS
from tests.conftest import Start
from tests.harness import AMPLE, TIMEOUT, Client, Response, Server, wait_until

ID = re.compile(r"[0-9a-f]{1,12}-[0-9]+")

TEXTS = (
    "plain",
    "",
    " leading and trailing ",
    "日本語 🦊 \u202e \u2028 \u2029 \x85 \ufeff e\u0301",
    "\ufeffa byte order mark in front",
    "quotes \" ' \\ \\n </script> &amp;",
    "\x00\x01\x1f\x7f control",
    "a: colon",
    ":starts like a comment",
    " data: x",
)
"""Bodies without a line end: these must arrive exactly, on every endpoint."""


def error(answer: Response) -> tuple[int, str]:
    """Status and slug of a refusal, whose form is checked."""
    document = answer.json
    assert set(document) == {"error", "detail"}, document
    assert document["detail"].endswith("."), document
    assert answer.headers["content-type"] == "application/json"
    return answer.status, document["error"]


def poll(server: Server, channels: str, query: str, **headers: str) -> Any:
    """The document of one poll, its head checked."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = server.request("GET", f"/poll/{channels}?{query}", headers=given)
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert set(answer.json) == {"cursor", "gap", "messages"}
    return answer.json


def data_of(document: Any) -> list[str]:
    """The bodies in a poll's or history's document."""
    return [message["data"] for message in document["messages"]]


def info(server: Server, channel: str) -> Any:
    """What /channels/<channel> says."""
    answer = server.request("GET", f"/channels/{channel}")
    assert answer.status == 200, answer
    return answer.json


def subscribers(server: Server, channel: str) -> int:
    """How many listen; 0 as well where there is no such channel yet."""
    answer = server.request("GET", f"/channels/{channel}")
    return int(answer.json["subscribers"]) if answer.status == 200 else 0


def batch(server: Server, *lines: Any, headers: dict[str, str] | None = None) -> list[Any]:
    """The results of a batch; lines are JSON values, or raw bytes."""
    body = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    answer = server.request("POST", "/publish", body, headers)
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.splitlines()]


class Stream(Client):
    """A client of /stream that hands out documents; heartbeats are counted."""

    def __init__(self, server: Server, channels: str, query: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(server.port)
        self.ask("GET", f"/stream/{channels}{query}", headers=headers)
        self.head = self.read_head()
        assert self.head.status == 200, self.head
        self.text = b""
        self.heartbeats = 0
        assert self.read_chunk() == b"\n", "the opening is an empty line"

    def next(self) -> Any:
        """The next line that is not empty, as JSON."""
        while True:
            while b"\n" not in self.text:
                chunk = self.read_chunk()
                if not chunk:
                    raise EOFError
                self.text += chunk
            line, self.text = self.text.split(b"\n", 1)
            if line:
                return json.loads(line)
            self.heartbeats += 1


# -- metabrew's two


def test_test_welcomes_at_once_then_sends_a_chunk_a_message(server: Server) -> None:
    with server.client() as client:
        client.ask("GET", "/test/1000")
        head = client.read_head()
        assert head.status == 200
        assert head.headers["content-type"] == "text/plain; charset=utf-8"
        assert head.headers["transfer-encoding"] == "chunked"
        assert head.headers["cache-control"] == "no-store"
        assert head.headers["x-accel-buffering"] == "no"
        assert client.read_chunk() == b"comet welcomes you! Your id: 1000\n"
        bodies = [f"message {number}" for number in range(20)]
        for body in bodies:
            assert server.request("POST", "/send/1000", body.encode()).status == 200
        assert [client.read_chunk() for _ in bodies] == [f"{body}\n".encode() for body in bodies]


def test_every_message_is_a_chunk_of_its_own_even_when_many_wait(server: Server) -> None:
    with server.client() as client:
        client.ask("GET", "/test/1001")
        client.read_head()
        client.read_chunk()
        batch(server, *({"channel": "user:1001", "data": f"m{number}"} for number in range(300)))
        assert [client.read_chunk() for _ in range(300)] == [f"m{number}\n".encode() for number in range(300)]


def test_several_connections_with_one_id_all_get_the_message(server: Server) -> None:
    clients = [server.client() for _ in range(5)]
    for client in clients:
        client.ask("GET", "/test/shared")
        client.read_head()
        client.read_chunk()
    sent = server.request("POST", "/send/shared", b"to all").json
    assert sent["targets"] == 1
    assert sent["delivered"] == 5
    assert ID.fullmatch(sent["id"])
    for client in clients:
        assert client.read_chunk() == b"to all\n"
        client.close()
    wait_until(lambda: info(server, "user:shared")["subscribers"] == 0)
    assert server.request("POST", "/send/shared", b"to none").json["delivered"] == 0


def test_sending_to_an_id_nobody_holds_is_no_error(server: Server) -> None:
    answer = server.request("POST", "/send/nobody-ever", b"hello?")
    assert answer.status == 200
    assert answer.json == {"id": None, "targets": 1, "delivered": 0}
    assert error(server.request("GET", "/channels/user:nobody-ever")) == (404, "no-channel")


def test_send_counts_subscribers_of_the_feed_on_every_endpoint(server: Server) -> None:
    with (
        server.client() as test,
        server.events("user:mixed") as events,
        Stream(server, "user:mixed,other") as lines,
        server.client() as waits,
    ):
        test.ask("GET", "/test/mixed")
        test.read_head()
        test.read_chunk()
        waits.ask("GET", "/poll/user:mixed")
        wait_until(lambda: info(server, "user:mixed")["subscribers"] == 4)
        sent = server.request("POST", "/send/mixed", b"hi").json
        assert sent["delivered"] == 4
        assert test.read_chunk() == b"hi\n"
        assert events.next().data == "hi"
        assert lines.next()["id"] == sent["id"]
        assert data_of(waits.read().json) == ["hi"]


def test_a_repeated_send_under_a_key_is_sent_once(server: Server) -> None:
    with server.events("user:keyed") as events:
        key = {"Idempotency-Key": "k1"}
        first = server.request("POST", "/send/keyed", b"once", key)
        again = server.request("POST", "/send/keyed", b"once", key)
        assert (first.status, first.json) == (again.status, again.json)
        assert error(server.request("POST", "/send/keyed", b"another", key)) == (409, "key-conflict")
        server.publish("user:keyed", "next")
        assert [events.next().data, events.next().data] == ["once", "next"]


def test_a_test_client_is_never_sent_a_heartbeat(start: Start) -> None:
    server = start("--heartbeat", "0.1")
    with server.client() as client, server.events("clock") as clock:
        client.ask("GET", "/test/quiet")
        client.read_head()
        client.read_chunk()
        for _ in range(4):
            assert clock.read_chunk() == b":\n"
        server.request("POST", "/send/quiet", b"first")
        assert client.read_chunk() == b"first\n"


# -- long poll


def test_poll_with_timeout_zero_gives_a_cursor_at_once(server: Server) -> None:
    answer = poll(server, "poll-zero", "timeout=0")
    assert ID.fullmatch(answer["cursor"])
    assert (answer["gap"], answer["messages"]) == (False, [])
    assert server.request("GET", "/channels/poll-zero").status == 404, "nothing was made of it"
    again = poll(server, "poll-zero", f"timeout=0&since={answer['cursor']}")
    assert (again["gap"], again["messages"]) == (False, [])
    server.publish("poll-zero", "one")
    for cursor in (answer["cursor"], again["cursor"]):
        got = poll(server, "poll-zero", f"timeout=0&since={cursor}")
        assert (got["gap"], data_of(got)) == (False, ["one"])
    assert server.request("DELETE", "/channels/poll-zero").status == 200
    assert poll(server, "poll-zero", f"timeout=0&since={answer['cursor']}")["gap"]


def test_poll_answers_empty_after_its_timeout_and_not_before(server: Server) -> None:
    began = time.monotonic()
    answer = poll(server, "poll-timeout", "timeout=0.4")
    passed = time.monotonic() - began
    assert 0.35 < passed < AMPLE, passed
    assert (answer["gap"], answer["messages"]) == (False, [])


def test_short_polls_end_on_time(server: Server) -> None:
    """Within 100 ms, beside what a busy machine adds to any request; each is asked at another moment of the server's second."""
    late, plain = [], []
    with server.client() as client:
        for timeout in (0.05, 0.3, 1, 0.17, 1.5, 0.4, 0.71):
            began = time.monotonic()
            client.request("GET", "/healthz")
            plain.append(time.monotonic() - began)
            began = time.monotonic()
            assert client.request("GET", f"/poll/poll-late?timeout={timeout}").json["messages"] == []
            late.append(time.monotonic() - began - timeout)
    assert min(late) >= 0
    assert statistics.median(late) < 0.1 + 10 * statistics.median(plain), (late, plain)


def test_poll_without_timeout_takes_the_setting(start: Start) -> None:
    server = start("--poll-timeout", "0.2")
    began = time.monotonic()
    assert server.request("GET", "/poll/a").json["messages"] == []
    assert 0.15 < time.monotonic() - began < AMPLE


def test_a_waiting_poll_is_answered_by_the_next_message(server: Server) -> None:
    with server.client() as client:
        for number in range(5):
            client.ask("GET", "/poll/poll-wait?timeout=20")
            wait_until(lambda: subscribers(server, "poll-wait") == 1)
            name = server.publish("poll-wait", f"m{number}", "kind")
            document = client.read().json
            assert document == {
                "cursor": name,
                "gap": False,
                "messages": [{"id": name, "channel": "poll-wait", "type": "kind", "data": f"m{number}"}],
            }


def test_poll_with_a_cursor_answers_everything_after_it_at_once(server: Server) -> None:
    ids = [server.publish("poll-since", f"m{number}") for number in range(5)]
    began = time.monotonic()
    answer = poll(server, "poll-since", f"since={ids[1]}&timeout=60")
    assert time.monotonic() - began < AMPLE
    assert data_of(answer) == ["m2", "m3", "m4"]
    assert [message["type"] for message in answer["messages"]] == ["message"] * 3
    assert answer["cursor"] == ids[4]
    assert not answer["gap"]
    assert data_of(poll(server, "poll-since", f"since={ids[4]}&timeout=0")) == []


def test_poll_since_oldest_starts_with_what_is_kept(server: Server) -> None:
    ids = [server.publish("poll-oldest", f"m{number}") for number in range(3)]
    answer = poll(server, "poll-oldest", "since=oldest&timeout=20")
    assert [message["id"] for message in answer["messages"]] == ids
    assert not answer["gap"]


def test_poll_without_a_cursor_starts_from_now(server: Server) -> None:
    newest = server.publish("poll-now", "before")
    answer = poll(server, "poll-now", "timeout=0")
    assert (answer["messages"], answer["cursor"]) == ([], newest)


def test_last_event_id_wins_over_since_on_every_endpoint(server: Server) -> None:
    ids = [server.publish("header-wins", f"m{number}") for number in range(3)]
    header = {"Last-Event-ID": ids[1]}
    answer = server.request("GET", f"/poll/header-wins?since={ids[0]}", headers=header)
    assert data_of(answer.json) == ["m2"]
    with server.events("header-wins", ids[1], f"?since={ids[0]}") as events:
        assert events.next().data == "m2"
    with Stream(server, "header-wins", f"?since={ids[0]}", header) as lines:
        assert lines.next()["data"] == "m2"


@pytest.mark.parametrize("name", LAST_EVENT_IDS)
def test_the_last_event_id_may_stand_in_the_query(server: Server, name: str) -> None:
    channel = f"query-{name}"
    ids = [server.publish(channel, f"m{number}") for number in range(3)]
    for query in (
        f"{name}={ids[1]}",
        f"since={ids[0]}&{name}={ids[1]}",
        f"{name}={ids[1]}&since={ids[0]}",
        f"{name}={ids[1]}&since=rubbish",
    ):
        for how in ({}, {"Origin": "https://a.example"}):  # the short way, and bottle's
            assert data_of(server.request("GET", f"/poll/{channel}?{query}", headers=how).json) == ["m2"], query
        with server.events(channel, query=f"?{query}") as events:
            assert events.next().data == "m2"
        with Stream(server, channel, f"?{query}") as lines:
            assert lines.next()["data"] == "m2"
    with server.events(channel, ids[0], f"?{name}={ids[1]}") as events:
        assert events.next().data == "m1", "the header wins"
    assert poll(server, channel, f"{name}=&timeout=0")["cursor"] == ids[2], "an empty one is none"
    assert data_of(poll(server, channel, f"{name}=&since={ids[1]}")) == ["m2"]


def test_of_several_names_in_the_query_the_first_known_counts(server: Server) -> None:
    ids = [server.publish("query-names", f"m{number}") for number in range(4)]
    query = "&".join(f"{name}={id}" for name, id in zip(reversed(LAST_EVENT_IDS), ids, strict=True))
    assert poll(server, "query-names", f"{query}&timeout=0")["cursor"] == ids[3]
    assert data_of(poll(server, "query-names", f"Last-Event-ID={ids[0]}&lastEventID={ids[2]}")) == ["m3"]


def test_poll_of_several_channels_has_one_cursor_for_all(server: Server) -> None:
    start = poll(server, "pa,pb,pc", "timeout=0.01")
    assert len(start["cursor"].split(".")) == 3
    first = server.publish("pb", "one")
    server.publish("pa", "two")
    answer = poll(server, "pa,pb,pc", f"since={start['cursor']}")
    assert sorted((message["channel"], message["data"]) for message in answer["messages"]) == [("pa", "two"), ("pb", "one")]
    assert first in answer["cursor"].split(".")
    assert answer["cursor"].split(".")[2] == start["cursor"].split(".")[2]
    assert data_of(poll(server, "pa,pb,pc", f"since={answer['cursor']}&timeout=0")) == []
    server.publish("pc", "three")
    assert data_of(poll(server, "pa,pb,pc", f"since={answer['cursor']}")) == ["three"]


def test_doubled_channels_merge(server: Server) -> None:
    with server.client() as client:
        client.ask("GET", "/poll/dd,ee,dd,dd,ee")
        wait_until(lambda: subscribers(server, "dd") == 1)
        server.publish("dd", "once")
        answer = client.read().json
    assert data_of(answer) == ["once"]
    assert len(answer["cursor"].split(".")) == 2
    assert data_of(poll(server, "dd,ee,dd", f"since={answer['cursor']}&timeout=0")) == []


def test_a_poll_can_be_repeated_and_gives_the_same_again(server: Server) -> None:
    ids = [server.publish("poll-again", f"m{number}") for number in range(3)]
    answers = [poll(server, "poll-again", f"since={ids[0]}") for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_a_hang_up_frees_a_waiting_poll(server: Server) -> None:
    client = server.client()
    client.ask("GET", "/poll/poll-hang-up?timeout=300")
    wait_until(lambda: server.request("GET", "/channels/poll-hang-up").status == 200)
    client.close()
    wait_until(lambda: info(server, "poll-hang-up")["subscribers"] == 0)


# -- server-sent events


def test_events_open_with_retry_and_id_and_a_name_that_no_handler_has(server: Server) -> None:
    newest = server.publish("sse-open", "before")
    with server.client() as client:
        client.ask("GET", "/events/sse-open")
        head = client.read_head()
        assert head.status == 200
        assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert head.headers["cache-control"] == "no-store"
        assert head.headers["x-accel-buffering"] == "no"
        assert head.headers["comet-cursor"] == newest
        assert client.read_chunk().decode() == f"retry: 2000\nevent: comet\nid: {newest}\n\n"


def test_an_event_has_id_type_and_data_lines(server: Server) -> None:
    with server.client() as client:
        client.ask("GET", "/events/sse-lines")
        client.read_head()
        client.read_chunk()
        name = server.publish("sse-lines", "hello", "greeting")
        assert client.read_chunk().decode() == f"event: greeting\ndata: hello\nid: {name}\n\n"
        name = server.publish("sse-lines", "one\ntwo\r\nthree\rfour\n")
        assert client.read_chunk().decode() == f"event: message\ndata: one\ndata: two\ndata: three\ndata: four\ndata: \nid: {name}\n\n"


def test_a_body_cannot_forge_fields_of_an_event(server: Server) -> None:
    with server.events("sse-forge") as events:
        server.publish("sse-forge", "x\n\nid: 0-0\nevent: gap\ndata: forged\r\rretry: 1")
        server.publish("sse-forge", "after")
        first, second = events.next(), events.next()
    assert first.type == "message"
    assert first.retry is None
    assert first.data == "x\n\nid: 0-0\nevent: gap\ndata: forged\n\nretry: 1"
    assert second.data == "after"


def test_events_of_several_channels_carry_a_composite_cursor_that_resumes(server: Server) -> None:
    with server.events("sa,sb,sc") as events:
        start = events.cursor
        assert start is not None
        assert len(start.split(".")) == 3
        server.publish("sb", "b1")
        one = events.next()
        server.publish("sc", "c1")
        server.publish("sa", "a1")
        rest = [events.next(), events.next()]
        assert one.id is not None
        assert [len(event.id.split(".")) for event in (one, *rest) if event.id] == [3, 3, 3]
    assert [event.data for event in rest] == ["c1", "a1"]
    with server.events("sa,sb,sc", one.id) as resumed:
        assert sorted(str(resumed.next().data) for _ in range(2)) == ["a1", "c1"]
        server.publish("sa", "a2")
        event = resumed.next()
        assert (event.data, event.type) == ("a2", "message")
    with server.events("sa,sb,sc", event.id) as resumed:
        server.publish("sb", "live")
        assert resumed.next().data == "live"


def test_the_opening_id_resumes_even_without_a_message_seen(server: Server) -> None:
    with server.events("sse-nothing") as events:
        cursor = events.opening.id
    server.publish("sse-nothing", "missed")
    with server.events("sse-nothing", cursor) as resumed:
        assert resumed.next().data == "missed"


def test_retry_is_a_setting(start: Start) -> None:
    with start("--retry", "123").events("x") as events:
        assert events.opening.retry == "123"


# -- lines of JSON


def test_stream_is_ndjson_and_names_its_first_cursor(server: Server) -> None:
    newest = server.publish("lines", "before")
    with Stream(server, "lines") as stream:
        assert stream.head.headers["content-type"] == "application/x-ndjson; charset=utf-8"
        assert stream.head.headers["cache-control"] == "no-store"
        assert stream.head.headers["x-accel-buffering"] == "no"
        assert stream.head.headers["comet-cursor"] == newest
        name = server.publish("lines", "two\nlines", "kind")
        assert stream.next() == {"id": name, "channel": "lines", "type": "kind", "data": "two\nlines"}


def test_stream_of_several_channels_carries_a_cursor_a_line(server: Server) -> None:
    with Stream(server, "la,lb") as stream:
        assert len(stream.head.headers["comet-cursor"].split(".")) == 2
        server.publish("lb", "b1")
        server.publish("la", "a1")
        first, second = stream.next(), stream.next()
        assert (first["channel"], second["channel"]) == ("lb", "la")
        assert second["cursor"] == f"{second['id']}.{first['id']}"
    with Stream(server, "la,lb", f"?since={first['cursor']}") as stream:
        assert stream.next()["data"] == "a1"


def test_stream_tells_a_gap_as_an_object(server: Server) -> None:
    with Stream(server, "stream-gap", "?since=123-4") as stream:
        assert stream.head.headers["comet-cursor"] == "123-4", "it stands there until it is told"
        document = stream.next()
        assert document == {"gap": True, "cursor": f"{document['cursor'].partition('-')[0]}-0"}
        name = server.publish("stream-gap", "x")
        assert stream.next()["id"] == name


def test_events_tell_a_gap_as_an_event_with_a_cursor(server: Server) -> None:
    kept = server.publish("events-gap", "kept")
    with server.events("events-gap", "123-4") as events:
        gap = events.next()
        assert gap.type == "gap"
        assert json.loads(gap.data or "") == {"gap": True, "cursor": gap.id}
        assert events.next().id == kept
    with server.events("events-gap", gap.id) as resumed:
        assert resumed.next().id == kept


# -- heartbeats


def test_streams_have_heartbeats_in_silence(start: Start) -> None:
    server = start("--heartbeat", "0.2")
    with server.client() as events, server.client() as lines:
        began = time.monotonic()
        events.ask("GET", "/events/quiet")
        events.read_head()
        events.read_chunk()
        lines.ask("GET", "/stream/quiet")
        lines.read_head()
        assert lines.read_chunk() == b"\n"
        for _ in range(3):
            assert events.read_chunk() == b":\n"
            assert lines.read_chunk() == b"\n"
        assert time.monotonic() - began > 0.5
        name = server.publish("quiet", "loud")
        while (chunk := lines.read_chunk()) == b"\n":
            pass
        assert json.loads(chunk)["id"] == name
        while (chunk := events.read_chunk()) == b":\n":
            pass
        assert chunk.endswith(f"\nid: {name}\n\n".encode())


def test_a_heartbeat_is_at_most_two_seconds_late(start: Start) -> None:
    """A look a second finds what is due, and a second later it is all sent. Of many clients the middle one is judged: on a machine
    with other work a few may have waited for something else."""
    server = start("--heartbeat", "2")
    late: list[float] = []

    def listen(path: str, heartbeat: bytes) -> None:
        with server.client() as client:
            client.ask("GET", path)
            client.read_head()
            client.read_chunk()
            began = time.monotonic()
            assert client.read_chunk() == heartbeat
            late.append(time.monotonic() - began - 2)

    waiting = []
    for _ in range(20):
        waiting += [gevent.spawn(listen, "/events/silent", b":\n"), gevent.spawn(listen, "/stream/silent", b"\n")]
        gevent.sleep(0.05)
    gevent.joinall(waiting, timeout=TIMEOUT, raise_error=True)
    late.sort()
    assert len(late) == 40
    assert late[0] > -1.1, "its silence began at a look, at most a second before"
    assert late[20] <= 2, late


def test_messages_take_the_place_of_heartbeats(start: Start) -> None:
    server = start("--heartbeat", "1")
    silences = 0
    with Stream(server, "busy") as stream:
        for number in range(30):
            began = time.monotonic()
            gevent.sleep(0.05)
            server.publish("busy", str(number))
            assert stream.next()["data"] == str(number)
            silences += time.monotonic() - began > 0.9  # of a machine with other work
        assert stream.heartbeats <= silences


# -- publishing


def test_publish_answers_201_with_id_and_subscribers(server: Server) -> None:
    answer = server.request("POST", "/publish/pub?type=a.b:c@d-e_f", b"body")
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"id", "subscribers"}
    assert answer.json["subscribers"] == 0
    (message,) = poll(server, "pub", "since=oldest")["messages"]
    assert message == {"id": answer.json["id"], "channel": "pub", "type": "a.b:c@d-e_f", "data": "body"}
    with server.events("pub"), Stream(server, "pub,other"):
        assert server.request("POST", "/publish/pub", b"x").json["subscribers"] == 2


def test_ids_of_a_channel_count_up_within_its_epoch(server: Server) -> None:
    ids = [server.publish("counting", "x").split("-") for _ in range(5)]
    assert {epoch for epoch, _ in ids} == {ids[0][0]}
    assert [int(offset) for _, offset in ids] == [1, 2, 3, 4, 5]


def test_two_channels_have_epochs_of_their_own(server: Server) -> None:
    assert server.publish("epoch-a", "x").split("-")[0] != server.publish("epoch-b", "x").split("-")[0]


def test_a_repeat_under_an_idempotency_key_answers_what_the_first_did(server: Server) -> None:
    key = {"Idempotency-Key": "order-17"}
    first = server.request("POST", "/publish/idem", b"once", key)
    with server.events("idem"):
        again = server.request("POST", "/publish/idem", b"once", key)
    assert first.status == again.status == 201
    assert first.json == again.json
    assert info(server, "idem")["messages"] == 1
    assert error(server.request("POST", "/publish/idem", b"twice", key)) == (409, "key-conflict")
    assert error(server.request("POST", "/publish/idem?type=other", b"once", key)) == (409, "key-conflict")
    other = server.request("POST", "/publish/idem-2", b"twice", key)
    assert other.status == 201
    assert server.request("POST", "/publish/idem", b"once", {"Idempotency-Key": "order-18"}).json["id"] != first.json["id"]
    assert data_of(poll(server, "idem", "since=oldest")) == ["once", "once"]


def test_an_idempotency_key_is_forgotten_after_its_age(start: Start) -> None:
    server = start("--key-age", "0.2")
    key = {"Idempotency-Key": "k"}
    first = server.request("POST", "/publish/a", b"x", key).json["id"]
    wait_until(lambda: server.request("POST", "/publish/a", b"x", key).json["id"] != first)


def test_batch_and_single_share_their_keys(server: Server) -> None:
    first = server.request("POST", "/publish/shared-key", b"x", {"Idempotency-Key": "k"}).json
    same, conflict = batch(
        server,
        {"channel": "shared-key", "data": "x", "key": "k"},
        {"channel": "shared-key", "data": "y", "key": "k"},
    )
    assert same == first
    assert conflict["error"] == "key-conflict"


def test_batch_answers_a_result_a_line_in_order(server: Server) -> None:
    results = batch(
        server,
        {"channel": "ba", "data": "one"},
        {"channel": "bb", "data": "two", "type": "kind"},
        {"channel": "ba", "data": "three", "key": None},
    )
    assert [set(result) for result in results] == [{"id", "subscribers"}] * 3
    kept = poll(server, "ba,bb", "since=oldest")["messages"]
    assert {message["id"]: message["data"] for message in kept} == dict(
        zip((result["id"] for result in results), ("one", "two", "three"), strict=True)
    )
    assert [message["type"] for message in kept if message["channel"] == "bb"] == ["kind"]


BAD_LINES: tuple[tuple[bytes, str], ...] = (
    (b"", "bad-line"),
    (b"{", "bad-line"),
    (b"null", "bad-line"),
    (b"[]", "bad-line"),
    (b'"text"', "bad-line"),
    (b"{}", "bad-line"),
    (b'{"channel": "bad"}', "bad-line"),
    (b'{"data": "x"}', "bad-line"),
    (b'{"channel": "bad", "data": 1}', "bad-line"),
    (b'{"channel": 1, "data": "x"}', "bad-line"),
    (b'{"channel": "bad", "data": null}', "bad-line"),
    (b'{"channel": "bad", "data": "x", "more": 1}', "bad-line"),
    (b'{"channel": "bad", "data": "x"} trailing', "bad-line"),
    (b'{"channel": "bad", "data": "x"}{"channel": "bad", "data": "x"}', "bad-line"),
    (b'{"channel": "bad", "data": "\xff"}', "bad-line"),
    (b'{"channel": "bad", "data": "\\ud800"}', "bad-line"),
    (b'{"channel": "bad", "data": "\\udc00\\ud800"}', "bad-line"),
    (b'{"channel": "bad", "data": "\xed\xa0\x80"}', "bad-line"),
    (b'{"channel": "b\\ud800d", "data": "x"}', "bad-channel"),
    (b'{"channel": "bad", "data": "x", "type": "\\ud800"}', "bad-type"),
    (b'{"channel": "bad", "data": "x", "key": "\\ud800"}', "bad-key"),
    (b'{"channel": "", "data": "x"}', "bad-channel"),
    (b'{"channel": "a,b", "data": "x"}', "bad-channel"),
    (b'{"channel": "bad", "data": "x", "type": ""}', "bad-type"),
    (b'{"channel": "bad", "data": "x", "type": "gap"}', "bad-type"),
    (b'{"channel": "bad", "data": "x", "key": ""}', "bad-key"),
    (b'{"channel": "bad", "data": "x", "key": "a b"}', "bad-key"),
    (b'{"channel": "bad", "data": "' + b"x" * 65537 + b'"}', "body-too-large"),
    (b"[" * 100_000, "bad-line"),
    (b'{"channel": "bad", "data": ' + b'{"a":' * 50_000, "bad-line"),
)


def test_a_bad_line_of_a_batch_fails_alone(server: Server) -> None:
    lines: list[bytes] = []
    for number, (line, _) in enumerate(BAD_LINES):
        lines += [line, json.dumps({"channel": "good-lines", "data": str(number)}).encode()]
    results = batch(server, *lines)
    assert len(results) == len(lines)
    for (line, slug), result in zip(BAD_LINES, results[::2], strict=True):
        # a lone surrogate may be refused by the JSON reader already, before the name is looked at
        allowed = {slug, "bad-line"} if b"\\ud800" in line else {slug}
        assert result.get("error") in allowed, (line[:80], result)
        assert set(result) == {"error", "detail"}
    assert all("id" in result for result in results[1::2])
    assert data_of(poll(server, "good-lines", "since=oldest")) == [str(number) for number in range(len(BAD_LINES))]
    assert error(server.request("GET", "/channels/bad")) == (404, "no-channel")


def test_what_python_calls_a_line_end_ends_no_line(server: Server) -> None:
    bodies = [f"a{one}b" for one in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    with Stream(server, "line-ends") as live:
        for body in bodies:
            server.publish("line-ends", body)
        lines: list[str] = []
        while len(lines) < len(bodies):
            lines += live.read_chunk().decode().splitlines()
        assert [json.loads(line)["data"] for line in lines] == bodies
    for path in ("/poll/line-ends?since=oldest", "/channels/line-ends/history"):
        (line,) = server.request("GET", path).body.decode().splitlines()
        assert [message["data"] for message in json.loads(line)["messages"]] == bodies, path
    # a refusal repeats an unknown name
    wrong = [json.dumps({"channel": "a", "data": "", body: ""}, ensure_ascii=False).encode() for body in bodies]
    answers = server.request("POST", "/publish", b"\n".join(wrong)).body.decode().splitlines()
    assert [json.loads(line)["error"] for line in answers] == ["bad-line"] * len(bodies)
    assert "\u2028" in json.loads(answers[6])["detail"]


def test_surrogate_pairs_in_a_batch_are_one_character(server: Server) -> None:
    batch(server, b'{"channel": "pairs", "data": "\\ud83e\\udd8a"}')
    assert data_of(poll(server, "pairs", "since=oldest")) == ["🦊"]


def test_batch_takes_crlf_lines_a_last_line_without_end_and_nothing_at_all(server: Server) -> None:
    line = b'{"channel": "crlf", "data": "x"}'
    assert all("id" in result for result in batch(server, line + b"\r", line + b"\r", line))
    assert batch(server, b"") == []
    assert info(server, "crlf")["messages"] == 3


def test_a_large_batch_is_published_in_order(server: Server) -> None:
    with Stream(server, "large-batch") as stream:
        results = batch(server, *({"channel": "large-batch", "data": str(number)} for number in range(5000)))
        assert [int(result["id"].split("-")[1]) for result in results] == list(range(1, 5001))
        assert [stream.next()["data"] for _ in range(5000)] == [str(number) for number in range(5000)]


def test_a_batch_over_its_bound_is_refused_as_a_whole(start: Start) -> None:
    server = start("--max-batch", "1000")
    line = json.dumps({"channel": "a", "data": "x" * 400}).encode() + b"\n"
    assert error(server.request("POST", "/publish", line * 3)) == (413, "body-too-large")
    assert error(server.request("GET", "/channels/a")) == (404, "no-channel")
    assert server.request("POST", "/publish", line * 2).status == 200


# -- channels


def test_a_channel_shows_subscribers_position_and_what_is_kept(server: Server) -> None:
    assert error(server.request("GET", "/channels/shown")) == (404, "no-channel")
    name = server.publish("shown", "x")
    assert info(server, "shown") == {"channel": "shown", "subscribers": 0, "position": name, "messages": 1}
    with server.events("shown"):
        assert info(server, "shown")["subscribers"] == 1
    wait_until(lambda: info(server, "shown")["subscribers"] == 0)


def history(server: Server, channel: str, query: str = "") -> Any:
    """The document of /history."""
    answer = server.request("GET", f"/channels/{channel}/history{query}")
    assert answer.status == 200, answer
    assert answer.headers["cache-control"] == "no-store"
    return answer.json


def test_history_goes_in_pages_to_a_cursor_that_subscribes(server: Server) -> None:
    batch(server, *({"channel": "paged", "data": str(number)} for number in range(250)))
    seen: list[str] = []
    cursor = "oldest"
    pages = 0
    while True:
        page = history(server, "paged", f"?since={cursor}&limit=60")
        assert not page["gap"]
        cursor = page["cursor"]
        if not page["messages"]:
            break
        seen += data_of(page)
        pages += 1
    assert seen == [str(number) for number in range(250)]
    assert pages == 5
    server.publish("paged", "live")
    assert data_of(poll(server, "paged", f"since={cursor}")) == ["live"]


def test_history_is_100_messages_unless_asked_and_at_most_1000(server: Server) -> None:
    batch(server, *({"channel": "limits", "data": str(number)} for number in range(300)))
    assert data_of(history(server, "limits")) == [str(number) for number in range(100)]
    assert len(history(server, "limits", "?limit=1000")["messages"]) == 300
    assert history(server, "limits", "?limit=0")["messages"] == []
    for limit in ("1001", "-1", "x", "", "nan", "inf"):
        assert error(server.request("GET", f"/channels/limits/history?limit={limit}")) == (400, "bad-parameter"), limit
    assert error(server.request("GET", "/channels/limits/history?since=rubbish")) == (400, "bad-cursor")
    assert error(server.request("GET", "/channels/limits/history?since=1-1.1-1")) == (400, "bad-cursor")


def test_history_does_not_subscribe_or_create(server: Server) -> None:
    assert error(server.request("GET", "/channels/unheard-of/history")) == (404, "no-channel")
    assert error(server.request("GET", "/channels/unheard-of")) == (404, "no-channel")
    assert error(server.request("DELETE", "/channels/unheard-of")) == (404, "no-channel")


def test_history_tells_a_gap_for_a_cursor_of_another_log(server: Server) -> None:
    batch(server, *({"channel": "foreign", "data": str(number)} for number in range(3)))
    page = history(server, "foreign", "?since=1-1")
    assert page["gap"]
    assert data_of(page) == ["0", "1", "2"]
    assert not history(server, "foreign", f"?since={page['cursor']}")["gap"]


def test_delete_ends_subscribers_and_the_next_cursor_is_told_a_gap_once(server: Server) -> None:
    cursor = server.publish("doomed", "old")
    with server.events("doomed") as events, Stream(server, "doomed") as stream, server.client() as waits, server.client() as test:
        waits.ask("GET", f"/poll/doomed?since={cursor}&timeout=60")
        test.ask("GET", "/test/someone-else")
        test.read_head()
        test.read_chunk()
        wait_until(lambda: info(server, "doomed")["subscribers"] == 3)
        answer = server.request("DELETE", "/channels/doomed")
        assert answer.status == 200
        assert answer.json == {"channel": "doomed", "subscribers": 3, "position": cursor, "messages": 1}
        with pytest.raises(EOFError):
            events.next()
        with pytest.raises(EOFError):
            stream.next()
        assert waits.read().json == {"cursor": cursor, "gap": False, "messages": []}
        assert error(server.request("GET", "/channels/doomed")) == (404, "no-channel")
        # a stream's connection ends with it, a poll's is fit for another request
        assert events.at_end() and stream.at_end()
        assert waits.request("GET", "/healthz").status == 200
        server.request("POST", "/send/someone-else", b"still here")
        assert test.read_chunk() == b"still here\n"
    new = server.publish("doomed", "new")
    assert new.split("-")[0] != cursor.split("-")[0]
    told = poll(server, "doomed", f"since={cursor}&timeout=60")
    assert (told["gap"], data_of(told)) == (True, ["new"])
    again = poll(server, "doomed", f"since={told['cursor']}&timeout=0")
    assert (again["gap"], again["messages"]) == (False, [])


def test_delete_ends_a_subscriber_of_several_channels_and_leaves_the_others_right(server: Server) -> None:
    with server.events("del-a,del-b") as events, Stream(server, "del-b") as stays:
        server.request("DELETE", "/channels/del-a")
        with pytest.raises(EOFError):
            events.next()
        wait_until(lambda: info(server, "del-b")["subscribers"] == 1)
        server.publish("del-b", "x")
        assert stays.next()["data"] == "x"
        resumed = poll(server, "del-a,del-b", f"since={events.cursor}&timeout=0")
        assert (resumed["gap"], data_of(resumed)) == (True, ["x"])


# -- health and counters


def test_health_and_readiness(server: Server) -> None:
    for path in ("/healthz", "/readyz"):
        answer = server.request("GET", path)
        assert answer.status == 200
        assert answer.headers["cache-control"] == "no-store"
        assert "status" in answer.json


def test_the_page_is_served(server: Server) -> None:
    answer = server.request("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert b"<html" in answer.body.lower()


def test_head_answers_without_a_body_and_never_subscribes(server: Server) -> None:
    server.publish("headed", "x")
    for path in ("/", "/healthz", "/readyz", "/stats", "/channels/headed", "/channels/headed/history"):
        with server.client() as client:
            assert client.request("HEAD", path).status == 200, path
            assert client.request("GET", "/healthz").json["status"] == "alive", "bytes of a body were left"
    assert info(server, "headed")["subscribers"] == 0


KINDS = {
    "/poll/unheard": "application/json",
    "/events/unheard": "text/event-stream; charset=utf-8",
    "/stream/unheard": "application/x-ndjson; charset=utf-8",
    "/test/unheard": "text/plain; charset=utf-8",
}
"""Content-Type of what waits."""


@pytest.mark.parametrize("path", KINDS)
def test_head_of_what_waits_has_the_headers_and_no_subscriber(start: Start, path: str) -> None:
    server = start("--origins", "https://a.example")
    channel = path[1:].replace("test/", "user:").rpartition("/")[2]
    with server.client() as client:
        for headers in ({}, {"Origin": "https://a.example"}, {"Last-Event-ID": "oldest"}):
            for _ in range(2):  # on a fresh connection, and on one that is kept
                head = client.request("HEAD", path, headers=headers)
                assert head.status == 200
                assert head.headers["content-type"] == KINDS[path]
                assert (head.headers["cache-control"], head.headers["x-accel-buffering"]) == ("no-store", "no")
                assert not {"content-length", "transfer-encoding", "comet-cursor", "connection"} & set(head.headers)
                assert ("access-control-allow-origin" in head.headers) is ("Origin" in headers)
                assert client.request("GET", "/healthz").json["status"] == "alive", "bytes of a body were left"
        wrong = ["!", *(["?since=x"] if "test" not in path else []), *(["?timeout=x"] if "poll" in path else [])]
        for end in wrong:
            assert client.request("HEAD", path + end).status == client.request("GET", path + end).status == 400, end
        stats = client.request("GET", "/stats").json
        assert (sum(stats["clients"].values()), stats["closed"], stats["channels"]) == (0, {}, 0)
        assert error(client.request("GET", f"/channels/{channel}")) == (404, "no-channel")
    with server.client() as client:  # its connection may close as it is
        client.send(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        head = client.read_head()
        assert (head.status, head.headers["content-type"]) == (200, KINDS[path])
        assert client.at_end()


@pytest.mark.parametrize("path", KINDS)
def test_what_waits_says_its_content_type_on_every_way(server: Server, path: str) -> None:
    target = path + ("?timeout=0" if "poll" in path else "")
    for request in (
        f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n",
        f"GET {target} HTTP/1.0\r\n\r\n",
        f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        f"GET {target.replace('un', 'u%6e')} HTTP/1.1\r\nHost: h\r\n\r\n",  # what is escaped is read by another parser
        f"GET {target} HTTP/1.1\r\nHost: h\r\nOrigin: https://a.example\r\n\r\n",
    ):
        for before in (b"", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"):
            with server.client() as client:
                if before:
                    client.send(before)
                    client.read()
                client.send(request.encode())
                assert client.read_head().headers["content-type"] == KINDS[path], request


CODINGS = ["gzip", "br", "deflate", "zstd", "GZIP", "x-gzip", "identity, gzip", "gzip,", "unknown", "*"]


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
def test_a_body_with_a_content_encoding_is_refused_and_not_published(server: Server, compressed: bool) -> None:
    text = {
        "/publish/coded": b"hello",
        "/publish": b'{"channel":"coded","data":"hello"}\n',
        "/send/coded": b"hello",
        "/follows": b"coded-a coded-b\n",
    }
    with server.events("user:coded") as feed, server.client() as kept:
        for path, body in text.items():
            assert kept.request("GET", "/healthz").status == 200
            for coding in CODINGS:
                data = gzip.compress(body) if compressed else body
                answer = server.request("POST", path, data, {"Content-Encoding": coding})
                assert error(answer) == (415, "bad-content-encoding"), (path, coding)
                assert answer.headers["accept-encoding"] == "identity"
                # the same on a connection that is kept, whose requests are read another way, and with an empty body
                with server.client() as client:
                    assert client.request("POST", "/send/other", b"hello").status == 200
                    answer = client.request("POST", path, data, {"Content-Encoding": coding})
                    assert error(answer) == (415, "bad-content-encoding"), (path, coding)
        assert server.request("POST", "/publish/coded", b"", {"Content-Encoding": "gzip"}).status == 415
        assert error(server.request("GET", "/channels/coded")) == (404, "no-channel")
        assert server.request("GET", "/users/coded-a/following").json["count"] == 0
        for coding in ("identity", "Identity", "", "identity, identity"):  # what says nothing is no refusal
            for path in ("/publish/coded-not", "/send/coded"):
                assert kept.request("POST", path, b"hello", {"Content-Encoding": coding}).status in (200, 201), (path, coding)
        for _ in range(4):
            assert feed.next().data == "hello"
        with server.client() as client:  # the body is not asked for
            client.ask("POST", "/publish/coded", headers={"Content-Length": "5", "Expect": "100-continue", "Content-Encoding": "gzip"})
            assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 415 ")


def test_wrong_methods_and_paths_are_told(server: Server) -> None:
    for method, path, allow in (
        ("POST", "/poll/a", "GET, HEAD, OPTIONS"),
        ("DELETE", "/events/a", "GET, HEAD, OPTIONS"),
        ("PUT", "/publish/a", "OPTIONS, POST"),
        ("GET", "/publish/a", "OPTIONS, POST"),
        ("GET", "/send/a", "OPTIONS, POST"),
        ("PATCH", "/channels/a", "DELETE, GET, HEAD, OPTIONS"),
        ("POST", "/stats", "GET, HEAD, OPTIONS"),
    ):
        answer = server.request(method, path, b"")
        assert error(answer) == (405, "method-not-allowed"), (method, path)
        assert answer.headers["allow"] == allow
        options = server.request("OPTIONS", path)
        assert (options.status, options.headers["allow"]) == (204, allow)
    for path in (
        "/nothing",
        "/poll",
        "/poll/",
        "/poll/a/b",
        "/events/",
        "/publish/a/b",
        "/channels",
        "/channels/a/b",
        "/test/",
        "//",
        "/healthz/",
    ):
        assert error(server.request("GET", path)) == (404, "not-found"), path


def test_stats_count_what_happened(start: Start) -> None:
    server = start()
    before = server.stats()
    assert before["published"] == 0
    with server.events("s") as events, Stream(server, "s") as lines, server.client() as test, server.client() as waits:
        test.ask("GET", "/test/1")
        test.read_head()
        waits.ask("GET", "/poll/s")
        wait_until(lambda: server.clients() == 4)
        assert server.stats()["clients"] == {"events": 1, "stream": 1, "test": 1, "poll": 1}
        wait_until(lambda: server.stats()["connections"] == 5)  # it may see who asks before the last one's end
        server.publish("s", "one")
        waits.read()
        batch(server, {"channel": "s", "data": "two"}, {"channel": "other", "data": "three"}, {"channel": "", "data": "bad"})
        server.request("POST", "/send/1", b"four")
        server.request("POST", "/publish/s", b"\xff")
        server.request("GET", "/nowhere")
        assert [events.next().data, events.next().data, lines.next()["data"], lines.next()["data"]] == ["one", "two", "one", "two"]
        now = server.stats()
        assert now["published"] == 4
        assert now["offered"] == 6
        assert now["clients"] == {"events": 1, "stream": 1, "test": 1, "poll": 0}
        assert now["closed"] == {"answered": 1}
        assert now["refused"] == {"bad-channel": 1, "bad-body": 1, "not-found": 1}
        assert now["errors"] == 0
        assert now["channels"] == 3
        assert now["messages_kept"] == 4
        assert now["peak_memory_bytes"] > 1 << 20
        server.request("DELETE", "/channels/user:1")
    wait_until(lambda: server.clients() == 0)
    wait_until(lambda: server.stats()["connections"] == 1)
    now = server.stats()
    assert now["closed"] == {"answered": 1, "hang-up": 2, "deleted": 1}
    assert now["accepted"] >= 8


# -- who may


def test_a_publish_key_guards_writing_and_stats_and_leaves_reading_free(start: Start) -> None:
    server = start(COMET_PUBLISH_KEY="s3cret")
    right = {"Authorization": "Bearer s3cret"}
    guarded = (
        ("POST", "/publish/a", b"x"),
        ("POST", "/publish", b'{"channel": "a", "data": "x"}'),
        ("POST", "/send/a", b"x"),
        ("DELETE", "/channels/a", None),
        ("GET", "/stats", None),
    )
    for method, path, body in guarded:
        for value in (
            None,
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic s3cret",
            "s3cret",
            "Bearer s3cret2",
            "Bearer S3CRET",
        ):
            answer = server.request(method, path, body, None if value is None else {"Authorization": value})
            assert error(answer) == (401, "unauthorized"), (method, path, value)
            assert answer.headers["www-authenticate"] == "Bearer"
    with server.events("a") as events:
        assert [server.request(method, path, body, right).status for method, path, body in guarded] == [201, 200, 200, 200, 200]
        assert [events.next().data, events.next().data] == ["x", "x"]
    assert server.request("POST", "/publish/a", b"x", {"Authorization": "bearer s3cret"}).status == 201
    for path in ("/", "/healthz", "/readyz", "/poll/a?timeout=0", "/channels/a", "/channels/a/history"):
        assert server.request("GET", path).status == 200, path
    assert "s3cret" not in server.log.read_text()


def test_a_page_of_another_origin_may_not_publish(server: Server) -> None:
    evil = {"Origin": "https://evil.example"}
    for method, path in (("POST", "/publish/csrf"), ("POST", "/publish"), ("POST", "/send/csrf"), ("DELETE", "/channels/csrf")):
        answer = server.request(method, path, b"", evil)
        assert error(answer) == (403, "origin-refused"), path
        assert "access-control-allow-origin" not in answer.headers
    assert error(server.request("POST", "/publish/csrf", b"x", {"Origin": "null"})) == (403, "origin-refused")
    assert error(server.request("GET", "/channels/csrf")) == (404, "no-channel")
    assert server.request("POST", "/publish/csrf", b"x", {"Origin": "http://test"}).status == 201, "its own origin: the Host is test"
    read = server.request("GET", "/poll/csrf?timeout=0", headers=evil)
    assert read.status == 200
    assert "access-control-allow-origin" not in read.headers


def test_an_allowed_origin_may_read_and_publish(start: Start) -> None:
    server = start("--origins", "https://a.example, https://b.example")
    for origin in ("https://a.example", "https://b.example"):
        given = {"Origin": origin}
        preflight = server.request(
            "OPTIONS",
            "/publish/x",
            headers={**given, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
        )
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert set(allowed.split(", ")) == {
            "authorization", "cache-control", "content-type", "idempotency-key", "last-event-id", "x-requested-with",
        }  # fmt: skip
        assert preflight.headers["access-control-allow-credentials"] == "true"
        assert int(preflight.headers["access-control-max-age"]) > 0
        answer = server.request("POST", "/publish/x", b"hello", given)
        assert answer.status == 201
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "access-control-allow-headers" not in answer.headers, "that is a preflight's"
        assert answer.headers["vary"] == "Origin"
        refused = server.request("POST", "/publish/x?type=gap", b"hello", given)
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, origin)
        missing = server.request("GET", "/nowhere", headers=given)
        assert (missing.status, missing.headers["access-control-allow-origin"]) == (404, origin)
        for path in ("/poll/x?timeout=0", "/events/x", "/stream/x", "/test/x"):
            with server.client() as client:
                client.ask("GET", path, headers=given)
                head = client.read_head()
                assert head.headers["access-control-allow-origin"] == origin, path
                assert head.headers["access-control-allow-credentials"] == "true", path
                assert head.headers["access-control-expose-headers"] == "Comet-Cursor, Retry-After, X-Request-ID"
                assert head.headers["vary"] == "Origin"
    other = {"Origin": "https://a.example.evil"}
    assert error(server.request("POST", "/publish/x", b"", other)) == (403, "origin-refused")
    preflight = server.request("OPTIONS", "/publish/x", headers=other)
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert preflight.headers["vary"] == "Origin"
    assert "vary" in server.request("GET", "/healthz").headers, "a cache must not give one origin's answer to another"


def test_a_star_allows_every_origin(start: Start) -> None:
    server = start("--origins", "*")
    answer = server.request("POST", "/publish/x", b"hello", {"Origin": "https://anyone.example"})
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (201, "*")
    assert "access-control-allow-credentials" not in answer.headers, "a browser refuses them together"


def test_an_origin_may_be_written_in_other_forms_than_a_browser_sends(start: Start) -> None:
    server = start("--origins", "HTTPS://A.example:443/, http://[0::1]:8080")
    for origin in ("https://a.example", "http://[::1]:8080"):
        answer = server.request("POST", "/publish/x", b"hello", {"Origin": origin})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (201, origin)


def test_answers_of_the_module_server_have_no_cors_headers(server: Server) -> None:
    answer = server.request("OPTIONS", "/publish/x", headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"})
    assert answer.status == 204
    assert not [name for name in answer.headers if name.startswith("access-control")]


# -- what is refused

NAMES = ("a b", "a/b", "é", "a%", "a,b", "a*", "a" * 129, "", "a\n", "\x00", "a?b", "a#b", "日本")


def quoted(name: str) -> str:
    """Percent-encoded to the last byte."""
    return "".join(f"%{byte:02X}" for byte in name.encode())


@pytest.mark.parametrize("name", NAMES)
def test_ill_formed_channel_names_are_refused_everywhere(server: Server, name: str) -> None:
    for method, path in (
        ("POST", "/publish/{}"),
        ("POST", "/send/{}"),
        ("GET", "/test/{}"),
        ("GET", "/poll/{}?timeout=0"),
        ("GET", "/events/{}"),
        ("GET", "/stream/{}"),
        ("GET", "/channels/{}"),
        ("GET", "/channels/{}/history"),
        ("DELETE", "/channels/{}"),
    ):
        if name == "a,b" and path.partition("/")[2].partition("/")[0] in ("poll", "events", "stream"):
            continue
        answer = server.request(method, path.format(quoted(name)), b"" if method == "POST" else None)
        expected = {(404, "not-found"), (405, "method-not-allowed")} if "/" in name or not name else {(400, "bad-channel")}
        assert error(answer) in expected, (method, path, name)
    for names in (f"ok,{quoted(name)}", f"{quoted(name)},ok"):
        if name == "a,b":
            continue
        answer = server.request("GET", f"/poll/{names}?timeout=0")
        assert error(answer) == ((404, "not-found") if "/" in name else (400, "bad-channel")), names


def test_every_allowed_character_makes_a_channel(server: Server) -> None:
    name = "ABCXYZabcxyz0189_.:@-"
    server.publish(name, "x")
    assert data_of(poll(server, quoted(name), "since=oldest")) == ["x"]
    server.publish("n" * 128, "x")
    assert info(server, "n" * 128)["messages"] == 1


def test_a_users_feed_counts_its_prefix_in_the_rule(server: Server) -> None:
    assert error(server.request("POST", "/send/" + "u" * 124, b"")) == (400, "bad-channel")
    assert server.request("POST", "/send/" + "u" * 123, b"").status == 200


@pytest.mark.parametrize("kind", ["", "gap", "error", "open", "comet", "a b", "é", "a" * 129, "a\nb", "a\r\nid: 1"])
def test_ill_formed_and_reserved_types_are_refused(server: Server, kind: str) -> None:
    assert error(server.request("POST", f"/publish/types?type={quoted(kind)}", b"x")) == (400, "bad-type")
    assert error(server.request("GET", "/channels/types")) == (404, "no-channel")


@pytest.mark.parametrize(
    "cursor", ["x", "1", "1-", "-1", "1--1", "1-01", "1-1.2-2", "1-1.", ".", "g-1", "1-1x", "1" * 13 + "-1", "1-" + "1" * 17, "A-1", "OLDEST", "1-1 ", "%00", "%C3%A9", "%FF"]
)  # fmt: skip
def test_ill_formed_cursors_are_refused(server: Server, cursor: str) -> None:
    target = cursor.replace(" ", "%20")
    for path in ("/poll/cursors?timeout=0&", "/events/cursors?", "/stream/cursors?", "/channels/cursors/history?"):
        assert error(server.request("GET", f"{path}since={target}")) == (400, "bad-cursor"), path


@pytest.mark.parametrize(
    "foreign",
    [
        "1605208392:0",
        "urn:uuid:0f2e4d1c-2b2b-4a5a-9f6f-7e1c1b2a3d4e",
        "x",
        "-1-0",
        "1-1.2-2",
        "1-1 x",
        "'",
        "[]",
        "1-1." * 1000,
        "x" * 8000,
    ],
)  # nchan's, Mercure's, and others; the last are longer than any cursor
def test_the_id_of_another_server_is_a_gap_and_then_what_is_kept(server: Server, foreign: str) -> None:
    channel = f"foreign-{zlib.crc32(foreign.encode())}"
    ids = [server.publish(channel, f"m{number}") for number in range(3)]
    header = {"Last-Event-ID": foreign}
    for how in ({}, {"Origin": "https://a.example"}):  # the short way, and bottle's
        told = server.request("GET", f"/poll/{channel}", headers={**header, **how}).json
        assert (told["gap"], data_of(told), told["cursor"]) == (True, ["m0", "m1", "m2"], ids[-1])
    with server.events(channel, foreign) as events:
        assert events.next().type == "gap"
        assert [events.next().data for _ in range(3)] == ["m0", "m1", "m2"]
    with server.events(channel, events.cursor) as events:
        server.publish(channel, "m3")
        assert events.next().data == "m3", "from then on it has a cursor of ours"
    with Stream(server, channel, headers=header) as lines:
        assert lines.next()["gap"]
        assert [lines.next()["data"] for _ in range(4)] == ["m0", "m1", "m2", "m3"]
    page = server.request("GET", f"/channels/{channel}/history", headers=header).json
    assert (page["gap"], data_of(page)) == (True, ["m0", "m1", "m2", "m3"])
    if len(foreign) < 100:
        told = poll(server, channel, f"lastEventId={quoted(foreign)}")
        assert (told["gap"], data_of(told)) == (True, ["m0", "m1", "m2", "m3"])


def test_the_id_of_another_server_is_a_gap_on_each_of_several_channels(server: Server) -> None:
    kept = server.publish("foreign-kept", "kept")
    told = server.request("GET", "/poll/foreign-new,foreign-kept", headers={"Last-Event-ID": kept}).json  # it is of one channel
    assert (told["gap"], data_of(told)) == (True, ["kept"])
    assert data_of(poll(server, "foreign-new,foreign-kept", f"since={told['cursor']}&timeout=0")) == []


def test_the_id_of_another_server_is_a_gap_where_there_is_no_log_yet(server: Server) -> None:
    with server.events("foreign-first", "1605208392:0") as events:
        assert events.next().type == "gap"
        server.publish("foreign-first", "first")
        assert events.next().data == "first"


def test_a_header_that_comet_reads_is_ascii(server: Server) -> None:
    for name in ("Last-Event-ID", "Idempotency-Key", "Authorization", "Origin"):
        for value in ("é", "1-1\x80"):
            assert error(server.request("POST", "/publish/ascii", b"x", {name: value})) == (400, "bad-request"), name
    assert error(server.request("GET", "/channels/ascii")) == (404, "no-channel")


def test_an_empty_cursor_is_none(server: Server) -> None:
    newest = server.publish("empty-cursor", "before")
    assert poll(server, "empty-cursor", "since=&timeout=0")["cursor"] == newest
    assert poll(server, "empty-cursor", "timeout=0", Last_Event_ID="")["cursor"] == newest


def test_a_cursor_of_another_number_of_channels_is_refused(server: Server) -> None:
    cursor = poll(server, "ca,cb", "timeout=0")["cursor"]
    assert error(server.request("GET", f"/poll/ca?since={cursor}")) == (400, "bad-cursor")
    assert error(server.request("GET", f"/poll/ca,cb,cc?since={cursor}")) == (400, "bad-cursor")
    assert error(server.request("GET", f"/events/ca?since={cursor}")) == (400, "bad-cursor")


def test_a_cursor_of_the_future_or_of_another_channel_is_told_a_gap(server: Server) -> None:
    name = server.publish("future", "x")
    epoch = name.split("-")[0]
    told = poll(server, "future", f"since={epoch}-2&timeout=60")
    assert (told["gap"], data_of(told), told["cursor"]) == (True, ["x"], name)
    told = poll(server, "not-future", f"since={name}&timeout=60")
    assert (told["gap"], told["messages"]) == (True, [])
    swapped = poll(server, "future,not-future", "timeout=0")["cursor"]
    assert poll(server, "not-future,future", f"since={swapped}&timeout=60")["gap"]


@pytest.mark.parametrize("timeout", ["-1", "300.1", "x", "", "nan", "inf", "1e9", "-0.1"])
def test_a_poll_timeout_out_of_its_range_is_refused(server: Server, timeout: str) -> None:
    assert error(server.request("GET", f"/poll/a?timeout={quoted(timeout)}")) == (400, "bad-parameter")


@pytest.mark.parametrize("key", ["", " ", "a b", "k" * 201])
def test_ill_formed_idempotency_keys_are_refused(server: Server, key: str) -> None:
    assert error(server.request("POST", "/publish/keys", b"x", {"Idempotency-Key": key})) == (400, "bad-key")
    assert error(server.request("POST", "/send/keys", b"x", {"Idempotency-Key": key})) == (400, "bad-key")


def test_a_key_of_200_characters_is_fine(server: Server) -> None:
    assert server.request("POST", "/publish/long-key", b"x", {"Idempotency-Key": "k" * 200}).status == 201


@pytest.mark.parametrize("body", [b"\xff", b"ok\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_bodies_that_are_not_utf8_are_refused(server: Server, body: bytes) -> None:
    assert error(server.request("POST", "/publish/utf8", body)) == (400, "bad-body")
    assert error(server.request("POST", "/send/utf8", body)) == (400, "bad-body")
    assert error(server.request("GET", "/channels/utf8")) == (404, "no-channel")


def test_64_channels_are_fine_and_65_are_refused(server: Server) -> None:
    names = [f"many-{number}" for number in range(65)]
    assert error(server.request("GET", f"/poll/{','.join(names)}?timeout=0")) == (400, "bad-channel")
    assert error(server.request("GET", f"/events/{','.join(names)}")) == (400, "bad-channel")
    assert error(server.request("GET", f"/stream/{','.join(names)}")) == (400, "bad-channel")
    some = ",".join([*names[:64], names[0], names[63]])
    cursor = poll(server, some, "timeout=0")["cursor"]
    assert len(cursor.split(".")) == 64
    with server.events(some, cursor) as events, Stream(server, some, f"?since={cursor}") as stream:
        for name in names:
            server.publish(name, name)
        assert [events.next().data for _ in range(64)] == names[:64]
        assert [stream.next()["data"] for _ in range(64)] == names[:64]
    assert sorted(data_of(poll(server, some, f"since={cursor}"))) == sorted(names[:64])


def test_64_channels_of_the_longest_name_fit_into_a_request(server: Server) -> None:
    names = ",".join(f"{number:02}".ljust(128, "x") for number in range(64))
    cursor = poll(server, names, "timeout=0")["cursor"]
    assert server.request("GET", f"/poll/{names}?timeout=0", headers={"Last-Event-ID": cursor}).status == 200


# -- bodies


@pytest.mark.parametrize("text", TEXTS)
def test_a_body_arrives_exactly_on_every_endpoint(server: Server, text: str) -> None:
    channel = f"user:round-{TEXTS.index(text)}"
    user = channel.partition(":")[2]
    with (
        server.events(channel) as events,
        Stream(server, channel) as one,
        Stream(server, f"{channel},x") as several,
        server.client() as test,
    ):
        test.ask("GET", f"/test/{user}")
        test.read_head()
        test.read_chunk()
        single = server.publish(channel, text)
        (batched,) = batch(server, {"channel": channel, "data": text})
        sent = server.request("POST", f"/send/{user}", text.encode()).json
        ids = [single, batched["id"], sent["id"]]
        for _ in ids:
            assert events.next().data == text
            assert one.next()["data"] == text
            assert several.next()["data"] == text
            assert test.read_chunk().decode() == text + "\n"
    answer = poll(server, channel, "since=oldest")
    assert [(message["id"], message["data"]) for message in answer["messages"]] == [(name, text) for name in ids]
    assert history(server, channel)["messages"] == answer["messages"]


def test_lines_in_a_body_arrive_exactly_where_the_framing_has_them(server: Server) -> None:
    text = "\n\r\nx\r\r\n\n"
    with Stream(server, "user:line-ends") as stream, server.client() as test:
        test.ask("GET", "/test/line-ends")
        test.read_head()
        test.read_chunk()
        server.publish("user:line-ends", text)
        assert stream.next()["data"] == text
        assert test.read_chunk().decode() == text + "\n"
    assert data_of(poll(server, "user:line-ends", "since=oldest")) == [text]


def test_a_body_of_exactly_the_bound_is_taken_and_one_byte_more_is_not(server: Server) -> None:
    full = b"x" * 65536
    with server.events("full") as events, Stream(server, "full") as stream:
        assert server.request("POST", "/publish/full", full).status == 201
        assert events.next().data == full.decode()
        assert stream.next()["data"] == full.decode()
    assert error(server.request("POST", "/publish/full", full + b"x")) == (413, "body-too-large")
    assert error(server.request("POST", "/send/full", full + b"x")) == (413, "body-too-large")
    assert "id" in batch(server, {"channel": "full", "data": full.decode()})[0]
    assert info(server, "full")["messages"] == 2
    wide = "é" * 32768
    assert server.request("POST", "/publish/full", wide.encode()).status == 201
    assert error(server.request("POST", "/publish/full", wide.encode() + b"x")) == (413, "body-too-large")


def test_a_chunked_body_is_taken_up_to_the_bound(server: Server) -> None:
    def send(size: int) -> Response:
        with server.client() as client:
            client.send(b"POST /publish/chunked HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"y" * size))
            return client.read()

    assert send(65536).status == 201
    assert error(send(65537)) == (413, "body-too-large")
    assert info(server, "chunked")["messages"] == 1


def test_a_publisher_without_a_body_publishes_the_empty_text(server: Server) -> None:
    assert server.request("POST", "/publish/nothing").status == 201
    assert data_of(poll(server, "nothing", "since=oldest")) == [""]


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_publisher_that_goes_in_the_middle_of_its_body_is_no_error_of_ours(start: Start, how: str) -> None:
    server = start()
    with server.client() as client:
        client.send(b"POST /publish/half HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\nhalf")
        wait_until(lambda: server.stats()["connections"] == 2)
        gevent.sleep(0.05)  # the half must have been read, which nothing shows
        if how == "half-close":
            client.sock.shutdown(socket.SHUT_WR)
            assert error(client.read()) == (400, "bad-body")
            assert client.at_end()
        elif how == "reset":
            client.reset()
        else:
            client.close()
        wait_until(lambda: server.stats()["connections"] == 1)
    assert error(server.request("GET", "/channels/half")) == (404, "no-channel")
    server.assert_healthy()


def test_one_connection_serves_many_requests_in_order(server: Server) -> None:
    with server.client() as client:
        for number in range(50):
            client.ask("POST", "/publish/pipelined", str(number).encode())
        ids = [client.read().json["id"] for _ in range(50)]
        assert [int(name.split("-")[1]) for name in ids] == list(range(1, 51))
        assert data_of(client.request("GET", "/poll/pipelined?since=oldest").json) == [str(number) for number in range(50)]


def test_an_http_1_0_client_gets_an_unchunked_body_ended_by_close(server: Server) -> None:
    with server.client() as client:
        client.send(b"GET /events/old-client HTTP/1.0\r\n\r\n")
        head = client.read_head()
        assert "transfer-encoding" not in head.headers
        opening = client.read_until(b"\n\n")
        assert opening.startswith(b"retry: ")
        name = server.publish("old-client", "x")
        assert client.read_until(b"\n\n").decode() == f"event: message\ndata: x\nid: {name}\n\n"
        server.request("DELETE", "/channels/old-client")
        assert client.at_end()


def test_expect_100_continue_is_honoured(server: Server) -> None:
    with server.client() as client:
        client.send(b"POST /publish/expect HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"body")
        assert client.read().status == 201
