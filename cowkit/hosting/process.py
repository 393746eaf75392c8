"""The host process: starting it, calling it, and learning of its end."""

from __future__ import annotations

import atexit
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cowkit.errors import ControlError, ServerError, UsageError
from cowkit.hosting.channel import CANNOT_BE_PICKLED, MOST_DESCRIPTORS, Channel, Data, packed
from cowkit.hosting.errors_in_transit import reassembled
from cowkit.hosting.messages import Reply, Request
from cowkit.hosting.surroundings import current, open_working_directory

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[3:]; from cowkit.host.main import main; main(*map(int, sys.argv[1:3]))"
_END_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0


class Host:
    """A host process, which has just been started.

    :raises ServerError: it cannot be started.
    """

    def __init__(self) -> None:
        self.disks = itertools.count(1)
        """Numbers for disks."""
        self.open_disks: set[int] = set()
        self._ending = False
        self._end: str | None = None
        """How the process ended; None while that is not known."""
        self._burying = threading.Lock()
        self._idle: list[Channel] = []
        if not sys.executable:
            raise ServerError("cannot start a host process: Python does not know its own program (sys.executable)")
        try:
            self._words = os.memfd_create("cowkit-host")
            self._control, theirs = socket.socketpair()
        except OSError as error:
            raise ServerError(f"cannot start a host process: {error.strerror}") from error
        try:
            with theirs:
                self._process = subprocess.Popen(
                    _command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=self._words,
                    stderr=self._words,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    start_new_session=True,  # ctrl-C, or a kill of the group, is for the tests: the host closes its disks, and ends
                )
        except OSError as error:
            self._let_go()
            raise ServerError(f"cannot start a host process with {sys.executable!r}: {error.strerror}") from error
        except BaseException:
            self._let_go()
            raise
        self.pid = self._process.pid

    def call(
        self,
        operation: str,
        disk: int,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
        *,
        data: Data = b"",
        descriptors: Sequence[int] = (),
        located: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, bytearray]:
        """Have the host carry out ``operation``; its result, and the bytes that come with it.

        :param located: it opens or makes files: take the working directory, umask and environment along.
        :raises ServerError: the host has gone.
        :raises UsageError: an argument cannot be sent.
        :raises Exception: whatever the operation raised there.
        """
        if len(descriptors) >= MOST_DESCRIPTORS:
            raise UsageError(f"{len(descriptors)} sockets are too many for a disk with server='process': give fewer")
        directory = open_working_directory() if located else -1
        try:
            request = Request(
                operation,
                disk,
                arguments,
                options or {},
                current() if located else None,
                directory >= 0,
                progress is not None,
            )
            try:
                head = packed(request)
            except CANNOT_BE_PICKLED as error:
                raise UsageError(f"{operation}: an argument cannot be sent to the host of the disk: {error}") from error
            passed = [*descriptors, directory] if directory >= 0 else descriptors
            return self._exchange(head, data, passed, progress)
        finally:
            if directory >= 0:
                os.close(directory)

    def _exchange(
        self, head: bytes, data: Data, descriptors: Sequence[int], progress: Callable[[int, int], None] | None
    ) -> tuple[Any, bytearray]:
        refusal: BaseException | None = None
        channel: Channel | None = None
        try:
            channel = self._borrow()
            channel.send(head, data, descriptors)
            while True:
                (kind, value), rest = channel.receive()
                if kind != Reply.PROGRESS:
                    break
                try:
                    assert progress is not None
                    progress(*value)
                except BaseException as error:
                    refusal = error
                channel.send(packed(refusal is None))
            self._idle.append(channel)
        except BaseException as error:
            # A TimeoutError that the handler of a signal raises has no number; one of the socket's errors has.
            if isinstance(error, OSError) and error.errno is not None:
                if channel is not None:
                    channel.close()
                raise self._lost() from error
            if channel is not None:
                channel.abandon()
            raise
        if refusal is not None:
            raise refusal
        if kind == Reply.ERROR:
            raise reassembled(value)
        return value, rest

    def _borrow(self) -> Channel:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise ServerError(f"cannot reach the host of the disk: {error.strerror}; raise `ulimit -n`") from error
        channel = Channel(ours)
        try:
            with theirs:
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
        except BaseException:
            channel.close()
            raise
        return channel

    # The end

    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._end is not None or self._ends_within(0)

    @property
    def ended(self) -> bool:
        """Whether it is over, since this process is ending."""
        return self._ending

    def _ends_within(self, seconds: float) -> bool:
        """Whether the process ends within that time; if so, it is buried.

        Its end of the control socket tells. (Popen's own way to wait takes a lock that an interrupt may leave taken.)
        """
        with self._burying:
            if self._end is not None:
                return True
            poll = select.poll()
            poll.register(self._control, select.POLLHUP)
            if not poll.poll(seconds * 1000):
                return False
            self._bury()
            return True

    def _lost(self) -> ServerError:
        """Why there is no answer."""
        name = f"the host process {self.pid} of the disks with server='process'"
        if self._ending:
            return ServerError(f"{name} has ended, since this process is ending: close disks before")
        if not self._ends_within(_PATIENCE_SECONDS):
            return ServerError(
                f"{name} broke off: it has no memory, descriptor or thread left for this; "
                "close disks, or raise the limits (`ulimit -n`, `ulimit -u`)"
            )
        return ServerError(f"{name} {self._end}: what was written is lost; new disks get a new host")

    def _bury(self) -> None:
        """Take down how it ended, and close what led to it."""
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # somebody else waits for all children
            how, status = "has ended", 0
        else:
            if status < 0:
                how = f"was ended by signal {-status} ({signal.strsignal(-status)})"
            else:
                how = f"ended with status {status}"
        self._process.returncode = status  # or its destructor would complain
        said = self._last_words()
        self._remove_sockets()
        self._end = f"{how}, saying {said!r}" if said else how
        self._let_go()

    def _last_words(self) -> str:
        lines = os.pread(self._words, 1 << 16, 0).decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _remove_sockets(self) -> None:
        """Its servers' private directories, which a host that was killed leaves behind."""
        from cowkit.server.runtime import running

        with suppress(ControlError):  # there is no safe runtime directory, so it had none either
            running()  # removes those whose process has ended

    def _let_go(self) -> None:
        """Close all descriptors."""
        self._control.close()
        while self._idle:
            self._idle.pop().close()
        words, self._words = self._words, -1
        if words >= 0:
            os.close(words)

    def end(self) -> None:
        """End the process: its disks are closed, and nothing of it is left when this returns."""
        self._ending = True
        with suppress(OSError):  # it has ended before
            self._control.shutdown(socket.SHUT_WR)
        if not self._ends_within(_END_SECONDS):
            os.kill(self.pid, signal.SIGKILL)
            self._ends_within(_END_SECONDS)

    def forget(self) -> None:
        """In a forked child: the process is the parent's."""
        self._let_go()
        self._process.returncode = 0


