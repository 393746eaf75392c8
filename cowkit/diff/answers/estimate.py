"""How large an image of a difference would be: it is made as ever, and what would be written is counted instead.

For the image that is asked for, the figures are exact: the same code takes the same decisions, except that the name of the
backing file is not known. For other cluster sizes, the same writers are told which clusters they would have to write. Which of
them read as zeroes, and would take no room, is known for those alone that changed as a whole, or stand over holes: the figures
are upper bounds, and mostly exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING

from cowkit.diff.answers.image_size import Estimate, ImageSize
from cowkit.diff.base_map import BaseMap
from cowkit.diff.batch import Batch, Run
from cowkit.diff.clusters import by_cluster
from cowkit.diff.engine import Order
from cowkit.diff.image_output import CountingOutput
from cowkit.diff.native import NATIVE, shape_for
from cowkit.diff.options import ImageOptions
from cowkit.diff.qcow2.layout import Geometry, geometry, up
from cowkit.diff.qcow2.subcluster_writer import SubclusterWriter
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.diff.scattered import settled
from cowkit.disk.extent import Extent, Kind
from cowkit.errors import UsageError

if TYPE_CHECKING:
    from cowkit.diff.tally import Tally
    from cowkit.diff.view import View

_CLUSTERS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20)
_SPLIT_CLUSTERS = (64 << 10, 2 << 20)
_MOST_AT_ONCE = 64 << 20
_BACKING_NAME = "base"
_NOTHING = memoryview(b"")


def estimate(
    view: View, options: ImageOptions, progress: Callable[[int, int], None] | None = None
) -> tuple[Estimate, Tally]:
    """How large the image of ``view`` would be that ``options`` ask for, and what was counted on the way.

    :raises UsageError: ``options`` make no sense, or the disk is too large for them.
    """
    options.check()
    if options.chosen_engine != "native":
        what = options.needs_qemu or f"what the engine {options.engine} writes"
        raise UsageError(f"the size of {what} is not known before it is written: leave out the estimate, or that")
    options = settled(options, view)
    shape = shape_for(view.size, options)
    name = _name(view, options)
    output = CountingOutput()
    tally = NATIVE.fill(Order(view, shape, name, "raw", options, None, progress), output).tally
    plain = options.names_base and not (options.compress or options.bitmap)
    others = tuple(_others(view, tally.changed, name, shape)) if plain else ()
    has_clusters = not (options.is_raw or options.is_rbd)
    cluster_size = shape.cluster_size if has_clusters else None
    return Estimate(output.length, output.allocated, cluster_size, others, shape.subclusters), tally


def _name(view: View, options: ImageOptions) -> str | None:
    return None if not options.names_base or view.base.given is None else _BACKING_NAME


def _others(view: View, changed: list[Extent], name: str | None, asked: Geometry) -> Iterator[ImageSize]:
    unread = memoryview(
        mmap(-1, _MOST_AT_ONCE, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    )  # takes no memory while nobody looks
    kinds = [(size, False) for size in _CLUSTERS] + [(size, True) for size in _SPLIT_CLUSTERS]
    for cluster_size, subclusters in kinds:
        if (cluster_size, subclusters) == (asked.cluster_size, asked.subclusters):
            continue
        try:
            shape = geometry(view.size, cluster_size, subclusters=subclusters)
        except UsageError:  # too large a disk for such clusters
            continue
        output = CountingOutput()
        kind = SubclusterWriter if subclusters else Qcow2Writer
        writer = kind(output, shape, backing_file=None if name is None else name.encode(), backing_format="raw")
        for run in _runs(view, changed, shape.portion(view.block_size)):
            writer.add(Batch([run], unread[: run.length] if run.kind is Kind.DATA else _NOTHING))
        writer.finish()
        yield ImageSize(cluster_size, subclusters, output.length, output.allocated)


def _runs(view: View, changed: list[Extent], grain: int) -> Iterator[Run]:
    """The clusters that an image with clusters of ``grain`` bytes would have."""
    base = BaseMap(view)
    for work in by_cluster(changed, grain):
        if isinstance(work, Extent):
            for offset in range(work.offset, work.end, _MOST_AT_ONCE):
                yield Run(offset, min(_MOST_AT_ONCE, work.end - offset), work.kind)
            continue
        inside = min(grain, view.size - work.start)
        zeroed = sum(each.length for each in work.pieces if each.kind is Kind.ZERO)
        alone = len(work.pieces) == sum(each.kind is Kind.ZERO for each in work.pieces)
        zero = zeroed == inside or (alone and base.is_hole(work.start, inside))
        yield Run(work.start, up(inside, grain), Kind.ZERO if zero else Kind.DATA)
