"""The files of deploy/, held against the code. `deploy/verify`, which .ci/run calls, boots them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comet.kernel import check
from comet.kernel.machine import Machine
from comet.settings import Settings
from handlers import poll
from tests.deployment.image import DOCKERFILE, build, steps_of
from tests.deployment.machine import lines_of, verify_units
from tests.harness import ROOT

DEPLOY = ROOT / "deploy"
MILLION = check.Plan(1_000_000, 8000, workers=2)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd")
def test_the_sandbox_scores_2_or_better() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(DEPLOY / "comet.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for comet.service: ([\d.]+)", done.stdout)
    assert done.returncode == 0 and found and float(found[1]) <= 2.0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd")
def test_systemd_understands_every_line_of_the_units() -> None:
    assert verify_units()


def settings_of(path: Path) -> dict[str, str]:
    """The lines ``name = value`` of a file; one that stands there twice is a mistake."""
    found = re.findall(r"^(\S+?) ?= ?(.+)$", path.read_text(), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_kernel_settings_are_enough_for_a_million_clients() -> None:
    """By `comet.kernel.check`, on a machine of 24 GiB that has them and nothing else."""
    files = {f"/proc/sys/{name.replace('.', '/')}": value for name, value in settings_of(DEPLOY / "90-comet.conf").items()}
    limit = re.search(r"^LimitNOFILE=(\d+)$", (DEPLOY / "comet.service").read_text(), re.MULTILINE)
    assert limit
    files |= {
        "/proc/self/limits": f"Max open files            1024                 {limit[1]}              files\n",
        "/proc/meminfo": "MemTotal:       24684000 kB\nMemAvailable:   24000000 kB\n",
        "/proc/sys/fs/file-nr": "5000 0 4000000",
        "/proc/sys/net/netfilter/nf_conntrack_max": "262144",
        "/proc/sys/net/netfilter/nf_conntrack_count": "100",
        "/proc/net/snmp": "Tcp: 1 200 120000 -1 1 1 1 1 1000 9 9\n",
    }
    nft = (DEPLOY / "comet.nft").read_text()
    ports = re.search(r"^define ports = (\{.*?\})", nft, re.MULTILINE)
    assert ports
    machine = Machine(lambda path: files[path] if path in files else _missing(path), lambda: nft.replace("$ports", ports[1]))
    rows = check.rows(MILLION, machine)
    unmet = [row for row in rows if row.verdict != "ok"]
    assert not unmet, unmet
    off = check.rows(check.Plan(1_000_000, 8000, workers=2, hibernate=False), machine)
    assert [row.verdict for row in off if row.name == "vm.max_map_count"] == ["ok"]


def _missing(path: str) -> str:
    raise FileNotFoundError(path)


def test_nginx_and_the_service_agree() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    upstream = re.search(r"upstream comet \{(.*?)\n\}", text, re.DOTALL)
    assert upstream
    (kept,) = re.findall(r"keepalive_timeout (\d+)s", upstream[1])
    assert int(kept) < Settings().idle_timeout
    (read,) = re.findall(r"proxy_read_timeout (\d+)s", text)
    assert int(read) > max(poll.MAX_TIMEOUT, Settings().heartbeat)
    (send,) = re.findall(r"send_timeout (\d+)s", text)
    assert int(send) > Settings().send_timeout
    (body,) = re.findall(r"client_max_body_size (\d+)m", text)
    assert int(body) << 20 == Settings().max_batch
    headers, bodies = (set(re.findall(rf"client_{part}_timeout (\d+)s", text)) for part in ("header", "body"))
    assert headers == {f"{Settings().header_timeout:.0f}"}
    assert all(int(body) <= Settings().body_timeout for body in bodies) and bodies
    (most_open,) = re.findall(r"limit_conn comet_open (\d+);", text)
    assert int(most_open) <= Settings().max_per_address, "comet would have the last word, without a reason given here"
    assert re.findall(r"location = (\S+) \{[^}]*client_max_body_size 0;", text) == ["/follows"] and text.count("body_size 0;") == 1
    (socket,) = re.findall(r"^ListenStream=(.+)$", (DEPLOY / "comet.socket").read_text(), re.MULTILINE)
    assert f"server {socket} " in text


def test_nginx_is_a_site_beside_others() -> None:
    """Its file is included in the block `http` of an nginx that may serve other sites."""
    text = re.sub(r"#.*", "", (DEPLOY / "nginx.conf").read_text())
    outermost = set(re.findall(r"^(\w+)", text, re.MULTILINE))
    assert outermost <= {"map", "server", "split_clients", "upstream", "limit_conn_zone", "limit_req_zone"}, outermost
    names = re.findall(r"^(?:upstream|map .+|split_clients .+) \$?(\w+) \{$|^limit_.* zone=(\w+):", text, re.MULTILINE)
    assert len(names) == 8 and all("".join(name).startswith("comet") for name in names), "another site may have the same"
    assert "default_server" not in text
    assert "/etc/nginx/nginx.conf" not in " ".join(lines_of(DEPLOY / "README.md")), "that file is not ours to write"


def test_the_unit_gives_the_service_the_time_it_takes() -> None:
    unit = dict(re.findall(r"^(\w+Sec)=(\d+)$", (DEPLOY / "comet.service").read_text(), re.MULTILINE))
    settings = Settings()
    assert int(unit["TimeoutStartSec"]) > 2 * settings.hang_limit
    assert int(unit["TimeoutStopSec"]) > settings.grace + 4 * 3
    assert int(unit["WatchdogSec"]) > 5


def memory_of(folder: Path, kilobytes: int) -> dict[str, int]:
    """What install.sh gives the service of a machine with so much memory, in MiB."""
    script = (DEPLOY / "install.sh").read_text()
    functions = [re.search(rf"^{name}\(\) \{{.*?\}}$", script, re.MULTILINE | re.DOTALL) for name in ("say", "memory_file")]
    (folder / "meminfo").write_text(f"MemTotal:       {kilobytes} kB\nMemFree:        1 kB\n")
    lines = ["set -eu", *(one[0] for one in functions if one), f"memory_file {folder}/meminfo"]
    text = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    assert "[Service]\n" in text
    return {name: int(value) for name, value in re.findall(r"^(\w+)=(\d+)M$", text, re.MULTILINE)}


@pytest.mark.parametrize("mebibytes", [480, 985, 2000, 3900, 24105, 257_000])
def test_the_service_leaves_memory_to_the_rest_of_the_machine(tmp_path: Path, mebibytes: int) -> None:
    found = memory_of(tmp_path, mebibytes << 10)
    assert set(found) == {"MemoryHigh", "MemoryMax"}
    assert found["MemoryHigh"] < found["MemoryMax"] <= max(256, min(mebibytes - 256, mebibytes * 7 // 8))
    assert found["MemoryHigh"] >= 240, "supervisor, router, and two generations of a worker"
    steps = {memory_of(tmp_path, (mebibytes << 10) + more)["MemoryMax"] for more in (0, 200)}
    assert len(steps) == 1, "the kernel takes a little more or less at each boot"


def test_a_machine_for_a_million_clients_gives_the_service_what_they_take(tmp_path: Path) -> None:
    (row,) = [row for row in check.rows(MILLION, Machine(lambda path: "MemAvailable: 24000000 kB\n")) if row.name == "memory available"]
    gigabytes = float(row.wanted.split()[0])
    buffers = int(settings_of(DEPLOY / "90-comet.conf")["net.ipv4.tcp_mem"].split()[2]) * 4096
    assert (gigabytes * 1.024**3 * 1e9 + buffers) / (1 << 20) < memory_of(tmp_path, 24_684_000)["MemoryHigh"]


def test_the_kernel_may_kill_the_service_before_its_neighbours() -> None:
    (score,) = re.findall(r"^OOMScoreAdjust=(-?\d+)$", (DEPLOY / "comet.service").read_text(), re.MULTILINE)
    assert int(score) >= 0


def test_the_settings_file_names_settings() -> None:
    names = {f"COMET_{name.upper()}" for name in Settings.__dataclass_fields__}
    for name in re.findall(
        r"\bCOMET_[A-Z_]+",
        "".join((DEPLOY / file).read_text() for file in ("comet.env", "comet.service", "backplane.conf", "Dockerfile", "README.md")),
    ):
        assert name in names, name


def test_the_image_is_made_of_what_is_there() -> None:
    """Its lines are followed in deploy/verify; here, wherever no machine can be booted."""
    steps = steps_of(DOCKERFILE)
    copied = [source for step in steps if step.name == "COPY" for source in step.argument.split()[:-1]]
    assert {"app.py", "comet", "handlers", "deploy/requirements.txt"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert build(steps)[-1] == "cd /opt/comet"
    names = [step.name for step in steps]
    assert names.index("USER") < names.index("ENTRYPOINT") and steps[names.index("USER")].argument.partition(":")[0] != "0"


def test_a_server_installs_what_it_imports_and_no_test_tools() -> None:
    packages = set(re.findall(r"^(\w+)", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE))
    assert not packages & {"pytest", "locust", "pytest_xdist"}
    files = [ROOT / "app.py", *(path for folder in ("comet", "handlers") for path in (ROOT / folder).rglob("*.py"))]
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"comet", "handlers"} <= packages
    assert "-r deploy/requirements.txt" in (ROOT / "requirements.txt").read_text()
