"""Judges what a client has reported against what was published."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NotRequired, TypedDict


class Line(TypedDict):
    """One thing that a driver has printed.

    `event` is message, gap, other (an event of another `name`), open, error (it goes on by itself, or exits), refused (a `status` other
    than 200) or end (it has given up); or what the test itself has done: restart.
    """

    event: str
    id: NotRequired[str | None]
    data: NotRequired[str | None]
    name: NotRequired[str]
    status: NotRequired[int]
    error: NotRequired[str]
    code: NotRequired[int]


class Verdict(NamedTuple):
    """`lost` are numbers that neither came nor were covered by a gap, `doubled` those that came once too often, `phantoms` the data of
    messages that nobody has published."""

    first: int
    last: int
    lost: Sequence[int]
    doubled: Sequence[int]
    phantoms: Sequence[str | None]
    others: frozenset[str]
    gaps: int
    restarts: int

    @property
    def faultless(self) -> bool:
        """Every message came, once and in order, or was followed by a told gap."""
        return self.first > 0 and not self.lost and not self.doubled


def judge(lines: Iterable[Line], doubtful: frozenset[int] | set[int] = frozenset()) -> Verdict:
    """Judge one client's lines. A number may come twice only if it is one of `doubtful` and a gap was told in between."""
    first = last = gaps = restarts = 0
    told = False
    lost: list[int] = []
    doubled: list[int] = []
    phantoms: list[str | None] = []
    others: set[str] = set()
    for line in lines:
        event, data = line["event"], line.get("data")
        if event == "gap":
            told = True
            gaps += 1
        elif event == "restart":
            restarts += 1
        elif event == "other":
            others.add(line.get("name", ""))
        elif event == "message":
            if not data or not data.isdigit():
                phantoms.append(data)
                continue
            number = int(data)
            first = first or number
            if last and number <= last and not (told and number in doubtful):
                doubled.append(number)
            if last and number > last + 1 and not told:
                lost.extend(range(last + 1, number))
            last = max(last, number)
            told = False
    return Verdict(first, last, lost, doubled, phantoms, frozenset(others), gaps, restarts)
