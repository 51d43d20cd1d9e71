"""Publishing: one message, or a batch of lines."""

from collections.abc import Iterator
from typing import Any

import msgspec
from bottle import HTTPResponse

from comet.errors import Refusal
from comet.message import DEFAULT_TYPE, Publication, Receipt, check_channel, check_type
from comet.settings import BATCH_ANSWER
from comet.turn import give_way
from handlers.params import Context, answer, answer_bytes, body, check_key, encode, hold, idempotency_key, query, text_body

SLICE = 200
"""Lines of a batch that are published before other greenlets have a turn."""

SLICE_BYTES = 256 << 10
"""Bytes of them, or a line more: a millisecond, or two where a message is mostly escapes."""

MAX_LINES = 50_000
"""Lines of a batch: a bad one of a byte is answered with a hundred."""


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a batch."""

    channel: str
    data: str
    type: str = DEFAULT_TYPE
    key: str | None = None


_decode = msgspec.json.Decoder(Line).decode


def one(context: Context, channel: str) -> HTTPResponse:
    """POST /publish/<channel>: the body is the message; ``?type=`` its type."""
    check_channel(channel)
    kind = check_type(query().get("type", DEFAULT_TYPE))
    key = idempotency_key()
    data = text_body(context.settings.max_body)
    (result,) = context.hub.publish([Publication(channel, data, kind, key)])
    if isinstance(result, Refusal):
        raise result
    return answer(_document(result), 201)


def batch(context: Context) -> HTTPResponse:
    """POST /publish: NDJSON, a publication a line, published in order; a result a line.

    A bad line fails alone; the others are published. If nothing can be published any more in the middle of a batch, each line from there on
    has the refusal as its result: those before it are published, so the batch is not refused as a whole.
    """
    data = body(context.settings.max_batch)
    lines = data.split(b"\n", MAX_LINES + 1)  # of eight million the list alone would be 64 MB
    if not lines[-1]:
        lines.pop()
    if len(lines) > MAX_LINES:
        raise Refusal("body-too-large", f"A batch has at most {MAX_LINES} lines; send several.")
    hold(len(data) + len(lines) * BATCH_ANSWER // MAX_LINES)  # until the client has taken the answer
    del data
    results: list[bytes] = []
    failed: Refusal | None = None
    for those in _slices(lines):
        if results:
            give_way()
        if failed is None:
            try:
                results.append(b"".join(_publish(context, those)))
                continue
            except Refusal as refusal:
                if not results:
                    raise
                failed = refusal
        results.append(encode(failed.document()) * len(those))
        context.stats.refused[failed.slug] += len(those)
    return answer_bytes(b"".join(results), content_type="application/x-ndjson")


def _slices(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines in order, as many as are published at once."""
    start = size = 0
    for index, line in enumerate(lines):
        if index - start == SLICE or size > SLICE_BYTES:
            yield lines[start:index]
            start, size = index, 0
        size += len(line)
    yield lines[start:]


def _publish(context: Context, lines: list[bytes]) -> list[bytes]:
    read = [_read(line, context.settings.max_body) for line in lines]
    answers = iter(context.hub.publish([one for one in read if isinstance(one, Publication)]))
    results = []
    for one in read:
        result = one if isinstance(one, Refusal) else next(answers)
        if isinstance(result, Refusal):
            context.stats.refused[result.slug] += 1
        results.append(encode(_document(result)))
    return results


def _read(line: bytes, max_body: int) -> Publication | Refusal:
    try:
        parsed = _decode(line)
        data = parsed.data.encode()
        if len(data) > max_body:
            raise Refusal("body-too-large", f"A message has at most {max_body} bytes; send less, or in parts.")
        return Publication(
            check_channel(parsed.channel), data, check_type(parsed.type), None if parsed.key is None else check_key(parsed.key)
        )
    except Refusal as refusal:
        return refusal
    except (msgspec.DecodeError, UnicodeError) as error:
        return Refusal("bad-line", f"A line is an object with channel, data, and perhaps type and key: {error}.")


def _document(result: Receipt | Refusal) -> dict[str, Any]:
    if isinstance(result, Refusal):
        return result.document()
    return {"id": str(result.position), "subscribers": result.subscribers}
