"""Every knob, in one frozen dataclass: its unit, its default and the reason for it.

Values come from flags (``--max-body 1000``) and, below them, from the environment
(``COMET_MAX_BODY=1000``). `--help` is made from this file, so it can't be out of date.
"""

import argparse
import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comet.arguments import Parser, meant
from comet.hosts import Hosts
from comet.origins import Origins

AUTO = -1
"""`Settings.workers` for a number that fits."""

WRONG = 2
"""The exit status of a service whose settings are wrong. deploy/comet.service knows it: systemd does not try again."""

PREFIX = "COMET_"
"""How the name of each variable begins."""

NO_SETTINGS = frozenset({"COMET_SHAPE", "COMET_CHAOS", "COMET_CHAOS_SEED", "COMET_SEEDS", "COMET_FULL"})
"""Variables of the load test and the tests: a service that is started beside them inherits them."""


BATCH_ANSWER = 8 << 20
"""Bytes of room for the answer to a batch of the most lines: a refusal a line."""

DAY, YEAR = 86_400.0, 31_536_000.0
"""The most seconds that anything waits, and that anything is kept. Far beyond what makes sense, and what timers and socket options hold."""

_VISIBLE = re.compile(r"[!-~]+")
"""A word of visible ASCII characters."""


def _knob(default: Any, unit: str, reason: str, least: float = 0, most: float | None = None, words: Mapping[str, Any] | None = None) -> Any:
    if unit == "seconds" and most is None:
        most = DAY
    meta = {"unit": unit, "reason": reason, "least": least, "most": most, "words": words or {}}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True)
