"""Points in time of a disk: checkpoints, which stay until they are rolled back past, and views, which are read and closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from cowkit.disk.base import Base
from cowkit.disk.extent import Extent, Kind, merged
from cowkit.disk.layer import Layer
from cowkit.disk.owner_map import BASE, FIRST_LAYER, ZERO, FrozenMap
from cowkit.disk.source import Source
from cowkit.errors import DiskClosedError, OutOfBoundsError


class Checkpoint:
    """A frozen point of a disk that it can be rolled back to; made by :meth:`Disk.checkpoint`."""

    def __init__(self, name: str, map: FrozenMap, depth: int) -> None:
        self.name = name
        self._map = map
        self._depth = depth

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name!r}>"


def extents_of_runs(runs: Iterator[tuple[int, int, int]], shift: int, size: int) -> Iterator[Extent]:
    """Dirty runs of blocks as extents of bytes, cut at the end of the disk."""
    for first, last, owner in runs:
        start = first << shift
        yield Extent(start, min(last << shift, size) - start, Kind.ZERO if owner == ZERO else Kind.DATA)


def allocation(map: FrozenMap, base: Base, shift: int, offset: int, end: int) -> Iterator[Extent]:
    """A range as ``DATA``, ``ZERO`` (zeroed in the overlay) and ``HOLE`` (of the base, or beyond its end)."""
    return merged(_allocation(map, base, shift, offset, end))


def _allocation(map: FrozenMap, base: Base, shift: int, offset: int, end: int) -> Iterator[Extent]:
    if offset == end:
        return
    for first, last, owner in map.runs(offset >> shift, ((end - 1) >> shift) + 1):
        start, stop = max(first << shift, offset), min(last << shift, end)
        if owner != BASE:
            yield Extent(start, stop - start, Kind.ZERO if owner == ZERO else Kind.DATA)
            continue
        inside = max(start, min(stop, base.size))
        if inside > start:
            yield from base.extents(start, inside - start)
        if stop > inside:
            yield Extent(inside, stop - inside, Kind.HOLE)


class FrozenView:
    """A disk's content at one moment, read-only, while the disk goes on; made by :meth:`Disk.freeze`.

    Close it when done: until then the space of what it needs is kept.
    """

    dirty_is_known = True
    """For :class:`cowkit.diff.view.View`."""

    def __init__(
        self,
        map: FrozenMap,
        *,
        base: Base,
        size: int,
        block_size: int,
        sources: list[Source | None],
        layers: list[Layer],
        on_close: Callable[[FrozenView], None],
    ) -> None:
        self.base = base
        self.size = size
        self.block_size = block_size
        self.map = map
        self._shift = block_size.bit_length() - 1
        self._sources = sources
        self._held = [base.hold(), *(layer.hold() for layer in layers)]
        self._on_close = on_close
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> FrozenView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dirty_bytes(self) -> int:
        """How many bytes are dirty."""
        return sum(extent.length for extent in self.dirty_extents())

    def dirty_extents(self, since: FrozenView | None = None) -> Iterator[Extent]:
        """The longest runs that a layer holds (``DATA``) or that were zeroed (``ZERO``), in order.

        :param since: only what was written or zeroed since this earlier view of the same disk.
        """
        earlier = None if since is None else since.map
        one_layer = not any(self._sources[FIRST_LAYER + 1 :])
        return extents_of_runs(self.map.dirty_runs(since=earlier, one_layer=one_layer), self._shift, self.size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as ``DATA``, ``ZERO`` (zeroed in the overlay) and ``HOLE`` (of the base, or beyond its end).

        :raises OutOfBoundsError: the range is not within the disk.
        """
        end = self._check(offset, length)
        return allocation(self.map, self.base, self._shift, offset, end)

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raises OutOfBoundsError: the range is not within the disk.
        """
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on; see :meth:`pread`."""
        end = self._check(offset, len(buffer))
        if not buffer:
            return
        block = offset >> self._shift
        if (end - 1) >> self._shift == block:
            # Scattered small changes are what differences mostly consist of.
            source = self._sources[self.map.owner(block)]
            assert source is not None
            source.read_into(buffer, offset)
            return
        for first, last, owner in self.map.runs(offset >> self._shift, ((end - 1) >> self._shift) + 1):
            start, stop = max(first << self._shift, offset), min(last << self._shift, end)
            source = self._sources[owner]
            assert source is not None  # every owner in the map has a source
            source.read_into(buffer[start - offset : stop - offset], start)

    def mapped(self, offset: int, end: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """The range in pieces, in order: where each begins and ends, and the mapping that has it at the same place.

        The mapping is for system calls only, see :class:`cowkit.disk.source.Source`; there is none of what reads as zeroes and of
        some bases.
        """
        block = offset >> self._shift
        if (end - 1) >> self._shift == block:  # in a fifth of the time
            only = self._sources[self.map.owner(block)]
            assert only is not None
            yield offset, end, only.view
            return
        for first, last, owner in self.map.runs(offset >> self._shift, ((end - 1) >> self._shift) + 1):
            source = self._sources[owner]
            assert source is not None
            yield max(first << self._shift, offset), min(last << self._shift, end), source.view

    def read_base_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the base's bytes from ``offset`` on; beyond its end it reads as zeroes."""
        self._check(offset, len(buffer))
        source = self._sources[BASE]
        assert source is not None
        source.read_into(buffer, offset)

    def _check(self, offset: int, length: int) -> int:
        if self._closed:
            raise DiskClosedError("this view of the disk is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfBoundsError(
                f"bytes {offset} to {offset + length} are not within the disk, which has {self.size}"
            )
        return offset + length

    def close(self) -> None:
        """Let go of what the view needs; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._on_close(self)
        finally:
            for each in self._held:
                each.release()
