"""A link to a server that says what a test wants: answers keep to their questions, whatever Redis says in between."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gevent
import hiredis
import pytest
from gevent.server import StreamServer

from comet.backplane import redis_link
from comet.backplane.memory import Bounds
from comet.backplane.redis_dial import Target, dial
from comet.backplane.redis_link import Call, Link
from comet.backplane.redis_scripts import Scripts
from tests.harness import wait_until

Answer = Callable[[list[bytes]], bytes]


class Fake:
    """What `answer` says to each command; hello and scripts are its own affair."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[list[bytes]] = []
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._server.start()
        self.target = Target(("127.0.0.1", self._server.server_port), False, 0, "", "", None)

    def _serve(self, sock: Any, _: Any) -> None:
        reader = hiredis.Reader(notEnoughData=...)
        while data := sock.recv(1 << 16):
            reader.feed(data)
            while (command := reader.gets()) is not ...:
                if command[0] in (b"HELLO", b"SCRIPT"):
                    sock.sendall(b"+OK\r\n")
                else:
                    self.asked.append(command)
                    sock.sendall(self.answer(command))

    def close(self) -> None:
        self._server.stop()


class Owner:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.thrown: list[bytes] = []

    def linked(self, link: Link) -> None: ...
    def unlinked(self, link: Link) -> None: ...
    def published(self, name: bytes, payload: bytes) -> None: ...

    def thrown_out(self, name: bytes) -> None:
        self.thrown.append(name)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def linked(owner: Owner) -> Iterator[Callable[[Answer], tuple[Link, Fake]]]:
    """A link that is up, to a server that answers so."""
    open_: list[Any] = []

    def make(answer: Answer) -> tuple[Link, Fake]:
        fake = Fake(answer)
        link = Link("Redis", lambda: dial(fake.target, fake.target.address, 1.0, "test"), 3.0, Scripts(Bounds(), False), owner)
        open_.extend((link, fake))
        link.start()
        wait_until(lambda: link.up)
        return link, fake

    yield make
    for one in open_:
        one.close()


def push(kind: str, name: str) -> bytes:
    """As RESP3 has it."""
    return f">3\r\n${len(kind)}\r\n{kind}\r\n${len(name)}\r\n{name}\r\n:0\r\n".encode()


def echo(command: list[bytes]) -> bytes:
    """What Redis answers to ECHO."""
    return b"$%d\r\n%b\r\n" % (len(command[1]), command[1])


@pytest.mark.parametrize("verb", [b"SSUBSCRIBE", b"SUNSUBSCRIBE"])
def test_a_slot_that_goes_in_the_middle_of_a_subscription_leaves_each_answer_its_question(linked: Any, owner: Owner, verb: bytes) -> None:
    def answer(command: list[bytes]) -> bytes:
        if command[0] == verb:  # Redis ends those of the slot by itself, and refuses this one
            return push("sunsubscribe", "x") + push("sunsubscribe", "y") + b"-MOVED 1 127.0.0.1:1\r\n"
        return echo(command)

    link, _ = linked(answer)
    got: list[bytes] = []
    link.subscribe(verb, [b"y"])
    for number in b"1", b"2":
        link.call(Call(partial(tuple, [b"ECHO", number]), got.append))
    wait_until(lambda: len(got) == 2)
    assert got == [b"1", b"2"]
    assert owner.thrown == [b"x", b"y"]  # y for what was refused


def test_a_subscription_that_is_refused_is_thrown_out(linked: Any, owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    link, _ = linked(
        lambda command: b"-NOPERM no permissions to access one of the channels\r\n" if command[0] == b"SUBSCRIBE" else echo(command)
    )
    link.subscribe(b"SUBSCRIBE", [b"a", b"b"])
    wait_until(lambda: owner.thrown == [b"a", b"b"])
    assert "refuses what comet asks (NOPERM" in caplog.text


def test_a_subscription_is_over_when_what_was_asked_behind_it_is_answered(linked: Any, owner: Owner) -> None:
    def answer(command: list[bytes]) -> bytes:
        if command[0].endswith(b"SUBSCRIBE"):
            return b"".join(push(command[0].decode().lower(), name.decode()) for name in command[1:])
        return echo(command)

    link, _ = linked(answer)
    got: list[bytes] = []
    link.subscribe(b"SSUBSCRIBE", [b"a", b"b"])
    link.subscribe(b"SUNSUBSCRIBE", [b"a"])
    link.call(Call(lambda: (b"ECHO", b"1"), got.append))
    wait_until(lambda: got == [b"1"])
    assert owner.thrown == []
    assert link.waiting == 0


@pytest.mark.parametrize("refused", [b"ECHO", b"SUBSCRIBE ECHO"], ids=["the-fence", "both"])
def test_where_nobody_knows_which_answer_is_whose_another_connection_is_made(
    linked: Any, refused: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    forbidden = True

    def answer(command: list[bytes]) -> bytes:
        if forbidden and command[0] in refused.split():
            return b"-NOPERM no permissions to run this command\r\n"
        return push("subscribe", "a") if command[0] == b"SUBSCRIBE" else b"+%b\r\n" % command[1]

    link, fake = linked(answer)
    got: list[bytes] = []
    link.subscribe(b"SUBSCRIBE", [b"a"])
    link.call(Call(lambda: (b"GET", b"mine"), got.append))
    wait_until(lambda: got == [b"mine"])  # asked again, on the next connection
    assert [command[0] for command in fake.asked] == [b"SUBSCRIBE", b"ECHO", b"GET", b"GET"]
    forbidden = False
    link.subscribe(b"SUBSCRIBE", [b"a"])
    link.call(Call(lambda: (b"GET", b"again"), got.append))
    wait_until(lambda: got == [b"mine", b"again"])
    assert "the connection broke: NOPERM" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("said", "why"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the protocol of Redis"), (b":7\r\n:8\r\n", "answers what nobody asked")],
)
def test_what_redis_would_not_say_ends_a_connection(linked: Any, said: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([said, b":1\r\n"])
    link, _ = linked(lambda command: next(answers))
    got: list[int] = []
    link.call(Call(lambda: (b"GET", b"x"), got.append))
    wait_until(lambda: bool(got))
    if got == [7]:
        link.call(Call(lambda: (b"GET", b"y"), got.append))
    wait_until(lambda: got[-1] == 1)
    assert why in caplog.text
    assert "Traceback" not in caplog.text


def test_no_more_is_asked_than_redis_has_room_to_answer(linked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "ROOM", 1000)
    answered = gevent.event.Event()

    def answer(command: list[bytes]) -> bytes:
        answered.wait()
        return b":1\r\n"

    link, _ = linked(answer)
    got: list[int] = []
    for _ in range(50):
        link.call(Call(lambda: (b"ECHO", b"1"), got.append, size=100))
    wait_until(lambda: len(link._sent) == 10)
    gevent.sleep(0.05)
    assert len(link._sent) == 10
    answered.set()
    wait_until(lambda: len(got) == 50)


def test_what_redis_6_refuses_in_a_script_is_known(linked: Any) -> None:
    wrapped = "ERR Error running script (call to f_59175d): @user_script:77: @user_script: 77: -OOM command not allowed when used memory > 'maxmemory'."
    link, _ = linked(lambda command: f"-{wrapped}\r\n".encode())
    got: list[Any] = []
    link.call(Call(lambda: (b"EVALSHA", b"x", b"0"), got.append))
    wait_until(lambda: got)
    assert str(got[0]).startswith("OOM command not allowed")
