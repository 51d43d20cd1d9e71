"""The board: what each process of a service says of itself, in memory that all of them share.

A slot a process, written by that process alone and read by all: when it was last alive, its process
id, and a JSON document. The supervisor sees here who hangs; any worker can answer here for the whole
service. Standard library only; `comet.supervisor` makes it, and hands it on as a descriptor.

A slot has two halves. A writer fills the one that is not current, then says that it is: so a writer
that is killed or stopped half-way leaves what it said before, and never keeps a reader waiting. A
reader that was overtaken reads again; a checksum covers machines that reorder stores.

Pages that nobody has written take no memory.
"""

import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

SUPERVISOR, ROUTER, FIRST_WORKER = 0, 1, 2
"""Whose slot is which."""

_SLOT = 32768
_VERSION = 64  # bytes in front of the two halves, for which of them is current
HALF = (_SLOT - _VERSION) // 2
"""Bytes of half a slot: its header and its document."""

_HEADER = struct.Struct("<IIqd")  # checksum of what follows; length of the document; pid; time
_TRIES = 10_000
_encode = json.JSONEncoder(separators=(",", ":")).encode  # made once: `json.dumps` would make one for each document


class Slot(NamedTuple):
    """What a process said: `beat` is when, by `time.monotonic`, which is one clock for all processes;
    `age` the seconds since."""

    slot: int
    pid: int
    beat: float
    age: float
    document: dict[str, Any]


class Board:
    """Of a fixed number of slots. Make one with `create`, and open it elsewhere by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._versions = memoryview(self._memory).cast("Q")  # an element is stored at once, not byte by byte
        self.slots = len(self._memory) // _SLOT

    @classmethod
    def create(cls, slots: int) -> Self:
        """An empty board."""
        descriptor = os.memfd_create("comet-board")
        os.ftruncate(descriptor, slots * _SLOT)
        return cls(descriptor)

    @classmethod
    def open(cls, descriptor: int) -> Self:
        """One that another process has made. The descriptor stays the caller's."""
        return cls(descriptor)

    def write(self, slot: int, document: Mapping[str, Any]) -> None:
        """Say this, and be alive. A process writes one slot, and nobody else does."""
        text = _encode(document).encode()
        if len(text) > HALF - _HEADER.size:
            raise ValueError(f"a document of {len(text)} bytes; a slot of the board has room for {HALF - _HEADER.size}")
        version = self._versions[self._place(slot) // 8] + 1
        data = _HEADER.pack(0, len(text), os.getpid(), time.monotonic())[4:] + text
        start = self._half(slot, version)
        self._memory[start : start + 4 + len(data)] = zlib.crc32(data).to_bytes(4, "little") + data
        self._versions[self._place(slot) // 8] = version

    def look(self, slot: int) -> Slot | None:
        """What was last said there; None where nothing was."""
        for _ in range(_TRIES):
            version = self._versions[self._place(slot) // 8]
            if version == 0:
                return None
            start = self._half(slot, version)
            checksum, length, pid, beat = _HEADER.unpack_from(self._memory, start)
            data = self._memory[start + 4 : start + _HEADER.size + length]
            if zlib.crc32(data) == checksum and self._versions[self._place(slot) // 8] == version:
                document = json.loads(data[_HEADER.size - 4 :])
                return Slot(slot, pid, beat, time.monotonic() - beat, document)
        raise RuntimeError(f"slot {slot} of the board is broken: two processes must have written it")

    def read(self) -> list[Slot]:
        """What everybody said."""
        return [said for said in map(self.look, range(self.slots)) if said is not None]

    def clear(self, slot: int) -> None:
        """Forget a process that has ended."""
        self._versions[self._place(slot) // 8] = 0

    def close(self) -> None:
        """Let go of the memory, and of the descriptor."""
        self._versions.release()
        self._memory.close()
        os.close(self.descriptor)

    def _place(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"the board has {self.slots} slots, and no slot {slot}")
        return slot * _SLOT

    def _half(self, slot: int, version: int) -> int:
        return self._place(slot) + _VERSION + version % 2 * HALF
