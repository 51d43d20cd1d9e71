"""A long poll with aiohttp. What it does when something fails is this program's own: it waits and asks again, with the same cursor."""

import asyncio
import json
import sys

import aiohttp


def say(**line):
    print(json.dumps(line), flush=True)


async def main(url, cursor=None):
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url, params={"since": cursor, "timeout": 10} if cursor else {"timeout": 0}) as response:
                    if response.status != 200:
                        say(event="refused", status=response.status, data=await response.text())
                        await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
                        continue
                    answer = await response.json()
            except aiohttp.ClientError as error:
                say(event="error", error=repr(error))
                await asyncio.sleep(0.5)
                continue
            if cursor is None:
                say(event="open")
            if answer["gap"]:
                say(event="gap", id=answer["cursor"])
            for message in answer["messages"]:
                say(event="message", id=message["id"], data=message["data"])
            cursor = answer["cursor"]


asyncio.run(main(*sys.argv[1:]))
