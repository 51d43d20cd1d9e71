"""Choice of the one worker that writes a line of the log which all of them could: one says as much as sixty.

Neighbours: `comet.backplane.redis_outage` and `comet.backplane.redis_malformed`, which have one each. It is a lock on a byte of the board's
memory, as a permit is (`comet.permit`): the kernel gives it back when a worker dies.
"""

import fcntl


class Speaker:
    """One worker's try to speak for its service. `descriptor` is the board's and `place` a byte of it, the same in all workers; None where
    there is one process alone, which always may. Nothing here blocks."""

    def __init__(self, descriptor: int | None = None, place: int = 0) -> None:
        self._descriptor = descriptor
        self._place = place

    def speaks(self) -> bool:
        """Return whether this process speaks from now on, until `be_silent`: no other one does."""
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place)
        except OSError:  # another worker has it
            return False
        return True

    def be_silent(self) -> None:
        """Let another one speak."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._place)
