"""The report, from a recorded run (Smoke, 2,000 clients): what it says, and what it objects to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.report import figures, gather, judge, report, soak

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(RECORDED, tmp_path / "run")
    return tmp_path / "run"


def changed(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def test_what_is_written(folder: Path) -> None:
    document = report(folder)
    assert document["objections"] == []
    assert json.loads((folder / "report.json").read_text())["figures"]
    assert len(list(folder.glob("*.png"))) == 5
    page = (folder / "report.html").read_text()
    assert "Passed" in page
    assert "2,030 in" in page
    assert page.count("data:image/png") == 5


def test_columns_are_of_one_length_and_of_the_run(folder: Path) -> None:
    series = gather(folder)["series"]
    for part in ("clients", "machine"):
        assert len({len(column) for column in series[part].values()}) == 1
    assert max(series["clients"]["open"]) == 2030
    assert max(series["machine"]["service"]) > 20 << 20
    assert [name for _, name in series["sections"]] == ["opening", "messages", "churn", "audit"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda summary: summary["failures"].update({"/test: closed: by the server": 3}), "closed: by the server: 3"),
        (lambda summary: summary["facts"].update(failed="all is lost"), "all is lost"),
        (lambda summary: summary.update(verdict=None), "no audit"),
        (lambda summary: summary["verdict"].update(unsure=2), "2 not confirmed"),
        (lambda summary: summary["facts"]["messages"][0].update(p99=1500.0), "p99 1,500 ms"),
        (lambda summary: summary["facts"]["messages"][0].update(achieved=1.0), "1/s of"),
    ],
)
def test_what_it_objects_to(folder: Path, change: Callable[[Any], None], said: str) -> None:
    changed(folder, "summary.json", change)
    (objection,) = judge(gather(folder))
    assert said in objection


def test_steps_of_the_search_may_be_slow(folder: Path) -> None:
    changed(folder, "summary.json", lambda summary: summary["facts"]["messages"][0].update(p99=1500.0, name="9,000 messages/s"))
    assert not judge({**gather(RECORDED), "summary": json.loads((folder / "summary.json").read_text())})


def test_what_the_search_had_refused_is_told_and_no_failure(folder: Path) -> None:
    def searched(summary: Any) -> None:
        summary["verdict"].update(unsure=7, refused=2)
        summary["facts"]["search"] = {"unsure": 6, "refused": 2}

    changed(folder, "summary.json", searched)
    document = gather(folder)
    assert judge(document) == ["of the messages 0 were refused, and 1 not confirmed"]
    assert ("at rates that were too high", "2 messages refused, 6 not confirmed") in document["figures"]


@pytest.mark.parametrize(("end", "grown"), [(104, False), (110, True), (60, False)])
def test_a_soak_looks_at_growth_after_it_is_warm(end: int, grown: bool) -> None:
    at = list(range(2000))
    memory = [50 if second < 290 else 100 + (end - 100) * max(0, second - 350) / 1640 for second in at]
    document = {
        "series": {"sections": [(0, "messages"), (2000, "audit")], "clients": {"at": [2000]}, "machine": {"at": at, "service": memory}},
        "figures": [],
    }
    assert bool(soak(document)) == grown


def test_a_run_that_was_cut_off_has_a_report_too(folder: Path) -> None:
    (folder / "timeline.jsonl").write_text("")
    (folder / "samples.jsonl").write_text("")
    assert report(folder)["figures"]


def test_a_service_on_another_machine_is_not_judged_by_memory() -> None:
    at = list(range(100))
    machine = {"at": at, "service": [0] * 100}
    document: Any = {"series": {"sections": [(0, "messages"), (99, "audit")], "clients": {"at": [99]}, "machine": machine}, "figures": []}
    assert soak(document) == []
    assert document["figures"] == [("memory's growth", "unknown: the service is on another machine")]


def test_cores_are_those_of_the_messages_without_the_drain(folder: Path) -> None:
    document = gather(folder)
    since, seconds = {name: at for at, name in document["series"]["sections"]}["messages"], 5.0
    machine = document["series"]["machine"]
    machine["load_cores"] = machine["busy_cores"] = [1.0 if at <= since + seconds else 0.0 for at in machine["at"]]
    document["plan"]["workers"] = 0
    document["summary"]["facts"]["messages"][0]["seconds"] = seconds
    assert dict(figures(document))["CPU: messages"].startswith("load 1.00 cores, ")
