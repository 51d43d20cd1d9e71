"""The hosts of `--hosts`: the names by which a service may be asked for, so that no stranger's name leads to it (DNS rebinding).

A browser takes a page and a service for one if their names are. Whoever owns the name of a page can have it lead to 127.0.0.1, or to a
machine of an inner network, and the page then publishes and reads there as the service's own would. But its browser still says the
name, in Host. An address is no such name: it leads nowhere else. Nor is a name without a dot, such as that of a container or of a machine
nearby. It is looked up in the network where the browser is, or is a top-level domain, of which ICANN lets none have an address (SAC053;
a country's registry may). Settings and server ask this module.
"""

import ipaddress
import re
from typing import Final

from comet.origins import normalized

ALL = "*"
"""Every name."""

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")
_DOTLESS = re.compile(r"[a-z0-9_-]{1,63}")
_NO_NAME = re.compile(r"[\s:/\[\]@*]")


class Hosts:
    """The names of a service, beside addresses and localhost, which every service has. `text` is a comma-separated list of them and
    `listening` the one that it listens on. If the list is empty, a service has all names without a dot as well, and one with a publish
    key (`keyed`) every name. Raises ValueError, with a sentence."""

    def __init__(self, text: str, listening: str = "", *, keyed: bool = False) -> None:
        named = {one.strip() for one in text.split(",")} - {""}
        self._all = ALL in named or (keyed and not named)
        self._nearby = not named
        self._named = frozenset({"localhost", _plain(listening), *map(_named, named - {ALL})}) - {""}

    def allow(self, host: str) -> bool:
        """Return whether requests with this Host header are answered; "" for none, which no browser leaves out.

        The port is not compared: a page can't choose another one than that of the connection.
        """
        if self._all or not host:
            return True
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        if found[1] is not None:
            return _is_address(found[1], ipaddress.IPv6Address)
        name = _plain(found[2])
        if name in self._named or name.endswith(".localhost") or (self._nearby and _DOTLESS.fullmatch(name)):
            return True
        return _is_address(name, ipaddress.IPv4Address)


def _plain(name: str) -> str:
    """Return a name as it is compared: with a dot at its end, it is the same one."""
    return name.lower().removesuffix(".")


def _named(text: str) -> str:
    """Return a name of the list as a browser sends it. Raises ValueError, with a sentence."""
    name = _plain(text)
    try:
        if _NO_NAME.search(name):
            raise ValueError
        return normalized(f"http://{name}").removeprefix("http://")
    except ValueError:
        raise ValueError(
            f"{text} is not the name of a host: write it alone, without scheme, port, path or wildcard, such as push.example.org "
            "(in ASCII, with xn--, if that is not understood); addresses need not be named, and * is every name."
        ) from None


def _is_address(text: str, kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


EVERY: Final = Hosts(ALL)
"""The hosts of a service that has every name."""
