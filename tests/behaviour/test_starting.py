"""What a service says when it starts: that it is usable, or what is in the way and what to do about it."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from gevent import subprocess as green

from tests.conftest import Start
from tests.harness import AMPLE, ROOT, TIMEOUT, Client, Server, free_port, wait_until
from tests.redis_server import RedisServer, needs_redis

AWAY = re.compile(r"^\S+ \S+(?: \[(\d+)\])? WARNING comet.backplane: Redis (\S+) can't be reached \((.*?)\)", re.MULTILINE)
BACK = re.compile(r"INFO comet.backplane: Redis (\S+) is reached again after [\d.]+ s$", re.MULTILINE)


@pytest.fixture(scope="module")
def hibernate() -> str:
    """A start is the same with a greenlet a client."""
    return "on"


def more_output(server: Server) -> bool:
    """Whether it has printed something that was not read yet."""
    return bool(select.select([server.process.stdout], [], [], 0)[0])


def next_line(server: Server) -> str:
    """The next line that it prints."""
    with gevent.Timeout(TIMEOUT):
        return str(server.process.stdout.readline().decode())


def ready(server: Server) -> int:
    """The status of /readyz."""
    return server.request("GET", "/readyz").status


def all_ready(server: Server, expected: bool) -> bool:
    """Whether each worker says so of itself, on the board."""
    workers = server.stats()["workers"]
    return all(one["ready"] is expected for one in workers)


# -- how many clients


def test_one_process_that_is_asked_for_more_clients_than_it_holds_says_what_to_set(start: Start) -> None:
    server = start("--clients", "200", "--max-connections", "100")
    assert "200 clients were asked for; one process holds 100: set --workers 3 (or auto)" in server.log.read_text()
    fits = start("--clients", "100", "--max-connections", "100")
    assert "clients were asked for" not in fits.log.read_text()


# -- usable


@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_it_invites_to_try_it_once_it_is_usable(start: Start, flags: tuple[str, ...]) -> None:
    server = start(*flags)
    assert next_line(server) == "Try it, in two terminals:\n"
    assert ready(server) == 200
    assert next_line(server) == f"  curl -N http://{server.url}/events/news\n"
    assert next_line(server) == f"  curl -d 'hello, world' http://{server.url}/publish/news\n"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that has ended; its port is known."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, "--requirepass", "s3cret", port=free_port())
    server.kill()
    try:
        yield server
    finally:
        server.stop()


def url(redis: RedisServer, password: str = "s3cret") -> str:
    return f"redis://:{password}@127.0.0.1:{redis.port}"


@needs_redis
@pytest.mark.parametrize("flags", [(), ("--workers", "3")], ids=["one process", "workers"])
def test_a_dead_redis_is_named_once_and_nobody_is_invited_before_it_is_there(
    start: Start, redis: RedisServer, flags: tuple[str, ...]
) -> None:
    server = start(*flags, COMET_BACKPLANE=url(redis))
    if flags:
        wait_until(lambda: len(server.stats()["workers"]) == 3)
    assert ready(server) == 503
    assert not more_output(server), "it invites to try what can't be tried"
    log = server.log.read_text()
    assert [(where, why) for _, where, why in AWAY.findall(log)] == [(f"127.0.0.1:{redis.port}", "Connection refused")], log
    redis.start()
    assert next_line(server) == "Try it, in two terminals:\n"
    assert ready(server) == 200
    wait_until(lambda: all_ready(server, True))
    log = server.log.read_text()
    assert BACK.findall(log) == [f"127.0.0.1:{redis.port}"], log
    assert len(AWAY.findall(log)) == 1 and "s3cret" not in log, log


@needs_redis
def test_an_outage_is_told_by_one_worker_and_by_another_when_that_one_dies(start: Start, redis: RedisServer) -> None:
    redis.start()
    server = start("--workers", "3", COMET_BACKPLANE=url(redis))
    wait_until(lambda: all_ready(server, True))
    assert not AWAY.findall(server.log.read_text())
    redis.kill()
    wait_until(lambda: all_ready(server, False))
    wait_until(lambda: "Connection refused" in server.log.read_text())
    speakers = Counter(pid for pid, _, _ in AWAY.findall(server.log.read_text()))
    assert len(speakers) == 1, server.log.read_text()
    (speaker,) = speakers
    assert speakers[speaker] <= 2, "once that it broke, once that it can't be reached"
    os.kill(int(speaker), signal.SIGKILL)
    wait_until(lambda: len({pid for pid, _, _ in AWAY.findall(server.log.read_text())}) == 2)
    wait_until(lambda: len(server.stats()["workers"]) == 3 and all_ready(server, False))
    redis.start()
    wait_until(lambda: all_ready(server, True))
    log = server.log.read_text()
    assert len({pid for pid, _, _ in AWAY.findall(log)}) == 2 and len(BACK.findall(log)) == 1, log


@needs_redis
def test_a_wrong_password_is_told_and_none_is_shown(redis: RedisServer, tmp_path: Path) -> None:
    redis.start()
    done = run("--port", "0", COMET_BACKPLANE=url(redis, "wr0ng"))
    assert done.returncode == 1
    assert "does not let us in" in done.stderr and "wr0ng" not in done.stderr and "s3cret" not in done.stderr
    assert "Try it" not in done.stdout


@needs_redis
def test_the_url_of_redis_is_in_a_file(start: Start, redis: RedisServer, tmp_path: Path) -> None:
    redis.start()
    path = tmp_path / "backplane"
    path.write_text(url(redis) + "\n")
    path.chmod(0o600)
    servers = [start(*flags, "--backplane-file", str(path)) for flags in ((), ("--workers", "2"))]
    wait_until(lambda: all(ready(server) == 200 for server in servers))
    with servers[0].events("a") as events:
        servers[1].publish("a", "through Redis")
        assert events.next().data == "through Redis"
    for server in servers:
        pids = [server.process.pid, *(int(one["pid"]) for one in server.stats()["workers"])]
        for pid in pids:
            for name in ("environ", "cmdline"):
                assert "s3cret" not in Path(f"/proc/{pid}/{name}").read_text(errors="replace")


def run(*flags: str, before: tuple[str, ...] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python app.py` that is expected to end by itself."""
    done: subprocess.CompletedProcess[str] = green.run(
        [*before, sys.executable, "app.py", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_without_standard_input_output_and_error_it_serves(flags: tuple[str, ...]) -> None:
    """As some who start daemons leave them."""
    port = free_port()
    closed = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with green.Popen([*closed, sys.executable, "app.py", "--port", str(port), *flags], cwd=ROOT) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None
            with Client(port) as client:
                assert client.request("POST", "/publish/a", b"x").status == 201
                assert not any(client.request("GET", "/stats").json["restarts"].values())
            process.terminate()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


def test_a_terminal_that_stops_who_writes_from_the_background_stops_nobody() -> None:
    """`stty tostop`. All but the supervisor have process groups of their own, so they are in the background."""
    ours, its = pty.openpty()
    try:
        flags = termios.tcgetattr(its)
        flags[3] |= termios.TOSTOP
        termios.tcsetattr(its, termios.TCSANOW, flags)
        port, printed = free_port(), bytearray()
        os.set_blocking(ours, False)

        def prints(text: bytes) -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    printed.extend(os.read(ours, 65536))
            return text in printed

        shell = ("sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(its))  # a session without a terminal has the first that it opens
        command = [*shell, sys.executable, "app.py", "--port", str(port), "--workers", "1", "--log-clients"]
        with green.Popen(command, cwd=ROOT, start_new_session=True) as process:
            try:
                wait_until(lambda: prints(b"is ready"))
                with Client(port) as client:
                    assert client.request("GET", "/poll/!").status == 400
                wait_until(lambda: prints(b"refused: bad-channel"), timeout=AMPLE)
                wait_until(lambda: answers(port), timeout=AMPLE)
                process.terminate()
                wait_until(lambda: prints(b"generation 1 has ended"), timeout=AMPLE)
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
    finally:
        os.close(ours)
        os.close(its)


def answers(port: int) -> bool:
    """Whether a service is ready there."""
    try:
        with Client(port) as client:
            return client.request("GET", "/readyz").status == 200
    except OSError:
        return False


# -- what is wrong


@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_an_unknown_variable_ends_the_start(flags: tuple[str, ...]) -> None:
    done = run("--port", "0", *flags, COMET_MAXBODY="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "app.py: error: the variable COMET_MAXBODY is not known; did you mean COMET_MAX_BODY? See app.py --help.\n"


def test_orders_that_no_supervisor_gave_end_the_start() -> None:
    done = run("--port", "0", COMET_GENERATION="{}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("comet: the variable COMET_GENERATION ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://h", "it begins with one of redis://, rediss://, unix://, redis+cluster://, rediss+cluster://"),
        ("rediss://h?ssl_ca_certs=/nowhere", "ssl_ca_certs=/nowhere can't be used: No such file or directory"),
    ],
)
def test_a_url_of_redis_that_is_none_is_a_wrong_setting(flags: tuple[str, ...], url: str, said: str) -> None:
    """So systemd does not try again, and no worker is started to die of it."""
    done = run("--port", "0", *flags, COMET_BACKPLANE=url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("ERROR") == 1 and "--backplane can't be understood: " in done.stderr and said in done.stderr, done.stderr


def in_own_mounts(*lines: str) -> tuple[str, ...]:
    """What stands before a command so that it sees file systems of its own, mounted by these lines of shell."""
    return ("unshare", "--mount", "sh", "-euc", "\n".join((*lines, 'exec "$@"')), "sh")


may_mount = pytest.mark.skipif(
    subprocess.run([*in_own_mounts("mount -t tmpfs none /mnt"), "true"], capture_output=True, check=False).returncode != 0,
    reason="file systems can't be mounted here",
)


@may_mount
@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "workers"])
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "with a database"])
def test_a_data_folder_that_can_only_be_read_says_so(tmp_path: Path, flags: tuple[str, ...], filled: bool) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if filled:
        with Server(tmp_path / "log", "--data", str(data)) as server:
            assert server.request("PUT", "/users/a/following/b").status < 300
    mount = in_own_mounts(f"mount --bind {data} {data}", f"mount -o remount,bind,ro {data}")
    done = run("--port", "0", "--data", str(data), *flags, before=mount)
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert f"The data folder {data} can't be written to: Read-only file system." in line and "--data" in line, done.stderr
    done = run("--port", "0", "--data", str(data / "new"), *flags, before=mount)
    assert done.returncode == 1
    assert f"The data folder {data / 'new'} can't be made: Read-only file system." in done.stderr.splitlines()[-1], done.stderr


def test_a_file_in_the_place_of_the_data_folder_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    done = run("--port", "0", "--data", str(path))
    assert done.returncode == 1 and f"{path} is not a folder; name another with --data." in done.stderr
    done = run("--port", "0", "--data", str(path / "below"))
    assert done.returncode == 1 and f"The data folder {path / 'below'} can't be made: Not a directory." in done.stderr
