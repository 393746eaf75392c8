"""Writes images with extended L2 entries: of a cluster with a small change, the file has the subclusters that changed.

A cluster has its place in the file as a whole, of which nothing is written but those; the rest is a hole of the file.
"""

from __future__ import annotations

from cowkit.diff.batch import Batch
from cowkit.diff.qcow2.layout import COPIED, EXTENDED_ENTRY, SUBCLUSTERS, down, up
from cowkit.diff.qcow2.writer import Qcow2Writer
from cowkit.disk.extent import Kind

_ALL = (1 << SUBCLUSTERS) - 1


class SubclusterWriter(Qcow2Writer):
    """An image with extended L2 entries; its batches are made of subclusters."""

    def add(self, batch: Batch) -> None:
        """Write the subclusters of ``batch``; batches come in the disk's order."""
        size = self.shape.cluster_size
        for (offset, length, kind), data in batch.pieces():
            end = offset + length
            while offset < end:
                first, last = up(offset, size), down(end, size)
                if offset < first or last <= offset:  # a part of a cluster
                    stop = min(end, first if offset < first else offset + size)
                    host = self._enter(offset, stop, kind)
                else:
                    stop = last
                    host = self._enter_whole(offset, stop, kind)
                if kind is Kind.DATA:
                    self._output.pwrite_meanwhile(data[: stop - offset], host)
                    data = data[stop - offset :]
                offset = stop

    def _enter(self, offset: int, end: int, kind: Kind) -> int:
        """Enter a part of one cluster, perhaps beside others; returns where its data go."""
        size, grain = self.shape.cluster_size, self.shape.grain
        start = down(offset, size)
        ((index, _),) = self._entries(start, size)
        at = index * EXTENDED_ENTRY.size
        descriptor, bits = EXTENDED_ENTRY.unpack_from(self._l2, at)
        mask = _ALL >> (SUBCLUSTERS - (end - offset) // grain) << (offset - start) // grain
        if kind is Kind.ZERO:
            bits |= mask << SUBCLUSTERS
        else:
            if not descriptor:
                descriptor = self.allocate(size) | COPIED
            bits |= mask
        EXTENDED_ENTRY.pack_into(self._l2, at, descriptor, bits)
        return int(descriptor & ~COPIED) + offset - start

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
