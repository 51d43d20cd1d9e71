"""What a whole service says of itself, of made-up processes."""

from typing import Any

from comet.service import RESTARTS, summary
from comet.stats import RATE_OVER, Stats


def worker(number: int, **more: Any) -> dict[str, Any]:
    own = {
        "worker": number, "generation": 1, "pid": 100 + number, "capacity": 1000, "draining": False,
        "resident_bytes": 50_000_000, "growth_bytes": 0,
    }  # fmt: skip
    return {**own, **Stats().document(), **more}


def test_counters_of_workers_are_added_and_the_longest_stop_is_the_longest() -> None:
    workers = [
        worker(0, connections=10, published=5, clients={"poll": 2, "events": 1}, closed={"lost": 1}, gc_longest_seconds=0.002),
        worker(1, connections=20, published=7, clients={"poll": 3}, closed={"lost": 2, "hang-up": 4}, gc_longest_seconds=0.001),
    ]
    document = summary(workers, {"channels": 3}, {}, {"in_use": 1})
    assert document["connections"] == 30
    assert document["capacity"] == 2000
    assert document["published"] == 12
    assert document["clients"] == {"poll": 5, "events": 1}
    assert document["closed"] == {"lost": 3, "hang-up": 4}
    assert document["gc_longest_seconds"] == 0.002
    assert document["channels"] == 3
    assert document["sockets"] == {"in_use": 1}
    assert document["restarts"] == dict.fromkeys(RESTARTS, 0)
    assert [one["pid"] for one in document["workers"]] == [100, 101]


def test_what_ended_workers_counted_stays_but_their_clients_do_not() -> None:
    ended = {"published": 100, "closed": {"lost": 5}, "connections": 9, "clients": {"poll": 9}}
    document = summary([worker(0, published=1, closed={"lost": 1})], {}, {"ended": ended, "worker_restarts": 2}, {})
    assert document["published"] == 101
    assert document["closed"] == {"lost": 6}
    assert document["connections"] == 0
    assert document["clients"] == {}
    assert document["restarts"]["worker_restarts"] == 2


def test_memory_a_connection_is_what_was_added_since_the_start() -> None:
    workers = [worker(0, connections=1000, growth_bytes=400_000), worker(1, connections=3000, growth_bytes=800_000)]
    assert summary(workers, {}, {}, {})["bytes_a_connection"] == 300
    assert summary([worker(0, connections=999, growth_bytes=5)], {}, {}, {})["bytes_a_connection"] is None


def test_rates_are_taken_over_the_last_seconds() -> None:
    stats = Stats()
    for second in range(20):
        stats.sample(float(second))
        stats.published += 10 if second < 10 else 100
        stats.offered += 1000
    stats.sample(20.0)
    assert stats.messages_a_second == 100
    assert stats.deliveries_a_second == 1000
    stats.sample(20.0 + RATE_OVER)
    assert stats.messages_a_second < 100
    assert not any(name.startswith("_") for name in stats.document())


def test_workers_that_are_missing_are_told_as_the_supervisor_has_it() -> None:
    missing = {"workers": 1, "seconds": 7, "why": "worker 0 exited with status 1"}
    assert summary([worker(1)], {}, {"missing": missing}, {})["missing"] == missing
    assert summary([worker(0)], {}, {}, {})["missing"] == {"workers": 0, "seconds": 0, "why": ""}
