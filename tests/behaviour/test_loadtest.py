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


def document(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_smoke_nothing_is_lost_and_the_report_says_all_of_it(tmp_path: Path) -> None:
    """One test: it takes half a minute of a core."""
    run = subprocess.run(command(tmp_path, "--duration", "6"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    (folder,) = tmp_path.glob("run-*")
    said = run.stdout + run.stderr + "".join(log.read_text() for log in folder.glob("*.log"))
    assert (folder / "report.json").exists(), said
    report = document(folder)
    summary, verdict = report["summary"], report["summary"]["verdict"]
    assert verdict is not None, said

    # every client got what it was due, once, and was never closed
    assert verdict["sent"] > 400, said
    assert verdict["received"] == verdict["due"] > verdict["sent"], said
    wrong = {name: verdict[name] for name in ("lost", "doubled", "other", "refused", "unsure")}
    assert wrong == dict.fromkeys(wrong, 0), said
    assert summary["failures"] == {}, said
    objections = [one for one in report["objections"] if "p99" not in one and "asked for" not in one]
    assert not objections  # how fast it was is not the question on a machine that runs other tests
    assert run.returncode == int(bool(report["objections"])), said

    # all kinds of clients were there, and some left and came back
    assert summary["facts"]["open"]["clients"] == CLIENTS + 30, said
    assert summary["facts"]["churn"]["left"] > 5, said

    # Locust's own statistics have the same
    rows = dict(re.findall(r"^(PUSH,feed|OPEN,clients|POST,/send/<id>),(\d+),", (folder / "locust_stats.csv").read_text(), re.MULTILINE))
    assert int(rows["PUSH,feed"]) == verdict["received"], said
    assert int(rows["POST,/send/<id>"]) == verdict["sent"], said
    assert int(rows["OPEN,clients"]) >= CLIENTS + 30, said

    # the page stands alone
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=.https?:", page)
    assert "mochiweb" in page


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
