"""Where the bytes of a block come from: the base, a layer, or nowhere (zeroes)."""

from __future__ import annotations

from typing import Protocol

ZEROES = memoryview(bytes(1 << 20))
"""Zeroes to hand to system calls."""


class Source(Protocol):
    """A holder of bytes at the disk's own offsets."""

    @property
    def view(self) -> memoryview | None:
        """The bytes from offset 0 on for system calls to read, or None where there is no such thing.

        It is a mapping of a file: Python code must not look into it, since a file that was truncated meanwhile, or a disk
        error, ends a process that does (SIGBUS); a system call gets EFAULT instead.
        """

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on."""


class ZeroSource:
    """Zeroes, as far as anybody looks."""

    view: memoryview | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with zeroes."""
        for start in range(0, len(buffer), len(ZEROES)):
            piece = buffer[start : start + len(ZEROES)]
            piece[:] = ZEROES[: len(piece)]


class PaddedSource:
    """A source of ``size`` bytes, followed by zeroes."""

    view: memoryview | None = None

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies beyond the source's end reads as zeroes."""
        inside = max(0, min(len(buffer), self._size - offset))
        if inside:
            self._source.read_into(buffer[:inside], offset)
        ZeroSource().read_into(buffer[inside:], offset + inside)
