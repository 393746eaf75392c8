"""What goes from the search for changes to the writer of an image: some runs of clusters at a time, with their content."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from cowkit.disk.extent import Kind

_MEMORY = 1 << 19
"""Bytes of a batch's content, at the most; or one cluster, if that is more."""

_MOST_RUNS = 4096
"""Runs of a batch, at the most."""


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

    def pieces(self) -> Iterator[tuple[Run, memoryview]]:
        """Each run with its content, of which ``ZERO`` has none."""
        at = 0
        for run in self.runs:
            end = at + run.length if run.kind is Kind.DATA else at
            yield run, self.data[at:end]
            at = end


class Gathering:
    """The batch that is coming together, and the memory that its content is read to.

    There are two pieces of memory, used in turn: the next batch comes together while the last one is being written. They are
    used again and again, since memory that is touched for the first time costs more than what is read into it.
    """

    def __init__(self, cluster_size: int) -> None:
        self._cluster = cluster_size
        size = max(_MEMORY, cluster_size)
        self._memory, self._other_memory = _pages(size), _pages(size)
        self._filled = 0
        self._runs: list[Run] = []

    @property
    def room(self) -> int:
        """How many bytes of content more it has room for."""
        return len(self._memory) - self._filled

    @property
    def is_full(self) -> bool:
        """Whether it must be taken before there is room for a cluster and a run."""
        return len(self._memory) - self._filled < self._cluster or len(self._runs) >= _MOST_RUNS

    def __bool__(self) -> bool:
        return bool(self._runs)

    def space(self, length: int) -> memoryview:
        """The memory behind the content, to be read to; :meth:`add` makes what is there content."""
        return self._memory[self._filled : self._filled + length]

    def add(self, offset: int, length: int, kind: Kind) -> None:
        """One run more. Of ``DATA``, the memory behind the content becomes content."""
        if kind is Kind.DATA:
            self._filled += length
        runs = self._runs
        if runs:
            first, size, last_kind = runs[-1]
            if last_kind is kind and first + size == offset:
                runs[-1] = Run(first, size + length, kind)
                return
        runs.append(Run(offset, length, kind))

    def take(self) -> Batch:
        """The batch so far; the next one begins."""
        batch = Batch(self._runs, self._memory[: self._filled])
        self._runs, self._filled = [], 0
        self._memory, self._other_memory = self._other_memory, self._memory
        return batch


def _pages(size: int) -> memoryview:
    """``size`` bytes of memory from where O_DIRECT can write."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
