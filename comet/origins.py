"""The web origins of `--origins`: what each may have is written down, and what an answer tells a browser of it (CORS).

A leaf, since settings, handlers and server ask it: a refusal that the server makes by itself has the same headers as an answer
of a handler. A browser sends an origin in one form (lower case, ASCII, without a default port), which is compared as it is;
so what an operator writes is brought into that form at the start, or refused.
"""

import ipaddress
import re
from collections.abc import Sequence

Headers = Sequence[tuple[str, str]]

ALL = "*"
"""Every origin, without credentials."""

_PARTS = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[^\]]*\]|[^\[\]/?#:]*)(?::([0-9]{0,9}))?(/?)", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9._-]{1,253}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_DEVIATIONS = frozenset("ßẞς\u200c\u200d")
"""Characters that IDNA 2003, which Python has, and browsers write in ASCII each in its own way."""

_VARY = ("Vary", "Origin")
_SHOWN = ("Access-Control-Expose-Headers", "Comet-Cursor, Retry-After, X-Request-ID")
_PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET, POST, PUT, DELETE"),
    (
        "Access-Control-Allow-Headers",
        "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-Requested-With",
    ),
    ("Access-Control-Max-Age", "600"),
)


class Origins:
    """The origins that a comma-separated list names; false if it names none. Raises ValueError, with a sentence."""

    def __init__(self, text: str) -> None:
        named = {one.strip() for one in text.split(",")} - {""}
        self._all = ALL in named
        self._named = frozenset(normalized(one) for one in named - {ALL})

    def __bool__(self) -> bool:
        return self._all or bool(self._named)

    def allow(self, origin: str) -> bool:
        """Return whether pages of `origin`, as a browser sends it, may read and publish."""
        return self._all or origin in self._named

    def headers(self, origin: str, *, preflight: bool = False) -> Headers:
        """Return what an answer to a request with this Origin ("" for none) has for a browser and for caches.

        Credentials (cookies of a proxy in front, a client certificate) are allowed to named origins alone: with `*` a browser
        refuses them.
        """
        if not self:
            return ()
        if origin in self._named:
            allowed: Headers = (("Access-Control-Allow-Origin", origin), ("Access-Control-Allow-Credentials", "true"))
        elif self._all and origin:
            allowed = (("Access-Control-Allow-Origin", ALL),)
        else:
            return (_VARY,)
        return (_VARY, *allowed, _SHOWN, *(_PREFLIGHT if preflight else ()))


def is_own(origin: str, host: str, scheme: str = "") -> bool:
    """Return whether `origin` is that of the pages at `host`, a Host header. `scheme` is http or https if it is known which of them the
    client speaks; if it is not, either will do: whoever ends TLS in front may not say so.
    """
    schemes = (scheme.lower(),) if scheme.lower() in _DEFAULT_PORTS else tuple(_DEFAULT_PORTS)
    return any(origin == _at(one, host) for one in schemes)


def _at(scheme: str, host: str) -> str | None:
    """Return the origin of pages at `host`; None if no page can be there."""
    try:
        return normalized(f"{scheme}://{host}")
    except ValueError:
        return None


def normalized(text: str) -> str:
    """Return an origin as a browser sends it. Raises ValueError, with a sentence, for what no browser sends."""
    if text.lower() == "null":
        raise ValueError("null is sent by sandboxed frames and local files, so by anybody's page; say * to let every page in.")
    found = _PARTS.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no origin: it is a scheme, a host and perhaps a port, without a path, such as https://example.org.")
    scheme, host = found[1].lower(), found[2]
    if "*" in host:
        raise ValueError(f"{text} has a wildcard, which is not supported: name each origin, or say * for all.")
    host = _ipv6(text, host) if host.startswith("[") else _name(text, host)
    port = int(found[3]) if found[3] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{text} has no port from 1 to 65535.")
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{port}"


def _name(text: str, host: str) -> str:
    """A name in lower-case ASCII, or an IPv4 address."""
    if not host.isascii():
        host = _in_ascii(text, host)
    host = host.lower()
    if not _HOST.fullmatch(host):
        raise ValueError(f"{text} has no host that a browser could be at: it is letters, digits, dots and hyphens, or an address.")
    if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):  # then a browser takes all of it for an IPv4 address
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(f"{text} has an IPv4 address that is not four numbers from 0 to 255, as in 192.0.2.1.") from None
    return host


def _in_ascii(text: str, host: str) -> str:
    """An international name in Punycode, where IDNA 2003 and browsers (UTS 46) agree what that is."""
    import stringprep  # with its tables: only for those who have such an origin

    if not _DEVIATIONS & set(host) and not any(map(stringprep.in_table_a1, host)):
        try:
            return host.encode("idna").decode()
        except UnicodeError:
            pass  # an empty or long label, or characters that no name has
    raise ValueError(f"{text} has a host that can't be written in ASCII here: write it as location.origin has it in a browser, with xn--.")


def _ipv6(text: str, host: str) -> str:
    """An IPv6 address as the WHATWG URL standard writes it: compressed, and never with an IPv4 address at its end."""
    try:
        address = ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        address = None
    if address is None or address.scope_id is not None:
        raise ValueError(f"{text} has no IPv6 address in its brackets; they hold one, without a zone.")
    if address.ipv4_mapped is not None:  # which newer versions of Python write with dots
        low = int(address) & 0xFFFFFFFF
        return f"[::ffff:{low >> 16:x}:{low & 0xFFFF:x}]"
    return f"[{address.compressed}]"
