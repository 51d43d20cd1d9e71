"""Whose request it is, where proxies stand in front: their word for it, if they are trusted.

A proxy's connection carries one client's request after the other. So it is no client's: it counts for nobody, and a
client counts while a request of its own is under way, as in nginx's limit_conn. Only a list of networks makes a
proxy; without one nothing here is ever called.
"""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from comet.settings import Network


class Proxy(str):
    """The network of a trusted proxy's connection between two requests: its address, which counts for nobody."""

    __slots__ = ()


class Behind(str):
    """The network of a client whose request came through `proxy`; else it is like any other."""

    __slots__ = ("proxy",)
    proxy: Proxy


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@lru_cache(maxsize=4096)
def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 /64, which is what one user is given. One
    string for all its connections."""
    if ":" not in host:
        return host
    address = _address(host)
    if address is None or isinstance(address, ipaddress.IPv4Address):
        return str(address or host)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _address(host: str) -> Address | None:
    """An address, as of a socket or of a header, where a port may follow it; None for anything else."""
    host = host.strip().strip('"')
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        return found.ipv4_mapped
    return found


class Proxies:
    """Those in `networks`."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self.proxy = lru_cache(maxsize=4096)(self._look_up)
        """The network of a connection from this address, if that is a proxy's."""

    def _look_up(self, host: str) -> Proxy | None:
        address = _address(host)
        return Proxy(host) if address is not None and any(address in network for network in self._networks) else None

    def client(self, peer: str, forwarded: str) -> str:
        """The client's address: of X-Forwarded-For, from the right, the first that is no proxy's. What stands left of
        it anybody could have written. A word that is no address ends the search too: who passed it on is all that is
        known."""
        nearest = peer
        for one in reversed(forwarded.split(",")):
            address = _address(one)
            if address is None:
                break
            nearest = str(address)
            if self.proxy(nearest) is None:
                break
        return nearest
