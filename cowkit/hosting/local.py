"""Opening a disk in this process."""

from __future__ import annotations

import os
from contextlib import suppress

from cowkit.disk import Base, Disk, ZeroBase
from cowkit.errors import CowkitError, UsageError
from cowkit.hosting.options import DiskOptions, Round


def open_disk(base: str | os.PathLike[str] | None, options: DiskOptions) -> Disk:
    """The disk of ``base``; a blank one without.

    :raises UsageError: an option makes no sense for this base.
    :raises BaseOpenError: the base cannot be opened.
    :raises ImageError: the difference that it is to begin with is damaged.
    :raises WrongBaseError: that is a difference to another base.
    """
    if options.overlay is not None:
        return _open_with_overlay(base, options, options.overlay)
    source = ZeroBase(options.size or 0) if base is None else _open_base(base, options)
    try:
        if options.size is not None and options.size < source.size:
            raise UsageError(
                f"size {options.size} is below that of the base {source.given}, {source.size}: it can only be larger"
            )
        return _disk(source, options, source.size if options.size is None else options.size)
    except BaseException:
        source.release()
        raise


def _open_with_overlay(base: str | os.PathLike[str] | None, options: DiskOptions, overlay: str) -> Disk:
    from cowkit.diff.chain import DiffChain
    from cowkit.diff.overlay import check_overlay, load_overlay

    source = None if base is None else _open_base(base, options)
    disk: Disk | None = None
    try:
        with DiffChain(overlay, source) as chain:
            chain.stand_on(source)
            size = check_overlay(chain, size=options.size)
            if source is None:
                source = ZeroBase(size)
            disk = _disk(source, options, size)
            load_overlay(disk, chain)
    except BaseException:
        if disk is not None:
            with suppress(CowkitError):  # what went wrong first is what counts
                disk.close()
        elif source is not None:
            source.release()
        raise
    return disk


def _disk(source: Base, options: DiskOptions, size: int) -> Disk:
    return Disk(
        source,
        block_size=options.block_size,
        size=_rounded(size, options.block_size, options.round),
        tmpdir=options.tmpdir,
        cow_on_read=options.cow_on_read,
        cow_on_cache=options.cow_on_cache,
        trace=options.trace,
    )


def _open_base(base: str | os.PathLike[str], options: DiskOptions) -> Base:
    golden = _open_golden(base, options)
    if golden is not None:
        return golden
    from cowkit.hosting.opening import open_exactly

    return open_exactly(
        base,
        format=options.base_format,
        offset=options.offset,
        partition=options.partition,
        tmpdir=options.tmpdir,
    )


def _open_golden(base: str | os.PathLike[str], options: DiskOptions) -> Base | None:
    """A golden base, or the part of it that is asked for; None where the base is none."""
    path = os.fspath(base)
    if not isinstance(path, str) or not path.endswith(".golden.qcow2") or options.base_format not in (None, "qcow2"):
        return None  # and the module that knows about them is not imported
    from cowkit.hosting.golden import open_golden

    golden = open_golden(path, options.tmpdir)
    if golden is None or (options.partition is None and options.offset == 0):
        return golden
    from cowkit.bases.opening import window_of

    try:
        return window_of(golden, options.offset, None, options.partition)
    except BaseException:
        golden.release()
        raise


def _rounded(size: int, block: int, how: Round) -> int:
    if how == "exact" or size % block == 0:
        return size
    return size - size % block + (block if how == "up" else 0)
