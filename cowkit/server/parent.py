"""Ending with the process that started this one."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cowkit.errors import ListenError
from cowkit.server.quiet_thread import QuietThread


class ParentWatch:
    """Calls ``ended`` once, from a thread, when the parent process has ended; a context manager.

    It is the process that is watched, by a pidfd. The signal that the kernel sends on request (PR_SET_PDEATHSIG) comes when
    the *thread* ends that started us, and threads of a pool do that.

    :raises ListenError: the system has no pidfd to give, or there is no parent to watch: whoever it was has ended already.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        parent = os.getppid()
        # A process whose parent has ended is given to process 1, or to another that takes in such children and cannot be
        # told from a parent: the sooner this is called, the better.
        if parent <= 1:
            raise ListenError(
                "--exit-with-parent: the parent process has ended already, or is none that can be watched"
            )
        try:
            self._pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            self._pidfd = -1
        except OSError as error:
            raise ListenError(
                f"--exit-with-parent: the system cannot watch process {parent}: {error.strerror}"
            ) from error
        if os.getppid() != parent:  # it ended meanwhile, and the pidfd may be a stranger's
            self._forget()
        self._over = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = QuietThread(target=self._watch, name="cowkit-parent")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self._over, 1)
        self._thread.join()
        self._forget()
        os.close(self._over)

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _watch(self) -> None:
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.register(self._over, select.POLLIN)
            if all(fd != self._pidfd for fd, _ in poll.poll()):
                return
        self._ended()
