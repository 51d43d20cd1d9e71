"""Imports go one way (CONTRIBUTING.md): every import of ours is in the table below, or it is a mistake."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT

SPOKEN = {"comet.errors", "comet.message"}
SERVER = {
    "comet.errors", "comet.refusals", "comet.hosts", "comet.log", "comet.origins", "comet.settings", "comet.stats", "comet.kernel",
    "comet.server", "comet.turn",
}  # fmt: skip
HUB = {
    *SPOKEN,
    "comet.backplane",
    "comet.fanout",
    "comet.framing",
    "comet.history",
    "comet.replays",
    "comet.stats",
    "comet.subscriber",
    "comet.turn",
}
PROCESSES = {"comet.board", "comet.counts", "comet.kernel", "comet.log", "comet.settings"}
REDIS = {
    *SPOKEN, "comet.history", "comet.turn", "comet.backplane", "comet.backplane.redis_dial", "comet.backplane.redis_scripts",
    "comet.backplane.redis_format", "comet.backplane.redis_link", "comet.backplane.redis_shards", "comet.backplane.redis_calls",
    "comet.backplane.redis_outage", "comet.backplane.redis_malformed",
}  # fmt: skip
HANDLER = {
    "comet.hub", "comet.message", "comet.framing", "comet.subscriber", "comet.stats", "comet.settings", "comet.errors", "comet.turn",
    "comet.subscriptions", "comet.subscriptions_redis", "comet.log", "comet.origins", "comet.refusals", "handlers.params",
}  # fmt: skip
"""A handler speaks to the hub; it knows neither the backplane nor the server."""

ALLOWED: dict[str, set[str]] = {
    # the leaves
    "comet": set(),
    "comet.arguments": set(),
    "comet.__main__": {"comet.arguments", "comet.settings", "comet.kernel", "comet.top", "comet.loading", "comet.loading_redis"},
    "comet.loading_redis": {"comet.database", "comet.loading", "comet.subscriptions_redis"},
    "comet.subscriptions_redis": {"comet.errors", "comet.database", "comet.turn"},
    "comet.loading": {*SPOKEN, "comet.database"},
    "comet.top": set(),
    "comet.service": set(),
    "comet.log": {"comet.kernel"},
    "comet.systemd": {"comet.kernel.stock"},
    "comet.database": set(),
    "comet.errors": set(),
    "comet.origins": set(),
    "comet.hosts": {"comet.origins"},
    "comet.refusals": {"comet.errors"},
    "comet.replays": {*SPOKEN, "comet.history", "comet.turn"},
    "comet.settings": {"comet.arguments", "comet.hosts", "comet.origins"},
    "comet.stats": set(),
    "comet.turn": set(),
    "comet.permit": {"comet.turn"},
    "comet.rest": {"comet.turn", "comet.kernel"},
    "comet.collector": {"comet.kernel", "comet.stats"},
    "comet.kernel": set(),
    "comet.kernel.check": {"comet.kernel"},
    "comet.kernel.limits": set(),
    "comet.kernel.machine": set(),
    "comet.kernel.memory": {"comet.kernel.processes"},
    "comet.kernel.output": {"comet.kernel.stock"},
    "comet.kernel.patch": set(),
    "comet.kernel.processes": {"comet.kernel.stock"},
    "comet.kernel.sockets": {"comet.kernel"},
    "comet.kernel.stock": set(),
    # the processes, which have no greenlets
    "comet.generation": PROCESSES,
    "comet.policy": {"comet.settings", "comet.kernel"},
    "comet.listeners": {"comet.settings", "comet.kernel"},
    "comet.loop": set(),
    "comet.children": {"comet.board", "comet.generation", "comet.kernel", "comet.policy"},
    "comet.supervisor": {
        *PROCESSES,
        "comet.children",
        "comet.generation",
        "comet.listeners",
        "comet.loop",
        "comet.policy",
        "comet.service",
        "comet.systemd",
    },
    "comet.message": {"comet.errors"},
    # the way of a message
    "comet.framing": {"comet.message"},
    "comet.history": {"comet.message"},
    "comet.subscriber": {"comet.message", "comet.framing", "comet.history"},
    "comet.fanout": {"comet.message", "comet.framing"},
    "comet.board": set(),
    "comet.counts": set(),
    "comet.router": {
        *SPOKEN,
        "comet.history",
        "comet.settings",
        "comet.stats",
        "comet.collector",
        "comet.log",
        "comet.board",
        "comet.kernel",
        "comet.backplane.frames",
        "comet.backplane.memory",
    },
    "comet.subscriptions": {"comet.errors", "comet.database", "comet.turn"},
    "comet.hub": HUB,
    "comet.backplane": {*SPOKEN, "comet.history"},
    "comet.backplane.frames": {*SPOKEN},
    "comet.backplane.link": {*SPOKEN, "comet.turn", "comet.backplane.frames"},
    "comet.backplane.router": {
        *SPOKEN,
        "comet.history",
        "comet.turn",
        "comet.backplane",
        "comet.backplane.frames",
        "comet.backplane.link",
    },
    "comet.backplane.memory": {*SPOKEN, "comet.history", "comet.backplane"},
    "comet.backplane.redis": {
        *REDIS,
        "comet.backplane.memory",
        "comet.backplane.redis_following",
        "comet.backplane.redis_acknowledged",
        "comet.backplane.redis_replicas",
    },
    "comet.backplane.redis_following": {*REDIS, "comet.backplane.memory", "comet.backplane.redis_lease"},
    "comet.backplane.redis_lease": {*REDIS},
    "comet.backplane.redis_acknowledged": {*REDIS, "comet.backplane.memory"},
    "comet.backplane.redis_calls": {*SPOKEN, "comet.backplane.redis_link", "comet.backplane.redis_shards"},
    "comet.backplane.redis_replicas": {"comet.backplane.redis_dial", "comet.backplane.redis_link"},
    "comet.backplane.redis_shards": {*REDIS},
    "comet.backplane.redis_link": {"comet.backplane.redis_dial", "comet.backplane.redis_outage", "comet.backplane.redis_scripts"},
    "comet.backplane.redis_format": {*SPOKEN, "comet.history"},
    "comet.backplane.redis_scripts": {"comet.backplane.memory", "comet.message"},
    "comet.backplane.redis_dial": set(),
    "comet.backplane.redis_speaker": set(),
    "comet.backplane.redis_outage": {"comet.backplane.redis_speaker"},
    "comet.backplane.redis_malformed": {"comet.backplane.redis_speaker"},
    # the server, which knows a subscriber only by its small interface
    "comet.server": set(),
    "comet.server.addresses": {"comet.counts"},
    "comet.server.appointments": set(),
    "comet.server.body": SERVER,
    "comet.server.blocks": SERVER,
    "comet.server.connection": SERVER,
    "comet.server.crew": SERVER,
    "comet.server.http": SERVER,
    "comet.server.newcomers": SERVER,
    "comet.server.parking": SERVER,
    "comet.server.posts": SERVER,
    "comet.server.proxies": SERVER,
    "comet.server.share": SERVER,
    "comet.server.short": SERVER,
    "comet.server.transport": SERVER,
    "comet.server.wsgi": SERVER,
    # the endpoints: none knows another
    "handlers": {*HANDLER, "handlers"},
    "handlers.params": HANDLER - {"handlers.params"},
    "handlers.channels": HANDLER,
    "handlers.health": HANDLER,
    "handlers.metabrew": HANDLER,
    "handlers.page": HANDLER,
    "handlers.poll": HANDLER,
    "handlers.publish": HANDLER,
    "handlers.stream": HANDLER,
    "handlers.users": HANDLER,
}
"""Module -> what it may import of ours. A package that holds modules of one kind stands for them all
(`comet.kernel`, `comet.server`, and for the URL table `handlers`); `comet.backplane` is the contract alone."""

KINDS = {"comet.kernel", "comet.server", "handlers"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("comet", "handlers")
    for path in (ROOT / folder).rglob("*.py")
}


def imports(path: Path, module: str) -> Iterator[str]:
    """Every import of ours in a file, wherever it stands, as the module that is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where they go"
            source = node.module or ""
            names = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("comet", "handlers", "app", "tests", "loadtest"))


