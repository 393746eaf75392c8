"""Keeps what differs between two sources that are not disks of cowkit's: NBD exports, and image files of any format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Unpack

from cowkit.bases.image import ImageBase
from cowkit.bases.nbd_client import ALLOCATION_DEPTH
from cowkit.bases.opening import is_uri, open_base
from cowkit.diff import DiffReport, ImageChoice, ImageOptions, write_diff
from cowkit.diff.foreign import ForeignView, as_source
from cowkit.diff.recorded import exact_size
from cowkit.disk import Base
from cowkit.disk.arguments import check_text
from cowkit.errors import BaseError, UsageError
from cowkit.keeping.backing import choose_backing
from cowkit.keeping.engines import engine_for
from cowkit.keeping.in_use import refuse_replacing_served
from cowkit.keeping.live import check_asking, check_kind, output_path, with_answers
from cowkit.keeping.suspects import check_context, told_by, told_by_layers

if TYPE_CHECKING:
    from cowkit.diff.answers import ChangesReport


def diff_images(
    now: str | os.PathLike[str],
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    now_format: str | None = None,
    base_format: str | None = None,
    context: str | None = None,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **image: Unpack[ImageChoice],
) -> DiffReport:
    """Keep what differs between ``now`` and ``base``, of which neither need be a disk of cowkit's: as an image at ``path``.

    Both are NBD URIs, or files of any kind that can be a base: raw or compressed disks, images of a format that QEMU reads. They
    are compared as wholes, but for what is a hole in both; images that stand on one file, or one on the other, only where one
    of them holds something above it. Neither may change meanwhile. What is not named here is as for :meth:`CowDisk.diff`.

    :param now: the state to keep; larger than the base, or smaller, if need be.
    :param now_format: its format; told by its name and content, unless given.
    :param base_format: the same of the base.
    :param context: a metadata context of ``now``, ``"qemu:dirty-bitmap:NAME"`` or ``"qemu:allocation-depth"``, that is known to
        say all that changed since ``base``: nothing else is compared.
    :param image: what kind of image, by the members of :class:`cowkit.diff.ImageOptions`.
    :param progress: called about 200 times with the bytes compared and those there are; what it raises ends it all.
    :raises UsageError: the options do not go together, or there is no such context.
    :raises BaseError: one of the two cannot be opened or read, or changed meanwhile; an old file at ``path`` is as it was.
    :raises OutputError: the image cannot be written; an old file is as it was.
    """
    return keep_foreign(
        now,
        base,
        path,
        options=ImageOptions.chosen(image),
        now_format=now_format,
        base_format=base_format,
        context=context,
        backing_file=backing_file,
        backing_format=backing_format,
        progress=progress,
    )


def keep_foreign(
    now: str | os.PathLike[str],
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    options: ImageOptions,
    now_format: str | None = None,
    base_format: str | None = None,
    context: str | None = None,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    changes: bool = False,
    files: bool = False,
) -> DiffReport:
    """Write what differs between ``now`` and ``base`` to ``path``; see :func:`diff_images`."""
    check_asking(progress, changes=changes, files=files)
    options.check()
    path = output_path(path)
    refuse_replacing_served(path)
    with _compared(now, base, now_format, base_format, context, progress) as view:
        backing = choose_backing(view.base, path, backing_file, backing_format, options)
        with engine_for(view, options) as engine:
            report = write_diff(
                view,
                path,
                backing_file=backing.name,
                backing_format=backing.format,
                options=options,
                engine=engine,
                spare=[*_files(view.now), *_files(view.base)],
            )
        report = report._replace(bytes_read=view.bytes_read, dirty_extents=view.dirty_runs)
        return with_answers(report, view, files=files, progress=progress) if changes or files else report


def look_at_foreign(
    now: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    now_format: str | None = None,
    base_format: str | None = None,
    context: str | None = None,
    files: bool = False,
    image: ImageOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChangesReport:
    """What differs between ``now`` and ``base``, without writing anything; see :meth:`cowkit.CowDisk.changes`."""
    from cowkit.diff.answers.look import look

    check_asking(progress, files=files)
    if image is not None:
        check_kind(image)
    with _compared(now, base, now_format, base_format, context, progress) as view:
        return look(view, files=files, image=image)._replace(bytes_read=view.bytes_read)


@contextmanager
def _compared(
    now_given: str | os.PathLike[str],
    base_given: str | os.PathLike[str],
    now_format: str | None,
    base_format: str | None,
    context: str | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[ForeignView]:
    for what, given in (("now", now_given), ("base", base_given)):
        if not isinstance(given, str | os.PathLike):
            raise UsageError(f"{what} is a path or an NBD URI, not {given!r}")
    for what, text in (("now_format", now_format), ("base_format", base_format), ("context", context)):
        if text is not None:
            check_text(text, what)
    wanted = [] if context is None else [check_context(context)]
    base = open_base(base_given, format=base_format, contexts=_depth(base_given))
    try:
        now = _open_now(now_given, now_format, [*{*wanted, *_depth(now_given)}])
    except BaseException:
        base.release()
        raise
    try:
        for source in (now, base):
            if isinstance(source, ImageBase):
                source.size = exact_size(source)
        suspects = told_by_layers(now, base) if context is None else told_by(now, base, context)
    except BaseException:
        now.release()
        base.release()
        raise
    with ForeignView(now, base, suspects=suspects, progress=progress) as view:
        yield view


def _open_now(given: str | os.PathLike[str], format: str | None, contexts: list[str]) -> Base:
    try:
        return open_base(given, format=format, contexts=contexts)
    except BaseError as error:
        raise as_source(error, os.fspath(given)) from error


def _depth(given: str | os.PathLike[str]) -> list[str]:
    """An image's allocation is asked for as a rule; a server's is not to be trusted unasked."""
    return [] if is_uri(given) else [ALLOCATION_DEPTH]


def _files(source: Base) -> list[str]:
    if isinstance(source, ImageBase):
        return source.files
    return [] if source.path is None else [source.path]
