"""The load test itself, small: `make million` with the shape Smoke, which asserts that nothing is lost; and that it ends what it
has started when it is interrupted."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.process import descendants
from tests.harness import ROOT, wait_until

CLIENTS = 2000


def free_port() -> int:
    """Outside the range from which 2,000 clients get theirs."""
    for port in range(20_000, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no port is free")


def command(out: Path, *flags: str) -> list[str]:
    made = [sys.executable, "-m", "loadtest", "million", "--out", str(out), "--port", str(free_port()), "--shape", "Smoke"]
    return [*made, "--clients", str(CLIENTS), "--senders", "40", "--rate", "100", *flags]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """One run: its folder, what it printed, its exit status."""
    out = tmp_path_factory.mktemp("smoke")
    run = subprocess.run(command(out, "--duration", "8"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    folders = list(out.glob("run-*"))
    logs = "".join(log.read_text() for folder in folders for log in folder.glob("*.log"))
    assert len(folders) == 1, run.stdout + run.stderr
    return folders[0], run.stdout + run.stderr + logs, run.returncode


def document(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_nothing_is_lost_doubled_or_out_of_order(smoke: tuple[Path, str, int]) -> None:
    folder, said, status = smoke
    assert document(folder)["summary"]["verdict"] is not None, said
    verdict = document(folder)["summary"]["verdict"]
    assert verdict["sent"] > 400, said
    assert verdict["received"] == verdict["due"] > verdict["sent"], said
    wrong = {name: verdict[name] for name in ("lost", "doubled", "other", "refused", "unsure")}
    assert wrong == {"lost": 0, "doubled": 0, "other": 0, "refused": 0, "unsure": 0}, said
    assert document(folder)["summary"]["failures"] == {}, said
    objections = [one for one in document(folder)["objections"] if "p99" not in one and "asked for" not in one]
    assert not objections  # how fast it was is not the question on a machine that runs other tests
    assert status == int(bool(document(folder)["objections"]))


def test_all_kinds_of_clients_were_there_and_some_came_back(smoke: tuple[Path, str, int]) -> None:
    folder, said, _ = smoke
    assert document(folder)["summary"]["facts"]["open"]["clients"] == CLIENTS + 30, said
    assert document(folder)["summary"]["facts"]["churn"]["left"] > 5, said


def test_locusts_own_statistics_have_the_deliveries(smoke: tuple[Path, str, int]) -> None:
    folder, said, _ = smoke
    rows = dict(re.findall(r"^(PUSH,feed|OPEN,clients|POST,/send/<id>),(\d+),", (folder / "locust_stats.csv").read_text(), re.MULTILINE))
    verdict = document(folder)["summary"]["verdict"]
    assert int(rows["PUSH,feed"]) == verdict["received"], said
    assert int(rows["POST,/send/<id>"]) == verdict["sent"], said
    assert int(rows["OPEN,clients"]) >= CLIENTS + 30, said


def test_the_report_stands_alone(smoke: tuple[Path, str, int]) -> None:
    folder, _, _ = smoke
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=.https?:", page)
    assert "mochiweb" in page
    document_again = subprocess.run(
        [sys.executable, "-m", "loadtest", "report", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert document_again.returncode == int(bool(document(folder)["objections"])), document_again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_that_was_started_ends_when_it_is_interrupted(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(command(tmp_path, "--duration", "60"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("run-*/timeline.jsonl")), 60)  # the service and Locust are there
        family = descendants(process.pid)[1:]
        assert len(family) >= 7
        process.send_signal(number)
        # two programs have thirty seconds each to end in order
        assert process.wait(100) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(command(tmp_path, "--clients", "100000000"), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "refused: " in run.stdout
    assert "clients fit" in run.stdout
    assert not list(tmp_path.glob("run-*"))
