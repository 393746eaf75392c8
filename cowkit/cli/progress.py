"""A progress bar on a terminal, for what takes longer than a second; nothing in a pipe."""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from rich.progress import Progress, TaskID

PROGRESS_EVENT = "COWKIT_DIFF_PROGRESS"
"""What a server emits while it works: ``done`` and ``total``, in bytes."""

_PATIENCE_SECONDS = 1.0


class Bar:
    """A progress bar on standard error with the rate and the time left, if that is a terminal and it takes long enough to look at one.

    :param what: what is under way, in a word.
    """

    def __init__(self, what: str = "diff") -> None:
        self._what = what
        self._started = time.monotonic()
        self._wanted = sys.stderr is not None and sys.stderr.isatty()
        self._shown: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._shown[0].stop()

    def event(self, name: str, data: dict[str, Any]) -> None:
        """What the server emits while it works."""
        if name == PROGRESS_EVENT:
            self.update(data["done"], data["total"])

    def update(self, done: int, total: int) -> None:
        """So many bytes of so many are dealt with."""
        if not self._wanted or time.monotonic() - self._started < _PATIENCE_SECONDS:
            return
        if self._shown is None:
            self._shown = self._show(total)
        progress, task = self._shown
        progress.update(task, completed=done, total=total)

    def _show(self, total: int) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = progress.add_task(self._what, total=total)
        progress.start()
        return progress, task
