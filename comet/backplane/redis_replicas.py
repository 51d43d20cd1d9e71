"""Waiting until replicas of Redis have what was published (``--redis-replicas``).

Neighbour: `comet.backplane.redis`. WAIT holds up its connection, and speaks of what that connection has written. So it has
one of its own to each server: after the publications are answered it writes something, which is behind them for every
replica, and waits for that; for all publications together that are answered meanwhile.

A connection that was made later may lead to another server, one that was a replica, and says nothing about a publication
before it. So a publisher takes a `Place` first, and is confirmed on that connection or not at all; and a place ends with the link
on which is published, whose next connection may lead elsewhere, too.
"""

import logging
from typing import Any, Final

import gevent
import hiredis
from gevent.event import AsyncResult

from comet.backplane.redis_dial import Connection, Denied
from comet.backplane.redis_link import Link

ANSWER: Final = 1.0
"""Seconds that Redis has for its answer beside what it waits for replicas."""

log = logging.getLogger("comet.backplane")


class Place:
    """An open connection to one server, and who waits there: the log that each has published to."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.open = True
        self.waiting: list[tuple[bytes, Any]] = []
        self.busy = False

    def close(self) -> None:
        """It is of no use any more."""
        self.open = False
        self.connection.close()


class Replicas:
    """So many `replicas` must have it within `timeout` seconds."""

    def __init__(self, replicas: int, timeout: float) -> None:
        self._replicas = replicas
        self._timeout = timeout
        self._places: dict[Link, Place] = {}
        self._away: set[Link] = set()
        """Those of which it was said that they can't be reached."""

    def place(self, link: Link, timeout: float) -> Place | None:
        """To be taken before the publication; None when this server can't be reached within `timeout`."""
        place = self._places.get(link)
        if place is not None and place.open:
            return place
        connection = None
        try:
            with gevent.Timeout(timeout, False):
                connection = link.connect()
        except (OSError, Denied, hiredis.HiredisError) as error:
            if link not in self._away:
                log.warning("%s can't be reached (%s), so that replicas can't be waited for", link.title, error)
        if connection is None:
            self._away.add(link)
            return None
        self._away.discard(link)
        place = self._places.get(link)
        if place is not None and place.open:  # another greenlet was faster
            connection.close()
            return place
        place = self._places[link] = Place(connection)
        return place

    def unlinked(self, link: Link) -> None:
        """Its connection broke."""
        place = self._places.pop(link, None)
        if place is not None:
            place.close()

    def confirm(self, place: Place, log: bytes) -> bool:
        """Whether replicas have what was published to `log` before this."""
        if not place.open:
            return False
        result = AsyncResult()
        place.waiting.append((log, result))
        if not place.busy:
            place.busy = True
            gevent.spawn(self._work, place)
        confirmed: bool = result.get()
        return confirmed

    def _work(self, place: Place) -> None:
        while place.waiting:
            waiting, place.waiting = place.waiting, []
            confirmed = place.open and self._wait(place, waiting[-1][0])
            for _, result in waiting:
                result.set(confirmed)
        place.busy = False

    def _wait(self, place: Place, name: bytes) -> bool:
        commands = (("SET", name + b":wait", 1, "PX", 1000), ("WAIT", self._replicas, max(1, round(1000 * self._timeout))))
        try:
            (_, count) = place.connection.exchange(commands, self._timeout + ANSWER)
        except (OSError, hiredis.HiredisError) as error:
            log.warning("replicas could not be waited for (%s)", error)
            place.close()
            return False
        return int(count) >= self._replicas

    def close(self) -> None:
        """For good."""
        for place in self._places.values():
            place.close()
