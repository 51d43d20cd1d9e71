"""What all clients should have got, beside what each got: the last word on lost and doubled.

Who was sent what is known twice: from the senders' records and the friends' edge list, which is *due* and is what counts; and
from the server's answers (`delivered`), which the verdict shows beside it. Records are added up as they come (`Outgoing`), so hours
of them take no more memory than the first. Pure, but for reading the edge list. Needs numpy: a million clients with fifteen
friends each are fifteen million additions. Neighbours: `loadtest.counting`, whose records these are; `loadtest.control`, which asks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.counting import REFUSED, SENT, UNSURE, Send
from loadtest.verify import DIRECT, EVERYONE, FEED, WRAP

Records = NDArray[np.void]
_RECORD = np.dtype(
    [("kind", "u1"), ("outcome", "u1"), ("number", "<u8"), ("user", "<u4"), ("targets", "<u4"), ("delivered", "<u4"), ("sent", "<u8")]
)
"""`loadtest.counting.RECORD`."""

AT_ONCE = 2_000_000
"""Numbers of the edge list that are in memory at a time."""


def edges(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Followers and followees of an edge list, a line `follower followee`, in parts."""
    with path.open("rb") as file:
        while len(part := np.fromfile(file, np.int64, AT_ONCE, sep=" ")):
            yield part[::2], part[1::2]


class Outgoing:
    """What was sent to the users, up to `clients`, as far as it was told by now."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.outcomes = {"sent": 0, "refused": 0, "unsure": 0, "targets": 0, "delivered": 0}
        self.everyone: list[Send] = []
        """Those to all."""
        self.sums = {kind: _Sums(clients) for kind in (FEED, DIRECT)}

    def add(self, records: bytes) -> None:
        """Records of sends (`Counts.report`)."""
        told = np.frombuffer(records, _RECORD)
        for name, outcome in (("sent", SENT), ("refused", REFUSED), ("unsure", UNSURE)):
            self.outcomes[name] += int(np.count_nonzero(told["outcome"] == outcome))
        sure = told["outcome"] == SENT
        for name in ("targets", "delivered"):
            self.outcomes[name] += int(told[name][sure].sum(dtype=np.uint64))
        self.everyone += [Send(*one) for one in told[told["kind"] == EVERYONE].tolist()]
        for kind, sums in self.sums.items():
            sums.add(told[(told["kind"] == kind) & sure], told[(told["kind"] == kind) & (told["outcome"] == UNSURE)])


class _Sums:
    """Of the messages of a kind, by the user they were sent to: how many, the sum of their numbers, and how many more it may have been."""

    def __init__(self, clients: int) -> None:
        self.count, self.total, self.doubt = (np.zeros(clients, np.uint64) for _ in range(3))

    def add(self, sure: Records, unsure: Records) -> None:
        np.add.at(self.count, sure["user"], np.uint64(1))
        np.add.at(self.total, sure["user"], sure["number"])
        np.add.at(self.doubt, unsure["user"], np.uint64(1))


def audit(
    friends: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
    outgoing: Outgoing,
    accounts: Sequence[Mapping[str, bytes]],
    own: Sequence[bool] = (True,),
    shared: Sequence[bool] = (False,),
    complete: bool = True,
) -> dict[str, Any]:
    """The verdict. `accounts` are those of the processes (`Counts.account`). User u's client has a feed of its own where
    `own[u % len(own)]`, and is on the channel of all where `shared` says so. Not `complete`, when clients came while
    messages were sent already: then only the sums are compared, with what the server said that it delivered."""
    clients, outcomes = outgoing.clients, outgoing.outcomes
    feed, direct = outgoing.sums[FEED], outgoing.sums[DIRECT]
    to_all = [one for one in outgoing.everyone if one.outcome == SENT]
    all_counted, all_summed = len(to_all), sum(one.number for one in to_all) & WRAP
    all_unsure = sum(one.outcome == UNSURE for one in outgoing.everyone)
    due, due_sum, doubtful = feed.count + direct.count, feed.total + direct.total, feed.doubt + direct.doubt
    for followers, followees in friends:
        here = (followers < clients) & (followees < clients)
        follower, followee = followers[here], followees[here]
        np.add.at(due, follower, feed.count[followee])
        np.add.at(due_sum, follower, feed.total[followee])
        np.add.at(doubtful, follower, feed.doubt[followee])
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
