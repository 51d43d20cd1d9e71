"""Clients and publishers for the chaos tests, thousands on one epoll, in a process of its own; and the model that judges
what they are told.

Half of the clients are long polls, half are SSE; each follows one channel and comes back with its cursor, after a
short random time, however it was turned away. Publishers repeat what was not acknowledged, under the same key,
until it is.

The model. A message has one position in an epoch, the same for the acknowledgement and for every client. A client
takes positions one by one: one that it has had is *doubled*, a hole is *lost*, and another epoch without a gap told
before is wrong. At the end it must stand at the head, which the acknowledgements name; what is missing is lost. In a
channel a publisher's messages stand in the order in which it sent them. A router's death makes another epoch: then a
message that was under way may stand in both, and each client is to be told one gap and to get all of the new one.

`tests.behaviour.test_chaos` sends orders, a JSON object a line, and each is answered with one: see `Swarm.obey`.
"""

import errno
import heapq
import os
import random
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import msgspec

from comet.kernel.limits import raise_file_limit

TICK = 0.005
"""Seconds between two looks at what is to be published."""

UNDER_WAY = 200
"""Clients that connect at a time when the swarm begins; later they come as they come."""

PATIENCE = 40.0
"""Seconds after which what was ordered has failed."""

READ_SIZE = 1 << 18

AWAY = frozenset({"backplane-away", "backplane-busy", "backplane-full", "unconfirmed"})
"""Refusals after which the same is sent again."""

NAMES = errno.errorcode

KEY = f"Authorization: Bearer {os.environ['COMET_PUBLISH_KEY']}\r\n" if "COMET_PUBLISH_KEY" in os.environ else ""
"""The header that publishers need where the service has a key."""


class Report(msgspec.Struct):
    """What came of it. Of `due` messages, those of the newest epochs, for all clients together, `lost` did not come."""

    clients: int
    sent: int
    acknowledged: int
    received: int
    due: int
    lost: int
    doubled: int
    gaps: list[int]
    """How many clients were told no gap, one, two, …"""
    covered: int
    """Messages of earlier epochs that clients did not get; each of these was told a gap."""
    twice: int
    """Messages that stand in two epochs."""
    wrong: list[str]
    """What must not be, in words; the first few."""
    outage: float
    """The longest that a client waited for an acknowledged message, in seconds."""
    publishing: float
    """The longest that a publisher waited for an acknowledgement, in seconds."""
    came_back: int
    answers: dict[str, int]
    """What peers met that was not what they wanted."""
    endings: dict[str, int]
    """How connections ended once the swarm was told not to come back."""
    cpu: float
    """Of a core, while it published."""
    late: float
    """The longest that this process was away from its epoll, in seconds."""
    seconds: float
    """It published for so long."""


class PollTold(msgspec.Struct):
    id: str
    data: str


class PollAnswer(msgspec.Struct):
    cursor: str
    gap: bool
    messages: list[PollTold]


class Receipt(msgspec.Struct):
    id: str = ""
    error: str = ""


_poll = msgspec.json.Decoder(PollAnswer).decode
_receipt = msgspec.json.Decoder(Receipt).decode
_json = msgspec.json.Encoder().encode


