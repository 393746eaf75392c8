"""Keeping a client's processor from halting while the client and the server answer each other.

A client that sends one request at a time sleeps until the reply is there, and its processor, with nothing else to do, halts. On a
virtual machine it is the host that has to wake it: 30 to 150 microseconds for each reply, where the request itself takes 10. So
meanwhile a process that only counts runs there, in the class (SCHED_IDLE) that every other process goes before at once: 4 KiB random
reads at depth 1 gain half, writes are twice as fast and more (Linux 6.18, two processors of a busy host).

What it takes is a processor that nobody wanted, so it is done only where that pays, and by :mod:`cowkit.server.eager` only while
requests keep coming:

- after a trial: it goes on if the client's next request comes clearly sooner than without;
- not where processor time is rationed (cgroup quotas): the tests need theirs;
- not in other people's processes, who might meet a child that they do not know of: see :func:`allow`.

The process holds nothing of ours, so it may be kept from running as long as the system likes; and it ends by itself after a second
of counting, whatever becomes of us. Where all processors are busy it takes up to a second to die, too, once it is killed, so nobody
waits for that but a thread.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from time import perf_counter_ns

from cowkit.server.quiet_thread import QuietThread

_SHELL = "/bin/sh"
_MEMBERSHIPS = "/proc/self/cgroup"
_CGROUPS = "/sys/fs/cgroup"
_COUNT = "cd / && ulimit -t 1 && while :; do :; done"
_NAME = "cowkit-awake"
"""What `ps` shows behind that."""
LONG_NS = 20_000_000
"""A wait as long as this was no wait for an answer, nor a moment in which the host had other things to do."""
_RENEW_NS = 900_000_000
"""Before the second is over that ``_COUNT`` has."""

_SLOW_NS = 1_000_000
_SLOW = 8
"""A client so many of whose waits in a judgement are longer than that does not wait for us: it has other things to do."""

_SAMPLES = 64
"""Waits that a judgement is made of: at depth 1 some 5 milliseconds; starting a process takes 1 ms."""
_MOST_NS = 100_000
"""What a wait counts for at most: a single one of milliseconds, of a host that is busy, would outweigh all others."""
_WORTH = _SAMPLES * 10_000
"""From how many nanoseconds on there may be something to gain from so many waits."""
_SETTLING = 16
"""Waits that are not looked at after the start."""
_GAIN = 0.8
"""The trial is passed if the waits take at most so much of what they took."""
_PROVEN_NS = 2_000_000_000
"""For how long after a trial that was passed no other is needed."""
_REST_NS = 50_000_000
"""From a failed trial to the next; twice as long each time."""

_NOTHING = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]

_closed: list[tuple[int, int]] = []
"""Closes what whoever started us has left us, such as a lock or a pipe that somebody waits at; our own files are closed anyway."""
_allowed = False
_one = threading.Lock()
"""One counting process for all of ours; held until it is gone. (While one is renewed there are two.)"""


def may_be_eager() -> bool:
    """Whether processor time may be spent on quicker answers: unless ``COWKIT_EAGER=0`` forbids it."""
    return os.environ.get("COWKIT_EAGER", "") != "0"


def allow(*, yes: bool = True) -> None:
    """This process is the server's own: a child that nobody expects does no harm in it. ``COWKIT_EAGER=0`` forbids it anyway.

    So does ignoring SIGCHLD: children vanish unseen then, and their numbers may be somebody else's when they are to be killed.
    """
    global _allowed, _closed  # noqa: PLW0603  # a process is its own or is not
    _allowed = yes and may_be_eager() and signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN
    if _allowed:
        _closed = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()]


def _inheritable() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                yield int(name)
        except OSError:
            pass  # that of the listing


class Awake:
    """Keeps the processor of the client at the other end of ``sock`` awake, when that pays. For one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._child: int | None = None
        self._started = 0
        self._waits = 0
        self._waited = 0
        self._slow = 0
        self._without = 0
        """What ``_SAMPLES`` waits took without the process."""
        self._settling = 0
        self._passed = False
        self._proven = 0
        """Until when another trial would be passed."""
        self._rest = _REST_NS
        self._not_before = 0

    def waited(self, nanoseconds: int, now: int) -> None:
        """The client's next request came after so long, at ``now`` of the clock of :func:`time.perf_counter_ns`."""
        if nanoseconds > LONG_NS:
            self.stop()
            return
        if self._child is not None and now - self._started > _RENEW_NS:
            self._renew(now)
        if self._settling:
            self._settling -= 1
            return
        self._waits += 1
        self._waited += min(nanoseconds, _MOST_NS)
        if nanoseconds > _SLOW_NS:
            self._slow += 1
        if self._waits < _SAMPLES:
            return
        waited, slow = self._waited, self._slow > _SLOW
        self._waits = self._waited = self._slow = 0
        if self._child is None:
            if _allowed and waited > _WORTH and not slow and now >= self._not_before:
                self._begin(waited, now)
        elif slow or not (self._passed or waited <= _GAIN * self._without):
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

    def stop(self) -> None:
        """The client takes its time, or has gone: let the processor halt."""
        self._waits = self._waited = self._slow = self._settling = 0
        if self._child is not None:
            if not self._passed:  # a client that comes in short bursts is not worth a process for each
                self._not_before = self._started + _REST_NS
            _end(self._child, _one.release)
            self._child = None
        self._passed = False

    def _begin(self, without: int, now: int) -> None:
        if not _one.acquire(blocking=False):
            return
        self._without = without
        self._settling = _SETTLING
        self._child = None if _is_rationed() else self._spawn()
        if self._child is None:
            _one.release()
            self._leave_it(now)
        else:
            self._passed = now < self._proven

    def _leave_it(self, now: int) -> None:
        self._not_before = now + self._rest
        self._rest *= 2

    def _renew(self, now: int) -> None:
        new = self._spawn()
        if new is None:
            self.stop()
            self._leave_it(now)
        elif self._child is not None:
            _end(self._child)
        self._child = new

    def _spawn(self) -> int | None:
        where: set[int] = set()
        if len(os.sched_getaffinity(0)) > 2:  # with two, it finds the one that we are not on
            processor = _processor(self._sock)
            if processor is None:
                return None
            where = {processor}
        try:
            child = os.posix_spawn(
                _SHELL, ["sh", "-c", _COUNT, _NAME], {}, file_actions=[*_NOTHING, *_closed], setsigmask=[]
            )
        except OSError:
            return None
        try:
            os.sched_setscheduler(child, os.SCHED_IDLE, os.sched_param(0))
            if where:
                os.sched_setaffinity(child, where)
        except OSError:
            _end(child)
            return None
        self._started = perf_counter_ns()
        return child


