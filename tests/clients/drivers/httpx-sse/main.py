"""httpx-sse, as the quickstart of its README has it. It does not reconnect."""

import json
import sys

import httpx
from httpx_sse import connect_sse

url, last = sys.argv[1], sys.argv[2:]


def say(**line):
    print(json.dumps(line), flush=True)


headers = {"Last-Event-ID": last[0]} if last else {}
try:
    with httpx.Client() as client, connect_sse(client, "GET", url, headers=headers) as event_source:
        for sse in event_source.iter_sse():
            if sse.event in ("message", "gap"):
                say(event=sse.event, id=sse.id, data=sse.data)
            else:
                say(event="other", name=sse.event, id=sse.id, data=sse.data)
    say(event="end")
except Exception as error:
    say(event="error", error=repr(error))
    raise
