"""The endpoints of metabrew's "A million-user comet application" (2008): a feed and a router:send.

A user's feed is the channel ``user:<id>``; that is all these two know that the others don't.
"""

from typing import Any

from comet.framing import TEXT
from comet.message import DEFAULT_TYPE, USER_PREFIX, check_channel
from comet.subscriber import Wish
from handlers.params import Asked, Context


def test(context: Context, asked: Asked, user: str) -> Wish:
    """GET /test/<id>: a welcome, then a line and a chunk a message, for as long as the client stays.

    The same id may be logged in any number of times.
    """
    return Wish((check_channel(USER_PREFIX + user),), (None,), TEXT, patience=None)


def send(context: Context, asked: Asked, user: str) -> dict[str, Any]:
    """POST /send/<id>: a message to the user and to everyone who follows the user. That nobody of them is logged
    in is no error."""
    own = check_channel(USER_PREFIX + user)
    followers = context.subscriptions.joined_subscribers(user)
    targets = f"{own},{USER_PREFIX}{followers.replace(',', ',' + USER_PREFIX)}" if followers else own
    sent = context.hub.send(targets, DEFAULT_TYPE, asked.text(context.settings.max_body), asked.key)
    return {"id": None if sent.position is None else str(sent.position), "targets": sent.targets, "delivered": sent.delivered}
