"""A QEMU program that works for us: it never outlives who started it, and its words fit into one line.

The kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG, set by setpriv): each is started, used and awaited
by one thread. Between the start and setpriv's work the process may have died already: the shell in between looks. It has a
session of its own, so that ctrl-C reaches it through us alone.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

from cowkit.bases.qemu_nbd import find_program
from cowkit.errors import OutputError, ToolFailedError

_LOOK = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'
"""For sh: be the program in ``"$@"``, unless the process ``$1`` is not the parent any more."""

_WORDS_BYTES = 1 << 16


class Program:
    """A program that runs for the length of a ``with`` block, and is killed at its end if it still runs then.

    :param remedy: how to install it.
    :param fds: descriptors that it gets, under the same numbers.
    :param talks: whether its standard output is wanted, as :attr:`output`.
    :param renamed: what stands in its messages, and what users are to read instead.
    :raises MissingToolError: it is not installed, or setpriv is not.
    :raises OutputError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        purpose: str,
        remedy: str,
        fds: Sequence[int] = (),
        talks: bool = False,
        renamed: Mapping[str, str] = {},
    ) -> None:
        self.command = list(command)
        self._renamed = renamed
        setpriv = find_program("setpriv", purpose, "apt install util-linux, or dnf install util-linux")
        path = find_program(command[0], purpose, remedy)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        try:
            self._process = subprocess.Popen(
                [setpriv, "--pdeathsig=KILL", "sh", "-c", _LOOK, "sh", str(os.getpid()), path, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else self._errors,
                stderr=self._errors,
                pass_fds=fds,
                start_new_session=True,
                restore_signals=False,  # a limit on the size of files is an error then, and no signal that ends it
                cwd="/",
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError as error:
            self._errors.close()
            raise OutputError(f"cannot start {command[0]}: {error.strerror}") from error
        except BaseException:
            self._errors.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.kill()
            self._process.wait()
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._errors.close()

    @property
    def output(self) -> IO[bytes]:
        """Its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout

    def has_ended(self, seconds: float = 0) -> bool:
        """Whether it runs no more, after that time at the latest."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended well, within that time.

        :raises ToolFailedError: it has ended, and not well.
        """
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if status:
            raise self.failure()
        return True

    def failure(self) -> ToolFailedError:
        """That it failed, with its words."""
        status = self._process.poll()
        return ToolFailedError(self.command, -1 if status is None else status, self.words())

    def words(self) -> str:
        """What it printed about errors, with the names that users know."""
        return self.readable(os.pread(self._errors.fileno(), _WORDS_BYTES, 0).decode(errors="replace"))

    def last_words(self) -> str:
        """The last line of it, without the program's name; how it ended, if there is none."""
        lines = [line.strip() for line in self.words().splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix(f"{self.command[0]}:").strip()
        status = self._process.poll()
        if status is None:
            return "it does not answer"
        return f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"

    def readable(self, text: str) -> str:
        """``text`` of the program, with the names that users know."""
        for name, known in self._renamed.items():
            text = text.replace(name, known)
        return text
