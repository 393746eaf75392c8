"""Keeps what differs between two sources that are not disks of cowkit's: NBD exports, and image files of any format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cowkit.bases.image import ImageBase
from cowkit.bases.nbd_client import ALLOCATION_DEPTH
from cowkit.bases.opening import is_uri, open_base
from cowkit.diff import DiffReport, ImageOptions, write_diff
from cowkit.diff.foreign import ForeignView, as_source
from cowkit.disk import Base
from cowkit.errors import BaseError
from cowkit.keeping.backing import choose_backing
from cowkit.keeping.suspects import check_context, told_by, told_by_layers


def keep_foreign(
    now: str | os.PathLike[str],
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    options: ImageOptions,
    now_format: str | None = None,
    base_format: str | None = None,
    context: str | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Write what differs between ``now`` and ``base`` to ``path``; see :func:`cowkit.diff_images`."""
    options.check()
    path = os.fsdecode(path)
    with _compared(now, base, now_format, base_format, context, progress) as view:
        backing = choose_backing(view.base, path, backing_file, backing_format, options)
        report = write_diff(
            view,
            path,
            backing_file=backing.name,
            backing_format=backing.format,
            options=options,
            spare=[*_files(view.now), *_files(view.base)],
        )
        return report._replace(bytes_read=view.bytes_read, dirty_extents=view.dirty_runs)


@contextmanager
def _compared(
    now_given: str | os.PathLike[str],
    base_given: str | os.PathLike[str],
    now_format: str | None,
    base_format: str | None,
    context: str | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[ForeignView]:
    wanted = [] if context is None else [check_context(context)]
    base = open_base(base_given, format=base_format, contexts=_depth(base_given))
    try:
        now = _open_now(now_given, now_format, [*{*wanted, *_depth(now_given)}])
    except BaseException:
        base.release()
        raise
    try:
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
