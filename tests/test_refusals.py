"""What a refused client reads: JSON with a status, or a stream that ends for a browser's EventSource."""

import random
import time

import msgspec
import pytest

from comet.errors import HEADERS, STATUS, Refusal
from comet.refusals import EVENTS_PATH, answer, wants_events
from handlers import ROUTES
from tests.test_framing import event_stream

PASSING = sorted(slug for slug, headers in HEADERS.items() if "Retry-After" in headers)


@pytest.mark.parametrize(
    "accept",
    [
        "text/event-stream", "text/event-stream, */*", "*/*,text/event-stream", "Text/Event-Stream", " text/event-stream ;q=0.1",
        "text/event-stream;q=1.000", "application/json, text/event-stream; charset=utf-8; q=0.001", "text/event-stream;q=0,text/event-stream",
    ],
)  # fmt: skip
def test_who_names_the_type_wants_events(accept: str) -> None:
    assert wants_events("GET", "/events/a,b", accept)


@pytest.mark.parametrize(
    "accept",
    [
        "", "*/*", "text/*", "application/json", "text/event-streams", "text/event-stream;q=0", "text/event-stream; Q=0.000", "text/event-stream ; q=0.",
        "x text/event-stream", '"text/event-stream', "text/event-stream/x", ",;,", "text/html;a=text/event-stream",
    ],
)  # fmt: skip
def test_who_does_not_name_it_wants_none(accept: str) -> None:
    assert not wants_events("GET", "/events/a", accept)


@pytest.mark.parametrize("accept", ["," * 160_000, "text/event-stream;" + ";" * 160_000, "a;b," * 40_000, "text/event-stream;q=0," * 7000])
def test_no_more_of_an_accept_header_is_read_than_a_browser_sends(accept: str) -> None:
    wants_events("GET", "/events/a", accept + "text/event-stream")  # warm
    began = time.process_time()
    for _ in range(200):
        wants_events("GET", "/events/a", accept + "text/event-stream")
    assert time.process_time() - began < 1.0  # some 0.05 s; of all parts four to thirteen


def test_only_a_get_of_events_is_an_event_sources() -> None:
    assert not any(wants_events(method, "/events/a", "text/event-stream") for method in ("HEAD", "POST", "OPTIONS", "get"))
    others = ("/poll/a", "/stream/a", "/test/a", "/", "*", "/events", "/publish/events/a", "//events/a")
    assert not any(wants_events("GET", path, "text/event-stream") for path in others)


def test_the_path_is_that_of_the_url_table() -> None:
    assert [route.path for route in ROUTES if route.path.startswith(EVENTS_PATH)] == [f"{EVENTS_PATH}<names>"]


@pytest.mark.parametrize("slug", PASSING)
def test_a_refusal_that_passes_is_no_event_and_says_when_to_come_back(slug: str) -> None:
    refusal, wait = Refusal(slug, "A sentence; what to do."), 1000 * int(HEADERS[slug]["Retry-After"])
    waits = set()
    for _ in range(200):
        status, headers, body = answer(refusal, events=True)
        assert status == 200
        assert dict(headers) == {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", **HEADERS[slug]}
        events, last_id, retry = event_stream(b"id: 7-7\n\n" + body)
        assert (events, last_id) == ([], "7-7"), "a browser resumes from where it was"
        assert retry is not None
        assert wait <= retry <= 2 * wait
        assert body.startswith(f": {slug}: A sentence; what to do.\nevent: comet\n".encode())
        waits.add(retry)
    assert len(waits) > 100, "all would come back at once"


@pytest.mark.parametrize("slug", sorted(set(STATUS) - set(PASSING)))
def test_a_final_refusal_stays_what_it_is(slug: str) -> None:
    refusal = Refusal(slug, "A sentence.")
    assert answer(refusal, events=True) == answer(refusal, events=False)
    status, headers, _ = answer(refusal, events=True)
    assert (status, dict(headers)["Content-Type"]) == (STATUS[slug], "application/json")


@pytest.mark.parametrize("slug", STATUS)
def test_everyone_else_reads_json(slug: str) -> None:
    status, headers, body = answer(Refusal(slug, "A sentence."), events=False)
    assert status == STATUS[slug]
    assert dict(headers) == {"Content-Type": "application/json", "Cache-Control": "no-store", **HEADERS.get(slug, {})}
    assert msgspec.json.decode(body) == {"error": slug, "detail": "A sentence."}


def test_no_detail_leaves_its_comment() -> None:
    rng = random.Random(5)
    for _ in range(300):
        detail = "".join(rng.choice(["\n", "\r", "\r\n", "\n\n", "data: x", "id: 9", " ", "a", "\u2028", "\x85"]) for _ in range(12))
        _, _, body = answer(Refusal("worker-full", detail), events=True)
        lines = body.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert [line.partition(":")[0] for line in lines] == ["", "event", "retry", "", ""], detail
