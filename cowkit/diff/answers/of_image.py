"""What an image that was kept says about where it differs from its backing file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack

from cowkit.diff.answers.look import report_of
from cowkit.diff.answers.report import ChangesReport
from cowkit.diff.answers.states import divided_as
from cowkit.diff.qcow2.reader import Qcow2Image
from cowkit.disk.base import FileBase
from cowkit.disk.extent import Kind
from cowkit.errors import BaseOpenError, ImageError

_LONGEST_CHAIN = 200


def changes_in(path: str | os.PathLike[str]) -> ChangesReport:
    """What the image at ``path`` has that its backing file has not, in whole clusters (or subclusters).

    Dirty and changed are the same there. Its backing file is read, as far as it is there and raw or qcow2 itself, to look for
    partitions; without it, what the image does not have counts as unknown content.

    :raises ImageError: it is no sound qcow2 image, or one that is not read here.
    """
    begun = time.perf_counter()
    path = os.fsdecode(path)
    with ExitStack() as opened:
        image, has_all = _open(path, opened, 0)
        extents = [each for each in image.extents() if each.kind is not Kind.HOLE]
        disk = _Image(path, image)
        divided = divided_as(disk) if has_all else divided_as(None)
        report = report_of(
            disk if has_all else None,
            divided,
            extents,
            extents,
            base=image.backing_file,
            size=image.size,
            block_size=image.cluster_size,
        )
    return report._replace(seconds=time.perf_counter() - begun)


class _Image:
    """What can be read of an image."""

    def __init__(self, path: str, image: Qcow2Image) -> None:
        self.given: str | None = path
        self.size = image.size
        self.pread = image.pread


def _open(path: str, opened: ExitStack, depth: int) -> tuple[Qcow2Image, bool]:
    """The image on top of what it stands on; and whether all of that is there."""
    image = opened.enter_context(Qcow2Image(path))
    if image.backing_file is None:
        return image, True
    backing = opened_backing(
        os.path.join(os.path.dirname(path), image.backing_file), image.backing_format, opened, depth
    )
    if backing is None:
        return image, False
    return opened.enter_context(Qcow2Image(path, *backing)), True


def opened_backing(
    path: str, format: str | None, opened: ExitStack, depth: int = 0
) -> tuple[Callable[[int, int], bytes], int] | None:
    """What reads the backing file until ``opened`` ends, and its size; None where it cannot be read here."""
    try:
        if format == "raw":
            base = FileBase(path)
            opened.callback(base.release)
            return base.pread, base.size
        if format == "qcow2" and depth < _LONGEST_CHAIN:
            image, has_all = _open(path, opened, depth + 1)
            return (image.pread, image.size) if has_all else None
    except (BaseOpenError, ImageError):
        pass
    return None
