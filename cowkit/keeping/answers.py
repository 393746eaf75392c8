"""Answers about a difference between two states of a disk of this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from cowkit.diff import ImageOptions
from cowkit.diff.answers import ChangesReport
from cowkit.diff.answers.look import look
from cowkit.disk import Disk
from cowkit.keeping.live import NOW, States, check_asking, check_kind, view_of


def changes(
    disk: Disk,
    *,
    states: States = NOW,
    files: bool = False,
    image: ImageOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChangesReport:
    """What is different between two states of ``disk``; see :meth:`cowkit.CowDisk.changes`."""
    check_asking(progress, files=files)
    if image is not None:
        check_kind(image)
    with closing(view_of(disk, states)) as view:
        return look(view, files=files, image=image, progress=progress)