def _nothing() -> None:
    pass


def _end(child: int, gone: Callable[[], None] = _nothing) -> None:
    """Kill it, and call ``gone`` when it is gone, from another thread."""
    try:
        os.kill(child, signal.SIGKILL)
        QuietThread(target=_reap, args=(child, gone), name="cowkit-reaper").start()
    except (RuntimeError, ProcessLookupError):  # no thread to be had, or no need for one
        _reap(child, gone)


def _reap(child: int, gone: Callable[[], None]) -> None:
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass
    gone()


def _processor(sock: socket.socket) -> int | None:
    """Where the client ran last; None if that cannot be known."""
    try:
        if sock.family != socket.AF_UNIX:
            processor = sock.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
            return processor if processor >= 0 else None  # -1: not this kind of socket, such as vsock
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        peer, _, _ = struct.unpack("3i", credentials)
        with open(f"/proc/{peer}/stat", "rb") as file:  # the name in it may end within a character
            return int(file.read().rpartition(b")")[2].split()[36])  # proc_pid_stat(5): processor, field 39
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def _is_rationed() -> bool:
    """Whether a cgroup that this process is in has a quota of processor time."""
    try:
        with open(_MEMBERSHIPS, errors="surrogateescape") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return True
    for _, controllers, path in groups:
        version_1 = "cpu" in controllers.split(",")
        if controllers and not version_1:
            continue
        root, name = (f"{_CGROUPS}/cpu", "cpu.cfs_quota_us") if version_1 else (_CGROUPS, "cpu.max")
        while True:
            try:
                with open(os.path.join(root + path.rstrip("/"), name)) as file:
                    if file.read().split()[0] not in ("max", "-1"):
                        return True
            except (OSError, IndexError):
                pass  # the controller is not on here, or the folder is not mounted
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    return False
