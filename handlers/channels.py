"""Looking at a channel, reading its history, deleting it."""

from bottle import HTTPResponse

from comet.errors import Refusal
from comet.framing import batch_json
from comet.message import OLDEST, ChannelInfo, check_channel
from handlers.params import Asked, Context, answer, answer_bytes, number, since

DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
"""Messages in one answer of history."""


def show(context: Context, channel: str) -> HTTPResponse:
    """GET /channels/<channel>."""
    return _answer(channel, context.hub.info(check_channel(channel)))


def delete(context: Context, channel: str) -> HTTPResponse:
    """DELETE /channels/<channel>: its log goes and its subscribers are ended; the answer is what there
    was. Who resumes with a cursor of it is told a gap."""
    return _answer(channel, context.hub.delete(check_channel(channel)))


def history(context: Context, channel: str) -> HTTPResponse:
    """GET /channels/<channel>/history: what is kept after ``?since=`` (the oldest by default), a page of at most
    ``?limit=`` messages; its cursor is where the next page, or a subscription, goes on."""
    check_channel(channel)
    asked = Asked.now()
    limit = int(number(asked, "limit", DEFAULT_LIMIT, MAX_LIMIT))
    (start,) = since(asked, [channel])
    joined = context.hub.read(channel, OLDEST if start is None else start, limit)
    if joined is None:
        raise _unknown(channel)
    return answer_bytes(batch_json(str(joined.end), joined.gap, joined.messages) + b"\n")


def _answer(channel: str, info: ChannelInfo | None) -> HTTPResponse:
    if info is None:
        raise _unknown(channel)
    subscribers, position, messages = info
    return answer({"channel": channel, "subscribers": subscribers, "position": str(position), "messages": messages})


def _unknown(channel: str) -> Refusal:
    return Refusal("no-channel", f"Nobody has used the channel {channel} lately; publish to it or subscribe to it first.")
