"""Writes large pieces of a file, in the quicker of two ways.

Through the page cache, a write costs memory that is not there yet: cheap on most machines, but a page that a virtual machine
touches for the first time can cost 25 microseconds, which is 0.4 s for 64 MiB. Around the page cache (O_DIRECT) it costs the
disk's own time: 0.07 s there, and 0.4 s on a slow disk. Which is quicker is not for a program to know, but to measure: the
first piece goes through the page cache, the second, if that was slow, around it, and all others the way that was quicker.

What goes quickly is written at once. Once a piece was slow, a thread writes while the next piece comes together; before that,
handing pieces to a thread and sharing the interpreter with it would take longer than it saves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_ALIGNED = 4096
_SLOW = 1 / (1 << 30)
"""Seconds a byte from which on another way is worth a try: a second for 1 GiB."""


_SMALL = 128 << 10
"""Bytes of a piece that tells nothing about the two ways, and that no thread is worth while for."""


class BulkWriter:
    """Writes to one file.

    :param pwrite: writes all of the data it is given at the offset, through the page cache, or raises.
    """

    path = ""
    """Where the file is, for opening it a second time; set before the first write."""

    def __init__(self, pwrite: Callable[[memoryview, int], None]) -> None:
        self._pwrite = pwrite
        self._direct_fd = -1
        self._cost: dict[bool, float] = {}
        """Seconds a byte, by whether it went around the page cache."""
        # Queues, since ctrl-C may come at any moment: a condition's lock could be left in any state, a queue is one call.
        self._jobs: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        self._under_way = False
        self._thread: threading.Thread | None = None

    def write(self, data: memoryview, offset: int) -> None:
        """Have ``data`` written, which must stay as it is until the next call returns; raises what the last write raised."""
        if len(data) < _SMALL:
            self.drain()
            self._pwrite(data, offset)
            return
        if self._cost.get(False, 0) <= _SLOW and self._thread is None:
            self._put(data, offset)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cowkit-diff-writer", daemon=True)
            self._thread.start()
        self.drain()
        self._under_way = True
        self._jobs.put((data, offset))

    def drain(self) -> None:
        """Wait until all is written; raises what the last write raised."""
        if self._under_way:
            error = self._results.get()
            self._under_way = False
            if error is not None:
                raise error

    def close(self) -> None:
        """End the thread, when it has written what it is at."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1

    # In the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            error: BaseException | None = None
            try:
                self._put(*job)
            except BaseException as failure:
                error = failure
            self._results.put(error)

    def _put(self, data: memoryview, offset: int) -> None:
        fits = len(data) % _ALIGNED == 0 and offset % _ALIGNED == 0
        begun = time.perf_counter()
        around = fits and self._is_better_around() and self._put_around(data, offset)
        if not around:
            self._pwrite(data, offset)
        self._cost[around] = (time.perf_counter() - begun) / len(data)

    def _is_better_around(self) -> bool:
        if False not in self._cost:
            return False
        if True not in self._cost:
            return self._cost[False] > _SLOW
        return self._cost[True] < self._cost[False]

    def _put_around(self, data: memoryview, offset: int) -> bool:
        """Whether it could be written around the page cache, as a whole; otherwise the other way shows what is wrong."""
        try:
            if self._direct_fd < 0:
                self._direct_fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            return os.pwrite(self._direct_fd, data, offset) == len(data)
        except OSError:
            self._cost[True] = float("inf")
            return False
