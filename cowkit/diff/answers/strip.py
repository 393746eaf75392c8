"""A strip of characters that shows where on a disk something changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cowkit.disk.extent import Extent, Kind

_SHADES = "·▁▂▃▄▅▆▇█"
UNCHANGED = _SHADES[0]
ZEROED = "0"
IDENTICAL = "="

CHANGED_LEGEND = f"{UNCHANGED} unchanged   {_SHADES[1]} to {_SHADES[-1]} a little to all of it changed   {ZEROED} reads as zeroes now"
"""What a strip means that was made without what is dirty."""
LEGEND = f"{CHANGED_LEGEND}   {IDENTICAL} written, and the same as before"


class Cell(NamedTuple):
    """A part of the disk: shares of it, from 0 to 1."""

    changed: float
    zeroed: float
    """The part of what changed that reads as zeroes now."""
    dirty: float


def cells(changed: Iterable[Extent], width: int, start: int, end: int, dirty: Iterable[Extent] = ()) -> list[Cell]:
    """``width`` parts of the disk from ``start`` on and before ``end``, in bytes."""
    size = end - start
    if size <= 0:
        return [Cell(0, 0, 0)] * width
    shares = [[0.0] * width for _ in range(3)]
    for extents, of_all, of_zeroes in ((changed, shares[0], shares[1]), (dirty, shares[2], None)):
        for extent in extents:
            first, last = max(extent.offset, start) - start, min(extent.end, end) - start
            if first >= last:
                continue
            for cell in range(first * width // size, (last - 1) * width // size + 1):
                share = max(0.0, min(last, (cell + 1) * size / width) - max(first, cell * size / width)) * width / size
                of_all[cell] += share
                if of_zeroes is not None and extent.kind is Kind.ZERO:
                    of_zeroes[cell] += share
    return [Cell(*each) for each in zip(*shares, strict=True)]


def strip(
    extents: Iterable[Extent],
    size: int,
    width: int,
    *,
    start: int = 0,
    dirty: Iterable[Extent] = (),
) -> str:
    """``width`` characters that stand for ``size`` bytes from ``start`` on, each as full as the part of it that changed.

    ``·`` is unchanged, ``▁`` to ``█`` a little to all of it; ``0`` a cell in which most of what changed reads as zeroes now,
    ``=`` one in which something is ``dirty`` and nothing changed.
    """
    return "".join(map(_character, cells(extents, width, start, start + size, dirty)))


def _character(cell: Cell) -> str:
    if not cell.changed:
        return IDENTICAL if cell.dirty else UNCHANGED
    if cell.zeroed > cell.changed / 2:
        return ZEROED
    return _SHADES[max(1, min(len(_SHADES) - 1, round(cell.changed * (len(_SHADES) - 1))))]
