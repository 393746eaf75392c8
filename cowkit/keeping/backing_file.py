"""Looks into a backing file that the user has named: which format it has, and whether a difference can stand on it.

A file that is not there yet may become the right one, and is not looked into; neither is what cannot be read in a moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from cowkit.bases.formats import COMPRESSED, format_of_name
from cowkit.bases.opening import image_format_of
from cowkit.diff.answers.of_image import opened_backing
from cowkit.diff.identity import BLOCK, sampled_digest
from cowkit.diff.qcow2.layout import image_size
from cowkit.diff.view import View
from cowkit.disk import Base, Kind
from cowkit.disk.files import is_same_file
from cowkit.disk.view_base import ViewBase
from cowkit.errors import UsageError

_MOST = 64
_PIECE = 1 << 20


def format_of_kept(path: str) -> str:
    """The format of the file in which a state of a disk was kept: what its first bytes are; qcow2 while there is no file.

    :raises UsageError: it has none that could be a backing file's, or its name says something else.
    """
    if not os.access(path, os.R_OK):
        return "qcow2"
    found = image_format_of(path)
    if found in COMPRESSED:
        raise UsageError(
            f"backing file {path} begins like a file of {COMPRESSED[found]}, which no image can stand on: decompress it, or, if "
            "it is a raw disk, say so (--backing-format raw)"
        )
    claimed = format_of_name(path)
    if found is None and claimed is not None:
        raise UsageError(
            f"backing file {path} is called a {claimed} file and does not begin like one: if it is a raw disk, say so "
            "(--backing-format raw)"
        )
    return found or "raw"


def check_backing_file(base: Base, path: str, format: str, kept: View | None = None) -> None:
    """See that the file at ``path``, read as ``format``, is what ``base`` is, as far as its size and some blocks tell.

    A state of a disk that was kept may have had fewer bytes than the disk has now, as that of an overlay has whose disk is larger: it
    reads as zeroes beyond them, and ``base`` gets its size then.

    :param kept: the view whose earlier state ``base`` is, if it is one of a disk: what was written to that before and after tells
        most.
    :raises UsageError: it is something else.
    """
    if os.path.isdir(path):
        raise UsageError(f"backing file {path} is a directory: name the file that the difference stands on")
    if base.backing_refusal is None and format == base.backing_format and is_same_file(path, base.path):
        return
    found = image_format_of(path)
    if format == "qcow2" and found != format and os.access(path, os.R_OK):
        raise UsageError(f"backing file {path} is no qcow2 image: name its format (--backing-format), or another file")
    with ExitStack() as opened:
        backing = opened_backing(path, format, opened)
        if backing is None:
            return
        pread, size = backing
        reader = _Reader(pread, size)
        if kept is not None and image_size(size) < base.size and _is_zero_from(base, image_size(size)):
            # It is the state before that is as large, and whoever reads it later compares with that.
            base.size = image_size(size)
        if image_size(size) != image_size(base.size):
            why = f"it has {size} bytes, not {base.size}"
        elif not base.scattered_reads_are_slow and (
            sampled_digest(reader, base.size) != sampled_digest(base, base.size)
            or (kept is not None and _differ(reader, base, kept))
        ):
            why = "blocks that were sampled differ"
        else:
            return
    if found is not None and found != format:
        why += f"; it begins like a {found} file and was read as {format} (--backing-format names another)"
    raise UsageError(f"backing file {path} is not what the difference stands on, which is {base.given}: {why}")


def _is_zero_from(base: Base, offset: int) -> bool:
    """Whether ``base`` is what a file that ends at ``offset`` reads as below an image that is larger."""
    for extent in base.extents(offset, base.size - offset):
        if extent.kind is not Kind.DATA:
            continue
        for start in range(extent.offset, extent.end, _PIECE):
            if base.pread(min(_PIECE, extent.end - start), start).strip(b"\0"):
                return False
    return True


def _differ(reader: _Reader, base: Base, kept: View) -> bool:
    """Whether the beginnings of what was written differ: before the earlier state, and since, each evenly spread."""
    assert isinstance(base, ViewBase)
    for extents in (list(base.shown.dirty_extents()), list(kept.dirty_extents())):
        for extent in extents[:: -(-len(extents) // _MOST) or 1]:
            length = min(BLOCK, extent.length, reader.size - extent.offset, base.size - extent.offset)
            if length > 0:
                one, other = bytearray(length), bytearray(length)
                reader.read_into(memoryview(one), extent.offset)
                base.read_into(memoryview(other), extent.offset)
                if one != other:
                    return True
    return False


class _Reader:
    def __init__(self, pread: Callable[[int, int], bytes], size: int) -> None:
        self._pread = pread
        self.size = size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._pread(len(buffer), offset)
