"""Sparing a client and the server the waking of processors while they answer each other.

A client that waits for each reply sleeps meanwhile, and its processor, with nothing else to do, halts. On a virtual machine it is
the host that has to wake it: 30 to 150 microseconds for each reply, where the request itself takes 10. A process that only counts
(:mod:`cowkit.server.counting`) spares them that, in one of two ways:

- *Together*: with two processors, and a client that sends one short request at a time. The process takes one of them, as nice as can
  be, and the system has client and server take turns on the other; the thread need not look for requests then. 4 KiB requests at
  depth 1 gain a sixth over the other way, for half the processor time (Linux 6.18, in alternating rounds). A process of the class
  SCHED_IDLE would not do: to the system a processor is free that has nothing else, and waking the client there is what costs.
- *Apart*: the process keeps the client's processor from halting, in the class that every other process goes before at once. Reads
  at depth 1 gain half, writes are twice as fast and more; long writes, which client and server work at side by side, gain as well.

What it takes is a processor that nobody wanted, so it is done only where that pays, and by :mod:`cowkit.server.eager` only while
requests keep coming:

- after a trial: it goes on if the client's requests come clearly quicker than without; if not, it rests, and tries the other way;
- not where processor time is rationed (cgroup quotas): the tests need theirs;
- not in other people's processes, who might meet a child that they do not know of: see :func:`cowkit.server.counting.allow`.
"""

from __future__ import annotations

import os
import socket
import threading
from functools import partial

from cowkit.server.counting import SECONDS, begin_behind, begin_beside, end, is_allowed, is_rationed

LONG_NS = 20_000_000
"""A wait as long as this was no wait for an answer, nor a moment in which the host had other things to do."""
_RENEW_NS = 900_000_000 * SECONDS
"""After so long another one takes its place, before its processor time is over."""

_SLOW_NS = 1_000_000
_SLOW = 8
"""A client so many of whose waits in a judgement are longer than that does not wait for us: it has other things to do."""

_SAMPLES = 64
"""Waits that a judgement is made of: at depth 1 some 5 milliseconds; starting a process takes 1 ms."""
_MOST_NS = 100_000
"""What a wait counts for at most: a single one of milliseconds, of a host that is busy, would outweigh all others."""
_MOST_ROUND_NS = 200_000
"""What the time from one wait's end to the next one's counts for at most."""
_WORTH = _SAMPLES * 10_000
"""From how many nanoseconds on there may be something to gain from so many waits."""
_SETTLING = 16
_SETTLING_NS = 3_000_000
"""Waits, and time, that are not looked at after the start: it takes the process a while to begin, and the system to make room for it."""
_CHANCES = 3
"""Judgements of which one has to be good for a trial to be passed."""
_GAIN = 0.8
"""The trial is passed if what is compared takes at most so much of what it took without: together, requests; apart, waits."""
_UNSEEN = 7
"""After a trial that was passed, of the waits between two that are looked at."""
_PROVEN_NS = 2_000_000_000
"""For how long after a trial that was passed no other is needed."""
_REST_NS = 50_000_000
"""From a failed trial to the next; twice as long each time."""


class _One:
    """Whose is the one counting process for all of ours; held until it is gone. (While one is renewed there are two.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Awake | None = None

    def take(self, holder: Awake, now: int) -> bool:
        """Whether it is ``holder``'s from now on: nobody has it, or somebody whose process has long ended, since its client stalls."""
        with self._lock:
            if self._holder is not None and not self._holder.stalls(now):
                return False
            self._holder = holder
            return True

    def give_back(self, holder: Awake) -> None:
        """It is not ``holder``'s any more."""
        with self._lock:
            if self._holder is holder:
                self._holder = None

    def is_of(self, holder: Awake) -> bool:
        """Whether ``holder`` has it still."""
        return self._holder is holder

    def locked(self) -> bool:
        """Whether somebody has it."""
        return self._holder is not None


_one = _One()