class Peer:
    """One connection at a time, and what it asks. Subclasses: `request` is what it asks as soon as it is
    connected, `read` takes what has come."""

    def __init__(self, swarm: "Swarm") -> None:
        self.swarm = swarm
        self.sock: socket.socket | None = None
        self.buffer = b""
        self.asking = False
        """A request is under way."""
        self.closing = False
        """The server has said that it will close the connection."""
        self._out = b""
        self._events = 0

    def connect(self) -> None:
        sock = self.sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.swarm.peers[sock.fileno()] = self
        self._events = select.EPOLLIN | select.EPOLLOUT
        self.swarm.epoll.register(sock.fileno(), self._events)
        self.buffer = b""
        self.closing = False
        self._out = self.request()
        error = sock.connect_ex(self.swarm.random.choice(self.swarm.addresses))
        if error not in (0, errno.EINPROGRESS):
            self.end(NAMES[error])

    def send(self, data: bytes) -> None:
        self._out += data
        self._flush()

    def _flush(self) -> None:
        if self.sock is None:
            return
        if self._out:
            try:
                self._out = self._out[self.sock.send(self._out) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self.end(NAMES[error.errno or 0])
                return
        events = select.EPOLLIN | (select.EPOLLOUT if self._out else 0)
        if events != self._events:
            self._events = events
            self.swarm.epoll.modify(self.sock.fileno(), events)

    def on_event(self, event: int) -> None:
        if event & select.EPOLLOUT:
            self._flush()
        if self.sock is None or not event & ~select.EPOLLOUT:
            return
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(NAMES[error.errno or 0])
            return
        if data:
            self.buffer += data
            self.read()
        else:
            self.end("closed")

    def end(self, why: str) -> None:
        """The connection is over; it comes back unless the swarm leaves."""
        if self.sock is None:
            return
        swarm = self.swarm
        del swarm.peers[self.sock.fileno()]
        swarm.epoll.unregister(self.sock.fileno())
        self.sock.close()
        self.sock = None
        clean = why == "closed" and not self.asking
        how = f"{type(self).__name__}: {why}{', with a request under way' if self.asking else ''}"
        if not clean:
            swarm.answers[how] += 1
        if swarm.leaving:
            swarm.endings["clean" if clean else how] += 1
        else:
            swarm.came_back += 1
            swarm.later(swarm.pause(), self.connect)

    def head(self) -> tuple[int, dict[str, str], int] | None:
        """Status, headers and where the body begins, once they are here."""
        at = self.buffer.find(b"\r\n\r\n")
        if at < 0:
            return None
        first, *lines = self.buffer[:at].decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split(" ")[1]), headers, at + 4

    def answer(self) -> tuple[int, bytes] | None:
        """A whole answer that has a length: its status and its body."""
        head = self.head()
        if head is None:
            return None
        status, headers, at = head
        end = at + int(headers["content-length"])
        if len(self.buffer) < end:
            return None
        body, self.buffer = self.buffer[at:end], self.buffer[end:]
        self.asking = False
        if status >= 300:
            self.swarm.answers[f"{type(self).__name__}: {status} {_receipt(body).error}"] += 1
            if status != 503:
                self.swarm.note(f"{self} was answered {status} {body!r}")
        self.closing = headers.get("connection") == "close"
        return status, body

    def request(self) -> bytes:
        raise NotImplementedError

    def read(self) -> None:
        raise NotImplementedError


class Client(Peer):
    """Follows `channel`, and stands at `offset` of `epoch`, once it has begun; `got` counts by epoch."""

    def __init__(self, swarm: "Swarm", channel: str) -> None:
        super().__init__(swarm)
        self.channel = channel
        self.epoch = ""
        self.offset = 0
        self.gaps = 0
        self.got = Counter[str]()

    def __str__(self) -> str:
        return f"{type(self).__name__} of {self.channel} at {self.cursor}"

    @property
    def cursor(self) -> str:
        return f"{self.epoch}-{self.offset}"

    def begins(self, cursor: str) -> None:
        """It is subscribed, and stands there."""
        if not self.epoch:
            self._goes(cursor)
            self.swarm.begun += 1

    def told_gap(self, cursor: str) -> None:
        self.gaps += 1
        self._goes(cursor)
        if self.offset:
            self.swarm.lost += self.offset
            self.swarm.note(f"{self} was told a gap, and not all that is kept follows")

    def _goes(self, cursor: str) -> None:
        epoch, offset = cursor.split("-")
        self.epoch, self.offset = epoch, int(offset)
        self.swarm.is_epoch(self.channel, epoch)

    def takes(self, position: str, data: str) -> None:
        swarm = self.swarm
        swarm.received += 1
        epoch, text = position.split("-")
        offset = int(text)
        if epoch != self.epoch:
            swarm.note(f"{self} got {position}, and no gap was told")
        elif offset <= self.offset:
            swarm.doubled += 1
            swarm.note(f"{self} got {position}")
            return
        elif offset > self.offset + 1:
            swarm.lost += offset - self.offset - 1
            swarm.note(f"{self} got {position}")
        self.epoch, self.offset = epoch, offset
        self.got[epoch] += 1
        number, _, _, channel, _ = data.split(" ", 4)
        if channel != self.channel:
            swarm.note(f"{self} was sent a message of {channel}")
        swarm.stands(channel, position, number)
        acknowledged = swarm.acknowledged.get(number)
        if acknowledged is not None:
            swarm.outage = max(swarm.outage, swarm.now - acknowledged)


