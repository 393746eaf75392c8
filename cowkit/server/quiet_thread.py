"""Threads that leave signals to the others, and that are not waited for when they start."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

_OF_THE_THREAD = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
}
_OF_THE_PROCESS = [
    int(number) for number in signal.valid_signals() - _OF_THE_THREAD
]  # plain: 20 microseconds less a thread


class _Unawaited(threading.Event):
    """Tells that a thread runs, but not to who only started it.

    :meth:`threading.Thread.start` waits for that, in CPython by an attribute of this name: the two threads wake each other before the
    first can go on. On a virtual machine with idle processors that is 0.3 of the 0.4 ms of a start, and a fifth of the time until a new
    disk's first client is greeted. Where the attribute means nothing, nothing is changed.
    """

    def wait(self, timeout: float | None = None) -> bool:
        """Go on."""
        return True

    def wait_until_set(self) -> None:
        """What :meth:`wait` usually does."""
        super().wait()


class QuietThread(threading.Thread):
    """A daemon thread in which no signal that is for the whole process arrives.

    Python runs signal handlers in the main thread. If the system gives a signal to another one, the main thread is not woken:
    a program that waits there (in ``signal.pause``, for a child) sleeps on, and SIGTERM does not end it.
    """

    def __init__(self, *, target: Callable[..., object], name: str, args: Sequence[Any] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._started = _Unawaited()
        self._process = 0
        """Where it was started; a forked child does not have it."""

    def start(self) -> None:
        """See :meth:`threading.Thread.start`; its ``ident`` may not be known yet."""
        super().start()
        self._process = os.getpid()

    def run(self) -> None:
        """Do the work with signals blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PROCESS)
        super().run()

    def is_alive(self) -> bool:
        """Whether it was started, in this process, and has not ended."""
        if self._process != os.getpid():
            return False
        self._started.wait_until_set()
        return super().is_alive()

    def join(self, timeout: float | None = None) -> None:
        """See :meth:`threading.Thread.join`."""
        if self.is_alive():
            super().join(timeout)
