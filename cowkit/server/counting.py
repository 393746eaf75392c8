"""The process that only counts, of which :mod:`cowkit.server.awake` says what it is for.

It holds nothing of ours, so it may be kept from running as long as the system likes; and it ends by itself after a second of
counting, whatever becomes of us. Where all processors are busy it takes up to a second to die, too, once it is killed, so nobody
waits for that but a thread.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator

from cowkit.server.quiet_thread import QuietThread

_SHELL = "/bin/sh"
_MEMBERSHIPS = "/proc/self/cgroup"
_CGROUPS = "/sys/fs/cgroup"
SECONDS = 1
"""The processor time that it has."""
_COUNT = f": cowkit-awake; cd / && ulimit -t {SECONDS} && while :; do :; done"
"""The name first, for who meets it in a list of processes."""
_NICEST = 19

_NOTHING = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]

_closed: list[tuple[int, int]] = []
"""Closes what whoever started us has left us, such as a lock or a pipe that somebody waits at; our own files are closed anyway."""
_allowed = False
_reapers: deque[QuietThread] = deque(maxlen=8)
"""The last ones, some of which may still wait."""


def may_be_eager() -> bool:
    """Whether processor time may be spent on quicker answers: unless ``COWKIT_EAGER=0`` (``no``, ``off``, ``false``) forbids it."""
    return os.environ.get("COWKIT_EAGER", "").lower() not in {"0", "no", "off", "false"}


def allow(*, yes: bool = True) -> None:
    """This process is the server's own: a child that nobody expects does no harm in it. ``COWKIT_EAGER=0`` forbids it anyway.

    So does ignoring SIGCHLD: children vanish unseen then, and their numbers may be somebody else's when they are to be killed.
    """
    global _allowed, _closed  # noqa: PLW0603  # a process is its own or is not
    _allowed = yes and may_be_eager() and signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN
    if _allowed:
        _closed = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()]


def is_allowed() -> bool:
    """Whether :func:`allow` was called, and nothing forbids it."""
    return _allowed


def _inheritable() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                yield int(name)
        except OSError:
            pass  # that of the listing


def begin_beside() -> int | None:
    """Start one that takes a processor, as nice as can be; its number, or None where it cannot be."""
    return _spawn(lambda child: os.setpriority(os.PRIO_PROCESS, child, _NICEST))


def begin_behind(sock: socket.socket) -> int | None:
    """Start one that every other process goes before, on the processor of the client at the other end of ``sock``."""
    where: set[int] = set()
    if len(os.sched_getaffinity(0)) > 2:  # with two, it finds the one that we are not on
        processor = _processor(sock)
        if processor is None:
            return None
        where = {processor}

    def place(child: int) -> None:
        os.sched_setscheduler(child, os.SCHED_IDLE, os.sched_param(0))
        if where:
            os.sched_setaffinity(child, where)

    return _spawn(place)


def _spawn(place: Callable[[int], None]) -> int | None:
    try:
        child = os.posix_spawn(_SHELL, ["sh", "-c", _COUNT], {}, file_actions=[*_NOTHING, *_closed], setsigmask=[])
    except OSError:
        return None
    try:
        place(child)
    except OSError:
        end(child)
        return None
    return child


def _nothing() -> None:
    pass


def end(child: int, gone: Callable[[], None] = _nothing) -> None:
    """Kill it, and call ``gone`` when it is gone, from another thread."""
    try:
        os.kill(child, signal.SIGKILL)
        reaper = QuietThread(target=_reap, args=(child, gone), name="cowkit-reaper")
        reaper.start()
        _reapers.append(reaper)
    except (RuntimeError, ProcessLookupError):  # no thread to be had, or no need for one
        _reap(child, gone)


def wait_for_ended() -> None:
    """Let those that were ended be gone, within a second: a process that ends leaves them to init, which may be none that reaps."""
    until = time.monotonic() + 1
    while _reapers and time.monotonic() < until:
        _reapers.pop().join(max(0, until - time.monotonic()))


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


def is_rationed() -> bool:
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
