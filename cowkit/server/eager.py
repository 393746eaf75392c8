"""Waiting for a client's next bytes with open eyes, while they keep coming.

A thread that sleeps has to be woken: some 10 microseconds, and 30 to 50 on a virtual machine whose processor went idle. A client
that sends one request at a time waits for that each time. So whoever has seen quick requests looks a while before sleeping.

That costs processor time, so it is done only where it pays:

- not before a few waits were short, and no more for a good while after looks in vain;
- not beside a thread that computes: then each look has to wait for the interpreter;
- not where there is but one processor, which the client needs.

``COWKIT_EAGER=0`` in the environment lets each wait be slept. What the client does meanwhile is for :mod:`cowkit.server.awake`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from cowkit.server.awake import LONG_NS, Awake
from cowkit.server.counting import may_be_eager

_LOOK_NS = 200_000
"""How long to look: a client on a virtual machine takes 20 to 150 microseconds from a reply to its next request."""

_SHORT_NS = 300_000
"""A wait that was this short might have been spared; longer than ``_LOOK_NS``, since it includes the waking."""

_STARVED_NS = 1_000_000
"""Looking took this long: the interpreter is busy with another thread, or the processor with another process, which passes."""

# Trust is earned by short waits and lost by looks in vain. From 1 on, looking is worth it.
_MOST = 32
_VAIN_COSTS = 8
_LOST = -16
"""How much is left when it is used up."""
_STARVED = -100
_NEVER = -(1 << 62)

_AWAKE_MS = LONG_NS // 1_000_000
"""How long the client's processor is kept awake for a client that takes longer than a look."""

Events = Sequence[Any]
"""What ``poll`` of ``select``'s objects returns."""


class EagerWait:
    """Waits by ``poll``, which takes a timeout: 0, or None for none. For one thread at a time.

    :param awake: what keeps the client's processor awake; ``poll`` takes milliseconds then.
    """

    def __init__(self, poll: Callable[[int | None], Events], awake: Awake | None = None) -> None:
        self._poll = poll
        self._awake = awake
        may = len(os.sched_getaffinity(0)) > 1 and may_be_eager()
        self._trust = 0 if may else _NEVER

    def __call__(self, *, single: bool = False) -> Events:
        """The next events, when there are any.

        :param single: what :class:`Awake` is told.
        """
        begun, awake = perf_counter_ns(), self._awake
        looked = self._trust > 0 and not (awake is not None and awake.together)
        events = self._look(begun) if looked else ()
        if not events:
            events = self._sleep()
        now = perf_counter_ns()
        if not looked and now - begun <= _SHORT_NS and self._trust < _MOST:
            self._trust += 1
        if awake is not None:
            awake.waited(now - begun, now, single=single)
        return events

    def _look(self, begun: int) -> Events:
        poll, until = self._poll, begun + _LOOK_NS
        events, now = poll(0), perf_counter_ns()
        while not events and now < until:
            events, now = poll(0), perf_counter_ns()
        if now - begun > _STARVED_NS:
            self._trust = _STARVED
        elif events:
            if self._trust < _MOST:
                self._trust += 1
        else:
            self._trust -= _VAIN_COSTS
            if self._trust <= 0:
                self._trust = _LOST
        return events

    def _sleep(self) -> Events:
        if self._awake is not None and self._awake.running:
            if events := self._poll(_AWAKE_MS):
                return events
            self._awake.stop()
        return self._poll(None)
