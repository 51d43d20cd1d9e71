"""Who follows whom, in Redis: for several machines that are one service. The calls of `comet.subscriptions`.

Neighbours: `comet.subscriptions`, the same in a file; `comet.loading_redis`, which loads an edge list.

A user has two sorted sets, of followers and of those it follows. All scores are 0, so Redis keeps them in the order
of their bytes: an id is stored such that this is the order of `comet.subscriptions`, numbers before text (`pack`). A
million users' ids take four bytes each, and a small set is one block of memory.

The two ends of a subscription may be on two servers of a cluster, so they are not written at once: a break may leave one
of them. The followers' end, which is asked when something is sent, is written last when it is added and first when it is
removed, and what a repeat answers is counted there: so repeating a call that failed makes both right.

How safe it is what is answered, is Redis' persistence to say: see the README.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from comet.database import key
from comet.errors import Refusal
from comet.turn import give_way

STEP: Final = 2000
"""Ids that one question fetches."""

FAILURES: Final = (redis.RedisError, RedisClusterException, OSError)
"""What a client raises when Redis does not do it."""

LOT: Final = 1000
"""Users whose sets are changed in one round trip."""

_ZERO: Final = 0x80
_TEXT: Final = 0xFF

Pair = tuple[str, str]
"""Follower and followee."""

_Answer = TypeVar("_Answer")


def pack(name: str) -> bytes:
    """An id as it is stored: a number as its length and its bytes, so that numbers are in order; then text."""
    number = key(name)
    if isinstance(number, str):
        return bytes((_TEXT,)) + number.encode()
    size = (abs(number).bit_length() + 7) // 8
    if number >= 0:
        return bytes((_ZERO + size,)) + number.to_bytes(size, "big")
    return bytes((_ZERO - size,)) + ((1 << 8 * size) + number).to_bytes(size, "big")


def unpack(data: bytes) -> str:
    """Return the id. Raises IndexError and ValueError for what `pack` does not make."""
    head = data[0]
    if head == _TEXT:
        return data[1:].decode()
    if abs(head - _ZERO) != len(data) - 1:
        raise ValueError(f"a number of {len(data) - 1} bytes that says it has {abs(head - _ZERO)}")
    number = int.from_bytes(data[1:], "big")
    return str(number if head >= _ZERO else number - (1 << 8 * (len(data) - 1)))


def unpack_all(lot: Sequence[bytes]) -> list[str]:
    """Return the ids, without what a stranger has put among them: nobody follows by that name."""
    try:
        return [unpack(one) for one in lot]
    except (IndexError, ValueError):
        ids = []
        for one in lot:
            with suppress(IndexError, ValueError):
                ids.append(unpack(one))
        return ids


def connect(url: str, timeout: float = 3.0, connect_timeout: float = 1.0, pool: int = 8) -> Any:
    """A client for many greenlets: `pool` connections, and who finds none free waits for one. Raises ValueError for a URL
    that can't be read."""
    options: dict[str, Any] = {
        "socket_timeout": timeout, "socket_connect_timeout": connect_timeout, "health_check_interval": 30, "protocol": 3,
        "retry": Retry(NoBackoff(), 1), "client_name": "comet",  # one more try: a connection may have been closed since
    }  # fmt: skip
    scheme, _, rest = url.partition(":")
    if scheme.endswith("+cluster"):
        return redis.RedisCluster.from_url(
            f"{scheme.removesuffix('+cluster')}:{rest}", connection_pool_class=redis.BlockingConnectionPool, max_connections=pool,
            timeout=timeout, **options,
        )  # fmt: skip
    return redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(url, max_connections=pool, timeout=timeout, **options))