class Poller(Client):
    def request(self) -> bytes:
        self.asking = True
        query = f"since={self.cursor}&timeout=25" if self.epoch else "timeout=0.01"  # one that does not wait would make no channel
        return f"GET /poll/{self.channel}?{query} HTTP/1.1\r\nHost: test\r\n\r\n".encode()

    def read(self) -> None:
        answer = self.answer()
        if answer is None:
            return
        status, body = answer
        if status != 200:
            if not self.closing:
                self.end("refused")
            return
        told = _poll(body)
        if told.gap:  # then everything follows that is kept
            epoch, offset = told.cursor.split("-")
            self.told_gap(f"{epoch}-{int(offset) - len(told.messages)}")
        for message in told.messages:
            self.takes(message.id, message.data)
        self.begins(told.cursor)
        if self.cursor != told.cursor:
            self.swarm.note(f"{self} was told the cursor {told.cursor}")
        if not self.closing:  # else the server will close
            self.send(self.request())


class Events(Client):
    def connect(self) -> None:
        self._streaming = False
        self._text = b""
        super().connect()

    def request(self) -> bytes:
        self.asking = True
        last = f"Last-Event-ID: {self.cursor}\r\n" if self.epoch else ""
        return f"GET /events/{self.channel} HTTP/1.1\r\nHost: test\r\n{last}\r\n".encode()

    def read(self) -> None:
        if not self._streaming:
            head = self.head()
            if head is None:
                return
            if head[0] != 200:
                answer = self.answer()
                if answer is not None and not answer[1]:
                    self.end("refused")
                return
            self.buffer = self.buffer[head[2] :]
            self._streaming = True
        at = 0
        while self.asking and (stop := self.buffer.find(b"\r\n", at)) >= 0:
            end = stop + 2 + int(self.buffer[at:stop], 16)
            if len(self.buffer) < end + 2:
                break
            self._text += self.buffer[stop + 2 : end]
            self.asking = end > stop + 2  # the last one is empty
            at = end + 2
        self.buffer = self.buffer[at:]
        *blocks, self._text = self._text.split(b"\n\n")
        for block in blocks:
            self._block(block.decode())

    def _block(self, block: str) -> None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields.get("event") == "gap":
            self.told_gap(fields["id"])
        elif "data" in fields:
            self.takes(fields["id"], fields["data"])
        elif "id" in fields:
            self.begins(fields["id"])


class Message(NamedTuple):
    number: str
    channel: str
    data: str
    sent: float


