"""What the writers of images write to: a file, or something that only counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ImageOutput(Protocol):
    """Takes pieces at offsets, in any order; what nobody writes is a hole."""

    bytes_written: int

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""

    def pwrite_meanwhile(self, data: memoryview, offset: int) -> None:
        """The same by the end; ``data`` stay as they are until the next call but one returns."""

    def pwrite_scattered(self, pieces: Sequence[tuple[memoryview, int]]) -> None:
        """Write pieces, each at the offset beside it, of a few KiB each; what was written meanwhile is written before."""

    def pwritev_meanwhile(self, pieces: Sequence[memoryview], length: int, offset: int) -> None:
        """The same for pieces that lie one behind another in it, ``length`` bytes in all."""

    def drain(self) -> None:
        """Wait until all of :meth:`pwrite_meanwhile` is written."""

    def truncate(self, length: int) -> None:
        """Make it ``length`` bytes long."""


_PAGE = 4096


class CountingOutput:
    """Writes nothing, and counts what a file would have."""

    def __init__(self) -> None:
        self.bytes_written = 0
        self.length = 0
        self._runs: list[tuple[int, int]] = []

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Count ``data`` at ``offset``."""
        self._count(len(data), offset)

    pwrite_meanwhile = pwrite

    def pwrite_scattered(self, pieces: Sequence[tuple[memoryview, int]]) -> None:
        """Count each at its offset."""
        for data, offset in pieces:
            self._count(len(data), offset)

    def pwritev_meanwhile(self, pieces: Sequence[memoryview], length: int, offset: int) -> None:
        """Count them at ``offset``."""
        self._count(length, offset)

    def _count(self, length: int, offset: int) -> None:
        self.bytes_written += length
        first, last = offset // _PAGE, -(-(offset + length) // _PAGE)
        if self._runs and self._runs[-1][0] <= first <= self._runs[-1][1]:
            first, end = self._runs.pop()
            last = max(last, end)
        self._runs.append((first, last))

    def drain(self) -> None:
        """Nothing is under way."""

    def truncate(self, length: int) -> None:
        """Note how long the file is."""
        self.length = length

    @property
    def allocated(self) -> int:
        """How many bytes the file takes on a file system of 4 KiB blocks, its holes left out."""
        pages = end = 0
        for first, last in sorted(self._runs):
            pages += max(0, last - max(first, end))
            end = max(end, last)
        return pages * _PAGE
