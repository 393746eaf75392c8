"""What a disk is to be like, once it is known to make sense: the same for a disk in this process and for one in the host."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from cowkit.disk.arguments import check_flag, check_number, check_text
from cowkit.disk.disk import DEFAULT_BLOCK_SIZE, check_block_size
from cowkit.disk.files import path_text
from cowkit.disk.layer import default_directory
from cowkit.disk.sizes import parse_size
from cowkit.disk.trace import MOST_EVENTS
from cowkit.errors import OverlayError, UsageError

Round = Literal["exact", "down", "up"]


class DiskOptions(NamedTuple):
    """See :class:`cowkit.CowDisk`; made by :func:`checked`."""

    size: int | None
    block_size: int
    base_format: str | None
    offset: int
    partition: int | None
    round: Round
    cow_on_read: bool
    cow_on_cache: bool
    tmpdir: str
    overlay: str | None = None
    trace: int = 0


def checked(
    *,
    has_base: bool,
    size: int | str | None,
    block_size: int | str | None,
    base_format: str | None,
    offset: int | str,
    partition: int | None,
    round: Round,
    cow_on_read: bool,
    cow_on_cache: bool,
    tmpdir: str | os.PathLike[str] | None,
    overlay: str | os.PathLike[str] | None = None,
    trace: int = 0,
) -> DiskOptions:
    """The options with their defaults; sizes are in bytes.

    :raises UsageError: one makes no sense.
    :raises OverlayError: ``tmpdir`` is no directory to write to.
    """
    block = DEFAULT_BLOCK_SIZE if block_size is None else check_block_size(parse_size(block_size, what="block size"))
    if round not in ("exact", "down", "up"):
        raise UsageError(f"round is 'exact', 'down' or 'up', not {round!r}")
    whole = None if size is None else parse_size(size)
    check_flag(cow_on_read, "cow_on_read")
    check_flag(cow_on_cache, "cow_on_cache")
    if base_format is not None:
        check_text(base_format, "base_format")
    if partition is not None:
        check_number(partition, "partition")
    if not has_base and whole is None and overlay is None:
        raise UsageError("a disk needs a base or a size: CowDisk('disk.img'), or CowDisk(size='1G') for a blank one")
    start = parse_size(offset, what="offset")
    if not has_base and (base_format is not None or start or partition is not None):
        raise UsageError(
            "a format, an offset and a partition are of a base: name one, or leave them out for a blank disk"
        )
    directory = default_directory() if tmpdir is None else _named(tmpdir, "tmpdir", "a directory")
    _check_overlay_directory(directory)
    # Layers are made later, when the working directory may be another one.
    directory = os.path.abspath(directory)
    if isinstance(trace, bool) or not isinstance(trace, int) or not 0 <= trace <= MOST_EVENTS:
        raise UsageError(f"trace is how many events to keep, from 0 to {MOST_EVENTS}, not {trace!r}")
    difference = None if overlay is None else _named(overlay, "overlay", "the path of a difference")
    return DiskOptions(
        whole, block, base_format, start, partition, round, cow_on_read, cow_on_cache, directory, difference, trace
    )


def _named(path: str | os.PathLike[str], name: str, what: str) -> str:
    text = path_text(path, name)
    if not text:
        raise UsageError(f"{name} is empty: give {what}, or leave it out")
    return text


def _check_overlay_directory(directory: str) -> None:
    """Said here, where a user reads it, rather than to the first client that writes, which gets but a number."""
    if not os.path.isdir(directory):
        problem = "there is no such directory"
    elif not os.access(directory, os.W_OK | os.X_OK):
        problem = "it is not writable"
    else:
        return
    raise OverlayError(
        f"the overlay cannot be in {directory}: {problem}; set TMPDIR (or tmpdir=, --tmpdir) to a directory to write to"
    )
