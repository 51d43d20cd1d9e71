"""sseclient-py with requests, as its README has it. It does not reconnect."""

import json
import sys

import requests
import sseclient

url, last = sys.argv[1], sys.argv[2:]


def say(**line):
    print(json.dumps(line), flush=True)


def with_requests(url, headers):
    """Get a streaming response for the given event feed using requests."""
    res = requests.get(url, stream=True, headers=headers)
    yield from sseclient.SSEClient(res).events()


try:
    for event in with_requests(url, {"Accept": "text/event-stream", **({"Last-Event-ID": last[0]} if last else {})}):
        if event.event in ("message", "gap"):
            say(event=event.event, id=event.id, data=event.data)
        else:
            say(event="other", name=event.event, id=event.id, data=event.data)
    say(event="end")
except Exception as error:
    say(event="error", error=repr(error))
    raise
