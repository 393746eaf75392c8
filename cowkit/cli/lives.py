"""When `cowkit serve` begins and ends, for whoever started it: the pid file, the readiness line, the reasons to end."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import threading
from collections.abc import Collection
from types import TracebackType
from typing import Self

from cowkit.errors import UsageError


class Ending:
    """Has the process end as SIGTERM would have it, once, whoever asks for it first; ``reason`` is QEMU's word for why."""

    def __init__(self) -> None:
        self.reason = "host-signal"
        self._lock = threading.Lock()
        self._asked = False

    def ask(self, reason: str = "none") -> None:
        """Have it end; from any thread."""
        with self._lock:
            if self._asked:
                return
            self._asked = True
            self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)


class Opening:
    """A context in which the signals that end the process, blocked as they are, end it at once.

    A disk that is being opened may wait for a network file system, for a server, or for a long difference to be copied, and there
    is nothing yet that would have to be put in order: what is open has no name, programs that were started end with this
    one, and the directory of the sockets is cleared away by whoever comes next.

    :param signals: blocked in this thread, and so in those that it starts.
    """

    def __init__(self, signals: Collection[signal.Signals]) -> None:
        self._signals = tuple(signals)
        self._thread = threading.Thread(target=self._wait, name="cowkit-opening", daemon=True)

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, (_OPEN,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, _OPEN)
        self._thread.join()

    def _wait(self) -> None:
        got = signal.sigwait((*self._signals, _OPEN))
        if got != _OPEN:
            os._exit(128 + got)


_OPEN = signal.SIGUSR2
"""To the thread that waits: the disk is open, leave the signals to the others."""


class ReadyLine:
    """A descriptor that was handed down, for a line to be written to when clients can connect (s6's readiness protocol).

    :raises UsageError: it is not open for writing, or is none for that.
    """

    def __init__(self, fd: int) -> None:
        if fd < 3:
            raise UsageError(f"--ready-fd {fd}: the standard streams are no descriptors for that, take one from 3 on")
        try:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        except (OSError, OverflowError) as error:
            raise UsageError(f"--ready-fd {fd}: no such descriptor was handed down") from error
        if mode == os.O_RDONLY:
            raise UsageError(f"--ready-fd {fd}: that descriptor is not open for writing")
        os.set_inheritable(fd, False)
        self._fd = fd

    def tell(self, line: str) -> None:
        """Write ``line`` and close the descriptor; that nobody reads it makes no difference."""
        try:
            os.write(self._fd, f"{line}\n".encode(errors="surrogateescape"))
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _may_be_replaced(path: str) -> None:
    """Whether what is at ``path`` is the pid file of a process that is no more, or nothing.

    :raises UsageError: it is something else, which somebody may miss, or that process is running.
    """
    try:
        with open(path, "rb") as file:
            said = file.read(32)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot write the pid file {path}: {error.strerror}") from error
    if said and not re.fullmatch(rb"[1-9][0-9]{0,9}\s*", said):
        raise UsageError(
            f"cannot write the pid file {path}: there is a file that is no pid file; choose another name, or remove it"
        )
    pid = int(said or b"0")
    if pid in (0, os.getpid()):
        return
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return
    except PermissionError:
        pass  # somebody else's, and running
    raise UsageError(
        f"cannot write the pid file {path}: it is that of process {pid}, which is running; choose another, or end that"
    )


class PidFile:
    """A file with the number of this process in it, complete when it appears, and removed in the end; a context manager.

    :raises UsageError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._said = f"{os.getpid()}\n"
        if "\0" not in path:
            _may_be_replaced(path)
        new = f"{self._path}.{os.getpid()}"
        try:
            with open(new, "w", encoding="ascii") as file:
                file.write(self._said)
            os.replace(new, self._path)
        except (OSError, ValueError) as error:
            try:
                os.unlink(new)
            except (OSError, ValueError):
                pass
            why = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot write the pid file {path}: {why}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with open(self._path, encoding="ascii", errors="replace") as file:
                ours = file.read(32) == self._said  # another may have taken the place
            if ours:
                os.unlink(self._path)
        except OSError:
            pass
