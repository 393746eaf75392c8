"""Where the base of a view has data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowkit.disk.extent import Extent, Kind

if TYPE_CHECKING:
    from cowkit.diff.view import View


class BaseMap:
    """Data and holes of the base, asked for as needed; beyond the base's end is one hole."""

    def __init__(self, view: View) -> None:
        self._base = view.base
        self._size = view.size
        self._known = Extent(0, 0, Kind.HOLE)

    def at(self, offset: int) -> Extent:
        """The extent that ``offset`` lies in, or the rest of it."""
        known = self._known
        if not known[0] <= offset < known[0] + known[1]:
            known = self._known = next(self.extents(offset, self._size - offset))
        return known

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the whole range is one hole."""
        start, size, kind = self.at(offset)
        return kind is Kind.HOLE and start + size >= offset + length

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes of a range."""
        inside = max(0, min(length, self._base.size - offset))
        if inside:
            yield from self._base.extents(offset, inside)
        if length > inside:
            yield Extent(offset + inside, length - inside, Kind.HOLE)
