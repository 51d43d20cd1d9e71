"""What surrounds a load test, without the programs that it starts."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest import million
from loadtest.million import Order, Refused, carry_out, prepare
from loadtest.plan import Plan

PLAN = Plan(clients=10, port=8000, workers=1, processes=1, each=10, addresses=1, memory=0, available=0)


class Started:
    """Stands for a program: `status` as it is asked for again and again."""

    pid = 1 << 22  # the first that Linux never gives
    returncode = 1

    def __init__(self, status: int | None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status


def programs(folder: Path, service: int | None, summary: bool) -> Callable[..., Any]:
    """The service, with this status, and a Locust that writes its summary, or not, when it is told to end."""

    @contextmanager
    def program(command: list[str], log: Path, **_: Any) -> Iterator[Started]:
        load = "locust" in command
        yield Started(None if load else service)
        if load and summary:
            (folder / "summary.json").write_text("{}")

    return program


@pytest.mark.parametrize("summary", [True, False])
def test_why_it_was_ended_early_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: bool) -> None:
    monkeypatch.setattr(million, "program", programs(tmp_path, service=1, summary=summary))
    monkeypatch.setattr(million, "wait_until_ready", lambda *_: None)
    arguments = Order(clients=10, duration=1, rate=1), PLAN, tmp_path, "friends.txt", Console(quiet=True)
    if summary:  # Locust writes it as it ends
        (said,) = carry_out(*arguments)
    else:
        with pytest.raises(Refused) as refused:
            carry_out(*arguments)
        said = str(refused.value)
    assert "the service ended with status 1" in said


def test_a_locust_that_did_not_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def program(*_: Any, **__: Any) -> Iterator[Started]:
        yield Started(2)

    monkeypatch.setattr(million, "program", program)
    with pytest.raises(Refused, match="Locust did not run"):
        carry_out(Order(clients=10, duration=1, rate=1, host="http://10.0.0.1"), PLAN, tmp_path, "", Console(quiet=True))


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"then": "churn,chrun"}, "--then chrun"),
        ({"endpoints": "test:1,tset"}, "'tset'"),
        ({"host": "http://127.0.0.1", "friends": "/nowhere/friends.txt"}, "--friends /nowhere/friends.txt"),
        ({"host": "https://127.0.0.1"}, "plain HTTP"),
        ({"host": "http://127.0.0.1/comet"}, "the root"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(order: dict[str, str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        prepare(PLAN, Order(clients=10, duration=1, rate=1, **order), Console(quiet=True))  # type: ignore[arg-type]


def test_a_port_on_which_another_service_listens_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Refused, match=f"something listens on port {port} already"):
            prepare(PLAN, Order(clients=10, duration=1, rate=1, port=port), Console(quiet=True))
