"""What a load test is asked to do: Locust's own flags and these. Neighbours: `loadtest.locustfile`, `loadtest.control`."""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtest.swarm import Target, resolve
from loadtest.verify import SIZE
from loadtest.wire import ENDPOINTS, Endpoint

THEN = ("churn", "search", "broadcast")
"""What may come after the messages."""


@dataclass
class Asked:
    """As `add_flags` has them."""

    clients: int
    friends: str
    message_rate: float
    seconds: float
    senders: int
    open_rate: float
    endpoints: str
    churn: float
    sources: str
    late: float
    nap: float
    size: int
    key: str
    wall_clock: bool
    then: str
    out: str

    @classmethod
    def of(cls, parsed: Any) -> "Asked":
        """Locust's parsed options have these among others."""
        return cls(**{name: getattr(parsed, name) for name in cls.__dataclass_fields__})


def add_flags(parser: Any) -> None:
    """On Locust's parser."""
    add = parser.add_argument
    add("--clients", type=int, default=1000, help="clients in all, and users of the friends' graph (default: 1000)")
    add("--friends", default="", metavar="FILE", help="edge list that the server has loaded: who gets what (default: nobody follows)")
    add("--message-rate", type=float, default=100.0, metavar="R", help="messages a second of all senders together (default: 100)")
    add("--seconds", type=float, default=20.0, metavar="S", help="how long messages are sent (default: 20)")
    add("--senders", type=int, default=1000, metavar="N", help="how many send them (default: 1000)")
    add("--open-rate", type=float, default=15_000.0, metavar="R", help="clients opened a second at most (default: 15000)")
    add(
        "--endpoints", default="test:49,stream:1", metavar="NAME:SHARE,…",
        help=f"what a SwarmUser's clients ask for, of {', '.join(ENDPOINTS)} (default: test:49,stream:1)",
    )  # fmt: skip
    add("--churn", type=float, default=0.001, metavar="SHARE", help="of the clients, leaving and coming back each second (default: 0.001)")
    add("--sources", default="", metavar="ADDRESS,…", help="local addresses to connect from (default on loopback: 127.1.0.1 and on)")
    add(
        "--nap",
        type=float,
        default=0.0,
        metavar="S",
        help="that a process with a SwarmUser rests between two looks: saves cores, and is in latencies (default: 0)",
    )
    add("--late", type=float, default=5.0, metavar="S", help="a message that took longer is a failure (default: 5)")
    add("--size", type=int, default=SIZE, metavar="BYTES", help=f"of a message (default: {SIZE})")
    add("--key", default="", help="the publish key", env_var="COMET_PUBLISH_KEY", is_secret=True)
    add("--wall-clock", action="store_true", help="times by the wall clock: senders and clients are on several machines")
    add("--then", default="", metavar="WHAT,…", help="after the messages: churn, search (the rate raised until p99 passes 1 s), broadcast")
    add("--out", default="", metavar="FOLDER", help="where the master writes its timeline and verdict")


def endpoints(text: str) -> list[Endpoint]:
    """As they take turns, client by client: the shares spread out. Raises ValueError."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        if name not in ENDPOINTS or not (share or "1").isdigit():
            raise ValueError(f"{part!r}: an endpoint is one of {', '.join(ENDPOINTS)}, and a share a number")
        shares[name] = int(share or "1")
    turns: list[tuple[float, str]] = sorted(((at + 0.5) / share, name) for name, share in shares.items() for at in range(share))
    if not turns:
        raise ValueError("no endpoint has a share")
    return [ENDPOINTS[name] for _, name in turns]


def sequels(text: str) -> list[str]:
    """What --then names. Raises ValueError."""
    found = list(filter(None, text.split(",")))
    for one in found:
        if one not in THEN:
            raise ValueError(f"--then {one}: it is of {', '.join(THEN)}")
    return found


def target(host: str | None, sources: str) -> Target:
    """Of Locust's --host and of --sources. Raises ValueError, and OSError where the host has no address."""
    text = host or "127.0.0.1:8000"
    if text.startswith("unix:"):
        raise ValueError(f"--host {text}: a Unix socket is not supported yet, name a host and a port")
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
        port = parts.port or 80
    except ValueError as error:
        raise ValueError(f"--host {text}: {error}; it is a URL such as http://server:8000 or http://[::1]:8000") from None
    if parts.scheme not in ("", "http") or parts.path.strip("/") or parts.query:
        raise ValueError(f"--host {text}: load tests speak plain HTTP, to the root of a server")
    name = parts.hostname or "127.0.0.1"
    found = Target(resolve(name), port, tuple(filter(None, (one.strip().strip("[]") for one in sources.split(",")))), called=name)
    for source in found.sources:
        if ipaddress.ip_address(source).version != (6 if found.family == socket.AF_INET6 else 4):
            raise ValueError(f"--sources {source}: the server is at {found.host}, and addresses to connect from are of its kind")
    return found


def masks(those: Sequence[Endpoint]) -> tuple[list[bool], list[bool]]:
    """Which of them have a feed of their own, and which are on the channel of all."""
    return ["{id}" in one.path for one in those], ["everyone" in one.path for one in those]
