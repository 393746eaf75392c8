"""Extents in clusters: which of an image's clusters they cover, as a whole or in part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cowkit.diff.qcow2.layout import down, up
from cowkit.disk.extent import Extent


class Part(NamedTuple):
    """The cluster at ``start``, of which ``pieces`` are dirty, in order."""

    start: int
    pieces: list[Extent]


def by_cluster(extents: Iterable[Extent], cluster_size: int) -> Iterator[Part | Extent]:
    """The same extents in order, as clusters that are dirty in part and runs of clusters that are dirty as a whole."""
    part: Part | None = None
    for extent in extents:
        offset, length, kind = extent
        if not (offset | length) & (
            cluster_size - 1
        ):  # nothing but whole ones: most of all where clusters are as small as blocks
            if part is not None:
                yield part
                part = None
            yield extent
            continue
        end = offset + length
        start = down(offset, cluster_size)
        if part is not None and part.start != start:
            yield part
            part = None
        if end < start + cluster_size or (start < offset and end == start + cluster_size):  # lies within a cluster
            if part is None:
                part = Part(start, [extent])
            else:
                part.pieces.append(extent)
            continue
        first, last = up(offset, cluster_size), down(end, cluster_size)
        if offset < first:  # begins within one
            piece = Extent(offset, first - offset, kind)
            if part is None:
                part = Part(start, [piece])
            else:
                part.pieces.append(piece)
            yield part
        part = None
        if first < last:
            yield Extent(first, last - first, kind)
        if last < end:  # ends within another
            part = Part(last, [Extent(last, end - last, kind)])
    if part is not None:
        yield part