class _Here:
    """What this process has: a host, or none."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.lock = threading.Lock()


_here = _Here()


def host() -> Host:
    """The host of this process; started, if there is none or it has ended.

    :raises ServerError: it cannot be started.
    """
    with _here.lock:
        if _here.host is None or _here.host.gone():
            _here.host = Host()
        return _here.host


def end_idle_host() -> None:
    """End the host of this process, if it has one that has no disks: it would be started again for the next."""
    with _here.lock:
        if _here.host is not None and not _here.host.open_disks:
            found, _here.host = _here.host, None
            found.end()


def _end_at_exit() -> None:
    if _here.host is not None:
        _here.host.end()


def _after_fork_in_child() -> None:
    _here.lock = threading.Lock()  # a thread that the child does not have may have held it
    found, _here.host = _here.host, None
    if found is not None:
        found.forget()


atexit.register(_end_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)


def _command(control: int) -> list[str]:
    """How to start a host: this Python, with the modules that are found from here, and without the time that ``site`` takes."""
    flags = ["-S"]
    if sys.dont_write_bytecode:
        flags.append("-B")
    if sys.flags.ignore_environment:
        flags.append("-E")
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    if home not in path:
        path.append(home)
    return [sys.executable, *flags, "-c", _BOOTSTRAP, str(control), str(os.getpid()), *path]
