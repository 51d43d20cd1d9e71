"""The words of a service manager, over a real datagram socket and real descriptors."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from comet.systemd import Notifier, Unusable, runtime_folder, take_sockets
from tests.harness import ROOT

Manager = tuple[socket.socket, str]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """A socket that hears what is told, and its name as NOTIFY_SOCKET has it."""
    name = str(tmp_path / "n") if request.param == "path" else f"@comet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0"))
        heard.settimeout(5)
        yield heard, name


def told(manager: Manager) -> list[str]:
    return manager[0].recv(4096).decode().split("\n")


def test_it_is_taken_out_of_the_environment(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager[1], "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier.take(environ)
    assert environ == {"HOME": "/"}
    assert (notifier.active, notifier.watchdog) == (True, 3.0)


def test_what_is_told(manager: Manager) -> None:
    notifier = Notifier(manager[1], 3.0)
    notifier.ready("2 workers")
    assert told(manager) == ["READY=1", "STATUS=2 workers"]
    notifier.status("2 workers")  # nothing new
    notifier.status("3\nworkers")
    assert told(manager) == ["STATUS=3 workers"]
    notifier.beat()
    assert told(manager) == ["WATCHDOG=1"]
    notifier.reloading()
    what, when, status = told(manager)
    assert (what, status) == ("RELOADING=1", "STATUS=reloading")
    assert when.startswith("MONOTONIC_USEC=") and int(when.partition("=")[2]) > 0
    notifier.stopping(12.5)
    assert told(manager) == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=12500000", "STATUS=stopping"]


def test_without_a_watchdog_there_are_no_signs_of_life(manager: Manager) -> None:
    for environ in ({}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "x"}):
        notifier = Notifier.take({"NOTIFY_SOCKET": manager[1], **environ})
        assert notifier.watchdog == 0
        notifier.beat()
        notifier.status("it is the next that is told")
        assert told(manager) == ["STATUS=it is the next that is told"]


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier.take({"WATCHDOG_USEC": "3000000"})
    assert (notifier.active, notifier.watchdog) == (False, 0.0)
    notifier.ready("x")
    notifier.beat()
    notifier.stopping(1)


def test_a_manager_that_went_away_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(str(tmp_path / "nobody"), 1.0)
    notifier.beat()
    notifier.beat()
    assert [record.message for record in caplog.records] == ["systemd can't be told WATCHDOG=1: [Errno 2] No such file or directory"]


def fill(name: str) -> None:
    """Send to a manager that does not read until its socket takes no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sender.sendto(b"filling", name.replace("@", "\0"))


def empty(manager: Manager) -> list[str]:
    """What the manager was told until now, by the first assignment of each datagram."""
    manager[0].setblocking(False)
    names = []
    with suppress(BlockingIOError):
        while True:
            names.append(told(manager)[0])
    return [name for name in names if name != "filling"]


def test_a_manager_that_does_not_read_is_not_waited_for_and_told_later(manager: Manager) -> None:
    notifier = Notifier(manager[1], 3.0)
    fill(manager[1])
    began = time.monotonic()
    notifier.ready("2 workers")
    for _ in range(10):
        notifier.reloading()
        notifier.ready("2 workers")
        notifier.status("3 workers")
        notifier.beat()
    assert time.monotonic() - began < 5, "forty datagrams, of which each once waited for a second"
    assert empty(manager) == []
    notifier.beat()
    assert empty(manager) == ["RELOADING=1", "READY=1", "WATCHDOG=1"], "the last of each, in order, once"
    notifier.status("3 workers")
    assert empty(manager) == ["STATUS=3 workers"]
    fill(manager[1])
    notifier.stopping(1)
    assert empty(manager) == []
    notifier.beat()
    notifier.beat()
    assert empty(manager) == ["STOPPING=1", "WATCHDOG=1", "WATCHDOG=1"]


def test_what_did_not_get_through_is_told_without_a_watchdog_too(manager: Manager) -> None:
    notifier = Notifier(manager[1])
    fill(manager[1])
    notifier.ready()
    assert empty(manager) == []
    notifier.beat()
    notifier.beat()
    assert empty(manager) == ["READY=1"]


@pytest.mark.parametrize(("watchdog", "interval"), [(0.0, 1.0), (1e-6, 0.1), (0.6, 0.2), (15.0, 1.0)])
def test_signs_of_life_have_a_shortest_interval(watchdog: float, interval: float) -> None:
    assert Notifier("/nobody", watchdog).interval == pytest.approx(interval)


@pytest.mark.parametrize("number", ["²", "-1", "1.5", "9" * 400])
def test_a_number_that_is_none_is_none(number: str) -> None:
    assert Notifier.take({"NOTIFY_SOCKET": "/nobody", "WATCHDOG_USEC": number}).watchdog == 0
    assert take_sockets({"LISTEN_FDS": number, "LISTEN_PID": str(os.getpid())}) == []


def test_an_address_of_another_kind_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier.take({"NOTIFY_SOCKET": "vsock:2:1234"}).active
    assert "vsock:2:1234" in caplog.text


TAKE = """
import os, sys
from comet.systemd import Unusable, take_sockets
environ = {"LISTEN_FDS": sys.argv[1], "LISTEN_PID": sys.argv[2] or str(os.getpid()), "LISTEN_FDNAMES": sys.argv[3], "HOME": "/"}
try:
    print([(one.getsockname()[1], one.fileno(), one.get_inheritable()) for one in take_sockets(environ)], environ)
except Unusable as error:
    print(error)
"""


def take(descriptors: list[int], count: str, pid: str = "", names: str = "") -> str:
    """What a process says that was started with these at 3, 4, …, in words of a shell."""
    moves = " ".join(f"{3 + number}<&{descriptor}" for number, descriptor in enumerate(descriptors))
    command = ["bash", "-c", f'exec "$@" {moves}', "x", sys.executable, "-c", TAKE, count, pid, names]
    return subprocess.run(command, cwd=ROOT, pass_fds=descriptors, check=True, capture_output=True, text=True).stdout.strip()


def high(one: socket.socket) -> int:
    """A number out of the way of those that a shell moves."""
    return os.dup2(one.fileno(), 100 + one.fileno())


def test_sockets_are_taken_out_of_the_environment_and_not_handed_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        numbers = [high(one), high(two)]
        ports = [one.getsockname()[1], two.getsockname()[1]]
        assert take(numbers, "2", names="a:b") == f"{[(ports[0], 3, False), (ports[1], 4, False)]} {{'HOME': '/'}}"
        assert take(numbers, "2", pid="1") == "[] {'HOME': '/'}"  # another process's
        for number in numbers:
            os.close(number)


def test_what_can_not_be_served_is_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as deaf:
        for one, name in ((datagrams, "web"), (deaf, "")):
            number = high(one)
            assert "ListenStream=" in take([number], "1", names=name)
            assert f"the socket {name or 'number 1'} " in take([number], "1", names=name)
            os.close(number)
    assert "can't be used" in take([], "1")


def test_nothing_was_passed_on() -> None:
    assert take_sockets({}) == []
    assert take_sockets({"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())}) == []


def test_a_regular_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        number = os.dup2(file.fileno(), 100 + file.fileno())
        assert "can't be used" in take([number], "1")
        os.close(number)
    assert issubclass(Unusable, Exception)


def test_the_first_runtime_folder() -> None:
    assert runtime_folder({"RUNTIME_DIRECTORY": "/run/a:/run/b"}) == "/run/a"
    assert runtime_folder({}) is None
