"""The backing file that a difference records: which name and format, and whether they can be right."""

from __future__ import annotations

import os
from typing import NamedTuple

from cowkit.bases.formats import IMAGES
from cowkit.bases.opening import image_format_of, is_uri
from cowkit.diff import ImageOptions, backing_name
from cowkit.diff.qcow2.layout import check_format_name
from cowkit.diff.view import View
from cowkit.disk import Base
from cowkit.disk.arguments import check_text
from cowkit.disk.files import path_text
from cowkit.errors import UsageError
from cowkit.keeping.backing_file import check_backing_file, format_of_kept

_PROTOCOLS = (
    "file",
    "nbd",
    "http",
    "https",
    "ftp",
    "ftps",
    "ssh",
    "nfs",
    "iscsi",
    "iser",
    "rbd",
    "gluster",
    "nvme",
    "vvfat",
)
_FILTERS = ("throttle", "compress", "preallocate", "quorum", "replication", "copy-on-read", "blkdebug", "blkverify")
_OF_QEMU = {"raw", *IMAGES, "luks", "null-co", "null-aio", *_PROTOCOLS, *_FILTERS}
"""What QEMU takes for a backing file's format: its block drivers (``BlockdevDriver`` in its QAPI), as far as they read."""


class Backing(NamedTuple):
    """The name and the format to record; no name where the image stands alone."""

    name: str | None
    format: str


def choose_backing(
    base: Base,
    path: str,
    name: str | os.PathLike[str] | None,
    format: str | None,
    options: ImageOptions,
    *,
    kept: View | None = None,
) -> Backing:
    """What an image at ``path`` records, whose content is to be seen on top of ``base``.

    :param name: what the user says, or None.
    :param format: what the user says, or None.
    :param kept: given where ``base`` is an earlier state of a disk, which the user has kept in the file that ``name`` names: the
        view that has it as its base.
    :raises UsageError: they do not fit the base, or are needed and missing.
    """
    if name is not None:
        name = path_text(name, "backing_file")
    if format is not None:
        check_text(format, "backing_format")
    if not options.names_base:
        if name is not None or format is not None:
            what = "a difference for rbd" if options.is_rbd else "an image with all of the disk"
            raise UsageError(f"{what} has no backing file: leave out its name and format")
        return Backing(None, "raw")
    if name is not None:
        return _checked(base, path, name, format, kept)
    chosen = _found(base, path)
    if format is None:
        return Backing(chosen, base.backing_format)
    if chosen is None:
        raise UsageError(f"a blank disk has no base of format {format!r}: its difference stands alone")
    if check_format_name(format) != base.backing_format:
        raise UsageError(
            f"the base was opened as {base.backing_format}, not as {format!r}: leave the backing format out, or name "
            "another backing file"
        )
    return Backing(chosen, format)


def _found(base: Base, path: str) -> str | None:
    if base.backing_refusal is not None:
        raise UsageError(base.backing_refusal)
    if base.path is None:
        return base.given  # an NBD URI, which QEMU opens as it is
    return backing_name(base.given, base.path, path)


def _checked(base: Base, path: str, name: str, format: str | None, kept: View | None) -> Backing:
    """A name that the user gave; where there is no such file yet, it may be right."""
    if base.given is None:
        raise UsageError(f"a blank disk has no base to be called {name!r}: its difference stands alone")
    if not name:
        raise UsageError("the name of the backing file is empty: give the base's path, or leave the name out")
    if format is not None:
        _check_known(format)
    if is_uri(name) or "\0" in name:
        return Backing(name, format or _expected(base, kept))
    output = os.path.realpath(path)
    backing = os.path.realpath(os.path.join(os.path.dirname(output), name))
    if backing == output:
        raise UsageError(f"the difference {path} cannot be its own backing file: name the base, or another output")
    if kept is None and base.backing_refusal is not None and (found := image_format_of(backing)) is not None:
        raise UsageError(
            f"backing file {name} is a {found} file: what the base holds is raw, so name a raw copy of that"
        )
    if format is None:
        format = _expected(base, kept) if kept is None else format_of_kept(backing)
    check_backing_file(base, backing, check_format_name(format), kept)
    if ":" in name.split("/", 1)[0] and os.path.lexists(backing):
        name = f"./{name}"  # or QEMU takes what is before the colon for a protocol's name
    return Backing(name, format)


def _check_known(format: str) -> None:
    if check_format_name(format) not in _OF_QEMU:
        raise UsageError(
            f"backing format {format!r} is none that QEMU knows: {', '.join(('raw', *IMAGES))} and the like"
        )


def _expected(base: Base, kept: View | None) -> str:
    if kept is not None:
        return "qcow2"
    # Where the base itself cannot be the backing file, what it holds has been put somewhere else as a raw image.
    return base.backing_format if base.backing_refusal is None else "raw"