class Settings:
    """See `--help`: every field is a flag of the same name."""

    host: str = _knob(
        "127.0.0.1",
        "name or address",
        "Where to listen; an IPv6 address with or without brackets. Beyond loopback a publish key is asked for, or --open.",
    )
    port: int = _knob(8000, "port", "0 takes a free one and prints it.", most=65535)
    publish_key: str = _knob("", "secret", "Bearer key for POST, PUT, DELETE and /stats. Better in COMET_PUBLISH_KEY: flags show in ps.")
    publish_key_file: str = _knob(
        "",
        "file",
        "Holds the publish key instead: a file of the service's own, such as a credential of systemd (deploy/). Read at a reload too.",
    )
    open: bool = _knob(False, "switch", "Allow listening beyond loopback without a publish key.")
    origins: str = _knob(
        "",
        "origins, comma-separated",
        "Web origins whose pages may read and publish (CORS), with credentials, such as https://example.org: scheme, host and perhaps "
        "port. * is all, without credentials.",
    )
    hosts: str = _knob(
        "",
        "names, comma-separated",
        "Names by which the service may be asked for (Host), beside addresses and localhost, such as push.example.org; any other is "
        "refused. Without this, all names with a publish key, and those without a dot where there is none. * is all.",
    )
    workers: int = _knob(
        0,
        "processes, or auto",
        "Worker processes behind the one address, with a router between them; 0 is one process alone. auto: one a core, "
        "and as many as --clients needs.",
        most=1000,
        words={"auto": AUTO},
    )
    clients: int = _knob(
        0, "clients", "What the service is to hold: auto plans for it, and start-up says what to set if it does not fit.", most=1 << 30
    )
    hang_limit: float = _knob(
        30.0,
        "seconds",
        "A process that shows no sign of life for so long is killed and replaced; a new generation has twice that to get ready.",
        least=2,
    )
    renew_router: bool = _knob(
        False,
        "switch",
        "Let a reload to code that speaks otherwise than the router start another router: what is kept goes, and everybody is told one "
        "gap. Without it, or if that one can't be started, such a reload fails, and the service goes on as it is.",
    )
    grace: float = _knob(10.0, "seconds", "From SIGTERM to the exit at the latest: time for answers under way.")

    data: str = _knob(
        "",
        "folder",
        "Where the subscriptions are kept, for the service's user alone (mode 0700, the file 0600). Without it they last as long as "
        "the service: a file that is removed at its end.",
    )

    backplane: str = _knob(
        "",
        "URL",
        "Redis, where several machines are one service: redis://, rediss:// or unix://, redis+cluster:// for a cluster. Without it "
        "this machine is alone. Better in COMET_BACKPLANE: flags show in ps, and the URL has the password.",
    )
    backplane_file: str = _knob(
        "",
        "file",
        "Holds the URL of --backplane instead: a file of the service's own, such as a credential of systemd (deploy/). Read at a reload "
        "too.",
    )
    redis_prefix: str = _knob(
        "c:",
        "text",
        "Before all keys and channels in Redis: two services on one Redis, on two databases as well, need two. Short, as it is kept "
        "twice a channel.",
    )
    redis_connect_timeout: float = _knob(
        1.0, "seconds", "A connection to Redis, and its first answer: far above a round trip, below --backplane-timeout.", least=0.05
    )
    redis_timeout: float = _knob(
        3.0,
        "seconds",
        "Redis that leaves a question unanswered so long is gone: connect anew. Above its slowest command, below --backplane-timeout.",
        least=0.1,
    )
    redis_replicas: int = _knob(
        0, "replicas", "So many must have a publication before it is acknowledged (WAIT); else 503, outcome unknown.", most=10
    )
    redis_replicas_timeout: float = _knob(1.0, "seconds", "How long to wait for them; below --backplane-timeout.", least=0.01)
    redis_pool: int = _knob(
        8, "connections a process", "For look-ups of subscriptions, each a round trip; messages have one of their own.", least=1, most=1000
    )

    hibernate: bool = _knob(True, "switch", "Clients sleep without a greenlet; off keeps one for each (make bench measures both).")
    send_buffer: int = _knob(
        16384, "bytes", "Kernel buffer a connection for what a client has not read (0: the kernel's own sizing).", most=1 << 26
    )
    busy_send_buffer: int = _knob(
        65536,
        "bytes",
        "The same while a client takes more than --send-buffer holds, in a replay or a busy stream (0: as --send-buffer).",
        most=1 << 26,
    )

    max_connections: int = _knob(0, "connections", "The process's limit; 0 takes what its limit on open files allows.", most=1 << 30)
    max_per_address: int = _knob(
        5000,
        "connections",
        "One IPv4 address or IPv6 /64, in all workers (a tenth or one a worker more). Behind a proxy set --trusted-proxies, or all clients "
        "share one.",
        least=1,
    )
    max_new_channels: int = _knob(
        100_000,
        "channels",
        "Those that nobody has published to, which one address may come to within --linger, in each worker: each takes memory until it is "
        "over. Who comes back to one is not counted.",
        least=1,
    )
    trusted_proxies: str = _knob(
        "",
        "networks, comma-separated",
        "Proxies whose X-Forwarded-For, X-Forwarded-Proto and X-Request-ID are believed, such as 127.0.0.1,10.0.0.0/8: the client is "
        "the right-most address there that is none of them.",
    )
    max_header: int = _knob(16384, "bytes", "Request line and headers; browsers stay below 8 KiB.", least=512, most=1 << 20)
    max_body: int = _knob(65536, "bytes", "One message. Larger things are better pushed as a link.", least=1, most=1 << 26)
    max_batch: int = _knob(8 << 20, "bytes", "One POST /publish, which is held in memory.", least=1, most=1 << 30)
    max_bodies: int = _knob(
        64 << 20,
        "bytes",
        "All bodies under way together, in each process, beyond the first 16,384 of each: a body for which there is no room is refused. At "
        "least --max-body, and 8 MiB more than --max-batch: the answer to a batch counts too.",
        least=1,
    )
    header_timeout: float = _knob(
        10.0, "seconds", "From a request's first byte to its blank line: who drips headers holds a descriptor.", least=0.1
    )
    body_timeout: float = _knob(30.0, "seconds", "From the blank line to the body's end; to the next 16 KiB of POST /follows.", least=0.1)
    idle_timeout: float = _knob(
        75.0, "seconds", "A kept-alive connection without a request; above the 60 s that proxies keep theirs.", least=0.1
    )
    send_timeout: float = _knob(30.0, "seconds", "A client that takes nothing for so long is closed; it resumes by its cursor.", least=0.1)
    backlog: int = _knob(
        1 << 20,
        "bytes",
        "Messages that may wait for one client that has taken nothing for five seconds; beyond it is closed and resumes by its cursor.",
        least=1024,
    )
    busy_backlog: int = _knob(
        16 << 20,
        "bytes",
        "The same, for a minute, for a client that keeps taking: a whole batch (--max-batch) and what its framing adds. Waiting "
        "messages are shared by all who wait for them.",
        least=1024,
    )

    replay_bytes: int = _knob(
        64 << 20,
        "bytes",
        "History that a worker holds for clients which catch up: pages that they have not taken yet (near the bound pages are smaller, at "
        "it 4 KiB, or a message, each), and, a quarter of it, pages for others at the same place.",
    )

    log: str = _knob("plain", "plain or json", "json is an object a line, tracebacks included.")
    log_clients: bool = _knob(
        False, "switch", "A line for each refusal and each subscriber that ends, with its request's id, address and reason."
    )

    history_size: int = _knob(1000, "messages a channel", "What a client that comes back can catch up on.")
    history_age: float = _knob(300.0, "seconds", "Kept no longer than this.", most=YEAR)
    history_bytes: int = _knob(256 << 20, "bytes in all", "Beyond it the channel least recently used forgets its oldest first.")
    linger: float = _knob(
        60.0, "seconds", "A channel without subscribers keeps its place and history so long: a poller is away between polls.", most=YEAR
    )
    max_idle: int = _knob(
        1_000_000,
        "channels",
        "Channels without subscribers that linger at most; beyond it the longest idle are forgotten early. So many that never had a "
        "message linger besides, so that listening pushes out no history.",
        least=1,
    )
    backplane_timeout: float = _knob(
        5.0, "seconds", "A request waits so long for the process that orders messages; then 503. A restart of it takes a second.", least=0.1
    )
    key_age: float = _knob(300.0, "seconds", "A repeated Idempotency-Key is recognized so long.", most=YEAR)
    max_keys: int = _knob(100_000, "keys", "Idempotency keys remembered at most; the oldest go first.")

    poll_timeout: float = _knob(30.0, "seconds", "A poll without ?timeout= waits so long; proxies often cut at 60.", most=300)
    heartbeat: float = _knob(
        40.0,
        "seconds",
        "Silence on /events and /stream before a heartbeat, which is at most 2 s late; event-source-polyfill drops a stream after 45 s, "
        "proxies after 60. A worker writes clients / heartbeat of them a second.",
        least=0.1,
    )
    retry: int = _knob(2000, "milliseconds", "What an EventSource is told to wait before it reconnects.")
    events_end: str = _knob(
        "orderly",
        "orderly or abort",
        "How /events ends when the service stops, and a refusal that passes. abort leaves the body incomplete: clients that give up at "
        "an orderly end (docs/clients.md) come back from that by themselves.",
    )


