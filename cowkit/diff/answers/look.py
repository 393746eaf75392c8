"""Looks at both states of a disk and answers what became of it, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from cowkit.diff.answers.amounts import amounts, without
from cowkit.diff.answers.filesystems import Readable, file_system_at
from cowkit.diff.answers.report import ChangesReport, PartitionChanges
from cowkit.diff.answers.states import Now, Partitions, partitions_of
from cowkit.diff.changed import Changes
from cowkit.diff.options import ImageOptions
from cowkit.diff.resized import is_resized
from cowkit.disk.extent import Extent, Kind

if TYPE_CHECKING:
    from cowkit.diff.view import View

_GRAIN = ImageOptions().cluster
"""What an image is made of unless something else is asked for, so that the figures are the same as those of writing one."""


def look(
    view: View,
    *,
    files: bool = False,
    image: ImageOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChangesReport:
    """What is different between both states of ``view``.

    :param files: look which files changed, too.
    :param image: tell how large an image of that kind would be, too.
    :param progress: called with the dirty bytes dealt with and those there are in all, about 200 times; what it raises ends it.
    :raises UsageError: ``image`` makes no sense, or the disk is too large for it.
    :raises BaseChangedError: the base is not what it was when the disk was opened.
    :raises MissingToolError: ``files``: a program that reads one of the file systems is not installed.
    """
    begun = time.perf_counter()
    view.base.verify_path()
    estimated = None
    if image is not None:
        from cowkit.diff.answers.estimate import estimate

        estimated, tally = estimate(view, image, progress)
    else:
        # In blocks of the disk, none is dirty in part: the figures are those of an image, which has the rest of its clusters as well.
        changes = Changes(view, min(view.block_size, _GRAIN), progress, in_parts=True, written=False)
        with closing(changes):
            for _ in changes:
                pass
        tally = changes.tally
    dirty = tally.dirty_bytes
    check = (lambda: progress(dirty, dirty)) if progress is not None else (lambda: None)
    report = answered(view, tally.changed, files=files, check=check)
    view.base.verify_path()
    return report._replace(bytes_read=tally.bytes_read, seconds=time.perf_counter() - begun, estimate=estimated)


def answered(
    view: View, changed: Sequence[Extent], *, files: bool = False, check: Callable[[], None] = lambda: None
) -> ChangesReport:
    """The same, where what changed is known already.

    :param check: called now and then; what it raises ends it.
    """
    begun = time.perf_counter()
    divided = partitions_of(view)
    report = report_of(
        Now(view),
        divided,
        list(view.dirty_extents()),
        changed,
        base=view.base.given,
        size=view.size,
        block_size=view.block_size,
    )._replace(base_size=None if view.base.given is None else view.base.size, resized=is_resized(view))
    if files:
        from cowkit.diff.answers.files import changed_files

        report = report._replace(files=changed_files(view, divided, changed, check))
    return report._replace(seconds=time.perf_counter() - begun)


def report_of(
    now: Readable | None,
    divided: Partitions,
    dirty: Sequence[Extent],
    changed: Sequence[Extent],
    *,
    base: str | None,
    size: int,
    block_size: int,
) -> ChangesReport:
    """What ``dirty`` and ``changed``, both in order, say about a disk of ``size`` bytes and its partitions.

    :param now: the disk; None where it cannot be read.
    """
    loose = None
    if divided.now:
        covered = [Extent(each.offset, each.size, Kind.DATA) for each in divided.now if each.size]
        loose = amounts(list(without(dirty, covered)), list(without(changed, covered)))
    partitions = tuple(
        PartitionChanges(
            each.number,
            each.offset,
            each.size,
            None if now is None else file_system_at(now, each.offset, each.size),
            amounts(dirty, changed, each.offset, each.offset + each.size),
        )
        for each in divided.now
    )
    return ChangesReport(
        base=base,
        size=size,
        block_size=block_size,
        amounts=amounts(dirty, changed),
        partition_table=divided.table,
        file_system=None if divided.now or now is None else file_system_at(now, 0, size),
        partitions=partitions,
        unpartitioned=loose,
        dirty=tuple(dirty),
        changed=tuple(changed),
        bytes_read=0,
        seconds=0,
    )
