"""Who follows whom: the calls that both databases have, SQLite's and Redis'."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from comet import __main__ as command
from comet.database import prepare
from comet.errors import Refusal
from comet.subscriptions import STEP, Subscriptions
from comet.subscriptions_redis import RedisSubscriptions, connect, pack, unpack
from tests.redis_server import RedisServer, needs_redis, redis_cluster, redis_server

Known = Subscriptions | RedisSubscriptions

PREFIX = "t:"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Known, list[str]]:
    """A database, and the flags of load-friends that name it."""
    if request.param == "sqlite":
        prepare(tmp_path, whole=True)
        return Subscriptions(tmp_path), ["--data", str(tmp_path)]
    server = request.getfixturevalue("server")
    server.ask("FLUSHALL")
    return RedisSubscriptions(lambda: connect(server.url), PREFIX), ["--backplane", server.url, "--redis-prefix", PREFIX]


@pytest.fixture
def known(made: tuple[Known, list[str]]) -> Iterator[Known]:
    yield made[0]
    made[0].close()


def test_unknown_users_follow_nobody_and_are_followed_by_nobody(known: Known) -> None:
    assert known.get_subscribers("x") == known.following("x") == known.page_of_subscribers("x", None, 10) == []
    assert known.count_subscribers("x") == known.count_following("x") == 0


def test_adding_and_removing_count_what_has_changed(known: Known) -> None:
    assert known.add_subscriptions([("alice", "rj"), ("bob", "rj"), ("alice", "rj"), ("alice", "bob")]) == 3
    assert known.add_subscriptions([("alice", "rj"), ("7", "rj")]) == 1
    assert known.get_subscribers("rj") == ["7", "alice", "bob"]
    assert (known.joined_subscribers("rj"), known.joined_subscribers("nobody")) == ("7,alice,bob", "")
    assert known.following("alice") == ["bob", "rj"]
    assert (known.count_subscribers("rj"), known.count_following("alice")) == (3, 2)
    assert known.remove_subscriptions([("alice", "rj"), ("nobody", "rj"), ("7", "rj")]) == 2
    assert known.remove_subscriptions([("alice", "rj")]) == 0
    assert known.get_subscribers("rj") == ["bob"]
    assert known.following("alice") == ["bob"]
    assert known.add_subscriptions([]) == known.remove_subscriptions([]) == 0


def test_counts_are_right_whatever_is_added_and_removed(known: Known) -> None:
    rng = random.Random(4)
    names = [str(number) for number in range(-3, 4)] + ["a", "b", "07"]
    truth: set[tuple[str, str]] = set()
    for _ in range(150):
        pairs = [tuple(rng.sample(names, 2)) for _ in range(rng.choice((1, 1, 3, 40)))]
        those = [(follower, followee) for follower, followee in pairs]
        if rng.random() < 0.5:
            assert known.add_subscriptions(those) == len(set(those) - truth)
            truth |= set(those)
        else:
            assert known.remove_subscriptions(those) == len(set(those) & truth)
            truth -= set(those)
        user = rng.choice(names)
        assert known.count_subscribers(user) == sum(followee == user for _, followee in truth) == len(known.get_subscribers(user))
        assert known.count_following(user) == sum(follower == user for follower, _ in truth) == len(known.following(user))
    known.remove_subscriptions(list(truth))
    assert all(known.count_subscribers(user) == known.count_following(user) == 0 for user in names)


@pytest.mark.parametrize("count", [STEP - 1, STEP, STEP + 1, 3 * STEP])
def test_long_lists_are_whole_at_every_length(known: Known, count: int) -> None:
    followers = [str(number) for number in range(count - 10)] + [f"t{number}" for number in range(10)]
    random.shuffle(followers)
    assert known.add_subscriptions([(one, "star") for one in followers]) == count
    assert known.add_subscriptions([("fan", one) for one in followers]) == count
    assert sorted(known.get_subscribers("star")) == sorted(known.following("fan")) == sorted(followers)
    assert known.count_subscribers("star") == known.count_following("fan") == count


def test_pages_are_in_order_numbers_before_text(known: Known) -> None:
    rng = random.Random(1)
    numbers = {
        0,
        1,
        -1,
        255,
        256,
        257,
        -255,
        -256,
        -257,
        65535,
        65536,
        (1 << 63) - 1,
        -(1 << 63),
        *(rng.randrange(-(10**6), 10**6) for _ in range(300)),
    }
    words = {"a", "b", "Z", "-", "07", "+7", str(1 << 63), "user@example.org", *(f"w{rng.random()}" for _ in range(50))}
    everybody = [str(one) for one in sorted(numbers)] + sorted(words)
    known.add_subscriptions(rng.sample([(one, "star") for one in everybody], len(everybody)))
    known.add_subscriptions(rng.sample([("fan", one) for one in everybody], len(everybody)))
    for page in (known.page_of_subscribers, known.page_of_following):
        user = "star" if page == known.page_of_subscribers else "fan"
        got: list[str] = []
        while ids := page(user, got[-1] if got else None, 7):
            got += ids
        assert got == everybody
        assert page(user, "255", 2) == everybody[everybody.index("255") + 1 :][:2]
        assert page(user, str((1 << 63) - 2), 2) == [str((1 << 63) - 1), sorted(words)[0]]  # one that is not there
        assert page(user, "zzz", 5) == []


def test_an_edge_list_is_loaded_and_what_was_there_stays(made: tuple[Known, list[str]], known: Known, tmp_path: Path, capsys: Any) -> None:
    known.add_subscriptions([("before", "star")])
    rng = random.Random(2)
    edges = {(rng.randrange(3000), rng.randrange(3000)) for _ in range(8000)}
    edges = {(a, b) for a, b in edges if a != b} | {(number, 5000) for number in range(4500)}
    source = tmp_path / "friends.txt"
    source.write_text("".join(f"{a} {b}\n" for a, b in edges) + "rj alice\n1 5000\n")
    assert command.main(["load-friends", str(source), *made[1]]) == 0
    assert f"{len(edges) + 2:,} lines, {len(edges) + 1:,} new" in capsys.readouterr().out
    assert command.main(["load-friends", str(source), *made[1]]) == 0
    assert " 0 new" in capsys.readouterr().out
    for user in (5000, 17, 1234):
        assert set(known.get_subscribers(str(user))) == {str(a) for a, b in edges if b == user}
        assert set(known.following(str(user))) == {str(b) for a, b in edges if a == user}
    assert known.count_subscribers("5000") == 4500
    assert all(known.count_following(str(user)) == sum(a == user for a, _ in edges) for user in (1, 5, 4499, 4500))
    assert (known.get_subscribers("alice"), known.get_subscribers("star")) == (["rj"], ["before"])


def test_a_bad_line_is_named_and_nothing_is_loaded(made: tuple[Known, list[str]], known: Known, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "friends.txt"
    for line, why in [("3\n", "line 2"), ("4 4\n", "can't follow itself"), ("a b c\n", "line 2")]:
        source.write_text(f"1 2\n{line}")
        assert command.main(["load-friends", str(source), *made[1]]) == 1
        assert why in capsys.readouterr().err
    assert known.count_subscribers("2") == 0


@pytest.mark.parametrize(
    "text", ["0", "7", "-7", "07", "-0", "255", "256", "-256", "-257", str((1 << 63) - 1), str(-(1 << 63)), str(1 << 63), "x", ""]
)
def test_an_id_is_stored_as_it_is_written(text: str) -> None:
    assert unpack(pack(text)) == text


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"garbage", b"\x81", b"\x81ab", b"\x00", b"\x7f"])
def test_what_no_id_is_stored_as_is_none(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        unpack(data)


@needs_redis
def test_what_a_stranger_has_put_among_followers_is_passed_over(server: RedisServer) -> None:
    server.ask("FLUSHALL")
    known = RedisSubscriptions(lambda: connect(server.url), PREFIX)
    known.add_subscriptions([(str(number), "star") for number in range(20)] + [("bob", "star")])
    for number in range(30):
        server.ask("ZADD", f"{PREFIX}followers:star", "0", bytes([0x81, number, 0]), "0", f"garbage{number}", "0", "")
    everybody = [*map(str, range(20)), "bob"]
    assert known.get_subscribers("star") == everybody
    assert known.joined_subscribers("star") == ",".join(everybody)
    assert known.page_of_subscribers("star", None, 5) == everybody[:5]
    assert known.page_of_subscribers("star", "4", 16) == everybody[5:]
    server.ask("SET", f"{PREFIX}followers:eve", "x")
    for what in (lambda: known.get_subscribers("eve"), lambda: known.add_subscriptions([("a", "eve")])):
        with pytest.raises(Refusal, match="has something else"):
            what()
    assert server.ask("GET", f"{PREFIX}followers:eve") == b"x", "subscriptions are no passing thing: nobody knows what stood there"
    known.close()


@needs_redis
def test_who_can_not_reach_redis_is_told(server: RedisServer) -> None:
    server.ask("FLUSHALL")
    known = RedisSubscriptions(lambda: connect(server.url, timeout=0.3, connect_timeout=0.3), PREFIX)
    with redis_server("--requirepass", "secret") as other:
        denied = RedisSubscriptions(lambda: connect(other.url), PREFIX)
        for what in (lambda: denied.get_subscribers("x"), lambda: denied.add_subscriptions([("a", "b")])):
            with pytest.raises(Refusal, match="backplane-away"):
                what()
        denied.close()
        gone = RedisSubscriptions(lambda: connect(other.url, connect_timeout=0.3), PREFIX)
    with pytest.raises(Refusal, match="backplane-away"):
        gone.count_subscribers("x")
    assert known.add_subscriptions([("a", "b")]) == 1
    server.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(Refusal, match="backplane-full"):
            known.add_subscriptions([("c", "b")])
        assert known.get_subscribers("b") == ["a"]
    finally:
        server.ask("CONFIG", "SET", "maxmemory", "0")
    known.close()


@needs_redis
def test_a_cluster_keeps_them_too() -> None:
    with redis_cluster(masters=3, replicas=0) as servers:
        known = RedisSubscriptions(lambda: connect(servers[0].url.replace("redis://", "redis+cluster://")), PREFIX)
        pairs = [(str(number), str(number % 50 + 1000)) for number in range(500)]
        assert known.add_subscriptions(pairs) == 500
        assert all(known.count_subscribers(str(number + 1000)) == 10 for number in range(50))
        assert known.remove_subscriptions(pairs[:100]) == 100
        assert sum(known.count_following(str(number)) for number in range(500)) == 400
        assert all(server.ask("DBSIZE") > 50 for server in servers)
        with ThreadPoolExecutor(32) as many:  # more than there are connections
            assert sum(many.map(known.count_following, map(str, range(500)))) == 400
        known.close()
        gone = RedisSubscriptions(lambda: connect(servers[0].url.replace("redis://", "redis+cluster://"), connect_timeout=0.3), PREFIX)
    with pytest.raises(Refusal, match="backplane-away"):
        gone.count_subscribers("x")