class Publisher(Peer):
    """Has one request under way at a time, until it is acknowledged."""

    def __init__(self, swarm: "Swarm", name: int) -> None:
        super().__init__(swarm)
        self.name = name
        self.sequence = 0
        self.under_way: Sequence[Message] = ()

    def __str__(self) -> str:
        return f"Publisher {self.name}"

    def publish(self, messages: Sequence[Message]) -> None:
        self.under_way = messages
        if self.sock is None or self.closing:
            return  # the next connection asks for it
        if self._over():  # as any client with kept connections looks before it asks again
            self.end("closed")
        else:
            self.send(self.request())

    def _over(self) -> bool:
        """The server has closed the idle connection."""
        assert self.sock is not None
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing is there to read; or a reset, which sending will meet
            return False

    def request(self) -> bytes:
        those = self.under_way
        self.asking = bool(those)
        if not those:
            return b""
        if len(those) == 1:
            (one,) = those
            target, key, body = f"/publish/{one.channel}", f"Idempotency-Key: {one.number}\r\n", one.data.encode()
        else:
            target, key = "/publish", ""
            body = b"".join(_json({"channel": one.channel, "data": one.data, "key": one.number}) + b"\n" for one in those)
        return f"POST {target} HTTP/1.1\r\nHost: test\r\n{KEY}{key}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def read(self) -> None:
        answer = self.answer()
        if answer is None:
            return
        status, body = answer
        if status < 300:
            left = []
            for message, line in zip(self.under_way, body.splitlines(), strict=True):
                receipt = _receipt(line)
                if receipt.id:
                    self.swarm.acknowledge(message, receipt.id)
                elif receipt.error in AWAY:
                    self.swarm.answers[f"a line of {type(self).__name__}: {receipt.error}"] += 1
                    left.append(message)
                else:
                    self.swarm.note(f"{self} was told {receipt.error}")
            self.under_way = left
            if left:
                self.swarm.later(self.swarm.pause(), self._again)
            else:
                self.swarm.idle.append(self)
        elif not self.closing and not self.swarm.leaving:
            self.swarm.later(self.swarm.pause(), self._again)

    def _again(self) -> None:
        if not self.asking and self.under_way and self.sock is not None:  # else it was asked by a new connection
            self.send(self.request())


