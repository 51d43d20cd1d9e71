"""The Locust users: clients that wait for messages, and senders. `loadtest.locustfile` offers them to Locust.

Each verifies what it receives (`loadtest.verify`), through its process's counts (`loadtest.counting`), which reach
Locust's statistics once a second: deliveries as requests of the type PUSH whose time is the message's latency, openings as
OPEN, and whatever is lost, doubled, out of order, late or closed as failures.

StreamUser, EventsUser and LongPollUser are one client each, for some ten thousand; SwarmUser is thousands, one a process.
"""

import logging
import random
import time
from typing import Any, NoReturn

import gevent
import msgspec
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from comet.turn import gather
from loadtest.client import Connection
from loadtest.control import SHAPE, Worker
from loadtest.counting import REFUSED, SENT, UNSURE, Send, Sender
from loadtest.options import masks
from loadtest.swarm import AGAIN, Swarm
from loadtest.verify import DIRECT, EVERYONE, FEED, Place, body, read
from loadtest.wire import EVENTS, STREAM, TEST, Endpoint, Malformed

log = logging.getLogger("comet.loadtest")

BESIDE_CLIENTS = (
    "it holds all clients of a process (--clients) by itself, with the ids that StreamUser, EventsUser and LongPollUser have: "
    f"run a shape ({SHAPE}), or choose it without those three"
)
"""Why a swarm is refused in a run by hand that has other clients."""

DIRECT_SENDERS = 4

UNUSED = 30.0
"""Seconds after which a sender makes a new connection: the server closes one without requests after --idle-timeout, 75 s."""

BROKEN = (OSError, EOFError, Malformed, ValueError, KeyError)
"""What a connection can end with."""


class _Answered(msgspec.Struct):
    targets: int = 1
    delivered: int = 0
    subscribers: int = 0


class _Told(msgspec.Struct):
    id: str
    data: str


class _Polled(msgspec.Struct):
    cursor: str
    gap: bool
    messages: list[_Told]


_answered = msgspec.json.Decoder(_Answered).decode
_polled = msgspec.json.Decoder(_Polled).decode


