"""Every command of README.md, run as it is written; and of deploy/README.md, whose lines tests/deployment runs.

A command is a line of a block, the last cell of the table of URLs, or a span within a sentence that begins with a program. Each is
run, in the order of the file, in a copy of the checkout with nothing but Debian's programs and what ``make run`` has installed. What
can't be run here has its reason in a table below; so a command that is new is run, or fails until somebody says why not.

What differs from what a person types: ports and addresses (`Person.typed`).
"""

import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest
from gevent import subprocess as green
from gevent.fileobject import FileObjectPosix

from tests.deployment.machine import lines_of
from tests.harness import ROOT, Client, free_port, wait_until
from tests.redis_server import PROGRAM as REDIS
from tests.redis_server import RedisServer

README, DEPLOY = ROOT / "README.md", ROOT / "deploy" / "README.md"
CHECKOUT = ("app.py", "comet", "handlers", "loadtest", "deploy", "Makefile", "requirements.txt")
PATIENCE = 180.0
"""Seconds that one command may take on a busy machine."""

PROGRAMS = r"(?:\w+=\S+ )*(?:sudo )?(?:make|curl|python3?|pip3?|locust|redis-cli|docker|apt-get|systemctl|deploy/\S+|(?:cd \S+ && )?\.?venv/\S+) \S|deploy/verify"
"""How a span within a sentence begins that is a command."""

DEBIAN = ("make", "curl", "printf", "python3", "redis-cli", "apt-get")
"""Programs that are there after ``apt-get install``; everything else is named by its path."""

NOT_COMMANDS = {
    "1,000,000 clients on port 8000, 1 worker": "what the command above it prints",
    "worker_rlimit_nofile 1048576;": "lines of nginx.conf",
    'const events = new EventSource("http://127.0.0.1:8000/events/news")': "JavaScript; tests/clients runs the browser's own",
}
"""Blocks, by their first line."""

NOT_RUN = {
    "make test": "this is it",
    "make bench": "eight minutes; tests/test_loadtest.py runs its parts",
    "make friends": "a million users; with --users 10000 it is run",
    'make friends ARGS="--users 100000"': "with --users 10000 it is run",
    'make run ARGS="--workers auto --clients 1000000"': "sixty processes where one may open 20,000 files; tests/test_policy.py has the plan",
    "make million CLIENTS=20000": "six minutes; tests/behaviour/test_loadtest.py runs it with fewer",
    "sudo make million APPLY=1": "changes the kernel's settings; as above",
    "make soak": "an hour; as above",
    "apt-get install --yes redis-server": "changes the machine; a Redis is started in its place",
    ".venv/bin/python -m loadtest million --host http://server:8000 --clients 100000 --friends friends.txt --sources 10.0.0.11,10.0.0.12": (
        "two machines; tests/behaviour/test_loadtest.py runs it with one"
    ),
    "COMET_SHAPE=Million .venv/bin/locust -f loadtest/locustfile.py --master --headless --expect-workers 16 "
    "--host http://server:8000 --clients 300000 --wall-clock": "three machines; tests/behaviour/test_loadtest.py runs its processes on one",
    "COMET_SHAPE=Million .venv/bin/locust -f loadtest/locustfile.py --worker --processes 8 --master-host first": "as above",
    ".venv/bin/locust -f loadtest/locustfile.py StreamUser EventsUser LongPollUser FriendSender": "a web page, for a person",
    "deploy/verify": ".ci/run calls it",
}

