"""The tables of refusals and closings, held together with the source and with README."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from comet.errors import CLOSINGS, HEADERS, STATUS, Refusal
from tests.harness import ROOT

SOURCES = [
    path for path in (ROOT / "app.py", *(ROOT / "comet").rglob("*.py"), *(ROOT / "handlers").rglob("*.py")) if path.name != "errors.py"
]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
SLUG = re.compile(r"[a-z]+(-[a-z]+)*")


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""


def values(node: ast.AST | None, tree: ast.AST) -> Iterator[str]:
    """The strings an expression can be, as far as they stand in its module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*values(node.body, tree), *values(node.orelse, tree))
    elif isinstance(node, ast.BoolOp | ast.Dict):
        for one in node.values:
            yield from values(one, tree)
    elif isinstance(node, ast.Call) and name_of(node) == "get" and isinstance(node.func, ast.Attribute):  # a table with a default
        yield from (*values(node.func.value, tree), *values(node.args[1], tree))
    elif isinstance(node, ast.Name):
        for assignment in ast.walk(tree):
            if isinstance(assignment, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == node.id for target in assignment.targets
            ):
                yield from values(assignment.value, tree)


def used(*names: str, arguments: slice = slice(1)) -> dict[str, Path]:
    """Every string that those arguments (the first) of a call of one of `names` can be, and where."""
    found = {}
    for path, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and name_of(call) in names:
                for argument in call.args[arguments]:
                    found.update(dict.fromkeys(values(argument, tree), path))
    return found


def test_every_slug_in_the_source_has_a_status_and_every_status_is_used() -> None:
    assert set(used("Refusal")) == set(STATUS)


def test_every_refusals_slug_can_be_read_from_the_source() -> None:
    for path, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and name_of(call) == "Refusal":
                assert set(values(call.args[0], tree)), f"{path}:{call.lineno}: this test can't tell the slug"


def test_every_closing_in_the_source_is_explained_and_every_explained_one_is_used() -> None:
    # `end` and `abandon` say why; what nobody said is named where a subscriber leaves its home
    ends = {**used("end", "abandon", "leave", arguments=slice(2)), **used("_end", arguments=slice(1, 2))}
    assert set(ends) == set(CLOSINGS)
    idle = {"idle"}  # a connection's reason: no subscriber is there then
    assert set(used("_close", arguments=slice(1, 2))) - idle <= set(CLOSINGS)


@pytest.mark.parametrize("slug", STATUS)
def test_a_refusal_has_a_valid_status_and_is_in_readme(slug: str) -> None:
    refusal = Refusal(slug, "A sentence.")
    assert SLUG.fullmatch(slug)
    assert 400 <= refusal.status < 600
    assert refusal.headers == HEADERS.get(slug, {})
    assert refusal.document() == {"error": slug, "detail": "A sentence."}
    assert f"| `{slug}` | {refusal.status} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("reason", CLOSINGS)
def test_a_closing_is_a_sentence_and_is_in_readme(reason: str) -> None:
    assert SLUG.fullmatch(reason)
    assert CLOSINGS[reason].endswith(".")
    assert f"`{reason}`" in (ROOT / "README.md").read_text()


def test_headers_belong_to_slugs_and_waits_are_seconds() -> None:
    assert set(HEADERS) <= set(STATUS)
    waits = {slug: headers["Retry-After"] for slug, headers in HEADERS.items() if "Retry-After" in headers}
    assert all(wait.isdigit() and int(wait) > 0 for wait in waits.values())
    assert {slug for slug, status in STATUS.items() if status in (429, 503)} == set(waits)
    assert all("WWW-Authenticate" in HEADERS[slug] for slug, status in STATUS.items() if status == 401)


def test_a_refusal_of_no_known_slug_is_a_bug() -> None:
    with pytest.raises(KeyError):
        _ = Refusal("no-such-slug", "A sentence.").status
