"""Writes large pieces of a file, in the quicker of two ways.

Through the page cache, a write costs memory that is not there yet: cheap on most machines, but a page that a virtual machine
touches for the first time can cost 25 microseconds, which is 0.4 s for 64 MiB. Around the page cache (O_DIRECT) it costs the
disk's own time: 0.07 s there, and 0.4 s on a slow disk. Which is quicker is not for a program to know, but to measure: the
first piece goes through the page cache, the second, if that was slow, around it, and all others the way that was quicker. Once the
page cache has been quick, a single slow piece does not tell: now and then one takes ten times as long as those before and behind it.

Before a piece goes through the page cache, room is found for it (:mod:`cowkit.disk.room`).

What goes quickly is written at once. After a piece that took its time, each one is written by a thread while the next pieces come
together; for others, handing them to a thread and sharing the interpreter with it takes longer than it saves: of a difference of
20 MiB a sixth, and half of the processor time.
Two pieces may be under way: a single write may take ten times as long as the others, and the search for changes goes on meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

from cowkit.disk.room import Room

_ALIGNED = 4096
_SLOW = 1 / (1 << 30)
"""Seconds a byte from which on another way is worth a try: a second for 1 GiB."""


IOV_MAX = 1024
"""How many pieces one call takes (Linux, UIO_MAXIOV)."""

_SMALL = 128 << 10
"""Bytes of a piece that tells nothing about the two ways, and that no thread is worth while for."""

_WORTH_A_THREAD = 1 / (1 << 30)
"""Seconds a byte from which on a thread is worth while: some more than the search for changes takes."""

_BEGINS_WITHIN = 1.0
"""Seconds in which a thread that was started has begun to run."""

_PORTION = 256 << 10
"""Bytes of one write through the page cache. The longer it is, the longer a run of memory that the system takes for it; and long runs, on
a virtual machine, are what its host has taken back: 20 MiB by 256 KiB took 4 ms each time, by 4 MiB 4 to 50 ms (Linux 6.18, free page
reporting)."""

UNDER_WAY = 2
"""Pieces that may be waiting to be written, or being written, when :meth:`BulkWriter.write` returns."""


class BulkWriter:
    """Writes to one file.

    :param pwritev: writes all of the pieces it is given at the offset, one behind another, through the page cache, or raises.
    """

    path = ""
    """Where the file is, for opening it a second time; set before the first write."""
    fd = -1
    """The file; set before the first write, too."""
    replaces = False
    """Whether it is to be renamed to replace another one. One that has a single block to be allocated yet is then written to the
    disk as a whole by the rename (ext4, auto_da_alloc): of 62 MiB, that took 30 to 80 ms."""

    def __init__(self, pwritev: Callable[[Sequence[memoryview], int], None]) -> None:
        self._pwritev = pwritev
        self._direct_fd = -1
        self._room = Room()
        self._costs: deque[float] = deque(maxlen=3)
        """Seconds a byte of the last pieces that went through the page cache."""
        self._cost_around: float | None = None
        """The same of the last one that went around it; infinite if it cannot be done."""
        # Queues, since ctrl-C may come at any moment: a condition's lock could be left in any state, a queue is one call.
        self._jobs: SimpleQueue[tuple[Sequence[memoryview], int, int] | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._has_ended = False
        self._under_way = 0
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._given_up = False

    def write(self, pieces: Sequence[memoryview], length: int, offset: int) -> None:
        """Have ``pieces`` written, one behind another, which must stay as they are until the next call but one returns.

        :param length: of all of them, in bytes.
        :raises OSError: what an earlier write raised.
        """
        if length < _SMALL:
            self.drain()
            if self.replaces:
                self.allocate(length, offset)
            self._pwritev(pieces, offset)
            return
        if self._thread is None and self._cost() <= _WORTH_A_THREAD:
            self._put(pieces, length, offset)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cowkit-diff-writer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # none is to be had
                self._thread = None
                self._put(pieces, length, offset)
                return
        while self._under_way >= UNDER_WAY:
            self._settle()
        self._under_way += 1
        self._jobs.put((pieces, length, offset))

    def drain(self) -> None:
        """Wait until all is written; raises what a write raised."""
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        """Wait for the first of those that are under way."""
        error = self._results.get()
        self._under_way -= 1
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread, when it has written what it is at; what waits behind that is given up.

        An interrupt waits for that, too: the descriptors that the thread writes to may be another file's a moment later.
        """
        self._given_up = True
        interrupt = None
        while self._thread is not None:
            try:
                self._end(self._thread)
                self._thread = None
            except KeyboardInterrupt as error:
                interrupt = error
        self.fd = -1
        direct_fd, self._direct_fd = self._direct_fd, -1
        if direct_fd >= 0:
            os.close(direct_fd)
        if interrupt is not None:
            raise interrupt

    def _end(self, thread: threading.Thread) -> None:
        """Wait until ``thread`` has ended; to be called again after an interrupt."""
        self._jobs.put(None)
        while not self._has_written(thread):
            pass
        if thread.ident is not None:
            thread.join()  # it has nothing left to do; and a fork has none of its threads

    def _has_written(self, thread: threading.Thread) -> bool:
        """Wait a while for ``thread`` to come to its end; whether it has, or never began."""
        # Not join() or is_alive(), which an interrupt has take a running thread for one that has ended (CPython 3.11).
        if self._has_ended or self._process != os.getpid():
            return True
        try:
            self._ended.get(timeout=_BEGINS_WITHIN)
        except Empty:
            return thread.ident is None  # ctrl-C may have come before it began
        return self._has_ended

    def allocate(self, length: int, offset: int) -> None:
        """Have the file system find room for a range of the file that is about to be written, where that pays."""
        self._room.find(self.fd, offset, length)

    # In the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._given_up:
            error: BaseException | None = None
            try:
                self._put(*job)
            except BaseException as failure:
                error = failure
            self._results.put(error)
        self._has_ended = True
        self._ended.put(None)

    def _put(self, pieces: Sequence[memoryview], length: int, offset: int) -> None:
        begun = time.perf_counter()
        around = offset % _ALIGNED == 0 and self._is_better_around() and self._put_around(pieces, length, offset)
        if not around:
            self.allocate(length, offset)
            self._pwritev(pieces, offset)
        cost = (time.perf_counter() - begun) / length
        if around:
            self._cost_around = cost
        else:
            self._costs.append(cost)

    def _is_better_around(self) -> bool:
        return self._cost() > (_SLOW if self._cost_around is None else self._cost_around)

    def _cost(self) -> float:
        """Of the page cache, in seconds a byte: the middle one of the last three, the better one of two; 0 before the first."""
        costs = sorted(self._costs)
        return costs[(len(costs) - 1) // 2] if costs else 0.0

    def _put_around(self, pieces: Sequence[memoryview], length: int, offset: int) -> bool:
        """Whether it could be written around the page cache, as a whole; otherwise the other way shows what is wrong."""
        if len(pieces) > IOV_MAX or any(len(piece) % _ALIGNED for piece in pieces):
            return False
        try:
            if self._direct_fd < 0:
                self._direct_fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            return os.pwritev(self._direct_fd, pieces, offset) == length
        except OSError:
            self._cost_around = float("inf")
            return False


def portions(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """``pieces``, cut and put together for writes through the page cache: by ``_PORTION`` bytes."""
    portion: list[memoryview] = []
    room = _PORTION
    for piece in pieces:
        rest = piece
        while len(rest) > room:
            portion.append(rest[:room])
            yield portion
            rest = rest[room:]
            portion, room = [], _PORTION
        portion.append(rest)
        room -= len(rest)
    yield portion
