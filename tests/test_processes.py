"""What the kernel knows of a process: memory that goes back."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from comet.kernel.processes import Kept
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


def test_what_is_read_of_proc_is_this_process_s_own_also_without_a_descriptor() -> None:
    statm = Kept("/proc/self/stat")
    assert int(statm.read().split()[0]) == os.getpid()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert int(statm.read().split()[0]) == os.getpid()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, statm.read().split()[0])
        os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(read, 100)) == pid
    os.close(read)
    os.close(write)
