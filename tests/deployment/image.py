"""deploy/Dockerfile, followed line by line without an engine: what is copied, run and started, in a place of its own.

A mount namespace is the image, Debian's Python in a virtual environment its base, a network and a process namespace the
container. Not shown, since it takes an engine: that the base image can be had and its newer Python does as well, and what
`docker run` itself sets up.
"""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.deployment.deployed import PORT, Deployed
from tests.deployment.machine import HERE, ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class Step(NamedTuple):
    """One instruction."""

    name: str
    argument: str


def steps_of(dockerfile: Path) -> list[Step]:
    """Its instructions, in order."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line]


def build(steps: list[Step]) -> list[str]:
    """Lines of shell that do what building does, and leave $user, and the environment and folder of what is run."""
    lines = []
    for name, argument in steps:
        match name:
            case "COPY":
                *sources, target = argument.split()
                for source in sources:
                    # of a folder, its content is copied
                    if (ROOT / source).is_dir():
                        lines.append(f"mkdir -p {target} && cp -R {HERE}/{source}/. {target}")
                    else:
                        assert target.endswith("/"), argument
                        lines.append(f"mkdir -p {target} && cp {HERE}/{source} {target}")
            case "RUN":
                lines.append(f"sh -euc {shlex.quote(argument)} >&2")
            case "ENV":
                lines.append(f"export {argument}")
            case "USER":
                uid, gid = argument.split(":")
                lines.append(f"user='setpriv --reuid {uid} --regid {gid} --clear-groups --no-new-privs'")
            case "WORKDIR":
                lines.append(f"cd {argument}")
            case "FROM":
                assert argument.startswith("python:"), argument
            case "ENTRYPOINT" | "HEALTHCHECK" | "VOLUME" | "EXPOSE" | "STOPSIGNAL":
                pass  # see `the_image_line_by_line`
            case _:
                raise AssertionError(f"not understood here: {name} {argument}")
    return lines


def the_image_line_by_line(on: Deployed) -> str:
    steps = steps_of(DOCKERFILE)
    single = dict(steps)
    assert len([step for step in steps if step.name == "ENTRYPOINT"]) == 1
    assert (single["EXPOSE"], single["STOPSIGNAL"], single["VOLUME"]) == (str(PORT), "SIGTERM", "/data")
    start = shlex.join(json.loads(single["ENTRYPOINT"]))
    healthy = shlex.join(json.loads(single["HEALTHCHECK"].partition(" CMD ")[2]))
    key = "Authorization: Bearer secret"
    lines = [
        "ip link set lo up",
        "for one in /opt /data; do mkdir -p $one && mount -t tmpfs image $one; done",
        "/usr/bin/python3 -m venv /opt/base && export PATH=/opt/base/bin:$PATH",
        "cd /",
        *build(steps),
        "mount -o remount,ro /opt",
        f"status=0; $user {start} 2>/tmp/refused || status=$?; [ $status = 2 ]; grep -q COMET_PUBLISH_KEY /tmp/refused",
        "export COMET_PUBLISH_KEY=secret",
        f"$user {start} >&2 & service=$!",
        f"tries=0; until $user {healthy} 2>/dev/null; do tries=$((tries + 1)); [ $tries -lt 100 ]; sleep 0.1; done",
        "grep '^[UG]id:' /proc/$service/status",
        "grep '^CapEff:' /proc/$service/status",
        f"curl -sS -H {shlex.quote(key)} -d 'hello, image' http://127.0.0.1:{PORT}/publish/image >&2",
        f"curl -sS 'http://127.0.0.1:{PORT}/poll/image?since=oldest'; echo",
        "ls /data",
        "kill -TERM $service; wait $service",
    ]
    script = "set -eu\n" + "\n".join(lines)
    said = on.run(f"unshare --mount --net --pid --fork --kill-child --mount-proc sh -c {shlex.quote(script)}", timeout=120).stdout
    user, group, capabilities, polled, *kept = said.splitlines()
    number = single["USER"].split(":")[0]
    assert user.split()[1:] == group.split()[1:] == [number] * 4 and set(capabilities.split()[1]) == {"0"}, said
    assert json.loads(polled)["messages"][0]["data"] == "hello, image", said
    assert kept, "no subscriptions in /data"
    return f"each line done, under Debian's Python and without an engine; healthy as the user {number}, on a file system that is read-only; ends with status 0"
