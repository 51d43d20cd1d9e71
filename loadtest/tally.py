"""Counts into Locust's statistics: many at a time, since an event a delivery would not keep up.

What is added here shows in Locust's tables, web page, CSV and HTML report like any request; what goes wrong shows among
its failures. Neighbour: `loadtest.control`, which does so once a second.
"""

import time
from collections.abc import Mapping

from locust.stats import RequestStats, StatsEntry, StatsError, bucket_response_time

from loadtest.histogram import value


def requests(stats: RequestStats, method: str, name: str, counts: Mapping[int, int]) -> None:
    """Add requests: a histogram's counts (`loadtest.histogram`) of how long they took."""
    if not counts:
        return
    now = time.time()
    entry = StatsEntry(stats, name, method)
    entry.start_time = entry.last_request_timestamp = now
    times: dict[float, int] = {value(bucket): count for bucket, count in counts.items()}
    entry.num_requests = sum(counts.values())
    entry.total_response_time = round(sum(milliseconds * count for milliseconds, count in times.items()))
    entry.min_response_time, entry.max_response_time = min(times), max(times)  # type: ignore[assignment]
    for milliseconds, count in times.items():
        entry.response_times[bucket_response_time(milliseconds)] += count
    entry.num_reqs_per_sec[int(now)] = entry.num_requests
    for known in (stats.entries[name, method], stats.total):
        known.extend(entry)


def failures(stats: RequestStats, method: str, name: str, what: str, count: int) -> None:
    """Add failures of one kind."""
    second = int(time.time())
    for entry in (stats.entries[name, method], stats.total):
        entry.num_failures += count
        entry.num_fail_per_sec[second] += count
    key = StatsError.create_key(method, name, what)
    error = stats.errors.get(key)
    if error is None:
        error = stats.errors[key] = StatsError(method, name, what)
    error.occurred()
    error.occurrences += count - 1
