"""Part of make bench: metabrew's friends. The data set, its look-ups, and `POST /send` to all followers.

The data set is the whole one, a million users who follow 15 each, made and loaded by the commands that
README names, into a folder that is removed afterwards. Deliveries are counted where they arrive, and their
cost is the CPU time of all processes of the service, the kernel's part of their system calls included.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.process import ROOT, Worker, cpu, descendants, worker
from loadtest.service import SETTLE, Figure, Service, comet

USERS, EACH = 1_000_000, 15
WORKERS = 2
UNDER_WAY = 32
"""Requests at a time: a sender that is alone would measure how processes wake each other."""
MISFITS = 20
"""Users whose followers find no room any more, after which there is none."""


def friends(clients: int, rounds: int) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="friends-") as name:
        folder = Path(name)
        figures = _data(folder)
        with worker("loadtest.lookups", name) as lookups:
            star = lookups.ask(do="star")
            figures += _lookups(lookups, star["user"])
        flags = ("--workers", str(WORKERS), "--data", name)
        with (
            comet(*flags) as service,
            worker("loadtest.publisher", str(service.port)) as sender,
            worker("loadtest.generator", str(service.port)) as load,
        ):
            away = _away(service, sender, star["user"], star["followers"])
            return [*figures, _connected(service, sender, load, clients, rounds), away]


def _data(folder: Path) -> list[Figure]:
    edges = folder / "friends.txt"
    made, _ = _run("loadtest", "friends", "--users", str(USERS), "--each", str(EACH), "--out", str(edges))
    loaded, peak = _run("comet", "load-friends", str(edges), "--data", str(folder))
    edges.unlink()
    size = sum(path.stat().st_size for path in folder.iterdir())
    note = f"{USERS:,} users who follow {EACH} each: made in {made:.1f} s, loaded in {loaded:.1f} s"
    return [
        Figure("friends: the data set made and loaded", made + loaded, "s", 120, 46, low=True, beside=note),
        Figure("friends: the file", size / 1e6, "MB", 400, low=True),
        Figure("friends: peak memory of the load", peak / 1e6, "MB", 1500, low=True),
    ]


def _run(*arguments: str) -> tuple[float, int]:
    """Seconds that a module of ours runs, and its peak memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with status {process.returncode}")
    return time.monotonic() - began, used.ru_maxrss * 1024


def _lookups(lookups: Worker, star: str) -> list[Figure]:
    took = lookups.ask(do="random", users=USERS, times=100_000)
    held = lookups.ask(do="holds", users=USERS, times=20_000, star=star, stars=200)
    note = f"{held['clock'] * 1000:.2f} ms with waits for a CPU that others had"
    return [
        Figure("friends: followers of a random user, p50", took["p50"] * 1e6, "us", 30, low=True),
        Figure("friends: followers of a random user, p99", took["p99"] * 1e6, "us", 200, low=True),
        Figure("friends: longest hold of the loop by a look-up", held["held"] * 1000, "ms", 5, low=True, beside=note),
    ]


def _away(service: Service, sender: Worker, star: str, followers: int, times: int = 500) -> Figure:
    """What a follower costs who is not connected: sending from the user with the most, against one whom
    nobody follows."""
    spent = {}
    for user, targets in (("nobody", 1), (star, followers + 1)):
        for count in (50, times):  # the first time is not counted
            before = _spent(service)
            sent = sender.ask(do="send", users=[user] * count, connections=UNDER_WAY)
            spent[user] = (_spent(service) - before) / count
            assert (sent["targets"], sent["delivered"]) == (targets * count, 0), sent
    note = f"{followers:,} followers: {spent[star] * 1e6:,.0f} us a send; none: {spent['nobody'] * 1e6:,.0f} us"
    each = (spent[star] - spent["nobody"]) / followers
    return Figure("friends: CPU a follower who is not connected", each * 1e6, "us", 1, low=True, beside=note)


def _connected(service: Service, sender: Worker, load: Worker, clients: int, rounds: int) -> Figure:
    """Deliveries a CPU second, from random users all of whose followers are connected. The users themselves
    are not, unless they follow one of the others."""
    users, present, total = _audience(service, clients)
    load.ask(do="open", count=clients, path="/test/{i}", first="elcomes", ids=present)
    time.sleep(SETTLE)
    spent = seconds = sending = reading = 0.0
    for number in range(1 + rounds):
        load.tell(do="count", total=total)
        before, began = _spent(service), time.monotonic()
        sent = sender.ask(do="send", users=users, connections=UNDER_WAY)
        assert sent["delivered"] == total, sent
        arrived = load.answer()
        if number:  # the first makes each client's history, which is there from then on
            spent += _spent(service) - before
            seconds += arrived["at"] - began
            sending += sent["cpu"]
            reading += arrived["cpu"]
    sends = len(users) * rounds
    note = (
        f"{len(users):,} users, {total / len(users):.1f} deliveries a send; {spent / sends * 1e6:,.0f} us of CPU a send; "
        f"{total * rounds / seconds:,.0f}/s; load {reading / seconds:.2f}, sender {sending / seconds:.2f}"
    )
    return Figure("friends: deliveries a CPU second, all processes", total * rounds / spent, "/s", 40_000, 80_000, beside=note)


def _audience(service: Service, clients: int) -> tuple[Sequence[str], Sequence[str], int]:
    """Random users; the followers of all of them and some others, so many as there are `clients`; and the
    deliveries that a message from each of the users makes."""
    numbers = random.Random(1)
    users: dict[str, int] = {}
    present: dict[str, None] = {}
    misfits = 0
    while len(present) < clients and misfits < MISFITS:
        user = str(numbers.randrange(USERS))
        followers = _followers(service, user)
        if len({*present, *followers}) > clients:
            misfits += 1
        else:
            users[user] = len(followers)
            present.update(dict.fromkeys(followers))
    while len(present) < clients:
        present[str(numbers.randrange(USERS))] = None
    return list(users), list(present), sum(users.values()) + len(users.keys() & present.keys())


def _followers(service: Service, user: str) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        page = service.request("GET", f"/users/{user}/followers?limit=1000{after}")
        found += page["followers"]
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


def _spent(service: Service) -> float:
    return sum(map(cpu, descendants(service.pid)))
