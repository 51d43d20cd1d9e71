"""By which names a service may be asked for; what `--hosts` takes, and refuses."""

import pytest

from comet.hosts import EVERY, Hosts
from comet.server.blocks import STAND_INS, judge
from comet.server.posts import Posts
from comet.server.short import Shortcut
from comet.settings import Settings, objection

OWN = [
    "",
    "localhost",
    "localhost:8000",
    "LocalHost.:8000",
    "localhost:",
    "comet.localhost",
    "127.0.0.1:8000",
    "127.0.0.1.",
    "127.8.9.10",
    "192.0.2.1:80",
    "[::1]:8000",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[2001:DB8::7]:8000",
    "[::ffff:127.0.0.1]",
    "[fe80::1%25eth0]:8000",
]
"""What every service answers to: no name that leads elsewhere."""

NEARBY = ["comet:8000", "H", "db-1_a.", "notlocalhost", "xn--bcher-kva", "2130706433", "0x7f000001", "a" * 63]
"""What a service answers to as well if --hosts is empty: no name that a page of the internet has."""

OTHERS = [
    "evil.example",
    "evil.example:8000",
    "EVIL.example.",
    ".",
    ":8000",
    "localhost.evil.example",
    "localhost..",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "127.0.0.1..",
    "127.1",
    "0x7f.0.0.1",
    "127.0.0.256",
    "comet..",
    "comet.local",
    "a b",
    "a%62",
    "b\xfccher",
    "a" * 64,
    "::1",
    "[]",
    "[::1",
    "::1]",
    "[localhost]",
    "[127.0.0.1]",
    "[::1]evil.example",
    "[::1].evil.example",
    "[evil.example]",
    "localhost:80:80",
    "localhost:http",
    "a" * 20_000,
    "1" * 20_000,
    "[" + ":" * 10_000 + "]",
]
"""What a service without a publish key does not answer to, unless --hosts says so."""


@pytest.mark.parametrize("host", OWN)
def test_addresses_and_localhost_are_always_answered(host: str) -> None:
    for hosts in (Hosts(""), Hosts("push.example.org"), Hosts("push.example.org", keyed=True), EVERY):
        assert hosts.allow(host)


@pytest.mark.parametrize("host", NEARBY)
def test_names_without_a_dot_are_answered_unless_some_are_named(host: str) -> None:
    for hosts in (Hosts(""), Hosts(" , "), Hosts("", "push.internal"), Hosts("", keyed=True), EVERY):
        assert hosts.allow(host)
    for hosts in (Hosts("localhost"), Hosts("push.example.org"), Hosts("push.example.org", keyed=True)):
        assert not hosts.allow(host)


@pytest.mark.parametrize("host", OTHERS)
def test_any_other_name_is_not_unless_there_is_a_key_or_all_are(host: str) -> None:
    for hosts in (Hosts(""), Hosts(" , "), Hosts("push.example.org"), Hosts("push.example.org", keyed=True)):
        assert not hosts.allow(host)
    for hosts in (EVERY, Hosts("push.example.org, *"), Hosts("", keyed=True), Hosts(" , ", keyed=True)):
        assert hosts.allow(host)


@pytest.mark.parametrize(
    "written", ["push.example.org", "PUSH.example.org.", " other.example ,push.example.org,", "push.example.org,192.0.2.1"]
)
def test_names_of_the_list_are_answered_with_any_port_case_and_dot(written: str) -> None:
    for hosts in (Hosts(written), Hosts(written, keyed=True)):
        for host in ("push.example.org", "push.example.org:8000", "Push.Example.ORG.", "push.example.org.:443"):
            assert hosts.allow(host)
        for host in ("example.org", "a.push.example.org", "push.example.org.evil.example", "push-example.org", "push.example.org.."):
            assert not hosts.allow(host)


def test_a_name_may_be_international() -> None:
    assert Hosts("Bücher.example").allow("xn--bcher-kva.example:8000")
    assert Hosts("XN--bcher-kva.example").allow("xn--bcher-kva.example")


def test_the_name_that_it_listens_on_is_one_of_its_own() -> None:
    assert Hosts("", "Push.internal").allow("push.internal:8000")
    for listening in ("", "0.0.0.0", "::", "127.0.0.1"):
        assert not Hosts("", listening).allow("push.internal:8000")


@pytest.mark.parametrize(
    "written",
    [
        "https://push.example.org", "push.example.org:443", "push.example.org/", "*.example.org", "[::1]", "::1", "user@push.example.org",
        "a b", "a%b", "straße.example", "127.1", ".", "a..b:", "ü..example",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_at_the_start_with_a_sentence(written: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a host: write it alone") as refused:
        Hosts(f"fine.example,{written}")
    assert str(refused.value).startswith(written)
    assert objection(Settings(hosts=f"fine.example,{written}")) == f"--hosts: {refused.value}"
    assert objection(Settings(hosts="fine.example, *")) is None


@pytest.mark.parametrize("stand_ins", [{}, STAND_INS])
def test_a_block_with_another_host_is_not_learned(stand_ins: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it was learned once, nothing is asked again."""
    hosts = Hosts("")
    shortcut = Shortcut(lambda *asked: asked, stand_ins=stand_ins, hosts=hosts)
    posts = Posts(lambda *asked: lambda: ("200 OK", (), b""), stand_ins=stand_ins, hosts=hosts)

    def taken(host: str) -> tuple[bool, bool]:
        lines = f"HTTP/1.1\r\nHost: {host}\r\n"
        get, post = f"GET /poll/a {lines}\r\n", f"POST /publish/a {lines}Content-Length: 1\r\n\r\nx"
        return shortcut.read(get.encode()) is not None, posts.read(post.encode()) is not None

    for host in OWN[1:] + NEARBY:
        assert taken(host) == (True, True)
    for host in filter(lambda host: len(host) < 1000, OTHERS):
        assert judge("GET", f"Host: {host}\r\n\r\n".encode(), 4096, stand_ins, hosts) is None
        assert taken(host) == (False, False)
    monkeypatch.setattr("comet.server.blocks.split_head", None)
    assert taken("localhost") == taken("[::1]:8000") == (True, True)
