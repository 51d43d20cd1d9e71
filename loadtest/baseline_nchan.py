"""The baseline in C: nginx with the nchan module, one worker, where both are installed.

On Debian: ``apt-get install nginx-light libnginx-mod-nchan``. nginx runs from a configuration and a
folder of its own, and is ended with the measurement.
"""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.process import stop

MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")

_CONFIGURATION = """
daemon off; worker_processes 1; worker_rlimit_nofile {files}; pid {folder}/pid; error_log {folder}/error crit;
load_module {module};
events {{ worker_connections {files}; }}
http {{
  access_log off; keepalive_timeout 3600; tcp_nodelay on; nchan_shared_memory_size 256m;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location ~ ^/sub/(.+)$ {{ nchan_subscriber http-raw-stream; nchan_channel_id $1; nchan_subscriber_first_message newest; }}
    location ~ ^/pub/(.+)$ {{ nchan_publisher; nchan_channel_id $1; nchan_message_buffer_length 1; }}
  }}
}}
"""


def installed() -> bool:
    """nginx and its module are there."""
    return shutil.which("nginx") is not None and MODULE.exists()


@contextmanager
def nchan(files: int) -> Iterator[tuple[list[int], int]]:
    """A running nchan that may open so many `files`: its process ids and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nginx.conf"
        path.write_text(_CONFIGURATION.format(files=files, folder=folder, module=MODULE, port=port))
        process = subprocess.Popen(["nginx", "-p", folder, "-c", str(path)], stdout=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 10
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx did not start: {process.poll()}")
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield [process.pid, *map(int, children)], port
        finally:
            stop(process)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