def objection(settings: Settings, hosts: Sequence[str] = ()) -> str | None:
    """Why a service must not run with these, or None. `hosts` are the addresses that it listens on where those are
    not `settings.host`."""
    if settings.log not in ("plain", "json"):
        return f"--log is plain or json, not {settings.log}."
    if settings.events_end not in ("orderly", "abort"):
        return f"--events-end is orderly or abort, not {settings.events_end}."
    if settings.publish_key and not _VISIBLE.fullmatch(settings.publish_key):
        return "--publish-key has to be visible ASCII characters without a space: nobody could send another in a header."
    largest = max(settings.max_body, settings.max_batch + BATCH_ANSWER)
    if settings.max_bodies < largest:
        return f"--max-bodies is {settings.max_bodies}, less than one body may need (--max-body, --max-batch): set it to {largest} or more."
    try:
        networks(settings.trusted_proxies)
    except ValueError as error:
        return f"--trusted-proxies are addresses and networks, separated by commas: {error}."
    try:
        Origins(settings.origins)
    except ValueError as error:
        return f"--origins: {error}"
    try:
        Hosts(settings.hosts)
    except ValueError as error:
        return f"--hosts: {error}"
    for host in hosts or (settings.host,):
        loopback = host in ("localhost", "::1") or host.startswith("127.")
        if not settings.publish_key and not settings.open and not loopback:
            return f"{host} is not loopback: anybody there could publish. Set COMET_PUBLISH_KEY or --publish-key-file, or say --open."
    return None


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(text: str) -> tuple[Network, ...]:
    """Of a list such as 127.0.0.1,10.0.0.0/8. Raises ValueError."""
    return tuple(ipaddress.ip_network(one.strip()) for one in text.split(",") if one.strip())


class Unreadable(Exception):
    """A file that a setting names has not what it should have; a sentence says what."""


def with_secrets(settings: Settings) -> Settings:
    """Return the settings with the publish key and the URL of Redis from their files, if they are in files. Raises Unreadable."""
    return _from_file(_from_file(settings, "publish_key", "publish key"), "backplane", "URL of Redis")


def _from_file(settings: Settings, name: str, what: str) -> Settings:
    flag = flag_of(name)
    path = getattr(settings, f"{name}_file")
    if not path:
        return settings
    if getattr(settings, name):
        raise Unreadable(f"there is a {what} and a file for it: set {flag} or {flag}-file, not both.")
    found: dict[str, Any] = {name: read_secret(Path(path), f"{flag}-file", what)}
    return dataclasses.replace(settings, **found)


