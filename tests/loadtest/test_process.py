"""Starting and ending programs, and what is read of them while they end."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.process import descendants, program
from loadtest.sampler import Sampler
from tests.harness import wait_until

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"


def test_a_program_is_killed_where_its_end_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), program(["-c", STUBBORN], log) as process:
        wait_until(log.read_text)

        def interrupted(_: float) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "wait", interrupted)
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_ends_while_it_is_listed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(Path, "glob", gone)
    assert descendants(7) == [7]


def test_memory_is_added_up_anew_where_processes_have_changed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Sampler.__module__]
    sums: list[int] = []
    family = [1, 2]
    monkeypatch.setattr(module, "TREE", -1.0)  # each sample looks for processes
    monkeypatch.setattr(module, "descendants", lambda _: list(family))

    def memory(pid: int) -> int:
        sums.append(pid)
        return 5

    monkeypatch.setattr(module, "_memory", memory)
    sampler = Sampler(tmp_path / "samples")
    sampler.roots["load"] = 1
    sampler.sample()
    assert len(sums) == 3  # this one as well
    sampler._cost = 1e9
    sampler.sample()
    assert len(sums) == 3
    family.append(3)
    assert sampler.sample()["load"]["memory"] == 20
