"""Every knob, as a flag and as a variable; and what a bad one is told."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from comet import generation
from comet.__main__ import main as subcommands
from comet.settings import AUTO, NO_SETTINGS, Settings, Unreadable, number, objection, parse, shown, variable_of, with_secrets
from tests.harness import ROOT

Field = dataclasses.Field[Any]
FIELDS = dataclasses.fields(Settings)
NUMBERS = [field for field in FIELDS if isinstance(field.default, int | float) and not isinstance(field.default, bool)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def other(field: Field) -> tuple[str, Any]:
    """A value that is not the default, as text and as itself."""
    if isinstance(field.default, bool):
        return ("off", False) if field.default else ("on", True)
    if isinstance(field.default, str):
        return "text%s%%", "text%s%%"  # a per cent sign must not trip argparse
    least = max(1, field.metadata["least"])
    value = least + 1 if isinstance(field.default, int) else least + 1.5
    return str(value), value


def test_without_flags_and_variables_all_is_default() -> None:
    assert parse([], {}) == Settings()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: str(field.name))
def test_each_field_is_a_flag_and_a_variable_and_the_flag_wins(field: Field) -> None:
    text, value = other(field)
    changed = dataclasses.replace(Settings(), **{field.name: value})
    arguments = [flag(field.name), text]
    variable = "COMET_" + field.name.upper()
    assert parse(arguments, {}) == changed != Settings()
    assert parse([], {variable: text, "COMET": "x", field.name: "x"}) == changed
    assert type(getattr(parse([], {variable: text}), field.name)) is type(field.default)
    against = shown(field.default) if field.default != "" else ""
    assert parse(arguments, {variable: against}) == changed


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("on", True), ("true", True), ("YES", True), ("0", False), ("OFF", False), ("no", False), ("False", False), ("", False)],
)
def test_a_switch_may_be_said_in_words(text: str, value: bool) -> None:
    assert parse([], {"COMET_OPEN": text}).open is value
    assert parse(["--open", text], {"COMET_OPEN": "on" if not value else "off"}).open is value


def test_a_switch_alone_is_on() -> None:
    assert parse(["--open"], {"COMET_OPEN": "off"}).open is True
    assert parse(["--hibernate", "--port", "1"], {"COMET_HIBERNATE": "off"}).hibernate is True


def test_workers_may_be_left_to_the_service() -> None:
    assert parse(["--workers", "auto"], {"COMET_WORKERS": "3"}).workers == AUTO
    assert parse([], {"COMET_WORKERS": "auto"}).workers == AUTO
    assert parse(["--workers", "3"], {"COMET_WORKERS": "auto"}).workers == 3


@pytest.mark.parametrize(
    ("text", "host"), [("[::1]", "::1"), ("::1", "::1"), ("[::]", "::"), ("localhost", "localhost"), ("[::1", "[::1"), ("", "")]
)
def test_an_ipv6_address_may_have_the_brackets_of_a_url(text: str, host: str) -> None:
    assert parse(["--host", text], {}).host == parse([], {"COMET_HOST": text}).host == host


@pytest.mark.parametrize("text", ["unix:/run/comet.sock", "unix:comet.sock", "unix:", "/run/comet.sock"])
def test_a_unix_socket_is_not_supported_yet_and_that_is_said(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, environ in ((["--host", text], {}), ([], {"COMET_HOST": text})):
        with pytest.raises(SystemExit) as ended:
            parse(arguments, environ)
        assert ended.value.code == 2
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence.startswith("app.py: error: --host: ")
        assert "not supported yet" in sentence


@pytest.mark.parametrize(
    ("flags", "safe"),
    [
        ([], True),
        (["--host", "localhost"], True),
        (["--host", "::1"], True),
        (["--host", "[::1]"], True),
        (["--host", "[::]"], False),
        (["--host", "0.0.0.0"], False),
        (["--host", ""], False),
        (["--host", "0.0.0.0", "--open"], True),
        (["--host", "0.0.0.0", "--publish-key", "k"], True),
    ],
)
def test_what_is_open_to_everybody_is_objected_to(flags: list[str], safe: bool) -> None:
    assert (objection(parse(flags, {})) is None) == safe


@pytest.mark.parametrize(("key", "usable"), [("k", True), ("!~", True), (" ", False), ("a b", False), ("k\n", False), ("ü", False)])
def test_a_key_that_nobody_can_send_is_objected_to(key: str, usable: bool) -> None:
    sentence = objection(parse([], {"COMET_PUBLISH_KEY": key}))
    assert (sentence is None) == usable
    assert usable or "--publish-key has to be" in str(sentence)


def test_room_for_less_than_one_body_is_objected_to() -> None:
    assert objection(parse(["--max-bodies", "16777216"], {})) is None
    for flags in (["--max-bodies", "16777215"], ["--max-batch", "58720257"], ["--max-bodies", "16777216", "--max-body", "16777217"]):
        sentence = objection(parse(flags, {}))
        assert sentence is not None
        assert "--max-bodies" in sentence


BAD = [
    *((field.name, text) for field in NUMBERS for text in ("x", "-1", "nan", "", "1 2")),
    *((field.name, text) for field in NUMBERS if field.metadata["unit"] == "seconds" for text in ("inf", "1e300")),
    ("hang_limit", "1.9"),
    *((field.name, "1.5") for field in NUMBERS if isinstance(field.default, int)),
    *((field.name, str(field.metadata["most"] + 1)) for field in NUMBERS if field.metadata["most"] is not None),
    *((field.name, str(field.metadata["least"] - 1)) for field in NUMBERS if field.metadata["least"] > 0),
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_number_ends_with_status_2_and_a_sentence(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, environ in (([f"{flag(name)}={text}"], {}), ([], {"COMET_" + name.upper(): text})):
        with pytest.raises(SystemExit) as ended:
            parse(arguments, environ)
        assert ended.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith("app.py: error: ") and sentence.endswith("See app.py --help.")
        assert flag(name) in sentence and "e+" not in sentence


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--unknown"], "--unknown is not known here."),
        (["--max-heade", "3"], "--max-heade is not known here; did you mean --max-header?"),
        (["--max-heade=3"], "--max-heade is not known here; did you mean --max-header?"),
        (["--port"], "argument --port: expected one argument."),
        (["--port", "x"], "argument --port: 'x' should be a whole number."),
        (["--grace", "x"], "argument --grace: 'x' should be a number."),
        (["--workers", "x"], "argument --workers: 'x' should be a whole number or auto."),
        (["--max-body", "99999999"], "argument --max-body: 99999999 is not within 1 to 67108864."),
        (["--history-bytes", "-1"], "argument --history-bytes: -1 is not at least 0."),
        (["--redis-connect-timeout", "0"], "argument --redis-connect-timeout: 0 is not within 0.05 to 86400."),
        (["stray"], "stray is not known here."),
    ],
)
def test_a_bad_flag_ends_with_status_2_and_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, {})
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"app.py: error: {told} See app.py --help.\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "--clint", "3"], "did you mean --clients?"),
        (["top", "--evry=1"], "did you mean --every?"),
        (["check", "--clients", "x"], "--clients"),
        (["chek"], "'check', 'top', 'load-friends'"),
        ([], "command"),
    ],
)
def test_so_does_a_bad_subcommand(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        subcommands(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m comet") and ": error: " in line and told in line


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("COMET_MAXBODY", "the variable COMET_MAXBODY is not known; did you mean COMET_MAX_BODY?"),
        ("COMET_HEARTBEATS", "the variable COMET_HEARTBEATS is not known; did you mean COMET_HEARTBEAT?"),
        ("COMET_XYZZY", "the variable COMET_XYZZY is not known."),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([], {name: "3"})
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"app.py: error: {told} See app.py --help.\n"


def test_what_kubernetes_sets_for_its_services_is_not_taken_for_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    links = {
        "COMET_REDIS_SERVICE_HOST": "10.0.0.1", "COMET_REDIS_SERVICE_PORT": "6379", "COMET_REDIS_SERVICE_PORT_REDIS": "6379",
        "COMET_REDIS_PORT": "tcp://10.0.0.1:6379", "COMET_REDIS_PORT_6379_TCP_ADDR": "10.0.0.1",
    }  # fmt: skip
    assert parse([], links) == Settings()
    assert parse([], {**links, "COMET_GRACE": "3"}).grace == 3
    with pytest.raises(SystemExit):
        parse([], {name: text for name, text in links.items() if name != "COMET_REDIS_SERVICE_HOST"})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse([], {"COMET_SERVICE_HOST": "10.0.0.1", "COMET_PORT": "tcp://10.0.0.1:8000"})
    assert "Kubernetes" in capsys.readouterr().err


def test_each_variable_that_is_named_anywhere_is_a_setting_or_known_to_be_none() -> None:
    known = {variable_of(field.name) for field in FIELDS} | NO_SETTINGS | {generation.VARIABLE}
    known.add("COMET_MAXBODY")  # the mistake that tests make
    files = [ROOT / "app.py", ROOT / "Makefile", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("comet", "handlers", "loadtest", "deploy", "tests"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".env", ".service", ".socket", ".conf", "")]
    ours = Path(__file__)
    found = {
        name: path
        for path in files
        if path.is_file() and path != ours
        for name in re.findall(r"\bCOMET_[A-Z][A-Z_]*[A-Z]\b", path.read_text())
    }
    assert {name: path for name, path in found.items() if name not in known} == {}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (55.0, "55"), (0.05, "0.05"), (1 << 28, "268435456"), (1e6, "1000000"), (67108864.0, "67108864")]
)
def test_a_number_is_shown_as_one(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("name", ["publish_key", "backplane"])
def test_a_secret_may_be_in_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("redis://:secret@127.0.0.1\n")
    given = [f"{flag(name)}-file", str(path)]
    assert getattr(with_secrets(parse(given, {})), name) == "redis://:secret@127.0.0.1"
    with pytest.raises(Unreadable, match=f"{flag(name)} or {flag(name)}-file, not both"):
        with_secrets(parse([*given, flag(name), "redis://other"], {}))
    for text in ("", "\n", "two words", "two\nlines", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        path.write_text(text)
        with pytest.raises(Unreadable, match="one line of printable ASCII"):
            with_secrets(parse(given, {}))
    path.unlink()
    with pytest.raises(Unreadable, match=f"No such file or directory.*{flag(name)}-file names a file"):
        with_secrets(parse(given, {}))


@pytest.mark.parametrize(
    ("arguments", "environ", "told"),
    [
        (["--open=maybe"], {}, "argument --open: 'maybe' is not on or off"),
        ([], {"COMET_OPEN": "maybe"}, "COMET_OPEN (--open): 'maybe' is not on or off"),
    ],
)
def test_a_bad_switch_ends_with_status_2_and_names_its_flag_or_variable(
    arguments: list[str], environ: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, environ)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def helped(environ: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break the lines at hyphens
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], environ)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_unit_default_and_reason_of_each_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = helped({}, capsys, monkeypatch)
    for field in FIELDS:
        assert field.metadata["reason"].strip()
        line = re.search(rf"^ +{flag(field.name)}\b.*(?:\n {{10,}}.*)?", text, re.MULTILINE)
        assert line, field.name
        assert f"[{field.metadata['unit']}] {field.metadata['reason']}" in line[0]
        assert f"(default: {shown(field.default)})" in line[0]
        assert "e+" not in shown(field.default)


def test_help_does_not_tell_the_publish_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "very-secret" not in helped({"COMET_PUBLISH_KEY": "very-secret"}, capsys, monkeypatch)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_readme_says_what_help_says(field: Field) -> None:
    default = field.default
    if isinstance(default, bool):
        text = "on" if default else "off"
    elif isinstance(default, int):
        text = f"{default:,}" if default >= 10_000 else str(default)
    else:
        text = f"{default:g}" if isinstance(default, float) else str(default or "none")
    row = f"| `{flag(field.name)}` | {text} | {field.metadata['unit']} | {field.metadata['reason']} |\n"
    assert row in (ROOT / "README.md").read_text()
