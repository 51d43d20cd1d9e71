"""Refusals: every reason comet has to turn a request down, in one table.

A leaf: the request parser, the handlers and the backplanes all raise `Refusal`; `handlers.params`
and `comet.server.connection` send it as `comet.refusals` makes it, mostly JSON, ``{"error": slug, "detail": sentence}``, and
count it under its slug. README lists the same table; tests/test_errors.py holds the two together.
"""

STATUS: dict[str, int] = {
    # what was asked for is not there, or not like that
    "not-found": 404,
    "no-channel": 404,
    "method-not-allowed": 405,
    "method-unknown": 501,
    # what was sent is not well-formed
    "bad-request": 400,
    "bad-host": 400,
    "bad-length": 400,
    "bad-encoding": 400,
    "bad-path": 400,
    "bad-body": 400,
    "bad-channel": 400,
    "bad-type": 400,
    "bad-cursor": 400,
    "bad-key": 400,
    "bad-parameter": 400,
    "bad-line": 400,
    "bad-follow": 400,
    "bad-content-encoding": 415,
    "bad-expectation": 417,
    "http-version": 505,
    # who may
    "unauthorized": 401,
    "origin-refused": 403,
    "host-refused": 421,
    # limits
    "header-timeout": 408,
    "body-timeout": 408,
    "body-too-large": 413,
    "header-too-large": 431,
    "key-conflict": 409,
    "address-full": 429,
    "new-channels": 429,
    "worker-full": 503,
    "bodies-full": 503,
    "draining": 503,
    "backplane-away": 503,
    "backplane-busy": 503,
    "backplane-full": 503,
    "unconfirmed": 503,
    "database-away": 503,
    "database-busy": 503,
    "disk-full": 507,
    # ours
    "internal": 500,
}
"""Slug -> HTTP status."""


HEADERS: dict[str, dict[str, str]] = {
    "bad-content-encoding": {"Accept-Encoding": "identity"},
    "unauthorized": {"WWW-Authenticate": "Bearer"},
    "address-full": {"Retry-After": "5"},
    "new-channels": {"Retry-After": "30"},
    "worker-full": {"Retry-After": "5"},
    "bodies-full": {"Retry-After": "1"},
    "draining": {"Retry-After": "1"},
    "backplane-away": {"Retry-After": "1"},
    "backplane-busy": {"Retry-After": "1"},
    "backplane-full": {"Retry-After": "5"},
    "unconfirmed": {"Retry-After": "1"},
    "database-away": {"Retry-After": "5"},
    "database-busy": {"Retry-After": "5"},
}
"""Slug -> headers that go with the answer. Retry-After is in seconds; a refusal that has it will pass."""


class Refusal(Exception):
    """A request, or one line of a batch, is turned down.

    `slug` is a key of `STATUS`; `detail` is one sentence for a person: what is wrong and what to do.
    """

    def __init__(self, slug: str, detail: str) -> None:
        super().__init__(slug, detail)
        self.slug = slug
        self.detail = detail

    @property
    def status(self) -> int:
        """The HTTP status that goes with the slug."""
        return STATUS[self.slug]

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the answer carries beside its content type."""
        return HEADERS.get(self.slug, {})

    def document(self) -> dict[str, str]:
        """The JSON object a client reads."""
        return {"error": self.slug, "detail": self.detail}


CLOSINGS: dict[str, str] = {
    "answered": "A long poll got its answer: messages, or an empty one when its time was up.",
    "hang-up": "The client closed its connection, or its sending side, while it waited.",
    "chatty": "The client sent 64 KiB or more behind the request of a stream, where nothing more is read.",
    "lost": "The connection broke while something was written to it.",
    "backlog-bytes": "More messages waited for the client than --backlog allows, or --busy-backlog, for a minute, if it keeps taking.",
    "backlog-time": "The client took nothing for --send-timeout.",
    "unreadable": "Messages that this process missed could not be read from history.",
    "deleted": "The channel was deleted.",
    "shutdown": "The server stopped.",
}
"""Why a subscriber ended, and what that means. Counted in /stats under `closed`."""
