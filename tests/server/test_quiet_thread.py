"""Threads that nobody waits for when they start are whole threads all the same."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from cowkit.server.quiet_thread import QuietThread


@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="threads do not wait for each other")
def test_who_starts_one_goes_on_before_it_runs() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = QuietThread(target=int, name="late")
        thread.start()
        ident = thread.ident
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert ident is None
    assert thread.ident is not None


def test_join_waits_for_the_end_of_what_has_hardly_begun() -> None:
    done: list[int] = []
    for number in range(200):
        thread = QuietThread(target=done.append, name="brief", args=(number,))
        thread.start()
        thread.join()
        assert done[-1] == number
        assert not thread.is_alive()


def test_it_is_alive_from_its_start_to_its_end() -> None:
    over = threading.Event()
    thread = QuietThread(target=over.wait, name="waiting")
    assert not thread.is_alive()
    thread.join()  # of what was never started
    thread.start()
    assert thread.is_alive()
    thread.join(0.001)
    assert thread.is_alive()
    over.set()
    thread.join()
    assert not thread.is_alive()


def test_a_forked_child_does_not_wait_for_its_parent_s() -> None:
    over = threading.Event()
    thread = QuietThread(target=over.wait, name="the parent's")
    thread.start()
    try:
        child = os.fork()
        if not child:
            thread.join()
            os._exit(thread.is_alive())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        over.set()
        thread.join()


def test_no_signal_for_the_process_arrives_in_it() -> None:
    blocked: set[int] = set()
    thread = QuietThread(
        target=lambda: blocked.update(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        name="quiet",
    )
    thread.start()
    thread.join()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= blocked
    assert signal.SIGSEGV not in blocked
