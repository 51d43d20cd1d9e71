"""Counters of this process. A leaf; whoever does a thing counts it here, and `/stats` prints them."""

from collections import Counter, deque
from typing import Any

RATE_OVER = 5
"""Seconds that a rate is taken over."""


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
        self.malformed = 0
        """Things in Redis that could not be read (`comet.backplane.redis_malformed`), each time that one was met."""
        self.errors = 0
        """Exceptions that nobody expected: each has a traceback in the log."""

        self.messages_a_second = 0.0
        self.deliveries_a_second = 0.0
        """Of `published` and `offered`, over the last `RATE_OVER` seconds."""
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=RATE_OVER + 1)

    def sample(self, now: float) -> None:
        """Take note of where the counters stand, about once a second; `now` in seconds."""
        samples = self._samples
        samples.append((now, self.published, self.offered))
        then, published, offered = samples[0]
        if now > then:
            self.messages_a_second = round((self.published - published) / (now - then), 1)
            self.deliveries_a_second = round((self.offered - offered) / (now - then), 1)

    def document(self) -> dict[str, Any]:
        """The JSON object of these counters."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
