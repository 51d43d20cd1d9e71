"""Who follows whom: lists, one at a time, and in bulk.

Neighbour: `comet.subscriptions`, the database. Whoever is followed is heard by `POST /send/<id>`
(`handlers.metabrew`), which looks the followers up at that moment: so a change is in force at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from bottle import HTTPResponse

from comet.errors import Refusal
from comet.message import USER_PREFIX, check_channel
from comet.turn import give_way
from handlers.params import Asked, Context, answer, hold, number, pieces

DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
"""Ids in one page."""

PIECE = 16384
"""Bytes of a bulk body that are read at once."""

SLICE = 500
"""Lines of it before other greenlets have a turn: a millisecond or two, since a bad one takes as long as a good one, and may be empty."""

MAX_LINE = 512
"""Bytes: two ids and what may stand around them."""

TRANSACTION = 10_000
"""Lines that are stored together."""

ROW = 250
"""Bytes that a row takes until it is stored, beside twice its line: two strings, a tuple, and the text that the database is given."""

MAX_TOLD = 100
"""Bad lines that the answer describes; the rest are counted."""


def followers(context: Context, user: str) -> HTTPResponse:
    """GET /users/<id>/followers: in order, numbers before text; ``?limit=`` of them behind the id ``?after=``."""
    known = context.subscriptions
    return _page("followers", user, known.page_of_subscribers, known.count_subscribers)


def following(context: Context, user: str) -> HTTPResponse:
    """GET /users/<id>/following: as `followers`."""
    known = context.subscriptions
    return _page("following", user, known.page_of_following, known.count_following)


def follow(context: Context, user: str, other: str) -> HTTPResponse:
    """PUT /users/<id>/following/<other>: the user follows the other from now on."""
    changed = context.subscriptions.add_subscriptions([_pair(user, other)])
    return answer({"follower": user, "followee": other, "following": True, "changed": bool(changed)})


def unfollow(context: Context, user: str, other: str) -> HTTPResponse:
    """DELETE /users/<id>/following/<other>: the user follows the other no more."""
    changed = context.subscriptions.remove_subscriptions([_pair(user, other)])
    return answer({"follower": user, "followee": other, "following": False, "changed": bool(changed)})


def load(context: Context) -> HTTPResponse:
    """POST /follows: lines ``follower followee``, as many as there are. A bad line is named, and the others are
    stored. Rows are stored in order, so after a refusal a first part of them is there; sending all again does
    no harm."""
    rows: list[tuple[str, str]] = []
    told: list[dict[str, Any]] = []
    good = bad = added = size = 0
    for lines in _lines():
        for at, line in enumerate(lines, good + bad + 1):
            try:
                rows.append(_read(line))
                good += 1
                size += ROW + 2 * len(line)
            except Refusal as refusal:
                bad += 1
                context.stats.refused[refusal.slug] += 1
                if len(told) < MAX_TOLD:
                    told.append({"line": at, **refusal.document()})
                continue
            if len(rows) == TRANSACTION:
                added += context.subscriptions.add_subscriptions(rows)
                rows, size = [], 0
        hold(size)
        give_way()
    added += context.subscriptions.add_subscriptions(rows)
    return answer({"added": added, "present": good - added, "bad": bad, "errors": told})


def _page(name: str, user: str, page: Callable[[str, str | None, int], list[str]], total: Callable[[str], int]) -> HTTPResponse:
    """`next` is the `after` of the next page, null at the end. Only the first page counts them all."""
    _check(user)
    asked = Asked.now()
    limit = int(number(asked, "limit", DEFAULT_LIMIT, MAX_LIMIT, least=1))  # a page of none would have no next
    after = asked.query.get("after")
    ids = page(user, None if after is None else _check(after), limit + 1)
    document: dict[str, Any] = {"user": user, name: ids[:limit], "next": ids[limit - 1] if len(ids) > limit else None}
    if after is None:
        document["count"] = total(user) if len(ids) > limit else len(ids)
    return answer(document)


def _lines() -> Iterator[list[bytes]]:
    """Yield the lines of the body, at most `SLICE` at a time, and of each piece at least once: perhaps none. One that is far too long is
    cut: it is bad anyhow."""
    rest = b""
    for piece in pieces(PIECE):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > 2 * MAX_LINE:
            rest = rest[: MAX_LINE + 1]
        for start in range(0, len(lines) or 1, SLICE):
            yield lines[start : start + SLICE]
    if rest:
        yield [rest]


def _read(line: bytes) -> tuple[str, str]:
    words = line.split() if len(line) <= MAX_LINE and line.isascii() else ()
    if len(words) != 2:
        raise Refusal("bad-line", "A line is two ids, follower and followee, with a space between.")
    return _pair(words[0].decode(), words[1].decode())


def _pair(follower: str, followee: str) -> tuple[str, str]:
    """Raises Refusal ``bad-channel`` and ``bad-follow``."""
    if _check(follower) == _check(followee):
        raise Refusal("bad-follow", f"{follower} can't follow itself: what is sent to it reaches it anyhow.")
    return follower, followee


def _check(user: str) -> str:
    """The id itself. Raises Refusal ``bad-channel`` where its feed can't be a channel."""
    check_channel(USER_PREFIX + user)
    return user