NOT_RUN_OF_DEPLOY = {
    "pip download -d DIR -r deploy/requirements.txt": "tests/deployment/machine.py fetches the packages so",
    "curl -N --cacert /etc/comet/tls.crt https://localhost/events/news": "tests/deployment/network.py asks so, over HTTP/1.1 and 2",
    "systemctl edit comet.socket": "an editor",
    "deploy/verify": ".ci/run calls it",
    "venv/bin/python -m comet load-friends FILE --data /var/lib/comet": "README.md's is run here",
    **dict.fromkeys(
        (
            "cd /opt/comet && venv/bin/python -m comet check",
            'cd /opt/comet && venv/bin/python -m comet top --key "$(cat /etc/comet/publish-key)"',
            "cd /opt/comet && venv/bin/python -m comet check --clients 1000000 --workers 2",
            "systemctl status comet",
            "systemctl restart comet",
            "systemctl reload comet",
            "systemctl stop comet.socket comet.service",
            "systemctl start",
            "systemctl status",
            "deploy/install.sh --uninstall",
            "deploy/install.sh --tune",
        ),
        "tests/deployment/checks.py does it to a service",
    ),
}
"""Spans within its sentences; its blocks are run by tests/deployment, line by line."""


class Command(NamedTuple):
    """`text` is what a person types, `section` where."""

    section: str
    text: str


def commands(path: Path) -> Iterator[Command]:
    """The commands of a file, in its order; of a table those that are to be tried."""
    section = ""
    block: list[str] | None = None
    prose: list[str] = []
    for line in [*path.read_text().splitlines(), "## "]:
        if line.startswith("```"):
            if block is None:
                yield from _spans(section, prose)
                block, prose = [], []
            else:
                if block and block[0] not in NOT_COMMANDS:
                    yield from (Command(section, one) for one in block if one)
                block = None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            yield from _spans(section, prose)
            section, prose = line.lstrip("# "), []
        else:
            prose.append(line)


def _spans(section: str, prose: list[str]) -> Iterator[Command]:
    for span in re.findall(r"`([^`]+)`", "\n".join(prose)):
        text = " ".join(span.split())
        if re.match(PROGRAMS, text):
            yield Command(section, text)


ALL = {path: list(commands(path)) for path in (README, DEPLOY)}
EACH = [pytest.param(command.text, id=command.text[:60]) for path in ALL for command in ALL[path]]


def test_commands_are_found() -> None:
    """Or what follows would show nothing."""
    texts = [command.text for command in ALL[README]]
    assert len(texts) > 45
    for text in ("make run", "make top", "curl localhost:8000/stats", "curl -N localhost:8000/test/alice", 'make run ARGS="--help"'):
        assert text in texts
    assert len(ALL[DEPLOY]) > 25


@pytest.mark.parametrize("text", EACH)
def test_a_command_names_only_programs_that_are_there_on_a_bare_debian(text: str) -> None:
    words = [word for word in text.split() if not re.match(r"\w+=", word)]
    program = words[1] if words[0] == "sudo" else words[0]
    of_deploy = ("cd", "systemctl", "openssl", "cp", "nginx", "scp", "export", "(umask", "pip", "venv/bin/python")
    in_readme = any(command.text == text for command in ALL[README])
    assert program in DEBIAN or program.startswith((".venv/bin/", "deploy/")) or (not in_readme and program in of_deploy), text


