"""Busy connections that one of their threads serves by turns.

Each connection has a thread, and one that is busy alone is best served by it. When several are busy, their threads fight for the
interpreter: at each system call one loses it to another, and waking and switching cost more than a small request does. So they
join a pool: one thread, the *leader*, waits for all of their sockets and carries out whatever has come, while the others sleep.

Only what is quick is in the pool: connections to disks on local files. One leaves it for its own thread, for a good while, when it
would have to wait for its client or for a checkpoint, or when its turns take long: a slow disk under the base holds the others up
for a moment.

The leader is one of the members' own threads, so there is no thread more than without. When its own connection leaves, the
next member leads.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Generator
from enum import Enum
from time import perf_counter_ns

from cowkit.server.awake import Awake
from cowkit.server.channel import Channel
from cowkit.server.eager import EagerWait


class Need(Enum):
    """What a connection's work needs to go on."""

    BYTES = "something to receive"
    SOON = "something to receive, which the client may be about to send: it waits for what it has just got"
    NEXT = "the same, where that was the reply to a single request"
    THREAD = "a thread that may wait: for the client, mostly"


Steps = Generator[Need, bool | None, None]
"""A connection's work: goes on, and yields when it needs something; sent True where it must not wait for the client."""

_CROWDED = 8
"""A connection's turns that followed on another connection's, less those that followed on its own, from which on it joins."""

_APART = 256
"""Turns that a connection which had to leave the pool stays apart."""

_SLOW_NS = 2_000_000
"""A turn that took this long waited for a disk; or another process had the processor, where all of them are busy, for 3 ms or so."""
_MOST_SLOW_NS = 20_000_000
"""Of slow turns together, that others put up with."""
_FORGIVEN_NS = 200_000
"""For each quick turn. A leader that has to share its processor is well below that: leaving after each slow turn, four connections on two
processors spent a third of their time in fighting for the interpreter."""


class Member:
    """A connection as the pool sees it.

    :param steps: the connection's work.
    """

    def __init__(self, sock: socket.socket, steps: Steps) -> None:
        self.sock = sock
        self.steps = steps
        self.error: BaseException | None = None
        self.ended = False
        self.leads = False
        self.turn = threading.Lock()
        """Held while the thread is to sleep."""
        self.turn.acquire()
        self.crowd = 0
        self._slow = 0
        """What its slow turns took and is not forgiven, in nanoseconds."""

    def take_turn(self) -> bool:
        """Carry out what has come; whether the connection may stay in the pool."""
        begun = perf_counter_ns()
        try:
            need = self.steps.send(True)
        except StopIteration:
            self.ended = True
            return False
        except BaseException as error:  # for the connection's own thread to tell
            self.error = error
            return False
        taken = perf_counter_ns() - begun
        if taken >= _SLOW_NS:
            self._slow += taken
        elif self._slow:
            self._slow = max(0, self._slow - _FORGIVEN_NS)
        if need is not Need.THREAD and self._slow < _MOST_SLOW_NS:
            return True
        self._slow = 0
        return False


class Pool:
    """The pool of a process, since it is for the interpreter that they fight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[int, Member] = {}
        self._epoll: select.epoll | None = None
        self._led = False
        self._last: Member | None = None
        """Whose turn was the last."""

    def is_crowded(self, member: Member) -> bool:
        """Whether it would do better to join; asked at each turn that it takes by itself."""
        if self._last is member:
            if member.crowd > 0:
                member.crowd -= 1
            return False
        self._last = member
        member.crowd += 1
        return member.crowd >= _CROWDED

    def join(self, member: Member) -> None:
        """Be served in the pool; returns when the connection has left it, in the thread that called, which is the member's own."""
        member.crowd = -_APART
        with self._lock:
            epoll = self._epoll
            if epoll is None:
                try:
                    epoll = self._epoll = select.epoll()
                except OSError:  # no descriptor to be had: it goes on by itself
                    return
            number = member.sock.fileno()
            self._members[number] = member
            epoll.register(number, select.EPOLLIN)
            member.leads = not self._led
            self._led = True
        if not member.leads:
            member.turn.acquire()
        if member.leads:
            self._lead(epoll, member)

    def _lead(self, epoll: select.epoll, leader: Member) -> None:
        members = self._members
        wait = EagerWait(epoll.poll)
        while leader.leads:
            for number, _ in wait():
                member = self._last = members[number]
                if member.take_turn():
                    continue
                with self._lock:
                    epoll.unregister(number)
                    del members[number]
                if member is leader:
                    leader.leads = False
                else:
                    member.turn.release()
        with self._lock:
            for member in members.values():
                member.leads = True
                member.turn.release()
                return
            self._led = False
            self._epoll = None
            epoll.close()


_pool = Pool()


def _forget() -> None:
    """The threads of a forked process's parent are not there."""
    global _pool  # noqa: PLW0603  # one a process is the point
    _pool = Pool()


os.register_at_fork(after_in_child=_forget)

_INTERPRETER_IS_SHARED = getattr(sys, "_is_gil_enabled", lambda: True)()


def drive(steps: Steps, channel: Channel, *, may_join: bool) -> None:
    """Carry out a connection's work to its end, alone or in the pool.

    :param may_join: no turn waits for anything but local files; in the pool, what it waits for might be another member's turn.
    """
    if not isinstance(channel, socket.socket):
        for _ in steps:
            pass
        return
    ready = select.poll()
    ready.register(channel, select.POLLIN)
    awake = Awake(channel)
    wait = EagerWait(ready.poll, awake)
    member = Member(channel, steps)
    may_join = may_join and _INTERPRETER_IS_SHARED
    soon, next_one, thread = Need.SOON, Need.NEXT, Need.THREAD  # as in Transmission
    try:
        for need in steps:
            if need is thread:
                if awake.running:
                    awake.stop()  # it may be the client that is waited for
                continue
            if may_join and _pool.is_crowded(member):
                awake.stop()
                _pool.join(member)
                if member.error is not None:
                    raise member.error
                if member.ended:
                    return
                continue
            if need is next_one:
                wait(single=True)
            elif need is soon:
                wait()
            elif awake.running:
                awake.stop()  # a client with many requests under way does not sleep
    finally:
        awake.stop()
