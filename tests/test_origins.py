"""What `--origins` takes, brings into a browser's form, or refuses; and the headers for one origin."""

import random
import time

import pytest

from comet.origins import Origins, normalized
from comet.server.http import origin_in
from comet.settings import Settings, objection


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example/", "https://a.example"),
        ("HTTPS://A.Example", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("https://a.example:0443/", "https://a.example"),
        ("https://a.example:", "https://a.example"),
        ("https://a.example:80", "https://a.example:80"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("http://localhost:5173", "http://localhost:5173"),
        ("https://a.example.", "https://a.example."),  # another origin than without the dot, to a browser too
        ("https://my_host-1.example", "https://my_host-1.example"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[0:0:0:0:0:0:0:1]:80", "http://[::1]"),
        ("https://[2001:DB8:0:0:1:0:0:1]", "https://[2001:db8::1:0:0:1]"),
        ("https://[::ffff:127.0.0.1]", "https://[::ffff:7f00:1]"),
        ("https://[::ffff:0.0.0.1]", "https://[::ffff:0:1]"),
        ("https://BÜCHER.example", "https://xn--bcher-kva.example"),
        ("https://日本語。jp:8443", "https://xn--wgv71a119e.jp:8443"),
        ("https://XN--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
    ],
)
def test_an_origin_is_compared_in_the_form_that_browsers_send(written: str, sent: str) -> None:
    assert normalized(written) == sent
    assert normalized(sent) == sent
    origins = Origins(f" {written} ,, https://other.example")
    assert origins
    assert origins.allow(sent)
    assert not origins.allow(sent + ".evil.example")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("a.example", "a scheme, a host"),
        ("//a.example", "a scheme, a host"),
        ("https:a.example", "a scheme, a host"),
        ("https:/a.example", "a scheme, a host"),
        ("https://a.example/app", "without a path"),
        ("https://a.example//", "without a path"),
        ("https://a.example?x", "without a path"),
        ("https://a.example#x", "without a path"),
        ("https://*.example", "wildcard"),
        ("*.example", "a scheme, a host"),
        ("https://a.example:*", "a scheme, a host"),
        ("https://", "no host"),
        ("file:///", "no host"),
        ("https://user@a.example", "no host"),
        ("https://a b", "no host"),
        ("https://a%2fb", "no host"),
        ("https://a.example:0", "no port"),
        ("https://a.example:65536", "no port"),
        ("https://a.example:" + "9" * 5000, "a scheme, a host"),
        ("https://127.1", "IPv4"),
        ("https://127.0.0.256", "IPv4"),
        ("https://0x7f.0.0.1", "IPv4"),
        ("https://1.2.3.4.", "IPv4"),
        ("https://[::1", "a scheme, a host"),
        ("https://[]", "IPv6"),
        ("https://[::1%25lo]", "IPv6"),
        ("https://[127.0.0.1]", "IPv6"),
        ("https://straße.example", "xn--"),  # two names: one to IDNA 2003, one to browsers
        ("https://ბ\u1c90.example", "xn--"),  # newer than the tables of IDNA 2003
        ("https://ü..example", "xn--"),
        ("https://ü\uff0a.example", "no host"),  # which becomes *
        ("null", "every page"),
        ("NULL", "every page"),
    ],
)
def test_what_no_browser_would_send_is_refused_at_the_start_with_a_sentence(written: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as refused:
        normalized(written)
    assert told in str(refused.value)
    assert written in str(refused.value) or written == "NULL"
    sentence = objection(Settings(origins=f"https://fine.example,{written}"))
    assert sentence == f"--origins: {refused.value}"
    assert sentence.endswith(".")


@pytest.mark.parametrize("written", ["", ",", " , "])
def test_nothing_named_is_no_cors(written: str) -> None:
    origins = Origins(written)
    assert not origins
    assert not origins.allow("https://a.example")
    assert origins.headers("https://a.example", preflight=True) == ()


def test_credentials_are_for_named_origins_and_never_with_a_star() -> None:
    origins = Origins("https://a.example, *")
    named, other = dict(origins.headers("https://a.example")), dict(origins.headers("https://b.example"))
    assert (named["Access-Control-Allow-Origin"], named["Access-Control-Allow-Credentials"]) == ("https://a.example", "true")
    assert other["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in other
    assert dict(origins.headers("null"))["Access-Control-Allow-Origin"] == "*"
    for origin in ("", "https://b.example", "https://A.example", "null"):
        assert origins.headers(origin)[0] == ("Vary", "Origin")
        assert Origins("https://a.example").headers(origin, preflight=True) == (("Vary", "Origin"),)


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\nOrigin: https://a.example\r\nX: " + b"y" * 50 + b"\r\n\r\n"


def test_an_origin_is_found_in_a_head_that_was_refused_or_cut() -> None:
    assert origin_in(HEAD) == origin_in(bytearray(HEAD)) == "https://a.example"
    found = [origin_in(HEAD[:length]) for length in range(len(HEAD) + 1)]
    whole = HEAD.index(b"X: ")  # a value that is cut is none
    assert found == [""] * whole + ["https://a.example"] * (len(HEAD) + 1 - whole)
    assert origin_in(b"GET / HTTP/1.1\r\nORIGIN:\t https://a.example \t\r\n\r\n") == "https://a.example"
    assert origin_in(b"GET / HTTP/1.1\r\nX-Origin: a\r\nXOrigin: b\r\n\r\nx\r\nOrigin: https://body.example\r\n") == ""
    assert origin_in(b"GET / HTTP/1.1\r\nOrigin: a b\r\n\r\n") == origin_in(b"GET / HTTP/1.1\r\nOrigin: \xff\r\n\r\n") == ""


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_a_head_holds_gets_into_the_headers(seed: int) -> None:
    """What is told is one of the operator's own words."""
    rng = random.Random(seed)
    words = [
        b"\r\n",
        b"Origin: ",
        b"origin:",
        b"https://a.example",
        b"*",
        b" ",
        b"\t",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b"Set-Cookie: x",
        b"null",
    ]
    for one in (Origins("https://a.example"), Origins("*")):
        known = {"https://a.example"} if not one.allow("x") else {"*"}
        for _ in range(2000):
            headers = one.headers(origin_in(b"".join(rng.choices(words, k=12))))
            assert {value for name, value in headers if name == "Access-Control-Allow-Origin"} <= known


@pytest.mark.parametrize("end", [b"\x01", b"a b\r\n", b"\xff\r\n", b"\r"])
def test_blanks_in_an_origin_take_no_time(end: bytes) -> None:
    """A head is refused after its 16 KiB, or as much as --max-header allows; what is not an Origin must not be tried at each blank."""
    began = time.process_time()
    assert origin_in(b"GET / HTTP/1.1\r\nOrigin:" + b" \t" * 100_000 + end) == ""
    assert time.process_time() - began < 5.0  # some milliseconds; a minute where each blank may begin it
