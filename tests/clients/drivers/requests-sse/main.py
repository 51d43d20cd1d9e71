"""requests-sse, as its README has it: it reconnects by itself, unless an exception ends it."""

import json
import sys

import requests
from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError

url, last = sys.argv[1], sys.argv[2:]


def say(**line):
    print(json.dumps(line), flush=True)


try:
    with EventSource(
        url,
        timeout=30,
        latest_event_id=last[0] if last else None,
        on_open=lambda: say(event="open"),
        on_error=lambda: say(event="error"),
    ) as event_source:
        for event in event_source:
            if event.type in ("message", "gap"):
                say(event=event.type, id=event.last_event_id, data=event.data)
            else:
                say(event="other", name=event.type, id=event.last_event_id, data=event.data)
except InvalidStatusCodeError as error:
    say(event="refused", status=error.status_code)
    raise
except (InvalidContentTypeError, requests.RequestException) as error:
    say(event="error", error=repr(error))
    raise
