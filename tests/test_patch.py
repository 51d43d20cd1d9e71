"""The patch of the standard library: all of it, and plugins of gevent are found by one search."""

import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT

PROGRAM = """
import sys
from importlib import metadata

searches = []
sys.addaudithook(lambda event, arguments: searches.append(arguments[0]) if event == "open" and "plugged" in str(arguments[0]) else None)
before = metadata.entry_points
from comet.kernel.patch import patch_all
from gevent import monkey

patch_all()
assert metadata.entry_points is before
assert all(map(monkey.is_module_patched, ("socket", "ssl", "threading", "select", "subprocess", "time")))
print(sum(str(path).endswith("entry_points.txt") for path in searches))
"""


def test_a_plugin_of_gevent_is_called_and_found_by_one_search(tmp_path: Path) -> None:
    (tmp_path / "plugged.py").write_text("def plugin(event):\n    print(type(event).__name__)\n")
    package = tmp_path / "plugged-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[gevent.plugins.monkey.did_patch_all]\nplugged = plugged:plugin\n")
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["GeventDidPatchAllEvent", "1"], said