class Client(User):
    """One client. It comes back a second after it was closed or refused, with its cursor where it has one."""

    abstract = True
    endpoint: Endpoint

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.work = Worker.of(environment)
        self.number = self.work.next_client()
        self.client = self.work.counts.ledger.add(self.number)
        self.place: Place | None = None

    def on_stop(self) -> None:
        """Leave its number to the next one."""
        self.work.release_client(self.number)

    @task
    def stay(self) -> None:
        """Be connected until it ends."""
        counts = self.work.counts
        opened = False
        try:
            began = counts.clock()
            connection = Connection(self.work.target, self.number, timeout=self.work.patience)
            try:
                for _ in self.listen(connection):
                    if not opened:
                        opened = True
                        self.work.connected(self.number)
                        counts.opened += 1
                        counts.open += 1
                        counts.opening.add((counts.clock() - began) // 1000)
            finally:
                connection.close()
                if opened:
                    counts.open -= 1
                    self.work.disconnected(self.number)
        except BROKEN as error:
            counts.fail(self.endpoint.name, f"{'closed' if opened else 'not opened'}: {type(error).__name__} {error}"[:120])
        else:
            counts.fail(self.endpoint.name, "closed: by the server")
        gevent.sleep(AGAIN)

    def listen(self, connection: Connection) -> Any:
        """Yields once it is open, and at each message."""
        cursor = self.place.text() if self.place else b""
        connection.send(self.endpoint.request(self.number, self.work.target.name, cursor))
        status, headers = connection.start()
        if status != 200:
            raise Malformed(f"answered {status}")
        if self.place is None and self.endpoint.id_mark:
            self.place = Place.read(headers[b"comet-cursor"])
        chunks = connection.chunks()
        first = next(chunks, None)
        if first is None:
            raise Malformed("an answer that ended before it began")
        yield first
        connection.wait_on()
        for piece in chunks:
            self.take(piece)
            yield piece

    def take(self, piece: bytes) -> None:
        """A chunk."""
        text = self.endpoint.text(piece)
        if text is not None:
            self.got(*read(text), self.endpoint.id(piece) if self.endpoint.id_mark else b"")
        elif b'"gap":true' in piece or b"event: gap" in piece:
            self.work.counts.fail(self.endpoint.name, "gap")

    def got(self, number: int, sent: int, id: bytes) -> None:
        """A message."""
        counts = self.work.counts
        counts.take(self.endpoint.name, self.client, number, sent, counts.clock())
        if id:
            place = Place.read(id)
            if self.place is not None:
                counts.step(self.endpoint.name, self.place, place)
            self.place = place


class StreamUser(Client):
    """metabrew's client: GET /test/<id>, and wait."""

    endpoint = TEST


class EventsUser(Client):
    """GET /events/user:<id>, as a browser does."""

    endpoint = EVENTS


class LongPollUser(Client):
    """GET /poll/user:<id>, again and again, each with the cursor of the last answer."""

    endpoint = Endpoint("/poll", "/poll/user:{id}", b"")

    def listen(self, connection: Connection) -> Any:
        """The first poll asks for the cursor alone. It waits a little: else it would not count as one who listens, and stand in no log."""
        path = self.endpoint.path.format(id=self.number)
        query = f"since={self.place.text().decode()}" if self.place else "timeout=0.001"
        while True:
            connection.send(f"GET {path}?{query} HTTP/1.1\r\nHost: {self.work.target.name}\r\n\r\n".encode())
            answer = connection.whole()
            if answer.status != 200:
                raise Malformed(f"answered {answer.status}")
            document = _polled(answer.body)
            if document.gap:
                self.work.counts.fail(self.endpoint.name, "gap")
            for message in document.messages:
                self.got(*read(message.data.encode()), message.id.encode())
            if self.place is None:
                self.place = Place.read(document.cursor.encode())
            query = f"since={document.cursor}"
            yield answer


def refuse(user: User, work: Worker, why: str) -> NoReturn:
    """End a user that can't do its work in this run. Its class is told among Locust's failures and in the log, once a process."""
    name = type(user).__name__
    if name not in work.refused:
        work.refused.add(name)
        log.warning("%s: %s", name, why)
        user.environment.events.request.fire(
            request_type="USER", name=name, response_time=0, response_length=0, exception=RuntimeError(why), context={}
        )
    raise StopUser


class SwarmUser(User):
    """As many clients as are this process's part of --clients, on one epoll (`loadtest.swarm`)."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.work = Worker.of(environment)

    def swarm(self) -> Swarm:
        """The one it holds."""
        work = self.work
        return Swarm(work.target, work.share(), work.endpoints, work.counts, work.asked.open_rate / work.processes, work.asked.nap)

    @task
    def hold(self) -> None:
        """Open them, and hold them until it ends. Raises StopUser in a run by hand that has other clients, and where a swarm is."""
        if self.work.has_clients:
            refuse(self, self.work, BESIDE_CLIENTS)
        if self.work.swarm is not None:
            refuse(self, self.work, "a process holds one swarm: start as many processes (--processes) as SwarmUsers")
        self.work.swarm = self.swarm()
        gather(self.work.asked.nap, self.work.asked.nap)  # its senders' answers and turns come with its looks
        try:
            self.work.swarm.run()
        finally:
            gather(0.0)
            self.work.swarm = None


class Churn(SwarmUser):
    """Clients on /stream/user:<id> that leave and come back with their cursor: `--churn` of them a second."""

    def swarm(self) -> Swarm:
        """One of such clients alone."""
        work = self.work
        swarm = Swarm(work.target, work.share(), [STREAM], work.counts, work.asked.open_rate / work.processes, work.asked.nap)
        swarm.churning = work.asked.churn * len(swarm)
        return swarm


class Publisher(User):
    """One who sends, waits for the answer, and sends again when its time has come: all of them together `rate` a second. One
    that is behind does not catch up: then the achieved rate is lower than the one asked for, and the report says both."""

    abstract = True
    kind = FEED
    path: str

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.work = Worker.of(environment)
        self.sender: Sender = self.work.counts.sender()
        self.connection: Connection | None = None
        self.used = 0.0

    def on_start(self) -> None:
        """Count among the senders of the process."""
        self.work.sending += 1

    def on_stop(self) -> None:
        """Count no more."""
        self.work.sending -= 1

    def choose(self) -> int:
        """A user."""
        return random.choice(self.work.recipients())

    def pace(self) -> float:
        """Messages a second of this one; 0 while there is nobody to send to."""
        if not self.work.senders or not self.work.recipients():
            return 0.0
        return self.work.rate / self.work.senders

    @task
    def send(self) -> None:
        """A message whenever one is due, until it ends: a task for each would cost as much as the message."""
        due = 0.0
        while True:
            pace, now = self.pace(), time.monotonic()
            if pace <= 0:
                due = 0.0
                gevent.sleep(1.0)
                continue
            if not due:
                due = now + random.random() / pace  # not all at once
            if due > now:
                gevent.sleep(min(due - now, 1.0))
            if due <= time.monotonic() + 0.001 and self.pace() > 0:
                due = max(due + 1 / pace, time.monotonic() - 1 / pace)
                self.publish()

    def publish(self) -> None:
        """Send it, and record what came of it."""
        counts = self.work.counts
        number, user = self.sender.number(self.kind), self.choose()
        outcome, told, problem = UNSURE, _Answered(), ""
        began = time.monotonic()
        if began - self.used > UNUSED:
            self.hang_up()
        self.used = began
        size, sent = 0, counts.clock()
        counts.begun += 1
        try:
            if self.connection is None:
                self.connection = Connection(self.work.target, self.work.asked.clients + number % 60_000, timeout=self.work.patience)
            sent = counts.clock()
            path = self.path.format(id=user)
            answer = self.connection.post(path, body(number, sent, self.work.asked.size), self.work.asked.key)
            size = len(answer.body)
            if answer.status in (200, 201):
                outcome, told = SENT, _answered(answer.body)
                if self.kind == FEED:
                    self.work.followed(told.targets)
            else:
                outcome = REFUSED if answer.status < 500 else UNSURE
                problem = f"answered {answer.status}: {answer.body[:80].decode()}"
        except BROKEN as error:
            problem = f"{type(error).__name__}: {error}"[:120]
            self.hang_up()
        took = (time.monotonic() - began) * 1000
        counts.record(Send(self.kind, outcome, number, user, told.targets, told.delivered or told.subscribers, sent))
        self.environment.events.request.fire(
            request_type="POST", name=self.path.format(id="<id>"), response_time=took, response_length=size,
            exception=RuntimeError(problem) if problem else None, context={},
        )  # fmt: skip

    def hang_up(self) -> None:
        """The next message has a connection of its own."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None


class FriendSender(Publisher):
    """metabrew's msggen: POST /send/<id> to random users and all who follow them."""

    path = "/send/{id}"


class LongTailSender(FriendSender):
    """The same, but a few users send most: the n-th a share of 1/n. The first have the most followers."""

    def choose(self) -> int:
        """Log-uniform."""
        users = self.work.recipients()
        return users[min(len(users), int((len(users) + 1) ** random.random())) - 1]


class DirectSender(Publisher):
    """POST /publish/user:<id>: to one user alone, as often as the shape orders."""

    kind = DIRECT
    path = "/publish/user:{id}"

    def choose(self) -> int:
        """One that has a feed of its own. Raises StopUser where nobody has."""
        if self.work.has_clients:
            return super().choose()
        clients, turns = self.work.asked.clients, self.work.endpoints
        own = [place for place, has in enumerate(masks(turns[:clients])[0]) if has]
        if not own:
            raise StopUser
        return random.randrange(random.choice(own), clients, len(turns))

    def pace(self) -> float:
        """With a shape there are `DIRECT_SENDERS` of them, with a rate of their own."""
        if self.work.by_hand:
            return super().pace()
        return self.work.direct_rate / DIRECT_SENDERS


class EveryoneSender(Publisher):
    """POST /publish/user:everyone: to all clients, one message whenever the master says so."""

    kind = EVERYONE
    path = "/publish/user:everyone"

    def on_start(self) -> None:
        """What was asked for before was another's."""
        super().on_start()
        self.sent = self.work.everyone

    def choose(self) -> int:
        """Nobody in particular."""
        return 0

    @task
    def send(self) -> None:
        """One message, whenever it was asked for. Raises StopUser in a run by hand, where nobody asks."""
        if self.work.by_hand:
            refuse(self, self.work, f"it sends when a shape says so: run one ({SHAPE}), or choose FriendSender or DirectSender")
        while True:
            if self.sent < self.work.everyone:
                self.sent += 1
                self.publish()
            gevent.sleep(0.05)
