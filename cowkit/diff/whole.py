"""The whole content of a disk, for an image that stands alone or a raw file: what changed, and between that what the base has.

Holes of the base, clusters of zeroes and what was zeroed are left out: an image that stands alone has zeroes there anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowkit.diff.base_map import BaseMap
from cowkit.diff.batch import Batch, BatchInProgress
from cowkit.diff.changed import Changes
from cowkit.diff.qcow2.layout import down, up
from cowkit.disk.extent import Kind

if TYPE_CHECKING:
    from cowkit.diff.view import View


class Whole:
    """Goes through ``changes`` and the rest of ``view`` once.

    :param cluster_size: the same as of ``changes``; bytes.
    """

    def __init__(self, view: View, changes: Changes, cluster_size: int) -> None:
        self._view = view
        self._changes = changes
        self._cluster = cluster_size
        self._map = BaseMap(view)
        self._batch = BatchInProgress(cluster_size)
        self._zeroes = bytes(cluster_size)

    def __iter__(self) -> Iterator[Batch]:
        done = 0
        for batch in self._changes:
            for run, content in batch.pieces():
                yield from self._unchanged(done, run.offset)
                done = run.offset + run.length
                yield Batch([run] if run.kind is Kind.DATA else [], content)
        yield from self._unchanged(done, up(self._view.size, self._cluster))

    def _unchanged(self, start: int, end: int) -> Iterator[Batch]:
        """Whole clusters of the base."""
        inside = min(end, self._view.size)
        for extent in self._map.extents(start, inside - start) if start < inside else ():
            if extent.kind is Kind.HOLE:
                continue
            # Two runs of data may share a cluster.
            at, last = max(down(extent.offset, self._cluster), start), up(extent.end, self._cluster)
            start = max(start, last)
            while at < last:
                if self._batch.is_full:
                    yield self._batch.take()
                    self._changes.tell()
                length = min(last - at, down(self._batch.room, self._cluster))
                self._keep(at, self._read(at, length))
                at += length
        if self._batch:
            yield self._batch.take()

    def _read(self, offset: int, length: int) -> memoryview:
        content = self._batch.space(length)
        inside = min(length, self._view.size - offset)
        self._view.read_base_into(content[:inside], offset)
        content[inside:] = bytes(length - inside)
        self._changes.tally.bytes_read += max(0, min(inside, self._view.base.size - offset))
        return content

    def _keep(self, offset: int, content: memoryview) -> None:
        """Have those clusters of ``content``, which lies behind the batch's, that are not all zeroes."""
        kept, size = 0, self._cluster
        for at in range(0, len(content), size):
            piece = content[at : at + size]
            if self._zeroes.startswith(piece):
                continue
            if kept < at:
                content[kept : kept + size] = piece
            kept += size
            self._batch.add(offset + at, size, Kind.DATA)
