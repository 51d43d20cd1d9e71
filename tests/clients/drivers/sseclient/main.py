"""sseclient, as its README has it. It reconnects by itself where that works at the first try."""

import json
import sys

from sseclient import SSEClient

url, last = sys.argv[1], sys.argv[2:]
output, sys.stdout = sys.stdout, sys.stderr  # it prints why it reconnects


def say(**line):
    print(json.dumps(line), file=output, flush=True)


try:
    messages = SSEClient(url, last_id=last[0] if last else None)
    for msg in messages:
        if msg.event in ("message", "gap"):
            say(event=msg.event, id=msg.id, data=msg.data)
        else:
            say(event="other", name=msg.event, id=msg.id, data=msg.data)
except Exception as error:
    say(event="error", error=repr(error))
    raise