class Awake:
    """Has a process count for the client at the other end of ``sock``, when that pays. For one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._child: int | None = None
        self._started = 0
        self.together = False
        """Whether the process runs, for the client to run where we do. Looking for requests would keep it from that."""
        self._prefers_together = True
        self._unseen = 0
        self._waits = 0
        self._waited = 0
        self._slow = 0
        self._single = 0
        self._took = 0
        self._last = 0
        self._without = 0.0
        """What the waits, or requests, of a judgement took without the process."""
        self._settling = 0
        self._passed = False
        self._chances = 0
        self._proven_together = False
        self._proven = 0
        """Until when another trial would be passed."""
        self._rest = _REST_NS
        self._not_before = 0

    def waited(self, nanoseconds: int, now: int, *, single: bool = False) -> None:
        """The client's next bytes came after so long, at ``now`` of the clock of :func:`time.perf_counter_ns`.

        :param single: that was the next request, of a client that makes one at a time.
        """
        if nanoseconds > LONG_NS:
            self._last = now
            self.stop()
            return
        if self._unseen:
            self._unseen -= 1
            return
        took, self._last = now - self._last, now
        if self._child is not None:
            if now - self._started > _RENEW_NS:
                self._renew(now)
            if self._settling:
                if self._settling > 1 or now - self._started > _SETTLING_NS:
                    self._settling -= 1
                return
            if self._passed:
                self._unseen = _UNSEEN
        self._waits += 1
        self._waited += nanoseconds if nanoseconds < _MOST_NS else _MOST_NS  # noqa: FURB136  # min takes 0.1 microseconds more
        self._took += took if took < _MOST_ROUND_NS else _MOST_ROUND_NS  # noqa: FURB136
        self._single += single
        self._slow += nanoseconds > _SLOW_NS
        if self._waits == _SAMPLES:
            self._judge(now)

    def _judge(self, now: int) -> None:
        waited, took, single, slow = self._waited, self._took, self._single, self._slow > _SLOW
        self._waits = self._waited = self._took = self._single = self._slow = 0
        one_at_a_time = single > _SAMPLES // 2
        if self._child is None:
            if is_allowed() and waited > _WORTH and not slow and now >= self._not_before:
                together = one_at_a_time and self._prefers_together and len(os.sched_getaffinity(0)) == 2
                self._begin(took / single if together else waited, now, together=together)
        elif self.together and not one_at_a_time:
            self.stop()
        elif slow or not (self._passed or (took / single if self.together else waited) <= _GAIN * self._without):
            self._chances -= 1
            if self._chances and not slow and not self._passed:
                return
            if not slow and one_at_a_time:
                self._prefers_together = not self.together
            self.stop()
            self._proven = 0
            self._leave_it(now)
        elif not self._passed:
            self._passed = True
            self._proven = now + _PROVEN_NS
            self._rest = _REST_NS

    @property
    def running(self) -> bool:
        """Whether the process runs for this client."""
        return self._child is not None

    def stalls(self, now: int) -> bool:
        """Whether the process has not been renewed for so long that it has ended: what it was for waits for something else."""
        return now - self._started > 2 * _RENEW_NS

    def stop(self) -> None:
        """The client takes its time, or has gone: end the process."""
        self._waits = self._waited = self._took = self._single = self._slow = self._settling = self._unseen = 0
        if self._child is not None:
            if not self._passed:  # a client that comes in short bursts is not worth a process for each
                self._not_before = self._started + _REST_NS
            end(self._child, partial(_one.give_back, self))
            self._child = None
        self._passed = self.together = False

    def _begin(self, without: float, now: int, *, together: bool) -> None:
        self._started = now
        if not _one.take(self, now):
            return
        self._without = without
        self._chances = _CHANCES
        self._settling = _SETTLING
        if together != self._proven_together:
            self._proven = 0
        self._proven_together = self.together = together
        self._child = None if is_rationed() else self._start(now)
        if self._child is None:
            self.together = False
            _one.give_back(self)
            self._leave_it(now)
        else:
            self._passed = now < self._proven

    def _leave_it(self, now: int) -> None:
        self._not_before = now + self._rest
        self._rest *= 2

    def _renew(self, now: int) -> None:
        new = self._start(now) if _one.is_of(self) else None
        if new is None:
            self.stop()
            self._leave_it(now)
        elif self._child is not None:
            end(self._child)
        self._child = new

    def _start(self, now: int) -> int | None:
        self._started = now
        return begin_beside() if self.together else begin_behind(self._sock)
