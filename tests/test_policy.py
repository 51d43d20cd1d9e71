"""What the supervisor decides, without a process: how many workers, when what died is started again, who is alive."""

import signal

import pytest

from comet.kernel.limits import RESERVE
from comet.policy import LEAST_LIFE, MOST_DEATHS, MOST_DELAY, Restarts, Vigil, alone, describe, plan, stand_ins
from comet.settings import AUTO

PLENTY = 1 << 40


def test_the_first_death_is_mended_at_once_and_the_next_ones_later() -> None:
    restarts = Restarts()
    assert [restarts.after(1, ready=False) for _ in range(10)] == [0, 0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    for _ in range(10_000):  # a week
        assert restarts.after(1, ready=False) == MOST_DELAY


def test_what_never_gets_ready_is_hopeless_until_it_does() -> None:
    restarts = Restarts()
    for _ in range(MOST_DEATHS - 1):
        restarts.after(100, ready=False)
        assert not restarts.hopeless
    restarts.after(100, ready=False)
    assert restarts.hopeless
    assert restarts.after(100, ready=True) == 0
    assert not restarts.hopeless
    assert [restarts.after(1, ready=False) for _ in range(3)] == [0, 0.5, 1]


def test_who_was_ready_is_started_again_however_often_but_not_faster_than_that() -> None:
    restarts = Restarts()
    for _ in range(10):
        for lived, delay in ((100.0, 0.0), (0.25, 0.0), (0.25, LEAST_LIFE - 0.25), (0.0, LEAST_LIFE), (LEAST_LIFE, 0.0), (0.25, 0.0)):
            assert restarts.after(lived, ready=True) == delay
        assert restarts.after(0, ready=False) == 0


def test_each_listener_that_nobody_serves_has_one_stand_in_at_a_time_and_in_turn_all() -> None:
    held = {10: [0, 1, 2, 3], 12: [2, 3, 0, 1], 13: [3, 0]}
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for turn in range(6):
        found = stand_ins([0, 1], held, turn)
        assert sorted(listener for listeners in found.values() for listener in listeners) == [0, 1]
        for slot, listeners in found.items():
            for listener in listeners:
                seen[listener].add(slot)
    assert seen == {0: {10, 12, 13}, 1: {10, 12}}


def test_where_nobody_can_stand_in_nobody_does() -> None:
    assert stand_ins([0, 1], {}, 7) == {}
    assert stand_ins([0, 1], {5: [1, 2]}, 7) == {5: [1]}
    assert stand_ins([], {5: [1, 2]}, 7) == {}


@pytest.mark.parametrize(
    ("clients", "cores", "workers"),
    [
        (0, 2, 2),
        (0, 64, 64),
        (1, 2, 2),
        (33_564, 2, 2),  # 2 x 19,744 x 0.85 = 33,564.8
        (33_565, 2, 3),
        (1_000_000, 2, 60),
        (1_000_000, 64, 64),
    ],
)
def test_auto_takes_as_many_as_the_clients_need_and_no_fewer_than_cores(clients: int, cores: int, workers: int) -> None:
    made = plan(AUTO, clients, 0, 20_000, PLENTY, cores)
    assert (made.workers, made.each, made.warnings) == (workers, 20_000 - RESERVE, [])
    assert made.clients == int(workers * (20_000 - RESERVE) * 0.85) >= clients


def test_auto_reckons_with_a_limit_on_connections() -> None:
    assert plan(AUTO, 10_000, 1_000, 20_000, PLENTY, 2).workers == 12


def test_a_number_is_a_number() -> None:
    made = plan(3, 0, 0, 20_000, PLENTY, 64)
    assert (made.workers, made.warnings) == (3, [])


def test_the_fewest_connections_are_one_client() -> None:
    assert plan(1, 0, 1, 20_000, PLENTY, 2).clients == 1


def test_what_is_too_little_is_told_with_what_to_set() -> None:
    (warning,) = plan(10, 1_000_000, 0, 20_000, PLENTY, 2).warnings
    assert "--workers 60" in warning
    assert "LimitNOFILE" in warning
    assert f"to {117_648 + RESERVE}" in warning
    assert plan(10, 1_000_000, 0, 117_648 + RESERVE, PLENTY, 2).warnings == []
    (warning,) = plan(2, 10_000, 1_000, 20_000, PLENTY, 2).warnings
    assert "--max-connections" in warning
    (warning,) = plan(2, 0, 30_000, 20_000, PLENTY, 2).warnings
    assert "30000 connections a worker" in warning
    (warning,) = plan(AUTO, 1_000_000, 0, 20_000, 500_000, 2).warnings
    assert "fs.file-max" in warning


@pytest.mark.parametrize(("clients", "max_connections", "allowed"), [(0, 0, 100), (100, 0, 100), (100, 200, 100), (50, 50, 100)])
def test_one_process_that_holds_its_clients_says_nothing(clients: int, max_connections: int, allowed: int) -> None:
    assert alone(clients, max_connections, allowed) == []


def test_one_process_that_can_not_hold_its_clients_says_what_to_set() -> None:
    (sentence,) = alone(1_000_000, 0, 20_000 - RESERVE)
    assert sentence == (
        "1000000 clients were asked for; one process holds 19744: set --workers 60 (or auto), "
        "or raise the limit on open files (ulimit -Hn, LimitNOFILE) to 1000256."
    )
    assert plan(60, 1_000_000, 0, 20_000, 10**7, 2).warnings == []
    (sentence,) = alone(600, 500, 20_000)
    assert sentence.endswith("one process holds 500: set --workers 2 (or auto), or raise --max-connections to 600.")
    assert plan(2, 600, 500, 20_000, 10**7, 2).warnings == []


def test_a_tiny_limit_on_files_still_gives_a_plan() -> None:
    assert plan(2, 0, 0, 100, PLENTY, 2)[:2] == (2, 1)


def test_statuses_are_told_in_words() -> None:
    assert describe(3) == "exited with status 3"
    assert describe(-signal.SIGKILL) == "was ended by SIGKILL"
    assert describe(-99) == "was ended by signal 99"


def test_a_service_is_alive_while_every_place_has_a_sign_of_life_from_somebody() -> None:
    vigil = Vigil(patience=60)
    assert vigil.alive(0, {})  # nobody was there yet
    assert vigil.alive(1, {1: 1.0, 2: 1.0, 3: 1.0})
    assert vigil.alive(61, {1: 61.0, 2: 61.0, 3: 1.0})  # one hangs: it is replaced
    assert vigil.alive(90, {1: 90.0, 2: 90.0, 3: 70.0})  # by another in its place
    assert vigil.alive(130, {1: 130.0, 2: 130.0})  # it died, and may be started again for so long
    assert not vigil.alive(131, {1: 131.0, 2: 131.0})  # it was not
    assert vigil.alive(132, {1: 132.0, 2: 132.0, 3: 132.0})
    assert not vigil.alive(193, {2: 193.0, 3: 193.0})  # nor may the router be away


def test_who_was_stopped_and_goes_on_is_judged_by_what_is_said_now() -> None:
    vigil = Vigil(patience=60)
    assert vigil.alive(0, {1: 0.0, 2: 0.0})
    assert vigil.alive(1000, {1: 999.5, 2: 999.5})
