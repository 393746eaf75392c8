"""Parts what surely changed from what has to be compared, many dirty runs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from cowkit.diff.base_map import BaseMap
from cowkit.diff.qcow2.layout import down
from cowkit.diff.samples import MOST_SAMPLES, SAMPLE, Samples

if TYPE_CHECKING:
    from cowkit.diff.view import View

LEAST_UNIT = 2048
"""Of smaller blocks, the samples would be a good part."""


class Sifted(NamedTuple):
    """A range of whole clusters."""

    start: int
    end: int
    parts: list[memoryview] | None
    """If each block of it has changed, and reads as zeroes nowhere: where its bytes are, one part behind another, for system calls.
    None: nobody knows yet."""


class _Run(NamedTuple):
    start: int
    end: int
    pieces: list[tuple[int, int, memoryview]]
    hole: bool
    """Whether the base has nothing there."""


class Sieve:
    """Takes runs of written clusters of ``view``, and gives them back in the same order. Close it when done.

    :param mapped: the base's mapping; None if it has nothing anywhere.
    :param unit: the blocks that are looked at, in bytes; at least :data:`LEAST_UNIT`.
    :param cluster_size: a multiple of it.
    """

    def __init__(self, view: View, base: BaseMap, mapped: memoryview | None, unit: int, cluster_size: int) -> None:
        self._bytes_read = 0
        self._view = view
        self._map = base
        self._base = mapped
        self._inside = 0 if mapped is None else len(mapped)
        self._sparse = mapped is None or view.base.sparse or self._inside < view.size
        self._unit = unit
        self._cluster = cluster_size
        self._samples = Samples()
        self._slices: list[slice] = []
        self._runs: list[_Run] = []
        self._units = 0
        self.longest = max(MOST_SAMPLES * unit // cluster_size, 1) * cluster_size
        """The most bytes that one run can have."""

    def __bool__(self) -> bool:
        return self._units > 0

    def has_room(self, length: int) -> bool:
        """Whether a run of that many bytes can be added to those that are there."""
        return self._units + length // self._unit <= MOST_SAMPLES

    def add(self, start: int, end: int) -> bool:
        """One run of whole clusters more, all of it written; False where it cannot be sampled."""
        hole = False
        if self._sparse:
            hole = self._map.is_hole(start, end - start)
            if not hole and end > self._inside:
                return False
        pieces = []
        for first, last, mapping in self._view.mapped(start, end):
            if mapping is None:
                return False
            pieces.append((first, last, mapping))
        self._runs.append(_Run(start, end, pieces, hole))
        self._units += (end - start) // self._unit
        return True

    def take_bytes_read(self) -> int:
        """How much was read in samples, since this was asked last."""
        read, self._bytes_read = self._bytes_read, 0
        return read

    def sift(self) -> Iterator[Sifted]:
        """All that was added."""
        runs, self._runs, self._units = self._runs, [], 0
        unsure: set[int] = set()
        for hole in (False, True):
            unsure.update(self._unsure([run for run in runs if run.hole is hole], hole))
        for run in runs:
            if not unsure:
                yield Sifted(run[0], run[1], [mapping[first:last] for first, last, mapping in run[2]])
            else:
                yield from self._split(run, unsure)

    def _unsure(self, runs: list[_Run], hole: bool) -> Iterator[int]:
        """The clusters with blocks that have to be looked at."""
        unit, base = self._unit, self._base
        if not runs:
            return
        now: list[memoryview] = []
        for run in runs:
            for first, last, mapping in run.pieces:
                now += map(mapping[first:last].__getitem__, self._beginnings((last - first) // unit))
        self._bytes_read += len(now) * SAMPLE
        old: list[memoryview] | None = None
        if not hole and base is not None:
            old = []
            for start, end, _, _ in runs:
                old += map(base[start:end].__getitem__, self._beginnings((end - start) // unit))
            self._bytes_read += len(now) * SAMPLE
        try:
            unsure = self._samples.unsure(now, old)
        except OSError:  # who reads the files as a whole knows better what is wrong
            unsure = list(range(len(now)))
        if unsure:
            blocks = [at for start, end, _, _ in runs for at in range(start, end, unit)]
            for index in unsure:
                yield down(blocks[index], self._cluster)

    def _beginnings(self, count: int) -> list[slice]:
        """Where the samples of that many blocks in a row are. They are made once: to make them takes as long as to take one."""
        made, unit = self._slices, self._unit
        if len(made) < count:
            begun, end = len(made) * unit, count * unit
            made += map(slice, range(begun, end, unit), range(begun + SAMPLE, end + SAMPLE, unit))
        return made[:count]

    def _split(self, run: _Run, unsure: set[int]) -> Iterator[Sifted]:
        """The run in ranges whose clusters are all sure or all unsure."""
        at = run.start
        while at < run.end:
            begun, kind = at, at in unsure
            while at < run.end and (at in unsure) is kind:
                at += self._cluster
            parts = None
            if not kind:
                parts = [
                    mapping[max(first, begun) : min(last, at)]
                    for first, last, mapping in run.pieces
                    if first < at and last > begun
                ]
            yield Sifted(begun, at, parts)

    def close(self) -> None:
        """Let go of all; may be called again."""
        self._runs.clear()
        self._base = None
        self._samples.close()
