"""GET /: a page that shows it working, in plain HTML and JavaScript."""

from pathlib import Path

from bottle import HTTPResponse

from handlers.params import Context, answer_bytes

_PAGE = (Path(__file__).parent / "page.html").read_bytes()
_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def show(context: Context) -> HTTPResponse:
    """The page; it may talk to this server, load nothing from elsewhere, and be in nobody's frame."""
    shown = answer_bytes(_PAGE, content_type="text/html; charset=utf-8")
    shown.set_header("Content-Security-Policy", _POLICY)
    return shown
