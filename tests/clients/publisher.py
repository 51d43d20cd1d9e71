"""Publishes numbered messages steadily, each until it is acknowledged."""

import http.client
import threading

PAUSE = 0.05
"""Seconds between two messages."""


class Publisher(threading.Thread):
    """Publishes 1, 2, 3, … on `channel`, in order: a number is sent again, with its idempotency key, until a 201 has acknowledged it.

    `doubtful` are the numbers whose first attempt had no 201: they may be published, and once more after a restart of the service,
    which forgets the keys.
    """

    def __init__(self, port: int, channel: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged = 0
        """The highest number that was acknowledged; all before it were as well."""
        self.doubtful: set[int] = set()
        self._port = port
        self._path = f"/publish/{channel}"
        self._finishing = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Publish until `finish`."""
        number = 1
        while not self._finishing.is_set():
            if self._publish(number):
                self.acknowledged = number
                number += 1
                self._finishing.wait(PAUSE)
            else:
                self.doubtful.add(number)
                self._finishing.wait(PAUSE)
        if self._connection is not None:
            self._connection.close()

    def _publish(self, number: int) -> bool:
        """Try once; whether it was acknowledged."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            self._connection.request("POST", self._path, str(number).encode(), {"Idempotency-Key": f"number-{number}"})
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            return False
        return answer.status == 201

    def finish(self) -> int:
        """Stop; the last number that was acknowledged, which is the last that was published unless the next one is doubtful."""
        self._finishing.set()
        self.join(20)
        assert not self.is_alive(), "the publisher hangs"
        return self.acknowledged