class Sets:
    """Where the sets are, and how they are written; `prefix` stands before each."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def followers(self, user: str) -> str:
        """Who follows the user."""
        return f"{self._prefix}followers:{user}"

    def following(self, user: str) -> str:
        """Whom the user follows."""
        return f"{self._prefix}following:{user}"


class RedisSubscriptions:
    """`make` connects (`connect`), when it is first needed. Each call raises Refusal ``backplane-away`` where Redis does not
    answer; those that write ``backplane-full`` as well."""

    def __init__(self, make: Callable[[], Any], prefix: str) -> None:
        self._make = make
        self._client: Any = None
        self._sets = Sets(prefix)

    def drain(self, seconds: float) -> None:
        """Do nothing: no call waits for others who write."""

    def close(self) -> None:
        """Let go of the connections."""
        if self._client is not None:
            self._client.close()

    # -- looking up

    def get_subscribers(self, user: str) -> list[str]:
        """Everyone who follows the user."""
        return list(self._steps(self._sets.followers(user)))

    def joined_subscribers(self, user: str) -> str:
        """As `get_subscribers`, joined by commas: no id has one."""
        return ",".join(self._steps(self._sets.followers(user)))

    def following(self, user: str) -> list[str]:
        """Everyone whom the user follows."""
        return list(self._steps(self._sets.following(user)))

    def count_subscribers(self, user: str) -> int:
        """How many follow the user."""
        return self._do(lambda client: int(client.zcard(self._sets.followers(user))))

    def count_following(self, user: str) -> int:
        """How many the user follows."""
        return self._do(lambda client: int(client.zcard(self._sets.following(user))))

    def page_of_subscribers(self, user: str, after: str | None, limit: int) -> list[str]:
        """At most `limit`, in order: those behind the id `after`, which need not be one of them. Numbers come
        before text."""
        return self._page(self._sets.followers(user), after, limit)

    def page_of_following(self, user: str, after: str | None, limit: int) -> list[str]:
        """As `page_of_subscribers`."""
        return self._page(self._sets.following(user), after, limit)

    def _steps(self, name: str) -> Iterator[str]:
        after: bytes | None = None
        while ids := self._range(name, after, STEP):
            yield from unpack_all(ids)
            if len(ids) < STEP:
                return
            after = ids[-1]
            give_way()

    def _page(self, name: str, after: str | None, limit: int) -> list[str]:
        page: list[str] = []
        last = None if after is None else pack(after)
        while len(page) < limit and (ids := self._range(name, last, limit - len(page))):
            page += unpack_all(ids)
            last = ids[-1]
            if len(page) < limit:
                give_way()
        return page

    def _range(self, name: str, after: bytes | None, limit: int) -> list[bytes]:
        least = b"-" if after is None else b"(" + after
        return self._do(lambda client: list(client.zrange(name, least, b"+", bylex=True, offset=0, num=limit)))

    # -- writing

    def add_subscriptions(self, pairs: Sequence[Pair]) -> int:
        """Have each first follow its second; how many are new."""
        self._change(((self._sets.following(follower), followee) for follower, followee in pairs), add)
        return self._change(((self._sets.followers(followee), follower) for follower, followee in pairs), add)

    def remove_subscriptions(self, pairs: Sequence[Pair]) -> int:
        """Have each first follow its second no more; how many there were."""
        removed = self._change(((self._sets.followers(followee), follower) for follower, followee in pairs), _remove)
        self._change(((self._sets.following(follower), followee) for follower, followee in pairs), _remove)
        return removed

    def _change(self, ends: Iterable[tuple[str, str]], how: Callable[[Any, str, list[bytes]], None]) -> int:
        sets: dict[str, list[bytes]] = {}
        for count, (name, one) in enumerate(ends, 1):
            sets.setdefault(name, []).append(pack(one))
            if count % LOT == 0:
                give_way()
        names = list(sets)
        changed = 0
        for start in range(0, len(names), LOT):
            lot = [(name, sets[name]) for name in names[start : start + LOT]]
            changed += self._do(lambda client, lot=lot: change(client, lot, how))  # type: ignore[misc]
        return changed

    def _do(self, work: Callable[[Any], _Answer]) -> _Answer:
        try:
            if self._client is None:
                self._client = self._make()
            return work(self._client)
        except redis.OutOfMemoryError as error:
            raise Refusal(
                "backplane-full", "Redis, which keeps the subscriptions, has no memory left; send it all again when there is room."
            ) from error
        except FAILURES as error:
            if "WRONGTYPE Operation" in str(error):  # no id has a blank
                raise Refusal(
                    "backplane-away", "Redis has something else where the subscriptions of this user were: a person has to take it away."
                ) from error
            raise Refusal(
                "backplane-away", "Redis, which keeps the subscriptions, does not answer; send it again, a little later."
            ) from error


def add(pipeline: Any, name: str, ids: list[bytes]) -> None:
    """Put these into a set."""
    pipeline.zadd(name, dict.fromkeys(ids, 0))


def _remove(pipeline: Any, name: str, ids: list[bytes]) -> None:
    pipeline.zrem(name, *ids)


def change(client: Any, lot: Iterable[tuple[str, list[bytes]]], how: Callable[[Any, str, list[bytes]], None]) -> int:
    """Change sets in one round trip; how many ids were new, or were there."""
    pipeline = client.pipeline(transaction=False)
    for name, ids in lot:
        for start in range(0, len(ids), STEP):
            how(pipeline, name, ids[start : start + STEP])
    return sum(pipeline.execute())
