"""Latencies as counts: a list of buckets, three per cent wide, that is added to by index and merged by adding.

Pure. A delivery costs two shifts and an addition; a million of them are as large as one. Neighbours: `loadtest.swarm`,
which counts, and `loadtest.tally`, which makes Locust's statistics of the counts.
"""

from collections.abc import Mapping, Sequence

BITS = 5
"""A bucket is 1/32 of its value wide."""

SIZE = 32 << BITS
"""Buckets: up to 2^36 microseconds, 19 hours."""


def index(microseconds: int) -> int:
    """The bucket of a latency. Negative ones (clocks of two machines) count as none."""
    if microseconds < 64:
        return max(0, microseconds)
    shift = microseconds.bit_length() - BITS - 1
    return min(SIZE - 1, (shift << BITS) + (microseconds >> shift))


def value(bucket: int) -> float:
    """The middle of a bucket, in milliseconds."""
    if bucket < 64:
        return bucket / 1000
    shift = (bucket >> BITS) - 1
    low = (bucket - (shift << BITS)) << shift
    return (low + (1 << shift) / 2) / 1000


class Histogram:
    """`buckets` may be added to from outside: whoever is in a hurry does."""

    __slots__ = ("buckets",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.buckets = [0] * SIZE
        if counts:
            self.merge(counts)

    def add(self, microseconds: int) -> None:
        """Count one."""
        self.buckets[index(microseconds)] += 1

    def merge(self, counts: Mapping[int, int]) -> None:
        """Add what another has counted (`take`, `counts`)."""
        for bucket, count in counts.items():
            self.buckets[bucket] += count

    def counts(self) -> dict[int, int]:
        """Bucket to count, without the empty ones."""
        return {bucket: count for bucket, count in enumerate(self.buckets) if count}

    def take(self) -> dict[int, int]:
        """As `counts`; begins anew."""
        counts = self.counts()
        for bucket in counts:
            self.buckets[bucket] = 0
        return counts

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.buckets)

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """Milliseconds below which each share (0 to 1, ascending) of all are; 0 where nothing was counted. 1 is the most."""
        counts = self.counts()
        wanted = [share * sum(counts.values()) for share in shares]
        found: list[float] = []
        seen = 0
        for bucket, count in counts.items():
            seen += count
            while len(found) < len(wanted) and seen >= wanted[len(found)]:
                found.append(value(bucket))
        return found or [0.0] * len(shares)

    def summary(self) -> dict[str, float]:
        """What reports say of it, in milliseconds."""
        p50, p99, p999, most = self.percentiles([0.5, 0.99, 0.999, 1.0])
        return {"count": self.total, "p50": p50, "p99": p99, "p99.9": p999, "max": most}
