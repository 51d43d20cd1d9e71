"""Connecting to Redis: what a URL says, and the first words on a connection.

Neighbours: `comet.backplane.redis_link`, whose connections these are, and `comet.backplane.redis_shards`. URLs are
those of redis-py, and ``redis+cluster://`` or ``rediss+cluster://`` for a cluster; its rules for them are used
(`redis.connection.parse_url`), its connections are not: a link reads and writes by itself.
"""

import errno
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import gevent
import hiredis
from gevent import socket, ssl
from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url

CLUSTER: Final = "+cluster"

_SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")

_OPTIONS: Final = frozenset(
    {"host", "port", "db", "username", "password", "path", "connection_class", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile",
     "ssl_cert_reqs", "ssl_check_hostname"}
)  # fmt: skip
"""What a URL may say."""

LATER: Final = ("LOADING", "MASTERDOWN", "BUSY", "ERR max number of clients")
"""How the errors begin of a server that will take us, but not now."""

NOTHING: Final = object()
"""What a reader answers when there is no whole reply."""

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


class Denied(Exception):
    """Redis does not let us in: no restart of it will help."""


class Target(NamedTuple):
    """What a URL says."""

    address: Address
    cluster: bool
    database: int
    username: str
    password: str
    tls: ssl.SSLContext | None


def title(address: Address) -> str:
    """Return how a server is called in the log: by its host and port, or its path. Never with what lets us in."""
    if isinstance(address, str):
        return f"Redis {address}"
    host, port = address
    return f"Redis [{host}]:{port}" if ":" in host else f"Redis {host}:{port}"


def service_title(target: Target) -> str:
    """Return how all that a URL leads to is called in the log."""
    return f"the cluster of {title(target.address)}" if target.cluster else title(target.address)


def reason(error: BaseException) -> str:
    """Return why a connection failed, without the number of the error."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def stranger(error: hiredis.ProtocolError) -> str:
    """Return why a server is none: what it says is not the protocol of Redis."""
    return f"it does not speak the protocol of Redis: {error}"


def split(url: str) -> tuple[bool, str]:
    """Whether it is of a cluster, and the same for one server."""
    scheme, _, rest = url.partition(":")
    return scheme.endswith(CLUSTER), f"{scheme.removesuffix(CLUSTER)}:{rest}"


def read(url: str) -> Target:
    """Raises ValueError with a sentence."""
    if url.partition("://")[0] not in _SCHEMES:
        raise ValueError(f"it begins with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}")
    cluster, plain = split(url)
    try:
        urlsplit(plain).port  # noqa: B018 - it raises, and says in full what may be the end of a password
    except ValueError:
        raise ValueError(
            "the port is no number; where a password has one of : / ? # @ [ ] it is written %3A %2F %3F %23 %40 %5B %5D"
        ) from None
    options: dict[str, Any] = parse_url(plain)  # type: ignore[no-untyped-call]
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} can't be said in the URL of Redis; known are {', '.join(sorted(_OPTIONS - {'connection_class'}))}"
        )
    kind = options.get("connection_class")
    database = int(options.get("db") or 0)
    if cluster and database:
        raise ValueError("a cluster of Redis has the database 0 alone")
    try:
        tls = _context(options) if kind is SSLConnection else None
    except OSError as error:  # ssl.SSLError is one: what is in the file is no certificate, or no key
        files = [f"{name}={options[name]}" for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if name in options]
        raise ValueError(f"the files of {' and '.join(files)} can't be used: {reason(error)}") from None
    address: Address = (options.get("host", "127.0.0.1"), int(options.get("port") or 6379))
    if kind is UnixDomainSocketConnection:
        if not options.get("path"):
            raise ValueError("a unix:// URL has a path")
        address = options["path"]
    return Target(address, cluster, database, options.get("username") or "", options.get("password") or "", tls)


def _context(options: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if "ssl_certfile" in options:
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    if str(options.get("ssl_check_hostname", "true")).lower() in ("false", "0", "no"):
        context.check_hostname = False
    if options.get("ssl_cert_reqs", "required") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Connection:
    """An open one, and what reads its replies."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.reader = hiredis.Reader(notEnoughData=NOTHING)

    def exchange(self, commands: Sequence[Sequence[Any]], timeout: float) -> list[Any]:
        """Ask all and wait; an error is raised. Raises OSError, also where what answers is no Redis, and hiredis.ReplyError."""
        replies: list[Any] = []
        with gevent.Timeout(timeout, TimeoutError(f"no answer within {timeout:g} s")):
            self.sock.sendall(b"".join(hiredis.pack_command(tuple(command)) for command in commands))
            while len(replies) < len(commands):
                try:
                    reply = self.reader.gets()
                except hiredis.ProtocolError as error:
                    raise ConnectionError(stranger(error)) from error
                if reply is NOTHING:
                    data = self.sock.recv(1 << 16)
                    if not data:
                        raise ConnectionResetError("it closed the connection")
                    self.reader.feed(data)
                elif isinstance(reply, hiredis.ReplyError):
                    raise reply
                else:
                    replies.append(reply)
        return replies

    def close(self) -> None:
        """For good."""
        self.sock.close()


def dial(target: Target, address: Address, timeout: float, name: str) -> Connection:
    """Connect and say hello, each within `timeout`. Raises OSError where nobody is there, or not yet;
    Denied where there is no use."""
    clock = gevent.Timeout(timeout)  # no OSError, after which the next address of the host would be tried without an end
    try:
        with clock:
            sock = _connect(target, address)
    except gevent.Timeout as error:
        if error is not clock:
            raise
        raise TimeoutError(f"no connection within {timeout:g} s") from None
    connection = Connection(sock)
    try:
        _greet(connection, target, timeout, name)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(target: Target, address: Address) -> Any:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
    else:
        try:
            sock = socket.create_connection(address)
        except RuntimeError as error:  # the look-up of a name takes a thread, and the kernel gives none: as good as away
            raise OSError(errno.EAGAIN, str(error)) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if target.tls is None:
        return sock
    try:
        return target.tls.wrap_socket(sock, server_hostname=address[0] if not isinstance(address, str) else None)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Denied(f"The certificate of Redis can't be trusted ({error.verify_message}); name its issuer with ?ssl_ca_certs=.") from error
    except BaseException:
        sock.close()
        raise


def _greet(connection: Connection, target: Target, timeout: float, name: str) -> None:
    hello: list[Any] = ["HELLO", "3"]
    if target.password or target.username:
        hello += ["AUTH", target.username or "default", target.password]
    try:
        connection.exchange([[*hello, "SETNAME", name]], timeout)
        if target.database:
            connection.exchange([["SELECT", target.database]], timeout)
    except hiredis.ReplyError as error:
        said = str(error).split(", with args")[0]  # an old one says all of them again, with the password
        if said.startswith(("WRONGPASS", "NOAUTH", "NOPERM")):
            raise Denied(f"Redis does not let us in ({said}); set its user and password in the URL of --backplane.") from error
        if said.startswith(LATER):
            raise ConnectionRefusedError(said) from error
        raise Denied(f"Redis does not take our first words ({said}); it must be Redis 6.2 or Valkey, or newer.") from error
