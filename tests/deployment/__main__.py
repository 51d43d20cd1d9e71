"""deploy/verify: follows deploy/README.md on a machine that systemd has booted, and breaks it in every way it is to survive.

A line a check. Exit status 0: all is well; 1: something is not; 3: no machine can be booted here, and the units alone
were checked.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from tests.deployment.checks import CHECKS
from tests.deployment.deployed import Deployed
from tests.deployment.machine import Machine, missing, verify_units

MOST_SECONDS = {False: 580.0, True: 800.0}
"""After so long everything is ended, whatever it does; in full or not."""


def attempt(name: str, work: Callable[[], str]) -> bool:
    """Do one check and say how it went; whether it did well."""
    began = time.monotonic()
    try:
        said = work()
    except Exception as error:
        traceback.print_exc()
        print(f"FAIL {name}: {error!r}", flush=True)  # noqa: T201
        return False
    print(f"ok   {name}: {said} ({time.monotonic() - began:.1f} s)", flush=True)  # noqa: T201
    return True


def main() -> int:
    """All of it; the exit status."""
    parser = argparse.ArgumentParser(prog="deploy/verify", description="Check deploy/ in a container that systemd has booted.")
    parser.add_argument("--full", action="store_true", help="more clients, for longer")
    full = parser.parse_args().full
    why = missing()
    if why is not None:
        print(f"no machine can be booted here: {why}", flush=True)  # noqa: T201
        return 3 if attempt("units", verify_units) else 1
    began = time.monotonic()
    with Machine(MOST_SECONDS[full]) as machine:
        machine.enter_network()
        deployed = Deployed(machine, full)
        os.environ.pop("COMET_PUBLISH_KEY", None)
        results = [attempt(check.__name__.replace("_", " "), partial(check, deployed)) for check in CHECKS]
        good = all(results)
        if not good:
            print(machine.run("journalctl --no-pager -n 150; cat /var/log/nginx/error.log", check=False).stdout, file=sys.stderr)  # noqa: T201
    print(f"{'all is well' if good else 'not all is well'}, after {time.monotonic() - began:.0f} s")  # noqa: T201
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
