"""What the kernel knows of a process: memory that goes back."""

import platform
import subprocess
import sys

import pytest

from tests.harness import ROOT

HOLES = """
from comet.kernel.processes import give_back, resident

pieces = [bytes(1000) for _ in range(50_000)]
kept = pieces[::50]
del pieces
before = resident()
give_back()
print(before - resident(), len(kept))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_what_is_free_between_pieces_that_stay_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept == 1000
    assert returned > 35_000_000  # of 50 MB; a page at either end of each hole can't go
