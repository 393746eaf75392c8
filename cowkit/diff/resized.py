"""Whether a disk has another size than the state before: to the byte, where both sizes are known to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowkit.diff.qcow2.layout import SECTOR, image_size
from cowkit.disk.view_base import ViewBase

if TYPE_CHECKING:
    from cowkit.diff.view import View
    from cowkit.disk import Base


def is_resized(view: View) -> bool:
    """Whether the size changed; a blank disk's has not.

    An image has whole sectors, and so has what some NBD servers export. Where the larger size is such a one, and there are but zeroes
    beyond the smaller one's end, that is the same disk, rounded up.

    :raises BaseError: the base cannot be read.
    """
    base = view.base
    if base.given is None or base.size == view.size:
        return False
    if image_size(base.size) != image_size(view.size):
        return True
    if base.size < view.size:
        now: Base | None = getattr(view, "now", None)  # of a disk, the size is known
        return now is None or not _is_in_sectors(now)  # what there is in its end counts as changed
    return not _is_in_sectors(base) or base.pread(base.size - view.size, view.size).strip(b"\0") != b""


def _is_in_sectors(source: Base) -> bool:
    """Whether its size may have been rounded up."""
    if source.size % SECTOR or isinstance(source, ViewBase):
        return False
    if source.path is None:
        return True  # an NBD export
    if source.backing_format == "qcow2" and source.backing_refusal is None:
        from cowkit.diff.recorded import recorded_size  # a raw base needs nothing of that

        return recorded_size(source) != source.size
    return source.backing_format != "raw"