@pytest.mark.parametrize("text", EACH)
def test_a_command_is_the_same_for_zsh(text: str, tmp_path: Path) -> None:
    """Which takes `?`, `*` and `[` for file names and ends with an error where there are none, and a # at the prompt for a word."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    assert not re.search(r"[?*\[\]#]", bare), f"quote it: {text}"
    if shutil.which("zsh"):
        script = tmp_path / "script"
        script.write_text(text + "\n")
        done = subprocess.run(["zsh", "-f", "-n", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done


def test_what_is_not_run_is_still_there() -> None:
    """A reason for a command that is gone hides the next one of that name."""
    for path, reasons in ((README, NOT_RUN), (DEPLOY, NOT_RUN_OF_DEPLOY)):
        assert set(reasons) <= {command.text for command in ALL[path]}, path
    lines = {line for path in ALL for line in path.read_text().splitlines()}
    assert set(NOT_COMMANDS) <= lines


def test_each_command_of_deploy_is_run_in_a_container_or_has_a_reason() -> None:
    run = {*lines_of(DEPLOY, "sh"), *lines_of(DEPLOY, "shell")}
    assert [command.text for command in ALL[DEPLOY] if command.text not in run and command.text not in NOT_RUN_OF_DEPLOY] == []


def test_each_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    for path in ROOT.glob("**/*.md"):
        if not {".venv", ".million"} & set(path.parts):
            named = re.findall(r"`(?:\S+=\S+ |sudo )*make ([a-z-]+)", path.read_text())
            assert set(named) <= known, path


# -- a person who types them


class Person:
    """Types what README.md says, in a checkout, with terminals of their own for what goes on and on."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.checkout = folder / "comet"
        self.checkout.mkdir()
        for name in CHECKOUT:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.checkout / name, ignore=shutil.ignore_patterns("*.pyc.*", "results"))
            else:
                shutil.copy(source, self.checkout / name)
        (self.checkout / ".venv").symlink_to(sys.prefix)
        (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
        self.url_file = folder / "backplane"
        self._folder = folder
        self._stack = stack
        self._terminals: list[tuple[str, Any]] = []
        self.port = 0
        """Of the service that was started last in this section; 0 where there is none."""
        self.redis: RedisServer | None = None
        self._environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "TERM": "xterm",
            "REDISCLI_AUTH": "secret",
            # pytest's environment is what `make` would install: neither is to be made anew here
            "MAKEFLAGS": "-o .venv/.run -o .venv/.load",
        }  # fmt: skip

    def typed(self, text: str) -> str:
        """The command with ports and addresses that are free here."""
        if self.redis is not None:
            text = text.replace("redis-cli", f"redis-cli -p {self.redis.port}")
            text = text.replace("secret@10.0.0.1", f"secret@127.0.0.2:{self.redis.port}")
            self.url_file.write_text(f"redis://:secret@127.0.0.2:{self.redis.port}\n")
        text = text.replace("10.0.0.1", "127.0.0.2").replace("10.0.0.2", "127.0.0.3")
        text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", f"127.0.0.1:{self.port}", text)
        if text == "make top":
            text += f' ARGS="--url http://127.0.0.1:{self.port}"'
        return text.replace(" FILE", f" {self.url_file}")

    def does(self, text: str) -> str:
        """Type it, and wait for its end; what it printed. It must succeed."""
        process = self._start(text)
        with gevent.Timeout(PATIENCE, AssertionError(f"it did not end: {text}")):
            said, errors = process.communicate()
        assert process.returncode == 0, f"{text}: status {process.returncode}: {said.decode()} {errors.decode()}"
        return str(said.decode())

    def _start(self, text: str, more: Mapping[str, str] | None = None, terminal: int = subprocess.PIPE) -> Any:
        # Ctrl-C is heard: tests that are started in the background of a shell have SIGINT ignored, and so has what they start
        return green.Popen(
            ["env", "--default-signal=INT", "sh", "-c", self.typed(text)], cwd=self.checkout, stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.PIPE,
            env={**self._environment, **(more or {})}, process_group=0,
        )  # fmt: skip

    def opens(self, text: str, until: str = "", **more: str) -> bytes:
        """Type it in a terminal of its own, and wait for its first line, or the first that has `until`; that line."""
        process = self._start(text, more)
        self._terminals.append((text, process))
        with gevent.Timeout(PATIENCE, AssertionError(f"it shows nothing: {text}")):
            while line := process.stdout.readline():
                if until.encode() in line:
                    return bytes(line)
        raise AssertionError(f"it ended: {text}: {process.stderr.read().decode()}")

    def watches(self, text: str, until: str) -> None:
        """Type it in a terminal that is a screen, wait until that shows `until`, and end it by Ctrl-C."""
        screen, keyboard = pty.openpty()
        with FileObjectPosix(screen, "rb", 0) as shown:
            process = self._start(text, terminal=keyboard)
            os.close(keyboard)
            said = b""
            with gevent.Timeout(PATIENCE, AssertionError(f"it does not show {until!r}: {text}")):
                while until.encode() not in said:
                    said += shown.read(4096)
                os.killpg(process.pid, signal.SIGINT)
                try:
                    while shown.read(4096):  # a screen that nobody reads keeps it from ending
                        pass
                except OSError:
                    pass  # EIO: nobody writes there any more
                process.communicate()

    def starts(self, text: str) -> None:
        """Start a service, on a free port, and wait for the word that it is usable."""
        self.port = free_port()
        # a flag of the line wins over the variable
        line = self.opens(re.sub(r"--port \d+", f"--port {self.port}", text), "curl -N ", COMET_PORT=str(self.port))
        assert f":{self.port}/".encode() in line, line

    def closes(self) -> None:
        """Ctrl-C in all terminals, the services' last; each must end, and a service well."""
        for _, process in reversed(self._terminals):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        for text, process in self._terminals:
            with gevent.Timeout(PATIENCE, AssertionError(f"it does not end: {text}")):
                _, errors = process.communicate()
            # make ends by the same signal, once the service has ended
            log = errors.decode()
            assert "make run" not in text or (": stopping: " in log and "Traceback" not in log), f"{text}: {log}"
        self._terminals, self.port = [], 0

    def client(self) -> Client:
        """To look at what the service has."""
        return Client(self.port)

    def has_redis(self) -> None:
        """As Debian starts it."""
        folder = self._folder / "redis"
        folder.mkdir()
        self.redis = RedisServer(folder, port=free_port())
        self._stack.callback(self.redis.stop)
        self._environment["REDISCLI_AUTH"] = ""


