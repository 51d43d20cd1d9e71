"""Counters of this process. A leaf; whoever does a thing counts it here, and `/stats` prints them."""

from collections import Counter
from typing import Any


class Stats:
    """Plain integers, since everything runs on one thread. All count up from the start but `clients`,
    the open subscribers by endpoint, and `connections`, the open connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.accepted = 0
        self.requests = 0
        self.published = 0
        """Publications that were acknowledged, a repeat under an idempotency key included."""
        self.offered = 0
        """Messages times the subscribers they were offered to."""
        self.clients: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        """Subscribers by the reason they ended (`comet.errors.CLOSINGS`)."""
        self.refused: Counter[str] = Counter()
        """Refusals by slug (`comet.errors.STATUS`)."""
        self.gc_longest_seconds = 0.0
        """The longest that the garbage collector held everything up."""
        self.gc_full_collections = 0
        """Collections of the oldest generation."""
        self.errors = 0
        """Exceptions that nobody expected: each has a traceback in the log."""

    def document(self) -> dict[str, Any]:
        """The JSON object of these counters."""
        return vars(self)
