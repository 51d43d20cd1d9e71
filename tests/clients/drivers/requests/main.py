"""A long poll with requests. What it does when something fails is this program's own: it waits and asks again, with the same cursor."""

import json
import sys
import time

import requests

url, last = sys.argv[1], sys.argv[2:]


def say(**line):
    print(json.dumps(line), flush=True)


cursor = last[0] if last else None
with requests.Session() as session:
    while True:
        try:
            response = session.get(url, params={"since": cursor, "timeout": 10} if cursor else {"timeout": 0}, timeout=30)
        except requests.RequestException as error:
            say(event="error", error=repr(error))
            time.sleep(0.5)
            continue
        if response.status_code != 200:
            say(event="refused", status=response.status_code, data=response.text)
            time.sleep(float(response.headers.get("Retry-After", 1)))
            continue
        answer = response.json()
        if cursor is None:
            say(event="open")
        if answer["gap"]:
            say(event="gap", id=answer["cursor"])
        for message in answer["messages"]:
            say(event="message", id=message["id"], data=message["data"])
        cursor = answer["cursor"]
