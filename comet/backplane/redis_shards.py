"""Which Redis server has a channel: the only one, or in a cluster the master of its slot.

Neighbours: `comet.backplane.redis_link`, one to each server, and `comet.backplane.redis`, which asks for them. A
cluster's map is read from whichever server answers (``CLUSTER SLOTS``), another one each time, since one that is cut off from the
others tells an old map; again when a link breaks or a server says that a slot is not its own, until all of it is there.
"""

import logging
import random
from collections.abc import Callable
from typing import Any, Final, Protocol

import gevent
import hiredis
from redis.crc import key_slot

from comet.backplane.redis_dial import Address, Connection, Denied, Target, dial, reason, service_title, title
from comet.backplane.redis_format import SLOTS
from comet.backplane.redis_link import Link, Owner
from comet.backplane.redis_outage import Outage
from comet.backplane.redis_scripts import Scripts

REFRESH: Final = 0.2
"""Seconds between two looks at the map of a cluster that is not whole, more or less."""

NAME: Final = "comet"
"""What our connections are called in Redis' CLIENT LIST."""

log = logging.getLogger("comet.backplane")


class Keeper(Owner, Protocol):
    """Whose links they are."""

    def moved(self) -> None:
        """Channels may have gone to another server."""


class Single:
    """One server."""

    whole = True

    def __init__(self, target: Target, scripts: Scripts, timeout: float, connect_timeout: float, keeper: Keeper, outage: Outage) -> None:
        connect: Callable[[], Connection] = lambda: dial(target, target.address, connect_timeout, NAME)  # noqa: E731
        self._link = Link(service_title(target), connect, timeout, scripts, keeper, outage)
        self.links = [self._link]

    def start(self) -> None:
        """Connect."""
        self._link.start()

    def close(self) -> None:
        """For good."""
        self._link.close()

    def link(self, key: bytes) -> Link | None:
        """To the server that has this key; None where nobody is known to."""
        return self._link

    def slot(self, key: bytes) -> int:
        """Keys of one slot may be named in one script."""
        return 0

    def refresh(self) -> None:
        """Look whether channels have moved. They can't."""


class Cluster:
    """Several servers."""

    def __init__(self, target: Target, scripts: Scripts, timeout: float, connect_timeout: float, keeper: Keeper, outage: Outage) -> None:
        self._target = target
        self._scripts = scripts
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._keeper = keeper
        self._outage = outage
        self._slots: list[Link | None] = [None] * SLOTS
        self._masters: dict[Address, Link] = {}
        self._seeds: list[Address] = [target.address]
        """Servers that may know the map."""
        self._wanted = False
        self._greenlet: Any = None
        self._closed = False

    @property
    def links(self) -> list[Link]:
        """To all masters."""
        return list(self._masters.values())

    @property
    def whole(self) -> bool:
        """Every slot has a master."""
        return None not in self._slots

    def start(self) -> None:
        """Connect."""
        self.refresh()

    def close(self) -> None:
        """For good."""
        self._closed = True
        if self._greenlet is not None:
            self._greenlet.kill()
        for link in self.links:
            link.close()

    def link(self, key: bytes) -> Link | None:
        """To the server that has this key; None where nobody is known to."""
        return self._slots[key_slot(key)]

    def slot(self, key: bytes) -> int:
        """Keys of one slot may be named in one script."""
        return int(key_slot(key))

    def refresh(self) -> None:
        """Look whether channels have moved."""
        if self._closed:
            return
        self._wanted = True
        if self._greenlet is None or self._greenlet.dead:
            self._greenlet = gevent.spawn(self._look)

    def _look(self) -> None:
        while self._wanted:
            self._wanted = False
            failure = ""
            for address in random.sample(self._seeds, len(self._seeds)):
                try:
                    connection = dial(self._target, address, self._connect_timeout, NAME)
                    try:
                        (ranges,) = connection.exchange([("CLUSTER", "SLOTS")], self._connect_timeout)
                    finally:
                        connection.close()
                except (OSError, Denied, hiredis.HiredisError) as error:
                    failure = f"{title(address)}: {reason(error)}"
                    continue
                self._adopt(ranges, address)
                self._outage.back(service_title(self._target))
                break
            else:
                self._outage.away(service_title(self._target), failure)
            gevent.sleep(REFRESH * random.uniform(0.5, 1.5))
            if not self.whole or not all(link.up for link in self.links):
                self._wanted = True

    def _adopt(self, ranges: Any, asked: Address) -> None:
        slots: list[Link | None] = [None] * SLOTS
        seeds: list[Address] = []
        masters: dict[Address, Link] = {}
        for first, last, master, *replicas in ranges:
            for host, port, *_ in (master, *replicas):
                seeds.append((_host(host, asked), port))
            address = (_host(master[0], asked), master[1])
            link = self._masters.get(address) or masters.get(address)
            if link is None:
                link = self._open(address)
            masters[address] = link
            slots[first : last + 1] = [link] * (last + 1 - first)
        gone = [link for address, link in self._masters.items() if address not in masters]
        changed = slots != self._slots
        self._masters, self._slots = masters, slots
        self._seeds = list(dict.fromkeys([*seeds, self._target.address]))
        for link in gone:
            link.close()
        if changed:
            self._keeper.moved()

    def _open(self, address: Any) -> Link:
        connect: Callable[[], Connection] = lambda: dial(self._target, address, self._connect_timeout, NAME)  # noqa: E731
        link = Link(title(address), connect, self._timeout, self._scripts, self._keeper, self._outage)
        link.start()
        return link


def _host(name: bytes | None, asked: Address) -> str:
    """Of a server in the map: without a name it is where the map was asked for."""
    return name.decode() if name else str(asked[0])