def listeners(person: Person, channel: str) -> int:
    """How many subscribers a channel has."""
    with person.client() as client:
        answer = client.request("GET", f"/channels/{channel}")
        return int(answer.json["subscribers"]) if answer.status == 200 else 0


EXPECTED: dict[str, str] = {
    "curl -d 'hello, friends' localhost:8000/send/rj": '"targets":3,"delivered":2}',
    "curl localhost:8000/users/9999/following": '"count":15',
    "curl localhost:8000/users/rj/followers": '["alice"]',
    "curl localhost:8000/readyz": "ready",
    'make run ARGS="--help"': "--max-body",
}
"""What some print, beyond that they succeed."""


def perform(person: Person, text: str) -> None:
    """Do one command as a person does, who knows what kind it is."""
    if re.search(r"\bmake run\b", text) and "--help" not in text:
        person.starts(text)
        return
    if text.startswith("curl") and not person.port:
        person.starts("make run")
    if text == "make top":
        person.watches(text, "generation")
    elif text.startswith("curl -N "):
        person.opens(text)
    elif "/poll/" in text:
        before = listeners(person, "news")
        poll = gevent.spawn(person.does, text)
        wait_until(lambda: poll.dead or listeners(person, "news") > before)
        with person.client() as client:
            assert client.request("POST", "/publish/news", b"to the poll").status == 201
        assert json.loads(poll.get())["messages"][-1]["data"] == "to the poll"
    elif text.startswith("python3 -m comet check"):
        said = person.does(f"{text} || [ $? = 1 ]")  # 1: not all is met here
        assert " clients on port 8000, 1 worker" in said.splitlines()[0], said
    else:
        said = person.does(text)
        assert EXPECTED.get(text, "") in said, said
        if text.startswith("curl "):
            for line in said.splitlines():
                json.loads(line)


def test_readme_line_by_line(tmp_path: Path) -> None:
    if shutil.which("make") is None or shutil.which("curl") is None:
        pytest.skip("there is no make or no curl here")
    done = []
    with ExitStack() as stack:
        person = Person(tmp_path, stack)
        stack.callback(person.closes)
        for section, those in itertools.groupby(ALL[README], lambda command: command.section):
            for _, text in those:
                if text.startswith("apt-get install") and "redis-server" in text and REDIS is not None:
                    person.has_redis()
                if text in NOT_RUN:
                    continue
                if REDIS is None and section == "Many machines":
                    continue  # as the tests of Redis
                try:
                    perform(person, text)
                except Exception as error:
                    raise AssertionError(f"{section}: {text}: {error}") from error
                done.append(text)
            person.closes()
    assert len(done) > 35, done
