"""A machine that systemd has booted: a container of this machine's own /usr, thrown away afterwards.

Its /etc is this machine's with a layer above that vanishes, /var and /run are empty, its network is its own loopback
alone. It is known by its process, ends with whoever made it, and in any case after `most` seconds.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent.parent
CODE = ("app.py", "comet", "handlers", "deploy", "README.md", "CHANGELOG.md", "LICENSE")
HERE = "/root/comet"
"""Where the code is in there, read-only."""
WHEELS = "/root/wheels"

MASKED = (
    "systemd-networkd-wait-online",
    "redis-server",
    "postgresql",
    "postgresql@15-main",
    "apt-daily",
    "apt-daily-upgrade",
    "cron",
)
"""What this machine may have enabled and the other one is to boot without."""

_CLONE_NEWNET = 0x40000000


def missing() -> str | None:
    """Why there can't be one here; None where there can."""
    if os.geteuid() != 0:
        return "systemd-nspawn needs root"
    for command, package in (("systemd-nspawn", "systemd-container"), ("nsenter", "util-linux"), ("/lib/systemd/systemd", "systemd")):
        if shutil.which(command) is None:
            return f"{command} is missing: apt-get install {package}"
    if subprocess.run(["/usr/bin/python3", "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode:
        return "Debian's own Python has no venv: apt-get install python3-venv"
    if (
        "overlay" not in Path("/proc/filesystems").read_text()
        and subprocess.run(["modprobe", "overlay"], capture_output=True, check=False).returncode
    ):
        return "the kernel has no overlay file system"
    return None


class Machine:
    """Booted once in a ``with``; `run` does something in it."""

    def __init__(self, most: float) -> None:
        self.name = f"comet-verify-{os.getpid()}"
        self._most = most
        self._folder = Path(tempfile.mkdtemp(prefix="comet-verify-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _prepare(self) -> None:
        """The code, and the packages for Debian's own Python, which may be another than this one."""
        code, wheels = self._folder / "code", self._folder / "wheels"
        code.mkdir()
        for name in CODE:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, code / name)
        subprocess.run(["/usr/bin/python3", "-m", "venv", self._folder / "pip"], check=True, capture_output=True)
        command = [f"{self._folder}/pip/bin/pip", "download", "-q", "-d", str(wheels), "-r", f"{ROOT}/deploy/requirements.txt"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the packages can't be downloaded: {done.stderr}")

    def _boot(self) -> None:
        self._log = (self._folder / "boot.log").open("wb")
        self._process = subprocess.Popen(
            [
                "timeout", "--kill-after=5", str(self._most),
                "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--overlay=/etc::/etc", "--boot", "--private-network",
                f"--machine={self.name}", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe",
                f"--bind-ro={self._folder}/code:{HERE}", f"--bind-ro={self._folder}/wheels:{WHEELS}",
                *(f"systemd.mask={unit}.service" for unit in MASKED),
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not self._is_up():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"systemd did not boot: {(self._folder / 'boot.log').read_text()}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        assert self._process is not None
        if not self._leader:
            ours = os.readlink("/proc/self/ns/pid")
            for one in _descendants(self._process.pid):
                with contextlib.suppress(OSError):  # on its way into the namespace
                    if os.readlink(f"/proc/{one}/ns/pid") != ours and Path(f"/proc/{one}/comm").read_text() == "systemd\n":
                        self._leader = one
                        break
            return False
        return self.run("systemctl is-system-running", check=False).stdout.strip() in ("running", "degraded")

    def run(self, command: str, check: bool = True, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
        """A line of shell in there, as root, in the folder of the code. Raises RuntimeError if it fails and `check` is."""
        done = subprocess.run(
            self.inside(["sh", "-c", f"cd {HERE} && {command}"]), capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command that does this in there. The packages are where pip's own configuration says."""
        environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        pip = ["PIP_NO_INDEX=1", f"PIP_FIND_LINKS={WHEELS}", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]
        return ["nsenter", "--target", str(self._leader), "--all", "env", "-i", *environment, *pip, *command]

    def outside(self, pid: int) -> Path:
        """What /proc on this machine has of a process in that one."""
        space = os.readlink(f"/proc/{self._leader}/ns/net")
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended
                    found = re.search(r"^NSpid:\s+\d+\s+(\d+)$", (path / "status").read_text(), re.MULTILINE)
                    if found and int(found[1]) == pid and os.readlink(path / "ns" / "net") == space:
                        return path
        raise AssertionError(f"no process {pid}")

    def enter_network(self) -> None:
        """From now on sockets of this process, and its children, are on the machine's loopback."""
        self._switch(os.open(f"/proc/{self._leader}/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    def _switch(self, namespace: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns failed")
        os.close(namespace)

    def _end(self) -> None:
        self._switch(self._network)
        if self._process is not None:
            if self._leader and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._leader, signal.SIGKILL)  # its first process: all others end with it
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.terminate()  # `timeout` passes it on
                self._process.wait()
            self._log.close()
        shutil.rmtree(self._folder)


def _descendants(pid: int) -> list[int]:
    found, look = [], [pid]
    while look:
        one = look.pop()
        with contextlib.suppress(OSError):
            those = [int(text) for text in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
            found += those
            look += those
    return found


def lines_of(readme: Path, kind: str = "sh") -> list[str]:
    """What a person is told to type: the lines of the README's blocks of this kind, in order."""
    found, inside = [], False
    for line in readme.read_text().splitlines():
        if line.startswith("```"):
            inside = line == f"```{kind}"
        elif inside:
            found.append(line)
    return found


def verify_units() -> str:
    """What `systemd-analyze verify` has to say of the units, where they can't be booted. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        # as installed, but with a program that is there
        for unit in ("comet.service", "comet.socket"):
            text = (ROOT / "deploy" / unit).read_text().replace("/opt/comet/venv/bin/python", sys.executable)
            Path(folder, unit).write_text(text)
        command = ["systemd-analyze", "verify", f"{folder}/comet.service", f"{folder}/comet.socket"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ours = [line for line in done.stderr.splitlines() if "comet" in line]
        if done.returncode or ours:
            raise RuntimeError("\n".join(ours) or done.stderr)
    return "systemd-analyze verify has nothing to say"
