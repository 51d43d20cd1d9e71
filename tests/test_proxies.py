"""Whose word is taken for whose request it is."""

import pytest

from comet.server.proxies import Proxies, network_of
from comet.settings import networks

PROXIES = Proxies(networks("10.0.0.0/8, 192.0.2.7,2001:db8:1::/48"))


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("10.1.2.3", True),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("::ffff:10.1.2.3", True),
        ("2001:db8:1::5", True),
        ("2001:db8:2::5", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_who_is_trusted(host: str, trusted: bool) -> None:
    assert PROXIES.proxy(host) == (host if trusted else None)


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("", "10.0.0.1"),  # nothing said: the proxy itself
        ("198.51.100.1", "198.51.100.1"),
        ("203.0.113.9, 198.51.100.1", "198.51.100.1"),  # what stands left of it anybody could have written
        ("203.0.113.9,198.51.100.1 , 10.0.0.2,192.0.2.7", "198.51.100.1"),  # through three of ours
        ("10.9.9.9, 10.0.0.2", "10.9.9.9"),  # a client within our own network
        ("198.51.100.1:4711", "198.51.100.1"),
        ('"[2001:db8:9::1]:4711"', "2001:db8:9::1"),
        ("2001:db8:9::1", "2001:db8:9::1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("unknown", "10.0.0.1"),
        ("198.51.100.1, unknown, 10.0.0.2", "10.0.0.2"),  # who passed on a word that is no address is all that is known
        ("198.51.100.1,", "10.0.0.1"),
    ],
)
def test_the_right_most_that_is_no_proxy_is_the_client(forwarded: str, client: str) -> None:
    assert PROXIES.client("10.0.0.1", forwarded) == client


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("2001:db8::1%eth0", "2001:db8::/64"),
        ("2001:db8::2", "2001:db8::/64"),
    ],
)
def test_what_counts_as_one_address(host: str, network: str) -> None:
    assert network_of(host) == network


def test_a_list_that_is_none() -> None:
    for text in ("10.0.0.1/8", "example.org", "10.0.0.0/99"):
        with pytest.raises(ValueError):
            networks(text)
