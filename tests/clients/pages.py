"""Serves the pages of the browser's clients, and the modules of npm that they load."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.clients.install import DRIVERS, NODE

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


class Pages:
    """A server on a free port, until `close`. `origin` is what comet's ``--origins`` must name."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        root, _, rest = path.lstrip("/").partition("/")
        folder = {"drivers": DRIVERS, "modules": NODE / "node_modules"}.get(root)
        file = _find(folder, rest) if folder is not None else None
        if file is None:
            self.send_error(404)
            return
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", TYPES[file.suffix])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _find(folder: Path, rest: str) -> Path | None:
    """The file that `rest` names in `folder`; packages leave out the ``.js`` of what they import."""
    for name in (rest, f"{rest}.js"):
        file = (folder / name).resolve()
        if file.is_relative_to(folder.resolve()) and file.is_file() and file.suffix in TYPES:
            return file
    return None
