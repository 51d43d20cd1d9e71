"""python -m loadtest: the data set of friends, in small."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.harness import ROOT, TIMEOUT

pytest.importorskip("igraph", reason="loadtest/requirements.txt is not installed")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False)


def make(out: Path, *arguments: str) -> str:
    """Make a data set; what it says of itself."""
    made = run("loadtest", "friends", "--users", "3000", "--each", "5", "--out", str(out), *arguments)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_the_data_set_is_what_it_says_and_can_be_loaded(tmp_path: Path) -> None:
    out = tmp_path / "friends.txt"
    said = make(out)
    pairs = [(int(follower), int(followee)) for follower, followee in (line.split() for line in out.read_text().splitlines())]
    assert f"3,000 users, {len(pairs):,} subscriptions" in said
    assert len(set(pairs)) == len(pairs), "nobody follows anybody twice"
    follows, followed = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    assert set(follows) | set(followed) == set(range(3000))
    assert all(follower > followee for follower, followee in pairs), "others that were there before"
    assert {follows[user] for user in range(5, 3000)} == {5}
    assert f"most {max(followed.values()):,}" in said
    assert max(followed.values()) > 100, "who has many followers gets more"
    loaded = run("comet", "load-friends", str(out), "--data", str(tmp_path / "data"))
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith(f"{len(pairs):,} lines, {len(pairs):,} new subscriptions, ")


def test_the_same_seed_makes_the_same_data_set(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    make(one)
    make(two)
    make(three, "--seed", "2")
    assert one.read_bytes() == two.read_bytes() != three.read_bytes()


@pytest.mark.parametrize("wrong", [["--users", "0"], ["--each", "x"], ["--what"]])
def test_a_bad_flag_is_said(wrong: list[str]) -> None:
    ended = run("loadtest", "friends", *wrong)
    assert (ended.returncode, "usage: " in ended.stderr) == (2, True)