class Swarm:
    """`addresses` of the service, each host and port; everything random comes from `seed`."""

    def __init__(self, addresses: Sequence[tuple[str, int]], seed: int) -> None:
        self.addresses = addresses
        self.random = random.Random(seed)
        self.epoll = select.epoll()
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self.peers: dict[int, Peer] = {}
        self.clients: list[Client] = []
        self.channels: list[str] = []
        self.idle: list[Publisher] = []
        self.begun = 0
        self.came_back = 0
        self.leaving = False
        self.now = time.monotonic()
        # what is published
        self._rate = 0.0
        self._padding = ""
        self._last: list[str] = []
        """Channels that are to have one more message."""
        self._numbers = count(1)
        self._sent: dict[str, tuple[int, int]] = {}
        """Message -> its publisher, and which of its messages it is."""
        # the model
        self.acknowledged: dict[str, float] = {}
        self._log: dict[str, dict[str, str]] = {}
        """Channel -> position -> message."""
        self._places: dict[tuple[str, str], str] = {}
        """Message, epoch -> position."""
        self._epochs: dict[str, list[str]] = {}
        """Channel -> those that were told, in order."""
        self._heads: Counter[tuple[str, str]] = Counter()
        """Channel, epoch -> newest offset that was acknowledged."""
        self._wrong: list[str] = []
        self.received = self.lost = self.doubled = 0
        self.outage = self._publishing = self._late = 0.0
        self.answers = Counter[str]()
        self.endings = Counter[str]()
        # the loop
        self._timers: list[tuple[float, int, Callable[[], Any]]] = []
        self._sequence = count()
        self._text = b""
        self._began = self._cpu = self._seconds = 0.0

    # -- orders

    def obey(self, order: dict[str, Any]) -> None:
        """``begin``: `clients` on `channels`, all subscribed; then `publishers` publish `rate` messages of `size`
        bytes a second. ``status``: how many bytes were acknowledged. ``settle``: publish no more but a last
        message a channel, and wait until everything has come. ``leave``: nobody comes back; ``left``: all
        connections have ended. The last three are answered with a report."""
        match order.pop("do"):
            case "begin":
                self._begin(**order)
            case "status":
                self._say({"acknowledged": len(self.acknowledged), "peers": len(self.peers)})
            case "settle":
                self._rate = 0.0
                self._measure()
                self._last = list(self.channels)
                self._wait(self._settled, self.judge)
            case "leave":
                self.leaving = True
                self._say({})
            case "left":
                self._rate = 0.0
                self._measure()
                self._wait(lambda: not self.peers, lambda: self.judge(ended=True))

    def _begin(self, clients: int, channels: int, publishers: int, rate: float, size: int, prefix: str = "c") -> None:
        self.channels = [f"{prefix}{number}" for number in range(channels)]
        self._log = {channel: {} for channel in self.channels}
        self._epochs = {channel: [] for channel in self.channels}
        self.clients = [(Poller, Events)[number // channels % 2](self, self.channels[number % channels]) for number in range(clients)]
        waiting = list(self.clients)

        def more() -> None:
            while waiting and len(self.clients) - len(waiting) - self.begun < UNDER_WAY:
                waiting.pop().connect()
            if waiting:
                self.later(TICK, more)

        def started() -> dict[str, Any]:
            self._rate = rate
            self._padding = "x" * size
            for number in range(publishers):
                publisher = Publisher(self, number)
                publisher.connect()
                self.idle.append(publisher)
            self._began, self._cpu, self._late = time.monotonic(), time.process_time(), 0.0
            self._publish()
            return {"clients": self.begun}

        more()
        self._wait(lambda: self.begun == clients, started)

    def _settled(self) -> bool:
        """All is acknowledged; then a last message a channel is; then all is received."""
        if len(self.acknowledged) < len(self._sent):
            return False
        while self._last and self.idle:
            self._publish_one([self._last.pop()])
        return len(self.acknowledged) == len(self._sent) and all(
            client.epoch == self._epochs[client.channel][-1] and client.offset >= self._heads[client.channel, client.epoch]
            for client in self.clients
        )

    def _wait(self, condition: Callable[[], bool], then: Callable[[], Any]) -> None:
        """Answer with `then` once the condition is true, or when patience has ended."""
        deadline = time.monotonic() + PATIENCE

        def look() -> None:
            if condition() or self.now > deadline:
                self._say(then())
            else:
                self.later(4 * TICK, look)

        look()

    def _measure(self) -> None:
        self._seconds = time.monotonic() - self._began
        self._cpu = (time.process_time() - self._cpu) / self._seconds

    def _say(self, document: Any) -> None:
        os.write(sys.stdout.fileno(), _json(document) + b"\n")

    # -- the model

    def note(self, text: str) -> None:
        """This must not be."""
        if len(self._wrong) < 10:
            self._wrong.append(text)

    def is_epoch(self, channel: str, epoch: str) -> None:
        """Somebody was told of it."""
        if epoch not in self._epochs[channel]:
            self._epochs[channel].append(epoch)

    def stands(self, channel: str, position: str, number: str) -> None:
        """Somebody was told that this message stands there."""
        known = self._log[channel].setdefault(position, number)
        if known != number:
            self.note(f"{channel}: {position} is {known} and {number}")
        place = self._places.setdefault((number, position.split("-")[0]), position)
        if place != position:
            self.doubled += 1
            self.note(f"{channel}: {number} stands at {place} and {position}")

    def acknowledge(self, message: Message, position: str) -> None:
        channel = message.channel
        self.acknowledged[message.number] = self.now
        self._publishing = max(self._publishing, self.now - message.sent)
        self.stands(channel, position, message.number)
        epoch, offset = position.split("-")
        self.is_epoch(channel, epoch)
        self._heads[channel, epoch] = max(self._heads[channel, epoch], int(offset))

    def judge(self, ended: bool = False) -> Report:
        """What is known now; `ended`: nobody was there to get the rest."""
        due = covered = 0
        lost = self.lost
        for channel in self.channels:
            *before, newest = self._epochs[channel]
            head = self._heads[channel, newest]
            kept = sum(position.split("-")[0] != newest for position in self._log[channel])
            for client in self.clients:
                if client.channel == channel:
                    has = client.offset if client.epoch == newest else 0
                    due += has if ended else head
                    covered += kept - sum(client.got[epoch] for epoch in before)
                    if not ended and has < head:
                        lost += head - has
                        self.note(f"{client} has not come to {newest}-{head}")
            self._check_order(channel)
        gaps = Counter(client.gaps for client in self.clients)
        return Report(
            len(self.clients), len(self._sent), len(self.acknowledged), self.received, due, lost, self.doubled,
            [gaps[number] for number in range(max(gaps) + 1)], covered, len(self._places) - len({number for number, _ in self._places}),
            self._wrong, self.outage, self._publishing, self.came_back, dict(self.answers), dict(self.endings), self._cpu, self._late, self._seconds,
        )  # fmt: skip

    def _check_order(self, channel: str) -> None:
        """Each publisher's messages, in the order in which it sent them."""
        newest: dict[tuple[str, int], int] = {}
        log = [
            (epoch, int(offset), number) for (epoch, offset), number in ((key.split("-"), one) for key, one in self._log[channel].items())
        ]
        for epoch, offset, number in sorted(log):
            publisher, sequence = self._sent[number]
            if newest.get((epoch, publisher), 0) >= sequence:
                self.note(f"{channel}: {epoch}-{offset} is number {sequence} of publisher {publisher}, after {newest[epoch, publisher]}")
            newest[epoch, publisher] = sequence

    # -- publishing

    def _publish(self) -> None:
        """What is due, by whoever is free; what is more than they can waits."""
        if not self._rate:
            return
        self.later(TICK, self._publish)
        due = self._rate * (time.monotonic() - self._began)
        while len(self._sent) < due and self.idle:
            several = 1 if self.random.random() < 0.5 else self.random.randint(2, 10)
            self._publish_one(self.random.choices(self.channels, k=several))

    def _publish_one(self, channels: Sequence[str]) -> None:
        publisher = self.idle.pop(self.random.randrange(len(self.idle)))
        if publisher.sock is not None or not self.leaving:
            publisher.publish([self._message(publisher, channel) for channel in channels])

    def _message(self, publisher: Publisher, channel: str) -> Message:
        number = str(next(self._numbers))
        publisher.sequence += 1
        self._sent[number] = publisher.name, publisher.sequence
        return Message(number, channel, f"{number} {publisher.name} {publisher.sequence} {channel} {self._padding}", time.monotonic())

    # -- the loop

    def pause(self) -> float:
        """Seconds before somebody comes back."""
        return self.random.uniform(0.05, 0.25)

    def later(self, seconds: float, work: Callable[[], Any]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), work))

    def run(self) -> None:
        """Until standard input ends."""
        while True:
            events = self.epoll.poll(max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else TICK, 256)
            came = time.monotonic()
            for descriptor, event in events:
                if descriptor == sys.stdin.fileno():
                    data = os.read(descriptor, 65536)
                    if not data:
                        return
                    *lines, self._text = (self._text + data).split(b"\n")
                    for line in lines:
                        self.obey(msgspec.json.decode(line))
                    continue
                peer = self.peers.get(descriptor)
                if peer is not None:  # else it has ended in this turn
                    self.now = time.monotonic()
                    peer.on_event(event)
            self.now = time.monotonic()
            while self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            self._late = max(self._late, time.monotonic() - came)


if __name__ == "__main__":
    raise_file_limit()
    places = [place.rsplit(":", 1) for place in sys.argv[1].split(",")]
    Swarm([(host, int(port)) for host, port in places], int(sys.argv[2])).run()
