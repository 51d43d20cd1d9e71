"""What all clients should have got, beside what each got: the last word on lost and doubled.

Who was sent what is known twice: from the senders' records and the friends' edge list, which is *due* and is what counts; and
from the server's answers (`delivered`), which the verdict shows beside it. Pure, but for reading the edge list. Needs numpy: a
million clients with fifteen friends each are fifteen million additions. Neighbours: `loadtest.counting`, whose records
these are; `loadtest.control`, which asks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.counting import SENT, UNSURE, Send
from loadtest.verify import DIRECT, EVERYONE

Numbers = NDArray[np.uint64]

AT_ONCE = 2_000_000
"""Numbers of the edge list that are in memory at a time."""


def edges(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Followers and followees of an edge list, a line `follower followee`, in parts."""
    with path.open("rb") as file:
        while len(part := np.fromfile(file, np.int64, AT_ONCE, sep=" ")):
            yield part[::2], part[1::2]


def audit(
    friends: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
    clients: int,
    sends: Iterable[Send],
    accounts: Sequence[Mapping[str, bytes]],
    own: Sequence[bool] = (True,),
    shared: Sequence[bool] = (False,),
    complete: bool = True,
) -> dict[str, Any]:
    """The verdict. `accounts` are those of the processes (`Counts.account`). User u's client has a feed of its own where
    `own[u % len(own)]`, and is on the channel of all where `shared` says so. Not `complete`, when clients came while
    messages were sent already: then only the sums are compared, with what the server said that it delivered."""
    counted, summed, unsure = (np.zeros(clients, np.uint64) for _ in range(3))
    alone, alone_sum, alone_unsure = (np.zeros(clients, np.uint64) for _ in range(3))
    all_counted = all_summed = all_unsure = 0
    outcomes = {"sent": 0, "refused": 0, "unsure": 0, "targets": 0, "delivered": 0}
    for one in sends:
        if one.outcome == SENT:
            outcomes["sent"] += 1
            outcomes["targets"] += one.targets
            outcomes["delivered"] += one.delivered
        elif one.outcome == UNSURE:
            outcomes["unsure"] += 1
        else:
            outcomes["refused"] += 1
            continue
        sure = one.outcome == SENT
        if one.kind == EVERYONE:
            all_counted, all_summed, all_unsure = all_counted + sure, all_summed + sure * one.number, all_unsure + (not sure)
            continue
        at, number = one.user, np.uint64(one.number)
        count, total, doubt = (alone, alone_sum, alone_unsure) if one.kind == DIRECT else (counted, summed, unsure)
        count[at] += np.uint64(sure)
        total[at] += number * np.uint64(sure)
        doubt[at] += np.uint64(not sure)
    due, due_sum, doubtful = counted + alone, summed + alone_sum, unsure + alone_unsure
    for followers, followees in friends:
        here = (followers < clients) & (followees < clients)
        follower, followee = followers[here], followees[here]
        np.add.at(due, follower, counted[followee])
        np.add.at(due_sum, follower, summed[followee])
        np.add.at(doubtful, follower, unsure[followee])
    turns = np.arange(clients)
    with_feed, with_all = (np.array(list(mask), np.uint64)[turns % len(mask)] for mask in (own, shared))
    due = due * with_feed + np.uint64(all_counted) * with_all
    due_sum = due_sum * with_feed + np.uint64(all_summed) * with_all
    doubtful = doubtful * with_feed + np.uint64(all_unsure) * with_all

    got, got_sum, logins = (np.zeros(clients, np.uint64) for _ in range(3))
    for account in accounts:
        ids = np.frombuffer(account["ids"], np.uint64).astype(np.int64)
        np.add.at(got, ids, np.frombuffer(account["counts"], np.uint64))
        np.add.at(got_sum, ids, np.frombuffer(account["sums"], np.uint64))
        np.add.at(logins, ids, np.uint64(1))
    due, due_sum, doubtful = due * logins, due_sum * logins, doubtful * logins
    received = int(got.sum())
    verdict: dict[str, Any] = {**outcomes, "clients": int(logins.sum()), "received": received, "complete": complete}
    if not complete:
        missing = outcomes["delivered"] - received
        return verdict | {"due": outcomes["delivered"], "lost": max(0, missing), "doubled": max(0, -missing), "other": 0, "short": 0}
    lost = np.where(due > got, due - got, np.uint64(0))
    doubled = np.where(got > due + doubtful, got - due - doubtful, np.uint64(0))
    other = (got == due) & (doubtful == 0) & (got_sum != due_sum)
    return verdict | {
        "due": int(due.sum()),
        "lost": int(lost.sum()),
        "doubled": int(doubled.sum()),
        "other": int(other.sum()),
        "short": int((lost > 0).sum()),
    }
