"""Keeps what changed on a disk of this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from cowkit.diff import DiffReport, ImageOptions, check_output, write_diff
from cowkit.diff.view import Increment, View
from cowkit.disk import Checkpoint, Disk
from cowkit.disk.arguments import check_flag, check_function
from cowkit.disk.files import path_text
from cowkit.errors import OutputError, UsageError
from cowkit.keeping.backing import choose_backing
from cowkit.keeping.engines import engine_for
from cowkit.keeping.in_use import refuse_replacing_served

Point = Checkpoint | str


class States(NamedTuple):
    """Which two states of a disk a difference is of."""

    since: Point | None = None
    """From this checkpoint on; from the base, unless given."""
    at: Point | None = None
    """Up to this checkpoint; up to now, unless given."""

    @property
    def names(self) -> tuple[str | None, str | None]:
        """What the checkpoints are called; None where there is none."""
        since, at = (each.name if isinstance(each, Checkpoint) else each for each in self)
        return since, at


NOW = States()


def keep(
    disk: Disk,
    path: str | os.PathLike[str],
    *,
    options: ImageOptions,
    states: States = NOW,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    changes: bool = False,
    files: bool = False,
) -> DiffReport:
    """Write the difference between two states of ``disk`` to ``path``; see :meth:`cowkit.CowDisk.diff`."""
    check_asking(progress, changes=changes, files=files)
    options.check()
    path = output_path(path)
    refuse_replacing_served(path)
    with closing(view_of(disk, states) if disk.last is None else disk.last.view()) as view:
        kept = None if states.since is None else view
        backing = choose_backing(view.base, path, backing_file, backing_format, options, kept=kept)
        with engine_for(view, options) as engine:
            report = write_diff(
                view,
                path,
                backing_file=backing.name,
                backing_format=backing.format,
                progress=progress,
                options=options,
                engine=engine,
                spare=disk.spared,
                snapshots=states.names,
            )
        if changes or files:
            report = with_answers(report, view, files=files, progress=progress)
        return report


def check_kind(image: object) -> None:
    """See that ``image`` is a kind of image that makes sense.

    :raises UsageError: it is not.
    """
    if not isinstance(image, ImageOptions):
        raise UsageError(f"image is a cowkit.diff.ImageOptions, not {image!r}")
    image.check()


def check_asking(progress: Callable[[int, int], None] | None, **flags: bool) -> None:
    """See that what is asked for besides the image is of the types that it can be.

    :raises UsageError: it is not.
    """
    for name, value in flags.items():
        check_flag(value, name)
    if progress is not None:
        check_function(progress, "progress")


def with_answers(
    report: DiffReport, view: View, *, files: bool, progress: Callable[[int, int], None] | None
) -> DiffReport:
    """The same report with more about the very same moment.

    :param files: tell which files changed, too.
    :param progress: called now and then; what it raises ends it.
    """
    from cowkit.diff.answers.look import answered

    dirty = report.dirty_bytes
    check = (lambda: progress(dirty, dirty)) if progress is not None else (lambda: None)
    return report._replace(changes=answered(view, report.changed, files=files, check=check))


def view_of(disk: Disk, states: States) -> View:
    """Both states of ``disk``; the caller closes the view.

    :raises CheckpointError: the disk has no such checkpoint, or they are in the wrong order.
    """
    if states.since is None:
        return disk.freeze(states.at)
    earlier, later = disk.freeze_both(states.since, states.at)
    name, _ = states.names
    return Increment(earlier, later, f"checkpoint {name!r} of {disk.base.given or 'the blank disk'}")


def check(
    disk: Disk,
    path: str | os.PathLike[str],
    *,
    options: ImageOptions,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
) -> None:
    """Look whether :func:`keep` could write there.

    :raises CowkitError: what it would raise.
    """
    path = output_path(path)
    refuse_replacing_served(path)
    check_kind(options)
    choose_backing(disk.base, path, backing_file, backing_format, options)
    secret = [] if options.secret_file is None else [os.fsdecode(options.secret_file)]
    check_output(disk.base, path, spare=[*disk.spared, *secret])


def output_path(path: str | os.PathLike[str]) -> str:
    """Where to write a difference, as a string.

    :raises UsageError: it is no path.
    :raises OutputError: no file can be called so.
    """
    path = path_text(path, "where to write the difference")
    if "\0" in path:
        raise OutputError(f"cannot write {path!r}: no file's name has a NUL")
    return path
