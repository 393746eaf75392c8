"""What goes from the search for changes to the writer of an image: some runs of clusters at a time, with their content."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cowkit.diff.bulk_writer import UNDER_WAY
from cowkit.disk.extent import Kind

_MEMORY = 1 << 19
"""Bytes of a batch's content, at the most; or one cluster, if that is more."""

_MOST_RUNS = 4096
"""Runs of a batch, at the most."""


class Run(NamedTuple):
    """Neighbouring clusters that are to be in the image: ``length`` bytes, cut at no disk's end.

    ``DATA``: with their content. ``ZERO``: they read as zeroes, and the base's do not.
    """

    offset: int
    length: int
    kind: Kind


_MOST_PARTS = 800
"""Parts of a gathered write, about; the system takes 1,024 (IOV_MAX)."""

_MOST_CONTENT = 4 << 20
"""Bytes of a gathered write, about."""

_FIRST_PARTS, _FIRST_CONTENT = 64, 1 << 20
"""Those of the first one: the sooner it is handed over, the sooner somebody writes."""


class Batch(NamedTuple):
    """Some ``runs``, in order, and the content of those that are ``DATA``, one after another.

    The content is good until the third batch after it is asked for: meanwhile it can be written, and another one behind it.
    """

    runs: list[Run]
    data: memoryview
    """The content in one piece; with ``parts``, no more than what was read for it."""
    parts: list[memoryview] | None = None
    """The content for a gathered write, by one who asked for that: pieces of the base's mapping, for system calls only."""

    @property
    def size(self) -> int:
        """Bytes of content."""
        return sum(run.length for run in self.runs if run.kind is Kind.DATA)

    def pieces(self) -> Iterator[tuple[Run, memoryview]]:
        """Each run with its content, of which ``ZERO`` has none."""
        at = 0
        for run in self.runs:
            end = at + run.length if run.kind is Kind.DATA else at
            yield run, self.data[at:end]
            at = end


class BatchInProgress:
    """The batch that is coming together, and the memory that its content is read to.

    There are three pieces of memory, used in turn: the next batch comes together while the last two are being written (``UNDER_WAY`` of
    :mod:`cowkit.diff.bulk_writer`). They are used again and again, since memory that is touched for the first time costs more than what
    is read into it.

    :param cluster_size: of the image, in bytes.
    :param in_parts: whether who takes the batches writes them in parts, so that some may lie elsewhere (:meth:`add_parts`).
    """

    def __init__(self, cluster_size: int, *, in_parts: bool = False) -> None:
        self._cluster = cluster_size
        self._in_parts = in_parts
        self._parts: list[memoryview] = []
        self._most_parts, self._most_content = _FIRST_PARTS, _FIRST_CONTENT
        self._content = 0
        size = max(_MEMORY, cluster_size)
        self._memory = _pages(size)
        self._others = deque(_pages(size) for _ in range(UNDER_WAY))
        self._filled = 0
        self._runs: list[Run] = []

    @property
    def room(self) -> int:
        """How many bytes of content more it has room for."""
        return len(self._memory) - self._filled

    @property
    def is_full(self) -> bool:
        """Whether it must be taken before there is room for a cluster and a run."""
        return (
            len(self._memory) - self._filled < self._cluster
            or len(self._runs) >= _MOST_RUNS
            or len(self._parts) >= self._most_parts
            or self._content >= self._most_content
        )

    def __bool__(self) -> bool:
        return bool(self._runs)

    def space(self, length: int) -> memoryview:
        """The memory behind the content, to be read to; :meth:`add` makes what is there content."""
        return self._memory[self._filled : self._filled + length]

    def add(self, offset: int, length: int, kind: Kind) -> None:
        """One run more. Of ``DATA``, the memory behind the content becomes content."""
        if kind is Kind.DATA:
            if self._in_parts:
                self._parts.append(self._memory[self._filled : self._filled + length])
            self._filled += length
        self._run(offset, length, kind)

    def add_parts(self, offset: int, length: int, parts: Sequence[memoryview], used: int) -> None:
        """One run of ``DATA`` more, whose content is ``parts``, ``used`` bytes of them in the memory behind the content."""
        self._filled += used
        self._content += length
        self._parts += parts
        self._run(offset, length, Kind.DATA)

    def _run(self, offset: int, length: int, kind: Kind) -> None:
        runs = self._runs
        if runs:
            first, size, last_kind = runs[-1]
            if last_kind is kind and first + size == offset:
                runs[-1] = Run(first, size + length, kind)
                return
        runs.append(Run(offset, length, kind))

    def take(self) -> Batch:
        """The batch so far; the next one begins."""
        batch = Batch(self._runs, self._memory[: self._filled], self._parts if self._in_parts else None)
        self._runs, self._parts, self._filled, self._content = [], [], 0, 0
        self._most_parts, self._most_content = _MOST_PARTS, _MOST_CONTENT
        self._others.append(self._memory)
        self._memory = self._others.popleft()
        return batch


def _pages(size: int) -> memoryview:
    """``size`` bytes of memory from where O_DIRECT can write."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
