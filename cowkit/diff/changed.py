"""What a disk holds that its base does not: dirty extents in, changed clusters out.

*Dirty* is what was written or zeroed; *changed* is what of it differs from the base. They are compared in blocks of
the disk, or in clusters where those are smaller; an image carries whole clusters.

- Each byte is read at most once: of a cluster that is dirty in part, the base's whole cluster and the dirty pieces.
- Holes of the base are not read, and neither is base data that was zeroed for whole clusters: that counts as changed.
- Long runs are dealt with as runs: a range that is trimmed where the base has a hole costs one question to the base.

Bytes are compared with ``startswith``: it takes a position and a view, copies nothing, and ends in memcmp(3), where a
comparison of views goes byte by byte and a slice of bytes copies. Everything is read into the same few buffers again and
again, since memory that is touched for the first time costs more than what is read into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from cowkit.diff.bulk_writer import aligned_buffer
from cowkit.diff.qcow2_layout import down, image_size, up
from cowkit.disk.extent import Extent, Kind

if TYPE_CHECKING:
    from cowkit.disk import FrozenView

_PIECE = 1 << 20
"""Bytes that are read and compared at once where a long run is dirty; or one cluster, if that is more."""

_BATCH = 1 << 20
"""Bytes of a batch's data, at the most; or one cluster, if that is more."""

_MOST_RUNS = 4096
"""Runs of a batch, at the most."""

_STEPS = 200
"""How often progress is told, about."""


class Run(NamedTuple):
    """Neighbouring clusters that are to be in the image: ``length`` bytes, cut at no disk's end.

    ``DATA``: with their content. ``ZERO``: they read as zeroes, and the base's do not (or may not).
    """

    offset: int
    length: int
    kind: Kind


class Batch(NamedTuple):
    """Some ``runs``, in order, and the content of those that are ``DATA``, one after another.

    ``data`` is good until the next batch but one is asked for: meanwhile it can be written.
    """

    runs: list[Run]
    data: memoryview


class Tally:
    """What was counted on the way, in bytes and extents."""

    def __init__(self) -> None:
        self.dirty_bytes = 0
        self.dirty_extents = 0
        self.bytes_read = 0
        self.changed: list[Extent] = []
        self._offset = self._end = 0
        self._kind = Kind.DATA

    def mark(self, offset: int, length: int, kind: Kind) -> None:
        """Note that a range is changed; ranges come in order."""
        if offset == self._end and kind is self._kind:
            self._end += length
            return
        self.finish()
        self._offset, self._end, self._kind = offset, offset + length, kind

    def finish(self) -> None:
        """Put down the range at hand."""
        if self._end > self._offset:
            self.changed.append(Extent(self._offset, self._end - self._offset, self._kind))
        self._offset = self._end

    @property
    def end(self) -> int:
        """The end of the last range that was noted."""
        return self._end


class Part(NamedTuple):
    """The cluster at ``start``, of which ``pieces`` are dirty, in order."""

    start: int
    pieces: list[Extent]


def by_cluster(extents: Iterable[Extent], cluster_size: int) -> Iterator[Part | Extent]:
    """The same extents in order, as clusters that are dirty in part and runs of clusters that are dirty as a whole."""
    part: Part | None = None
    for extent in extents:
        offset, length, kind = extent
        end = offset + length
        first, last = up(offset, cluster_size), down(end, cluster_size)
        if offset < first:  # begins within a cluster
            piece = Extent(offset, min(end, first) - offset, kind)
            if part is not None and part.start == first - cluster_size:
                part.pieces.append(piece)
            else:
                if part is not None:
                    yield part
                part = Part(first - cluster_size, [piece])
        if part is not None and end >= first:
            yield part
            part = None
        if first < last:
            yield Extent(first, last - first, kind)
        if first <= last < end:  # ends within another
            part = Part(last, [Extent(last, end - last, kind)])
    if part is not None:
        yield part