def permitted(target: str, allowed: set[str]) -> bool:
    return target in allowed or any(target.startswith(kind + ".") for kind in KINDS & allowed)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_it_may(module: str) -> None:
    assert module in ALLOWED, "a new module: say in ALLOWED what it may import"
    wrong = [target for target in imports(MODULES[module], module) if not permitted(target, ALLOWED[module])]
    assert not wrong


def test_the_table_names_modules_that_exist() -> None:
    assert set(ALLOWED) == set(MODULES)


def test_there_are_no_cycles() -> None:
    graph = {module: set(imports(path, module)) for module, path in MODULES.items()}
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & set(graph)}
        assert leaves, f"a cycle within {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in leaves}


def test_the_supervisor_does_not_even_load_gevent() -> None:
    code = "import sys, comet.supervisor, comet.generation; sys.exit('gevent' in sys.modules or 'greenlet' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_without_a_backplane_in_redis_its_client_is_not_loaded() -> None:
    code = "import sys, app; sys.exit('redis' in sys.modules or 'hiredis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_imports_the_composition_root() -> None:
    everything = [path for folder in ("comet", "handlers", "loadtest", "tests", "deploy") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in everything if "app" in imports(path, str(path))]


def test_load_tests_know_nothing_but_the_kernel_and_the_loop_and_meet_the_server_over_http() -> None:
    for path in (ROOT / "loadtest").rglob("*.py"):
        ours = [target for target in imports(path, str(path)) if target.split(".")[0] != "loadtest"]
        measured = {"comet.subscriptions"} if path.name == "lookups.py" else set()  # what takes 20 us is lost in a request
        assert all(target.startswith("comet.kernel") or target in {"comet.turn"} | measured for target in ours), path


def test_no_module_runs_an_import_by_name() -> None:
    """The table would not see it."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Name) and node.id in ("__import__", "importlib")), module
