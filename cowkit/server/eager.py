"""Waiting for a client's next bytes with open eyes, while they keep coming.

A thread that sleeps has to be woken: some 10 microseconds, and 30 to 50 on a virtual machine whose processor went idle. A client
that sends one request at a time waits for that each time. So whoever has seen quick requests looks a while before sleeping.

That costs processor time, so it is done only where it pays:

- not before a few waits were short, and no more for a good while after looks in vain;
- not beside a thread that computes: then each look has to wait for the interpreter;
- not where there is but one processor, which the client needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

_LOOK_NS = 200_000
"""How long to look: a client on a virtual machine takes 20 to 150 microseconds from a reply to its next request."""

_SHORT_NS = 300_000
"""A wait that was this short might have been spared; longer than ``_LOOK_NS``, since it includes the waking."""

_STARVED_NS = 1_000_000
"""Looking took this long: the interpreter is busy with another thread."""

# Trust is earned by short waits and lost by looks in vain. From 1 on, looking is worth it.
_MOST = 32
_VAIN_COSTS = 8
_LOST = -16
"""How much is left when it is used up."""
_STARVED = -1000
_ONE_PROCESSOR = -(1 << 62)

Events = Sequence[Any]
"""What ``poll`` of ``select``'s objects returns."""


class EagerWait:
    """Waits by ``poll``, which takes a timeout: 0, or None for none. For one thread at a time."""

    def __init__(self, poll: Callable[[int | None], Events]) -> None:
        self._poll = poll
        self._trust = 0 if len(os.sched_getaffinity(0)) > 1 else _ONE_PROCESSOR

    def __call__(self) -> Events:
        """The next events, when there are any."""
        poll = self._poll
        begun = perf_counter_ns()
        if self._trust <= 0:
            events = poll(None)
            if perf_counter_ns() - begun <= _SHORT_NS:
                self._trust += 1
            return events
        until = begun + _LOOK_NS
        while True:
            if events := poll(0):
                if self._trust < _MOST:
                    self._trust += 1
                return events
            now = perf_counter_ns()
            if now >= until:
                break
        if now - begun > _STARVED_NS:
            self._trust = _STARVED
        else:
            self._trust -= _VAIN_COSTS
            if self._trust <= 0:
                self._trust = _LOST
        return poll(None)
