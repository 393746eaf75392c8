"""What a process has beside its arguments when it opens and makes files: working directory, umask and environment.

A call that opens or makes files takes these along, so that the host acts as the caller would at that moment: a relative
path means the same, a new file gets the same mode, and ``TMPDIR`` or ``COWKIT_RUNTIME_DIR`` is looked up in the same place.

The host has one set of them, as the process that it belongs to has; they are brought up to date with each such call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cowkit.errors import UsageError


class Surroundings(NamedTuple):
    """Those of the caller."""

    umask: int | None
    """None where the system does not tell."""
    environment: dict[bytes, bytes]


def open_working_directory() -> int:
    """A descriptor of the working directory, however its path reads by now; -1 where it cannot be had."""
    try:
        return os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def current() -> Surroundings:
    """Those of this process."""
    return Surroundings(_umask(), dict(os.environb))


def _umask() -> int | None:
    # os.umask() tells it by changing it, for all the threads.
    try:
        with open("/proc/thread-self/status", "rb") as status:
            for line in status:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return None


class Mirror:
    """Puts this process into another one's surroundings while it works for that one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._environment: dict[bytes, bytes] | None = None

    @contextmanager
    def of(self, there: Surroundings, directory: int) -> Iterator[None]:
        """Be in ``there`` and in the ``directory``, a descriptor, for the length of a block.

        Afterwards no directory is held on to, so that what is mounted there can be unmounted.

        :raises UsageError: it cannot be entered, so that a relative path means nothing.
        """
        with self._lock:
            if directory >= 0:
                try:
                    os.fchdir(directory)
                except OSError as error:
                    raise UsageError(f"the working directory cannot be entered: {error.strerror}") from error
            if there.umask is not None:
                os.umask(there.umask)
            if there.environment != self._environment:
                for name in set(os.environb) - set(there.environment):
                    del os.environb[name]
                os.environb.update(there.environment)
                self._environment = there.environment
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    os.chdir("/")