def read_secret(path: Path, flag: str, what: str) -> str:
    """Return the one line of a file that `flag` names; `what` says what it holds. Raises Unreadable."""
    try:
        text = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise Unreadable(f"the {what} can't be read: {error}. {flag} names a file that the service may read.") from None
    if not _VISIBLE.fullmatch(text):
        raise Unreadable(f"{path} holds no {what}: it has to be one line of printable ASCII without spaces.")
    return text


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def number(value: float) -> str:
    """Return a number as a person writes it: whole where it is, and never with an exponent."""
    return f"{value:.0f}" if value == int(value) else f"{value:.6f}".rstrip("0")


def shown(value: Any) -> str:
    """Return a default as `--help` shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (value or "none") if isinstance(value, str) else number(value)


def parse(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from flags and COMET_* variables. Exits with status 2 and a sentence on a bad one."""
    parser = Parser(
        prog="app.py",
        description="comet: pushes messages to very many HTTP clients, by long poll, stream and server-sent events.",
        epilog="Each flag is also an environment variable: --max-body is COMET_MAX_BODY. A flag wins.",
    )
    for field in dataclasses.fields(Settings):
        flag = flag_of(field.name)
        meta = field.metadata
        text = f"[{meta['unit']}] {meta['reason']} (default: {shown(field.default)})".replace("%", "%%")
        variable = variable_of(field.name)
        given = environ.get(variable)
        kind: Any = type(field.default)
        convert = _switch if kind is bool else _checked(kind, meta["least"], meta["most"], meta["words"])
        default = field.default if given is None else _of_variable(parser, f"{variable} ({flag})", given, convert)
        if kind is bool:
            parser.add_argument(flag, type=convert, nargs="?", const=True, metavar="on|off", default=default, help=text)
        else:
            parser.add_argument(flag, type=convert, metavar="TEXT" if kind is str else "N", default=default, help=text)
    parsed = parser.parse_args(arguments)
    try:
        parsed.host = _host(parsed.host)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--host: {error}")
    _refuse_unknown(parser, environ)
    return Settings(**vars(parsed))


def _host(text: str) -> str:
    """A name or an address to listen on; an IPv6 address without the brackets that it has in a URL."""
    if text.startswith(("unix:", "/")):
        raise argparse.ArgumentTypeError(f"{text!r} is a Unix socket, which is not supported yet: name a host or an address")
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


_SERVICE_HOST = re.compile(r"(COMET(?:_[A-Z0-9_]+)?)_SERVICE_HOST")
"""What Kubernetes sets in each pod for a service whose name begins with comet, beside others (`_of_kubernetes`)."""


def _of_kubernetes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return how the names of variables begin that Kubernetes has set for its services, and nobody for this one."""
    found = [match[1] for name in environ if (match := _SERVICE_HOST.fullmatch(name))]
    return tuple(f"{name}_{what}" for name in found for what in ("SERVICE_", "PORT"))


def _refuse_unknown(parser: Parser, environ: Mapping[str, str]) -> None:
    """Exit with status 2 and a sentence if a COMET_* variable is none of ours: a name mistyped would be a limit that is not set."""
    known = {variable_of(field.name) for field in dataclasses.fields(Settings)}
    foreign = _of_kubernetes(environ)
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known and name not in NO_SETTINGS and not name.startswith(foreign):
            parser.error(f"the variable {name} is not known{meant(name, known, PREFIX)}")


def _of_variable(parser: Parser, name: str, text: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        hint = "; Kubernetes sets it for a service called comet, unless enableServiceLinks is false" if "://" in text else ""
        parser.error(f"{name}: {error}{hint if name.startswith('COMET_PORT ') else ''}")


def _switch(text: str) -> bool:
    known = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False, "": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not on or off")
    return known[text.lower()]


def _checked(kind: type, least: float, most: float | None, words: Mapping[str, Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if text in words:
            return words[text]
        try:
            value = kind(text)
        except ValueError:
            wanted = " or ".join((f"a {'whole ' if kind is int else ''}number", *words))
            raise argparse.ArgumentTypeError(f"{text!r} should be {wanted}") from None
        if kind is not str and not (value >= least and (most is None or value <= most)):
            bounds = f"at least {number(least)}" if most is None else f"within {number(least)} to {number(most)}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return convert