class _BaseMap:
    """Data and holes of the base, asked for as needed; beyond the base's end is one hole."""

    def __init__(self, view: FrozenView) -> None:
        self._base = view.base
        self._size = view.size
        self._known: Extent | None = None

    def at(self, offset: int) -> Extent:
        """The extent that ``offset`` lies in, or the rest of it."""
        known = self._known
        if known is None or not known.offset <= offset < known.end:
            known = self._known = next(self.extents(offset, self._size - offset))
        return known

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the whole range is one hole."""
        known = self.at(offset)
        return known.kind is Kind.HOLE and known.end >= offset + length

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes of a range."""
        inside = max(0, min(length, self._base.size - offset))
        if inside:
            yield from self._base.extents(offset, inside)
        if length > inside:
            yield Extent(offset + inside, length - inside, Kind.HOLE)


class Changes:
    """Goes through what is dirty in ``view`` once; ``tally`` is complete when the iteration has ended.

    :param cluster_size: bytes; a power of two.
    :param progress: called with the dirty bytes dealt with and those there are in all, now and then and at the end.
    """

    def __init__(self, view: FrozenView, cluster_size: int, progress: Callable[[int, int], None] | None = None) -> None:
        self.tally = Tally()
        self._view = view
        self._cluster = cluster_size
        self._unit = min(view.block_size, cluster_size)
        self._piece = max(_PIECE, cluster_size)
        self._map = _BaseMap(view)
        self._batch = aligned_buffer(max(_BATCH, cluster_size))
        self._other_batch = aligned_buffer(max(_BATCH, cluster_size))
        self._filled = 0
        self._runs: list[Run] = []
        self._aside = bytearray(self._piece)  # what the batch's content is compared with
        self._aside_view = memoryview(self._aside)
        self._zeroes = bytes(self._piece)
        self._zeroes_view = memoryview(self._zeroes)
        self._progress = progress
        self._total = view.dirty_bytes if progress is not None else 0
        self._done = self._told = 0
        # The image ends with a whole sector, which a larger base would fill up with its own bytes where the disk has none.
        shrunk = view.base.size > view.size and image_size(view.size) != view.size
        self._forced = down(view.size, cluster_size) if shrunk else -1

    def __iter__(self) -> Iterator[Batch]:
        at = -1
        for work in by_cluster(self._counted(), self._cluster):
            if isinstance(work, Part):
                at = work.start
                yield from self._dirty_in_part(at, work.pieces)
            elif work.kind is Kind.DATA:
                yield from self._written(work.offset, work.end)
            else:
                yield from self._zeroed(work.offset, work.end)
        if self._forced > at:
            yield from self._dirty_in_part(self._forced, [])
        if self._runs:
            yield self._take()
        self.tally.finish()
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _counted(self) -> Iterator[Extent]:
        for extent in self._view.dirty_extents():
            self.tally.dirty_bytes += extent.length
            self.tally.dirty_extents += 1
            yield extent

    # Each of the next three deals with one stretch, and hands out the batch before it would overflow.

    def _dirty_in_part(self, start: int, pieces: list[Extent]) -> Iterator[Batch]:
        forced = start == self._forced
        length = min(self._cluster, self._view.size - start)
        hole = self._map.is_hole(start, length)
        if not forced and all(
            each.kind is Kind.ZERO and (hole or self._map.is_hole(each.offset, each.length)) for each in pieces
        ):
            self._advance(sum(each.length for each in pieces))
            return
        if self._is_full():
            yield self._take()
        content = self._batch[self._filled : self._filled + self._cluster]
        inside = 0 if hole else length
        if inside:
            self._read_base(content[:inside], start)
        if inside < self._cluster:
            content[inside:] = self._zeroes_view[inside : self._cluster]
        changed = forced
        for offset, size, kind in pieces:
            old = content[offset - start : offset - start + size]
            new: bytes | bytearray
            if kind is Kind.DATA:
                new, new_view = self._aside, self._aside_view[:size]
                self._read(new_view, offset)
            else:
                new, new_view = self._zeroes, self._zeroes_view[:size]
            if not new.startswith(old):
                changed = True
                self._mark(offset, new_view, new, 0, old)
                old[:] = new_view
            self._advance(size)
        if changed:
            self._add(start, self._cluster, Kind.ZERO if self._zeroes.startswith(content) else Kind.DATA)

    def _written(self, start: int, end: int) -> Iterator[Batch]:
        while start < end:
            if self._is_full():
                yield self._take()
            most = min(end - start, self._piece, len(self._batch) - self._filled)
            known = self._map.at(start)
            hole = down(known.end, self._cluster) - start if known.kind is Kind.HOLE else 0
            base: bytes | bytearray
            if hole > 0:
                length, base = min(most, hole), self._zeroes
            else:
                length, base = min(most, up(known.end, self._cluster) - start), self._aside
                self._read_base(self._aside_view[:length], start)
            new = self._batch[self._filled : self._filled + length]
            self._read(new, start)
            if not base.startswith(new):
                self._keep_changed(start, new, base)
            self._advance(length)
            start += length

    def _zeroed(self, start: int, end: int) -> Iterator[Batch]:
        done = start
        for extent in self._map.extents(start, end - start):
            if extent.kind is Kind.HOLE:
                continue
            if self._is_full():
                yield self._take()
            # The base's data may begin and end anywhere: two runs of it may share a block, or a cluster.
            first, last = max(down(extent.offset, self._unit), self.tally.end), up(extent.end, self._unit)
            if first < last:
                self.tally.mark(first, last - first, Kind.ZERO)
            first, last = max(down(extent.offset, self._cluster), done), up(extent.end, self._cluster)
            if first < last:
                self._add(first, last - first, Kind.ZERO)
                done = last
        self._advance(end - start)

    def _keep_changed(self, start: int, new: memoryview, base: bytes | bytearray) -> None:
        """``new`` lies behind the batch's content: make those of its clusters that differ from ``base`` part of it."""
        kept = 0
        for at in range(0, len(new), self._cluster):
            piece = new[at : at + self._cluster]
            if base.startswith(piece, at):
                continue
            self._mark(start + at, piece, base, at, piece)
            if self._zeroes.startswith(piece):
                self._add(start + at, self._cluster, Kind.ZERO)
                continue
            if kept < at:
                new[kept : kept + self._cluster] = piece
            kept += self._cluster
            self._add(start + at, self._cluster, Kind.DATA)

    def _mark(self, offset: int, new: memoryview, one: bytes | bytearray, at: int, other: memoryview) -> None:
        """Note which units of ``new``, which lies at ``offset``, are changed: those where ``one[at:]`` and ``other`` differ."""
        unit, zeroes, mark = self._unit, self._zeroes, self.tally.mark
        for begin in range(0, len(new), unit):
            if not one.startswith(other[begin : begin + unit], at + begin):
                piece = new[begin : begin + unit]
                mark(offset + begin, len(piece), Kind.ZERO if zeroes.startswith(piece) else Kind.DATA)

    # The batch

    def _is_full(self) -> bool:
        return len(self._batch) - self._filled < self._cluster or len(self._runs) >= _MOST_RUNS

    def _add(self, offset: int, length: int, kind: Kind) -> None:
        if kind is Kind.DATA:
            self._filled += length
        if self._runs:
            last = self._runs[-1]
            if last.kind is kind and last.offset + last.length == offset:
                self._runs[-1] = Run(last.offset, last.length + length, kind)
                return
        self._runs.append(Run(offset, length, kind))

    def _take(self) -> Batch:
        batch = Batch(self._runs, self._batch[: self._filled])
        self._runs, self._filled = [], 0
        # The next batch comes together while this one is being written.
        self._batch, self._other_batch = self._other_batch, self._batch
        return batch

    # Reading

    def _read(self, buffer: memoryview, offset: int) -> None:
        """The disk's own bytes."""
        self._view.read_into(buffer, offset)
        self.tally.bytes_read += len(buffer)

    def _read_base(self, buffer: memoryview, offset: int) -> None:
        """The base's bytes, with zeroes beyond its end."""
        self._view.read_base_into(buffer, offset)
        self.tally.bytes_read += max(0, min(len(buffer), self._view.base.size - offset))

    def _advance(self, length: int) -> None:
        self._done += length
        if self._progress is not None and (self._done - self._told) * _STEPS >= self._total:
            self._told = self._done
            self._progress(self._done, self._total)
