"""Whether an image is better off with subclusters, where nobody has said: how much of the base it would carry along otherwise.

An image has whole clusters of 64 KiB. A disk with small changes here and there has a little that changed in each of many, and the
rest of each cluster is copied from the base: 1,000 changes of 4 KiB become 62.5 MiB. With subclusters they are 4 MiB, and are
written in a third of the time. Readers that are not QEMU's, and QEMU before 5.2, may not know subclusters: so a small image, which
most are, is one that everybody reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cowkit.diff.qcow2.layout import DEFAULT_CLUSTER, geometry
from cowkit.errors import UsageError

if TYPE_CHECKING:
    from cowkit.diff.options import ImageOptions
    from cowkit.diff.view import View
    from cowkit.disk import Extent

WORTH_SUBCLUSTERS = 16 << 20
"""Bytes that did not change and would be carried along, from which on an image has subclusters."""


def settled(options: ImageOptions, view: View) -> ImageOptions:
    """``options``, of which ``subclusters`` is no longer open."""
    if options.subclusters is None:
        return options._replace(subclusters=_may_be_divided(options, view) and _pays(view))
    return options


def _may_be_divided(options: ImageOptions, view: View) -> bool:
    """Whether it is for cowkit to choose. Who gives a cluster size has chosen; of compressed clusters, the rest costs little."""
    if options.kind != "qcow2" or options.has_all or options.compress or options.cluster_size is not None:
        return False
    if not view.dirty_is_known:  # and would have to be compared twice
        return False
    try:
        geometry(view.size, DEFAULT_CLUSTER, subclusters=True)
    except UsageError:  # tables reach half as far
        return False
    return True


def _pays(view: View) -> bool:
    return carried_along(view.dirty_extents(), WORTH_SUBCLUSTERS) >= WORTH_SUBCLUSTERS


def carried_along(extents: Iterable[Extent], enough: int) -> int:
    """How many bytes that are not dirty the clusters of 64 KiB have that ``extents`` lie in; beyond ``enough``, nobody counts on."""
    size = DEFAULT_CLUSTER
    carried = 0
    last = -1  # the cluster that the last extent ended within
    for offset, length, _ in extents:
        end = offset + length
        before = offset % size
        carried += before if offset // size != last else before - size  # the rest of that one is counted already
        carried += -end % size
        last = end // size if end % size else -1
        if carried >= enough:
            break
    return carried
