"""What a client makes of the part of a stream that has reached it: messages, gaps, and the cursor that it resumes with.

For tests that break a connection after any byte. `events` reads server-sent events, either to the letter of the WHATWG HTML
standard or as simpler clients do, which remember an ``id:`` as they read its line; `lines` reads NDJSON.
"""

import json
from typing import NamedTuple


class Read(NamedTuple):
    """Ids of the messages that were read, in order, how many gaps were told, and the cursor; None if there is none yet."""

    ids: list[str]
    gaps: int
    cursor: str | None


def events(body: bytes, *, eager: bool) -> Read:
    """Read server-sent events. An `eager` reader takes an ``id:`` over at the end of its line, not of its block."""
    ids: list[str] = []
    gaps = 0
    cursor = pending = None
    kind = data = ""
    has_data = False
    for line in body.decode(errors="replace").split("\n")[:-1]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            pending = value
            cursor = value if eager else cursor
        elif name == "event":
            kind = value
        elif name == "data":
            data, has_data = value, True
        elif not line:
            cursor = cursor if pending is None else pending
            if has_data and kind == "gap":
                assert json.loads(data)["cursor"] == cursor
                gaps += 1
            elif has_data:
                assert pending is not None, "a message without a cursor"
                ids.append(pending)
            pending, kind, data, has_data = None, "", "", False
    return Read(ids, gaps, cursor)


def lines(body: bytes, start: str | None) -> Read:
    """Read NDJSON; `start` is the cursor of the header Comet-Cursor."""
    ids: list[str] = []
    gaps, cursor = 0, start
    for line in filter(None, body.split(b"\n")[:-1]):
        document = json.loads(line)
        cursor = document.get("cursor", document.get("id"))
        if document.get("gap"):
            gaps += 1
        else:
            ids.append(cursor)
    return Read(ids, gaps, cursor)
