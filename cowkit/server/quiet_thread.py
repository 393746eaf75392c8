"""Threads that leave signals to the others."""

from __future__ import annotations

import signal
import threading

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


class QuietThread(threading.Thread):
    """A thread in which no signal that is for the whole process arrives.

    Python runs signal handlers in the main thread. If the system gives a signal to another one, the main thread is not woken:
    a program that waits there (in ``signal.pause``, for a child) sleeps on, and SIGTERM does not end it.
    """

    def run(self) -> None:
        """Do the work with signals blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PROCESS)
        super().run()
