"""What a difference is taken of: two states of a disk, now and before, and where they may differ.

A :class:`cowkit.disk.FrozenView` is one: the disk at one moment, and its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cowkit.disk import Base, Extent, FrozenView
from cowkit.disk.view_base import ViewBase


class View(Protocol):
    """Both states can be read as often as one likes, until it is closed; neither changes meanwhile."""

    @property
    def base(self) -> Base:
        """The state before."""

    @property
    def size(self) -> int:
        """Of the state now, in bytes; where the base is smaller, it counts as zeroes up to there."""

    @property
    def block_size(self) -> int:
        """The unit that dirty extents come in, in bytes; the last one may be cut off by the disk's end."""

    @property
    def dirty_is_known(self) -> bool:
        """Whether telling what is dirty takes no comparing of the two states."""

    @property
    def dirty_bytes(self) -> int:
        """How many bytes may differ."""

    def dirty_extents(self) -> Iterator[Extent]:
        """What may differ, in order: the longest runs of ``DATA``, and of what reads as zeroes for sure now (``ZERO``)."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with what is there now, from ``offset`` on."""

    def mapped(self, offset: int, end: int) -> Iterator[tuple[int, int, memoryview | None]]:
        """Where system calls find what is there now: pieces in order, each with its beginning, end and mapping, if there is one."""

    def read_base_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with what was there before, from ``offset`` on."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as it is now: ``DATA``, ``ZERO`` (zeroed since), and ``HOLE`` (nothing there, now as before)."""

    def close(self) -> None:
        """Let go of what the view needs; may be called again."""


class Increment:
    """What changed from one view of a disk to a later one; it closes both.

    :param what: the earlier view in words for messages.
    """

    dirty_is_known = True

    def __init__(self, earlier: FrozenView, later: FrozenView, what: str) -> None:
        self._earlier, self._later = earlier, later
        self.base: Base = ViewBase(earlier, what)
        self.size = later.size
        self.block_size = later.block_size
        self.read_into = later.read_into
        self.mapped = later.mapped
        self.read_base_into = earlier.read_into
        self.extents = later.extents

    @property
    def dirty_bytes(self) -> int:
        """How many bytes were written or zeroed in between."""
        return sum(extent.length for extent in self.dirty_extents())

    def dirty_extents(self) -> Iterator[Extent]:
        """The runs that were written or zeroed in between."""
        return self._later.dirty_extents(self._earlier)

    def close(self) -> None:
        """Close both views; may be called again."""
        self._later.close()
        self._earlier.close()
