"""Opening a base for a disk: with the size that its disk has, which a qcow2 image has in sectors alone."""

from __future__ import annotations

import os

from cowkit.bases.opening import open_base, window_of
from cowkit.disk import Base


def open_exactly(
    given: str | os.PathLike[str],
    *,
    format: str | None = None,
    offset: int = 0,
    partition: int | None = None,
    tmpdir: str | os.PathLike[str] | None = None,
) -> Base:
    """The base ``given``; the parameters and errors are those of :func:`cowkit.bases.open_base`.

    One of cowkit's differences has the size of its disk, to the byte.
    """
    base = open_base(given, format=format, tmpdir=tmpdir)
    try:
        if base.backing_format == "qcow2":
            from cowkit.diff.recorded import exact_size  # a raw base needs nothing of that

            base.size = exact_size(base)
        if partition is None and offset == 0:
            return base
        return window_of(base, offset, None, partition)
    except BaseException:
        base.release()
        raise
