"""The service on a machine, as checks see it and load it.

Clients run outside of the machine but on its loopback (`Machine.enter_network`): a swarm of the chaos tests, whose model
says what was lost (`told`), and single ones that measure.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.behaviour.swarm import Report
from tests.behaviour.test_chaos import Swarm
from tests.deployment.machine import Machine
from tests.harness import Client, wait_until

PORT = 8000


class Deployed:
    """A machine, and what the checks share."""

    def __init__(self, machine: Machine, full: bool) -> None:
        self.machine = machine
        self.run = machine.run
        self.full = full
        self._swarms = 0

    @property
    def key(self) -> str:
        """The publish key that was made."""
        return self.run("cat /etc/comet/publish-key").stdout.strip()

    def shown(self, name: str, unit: str = "comet.service") -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --value -p {name} {unit}").stdout.strip()

    def main(self) -> int:
        """The supervisor's number, in the machine."""
        return int(self.shown("MainPID"))

    def workers(self) -> list[dict[str, Any]]:
        """What /stats says of them."""
        return list(self.ask("GET", "/stats")["workers"])

    def ask(self, method: str, target: str, body: bytes | None = None) -> Any:
        """One request, straight to the service."""
        with Client(PORT) as client:
            answer = client.request(method, target, body, {"Authorization": f"Bearer {self.key}"})
        assert answer.status < 300, answer
        return answer.json

    def active(self) -> None:
        """Wait until it is ready."""
        wait_until(lambda: self.shown("ActiveState") == "active")

    @contextmanager
    def settings(self, *lines: str) -> Iterator[None]:
        """The service with other settings for a while."""
        self.run("cp /etc/comet/comet.env /tmp/comet.env && printf '%s\\n' " + " ".join(lines) + " >>/etc/comet/comet.env")
        self.run("systemctl restart comet")
        try:
            yield
        finally:
            self.run("cp /tmp/comet.env /etc/comet/comet.env && systemctl restart comet")

    @contextmanager
    def swarm(self) -> Iterator[Swarm]:
        """Resuming clients and publishers, all subscribed."""
        self._swarms += 1
        os.environ["COMET_PUBLISH_KEY"] = self.key
        swarm = Swarm([f"127.0.0.1:{PORT}"], random.Random(self._swarms).randrange(1 << 30))
        try:
            clients = 3000 if self.full else 600
            begun = swarm.order(
                "begin", clients=clients, channels=10, publishers=20, rate=300 if self.full else 150, size=100, prefix=f"s{self._swarms}-"
            )
            assert begun == {"clients": clients}
            time.sleep(0.5)  # under load from here on
            yield swarm
        finally:
            swarm.close()
            del os.environ["COMET_PUBLISH_KEY"]


def told(report: Report, gaps: int) -> str:
    """What came of it: nothing lost or doubled, and so many gaps told to each."""
    assert report.wrong == [], report
    assert (report.lost, report.doubled) == (0, 0), report
    assert report.sent == report.acknowledged > 0, report
    assert report.gaps == [0] * gaps + [report.clients], report
    return f"{report.clients} clients, {report.acknowledged} messages acknowledged, {report.received} received, lost 0, doubled 0, gaps told {gaps} each; longest outage {report.outage:.2f} s"
