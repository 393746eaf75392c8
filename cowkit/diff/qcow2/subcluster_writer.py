"""Writes images with extended L2 entries: of a cluster with a small change, the file has the subclusters that changed.

A cluster has its place in the file as a whole, of which nothing is written but those; the rest is a hole of the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowkit.diff.batch import Batch
from cowkit.diff.image_output import ImageOutput
from cowkit.diff.qcow2.layout import COPIED, EXTENDED_ENTRY, SUBCLUSTERS, Geometry, down, up
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.disk.extent import Kind

_ALL = (1 << SUBCLUSTERS) - 1


class SubclusterWriter(Qcow2Writer):
    """An image with extended L2 entries; its batches are made of subclusters."""

    def __init__(
        self, output: ImageOutput, shape: Geometry, *, backing_file: bytes | None, backing_format: str
    ) -> None:
        super().__init__(output, shape, backing_file=backing_file, backing_format=backing_format)
        self._size, self._grain, self._per_table = shape.cluster_size, shape.grain, shape.l2_entries

    def add(self, batch: Batch) -> None:
        """Write the subclusters of ``batch``; batches come in the disk's order."""
        size, data = self._size, Kind.DATA
        small: list[tuple[memoryview, int]] = []
        parts = _Parts([batch.data] if batch.parts is None else batch.parts)
        enter, whole_part, keep = self._enter, parts.whole, small.append
        for offset, length, kind in batch.runs:
            end = offset + length
            # What scattered changes consist of, some subclusters of one cluster, takes half as long by itself.
            if kind is data and offset // size == (end - 1) // size and length < size:
                part = whole_part(length)
                if part is not None:
                    keep((part, enter(offset, end, kind)))
                    continue
            while offset < end:
                first, last = up(offset, size), down(end, size)
                if offset < first or last <= offset:  # a part of a cluster
                    stop = min(end, first if offset < first else offset + size)
                    host = self._enter(offset, stop, kind)
                else:
                    stop = last
                    host = self._enter_whole(offset, stop, kind)
                if kind is data:
                    pieces = parts.take(stop - offset)
                    if stop - offset < size and len(pieces) == 1:
                        small.append((pieces[0], host))
                    else:
                        self._output.pwritev_meanwhile(pieces, stop - offset, host)
                offset = stop
        self._output.pwrite_scattered(small)

    def _enter(self, offset: int, end: int, kind: Kind) -> int:
        """Enter a part of one cluster, perhaps beside others; returns where its data go."""
        size, grain = self._size, self._grain
        start = offset % size
        table, index = divmod(offset // size, self._per_table)
        if table != self._l2_index:
            self._turn_to(table)
        at = index * EXTENDED_ENTRY.size
        descriptor, bits = EXTENDED_ENTRY.unpack_from(self._l2, at)
        mask = _ALL >> (SUBCLUSTERS - (end - offset) // grain) << start // grain
        if kind is Kind.ZERO:
            bits |= mask << SUBCLUSTERS
        else:
            if not descriptor:
                descriptor = self.allocate(size) | COPIED
            bits |= mask
        EXTENDED_ENTRY.pack_into(self._l2, at, descriptor, bits)
        return int(descriptor & ~COPIED) + start

    def _enter_whole(self, offset: int, end: int, kind: Kind) -> int:
        """Enter whole clusters; returns where their data go."""
        size = self.shape.cluster_size
        first = host = self.allocate(end - offset) if kind is Kind.DATA else 0
        for index, count in self._entries(offset, end - offset):
            for at in range(index, index + count):
                if kind is Kind.ZERO:
                    EXTENDED_ENTRY.pack_into(self._l2, at * EXTENDED_ENTRY.size, 0, _ALL << SUBCLUSTERS)
                else:
                    EXTENDED_ENTRY.pack_into(self._l2, at * EXTENDED_ENTRY.size, host | COPIED, _ALL)
                    host += size
        return first


class _Parts:
    """A batch's content, to be taken from the front."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self._index = 0
        self._rest: memoryview | None = None

    def whole(self, length: int) -> memoryview | None:
        """The next part, if it has just that length; None, and nothing taken, otherwise."""
        part = self._parts[self._index]
        if self._rest is not None or len(part) != length:
            return None
        self._index += 1
        return part

    def take(self, length: int) -> Sequence[memoryview]:
        """The next ``length`` bytes."""
        taken: list[memoryview] = []
        while length:
            part = self._parts[self._index] if self._rest is None else self._rest
            if len(part) > length:
                taken.append(part[:length])
                self._rest = part[length:]
                break
            taken.append(part)
            length -= len(part)
            self._index += 1
            self._rest = None
        return taken
